"""Several ranks are one training: the losses, the checkpoints and the end of the run are those of one process."""

import os
import re
import subprocess
import sys

import pytest
import torch
from conftest import BART_TOML, GPT_TOML, ROOT, TEXT, Outcome, call, train_run
from test_train import MACHINES, log

import train
from plumbing import ranks
from plumbing.checkpoints import load_checkpoint
from plumbing.data import DataConfig, load_data
from plumbing.errors import UserError
from plumbing.weights import load_pretrained

TOML = {"gpt": GPT_TOML, "bart": BART_TOML}
# a constant learning rate, which does not know how many steps there will be, and gradients that are clipped
STEADY = ["--train.log_every=1", "--train.eval_every=3", "--train.accumulation=2", "--train.optimizer=adamw",
          "--train.lr=1e-3", "--train.min_lr=1e-3", "--train.warmup_steps=0", "--train.grad_clip=0.1"]
PATCHED = """
import os, signal, sys
import torch
import train

update, rank, calls = train.update, int(os.environ["RANK"]), []

def patched(model, optimizers, batches, *args):
    calls.append(1)
    {what}
    return update(model, optimizers, batches, *args)

if __name__ == "__main__":
    train.update = patched
    train.run(train.main)
"""


def torchrun(program, *args):
    """The Outcome of a run of two ranks, on a port that is free."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    process = subprocess.Popen([*command, *map(str, [program, *args])], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               env=os.environ | {"PYTHONPATH": str(ROOT)})
    try:
        out, err = process.communicate(timeout=60)
    except subprocess.TimeoutExpired:
        process.terminate()  # which ends its ranks as well
        raise
    return Outcome(process.returncode, out.decode(), err.decode())


def written(folder, kind, what=None):
    """A run's command, without python: train.py, or a program whose update() does `what` before, and a config."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.toml").write_text(TOML[kind].replace("{source}", str(folder.parent / "text.txt")))
    (folder.parent / "text.txt").write_text(TEXT)
    if what is None:
        return [ROOT / "train.py", folder / "config.toml", f"--train.out_dir={folder / 'out'}"]
    (folder / "patched.py").write_text(PATCHED.replace("{what}", what))
    return [folder / "patched.py", folder / "config.toml", f"--train.out_dir={folder / 'out'}"]


def alone(folder, kind, *settings):
    outcome = call(train.main, *written(folder, kind)[1:], *settings)
    assert outcome.code == 0, outcome
    return outcome


def together(folder, kind, *settings, what=None):
    return torchrun(*written(folder, kind, what), *settings)


def said(outcome, what):
    return [line for line in outcome.err.splitlines() if line.startswith(what)]


def assert_same_run(out, expected):
    ours, theirs = log(out), log(expected)
    assert [line.keys() for line in ours] == [line.keys() for line in theirs] and len(ours) == 8
    for one, other in zip(ours, theirs):
        for key in one.keys() - MACHINES:
            assert one[key] == pytest.approx(other[key], rel=1e-6, abs=1e-6), (one["step"], key)
    one, other = (load_pretrained(path)[0].state_dict() for path in (out, expected))
    assert one.keys() == other.keys()
    for name, x in one.items():
        assert (x - other[name]).abs().max() <= 1e-4, name  # a tenth of the steps' lr


@pytest.mark.parametrize("kind, first", [("gpt", alone), ("gpt", together), ("bart", together)])
def test_two_ranks_do_the_run_of_one_process_and_each_resumes_what_the_other_saved(kind, first, tmp_path):
    """Steps 1 to 3 on one and 4 to 6 on the other; pairs are ragged, and their last held-out batch is of one row."""
    settings = [*STEADY, "--data.n_val=65", "--train.eval_batches=3"]
    alone(tmp_path / "whole", kind, *settings, "--train.steps=6")
    for steps, run in ((3, first), (6, together if first is alone else alone)):
        outcome = run(tmp_path / "parts", kind, *settings, f"--train.steps={steps}", "--train.resume=true")
        assert outcome.code == 0 and outcome.out.count("parameters") == outcome.out.count("saved") == 1, outcome
        assert outcome.out.count("\n") == 2 and (tmp_path / "parts" / "out" / "loss.png").exists()
    assert_same_run(tmp_path / "parts" / "out", tmp_path / "whole" / "out")


WITNESS = """
    torch.save({"weights": {name.removeprefix("module."): p.detach().clone() for name, p in model.named_parameters()},
                "labels": [labels for _, labels in batches], "random": torch.get_rng_state()},
               os.path.join(os.path.dirname(__file__), f"{rank}-{len(calls)}.pt"))
"""


