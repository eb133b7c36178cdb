"""The idea: which drawing order is better is a question of evidence, so every order is measured in the same way.

For each (model, order) the same captions are drawn, the same held-out images are scored, and one table is printed:

    nats per token     - 1/N sum_k log p(x_{o_k} | past) on held-out images: exact, for every order that is chosen from
                       the past alone. No judge and no noise, but it does not say whether the images look right
    Frechet            |m1 - m2|^2 + tr(S1 + S2 - 2 sqrt(S1 S2)) of the features of drawn and held-out images
                       ("to recon": to held-out images as the tokenizer renders them, which takes its own loss out)
    KID                the same question by an unbiased kernel estimate (Binkowski et al. 2018)
    precision, recall  share of drawn images that lie among held-out ones, and the reverse (Kynkaanniemi et al. 2019)
    class seen         how often the judge network sees the caption that was asked for
    LPIPS              distance to the truth where the upper half is given and the model draws the lower (lower is better)
    step, touches ...  what the order looks like; and what it costs

Without weights to load, the features are those of a small *judge* network trained here on the data itself. Such a
distance ranks models on one data set; it is never called FID. `--inception` takes the network that defines FID.

reads    models (.pt of anyorder.py and finetune.py), out/tokenizer.pt, the images
writes   out/judge.pt, out/results.json, out/results.png (the table as a picture), out/compare.png (the same captions
         drawn in each order, the order beside each image)
run      python evaluate.py                                            MEASURED
         python evaluate.py --models out/raster.pt:raster out/ordered.pt:learned out/ordered.pt:frozen --n 2000
you see  the table, row by row; a line below it that says whether the judge can be trusted
not here training the models (anyorder.py, finetune.py); image quality in the eyes of people
"""

import json
import math
import os
import sys
import time
import warnings

import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from anyorder import load_model, rank_of
from data import (SUNSET_LABELS, UserError, arguments, fingerprint, load, open_data, pick_device, printable,
                  render_sunset, run, save, sheet, to_float, to_uint8)
from order_infer import order_maps
from sample import ORDERS, generate
from tokenizer import load_tokenizer

HELD_OUT = 10_000    # held-out images that are compared with, at most (or --n, where that is more)
LEAST = 16           # fewer images have no covariance and no neighbours worth the name
GIVEN = 256          # completions per row, at most
RANKS = 256          # held-out images whose orders are compared between rows, at most
# What a model is asked for when --models names no order: what it was trained for, and what the table is about.
# "frozen" is "inferred", but the any-order model chooses the cells whose orders the finetuned model has learned from
SENSIBLE = {"raster": ["raster"], "random": ["raster", "random", "inferred"], "inferred": ["learned", "frozen", "inferred"]}

# ---------------------------------------------------------------------------------------------------------------------
# Distances between sets of features [n, f]. All in blocks: 50,000 images of 2,048 features stay below 4 GB.


def moments(x, chunk=8192):
    """Features [n, f] -> mean [f] and root [min(n - 1 or so, f), f] with root^T root = covariance; float64.

    A QR decomposition, chunk by chunk, of the centred features: squaring them first (a covariance matrix) would lose
    half of the digits, and float32 more."""
    mean = x.mean(0, dtype=torch.float64)
    root = torch.empty(0, x.shape[1], dtype=torch.float64)
    for part in x.split(chunk):
        root = torch.linalg.qr(torch.cat((root, part.double() - mean)), mode="r").R
    return mean, root / math.sqrt(len(x) - 1)


def frechet(p, q):
    """Frechet distance of two Gaussians, each as `moments` gives it: a float.

    With S = R^T R, tr sqrt(S1 S2) is the nuclear norm (the sum of singular values) of R1 R2^T. No matrix square root:
    `sqrtm` of a singular product, which any n < f gives, turns complex or wrong."""
    (mean1, root1), (mean2, root2) = p, q
    cross = torch.linalg.svdvals(root1 @ root2.T).sum()
    return max(0.0, ((mean1 - mean2).square().sum() + root1.square().sum() + root2.square().sum() - 2 * cross).item())


