"""The idea: a model that can draw any cell next can also tell which cell should come next.

For every free cell, ask what the model would draw there. Take the cell with the
best score, fill it, and ask again:

    o_k = argmax over free cells c of
              score(p(. | drawn so far, c)) - distance * |c - o_{k-1}| / diagonal

This takes N + (N - 1) + ... + 1 looks, about N^2 / 2 (arXiv 2504.17069). The
content of a training image is known (teacher forcing): only its order is
inferred.

*Why is the likelihood exact?* A score reads the distribution at a cell, never
its content. So images with the same past get the same next cell, and all images
form one tree: a node asks for a cell, a branch is a token, a leaf is an image.
The branches of a node sum to 1, so the leaves do: sum_k log p(x_{o_k} | past) is
log p(image). The score `likelihood` reads the content. Then each image takes the
branch that is likeliest for itself, and the sum is more than 1.

*Why do these orders cost more nats than random ones before finetuning?* Random
orders are what the model has trained on. A perfect model would pay the same for
every order: the chain rule. The number of known neighbours, summed over the
image, is also the same: each pair of neighbours counts once. Orders differ only
in how hard they are to learn. Raster order meets one pattern of known
neighbours again and again, inferred orders meet hundreds. finetune.py lets the
model learn these.

reads    out/anyorder.pt, out/tokens.pt, out/tokenizer.pt
writes   out/orders.pt, out/orders.png
run      python order_infer.py      4,512 images in 1 to 4 minutes, two idle cores
you see  the mean order, then images with their orders (dark first, bright last),
         each a quarter, half, three quarters drawn
not here drawing new images (sample.py), learning from the orders (finetune.py)
"""

import math
import os
import time

import torch

from anyorder import (Drawing, check_model, load_model, new_state, rank_of, read_captions,
                      split_rows)
from data import (Checkpoint, UserError, arguments, autocast, command_line, fingerprint, in_turn,
                  join, load, number, pick_device, printable, progress, run, save, save_picture,
                  seeded, sheet, to_uint8, writable)
from tokenizer import open_tokenizer, open_tokens

# --------------------------------------------------
# 1. Scores: where next?

SCORES = ("confidence", "margin", "entropy", "calibrated")


def location_scores(logits, score, frequency, content=None):
    """Which cell comes next? logits [B, C, V] of C candidates -> [B, C], the highest does.

    confidence  log max_v p(v): the surest cell first (the paper's score)
    margin      log of the first minus the second probability (arXiv 2502.06768)
    entropy     minus the entropy of p
    calibrated  log p(v) - log frequency(v) at the likeliest v: plain background, whose codes
                are frequent in the training set (frequency [V]), loses its head start
    likelihood  log p of `content` [B, C]: reads what it must not, for comparison only
    """
    log_p = logits.float().log_softmax(-1)
    if score == "confidence":
        return log_p.amax(-1)
    if score == "margin":
        first, second = log_p.topk(2, dim=-1).values.exp().unbind(-1)
        return (first - second).clamp_min(1e-12).log()
    if score == "entropy":
        return (log_p.exp() * log_p).sum(-1)
    if score == "calibrated":
        best, v = log_p.max(-1)
        return best - frequency.log()[v]
    if score == "likelihood":
        return log_p.gather(-1, content[..., None])[..., 0]
    raise UserError(f"score {score!r} is not known: choose one of {', '.join(SCORES)}")


def places(model):
    """[N, 2] float32: row and column of each cell."""
    rows, cols = model.config["rows"], model.config["cols"]
    return torch.cartesian_prod(torch.arange(rows), torch.arange(cols)).float()


def step_lengths(model):
    """[N + 1, N] distance between cells in grid diagonals; from nowhere (row N) it is 0."""
    place = places(model)
    diagonal = max(1.0, math.hypot(*place[-1].tolist()))
    return torch.cat((torch.cdist(place, place) / diagonal, torch.zeros(1, model.N)))


def crowding(model):
    """[N, N] penalty on cell b once cell a is chosen in this step.

    inf if b is a, 1e4 if they share an edge (all other cells come first), else 0.
    """
    place = places(model)
    away = (place[:, None] - place).abs().sum(-1)
    return (1e4 * (away == 1)).masked_fill(away == 0, math.inf)


# --------------------------------------------------
# 2. The loop behind every order

