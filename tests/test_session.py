"""Stops, in ids and in texts, and conversations: what enters the model, what comes out, and what stays as it was."""

import os
import random
import re
import signal
import sys

import pytest
import torch
from conftest import call, finish, shell
from hypothesis import given, settings
from hypothesis import strategies as st

import generate
from cost import count, hooks
from further.session import Session
from generate import strategies, stream
from model import BART, GPT, BARTConfig, GPTConfig
from plumbing.errors import NonFiniteError, UserError
from plumbing.tokenizers import Stops, StreamDecoder, train_tokenizer
from test_generate import random_model
from test_model import rough

TEXT = "abab abba né 😀 aab\nbab, naïve 日本 ab ba\n" * 3
TOKENIZERS = {kind: train_tokenizer(kind, TEXT, 290) for kind in ("byte", "bpe", "char")}
arbitrary = settings(deadline=None, derandomize=True, max_examples=int(os.environ.get("MINDECODE_CASES", 150)))


# -----------------------------------------------------------------------------
# Stops of ids


@pytest.mark.parametrize("kind", ["gpt", "bart"])
def test_a_row_ends_with_its_first_stop_which_is_kept_whatever_the_strategy(kind):
    ends = set()
    for seed in range(25):
        model, prompts, M = random_model(seed, kind)
        full = generate.generate(model, prompts, M, ignore_eos=True)
        rng = random.Random(seed)
        at, size = rng.randrange(M), rng.randint(1, 3)
        stop = [full[0][at : at + size], (full[-1][M // 2],), [0, 1, 0, 1]]  # of ids that stand there, a tuple, and none
        cuts = [next((n for n in range(1, M + 1) if any(row[:n][-len(s) :] == list(s) for s in stop)), M) for row in full]
        expected = [row[:cut] for row, cut in zip(full, cuts)]
        for strategy in strategies(model):
            assert generate.generate(model, prompts, M, strategy=strategy, ignore_eos=True, stop=stop) == expected
        ends |= {cut < M for cut in cuts}
    assert ends == {True, False}


def test_a_stop_does_not_begin_in_the_prompt():
    for seed in range(20):
        model, prompts, M = random_model(seed, "gpt")
        full = generate.generate(model, prompts, M, ignore_eos=True)
        stop = [[row[-1], new[0]] for row, new in zip(prompts, full)]
        cut = lambda new: next((n + 2 for n in range(M - 1) if new[n : n + 2] in stop), M)
        assert generate.generate(model, prompts, M, ignore_eos=True, stop=stop) == [new[: cut(new)] for new in full]


def test_overlapping_beginnings_of_a_stop_hide_none():
    """1 1 2 in 1 1 1 2: whoever begins afresh at the first id that does not fit never sees it."""
    found = [1, 1, 1, 2, 7]
    model = random_model(0, "gpt")[0]
    make = lambda model, sources, B, room, choose: lambda rows, which: [[found[len(rows[0]) - 1]]]
    [row] = generate.generate(model, [[0]], 5, strategy=make, stop=[[1, 1, 2]], ignore_eos=True)
    assert row == [1, 1, 1, 2]


@pytest.mark.parametrize("stop, words", [
    ([[]], "stop 0 is empty"), ([[1], [99]], "stop 1 has the id 99"), ([5], "stop 0 is 5: it must be a list"),
    ("ab", "stop 0 is 'a'"), ([[1.0]], "1.0")])
def test_a_stop_that_no_row_can_end_with_is_refused(stop, words):
    model = random_model(0, "gpt")[0]
    with pytest.raises(UserError, match=re.escape(words)):
        stream(model, [[1]], 2, stop=stop)


# -----------------------------------------------------------------------------
# Stops of text


def searched(data, stops):
    """The bytes before the stop that is complete first, by trying every length; and whether there is one."""
    for end in range(len(data) + 1):
        if begins := [end - len(stop) for stop in stops if data[:end].endswith(stop)]:
            return data[: min(begins)], True
    return data, False


def pieces_of(tokenizer):
    """Streams of ids that are likely to hold stops, and to break characters."""
    some = st.text(TEXT + "\ufffd" if tokenizer.n_vocab > 100 else TEXT, max_size=6).map(tokenizer.encode_plain)
    return st.lists(st.one_of(some, st.lists(st.integers(0, tokenizer.n_vocab - 1), max_size=3)), max_size=8).map(
        lambda parts: sum(parts, []))


@pytest.mark.parametrize("kind", TOKENIZERS)
@arbitrary
@given(data=st.data())
def test_streaming_up_to_a_stop_equals_a_search_in_the_whole_text(kind, data):
    tokenizer = TOKENIZERS[kind]
    stops = data.draw(st.lists(st.text("ab é😀\n日", min_size=1, max_size=4), max_size=3))
    ids = data.draw(pieces_of(tokenizer))
    whole = b"".join(map(tokenizer.token_bytes, ids))
    before, found = searched(whole, [stop.encode() for stop in stops])
    decoder, shown = StreamDecoder(tokenizer, stops), ""
    expected = before.decode(errors="replace")
    for n, i in enumerate(ids):
        shown += decoder.push(i)
        assert expected.startswith(shown)
        if decoder.stopped:
            break
        so_far = whole[: sum(len(tokenizer.token_bytes(i)) for i in ids[: n + 1])]
        held = max([n for stop in stops for n in range(len(stop.encode())) if so_far.endswith(stop.encode()[:n])], default=0)
        sure = so_far[: len(so_far) - held].decode(errors="ignore")  # no more than this need be held back
        assert len(shown.replace("\ufffd", "")) >= len(sure.replace("\ufffd", ""))
    assert decoder.stopped == found
    assert all(decoder.push(i) == "" for i in ids[:3] if found)  # and what comes behind a stop says nothing
    assert shown + decoder.flush() == expected and decoder.size == len(before)
    if "\ufffd" not in stops:
        assert expected == tokenizer.decode(ids)[: len(expected)]  # the text itself, up to the stop
        assert min((at for stop in stops if (at := expected.find(stop)) >= 0), default=None) is None
    # told from the ids alone, after each, as the loop asks
    asked = Stops(tokenizer, stops)
    ends = next((n for n in range(1, len(ids) + 1) if asked(ids[:n])), None)
    size = lambda n: sum(len(tokenizer.token_bytes(i)) for i in ids[:n])
    assert (ends is not None) == found
    assert ends is None or searched(whole[: size(ends)], asked.texts)[1] and not searched(whole[: size(ends - 1)], asked.texts)[1]
    # and the ids that lie wholly before the stop
    n, more = tokenizer.within(ids, decoder.size)
    assert size(n) + more == len(before) and (n == len(ids) or size(n + 1) > len(before)) and more >= 0


def test_of_stops_the_first_that_is_complete_counts_and_nothing_of_it_is_shown():
    tokenizer = TOKENIZERS["byte"]

    def shown(text, *stops):
        decoder = StreamDecoder(tokenizer, stops)
        return [*map(decoder.push, tokenizer.encode(text)), decoder.flush()]

    assert shown("aabx", "ab") == ["", "a", "", "", ""]
    assert shown("aabx", "abc") == ["", "a", "", "abx", ""]
    assert shown("aab", "abc") == ["", "a", "", "ab"]
    assert shown("xé!", "é!") == ["x", "", "", "", ""] and shown("xè", "é") == ["x", "", "è", ""]
    assert "".join(shown("0abcd", "abcde", "c")) == "0ab" and "".join(shown("0abcd", "bc", "c")) == "0a"


@pytest.mark.parametrize("stops, words", [([""], "''"), (["a", ""], "''"), (["a", 5], "5 is no text"), ([b"a"], "b'a' is no"),
                                          (["\ud83d"], "ud83d")])
def test_what_is_no_stop_is_refused(stops, words):
    for make in (Stops, StreamDecoder):
        with pytest.raises(UserError, match=words):
            make(TOKENIZERS["byte"], stops)


def test_a_single_stop_need_not_be_a_list():
    assert Stops(None, "ab").texts == [b"ab"]


# -----------------------------------------------------------------------------
# --stop and stop_strings


def written(tiny, *args, **kwargs):
    return call(generate.main, "--model", tiny.path, "--prompt", "the", "--max-new-tokens", 30, *args, **kwargs)


def test_stop_ends_the_text_before_it_in_every_way_of_printing(tiny_gpt):
    whole = written(tiny_gpt).out.removesuffix("\n")
    new = whole[3:]
    for stop in (new[4:9], new[7:8], new[2:4] + "?", new[-4:], new[:1]):
        cut = new.partition(stop)[0]
        args = "--stop", stop, "--stop", "never said"
        assert written(tiny_gpt, *args).out == written(tiny_gpt, *args, "--no-stream").out == f"the{cut}\n"
        said = generate.json.loads(written(tiny_gpt, *args, "--json").out)
        assert said["text"] == cut == tiny_gpt.tokenizer.decode(said["ids"])
    assert "30 new tokens" in written(tiny_gpt, "--stats").err
    assert "9 new tokens" in written(tiny_gpt, "--stats", "--stop", new[4:9]).err  # and the loop ends there


def test_each_of_several_samples_ends_at_its_own_stop(tiny_gpt):
    args = "--temperature", 1.2, "--seed", 3, "--num-samples", 4
    outcome = written(tiny_gpt, *args, "--json", "--stop", "th", "--stop", "a")
    rows = [generate.json.loads(line) for line in outcome.out.splitlines()]
    assert not any(re.search("th|a", row["text"]) for row in rows)
    assert all(tiny_gpt.tokenizer.decode(row["ids"]) == row["text"] for row in rows)  # each byte is a token
    assert len({len(row["ids"]) for row in rows}) > 1
    assert written(tiny_gpt, *args, "--stop", "th", "--stop", "a").out == "---\n".join(f"the{row['text']}\n" for row in rows)


@pytest.fixture
def published(tiny_gpt, tmp_path):
    """A function: the outcome of a generation from the tiny GPT with these lines in its generation_config.json."""
    for file in max(tiny_gpt.path.glob("step-*")).iterdir():
        if file.name != "manifest.json":
            (tmp_path / file.name).write_bytes(file.read_bytes())

    def outcome(*args, **lines):
        (tmp_path / "generation_config.json").write_text(generate.json.dumps(lines))
        return written(tiny_gpt._replace(path=tmp_path), *args)

    return outcome


def test_stop_strings_of_the_publishers_are_honoured_unless_no_end_counts(published):
    plain = published()
    new = plain.out[3:-1]
    for theirs in (new[4:6], [new[4:6], "never said"]):
        assert published(stop_strings=theirs).out == f"the{new.partition(new[4:6])[0]}\n"
        assert published("--stop", new[2:4], stop_strings=theirs).out == f"the{new.partition(new[2:4])[0]}\n"
    ignoring = published("--ignore-eos")
    assert published("--ignore-eos", stop_strings=new[4:6]) == ignoring
    assert published("--ignore-eos", "--stop", new[4:6]).out == f"the{new.partition(new[4:6])[0]}\n"
    assert published(stop_strings=None) == published(stop_strings=[]) == plain
    for wrong in ([""], 5, [5], {"a": 1}, ["\ud83d"], True, [["a"]]):
        refused = published(stop_strings=wrong)
        assert (refused.code, refused.out, refused.err.count("\n")) == (2, "", 1) and "stop_strings" in refused.err, refused


@pytest.mark.parametrize("stop, words", [("", "--stop: the stop ''"), ("caf\udce9", "--stop is not UTF-8")])
def test_a_stop_that_is_empty_or_no_text_is_refused(tiny_gpt, stop, words):
    refused = written(tiny_gpt, "--stop", stop)
    assert (refused.code, refused.out, refused.err.count("\n")) == (2, "", 1) and words in refused.err