def frechet_distance(a, b):
    """Frechet distance of features a [n, f] and b [m, f], any float type, n and m >= 2, also below f: a float >= 0.
    FID if the features are those of the 2015 Inception network (Heusel et al. 2017), and only then."""
    return frechet(moments(a), moments(b))


def kernel_distance(a, b, block=2048):
    """KID: unbiased squared MMD with the kernel (x.y / f + 1)^3, over all pairs (no random subsets), so it may be
    slightly negative. Features [n, f], [m, f] -> float."""
    def total(x, y):
        return sum(((u.double() @ v.double().T / x.shape[1] + 1) ** 3).sum().item()
                   for u in x.split(block) for v in y.split(block))

    def own(x):                                        # without i = j: this is what makes the estimate unbiased
        same = ((x.square().sum(1, dtype=torch.float64) / x.shape[1] + 1) ** 3).sum().item()
        return (total(x, x) - same) / (len(x) * (len(x) - 1))
    return own(a) + own(b) - 2 * total(a, b) / (len(a) * len(b))


def precision_recall(real, drawn, k=3, block=1024):
    """Share of `drawn` [m, f] that lie within the k-th nearest neighbour ball of any image of `real` [n, f], and the
    reverse: (precision, recall), two floats in 0..1. Precision is quality, recall is diversity."""
    centre = real.mean(0)
    real, drawn = real - centre, drawn - centre        # distances stay, float32 loses less

    def radii(x):                                      # the nearest of all is the image itself
        return torch.cat([torch.cdist(part, x).topk(k + 1, largest=False).values[:, k] for part in x.split(block)])

    def covered(points, x, radius):
        return torch.cat([(torch.cdist(part, x) <= radius).any(1) for part in points.split(block)]).double().mean().item()
    return covered(drawn, real, radii(real)), covered(real, drawn, radii(drawn))


# ---------------------------------------------------------------------------------------------------------------------
# LPIPS: distance between two images


def lpips(x, y, net):
    """LPIPS v0.1 (Zhang et al. 2018, eq. 1): sum over layers of mean over places of w . (x/|x| - y/|y|)^2.

    x, y [B, 3, H, W] float in [-1, 1] (not [0, 1]) -> [B]; 0 for equal images. `net` has .activations(images), a list
    of [B, C, h, w], and .weights, a list of [C]."""
    total = 0
    for a, b, w in zip(net.activations(x), net.activations(y), net.weights):
        a, b = (z / (z.square().sum(1, keepdim=True).sqrt() + 1e-10) for z in (a, b))
        total = total + ((a - b).square() * w.view(1, -1, 1, 1)).sum(1).mean((1, 2))
    return total


class AlexNet(nn.Module):
    """The convolutions of torchvision's `alexnet` under their names there, and LPIPS' linear weights on top."""
    name = "LPIPS"

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 64, 11, 4, 2), nn.ReLU(), nn.MaxPool2d(3, 2), nn.Conv2d(64, 192, 5, 1, 2), nn.ReLU(),
            nn.MaxPool2d(3, 2), nn.Conv2d(192, 384, 3, 1, 1), nn.ReLU(), nn.Conv2d(384, 256, 3, 1, 1), nn.ReLU(),
            nn.Conv2d(256, 256, 3, 1, 1), nn.ReLU())
        self.weights = [torch.zeros(c) for c in (64, 192, 384, 256, 256)]
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1), persistent=False)

    def activations(self, images):
        x, out = (images - self.shift) / self.scale, []            # v0.0 forgot this step; v0.1 is the one to report
        for layer in self.features:
            x = layer(x)
            if isinstance(layer, nn.ReLU):
                out.append(x)
        return out


