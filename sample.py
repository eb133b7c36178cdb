"""The idea: drawing is a loop of two questions, where next? and what is there?

    until all cells are drawn:
        cell  ~ where      raster | random | a given order | inferred (every free cell is tried) | learned (the order head)
        token ~ p(x_cell | caption, what was drawn, cell)

All models and all orders go through this one loop (`generate`); only the first line differs. Cells whose content is
given are asked for first and their content is kept: completing an image is the same loop with a head start.

    where       evaluations for N cells
    raster, random, class, learned     N
    inferred                           N^2 / 2          (see order_infer.py)

reads    a model (out/ordered.pt, out/anyorder.pt or out/raster.pt) and out/tokenizer.pt
writes   out/samples.png (images), out/samples_order.png (the orders, dark first), out/samples.gif (they draw themselves)
run      python sample.py --caption "low red sun on the left two clouds"               MEASURED
you see  images, each beside the order in which it was drawn
not here training, quality figures (evaluate.py)
"""

import math
import os

import torch

from anyorder import Drawing, load_model, random_order, raster_order, seeded
from data import UserError, arguments, load, pick_device, run, sheet, to_uint8
from order_infer import location_scores, order_maps, rank_of, step_lengths, unfinished, without
from tokenizer import load_tokenizer

ORDERS = ("raster", "random", "inferred", "class", "learned")


def filtered(logits, temperature=1.0, top_k=0, top_p=1.0):
    """logits [B, V] -> probabilities [B, V]: temperature (0 is argmax), then the top_k likeliest tokens (0: all), then the
    fewest tokens whose probabilities reach top_p (nucleus sampling, Holtzman et al. 2020)."""
    if temperature == 0:
        return torch.zeros_like(logits).scatter_(1, logits.argmax(1, keepdim=True), 1.0)
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
    rank, known = model.about["caption_rank"], {c: i for i, c in enumerate(model.about["captions"])}
    rows = [rank[known[c]] if c in known else rank.mean(0) for c in captions]
    return torch.stack(rows).argsort(1)


@torch.inference_mode()
def generate(model, captions, order="inferred", score="confidence", distance=0.0, policy=None, temperature=1.0, top_k=0,
             top_p=1.0, guidance=1.0, given=None, keep=None, generator=None, watch=None):
    """Draws one image per caption: (tokens [B, N] int64, order [B, N] int64).

    captions   B strings
    order      "raster", "random", "inferred", "class", "learned", or a visit list [B, N]
    score, distance    how "inferred" chooses, see order_infer.location_scores
    policy     another model that chooses the inferred locations (say, the any-order model that the orders came from)
    guidance   classifier-free guidance: logits = without + guidance * (with - without caption); 1 is none (Ho 2022)
    given, keep        tokens [B, N] and bool [N]: kept cells are entered first, in the asked order, and never drawn
    generator  of torch, on the model's device; makes it repeatable
    watch      a list that receives, for each step, (free cells [B, C], their scores [B, C]) where scores exist
    """
    B, N, device = len(captions), model.N, model.hop.device
    if generator is None:
        generator = torch.Generator(device).manual_seed(0)
    words = model.read(captions)
    if guidance != 1:
        words = torch.cat((words, torch.zeros_like(words)))                # the second half has no caption
    copies = len(words) // B
    drawing = Drawing(model, words)
    chooser = Drawing(policy, policy.read(captions)) if policy is not None else None

    fixed = None                                                           # the visit list, where there is one
    if isinstance(order, torch.Tensor):
        fixed = order.to(device)
    elif order == "raster":
        fixed = raster_order(B, N).to(device)
    elif order == "random":
        fixed = torch.rand(B, N, generator=generator, device=device).argsort(1)
    elif order == "class":
        fixed = caption_orders(model, captions).to(device)
    elif order == "learned" and not model.config["order_head"]:
        raise UserError("this model has no order head, order 'learned' needs one: run python finetune.py first")
    elif order not in ORDERS:
        raise UserError(f"order {order!r} is not known: choose one of {', '.join(ORDERS)}")
    cells = fixed if fixed is not None else raster_order(B, N).to(device)
    keep = torch.zeros(N, dtype=torch.bool) if keep is None else keep
    kept = keep.to(device)[cells]                                          # [B, N], by step
    first = kept.int().argsort(dim=1, descending=True, stable=True)            # kept cells first, else as they were
    cells = cells.gather(1, first)
    lengths = step_lengths(model).to(device)

    tokens = torch.zeros(B, N, dtype=torch.long, device=device) if given is None else given.clone().to(device)
    visited = torch.empty(B, N, dtype=torch.long, device=device)
    for start, end, forced in ((0, int(keep.sum()), True), (int(keep.sum()), N, False)):
        pool = cells[:, start:end]                                         # [B, C], one cell fewer each step
        for k in range(start, end):
            value, logits = None, None
            if fixed is not None:
                choice = pool.new_zeros(B)
            elif order == "learned":
                value = drawing.next_location()[:B].gather(1, pool)
                choice = value.argmax(1)
            else:                                                          # try every cell of the pool
                if chooser is not None:
                    tried = chooser.look(pool)
                else:
                    tried = logits = drawing.look(pool.repeat(copies, 1))
                content = tokens.gather(1, pool)
                if score == "likelihood" and not forced:                   # draw everywhere, keep the likeliest
                    p = filtered(guided(tried, B, guidance).flatten(0, 1), temperature, top_k, top_p)
                    content = torch.multinomial(p, 1, generator=generator).view(pool.shape)
                value = location_scores(tried[:B], score, model.frequency, content)
                value = value - distance * lengths[drawing.cell[:B, None], pool]
                choice = value.argmax(1)
            if watch is not None and value is not None:
                watch.append((pool.cpu(), value.float().cpu()))
            cell = pool.gather(1, choice[:, None])                         # [B, 1]
            at = choice
            if logits is None:                                             # the location is known: look there only
                logits, at = drawing.look(cell.repeat(copies, 1)), torch.zeros_like(choice)
            if not forced:
                if order == "inferred" and score == "likelihood":
                    token = content.gather(1, choice[:, None])
                else:
                    here = guided(logits[torch.arange(copies * B), at.repeat(copies)][:, None], B, guidance)[:, 0]
                    token = torch.multinomial(filtered(here, temperature, top_k, top_p), 1, generator=generator)
                tokens.scatter_(1, cell, token)
            token = tokens.gather(1, cell)[:, 0]
            drawing.place(at.repeat(copies), token.repeat(copies))
            if chooser is not None:
                chooser.place(choice, token)
            visited[:, k] = cell[:, 0]
            pool = without(pool, choice)
    return tokens, visited


