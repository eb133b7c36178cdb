"""Small proofs of what the other files claim. No network, no data files, no GPU:

    pytest -q test_all.py

Everything is tiny: grids of 2x2 and 3x3, models of width 32, images that data.py renders. What is
true of every size is easiest to check where all cases can be counted. `pytest -m slow test_all.py`
runs the long tests too.
"""

import ast
import builtins
import concurrent.futures
import contextlib
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
import random
import re
import shlex
import shutil
import signal
import struct
import subprocess
import sys
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
                  in_test_split, load, open_data, pick_device, read_image, render_sunset, replacing,
                  run, save, sheet, to_float, to_uint8, words_of)
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
    order = torch.tensor([[4, 1, 3, 5, 7, 0, 2, 6, 8]])  # centre, its four neighbours, corners
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
    """The slow definition, for one image: each free cell is tried by a full forward pass."""
    drawn, place = [], order_infer.places(model)
    for k in range(model.N):
        free = [cell for cell in range(model.N) if cell not in drawn]
        orders = [[*drawn, cell, *(set(free) - {cell})] for cell in free]
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
    for image, caption, order in zip(tokens, captions, found.tolist()):
        assert order == brute_force_order(model, image, caption, score, distance)


def test_scores_on_hand_worked_distributions():
    p = torch.tensor([[[0.7, 0.2, 0.1], [0.5, 0.5, 0.0]]])
    frequency = torch.tensor([0.5, 0.25, 0.25])
    content = torch.tensor([[1, 0]])
    expected = {"confidence": [math.log(0.7), math.log(0.5)],
                "margin": [math.log(0.5), math.log(1e-12)],
                "entropy": [-0.8018, -0.6931],
                "calibrated": [math.log(1.4), math.log(1.0)],
                "likelihood": [math.log(0.2), math.log(0.5)]}
    for score, values in expected.items():
        found = location_scores(p.clamp_min(1e-30).log(), score, frequency, content)
        torch.testing.assert_close(found, torch.tensor([values]), rtol=1e-3, atol=1e-3)


def test_visit_draws_the_best_cells_first():
    """Two ways to choose by the same values: looking at all free cells, and at none."""
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
    assert torch.equal(*results)
    assert torch.equal(order.sort(1).values, raster_order(5, 9))
    assert torch.equal(order[:, 0], value.argmax(1))
    # two of one step share no edge
    assert (order_infer.crowding(model)[order[:, 0], order[:, 1]] == 0).all()


def test_the_head_orders_alone():
    model, looks = tiny(3, 3, codebook=7, order_head=True), []
    tokens, words = torch.randint(7, (6, 9)), model.read(["sun"] * 6)
    with model.to_token.register_forward_hook(lambda _, x, y: looks.append(y.shape[1])):
        order = infer_orders(model, tokens, words, headed=True)
    assert looks == [1] * 9                             # at what it chose only
    _, where = model.logits(tokens, words, order)
    assert torch.equal(anyorder.over_free(where, order).argmax(-1), order)


def test_inference_in_batches_in_processes_and_of_nothing(monkeypatch):
    model = tiny(3, 3, codebook=7, order_head=True)
    tokens, words = torch.randint(7, (7, 9)), model.read(["sun"] * 7)
    whole, shares = infer_orders(model, tokens, words), []
    monkeypatch.setattr(order_infer, "images_at_once", lambda model: 3)
    monkeypatch.setattr(order_infer, "in_turn", lambda found: shares.extend(found) or found)
    assert torch.equal(whole, infer_orders(model, tokens, words))
    shares.clear()
    for process in (0, 1):
        list(order_infer.shared_orders(model, tokens, words, torch.float32, process, 2))
    # a process may get no image of the last batch
    assert [len(share) for share in shares] == [3, 1, 3, 0]
    assert torch.equal(torch.cat((shares[0], shares[2], shares[1])), whole)
    for headed in (False, True):
        assert infer_orders(model, tokens[:0], words[:0], headed=headed).shape == (0, 9)


def test_mean_ranks_of_captions_that_two_images_share():
    order = torch.tensor([[0, 1, 2, 3], [1, 0, 2, 3], [3, 2, 1, 0]])
    ranks, mean = order_infer.mean_ranks(order, ["sun", "sun", "sea"])
    assert list(ranks) == ["sun"] and ranks["sun"].tolist() == [0.5, 0.5, 2, 3]
    torch.testing.assert_close(mean, torch.tensor([4 / 3, 1, 5 / 3, 2]))
    # a tie goes to the cell that comes first in raster order
    orders = order_infer.specialised_orders(["sun", "sea", "new"], ranks, mean)
    assert orders.tolist() == [[0, 1, 2, 3], [1, 0, 2, 3], [1, 0, 2, 3]]
    a, b = torch.tensor([[0, 1, 2]]), torch.tensor([[0, 2, 1]])
    assert order_infer.rank_correlation(a, a) == 1
    assert order_infer.rank_correlation(a, b) == 0.5


def test_orders_pt_has_mean_ranks_of_training_images_only(chain):
    tokens = tokenizer.open_tokens(chain[1])
    file = order_infer.load_orders(chain[1], tokens)
    train = tokens["split"][file["index"]] == 0
    assert not train.all()
    rows = file["index"][train]
    texts = [tokens["captions"][i] for i in tokens["caption_index"][rows].tolist()]
    ranks, mean = order_infer.mean_ranks(file["order"][train], texts)
    assert torch.equal(mean, file["mean_rank"])
    assert ranks.keys() == file["caption_rank"].keys()
    # those that two or more images share
    assert 0 < len(ranks) < len(set(texts))


def test_order_pictures_are_upright_and_show_each_quarter():
    black, raster = torch.zeros(1, 3, 96, 96).byte(), raster_order(1, 4)
    page = order_infer.picture(black, raster, raster[0].float(), 2, 2)
    # the middle of each cell, less the margins
    cells = torch.from_numpy(np.array(page)).sum(-1)[26::48][:2]
    cells = [cells[:, 98 * i + 26:98 * i + 98:48].flatten().tolist() for i in range(10)]
    assert cells[1] == sorted(set(cells[1]))            # dark first, bright last
    for quarter in (1, 2, 3):
        assert cells[6 + quarter] == [0] * quarter + [450] * (4 - quarter)


# -------------------------------------------------------------------------------------------------
# Finetuning


def test_what_is_given_comes_first_and_keeps_its_order():
    order = random_order(4000, 12, torch.Generator().manual_seed(0))
    dice, parts = torch.Generator().manual_seed(1), set()
    found, given = finetune.given_first(order, tiny(3, 4), dice)
    assert torch.equal(found.sort(1).values, raster_order(4000, 12))
    # one in twelve is given nothing
    share = (given > 0).double().mean().item()
    assert abs(share - finetune.GIVEN * 11 / 12) < 0.03
    ranks = rank_of(order).tolist()
    for cells, n, rank in zip(found.tolist(), given[:, 0].tolist(), ranks):
        for part in (cells[:n], cells[n:]):
            assert part == sorted(part, key=rank.__getitem__)
            parts.add(frozenset(part))
    # what people hide
    for side in (range(4), range(8, 12), (0, 1, 4, 5, 8, 9), (2, 3, 6, 7, 10, 11)):
        assert frozenset(side) in parts
    assert not {frozenset((0, 11)), frozenset((0, 2, 8, 10))} & parts


def spied(monkeypatch, out, cli, *flags):
    """Of a run of finetune.py: orders of each step, orders of the head, learning rates."""
    with monkeypatch.context() as patch:
        given, found, updates = (calls_of(patch, *what) for what in (
            (finetune, "given_first"), (order_infer, "infer_orders"), (finetune, "update")))
        cli.ok("finetune", "--out", out, "--batch", 8, *flags)
    steps = [arguments[0].tolist() for arguments, _ in given]
    head = sum((order.tolist() for _, order in found), [])
    return steps, head, [arguments[3] for arguments, _ in updates]


ROUNDS = "--batch", 8, "--steps", 8, "--lr", 0.004, "--rounds", 2


def test_later_rounds_take_the_heads_orders(chain, tmp_path, monkeypatch, cli):
    out = start_of("finetune", chain, tmp_path / "out")
    tokens = tokenizer.open_tokens(out)
    file = order_infer.load_orders(out, tokens)
    steps, head, rates = spied(monkeypatch, out, cli, *ROUNDS)
    assert all(order in file["order"].tolist() for order in sum(steps[:4], []))
    assert all(order in head for order in sum(steps[4:], []))
    # the head orders what this round draws, and what checks it
    n, check = tokens["split"][file["index"]].bincount().tolist()
    drawn = {i for step in range(4, 8) for i in data.batch_of(step, 8, n, 0)}
    assert len(drawn) < n
    assert len(head) == len(drawn) + check
    # each round restarts the learning rate
    assert rates == [tokenizer.learning_rate(step, 4, 0.004) for step in range(4)] * 2


@pytest.mark.parametrize("stop", (2, 4, 6))
def test_rounds_resume_bit_for_bit(stop, chain, tmp_path, cli):
    """In a round, at its end, in the other one."""
    whole, parts = (start_of("finetune", chain, tmp_path / name) for name in ("whole", "parts"))
    cli.ok("finetune", "--out", whole, *ROUNDS)
    with control_c(stop):
        assert cli("finetune", "--out", parts, *ROUNDS)[0] == 130
    cli.ok("finetune", "--out", parts, *ROUNDS, "--resume")
    ours, theirs = (tensors_of(out / "ordered.pt") for out in (parts, whole))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_later_rounds_train_on_all_that_the_model_has_seen(chain, tmp_path, monkeypatch, cli):
    """orders.pt has 8 of the 20 images that anyorder.pt was trained on, and there are more."""
    out = start_of("order_infer", chain, tmp_path / "out")
    cli.ok("order_infer", "--out", out, "--limit", 8)
    file = torch.load(out / "anyorder.pt", weights_only=True)
    data.save(out / "anyorder.pt", {**file, "limit": 20})
    file = tokenizer.open_tokens(out)
    train = file["tokens"][file["split"] == 0].tolist()
    forward = calls_of(monkeypatch, AnyOrder, "forward")
    flags = "--out", out, "--batch", 4, "--steps", 8

    def seen():
        """The images of each step."""
        return [{train.index(image) for image in tokens.tolist()}
                for (_, tokens, *_), (nats, _) in forward if nats.requires_grad]
    cli.ok("finetune", *flags, "--rounds", 2)
    first, later = set().union(*seen()[:4]), set().union(*seen()[4:])
    assert first == set(range(8)) and len(train) > 20
    assert later <= set(range(20))
    assert later - first
    forward.clear()
    cli.ok("finetune", *flags, "--order", "class")
    assert set().union(*seen()) == set(range(20))


def test_class_raster_and_random_orders(chain, tmp_path, monkeypatch, cli):
    out, found = start_of("finetune", chain, tmp_path / "out"), {}
    for name in ("class", "raster", "random"):
        steps, head, _ = spied(monkeypatch, out, cli, "--steps", 2, "--order", name)
        found[name] = {tuple(order) for order in sum(steps, [])}
        assert not head
        assert load_model(out / f"ordered_{name}.pt").about["order"] == name
    assert found["raster"] == {tuple(range(16))}
    assert len(found["random"]) == 16
    file = torch.load(out / "orders.pt", weights_only=True)
    ranks = *file["caption_rank"].values(), file["mean_rank"]
    assert found["class"] <= {tuple(rank.argsort(stable=True).tolist()) for rank in ranks}
    assert len(found["class"]) > 1


def test_finetuning_starts_from_the_any_order_model(chain):
    a, b = (load_model(chain[1] / name) for name in ("anyorder.pt", "ordered.pt"))
    assert not a.config["order_head"]
    assert b.config == {**a.config, "order_head": True}
    assert b.about["step"] > a.about["step"]
    assert b.about["made_from"].items() > a.about["made_from"].items()


def test_resume_after_the_end_and_orders_of_another_model(chain, tmp_path, cli):
    out = shutil.copytree(chain[1], tmp_path / "my out")
    for stage in ("order_infer", "finetune"):
        error = cli.refused(stage, out, "--resume")
        assert "no run was interrupted" in error and f"--out '{out}'" in error
    cli.ok("order_infer", "--out", out, "--model", out / "ordered.pt", "--limit", 9)
    printed = cli.ok("finetune", "--out", out, "--steps", 1)
    assert "inferred by another model" in printed


# -------------------------------------------------------------------------------------------------
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


@pytest.mark.parametrize("T, d", ((1, 4), (2, 4), (64, 4), (65, 4), (300, 4), (300, 32)))
@pytest.mark.parametrize("dtype, tolerance", KINDS)
def test_fused_attention_equals_the_reference(T, d, dtype, tolerance):
    """Up to 16 d keys P is kept, above it is computed again. New memory may hold NaN."""
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
    def start(q, k, v):
        raise RuntimeError("Failed to find C compiler\nand more")
    monkeypatch.setattr(anyorder, "triton", object())
    monkeypatch.setattr(anyorder, "kernel_attention", start)
    anyorder.kernels_run.cache_clear()
    for again in range(2):
        assert not anyorder.kernels_run(torch.device("cpu"), torch.float32)
    said = capsys.readouterr().err
    assert said.count("\n") == said.count("Failed to find C compiler") == 1
    anyorder.kernels_run.cache_clear()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype, tolerance", ((torch.float32, 1e-3), (torch.bfloat16, 0.15)))
def test_a_gpu_computes_what_a_cpu_does(dtype, tolerance):
    model, found = tiny(rows=5, cols=5, codebook=7, order_head=True), {}
    tokens, order = torch.randint(7, (3, 25)), random_order(3, 25)
    captions = ["sun", "", "sea sun"]
    for device in ("cpu", "cuda"):
        model, t, o = model.to(device), tokens.to(device), order.to(device)
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
def test_every_block_is_computed(size, monkeypatch):
    monkeypatch.setattr(anyorder, "BLOCK", size)
    assert_same_attention(qkv(5, 3, 40), anyorder.fused_attention, 1e-12)


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
        found = anyorder.fused_attention(q, k, v)
        found.sum().backward(retain_graph=True)
    # one block of rows at most
    assert watch.largest <= 2 * 4 * T * 128
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
    """They reach 17 on sunsets, and are rounded before the softmax."""
    q, k, v = (x.detach() for x in qkv(16, 4, 72, 32, torch.bfloat16))
    largest = (q.float() @ k.float().mT).abs().max() / math.sqrt(32)
    q = (q.float() * 17 / largest).bfloat16()
    truth = anyorder.reference_attention(q.double(), k.double(), v.double())
    error = (anyorder.fused_attention(q, k, v).double() - truth).abs()
    assert error.max() < 0.02 * v.abs().max()


