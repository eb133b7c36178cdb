"""Small proofs of what the other files claim. `pytest -q test_all.py`: no network, no data files, no GPU, 6 minutes.

Everything is tiny (grids of 2x2 and 3x3, models of width 32, images that data.py renders), because what is true of
every size is easiest to check where all cases can be counted. `pytest -m slow` runs the long ones too.
"""

import ast
import contextlib
import ctypes
import errno
import functools
import gzip
import importlib
import itertools
import json
import math
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
import tempfile
import time
import warnings
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torch.utils.flop_counter import FlopCounterMode

import anyorder
import data
import evaluate
import finetune
import order_infer
import sample
import tokenizer
from anyorder import AnyOrder, Drawing, draw, load_model, random_order, rank_of, raster_order, save_model
from data import (SUNSET_LABELS, UserError, arguments, describe, fingerprint, held_out, load, open_data, pick_device,
                  printable, read_image, render_sunset, replacing, run, save, sheet, to_float, to_uint8, words_of)
from order_infer import SCORES, infer_orders, location_scores
from tokenizer import Tokenizer, batch_of, load_tokenizer, load_tokens, make_tokens, psnr, usage

HERE = Path(__file__).parent
SCRIPTS = ("data", "tokenizer", "anyorder", "order_infer", "finetune", "sample", "evaluate")
torch.set_num_threads(2)
warnings.filterwarnings("ignore", category=pytest.PytestUnknownMarkWarning)    # no settings file registers the mark


PROBED = functools.cache(tokenizer.precision)


def compute_in(monkeypatch, probe):
    """All stages of this process take their number type from `probe`."""
    for module in (tokenizer, anyorder, order_infer, finetune):
        monkeypatch.setattr(module, "precision", probe)


@pytest.fixture(autouse=True)
def one_probe(monkeypatch):
    """What two runs must do alike, they do in one number type: under load the probe may answer differently."""
    compute_in(monkeypatch, PROBED)


def slow(test):
    """Runs under `pytest -m slow` only."""
    return pytest.mark.slow(pytest.mark.skipif("slow" not in sys.argv, reason="pytest -m slow test_all.py")(test))


def tiny(rows=2, cols=2, codebook=3, layers=3, order_head=False, seed=0, words=("sun", "sea")):
    """A model with weights so large that every input matters."""
    torch.manual_seed(seed)
    model = AnyOrder({"rows": rows, "cols": cols, "codebook": codebook, "width": 32, "layers": layers,
                      "order_head": order_head, "words": list(words), "caption_length": 2})
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return model.eval().requires_grad_(False)


def command(script, *flags, expect=0):
    """Runs a script as a user would, in a process of its own; returns what it printed."""
    done = subprocess.run([sys.executable, str(HERE / f"{script}.py"), *map(str, flags)],
                          capture_output=True, text=True)
    assert done.returncode == expect, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout + done.stderr


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
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(Path(folder).rglob("*")) if p.is_file()}


@pytest.fixture(scope="session")
def chain(tmp_path_factory):
    """The whole chain through its .pt files, each stage by its own command line, at tiny size: (data, out, printed)."""
    root = tmp_path_factory.mktemp("chain")
    pictures, out = picture_folder(root / "pictures"), root / "out"
    common = ("--out", out, "--device", "cpu")
    small = ("--width", 32, "--layers", 2, "--batch", 8)
    printed = {"tokenizer": command("tokenizer", "--data", pictures, "--size", 16, "--codebook", 16, "--steps", 30,
                                    *common)}
    printed["anyorder"] = command("anyorder", *common, "--steps", 12, *small)
    printed["raster"] = command("anyorder", *common, "--steps", 3, "--order", "raster", *small)
    printed["order_infer"] = command("order_infer", *common)
    printed["finetune"] = command("finetune", *common, "--steps", 12, "--batch", 8)
    printed["sample"] = command("sample", *common, "--n", 3)
    return pictures, out, printed


# ---------------------------------------------------------------------------------------------------------------------
# Orders


def test_order_and_rank_are_inverse_on_a_hand_worked_grid():
    order = torch.tensor([[4, 1, 3, 5, 7, 0, 2, 6, 8]])                    # centre, its four neighbours, the corners
    rank = torch.tensor([[5, 1, 6, 2, 0, 3, 7, 4, 8]])                     # 5 1 6 / 2 0 3 / 7 4 8
    assert torch.equal(rank_of(order), rank)
    assert torch.equal(rank_of(rank), order)


def test_docstring_example_of_rank():
    assert rank_of(torch.tensor([[2, 0, 3, 1]])).tolist() == [[1, 3, 0, 2]]


def test_random_orders_are_permutations_and_repeatable():
    a, b = (random_order(50, 9, torch.Generator().manual_seed(s)) for s in (0, 0))
    assert torch.equal(a, b) and torch.equal(a.sort(1).values, raster_order(50, 9))
    assert len(set(map(tuple, a.tolist()))) > 40


# ---------------------------------------------------------------------------------------------------------------------
# The model


def all_images(V, N):
    return torch.tensor(list(itertools.product(range(V), repeat=N)))


@pytest.mark.parametrize("how", ("raster", "random") + tuple(s for s in SCORES if s != "likelihood"))
def test_the_probabilities_of_all_images_sum_to_one(how):
    model = tiny(seed=4)
    images = all_images(3, 4)                                              # 81 images
    captions = ["sun sea"] * len(images)
    if how == "raster":
        order = raster_order(len(images), 4)
    elif how == "random":
        order = torch.tensor([2, 0, 3, 1]).expand(len(images), 4)
    else:
        order = infer_orders(model, images, captions, score=how, distance=0.3)
        assert len(set(map(tuple, order.tolist()))) > 1                    # the order depends on the image
    total = model.log_probs(images, captions, order).double().sum(1).exp().sum()
    assert abs(total - 1) < 1e-5


def test_a_score_that_looks_at_the_content_is_no_probability():
    model, images = tiny(seed=3), all_images(3, 4)
    captions = ["sun"] * len(images)
    order = infer_orders(model, images, captions, score="likelihood")
    total = model.log_probs(images, captions, order).double().sum(1).exp().sum()
    assert total > 1.01                                                    # why likelihood is kept for comparison only


@pytest.mark.parametrize("mode", (True, False))
def test_later_tokens_leave_earlier_log_probs_bit_identical(mode):
    model = tiny(3, 3, codebook=7, order_head=True).train(mode)
    tokens, order = torch.randint(7, (4, 9)), random_order(4, 9)
    captions = ["sun", "", "sea sun", "sea"]
    before = model.log_probs(tokens, captions, order)
    _, where = model(tokens, model.read(captions), order)
    for k in range(9):
        changed = tokens.scatter(1, order[:, k:k + 1], (tokens.gather(1, order[:, k:k + 1]) + 1) % 7)
        after = model.log_probs(changed, captions, order)
        assert torch.equal(before[:, :k], after[:, :k])
        assert not torch.equal(before[:, k:], after[:, k:])
        _, there = model(changed, model.read(captions), order)
        assert torch.equal(where[:, :k + 1], there[:, :k + 1])             # the head must not see what it leads to


def test_the_order_head_does_not_know_the_location_it_predicts():
    model = tiny(3, 3, codebook=7, order_head=True)
    tokens, order, words = torch.randint(7, (4, 9)), random_order(4, 9), model.read([""] * 4)
    _, where = model(tokens, words, order)
    for k in range(8):
        other = order.clone()
        other[:, k:] = other[:, k:].flip(1)                                # another future, the same past
        _, there = model(tokens, words, other)
        assert torch.equal(where[:, :k + 1], there[:, :k + 1])


def test_the_cached_path_equals_the_full_forward_pass():
    model = tiny(3, 3, codebook=7, order_head=True)
    tokens, order = torch.randint(7, (5, 9)), random_order(5, 9)
    captions = ["sun sea", "", "sea", "sun", "sun sun"]
    what, where = model(tokens, model.read(captions), order)
    with torch.inference_mode():
        drawing = Drawing(model, model.read(captions))
        for k in range(9):
            torch.testing.assert_close(drawing.next_location(), where[:, k], rtol=1e-4, atol=1e-4)
            cells = order[:, [8, k][k == 8:]]                              # another offer must not disturb
            torch.testing.assert_close(drawing.look(cells)[:, -1], what[:, k], rtol=1e-4, atol=1e-4)
            drawing.place(torch.full((5, 1), len(cells[0]) - 1), tokens.gather(1, order[:, k:k + 1]))


@pytest.mark.parametrize("turns", ([1, 1, 1, 1], [0, 0, 0, 0], [0, 1, 2, 0]))
@pytest.mark.parametrize("few", (0, 3, 16))
def test_after_steps_of_several_cells_the_cached_path_still_equals_the_full_forward_pass(few, turns, monkeypatch):
    """Twelve cells are placed in steps of 1, 2, 4, 1, 3 and 1. In each, all free cells are looked at, whichever way
    `look` takes; the first to be taken is looked at second by all images, first by all, or here or there. What is said
    of each is what `forward` says of an order that begins with the placed ones and goes on with this."""
    monkeypatch.setattr(anyorder, "FEW", few)
    model, captions, k = tiny(rows=3, cols=4, codebook=5), ["sun", "", "sun", "sea"], 0
    order = random_order(4, 12, torch.Generator().manual_seed(3))
    tokens = torch.randint(5, (4, 12), generator=torch.Generator().manual_seed(4))
    with torch.inference_mode():
        drawing = Drawing(model, model.read(captions))
        for n in (1, 2, 4, 1, 3, 1):
            free = torch.stack([row.roll(turn) for row, turn in zip(order[:, k:], turns)])
            logits = drawing.look(free)
            for c in range(12 - k):
                onwards = torch.cat((order[:, :k], free.roll(-c, 1)), 1)
                what, _ = model(tokens, model.read(captions), onwards)
                torch.testing.assert_close(logits[:, c], what[:, k], rtol=1e-4, atol=1e-4)
            choice = (torch.arange(n) + torch.tensor(turns)[:, None]).remainder(12 - k)
            drawing.place(choice, tokens.gather(1, free.gather(1, choice)))
            k += n
            assert drawing.cell.tolist() == order[:, k - n:k].tolist()


def test_cells_that_come_together_are_chains_which_see_each_other():
    """Twelve cells in steps of 1, 2, 4, 1, 3 and 1, beside the definition without a cache, one long masked sequence:
    captions are read in turn; an input sees all older steps, of its own step those that bring another cell, and itself.
    Where a step draws more cells than the last one, the last of these brings more than one: only the first stays."""
    model, captions, k, old = tiny(rows=3, cols=4, codebook=5, order_head=True), ["sun", "", "sun", "sea"], 0, []
    order = random_order(4, 12, torch.Generator().manual_seed(3))
    tokens = torch.randint(5, (4, 12), generator=torch.Generator().manual_seed(4))
    cell, token = torch.full((4, 1), 12), torch.full((4, 1), 5)            # nowhere, nothing
    with torch.inference_mode():
        words = model.embed_words(model.read(captions))
        drawing = Drawing(model, model.read(captions))
        for n in (1, 2, 4, 1, 3, 1):
            cells, was = order[:, k:k + n], cell.shape[1]
            inputs = [(min(i, was - 1), min(i, n - 1)) for i in range(max(n, was))]        # brings, leads to
            new = torch.stack([model.embed_drawn(token[:, i], cell[:, i]) + model.embed_next(cell[:, i], cells[:, j])
                               for i, j in inputs], 1)
            every, L = old + [(new, inputs)], words.shape[1]
            x = torch.cat((words, *(part for part, _ in every)), 1)
            steps = list(range(L)) + [L + s for s, (part, _) in enumerate(every) for _ in range(part.shape[1])]
            brings = [None] * L + [i for _, pairs in every for i, _ in pairs]
            stays = [True] * (len(steps) - len(inputs)) + [number < was for number in range(len(inputs))]
            sees = torch.tensor([[a == b or stays[b] and (steps[b] < steps[a] or
                                                          steps[b] == steps[a] and brings[b] != brings[a])
                                  for b in range(len(steps))] for a in range(len(steps))])
            for block in model.blocks:
                q, key, v = block.split(x)
                p = (q @ key.mT / math.sqrt(q.shape[-1])).masked_fill(~sees, -math.inf).softmax(-1)
                x = block.merge(x, p @ v)
            asked = model.norm(x[:, -len(inputs):][:, :n])
            torch.testing.assert_close(drawing.look(cells, together=True), model.head(asked), rtol=1e-4, atol=1e-4)
            old.append((new[:, :was], inputs[:was]))
            cell, token, k = cells, tokens.gather(1, cells), k + n
            drawing.place(torch.arange(n).expand(4, n), token)
            where = model.next_location(model.embed_drawn(token[:, -1], cell[:, -1]), asked[:, -1])
            torch.testing.assert_close(drawing.next_location(), where, rtol=1e-4, atol=1e-4)


def test_cells_of_one_step_know_all_that_was_drawn_in_the_step_before():
    model = tiny(rows=3, cols=3, codebook=5)
    said = []
    for other in (None, 0, 1, 2):                      # of the three cells of the first step, one has another content
        with torch.inference_mode():
            drawing = Drawing(model, model.read(["sun"]))
            drawing.look(torch.tensor([[0, 4, 8]]), together=True)
            drawing.place(torch.arange(3)[None], torch.tensor([[int(i == other) for i in range(3)]]))
            said.append(drawing.look(torch.tensor([[2, 6]]), together=True)[0])
    for changed in said[1:]:
        assert ((changed - said[0]).abs().amax(-1) > 1e-6).all()           # both cells of the second step notice


def test_one_of_follows_the_probabilities_and_never_takes_an_impossible_one():
    p = torch.tensor([0, 0.2, 0, 0.5, 0.3, 0]).expand(200_000, 6)
    found = anyorder.one_of(p, torch.Generator().manual_seed(0))
    assert found.shape == (200_000, 1)
    share = torch.bincount(found[:, 0], minlength=6) / len(p)
    torch.testing.assert_close(share, p[0], atol=0.004, rtol=0)            # 3.6 standard deviations
    assert (share[p[0] == 0] == 0).all()


@pytest.mark.parametrize("uniform", (0.0, 1 - 2 ** -24))
def test_one_of_at_both_ends_of_the_unit_interval(monkeypatch, uniform):
    monkeypatch.setattr(torch, "rand", lambda *shape, **kwargs: torch.full(shape, uniform))
    for p in ([0, 0.7, 0.3, 0], [0, 1, 0, 0], [0.1] * 10 + [0]):
        token = anyorder.one_of(torch.tensor([p]))
        assert p[token] > 0


def test_captions_change_the_distribution_and_unknown_words_read_as_none():
    model = tiny()
    tokens, order = torch.zeros(1, 4, dtype=torch.long), raster_order(1, 4)
    sun, sea, none, unknown = (model.log_probs(tokens, [c], order) for c in ("sun", "sea", "", "zebra"))
    assert not torch.allclose(sun, sea) and not torch.allclose(sun, none) and torch.equal(none, unknown)
    with pytest.raises(data.UserError, match="sun"):
        model.check_words(["sunn"])
    model.check_words(["sun", "Sun, sea", ""])
    with pytest.raises(data.UserError, match="3 words: give at most 2"):
        model.check_words(["sun", "sun sea sun"])


def test_a_tiny_model_overfits_eight_images():
    torch.manual_seed(0)
    model = AnyOrder({"rows": 3, "cols": 3, "codebook": 8, "width": 64, "layers": 3, "order_head": False,
                      "words": [str(i) for i in range(8)], "caption_length": 1})
    tokens, captions = torch.randint(8, (8, 9)), [str(i) for i in range(8)]
    both = anyorder.optimizers(model, 3e-3, torch.float32)
    for step in range(150):
        loss = -model.log_probs(tokens, captions, random_order(8, 9)).mean()
        loss.backward()
        for optimizer in both:
            optimizer.param_groups[0]["lr"] = anyorder.learning_rate(step, 150, 3e-3)
            optimizer.step()
            optimizer.zero_grad()
    assert loss < 0.05                                                     # it began at ln(8) = 2.08
    drawn = draw(model.eval(), captions, random_order(8, 9), torch.Generator().manual_seed(0))
    assert (drawn == tokens).float().mean() > 0.9


def test_every_image_comes_once_per_epoch_and_batches_may_exceed_the_data():
    seen = sum((tokenizer.batch_of(step, 4, 10, 1) for step in range(5)), [])
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10)) and seen[:10] != seen[10:]
    assert sorted(tokenizer.batch_of(0, 6, 3, 1)) == [0, 0, 1, 1, 2, 2]


def test_learning_rate_warms_up_and_ends_near_zero():
    rates = [anyorder.learning_rate(s, 100, 1.0) for s in range(100)]
    assert rates[0] < rates[3] and max(rates) == pytest.approx(1, abs=0.01) and rates[-1] < 0.01


