"""Training: the gradient is the right one, and whatever stops a run, it goes on as if nothing had happened."""

import hashlib
import json
import math
import os
import random
import re
import shutil
import signal
import time
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from conftest import BART_TOML, GPT_TOML, TEXT, call, finish, shell, train_run

import generate
import train
from model import BART, GPT
from plumbing import muon
from plumbing.checkpoints import load_checkpoint
from plumbing.data import IGNORE, DataConfig, load_data
from plumbing.errors import NonFiniteError
from plumbing.runs import Run
from plumbing.weights import load_pretrained

KILLS = int(os.environ.get("MINDECODE_KILLS", 3))
MACHINES = {"tokens_per_second", "mfu", "memory"}  # what a line says of the machine, not of the run
TOML = {"gpt": GPT_TOML, "bart": BART_TOML}


def log(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def untimed(out):
    return [{key: value for key, value in line.items() if key not in MACHINES} for line in log(out)]


def sha256(out, step):
    """Of the weights, and of the optimizers with the random number generator."""
    return [hashlib.sha256((out / f"step-{step:08d}" / name).read_bytes()).hexdigest()
            for name in ("model.safetensors", "training.safetensors")]


def small(cls, **fields):
    torch.manual_seed(0)
    config = replace(cls.get_default_config(), n_head=2, n_embd=8, vocab_size=40, block_size=16, embd_pdrop=0.0,
                     attn_pdrop=0.0, resid_pdrop=0.0, **fields)
    return cls(config)


# -----------------------------------------------------------------------------
# The loop's parts


def gradients(model, batches):
    """What one step's micro-batches leave in .grad, unclipped, and the loss."""
    model.zero_grad()
    loss = train.update(model, [], batches, train.TrainConfig(grad_clip=1e30), nullcontext())[0]
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}, loss


def assert_same_gradients(model, split, whole):
    (ours, loss), (theirs, expected) = gradients(model, split), gradients(model, whole)
    assert abs(loss - expected) <= 1e-12 and ours.keys() == theirs.keys() and len(ours) > 10
    for name in ours:
        assert (ours[name] - theirs[name]).abs().max() <= 1e-12, name
        assert theirs[name].abs().max() > 1e-6, name


def test_micro_batches_of_ragged_pairs_give_the_gradient_of_one_batch():
    """A mean of means would weigh a label by the length of its neighbours."""
    data, tokenizer = load_data(DataConfig(source="reverse", tokenizer="char", n_train=50, n_val=5, max_length=12), seq2seq=True)
    model = small(BART, n_encoder_layer=1, n_decoder_layer=2).double()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))  # larger than an initialisation: every gradient counts
    split = [data.batch_at(i, batch_size=3, block_size=16) for i in range(4)]
    assert len({(labels != IGNORE).sum().item() for _, labels in split}) > 1
    assert_same_gradients(model, split, [data.batch_at(0, batch_size=12, block_size=16)])


def test_micro_batches_of_text_give_the_gradient_of_one_batch():
    model = small(GPT, n_layer=2).double()
    idx = torch.randint(40, (12, 17))
    labels = idx[:, 1:].masked_fill(torch.arange(16) > torch.randint(2, 16, (12, 1)), IGNORE)
    split = [((idx[i : i + 4, :-1],), labels[i : i + 4]) for i in (0, 4, 8)]
    assert_same_gradients(model, split, [((idx[:, :-1],), labels)])


