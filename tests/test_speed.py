"""bench.py decode, prefill and train: who is asked what and when, what is counted, what is refused. Times are not looked at."""

import json
from contextlib import contextmanager
from importlib.util import find_spec

import pytest
import torch

import bench
import train
from conftest import GPT_TOML, TEXT, call
from cost import predict
from model import GPT
from plumbing import engines, report, speed, train_bench
from plumbing.models import random_config
from plumbing.weights import load_pretrained, save_pretrained

ct2 = pytest.mark.skipif(find_spec("ctranslate2") is None, reason="CTranslate2 is not here: pip install ctranslate2")
SMALL = ["--model.n_head=2", "--model.n_embd=16", "--model.vocab_size=50", "--model.block_size=32"]
GPT_ARGS = ["--random", "gpt2", "--model.n_layer=2", "--model.eos_id=2", *SMALL]
BART_ARGS = ["--random", "bart-base", "--model.n_encoder_layer=1", "--model.n_decoder_layer=2", *SMALL]
REQUEST = ["--prompt-tokens", 7, "--max-new-tokens", 6, "--num-samples", 3, "--device", "cpu"]


class Here:
    """A worker without a process; what it is asked stands in `asked`."""

    asked = []

    def __init__(self, name, job):
        self.name, self.answers, self.job = name, [], json.loads(json.dumps(job))
        self.write, self.found = engines.ENGINES[job["engine"]](self.job)
        self.found["threads"] = 1

    def ask(self):
        self.asked.append(self.name)
        return engines.timed(self.write)


@pytest.fixture
def here(monkeypatch):
    """Workers in this process, and a machine that reads and multiplies at once; the list of the workers."""
    made = []

    @contextmanager
    def working(jobs):
        made.extend(Here(*job) for job in jobs)
        yield made

    monkeypatch.setattr(speed, "working", working)
    monkeypatch.setattr(speed, "PAUSE", 0)
    monkeypatch.setattr(speed, "bandwidth", lambda device: Here.asked.append("read") or 1e9)
    monkeypatch.setattr(speed, "matmul_peak", lambda dtype, device: 1e12)
    monkeypatch.setattr(Here, "asked", [])
    return made


def lines(outcome):
    assert outcome.code == 0, outcome
    return [json.loads(line) for line in outcome.out.splitlines()]