@pytest.mark.parametrize("kind", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("shape", ((8, 8), (8, 32), (24, 8)), ids=str)
def test_orthogonal_keeps_the_directions_and_evens_out_their_lengths(shape, kind):
    left, _, right = torch.linalg.svd(torch.randn(5, *shape, generator=torch.Generator().manual_seed(0)),
                                      full_matrices=False)
    g = left * torch.logspace(-4, -2, 8) @ right                           # the longest is a hundred times the shortest
    found = left.mT @ tokenizer.orthogonal(g.to(kind)).float() @ right.mT  # [5, 8, 8]: diagonal, if directions stay
    lengths = found.diagonal(dim1=1, dim2=2)
    assert 0.65 < lengths.min() and lengths.max() < 1.3
    assert (found - lengths.diag_embed()).abs().max() < (1e-3 if kind == torch.float32 else 0.1)


def test_muon_is_its_definition_and_matrices_of_one_shape_do_not_mix():
    random = torch.Generator().manual_seed(0)
    shapes = (8, 16), (24, 8), (8, 16), (6, 2, 3, 3), (6, 2, 3, 3)
    weights = [torch.randn(shape, generator=random) for shape in shapes]
    weights[3] = weights[3].contiguous(memory_format=torch.channels_last)      # as the tokenizer has its convolutions
    expected, momenta = [w.clone() for w in weights], [torch.zeros_like(w) for w in weights]
    optimizer = tokenizer.Muon(weights, 0.1, torch.float32)
    for _ in range(3):
        for i, w in enumerate(weights):
            w.grad = torch.randn(w.shape, generator=random)
            momenta[i] = 0.95 * momenta[i] + 0.05 * w.grad
            step = tokenizer.orthogonal((0.95 * momenta[i] + 0.05 * w.grad).flatten(1)[None])[0]       # [i, j]
            expected[i] = ((1 - 0.05 * 0.1) * expected[i]
                           - 0.2 * math.sqrt(max(step.shape)) * 0.1 * step.view(w.shape))
        optimizer.step()
    for w, wanted in zip(weights, expected):
        torch.testing.assert_close(w, wanted, rtol=1e-4, atol=1e-5)


def test_each_weight_of_the_tokenizer_is_trained_by_one_optimizer_and_convolutions_of_blocks_by_muon():
    model = small_tokenizer()
    adamw, muon = ([id(w) for w in each.param_groups[0]["params"]] for each in tokenizer.optimizers(model))
    assert sorted(adamw + muon) == sorted(id(w) for w in model.parameters())
    names = {name for name, w in model.named_parameters() if id(w) in muon}
    assert len(names) == 10 and all(re.search(r"conv[12]\.weight$", name) for name in names)


def test_each_weight_is_trained_by_one_optimizer_and_matrices_of_blocks_by_muon():
    model = tiny(order_head=True)
    adamw, muon = ({id(w) for w in each.param_groups[0]["params"]} for each in anyorder.optimizers(model, 1.0,
                                                                                                   torch.float32))
    assert adamw | muon == {id(w) for w in model.parameters()} and not adamw & muon
    assert muon == {id(w) for block in model.blocks for part in (block.qkv, block.proj, block.up, block.down)
                    for w in part.parameters()}


@pytest.mark.parametrize("rows, cols", ((4, 4), (3, 7), (1, 5)))
def test_positions_begin_so_that_likeness_depends_on_the_step_between_cells_alone(rows, cols):
    model = AnyOrder({"rows": rows, "cols": cols, "codebook": 2, "width": 64, "layers": 1, "order_head": False,
                      "words": [], "caption_length": 1})
    for where in (model.at.weight[:-1], model.next.weight):
        like = where @ where.T                                             # [N, N]
        for hop in model.hop[:-1].unique():
            torch.testing.assert_close(*torch.stack(torch.aminmax(like[model.hop[:-1] == hop])), rtol=1e-4, atol=1e-5)
        assert (like.argmax(1) == torch.arange(rows * cols)).all()         # and no two cells begin alike


def test_codes_begin_as_alike_as_the_tokenizer_has_them_and_another_tokenizer_is_refused(chain, tmp_path, monkeypatch,
                                                                                         capsys):
    out = start_of("anyorder", chain, tmp_path / "out")
    flags = "--out", out, "--device", "cpu", "--steps", 1, "--lr", 1e-9, "--width", 256, "--layers", 1
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
    assert code == 2 and "another tokenizer" in printed and files_of(out) == before


# ---------------------------------------------------------------------------------------------------------------------
# Order inference


def brute_force_order(model, tokens, caption, score, distance):
    """One image; every free cell is tried with a full forward pass over the whole prefix, nothing is cached."""
    N, cols, visited = model.N, model.config["cols"], []
    diagonal = math.hypot(model.config["rows"] - 1, cols - 1)
    for _ in range(N):
        values = {}
        for cell in sorted(set(range(N)) - set(visited)):
            rest = [c for c in range(N) if c not in visited and c != cell]
            order = torch.tensor([visited + [cell] + rest])
            logits = model(tokens[None], model.read([caption]), order)[0][:, len(visited)]
            value = location_scores(logits[:, None], score, model.frequency, tokens[cell].view(1, 1)).item()
            if visited:
                last = visited[-1]
                value -= distance * math.hypot(cell // cols - last // cols, cell % cols - last % cols) / diagonal
            values[cell] = value
        visited.append(max(values, key=values.get))
    return visited


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("distance", (0.0, 0.7))
def test_exact_order_inference_equals_brute_force(score, distance):
    model = tiny(3, 3, codebook=7, seed=5)
    model.frequency.copy_(torch.rand(7).softmax(0))
    tokens, captions = torch.randint(7, (3, 9)), ["sun", "", "sea sun"]
    found = infer_orders(model, tokens, captions, score, distance)
    assert found.tolist() == [brute_force_order(model, t, c, score, distance) for t, c in zip(tokens, captions)]


def test_the_head_orders_alone_and_looks_at_what_it_chose_only():
    model, looks = tiny(3, 3, codebook=7, order_head=True), []
    tokens = torch.randint(7, (6, 9), generator=torch.Generator().manual_seed(0))
    with model.head.register_forward_hook(lambda _, x, y: looks.append(y.shape[1])):
        order = infer_orders(model, tokens, ["sun"] * 6, headed=True)
        several = infer_orders(model, tokens, ["sun"] * 6, headed=True, parallel=4)
    assert looks == [1] * 9 + [2, 2, 2, 3]
    where = model(tokens, model.read(["sun"] * 6), order)[1]               # each step again, with all that is known
    for k in range(9):
        assert torch.equal(order[:, k], where[:, k].scatter(1, order[:, :k], -math.inf).argmax(1))
    assert torch.equal(several.sort(1).values, raster_order(6, 9)) and torch.equal(several[:, 0], order[:, 0])
    crowd = order_infer.crowding(model)                                    # while there are others, the next lies apart
    assert (crowd[several[:, :6:2], several[:, 1:6:2]] == 0).all() and (crowd[order[:, :-1], order[:, 1:]] > 0).any()
    with pytest.raises(UserError, match="order head"):
        infer_orders(tiny(3, 3, codebook=7), tokens, ["sun"] * 6, headed=True)


def test_inference_in_several_batches_gives_the_same_orders(monkeypatch):
    model = tiny(3, 3, codebook=7)
    tokens = torch.randint(7, (7, 9))
    whole = infer_orders(model, tokens, ["sun"] * 7)
    monkeypatch.setattr(order_infer, "images_at_once", lambda model: 3)
    assert torch.equal(whole, infer_orders(model, tokens, ["sun"] * 7))


def test_the_order_head_learns_a_rule_and_nothing_else_changes():
    """The rule: from the bottom right to the top left. A head that learned it orders images that it has not seen."""
    model = tiny(rows=3, cols=3, codebook=5)
    tokens = torch.randint(5, (64, 9), generator=torch.Generator().manual_seed(0))
    words, order = model.read([""] * 64), raster_order(64, 9).flip(1).contiguous()
    pupil = order_infer.learn_head(model, tokens[:48], words[:48], order[:48], steps=60, quiet=True)
    assert torch.equal(infer_orders(pupil, tokens[48:], [""] * 16, headed=True), order[48:])
    state = pupil.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_a_head_orders_the_images_that_were_not_inferred(chain, tmp_path, monkeypatch, capsys):
    """order_infer.py --fast: exact orders stay what they are, the head gives the others, --resume repeats it all."""
    monkeypatch.setattr(order_infer, "images_at_once", lambda model: 8)
    few, fast, parts = (start_of("order_infer", chain, tmp_path / name) for name in ("few", "fast", "parts"))
    assert call(monkeypatch, capsys, "order_infer", "--out", few, "--limit", 20)[0] == 0
    code, printed = call(monkeypatch, capsys, "order_infer", "--out", fast, "--limit", 20, "--fast")
    assert code == 0 and re.search(r"validation images correlate by -?\d\.\d+", printed), printed
    exact, whole = (torch.load(out / "orders.pt", weights_only=True) for out in (few, fast))
    n = len(exact["order"])
    assert whole["exact"] == n and torch.equal(whole["order"][:n], exact["order"])
    train = (torch.load(fast / "tokens.pt", weights_only=True)["split"] == 0).nonzero()[:, 0]
    assert set(train.tolist()) <= set(whole["index"].tolist()) and len(whole["index"]) == len(whole["index"].unique())
    assert (whole["order"].long().sort(1).values == torch.arange(whole["order"].shape[1])).all()
    for stops in (2, 4):                               # within the exact part, and within the head's
        shutil.rmtree(parts)
        start_of("order_infer", chain, parts)
        with monkeypatch.context() as patch:
            patch.setattr(order_infer, "on_interrupt", lambda: StopAfter(stops))
            assert call(patch, capsys, "order_infer", "--out", parts, "--limit", 20, "--fast")[0] == 130
        assert call(monkeypatch, capsys, "order_infer", "--out", parts, "--limit", 20, "--fast", "--resume")[0] == 0
        assert same(fast / "orders.pt", parts / "orders.pt")
    with monkeypatch.context() as patch:               # killed while the head learns: nothing exact is lost
        patch.setattr(order_infer, "learn_head", lambda *rest: sys.exit(9))
        assert call(patch, capsys, "order_infer", "--out", start_of("order_infer", chain, tmp_path / "killed"),
                    "--limit", 20, "--fast")[0] == 9
    assert torch.load(tmp_path / "killed" / "orders_resume.pt", weights_only=True)["done"] == n
    code, printed = call(monkeypatch, capsys, "order_infer", "--out", parts, "--limit", 0, "--fast")
    assert code == 2 and "smaller limit" in printed


def test_scores_on_hand_worked_distributions():
    p = torch.tensor([[[0.7, 0.2, 0.1], [0.5, 0.5, 0.0]]])
    logits = p.clamp_min(1e-30).log()
    frequency = torch.tensor([0.5, 0.25, 0.25])
    value = {s: location_scores(logits, s, frequency, torch.tensor([[1, 0]])) for s in SCORES}
    torch.testing.assert_close(value["confidence"], torch.tensor([[0.7, 0.5]]).log())
    torch.testing.assert_close(value["margin"], torch.tensor([[0.5, 1e-12]]).log(), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(value["entropy"], torch.tensor([[-0.8018, -0.6931]]), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(value["calibrated"], torch.tensor([[1.4, 1.0]]).log())
    torch.testing.assert_close(value["likelihood"], torch.tensor([[0.2, 0.5]]).log())


def test_distance_draws_neighbours_next():
    model = tiny(3, 3, codebook=7)
    order = infer_orders(model, torch.randint(7, (8, 9)), ["sun"] * 8, distance=1000.0)
    step = (order[:, 1:] // 3 - order[:, :-1] // 3).abs() + (order[:, 1:] % 3 - order[:, :-1] % 3).abs()
    assert step[:, 0].max() == 1


def test_mean_rank_per_caption_and_the_fallback():
    order = torch.tensor([[0, 1, 2, 3], [1, 0, 2, 3], [3, 2, 1, 0]])
    ranks = order_infer.caption_ranks(order, torch.tensor([0, 0, 1]), 3)
    assert ranks[0].tolist() == [0.5, 0.5, 2, 3] and ranks[1].tolist() == [3, 2, 1, 0]
    torch.testing.assert_close(ranks[2], torch.tensor([4 / 3, 1, 5 / 3, 2]))


def test_order_pictures_have_the_grid_upright():
    rank = torch.arange(4).view(1, 4)                                      # raster on a 2x2 grid
    picture = order_infer.order_maps(rank, 2, 2, 4)[0]
    brightness = picture.float().sum(0)
    assert brightness[0, 0] < brightness[0, 3] < brightness[3, 0] < brightness[3, 3]
    half = order_infer.unfinished(torch.zeros(1, 3, 4, 4, dtype=torch.uint8), rank, 2, 2, 2)[0, 0]
    assert (half[:2] == 0).all() and (half[2:] == 128).all()


# ---------------------------------------------------------------------------------------------------------------------
# Finetuning


def test_location_loss_is_a_softmax_over_free_cells():
    order = torch.tensor([[2, 0, 1]])
    where = torch.tensor([[[0.0, 1.0, 2.0], [3.0, 1.0, 9.0], [5.0, 0.0, 5.0]]])
    loss = finetune.location_loss(where, order)[0]
    assert loss[0] == pytest.approx(math.log(sum(map(math.exp, (0, 1, 2)))) - 2, abs=1e-5)
    assert loss[1] == pytest.approx(math.log(math.exp(3) + math.exp(1)) - 3, abs=1e-5)     # cell 2 is drawn
    assert loss[2] == 0


def test_what_is_given_comes_first_and_keeps_its_order():
    order = random_order(4000, 12, torch.Generator().manual_seed(0))
    found, given = finetune.given_first(order, 3, 4, torch.Generator().manual_seed(1))
    assert torch.equal(found.sort(1).values, raster_order(4000, 12))
    assert torch.equal(found[given[:, 0] == 0], order[given[:, 0] == 0])
    share = (given > 0).double().mean().item()
    assert abs(share - finetune.GIVEN * 11 / 12) < 0.03                    # one in twelve of them is given nothing
    rank = rank_of(order)
    halves = set()
    for cells, n, was in zip(found.tolist(), given[:, 0].tolist(), rank.tolist()):
        for part in (cells[:n], cells[n:]):
            assert [was[c] for c in part] == sorted(was[c] for c in part)
        if n:                                          # their hulls do not touch: no given cell lies between two others
            for a, b in itertools.combinations(cells[n:], 2):
                if (a + b) % 2 == 0 and a // 4 == b // 4:
                    assert (a + b) // 2 not in cells[:n]
            halves.add(frozenset(cells[:n]))
    for side in (lambda c: c < 4, lambda c: c >= 8, lambda c: c % 4 < 2, lambda c: c % 4 > 1):
        assert frozenset(filter(side, range(12))) in halves                # what people hide, at all four sides


def test_a_second_round_takes_the_heads_orders_and_resumes_bit_for_bit(chain, tmp_path, monkeypatch, capsys):
    flags = ("--steps", 8, "--batch", 8, "--rounds", 2)
    one, two, parts = (start_of("finetune", chain, tmp_path / name) for name in ("one", "two", "parts"))
    code, printed = call(monkeypatch, capsys, "finetune", "--out", two, *flags)
    assert code == 0 and "round 2: orders of the head, rank correlation" in printed
    for rounds, whose in ((1, "file"), (2, "head")):   # whose orders the last step trains on
        seen, real, made = [], finetune.given_first, []
        with monkeypatch.context() as patch:
            patch.setattr(finetune, "given_first", lambda o, *more: seen.append(o.tolist()) or real(o, *more))
            patch.setattr(finetune, "shared_orders", lambda model, tokens, words, *_, **how: made.append(infer_orders(
                model, tokens.to(model.hop.device), words.to(model.hop.device), **how).cpu()) or made[-1])
            assert call(patch, capsys, "finetune", "--out", one, *flags[:-1], rounds)[0] == 0
        asked = made[:-1]                              # the last call only compares
        known = {"file": torch.load(one / "orders.pt", weights_only=True)["order"].tolist(),
                 "head": torch.cat(asked).tolist() if asked else None}
        assert bool(asked) == (whose == "head") and all(order in known[whose] for order in seen[-1])
        index, split = (torch.load(one / f"{name}.pt", weights_only=True)[key]
                        for name, key in (("orders", "index"), ("tokens", "split")))
        n = int((split[index] == 0).sum())             # the head orders what the round draws, and what checks it
        drawn = {i for step in range(4, 8) for i in tokenizer.batch_of(step, 8, n, 0)}
        assert not asked or len(drawn) < n and len(torch.cat(asked)) == len(drawn) + len(index) - n
    for stop in (2, 5, 7):                             # in the first round, while the head is asked, in the second
        with monkeypatch.context() as patch:
            patch.setattr(finetune, "on_interrupt", lambda: StopAfter(stop))
            code, printed = call(patch, capsys, "finetune", "--out", parts, *flags)
            assert code == 130, printed
        code, printed = call(monkeypatch, capsys, "finetune", "--out", parts, *flags, "--resume")
        assert code == 0, printed
        assert same(two / "ordered.pt", parts / "ordered.pt")
    code, printed = call(monkeypatch, capsys, "finetune", "--out", one, *flags, "--order", "raster")
    assert code == 2 and "--rounds 2" in printed and not (one / "ordered_raster.pt").exists()


def test_one_in_four_images_of_later_rounds_comes_as_parallel_steps_draw_it(chain, tmp_path, monkeypatch, capsys):
    spied, whole, parts = (start_of("finetune", chain, tmp_path / name) for name in ("spied", "whole", "parts"))
    flags = ("--device", "cpu", "--steps", 9, "--batch", 8, "--rounds", 3, "--parallel", 4)
    made, seen, pulls, first, loss = [], [], [], finetune.given_first, finetune.location_loss

    def spy_orders(model, tokens, words, *_, parallel=0, **how):
        found = infer_orders(model, tokens, words, parallel=parallel, **how)
        assert parallel in (0, 4) and how == {"headed": True}
        made.extend((len(seen) // 3, parallel, order) for order in found.tolist())         # after so many rounds
        return found

    def spy_first(order, *more):
        found, given = first(order, *more)
        seen.append((order.tolist(), given.clone()))
        return found, given
    with monkeypatch.context() as patch:
        patch.setattr(finetune, "shared_orders", spy_orders)
        patch.setattr(finetune, "given_first", spy_first)
        patch.setattr(finetune, "location_loss", lambda where, order: pulls.append(where) or where.retain_grad()
                      or loss(where, order))
        code, printed = call(patch, capsys, "finetune", "--out", spied, *flags)
    assert code == 0 and len(seen) == len(pulls) == 9, printed
    n = int((anyorder.open_tokens(spied)["split"] == 0).sum())
    for step, ((orders, given), where) in enumerate(zip(seen, pulls)):
        part, batch = step // 3, tokenizer.batch_of(step, 8, n, 0)
        several = [part > 0 and (i + part) % 4 == 0 for i in batch]        # others in each round
        assert not part or any(several) and not all(several)
        for order, at_once, pull, known in zip(orders, several, where.grad, given):
            assert not part or (part, 4 * at_once, order) in made
            assert pull.any() == (not at_once and known < pull.shape[0] - 1)               # the last step has no choice
    assert call(monkeypatch, capsys, "finetune", "--out", whole, *flags)[0] == 0
    for stop in (2, 5, 6, 8):                          # also while the head is asked, for the one order and the other
        with monkeypatch.context() as patch:
            patch.setattr(finetune, "on_interrupt", lambda: StopAfter(stop))
            assert call(patch, capsys, "finetune", "--out", parts, *flags)[0] == 130
        code, printed = call(monkeypatch, capsys, "finetune", "--out", parts, *flags, "--resume")
        assert code == 0 and same(whole / "ordered.pt", parts / "ordered.pt"), printed
    for more, word in ((("--parallel", 16), "16 cells"), (("--parallel", 1), "2 steps"), (("--rounds", 1), "--rounds"),
                       (("--parallel", -4), "-4"), (("--order", "raster"), "raster")):
        code, printed = call(monkeypatch, capsys, "finetune", "--out", parts, *flags, *more)
        assert code == 2 and word in printed and "Traceback" not in printed, printed


def test_later_rounds_go_on_with_all_images_that_the_any_order_model_has_seen(chain, tmp_path, monkeypatch, capsys):
    whole, parts = (start_of("finetune", chain, tmp_path / name) for name in ("whole", "parts"))
    for out in (whole, parts):                         # exact orders of 8 images, of the 20 that the model learned from
        assert call(monkeypatch, capsys, "order_infer", "--out", out, "--limit", 8, "--device", "cpu")[0] == 0
        data.save(out / "anyorder.pt", {**torch.load(out / "anyorder.pt", weights_only=True), "limit": 20})
    held = anyorder.open_tokens(whole)
    number = {tuple(row): i for i, row in enumerate(held["tokens"][held["split"] == 0].tolist())}
    forward, seen = AnyOrder.forward, []

    def spy(self, tokens, words, order):
        if torch.is_grad_enabled():
            seen.append([number[tuple(row)] for row in tokens.tolist()])
        return forward(self, tokens, words, order)
    monkeypatch.setattr(AnyOrder, "forward", spy)
    flags = ("--device", "cpu", "--batch", 4, "--steps", 8)
    code, printed = call(monkeypatch, capsys, "finetune", "--out", whole, *flags, "--rounds", 2)
    first, later = set(sum(seen[:4], [])), set(sum(seen[4:], []))
    assert code == 0 and len(number) > 20 and "learning rate 0.0005\n" in printed, printed
    assert first == set(range(8)) and later <= set(range(20)) and later - first
    for stop in (2, 6):                                # in the first round, in the second
        with monkeypatch.context() as patch:
            patch.setattr(finetune, "on_interrupt", lambda: StopAfter(stop))
            assert call(patch, capsys, "finetune", "--out", parts, *flags, "--rounds", 2)[0] == 130
        code, printed = call(monkeypatch, capsys, "finetune", "--out", parts, *flags, "--rounds", 2, "--resume")
        assert code == 0 and same(whole / "ordered.pt", parts / "ordered.pt"), printed
    for order in ("raster", "class"):                  # 5 steps of 4: no image comes twice
        seen.clear()
        code, printed = call(monkeypatch, capsys, "finetune", "--out", whole, *flags[:-1], 5, "--order", order)
        assert code == 0 and "learning rate 0.002\n" in printed and set(sum(seen, [])) == set(range(20)), printed


def test_finetuning_starts_from_the_any_order_model(chain):
    _, out, _ = chain
    a, b = (anyorder.load_model(out / f) for f in ("anyorder.pt", "ordered.pt"))
    assert b.config["order_head"] and not a.config["order_head"]
    assert ({k: v for k, v in b.config.items() if k != "order_head"}
            == {k: v for k, v in a.config.items() if k != "order_head"})
    assert b.about["step"] > a.about["step"] and b.about["made_from"]["tokens"] == a.about["made_from"]["tokens"]


# ---------------------------------------------------------------------------------------------------------------------
# Sampling


@pytest.mark.parametrize("order", ("raster", "random", "inferred", "class", "learned"))
@pytest.mark.parametrize("guidance", (1.0, 3.0))
def test_generate_visits_every_cell_once_and_repeats_with_a_seed(order, guidance):
    model = tiny(3, 3, codebook=7, order_head=True)
    model.about = {"caption_rank": torch.rand(2, 9), "captions": ["sun", "sea"]}
    runs = [sample.generate(model, ["sun", "sea sun"], order, guidance=guidance,
                            generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs[:2]))
    assert not torch.equal(runs[0][0], runs[2][0])
    assert torch.equal(runs[0][1].sort(1).values, raster_order(2, 9))


@pytest.mark.parametrize("score", [s for s in SCORES if s != "likelihood"])
def test_the_order_of_a_generated_image_is_the_order_inferred_from_it(score):
    model = tiny(3, 3, codebook=7)
    tokens, order = sample.generate(model, ["sun"] * 4, "inferred", score=score, distance=0.2)
    assert torch.equal(order, infer_orders(model, tokens, ["sun"] * 4, score, 0.2))


@pytest.mark.parametrize("order, parallel", (("learned", 0), ("learned", 4), ("inferred", 4)))
def test_so_are_the_orders_of_the_head_and_of_several_cells_a_step(order, parallel):
    model = tiny(3, 3, codebook=7, order_head=True)
    tokens, drawn = sample.generate(model, ["sun"] * 8, order, parallel=parallel)
    assert torch.equal(drawn, infer_orders(model, tokens, ["sun"] * 8, headed=order == "learned", parallel=parallel))
    assert not torch.equal(drawn, infer_orders(model, tokens, ["sun"] * 8, headed=order == "learned",
                                               parallel=0 if parallel else 4))


def test_a_raster_only_model_gets_what_is_given_in_its_turn():
    model, dice = tiny(3, 3, codebook=7), lambda: torch.Generator().manual_seed(5)
    model.about, keep = {"order": "raster"}, torch.tensor([0, 1, 0, 0, 1, 0, 0, 0, 1]).bool()
    given = torch.randint(7, (40, 9), generator=torch.Generator().manual_seed(1))
    other = given.clone()
    other[:, 8] = (other[:, 8] + 1) % 7                # a cell after all those that are drawn
    how = dict(order="raster", keep=keep)
    tokens, order = sample.generate(model, ["sun"] * 40, given=given, generator=dice(), **how)
    again, _ = sample.generate(model, ["sun"] * 40, given=other, generator=dice(), **how)
    assert torch.equal(order, raster_order(40, 9)) and torch.equal(tokens[:, keep], given[:, keep])
    assert torch.equal(tokens[:, :8], again[:, :8]) and torch.equal(again[:, 8], other[:, 8])
    model.about = {"order": "random"}                  # one that knows all orders looks at it first
    tokens, order = sample.generate(model, ["sun"] * 40, given=given, generator=dice(), **how)
    again, _ = sample.generate(model, ["sun"] * 40, given=other, generator=dice(), **how)
    assert order[0].tolist() == [1, 4, 8, 0, 2, 3, 5, 6, 7] and not torch.equal(tokens[:, :8], again[:, :8])


def test_a_few_steps_draw_fewer_cells_first_and_all_in_the_end():
    assert order_infer.steps_of(16, 4) == [3, 4, 4, 5]
    for cells in (1, 2, 9, 64):
        for parallel in range(cells + 2):
            steps = order_infer.steps_of(cells, parallel)
            assert (sum(steps) == cells and min(steps) > 0
                    and len(steps) == (parallel or cells if parallel < cells else cells) and steps == sorted(steps))


def test_cells_of_one_step_share_no_edge_while_there_are_others():
    #  cells of a 3x3 grid with the scores    9 8 1      9 first; 8 and 7 are adjacent to it; then 6, 5, 4 and 1 (the
    #                                         7 6 2      middle and all corners); then the best of the rest, 8
    #                                         5 0 4
    crowd = order_infer.crowding(tiny(rows=3, cols=3))
    assert crowd[4].nonzero()[:, 0].tolist() == [1, 3, 4, 5, 7] and crowd[0].nonzero()[:, 0].tolist() == [0, 1, 3]
    value, cells = torch.tensor([[9., 8, 1, 7, 6, 2, 5, 0, 4]]), torch.arange(9)[None]
    assert order_infer.best_apart(value, cells, 6, crowd).tolist() == [[0, 4, 6, 8, 2, 1]]
    assert sorted(order_infer.best_apart(value, cells, 9, crowd)[0].tolist()) == list(range(9))
    assert order_infer.best_apart(value, cells, 1, crowd).tolist() == [[0]]


@pytest.mark.parametrize("order", ("learned", "inferred", "class"))
def test_parallel_drawing_takes_as_many_steps_as_asked(order):
    model = tiny(rows=3, cols=3, codebook=5, order_head=True)
    model.about = {"caption_rank": torch.rand(1, 9), "captions": [""]}
    looks = []
    with model.head.register_forward_hook(lambda _, x, y: looks.append(y.shape[1])):
        tokens, visited = sample.generate(model, [""] * 6, order=order, parallel=4, given=torch.full((6, 9), 2),
                                   keep=torch.arange(9) == 5)
    assert len(looks) == 1 + 4 and torch.equal(visited.sort(1).values, raster_order(6, 9))
    assert (visited[:, 0] == 5).all() and (tokens[:, 5] == 2).all()
    one = sample.generate(model, [""] * 6, order=order, parallel=9)
    assert all(map(torch.equal, one, sample.generate(model, [""] * 6, order=order)))


def test_the_order_of_a_caption_is_that_of_its_words():
    model = tiny(1, 3)
    model.about = {"caption_rank": torch.tensor([[2.0, 0, 1], [0, 2, 1]]), "captions": ["Low sun", "sea"]}
    found = sample.caption_orders(model, ["Low sun", "low, sun", "sea", "sun low"])
    assert found.tolist() == [[1, 2, 0], [1, 2, 0], [0, 2, 1], [0, 1, 2]]      # unknown: the mean rank, 1 1 1


def test_parallel_drawing_from_the_command_line(chain, tmp_path, monkeypatch, capsys):
    out = start_of("finetune", chain, tmp_path / "out")
    shutil.copy(chain[1] / "ordered.pt", out)
    code, printed = call(monkeypatch, capsys, "sample", "--out", out, "--n", 2, "--parallel", 5, "--why", 9,
                         "--device", "cpu")
    assert code == 0 and (out / "samples_why.png").exists() and (out / "samples.gif").exists(), printed


def test_in_frozen_order_the_any_order_model_chooses_and_the_specialised_one_draws(chain, tmp_path, monkeypatch,
                                                                                    capsys):
    out, used = start_of("finetune", chain, tmp_path / "out"), []
    shutil.copy(chain[1] / "ordered.pt", out)
    draw = sample.generate
    monkeypatch.setattr(sample, "generate", lambda *args, **how: used.append((args[0], how)) or draw(*args, **how))
    flags = ("--out", out, "--n", 2, "--guidance", 2, "--animate", 0, "--device", "cpu")
    code, printed = call(monkeypatch, capsys, "sample", *flags, "--order", "frozen", "--why", 3)
    (model, how), weights = used[0], lambda model: data.fingerprint(model.state_dict())
    assert code == 0 and "in frozen order" in printed and how["order"] == "inferred", printed
    assert (weights(model), weights(how["policy"])) == tuple(
        weights(load_model(out / name)) for name in ("ordered.pt", "anyorder.pt"))
    (out / "ordered.pt").unlink()                      # what was not finetuned has no model that it came from
    code, printed = call(monkeypatch, capsys, "sample", *flags, "--order", "frozen")
    assert code == 2 and "was not finetuned from" in printed and "Traceback" not in printed


def test_a_sampled_order_draws_the_location_from_the_heads_softmax():
    model, n = tiny(rows=2, cols=2, codebook=5, order_head=True), 4000
    with torch.inference_mode():
        p = Drawing(model, model.read([""])).next_location()[0].softmax(0)
    first = sample.generate(model, [""] * n, order="sampled")[1][:, 0]
    share = torch.bincount(first, minlength=4) / n
    assert ((share - p).abs() < 5 * (p * (1 - p) / n).sqrt()).all()        # odds of a false alarm below 1 in 400,000
    assert (sample.generate(model, [""] * 9, order="learned")[1][:, 0] == p.argmax()).all()


def test_guidance_tries_the_candidates_only_with_the_caption():
    model, seen = tiny(rows=3, cols=3, codebook=5), []
    with model.head.register_forward_hook(lambda _, x, y: seen.append(y.shape[0] * y.shape[1])):
        told = sample.generate(model, ["sun"] * 2, guidance=2.0)
    assert sum(seen) == 2 * (9 * 10 // 2) + 2 * 2 * 9
    assert torch.equal(told[1].sort(1).values, raster_order(2, 9))


def test_likelihood_keeps_the_likeliest_draw():
    model = tiny(3, 3, codebook=7)
    plain, likely = (sample.generate(model, ["sun"] * 64, "inferred", score=s) for s in ("confidence", "likelihood"))
    gain = [model.log_probs(t, ["sun"] * 64, o).sum(1).mean() for t, o in (plain, likely)]
    assert gain[1] > gain[0]                                               # a cut in temperature in disguise


def test_another_model_chooses_where_and_never_what():
    model, policy = tiny(3, 3, codebook=7, seed=1), tiny(3, 3, codebook=7, seed=2)
    policy.head.weight.data.zero_()                                        # knows nothing: argmax is always token 0
    for score in SCORES:
        drawn, order = sample.generate(model, ["sun"] * 4, "inferred", score=score, policy=policy, temperature=0)
        again, _ = sample.generate(model, ["sun"] * 4, order, temperature=0)
        assert torch.equal(drawn, again) and drawn.any(), score


def test_samples_follow_the_model_distribution():
    model = tiny(1, 2, codebook=2, seed=1)
    images = all_images(2, 2)
    for order in (torch.tensor([[0, 1]]), torch.tensor([[1, 0]])):
        truth = model.log_probs(images, ["sun"] * 4, order.expand(4, 2)).sum(1).exp()
        drawn, _ = sample.generate(model, ["sun"] * 4000, order.expand(4000, 2))
        share = torch.bincount(drawn[:, 0] * 2 + drawn[:, 1], minlength=4) / 4000
        # 5 standard errors: 1 false alarm in a million
        assert (share - truth).abs().max() < 0.04


def test_guidance_of_one_is_no_guidance_and_more_moves_towards_the_caption():
    logits = torch.tensor([[[1.0, 0.0]], [[0.0, 0.0]]])
    assert torch.equal(sample.guided(logits[:1], 1, 1.0), logits[:1])
    assert sample.guided(logits, 1, 1.0).tolist() == [[[1.0, 0.0]]]
    assert sample.guided(logits, 1, 2.0).tolist() == [[[2.0, 0.0]]]


def test_temperature_top_k_and_top_p_on_a_hand_worked_distribution():
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    check = lambda expected, **how: torch.testing.assert_close(sample.filtered(logits, **how), torch.tensor([expected]))
    check([0.5, 0.3, 0.15, 0.05])
    check([1.0, 0.0, 0.0, 0.0], temperature=0)
    check([0.625, 0.375, 0.0, 0.0], top_k=2)
    check([0.625, 0.375, 0.0, 0.0], top_p=0.7)                             # 0.5 is not enough, 0.8 is
    check([1.0, 0.0, 0.0, 0.0], top_p=0.1)
    assert sample.filtered(logits, temperature=0.5)[0, 0] > 0.6
    for tiny_one in (0, 1e-300, 1e-38, 1e-7):                              # which would make logits infinite
        assert sample.filtered(100 * logits, temperature=tiny_one).tolist() == [[1, 0, 0, 0]]


@pytest.mark.parametrize("order", ("raster", "random", "inferred", "learned"))
def test_given_cells_come_first_and_are_never_overwritten(order):
    model = tiny(3, 3, codebook=7, order_head=True)
    given, keep = torch.randint(7, (4, 9)), torch.tensor([1, 0, 0, 1, 0, 1, 0, 0, 1]).bool()
    tokens, visited = sample.generate(model, ["sun"] * 4, order, given=given, keep=keep)
    assert torch.equal(tokens[:, keep], given[:, keep])
    assert keep[visited[:, :4]].all() and not keep[visited[:, 4:]].any()
    same, _ = sample.generate(model, ["sun"] * 4, order, given=given, keep=torch.ones(9).bool())
    assert torch.equal(same, given)
    anew, _ = sample.generate(model, ["sun"] * 4, order, given=given, keep=torch.zeros(9).bool())
    assert torch.equal(anew, sample.generate(model, ["sun"] * 4, order)[0])


def test_another_model_may_choose_the_locations():
    model, policy = tiny(3, 3, codebook=7), tiny(3, 3, codebook=7, seed=9)
    tokens, order = sample.generate(model, ["sun"] * 4, "inferred", policy=policy)
    assert torch.equal(order, infer_orders(policy, tokens, ["sun"] * 4))
    assert not torch.equal(order, infer_orders(model, tokens, ["sun"] * 4))


def test_orders_that_a_model_does_not_know_are_refused():
    for order in ("learned", "class", "spiral"):
        model = tiny()
        model.about = {}
        with pytest.raises(data.UserError):
            sample.generate(model, ["sun"], order)


# ---------------------------------------------------------------------------------------------------------------------
# The command lines


def test_the_chain_writes_what_it_promises(chain):
    _, out, printed = chain
    for name in ("tokenizer.pt", "tokens.pt", "anyorder.pt", "raster.pt", "orders.pt", "ordered.pt", "anyorder.png",
                 "anyorder_loss.png", "orders.png", "samples.png", "samples_order.png", "samples.gif"):
        assert (out / name).stat().st_size > 0
    assert not list(out.glob("*_resume.pt")) and not list(out.glob("*tmp*"))
    assert "ln(16) = 2.773" in printed["anyorder"]
    for file in out.glob("*.pt"):
        held = torch.load(file, weights_only=True)
        assert {"kind", "version", "config", "made_from"} <= set(held)


@pytest.mark.parametrize("kind", (torch.float32, torch.bfloat16), ids=str)
def test_orders_on_disk_are_the_orders_that_the_model_infers(kind, chain, tmp_path, monkeypatch, capsys):
    out = start_of("order_infer", chain, tmp_path / "out")
    monkeypatch.setattr(order_infer, "precision", lambda device: kind)
    assert call(monkeypatch, capsys, "order_infer", "--out", out, "--device", "cpu")[0] == 0
    held = anyorder.open_tokens(out)
    file = order_infer.load_orders(out / "orders.pt", held)
    model, row = anyorder.load_model(out / "anyorder.pt"), file["index"]
    captions = [held["captions"][i] for i in held["caption_index"][row].tolist()]
    with torch.autocast("cpu", kind, enabled=kind != torch.float32):
        assert torch.equal(file["order"], infer_orders(model, held["tokens"][row], captions))
    assert (held["split"][file["index"]] != 2).all()                       # the test split is for evaluation only


def test_orders_of_another_grid_are_refused(chain, monkeypatch, capsys):
    _, out, _ = chain
    file = torch.load(out / "orders.pt", weights_only=True)
    good = (out / "orders.pt").read_bytes()
    file["config"]["rows"] = 7
    data.save(out / "orders.pt", file)
    before = files_of(out)
    try:
        code, printed = call(monkeypatch, capsys, "finetune", "--out", out, "--steps", 1)
        assert code == 2 and "7x4 grid" in printed and "python order_infer.py" in printed and files_of(out) == before
    finally:
        (out / "orders.pt").write_bytes(good)


def test_files_that_do_not_belong_together_are_refused(chain, tmp_path, monkeypatch, capsys):
    def altered(name, change):
        out = tmp_path / str(len(list(tmp_path.iterdir())))
        shutil.copytree(chain[1], out)
        file = torch.load(out / name, weights_only=True)
        change(file)
        data.save(out / name, file)
        return out

    def refused(stage, out, needle):
        before = files_of(out)
        code, printed = call(monkeypatch, capsys, stage, "--out", out, "--device", "cpu")
        assert code == 2 and needle in printed and files_of(out) == before, printed

    out = altered("tokens.pt", lambda file: file["made_from"].update(data="0123456789abcdef"))       # other captions
    for stage in ("order_infer", "finetune"):
        refused(stage, out, "anyorder.pt was trained on another tokens.pt")
    out = altered("orders.pt", lambda file: file["captions"].reverse())
    refused("finetune", out, "orders.pt was made from another tokens.pt")
    out = altered("tokenizer.pt", lambda file: file["model"]["codebook"].mul_(2))
    refused("order_infer", out, "another tokenizer")
    for change in (lambda file: file["index"].fill_(int(file["index"][0])), lambda file: file["made_from"].clear(),
                   lambda file: file["config"].update(distance=math.inf)):
        refused("finetune", altered("orders.pt", change), "orders.pt")
    # orders of another model are no error: that is what order_infer.py --model is for. But it is said
    out = altered("orders.pt", lambda file: file["made_from"].update(model="0123456789abcdef"))
    code, printed = call(monkeypatch, capsys, "finetune", "--out", out, "--steps", 1, "--batch", 4, "--device", "cpu")
    assert code == 0 and "inferred by another model" in printed


@pytest.mark.parametrize("stage", ("anyorder", "finetune"))
def test_training_sees_training_images_only_and_most_captions(stage, chain, tmp_path, monkeypatch, capsys):
    out, seen, forward = start_of(stage, chain, tmp_path / "out"), {True: [], False: []}, AnyOrder.forward
    held = anyorder.open_tokens(out)
    rows = [{tuple(row) for row in held["tokens"][held["split"] == part].tolist()} for part in range(3)]
    assert all(rows) and not rows[0] & (rows[1] | rows[2]) and not rows[1] & rows[2]

    def spy(self, tokens, words, order):
        seen[torch.is_grad_enabled()].append((tokens, words))
        return forward(self, tokens, words, order)
    monkeypatch.setattr(AnyOrder, "forward", spy)
    code, printed = call(monkeypatch, capsys, stage, "--out", out, *STAGES[stage], "--steps", 20, "--device", "cpu")
    assert code == 0, printed
    trained, checked = ([tuple(row) for tokens, _ in seen[grad] for row in tokens.tolist()] for grad in (True, False))
    assert len(trained) == 160 and set(trained) <= rows[0] and set(checked) == rows[1]
    told = torch.cat([words for _, words in seen[True]]).any(1).float().mean()
    assert 0.75 < told < 0.99 and all(words.any(1).all() for _, words in seen[False])


def test_the_head_learns_from_locations_that_were_chosen_not_given(chain, tmp_path, monkeypatch, capsys):
    given, pulls, first, loss = [], [], finetune.given_first, finetune.location_loss

    def spy_first(*rest):
        order, count = first(*rest)
        given.append(count)
        return order, count

    def spy_loss(where, order):
        nats = loss(where, order)
        nats.register_hook(pulls.append)
        return nats
    monkeypatch.setattr(finetune, "given_first", spy_first)
    monkeypatch.setattr(finetune, "location_loss", spy_loss)
    code, printed = call(monkeypatch, capsys, "finetune", "--out", start_of("finetune", chain, tmp_path / "out"),
                         "--steps", 8, "--batch", 8, "--rounds", 1, "--device", "cpu")
    assert code == 0 and len(pulls) == 8 and torch.cat(given).any(), printed
    for count, pull in zip(given, pulls):
        assert torch.equal(pull > 0, torch.arange(pull.shape[1]) >= count) and (pull >= 0).all()


def test_completions_are_judged_where_they_were_drawn(chain, tmp_path, monkeypatch, capsys):
    shutil.copytree(chain[1], tmp_path / "out")
    seen, kept, lpips, generate = [], [], evaluate.lpips, evaluate.generate

    def spy_generate(*rest, keep=None, **how):
        kept.extend([] if keep is None or keep.all() else [keep])
        return generate(*rest, keep=keep, **how)

    def spy(drawn, truth, net):
        seen.append((drawn, truth, lpips(drawn, truth, net)))
        return seen[-1][2]
    monkeypatch.setattr(evaluate, "lpips", spy)
    monkeypatch.setattr(evaluate, "generate", spy_generate)
    code, printed = call(monkeypatch, capsys, "evaluate", "--out", tmp_path / "out", "--n", 6, "--device", "cpu",
                         "--models", tmp_path / "out" / "anyorder.pt:random", tmp_path / "out" / "ordered.pt:learned@4")
    assert code == 0 and len(seen) == 8, printed
    halves = {"left": (slice(None), slice(8)), "right": (slice(None), slice(8, None)), "top": (slice(8), slice(None)),
              "bottom": (slice(8, None), slice(None))}
    for half, keep, (drawn, truth, _) in zip(evaluate.HALVES, kept, seen):
        differs = torch.zeros(16, 16).bool()
        differs[halves[half]] = True
        assert torch.equal(keep.view(4, 4), ~differs[::4, ::4])
        assert (drawn == truth)[:, :, ~differs].all() and not (drawn == truth)[:, :, differs].all()
    report = json.loads((tmp_path / "out" / "results.json").read_text())
    row, several = report["rows"]
    assert row["nats"] > 0 and several["nats"] is several["step"] is None      # nats are those of one cell at a time
    few, every = report["floor"]["n"], report["held_out"]
    assert few == min(6, every // 2) and report["floor"]["real"] > 0 < report["floor"]["recon"]
    far = {half: found.mean().item() for half, (_, _, found) in zip(evaluate.HALVES, seen)}
    assert row["lpips_lower"] == pytest.approx(far["bottom"]) and row["lpips"] == pytest.approx(sum(far.values()) / 4)


def test_an_interrupted_tokenizer_is_resumed_by_the_command_that_began_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(anyorder, "make_tokens", lambda **how: print("resume", how["resume"]) or sys.exit(130))
    for exists, resume, expected in ((False, False, "resume False"), (False, True, "nothing to resume"),
                                     (True, False, "resume False"), (True, True, "resume True")):
        (tmp_path / "tokenizer_resume.pt").write_bytes(b"") if exists else None
        _, printed = call(monkeypatch, capsys, "anyorder", "--out", tmp_path, *["--resume"] * resume)
        assert expected in printed


@pytest.mark.parametrize("script, flags, needle", (
    ("anyorder", ("--data", "no/such/path"), "no/such/path"),
    ("anyorder", ("--width", 33), "32"),
    ("anyorder", ("--lr", "nan"), "learning rate"),
    ("anyorder", ("--steps", 0), "--steps"),
    ("anyorder", ("--device", "toaster"), "toaster"),
    ("anyorder", ("--stepps", 3), "--stepps"),
    ("anyorder", ("--resume",), "anyorder_resume.pt"),
    ("anyorder", ("--data", "sunsets", "--resume"), "made from other data, there is nothing to resume"),
    ("order_infer", ("--distance", "inf"), "distance"),
    ("order_infer", ("--model", "{out}/raster.pt"), "knows raster order only"),
    ("order_infer", ("--distance", -1), "distance"),
    ("order_infer", ("--data", "sunsets"), "python tokenizer.py"),
    ("finetune", ("--batch", 0), "--batch"),
    ("finetune", ("--resume",), "ordered_resume.pt"),
    ("sample", ("--caption", "low red zebrra"), "zebrra"),
    ("sample", ("--top-p", 0), "top-p"),
    ("sample", ("--model", "{out}/tokens.pt"), "tokens.pt"),
    ("sample", ("--model", "{out}/nothing.pt"), "nothing.pt"),
    ("sample", ("--model", "{out}/anyorder.pt", "--order", "learned"), "order head"),
))
def test_bad_input_gets_one_line_and_exit_code_2(chain, monkeypatch, capsys, script, flags, needle):
    _, out, _ = chain
    before = files_of(out)
    code, printed = call(monkeypatch, capsys, script, "--out", out, *(str(f).format(out=out) for f in flags))
    error = printed.strip().splitlines()[-1]
    assert code == 2 and error.startswith("error: ") and needle in error
    assert "Traceback" not in printed and files_of(out) == before


def test_a_few_images_fewer_than_a_batch_still_train(tmp_path, monkeypatch, capsys):
    pictures = picture_folder(tmp_path / "few", n=5, captions=False)
    code, printed = call(monkeypatch, capsys, "tokenizer", "--data", pictures, "--out", tmp_path / "out", "--size", 16,
                         "--codebook", 8, "--steps", 3)
    assert code == 0, printed
    code, printed = call(monkeypatch, capsys, "anyorder", "--out", tmp_path / "out", "--steps", 2, "--width", 32,
                         "--layers", 1)
    assert code == 0 and (tmp_path / "out" / "anyorder.png").exists(), printed


def test_every_parsed_flag_is_read():
    for script in SCRIPTS:
        source = (HERE / f"{script}.py").read_text()
        flags = [f.lstrip("-").replace("-", "_") for f in re.findall(r"add_argument\(\s*\"(--[\w-]+)\"", source)]
        if "arguments(" in source and script != "data":
            call_of = re.search(r"arguments\(__doc__(?:, flags=\(([^)]*)\))?", source)
            flags += (re.findall(r"\w+", call_of.group(1)) if call_of and call_of.group(1)
                      else ["data", "out", "seed", "device"])
        read = set(re.findall(r"args\.(\w+)", source))
        for group in re.findall(r"for (?:name|key)(?:, least)? in (\(.*?\)):", source, re.S):
            read |= set(re.findall(r"\"(\w+)\"", group))
        assert not set(flags) - read, f"{script}.py parses flags that nothing reads: {set(flags) - read}"


def test_imports_point_up_only():
    for i, script in enumerate(SCRIPTS):
        for node in ast.walk(ast.parse((HERE / f"{script}.py").read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else \
                [node.module] if isinstance(node, ast.ImportFrom) else []
            assert not set(names) & set(SCRIPTS[i:]), f"{script}.py imports {names}"


def test_the_readme_commands_run(tmp_path, monkeypatch):
    """Every `python ...` line of the README's code blocks, in the README's order, at tiny size."""
    pictures = picture_folder(tmp_path / "pictures")
    small = {"tokenizer": "--size 16 --codebook 16 --steps 3", "anyorder": "--steps 3 --batch 8 --width 32 --layers 2",
             "order_infer": "--limit 8", "finetune": "--steps 2 --batch 8", "sample": "--n 2", "evaluate": "--n 12",
             "data": ""}
    blocks = re.findall(r"```bash\n(.*?)```", (HERE / "README.md").read_text(), re.S)
    lines = [line.split("#")[0].strip() for block in blocks for line in block.splitlines()]
    commands = [piece.strip() for line in lines for piece in line.split("&&") if piece.strip().startswith("python ")]
    assert len(commands) >= 5
    first = command("tokenizer", "--data", pictures, "--out", tmp_path / "out", *small["tokenizer"].split())
    assert "PSNR" in first
    for text in commands:
        words = shlex.split(text)[1:]
        if not words[0].endswith(".py"):
            continue
        script = words[0][:-3]
        flags = [str(pictures) if previous == "--data" else word for previous, word in zip(words, words[1:])]
        if "--data" not in flags and script in ("tokenizer", "data"):
            flags += ["--data", str(pictures)]
        flags = [str(tmp_path / word) if word.startswith("out/") else word for word in flags]
        if "--out" in flags:
            at = flags.index("--out")
            del flags[at:at + 2]
        extra = [word for pair in zip(*[iter(small[script].split())] * 2) if pair[0] not in () for word in pair]
        command(script, *flags, *extra, "--out", tmp_path / "out")


# ---------------------------------------------------------------------------------------------------------------------
# Attention


def qkv(B=2, heads=3, T=9, d=4, dtype=torch.float64, seed=0, grad=False):
    """q, k, v as the model has them: views of one product, not contiguous."""
    x = torch.randn(B, T, 3, heads, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)
    return [part.requires_grad_(grad) for part in x.permute(2, 0, 3, 1, 4)]


@pytest.mark.parametrize("T, d", ((1, 4), (2, 4), (17, 4), (64, 4), (65, 4), (130, 4), (300, 4), (300, 32)))
@pytest.mark.parametrize("dtype, tolerance", ((torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 3e-2)))
def test_fused_attention_equals_the_reference(T, d, dtype, tolerance):
    """Up to 16 d keys the probabilities are kept, above they are computed again; of one block and of several."""
    ours = qkv(T=T, d=d, dtype=dtype, grad=True)
    truth = [x.detach().double().requires_grad_() for x in ours]
    a, b = anyorder.fused_attention(*ours), anyorder.reference_attention(*truth)
    assert a.dtype == dtype and a.shape == b.shape
    weight = torch.randn(b.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    a.backward(weight.to(dtype))
    b.backward(weight.to(dtype).double())
    torch.testing.assert_close(a.double(), b, rtol=tolerance, atol=tolerance)
    for x, y in zip(ours, truth):
        torch.testing.assert_close(x.grad.double(), y.grad, rtol=10 * tolerance, atol=10 * tolerance)


@pytest.mark.skipif(not (anyorder.kernels_run(torch.device("cuda"), torch.float32) if torch.cuda.is_available()
                         else anyorder.triton and os.getenv("TRITON_INTERPRET")),
                    reason="needs Triton, and a GPU or TRITON_INTERPRET=1")
@pytest.mark.parametrize("B, heads, T, C, d", ((2, 3, 1, 1, 32), (1, 2, 64, 65, 16), (2, 3, 65, 20, 32),
                                               (1, 2, 130, 200, 64)))
@pytest.mark.parametrize("dtype, tolerance", (      # Triton's interpreter cannot multiply bfloat16
    (torch.float32, 1e-5), (torch.bfloat16 if torch.cuda.is_available() else torch.float16, 3e-2)))
@pytest.mark.parametrize("alike", (True, False))
def test_the_kernels_equal_the_definition(B, heads, T, C, d, dtype, tolerance, alike):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    ours = [x.detach().to(device).requires_grad_() for x in qkv(B, heads, T, d, dtype)]
    truth = [x.detach().double().requires_grad_() for x in ours]
    q, k, v = ours if alike else (ours[0], ours[1].contiguous(), ours[2])
    a, b = anyorder.KernelAttention.apply(q, k, v), anyorder.reference_attention(*truth)
    weight = torch.randn(b.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(b)
    a.backward(weight.to(dtype))
    b.backward(weight.to(dtype).double())
    torch.testing.assert_close(a.double(), b, rtol=tolerance, atol=tolerance)
    for x, y in zip(ours, truth):
        torch.testing.assert_close(x.grad.double(), y.grad, rtol=10 * tolerance, atol=10 * tolerance)
    # candidates: the last row of causal attention, each
    own = [x.to(device) for x in qkv(B, heads, C, d, dtype, seed=2)]
    found, _ = anyorder.kernel_attention(own[0], k.detach(), v.detach(), *own[1:])
    for c in range(C):
        last = [torch.cat((past.double(), x[:, :, c:c + 1].double()), 2) for past, x in zip((k, k, v), own)]
        torch.testing.assert_close(found[:, :, c].double(), anyorder.reference_attention(*last)[:, :, -1],
                                   rtol=tolerance, atol=tolerance)


def test_kernels_that_do_not_run_are_not_used(monkeypatch):
    for fault in (NameError("name 'attend' is not defined"), RuntimeError("Failed to find C compiler"), None):
        def start(q, k, v):
            if fault:
                raise fault
        monkeypatch.setattr(anyorder, "kernel_attention", start)
        anyorder.kernels_run.cache_clear()
        assert anyorder.kernels_run(torch.device("cpu"), torch.float32) is (fault is None)
    anyorder.kernels_run.cache_clear()
    assert not anyorder.has_kernel(torch.zeros(1, 32))                     # not on a GPU


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("kind, tolerance", ((torch.float32, 1e-3), (torch.bfloat16, 0.15)))
def test_a_gpu_computes_what_a_cpu_does(kind, tolerance):
    model = tiny(rows=5, cols=5, codebook=7, order_head=True)              # more cells than FEW: by the kernels
    tokens, order = torch.randint(7, (3, 25)), random_order(3, 25)
    captions = ["sun", "", "sea sun"]
    found = {}
    for device in ("cpu", "cuda"):
        model = model.to(device)
        t, o = tokens.to(device), order.to(device)
        with torch.no_grad(), torch.autocast(device, kind, enabled=device == "cuda" and kind != torch.float32):
            drawing, offers = anyorder.Drawing(model, model.read(captions)), []
            for k in range(25):
                offers.append(drawing.look(o[:, k:]).float().log_softmax(-1))
                drawing.place(torch.zeros_like(o[:, :1]), t.gather(1, o[:, k:k + 1]))
            found[device] = [model.log_probs(t, captions, o).cpu(), *(offer.cpu() for offer in offers)]
    for a, b in zip(found["cpu"], found["cuda"]):
        assert (a.exp() - b.exp()).abs().max() < tolerance
    many = torch.zeros(2 ** 17, 1, 1, 32, device="cuda", dtype=kind, requires_grad=True)   # enough work for the kernels
    way = type(anyorder.fused_attention(many, many, many).grad_fn).__name__
    assert way.startswith("KernelAttention") is anyorder.kernels_run(many.device, kind)


@pytest.mark.parametrize("T", (1, 5, 20, 35))        # d = 4: beyond 16 the probabilities are computed again
def test_the_derived_gradient_is_the_gradient(T):
    assert torch.autograd.gradcheck(anyorder.fused_attention, [x.detach().requires_grad_() for x in qkv(1, 2, T)])


@pytest.mark.parametrize("size", (1, 2 ** 15, 2 ** 20))                    # of a block, in bytes: one head, some, all
def test_every_block_is_computed(monkeypatch, size):
    monkeypatch.setattr(anyorder, "BLOCK", size)
    ours = [x.detach().requires_grad_() for x in qkv(5, 3, 40)]
    theirs, weight = [x.detach().requires_grad_() for x in ours], torch.randn(5, 3, 40, 4, dtype=torch.float64)
    (anyorder.fused_attention(*ours) * weight).sum().backward()
    (anyorder.reference_attention(*theirs) * weight).sum().backward()
    for x, y in zip(ours, theirs):
        torch.testing.assert_close(x.grad, y.grad)


def test_blocks_of_three_heads_and_six_rows_by_hand(monkeypatch):
    """16 * 2 / 8 = 4 rows would be best, so two blocks share six. 250 bytes hold the 3 x 6 scores of one head."""
    monkeypatch.setattr(anyorder, "BLOCK", 250)
    found = list(anyorder.blocks(3, 6, torch.zeros(0, dtype=torch.float64)))
    assert [(some.start, some.stop, start, end) for some, start, end, _ in found] == [
        (0, 1, 3, 6), (0, 1, 0, 3), (1, 2, 3, 6), (1, 2, 0, 3), (2, 3, 3, 6), (2, 3, 0, 3)]
    assert (found[0][3] == -math.inf).int().tolist() == [[0, 0, 0, 0, 1, 1], [0, 0, 0, 0, 0, 1], [0] * 6]
    assert (found[1][3] == -math.inf).int().tolist() == [[0, 1, 1], [0, 0, 1], [0] * 3]


@pytest.mark.parametrize("T", (9, 70, 200))
def test_later_tokens_leave_earlier_attention_bit_identical(T):
    q, k, v = qkv(T=T, dtype=torch.float32)
    before = anyorder.fused_attention(q, k, v)
    for x in (q, k, v):
        x[:, :, T // 2:] = 7
    after = anyorder.fused_attention(q, k, v)
    assert torch.equal(before[:, :, :T // 2], after[:, :, :T // 2])


def test_long_sequences_never_hold_the_square():
    T, largest = 1024, []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            largest.extend(x.numel() for x in (result if isinstance(result, (tuple, list)) else [result])
                           if isinstance(x, torch.Tensor))
            return result

    q, k, v = (x.detach().requires_grad_() for x in qkv(2, 4, T, 16, torch.float32))
    with Watch():
        anyorder.fused_attention(q, k, v).sum().backward()
    assert max(largest) <= 2 * 4 * T * 128 < 2 * 4 * T * T / 2             # one block of rows at most
    found = anyorder.fused_attention(q, k, v)          # held: with it go what it saved
    saved = found.grad_fn.saved_tensors
    assert sum(x.numel() for x in saved) < 4 * q.numel()


@pytest.mark.parametrize("C, T", ((1, 0), (5, 0), (1, 1), (1, 30), (5, 3), (7, 64), (40, 9)))
@pytest.mark.parametrize("dtype, tolerance", ((torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 3e-2)))
def test_candidate_attention_equals_one_softmax_per_candidate(C, T, dtype, tolerance):
    q, k, v = qkv(3, 2, C, 8, dtype)
    cache = torch.randn(2, 3, 2, 100, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).to(dtype)
    past_k, past_v = cache[:, :, :, :T]                                    # a slice of a larger cache
    found = anyorder.candidate_attention(q, k, v, past_k, past_v)
    for c in range(C):                                                     # the last row of causal attention
        one = [torch.cat((past.double(), x[:, :, c:c + 1].double()), 2) for past, x in ((past_k, k), (past_v, v))]
        scores = (q[:, :, c:c + 1].double() @ one[0].mT) / math.sqrt(8)
        torch.testing.assert_close(found[:, :, c:c + 1].double(), scores.softmax(-1) @ one[1],
                                   rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("scale", (1, 5, 8, 30, 100))   # so that one is 2 to 18,945 above its own
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_candidate_attention_survives_large_scores(scale, dtype):
    q, k, v = (scale * x for x in qkv(4, 1, 3, 4, torch.float32))
    q, k, v, past_k, past_v = (x.to(dtype) for x in (q, k, v, k.flip(2), v.flip(2)))
    found = anyorder.candidate_attention(q, k, v, past_k, past_v)
    truth = evaluate.masked_candidates(*(x.double() for x in (q, k, v, past_k, past_v)))
    if dtype == torch.float32:
        torch.testing.assert_close(found, truth.float(), rtol=1e-3, atol=1e-3)
    assert found.isfinite().all() and (found.abs() <= 1.01 * torch.cat((v, past_v)).abs().max()).all()


# ---------------------------------------------------------------------------------------------------------------------
# data.py


def picture(path, colour="red", size=(8, 8), mode="RGB", **options):
    """A one-colour image file, its folders made on the way."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    Image.new(mode, size, colour).save(path, **options)


def everything(path, size=8):
    """{file name: caption} of a folder, both splits; each image decoded."""
    found = {}
    for split in ("train", "test"):
        with contextlib.suppress(UserError):  # one split of a tiny folder may be empty
            dataset = open_data(path, size, split)
            for i, name in enumerate(dataset.checked[0]):
                image, caption = dataset[i]
                assert image.shape == (3, size, size) and image.dtype == torch.uint8 and caption == dataset.captions[i]
                found[name] = caption
    return found


# ---------------------------------------------------------------- folders

def test_caption_comes_from_metadata_then_text_then_folder_then_nothing(tmp_path):
    for name in ("a/1.png", "a/2.PNG", "a/b/3.Jpeg", "4.webp", "5.gif", "6.bmp", "7.TIF"):
        picture(str(tmp_path / name))
    (tmp_path / "metadata.csv").write_text('file_name,text\n".\\a\\1.png", "one, two\nthree"\n4.webp,\ngone.png,lost\n')
    (tmp_path / "a/1.txt").write_text("the row wins")
    (tmp_path / "a/2.txt").write_text("beside\nit \x1b[31m")
    (tmp_path / "4.txt").write_text("an empty row wins too")
    assert everything(tmp_path) == {"a/1.png": "one, two three", "a/2.PNG": "beside it [31m", "a/b/3.Jpeg": "b",
                                    "4.webp": "", "5.gif": "", "6.bmp": "", "7.TIF": ""}
    assert open_data(tmp_path).unused_rows == 1


def test_split_is_a_tenth_and_never_moves_when_images_are_added(tmp_path):
    for i in range(40):
        picture(str(tmp_path / f"{i}.bmp"), size=(1, 1))
    before = {split: set(open_data(tmp_path, 1, split).checked[0]) for split in ("train", "test")}
    for i in range(40, 60):
        picture(str(tmp_path / f"{i}.bmp"), size=(1, 1))
    after = {split: set(open_data(tmp_path, 1, split).checked[0]) for split in ("train", "test")}
    assert before["test"] and before["train"] < after["train"] and before["test"] <= after["test"]
    assert not after["train"] & after["test"] and len(after["train"] | after["test"]) == 60
    assert 80 < sum(held_out(f"{i}.png") for i in range(1000)) < 120


def test_fingerprint_of_a_folder_is_that_of_both_splits_and_all_sizes_and_sees_changes(tmp_path):
    for i in range(30):
        picture(str(tmp_path / f"{i}.png"))
    first = open_data(tmp_path, 8, "train").fingerprint
    assert first == open_data(tmp_path, 16, "test").fingerprint
    (tmp_path / "3.txt").write_text("another caption")
    second = open_data(tmp_path).fingerprint
    picture(str(tmp_path / "30.png"))
    assert len({first, second, open_data(tmp_path).fingerprint}) == 3


def centre(path, size=8):
    return read_image(str(path), size)[:, size // 2, size // 2].tolist()


def test_every_mode_becomes_rgb_over_white(tmp_path):
    half = tmp_path / "half.png"
    picture(str(half), (255, 0, 0, 0), mode="RGBA")
    assert centre(half) == [255, 255, 255]  # red, but fully transparent
    picture(str(half), (0, 0, 0, 128), mode="RGBA")
    assert centre(half) == [127] * 3
    picture(str(tmp_path / "la.png"), (0, 0), mode="LA")
    assert centre(tmp_path / "la.png") == [255] * 3
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([255, 0, 0, 0, 0, 255])
    palette.save(tmp_path / "p.png")
    assert centre(tmp_path / "p.png") == [0, 0, 255]
    palette.save(tmp_path / "pt.png", transparency=1)
    assert centre(tmp_path / "pt.png") == [255] * 3
    palette.save(tmp_path / "pt.gif", transparency=1)
    assert centre(tmp_path / "pt.gif") == [255] * 3
    Image.new("RGB", (8, 8), (9, 9, 9)).save(tmp_path / "key.png", transparency=(9, 9, 9))
    assert centre(tmp_path / "key.png") == [255] * 3
    picture(str(tmp_path / "bit.png"), 1, mode="1")
    assert centre(tmp_path / "bit.png") == [255] * 3
    picture(str(tmp_path / "ink.jpg"), (0, 255, 255, 0), mode="CMYK", quality=95)
    assert centre(tmp_path / "ink.jpg")[0] > 240 > 20 > centre(tmp_path / "ink.jpg")[1]
    for value, expected in ((65535, 255), (32768, 128), (0, 0)):
        grey = np.full((8, 9), value, np.uint16)
        Image.fromarray(grey).save(tmp_path / "deep.png")
        assert centre(tmp_path / "deep.png") == [expected] * 3
        Image.fromarray(grey).save(tmp_path / "deep.tif")
        assert centre(tmp_path / "deep.tif") == [expected] * 3
        Image.fromarray(grey.astype(np.int32)).save(tmp_path / "long.tif")
        assert centre(tmp_path / "long.tif") == [expected] * 3
    Image.fromarray(np.full((8, 8), 0.5, np.float32)).save(tmp_path / "float.tif")
    assert centre(tmp_path / "float.tif") == [128] * 3
    Image.fromarray(np.array([[0, 255.0], [0, 255]], np.float32).repeat(8, 0).repeat(8, 1)).save(tmp_path / "float.tif")
    assert read_image(tmp_path / "float.tif", 8)[0, 0, [0, 7]].tolist() == [0, 255]
    odd = np.full((8, 8), 100, np.float32)
    odd[0, 0], odd[5, 5] = np.nan, np.inf                                      # the rest stays what it is
    odd[7, 7] = 200
    Image.fromarray(odd).save(tmp_path / "float.tif")
    assert read_image(tmp_path / "float.tif", 8)[0, [0, 0, 5, 7], [0, 7, 5, 7]].tolist() == [0, 128, 0, 255]


def test_first_frame_of_an_animation(tmp_path):
    frames = [Image.new("RGB", (8, 8), c) for c in ("red", "blue", "green")]
    for ending in ("gif", "webp", "png", "tif"):
        frames[0].save(tmp_path / f"film.{ending}", save_all=True, append_images=frames[1:])
        red, green, blue = centre(tmp_path / f"film.{ending}")
        assert red > 240 and green < 15 and blue < 15


@pytest.mark.parametrize("orientation", range(0, 10))
@pytest.mark.parametrize("ending", ["jpg", "png", "webp", "tif"])
def test_exif_rotation(tmp_path, orientation, ending):
    image = render_sunset(3, 24)[0].permute(1, 2, 0).numpy()[:16]
    path, exif = str(tmp_path / f"turned.{ending}"), Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(image).save(path, exif=exif, **({"quality": 100} if ending in ("jpg", "webp") else {}))
    upright = ImageOps.exif_transpose(Image.open(path)).convert("RGB")
    left, top = (upright.width - 16) // 2, (upright.height - 16) // 2
    expected = np.array(upright.crop((left, top, left + 16, top + 16)))
    assert np.abs(read_image(path, 16).permute(1, 2, 0).numpy().astype(int) - expected).max() <= 2


def test_short_side_is_resized_and_the_centre_cropped(tmp_path):
    wide = np.zeros((20, 60, 3), np.uint8)
    wide[:, 20:40] = 200
    Image.fromarray(wide).save(tmp_path / "wide.png")
    assert (read_image(tmp_path / "wide.png", 10)[:, :, 1:-1] > 190).all()
    picture(str(tmp_path / "dot.png"), size=(1, 1))
    picture(str(tmp_path / "line.png"), size=(3, 5000))
    assert centre(tmp_path / "dot.png") == centre(tmp_path / "line.png") == [255, 0, 0]


@pytest.mark.skipif(sys.platform != "linux", reason="other systems forbid such names, links and pipes")
def test_broken_files_are_skipped_counted_and_named_once(tmp_path, capsys):
    whole = tmp_path / "good.png"
    for i in range(30):
        picture(str(tmp_path / f"fine/{i}.png"))
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(whole)
    raw, bad = whole.read_bytes(), tmp_path / "bad"
    bad.mkdir()
    (bad / "cut.png").write_bytes(raw[:len(raw) // 2])
    (bad / "empty.jpg").write_bytes(b"")
    (bad / "text.gif").write_bytes(b"hello")
    (bad / "script.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    ihdr = struct.pack(">II5B", 60000, 60000, 8, 2, 0, 0, 0)  # a bomb: 10 GB when decoded
    (bad / "bomb.png").write_bytes(raw[:12] + b"IHDR" + ihdr + struct.pack(">I", zlib.crc32(b"IHDR" + ihdr)) + raw[33:])
    os.symlink("nowhere.png", bad / "dangling.png")
    os.symlink("circle.png", bad / "circle.png")
    os.symlink("..", bad / "up")
    os.symlink(tmp_path, bad / "round.png")
    os.mkfifo(bad / "pipe.png")
    (bad / "._photo.jpg").write_bytes(b"left by macOS")
    (bad / "wrong ending.jpg").write_bytes(raw)
    (bad / "line\nbreak \U0001f305 \x1b.png").write_bytes(raw)
    with open(os.fsencode(bad) + b"/\xff\xfe.png", "wb") as file:
        file.write(raw)
    names = everything(tmp_path)
    assert {n for n in names if n.startswith("bad/")} == {"bad/wrong ending.jpg", "bad/line\nbreak \U0001f305 \x1b.png",
                                                         "bad/\udcff\udcfe.png"}
    sets = [open_data(tmp_path, 8, split) for split in ("train", "test")]
    skipped = [line.split(" (")[0] for dataset in sets for line in dataset.skipped]
    assert sorted(skipped) == [f"bad/{n}" for n in ("bomb.png", "circle.png", "cut.png", "dangling.png", "empty.jpg",
                                                    "pipe.png", "script.png", "text.gif")]
    describe(sets[0])
    out = capsys.readouterr().out
    assert f"{len(sets[0])} images" in out and f"skipped {len(sets[0].skipped)}" in out
    assert all(out.count(line) == 1 for line in sets[0].skipped) and len(out.splitlines()) == 2


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="other systems have no such permissions")
def test_unreadable_permissions_are_skipped():
    with tempfile.TemporaryDirectory() as folder:      # root may read everything, so here root is nobody for a moment
        for name in ("a.png", "b.png", "locked/c.png"):
            picture(f"{folder}/{name}")
        os.chmod(folder, 0o755)
        os.chmod(f"{folder}/b.png", 0)
        os.chmod(f"{folder}/locked", 0)
        me = os.geteuid()
        try:
            os.seteuid(me or 65534)
            assert set(everything(folder)) == {"a.png"}
        finally:
            os.seteuid(me)
            os.chmod(f"{folder}/locked", 0o700)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_broken_exif_block_does_not_spoil_the_picture(tmp_path):
    picture(str(tmp_path / "a.jpg"), exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff" + bytes(range(40)))
    assert centre(tmp_path / "a.jpg")[0] > 240


def test_a_data_loader_with_workers_reads_a_folder_with_broken_files(tmp_path):
    for i in range(20):
        picture(str(tmp_path / f"{i}.png"))
        (tmp_path / f"broken{i}.png").write_bytes((tmp_path / f"{i}.png").read_bytes()[:40])
    dataset = open_data(tmp_path, 8)
    batches = list(torch.utils.data.DataLoader(dataset, batch_size=7, num_workers=2))
    assert sum(len(images) for images, _ in batches) == len(dataset) == sum(len(captions) for _, captions in batches)


@slow
@pytest.mark.skipif(sys.platform != "linux", reason="others count memory in other units")
def test_a_folder_takes_the_memory_of_one_image_per_worker(tmp_path):
    """40 images of 18 MB, of which the four threads that check a folder decode one each."""
    picture(str(tmp_path / "0.png"), size=(3000, 2000))
    for i in range(1, 40):
        os.symlink("0.png", tmp_path / f"{i}.png")
    program = ("import resource, sys; from data import open_data\n"
               "most = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
               "before, dataset = most(), open_data(sys.argv[1], 32)\n"
               "n = sum(1 for i in range(len(dataset)) if dataset[i])\n"
               "print(n, (most() - before) // 1024)")
    done = subprocess.run([sys.executable, "-c", program, tmp_path], capture_output=True, text=True, cwd=HERE)
    n, megabytes = map(int, done.stdout.split())
    assert n > 30 and megabytes < 4 * 3 * 18           # at most the image, a copy, and the decoder


# ---------------------------------------------------------------- IDX files

def idx(path, array, cut=None):
    raw = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()
    path.parent.mkdir(exist_ok=True, parents=True)
    with (gzip.open if path.suffix == ".gz" else open)(path, "wb") as file:
        file.write(raw[:cut])


@pytest.mark.parametrize("gz", ["", ".gz"])
@pytest.mark.parametrize("place, words", [("digits", ["3", "9"]), ("fashion", ["dress", "boot"]),
                                          ("FashionMNIST/raw", ["dress", "boot"]), ("fashion/digits", ["3", "9"])])
def test_idx_files(tmp_path, gz, place, words):
    folder, images = tmp_path / place, np.arange(2 * 28 * 28, dtype=np.uint8).reshape(2, 28, 28)
    for part, n in (("train", 2), ("t10k", 1)):
        idx(folder / f"{part}-images-idx3-ubyte{gz}", images[:n])
        idx(folder / f"{part}-labels-idx1-ubyte{gz}", np.array([3, 9][:n], np.uint8))
    for path in (folder, folder / f"train-images-idx3-ubyte{gz}", folder / f"t10k-labels-idx1-ubyte{gz}"):
        train, test = open_data(path, 28), open_data(path, 28, "test")
        assert [caption for _, caption in (train[0], train[1])] == words and len(train) == 2 and len(test) == 1
        assert torch.equal(train[1][0], torch.from_numpy(images[1]).expand(3, 28, 28))
        assert open_data(path, 32)[0][0].shape == (3, 32, 32) and train.fingerprint == test.fingerprint


def test_idx_without_test_files_holds_a_tenth_back(tmp_path):
    idx(tmp_path / "train-images-idx3-ubyte", np.zeros((200, 2, 2), np.uint8))
    train, test = open_data(tmp_path, 2), open_data(tmp_path, 2, "test")
    assert len(train) + len(test) == 200 and 5 < len(test) < 40 and train.captions == [""] * len(train)


@pytest.mark.parametrize("gz", ["", ".gz"])
def test_idx_sizes_are_checked_before_memory_is_taken(tmp_path, gz):
    path = tmp_path / f"train-images-idx3-ubyte{gz}"
    for raw, message in ((bytes([0, 0, 8, 3]) + struct.pack(">3I", 2 ** 31, 2 ** 31, 1), "claims"),
                         (bytes([0, 0, 8, 3]) + struct.pack(">3I", 2 ** 20, 28, 28) + b"x" * 90, "claims"),
                         (bytes([0, 0, 8, 3]) + struct.pack(">3I", 2, 2, 2) + b"1234567",
                          "shorter" if gz else "claims"),
                         (bytes([0, 0, 8, 3]) + struct.pack(">3I", 0, 28, 28), "claims"),
                         (bytes([0, 0, 8, 3]) + struct.pack(">3I", 1, 2, 2) + b"12345", "longer"),
                         (bytes([0, 0, 13, 3]) + struct.pack(">3I", 1, 1, 1) + b"1", "not an IDX"),
                         (b"\0\0", "not an IDX"), (b"", "not an IDX")):
        path.write_bytes(gzip.compress(raw) if gz else raw)
        with pytest.raises(UserError, match=message) as caught:
            open_data(tmp_path)
        assert len(str(caught.value).splitlines()) == 1
    path.write_bytes(gzip.compress(b"\0\0\x08\x03")[:12])
    with pytest.raises(UserError):
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
    assert torch.equal(train[7][0], render_sunset(7)[0]) and torch.equal(test[0][0], render_sunset(45_000)[0])
    assert train.captions[7] == train[7][1] and set(test.captions) == set(train.captions)
    assert len({train[i][0].numpy().tobytes() for i in range(300)}) == 300
    with pytest.raises(IndexError):
        train[45_000]


def test_a_sunset_is_the_same_picture_at_every_size():
    for i in range(12):
        small, large = render_sunset(i, 32)[0].float(), render_sunset(i, 128)[0].float()
        assert (small - torch.nn.functional.avg_pool2d(large, 4)).abs().mean() < 4  # of 255


def test_sunset_labels_say_where_the_sun_is_and_the_caption_agrees():
    sun = SUNSET_LABELS.index("sun")
    for i in range(60):
        image, caption, labels = render_sunset(i, 64)
        assert labels.dtype == torch.uint8 and int(labels.max()) < len(SUNSET_LABELS)
        rows, columns = (labels == sun).nonzero().T
        x, y = columns.float().mean() / 64, rows.float().mean() / 64
        assert ("left" in caption, "middle" in caption, "right" in caption) == (x < 0.36, 0.36 < x < 0.64, x > 0.64)
        assert ("low" in words_of(caption)) == (y > 0.4)
        assert ("no clouds" in caption) == (not (labels == SUNSET_LABELS.index("cloud")).any())
        column = (labels == SUNSET_LABELS.index("reflection")).nonzero()[:, 1].float().mean() / 64
        assert abs(column - x) < 0.08  # the glitter lies below the sun
        inside = image[:, labels == sun].float().mean(1)
        assert inside.sum() > image.float().mean((1, 2)).sum()  # nothing is as bright


def test_the_sun_decides_the_colour_of_the_clouds():
    lit = {}
    for i in range(200):
        image, caption, labels = render_sunset(i)
        cloud = labels == SUNSET_LABELS.index("cloud")
        if cloud.any():
            lit.setdefault(caption.split()[1], []).append(image[:, cloud].float().mean(1))
    means = {colour: torch.stack(values).mean(0) for colour, values in lit.items()}
    guesses = [min(means, key=lambda c: (value - means[c]).norm()) == colour for colour in lit for value in lit[colour]]
    assert len(means) == 5 and sum(guesses) > 0.85 * len(guesses)  # the nearest mean names the sun


# ---------------------------------------------------------------- shared tools

def test_words_of_and_printable():
    assert words_of("T-shirt, red_2 \u00c9t\u00e9!") == ["t", "shirt", "red", "2", "\u00e9t\u00e9"]
    assert words_of("") == []
    assert printable("a\nb\x1b\udcff\U0001f305") == "a\\nb\\x1b\\udcff\U0001f305"


def test_bytes_and_floats_convert_by_rounding():
    everything = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(to_float(everything)), everything)
    assert to_uint8(torch.tensor([-9, 9, 0.999, float("nan")])).tolist() == [0, 255, 255, 128]


def test_sheet_places_images_row_by_row():
    images = torch.zeros(3, 3, 2, 4, dtype=torch.uint8)
    images[1], images[2] = 50, 100
    page = np.array(sheet(images, 2, scale=3, gap=1))
    assert page.shape == (2 * 7 + 1, 2 * 13 + 1, 3)
    assert page[0, 0, 0] == 255 and page[1, 1, 0] == 0 and page[6, 14 + 11, 0] == 50 and page[8, 1, 0] == 100
    assert np.array_equal(np.array(sheet(to_float(images), 2, 3, 1)), page)
    assert sheet(images, 8).size == (3 * 6 + 2, 6)


def test_fingerprint_tells_contents_apart():
    parts = ["ab", b"ab", ["ab"], ["a", "b"], {"a": "b"}, {"a": 1}, {"a": 1.0}, {"a": None}, 1, "1", True,
             torch.zeros(2), torch.zeros(2, 1), torch.zeros(2, dtype=torch.int32), torch.tensor(0.0), torch.zeros(0)]
    assert len({fingerprint(part) for part in parts} | {fingerprint("a", "b"), fingerprint()}) == len(parts) + 2
    assert fingerprint({"a": 1, "b": [2]}) == fingerprint({"b": [2], "a": 1})
    assert fingerprint(torch.arange(6).reshape(2, 3).T) == fingerprint(torch.arange(6).reshape(2, 3).T.contiguous())


GOOD = dict(kind="tokens", version=1, config=dict(rows=2), made_from=dict(data="0"), tokens=torch.arange(64))


def test_save_replaces_the_file_as_a_whole(tmp_path):
    path = str(tmp_path / "new" / "a.pt")
    save(path, GOOD)
    contents = load(path, "tokens", "python tokenizer.py")
    assert torch.equal(contents["tokens"], GOOD["tokens"]) and contents["config"] == {"rows": 2}
    with pytest.raises(ZeroDivisionError):
        with replacing(path) as file:
            file.write(b"half")
            1 / 0
    assert torch.equal(load(path, "tokens", "")["tokens"], GOOD["tokens"]) and os.listdir(tmp_path / "new") == ["a.pt"]


@pytest.mark.skipif(sys.platform == "win32", reason="needs a limit on the size of a file")
def test_a_full_disk_gives_one_line_and_keeps_the_old_file(tmp_path):
    path = str(tmp_path / "a.pt")
    save(path, GOOD)
    script = ("import resource, signal, torch; from data import run, save\n"
              "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
              "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
              f"run(lambda: save({path!r}, dict(kind='tokens', x=torch.zeros(10**6))))")
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True,
                          cwd=os.path.dirname(os.path.abspath(data.__file__)))
    assert done.returncode == 2 and done.stderr.startswith("error: ") and len(done.stderr.splitlines()) == 1
    assert os.listdir(tmp_path) == ["a.pt"] and load(path, "tokens", "")["kind"] == "tokens"


class Bomb:
    """Pickles as a call that is made when it is loaded."""
    def __init__(self, function, argument):
        self.call = function, (argument,)

    def __reduce__(self):
        return self.call


def test_load_refuses_what_it_should_in_one_line(tmp_path):
    path, bomb = tmp_path / "a.pt", Bomb(os.mkdir, str(tmp_path / "exploded"))

    def refused(message):
        with pytest.raises(UserError, match=message) as caught:
            load(path, "tokens", "python tokenizer.py")
        assert "python tokenizer.py" in str(caught.value) and len(str(caught.value).splitlines()) == 1
    refused("does not exist")
    torch.save(GOOD, path)
    raw = path.read_bytes()
    path.write_bytes(raw[:-20])
    refused("damaged")
    path.write_bytes(b"")
    refused("damaged")
    where = raw.index(GOOD["tokens"].numpy().tobytes()) + 100
    path.write_bytes(raw[:where] + bytes([raw[where] ^ 1]) + raw[where + 1:])  # one bit of a weight
    refused("damaged")
    for contents, message in (([1], "not a .pt file of this"), ({}, "not a .pt file of this"),
                              ({**GOOD, "version": True}, "not a .pt file of this"),
                              ({**GOOD, "kind": "orders"}, "holds orders"), ({**GOOD, "version": 2}, "version 2"),
                              ({**GOOD, "x": torch.zeros(1).expand(10 ** 12)}, "damaged"),
                              ({**GOOD, "x": bomb}, "damaged"), ({**GOOD, "x": Bomb(bytearray, 2 ** 40)}, "damaged")):
        torch.save(contents, path)
        refused(message)
    path.write_bytes(pickle.dumps(bomb))
    refused("damaged")
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", b"\0" * 10 ** 6)
    refused("damaged")
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("error, code, line", [
    (UserError("size 7: expected 8"), 2, "error: size 7: expected 8\n"),
    (UserError("Caught UserError in DataLoader worker\nTraceback\ndata.UserError: a is gone"), 2, "error: a is gone\n"),
    (KeyboardInterrupt(), 130, "stopped\n"),
    (PermissionError(13, "Permission denied", "out/x\n.pt"), 2, "error: out/x\\n.pt: Permission denied\n"),
    (OSError(28, "No space left on device"), 2, "error: writing: No space left on device\n"),
    (MemoryError(), 2, data.TOO_LARGE + "\n")])
def test_run_turns_errors_into_one_line(capsys, error, code, line):
    def main():
        raise error
    with pytest.raises(SystemExit) as caught:
        run(main)
    assert caught.value.code == code and capsys.readouterr().err == line


def test_run_knows_how_torch_says_that_memory_is_out(capsys):
    with pytest.raises(SystemExit) as caught:
        run(lambda: torch.empty(2 ** 55))
    assert caught.value.code == 2 and capsys.readouterr().err == data.TOO_LARGE + "\n"


def test_run_leaves_bugs_alone_and_returns_when_all_is_well():
    run(lambda: None)
    with pytest.raises(ZeroDivisionError):
        run(lambda: 1 / 0)


@pytest.mark.skipif(not sys.platform.startswith("linux") or not hasattr(ctypes.CDLL(None), "mallopt"),
                    reason="no glibc")
def test_freed_memory_is_not_fetched_page_by_page_again():
    """Blocks of 20 MB together, taken and freed: after some warming up, no page is new. (10,000 are, by default.)"""
    program = ("import resource, torch, data; data.keep_memory()\nfor i in range(15):\n    if i == 5:\n"
               "        first = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
               "    [torch.ones(1_000_000) for _ in range(5)]\n"
               "print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - first)")
    done = subprocess.run([sys.executable, "-c", program], cwd=HERE, capture_output=True, text=True)
    assert int(done.stdout) < 500, done.stderr


def test_bad_arguments_are_one_line(tmp_path):
    for bad in (dict(path=str(tmp_path / "no such\nplace")), dict(split="dev"), dict(size=0), dict(size=-3),
                dict(size=2.5), dict(size=10 ** 6), dict(path=str(tmp_path)), dict(path=__file__), dict(path=""),
                dict(path="a\0b")):
        with pytest.raises(UserError) as caught:
            open_data(**bad)
        assert len(str(caught.value).splitlines()) == 1
    (tmp_path / "a.png").write_bytes(b"not an image")
    for split in ("train", "test"):
        with pytest.raises(UserError, match="none of 1 images can be read"):
            open_data(tmp_path, split=split)
    (tmp_path / "metadata.csv").write_text("image;words\n")
    with pytest.raises(UserError, match="expected file_name,text"):
        open_data(tmp_path)
    (tmp_path / "metadata.csv").write_text('file_name,text\na.png,"' + "x" * 200_000)
    with pytest.raises(UserError, match="csv"):
        open_data(tmp_path)
    for text, message in (("a.png,red, big bird", "line 3 has more than 2 columns.*double quotes"),
                          ('a.png,"a red bird\nb.png,blue', "no readable csv")):
        (tmp_path / "metadata.csv").write_text("file_name,text\nb.png,sun\n" + text + "\n")
        with pytest.raises(UserError, match=message):
            open_data(tmp_path)
    for name in ("gpu", "cuda:99", "meta", "cpu\n"):
        with pytest.raises(UserError, match="not available"):
            pick_device(name)
    assert pick_device("cpu").type == "cpu" and pick_device().type in ("cpu", "cuda", "mps")


def test_the_gpu_that_is_asked_for_becomes_the_current_one(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch, "empty", lambda *shape, device: None)       # as if there were two
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    names = ["cuda:1", "cuda", "cpu"]
    assert [pick_device(name) for name in names] == [torch.device(name) for name in names]
    assert chosen == [torch.device("cuda:1")]


def test_shared_flags():
    args = arguments("Some words.\n\nMore.").parse_args(["--data", "x", "--seed", "-1"])
    assert args.data == "x" and args.out == "out" and args.device == "" and 0 <= args.seed < 2 ** 63
    for wrong in (["--seed", "x"], ["--dat", "x"], ["stray"]):
        with pytest.raises(UserError, match="--help"):
            arguments("Some words.").parse_args(wrong)


def test_command_line_writes_a_contact_sheet_and_reads_every_flag(tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"

    def sheet_of(*flags):
        monkeypatch.setattr(sys, "argv", ["data.py", "--out", str(out), "--size", "16", *flags])
        run(data.main)
        assert len(capsys.readouterr().out.splitlines()) == 26
        return (out / "data.png").read_bytes()
    first = sheet_of()
    assert Image.open(out / "data.png").size == (8 * 98 + 2, 3 * 98 + 2) and sheet_of() == first
    for i in range(40):
        picture(str(tmp_path / f"own/{i}.png"))
    last = sheet_of("--data", str(tmp_path / "own"))
    assert len({first, sheet_of("--seed", "1"), sheet_of("--split", "test"), sheet_of("--size", "8"), last}) == 5
    before = (out / "data.png").read_bytes()
    for flags in (["--data", str(tmp_path / "none")], ["--split", "x"], ["--size", "0"], ["--size", "x"],
                  ["--out", __file__]):
        with pytest.raises(SystemExit) as caught:
            sheet_of(*flags)
        assert caught.value.code == 2 and len(capsys.readouterr().err.splitlines()) == 1
        assert (out / "data.png").read_bytes() == before


# ---------------------------------------------------------------- a thousand mutations

def mutated(raw, rng):
    """Bytes with flipped bits, a cut end, a repeated piece, or two pieces swapped."""
    raw = bytearray(raw)
    kind = rng.randrange(4)
    if kind == 0:
        for _ in range(rng.choice((1, 4, 64))):
            raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
    elif kind == 1:
        del raw[rng.randrange(len(raw)):]
    else:
        a, b, n = rng.randrange(len(raw)), rng.randrange(len(raw)), rng.randrange(1, 64)
        raw[a:a + n], raw[b:b + n] = raw[b:b + n], raw[a:a + n] if kind == 2 else raw[b:b + n]
    return bytes(raw)


@slow
@pytest.mark.filterwarnings("ignore")
def test_a_thousand_mutated_images_are_read_or_skipped(tmp_path, capfd):
    image, rng = Image.fromarray(render_sunset(5, 40)[0].permute(1, 2, 0).numpy()), random.Random(0)
    exif = Image.Exif()
    exif[0x0112] = 6
    seeds = []
    for ending, options in (("png", {}), ("jpg", {}), ("jpg", dict(progressive=True)), ("bmp", {}),
                            ("webp", {}), ("webp", dict(lossless=True)),
                            ("gif", dict(save_all=True, append_images=[image])),
                            ("tif", {}), ("tif", dict(compression="tiff_lzw")), ("tif", dict(compression="jpeg"))):
        options |= dict(exif=exif) if ending in ("png", "jpg", "webp") else {}
        image.save(tmp_path / f"seed.{ending}", **options)
        seeds.append((ending, (tmp_path / f"seed.{ending}").read_bytes()))
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(1000):
        ending, raw = seeds[i % len(seeds)]
        (folder / f"{i}.{ending}").write_bytes(mutated(raw, rng))
    total = 0
    for split in ("train", "test"):
        dataset = open_data(folder, 16, split)
        assert all(dataset[i][0].shape == (3, 16, 16) for i in range(len(dataset)))
        total += len(dataset) + len(dataset.skipped)
    assert total == 1000
    out, err = capfd.readouterr()
    assert "Traceback" not in err and not out


@slow
def test_a_thousand_mutated_pt_files_load_whole_or_give_one_line(tmp_path):
    save(tmp_path / "a.pt", GOOD)
    save(tmp_path / "b.pt", {**GOOD, "kind": "orders", "weights": torch.randn(300)})
    raws, rng, loaded = [(tmp_path / f"{name}.pt").read_bytes() for name in "ab"], random.Random(0), 0
    for i in range(1000):
        (tmp_path / "c.pt").write_bytes(mutated(raws[i % 2], rng) if i % 10 else
                                        raws[0][:rng.randrange(len(raws[0]))] + raws[1][rng.randrange(len(raws[1])):])
        try:
            contents = load(tmp_path / "c.pt", "tokens", "python tokenizer.py")
            assert torch.equal(contents["tokens"], GOOD["tokens"]) and contents["config"] == GOOD["config"]
            loaded += 1
        except UserError as error:
            assert len(str(error).splitlines()) == 1
    assert loaded < 500


# ---------------------------------------------------------------------------------------------------------------------
# tokenizer.py


ROOT = Path(tokenizer.__file__).parent


def small_tokenizer(size=16, downsample=4, codebook=32, seed=0):
    torch.manual_seed(seed)
    return Tokenizer(dict(size=size, downsample=downsample, codebook=codebook, width=16, fine=8, dim=8))


def some_sunsets(n, size=16, split="train"):
    dataset = open_data("sunsets", size, split)
    return to_float(torch.stack([dataset[i][0] for i in range(n)]))


@pytest.fixture
def narrow(monkeypatch):
    """A tokenizer small enough to train in seconds."""
    for name, value in dict(WIDTH=16, FINE=8, DIM=8, WARMUP=4).items():
        monkeypatch.setattr(tokenizer, name, value)
    monkeypatch.setattr(data, "SUNSETS", data.SUNSETS_TRAIN + 40)      # fewer test images to render


def write_drawings(folder, n, size=16):
    folder.mkdir()
    for i in range(n):
        pixels = np.full((size, size, 3), 255, np.uint8)
        pixels[i % 7:i % 7 + 6, 3:12] = (30 * (i % 8), 200 - 10 * i % 200, 90)
        Image.fromarray(pixels).save(folder / f"drawing{i:03d}.png")
    return folder


@pytest.mark.parametrize("size, downsample, cells", [(8, 4, 4), (12, 4, 9), (16, 2, 64), (16, 8, 4), (64, 16, 16)])
def test_tokenizer_shapes(size, downsample, cells):
    model = small_tokenizer(size, downsample)
    images = torch.rand(3, 3, size, size) * 2 - 1
    tokens = model.encode(images)
    assert tokens.shape == (3, cells) and tokens.dtype == torch.int64 and model.rows * model.cols == cells
    assert 0 <= tokens.min() and tokens.max() < 32
    drawn = model.decode(tokens)
    assert drawn.shape == images.shape and drawn.dtype == torch.float32 and drawn.abs().max() <= 1
    assert torch.equal(drawn, model.decode(tokens.to(torch.uint8)))


def test_tokenizer_cells_are_row_major():
    """Repainting one cell's pixels changes no token but those of the cell and its neighbours."""
    model = small_tokenizer(size=32, codebook=256)      # 8 x 8 cells
    image = some_sunsets(1, 32)
    other = image.clone()
    other[:, :, 4 * 1:4 * 2, 4 * 6:4 * 7] = torch.rand(1, 3, 4, 4) * 2 - 1          # row 1, column 6: cell 14
    z = (model.latents(image) - model.latents(other)).abs().sum(-1).flatten()
    assert z.argmax() == 14


def test_tokenizer_learns_and_uses_its_codes():
    """After a few hundred steps pictures are drawn far better than by one colour each, with most codes in use."""
    model, images = small_tokenizer(), some_sunsets(400)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    for step in range(200):
        loss = model.loss(images[batch_of(step, 8, len(images), 0)], step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    unseen = some_sunsets(100, split="test")
    tokens = model.encode(unseen)
    flat = unseen.mean((2, 3), keepdim=True).expand_as(unseen)
    assert psnr(model.decode(tokens), unseen).mean() > psnr(flat, unseen).mean() + 5
    used, perplexity = usage(tokens, 32)
    assert used >= 24 and perplexity > 8


def test_straight_through_gradient_reaches_the_encoder():
    model, images = small_tokenizer(), some_sunsets(4)
    model.loss(images, tokenizer.WARMUP)
    z = model.latents(images)
    z.retain_grad()
    code = model.codebook[model.nearest(z)]
    through = z + (code - z).detach()
    assert torch.allclose(through, code, atol=1e-6)                     # forward: the code
    through.retain_grad()
    model.draw(through).square().mean().backward()
    assert torch.equal(z.grad, through.grad) and z.grad.abs().sum() > 0     # backward: as if z had not been rounded
    model.zero_grad()
    model.loss(images, tokenizer.WARMUP + 1).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert model.encoder[1].weight.grad.abs().sum() > 0


def test_dead_codes_restart_where_the_data_are():
    model = small_tokenizer(codebook=16)
    model.codebook[:] = 100.0                    # the collapse: every code but one is far from the data
    model.codebook[0] = 0.0
    model.total.copy_(model.codebook)
    z = torch.randn(64, 8, generator=torch.Generator().manual_seed(1))
    assert usage(model.nearest(z), 16)[0] == 1
    for step in range(150):
        model.move_codes(z, model.nearest(z), step, seed=0)
    assert usage(model.nearest(z), 16)[0] >= 15
    assert model.codebook.abs().max() < 10


def test_usage_by_hand():
    assert usage(torch.tensor([[3, 3], [3, 3]]), 8) == (1, 1.0)
    used, perplexity = usage(torch.tensor([0, 1, 2, 3], dtype=torch.uint8), 8)
    assert used == 4 and perplexity == pytest.approx(4)
    used, perplexity = usage(torch.tensor([0, 0, 0, 1]), 2)
    assert used == 2 and perplexity == pytest.approx(4 / 3 ** 0.75)      # exp of the entropy of (3/4, 1/4)


def test_psnr_by_hand():
    black, grey = -torch.ones(2, 3, 4, 4), torch.zeros(2, 3, 4, 4)
    assert psnr(grey, black).tolist() == pytest.approx([6.0206, 6.0206], abs=1e-4)      # half the range: 20 log10(2)


def test_batches_are_whole_epochs():
    """Every image once an epoch, also if a batch is larger than the data, and each step can be had on its own."""
    for n, batch in ((10, 4), (3, 8), (1, 2)):
        stream = [i for step in range(3 * n) for i in batch_of(step, batch, n, seed=5)]
        for epoch in range(len(stream) // n):
            assert sorted(stream[epoch * n:(epoch + 1) * n]) == list(range(n))
    assert batch_of(2, 4, 10, 5) != batch_of(2, 4, 10, 6)


def test_tokens_file(tmp_path, narrow):
    make_tokens(out=tmp_path / "a", size=8, codebook=16, steps=12, batch=4, limit=60)
    model, saved = load_tokenizer(tmp_path / "a" / "tokenizer.pt"), load_tokens(tmp_path / "a" / "tokens.pt")
    train, test = open_data("sunsets", 8, "train"), open_data("sunsets", 8, "test")
    tokens, split = saved["tokens"], saved["split"]
    assert tokens.dtype == torch.uint8 and tokens.shape == (60 + len(test), 4)
    assert split.dtype == torch.uint8 and [(split == k).sum().item() for k in (0, 1, 2)] == [57, 3, len(test)]
    assert saved["config"] == dict(rows=2, cols=2, codebook=16, size=8, downsample=4, data="sunsets")
    assert saved["made_from"] == dict(data=train.fingerprint, tokenizer=model.fingerprint)
    assert len(set(saved["captions"])) == len(saved["captions"])
    for i, (image, caption) in [(7, train[7]), (61, test[1])]:
        assert saved["captions"][saved["caption_index"][i]] == caption
    first = to_float(torch.stack([train[i][0] for i in range(60)]))
    assert torch.equal(model.encode(first), tokens[:60].long())                      # saved and loaded: the same tokens
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["reconstructions.png", "tokenizer.pt", "tokens.pt"]
    Image.open(tmp_path / "a" / "reconstructions.png").verify()


def test_tokens_are_as_small_as_the_codebook_allows(tmp_path, narrow):
    folder = write_drawings(tmp_path / "drawings", 24)
    for codebook, dtype in ((256, torch.uint8), (257, torch.int16), (40000, torch.int32)):
        make_tokens(folder, tmp_path / "out", size=8, codebook=codebook, steps=1, batch=2)
        assert load_tokens(tmp_path / "out" / "tokens.pt")["tokens"].dtype == dtype


def test_codes_are_learned_in_short_runs_too_and_long_ones_begin_at_once(tmp_path, narrow, monkeypatch):
    arguments, calls = dict(data=write_drawings(tmp_path / "drawings", 24), size=8, codebook=16, batch=2), []
    first_codes = Tokenizer.first_codes
    monkeypatch.setattr(Tokenizer, "first_codes", lambda self, z, seed: calls.append(1) or first_codes(self, z, seed))
    for steps in (1, 2, 4, 5, 9):
        make_tokens(out=tmp_path / "out", steps=steps, **arguments)
    assert len(calls) == 5
    monkeypatch.setattr(tokenizer, "on_interrupt", lambda: StopAfter(2))
    with pytest.raises(KeyboardInterrupt):
        make_tokens(out=tmp_path / "long", steps=10 ** 12, **arguments)


def test_nearest_codes_in_parts_are_the_nearest_codes():
    model = Tokenizer(dict(size=8, downsample=4, codebook=65536, width=8, fine=8, dim=4))
    z = torch.randn(2, 20, 30, 4)                                          # 1,200: more than are compared at once
    found = model.nearest(z)
    assert found.shape == (2, 20, 30)
    few = torch.tensor([0, 500, 511, 512, 513, 1199])
    assert torch.equal(found.flatten()[few], torch.cdist(z.flatten(0, 2)[few], model.codebook).argmin(1))


def test_out_must_be_a_folder_apart_from_the_images(tmp_path, narrow):
    folder = write_drawings(tmp_path / "drawings", 24)
    (folder / "file").write_text("precious")
    before = sorted(folder.iterdir())
    (tmp_path / "link").symlink_to(folder)
    for out in (folder, folder / "out", tmp_path / "link" / "out"):
        with pytest.raises(UserError, match="lies in --data"):
            make_tokens(folder, out, size=8, codebook=16, steps=1)
    for out in (folder / "file", folder / "file" / "out"):
        with pytest.raises(UserError, match="cannot be written to|lies in"):
            make_tokens("sunsets", out, size=8, codebook=16, steps=1)
    assert sorted(folder.iterdir()) == before
    make_tokens(folder, str(folder) + "_out", size=8, codebook=16, steps=1)          # beside it is good


def test_fewer_images_than_a_batch(tmp_path, narrow):
    folder = write_drawings(tmp_path / "drawings", 3)
    for path in sorted(folder.iterdir())[1:]:           # one image is enough, wherever the split puts it
        path.unlink()
    try:
        open_data(folder, 12, "train")
    except UserError:
        pytest.skip("the only image is held out")
    make_tokens(folder, tmp_path / "out", size=12, codebook=8, steps=6, batch=16)
    saved = load_tokens(tmp_path / "out" / "tokens.pt")
    assert saved["tokens"].shape == (1, 9) and saved["split"].tolist() == [0]


def test_resumed_tokenizer_equals_uninterrupted(tmp_path, narrow, monkeypatch):
    """Stopped in the middle, after the codebook has begun to move, and continued: the same weights bit for bit."""
    arguments = dict(data=write_drawings(tmp_path / "drawings", 24), size=8, codebook=16, steps=20, batch=4)
    make_tokens(out=tmp_path / "whole", **arguments)
    monkeypatch.setattr(tokenizer, "SAVE_EVERY", -1)                          # a state after each step
    move, moves = Tokenizer.move_codes, []

    def killed(self, z, tokens, step, seed):
        if step == 13 and not moves:
            moves.append(step)
            raise KeyboardInterrupt
        move(self, z, tokens, step, seed)
    monkeypatch.setattr(Tokenizer, "move_codes", killed)
    with pytest.raises(KeyboardInterrupt):
        make_tokens(out=tmp_path / "halves", **arguments)
    assert [p.name for p in (tmp_path / "halves").iterdir()] == ["tokenizer_resume.pt"]
    with pytest.raises(UserError, match="batch 4, now it is 5"):
        make_tokens(out=tmp_path / "halves", resume=True, **{**arguments, "batch": 5})
    make_tokens(out=tmp_path / "halves", resume=True, **arguments)
    for name, key in (("tokenizer.pt", "model"), ("tokens.pt", "tokens")):
        whole, halves = (load(tmp_path / run / name, name[:-3], "")[key] for run in ("whole", "halves"))
        assert str(whole) == str(halves)
        if key == "model":
            assert all(torch.equal(whole[k], halves[k]) for k in whole)
        else:
            assert torch.equal(whole, halves)
    assert not (tmp_path / "halves" / "tokenizer_resume.pt").exists()


def test_tokenizer_goes_on_in_the_number_type_it_began_in_and_encodes_in_float32(tmp_path, narrow, monkeypatch):
    """Begun in bfloat16 and continued where the probe says float32: what training in bfloat16 throughout gives. The
    tokens are those of the model as it is read from its file, which computes in float32."""
    arguments = dict(data=write_drawings(tmp_path / "drawings", 24), size=8, codebook=16, steps=9, batch=4)
    monkeypatch.setattr(tokenizer, "precision", lambda device: torch.bfloat16)
    make_tokens(out=tmp_path / "whole", **arguments)
    with monkeypatch.context() as patch:
        patch.setattr(tokenizer, "on_interrupt", lambda: StopAfter(6))
        with pytest.raises(KeyboardInterrupt):
            make_tokens(out=tmp_path / "halves", **arguments)
    monkeypatch.setattr(tokenizer, "precision", lambda device: torch.float32)
    make_tokens(out=tmp_path / "halves", resume=True, **arguments)
    whole, halves = (load_tokenizer(tmp_path / run / "tokenizer.pt") for run in ("whole", "halves"))
    assert whole.fingerprint == halves.fingerprint
    images = open_data(arguments["data"], 8, "train")
    tokens = whole.encode(to_float(torch.stack([images[i][0] for i in range(len(images))])))
    assert torch.equal(load_tokens(tmp_path / "whole" / "tokens.pt")["tokens"][:len(images)].long(), tokens)
    make_tokens(out=tmp_path / "float", **arguments)
    assert load_tokenizer(tmp_path / "float" / "tokenizer.pt").fingerprint != whole.fingerprint


def test_tokenizer_refuses_the_state_of_another_optimizer(tmp_path, narrow, monkeypatch):
    arguments = dict(data=write_drawings(tmp_path / "drawings", 24), out=tmp_path / "out", size=8, codebook=16, steps=9)
    monkeypatch.setattr(tokenizer, "on_interrupt", lambda: StopAfter(2))
    with pytest.raises(KeyboardInterrupt):
        make_tokens(**arguments)
    state = torch.load(tmp_path / "out" / "tokenizer_resume.pt", weights_only=True)
    del state["config"]["optimizer"], state["optimizers"]                  # as before there was Muon
    data.save(tmp_path / "out" / "tokenizer_resume.pt", state)
    with pytest.raises(UserError, match="optimizer None, now it is Muon"):
        make_tokens(resume=True, **arguments)


@pytest.mark.parametrize("flags, message", [
    (["--size", "30"], "--size 30 is not divisible by --downsample 4"),
    (["--size", "9998"], "take --size 4096"),
    (["--batch", "100000"], "at most 65,536"),
    (["--downsample", "3"], "--downsample 3 is not a power of two"),
    (["--codebook", "1"], "--codebook 1 is out of range"),
    (["--data", "no/such/folder"], "no/such/folder does not exist")])
def test_tokenizer_bad_flags_leave_out_alone(tmp_path, flags, message):
    out = tmp_path / "out"
    out.mkdir()
    (out / "tokens.pt").write_bytes(b"precious")
    done = subprocess.run([sys.executable, ROOT / "tokenizer.py", "--out", out, *flags], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert message in done.stderr
    assert [(p.name, p.read_bytes()) for p in out.iterdir()] == [("tokens.pt", b"precious")]


def test_damaged_tokens_are_refused(tmp_path, narrow):
    folder = write_drawings(tmp_path / "drawings", 12)
    make_tokens(folder, tmp_path, size=8, codebook=16, steps=2, batch=2)
    good = load_tokens(tmp_path / "tokens.pt")
    for key, value in (("tokens", good["tokens"] + 16), ("split", good["split"][1:]),
                       ("split", good["split"].clamp(min=1)),              # none to train on
                       ("caption_index", good["caption_index"] + 99), ("config", {**good["config"], "rows": 3}),
                       ("config", {**good["config"], "size": None})):
        save(tmp_path / "tokens.pt", {**good, key: value})
        with pytest.raises(UserError, match="damaged: run python tokenizer.py again"):
            load_tokens(tmp_path / "tokens.pt")
    with pytest.raises(UserError, match="expected .?tokenizer"):
        load_tokenizer(tmp_path / "tokens.pt")


# ---------------------------------------------------------------------------------------------------------------------
# evaluate.py


def root_of(S):
    """The symmetric square root of a covariance matrix, by eigenvalues, float64."""
    value, vector = torch.linalg.eigh(S)
    return (vector * value.clamp_min(0).sqrt()) @ vector.T


def frechet_by_definition(a, b):
    """|m1 - m2|^2 + tr(S1 + S2 - 2 sqrt(sqrt(S1) S2 sqrt(S1))), with covariance matrices and square roots."""
    a, b = a.double(), b.double()
    S1, S2 = torch.cov(a.T), torch.cov(b.T)
    middle = root_of(root_of(S1) @ S2 @ root_of(S1))
    return ((a.mean(0) - b.mean(0)).square().sum() + S1.trace() + S2.trace() - 2 * middle.trace()).item()


def features_like(n, f, seed, scale=1.0):
    chance = torch.Generator().manual_seed(seed)
    return (torch.randn(n, f, generator=chance) @ torch.randn(f, f, generator=chance) * scale).relu() + 0.1


# ---------------------------------------------------------------------------------------------------------------------
# Distances between sets of features


def test_frechet_of_diagonal_gaussians_has_its_closed_form():
    """Samples whose covariance is exactly diagonal: the distance is |m1 - m2|^2 + sum (s1 - s2)^2."""
    n, f = 60, 7
    flat = torch.randn(2, n, f, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    flat = torch.linalg.qr(flat - flat.mean(1, keepdim=True)).Q * math.sqrt(n - 1)         # centred, covariance 1
    s1, s2 = torch.linspace(0.1, 3, f).double(), torch.linspace(2, 0.5, f).double()
    m1, m2 = torch.arange(f).double(), torch.ones(f).double()
    found = evaluate.frechet_distance(flat[0] * s1 + m1, flat[1] * s2 + m2)
    assert found == pytest.approx(((m1 - m2).square().sum() + (s1 - s2).square().sum()).item(), rel=1e-10)


@pytest.mark.parametrize("n, m, f", ((300, 200, 8), (20, 300, 32), (12, 9, 40)))  # also fewer images than features
def test_frechet_agrees_with_matrix_square_roots(n, m, f):
    a, b = features_like(n, f, 1), features_like(m, f, 2, 1.3)
    assert evaluate.frechet_distance(a, b) == pytest.approx(frechet_by_definition(a, b), rel=1e-5)


def test_frechet_of_equal_sets_is_zero_and_of_a_shift_its_square():
    a = features_like(50, 16, 3)
    assert evaluate.frechet_distance(a, a) < 1e-9
    assert evaluate.frechet_distance(a, a[torch.randperm(50)]) < 1e-9
    assert evaluate.frechet_distance(a, a.double() + 2) == pytest.approx(16 * 4, rel=1e-9)


def test_moments_do_not_depend_on_the_chunks():
    a = features_like(101, 6, 4)
    (mean, root), (mean2, root2) = evaluate.moments(a), evaluate.moments(a, chunk=9)
    torch.testing.assert_close(root.T @ root, torch.cov(a.double().T))
    torch.testing.assert_close(root2.T @ root2, root.T @ root)
    assert torch.equal(mean, mean2)


def test_kernel_distance_agrees_with_loops_and_is_unbiased():
    a, b = features_like(11, 5, 5), features_like(8, 5, 6)
    kernel = lambda x, y: (sum(u * v for u, v in zip(x.tolist(), y.tolist())) / 5 + 1) ** 3
    within = lambda x: (sum(kernel(x[i], x[j]) for i in range(len(x)) for j in range(len(x)) if i != j)
                        / (len(x) * (len(x) - 1)))
    between = sum(kernel(x, y) for x in a for y in b) / (len(a) * len(b))
    expected = within(a) + within(b) - 2 * between
    assert evaluate.kernel_distance(a, b) == pytest.approx(expected, rel=1e-6)
    assert evaluate.kernel_distance(a, b, block=3) == pytest.approx(expected, rel=1e-6)
    same = [evaluate.kernel_distance(*torch.randn(2, 10, 4, generator=torch.Generator().manual_seed(s)))
            for s in range(300)]
    assert abs(sum(same) / 300) < 0.3 and min(same) < -0.1                 # a biased one would average about 1


def test_precision_and_recall_agree_with_loops():
    real, drawn = features_like(23, 3, 7), features_like(17, 3, 8) + 0.3
    gap = lambda x, y: math.dist(x.tolist(), y.tolist())

    def share(points, centres):
        radius = [sorted(gap(c, other) for j, other in enumerate(centres) if j != i)[2] for i, c in enumerate(centres)]
        return sum(any(gap(p, c) <= r for c, r in zip(centres, radius)) for p in points) / len(points)
    found = evaluate.precision_recall(real, drawn, k=3, block=5)
    assert found == (pytest.approx(share(drawn, real)), pytest.approx(share(real, drawn)))
    assert 0 < found[0] < 1 and 0 < found[1] < 1 and found[0] != found[1]


def test_precision_sees_quality_and_recall_diversity():
    chance = torch.Generator().manual_seed(0)
    real = torch.cat((torch.randn(100, 3, generator=chance), torch.randn(100, 3, generator=chance) + 20))
    half = torch.randn(200, 3, generator=chance) * 0.9                     # good images, one of two kinds only
    precision, recall = evaluate.precision_recall(real, half)
    assert precision > 0.85 and recall < 0.55
    assert evaluate.precision_recall(real, real + 200) == (0, 0)


# ---------------------------------------------------------------------------------------------------------------------
# LPIPS


class TwoPixels:
    """Two "layers" of a network that one can follow by hand: the image itself, and twice its first two channels."""
    weights = [torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0.5, 0.25])]

    def activations(self, images):
        return [images, 2 * images[:, :2]]


def test_lpips_by_hand():
    x = torch.tensor([3.0, 4.0, 0.0]).view(1, 3, 1, 1).expand(1, 3, 1, 2).clone()          # unit vectors .6 .8 0
    y = x.clone()
    y[0, :, 0, 1] = torch.tensor([0.0, 0.0, 5.0])                          # the second pixel differs
    first = (1 * 0.36 + 2 * 0.64 + 3 * 1.0) / 2                            # mean over two pixels
    second = (0.5 * 0.36 + 0.25 * 0.64) / 2                                # (0, 0) stays 0, no division by zero
    assert evaluate.lpips(x, y, TwoPixels()).tolist() == pytest.approx([first + second], rel=1e-5)
    assert torch.equal(evaluate.lpips(x, y, TwoPixels()), evaluate.lpips(y, x, TwoPixels()))
    assert evaluate.lpips(y, y, TwoPixels()).tolist() == [0]


def random_lpips(folder, seed=0):
    """Files as people download them, with random weights: (torchvision's alexnet, the lpips package's alex)."""
    torch.manual_seed(seed)
    backbone = {**evaluate.AlexNet().state_dict(), "classifier.1.weight": torch.zeros(2, 2)}
    linear = {f"lin{i}.model.1.weight": torch.rand(1, c, 1, 1) for i, c in enumerate((64, 192, 384, 256, 256))}
    torch.save(backbone, folder / "alexnet.pth")
    torch.save(linear, folder / "alex.pth")
    return folder / "alexnet.pth", folder / "alex.pth"


def test_lpips_with_alexnet_loads_strictly(tmp_path):
    backbone, linear = random_lpips(tmp_path)
    net = evaluate.load_lpips(backbone, linear)
    x, y = torch.rand(2, 3, 3, 40, 40) * 2 - 1
    found = evaluate.lpips(x, y, net)
    assert found.shape == (3,) and (found > 0).all() and evaluate.lpips(x, x, net).tolist() == [0, 0, 0]
    torch.testing.assert_close(found, evaluate.lpips(y, x, net))
    # the formula once more, in a loop over pixels
    layers = [(a[0], b[0], w) for a, b, w in zip(net.activations(x), net.activations(y), net.weights)]
    unit = lambda v: v / (v.norm() + 1e-10)
    naive = sum(torch.stack([(w * (unit(a[:, i, j]) - unit(b[:, i, j])) ** 2).sum()
                             for i in range(a.shape[1]) for j in range(a.shape[2])]).mean() for a, b, w in layers)
    assert found[0].item() == pytest.approx(naive.item(), rel=1e-4)
    for path, spoil in ((backbone, lambda s: s.pop("features.0.bias")),
                        (linear, lambda s: s.pop("lin4.model.1.weight")),
                        (linear, lambda s: s.update(extra=torch.zeros(1))),
                        (backbone, lambda s: s.update(x=torch.zeros(1)))):
        state = torch.load(path, weights_only=True)
        spoil(state)
        torch.save(state, tmp_path / "spoilt.pth")
        with pytest.raises(UserError, match="spoilt.pth does not hold"):
            evaluate.load_lpips(*((tmp_path / "spoilt.pth", linear) if path == backbone
                                  else (backbone, tmp_path / "spoilt.pth")))
    with pytest.raises(UserError):
        evaluate.load_lpips(linear, backbone)


# ---------------------------------------------------------------------------------------------------------------------
# Features


class Rooms(torch.nn.Module):
    """The interface of the Inception file: uint8 images to `size` features, by tiling their mean colours."""
    def __init__(self, size: int):
        super().__init__()
        self.size = size

    def forward(self, images: torch.Tensor, return_features: bool = False) -> torch.Tensor:
        mean = images.float().mean(dim=[2, 3])
        return mean.repeat(1, self.size // 3 + 1)[:, :self.size] if return_features else mean.argmax(1)


class Other(torch.nn.Module):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.float()


def test_inception_files_are_used_or_refused_in_one_line(tmp_path):
    for size, name in ((2048, "FID"), (12, "Frechet")):                    # FID names one network's distance only
        torch.jit.script(Rooms(size)).save(str(tmp_path / "net.pt"))
        found, extract = evaluate.load_inception(str(tmp_path / "net.pt"))
        assert found == name and extract(torch.full((2, 3, 8, 8), 7, dtype=torch.uint8)).tolist() == [[7.0] * size] * 2
    torch.jit.script(Other()).save(str(tmp_path / "other.pt"))
    torch.save({"a": torch.ones(2)}, tmp_path / "weights.pt")
    (tmp_path / "text.pt").write_text("no network")
    for name in ("other.pt", "weights.pt", "text.pt", "missing.pt"):
        with pytest.raises(UserError, match=name) as error:
            evaluate.load_inception(str(tmp_path / name))
        assert "\n" not in str(error.value)


class Shades(torch.utils.data.Dataset):
    """Sunsets with other captions: what the judge learns depends on them."""
    def __init__(self, captions, size=8):
        self.captions, self.images = captions, [data.render_sunset(i, size)[0] for i in range(len(captions))]

    def __len__(self):
        return len(self.captions)

    def __getitem__(self, i):
        return self.images[i], self.captions[i]


def test_the_judge_learns_captions_where_they_are_classes_else_rotations():
    task = lambda captions: evaluate.train_judge(Shades(captions), steps=1, width=4).config
    assert task(["a", "b"] * 20) == {"task": "captions", "classes": ["a", "b"], "width": 4}
    assert task(["a", "b"] * 19 + ["c"] * 2)["task"] == "rotations"        # too few of c
    assert task(["a"] * 40)["task"] == task([str(i) for i in range(40)])["task"] == "rotations"


def test_the_judge_is_repeatable_and_valid_on_sunsets():
    train, test = Shades(list(data.open_data("sunsets", 16).captions[:1200]), 16), data.open_data("sunsets", 16, "test")
    judges = [evaluate.train_judge(train, seed=3, steps=s, width=16) for s in (4, 4, 120)]
    a, b, judge = judges
    assert all(torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items())
    assert any(not torch.equal(v, judge.state_dict()[k]) for k, v in a.state_dict().items())
    images = torch.stack([test[i][0] for i in range(1200)])
    report = evaluate.validate_judge(lambda x: judge.features(to_float(x)), images)
    for how in ("noise", "blur", "shuffle"):
        one, two, three = report[how]
        assert report["real"] < one < two < three
    # so tiny a judge may not be good enough; it says so
    assert report["ok"] == (report["ratio"] >= 20)
    assert report == evaluate.validate_judge(lambda x: judge.features(to_float(x)), images)
    blind = evaluate.validate_judge(lambda x: to_float(x).mean((2, 3)), images)  # mean colours see no shuffling
    assert not blind["ok"]


def test_damage_is_what_it_says():
    images = torch.stack([data.render_sunset(i, 16)[0] for i in range(4)])
    chance = torch.Generator().manual_seed(0)
    for share in (0.25, 1.0):
        worse = evaluate.corrupted(images, "shuffle", share, chance)
        cut = lambda x: x.unfold(2, 4, 4).unfold(3, 4, 4).permute(0, 2, 3, 1, 4, 5).reshape(4, 16, -1)
        assert ((cut(worse) != cut(images)).any(-1).sum(1) <= 16 * share).all() and not torch.equal(worse, images)
        for a, b in zip(cut(worse), cut(images)):                          # the same patches, elsewhere
            assert sorted(map(tuple, a.tolist())) == sorted(map(tuple, b.tolist()))
    grey = torch.full((2, 3, 64, 64), 128, dtype=torch.uint8)
    assert torch.equal(evaluate.corrupted(grey, "blur", 2, chance), grey)
    noisy = to_float(evaluate.corrupted(grey, "noise", 0.3, chance))
    assert noisy.std().item() == pytest.approx(0.3, rel=0.03)


# ---------------------------------------------------------------------------------------------------------------------
# What an order does


# the rank of the docstring: 0 6 1 / 7 8 4 / 2 5 3
SPIRAL = torch.tensor([[0, 6, 1, 7, 8, 4, 2, 5, 3]])


def test_step_length_on_hand_worked_grids():
    assert evaluate.step_length(raster_order(2, 9), 3) == pytest.approx((6 + 2 * math.sqrt(5)) / 8)
    # corners 0 2 6 8, then 5 7 1 3 4: steps 2, sqrt 8, 2, 1, sqrt 2, 2, sqrt 2, 1
    assert evaluate.step_length(rank_of(SPIRAL), 3) == pytest.approx(
        (2 + 8 ** 0.5 + 2 + 1 + 2 ** 0.5 + 2 + 2 ** 0.5 + 1) / 8)


def test_share_of_steps_that_touch_a_drawn_cell():
    assert evaluate.touching(rank_of(raster_order(3, 9)), 3, 3) == 1
    assert evaluate.touching(SPIRAL, 3, 3) == 5 / 8
    assert evaluate.touching(torch.tensor([[0, 2, 1]]), 1, 3) == 1 / 2     # left, right, then between
    assert evaluate.touching(torch.tensor([[3, 0, 2, 1]]), 2, 2) == 1      # diagonal neighbours count


def test_rank_correlation_by_hand():
    a = torch.arange(9).view(1, 9)
    assert evaluate.rank_correlation(a, a) == 1 and evaluate.rank_correlation(a, a.flip(1)) == -1
    assert evaluate.rank_correlation(torch.tensor([[0, 1, 2]]), torch.tensor([[0, 2, 1]])) == 0.5
    many = rank_of(random_order(400, 16, torch.Generator().manual_seed(0)))
    assert abs(evaluate.rank_correlation(many[:200], many[200:])) < 0.05
    pair = evaluate.rank_correlation(many[:1], many[1:2])
    assert pair == pytest.approx(torch.corrcoef(many[:2].double())[0, 1].item())


def test_what_is_drawn_before_what():
    sun, cloud, sky = (data.SUNSET_LABELS.index(name) for name in ("sun", "cloud", "sky"))
    labels = torch.full((2, 4, 4), sky, dtype=torch.uint8)
    labels[:, :2, :2], labels[0, 2:, 2:] = sun, cloud                      # only the first image has a cloud
    before = lambda rank: evaluate.drawn_before(torch.tensor([rank, rank]), labels, "sun", "cloud", 2, 2)
    assert before([0, 1, 2, 3]) == 1 and before([3, 1, 2, 0]) == 0
    labels[0, 1, 1] = cloud                                                # a pixel of cloud in the sun's cell
    assert before([3, 1, 2, 0]) == 0
    assert evaluate.drawn_before(torch.tensor([[0, 1, 2, 3]]), labels[1:], "sun", "cloud", 2, 2) is None


# ---------------------------------------------------------------------------------------------------------------------
# Speed: what is compared must be the same, and what is counted must be all


def test_the_obvious_ways_compute_what_candidate_attention_computes():
    q, k, v = qkv(3, 2, 5, 8)
    past = torch.randn(2, 3, 2, 20, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(2))[:, :, :, :7]
    for way in (evaluate.masked_candidates, evaluate.repeated_candidates):
        torch.testing.assert_close(way(q, k, v, *past), anyorder.candidate_attention(q, k, v, *past))


def test_multiply_adds_by_hand_and_as_torch_counts_them(monkeypatch):
    model = tiny(rows=2, cols=2, codebook=3, layers=2).requires_grad_()    # width 32
    B, L, N, D = 5, model.config["caption_length"], 4, 32
    words, order = torch.zeros(B, L, dtype=torch.long), random_order(B, N)
    products = evaluate.weight_products(model, B * (L + N), B * N)
    square = B * (L + N) ** 2                          # the reference computes the future too
    count = evaluate.multiply_adds(model, products, square)
    assert count == 2 * (B * (L + N) * (3 + 1 + 4 + 4) * D * D + 2 * square * D) + B * N * D * 3
    monkeypatch.setattr(anyorder, "fused_attention", anyorder.reference_attention)
    with FlopCounterMode(display=False) as counter:
        what, _ = model(torch.zeros(B, N, dtype=torch.long), words, order)
        assert counter.get_total_flops() == 2 * count                      # an addition and a multiplication each
        what.sum().backward()
    assert counter.get_total_flops() == 3 * 2 * count
    muon = anyorder.optimizers(model, 1e-3, torch.float32)[1]
    with FlopCounterMode(display=False) as counter:
        muon.step()
    assert counter.get_total_flops() == 2 * evaluate.muon_multiply_adds(muon.param_groups[0]["params"])


def test_peak_memory_counts_what_is_alive_and_views_of_nothing_new():
    outside = torch.zeros(10 ** 6)
    with evaluate.PeakMemory() as memory:
        a = outside[:1000] + 1                                             # 4,000 bytes, the slice none
        b, parts = a.view(10, 100).double(), a.split(10)                   # 8,000 more, and none
        assert (memory.now, memory.peak) == (12_000, 12_000)
        del b
        outside.add_(1)
        c = torch.cat((a, a))                                              # takes the place of b
        assert (memory.now, memory.peak) == (12_000, 12_000)
        del a, c
        assert memory.now == 4_000                     # parts still hold a
        del parts
    assert (memory.now, memory.peak) == (0, 12_000)


def test_speed_is_measured_there_and_back(monkeypatch):
    clock, calls = [0.0], []
    monkeypatch.setattr(evaluate, "time", type("time", (), {"perf_counter": lambda: clock[0]}))

    def work(name, seconds):
        return lambda: (calls.append(name), clock.append(clock.pop() + seconds))
    found = evaluate.medians(torch.device("cpu"), work("a", 1.0), work("b", 2.0), work("c", 40.0))
    assert found == [1.0, 2.0, 40.0] and "".join(calls) == "abc" + "cbaabc" * 2            # five rounds at least


def test_the_speed_table_is_printed_and_written_and_leaves_everything_in_place(monkeypatch, capsys, tmp_path):
    small = {"side": 2, "width": 32, "layers": 1}
    monkeypatch.setattr(evaluate, "SECONDS", {"cpu": 0, "cuda": 0})
    monkeypatch.setattr(evaluate, "ATTENTION", dict.fromkeys(("cpu", "cuda"), {(2, 1, 5, 32): (1, 1)}))
    monkeypatch.setattr(evaluate, "LONG", (1, 8, 4096, 16))
    some = {**small, "batch": 2, "draw": 2, "infer": 2}
    monkeypatch.setattr(evaluate, "MODELS", {"cpu": some, "cuda": some, "drawing": {**small, "draw": 2, "least": 20}})
    ours, seen = anyorder.fused_attention, set()
    monkeypatch.setattr(evaluate, "library_attention", lambda q, k, v, library=evaluate.library_attention: (
        seen.add(anyorder.fused_attention), library(q, k, v))[1])
    code, printed, _ = evaluation(monkeypatch, capsys, tmp_path / "out", "--speed")
    assert code == 0 and anyorder.fused_attention is ours and len(seen) == 2   # in a model, and by itself
    report = json.loads((tmp_path / "out" / "speed.json").read_text())
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["speed.json"]
    assert report["command"].endswith("--speed") and report["machine"]["threads"] == torch.get_num_threads()
    for row in report["rows"]:
        assert row["name"] in printed and row["ours"] > 0, row
        value = row["ours"] if row["ratio"] is None else row["ratio"]
        bound = row["least"] if row["most"] is None else row["most"]
        assert row["met"] is (None if bound is None else value >= bound if row["most"] is None else value <= bound)
    assert report["rows"][-1]["met"] is True           # a count, so it holds on every machine
    by_name = {row["name"]: row for row in report["rows"]}
    images, all_images = (next(row for name, row in by_name.items() if text in name and row["unit"] == unit)
                          for text, unit in (("order inference", "images/s"), ("10,000 images", "s")))
    assert math.isclose(images["ours"] * all_images["ours"], 1e4, rel_tol=1e-9)


# ---------------------------------------------------------------------------------------------------------------------
# The command


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """A folder with an untrained tokenizer and models of sunsets of 8x8 pixels, 2x2 cells: (folder, models)."""
    out = tmp_path_factory.mktemp("evaluated")
    torch.manual_seed(0)
    tokenizer = Tokenizer({"size": 8, "downsample": 4, "codebook": 16, "width": 8, "fine": 8, "dim": 4}).eval()
    sunsets = open_data("sunsets", 8)
    data.save(out / "tokenizer.pt", {"kind": "tokenizer", "version": 1, "config": tokenizer.config,
                                     "made_from": {"data": sunsets.fingerprint}, "model": tokenizer.state_dict()})
    words, models = sorted({w for c in sunsets.captions[:500] for w in data.words_of(c)}), {}
    for name, order, head in (("raster", "raster", False), ("anyorder", "random", False),
                              ("ordered", "inferred", True)):
        model = models[name] = AnyOrder({"rows": 2, "cols": 2, "codebook": 16, "width": 32, "layers": 2,
                                         "order_head": head, "words": words, "caption_length": 8}).eval()
        made_from = {"data": sunsets.fingerprint, "tokenizer": tokenizer.fingerprint, "tokens": "0"}
        if head:
            made_from["model"] = data.fingerprint(models["anyorder"].state_dict())
        save_model(out / f"{name}.pt", model, made_from=made_from, order=order, step=3, held_out=2.0, batch=8,
                   tokens_seen=96, seconds=1.5, data="sunsets", captions=["low red sun"],
                   **({"caption_rank": torch.tensor([[3.0, 0, 1, 2]]), "score": "margin", "distance": 0.5}
                      if head else {}))
    return out, models


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(evaluate, "HELD_OUT", 30)
    monkeypatch.setattr(evaluate, "train_judge", functools.partial(evaluate.train_judge, steps=2, width=4))


def evaluation(monkeypatch, capsys, out, *flags):
    """evaluate.py's main in this process: (exit code, what it printed on each stream)."""
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "--out", str(out), "--device", "cpu", *map(str, flags)])
    code = 0
    try:
        data.run(evaluate.main)
    except SystemExit as stop:
        code = stop.code
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def test_evaluate_from_the_command_line(evaluated, quick, monkeypatch, capsys):
    out, models = evaluated
    code, first, _ = evaluation(monkeypatch, capsys, out, "--n", 10, "--batch", 4)
    assert code == 0
    report = json.loads((out / "results.json").read_text())
    rows = {row["name"]: row for row in report["rows"]}
    assert list(rows) == ["raster:raster", "anyorder:raster", "anyorder:random", "anyorder:inferred", "ordered:learned",
                          "ordered:frozen", "ordered:inferred", "ordered:class"]
    assert (report["n"] == 10 and report["held_out"] == 30 and report["seed"] == 0
            and "results.json" not in report["command"])
    assert (out / "results.png").stat().st_size > 1000 and (out / "compare.png").stat().st_size > 1000
    # what drawing costs: 4 cells, or 4 + 3 + 2 + 1 tries, to which frozen adds the model's own 4
    cost = {name.split(":")[1]: row["evaluations"] for name, row in rows.items()}
    assert cost == {"raster": 4, "random": 4, "inferred": 10, "learned": 4, "frozen": 14, "class": 4}
    # the likelihood, once more by hand
    test, pick = open_data("sunsets", 8, "test"), torch.randperm(5000, generator=torch.Generator().manual_seed(0))[:10]
    images, captions = zip(*(test[i] for i in pick.tolist()))
    tokens = evaluate.load_tokenizer(out / "tokenizer.pt").encode(to_float(torch.stack(images)))
    nats = -load_model(out / "raster.pt").log_probs(tokens, captions, raster_order(10, 4)).sum(1).double()
    assert rows["raster:raster"]["nats"] == pytest.approx(nats.mean().item() / 4, rel=1e-6)
    assert rows["raster:raster"]["nats_error"] == pytest.approx(nats.std().item() / 10 ** 0.5 / 4, rel=1e-6)
    assert rows["raster:raster"]["bits"] == pytest.approx(nats.mean().item() / math.log(2), rel=1e-6)
    assert (rows["raster:raster"]["versus"] == 0
            and rows["anyorder:raster"]["step"] == pytest.approx((2 + 2 ** 0.5 * 0 + 5 ** 0.5 * 0 + 2 ** 0.5) / 3))
    assert report["agreement"][0][1] == 1 and report["agreement"][3][3] == 1
    # one seed, one table; only the speed differs
    code, second, _ = evaluation(monkeypatch, capsys, out, "--n", 10, "--batch", 4)
    same = lambda text: [line for line in text.splitlines() if "images/s" not in line]
    assert same(first) == same(second) and len(same(first)) > 20
    code, third, _ = evaluation(monkeypatch, capsys, out, "--n", 10, "--batch", 4, "--seed", 1)
    assert same(first) != same(third)
    code, printed, _ = evaluation(monkeypatch, capsys, out, "--n", 10, "--batch", 4, "--temperature", 0.5)
    cooler = json.loads((out / "results.json").read_text())["rows"]        # draws others, knows no more
    assert all(row["nats"] == old["nats"] and row["frechet"] != old["frechet"] for row, old in
               zip(cooler, report["rows"], strict=True)) and "temperature 0.5" in printed


def test_a_row_compares_what_was_drawn_with_the_images_and_with_their_reconstructions(evaluated, quick, monkeypatch):
    """A model that draws the first 12 of 30 held-out images as the tokenizer keeps them, and a judge that tells the
    captions of 8."""
    out, models = evaluated
    tokenizer = evaluate.load_tokenizer(out / "tokenizer.pt")
    features = lambda images: to_float(images).flatten(1)[:, :6]               # [n, 6]
    held = evaluate.open_held(open_data("sunsets", 8, "test"), tokenizer, features, 12, 4, 0, torch.device("cpu"))
    classes, turn = sorted({*held["captions"], "nothing like it"}), iter(range(0, 12, 4))

    def draws(model, captions, *args, given=None, **how):
        i = next(turn) if given is None else 0
        tokens = held["tokens"][i:i + len(captions)]
        return tokens, raster_order(*tokens.shape)

    def judge(images):
        i = judge.seen = judge.seen + len(images)
        right = torch.tensor([classes.index(caption) for caption in held["captions"][i - len(images):i]])
        guess = (right + (torch.arange(i - len(images), i) >= 8)) % len(classes)
        return torch.nn.functional.one_hot(guess, len(classes))

    judge.seen, judge.config = 0, {"task": "captions", "classes": classes}
    monkeypatch.setattr(evaluate, "generate", draws)
    monkeypatch.setattr(evaluate, "lpips", lambda a, b, network: (a - b).square().mean((1, 2, 3)))
    model = models["anyorder"]
    model.about = {"step": 1, "tokens_seen": 1, "seconds": 1.0}
    row, _, _, _ = evaluate.evaluate_row(("drawn", model, "random", 0, None), held, tokenizer, features, judge, None,
                                         12, 1, 4, 1.0, 1.0, 0)
    pictures = to_uint8(tokenizer.decode(held["tokens"][:12]))
    drawn, real = evaluate.moments(features(pictures)), features(held["images"])
    assert row["frechet"] == pytest.approx(evaluate.frechet(drawn, evaluate.moments(real)), rel=1e-9)
    all_kept = evaluate.moments(features(to_uint8(tokenizer.decode(held["tokens"]))))
    assert row["recon"] == pytest.approx(evaluate.frechet(drawn, all_kept), rel=1e-9)
    precision, recall = evaluate.precision_recall(real, features(pictures))
    assert row["recon"] < row["frechet"] and precision != recall
    assert (row["precision"], row["recall"], row["class_seen"]) == (precision, recall, 8 / 12)


def test_several_sets_tell_how_far_chance_moves_a_distance(evaluated, quick, monkeypatch, capsys):
    out, _ = evaluated
    only, rows, asked = ("--n", 10, "--batch", 5, "--models", f"{out}/anyorder.pt:random"), [], []

    def asks(model, captions, *args, given=None, **how):
        asked.extend(captions if given is None else [])
        return sample.generate(model, captions, *args, given=given, **how)
    monkeypatch.setattr(evaluate, "generate", asks)
    for draws in (1, 2):
        code, printed, _ = evaluation(monkeypatch, capsys, out, *only, "--draws", draws)
        rows += json.loads((out / "results.json").read_text())["rows"]
        assert code == 0 and ("2 sets of 10 images" in printed) == (draws == 2)
    one, two = rows                                    # the first of two sets is the one set: a = mean +- |a - b| / 2
    for key in ("frechet", "recon"):
        assert one[key + "_spread"] is None and two[key + "_spread"] > 0
        assert abs(one[key] - two[key]) == pytest.approx(two[key + "_spread"] / 2 ** 0.5, rel=1e-6)
    assert one["nats"] == two["nats"] and one["evaluations"] == two["evaluations"] == 4
    assert asked[:10] == asked[10:20] == asked[20:] and len(set(asked[:10])) > 1           # only the dice differ


def test_evaluate_counts_guidance_and_names_its_networks(evaluated, quick, monkeypatch, capsys):
    out, _ = evaluated
    torch.jit.script(Rooms(2048)).save(str(out / "inception.pt"))
    code, printed, _ = evaluation(monkeypatch, capsys, out, "--n", 5, "--guidance", 2,
                                  "--inception", out / "inception.pt", "--models", f"{out}/anyorder.pt:inferred")
    report = json.loads((out / "results.json").read_text())
    assert code == 0 and report["rows"][0]["evaluations"] == 10 + 2 * 4
    assert " FID " in printed and "LPIPS-judge" in printed and "the judge is" not in printed
    code, printed, _ = evaluation(monkeypatch, capsys, out, "--n", 5, "--models", f"{out}/ordered.pt:inferred@2")
    row = json.loads((out / "results.json").read_text())["rows"][0]        # two of 4 candidates, then the rest
    assert code == 0 and row["name"] == "ordered:inferred@2" and row["evaluations"] == 4 + 2
    code, printed, _ = evaluation(monkeypatch, capsys, out, "--n", 5, "--models", f"{out}/ordered.pt:class")
    assert code == 0 and "FID" not in printed and "Frechet (judge)" in printed and "the judge is" in printed


def test_an_interrupt_keeps_the_rows_that_are_done(evaluated, quick, monkeypatch, capsys):
    out, _ = evaluated
    (out / "results.json").unlink(missing_ok=True)
    real, calls = evaluate.evaluate_row, []

    def second_is_interrupted(*args):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args)
    monkeypatch.setattr(evaluate, "evaluate_row", second_is_interrupted)
    code, printed, _ = evaluation(monkeypatch, capsys, out, "--n", 5)
    assert code == 130 and "raster:raster" in printed
    assert [row["name"] for row in json.loads((out / "results.json").read_text())["rows"]] == ["raster:raster"]


def test_bad_input_gets_one_line(evaluated, quick, monkeypatch, capsys, tmp_path):
    out, models = evaluated
    file = data.load(out / "raster.pt", "model", "")
    file["made_from"]["tokenizer"] = "another"
    data.save(tmp_path / "foreign.pt", file)
    file["made_from"].update(tokenizer=Tokenizer.fingerprint.fget(evaluate.load_tokenizer(out / "tokenizer.pt")),
                             data="other")
    data.save(tmp_path / "elsewhere.pt", file)
    data.sheet(torch.zeros(1, 3, 8, 8, dtype=torch.uint8), 1).save(tmp_path / "picture.png")
    before = files_of(out)
    for flags, message in ((("--n", 3), "n in 4..1000000"), (("--n", 10 ** 20), "n in 4..1000000"),
                           (("--batch", 0), "batch at least"), (("--draws", 0), "draws in 1..1000"),
                           (("--temperature", -1), "temperature in 0..100"), (("--data", ""), "no path does not exist"),
                           (("--models", f"{out}/ordered.pt:learned@" + 5000 * "9"), "drawing takes 1 to"),
                           (("--temperature", "nan"), "temperature in 0..100"),
                           (("--models", tmp_path / "foreign.pt"), "another tokenizer"),
                           (("--models", f"{out}/raster.pt:learned"), "knows no learned order"),
                           (("--models", f"{out}/raster.pt:frozen"), "not finetuned"),
                           (("--models", f"{out}/missing.pt:raster"), "does not exist"),
                           (("--models", f"{out}/ordered.pt:learned@0"), "drawing takes 1 to"),
                           (("--models", f"{out}/ordered.pt:learned@all"), "leave out @all"),
                           (("--models", f"{out}/tokenizer.pt:raster"), "tokenizer"),
                           (("--models", tmp_path / "elsewhere.pt"), "not the data"),
                           (("--lpips-backbone", "x.pth"), "both"),
                           (("--inception", out / "raster.pt"), "leave out --inception"),
                           (("--data", tmp_path), "error")):
        code, _, error = evaluation(monkeypatch, capsys, out, *flags)
        assert code == 2 and message in error and error.strip().count("\n") == 0, (flags, error)
    assert files_of(out) == before
    code, _, error = evaluation(monkeypatch, capsys, tmp_path)
    assert code == 2 and "tokenizer.pt does not exist" in error


# ---------------------------------------------------------------------------------------------------------------------
# sample.py: completing, extending, looking on


def small_model(rows=4, cols=4, codebook=16, head=False, seed=0):
    torch.manual_seed(seed)
    model = AnyOrder({"rows": rows, "cols": cols, "codebook": codebook, "width": 32, "layers": 2, "order_head": head,
                      "words": ["low", "red", "sun"], "caption_length": 3}).eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)                          # so large that every input matters
    return model


@pytest.fixture(scope="module")
def studio(tmp_path_factory):
    """A folder with an untrained tokenizer (images of 16x16 pixels, 4x4 cells), an untrained model, and image.png."""
    out = tmp_path_factory.mktemp("studio")
    torch.manual_seed(0)
    tokenizer = Tokenizer({"size": 16, "downsample": 4, "codebook": 16, "width": 8, "fine": 8, "dim": 4}).eval()
    data.save(out / "tokenizer.pt", {"kind": "tokenizer", "version": 1, "config": tokenizer.config,
                                     "made_from": {"data": "0"}, "model": tokenizer.state_dict()})
    for name, head in (("anyorder", False), ("headed", True)):
        save_model(out / f"{name}.pt", small_model(head=head), order="random",
                   captions=["low red sun", "red sun", "sun"], data="sunsets", step=1, tokens_seen=16, seconds=1.0,
                   made_from={"data": "0", "tokenizer": tokenizer.fingerprint, "tokens": "0"})
    sheet(render_sunset(7, 16)[0][None], 1, gap=0).save(out / "image.png")
    return out


@pytest.fixture
def paint(studio, monkeypatch, capsys):
    """paint(*flags) runs sample.py's main in this process
    -> (exit code, what it printed, {picture: its tiles, labels, columns})."""
    def run(*flags):
        pages = {}
        monkeypatch.setattr(sample, "page", lambda path, tiles, labels, columns: pages.update(
            {str(path).split("/")[-1][:-4]: (tiles, labels, columns)}))
        monkeypatch.setattr(sys, "argv", ["sample.py", "--out", str(studio), "--device", "cpu", "--n", "3",
                                          *map(str, flags)])
        code = 0
        try:
            data.run(sample.main)
        except SystemExit as stop:
            code = stop.code or 0
        text = capsys.readouterr()
        return code, text.out + text.err, pages
    return run


def tiles_of(pages, name, given=2):
    """The drawn tiles [n, 3, H, W] of a page at the model's size: sample.py enlarges 16 pixels to 128."""
    return pages[name][0][given:, :, ::8, ::8]


def sunset_file(path):
    return torch.from_numpy(np.array(Image.open(path).convert("RGB"))).permute(2, 0, 1)


# ---------------------------------------------------------------------------------------------------------------------
# Canvases


def test_windows_cover_a_canvas_from_its_middle_outwards():
    assert sample.windows((2, 4), (2, 2)) == [(0, 1), (0, 0), (0, 2)]
    assert sample.windows((4, 4), (4, 4)) == [(0, 0)]
    for shape, grid in (((8, 8), (4, 4)), ((7, 13), (3, 3)), ((5, 5), (3, 2)), ((9, 1), (3, 1)), ((1, 4), (1, 1))):
        corners, times = sample.windows(shape, grid), torch.zeros(shape)
        for top, left in corners:
            assert 0 <= top <= shape[0] - grid[0] and 0 <= left <= shape[1] - grid[1]
            times[top:top + grid[0], left:left + grid[1]] += 1
        assert (times > 0).all() and len(set(corners)) == len(corners)
        assert corners[0] == tuple((whole - side) // 2 for whole, side in zip(shape, grid))


@pytest.mark.parametrize("order", ("raster", "random", "inferred", "learned"))
def test_a_canvas_of_the_grids_size_with_nothing_known_is_plain_sampling(order):
    model, captions = small_model(head=True), ["sun", "low sun", ""]
    tokens, visited, scores = sample.fill(model, captions, torch.randint(16, (3, 16)), torch.zeros(4, 4).bool(),
                                          torch.Generator().manual_seed(5), order=order, guidance=2.0)
    plain, plain_order = sample.generate(model, captions, order, guidance=2.0,
                                         generator=torch.Generator().manual_seed(5))
    assert torch.equal(tokens, plain) and torch.equal(visited, plain_order)
    assert len(scores) == (16 if order in ("inferred", "learned") else 0)


@pytest.mark.parametrize("shape", ((8, 8), (4, 11), (7, 5)))
def test_a_larger_canvas_keeps_what_is_known_and_draws_each_other_cell_once(shape):
    model = small_model()
    known = torch.rand(shape, generator=torch.Generator().manual_seed(1)) < 0.3
    tokens = torch.randint(16, (2, known.numel()))
    found, order, scores = sample.fill(model, ["sun", ""], tokens, known, torch.Generator().manual_seed(0))
    assert torch.equal(found[:, known.flatten()], tokens[:, known.flatten()])
    free = (~known).flatten().nonzero()[:, 0]
    assert torch.equal(order.sort(1).values, free.expand(2, -1))
    assert len(scores) == len(free)
    for step, (cells, value) in enumerate(scores):                             # the best-scored cell is drawn next
        assert torch.equal(cells.gather(1, value.argmax(1, keepdim=True))[:, 0], order[:, step])


def test_each_window_is_given_what_earlier_windows_drew(monkeypatch):
    model, calls, true = small_model(), [], sample.generate

    def spy(model, captions, given, keep, **how):
        calls.append((given.clone(), keep.clone()))
        return true(model, captions, given=given, keep=keep, **how)
    monkeypatch.setattr(sample, "generate", spy)
    known = torch.zeros(4, 8, dtype=torch.bool)
    known[:, 2:6] = True                                                       # the image, in the middle
    tokens = torch.randint(16, (1, 32))
    found, order, _ = sample.fill(model, [""], tokens, known, torch.Generator())
    assert [int(keep.sum()) for _, keep in calls] == [8, 8]                    # left, right: each sees half the image
    for (given, keep), left in zip(calls, (0, 4)):
        assert torch.equal(given[:, keep], found.view(1, 4, 8)[:, :, left:left + 4].flatten(1)[:, keep])
    everything = torch.ones(4, 8, dtype=torch.bool)
    found, order, scores = sample.fill(model, [""], tokens, everything, torch.Generator())
    assert torch.equal(found, tokens) and order.shape == (1, 0) and not scores and len(calls) == 2


def test_a_canvas_of_one_window_decodes_as_the_tokenizer_does_and_larger_ones_fade(studio):
    tokenizer = load_tokenizer(studio / "tokenizer.pt")
    tokens = torch.randint(16, (3, 16))
    torch.testing.assert_close(sample.decode(tokenizer, tokens, (4, 4)), tokenizer.decode(tokens))
    tokens = torch.randint(16, (2, 8 * 4))                                     # three windows: rows 0-3, 2-5, 4-7
    image = sample.decode(tokenizer, tokens, (8, 4))
    parts = [tokenizer.decode(tokens[:, first:first + 16]) for first in (0, 8, 16)]
    torch.testing.assert_close(image[:, :, :8], parts[0][:, :, :8])            # only one window holds the top two rows
    torch.testing.assert_close(image[:, :, 24:], parts[2][:, :, 8:])
    above, below = parts[0][:, :, 8:], parts[1][:, :, :8]
    torch.testing.assert_close(image[:, :, 8:16], torch.lerp(above, below, (torch.arange(8.0) + 1)[:, None] / 9))


# ---------------------------------------------------------------------------------------------------------------------
# The edge of the mask


def test_kept_pixels_come_back_bit_for_bit_and_the_rest_meets_them():
    chance = torch.Generator().manual_seed(0)
    kept = torch.randint(256, (3, 12, 20), generator=chance, dtype=torch.uint8)
    for hidden in (torch.rand(12, 20, generator=chance) < 0.5, torch.zeros(12, 20).bool(), torch.ones(12, 20).bool()):
        drawn = torch.rand(2, 3, 12, 20, generator=chance) * 2 - 1
        found = sample.compose(drawn, kept, hidden, 2.0)
        assert found.dtype == torch.uint8 and torch.equal(found[:, :, ~hidden], kept[:, ~hidden].expand(2, -1, -1))
    assert torch.equal(found, to_uint8(drawn))                                 # all hidden: nothing shifts the drawing
    # a drawing that is 20 levels too dark everywhere: right at the edge that is mended, far away it stays
    flat, hidden = torch.full((3, 8, 40), 120, dtype=torch.uint8), torch.arange(40).expand(8, 40) >= 20
    found = sample.compose(torch.full((1, 3, 8, 40), 100 / 127.5 - 1), flat, hidden, 2.0).int()[0, 0, 4]
    assert (found[:20] == 120).all() and found[20] > 110 and found[-1] == 100 and (found[20:].diff() <= 0).all()


def test_what_is_hidden_is_filled_from_the_nearest_known_pixels():
    value, known = torch.zeros(1, 3, 4, 30), torch.ones(4, 30).bool()
    value[..., 15:], known[:, 10:20] = 1.0, False
    value[..., 10:20] = 99.0                                                   # must not count
    found, share = sample.spread(value, known, 2.0)
    assert found[0, 0, 0, 10] < 0.05 and found[0, 0, 0, 19] > 0.95 and (found[0, 0, 0].diff() >= -1e-6).all()
    assert share[0, 0] > 0.9 and share[0, 14] < 0.1 and 0.3 < share[0, 10] < 0.6


# ---------------------------------------------------------------------------------------------------------------------
# Guidance


def test_a_linear_guidance_schedule_between_equal_ends_is_constant_and_else_changes_on_the_way(monkeypatch):
    model, strengths, true = small_model(), [], sample.guided
    monkeypatch.setattr(sample, "guided",
                        lambda logits, B, guidance: strengths.append(guidance) or true(logits, B, guidance))
    chance = lambda: torch.Generator().manual_seed(3)
    constant, same = (sample.generate(model, ["sun"], "raster", guidance=g, generator=chance())
                      for g in (2.0, (2.0, 2.0)))
    assert torch.equal(constant[0], same[0]) and set(strengths) == {2.0}
    strengths.clear()
    sample.generate(model, ["sun"], "raster", guidance=(0.0, 3.0), generator=chance())
    assert strengths == pytest.approx([3 * k / 15 for k in range(16)])
    strengths.clear()                                                          # cells that are given count as drawn
    sample.generate(model, ["sun"], "raster", guidance=(0.0, 3.0), given=torch.zeros(1, 16).long(),
                    keep=torch.arange(16) < 8)
    assert strengths == pytest.approx([3 * k / 15 for k in range(8, 16)])


def test_guidance_without_a_caption_costs_nothing_and_changes_nothing():
    model, rows = small_model(), []
    model.head.register_forward_hook(lambda _, x, y: rows.append(len(y)))
    plain, guided = (sample.generate(model, ["", ""], "raster", guidance=g)[0] for g in (1.0, 5.0))
    assert torch.equal(plain, guided) and set(rows) == {2}


def test_the_head_watches_its_own_probabilities():
    watch = []
    _, order = sample.generate(small_model(head=True), ["sun"] * 3, "learned", watch=watch)
    for step, (cells, value) in enumerate(watch):
        torch.testing.assert_close(value.exp().sum(1), torch.ones(3))
        assert torch.equal(cells.gather(1, value.argmax(1, keepdim=True))[:, 0], order[:, step])


# ---------------------------------------------------------------------------------------------------------------------
# Masks and captions that a user gives


def test_masks_by_name_on_hand_worked_grids():
    read = lambda text, grid: sample.read_mask(text, None, grid[0] * 2, grid, 0)[::2, ::2].int().tolist()
    assert read("left", (4, 4)) == [[1, 1, 0, 0]] * 4 and read("right", (4, 4)) == [[0, 0, 1, 1]] * 4
    assert read("top", (3, 3)) == [[1] * 3, [0] * 3, [0] * 3]                  # a middle row belongs to no half
    assert read("bottom", (3, 3)) == [[0] * 3, [0] * 3, [1] * 3]
    assert read("center", (4, 4)) == [[0] * 4, [0, 1, 1, 0], [0, 1, 1, 0], [0] * 4]
    assert read("center", (3, 3)) == [[0] * 3, [0, 1, 0], [0] * 3]
    assert [sum(map(sum, read(f"random:{share}", (7, 7)))) for share in (0, 0.5, 1, "1.0", ".2")] == [0, 24, 49, 49, 10]
    assert read("random:0.5", (7, 7)) == read("random:0.5", (7, 7))
    for wrong in ("random:", "random:2", "random:half", "random:nan", "random:-1", "middle"):
        with pytest.raises(UserError, match=wrong if wrong != "random:" else "random"):
            read(wrong, (4, 4))


def test_captions_come_from_the_command_line_and_from_files(tmp_path):
    (tmp_path / "two.txt").write_bytes("\ufeffred sun\n\n  low\tsun \r\n".encode())
    assert sample.read_captions([]) == [] and sample.read_captions([""]) == [""]
    assert sample.read_captions(["sun", str(tmp_path / "two.txt"), ""]) == ["sun", "red sun", "low sun", ""]
    (tmp_path / "empty.txt").write_text("\n")
    os.mkfifo(tmp_path / "pipe.txt")                                           # nobody will ever write to it
    for name in ("empty.txt", "pipe.txt", "missing.txt"):
        with pytest.raises(UserError, match=name + ".*one caption a line"):
            sample.read_captions([str(tmp_path / name)])


def test_numbers():
    assert sample.numbers("-g ", "1.", 0, 9) == (1, 1) and sample.numbers("-g ", ".5", 0, 9) == (0.5, 0.5)
    assert sample.numbers("-g ", "1.5", 0, 9, ":") == (1.5, 1.5) and sample.numbers("-g ", "0:3", 0, 9, ":") == (0, 3)
    for wrong in ("", "a", "1:2:3", "-1", "10", "nan", "inf", "1x2", ":", "1:"):
        with pytest.raises(UserError):
            sample.numbers("-g ", wrong, 0, 9, ":")


# ---------------------------------------------------------------------------------------------------------------------
# From the command line


def test_completing_keeps_all_pixels_outside_the_mask(studio, paint, tmp_path):
    image = sunset_file(studio / "image.png")
    odd = torch.zeros(1, 3, 16, 16, dtype=torch.uint8)
    odd[:, :, 3:10, 5:6] = 255                                                 # not along the cells
    sheet(odd, 1, gap=0).save(tmp_path / "mask.png")
    for mask in ("right", "random:0.5", tmp_path / "mask.png"):
        hidden = sample.read_mask(str(mask), (16, 16), 16, (4, 4), 0)
        code, text, pages = paint("--complete", studio / "image.png", "--mask", mask, "--order", "random",
                                  "--animate", 0)
        assert code == 0 and "warning" not in text, text
        drawn = tiles_of(pages, "completed")
        assert len(drawn) == 3 and torch.equal(drawn[:, :, ~hidden], image[:, ~hidden].expand(3, -1, -1))
        assert len(drawn.unique(dim=0)) == 3                                   # three different completions
        assert pages["completed"][1] == ["original", "given", "", "", ""]
        assert torch.equal(tiles_of(pages, "completed", 0)[0], image)
    assert hidden.sum() == 7


def test_each_image_is_a_file_of_its_own_and_the_folder_is_a_data_set(studio, paint, tmp_path):
    image, folder = sunset_file(studio / "image.png"), tmp_path / "new" / "each"
    captions = ["red, low sun", 'low "sun"', ""]
    code, text, pages = paint("--complete", studio / "image.png", "--mask", "right", "--n", 1, "--animate", 0,
                              "--each", folder, "--caption", *captions)
    assert code == 0 and sorted(os.listdir(folder)) == ["00000.png", "00001.png", "00002.png", "metadata.csv"], text
    tiles = [tile for tile, label in zip(tiles_of(pages, "completed", 0), pages["completed"][1])
             if label not in ("original", "given")]
    for i, caption in enumerate(captions):
        written = sunset_file(folder / f"0000{i}.png")
        assert torch.equal(written, tiles[i]) and torch.equal(written[:, :, :8], image[:, :, :8])
    assert list(data.Folder(str(folder), 16, "train").all_captions.values()) == captions
    before = files_of(folder)
    code, text, _ = paint("--each", folder)
    assert code == 2 and "nothing is overwritten" in text
    assert files_of(folder) == before


def test_what_lies_under_the_mask_is_never_read(studio, paint, tmp_path):
    image = sunset_file(studio / "image.png")
    image[:, :, 8:] = torch.randint(256, (3, 16, 8), dtype=torch.uint8)
    sheet(image[None], 1, gap=0).save(tmp_path / "scribbled.png")
    one, two = (paint("--complete", path, "--mask", "right", "--animate", 0)[2]["completed"][0][1:]
                for path in (studio / "image.png", tmp_path / "scribbled.png"))
    assert torch.equal(one, two)


def test_a_mask_of_nothing_returns_the_image_and_a_mask_of_everything_is_plain_sampling(studio, paint, tmp_path):
    for value, name in ((0, "none"), (255, "all")):
        Image.new("L", (16, 16), value).save(tmp_path / f"{name}.png")
    image = studio / "image.png"
    code, text, pages = paint("--complete", image, "--mask", tmp_path / "none.png")
    assert code == 0 and torch.equal(tiles_of(pages, "completed"), sunset_file(image).expand(3, -1, -1, -1)), text
    for order in ("inferred", "random"):
        _, _, pages = paint("--complete", image, "--mask", tmp_path / "all.png", "--caption", "low sun",
                            "--order", order)
        _, _, plain = paint("--caption", "low sun", "--order", order)
        assert torch.equal(tiles_of(pages, "completed"), tiles_of(plain, "samples", 0))
        _, _, other = paint("--caption", "low sun", "--order", order, "--seed", 1)
        assert not torch.equal(tiles_of(other, "samples", 0), tiles_of(plain, "samples", 0))


def test_a_caption_edits_and_each_caption_has_its_images(studio, paint):
    flags = ("--complete", studio / "image.png", "--mask", "center", "--animate", 0, "--guidance", "0:9", "--caption")
    _, _, pages = paint(*flags, "low sun", "red")
    assert pages["completed"][1] == ["original", "given"] + ["low sun"] * 3 + ["original", "given"] + ["red"] * 3
    _, _, other = paint(*flags, "red", "red")
    first, second = tiles_of(pages, "completed"), tiles_of(other, "completed")
    assert not torch.equal(first[:3], second[:3])                              # same dice, another caption
    for n in (6, 7, 8):
        _, labels, columns = paint(*flags, "low sun", "red", "--n", n)[2]["completed"]
        assert [i % columns for i, label in enumerate(labels) if label == "original"] == [0, 0]


def test_an_extended_canvas_holds_the_image_untouched(studio, paint):
    image = sunset_file(studio / "image.png")
    for factor, height, width in (("2x", 32, 32), ("2x1", 16, 32), ("1.5x", 24, 24), ("1x3", 48, 16)):
        code, text, pages = paint("--complete", studio / "image.png", "--extend", factor, "--animate", 0,
                                  "--order", "random")
        drawn = tiles_of(pages, "extended")[:3]                                # and white ones that fill the row
        assert code == 0 and drawn.shape == (3, 3, height, width), text
        top, left = ((side // 4 - 4) // 2 * 4 for side in (height, width))
        assert torch.equal(drawn[:, :, top:top + 16, left:left + 16], image.expand(3, -1, -1, -1))
    code, text, pages = paint("--extend", "2x1", "--animate", 0, "--order", "raster")          # without an image
    assert code == 0 and tiles_of(pages, "extended", 0).shape == (3, 3, 16, 32), text


def test_images_of_another_size_are_resized_with_a_warning(studio, paint, tmp_path):
    sheet(render_sunset(7, 45)[0][None], 1, gap=0).save(tmp_path / "odd.png")
    code, text, pages = paint("--complete", tmp_path / "odd.png", "--mask", "left", "--animate", 0, "--order", "raster")
    assert (code == 0 and text.startswith("warning: ") and "45x45" in text.splitlines()[0]
            and "16x16" in text.splitlines()[0])
    image = data.read_image(tmp_path / "odd.png", 16)
    assert torch.equal(tiles_of(pages, "completed")[:, :, :, 8:], image[:, :, 8:].expand(3, -1, -1, -1))
    # a photo that lies on its side has the size that one sees
    turned = Image.new("RGB", (20, 31), "red")
    exif = Image.Exif()
    exif[0x0112] = 6
    turned.save(tmp_path / "turned.jpg", exif=exif)
    assert sample.read_picture(tmp_path / "turned.jpg").shape == (3, 20, 31)


@pytest.mark.parametrize("width, height", ((128, 128), (45, 30), (9, 20)))
def test_what_lies_under_the_mask_of_a_resized_image_reaches_no_kept_pixel(tmp_path, width, height):
    dice = torch.Generator().manual_seed(0)
    whole = torch.randint(64, 192, (3, height, width), generator=dice, dtype=torch.uint8)  # resizing overshoots
    hidden = torch.linspace(0, 1, height)[:, None] + torch.linspace(0, 1, width) > 1.1
    other = torch.where(hidden, 255 - whole, whole)
    # black and white, and white on what is transparent
    white = torch.full_like(hidden, 255, dtype=torch.uint8)
    for layers in (hidden * white[None], torch.stack((white, hidden * white))):
        Image.fromarray(layers.permute(1, 2, 0).squeeze(2).numpy()).save(tmp_path / "mask.png")
        mask = sample.read_mask(str(tmp_path / "mask.png"), whole.shape[1:], 16, (4, 4), 0)
        assert torch.equal(mask, hidden)
    one, two = (sample.resized("it", picture, 16, mask) for picture in (whole, other))
    assert torch.equal(one[1], two[1]) and torch.equal(one[0][:, ~one[1]], two[0][:, ~two[1]])
    # what is hidden still shows the original, and away from the edge of the mask all is as without one
    plain, none = sample.resized("it", whole, 16)
    far = torch.nn.functional.avg_pool2d(one[1][None].float(), 13, 1, 6, count_include_pad=False)[0] == 0
    assert none is None and far.any() and (plain.int() - one[0].int())[:, far].abs().max() <= 1    # Pillow's rounding
    assert torch.equal(plain[:, one[1]], one[0][:, one[1]])
    # a sky of one colour keeps it up to the edge
    sky, _ = sample.resized("it", torch.where(hidden, whole, 200), 16, mask)
    assert (sky[:, ~one[1]] == 200).all()


def test_the_film_starts_with_what_is_given_and_ends_with_the_images(studio, paint):
    _, _, pages = paint("--complete", studio / "image.png", "--mask", "right", "--why", 3)
    film = Image.open(studio / "completed.gif")
    assert film.n_frames == 9 and film.info["loop"] == 0                       # 8 free cells and the end
    shown = tiles_of(pages, "completed")
    film.seek(8)
    last = torch.from_numpy(np.array(film.convert("RGB"))).permute(2, 0, 1).int()
    at = lambda i: last[:, 2:130:8, 2 + 130 * i:130 * (i + 1):8]
    assert all((at(i) - shown[i].int()).abs().float().mean() < 12 for i in range(3))  # as near as 256 colours allow
    still = pages["completed_why"]
    assert len(still[0]) == 3 and all(re.fullmatch(r"from -\d.* \(dark\) to -\d.* nats", label) for label in still[1])


def test_the_brightest_free_cell_is_framed_and_drawn_next():
    images, rank = torch.zeros(1, 3, 16, 16, dtype=torch.uint8), torch.tensor([[[-1, 0], [1, 2]]])
    hidden = torch.ones(16, 16).bool()
    hidden[:8, :8] = False
    scores = [(torch.tensor([[1, 2, 3]]), torch.tensor([[-1.0, -3.0, -2.0]])),
              (torch.tensor([[2, 3]]), torch.tensor([[-1.0, -2.0]])), (torch.tensor([[3]]), torch.tensor([[-4.0]]))]
    for step, next_cell in enumerate(((0, 1), (1, 0), (1, 1))):
        shown = sample.thinking(images, hidden, rank, scores, step, 4)[0].int()                # [3, 64, 64]
        assert (shown[:, :32, :32] == 0).all()                                 # what is given shows the image
        middles = shown[:, 16::32, 16::32].sum(0)
        assert (middles == middles.max()).nonzero().tolist() == [list(next_cell)]
        framed = (shown[:, ::32, ::32] == torch.tensor([0, 220, 255])[:, None, None]).all(0)
        assert framed.nonzero().tolist() == [list(next_cell)]
    assert (sample.thinking(images, hidden, rank, scores, 3, 4) == 0).all()    # all drawn
    grey = sample.thinking(images, hidden, rank, [], 0, 4)[0, :, 16::32, 16::32]
    assert (grey.flatten(1)[:, 1:] == 150).all()                               # an order without scores


def test_likelihood_prints_what_the_model_says(studio, paint):
    code, text, pages = paint("--likelihood", studio / "image.png", "--caption", "", "low sun")
    assert code == 0, text
    model, tokenizer = small_model(), load_tokenizer(studio / "tokenizer.pt")
    tokens = tokenizer.encode(to_float(sunset_file(studio / "image.png"))[None])
    truth = [-model.log_probs(tokens, [caption], order).mean().item() for caption in ("", "low sun")
             for order in (raster_order(1, 16), infer_orders(model, tokens, [caption]))]
    found = [float(value) for value in re.findall(r"(?:raster|inferred) +(\d+\.\d+)", text)]
    assert found == pytest.approx(truth, abs=6e-4)
    assert len(pages["likelihood"][0]) == len(pages["likelihood"][1]) == 12
    assert f"{math.log(16):.3f}" in text and "'low sun'" in text


def test_pictures_are_written_with_their_labels(tmp_path):
    tiles = torch.zeros(3, 3, 32, 32, dtype=torch.uint8)
    sample.page(str(tmp_path / "new" / "a.png"), tiles,
                ["one", "a label of many words, more than three lines hold", "été \U0001f600"], 2)
    plain = sheet(tiles, 2, gap=4 + 15 * 3)
    written = Image.open(tmp_path / "new" / "a.png")
    assert written.size == plain.size and written.tobytes() != plain.tobytes()


@pytest.mark.parametrize("flags, needle", (
    (("--mask", "left"), "--complete"),
    (("--complete", "{image}"), "--mask"),
    (("--complete", "nothing.png", "--mask", "left"), "nothing.png"),
    (("--complete", "{text}", "--mask", "left"), "words.txt"),
    (("--complete", "{image}", "--mask", "{small}"), "8x8"),
    (("--complete", "{image}", "--mask", "middle"), "center"),
    (("--complete", "{image}", "--mask", "{text}"), "words.txt"),
    (("--complete", "{image}", "--mask", "random:7"), "random:7"),
    (("--complete", "{image}", "--extend", "2y"), "2y"),
    (("--extend", "0.5x"), "0.5"),
    (("--extend", "99x"), "99"),
    (("--guidance", "1:2:3"), "1:2:3"),
    (("--guidance", "nan"), "nan"),
    (("--caption", "{text}/no.txt"), "no.txt"),
    (("--caption", "zebra"), "zebra"),
    (("--caption", "low low red sun"), "4 words"),
    (("--n", 0), "--n 0"),
    (("--n", 10_001), "10,000"),
    (("--n", 5_001, "--caption", "sun", "red"), "10,000"),
    (("--temperature", "inf"), "--temperature inf"),
    (("--why", 17), "16"),
    (("--why", -1), "--why"),
    (("--why", 3, "--order", "raster"), "raster"),
    (("--animate", -1), "--animate"),
    (("--likelihood", "{image}", "--extend", "2x"), "--likelihood"),
    (("--likelihood", "{image}", "--each", "new"), "--each"),
    (("--each", "{out}"), "not an empty folder"),
    (("--each", "{text}"), "words.txt"),
    (("--likelihood", "{text}"), "words.txt"),
    (("--likelihood", ""), "cannot be read"),
))
def test_what_sample_cannot_do_is_said_in_one_line(studio, paint, tmp_path, flags, needle):
    (tmp_path / "words.txt").write_text("no image")
    Image.new("L", (8, 8)).save(tmp_path / "small.png")
    places = {"image": studio / "image.png", "text": tmp_path / "words.txt", "small": tmp_path / "small.png",
              "out": studio}
    code, text, pages = paint(*(str(flag).format(**places) for flag in flags))
    last = text.strip().splitlines()[-1]
    assert code == 2 and last.startswith("error: ") and needle in last and not pages


# ---------------------------------------------------------------------------------------------------------------------
# Stop and go on; more than one process

STAGES = {"tokenizer": ("--size", 16, "--codebook", 16, "--steps", 50, "--batch", 4),
          "anyorder": ("--steps", 6, "--batch", 8, "--width", 32, "--layers", 2),
          "finetune": ("--steps", 6, "--batch", 8), "order_infer": ()}
RESULT = {"tokenizer": "tokenizer.pt", "anyorder": "anyorder.pt", "finetune": "ordered.pt", "order_infer": "orders.pt"}
FRESH = {"tokenizer": (), "anyorder": ("tokenizer.pt", "tokens.pt"),
         "order_infer": ("tokenizer.pt", "tokens.pt", "anyorder.pt"),
         "finetune": ("tokenizer.pt", "tokens.pt", "anyorder.pt", "orders.pt")}


def tensors_of(path):
    """All tensors of a .pt, whatever their depth, without the seconds that differ from run to run."""
    def walk(value, name):
        if isinstance(value, torch.Tensor):
            yield name, value
        elif isinstance(value, dict):
            for key in value:
                yield from walk(value[key], f"{name}.{key}")
    return dict(walk(torch.load(path, weights_only=True), ""))


def same(a, b):
    a, b = tensors_of(a), tensors_of(b)
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def start_of(stage, chain, folder):
    """A copy of the chain's folder with all that `stage` needs and none of what it writes."""
    folder.mkdir()
    for name in FRESH[stage]:
        shutil.copy(chain[1] / name, folder)
    return folder


def flags_of(stage, chain):
    return *STAGES[stage], *("--data", chain[0]) * (stage == "tokenizer")


def control_c(patch, updates):
    """A real SIGINT at the so-many-th move of a progress bar, which all stages move once a step."""
    real, moves = data.tqdm.update, itertools.count(1)

    def update(bar, n=1):
        if next(moves) == updates:
            signal.raise_signal(signal.SIGINT)
        return real(bar, n)
    patch.setattr(data.tqdm, "update", update)


class StopAfter(list):
    """Stands for Ctrl-C after so many steps."""

    def __init__(self, steps):
        self.left = steps

    def __bool__(self):                                # asked once or twice a step
        self.left -= 1
        return self.left <= 0


@pytest.mark.parametrize("stage", STAGES)
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(stage, chain, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(order_infer, "images_at_once", lambda model: 8)
    whole, parts = (start_of(stage, chain, tmp_path / name) for name in ("whole", "parts"))
    flags = flags_of(stage, chain)
    assert call(monkeypatch, capsys, stage, "--out", whole, *flags)[0] == 0
    with monkeypatch.context() as patch:
        control_c(patch, 43 if stage == "tokenizer" else 4)
        code, printed = call(patch, capsys, stage, "--out", parts, *flags)
    left = next(parts.glob("*_resume.pt"))
    assert code == 130 and f"the same command with --resume goes on from {left}" in printed
    code, printed = call(monkeypatch, capsys, stage, "--out", parts, *flags, "--resume")
    assert code == 0, printed
    assert same(whole / RESULT[stage], parts / RESULT[stage]) and not list(parts.glob("*_resume.pt"))


def test_resume_refuses_other_settings(chain, tmp_path, monkeypatch, capsys):
    out = start_of("anyorder", chain, tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(anyorder, "on_interrupt", lambda: StopAfter(3))
        assert call(patch, capsys, "anyorder", "--out", out, *STAGES["anyorder"])[0] == 130
    before = files_of(out)
    code, printed = call(monkeypatch, capsys, "anyorder", "--out", out, *STAGES["anyorder"], "--lr", 0.1, "--resume")
    assert code == 2 and "another lr" in printed and files_of(out) == before
    state = torch.load(out / "anyorder_resume.pt", weights_only=True)
    del state["config"]["optimizer"], state["optimizers"]                  # as before there was Muon
    data.save(out / "anyorder_resume.pt", state)
    code, printed = call(monkeypatch, capsys, "anyorder", "--out", out, *STAGES["anyorder"], "--resume")
    assert code == 2 and "another optimizer" in printed


@pytest.mark.parametrize("spoil", (lambda x: x * math.nan, lambda x: x + (x * 0).sqrt()), ids=("loss", "gradient"))
@pytest.mark.parametrize("stage", ("tokenizer", "anyorder", "finetune"))
def test_a_loss_or_gradient_not_finite_keeps_the_last_good_model(stage, spoil, chain, tmp_path, monkeypatch, capsys):
    """The fourth step goes wrong. The second way gives a finite loss whose derivative is not."""
    out, calls = start_of(stage, chain, tmp_path / "out"), itertools.count()
    monkeypatch.setattr(importlib.import_module(stage), "SAVE_EVERY", -1)
    if stage == "tokenizer":
        loss = Tokenizer.loss
        monkeypatch.setattr(Tokenizer, "loss", lambda *a: spoil(loss(*a)) if next(calls) == 3 else loss(*a))
    else:
        whole = AnyOrder.forward

        def forward(*a):
            what, where = whole(*a)
            return spoil(what) if torch.is_grad_enabled() and next(calls) == 3 else what, where
        monkeypatch.setattr(AnyOrder, "forward", forward)
    code, printed = call(monkeypatch, capsys, stage, "--out", out, *flags_of(stage, chain))
    assert code == 2 and "nan" in printed and "at step 3" in printed and "try " in printed
    kept = [out / RESULT[stage]] * (stage != "tokenizer") + list(out.glob("*_resume.pt"))
    assert all(tensor.isfinite().all() for path in kept for tensor in tensors_of(path).values())
    assert torch.load(kept[-1], weights_only=True)["step"] == 3


@pytest.mark.parametrize("stage", ("tokenizer", "anyorder", "finetune"))
def test_gradients_are_clipped(stage, chain, tmp_path, monkeypatch, capsys):
    out, norms, clip = start_of(stage, chain, tmp_path / "out"), [], torch.nn.utils.clip_grad_norm_

    def clipped(parameters, most):
        parameters = [p for p in parameters if p.grad is not None]
        for p in parameters:
            p.grad *= 1e4
        before = clip(parameters, most)
        norms.append((before.item(), torch.cat([p.grad.flatten() for p in parameters]).norm().item()))
        return before
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clipped)
    assert call(monkeypatch, capsys, stage, "--out", out, *flags_of(stage, chain), "--steps", 2)[0] == 0
    assert len(norms) == 2 and all(before > 10 and after < 1.001 for before, after in norms)


def test_bfloat16_only_where_it_is_faster(monkeypatch):
    clock = iter(range(10 ** 6))
    monkeypatch.setattr(anyorder.time, "perf_counter", lambda: next(clock))
    probe = PROBED.__wrapped__
    assert probe(torch.device("cpu")) == torch.float32                     # not faster
    assert probe(torch.device("mps")) == torch.float32
    for seconds in ([0, 9, 0, 1] * 8, [0, 9, 0, 99] * 7 + [0, 9, 0, 1]):   # always faster; and disturbed all but once
        clock = iter(seconds)
        assert probe(torch.device("cpu")) == torch.bfloat16


@pytest.mark.parametrize("stage", STAGES)
def test_a_full_disk_during_a_stage_leaves_the_last_good_files(stage, chain, tmp_path, monkeypatch, capsys):
    out = start_of(stage, chain, tmp_path / "out")
    assert call(monkeypatch, capsys, stage, "--out", out, *flags_of(stage, chain))[0] == 0
    before = files_of(out)

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(data.os, "fsync", full)
    code, printed = call(monkeypatch, capsys, stage, "--out", out, *flags_of(stage, chain))
    assert code == 2 and files_of(out) == before
    assert [line for line in printed.splitlines() if line.startswith("error: ") and "No space left on device" in line]


def test_a_file_that_claims_a_billion_channels_or_layers_takes_no_memory(chain, tmp_path):
    for name, reader in (("tokenizer", load_tokenizer), ("anyorder", load_model)):
        file = torch.load(chain[1] / f"{name}.pt", weights_only=True)
        for key in set(file["config"]) & {"width", "layers", "codebook", "size", "rows", "dim", "downsample"}:
            for value in (10 ** 9, -1, 2.5, "8", None):
                save(tmp_path / "a.pt", {**file, "config": {**file["config"], key: value}})
                with pytest.raises(UserError, match=f"damaged.*python {name}.py again"):
                    reader(tmp_path / "a.pt")


READERS = {"tokenizer": ("sample", "order_infer"), "tokens": ("anyorder", "order_infer", "finetune"),
           "anyorder": ("order_infer", "finetune"), "orders": ("finetune",), "ordered": ("sample",)}


@pytest.mark.parametrize("name", READERS)
def test_a_spoilt_file_of_the_chain_gives_one_line_and_changes_nothing(name, chain, tmp_path, monkeypatch, capsys):
    """Cut, with one bit turned, of another kind, or written by a stranger: with a key missing, or nonsense in it."""
    out = tmp_path / "out"
    shutil.copytree(chain[1], out)
    good, file = (out / f"{name}.pt").read_bytes(), torch.load(out / f"{name}.pt", weights_only=True)
    spoilt = [b"", good[:len(good) // 2], good[:-1], good[:300] + bytes([good[300] ^ 4]) + good[301:]]
    spoilt += [(out / f"{other}.pt").read_bytes() for other in READERS if other != name]
    for key in file:
        for value in (None, "x", torch.full((3, 3), 10 ** 9)):
            save(out / "spoilt.pt",
                 {k: v for k, v in file.items() if k != key} | ({} if value is None else {key: value}))
            spoilt.append((out / "spoilt.pt").read_bytes())
    (out / "spoilt.pt").unlink()
    refused = 0
    for raw in spoilt:
        (out / f"{name}.pt").write_bytes(raw)
        before = files_of(out)
        for script in READERS[name]:
            flags = {"sample": ("--n", 1, "--animate", 0), "anyorder": STAGES["anyorder"]}.get(script, ())
            code, printed = call(monkeypatch, capsys, script, "--out", out, *flags, *("--steps", 1) * (script in STAGES
                                 and script != "order_infer"))
            assert code in (0, 2) and "Traceback" not in printed
            if code == 2:                                  # else a key that this reader does not need
                assert printed.strip().splitlines()[-1].startswith("error: ") and files_of(out) == before
                refused += 1
            else:
                for path in set(files_of(out)) - set(before):
                    (out / path).unlink()
                for path, content in before.items():
                    (out / path).write_bytes(content)
    assert refused > len(spoilt) // 2


def test_models_and_orders_of_other_tokens_are_refused(chain, tmp_path, monkeypatch, capsys):
    pictures, out, _ = chain
    other = tmp_path / "other"
    shutil.copytree(out, other)
    file = torch.load(other / "tokens.pt", weights_only=True)
    file["tokens"] = file["tokens"].flip(0)
    data.save(other / "tokens.pt", file)
    for stage in ("order_infer", "finetune"):
        before = files_of(other)
        code, printed = call(monkeypatch, capsys, stage, "--out", other)
        assert code == 2 and "another tokens.pt" in printed and files_of(other) == before


def torchrun(program, *lines, every=0.1):
    """Two processes, each on one thread, that call the scripts of `lines` in turn: one start of Python for them all.
    torchrun looks `every` so many seconds whether both are alive, and ends one whose fellow is not."""
    program = ("import importlib, json, os, signal, sys; import tokenizer, torch\n"
               "tokenizer.precision = lambda device: (torch.float32 if os.environ['RANK'] == '0' else torch.bfloat16)\n"
               "import anyorder, data, order_infer, sample\n" + program +
               "\nfor script, *flags in json.loads(sys.argv[1]):\n"
               "    sys.argv = [script + '.py', *flags, '--device', 'cpu']\n"
               "    data.run(importlib.import_module(script).main)")
    return subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
                           f"--monitor-interval={every}", "--no-python", sys.executable, "-c", program,
                           json.dumps([[str(word) for word in line] for line in lines])],
                          cwd=HERE, capture_output=True, text=True, timeout=180,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})


def test_torchrun_leaves_flags_to_the_script(studio):
    """`--n` alone could mean torchrun's --nnodes, and nothing would start."""
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1", "--",
                           "sample.py", "--out", studio, "--n", "0"], cwd=HERE, capture_output=True, text=True,
                          timeout=120, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode and "error: --n 0 " in done.stderr


@pytest.fixture
def float32(monkeypatch):
    """What differs by the order of summation only is close in float32. (bfloat16 has 3 digits, and Adam's first steps
    make much of little.)"""
    compute_in(monkeypatch, lambda device: torch.float32)


def close(a, b):
    """Equal up to the order of summation."""
    a, b = tensors_of(a), tensors_of(b)
    assert a.keys() == b.keys()
    for key in a:
        torch.testing.assert_close(a[key], b[key], rtol=1e-4, atol=1e-5)


def test_two_processes_do_what_one_does(chain, float32, tmp_path, monkeypatch, capsys):
    """The later half of the any-order training, which one process began, order inference, finetuning, and then samples
    and evaluation of the same models."""
    small = "order_infer.images_at_once, sample.BATCH = lambda model: 9, 2"    # so that there is something to share
    monkeypatch.setattr(order_infer, "images_at_once", lambda model: 9)
    monkeypatch.setattr(sample, "BATCH", 2)
    torch.set_num_threads(1)
    lines = {}
    for side in ("one", "two"):
        stages = {stage: start_of(stage, chain, tmp_path / (side + stage))
                  for stage in ("anyorder", "order_infer", "finetune")}
        shutil.copytree(chain[1], tmp_path / (side + "out"))
        out = tmp_path / (side + "out")
        lines[side] = [[stage, "--out", stages[stage], *STAGES[stage]] for stage in stages] + [
            ["sample", "--out", out, "--n", 5], ["sample", "--out", out, "--likelihood", chain[0] / "003.png"],
            ["evaluate", "--out", out, "--n", 10, "--draws", 2, "--batch", 3, "--models", *(f"{out}/{m}" for m in (
                "anyorder.pt:random", "anyorder.pt:inferred", "ordered.pt:learned"))]]
    printed = [call(monkeypatch, capsys, *line, "--device", "cpu") for line in lines["one"]]
    assert all(code == 0 for code, _ in printed)
    with monkeypatch.context() as patch:
        control_c(patch, 3)
        assert call(patch, capsys, *lines["two"][0], "--device", "cpu")[0] == 130
    torch.set_num_threads(2)
    lines["two"][0].append("--resume")
    done = torchrun(small, *lines["two"])
    assert done.returncode == 0, done.stderr
    for text in ("16 codes", "mean rank of each cell", "to check; before", "5 images in learned",
                 "nats per token, caption", "10 images drawn per row"):
        assert done.stdout.count(text) == 1            # rank 0 alone prints
    for stage in ("anyorder", "order_infer", "finetune"):
        close(*(tmp_path / (side + stage) / RESULT[stage] for side in ("one", "two")))
    for name in ("samples.png", "samples_order.png", "samples.gif", "compare.png", "likelihood.png", "judge.pt"):
        one, two = ((tmp_path / (side + "out") / name).read_bytes() for side in ("one", "two"))
        assert one == two, name
    one, two = (json.loads((tmp_path / (side + "out") / "results.json").read_text()) for side in ("one", "two"))
    for report in (one, two):
        del report["command"]
        for row in report["rows"]:
            assert row.pop("images_per_second") > 0
    assert one == two and len(one["rows"]) == 3


def test_ctrl_c_in_one_of_two_processes_stops_both_after_the_same_step(chain, float32, tmp_path, monkeypatch,
                                                                       capsys):
    one, two = (start_of("anyorder", chain, tmp_path / name) for name in ("one", "two"))
    assert call(monkeypatch, capsys, "anyorder", "--out", one, *STAGES["anyorder"])[0] == 0
    third = ("rate = anyorder.learning_rate\n"
             "anyorder.learning_rate = lambda step, *a: [os.environ['RANK'] == '1' and step == 2 and "
             "os.kill(os.getpid(), signal.{}), rate(step, *a)][1]")
    line = ["anyorder", "--out", two, *STAGES["anyorder"]]
    done = torchrun(third.format("SIGINT"), line)
    assert done.returncode != 0 and done.stdout.count("stopped at step 3: the same command with --resume goes on") == 1
    assert done.stderr.count("stopped") == 1 and "gloo" not in done.stderr
    code, printed = call(monkeypatch, capsys, *line, "--resume")               # one process goes on where two stopped
    assert code == 0, printed
    close(one / "anyorder.pt", two / "anyorder.pt")
    # and one that dies takes the other with it, soon (else the time of `torchrun` is over), and both say so: `every`
    # leaves the other the time to speak before it is ended, even where the machine is busy
    done = torchrun(third.format("SIGKILL"), line, every=5)
    assert done.returncode != 0
    assert "error: another process of this run has died" in done.stderr and re.search(r"exitcode *: -9", done.stderr)
    assert "RuntimeError" not in done.stderr and load_model(two / "anyorder.pt").about["step"] == 2


@slow
@pytest.mark.parametrize("stage", STAGES)
def test_killed_at_any_moment_and_resumed_equals_uninterrupted(stage, chain, tmp_path):
    """SIGKILL at 20 random moments of a run that saves after every step; what is on the disk then can be resumed."""
    program = (f"import sys, data, order_infer, {stage}; {stage}.SAVE_EVERY = -1; "
               f"order_infer.images_at_once = lambda m: 1; sys.argv[0] = '{stage}.py'; data.run({stage}.main)")
    flags = [str(flag) for flag in flags_of(stage, chain)] + ["--steps", "100"] * (stage != "order_infer")
    run = lambda out, *more: subprocess.Popen([sys.executable, "-c", program, "--out", str(out), *flags, *more],
                                              cwd=HERE, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)

    def begun(process, out):
        """Waits until it writes something: a kill while Python starts would prove nothing."""
        at = out.stat().st_mtime_ns
        while process.poll() is None and out.stat().st_mtime_ns == at:
            time.sleep(0.001)
        return process
    whole = start_of(stage, chain, tmp_path / "whole")
    process, started = begun(run(whole), whole), time.time()
    assert process.wait() == 0
    seconds, random = time.time() - started, torch.Generator().manual_seed(0)
    out, kills = start_of(stage, chain, tmp_path / "out"), 0
    while kills < 20:
        process = begun(run(out, *["--resume"] * any(out.glob("*_resume.pt"))), out)
        try:
            process.wait(seconds / 2 * torch.rand((), generator=random).item())
            assert process.returncode == 0, process.stderr.read()
            assert same(whole / RESULT[stage], out / RESULT[stage])        # done before it was killed: begin again
            shutil.rmtree(out)
            start_of(stage, chain, out)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            kills += 1
        for file in out.glob("*.pt"):
            torch.load(file, weights_only=True)        # never half a file
    assert run(out, *["--resume"] * any(out.glob("*_resume.pt"))).wait() == 0
    assert same(whole / RESULT[stage], out / RESULT[stage])