def load_lpips(backbone, linear, device="cpu"):
    """AlexNet with the weights of torchvision's alexnet (`backbone`) and of the lpips package's v0.1/alex.pth
    (`linear`). Strict: a missing, additional or misshapen weight would give plausible, wrong distances. UserError."""
    net = AlexNet()
    for path, kind in ((backbone, "torchvision's alexnet"), (linear, "the linear weights of LPIPS v0.1 for alex")):
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            if path == backbone:
                net.load_state_dict({k: v for k, v in state.items() if not k.startswith("classifier.")})
            else:
                shapes = {f"lin{i}.model.1.weight": (1, len(w), 1, 1) for i, w in enumerate(net.weights)}
                if {k: tuple(v.shape) for k, v in state.items()} != shapes:
                    raise ValueError
                net.weights = [state[k].flatten().to(device) for k in shapes]
        except Exception:                              # a foreign file fails in a hundred ways
            raise UserError(f"{printable(path)} does not hold {kind}: give --lpips-backbone alexnet.pth "
                            f"--lpips-linear alex.pth") from None
    return net.requires_grad_(False).eval().to(device)


# ---------------------------------------------------------------------------------------------------------------------
# Features: the Inception network that defines FID, or a judge trained on the data


def load_inception(path, device="cpu"):
    """A TorchScript file with the interface of inception-2015-12-05.pt -> (name, function of uint8 images [B, 3, H, W]
    to features [B, f]). The file does its own resizing: another resize gives another FID. UserError for other files."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")            # newer torch calls TorchScript old
            net = torch.jit.load(path, map_location=device).eval()
        with torch.no_grad():
            f = net(torch.zeros(2, 3, 32, 32, dtype=torch.uint8, device=device), return_features=True)
        if f.dim() != 2 or len(f) != 2 or not f.is_floating_point():
            raise ValueError
    except Exception:
        raise UserError(f"{printable(path)} is not a network as inception-2015-12-05.pt, a TorchScript file that maps uint8 "
                        f"images to features by return_features=True: leave --inception out to use a judge") from None
    # torchvision's Inception and others have their own distances: only 2,048 features of this interface are named FID
    name = "FID" if f.shape[1] == 2048 else f"Frechet/{os.path.basename(path)[:12]}"
    return name, lambda images: net(images, return_features=True).float()


class Judge(nn.Module):
    """A small convolutional network. config: task "captions" or "rotations", classes (list of str), width."""
    name = "LPIPS-judge"                               # the formula of LPIPS, another network

    def __init__(self, config):
        super().__init__()
        self.config, w = dict(config), config["width"]
        sizes = [3, w, 2 * w, 4 * w, 4 * w]
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 3, 2 if a > 3 else 1, 1) for a, b in zip(sizes, sizes[1:]))
        self.head = nn.Linear(4 * w, len(config["classes"]))
        for i, size in enumerate(sizes[1:]):
            self.register_buffer(f"weight{i}", torch.ones(size), persistent=False)

    @property
    def weights(self):
        return [getattr(self, f"weight{i}") for i in range(len(self.convs))]

    def activations(self, images):
        """images [B, 3, H, W] float in [-1, 1] -> four [B, C, h, w]. Images beyond 64 pixels are averaged down to 64."""
        x, out = images if images.shape[-1] <= 64 else F.adaptive_avg_pool2d(images, 64), []
        for conv in self.convs:
            x = F.relu(conv(x))
            out.append(x)
        return out

    def features(self, images):
        return self.activations(images)[-1].mean((2, 3))                                   # [B, 4 w]

    def forward(self, images):
        return self.head(self.features(images))


def train_judge(dataset, seed=0, steps=1200, batch=64, width=32, device="cpu"):
    """A Judge for these images: it learns to name captions where there are 2 to 200 with at least 20 images each, else to
    tell by how many quarter turns an image was rotated (Gidaris et al. 2018). Repeatable by seed."""
    counts = {}
    for caption in dataset.captions:
        counts[caption] = counts.get(caption, 0) + 1
    named = 2 <= len(counts) <= 200 and min(counts.values()) >= 20
    classes = sorted(counts) if named else ["0", "90", "180", "270"]
    number = {name: i for i, name in enumerate(classes)}
    torch.manual_seed(seed)
    judge = Judge({"task": "captions" if named else "rotations", "classes": classes, "width": width}).to(device)
    chance = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(judge.parameters(), weight_decay=0.05)
    with tqdm(range(steps), desc="judge", unit="step", dynamic_ncols=True) as bar:
        for step in bar:
            items = [dataset[i] for i in torch.randint(len(dataset), (batch,), generator=chance).tolist()]
            images = torch.stack([image for image, _ in items])
            if named:
                label = torch.tensor([number[caption] for _, caption in items])
            else:
                label = torch.randint(4, (batch,), generator=chance)
                images = torch.stack([image.rot90(turns, (1, 2)) for image, turns in zip(images, label.tolist())])
            loss = F.cross_entropy(judge(to_float(images).to(device)), label.to(device))
            optimizer.param_groups[0]["lr"] = 2e-3 * min(1, (step + 1) / 50) * (1 - step / steps)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            bar.set_postfix_str(f"loss {loss.item():.3f}", refresh=False)
    return judge.requires_grad_(False).eval()


def open_judge(out, dataset, size, seed, device):
    """The judge for these images, from out/judge.pt where that was made for the same data, else trained and kept."""
    path, made_from = os.path.join(out, "judge.pt"), {"data": dataset.fingerprint, "size": size, "seed": seed}
    if os.path.exists(path):
        file = load(path, "judge", f"rm {printable(path)}")
        if file["made_from"] == made_from:
            judge = Judge(file["config"])
            judge.load_state_dict(file["model"])
            return judge.requires_grad_(False).eval().to(device)
    judge = train_judge(dataset, seed, device=device)
    save(path, {"kind": "judge", "version": 1, "config": judge.config, "made_from": made_from, "model": judge.state_dict()})
    return judge


def corrupted(images, how, strength, chance):
    """uint8 images [B, 3, S, S] made worse. noise: standard deviation `strength` on the scale of [-1, 1]; blur: Gaussian
    of `strength` 32nds of the image; shuffle: this share of 4x4 patches change places."""
    B, _, S, _ = images.shape
    x = to_float(images)
    if how == "noise":
        x = x + strength * torch.randn(x.shape, generator=chance)
    elif how == "blur":
        sigma = strength * S / 32
        reach = math.ceil(3 * sigma)
        bell = (-torch.arange(-reach, reach + 1).square() / (2 * sigma ** 2)).exp()
        bell = (bell / bell.sum()).expand(3, 1, -1)
        x = F.pad(x, (reach,) * 4, mode="replicate")
        x = F.conv2d(F.conv2d(x, bell[:, :, None], groups=3), bell[..., None], groups=3)
    else:
        side = S // 4
        patch = x[..., :4 * side, :4 * side].unfold(2, side, side).unfold(3, side, side)   # [B, 3, 4, 4, side, side]
        patch = patch.flatten(2, 3).transpose(1, 2).clone()                                # [B, 16, 3, side, side]
        who = torch.rand(B, 16, generator=chance).argsort(1)[:, :round(16 * strength)]     # they pass places around
        row = torch.arange(B)[:, None]
        patch[row, who] = patch[row, who.roll(1, 1)]
        x = x.clone()
        x[..., :4 * side, :4 * side] = patch.view(B, 4, 4, 3, side, side).permute(0, 3, 1, 4, 2, 5).reshape(B, 3, 4 * side, -1)
    return to_uint8(x)


def validate_judge(features, images, seed=0):
    """Can this distance be trusted? features: function of uint8 images to [B, f]; images [n, 3, S, S] uint8, real.

    One half of the images, made worse in three ways and three strengths, is compared with the other half. Returns a
    dict: real (distance of the two halves), noise, blur, shuffle (three distances each), ratio (the mildest damage
    over `real`), ok: each series rises strictly, and ratio >= 20."""
    chance = torch.Generator().manual_seed(seed)
    half = len(images) // 2
    target = moments(features(images[half:2 * half]))
    report = {"real": frechet(moments(features(images[:half])), target)}
    strengths = {"noise": (0.2, 0.4, 0.8), "blur": (1, 2, 4), "shuffle": (0.25, 0.5, 1)}
    for how, three in strengths.items():
        report[how] = [frechet(moments(features(corrupted(images[:half], how, s, chance))), target) for s in three]
    rises = all(report["real"] < report[how][0] < report[how][1] < report[how][2] for how in strengths)
    report["ratio"] = min(report[how][0] for how in strengths) / max(report["real"], 1e-12)
    return {**report, "ok": rises and report["ratio"] >= 20}


# ---------------------------------------------------------------------------------------------------------------------
# What an order does. order [B, N] visit lists, rank [B, N] steps; each returns a float


def step_length(order, cols):
    """Mean distance from one cell to the next, in cells. On a 3x3 grid raster gives (6 * 1 + 2 * sqrt(5)) / 8 = 1.309."""
    row, col = order // cols, order % cols
    return torch.hypot(row.diff(dim=1).double(), col.diff(dim=1).double()).mean().item()


def touching(rank, rows, cols):
    """Share of steps, after the first, whose cell has a drawn one among its 8 neighbours. Raster gives 1. The rank
    0 6 1
    7 8 4     gives 5/8: the cells of steps 1, 2 and 3 touch nothing that is drawn
    2 5 3"""
    grid = rank.view(-1, 1, rows, cols).double()
    earliest = -F.max_pool2d(-grid, 3, 1, 1)                               # of the cell itself and its neighbours
    return (earliest < grid).sum().item() / (len(rank) * (rows * cols - 1))


def rank_correlation(a, b):
    """Spearman's rho of ranks a and b [B, N], mean over B: 1 same order, 0 unrelated, -1 reversed.
    For [0, 1, 2] and [0, 2, 1]: 1 - 6 * (0 + 1 + 1) / (3 * 8) = 0.5."""
    N = a.shape[1]
    return (1 - 6 * (a - b).double().square().sum(1) / (N * (N * N - 1))).mean().item()


def drawn_before(rank, labels, first, second, rows, cols):
    """How often `first` is drawn before `second`, two names of SUNSET_LABELS, among the images that show both (0.5 is
    chance; None without such images). The time of a thing is the mean rank of its pixels' cells. labels [B, S, S]."""
    step = rank.view(-1, 1, rows, cols).double()
    step = F.interpolate(step, size=labels.shape[1:])[:, 0]                # [B, S, S], each pixel its cell's rank
    masks = [labels == SUNSET_LABELS.index(name) for name in (first, second)]
    both = (masks[0].flatten(1).any(1) & masks[1].flatten(1).any(1)).nonzero()[:, 0]
    if not len(both):
        return None
    one, two = ((step * m).sum((1, 2))[both] / m.sum((1, 2))[both] for m in masks)
    return ((one < two).double() + (one == two) / 2).mean().item()


