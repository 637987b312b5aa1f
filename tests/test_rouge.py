"""ROUGE of a model: scores are what one computes by hand, and the pairs are those that were held out."""

import json
import re
import sys

import pytest
from conftest import call

from further import rouge
from generate import generate
from plumbing.data import DataConfig, make_pairs
from plumbing.errors import UserError
from plumbing.weights import save_pretrained

pytest.importorskip("rouge_score", reason="rouge-score is not here: pip install rouge-score")


@pytest.mark.parametrize("text, target, scores", [
    # 4 of 4 words are among 6; 2 of 3 pairs (the cat, the mat) among 5; the longest common subsequence has all 4
    ("the cat the mat", "The cat sat on the mat.", (2 * 4 / 10, 2 * 2 / 8, 2 * 4 / 10)),
    # the same words, no pair of them, and one at most in this order
    ("mat cat", "cat mat", (1, 0, 2 * 1 / 4)),
    # a word counts as often as the other text has it: 1 of 3, and of 1
    ("dog dog dog", "dog", (2 * 1 / 4, 0, 2 * 1 / 4)),
    # stems count
    ("Returns the lines", "return the line", (1, 1, 1)),
    ("", "anything", (0, 0, 0)),
])
def test_scores_are_those_computed_by_hand(text, target, scores):
    found = rouge.scorer()([text], [target])
    assert list(found) == ["rouge1", "rouge2", "rougeL"]
    assert list(found.values()) == pytest.approx([100 * score for score in scores])


def test_a_score_is_the_mean_over_pairs():
    assert rouge.scorer()(["a b", "x"], ["a b", "y"]) == pytest.approx({"rouge1": 50, "rouge2": 50, "rougeL": 50})


@pytest.mark.parametrize("text, first", [
    ("One two. Three.", "One two."), ("In 3.11 it is os.path.\nMore", "In 3.11 it is os.path."), ("Why? Because.", "Why?"),
    ("  no end", "no end"), ("Stop!", "Stop!")])
def test_the_first_sentence_ends_at_a_mark_before_white_space(text, first):
    assert rouge.lead(text) == first


def table(out):
    count, header, *lines = out.splitlines()
    assert re.split("  +", header.strip()) == ["ROUGE-1", "ROUGE-2", "ROUGE-L"]
    return count, {name: list(map(float, numbers)) for name, *numbers in (line.split() for line in lines)}


def test_the_table_is_of_what_the_run_held_out_and_of_what_the_model_writes(tiny_bart):
    """Texts are those that one prompt at a time gives; a reversed word is one word, and right where it is the target."""
    outcome = call(rouge.main, "--model", tiny_bart.path, "--batch-size", 7)
    assert outcome.code == 0, outcome
    count, found = table(outcome.out)
    assert count == "100 pairs" and list(found) == [str(tiny_bart.path), "lead-1"]
    pairs = make_pairs(DataConfig(source="reverse", tokenizer="char", min_length=1, max_length=5, n_train=3000, n_val=100))[1]
    encode, decode = tiny_bart.tokenizer.encode, tiny_bart.tokenizer.decode
    written = [decode(generate(tiny_bart.model, [encode(source)], 11)[0]) for source, _ in pairs]
    assert all(target == source[::-1] for source, target in pairs)
    exact = sum(text == target for text, (_, target) in zip(written, pairs))
    assert 5 < exact < 100 and found[str(tiny_bart.path)] == pytest.approx([exact, 0, exact])
    assert found["lead-1"] == pytest.approx([palindromes := sum(s == t for s, t in pairs), 0, palindromes])


def test_beams_and_the_number_of_pairs_are_what_was_asked_for(tiny_bart, monkeypatch):
    seen, serve = [], rouge.serve
    monkeypatch.setattr(rouge, "serve", lambda *args, **options: seen.append((len(args[1]), options)) or serve(*args, **options))
    for beams in ([], ["--beams", 3]):
        outcome = call(rouge.main, "--model", tiny_bart.path, "--pairs", 9, "--batch-size", 2, *beams)
        assert outcome.code == 0 and table(outcome.out)[0] == "9 pairs"
    assert [(n, options["batch_size"], options.get("beams")) for n, options in seen] == [(9, 2, None), (9, 2, 3)]


def test_pairs_of_ones_own_come_from_a_file_and_the_seed_of_the_run_divides_them(tiny_bart, tmp_path):
    lines = [{"source": "abc"[n % 3] * (1 + n // 3), "target": "x"} for n in range(15)]
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines[:12]))
    outcome = call(rouge.main, "--model", tiny_bart.path, "--source", tmp_path / "own.jsonl")
    assert outcome.code == 0 and table(outcome.out)[0] == "1 pairs"
    plain = tmp_path / "plain"
    save_pretrained(plain, tiny_bart.model, tiny_bart.tokenizer)
    assert table(call(rouge.main, "--model", plain, "--source", tmp_path / "own.jsonl").out)[1]["lead-1"] == [0, 0, 0]
    refused = call(rouge.main, "--model", plain)
    assert refused.code == 2 and "not trained on pairs by train.py" in refused.err and refused.err.count("\n") == 1


def test_without_the_package_one_line_says_how_to_get_it(tiny_bart, monkeypatch):
    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)
    with pytest.raises(UserError, match="pip install rouge-score"):
        rouge.scorer()
    outcome = call(rouge.main, "--model", tiny_bart.path)
    assert (outcome.code, outcome.out, outcome.err.count("\n")) == (2, "", 1)


def test_bad_input_exits_2_with_one_line(tiny_bart, tiny_gpt, tmp_path):
    (tmp_path / "long.jsonl").write_text("".join(json.dumps({"source": "a" * (20 + n), "target": "b"}) + "\n" for n in range(10)))
    for args, message in ((["--model", tiny_bart.path, "--pairs", 0], "--pairs 0 must be at least 1"),
                          (["--model", tiny_bart.path, "--batch-size", 0], "batch_size=0"),
                          (["--model", tiny_bart.path, "--beams", 0], "--beams 0 must be from 1"),
                          (["--model", tiny_bart.path, "--source", "nowhere"], "was not trained on pairs"),
                          (["--model", tiny_bart.path, "--source", "nowhere.jsonl"], "cannot read nowhere.jsonl"),
                          (["--model", tiny_bart.path, "--source", tmp_path / "long.jsonl"], "does not fit block_size=12"),
                          (["--model", tiny_gpt.path, "--source", "reverse"], "is a GPT"),
                          (["--model", tiny_gpt.path], "was not trained on pairs"),
                          (["--model", tmp_path / "none", "--source", "reverse"], "is not a directory"),
                          (["--model", tmp_path / "none"], "is not a directory"),
                          ([], "--model")):
        outcome = call(rouge.main, *args)
        assert (outcome.code, outcome.out, outcome.err.count("\n")) == (2, "", 1) and message in outcome.err, (args, outcome)