def test_a_step_reports_its_loss_its_norm_before_clipping_and_its_labels():
    model = small(GPT, n_layer=1).double()
    idx = torch.randint(40, (2, 17))
    config = train.TrainConfig(grad_clip=1e-3)
    loss, norm, count = train.update(model, [], [((idx[:, :-1],), idx[:, 1:])], config, nullcontext())
    assert count == 32 and abs(loss - math.log(40)) < 0.2
    clipped = torch.cat([p.grad.flatten() for p in model.parameters()]).norm().item()
    assert norm > 0.01 and clipped == pytest.approx(1e-3, rel=1e-3)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_weight_decay_is_on_matrices_only_and_every_parameter_is_in_one_group(optimizer):
    for model in (small(GPT, n_layer=1), small(GPT, n_layer=1, tie_weights=False), small(BART, n_encoder_layer=1, n_decoder_layer=1)):
        optimizers = train.make_optimizers(model, train.TrainConfig(optimizer=optimizer, weight_decay=0.1))
        groups = [group for opt in optimizers for group in opt.param_groups]
        members = [p for group in groups for p in group["params"]]
        assert len(members) == len(set(members)) and set(members) == {p for p in model.parameters() if p.requires_grad}
        for group in groups:
            assert all((p.dim() >= 2) == (group["weight_decay"] == 0.1) for p in group["params"])
            assert all(p.dim() >= 2 or group["weight_decay"] == 0.0 for p in group["params"])
        if optimizer == "muon":
            names = {p: name for name, p in model.named_parameters()}
            inner = {names[p] for p in optimizers[1].param_groups[0]["params"]}
            assert inner and all("." in name and not re.search("wte|wpe|lm_head", name) for name in inner)


