"""The idea: a model that can draw any cell next can tell which cell *should* come next.

With some cells drawn, every free cell is offered to the model as the next one. All offers share what was drawn: the last
input is repeated once per free cell, each copy attends to the shared cache and to itself, and one pass says what would
be drawn at every free cell. The cell with the best score comes next; it is filled, and the question is asked again:

    o_k = argmax over free cells c of  score(p(. | drawn so far, c)) - distance * |c - o_{k-1}| / diagonal

Drawing an image of N cells so costs N + (N - 1) + ... + 1 evaluations, about N^2 / 2 (arXiv 2504.17069, section 3.2).

The score looks at the *distribution* at a cell, never at what is drawn there. So the order is a function of the past
alone, and sum_k log p(x_{o_k} | past) is the exact log-likelihood of the image under this adaptive order: over all
images it sums to 1 (test_all.py adds it up). `likelihood` breaks this rule on purpose, to show what it costs: it draws
first and then keeps the cell with the likeliest draw, which acts like a strong cut in temperature.

For a training image the content is known (teacher forcing) and only the location is inferred: that is its order.

reads    out/anyorder.pt, out/tokens.pt, out/tokenizer.pt
writes   out/orders.pt (the order of each training and validation image, the mean rank for each caption), out/orders.png
run      python order_infer.py                     4,512 images in 7 minutes on two CPU cores
you see  the mean order as a colour map (dark first, bright last), and images as they appear in their own order
not here drawing new images in an inferred order (sample.py), learning from the orders (finetune.py)
"""

import math
import os
import time

import torch
import torch.distributed as dist
from tqdm import tqdm

from anyorder import Drawing, join, load_model, on_interrupt, open_tokens, precision, rank_of
from data import UserError, arguments, fingerprint, load, pick_device, run, save, sheet, to_uint8
from tokenizer import SAVE_EVERY, load_tokenizer, seeded

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
    return torch.cat((torch.cdist(place, place) / max(1.0, math.hypot(rows - 1, cols - 1)), torch.zeros(1, rows * cols)))


def without(cells, choice):
    """cells [B, C] minus number choice[b] of each row -> [B, C - 1].   without([[4, 7, 9]], [1]) is [[4, 9]]."""
    left = torch.ones_like(cells, dtype=torch.bool).scatter_(1, choice[:, None], False)
    return cells[left].view(len(cells), -1)


@torch.inference_mode()
def infer_orders(model, tokens, captions, score="confidence", distance=0.0):
    """The order in which the model would draw these images.

    tokens [B, N] int64, captions: B strings or [B, L] word numbers -> order [B, N] int64. `score` as in
    location_scores; `distance` >= 0 in nats per grid diagonal pulls the next cell towards the last one. The images are
    split into batches whose activations stay within some 64 MB.
    """
    if score not in SCORES:
        raise UserError(f"score {score!r} is not known: choose one of {', '.join(SCORES)}")
    words = model.read(captions) if isinstance(captions, (list, tuple)) else captions
    at_once = images_at_once(model)
    if len(tokens) > at_once:
        return torch.cat([infer_orders(model, tokens[i:i + at_once], words[i:i + at_once], score, distance)
                          for i in range(0, len(tokens), at_once)])
    B, N = tokens.shape
    lengths = step_lengths(model).to(tokens.device)
    drawing = Drawing(model, words)
    free = torch.arange(N, device=tokens.device).repeat(B, 1)              # [B, C], one cell fewer each step
    order = torch.empty_like(tokens)
    for k in range(N):
        logits = drawing.look(free)                                        # [B, C, V]
        value = location_scores(logits, score, model.frequency, tokens.gather(1, free))
        if distance:
            value = value - distance * lengths[drawing.cell[:, None], free]
        choice = value.argmax(1)                                           # [B]
        order[:, k] = free.gather(1, choice[:, None])[:, 0]
        drawing.place(choice, tokens.gather(1, order[:, k:k + 1])[:, 0])
        free = without(free, choice)
    return order