def visit(drawing, free, counts, choose, fill):
    """The loop behind every order: draws the cells free [B, C], counts[i] of them in step i.

    choose(free) -> (value, logits)       where next? value [B, C]: the highest comes first;
                                          logits [B, C, V] if it looked at all free cells,
                                          else None
    fill(cell, logits) -> token [B, n]    what is there? cell [B, n], logits [B, n, V]

    Returns the order [B, C]. The counts sum to C.
    """
    crowd = crowding(drawing.model).to(free.device)
    order = []
    for n in counts:
        value, logits = choose(free)
        choice = best_apart(value, free, n, crowd)  # [B, n] indices into free
        cell = free.gather(1, choice)  # [B, n]
        # place takes indices into the cells that were looked at: all free cells ...
        looked = choice
        if logits is None:
            # ... or only the chosen ones
            logits = drawing.look(cell)
            looked = torch.arange(n, device=free.device).expand_as(choice)
        logits = torch.take_along_dim(logits, looked[..., None], 1)  # [B, n, V]
        drawing.place(looked, fill(cell, logits))
        order.append(cell)
        free = without(free, choice)
    return torch.cat(order, 1)


def best_apart(value, cells, n, crowd):
    """Indices [B, n] of the n best of cells [B, C] by value [B, C], the best first.

    Cells of one step do not know each other. So each is the best of those that share no
    edge with the ones before it. If all do, it is the best of all.
    """
    value = value.float()
    choice = [value.argmax(1, keepdim=True)]
    while len(choice) < n:
        value = value - crowd[cells.gather(1, choice[-1]), cells]
        choice.append(value.argmax(1, keepdim=True))
    return torch.cat(choice, 1)


def without(cells, choice):
    """cells [B, C] less those at choice [B, n]: without([[4, 7, 9]], [[1]]) is [[4, 9]]."""
    left = torch.ones_like(cells, dtype=torch.bool).scatter_(1, choice, False)
    return cells[left].view(len(cells), cells.shape[1] - choice.shape[1])


def steps_of(cells, steps):
    """How many cells to draw in each step: steps_of(16, 4) is [3, 4, 4, 5]. 0: one each.

    After k steps the share (k / steps)^1.15 is drawn: fewer at first, when little is known
    (the exponent was found by trial). Sorting undoes the dips of rounding.
    """
    if not 0 < steps < cells:
        return [1] * cells
    drawn = [max(k, round(cells * (k / steps) ** 1.15)) for k in range(steps + 1)]
    return sorted(after - before for before, after in zip(drawn, drawn[1:]))


@torch.inference_mode()
def infer_orders(model, tokens, captions, score="confidence", distance=0.0, headed=False):
    """The order in which the model would draw these images: [B, N] int64.

    tokens [B, N] int64; captions: B strings, or word numbers [B, L]; score: see
    location_scores. distance, in nats per grid diagonal, pulls the next cell towards the
    last one. headed: the order head chooses, at one look per cell.
    """
    if headed and not model.config["order_head"]:
        raise UserError("this model has no order head that could choose: take one of finetune.py")
    words = model.read(captions) if isinstance(captions, (list, tuple)) else captions
    at_once = images_at_once(model)
    if len(tokens) > at_once:
        batches = zip(tokens.split(at_once), words.split(at_once))
        return torch.cat([infer_orders(model, *b, score, distance, headed) for b in batches])
    drawing = Drawing(model, words)
    lengths = step_lengths(model).to(tokens.device)

    def choose(free):
        if headed:
            return drawing.next_location().gather(1, free), None
        logits = drawing.look(free)
        value = location_scores(logits, score, model.frequency, tokens.gather(1, free))
        return value - distance * lengths[drawing.cell, free], logits

    def fill(cell, logits):
        return tokens.gather(1, cell)

    cells = torch.arange(model.N, device=tokens.device).repeat(len(tokens), 1)
    return visit(drawing, cells, steps_of(model.N, 0), choose, fill)


# --------------------------------------------------
# 3. The orders of a training set

def mean_ranks(order, captions):
    """The mean rank [N] of each cell over n training images, order [n, N]: a dict of those of
    each caption that two or more of them share, and that of all."""
    rank = rank_of(order).float()
    rows = {}
    for i, caption in enumerate(captions):
        rows.setdefault(caption, []).append(i)
    shared = {caption: rank[row].mean(0) for caption, row in rows.items() if len(row) > 1}
    return shared, rank.mean(0)