@pytest.mark.parametrize("shape", [(12, 40), (40, 12), (16, 16)])
def test_orthogonalising_keeps_the_singular_vectors_and_maps_the_singular_values(shape):
    x = torch.randn(2, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    x[1] *= 100  # each for itself
    left, s, right = torch.linalg.svd(x, full_matrices=False)
    s = s / s.norm(dim=1, keepdim=True)
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    assert 0.5 < s.min() and s.max() < 1.25
    assert (muon.orthogonal(x, (3.4445, -4.7750, 2.0315), 5) - left * s[:, None] @ right).abs().max() < 1e-10


def test_muon_takes_torchs_steps_in_its_own_precision_and_keeps_its_state():
    """torch's orthogonalises in bfloat16, whose rounding, 2**-8, is all that lies between the two."""
    weights = [torch.randn(16, 24), torch.randn(24, 8), torch.randn(16, 24)]
    ours, theirs = ([torch.nn.Parameter(w.clone()) for w in weights] for _ in range(2))
    settings = dict(lr=0.02, momentum=0.9, weight_decay=0.1)
    optimizer, oracle = muon.Muon(ours, **settings), torch.optim.Muon(theirs, adjust_lr_fn="match_rms_adamw", **settings)
    for _ in range(4):
        for p, q in zip(ours, theirs):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        before = [p.detach().clone() for p in ours]
        optimizer.step(), oracle.step()
        for p, q, was in zip(ours, theirs, before):
            assert (p - q).norm() < 0.02 * (p - was).norm()
            q.data.copy_(p.data)  # one step's rounding at a time
        for p, q in zip(ours, theirs):
            assert torch.equal(optimizer.state[p]["momentum_buffer"], oracle.state[q]["momentum_buffer"])
    optimizer.load_state_dict(oracle.state_dict())  # of checkpoints that are there already
    assert optimizer.state_dict()["state"].keys() == oracle.state_dict()["state"].keys()


def test_the_learning_rate_warms_up_and_then_follows_half_a_cosine():
    config = train.TrainConfig(lr=1.0, min_lr=0.1, warmup_steps=10, steps=110)
    at = lambda step: train.lr_at(step, config)
    assert [at(0), at(4), at(9), at(10)] == pytest.approx([0.1, 0.5, 1.0, 1.0])
    assert [at(35), at(60), at(110), at(500)] == pytest.approx([0.1 + 0.9 * (0.5 + 0.25 * 2**0.5), 0.55, 0.1, 0.1])
    assert all(at(step) >= at(step + 1) for step in range(10, 109))
    assert train.lr_at(0, train.TrainConfig(lr=1.0, warmup_steps=0)) == 1.0


def test_evaluation_is_the_mean_over_tokens_without_dropout_and_gives_the_mode_back():
    model = small(GPT, n_layer=1)
    model.drop.p = 0.5
    idx = torch.randint(40, (3, 17))
    short = idx[:1, 1:].masked_fill(torch.arange(16) > 3, IGNORE)
    batches = [((idx[:2, :-1],), idx[:2, 1:]), ((idx[:1, :-1],), short)]
    first, again = (train.evaluate(model, batches, "cpu", nullcontext()) for _ in range(2))
    assert first == again and model.training
    model.eval()
    with torch.no_grad():
        sums = [train.loss_sum(model, *batch)[0] for batch in batches]
    assert first[0] == pytest.approx(sum(sums).item() / 36, rel=1e-6)


def test_teacher_forced_exact_match_is_that_of_greedy_decoding(tiny_bart):
    values = dict(source="reverse", tokenizer="char", min_length=1, max_length=5, n_train=3000, n_val=100)
    data, tokenizer = load_data(DataConfig(**values), seq2seq=True, tokenizer=tiny_bart.tokenizer)
    model = tiny_bart.model
    exact = train.evaluate(model, data.val_batches(7, 12), "cpu", nullcontext())[1]
    model.eval()
    sources, targets = ([tokenizer.encode(text) for text in side] for side in zip(*data.val_pairs))
    assert max(map(len, targets)) < 12
    rows = generate.generate(model, sources, 11)
    assert exact == sum(row == target for row, target in zip(rows, targets)) / 100
    assert 0.3 < exact < 1  # some of both, or this says nothing
    assert exact == log(tiny_bart.path)[-1]["exact_match"]


# -----------------------------------------------------------------------------
# Whole runs


def test_the_loss_falls(tiny_gpt, tiny_bart, tmp_path):
    train_run(tmp_path / "gpt", GPT_TOML, "--train.optimizer=adamw", "--train.steps=40", "--train.lr=3e-3")
    train_run(tmp_path / "bart", BART_TOML, "--train.optimizer=adamw", "--train.steps=40", "--train.lr=3e-3")
    for out, most in ((tiny_gpt.path, 1.0), (tiny_bart.path, 0.5), (tmp_path / "gpt" / "out", 4.0), (tmp_path / "bart" / "out", 3.0)):
        losses = [line["loss"] for line in log(out) if "loss" in line]
        assert losses[-1] < 0.9 * losses[0]
        assert [line["val_loss"] for line in log(out) if "val_loss" in line][-1] < most


def test_a_run_leaves_its_log_its_curve_and_its_checkpoints(tiny_gpt):
    lines = log(tiny_gpt.path)
    assert [line["step"] for line in lines if "loss" in line] == list(range(10, 121, 10))
    assert all(line.keys() == {"step", "loss", "lr", "grad_norm"} | MACHINES for line in lines if "loss" in line)
    held_out = [line for line in lines if "val_loss" in line]
    assert [line["step"] for line in held_out] == [60, 120]
    characters_per_token = len(TEXT[int(len(TEXT) * 0.9):]) / len(TEXT[int(len(TEXT) * 0.9):].encode())
    assert held_out[1]["nats_per_character"] == pytest.approx(held_out[1]["val_loss"] / characters_per_token)
    assert (tiny_gpt.path / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in tiny_gpt.path.glob("step-*")) == ["step-00000060", "step-00000120"]
    assert load_checkpoint(tiny_gpt.path).step == 120


def test_stdout_says_what_is_trained_and_what_was_saved(tmp_path):
    outcome = train_run(tmp_path, GPT_TOML, "--train.steps=2", "--train.eval_every=1", "--train.dtype=bfloat16")
    first, *saved = outcome.out.splitlines()
    assert "35,744 parameters, 257 tokens in the vocabulary, on cpu in bfloat16" in first
    assert [line.split(":")[0] for line in saved] == ["step 1", "step 2"]


@pytest.mark.parametrize("kind, n", [("gpt", 56), ("bart", 11)])
def test_samples_show_what_the_model_of_that_step_writes_and_change_nothing(kind, n, tmp_path):
    plain, shown = tmp_path / "plain", tmp_path / "shown"
    train_run(plain, TOML[kind], "--train.steps=4", "--train.eval_every=2")
    outcome = train_run(shown, TOML[kind], "--train.steps=4", "--train.eval_every=2", "--train.sample_every=2")
    assert untimed(plain / "out") == untimed(shown / "out")
    assert sha256(plain / "out", 4)[0] == sha256(shown / "out", 4)[0]
    data_config = train.read([str(shown / "config.toml")])[1]
    for step in (2, 4):
        model, tokenizer = load_pretrained(shown / "out" / f"step-{step:08d}")
        data = load_data(data_config, seq2seq=kind == "bart", tokenizer=tokenizer)[0]
        (first, *_), _ = next(data.val_batches(batch_size=1, block_size=model.config.block_size))
        given = first[0].tolist()[: None if kind == "bart" else 8]
        new = generate.generate(model, [given], n)[0]
        assert f"step {step}: {tokenizer.decode(given)!r} -> {tokenizer.decode(new)!r}" in outcome.out.splitlines()


def test_a_log_without_a_checkpoint_is_that_of_a_run_that_came_to_nothing(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "log.jsonl").write_text('{"step": 1, "loss": 9.0}\n{"step": 2, "lo')
    train_run(tmp_path, GPT_TOML, "--train.steps=2", "--train.log_every=1")
    assert [line["step"] for line in log(tmp_path / "out")] == [1, 2, 2]


def test_lines_of_a_log_that_hold_no_numbers_are_passed_over(tmp_path):
    train_run(tmp_path, GPT_TOML, "--train.steps=2", "--train.log_every=1")
    before = untimed(tmp_path / "out")
    with open(tmp_path / "out" / "log.jsonl", "a") as file:
        file.write('{"step": null}\n{"step": "1"}\n{"step": 1, "loss": []}\n[]\n3\n{"step": 1, "loss": 1' + "0" * 400 + "}\n")
    train_run(tmp_path, GPT_TOML, "--train.steps=3", "--train.log_every=1", "--train.resume=true")
    assert untimed(tmp_path / "out")[: len(before)] == before and load_checkpoint(tmp_path / "out").step == 3
    assert [line["step"] for line in log(tmp_path / "out") if "loss" in line] == [1, 2, 3]


def test_a_log_that_is_no_file_is_refused_and_not_waited_for(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "config.toml").write_text(GPT_TOML.replace("{source}", "pydoc"))
    os.mkfifo(tmp_path / "out" / "log.jsonl")
    outcome = call(train.main, tmp_path / "config.toml", f"--train.out_dir={tmp_path / 'out'}", "--train.steps=1")
    assert outcome.code == 2 and "log.jsonl is not a regular file" in outcome.err and outcome.err.count("\n") == 1


def test_a_finished_run_resumed_is_as_it_was(tmp_path):
    train_run(tmp_path, GPT_TOML, "--train.steps=2")
    before = sha256(tmp_path / "out", 2), log(tmp_path / "out")
    assert "saved" not in train_run(tmp_path, GPT_TOML, "--train.steps=2", "--train.resume=true").out
    assert before == (sha256(tmp_path / "out", 2), log(tmp_path / "out"))


def test_a_run_is_not_resumed_with_other_batches_nor_with_what_its_optimizers_would_not_hear_of(tmp_path):
    train_run(tmp_path, GPT_TOML, "--train.steps=2")
    for change in ("--train.accumulation=7", "--train.batch_size=5", "--train.seed=99", "--train.weight_decay=0.5",
                   "--train.beta2=0.5"):
        outcome = call(train.main, tmp_path / "config.toml", f"--train.out_dir={tmp_path / 'out'}", "--train.steps=3",
                       "--train.resume=true", change)
        assert outcome.code == 2 and change[2:].split("=")[0] in outcome.err


def test_resuming_where_there_is_nothing_starts_anew(tmp_path):
    train_run(tmp_path, GPT_TOML, "--train.steps=1", "--train.resume=true")
    assert load_checkpoint(tmp_path / "out").step == 1


def loss_of_first_batch(directory, folder, source):
    """What a run in this folder, with the tokenizer of a model, reads first, and how well that model predicts it."""
    model, tokenizer = load_pretrained(directory)
    data, _ = load_data(DataConfig(source=source, tokenizer="char"), seq2seq=False, tokenizer=tokenizer)
    inputs, labels = data.batch_at(0, batch_size=8, block_size=64)
    return (train.loss_sum(model, inputs, labels)[0] / labels.numel()).item()


def test_a_run_begins_with_the_weights_and_the_tokenizer_of_another(tiny_gpt, tmp_path):
    """Whatever [data] says of a tokenizer: ids of another would mean nothing to these weights."""
    begin = [f"--train.init_from={tiny_gpt.path}", "--data.tokenizer=char", "--train.log_every=1"]
    train_run(tmp_path, GPT_TOML, *begin, "--train.steps=3", "--train.eval_every=1")
    first = log(tmp_path / "out")[0]["loss"]
    assert first == pytest.approx(loss_of_first_batch(tiny_gpt.path, tmp_path, str(tmp_path / "text.txt")), rel=1e-5) and first < 2
    model, tokenizer = load_pretrained(tmp_path / "out")
    assert tokenizer.n_vocab == 257 and not torch.equal(model.wte.weight, tiny_gpt.model.wte.weight)
    before = sha256(tmp_path / "out", 3)
    train_run(tmp_path, GPT_TOML, *begin, "--train.steps=3", "--train.resume=true")  # the run, not where it began
    assert sha256(tmp_path / "out", 3) == before and len(log(tmp_path / "out")) == 6
    train_run(tmp_path, GPT_TOML, *begin, "--train.steps=4", "--train.resume=true")
    assert [line["loss"] for line in log(tmp_path / "out") if "loss" in line][3] < 2


def test_a_run_does_not_begin_with_what_does_not_fit_it(tiny_gpt, tiny_bart, tmp_path):
    bare = shutil.copytree(tiny_gpt.path / "step-00000120", tmp_path / "bare")
    for name in ("vocab.json", "merges.txt", "tokenizer.json", "manifest.json"):
        (bare / name).unlink(missing_ok=True)
    (tmp_path / "config.toml").write_text(GPT_TOML.replace("{source}", "pydoc"))
    for begin, message in (([tiny_gpt.path, "--model.n_kv_head=1"], "is of another model than this one"),
                           ([tiny_gpt.path, "--model.n_embd=64"], "is of another model than this one"),
                           ([tiny_bart.path], "tokenizer is of the other family"), ([bare], "has no tokenizer"),
                           ([tmp_path / "nowhere"], "is not a directory")):
        outcome = call(train.main, tmp_path / "config.toml", f"--train.out_dir={tmp_path / 'out'}", f"--train.init_from={begin[0]}",
                       *begin[1:])
        assert outcome.code == 2 and outcome.out == "" and outcome.err.count("\n") == 1 and message in outcome.err, outcome
        assert not (tmp_path / "out").exists()


# -----------------------------------------------------------------------------
# Stopped and resumed


SMALL = ["--train.steps=8", "--train.eval_every=3", "--train.eval_batches=1", "--train.log_every=1", "--train.batch_size=4",
         "--train.accumulation=2", "--model.embd_pdrop=0.1", "--model.attn_pdrop=0.1", "--model.resid_pdrop=0.1"]


@pytest.mark.parametrize("kind, optimizer", [("gpt", "adamw"), ("gpt", "muon"), ("bart", "muon")])
def test_a_run_that_was_stopped_and_resumed_is_the_run_that_never_stopped(kind, optimizer, tmp_path, monkeypatch):
    """Bit for bit, with dropout and accumulation: weights, optimizers, random numbers and log."""
    settings = [*SMALL, f"--train.optimizer={optimizer}", "--data.n_train=100"]
    monkeypatch.setattr(Run, "plot", lambda self: None)
    whole = tmp_path / "whole"
    train_run(whole, TOML[kind], *settings)
    for cut in (1, 4, 8):
        folder, steps, update = tmp_path / f"cut-{cut}", [], train.update

        def stopped(*args):
            steps.append(1)
            if len(steps) == cut:
                signal.raise_signal(signal.SIGINT)
            return update(*args)

        folder.mkdir()
        shutil.copy(whole / "config.toml", folder)  # with the same text, and so the same data.source
        program = [folder / "config.toml", f"--train.out_dir={folder / 'out'}", *settings]
        monkeypatch.setattr(train, "update", stopped)
        outcome = call(train.main, *program)
        assert outcome.code == 130 and f"step {cut}: saved" in outcome.out and outcome.err.endswith("interrupted\n")
        assert load_checkpoint(folder / "out").step == cut
        monkeypatch.setattr(train, "update", update)
        torch.manual_seed(99)  # the state of another process
        assert call(train.main, *program, "--train.resume=true").code == 0
        assert sha256(folder / "out", 8) == sha256(whole / "out", 8)
        assert untimed(folder / "out") == untimed(whole / "out")


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_a_real_run_between_two_steps_and_saves(signum, tmp_path):
    """Control-C, or the kill of whoever lends the machine."""
    train_run(tmp_path, GPT_TOML, "--train.steps=1")
    process = shell("train.py", tmp_path / "config.toml", f"--train.out_dir={tmp_path / 'out'}", "--train.resume=true",
                    "--train.steps=1000000", "--train.eval_every=1000000", "--train.log_every=1")
    while len(log(tmp_path / "out")) < 5:
        time.sleep(0.02)
        assert process.poll() is None
    process.send_signal(signum)
    outcome = finish(process)
    assert outcome.code == 130 and outcome.err.endswith("interrupted\n") and "Traceback" not in outcome.err
    step = int(re.findall(r"step (\d+): saved", outcome.out)[-1])
    assert step == load_checkpoint(tmp_path / "out").step == log(tmp_path / "out")[-1]["step"] > 1


def test_one_directory_has_one_training_and_a_killed_one_leaves_no_lock(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    (tmp_path / "config.toml").write_text(GPT_TOML.replace("{source}", str(tmp_path / "text.txt")))
    line = [tmp_path / "config.toml", f"--train.out_dir={tmp_path / 'out'}", "--train.resume=true", "--train.log_every=1"]
    first = shell("train.py", *line, "--train.steps=1000000")
    while not (tmp_path / "out" / "log.jsonl").exists() or len(log(tmp_path / "out")) < 2:
        time.sleep(0.02)
        assert first.poll() is None
    outcome = call(train.main, *line, "--train.steps=1")
    assert outcome.code == 2 and "another training" in outcome.err and outcome.err.count("\n") == 1, outcome
    first.kill()
    finish(first)
    for steps in (61, 62):  # in one process, one after the other
        assert call(train.main, *line, f"--train.steps={steps}", "--train.eval_batches=1").code == 0


def test_a_training_that_began_while_we_read_is_noticed(tmp_path, monkeypatch):
    """Both begin in a directory that is not there yet."""
    train_run(tmp_path / "before", GPT_TOML, "--train.steps=1")
    load_data, others = train.load_data, []

    def slow(*args, **kwargs):
        (tmp_path / "out").mkdir()
        others.append(Run(tmp_path / "out", True))
        return load_data(*args, **kwargs)

    monkeypatch.setattr(train, "load_data", slow)
    outcome = call(train.main, tmp_path / "before" / "config.toml", f"--train.out_dir={tmp_path / 'out'}")
    assert outcome.code == 2 and "another training" in outcome.err and not any((tmp_path / "out").iterdir())


def test_a_second_control_c_stops_at_once(tmp_path, monkeypatch):
    update = train.update

    def impatient(*args):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        return update(*args)

    handler = signal.getsignal(signal.SIGINT)
    train_run(tmp_path, GPT_TOML, "--train.steps=1")
    monkeypatch.setattr(train, "update", impatient)
    outcome = call(train.main, tmp_path / "config.toml", f"--train.out_dir={tmp_path / 'out'}", "--train.resume=true")
    assert outcome.code == 130 and load_checkpoint(tmp_path / "out").step == 1
    assert signal.getsignal(signal.SIGINT) is handler


def test_a_killed_run_loads_and_is_never_behind_what_it_announced(tmp_path):
    """kill -9 at random moments of a run that saves at every step. MINDECODE_KILLS=50 for a longer look."""
    train_run(tmp_path, GPT_TOML, "--train.steps=1", "--train.log_every=1", "--train.batch_size=1", "--model.n_layer=2")
    rng, out, least = random.Random(0), tmp_path / "out", 1
    for _ in range(KILLS):
        process = shell("train.py", tmp_path / "config.toml", f"--train.out_dir={out}", "--train.resume=true",
                        "--train.steps=1000000", "--train.eval_every=1", "--train.eval_batches=1", "--train.log_every=1",
                        "--model.n_layer=2", "--train.batch_size=1")
        said = str(process.stdout.readline()) + str(process.stdout.readline())  # what it trains; its first save
        time.sleep(rng.uniform(0, 0.4))
        process.kill()
        announced = [int(n) for n in re.findall(r"step (\d+): saved", said + finish(process).out)]
        checkpoint = load_checkpoint(out)
        assert checkpoint.step >= max(announced, default=least)
        least = checkpoint.step
        load_pretrained(out)
        lines = [line for line in Run(out, True).history() if line["step"] <= least]
        assert [line["step"] for line in lines if "loss" in line] == list(range(1, least + 1))
        assert [line["step"] for line in lines if "val_loss" in line] == list(range(1, least + 1))
    assert least > 1


# -----------------------------------------------------------------------------
# Numbers that are none


def test_a_loss_that_is_no_number_exits_3_and_the_last_good_checkpoint_is_there(tmp_path):
    train_run(tmp_path, GPT_TOML, "--train.steps=2")
    before = sha256(tmp_path / "out", 2)
    outcome = call(train.main, tmp_path / "config.toml", f"--train.out_dir={tmp_path / 'out'}", "--train.resume=true",
                   "--train.steps=50", "--train.lr=1e10", "--train.warmup_steps=0")
    assert outcome.code == 3 and "Traceback" not in outcome.err
    said = outcome.err.splitlines()[-1]
    assert said.startswith("stopped: the loss is") and re.search(r"at step ([3-9]|\d\d)\b", said)
    assert str(tmp_path / "out" / "step-00000002") in said and "--train.lr" in said and "1e+10" in said and "resume" in said
    assert sha256(tmp_path / "out", 2) == before and load_checkpoint(tmp_path / "out").step == 2
    load_pretrained(tmp_path / "out")


@pytest.mark.parametrize("lr", ["1e10", "9e18"])
def test_no_checkpoint_is_made_of_weights_that_are_no_numbers(lr, tmp_path):
    train_run(tmp_path, GPT_TOML, "--train.steps=2")
    outcome = call(train.main, tmp_path / "config.toml", f"--train.out_dir={tmp_path / 'out'}", "--train.resume=true",
                   "--train.steps=9", "--train.eval_every=1", f"--train.lr={lr}", "--train.warmup_steps=0", "--train.optimizer=muon")
    assert outcome.code == 3 and outcome.err.splitlines()[-1].startswith("stopped: the ")
    for path in (tmp_path / "out").glob("step-*"):
        load_pretrained(path)  # refuses what is not finite


def test_a_held_out_loss_that_is_no_number_is_an_error():
    model = small(GPT, n_layer=1)
    model.ln_f.weight.data[0] = math.inf
    with pytest.raises(NonFiniteError, match="held-out"):
        train.evaluate(model, [((torch.zeros(1, 3).long(),), torch.zeros(1, 3).long())], "cpu", nullcontext())


def test_a_poisoned_weight_is_noticed_before_the_step(tmp_path, monkeypatch):
    update = train.update

    def poisoned(model, optimizers, *args):
        with torch.no_grad():
            model.h[1].mlp.c_fc.bias[3] = math.nan
        before = model.wte.weight.clone()
        try:
            return update(model, optimizers, *args)
        finally:
            assert torch.equal(model.wte.weight, before)

    train_run(tmp_path, GPT_TOML, "--train.steps=1")
    monkeypatch.setattr(train, "update", poisoned)
    for out in ("out", "new"):
        outcome = call(train.main, tmp_path / "config.toml", f"--train.out_dir={tmp_path / out}", "--train.resume=true")
        assert outcome.code == 3 and f"the loss is nan and its gradient's norm nan at step {1 + (out == 'out')};" in outcome.err
    assert "there is no checkpoint" in outcome.err