def images_at_once(model):
    """The batch that keeps the widest activation, B x N x 4D float32, within 32 MB: what the caches of a CPU like."""
    return max(1, 2 ** 23 // (model.N * 4 * model.config["width"]))


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
    grid, own = (f"{c['rows']}x{c['cols']}" for c in (file["config"], held["config"]))
    if grid != own:
        raise UserError(f"{path} is for an {grid} grid, tokens.pt has {own}: run python order_infer.py again")
    if file["made_from"]["tokens"] != held["fingerprint"]:
        raise UserError(f"{path} was made from another tokens.pt: run python order_infer.py again")
    file["order"], file["index"] = file["order"].long(), file["index"].long()
    return file


def check_model(model, path, held):
    """UserError unless the model was trained on these tokens."""
    if model.about["made_from"]["tokens"] != held["fingerprint"]:
        raise UserError(f"{path} was trained on another tokens.pt: run python anyorder.py again")


def main():
    parser = arguments(__doc__)
    parser.set_defaults(data=None)
    parser.add_argument("--model", default="", help="the any-order model (default OUT/anyorder.pt)")
    parser.add_argument("--score", choices=SCORES, default="confidence", help="what makes a cell come first")
    parser.add_argument("--distance", type=float, default=0.0, help="pull towards the last cell, nats per grid diagonal")
    parser.add_argument("--limit", type=int, default=4000, help="orders for the first N training images (0: for all)")
    parser.add_argument("--resume", action="store_true", help="go on with an interrupted extraction")
    args = parser.parse_args()
    if args.limit < 0 or not args.distance >= 0:
        raise UserError(f"--limit {args.limit} --distance {args.distance}: both must be at least 0")
    device = pick_device(args.device)
    rank, world = join(device)
    held = open_tokens(args.out, args.data)
    path = args.model or os.path.join(args.out, "anyorder.pt")
    model = load_model(path, device)
    check_model(model, path, held)
    tokenizer = load_tokenizer(os.path.join(args.out, "tokenizer.pt"))

    train = (held["split"] == 0).nonzero()[:, 0]
    index = torch.cat((train[:args.limit or None], (held["split"] == 1).nonzero()[:512, 0]))
    target, partial = (os.path.join(args.out, name) for name in ("orders.pt", "orders_resume.pt"))
    N = model.N
    about = {"config": {"rows": model.config["rows"], "cols": model.config["cols"], "score": args.score,
                        "distance": args.distance, "limit": args.limit},
             "made_from": {**model.about["made_from"], "model": fingerprint(model.state_dict())}}
    order, done, seconds = torch.empty(len(index), N, dtype=torch.uint8 if N <= 256 else torch.int32), 0, 0.0
    if args.resume:
        file = load(partial, "unfinished", "python order_infer.py without --resume")
        if {key: file[key] for key in about} != about:
            raise UserError(f"{partial} was begun with other settings or another model: leave out --resume")
        order, done, seconds = file["order"], file["done"], file["seconds"]
    words = model.read(held["captions"])
    if rank == 0 and args.limit and args.limit < len(train):
        print(f"orders for {args.limit:,} of {len(train):,} training images: --limit 0 infers them all")
    kind, at_once, stop, saved = precision(device), images_at_once(model), on_interrupt(), time.time()
    with tqdm(total=len(index), initial=done, desc="orders", unit="image", disable=rank > 0, dynamic_ncols=True) as bar:
        while done < len(index):
            start = time.time()
            rows = index[done:done + at_once * world]
            mine = rows.tensor_split(world)[rank]
            with torch.autocast(device.type, kind, enabled=kind != torch.float32):
                found = infer_orders(model, held["tokens"][mine].to(device),
                                     words[held["caption_index"][mine].long().to(device)], args.score, args.distance)
            found = found.cpu()
            if world > 1:
                parts = [None] * world
                dist.all_gather_object(parts, found)
                found = torch.cat(parts)
            order[done:done + len(rows)] = found.to(order.dtype)
            done, seconds = done + len(rows), seconds + time.time() - start
            bar.update(len(rows))
            if rank == 0 and (stop or time.time() - saved > SAVE_EVERY):
                save(partial, {"kind": "unfinished", "version": 1, **about, "order": order, "done": done, "seconds": seconds})
                saved = time.time()
            if stop:
                bar.close()
                print(f"stopped after {done:,} images: python order_infer.py --resume goes on from {partial}")
                raise KeyboardInterrupt
    if rank:
        return
    captions = held["caption_index"][index].long()
    caption_rank = caption_ranks(order, captions, len(held["captions"]))
    save(target, {"kind": "orders", "version": 1, **about, "order": order, "index": index, "caption_rank": caption_rank,
                  "captions": held["captions"], "seconds": seconds})
    if os.path.exists(partial):
        os.remove(partial)

    # the picture: the mean order large, then images, their orders, and what is there after a quarter, half, three quarters
    grid, size = (model.config["rows"], model.config["cols"]), held["config"]["size"]
    ranks = rank_of(order.long())
    shown = torch.randperm(len(index), generator=seeded(args.seed))[:12]
    images = to_uint8(tokenizer.decode(held["tokens"][index[shown]]))
    mean = ranks.float().mean(0)
    columns = [images, order_maps(ranks[shown], *grid, size)] + [unfinished(images, ranks[shown], N * q // 4, *grid) for q in (1, 2, 3)]
    columns[0][0], columns[1][0] = 255, order_maps(mean.argsort().argsort()[None], *grid, size)[0]
    for column in columns[2:]:
        column[0] = 255
    sheet(torch.stack(columns, 1).flatten(0, 1), 10, scale=max(1, 96 // size)).save(os.path.join(args.out, "orders.png"))
    print("mean rank of each cell (0 is first):")
    print("\n".join(" ".join(f"{value:5.1f}" for value in row) for row in mean.view(grid).tolist()))
    print(f"{target}: {len(index):,} orders, {seconds:.0f} s, {len(index) / max(seconds, 1e-9):.0f} images/s\n"
          f"{args.out}/orders.png: the mean order, then images with their own order (dark first)\n"
          f"next: python finetune.py --out {args.out}")


if __name__ == "__main__":
    run(main)
