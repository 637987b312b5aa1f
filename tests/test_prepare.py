"""Promises about prepared texts: the ids are those of the texts, a kill costs little, what nobody needs is not read."""

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate
from pathlib import Path

import numpy as np
import pytest
import regex
import tiktoken
import torch
from conftest import GPT_TOML, ROOT, call, train_run
from hypothesis import given, settings
from hypothesis import strategies as st
from test_tokenizers import TEXT, UGLY, gpt2_directory

import bench
import train
from plumbing import data, prepare, prepare_bench
from plumbing.data import DataConfig, TextData, load_data
from plumbing.errors import UserError
from plumbing.prepare import PIECES, TOKENS, Pieces, Prepared, in_order, sources
from plumbing.tokenizers import END, WORDS, load_tokenizer, train_tokenizer

ASCII = "".join(f"{n} the cat sat.\n{'  ' * (n % 5)}on {n * n}\n" for n in range(400))


@pytest.fixture(autouse=True)
def fsync(monkeypatch):
    """The disk is not waited for, thousands of times: nobody cuts the power here."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


@pytest.fixture
def texts(tmp_path):
    """A directory of texts, in which every kind of file comes, and what its documents are."""
    folder = tmp_path / "texts"
    (folder / "b").mkdir(parents=True)
    documents = [ASCII, TEXT * 9, "tiny", "", f"says {END}", "half \ud83d a pair", "\n\n x \n", UGLY[-1], ASCII[:700]]
    (folder / "a.txt").write_text(documents[0])
    (folder / "b" / "1.md").write_text(documents[1], newline="")
    (folder / "c.jsonl").write_text("".join(json.dumps({"text": text, "id": 3}) + "\n" for text in documents[2:-1]))
    (folder / "d.py").write_text("")  # nothing: no document
    (folder / "e.txt").write_text(documents[-1])
    (folder / "f.bin").write_bytes(b"\xff")
    return folder, documents


def made(out, paths, tokenizer="byte", vocab_size=300, workers=2, piece=500):
    paths = paths if isinstance(paths, list) else [paths]
    return prepare.prepare(str(out), [str(path) for path in paths], str(tokenizer), vocab_size, workers, piece)


def joined(tokenizer, documents):
    """The ids that documents should have."""
    between = tokenizer.encode_plain("\n") if tokenizer.eos_id is None else [tokenizer.eos_id]
    ids = [id for text in documents for id in [*between, *tokenizer.encode_plain(text)]]
    return ids[len(between):]


# -----------------------------------------------------------------------------
# The ids


@pytest.mark.parametrize("kind", ["byte", "bpe", "gpt2"])
@pytest.mark.parametrize("piece", [64, 500, 10**6])
def test_the_ids_are_those_of_the_documents_wherever_they_are_cut(texts, tmp_path, kind, piece):
    folder, documents = texts
    if kind == "gpt2":
        (tmp_path / "gpt2").mkdir()
        kind = gpt2_directory(tmp_path / "gpt2")
    found = made(tmp_path / "out", folder, kind, piece=piece)
    assert found.ids.tolist() == joined(found.tokenizer, documents) and found.ids.dtype == np.uint16
    assert found.characters == sum(map(len, documents))
    assert len(found.lines) == len(Pieces(sources([folder]), piece)) and (piece > 500 or len(found.lines) > 20)


def test_a_char_vocabulary_is_that_of_all_files_and_a_line_end_stands_between_them(tmp_path):
    for name, text in {"a": "ab", "b": "é x", "c": "z" * 9}.items():
        (tmp_path / f"{name}.txt").write_text(text)
    found = made(tmp_path.parent / f"{tmp_path.name}-out", tmp_path, "char", piece=3)
    assert found.tokenizer.decode(found.ids.tolist()) == "ab\né x\nzzzzzzzzz" == data.read_source(str(tmp_path))
    assert found.characters == len(found.ids) == 16


@settings(deadline=None, derandomize=True, max_examples=150)
@given(parts=st.lists(st.sampled_from([*UGLY, *" \na1éか、你\u3000\u2003\xa0\x85", "  ", "'s"]), max_size=12),
       at=st.integers(0, 40))
def test_a_cut_changes_no_id(tmp_path_factory, parts, at):
    text, tokenizer = "".join(parts), train_tokenizer("bpe", TEXT, 400)
    path = tmp_path_factory.mktemp("cut") / "a.txt"
    path.write_text(text, newline="")
    size = path.stat().st_size
    with open(path, "rb") as file:
        cut = prepare.place(str(path), file, size, min(at, size))
    first, rest = (part.decode() for part in (text.encode()[:cut], text.encode()[cut:]))
    assert tokenizer.encode_plain(first) + tokenizer.encode_plain(rest) == tokenizer.encode_plain(text)


def test_words_are_those_of_tiktokens_own_pattern():
    from tiktoken_ext.openai_public import r50k_pat_str
    for text in UGLY:
        assert regex.findall(WORDS, text) == regex.findall(r50k_pat_str, text)
    tokenizer = train_tokenizer("bpe", TEXT, 400)
    ranks = tokenizer.bpe._mergeable_ranks
    theirs = tiktoken.Encoding("theirs", pat_str=r50k_pat_str, special_tokens={}, mergeable_ranks=ranks)
    for text in [*UGLY, "".join(UGLY), ASCII, "a" + " " * 700 + "\n" * 700]:
        assert tokenizer.encode_plain(text) == tokenizer.table[theirs.encode_ordinary(text)].tolist()


def test_ids_take_four_bytes_where_two_are_too_few(tmp_path):
    text = "".join(map(chr, [*range(1, 0xd800), *range(0xe000, 0x12000)]))
    (tmp_path / "a.txt").write_text(text, newline="")
    found = made(tmp_path / "out", tmp_path / "a.txt", "char", piece=10**6)
    assert found.tokenizer.n_vocab == len(text) > 2**16 and found.ids.dtype == np.uint32
    assert found.tokenizer.decode(found.ids.tolist()) == text


# -----------------------------------------------------------------------------
# Batches


def in_memory(text, tokenizer, val_fraction=0.1):
    """Where one id is one character, a cut between characters is one between ids."""
    cut = int(len(text) * (1 - val_fraction))
    return TextData("it", text[:cut], text[cut:], tokenizer, 1337)


@pytest.mark.parametrize("kept", [data.KEPT, 4])
def test_a_prepared_text_gives_the_batches_of_the_text_itself(tmp_path, monkeypatch, kept):
    monkeypatch.setattr(data, "KEPT", kept)
    (tmp_path / "a.txt").write_text(ASCII)
    made(tmp_path / "out", tmp_path / "a.txt")
    found, tokenizer = load_data(DataConfig(str(tmp_path / "out"), tokenizer="bpe"), seq2seq=False)
    text, byte = load_data(DataConfig(str(tmp_path / "a.txt"), tokenizer="byte"), seq2seq=False)
    assert tokenizer.tokens == byte.tokens and found.chars_per_token == text.chars_per_token == 1
    shape = dict(batch_size=6, block_size=32)
    for step in [*range(8), 10**6]:
        (ours,), labels = found.batch_at(step, **shape)
        (theirs,), same = text.batch_at(step, **shape)
        assert ours.dtype == labels.dtype == torch.int64 and torch.equal(ours, theirs) and torch.equal(labels, same)
    held_out = [list(one.val_batches(**shape)) for one in (found, text)]
    assert len(held_out[0]) == len(held_out[1]) > 3
    assert all(torch.equal(a, b) and torch.equal(x, y) for ((a,), x), ((b,), y) in zip(*held_out))


def test_characters_are_counted_from_any_id_on(texts, tmp_path):
    found = made(tmp_path / "out", texts[0], "bpe", piece=200)
    sizes = [len(found.tokenizer.token_bytes(id).decode(errors="ignore")) for id in found.ids.tolist()]
    after = list(accumulate(prepare.characters(found.tokenizer)[found.ids][::-1]))[::-1]
    assert after[0] == found.characters >= sum(sizes)
    for start in [0, 1, 700, *range(len(found.ids) - 300, len(found.ids))]:
        assert found.characters_from(start) == after[start]


def test_held_out_batches_ask_for_no_more_than_they_give(tmp_path):
    (tmp_path / "a.txt").write_text(ASCII)
    made(tmp_path / "out", tmp_path / "a.txt")
    found, _ = load_data(DataConfig(str(tmp_path / "out"), val_fraction=0.9), seq2seq=False)
    asked = []

    class Asked(data.Mapped):
        def __getitem__(self, at):
            got = super().__getitem__(at)
            asked.append(got.numel())
            return got

    found.train, found.val = Asked(found.train.ids), Asked(found.val.ids)
    assert asked == []
    next(found.val_batches(4, 16))
    assert asked == [1, 64]
    found.batch_at(0, batch_size=4, block_size=16)
    assert asked == [1, 64, 64, 64]


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 63, 64, 65, 1000, 4097])
def test_an_order_that_is_computed_is_a_permutation_and_a_function_of_its_key(n):
    x = torch.arange(n)
    order = data.scatter(x, n, 5, 0, 1)
    assert sorted(order.tolist()) == x.tolist() == torch.arange(n).tolist()
    assert torch.equal(order, torch.cat([data.scatter(part, n, 5, 0, 1) for part in x.split(7)]))
    if n > 10:
        for other in (x, data.scatter(x, n, 5, 0, 2), data.scatter(x, n, 6, 0, 1)):
            assert (order == other).double().mean() < 0.1


def test_an_order_that_is_computed_looks_like_chance():
    """Of a hundred million, what comes early is spread evenly, and neighbours have nothing in common."""
    n = 10**8 + 7
    where = data.scatter(torch.arange(20_000), n, 0, 0, 0).double() / n
    assert len(where.unique()) == 20_000 and where.max() < 1
    counts = torch.histc(where, 20, 0, 1)
    assert ((counts - 1000) ** 2 / 1000).sum() < 43.8  # chi-square of 19 degrees: once in a thousand
    for lag in (1, 2, 3, 16, 64, 1024):
        assert torch.corrcoef(torch.stack([where[:-lag], where[lag:]]))[0, 1].abs() < 0.025


def test_an_epoch_of_very_many_visits_every_item_once_and_keeps_no_list(monkeypatch):
    monkeypatch.setattr(data, "KEPT", 4)
    monkeypatch.setattr(data.torch, "randperm", None)  # which is not called
    items = torch.cat([data.visit(10, 3, step, 5) for step in range(20)]).tolist()
    epochs = [items[i:i + 10] for i in range(0, 60, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs) and len(set(map(str, epochs))) > 1
    assert data.visit(2**50, 4, 2**40, 5).max() > 2**40


def test_the_order_of_what_earlier_checkpoints_saw_has_not_changed():
    assert data.visit(10, 8, 1, 1337).tolist() == [0, 1, 7, 9, 6, 2, 3, 5]
    assert data.visit(3, 8, 0, 1).tolist() == [0, 2, 1, 2, 0, 1, 0, 1] and data.KEPT >= 2**22


def test_a_training_on_a_prepared_text_is_that_on_the_text_and_resumes(tmp_path):
    train_run(tmp_path, GPT_TOML, "--train.steps=2", "--train.eval_every=1")  # also writes text.txt
    (tmp_path / "text.txt").write_text(ASCII)
    made(tmp_path / "ids", tmp_path / "text.txt")
    logs = []
    for name, source in {"one": "text.txt", "two": "ids"}.items():
        args = (tmp_path / "config.toml", f"--data.source={tmp_path / source}", f"--train.out_dir={tmp_path / name}",
                "--train.eval_every=2", "--train.log_every=1")
        assert call(train.main, *args, "--train.steps=2").code == 0
        assert call(train.main, *args, "--train.steps=4", "--train.resume=true").code == 0
        lines = map(json.loads, (tmp_path / name / "log.jsonl").read_text().splitlines())
        logs.append([[line.get(key) for key in ("step", "loss", "val_loss", "nats_per_character")] for line in lines])
    assert logs[0] == logs[1] and len(logs[0]) == 6
    with open(tmp_path / "text.txt", "a") as file:
        file.write("more")
    made(tmp_path / "more", tmp_path / "text.txt")
    (tmp_path / "ids").rename(tmp_path / "old")
    (tmp_path / "more").rename(tmp_path / "ids")
    outcome = call(train.main, *args, "--train.steps=6", "--train.resume=true")
    assert outcome.code == 2 and "text.sha256 is" in outcome.err


# -----------------------------------------------------------------------------
# What was begun goes on


def whole(out):
    return (Path(out) / TOKENS).read_bytes(), (Path(out) / PIECES).read_text()


@pytest.mark.parametrize("fails", range(1, 12, 2))
def test_a_run_that_failed_anywhere_goes_on_to_the_same_end(texts, tmp_path, monkeypatch, fails):
    """As on a full disk. Odd calls of fsync are for ids, without their line then, and even ones for lines."""
    made(tmp_path / "want", texts[0], "bpe")
    calls = []

    def full(handle):
        calls.append(handle)
        if len(calls) in (fails, fails + 3):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    for _ in range(2):
        with pytest.raises(OSError):
            made(tmp_path / "out", texts[0], "bpe")
        with pytest.raises(UserError, match=r"has \d+ of \d+ pieces; run python -m plumbing.prepare again"):
            load_data(DataConfig(str(tmp_path / "out")), seq2seq=False)
    first = len(calls)
    made(tmp_path / "out", texts[0], "bpe")
    assert whole(tmp_path / "out") == whole(tmp_path / "want")
    assert len(calls) - first < 2 * len(whole(tmp_path / "want")[1].splitlines())  # it did not begin again


@pytest.mark.parametrize("after", [0, 1, 20])
def test_a_run_that_was_killed_goes_on_to_the_same_end(tmp_path, after):
    (tmp_path / "a.txt").write_text(ASCII)
    made(tmp_path / "want", tmp_path / "a.txt", piece=200)
    code = "import sys; from plumbing.prepare import prepare; prepare(sys.argv[1], sys.argv[2:], 'byte', 300, 2, 200)"
    process = subprocess.Popen([sys.executable, "-c", code, tmp_path / "out", tmp_path / "a.txt"], cwd=ROOT)
    lines = tmp_path / "out" / PIECES
    while process.poll() is None and (not lines.exists() or lines.read_text().count("\n") < after):
        time.sleep(0.001)
    process.kill()
    assert process.wait() == -signal.SIGKILL, "it was done before it could be killed"
    made(tmp_path / "out", tmp_path / "a.txt", piece=200)
    assert whole(tmp_path / "out") == whole(tmp_path / "want")


@pytest.mark.parametrize("torn", ["7 7 0123", "7 7 é", "\0" * 9])
def test_ids_and_lines_that_a_kill_left_unfinished_are_cut_off(texts, tmp_path, torn):
    made(tmp_path / "out", texts[0])
    want = whole(tmp_path / "out")
    lines = want[1].splitlines(keepends=True)
    (tmp_path / "out" / PIECES).write_text("".join(lines[:5]) + torn)
    with open(tmp_path / "out" / TOKENS, "ab") as file:
        file.write(b"more")
    made(tmp_path / "out", texts[0])
    assert whole(tmp_path / "out") == want


def test_a_directory_is_there_with_all_that_it_needs_or_not_at_all(texts, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", lambda *args: exec("raise KeyboardInterrupt"))
        with pytest.raises(KeyboardInterrupt):
            made(tmp_path / "out", texts[0], "bpe")
    assert not (tmp_path / "out").exists()
    made(tmp_path / "out", texts[0], "bpe")
    assert not list(tmp_path.glob(".tmp*"))


def test_what_is_finished_is_left_alone(texts, tmp_path, monkeypatch):
    made(tmp_path / "out", texts[0])
    monkeypatch.setattr(prepare, "append", None)
    assert len(made(tmp_path / "out", texts[0]).ids) > 1000


def changed(folder, name, write):
    (folder / name).write_text(write)


@pytest.mark.parametrize("change, words", [
    (lambda f: changed(f, "a.txt", ASCII + "x"), "a.txt is "),
    (lambda f: os.utime(f / "a.txt", ns=(1, 1)), "a.txt is "),
    (lambda f: changed(f, "g.txt", "new"), "was begun with "),
    (lambda f: (f / "e.txt").unlink(), "was begun with "),
    (lambda f: changed(f, "e.txt", ""), "was begun with "),
    (lambda f: changed(f, "0.txt", "new"), "0.txt is "),
])
def test_texts_that_have_changed_are_refused(texts, tmp_path, change, words):
    made(tmp_path / "out", texts[0])
    want = whole(tmp_path / "out")
    change(texts[0])
    with pytest.raises(UserError) as caught:
        made(tmp_path / "out", texts[0])
    assert words in str(caught.value) and "to begin again" in str(caught.value) and whole(tmp_path / "out") == want


def test_one_more_small_file_is_refused_although_the_pieces_are_as_many(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "b.txt").write_text("b")
    made(tmp_path / "out", tmp_path / "a.txt")
    with pytest.raises(UserError, match="was begun with files 1, not 2"):
        made(tmp_path / "out", [tmp_path / "a.txt", tmp_path / "b.txt"])


def test_another_tokenizer_is_refused(texts, tmp_path):
    made(tmp_path / "out", texts[0], "bpe")
    for kind, size in (("byte", 300), ("bpe", 301)):
        with pytest.raises(UserError, match=f"was begun with tokenizer 'bpe of 300', not '{kind}"):
            made(tmp_path / "out", texts[0], kind, size)
    for name, merges in (("one", "abc"), ("two", "abd")):
        (tmp_path / name).mkdir()
        train_tokenizer("char", merges + ASCII + "\n").save(tmp_path / name)
    (texts[0] / "c.jsonl").unlink()
    (texts[0] / "b" / "1.md").unlink()
    made(tmp_path / "chars", texts[0], tmp_path / "one")
    made(tmp_path / "chars", texts[0], tmp_path / "one")
    with pytest.raises(UserError, match="was begun with tokenizer '"):
        made(tmp_path / "chars", texts[0], tmp_path / "two")


def test_a_directory_is_written_by_one_process_at_a_time(texts, tmp_path):
    made(tmp_path / "out", texts[0])
    with prepare.locked(tmp_path / "out"), pytest.raises(UserError, match="another process is writing"):
        made(tmp_path / "out", texts[0])
    made(tmp_path / "out", texts[0])


# -----------------------------------------------------------------------------
# Memory


def test_no_more_results_are_in_the_making_than_asked_for():
    begun, taken = [], []
    with ThreadPoolExecutor(8) as pool:
        for n, result in enumerate(in_order(pool, lambda k: begun.append(k) or k * k, range(50), 5)):
            taken.append(result)
            time.sleep(0.002)
            assert len(begun) <= n + 5
    assert taken == [k * k for k in range(50)]


def test_a_piece_is_hardly_longer_than_was_asked_for(tmp_path):
    (tmp_path / "a.txt").write_text(ASCII)
    (tmp_path / "b.jsonl").write_text('{"text": "0123456789"}\n' * 300)
    pieces = Pieces(sources([tmp_path]), 100)
    sizes = [sum(len(text) for _, text in pieces.texts(k)) for k in range(len(pieces))]
    assert max(sizes) < 130 and sum(sizes) == len(ASCII) + 3000


@pytest.mark.parametrize("name, text", [("a.txt", "word " * 9 + "x" * 10**6),
                                        ("a.jsonl", '{"text": "' + "x " * 10**6 + '"}')], ids=["text", "jsonl"])
def test_what_cannot_be_cut_is_refused_before_it_fills_the_memory(tmp_path, monkeypatch, name, text):
    (tmp_path / name).write_text(text)
    assert len(made(tmp_path / "out", tmp_path / name, piece=10**6).ids) > 10**6
    monkeypatch.setattr(prepare, "FAR", 2**16)
    with pytest.raises(UserError, match=f"{name} has no .* in 65,536 bytes from byte"):
        made(tmp_path / "other", tmp_path / name, piece=10**5)


def test_a_training_begins_with_more_ids_than_there_is_memory(tmp_path):
    """A file with a hole: reading a hundredth of it would take longer than anybody waits for a test."""
    (tmp_path / "a.txt").write_text(ASCII)
    made(tmp_path / "out", tmp_path / "a.txt", piece=10**6)
    n, manifest = 2**23, tmp_path / "out" / "prepared.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"pieces": 4096}))
    (tmp_path / "out" / PIECES).write_text(f"{n} {n} {'0' * 64}\n" * 4096)
    os.truncate(tmp_path / "out" / TOKENS, 4096 * n * 2)
    found, _ = load_data(DataConfig(str(tmp_path / "out"), val_fraction=0.001), seq2seq=False)
    assert found.identity["tokens"] == 2**35 and found.chars_per_token == pytest.approx(1)
    (idx,), _ = found.batch_at(0, batch_size=4, block_size=64)
    assert idx.shape == (4, 64)
    assert next(found.val_batches(4, 64))[1].shape == (4, 64)


# -----------------------------------------------------------------------------
# Mistakes


@pytest.mark.parametrize("line, words", [
    ('{"txt": "a"}', "'text' is None; it must be a text"),
    ('{"text": 3}', "'text' is 3; it must be a text"),
    ('{"text": "a"', "it is not valid JSON"),
    ("", "it is not valid JSON"),
    ('["text"]', "it holds a JSON list, not an object"),
    ('{"text": "a", "text": "b"}', "it holds the key 'text' twice"),
    (b'{"text": "\xff"}', "it is not UTF-8: byte 0xff at offset 10"),
])
@pytest.mark.parametrize("piece", [64, 10**6])
def test_a_line_that_is_no_document_is_named_with_its_file(tmp_path, line, words, piece):
    path, good = tmp_path / "own.jsonl", b'{"text": "a text"}\n'
    path.write_bytes(good * 40 + (line if isinstance(line, bytes) else line.encode()) + b"\n" + good * 3)
    with pytest.raises(UserError) as caught:
        made(tmp_path / "out", path, piece=piece)
    assert str(caught.value).startswith(f"{path}, line 41: {words}") and "\n" not in str(caught.value)


def test_a_text_that_is_not_utf_8_is_named_with_its_place(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"word " * 100 + b"\xff")
    with pytest.raises(UserError, match=r"a.txt from byte 484 on is not UTF-8: byte 0xff at offset 16"):
        made(tmp_path / "out", tmp_path / "a.txt", piece=160)


def cli(*args):
    return call(prepare.main, *args)


def test_the_command_line_says_what_was_made_and_train_takes_it(texts, tmp_path):
    done = cli(tmp_path / "out", texts[0], "--tokenizer=bpe", "--vocab_size=300", "--workers=1")
    assert done.code == 0 and " ids of 300, 2 bytes each, " in done.out
    assert done.out.endswith(f" characters an id, in {tmp_path / 'out'}\n")
    (tmp_path / "config.toml").write_text(GPT_TOML.replace("{source}", str(tmp_path / "out")))
    args = (tmp_path / "config.toml", f"--train.out_dir={tmp_path / 'run'}", "--train.steps=2")
    assert call(train.main, *args).code == 0
    assert load_tokenizer(tmp_path / "run" / "step-00000002").tokens == load_tokenizer(tmp_path / "out").tokens


@pytest.mark.parametrize("args, words", [
    (["nowhere.txt"], "cannot read nowhere.txt"),
    (["/dev/null"], "/dev/null is not a regular file"),
    (["{}/bare"], "holds no .txt, .md, .py, .jsonl file"),
    (["{}/empty.txt"], "there is nothing in"),
    (["{}/a.text", "--tokenizer=word"], "the tokenizer 'word' is none; choose byte"),
    (["{}/a.text", "--tokenizer={}/bare"], "is none; choose byte"),
    (["{}/a.text", "--tokenizer={}/bart"], "is a BART; choose byte"),
    (["{}/a.text", "--tokenizer=bpe", "--vocab-size=10"], "vocab_size is 10; a bpe needs 257"),
    (["{}/a.text", "--workers=0"], "--workers 0 must be from 1 to 1024"),
    (["{}/a.text", "--workers=1_0"], "invalid whole number value"),
    (["{}/a.text", "--piece=10"], "unrecognized arguments: --piece=10"),
    ([], "the following arguments are required: PATH"),
])
def test_mistakes_are_told_in_one_line_and_nothing_is_written(tmp_path, args, words):
    for name in ("bare", "bart"):
        (tmp_path / name).mkdir()
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "a.text").write_text(ASCII)
    train_tokenizer("byte", "", seq2seq=True).save(tmp_path / "bart")
    done = cli(tmp_path / "out", *(arg.replace("{}", str(tmp_path)) for arg in args))
    assert done.code == 2 and words in done.err and done.err.count("\n") == 1 and not done.out
    assert not (tmp_path / "out").exists()


def test_a_directory_with_something_else_and_one_among_the_texts_are_refused(texts, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("all of it")
    done = cli(tmp_path / "mine", texts[0], "--tokenizer=byte")
    assert done.code == 2 and "holds something else" in done.err
    done = cli(texts[0] / "ids", texts[0], "--tokenizer=byte")
    assert done.code == 2 and "would be read as a part of it" in done.err
    assert os.listdir(tmp_path / "mine") == ["thesis.tex"] and not (texts[0] / "ids").exists()


def test_what_a_training_cannot_use_is_refused(texts, tmp_path):
    out = tmp_path / "out"
    made(out, texts[0])
    for more in ({}, {"noise": "infill"}):
        with pytest.raises(UserError, match="out was prepared, for a GPT; a BART's data.source is headline"):
            load_data(DataConfig(str(out), **more), seq2seq=True)
    with pytest.raises(UserError, match="a GPT trains on a text as it is"):
        load_data(DataConfig(str(out), noise="infill"), seq2seq=False)
    with pytest.raises(UserError, match="with another tokenizer than the model's"):
        load_data(DataConfig(str(out)), seq2seq=False, tokenizer=train_tokenizer("char", "abc"))
    assert load_data(DataConfig(str(out)), seq2seq=False, tokenizer=train_tokenizer("byte", ""))
    (tmp_path / "a.txt").write_text("a")
    made(tmp_path / "one", tmp_path / "a.txt")
    with pytest.raises(UserError, match="has 1 tokens, too few to hold out 0.1"):
        load_data(DataConfig(str(tmp_path / "one")), seq2seq=False)
    with open(out / TOKENS, "ab") as file:
        file.write(b"x")
    with pytest.raises(UserError, match=r"tokens.bin has \d+,\d+ bytes, and \d+,\d+ ids of 2 should be in it"):
        Prepared(out)
    (out / "prepared.json").write_text('{"dtype": "int8", "files": []}')
    with pytest.raises(UserError, match="has no dtype or no files"):
        load_data(DataConfig(str(out)), seq2seq=False)


def test_texts_without_a_word_are_refused_in_the_end(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": ""}\n')
    with pytest.raises(UserError, match="from texts that are not empty"):
        made(tmp_path / "out", tmp_path / "a.jsonl")


# -----------------------------------------------------------------------------
# Measuring it


def test_the_bench_finds_the_same_ids_and_begins_with_a_file_of_the_size_that_was_asked_for(tmp_path, monkeypatch):
    sizes, enlarge = [], prepare_bench.enlarge
    monkeypatch.setattr(prepare_bench, "fresh", lambda function, *args: function(*args))
    monkeypatch.setattr(prepare_bench, "BLOCK", 2**22)
    monkeypatch.setattr(prepare_bench, "enlarge", lambda directory, size: (
        enlarge(directory, size), sizes.append(os.path.getsize(Path(directory, TOKENS)))))
    (tmp_path / "a.txt").write_text(ASCII)
    args = ("prepare", tmp_path / "a.txt", "--tokenizer=bpe", "--pairs=2", "--gigabytes=0.005", "--json")
    found = json.loads(call(bench.main, *args).out)
    ids = {ids for key in ("ours", "tiktoken") for *_, ids in found[key]}
    assert len(ids) == 1 and len(found["ours"]) == 2 and found["bytes"] == len(ASCII) and sizes == [2**23]
    assert "ratio" in prepare_bench.table(found) and found["starts"].keys() == {"1024", "64"}
    for wrong in ("--pairs=0", "--gigabytes=0", "--gigabytes=900000", "--tokenizer=char"):
        done = call(bench.main, *args, wrong)
        assert done.code == 2 and wrong.split("=")[0] in done.err and done.err.count("\n") == 1
