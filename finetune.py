"""The idea: a model that knows every order gets better when it may specialise in the orders it found itself.

anyorder.py has learned all N! orders, order_infer.py has found one order for each training image. Here the model goes
on training, from the weights of anyorder.pt, but each image now always arrives in its own order (arXiv 2504.17069,
section 3.3). Two things are distilled at once:

    loss = - mean_k log p(x_{o_k} | caption, past, o_k)        what is there: the content model sees the inferred orders
           - mean_k log p(o_k | caption, past)                 where is next: the order head learns to choose them

The second term is a softmax over the cells that are still free. With it, `sample.py --order learned` draws in an
inferred order at the price of raster: one small head per step instead of one evaluation per free cell.

The policy that draws must be the one that the content model was trained with. The head is close to the inferred orders
and never equal to them, so training goes on in rounds: the first in the orders of orders.pt, the later ones in the
orders that the head itself chooses by then, which it soon gives again almost cell by cell. (The model's own confidence
is no such policy: after finetuning it prefers other orders than those it has just specialised in.) The head can order
any image, so the later rounds are not bound to the images of orders.pt: they go on with all that anyorder.pt has
learned from, and where these are many, no image comes twice.

To draw several cells in one step is another policy still: the head then names cells that lie apart, where one by one it
would go on beside the last. A model that is to draw in S steps may be told with --parallel S: one in four images of the
later rounds comes in the order in which S steps would draw it.

--order chooses what to specialise in:

    inferred   each image's own order from orders.pt                                   writes out/ordered.pt
    class      the mean order of all training images with the same caption             writes out/ordered_class.pt
    raster     left to right, top to bottom: the control that any other order has to beat       out/ordered_raster.pt
    random     a fresh order for each image and step: what training on, and no more, is worth    out/ordered_random.pt

In one of four sequences the cells on one side of a random line come first, as if they were given (`given_first`): who
learns only whole images in one order forgets how to complete them.

reads    out/anyorder.pt, out/orders.pt, out/tokens.pt
run      python finetune.py                        2 minutes on two CPU cores with bfloat16
you see  the held-out loss in nats per token, in the orders of the validation images, fall below anyorder.pt's
not here sampling (sample.py), comparing the orders (evaluate.py)
"""

import bisect
import math
import os
import time

import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

from anyorder import (DROP, AnyOrder, in_turn, interrupted, join, learning_rate, load_model, loss_curve, open_tokens,
                      optimizers, random_order, rank_of, raster_order, save_model)
from data import UserError, arguments, fingerprint, load, on_interrupt, pick_device, run, save
from order_infer import (check_model, images_at_once, load_orders, location_loss, over_free, rank_correlation,
                         shared_orders)
from tokenizer import SAVE_EVERY, batch_of, precision, seeded


ROUNDS = 4          # of --order inferred
ONE_IN = 4          # with --parallel S, one in so many images of a later round comes as it would be drawn in S steps
GIVEN = 0.25        # share of training images of which some part is given, so that completion stays a skill


def specialised_orders(kind, file, held, index):
    """The order to train each of the images `index` (rows of tokens.pt) on: [n, N] int64."""
    if kind == "inferred":
        row = torch.full((len(held["tokens"]),), -1)
        row[file["index"]] = torch.arange(len(file["index"]))
        return file["order"][row[index]]
    if kind == "class":
        return file["caption_rank"].argsort(1)[held["caption_index"][index].long()]
    N = held["tokens"].shape[1]
    return (random_order(len(index), N, seeded("check")) if kind == "random"
            else raster_order(len(index), N).contiguous())


def given_first(order, rows, cols, generator):
    """order [B, N], visit lists of a rows x cols grid, on the CPU -> (order [B, N], given [B, 1]). In one of four, the
    cells on one side of a random line come first, as if given to be completed; both sides stay in their order. `given`
    counts them, 0 for the others."""
    B, N = order.shape
    place = torch.cartesian_prod(torch.arange(rows), torch.arange(cols)).float()           # [N, 2]
    along = place @ torch.randn(2, B, generator=generator)                 # [N, B], how far across the line
    given = (torch.rand(B, 1, generator=generator) < GIVEN) * (N * torch.rand(B, 1, generator=generator)).long()
    later = rank_of(along.T.argsort(1)) >= given                           # [B, N] bool, by cell
    return order.gather(1, later.gather(1, order).int().argsort(dim=1, stable=True)), given