@pytest.mark.parametrize("C, T", ((1, 0), (5, 0), (1, 30), (7, 64), (40, 9)))
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
    models = "tokenizer tokens anyorder raster orders ordered".split()
    pictures = "reconstructions anyorder raster orders samples samples_order".split()
    assert {path.name for path in out.glob("*.pt")} == {f"{name}.pt" for name in models}
    assert {f"{name}.png" for name in pictures} <= files_of(out).keys()
    assert {"anyorder_loss.csv", "samples.gif", "samples/00002.png"} <= files_of(out).keys()
    assert not list(out.glob("*tmp")) and "ln(16) = 2.773" in printed


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
    # the test split is for evaluation only
    assert (tokens["split"][row] != 2).all()


def other_data(file):
    file["made_from"]["data"] = "01"


def other_tokens(file):
    file["tokens"].copy_(file["tokens"].flip(0))


def other_codes(file):
    file["model"]["codebook"].mul_(2)


def made_of_other_tokens(file):
    file["made_from"]["tokens"] = "01"


@pytest.mark.parametrize("name, change, stage, needle", (
    ("tokens", other_data, "order_infer", "other tokens"),
    ("tokens", other_tokens, "finetune", "other tokens"),
    ("tokenizer", other_codes, "anyorder", "tokens.pt"),
    ("tokenizer", other_codes, "sample", "tokenizer"),
    ("orders", made_of_other_tokens, "finetune", "another tokens.pt")))
def test_files_of_different_runs_are_refused(name, change, stage, needle, chain, tmp_path, cli):
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
def test_training_sees_training_images_only(stage, chain, tmp_path, monkeypatch, cli):
    """And most captions: some are left out, for guidance."""
    out = start_of(stage, chain, tmp_path / "out")
    file, seen = tokenizer.open_tokens(out), {True: [], False: []}
    parts = [file["tokens"][file["split"] == part].tolist() for part in range(3)]
    train, check, test = ({tuple(row) for row in part} for part in parts)
    assert check and test and not train & (check | test)
    forward = calls_of(monkeypatch, AnyOrder, "forward")
    cli.ok(stage, "--out", out, *STAGES[stage], "--steps", 20)
    for (_, tokens, words, _), (nats, _) in forward:
        seen[nats.requires_grad] += zip(map(tuple, tokens.tolist()), words.any(1).tolist())
    trained, told = zip(*seen[True])
    checked, all_told = zip(*seen[False])
    assert set(trained) <= train and set(checked) == check
    assert 0.75 < sum(told) / 160 < 0.99 and all(all_told)


def test_the_head_learns_locations_that_were_chosen_not_given(chain, tmp_path, monkeypatch, cli):
    given = calls_of(monkeypatch, finetune, "given_first")
    pulls, forward = [], AnyOrder.forward

    def spy(*rest):
        nats, where = forward(*rest)
        if where.requires_grad:
            where.register_hook(pulls.append)
        return nats, where
    monkeypatch.setattr(AnyOrder, "forward", spy)
    out = start_of("finetune", chain, tmp_path / "out")
    cli.ok("finetune", "--out", out, *STAGES["finetune"])
    counts = [count for _, (_, count) in given]
    assert len(pulls) == 6 and any(count.any() for count in counts)
    for count, pull in zip(counts, pulls):
        assert torch.equal(pull > 0, torch.arange(16) >= count)


def tiny_tokenizer_first(monkeypatch):
    """For anyorder.py where there are no tokens yet."""
    small = functools.partial(tokenizer.make_tokens, codebook=16, steps=3, batch=4)
    monkeypatch.setattr(anyorder, "make_tokens", small)


def test_anyorder_resumes_a_tokenizer_that_it_began(tmp_path, chain, monkeypatch, cli):
    tiny_tokenizer_first(monkeypatch)
    line = "anyorder", "--data", chain[0], "--out", tmp_path, "--size", 16, *STAGES["anyorder"]
    with control_c(2):
        assert cli(*line)[0] == 130
    assert list(files_of(tmp_path)) == ["tokenizer_resume.pt"]
    cli.ok(*line, "--resume")
    assert (tmp_path / "anyorder.pt").exists()


@pytest.mark.parametrize("size, cell, cells", ((20, 4, 25), (34, 2, 289)))
def test_the_chain_on_other_grids(size, cell, cells, tmp_path, cli):
    """Odd, and larger than a byte can count."""
    pictures = picture_folder(tmp_path / "pictures", 16)
    out = "--out", tmp_path / "out"
    grid = "--size", size, "--downsample", cell
    cli.ok("tokenizer", *out, "--data", pictures, *STAGES["tokenizer"], *grid)
    for stage in ("anyorder", "order_infer", "finetune"):
        cli.ok(stage, *out, *STAGES[stage])
    cli.ok("sample", *out, "--n", 2, "--steps", 7)
    cli.ok("evaluate", *out, "--n", 4, "--models", tmp_path / "out/ordered.pt:learned")
    model = load_model(tmp_path / "out/ordered.pt")
    assert model.N == cells
    order = torch.load(tmp_path / "out/orders.pt", weights_only=True)["order"]
    assert torch.equal(order.sort(1).values.long(), torch.arange(cells).expand_as(order))


def test_as_many_orders_are_inferred_as_take_the_same_time(chain, tmp_path, monkeypatch, cli):
    assert [order_infer.affordable(N) for N in (64, 256, 1024)] == [4000, 250, 16]
    looks = [order_infer.affordable(N) * N * N for N in (16, 25, 49, 100, 256)]
    assert max(looks) < 1.01 * min(looks)
    # few images: 8 of the 32, and a quarter as many of those to check on
    monkeypatch.setattr(order_infer, "affordable", lambda N: 8 if N == 16 else 0)
    out = start_of("order_infer", chain, tmp_path / "out")
    printed = cli.ok("order_infer", "--out", out)
    assert "orders for 8 of 3" in printed and "136 looks for each" in printed
    split = tokenizer.open_tokens(out)["split"]
    index = torch.load(out / "orders.pt", weights_only=True)["index"]
    every = (split == 1).sum()
    assert split[index].bincount().tolist() == [8, min(2, every)]
    assert order_infer.load_orders(out, tokenizer.open_tokens(out))["config"]["limit"] == 8


def test_a_gif_shows_images_and_orders_as_they_grow(tmp_path):
    """Two images of 2x2 cells of 4 pixels: white where drawn, and below each its order."""
    rank = torch.tensor([[[0, 1], [2, 3]], [[3, 2], [1, 0]]])
    images = torch.full((2, 3, 8, 8), 255, dtype=torch.uint8)
    maps = order_infer.order_maps(rank.flatten(1), 2, 2, 8)
    sample.film(tmp_path / "x.gif", images, maps, rank, [], 3)
    side, gap = 12, data.sheet(images[:1], 1).width - 8
    assert gap % 2 == 0
    gap //= 2
    with Image.open(tmp_path / "x.gif") as gif:
        assert gif.n_frames == 5
        for step in range(5):
            gif.seek(step)
            frame = np.asarray(gif.convert("RGB")).astype(int)
            for i, row, col in itertools.product(range(2), range(2), range(2)):
                left = gap + i * (2 * side + gap) + col * side + side // 2
                top = gap + row * side + side // 2
                below = top + 2 * side + gap
                drawn = bool(rank[i, row, col] < step)
                assert (frame[top, left].min() > 250) == drawn
                # grey is not yet drawn
                assert (np.ptp(frame[below, left]) > 20) == drawn


def test_samples_are_drawn_anew_at_each_report(chain, tmp_path, monkeypatch, cli):
    out = start_of("anyorder", chain, tmp_path / "out")
    seen = calls_of(monkeypatch, anyorder, "save_picture")
    cli.ok("anyorder", "--out", out, *STAGES["anyorder"])
    pictures = [picture.tobytes() for (path, picture), _ in seen if path.endswith("anyorder.png")]
    # six reports, and the best model at the end: it gets better while one watches
    assert len(pictures) == 7 and len(set(pictures)) > 4


def test_a_blurred_tokenizer_says_what_helps(chain, tmp_path, monkeypatch, capsys):
    how = dict(data=str(chain[0]), size=16, codebook=16, steps=2, batch=4, device="cpu")
    for limit, told in ((99, True), (-99, False)):
        monkeypatch.setattr(tokenizer, "BLURRED", limit)
        make_tokens(out=tmp_path / str(told), **how)
        assert ("--downsample" in capsys.readouterr().out) == told


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
    # the last alone
    assert done.stdout.count("left with") == 1, done.stderr
    assert "backwards order only" in done.stderr
    assert load_model(out / "ordered_backwards.pt").about["order"] == "backwards"
    row, = json.loads((out / "results.json").read_text())["rows"]
    assert row["step"] == pytest.approx((12 + 3 * 10 ** 0.5) / 15)


@pytest.mark.parametrize("script, flags, needle", (
    ("anyorder", "--data no/such/path", "no/such/path"),
    ("anyorder", "--width 33", "32"),
    ("anyorder", "--size 64", "another --out"),
    ("order_infer", "--device toaster", "toaster"),
    ("order_infer", "--model {out}/raster.pt", "raster order only"),
    ("sample", "--model {out}/none/ordered_class.pt", "run python finetune.py --order class"),
    ("sample", "--model {out}/none/raster.pt", "run python anyorder.py --order raster"),
    ("sample", "--model {out}/raster.pt --order random", "raster order only"),
    ("sample", "--model {out}/anyorder.pt --order learned", "order head"),
))
def test_bad_input_gets_one_line_and_exit_code_2(script, flags, needle, chain, cli):
    assert needle in cli.refused(script, chain[1], *flags.format(out=chain[1]).split())


def test_every_parsed_flag_is_read(monkeypatch, cli):
    def parsed(parser):
        flags.update(action.dest for action in parser._actions)
        sys.exit(0)
    monkeypatch.setattr(data.Parser, "parse_args", parsed)
    for script in set(SCRIPTS) - {"tokenizer"}:  # make_tokens(**vars(args)) takes them all
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


def test_the_2x2_example_of_the_readme():
    """A drawing that says what its table says: `visit` finds the same order and the same cost."""
    readme = (HERE / "README.md").read_text()
    lines = re.search(r"^ 0 (.*\n) 1 (.*\n) 2 (.*\n) 3 (.*\n)", readme, re.M).groups()
    said, p = [], {}
    for step, line in enumerate(lines):
        *cells, surest, token, cost = re.split(" {2,}", line.strip())
        for cell, text in enumerate(cells):
            if "." in text:
                p[step, cell] = [float(x) for x in text.split()]
        cell, sure = re.fullmatch(r"cell (\d) \((\.\d\d)\)", surest).groups()
        said.append((int(cell), float(sure), "ABC".index(token), float(cost.split(" = ")[1])))
    image = torch.tensor([[0, 1, 2, 2]])
    found = []

    class Table:
        model = SimpleNamespace(config={"rows": 2, "cols": 2})

        def look(self, cells):
            return torch.tensor([[p[len(found), cell] for cell in cells[0].tolist()]]).log()

        def place(self, choice, token):
            pass
    drawing = Table()

    def choose(free):
        logits = drawing.look(free)
        return location_scores(logits, "confidence", None), logits

    def fill(cell, logits):
        token = image.gather(1, cell)
        found.append((cell.item(), logits.exp().max().item(), token.item(),
                      -logits[0, 0, token].item()))
        return token
    order = order_infer.visit(drawing, torch.arange(4)[None], [1] * 4, choose, fill)
    for ours, theirs in zip(found, said, strict=True):
        assert ours == pytest.approx(theirs, abs=6e-4)
    total = sum(cost for *_, cost in said)
    assert f"The order is {' '.join(map(str, order[0].tolist()))}." in readme
    assert f"{total:.3f} for this image, {total / 4:.3f} *nats per token*" in readme


def test_the_readme_is_short_and_its_links_and_figures_hold():
    readme = (HERE / "README.md").read_text()
    assert len(readme.encode()) <= 15_000
    for path in (HERE / "README.md", *(HERE / "assets").glob("*.md")):
        text = re.sub("```.*?```", "", path.read_text(), flags=re.S)
        for target in re.findall(r"\]\(([^)\s]+)\)", text):
            if target.startswith("http"):
                continue
            name, _, heading = target.partition("#")
            file = path.parent / name if name else path
            assert file.exists(), (path.name, target)
            # as a web page names the headings of a file
            lines = file.read_text().splitlines() if heading else ["# "]
            heads = {re.sub(r"[^\w\- ]", "", line.lstrip("# ").lower()).replace(" ", "-")
                     for line in lines if line.startswith("#")}
            assert heading in heads, (path.name, target)
    results = (HERE / "assets/results.md").read_text()
    findings = readme[readme.index("## What we found"):readme.index("## When something")]
    for number in re.findall(r"(?<![\d.])\d+\.\d+(?![\d.])", findings):
        assert number in results, number
    assert sum(file.stat().st_size for file in (HERE / "assets").iterdir()) < 3e6


def test_the_scripts_of_the_notebook_run(chain, tmp_path, capsys):
    """Those that recognise captions and draw neighbours.png."""
    out = start_of("order_infer", chain, tmp_path / "out")
    for name, source in (("raster", "raster"), ("ordered_raster", "raster")):
        shutil.copy(chain[1] / f"{source}.pt", out / f"{name}.pt")
    text = (HERE / "assets/results.md").read_text()
    printed = []
    for script in re.findall(r"```python\n(.*?)```", text, re.S):
        script = re.sub(r'OUT, COUNT(.*) = "out", \d+', rf"OUT, COUNT\1 = {str(out)!r}, 4", script)
        exec(script, {})
        printed.append(capsys.readouterr().out)
    recognised, neighbours = printed
    rates = [float(rate) for rate in re.findall(r"accuracy (\S+),", recognised)]
    assert len(rates) == 5 and 0 <= min(rates) and max(rates) <= 1
    # every pair of neighbours counts once in each order: 42 pairs of 16 cells
    assert neighbours.count(f"known {42 / 16:.2f}") == 3
    assert Image.open(out / "neighbours.png").size == (760, 250)


