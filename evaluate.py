"""Which order draws better? All draw the same captions and score the same images.

    nats/token         - 1/N log p(image) of held-out images: no judge, no noise. It is
                       exact where one order leads to an image: one that is fixed or
                       depends on the past alone. Random orders draw from a mixture,
                       p(image) = mean over orders of p(image | order). The mean over
                       K of them is a bound: an image costs no more. It tightens with
                       K (--orders). "single orders" is the same with K = 1
    Frechet            |m1 - m2|^2 + tr(S1 + S2 - 2 sqrt(S1 S2)) between features of
                       drawn and of held-out images, or ("to recon") of the latter's
                       reconstructions, which takes the tokenizer's own loss out
    KID                the same by an unbiased kernel estimate (Binkowski et al. 2018),
                       times 1000
    precision, recall  share of drawn images that lie among held-out ones; the reverse
    class seen         how often the judge names the caption that was asked for
    LPIPS              distance to the truth where the model draws one half of an image:
                       mean of four halves, and the lower half, which suits raster order
    step, touches ...  what the order looks like, and what training and drawing cost

The features are those of a small *judge* network, trained here on the data. Such a
distance ranks models on one data set; it is never called FID. --weights takes the
networks of FID and LPIPS.

reads    models (.pt of anyorder.py and finetune.py), out/tokenizer.pt, the images
writes   out/judge.pt, out/results.json,
         out/compare.png (the same captions drawn in each order, beside the orders)
run      python evaluate.py                 all models in out/, 500 images each
         python evaluate.py --models out/raster.pt:raster out/ordered.pt:learned@16
         python evaluate.py --speed         3 to 6 minutes on an idle machine
you see  the table, and below it whether the judge can be trusted
not here training the models (anyorder.py, finetune.py)
"""

import collections
import contextlib
import functools
import inspect
import json
import math
import os
import statistics
import sys
import time
import types
import warnings
from unittest import mock

import torch
import torch.nn as nn
import torch.nn.functional as F

import anyorder
from anyorder import FIXED_ORDERS, load_model, rank_of
from data import (SUNSET_LABELS, Sunsets, UserError, arguments, autocast, command_line, fingerprint,
                  in_turn, is_first, join, load, number, open_data, pick_device, precision,
                  printable, progress, render_sunset, replacing, restore, run, save, seeded,
                  to_float, to_uint8, writable)
from order_infer import grow, infer_orders, order_maps
from sample import ORDERS, generate, named_mask, order_settings, page, visit_list
from tokenizer import load_tokenizer, update

JUDGED = "Frechet (judge)"    # never called FID
BATCH = 100          # images at once
HELD_OUT = 10_000    # held-out images that drawn ones are compared with, at most (or --n)
KEPT = 4_000         # this many of them stay in memory as pictures
LABELLED = 256       # and this many as maps of sun, cloud ..., which sunsets have
COMPLETED = 512      # images of which a row completes each half, at most
HALVES = ("bottom", "top", "left", "right")
NEIGHBOURS = 3       # k of precision and recall: they take k + 1 images or more

# The orders of a model for which --models names none
SENSIBLE = {"random": ["raster", "random", "inferred"],
            "inferred": ["learned", "inferred", "class"]}

# The judge names captions if 2 to `captions` of them have `each` images or more.
JUDGE = {"steps": 800, "epochs": 40, "batch": 64, "width": 32, "captions": 200, "each": 20}
DAMAGES = {"noise": (0.3, 0.6, 1.2), "blur": (1, 2, 4), "shuffle": (0.25, 0.5, 1)}

# Columns of the two tables: heading and format
COLUMNS = {
    "nats": ("nats/token", ".4f"),
    "nats_error": ("+-", ".4f"),
    "nats_are": ("", ""),
    "nats_single": ("single orders", ".4f"),
    "versus": ("- first row", "+.4f"),
    "versus_error": ("+-", ".4f"),
    "frechet": ("Frechet", ".3f"),
    "frechet_spread": ("+-", ".3f"),
    "recon": ("to recon", ".3f"),
    "recon_spread": ("+-", ".3f"),
    "kid": ("KID x1000", ".3f"),
    "precision": ("precision", ".3f"),
    "recall": ("recall", ".3f"),
    "class_seen": ("class seen", ".3f"),
    "lpips": ("LPIPS", ".4f"),
    "lpips_lower": ("lower half", ".4f"),
    "lpips_lower_error": ("+-", ".4f"),
}
MORE = {
    "step": ("step length", ".2f"),
    "touches": ("touches drawn", ".3f"),
    "sun_first": ("sun < cloud", ".3f"),
    "glitter_last": ("sun < glitter", ".3f"),
    "train_steps": ("training steps", ",d"),
    "tokens_seen": ("tokens seen", ",d"),
    "train_seconds": ("training s", ",.0f"),
    "evaluations": ("evaluations/image", ",.0f"),
}

# -------------------------------------------------------------------------------------------------
# 1. Distances between sets of features [n, f]
#
# All go in blocks: 50,000 images of 2,048 features stay below 4 GB.
# All are computed on the CPU: Apple's GPU has no float64.


def moments(x, chunk=8192):
    """Features [n, f] -> mean [f], root [<= f, f] with root^T root = covariance.

    A covariance matrix would lose half of the digits, QR decompositions do not."""
    x = x.cpu()
    mean = x.mean(0, dtype=torch.float64)
    root = torch.empty(0, x.shape[1], dtype=torch.float64)
    for part in x.split(chunk):
        root = torch.linalg.qr(torch.cat((root, part.double() - mean)), mode="r").R
    return mean, root / math.sqrt(len(x) - 1)


def frechet(p, q):
    """Frechet distance of two Gaussians, each as `moments` gives it: a float >= 0.

    It is FID for features of the 2015 Inception network only (Heusel et al. 2017). With S = R^T
    R, tr sqrt(S1 S2) is the nuclear norm (sum of singular values) of R1 R2^T. A matrix square
    root fails where n < f makes the product singular."""
    (mean1, root1), (mean2, root2) = p, q
    cross = torch.linalg.svdvals(root1 @ root2.T).sum()
    apart = (mean1 - mean2).square().sum() + root1.square().sum() + root2.square().sum()
    return max(0.0, (apart - 2 * cross).item())


