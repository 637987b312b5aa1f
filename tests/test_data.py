"""Promises about data: batches depend on nothing but (seed, step), and held out means held out."""

import contextlib
import hashlib
import os
import time
from collections import Counter
from datetime import datetime

import pytest
import torch

from plumbing import data, headlines
from plumbing.data import IGNORE, TASKS, DataConfig, PairData, TextData, load_data
from plumbing.errors import UserError
from plumbing.tokenizers import train_tokenizer

TEXT = "".join(chr(33 + n % 90) + " " * (n % 7 == 0) for n in range(1500))
SMALL = dict(n_train=300, n_val=40, vocab_size=300)


def text_data(text=TEXT, **more):
    tok = train_tokenizer("char", text)
    cut = int(len(text) * 0.9)
    return TextData("a text", text[:cut], text[cut:], tok, **{"seed": 1} | more), tok


def pair_data(source="headline", **more):
    return load_data(DataConfig(source=source, **SMALL | more), seq2seq=True)


def flat(batch):
    inputs, labels = batch
    return [*inputs, labels]


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(flat(one), flat(other), strict=True))


@pytest.mark.parametrize("make", [text_data, pair_data])
def test_a_batch_depends_only_on_seed_and_step(make):
    shape = dict(batch_size=8, block_size=400)
    one, other = make()[0], make()[0]
    torch.manual_seed(0)
    there = [one.batch_at(step, **shape) for step in range(30)]
    torch.manual_seed(1)
    back = [other.batch_at(step, **shape) for step in reversed(range(30))]
    assert all(same(a, b) for a, b in zip(there, reversed(back)))
    assert not same(there[0], make(seed=2)[0].batch_at(0, **shape))


@pytest.mark.parametrize("make", [text_data, pair_data])
def test_steps_see_different_batches(make):
    found = make()[0]
    assert len({str(found.batch_at(step, batch_size=4, block_size=400)[1].tolist()) for step in range(36)}) == 36


def test_labels_are_the_inputs_shifted_and_come_from_the_text():
    found, tok = text_data()
    train = tok.decode(found.train.tolist())
    for step in range(20):
        (idx,), labels = found.batch_at(step, batch_size=16, block_size=32)
        assert idx.shape == labels.shape == (16, 32) and idx.dtype == labels.dtype == torch.int64
        assert torch.equal(idx[:, 1:], labels[:, :-1])
        assert all(tok.decode([first, *row]) in train for first, row in zip(idx[:, 0], labels.tolist()))


def test_an_epoch_visits_every_item_once_and_the_next_in_another_order():
    for n, batch_size in [(10, 3), (7, 7), (3, 8), (1, 4)]:
        items = torch.cat([data.visit(n, batch_size, step, 5) for step in range(n * 2)]).tolist()
        epochs = [items[i:i + n] for i in range(0, len(items), n)]
        assert all(sorted(epoch) == list(range(n)) for epoch in epochs) and len(items) == 2 * n * batch_size
        assert n < 3 or len({str(epoch) for epoch in epochs}) > 1


def test_an_epoch_of_windows_reaches_the_whole_text():
    found, _ = text_data(TEXT * 2)
    found.train = torch.arange(len(found.train))  # every id tells where it was
    seen = Counter()
    for step in range(2000):
        (idx,), _ = found.batch_at(step, batch_size=8, block_size=32)
        seen.update(idx.flatten().tolist())
    assert set(seen) == set(range(len(found.train) - 1))  # the last id is only ever a label
    assert max(seen.values()) < 3 * min(seen[n] for n in range(64, 2000))


@pytest.mark.parametrize("block_size, batch_size", [(7, 3), (32, 100), (148, 1), (149, 2), (1000, 4)])
def test_validation_predicts_every_held_out_token_exactly_once(block_size, batch_size):
    found, _ = text_data()
    batches = list(found.val_batches(batch_size, block_size))
    assert all(len(labels) <= batch_size and labels.shape[1] == block_size for _, labels in batches)
    inputs = torch.cat([idx.flatten() for (idx,), _ in batches])
    labels = torch.cat([labels.flatten() for _, labels in batches])
    assert torch.equal(labels[labels != IGNORE], found.val)
    assert torch.equal(inputs[labels != IGNORE], torch.cat([found.train[-1:], found.val[:-1]]))


def test_chars_per_token_turns_nats_per_token_into_nats_per_character():
    assert text_data()[0].chars_per_token == 1
    found, tok = load_data(DataConfig(vocab_size=300), seq2seq=False)
    assert found.chars_per_token * len(found.val) == len(tok.decode(found.val.tolist()))


