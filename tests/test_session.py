"""Stops, in ids and in texts, and conversations: what enters the model, what comes out, and what stays as it was."""

import copy
import json
import os
import random
import re
import signal
from itertools import islice

import pytest
import torch
from conftest import call, finish, shell
from hypothesis import given, settings
from hypothesis import strategies as st

import bench
import generate
from cost import count, hooks
from further.session import Session
from generate import strategies, stream
from model import BART, GPT, BARTConfig, GPTConfig
from plumbing.errors import NonFiniteError, UserError
from plumbing.tokenizers import Stops, StreamDecoder, train_tokenizer
from plumbing.weights import save_pretrained
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
    assert expected == tokenizer.decode(ids)[: len(expected)]  # the text itself, up to the stop
    assert not any(stop in expected for stop in stops)
    # told from the ids alone, after each, as the loop asks
    asked = Stops(tokenizer, stops)
    ends = next((n for n in range(1, len(ids) + 1) if asked(ids[:n])), None)
    size = lambda n: sum(len(tokenizer.token_bytes(i)) for i in ids[:n])
    assert (ends is not None) == found
    assert ends is None or [searched(whole[: size(n)], asked.texts)[1] for n in (ends - 1, ends)] == [False, True]
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
    new = written(tiny_gpt).out[3:-1]
    for stop in (new[4:9], new[7:8], new[2:4] + "?", new[-4:], new[:1]):
        cut = new.partition(stop)[0]
        args = "--stop", stop, "--stop", "never said"
        assert written(tiny_gpt, *args).out == written(tiny_gpt, *args, "--no-stream").out == f"the{cut}\n"
        said = json.loads(written(tiny_gpt, *args, "--json").out)
        assert said["text"] == cut == tiny_gpt.tokenizer.decode(said["ids"])
    assert "30 new tokens" in written(tiny_gpt, "--stats").err
    assert "9 new tokens" in written(tiny_gpt, "--stats", "--stop", new[4:9]).err  # and the loop ends there


def test_each_of_several_samples_ends_at_its_own_stop(tiny_gpt):
    args = "--temperature", 1.2, "--seed", 5, "--num-samples", 4
    outcome = written(tiny_gpt, *args, "--json", "--stop", "th", "--stop", "a")
    rows = [json.loads(line) for line in outcome.out.splitlines()]
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

    def outcome(*args, write=written, **lines):
        (tmp_path / "generation_config.json").write_text(json.dumps(lines))
        return write(tiny_gpt._replace(path=tmp_path), *args)

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


def test_what_is_measured_ends_where_the_publishers_say(published):
    compare = lambda tiny: call(bench.main, "compare", "--model", tiny.path, "--prompt", "the", "--max-new-tokens", 30, "--json")
    new = published().out[3:-1]
    result = json.loads(published(write=compare, stop_strings=new[4:6]).out)
    assert result["M"] == len((new.partition(new[4:6])[0] + new[4:6]).encode()) and not result["bug"]


@pytest.mark.parametrize("stop, words", [("", "--stop: the stop ''"), ("caf\udce9", "--stop is not UTF-8")])
def test_a_stop_that_is_empty_or_no_text_is_refused(tiny_gpt, stop, words):
    refused = written(tiny_gpt, "--stop", stop)
    assert (refused.code, refused.out, refused.err.count("\n")) == (2, "", 1) and words in refused.err


# -----------------------------------------------------------------------------
# Conversations


def small(seed, tokenizer, **sizes):
    torch.manual_seed(seed)
    sizes = dict(n_layer=2, n_head=2, n_embd=8, block_size=60, vocab_size=tokenizer.n_vocab, eos_id=tokenizer.eos_id) | sizes
    return rough(GPT(GPTConfig(**sizes)))


