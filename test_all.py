"""Small proofs of what the other files claim. No network, no data files, no GPU:

    pytest -q test_all.py

Everything is tiny: grids of 2x2 and 3x3, models of width 32, images that data.py renders. What is
true of every size is easiest to check where all cases can be counted. `pytest -m slow test_all.py`
runs the long tests too.
"""

import argparse
import ast
import concurrent.futures
import contextlib
import ctypes
import errno
import functools
import gzip
import importlib
import io
import itertools
import json
import math
import ntpath
import os
import pickle
import random
import re
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import time
import warnings
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

import anyorder
import data
import evaluate
import finetune
import order_infer
import sample
import tokenizer
from anyorder import (AnyOrder, Drawing, draw, load_model, random_order, rank_of, raster_order,
                      save_model)
from data import (SUNSET_LABELS, UserError, arguments, batch_of, describe, fingerprint,
                  in_test_split, load, open_data, pick_device, printable, read_image, render_sunset,
                  replacing, run, save, sheet, to_float, to_uint8, words_of)
from order_infer import SCORES, infer_orders, location_scores, rank_correlation
from tokenizer import Tokenizer, learning_rate, load_tokenizer, make_tokens, psnr, usage, vocabulary

HERE = Path(__file__).parent
SCRIPTS = ("data", "tokenizer", "anyorder", "order_infer", "finetune", "sample", "evaluate")
# all tensors are tiny: a second thread would wait more than it helps
torch.set_num_threads(1)
# no settings file registers the mark `slow`
warnings.filterwarnings("ignore", category=pytest.PytestUnknownMarkWarning)
PROBE = functools.cache(data.precision)


def compute_in(monkeypatch, probe):
    """All stages of this process take their number type from `probe`."""
    for script in SCRIPTS:
        if hasattr(sys.modules[script], "precision"):
            monkeypatch.setattr(sys.modules[script], "precision", probe)


@pytest.fixture(autouse=True)
def one_probe(monkeypatch):
    """Two runs that must do the same do it in one dtype: under load the probe may vary."""
    compute_in(monkeypatch, lambda device: PROBE(device))


def slow(test):
    """Runs under `pytest -m slow` only."""
    skip = pytest.mark.skipif("slow" not in sys.argv, reason="pytest -m slow test_all.py")
    return pytest.mark.slow(skip(test))


def tiny(rows=2, cols=2, codebook=3, layers=3, order_head=False, seed=0, words=("sun", "sea")):
    """A model with weights so large that every input matters."""
    torch.manual_seed(seed)
    model = AnyOrder({"rows": rows, "cols": cols, "codebook": codebook, "width": 32,
                      "layers": layers, "order_head": order_head, "words": list(words),
                      "caption_length": 2})
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return model.eval().requires_grad_(False)


def call(monkeypatch, capsys, script, *flags):
    """Runs a script's main() in this process (quicker); returns (exit code, what it printed)."""
    module = importlib.import_module(script)
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *map(str, flags)])
    try:
        data.run(module.main)
        code = 0
    except SystemExit as stop:
        code = stop.code or 0
    printed = capsys.readouterr()
    return code, printed.out + printed.err


@pytest.fixture
def cli(monkeypatch, capsys):
    """cli("sample", "--n", 2) is `call`; cli.ok expects success, and returns what was printed;
    cli.refused expects one line and a folder as before, and returns that line."""
    monkeypatch.setitem(evaluate.JUDGE, "steps", 5)

    def run(script, *flags):
        device = () if script == "data" else ("--device", "cpu")
        return call(monkeypatch, capsys, script, *device, *flags)

    def ok(script, *flags):
        code, printed = run(script, *flags)
        assert code == 0, printed
        return printed

    def refused(script, out, *flags):
        before = files_of(out)
        code, printed = run(script, "--out", out, *flags)
        line = printed.strip().splitlines()[-1]
        assert code == 2 and line.startswith("error: ") and printed.count("error: ") == 1, printed
        assert files_of(out) == before
        return line
    run.ok, run.refused = ok, refused
    return run


def in_processes(lines, prelude="", processes=1, every=0.1):
    """Runs scripts in turn in fresh Python processes: one start of Python for all `lines`.

    With 2 processes torchrun starts them. It looks `every` so many seconds whether both are alive,
    and ends one whose fellow is not. The second process would compute in bfloat16, if asked."""
    program = ("import importlib, json, os, signal, sys, data, torch\n"
               "second = os.environ.get('RANK') == '1'\n"
               "data.precision = lambda device: torch.bfloat16 if second else torch.float32\n"
               "import anyorder\n" + prelude + "\n"
               "import evaluate\n"
               "evaluate.JUDGE['steps'] = 5\n"
               "code = 0\n"
               "for script, *flags in json.loads(sys.argv[1]):\n"
               "    sys.argv = [script + '.py', *flags, '--device', 'cpu']\n"
               "    try:\n"
               "        data.run(importlib.import_module(script).main)\n"
               "    except SystemExit as stop:\n"
               "        code = stop.code\n"
               "        print(script, 'left with', code, file=sys.__stdout__, flush=True)\n"
               "sys.exit(code)")
    words = [[str(word) for word in line] for line in lines]
    run = [sys.executable, "-c", program, json.dumps(words)]
    if processes > 1:
        run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--no-python",
               f"--nproc_per_node={processes}", f"--monitor-interval={every}", *run]
    return subprocess.run(run, cwd=HERE, capture_output=True, text=True, timeout=180,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})


def picture_folder(path, n=40, size=16, captions=True):
    """n rendered sunsets as .png files with captions, a folder as a user would bring it."""
    path.mkdir(parents=True, exist_ok=True)
    lines = ["file_name,text"]
    for i in range(n):
        image, caption, _ = data.render_sunset(i, size)
        data.sheet(image[None], 1, gap=0).save(path / f"{i:03d}.png")
        lines.append(f"{i:03d}.png,{caption}")
    if captions:
        (path / "metadata.csv").write_text("\n".join(lines))
    return path