# ---------------------------------------------------------------------------------------------------------------------
# The rows of the table


def pairs(texts, out):
    """MODEL:ORDER or MODEL -> [(path, order or None)]; without any, the models that are there."""
    names = [f"{name}.pt" for name in ("raster", "anyorder", "ordered_raster", "ordered_class", "ordered")]
    texts = texts or [path for path in (os.path.join(out, name) for name in names) if os.path.exists(path)]
    if not texts:
        raise UserError(f"{printable(out)} holds no models: run python anyorder.py first, or name them by --models")
    split = [text.rpartition(":") for text in texts]
    return [(a, b) if b in (*ORDERS, "frozen") else (text, None) for text, (a, _, b) in zip(texts, split)]


def open_rows(texts, out, tokenizer, device):
    """[(label, model, order, policy)] of everything that --models asks for, checked before anything is computed."""
    rows, opened = [], {}
    for path, order in pairs(texts, out):
        if path not in opened:
            opened[path] = model = load_model(path, device)
            if model.about["made_from"].get("tokenizer") != tokenizer.fingerprint:
                raise UserError(f"{printable(path)} was trained with another tokenizer than {printable(out)}/tokenizer.pt: "
                                f"likelihoods of different tokens do not compare, run python anyorder.py --out {printable(out)}")
        model = opened[path]
        trained = model.about["order"]
        for name in [order] if order else SENSIBLE.get(trained, [trained]):
            policy = None
            if name == "frozen":
                teacher = os.path.join(os.path.dirname(path), "anyorder.pt")
                policy = opened.get(teacher) or load_model(teacher, device)
                if fingerprint(policy.state_dict()) != model.about["made_from"].get("model"):
                    raise UserError(f"{printable(path)} was not finetuned from {printable(teacher)}: "
                                    f"leave out :frozen, or run python finetune.py again")
            if (name == "learned" and not model.config["order_head"]) or (name == "class" and "caption_rank" not in model.about):
                raise UserError(f"{printable(path)} knows no {name} order: run python finetune.py and give out/ordered.pt:{name}")
            rows.append((f"{os.path.splitext(os.path.basename(path))[0]}:{name}", model, name, policy))
    return rows