def test_each_rank_has_its_rows_its_dropout_and_the_weights_of_all(tmp_path):
    """With Muon, and the frozen bias of BART's head, for whose gradient nobody may wait."""
    outcome = together(tmp_path / "run", "bart", "--train.steps=2", "--train.accumulation=2", what=WITNESS)
    assert outcome.code == 0, outcome
    values = dict(source="reverse", tokenizer="char", min_length=1, max_length=5, n_train=3000, n_val=100)
    data, _ = load_data(DataConfig(**values), seq2seq=True)
    for step in (1, 2):
        ours, theirs = (torch.load(tmp_path / "run" / f"{rank}-{step}.pt") for rank in (0, 1))
        assert all(torch.equal(x, theirs["weights"][name]) for name, x in ours["weights"].items())
        assert not torch.equal(ours["random"], theirs["random"])
        for i, rows in enumerate(zip(ours["labels"], theirs["labels"], strict=True)):
            whole = data.batch_at(2 * (step - 1) + i, batch_size=32, block_size=12)[1]
            assert [len(labels) for labels in rows] == [16, 16] and torch.equal(torch.cat(rows), whole)


def test_rows_are_dealt_out_once_and_as_evenly_as_they_can(monkeypatch):
    monkeypatch.setattr(ranks, "world", lambda: 3)
    parts = []
    for rank in range(3):
        monkeypatch.setattr(ranks, "rank", lambda: rank)
        parts.append(ranks.share(torch.arange(14).view(7, 2)))
    assert [len(part) for part in parts] == [3, 2, 2] and torch.equal(torch.cat(parts), torch.arange(14).view(7, 2))


def test_a_rank_takes_a_gpu_of_its_own_and_one_for_all_is_refused(monkeypatch):
    current = []
    monkeypatch.setattr(ranks, "world", lambda: 2)
    monkeypatch.setattr(ranks, "pick_device", lambda name: "cuda" if name == "auto" else name)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert [ranks.device(name) for name in ("auto", "cuda", "cpu")] == ["cuda:1", "cuda:1", "cpu"]
    assert current == ["cuda:1", "cuda:1"]
    for name in ("cuda:0", "mps"):
        with pytest.raises(UserError, match=f"train.device={name} is one device for 2 ranks: pass cuda"):
            ranks.device(name)


def test_a_batch_that_ranks_cannot_share_is_refused_in_one_line_and_nothing_is_written(tmp_path):
    outcome = together(tmp_path, "gpt", "--train.batch_size=7")
    assert outcome.code != 0 and outcome.out == "" and not (tmp_path / "out").exists()
    assert said(outcome, "error") == ["error: train.batch_size=7 must be a multiple of torchrun's 2 ranks, which share "
                                      "it: change one of the two"]
    assert re.search(r"rank +: 0 .*\n +exitcode +: 2 ", outcome.err), outcome.err  # torchrun's report; its own is 1


def test_a_control_c_on_one_rank_stops_all_after_the_same_step_and_saves(tmp_path):
    """A terminal sends it to all, and torchrun once more: a second one is no reason for haste."""
    what = "if rank == 1 and len(calls) == 2: signal.raise_signal(signal.SIGINT), signal.raise_signal(signal.SIGINT)"
    outcome = together(tmp_path, "gpt", "--train.log_every=1", what=what)
    assert said(outcome, "interrupted") == ["interrupted"] and "step 2: saved" in outcome.out, outcome
    assert load_checkpoint(tmp_path / "out").step == 2 and [line["step"] for line in log(tmp_path / "out")] == [1, 2]
    assert len(re.findall(r"exitcode +: (?:130|-15) ", outcome.err)) == 2 and "rank 1" not in outcome.err


def test_a_weight_that_is_no_number_on_one_rank_ends_all_and_leaves_the_checkpoint(tmp_path):
    what = "if rank == 1 and len(calls) == 4: torch.nn.init.constant_(next(model.parameters()), float('nan'))"
    outcome = together(tmp_path, "gpt", "--train.eval_every=3", what=what)
    [line] = said(outcome, "stopped")
    good = tmp_path / "out" / "step-00000003"
    assert "the loss is nan" in line and f"at step 4; the last good checkpoint is {good}" in line
    assert re.search(r"rank +: 0 .*\n +exitcode +: 3 ", outcome.err), outcome.err
    assert load_checkpoint(tmp_path / "out").step == 3 and outcome.out.count("saved") == 1


def test_a_rank_that_is_killed_ends_the_run_and_its_checkpoint_resumes(tmp_path):
    outcome = together(tmp_path, "gpt", "--train.eval_every=3",
                       what="if rank == 1 and len(calls) == 5: os.kill(os.getpid(), signal.SIGKILL)")
    [line] = said(outcome, "error")
    assert "another rank has gone" in line and "--train.resume=true" in line and "SIGKILL" in outcome.err
    assert load_checkpoint(tmp_path / "out").step == 3
    alone(tmp_path, "gpt", "--train.steps=6", "--train.resume=true")
    assert load_checkpoint(tmp_path / "out").step == 6
