"""Images to tokens and back: a small VQ autoencoder that learns its codebook from the images.

An encoder turns each cell of f x f pixels, seen with its neighbours, into a short vector z. The
nearest of the V vectors of a codebook replaces z. A decoder draws the image from these codes:

    token = argmin_v |z - codebook[v]|^2          image = decoder(codebook[token])

    32 x 32 pixels  ->  8 x 8 vectors  ->  8 x 8 = 64 tokens  ->  8 x 8 codes  ->  32 x 32 pixels

All later files see images as these tokens: what the tokenizer loses is lost for good.

reads    images, through data.py
writes   out/tokenizer.pt, out/tokens.pt (see `open_tokens`), out/reconstructions.png
run      python tokenizer.py                   1 to 3 minutes on two cores
         python tokenizer.py --data photos/ --out photos_out --size 64
you see  how many codes are in use, the PSNR of unseen images (sunsets: 36 dB)
not here the adversarial and perceptual losses of VQGAN (arXiv 2012.09841): finer texture at many
         times the cost
"""
import math
import signal
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import ConcatDataset, Subset

from data import (Checkpoint, Folder, UserError, alone, arguments, autocast, batch_of,
                  command_line, describe, fingerprint, load, number, open_data, pick_device,
                  precision, printable, progress, restore, run, save, save_picture, seeded, sheet,
                  to_float, words_of, writable)

WIDTH = 64       # channels at the resolution of the tokens
FINE = 32        # channels at twice that resolution, in the decoder
DIM = 16         # dimensions of a code
WARMUP = 40      # steps as a plain autoencoder; then k-means of its z gives the first codes
LR = 3e-3        # peak learning rate, for both optimizers
COMMIT = 0.25    # weight of the commitment loss |z - code|^2, which keeps z near the codes
DECAY = 0.98     # per step, of the running means that are the codebook
RARE = 0.05      # a code used less than this fraction of its fair share restarts
BLURRED = 24     # PSNR in dB below which a remedy is printed
CAPTION = 64     # words of a caption that are read, at most


# --------------------------------------------------
# 1. The autoencoder