def test_the_text_is_split_by_characters_before_it_is_encoded(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"ab\r\n" * 100 + "é".encode() * 40)
    found, tok = load_data(DataConfig(source=str(path), tokenizer="char"), seq2seq=False)
    assert (len(found.train), len(found.val), tok.n_vocab) == (396, 44, 5)  # knows é, keeps \r
    _, bpe = load_data(DataConfig(source=str(path), vocab_size=300, val_fraction=0.2), seq2seq=False)
    assert not any("é".encode() in token for token in bpe.tokens)  # a bpe saw the training part only


def test_the_python_documentation_is_there_without_a_network():
    found, tok = load_data(DataConfig(), seq2seq=False)
    assert tok.n_vocab == 1024 and found.identity["characters"] > 300_000
    assert found.chars_per_token > 2


def test_a_directory_is_read_in_order_whatever_links_it_holds(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "1.md").write_text("second " * 20)
    (tmp_path / "a.py").write_text("first " * 20)
    (tmp_path / "c.bin").write_bytes(b"\xff")
    os.symlink(tmp_path, tmp_path / "b" / "up")
    os.symlink("self.txt", tmp_path / "self.txt")
    os.mkfifo(tmp_path / "pipe.txt")
    assert data.read_source(str(tmp_path)) == "first " * 20 + "\n" + "second " * 20


def test_identity_notices_other_data():
    one, other = text_data()[0].identity, text_data(TEXT + "a")[0].identity
    assert one == text_data()[0].identity and one["sha256"] != other["sha256"]
    assert (one["characters"], one["tokens"]) == (len(TEXT), len(TEXT))
    assert pair_data()[0].identity == pair_data()[0].identity != pair_data(seed=2)[0].identity


def test_a_given_tokenizer_is_used_instead_of_a_new_one():
    tok = train_tokenizer("byte", "")
    found, back = load_data(DataConfig(), seq2seq=False, tokenizer=tok)
    assert back is tok and len(found.train) > 350_000
    with pytest.raises(UserError, match="other family"):
        load_data(DataConfig(source="sort"), seq2seq=True, tokenizer=tok)


@pytest.mark.parametrize("task", TASKS)
def test_pairs_are_disjoint_deterministic_and_complete(task):
    found, _ = pair_data(task)
    again, _ = pair_data(task)
    assert (found.train_pairs, found.val_pairs) == (again.train_pairs, again.val_pairs)
    assert not {source for source, _ in found.train_pairs} & {source for source, _ in found.val_pairs}
    assert (len(found.train_pairs), len(found.val_pairs)) == (300, 40)


def test_training_on_a_held_out_pair_is_caught():
    tok = train_tokenizer("byte", "", seq2seq=True)
    with pytest.raises(AssertionError, match="held-out"):
        PairData("x", [("a", "b"), ("c", "d")], [("c", "e")], tok, seed=0)


def test_each_task_says_what_it_should():
    for source, target in pair_data("reverse")[0].val_pairs:
        assert source[::-1] == target and 3 <= len(source) <= 20
    for source, target in pair_data("sort", max_length=5)[0].train_pairs:
        assert "".join(sorted(source)) == target and 3 <= len(source) <= 5
    for source, target in pair_data("addition")[0].val_pairs:
        assert sum(map(int, source.split("+"))) == int(target)
    for source, target in pair_data("docstrings")[0].val_pairs:
        assert source and target and "\n" not in target
    found = dict(pair_data("dates", n_train=2000)[0].train_pairs)
    forms = Counter()
    for source, target in found.items():
        for form in ("%a %d %B %Y", "%d %b %Y", "%B %d, %Y", "%d.%m.%Y"):
            with contextlib.suppress(ValueError):
                assert datetime.strptime(source, form).date().isoformat() == target
                forms[form] += 1
    assert sum(forms.values()) == len(found) and min(forms.values()) > 400


def told(text):
    """The (company, event) pairs whose names both stand in the text."""
    return {(who, n) for who, company in enumerate(headlines.COMPANIES) if company in text
            for n, (short, ways, *_) in enumerate(headlines.EVENTS)
            if any(way in text for way in (short, *ways))}


def test_held_out_pairs_of_company_and_event_never_occur_in_training():
    found, _ = pair_data(n_train=3000, n_val=200)
    train, val = (set().union(*(told(headline) for _, headline in pairs))
                  for pairs in (found.train_pairs, found.val_pairs))
    assert val and not train & val and all(headlines.held(*pair) for pair in val)
    assert all(set(held_out) <= set(seen) for held_out, seen in zip(zip(*val), zip(*train)))
    for article, _ in found.train_pairs:  # nor side by side in one sentence of an aside
        assert not any(headlines.held(*pair) for sentence in article.split(". ") for pair in told(sentence))


