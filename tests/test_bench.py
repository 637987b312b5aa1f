"""bench.py measures what it says, on a model small enough to do it in seconds; times themselves are for the reader."""

import copy
import json
import math
from contextlib import nullcontext
from dataclasses import replace
from itertools import islice

import pytest

import bench
from compare import compare
from conftest import call
from further.quantize import quantize
from model import BART
from plumbing import load_bench, models, pairs, precision_bench
from plumbing.data import load_data
from plumbing.runs import trained_on
from plumbing.weights import save_pretrained
from train import evaluate


@pytest.fixture
def tiny(tmp_path):
    config = replace(BART.get_default_config(), n_encoder_layer=1, n_decoder_layer=1, n_head=2, n_embd=8, vocab_size=20,
                     block_size=10)
    save_pretrained(tmp_path, BART(config))
    return tmp_path


def test_loading_is_measured_in_pairs_and_compared_with_transformers(tiny):
    pytest.importorskip("transformers")
    outcome = call(bench.main, "load", "--model", tiny, "--pairs", 2, "--parity", "--json")
    assert outcome.code == 0, outcome
    result = json.loads(outcome.out)
    assert len(result["read_seconds"]) == len(result["load_seconds"]) == len(result["ratios"]) == 2
    assert min(result["read_seconds"] + result["load_seconds"]) > 0 and result["difference"] < 1e-5
    assert result["file_bytes"] == (tiny / "model.safetensors").stat().st_size and result["dtype"] == "float32"
    report = load_bench.table(result)
    assert "load / read" in report and "transformers" in report and "torch" in report


def test_a_random_model_is_removed_again(tmp_path, monkeypatch):
    monkeypatch.setattr(load_bench.tempfile, "tempdir", str(tmp_path))
    monkeypatch.setitem(load_bench.PRESETS, "tiny", ("gpt", dict(n_layer=1, n_head=1, n_embd=4, vocab_size=9, block_size=4)))
    monkeypatch.setattr(load_bench, "fresh", lambda function, *args: function(*args))
    outcome = call(bench.main, "load", "--random", "tiny", "--dtype", "bfloat16", "--pairs", 1)
    assert outcome.code == 0 and "load tiny, bfloat16, cpu" in outcome.out, outcome
    wider = call(bench.main, "load", "--random", "tiny", "--pairs", 1, "--json", "--model.n_embd=64")
    assert json.loads(wider.out)["file_bytes"] > 4 * 12 * 64**2
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("args, words", [
    ("load", "--model"), ("load --random gpt5", "gpt2-xl"), ("load --model no/where", "no/where"), ("love", "love"),
    ("load --model . --pairs 0", "--pairs 0"), ("load --random gpt2 --model x", "--model"),
    ("load --random gpt2 --device tpu", "tpu")])
def test_bad_input_is_one_line(args, words, monkeypatch):
    monkeypatch.setattr(load_bench, "save_random", None)
    outcome = call(bench.main, *args.split())
    assert outcome.code == 2 and words in outcome.err and outcome.err.count("\n") == 1 and not outcome.out