def guided(logits, B, guidance):
    """logits [B or 2B, C, V] -> [B, C, V]; the second half, where there is one, was asked without a caption."""
    if len(logits) == B:
        return logits
    told, free = logits.float().chunk(2)
    return free + guidance * (told - free)


def animation(images, rank, rows, cols, path, scale, columns):
    """A GIF in which images [n, 3, H, W] uint8 draw themselves in rank [n, N]; some 32 frames, the last one stays."""
    N = rank.shape[1]
    steps = sorted({round(i * N / 32) for i in range(33)})
    frames = [sheet(unfinished(images, rank, step, rows, cols), columns, scale=scale) for step in steps]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=[80] * (len(frames) - 1) + [2000], loop=0)


def main():
    parser = arguments(__doc__, flags=("out", "seed", "device"))
    parser.add_argument("--model", default="", help="a .pt of anyorder.py or finetune.py (default OUT/ordered.pt, else anyorder.pt)")
    parser.add_argument("--order", choices=ORDERS, default=None, help="default: what the model was last trained for")
    parser.add_argument("--caption", nargs="+", default=None, help="one or more captions; default: some of the training captions")
    parser.add_argument("--n", type=int, default=32, help="how many images")
    parser.add_argument("--temperature", type=float, default=1.0, help="below 1 plays safe, 0 takes the likeliest")
    parser.add_argument("--top-k", type=int, default=0, help="draw among the K likeliest tokens only (0: all)")
    parser.add_argument("--top-p", type=float, default=1.0, help="draw among the likeliest tokens that make up P")
    parser.add_argument("--guidance", type=float, default=1.5, help="classifier-free guidance (1: none)")
    args = parser.parse_args()
    if args.n < 1 or args.top_k < 0 or not 0 < args.top_p <= 1 or not args.temperature >= 0 or not 0 <= args.guidance <= 100:
        raise UserError(f"--n {args.n} --top-k {args.top_k} --top-p {args.top_p} --temperature {args.temperature} --guidance "
                        f"{args.guidance}: n at least 1, top-k and temperature at least 0, top-p in (0, 1], guidance in 0..100")
    device = pick_device(args.device)
    path = args.model or next((p for p in (os.path.join(args.out, f) for f in ("ordered.pt", "anyorder.pt", "raster.pt"))
                               if os.path.exists(p)), os.path.join(args.out, "ordered.pt"))
    model = load_model(path, device)
    tokenizer = load_tokenizer(os.path.join(args.out, "tokenizer.pt"), device)
    if tokenizer.fingerprint != model.about["made_from"]["tokenizer"]:
        raise UserError(f"{path} was trained with another tokenizer than {args.out}/tokenizer.pt: run python anyorder.py again")
    order = args.order or {"random": "inferred", "inferred": "learned"}.get(model.about["order"], model.about["order"])
    if args.caption:
        model.check_words(args.caption)
    known = model.about["captions"]
    captions = args.caption or [known[i] for i in torch.randperm(len(known), generator=seeded(args.seed))[:args.n].tolist()]
    captions = (captions * args.n)[:args.n]

    generator = torch.Generator(device).manual_seed(args.seed)
    drawn, orders = [], []
    for i in range(0, args.n, 32):
        tokens, visited = generate(model, captions[i:i + 32], order, model.about.get("score", "confidence"),
                                   model.about.get("distance", 0.0), None, args.temperature, args.top_k, args.top_p,
                                   args.guidance, generator=generator)
        drawn.append(tokenizer.decode(tokens).cpu())
        orders.append(visited.cpu())
    images, rank = to_uint8(torch.cat(drawn)), rank_of(torch.cat(orders))
    rows, cols, size = model.config["rows"], model.config["cols"], images.shape[2]
    scale, columns = max(1, 128 // size), min(8, args.n)
    stem = os.path.join(args.out, "samples")
    sheet(images, columns, scale=scale).save(stem + ".png")
    sheet(order_maps(rank, rows, cols, size), columns, scale=scale).save(stem + "_order.png")
    animation(images[:16], rank[:16], rows, cols, stem + ".gif", scale, min(4, args.n))
    print(f"{args.n} images in {order} order from {path}: {stem}.png, {stem}_order.png (dark first), {stem}.gif\n"
          + "\n".join(f"  {caption!r}" for caption in dict.fromkeys(captions[:columns])))


if __name__ == "__main__":
    run(main)
