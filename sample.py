"""The idea: drawing is a loop of two questions, where next? and what is there?

    until all cells are drawn:
        cell  ~ where      raster | random | a given order | inferred (every free cell is tried) | learned (order head)
                           | frozen (inferred, but by the any-order model: the policy that finetuning began with)
        token ~ p(x_cell | caption, what was drawn, cell)

All models and all orders go through this one loop (`generate`); only the first line differs. Cells whose content is
given are asked for first and keep it: completing, editing and extending an image is the same loop with a head start.
Pixels outside the mask come back bit for bit: the kept pixels are laid on top of the decoded cells, and the seam is
hidden inside the mask only (`compose`). What lies under the mask is never read.

reads    a model (out/ordered.pt, out/anyorder.pt or out/raster.pt) and out/tokenizer.pt
writes   out/samples.png (or completed, extended), the same with _order (dark first, grey was given), and a .gif: images
         draw themselves; small squares are free cells, the brighter the sooner, and the framed one comes next
run      python sample.py --caption "low red sun on the left two clouds"    8 s; with --why 20 a still of step 20
         python sample.py --complete photo.png --mask right                 eight ways to go on
         python sample.py --complete photo.png --mask hat.png --caption sun a sun where hat.png is white
         python sample.py --complete photo.png --extend 3x1                 what is left and right of it
         python sample.py --likelihood photo.png                            its nats per token in three orders
         python sample.py --n 1000 --each out/images                        each also as a file of its own
not here training, quality figures (evaluate.py)
"""

import csv
import io
import math
import os
import re
import textwrap

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from anyorder import Drawing, in_turn, join, load_model, one_of, random_order, rank_of, raster_order
from data import (UserError, arguments, fingerprint, one_line, pick_device, printable, read_image, replacing, run,
                  save_picture, sheet, square, to_float, to_uint8, words_of)
from order_infer import (best_apart, colour_map, crowding, infer_orders, location_scores, order_maps, step_lengths,
                         steps_of, without)
from tokenizer import load_tokenizer, seeded

ORDERS = ("raster", "random", "inferred", "class", "learned", "sampled")
TILE = 128          # pixels: an image of the trained size is shown about so large
BATCH = 32          # images drawn at once


def filtered(logits, temperature=1.0, top_k=0, top_p=1.0):
    """logits [B, V] -> probabilities [B, V]: temperature (0 is argmax, as is what would make logits infinite), then the
    top_k likeliest tokens (0: all), then the fewest tokens whose probabilities reach top_p (nucleus sampling, Holtzman
    et al. 2020)."""
    if temperature < 1e-6:
        return torch.zeros_like(logits).scatter_(1, logits.argmax(1, keepdim=True), 1.0)
    if not top_k and top_p >= 1:                       # nothing to cut, nothing to sort
        return (logits.float() / temperature).softmax(-1)
    p, token = (logits.float() / temperature).softmax(-1).sort(-1, descending=True)
    cut = p.cumsum(-1) - p >= top_p                    # subtle: the token that crosses top_p stays
    if top_k:
        cut[:, top_k:] = True
    cut[:, 0] = False
    p = p.masked_fill(cut, 0)
    return torch.zeros_like(p).scatter_(1, token, p / p.sum(-1, keepdim=True))


def caption_orders(model, captions):
    """The specialised order of each caption: the mean rank of the orders inferred for its training images, [B, N]."""
    if "caption_rank" not in model.about:
        raise UserError("this model knows no order per caption: run python order_infer.py and python finetune.py first")
    rank = model.about["caption_rank"]
    known = {tuple(words_of(caption)): i for i, caption in enumerate(model.about["captions"])}
    asked = [known.get(tuple(words_of(caption))) for caption in captions]
    return torch.stack([rank.mean(0) if i is None else rank[i] for i in asked]).argsort(1)


def frozen_policy(model, path, open_model):
    """The any-order model from which the model of file `path` was finetuned: anyorder.pt beside it. It has inferred the
    orders that this one was finetuned on, and goes on choosing them as it did then. UserError where it is another.
    `open_model` loads a model file."""
    teacher = os.path.join(os.path.dirname(path), "anyorder.pt")
    policy = open_model(teacher)
    if fingerprint(policy.state_dict()) != model.about["made_from"].get("model"):
        raise UserError(f"{printable(path)} was not finetuned from {printable(teacher)}: it knows no frozen order, "
                        "choose another")
    return policy


