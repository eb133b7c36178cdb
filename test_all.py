"""Small proofs of what the other files claim. `pytest -q test_all.py`: no network, no data files, no GPU, 6 minutes.

Everything is tiny (grids of 2x2 and 3x3, models of width 32, images that data.py renders), because what is true of
every size is easiest to check where all cases can be counted. `pytest -m slow` runs the long ones too.
"""

import ast
import itertools
import math
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import anyorder
import data
import finetune
import order_infer
import sample
import tokenizer
from anyorder import AnyOrder, Drawing, draw, random_order, rank_of, raster_order
from order_infer import SCORES, infer_orders, location_scores

HERE = Path(__file__).parent
SCRIPTS = ("data", "tokenizer", "anyorder", "order_infer", "finetune", "sample", "evaluate")
torch.set_num_threads(2)


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
    done = subprocess.run([sys.executable, str(HERE / f"{script}.py"), *map(str, flags)], capture_output=True, text=True)
    assert done.returncode == expect, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout + done.stderr


def call(monkeypatch, capsys, script, *flags):
    """Runs a script's main() in this process (quicker); returns (exit code, what it printed)."""
    import importlib
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
    """The whole chain through its .pt files, each stage from its own command line, at tiny size: (data, out, printed)."""
    root = tmp_path_factory.mktemp("chain")
    pictures, out = picture_folder(root / "pictures"), root / "out"
    common = ("--out", out, "--device", "cpu")
    small = ("--width", 32, "--layers", 2, "--batch", 8)
    printed = {"tokenizer": command("tokenizer", "--data", pictures, "--size", 16, "--codebook", 16, "--steps", 30, *common)}
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
    model = tiny(seed=3)
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
            cells = torch.stack((order[:, 8], order[:, k]), 1)             # another offer must not disturb
            torch.testing.assert_close(drawing.look(cells)[:, 1], what[:, k], rtol=1e-4, atol=1e-4)
            drawing.place(torch.ones(5, dtype=torch.long), tokens.gather(1, order[:, k:k + 1])[:, 0])


def test_captions_change_the_distribution_and_unknown_words_read_as_none():
    model = tiny()
    tokens, order = torch.zeros(1, 4, dtype=torch.long), raster_order(1, 4)
    sun, sea, none, unknown = (model.log_probs(tokens, [c], order) for c in ("sun", "sea", "", "zebra"))
    assert not torch.allclose(sun, sea) and not torch.allclose(sun, none) and torch.equal(none, unknown)
    with pytest.raises(data.UserError, match="sun"):
        model.check_words(["sunn"])


def test_a_tiny_model_overfits_eight_images():
    torch.manual_seed(0)
    model = AnyOrder({"rows": 3, "cols": 3, "codebook": 8, "width": 64, "layers": 3, "order_head": False,
                      "words": [str(i) for i in range(8)], "caption_length": 1})
    tokens, captions = torch.randint(8, (8, 9)), [str(i) for i in range(8)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(250):
        loss = -model.log_probs(tokens, captions, random_order(8, 9)).mean()
        loss.backward()
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


def test_inference_in_several_batches_gives_the_same_orders(monkeypatch):
    model = tiny(3, 3, codebook=7)
    tokens = torch.randint(7, (7, 9))
    whole = infer_orders(model, tokens, ["sun"] * 7)
    monkeypatch.setattr(order_infer, "images_at_once", lambda model: 3)
    assert torch.equal(whole, infer_orders(model, tokens, ["sun"] * 7))


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


def test_finetuning_starts_from_the_any_order_model(chain):
    _, out, _ = chain
    a, b = (anyorder.load_model(out / f) for f in ("anyorder.pt", "ordered.pt"))
    assert b.config["order_head"] and not a.config["order_head"]
    assert {k: v for k, v in b.config.items() if k != "order_head"} == {k: v for k, v in a.config.items() if k != "order_head"}
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


def test_likelihood_keeps_the_likeliest_draw():
    model = tiny(3, 3, codebook=7)
    plain, likely = (sample.generate(model, ["sun"] * 64, "inferred", score=s) for s in ("confidence", "likelihood"))
    gain = [model.log_probs(t, ["sun"] * 64, o).sum(1).mean() for t, o in (plain, likely)]
    assert gain[1] > gain[0]                                               # a cut in temperature in disguise


def test_samples_follow_the_model_distribution():
    model = tiny(1, 2, codebook=2, seed=1)
    images = all_images(2, 2)
    for order in (torch.tensor([[0, 1]]), torch.tensor([[1, 0]])):
        truth = model.log_probs(images, ["sun"] * 4, order.expand(4, 2)).sum(1).exp()
        drawn, _ = sample.generate(model, ["sun"] * 4000, order.expand(4000, 2))
        share = torch.bincount(drawn[:, 0] * 2 + drawn[:, 1], minlength=4) / 4000
        assert (share - truth).abs().max() < 0.04                          # 5 standard errors: 1 false alarm in a million


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


def test_orders_on_disk_are_the_orders_that_the_model_infers(chain):
    _, out, _ = chain
    held = anyorder.open_tokens(out)
    file = order_infer.load_orders(out / "orders.pt", held)
    model, row = anyorder.load_model(out / "anyorder.pt"), file["index"][:6]
    captions = [held["captions"][i] for i in held["caption_index"][row].tolist()]
    assert torch.equal(file["order"][:6], infer_orders(model, held["tokens"][row], captions))
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


@pytest.mark.parametrize("script, flags, needle", (
    ("anyorder", ("--data", "no/such/path"), "no/such/path"),
    ("anyorder", ("--width", 33), "32"),
    ("anyorder", ("--lr", "nan"), "learning rate"),
    ("anyorder", ("--steps", 0), "--steps"),
    ("anyorder", ("--device", "toaster"), "toaster"),
    ("anyorder", ("--stepps", 3), "--stepps"),
    ("anyorder", ("--resume",), "anyorder_resume.pt"),
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
            flags += re.findall(r"\w+", call_of.group(1)) if call_of and call_of.group(1) else ["data", "out", "seed", "device"]
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
             "order_infer": "--limit 8", "finetune": "--steps 2 --batch 8", "sample": "--n 2", "evaluate": "--n 12", "data": ""}
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
