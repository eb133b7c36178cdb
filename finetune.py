"""The idea: a model that knows every order gets better in those in which it specialises.

anyorder.py has learned all N! orders, order_infer.py has found one for
each training image. Now training goes on in these orders (arXiv
2504.17069, section 3.3). Two heads learn:

    loss = - mean_k log p(x_{o_k} | caption, past, o_k)   what is there: content
           - mean_k log p(o_k | caption, past)            where next: order head

The second term is a softmax over the free cells. With the head,
`sample.py --order learned` draws in such orders at the price of raster
order: one look per cell.

A *policy* is the rule that picks the next cell. The content must be
trained with the policy that draws, and the head never reproduces the
inferred orders exactly. So training goes on in rounds:

    round 1      in the orders of orders.pt. The head learns to pick them
    rounds 2, 3, 4   the head itself orders the images that this round will
                 train on, out of all that anyorder.pt has seen. Training
                 goes on in these orders, and the learning rate restarts

After that the policy that draws is the one that was trained on: the head
reproduces its own orders almost exactly.

*Policy drift*: a policy that is trained on its own choices moves. "Sun
first" means that the mean rank of the sun's pixels is below that of the
clouds'. It holds for 88% of sunsets in the order of the any-order model,
and for 13% in that of the head after four rounds.

--order says what to specialise in:

    inferred  each image's own order, then the head's    out/ordered.pt
    class     the mean order of a caption's images       out/ordered_class.pt
    raster    the control that others have to beat       out/ordered_raster.pt
    random    the control for mere extra training        out/ordered_random.pt

sample.py draws ordered.pt with --order learned: the head picks the cells.

reads    out/anyorder.pt, out/orders.pt, out/tokens.pt
run      python finetune.py                1 to 5 minutes on two idle CPU cores
you see  the held-out loss in nats per token falls below that of anyorder.pt
not here sampling (sample.py), comparing the orders (evaluate.py)
"""

import math
import os
import time

import torch
from torch import nn

from anyorder import (DROP, FIXED_ORDERS, AnyOrder, check_model, held_out_loss,
                      keep_best, load_model, make_optimizers, new_state, rank_of,
                      read_captions, save_model, split_rows)
from data import (UserError, arguments, autocast, batch_of, command_line,
                  fingerprint, join, loss_curve, number, pick_device, printable,
                  progress, run, seeded, writable)
from order_infer import (load_orders, places, rank_correlation, shared_orders,
                         specialised_orders, unfinished)
from tokenizer import learning_rate, open_tokens, update

ROUNDS = 4          # of --order inferred
GIVEN = 0.25        # share of training images of which a part is given

# --------------------------------------------------
# 1. Some cells are given

def given_first(order, model, generator):
    """In one of four images, the cells on one side of a random line come first, as if given.

    A model trained on whole images only forgets how to complete partial ones.
    order [B, N] on the CPU -> (order [B, N], given [B, 1]: how many cells come first).
    """
    B, N = order.shape
    # project the cells onto a random direction: the first `given` along it come first
    across = places(model) @ torch.randn(2, B, generator=generator)  # [N, B]
    partial = torch.rand(B, 1, generator=generator) < GIVEN
    given = partial * (N * torch.rand(B, 1, generator=generator)).long()
    position = rank_of(across.T.argsort(1))  # [B, N], by cell
    later = position >= given
    # a stable sort of False and True, by step, keeps the order on each side
    sides = later.gather(1, order).int().argsort(dim=1, stable=True)
    return order.gather(1, sides), given


# --------------------------------------------------
# 2. Rounds