class Block(nn.Module):
    """x + f(x) with two 3x3 convolutions. The second starts at zero, and f(x) with it."""

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
    """Images [B, 3, H, W], float in [-1, 1], to tokens [B, N] int64 in 0..V-1, and back.

    Cells are row-major. PixelUnshuffle turns the f x f pixels of a cell into channels: nearly all
    work is done at the resolution of the token grid, many times faster on a CPU.
    """

    def __init__(self, config):
        super().__init__()
        self.config = dict(config)
        f, V, dim = config["downsample"], config["codebook"], config["dim"]
        width, fine = config["width"], config["fine"]
        self.rows = self.cols = config["size"] // f
        half = f // 2
        self.encoder = nn.Sequential(  # [B, 3, H, W]
            nn.PixelUnshuffle(f),  # [B, 3 f f, rows, cols]
            nn.Conv2d(3 * f * f, width, 1),  # [B, width, rows, cols]
            Block(width),
            nn.Conv2d(width, dim, 1))  # [B, dim, rows, cols]
        self.decoder = nn.Sequential(
            nn.Conv2d(dim, width, 3, padding=1),  # [B, width, rows, cols]
            Block(width),
            Block(width),
            nn.Conv2d(width, 4 * fine, 1),
            nn.PixelShuffle(2),  # [B, fine, 2 rows, 2 cols]
            Block(fine),
            Block(fine),
            nn.Conv2d(fine, 3 * half * half, 3, padding=1),
            nn.PixelShuffle(half))  # [B, 3, H, W]
        self.register_buffer("codebook", torch.randn(V, dim))
        # Running means, see move_codes. The counts are 0 until k-means gives the first codes.
        self.register_buffer("count", torch.zeros(V))
        self.register_buffer("total", torch.zeros(V, dim))
        # Half the time on a CPU.
        self.to(memory_format=torch.channels_last)
        # Of the convolutions. The nearest code is always found in float32.
        self.dtype = torch.float32
        self.warmup = WARMUP

    @torch.no_grad()
    def encode(self, images):
        """Images [B, 3, H, W], float in [-1, 1] -> tokens [B, N] int64."""
        return self.nearest(self.latents(images)).flatten(1)

    @torch.no_grad()
    def decode(self, tokens):
        """Tokens [B, N], any integer dtype -> images [B, 3, H, W], float in [-1, 1]."""
        codes = self.codebook[tokens.long()]  # [B, N, dim]
        return self.pixels(codes.unflatten(1, (self.rows, self.cols))).clamp(-1, 1)

    def latents(self, images):
        """[B, 3, H, W] -> z [B, rows, cols, dim], not yet quantised."""
        with autocast(images.device, self.dtype):
            z = self.encoder(images.contiguous(memory_format=torch.channels_last))
        return z.float().permute(0, 2, 3, 1)

    def nearest(self, z):
        """z [..., dim] -> the index of the nearest code [...], int64."""
        # |z - code|^2 = |z|^2 - 2 z.code + |code|^2, and |z|^2 is the same for all codes.
        length = self.codebook.square().sum(1)
        # In parts, whose distances take 128 MB at most.
        parts = z.reshape(-1, z.shape[-1]).split(2 ** 25 // len(self.codebook))
        index = [(length - 2 * part @ self.codebook.T).argmin(1) for part in parts]
        return torch.cat(index).view(z.shape[:-1])

    def pixels(self, codes):
        """[B, rows, cols, dim] -> [B, 3, H, W], not yet clipped to [-1, 1]."""
        with autocast(codes.device, self.dtype):
            return self.decoder(codes.permute(0, 3, 1, 2)).float()

    @property
    def fingerprint(self):
        """tokens.pt carries it, so that no other tokenizer decodes it."""
        return fingerprint(self.config, self.state_dict())

    def loss(self, images, step, seed=0):
        """The loss of training step `step`, a scalar. It also moves the codebook."""
        z = self.latents(images)  # [B, rows, cols, dim]
        if step < self.warmup:
            return picture_loss(self.pixels(z), images)
        if not self.count.any():
            self.first_codes(z.detach().flatten(0, 2), seed)
        tokens = self.nearest(z.detach())  # [B, rows, cols]
        code = self.codebook[tokens]  # [B, rows, cols, dim]
        # Straight-through: forward this is `code`, backward it is z. Argmin has no gradient:
        # without this line the encoder would learn nothing from the decoder.
        through = z + (code - z).detach()
        loss = picture_loss(self.pixels(through), images) + COMMIT * F.mse_loss(z, code)
        self.move_codes(z.detach().flatten(0, 2), tokens.flatten(), step, seed)
        return loss

    @torch.no_grad()
    def first_codes(self, z, seed):
        """k-means on one batch of z [M, dim]: random codes would lie far from the data."""
        random = seeded(seed, "first codes")
        noise = torch.randn(self.codebook.shape, generator=random).to(z)
        start = torch.randint(len(z), (len(self.codebook),), generator=random)
        # M may be below V, and equal codes would stay equal: a little noise.
        self.codebook.copy_(z[start.to(z.device)] + noise * 0.01 * z.std())
        for _ in range(10):
            uses, sums = self.uses_and_sums(z, self.nearest(z))
            mean = sums / uses.clamp(min=1)[:, None]
            self.codebook.copy_(torch.where(uses[:, None] > 0, mean, self.codebook))
        self.count.fill_(1)
        self.total.copy_(self.codebook)

    @torch.no_grad()
    def move_codes(self, z, tokens, step, seed):
        """Running k-means: each code follows the mean of the z [M, dim] that chose it
        (van den Oord et al. 2017, appendix A.1).

        A code that no z chooses would never move again, and the codebook would collapse. So it
        restarts at a random z of this batch (Jukebox, arXiv 2005.00341)."""
        uses, sums = self.uses_and_sums(z, tokens)
        # Counts are in units of a fair share, M / V uses: 1 is fair for any batch.
        fair = len(self.codebook) / len(z)
        self.count.lerp_(uses * fair, 1 - DECAY)
        self.total.lerp_(sums * fair, 1 - DECAY)
        self.codebook.copy_(self.total / self.count.clamp(min=RARE / 10)[:, None])
        rare = (self.count < RARE).nonzero().flatten()
        random = seeded(seed, "restart", step)
        fresh = z[torch.randint(len(z), (len(rare),), generator=random).to(z.device)]
        self.codebook[rare] = fresh
        self.total[rare] = fresh
        self.count[rare] = 1

    def uses_and_sums(self, z, tokens):
        """How many z [M, dim] chose each code [V], and their sums [V, dim]."""
        uses = torch.bincount(tokens, minlength=len(self.codebook)).to(z)
        return uses, torch.zeros_like(self.total).index_add_(0, tokens, z)


def picture_loss(drawn, images):
    """How far `drawn` is from `images`, both [B, 3, H, W]: a scalar.

    Squared error alone prefers a blur. The absolute error of the differences between neighbouring
    pixels keeps edges sharp."""
    loss = F.mse_loss(drawn, images) + 0.1 * F.l1_loss(drawn, images)
    for axis in (2, 3):
        loss = loss + 0.2 * F.l1_loss(drawn.diff(dim=axis), images.diff(dim=axis))
    return loss


def psnr(drawn, images):
    """[B] decibels, of [B, 3, H, W] in [-1, 1]: 10 log10(peak^2 / squared error), peak = 2."""
    error = (drawn - images).square().mean((1, 2, 3))
    return 10 * torch.log10(4 / error.clamp(min=1e-10))


def usage(tokens, V):
    """(codes in use, perplexity) of integer tokens. Perplexity is exp(entropy), at most V."""
    uses = torch.bincount(tokens.flatten().long(), minlength=V).double()
    share = uses[uses > 0] / uses.sum()
    return len(share), math.exp(-(share * share.log()).sum().item())


# --------------------------------------------------
# 2. Training, and the tokens of all images

def make_tokens(data="sunsets", out="out", size=32, downsample=4, codebook=512, steps=2000,
                batch=16, limit=0, seed=0, device="", resume=False):
    """Trains a tokenizer, encodes all images, writes the files; returns the tokenizer.

    The arguments are the flags. UserError if `out` has a tokenizer already.
    """
    began = time.time()
    device = pick_device(device)
    out = Path(out)
    train_set, test_set = open_images(data, out, size, downsample)
    n = min(limit or len(train_set), len(train_set))
    images = ConcatDataset([Subset(train_set, range(n)), test_set])
    captions = [*train_set.captions[:n], *test_set.captions]
    split = make_split(n, len(test_set))
    grid = dict(size=size, downsample=downsample, codebook=codebook)
    config = dict(grid, width=WIDTH, fine=FINE, dim=DIM)
    made_from = dict(data=train_set.fingerprint)
    settings = dict(config, batch=batch, seed=seed, limit=limit, **made_from)
    checkpoint = Checkpoint(out / "tokenizer_resume.pt", settings, resume, "python tokenizer.py")

    model = train(config, images, split, steps, batch, seed, device, checkpoint)
    tokens = encode(model, images)
    show(model, images, tokens, split, out)
    save(out / "tokenizer.pt", dict(
        kind="tokenizer", config=config, made_from=made_from, model=model.state_dict()))
    names = sorted(set(captions))
    place = {caption: i for i, caption in enumerate(names)}
    index = torch.tensor([place[caption] for caption in captions], dtype=torch.int32)
    save(out / "tokens.pt", dict(
        kind="tokens", tokens=tokens.int(), split=split, captions=names,
        caption_index=index, config=dict(grid, rows=model.rows, cols=model.cols, data=str(data)),
        made_from=dict(made_from, tokenizer=model.fingerprint)))
    checkpoint.done()
    print(f"wrote tokenizer.pt, tokens.pt, reconstructions.png to {printable(out)} "
          f"in {time.time() - began:.0f} s\nnext: {command_line('anyorder.py', '--out', out)}")
    return model


def open_images(data, out, size, downsample):
    """(training images, test images). UserError if their tokens cannot go to the folder `out`."""
    if size % downsample:
        raise UserError(f"--size {size} is not divisible by --downsample {downsample}: "
                        f"take --size {(size // downsample + 1) * downsample}")
    train_set = open_data(data, size, "train")
    test_set = open_data(data, size, "test")
    name = printable(out)
    if isinstance(train_set, Folder) and out.resolve().is_relative_to(Path(data).resolve()):
        raise UserError(f"--out {name} lies in --data {printable(data)}, its pictures would be "
                        "training images: choose another --out")
    writable(out)
    if (out / "tokenizer.pt").exists() or (out / "tokens.pt").exists():
        raise UserError(f"{name} already holds a tokenizer, and the models beside it need it: "
                        f"give another --out, or remove {name}")
    describe(train_set)
    describe(test_set)
    cells = size // downsample
    larger = ""
    if train_set.native and min(train_set.native) > size:
        larger = f": --size {2 * size} for more"
    print(f"trained at {size}x{size} ({cells}x{cells} cells){larger}")
    if len(test_set) < 4:
        print("evaluate.py needs 4 test images or more: put some into a folder test/")
    return train_set, test_set


def make_split(n, n_test):
    """uint8 [n + n_test]: 0 train, 1 validation (a twentieth of n, at most 1,000), 2 test."""
    split = torch.zeros(n + n_test, dtype=torch.uint8)
    split[n:] = 2
    if n > 1:
        shuffled = torch.randperm(n, generator=seeded("validation"))
        split[shuffled[:min(1000, max(n // 20, 1))]] = 1
    return split


def train(config, images, split, steps, batch, seed, device, checkpoint):
    """A Tokenizer, trained on the images of split 0. It begins where the checkpoint is."""
    torch.manual_seed(seed)
    state = checkpoint.state
    model = Tokenizer(config).to(device)
    model.warmup = min(WARMUP, steps // 2)
    # A resumed run keeps its dtype, whatever the probe says now.
    model.dtype = state.get("dtype") or precision(device)
    optimizers = make_optimizers(model)
    if state:
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"]):
            optimizer.load_state_dict(saved)

    def state_now():
        return dict(step=step + 1, model=model.state_dict(), dtype=model.dtype,
                    optimizers=[optimizer.state_dict() for optimizer in optimizers])

    first = state.get("step", 0)
    train_rows = (split == 0).nonzero().flatten().tolist()
    plan = ([train_rows[i] for i in batch_of(step, batch, len(train_rows), seed)]
            for step in range(first, steps))
    with progress(steps * batch, "tokenizer", "img", first * batch) as bar:
        for step, some in enumerate(batches(images, plan, device), first):
            loss = model.loss(some, step, seed)
            # A short warm-up: the encoder must be at full speed when the codebook begins. With 100
            # steps the tokens of sunsets were harder to predict, by 0.1 nats, at equal PSNR.
            rate = learning_rate(step, steps, LR, warm=20)
            value = update(loss, model, optimizers, rate, step)
            bar.update(batch)
            if step % 20 == 0:
                bar.set_postfix_str(f"loss {value:.4f}", refresh=False)
            checkpoint.after_step(state_now, step + 1)
    # Nothing is saved from here on: Ctrl-C ends the run at once.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # As load_tokenizer gives it, which must make the same tokens.
    model.dtype = torch.float32
    return model


def encode(model, images):
    """The tokens of all images, [n, N] int64."""
    parts = []
    with progress(len(images), "encoding", "img") as bar:
        for some in in_parts(model, images, range(len(images))):
            parts.append(model.encode(some).cpu())
            bar.update(len(some))
    return torch.cat(parts)


def show(model, images, tokens, split, out):
    """Prints the use of the codebook and the PSNR of unseen images; draws reconstructions.png."""
    V = len(model.codebook)
    used, perplexity = usage(tokens[split == 0], V)
    print(f"training images use {used} of {V} codes ({used / V:.0%}), perplexity {perplexity:.0f}")
    # Test images; where there are none, validation images.
    last = int(split.max())
    rows = (split == last).nonzero().flatten().tolist()
    rows = rows[::math.ceil(len(rows) / 1000)]
    decibels = [psnr(model.decode(model.encode(some)), some)
                for some in in_parts(model, images, rows)]
    part = ("training", "validation", "test")[last]
    decibels = torch.cat(decibels).mean()
    print(f"PSNR {decibels:.2f} dB on {len(rows):,} {part} images")
    if decibels < BLURRED:
        print(f"that is blurred (below {BLURRED} dB), and no drawn image will be sharper than "
              "those in reconstructions.png: try more --steps, --codebook 1024 or half the "
              "--downsample, in another --out")
    rows = rows[::math.ceil(len(rows) / 32)]
    before = torch.cat(list(in_parts(model, images, rows)))
    after = model.decode(model.encode(before))
    pairs = torch.stack([before, after], 1).flatten(0, 1)
    scale = math.ceil(96 / model.config["size"])
    save_picture(out / "reconstructions.png", sheet(pairs, 8, scale))


def load_tokenizer(path, device="cpu"):
    """The Tokenizer in a file that this script wrote: in eval mode, without gradients."""
    made_by = command_line("tokenizer.py", "--out", Path(path).parent)
    model = restore(Tokenizer, load(path, "tokenizer", made_by), path, made_by)
    return model.to(device).eval().requires_grad_(False)


def open_tokenizer(out, data, device="cpu"):
    """The Tokenizer in `out` that made the tokens `data`. UserError if another one did."""
    path = Path(out) / "tokenizer.pt"
    model = load_tokenizer(path, device)
    if model.fingerprint != data["made_from"]["tokenizer"]:
        raise UserError(f"{printable(path)} did not make the tokens.pt beside it: "
                        "remove both and run python tokenizer.py again")
    return model


def open_tokens(out, data=None):
    """The dict in out/tokens.pt. With `data`, UserError if it was made from other data.

    tokens         [n, N]   int64 (int32 in the file)
    split          [n]      uint8: 0 train, 1 validation, 2 test (for evaluate.py alone)
    captions       list of distinct str
    caption_index  [n]      int32: image i has captions[caption_index[i]]
    config         rows, cols, codebook, size, downsample; data, the --data it was made from
    made_from      fingerprints: data, tokenizer
    fingerprint    of the tokens
    """
    path = Path(out) / "tokens.pt"
    saved = load(path, "tokens", command_line("tokenizer.py", "--out", out))
    if data and open_data(data).fingerprint != saved["made_from"]["data"]:
        raise UserError(f"{printable(path)} was made from other data than {printable(data)} is now:"
                        f" give another --out, or remove {printable(out)}")
    saved["fingerprint"] = fingerprint(saved["tokens"])
    saved["tokens"] = saved["tokens"].long()
    return saved


def vocabulary(data):
    """(words, length) of the training captions in `data`, the dict of `open_tokens`.

    `length` is that of the longest caption, in words, at most CAPTION. A line says what is cut."""
    rows = data["caption_index"][data["split"] == 0].unique().tolist()
    captions = [data["captions"][i] for i in rows]
    words = [words_of(caption) for caption in captions]
    lengths = [len(each) for each in words]
    cut = sum(length > CAPTION for length in lengths)
    if cut:
        print(f"{cut:,} captions have more than {CAPTION} words, the others are not read: "
              + captions[lengths.index(max(lengths))])
    return sorted(set().union(*words)), min(CAPTION, max(1, *lengths))


# --------------------------------------------------
# 3. Machinery: skip this on a first reading

def learning_rate(step, steps, peak, warm=None):
    """Linear warm-up over `warm` steps (default: a twentieth of the run), then a cosine to zero."""
    warm = warm or max(1, steps // 20)
    done = max(0, step - warm) / max(1, steps - warm)
    return peak * min((step + 1) / warm, 0.5 + 0.5 * math.cos(math.pi * done))


def update(loss, model, optimizers, lr, step):
    """One step of all optimizers down the gradient of `loss`, clipped to 1; returns the loss.

    UserError if the loss or its gradient is not finite."""
    loss.backward()
    norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    if not math.isfinite(loss.item() + norm.item()):
        raise UserError(f"the loss is {loss.item()}, its gradient {norm.item()}, at step {step}: "
                        "try a smaller --lr (tokenizer.py: a larger --batch), or another --seed")
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        optimizer.zero_grad()
    return loss.item()


def make_optimizers(model):
    """AdamW, and Muon for the 3x3 convolutions of the blocks."""
    others = dict(model.named_parameters())
    inner = [others.pop(name) for name in list(others)
             if name.endswith(("conv1.weight", "conv2.weight"))]
    adamw = torch.optim.AdamW(others.values(), LR, (0.9, 0.95), weight_decay=0.01, fused=True)
    return adamw, Muon(inner, LR, model.dtype)


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, made orthogonal (Jordan et al. 2024, scaled as in arXiv 2502.16982).

    A gradient has a few large directions and many small ones that also matter. The step is equally
    long in each:

        m <- 0.95 m + 0.05 grad
        w <- (1 - 0.05 lr) w - 0.2 sqrt(max(i, j)) lr orthogonal(0.95 m + 0.05 grad)

    w is a matrix [i, j], or a convolution, flattened to [out, rest]. Weights of one shape are a
    group, a batch in `dtype`. torch.optim.Muon takes no convolutions, and bfloat16 alone, which
    many CPUs emulate."""

    def __init__(self, weights, lr, dtype):
        groups = {}
        for w in weights:
            groups.setdefault(w.shape, []).append(w)
        super().__init__([{"params": alike} for alike in groups.values()], {"lr": lr})
        self.dtype = dtype

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            weights, lr = group["params"], group["lr"]
            grad = torch.stack([w.grad for w in weights])
            # The momenta of all weights of the group are one tensor, kept with the first.
            momentum = self.state[weights[0]].setdefault("momentum", torch.zeros_like(grad))
            momentum.lerp_(grad, 0.05)
            ahead = momentum.lerp(grad, 0.05).flatten(2).to(self.dtype)  # [n, i, j]
            length = 0.2 * max(ahead.shape[1:]) ** 0.5 * lr
            for w, turn in zip(weights, orthogonal(ahead).float().view_as(grad)):
                w.mul_(1 - 0.05 * lr).add_(turn, alpha=-length)


def orthogonal(g):
    """Nearly U V^T of each matrix of g [n, i, j] = U S V^T, by five Newton-Schulz steps.

    Each step x <- a x + (b x x^T + c (x x^T)^2) x sends a singular value s to a s + b s^3 + c s^5.
    All that are not tiny come to lie between 0.65 and 1.2."""
    if g.shape[1] > g.shape[2]:
        return orthogonal(g.mT).mT
    x = g / (g.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        square = x @ x.mT
        mix = torch.baddbmm(square, square, square, beta=-4.7750, alpha=2.0315)
        x = torch.baddbmm(x, mix, x, beta=3.4445)
    return x


def in_parts(model, images, rows):
    """`batches` of these rows: 256 images of 32 x 32 at once, 4 of 256 x 256."""
    n = max(1, min(256, 2 ** 18 // model.config["size"] ** 2))
    plan = (rows[i:i + n] for i in range(0, len(rows), n))
    return batches(images, plan, model.codebook.device)


def batches(images, plan, device):
    """For each list of rows in `plan`, its images: float [B, 3, H, W] in [-1, 1].

    Threads read ahead. Processes need shared memory: where it is full, a run waits for ever."""
    def read(rows):
        return [images[row][0] for row in rows]

    with ThreadPoolExecutor(2) as pool:
        futures = (pool.submit(read, rows) for rows in plan)
        ahead = deque(islice(futures, 4))
        while ahead:
            some = torch.stack(ahead.popleft().result())
            ahead.extend(islice(futures, 1))
            yield to_float(some.to(device))


def main():
    parser = arguments(__doc__)
    parser.add_argument("--size", type=number(int, 1, 4096), default=32,
                        help="side of an image in pixels")
    parser.add_argument("--downsample", type=int, choices=(2, 4, 8, 16), default=4,
                        help="side of a cell in pixels")
    parser.add_argument("--codebook", type=number(int, 2, 65536), default=512,
                        help="number of tokens, V")
    parser.add_argument("--steps", type=number(int, 1), default=2000, help="training steps")
    parser.add_argument("--batch", type=number(int, 1, 65536), default=16, help="images a step")
    parser.add_argument("--limit", type=number(int, 0), default=0,
                        help="training images to use; 0 takes all")
    parser.add_argument("--resume", action="store_true", help="go on where a stopped run left off")
    args = parser.parse_args()
    alone("tokenizer.py")
    args.data = args.data or "sunsets"
    make_tokens(**vars(args))


if __name__ == "__main__":
    run(main)
