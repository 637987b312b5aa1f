"""Several ranks are one training: the losses, the checkpoints and the end of the run are those of one process."""

import json
import os
import re
import subprocess
import sys
import time

import pytest
import torch
from conftest import BART_TOML, GPT_TOML, ROOT, TEXT, Outcome, call
from test_train import MACHINES, log, small

import train
from model import BART
from plumbing import ranks
from plumbing.checkpoints import load_checkpoint
from plumbing.data import DataConfig, load_data
from plumbing.errors import UserError
from plumbing.weights import load_pretrained

MUTANTS = """
import os
if "MINDECODE_MUTANT" in os.environ:
    import mutants
    mutants.pytest_configure()
"""
TOML = {"gpt": GPT_TOML, "bart": BART_TOML}
# a constant learning rate, which does not know how many steps there will be, and gradients that are clipped
STEADY = ["--train.log_every=1", "--train.eval_every=2", "--train.accumulation=2", "--train.lr=1e-3",
          "--train.min_lr=1e-3", "--train.warmup_steps=0", "--train.grad_clip=0.1"]
SHARD = "--train.shard=true"
PROGRAM = MUTANTS + """
import json, signal, sys, time
from contextlib import nullcontext
import torch
import train
from plumbing import checkpoints, ranks

update, rank, calls = train.update, int(os.environ["RANK"]), []
ranks.print = lambda *args, **kwargs: (time.sleep(1), print(*args, **kwargs))  # no other thread ends us meanwhile

def patched(model, optimizers, batches, config, *args):
    calls.append(1)
    {what}
    return update(model, optimizers, batches, config, *args)

def main():
    with ranks.joined():
        ranks.joined = nullcontext
        for args in json.loads(sys.argv[1]):
            calls.clear()
            train.main(args)

if __name__ == "__main__":
    train.update = patched
    train.run(main)
"""


def torchrun(program, *args):
    """The Outcome of a run of two ranks, on a port that is free."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    process = subprocess.Popen([*command, *map(str, [program, *args])], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               env=os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"})
    try:
        out, err = process.communicate(timeout=180)
    except subprocess.TimeoutExpired:
        process.terminate()  # which ends its ranks as well
        raise
    return Outcome(process.returncode, out.decode(), err.decode())


def command(folder, kind, *settings):
    """The arguments of a run of train.py, for which config and text are written."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.toml").write_text(TOML[kind].replace("{source}", str(folder / "text.txt")))
    (folder / "text.txt").write_text(TEXT)
    return [str(folder / "config.toml"), f"--train.out_dir={folder / 'out'}", *settings]


def alone(folder, kind, *settings):
    outcome = call(train.main, *command(folder, kind, *settings))
    assert outcome.code == 0, outcome
    return outcome


def together(folder, *commands, what="pass"):
    """The Outcome of two ranks that do run after run, and `what` before each update. To start them takes seconds."""
    (folder / "program.py").write_text(PROGRAM.replace("{what}", what))
    return torchrun(folder / "program.py", json.dumps(commands))


def said(outcome, what):
    return [line for line in outcome.err.splitlines() if line.startswith(what)]


def assert_same_run(out, expected):
    ours, theirs = log(out), log(expected)
    assert [line.keys() for line in ours] == [line.keys() for line in theirs] and len(ours) == 9
    for one, other in zip(ours, theirs):
        for key in one.keys() - MACHINES:
            assert one[key] == pytest.approx(other[key], rel=1e-6, abs=1e-6), (out, one["step"], key)
    one, other = (load_pretrained(path)[0].state_dict() for path in (out, expected))
    assert one.keys() == other.keys()
    for name, x in one.items():
        assert (x - other[name]).abs().max() <= 1e-4, (out, name)  # a tenth of the steps' lr


def test_two_ranks_do_the_run_of_one_process_and_any_number_resumes_what_another_saved(tmp_path):
    """
    Two steps on two ranks, two on one, two on two; of those on two, the first or the last are sharded. Pairs are
    ragged, and their last held-out batch is of one row. The whole runs are DDP's and one process's.
    """
    runs = [(tmp_path / f"{kind}-{optimizer}", kind, [*STEADY, f"--train.optimizer={optimizer}", "--data.n_val=65",
             "--train.eval_batches=3"], how) for kind, optimizer, how in [
                 ("gpt", "muon", (SHARD, SHARD, "")), ("gpt", "adamw", ("", "", SHARD)),
                 ("bart", "adamw", (SHARD, SHARD, "")), ("bart", "muon", ("", "", SHARD))]]
    for part, steps in enumerate((2, 4, 6)):
        now = f"--train.steps={steps}", "--train.resume=true"
        commands = [command(folder, kind, *settings, *now, *how[part].split())
                    for folder, kind, settings, how in runs]
        outcome = call(lambda _: [*map(train.main, commands)]) if part == 1 else together(tmp_path, *commands)
        assert outcome.code == 0 and outcome.out.count("parameters") == outcome.out.count("saved") == 4, outcome
        assert outcome.out.count("\n") == 8
    for folder, kind, settings, _ in runs:
        whole = folder.with_name(f"{folder.name}-whole")
        alone(whole, kind, *settings, "--train.steps=6")
        assert_same_run(folder / "out", whole / "out")
        assert (folder / "out" / "loss.png").exists()