def train(model, data, rows, args, checkpoint, state):
    """All rounds. `rows` of tokens.pt: for the "first" round, "later" ones, to "check" on.
    `state`: what --resume goes on from, with the "order" [n, N] of the images of this round
    and the "check_order" of those to check on.
    """
    device = model.hop.device
    process, world = join(device)
    share = slice(process, None, world)  # of each batch, this process takes a part
    optimizers = make_optimizers(model, args.lr, state["dtype"])
    for optimizer, saved in zip(optimizers, state.get("optimizers", ())):
        optimizer.load_state_dict(saved)
    ddp = nn.parallel.DistributedDataParallel(model) if world > 1 else model

    def now():
        return {**state, "model": model.state_dict(),
                "optimizers": [optimizer.state_dict() for optimizer in optimizers]}

    bar = progress(args.steps, args.order, "step", state["step"])
    begins = [r * args.steps // args.rounds for r in range(args.rounds + 1)]
    for r, (begin, end) in enumerate(zip(begins, begins[1:])):
        train_rows = rows["later"] if r else rows["first"]
        start = time.time()
        if r and state["step"] == begin:
            agree = head_orders(model, data, rows, args, range(begin, end), state)
            bar.write(f"round {r + 1}: orders of the head, rank correlation {agree:.3f} "
                      "with those before")
        for step in range(state["step"], end):
            parts = step_batch(step, model, train_rows, args, state)
            row, order, captioned, weight = [part[share].to(device) for part in parts]
            with autocast(device, state["dtype"]):
                words = data["words"][row] * captioned
                token_nats, cell_nats = ddp(data["tokens"][row], words, order)  # [B, N]
                content = token_nats.mean()
                location = (cell_nats * weight).mean()
            # each round restarts the learning rate
            rate = learning_rate(step - begin, end - begin, args.lr)
            update(content + location, model, optimizers, rate, step)
            state["step"] = step + 1
            state["seconds"] += time.time() - start
            bar.update()
            if (step + 1) % max(1, args.steps // 8) == 0 or step + 1 == end:
                value, cell_value = held_out(model, data, rows, state)
                state["history"].append((step + 1, content.item(), value))
                keep_best(state, model, value)
                bar.write(f"step {step + 1:5d}  loss {content:.3f}  held out {value:.3f} "
                          f"nats per token, {cell_value:.3f} per location")
            checkpoint.after_step(now, step + 1)
            start = time.time()
    bar.close()


def step_batch(step, model, train_rows, args, state):
    """What a step trains on: row [B] of tokens.pt, order, captioned [B, 1], weight [B, N].

    weight is that of each location: 0 for given cells, since nobody chose them; its mean is 1.
    The dice depend on the seed and the step alone, so a resumed run repeats them.
    """
    dice = seeded(args.seed, step)
    picked = batch_of(step, args.batch, len(train_rows), args.seed)
    if args.order in FIXED_ORDERS:
        make, cols = FIXED_ORDERS[args.order], model.config["cols"]
        order = make(args.batch, model.N, dice, cols)
    else:
        order = state["order"][picked].long()
    order, given = given_first(order, model, dice)
    captioned = torch.rand(args.batch, 1, generator=dice) >= DROP
    weight = (torch.arange(model.N) >= given).float()
    return train_rows[picked], order, captioned, weight / weight.mean()


def head_orders(model, data, rows, args, steps, state):
    """A new round: the head picks state["order"], for the images that these steps draw, and
    state["check_order"]. Returns their rank correlation with those before."""
    n = len(rows["later"])
    batches = (batch_of(step, args.batch, n, args.seed) for step in steps)
    drawn = sorted(set().union(*batches))
    row = torch.cat((rows["later"][drawn], rows["check"]))
    tokens, words = data["tokens"][row], data["words"][row]
    processes = join(model.hop.device)
    found = shared_orders(model, tokens, words, state["dtype"], *processes, headed=True)
    found = torch.cat(list(found))
    before, after = state["check_order"].long(), found[len(drawn):]
    # -1 for images that this round does not draw
    state["order"] = torch.full((n, model.N), -1).short()
    state["order"][drawn] = found[:len(drawn)].short()
    state["check_order"] = after.short()
    # losses in other orders do not compare
    state["best"]["held_out"] = math.inf
    return rank_correlation(rank_of(before), rank_of(after[:len(before)]))


def held_out(model, data, rows, state):
    """(nats per token, per location) of the images to check on, in state["check_order"]."""
    device = model.hop.device
    order = state["check_order"].long().to(device)
    row = rows["check"][:len(order)]
    with autocast(device, state["dtype"]):
        return held_out_loss(model, data["tokens"][row], data["words"][row], order)


# --------------------------------------------------
# 3. Flags, files (skip this on a first reading)

def first_orders(name, data, file, limit):
    """What the first round begins with: (rows, order, check_order), see `train`."""
    later, check = split_rows(data, limit)
    rows = {"first": later, "later": later, "check": check}
    if name in FIXED_ORDERS:
        N, cols = data["tokens"].shape[1], data["config"]["cols"]
        order = FIXED_ORDERS[name](len(check), N, seeded("check"), cols)
        # those to train on are drawn anew for each image and step
        return rows, order[:0], order
    # as in order_infer.py
    known, _ = split_rows(data, file["config"]["limit"])
    if len(known) > len(later):
        rows["first"] = rows["later"] = later = known
    if name == "inferred":
        rows["first"] = known
        # of those to check on, the first have an inferred order
        return rows, file["order"][:len(known)], file["order"][len(known):]
    index = data["caption_index"][torch.cat((later, check))].tolist()
    captions = [data["captions"][i] for i in index]
    order = specialised_orders(captions, file["caption_rank"], file["mean_rank"])
    return rows, *order.split((len(later), len(check)))


def parse():
    """The flags of the command line."""
    parser = arguments(__doc__)
    parser.add_argument("--order", choices=("inferred", "class", *FIXED_ORDERS),
                        default="inferred", help="what to specialise in")
    parser.add_argument("--rounds", type=number(int, 1), default=None,
                        help=f"of an inferred run (default: {ROUNDS})")
    parser.add_argument("--steps", type=number(int, 1), default=500, help="of all rounds together")
    parser.add_argument("--batch", type=number(int, 1), default=32,
                        help="images per step, over all processes")
    parser.add_argument("--lr", type=number(float, 1e-9, 1), default=None,
                        help="peak learning rate (default: 0.002, or 0.0005 if images are so few "
                             "that they come more than once)")
    parser.add_argument("--resume", action="store_true", help="go on with an interrupted run")
    args = parser.parse_args()
    most = args.steps if args.order == "inferred" else 1
    args.rounds = args.rounds or min(ROUNDS, most)
    if args.rounds > most:
        raise UserError(f"--rounds {args.rounds}: {args.steps} steps in {args.order} order "
                        f"allow {most}, give no more")
    return args


def save_best(path, model, state, before, about):
    """Writes the best model of the run. `before`: what the file of the any-order model tells."""
    best = state["best"]
    model.load_state_dict(best["model"])
    kept = {key: before[key] for key in ("limit", "data", "captions")}
    tokens_seen = before["tokens_seen"] + best["step"] * about["batch"] * model.N
    save_model(path, model, **kept, **about, held_out=best["held_out"], tokens_seen=tokens_seen,
               step=before["step"] + best["step"], seconds=before["seconds"] + state["seconds"])


def main():
    args = parse()
    device = pick_device(args.device)
    process, world = join(device, args.batch)
    writable(args.out)
    data = open_tokens(args.out, args.data)
    source = os.path.join(args.out, "anyorder.pt")
    start = load_model(source, device)
    check_model(start, source, data)
    file = {}
    if args.order not in FIXED_ORDERS:
        file = load_orders(args.out, data)
    rows, order, check_order = first_orders(args.order, data, file, start.about["limit"])
    if args.lr is None:
        args.lr = 2e-3 if args.steps * args.batch <= len(rows["later"]) else 5e-4

    name = "ordered" if args.order == "inferred" else "ordered_" + args.order
    target = os.path.join(args.out, name)
    made_from = {**start.about["made_from"], "model": fingerprint(start.state_dict()),
                 "orders": fingerprint(file.get("order"))}
    flags = ("order", "rounds", "steps", "batch", "lr", "seed")
    settings = {**made_from, **{flag: getattr(args, flag) for flag in flags}}
    again = command_line("finetune.py", "--order", args.order, "--out", args.out)
    checkpoint = unfinished(target + "_resume.pt", settings, args.resume, again)
    if file and file["made_from"]["model"] != made_from["model"]:
        print(f"orders.pt was inferred by another model than {printable(source)}")
    orders = {"order": order.short(), "check_order": check_order.short()}
    state = checkpoint.state or {**new_state(device), **orders, "model": start.state_dict()}
    torch.manual_seed(args.seed)  # for the order head, which is new
    model = AnyOrder({**start.config, "order_head": True}).to(device)
    model.load_state_dict(state.pop("model"), strict=False)
    data["words"] = read_captions(model, data)
    data["tokens"] = data["tokens"].to(device)
    before, _ = held_out(model, data, rows, state)
    later, first, check = (len(rows[name]) for name in ("later", "first", "check"))
    print(f"{later:,} images to train on, {first:,} in the first round, {check} to check: "
          f"{before:.3f} nats per token in {args.order} order before; "
          f"learning rate {args.lr}")
    train(model, data, rows, args, checkpoint, state)
    if process:
        return
    about = {"made_from": made_from, "order": args.order, "batch": args.batch}
    if file:
        about.update({key: file[key] for key in ("caption_rank", "mean_rank")})
        about.update({key: file["config"][key] for key in ("score", "distance")})
    save_best(target + ".pt", model, state, start.about, about)
    checkpoint.done()
    loss_curve(state["history"], target + "_loss.png")
    print(f"{printable(target)}.pt: {state['best']['held_out']:.3f} nats per token held out, "
          f"{state['seconds']:.0f} s\nnext: "
          + command_line("sample.py", "--out", args.out, "--model", target + ".pt"))


if __name__ == "__main__":
    run(main)