@torch.inference_mode()
def evaluate_row(model, order, policy, tokenizer, held, n, batch, guidance, seed, net, features, label):
    """One row: draws n images, scores n held-out ones, completes some. Only features are kept of what it draws.

    Returns (dict of figures, extras: images and ranks to show, nats per image [m], ranks [m, N])."""
    device, N, rows, cols = model.hop.device, model.N, model.config["rows"], model.config["cols"]
    how = {"order": "inferred" if order == "frozen" else order, "policy": policy,
           "score": model.about.get("score", "confidence"), "distance": model.about.get("distance", 0.0)}
    chance = torch.Generator(device).manual_seed(seed)                     # every row starts from the same noise
    m = min(n, len(held["tokens"]))
    with tqdm(total=n + m + min(m, GIVEN), desc=label, unit="image", dynamic_ncols=True) as bar:
        evaluated = []                                                     # inputs that went through a model's output layer
        hooks = [each.head.register_forward_hook(lambda _, x, y: evaluated.append(y.shape[0] * y.shape[1]))
                 for each in (model, policy) if each is not None]
        found, seen, spent, show = torch.empty(n, held["features"].shape[1]), 0, 0.0, []
        for i in range(0, n, batch):
            captions = [held["captions"][j % len(held["captions"])] for j in range(i, min(i + batch, n))]
            start = time.perf_counter()
            tokens, visited = generate(model, captions, guidance=guidance, generator=chance, **how)
            # rounded to uint8 as a saved PNG would be: float images, or truncated ones, measure something else
            images = to_uint8(tokenizer.decode(tokens))
            if device.type == "cuda":
                torch.cuda.synchronize()
            spent += time.perf_counter() - start
            found[i:i + len(images)] = features(images).cpu()              # the last, smaller batch counts as well
            if isinstance(net["judge"], Judge) and net["judge"].config["task"] == "captions":
                names = net["judge"].config["classes"]
                seen += sum(names[k] == c for k, c in zip(net["judge"](to_float(images)).argmax(1).tolist(), captions))
            if not show:
                show = [images[:6].cpu(), rank_of(visited)[:6].cpu()]
            bar.update(len(images))
        for hook in hooks:
            hook.remove()

        nats, ranks = [], []
        for i in range(0, m, batch):
            tokens, captions = held["tokens"][i:min(i + batch, m)].long().to(device), held["captions"][i:min(i + batch, m)]
            # every cell is given: generate only chooses the order, from what came before, as it does when it draws
            visited = generate(model, captions, given=tokens, keep=torch.ones(N, dtype=torch.bool), generator=chance, **how)[1]
            nats.append(-model.log_probs(tokens, captions, visited).double().sum(1).cpu())
            ranks.append(rank_of(visited).cpu())
            bar.update(len(tokens))
        nats, ranks = torch.cat(nats), torch.cat(ranks)

        upper, far = torch.arange(N) < rows // 2 * cols, []
        for i in range(0, min(m, GIVEN), batch):
            truth = held["images"][i:min(i + batch, m, GIVEN)].to(device)
            tokens = held["tokens"][i:i + len(truth)].long().to(device)
            tokens, _ = generate(model, held["captions"][i:i + len(truth)], given=tokens, keep=upper, guidance=guidance,
                                 generator=chance, **how)
            images = to_uint8(tokenizer.decode(tokens))
            top = images.shape[2] // rows * (rows // 2)
            images[:, :, :top] = truth[:, :, :top]                         # what was given is not judged
            far.append(lpips(to_float(images), to_float(truth), net["lpips"]).cpu())
            bar.update(len(truth))

    leaks = how["order"] == "inferred" and how["score"] == "likelihood"    # it looks at the content: not a likelihood
    precision, recall = precision_recall(held["features"], found)
    drawn = moments(found)
    figures = {"nats": None if leaks else nats.mean().item() / N, "nats_error": nats.std().item() / math.sqrt(m) / N,
               "bits": None if leaks else nats.mean().item() / math.log(2), "frechet": frechet(drawn, held["moments"]),
               "recon": frechet(drawn, held["recon"]), "kid": 1000 * kernel_distance(found, held["features"]),
               "precision": precision, "recall": recall, "class_seen": seen / n if held["named"] else None,
               "lpips": torch.cat(far).mean().item(), "step": step_length(rank_of(ranks), cols),
               "touches": touching(ranks, rows, cols), "train_steps": model.about["step"],
               "tokens_seen": model.about["tokens_seen"], "train_seconds": round(model.about["seconds"], 1),
               "evaluations": sum(evaluated) / n, "images_per_second": n / spent}
    if held["labels"] is not None:
        labels = held["labels"][:m]
        figures["sun_first"] = drawn_before(ranks[:len(labels)], labels, "sun", "cloud", rows, cols)
        figures["glitter_last"] = drawn_before(ranks[:len(labels)], labels, "sun", "reflection", rows, cols)
    return figures, (show, nats, ranks[:RANKS].to(torch.int16))


