"""The idea: which order draws better is a question of evidence, so every order is measured in the same way.

Each (model, order) draws the same captions and scores the same held-out images; one table compares them:

    nats/token         - 1/N sum_k log p(x_{o_k} | past) on held-out images: exact for every order that is chosen from
                       the past alone. No judge and no noise, but it does not say whether the images look right
    Frechet            |m1 - m2|^2 + tr(S1 + S2 - 2 sqrt(S1 S2)) between features of drawn and of held-out images
                       ("to recon": of held-out images as the tokenizer renders them, which takes its own loss out)
                       (with --draws R: mean and standard deviation of R sets of drawn images)
    KID                the same question by an unbiased kernel estimate (Binkowski et al. 2018), times 1000
    precision, recall  share of drawn images that lie among held-out ones, and the reverse (Kynkaanniemi et al. 2019)
    class seen         how often the judge network names the caption that was asked for
    LPIPS              distance to the truth where half of an image is given and the model draws the other: the mean of
                       all four halves, and the lower one by itself, which is all that raster order is made for
    step, touches ...  what the order looks like, and what training and drawing cost

Without weights to load, the features are those of a small *judge* network, trained here on the data itself. Such a
distance ranks models on one data set; it is never called FID. `--inception` takes the network that defines FID.

reads    models (.pt of anyorder.py and finetune.py), out/tokenizer.pt, the images
writes   out/judge.pt, out/results.json, out/results.png (main figures as bars), out/compare.png (the same captions
         drawn in each order, with the orders)
run      python evaluate.py                                           all models in out/, 500 images each
         python evaluate.py --models out/raster.pt:raster out/ordered.pt:learned out/ordered.pt:frozen --n 2000
         python evaluate.py --speed                                   speed and memory, 5 minutes; writes out/speed.json
you see  the table, and below it whether the judge can be trusted
not here training the models (anyorder.py, finetune.py); what people think of the images
"""

import collections
import functools
import json
import math
import os
import re
import statistics
import sys
import time
import warnings
import weakref

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from tqdm import tqdm

import anyorder
from anyorder import in_turn, join, load_model, rank_of
from data import (SUNSET_LABELS, UserError, arguments, fingerprint, load, open_data, pick_device, printable,
                  render_sunset, replacing, restore, run, save, save_picture, sheet, to_float, to_uint8)
from order_infer import infer_orders, order_maps, rank_correlation
from sample import ORDERS, frozen_policy, generate, read_mask
from tokenizer import load_tokenizer, seeded

HELD_OUT = 10_000    # held-out images that drawn ones are compared with, at most (or --n, where that is more)
KEPT = 4_000         # of these, so many stay in memory as pictures: for completions and to validate the judge
NEIGHBOURS = 3       # k of precision and recall; so fewer than 4 images cannot be compared
SAMPLE = 256         # orders that are compared between rows, at most
COMPLETED = 512      # images of which a row completes each half, at most
HALVES = ("bottom", "top", "left", "right")
# What a model is asked for where --models names no order. "frozen" is "inferred", but the cells are chosen by the
# any-order model, from whose choices the finetuned one has learned
SENSIBLE = {"raster": ["raster"], "random": ["raster", "random", "inferred"],
            "inferred": ["learned", "frozen", "inferred", "class"]}
COLUMNS = {"nats": ("nats/token", ".4f"), "nats_error": ("+-", ".4f"), "versus": ("- first row", "+.4f"),
           "versus_error": ("+-", ".4f"), "bits": ("bits/image", ".1f"), "frechet": ("Frechet", ".3f"),
           "frechet_spread": ("+-", ".3f"), "recon": ("to recon", ".3f"), "recon_spread": ("+-", ".3f"),
           "kid": ("KID x1000", ".3f"), "precision": ("precision", ".3f"), "recall": ("recall", ".3f"),
           "class_seen": ("class seen", ".3f"), "lpips": ("LPIPS", ".4f"), "lpips_lower": ("lower half", ".4f"),
           "lpips_lower_error": ("+-", ".4f")}
MORE = {"step": ("step length", ".2f"), "touches": ("touches drawn", ".3f"), "sun_first": ("sun < cloud", ".3f"),
        "glitter_last": ("sun < glitter", ".3f"), "train_steps": ("training steps", ",d"),
        "tokens_seen": ("tokens seen", ",d"), "train_seconds": ("training s", ",.0f"),
        "evaluations": ("evaluations/image", ",.0f")}

# ---------------------------------------------------------------------------------------------------------------------
# Distances between sets of features [n, f]. All in blocks: 50,000 images of 2,048 features stay below 4 GB.


def moments(x, chunk=8192):
    """Features [n, f] -> mean [f] and root [<= f, f] with root^T root = covariance (over n - 1); float64.

    Chunk by chunk, a QR decomposition of the centred features: a covariance matrix would square them first and lose
    half of the digits."""
    mean = x.mean(0, dtype=torch.float64)
    root = torch.empty(0, x.shape[1], dtype=torch.float64)
    for part in x.split(chunk):
        root = torch.linalg.qr(torch.cat((root, part.double() - mean)), mode="r").R
    return mean, root / math.sqrt(len(x) - 1)


def frechet(p, q):
    """Frechet distance of two Gaussians, each as `moments` gives it: a float >= 0.

    With S = R^T R, tr sqrt(S1 S2) is the nuclear norm (sum of singular values) of R1 R2^T. No matrix square root: that
    of a singular product, which any n < f gives, turns complex or wrong."""
    (mean1, root1), (mean2, root2) = p, q
    cross = torch.linalg.svdvals(root1 @ root2.T).sum()
    return max(0.0, ((mean1 - mean2).square().sum() + root1.square().sum() + root2.square().sum() - 2 * cross).item())


def frechet_distance(a, b):
    """Frechet distance of features a [n, f] and b [m, f], of any float type, n and m >= 2 and also below f: a float.
    It is FID if the features are those of the 2015 Inception network (Heusel et al. 2017), and only then."""
    return frechet(moments(a), moments(b))


def kernel_distance(a, b, block=2048):
    """KID, the unbiased squared MMD of features a [n, f] and b [m, f] with kernel (x.y / f + 1)^3: a float, which may
    be slightly negative. Over all pairs, where the usual code averages random subsets."""
    def total(x, y):
        return sum(((u.double() @ v.double().T / x.shape[1] + 1) ** 3).sum().item()
                   for u in x.split(block) for v in y.split(block))

    def within(x):                                     # pairs i != j only: this is what makes the estimate unbiased
        same = ((x.double().square().sum(1) / x.shape[1] + 1) ** 3).sum().item()
        return (total(x, x) - same) / (len(x) * (len(x) - 1))
    return within(a) + within(b) - 2 * total(a, b) / (len(a) * len(b))


def precision_recall(real, drawn, k=NEIGHBOURS, block=1024):
    """Share of `drawn` [m, f] within the k-th nearest neighbour ball of any of `real` [n, f], and the reverse:
    (precision, recall) in 0..1. Precision is quality, recall is diversity."""
    real, drawn = real - real.mean(0), drawn - real.mean(0)                # the distances stay, float32 loses less

    def radii(x):                                      # k + 1, as the nearest of all is the image itself
        return torch.cat([torch.cdist(part, x).topk(k + 1, largest=False).values[:, k] for part in x.split(block)])

    def covered(points, x, radius):
        return torch.cat([(torch.cdist(part, x) <= radius).any(1)
                          for part in points.split(block)]).double().mean().item()
    return covered(drawn, real, radii(real)), covered(real, drawn, radii(drawn))