def frechet_distance(a, b):
    """Frechet distance of features a [n, f] and b [m, f]: a float."""
    return frechet(moments(a), moments(b))


def kernel_distance(a, b, block=2048):
    """KID of features a [n, f] and b [m, f]: a float, perhaps slightly negative.

    The unbiased squared MMD with kernel (x.y / f + 1)^3, over all pairs; the usual code averages
    over random subsets."""
    def total(x, y):
        found = 0.0
        for u in x.split(block):
            for v in y.split(block):
                found += ((u.double() @ v.double().T / x.shape[1] + 1) ** 3).sum().item()
        return found

    def within(x):
        # pairs i != j only: this makes the estimate unbiased
        same = ((x.double().square().sum(1) / x.shape[1] + 1) ** 3).sum().item()
        return (total(x, x) - same) / (len(x) * (len(x) - 1))

    a, b = a.cpu(), b.cpu()
    return within(a) + within(b) - 2 * total(a, b) / (len(a) * len(b))


def precision_recall(real, drawn, k=NEIGHBOURS, block=1024):
    """(precision, recall) of features [n, f] and [m, f] (Kynkaanniemi et al. 2019).

    Precision: the share of `drawn` inside a ball around any of `real` that reaches to its k-th
    nearest neighbour. It is quality. Recall, the reverse, is diversity."""
    def covered(points, x):
        near = [torch.cdist(part, x).topk(k + 1, largest=False).values for part in x.split(block)]
        radius = torch.cat(near)[:, k]  # number 0 is the image itself
        inside = [(torch.cdist(part, x) <= radius).any(1) for part in points.split(block)]
        return torch.cat(inside).double().mean().item()

    real, drawn = real.cpu(), drawn.cpu()
    # centred: the distances stay the same, and float32 loses less
    real, drawn = real - real.mean(0), drawn - real.mean(0)
    return covered(drawn, real), covered(real, drawn)


def lpips(x, y, net):
    """LPIPS v0.1 (Zhang et al. 2018, eq. 1), a distance of images: [B], 0 for equal ones.

        sum over layers of the mean over places of  w . (x / |x| - y / |y|)^2

    x, y [B, 3, H, W] float in [-1, 1] (not [0, 1]). `net` has .activations(images), a list of [B,
    C, h, w], and .weights, a list of [C] (or [1], the same for all channels)."""
    def unit(z):
        return z / (z.square().sum(1, keepdim=True).sqrt() + 1e-10)

    total = 0
    for a, b, weight in zip(net.activations(x), net.activations(y), net.weights):
        difference = (unit(a) - unit(b)).square() * weight.to(a).view(1, -1, 1, 1)
        total = total + difference.sum(1).mean((1, 2))
    return total


# -------------------------------------------------------------------------------------------------
# 2. The judge: features learned from the data