@torch.inference_mode()
def open_held(test, tokenizer, net, features, n, batch, seed, device):
    """Held-out images in a fixed random order: their captions, tokens, features and what the judge makes of them. The
    pictures themselves are kept for a few thousand only."""
    some = torch.randperm(len(test), generator=torch.Generator().manual_seed(seed))[:max(HELD_OUT, n)].tolist()
    held = {"captions": [], "tokens": [], "features": [], "recon": [], "images": [], "labels": None}
    for i in tqdm(range(0, len(some), batch), desc="held-out images", dynamic_ncols=True):
        items = [test[j] for j in some[i:i + batch]]
        images = torch.stack([image for image, _ in items]).to(device)
        tokens = tokenizer.encode(to_float(images))
        held["captions"] += [caption for _, caption in items]
        held["tokens"].append(tokens.to(torch.int32).cpu())
        held["features"].append(features(images).cpu())
        held["recon"].append(features(to_uint8(tokenizer.decode(tokens))).cpu())
        if i < VALIDATE:
            held["images"].append(images.cpu())
    held = {key: torch.cat(value) if key in ("tokens", "features", "recon", "images") else value for key, value in held.items()}
    held["moments"], held["recon"] = moments(held["features"]), moments(held["recon"])
    if test.name == "sunsets":
        size = held["images"].shape[-1]
        held["labels"] = torch.stack([render_sunset(test.rows[j], size)[2] for j in some[:len(held["images"])]])
    return held