@torch.no_grad()
def check(model, tokens, words, order, batch=256):
    """On images the model does not train on: (nats per token, nats per location, share of locations guessed)."""
    sums = torch.zeros(3, dtype=torch.float64)
    for i in range(0, len(tokens), batch):
        t, o = tokens[i:i + batch], order[i:i + batch]
        what, where = model(t, words[i:i + batch], o)
        sums[0] += F.cross_entropy(what.flatten(0, 1).float(), t.gather(1, o).flatten(), reduction="sum").item()
        free = over_free(where, o)
        sums[1] += F.cross_entropy(free.flatten(0, 1), o.flatten(), reduction="sum").item()
        sums[2] += (free.argmax(-1) == o).sum().item()
    return (sums / tokens.numel()).tolist()


def main():
    parser = arguments(__doc__)
    parser.set_defaults(data=None)
    parser.add_argument("--order", choices=("inferred", "class", "raster", "random"), default="inferred",
                        help="what to specialise in")
    parser.add_argument("--rounds", type=int, default=None,
                        help=f"parts of an inferred run, all but the first in the head's orders (default: {ROUNDS})")
    parser.add_argument("--parallel", metavar="S", type=int, default=0,
                        help="also specialise in drawing in S steps, several cells at once (sample.py --parallel)")
    parser.add_argument("--steps", type=int, default=500, help="training steps of all rounds together")
    parser.add_argument("--batch", type=int, default=32, help="images per step over all processes")
    parser.add_argument("--lr", type=float, default=None,
                        help="peak learning rate (default: 0.002, or 0.0005 where images are so few that they come "
                             "more than once); raster order of thousands of images bears 0.004")
    parser.add_argument("--resume", action="store_true", help="go on with an interrupted run of the same settings")
    args = parser.parse_args()
    if args.rounds and args.order != "inferred":
        raise UserError(f"--rounds {args.rounds} changes the orders, --order {args.order} keeps them: "
                        "leave out one of them")
    args.rounds = (min(ROUNDS, args.steps) if args.order == "inferred" else 1) if args.rounds is None else args.rounds
    if args.parallel and (args.rounds < 2 or args.parallel < 2):
        raise UserError(f"--parallel {args.parallel} is for 2 steps or more in orders of the head, which come from "
                        "the second round on: leave it out, or give --order inferred and --rounds of 2 or more")
    for name in ("steps", "batch", "rounds"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name} {getattr(args, name)} is too small: give at least 1")
    if args.lr is not None and not 0 < args.lr < 1:
        raise UserError(f"--lr {args.lr} is not a learning rate: give a number between 0 and 1, such as 0.0005")
    if args.rounds > args.steps:
        raise UserError(f"--rounds {args.rounds} are more than --steps {args.steps}: each round needs a step")
    device = pick_device(args.device)
    rank, world = join(device)
    if args.batch % world:
        raise UserError(f"--batch {args.batch} cannot be split over {world} processes: give a multiple of {world}")
    held = open_tokens(args.out, args.data)
    source = os.path.join(args.out, "anyorder.pt")
    start_model = load_model(source, device)
    check_model(start_model, source, held)
    file = load_orders(os.path.join(args.out, "orders.pt"), held)

    torch.manual_seed(args.seed)                                           # the order head is new
    model = AnyOrder({**start_model.config, "order_head": True}).to(device)
    model.load_state_dict(start_model.state_dict(), strict=False)
    tokens = held["tokens"].to(device)
    captions = model.read(held["captions"])[held["caption_index"].long().to(device)]       # [n, L]
    known, val = (file["index"][held["split"][file["index"]] == part] for part in (0, 1))
    val = val if len(val) else known[:512]
    limit = start_model.about.get("limit", 0)                              # anyorder.pt has seen so many (0: all)
    train = (held["split"] == 0).nonzero()[:max(limit, len(known)) if limit else None, 0]
    images = known if args.order == "inferred" else train                  # of this round
    order = specialised_orders(args.order, file, held, images)
    args.lr = args.lr or (2e-3 if args.steps * args.batch <= len(train) else 5e-4)
    val_order = specialised_orders(args.order, file, held, val).to(device)
    grid, N, small = model.config, model.N, torch.uint8 if model.N <= 256 else torch.int32
    if args.parallel >= N:
        raise UserError(f"--parallel {args.parallel} steps for {N} cells are one by one: give fewer, such as {N // 4}")
    name = "ordered" if args.order == "inferred" else "ordered_" + args.order
    target, unfinished = (os.path.join(args.out, name + end) for end in (".pt", "_resume.pt"))
    made_from = {**start_model.about["made_from"], "orders": fingerprint(file["order"]),
                 "model": fingerprint(start_model.state_dict())}
    settings = {key: getattr(args, key) for key in ("order", "rounds", "parallel", "steps", "batch", "lr", "seed")}
    settings["optimizer"] = "Muon"
    kind, *_ = in_turn([precision(device)])                                # of all processes what the first one finds
    step, best, history, seconds = 0, math.inf, [], 0.0
    begins = [r * args.steps // args.rounds for r in range(args.rounds + 1)]              # the first step of each round
    if args.resume:
        state = load(unfinished, "unfinished", "python finetune.py without --resume")
        if state["config"] != settings or state["made_from"] != made_from:
            raise UserError(f"{unfinished} was begun with other settings or files: "
                            "repeat its flags, or leave out --resume")
        model.load_state_dict(state["model"])
        step, best, history, seconds = state["step"], state["best"], state["history"], state["seconds"]
        order, val_order = state["order"].long(), state["val_order"].long().to(device)
        if step >= begins[1]:
            images = train
        kind = torch.bfloat16 if state["bfloat16"] else torch.float32      # whatever the probe says this time
    both = optimizers(model, args.lr, kind)
    if args.resume:
        for optimizer, momenta in zip(both, state["optimizers"]):
            optimizer.load_state_dict(momenta)
    parallel = nn.parallel.DistributedDataParallel(model) if world > 1 else model

    def evaluate():
        with torch.autocast(device.type, kind, enabled=kind != torch.float32):
            return check(model, tokens[val], captions[val], val_order)

    def remember():
        save(unfinished, {"kind": "unfinished", "version": 1, "config": settings, "made_from": made_from,
                          "model": model.state_dict(), "optimizers": [each.state_dict() for each in both], "step": step,
                          "best": best, "history": history, "seconds": seconds, "order": order.to(small),
                          "val_order": val_order.to(small), "bfloat16": kind == torch.bfloat16})

    def leave():
        bar.close()
        if rank == 0:
            remember()
            print(f"stopped at step {step}: the same command with --resume goes on from {unfinished}")
        raise KeyboardInterrupt

    def heads_orders(rows, parallel=0):
        """The orders in which the head would draw rows [n] of tokens.pt now, in so many steps: [n, N]."""
        found = []
        for part in tqdm(rows.split(images_at_once(model) * world), desc="orders", unit="batch", disable=rank > 0,
                         dynamic_ncols=True):
            found.append(shared_orders(model, tokens[part].cpu(), captions[part].cpu(), kind, rank, world, headed=True,
                                       parallel=parallel))
            if interrupted(stop, device):
                leave()
        return torch.cat(found)

    def several_at_once(batch, part):
        """Which images [n] come, in this round, in the order in which --parallel steps would draw them: bool [n]."""
        return (batch + part) % ONE_IN == 0 if args.parallel and part else torch.zeros(len(batch), dtype=torch.bool)

    if rank == 0:
        if args.order in ("inferred", "class") and file["made_from"]["model"] != made_from["model"]:
            print(f"the orders in {args.out}/orders.pt were inferred by another model than {source}")
        print(f"{len(images):,} images in {args.order} order" + f", later of {len(train):,}" * (args.rounds > 1)
              + f", {len(val)} to check; before: {evaluate()[0]:.3f} nats per token; learning rate {args.lr}")
    stop, saved = on_interrupt(), time.time()
    bar = tqdm(total=args.steps, initial=step, desc=name, unit="step", disable=rank > 0, dynamic_ncols=True)
    say = (lambda line: None) if rank else bar.write
    while step < args.steps:
        start, chance = time.time(), seeded(args.seed, step)
        part = bisect.bisect(begins, step) - 1                             # the round
        if step and step == begins[part]:
            seen = torch.tensor(sorted({i for k in range(begins[part], begins[part + 1])
                                        for i in batch_of(k, args.batch, len(train), args.seed)}))     # in this round
            some = several_at_once(seen, part)
            found = heads_orders(torch.cat((train[seen[~some]], val)))
            several = heads_orders(train[seen[some]], args.parallel) if some.any() else found[:0]
            images, order = train, torch.zeros(len(train), N, dtype=torch.long)
            order[seen[~some]], order[seen[some]] = found[:-len(val)], several         # the others are not asked for
            old, val_order = val_order, found[-len(val):].to(device)
            best = math.inf                                                # losses in other orders do not compare
            agree = rank_correlation(rank_of(old), rank_of(val_order))
            say(f"round {part + 1}: orders of the head, rank correlation {agree:.3f} with those before; "
                f"held out {evaluate()[0]:.3f} nats per token")
        batch = torch.tensor(batch_of(step, args.batch, len(images), args.seed))
        o = random_order(args.batch, N, chance) if args.order == "random" else order[batch]
        o, given = given_first(o, grid["rows"], grid["cols"], chance)
        told = torch.rand(args.batch, 1, generator=chance) >= DROP
        chosen = torch.arange(N) >= given                                  # [B, N], locations not given but chosen
        chosen = (chosen & ~several_at_once(batch, part)[:, None]).float()              # what the head learns
        chosen /= chosen.mean().clamp(min=1e-9)        # over all processes: the mean of their means is then the mean
        mine = slice(rank, None, world)                                    # each takes its share
        pick, o, chosen, told = (x[mine].to(device) for x in (images[batch], o, chosen, told))
        t = tokens[pick]
        rate = learning_rate(step - begins[part], begins[part + 1] - begins[part], args.lr)
        with torch.autocast(device.type, kind, enabled=kind != torch.float32):
            what, where = parallel(t, captions[pick] * told, o)            # [B, N, V], [B, N, N]
            loss = F.cross_entropy(what.flatten(0, 1), t.gather(1, o).flatten())
            place = (location_loss(where, o) * chosen).mean()
        (loss + place).backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)           # of all processes: they fail together
        if not math.isfinite(loss.item() + place.item() + norm.item()):
            raise UserError(f"the loss is {loss.item()}, its gradient {norm.item()}, at step {step}: "
                            + f"{target} keeps the last good model; " * (best < math.inf)
                            + f"try --lr {args.lr / 3:.2g}")
        for optimizer in both:
            optimizer.param_groups[0]["lr"] = rate
            optimizer.step()
            optimizer.zero_grad()
        step += 1
        seconds += time.time() - start
        bar.update()
        bar.set_postfix_str(f"loss {loss.item():.3f}, {step * args.batch / max(seconds, 1e-9):.0f} images/s",
                            refresh=False)
        if step % max(1, args.steps // 8) == 0 or step in begins:
            value, nats, hits = evaluate()
            history.append((step, loss.item(), value))
            say(f"step {step:5d}  loss {loss.item():.3f}  held out {value:.3f} nats per token; next location "
                      f"{nats:.3f} nats, {hits:.0%} right" + ("  best" if value < best else ""))
            if value < best:
                best = value
                if rank == 0:
                    save_model(target, model, made_from=made_from, order=args.order,
                               step=start_model.about["step"] + step,
                               held_out=value, batch=args.batch, data=held["config"]["data"],
                               tokens_seen=start_model.about["tokens_seen"] + step * args.batch * N,
                               seconds=start_model.about["seconds"] + seconds,
                               caption_rank=file["caption_rank"], captions=held["captions"],
                               score=file["config"]["score"], distance=file["config"]["distance"])
        if interrupted(stop, device):
            leave()
        if rank == 0 and time.time() - saved > SAVE_EVERY:
            remember()
            saved = time.time()
    bar.close()
    if rank:
        return
    if os.path.exists(unfinished):
        os.remove(unfinished)
    loss_curve(history, os.path.join(args.out, f"{name}_loss.png"))
    if args.order == "inferred":
        guess = shared_orders(load_model(target, device), tokens[val].cpu(), captions[val].cpu(), kind, headed=True)
        agree = (rank_correlation(rank_of(guess), rank_of(other.cpu()))
                 for other in (specialised_orders("inferred", file, held, val), val_order))
        print("the order head's own orders of the images to check correlate by {:.3f} with the inferred ones, "
              "by {:.3f} with those of the last round".format(*agree))
    print(f"{target}: {best:.3f} nats per token held out, {seconds:.0f} s\n"
          f"next: python sample.py --model {target} --order {'learned' if args.order == 'inferred' else args.order}")


if __name__ == "__main__":
    run(main)
