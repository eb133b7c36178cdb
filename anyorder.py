"""The idea: one causal transformer that draws the cells of an image in *any order it is given*.

    log p(x | caption, order) = sum_k log p(x[o_k] | caption, x[o_0] .. x[o_(k-1)], o_0 .. o_k)

with k = 0 .. N-1. The chain rule holds for every order of the N cells. A raster model learns one of
these sums. This model learns all of them: it trains on a fresh random order for every image and
every step (arXiv 2504.17069, section 3). There are N inputs for N cells. The input at step k says
what was drawn last and where that is, and it says which cell comes next:

    step           0              1                     2
    drawn last     start          x[o_0] at o_0         x[o_1] at o_1
    next cell      o_0            o_1 and o_1 - o_0     o_2 and o_2 - o_1
                   |              |                     |
    [ caption ] -> causal transformer -> ...
                   |              |                     |
    predicts       x[o_0]         x[o_1]                x[o_2]

Why is the next cell given twice? Its absolute position says what to expect there: sky is above and
sea is below. Its position relative to the last cell says how to continue: "one to the left" is
learned once and then holds everywhere. (The paper calls this the double position.)

reads    out/tokens.pt and out/tokenizer.pt (where they are missing, tokenizer.py runs first)
writes   out/anyorder.pt (or out/raster.pt with --order raster), samples and a loss curve beside it
run      python anyorder.py                          the built-in sunsets: 3 to 11 min, 2 cores
         python anyorder.py --data photos --size 64  your own images, at 64x64 pixels
you see  samples in random order in out/anyorder.png: sun, sky and sea are there, details may clash
not here choosing an order (order_infer.py), learning from it (finetune.py), guidance (sample.py)

Read sections 1 to 4. Section 5 computes attention fast; it changes no result.
"""

import difflib
import functools
import math
import os
import sys
import time

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

try:                    # Triton comes with torch for CUDA only
    import triton
    import triton.language as tl
except ImportError:
    triton = None

from data import (Checkpoint, UserError, arguments, autocast, batch_of, command_line, in_turn, join,
                  load, loss_curve, number, pick_device, precision, printable, progress, restore,
                  run, save, save_picture, seeded, sheet, words_of, writable)
from tokenizer import (Muon, learning_rate, make_tokens, open_tokenizer, open_tokens, update,
                       vocabulary)

HEAD = 32       # channels per attention head
DROP = 0.1      # share of training captions replaced by none, which makes guidance possible later


# -------------------------------------------------------------------------------------------------
# 1. Orders. order[b, k] is the cell visited at step k; rank[b, cell] is the step of that visit.

def raster_order(B, N, generator=None, cols=None):
    """Left to right, top to bottom: order [B, N] int64 with order[b, k] = k."""
    return torch.arange(N).repeat(B, 1)


def random_order(B, N, generator=None, cols=None):
    """B independent, uniform permutations of N cells: order [B, N] int64."""
    return torch.rand(B, N, generator=generator).argsort(1)


# The orders that are fixed before drawing begins. A new one is a function with these arguments and
# a line here: all scripts take their choices from this table. `generator` is a CPU generator;
# `cols` is the width of the grid.
FIXED_ORDERS = {"raster": raster_order, "random": random_order}


def rank_of(order):
    """The inverse permutation: order [B, N] -> rank [B, N], or rank -> order.

    On a 2x2 grid, the order [2, 0, 3, 1] visits bottom left, top left, bottom right, top right.
    Its rank is [1, 3, 0, 2], the step at which each cell is drawn:
        1 3
        0 2
    """
    step = torch.arange(order.shape[1], device=order.device)
    return torch.empty_like(order).scatter_(1, order, step.expand_as(order))


# -------------------------------------------------------------------------------------------------
# 2. The model

