"""Images to tokens and back: a small VQ autoencoder that learns its alphabet from the images.

The one idea: an image becomes a grid of integers. A network turns each cell of `downsample` x `downsample` pixels,
seen with its neighbours, into a short vector z; the nearest of the V vectors of a codebook replaces it; a second
network draws the picture from these codes alone:

    token = argmin_v |z - codebook[v]|^2          picture = decoder(codebook[token])

    32 x 32 pixels  ->  8 x 8 vectors  ->  8 x 8 = 64 tokens  ->  8 x 8 codes  ->  32 x 32 pixels

All later files see images as these tokens, so whatever the tokenizer loses is lost for good: it is the floor of every
quality figure. Therefore it prints its PSNR on images it has not seen, and how many codes are in use.

    python tokenizer.py                       1 to 3 minutes on two cores; sunsets, 36.4 dB PSNR on the test images
    python tokenizer.py --data photos/        your own images: a folder, or IDX files

It reads images through data.py and writes, only once all is done,

    out/tokenizer.pt           the autoencoder (`load_tokenizer`)
    out/tokens.pt              the tokens and captions of all images (`load_tokens`)
    out/reconstructions.png    test images, each beside its reconstruction

What it does not do: no adversarial loss and no perceptual network (VQGAN, arXiv 2012.09841, has both), which give finer
texture at many times the cost.
"""
import hashlib
import math
import os
import signal
import tempfile
import time
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from data import (Folder, UserError, arguments, describe, fingerprint, load, on_interrupt, open_data, pick_device,
                  printable, restore, run, save, save_picture, sheet, to_float)

WIDTH, FINE = 96, 32            # channels at the resolution of the tokens, and at twice that in the decoder
DIM = 16                        # dimensions of a code
WARMUP = 40                     # steps without a codebook (half of a shorter run): it then begins as the encoder's z
LR = 3e-3                       # at its peak, for both optimizers
COMMIT = 0.25                   # weight of the commitment loss |z - code|^2, which keeps the encoder near the codes
DECAY = 0.98                    # per step, of the exponential moving averages that are the codebook
RARE = 0.05                     # a code used less than this fraction of its fair share is moved to fresh data
SAVE_EVERY = 30                 # seconds between two states to --resume from


# ---------------------------------------------------------------- pure functions

def seeded(*key, device="cpu"):
    """A random generator that depends on `key` alone. Keyed by (seed, step), it lets a resumed run repeat what an
    uninterrupted one would have drawn, without any generator's state on the disk."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:7], "big"))


def batch_of(step, batch, n, seed):
    """The `batch` indices, below n, of one step: random permutations of 0..n-1 one after another, cut into batches.
    A batch may be larger than n. With n=3, batch=2 the steps 0, 1, 2 see each image exactly twice."""
    indices = []
    while len(indices) < batch:
        epoch, start = divmod(step * batch + len(indices), n)
        indices += permutation(n, seed, epoch)[start:start + batch - len(indices)]
    return indices


@lru_cache(2)
def permutation(n, seed, epoch):
    """A random permutation of 0..n-1, a list: always the same one for the same n, seed and epoch."""
    return torch.randperm(n, generator=seeded(seed, "epoch", epoch)).tolist()


def learning_rate(step, steps):
    """Linear warm-up over 20 steps, then half a cosine down to 2% of LR."""
    return LR * min(1, (step + 1) / 20) * (0.02 + 0.49 * (1 + math.cos(math.pi * step / steps)))


def picture_loss(drawn, images):
    """How far `drawn` is from `images`, both [B, 3, H, W]: squared error, plus a little absolute error, plus the
    absolute error of the differences between neighbouring pixels. The last term is what keeps edges sharp: for
    squared error alone, where it is unsure of an edge's place, a blur is the best guess."""
    loss = F.mse_loss(drawn, images) + 0.1 * F.l1_loss(drawn, images)
    for axis in (2, 3):
        loss = loss + 0.2 * F.l1_loss(drawn.diff(dim=axis), images.diff(dim=axis))
    return loss