def specialised_orders(captions, caption_rank, mean_rank):
    """The cells of each caption by their mean rank, or by mean_rank: order [B, N]."""
    rank = torch.stack([caption_rank.get(caption, mean_rank) for caption in captions])
    return rank.argsort(dim=1, stable=True)


def load_orders(out, data):
    """out/orders.pt, checked to be of the tokens `data`.

    order [m, N] int64: training images, then those to check on.
    index [m]: their rows of tokens.pt. caption_rank, mean_rank: see mean_ranks.
    """
    path = os.path.join(out, "orders.pt")
    again = command_line("order_infer.py", "--out", out)
    file = load(path, "orders", again)
    if file["made_from"]["tokens"] != data["fingerprint"]:
        raise UserError(f"{printable(path)} was made from another tokens.pt: run {again}")
    return {**file, "order": file["order"].long()}


def rank_correlation(a, b):
    """Spearman's rho of ranks [B, N], mean over B: 1 same order, 0 unrelated, -1 reversed.
    For [0, 1, 2] and [0, 2, 1]: 1 - 6 * (0 + 1 + 1) / (3 * 8) = 0.5."""
    N = a.shape[1]
    # some devices have no float64
    squares = (a - b).cpu().double().square().sum(1)
    return (1 - 6 * squares / (N * (N * N - 1))).mean().item()


# --------------------------------------------------
# 4. Pictures, batches, main (skip this on a first reading)

def colour_map(value):
    """value [...] in 0..1 -> uint8 RGB [..., 3]: dark blue (first), red, bright yellow (last)."""
    stops = torch.tensor([[13., 8, 80], [126, 3, 168], [204, 71, 120], [248, 149, 64],
                          [240, 249, 33]])
    place = value.float().clamp(0, 1) * 4
    low = place.long().clamp_max(3)
    return torch.lerp(stops[low], stops[low + 1], (place - low)[..., None]).round().byte()


def grow(value, times):
    """[..., H, W] -> [..., H * times, W * times] by repetition."""
    return value.repeat_interleave(times, -2).repeat_interleave(times, -1)