WITNESS = """
    weights = {name.removeprefix("module."): p.detach() for name, p in model.named_parameters()}
    kept = [x for optimizer in optimizers for state in optimizer.state.values() for x in state.values() if x.ndim]
    train.loss_sum(model, *batches[0])[0].backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    held = [sum(getattr(x, "_local_tensor", x).numel() for x in each) for each in (weights.values(), kept, gradients)]
    model.zero_grad()
    torch.save({"weights": {name: ranks.whole(x).clone() for name, x in weights.items()}, "held": held,
                "labels": [labels for _, labels in batches], "random": torch.get_rng_state()},
               os.path.join(os.path.dirname(config.out_dir), f"{rank}-{len(calls)}.pt"))
"""


def test_each_rank_has_its_rows_its_dropout_and_the_weights_of_all_or_half_of_everything(tmp_path):
    """
    With Muon, and the frozen bias of BART's head, for whose gradient nobody may wait. Sharded, each of two ranks holds
    half of the numbers that make 16 bytes of a parameter, after a text was written with all of them, too.
    """
    settings = ["--train.steps=2", "--train.accumulation=2", "--train.sample_every=1"]
    runs = [(tmp_path / "whole", "bart", ""), (tmp_path / "muon", "bart", SHARD),
            (tmp_path / "adamw", "gpt", f"{SHARD} --train.optimizer=adamw")]
    outcome = together(tmp_path, *(command(folder, kind, *settings, *more.split()) for folder, kind, more in runs),
                       what=WITNESS)
    assert outcome.code == 0, outcome
    samples = re.findall(r"step \d: (?!saved).*", outcome.out)
    assert len(samples) == 6 and samples[:2] == samples[2:4]
    values = dict(source="reverse", tokenizer="char", min_length=1, max_length=5, n_train=3000, n_val=100)
    data, _ = load_data(DataConfig(**values), seq2seq=True)
    for step in (1, 2):
        whole, muon, adamw = ([torch.load(folder / f"{rank}-{step}.pt") for rank in (0, 1)] for folder, *_ in runs)
        for ours, theirs in (whole, muon, adamw):
            assert all(torch.equal(x, theirs["weights"][name]) for name, x in ours["weights"].items())
            assert not torch.equal(ours["random"], theirs["random"])
        for ours, theirs in (whole, muon):
            for i, rows in enumerate(zip(ours["labels"], theirs["labels"], strict=True)):
                of_all = data.batch_at(2 * (step - 1) + i, batch_size=32, block_size=12)[1]
                assert [len(labels) for labels in rows] == [16, 16] and torch.equal(torch.cat(rows), of_all)
    n = sum(x.numel() for x in adamw[0]["weights"].values())
    for parts, expected in ((muon, whole[0]["held"]), (adamw, [n, 2 * n, n])):
        held = [part["held"] for part in parts]
        assert [sum(each) for each in zip(*held)] == expected
        assert all(0.49 * every <= each <= 0.51 * every for part in held for each, every in zip(part, expected))


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


def test_layers_are_sharded_one_by_one_and_on_a_gpu_gathered_as_autocast_would_have_them(monkeypatch):
    """What is called from outside its layer by itself, and before it; the rest, with what is tied, as it is."""
    done = []
    monkeypatch.setattr(ranks, "world", lambda: 2)
    monkeypatch.setattr("torch.distributed.device_mesh.init_device_mesh", lambda *mesh: mesh)
    monkeypatch.setattr("torch.distributed.fsdp.fully_shard", lambda module, mesh, mp_policy=None, **_: done.append(
        (module, mesh, mp_policy and (mp_policy.param_dtype, mp_policy.reduce_dtype, mp_policy.cast_forward_inputs))))
    model = small(BART, n_encoder_layer=1, n_decoder_layer=2)
    for device, dtype in (("cuda:1", torch.bfloat16), ("cpu", None)):
        done.clear()
        ranks.sharded(model, device, torch.bfloat16)
        first, second = model.decoder
        inner = [second.cross.c_kv, second, first.cross.c_kv, first, model.encoder[0]]
        mesh = device.split(":")[0], (2,)
        assert done == [(each, mesh, (dtype, torch.float32, False)) for each in inner] + [(model, mesh, None)]