class Block(nn.Module):
    """A pre-norm transformer layer: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, D, layers):
        super().__init__()
        self.heads = D // HEAD
        self.norm1, self.norm2 = nn.LayerNorm(D), nn.LayerNorm(D)
        self.qkv = nn.Linear(D, 3 * D, bias=False)
        self.proj = nn.Linear(D, D, bias=False)
        self.up, self.down = nn.Linear(D, 4 * D, bias=False), nn.Linear(4 * D, D, bias=False)
        # residual branches start small (GPT-2)
        for weight in (self.proj.weight, self.down.weight):
            nn.init.normal_(weight, std=0.02 / math.sqrt(2 * layers))

    def forward(self, x):
        return self.merge(x, fused_attention(*self.split(x)))

    def split(self, x):
        """x [B, T, D] -> q, k, v, each [B, heads, T, d]: views of one product."""
        B, T, D = x.shape
        qkv = self.qkv(self.norm1(x)).view(B, T, 3, self.heads, HEAD)
        return [y.transpose(1, 2) for y in qkv.unbind(2)]

    def merge(self, x, y):
        """x [B, T, D] plus the attention output y [B, heads, T, d], then plus the MLP."""
        x = x + self.proj(y.transpose(1, 2).flatten(2))  # [B, T, heads, d] -> [B, T, D]
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class AnyOrder(nn.Module):
    """The any-given-order transformer.

    config: rows, cols (of the grid), codebook V, width D (a multiple of 32), layers, order_head
    (bool), words (the vocabulary, a list of str), caption_length L.
    tokens [B, N] int64 are always in raster layout, whatever the order [B, N] int64.
    """

    def __init__(self, config):
        super().__init__()
        self.config = dict(config)
        rows, cols = config["rows"], config["cols"]
        D, V, N = config["width"], config["codebook"], rows * cols
        self.N, self.V = N, V
        self.content = nn.Embedding(V + 1, D)  # number V: start, nothing is drawn yet
        self.at = nn.Embedding(N + 1, D)  # number N: nowhere yet
        self.next = nn.Embedding(N, D)
        self.relative = nn.Embedding((2 * rows - 1) * (2 * cols - 1) + 1, D)
        self.word = nn.Embedding(len(config["words"]) + 1, D)  # number 0: none, or unknown
        self.word_at = nn.Embedding(config["caption_length"], D)
        self.norm = nn.LayerNorm(D)
        self.to_token = nn.Linear(D, V, bias=False)  # what is there?
        if config["order_head"]:  # where next? finetune.py trains this
            self.to_cell = nn.Sequential(nn.Linear(2 * D, D), nn.GELU(), nn.Linear(D, N))
        for module in self.modules():
            if isinstance(module, (nn.Embedding, nn.Linear)):
                nn.init.normal_(module.weight, std=0.02)
        # after this loop, since blocks have their own initialisation
        self.blocks = nn.ModuleList(Block(D, config["layers"]) for _ in range(config["layers"]))
        self.start_positions(rows, cols)
        # how often each code occurs in the training images, for the `calibrated` score
        self.register_buffer("frequency", torch.full((V,), 1 / V))
        self.register_buffer("hop", hop_table(rows, cols), persistent=False)
        self.number = {word: i + 1 for i, word in enumerate(config["words"])}

    @torch.no_grad()
    def start_positions(self, rows, cols):
        """Initialise positions as sinusoids along rows and columns. One cell to the left is then
        the same rotation everywhere, so attention learns it once and not for each cell."""
        D = self.config["width"]
        place = torch.cartesian_prod(torch.arange(rows), torch.arange(cols)).float()  # [N, 2]
        # from an eighth of a turn to one and a half turns across the grid
        turns = torch.linspace(0.25, 3, D // 4) * math.pi / max(rows, cols)
        phase = place[..., None] * turns  # [N, 2, D / 4]
        waves = 0.06 * torch.cat((phase.cos(), phase.sin()), 1).flatten(1)  # [N, D]
        self.at.weight[:self.N] = waves
        # the same waves with shuffled channels, so that "is at" and "comes next" differ
        self.next.weight.copy_(waves[:, torch.randperm(D)])

    def embed_words(self, words):
        return self.word(words) + self.word_at.weight  # [B, L, D]

    def embed_drawn(self, token, cell):
        return self.content(token) + self.at(cell)  # what was drawn, and where

    def embed_next(self, cell, following):
        return self.next(following) + self.relative(self.hop[cell, following])

    def logits(self, tokens, words, order):
        """The output of both heads at each step k of `order`.

        tokens [B, N], words [B, L], order [B, N] -> what [B, N, V]: logits for the content of cell
        o_k; where [B, N, N]: logits for o_k itself, None without an order head. The input of step k
        contains o_k, so its output would give the answer away. The order head reads the output of
        step k - 1, which knows all but the token drawn last; so that token is added.
        """
        L = words.shape[1]
        by_step = tokens.gather(1, order)  # [B, N]
        last_token = F.pad(by_step[:, :-1], (1, 0), value=self.V)
        last_cell = F.pad(order[:, :-1], (1, 0), value=self.N)
        drawn = self.embed_drawn(last_token, last_cell)  # [B, N, D]
        steps = drawn + self.embed_next(last_cell, order)
        x = torch.cat((self.embed_words(words), steps), 1)  # [B, L + N, D]
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        where = None
        if self.config["order_head"]:
            # the output before each step; before step 0 that is the last caption word's
            where = self.next_location(drawn, x[:, L - 1:-1])
        return self.to_token(x[:, L:]), where

    def next_location(self, drawn, before):
        """Logits over all N cells, from what was drawn last and the output of the step before."""
        return self.to_cell(torch.cat((F.layer_norm(drawn, drawn.shape[-1:]), before), -1))

    def forward(self, tokens, words, order):
        """The loss of each step, in nats: (token_nats [B, N], cell_nats [B, N]).

        token_nats is -log p(x[o_k]). cell_nats is -log p(o_k) by the order head over the cells that
        are still free, None without an order head. Training minimises their means.
        """
        what, where = self.logits(tokens, words, order)
        token_nats = cross_entropy(what, tokens.gather(1, order))
        cell_nats = None
        if where is not None:
            cell_nats = cross_entropy(over_free(where, order), order)
        return token_nats, cell_nats

    def log_probs(self, tokens, captions, order):
        """log p of the content at each step of `order`, in nats: [B, N]. Their sum is exactly
        log p(image) if each o_k was chosen from the past only (for any fixed order it is)."""
        return -self(tokens, self.read(captions), order)[0]

    def read(self, captions):
        """B strings -> [B, L] int64 numbers of words. 0 stands for no word and for unknown ones."""
        L = self.config["caption_length"]
        rows = []
        for caption in captions:
            numbers = [self.number.get(word, 0) for word in words_of(caption)]
            rows.append((numbers + [0] * L)[:L])
        return torch.tensor(rows, dtype=torch.long, device=self.hop.device).view(len(rows), L)

    def check_words(self, captions):
        """UserError for a word that no training caption had; it names the nearest known ones.
        Warns of captions longer than the model reads."""
        L = self.config["caption_length"]
        words = {word for caption in captions for word in words_of(caption)}
        for word in sorted(words - set(self.number)):
            near = difflib.get_close_matches(word, self.number, n=3, cutoff=0.5)
            near = near or sorted(self.number)[:5] or ["no caption"]
            raise UserError(f"caption word {word!r} was never seen in training: "
                            f"try {', '.join(near)}")
        for caption in captions:
            if len(words_of(caption)) > L:
                print(f"warning: caption {caption!r} has {len(words_of(caption))} words, "
                      f"the model reads the first {L}")


def hop_table(rows, cols):
    """hop[a, b] numbers the offset from cell a to cell b, in rows and columns: [N + 1, N]. The last
    row is the offset from nowhere, which has a number of its own."""
    cell = torch.arange(rows * cols)
    down = cell[None] // cols - cell[:, None] // cols + rows - 1  # 0 .. 2 rows - 2
    right = cell[None] % cols - cell[:, None] % cols + cols - 1  # 0 .. 2 cols - 2
    from_nowhere = torch.full((1, rows * cols), (2 * rows - 1) * (2 * cols - 1))
    return torch.cat((down * (2 * cols - 1) + right, from_nowhere))


def over_free(where, order):
    """Order-head logits [B, N, N] with -inf for drawn cells: at step k, the cells of rank < k."""
    step = torch.arange(order.shape[1], device=order.device)
    drawn = rank_of(order)[:, None, :] < step[None, :, None]  # [B, step, cell]
    return where.float().masked_fill(drawn, -math.inf)


def cross_entropy(logits, target):
    """-log p of each target: logits [B, N, V], target [B, N] -> nats [B, N]."""
    flat = F.cross_entropy(logits.flatten(0, 1).float(), target.flatten(), reduction="none")
    return flat.view(target.shape)


# -------------------------------------------------------------------------------------------------
# 3. Drawing

@torch.inference_mode()
def draw(model, captions, order, generator=None):
    """Sampling in a given order [B, N], at temperature 1: tokens [B, N]. sample.py adds guidance,
    given cells and orders that the model chooses; the loop stays the same."""
    drawing = Drawing(model, model.read(captions))
    tokens = torch.empty_like(order)
    first = order.new_zeros(len(order), 1)
    for cell in order.split(1, dim=1):  # [B, 1]
        p = drawing.look(cell)[:, 0].float().softmax(-1)
        token = one_of(p, generator)
        tokens.scatter_(1, cell, token)
        drawing.place(first, token)
    return tokens


class Drawing:
    """B images being drawn: the model with its key/value cache, the cached twin of `logits`.

        drawing = Drawing(model, words)     words [B, L] from model.read(captions)
        logits = drawing.look(cells)        what would be drawn at these free cells [B, C], if it
                                            came next? -> [B, C, V]
        drawing.place(choice, token)        choice [B, n] indexes the cells last looked at;
                                            token [B, n] is drawn there

    Looking at C cells means C copies of the next input, which differ in the next cell only. Each
    copy attends to the shared cache and to itself (`candidate_attention`). Placing keeps the keys
    and values of the chosen copy and forgets the others.

    Cells that are placed together were predicted without each other. They enter the cache one after
    another, so that every later step sees all of them, as in `logits`.
    """

    def __init__(self, model, words):
        B, L = words.shape
        device, D = words.device, model.config["width"]
        shape = (len(model.blocks), B, D // HEAD, L + model.N, HEAD)
        dtype = model.norm.weight.dtype
        if torch.is_autocast_enabled(device.type):
            dtype = torch.get_autocast_dtype(device.type)
        self.model = model
        self.k = torch.empty(shape, device=device, dtype=dtype)
        self.v = torch.empty(shape, device=device, dtype=dtype)
        self.length = 0  # inputs in the cache
        self.before = self.enter(model.embed_words(words))[:, -1:]  # [B, 1, D], last output
        self.length = L
        self.cell = words.new_full((B, 1), model.N)  # nowhere yet
        self.drawn = model.embed_drawn(words.new_full((B, 1), model.V), self.cell)

    def enter(self, x):
        """Run inputs x [B, n, D], one after another, and write them behind the cache's end:
        outputs [B, n, D]. The caller advances `length`; until then the next call overwrites them.
        """
        start, end = self.length, self.length + x.shape[1]
        later = None
        if x.shape[1] > 1:
            later = x.new_full((end - start, end), -math.inf).triu(start + 1)
        for i, block in enumerate(self.model.blocks):
            q, k, v = block.split(x)
            self.k[i, :, :, start:end] = k
            self.v[i, :, :, start:end] = v
            y = cached_attention(q, self.k[i, :, :, :end], self.v[i, :, :, :end], later)
            x = block.merge(x, y)
        return self.model.norm(x)

    def look(self, cells):
        x = self.drawn + self.model.embed_next(self.cell, cells)  # [B, C, D]
        self.cells, self.candidates = cells, []
        if cells.shape[1] == 1:  # there is no choice, so its keys can go to the cache now
            self.after = self.enter(x)
            return self.model.to_token(self.after)
        for i, block in enumerate(self.model.blocks):
            q, k, v = block.split(x)
            self.candidates.append((k, v))
            past_k, past_v = self.k[i, :, :, :self.length], self.v[i, :, :, :self.length]
            x = block.merge(x, candidate_attention(q, k, v, past_k, past_v))
        self.after = self.model.norm(x)  # [B, C, D]
        return self.model.to_token(self.after)

    def place(self, choice, token):
        row, first = torch.arange(len(choice), device=choice.device), choice[:, 0]
        for i, (k, v) in enumerate(self.candidates):
            self.k[i, :, :, self.length] = k[row, :, first]
            self.v[i, :, :, self.length] = v[row, :, first]
        self.length += 1
        self.before = self.after[row, first][:, None]
        cell = self.cells.gather(1, choice)  # [B, n]
        drawn = self.model.embed_drawn(token, cell)  # [B, n, D]
        if choice.shape[1] > 1:  # each of the others follows the one placed before it
            steps = drawn[:, :-1] + self.model.embed_next(cell[:, :-1], cell[:, 1:])
            self.before = self.enter(steps)[:, -1:]
            self.length += steps.shape[1]
        self.cell, self.drawn = cell[:, -1:], drawn[:, -1:]

    def next_location(self):
        """The order head's logits for the next cell, drawn ones included: [B, N]."""
        return self.model.next_location(self.drawn, self.before)[:, 0]