def files_of(folder):
    """{relative name: content} of all files."""
    files = (path for path in sorted(Path(folder).rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


STAGES = {"tokenizer": ("--size", 16, "--codebook", 16, "--steps", 20, "--batch", 4),
          "anyorder": ("--steps", 6, "--batch", 8, "--width", 32, "--layers", 2),
          "order_infer": (),
          "finetune": ("--steps", 6, "--batch", 8)}
RESULT = {"tokenizer": "tokenizer.pt", "anyorder": "anyorder.pt", "order_infer": "orders.pt",
          "finetune": "ordered.pt"}
NEEDS = {"tokenizer": (), "anyorder": ("tokenizer.pt", "tokens.pt"),
         "order_infer": ("tokenizer.pt", "tokens.pt", "anyorder.pt"),
         "finetune": ("tokenizer.pt", "tokens.pt", "anyorder.pt", "orders.pt")}


def start_of(stage, chain, folder):
    """A copy of the chain's folder with all that `stage` needs and none of what it writes."""
    folder.mkdir()
    for name in NEEDS[stage]:
        shutil.copy(chain[1] / name, folder)
    return folder


def flags_of(stage, chain):
    """The flags of a tiny run, with --data for the only stage that needs it."""
    return (*STAGES[stage], "--data", chain[0]) if stage == "tokenizer" else STAGES[stage]


def tensors_of(path):
    """All tensors of a .pt, whatever their depth (seconds differ from run to run)."""
    def walk(value, name):
        if isinstance(value, torch.Tensor):
            yield name, value
        elif isinstance(value, dict):
            for key in value:
                yield from walk(value[key], f"{name}.{key}")
    return dict(walk(torch.load(path, weights_only=True), ""))


def calls_of(monkeypatch, owner, name):
    """A list that will hold (arguments, result) of each call of owner.name by position."""
    real, calls = getattr(owner, name), []

    def spy(*arguments, **how):
        result = real(*arguments, **how)
        calls.append((arguments, result))
        return result
    monkeypatch.setattr(owner, name, spy)
    return calls


@contextlib.contextmanager
def control_c(steps):
    """A real SIGINT during the so-many-th step of the run in this block."""
    after_step, count = data.Checkpoint.after_step, itertools.count(1)

    def interrupted(*rest):
        if next(count) == steps:
            signal.raise_signal(signal.SIGINT)
        after_step(*rest)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data.Checkpoint, "after_step", interrupted)
        yield


@pytest.fixture(scope="session")
def chain(tmp_path_factory):
    """(pictures, out, printed): the whole chain through its .pt files, each stage by its own
    command line, at tiny size."""
    root = tmp_path_factory.mktemp("chain")
    pictures, out = picture_folder(root / "pictures"), root / "out"
    small = ("--width", 32, "--layers", 2, "--batch", 8)
    done = in_processes([line + ("--out", out) for line in (
        ("tokenizer", "--data", pictures, "--size", 16, "--codebook", 16, "--steps", 30),
        ("anyorder", "--steps", 12, *small),
        ("anyorder", "--steps", 3, "--order", "raster", *small),
        ("order_infer",),
        ("finetune", "--steps", 12, "--batch", 8),
        ("sample", "--n", 3))])
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stdout + done.stderr
    return pictures, out, done.stdout + done.stderr


# -------------------------------------------------------------------------------------------------
# Orders


def test_order_and_rank_are_inverse_on_a_hand_worked_grid():
    order = torch.tensor([[4, 1, 3, 5, 7, 0, 2, 6, 8]])     # centre, its four neighbours, the corners
    rank = torch.tensor([[5, 1, 6, 2, 0, 3, 7, 4, 8]])      # 5 1 6 / 2 0 3 / 7 4 8
    assert torch.equal(rank_of(order), rank)
    assert torch.equal(rank_of(rank), order)


def test_random_orders_are_permutations_and_repeatable():
    a, b = (random_order(50, 9, torch.Generator().manual_seed(0)) for _ in range(2))
    assert torch.equal(a, b) and torch.equal(a.sort(1).values, raster_order(50, 9))
    assert len(set(map(tuple, a.tolist()))) > 40


# -------------------------------------------------------------------------------------------------
# The model


def all_images(V, N):
    return torch.tensor(list(itertools.product(range(V), repeat=N)))


def total_probability(model, order):
    """The sum of p over all 81 images of 2x2 cells and 3 codes. `order`: a score or visit lists."""
    images = all_images(3, 4)
    captions = ["sun sea"] * len(images)
    if isinstance(order, str):
        order = infer_orders(model, images, captions, score=order, distance=0.3)
        assert len(set(map(tuple, order.tolist()))) > 1     # the order depends on the image
    return model.log_probs(images, captions, order).double().sum(1).exp().sum()


@pytest.mark.parametrize("order", ([0, 1, 2, 3], [2, 0, 3, 1], *SCORES), ids=str)
def test_the_probabilities_of_all_images_sum_to_one(order):
    if isinstance(order, list):
        order = torch.tensor(order).expand(81, 4)
    assert abs(total_probability(tiny(seed=4), order) - 1) < 1e-5


def test_a_score_that_looks_at_the_content_is_no_probability():
    assert total_probability(tiny(seed=3), "likelihood") > 1.01


@pytest.mark.parametrize("mode", (True, False))
def test_later_tokens_leave_earlier_log_probs_bit_identical(mode):
    model = tiny(3, 3, codebook=7, order_head=True).train(mode)
    tokens, order = torch.randint(7, (4, 9)), random_order(4, 9)
    captions = ["sun", "", "sea sun", "sea"]
    before = model.log_probs(tokens, captions, order)
    where = model.logits(tokens, model.read(captions), order)[1]
    for k in range(9):
        cell = order[:, k:k + 1]
        changed = tokens.scatter(1, cell, (tokens.gather(1, cell) + 1) % 7)
        after = model.log_probs(changed, captions, order)
        assert torch.equal(before[:, :k], after[:, :k])
        assert not torch.equal(before[:, k:], after[:, k:])
        there = model.logits(changed, model.read(captions), order)[1]
        assert torch.equal(where[:, :k + 1], there[:, :k + 1])      # what it leads to is not seen


def test_the_order_head_does_not_know_the_location_it_predicts():
    model = tiny(3, 3, codebook=7, order_head=True)
    tokens, order, words = torch.randint(7, (4, 9)), random_order(4, 9), model.read([""] * 4)
    where = model.logits(tokens, words, order)[1]
    for k in range(8):
        other = order.clone()
        other[:, k:] = other[:, k:].flip(1)                 # another future, the same past
        there = model.logits(tokens, words, other)[1]
        assert torch.equal(where[:, :k + 1], there[:, :k + 1])


def test_the_loss_is_the_softmax_of_both_heads_and_locations_compete_with_free_cells_only():
    model = tiny(2, 2, order_head=True)
    tokens, order = torch.randint(3, (5, 4)), random_order(5, 4)
    what, where = model.logits(tokens, model.read(["sun"] * 5), order)
    content, location = model(tokens, model.read(["sun"] * 5), order)
    for b, k in itertools.product(range(5), range(4)):
        cell, free = order[b, k], order[b, k:]
        p = what[b, k].softmax(0)[tokens[b, cell]]
        torch.testing.assert_close(content[b, k], -p.log())
        p = where[b, k, cell].exp() / where[b, k, free].exp().sum()
        torch.testing.assert_close(location[b, k], -p.log(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("turns", ([1, 1, 1, 1], [0, 0, 0, 0], [0, 1, 2, 0]))
@pytest.mark.parametrize("steps", ([1] * 12, [1, 2, 4, 1, 3, 1]), ids=str)
def test_the_cached_path_equals_the_full_forward_pass(steps, turns):
    """Twelve cells are placed, some together. At each step all free cells are looked at. What is
    said of each is what `logits` says of an order that begins with the placed cells and goes on
    with this one. The cells to be placed stand elsewhere in the list of each image (`turns`)."""
    model, k = tiny(rows=3, cols=4, codebook=5, order_head=True), 0
    words = model.read(["sun", "", "sun", "sea"])
    order = random_order(4, 12, torch.Generator().manual_seed(3))
    tokens = torch.randint(5, (4, 12), generator=torch.Generator().manual_seed(4))
    where = model.logits(tokens, words, order)[1]
    with torch.inference_mode():
        drawing = Drawing(model, words)
        for n in steps:
            torch.testing.assert_close(drawing.next_location(), where[:, k], rtol=1e-4, atol=1e-4)
            free = torch.stack([row.roll(turn) for row, turn in zip(order[:, k:], turns)])
            logits = drawing.look(free)
            for c in range(12 - k):
                onwards = torch.cat((order[:, :k], free.roll(-c, 1)), 1)
                what = model.logits(tokens, words, onwards)[0][:, k]
                torch.testing.assert_close(logits[:, c], what, rtol=1e-4, atol=1e-4)
            choice = (torch.arange(n) + torch.tensor(turns)[:, None]).remainder(12 - k)
            drawing.place(choice, tokens.gather(1, free.gather(1, choice)))
            k += n
            assert drawing.cell.tolist() == order[:, k - 1:k].tolist()


def test_one_of_follows_the_probabilities_and_never_takes_an_impossible_one():
    p = torch.tensor([0, 0.2, 0, 0.5, 0.3, 0]).expand(200_000, 6)
    found = anyorder.one_of(p, torch.Generator().manual_seed(0))
    assert found.shape == (200_000, 1)
    share = torch.bincount(found[:, 0], minlength=6) / len(p)
    torch.testing.assert_close(share, p[0], atol=0.004, rtol=0)     # 3.6 standard deviations
    assert (share[p[0] == 0] == 0).all()


@pytest.mark.parametrize("uniform", (0.0, 1 - 2 ** -24))
def test_one_of_at_both_ends_of_the_unit_interval(monkeypatch, uniform):
    monkeypatch.setattr(torch, "rand", lambda *shape, **kwargs: torch.full(shape, uniform))
    for p in ([0, 0.7, 0.3, 0], [0, 1, 0, 0], [0.1] * 10 + [0]):
        assert p[anyorder.one_of(torch.tensor([p]))] > 0


def test_captions_change_the_distribution_and_unknown_words_read_as_none(capsys):
    model = tiny()
    tokens, order = torch.zeros(1, 4, dtype=torch.long), raster_order(1, 4)
    sun, sea, none, unknown = (model.log_probs(tokens, [caption], order)
                               for caption in ("sun", "sea", "", "zebra"))
    assert not torch.allclose(sun, sea) and not torch.allclose(sun, none)
    assert torch.equal(none, unknown)
    with pytest.raises(data.UserError, match="sun"):
        model.check_words(["sunn"])
    model.check_words(["sun", "Sun, sea", ""])
    assert not capsys.readouterr().out
    model.check_words(["sun", "sun sea sun"])       # a training caption may be as long as this
    assert "has 3 words, the model reads the first 2" in capsys.readouterr().out


def test_a_tiny_model_overfits_eight_images():
    torch.manual_seed(0)
    model = AnyOrder({"rows": 3, "cols": 3, "codebook": 8, "width": 64, "layers": 3,
                      "order_head": False, "words": list("abcdefgh"), "caption_length": 1})
    tokens, captions = torch.randint(8, (8, 9)), list("abcdefgh")
    optimizers = anyorder.make_optimizers(model, 3e-3, torch.float32)
    for step in range(150):
        loss = -model.log_probs(tokens, captions, random_order(8, 9)).mean()
        rate = tokenizer.learning_rate(step, 150, 3e-3)
        loss = tokenizer.update(loss, model, optimizers, rate, step)
    assert loss < 0.05                                              # it began at ln(8) = 2.08
    drawn = draw(model.eval(), captions, random_order(8, 9), torch.Generator().manual_seed(0))
    assert (drawn == tokens).float().mean() > 0.9


def test_each_weight_is_trained_by_one_optimizer_and_matrices_of_blocks_by_muon():
    model = tiny(order_head=True)
    adamw, muon = ({id(w) for group in each.param_groups for w in group["params"]}
                   for each in anyorder.make_optimizers(model, 1.0, torch.float32))
    assert adamw | muon == {id(w) for w in model.parameters()} and not adamw & muon
    assert muon == {id(w) for block in model.blocks
                    for layer in (block.qkv, block.proj, block.up, block.down)
                    for w in layer.parameters()}


@pytest.mark.parametrize("rows, cols", ((4, 4), (3, 7), (1, 5)))
def test_positions_begin_so_that_likeness_depends_on_the_step_between_cells_alone(rows, cols):
    model = AnyOrder({"rows": rows, "cols": cols, "codebook": 2, "width": 64, "layers": 1,
                      "order_head": False, "words": [], "caption_length": 1})
    for where in (model.at.weight[:-1], model.next.weight):
        like = where @ where.T                                      # [N, N]
        for hop in model.hop[:-1].unique():
            ends = torch.stack(torch.aminmax(like[model.hop[:-1] == hop]))
            torch.testing.assert_close(*ends, rtol=1e-4, atol=1e-5)
        assert (like.argmax(1) == torch.arange(rows * cols)).all()  # and no two cells begin alike


def test_codes_begin_as_alike_as_the_tokenizer_has_them_and_another_tokenizer_is_refused(
        chain, tmp_path, monkeypatch, capsys):
    out = start_of("anyorder", chain, tmp_path / "out")
    flags = ("--out", out, "--device", "cpu", "--steps", 1, "--lr", 1e-9, "--width", 256,
             "--layers", 1)
    assert call(monkeypatch, capsys, "anyorder", *flags)[0] == 0
    codes = tokenizer.load_tokenizer(out / "tokenizer.pt").codebook
    content = anyorder.load_model(out / "anyorder.pt").content.weight[:-1]
    codes, content = (torch.cosine_similarity((x - x.mean(0))[:, None], x - x.mean(0), dim=-1)
                      for x in (codes, content))
    assert torch.corrcoef(torch.stack((codes.flatten(), content.flatten())))[0, 1] > 0.8
    file = torch.load(out / "tokenizer.pt", weights_only=True)
    file["model"]["codebook"] += 1
    data.save(out / "tokenizer.pt", file)
    before = files_of(out)
    code, printed = call(monkeypatch, capsys, "anyorder", *flags)
    assert code == 2 and "tokenizer.pt did not make" in printed and files_of(out) == before


# -------------------------------------------------------------------------------------------------
# Order inference


def brute_force_order(model, tokens, caption, score, distance):
    """The slow definition, for one image: each free cell is tried by a full forward pass over all
    that is drawn, and nothing is cached."""
    drawn, place = [], order_infer.places(model)
    for k in range(model.N):
        free = [cell for cell in range(model.N) if cell not in drawn]
        orders = [drawn + [cell] + [other for other in free if other != cell] for cell in free]
        image, words = tokens.expand(len(free), -1), model.read([caption] * len(free))
        logits, _ = model.logits(image, words, torch.tensor(orders))
        content = tokens[free].view(-1, 1)
        value = location_scores(logits[:, k:k + 1], score, model.frequency, content)[:, 0]
        if drawn:
            step = (place[free] - place[drawn[-1]]).norm(dim=1)
            value -= distance * step / (place[-1] - place[0]).norm()
        drawn.append(free[value.argmax()])
    return drawn


@pytest.mark.parametrize("score", (*SCORES, "likelihood"))
@pytest.mark.parametrize("distance", (0.0, 0.7))
def test_order_inference_equals_brute_force(score, distance):
    model = tiny(3, 3, codebook=7, seed=5)
    model.frequency.copy_(torch.rand(7).softmax(0))
    tokens, captions = torch.randint(7, (3, 9)), ["sun", "", "sea sun"]
    found = infer_orders(model, tokens, captions, score, distance)
    assert found.tolist() == [brute_force_order(model, image, caption, score, distance)
                              for image, caption in zip(tokens, captions)]


def test_scores_on_hand_worked_distributions():
    p = torch.tensor([[[0.7, 0.2, 0.1], [0.5, 0.5, 0.0]]])
    frequency, content = torch.tensor([0.5, 0.25, 0.25]), torch.tensor([[1, 0]])
    expected = {"confidence": [math.log(0.7), math.log(0.5)],
                "margin": [math.log(0.5), math.log(1e-12)],
                "entropy": [-0.8018, -0.6931],
                "calibrated": [math.log(1.4), math.log(1.0)],
                "likelihood": [math.log(0.2), math.log(0.5)]}
    for score, values in expected.items():
        found = location_scores(p.clamp_min(1e-30).log(), score, frequency, content)
        torch.testing.assert_close(found, torch.tensor([values]), rtol=1e-3, atol=1e-3)
    with pytest.raises(UserError, match="confidence, margin"):
        location_scores(p, "loudness", frequency)


def test_visit_draws_the_best_cells_and_looks_only_where_choose_did_not():
    """Two ways to choose by the same values: looking at all free cells, and at none of them."""
    model, results = tiny(3, 3, codebook=7), []
    value = torch.rand(5, 9, generator=torch.Generator().manual_seed(1))
    sizes = [2, 1, 3, 3]
    for looks in (True, False):
        drawing = anyorder.Drawing(model, model.read(["sun"] * 5))
        tokens, counts = torch.zeros(5, 9).long(), []

        def choose(free):
            return value.gather(1, free), drawing.look(free) if looks else None

        def fill(cell, logits):
            tokens.scatter_(1, cell, logits.argmax(-1))
            return tokens.gather(1, cell)
        with model.to_token.register_forward_hook(lambda _, x, y: counts.append(y.shape[1])):
            order = order_infer.visit(drawing, raster_order(5, 9), sizes, choose, fill)
        assert counts == ([9, 7, 6, 3] if looks else sizes)
        results.append(torch.stack((order, tokens)))
    assert torch.equal(*results) and torch.equal(order.sort(1).values, raster_order(5, 9))
    assert torch.equal(order[:, 0], value.argmax(1))
    crowd = order_infer.crowding(model)
    assert (crowd[order[:, 0], order[:, 1]] == 0).all()                 # they share no edge


def test_the_head_orders_alone_and_looks_at_what_it_chose_only():
    model, looks = tiny(3, 3, codebook=7, order_head=True), []
    tokens = torch.randint(7, (6, 9), generator=torch.Generator().manual_seed(0))
    with model.to_token.register_forward_hook(lambda _, x, y: looks.append(y.shape[1])):
        order = infer_orders(model, tokens, ["sun"] * 6, headed=True)
    assert looks == [1] * 9
    _, where = model.logits(tokens, model.read(["sun"] * 6), order)     # with all that is known
    assert torch.equal(anyorder.over_free(where, order).argmax(-1), order)
    with pytest.raises(UserError, match="order head"):
        infer_orders(tiny(3, 3, codebook=7), tokens, ["sun"] * 6, headed=True)


def test_inference_in_batches_in_processes_and_of_nothing(monkeypatch):
    model = tiny(3, 3, codebook=7, order_head=True)
    tokens, words = torch.randint(7, (7, 9)), model.read(["sun"] * 7)
    whole = infer_orders(model, tokens, words)
    monkeypatch.setattr(order_infer, "images_at_once", lambda model: 3)
    assert torch.equal(whole, infer_orders(model, tokens, words))
    # a process may get no image of the last batch
    shares = []
    monkeypatch.setattr(order_infer, "in_turn", lambda found: shares.extend(found) or found)
    for process in (0, 1):
        list(order_infer.shared_orders(model, tokens, words, torch.float32, process, 2))
    assert [len(share) for share in shares] == [3, 1, 3, 0]
    assert torch.equal(torch.cat((shares[0], shares[2], shares[1])), whole)
    for headed in (False, True):
        assert infer_orders(model, tokens[:0], words[:0], headed=headed).shape == (0, 9)
    assert order_infer.without(torch.tensor([[4, 7, 9]]), torch.tensor([[1]])).tolist() == [[4, 9]]


def test_mean_ranks_of_captions_that_two_images_share():
    order = torch.tensor([[0, 1, 2, 3], [1, 0, 2, 3], [3, 2, 1, 0]])
    ranks, mean = order_infer.mean_ranks(order, ["sun", "sun", "sea"])
    assert list(ranks) == ["sun"] and ranks["sun"].tolist() == [0.5, 0.5, 2, 3]
    torch.testing.assert_close(mean, torch.tensor([4 / 3, 1, 5 / 3, 2]))
    # a tie goes to the cell that comes first in raster order
    orders = order_infer.specialised_orders(["sun", "sea", "new"], ranks, mean)
    assert orders.tolist() == [[0, 1, 2, 3], [1, 0, 2, 3], [1, 0, 2, 3]]
    assert order_infer.rank_correlation(order[:1], order[:1]) == 1
    assert order_infer.rank_correlation(torch.tensor([[0, 1, 2]]), torch.tensor([[0, 2, 1]])) == 0.5


def test_orders_pt_has_mean_ranks_of_training_images_only(chain):
    tokens = tokenizer.open_tokens(chain[1])
    file = order_infer.load_orders(chain[1], tokens)
    train = tokens["split"][file["index"]] == 0
    assert not train.all() and train.sum() == (tokens["split"] == 0).sum()
    texts = [tokens["captions"][i] for i in tokens["caption_index"][file["index"][train]].tolist()]
    ranks, mean = order_infer.mean_ranks(file["order"][train], texts)
    assert torch.equal(mean, file["mean_rank"]) and ranks.keys() == file["caption_rank"].keys()
    assert all(torch.equal(ranks[text], file["caption_rank"][text]) for text in ranks)
    assert 0 < len(ranks) < len(set(texts))             # those that two or more images share


def test_order_pictures_are_upright_and_show_each_quarter():
    black, raster = torch.zeros(1, 3, 96, 96).byte(), raster_order(1, 4)
    page = order_infer.picture(black, raster, raster[0].float(), 2, 2)
    # the middle of each cell, less the margins of 2: tiles [10, 4]
    cells = torch.from_numpy(np.array(page)).sum(-1)[26::48][:2]
    cells = torch.stack([cells[:, 98 * i + 26:98 * i + 98:48].flatten() for i in range(10)])
    assert (cells[[1, 6]].diff() > 0).all()             # dark first, bright last
    grey = 3 * 150
    for first, full in ((0, 3 * 255), (5, 0)):          # white: the mean order; then the image
        assert cells[first].tolist() == [full] * 4
        for quarter in (1, 2, 3):
            drawn = [full] * quarter + [grey] * (4 - quarter)
            assert cells[first + 1 + quarter].tolist() == drawn


# -------------------------------------------------------------------------------------------------
# Finetuning


def test_what_is_given_comes_first_and_keeps_its_order():
    model, order = tiny(3, 4), random_order(4000, 12, torch.Generator().manual_seed(0))
    found, given = finetune.given_first(order, model, torch.Generator().manual_seed(1))
    assert torch.equal(found.sort(1).values, raster_order(4000, 12))
    assert torch.equal(found[given[:, 0] == 0], order[given[:, 0] == 0])
    share = (given > 0).double().mean().item()
    assert abs(share - finetune.GIVEN * 11 / 12) < 0.03         # one in twelve is given nothing
    halves = set()
    for cells, n, was in zip(found.tolist(), given[:, 0].tolist(), rank_of(order).tolist()):
        for part in (cells[:n], cells[n:]):
            ranks = [was[cell] for cell in part]
            assert ranks == sorted(ranks)
            halves.add(frozenset(part))
    for side in (lambda c: c < 4, lambda c: c >= 8, lambda c: c % 4 < 2, lambda c: c % 4 > 1):
        assert frozenset(filter(side, range(12))) in halves     # what people hide
    assert frozenset((0, 11)) not in halves and frozenset((0, 2, 8, 10)) not in halves


def spied(monkeypatch, out, cli, *flags):
    """Runs finetune.py: the orders of each step, before some cells are given; those of the head;
    the learning rates; what was printed."""
    with monkeypatch.context() as patch:
        given, found, updates = (calls_of(patch, *what) for what in (
            (finetune, "given_first"), (order_infer, "infer_orders"), (finetune, "update")))
        printed = cli.ok("finetune", "--out", out, "--batch", 8, *flags)
    steps = [arguments[0].tolist() for arguments, _ in given]
    head = sum((order.tolist() for _, order in found), [])
    return steps, head, [arguments[3] for arguments, _ in updates], printed


def test_later_rounds_take_the_heads_orders_and_resume_bit_for_bit(chain, tmp_path, monkeypatch,
                                                                   cli):
    flags = "--batch", 8, "--steps", 8, "--lr", 0.004, "--rounds", 2
    whole, parts = (start_of("finetune", chain, tmp_path / name) for name in ("whole", "parts"))
    tokens = tokenizer.open_tokens(whole)
    file = order_infer.load_orders(whole, tokens)
    steps, head, rates, printed = spied(monkeypatch, whole, cli, *flags)
    assert "round 2: orders of the head, rank correlation" in printed
    assert all(order in file["order"].tolist() for order in sum(steps[:4], []))
    assert all(order in head for order in sum(steps[4:], []))
    # the head orders what this round draws, and what checks it
    n, check = tokens["split"][file["index"]].bincount().tolist()
    drawn = {i for step in range(4, 8) for i in data.batch_of(step, 8, n, 0)}
    assert len(drawn) < n and len(head) == len(drawn) + check
    # each round restarts the learning rate
    assert rates == [tokenizer.learning_rate(step, 4, 0.004) for step in range(4)] * 2
    for stop in (2, 4, 6):                              # in a round, at its end, in the other one
        with control_c(stop):
            assert cli("finetune", "--out", parts, *flags)[0] == 130
        cli.ok("finetune", "--out", parts, *flags, "--resume")
        ours, theirs = (tensors_of(out / "ordered.pt") for out in (parts, whole))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    for more in (("--rounds", 9), ("--order", "raster")):
        assert "--rounds" in cli.refused("finetune", parts, *flags, *more)


def test_later_rounds_train_on_all_images_that_the_any_order_model_has_seen(chain, tmp_path,
                                                                            monkeypatch, cli):
    """orders.pt has 8 of the 20 images that anyorder.pt was trained on, and there are more."""
    out = start_of("order_infer", chain, tmp_path / "out")
    cli.ok("order_infer", "--out", out, "--limit", 8)
    file = torch.load(out / "anyorder.pt", weights_only=True)
    data.save(out / "anyorder.pt", {**file, "limit": 20})
    file = tokenizer.open_tokens(out)
    train = file["tokens"][file["split"] == 0].tolist()
    forward, seen = AnyOrder.forward, []

    def spy(self, tokens, words, order):
        if torch.is_grad_enabled():
            seen.append({train.index(image) for image in tokens.tolist()})
        return forward(self, tokens, words, order)
    monkeypatch.setattr(AnyOrder, "forward", spy)
    flags = "--out", out, "--batch", 4, "--steps"
    printed = cli.ok("finetune", *flags, 8, "--rounds", 2)
    first, later = set().union(*seen[:4]), set().union(*seen[4:])
    assert "learning rate 0.0005\n" in printed and len(train) > 20
    assert first == set(range(8)) and later <= set(range(20)) and later - first
    seen.clear()                                        # 5 steps of 4: no image comes twice
    printed = cli.ok("finetune", *flags, 5, "--order", "class")
    assert "learning rate 0.002\n" in printed and set().union(*seen) == set(range(20))


def test_class_raster_and_random_orders(chain, tmp_path, monkeypatch, cli):
    out, found = start_of("finetune", chain, tmp_path / "out"), {}
    for name in ("class", "raster", "random"):
        steps, head, _, printed = spied(monkeypatch, out, cli, "--steps", 2, "--order", name)
        found[name] = {tuple(order) for order in sum(steps, [])}
        assert not head and f"--order {name}" in printed
        assert load_model(out / f"ordered_{name}.pt").about["order"] == name
    assert found["raster"] == {tuple(range(16))} and len(found["random"]) == 16
    file = torch.load(out / "orders.pt", weights_only=True)
    ranks = *file["caption_rank"].values(), file["mean_rank"]
    assert found["class"] <= {tuple(rank.argsort(stable=True).tolist()) for rank in ranks}
    assert len(found["class"]) > 1


def test_finetuning_starts_from_the_any_order_model(chain):
    a, b = (load_model(chain[1] / name) for name in ("anyorder.pt", "ordered.pt"))
    assert b.config == {**a.config, "order_head": True} and not a.config["order_head"]
    assert b.about["step"] > a.about["step"] and b.about["seconds"] > a.about["seconds"]
    assert b.about["made_from"].items() > a.about["made_from"].items()


def test_resume_after_the_end_and_orders_of_another_model_are_explained(chain, tmp_path, cli):
    out = shutil.copytree(chain[1], tmp_path / "my out")
    for stage in ("order_infer", "finetune"):
        error = cli.refused(stage, out, "--resume")
        assert "no run was interrupted" in error and f"--out '{out}' without --resume" in error
    printed = cli.ok("order_infer", "--out", out, "--model", out / "ordered.pt", "--limit", 9)
    assert f"next: python finetune.py --out '{out}'" in printed
    printed = cli.ok("finetune", "--out", out, "--steps", 1)
    assert "inferred by another model" in printed
    assert f"next: python sample.py --model '{out}/ordered.pt' --order learned" in printed


# --------------------------------------------------------------------------------------
# Attention

KINDS = ((torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 3e-2))


def qkv(B=2, heads=3, T=9, d=4, dtype=torch.float64, seed=0):
    """q, k, v as the model has them: views of one product, not contiguous."""
    dice = torch.Generator().manual_seed(seed)
    x = torch.randn(B, T, 3, heads, d, generator=dice, dtype=torch.float64).to(dtype)
    return [part.requires_grad_() for part in x.permute(2, 0, 3, 1, 4)]


def close(a, b, tolerance):
    torch.testing.assert_close(a.double(), b.double(), rtol=tolerance, atol=tolerance)


def assert_same_attention(ours, attention, tolerance):
    """`attention` of `ours` and its gradients are those of the definition in float64."""
    truth = [x.detach().double().requires_grad_() for x in ours]
    a, b = attention(*ours), anyorder.reference_attention(*truth)
    assert a.dtype == ours[0].dtype and a.shape == b.shape
    weight = torch.randn(b.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    weight = weight.to(a)
    a.backward(weight)
    b.backward(weight.double())
    close(a, b, tolerance)
    for x, y in zip(ours, truth):
        close(x.grad, y.grad, 10 * tolerance)


def one_by_one(q, k, v, past_k, past_v):
    """Each candidate is the last row of causal attention after the prefix."""
    found = []
    for c in range(q.shape[2]):
        rows = [torch.cat((past.double(), x[:, :, c:c + 1].double()), 2)
                for past, x in ((past_k, q), (past_k, k), (past_v, v))]
        found.append(anyorder.reference_attention(*rows)[:, :, -1:])
    return torch.cat(found, 2)


class Watch(torch.utils._python_dispatch.TorchDispatchMode):
    """Fills new memory with NaN and notes the largest tensor. With `mac`, beta = 0 multiplies."""

    def __init__(self, mac=False):
        super().__init__()
        self.mac, self.largest, self.filled = mac, 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = function.overloadpacket.__name__
        if self.mac and name == "baddbmm":
            base, a, b = args
            return kwargs.get("beta", 1) * base + kwargs.get("alpha", 1) * torch.bmm(a, b)
        assert not (self.mac and name == "baddbmm_")
        result = function(*args, **kwargs)
        if isinstance(result, torch.Tensor):
            self.largest = max(self.largest, result.numel())
            if name in ("empty", "new_empty", "empty_like", "empty_strided"):
                self.filled += 1
                result.fill_(math.nan)
        return result


@pytest.mark.parametrize("T, d", ((1, 4), (2, 4), (17, 4), (64, 4), (65, 4), (130, 4), (300, 4),
                                  (300, 32)))
@pytest.mark.parametrize("dtype, tolerance", KINDS)
def test_fused_attention_equals_the_reference(T, d, dtype, tolerance):
    """Up to 16 d keys P is kept, above it is computed again; one block and several. What was in
    new memory does not matter, not even NaN."""
    ours = qkv(T=T, d=d, dtype=dtype)
    with Watch() as watch:
        assert_same_attention(ours, anyorder.fused_attention, tolerance)
    assert watch.filled


def can_run_kernels():
    if torch.cuda.is_available():
        return anyorder.kernels_run(torch.device("cuda"), torch.float32)
    return anyorder.triton and os.getenv("TRITON_INTERPRET")


@pytest.mark.skipif(not can_run_kernels(), reason="needs Triton, and a GPU or TRITON_INTERPRET=1")
@pytest.mark.parametrize("B, heads, T, C, d", ((2, 3, 1, 1, 32), (1, 2, 64, 65, 16),
                                               (2, 3, 65, 20, 32), (1, 2, 130, 200, 64)))
@pytest.mark.parametrize("half", (False, True))
@pytest.mark.parametrize("alike", (True, False))
def test_the_kernels_equal_the_definition(B, heads, T, C, d, half, alike):
    device, dtype, tolerance = "cpu", torch.float32, 1e-5
    if torch.cuda.is_available():
        device = "cuda"
    if half:
        # Triton's interpreter cannot multiply bfloat16.
        dtype, tolerance = {"cuda": torch.bfloat16, "cpu": torch.float16}[device], 3e-2
    q, k, v = (x.detach().to(device) for x in qkv(B, heads, T, d, dtype))
    k = k if alike else k.contiguous()
    ours = [x.requires_grad_() for x in (q, k, v)]
    assert_same_attention(ours, anyorder.KernelAttention.apply, tolerance)
    own = [x.detach().to(device) for x in qkv(B, heads, C, d, dtype, seed=2)]
    k, v = k.detach(), v.detach()
    found, _ = anyorder.kernel_attention(own[0], k, v, *own[1:])
    close(found, one_by_one(*own, k, v), tolerance)


def test_kernels_that_do_not_run_are_not_used_and_say_why_once(monkeypatch, capsys):
    monkeypatch.setattr(anyorder, "triton", object())
    for fault in (RuntimeError("Failed to find C compiler\nand more"), None):
        def start(q, k, v):
            if fault:
                raise fault
        monkeypatch.setattr(anyorder, "kernel_attention", start)
        anyorder.kernels_run.cache_clear()
        for again in range(2):
            assert anyorder.kernels_run(torch.device("cpu"), torch.float32) is (fault is None)
        said = capsys.readouterr().err
        assert said.count("\n") == said.count("Failed to find C compiler") == int(bool(fault))
    monkeypatch.setattr(anyorder, "triton", None)
    anyorder.kernels_run.cache_clear()
    assert not anyorder.kernels_run(torch.device("cpu"), torch.float32)
    assert "Triton is not installed" in capsys.readouterr().err
    anyorder.kernels_run.cache_clear()
    # not on a GPU
    assert not anyorder.has_kernel(torch.zeros(1, 32))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype, tolerance", ((torch.float32, 1e-3), (torch.bfloat16, 0.15)))
def test_a_gpu_computes_what_a_cpu_does(dtype, tolerance):
    model = tiny(rows=5, cols=5, codebook=7, order_head=True)
    tokens, order = torch.randint(7, (3, 25)), random_order(3, 25)
    captions = ["sun", "", "sea sun"]
    found = {}
    for device in ("cpu", "cuda"):
        model = model.to(device)
        t, o = tokens.to(device), order.to(device)
        low = device == "cuda" and dtype != torch.float32
        with torch.no_grad(), torch.autocast(device, dtype, enabled=low):
            drawing = Drawing(model, model.read(captions))
            found[device] = [model.log_probs(t, captions, o).cpu()]
            for k in range(25):
                looked = drawing.look(o[:, k:]).float().log_softmax(-1)
                found[device].append(looked.cpu())
                drawing.place(torch.zeros_like(o[:, :1]), t.gather(1, o[:, k:k + 1]))
    for a, b in zip(found["cpu"], found["cuda"]):
        assert (a.exp() - b.exp()).abs().max() < tolerance
    # enough work for the kernels
    many = torch.zeros(2 ** 17, 1, 1, 32, device="cuda", dtype=dtype, requires_grad=True)
    way = type(anyorder.fused_attention(many, many, many).grad_fn).__name__
    assert way.startswith("KernelAttention") is anyorder.kernels_run(many.device, dtype)


# d = 4: beyond T = 64 the probabilities are computed again
@pytest.mark.parametrize("B, heads, T", ((1, 2, 1), (1, 2, 5), (1, 1, 20), (1, 1, 66)))
def test_the_derived_gradient_is_the_gradient(B, heads, T):
    ours = [x.detach().requires_grad_() for x in qkv(B, heads, T)]
    assert torch.autograd.gradcheck(anyorder.fused_attention, ours, fast_mode=T > 20)


# of a block, in bytes: one head, some, all
@pytest.mark.parametrize("size", (1, 2 ** 15, 2 ** 20))
def test_every_block_is_computed(monkeypatch, size):
    monkeypatch.setattr(anyorder, "BLOCK", size)
    assert_same_attention(qkv(5, 3, 40), anyorder.fused_attention, 1e-12)


def test_blocks_of_three_heads_and_six_rows_by_hand(monkeypatch):
    """16 * 2 / 8 = 4 rows are best, so two blocks share six. 250 bytes hold one head's 3 x 6."""
    monkeypatch.setattr(anyorder, "BLOCK", 250)
    found = list(anyorder.blocks(3, 6, torch.zeros(0, dtype=torch.float64)))
    assert [(heads.start, heads.stop, start, end) for heads, start, end, _ in found] == [
        (0, 1, 3, 6), (0, 1, 0, 3), (1, 2, 3, 6), (1, 2, 0, 3), (2, 3, 3, 6), (2, 3, 0, 3)]
    hidden = [(future == -math.inf).int().tolist() for *_, future in found]
    assert hidden[0] == [[0, 0, 0, 0, 1, 1], [0, 0, 0, 0, 0, 1], [0] * 6]
    assert hidden[1] == [[0, 1, 1], [0, 0, 1], [0] * 3]


@pytest.mark.parametrize("T", (9, 70, 200))
def test_later_tokens_leave_earlier_attention_bit_identical(T):
    q, k, v = (x.detach() for x in qkv(T=T, dtype=torch.float32))
    before = anyorder.fused_attention(q, k, v)
    for x in (q, k, v):
        x[:, :, T // 2:] = 7
    after = anyorder.fused_attention(q, k, v)
    assert torch.equal(before[:, :, :T // 2], after[:, :, :T // 2])


def test_long_sequences_never_hold_the_square():
    T = 1024
    q, k, v = qkv(2, 4, T, 16, torch.float32)
    with Watch() as watch:
        anyorder.fused_attention(q, k, v).sum().backward()
    # one block of rows at most
    assert watch.largest <= 2 * 4 * T * 128 < 2 * 4 * T * T / 2
    found = anyorder.fused_attention(q, k, v)
    assert sum(x.numel() for x in found.grad_fn.saved_tensors) < 4 * q.numel()


class OnAMac(torch.Tensor):
    device = torch.device("mps")


def test_other_devices_multiply_no_memory_that_holds_nan(monkeypatch):
    q, k, v = (x.detach().float() for x in qkv())
    past = [x.detach().float() for x in qkv(seed=1)[1:]]
    truth = anyorder.reference_attention(q, k, v)
    with Watch(mac=True):
        found = anyorder.cached_attention(q[:, :, -1:], k, v)
        close(found, truth[:, :, -1:], 1e-5)
        found = anyorder.cached_attention(q, k, v, torch.full((9, 9), -math.inf).triu(1))
        close(found, truth, 1e-5)
        for scale in (1, 100):
            ours = [scale * x for x in (q, k, v, *past)]
            close(anyorder.candidate_attention(*ours), one_by_one(*ours), 1e-3)
    # The blocks are for the CPU: elsewhere the library computes attention.
    monkeypatch.setattr(anyorder, "FusedAttention", None)
    found = anyorder.fused_attention(*(x.as_subclass(OnAMac) for x in (q, k, v)))
    close(found.as_subclass(torch.Tensor), truth, 1e-5)


def test_bfloat16_is_exact_enough_for_the_scores_of_trained_models():
    """Models trained on sunsets have scores up to 17; they are rounded before the softmax."""
    q, k, v = (x.detach() for x in qkv(16, 4, 72, 32, torch.bfloat16))
    largest = (q.float() @ k.float().mT).abs().max() / math.sqrt(32)
    q = (q.float() * 17 / largest).bfloat16()
    truth = anyorder.reference_attention(q.double(), k.double(), v.double())
    error = (anyorder.fused_attention(q, k, v).double() - truth).abs()
    assert error.max() < 0.02 * v.abs().max()


@pytest.mark.parametrize("C, T", ((1, 0), (5, 0), (1, 1), (1, 30), (5, 3), (7, 64), (40, 9)))
@pytest.mark.parametrize("dtype, tolerance", KINDS)
def test_candidate_attention_equals_one_softmax_per_candidate(C, T, dtype, tolerance):
    ours = [x.detach() for x in qkv(3, 2, C, 8, dtype)]
    # a slice of a larger cache
    past = [x.detach()[:, :, :T] for x in qkv(3, 2, 100, 8, dtype, seed=2)[1:]]
    found = anyorder.candidate_attention(*ours, *past)
    close(found, one_by_one(*ours, *past), tolerance)


# so that one is 2 to 18,945 above its own
@pytest.mark.parametrize("scale", (1, 5, 8, 30, 100))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_candidate_attention_survives_large_scores(scale, dtype):
    q, k, v = (scale * x.detach() for x in qkv(4, 1, 3, 4, torch.float32))
    q, k, v, past_k, past_v = (x.to(dtype) for x in (q, k, v, k.flip(2), v.flip(2)))
    found = anyorder.candidate_attention(q, k, v, past_k, past_v)
    if dtype == torch.float32:
        close(found, one_by_one(q, k, v, past_k, past_v), 1e-3)
    largest = torch.cat((v, past_v)).abs().max()
    assert found.isfinite().all() and (found.abs() <= 1.01 * largest).all()


# -------------------------------------------------------------------------------------------------
# The command lines


def test_the_chain_writes_what_it_promises(chain):
    _, out, printed = chain
    pictures = "reconstructions anyorder anyorder_loss raster orders samples samples_order".split()
    models = "tokenizer tokens anyorder raster orders ordered".split()
    assert {f"{name}.png" for name in pictures} <= files_of(out).keys()
    assert {path.name for path in out.glob("*.pt")} == {f"{name}.pt" for name in models}
    assert {"anyorder_loss.csv", "samples.gif", "samples/00002.png"} <= files_of(out).keys()
    assert not list(out.glob("*tmp")) and "ln(16) = 2.773" in printed
    for name in models:
        file = torch.load(out / f"{name}.pt", weights_only=True)
        assert {"kind", "version", "config", "made_from"} <= file.keys()


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_orders_on_disk_are_those_that_the_model_infers(dtype, chain, tmp_path, monkeypatch, cli):
    out = start_of("order_infer", chain, tmp_path / "out")
    compute_in(monkeypatch, lambda device: dtype)
    cli.ok("order_infer", "--out", out)
    tokens = tokenizer.open_tokens(out)
    file = order_infer.load_orders(out, tokens)
    model, row = load_model(out / "anyorder.pt"), file["index"]
    captions = [tokens["captions"][i] for i in tokens["caption_index"][row].tolist()]
    with data.autocast(torch.device("cpu"), dtype):
        inferred = order_infer.infer_orders(model, tokens["tokens"][row], captions)
    assert torch.equal(file["order"], inferred)
    assert (tokens["split"][row] != 2).all()            # the test split is for evaluation only


@pytest.mark.parametrize("name, change, stage, needle", (
    ("tokens", lambda file: file["made_from"].update(data="01"), "order_infer", "other tokens"),
    ("tokens", lambda file: file["tokens"].copy_(file["tokens"].flip(0)), "finetune",
     "other tokens"),
    ("tokenizer", lambda file: file["model"]["codebook"].mul_(2), "anyorder", "tokens.pt"),
    ("tokenizer", lambda file: file["model"]["codebook"].mul_(2), "sample", "tokenizer"),
    ("orders", lambda file: file["made_from"].update(tokens="01"), "finetune", "another tokens.pt"),
))
def test_files_that_do_not_belong_together_are_refused(name, change, stage, needle, chain, tmp_path,
                                                       cli):
    out = shutil.copytree(chain[1], tmp_path / "out")
    file = torch.load(out / f"{name}.pt", weights_only=True)
    change(file)
    data.save(out / f"{name}.pt", file)
    assert needle in cli.refused(stage, out)


@pytest.mark.parametrize("script", ("tokenizer", "anyorder"))
def test_other_data_than_those_of_the_folder_are_refused(script, chain, tmp_path, cli):
    """Another folder, the same with one more image, sunsets: all models here would be lost."""
    grown = shutil.copytree(chain[0], tmp_path / "grown")
    shutil.copy(grown / "003.png", grown / "added.png")
    for images in (picture_folder(tmp_path / "other", n=8), grown, "sunsets"):
        error = cli.refused(script, chain[1], "--data", images)
        assert f"give another --out, or remove {chain[1]}" in error


@pytest.mark.parametrize("stage", ("anyorder", "finetune"))
def test_training_sees_training_images_only_and_most_captions(stage, chain, tmp_path, monkeypatch,
                                                              cli):
    out = start_of(stage, chain, tmp_path / "out")
    file, seen = tokenizer.open_tokens(out), {True: [], False: []}
    parts = [file["tokens"][file["split"] == part].tolist() for part in range(3)]
    train, check, test = ({tuple(row) for row in part} for part in parts)
    assert check and test and not train & (check | test) and not check & test
    forward = calls_of(monkeypatch, AnyOrder, "forward")
    cli.ok(stage, "--out", out, *STAGES[stage], "--steps", 20)
    for (_, tokens, words, _), (nats, _) in forward:
        seen[nats.requires_grad] += zip(map(tuple, tokens.tolist()), words.any(1).tolist())
    (trained, told), (checked, all_told) = (list(zip(*seen[learns])) for learns in (True, False))
    assert len(trained) == 160 and set(trained) <= train and set(checked) == check
    assert 0.75 < sum(told) / 160 < 0.99 and all(all_told)


def test_the_head_learns_locations_that_were_chosen_not_given(chain, tmp_path, monkeypatch, cli):
    given, pulls, forward = calls_of(monkeypatch, finetune, "given_first"), [], AnyOrder.forward

    def spy(*rest):
        nats, where = forward(*rest)
        if where.requires_grad:
            where.register_hook(pulls.append)
        return nats, where
    monkeypatch.setattr(AnyOrder, "forward", spy)
    cli.ok("finetune", "--out", start_of("finetune", chain, tmp_path / "out"), *STAGES["finetune"])
    assert len(pulls) == 6 and any(count.any() for _, (_, count) in given)
    for (_, (_, count)), pull in zip(given, pulls):
        assert torch.equal(pull > 0, torch.arange(16) >= count) and (pull >= 0).all()


def tiny_tokenizer_first(monkeypatch):
    """For anyorder.py where there are no tokens yet."""
    small = functools.partial(tokenizer.make_tokens, codebook=16, steps=3, batch=4)
    monkeypatch.setattr(anyorder, "make_tokens", small)


def test_an_interrupted_tokenizer_is_resumed_by_the_command_that_began_it(tmp_path, chain,
                                                                          monkeypatch, cli):
    tiny_tokenizer_first(monkeypatch)
    line = "anyorder", "--data", chain[0], "--out", tmp_path, "--size", 16, *STAGES["anyorder"]
    with control_c(2):
        assert cli(*line)[0] == 130
    assert list(files_of(tmp_path)) == ["tokenizer_resume.pt"]
    cli.ok(*line, "--resume")
    assert (tmp_path / "anyorder.pt").exists()


def test_the_chain_on_another_grid(tmp_path, cli):
    pictures, out = picture_folder(tmp_path / "pictures"), tmp_path / "out"
    cli.ok("tokenizer", "--data", pictures, "--size", 20, *STAGES["tokenizer"][2:], "--out", out)
    for stage in ("anyorder", "order_infer", "finetune"):
        cli.ok(stage, *STAGES[stage], "--out", out)
    cli.ok("sample", "--n", 2, "--steps", 7, "--out", out)
    cli.ok("evaluate", "--n", 6, "--out", out)
    assert load_model(out / "ordered.pt").N == 25


def test_an_order_of_ones_own_is_added_in_one_place(chain, tmp_path):
    out = shutil.copytree(chain[1], tmp_path / "out")
    own = ("def backwards(B, N, generator=None, cols=None):\n"
           "    return torch.arange(N).flip(0).repeat(B, 1)\n"
           "anyorder.FIXED_ORDERS['backwards'] = backwards\n")
    lines = [("anyorder", "--order", "backwards", *STAGES["anyorder"]),
             ("finetune", "--order", "backwards", *STAGES["finetune"]),
             ("sample", "--order", "backwards", "--n", 2),
             ("evaluate", "--n", 6, "--models", out / "anyorder.pt:backwards"),
             ("sample", "--model", out / "backwards.pt", "--order", "random")]
    done = in_processes([(*line, "--out", out) for line in lines], own)
    assert done.stdout.count("left with") == 1, done.stderr
    assert "backwards order only" in done.stderr
    for name in ("backwards", "ordered_backwards"):
        assert load_model(out / f"{name}.pt").about["order"] == "backwards"
    row, = json.loads((out / "results.json").read_text())["rows"]
    assert row["step"] == pytest.approx((12 + 3 * 10 ** 0.5) / 15)


@pytest.mark.parametrize("script, flags, needle", (
    ("anyorder", "--data no/such/path", "no/such/path"),
    ("anyorder", "--width 33", "32"),
    ("anyorder", "--lr nan", "--lr"),
    ("anyorder", "--size 64", "another --out"),
    ("order_infer", "--device toaster", "toaster"),
    ("order_infer", "--distance inf", "--distance"),
    ("order_infer", "--model {out}/raster.pt", "raster order only"),
    ("sample", "--model {out}/tokens.pt", "tokens.pt"),
    ("sample", "--model {out}/none/ordered_class.pt", "run python finetune.py --order class"),
    ("sample", "--model {out}/none/raster.pt", "run python anyorder.py --order raster"),
    ("sample", "--model {out}/raster.pt --order random", "raster order only"),
    ("sample", "--model {out}/anyorder.pt --order learned", "order head"),
))
def test_bad_input_gets_one_line_and_exit_code_2(script, flags, needle, chain, cli):
    assert needle in cli.refused(script, chain[1], *flags.format(out=chain[1]).split())


def test_a_few_images_fewer_than_a_batch_still_train(tmp_path, monkeypatch, cli):
    tiny_tokenizer_first(monkeypatch)
    pictures = picture_folder(tmp_path / "few", n=5, captions=False)
    cli.ok("anyorder", "--data", pictures, "--out", tmp_path, "--size", 16, *STAGES["anyorder"])


def test_every_parsed_flag_is_read(monkeypatch, cli):
    def parsed(parser):
        flags.update(action.dest for action in parser._actions)
        sys.exit(0)
    monkeypatch.setattr(data.Parser, "parse_args", parsed)
    for script in set(SCRIPTS) - {"tokenizer"}:         # make_tokens(**vars(args)) takes them all
        flags = set()
        cli(script)
        read = re.findall(r"\b(?:args|bench)\.(\w+)", (HERE / f"{script}.py").read_text())
        assert flags and not flags - {"help", *read}, script


def test_imports_point_up_only():
    for i, script in enumerate(SCRIPTS):
        nodes = list(ast.walk(ast.parse((HERE / f"{script}.py").read_text())))
        names = {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
        names |= {node.name for node in nodes if isinstance(node, ast.alias)}
        assert not names & set(SCRIPTS[i:]), script


TINY = {"tokenizer": "--size 16 --codebook 16 --steps 3 --batch 4", "order_infer": "--limit 8",
        "anyorder": "--size 16 --steps 3 --batch 8 --width 32 --layers 2", "sample": "--n 2",
        "finetune": "--steps 4 --batch 8", "evaluate": "--n 12", "data": ""}


def test_the_readme_commands_run(tmp_path, monkeypatch, cli):
    """All `python x.py` in the README's code blocks, in its order, at tiny size and on pictures."""
    tiny_tokenizer_first(monkeypatch)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(evaluate, "speed_table", lambda *rest: None)       # takes minutes
    values = {"--data": picture_folder(tmp_path / "pictures"), "--complete": "pictures/000.png"}
    blocks = re.findall(r"```bash\n(.*?)```", (HERE / "README.md").read_text(), re.S)
    lines = [shlex.split(piece, comments=True) for piece in re.split("\n|&&", "\n".join(blocks))]
    lines = [words for words in lines if words[:1] == ["python"] and words[1].endswith(".py")]
    assert {words[1][:-3] for words in lines} >= set(SCRIPTS[1:])
    for _, script, *flags in lines:
        script = script[:-3]
        flags = [values.get(before, flag) for before, flag in zip(["", *flags], flags)]
        if script in SCRIPTS[:3] and "--data" not in flags:
            flags += ["--data", values["--data"]]
        if script == "tokenizer":                       # another way to begin
            shutil.rmtree(flags[flags.index("--out") + 1] if "--out" in flags else "out",
                          ignore_errors=True)
        if "--resume" in flags:
            flags.remove("--resume")                    # nothing was interrupted
        cli.ok(script, *flags, *TINY[script].split())


# ---------------------------------------------------------------------------------------------
# data.py


def picture(path, colour="red", size=(8, 8), mode="RGB", **options):
    """A one-colour image file, its folders made on the way."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(path, **options)


def everything(path, size=8):
    """{file name: caption} of a folder, both splits; each image decoded."""
    found = {}
    for split in ("train", "test"):
        dataset = open_data(path, size, split)
        for i, name in enumerate(dataset.checked[0]):
            image, found[name] = dataset[i]
            assert image.shape == (3, size, size) and image.dtype == torch.uint8
    return found


def told(dataset, capsys):
    describe(dataset)
    return capsys.readouterr().out


# ---------------------------------------------------------------- folders

def test_caption_comes_from_metadata_then_text_then_folder_then_nothing(tmp_path, monkeypatch):
    expected = {"a/1.png": "one, two three", "a/2.PNG": "beside it [31m", "a/b/3.Jpeg": "b",
                "4.webp": "", "5.gif": "red disc", "6.bmp": "", "00000/7.TIF": "",
                "cat/00001/8.jfif": "cat", "1234/9.png": "1234"}
    for name in expected:
        picture(tmp_path / name, **({"format": "JPEG"} if "jfif" in name else {}))
    (tmp_path / "metadata.csv").write_text(
        'file_name,text\n".\\a\\1.png", "one, two\nthree"\n4.webp,\ngone.png,lost\n4.webp,late\n')
    (tmp_path / "a/1.txt").write_text("the row wins")
    (tmp_path / "a/2.txt").write_text("\n beside it \x1b[31m\n")
    (tmp_path / "4.txt").write_text("an empty row wins too")
    (tmp_path / "5.txt").write_text("\r\nred disc\r\na disc, red\r\n", encoding="utf-16")
    # as on Windows, where this makes \ of /
    windows = {**vars(os.path), "normpath": ntpath.normpath}
    monkeypatch.setattr(os, "path", SimpleNamespace(**windows))
    assert everything(tmp_path) == expected


def test_metadata_is_read_in_each_folder_and_as_json_lines_too(tmp_path):
    for name in ("1.png", "sub/2.png", "sub/deep/3.png"):
        picture(tmp_path / name)
    rows = [{"file_name": "2.png", "text": "zwei"}, {"file_name": "deep/3.png", "text": "drei"}]
    lines = "\n\n".join(map(json.dumps, rows))
    (tmp_path / "sub/metadata.jsonl").write_text(lines, encoding="utf-16")
    (tmp_path / "metadata.csv").write_text("file_name,text\n1.png,eins\n", encoding="utf-16")
    assert everything(tmp_path) == {"1.png": "eins", "sub/2.png": "zwei", "sub/deep/3.png": "drei"}


@pytest.mark.parametrize("kind, text", [
    ("jsonl", "{"), ("jsonl", "[1]"), ("jsonl", "3"), ("jsonl", '{"file_name": "2.png"}'),
    ("csv", "image;words\na;b\n"), ("csv", 'file_name,text\na.png,"' + "x" * 200_000),
    ("csv", "file_name,text\nb.png,sun\na.png,red, big bird\n"),
    ("csv", 'file_name,text\na.png,"a red bird\nb.png,blue\n')])
def test_metadata_that_cannot_be_read_is_one_line(tmp_path, kind, text):
    picture(tmp_path / "a.png")
    (tmp_path / f"metadata.{kind}").write_text(text)
    with pytest.raises(UserError, match=f"^.*metadata.{kind} cannot be read.*$"):
        open_data(tmp_path)


@pytest.mark.parametrize("train, test, left_out", [
    ({"train/a.png": ""}, {"test/a.png": ""}, None),
    ({"train/cat/a.png": "cat"}, {"val/cat/b.png": "cat"}, None),
    ({"Train/a.png": ""}, {"Valid/b.png": ""}, "more/c.png"),
    ({"train/a.png": ""}, {"test/c.png": ""}, "val/b.png"),
    ({"a.png": "", "cats/b.png": "cats"}, {"test/c.png": ""}, None)])
def test_folders_called_train_val_and_test_are_splits_and_no_captions(tmp_path, train, test,
                                                                      left_out, capsys):
    for name in [*train, *test, *filter(None, [left_out])]:
        picture(tmp_path / name)
    sets = [open_data(tmp_path, 8, split) for split in ("train", "test")]
    assert [dict(zip(each.checked[0], each.captions)) for each in sets] == [train, test]
    assert sets[0].fingerprint == sets[1].fingerprint
    out = told(sets[0], capsys)
    assert "split: " in out and ("left out" in out) == bool(left_out)


@pytest.mark.parametrize("captions", [
    {"train/1.png": "train", "plane/2.png": "plane"},
    {"train/1.png": "", "train/cat/2.png": "cat"}])
def test_a_train_is_a_class_among_classes_and_no_caption_alone(tmp_path, captions):
    for name in captions:
        picture(tmp_path / name)
    assert everything(tmp_path) == captions


def test_describe_tells_what_is_not_read_and_how_large_the_images_are(tmp_path, capsys):
    for i in range(9):
        picture(tmp_path / f"{i}.jpg", size=(60, 40))
    picture(tmp_path / "9.png", size=(400, 400))
    for name in ("1.HEIC", "2.heic", "3.avif", "README", "1.txt", "labels.json", ".hidden"):
        (tmp_path / name).write_bytes(b"")
    out = told(open_data(tmp_path, 32), capsys)
    assert "4 files not read: 2 .heic, 1 " in out
    assert "your images are about 60x40: the centre square is resized to 32x32" in out
    assert "about" not in told(open_data("sunsets"), capsys)


def test_a_folder_called_sunsets_needs_a_dot(tmp_path, monkeypatch, capsys):
    picture(tmp_path / "sunsets/1.png")
    monkeypatch.chdir(tmp_path)
    built_in = open_data("sunsets")
    assert len(built_in) == 45_000 and "--data ./sunsets" in told(built_in, capsys)
    assert len(open_data("./sunsets")) == 1


def test_a_tenth_is_held_out_by_name_alone_and_the_fingerprint_sees_changes(tmp_path):
    names = sorted(f"{i}.png" for i in range(40))
    for name in names:
        picture(tmp_path / name)
    sets = {split: open_data(tmp_path, 8, split) for split in ("train", "test")}
    for split in sets:
        assert sets[split].checked[0] == [n for n in names if in_test_split(n) == (split == "test")]
    assert 80 < sum(in_test_split(f"{i}.png") for i in range(1000)) < 120
    # of names, sizes and captions alone
    first = open_data(tmp_path, 16, "test").fingerprint
    size = (tmp_path / "1.png").stat().st_size
    assert first == sets["train"].fingerprint == fingerprint("folder", [
        (name.encode(), size, "") for name in names])
    (tmp_path / "3.txt").write_text("another caption")
    second = open_data(tmp_path).fingerprint
    (tmp_path / "4.png").unlink()
    assert len({first, second, open_data(tmp_path).fingerprint}) == 3


def centre(path, size=8):
    return read_image(str(path), size)[:, size // 2, size // 2].tolist()


WHITE = [255, 255, 255]


@pytest.mark.parametrize("name, mode, colour, options, expected", [
    # red, but fully transparent
    ("clear.png", "RGBA", (255, 0, 0, 0), {}, WHITE),
    ("half.png", "RGBA", (0, 0, 0, 128), {}, [127, 127, 127]),
    ("grey.png", "LA", (0, 0), {}, WHITE),
    ("palette.png", "P", 1, {}, [0, 0, 255]),
    ("palette.png", "P", 1, {"transparency": 1}, WHITE),
    ("palette.gif", "P", 1, {"transparency": 1}, WHITE),
    ("key.png", "RGB", (9, 9, 9), {"transparency": (9, 9, 9)}, WHITE),
    ("bit.png", "1", 1, {}, WHITE),
    ("ink.jpg", "CMYK", (0, 255, 255, 0), {"quality": 95}, [254, 0, 0])])
def test_every_mode_becomes_rgb_over_white(tmp_path, name, mode, colour, options, expected):
    image = Image.new(mode, (8, 8), colour)
    if mode == "P":
        image.putpalette([255, 0, 0, 0, 0, 255])
    image.save(tmp_path / name, **options)
    assert np.abs(np.subtract(centre(tmp_path / name), expected)).max() <= (mode == "CMYK")


@pytest.mark.parametrize("name, dtype, values, expected", [
    ("16.png", np.uint16, [0, 32768, 65535], [0, 128, 255]),
    ("16.tif", np.int32, [0, 32768, 65535], [0, 128, 255]),
    ("12.png", np.uint16, [0, 2048, 4095], [0, 128, 255]),
    ("12.tif", np.uint16, [0, 2048, 4000], [0, 128, 249]),
    ("dark.png", np.uint16, [0, 100, 250], [0, 0, 1]),
    ("1.tif", np.float32, [0, 0.5, 1], [0, 128, 255]),
    ("255.tif", np.float32, [0, 100, 200], [0, 100, 200]),
    ("odd.tif", np.float32, [np.nan, np.inf, 200], [0, 0, 200])])
def test_deep_grey_becomes_8_bits(tmp_path, name, dtype, values, expected):
    Image.fromarray(np.array(values, dtype).repeat(3).reshape(3, 3)).save(tmp_path / name)
    assert read_image(tmp_path / name, 3)[0, :, 0].tolist() == expected


@pytest.mark.parametrize("ending", ["gif", "webp", "png", "tif"])
def test_first_frame_of_an_animation(tmp_path, ending):
    frames = [Image.new("RGB", (8, 8), c) for c in ("red", "blue", "green")]
    frames[0].save(tmp_path / f"film.{ending}", save_all=True, append_images=frames[1:])
    red, green, blue = centre(tmp_path / f"film.{ending}")
    assert red > 240 and green < 15 and blue < 15


@pytest.mark.parametrize("ending", ["jpg", "png", "webp", "tif"])
def test_exif_rotation(tmp_path, ending):
    image = render_sunset(3, 24)[0].permute(1, 2, 0).numpy()[:16]
    path, exif = str(tmp_path / f"turned.{ending}"), Image.Exif()
    for orientation in range(10):
        exif[0x0112] = orientation
        options = {"quality": 100} if ending in ("jpg", "webp") else {}
        Image.fromarray(image).save(path, exif=exif, **options)
        upright = ImageOps.exif_transpose(Image.open(path)).convert("RGB")
        left, top = (upright.width - 16) // 2, (upright.height - 16) // 2
        expected = np.array(upright.crop((left, top, left + 16, top + 16))).astype(int)
        assert np.abs(read_image(path, 16).permute(1, 2, 0).numpy() - expected).max() <= 2


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_broken_exif_block_does_not_spoil_the_picture(tmp_path):
    exif = b"Exif\0\0MM\0*\0\0\0\x08\xff\xff" + bytes(range(40))
    picture(tmp_path / "a.jpg", exif=exif)
    assert centre(tmp_path / "a.jpg")[0] > 240


def test_short_side_is_resized_and_the_centre_cropped(tmp_path):
    wide = np.zeros((20, 60, 3), np.uint8)
    wide[:, 20:40] = 200
    Image.fromarray(wide).save(tmp_path / "wide.png")
    assert (read_image(tmp_path / "wide.png", 10)[:, :, 1:-1] > 190).all()
    for name, size in (("dot.png", (1, 1)), ("line.png", (3, 5000))):
        picture(tmp_path / name, size=size)
        assert centre(tmp_path / name) == [255, 0, 0]


@pytest.mark.skipif(sys.platform != "linux", reason="other systems forbid such names and links")
def test_broken_files_are_skipped_counted_and_named_once(tmp_path, capsys):
    for i in range(30):
        picture(tmp_path / f"fine/{i}.png")
    picture(tmp_path / "good.png")
    raw, bad = (tmp_path / "good.png").read_bytes(), tmp_path / "bad"
    # a bomb: 10 GB when decoded
    ihdr = struct.pack(">II5B", 60000, 60000, 8, 2, 0, 0, 0)
    checksum = struct.pack(">I", zlib.crc32(b"IHDR" + ihdr))
    broken = {"cut.png": raw[:len(raw) // 2], "empty.jpg": b"", "text.gif": b"hello",
              "script.png": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
              "bomb.png": raw[:12] + b"IHDR" + ihdr + checksum + raw[33:]}
    fine = ["wrong ending.jpg", "line\nbreak \U0001f305 \x1b.png", "\udcff\udcfe.png"]
    bad.mkdir()
    for name, content in {**broken, **dict.fromkeys(fine, raw), "._photo.jpg": b""}.items():
        with open(os.fsencode(bad / name), "wb") as file:
            file.write(content)
    for link, target in (("dangling.png", "nowhere.png"), ("circle.png", "circle.png"),
                         ("up", ".."), ("round.png", tmp_path)):
        os.symlink(target, bad / link)
    os.mkfifo(bad / "pipe.png")
    os.mkfifo(bad / "wrong ending.txt")
    names = everything(tmp_path)
    assert {n for n in names if n.startswith("bad/")} == {f"bad/{n}" for n in fine}
    sets = [open_data(tmp_path, 8, split) for split in ("train", "test")]
    skipped = [line.split(" (")[0] for dataset in sets for line in dataset.skipped]
    assert sorted(skipped) == sorted(
        f"bad/{n}" for n in [*broken, "circle.png", "dangling.png", "pipe.png"])
    out = told(sets[0], capsys)
    assert f"{len(sets[0])} images" in out and f"skipped {len(sets[0].skipped)}" in out
    assert all(out.count(line) == 1 for line in sets[0].skipped) and len(out.splitlines()) == 2


@pytest.mark.skipif(sys.platform == "win32", reason="links need rights there")
def test_linked_folders_are_read_once(tmp_path):
    picture(tmp_path / "far/deep/1.png")
    picture(tmp_path / "here/0.png")
    for link, target in (("here/link", "far"), ("here/second", "far"), ("far/deep/back", "here")):
        os.symlink(tmp_path / target, tmp_path / link)
    assert set(everything(tmp_path / "here")) == {"0.png", "link/deep/1.png"}


# ---------------------------------------------------------------- IDX files

def idx(path, array):
    raw = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    path.parent.mkdir(exist_ok=True, parents=True)
    with (gzip.open if path.suffix == ".gz" else open)(path, "wb") as file:
        file.write(raw + array.tobytes())


@pytest.mark.parametrize("place, dot, gz, words", [
    ("digits", "-", "", ["3", "9"]), ("fashion", "-", ".gz", ["dress", "boot"]),
    ("FashionMNIST/raw", ".", "", ["dress", "boot"]), ("fashion/digits", "-", ".gz", ["3", "9"])])
def test_idx_files(tmp_path, gz, place, dot, words):
    folder, images = tmp_path / place, np.arange(2 * 28 * 28, dtype=np.uint8).reshape(2, 28, 28)
    for part, n in (("train", 2), ("t10k", 1)):
        idx(folder / f"{part}-images{dot}idx3-ubyte{gz}", images[:n])
        idx(folder / f"{part}-labels{dot}idx1-ubyte{gz}", np.array([3, 9][:n], np.uint8))
        idx(folder / f"other-{part}-images-idx3-ubyte{gz}", images[:1])
    for path in (folder, folder / f"train-images{dot}idx3-ubyte{gz}"):
        train, test = open_data(path, 28), open_data(path, 28, "test")
        assert [train[i][1] for i in (0, 1)] == words and len(train) == 2 and len(test) == 1
        assert torch.equal(train[1][0], torch.from_numpy(images[1]).expand(3, 28, 28))
        assert train.fingerprint == test.fingerprint and train.native == (28, 28)
        assert open_data(path, 32)[0][0].shape == (3, 32, 32)
    other = open_data(folder / f"other-train-images-idx3-ubyte{gz}", 28)
    assert len(other) == 1 and other.captions == [""]


def test_idx_without_test_files_holds_a_tenth_back(tmp_path):
    idx(tmp_path / "train-images-idx3-ubyte", np.zeros((200, 2, 2), np.uint8))
    train, test = open_data(tmp_path, 2), open_data(tmp_path, 2, "test")
    assert len(train) + len(test) == 200 and 5 < len(test) < 40
    assert train.captions == [""] * len(train)


@pytest.mark.parametrize("gz", ["", ".gz"])
def test_broken_idx_files_are_one_line(tmp_path, gz):
    path = tmp_path / f"train-images-idx3-ubyte{gz}"
    good = bytes([0, 0, 8, 3])
    for raw in (good + struct.pack(">3I", 2 ** 20, 28, 28) + b"x" * 90,
                good + struct.pack(">3I", 1, 2, 2) + b"12345", good + b"\0\0",
                bytes([0, 0, 13, 3]) + struct.pack(">3I", 1, 1, 1) + b"1", b"\0\0", b""):
        raw = gzip.compress(raw) if gz else raw
        for content in (raw, gzip.compress(raw)[:12]):
            path.write_bytes(content)
            with pytest.raises(UserError, match="^.*cannot be read.*$"):
                open_data(tmp_path)


def test_idx_labels_must_match_the_images(tmp_path):
    idx(tmp_path / "train-labels-idx1-ubyte", np.zeros(3, np.uint8))
    with pytest.raises(UserError, match="no train-images"):
        open_data(tmp_path)
    idx(tmp_path / "train-images-idx3-ubyte", np.zeros((2, 2, 2), np.uint8))
    with pytest.raises(UserError, match="2 images but 3 labels"):
        open_data(tmp_path)


# ---------------------------------------------------------------- sunsets

def test_sunsets_are_deterministic_distinct_and_split():
    train, test = open_data("sunsets", 32), open_data("sunsets", 32, "test")
    assert len(train) == 45_000 and len(test) == 5_000 and train.fingerprint == test.fingerprint
    assert torch.equal(train[7][0], render_sunset(7)[0])
    assert torch.equal(test[0][0], render_sunset(45_000)[0])
    assert train.captions[7] == train[7][1] and set(test.captions) == set(train.captions)
    assert len({train[i][0].numpy().tobytes() for i in range(300)}) == 300
    with pytest.raises(IndexError):
        train[45_000]


def test_a_sunset_is_the_same_picture_at_every_size():
    for i in range(12):
        small, large = render_sunset(i, 32)[0].float(), render_sunset(i, 128)[0].float()
        # of 255
        assert (small - torch.nn.functional.avg_pool2d(large, 4)).abs().mean() < 4


def test_sunset_labels_say_where_the_sun_is_and_the_caption_agrees():
    for i in range(60):
        image, caption, labels = render_sunset(i, 64)
        part = {name: labels == k for k, name in enumerate(SUNSET_LABELS)}
        middle = {name: part[name].nonzero().float().mean(0) / 64 for name in part}
        y, x = middle["sun"]
        named = [word in caption for word in ("left", "middle", "right")]
        assert named == [x < 0.36, 0.36 < x < 0.64, x > 0.64]
        assert ("low" in words_of(caption)) == (y > 0.4)
        assert ("no clouds" in caption) != part["cloud"].any()
        # the glitter lies below the sun, and nothing is as bright
        assert abs(middle["reflection"][1] - x) < 0.08
        assert image[:, part["sun"]].float().mean() > image.float().mean()


def test_the_sun_decides_the_colour_of_the_clouds():
    lit = {}
    for i in range(200):
        image, caption, labels = render_sunset(i)
        cloud = labels == SUNSET_LABELS.index("cloud")
        if cloud.any():
            lit.setdefault(caption.split()[1], []).append(image[:, cloud].float().mean(1))
    means = {colour: torch.stack(values).mean(0) for colour, values in lit.items()}
    # the nearest mean names the sun
    guesses = [min(means, key=lambda c: (value - means[c]).norm()) == colour
               for colour in lit for value in lit[colour]]
    assert len(means) == 5 and sum(guesses) > 0.85 * len(guesses)


# ---------------------------------------------------------------- words, pictures, progress

@pytest.mark.parametrize("caption, words", [
    ("T-shirt, red_2 \u00c9t\u00e9!", "t shirt red 2 \u00e9t\u00e9"),
    ("", ""),
    ("cafe\u0301 caf\u00e9", "caf\u00e9 caf\u00e9"),
    ("\u0915\u093e\u0932\u093e", "\u0915\u093e\u0932\u093e"),
    ("\u7ea2\u732b red\u732b2", "\u7ea2 \u732b red \u732b 2"),
    ("\U0001f534\U0001f431 \u2764\ufe0f", "\U0001f534 \U0001f431 \u2764"),
    ("\u0301 -- \uff21\uff22", "ab")])
def test_words_of(caption, words):
    assert words_of(caption) == words.split()


def test_printable():
    assert printable("a\nb\x1b\udcff\U0001f305") == "a\\nb\\x1b\\udcff\U0001f305"


def test_bytes_and_floats_convert_by_rounding():
    every = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(to_float(every)), every)
    assert to_uint8(torch.tensor([-9, 9, 0.999, float("nan")])).tolist() == [0, 255, 255, 128]


def test_sheet_places_images_row_by_row():
    images = torch.tensor([0, 50, 100], dtype=torch.uint8).view(3, 1, 1, 1).expand(3, 3, 2, 4)
    page = np.array(sheet(images, 2, scale=3, gap=1))
    assert page.shape == (2 * 7 + 1, 2 * 13 + 1, 3)
    assert [page[0, 0, 0], page[1, 1, 0], page[6, 25, 0], page[8, 1, 0], page[8, 20, 0]] == [
        255, 0, 50, 100, 255]
    assert np.array_equal(np.array(sheet(to_float(images), 2, 3, 1)), page)
    assert sheet(images, 8).size == (3 * 6 + 2, 6)


def test_loss_curve_is_a_picture_and_a_table(tmp_path):
    history = [(1, 3.0, 3.5), (10, 2.0, 2.25)]
    data.loss_curve(history, tmp_path / "loss.png", math.log(512))
    table = (tmp_path / "loss.csv").read_text()
    assert table == "step,training,held_out\n1,3,3.5\n10,2,2.25\n"
    colours = {colour for _, colour in Image.open(tmp_path / "loss.png").getcolors(10_000)}
    assert {(255, 0, 0), (192, 192, 192), (0, 0, 255)} <= colours
    # a run of one step without a floor
    data.loss_curve(history[:1], tmp_path / "one.png")


def test_progress_in_a_log_is_short_lines_and_only_of_the_first_process(monkeypatch):
    log = io.StringIO()
    monkeypatch.setattr(sys, "stderr", log)
    for process in ("0", "1"):
        monkeypatch.setenv("RANK", process)
        with data.progress(1000, "training", "step") as bar:
            for _ in range(1000 * (process == "0")):
                # as if a second had passed
                bar.start_t -= 1
                bar.last_print_t -= 1
                bar.update()
    lines = log.getvalue().split("\n")
    assert "\r" not in log.getvalue() and 10 < len(lines) < 20
    assert max(map(len, lines)) <= 90 and "1000/1000" in log.getvalue()


# ---------------------------------------------------------------- files

def test_fingerprint_tells_contents_apart():
    parts = ["ab", b"ab", ["ab"], ["a", "b"], {"a": "b"}, {"a": 1}, {"a": 1.0}, {"a": None}, 1, "1",
             True, torch.zeros(2), torch.zeros(2, 1), torch.zeros(2, dtype=torch.int32),
             torch.tensor(0.0), torch.zeros(0)]
    names = {fingerprint(part) for part in parts} | {fingerprint("a", "b"), fingerprint()}
    assert len(names) == len(parts) + 2
    assert fingerprint({"a": 1, "b": [2]}) == fingerprint({"b": [2], "a": 1})
    turned = torch.arange(6).reshape(2, 3).T
    assert fingerprint(turned) == fingerprint(turned.contiguous())


GOOD = dict(kind="tokens", config=dict(rows=2), made_from=dict(data="0"), tokens=torch.arange(64))


def test_save_replaces_the_file_as_a_whole(tmp_path):
    path = str(tmp_path / "new" / "a.pt")
    save(path, GOOD)
    with pytest.raises(ZeroDivisionError):
        with replacing(path) as file:
            file.write(b"half")
            1 / 0
    contents = load(path, "tokens", "python tokenizer.py")
    assert torch.equal(contents["tokens"], GOOD["tokens"]) and contents["config"] == {"rows": 2}
    assert os.listdir(tmp_path / "new") == ["a.pt"]


def test_two_writers_of_one_file_do_not_meet(tmp_path):
    path = str(tmp_path / "a.pt")

    def work(value):
        for _ in range(20):
            save(path, {**GOOD, "w": torch.full((20_000,), value)})
            assert len(load(path, "tokens", "")["w"].unique()) == 1

    with concurrent.futures.ThreadPoolExecutor() as pool:
        list(pool.map(work, (1.0, 2.0)))
    assert os.listdir(tmp_path) == ["a.pt"]


@pytest.mark.skipif(sys.platform == "win32", reason="needs a limit on the size of a file")
def test_a_full_disk_gives_one_line_and_keeps_the_old_file(tmp_path):
    path = str(tmp_path / "a.pt")
    save(path, GOOD)
    script = ("import resource, signal, torch; from data import run, save\n"
              "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
              "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
              f"run(lambda: save({path!r}, dict(kind='tokens', x=torch.zeros(10**6))))")
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=HERE)
    assert done.returncode == 2 and re.fullmatch("error: .*\n", done.stderr)
    assert os.listdir(tmp_path) == ["a.pt"] and load(path, "tokens", "")["kind"] == "tokens"


def test_an_out_that_cannot_be_written_is_refused_at_once(tmp_path):
    data.writable(tmp_path / "new" / "out")
    assert os.listdir(tmp_path / "new" / "out") == []
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "out"):
        with pytest.raises(UserError, match="cannot be written to"):
            data.writable(out)


class Bomb:
    """Pickles as a call that is made when it is loaded."""
    def __init__(self, function, argument):
        self.call = function, (argument,)

    def __reduce__(self):
        return self.call


def test_load_refuses_what_it_should_in_one_line(tmp_path):
    path, bomb = tmp_path / "a.pt", Bomb(os.mkdir, str(tmp_path / "exploded"))

    def refused(message):
        with pytest.raises(UserError, match=f"^.*{message}.*: run python tokenizer.py$"):
            load(path, "tokens", "python tokenizer.py")

    refused("does not exist")
    save(path, GOOD)
    raw = path.read_bytes()
    where = raw.index(GOOD["tokens"].numpy().tobytes()) + 100
    # one bit of a weight
    flipped = raw[:where] + bytes([raw[where] ^ 1]) + raw[where + 1:]
    for wrong in (raw[:-20], b"", flipped, pickle.dumps(bomb)):
        path.write_bytes(wrong)
        refused("damaged")
    for contents, message in (([1], "damaged"), ({}, "damaged"),
                              ({**GOOD, "kind": "orders", "version": 2}, "holds orders, expected"),
                              ({**GOOD, "version": 1}, "written by an older version"),
                              ({**GOOD, "version": 2, "x": bomb}, "damaged")):
        torch.save(contents, path)
        refused(message)
    assert not (tmp_path / "exploded").exists()


# ---------------------------------------------------------------- flags and errors

DIED = "error: another process of this run has died: its message tells why"


@pytest.mark.parametrize("error, code, line", [
    (UserError("size 7: expected 8"), 2, "error: size 7: expected 8"),
    (KeyboardInterrupt(), 130, "stopped"),
    (PermissionError(13, "Permission denied", "out/x\n.pt"), 2,
     "error: out/x\\n.pt: Permission denied"),
    (OSError(28, "No space left on device"), 2, "error: writing: No space left on device"),
    (MemoryError(), 2, data.TOO_LARGE),
    (torch.OutOfMemoryError("CUDA out of memory"), 2, data.TOO_LARGE),
    (RuntimeError("[gloo] Connection closed by peer"), 1, DIED)])
def test_run_turns_errors_into_one_line(capsys, error, code, line):
    def main():
        raise error
    with pytest.raises(SystemExit) as caught:
        run(main)
    assert caught.value.code == code and capsys.readouterr().err == line + "\n"


def test_run_knows_how_torch_says_that_memory_is_out_and_leaves_bugs_alone(capsys):
    with pytest.raises(SystemExit):
        run(lambda: torch.empty(2 ** 55))
    assert capsys.readouterr().err == data.TOO_LARGE + "\n"
    run(lambda: None)
    for bug in (lambda: 1 / 0, lambda: torch.ones(2) @ torch.ones(3)):
        with pytest.raises((ZeroDivisionError, RuntimeError)):
            run(bug)


@pytest.mark.skipif(not sys.platform.startswith("linux") or
                    not hasattr(ctypes.CDLL(None), "mallopt"), reason="no glibc")
def test_freed_memory_is_not_fetched_page_by_page_again():
    """20 MB in blocks, taken and freed: after warming up no page is new. (10,000 by default.)"""
    faults = "resource.getrusage(resource.RUSAGE_SELF).ru_minflt"
    program = ("import resource, torch, data; data.keep_memory()\nfor i in range(15):\n"
               f"    if i == 5:\n        first = {faults}\n"
               f"    [torch.ones(1_000_000) for _ in range(5)]\nprint({faults} - first)")
    done = subprocess.run([sys.executable, "-c", program], cwd=HERE, capture_output=True, text=True)
    assert int(done.stdout) < 500, done.stderr


def test_bad_arguments_are_one_line(tmp_path):
    for bad in (dict(path=str(tmp_path / "no such\nplace")), dict(split="dev"), dict(size=0),
                dict(size=2.5), dict(size=10 ** 6), dict(path=str(tmp_path)),
                dict(path=__file__), dict(path=""), dict(path="a\0b")):
        with pytest.raises(UserError, match="^.*$"):
            open_data(**bad)
    (tmp_path / "a.png").write_bytes(b"not an image")
    with pytest.raises(UserError, match="none of 1 images can be trained on, a.png .cannot"):
        len(open_data(tmp_path))


@pytest.mark.parametrize("kind, most, good, bad, limits", [
    (int, math.inf, "3", "0 2.5 x -1 inf", "a whole number of at least 1"),
    (float, 2, "1.5", "0.9 2.1 nan inf", "a number from 1 to 2"),
    (float, math.inf, "1e9", "inf nan", "a number of at least 1")])
def test_numbers_outside_their_range_are_refused_with_the_range(kind, most, good, bad, limits):
    read = data.number(kind, 1, most)
    assert read(good) == float(good)
    for text in bad.split():
        with pytest.raises(argparse.ArgumentTypeError, match=f"^{text} is not {limits}$"):
            read(text)


def test_shared_flags_and_the_command_line_that_repeats_them():
    args = arguments("Some words.\n\nMore.").parse_args(["--data", "x", "--seed", "1"])
    assert (args.data, args.out, args.device, args.seed) == ("x", "out", "", 1)
    for wrong in (["--seed", "x\n"], ["--seed", str(2 ** 70)], ["--dat", "x"], ["stray"]):
        with pytest.raises(UserError, match="^.*--help.*$"):
            arguments("Some words.").parse_args(wrong)
    line = data.command_line("a.py", "--out", "my out")
    assert shlex.split(line.replace('"', "'")) == ["python", "a.py", "--out", "my out"]


# ---------------------------------------------------------------- devices and processes

def test_devices_that_are_not_here_are_refused():
    for name in ("gpu", "cuda:99", "meta", "cpu\n"):
        with pytest.raises(UserError, match="not available"):
            pick_device(name)
    assert pick_device("cpu").type == "cpu" and pick_device().type in ("cpu", "cuda", "mps")


def test_the_own_gpu_is_chosen_before_any_is_touched(monkeypatch):
    # as if there were GPUs
    chosen = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch, "empty", lambda *shape, device: chosen.append("touched"))
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    names = ["cuda:1", "cuda", "cpu"]
    assert [pick_device(name) for name in names] == [torch.device(name) for name in names]
    monkeypatch.setenv("LOCAL_RANK", "3")
    pick_device("cuda")
    assert list(map(str, chosen)) == ["cuda:1", "touched", "cuda:0", "touched", "touched",
                                      "cuda:3", "touched"]


def test_half_of_torchruns_variables_are_one_line(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    assert data.join(torch.device("cpu")) == (0, 1)
    data.alone("data.py")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(UserError, match="start with torchrun, or unset RANK"):
        data.join(torch.device("cpu"))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="run python data.py, without torchrun"):
        data.alone("data.py")


# ---------------------------------------------------------------- an unfinished run

def begin(path, resume=True, **settings):
    return data.Checkpoint(path, {"width": 32, "data": "ab"} | settings, resume, "python a.py")


def test_an_unfinished_run_goes_on_where_it_was_saved(tmp_path, monkeypatch, capsys):
    path, usual = tmp_path / "a_resume.pt", signal.default_int_handler
    monkeypatch.setattr(data, "SAVE_EVERY", 1e9)
    try:
        checkpoint = begin(path)
        assert checkpoint.state == {}
        checkpoint.after_step(dict, 1)
        assert not path.exists()
        monkeypatch.setattr(data, "SAVE_EVERY", -1)
        checkpoint.after_step(lambda: {"step": 2, "w": torch.ones(2)}, 2)
        assert begin(path).state["step"] == 2 and begin(path, resume=False).state == {}
        with pytest.raises(UserError, match="was begun with another width, data: .*--resume"):
            begin(path, width=64, data="cd")
        # Ctrl-C leaves after the step; torchrun sends it twice
        checkpoint = begin(path)
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            checkpoint.after_step(lambda: {"step": 3}, 3)
        assert "stopped at step 3" in capsys.readouterr().out and begin(path).state == {"step": 3}
        # a second one, later, leaves at once
        checkpoint = begin(path)
        signal.raise_signal(signal.SIGINT)
        checkpoint.asked -= 2
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        checkpoint.done()
        assert not path.exists() and signal.getsignal(signal.SIGINT) is usual
        checkpoint.done()
    finally:
        signal.signal(signal.SIGINT, usual)


# ---------------------------------------------------------------- the script

def test_data_py_writes_a_contact_sheet_and_reads_every_flag(tmp_path, cli):
    out = tmp_path / "out"

    def sheet_of(*flags):
        assert len(cli.ok("data", "--out", out, "--size", 16, *flags).splitlines()) >= 26
        return (out / "data.png").read_bytes()

    first = sheet_of()
    assert Image.open(out / "data.png").size == (8 * 98 + 2, 3 * 98 + 2) and sheet_of() == first
    for i in range(40):
        picture(tmp_path / f"own/{i}.png")
    sheets = {first, sheet_of("--seed", 1), sheet_of("--split", "test"), sheet_of("--size", 8),
              sheet_of("--data", tmp_path / "own")}
    assert len(sheets) == 5
    for flags in (["--data", tmp_path / "none"], ["--split", "x"], ["--size", 0],
                  ["--out", __file__]):
        cli.refused("data", out, *flags)


def mutated(raw, rng):
    """Bytes with flipped bits, a cut end, or a repeated piece."""
    raw = bytearray(raw)
    a, b = rng.randrange(len(raw)), rng.randrange(len(raw))
    damage = rng.randrange(3)
    if damage == 0:
        for _ in range(rng.choice((1, 4, 64))):
            raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
    elif damage == 1:
        del raw[a:]
    else:
        raw[a:a] = raw[b:b + 64]
    return bytes(raw)


@slow
@pytest.mark.filterwarnings("ignore")
def test_a_thousand_mutated_images_are_read_or_skipped(tmp_path, capfd):
    image, rng = sheet(render_sunset(5, 40)[0][None], 1, gap=0), random.Random(0)
    exif = Image.Exif()
    exif[0x0112] = 6
    kinds = (("png", dict(exif=exif)), ("jpg", dict(exif=exif)), ("jpg", dict(progressive=True)),
             ("bmp", {}), ("webp", dict(exif=exif)), ("webp", dict(lossless=True)),
             ("gif", dict(save_all=True, append_images=[image])), ("tif", {}),
             ("tif", dict(compression="tiff_lzw")), ("tif", dict(compression="jpeg")))
    folder = tmp_path / "images"
    folder.mkdir()
    for k, (ending, options) in enumerate(kinds):
        image.save(tmp_path / f"seed.{ending}", **options)
        raw = (tmp_path / f"seed.{ending}").read_bytes()
        for i in range(100):
            (folder / f"{k}-{i}.{ending}").write_bytes(mutated(raw, rng))
    total = 0
    for split in ("train", "test"):
        dataset = open_data(folder, 16, split)
        assert all(dataset[i][0].shape == (3, 16, 16) for i in range(len(dataset)))
        total += len(dataset) + len(dataset.skipped)
    assert total == 1000
    out, err = capfd.readouterr()
    assert "Traceback" not in err and not out


def small_tokenizer(size=16, downsample=4, codebook=32):
    torch.manual_seed(0)
    return Tokenizer(dict(size=size, downsample=downsample, codebook=codebook, width=16, fine=8,
                          dim=8))


def some_sunsets(n, size=16, split="train"):
    dataset = open_data("sunsets", size, split)
    return to_float(torch.stack([dataset[i][0] for i in range(n)]))


@pytest.fixture
def narrow(monkeypatch):
    """Small enough to train in seconds."""
    for name, value in dict(WIDTH=16, FINE=8, DIM=8, WARMUP=4).items():
        monkeypatch.setattr(tokenizer, name, value)
    monkeypatch.setattr(data, "SUNSETS", data.SUNSETS_TRAIN + 40)      # fewer test images to render


SMALL = dict(size=8, codebook=16, steps=2, batch=2)


@pytest.mark.parametrize("size, downsample, cells", [(12, 4, 9), (16, 2, 64), (64, 16, 16)])
def test_tokenizer_shapes(size, downsample, cells):
    model = small_tokenizer(size, downsample)
    images = torch.rand(3, 3, size, size) * 2 - 1
    tokens = model.encode(images)
    assert tokens.shape == (3, cells) and tokens.dtype == torch.int64
    assert 0 <= tokens.min() and tokens.max() < 32 and model.rows * model.cols == cells
    drawn = model.decode(tokens)
    assert drawn.shape == images.shape and drawn.dtype == torch.float32 and drawn.abs().max() <= 1
    assert torch.equal(drawn, model.decode(tokens.to(torch.uint8)))


def test_tokenizer_cells_are_row_major():
    model, image = small_tokenizer(size=32), some_sunsets(1, 32)       # 8 x 8 cells
    other = image.clone()
    other[:, :, 4:8, 24:28] = torch.rand(1, 3, 4, 4) * 2 - 1           # row 1, column 6: cell 14
    assert (model.latents(image) - model.latents(other)).abs().sum(-1).argmax() == 14


def test_tokenizer_learns_and_uses_its_codes():
    """Soon images are drawn far better than by one colour each, with most codes in use."""
    model, images = small_tokenizer(), some_sunsets(400)
    optimizers = tokenizer.make_optimizers(model)
    for step in range(150):
        loss = model.loss(images[batch_of(step, 8, len(images), 0)], step)
        tokenizer.update(loss, model, optimizers, learning_rate(step, 150, 3e-3), step)
    unseen = some_sunsets(100, split="test")
    tokens = model.encode(unseen)
    flat = unseen.mean((2, 3), keepdim=True).expand_as(unseen)
    assert psnr(model.decode(tokens), unseen).mean() > psnr(flat, unseen).mean() + 5
    used, perplexity = usage(tokens, 32)
    assert used >= 24 and perplexity > 8


def test_straight_through_gradient_reaches_the_encoder():
    model, images = small_tokenizer(), some_sunsets(4)
    for step in (0, 1):
        model.zero_grad()
        model.loss(images, tokenizer.WARMUP + step).backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert model.encoder[1].weight.grad.abs().sum() > 0


def test_dead_codes_restart_where_the_data_are():
    model = small_tokenizer(codebook=16)
    model.codebook[:] = 100.0            # the collapse: every code but one is far from the data
    model.codebook[0] = 0.0
    model.total.copy_(model.codebook)
    model.count.fill_(1)
    z = torch.randn(64, 8, generator=torch.Generator().manual_seed(1))
    assert usage(model.nearest(z), 16)[0] == 1
    for step in range(150):
        model.move_codes(z, model.nearest(z), step, seed=0)
    assert usage(model.nearest(z), 16)[0] >= 15 and model.codebook.abs().max() < 10


@pytest.mark.parametrize("warmup, steps", [(0, (0, 1)), (2, (1, 2, 3)), (2, (0, 7, 8))])
def test_codes_begin_once_however_few_steps_there_are_and_wherever_a_run_goes_on(
        warmup, steps, monkeypatch):
    """By k-means, in the first step after the warm-up, also if a resumed run has a shorter one."""
    model, images = small_tokenizer(), some_sunsets(4)
    calls = calls_of(monkeypatch, model, "first_codes")
    model.warmup = warmup
    for step in steps:
        model.loss(images, step)
    assert len(calls) == 1 and model.count.min() > 0


def test_usage_and_psnr_by_hand():
    assert usage(torch.tensor([[3, 3], [3, 3]]), 8) == (1, 1.0)
    assert usage(torch.tensor([0, 1, 2, 3], dtype=torch.uint8), 8) == (4, pytest.approx(4))
    # exp of the entropy of (3/4, 1/4)
    assert usage(torch.tensor([0, 0, 0, 1]), 2) == (2, pytest.approx(4 / 3 ** 0.75))
    black, grey = -torch.ones(2, 3, 4, 4), torch.zeros(2, 3, 4, 4)     # half the range: 20 log10(2)
    assert psnr(grey, black).tolist() == pytest.approx([6.0206, 6.0206], abs=1e-4)


def test_nearest_codes_in_parts_are_the_nearest_codes():
    model = Tokenizer(dict(size=8, downsample=4, codebook=65536, width=8, fine=8, dim=4))
    z = torch.randn(2, 20, 30, 4)                       # 1,200: more than are compared at once
    found = model.nearest(z)
    assert found.shape == (2, 20, 30)
    few = torch.tensor([0, 500, 511, 512, 513, 1199])
    expected = torch.cdist(z.flatten(0, 2)[few], model.codebook).argmin(1)
    assert torch.equal(found.flatten()[few], expected)


@pytest.mark.parametrize("n, batch", [(10, 4), (3, 8), (1, 2)])
def test_batches_are_whole_epochs(n, batch):
    """Every image comes once an epoch, also if a batch is larger than the data."""
    stream = sum((batch_of(step, batch, n, 5) for step in range(3 * n)), [])
    epochs = [stream[i:i + n] for i in range(0, 3 * n * batch, n)]
    assert all(sorted(epoch) == list(range(n)) for epoch in epochs)
    assert n < 10 or epochs[0] != epochs[1] and batch_of(2, 4, n, 5) != batch_of(2, 4, n, 6)


def test_learning_rate_warms_up_and_ends_near_zero():
    rates = [learning_rate(s, 100, 1.0) for s in range(100)]
    assert rates[0] < rates[3] and max(rates) == pytest.approx(1, abs=0.01) and rates[-1] < 0.01
    assert learning_rate(0, 1, 2.0) == learning_rate(0, 2, 2.0) == 2


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("shape", ((8, 8), (8, 32), (24, 8)), ids=str)
def test_orthogonal_keeps_the_directions_and_evens_out_their_lengths(shape, dtype):
    random = torch.Generator().manual_seed(0)
    left, _, right = torch.linalg.svd(torch.randn(5, *shape, generator=random), False)
    g = left * torch.logspace(-4, -2, 8) @ right        # the longest is 100 times the shortest
    found = left.mT @ tokenizer.orthogonal(g.to(dtype)).float() @ right.mT
    lengths = found.diagonal(dim1=1, dim2=2)            # [5, 8, 8] is diagonal, if directions stay
    assert 0.65 < lengths.min() and lengths.max() < 1.3
    least = 1e-3 if dtype == torch.float32 else 0.1
    assert (found - lengths.diag_embed()).abs().max() < least


def test_muon_is_its_definition_and_matrices_of_one_shape_do_not_mix():
    random = torch.Generator().manual_seed(0)
    shapes = (8, 16), (24, 8), (8, 16), (6, 2, 3, 3), (6, 2, 3, 3)
    weights = [torch.randn(shape, generator=random) for shape in shapes]
    # as the tokenizer has its convolutions
    weights[3] = weights[3].contiguous(memory_format=torch.channels_last)
    expected, momenta = [w.clone() for w in weights], [torch.zeros_like(w) for w in weights]
    optimizer = tokenizer.Muon(weights, 0.1, torch.float32)
    for _ in range(3):
        for i, w in enumerate(weights):
            w.grad = torch.randn(w.shape, generator=random)
            momenta[i] = 0.95 * momenta[i] + 0.05 * w.grad
            ahead = (0.95 * momenta[i] + 0.05 * w.grad).flatten(1)         # [i, j]
            turn = tokenizer.orthogonal(ahead[None]).view(w.shape)
            length = 0.2 * math.sqrt(max(ahead.shape)) * 0.1
            expected[i] = (1 - 0.05 * 0.1) * expected[i] - length * turn
        optimizer.step()
    torch.testing.assert_close(weights, expected, rtol=1e-4, atol=1e-5)


def test_each_weight_has_one_optimizer_and_convolutions_of_blocks_have_muon():
    model = small_tokenizer()
    adamw, muon = ([id(w) for group in each.param_groups for w in group["params"]]
                   for each in tokenizer.make_optimizers(model))
    assert sorted(adamw + muon) == sorted(id(w) for w in model.parameters())
    blocks = [block for block in model.modules() if isinstance(block, tokenizer.Block)]
    convolutions = [conv.weight for block in blocks for conv in (block.conv1, block.conv2)]
    assert sorted(muon) == sorted(map(id, convolutions)) and len(blocks) == 5


def test_tokens_file(tmp_path, narrow):
    make_tokens(out=tmp_path, size=8, codebook=16, steps=12, batch=4, limit=60)
    train, test = open_data("sunsets", 8, "train"), open_data("sunsets", 8, "test")
    tokens = tokenizer.open_tokens(tmp_path, "sunsets")
    model = tokenizer.open_tokenizer(tmp_path, tokens)
    assert tokens["split"].bincount().tolist() == [57, 3, len(test)]
    assert tokens["config"] == dict(rows=2, cols=2, codebook=16, size=8, downsample=4,
                                    data="sunsets")
    assert tokens["made_from"] == dict(data=train.fingerprint, tokenizer=model.fingerprint)
    assert len(set(tokens["captions"])) == len(tokens["captions"])
    for i, (image, caption) in [(7, train[7]), (61, test[1])]:
        assert tokens["captions"][tokens["caption_index"][i]] == caption
        assert torch.equal(model.encode(to_float(image[None]))[0], tokens["tokens"][i])
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    assert files_of(tmp_path).keys() == {"reconstructions.png", "tokenizer.pt", "tokens.pt"}


def test_a_finished_tokenizer_is_never_replaced(tmp_path, narrow, cli):
    """Neither by the same command, nor by other data or settings, nor by --resume."""
    folder, out = picture_folder(tmp_path / "pictures", 12), tmp_path / "my out"
    flags = "--data", folder, "--size", 8, "--steps", 2
    printed = cli.ok("tokenizer", "--out", out, *flags)
    assert f"next: {data.command_line('anyorder.py', '--out', out)}" in printed
    for more in (flags, (), (*flags, "--resume"), (*flags, "--seed", 1)):
        assert ("already holds a tokenizer, and the models beside it need it: give another --out, "
                "or remove") in cli.refused("tokenizer", out, *more)


def test_out_must_be_a_folder_apart_from_the_images(tmp_path, narrow):
    folder = picture_folder(tmp_path / "pictures", 12)
    (tmp_path / "link").symlink_to(folder)
    (tmp_path / "file").write_text("precious")
    before = files_of(tmp_path)
    for out in (folder, folder / "out", *(tmp_path / name for name in ("link/out", "file/out"))):
        with pytest.raises(UserError, match="lies in --data|file"):
            make_tokens(folder, out, **SMALL)
    assert files_of(tmp_path) == before
    make_tokens(folder, f"{folder}_out", **SMALL)                      # beside it is good


def test_one_image_is_enough_and_then_the_psnr_is_its_own(tmp_path, narrow, capsys):
    folder = picture_folder(tmp_path / "pictures", 9, captions=False)
    train = [path for path in sorted(folder.iterdir()) if not data.in_test_split(path.name)]
    for path in {*folder.iterdir()} - {train[0]}:
        path.unlink()
    make_tokens(folder, tmp_path / "out", size=12, codebook=8, steps=6)
    saved = tokenizer.open_tokens(tmp_path / "out")
    assert saved["tokens"].shape == (1, 9) and saved["split"].tolist() == [0]
    assert "dB on 1 training images" in capsys.readouterr().out


@pytest.mark.parametrize("size, line", [(8, "trained at 8x8 (2x2 cells): --size 16 for more"),
                                        (24, "trained at 24x24 (6x6 cells)\n")])
def test_the_size_is_no_secret(size, line, tmp_path, narrow, capsys):
    folder = picture_folder(tmp_path / "pictures", 12, size=24)
    make_tokens(folder, tmp_path / "out", **{**SMALL, "size": size})
    assert line in capsys.readouterr().out


def test_long_captions_are_cut_and_one_is_named(capsys):
    def words_and_length(*captions):
        """Of these captions of training images, and of one of a test image."""
        split = torch.tensor([0] * len(captions) + [2], dtype=torch.uint8)
        return vocabulary(dict(captions=[*captions, "c " * 80], split=split,
                               caption_index=torch.arange(len(split), dtype=torch.int32)))

    words = [f"w{i}" for i in range(100)]
    assert words_and_length("T-shirt, RED", "red") == (["red", "shirt", "t"], 3)
    assert words_and_length("") == ([], 1)
    assert words_and_length(" ".join(words[:64]))[1] == 64 and capsys.readouterr().out == ""
    assert words_and_length(" ".join(words), "b", "x " * 65) == (sorted([*words, "b", "x"]), 64)
    printed = capsys.readouterr().out
    assert printed.startswith("2 captions have more than 64 words") and "w0 w1" in printed


def test_images_are_read_ahead_in_order_and_errors_arrive():
    """By threads, of a plan without end: no process can die, no shared memory can be full."""
    class Images:
        read = []

        def __getitem__(self, i):
            self.read.append(i)
            if i == 30:
                raise UserError("image 30 cannot be read")
            return torch.full((3, 2, 2), i, dtype=torch.uint8), ""

    plan = ([i, i + 1] for i in itertools.count(0, 2))
    stream = tokenizer.batches(Images(), plan, torch.device("cpu"))
    for i in range(0, 30, 2):
        assert torch.equal(next(stream)[:, 0, 0, 0], to_float(torch.tensor([i, i + 1])))
        assert max(Images.read) < i + 12
    with pytest.raises(UserError, match="image 30"):
        next(stream)


def test_a_run_begun_in_bfloat16_goes_on_in_it_but_its_tokens_are_those_of_float32(
        tmp_path, narrow, monkeypatch):
    """Whatever the probe says later: the same bit for bit as a run that was not stopped."""
    folder = picture_folder(tmp_path / "pictures", 12)
    flags = dict(SMALL, data=folder, steps=20)
    compute_in(monkeypatch, lambda device: torch.bfloat16)
    make_tokens(out=tmp_path / "whole", **flags)
    with control_c(13), pytest.raises(KeyboardInterrupt):              # the codes move already
        make_tokens(out=tmp_path / "halves", **flags)
    assert files_of(tmp_path / "halves").keys() == {"tokenizer_resume.pt"}
    with pytest.raises(UserError, match="batch"):
        make_tokens(out=tmp_path / "halves", resume=True, **{**flags, "batch": 5})
    compute_in(monkeypatch, lambda device: torch.float32)
    make_tokens(out=tmp_path / "halves", resume=True, **flags)
    make_tokens(out=tmp_path / "float", **flags)
    whole, halves, other = (load_tokenizer(tmp_path / name / "tokenizer.pt")
                            for name in ("whole", "halves", "float"))
    assert whole.fingerprint == halves.fingerprint != other.fingerprint
    images = open_data(folder, 8, "train")
    tokens = whole.encode(to_float(torch.stack([image for image, _ in images])))
    for name in ("whole", "halves"):
        found = tokenizer.open_tokens(tmp_path / name)["tokens"]
        assert torch.equal(found[:len(images)], tokens)


def test_ctrl_c_ends_encoding_at_once_and_the_run_can_begin_anew(tmp_path, narrow, monkeypatch):
    flags = dict(SMALL, data=picture_folder(tmp_path / "pictures", 12), out=tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(tokenizer, "encode", lambda *_: signal.raise_signal(signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            make_tokens(**flags)
    make_tokens(resume=True, **flags)
    tokenizer.open_tokens(tmp_path / "out")


@pytest.mark.parametrize("flags, message", [
    (["--size", "30"], "--size 30 is not divisible by --downsample 4: take --size 32"),
    (["--downsample", "3"], "(choose from 2, 4, 8, 16)"),
    (["--codebook", "1"], "from 2 to 65536"),
    (["--data", "no/such/folder"], "no/such/folder does not exist")])
def test_tokenizer_bad_flags_leave_out_alone(tmp_path, cli, flags, message):
    assert message in cli.refused("tokenizer", tmp_path / "out", *flags)
    assert not (tmp_path / "out").exists()


# -------------------------------------------------------------------------------------------------
# Sampling

ALL_ORDERS = ("raster", "random", "inferred", "class", "learned")


def painter(rows=3, cols=3, codebook=7, seed=0, **about):
    """A tiny model that knows all orders."""
    model = tiny(rows, cols, codebook, order_head=True, seed=seed)
    rank = torch.rand(rows * cols, generator=torch.Generator().manual_seed(2))
    model.about = {"order": "inferred", "caption_rank": {"sun": rank}, "mean_rank": -rank, **about}
    return model


def dice(seed=5):
    return torch.Generator().manual_seed(seed)


def is_permutation(order):
    return torch.equal(order.sort(1).values, raster_order(*order.shape))


@pytest.mark.parametrize("order", ALL_ORDERS)
@pytest.mark.parametrize("guidance", (1.0, 3.0))
def test_generate_visits_every_cell_once_and_repeats_with_a_seed(order, guidance):
    runs = [sample.generate(painter(), ["sun", "sea sun"], order, guidance=guidance,
                            generator=dice(s)) for s in (1, 1, 2)]
    assert all(map(torch.equal, runs[0], runs[1])) and not torch.equal(runs[0][0], runs[2][0])
    assert is_permutation(runs[0][1])


def test_generate_in_a_given_order_is_the_plain_loop_of_anyorder():
    order = random_order(4, 9, dice())
    tokens, visited = sample.generate(painter(), ["sun"] * 4, order, generator=dice())
    assert torch.equal(visited, order)
    assert torch.equal(tokens, anyorder.draw(painter(), ["sun"] * 4, order, dice()))


@pytest.mark.parametrize("score", SCORES)
def test_the_order_of_a_generated_image_is_the_order_inferred_from_it(score):
    for policy in (None, tiny(3, 3, codebook=7, seed=9)):
        model = painter()
        how = dict(score=score, distance=0.2)
        tokens, order = sample.generate(model, ["sun"] * 4, policy=policy, **how)
        assert torch.equal(order, infer_orders(policy or model, tokens, ["sun"] * 4, **how))
    tokens, order = sample.generate(model, ["sun"] * 8, "learned")
    assert torch.equal(order, infer_orders(model, tokens, ["sun"] * 8, headed=True))


def test_another_model_chooses_where_and_never_what():
    model, policy = painter(), tiny(3, 3, codebook=7, seed=2)
    policy.to_token.weight.data.zero_()  # knows nothing: its argmax is token 0
    for steps in (0, 4):
        how = dict(temperature=0, steps=steps)
        drawn, order = sample.generate(model, ["sun"] * 4, policy=policy, **how)
        assert drawn.any() and is_permutation(order)
        if not steps:
            assert torch.equal(drawn, sample.generate(model, ["sun"] * 4, order, **how)[0])
    for order in set(ALL_ORDERS) - {"inferred"}:  # no other order asks the policy
        plain, other = (sample.generate(model, ["sun"], order, policy=p) for p in (None, policy))
        assert all(map(torch.equal, plain, other)), order


@pytest.mark.parametrize("order", ALL_ORDERS)
def test_given_cells_come_first_and_are_never_overwritten(order):
    given, keep = torch.randint(7, (4, 9)), torch.tensor([1, 0, 0, 1, 0, 1, 0, 0, 1]).bool()

    def draw(**how):
        return sample.generate(painter(), ["sun"] * 4, order, **how)
    for steps in (0, 3):
        tokens, visited = draw(given=given, keep=keep, steps=steps)
        assert torch.equal(tokens[:, keep], given[:, keep])
        assert keep[visited[:, :4]].all() and not keep[visited[:, 4:]].any()
    assert torch.equal(draw(given=given, keep=torch.ones(9).bool())[0], given)
    assert torch.equal(draw(given=given, keep=torch.zeros(9).bool())[0], draw()[0])


def test_a_raster_only_model_gets_what_is_given_in_its_turn():
    model, keep = tiny(3, 3, codebook=7), torch.tensor([0, 1, 0, 0, 1, 0, 0, 0, 1]).bool()
    given = torch.randint(7, (40, 9), generator=dice(1))
    other = given.clone()
    other[:, 8] = (other[:, 8] + 1) % 7  # a cell after all those that are drawn
    # a model of all orders sees it first
    for known, first in (("raster", [*range(9)]), ("random", [1, 4, 8, 0, 2, 3, 5, 6, 7])):
        model.about = {"order": known}
        (tokens, order), (again, _) = (
            sample.generate(model, ["sun"] * 40, "raster", given=g, keep=keep) for g in (given, other))
        assert order[0].tolist() == first and torch.equal(tokens[:, keep], given[:, keep])
        assert torch.equal(tokens[:, :8], again[:, :8]) == (known == "raster")


@pytest.mark.parametrize("order", ALL_ORDERS)
def test_a_few_steps_take_a_look_each_and_all_steps_are_one_cell_each(order):
    model, looks, watch = painter(), [], []
    with model.to_token.register_forward_hook(lambda _, x, y: looks.append(y.shape[1])):
        tokens, visited = sample.generate(model, [""] * 6, order, steps=4, watch=watch,
                                          given=torch.full((6, 9), 2), keep=torch.arange(9) == 5)
    assert len(looks) == 1 + 4 and (visited[:, 0] == 5).all() and (tokens[:, 5] == 2).all()
    assert is_permutation(visited)
    free = [1, 8, 6, 4, 2] if order in ("inferred", "learned") else []
    assert [len(cells[0]) for cells, _ in watch] == free
    one = sample.generate(model, [""] * 6, order, steps=9)
    assert all(map(torch.equal, one, sample.generate(model, [""] * 6, order)))


def test_samples_follow_the_model_distribution():
    model = tiny(1, 2, codebook=2, seed=1)
    images = torch.tensor(list(itertools.product(range(2), repeat=2)))
    for order in (torch.tensor([[0, 1]]), torch.tensor([[1, 0]])):
        truth = model.log_probs(images, ["sun"] * 4, order.expand(4, 2)).sum(1).exp()
        drawn, _ = sample.generate(model, ["sun"] * 4000, order.expand(4000, 2))
        share = torch.bincount(drawn[:, 0] * 2 + drawn[:, 1], minlength=4) / 4000
        assert (share - truth).abs().max() < 0.04  # 5 standard errors: 1 false alarm in a million


def test_temperature_on_a_model_of_one_cell():
    model = tiny(1, 1, codebook=3)
    log_p = model.log_probs(torch.arange(3)[:, None], ["sun"] * 3, raster_order(3, 1))[:, 0]
    for temperature in (1, 0.5, 0.1):
        drawn, _ = sample.generate(model, ["sun"] * 4000, "raster", temperature=temperature)
        share = torch.bincount(drawn[:, 0], minlength=3) / 4000
        assert (share - (log_p / temperature).softmax(0)).abs().max() < 0.04
    for temperature in (1e-7, 0):  # a division would make logits infinite
        drawn, _ = sample.generate(model, ["sun"] * 40, "raster", temperature=temperature)
        assert (drawn == log_p.argmax()).all()


def test_guidance_moves_all_logits_away_from_those_without_a_caption():
    model = painter()
    words = model.read(["sun", "sea"])
    for strength in (0.0, 1.0, 2.5):
        told, plain, guided = looks = (Drawing(model, words), Drawing(model, 0 * words),
                                       sample.Guided(model, words, strength))
        for cells in (torch.tensor([[0, 4, 8], [1, 2, 3]]), torch.tensor([[5], [6]])):
            a, b, both = (drawing.look(cells) for drawing in looks)
            torch.testing.assert_close(both, b + strength * (a - b))
            for drawing in looks:
                drawing.place(torch.zeros(2, 1).long(), torch.tensor([[1], [2]]))
        torch.testing.assert_close(guided.next_location(), told.next_location())


def test_guidance_tries_the_candidates_only_with_the_caption():
    model, seen = tiny(rows=3, cols=3, codebook=5), []
    with model.to_token.register_forward_hook(lambda _, x, y: seen.append(y[..., 0].numel())):
        sample.generate(model, ["sun"] * 2, guidance=2.0)
        assert sum(seen) == 2 * (9 * 10 // 2) + 2 * 2 * 9
        seen.clear()
        guided = sample.generate(model, ["", ""], "raster", guidance=5.0)[0]
        assert seen == [2] * 9  # without captions guidance costs nothing
    assert torch.equal(guided, sample.generate(model, ["", ""], "raster")[0])


def test_class_order_is_that_of_the_caption_or_of_all_captions():
    model = painter()
    rank = model.about["caption_rank"]["sun"]
    _, order = sample.generate(model, ["sun", "sea"], "class")
    assert torch.equal(order, torch.stack((rank.argsort(), (-rank).argsort())))


def test_orders_that_a_model_does_not_know_are_refused():
    plain, raster = tiny(), tiny()
    plain.about, raster.about = {"order": "random"}, {"order": "raster"}
    for model, names in ((painter(), sample.ORDERS), (raster, ("raster",)),
                         (plain, ("raster", "random", "inferred"))):
        for order in (*sample.ORDERS, "zigzag", "frozen"):
            if order in names:
                sample.check_order(model, "a.pt", order)
            else:
                with pytest.raises(UserError, match="choose .*finetune.py"):
                    sample.generate(model, ["sun"], order)


def test_no_file_needs_a_newer_python_than_3_10():
    for path in HERE.glob("*.py"):
        tree = ast.parse(path.read_text(), feature_version=(3, 10))
        for part in ast.walk(tree):  # newer parsers let x[:, *area] pass
            if isinstance(part, ast.Subscript) and isinstance(part.slice, ast.Tuple):
                stars = [item for item in part.slice.elts if isinstance(item, ast.Starred)]
                assert not stars, (path.name, part.lineno)


# -------------------------------------------------------------------------------------------------
# Canvases


@pytest.fixture(scope="module")
def studio(tmp_path_factory):
    """Untrained models for images of 16x16 pixels and 4x4 cells, and image.png."""
    out = tmp_path_factory.mktemp("studio")
    torch.manual_seed(0)
    config = {"size": 16, "downsample": 4, "codebook": 16, "width": 8, "fine": 8, "dim": 4}
    tokenizer = Tokenizer(config).eval()
    data.save(out / "tokenizer.pt", {"kind": "tokenizer", "version": 2, "config": config,
                                     "made_from": {"data": "0"}, "model": tokenizer.state_dict()})
    made_from = {"data": "0", "tokenizer": tokenizer.fingerprint, "tokens": "0"}
    for name, order in (("anyorder", "random"), ("raster", "raster")):
        model = tiny(4, 4, 16, layers=2, words=("low", "red", "sun", "日", "本"))
        save_model(out / f"{name}.pt", model, order=order, made_from=made_from, data="sunsets",
                   captions=["low sun", "日本"], step=1, steps=1, tokens_seen=16, seconds=1.0)
    sheet(render_sunset(7, 16)[0][None], 1, gap=0).save(out / "image.png")
    return out


def pixels(path):
    return torch.from_numpy(np.array(Image.open(path).convert("RGB"))).permute(2, 0, 1)


def images_in(folder):
    return torch.stack([pixels(path) for path in sorted(Path(folder).glob("*.png"))])


@pytest.fixture
def paint(studio, tmp_path, monkeypatch, capsys):
    """paint(*flags) runs sample.py in a copy of the studio -> (what it printed, folder)."""
    out = tmp_path / "out"
    shutil.copytree(studio, out)
    monkeypatch.setattr(sample, "film", lambda *_: None)  # slow

    def run(*flags, expect=0):
        common = ("--out", out, "--device", "cpu", "--n", 2)
        code, text = call(monkeypatch, capsys, "sample", *common, *flags)
        assert code == expect, text
        return text, out
    return run


@pytest.mark.parametrize("shape, grid", (
    ((4, 4), (4, 4)), ((8, 8), (4, 4)), ((7, 13), (3, 3)), ((5, 5), (3, 2)), ((9, 1), (3, 1))))
def test_windows_cover_a_canvas_from_its_middle_outwards(shape, grid):
    assert sample.windows((2, 4), (2, 2)) == [(0, 1), (0, 0), (0, 2)]
    corners, seen = sample.windows(shape, grid), torch.zeros(shape)
    for top, left in corners:
        part = seen[top:top + grid[0], left:left + grid[1]]
        assert part.shape == grid
        part += 1
    assert seen.all() and len(set(corners)) == len(corners)
    assert corners[0] == tuple((whole - side) // 2 for whole, side in zip(shape, grid))


@pytest.mark.parametrize("order", ("raster", "inferred", "learned"))
def test_a_canvas_of_the_grids_size_with_nothing_known_is_plain_sampling(order):
    how = dict(order=order, guidance=2.0, generator=dice())
    nothing = torch.randint(7, (2, 9)), torch.zeros(3, 3).bool()
    tokens, rank, scores = sample.complete(painter(), ["sun", ""], *nothing, **how)
    plain, visited = sample.generate(painter(), ["sun", ""], **{**how, "generator": dice()})
    assert torch.equal(tokens, plain) and torch.equal(rank, rank_of(visited))
    assert len(scores) == (0 if order == "raster" else 9)


@pytest.mark.parametrize("shape, steps", (((6, 6), 0), ((3, 8), 0), ((5, 4), 4)))
def test_a_larger_canvas_keeps_what_is_known_and_draws_each_other_cell_once(shape, steps):
    known = torch.rand(shape, generator=dice(1)) < 0.3
    tokens = torch.randint(7, (2, known.numel()))
    found, rank, scores = sample.complete(painter(), ["sun", ""], tokens, known, dice(),
                                          steps=steps)
    flat, free = known.flatten(), int((~known).sum())
    assert torch.equal(found[:, flat], tokens[:, flat]) and (rank[:, flat] == -1).all()
    assert torch.equal(rank[:, ~flat].sort(1).values, raster_order(2, free)) and len(scores) == free
    for step, (cells, value) in enumerate(scores[:0 if steps else None]):  # the best is next
        best = cells.gather(1, value.argmax(1, keepdim=True))
        assert (rank.gather(1, best) == step).all()


def test_each_window_is_given_what_earlier_windows_drew(monkeypatch):
    calls, true = [], sample.generate
    monkeypatch.setattr(sample, "generate", lambda *args, **how: calls.append(how)
                        or true(*args, **how))
    known = torch.zeros(4, 8).bool()
    known[:, 2:6] = True  # the image, in the middle
    tokens = torch.randint(16, (1, 32))
    found, _, _ = sample.complete(tiny(4, 4, 16), [""], tokens, known, dice())
    for how, left in zip(calls, (0, 4), strict=True):
        keep, seen = how["keep"], found.view(1, 4, 8)[:, :, left:left + 4].flatten(1)
        assert keep.sum() == 8  # each side sees half the image
        assert torch.equal(how["given"][:, keep], seen[:, keep])


def test_a_drawing_meets_the_kept_pixels_and_is_itself_far_away():
    # 20 levels too dark
    flat, drawn = torch.full((3, 8, 40), 120).byte(), torch.full((1, 3, 8, 40), 100 / 127.5 - 1)
    hidden = torch.arange(40).expand(8, 40) >= 20
    line = sample.compose(drawn, flat, hidden, 2.0).int()[0, 0, 4]
    assert (line[:20] == 120).all() and line[20] > 110 and line[-1] == 100
    assert (line[20:].diff() <= 0).all()
    assert (sample.compose(drawn, flat, hidden | True, 2.0) == 100).all()


@pytest.mark.parametrize("name, n, mask", (
    ("left", 4, ["1100"] * 4),
    ("right", 4, ["0011"] * 4),
    ("top", 3, ["111", "000", "000"]),  # a middle row belongs to no half
    ("bottom", 3, ["000", "000", "111"]),
    ("center", 4, ["0000", "0110", "0110", "0000"]),
    ("center", 3, ["000", "010", "000"]),
))
def test_masks_by_name_on_hand_worked_grids(name, n, mask):
    found = sample.named_mask(name, n, n, 0).int().tolist()
    assert found == [[int(cell) for cell in row] for row in mask]


def test_a_random_mask_hides_a_share_of_the_cells():
    for share, cells in (("0", 0), ("0.5", 24), ("1", 49), (".2", 10)):
        one, same = (sample.named_mask("random:" + share, 7, 7, 0) for _ in range(2))
        assert one.sum() == cells and torch.equal(one, same)
    for wrong in ("random:", "random:2", "random:half", "random:nan", "random:-1", "middle"):
        assert sample.named_mask(wrong, 4, 4, 0) is None


@pytest.mark.parametrize("width, height", ((128, 128), (45, 30), (9, 20)))
def test_what_lies_under_the_mask_of_a_resized_image_reaches_no_kept_pixel(tmp_path, width, height):
    whole = torch.randint(64, 192, (3, height, width), generator=dice(), dtype=torch.uint8)
    hidden = torch.linspace(0, 1, height)[:, None] + torch.linspace(0, 1, width) > 1.1
    paths = [str(tmp_path / name) for name in ("picture.png", "mask.png")]
    # white on what is transparent
    layers = torch.stack((torch.full(hidden.shape, 255), hidden * 255), 2)
    Image.fromarray(layers.byte().numpy()).save(paths[1])

    def read(picture, mask=paths[1]):
        sheet([picture], 1, gap=0).save(paths[0])
        return sample.read_masked(paths[0], mask, 16)
    one, mask = read(whole)
    two, _ = read(torch.where(hidden, 255 - whole, whole))
    assert mask.any() and not mask.all() and torch.equal(one[:, ~mask], two[:, ~mask])
    # what is hidden still shows the original, and far from the edge all is as without a mask
    plain, _ = read(whole, "")
    edge = torch.nn.functional.max_pool2d(mask[None].float(), 13, 1, 6)[0] > 0
    assert torch.equal(plain[:, mask], one[:, mask])
    assert (plain.int() - one.int())[:, ~edge].abs().amax() <= 1 and not edge.all()
    # a sky of one colour keeps it up to the edge
    assert (read(torch.where(hidden, whole, 200))[0][:, ~mask] == 200).all()


def test_captions_come_from_the_command_line_and_from_files(tmp_path):
    (tmp_path / "two.txt").write_bytes("\ufeffred sun\n\n  low\tsun \r\n".encode())
    assert sample.read_captions([]) == [] and sample.read_captions([""]) == [""]
    asked = ["sun", str(tmp_path / "two.txt"), ""]
    assert sample.read_captions(asked) == ["sun", "red sun", "low sun", ""]


# -------------------------------------------------------------------------------------------------
# From the command line


def test_images_are_written_one_by_one_and_the_folder_is_a_data_set(paint):
    # the second run has fewer
    for n, captions in ((3, ("low, sun", 'red "sun"', "")), (1, ("日本",))):
        text, out = paint("--n", n, "--caption", *captions)
        (out / "samples" / "mine.txt").write_text("I stay")
        assert f"all {n * len(captions)} images" in text
        found = data.Folder(str(out / "samples"), 16, "train").all_captions
        assert list(found.values()) == [text for text in captions for _ in range(n)]
    assert sorted(os.listdir(out / "samples")) == ["00000.png", "metadata.csv", "mine.txt"]
    assert {"samples.png", "samples_order.png"} <= set(os.listdir(out))


def test_a_sheet_shows_64_images_at_most_and_memory_holds_no_more(paint, monkeypatch):
    shown, flags = [], ("--order", "random", "--steps", 2)
    monkeypatch.setattr(sample, "show", lambda *about: shown.append(about))
    text, out = paint("--n", 70, *flags)
    images = images_in(out / "samples")
    assert len(images) == 70 and "all 70 images" in text.splitlines()[-1]
    assert len(shown[0][3]) == len(shown[0][5]) == 64
    paint("--n", 40, *flags)  # the first batch is the same
    assert torch.equal(images_in(out / "samples")[:32], images[:32])


def test_ctrl_c_keeps_the_images_that_are_written(paint, monkeypatch):
    true = sample.complete

    def second_batch(*args, **how):
        if len(args[1]) < 32:
            raise KeyboardInterrupt
        return true(*args, **how)
    monkeypatch.setattr(sample, "complete", second_batch)
    _, out = paint("--n", 33, "--order", "raster", "--steps", 2, expect=130)
    assert len(data.Folder(str(out / "samples"), 16, "train").all_captions) == 32


def test_completing_keeps_all_pixels_outside_the_mask_and_reads_none_in_it(paint, studio, tmp_path):
    image, tokenizer = pixels(studio / "image.png"), load_tokenizer(studio / "tokenizer.pt")
    odd = torch.zeros(3, 16, 16, dtype=torch.uint8)
    odd[:, 3:10, 5:6] = 255  # not along the cells
    sheet([odd], 1, gap=0).save(tmp_path / "mask.png")
    for mask in ("right", "random:0.5", str(tmp_path / "mask.png")):
        hidden = sample.open_canvas(str(studio / "image.png"), mask, tokenizer, 0)[1]
        scribbled = torch.where(hidden, torch.randint(256, (3, 16, 16)).byte(), image)
        sheet([scribbled], 1, gap=0).save(tmp_path / "scribbled.png")
        drawn = []
        for path in (studio / "image.png", tmp_path / "scribbled.png"):
            text, out = paint("--complete", path, "--mask", mask, "--order", "random")
            assert "warning" not in text
            drawn.append(images_in(out / "completed"))
        assert torch.equal(drawn[0][:, :, ~hidden], image[:, ~hidden].expand(2, -1, -1))
        assert torch.equal(*drawn) and not torch.equal(*drawn[0])  # two different completions
    assert hidden.sum() == 7


def test_a_mask_of_nothing_returns_the_image_and_of_everything_is_plain_sampling(paint, tmp_path):
    for value in (0, 255):
        Image.new("L", (16, 16), value).save(tmp_path / f"{value}.png")
    image, flags = tmp_path / "out" / "image.png", ("--caption", "low sun")
    _, out = paint("--complete", image, "--mask", tmp_path / "0.png")
    assert torch.equal(images_in(out / "completed"), pixels(image).expand(2, -1, -1, -1))
    paint("--complete", image, "--mask", tmp_path / "255.png", *flags)
    paint(*flags)
    plain = images_in(out / "samples")
    assert torch.equal(images_in(out / "completed"), plain)
    paint(*flags, "--seed", 1)
    assert not torch.equal(images_in(out / "samples"), plain)


def test_an_extended_canvas_holds_the_image_untouched(paint, studio):
    image = pixels(studio / "image.png")
    for factor, height, width, top, left in (("2x2", 32, 32, 8, 8), ("1x3", 48, 16, 16, 0)):
        _, out = paint("--complete", studio / "image.png", "--mask", factor, "--order", "random",
                       "--n", 1, "--steps", 4)
        drawn = images_in(out / "extended")
        assert drawn.shape == (1, 3, height, width)
        assert torch.equal(drawn[0, :, top:top + 16, left:left + 16], image)


def test_images_of_another_size_are_resized_with_a_warning(paint, tmp_path):
    sheet(render_sunset(7, 45)[0][None], 1, gap=0).save(tmp_path / "odd.png")
    text, out = paint("--complete", tmp_path / "odd.png", "--mask", "left", "--steps", 2)
    assert re.match("warning: .*45x45.*16x16\n", text)
    image = data.read_image(tmp_path / "odd.png", 16).int()
    assert (images_in(out / "completed") - image)[:, :, :, 8:].abs().max() <= 1  # rounding


def test_in_the_film_the_brightest_cell_is_next_and_the_images_come_last(tmp_path):
    images, rank = torch.zeros(1, 3, 16, 16).byte(), torch.tensor([[[-1, 0], [1, 2]]])
    scores = [(torch.tensor([[1, 2, 3]]), torch.tensor([[-1.0, -3.0, -2.0]])),
              (torch.tensor([[2, 3]]), torch.tensor([[-1.0, -2.0]])),
              (torch.tensor([[3]]), torch.tensor([[-4.0]]))]
    for step, next_cell in enumerate(([0, 1], [1, 0], [1, 1])):
        shown = sample.thinking(images, rank, scores, step, 4)[0].int()  # [3, 64, 64]
        assert (shown[:, :32, :32] == 0).all()  # what is given shows the image
        middles = shown[:, 16::32, 16::32].sum(0)
        assert (middles == middles.max()).nonzero().tolist() == [next_cell]
    assert (sample.thinking(images, rank, scores, 3, 4) == 0).all()  # all drawn
    grey = sample.thinking(images, rank, [], 0, 4)[0, :, 16::32, 16::32]
    assert (grey.flatten(1)[:, 1:] == 150).all()  # an order without scores
    sample.film(tmp_path / "a.gif", images + 200, rank, scores, 4)
    film = Image.open(tmp_path / "a.gif")
    assert film.n_frames == 4 and film.info["loop"] == 0
    film.seek(3)
    assert np.abs(np.array(film.convert("RGB"))[2:-2, 2:-2].astype(int) - 200).max() < 9


def test_a_label_in_any_script_has_its_images_number(tmp_path):
    tiles, pages = torch.zeros(2, 3, 32, 32).byte(), []
    for number in (0, 2):
        labels = [f"0000{number} 日本", "00001 \U0001f600 red" * 9]
        sample.page(tmp_path / "a.png", tiles, labels, 2, 1)
        pages.append(pixels(tmp_path / "a.png"))
    assert pages[0].shape == pages[1].shape and not torch.equal(*pages)


def test_in_frozen_order_the_any_order_model_chooses(studio, paint, monkeypatch):
    text, out = paint("--order", "frozen", expect=2)  # anyorder.pt was not finetuned
    assert "was not finetuned from" in text
    teacher, used, draw = load_model(out / "anyorder.pt"), [], sample.generate
    about = {**teacher.about, "order": "inferred"}
    about["made_from"] = {**about["made_from"], "model": data.fingerprint(teacher.state_dict())}
    about = {key: about[key] for key in about if key not in ("kind", "version")}
    ordered = tiny(4, 4, 16, layers=2, order_head=True, words=teacher.config["words"], seed=1)
    save_model(out / "ordered.pt", ordered, **about)
    monkeypatch.setattr(sample, "generate", lambda model, *args, **how: used.append(
        (model, how)) or draw(model, *args, **how))
    text, _ = paint("--order", "frozen")
    model, how = used[0]
    assert "in frozen order" in text and how["order"] == "inferred"
    for each, source in ((model, ordered), (how["policy"], teacher)):
        assert data.fingerprint(each.state_dict()) == data.fingerprint(source.state_dict())


def test_a_long_caption_is_drawn_with_a_warning(paint):
    text, _ = paint("--caption", "low low red sun", "--order", "raster", "--n", 1)
    assert "warning: " in text and "4 words" in text


@pytest.mark.parametrize("flags, needle", (
    (("--mask", "left"), "--complete"),
    (("--complete", "{image}"), "--mask"),
    (("--complete", "nothing.png", "--mask", "left"), "nothing.png"),
    (("--complete", "{text}", "--mask", "left"), "words.txt"),
    (("--complete", "{image}", "--mask", "{small}"), "8x8"),
    (("--complete", "{image}", "--mask", "{text}"), "words.txt"),
    (("--complete", "{image}", "--mask", "random:7"), "random:7"),
    (("--complete", "{image}", "--mask", "9x1"), "3x1"),
    (("--caption", "no.txt"), "no.txt"),
    (("--caption", "zebra"), "zebra"),
    (("--n", 0), "--n"),
    (("--guidance", "nan"), "--guidance"),
    (("--order", "class"), "finetune.py"),
    (("--model", "{out}/raster.pt", "--order", "frozen"), "not finetuned"),
    (("--model", "{text}/raster.pt"), "anyorder.py --order raster"),
    (("--out", "{text}"), "words.txt"),
))
def test_what_sample_cannot_do_is_said_in_one_line(paint, tmp_path, flags, needle):
    (tmp_path / "words.txt").write_text("no image")
    Image.new("L", (8, 8)).save(tmp_path / "small.png")
    out = tmp_path / "out"
    places = {"image": out / "image.png", "out": out, "text": tmp_path / "words.txt",
              "small": tmp_path / "small.png"}
    before = files_of(out)
    text, _ = paint(*(str(flag).format(**places) for flag in flags), expect=2)
    last = text.strip().splitlines()[-1]
    assert last.startswith("error: ") and needle in last and "Traceback" not in text
    assert files_of(out) == before


def test_a_folder_that_cannot_be_written_is_noticed_before_drawing(paint, monkeypatch):
    def writable(out):
        raise UserError("read-only")
    monkeypatch.setattr(sample, "writable", writable)
    monkeypatch.setattr(sample, "complete", lambda *_, **how: pytest.fail("it has drawn"))
    assert "read-only" in paint(expect=2)[0]


# -------------------------------------------------------------------------------------------------
# evaluate.py: distances


def distance(a, b):
    return evaluate.frechet(evaluate.moments(a), evaluate.moments(b))


def frechet_by_definition(a, b):
    """|m1 - m2|^2 + tr(S1 + S2 - 2 sqrt(S1 S2)), with covariance matrices."""
    a, b = a.double(), b.double()
    S1, S2 = torch.cov(a.T), torch.cov(b.T)
    root = torch.linalg.eigvals(S1 @ S2).real.clamp_min(0).sqrt().sum()
    apart = (a.mean(0) - b.mean(0)).square().sum()
    return (apart + S1.trace() + S2.trace() - 2 * root).item()


def features_like(n, f, seed):
    torch.manual_seed(seed)
    return (torch.randn(n, f) @ torch.randn(f, f)).relu() + 0.1


@pytest.mark.parametrize("n, m, f", ((300, 200, 8), (20, 300, 32), (12, 9, 40)))
def test_frechet_agrees_with_matrix_square_roots(n, m, f):
    """Also with fewer images than features."""
    a, b = features_like(n, f, 1), features_like(m, f, 2) * 1.3
    found = distance(a, b)
    assert found == pytest.approx(frechet_by_definition(a, b), rel=1e-5)


def test_frechet_of_equal_sets_is_zero_and_of_a_shift_its_square():
    a = features_like(50, 16, 3)
    assert distance(a, a[torch.randperm(50)]) < 1e-9
    assert distance(a, a.double() + 2) == pytest.approx(16 * 4, rel=1e-9)
    # twice as wide, at the same mean: sum of (2 s - s)^2
    wide = 2 * a.double() - a.double().mean(0)
    assert distance(a, wide) == pytest.approx(a.double().var(0).sum().item(), rel=1e-6)


def test_moments_do_not_depend_on_the_chunks():
    a = features_like(101, 6, 4)
    for chunk in (9, 8192):
        mean, root = evaluate.moments(a, chunk)
        torch.testing.assert_close(root.T @ root, torch.cov(a.double().T))
        torch.testing.assert_close(mean, a.double().mean(0))


def test_kernel_distance_agrees_with_loops():
    a, b = features_like(11, 5, 5), features_like(8, 5, 6)

    def kernel(x, y):
        return (sum(u * v for u, v in zip(x.tolist(), y.tolist())) / 5 + 1) ** 3

    def within(x):
        pairs = itertools.permutations(x, 2)
        return sum(kernel(*pair) for pair in pairs) / (len(x) * (len(x) - 1))

    between = sum(kernel(x, y) for x in a for y in b) / (len(a) * len(b))
    expected = within(a) + within(b) - 2 * between
    for block in (3, 2048):
        assert evaluate.kernel_distance(a, b, block) == pytest.approx(expected, rel=1e-6)


def test_precision_and_recall_agree_with_loops():
    real, drawn = features_like(23, 3, 7), features_like(17, 3, 8) + 0.3

    def gap(x, y):
        return math.dist(x.tolist(), y.tolist())

    def share(points, centres):
        radius = []
        for i, centre in enumerate(centres):
            radius.append(sorted(gap(centre, x) for j, x in enumerate(centres) if j != i)[2])
        inside = [any(gap(p, c) <= r for c, r in zip(centres, radius)) for p in points]
        return sum(inside) / len(points)

    found = evaluate.precision_recall(real, drawn, k=3, block=5)
    assert found == (pytest.approx(share(drawn, real)), pytest.approx(share(real, drawn)))
    assert 0 < found[0] < 1 and 0 < found[1] < 1 and found[0] != found[1]


class OnDevice(torch.Tensor):
    """A tensor that claims to be on Apple's GPU, where float64 does not exist."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        def plain(x):
            return x.as_subclass(torch.Tensor) if isinstance(x, OnDevice) else x

        kwargs = kwargs or {}
        asked = [*args[1:], *kwargs.values()]
        if func is torch.Tensor.double or any(x is torch.float64 for x in asked):
            raise TypeError("the MPS framework doesn't support float64")
        out = func(*map(plain, args), **{key: plain(x) for key, x in kwargs.items()})
        if func is torch.Tensor.cpu or not isinstance(out, torch.Tensor):
            return out
        return out.as_subclass(OnDevice)


def test_no_measure_asks_a_device_for_float64():
    a, b = (features_like(20, 6, seed).as_subclass(OnDevice) for seed in (1, 2))
    order = random_order(5, 9).as_subclass(OnDevice)
    labels = torch.randint(6, (5, 6, 6))
    for measure in (lambda: distance(a, b),
                    lambda: evaluate.kernel_distance(a, b),
                    lambda: evaluate.precision_recall(a, b),
                    lambda: evaluate.step_length(order, 3),
                    lambda: evaluate.touching(order, 3, 3),
                    lambda: evaluate.drawn_before(order, labels, "sun", "sky", 3, 3),
                    lambda: rank_correlation(order, order)):
        measure()
    with pytest.raises(TypeError):
        a.double()


# -------------------------------------------------------------------------------------------------
# evaluate.py: networks of --weights


class TwoPixels:
    """Two "layers" that one can follow by hand: the image, and twice its first two channels."""
    weights = [torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0.5, 0.25])]

    def activations(self, images):
        return [images, 2 * images[:, :2]]


def test_lpips_by_hand():
    x = torch.tensor([3.0, 4.0, 0.0]).view(1, 3, 1, 1).repeat(1, 1, 1, 2)  # unit vectors .6 .8 0
    y = x.clone()
    y[0, :, 0, 1] = torch.tensor([0.0, 0.0, 5.0])  # pixel 2 differs
    first = (1 * 0.36 + 2 * 0.64 + 3 * 1.0) / 2  # mean of two pixels
    second = (0.5 * 0.36 + 0.25 * 0.64) / 2  # (0, 0) stays 0
    net = TwoPixels()
    assert evaluate.lpips(x, y, net).tolist() == pytest.approx([first + second], rel=1e-5)
    assert torch.equal(evaluate.lpips(x, y, net), evaluate.lpips(y, x, net))
    assert evaluate.lpips(y, y, net).tolist() == [0]


class Rooms(torch.nn.Module):
    """The interface of the Inception file: uint8 images to `size` features, mean colours."""
    def __init__(self, size: int):
        super().__init__()
        self.size = size

    def forward(self, images: torch.Tensor, return_features: bool = False) -> torch.Tensor:
        mean = images.float().mean(dim=[2, 3])
        return mean.repeat(1, self.size // 3 + 1)[:, :self.size] if return_features else mean


@pytest.fixture(scope="session")
def weights(tmp_path_factory):
    """Files as people download them, with random weights, and others."""
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    alexnet = {**evaluate.AlexNet().state_dict(), "classifier.1.weight": torch.zeros(2, 2)}
    linear = {name: torch.rand(shape) for name, shape in evaluate.LINEAR.items()}
    files = {"alexnet": alexnet, "alex": linear, "more": {**linear, "x": torch.zeros(1)},
             "less": dict(list(alexnet.items())[1:])}
    for name, state in files.items():
        torch.save(state, folder / f"{name}.pth")
    for name, net in (("inception", Rooms(2048)), ("small", Rooms(12))):
        torch.jit.script(net).save(str(folder / f"{name}.pt"))
    torch.jit.script(torch.nn.ReLU()).save(str(folder / "other.pt"))
    (folder / "text.pt").write_text("no network")
    return folder


def test_weights_are_recognised_by_what_they_hold(weights):
    names = ("alex.pth", "inception.pt", "alexnet.pth")
    found = evaluate.load_weights([weights / name for name in names], 40)
    name, extract = found["inception"]
    sevens = torch.full((2, 3, 8, 8), 7, dtype=torch.uint8)
    assert name == "FID" and extract(sevens).tolist() == [[7.0] * 2048] * 2
    # FID names one network's distance only
    assert evaluate.load_weights([weights / "small.pt"], 40)["inception"][0] == "Frechet"
    assert evaluate.load_weights([], 8) == {}

    x, y = torch.rand(2, 3, 3, 40, 40) * 2 - 1
    far = evaluate.lpips(x, y, found["lpips"][1])
    assert (far > 0).all() and evaluate.lpips(x, x, found["lpips"][1]).tolist() == [0, 0, 0]


@pytest.mark.parametrize("names, size, message", (
    *(((name,), 40, "expected inception") for name in (
        "more.pth", "less.pth", "other.pt", "text.pt", "missing.pt")),
    (("alexnet.pth",), 40, "takes two files"), (("alex.pth",), 40, "takes two files"),
    (("alexnet.pth", "alex.pth"), 16, "31 pixels")))
def test_other_weights_are_refused_in_one_line(weights, names, size, message):
    with pytest.raises(UserError, match=message) as error:
        evaluate.load_weights([weights / name for name in names], size)
    assert "\n" not in str(error.value)


# -------------------------------------------------------------------------------------------------
# evaluate.py: the judge


class Shades(torch.utils.data.Dataset):
    """Rendered sunsets with given captions; counts how often each is decoded."""
    fingerprint = "shades"

    def __init__(self, captions, size=8):
        self.captions, self.size, self.reads = captions, size, []

    def __len__(self):
        return len(self.captions)

    def __getitem__(self, i):
        self.reads.append(i)
        return data.render_sunset(i, self.size)[0], self.captions[i]


@pytest.fixture
def small_judge(monkeypatch):
    monkeypatch.setitem(evaluate.JUDGE, "steps", 2)
    monkeypatch.setitem(evaluate.JUDGE, "width", 4)


def test_the_judge_learns_captions_where_they_are_classes_else_rotations(small_judge):
    for captions, task in ((20 * ["a", "b"], "captions"), (20 * ["a"], "rotations"),
                           (20 * ["a", "b"] + ["c"], "rotations")):
        assert evaluate.train_judge(Shades(captions)).config["task"] == task


def test_the_judge_is_repeatable_and_decodes_an_image_once(monkeypatch):
    monkeypatch.setitem(evaluate.JUDGE, "steps", 4)
    train = Shades(["a", "b"] * 20)
    a, b = (evaluate.train_judge(train, seed=3).state_dict() for _ in range(2))
    assert all(torch.equal(weight, b[name]) for name, weight in a.items())
    # 4 steps of 64 images; number 0 is also looked at for its size
    assert len(train.reads) <= 2 * (40 + 1)


def test_the_judge_is_valid_on_sunsets(monkeypatch):
    monkeypatch.setitem(evaluate.JUDGE, "steps", 100)
    monkeypatch.setitem(evaluate.JUDGE, "width", 16)
    train = Shades(list(data.open_data("sunsets", 16).captions[:900]), 16)
    judge = evaluate.train_judge(train, seed=3)
    images = torch.stack([data.render_sunset(45_000 + i, 16)[0] for i in range(1000)])
    report = evaluate.validate_judge(lambda x: judge.features(to_float(x)), images)
    for damage in ("noise", "blur", "shuffle"):
        assert report["real"] < report[damage][0] < report[damage][1] < report[damage][2]
    # so small a judge may not be good enough; it says so
    assert report["ok"] == (report["ratio"] >= 20)
    # mean colours see no shuffling
    assert not evaluate.validate_judge(lambda x: to_float(x).mean((2, 3)), images[:200])["ok"]


def test_a_judge_is_used_again_only_if_all_that_made_it_is_the_same(small_judge, tmp_path,
                                                                    monkeypatch):
    trained = calls_of(monkeypatch, evaluate, "train_judge")
    source = evaluate.inspect.getsource
    shades = Shades(["a", "b"] * 20)
    for _ in range(2):
        evaluate.open_judge(tmp_path, shades)
    (_, first), = trained
    saved = data.load(tmp_path / "judge.pt", "judge", "")["model"]
    assert all(torch.equal(weight, saved[name]) for name, weight in first.state_dict().items())
    changes = {
        "seed": lambda: None,
        "data": lambda: setattr(shades, "fingerprint", "others"),
        "constant": lambda: monkeypatch.setitem(evaluate.JUDGE, "each", 19),
        "source": lambda: monkeypatch.setattr(evaluate.inspect, "getsource",
                                              lambda part: source(part) + "#"),
        "damage": lambda: (tmp_path / "judge.pt").write_bytes(b"PK")}
    for name, change in changes.items():
        change()
        trained.clear()
        for _ in range(2):
            evaluate.open_judge(tmp_path, shades, 7)
        assert len(trained) == 1, name


def test_damage_is_what_it_says():
    images = torch.stack([data.render_sunset(i, 16)[0] for i in range(4)])
    chance = torch.Generator().manual_seed(0)

    def cut(x):
        patches = x.unfold(2, 4, 4).unfold(3, 4, 4).permute(0, 2, 3, 1, 4, 5)
        return patches.reshape(4, 16, -1)

    for share in (0.25, 1.0):
        worse = evaluate.corrupted(images, "shuffle", share, chance)
        moved = (cut(worse) != cut(images)).any(-1).sum(1)
        assert (moved <= 16 * share).all() and moved.any()
        for a, b in zip(cut(worse), cut(images)):  # the same patches, elsewhere
            assert sorted(map(tuple, a.tolist())) == sorted(map(tuple, b.tolist()))
    grey = torch.full((2, 3, 64, 64), 128, dtype=torch.uint8)
    assert torch.equal(evaluate.corrupted(grey, "blur", 2, chance), grey)
    noisy = to_float(evaluate.corrupted(grey, "noise", 0.3, chance))
    assert noisy.std().item() == pytest.approx(0.3, rel=0.03)


# -------------------------------------------------------------------------------------------------
# evaluate.py: what an order does

# the rank of the docstring: 0 6 1 / 7 8 4 / 2 5 3
SPIRAL = torch.tensor([[0, 6, 1, 7, 8, 4, 2, 5, 3]])


def test_step_length_on_hand_worked_grids():
    found = evaluate.step_length(raster_order(2, 9), 3)
    assert found == pytest.approx((6 + 2 * math.sqrt(5)) / 8)
    # corners 0 2 8 6, then 5 7 1 3 4
    steps = (2, 8 ** 0.5, 2, 1, 2 ** 0.5, 2, 2 ** 0.5, 1)
    assert evaluate.step_length(rank_of(SPIRAL), 3) == pytest.approx(sum(steps) / 8)


def test_share_of_steps_that_touch_a_drawn_cell():
    assert evaluate.touching(rank_of(raster_order(3, 9)), 3, 3) == 1
    assert evaluate.touching(SPIRAL, 3, 3) == 5 / 8
    assert evaluate.touching(torch.tensor([[0, 2, 1]]), 1, 3) == 1 / 2  # 0, 2, then between
    assert evaluate.touching(torch.tensor([[3, 0, 2, 1]]), 2, 2) == 1  # diagonals count


def test_what_is_drawn_before_what():
    sun, cloud, sky = (data.SUNSET_LABELS.index(name) for name in ("sun", "cloud", "sky"))
    labels = torch.full((2, 4, 4), sky, dtype=torch.uint8)
    labels[:, :2, :2], labels[0, 2:, 2:] = sun, cloud  # only the first image has a cloud

    def before(rank, labels=labels):
        rank = torch.tensor([rank, rank])[:len(labels)]
        return evaluate.drawn_before(rank, labels, "sun", "cloud", 2, 2)

    assert before([0, 1, 2, 3]) == 1 and before([3, 1, 2, 0]) == 0
    assert before([0, 1, 2, 3], labels[1:]) is None


# -------------------------------------------------------------------------------------------------
# evaluate.py: speed


def test_the_obvious_way_computes_what_candidate_attention_computes():
    chance = torch.Generator().manual_seed(1)
    q, k, v = torch.randn(3, 3, 2, 5, 8, dtype=torch.float64, generator=chance)
    past = torch.randn(2, 3, 2, 7, 8, dtype=torch.float64, generator=chance)
    ours = anyorder.candidate_attention(q, k, v, *past)
    torch.testing.assert_close(evaluate.masked_candidates(q, k, v, *past), ours)


def test_speed_is_measured_there_and_back(monkeypatch):
    clock, calls = [0.0], []
    fake = type("time", (), {"perf_counter": lambda: clock[0]})
    monkeypatch.setattr(evaluate, "time", fake)

    def work(name, seconds):
        calls.append(name)
        clock[0] += seconds

    ways = {name: (8, functools.partial(work, name, seconds))
            for name, seconds in (("a", 1.0), ("b", 2.0), ("c", 40.0))}
    rows = evaluate.compared(torch.device("cpu"), "work", "images/s", ways)
    assert [row["rate"] for row in rows] == [8, 4, 0.2]
    assert [row["times"] for row in rows] == [1, 0.5, 0.025]
    assert "".join(calls) == "abc" + "cbaabc" * 2  # five rounds at least


def test_the_speed_table_is_written_and_leaves_everything_in_place(monkeypatch, capsys, tmp_path):
    small = {"attention": [(2, 1, 5, 32)], "candidates": (2, 1, 3, 4, 8), "side": 2,
             "width": 32, "layers": 1, "train": 2, "infer": 2}
    monkeypatch.setattr(evaluate, "SIZES", {"cpu": small})
    monkeypatch.setattr(evaluate, "SECONDS", 0)
    monkeypatch.setattr(evaluate, "DRAWN", (1, 2))
    ours = anyorder.fused_attention
    library = calls_of(monkeypatch, evaluate, "library_attention")
    code, printed = call(monkeypatch, capsys, "evaluate", "--out", tmp_path / "out", "--speed",
                         "--device", "cpu")
    assert code == 0 and anyorder.fused_attention is ours
    assert len(library) > 5  # five times by itself, then in a model
    report = json.loads((tmp_path / "out" / "speed.json").read_text())
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["speed.json"]
    for row in report["rows"]:
        assert row["name"] in printed and row["rate"] > 0, row
    memory = report["rows"][-1]
    assert memory["unit"] == "MB" and memory["times"] < 0.1  # a count: on every machine


# -------------------------------------------------------------------------------------------------
# evaluate.py: the command


@pytest.fixture(scope="session")
def evaluated(tmp_path_factory):
    """A folder with an untrained tokenizer and models of sunsets of 8x8 pixels, 2x2 cells."""
    out = tmp_path_factory.mktemp("evaluated")
    torch.manual_seed(0)
    tokenizer = Tokenizer({"size": 8, "downsample": 4, "codebook": 16, "width": 8, "fine": 8,
                           "dim": 4}).eval()
    sunsets = open_data("sunsets", 8)
    data.save(out / "tokenizer.pt", {
        "kind": "tokenizer", "version": data.VERSION, "config": tokenizer.config,
        "made_from": {"data": sunsets.fingerprint}, "model": tokenizer.state_dict()})
    words = sorted({w for c in sunsets.captions[:500] for w in data.words_of(c)})
    made_from = {"data": sunsets.fingerprint, "tokenizer": tokenizer.fingerprint, "tokens": "0"}
    about = {"step": 3, "held_out": 2.0, "batch": 8, "tokens_seen": 96, "seconds": 1.5,
             "data": "sunsets", "captions": ["low red sun"], "made_from": made_from}
    for name, order in (("raster", "raster"), ("anyorder", "random"), ("ordered", "inferred")):
        model = AnyOrder({"rows": 2, "cols": 2, "codebook": 16, "width": 32, "layers": 2,
                          "order_head": name == "ordered", "words": words,
                          "caption_length": 8}).eval()
        if name == "anyorder":
            teacher = data.fingerprint(model.state_dict())
        if name == "ordered":
            rank = torch.tensor([3.0, 0, 1, 2])
            about.update(caption_rank={"low red sun": rank}, mean_rank=rank.flip(0),
                         score="margin", distance=0.5, made_from={**made_from, "model": teacher})
        save_model(out / f"{name}.pt", model, order=order, **about)
    return out


@pytest.fixture
def quick(monkeypatch, small_judge):
    monkeypatch.setattr(evaluate, "HELD_OUT", 30)


def evaluation(monkeypatch, capsys, out, *flags):
    """evaluate.py in this process: (exit code, what it printed, results.json)."""
    code, printed = call(monkeypatch, capsys, "evaluate", "--out", out, "--device", "cpu", *flags)
    return code, printed, code == 0 and json.loads((out / "results.json").read_text())


def test_evaluate_from_the_command_line(evaluated, quick, monkeypatch, capsys):
    monkeypatch.setattr(evaluate, "BATCH", 4)
    out = evaluated
    code, first, report = evaluation(monkeypatch, capsys, out, "--n", 10)
    assert code == 0, first
    rows = {row["name"]: row for row in report["rows"]}
    assert (report["n"], report["held_out"], report["seed"]) == (10, 30, 0)
    assert Image.open(out / "compare.png").width > 500
    # drawing costs 4 cells, or 4 + 3 + 2 + 1 candidates
    assert {name: row["evaluations"] for name, row in rows.items()} == {
        "raster:raster": 4, "anyorder:raster": 4, "anyorder:random": 4, "anyorder:inferred": 10,
        "ordered:learned": 4, "ordered:inferred": 10, "ordered:class": 4}
    # random orders give a bound, and it is called one
    assert [name for name, row in rows.items() if row["nats_are"] == "bound"] == ["anyorder:random"]
    assert "bound: a mean over single random orders" in first

    # the likelihood, once more by hand
    pick = torch.randperm(5000, generator=torch.Generator().manual_seed(0))[:10].tolist()
    images, captions = zip(*(open_data("sunsets", 8, "test")[i] for i in pick))
    tokens = load_tokenizer(out / "tokenizer.pt").encode(to_float(torch.stack(images)))
    model, order = load_model(out / "raster.pt"), raster_order(10, 4)
    nats = -model.log_probs(tokens, captions, order).sum(1).double()
    raster = rows["raster:raster"]
    assert raster["nats"] == pytest.approx(nats.mean().item() / 4, rel=1e-6)
    assert raster["nats_error"] == pytest.approx(nats.std().item() / 10 ** 0.5 / 4, rel=1e-6)
    assert raster["versus"] == 0 and raster["step"] == pytest.approx((2 + 2 ** 0.5) / 3)

    def same(text):
        return [line for line in text.splitlines() if "images/s" not in line]

    # one seed, one table; only the speed differs
    second = evaluation(monkeypatch, capsys, out, "--n", 10)[1]
    assert same(first) == same(second) and len(same(first)) > 20


def test_a_row_compares_drawn_images_with_images_and_with_reconstructions(evaluated, quick,
                                                                          monkeypatch, capsys):
    """A model that draws the first 12 of 30 held-out images as the tokenizer keeps them."""
    benches, read = [], evaluate.read_held_out

    def reads(test, bench):
        bench.features = lambda images: to_float(images).flatten(1)[:, :6]
        read(test, bench)
        benches.append(bench)

    def draws(model, captions, *rest, **how):
        tokens = benches[0].tokens[:len(captions)]
        return tokens, raster_order(*tokens.shape)

    monkeypatch.setattr(evaluate, "read_held_out", reads)
    monkeypatch.setattr(evaluate, "generate", draws)
    code, printed, report = evaluation(monkeypatch, capsys, evaluated, "--n", 12, "--models",
                                       evaluated / "anyorder.pt:random")
    assert code == 0, printed
    (bench,), (row,) = benches, report["rows"]
    images = to_uint8(bench.tokenizer.decode(bench.tokens))
    drawn, recon, real = map(bench.features, (images[:12], images, bench.images))
    assert row["frechet"] == pytest.approx(distance(drawn, real), rel=1e-9)
    assert row["recon"] == pytest.approx(distance(drawn, recon), rel=1e-9)
    assert row["recon"] < row["frechet"] and row["precision"] != row["recall"]
    assert (row["precision"], row["recall"]) == evaluate.precision_recall(real, drawn)
    guess = bench.judge(to_float(images[:12])).argmax(1).tolist()
    named = [bench.judge.config["classes"][k] for k in guess]
    assert row["class_seen"] == sum(map(str.__eq__, named, bench.captions)) / 12


def test_completions_are_judged_where_they_were_drawn(evaluated, quick, monkeypatch, capsys):
    compared = calls_of(monkeypatch, evaluate, "lpips")
    models = [evaluated / name for name in ("anyorder.pt:random", "ordered.pt:learned@2")]
    code, printed, report = evaluation(monkeypatch, capsys, evaluated, "--n", 6,
                                       "--models", *models)
    assert code == 0 and len(compared) == 8, printed
    halves = torch.zeros(4, 8, 8, dtype=torch.bool)  # bottom, top, left, right
    halves[0, 4:] = halves[1, :4] = halves[2, :, :4] = halves[3, :, 4:] = True
    for differs, ((drawn, truth, _), _) in zip(halves, compared):
        same = drawn == truth
        assert same[:, :, ~differs].all() and not same[:, :, differs].all()
    row, several = report["rows"]
    far = [found.mean().item() for _, found in compared[:4]]
    assert row["lpips_lower"] == pytest.approx(far[0])
    assert row["lpips"] == pytest.approx(sum(far) / 4)
    # nats and orders are those of one cell at a time
    assert row["nats"] > 0 and not {"nats", "step", "versus"} & several.keys()
    assert "nats are those of one cell at a time" in printed


def test_several_sets_tell_how_far_chance_moves_a_distance(evaluated, quick, monkeypatch, capsys):
    monkeypatch.setattr(evaluate, "BATCH", 5)
    rows, asked = [], []
    log_probs = AnyOrder.log_probs

    def asks(model, captions, *args, given=None, **how):
        if given is None:
            asked.extend(captions)
        return sample.generate(model, captions, *args, given=given, **how)

    monkeypatch.setattr(evaluate, "generate", asks)
    # as on Apple's GPU
    monkeypatch.setattr(AnyOrder, "log_probs",
                        lambda self, *inputs: log_probs(self, *inputs).as_subclass(OnDevice))
    for draws in (1, 2):
        code, _, report = evaluation(monkeypatch, capsys, evaluated, "--n", 10, "--draws", draws,
                                     "--models", evaluated / "anyorder.pt:random")
        assert code == 0
        rows += report["rows"]
    one, two = rows
    for key in ("frechet", "recon"):  # a = mean +- |a - b| / 2
        assert key + "_spread" not in one and two[key + "_spread"] > 0
        expected = two[key + "_spread"] / 2 ** 0.5
        assert abs(one[key] - two[key]) == pytest.approx(expected, rel=1e-6)
    assert one["nats"] == two["nats"] and one["evaluations"] == two["evaluations"] == 4
    # only the dice differ
    assert asked[:10] == asked[10:20] == asked[20:] and len(set(asked[:10])) > 1


def test_evaluate_names_its_networks(evaluated, weights, quick, monkeypatch, capsys):
    flags = "--n", 5, "--models", evaluated / "ordered.pt:frozen"
    inception = "--weights", weights / "inception.pt"
    code, printed, report = evaluation(monkeypatch, capsys, evaluated, *flags, *inception)
    assert code == 0 and report["judge"] is None
    # 4 + 3 + 2 + 1 candidates, and the model's own 4
    assert report["rows"][0]["evaluations"] == 14
    assert " FID " in printed and "LPIPS-judge" in printed and "the judge is" not in printed
    code, printed, _ = evaluation(monkeypatch, capsys, evaluated, *flags)
    assert code == 0 and "FID" not in printed
    assert "Frechet (judge)" in printed and "the judge is" in printed


def test_an_interrupt_keeps_the_rows_that_are_done(evaluated, quick, monkeypatch, capsys):
    real = evaluate.evaluate_row

    def second_is_interrupted(row, first, bench):
        if row is not first:
            raise KeyboardInterrupt
        return real(row, first, bench)

    monkeypatch.setattr(evaluate, "evaluate_row", second_is_interrupted)
    code, printed, _ = evaluation(monkeypatch, capsys, evaluated, "--n", 5)
    assert code == 130 and "raster:raster" in printed
    report = json.loads((evaluated / "results.json").read_text())
    assert [row["name"] for row in report["rows"]] == ["raster:raster"]


@pytest.mark.parametrize("flags, message", (
    (("--n", 3), "from 4 to"), (("--draws", 0), "from 1 to"), (("--data", "{tmp}"), "no images"),
    (("--models", "{out}/ordered.pt:learned@" + 5000 * "9"), "drawing takes 1 to"),
    (("--models", "{out}/ordered.pt:learned@0"), "drawing takes 1 to"),
    (("--models", "{out}/ordered.pt:learned@all"), "leave out @all"),
    (("--models", "{out}/raster.pt:learned"), "raster"),
    (("--models", "{out}/anyorder.pt:learned"), "order head"),
    (("--models", "{out}/raster.pt:frozen"), "not finetuned"),
    (("--models", "{tmp}/foreign.pt"), "another tokenizer"),
    (("--models", "{tmp}/elsewhere.pt"), "not the data"),
    (("--weights", "{out}/raster.pt"), "expected inception"),
    (("--out", "{tmp}"), "tokenizer.pt does not exist")))
def test_bad_input_of_evaluate_gets_one_line(evaluated, quick, monkeypatch, capsys, tmp_path,
                                             flags, message):
    file = data.load(evaluated / "raster.pt", "model", "")
    known = file["made_from"]
    for name, other in (("foreign", "tokenizer"), ("elsewhere", "data")):
        data.save(tmp_path / f"{name}.pt", {**file, "made_from": {**known, other: "another"}})
    before = files_of(evaluated)
    flags = [str(flag).format(out=evaluated, tmp=tmp_path) for flag in flags]
    code, error, _ = evaluation(monkeypatch, capsys, evaluated, *flags)
    assert code == 2 and message in error and error.strip().count("\n") == 0, error
    assert files_of(evaluated) == before


# -------------------------------------------------------------------------------------------------
# Stop and go on


def same(a, b):
    a, b = tensors_of(a), tensors_of(b)
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("stage", STAGES)
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(stage, chain, tmp_path, monkeypatch,
                                                               cli):
    monkeypatch.setattr(order_infer, "images_at_once", lambda model: 8)
    whole, parts = (start_of(stage, chain, tmp_path / name) for name in ("whole", "parts"))
    cli.ok(stage, "--out", whole, *flags_of(stage, chain))
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    line = stage, "--out", parts, *flags_of(stage, chain)
    with control_c(13 if stage == "tokenizer" else 4):
        code, printed = cli(*line)
    assert code == 130 and "the same command with --resume goes on" in printed
    assert not (parts / RESULT[stage]).exists()
    cli.ok(*line, "--resume")
    assert same(whole / RESULT[stage], parts / RESULT[stage]) and not list(parts.glob("*_resume*"))


@pytest.mark.parametrize("stage", ("anyorder", "order_infer", "finetune"))
def test_only_a_finished_result_replaces_a_finished_one(stage, chain, tmp_path, monkeypatch, cli):
    monkeypatch.setattr(order_infer, "images_at_once", lambda model: 8)
    out, after_step = start_of(stage, chain, tmp_path / "out"), data.Checkpoint.after_step
    result = Path(shutil.copy(chain[1] / RESULT[stage], out))
    before, line = result.read_bytes(), (stage, "--out", out, *STAGES[stage], "--seed", 1)
    with control_c(2):
        assert cli(*line)[0] == 130
    assert result.read_bytes() == before

    def spy(*rest):
        after_step(*rest)
        assert result.read_bytes() == before
    monkeypatch.setattr(data.Checkpoint, "after_step", spy)
    cli.ok(*line)
    assert result.read_bytes() != before


def test_resume_goes_on_with_the_same_settings_or_more_steps(chain, tmp_path, monkeypatch, cli):
    out = start_of("anyorder", chain, tmp_path / "out")
    line = "anyorder", "--out", out, *STAGES["anyorder"]
    updates = calls_of(monkeypatch, anyorder, "update")

    def made():
        return [step for (*_, step), _ in updates]
    with control_c(3):
        assert cli(*line)[0] == 130
    error = cli.refused("anyorder", out, *line[3:], "--lr", 0.1, "--resume")
    assert "another lr" in error and made() == [0, 1, 2]
    cli.ok(*line, "--steps", 8, "--resume")             # an unfinished run
    assert made() == [0, 1, 2, 3, 4, 5, 6, 7]
    first = load_model(out / "anyorder.pt").about
    assert "more --steps" in cli.refused("anyorder", out, *line[3:], "--steps", 8, "--resume")
    with monkeypatch.context() as patch:                # a finished one, which gets worse
        patch.setattr(anyorder, "held_out_loss", lambda *rest: (99.0, None))
        cli.ok(*line, "--steps", 12, "--resume")
    assert made()[8:] == list(range(first["step"], 12))
    assert load_model(out / "anyorder.pt").about["held_out"] == first["held_out"]
    cli.ok(*line, "--steps", 40, "--resume")
    assert load_model(out / "anyorder.pt").about["held_out"] < first["held_out"]


@pytest.mark.parametrize("spoil", (lambda x: x * math.nan, lambda x: x + (x * 0).sqrt()),
                         ids=("loss", "gradient"))
@pytest.mark.parametrize("stage", ("tokenizer", "anyorder", "finetune"))
def test_a_loss_or_gradient_not_finite_keeps_the_last_good_model(stage, spoil, chain, tmp_path,
                                                                 monkeypatch, cli):
    """The fourth step goes wrong. The second way gives a finite loss whose derivative is not."""
    module, out = importlib.import_module(stage), start_of(stage, chain, tmp_path / "out")
    update = module.update

    def spoilt(loss, *rest):
        return update(spoil(loss) if rest[-1] == 3 else loss, *rest)
    monkeypatch.setattr(module, "update", spoilt)
    monkeypatch.setattr(data, "SAVE_EVERY", -1)
    code, printed = cli(stage, "--out", out, *flags_of(stage, chain))
    assert code == 2 and "nan" in printed and "at step 3" in printed and "try " in printed
    left, = out.glob("*_resume.pt")
    assert torch.load(left, weights_only=True)["state"]["step"] == 3
    assert all(tensor.isfinite().all() for tensor in tensors_of(left).values())


def test_gradients_are_clipped_to_length_1():
    for size, length in ((1e4, 1.0), (0.1, 0.2)):
        model = torch.nn.Linear(3, 1, bias=False)
        before = model.weight.clone()
        loss = size * model(torch.tensor([[0.0, 2.0, 0.0]])).sum()
        tokenizer.update(loss, model, [torch.optim.SGD(model.parameters())], 1.0, 0)
        assert (model.weight - before).norm().item() == pytest.approx(length, abs=1e-5)


def test_bfloat16_only_where_it_is_faster(monkeypatch):
    probe, clock = PROBE.__wrapped__, itertools.count()
    monkeypatch.setattr(data.time, "perf_counter", lambda: next(clock))
    for device in ("cpu", "mps"):
        assert probe(torch.device(device)) == torch.float32             # not faster
    # always faster; and disturbed all but once
    for seconds in ([0, 9, 0, 1] * 8, [0, 9, 0, 99] * 7 + [0, 9, 0, 1]):
        clock = iter(seconds)
        assert probe(torch.device("cpu")) == torch.bfloat16


@pytest.mark.parametrize("stage", STAGES)
def test_a_full_disk_leaves_the_last_good_files(stage, chain, tmp_path, monkeypatch, cli):
    out = start_of(stage, chain, tmp_path / "out")
    if stage != "tokenizer":
        shutil.copy(chain[1] / RESULT[stage], out)

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(data.os, "fsync", full)
    assert "No space left on device" in cli.refused(stage, out, *flags_of(stage, chain))


READERS = {"tokenizer": ("sample", "order_infer"), "anyorder": ("order_infer", "finetune"),
           "tokens": ("anyorder", "order_infer", "finetune"), "orders": ("finetune",),
           "ordered": ("sample",)}


@pytest.mark.parametrize("name", READERS)
def test_a_spoilt_file_gives_one_line_and_changes_nothing(name, chain, tmp_path, cli):
    """Empty, cut, with one bit turned, or of another kind."""
    few = {"sample": ("--n", 1), "order_infer": ("--limit", 1), "finetune": ("--steps", 1),
           "anyorder": (*STAGES["anyorder"], "--steps", 1)}
    out = shutil.copytree(chain[1], tmp_path / "out")
    path = out / f"{name}.pt"
    good = path.read_bytes()
    turned = good.replace(b"made_from", b"made_frol", 1)            # m and l differ in one bit
    spoilt = [b"", good[:len(good) // 2], good[:-1], turned]
    spoilt += [(out / f"{kind}.pt").read_bytes() for kind in READERS
               if {kind, name} - {"anyorder", "ordered"} and kind != name]     # both are models
    for script, raw in itertools.product(READERS[name], spoilt):
        path.write_bytes(raw)
        cli.refused(script, out, *few[script])


# -------------------------------------------------------------------------------------------------
# More than one process


def test_torchrun_trains_no_tokenizer(tmp_path):
    """The others would wait for hours, or write the same files."""
    lines = [(script, "--out", tmp_path) for script in ("anyorder", "tokenizer")]
    done = in_processes(lines, processes=2)
    errors = {line for line in done.stderr.splitlines() if line.startswith("error: ")}
    assert len(errors) == 2 and all("python tokenizer.py" in line for line in errors), done.stderr
    assert done.stdout.count("left with 2") == 4 and not list(tmp_path.iterdir())


def nearly_same(a, b):
    """Equal up to the order of summation, in float32."""
    a, b = tensors_of(a), tensors_of(b)
    assert a.keys() == b.keys()
    for key in a:
        torch.testing.assert_close(a[key], b[key], rtol=1e-4, atol=1e-5)


def test_two_processes_do_what_one_does(chain, tmp_path, monkeypatch, cli):
    """The later half of a training that one process began, order inference, finetuning; then
    samples and evaluation of the same models."""
    compute_in(monkeypatch, lambda device: torch.float32)
    small = ("import order_infer, sample\n"             # so that there is something to share
             "order_infer.images_at_once, sample.BATCH = lambda model: 9, 2")
    monkeypatch.setattr(order_infer, "images_at_once", lambda model: 9)
    monkeypatch.setattr(sample, "BATCH", 2)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    stages, lines = ("anyorder", "order_infer", "finetune"), {}
    for side in ("one", "two"):
        out = shutil.copytree(chain[1], tmp_path / side)
        rows = "anyorder.pt:random", "anyorder.pt:inferred", "ordered.pt:learned"
        lines[side] = [(stage, "--out", start_of(stage, chain, tmp_path / (side + stage)),
                        *STAGES[stage]) for stage in stages]
        lines[side] += [("sample", "--out", out, "--n", 5), ("evaluate", "--out", out, "--n", 10,
                        "--draws", 2, "--models", *(f"{out}/{row}" for row in rows))]
    for line in lines["one"]:
        cli.ok(*line)
    with control_c(3):
        assert cli(*lines["two"][0])[0] == 130
    torch.set_num_threads(threads)
    lines["two"][0] += ("--resume",)
    done = in_processes(lines["two"], small, processes=2)
    assert done.returncode == 0, done.stderr
    for text in ("16 codes", "mean rank of each cell", "next: python sample.py", "drawn per row"):
        assert done.stdout.count(text) == 1             # one process alone prints
    for stage in stages:
        nearly_same(*(tmp_path / (side + stage) / RESULT[stage] for side in ("one", "two")))
    one, two = (files_of(tmp_path / side) for side in ("one", "two"))
    for files in (one, two):
        files["results.json"] = json.loads(files["results.json"])
        del files["results.json"]["command"]
        for row in files["results.json"]["rows"]:
            assert row.pop("images_per_second") > 0
        # a row is written when its image is
        files["samples/metadata.csv"] = sorted(files["samples/metadata.csv"].splitlines())
    assert one.keys() == two.keys() and not [name for name in one if one[name] != two[name]]


def test_ctrl_c_in_one_of_two_processes_or_its_death_ends_both(chain, tmp_path, monkeypatch, cli):
    compute_in(monkeypatch, lambda device: torch.float32)
    one, two = (start_of("anyorder", chain, tmp_path / name) for name in ("one", "two"))
    cli.ok("anyorder", "--out", one, *STAGES["anyorder"])
    third = ("rate = anyorder.learning_rate\n"
             "def learning_rate(step, *rest):\n"
             "    if second and step == 2:\n"
             "        os.kill(os.getpid(), signal.{})\n"
             "    return rate(step, *rest)\n"
             "anyorder.learning_rate = learning_rate")
    line = "anyorder", "--out", two, *STAGES["anyorder"]
    done = in_processes([line], third.format("SIGINT"), processes=2)
    assert done.returncode and done.stdout.count("stopped at step 3: the same command") == 1
    assert done.stderr.count("stopped") == 1 and "gloo" not in done.stderr
    cli.ok(*line, "--resume")                           # one process goes on where two stopped
    nearly_same(one / "anyorder.pt", two / "anyorder.pt")
    before = files_of(two)
    # the other is given the time to say why it ends, even where the machine is busy
    done = in_processes([line], third.format("SIGKILL"), processes=2, every=3)
    assert done.returncode and re.search(r"exitcode *: -9", done.stderr)
    assert "error: another process of this run has died" in done.stderr
    assert "RuntimeError" not in done.stderr and files_of(two) == before


@slow
@pytest.mark.parametrize("stage", STAGES)
def test_killed_at_any_moment_and_resumed_equals_uninterrupted(stage, chain, tmp_path):
    """SIGKILL at 20 random moments of a run that saves after every step. What is on the disk then
    can be resumed."""
    program = ("import data; data.precision = lambda device: data.torch.float32; "
               f"import order_infer, {stage}; data.SAVE_EVERY = -1; "
               f"order_infer.images_at_once = lambda m: 1; data.run({stage}.main)")
    steps = () if stage == "order_infer" else ("--steps", 100)

    def begun(out):
        """Waits until it writes something: a kill while Python starts would prove nothing."""
        resume = ["--resume"] if list(out.glob("*_resume.pt")) else []
        flags = map(str, ("--out", out, *flags_of(stage, chain), *steps, *resume))
        at = out.stat().st_mtime_ns
        process = subprocess.Popen([sys.executable, "-c", program, *flags], cwd=HERE, text=True,
                                   stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        while process.poll() is None and out.stat().st_mtime_ns == at:
            time.sleep(0.001)
        return process
    whole, out = (start_of(stage, chain, tmp_path / name) for name in ("whole", "out"))
    process, started = begun(whole), time.time()
    assert process.wait() == 0
    seconds, dice, kills = time.time() - started, random.Random(0), 0
    while kills < 20:
        process = begun(out)
        try:
            process.wait(seconds / 2 * dice.random())
        except subprocess.TimeoutExpired:
            process.kill()
            kills += 1
        assert process.wait() in (0, -9), process.stderr.read()
        for file in out.glob("*.pt"):
            torch.load(file, weights_only=True)         # never half a file
        if (out / RESULT[stage]).exists() and not list(out.glob("*_resume.pt")):
            assert same(whole / RESULT[stage], out / RESULT[stage])     # done: begin again
            shutil.rmtree(out)
            start_of(stage, chain, out)
    assert begun(out).wait() == 0
    assert same(whole / RESULT[stage], out / RESULT[stage])