class Judge(nn.Module):
    """config: task ("captions" or "rotations"), classes, width."""
    weights = [torch.ones(1)] * 4  # for `lpips`: all channels count the same

    def __init__(self, config):
        super().__init__()
        self.config = config
        w = config["width"]
        self.convs = nn.ModuleList([
            nn.Conv2d(3, w, 5, 2, 2), nn.Conv2d(w, 2 * w, 3, 2, 1),
            nn.Conv2d(2 * w, 4 * w, 3, 2, 1), nn.Conv2d(4 * w, 4 * w, 3, 1, 1)])
        channels = [conv.out_channels for conv in self.convs]
        self.norms = nn.ModuleList([nn.GroupNorm(c // 4, c) for c in channels])
        self.head = nn.Linear(4 * w, len(config["classes"]))
        self.sound = nn.Linear(4 * w, 1)  # is the image intact? (in training only)

    def activations(self, images):
        """images [B, 3, H, W] float in [-1, 1] -> four of [B, C, h, w]."""
        x = images
        if x.shape[-1] > 64:
            x = F.adaptive_avg_pool2d(x, 64)
        out = []
        for conv, norm in zip(self.convs, self.norms):
            x = F.relu(norm(conv(x)))
            out.append(x)
        return out

    def features(self, images):
        return self.activations(images)[-1].mean((2, 3))  # [B, 4 w]

    def forward(self, images):
        return self.head(self.features(images))  # [B, classes]


def spoiled(image, chance):
    """An image [3, S, S] in [-1, 1], damaged in one of three ways: random pixels, a coarser
    picture, patches that changed places."""
    S = image.shape[-1]
    damage = torch.randint(3, (), generator=chance)
    strength = torch.rand((), generator=chance).item()
    if damage == 0:
        hit = torch.rand(1, S, S, generator=chance) < 0.02 + 0.3 * strength
        return torch.where(hit, torch.rand(3, S, S, generator=chance) * 2 - 1, image)
    if damage == 1:
        side = max(1, int(S / (1.3 + 3 * strength)))
        small = F.interpolate(image[None], size=[side, side], mode="area")
        return F.interpolate(small, size=[S, S], mode="bilinear")[0]
    image = image.clone()
    side = S // 4
    for _ in range(1 + int(3 * strength)):
        y, x, v, u = torch.randint(S - side + 1, (4,), generator=chance).tolist()
        here = image[:, y:y + side, x:x + side].clone()
        image[:, y:y + side, x:x + side] = image[:, v:v + side, u:u + side]
        image[:, v:v + side, u:u + side] = here
    return image


def train_judge(dataset, seed=0, device="cpu"):
    """A Judge of these images, repeatable by seed.

    It names captions, where a few have enough images each; else by how many quarter turns an
    image was rotated (Gidaris et al. 2018). It also tells images from spoiled ones: features of
    captions alone hardly see a blurred sky."""
    counts = collections.Counter(dataset.captions)
    task, classes = "rotations", ["0", "90", "180", "270"]
    if 2 <= len(counts) <= JUDGE["captions"] and min(counts.values()) >= JUDGE["each"]:
        task, classes = "captions", sorted(counts)
    torch.manual_seed(seed)
    judge = Judge({"task": task, "classes": classes, "width": JUDGE["width"]}).to(device)
    optimizer = torch.optim.AdamW(judge.parameters(), weight_decay=0.05)
    chance = torch.Generator().manual_seed(seed)
    batch = JUDGE["batch"]
    steps = min(JUDGE["steps"], JUDGE["epochs"] * math.ceil(len(dataset) / batch))
    # each image is decoded once, as long as 512 MB hold them
    read = functools.lru_cache(2 ** 29 // dataset[0][0].numel())(dataset.__getitem__)
    with progress(steps, "judge", "step") as bar:
        for step in range(steps):
            picked = torch.randint(len(dataset), (batch,), generator=chance).tolist()
            label = torch.randint(4, (batch,), generator=chance).tolist()
            images, captions = zip(*map(read, picked))
            if task == "captions":
                label = [classes.index(caption) for caption in captions]
            else:
                images = [image.rot90(turns, (1, 2)) for image, turns in zip(images, label)]
            images = [to_float(image) for image in images]
            images += [spoiled(image, chance) for image in images[:batch // 2]]
            seen = judge.features(torch.stack(images).to(device))  # [1.5 batch, 4 w]
            sound = (torch.arange(len(seen), device=device) < batch).float()
            loss = (F.cross_entropy(judge.head(seen[:batch]), torch.tensor(label, device=device))
                    + F.binary_cross_entropy_with_logits(judge.sound(seen)[:, 0], sound))
            optimizer.param_groups[0]["lr"] = 2e-3 * min(1, (step + 1) / 50) * (1 - step / steps)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            bar.update()
    return judge


def open_judge(out, dataset, seed=0, device="cpu"):
    """The judge in out/judge.pt if the same recipe and data made it, else a new one.

    Under torchrun every process trains it, so none waits; then all take process 0's."""
    path = os.path.join(out, "judge.pt")
    recipe = [inspect.getsource(part) for part in (Judge, spoiled, train_judge)]
    made_from = {"data": dataset.fingerprint, "size": dataset.size, "seed": seed,
                 "recipe": fingerprint(JUDGE, recipe)}
    judge = None
    with contextlib.suppress(UserError):  # a damaged file costs a minute, no more
        file = load(path, "judge", "python evaluate.py")
        if file.get("made_from") == made_from:
            judge = restore(Judge, file, path, "python evaluate.py")
    new = judge is None
    if new:
        judge = train_judge(dataset, seed, device)
    judge.load_state_dict(in_turn([judge.cpu().state_dict()])[0])
    if new and is_first():
        save(path, {"kind": "judge", "config": judge.config, "made_from": made_from,
                    "model": judge.state_dict()})
    return judge.requires_grad_(False).eval().to(device)


def corrupted(images, damage, strength, chance):
    """uint8 images [B, 3, S, S], damaged. noise: standard deviation in [-1, 1]; blur: Gaussian,
    in 32nds of the side; shuffle: share of the 4x4 patches that change places."""
    B, _, S, _ = images.shape
    x = to_float(images)
    if damage == "noise":
        return to_uint8(x + strength * torch.randn(x.shape, generator=chance))
    if damage == "blur":
        sigma = strength * max(S, 32) / 32  # less than a pixel would change nothing
        reach = min(math.ceil(3 * sigma), S)
        bell = (-torch.arange(-reach, reach + 1).square() / (2 * sigma ** 2)).exp()
        bell = (bell / bell.sum()).expand(3, 1, -1)
        x = F.pad(x, (reach, reach, reach, reach), mode="replicate")
        x = F.conv2d(x, bell[:, :, None], groups=3)
        return to_uint8(F.conv2d(x, bell[..., None], groups=3))
    side = S // 4
    patches = F.unfold(x[..., :4 * side, :4 * side], side, stride=side)  # [B, 3 side^2, 16]
    source = torch.arange(16).repeat(B, 1)
    moved = torch.rand(B, 16, generator=chance).argsort(1)[:, :round(16 * strength)]
    source.scatter_(1, moved, moved.roll(1, 1))
    patches = patches.gather(2, source[:, None].expand_as(patches))
    x[..., :4 * side, :4 * side] = F.fold(patches, 4 * side, side, stride=side)
    return to_uint8(x)


def validate_judge(features, images, seed=0):
    """Can a distance in these features be trusted? features: uint8 images -> [B, f].

    One half of real images, damaged, is compared with the other half. -> dict: real (distance of
    the halves); three distances for each of DAMAGES; ratio (mildest damage over real); ok (all
    rise, ratio is 20 or more)"""
    chance = torch.Generator().manual_seed(seed)
    half = len(images) // 2
    target = moments(features(images[half:2 * half]))
    report = {"real": frechet(moments(features(images[:half])), target)}
    for damage, strengths in DAMAGES.items():
        worse = [corrupted(images[:half], damage, strength, chance) for strength in strengths]
        report[damage] = [frechet(moments(features(some)), target) for some in worse]
    found = [report[damage] for damage in DAMAGES]
    report["ratio"] = min(mildest for mildest, *_ in found) / max(report["real"], 1e-12)
    report["ok"] = report["ratio"] >= 20 and all(one < two < three for one, two, three in found)
    return report


# -------------------------------------------------------------------------------------------------
# 3. Rows. A row is a model and an order (see open_row). `bench` is what all
# rows share: the flags, the networks and the held-out images (see open_bench).


def evaluate_row(row, first, bench):
    """Figures, and six images [6, 3, S, S] with their ranks [6, N].

    `first` is the first row. Processes share the batches, and all get the same result."""
    features, figures, shown = draw_images(row, bench)
    about = row.model.about
    figures.update(compare_features(features, bench), name=row.name, train_steps=about["step"],
                   tokens_seen=about["tokens_seen"], train_seconds=about["seconds"],
                   weights=fingerprint(row.model.state_dict()), **complete_images(row, bench))
    if not row.steps:  # nats and ranks are those of one cell at a time
        figures.update(score_images(row, first, bench))
    return figures, shown


def mean_and_error(x):
    """(mean, standard error of it)."""
    return x.mean().item(), x.std().item() / math.sqrt(len(x))


def my_batches(count, bench, phase, title):
    """(slice, generator) of each batch that this process computes. The generator depends on the
    batch alone: not on the row, nor on the number of processes."""
    process, world = join(bench.device)
    starts = range(process * BATCH, count, world * BATCH)
    with progress(len(starts), f"{title} {phase}", "batch") as bar:
        for start in starts:
            generator = seeded(bench.seed, phase, start, device=bench.device)
            yield slice(start, min(start + BATCH, count)), generator
            bar.update()


@torch.inference_mode()
def draw_images(row, bench):
    """`draws` sets of n images, each set for the same captions.

    -> features [draws * n, f], figures, and what evaluate_row shows"""
    asked = []  # of the output layers: the cost of drawing, on any machine

    def count(layer, inputs, output):
        asked.append(output.shape[:-1].numel())

    hooks = [model.to_token.register_forward_hook(count)
             for model in (row.model, row.how["policy"]) if model]
    classes, total = bench.judge.config["classes"], bench.draws * bench.n
    parts = []
    for batch, generator in my_batches(total, bench, "draw", row.name):
        captions = [bench.captions[i % bench.n % len(bench.captions)]
                    for i in range(batch.start, batch.stop)]
        start = time.perf_counter()
        tokens, order = generate(row.model, captions, steps=row.steps, guidance=bench.guidance,
                                 generator=generator, **row.how)
        # rounded, as in a PNG: truncated would be darker
        images = to_uint8(bench.tokenizer.decode(tokens)).cpu()
        seconds = time.perf_counter() - start
        guess = bench.judge(to_float(images).to(bench.device)).argmax(1).tolist()
        seen = sum(classes[k] == caption for k, caption in zip(guess, captions))
        shown = images[:6], rank_of(order)[:6].cpu()
        parts.append((bench.features(images), shown, seen, seconds, sum(asked)))
        asked.clear()
    for hook in hooks:
        hook.remove()
    features, shown, *sums = zip(*in_turn(parts))
    seen, seconds, evaluations = map(sum, sums)
    figures = {"evaluations": evaluations / total,
               "images_per_second": total * join(bench.device)[1] / seconds}
    if bench.judge.config["task"] == "captions":
        figures["class_seen"] = seen / total
    return torch.cat(features), figures, shown[0]


def compare_features(features, bench):
    """Figures: distances of drawn to held-out features, means over sets of n."""
    sets = []
    for part in features.split(bench.n):
        drawn = moments(part)
        sets.append([frechet(drawn, bench.moments), frechet(drawn, bench.recon),
                     1000 * kernel_distance(part, bench.real),
                     *precision_recall(bench.real, part)])
    sets = torch.tensor(sets, dtype=torch.float64)  # [draws, 5]
    figures = dict(zip(("frechet", "recon", "kid", "precision", "recall"), sets.mean(0).tolist()))
    if len(sets) > 1:
        figures["frechet_spread"], figures["recon_spread"] = sets.std(0)[:2].tolist()
    return figures


@torch.inference_mode()
def complete_images(row, bench):
    """Figures: LPIPS from the truth to images of which a half was drawn."""
    rows, cols = row.model.config["rows"], row.model.config["cols"]
    side = bench.images.shape[-1] // rows
    total = min(bench.n, len(bench.tokens), COMPLETED)
    parts = []
    for batch, generator in my_batches(total, bench, "complete", row.name):
        tokens, captions = bench.tokens[batch].to(bench.device), bench.captions[batch]
        truth, far = bench.images[batch].to(bench.device), []
        for half in HALVES:
            hidden = named_mask(half, rows, cols, bench.seed)  # [rows, cols]
            filled, _ = generate(row.model, captions, given=tokens, keep=~hidden.flatten(),
                                 steps=row.steps, guidance=bench.guidance,
                                 generator=generator, **row.how)
            # what was given is the truth itself: only the drawn half counts
            drawn = grow(hidden, side).to(bench.device)
            images = torch.where(drawn, to_uint8(bench.tokenizer.decode(filled)), truth)
            far.append(lpips(to_float(images), to_float(truth), bench.lpips_net).cpu())
        parts.append(torch.stack(far, 1))
    far = torch.cat(in_turn(parts))  # [m, 4]
    lower, error = mean_and_error(far[:, HALVES.index("bottom")])
    return {"lpips": far.mean().item(), "lpips_lower": lower, "lpips_lower_error": error}


@torch.inference_mode()
def score_images(row, first, bench):
    """Figures: nats of held-out images, and what their orders look like."""
    random = is_random(row)
    K = bench.orders if random else 1
    parts = []
    for batch, generator in my_batches(len(bench.tokens[:bench.n]), bench, "score", row.name):
        tokens, captions = bench.tokens[batch].to(bench.device), bench.captions[batch]
        log_p = []
        for _ in range(K):
            order = orders_of(row, tokens, captions, generator)
            # to the CPU, then to float64
            steps = row.model.log_probs(tokens, captions, order).cpu().double()  # [b, N]
            log_p.append(steps.sum(1))
        parts.append((torch.stack(log_p), rank_of(order).cpu()))
    log_p, rank = zip(*in_turn(parts))
    log_p, rank = torch.cat(log_p, 1), torch.cat(rank)  # [K, m], [m, N]
    figures = order_figures(rank, bench.labels, row.model.config)
    row.nats = mixture_nats(log_p)
    nats, error = mean_and_error(row.nats)
    figures.update(nats=nats / row.model.N, nats_error=error / row.model.N, nats_are="exact")
    if random:
        figures.update(nats_are="bound", nats_single=-log_p.mean().item() / row.model.N)
    if first.nats is not None:
        # on the same images: far less noise than in either
        apart = (row.nats - first.nats) / row.model.N
        figures["versus"], figures["versus_error"] = mean_and_error(apart)
    return figures


def is_random(row):
    """Whether the order of this row is drawn by dice: it differs between images, unseen."""
    if row.how["order"] not in FIXED_ORDERS:
        return False
    a, b = FIXED_ORDERS[row.how["order"]](2, row.model.N, seeded(0), row.model.config["cols"])
    return not torch.equal(a, b)


def orders_of(row, tokens, captions, generator):
    """The orders [b, N] in which this row would draw the images `tokens` [b, N]."""
    if row.how["order"] in FIXED_ORDERS:
        return visit_list(row.model, captions, row.how["order"], generator)
    # with every cell given, `generate` only chooses the order, from the past, as when it draws
    keep = torch.ones(row.model.N, dtype=torch.bool)
    return generate(row.model, captions, given=tokens, keep=keep, generator=generator, **row.how)[1]


def mixture_nats(log_p):
    """-log of the mean over K orders of p(image | order): log_p [K, m] -> nats [m].

    With all orders it is exact. With K random ones it is too high, on average over the dice
    (Jensen's inequality), and less so the larger K is."""
    return math.log(len(log_p)) - log_p.logsumexp(0)


def order_figures(rank, labels, config):
    """rank [m, N], labels [l, S, S] of the first images, or None."""
    rows, cols = config["rows"], config["cols"]
    figures = {"step": step_length(rank_of(rank), cols), "touches": touching(rank, rows, cols)}
    if labels is not None:
        rank, labels = rank[:len(labels)], labels[:len(rank)]
        figures["sun_first"] = drawn_before(rank, labels, "sun", "cloud", rows, cols)
        figures["glitter_last"] = drawn_before(rank, labels, "sun", "reflection", rows, cols)
    return figures


def step_length(order, cols):
    """Mean distance between successive cells. Raster on 3x3: (6 + 2 sqrt(5)) / 8."""
    order = order.cpu()
    down, right = (order // cols).diff(dim=1), (order % cols).diff(dim=1)
    return torch.hypot(down.double(), right.double()).mean().item()


def touching(rank, rows, cols):
    """Share of steps, without the first, whose cell has a drawn one among its 8 neighbours.

    0 6 1
    7 8 4    gives 5/8: the cells of steps 1, 2 and 3 touch nothing drawn. Raster gives 1.
    2 5 3
    """
    grid = rank.cpu().view(-1, 1, rows, cols).double()
    earliest = -F.max_pool2d(-grid, 3, 1, 1)  # of each cell and its neighbours
    return (earliest < grid).sum().item() / (len(rank) * (rows * cols - 1))


def drawn_before(rank, labels, first, second, rows, cols):
    """How often `first` is drawn before `second` where an image has both; 0.5 is chance.

    Names of SUNSET_LABELS. The time of a thing is the mean rank of its pixels. rank [B, N],
    labels [B, S, S]. None if no image has both."""
    grid = rank.cpu().view(-1, 1, rows, cols).double()
    step = F.interpolate(grid, size=labels.shape[1:])[:, 0]  # [B, S, S]

    def mean_step(name):
        mask = labels == SUNSET_LABELS.index(name)
        return (step * mask).sum((1, 2)) / mask.sum((1, 2))  # 0 / 0: nan without it

    later = mean_step(second) - mean_step(first)
    later = later[~later.isnan()]
    if len(later):
        return ((later > 0).double() + (later == 0) / 2).mean().item()


def open_rows(texts, out, tokenizer, device):
    """["MODEL.pt:ORDER@S", ...] -> rows; without texts, of all models in `out`.

    UserError for models of another tokenizer, and for orders that a model does not know."""
    names = [*FIXED_ORDERS, "anyorder", *(f"ordered_{order}" for order in FIXED_ORDERS),
             "ordered_class", "ordered"]
    paths = [os.path.join(out, f"{name}.pt") for name in names]
    # each file is read once
    open_model = functools.cache(functools.partial(load_model, device=device))
    rows = []
    for text in texts or filter(os.path.exists, paths):
        path, _, order = text.rpartition(":")  # from the right: C:\out\raster.pt is a path
        order, _, steps = order.partition("@")
        if order not in (*ORDERS, "frozen"):
            path, order, steps = text, "", ""
        model = open_model(path)
        if model.about["made_from"].get("tokenizer") != tokenizer.fingerprint:
            raise UserError(f"{printable(path)} was trained with another tokenizer than "
                            f"{printable(out)}/tokenizer.pt: run python anyorder.py again")
        if steps and steps not in map(str, range(1, model.N)):
            raise UserError(f"{printable(text)}: drawing takes 1 to {model.N - 1} steps, "
                            f"or leave out @{printable(steps)}")
        trained = model.about["order"]
        orders = [order] if order else SENSIBLE.get(trained, [trained])
        rows += [open_row(path, model, order, steps, open_model) for order in orders]
    if not rows:
        raise UserError(f"{printable(out)} holds no models: run python anyorder.py")
    return rows


def open_row(path, model, order, steps, open_model):
    """name, model, steps (0: a cell a step), nats (so far None), and how it draws."""
    name = os.path.splitext(os.path.basename(path))[0] + f":{order}"
    if steps:
        name += f"@{steps}"
    how = order_settings(model, path, order, open_model)
    return types.SimpleNamespace(name=name, model=model, steps=int(steps or 0), nats=None, how=how)


def open_bench(args, rows, tokenizer, device):
    """The flags; tokenizer, judge, lpips_net; features (uint8 images -> [B, f]); names of the
    measures; the held-out images, see read_held_out."""
    size, about = tokenizer.config["size"], rows[0].model.about
    path = args.data or about["data"]
    train, test = open_data(path, size, "train"), open_data(path, size, "test")
    if train.fingerprint != about["made_from"]["data"]:
        raise UserError(f"{train.name} is not the data that {rows[0].name} was trained on, "
                        f"{printable(about['data'])}: name that by --data")
    if len(test) <= NEIGHBOURS:
        raise UserError(f"{train.name} has {len(test)} held-out images: add some, to have "
                        f"{NEIGHBOURS + 1} or more")
    networks = load_weights(args.weights, size, device)
    writable(args.out)
    judge = open_judge(args.out, train, args.seed, device)
    distance, inception = networks.get("inception", (JUDGED, None))

    @torch.inference_mode()
    def features(images):
        found = []
        for part in images.split(BATCH):
            part = part.to(device)
            seen = inception(part) if inception else judge.features(to_float(part))
            found.append(seen.cpu())
        return torch.cat(found)

    bench = types.SimpleNamespace(**vars(args))
    bench.device, bench.tokenizer, bench.judge = device, tokenizer, judge
    bench.distance, bench.features = distance, features
    bench.lpips, bench.lpips_net = networks.get("lpips", ("LPIPS-judge", judge))
    read_held_out(test, bench)
    return bench


@torch.inference_mode()
def read_held_out(test, bench):
    """Into `bench`, of h held-out images in a fixed random order: captions, tokens [h, N],
    features `real` [h, f] and their moments; `recon`, moments of the reconstructions; images
    (uint8) and labels (of sunsets) of the first few; floor, the distance expected of n perfect
    images."""
    some = torch.randperm(len(test), generator=torch.Generator().manual_seed(bench.seed))
    some = some[:max(HELD_OUT, bench.n)].tolist()
    parts = []
    for batch, _ in my_batches(len(some), bench, "read", "held-out images"):
        images, captions = zip(*(test[i] for i in some[batch]))
        images = torch.stack(images)
        tokens = bench.tokenizer.encode(to_float(images).to(bench.device))
        recon = bench.features(to_uint8(bench.tokenizer.decode(tokens)))
        kept = images[:max(0, KEPT - batch.start)]
        parts.append((captions, tokens.cpu(), bench.features(images), recon, kept))
    captions, *tensors = zip(*in_turn(parts))
    bench.captions = sum(map(list, captions), [])
    bench.tokens, bench.real, recon, bench.images = map(torch.cat, tensors)
    bench.moments, bench.recon = moments(bench.real), moments(recon)
    bench.labels = None
    if isinstance(test, Sunsets):
        maps = [render_sunset(test.rows[i], test.size)[2] for i in some[:LABELLED]]
        bench.labels = torch.stack(maps)
    few = min(bench.n, len(some) // 2)
    bench.floor = {"n": few}
    for name, x in (("real", bench.real), ("recon", recon)):
        bench.floor[name] = frechet(moments(x[:few]), moments(x[few:]))


# -------------------------------------------------------------------------------------------------
# 4. The table, a picture, main


def table(results, columns):
    """Dicts as lines of text; columns {key: (heading, format)}, without empty ones."""
    stacks = [["", *(row["name"] for row in results)]]
    for key, (heading, form) in columns.items():
        values = [row.get(key) for row in results]
        if any(value is not None for value in values):
            cells = ["-" if value is None else format(value, form) for value in values]
            stacks.append([heading, *cells])
    stacks = [[cell.rjust(max(map(len, stack))) for cell in stack] for stack in stacks]
    return "\n".join("  ".join(line) for line in zip(*stacks))


def draw_comparison(shown, captions, config, path):
    """compare.png: each image beside its order (dark first).

    shown: a list of (name, images [6, 3, S, S] uint8, rank [6, N])"""
    tiles, labels = [], []
    for name, images, rank in shown:
        maps = order_maps(rank, config["rows"], config["cols"], images.shape[-1])
        tiles.append(torch.stack((images, maps), 1).flatten(0, 1))  # [12, 3, S, S]
        for caption in captions[:len(images)]:
            labels += [caption, name]
    scale = math.ceil(96 / tiles[0].shape[-1])
    page(path, torch.cat(tiles), labels, len(tiles[0]), scale)


def print_report(report):
    """Prints results.json: its tables and what to think of them."""
    rows, judge, floor = report["rows"], report["judge"], report["floor"]
    columns = {**COLUMNS, "frechet": (report["distance"], ".3f"), "lpips": (report["lpips"], ".4f")}
    print(table(rows, columns), table(rows, MORE), sep="\n\n")
    print("\n{draws} x {n:,} images drawn per row, {scored:,} scored, each half of {completed:,} "
          "completed, compared with {held_out:,} held-out ones at {size}x{size}; seed {seed}, "
          "guidance {guidance}".format(**report))
    if any(row.get("nats_are") == "bound" for row in rows):
        print("bound: by the mixture of {orders} random orders, an image costs no more; it "
              "tightens with --orders. Single orders: the same with one".format(**report))
    if any("nats" not in row for row in rows):
        print("no nats for ORDER@S: nats are those of one cell at a time")
    print(f"the tokenizer alone: {report['tokenizer']:.3f}, from reconstructions to the images\n"
          f"{floor['n']:,} perfect images: {floor['real']:.3f}, as reconstructions "
          f"{floor['recon']:.3f}. Rows below that cannot be distinguished, and distances of "
          "different --n do not compare")
    if judge:
        verdict = "valid" if judge["ok"] else "NOT VALID, trust the nats"
        print(f"the judge is {verdict}: the distance of mildly damaged images is "
              f"{judge['ratio']:.0f} times that of real ones (at least 20, rising with the damage)")
    speeds = ", ".join(f"{row['images_per_second']:.1f}" for row in rows)
    print(f"drawn at {speeds} images/s (fewer if the machine does other things, too)")


def parse():
    """The flags of the command line."""
    parser = arguments(__doc__)
    parser.add_argument("--models", nargs="+", default=[], metavar="MODEL.pt:ORDER",
                        help=f"ORDER: {', '.join(ORDERS)} or frozen; ORDER@S draws in S steps; "
                             "without :ORDER, those that make sense (default: all in OUT)")
    parser.add_argument("--n", type=number(int, NEIGHBOURS + 1, 10 ** 6), default=500,
                        help="images that each row draws, and scores")
    parser.add_argument("--draws", type=number(int, 1, 1000), default=1,
                        help="sets of N images per row: several show how much chance does")
    parser.add_argument("--orders", type=number(int, 1, 10 ** 4), default=16,
                        help="random orders of an image whose mixture is its likelihood")
    parser.add_argument("--guidance", type=number(float, 0, 100), default=1.0,
                        help="classifier-free guidance (1: none)")
    parser.add_argument("--weights", metavar="FILE", nargs="+", default=[],
                        help="instead of the judge: inception-2015-12-05.pt for FID; "
                             "torchvision's alexnet and the lpips package's v0.1/alex.pth, "
                             "both, for LPIPS")
    parser.add_argument("--speed", action="store_true", help="measure speed and memory instead")
    return parser.parse_args()


def main():
    args = parse()
    device = pick_device(args.device)
    process, _ = join(device)
    if args.speed:
        if process == 0:
            speed_table(device, args.out)
        return
    tokenizer = load_tokenizer(os.path.join(args.out, "tokenizer.pt"), device)
    rows = open_rows(args.models, args.out, tokenizer, device)
    bench = open_bench(args, rows, tokenizer, device)
    report = new_report(bench)
    shown = []
    try:
        for row in rows:
            figures, pictures = evaluate_row(row, rows[0], bench)
            report["rows"].append(figures)
            shown.append((row.name, *pictures))
            if process == 0:  # after every row: Ctrl-C loses one at most
                write_json(report, args.out, "results.json")
                draw_comparison(shown, bench.captions, row.model.config,
                                os.path.join(args.out, "compare.png"))
    finally:
        if report["rows"]:
            print_report(report)


def new_report(bench):
    """results.json, still without rows."""
    kept = ("seed", "n", "draws", "orders", "guidance", "weights", "floor", "distance", "lpips")
    report = {key: getattr(bench, key) for key in kept}
    scored = min(bench.n, len(bench.tokens))
    report.update(
        command=command_line(*sys.argv), torch=torch.__version__, size=bench.images.shape[-1],
        held_out=len(bench.tokens), scored=scored, completed=min(scored, COMPLETED),
        tokenizer=frechet(bench.recon, bench.moments), judge=None, rows=[])
    if bench.distance == JUDGED:
        report["judge"] = validate_judge(bench.features, bench.images, bench.seed)
    return report


def write_json(report, out, name):
    """Writes a dict to the file `name` in `out`."""
    with replacing(os.path.join(out, name)) as file:
        file.write(json.dumps(report, indent=1).encode())


# -------------------------------------------------------------------------------------------------
# 5. Machinery: skip this on a first reading. The networks of --weights, then --speed.


class AlexNet(nn.Module):
    """The convolutions of torchvision's alexnet, under their names there."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 64, 11, 4, 2), nn.ReLU(), nn.MaxPool2d(3, 2),
            nn.Conv2d(64, 192, 5, 1, 2), nn.ReLU(), nn.MaxPool2d(3, 2),
            nn.Conv2d(192, 384, 3, 1, 1), nn.ReLU(), nn.Conv2d(384, 256, 3, 1, 1), nn.ReLU(),
            nn.Conv2d(256, 256, 3, 1, 1), nn.ReLU())

    def activations(self, images):
        shift = torch.tensor([-0.030, -0.088, -0.188]).view(3, 1, 1).to(images)
        scale = torch.tensor([0.458, 0.448, 0.450]).view(3, 1, 1).to(images)
        x = (images - shift) / scale  # v0.0 of LPIPS forgot this step
        out = []
        for layer in self.features:
            x = layer(x)
            if isinstance(layer, nn.ReLU):
                out.append(x)
        return out


LINEAR = {f"lin{i}.model.1.weight": (1, channels, 1, 1)
          for i, channels in enumerate((64, 192, 384, 256, 256))}


def load_weights(paths, size, device="cpu"):
    """What the files hold, see `recognised`, and "lpips": its name and network."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls TorchScript outdated
        found = dict(recognised(path, device) for path in paths)
    if ("alexnet" in found) != ("linear" in found):
        raise UserError("--weights: LPIPS takes two files: alexnet and alex.pth")
    if "alexnet" in found:
        if size < 31:
            raise UserError(f"--weights: LPIPS takes images of 31 pixels or more, not {size}")
        found["alexnet"].weights = found["linear"]
        found["lpips"] = "LPIPS", found["alexnet"]
    return found


def recognised(path, device):
    """("inception", (name of its distance, function of uint8 images)), ("alexnet", network) or
    ("linear", its weights for `lpips`). UserError unless all names and shapes fit: distances
    would be plausible and wrong."""
    with contextlib.suppress(Exception), torch.no_grad():
        net = torch.jit.load(path, map_location=device).eval()

        def features(images):
            # the network resizes images itself: another resize is another FID
            return net(images, return_features=True).float()

        images = torch.zeros(2, 3, 32, 32, dtype=torch.uint8, device=device)
        count, width = features(images).shape
        if count == 2:
            return "inception", ("FID" if width == 2048 else "Frechet", features)
    with contextlib.suppress(Exception):
        state = torch.load(path, map_location="cpu", weights_only=True)
        if {name: tuple(w.shape) for name, w in state.items()} == LINEAR:
            return "linear", [state[name].flatten() for name in LINEAR]
        net = AlexNet()
        net.load_state_dict({k: w for k, w in state.items() if not k.startswith("classifier.")})
        return "alexnet", net.requires_grad_(False).eval().to(device)
    raise UserError(f"--weights {printable(path)}: expected inception-2015-12-05.pt, "
                    "torchvision's alexnet, or the lpips package's v0.1/alex.pth")


# -------------------------------------------------------------------------------------------------
# Speed: each part beside what could stand in its place, with random weights.

# attention: (B, heads, T, d); candidates: (B, heads, T, C, d); side: cells.
SIZES = {"cpu": {"attention": ((128, 6, 64, 32), (8, 8, 256, 64), (4, 8, 1024, 64)),
                 "candidates": (16, 8, 128, 128, 64),
                 "side": 8, "width": 128, "layers": 6, "train": 32, "infer": 256},
         "cuda": {"attention": ((64, 24, 264, 32), (32, 24, 1024, 32)),
                  "candidates": (128, 24, 128, 128, 32),
                  "side": 16, "width": 768, "layers": 14, "train": 64, "infer": 128}}
DRAWN = (1, 64)              # images drawn at once
LONG = (1, 8, 4096, 64)      # here the memory of attention counts
SECONDS = 8                  # for each comparison; or five rounds if they take longer


def compared(device, name, unit, ways):
    """A row for each of ways {what: (amount, function)}: median amount per second, and how many
    times the first way's this is.

    They are called in turn, so that a slow moment of the machine meets all of them. They go there
    and back (1 2 3 3 2 1 ...), so that none always runs after the same one."""
    turns = list(ways)
    times = {way: [] for way in ways}
    wait = getattr(torch, device.type).synchronize  # a GPU answers before it has finished
    began = time.perf_counter()
    while len(times[turns[0]]) < 5 or time.perf_counter() - began < SECONDS:
        for way in turns:
            start = time.perf_counter()
            ways[way][1]()
            wait()
            times[way].append(time.perf_counter() - start)
        turns.reverse()
    # the first round warms up
    rates = {way: amount / statistics.median(times[way][1:]) for way, (amount, _) in ways.items()}
    first, *_ = rates.values()
    return [{"name": f"{name}: {way}", "rate": rate, "unit": unit, "times": rate / first}
            for way, rate in rates.items()]


library_attention = functools.partial(F.scaled_dot_product_attention, is_causal=True)


def masked_candidates(q, k, v, prefix_k, prefix_v):
    """candidate_attention, the obvious way: a mask hides the other candidates."""
    C, T = q.shape[2], prefix_k.shape[2]
    seen = torch.cat((q.new_ones(C, T), torch.eye(C).to(q)), 1).bool()
    k, v = torch.cat((prefix_k, k), 2), torch.cat((prefix_v, v), 2)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen)


def attention_speed(device, dtype, sizes):
    """Fused attention and candidates, beside the library."""
    for B, heads, T, d in sizes["attention"]:
        x = torch.randn(B, T, 3, heads, d, device=device).to(dtype).requires_grad_()
        grad = torch.randn(B, heads, T, d, device=device).to(dtype)

        def both(attention):
            y = attention(*(part.transpose(1, 2) for part in x.unbind(2)))
            torch.autograd.grad(y, x, grad)

        yield from compared(device, f"attention {B, heads, T, d}", "calls/s", {
            "fused": (1, lambda: both(anyorder.fused_attention)),
            "library": (1, lambda: both(library_attention))})
    B, heads, T, C, d = sizes["candidates"]
    inputs = [*torch.randn(3, B, heads, C, d, device=device).to(dtype),
              *torch.randn(2, B, heads, T, d, device=device).to(dtype)]
    with torch.inference_mode():
        yield from compared(device, f"candidates {B, heads, T, C, d}", "calls/s", {
            "ours": (1, lambda: anyorder.candidate_attention(*inputs)),
            "masked": (1, lambda: masked_candidates(*inputs))})


def model_speed(device, dtype, sizes):
    """A training step, order inference and drawing, of an untrained model."""
    config = {"rows": sizes["side"], "cols": sizes["side"], "codebook": 512, "words": ["a"],
              "width": sizes["width"], "layers": sizes["layers"], "caption_length": 8}
    model = anyorder.AnyOrder({**config, "order_head": False}).to(device)
    headed = anyorder.AnyOrder({**config, "order_head": True}).to(device).eval()
    N = model.N

    def inputs(B):
        tokens = torch.randint(512, (B, N), device=device)
        return tokens, model.read(["a"] * B), anyorder.random_order(B, N).to(device)

    batch, optimizers = inputs(sizes["train"]), anyorder.make_optimizers(model, 1e-3, dtype)

    def step():
        with autocast(device, dtype):
            loss = model(*batch)[0].mean()
        update(loss, model, optimizers, 1e-3, 0)

    done = batch[0].numel()
    library_step = mock.patch("anyorder.fused_attention", library_attention)(step)
    yield from compared(device, "training step", "tokens/s", {
        "fused attention": (done, step), "library's attention": (done, library_step)})

    batch = inputs(sizes["infer"])
    tried = N * (N + 1) / 2  # candidates per image
    with autocast(device, dtype), torch.inference_mode():
        rows = compared(device, "order inference", "tokens/s", {
            "forward pass": (len(batch[0]) * (8 + N), lambda: model.logits(*batch)),
            "candidates": (len(batch[0]) * tried, lambda: infer_orders(model, *batch[:2]))})
    yield from rows
    yield {"name": "orders", "rate": rows[1]["rate"] / tried, "unit": "images/s"}

    for B in DRAWN:
        ways = {f"{order}, {steps} steps":
                (B, functools.partial(generate, headed, [""] * B, order, steps=steps))
                for order in ("raster", "learned", "inferred") for steps in (N, N // 4)}
        yield from compared(device, f"drawing {B}", "images/s", ways)


def memory_use(device, dtype, sizes):
    """Of attention, beside its inputs, its output and their gradients: counted, so no noise."""
    B, heads, T, d = LONG
    q, k, v, grad = torch.randn(4, B, heads, T, d, device=device).to(dtype)
    inputs = [x.requires_grad_() for x in (q, k, v)]
    # here, not above: torch may move what it calls private
    from torch.distributed._tools.mem_tracker import MemTracker
    with MemTracker() as memory:
        y = anyorder.fused_attention(*inputs)
        gradients = torch.autograd.grad(y, inputs, grad)
    peak = memory.get_tracker_snapshot("peak")[q.device]["Total"]
    extra = peak - sum(x.nbytes for x in (q, k, v, grad, y, *gradients))
    square = B * heads * T * T * q.element_size()
    for way, size in (("full square", square), ("fused", extra)):
        yield {"name": f"memory of attention {B, heads, T, d}: {way}", "rate": size / 1e6,
               "unit": "MB", "times": size / square}


def speed_table(device, out):
    """Prints all rows and writes out/speed.json. Needs about 20 GB of memory on a GPU."""
    writable(out)
    dtype, sizes = precision(device), SIZES.get(device.type, SIZES["cpu"])
    rows = []
    for part in (attention_speed, model_speed, memory_use):
        print(f"measuring: {part.__name__}", flush=True)
        rows += part(device, dtype, sizes)
    name = str(device)
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    report = {"command": command_line(*sys.argv), "device": name, "torch": torch.__version__,
              "threads": torch.get_num_threads(), "dtype": str(dtype)[6:], "rows": rows}
    write_json(report, out, "speed.json")
    print(table(rows, {"rate": ("", ",.4g"), "unit": ("", ""), "times": ("times first", ".2f")}))
    print("torch {torch}, {device}, {threads} threads, {dtype}".format(**report))


if __name__ == "__main__":
    run(main)