def matrix_bytes(args, weight, kept, N=7, M=6, B=3):
    """Of the middle step of a request, by the closed form, which has biases besides: bytes for each token."""
    cls, config = random_config(args[1], args[2:])
    bias = sum(p.numel() for name, p in cls(config).named_parameters() if name.endswith("bias")
               and ("c_" in name or "lm_head" in name) and "encoder" not in name and "c_kv" not in name)
    found = predict(config, "cached", N, M // 2 + 1, B, itemsize=1)
    return ((found["weight_bytes"] - bias) * weight + (found["step_bytes"] - found["weight_bytes"]) * kept) / B


@pytest.mark.parametrize("args", [GPT_ARGS, BART_ARGS], ids=["gpt", "bart"])
def test_engines_are_processes_that_write_the_same(args):
    pytest.importorskip("transformers")
    where, ours, naive, theirs = lines(call(bench.main, "prefill", *args, *REQUEST, "--repeats", 2, "--against", "hf", "--also",
                                            "--strategy naive", "--json"))
    assert [e["engine"] for e in (ours, naive, theirs)] == ["minDecode", "minDecode --strategy naive", "hf"]
    assert [where[key] for key in ("rows", "prompt_tokens", "new_tokens", "dtype")] == [3, 7, 6, "float32"]
    assert len(where["bandwidths"]) == 2 and where["bandwidth"] > 0 < where["peak_flops"]
    for engine in (ours, naive, theirs):
        assert engine["equal"] == 1 and engine["ids"] == ours["ids"] and engine["precision"] == "float32"
        assert len(engine["seconds"]) == len(engine["first_seconds"]) == 2 and engine["peak_bytes"] > 2**20
        assert all(0 < first < whole for first, whole in zip(engine["first_seconds"], engine["seconds"]))
    assert [len(row) for row in ours["ids"]] == [6] * 3 and ours["bytes_per_token"] == theirs["bytes_per_token"]


@pytest.mark.parametrize("args", [GPT_ARGS, BART_ARGS], ids=["gpt", "bart"])
def test_what_a_token_reads_and_multiplies_is_the_closed_form(args, here):
    where, plain, half, whole = lines(call(bench.main, "prefill", *args, *REQUEST, "--repeats", 1, "--json", "--also",
                                           "--dtype bfloat16", "--also", "--quantize int8"))
    assert plain["bytes_per_token"] == pytest.approx(matrix_bytes(args, 4, 4))
    assert half["bytes_per_token"] == pytest.approx(matrix_bytes(args, 2, 2))
    assert whole["bytes_per_token"] == pytest.approx(matrix_bytes(args, 1, 4))
    first = predict(random_config(args[1], args[2:])[1], "cached", 7, 1, 3)
    assert plain["flops_per_prompt_token"] == pytest.approx((first["linear_flops"] + first["attention_flops"]) / 21)
    decode, prefill = (speed.limit(where | dict(section=section), plain) for section in ("decode", "prefill"))
    assert decode == 1e9 / plain["bytes_per_token"] and prefill == 1e12 / plain["flops_per_prompt_token"]
    assert speed.limit(where, half) is None  # no bfloat16 product was measured


@ct2
@pytest.mark.parametrize("args", [GPT_ARGS, BART_ARGS], ids=["gpt", "bart"])
def test_ctranslate2_writes_the_same(args, here):
    where, ours, theirs, whole = lines(call(bench.main, "prefill", *args, *REQUEST, "--repeats", 1, "--json", "--against",
                                            "ctranslate2,ctranslate2:int8"))
    assert theirs["ids"] == ours["ids"] and theirs["precision"] == "float32" and "int8" in whole["precision"]
    assert [len(row) for row in whole["ids"]] == [6] * 3 and 0 <= whole["equal"] <= 1
    assert theirs["bytes_per_token"] == ours["bytes_per_token"]
    assert whole["bytes_per_token"] == pytest.approx(matrix_bytes(args, 1, 4))


@pytest.mark.skipif(None in map(find_spec, ("llama_cpp", "gguf")),
                    reason="llama.cpp is not here: pip install llama-cpp-python gguf")
@pytest.mark.parametrize("more", [(), ("--model.tie_weights=false",)], ids=["tied", "own head"])
def test_llama_cpp_writes_the_same(more, here):
    args = [*GPT_ARGS, "--model.n_embd=32", "--model.n_inner=96", *more]  # of blocks of 32 numbers, whole ones
    where, ours, theirs, whole = lines(call(bench.main, "prefill", *args, *REQUEST, "--repeats", 1, "--json", "--against",
                                            "llama.cpp,llama.cpp:int8"))
    assert theirs["ids"] == ours["ids"] and theirs["precision"] == "float32 but for GELU"
    assert [len(row) for row in whole["ids"]] == [6] * 3 and 0.5 < whole["equal"] <= 1
    assert theirs["bytes_per_token"] == ours["bytes_per_token"]
    assert whole["bytes_per_token"] == pytest.approx(matrix_bytes(args, 34 / 32, 2))


def test_an_end_of_sequence_ends_nothing(here):
    """Every id is an end: each engine that heeds one would stop at once."""
    pytest.importorskip("transformers")
    others = "hf,ctranslate2" if find_spec("ctranslate2") else "hf"
    args = [arg for arg in GPT_ARGS if "eos_id" not in arg] + [f"--model.eos_id={list(range(50))}"]
    for engine in lines(call(bench.main, "prefill", *args, *REQUEST, "--repeats", 1, "--json", "--against", others))[1:]:
        assert engine["equal"] == 1 and [len(row) for row in engine["ids"]] == [6] * 3


def test_engines_take_turns_after_all_are_set_up(here):
    outcome = call(bench.main, "prefill", *GPT_ARGS, *REQUEST, "--repeats", 2, "--also", "", "--also=--strategy naive")
    a, b, c = "minDecode", "minDecode ", "minDecode --strategy naive"
    assert outcome.code == 0 and Here.asked == [a, b, c] + [a, b, c, "read"] * 2, outcome
    assert all(worker.job["n"] == 6 and worker.job["rows"] == here[0].job["rows"] for worker in here)
    assert "of the limit" in outcome.out and "1.00x" in outcome.out and outcome.out.count("same") == 3


@pytest.mark.parametrize("more, code", [("--strategy naive", 1), ("--dtype bfloat16", 0)])
def test_what_should_write_the_same_and_does_not_ends_it(more, code, here, monkeypatch):
    def slip(write, clock):
        rows = write(clock)
        rows[1][4] = (rows[1][4] + 1) % 50
        return rows

    real = engines.ours

    def ours(job):
        write, found = real(job | {"args": job["args"] | {"dtype": None}})
        odd = job["args"]["strategy"] == "naive" or job["args"]["dtype"]
        precision = dict(precision=job["args"]["dtype"] or "float32")
        return (lambda clock: slip(write, clock)) if odd else write, found | precision

    monkeypatch.setitem(engines.ENGINES, "minDecode", ours)
    outcome = call(bench.main, "prefill", *GPT_ARGS, *REQUEST, "--repeats", 1, "--also", more)
    assert outcome.code == code
    if code:
        assert not outcome.out and outcome.err.count("\n") == 1 and len(Here.asked) == 2, "nothing is timed"
        assert f"minDecode {more} writes something else, first in row 1, token 4" in outcome.err
    else:
        assert "94.4% equal" in outcome.out  # 17 of 18


@pytest.mark.parametrize("more, words", [
    (["--against", "vllm"], "'vllm' is none of the engines"), (["--against", "hf:int8"], "hf:int8"),
    (["--against", "ctranslate2:int4"], "int4"), (["--repeats", 0], "--repeats 0"), (["--max-new-tokens", 1], "--max-new-tokens 1"),
    (["--also", "--max-new-tokens 3"], "another model or text"), (["--also", "--model.n_layer=3"], "--model.n_layer=3"),
    (["--also", "--nothing"], "--also '--nothing'"), (["--also", "--compile --strategy naive"], "do not go together"),
    (["--strategy", "further.compiled:compiled"], "--compile"), (["--also", "--strategy further.compiled:compiled"], "--compile"),
    (["--against", "llama.cpp:float64"], "float64"),
    (["--against", "hf", "--model.n_kv_head=1"], "mindecode-gpt"), (["--plot", "no/where.png"], "no/where.png")])
def test_what_cannot_be_measured_is_refused_in_a_line(more, words, monkeypatch):
    monkeypatch.setattr(speed, "working", None)
    outcome = call(bench.main, "decode", *GPT_ARGS, *REQUEST, *more)
    assert outcome.code == 2 and not outcome.out and outcome.err.count("\n") == 1 and words in outcome.err


def test_an_engine_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setattr(speed, "find_spec", lambda name: None)
    outcome = call(bench.main, "prefill", *GPT_ARGS, *REQUEST, "--against", "ctranslate2")
    assert outcome.code == 2 and "pip install ctranslate2" in outcome.err and outcome.err.count("\n") == 1


@pytest.mark.parametrize("args, more, device", [(BART_ARGS, (), "cpu"), (GPT_ARGS, ("--dtype", "float64"), "cpu"),
                                                (GPT_ARGS, (), "cuda")])
def test_llama_cpp_is_for_gpts_on_a_cpu(args, more, device, monkeypatch):
    monkeypatch.setattr(speed, "find_spec", lambda name: True)
    monkeypatch.setattr(speed, "pick_device", lambda name: device)
    monkeypatch.setattr(speed, "check_memory", lambda *args: None)
    outcome = call(bench.main, "decode", *args, *REQUEST, "--against", "llama.cpp:int8", *more)
    assert outcome.code == 2 and "for GPTs, on a CPU" in outcome.err and outcome.err.count("\n") == 1


def test_so_many_models_must_fit_the_memory(monkeypatch):
    asked = []
    monkeypatch.setattr(speed, "check_memory", lambda what, config, each, device: asked.append((what, each)) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        call(bench.main, "prefill", *GPT_ARGS, *REQUEST, "--also", "", "--also", "")
    assert asked == [("a model for each of 3 engines", 12)]


def test_what_goes_wrong_in_a_worker_is_said_in_a_line_and_none_is_left():
    with pytest.raises(ValueError, match="a: KeyError: 'nobody'"):
        with engines.working([("a", {"engine": "nobody"})]):
            pass
    workers = [engines.Worker("a", {"engine": "nobody"})]
    workers[0].process.kill()
    with pytest.raises(ValueError, match="a has died, with exit code -9"):
        workers[0].ask()
    workers[0].process.communicate()


def test_a_prompt_from_standard_input_is_read_once_and_no_publishers_rule_is_followed(tiny_gpt, here, tmp_path):
    save_pretrained(tmp_path, tiny_gpt.model, tiny_gpt.tokenizer)
    said = json.loads((tmp_path / "generation_config.json").read_text())
    (tmp_path / "generation_config.json").write_text(json.dumps(said | {"repetition_penalty": 9.0, "num_beams": 3}))
    args = "prefill", "--model", tmp_path, "-", "--max-new-tokens", 20, "--device", "cpu", "--repeats", 1, "--also", "", "--json"
    where, *found = lines(call(bench.main, *args, stdin=b"the cat"))
    assert where["prompt_tokens"] == 7 and found[0]["ids"] == found[1]["ids"]
    greedy = torch.tensor([tiny_gpt.tokenizer.encode("the cat")])
    for _ in range(20):
        greedy = torch.cat([greedy, tiny_gpt.model(greedy)[:, -1:].argmax(-1)], 1)
    assert found[0]["ids"] == greedy[:, 7:].tolist()
    refused = call(bench.main, *args, "--against", "hf", "--decoder-prompt", "x", stdin=b"the cat")
    assert refused.code == 2 and "--decoder-prompt" in refused.err


def test_bars_are_drawn(here, tmp_path):
    pytest.importorskip("matplotlib")
    outcome = call(bench.main, "prefill", *GPT_ARGS, *REQUEST, "--repeats", 2, "--plot", tmp_path / "a.png", "--also", "--dtype bfloat16")
    assert outcome.code == 0 and (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG"), outcome


def test_a_dry_run_says_what_a_training_would_take_and_keeps_nothing(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    (tmp_path / "gpt.toml").write_text(GPT_TOML.replace("{source}", str(tmp_path / "text.txt")))
    args = tmp_path / "gpt.toml", "--data.tokenizer=char", f"--train.out_dir={tmp_path / 'out'}", "--train.steps=1000000"
    done = call(train.main, *args, "--dry-run")
    assert done.code == 0 and sorted(path.name for path in tmp_path.iterdir()) == ["gpt.toml", "text.txt"]
    *_, flops, memory, time = done.out.splitlines()
    assert "MFLOP" in flops and "MB" in memory and time.strip().startswith("all 1,000,000 steps would take ")
    for wrong in [(), ("--train.lr=-1",)]:
        refused = call(train.main, *(args[:1] if wrong else ()), *wrong, "--dry-run")
        assert refused.code == 2 and refused.err.count("\n") == 1 and not refused.out


def test_training_is_measured_and_nothing_is_kept(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    (tmp_path / "gpt.toml").write_text(GPT_TOML.replace("{source}", str(tmp_path / "text.txt")))
    args = "train", tmp_path / "gpt.toml", f"--train.out_dir={tmp_path / 'out'}", "--train.accumulation=2", "--data.tokenizer=char"
    [found] = lines(call(bench.main, *args, "--repeats", 2, "--json"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gpt.toml", "text.txt"]
    assert len(found["seconds"]) == len(found["tokens_per_second"]) == 5 and found["accumulation"] == 2
    V, C, T, L = len(set(TEXT)), 32, 64, 2
    assert found["flops_per_token"] == pytest.approx(3 * (2 * (L * 12 * C * C + C * V) + L * 4 * C * T))
    assert min(found["seconds"] + found["tokens_per_second"] + [found["peak_flops"], found["peak_bytes"]]) > 0
    assert "MFU" in train_bench.table(found) and "medians of 2 steps after 3" in train_bench.table(found)
    refused = call(bench.main, *args, "--repeats", 0)
    assert refused.code == 2 and "--repeats 0" in refused.err and not refused.out