def one_of(p, generator=None):
    """A random number for each row of probabilities p [n, V]: [n, 1] int64. One uniform number
    inverts the cumulative sum; torch.multinomial would draw V random numbers per row."""
    total = p.cumsum(-1)
    # in (0, 1], so the first sum that reaches it belongs to a token of p > 0
    height = 1 - torch.rand(len(p), 1, generator=generator, device=p.device)
    return torch.searchsorted(total, height * total[:, -1:])


# -------------------------------------------------------------------------------------------------
# 4. Training

def train(model, data, args, device, checkpoint, state, show_samples):
    """The any-order training loop. Every step takes new images and new orders.

    `state` holds what a run goes on from: step, seconds, history, best and dtype, and for a resumed
    run also model and optimizers. Returns it, with the best model so far in state["best"].
    show_samples() draws some images with the model as it is.
    """
    process, world = join(device)
    tokens, words = data["tokens"].to(device), read_captions(model, data)
    train_rows, check_rows = split_rows(data, args.limit)
    dtype = state["dtype"]
    optimizers = make_optimizers(model, args.lr, dtype)
    if "optimizers" in state:
        for optimizer, saved in zip(optimizers, state["optimizers"]):
            optimizer.load_state_dict(saved)
    ddp = nn.parallel.DistributedDataParallel(model) if world > 1 else model
    cols, make_order = model.config["cols"], FIXED_ORDERS[args.order]
    check_order = make_order(len(check_rows), model.N, seeded(args.seed, "check"), cols).to(device)
    share = slice(process, None, world)  # of each batch, this process takes a part

    def now():
        return {**state, "model": model.state_dict(),
                "optimizers": [optimizer.state_dict() for optimizer in optimizers]}

    bar = progress(args.steps, args.order, "step", state["step"])
    for step in range(state["step"], args.steps):
        start = time.time()
        # the dice depend on the seed and the step alone, so a resumed run repeats them
        dice = seeded(args.seed, step)
        picked = batch_of(step, args.batch, len(train_rows), args.seed)
        rows = train_rows[picked][share].to(device)
        order = make_order(args.batch, model.N, dice, cols)[share].to(device)
        captioned = (torch.rand(args.batch, 1, generator=dice) >= DROP)[share].to(device)
        with autocast(device, dtype):
            # word number 0 is no word: * 0 takes the caption away
            nats, _ = ddp(tokens[rows], words[rows] * captioned, order)  # [B, N]
            loss = nats.mean()
        rate = learning_rate(step, args.steps, args.lr)
        loss = update(loss, model, optimizers, rate, step)
        state["step"], state["seconds"] = step + 1, state["seconds"] + time.time() - start
        bar.update()
        bar.set_postfix_str(f"loss {loss:.3f}", refresh=False)
        if is_report(step + 1, args.steps):
            with autocast(device, dtype):
                value, _ = held_out_loss(model, tokens[check_rows], words[check_rows], check_order)
            state["history"] = state["history"] + [(step + 1, loss, value)]
            keep_best(state, model, value)
            bar.write(f"step {step + 1:5d}  loss {loss:.3f}  held out {value:.3f} nats per token")
            if process == 0:
                show_samples()
        checkpoint.after_step(now, step + 1)
    bar.close()
    return state


