"""
What a model's publishers ask for in generation_config.json, as facebook/bart-large-cnn's do: honoured as transformers
honours it, or refused by its name, never ignored.
"""

import json
import random

import pytest
import torch

import bench
import generate as program
from conftest import call
from generate import generate
from plumbing import cli
from plumbing.weights import load_generation_config, load_pretrained, save_pretrained

transformers = pytest.importorskip("transformers")

from test_weights import ids, theirs  # needs transformers as well

CNN = {"num_beams": 4, "length_penalty": 2.0, "early_stopping": True, "min_length": 56, "max_length": 142,
       "no_repeat_ngram_size": 3, "repetition_penalty": 1.3, "forced_bos_token_id": 0, "forced_eos_token_id": 2, "decoder_start_token_id": 2,
       "bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2}


def published(seed):
    """CNN's rules, in numbers that fit a tiny model; every second time some of them are missing."""
    draw = random.Random(seed)
    rules = CNN | {"min_length": draw.randint(6, 18), "max_length": draw.randint(20, 34), "repetition_penalty": draw.choice([0.8, 1.2, 1.7]),
                   "no_repeat_ngram_size": draw.choice([2, 3]), "forced_bos_token_id": draw.choice([0, 7])}
    spared = draw.sample(["min_length", "no_repeat_ngram_size", "forced_bos_token_id", "forced_eos_token_id",
                          "repetition_penalty"], 2)
    return {key: value for key, value in rules.items() if seed % 2 or key not in spared}


def eager(seed):
    """A random tiny BART of Hugging Face's, in float64, that would repeat itself and end early if it were let."""
    model = theirs("bart", seed).double()
    with torch.no_grad():
        model.final_logits_bias[0, 2] += random.Random(seed).choice([0.0, 2.0, 4.0])
    return model


def published_tokens(model, row, **changes):
    """transformers' tokens by the rules of the model's own generation_config, up to the first end."""
    row = torch.tensor([row])
    with torch.no_grad():
        new = model.generate(row, attention_mask=torch.ones_like(row), do_sample=False, **changes)[0, 1:].tolist()
    return new[: new.index(2) + 1] if 2 in new else new  # the best of beams may be shorter than another


def greedy(model, row):
    """The same, without beams."""
    return published_tokens(model, row, num_beams=1)


@pytest.mark.parametrize("seed", range(20))
def test_greedy_decoding_by_published_rules_is_transformers_token_for_token(seed, tmp_path):
    model = eager(seed)
    model.save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps(published(seed)))
    model = type(model).from_pretrained(tmp_path, dtype=torch.float64).eval()  # with these rules
    ours, _ = load_pretrained(tmp_path)
    rows = [ids(ours.config.vocab_size, n).tolist() for n in (1, 4, 9)]
    args = cli.parse("", ["--model", str(tmp_path), "--prompt", "", "--beams", "1"])
    M, rules = cli.publishers_rules(args, ours, None, load_generation_config(tmp_path), len(rows[0]))
    expected = [greedy(model, row) for row in rows]
    for strategy in ("cached", "naive"):
        assert generate(ours, rows, M, strategy=strategy, **rules) == expected


def test_in_these_models_every_rule_matters():
    changed = {"min_length": 0, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "forced_bos_token_id": None, "forced_eos_token_id": None}
    counts = dict.fromkeys(changed, 0)
    for seed in range(1, 20, 2):
        model = eager(seed)
        model.generation_config = transformers.GenerationConfig(**published(seed))
        row = ids(model.config.vocab_size, 5).tolist()
        with_all = greedy(model, row)
        for key, off in changed.items():
            setattr(model.generation_config, key, off)
            counts[key] += greedy(model, row) != with_all
            setattr(model.generation_config, key, published(seed)[key])
    assert min(counts.values()) >= 2, counts


@pytest.fixture
def trained(tiny_bart, tmp_path):
    """The directory of a BART that was really trained, with CNN's rules in numbers that fit it."""
    save_pretrained(tmp_path, tiny_bart.model, tiny_bart.tokenizer)
    rules = CNN | {"min_length": 9, "max_length": 12, "no_repeat_ngram_size": 2}
    (tmp_path / "generation_config.json").write_text(json.dumps(rules))
    return tmp_path


def test_beams_are_not_measured_and_not_ignored(trained):
    for section in "compare", "trace":
        outcome = call(bench.main, section, "--model", trained, "--prompt", "abc")
        assert outcome.code == 2 and not outcome.out and outcome.err.count("\n") == 1
        assert "num_beams=4 in generation_config.json" in outcome.err and "--beams 1" in outcome.err
    outcome = call(program.main, "--model", trained, "--prompt", "abc", "--temperature", 1)
    assert outcome.code == 2 and "num_beams=4" in outcome.err and "--beams 1" in outcome.err


def test_the_command_line_writes_what_transformers_writes(trained):
    model = transformers.BartForConditionalGeneration.from_pretrained(trained).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(trained)
    for text in ("abc", "zebra", "qq"):
        outcome = call(program.main, "--model", trained, "--prompt", text, "--beams", 1, "--json", "--device", "cpu")
        assert outcome.code == 0, outcome
        new = json.loads(outcome.out)
        assert new["ids"] == greedy(model, tokenizer.encode(text)) and len(new["ids"]) >= 9 and new["ids"][0] == 0
        assert new["text"] == tokenizer.decode(new["ids"], skip_special_tokens=True)


def test_no_flag_is_needed_for_any_of_these_rules(trained):
    model = transformers.BartForConditionalGeneration.from_pretrained(trained).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(trained)
    changed = dict.fromkeys(["num_beams", "length_penalty", "min_length", "no_repeat_ngram_size"], 0)
    for text in ("abc", "zebra", "qq", "edcba", "xyx", "m"):
        outcome = call(program.main, "--model", trained, "--prompt", text, "--json", "--device", "cpu")
        assert outcome.code == 0 and outcome.err == "", outcome
        new, row = json.loads(outcome.out), tokenizer.encode(text)
        assert new["ids"] == published_tokens(model, row) and new["score"] < 0
        assert new["text"] == tokenizer.decode(new["ids"], skip_special_tokens=True)
        plain = call(program.main, "--model", trained, "--prompt", text, "--device", "cpu")
        assert plain.out == new["text"] + "\n"
        for flag, value in ("--length-penalty", 0.5), ("--early-stopping", "never"), ("--beams", 2):
            outcome = call(program.main, "--model", trained, "--prompt", text, "--json", "--device", "cpu", flag, value)
            key = {"--beams": "num_beams"}.get(flag, flag[2:].replace("-", "_"))
            assert json.loads(outcome.out)["ids"] == published_tokens(model, row, **{key: value})
        for key, off in ("num_beams", 1), ("min_length", 0), ("no_repeat_ngram_size", 0), ("length_penalty", -3.0):
            changed[key] += published_tokens(model, row, **{key: off}) != new["ids"]
    assert min(changed.values()) >= 2, changed  # each of them matters