def test_the_tests_of_the_exercises_use_what_is_there():
    """Each is a test with a name of its own; of names that nobody defines there is one to write."""
    blocks = re.findall(r"```python\n(.*?)```", (HERE / "assets/exercises.md").read_text(), re.S)
    assert len(blocks) == 6
    known = {*globals(), *dir(builtins)}
    names = set()
    for block in blocks:
        tree = ast.parse(block)
        name, = (node.name for node in tree.body)
        assert name.startswith("test_") and name not in known
        inside = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        stored = {node.id for node in ast.walk(tree)
                  if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
        stored |= {node.arg for node in ast.walk(tree) if isinstance(node, ast.arg)}
        stored |= {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
        names |= inside - stored - known
    assert names == {"palindrome"}


TINY = {"tokenizer": "--size 16 --codebook 16 --steps 3 --batch 4", "order_infer": "--limit 8",
        "anyorder": "--size 16 --steps 3 --batch 8 --width 32 --layers 2", "sample": "--n 2",
        "finetune": "--steps 4 --batch 8", "evaluate": "--n 12", "data": ""}


def readme_commands():
    """All `python x.py` in the README's code blocks: (x, flags)."""
    blocks = re.findall(r"```bash\n(.*?)```", (HERE / "README.md").read_text(), re.S)
    for piece in re.split("\n|&&", "\n".join(blocks)):
        first, script, *flags = [*shlex.split(piece, comments=True), "", ""]
        if first == "python" and script.endswith(".py"):
            yield script[:-3], [flag for flag in flags if flag]


def test_the_readme_commands_run(tmp_path, monkeypatch, cli):
    """In its order, at tiny size and on pictures."""
    tiny_tokenizer_first(monkeypatch)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(evaluate, "speed_table", lambda *rest: None)       # takes minutes
    values = {"--data": picture_folder(tmp_path / "pictures"), "--complete": "pictures/000.png"}
    lines = list(readme_commands())
    assert {script for script, _ in lines} >= set(SCRIPTS[1:])
    for script, flags in lines:
        flags = [values.get(before, flag) for before, flag in zip(["", *flags], flags)]
        if script in SCRIPTS[:3] and "--data" not in flags:
            flags += ["--data", values["--data"]]
        if script == "tokenizer":                       # another way to begin
            out = dict(zip(flags, flags[1:])).get("--out", "out")
            shutil.rmtree(out, ignore_errors=True)
        if "--resume" in flags:
            flags.remove("--resume")                    # nothing was interrupted
        cli.ok(script, *flags, *TINY[script].split())


# ---------------------------------------------------------------------------------------------
# data.py


def test_a_file_is_decoded_once(tmp_path, monkeypatch):
    """By the search for broken files; later passes find it in memory, and unchanged."""
    folder = data.Folder(picture_folder(tmp_path / "pictures", 12), 16, "train")
    reads = calls_of(monkeypatch, data, "read_image")
    first = [folder[i][0].clone() for i in range(len(folder))]
    again = [folder[i][0] for i in range(len(folder))]
    assert all(map(torch.equal, first, again))
    assert len(reads) == len({path for (path, _), _ in reads}) >= len(folder)


def picture(path, colour="red", size=(8, 8), **options):
    """A one-colour image file, its folders made on the way."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path, **options)


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


# ---- folders

def test_caption_comes_from_metadata_then_text_then_folder_then_nothing(tmp_path, monkeypatch):
    expected = {"a/1.png": "one, two three", "a/2.PNG": "beside it [31m", "a/b/3.Jpeg": "b",
                "4.webp": "", "5.gif": "red disc", "00000/6.TIF": "", "cat/00001/7.jpe": "cat"}
    for name in expected:
        picture(tmp_path / name)
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
    (tmp_path / "sub/metadata.jsonl").write_text("\n\n".join(map(json.dumps, rows)))
    (tmp_path / "metadata.csv").write_text("file_name,text\n1.png,eins\n", encoding="utf-16")
    assert everything(tmp_path) == {"1.png": "eins", "sub/2.png": "zwei", "sub/deep/3.png": "drei"}


@pytest.mark.parametrize("kind, text", [
    ("jsonl", "{"), ("jsonl", "[1]"), ("csv", "image;words\na;b\n"),
    ("csv", "file_name,text\na.png,red, big bird\n"), ("csv", 'file_name,text\na.png,"a red\n')])
def test_metadata_that_cannot_be_read_is_one_line(tmp_path, kind, text):
    picture(tmp_path / "a.png")
    (tmp_path / f"metadata.{kind}").write_text(text)
    message = f"metadata.{kind} (cannot be read|has image;words: expected)"
    with pytest.raises(UserError, match=message):
        open_data(tmp_path)


@pytest.mark.parametrize("train, test, left_out", [
    ({"train/cat/a.png": "cat"}, {"val/cat/b.png": "cat"}, []),
    ({"Train/a.png": ""}, {"Valid/b.png": ""}, ["more/c.png"]),
    ({"train/a.png": ""}, {"test/c.png": ""}, ["val/b.png"]),
    ({"a.png": "", "cats/b.png": "cats"}, {"test/c.png": ""}, [])])
def test_folders_called_train_val_and_test_are_splits_and_no_captions(tmp_path, train, test,
                                                                      left_out, capsys):
    for name in [*train, *test, *left_out]:
        picture(tmp_path / name)
    sets = [open_data(tmp_path, 8, split) for split in ("train", "test")]
    assert [dict(zip(each.checked[0], each.captions)) for each in sets] == [train, test]
    out = told(sets[0], capsys)
    assert "split: " in out and ("left out" in out) == bool(left_out)


def test_a_train_is_a_class_among_classes_and_no_caption_alone(tmp_path):
    for captions in ({"train/1.png": "train", "plane/2.png": "plane"}, {"train/1.png": ""}):
        for name in captions:
            picture(tmp_path / str(len(captions)) / name)
        assert everything(tmp_path / str(len(captions))) == captions


def test_describe_tells_what_is_not_read_and_how_large_the_images_are(tmp_path, capsys):
    for i in range(9):
        picture(tmp_path / f"{i}.jpg", size=(60, 40))
    for name in ("1.HEIC", "2.heic", "3.avif", "README", "1.txt"):
        (tmp_path / name).touch()
    (tmp_path / "metadata.csv").write_text("file_name,text\n0,zero\n1.jpg,one\n")
    out = told(open_data(tmp_path, 32), capsys)
    assert "4 files not read: 2 .heic, 1 " in out and "your images are about 60x40" in out
    assert "1 rows of metadata name no image here" in out


def test_a_folder_called_sunsets_needs_a_dot(tmp_path, monkeypatch, capsys):
    picture(tmp_path / "sunsets/1.png")
    monkeypatch.chdir(tmp_path)
    assert "--data ./sunsets" in told(open_data("sunsets"), capsys)
    assert len(open_data("./sunsets")) == 1


def test_a_tenth_is_held_out_by_name_alone_and_the_fingerprint_sees_changes(tmp_path):
    names = sorted(f"{i}.png" for i in range(40))
    for name in names:
        picture(tmp_path / name)
    for split in ("train", "test"):
        mine = [name for name in names if in_test_split(name) == (split == "test")]
        assert open_data(tmp_path, 8, split).checked[0] == mine
    assert 80 < sum(in_test_split(f"{i}.png") for i in range(1000)) < 120
    first = open_data(tmp_path, 16, "test").fingerprint
    assert first == open_data(tmp_path, 8, "train").fingerprint
    (tmp_path / "3.txt").write_text("another caption")
    second = open_data(tmp_path).fingerprint
    (tmp_path / "4.png").unlink()
    assert len({first, second, open_data(tmp_path).fingerprint}) == 3


def centre(path, size=8):
    return read_image(str(path), size)[:, size // 2, size // 2].tolist()


@pytest.mark.parametrize("name, mode, colour, options, expected", [
    # red, but fully transparent
    ("clear.png", "RGBA", (255, 0, 0, 0), {}, (255, 255, 255)),
    ("half.png", "RGBA", (0, 0, 0, 128), {}, (127, 127, 127)),
    ("palette.gif", "P", 1, {"transparency": 1}, (255, 255, 255)),
    ("key.png", "RGB", (9, 9, 9), {"transparency": (9, 9, 9)}, (255, 255, 255)),
    ("ink.tif", "CMYK", (0, 255, 255, 0), {}, (255, 0, 0))])
def test_every_mode_becomes_rgb_over_white(tmp_path, name, mode, colour, options, expected):
    image = Image.new(mode, (8, 8), colour)
    if mode == "P":
        image.putpalette([255, 0, 0, 0, 0, 255])
    image.save(tmp_path / name, **options)
    assert centre(tmp_path / name) == list(expected)


@pytest.mark.parametrize("name, dtype, values, expected", [
    ("16.png", np.uint16, [0, 32768, 65535], [0, 128, 255]),
    ("12.png", np.uint16, [0, 2048, 4095], [0, 128, 255]),
    ("dark.tif", np.int32, [0, 100, 250], [0, 0, 1]),
    ("1.tif", np.float32, [0, 0.5, 1], [0, 128, 255]),
    ("255.tif", np.float32, [np.nan, np.inf, 200], [0, 0, 200])])
def test_deep_grey_becomes_8_bits(tmp_path, name, dtype, values, expected):
    Image.fromarray(np.array(values, dtype).repeat(3).reshape(3, 3)).save(tmp_path / name)
    assert read_image(tmp_path / name, 3)[0, :, 0].tolist() == expected


def test_first_frame_of_an_animation(tmp_path):
    blue = Image.new("RGB", (8, 8), "blue")
    picture(tmp_path / "film.gif", save_all=True, append_images=[blue])
    assert centre(tmp_path / "film.gif") == [255, 0, 0]


@pytest.mark.parametrize("ending", ["jpg", "png"])
def test_exif_rotation(tmp_path, ending):
    image = sheet(render_sunset(3, 16)[0][None], 1, gap=0)
    path, exif = tmp_path / f"turned.{ending}", Image.Exif()
    for orientation in range(10):
        exif[0x0112] = orientation
        image.save(path, exif=exif)
        upright = np.array(ImageOps.exif_transpose(Image.open(path)))
        assert np.array_equal(read_image(path, 16).permute(1, 2, 0), upright)


def test_short_side_is_resized_and_the_centre_cropped(tmp_path):
    wide = np.zeros((20, 60, 3), np.uint8)
    wide[:, 20:40] = 200
    Image.fromarray(wide).save(tmp_path / "wide.png")
    assert (read_image(tmp_path / "wide.png", 10)[:, :, 1:-1] > 190).all()
    picture(tmp_path / "line.png", size=(1, 5000))
    assert centre(tmp_path / "line.png") == [255, 0, 0]


@pytest.mark.skipif(sys.platform != "linux", reason="other systems forbid such names and links")
def test_broken_files_are_skipped_counted_and_named_once(tmp_path, capsys):
    picture(tmp_path / "good.png")
    raw = (tmp_path / "good.png").read_bytes()
    # a bomb: 10 GB when decoded
    ihdr = b"IHDR" + struct.pack(">II5B", 60000, 60000, 8, 2, 0, 0, 0)
    bomb = raw[:12] + ihdr + struct.pack(">I", zlib.crc32(ihdr)) + raw[33:]
    # another of Pillow's formats, as EPS is one
    ppm = b"P6 1 1 255 red"
    broken = {"cut.png": raw[:len(raw) // 2], "empty.jpg": b"", "ppm.png": ppm, "bomb.png": bomb}
    fine = dict.fromkeys(["wrong.jpg", "line\nbreak \U0001f305 \x1b.png", "\udcff\udcfe.png"], raw)
    for name, content in {**broken, **fine, "._photo.jpg": b""}.items():
        (tmp_path / name).write_bytes(content)
    # a folder in itself, read once
    os.symlink(tmp_path, tmp_path / "circle")
    os.symlink("nowhere.png", tmp_path / "dangling.png")
    os.mkfifo(tmp_path / "pipe.png")
    assert set(everything(tmp_path)) == {*fine, "good.png"}
    sets = [open_data(tmp_path, 8, split) for split in ("train", "test")]
    skipped = [line.split(" (")[0] for dataset in sets for line in dataset.skipped]
    assert sorted(skipped) == sorted([*broken, "dangling.png", "pipe.png"])
    out = told(sets[0], capsys)
    assert f"skipped {len(sets[0].skipped)}" in out and len(out.splitlines()) == 2
    assert all(out.count(line) == 1 for line in sets[0].skipped)


# ---- IDX files

def idx(path, array):
    raw = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    path.parent.mkdir(exist_ok=True, parents=True)
    with (gzip.open if path.suffix == ".gz" else open)(path, "wb") as file:
        file.write(raw + array.tobytes())


@pytest.mark.parametrize("place, dot, gz, words", [
    ("fashion/digits", "-", ".gz", ["3", "9", "7"]),
    ("FashionMNIST/raw", ".", "", ["dress", "boot", "sneaker"])])
def test_idx_files_of_a_folder_or_by_name(tmp_path, gz, place, dot, words):
    folder = tmp_path / place
    images = np.arange(2 * 28 * 28, dtype=np.uint8).reshape(2, 28, 28)
    for part, n in (("train", 2), ("t10k", 1)):
        idx(folder / f"{part}-images{dot}idx3-ubyte{gz}", images[:n])
        idx(folder / f"{part}-labels{dot}idx1-ubyte{gz}", np.array([3, 9][:n], np.uint8))
    for path in (folder, folder / f"train-images{dot}idx3-ubyte{gz}"):
        train, test = open_data(path, 28), open_data(path, 28, "test")
        assert [train[0][1], train[1][1]] == words[:2] and len(train) == 2 and len(test) == 1
        assert torch.equal(train[1][0], torch.from_numpy(images[1]).expand(3, 28, 28))
    # without test files a tenth is held back
    other = folder / f"other-train-images-idx3-ubyte{gz}"
    idx(other, np.zeros((200, 2, 2), np.uint8))
    idx(folder / f"other-train-labels-idx1-ubyte{gz}", np.full(200, 7, np.uint8))
    train, test = open_data(other), open_data(other, 32, "test")
    assert len(train) + len(test) == 200 and 5 < len(test) < 40
    assert test.captions[0] == words[2] and test[0][0].shape == (3, 32, 32)


def test_broken_idx_files_are_one_line(tmp_path):
    path = tmp_path / "train-images-idx3-ubyte"
    good = bytes([0, 0, 8, 3]) + struct.pack(">3I", 1, 2, 2)
    for raw in (good + b"12345", good[:6], b"\0\0\x0d" + good[3:] + b"1234", b"",
                gzip.compress(good)[:12]):
        path.write_bytes(raw)
        with pytest.raises(UserError, match="^.*cannot be read.*$"):
            open_data(tmp_path)
    path.write_bytes(good + b"1234")
    assert open_data(tmp_path).captions == [""]
    idx(tmp_path / "train-labels-idx1-ubyte", np.zeros(3, np.uint8))
    with pytest.raises(UserError, match="1 images but 3 labels"):
        open_data(tmp_path)


# ---- sunsets

def test_sunsets_are_deterministic_distinct_and_split():
    train, test = open_data("sunsets", 32), open_data("sunsets", 32, "test")
    assert len(train) == 45_000 and len(test) == 5_000 and train.fingerprint == test.fingerprint
    assert torch.equal(train[7][0], render_sunset(7)[0])
    assert torch.equal(test[0][0], render_sunset(45_000)[0])
    assert train.captions[7] == train[7][1] and set(test.captions) == set(train.captions)
    assert len({train[i][0].numpy().tobytes() for i in range(300)}) == 300


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


# ---- words, pictures, progress

@pytest.mark.parametrize("caption, words", [
    ("T-shirt, red_2 \u00c9t\u00e9!", "t shirt red 2 \u00e9t\u00e9"),
    ("cafe\u0301 caf\u00e9", "caf\u00e9 caf\u00e9"),
    ("\u0915\u093e\u0932\u093e", "\u0915\u093e\u0932\u093e"),
    ("\u7ea2\u732b red\u732b2", "\u7ea2 \u732b red \u732b 2"),
    ("\U0001f534\U0001f431 \u2764\ufe0f", "\U0001f534 \U0001f431 \u2764"),
    ("\U0001f44d\U0001f3fd", "\U0001f44d \U0001f3fd"),
    ("\u0301 -- \uff21\uff22", "ab")])
def test_words_of(caption, words):
    assert words_of(caption) == words.split()


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


def test_loss_curve_is_a_picture_and_a_table(tmp_path):
    data.loss_curve([(1, 3.0, 3.5), (10, 2.0, 2.25)], tmp_path / "loss.png", math.log(512))
    table = (tmp_path / "loss.csv").read_text()
    assert table == "step,training,held_out\n1,3,3.5\n10,2,2.25\n"
    colours = {colour for _, colour in Image.open(tmp_path / "loss.png").getcolors(10_000)}
    assert {(255, 0, 0), (192, 192, 192), (0, 0, 255)} <= colours
    # a run of one step without a floor
    data.loss_curve([(1, 3.0, 3.5)], tmp_path / "one.png")


def test_progress_in_a_log_is_short_lines_and_only_of_the_first_process(monkeypatch):
    log = io.StringIO()
    monkeypatch.setattr(sys, "stderr", log)
    monkeypatch.delenv("RANK", raising=False)
    with data.progress(1000, "training", "step") as bar:
        for _ in range(1000):
            # as if a second had passed
            bar.start_t -= 1
            bar.last_print_t -= 1
            bar.update()
    lines = log.getvalue().split("\n")
    assert "\r" not in log.getvalue() and 10 < len(lines) < 20 and max(map(len, lines)) <= 90
    monkeypatch.setenv("RANK", "1")
    assert data.progress(1000, "training", "step").disable


@pytest.mark.parametrize("before, done, seconds, line", (
    (0, 10, 5, "training: about 8 minutes on this machine\n"),
    # a resumed run: what was done before says nothing about the speed
    (900, 10, 45, "training: about 7 minutes on this machine\n"),
    # it is soon over; it has just begun
    (0, 900, 6, ""), (0, 10, 2, "")))
def test_a_bar_says_beforehand_how_long_it_takes(before, done, seconds, line, monkeypatch, capsys):
    monkeypatch.delenv("RANK", raising=False)
    with data.progress(1000, "training", "step", before) as bar:
        bar.start_t -= seconds
        bar.update(done)
        assert capsys.readouterr().out == line
        # once
        bar.update()
    assert not line or not capsys.readouterr().out


def test_durations_are_in_units_that_one_can_read():
    assert [data.duration(t) for t in (7.4, 89, 91, 600, 5399, 9000)] == [
        "7 seconds", "89 seconds", "2 minutes", "10 minutes", "90 minutes", "2.5 hours"]


# ---- files

def test_fingerprint_tells_contents_apart():
    parts = ["ab", b"ab", ["ab"], ["a", "b"], {"a": "b"}, 1, 1.0, "1", True, None,
             torch.zeros(2), torch.zeros(2, 1), torch.zeros(2, dtype=torch.int32)]
    names = {fingerprint(part) for part in parts} | {fingerprint("a", "b"), fingerprint()}
    assert len(names) == len(parts) + 2
    assert fingerprint({"a": 1, "b": [2]}) == fingerprint({"b": [2], "a": 1})
    turned = torch.arange(6).reshape(2, 3).T
    assert fingerprint(turned) == fingerprint(turned.contiguous())


GOOD = dict(kind="tokens", config=dict(rows=2), tokens=torch.arange(64))


@pytest.mark.parametrize("error, seen", [
    (ZeroDivisionError(), ZeroDivisionError), (OSError(28, "No space left"), UserError),
    # so says torch of a full disk
    (RuntimeError("PytorchStreamWriter failed writing file"), UserError)])
def test_a_file_is_replaced_as_a_whole_or_not_at_all(tmp_path, error, seen):
    path = tmp_path / "new" / "a.pt"
    save(path, GOOD)
    with pytest.raises(seen):
        with replacing(path) as file:
            file.write(b"half")
            raise error
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


class Bomb:
    """Pickles as a call that is made when it is loaded."""
    def __reduce__(self):
        return os.mkdir, ("exploded",)


def test_load_refuses_what_it_should_and_executes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "a.pt"

    def refused(message):
        with pytest.raises(UserError, match=f"^.*{message}.*: run python tokenizer.py$"):
            load(path, "tokens", "python tokenizer.py")

    save(path, GOOD)
    raw = bytearray(path.read_bytes())
    # one bit of a weight
    raw[raw.index(GOOD["tokens"].numpy().tobytes()) + 100] ^= 1
    path.write_bytes(raw)
    refused("damaged")
    torch.save({**GOOD, "version": data.VERSION, "x": Bomb()}, path)
    refused("damaged")
    torch.save({**GOOD, "version": data.VERSION - 1}, path)
    refused("written by an older version")
    assert os.listdir(tmp_path) == ["a.pt"]


# ---- flags and errors

@pytest.mark.parametrize("error, code, line", [
    (UserError("size 7: expected 8"), 2, "error: size 7: expected 8"),
    (KeyboardInterrupt(), 130, "stopped"),
    (PermissionError(13, "Permission denied", "x\n.pt"), 2, "error: x\\n.pt: Permission denied"),
    (torch.OutOfMemoryError("CUDA out of memory"), 2, data.TOO_LARGE),
    (RuntimeError("[gloo] Connection closed by peer"), 1,
     "error: another process of this run has died: its message tells why")])
def test_run_turns_errors_into_one_line(capsys, error, code, line):
    def main():
        raise error
    with pytest.raises(SystemExit) as caught:
        run(main)
    assert caught.value.code == code and capsys.readouterr().err == line + "\n"


def test_run_knows_how_torch_says_that_memory_is_out_and_leaves_bugs_alone():
    with pytest.raises(SystemExit):
        run(lambda: torch.empty(2 ** 55))
    with pytest.raises(RuntimeError):
        run(lambda: torch.ones(2) @ torch.ones(3))


def test_bad_arguments_are_one_line(tmp_path):
    for bad in (dict(path=str(tmp_path / "no such\nplace")), dict(split="dev"), dict(size=0),
                dict(path=str(tmp_path)), dict(path=__file__), dict(path="")):
        with pytest.raises(UserError, match="^.*$"):
            open_data(**bad)
    (tmp_path / "a.png").write_bytes(b"not an image")
    with pytest.raises(UserError, match="none of 1 images can be trained on, a.png .cannot"):
        len(open_data(tmp_path))


def test_wrong_flags_are_one_line_and_a_command_line_can_be_typed_as_it_is():
    parser = arguments("Some words.")
    parser.add_argument("--share", type=data.number(float, 0, 1))
    bad = "--seed=x\n --seed=-1 --seed=2.5 --seed=inf --share=nan --share=1.1 --dat=x stray"
    for wrong in bad.split(" "):
        with pytest.raises(UserError, match="^.*--help.*$"):
            parser.parse_args([wrong])
    assert parser.parse_args(["--share", "0.5"]).share == 0.5
    line = data.command_line("a.py", "--out", "my out")
    assert shlex.split(line.replace('"', "'")) == ["python", "a.py", "--out", "my out"]


# ---- devices and processes

def test_the_own_gpu_is_chosen_before_any_is_touched(monkeypatch):
    # as if there were GPUs
    chosen = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch, "empty", lambda *shape, device: chosen.append("touched"))
    monkeypatch.setenv("LOCAL_RANK", "3")
    for name in ("cuda:1", "cuda", "cpu"):
        assert pick_device(name) == torch.device(name)
    assert list(map(str, chosen)) == ["cuda:1", "touched", "cuda:3", "touched", "touched"]


def test_half_of_torchruns_variables_are_one_line(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(UserError, match="start with torchrun, or unset RANK"):
        data.join(torch.device("cpu"))


# ---- an unfinished run

def test_the_first_control_c_saves_and_a_later_one_leaves_at_once(tmp_path):
    def begin():
        return data.Checkpoint(tmp_path / "a_resume.pt", {"width": 32}, True, "python a.py")

    try:
        checkpoint = begin()
        # torchrun sends it twice
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            checkpoint.after_step(lambda: {"step": 3}, 3)
        checkpoint = begin()
        assert checkpoint.state == {"step": 3}
        signal.raise_signal(signal.SIGINT)
        checkpoint.asked -= 2
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    finally:
        checkpoint.done()
    assert not os.listdir(tmp_path)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


# ---- the script

def test_data_py_writes_a_contact_sheet_and_reads_every_flag(tmp_path, cli):
    out = tmp_path / "out"

    def sheet_of(*flags):
        cli.ok("data", "--out", out, *flags)
        return (out / "data.png").read_bytes()

    first = sheet_of()
    assert Image.open(out / "data.png").size == (8 * 130 + 2, 3 * 130 + 2) and sheet_of() == first
    own = picture_folder(tmp_path / "own")
    assert len({first, sheet_of("--seed", 1), sheet_of("--split", "test"), sheet_of("--size", 8),
                sheet_of("--data", own)}) == 5
    cli.refused("data", out, "--out", __file__)


def small_tokenizer(size=16, downsample=4, codebook=32):
    torch.manual_seed(0)
    return Tokenizer({"size": size, "downsample": downsample, "codebook": codebook,
                      "width": 16, "fine": 8, "dim": 8})


def some_sunsets(n, size=16, split="train"):
    dataset = open_data("sunsets", size, split)
    return to_float(torch.stack([dataset[i][0] for i in range(n)]))


@pytest.fixture
def narrow(monkeypatch):
    """Small enough to train in seconds."""
    for name, value in dict(WIDTH=16, FINE=8, DIM=8, WARMUP=4).items():
        monkeypatch.setattr(tokenizer, name, value)
    # fewer test images to render
    monkeypatch.setattr(data, "SUNSETS", data.SUNSETS_TRAIN + 40)


SMALL = dict(size=8, codebook=16, steps=2, batch=2)


@pytest.mark.parametrize("size, downsample, cells", [(12, 4, 9), (16, 2, 64), (64, 16, 16)])
def test_tokenizer_shapes(size, downsample, cells):
    model = small_tokenizer(size, downsample)
    images = torch.rand(3, 3, size, size) * 2 - 1
    tokens = model.encode(images)
    assert tokens.shape == (3, cells) and tokens.max() < 32
    assert model.rows * model.cols == cells
    drawn = model.decode(tokens)
    assert drawn.shape == images.shape and drawn.abs().max() <= 1


def test_tokenizer_cells_are_row_major():
    model, image = small_tokenizer(size=32), some_sunsets(1, 32)
    other = image.clone()
    # of 8 x 8 cells that in row 1, column 6: cell 14
    other[:, :, 4:8, 24:28] = torch.rand(1, 3, 4, 4) * 2 - 1
    change = model.latents(image) - model.latents(other)
    assert change.abs().sum(-1).argmax() == 14


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
        assert all(p.grad.isfinite().all() for p in model.parameters())
    assert model.encoder[1].weight.grad.abs().sum() > 0


def test_dead_codes_restart_where_the_data_are():
    model = small_tokenizer(codebook=16)
    # the collapse: every code but one is far from the data
    model.codebook[:] = 100.0
    model.codebook[0] = 0.0
    model.total.copy_(model.codebook)
    model.count.fill_(1)
    z = torch.randn(64, 8, generator=torch.Generator().manual_seed(1))
    assert usage(model.nearest(z), 16)[0] == 1
    for step in range(150):
        model.move_codes(z, model.nearest(z), step, seed=0)
    assert usage(model.nearest(z), 16)[0] >= 15
    assert model.codebook.abs().max() < 10


@pytest.mark.parametrize("warmup, steps", [(0, (0, 1)), (2, (1, 2, 3)), (2, (0, 7, 8))])
def test_codes_begin_once(warmup, steps, monkeypatch):
    """In the first step after the warm-up, also if a resumed run has a shorter one."""
    model, images = small_tokenizer(), some_sunsets(4)
    calls = calls_of(monkeypatch, model, "first_codes")
    model.warmup = warmup
    for step in steps:
        model.loss(images, step)
    assert len(calls) == 1 and model.count.min() > 0


def test_usage_and_psnr_by_hand():
    assert usage(torch.tensor([[3, 3], [3, 3]]), 8) == (1, 1.0)
    # exp of the entropy of (3/4, 1/4)
    assert usage(torch.tensor([0, 0, 0, 1]), 2) == (2, pytest.approx(4 / 3 ** 0.75))
    # half the range: 20 log10(2)
    black, grey = -torch.ones(2, 3, 4, 4), torch.zeros(2, 3, 4, 4)
    assert psnr(grey, black).tolist() == pytest.approx([6.0206, 6.0206], abs=1e-4)


def test_nearest_codes_in_parts_are_the_nearest_codes():
    model = small_tokenizer(codebook=65536)
    z = torch.randn(1200, 8)                            # more than are compared at once
    few = torch.tensor([0, 500, 511, 512, 513, 1199])
    expected = torch.cdist(z[few], model.codebook).argmin(1)
    assert torch.equal(model.nearest(z)[few], expected)


@pytest.mark.parametrize("n, batch", [(10, 4), (3, 8), (1, 2)])
def test_batches_are_whole_epochs(n, batch):
    stream = sum((batch_of(step, batch, n, 5) for step in range(3 * n)), [])
    epochs = [stream[i:i + n] for i in range(0, 3 * n * batch, n)]
    assert all(sorted(epoch) == list(range(n)) for epoch in epochs)
    assert n < 10 or epochs[0] != epochs[1]


def test_learning_rate_warms_up_and_ends_near_zero():
    rates = [learning_rate(step, 100, 1.0) for step in range(100)]
    assert rates[0] < rates[3] and rates[-1] < 0.01
    assert max(rates) == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("shape", ((8, 8), (8, 32), (24, 8)), ids=str)
def test_orthogonal_keeps_directions_and_evens_out_lengths(shape, dtype):
    random = torch.Generator().manual_seed(0)
    left, _, right = torch.linalg.svd(torch.randn(5, *shape, generator=random), False)
    # the longest is 100 times the shortest
    g = left * torch.logspace(-4, -2, 8) @ right
    found = left.mT @ tokenizer.orthogonal(g.to(dtype)).float() @ right.mT
    # diagonal, if directions stay
    lengths = found.diagonal(dim1=1, dim2=2)
    assert 0.65 < lengths.min() and lengths.max() < 1.3
    least = 1e-3 if dtype == torch.float32 else 0.1
    assert (found - lengths.diag_embed()).abs().max() < least


def test_muon_is_its_definition():
    random = torch.Generator().manual_seed(0)
    shapes = (8, 16), (24, 8), (8, 16), (6, 2, 3, 3)
    weights = [torch.randn(shape, generator=random) for shape in shapes]
    # as the tokenizer has its convolutions
    weights[3] = weights[3].contiguous(memory_format=torch.channels_last)
    expected = [w.clone() for w in weights]
    momenta = [torch.zeros_like(w) for w in weights]
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


def test_each_weight_has_one_optimizer():
    model = small_tokenizer()
    adamw, muon = ([id(w) for group in each.param_groups for w in group["params"]]
                   for each in tokenizer.make_optimizers(model))
    assert sorted(adamw + muon) == sorted(id(w) for w in model.parameters())
    blocks = [block for block in model.modules() if isinstance(block, tokenizer.Block)]
    convolutions = [conv.weight for block in blocks for conv in (block.conv1, block.conv2)]
    assert sorted(muon) == sorted(map(id, convolutions))


def test_tokens_file(tmp_path, narrow):
    make_tokens(out=tmp_path, size=8, codebook=16, steps=12, batch=4, limit=60)
    train, test = open_data("sunsets", 8, "train"), open_data("sunsets", 8, "test")
    tokens = tokenizer.open_tokens(tmp_path, "sunsets")
    model = tokenizer.open_tokenizer(tmp_path, tokens)
    assert tokens["split"].bincount().tolist() == [57, 3, len(test)]
    made_from = {"data": train.fingerprint, "tokenizer": model.fingerprint}
    assert tokens["made_from"] == made_from
    for i, (image, caption) in [(7, train[7]), (61, test[1])]:
        assert tokens["captions"][tokens["caption_index"][i]] == caption
        assert torch.equal(model.encode(to_float(image[None]))[0], tokens["tokens"][i])
    assert not model.training and not any(p.requires_grad for p in model.parameters())


def test_a_finished_tokenizer_is_never_replaced(tmp_path, narrow, cli):
    """Neither by the same command, nor by other data or settings, nor by --resume."""
    folder, out = picture_folder(tmp_path / "pictures", 12), tmp_path / "my out"
    flags = "--data", folder, "--size", 8, "--steps", 2
    printed = cli.ok("tokenizer", "--out", out, *flags)
    assert f"next: {data.command_line('anyorder.py', '--out', out)}" in printed
    for more in (flags, (), (*flags, "--resume"), (*flags, "--seed", 1)):
        error = cli.refused("tokenizer", out, *more)
        assert "already holds a tokenizer" in error and "give another --out" in error


def test_out_must_lie_apart_from_the_images(tmp_path, narrow):
    folder = picture_folder(tmp_path / "pictures", 12)
    (tmp_path / "link").symlink_to(folder)
    for out in (folder, folder / "out", tmp_path / "link/out"):
        with pytest.raises(UserError, match="lies in --data"):
            make_tokens(folder, out, **SMALL)
    make_tokens(folder, f"{folder}_out", **SMALL)       # beside it is good


@pytest.mark.parametrize("size, line", [
    (8, "trained at 8x8 (2x2 cells): --size 16 for more"),
    (24, "trained at 24x24 (6x6 cells)\n")])
def test_the_size_is_no_secret(size, line, tmp_path, narrow, capsys):
    folder = picture_folder(tmp_path / "pictures", 12, size=24)
    make_tokens(folder, tmp_path / "out", **{**SMALL, "size": size})
    assert line in capsys.readouterr().out


def test_long_captions_are_cut_and_one_is_named(capsys):
    def words_and_length(*captions):
        """Of these captions of training images, and of one of a test image."""
        split = torch.tensor([0] * len(captions) + [2])
        return vocabulary({"captions": [*captions, "c " * 80], "split": split,
                           "caption_index": torch.arange(len(split))})

    words = [f"w{i}" for i in range(100)]
    assert words_and_length("T-shirt, RED", "red") == (["red", "shirt", "t"], 3)
    assert words_and_length(" ".join(words[:64]))[1] == 64
    assert capsys.readouterr().out == ""
    assert words_and_length(" ".join(words), "x " * 65) == (sorted([*words, "x"]), 64)
    printed = capsys.readouterr().out
    assert printed.startswith("2 captions have more than 64 words") and "w0 w1" in printed


def test_images_are_read_ahead_in_order_and_errors_arrive():
    """By threads, of a plan without end: no shared memory can be full."""
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


def test_a_run_begun_in_bfloat16_goes_on_in_it(tmp_path, narrow, monkeypatch):
    """Whatever the probe says later. Its tokens are those of float32."""
    flags = dict(SMALL, data=picture_folder(tmp_path / "pictures", 12), steps=20)
    outs = whole, halves, other = [tmp_path / name for name in ("whole", "halves", "float")]
    compute_in(monkeypatch, lambda device: torch.bfloat16)
    make_tokens(out=whole, **flags)
    with control_c(13), pytest.raises(KeyboardInterrupt):
        make_tokens(out=halves, **flags)
    compute_in(monkeypatch, lambda device: torch.float32)
    make_tokens(out=halves, resume=True, **flags)
    make_tokens(out=other, **flags)
    models = [load_tokenizer(out / "tokenizer.pt") for out in outs]
    assert models[0].fingerprint == models[1].fingerprint != models[2].fingerprint
    images = open_data(flags["data"], 8, "train")
    tokens = models[0].encode(to_float(torch.stack([image for image, _ in images])))
    for out in (whole, halves):
        assert torch.equal(tokenizer.open_tokens(out)["tokens"][:len(images)], tokens)


def test_ctrl_c_ends_encoding_at_once(tmp_path, narrow, monkeypatch):
    folder, out = picture_folder(tmp_path / "pictures", 12), tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(tokenizer, "encode", lambda *_: signal.raise_signal(signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            make_tokens(folder, out, **SMALL)
    make_tokens(folder, out, resume=True, **SMALL)
    tokenizer.open_tokens(out)


@pytest.mark.parametrize("flags, message", [
    (["--size", "30"], "not divisible by --downsample 4: take --size 32"),
    (["--downsample", "3"], "(choose from 2, 4, 8, 16)"),
    (["--data", "no/such/folder"], "no/such/folder does not exist")])
def test_bad_flags_of_the_tokenizer_leave_out_alone(tmp_path, cli, flags, message):
    assert message in cli.refused("tokenizer", tmp_path / "out", *flags)


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
def test_every_cell_is_drawn_once_and_a_seed_repeats_it(order, guidance):
    (one, visited), (same, again), (other, _) = (
        sample.generate(painter(), ["sun", "sea sun"], order, guidance=guidance,
                        generator=dice(seed)) for seed in (1, 1, 2))
    assert torch.equal(one, same) and torch.equal(visited, again)
    assert not torch.equal(one, other) and is_permutation(visited)


def test_a_given_order_is_the_plain_loop_of_anyorder():
    order = random_order(4, 9, dice())
    tokens, visited = sample.generate(painter(), ["sun"] * 4, order, generator=dice())
    assert torch.equal(visited, order)
    assert torch.equal(tokens, anyorder.draw(painter(), ["sun"] * 4, order, dice()))


@pytest.mark.parametrize("score", SCORES)
def test_the_order_of_drawing_is_inferred_again_from_the_image(score):
    model, how = painter(), {"score": score, "distance": 0.2}
    # the choice ignores guidance
    for policy, guidance in ((None, 1), (None, 3), (tiny(3, 3, codebook=7, seed=9), 1)):
        tokens, order = sample.generate(model, ["sun"] * 4, policy=policy, guidance=guidance,
                                        **how)
        assert torch.equal(order, infer_orders(policy or model, tokens, ["sun"] * 4, **how))
    tokens, order = sample.generate(model, ["sun"] * 8, "learned")
    assert torch.equal(order, infer_orders(model, tokens, ["sun"] * 8, headed=True))


def test_another_model_chooses_where_and_never_what():
    model, policy = painter(), tiny(3, 3, codebook=7, seed=2)
    policy.to_token.weight.data.zero_()  # knows nothing: its argmax is token 0
    drawn, order = sample.generate(model, ["sun"] * 4, policy=policy, temperature=0)
    again, _ = sample.generate(model, ["sun"] * 4, order, temperature=0)
    assert torch.equal(drawn, again) and drawn.any()
    for order in set(ALL_ORDERS) - {"inferred"}:  # no other order asks the policy
        plain, other = (sample.generate(model, ["sun"], order, policy=p) for p in (None, policy))
        assert all(map(torch.equal, plain, other)), order


@pytest.mark.parametrize("order", ALL_ORDERS)
@pytest.mark.parametrize("steps", (0, 3))
def test_given_cells_come_first_and_are_never_overwritten(order, steps):
    given = torch.randint(7, (4, 9))
    keep = torch.tensor([1, 0, 0, 1, 0, 1, 0, 0, 1]).bool()
    tokens, visited = sample.generate(painter(), ["sun"] * 4, order, given=given, keep=keep,
                                      steps=steps)
    assert torch.equal(tokens[:, keep], given[:, keep])
    assert keep[visited[:, :4]].all() and not keep[visited[:, 4:]].any()


def test_a_raster_only_model_gets_what_is_given_in_its_turn():
    model, given, keep = tiny(3, 3, codebook=7), torch.randint(7, (4, 9)), torch.arange(9) % 4 == 1
    model.about = {"order": "raster"}
    tokens, order = sample.generate(model, ["sun"] * 4, "raster", given=given, keep=keep)
    assert torch.equal(order, raster_order(4, 9))
    assert torch.equal(tokens[:, keep], given[:, keep])


@pytest.mark.parametrize("order", ALL_ORDERS)
def test_a_step_is_one_look_and_nine_steps_one_cell_each(order):
    model, looks, watch = painter(), [], []
    with model.to_token.register_forward_hook(lambda *_: looks.append(1)):
        _, visited = sample.generate(model, [""] * 6, order, steps=3, watch=watch)
    assert len(looks) == 3 and is_permutation(visited)
    free = [9, 6, 3] if order in ("inferred", "learned") else []
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
    drawn, _ = sample.generate(model, ["sun"] * 40, "raster", temperature=0)
    assert (drawn == log_p.argmax()).all()


@pytest.mark.parametrize("strength", (0.0, 1.0, 2.5))
def test_guidance_moves_logits_away_from_those_without_caption(strength):
    model = painter()
    words = model.read(["sun", "sea"])
    told, plain = Drawing(model, words), Drawing(model, 0 * words)
    guided = sample.Guided(model, words, strength)
    for cells in (torch.tensor([[0, 4, 8], [1, 2, 3]]), torch.tensor([[5], [6]])):
        a, b, both = (drawing.look(cells) for drawing in (told, plain, guided))
        torch.testing.assert_close(both, b + strength * (a - b))
        for drawing in (told, plain, guided):
            drawing.place(torch.zeros(2, 1).long(), torch.tensor([[1], [2]]))
    torch.testing.assert_close(guided.next_location(), told.next_location())


def test_class_order_is_that_of_the_caption_or_of_all_captions():
    model = painter()
    rank = model.about["caption_rank"]["sun"]
    _, order = sample.generate(model, ["sun", "sea"], "class")
    assert torch.equal(order, torch.stack((rank.argsort(), (-rank).argsort())))


def test_orders_that_a_model_does_not_know_are_refused():
    plain, raster = tiny(), tiny()
    plain.about, raster.about = {"order": "random"}, {"order": "raster"}
    for model, known in ((painter(), sample.ORDERS), (raster, ("raster",)),
                         (plain, (*anyorder.FIXED_ORDERS, "inferred"))):
        assert sample.known_orders(model) == [*known]
        for order in {*sample.ORDERS, "zigzag"} - {*known}:
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


def pixels(path):
    return torch.from_numpy(np.array(Image.open(path).convert("RGB"))).permute(2, 0, 1)


def images_in(folder):
    return torch.stack([pixels(path) for path in sorted(Path(folder).glob("*.png"))])


@pytest.fixture
def paint(chain, tmp_path, monkeypatch, cli):
    """paint(*flags) runs sample.py in a copy of the chain's folder: (what it printed, folder)."""
    out = tmp_path / "out"
    shutil.copytree(chain[1], out)
    monkeypatch.setattr(sample, "film", lambda *_: None)  # slow

    def run(*flags, expect=0):
        code, text = cli("sample", "--out", out, "--n", 2, *flags)
        assert code == expect, text
        return text, out
    return run


@pytest.mark.parametrize("shape, grid", (((8, 8), (4, 4)), ((7, 13), (3, 3)), ((9, 1), (3, 1))))
def test_windows_cover_a_canvas_from_its_middle_outwards(shape, grid):
    assert sample.windows((2, 4), (2, 2)) == [(0, 1), (0, 0), (0, 2)]
    corners, seen = sample.windows(shape, grid), torch.zeros(shape)
    for top, left in corners:
        part = seen[top:top + grid[0], left:left + grid[1]]
        assert part.shape == grid
        part += 1
    assert seen.all() and len(set(corners)) == len(corners)


@pytest.mark.parametrize("order, scored", (("raster", 0), ("inferred", 9), ("learned", 9)))
def test_an_empty_canvas_of_the_grids_size_is_plain_sampling(order, scored):
    nothing = torch.randint(7, (2, 9)), torch.zeros(3, 3).bool()
    how = dict(order=order, guidance=2.0)
    tokens, rank, scores = sample.complete(painter(), ["sun", ""], *nothing, dice(), **how)
    plain, visited = sample.generate(painter(), ["sun", ""], generator=dice(), **how)
    assert torch.equal(tokens, plain) and torch.equal(rank, rank_of(visited))
    assert len(scores) == scored


@pytest.mark.parametrize("shape, steps", (((6, 6), 0), ((3, 8), 0), ((5, 4), 4)))
def test_a_larger_canvas_is_drawn_once_around_what_is_known(shape, steps):
    known = torch.rand(shape, generator=dice(1)) < 0.3
    tokens = torch.randint(7, (2, known.numel()))
    found, rank, scores = sample.complete(painter(), ["sun", ""], tokens, known, dice(),
                                          steps=steps)
    known = known.flatten()
    assert torch.equal(found[:, known], tokens[:, known]) and (rank[:, known] == -1).all()
    assert torch.equal(rank[:, ~known].sort(1).values, raster_order(2, len(scores)))
    if not steps:  # the best is next
        for step, (cells, value) in enumerate(scores):
            best = cells.gather(1, value.argmax(1, keepdim=True))
            assert (rank.gather(1, best) == step).all()


def test_each_window_is_given_what_earlier_windows_drew():
    model, how = tiny(4, 4, 16), {"order": "raster", "temperature": 0}
    nothing, done = torch.zeros(1, 32).long(), torch.zeros(4, 8).bool()
    found, _, _ = sample.complete(model, [""], nothing, done, dice(), **how)
    for _, left in sample.windows((4, 8), (4, 4)):
        drawn = found.view(1, 4, 8)[..., left:left + 4].flatten(1)
        keep = done[:, left:left + 4].flatten()
        again, _ = sample.generate(model, [""], given=drawn, keep=keep, **how)
        assert torch.equal(again, drawn)
        done[:, left:left + 4] = True


def test_a_drawing_meets_the_kept_pixels_and_is_itself_far_away():
    # 20 levels too dark
    flat, drawn = torch.full((3, 8, 40), 120).byte(), torch.full((1, 3, 8, 40), 100 / 127.5 - 1)
    hidden = torch.arange(40).expand(8, 40) >= 20
    line = sample.compose(drawn, flat, hidden, 2.0).int()[0, 0, 4]
    assert (line[:20] == 120).all() and line[20] > 110 and line[-1] == 100
    assert (line[20:].diff() <= 0).all()
    assert (sample.compose(drawn, flat, hidden | True, 2.0) == 100).all()


@pytest.mark.parametrize("name, mask", (
    ("left", ["1100"] * 4),
    ("right", ["0011"] * 4),
    ("top", ["111", "000", "000"]),  # a middle row belongs to no half
    ("bottom", ["000", "000", "111"]),
    ("center", ["0000", "0110", "0110", "0000"]),
))
def test_masks_by_name_on_hand_worked_grids(name, mask):
    found = sample.named_mask(name, len(mask), len(mask), 0).int().tolist()
    assert found == [[int(cell) for cell in row] for row in mask]
    for share, cells in ((".2", 10), ("1", 49)):
        assert sample.named_mask("random:" + share, 7, 7, 0).sum() == cells


@pytest.mark.parametrize("width, height", ((45, 30), (9, 20)))
def test_no_hidden_pixel_reaches_a_kept_one_when_resized(tmp_path, capsys, width, height):
    whole = torch.randint(64, 192, (3, height, width), generator=dice()).byte()
    hidden = torch.linspace(0, 1, height)[:, None] + torch.linspace(0, 1, width) > 1.1
    picture, white = str(tmp_path / "picture.png"), str(tmp_path / "mask.png")
    Image.fromarray(hidden.numpy()).save(white)

    def read(pixels, mask=white):
        sheet([pixels], 1, gap=0).save(picture)
        return sample.read_masked(picture, mask, 16)
    one, mask = read(whole)
    two, _ = read(torch.where(hidden, 255 - whole, whole))
    assert mask.any() and torch.equal(one[:, ~mask], two[:, ~mask])
    # a sky of one colour keeps it up to the edge
    sky = read(torch.where(hidden, whole, 200))[0][:, ~mask]
    assert sky.numel() and (sky == 200).all()
    # without a mask it is resized as always
    plain, _ = read(whole, "")
    assert (plain.int() - data.read_image(picture, 16).int()).abs().max() <= 1  # rounding
    assert f"warning: {picture} is {width}x{height}" in capsys.readouterr().out


# -------------------------------------------------------------------------------------------------
# From the command line


def test_the_folder_of_images_is_a_data_set(paint, tmp_path):
    words, captions = tmp_path / "words.txt", ["low, sun", 'red "sun"', ""]
    words.write_bytes('\ufefflow, sun\r\n\n red\t"sun" \n'.encode())
    # the second run has fewer
    for n, asked, drawn in ((3, (words, ""), captions), (1, ("red",), ["red"])):
        _, out = paint("--n", n, "--caption", *asked)
        folder = out / "samples"
        (folder / "mine.txt").write_text("I stay")
        found = data.Folder(str(folder), 16, "train").all_captions
        assert list(found.values()) == [text for text in drawn for _ in range(n)]
    assert sorted(os.listdir(folder)) == ["00000.png", "metadata.csv", "mine.txt"]


def test_a_sheet_shows_64_images_at_most(paint, monkeypatch):
    shown, few = [], ("--order", "random", "--steps", 2, "--caption", "red")
    monkeypatch.setattr(sample, "show", lambda *about: shown.append(about))
    text, out = paint("--n", 70, *few)
    images = images_in(out / "samples")
    assert len(images) == 70 and "all 70 images" in text
    assert len(shown[0][3]) == len(shown[0][5]) == 64
    paint("--n", 40, *few)  # the first batch is the same
    assert torch.equal(images_in(out / "samples")[:32], images[:32])
    paint("--n", 40, *few, "--seed", 1)
    assert not torch.equal(images_in(out / "samples")[:32], images[:32])


def test_ctrl_c_keeps_the_images_that_are_written(paint, monkeypatch):
    true = sample.complete

    def second_batch(*args, **how):
        if len(args[1]) < 32:
            raise KeyboardInterrupt
        return true(*args, **how)
    monkeypatch.setattr(sample, "complete", second_batch)
    _, out = paint("--n", 33, "--steps", 2, expect=130)
    assert len(images_in(out / "samples")) == 32


@pytest.mark.parametrize("mask", ("right", "mask.png"))
def test_completing_keeps_what_is_seen_and_never_reads_what_is_hidden(
        mask, paint, chain, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    odd = torch.zeros(3, 16, 16).byte()
    odd[:, 3:10, 5:6] = 255  # not along the cells
    sheet([odd], 1, gap=0).save("mask.png")
    hidden = torch.arange(16).expand(16, 16) >= 8 if mask == "right" else odd[0] > 0
    image = pixels(chain[0] / "000.png")
    drawn = []
    for under in (image, 255 - image):
        sheet([torch.where(hidden, under, image)], 1, gap=0).save("image.png")
        _, out = paint("--complete", "image.png", "--mask", mask, "--order", "random")
        drawn.append(images_in(out / "completed"))
    assert torch.equal(drawn[0][:, :, ~hidden], image[:, ~hidden].expand(2, -1, -1))
    assert torch.equal(*drawn) and not torch.equal(*drawn[0])  # two different completions


@pytest.mark.parametrize("mask, shape, top, left", (
    ("2x2", (32, 32), 8, 8), ("1x3", (48, 16), 16, 0)))
def test_an_extended_canvas_holds_the_image_untouched(paint, chain, mask, shape, top, left):
    path = chain[0] / "000.png"
    _, out = paint("--complete", path, "--mask", mask, "--n", 1, "--steps", 4)
    drawn = images_in(out / "extended")
    assert drawn.shape == (1, 3, *shape)
    assert torch.equal(drawn[0, :, top:top + 16, left:left + 16], pixels(path))


def test_in_the_film_the_brightest_cell_is_next():
    images, rank = torch.zeros(1, 3, 16, 16).byte(), torch.tensor([[[-1, 1], [0, 2]]])
    scores = [(torch.tensor([[1, 2, 3]]), torch.tensor([[-2.0, -1.0, -3.0]]))]
    first = sample.thinking(images, rank, scores, 0, 4)[0].int()  # [3, 64, 64]
    assert (first[:, :32, :32] == 0).all()  # what is given shows the image
    given, second, best, worst = first[:, 16::32, 16::32].sum(0).flatten().tolist()
    assert best > second > worst > given
    assert (sample.thinking(images, rank, scores, 3, 4) == 0).all()  # all drawn


def test_a_label_in_any_script_has_its_images_number(tmp_path):
    pages = []
    for label in ("00000 日本 😀", "00002 日本 😀"):
        sample.page(tmp_path / "a.png", torch.zeros(1, 3, 32, 32).byte(), [label], 1, 1)
        pages.append(pixels(tmp_path / "a.png"))
    assert not torch.equal(*pages)


def test_in_frozen_order_the_any_order_model_chooses(chain, monkeypatch):
    flags = ("--out", str(chain[1]), "--order", "frozen")
    monkeypatch.setattr(sys, "argv", ["sample.py", *flags])
    args = sample.parse()
    path, model, _ = sample.open_files(args, torch.device("cpu"))
    name, how = sample.settings(args, path, model)
    assert (name, how["order"], Path(path).name) == ("frozen", "inferred", "ordered.pt")
    teacher = load_model(chain[1] / "anyorder.pt").state_dict()
    assert data.fingerprint(how["policy"].state_dict()) == data.fingerprint(teacher)


def test_a_long_caption_is_drawn_with_a_warning(paint):
    text, _ = paint("--caption", "low red sun " * 4, "--n", 1)
    assert "warning: " in text and "12 words" in text


@pytest.mark.parametrize("flags, needle", (
    ("--mask left", "--complete"),
    ("--complete no.png --mask left", "no.png"),
    ("--complete image.png --mask small.png", "8x8"),
    ("--complete image.png --mask 9x1", "3x1"),
    ("--caption no.txt", "no.txt"),
    ("--caption zebra", "zebra"),
    ("--model out/raster.pt --order frozen", "not finetuned"),
    ("--model raster.pt", "anyorder.py --order raster"),
))
def test_what_sample_cannot_do_is_one_line(flags, needle, chain, cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(chain[1], "out")
    shutil.copy(chain[0] / "000.png", "image.png")
    Image.new("L", (8, 8)).save("small.png")
    assert needle in cli.refused("sample", "out", *flags.split())


def test_an_unwritable_folder_is_noticed_before_drawing(paint, tmp_path, monkeypatch):
    shutil.rmtree(tmp_path / "out" / "samples")
    (tmp_path / "out" / "samples").write_text("a file is in the way")
    monkeypatch.setattr(sample, "complete", lambda *_, **how: pytest.fail("it has drawn"))
    assert "cannot be written to" in paint(expect=2)[0]


# -------------------------------------------------------------------------------------------------
# evaluate.py: distances


def distance(a, b, chunk=8192):
    return evaluate.frechet(evaluate.moments(a, chunk), evaluate.moments(b, chunk))


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


# also with fewer images than features
@pytest.mark.parametrize("n, m, f", ((300, 200, 8), (20, 300, 32), (12, 9, 40)))
def test_frechet_agrees_with_matrix_square_roots(n, m, f):
    a, b = features_like(n, f, 1), features_like(m, f, 2) * 1.3
    expected = pytest.approx(frechet_by_definition(a, b), rel=1e-5)
    assert distance(a, b) == expected
    assert distance(a, b, chunk=9) == expected


def test_frechet_of_a_shift_is_its_square():
    a = features_like(50, 16, 3)
    assert distance(a, a[torch.randperm(50)]) < 1e-9
    assert distance(a, a.double() + 2) == pytest.approx(16 * 4, rel=1e-9)


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

    def share(points, centres):
        points, centres = points.tolist(), centres.tolist()
        # number 0 is the centre itself
        radius = [sorted(math.dist(c, x) for x in centres)[3] for c in centres]
        inside = [any(math.dist(p, c) <= r for c, r in zip(centres, radius)) for p in points]
        return sum(inside) / len(points)

    found = evaluate.precision_recall(real, drawn, k=3, block=5)
    assert found == (pytest.approx(share(drawn, real)), pytest.approx(share(real, drawn)))
    assert 0 < found[0] < 1 and 0 < found[1] < 1 and found[0] != found[1]


class OnDevice(torch.Tensor):
    """A tensor that claims to be on Apple's GPU, where float64 does not exist."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        asked = [*args[1:], *(kwargs or {}).values()]
        if func is torch.Tensor.double or any(x is torch.float64 for x in asked):
            raise TypeError("the MPS framework doesn't support float64")
        out = super().__torch_function__(func, types, args, kwargs)
        return out.as_subclass(torch.Tensor) if func is torch.Tensor.cpu else out


def test_no_measure_asks_a_device_for_float64():
    a, b = (features_like(20, 6, seed).as_subclass(OnDevice) for seed in (1, 2))
    order = random_order(5, 9).as_subclass(OnDevice)
    distance(a, b)
    evaluate.kernel_distance(a, b)
    evaluate.precision_recall(a, b)
    evaluate.step_length(order, 3)
    evaluate.touching(order, 3, 3)
    evaluate.drawn_before(order, torch.randint(6, (5, 6, 6)), "sun", "sky", 3, 3)
    rank_correlation(order, order)
    with pytest.raises(TypeError, match="float64"):
        a.double()


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
    assert evaluate.lpips(y, y, net).tolist() == [0]


def means(images: torch.Tensor, return_features: bool):
    """The interface of the Inception file: uint8 images to 2,048 features, here all means."""
    return images.float().mean(dim=[1, 2, 3])[:, None].repeat(1, 2048)


@pytest.fixture(scope="session")
def weights(tmp_path_factory):
    """Files as people download them, with random weights, and two others."""
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    alexnet = evaluate.AlexNet().state_dict()
    linear = {name: torch.rand(shape) for name, shape in evaluate.LINEAR.items()}
    torch.save({**alexnet, "classifier.1.weight": torch.zeros(2)}, folder / "alexnet.pth")
    torch.save(linear, folder / "alex.pth")
    torch.save({**linear, "x": torch.zeros(1)}, folder / "more.pth")
    torch.save(dict(list(alexnet.items())[1:]), folder / "less.pth")
    torch.jit.script(means).save(str(folder / "inception.pt"))
    return folder


def test_weights_are_recognised_by_what_they_hold(weights):
    names = ("alex.pth", "inception.pt", "alexnet.pth")
    found = evaluate.load_weights([weights / name for name in names], 40)
    name, extract = found["inception"]
    sevens = torch.full((2, 3, 8, 8), 7, dtype=torch.uint8)
    assert name == "FID" and extract(sevens).tolist() == [[7.0] * 2048] * 2
    x, y = torch.rand(2, 3, 3, 40, 40) * 2 - 1
    assert (evaluate.lpips(x, y, found["lpips"][1]) > 0).all()


@pytest.mark.parametrize("names, size, message", (
    (["more.pth"], 40, "expected inception"),
    (["less.pth"], 40, "expected inception"),
    (["alexnet.pth"], 40, "takes two files"),
    (["alexnet.pth", "alex.pth"], 16, "31 pixels")))
def test_other_weights_are_refused(weights, names, size, message):
    with pytest.raises(UserError, match=message):
        evaluate.load_weights([weights / name for name in names], size)


# evaluate.py: the judge


class Shades:
    """Rendered sunsets with given captions; it knows which were decoded."""
    fingerprint = "shades"

    def __init__(self, captions, size=8):
        self.captions, self.size, self.reads = captions, size, []

    def __len__(self):
        return len(self.captions)

    def __getitem__(self, i):
        self.reads.append(i)
        return data.render_sunset(i, self.size)[0], self.captions[i]


@pytest.mark.parametrize("captions, task", (
    (20 * ["a", "b"], "captions"), (20 * ["a"], "rotations"),
    (20 * ["a", "b"] + ["c"], "rotations")))
def test_the_judge_is_repeatable_and_decodes_an_image_once(monkeypatch, captions, task):
    monkeypatch.setitem(evaluate.JUDGE, "steps", 2)
    train = Shades(captions)
    a, b = (evaluate.train_judge(train, seed=3) for _ in range(2))
    assert a.config["task"] == task
    assert data.fingerprint(a.state_dict()) == data.fingerprint(b.state_dict())
    # 2 steps of 64 images; number 0 is also looked at for its size
    assert len(train.reads) <= 2 * (len(captions) + 1)


def test_the_judge_is_valid_on_sunsets(monkeypatch):
    monkeypatch.setitem(evaluate.JUDGE, "steps", 100)
    monkeypatch.setitem(evaluate.JUDGE, "width", 16)
    train = Shades(list(data.open_data("sunsets", 16).captions[:900]), 16)
    judge = evaluate.train_judge(train, seed=3)
    images = torch.stack([data.render_sunset(45_000 + i, 16)[0] for i in range(1000)])
    report = evaluate.validate_judge(lambda x: judge.features(to_float(x)), images)
    for damage in ("noise", "blur", "shuffle"):
        assert report["real"] < report[damage][0] < report[damage][1] < report[damage][2]
    # mean colours see no shuffling
    assert not evaluate.validate_judge(lambda x: to_float(x).mean((2, 3)), images[:200])["ok"]


def test_a_judge_is_used_again_only_for_the_same_recipe(tmp_path, monkeypatch):
    monkeypatch.setitem(evaluate.JUDGE, "steps", 2)
    trained = calls_of(monkeypatch, evaluate, "train_judge")
    shades = Shades(["a", "b"] * 20)
    changes = (
        lambda: None,
        lambda: setattr(shades, "fingerprint", "others"),
        lambda: monkeypatch.setitem(evaluate.JUDGE, "each", 19),
        lambda: monkeypatch.setattr(evaluate.inspect, "getsource", str),
        lambda: (tmp_path / "judge.pt").write_bytes(b"PK"))
    for count, change in enumerate(changes, 1):
        change()
        a, b = (evaluate.open_judge(tmp_path, shades).state_dict() for _ in range(2))
        assert len(trained) == count and data.fingerprint(a) == data.fingerprint(b)
    evaluate.open_judge(tmp_path, shades, seed=7)
    assert len(trained) == count + 1


def test_damage_is_what_it_says():
    chance = torch.Generator().manual_seed(0)
    places = torch.arange(16)
    patches = places.to(torch.uint8).view(1, 1, 4, 4).expand(2, 3, 4, 4)
    images = patches.repeat_interleave(4, 2).repeat_interleave(4, 3)
    for share in (0.25, 1.0):
        worse = evaluate.corrupted(images, "shuffle", share, chance)
        for image in worse[:, 0].unfold(1, 4, 4).unfold(2, 4, 4).reshape(2, 16, 16).int():
            assert (image == image[:, :1]).all()  # whole patches
            assert image[:, 0].sort().values.tolist() == places.tolist()
            assert (image[:, 0] != places).sum() == 16 * share
    grey = torch.full((2, 3, 64, 64), 128, dtype=torch.uint8)
    assert torch.equal(evaluate.corrupted(grey, "blur", 2, chance), grey)
    noisy = to_float(evaluate.corrupted(grey, "noise", 0.3, chance))
    assert noisy.std().item() == pytest.approx(0.3, rel=0.03)


# evaluate.py: what an order does


def test_the_mixture_over_all_orders_is_a_distribution_and_few_orders_are_a_bound():
    """All 81 images of a 2x2 grid in all 24 orders: their probabilities sum to one. K orders give
    a bound, on average over all choices of K; it falls with K and reaches the exact figure."""
    model = tiny()
    images = torch.tensor(list(itertools.product(range(3), repeat=4)))  # [81, 4]
    orders = torch.tensor(list(itertools.permutations(range(4))))  # [24, 4]
    log_p = torch.stack([model.log_probs(images, ["sun"] * 81, order.expand(81, 4)).double().sum(1)
                         for order in orders])  # [24, 81]
    exact = evaluate.mixture_nats(log_p)
    assert exact.neg().exp().sum().item() == pytest.approx(1, abs=1e-5)
    means = [-log_p.mean(0)]
    for K in (2, 3):
        some = [evaluate.mixture_nats(log_p[list(rows)])
                for rows in itertools.combinations(range(24), K)]
        means.append(torch.stack(some).mean(0))
    means.append(exact)
    for looser, tighter in zip(means, means[1:]):
        assert (looser > tighter).all()
    assert (means[0] - exact).mean() > 0.01


def test_step_length_and_touching_on_hand_worked_grids():
    raster = raster_order(2, 9)
    assert evaluate.step_length(raster, 3) == pytest.approx((6 + 2 * 5 ** 0.5) / 8)
    assert evaluate.touching(rank_of(raster), 3, 3) == 1
    # corners 0 2 8 6, then 5 7 1 3 4
    rank = torch.tensor([[0, 6, 1, 7, 8, 4, 2, 5, 3]])
    steps = (2, 8 ** 0.5, 2, 1, 2 ** 0.5, 2, 2 ** 0.5, 1)
    assert evaluate.step_length(rank_of(rank), 3) == pytest.approx(sum(steps) / 8)
    assert evaluate.touching(rank, 3, 3) == 5 / 8
    assert evaluate.touching(torch.tensor([[3, 0, 2, 1]]), 2, 2) == 1  # diagonals count


def test_what_is_drawn_before_what():
    sun, cloud = (data.SUNSET_LABELS.index(name) for name in ("sun", "cloud"))
    labels = torch.zeros(2, 4, 4, dtype=torch.uint8)
    labels[:, :2, :2], labels[0, 2:, 2:] = sun, cloud  # only the first image has a cloud

    def before(rank, labels):
        rank = torch.tensor([rank]).expand(len(labels), 4)
        return evaluate.drawn_before(rank, labels, "sun", "cloud", 2, 2)

    assert before([0, 1, 2, 3], labels) == 1 and before([3, 1, 2, 0], labels) == 0
    assert before([0, 1, 2, 3], labels[1:]) is None


# evaluate.py: speed


def test_the_obvious_way_computes_the_same():
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
    assert [(row["rate"], row["times"]) for row in rows] == [(8, 1), (4, 0.5), (0.2, 0.025)]
    assert "".join(calls) == "abc" + "cbaabc" * 2  # five rounds at least


def test_the_speed_table_leaves_everything_in_place(monkeypatch, cli, tmp_path):
    small = {"attention": [(2, 1, 5, 32)], "candidates": (2, 1, 3, 4, 8), "side": 2,
             "width": 32, "layers": 1, "train": 2, "infer": 2}
    monkeypatch.setattr(evaluate, "SIZES", {"cpu": small})
    monkeypatch.setattr(evaluate, "SECONDS", 0)
    ours = anyorder.fused_attention
    library = calls_of(monkeypatch, evaluate, "library_attention")
    cli.ok("evaluate", "--speed", "--out", tmp_path)
    assert anyorder.fused_attention is ours
    assert len(library) > 5  # five times by itself, then in a model
    *rows, memory = json.loads((tmp_path / "speed.json").read_text())["rows"]
    assert rows and all(row["rate"] > 0 for row in rows)
    assert memory["unit"] == "MB" and memory["times"] < 0.1  # a count: on every machine


# evaluate.py: the command


@pytest.fixture(scope="session")
def evaluated(tmp_path_factory):
    """A folder with an untrained tokenizer and models of sunsets of 8x8 pixels, 2x2 cells."""
    out = tmp_path_factory.mktemp("evaluated")
    torch.manual_seed(0)
    tokenizer = Tokenizer({"size": 8, "downsample": 4, "codebook": 16, "width": 8, "fine": 8,
                           "dim": 4}).eval()
    made_from = {"data": open_data("sunsets", 8).fingerprint}
    data.save(out / "tokenizer.pt", {
        "kind": "tokenizer", "version": data.VERSION, "config": tokenizer.config,
        "made_from": dict(made_from), "model": tokenizer.state_dict()})
    made_from["tokenizer"] = tokenizer.fingerprint
    about = {"step": 3, "tokens_seen": 96, "seconds": 1.5, "data": "sunsets",
             "captions": ["low red sun"], "made_from": made_from}
    teacher = tiny(codebook=16, seed=1)
    save_model(out / "raster.pt", tiny(codebook=16), order="raster", **about)
    save_model(out / "anyorder.pt", teacher, order="random", **about)
    rank = torch.tensor([3.0, 0, 1, 2])
    made_from["model"] = data.fingerprint(teacher.state_dict())
    save_model(out / "ordered.pt", tiny(codebook=16, order_head=True), order="inferred",
               caption_rank={"low red sun": rank}, mean_rank=rank.flip(0), **about)
    return out


@pytest.fixture
def evaluation(evaluated, cli, monkeypatch):
    """evaluation("--n", 5) runs evaluate.py on that folder and returns results.json."""
    monkeypatch.setattr(evaluate, "HELD_OUT", 30)

    def run(*flags):
        cli.ok("evaluate", "--out", evaluated, *flags)
        return json.loads((evaluated / "results.json").read_text())
    return run


def test_the_rows_of_all_models(evaluated, evaluation, monkeypatch):
    monkeypatch.setattr(evaluate, "BATCH", 4)
    names = "raster.pt", "anyorder.pt", "ordered.pt", "ordered.pt:frozen"
    models = [evaluated / name for name in names]
    report, again = (evaluation("--n", 10, "--models", *models) for _ in range(2))
    rows = {row["name"]: row for row in report["rows"]}
    # drawing costs 4 cells, or 4 + 3 + 2 + 1 candidates (of another model: and 4 cells)
    assert {name: row["evaluations"] for name, row in rows.items()} == {
        "raster:raster": 4, "anyorder:raster": 4, "anyorder:random": 4, "anyorder:inferred": 10,
        "ordered:learned": 4, "ordered:inferred": 10, "ordered:class": 4,
        "ordered:frozen": 14}
    # random orders give a bound, and it is called one; it has a column for single orders
    assert [name for name, row in rows.items() if row["nats_are"] == "bound"] == ["anyorder:random"]
    assert [name for name, row in rows.items() if "nats_single" in row] == ["anyorder:random"]
    row = rows["anyorder:random"]
    assert row["nats"] < row["nats_single"] - 0.01
    one = evaluation("--n", 10, "--orders", 1, "--models", evaluated / "anyorder.pt:random")["rows"]
    assert one[0]["nats"] == pytest.approx(one[0]["nats_single"])
    assert one[0]["nats"] > row["nats"]
    assert report["held_out"] == 30 and report["distance"] == "Frechet (judge)"
    assert Image.open(evaluated / "compare.png").width > 500
    # one seed, one table; only the speed differs
    for row in report["rows"] + again["rows"]:
        assert row.pop("images_per_second") > 0
    assert report == again


def test_a_row_agrees_with_its_definitions(evaluated, evaluation, monkeypatch):
    """A model that draws the first 12 of 30 held-out images as the tokenizer keeps them."""
    held_out, read = [], evaluate.read_held_out

    def reads(test, bench):
        bench.features = lambda images: to_float(images).flatten(1)[:, :6]
        read(test, bench)
        held_out[:] = test, bench

    def draws(model, captions, *rest, **how):
        tokens = held_out[1].tokens[:len(captions)]
        return tokens, raster_order(*tokens.shape)

    monkeypatch.setattr(evaluate, "read_held_out", reads)
    monkeypatch.setattr(evaluate, "generate", draws)
    path = evaluated / "anyorder.pt"
    row, = evaluation("--n", 12, "--models", f"{path}:raster")["rows"]
    test, bench = held_out
    pick = torch.randperm(5000, generator=torch.Generator().manual_seed(0))[:30].tolist()
    images = torch.stack([test[i][0] for i in pick])
    assert test.split == "test" and torch.equal(bench.images, images)

    tokens, captions = bench.tokenizer.encode(to_float(images)), bench.captions[:12]
    log_p = load_model(path).log_probs(tokens[:12], captions, raster_order(12, 4))
    nats = -log_p.double().sum(1) / 4
    assert row["nats"] == pytest.approx(nats.mean().item(), rel=1e-6)
    assert row["nats_error"] == pytest.approx(nats.std().item() / 12 ** 0.5, rel=1e-6)

    recon = to_uint8(bench.tokenizer.decode(tokens))
    guess = bench.judge(to_float(recon[:12])).argmax(1).tolist()
    named = [bench.judge.config["classes"][k] for k in guess]
    assert row["class_seen"] == sum(map(str.__eq__, named, captions)) / 12
    drawn, recon, real = map(bench.features, (recon[:12], recon, images))
    assert row["frechet"] == pytest.approx(distance(drawn, real), rel=1e-6)
    assert row["recon"] == pytest.approx(distance(drawn, recon), rel=1e-6)
    assert row["precision"] != row["recall"]
    assert (row["precision"], row["recall"]) == evaluate.precision_recall(real, drawn)


def test_completions_are_judged_where_they_were_drawn(evaluated, evaluation, weights, monkeypatch):
    compared = calls_of(monkeypatch, evaluate, "lpips")
    models = [evaluated / name for name in ("anyorder.pt:random", "ordered.pt:learned@2")]
    read = calls_of(monkeypatch, evaluate, "moments")
    report = evaluation("--n", 6, "--models", *models, "--weights", weights / "inception.pt")
    # the judge stands in for LPIPS only
    assert {features.shape[1] for (features,), _ in read} == {2048}
    assert [report[key] for key in ("distance", "lpips", "judge")] == ["FID", "LPIPS-judge", None]
    row, several = report["rows"]
    halves = torch.zeros(4, 8, 8, dtype=torch.bool)  # bottom, top, left, right
    halves[0, 4:] = halves[1, :4] = halves[2, :, :4] = halves[3, :, 4:] = True
    for differs, ((drawn, truth, _), _) in zip(halves, compared):
        same = drawn == truth
        assert same[:, :, ~differs].all() and not same[:, :, differs].all()
    far = [found.mean().item() for _, found in compared]
    assert len(far) == 8 and row["lpips_lower"] == pytest.approx(far[0])
    assert row["lpips"] == pytest.approx(sum(far[:4]) / 4)
    # nats and orders are those of one cell at a time
    assert row["nats"] > 0 and not {"nats", "step", "versus"} & several.keys()


def test_several_sets_tell_what_chance_does(evaluated, evaluation, monkeypatch):
    monkeypatch.setattr(evaluate, "BATCH", 5)
    drawn, log_probs = calls_of(monkeypatch, evaluate, "generate"), AnyOrder.log_probs
    # as on Apple's GPU
    monkeypatch.setattr(AnyOrder, "log_probs",
                        lambda self, *inputs: log_probs(self, *inputs).as_subclass(OnDevice))
    flags = "--n", 10, "--models", evaluated / "anyorder.pt:random"
    two, one = (evaluation(*flags, "--draws", draws)["rows"][0] for draws in (2, 1))
    for key in ("frechet", "recon"):  # a = mean +- |a - b| / 2
        assert key + "_spread" not in one and two[key + "_spread"] > 0
        expected = two[key + "_spread"] / 2 ** 0.5
        assert abs(one[key] - two[key]) == pytest.approx(expected, rel=1e-6)
    assert one["nats"] == two["nats"] and one["evaluations"] == two["evaluations"] == 4
    asked = [captions for (_, captions), _ in drawn]
    assert asked[:2] == asked[2:4] and asked[0] != asked[1]  # only the dice differ


def test_an_interrupt_keeps_the_rows_that_are_done(evaluated, evaluation, monkeypatch, cli):
    def interrupted(*shown):
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluate, "draw_comparison", interrupted)
    code, printed = cli("evaluate", "--out", evaluated, "--n", 5)
    assert code == 130 and "raster:raster" in printed
    report = json.loads((evaluated / "results.json").read_text())
    assert [row["name"] for row in report["rows"]] == ["raster:raster"]


@pytest.mark.parametrize("value, message", (
    ("{out}/ordered.pt:learned@0", "drawing takes 1 to"),
    ("{out}/raster.pt:random", "raster order only"),
    ("{out}/anyorder.pt:learned", "order head"),
    ("{out}/raster.pt:frozen", "not finetuned"),
    ("{tmp}/foreign.pt", "another tokenizer"),
    ("{tmp}/elsewhere.pt", "not the data")))
def test_models_that_do_not_fit_get_one_line(evaluated, cli, tmp_path, value, message):
    file = data.load(evaluated / "raster.pt", "model", "")
    for name, other in (("foreign", "tokenizer"), ("elsewhere", "data")):
        made_from = {**file["made_from"], other: "another"}
        data.save(tmp_path / f"{name}.pt", {**file, "made_from": made_from})
    model = value.format(out=evaluated, tmp=tmp_path)
    assert message in cli.refused("evaluate", evaluated, "--models", model)


# -------------------------------------------------------------------------------------------------
# Stop and go on


def same(a, b):
    a, b = tensors_of(a), tensors_of(b)
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.fixture
def few_at_once(monkeypatch):
    """Order inference in several batches, so that one can be stopped between them."""
    monkeypatch.setattr(order_infer, "images_at_once", lambda model: 8)


@pytest.mark.parametrize("stage", STAGES)
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(stage, chain, tmp_path,
                                                               few_at_once, cli):
    whole, parts = (start_of(stage, chain, tmp_path / name) for name in ("whole", "parts"))
    cli.ok(stage, "--out", whole, *flags_of(stage, chain))
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    line = stage, "--out", parts, *flags_of(stage, chain)
    with control_c(13 if stage == "tokenizer" else 4):
        code, printed = cli(*line)
    assert code == 130 and "the same command with --resume goes on" in printed
    assert not (parts / RESULT[stage]).exists()
    cli.ok(*line, "--resume")
    assert same(whole / RESULT[stage], parts / RESULT[stage])
    assert not list(parts.glob("*_resume*"))


@pytest.mark.parametrize("stage", ("anyorder", "order_infer", "finetune"))
def test_only_a_finished_result_replaces_a_finished_one(stage, chain, tmp_path, monkeypatch,
                                                        few_at_once, cli):
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

    def about():
        return load_model(out / "anyorder.pt").about
    with control_c(3):
        assert cli(*line)[0] == 130
    error = cli.refused("anyorder", out, *line[3:], "--lr", 0.1, "--resume")
    assert "another lr" in error
    printed = cli.ok(*line, "--steps", 8, "--resume")   # an unfinished run
    assert f"going on from {out / 'anyorder_resume.pt'}" in printed
    assert made() == list(range(8))
    first = about()
    error = cli.refused("anyorder", out, *line[3:], "--steps", 8, "--resume")
    assert "more --steps" in error
    with monkeypatch.context() as patch:                # a finished one, which gets worse
        patch.setattr(anyorder, "held_out_loss", lambda *rest: (99.0, None))
        cli.ok(*line, "--steps", 12, "--resume")
    assert made()[8:] == list(range(first["step"], 12))
    assert about()["held_out"] == first["held_out"]
    cli.ok(*line, "--steps", 40, "--resume")
    assert about()["held_out"] < first["held_out"]


@pytest.mark.parametrize("spoil", (lambda x: x * math.nan, lambda x: x + (x * 0).sqrt()),
                         ids=("loss", "gradient"))
@pytest.mark.parametrize("stage", ("tokenizer", "anyorder", "finetune"))
def test_a_loss_or_gradient_not_finite_keeps_the_last_good_model(stage, spoil, chain, tmp_path,
                                                                 monkeypatch, cli):
    """The fourth step goes wrong. The second way's loss is finite, its derivative is not."""
    module, out = importlib.import_module(stage), start_of(stage, chain, tmp_path / "out")
    update = module.update

    def spoilt(loss, *rest):
        return update(spoil(loss) if rest[-1] == 3 else loss, *rest)
    monkeypatch.setattr(module, "update", spoilt)
    monkeypatch.setattr(data, "SAVE_EVERY", -1)
    code, printed = cli(stage, "--out", out, *flags_of(stage, chain))
    assert code == 2 and "nan" in printed and "at step 3" in printed
    left, = out.glob("*_resume.pt")
    assert torch.load(left, weights_only=True)["state"]["step"] == 3
    assert all(tensor.isfinite().all() for tensor in tensors_of(left).values())


@pytest.mark.parametrize("size, length", ((1e4, 1.0), (0.1, 0.2)))
def test_gradients_are_clipped_to_length_1(size, length):
    model = torch.nn.Linear(3, 1, bias=False)
    before = model.weight.clone()
    loss = size * model(torch.tensor([[0.0, 2.0, 0.0]])).sum()
    tokenizer.update(loss, model, [torch.optim.SGD(model.parameters())], 1.0, 0)
    assert (model.weight - before).norm().item() == pytest.approx(length, abs=1e-5)


def test_bfloat16_only_where_it_is_faster(monkeypatch):
    probe, clock = PROBE.__wrapped__, itertools.count()
    monkeypatch.setattr(data.time, "perf_counter", lambda: next(clock))
    assert probe(torch.device("cpu")) == torch.float32
    # always faster; and disturbed all but once
    for seconds in ([0, 9, 0, 1] * 8, [0, 9, 0, 99] * 7 + [0, 9, 0, 1]):
        clock = iter(seconds)
        assert probe(torch.device("cpu")) == torch.bfloat16


def test_a_full_disk_leaves_the_last_good_files(chain, tmp_path, monkeypatch, cli):
    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")
    out = shutil.copytree(chain[1], tmp_path / "out")
    monkeypatch.setattr(data.os, "fsync", full)
    for stage in ("anyorder", "order_infer", "finetune"):
        assert "No space left on device" in cli.refused(stage, out, *STAGES[stage])


READERS = {"tokenizer": "sample", "anyorder": "order_infer", "tokens": "finetune",
           "orders": "finetune", "ordered": "sample"}


@pytest.mark.parametrize("name", READERS)
def test_a_spoilt_file_gives_one_line_and_changes_nothing(name, chain, tmp_path, cli):
    """Empty, cut, with one bit turned, or of another kind."""
    out = shutil.copytree(chain[1], tmp_path / "out")
    path = out / f"{name}.pt"
    good = path.read_bytes()
    turned = good.replace(b"made_from", b"made_frol", 1)            # m and l differ in one bit
    other = "orders" if name == "tokens" else "tokens"
    of_another_kind = (out / f"{other}.pt").read_bytes()
    for raw in (b"", good[:len(good) // 2], good[:-1], turned, of_another_kind):
        path.write_bytes(raw)
        cli.refused(READERS[name], out)


# -------------------------------------------------------------------------------------------------
# More than one process


def test_torchrun_trains_no_tokenizer(tmp_path):
    """The others would wait for hours, or write the same files."""
    lines = [(script, "--out", tmp_path) for script in ("anyorder", "tokenizer")]
    done = in_processes(lines, processes=2)
    # two processes write at once: a line of one may end in a line of the other
    errors = [text.splitlines()[0] for text in done.stderr.split("error: ")[1:]]
    for needle in ("first, by itself", "is for one process"):
        assert any("python tokenizer.py" in text and needle in text for text in errors), errors
    assert not [text for text in errors if "python tokenizer.py" not in text]
    assert done.stdout.count("left with 2") == 4 and not list(tmp_path.iterdir())


def nearly_same(a, b):
    """Equal up to the order of summation, in float32."""
    a, b = tensors_of(a), tensors_of(b)
    assert a.keys() == b.keys()
    for key in a:
        torch.testing.assert_close(a[key], b[key], rtol=1e-4, atol=1e-5)


def without_times(files):
    """The same files with what differs from run to run taken out."""
    results = json.loads(files["results.json"])
    del results["command"]
    for row in results["rows"]:
        assert row.pop("images_per_second") > 0
    # a row is written when its image is
    lines = sorted(files["samples/metadata.csv"].splitlines())
    return {**files, "results.json": results, "samples/metadata.csv": lines}


def test_two_processes_do_what_one_does(chain, tmp_path, monkeypatch, cli):
    """The later half of a training that one process began, order inference, finetuning; then
    samples and evaluation of the same models."""
    compute_in(monkeypatch, lambda device: torch.float32)
    small = ("import order_infer, sample\n"             # so that there is something to share
             "order_infer.images_at_once, sample.BATCH = lambda model: 9, 2")
    monkeypatch.setattr(order_infer, "images_at_once", lambda model: 9)
    monkeypatch.setattr(sample, "BATCH", 2)
    stages, lines = ("anyorder", "order_infer", "finetune"), {}
    for side in ("one", "two"):
        out = shutil.copytree(chain[1], tmp_path / side)
        rows = [f"{out}/{row}" for row in ("anyorder.pt:inferred", "ordered.pt:learned")]
        starts = [start_of(stage, chain, tmp_path / (side + stage)) for stage in stages]
        lines[side] = [(stage, "--out", start, *STAGES[stage])
                       for stage, start in zip(stages, starts)]
        lines[side] += [("sample", "--out", out, "--n", 5),
                        ("evaluate", "--out", out, "--n", 10, "--draws", 2, "--models", *rows)]
    for line in lines["one"]:
        cli.ok(*line)
    with control_c(3):
        assert cli(*lines["two"][0])[0] == 130
    lines["two"][0] += ("--resume",)
    done = in_processes(lines["two"], small, processes=2)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("next: python sample.py --out") == 1   # one process alone prints
    for stage in stages:
        nearly_same(*(tmp_path / (side + stage) / RESULT[stage] for side in lines))
    one, two = (without_times(files_of(tmp_path / side)) for side in lines)
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
    assert "RuntimeError" not in done.stderr
    after = files_of(two)
    # each report draws it anew
    after["anyorder.png"] = before["anyorder.png"]
    assert after == before


@slow
@pytest.mark.parametrize("stage", STAGES)
def test_killed_at_any_moment_and_resumed_equals_uninterrupted(stage, chain, tmp_path):
    """20 times, at a random moment of a run that saves after every step."""
    often = ("import order_infer\n"
             "order_infer.images_at_once = lambda model: 1\n"
             "data.SAVE_EVERY = -1\n")
    killer = ("begin = data.Checkpoint.__init__\n"
              "def deadly(*rest, **how):\n"
              "    signal.setitimer(signal.ITIMER_REAL, {})\n"
              "    begin(*rest, **how)\n"
              "data.Checkpoint.__init__ = deadly")
    whole, out = (start_of(stage, chain, tmp_path / name) for name in ("whole", "out"))
    steps = () if stage == "order_infer" else ("--steps", 100)
    flags = *flags_of(stage, chain), *steps
    assert in_processes([(stage, "--out", whole, *flags)], often).returncode == 0
    dice, kills, code = random.Random(0), 0, None
    while code != 0 or kills < 20:
        if code == 0:                                   # done: begin again
            shutil.rmtree(out)
            start_of(stage, chain, out)
        resume = ["--resume"] if list(out.glob("*_resume.pt")) else []
        prelude = often
        if kills < 20:
            prelude += killer.format(dice.uniform(0.01, 1))
        code = in_processes([(stage, "--out", out, *flags, *resume)], prelude).returncode
        assert code in (0, -signal.SIGALRM)
        kills += code != 0
        for file in out.glob("*.pt"):
            torch.load(file, weights_only=True)         # never half a file
        if code == 0:
            assert same(whole / RESULT[stage], out / RESULT[stage])