def test_an_article_holds_the_facts_of_its_headline_and_others():
    found, tok = pair_data(n_train=1000, vocab_size=1024)
    for article, headline in found.train_pairs:
        rest = headline.split(" in ", 1)[1]
        place, day = rest.split(":")[0].split(" on ")
        n = rest.split(": ")[1].split()[0]
        assert all(fact in article for fact in (place, day, n)) and len(article) > 3 * len(headline)
    assert 50 <= found.train[1].float().mean() <= 120  # much longer than the headline
    distracted = [sum(place in article for place in headlines.PLACES) > 1 for article, _ in found.train_pairs]
    assert sum(distracted) > 500


def jsonl(path, n, start=0):
    path.write_text("".join(f'{{"source": "source {i}", "target": "ziel {i}", "id": {i}}}\n' for i in range(start, start + n)))
    return str(path)


def test_pairs_from_a_file_are_all_used_and_the_same_are_held_out_however_its_path_is_spelled(tmp_path, monkeypatch):
    path = jsonl(tmp_path / "own.jsonl", 30)
    found, _ = pair_data(path)
    assert (len(found.train_pairs), len(found.val_pairs)) == (27, 3)
    assert sorted(found.train_pairs + found.val_pairs) == sorted((f"source {i}", f"ziel {i}") for i in range(30))
    monkeypatch.chdir(tmp_path)
    again, _ = pair_data("own.jsonl")
    assert (again.train_pairs, again.val_pairs) == (found.train_pairs, found.val_pairs)
    assert pair_data(path, seed=2)[0].val_pairs != found.val_pairs
    few, _ = pair_data(path, n_train=5, n_val=2)
    assert (len(few.train_pairs), few.val_pairs) == (5, found.val_pairs[:2])


def test_a_directory_of_jsonl_is_read_whole_and_a_source_that_comes_twice_counts_once(tmp_path):
    (tmp_path / "b").mkdir()
    jsonl(tmp_path / "b" / "1.jsonl", 8, start=6)
    jsonl(tmp_path / "a.jsonl", 8)
    (tmp_path / "c.txt").write_text("no pairs")
    (tmp_path / "d.jsonl").write_text('{"source": "source 3", "target": "another"}')
    assert data.read_pairs(str(tmp_path)) == {f"source {i}": f"ziel {i}" for i in range(14)}
    assert pair_data(str(tmp_path))[0].val_pairs


@pytest.mark.parametrize("line, words", [
    ('{"source": "a"}', "line 2: 'target' is None; it must be a text"),
    ('{"target": "a", "Source": "b"}', "line 2: 'source' is None"),
    ('{"source": 3, "target": "a"}', "line 2: 'source' is 3"),
    ('{"source": "a", "target": ""}', "line 2: 'target' is ''"),
    ('{"source": "\\ud800", "target": "a"}', "line 2: 'source' is '\\ud800'"),
    ('{"source": "a", "source": "b", "target": "c"}', "line 2 holds the key 'source' twice"),
    ('{"source": "a", "target": "b"', "line 2 is not valid JSON"),
    ('', "line 2 is not valid JSON"),
    ('["a", "b"]', "line 2 holds a JSON list, not an object"),
    ('{"source": "b", "target": "c"}', "own.jsonl has 3 different sources, of which a tenth is held out"),
])
def test_a_line_that_is_no_pair_is_named_with_its_file(tmp_path, line, words):
    """Also a file of too few pairs."""
    path = tmp_path / "own.jsonl"
    path.write_text('{"source": "first", "target": "t"}\n' + line + '\n{"source": "last", "target": "t"}\n')
    with pytest.raises(UserError) as caught:
        load_data(DataConfig(source=str(path)), seq2seq=True)
    assert words in str(caught.value) and str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_directory_without_pairs_and_a_file_that_is_not_there_are_refused(tmp_path):
    with pytest.raises(UserError, match="holds no .jsonl file"):
        pair_data(str(tmp_path))
    with pytest.raises(UserError, match="cannot read nowhere.jsonl"):
        pair_data("nowhere.jsonl")


def test_the_decoder_reads_what_bart_reads():
    """Labels <s> ... </s>; its input is the same shifted right behind </s>, as in transformers."""
    found, tok = pair_data("reverse", tokenizer="byte")
    (source, target, lengths), labels = found.batch_at(3, batch_size=8, block_size=64)
    modeling = pytest.importorskip("transformers.models.bart.modeling_bart")
    assert torch.equal(target, modeling.shift_tokens_right(labels, tok.pad_id, tok.eos_id))
    pairs = dict(found.train_pairs)
    for row, length, want in zip(source, lengths, labels):
        text = tok.decode(row[:length].tolist())
        assert row[:length].tolist() == tok.encode(text) and set(row[length:].tolist()) <= {tok.pad_id}
        assert want[want != IGNORE].tolist() == tok.encode(pairs[text])
    assert source.shape[1] == lengths.max() and (labels[:, -1] != IGNORE).any()