def test_a_disk_without_room_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(load_bench.tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(load_bench.shutil, "disk_usage", lambda folder: load_bench.shutil._ntuple_diskusage(2**30, 2**30, 2**20))
    outcome = call(bench.main, "load", "--random", "gpt2-xl")
    assert outcome.code == 2 and "5.8 GiB" in outcome.err and "TMPDIR" in outcome.err and not any(tmp_path.iterdir())


TOML = "[model]\nn_layer = 1\nn_head = 1\nn_embd = 8\nvocab_size = 20\nblock_size = 16\n"


@pytest.fixture
def random_args(tmp_path):
    (tmp_path / "gpt.toml").write_text(TOML)
    return "--random", tmp_path / "gpt.toml", "--prompt-tokens", 3, "--max-new-tokens", 4, "--device", "cpu"


@pytest.mark.parametrize("section", [["compare"], ["report", "--output", "page.html"]])
def test_a_copy_in_fp64_without_room_is_refused_before_anything_is_computed(section, random_args, monkeypatch):
    monkeypatch.setattr(models, "count_parameters", lambda config: 2**30)
    monkeypatch.setattr(models, "free_memory", lambda device: 7 * 2**30)  # room for the model itself
    monkeypatch.setattr(bench, "compare", None)
    outcome = call(bench.main, *section, *random_args)
    assert outcome.code == 2 and not outcome.out and outcome.err.count("\n") == 1
    assert "fp64" in outcome.err and "needs 8.0 GiB and 7.0 GiB are free on cpu: choose a smaller model" in outcome.err


def no_constant(name):
    raise ValueError(f"{name} is no JSON")


def test_json_has_null_for_what_is_no_finite_number(random_args, tmp_path, monkeypatch):
    def unbounded(*args, **options):
        result = compare(*args, **options)
        result["strategies"][0] |= {"first_difference": {"gap": math.inf, "difference": math.nan}, "token_seconds": 0.5}
        return result

    monkeypatch.setattr(bench, "compare", unbounded)
    for section in (["compare"], ["report", "--output", tmp_path / "page.html"]):
        outcome = call(bench.main, *section, *random_args, "--json")
        result = json.loads(outcome.out, parse_constant=no_constant)
        assert outcome.code == 0 and result["strategies"][0]["first_difference"] == {"gap": None, "difference": None}
        assert result["strategies"][0]["token_seconds"] == 0.5 and result["N"] == 3


def test_what_goes_wrong_in_a_process_of_its_own_is_said_in_one_line(tiny):
    (tiny / "config.json").unlink()
    outcome = call(bench.main, "load", "--model", tiny)
    assert outcome.code == 2 and "config.json" in outcome.err and outcome.err.count("\n") == 1


SMALL = ["--model.n_head=2", "--model.n_embd=16", "--model.block_size=32", "--dtype", "float32"]


@pytest.mark.parametrize("args, ways, rows", [
    (["batch", "--random", "gpt2", "--model.n_layer=1"], ["one by one", "together"], 8),
    (["beams", "--random", "bart-base", "--model.n_encoder_layer=1", "--model.n_decoder_layer=1", "--beams", 3],
     ["transformers", "minDecode"], 1),
    (["speculate", "--random", "gpt2", "--model.n_layer=1"], ["one a pass", "guesses"], 1)])
def test_two_ways_take_turns_and_write_the_same(args, ways, rows, monkeypatch):
    pytest.importorskip("transformers")
    turns = []

    def fresh(function, values, way):
        turns.append(way)
        return function(values, way)

    monkeypatch.setattr(bench, "fresh", fresh)
    monkeypatch.setattr(pairs, "LEAST", 0.0)
    args += [*SMALL, "--prompt-tokens", 16, "--max-new-tokens", 6, "--pairs", 2]
    outcome = call(bench.main, *args, "--json")
    assert outcome.code == 0, outcome
    result = json.loads(outcome.out)
    assert turns == ways * 2 and list(result["ways"]) == ways
    (a, *_), (b, *_) = result["ways"].values()
    assert a["ids"] == b["ids"] and [len(ids) for ids in b["ids"]] == [6] * rows and a["seconds"] > 0 < b["seconds"]
    assert (b["passes"] or 0) <= 6 and bool(b["passes"]) == (args[0] == "speculate")
    text = pairs.table(result)
    assert "both write the same" in text and "1.00x" in text and ("passes" in text) == (args[0] == "speculate")
    result["ways"][ways[1]][0]["ids"][0][-1] += 1
    assert "both write something else" in pairs.table(result)


@pytest.mark.parametrize("args, words", [
    (["batch", "--pairs", 0], "--pairs 0"), (["batch"], "at least 8"), (["beams"], "--beams N"), (["beams", "--beams", 0], "--beams 0"),
    (["batch", "--num-samples", 2], "--num-samples 2")])
def test_ways_that_cannot_be_compared_are_refused(args, words):
    outcome = call(bench.main, *args, "--random", "gpt2", "--model.n_layer=1", *SMALL, "--prompt-tokens", 5)
    assert outcome.code == 2 and outcome.out == "" and outcome.err.count("\n") == 1 and words in outcome.err


@pytest.mark.parametrize("section", ["compare", "trace", "batch"])
def test_what_looks_on_from_outside_does_not_know_a_compiled_step(section):
    done = call(bench.main, section, "--random", "gpt2", "--prompt-tokens", 8, "--compile")
    assert done.code == 2 and "--compile" in done.err and done.err.count("\n") == 1


def test_a_trace_of_a_compiled_step_is_refused():
    done = call(bench.main, "trace", "--random", "gpt2", "--model.n_layer=1", *SMALL, "--prompt-tokens", 8,
                "--strategy", "further.compiled:compiled")
    assert done.code == 2 and "nothing can be counted" in done.err and done.err.count("\n") == 1 and not done.out


def test_what_fewer_bits_cost_is_measured_on_what_was_held_out(tiny_gpt, tiny_bart):
    for tiny in tiny_gpt, tiny_bart:
        outcome = call(bench.main, "precision", "--model", tiny.path, "--batches", 2, "--device", "cpu", "--json")
        assert outcome.code == 0, outcome
        found = json.loads(outcome.out)
        rows = {row.pop("precision"): row for row in found["precisions"]}
        assert list(rows) == ["float64", "float32", "bfloat16", "float16", "int8, the rest float32", "int8, the rest bfloat16"]
        data = load_data(trained_on(tiny.path), seq2seq=tiny.model.config.is_encoder_decoder, tokenizer=tiny.tokenizer)[0]
        batches = islice(data.val_batches(precision_bench.ROWS, tiny.model.config.block_size), 2)
        loss, _ = evaluate(copy.deepcopy(tiny.model).double(), batches, "cpu", nullcontext())
        assert rows["float64"] == {"loss": pytest.approx(loss, abs=1e-9), "rms": 0, "most": 0}
        error = [rows[name]["rms"] for name in ("float32", "float16", "bfloat16")]
        assert 0 < error[0] < 1e-5 < error[1] < 1e-2 and 3 * error[1] < error[2] < rows["int8, the rest bfloat16"]["rms"]
        assert all(row["rms"] <= row["most"] and abs(row["loss"] - loss) < 0.2 for row in rows.values())
    assert "held-out loss" in precision_bench.table(found | {"precisions": [{"precision": name} | rows[name] for name in rows]})


@pytest.mark.parametrize("args, words", [
    (["--batches", 0], "--batches 0"), (["--source", "nowhere.txt"], "nowhere.txt"), (["--model", "no/where"], "no/where")])
def test_what_precision_cannot_measure_is_refused_in_a_line(args, words, tiny_gpt):
    outcome = call(bench.main, "precision", "--model", tiny_gpt.path, "--device", "cpu", *args)
    assert outcome.code == 2 and not outcome.out and outcome.err.count("\n") == 1 and words in outcome.err


def test_precision_loads_no_model_where_there_is_no_text(tiny_gpt, tmp_path, monkeypatch):
    save_pretrained(tmp_path / "plain", tiny_gpt.model, tiny_gpt.tokenizer)
    monkeypatch.setattr(precision_bench, "load_pretrained", None)
    assert "with --source" in call(bench.main, "precision", "--model", tmp_path / "plain").err


def test_precision_needs_a_text_and_a_model_of_plain_numbers(tiny_gpt, tmp_path):
    save_pretrained(tmp_path / "plain", tiny_gpt.model, tiny_gpt.tokenizer)
    save_pretrained(tmp_path / "mute", tiny_gpt.model)
    save_pretrained(tmp_path / "whole", quantize(copy.deepcopy(tiny_gpt.model)), tiny_gpt.tokenizer)
    for name, more, words in (("plain", (), "with --source"), ("mute", ("--source", "shakespeare"), "no tokenizer"),
                              ("whole", ("--source", "shakespeare"), "whole numbers already")):
        outcome = call(bench.main, "precision", "--model", tmp_path / name, "--device", "cpu", *more)
        assert outcome.code == 2 and words in outcome.err and outcome.err.count("\n") == 1