# ---------------------------------------------------------------------------------------------------------------------
# What is shown


def table(results, columns):
    """A list of dicts as text, one line each, columns = {key: (heading, format)}; None is shown as a dash."""
    lines = [[""] + [heading for heading, _ in columns.values()]]
    for row in results:
        lines.append([row["name"]] + ["-" if row.get(key) is None else format(row[key], form) for key, (_, form) in columns.items()])
    wide = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join("  ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, wide)))
                     for line in lines)


def draw_table(results, panels, path):
    """The main figures as bars, one panel each; panels = {key: title}."""
    panels = {key: title for key, title in panels.items() if any(row.get(key) is not None for row in results)}
    high, wide, label = 26 * len(results) + 60, 620, 200
    page = Image.new("RGB", (2 * wide, high * math.ceil(len(panels) / 2) + 10), "white")
    pen, font, bold = ImageDraw.Draw(page), ImageFont.load_default(16), ImageFont.load_default(19)
    for p, (key, title) in enumerate(panels.items()):
        left, top = 16 + p % 2 * wide, 14 + p // 2 * high
        pen.text((left, top), title, "black", bold)
        values = [row.get(key) for row in results]
        most = max([abs(v) for v in values if v is not None] + [1e-9])
        for i, (row, value) in enumerate(zip(results, values)):
            y = top + 30 + 26 * i
            pen.text((left, y), row["name"][:24], "black", font)
            if value is not None:
                end = left + label + max(1, round((wide - label - 110) * abs(value) / most))
                pen.rectangle((left + label, y + 2, end, y + 18), fill="#4a78b5")
                pen.text((end + 8, y), f"{value:.4g}", "black", font)
    page.save(path)


