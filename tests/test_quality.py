"""The table of what sharing heads and seeing less costs: its variants are comparable, and two steps of it run."""

import re

import pytest
from conftest import BART_TOML, GPT_TOML, TEXT, call

from further import quality
from plumbing.checkpoints import load_checkpoint
from plumbing.models import count_parameters, read_model_config
from plumbing.runs import Run

SMALL = dict(n_layer=4, n_head=4, n_embd=128, block_size=128)


def test_all_variants_have_as_many_parameters_within_a_hundredth():
    for values in (SMALL, dict(SMALL, preset="gpt2", n_head=8), dict(type="bart", n_head=4, n_embd=128)):
        plain = read_model_config(values)
        begun, later = quality.variants(plain)
        for fields in begun | later:
            config = read_model_config(quality.widened(values, (begun | later)[fields]))
            assert abs(count_parameters(config) / count_parameters(plain) - 1) < 0.01
            assert (config.inner > plain.inner) == any("kv_head" in name for name in (begun | later)[fields])


def table(out):
    header, *lines = ([cell.strip() for cell in re.split(r"  +", line)] for line in out.splitlines())
    return {line[0]: dict(zip(header, line if len(line) == len(header) else [*line[:5], "", *line[5:]])) for line in lines}


def pooled(rows):
    return {f"MHA to {name} by {way}{end}": smaller for name, smaller in rows.items() for way in ("mean", "span")
            for end in ("", ", trained further")}


@pytest.mark.parametrize("toml, rows", [
    (GPT_TOML, {"MHA": 1, "GQA": 2, "MQA": 4, "local": 8, "strided": 1, "fixed": 64 / 22, "topk": 1}
     | pooled({"GQA": 2, "MQA": 4})),
    (BART_TOML, {"MHA": 1} | pooled({"MQA": 4, "MQA self": 65 / (33 / 4 + 32), "MQA cross": 65 / (33 + 32 / 4)})),
], ids=["gpt", "bart"])
def test_two_steps_fill_every_line_of_the_table(toml, rows, tmp_path, monkeypatch):
    """rows: name -> how many times smaller than the multi-head model's its cache is."""
    monkeypatch.setattr(quality, "SEEDS", 2 if toml is BART_TOML else 1)
    monkeypatch.setattr(Run, "plot", lambda self: None)
    (tmp_path / "text.txt").write_text(TEXT)
    (tmp_path / "config.toml").write_text(toml.replace("{source}", str(tmp_path / "text.txt")))
    args = (tmp_path / "config.toml", f"--train.out_dir={tmp_path / 'out'}", "--train.steps=2", "--train.eval_batches=1",
            "--data.n_train=200", "--model.n_head=4", "--model.block_size=64", "--train.warmup_steps=0")
    outcome = call(quality.main, *args)
    assert outcome.code == 0, outcome
    found = table(outcome.out)
    assert list(found) == list(rows)
    number = lambda name, column: float(found[name][column].split()[0].replace(",", ""))
    for name, smaller in rows.items():
        assert number("MHA", "cache, bytes") / number(name, "cache, bytes") == pytest.approx(smaller)
        assert number(name, "to MHA") == pytest.approx(number(name, "held-out loss") - number("MHA", "held-out loss"), abs=2e-4)
        least, most = map(float, re.search(r"\((.*) to (.*)\)", found[name]["held-out loss"]).groups())
        assert least <= number(name, "held-out loss") <= most and (least < most) == (toml is BART_TOML)
        assert number(name, "decode, ms/token") > 0
        assert bool(found[name]["training, tokens/s"]) == (not name.startswith("MHA to") or "further" in name)
        assert (number(name, "parameters") < 0.99 * number("MHA", "parameters")) == name.startswith("MHA to")
    shared, whole = (load_checkpoint(tmp_path / "out" / name).extra for name in ("to-MQA-by-mean-1337", "MHA-1337"))
    assert shared["model"] == whole["model"] | {"n_kv_head": 1, "n_inner": None}  # not widened
    assert shared["train"]["init_from"] == str(tmp_path / "out" / "to-MQA-by-mean-1337-pooled") and shared["train"]["steps"] == 1
    assert shared["train"]["lr"] == whole["train"]["lr"] * quality.MORE_LR["mean"] and shared["data"] == whole["data"]
    again = call(quality.main, *args)
    assert again.code == 2 and "--train.resume=true" in again.err and again.out == ""
    resumed = call(quality.main, *args, "--train.resume=true")
    assert [line["held-out loss"] for line in table(resumed.out).values()] == [line["held-out loss"] for line in found.values()]


def test_bad_input_exits_2_with_one_line_before_anything_is_trained(tmp_path):
    (tmp_path / "config.toml").write_text(GPT_TOML.replace("{source}", "pydoc"))
    for args, message in (([], "name a configuration first"), (["--train.steps=2"], "name a configuration first"),
                          ([tmp_path / "config.toml", "--model.block_size=8"], "model.block_size=8 must be at least 16"),
                          ([tmp_path / "config.toml", "--model.n_head=1"], "n_kv_head=0 must be at least 1"),
                          ([tmp_path / "config.toml", "--train.step=1"], "did you mean 'steps'"),
                          ([tmp_path / "config.toml", "--data.source=nowhere"], "nowhere")):
        outcome = call(quality.main, *args, *[f"--train.out_dir={tmp_path / 'out'}"] * bool(args))
        assert outcome.code == 2 and outcome.out == "" and outcome.err.count("\n") == 1 and message in outcome.err, outcome
        assert not (tmp_path / "out").exists()
    assert call(quality.main, "--help").out.startswith("\nWhat sharing heads")
