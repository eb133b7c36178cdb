"""The idea: drawing is a loop of two questions: where next? and what is there?

    until all cells are drawn:
        cell   = argmax over free cells of where(cell | all that is drawn)
        token ~ p(x_cell | caption, all that is drawn, cell)

`where` is a fixed order (raster, random, class), a score of what the model would
draw (inferred), or the order head (learned).

`order_infer.visit` is this loop. `generate` gives it two functions: `choose`
answers the first question, `fill` the second. Given cells are visited first
and keep their content. So completing, editing and extending an image is the
same loop with a head start.

reads    a model (out/ordered.pt, anyorder.pt or raster.pt), out/tokenizer.pt
writes   out/samples/00000.png ..., and metadata.csv with their captions: a
         folder for --data. out/samples.png (the first 64), samples_order.png
         (dark first) and samples.gif (images draw themselves). --complete
         calls them completed or extended
run      python sample.py --caption "low red sun no clouds"     about 10 s
         python sample.py --complete a.png --mask right         its right half
         python sample.py --complete a.png --mask hat.png       where it is white
         python sample.py --complete a.png --mask 3x1           left and right of it
you see  squares in the GIF are free cells: bright ones are likely to come next
not here training, quality measures (evaluate.py)
"""

import csv
import itertools
import math
import os
import re
import textwrap

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

from anyorder import FIXED_ORDERS, Drawing, load_model, one_of
from data import (UserError, arguments, fingerprint, in_turn, join, number, one_line,
                  pick_device, printable, progress, read_image, replacing, run,
                  save_picture, seeded, sheet, square, to_float, to_uint8, writable)
from order_infer import (colour_map, grow, location_scores, specialised_orders, step_lengths,
                         steps_of, visit)
from tokenizer import load_tokenizer

ORDERS = (*FIXED_ORDERS, "inferred", "class", "learned")
BATCH = 32          # images drawn at once
SHEET = 64          # images on a sheet
SHOWN = 128         # pixels of an image's side on a sheet
MASKS = "left, right, top, bottom, center, random:0.5, 3x1 or an image file"


# -------------------------------------------------------------------------------------------------
# 1. Generate

@torch.inference_mode()
def generate(model, captions, order="inferred", score="confidence", distance=0.0,
             policy=None, steps=0, temperature=1.0, guidance=1.0, given=None, keep=None,
             generator=None, watch=None):
    """Draws an image for each of B captions: (tokens [B, N], order [B, N]), int64.

    order        one of ORDERS, or visit lists [B, N]
    score, distance     of an inferred order, see order_infer.location_scores
    policy       the model that chooses the cells of an inferred order, if not `model`
    steps        cells of one step do not see each other; 0 draws one cell a step
    temperature  divides the logits; 0 takes the likeliest token
    guidance     see Guided; 1 is none
    given, keep  tokens [B, N], bool [N]: kept cells come first and keep their content
    generator    dice, on the model's device
    watch        a list that gets (free cells [B, C], scores [B, C] in nats) at each step of
                 an inferred or learned order
    """
    device = model.hop.device
    if generator is None:
        generator = torch.Generator(device).manual_seed(0)
    cells = visit_list(model, captions, order, generator)  # [B, N]
    if keep is None:
        given, keep = torch.zeros_like(cells), torch.zeros(model.N).bool()
    tokens = given.to(cells, copy=True)
    keep = keep.to(device)
    drawing, chooser = drawings(model, policy, captions, order, guidance)
    choose = where_next(order, drawing, chooser, score, distance, watch)

    def fill(cell, logits):
        token = tokens.gather(1, cell)  # [B, n]
        if not keep[cell].all():
            # temperature 0 must not divide by it
            p = (logits.float() / max(temperature, 1e-9)).softmax(-1)  # [B, n, V]
            new = one_of(p.flatten(0, 1), generator).view(cell.shape)
            token = torch.where(keep[cell], token, new)
        tokens.scatter_(1, cell, token)
        if chooser is not drawing:
            # place takes positions in the list of cells that it looked at
            position = (chooser.cells[:, None] == cell[..., None]).int().argmax(2)  # [B, n]
            chooser.place(position, token)
        return token

    first = keep[cells]  # [B, N]
    if known_orders(model) == [order]:
        # Trained in one order, it never saw a later cell first: kept cells wait for their turn.
        first = torch.zeros_like(first)
    visited = []
    for part, how_many in ((first, 0), (~first, steps)):
        if part.any():
            free = cells[part].view(len(cells), -1)
            sizes = steps_of(free.shape[1], how_many)
            visited.append(visit(drawing, free, sizes, choose, fill))
    return tokens, torch.cat(visited, 1)