# ---------------------------------------------------------------------------------------------------------------------
# LPIPS, a distance between two images


def lpips(x, y, net):
    """LPIPS v0.1 (Zhang et al. 2018, eq. 1): sum over layers of the mean over places of w . (x / |x| - y / |y|)^2.

    x, y [B, 3, H, W] float in [-1, 1] (not [0, 1]) -> [B], 0 for equal images. `net` has .activations(images), a list
    of [B, C, h, w], and .weights, a list of [C] (or [1], the same for all channels)."""
    total = 0
    for a, b, w in zip(net.activations(x), net.activations(y), net.weights):
        a, b = (z / (z.square().sum(1, keepdim=True).sqrt() + 1e-10) for z in (a, b))
        total = total + ((a - b).square() * w.to(a).view(1, -1, 1, 1)).sum(1).mean((1, 2))
    return total


class AlexNet(nn.Module):
    """The convolutions of torchvision's alexnet, under their names there."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 64, 11, 4, 2), nn.ReLU(), nn.MaxPool2d(3, 2), nn.Conv2d(64, 192, 5, 1, 2), nn.ReLU(),
            nn.MaxPool2d(3, 2), nn.Conv2d(192, 384, 3, 1, 1), nn.ReLU(), nn.Conv2d(384, 256, 3, 1, 1), nn.ReLU(),
            nn.Conv2d(256, 256, 3, 1, 1), nn.ReLU())

    def activations(self, images):
        shift, scale = (torch.tensor(v).view(3, 1, 1).to(images) for v in ([-.030, -.088, -.188], [.458, .448, .450]))
        x, out = (images - shift) / scale, []          # v0.0 of LPIPS forgot this step
        for layer in self.features:
            x = layer(x)
            out += [x] if isinstance(layer, nn.ReLU) else []
        return out


def load_lpips(backbone, linear, device="cpu"):
    """AlexNet with the weights of torchvision's alexnet (`backbone`) and .weights from the lpips
    package's v0.1/alex.pth (`linear`). Strict, since a missing or additional weight would give
    plausible, wrong distances: UserError."""
    net = AlexNet()
    shapes = {f"lin{i}.model.1.weight": (1, c, 1, 1) for i, c in enumerate((64, 192, 384, 256, 256))}
    for path, what in ((backbone, "torchvision's alexnet"), (linear, "the linear weights of LPIPS v0.1 for alexnet")):
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            if path == backbone:
                net.load_state_dict({k: v for k, v in state.items() if not k.startswith("classifier.")})
            elif {k: tuple(v.shape) for k, v in state.items()} != shapes:
                raise ValueError
        except Exception:                              # a foreign file fails in a hundred ways
            raise UserError(f"{printable(path)} does not hold {what}: --lpips-backbone takes torchvision's alexnet "
                            ".pth, --lpips-linear the lpips package's weights/v0.1/alex.pth") from None
    net.weights = [state[k].flatten() for k in shapes]
    return net.requires_grad_(False).eval().to(device)


# ---------------------------------------------------------------------------------------------------------------------
# Features: the network that defines FID, or a judge trained on the data


def load_inception(path, device="cpu"):
    """A TorchScript file with the interface of inception-2015-12-05.pt -> (name of its Frechet distance, function of
    uint8 images [B, 3, H, W] to features [B, f]). The network resizes by itself: images go in as they are, since
    another resize gives another FID. UserError for other files."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")            # torch 2.13 calls TorchScript old; the published file is one
            net = torch.jit.load(path, map_location=device).eval()
        with torch.no_grad():
            f = net(torch.zeros(2, 3, 32, 32, dtype=torch.uint8, device=device), return_features=True)
        if f.dim() != 2 or len(f) != 2 or not f.is_floating_point():
            raise ValueError
    except Exception:
        raise UserError(f"{printable(path)} is not a network like inception-2015-12-05.pt (TorchScript, uint8 images "
                        "to features by return_features=True): leave out --inception to use a judge") from None
    name = "FID" if f.shape[1] == 2048 else "Frechet"  # any other features are not to be called FID
    return name, lambda images: net(images, return_features=True).float()