def test_validation_covers_every_held_out_pair_in_order():
    found, tok = pair_data("sort")
    seen = []
    for (source, _, lengths), _ in found.val_batches(7, 64):
        seen += [tok.decode(row[:length].tolist()) for row, length in zip(source, lengths)]
    assert seen == [source for source, _ in found.val_pairs]


@pytest.mark.parametrize("content, words", [
    (b"", "0 characters"), (b"x", "1 characters, too few"), (b"ab\xff", "byte 0xff at offset 2"),
])
def test_a_text_that_cannot_be_used_is_refused(tmp_path, content, words):
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(UserError, match=words):
        load_data(DataConfig(source=str(tmp_path / "a.txt"), tokenizer="char"), seq2seq=False)


@pytest.mark.parametrize("length", [2, 16, 17])
def test_a_text_shorter_than_a_window_is_refused_and_one_window_is_enough(tmp_path, length):
    (tmp_path / "a.txt").write_text("ab" * length)
    config = DataConfig(source=str(tmp_path / "a.txt"), tokenizer="char", val_fraction=0.5)
    found, _ = load_data(config, seq2seq=False)  # `length` characters to train on
    if length < 17:
        with pytest.raises(UserError, match=f"has {length} tokens and a window of block_size 16 needs 17"):
            found.batch_at(0, batch_size=2, block_size=16)
    else:
        assert found.batch_at(5, batch_size=2, block_size=16)[1].shape == (2, 16)


@pytest.mark.parametrize("change, seq2seq, words", [
    (dict(source="nowhere.txt"), False, "'nowhere.txt', which is no file"),
    (dict(source="a\0b"), False, "no file or directory"),
    (dict(source="/dev/null"), False, "not a regular file"),
    (dict(source="headline"), False, "a GPT trains on a text"),
    (dict(source="pydoc"), True, "a BART trains on pairs and data.source is 'pydoc'; choose headline"),
    (dict(source="notes.txt"), True, "a path of .jsonl, or a data.noise"),
    (dict(tokenizer="word"), False, "choose from byte"),
    (dict(val_fraction=0.0), False, "val_fraction is 0.0"),
    (dict(val_fraction=float("nan")), False, "val_fraction is nan"),
    (dict(vocab_size=10), False, "vocab_size is 10; it must be at least 257"),
    (dict(seed=-1), False, "seed is -1"),
    (dict(source="sort", min_length=5, max_length=4), True, "max_length is 4; it must be at least 5"),
    (dict(source="sort", n_train=0), True, "n_train is 0"),
    (dict(source="reverse", min_length=1, max_length=1), True, "fewer than 340 different pairs"),
])
def test_mistakes_are_named_in_one_line(change, seq2seq, words):
    with pytest.raises(UserError) as caught:
        load_data(DataConfig(**SMALL | change), seq2seq=seq2seq)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_an_empty_directory_and_a_pair_too_long_are_refused(tmp_path):
    with pytest.raises(UserError, match="holds no .txt"):
        load_data(DataConfig(source=str(tmp_path)), seq2seq=False)
    with pytest.raises(UserError, match="block_size is 16; raise"):
        pair_data()[0].batch_at(0, batch_size=2, block_size=16)


def test_shakespeare_offline_says_what_to_do_and_a_wrong_copy_is_not_believed(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(data, "SHAKESPEARE_URL", "http://127.0.0.1:9/input.txt")  # refused at once
    cached = tmp_path / "mindecode" / "tinyshakespeare.txt"
    cached.parent.mkdir()
    cached.write_text("not Shakespeare")
    with pytest.raises(UserError, match="pass --data.source=PATH"):
        data.read_source("shakespeare")


def test_a_download_is_verified_and_kept(tmp_path, monkeypatch):
    (tmp_path / "source").write_text("To be")
    url, path = (tmp_path / "source").as_uri(), tmp_path / "cache" / "kept"
    with pytest.raises(UserError, match="sha256 differs.*do this"):
        data.fetch(url, "00", path, "do this")
    assert not path.exists()
    good = hashlib.sha256(b"To be").hexdigest()
    assert data.fetch(url, good, path, "") == b"To be" == path.read_bytes()
    (tmp_path / "source").unlink()
    assert data.fetch(url, good, path, "") == b"To be" and list(path.parent.iterdir()) == [path]


def test_a_batch_costs_well_under_a_millisecond():
    found, _ = text_data(TEXT * 300)
    found.batch_at(0, batch_size=64, block_size=64)
    began = time.perf_counter()
    for step in range(100):
        found.batch_at(step, batch_size=64, block_size=64)
    assert (time.perf_counter() - began) / 100 < 5e-3  # 0.1 ms on a quiet machine