@torch.inference_mode()
def generate(model, captions, order="inferred", score="confidence", distance=0.0, policy=None, parallel=0,
             temperature=1.0, top_k=0, top_p=1.0, guidance=1.0, given=None, keep=None, generator=None, watch=None):
    """Draws one image per caption: (tokens [B, N] int64, order [B, N] int64).

    captions   B strings
    order      "raster", "random", "inferred", "class", "learned" (the order head's likeliest cell), "sampled" (a cell
               by the head's probabilities), or a visit list [B, N]
    score, distance    how "inferred" chooses, see order_infer.location_scores
    policy     another model that chooses the inferred locations (say, the any-order model that the orders came from)
    parallel   draw in so many steps, several cells in each (0: one by one). Cells of one step do not see each other
    guidance   classifier-free guidance: logits = without + guidance * (with - without caption); 1 is none (Ho 2022).
               A pair (a, b) goes from a where no cell is drawn to b at the last, linearly in the share of drawn or
               kept cells
    given, keep        tokens [B, N] and bool [N]: kept cells are entered first, in the asked order, and never drawn. (A
               model of raster.pt has never seen a cell before the one to its left: it gets them in their turn)
    generator  of torch, on the model's device; makes it repeatable
    watch      a list that receives, for each cell, (free cells [B, C], their scores [B, C] in nats) where the order has
               scores: "inferred" those of location_scores, else the order head's log-probabilities
    """
    B, N, device = len(captions), model.N, model.hop.device
    generator = generator or torch.Generator(device).manual_seed(0)
    words = model.read(captions)
    first, last = guidance if isinstance(guidance, tuple) else (guidance, guidance)
    if (first, last) != (1, 1) and words.any():
        words = torch.cat((words, torch.zeros_like(words)))                # the second half has no caption
        if order == "inferred" and score != "likelihood":
            policy = policy or model                                       # so that only the told half tries every cell
    drawing, copies = Drawing(model, words), len(words) // B
    every = lambda x: x.expand(copies, *x.shape).flatten(0, 1)             # [B, n] for both halves: [2 B, n]
    chooser = Drawing(policy, policy.read(captions)) if policy is not None else None
    fixed, order = (order, "given") if isinstance(order, torch.Tensor) else (None, order)      # the visit list, if any
    if order not in (*ORDERS, "given"):
        raise UserError(f"order {order!r} is not known: choose one of {', '.join(ORDERS)}")
    headed = order in ("learned", "sampled")
    if headed and not model.config["order_head"]:
        raise UserError(f"this model has no order head, order {order!r} needs one: run python finetune.py first")
    fixed = (raster_order(B, N) if order == "raster" else
             torch.rand(B, N, generator=generator, device=device).argsort(1) if order == "random" else
             caption_orders(model, captions) if order == "class" else fixed)
    cells = (raster_order(B, N) if fixed is None else fixed).to(device)
    keep = torch.zeros(N, dtype=torch.bool) if keep is None else keep
    keep, head = keep.to(device), 0
    only_raster = getattr(model, "about", {}).get("order") == "raster" and not model.config["order_head"]
    if order != "raster" or not only_raster:
        cells = cells.gather(1, (~keep)[cells].int().argsort(dim=1, stable=True))          # kept ones first
        head = int(keep.sum())                                             # so many steps draw nothing new
    lengths, crowd = step_lengths(model).to(device), crowding(model).to(device)
    tokens = torch.zeros(B, N, dtype=torch.long, device=device) if given is None else given.clone().to(device)
    visited, k = [], 0
    for n in [1] * head + steps_of(N - head, parallel):
        if k in (0, head):
            pool = cells[:, :head] if k < head else cells[:, head:]        # [B, C], n cells fewer each step
        logits = content = None
        strength = first + (last - first) * k / max(1, N - 1)
        if headed:
            value = drawing.next_location()[:B].gather(1, pool).log_softmax(1)
        elif order == "inferred":                                          # try every cell of the pool
            if chooser is None or score == "likelihood":
                logits = drawing.look(every(pool))
            tried = logits if chooser is None else chooser.look(pool)
            if score == "likelihood":                                      # draw everywhere, keep the likeliest
                p = filtered(guided(logits, B, strength).flatten(0, 1), temperature, top_k, top_p)
                content = one_of(p, generator).view(pool.shape)
                content = content if k >= head else tokens.gather(1, pool)
            value = location_scores(tried[:B], score, model.frequency, content)
            value = value - distance * lengths[drawing.cell[:B, -1:], pool]
        else:                                                              # the earlier in the visit list, the better
            value = -torch.arange(pool.shape[1], device=device).expand(B, -1)
        if watch is not None and (headed or order == "inferred"):
            watch += [(pool.cpu(), value.float().cpu())] * n
        if order == "sampled":                                             # Gumbel noise makes the best one a fair draw
            value = value - torch.empty(value.shape, device=device).exponential_(generator=generator).log()
        choice = best_apart(value, pool, n, crowd)                         # [B, n]
        cell, at = pool.gather(1, choice), choice                          # [B, n]
        if logits is None:                                                 # the locations are known: look there only
            logits = drawing.look(every(cell), together=True)
            at = torch.arange(n, device=device).expand(B, n)
        at = every(at)
        if k < head:
            token = tokens.gather(1, cell)
        elif content is not None:
            token = content.gather(1, choice)
        else:
            here = guided(logits.gather(1, at[..., None].expand(-1, -1, model.V)), B, strength)        # [B, n, V]
            p = filtered(here.flatten(0, 1), temperature, top_k, top_p)
            token = one_of(p, generator).view(B, n)
        token = torch.where(keep[cell], tokens.gather(1, cell), token)
        tokens.scatter_(1, cell, token)
        drawing.place(at, every(token))
        if chooser is not None:
            chooser.place(choice, token)
        visited.append(cell)
        pool, k = without(pool, choice), k + n
    return tokens, torch.cat(visited, 1)


