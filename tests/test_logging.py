"""What a run says of itself: how well it uses the machine, and loggers that may come, go on and fail without harm."""

import json
import re
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from conftest import GPT_TOML, ROOT, TEXT, call, train_run
from test_train import log, small

import train
from model import GPT
from plumbing import loggers, meters, ranks
from plumbing.checkpoints import load_checkpoint
from plumbing.machine import most_memory
from plumbing.runs import Run

SHORT = ["--train.steps=4", "--train.log_every=1", "--train.eval_every=2", "--train.eval_batches=1"]
MORE = [*SHORT, "--train.steps=6", "--train.resume=true"]


def numbers(out):
    return [(line.pop("step"), line) for line in log(out)]


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A function: make this text a module that can be imported."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def written(name, text):
        (tmp_path / f"{name}.py").write_text(text)
        monkeypatch.delitem(sys.modules, name, raising=False)

    return written


# -----------------------------------------------------------------------------
# The machine


def test_a_line_with_a_speed_says_what_share_of_the_best_product_that_is_and_the_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(meters, "matmul_peak", lambda dtype, device: 1e12 if dtype is torch.float32 else 1e30)
    train_run(tmp_path, GPT_TOML, *SHORT, "--train.accumulation=2")
    lines = [line for line in log(tmp_path / "out") if "tokens_per_second" in line]
    V, C, T, L = 257, 32, 64, 2
    flops = 3 * (2 * (L * 12 * C * C + C * V) + L * 4 * C * T)
    assert len(lines) == 4
    for line in lines:
        assert line["mfu"] == pytest.approx(line["tokens_per_second"] * flops / 1e12)
        assert 2**26 < line["memory"] <= most_memory("cpu")


def test_a_pass_over_one_row_counts_what_the_batch_would_take_and_several_ranks_have_several_machines(monkeypatch):
    model = small(GPT, n_layer=1)
    idx = torch.randint(40, (3, 17))
    labels = idx[:, 1:].masked_fill(torch.arange(16) > 8, train.IGNORE)
    random = torch.get_rng_state()
    flops = meters.flops_per_token(model, ((idx[:, :-1],), labels))
    assert flops == 3 * 16 / 9 * (2 * (12 * 8 * 8 + 8 * 40) + 4 * 8 * 16) and torch.equal(random, torch.get_rng_state())
    monkeypatch.setattr(meters, "matmul_peak", lambda dtype, device: 100)
    config = train.settled(train.TrainConfig(device="cpu"))
    for world in (1, 2):
        monkeypatch.setattr(ranks, "world", lambda: world)
        assert meters.meter(model, ((idx[:, :-1],), labels), config)(50)["mfu"] == flops * 50 / 100 / world


def test_the_curve_of_a_resumed_run_has_both_losses_from_its_beginning(tmp_path, monkeypatch):
    axes = pytest.importorskip("matplotlib.axes")
    drawn, plot = {}, axes.Axes.plot
    monkeypatch.setattr(axes.Axes, "plot", lambda self, x, y, style, label: (drawn.update({label: (x, y)}),
                                                                            plot(self, x, y, style, label=label)))
    train_run(tmp_path, GPT_TOML, *SHORT)
    train_run(tmp_path, GPT_TOML, *MORE)
    for label, key, steps in (("training", "loss", (1, 2, 3, 4, 5, 6)), ("held out", "val_loss", (2, 4, 6))):
        assert drawn[label] == (steps, tuple(line[key] for line in log(tmp_path / "out") if key in line))


# -----------------------------------------------------------------------------
# Loggers


def test_the_logger_of_the_readme_works_as_it_stands_and_goes_on_after_a_resume(own, tmp_path):
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(encoding="utf-8"), re.M | re.S)
    [text] = [block for block in blocks if "def terse" in block]
    assert text.count("\n") == 5
    own("terse", text)
    for settings in (SHORT, MORE):
        assert train_run(tmp_path, GPT_TOML, *settings, "--train.logger=terse:terse").err.count("terse") == 0
    assert (tmp_path / "out" / "terse.txt").read_text().splitlines() == [
        " ".join([str(step), *(f"{name}={number:.3g}" for name, number in line.items())])
        for step, line in numbers(tmp_path / "out")]


FAILING = """
class Failing:
    def __init__(self, out, step, settings):
        self.seen = []
        assert settings["train"]["logger"] == "failing:Failing" and step == 0 and out.is_dir()

    def __call__(self, step, numbers):
        numbers.clear()
        self.seen.append(step)
        if step == 2:
            {what}
"""


@pytest.mark.parametrize("what", ["1 / 0", "raise SystemExit(5)"])
def test_a_logger_that_fails_is_named_once_and_loses_nothing(what, own, tmp_path):
    own("failing", FAILING.replace("{what}", what))
    outcome = train_run(tmp_path, GPT_TOML, *SHORT, "--train.logger=failing:Failing")
    assert outcome.err.count("'failing:Failing' has ended at step 2: ") == outcome.err.count("failing") == 1
    assert [line["step"] for line in log(tmp_path / "out") if "loss" in line] == [1, 2, 3, 4]
    assert load_checkpoint(tmp_path / "out").step == 4