class Dialogue:
    """
    Sessions at random, which are forks of each other, on one model. Beside each stands what it should hold: its ids, and
    how many of them have entered and were not taken back. What enters is seen by hooks, and counted by cost.count.
    """

    def __init__(self, seed, **sizes):
        self.rng = rng = random.Random(seed)
        kind = rng.choice(["byte", "bpe", "char"])
        text = "".join(rng.choice("abc é😀\n日") for _ in range(200))
        self.tokenizer = train_tokenizer(kind, text + "abc é😀\n日", 257 + rng.randint(1, 40))
        self.evicts = "pattern" in sizes
        self.model = small(seed, self.tokenizer, n_layer=rng.randint(1, 2), n_kv_head=rng.choice([1, 2]),
                           block_size=rng.randint(30, 90), tie_weights=False, **sizes)
        self.model.lm_head.weight.data[256:] *= 8  # it likes tokens of several bytes
        length = rng.choice([None, self.model.config.block_size - 5])
        self.sessions = [[Session(self.model, self.tokenizer, length), [], 0]]  # with its ids, and how many are stored
        self.worst, self.compared, self.cut, self.tails, self.afresh, self.kept, self.refused = 0.0, 0, 0, 0, 0, 0, 0

    def text(self, most):
        return "".join(self.rng.choice("abc é😀\n日") for _ in range(self.rng.randint(0, most)))

    def append(self, one):
        session, text = one[0], self.text(6)
        one[1] = one[1] + self.tokenizer.encode_plain(session.tail.decode(errors="replace") + text)
        session.append(text)

    def ask(self, session):
        """An answer's iterator, and the stops of it: often a part of what would be said without."""
        rng, most = self.rng, self.rng.randint(1, 9)
        choice = dict(temperature=rng.choice([0.0, 1.5]), seed=rng.randrange(100), ignore_eos=rng.random() < 0.5,
                      n_vocab=rng.choice([None, min(94, self.tokenizer.n_vocab)]))
        twin = session.fork()
        said = "".join(twin.answer(most, **choice))
        at = rng.randrange(len(said) or 1)
        inside = [self.tokenizer.decode([i])[1:3] for i in twin.ids[len(session.ids) :]]  # all but a token's first character
        stops = ["never", rng.choice(inside) or said[at : at + rng.randint(1, 2)]] if rng.random() < 0.6 else []
        stops = [stop for stop in stops if stop and "\ufffd" not in stop]
        return session.answer(most, stops, **choice), stops

    def answer(self, one):
        session, before, stored = one
        if not 0 < len(before) < session.length:
            with pytest.raises(UserError, match="fill" if before else "empty"):
                session.answer(3)
            self.refused += 1
            return
        pieces, stops = self.ask(session)
        left = self.rng.random() < 0.15  # or it is not read to its end
        entered, logits = [], []
        handles = [self.model.wte.register_forward_pre_hook(lambda _, args: entered.extend(args[0][0].tolist())),
                   self.model.lm_head.register_forward_hook(lambda _, args, out: logits.append(out[0, 0]))]
        with count(self.model) as cost, hooks(handles):
            said = "".join(islice(pieces, 2 if left else None))
        first = len(entered) - (cost.steps - 1)  # positions of the first pass
        assert cost.decoder_tokens == len(entered)
        assert first == max(len(before) - stored, 1) or self.evicts and first == len(before)
        whole, new = before[: len(before) - first] + entered, session.ids[len(before) :]
        assert whole[: len(before)] == before == session.ids[: len(before)]
        assert new[: cost.steps - 1] == whole[len(before) :][: len(new)]
        with torch.no_grad():
            true = self.model(torch.tensor([whole]))[0, len(before) - 1 :]
        self.worst = max(self.worst, (torch.stack(logits) - true).abs().max().item())
        self.compared += len(logits)
        self.cut, self.tails = self.cut + (len(new) < cost.steps), self.tails + (session.tail != b"")
        data = b"".join(map(self.tokenizer.token_bytes, new)) + session.tail
        assert left or data.decode(errors="replace") == said and not any(stop in said for stop in stops)
        one[1], one[2] = session.ids[:], min(len(session.ids), len(whole))
        if len(session.ids) < len(whole) and self.evicts:
            one[2] = session.cache.filled[0]

    def keep(self, one, n):
        """What is left of n ids; where a pattern evicts it may be nothing."""
        session, ids, stored = one
        if n < stored:
            left = session.cache.filled[0]
            assert left == n or self.evicts and left == 0
            self.afresh, self.kept = self.afresh + (left == 0 < n), self.kept + (left > 0)
            stored = left
        one[1], one[2] = ids[:n], stored

    def rewind(self, one):
        n = self.rng.randint(len(one[1]) // 2, len(one[1]))
        one[0].rewind(n)
        self.keep(one, n)

    def become(self, one):
        n = self.rng.randint(len(one[1]) // 2, len(one[1]))
        other = one[1][:n] + self.tokenizer.encode_plain(self.text(4))
        one[0].become(other)
        self.keep(one, next((i for i, (a, b) in enumerate(zip(other, one[1])) if a != b), min(len(other), len(one[1]))))
        one[1] = other

    def fork(self, one):
        twin = one[0].fork()
        self.sessions.append([twin, list(one[1]), one[2]])
        del self.sessions[:-3]

    def run(self, n):
        for operation in self.rng.choices(["append", "append", "answer", "answer", "answer", "rewind", "fork", "become"], k=n):
            getattr(self, operation)(one := self.rng.choice(self.sessions))
            for session, ids, stored in self.sessions:  # the others as well
                assert session.ids == ids and min(session.cache.filled[0], len(ids)) == stored
            one[0].text
        for one in self.sessions:
            self.append(one)
            self.answer(one)
        return self


CASES = int(os.environ.get("MINDECODE_CASES", 40))


def test_in_random_dialogues_each_turn_computes_its_own_and_forks_do_not_see_each_other():
    """MINDECODE_CASES=1000 for a long run."""
    done = [Dialogue(seed).run(40) for seed in range(CASES)]
    assert max(one.worst for one in done) <= 1e-10
    assert sum(one.compared for one in done) > 20 * CASES and sum(one.cut for one in done) > CASES
    assert sum(one.refused for one in done) > CASES / 4 and sum(one.tails for one in done) > CASES / 4


@pytest.mark.parametrize("pattern", ["local:8", "sinks:2,4", "fixed:4,1"])
def test_where_a_pattern_has_evicted_what_is_needed_a_conversation_starts_afresh(pattern):
    done = [Dialogue(seed, pattern=pattern).run(25) for seed in range(CASES // 4)]
    assert max(one.worst for one in done) <= 1e-10
    assert sum(one.afresh for one in done) > 2 and sum(one.kept for one in done) > 2


def test_an_answer_is_what_generate_says_to_the_same_ids():
    tokenizer = TOKENIZERS["bpe"]
    model = small(5, tokenizer)
    session = Session(model, tokenizer)
    session.append("né ")
    begun = list(session.ids)
    for choice in ({}, dict(temperature=1.0, seed=4, top_k=9), dict(ignore_eos=True)):
        [row] = generate.generate(model, [begun], 20, **choice)
        session.become(begun)
        assert "".join(session.answer(20, **choice)) == tokenizer.decode(row)
        assert session.ids == begun + row and session.text == "né " + tokenizer.decode(row)


def test_an_answer_that_failed_may_be_asked_for_again():
    tokenizer = TOKENIZERS["byte"]
    model = small(1, tokenizer)
    session, other = Session(model, tokenizer), Session(model, tokenizer)
    for one in (session, other):
        one.append("abc")
        next(one.answer(5))
    handle = model.ln_f.register_forward_hook(lambda module, args, out: out * torch.nan)
    with pytest.raises(NonFiniteError):
        next(session.answer(5))
    handle.remove()
    assert session.ids == other.ids
    assert "".join(session.answer(9)) == "".join(other.answer(9)) and session.ids == other.ids


@pytest.mark.parametrize("make, words", [
    (lambda s: s.answer(0), "max_new_tokens=0"), (lambda s: s.answer(3, temperature=-1), "temperature=-1"),
    (lambda s: s.answer(3, [""]), "stop ''"), (lambda s: s.rewind(-1), "cannot rewind to -1"),
    (lambda s: s.rewind(4), "rewind to 4: choose from 0 to 3"), (lambda s: s.become([1, 999]) or s.answer(1), "id 999"),
    (lambda s: s.become([1] * 60) or s.answer(1), "60 tokens fill the 60 .*begin"),
    (lambda s: Session(s.model, s.tokenizer, 61), "length=61 .*block_size=60"), (lambda s: Session(s.model, s.tokenizer, 0), "length=0"),
    (lambda s: Session(BART(BARTConfig(n_encoder_layer=1, n_decoder_layer=1, n_head=1, n_embd=4, vocab_size=9)), None), "a BART reads")])
def test_what_a_conversation_refuses_is_refused_before_anything_is_computed(make, words):
    session = Session(small(1, TOKENIZERS["byte"]), TOKENIZERS["byte"])
    session.append("abc")
    with count(session.model) as cost, pytest.raises(UserError, match=words):
        make(session)
    assert cost.steps == 0


def test_a_conversation_may_fill_its_context_and_goes_on_after_a_rewind():
    session = Session(small(1, TOKENIZERS["byte"]), TOKENIZERS["byte"], length=12)
    session.append("abc")
    "".join(session.answer(100, ignore_eos=True))
    assert len(session.ids) == 12
    with pytest.raises(UserError, match="12 tokens fill the 12"):
        session.answer(1)
    session.rewind(10)
    "".join(session.answer(100, ignore_eos=True))
    assert len(session.ids) == 12


# -----------------------------------------------------------------------------
# --chat


def chat(tiny, said, *args):
    return call(generate.main, "--model", tiny.path, "--chat", *args, stdin=said.encode())


def test_every_line_is_answered_and_enters_once(tiny_gpt):
    said = "the\ncat é\n\nlast, without an end"
    outcome = chat(tiny_gpt, said, "--max-new-tokens", 7, "--stop", "\n", "--stats")
    session, expected = Session(tiny_gpt.model, tiny_gpt.tokenizer), ""
    for line in said.split("\n"):
        session.append(line + "\n")
        expected += "".join(session.answer(7, ["\n"])) + "\n"
        session.append("\n")
    assert (outcome.code, outcome.out) == (0, expected)
    told = [list(map(int, re.findall(r"\d+", line))) for line in outcome.err.splitlines()]
    assert len(told) == 4 and told[-1][2:] == [len(session.ids), 64]
    for before, (entered, new, taken, _), line in zip([[0] * 4, *told], told, said.split("\n")):
        own = len(line.encode()) + 1 + (before[2] > 0)  # its line end, and that behind the answer before
        assert own <= entered - (new - 1) <= own + 1  # and an answer's last id, if no stop took it away
    assert chat(tiny_gpt, said, "--max-new-tokens", 7, "--stop", "\n", "--no-stream").out == expected


def test_a_chat_may_begin_with_a_text_and_draws_by_its_seed(tiny_gpt):
    args = "--prompt", "the dog said: ", "--max-new-tokens", 9, "--temperature", 1, "--seed", 3
    outcome = chat(tiny_gpt, "ran\n", *args)
    text = call(generate.main, "--model", tiny_gpt.path, "--prompt", "the dog said: ran\n", *args[2:])
    assert outcome.out == text.out.replace("ran\n", "") and outcome.code == 0
    assert chat(tiny_gpt, "", *args).out == "the dog said: " and chat(tiny_gpt, "").out == ""


def test_a_full_context_is_refused_by_name(tiny_gpt):
    outcome = chat(tiny_gpt, "the\n" + 60 * "x" + "\n", "--max-new-tokens", 5)
    assert (outcome.code, outcome.err.count("\n")) == (2, 1) and re.search(r"\d+ tokens fill the 64 .*begin", outcome.err)
    assert outcome.out.endswith("\n")  # the first line was answered


@pytest.mark.parametrize("args, words", [
    ("-", "-"), ("--prompt-file -", "--prompt-file"), ("--num-samples 2 --temperature 1", "--num-samples 2"), ("--json", "--json"),
    ("--strategy naive", "--strategy naive"), ("--decoder-prompt a", "--decoder-prompt"), ("--max-new-tokens 0", "max_new_tokens=0"),
    ("--max-new-tokens 99", "max_new_tokens=99"), ("--temperature -1", "temperature=-1"), ("--top-k 3", "--top-k"),
    ("--prompt=", "empty"), (f"--prompt {'x' * 64}", "block_size=64"), ("--stop=", "--stop"), ("--beams 2", "--beams")])
def test_a_chat_that_makes_no_sense_is_refused_before_a_line_is_read(tiny_gpt, args, words):
    outcome = chat(tiny_gpt, "the\n", *args.split())
    assert (outcome.code, outcome.out, outcome.err.count("\n")) == (2, "", 1) and words in outcome.err, outcome


def test_what_cannot_be_chatted_with_is_refused(tiny_gpt, tiny_bart):
    outcome = chat(tiny_bart, "abc\n")
    assert (outcome.code, outcome.out) == (2, "") and "a BART reads" in outcome.err
    outcome = call(generate.main, "--model", tiny_gpt.path, "--chat", stdin=b"the\ncaf\xe9\n")
    assert outcome.code == 2 and "offset 3" in outcome.err
    closed = finish(shell("generate.py", "--model", tiny_gpt.path, "--chat", "--prompt", "the", preexec_fn=lambda: os.close(0)))
    assert (closed.code, closed.out) == (2, "") and "standard input" in closed.err


def test_a_person_is_asked_for_lines_and_may_leave_with_control_c(tiny_gpt):
    here, there = os.openpty()
    process = shell("generate.py", "--model", tiny_gpt.path, "--chat", "--max-new-tokens", 3, stdin=there)
    os.close(there)
    assert process.stderr.read(2) == b"> "
    os.write(here, b"the\n")
    assert process.stdout.read(3) and process.stderr.read(2) == b"> "  # it is answered, and the next may be said
    process.send_signal(signal.SIGINT)
    outcome = finish(process)
    os.close(here)
    assert (outcome.code, outcome.err) == (130, "interrupted\n")


def test_a_character_whose_end_a_stop_cuts_from_its_token_is_kept_whole():
    """Tokens e4, bd, a0 e5, a5 bd: the stop begins inside the third, which also ends the first character."""
    tokenizer = copy.copy(TOKENIZERS["byte"])
    tokenizer.tokens = [b"\xe4", b"\xbd", b"\xa0\xe5", b"\xa5\xbd", *tokenizer.tokens[4:]]
    session = Session(small(0, tokenizer), tokenizer)
    session.ids = [9]
    script = iter([0, 1, 2, 3])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generate.Chooser, "__call__", lambda self, logits, rows, which: [[next(script)]])
        assert "".join(session.answer(10, stops=["\u597d"])) == "\u4f60"
    assert (session.ids, session.tail) == ([9], "\u4f60".encode())


def test_a_chat_cannot_promise_a_least_length(tiny_gpt, tmp_path):
    save_pretrained(tmp_path, tiny_gpt.model, tiny_gpt.tokenizer)
    (tmp_path / "generation_config.json").write_text('{"min_new_tokens": 6}')
    outcome = call(generate.main, "--model", tmp_path, "--chat", stdin=b"a\n")
    assert outcome.code == 2 and outcome.out == "" and "min_new_tokens=6" in outcome.err