def draw_comparison(shown, captions, rows, cols, path):
    """The same captions drawn in each way, the order beside each image (dark first); shown = [(name, images, rank)]."""
    size = shown[0][1].shape[-1]
    scale, tiles = max(1, 96 // size), []
    for _, images, rank in shown:
        maps = F.interpolate(order_maps(rank, rows, cols, size).float(), size=(size, size)).to(torch.uint8)
        tiles.append(torch.stack((images, maps), 1).flatten(0, 1))         # image, its order, image, its order, ...
    grid = sheet(torch.cat(tiles), len(tiles[0]), scale=scale)
    page = Image.new("RGB", (grid.width + 200, grid.height + 60), "white")
    page.paste(grid, (200, 60))
    pen, font = ImageDraw.Draw(page), ImageFont.load_default(15)
    for i, (name, _, _) in enumerate(shown):
        pen.text((8, 60 + (i + 0.4) * (grid.height / len(shown))), name[:24], "black", font)
    step = grid.width / len(shown[0][1])
    for i, caption in enumerate(captions[:len(shown[0][1])]):
        words, lines = caption.split(), [""]
        for word in words:
            lines[-1:] = [f"{lines[-1]} {word}".strip()] if font.getlength(lines[-1] + " " + word) < step - 8 else [lines[-1], word]
        pen.text((202 + i * step, 4), "\n".join(lines[:3]), "black", font)
    page.save(path)


def write(path, contents):
    with open(path + ".tmp", "w") as file:                                 # whole or not at all, as data.save does
        json.dump(contents, file, indent=1)
    os.replace(path + ".tmp", path)


def main():
    parser = arguments(__doc__)
    parser.set_defaults(data=None)
    parser.add_argument("--models", nargs="+", default=None, help="MODEL.pt:ORDER ..., order one of " + ", ".join(ORDERS)
                        + ", frozen; MODEL.pt alone takes the orders that make sense for it; default: all models in OUT")
    parser.add_argument("--n", type=int, default=500, help="images to draw per row, and to score")
    parser.add_argument("--batch", type=int, default=50, help="images at once")
    parser.add_argument("--guidance", type=float, default=1.0, help="classifier-free guidance (1: none)")
    parser.add_argument("--inception", default="", help="inception-2015-12-05.pt: report FID instead of the judge's distance")
    parser.add_argument("--lpips-backbone", default="", help="torchvision's alexnet .pth, for true LPIPS")
    parser.add_argument("--lpips-linear", default="", help="the lpips package's v0.1/alex.pth")
    args = parser.parse_args()
    if args.n < LEAST or args.batch < 1 or not 0 <= args.guidance <= 100:
        raise UserError(f"--n {args.n} --batch {args.batch} --guidance {args.guidance}: n at least {LEAST}, batch at least 1, "
                        f"guidance in 0..100")
    if bool(args.lpips_backbone) != bool(args.lpips_linear):
        raise UserError("LPIPS needs both its parts: --lpips-backbone alexnet.pth --lpips-linear alex.pth")
    device = pick_device(args.device)
    tokenizer = load_tokenizer(os.path.join(args.out, "tokenizer.pt"), device)
    plan = open_rows(args.models, args.out, tokenizer, device)
    size, about = tokenizer.config["size"], plan[0][1].about
    train, test = (open_data(args.data or about["data"], size, split) for split in ("train", "test"))
    if train.fingerprint != about["made_from"]["data"]:
        raise UserError(f"{args.data or about['data']} is not what these models were trained on: give that as --data")
    if len(test) < LEAST:
        raise UserError(f"{test.name} has {len(test)} held-out images, at least {LEAST} are needed: add images")
    judge = open_judge(args.out, train, size, args.seed, device)
    ...