def order_maps(rank, rows, cols, size):
    """rank [n, N], which may be means -> uint8 pictures [n, 3, size, size * cols / rows]."""
    colour = colour_map(rank.cpu() / max(1, rows * cols - 1)).view(-1, rows, cols, 3)
    return grow(colour.permute(0, 3, 1, 2), max(1, size // rows))


def picture(images, rank, mean_rank, rows, cols):
    """The mean order, then images [n, 3, H, W]: each with its order of rank [n, N], then a
    quarter, half, three quarters drawn."""
    images = torch.cat((torch.full_like(images[:1], 255), images))
    rank = torch.cat((mean_rank.argsort().argsort()[None], rank))
    size = images.shape[2]
    columns = [images, order_maps(rank, rows, cols, size)]
    for part in (0.25, 0.5, 0.75):
        drawn = (rank < part * rows * cols).view(-1, 1, rows, cols)
        columns.append(torch.where(grow(drawn, size // rows), images, 150))  # the rest is grey
    return sheet(torch.stack(columns, 1).flatten(0, 1), 10, math.ceil(96 / size))


def images_at_once(model):
    """The batch whose widest tensor, B x N x max(4D, V), has 32 MB (GPU: 128 MB)."""
    floats = 2 ** 25 if model.hop.is_cuda else 2 ** 23
    return max(1, floats // (model.N * max(4 * model.config["width"], model.V)))


def affordable(N):
    """How many orders of N cells are inferred by default: with N^2 / 2 looks for each, they take
    about as long as 4,000 of 64 cells."""
    return max(1, round(4000 * (64 / N) ** 2))


def rows_to_order(data, limit):
    """Rows of tokens.pt: the first `limit` to train on (None: as many as are affordable, 0: all),
    and a quarter as many to check on, at most."""
    if limit is None:
        limit = affordable(data["tokens"].shape[1])
    train_rows, check_rows = split_rows(data, limit)
    return train_rows, check_rows[:max(1, len(train_rows) // 4)]


def shared_orders(model, tokens, words, dtype, process=0, world=1, **how):
    """infer_orders of tokens [n, N], batch by batch: yields orders [b, N] on the CPU.

    The processes share each batch, and each receives all of it.
    """
    device, at_once = model.hop.device, images_at_once(model) * world
    with progress(len(tokens), "orders", "image") as bar:
        for batch in zip(tokens.split(at_once), words.split(at_once)):
            share = [x.tensor_split(world)[process].to(device) for x in batch]
            with autocast(device, dtype):
                found = [infer_orders(model, *share, **how).cpu()]
            found = torch.cat(in_turn(found) if world > 1 else found)
            bar.update(len(found))
            yield found


def parse():
    """The flags of the command line."""
    parser = arguments(__doc__)
    parser.add_argument("--model", default="",
                        help="the any-order model (default: OUT/anyorder.pt)")
    parser.add_argument("--score", choices=SCORES, default="confidence", help="what comes first")
    parser.add_argument("--distance", type=number(float, 0), default=0.0,
                        help="pull towards the last cell, nats per grid diagonal")
    parser.add_argument("--limit", type=number(int, 0), default=None,
                        help="orders of the first N training images, 0 for all (default: 4000 of "
                             "64 cells, 250 of 256: as many as take about the same time)")
    parser.add_argument("--resume", action="store_true", help="go on with an interrupted run")
    return parser.parse_args()


def unfinished(path, settings, resume, again):
    """The Checkpoint at `path`. UserError if --resume finds none."""
    checkpoint = Checkpoint(path, settings, resume, again)
    if resume and not checkpoint.state:
        raise UserError(f"{printable(path)} does not exist, no run was interrupted: "
                        f"run {again} without --resume")
    return checkpoint


def main():
    args = parse()
    device = pick_device(args.device)
    process, world = join(device)
    writable(args.out)
    data = open_tokens(args.out, args.data)
    tokenizer = open_tokenizer(args.out, data)
    path = args.model or os.path.join(args.out, "anyorder.pt")
    model = load_model(path, device)
    check_model(model, path, data)
    train_rows, check_rows = rows_to_order(data, args.limit)
    index = torch.cat((train_rows, check_rows))
    captions = [data["captions"][i] for i in data["caption_index"][index].tolist()]
    tokens, words = data["tokens"][index], read_captions(model, data)[index.to(device)]

    rows, cols = model.config["rows"], model.config["cols"]
    how = {"score": args.score, "distance": args.distance}
    config = {"rows": rows, "cols": cols, **how, "limit": len(train_rows), "seed": args.seed}
    made_from = {**model.about["made_from"], "model": fingerprint(model.state_dict())}
    name = os.path.join(args.out, "orders")
    again = command_line("order_infer.py", "--out", args.out)
    settings = {**config, **made_from}
    checkpoint = unfinished(name + "_resume.pt", settings, args.resume, again)
    nothing = torch.empty(0, model.N, dtype=torch.int16)
    state = checkpoint.state or {**new_state(device), "order": nothing}
    dtype = state["dtype"]
    every = int((data["split"] == 0).sum())
    print(f"orders for {len(train_rows):,} of {every:,} training images (--limit), "
          f"{model.N * (model.N + 1) // 2:,} looks for each")
    start, done = time.time() - state["seconds"], len(state["order"])
    for found in shared_orders(model, tokens[done:], words[done:], dtype, process, world, **how):
        state["order"] = torch.cat((state["order"], found.short()))
        state["seconds"] = time.time() - start
        checkpoint.after_step(lambda: state, len(state["order"]))
    if process:
        return

    order, n = state["order"].long(), len(train_rows)
    caption_rank, mean_rank = mean_ranks(order[:n], captions[:n])
    save(name + ".pt", {
        "kind": "orders",
        "config": config,
        "made_from": made_from,
        "order": state["order"],
        "index": index,
        "caption_rank": caption_rank,
        "mean_rank": mean_rank,
        "seconds": state["seconds"]})
    checkpoint.done()
    shown = torch.randperm(len(index), generator=seeded(args.seed))[:11]
    images = to_uint8(tokenizer.decode(tokens[shown]))
    save_picture(name + ".png", picture(images, rank_of(order[shown]), mean_rank, rows, cols))
    print("mean rank of each cell (0 is first):")
    for row in mean_rank.view(rows, cols).tolist():
        print(" ".join(f"{value:5.1f}" for value in row))
    print(f"{printable(name)}.pt: {len(index):,} orders, {state['seconds']:.0f} s\n"
          f"{printable(name)}.png: the mean order, then images with their own (dark first), "
          "a quarter, half, three quarters drawn\n"
          "next: " + command_line("finetune.py", "--out", args.out))


if __name__ == "__main__":
    run(main)