def guided(logits, B, guidance):
    """logits [B or 2B, C, V] -> [B, C, V]; the second half, where there is one, was asked without a caption."""
    if len(logits) == B:
        return logits
    told, free = logits.float().chunk(2)
    return free + guidance * (told - free)


def windows(shape, grid):
    """(top, left) of windows of `grid` cells that cover a canvas of `shape` cells, both (rows, cols): the central one
    first, then outwards. Neighbours overlap by half. windows((2, 4), (2, 2)) is [(0, 1), (0, 0), (0, 2)]."""
    middle = [(whole - side) // 2 for whole, side in zip(shape, grid)]
    starts = [{min(max(m + i * max(1, side // 2), 0), whole - side) for i in range(-whole, whole + 1)}
              for m, whole, side in zip(middle, shape, grid)]
    return sorted(((top, left) for top in starts[0] for left in starts[1]), key=lambda at: (math.dist(at, middle), at))


def fill(model, captions, tokens, known, generator, **how):
    """Draws the F unknown cells of a canvas, window by window: each is one `generate`, given what is known in it. A
    window sees nothing outside: what the model always saw at the bottom, it draws at the bottom of each window.

    tokens [B, R * C] int64, known bool [R, C] -> (tokens [B, R * C], order [B, F] of the cells that were drawn, and,
    where the order has scores, a list of (free cells of the window [B, c], their scores [B, c]), one for each step)
    """
    (R, C), rows, cols = known.shape, model.config["rows"], model.config["cols"]
    tokens, done, order, scores = tokens.clone(), known.flatten().clone(), [tokens[:, :0].cpu()], []
    for top, left in windows((R, C), (rows, cols)):
        cells = torch.arange(R * C).view(R, C)[top:top + rows, left:left + cols].flatten()
        given, watch = int(done[cells].sum()), []
        if given < len(cells):
            tokens[:, cells], visited = generate(model, captions, given=tokens[:, cells], keep=done[cells],
                                                 generator=generator, watch=watch, **how)
            order.append(cells[visited[~done[cells][visited.cpu()]].view(len(visited), -1).cpu()])
            scores += [(cells[pool], value) for pool, value in watch[given:]]
            done[cells] = True
    return tokens, torch.cat(order, 1), scores


def decode(tokenizer, tokens, shape):
    """tokens [B, R * C] -> images float [B, 3, H, W] in [-1, 1] on the CPU. Each window is decoded by itself; where
    windows overlap they fade into each other."""
    (R, C), rows, cols, side = shape, tokenizer.rows, tokenizer.cols, tokenizer.config["size"] // tokenizer.rows
    total, weight = torch.zeros(len(tokens), 3, R * side, C * side), torch.zeros(R * side, C * side)
    up, across = (torch.minimum(i, i.flip(0)).float() for i in (torch.arange(1, n * side + 1) for n in (rows, cols)))
    for top, left in windows(shape, (rows, cols)):
        part = tokens.view(-1, R, C)[:, top:top + rows, left:left + cols].flatten(1)
        area = slice(top * side, (top + rows) * side), slice(left * side, (left + cols) * side)
        total[:, :, *area] += torch.cat([tokenizer.decode(t).cpu() for t in part.split(BATCH)]) * up[:, None] * across
        weight[area] += up[:, None] * across
    return total / weight


def spread(value, known, reach):
    """What the known pixels say about every pixel: the mean of `value` [B, 3, H, W] over `known` [H, W], with weights
    exp(-(|dx| + |dy|) / reach); and the share of the weight that is known [H, W] (about 1/2 along a straight edge)."""
    down, across = (torch.exp((torch.arange(n)[:, None] - torch.arange(n)).abs() / -reach) for n in known.shape)
    weight = down @ known.float() @ across
    return down @ (value * known) @ across / weight.clamp_min(1e-30), weight / (down.sum(1)[:, None] * across.sum(1))


def compose(drawn, picture, hidden, reach):
    """drawn float [B, 3, H, W], picture uint8 [3, H, W] -> uint8 [B, 3, H, W]: the picture where not `hidden` [H, W],
    bit for bit. Where hidden, the drawing, shifted in colour to meet the picture at the edge of the mask: by how much
    the two differ at the kept pixels nearby, fading by a factor e every `reach` pixels away from the edge."""
    shift, share = spread(to_float(picture) - drawn, ~hidden, reach)
    return torch.where(hidden, to_uint8(drawn + shift * (2 * share).clamp(max=1)), picture)


def read_picture(path, expected="an image, such as a .png", over="white"):
    """uint8 [3, H, W]: an image file as data.py reads it, in its own size; what is transparent lies over a colour."""
    try:
        return read_image(path, over=over)
    except Exception as error:                                                 # decoders raise nearly everything
        why = printable(getattr(error, "strerror", None) or str(error).split(" <")[0])[:80]
        raise UserError(f"{printable(path)} cannot be read ({why}): expected {expected}") from None


def read_mask(text, own, size, grid, seed):
    """--mask -> bool, True where an image of own = (height, width) pixels is to be drawn anew: [size, size] by names,
    as they mean cells of the grid, [height, width] from a file (black, and what is transparent, is kept)."""
    y, x = torch.meshgrid(*((torch.arange(n) + 0.5) / n for n in grid), indexing="ij")     # centres of the cells
    cells = {"left": x < 0.5, "right": x > 0.5, "top": y < 0.5, "bottom": y > 0.5,         # a middle cell is in no half
             "center": torch.maximum((x - 0.5).abs(), (y - 0.5).abs()) < 0.25, "": x < 0}.get(text)
    if text.startswith("random:"):
        share, _ = numbers("--mask random:", text[7:], 0, 1)
        cells = torch.randperm(x.numel(), generator=seeded(seed, "mask")).view(grid) < round(share * x.numel())
    if cells is not None:
        return grow(cells, size // grid[0])
    mask = read_picture(text, "an image, left, right, top, bottom, center or random:0.5", "black")
    if mask.shape[1:] != own:
        raise UserError(f"{printable(text)} is {mask.shape[2]}x{mask.shape[1]}, its image {own[1]}x{own[0]}: "
                        "give both the same size")
    return mask.float().mean(0) > 127


def resized(name, picture, size, mask=None):
    """The central square of a picture uint8 [3, H, W] and of a mask of read_mask -> ([3, size, size], bool [size,
    size]); warns if that resizes it. A resized pixel mixes several: where a mask [H, W] hides some of them, it is the
    mean of the others, and is hidden itself if they are less than half."""
    fit = lambda x: torch.from_numpy(np.array(square(Image.fromarray(x.numpy()), size)))
    own, small = picture.shape[1:], torch.stack([fit(channel) for channel in picture])
    if own == (size, size):
        return small, mask
    print(f"warning: {printable(name)} is {own[1]}x{own[0]}: its central square is resized to {size}x{size}")
    if mask is None or mask.shape == (size, size):
        return small, mask
    kept = (~mask).float()
    weight = fit(kept)
    mean = torch.stack([fit(channel) for channel in picture * kept]) / weight.clamp_min(0.5)
    mask = weight < 0.5
    return torch.where(mask, small, mean.round().clamp(0, 255).to(torch.uint8)), mask


def read_captions(texts):
    """--caption -> list of captions. A name that ends in .txt stands for the lines of that file."""
    captions = []
    for text in texts:
        if not text.lower().endswith(".txt"):
            captions.append(one_line(text))
            continue
        lines = []
        if os.path.isfile(text):                                               # a named pipe might never end
            with open(text, encoding="utf-8-sig", errors="replace") as file:
                lines = [one_line(line) for line in file if line.strip()]
        if not lines:
            raise UserError(f"--caption {printable(text)}: expected a file with one caption a line")
        captions += lines
    return captions


def numbers(flag, text, least, most, between=None):
    """(a, b) from the text "a<between>b", (a, a) from "a"; UserError unless both are numbers in least..most."""
    found = [float(part) if re.fullmatch(r"\d+\.?\d*|\.\d+", part, re.ASCII) else math.nan
             for part in text.split(between)]
    if len(found) not in (1, 2) or not all(least <= value <= most for value in found):
        raise UserError(f"{flag}{printable(text)}: not a number, or not in {least}..{most}")
    return found[0], found[-1]


def grow(value, times):
    """[..., R, C] -> [..., R * times, C * times] by repetition."""
    return value.repeat_interleave(times, -2).repeat_interleave(times, -1)


def page(path, tiles, labels, columns):
    """Writes a sheet of tiles [n, 3, H, W] uint8, each with its label below in at most three lines."""
    font, wide = ImageFont.load_default(12), max(8, tiles.shape[3] // 6)       # letters in a line
    labels = [textwrap.wrap(label.encode("latin-1", "replace").decode("latin-1"), wide, max_lines=3, placeholder=" ...")
              for label in labels]
    gap = 4 + 15 * max(map(len, labels))
    picture = sheet(tiles, columns, gap=gap)
    for i, lines in enumerate(labels):
        corner = gap + i % columns * (tiles.shape[3] + gap), (i // columns + 1) * (tiles.shape[2] + gap)
        ImageDraw.Draw(picture).multiline_text(corner, "\n".join(lines), "black", font, spacing=2)
    save_picture(path, picture)


def save_each(folder, images, captions):
    """Writes each image [3, H, W] uint8 as 00000.png, ..., and the captions as metadata.csv: --data for data.py."""
    names = [f"{i:05d}.png" for i in range(len(images))]
    for name, image in zip(names, images):
        save_picture(os.path.join(folder, name), sheet([image], 1, gap=0))
    text = io.StringIO()
    csv.writer(text).writerows([("file_name", "text"), *zip(names, captions)])
    with replacing(os.path.join(folder, "metadata.csv")) as file:
        file.write(text.getvalue().encode())


def thinking(images, hidden, rank, scores, step, scale):
    """uint8 images [n, 3, H, W] after `step` steps, enlarged. Free cells are squares, dark for the lowest score in
    their image to bright for the highest, grey without; the next is framed. rank [n, R, C] is below 0 where given."""
    colour = torch.full((len(rank), 3, *rank.shape[1:]), 150, dtype=torch.uint8)
    if 0 <= step < len(scores):
        cells, value = (part[:len(rank)] for part in scores[step])
        low, high = value.amin(1, keepdim=True), value.amax(1, keepdim=True)
        shade = colour_map(1 - (high - value) / (high - low).clamp_min(1e-9)).mT           # [n, 3, c]
        colour.flatten(2).scatter_(2, cells[:, None].expand_as(shade), shade)
    side = scale * images.shape[2] // rank.shape[1]                            # of a cell
    inside = (torch.arange(side) - (side - 1) / 2).abs() < 0.35 * side
    frame = torch.where(grow(rank[:, None] == step, side), torch.tensor([0, 220, 255]).view(3, 1, 1), 60)
    square = torch.where((inside[:, None] & inside).repeat(rank.shape[1:]), grow(colour, side), frame)
    drawn = grow(rank[:, None] < step, side) | ~grow(hidden, scale)
    return torch.where(drawn, grow(images, scale), square).to(torch.uint8)


def likelihood(model, tokenizer, path, captions, out, seed, how):
    """Prints the nats per token of an image file in raster, random and inferred order, and draws where they are."""
    N, (rows, cols), size = model.N, (model.config["rows"], model.config["cols"]), tokenizer.config["size"]
    picture, tiles, labels = resized(path, read_picture(path), size)[0], [], []
    tokens = tokenizer.encode(to_float(picture)[None].to(model.hop.device))
    for caption in captions:
        print(f"nats per token, caption {caption!r} (who knows nothing has ln({model.V}) = {math.log(model.V):.3f})")
        tiles += [picture[None], to_uint8(tokenizer.decode(tokens)).cpu()]
        labels += [caption or "original", "as tokens"]
        orders = {"raster": raster_order(1, N), "random": random_order(16, N, seeded(seed, "likelihood")),
                  "inferred": infer_orders(model, tokens, [caption], how["score"], how["distance"])}
        for name, order in orders.items():
            order = order.to(tokens.device)
            by_step = -model.log_probs(tokens.expand_as(order), [caption] * len(order), order)         # [orders, N]
            nats = torch.empty_like(by_step).scatter_(1, order, by_step).cpu()                         # by cell
            print(f"  {name:8s} {nats.mean():.3f}" + f" +- {nats.mean(1).std(correction=0):.3f}" * (name == "random"))
            tiles.append(order_maps(nats.mean(0, keepdim=True) / math.log(model.V) * (N - 1), rows, cols, size))
            labels.append(f"{name}: {nats.mean():.3f} nats per token")
        tiles.append(order_maps(rank_of(orders["inferred"]), rows, cols, size))
        labels.append("inferred order, dark first")
    page(f"{out}/likelihood.png", grow(torch.cat(tiles), max(1, TILE // size)), labels, 6)
    print(f"{out}/likelihood.png: in which cells they are (dark 0, bright ln({model.V}) or more)")


def main():
    parser = arguments(__doc__, flags=("out", "seed", "device"))
    parser.add_argument("--model", default="", help="a .pt (default: OUT/ordered.pt, anyorder.pt or raster.pt)")
    parser.add_argument("--order", choices=(*ORDERS, "frozen"), default=None,
                        help="default: learned once finetune.py has taught a head, inferred for an any-order model, "
                             "else what the model was trained in")
    parser.add_argument("--caption", nargs="+", default=[], help='captions, or .txt files with one a line; "" is none')
    parser.add_argument("--n", type=int, default=8, help="images (of each --caption), at most 10,000 in all")
    parser.add_argument("--temperature", type=float, default=1.0, help="below 1 plays safe, 0 takes the likeliest")
    parser.add_argument("--parallel", metavar="S", type=int, default=0, help="draw in S steps, several cells at once")
    parser.add_argument("--top-p", type=float, default=1.0, help="draw among the likeliest tokens that make up P")
    parser.add_argument("--guidance", default="1.5", help="towards the caption (1: none); 0:3 goes from 0 to 3")
    parser.add_argument("--complete", metavar="IMAGE", default="", help="draw anew what --mask has white")
    parser.add_argument("--mask", default="", help="left, right, top, bottom, center, random:0.5 or a file")
    parser.add_argument("--extend", metavar="WxH", default="", help="canvas in grids, IMAGE in its middle: 2x or 3x1")
    parser.add_argument("--each", metavar="FOLDER", default="",
                        help="also each image as a file of its own, and metadata.csv with the captions")
    parser.add_argument("--animate", metavar="SECONDS", type=float, default=4, help="of the GIF (0: none)")
    parser.add_argument("--why", metavar="K", type=int, default=0,
                        help="also a still before the K-th cell is drawn, with all scores")
    parser.add_argument("--likelihood", metavar="IMAGE", default=None,
                        help="draw nothing, but tell the nats per token of this image, with --model and --caption")
    args = parser.parse_args()
    if not (0 < args.n <= 10_000 and args.parallel >= 0 and 0 < args.top_p <= 1 and 0 <= args.temperature <= 100
            and 0 <= args.animate <= 600):
        raise UserError(f"--n {args.n} --parallel {args.parallel} --top-p {args.top_p} "
                        f"--temperature {args.temperature} --animate {args.animate}: expected n from 1 to 10,000, "
                        "top-p in (0, 1], temperature up to 100, animate up to 600, none negative")
    if args.mask and not args.complete or args.complete and not args.mask + args.extend:
        raise UserError("--complete needs --mask (the part to draw) or --extend (how far), and --mask needs --complete")
    if args.likelihood is not None and (args.complete or args.extend or args.why or args.each):
        raise UserError("--likelihood draws nothing: leave out --complete, --mask, --extend, --why and --each")
    if args.each and os.path.exists(args.each) and not (os.path.isdir(args.each) and not os.listdir(args.each)):
        raise UserError(f"--each {printable(args.each)} is not an empty folder: nothing is overwritten, give a new one")
    guidance = numbers("--guidance ", args.guidance, 0, 100, ":")
    wide, high = numbers("--extend ", args.extend.removesuffix("x"), 1, 8, "x") if args.extend else (1, 1)
    device = pick_device(args.device)
    process, world = join(device)
    paths = [os.path.join(args.out, name + ".pt") for name in ("ordered", "anyorder", "raster")]
    path = args.model or next(filter(os.path.exists, paths), paths[0])
    model = load_model(path, device)
    tokenizer = load_tokenizer(os.path.join(args.out, "tokenizer.pt"), device)
    if tokenizer.fingerprint != model.about["made_from"]["tokenizer"]:
        raise UserError(f"{path} is for another tokenizer than {args.out}/tokenizer.pt: run python anyorder.py again")
    order = args.order or {"random": "inferred", "inferred": "learned"}.get(model.about["order"], model.about["order"])
    policy = frozen_policy(model, path, lambda file: load_model(file, device)) if order == "frozen" else None
    how = dict(order="inferred" if policy else order, policy=policy,
               score=model.about.get("score", "confidence"), distance=model.about.get("distance", 0.0),
               temperature=args.temperature, top_p=args.top_p, parallel=args.parallel, guidance=guidance)
    grid, size = (model.config["rows"], model.config["cols"]), tokenizer.config["size"]
    side, scale = size // grid[0], max(1, TILE // size)
    captions = read_captions(args.caption)
    model.check_words(captions)
    if args.n * len(captions) > 10_000:
        raise UserError(f"--n {args.n} images of {len(captions):,} captions: expected at most 10,000 in all")
    if args.likelihood is not None and process:
        return None                                                            # one image is not worth sharing
    if args.likelihood is not None:
        return likelihood(model, tokenizer, args.likelihood, captions or [""], args.out, args.seed, how)

    # a canvas of R x C cells with the image, where there is one, in its middle
    R, C = round(grid[0] * high), round(grid[1] * wide)
    canvas = torch.full((3, R * side, C * side), 128, dtype=torch.uint8)
    hidden, tokens = torch.ones(R * side, C * side).bool(), torch.zeros(R, C, dtype=torch.long, device=device)
    if args.complete:
        picture = read_picture(args.complete)
        mask = read_mask(args.mask, picture.shape[1:], size, grid, args.seed)
        picture, mask = resized(args.complete, picture, size, mask)
        seen = torch.where(mask, spread(to_float(picture), ~mask, side)[0], to_float(picture))     # hides the rest
        top, left = (R - grid[0]) // 2, (C - grid[1]) // 2
        tokens[top:top + grid[0], left:left + grid[1]] = tokenizer.encode(seen[None].to(device)).view(grid)
        area = slice(top * side, top * side + size), slice(left * side, left * side + size)
        canvas[:, *area], hidden[area] = picture, mask
    known = ~hidden.view(R, side, C, side).any(3).any(1)                       # cells hidden in part are drawn
    F = int((~known).sum())
    if args.why and how["order"] not in ("inferred", "learned", "sampled"):
        raise UserError(f"--why {args.why}: {order} order has no scores, choose inferred, frozen, learned or sampled")
    if not 0 <= args.why <= F:
        raise UserError(f"--why {args.why}: {F} cells are to be drawn, expected 1 to {F}, or 0 for none")
    captions = [caption for caption in captions or [""] for _ in range(args.n)]
    if not args.caption and not args.complete:
        every = model.about["captions"]
        shuffled = torch.randperm(max(args.n, len(every)), generator=seeded(args.seed)).tolist()
        captions = [every[i % len(every)] for i in shuffled[:args.n]]

    drawn = []
    for i in range(process * BATCH, len(captions), world * BATCH):             # each batch has dice of its own: whoever
        asked = captions[i:i + BATCH]                                          # draws it, it comes out the same
        generator = seeded(args.seed, "draw", i, device=device)
        found, visited, watched = fill(model, asked, tokens.flatten().repeat(len(asked), 1), known, generator, **how)
        drawn.append((decode(tokenizer, found, (R, C)), visited, [] if i else watched))
    drawn, orders, (scores, *_) = zip(*in_turn(drawn))                         # only the first few images show scores
    if process:
        return
    images = compose(torch.cat(drawn), canvas, hidden, side / 2)
    rank = torch.full((len(images), R * C), -1).scatter_(1, torch.cat(orders), torch.arange(F).expand(len(images), F))

    stem = os.path.join(args.out, "extended" if args.extend else "completed" if args.complete else "samples")
    columns = lambda n: max(1, n * size // (C * side))                         # n images, fewer if they are larger
    maps = torch.where(hidden, order_maps(rank * (R * C - 1) / max(1, F - 1), R, C, R * side), 225)
    page(stem + "_order.png", grow(maps, scale), captions, columns(8))
    tiles, labels, rank, across = grow(images, scale), captions, rank.view(-1, R, C), columns(8)
    if args.complete:                                                          # step -1: no cell is framed
        given = thinking(canvas[None], hidden, rank[:1], [], -1, scale)
        across = columns(args.n + 2 if args.n < 7 else (args.n + 3) // 2)
        rest = -(args.n + 2) % across                                          # each caption begins a row
        white = torch.full((rest, *tiles.shape[1:]), 255, dtype=torch.uint8)
        tiles = torch.cat([part for some in tiles.split(args.n)
                           for part in (grow(canvas[None], scale), given, some, white)])
        labels = [text for caption in captions[::args.n]
                  for text in ["original", "given"] + [caption] * args.n + [""] * rest]
    page(stem + ".png", tiles, labels, across)
    print(f"{len(images)} images in {order} order from {path}: {stem}.png, {stem}_order.png (dark first)"
          + f", {stem}.gif" * (args.animate > 0) + f", {stem}_why.png" * bool(args.why))
    if args.each:
        save_each(args.each, images, captions)
        print(f"{args.each}: {len(images)} images of {C * side}x{R * side} pixels, and metadata.csv")
    across, few = columns(4), (images[:2 * columns(4)], hidden, rank[:2 * columns(4)], scores)
    if args.animate:
        frames = [sheet(thinking(*few, step, scale), across) for step in sorted({round(i * F / 64) for i in range(65)})]
        with replacing(stem + ".gif") as file:
            frames[0].save(file, "GIF", save_all=True, append_images=frames[1:], loop=0,
                           duration=[round(1000 * args.animate / len(frames))] * (len(frames) - 1) + [2000])
    if args.why:
        labels = [f"from {v.min():.2f} (dark) to {v.max():.2f} nats" for v in scores[args.why - 1][1][:len(few[0])]]
        page(stem + "_why.png", thinking(*few, args.why - 1, scale), labels, across)


if __name__ == "__main__":
    run(main)
