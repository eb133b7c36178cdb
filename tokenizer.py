"""Images to discrete tokens and back: a small VQ autoencoder."""

import hashlib
import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from data import UserError, arguments, fingerprint, load, open_data, pick_device, run, save, sheet, to_float

WIDTH, FINE = 96, 32    # channels at the resolution of the tokens, and at twice that resolution in the decoder
DIM = 16                # dimensions in which latents and codes are compared
WARMUP = 100            # steps without quantisation, before the codebook is initialised from data
LR, BETAS, DECAY = 2e-3, (0.9, 0.95), 0.01
COMMIT = 0.25
FORGET = 0.98           # of the codebook's running means
SAVE_EVERY = 30         # seconds between two states to resume from


class Block(nn.Module):
    """x + f(x) with two 3x3 convolutions; the last one starts at zero, so that a new block changes nothing."""

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
    def __init__(self, config):
        super().__init__()
        self.config = dict(config)
        f, V, width, fine, dim = (config[k] for k in ("downsample", "codebook", "width", "fine", "dim"))
        self.rows = self.cols = config["size"] // f
        half = max(f // 2, 1)
        self.encoder = nn.Sequential(nn.PixelUnshuffle(f), nn.Conv2d(3 * f * f, width, 1),
                                     Block(width), nn.Conv2d(width, dim, 1))
        self.decoder = nn.Sequential(nn.Conv2d(dim, width, 3, padding=1), Block(width), Block(width),
                                     nn.Conv2d(width, fine * (f // half) ** 2, 1), nn.PixelShuffle(f // half),
                                     Block(fine), Block(fine),
                                     nn.Conv2d(fine, 3 * half * half, 3, padding=1), nn.PixelShuffle(half))
        self.register_buffer("codebook", torch.randn(V, dim))
        self.register_buffer("count", torch.ones(V))
        self.register_buffer("total", torch.zeros(V, dim))

    def latents(self, images):
        return self.encoder(images.contiguous(memory_format=torch.channels_last)).permute(0, 2, 3, 1)

    def nearest(self, z):
        z = z.reshape(-1, z.shape[-1])
        return (self.codebook.square().sum(1) - 2 * z @ self.codebook.T).argmin(1)

    def draw(self, codes):
        return self.decoder(codes.permute(0, 3, 1, 2))

    @torch.no_grad()
    def encode(self, images):
        return self.nearest(self.latents(images)).view(len(images), -1)

    @torch.no_grad()
    def decode(self, tokens):
        return self.draw(self.codebook[tokens].view(len(tokens), self.rows, self.cols, -1)).clamp(-1, 1)

    @property
    def fingerprint(self):
        return fingerprint(self.config, dict(self.state_dict()))


def loss_of(model, images, step, seed):
    z = model.latents(images)
    if step < WARMUP:
        picture, commit = model.draw(z), 0.0
    else:
        if step == WARMUP:
            first_codes(model, z, seed)
        tokens = model.nearest(z)
        code = model.codebook[tokens].view_as(z)
        commit = F.mse_loss(z, code)
        picture = model.draw(z + (code - z).detach())
        update_codes(model, z.detach(), tokens, step, seed)
    return picture_loss(picture, images) + COMMIT * commit


def picture_loss(a, b):
    loss = F.mse_loss(a, b) + 0.1 * F.l1_loss(a, b)
    for axis in (2, 3):
        loss = loss + 0.2 * F.l1_loss(a.diff(dim=axis), b.diff(dim=axis))
    return loss


def rng(*numbers):
    digest = hashlib.sha256(repr(numbers).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


@torch.no_grad()
def first_codes(model, z, seed):
    z = z.reshape(-1, z.shape[-1])
    V = len(model.codebook)
    pick = torch.randint(len(z), (V,), generator=rng(seed, "codes")).to(z.device)
    noise = 1e-3 * z.std() * torch.randn(V, z.shape[1], generator=rng(seed, "noise")).to(z.device)
    model.codebook.copy_(z[pick] + noise)
    for _ in range(10):
        tokens = model.nearest(z)
        n = torch.bincount(tokens, minlength=V).unsqueeze(1)
        total = torch.zeros_like(model.codebook).index_add_(0, tokens, z)
        model.codebook.copy_(torch.where(n > 0, total / n.clamp(min=1), model.codebook))
    model.count.fill_(1.0)
    model.total.copy_(model.codebook)


@torch.no_grad()
def update_codes(model, z, tokens, step, seed):
    z = z.reshape(-1, z.shape[-1])
    V = len(model.codebook)
    n = torch.bincount(tokens, minlength=V).to(z.dtype) * (V / len(z))          # 1 on average
    total = torch.zeros_like(model.total).index_add_(0, tokens, z) * (V / len(z))
    model.count.lerp_(n, 1 - FORGET)
    model.total.lerp_(total, 1 - FORGET)
    model.codebook.copy_(model.total / model.count.clamp(min=1e-3).unsqueeze(1))
    dead = (model.count < 0.05).nonzero().flatten()
    if len(dead):
        new = z[torch.randint(len(z), (len(dead),), generator=rng(seed, "restart", step)).to(z.device)]
        model.codebook[dead], model.total[dead], model.count[dead] = new, new, 1.0


def learning_rate(step, steps):
    return LR * min(1, (step + 1) / 20) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps)))


def batch_of(step, batch, n, seed):
    """The indices of one step, a pure function of (seed, step): epochs of random permutations, cut into batches."""
    out = []
    position = step * batch
    while len(out) < batch:
        order = torch.randperm(n, generator=rng(seed, "epoch", position // n))
        piece = order[position % n:][:batch - len(out)].tolist()
        out += piece
        position += len(piece)
    return out


def collate(items):
    items = [item for item in items if item is not None]
    if not items:
        return torch.empty(0), []
    return torch.stack([image for image, _ in items]), [caption for _, caption in items]


def stream(dataset, batches):
    """A DataLoader over lists of indices."""
    workers = 2 if sum(map(len, batches[:50])) >= 2000 else 0
    return DataLoader(dataset, batch_sampler=batches, num_workers=workers, collate_fn=collate)


def psnr(model, dataset, indices, device):
    squares = []
    for images, _ in stream(dataset, [indices[i:i + 100] for i in range(0, len(indices), 100)]):
        images = to_float(images).to(device)
        squares.append((model.decode(model.encode(images)) - images).square().mean((1, 2, 3)))
    return (10 * torch.log10(4 / torch.cat(squares).clamp(min=1e-10))).mean().item()


def make_tokens(data="sunsets", out="out", size=32, downsample=4, codebook=512, steps=1000, batch=32, limit=0,
                seed=0, device="", resume=False, **extra):
    device = pick_device(device)
    if downsample < 1 or downsample & (downsample - 1):
        raise UserError(f"--downsample {downsample} is not a power of two: take 2, 4, 8 or 16")
    if size % downsample:
        raise UserError(f"--size {size} is not divisible by --downsample {downsample}: take --size "
                        f"{max(1, round(size / downsample)) * downsample}")
    train, test = open_data(data, size, "train"), open_data(data, size, "test")
    n = min(limit, len(train)) if limit else len(train)
    chance = sorted(range(n), key=lambda i: hashlib.sha256(f"validation {i}".encode()).digest())
    held = set(chance[:min(1000, max(1, n // 20))] if n > 1 else [])
    learn, valid = [i for i in range(n) if i not in held], sorted(held) or [0]
    start = time.time()
    torch.manual_seed(seed)
    config = dict(size=size, downsample=downsample, codebook=codebook, width=WIDTH, fine=FINE, dim=DIM)
    model = Tokenizer(config).to(device).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=BETAS, weight_decay=DECAY)
    batches = [[learn[i] for i in batch_of(step, batch, len(learn), seed)] for step in range(steps)]
    bar = tqdm(enumerate(stream(train, batches)), total=steps, desc="tokenizer", unit="step")
    for step, (images, _) in bar:
        images = to_float(images).to(device)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps)
        loss = loss_of(model, images, step, seed)
        if not torch.isfinite(loss):
            raise UserError(f"the loss became {loss.item()} at step {step}")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 20 == 0:
            bar.set_postfix_str(f"loss {loss.item():.4f}")
        if step % 200 == 199:
            tqdm.write(f"step {step + 1}: validation PSNR {psnr(model, train, valid[:200], device):.2f} dB")
    model.eval()
    print(f"trained in {time.time() - start:.0f} s")
    tokens, captions, split = [], [], []
    for number, dataset, count in ((0, train, n), (2, test, len(test))):
        done = 0
        for images, texts in tqdm(stream(dataset, [list(range(i, min(i + 100, count))) for i in range(0, count, 100)])):
            tokens.append(model.encode(to_float(images).to(device)).cpu())
            captions += texts
            split += [1 if number == 0 and done + i in held else number for i in range(len(texts))]
            done += len(texts)
    tokens = torch.cat(tokens)
    names = sorted(set(captions))
    place = {name: i for i, name in enumerate(names)}
    counts = torch.bincount(tokens.flatten(), minlength=codebook).double()
    p = counts / counts.sum()
    print(f"codes in use: {(counts > 0).sum().item()} of {codebook}, perplexity {torch.exp(-(p * (p + 1e-12).log()).sum()).item():.0f}")
    quality = psnr(model, test, list(range(min(2000, len(test)))), device)
    print(f"test PSNR {quality:.2f} dB, {time.time() - start:.0f} s")
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    save(folder / "tokenizer.pt", dict(kind="tokenizer", version=1, config=config,
                                       made_from=dict(data=train.fingerprint), model=model.state_dict()))
    save(folder / "tokens.pt", dict(
        kind="tokens", version=1,
        config=dict(rows=model.rows, cols=model.cols, codebook=codebook, size=size, downsample=downsample, data=str(data)),
        made_from=dict(data=train.fingerprint, tokenizer=model.fingerprint),
        tokens=tokens.to(torch.uint8 if codebook <= 256 else torch.int16), captions=names,
        caption_index=torch.tensor([place[c] for c in captions], dtype=torch.int32),
        split=torch.tensor(split, dtype=torch.uint8)))
    k = min(32, len(test))
    images = to_float(torch.stack([test[i][0] for i in range(k)]))
    both = torch.stack([images, model.decode(model.encode(images.to(device))).cpu()], 1).flatten(0, 1)
    sheet(both, 8, scale=2).save(folder / "reconstructions.png")
    return model


def load_tokenizer(path, device="cpu"):
    saved = load(path, "tokenizer", "python tokenizer.py")
    model = Tokenizer(saved["config"])
    model.load_state_dict(saved["model"])
    return model.to(device).eval().requires_grad_(False)


def load_tokens(path):
    return load(path, "tokens", "python tokenizer.py")


def main():
    parser = arguments(__doc__)
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--downsample", type=int, default=4)
    parser.add_argument("--codebook", type=int, default=512)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--limit", type=int, default=0)
    parser.add_argument("--resume", action="store_true")
    make_tokens(**vars(parser.parse_args()))


if __name__ == "__main__":
    run(main)
