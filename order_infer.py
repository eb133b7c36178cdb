"""The idea: a model that can draw any cell next can tell which cell *should* come next.

With some cells drawn, every free cell is offered to the model as the next one. All offers share what was drawn:
the last input is repeated once per free cell, each copy attends to the shared cache and to itself, and one pass
says what would be drawn at every free cell. The cell with the best score comes next; it is filled, and the
question is asked again:

    o_k = argmax over free cells c of  score(p(. | drawn so far, c)) - distance * |c - o_{k-1}| / diagonal

Drawing an image of N cells so costs N + (N - 1) + ... + 1 evaluations, about N^2 / 2 (arXiv 2504.17069, section 3.2).

The score looks at the *distribution* at a cell, never at what is drawn there. So the order is a function of the past
alone, and sum_k log p(x_{o_k} | past) is the exact log-likelihood of the image under this adaptive order: over all
images it sums to 1 (test_all.py adds it up). `likelihood` breaks this rule on purpose, to show what it costs: it draws
first and then keeps the cell with the likeliest draw, which acts like a strong cut in temperature.

For a training image the content is known (teacher forcing) and only the location is inferred: that is its order.

A large data set need not pay this price for every image. With --fast the first thousand orders teach a small *order
head* which cell comes next, given what the model knows before it is told (`learn_head`). For all other images the head
chooses, at one evaluation for each cell.

reads    out/anyorder.pt, out/tokens.pt, out/tokenizer.pt
writes   out/orders.pt (the order of each training and validation image, the mean rank for each caption), out/orders.png
run      python order_infer.py                     4,512 images in 2.5 to 7 minutes on two CPU cores
         python order_infer.py --fast              all training images: 1,000 exactly, a head orders the others
you see  the mean order as a colour map (dark first, bright last), and images as they appear in their own order
not here drawing new images in an inferred order (sample.py), learning from the orders (finetune.py)
"""

import math
import os
import time

import torch
import torch.nn.functional as F
from tqdm import tqdm

from anyorder import (AnyOrder, Drawing, in_turn, interrupted, join, learning_rate, load_model, open_tokenizer,
                      open_tokens, rank_of)
from data import (UserError, arguments, fingerprint, load, on_interrupt, pick_device, run, save, save_picture, sheet,
                  to_uint8)
from tokenizer import SAVE_EVERY, batch_of, precision, seeded

HEAD_STEPS, HEAD_BATCH = 400, 64        # training of the order head by --fast

# Higher comes earlier. logits [B, C, V] float32 -> [B, C] in nats.
SCORES = ("confidence", "margin", "entropy", "calibrated", "likelihood")


def location_scores(logits, score, frequency, content=None):
    """How much each candidate cell wants to be next: logits [B, C, V] -> [B, C] in nats, higher is earlier.

    confidence  log max_v p(v): the surest cell first (the paper's score)
    margin      log of the first minus the second probability ("Train for the worst, plan for the best", 2025)
    entropy     minus the entropy of p
    calibrated  log p(v) - log frequency(v) at the likeliest v: how much more sure than the mere share of v among the
                training tokens (frequency [V]), so that trivial background does not always come first
    likelihood  log p of `content` [B, C], what was drawn there (or is there): not leak-free, kept for comparison
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


def step_lengths(model):
    """[N + 1, N] Euclidean distance between cells over the grid's diagonal; from nowhere (row N) it is 0."""
    rows, cols = model.config["rows"], model.config["cols"]
    place = torch.cartesian_prod(torch.arange(rows), torch.arange(cols)).float()           # [N, 2]
    return torch.cat((torch.cdist(place, place) / max(1.0, math.hypot(rows - 1, cols - 1)),
                      torch.zeros(1, rows * cols)))


def crowding(model):
    """[N, N] float32: what a cell that is drawn takes from the value of another in the same step. inf from itself, so
    much from cells which share an edge with it that all others come before them, nothing from these."""
    rows, cols = model.config["rows"], model.config["cols"]
    place = torch.cartesian_prod(torch.arange(rows), torch.arange(cols))
    away = (place[:, None] - place).abs().sum(-1)                          # [N, N] steps along the grid
    return (1e4 * (away == 1)).masked_fill(away == 0, math.inf)