def test_what_ranks_cannot_share_is_refused_in_one_line_and_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(ranks, "world", lambda: 2)
    outcome = call(train.main, *command(tmp_path, "gpt", "--train.batch_size=7"))
    assert outcome == (2, "", "error: train.batch_size=7 must be a multiple of torchrun's 2 ranks, which share it: "
                              "change one of the two\n")
    assert not (tmp_path / "out").exists()


def test_a_control_c_on_one_rank_stops_all_after_the_same_step_and_saves_what_they_share(tmp_path):
    """A terminal sends it to all, and torchrun once more: a second one is no reason for haste."""
    what = "if rank == 1 and len(calls) == 2: signal.raise_signal(signal.SIGINT), signal.raise_signal(signal.SIGINT)"
    outcome = together(tmp_path, command(tmp_path, "gpt", "--train.log_every=1", SHARD), what=what)
    assert said(outcome, "interrupted") == ["interrupted"] and "step 2: saved" in outcome.out, outcome
    assert load_checkpoint(tmp_path / "out").step == 2 and [line["step"] for line in log(tmp_path / "out")] == [1, 2]
    assert len(re.findall(r"exitcode +: (?:130|-15) ", outcome.err)) == 2 and "rank 1" not in outcome.err


def test_a_weight_that_is_no_number_on_one_rank_ends_all_and_leaves_the_checkpoint(tmp_path):
    what = "if rank == 1 and len(calls) == 4: torch.nn.init.constant_(next(model.parameters()), float('nan'))"
    outcome = together(tmp_path, command(tmp_path, "gpt", "--train.eval_every=3"), what=what)
    [line] = said(outcome, "stopped")
    good = tmp_path / "out" / "step-00000003"
    assert "the loss is nan" in line and f"at step 4; the last good checkpoint is {good}" in line
    assert re.search(r"rank +: 0 .*\n +exitcode +: 3 ", outcome.err), outcome.err
    assert load_checkpoint(tmp_path / "out").step == 3 and outcome.out.count("saved") == 1


DEAF = MUTANTS + """
import ctypes, signal, sys, time
from plumbing import errors, ranks

def main():
    with ranks.joined():
        print("joined", time.monotonic(), flush=True)
        ranks.total(1)  # both are here
        if os.environ["RANK"] == "1" and sys.argv[1] == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if os.environ["RANK"] == "1" or sys.argv[1] == "stopped":
            os.kill(os.getppid(), signal.SIGTERM)
            time.sleep(60)
        lock = ctypes.create_string_buffer(64)  # a mutex of the C library, on Linux
        while not ctypes.CDLL(None).pthread_mutex_lock(lock):  # the second time it waits, as one does for NCCL
            pass

if __name__ == "__main__":
    errors.run(main)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the test's deaf wait is made for Linux")
@pytest.mark.parametrize("how, line", [("killed", "error: another rank has gone"), ("stopped", "interrupted")])
def test_a_rank_that_waits_deaf_to_signals_says_that_another_has_gone_and_nothing_of_a_stop(how, line, tmp_path):
    (tmp_path / "program.py").write_text(DEAF)
    outcome = torchrun(tmp_path / "program.py", how)
    [started] = re.findall(r"^joined (.+)\n$", outcome.out)  # a busy machine may take as long before that
    assert len(said(outcome, line)) == 1 and time.monotonic() - float(started) < 30, outcome
    assert not said(outcome, "error: another" if how == "stopped" else "interrupted")


def test_a_step_of_two_ranks_is_timed_as_theirs_and_one_of_them_says_so(tmp_path):
    outcome = torchrun(ROOT / "bench.py", "train", *command(tmp_path, "gpt"), "--repeats=1")
    assert outcome.code == 0 and outcome.out.count("one of 2 ranks") == outcome.out.count("tokens/s") == 1, outcome


GONE = "another rank has gone, see torchrun's report: --train.resume=true continues"
KILLED = "os.kill(os.getpid(), signal.SIGKILL)"


@pytest.mark.parametrize("what, settings, line", [
    (f"if rank == 1 and len(calls) == 5: {KILLED}", [], GONE),
    (f"if rank == 0 and len(calls) == 6: checkpoints.fsync = lambda _: {KILLED}", [SHARD], GONE),
    ("if rank == 0 and len(calls) == 5: raise OSError(28, 'No space left')", [], "[Errno 28] No space left"),
], ids=["the-silent-one", "the-one-that-writes-while-it-does", "full-disk"])
def test_a_rank_that_goes_ends_the_run_with_a_line_and_its_checkpoint_resumes(what, settings, line, tmp_path):
    outcome = together(tmp_path, command(tmp_path, "gpt", "--train.eval_every=3", *settings), what=what)
    [told] = said(outcome, "error")
    assert line in told and ("SIGKILL" in outcome.err) == (line is GONE)
    assert load_checkpoint(tmp_path / "out").step == 3
    alone(tmp_path, "gpt", "--train.steps=6", "--train.resume=true")
    assert load_checkpoint(tmp_path / "out").step == 6