@pytest.mark.parametrize("name, message", [
    ("tensorbord", "train.logger='tensorbord' is not one of tensorboard, wandb; one of your own is MODULE:NAME"),
    ("", "train.logger='' is not one of"),
    ("nowhere:log", "train.logger='nowhere:log': ModuleNotFoundError: No module named 'nowhere'"),
    ("bad:lgo", "train.logger='bad:lgo' is not one of the functions of bad: log"),
    ("bad:number", "is not one of the functions of bad"),
    ("tensorboard", "train.logger='tensorboard' needs tensorboard (no such thing): pip install tensorboard"),
    ("wandb", "pip install wandb"),
])
def test_a_logger_that_is_not_there_exits_2_before_anything_is_written(name, message, own, tmp_path, monkeypatch):
    def absent(library):
        raise ImportError("no such thing")

    monkeypatch.setattr(loggers, "import_module", absent)
    own("bad", "number = 3\nclass Log: pass\ndef log(): pass\n")
    (tmp_path / "config.toml").write_text(GPT_TOML.replace("{source}", "pydoc"))
    args = tmp_path / "config.toml", f"--train.out_dir={tmp_path / 'out'}", f"--train.logger={name}"
    outcome = call(train.main, *args)
    assert outcome.code == 2 and outcome.out == "" and outcome.err.count("\n") == 1 and message in outcome.err, outcome
    assert not (tmp_path / "out").exists()


def test_a_logger_that_cannot_begin_stops_the_run_before_its_first_step(own, tmp_path):
    own("late", "def log(step, numbers): pass\n")
    (tmp_path / "text.txt").write_text(TEXT)
    (tmp_path / "config.toml").write_text(GPT_TOML.replace("{source}", str(tmp_path / "text.txt")))
    args = tmp_path / "config.toml", f"--train.out_dir={tmp_path / 'out'}", "--train.logger=late:log"
    outcome = call(train.main, *args)
    assert outcome.code == 2 and outcome.out == "" and outcome.err.count("\n") == 1, outcome
    assert "train.logger='late:log': TypeError: log() takes 2 positional arguments but 3 were given" in outcome.err


@pytest.fixture
def libraries(monkeypatch):
    """What would be asked of tensorboard and wandb, as lists, where neither is installed."""
    asked = SimpleNamespace(writers=[], scalars=[], runs=[], lines=[])

    class SummaryWriter:
        def __init__(self, folder, purge_step):
            asked.writers.append((folder, purge_step))
            self.waiting = []

        def add_scalar(self, name, number, step):
            self.waiting.append((step, name, number))

        def flush(self):
            asked.scalars += self.waiting
            self.waiting = []

    def init(**options):
        asked.runs.append(options)
        return SimpleNamespace(id=options["id"] or f"fresh-{len(asked.runs)}",
                               log=lambda numbers, step: asked.lines.append((step, numbers)))

    for name, part in (("torch.utils.tensorboard", SummaryWriter), ("wandb", init)):
        module = ModuleType(name)
        setattr(module, part.__name__, part)
        monkeypatch.setitem(sys.modules, name, module)
    return asked


def test_tensorboard_has_every_number_and_a_resumed_run_hides_what_came_after_its_checkpoint(libraries, tmp_path):
    for settings in (SHORT, MORE):
        train_run(tmp_path, GPT_TOML, *settings, "--train.logger=tensorboard")
    folder = tmp_path / "out" / "tensorboard"
    assert libraries.writers == [(folder, 1), (folder, 5)] and not libraries.runs
    assert libraries.scalars == [(step, *pair) for step, line in numbers(tmp_path / "out") for pair in line.items()]


def test_wandb_has_every_line_and_a_resumed_run_is_the_same_one_there(libraries, tmp_path):
    for settings in (SHORT, MORE):
        train_run(tmp_path, GPT_TOML, *settings, "--train.logger=wandb")
    assert [run["id"] for run in libraries.runs] == [None, "fresh-1"] and not libraries.writers
    for run, steps in zip(libraries.runs, (4, 6)):
        assert run["resume"] == "allow" and run["dir"] == tmp_path / "out"
        assert run["config"]["train"]["steps"] == steps and json.dumps(run["config"])
    assert libraries.lines == numbers(tmp_path / "out")


def test_a_dry_run_and_other_ranks_log_nowhere(libraries, tmp_path, monkeypatch):
    train_run(tmp_path, GPT_TOML, *SHORT, "--train.logger=wandb", "--dry-run")
    monkeypatch.setattr(ranks, "rank", lambda: 1)
    other = Run(tmp_path / "out", False)
    other.described = {"train": {"logger": "wandb"}}
    other.rewind_log(), other.log(1, loss=1.0)
    assert not libraries.runs and not (tmp_path / "out").exists()