def visit_list(model, captions, order, generator):
    """All cells [B, N] in the sequence of the order, if that is known before drawing."""
    device = model.hop.device
    if isinstance(order, torch.Tensor):
        return order.to(device)
    check_order(model, "this model", order)
    if order == "class":
        ranks = (model.about[name] for name in ("caption_rank", "mean_rank"))
        return specialised_orders(captions, *ranks).to(device)
    if device.type != "cpu":  # FIXED_ORDERS take dice of the CPU
        seed = torch.randint(2 ** 31, (1,), generator=generator, device=device)
        generator = torch.Generator().manual_seed(seed.item())
    make = FIXED_ORDERS.get(order, FIXED_ORDERS["raster"])
    return make(len(captions), model.N, generator, model.config["cols"]).to(device)


def drawings(model, policy, captions, order, guidance):
    """A Drawing for the content, and one that chooses the cells. They may be the same."""
    words = model.read(captions)
    drawing = Drawing(model, words)
    if guidance != 1 and words.any():
        drawing = Guided(model, words, guidance)
        # The choice ignores guidance: an unguided Drawing of the same model makes it.
        policy = policy or model
    if policy is None or order != "inferred":
        return drawing, drawing
    return drawing, Drawing(policy, policy.read(captions))


def where_next(order, drawing, chooser, score, distance, watch):
    """The function `choose` of order_infer.visit."""
    lengths = step_lengths(drawing.model).to(drawing.model.hop.device)

    def choose(free):
        logits = None
        if order == "learned":
            value = drawing.next_location().gather(1, free).float().log_softmax(1)
        elif order == "inferred":
            logits = chooser.look(free)
            value = location_scores(logits, score, chooser.model.frequency)
            value = value - distance * lengths[chooser.cell, free]
        else:
            # a fixed order has no scores: with value = -position, its first cells come first
            return -torch.arange(free.shape[1], device=free.device).expand_as(free), None
        if watch is not None:
            watch.append((free.cpu(), value.cpu()))
        return value, logits if chooser is drawing else None

    return choose


class Guided:
    """A Drawing with classifier-free guidance (Ho and Salimans 2022). To its user it has
    B images. Inside there are 2 B: the second half has no caption.

        logits = without caption + guidance * (with caption - without caption)
    """

    def __init__(self, model, words, guidance):
        self.model = model
        self.guidance = guidance
        self.both = Drawing(model, torch.cat((words, torch.zeros_like(words))))

    def look(self, cells):
        captioned, plain = self.both.look(cells.repeat(2, 1)).float().chunk(2)
        return plain + self.guidance * (captioned - plain)

    def place(self, choice, token):
        self.both.place(choice.repeat(2, 1), token.repeat(2, 1))

    def next_location(self):
        return self.both.next_location().chunk(2)[0]


def known_orders(model):
    """The orders that this model can draw in. Trained in one order, it knows no other."""
    about = getattr(model, "about", {})
    known = [*FIXED_ORDERS, "inferred"]
    if "caption_rank" in about:
        known.append("class")
    if model.config["order_head"]:
        known.append("learned")
    elif about.get("order", "random") != "random":
        known = [about["order"]]
    return known


def check_order(model, path, order):
    """UserError for an order that the model of file `path` does not know."""
    known = known_orders(model)
    if order not in known:
        raise UserError(
            f"{printable(path)} knows {', '.join(known)} order only: choose one of them, or run "
            "python finetune.py for an order head (learned) and orders of captions (class)")


def order_settings(model, path, order, open_model):
    """The keyword arguments of `generate` for an order, with the score that the model of file
    `path` was finetuned for. frozen: inferred, by the model that finetuning began with."""
    policy = None
    if order == "frozen":
        order, policy = "inferred", frozen_policy(model, path, open_model)
    check_order(model, path, order)
    return {"order": order, "policy": policy, "score": model.about.get("score", "confidence"),
            "distance": model.about.get("distance", 0.0)}