class Judge(nn.Module):
    """A small convolutional network. config: task ("captions" or "rotations"), classes (list of str), width."""
    weights = [torch.ones(1)] * 4                      # for `lpips`: all channels count the same

    def __init__(self, config):
        super().__init__()
        self.config, w = dict(config), config["width"]
        self.convs = nn.ModuleList([nn.Conv2d(3, w, 5, 2, 2), nn.Conv2d(w, 2 * w, 3, 2, 1),
                                    nn.Conv2d(2 * w, 4 * w, 3, 2, 1), nn.Conv2d(4 * w, 4 * w, 3, 1, 1)])
        self.norms = nn.ModuleList([nn.GroupNorm(c // 4, c) for c in (w, 2 * w, 4 * w, 4 * w)])
        self.head = nn.Linear(4 * w, len(config["classes"]))
        self.sound = nn.Linear(4 * w, 1)               # is the image as it should be? (used in training only)

    def activations(self, images):
        """images [B, 3, H, W] float in [-1, 1] -> four of [B, C, h, w]; beyond 64 pixels, averaged down to 64."""
        x, out = images if images.shape[-1] <= 64 else F.adaptive_avg_pool2d(images, 64), []
        for conv, norm in zip(self.convs, self.norms):
            x = F.relu(norm(conv(x)))
            out.append(x)
        return out

    def features(self, images):
        return self.activations(images)[-1].mean((2, 3))                   # [B, 4 w]

    def forward(self, images):
        return self.head(self.features(images))


def spoiled(image, chance):
    """An image [3, S, S] in [-1, 1] made worse in one of three ways, more or less: pixels of random colours, a coarser
    picture, patches that changed places. (Related to what validate_judge does, but not the same.)"""
    S, kind, strength = image.shape[-1], torch.randint(3, (), generator=chance), torch.rand((), generator=chance).item()
    if kind == 0:
        hit = torch.rand(1, S, S, generator=chance) < 0.02 + 0.3 * strength
        return torch.where(hit, torch.rand(3, S, S, generator=chance) * 2 - 1, image)
    if kind == 1:
        small = F.interpolate(image[None], size=[max(1, int(S / (1.3 + 3 * strength)))] * 2, mode="area")
        return F.interpolate(small, size=[S, S], mode="bilinear")[0]
    image, side = image.clone(), S // 4
    for _ in range(1 + int(3 * strength)):
        y, x, v, u = torch.randint(S - side + 1, (4,), generator=chance).tolist()
        here = image[:, y:y + side, x:x + side].clone()
        image[:, y:y + side, x:x + side] = image[:, v:v + side, u:u + side]
        image[:, v:v + side, u:u + side] = here
    return image


def train_judge(dataset, seed=0, steps=800, batch=64, width=32, device="cpu"):
    """A Judge of these images, repeatable by seed. It learns to name captions where there are 2 to 200 with at
    least 20 images each, else to tell by how many quarter turns an image was rotated (Gidaris et al. 2018); and, so
    that quality does not escape it, to tell images from spoiled ones. (Without this, features of captions hardly
    see a blurred sky.)"""
    counts = collections.Counter(dataset.captions)
    named = 2 <= len(counts) <= 200 and min(counts.values()) >= 20
    classes = sorted(counts) if named else ["0", "90", "180", "270"]
    torch.manual_seed(seed)
    judge = Judge({"task": "captions" if named else "rotations", "classes": classes, "width": width}).to(device)
    # 40 epochs at most
    chance, steps = torch.Generator().manual_seed(seed), min(steps, 40 * math.ceil(len(dataset) / batch))
    optimizer = torch.optim.AdamW(judge.parameters(), weight_decay=0.05)
    with tqdm(range(steps), desc="judge", unit="step", dynamic_ncols=True) as bar:
        for step in bar:
            items = [dataset[i] for i in torch.randint(len(dataset), (batch,), generator=chance).tolist()]
            turns = torch.randint(4, (batch,), generator=chance).tolist()
            label = torch.tensor([classes.index(caption) for _, caption in items] if named else turns, device=device)
            images = [to_float(image if named else image.rot90(k, (1, 2))) for (image, _), k in zip(items, turns)]
            images += [spoiled(image, chance) for image in images[:batch // 2]]
            seen = judge.features(torch.stack(images).to(device))                      # [1.5 batch, 4 w]
            sound = (torch.arange(len(seen), device=device) < batch).float()
            loss = (F.cross_entropy(judge.head(seen[:batch]), label)
                    + F.binary_cross_entropy_with_logits(judge.sound(seen)[:, 0], sound))
            optimizer.param_groups[0]["lr"] = 2e-3 * min(1, (step + 1) / 50) * (1 - step / steps)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            bar.set_postfix_str(f"loss {loss.item():.3f}", refresh=False)
    return judge.requires_grad_(False).eval()


def open_judge(out, dataset, size, seed, device):
    """The judge from out/judge.pt where that was made of the same data, else a new one, kept there."""
    path, made_from = os.path.join(out, "judge.pt"), {"data": dataset.fingerprint, "size": str(size), "seed": str(seed)}
    file = load(path, "judge", f"rm {printable(path)}") if os.path.exists(path) else {"made_from": None}
    if file["made_from"] == made_from:
        judge = restore(Judge, file, path, f"rm {printable(path)}, then this")
        return judge.requires_grad_(False).eval().to(device)
    judge = train_judge(dataset, seed, device=device)
    save(path, {"kind": "judge", "version": 1, "config": judge.config, "made_from": made_from,
                "model": judge.state_dict()})
    return judge


def corrupted(images, how, strength, chance):
    """uint8 images [B, 3, S, S] made worse. noise: of standard deviation `strength` on the scale [-1, 1]; blur:
    Gaussian, `strength` 32nds of the side; shuffle: this share of the 4x4 patches change places."""
    B, _, S, _ = images.shape
    x = to_float(images)
    if how == "noise":
        return to_uint8(x + strength * torch.randn(x.shape, generator=chance))
    if how == "blur":
        sigma = strength * max(S, 32) / 32             # less than a pixel would not blur
        reach = min(math.ceil(3 * sigma), S)
        bell = (-torch.arange(-reach, reach + 1).square() / (2 * sigma ** 2)).exp()
        bell = (bell / bell.sum()).expand(3, 1, -1)
        x = F.pad(x, (reach,) * 4, mode="replicate")
        return to_uint8(F.conv2d(F.conv2d(x, bell[:, :, None], groups=3), bell[..., None], groups=3))
    side = S // 4
    patches = F.unfold(x[..., :4 * side, :4 * side], side, stride=side)    # [B, 3 * side * side, 16]
    place = torch.arange(16).repeat(B, 1)
    who = torch.rand(B, 16, generator=chance).argsort(1)[:, :round(16 * strength)]
    patches = patches.gather(2, place.scatter(1, who, who.roll(1, 1))[:, None].expand_as(patches))
    x[..., :4 * side, :4 * side] = F.fold(patches, 4 * side, side, stride=side)
    return to_uint8(x)


def validate_judge(features, images, seed=0):
    """Can a distance in these features be trusted? features: uint8 images -> [B, f]; images [n, 3, S, S] uint8, real.

    One half of the images, damaged in three ways at three strengths, is compared with the other half. Returns a dict:
    real (distance of the two halves), noise, blur, shuffle (three distances each), ratio (the mildest damage over
    real) and ok: each of the three rises strictly, and ratio is at least 20."""
    chance = torch.Generator().manual_seed(seed)
    half = len(images) // 2
    target = moments(features(images[half:2 * half]))
    report = {"real": frechet(moments(features(images[:half])), target)}
    damage = {"noise": (0.3, 0.6, 1.2), "blur": (1, 2, 4), "shuffle": (0.25, 0.5, 1)}
    for how, strengths in damage.items():
        report[how] = [frechet(moments(features(corrupted(images[:half], how, s, chance))), target) for s in strengths]
    report["ratio"] = min(report[how][0] for how in damage) / max(report["real"], 1e-12)
    report["ok"] = report["ratio"] >= 20 and all(a < b < c for a, b, c in (report[how] for how in damage))
    return report


# ---------------------------------------------------------------------------------------------------------------------
# What an order does. order [B, N] visit lists, rank [B, N] steps


def step_length(order, cols):
    """Mean distance from a cell to the next, in cells: a float. Raster on 3x3: (6 * 1 + 2 * sqrt(5)) / 8 = 1.309."""
    return torch.hypot((order // cols).diff(dim=1).double(), (order % cols).diff(dim=1).double()).mean().item()


def touching(rank, rows, cols):
    """Share of steps, without the first, whose cell has a drawn one among its 8 neighbours. Raster gives 1; the rank

        0 6 1
        7 8 4    gives 5/8: the cells of steps 1, 2 and 3 touch nothing drawn
        2 5 3
    """
    grid = rank.view(-1, 1, rows, cols).double()
    earliest = -F.max_pool2d(-grid, 3, 1, 1)           # of each cell and its neighbours
    return (earliest < grid).sum().item() / (len(rank) * (rows * cols - 1))


def drawn_before(rank, labels, first, second, rows, cols):
    """How often `first` is drawn before `second` (names of SUNSET_LABELS) where an image shows both; 0.5 is chance,
    None without such images. The time of a thing is the mean rank of its pixels. labels [B, S, S]."""
    step = F.interpolate(rank.view(-1, 1, rows, cols).double(), size=labels.shape[1:])[:, 0]
    masks = (labels == SUNSET_LABELS.index(name) for name in (first, second))
    time1, time2 = ((step * mask).sum((1, 2)) / mask.sum((1, 2)) for mask in masks)
    both = ~(time1 + time2).isnan()                    # 0 / 0 where a thing is missing
    return ((time1 < time2).double() + (time1 == time2) / 2)[both].mean().item() if both.any() else None


# ---------------------------------------------------------------------------------------------------------------------
# Measuring


def open_rows(texts, out, tokenizer, device):
    """["MODEL.pt:ORDER" or "MODEL.pt"] -> [(name, model, order, steps, policy)], all checked before anything is
    computed. ORDER@S draws in S steps, several cells at once (steps is 0 without). Without texts: the models in `out`.
    UserError for models of different tokenizers, and orders a model does not know."""
    names = ("raster", "anyorder", "ordered_random", "ordered_raster", "ordered_class", "ordered")
    names = [os.path.join(out, f"{name}.pt") for name in names]
    rows, open_model = [], functools.cache(functools.partial(load_model, device=device))   # each file once
    for text in texts or filter(os.path.exists, names):
        path, _, order = text.rpartition(":")          # from the right: C:\out\raster.pt is a path
        order, _, steps = order.partition("@")
        path, order, steps = (path, order, steps) if order in (*ORDERS, "frozen") else (text, None, "")
        model = open_model(path)
        about, stem = model.about, os.path.splitext(os.path.basename(path))[0]
        if about["made_from"].get("tokenizer") != tokenizer.fingerprint:
            raise UserError(f"{printable(path)} was trained with another tokenizer than {printable(out)}/tokenizer.pt, "
                            "and figures of different tokens do not compare: run python anyorder.py again")
        for order in [order] if order else SENSIBLE.get(about["order"], [about["order"]]):
            policy = None
            if steps and not (re.fullmatch("[0-9]{1,9}", steps) and 0 < int(steps) < model.N):
                raise UserError(f"{printable(text)}: drawing takes 1 to {model.N - 1} steps, "
                                f"or leave out @{printable(steps)}")
            if order == "frozen":
                policy = frozen_policy(model, path, open_model)
            headless = not model.config["order_head"]
            if {"learned": headless, "sampled": headless, "class": "caption_rank" not in about}.get(order):
                raise UserError(f"{printable(path)} knows no {order} order: "
                                "run python finetune.py and name what it writes")
            rows.append((f"{stem}:{order}" + f"@{steps}" * bool(steps), model, order, int(steps or 0), policy))
    if not rows:
        raise UserError(f"{printable(out)} holds no models: run python anyorder.py first, or name some by --models")
    return rows


@torch.inference_mode()
def open_held(test, tokenizer, features, n, batch, seed, device):
    """The held-out images, in a fixed random order, as what is needed of them: a dict of captions, tokens
    [m, N], features [m, f], the moments of these and of the reconstructions' features, and the first few as
    images and label maps."""
    some = torch.randperm(len(test), generator=torch.Generator().manual_seed(seed))[:max(HELD_OUT, n)].tolist()
    captions, tokens, images, real, recon = [], [], [], [], []
    for i in tqdm(range(0, len(some), batch), desc="held-out images", unit="batch", disable=join(device)[0] > 0,
                  dynamic_ncols=True):
        items = [test[j] for j in some[i:i + batch]]                       # the last, smaller batch counts as well
        pictures = torch.stack([image for image, _ in items])
        captions += [caption for _, caption in items]
        tokens.append(tokenizer.encode(to_float(pictures).to(device)).cpu())
        real.append(features(pictures))
        recon.append(features(to_uint8(tokenizer.decode(tokens[-1].to(device)))))
        images += [pictures] if i < KEPT else []
    real, images = torch.cat(real), torch.cat(images)
    labels = [render_sunset(test.rows[j], images.shape[-1])[2] for j in some[:SAMPLE]] if test.name == "sunsets" else []
    recon = torch.cat(recon)
    few = min(n, len(real) // 2)                       # what n images that are as good as the real ones would be away
    apart = lambda x: frechet(moments(x[:few]), moments(x[few:]))
    return {"captions": captions, "tokens": torch.cat(tokens), "features": real, "moments": moments(real),
            "images": images, "recon": moments(recon), "floor": {"n": few, "real": apart(real), "recon": apart(recon)},
            "labels": torch.stack(labels) if labels else None}


@torch.inference_mode()
def evaluate_row(row, held, tokenizer, features, judge, lpips_net, n, draws, batch, guidance, temperature, seed):
    """(figures, nats per held-out image [m], their ranks [m, N], six images with ranks to show) of one row of
    open_rows. `draws` sets of n images are drawn, in batches, and only their features stay; distances are means over
    the sets, with their standard deviation. Processes share the batches out; all get the same result."""
    name, model, order, parallel, policy = row
    device, N, rows, cols = model.hop.device, model.N, model.config["rows"], model.config["cols"]
    process, world = join(device)
    how = {"order": "inferred" if order == "frozen" else order, "policy": policy, "parallel": parallel,
           "temperature": temperature,
           "score": model.about.get("score", "confidence"), "distance": model.about.get("distance", 0.0)}
    m, captions = min(n, len(held["tokens"])), held["captions"]
    bar = tqdm(total=(draws * n + m + min(m, COMPLETED)) // world, desc=name, unit="image", disable=process > 0,
               dynamic_ncols=True)

    def my_batches(what, count):
        """Where each batch of this process begins, and its dice: the same for every row, whoever throws them."""
        for i in range(process * batch, count, world * batch):
            yield i, seeded(seed, what, i, device=device)

    # draw, and count what the output layers were asked for: what drawing costs on any machine (but in inferred order
    # with several cells a step, each of which but the last enters the cache by an input more)
    evaluated, drawn = [], []
    hooks = [each.head.register_forward_hook(lambda _, x, y: evaluated.append(y.shape[0] * y.shape[1]))
             for each in (model, policy) if each]
    for i, chance in my_batches("draw", draws * n):
        asked = [captions[j % n % len(captions)] for j in range(i, min(i + batch, draws * n))]   # each set the same
        start = time.perf_counter()
        tokens, visited = generate(model, asked, guidance=guidance, generator=chance, **how)
        # rounded, as in a PNG; truncated would be darker
        images = to_uint8(tokenizer.decode(tokens)).cpu()
        seconds = time.perf_counter() - start
        names = judge(to_float(images).to(device)).argmax(1).tolist()
        seen = sum(judge.config["classes"][k] == caption for k, caption in zip(names, asked))
        drawn.append((features(images), seen, seconds, sum(evaluated), (images[:6], rank_of(visited)[:6].cpu())))
        evaluated.clear()
        bar.update(len(images))
    for hook in hooks:
        hook.remove()
    found, seen, seconds, evaluated, show = zip(*in_turn(drawn))

    # score held-out images: with every cell given, generate only chooses the order, from the past, as when it draws
    scored = []
    for i, chance in my_batches("score", m):
        tokens, asked = held["tokens"][i:min(i + batch, m)].to(device), captions[i:min(i + batch, m)]
        visited = generate(model, asked, given=tokens, keep=torch.ones(N, dtype=torch.bool), generator=chance, **how)[1]
        scored.append((-model.log_probs(tokens, asked, visited).double().sum(1).cpu(), rank_of(visited).cpu()))
        bar.update(len(tokens))
    nats, ranks = map(torch.cat, zip(*in_turn(scored)))

    # complete: one half is hidden, what is given is not judged
    far, S = [], held["images"].shape[-1]
    hidden = [read_mask(half, (S, S), S, (rows, cols), seed) for half in HALVES]           # of [S, S]
    for i, chance in my_batches("complete", min(m, COMPLETED)):
        truth = held["images"][i:min(i + batch, m, COMPLETED)]
        tokens, asked, parts = held["tokens"][i:i + len(truth)].to(device), captions[i:i + len(truth)], []
        for mask in hidden:
            keep = ~mask.view(rows, S // rows, cols, S // cols).any(3).any(1).flatten()
            filled, _ = generate(model, asked, given=tokens, keep=keep, guidance=guidance, generator=chance, **how)
            images = torch.where(mask, to_uint8(tokenizer.decode(filled)).cpu(), truth)
            parts.append(lpips(to_float(images).to(device), to_float(truth).to(device), lpips_net).cpu())
        far.append(torch.stack(parts, 1))                                  # [batch, halves]
        bar.update(len(truth))
    bar.close()

    found, far, leaks = (torch.cat(found), torch.cat(in_turn(far)),
                         how["order"] == "inferred" and how["score"] == "likelihood")
    if leaks or parallel:                              # such an order looks at the content, or is that of one by one
        nats = nats * math.nan
    labels, lower, sets = held["labels"], far[:, HALVES.index("bottom")], []
    for part in found.split(n):
        drawn = moments(part)
        sets.append((frechet(drawn, held["moments"]), frechet(drawn, held["recon"]),
                     1000 * kernel_distance(part, held["features"]), *precision_recall(held["features"], part)))
    sets = torch.tensor(sets, dtype=torch.float64)                         # [draws, 5]
    spread = sets.std(0).tolist() if draws > 1 else (None, None)
    before = lambda a, b: None if labels is None else drawn_before(ranks[:SAMPLE], labels[:m], a, b, rows, cols)
    figures = {"name": name, "nats": nats.mean().item() / N, "nats_error": nats.std().item() / math.sqrt(m) / N,
               "bits": nats.mean().item() / math.log(2),
               **dict(zip(("frechet", "recon", "kid", "precision", "recall"), sets.mean(0).tolist())),
               "frechet_spread": spread[0], "recon_spread": spread[1], "lpips": far.mean().item(),
               "lpips_lower": lower.mean().item(), "lpips_lower_error": lower.std().item() / math.sqrt(len(lower)),
               "class_seen": sum(seen) / (draws * n) if judge.config["task"] == "captions" else None,
               "step": step_length(rank_of(ranks), cols), "touches": touching(ranks, rows, cols),
               "sun_first": before("sun", "cloud"), "glitter_last": before("sun", "reflection"),
               "train_steps": model.about["step"], "tokens_seen": model.about["tokens_seen"],
               "train_seconds": model.about["seconds"], "evaluations": sum(evaluated) / (draws * n),
               "images_per_second": draws * n * world / sum(seconds), "weights": fingerprint(model.state_dict())}
    if parallel:                                       # these, too, are of one by one
        figures.update(dict.fromkeys(("step", "touches", "sun_first", "glitter_last")))
    return figures, nats, ranks, show[0]


# ---------------------------------------------------------------------------------------------------------------------
# What is shown


def table(results, columns):
    """Dicts as aligned text, one line each; columns = {key: (heading, format)}. What no row has is left out."""
    stacks = [["", *(row["name"] for row in results)]]                     # column by column, each padded to one width
    for key, (heading, form) in columns.items():
        if any(row.get(key) is not None for row in results):
            stacks.append([heading, *("-" if row.get(key) is None else format(row[key], form) for row in results)])
    stacks = [[f"{cell:{'>' if i else '<'}{max(map(len, stack))}}" for cell in stack] for i, stack in enumerate(stacks)]
    return "\n".join("  ".join(line) for line in zip(*stacks))


def draw_bars(results, columns, path):
    """results.png: one panel of bars for each of `columns`, one bar for each row."""
    keys = [key for key in columns if any(row.get(key) is not None for row in results)]
    high, wide, label = 26 * len(results) + 56, 600, 230
    page = Image.new("RGB", (2 * wide + 20, high * math.ceil(len(keys) / 2)), "white")
    pen, font, bold = ImageDraw.Draw(page), ImageFont.load_default(16), ImageFont.load_default(19)
    for p, key in enumerate(keys):
        left, top = 20 + p % 2 * wide, 12 + p // 2 * high
        better = "higher" if key in ("precision", "recall", "class_seen") else "lower"
        pen.text((left, top), f"{columns[key][0]} ({better} is better)", "black", bold)
        most = max([abs(row[key]) for row in results if row.get(key) is not None] + [1e-9])
        for y, row in zip(range(top + 30, top + high, 26), results):
            pen.text((left, y), row["name"][:26], "black", font)
            if row.get(key) is not None:
                end = left + label + max(1, round((wide - label - 90) * max(0, row[key]) / most))
                pen.rectangle((left + label, y + 1, end, y + 18), fill="#4a78b5")
                pen.text((end + 6, y), format(row[key], columns[key][1]), "black", font)
    save_picture(path, page)


def draw_comparison(shown, captions, rows, cols, path):
    """compare.png: the same captions in every row, the order (dark first) beside each image. shown = [(name, images [6,
    3, S, S], rank [6, N])]."""
    size = shown[0][1].shape[-1]
    tiles = [torch.stack((images, order_maps(rank, rows, cols, size)), 1).flatten(0, 1) for _, images, rank in shown]
    grid = sheet(torch.cat(tiles), len(tiles[0]), scale=max(1, 96 // size))
    page = Image.new("RGB", (grid.width + 210, grid.height + 60), "white")
    page.paste(grid, (210, 60))
    pen, font, step = ImageDraw.Draw(page), ImageFont.load_default(15), 2 * grid.width / len(tiles[0])
    for i, (name, _, _) in enumerate(shown):
        pen.text((8, 60 + (i + 0.42) * grid.height / len(shown)), name[:26], "black", font)
    for i, caption in enumerate(captions[:len(tiles[0]) // 2]):
        lines = [""]
        for word in caption.split():                   # wrapped to the width of its column
            longer = f"{lines[-1]} {word}".strip()
            lines[-1:] = [longer] if font.getlength(longer) < step - 8 else [lines[-1], word]
        pen.text((212 + i * step, 2), "\n".join(lines[:3]), "black", font)
    save_picture(path, page)


# ---------------------------------------------------------------------------------------------------------------------
# Speed (--speed): each part beside what could stand in its place, and beside the matrix products that it cannot do
# without. All models are untrained, since no time depends on the weights.

# (B, heads, T, d): at least so many times as fast as the library's attention in float32, in bfloat16
ATTENTION = {"cpu": {(128, 6, 64, 32): (1.2, 4), (8, 8, 256, 64): (1, 2.5), (4, 8, 1024, 64): (0.8, 1.3)},
             "cuda": {(64, 24, 264, 32): (1, 1), (32, 24, 1024, 32): (1, 1)}}
CANDIDATES = {"cpu": (16, 8, 128, 128, 64), "cuda": (128, 24, 128, 128, 32)}               # (B, heads, T, C, d)
LONG = (1, 8, 4096, 64)                                # here the memory counts
# cells per side; images in a training step, in plain drawing, in order inference
MODELS = {"cpu": {"side": 8, "width": 128, "layers": 6, "batch": 32, "draw": 64, "infer": 256},
          "cuda": {"side": 16, "width": 768, "layers": 14, "batch": 64, "draw": 64, "infer": 128},     # 100M parameters
          "drawing": {"side": 16, "width": 192, "layers": 6, "draw": 128, "least": 20}}
SECONDS = {"cpu": 12, "cuda": 3}                       # for each comparison; or five rounds, where they take longer


def sizes_for(device):
    """What is measured there, and for how long: "cuda", or for every other device "cpu"."""
    return "cuda" if device.type == "cuda" else "cpu"


def medians(device, *functions):
    """Median seconds of each function. They are called in turn, so that a slow moment of the machine meets all of them,
    there and back (1 2 3 3 2 1 ...), so that none always finds the caches as the same other has left them; the first
    round only warms up."""
    times, began, wait = [[] for _ in functions], time.perf_counter(), getattr(torch, device.type).synchronize
    turns, seconds = list(zip(functions, times)), SECONDS[sizes_for(device)]
    while len(times[0]) < 5 or time.perf_counter() - began < seconds:
        for function, own in turns:
            start = time.perf_counter()
            function()
            wait()                                     # a GPU answers before it has finished
            own.append(time.perf_counter() - start)
        turns.reverse()
    return [statistics.median(own[1:]) for own in times]


def compared(work, ours, other=None, unit="", ratio=None, least=None, most=None):
    """One row of the table. The target, `least` or `most`, is for the ratio, or for ours where there is no ratio."""
    value = ours if ratio is None else ratio
    met = None if least is most else value >= least if most is None else value <= most
    return {"name": work, "ours": ours, "other": other, "unit": unit, "ratio": ratio, "least": least, "most": most,
            "met": met}


def library_attention(q, k, v):
    """What fused_attention is compared with: q, k, v [B, heads, T, d] -> [B, heads, T, d]."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def masked_candidates(q, k, v, prefix_k, prefix_v):
    """candidate_attention, the first obvious way: all candidates are keys too, and a mask hides the others."""
    C, T = q.shape[2], prefix_k.shape[2]
    seen = torch.cat((q.new_ones(C, T), torch.eye(C).to(q)), 1).bool()
    return F.scaled_dot_product_attention(q, torch.cat((prefix_k, k), 2), torch.cat((prefix_v, v), 2), attn_mask=seen)


def repeated_candidates(q, k, v, prefix_k, prefix_v):
    """The second: each candidate is a sequence of its own, with its own copy of the prefix."""
    B, heads, C, d = q.shape
    k, v = (torch.cat((past[:, :, None].expand(-1, -1, C, -1, -1), own[:, :, :, None]), 3).transpose(1, 2).flatten(0, 1)
            for past, own in ((prefix_k, k), (prefix_v, v)))               # [B * C, heads, T + 1, d]
    out = F.scaled_dot_product_attention(q.transpose(1, 2).reshape(B * C, heads, 1, d), k, v)
    return out.view(B, C, heads, d).transpose(1, 2)


class PeakMemory(TorchDispatchMode):
    """`.peak`: the most bytes that tensors made inside held at once. Counted, not measured: no noise, any device."""
    now = peak = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        memory = lambda tree: {x.untyped_storage() for x in tree_leaves(tree) if isinstance(x, torch.Tensor)}
        for storage in memory(result) - memory((args, kwargs)):            # a view of an argument takes no memory
            self.now += storage.nbytes()
            weakref.finalize(storage, self.free, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return result

    def free(self, size):
        self.now -= size


def weight_products(model, inputs, outputs):
    """The products with weights in a forward pass over so many inputs, of which `outputs` get logits: a list of
    (rows, in, out)."""
    weights = [layer.weight for layer in model.blocks.modules() if isinstance(layer, nn.Linear)]
    return [(inputs, *weight.T.shape) for weight in weights] + [(outputs, *model.head.weight.T.shape)]


def multiply_adds(model, products, pairs=0):
    """What a forward pass cannot do without: weight products, and for each (query, key) pair and layer two products of
    the model's width. A training step needs three times as much: each product has two more in the backward pass."""
    return sum(rows * i * o for rows, i, o in products) + 2 * pairs * model.config["width"] * len(model.blocks)


def muon_multiply_adds(matrices):
    """Of a step of Muon: orthogonal() has five iterations of three products."""
    return sum(5 * min(w.shape) ** 2 * (2 * max(w.shape) + min(w.shape)) for w in matrices)


def bare(products, device, dtype, training=False):
    """A function that computes nothing but these products, of random matrices and into memory that it already has, and
    where `training` those of the backward pass: how fast this machine multiplies the model's shapes."""
    make = lambda *shape: torch.randn(shape, device=device).to(dtype)
    held = {(m, i, o): [make(*shape) for shape in ((m, i), (o, i), (m, o)) * 2] for m, i, o in products}

    @torch.no_grad()
    def multiply():
        for x, w, dy, dx, dw, y in (held[product] for product in products):
            torch.mm(x, w.T, out=y)
            if training:
                torch.mm(dy, w, out=dx)
                torch.mm(dy.T, x, out=dw)
    return multiply


def untrained(device, side, width, layers, order_head=False):
    """An AnyOrder of side x side cells with random weights, 10 words and captions of 8."""
    return anyorder.AnyOrder({"rows": side, "cols": side, "codebook": 512, "width": width, "layers": layers,
                              "order_head": order_head, "words": list("abcdefghij"), "caption_length": 8}).to(device)


def attention_speed(device, dtype):
    """fused_attention beside the library's kernel and beside its own definition, forward and backward, in ms."""
    for (B, heads, T, d), targets in ATTENTION[sizes_for(device)].items():
        x = torch.randn(B, T, 3, heads, d, device=device).to(dtype).requires_grad_()
        grad = torch.randn(B, T, heads * d, device=device).to(dtype)

        def both(attention):                           # forward and backward; as in a model, q, k, v are views
            y = attention(*(part.transpose(1, 2) for part in x.unbind(2))).transpose(1, 2).reshape(grad.shape)
            torch.autograd.grad(y, x, grad)
        ways = anyorder.fused_attention, library_attention, anyorder.reference_attention
        ours, library, reference = (1000 * t for t in medians(device, *(functools.partial(both, way) for way in ways)))
        name = f"attention {B, heads, T, d} {str(dtype)[6:]}"
        yield compared(f"{name}, SDPA", ours, library, "ms", library / ours, least=targets[dtype != torch.float32])
        yield compared(f"{name}, reference", ours, reference, "ms", reference / ours)


@torch.inference_mode()
def candidate_speed(device, dtype):
    """candidate_attention beside the better of the two obvious ways to do it with the library's kernel, in ms."""
    B, heads, T, C, d = CANDIDATES[sizes_for(device)]
    q, k, v = torch.randn(B, C, 3, heads, d, device=device).to(dtype).permute(2, 0, 3, 1, 4)
    past = torch.randn(2, B, heads, 2 * T, d, device=device).to(dtype)[:, :, :, :T]
    ways = anyorder.candidate_attention, masked_candidates, repeated_candidates
    ours, *others = (1000 * t for t in medians(device, *(functools.partial(way, q, k, v, *past) for way in ways)))
    yield compared(f"candidates {B, heads, T, C, d} {str(dtype)[6:]}, better SDPA", ours, min(others), "ms",
                   min(others) / ours, least=3)


def training_speed(device, dtype, batch, **size):
    """The step of anyorder.py beside the same step with the library's attention, and beside its products alone."""
    model, B = untrained(device, **size), batch
    N, L, V = model.N, model.config["caption_length"], model.V
    tokens, words = torch.randint(V, (B, N), device=device), torch.randint(10, (B, L), device=device)
    both = anyorder.optimizers(model, 1e-3, dtype)

    def step():
        order = anyorder.random_order(B, N).to(device)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            what, _ = model(tokens, words, order)
            loss = F.cross_entropy(what.flatten(0, 1), tokens.gather(1, order).flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        loss.item()
        for optimizer in both:
            optimizer.step()
            optimizer.zero_grad()

    def library_step():
        ours, anyorder.fused_attention = anyorder.fused_attention, library_attention
        try:
            step()
        finally:
            anyorder.fused_attention = ours

    products = weight_products(model, B * (L + N), B * N)
    ours, library, alone = medians(device, step, library_step, bare(products, device, dtype, training=True))
    yield compared("matrix products of a training step", 6e-9 * multiply_adds(model, products) / alone, unit="GFLOP/s")
    whole = (3 * multiply_adds(model, products, B * (L + N) * (L + N + 1) // 2)
             + muon_multiply_adds(both[1].param_groups[0]["params"]))
    alone *= whole / (3 * multiply_adds(model, products))
    name, done = f"training, {N} cells, batch {B}, {str(dtype)[6:]}", B * N
    yield compared(f"{name}, SDPA", done / ours, done / library, "tokens/s", library / ours,
                   least=None if dtype == torch.float32 else 1 if device.type == "cuda" else 1.5)
    yield compared(f"{name}, products alone", done / ours, done / alone, "tokens/s", alone / ours,
                   least=0.6 if device.type == "cpu" else None)


@torch.inference_mode()
def drawing_speed(device, draw, least=None, **size):
    """Plain sampling in a given order, in float32, beside its products alone."""
    model, B = untrained(device, **size), draw
    N, L = model.N, model.config["caption_length"]
    products = weight_products(model, B * L, 0) + N * weight_products(model, B, B)
    order = anyorder.raster_order(B, N).to(device)
    ours, alone = medians(device, lambda: anyorder.draw(model, [""] * B, order), bare(products, device, torch.float32))
    alone *= multiply_adds(model, products, B * (L + N) * (L + N + 1) // 2) / multiply_adds(model, products)
    name = f"drawing, {N} cells, width {size['width']}, batch {B}, float32"
    yield compared(f"{name}, products alone", B * N / ours, B * N / alone, "tokens/s", alone / ours)
    yield compared(name, B / ours, unit="images/s", least=least)


@torch.inference_mode()
def inference_speed(device, dtype, infer, **size):
    """Exact order inference beside a plain forward pass of the same images, and beside its products alone."""
    model, B = untrained(device, **size), infer
    N, L, V = model.N, model.config["caption_length"], model.V
    tokens, words = torch.randint(V, (B, N), device=device), torch.randint(10, (B, L), device=device)
    order, products = anyorder.random_order(B, N).to(device), weight_products(model, B * (L + N), B * N)
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        ours, forward, alone = medians(device, lambda: infer_orders(model, tokens, words),
                                       lambda: model(tokens, words, order), bare(products, device, dtype))
    tried = B * N * (N + 1) // 2                       # N candidates, then N - 1, ... each sees L + k inputs and itself
    pairs = B * (L * (L + 1) // 2 + sum((N - k) * (L + k + 1) for k in range(N)))
    needed = multiply_adds(model, weight_products(model, B * L, 0) + weight_products(model, tried, tried), pairs)
    alone *= needed / multiply_adds(model, products)
    name = f"order inference, {N} cells, batch {B}, {str(dtype)[6:]}"
    each, plain = 1e6 * ours / tried, 1e6 * forward / (B * (L + N))
    yield compared(f"{name}, forward pass", each, plain, "us/token", each / plain, most=1.25)
    yield compared(f"{name}, products alone", tried / ours, tried / alone, "tokens/s", alone / ours)
    yield compared(name, B / ours, unit="images/s")
    yield compared("    10,000 images at that rate", 1e4 * ours / B, unit="s", most=300 if N == 64 else None)


def order_speed(device, draw, **size):
    """What an order costs when images are drawn: the order head beside raster and beside exact inference, and both of
    them in a quarter of the steps beside one cell at a time. For one image, and for many."""
    model = untrained(device, order_head=True, **size)
    S = model.N // 4
    for B in (1, draw):
        ways = ("raster", 0), ("learned", 0), ("inferred", 0), ("learned", S), ("inferred", S)
        raster, learned, exact, learned_few, exact_few = medians(
            device, *(functools.partial(generate, model, [""] * B, order, parallel=steps) for order, steps in ways))
        name = f"drawing, {model.N} cells, batch {B}:"
        yield compared(f"{name} learned order, raster", B / learned, B / raster, "images/s", learned / raster, most=1.3)
        yield compared(f"{name} learned order, exact", B / learned, B / exact, "images/s", exact / learned)
        yield compared(f"{name} learned in {S} steps, one by one", B / learned_few, B / learned, "images/s",
                       learned / learned_few, least=3)
        yield compared(f"{name} exact in {S} steps, one by one", B / exact_few, B / exact, "images/s",
                       exact / exact_few, least=3)


def memory_use(device, dtype):
    """What fused_attention needs beside its inputs, its output and their gradients, against the square of scores."""
    B, heads, T, d = LONG
    q, k, v, grad = torch.randn(4, B, heads, T, d, device=device).to(dtype)
    inputs = [x.requires_grad_() for x in (q, k, v)]
    with PeakMemory() as memory:
        wanted = anyorder.fused_attention(*inputs)
        wanted = wanted, *torch.autograd.grad(wanted, inputs, grad)
    extra, square = memory.peak - sum(x.nbytes for x in wanted), B * heads * T * T * q.element_size()
    yield compared(f"attention {LONG} extra memory, full square", extra / 1e6, square / 1e6, "MB", extra / square,
                   most=0.1)


def speed_table(device, out):
    """Measures and prints all rows, and writes them to out/speed.json. Needs no data, no model and 5 minutes; on a GPU
    about 20 GB of its memory."""
    dtype, model = anyorder.precision(device), dict(MODELS[sizes_for(device)])
    batch, draw, infer = (model.pop(key) for key in ("batch", "draw", "infer"))
    dtypes = [torch.float32] + [dtype] * (dtype == torch.bfloat16)
    parts = [part(device, each) for part in (attention_speed, candidate_speed) for each in dtypes] + [
        training_speed(device, dtype, batch, **model), drawing_speed(device, draw, **model),
        drawing_speed(device, **MODELS["drawing"]), inference_speed(device, dtype, infer, **model),
        order_speed(device, draw, **model), memory_use(device, dtype)]
    rows = [row for part in tqdm(parts, desc="speed", unit="part", dynamic_ncols=True) for row in part]
    machine = {"device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
               "threads": torch.get_num_threads(), "torch": torch.__version__, "dtype": str(dtype)[6:],
               "bfloat16_is_fast": dtype == torch.bfloat16,
               "products_gflops": next(row["ours"] for row in rows if row["unit"] == "GFLOP/s")}
    with replacing(os.path.join(out, "speed.json")) as file:
        report = {"command": " ".join(["python", *sys.argv]), "machine": machine, "rows": rows}
        file.write(json.dumps(report, indent=1).encode())
    number = lambda x: f"{x:,.0f}" if x >= 100 else f"{x:.3g}"
    shown = [{"name": row["name"], "ours": f"{number(row['ours'])} {row['unit']}",
              "other": None if row["other"] is None else number(row["other"]), "ratio": row["ratio"],
              "target": next((f"{word} {row[word]}" for word in ("least", "most") if row[word] is not None), None),
              "met": {True: "yes", False: "no"}.get(row["met"])} for row in rows]
    columns = {key: (key, ".2f" if key == "ratio" else "") for key in ("ours", "other", "ratio", "target", "met")}
    print(table(shown, columns))
    print(f"medians of calls in turns (ours, other, other, ours, ...); torch {torch.__version__} on "
          f"{machine['device']}, {machine['threads']} threads")
    if device.type == "cpu" and dtype == torch.float32:
        print("this CPU has no bfloat16 instructions: the float32 rows count")


def main():
    parser = arguments(__doc__)
    parser.set_defaults(data=None)
    parser.add_argument("--models", nargs="+", default=None,
                        help="MODEL.pt:ORDER ..., ORDER one of " + ", ".join(ORDERS) + ", frozen; ORDER@S draws in S "
                             "steps; MODEL.pt alone takes what makes sense for it; default: all models in OUT")
    parser.add_argument("--n", type=int, default=500, help="images that each row draws, and scores")
    parser.add_argument("--draws", type=int, default=1,
                        help="sets of N images that each row draws: more than one tell how far chance moves a distance")
    parser.add_argument("--batch", type=int, default=100, help="images at once")
    parser.add_argument("--guidance", type=float, default=1.0, help="classifier-free guidance (1: none)")
    parser.add_argument("--temperature", type=float, default=1.0,
                        help="of drawing and completing: below 1 plays safe; the nats are always those of 1")
    parser.add_argument("--inception", default="", help="inception-2015-12-05.pt: FID instead of the judge's distance")
    parser.add_argument("--lpips-backbone", default="", help="torchvision's alexnet .pth, for true LPIPS")
    parser.add_argument("--lpips-linear", default="", help="the lpips package's weights/v0.1/alex.pth")
    parser.add_argument("--speed", action="store_true", help="measure speed and memory instead; needs no models")
    args = parser.parse_args()
    device, out = pick_device(args.device), args.out
    process, world = join(device)
    if args.speed:
        return None if process else speed_table(device, out)
    least = NEIGHBOURS + 1
    if not least <= args.n <= 10 ** 6 or not 1 <= args.draws <= 1000 or args.batch < 1 or not (
            0 <= args.guidance <= 100 and 0 <= args.temperature <= 100):
        raise UserError(f"--n {args.n} --draws {args.draws} --batch {args.batch} --guidance {args.guidance} "
                        f"--temperature {args.temperature}: n in {least}..1000000, draws in 1..1000, batch at least "
                        "1, guidance and temperature in 0..100")
    if bool(args.lpips_backbone) != bool(args.lpips_linear):
        raise UserError("LPIPS needs both its parts: --lpips-backbone alexnet.pth --lpips-linear alex.pth")
    tokenizer = load_tokenizer(os.path.join(out, "tokenizer.pt"), device)
    plan = open_rows(args.models, out, tokenizer, device)
    size, about = tokenizer.config["size"], plan[0][1].about
    path = about["data"] if args.data is None else args.data
    train, test = (open_data(path, size, split) for split in ("train", "test"))
    if train.fingerprint != about["made_from"]["data"]:
        raise UserError(f"{train.name} is not the data that {plan[0][0]} was trained on, {about['data']}: "
                        "name that by --data")
    if len(test) < least:
        raise UserError(f"{train.name} has {len(test)} held-out images, at least {least} are needed: add images")
    if args.lpips_backbone and size < 31:
        raise UserError(f"images of {size} pixels are too small for LPIPS, which needs 31: leave out --lpips-backbone")
    distance, extract = load_inception(args.inception, device) if args.inception else ("Frechet (judge)", None)
    network = load_lpips(args.lpips_backbone, args.lpips_linear, device) if args.lpips_backbone else None
    if process:
        dist.barrier()                                 # until process 0 has trained the judge: the others load it
    judge = open_judge(out, train, size, args.seed, device)
    if world > 1 and not process:
        dist.barrier()
    extract = extract or (lambda images: judge.features(to_float(images)))

    @torch.inference_mode()
    def features(images):
        return torch.cat([extract(part.to(device)).cpu() for part in images.split(args.batch)])

    held = open_held(test, tokenizer, features, args.n, args.batch, args.seed, device)
    columns = {**COLUMNS, "frechet": (distance, ".3f"), "lpips": ("LPIPS" if network else "LPIPS-judge", ".4f")}
    report = {"command": " ".join(["python", *sys.argv]), "seed": args.seed, "n": args.n, "draws": args.draws,
              "held_out": len(held["tokens"]), "scored": min(args.n, len(held["tokens"])),
              "completed": min(args.n, len(held["tokens"]), COMPLETED),
              "size": size, "resize": "short side resized (Lanczos), centre crop, uint8", "guidance": args.guidance,
              "temperature": args.temperature,
              "features": fingerprint(open(args.inception, "rb").read()) if args.inception else "judge",
              "columns": {key: heading for key, (heading, _) in {**columns, **MORE}.items()},
              "torch": torch.__version__, "tokenizer": frechet(held["recon"], held["moments"]),
              "floor": held["floor"],
              "judge": None if args.inception else validate_judge(features, held["images"], args.seed), "rows": []}
    results, ranks, shown, first = report["rows"], [], [], None
    try:
        for row in plan:
            figures, nats, rank, show = evaluate_row(row, held, tokenizer, features, judge, network or judge, args.n,
                                                     args.draws, args.batch, args.guidance, args.temperature,
                                                     args.seed)
            first = nats if first is None else first
            apart = (nats - first) / rank.shape[1]     # on the same images: far less noise than in either
            figures.update(versus=apart.mean().item(), versus_error=apart.std().item() / math.sqrt(len(apart)))
            figures = {key: None if isinstance(value, float) and math.isnan(value) else value
                       for key, value in figures.items()}
            results.append(figures)
            ranks.append(rank[:SAMPLE])
            shown.append((row[0], *show))
            report["agreement"] = [[rank_correlation(a, b) for b in ranks] for a in ranks]
            if process:
                continue
            # after every row: an interrupt loses one at most
            with replacing(os.path.join(out, "results.json")) as file:
                file.write(json.dumps(report, indent=1).encode())
            shown_as_bars = ("nats", "frechet", "recon", "kid", "precision", "recall", "class_seen", "lpips",
                             "lpips_lower")
            draw_bars(results, {key: columns[key] for key in shown_as_bars}, os.path.join(out, "results.png"))
            draw_comparison(shown, held["captions"], row[1].config["rows"], row[1].config["cols"],
                            os.path.join(out, "compare.png"))
    finally:
        if results:
            print_report(report, columns)


def print_report(report, columns):
    """Prints a report (see results.json): its tables, `columns` as in COLUMNS, and whether the judge can be trusted."""
    results, judge = report["rows"], report["judge"]
    print(table(results, columns) + "\n\n" + table(results, MORE))
    if len(results) > 1:
        agree = [{"name": row["name"], **{str(i): rho for i, rho in enumerate(line)}}
                 for row, line in zip(results, report["agreement"])]
        print("\nagreement of orders on the same images (rank correlation)\n"
              + table(agree, {str(i): (row["name"], ".2f") for i, row in enumerate(results)}))
    draws = f"{report['draws']} sets of " if report["draws"] > 1 else ""
    print(f"\n{draws}{report['n']:,} images drawn per row, {report['scored']:,} scored, "
          f"each half of {report['completed']:,} completed, compared with {report['held_out']:,} held-out ones "
          f"at {report['size']}x{report['size']}; "
          f"seed {report['seed']}, guidance {report['guidance']}, temperature {report['temperature']}\n"
          f"the tokenizer alone: {report['tokenizer']:.3f} from reconstructions to the same images\n"
          f"{report['floor']['n']:,} held-out images are {report['floor']['real']:.3f} from the others, their "
          f"reconstructions {report['floor']['recon']:.3f} from those of the others: rows of as many images cannot be "
          "told apart below that, and distances of different --n do not compare")
    if judge:
        series = "; ".join(f"{how} " + " < ".join(f"{value:.3f}" for value in judge[how])
                           for how in ("noise", "blur", "shuffle"))
        print(f"the judge is {'valid' if judge['ok'] else 'NOT VALID, trust the nats'}: "
              f"real to real {judge['real']:.3f}; {series}; "
              f"mildest damage / real to real {judge['ratio']:.0f} (at least 20)")
    print("drawn at " + ", ".join(f"{row['images_per_second']:.1f}" for row in results)
          + " images/s (varies from run to run)")


if __name__ == "__main__":
    run(main)
