"""Checkpoints: whatever kills a run, it goes on from the last step that it announced, bit for bit."""

import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional as F

import plumbing.checkpoints as checkpoints
from model import BART, GPT
from plumbing.checkpoints import load_checkpoint, save_checkpoint
from plumbing.errors import UserError
from plumbing.manifests import verify
from plumbing.weights import load_pretrained, save_pretrained

ROOT = Path(__file__).parent.parent
KILLS = int(os.environ.get("KILLS", 15))
TINY = dict(n_head=2, n_embd=8, vocab_size=11, block_size=8, embd_pdrop=0.2, attn_pdrop=0.2, resid_pdrop=0.2)


def build(cls=GPT, seed=0):
    """A model and its optimizers, Muon for the matrices of its layers, from a seed."""
    torch.manual_seed(seed)
    layers = dict(n_layer=2) if cls is GPT else dict(n_encoder_layer=1, n_decoder_layer=2)
    model = cls(replace(cls.get_default_config(), **TINY, **layers))
    named = dict(model.named_parameters())
    matrices = [p for name, p in named.items() if p.ndim == 2 and (".attn." in name or ".mlp." in name)]
    chosen = {id(p) for p in matrices}
    rest = [p for p in named.values() if id(p) not in chosen]
    decay = [p for p in rest if p.ndim == 2]
    groups = [{"params": decay}, {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0}]
    return model, [torch.optim.Muon(matrices, lr=0.01), torch.optim.AdamW(groups, lr=0.01, betas=(0.8, 0.95))]


def train(model, optimizers, steps):
    """A loop with dropout and a learning rate that moves."""
    model.train()
    for step in steps:
        x = torch.arange(8).add(step).remainder(11)[None]
        logits = model(x) if isinstance(model, GPT) else model(x, x)
        loss = F.cross_entropy(logits.flatten(0, 1), x.flatten())
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = 0.01 / (1 + step)
            optimizer.zero_grad()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()


def digest(model, optimizers):
    """sha256 of weights, optimizer states and the random number generator."""
    sha = hashlib.sha256(torch.get_rng_state().numpy().tobytes())
    for name, x in sorted(model.state_dict().items()):
        sha.update(name.encode() + x.numpy().tobytes())
    for optimizer in optimizers:
        state = optimizer.state_dict()
        sha.update(repr(state["param_groups"]).encode())
        for i, values in sorted(state["state"].items()):
            for key, x in sorted(values.items()):
                sha.update(f"{i}{key}{x.dtype}".encode() + x.numpy().tobytes())
    return sha.hexdigest()


def save(run_dir, step, **extra):
    model, optimizers = build(seed=step)
    return save_checkpoint(run_dir, step, model, None, optimizers, extra)


def steps(run_dir):
    return sorted(int(path.name.removeprefix("step-")) for path in run_dir.iterdir())


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("cut", [0, 1, 4, 8])
@pytest.mark.parametrize("cls", [GPT, BART])
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(cls, cut, tmp_path):
    model, optimizers = build(cls)
    train(model, optimizers, range(9))
    whole = digest(model, optimizers)

    model, optimizers = build(cls)
    train(model, optimizers, range(cut))
    before = digest(model, optimizers)
    save_checkpoint(tmp_path, cut, model, None, optimizers, {"data": "x"})
    assert digest(model, optimizers) == before  # saving changes nothing, draws nothing

    model, optimizers = build(cls, seed=99)
    checkpoint = load_checkpoint(tmp_path)
    checkpoint.restore(model, optimizers)
    assert (checkpoint.step, checkpoint.extra) == (cut, {"data": "x"})
    assert digest(model, optimizers) == before
    shutil.rmtree(tmp_path)  # nothing lives on in the files
    train(model, optimizers, range(cut, 9))
    assert digest(model, optimizers) == whole