def psnr(drawn, images):
    """[B] decibels, of [B, 3, H, W] in [-1, 1]: 10 log10(peak^2 / mean squared error) of each image, peak = 2."""
    return 10 * torch.log10(4 / (drawn - images).square().mean((1, 2, 3)).clamp(min=1e-10))


def usage(tokens, V):
    """(codes in use, perplexity) of any integer tensor. Perplexity is exp(entropy): V if all are used equally."""
    share = torch.bincount(tokens.flatten().long(), minlength=V).double()
    share = share[share > 0] / share.sum()
    return len(share), math.exp(-(share * share.log()).sum().item())


def held_back(n):
    """The validation images among n: a twentieth, at most 1,000, chosen by a hash, so always the same ones."""
    ranked = sorted(range(n), key=lambda i: hashlib.sha256(f"validation {i}".encode()).digest())
    return set(ranked[:min(1000, max(n // 20, 1))] if n > 1 else [])


# ---------------------------------------------------------------- the autoencoder

class Block(nn.Module):
    """x + f(x) with two 3x3 convolutions. The second starts at zero, so a new block is the identity."""

    def __init__(self, width):
        super().__init__()
        self.norm = nn.GroupNorm(1, width)
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        nn.init.zeros_(self.conv2.weight)
        nn.init.zeros_(self.conv2.bias)

    def forward(self, x):
        return x + self.conv2(F.silu(self.conv1(self.norm(x))))


class Tokenizer(nn.Module):
    """Images [B, 3, H, W], float in [-1, 1], to tokens [B, N], int64 in 0..V-1, row-major, and back.

    Nearly all the work is done at the low resolution of the token grid: PixelUnshuffle first turns each cell of
    f x f pixels into the channels of one pixel. On a CPU this is many times faster than convolving the pixels."""

    def __init__(self, config):
        super().__init__()
        self.config = dict(config)
        f, V, width, fine, dim = (config[key] for key in ("downsample", "codebook", "width", "fine", "dim"))
        self.rows = self.cols = config["size"] // f
        half = f // 2                                                        # pixels per side of a cell's quarter
        self.encoder = nn.Sequential(                                        # [B, 3, H, W]
            nn.PixelUnshuffle(f), nn.Conv2d(3 * f * f, width, 1),            # [B, width, rows, cols]
            Block(width), nn.Conv2d(width, dim, 1))                          # [B, dim, rows, cols]
        self.decoder = nn.Sequential(
            nn.Conv2d(dim, width, 3, padding=1), Block(width), Block(width),
            nn.Conv2d(width, 4 * fine, 1), nn.PixelShuffle(2),               # [B, fine, 2 rows, 2 cols]
            Block(fine), Block(fine),
            nn.Conv2d(fine, 3 * half * half, 3, padding=1), nn.PixelShuffle(half))
        self.register_buffer("codebook", torch.randn(V, dim))
        self.register_buffer("count", torch.ones(V))                         # running mean of uses, 1 is a fair share
        self.register_buffer("total", torch.zeros(V, dim))                   # running mean of the sum of their z
        self.to(memory_format=torch.channels_last)                           # half the time on a CPU
        self.kind = torch.float32                                            # of the convolutions: train() has its own
        self.warmup = WARMUP

    @torch.no_grad()
    def encode(self, images):
        """Images [B, 3, H, W], float in [-1, 1], H = W = config["size"] -> tokens [B, N] int64."""
        return self.nearest(self.latents(images)).view(len(images), self.rows * self.cols)

    @torch.no_grad()
    def decode(self, tokens):
        """Tokens [B, N], any integer dtype -> images [B, 3, H, W], float in [-1, 1]."""
        return self.draw(self.codebook[tokens.long()].view(len(tokens), self.rows, self.cols, -1)).clamp(-1, 1)

    def latents(self, images):
        """[B, 3, H, W] -> z [B, rows, cols, dim], not yet quantised."""
        with self.autocast():
            z = self.encoder(images.contiguous(memory_format=torch.channels_last))
        return z.float().permute(0, 2, 3, 1)

    def nearest(self, z):
        """[..., dim] -> the index of the nearest code [...]. |z|^2 is the same for all codes and left out."""
        few = z.reshape(-1, z.shape[-1]).split(max(1, 2 ** 25 // len(self.codebook)))    # distances of 128 MB at most
        length = self.codebook.square().sum(1)
        return torch.cat([(length - 2 * part @ self.codebook.T).argmin(1) for part in few]).view(z.shape[:-1])

    def draw(self, codes):
        """[B, rows, cols, dim] -> [B, 3, H, W], not yet clipped to [-1, 1]."""
        with self.autocast():
            return self.decoder(codes.permute(0, 3, 1, 2)).float()

    def autocast(self):
        """Convolutions are computed in self.kind. Which code is nearest is never decided in less than float32."""
        return torch.autocast(self.codebook.device.type, self.kind, enabled=self.kind != torch.float32)

    @property
    def fingerprint(self):
        """16 hex digits of the weights; tokens.pt carries it, so that tokens are never decoded by a stranger."""
        return fingerprint(self.config, self.state_dict())

    def loss(self, images, step, seed=0):
        """One training step's loss, a scalar; also moves the codebook. `step` counts from 0, `seed` is for restarts."""
        z = self.latents(images)
        if step < self.warmup:
            return picture_loss(self.draw(z), images)
        if step == self.warmup:
            self.first_codes(z.detach().flatten(0, 2), seed)
        tokens = self.nearest(z.detach())
        code = self.codebook[tokens]
        # Straight-through: forward this is `code`; backward it is z, as if nothing had been rounded. The argmin has
        # no gradient, so without this line the encoder would never hear from the decoder.
        through = z + (code - z).detach()
        loss = picture_loss(self.draw(through), images) + COMMIT * F.mse_loss(z, code)
        self.move_codes(z.detach().flatten(0, 2), tokens.flatten(), step, seed)
        return loss

    @torch.no_grad()
    def first_codes(self, z, seed):
        """k-means on one batch of z [M, dim]: a codebook drawn blindly would lie far from the data and collapse."""
        V = len(self.codebook)
        random = seeded(seed, "first codes")
        noise = torch.randn(V, z.shape[1], generator=random).to(z) * 0.01 * z.std()      # M may be below V
        self.codebook.copy_(z[torch.randint(len(z), (V,), generator=random).to(z.device)] + noise)
        for _ in range(10):
            tokens = self.nearest(z)
            uses = torch.bincount(tokens, minlength=V)[:, None]
            sums = torch.zeros_like(self.total).index_add_(0, tokens, z)
            self.codebook.copy_(torch.where(uses > 0, sums / uses.clamp(min=1), self.codebook))
        self.count.fill_(1)
        self.total.copy_(self.codebook)

    @torch.no_grad()
    def move_codes(self, z, tokens, step, seed):
        """Each code follows the mean of the z [M, dim] that chose it (running k-means, van den Oord et al. 2017,
        appendix A.1). One that nobody chooses would stay away for ever and the codebook collapse: it restarts at a
        random z of this batch, where it takes over a part of a crowd (Jukebox, arXiv 2005.00341)."""
        V = len(self.codebook)
        fair = V / len(z)
        uses = torch.bincount(tokens, minlength=V).to(z) * fair
        sums = torch.zeros_like(self.total).index_add_(0, tokens, z) * fair
        self.count.lerp_(uses, 1 - DECAY)
        self.total.lerp_(sums, 1 - DECAY)
        self.codebook.copy_(self.total / self.count.clamp(min=RARE / 10)[:, None])
        rare = (self.count < RARE).nonzero().flatten()
        fresh = z[torch.randint(len(z), (len(rare),), generator=seeded(seed, "restart", step)).to(z.device)]
        self.codebook[rare], self.total[rare], self.count[rare] = fresh, fresh, 1.0


# ---------------------------------------------------------------- what makes training fast, here and in all later files

def orthogonal(g):
    """U V^T of each matrix of g [n, i, j] = U S V^T, nearly: all singular values that are not tiny come to lie between
    0.65 and 1.2. Five times x <- a x + (b x x^T + c (x x^T)^2) x, which sends each of them, s, to a s + b s^3 + c s^5.
    """
    x = g if g.shape[1] <= g.shape[2] else g.mT
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        square = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return x if g.shape[1] <= g.shape[2] else x.mT


class Muon(torch.optim.Optimizer):
    """Momentum, made orthogonal (Jordan et al. 2024, scaled as in arXiv 2502.16982): where a gradient has a few large
    directions and many small ones, all of which matter, the step is as long in each.

        m <- 0.95 m + 0.05 grad        w <- (1 - 0.05 lr) w - 0.2 sqrt(max(i, j)) lr orthogonal(0.95 m + 0.05 grad)

    For matrices w [i, j], and convolutions [i, ...], of which all that makes one output is a row; those of one shape go
    together, in `dtype`. The library's own, torch.optim.Muon, takes no convolutions, and is always in bfloat16, which
    many CPUs emulate.
    """

    def __init__(self, matrices, lr, dtype):
        super().__init__(matrices, {"lr": lr})
        self.dtype = dtype
        for w in matrices:
            self.state[w]["momentum"] = torch.zeros_like(w)

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            lr, alike = group["lr"], {}
            for w in group["params"]:
                alike.setdefault(w.shape, []).append(w)
            for shape, some in alike.items():
                grads = [w.grad for w in some]
                past = [self.state[w]["momentum"] for w in some]
                torch._foreach_lerp_(past, grads, 0.05)
                ahead = torch.stack(torch._foreach_lerp(past, grads, 0.05)).flatten(2).to(self.dtype)      # [n, i, j]
                turn = orthogonal(ahead).float().view(-1, *shape).unbind()
                torch._foreach_mul_(some, 1 - 0.05 * lr)
                torch._foreach_add_(some, turn, alpha=-0.2 * max(ahead.shape[1:]) ** 0.5 * lr)


def precision(device):
    """The number type for the big products: bfloat16 where a probe of a few milliseconds finds it faster, else float32.
    (A CPU without bfloat16 instructions emulates them, 100 times slower; a GPU of the last years has them.)"""
    if device.type == "mps":
        return torch.float32
    best, n = dict.fromkeys((torch.float32, torch.bfloat16), math.inf), 256 if device.type == "cpu" else 2048
    for _ in range(8):                                 # in turns, and the best counts: others may use the machine
        for dtype in best:
            a = torch.ones(n, n, device=device, dtype=dtype)     # so much that starting it does not count
            start = time.perf_counter()
            (a @ a).sum().item()
            best[dtype] = min(best[dtype], time.perf_counter() - start)
    return torch.bfloat16 if best[torch.bfloat16] < best[torch.float32] else torch.float32


# ---------------------------------------------------------------- files

def load_tokenizer(path, device="cpu"):
    """The Tokenizer in a file that this script wrote, ready to use: no dropout, no gradients."""
    def checked(config):
        check(config["size"], config["downsample"], config["codebook"], steps=1, batch=1, limit=0)
        return Tokenizer(config)

    model = restore(checked, load(path, "tokenizer", "python tokenizer.py"), path, "python tokenizer.py")
    return model.to(device).eval().requires_grad_(False)


def load_tokens(path):
    """The dict in tokens.pt, checked:

    tokens         [n, N]   uint8, int16 or int32, whichever is the smallest to hold V-1
    captions       list of distinct str;  caption_index [n] int32: image i has captions[caption_index[i]]
    split          [n]      uint8: 0 train, 1 validation (of the training images), 2 test (for evaluate.py alone)
    config         rows, cols, codebook, size, downsample, and data, the --data it was made with
    made_from      fingerprints: data, tokenizer
    """
    saved = load(path, "tokens", "python tokenizer.py")
    try:
        tokens, index, split, config = (saved[key] for key in ("tokens", "caption_index", "split", "config"))
        whole = (tokens.shape == (len(split), config["rows"] * config["cols"]) and index.shape == split.shape
                 and not any(t.is_floating_point() for t in (tokens, index, split)) and len(tokens) > 0
                 and 0 <= int(tokens.min()) <= int(tokens.max()) < config["codebook"]
                 and 0 == int(split.min()) <= int(split.max()) <= 2 and isinstance(config["size"], int)
                 and 0 <= int(index.min()) <= int(index.max()) < len(saved["captions"])
                 and all(isinstance(caption, str) for caption in saved["captions"])
                 and {"data", "tokenizer"} <= saved["made_from"].keys())
    except Exception:
        whole = False
    if not whole:
        raise UserError(f"{printable(path)} is damaged: run python tokenizer.py again")
    return saved


def batches(dataset, index_lists, total):
    """Reads images only as they are needed, in two other processes if `total` are worth starting them. For each of the
    lists of indices, which may be made on the way: (uint8 [B, 3, H, W], list of captions)."""
    workers = 2 if total >= 2000 else 0
    return DataLoader(dataset, batch_sampler=index_lists, num_workers=workers, collate_fn=collate,
                      worker_init_fn=leave_interrupts)


def leave_interrupts(_):
    """A reading process starts with this: Ctrl-C reaches all processes, but the parent alone decides what to do."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def collate(items):
    """B pairs (uint8 [3, H, W], caption) -> (uint8 [B, 3, H, W], list of B captions)."""
    return torch.stack([image for image, _ in items]), [caption for _, caption in items]


def chunks(indices, size):
    """A list cut into lists that fit into memory whatever the image size: 256 images of 32 x 32, 4 of 256 x 256."""
    n = max(1, min(256, 2 ** 18 // size ** 2))
    return [indices[i:i + n] for i in range(0, len(indices), n)]


def read(model, dataset, indices, title="", compare=False):
    """Encode images of a dataset: (tokens [n, N] int64, n captions, mean PSNR in dB, or nan unless `compare`)."""
    device, tokens, captions, quality = model.codebook.device, [], [], [torch.tensor([math.nan])]
    with tqdm(total=len(indices), desc=title, unit="img", disable=not title) as bar:
        for images, texts in batches(dataset, chunks(indices, model.config["size"]), len(indices)):
            images = to_float(images.to(device))
            tokens.append(model.encode(images))
            captions += texts
            if compare:
                quality.append(psnr(model.decode(tokens[-1]), images).cpu())
            bar.update(len(images))
    return torch.cat(tokens).cpu(), captions, torch.cat(quality).nanmean().item()


# ---------------------------------------------------------------- training

def optimizers(model):
    """AdamW, and Muon for the 3x3 convolutions of the blocks."""
    blocks = [module for module in model.modules() if isinstance(module, Block)]
    inner = [conv.weight for block in blocks for conv in (block.conv1, block.conv2)]
    others = [w for w in model.parameters() if all(w is not other for other in inner)]
    return (torch.optim.AdamW(others, lr=LR, betas=(0.9, 0.95), weight_decay=0.01, fused=True),
            Muon(inner, LR, model.kind))


def train(dataset, learn, look, config, steps, batch, seed, device, out, resume):
    """A new Tokenizer, trained on the images `learn` of a dataset; `look` are the validation images to report on.
    Its state goes to `out` every SAVE_EVERY seconds; with `resume` it goes on from there, on a CPU bit for bit."""
    torch.manual_seed(seed)
    model = Tokenizer(config).to(device)
    path, first, saved_at = resume_path(out), 0, time.time()
    asked = dict(config, steps=steps, batch=batch, seed=seed, images=len(learn), optimizer="Muon")
    model.kind, model.warmup = precision(device), min(WARMUP, steps // 2)
    if resume and os.path.exists(path):
        state = load(path, "tokenizer_resume", "python tokenizer.py without --resume")
        for name, made, now in [("data", state["made_from"].get("data"), dataset.fingerprint)] + [
                (key, state["config"].get(key), asked[key]) for key in asked]:
            if made != now:
                raise UserError(f"{printable(path)} was made with {name} {printable(made)}, now it is {now}: give the "
                                "same flags, or leave out --resume")
        model.load_state_dict(state["model"])
        model.kind = torch.bfloat16 if state["bfloat16"] else torch.float32    # whatever the probe says this time
        first = state["step"]
    both = optimizers(model)
    if first:
        for optimizer, momenta in zip(both, state["optimizers"]):
            optimizer.load_state_dict(momenta)
    if resume:
        print(f"resuming at step {first:,}" if first else f"nothing to resume in {printable(out)}: starting afresh")

    stop = on_interrupt()
    plan = ([learn[i] for i in batch_of(step, batch, len(learn), seed)] for step in range(first, steps))
    with tqdm(total=steps * batch, initial=first * batch, desc="tokenizer", unit="img") as bar:
        for step, (images, _) in enumerate(batches(dataset, plan, batch * (steps - first)), first):
            loss = model.loss(to_float(images.to(device)), step, seed)
            loss.backward()
            norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            if not math.isfinite(loss.item() + norm.item()):
                raise UserError(f"the loss is {loss.item()}, its gradient {norm.item()}, at step {step}: try a larger "
                                "--batch or another --seed")
            for optimizer in both:
                optimizer.param_groups[0]["lr"] = learning_rate(step, steps)
                optimizer.step()
                optimizer.zero_grad()
            bar.update(len(images))
            if step % 20 == 0:
                bar.set_postfix_str(f"loss {loss.item():.4f}", refresh=False)
            if (step + 1) % max(steps // 4, 100) == 0:
                quality = read(model, dataset, look, compare=True)[2]
                tqdm.write(f"step {step + 1:,}: validation PSNR {quality:.2f} dB")
            leave = bool(stop)                           # asked once: what says that it goes on has saved its state
            if leave or step + 1 == steps or time.time() - saved_at > SAVE_EVERY:
                save(path, dict(kind="tokenizer_resume", version=1, config=asked, step=step + 1,
                                made_from=dict(data=dataset.fingerprint), model=model.state_dict(),
                                optimizers=[each.state_dict() for each in both],
                                bfloat16=model.kind == torch.bfloat16))
                saved_at = time.time()
            if leave:
                bar.close()
                print(f"stopped at step {step + 1:,}: the same command with --resume goes on from "
                      f"{printable(path)}")
                raise KeyboardInterrupt
    signal.signal(signal.SIGINT, signal.default_int_handler)     # encoding again is little work: Ctrl-C ends it at once
    model.kind = torch.float32                                   # as it is when it comes from its file
    return model


def resume_path(out):
    """The file in the folder `out` that --resume goes on from."""
    return os.path.join(out, "tokenizer_resume.pt")


def make_tokens(data="sunsets", out="out", size=32, downsample=4, codebook=512, steps=2000, batch=16, limit=0, seed=0,
                device="", resume=False):
    """Train a tokenizer, encode all images, write tokenizer.pt, tokens.pt and reconstructions.png to `out`; returns
    the Tokenizer. The arguments are the flags. UserError, before anything is written, if one makes no sense."""
    began, device = time.time(), pick_device(device)
    check(size, downsample, codebook, steps, batch, limit)
    images, test = open_data(data, size, "train"), open_data(data, size, "test")
    whole = os.path.join(os.path.realpath(data), "")
    if isinstance(images, Folder) and os.path.join(os.path.realpath(out), "").startswith(whole):
        raise UserError(f"--out {printable(out)} lies in --data {printable(data)}: its pictures would become training "
                        "images, choose another --out")
    try:                                                         # now: better to know at once
        os.makedirs(out, exist_ok=True)
        tempfile.TemporaryFile(dir=out).close()
    except OSError as error:
        raise UserError(f"--out {printable(out)} cannot be written to ({printable(error.strerror)}): choose another "
                        "folder") from None
    describe(images), describe(test)
    n = min(limit or len(images), len(images))
    held = held_back(n)
    learn = [i for i in range(n) if i not in held]
    config = dict(size=size, downsample=downsample, codebook=codebook, width=WIDTH, fine=FINE, dim=DIM)
    model = train(images, learn, sorted(held)[:256] or learn, config, steps, batch, seed, device, out, resume)
    took = time.time() - began

    tokens, captions, _ = read(model, images, list(range(n)), "encoding")
    split = torch.tensor([1 if i in held else 0 for i in range(n)] + [2] * len(test), dtype=torch.uint8)
    used, perplexity = usage(tokens[split[:n] == 0], codebook)
    print(f"{used} of {codebook} codes in use ({used / codebook:.0%}), perplexity {perplexity:.0f}, "
          "over the training images")
    shown, pick, which = images, sorted(held) or learn, "validation"
    if len(test):
        shown, pick, which = test, list(range(len(test))), "test"
        more, texts, quality = read(model, test, pick, "encoding", compare=True)
        tokens, captions = torch.cat([tokens, more]), captions + texts
    else:
        quality = read(model, images, pick, compare=True)[2]
    print(f"PSNR {quality:.2f} dB on {len(pick):,} {which} images")

    names = sorted(set(captions))
    place = {name: i for i, name in enumerate(names)}
    small = next(t for t in (torch.uint8, torch.int16, torch.int32) if codebook - 1 <= torch.iinfo(t).max)
    made_from = dict(data=images.fingerprint)
    save(os.path.join(out, "tokenizer.pt"), dict(kind="tokenizer", version=1, config=config, made_from=made_from,
                                                 model=model.state_dict()))
    save(os.path.join(out, "tokens.pt"), dict(
        kind="tokens", version=1, made_from=dict(made_from, tokenizer=model.fingerprint),
        config=dict(rows=model.rows, cols=model.cols, codebook=codebook, size=size, downsample=downsample,
                    data=str(data)),
        tokens=tokens.to(small), captions=names, split=split,
        caption_index=torch.tensor([place[caption] for caption in captions], dtype=torch.int32)))
    some = to_float(torch.stack([shown[i][0] for i in pick[::max(1, len(pick) // 32)][:32]])).to(device)
    pairs = torch.stack([some, model.decode(model.encode(some))], 1).flatten(0, 1)     # original, reconstruction, ...
    save_picture(os.path.join(out, "reconstructions.png"), sheet(pairs, 8, max(1, 96 // size)))
    if os.path.exists(resume_path(out)):
        os.remove(resume_path(out))
    print(f"wrote tokenizer.pt, tokens.pt, reconstructions.png to {printable(out)} in {time.time() - began:.0f} s, "
          f"{took:.0f} s of them training\nnext: python anyorder.py"
          + (f" --out {printable(out)}" if out != "out" else ""))
    return model


def check(size, downsample, codebook, steps, batch, limit):
    """UserError for flags that make no sense, with one that does."""
    if downsample < 2 or downsample & (downsample - 1):
        raise UserError(f"--downsample {downsample} is not a power of two: take 2, 4, 8 or 16")
    if size % downsample or not 1 <= size <= 4096:
        raise UserError(f"--size {size} is not divisible by --downsample {downsample}, or not in 1..4096: take --size "
                        f"{min(max(1, round(size / downsample)), max(1, 4096 // downsample)) * downsample}")
    if not 2 <= codebook <= 65536:
        raise UserError(f"--codebook {codebook} is out of range: take 2 to 65536 codes, such as 512")
    if steps < 1 or not 1 <= batch <= 65536 or limit < 0:
        raise UserError(f"--steps {steps} --batch {batch} --limit {limit}: expected at least 1, 1 and 0, and a batch "
                        "of at most 65,536")


def main():
    parser = arguments(__doc__)
    parser.add_argument("--size", type=int, default=32, help="side of an image in pixels")
    parser.add_argument("--downsample", type=int, default=4, help="pixels per side of a token's cell, a power of two")
    parser.add_argument("--codebook", type=int, default=512, help="number of different tokens, V")
    parser.add_argument("--steps", type=int, default=2000, help="training steps")
    parser.add_argument("--batch", type=int, default=16, help="images per training step")
    parser.add_argument("--limit", type=int, default=0, help="use only the first so many training images; 0 takes all")
    parser.add_argument("--resume", action="store_true", help="go on where a stopped run of the same command left off")
    args = parser.parse_args()
    make_tokens(data=args.data, out=args.out, size=args.size, downsample=args.downsample, codebook=args.codebook,
                steps=args.steps, batch=args.batch, limit=args.limit, seed=args.seed, device=args.device,
                resume=args.resume)


if __name__ == "__main__":
    run(main)