def frozen_policy(model, path, open_model):
    """The any-order model that inferred the orders for finetuning: anyorder.pt beside the
    file `path` of the finetuned model. `open_model` loads it. UserError if it is another."""
    teacher = os.path.join(os.path.dirname(path), "anyorder.pt")
    policy = open_model(teacher)
    if fingerprint(policy.state_dict()) != model.about["made_from"].get("model"):
        raise UserError(f"{printable(path)} was not finetuned from {printable(teacher)}, "
                        "so it has no frozen order: choose another --order")
    return policy


# -------------------------------------------------------------------------------------------------
# 2. Complete and extend. A canvas of R x C cells may be larger than the model's grid.

def windows(shape, grid):
    """(top, left) of windows of `grid` cells that cover a canvas of `shape` cells, the
    central one first, then outwards. Neighbours overlap by half.
    windows((2, 4), (2, 2)) is [(0, 1), (0, 0), (0, 2)]."""
    middle, starts = [], []
    for whole, side in zip(shape, grid):
        center = (whole - side) // 2
        half = max(1, side // 2)
        middle.append(center)
        starts.append({0, *range(center % half, whole - side, half), whole - side})
    corners = itertools.product(*starts)
    return sorted(corners, key=lambda corner: (math.dist(corner, middle), corner))


def complete(model, captions, tokens, known, generator, **how):
    """Draws the unknown cells of a canvas, window by window; a window sees nothing outside.

    tokens [B, R * C] int64, known bool [R, C] -> tokens [B, R * C]; rank [B, R * C], -1 if
    the cell was known; for each rank (cells, scores), as `watch` of `generate` has them
    """
    grid = model.config["rows"], model.config["cols"]
    numbers = torch.arange(known.numel()).view(known.shape)
    known = known.flatten()
    tokens = tokens.clone()
    rank = torch.full(tokens.shape, -1)
    scores = []
    for top, left in windows(numbers.shape, grid):
        cells = numbers[top:top + grid[0], left:left + grid[1]].flatten()
        keep = known[cells]
        if keep.all():
            continue
        watch = []
        tokens[:, cells], order = generate(model, captions, given=tokens[:, cells], keep=keep,
                                           generator=generator, watch=watch, **how)
        order = order.cpu()
        drawn = cells[order[~keep[order]].view(len(order), -1)]  # [B, n]
        steps = torch.arange(drawn.shape[1]) + rank.max() + 1
        rank.scatter_(1, drawn, steps.expand_as(drawn))
        sizes = steps_of(drawn.shape[1], how.get("steps", 0))
        for n, (free, value) in zip(sizes, watch[int(keep.sum()):]):  # kept cells came first
            scores += [(cells[free], value)] * n
        known = known.index_fill(0, cells, True)
    return tokens, rank, scores


def spread(value, known, reach, least=1e-30):
    """The mean of value [B, 3, H, W] over the known pixels [H, W] around each pixel,
    weighted by exp(-(|dx| + |dy|) / reach). It fades to 0 where the known ones have less
    than the share `least` of all weights."""
    y, x = (torch.arange(n) for n in known.shape)
    down, across = ((-(i[:, None] - i).abs() / reach).softmax(1) for i in (y, x))
    share = down @ known.float() @ across.mT
    return down @ (value * known) @ across.mT / share.clamp_min(least)


def compose(drawn, picture, hidden, reach):
    """drawn float [B, 3, H, W], picture uint8 [3, H, W] -> uint8 [B, 3, H, W].

    Outside `hidden` [H, W] it is the picture, bit for bit. Inside it is the drawing; near
    the edge its colour is shifted to meet the picture.
    """
    # at a straight edge half of the weights are known: there the shift is full
    shift = spread(to_float(picture) - drawn, ~hidden, reach, least=0.5)
    return torch.where(hidden, to_uint8(drawn + shift), picture)


def open_canvas(image, mask, tokenizer, seed):
    """--complete and --mask -> picture uint8 [3, H, W]; hidden bool [H, W], True where to
    draw; tokens [R, C]. Without an image all is hidden."""
    size, rows, cols = tokenizer.config["size"], tokenizer.rows, tokenizer.cols
    if not image:
        picture = torch.full((3, size, size), 128).byte()
        return picture, torch.ones(size, size).bool(), torch.zeros(rows, cols).long()
    side = size // rows  # pixels of a cell
    wide = high = 1
    cells = named_mask(mask, rows, cols, seed)
    if re.fullmatch("[1-8]x[1-8]", mask):
        wide, high = int(mask[0]), int(mask[2])
        cells = torch.zeros(rows, cols).bool()
    picture, hidden = read_masked(image, mask if cells is None else "", size)
    if cells is not None:
        hidden = grow(cells, side)
    # the encoder must not see hidden pixels: it sees the ones around them instead
    value = to_float(picture)[None]
    value = torch.where(hidden, spread(value, ~hidden, side), value)
    tokens = tokenizer.encode(value.to(tokenizer.codebook.device)).view(rows, cols)
    # the image is in the middle of wide x high grids
    across, down = (wide - 1) * cols, (high - 1) * rows
    around = (across // 2, across - across // 2, down // 2, down - down // 2)
    pixels = [n * side for n in around]
    hidden = F.pad(hidden, pixels, value=True)
    return F.pad(picture, pixels, value=128), hidden, F.pad(tokens, around)


def named_mask(name, rows, cols, seed):
    """The cells [rows, cols] that --mask `name` hides; None if it is not a name. The middle
    row or column of an odd grid is in no half."""
    y, x = (torch.arange(1 - n, n, 2) / n for n in (rows, cols))  # -1 to 1, the middle is 0
    y, x = torch.meshgrid(y, x, indexing="ij")
    share = re.fullmatch(r"random:(0?\.\d+|[01])", name)
    if share:
        shuffled = torch.randperm(rows * cols, generator=seeded(seed, "mask"))
        return shuffled.view(rows, cols) < round(float(share[1]) * rows * cols)
    masks = {"left": x < 0, "right": x > 0, "top": y < 0, "bottom": y > 0,
             "center": torch.maximum(x.abs(), y.abs()) < 0.5}
    return masks.get(name)


def read_masked(path, mask, size):
    """The central squares of an image file and of a mask file ("": none), resized: uint8
    [3, size, size] and bool [size, size], True where the mask is white. A resized pixel is
    the mean of several that are not hidden. If most are hidden, so is the resized one."""
    picture = read_picture(path, "an image, such as a .png")
    height, width = picture.shape[1:]
    hidden = torch.zeros(height, width).bool()
    if mask:
        hidden = read_picture(mask, MASKS, over="black").float().mean(0) > 127
    if hidden.shape != (height, width):
        raise UserError(f"{printable(mask)} is {hidden.shape[1]}x{hidden.shape[0]}: "
                        f"give a mask of the image's size, {width}x{height}")
    if (height, width) != (size, size):
        print(f"warning: {printable(path)} is {width}x{height}: its central square is resized "
              f"to {size}x{size}")

    def fit(channels):
        squares = [square(Image.fromarray(x.numpy()), size) for x in channels.float()]
        return torch.from_numpy(np.stack(squares))

    share = fit(~hidden[None])  # of each pixel that is seen
    mean = fit(picture * ~hidden) / share.clamp_min(0.5)
    picture = torch.where(share < 0.5, fit(picture), mean)
    return picture.round().clamp(0, 255).byte(), share[0] < 0.5


def read_picture(path, expected, over="white"):
    """An image file in its own size: uint8 [3, H, W], transparent parts over a colour."""
    try:
        return read_image(path, over=over)
    except Exception as error:  # decoders raise nearly everything
        raise UserError(f"{printable(path)} cannot be read ({printable(error)[:80]}): "
                        f"expected {expected}") from None


# -------------------------------------------------------------------------------------------------
# 3. Files, pictures and flags (skip this on a first reading)

def read_captions(texts):
    """--caption as a list. A name that ends in .txt stands for the lines of that file."""
    captions = []
    for text in texts:
        if text.lower().endswith(".txt"):
            with open(text, encoding="utf-8-sig", errors="replace") as file:
                captions += filter(None, map(one_line, file))
        else:
            captions.append(one_line(text))
    return captions


def fresh_folder(folder, captions):
    """Removes the images that an earlier run wrote to this folder, and no other files.
    Writes metadata.csv with a row for each image to come."""
    writable(folder)
    for name in os.listdir(folder):
        if re.fullmatch(r"\d{5,}\.png", name):
            os.remove(os.path.join(folder, name))
    path = os.path.join(folder, "metadata.csv")
    with open(path, "w", newline="", encoding="utf-8") as file:
        names = (f"{i:05d}.png" for i in range(len(captions)))
        csv.writer(file).writerows((("file_name", "text"), *zip(names, captions)))


def page(path, images, labels, columns, scale):
    """Writes a sheet of images uint8 [n, 3, H, W], each with a label of three lines at most.
    For letters that the font lacks, the number in a label leads to metadata.csv."""
    height, width = images.shape[2] * scale, images.shape[3] * scale
    letters = max(8, width // 6)  # in a line
    labels = [textwrap.fill(text, letters, max_lines=3, placeholder=" ...") for text in labels]
    gap = 19 + 15 * max(label.count("\n") for label in labels)
    picture = sheet(images, columns, scale, gap)
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default(12)
    for i, label in enumerate(labels):
        left = gap + i % columns * (width + gap)
        bottom = (i // columns + 1) * (height + gap)
        pen.text((left, bottom), label, "black", font, spacing=2)
    save_picture(path, picture)


def thinking(images, rank, scores, step, scale):
    """uint8 images [n, 3, H, W] after `step` steps, enlarged; rank [n, R, C], -1 where given.
    Free cells are squares: from dark, the lowest score in the image, to bright, the highest."""
    n, R, C = rank.shape
    colour = torch.full((n, 3, R * C), 150, dtype=torch.uint8)  # grey: no scores
    if step < len(scores):
        cells, value = (x[:n] for x in scores[step])  # [n, c]
        low, high = (x[:, None] for x in value.aminmax(dim=1))
        shade = colour_map(1 - (high - value) / (high - low).clamp_min(1e-9)).mT  # [n, 3, c]
        colour.scatter_(2, cells[:, None].expand_as(shade), shade)
    side = scale * images.shape[2] // R  # pixels of a cell
    gap = side // 6
    inside = F.pad(torch.ones(side - 2 * gap, side - 2 * gap).byte(), [gap] * 4)
    squares = grow(colour.view(n, 3, R, C), side) * inside.repeat(R, C)
    return torch.where(grow(rank[:, None] < step, side), grow(images, scale), squares)


def film(path, images, maps, rank, scores, scale):
    """Writes a GIF of six seconds: images uint8 [n, 3, H, W] draw themselves, and below each
    grows the map of its order, of the same shape."""
    cells = int(rank.max()) + 1
    side = images.shape[2] // rank.shape[1]  # pixels of a cell
    frames = []
    for step in sorted({round(i * cells / 64) for i in range(65)}):
        drawn = grow(rank[:, None] < step, side)
        order = grow(torch.where(drawn, maps, 225), scale)
        pictures = thinking(images, rank, scores, step, scale)
        frames.append(sheet(torch.cat((pictures, order)), len(images)))
    times = [4000 // len(frames)] * (len(frames) - 1) + [2000]  # milliseconds
    with replacing(path) as file:
        frames[0].save(file, "GIF", save_all=True, append_images=frames[1:], loop=0,
                       duration=times)


def show(stem, picture, hidden, images, captions, rank, scores):
    """Writes the sheets and the GIF of images uint8 [n, 3, H, W] with rank [n, R, C]."""
    height, width = hidden.shape
    scale = max(1, SHOWN // min(height, width))
    columns = min(8, max(1, 8 * height // width))
    maps = grow(colour_map(rank / max(1, int(rank.max()))).permute(0, 3, 1, 2),
                height // rank.shape[1])
    maps = torch.where(hidden, maps, 225)  # grey: was given
    film(stem + ".gif", images[:columns], maps[:columns], rank[:columns], scores, scale)
    labels = [f"{i:05d} {caption}" for i, caption in enumerate(captions[:len(images)])]
    page(stem + "_order.png", maps, labels, columns, scale)
    if not hidden.all():
        given = torch.where(hidden, 128, picture)
        images = torch.cat((picture[None], given[None], images))
        labels, columns = ["original", "given", *labels], columns + 2
    page(stem + ".png", images, labels, columns, scale)


def parse():
    """The flags of the command line."""
    parser = arguments(__doc__, flags=("out", "seed", "device"))
    parser.add_argument("--model", default="",
                        help="a .pt file (default: OUT/ordered.pt, anyorder.pt or raster.pt)")
    parser.add_argument("--order", choices=(*ORDERS, "frozen"),
                        help="default: learned after finetune.py, else inferred or as trained; "
                             "frozen: inferred by the model that finetuning began with")
    parser.add_argument("--caption", nargs="+", default=[],
                        help='captions, or .txt files with one a line; "" is none')
    parser.add_argument("--n", type=number(int, 1), default=8, help="images of each caption")
    parser.add_argument("--steps", type=number(int, 0), default=0,
                        help="draw in this many steps, several cells in each (0: one by one)")
    parser.add_argument("--temperature", type=number(float, 0, 100), default=1.0,
                        help="below 1 plays safe, 0 takes the likeliest token")
    parser.add_argument("--guidance", type=number(float, 0, 100), default=1.5,
                        help="how closely to follow the caption (1: no guidance)")
    parser.add_argument("--complete", metavar="IMAGE", default="",
                        help="draw anew what --mask hides of this image")
    parser.add_argument("--mask", default="", help=f"{MASKS} (white is hidden); "
                        "3x1 is a canvas of three images, this one in its middle")
    args = parser.parse_args()
    if bool(args.complete) != bool(args.mask):
        raise UserError("--complete IMAGE needs --mask PART, and --mask needs --complete")
    return args


def open_files(args, device):
    """(path of the model, model, tokenizer)"""
    names = ("ordered", "anyorder", "raster")
    paths = [os.path.join(args.out, name + ".pt") for name in names]
    path = args.model or next(filter(os.path.exists, paths), paths[1])
    model = load_model(path, device)
    tokenizer = load_tokenizer(os.path.join(args.out, "tokenizer.pt"), device)
    if tokenizer.fingerprint != model.about["made_from"]["tokenizer"]:
        raise UserError(f"{printable(path)} is for another tokenizer than {printable(args.out)}"
                        "/tokenizer.pt: give the --out that it was made in")
    return path, model, tokenizer


def settings(args, path, model):
    """(name of the order, keyword arguments of generate)"""
    trained = model.about["order"]
    sensible = {"random": "inferred", "inferred": "learned"}
    name = args.order or sensible.get(trained, trained)
    how = order_settings(model, path, name, lambda file: load_model(file, model.hop.device))
    return name, {**how, "steps": args.steps, "temperature": args.temperature,
                  "guidance": args.guidance}


def captions_of(args, model):
    """The caption of each image to draw."""
    captions = read_captions(args.caption)
    model.check_words(captions)
    if captions or args.complete:
        return [caption for caption in captions or [""] for _ in range(args.n)]
    known = model.about["captions"]
    shuffled = torch.randperm(len(known), generator=seeded(args.seed)).tolist()
    return [known[i] for i in itertools.islice(itertools.cycle(shuffled), args.n)]


def main():
    args = parse()
    device = pick_device(args.device)
    process, world = join(device)
    path, model, tokenizer = open_files(args, device)
    order, how = settings(args, path, model)
    captions = captions_of(args, model)
    picture, hidden, tokens = open_canvas(args.complete, args.mask, tokenizer, args.seed)
    R, C = tokens.shape
    side = len(hidden) // R  # pixels of a cell
    # cells that are hidden in part are drawn
    known = ~hidden.view(R, side, C, side).any(3).any(1)
    name = "samples"
    if args.complete:
        name = "extended" if R * C > model.N else "completed"
    stem = os.path.join(args.out, name)
    if process == 0:
        fresh_folder(stem, captions)
    in_turn([])  # the others wait for process 0

    shown = []
    bar = progress(len(captions), "drawing", "image")
    for i in range(process * BATCH, len(captions), world * BATCH):
        asked = captions[i:i + BATCH]
        # the dice depend on the batch alone, so not on the number of processes
        dice = seeded(args.seed, "draw", i, device=device)
        start = tokens.flatten().repeat(len(asked), 1).to(device)
        drawn, rank, scores = complete(model, asked, start, known, dice, **how)
        # the decoder is convolutional: it takes a canvas of any size
        images = tokenizer.pixels(tokenizer.codebook[drawn.view(-1, R, C)]).clamp(-1, 1)
        images = compose(images.cpu(), picture, hidden, side / 2)
        for k, image in enumerate(images, i):
            save_picture(os.path.join(stem, f"{k:05d}.png"), sheet([image], 1, gap=0))
        if i < SHEET:  # no more is kept: memory does not grow with --n
            shown.append((images, rank.view(-1, R, C), scores))
        bar.update(len(asked) * world)
    bar.close()
    shown = in_turn(shown)
    if process:
        return
    images, rank, scores = zip(*shown)
    show(stem, picture, hidden, torch.cat(images), captions, torch.cat(rank), scores[0])
    stem = printable(stem)
    print(f"drew in {order} order by {printable(path)}: {stem}.png, {stem}_order.png (dark "
          f"first), {stem}.gif\nall {len(captions):,} images, with metadata.csv: {stem}/")


if __name__ == "__main__":
    run(main)