def save_as_before(run_dir, step, model, optimizers):
    """A checkpoint as the first version of this file laid it out, written without any of today's functions for it."""
    path, names = run_dir / f"step-{step:08d}", {p: name for name, p in model.named_parameters()}
    save_pretrained(path, model)
    tensors, saved = {"rng.cpu": torch.get_rng_state()}, []
    for i, optimizer in enumerate(optimizers):
        saved.append([])
        for group in optimizer.param_groups:
            options = {key: value for key, value in group.items() if key != "params"}
            saved[-1].append({"params": [names[p] for p in group["params"]], "options": options, "scalars": {}})
            tensors |= {f"optimizer.{i}.{names[p]}:{key}": x.contiguous() for p in group["params"]
                        for key, x in optimizer.state[p].items()}
    save_file(tensors, path / "training.safetensors")
    (path / "training.json").write_text(json.dumps({"step": step, "extra": {"data": "x"}, "optimizers": saved}, indent=1) + "\n")
    facts = {file.name: {"size": file.stat().st_size, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
             for file in path.iterdir()}
    (path / "manifest.json").write_text(json.dumps({"files": facts}, indent=1) + "\n")


@pytest.mark.parametrize("cls", [GPT, BART])
def test_a_run_of_before_goes_on(cls, tmp_path):
    model, optimizers = build(cls)
    train(model, optimizers, range(4))
    save_as_before(tmp_path, 4, model, optimizers)
    train(model, optimizers, range(4, 9))
    whole = digest(model, optimizers)
    model, optimizers = build(cls, seed=99)
    checkpoint = load_checkpoint(tmp_path)
    checkpoint.restore(model, optimizers)
    assert (checkpoint.step, checkpoint.extra) == (4, {"data": "x"})
    train(model, optimizers, range(4, 9))
    assert digest(model, optimizers) == whole


def test_the_state_of_an_optimizer_is_laid_out_as_its_parameter(tmp_path):
    """GPT-2's matrices are transposed views: a state laid out otherwise would make every step slower."""
    model, optimizers = build()
    train(model, optimizers, range(2))
    save_checkpoint(tmp_path, 2, model, None, optimizers, {})
    model, _ = load_pretrained(tmp_path)
    assert not model.h[0].attn.c_attn.weight.is_contiguous()
    named = dict(model.named_parameters())
    matrices = [p for name, p in named.items() if p.ndim == 2 and (".attn." in name or ".mlp." in name)]
    rest = [p for name, p in named.items() if ".attn." not in name and ".mlp." not in name or p.ndim < 2]
    optimizers = [torch.optim.Muon(matrices), torch.optim.AdamW([{"params": [p for p in rest if p.ndim == 2]},
                                                                 {"params": [p for p in rest if p.ndim < 2]}])]
    load_checkpoint(tmp_path).restore(model, optimizers)
    for optimizer in optimizers:
        for p, state in optimizer.state.items():
            assert state and all(x.stride() == p.stride() for x in state.values() if x.ndim)


def test_a_parameter_that_never_had_a_gradient_is_no_obstacle(tmp_path):
    def spare():
        model, optimizers = build()
        model.spare = torch.nn.Parameter(torch.ones(3))
        optimizers[1].param_groups[1]["params"].append(model.spare)
        return model, optimizers

    model, optimizers = spare()
    train(model, optimizers, range(2))
    tensors, groups = zip(*(checkpoints.pack(model, optimizer) for optimizer in optimizers))
    again, others = spare()
    for optimizer, saved, options in zip(others, tensors, groups):
        checkpoints.unpack(again, optimizer, options, saved)
    again.load_state_dict(model.state_dict())
    assert digest(again, others) == digest(model, optimizers) and not others[1].state[again.spare]


def test_without_the_random_state_or_the_optimizer_a_resumed_run_would_differ(tmp_path):
    model, optimizers = build()
    train(model, optimizers, range(4))
    save_checkpoint(tmp_path, 4, model, None, optimizers, {})
    train(model, optimizers, range(4, 9))
    whole = digest(model, optimizers)
    for spoil in (lambda m, o: torch.manual_seed(5), lambda m, o: o[0].state.clear(), lambda m, o: o[1].state.clear()):
        model, optimizers = build(seed=99)
        load_checkpoint(tmp_path).restore(model, optimizers)
        spoil(model, optimizers)
        train(model, optimizers, range(4, 9))
        assert digest(model, optimizers) != whole


def test_a_checkpoint_is_a_model_directory_and_a_run_is_its_newest(tmp_path):
    save(tmp_path, 1), save(tmp_path, 2)
    newest = load_pretrained(tmp_path)[0].state_dict()
    for model in (build(seed=2)[0], load_pretrained(tmp_path / "step-00000002")[0]):
        assert all(torch.equal(x, newest[name]) for name, x in model.state_dict().items())
    for name in ("manifest.json", "training.json", "training.safetensors"):
        (tmp_path / "step-00000002" / name).unlink()
    load_pretrained(tmp_path / "step-00000002")  # a plain directory is one too


def test_nothing_is_none_and_a_directory_without_checkpoints_too(tmp_path):
    assert load_checkpoint(tmp_path) is None and load_checkpoint(tmp_path / "none") is None


def test_the_last_two_and_the_best_are_kept(tmp_path):
    for step, loss in enumerate([3.0, 1.0, float("nan"), 2.0, 1.5, 1.2]):
        save(tmp_path, step, val_loss=loss)
    assert steps(tmp_path) == [1, 4, 5]
    save(tmp_path, 6)  # without a loss
    assert steps(tmp_path) == [1, 5, 6]
    save(tmp_path, 7, val_loss=0.5), save(tmp_path, 8, val_loss=0.6)
    assert steps(tmp_path) == [7, 8]


def test_what_a_killed_run_left_behind_goes_and_steps_ahead_stay(tmp_path):
    (tmp_path / ".tmp-00000007").mkdir(parents=True)
    (tmp_path / ".tmp-00000007" / "model.safetensors").touch()
    for step in (9, 8, 1, 2, 3):
        save(tmp_path, step)
    assert steps(tmp_path) == [2, 3, 8, 9]


def damage_manifest(path):
    (path / "manifest.json").write_text("{}")


def link(path):
    (path / "config.json").rename(path / "hidden")
    (path / "config.json").symlink_to("hidden")


def fifo(path):
    (path / "training.json").unlink()
    os.mkfifo(path / "training.json")


DAMAGE = {
    "a flipped byte of the weights": lambda path: flip(path / "model.safetensors"),
    "a flipped byte of the optimizer": lambda path: flip(path / "training.safetensors"),
    "a flipped byte of the config": lambda path: flip(path / "config.json"),
    "a file cut short": lambda path: os.truncate(path / "model.safetensors", 100),
    "a file gone": lambda path: (path / "training.json").unlink(),
    "no manifest": lambda path: (path / "manifest.json").unlink(),
    "an empty manifest": damage_manifest,
    "a link for a file": link,
    "a FIFO for a file": fifo,
}


@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_checkpoint_is_passed_over_for_the_previous_one(what, tmp_path, capsys):
    save(tmp_path, 1), save(tmp_path, 2)
    DAMAGE[what](tmp_path / "step-00000002")
    assert load_checkpoint(tmp_path).step == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "step-00000002" in said
    if what != "no manifest":  # then it is a plain directory
        with pytest.raises(UserError):
            load_pretrained(tmp_path / "step-00000002")
    save(tmp_path, 2)  # the run comes by again
    assert load_checkpoint(tmp_path).step == 2 and steps(tmp_path) == [1, 2]
    for step in (1, 2):
        DAMAGE[what](tmp_path / f"step-0000000{step}")
    with pytest.raises(UserError, match="every checkpoint"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize("training", [{}, {"step": "1", "extra": {}, "optimizers": []}, {"step": 1, "extra": None},
                                      {"step": 1, "extra": {}, "optimizers": {}}], ids=str)
def test_what_a_checkpoint_says_of_its_training_is_checked(training, tmp_path):
    path = save(tmp_path, 1)
    (path / "training.json").write_text(json.dumps(training))
    (path / "manifest.json").unlink()
    (path / "manifest.json").write_text(json.dumps(checkpoints.describe(path)))
    with pytest.raises(UserError, match="training.json: (step|extra|optimizers) is"):
        load_checkpoint(tmp_path)


def test_replacing_a_step_leaves_no_moment_without_it(tmp_path, monkeypatch):
    save(tmp_path, 1)
    shas = lambda: load_checkpoint(tmp_path).step
    real, seen = Path.rename, []

    def watched(self, target):
        seen.append(shas())
        result = real(self, target)
        seen.append(shas())
        return result
    monkeypatch.setattr(Path, "rename", watched)
    save(tmp_path, 1)
    assert len(seen) >= 4 and set(seen) == {1} and steps(tmp_path) == [1]


@pytest.mark.parametrize("step", [2, 3])  # one that is replaced, and one that is past
def test_killed_while_an_old_one_goes_no_half_of_it_keeps_its_name(step, tmp_path, monkeypatch):
    def killed(path):
        (path / "config.json").unlink()
        raise KeyboardInterrupt

    save(tmp_path, 1), save(tmp_path, 2)
    monkeypatch.setattr(checkpoints.shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, step)
    for path in tmp_path.glob("step-*"):
        verify(path)
    monkeypatch.undo()
    save(tmp_path, 4)
    assert steps(tmp_path) == [step, 4]  # and nothing is hidden


@pytest.mark.parametrize("name", ["save_file", "write_json", "fsync", "save_pretrained"])
def test_a_full_disk_is_one_line_and_keeps_what_was_there(name, tmp_path, monkeypatch):
    save(tmp_path, 1)

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(checkpoints, name, full)
    with pytest.raises(UserError, match="No space left") as refused:
        save(tmp_path, 2)
    assert "\n" not in str(refused.value)
    assert steps(tmp_path) == [1] and load_checkpoint(tmp_path).step == 1


def test_a_place_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    for place in (tmp_path / "file", tmp_path / "file" / "run", "/proc/run"):
        with pytest.raises(UserError, match="cannot save step 1"):
            save(place, 1)


def test_restoring_into_another_model_or_other_optimizers_is_refused(tmp_path):
    save(tmp_path, 1)
    checkpoint = load_checkpoint(tmp_path)
    model, optimizers = build()
    with pytest.raises(UserError, match="another model"):
        checkpoint.restore(GPT(replace(model.config, n_embd=16)), [])
    with pytest.raises(UserError, match="2 optimizers"):
        checkpoint.restore(model, optimizers[:1])
    with pytest.raises(UserError, match="other parameters"):
        checkpoint.restore(model, optimizers[::-1])


PROGRAM = """
import os, random, signal, sys, time
from pathlib import Path
from plumbing.checkpoints import pack, write_checkpoint
from tests.test_checkpoints import build
draw = random.Random(0)
model, optimizers = build()
packed = [pack(model, each) for each in optimizers]  # once: nothing is on the disk by then
for i, run_dir in enumerate(sys.argv[1:]):
    out, into = os.pipe()
    run = os.fork()
    if run == 0:
        for step in range(10_000):
            write_checkpoint(Path(run_dir), step, model, None, packed, {"val_loss": 1 + 1 / (1 + step % 7)}, keep=2)
            os.write(into, b"%d\\n" % step)
    os.close(into)
    said = os.read(out, 1)
    time.sleep(draw.uniform(0, 0.15))
    while i % 2 and not any(Path(run_dir).glob(".tmp-*")):  # half of them at any moment, half while it writes
        pass
    os.kill(run, signal.SIGKILL)
    os.waitpid(run, 0)
    while more := os.read(out, 65536):
        said += more
    print(said.split()[-1].decode())
"""


def test_a_run_killed_at_any_moment_goes_on_from_the_last_step_it_announced(tmp_path):
    """
    KILLS=50 in the environment kills more often. (A saver that writes in place loses its file in most of such kills.)
    """
    run_dirs = [tmp_path / str(i) for i in range(KILLS)]
    done = subprocess.run([sys.executable, "-c", PROGRAM, *map(str, run_dirs)], capture_output=True, text=True,
                          cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=60 + KILLS)
    assert done.returncode == 0, done.stderr
    midway = 0
    for run_dir, announced in zip(run_dirs, map(int, done.stdout.split()), strict=True):
        midway += any(run_dir.glob(".tmp-*"))
        checkpoint = load_checkpoint(run_dir)
        assert announced <= checkpoint.step <= announced + 1
        model, optimizers = build(seed=3)
        checkpoint.restore(model, optimizers)
        save_checkpoint(run_dir, checkpoint.step + 1, model, None, optimizers, {})
        assert not any(run_dir.glob(".tmp-*"))
    assert midway >= KILLS // 2  # most of them fell into a save