def steps_of(cells, parallel):
    """How many cells each step draws: one, or in `parallel` steps slightly fewer at first, when all is open: after k
    steps the share (k / parallel)^1.15 is drawn. steps_of(16, 4) is [3, 4, 4, 5]."""
    if not 0 < parallel < cells:
        return [1] * cells
    after = [round(cells * (k / parallel) ** 1.15) for k in range(parallel + 1)]
    for k in range(1, parallel + 1):                                       # at least one each
        after[k] = min(max(after[k], after[k - 1] + 1), cells - parallel + k)
    return sorted(b - a for a, b in zip(after, after[1:]))


def best_apart(value, cells, n, crowd):
    """The n best of cells [B, C] by value [B, C], one after the other, each the best of those that are adjacent to none
    before it, and where all are, the best of all: numbers [B, n]. Cells that share an edge should not be drawn at once:
    neither would know the other. crowd [N, N]: see crowding."""
    value, choice = value.float(), [value.argmax(1, keepdim=True)]
    while len(choice) < n:
        value = value - crowd[cells.gather(1, choice[-1]), cells]          # [B, C]
        choice.append(value.argmax(1, keepdim=True))
    return torch.cat(choice, 1)


def without(cells, choice):
    """cells [B, C] minus numbers choice [B, n] of each row -> [B, C - n].   without([[4, 7, 9]], [[1]]) is [[4, 9]]."""
    left = torch.ones_like(cells, dtype=torch.bool).scatter_(1, choice, False)
    return cells[left].view(len(cells), -1)


@torch.inference_mode()
def infer_orders(model, tokens, captions, score="confidence", distance=0.0, headed=False, parallel=0):
    """The order in which the model would draw these images.

    tokens [B, N] int64, captions: B strings or [B, L] word numbers -> order [B, N] int64. `score` as in
    location_scores; `distance` >= 0 in nats per grid diagonal pulls the next cell towards the last one. `headed` leaves
    the choice to the model's order head: no cell is tried. `parallel` is the number of steps, 0 for one by one (see
    steps_of). The images are split into batches, see images_at_once.
    """
    if score not in SCORES:
        raise UserError(f"score {score!r} is not known: choose one of {', '.join(SCORES)}")
    if headed and not model.config["order_head"]:
        raise UserError("this model has no order head that could choose: take one of finetune.py")
    words = model.read(captions) if isinstance(captions, (list, tuple)) else captions
    at_once = images_at_once(model)
    if len(tokens) > at_once:
        return torch.cat([infer_orders(model, tokens[i:i + at_once], words[i:i + at_once], score, distance, headed,
                                       parallel) for i in range(0, len(tokens), at_once)])
    B, N = tokens.shape
    lengths, crowd = step_lengths(model).to(tokens.device), crowding(model).to(tokens.device)
    drawing = Drawing(model, words)
    free = torch.arange(N, device=tokens.device).repeat(B, 1)              # [B, C], n cells fewer each step
    order = []
    for n in steps_of(N, parallel):
        if headed:
            value = drawing.next_location().gather(1, free)
        else:
            value = location_scores(drawing.look(free), score, model.frequency, tokens.gather(1, free))
            if distance:
                value = value - distance * lengths[drawing.cell[:, -1:], free]
        choice = at = best_apart(value, free, n, crowd)                    # [B, n]
        cell = free.gather(1, choice)
        if headed:                                                         # the locations are known: look there only
            drawing.look(cell, together=True)
            at = torch.arange(n, device=tokens.device).expand(B, n)
        drawing.place(at, tokens.gather(1, cell))
        order.append(cell)
        free = without(free, choice)
    return torch.cat(order, 1)


def shared_orders(model, tokens, words, kind, rank=0, world=1, **how):
    """infer_orders in the number type `kind`, the images [n, N] shared out between processes.
    All receive all, on the CPU."""
    tokens, words = (x.tensor_split(world)[rank].to(model.hop.device) for x in (tokens, words))
    with torch.autocast(tokens.device.type, kind, enabled=kind != torch.float32):
        found = infer_orders(model, tokens, words, **how).cpu()
    return torch.cat(in_turn([found])) if world > 1 else found