def is_report(step, steps):
    """Whether to measure the held-out loss after this step: the first, the last, 11 between."""
    return step == 1 or step == steps or step % max(1, steps // 12) == 0


def keep_best(state, model, value):
    """Remember the weights if `value`, the held-out loss, is the lowest so far."""
    if value < state["best"]["held_out"]:
        weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        state["best"] = {"held_out": value, "step": state["step"], "model": weights}


def new_state(device):
    """The state of a run that has not begun. All processes take the dtype that process 0 found."""
    best = {"held_out": math.inf, "step": 0, "model": {}}
    return {"step": 0, "seconds": 0.0, "history": [], "best": best,
            "dtype": in_turn([precision(device)])[0]}


@torch.no_grad()
def held_out_loss(model, tokens, words, order):
    """Mean nats per token, and per cell that the order head picks (None without one), of images
    that the model does not train on: (float, float or None)."""
    token_nats, cell_nats = [], []
    batch = max(1, 2 ** 14 // model.N)  # 256 images of 64 cells at once
    for part in zip(tokens.split(batch), words.split(batch), order.split(batch)):
        of_tokens, of_cells = model(*part)
        token_nats.append(of_tokens)
        cell_nats.append(of_cells)
    cell_mean = None
    if model.config["order_head"]:
        cell_mean = torch.cat(cell_nats).mean().item()
    return torch.cat(token_nats).mean().item(), cell_mean


def split_rows(data, limit=0):
    """Rows of tokens.pt to train on (the first `limit`, 0 for all), and up to 512 to check on."""
    train_rows = (data["split"] == 0).nonzero()[:, 0]
    train_rows = train_rows[:limit or None]
    check_rows = (data["split"] == 1).nonzero()[:512, 0]
    if not len(check_rows):  # a handful of images leaves none for validation
        check_rows = train_rows[:512]
    return train_rows, check_rows


def read_captions(model, data):
    """The word numbers of every image's caption: [n, L] on the model's device."""
    return model.read(data["captions"])[data["caption_index"].long().to(model.hop.device)]


def new_model(data, tokenizer, args, device):
    """An untrained AnyOrder for these tokens. It begins with what the data already tell."""
    words, length = vocabulary(data)
    grid = data["config"]
    torch.manual_seed(args.seed)
    model = AnyOrder({"rows": grid["rows"], "cols": grid["cols"], "codebook": grid["codebook"],
                      "width": args.width, "layers": args.layers, "order_head": False,
                      "words": words, "caption_length": length}).to(device)
    # codes that look alike begin with similar embeddings: a random projection of the codebook
    book = (tokenizer.codebook - tokenizer.codebook.mean(0)) / tokenizer.codebook.std()  # [V, dim]
    mix = torch.randn(book.shape[1], args.width) * 0.04 / book.shape[1] ** 0.5
    used = data["tokens"][split_rows(data, args.limit)[0]]
    count = torch.bincount(used.flatten(), minlength=model.V)
    with torch.no_grad():
        model.content.weight[:model.V] += book @ mix.to(device)
        model.frequency.copy_((count + 1) / (used.numel() + model.V))
    return model


def tokens_for(args, world):
    """The tokens in OUT. Where there are none, a tokenizer is trained first."""
    path = os.path.join(args.out, "tokens.pt")
    if not os.path.exists(path):
        if world > 1:
            make = command_line("tokenizer.py", "--data", args.data or "sunsets", "--out", args.out)
            raise UserError(f"{path} does not exist: run {make} first, by itself")
        print(f"{printable(path)} does not exist: training a tokenizer first")
        make_tokens(data=args.data or "sunsets", out=args.out, size=args.size or 32,
                    seed=args.seed, device=args.device, resume=args.resume)
        args.resume = False  # the tokenizer was interrupted, this model never began
    data = open_tokens(args.out, args.data)
    size = data["config"]["size"]
    if args.size and args.size != size:
        raise UserError(f"--size {args.size}: the tokens in {printable(args.out)} are of images of "
                        f"{size} pixels, give another --out for another size")
    return data


def starting_state(checkpoint, model, target, settings, args, device):
    """What training goes on from: a new state, an unfinished run, or a finished one that is to
    train longer. The learning rate follows the schedule of the new --steps; a finished file holds
    no optimizer state, so momentum begins anew."""
    state = checkpoint.state or new_state(device)
    if args.resume and not checkpoint.state:
        finished = load_model(target, device)
        about = finished.about
        same = finished.config == model.config and about["made_from"] == settings["tokens.pt"]
        if not same or args.steps <= about["steps"]:
            raise UserError(f"{printable(target)} is a finished run of {about['steps']} steps: "
                            "give the same flags and more --steps to train it longer, or leave "
                            "out --resume to start again")
        print(f"training goes on from {printable(target)}, step {about['step']}")
        state["step"], state["seconds"] = about["step"], about["seconds"]
        state["model"] = finished.state_dict()
        keep_best(state, finished, about["held_out"])
    if "model" in state:
        model.load_state_dict(state["model"])
    if state["step"] > args.steps:
        raise UserError(f"--steps {args.steps}: the run that --resume goes on with has made "
                        f"{state['step']} already, give more")
    return state


def parse():
    """The flags of the command line."""
    parser = arguments(__doc__)
    parser.add_argument("--size", type=number(int, 1, 4096), default=None,
                        help="side of the images in pixels, for the tokenizer (default: 32)")
    parser.add_argument("--order", choices=tuple(FIXED_ORDERS), default="random",
                        help="random: any given order; others, such as raster, are baselines")
    parser.add_argument("--steps", type=number(int, 1), default=1000, help="training steps")
    parser.add_argument("--batch", type=number(int, 1), default=32,
                        help="images per step, over all processes")
    parser.add_argument("--lr", type=number(float, 1e-9, 1), default=6e-3,
                        help="peak learning rate")
    parser.add_argument("--width", type=number(int, HEAD), default=128,
                        help=f"model width, a multiple of {HEAD}")
    parser.add_argument("--layers", type=number(int, 1), default=4, help="transformer layers")
    parser.add_argument("--limit", type=number(int, 0), default=0,
                        help="train on the first N training images only (0: all)")
    parser.add_argument("--resume", action="store_true",
                        help="go on with an interrupted run, or with more --steps after its end")
    args = parser.parse_args()
    if args.width % HEAD:
        near = max(1, round(args.width / HEAD)) * HEAD
        raise UserError(f"--width {args.width} is not a multiple of {HEAD}: try {near}")
    return args


def main():
    args = parse()
    device = pick_device(args.device)
    process, world = join(device, args.batch)
    data = tokens_for(args, world)
    writable(args.out)
    tokenizer = open_tokenizer(args.out, data, device)
    model = new_model(data, tokenizer, args, device)
    name = "anyorder" if args.order == "random" else args.order
    target = os.path.join(args.out, name + ".pt")
    made_from = {**data["made_from"], "tokens": data["fingerprint"]}
    settings = {**model.config, "tokens.pt": made_from, "optimizer": "Muon"}
    for flag in ("order", "batch", "lr", "limit", "seed"):
        settings[flag] = getattr(args, flag)
    unfinished = os.path.join(args.out, name + "_resume.pt")
    checkpoint = Checkpoint(unfinished, settings, args.resume, "python anyorder.py")
    state = starting_state(checkpoint, model, target, settings, args, device)
    describe(model, data, args, state, device)
    picture = os.path.join(args.out, name + ".png")
    print(f"{printable(picture)}: samples, drawn anew at each report")
    show_samples = functools.partial(show, model, tokenizer, data, args, picture)
    state = train(model, data, args, device, checkpoint, state, show_samples)
    if process:
        return
    best = state["best"]
    model.load_state_dict(best["model"])
    save_model(target, model, made_from=made_from, order=args.order, step=best["step"],
               steps=args.steps, held_out=best["held_out"], batch=args.batch, limit=args.limit,
               tokens_seen=best["step"] * args.batch * model.N, seconds=state["seconds"],
               data=data["config"]["data"], captions=data["captions"])
    checkpoint.done()
    loss_curve(state["history"], os.path.join(args.out, name + "_loss.png"), math.log(model.V))
    captions = show_samples()
    print(f"{printable(target)}: {best['held_out']:.3f} nats per token held out, "
          f"{state['seconds']:.0f} s")
    print(f"{printable(picture)}: samples of {captions[:4]} and others")
    if name == "anyorder":
        print("next: " + command_line("order_infer.py", "--out", args.out))


def describe(model, data, args, state, device):
    """Print what is about to be trained."""
    train_rows, check_rows = split_rows(data, args.limit)
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    dtype = str(state["dtype"]).removeprefix("torch.")
    print(f"{len(train_rows):,} images to train on, {len(check_rows)} to check, {model.N} cells, "
          f"{model.V} codes, {len(model.config['words'])} words")
    print(f"{millions:.2f}M parameters in {dtype} on {device}; a model that knows nothing "
          f"loses ln({model.V}) = {math.log(model.V):.3f} nats per token")


def show(model, tokenizer, data, args, path):
    """Draw 32 samples in the order that was trained, for captions of validation images."""
    rows = split_rows(data, args.limit)[1]
    captions = [data["captions"][i] for i in data["caption_index"][rows].tolist()]
    captions = (captions * 32)[:32]
    device = model.hop.device
    order = FIXED_ORDERS[args.order](32, model.N, seeded(args.seed, "sheet"), model.config["cols"])
    dice = torch.Generator(device).manual_seed(args.seed)
    drawn = draw(model, captions, order.to(device), dice)
    scale = max(1, 128 // data["config"]["size"])
    save_picture(path, sheet(tokenizer.decode(drawn), 8, scale))
    return captions


# -------------------------------------------------------------------------------------------------
# Files and optimizers: skip this on a first reading

def save_model(path, model, **about):
    """Write a model with its config and what it was made from; see load_model."""
    save(path, {"kind": "model", "config": model.config,
                "model": model.state_dict(), **about})


def load_model(path, device="cpu"):
    """An AnyOrder in eval mode from a .pt of anyorder.py or finetune.py. `.about` has the rest of
    the file: order, step, held_out, made_from and others. UserError for a missing, broken or
    foreign file."""
    name = os.path.splitext(os.path.basename(path))[0]
    script, _, order = name.partition("_")
    script = "finetune.py" if script == "ordered" else "anyorder.py"
    flags = ["--out", os.path.dirname(path) or "."]
    order = order or name
    if order in FIXED_ORDERS or order == "class":
        flags = ["--order", order, *flags]
    maker = command_line(script, *flags)
    file = load(path, "model", maker)
    model = restore(AnyOrder, file, path, maker)
    model.about = {key: value for key, value in file.items() if key not in ("model", "config")}
    expected = {"order": str, "captions": list, "data": str, "step": int, "tokens_seen": int,
                "seconds": float}
    if not all(isinstance(model.about.get(key), kind) for key, kind in expected.items()):
        raise UserError(f"{printable(path)} is damaged: run {maker} again")
    return model.requires_grad_(False).eval().to(device)


def check_model(model, path, data):
    """UserError unless the model knows any order and was trained on these tokens."""
    made_from = {**data["made_from"], "tokens": data["fingerprint"]}
    if {key: model.about["made_from"].get(key) for key in made_from} != made_from:
        raise UserError(f"{printable(path)} was trained on other tokens than those in tokens.pt: "
                        "give the --out that it was made in")
    if model.about["order"] in FIXED_ORDERS and model.about["order"] != "random":
        raise UserError(f"{printable(path)} knows {model.about['order']} order only: give a model "
                        "that knows any order, such as anyorder.pt")


def make_optimizers(model, lr, dtype):
    """(AdamW for embeddings, norms and heads, Muon for the matrices of the blocks)."""
    matrices, others = [], []
    for name, weight in model.named_parameters():
        is_matrix = name.startswith("blocks") and weight.dim() == 2
        (matrices if is_matrix else others).append(weight)
    adam = torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.95), weight_decay=0.05, fused=True)
    return adam, Muon(matrices, lr, dtype)

# -------------------------------------------------------------------------------------------------
# 5. Attention. Skip this on a first reading: `reference_attention` says what it is, and all that
# follows computes the same, faster: on a CPU, for candidates, on a GPU.


def reference_attention(q, k, v):
    """Causal attention by its definition (Vaswani et al. 2017, eq. 1).

    q, k, v [B, heads, T, d] -> [B, heads, T, d]: row t mixes the values 0..t.
    """
    T, d = q.shape[-2:]
    scores = q @ k.transpose(-1, -2) / math.sqrt(d)  # [B, heads, T, T]
    later = torch.ones(T, T, dtype=torch.bool, device=q.device).triu(1)
    return scores.masked_fill(later, -math.inf).softmax(-1) @ v


def fused_attention(q, k, v):
    """Computes reference_attention: q, k, v [B, heads, T, d] -> [B, heads, T, d].

    One floating type, T >= 1, any strides. Differentiable once. The CPU takes FusedAttention, a GPU
    our kernels where heads are narrow and the work outweighs their start, all else the library.

    On a CPU bfloat16 scores are rounded before the softmax. Scores of trained models reach 17: the
    largest error there is 0.04 (library: 0.02), at 30 it is 0.1 (0.013). Scores in float32 would
    make a training step up to 8% slower.
    """
    with torch.autocast(q.device.type, enabled=False):
        if q.device.type == "cpu":
            return FusedAttention.apply(q, k, v)
        if q.shape[-1] <= HEAD and q.numel() >= 2 ** 22 and has_kernel(q):
            return KernelAttention.apply(q, k, v)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


# On a CPU the time goes into moving scores through memory, not into arithmetic. So we work on
# blocks whose scores fit into the caches: the query rows start..end of some heads meet the keys
# 0..end. Keys after `end` are never computed, and the mask is added as part of the product.

# bytes of scores in a block, at most
BLOCK = 2 ** 22


def blocks(n, T, like):
    """Cuts the scores of n heads with T rows into blocks (heads: a slice, start, end, future).

    future [end - start, end] is 0 where a row sees a key, -inf (-) where the key comes later. For
    T = 6 in blocks of 3 rows, rows 0..3 and 3..6:

        0 - -         0 0 0 0 - -
        0 0 -         0 0 0 0 0 -
        0 0 0         0 0 0 0 0 0
    """
    # Short blocks compute fewer later keys, long ones make faster products.
    best = min(256, 16 * math.isqrt(T) / like.element_size())
    count = max(1, round(T / best))
    rows = math.ceil(T / count)
    heads = max(1, BLOCK // (rows * T * like.element_size()))
    for first in range(0, n, heads):
        # the last rows first: see FusedAttention.backward
        for start in reversed(range(0, T, rows)):
            end = min(start + rows, T)
            future = like.new_full((end - start, end), -math.inf).triu_(start + 1)
            yield slice(first, first + heads), start, end, future


def part(x, heads, start, end):
    """x[heads, start:end], contiguous if bfloat16: its products would copy it each time."""
    x = x[heads, start:end]
    return x.contiguous() if x.dtype == torch.bfloat16 else x


def put(out, a, b, scale=1.0, add=False):
    """out [n, i, k] = scale * a @ b, or += if `add`: a [n, i, j], b [n, j, k]. For the CPU only.

    For float32 with gaps between the heads, baddbmm_ falls back to one product per head.
    """
    if out.is_contiguous() or out.dtype != torch.float32:
        # beta = 0: a CPU ignores what was in `out`. Some GPUs multiply it, and 0 * NaN is NaN.
        out.baddbmm_(a, b, beta=float(add), alpha=scale)
    elif add:
        out += torch.bmm(a, b).mul_(scale)
    else:
        torch.mul(torch.bmm(a, b), scale, out=out)


def block_probs(q, k, future):
    """softmax(q k^T / sqrt(d) + future): q [n, rows, d], k [n, end, d] -> [n, rows, end]."""
    p = torch.baddbmm(future, q, k.transpose(1, 2), alpha=q.shape[-1] ** -0.5)
    return torch.softmax(p, -1, out=p)


class FusedAttention(torch.autograd.Function):
    """P = softmax(Q K^T / sqrt(d)), O = P V. From dO follow the gradients

        dV = P^T dO    dP = dO V^T    dS = P * (dP - rowsum(P * dP))
        dQ = dS K / sqrt(d)           dK = dS^T Q / sqrt(d)

    Short sequences keep P for the backward pass. Long ones (T > 16 d) compute it again, one block
    at a time: memory grows with T, not with T^2.
    """

    @staticmethod
    def forward(ctx, q, k, v):
        B, heads, T, d = q.shape
        q, k, v = (x.reshape(B * heads, T, d) for x in (q, k, v))
        out = torch.empty_like(q)
        kept = []
        for some, start, end, future in blocks(B * heads, T, q):
            p = block_probs(part(q, some, start, end), part(k, some, 0, end), future)
            put(out[some, start:end], p, part(v, some, 0, end))
            if T <= 16 * d:
                kept.append(p)
        ctx.save_for_backward(q, k, v, *kept)
        return out.view(B, heads, T, d)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        q, k, v, *kept = ctx.saved_tensors
        B, heads, T, d = grad.shape
        scale = d ** -0.5
        grad = grad.reshape(B * heads, T, d)
        dq, dk, dv = (torch.empty_like(q) for _ in range(3))
        for some, start, end, future in blocks(B * heads, T, q):
            rows, g = (part(x, some, start, end) for x in (q, grad))
            keys, values = (part(x, some, 0, end) for x in (k, v))
            p = kept.pop(0) if kept else block_probs(rows, keys, future)
            dp = torch.bmm(g, values.transpose(1, 2))
            # dS = P * (dP - rowsum(P * dP)), in place of dP
            ds = torch._softmax_backward_data(dp, p, -1, p.dtype, grad_input=dp)
            put(dq[some, start:end], ds, keys, scale)
            # The last rows come first and see all keys: they overwrite, the others add.
            add = end < T
            put(dv[some, :end], p.transpose(1, 2), g, add=add)
            put(dk[some, :end], ds.transpose(1, 2), rows, scale, add)
        return tuple(x.view(B, heads, T, d) for x in (dq, dk, dv))


def candidate_attention(q, k, v, prefix_k, prefix_v):
    """Attention of C candidates for the next step: each sees the prefix and itself, no other one.

    q, k, v [B, heads, C, d], prefix_k, prefix_v [B, heads, T, d] (also slices of a larger cache)
    -> [B, heads, C, d]. One softmax over T + 1 keys, no mask, no copy of the prefix, no backward.
    """
    B, heads, C, d = q.shape
    T = prefix_k.shape[2]
    if T == 0:
        # Each has only itself to attend to.
        return v.clone()
    if has_kernel(q):
        return kernel_attention(q, prefix_k, prefix_v, k, v)[0]
    out = q.new_empty(B, C, heads, d).transpose(1, 2)
    scale = d ** -0.5
    # e^x = 2^(x / ln 2), which CPUs compute faster
    bits = scale / math.log(2)
    step = max(1, BLOCK // (heads * C * T * q.element_size()))
    for i in range(0, B, step):
        # n = images * heads
        qs, ks, vs, past_k, past_v = (
            x[i:i + step].flatten(0, 1) for x in (q, k, v, prefix_k, prefix_v))
        past_k = past_k.transpose(1, 2)  # [n, d, T]
        own = (qs * ks).sum(-1, keepdim=True)  # [n, C, 1]
        # Scores are relative to the candidate's own score, so no maximum is needed, unless a
        # score lies 69 nats above it.
        p = torch.baddbmm(own, qs, past_k, beta=-bits, alpha=bits).exp2_()  # [n, C, T]
        total = p.sum(-1, keepdim=True).add_(1)
        if (total < 1e30).all():
            found = torch.baddbmm(vs, p, past_v).view(-1, heads, C, d)
            torch.div(found, total.view(-1, heads, C, 1), out=out[i:i + step])
        else:
            past = torch.baddbmm(q.new_zeros(1, 1, 1), qs, past_k, alpha=scale)
            p = torch.cat((past, own * scale), -1).softmax(-1)
            found = torch.bmm(p[..., :-1], past_v).addcmul_(p[..., -1:], vs)
            out[i:i + step] = found.view(-1, heads, C, d)
    return out


def cached_attention(q, k, v, mask=None):
    """Attention of a few queries to all keys: q [B, heads, n, d], k, v [B, heads, T, d] -> like q.

    mask [n, T] is -inf for keys that a query must not see, else 0. No backward pass.
    """
    q3, k3, v3 = (x.flatten(0, 1) for x in (q, k, v))
    mask = q.new_zeros(1, 1, 1) if mask is None else mask.to(q.dtype)
    p = torch.baddbmm(mask, q3, k3.transpose(1, 2), alpha=q.shape[-1] ** -0.5)  # [B * heads, n, T]
    return torch.bmm(torch.softmax(p, -1, out=p), v3).view(q.shape)


# On a GPU one Triton kernel each way does it all, and scores never leave the chip. A program takes
# TILE rows of a head and reads the keys TILE by TILE. Each row holds the largest score so far, the
# sum of the exponentials, and the sum of the values that they weight. A larger score scales both
# sums down (online softmax, Milakov and Gimelshein 2018; FlashAttention, Dao et al. 2022). Only the
# last tile needs the causal mask. The backward pass computes P again, from the logarithm of each
# sum. There a program computes the gradients of its keys and values, from all later rows, then of
# its queries, from all earlier keys: all have about the same work, and no two write to one place.

TILE = 64

if triton:
    # float32: three TF32 products on matrix units are as exact as float32
    EXACT = tl.constexpr("tf32x3")

    @triton.jit
    def read_tile(x, stride, first, T, D: tl.constexpr, TILE: tl.constexpr):
        """Rows first .. first + TILE of x [T, D], 0 after the last: [TILE, D]."""
        row = first + tl.arange(0, TILE)[:, None]
        return tl.load(x + row * stride + tl.arange(0, D)[None, :], mask=row < T, other=0.0)

    @triton.jit
    def write_tile(x, stride, first, T, value, D: tl.constexpr, TILE: tl.constexpr):
        row = first + tl.arange(0, TILE)[:, None]
        tl.store(x + row * stride + tl.arange(0, D)[None, :], value.to(x.dtype.element_ty),
                 mask=row < T)

    @triton.jit
    def attend(q, k, v, out, log, own_k, own_v, heads, C, T, bits,
               qb, qh, qt, kb, kh, kt, ob, oh, ot,
               OWN: tl.constexpr, D: tl.constexpr, TILE: tl.constexpr):
        """Rows q [C, D] of each head see keys k [T, D] up to their own number; with OWN all of
        them, and each row its own in own_k, own_v [C, D]. Strides: qb from image to image, qh from
        head to head, qt from row to row; k and v share theirs, as do q, own_k and own_v."""
        tiles = tl.cdiv(C, TILE)
        first = tl.program_id(0) % tiles * TILE
        pair = (tl.program_id(0) // tiles).to(tl.int64)
        b, h = pair // heads, pair % heads
        k, v = k + b * kb + h * kh, v + b * kb + h * kh
        at = b * qb + h * qh
        row = first + tl.arange(0, TILE)
        rows = read_tile(q + at, qt, first, C, D, TILE)
        if OWN:
            # begin with the own key
            top = tl.sum(rows.to(tl.float32)
                         * read_tile(own_k + at, qt, first, C, D, TILE), 1) * bits
            total = tl.full((TILE,), 1.0, tl.float32)
            found = read_tile(own_v + at, qt, first, C, D, TILE).to(tl.float32)
            whole, end = T // TILE * TILE, T
        else:
            top = tl.full((TILE,), -float("inf"), tl.float32)
            total = tl.zeros((TILE,), tl.float32)
            found = tl.zeros((TILE, D), tl.float32)
            whole, end = first, tl.minimum(first + TILE, T)
        # whole tiles, then the last one
        for masked in tl.static_range(2):
            for start in range(whole if masked else 0, end if masked else whole, TILE):
                keys = read_tile(k, kt, start, T, D, TILE)
                values = read_tile(v, kt, start, T, D, TILE)
                score = tl.dot(rows, tl.trans(keys), input_precision=EXACT) * bits
                if masked:
                    key = start + tl.arange(0, TILE)[None, :]
                    score = tl.where(key < T if OWN else key <= row[:, None], score, -float("inf"))
                higher = tl.maximum(top, tl.max(score, 1))
                p, less = tl.exp2(score - higher[:, None]), tl.exp2(top - higher)
                total = total * less + tl.sum(p, 1)
                found = tl.dot(p.to(values.dtype), values, found * less[:, None],
                               input_precision=EXACT)
                top = higher
        write_tile(out + b * ob + h * oh, ot, first, C, found / total[:, None], D, TILE)
        if not OWN:
            tl.store(log + pair * T + row, top + tl.log2(total), mask=row < T)

    @triton.jit
    def attend_backward(q, k, v, out, log, grad, dq, dk, dv, heads, T, bits, scale,
                        qb, qh, qt, ob, oh, ot, gb, gh, gt, db, dh, dt,
                        D: tl.constexpr, TILE: tl.constexpr):
        """FusedAttention's gradients. P = 2^(bits q k^T - log), rowsum(P * dP) = rowsum(out *
        grad). The strides of dq, dk, dv are db, dh, dt."""
        tiles = tl.cdiv(T, TILE)
        first = tl.program_id(0) % tiles * TILE
        pair = (tl.program_id(0) // tiles).to(tl.int64)
        b, h = pair // heads, pair % heads
        q, k, v = q + b * qb + h * qh, k + b * qb + h * qh, v + b * qb + h * qh
        out = out + b * ob + h * oh
        grad = grad + b * gb + h * gh
        log = log + pair * T
        to = b * db + h * dh
        here = first + tl.arange(0, TILE)

        # as keys and values: what all later rows give back
        keys, values = read_tile(k, qt, first, T, D, TILE), read_tile(v, qt, first, T, D, TILE)
        to_keys, to_values = tl.zeros((TILE, D), tl.float32), tl.zeros((TILE, D), tl.float32)
        for masked in tl.static_range(2):
            for start in range(first if masked else first + TILE,
                               first + TILE if masked else T, TILE):
                row = start + tl.arange(0, TILE)
                rows = read_tile(q, qt, start, T, D, TILE)
                g = read_tile(grad, gt, start, T, D, TILE)
                mean = tl.sum(g.to(tl.float32) * read_tile(out, ot, start, T, D, TILE), 1)
                sums = tl.load(log + row, mask=row < T, other=float("inf"))
                # P^T
                p = tl.exp2(tl.dot(keys, tl.trans(rows), input_precision=EXACT) * bits
                            - sums[None, :])
                if masked:
                    p = tl.where(here[:, None] <= row[None, :], p, 0.0)
                to_values = tl.dot(p.to(g.dtype), g, to_values, input_precision=EXACT)
                ds = p * (tl.dot(values, tl.trans(g), input_precision=EXACT) - mean[None, :])
                to_keys = tl.dot(ds.to(rows.dtype), rows, to_keys, input_precision=EXACT)
        write_tile(dk + to, dt, first, T, to_keys * scale, D, TILE)
        write_tile(dv + to, dt, first, T, to_values, D, TILE)

        # as rows: what all earlier keys give back
        rows = read_tile(q, qt, first, T, D, TILE)
        g = read_tile(grad, gt, first, T, D, TILE)
        mean = tl.sum(g.to(tl.float32) * read_tile(out, ot, first, T, D, TILE), 1)
        sums = tl.load(log + here, mask=here < T, other=float("inf"))
        to_rows = tl.zeros((TILE, D), tl.float32)
        for masked in tl.static_range(2):
            for start in range(first if masked else 0, first + TILE if masked else first, TILE):
                keys = read_tile(k, qt, start, T, D, TILE)
                values = read_tile(v, qt, start, T, D, TILE)
                p = tl.exp2(tl.dot(rows, tl.trans(keys), input_precision=EXACT) * bits
                            - sums[:, None])
                if masked:
                    p = tl.where(start + tl.arange(0, TILE)[None, :] <= here[:, None], p, 0.0)
                ds = p * (tl.dot(g, tl.trans(values), input_precision=EXACT) - mean[:, None])
                to_rows = tl.dot(ds.to(keys.dtype), keys, to_rows, input_precision=EXACT)
        write_tile(dq + to, dt, first, T, to_rows * scale, D, TILE)


def strides(*tensors):
    """The strides of all but the last axis, tensor after tensor."""
    return [stride for x in tensors for stride in x.stride()[:3]]


def alike(*tensors):
    """The tensors with equal strides, the last of them 1, and row offsets that fit 32 bits."""
    same = all(x.stride() == tensors[0].stride() and x.stride(-1) == 1
               and x.stride(-2) * x.shape[-2] < 2 ** 31 for x in tensors)
    return tensors if same else tuple(x.contiguous() for x in tensors)


def kernel_attention(q, k, v, own_k=None, own_v=None):
    """Starts `attend`: q [B, heads, C, d], k, v [B, heads, T, d] -> out, log [B, heads, T]."""
    B, heads, C, d = q.shape
    T = k.shape[2]
    own = own_k is not None
    q, own_k, own_v = alike(q, own_k, own_v) if own else (q, q, q)
    k, v = alike(k, v)
    out = q.new_empty(B, C, heads, d).transpose(1, 2)
    log = q.new_empty(0 if own else (B, heads, T), dtype=torch.float32)
    programs = math.ceil(C / TILE) * B * heads
    # Candidates meet few keys, so reading ahead (num_stages) does not pay.
    stages = 1 if own else 3
    # Triton starts kernels on the current GPU.
    with torch.cuda.device_of(q):
        attend[programs,](q, k, v, out, log, own_k, own_v, heads, C, T, d ** -0.5 / math.log(2),
                          *strides(q, k, out), OWN=own, D=d, TILE=TILE, num_stages=stages)
    return out, log


class KernelAttention(torch.autograd.Function):
    """FusedAttention by the kernels."""

    @staticmethod
    def forward(ctx, q, k, v):
        q, k, v = alike(q, k, v)
        out, log = kernel_attention(q, k, v)
        ctx.save_for_backward(q, k, v, out, log)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        q, k, v, out, log = ctx.saved_tensors
        B, heads, T, d = q.shape
        scale = d ** -0.5
        grad, = alike(grad)
        dq, dk, dv = q.new_empty(B, T, 3, heads, d).permute(2, 0, 3, 1, 4)
        programs = math.ceil(T / TILE) * B * heads
        # num_stages=1: reading ahead takes registers, and fewer programs would run side by side.
        attend_backward[programs,](q, k, v, out, log, grad, dq, dk, dv, heads, T,
                                   scale / math.log(2), scale, *strides(q, out, grad, dq),
                                   D=d, TILE=TILE, num_stages=1)
        return dq, dk, dv


@functools.cache
def kernels_run(device, dtype):
    """True if the kernels compile and run here, else says why, once: Triton or the C compiler that
    it needs may be missing, or the GPU be too old for the type."""
    try:
        if triton is None:
            raise ImportError("Triton is not installed")
        kernel_attention(*torch.zeros(3, 1, 1, 1, HEAD, device=device, dtype=dtype))
    except Exception as error:
        why = f"{type(error).__name__}: {error}".splitlines()[0]
        print(f"no attention kernels for {dtype} on {device}, so slower: {why}", file=sys.stderr)
        return False
    return True


def has_kernel(x):
    """True if the kernels take x [..., d]. Tiles of x must fit on the chip."""
    d = x.shape[-1]
    return (x.is_cuda and x.dtype in (torch.bfloat16, torch.float16, torch.float32)
            and d in (16, 32, 64, 128) and d * x.element_size() <= 256
            and kernels_run(x.device, x.dtype))


if __name__ == "__main__":
    run(main)