def images_at_once(model):
    """The batch that keeps the widest tensor, B x N x 4D or B x N x V in float32, within 32 MB, as a CPU likes it. A
    GPU would wait for Python most of the time: there within 512 MB, if all layers together (30 B x N x D bytes each)
    take less than half of its memory."""
    device, D = model.hop.device, model.config["width"]
    widest = model.N * max(4 * D, model.V)
    if device.type != "cuda":
        return max(1, 2 ** 23 // widest)
    memory = torch.cuda.get_device_properties(device).total_memory
    return max(1, min(2 ** 27 // widest, memory // (60 * len(model.blocks) * model.N * D)))


# ---------------------------------------------------------------------------------------------------------------------
# The order head: orders at the price of one evaluation for each cell


def over_free(where, order):
    """Logits of the order head, where [B, N, N], with -inf for what is drawn: at step k of order [B, N], the cells of
    rank < k. The last step has one free cell."""
    step = torch.arange(order.shape[1], device=order.device)
    drawn = rank_of(order)[:, None, :] < step[None, :, None]               # [B, step, cell]
    return where.float().masked_fill(drawn, -math.inf)


def location_loss(where, order):
    """Cross-entropy of the order head over free cells: where [B, N, N] logits, order [B, N] -> [B, N] nats per step."""
    return F.cross_entropy(over_free(where, order).flatten(0, 1), order.flatten(), reduction="none").view(order.shape)


def learn_head(model, tokens, words, order, seed=0, steps=HEAD_STEPS, kind=torch.float32, quiet=False):
    """A copy of `model` whose order head has learned to choose `order` [n, N] for tokens [n, N], words [n, L]. All else
    stays as it is: what the head reads is what the any-order model knows already."""
    torch.manual_seed(seed)
    device = tokens.device
    taught = AnyOrder({**model.config, "order_head": True}).requires_grad_(False).to(device)
    taught.load_state_dict(model.state_dict(), strict=False)
    taught.where.requires_grad_(True)
    optimizer = torch.optim.AdamW(taught.where.parameters(), weight_decay=0.05)
    for step in tqdm(range(steps), desc="order head", unit="step", disable=quiet, dynamic_ncols=True):
        pick = torch.tensor(batch_of(step, HEAD_BATCH, len(tokens), seed)).to(device)
        optimizer.param_groups[0]["lr"] = learning_rate(step, steps, 3e-3)
        with torch.autocast(device.type, kind, enabled=kind != torch.float32):
            where = taught(tokens[pick], words[pick], order[pick])[1]
        location_loss(where, order[pick]).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return taught.requires_grad_(False).eval()


def rank_correlation(a, b):
    """Spearman's rho of ranks a and b [B, N], mean over B: 1 same order, 0 unrelated, -1 reversed.
    For [0, 1, 2] and [0, 2, 1]: 1 - 6 * (0 + 1 + 1) / (3 * 8) = 0.5."""
    N = a.shape[1]
    return (1 - 6 * (a - b).double().square().sum(1) / (N * (N * N - 1))).mean().item()


# ---------------------------------------------------------------------------------------------------------------------
# Pictures


def colour_map(value):
    """value [...] in 0..1 -> uint8 RGB [..., 3], dark blue (first) over red to bright yellow (last)."""
    stops = torch.tensor([[13, 8, 80], [126, 3, 168], [204, 71, 120], [248, 149, 64], [240, 249, 33]]).float()
    place = value.float().clamp(0, 1) * (len(stops) - 1)
    low = place.floor().long().clamp_max(len(stops) - 2)
    return torch.lerp(stops[low], stops[low + 1], (place - low)[..., None]).round().to(torch.uint8)


def order_maps(rank, rows, cols, size):
    """rank [n, N] (steps 0..N-1, may be fractional means) -> uint8 pictures [n, 3, size, size * cols / rows]."""
    colour = colour_map(rank.cpu() / max(1, rows * cols - 1)).view(-1, rows, cols, 3).permute(0, 3, 1, 2)
    cell = max(1, size // rows)
    return colour.repeat_interleave(cell, 2).repeat_interleave(cell, 3)


def unfinished(images, rank, step, rows, cols):
    """uint8 images [n, 3, H, W] as they look when `step` cells are drawn in rank [n, N]: the rest is grey."""
    seen = (rank.cpu() < step).view(-1, 1, rows, cols)
    seen = seen.repeat_interleave(images.shape[2] // rows, 2).repeat_interleave(images.shape[3] // cols, 3)
    return torch.where(seen, images, torch.full_like(images, 128))


# ---------------------------------------------------------------------------------------------------------------------
# Orders of a whole training set


def caption_ranks(order, caption_index, captions):
    """Mean rank of each cell over the images with one caption: [captions, N] float32; captions without an image get
    the mean over all. Its argsort is the caption's *specialised* order."""
    rank = rank_of(order.long()).float()
    count = torch.bincount(caption_index, minlength=captions).float()[:, None]
    total = torch.zeros(captions, rank.shape[1]).index_add_(0, caption_index, rank)
    return torch.where(count > 0, total / count.clamp_min(1), rank.mean(0, keepdim=True))


def load_orders(path, held):
    """orders.pt as a dict, checked against tokens.pt (`held`): order [m, N] int64, index [m] rows of tokens.pt."""
    file = load(path, "orders", "python order_infer.py")
    grid, own = (f"{c.get('rows')}x{c.get('cols')}" for c in (file["config"], held["config"]))
    if grid != own:
        raise UserError(f"{path} is for an {grid} grid, tokens.pt has {own}: run python order_infer.py again")
    if file["made_from"].get("tokens") != held["fingerprint"] or file.get("captions") != held["captions"]:
        raise UserError(f"{path} was made from another tokens.pt: run python order_infer.py again")
    try:
        order, index = file["order"], file["index"] = file["order"].long(), file["index"].long()
        n, N = len(held["tokens"]), held["tokens"].shape[1]
        whole = (torch.equal(order.sort(1).values, torch.arange(N).expand(len(index), N))
                 and 0 <= int(index.min()) <= int(index.max()) < n and bool((held["split"][index] == 0).any())
                 and len(index.unique()) == len(order) and isinstance(file["made_from"]["model"], str)
                 and file["caption_rank"].shape == (len(held["captions"]), N) and not file["caption_rank"].isnan().any()
                 and file["config"]["score"] in SCORES and bool(0 <= file["config"]["distance"] < math.inf))
    except Exception:
        whole = False
    if not whole:
        raise UserError(f"{path} is damaged: run python order_infer.py again")
    return file


def check_model(model, path, held):
    """UserError unless the model knows any order, and was trained on these tokens and captions."""
    made_from = {**held["made_from"], "tokens": held["fingerprint"]}
    if {key: model.about["made_from"].get(key) for key in made_from} != made_from:
        raise UserError(f"{path} was trained on another tokens.pt: run python anyorder.py again")
    if model.about["order"] == "raster":
        raise UserError(f"{path} knows raster order only: give a model that knows any, such as anyorder.pt")


def main():
    parser = arguments(__doc__)
    parser.set_defaults(data=None)
    parser.add_argument("--model", default="", help="the any-order model (default: OUT/anyorder.pt)")
    parser.add_argument("--score", choices=SCORES, default="confidence", help="what makes a cell come first")
    parser.add_argument("--distance", type=float, default=0.0,
                        help="pull towards the last cell, nats per grid diagonal")
    parser.add_argument("--limit", type=int, default=None, help="exact orders for the first N training images, 0 for "
                                                                "all (default: 4000, with --fast 1000)")
    parser.add_argument("--fast", action="store_true", help="let a head learn from these and order all others")
    parser.add_argument("--resume", action="store_true", help="go on with an interrupted extraction")
    args = parser.parse_args()
    args.limit = (1000 if args.fast else 4000) if args.limit is None else args.limit
    if args.limit < 0 or not 0 <= args.distance < math.inf:
        raise UserError(f"--limit {args.limit} --distance {args.distance}: both must be at least 0, and finite")
    device = pick_device(args.device)
    rank, world = join(device)
    held = open_tokens(args.out, args.data)
    path = args.model or os.path.join(args.out, "anyorder.pt")
    model = load_model(path, device)
    check_model(model, path, held)
    tokenizer = open_tokenizer(args.out, held)

    train, check = (held["split"] == 0).nonzero()[:, 0], (held["split"] == 1).nonzero()[:512, 0]
    index = torch.cat((train[:args.limit or None], check))
    exact, known = len(index), len(index) - len(check)                     # exact orders; those of training images
    if args.fast:
        if known == len(train):
            raise UserError(f"--fast --limit {args.limit}: no image of {len(train):,} is left for the head, leave out "
                            f"--fast or give a smaller limit, such as {max(1, len(train) // 8)}")
        index = torch.cat((index, train[known:]))
    target, partial = (os.path.join(args.out, name) for name in ("orders.pt", "orders_resume.pt"))
    N = model.N
    about = {"config": {"rows": model.config["rows"], "cols": model.config["cols"], "score": args.score,
                        "distance": args.distance, "limit": args.limit, "fast": args.fast, "seed": args.seed},
             "made_from": {**model.about["made_from"], "model": fingerprint(model.state_dict())}}
    order, done, seconds, head = (torch.empty(len(index), N, dtype=torch.uint8 if N <= 256 else torch.int32),
                                  0, 0.0, None)
    kind, *_ = in_turn([precision(device)])                                # of all processes what the first one finds
    if args.resume:
        file = load(partial, "unfinished", "python order_infer.py without --resume")
        if {key: file[key] for key in about} != about:
            raise UserError(f"{partial} was begun with other settings or another model: leave out --resume")
        order, done, seconds, head = file["order"], file["done"], file["seconds"], file["head"]
        kind = torch.bfloat16 if file["bfloat16"] else torch.float32       # whatever the probe says this time
    tokens, words = held["tokens"], model.read(held["captions"]).cpu()[held["caption_index"].long()]           # [n, L]
    if rank == 0 and known < len(train):
        print(f"orders for {known:,} of {len(train):,} training images: "
              + ("a head learns from them and orders the others" if args.fast
                 else "--limit 0 infers them all, --fast estimates"))

    def remember():
        save(partial, {"kind": "unfinished", "version": 1, **about, "order": order, "done": done, "seconds": seconds,
                       "head": head, "bfloat16": kind == torch.bfloat16})

    at_once, stop, saved, pupil = images_at_once(model), on_interrupt(), time.time(), None
    with tqdm(total=len(index), initial=done, desc="orders", unit="image", disable=rank > 0, dynamic_ncols=True) as bar:
        while done < len(index):
            start = time.time()
            if done >= exact and pupil is None:
                if rank == 0:
                    remember()                         # to learn takes a minute
                some = index[:known]
                pupil = learn_head(model, tokens[some].to(device), words[some].to(device),
                                   order[:known].long().to(device), args.seed,
                                   0 if head else HEAD_STEPS, kind, rank > 0)
                if head:                               # it had learned before the interruption
                    pupil.where.load_state_dict(head)
                head = pupil.where.state_dict()
            rows = index[done:min(done + at_once * world, exact if done < exact else len(index))]
            found = shared_orders(model if done < exact else pupil, tokens[rows], words[rows], kind, rank, world,
                                  score=args.score, distance=args.distance, headed=done >= exact)
            order[done:done + len(rows)] = found.to(order.dtype)
            done, seconds = done + len(rows), seconds + time.time() - start
            bar.update(len(rows))
            leave = interrupted(stop, device)
            if rank == 0 and (leave or time.time() - saved > SAVE_EVERY):
                remember()
                saved = time.time()
            if leave:
                bar.close()
                print(f"stopped after {done:,} images: the same command with --resume goes on from {partial}")
                raise KeyboardInterrupt
    if rank:
        return
    if pupil and len(check):                           # the head never saw these
        guess = shared_orders(pupil, tokens[check], words[check], kind, headed=True)
        agree = rank_correlation(rank_of(guess), rank_of(order[known:exact].long()))
        print(f"the head's orders of {len(check)} validation images correlate by {agree:.3f} with the exact ones")
    captions = held["caption_index"][index].long()
    caption_rank = caption_ranks(order, captions, len(held["captions"]))
    save(target, {"kind": "orders", "version": 1, **about, "order": order, "index": index, "caption_rank": caption_rank,
                  "captions": held["captions"], "seconds": seconds, "exact": exact})
    if os.path.exists(partial):
        os.remove(partial)

    # the picture: the mean order large, then images, their orders,
    # and what is there after a quarter, half, three quarters
    grid, size = (model.config["rows"], model.config["cols"]), held["config"]["size"]
    ranks = rank_of(order.long())
    shown = torch.randperm(len(index), generator=seeded(args.seed))[:12]
    images = to_uint8(tokenizer.decode(held["tokens"][index[shown]]))
    mean = ranks.float().mean(0)
    columns = [images, order_maps(ranks[shown], *grid, size)] + [
        unfinished(images, ranks[shown], N * q // 4, *grid) for q in (1, 2, 3)]
    columns[0][0], columns[1][0] = 255, order_maps(mean.argsort().argsort()[None], *grid, size)[0]
    for column in columns[2:]:
        column[0] = 255
    save_picture(os.path.join(args.out, "orders.png"),
                 sheet(torch.stack(columns, 1).flatten(0, 1), 10, scale=max(1, 96 // size)))
    print("mean rank of each cell (0 is first):")
    print("\n".join(" ".join(f"{value:5.1f}" for value in row) for row in mean.view(grid).tolist()))
    print(f"{target}: {len(index):,} orders, {seconds:.0f} s, {len(index) / max(seconds, 1e-9):.0f} images/s\n"
          f"{args.out}/orders.png: the mean order, then images with their own order (dark first)\n"
          f"next: python finetune.py --out {args.out}")


if __name__ == "__main__":
    run(main)
