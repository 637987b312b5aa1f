"""Promises about text and ids: nothing is lost, nothing typed is obeyed, transformers reads what we write."""

import json
import os
import shutil
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plumbing import tokenizers
from plumbing.errors import UserError
from plumbing.files import read_json
from plumbing.tokenizers import BPETokenizer, StreamDecoder, load_tokenizer, train_tokenizer

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
KINDS = [("byte", False), ("byte", True), ("bpe", False), ("bpe", True), ("char", False), ("char", True)]
TEXT = ("The cat's 12 naïve friends sat.\r\n\tÇa va ? 日本語 é é 👩‍👩‍👧  \u3000x\u00a0y\u200b \n\n"
        "  for i in range(10):  ") * 3
UGLY = [TEXT, "", " ", "  x", "x  ", "\n\n\nx", "don't DON'T", "\x00\x1c\x85\u2028",
        "١٢٣ ½ ²", "à́̂", "\ufeffz",
        "\U0010ffff", "a<|end", "Ġthe Ċ", "   \t  end   "]
arbitrary = settings(deadline=None, derandomize=True, max_examples=60)


@pytest.fixture(scope="module")
def trained():
    return {(kind, seq2seq): train_tokenizer(kind, TEXT, 400, seq2seq) for kind, seq2seq in KINDS}


def shared(*names):
    paths = [SHARED / name for name in names]
    if missing := [str(path) for path in paths if not path.exists()]:
        pytest.skip(f"published vocabulary not here: {', '.join(missing)}")
    return paths


def gpt2_directory(path):
    """GPT-2's vocabulary in the files that OpenAI published."""
    for source in shared("gpt2/vocab.bpe", "gpt2/encoder.json"):
        os.symlink(source, path / source.name)
    return path


def bart_directory(path):
    """BART's, whose dictionary was published as lines of "<GPT-2 id> <count>", padded to a multiple of 8."""
    merges, gpt2, words = shared("gpt2/vocab.bpe", "gpt2/encoder.json", "bart/dict.txt")
    names = {str(id): name for name, id in json.loads(gpt2.read_text()).items()}
    order = [names[line.split(" ")[0]] for line in words.read_text().splitlines() if not line.startswith("madeupword")]
    vocab = ["<s>", "<pad>", "</s>", "<unk>", *order]
    vocab += [f"madeupword{n:04d}" for n in range(-len(vocab) % 8)] + ["<mask>"]
    (path / "vocab.json").write_text(json.dumps({name: id for id, name in enumerate(vocab)}))
    os.symlink(merges, path / "merges.txt")
    return path


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind[0] != "char"])
@arbitrary
@given(text=st.text())
def test_any_text_survives_encoding_and_decoding(trained, kind, text):
    assert trained[kind].decode(trained[kind].encode(text)) == text


@pytest.mark.parametrize("seq2seq", [False, True])
@arbitrary
@given(text=st.text(alphabet=sorted(set(TEXT))))
def test_a_text_of_known_characters_survives_the_char_tokenizer(trained, seq2seq, text):
    tok = trained["char", seq2seq]
    assert tok.decode(tok.encode(text)) == text and len(tok.encode(text)) == len(text) + 2 * seq2seq


@pytest.mark.parametrize("kind", KINDS)
@arbitrary
@given(data=st.data())
def test_a_stream_of_any_ids_joins_to_their_decoding(trained, kind, data):
    """Per-token decoding would print U+FFFD for every character that spans two tokens."""
    tok = trained[kind]
    ids = data.draw(st.lists(st.integers(0, tok.n_vocab - 1)))
    stream = StreamDecoder(tok)
    assert "".join([*map(stream.push, ids), stream.flush()]) == tok.decode(ids)


def test_a_stream_never_breaks_a_character(trained):
    tok = trained["byte", False]
    stream = StreamDecoder(tok)
    assert [stream.push(id) for id in tok.encode("é😀")] == ["", "é", "", "", "", "😀"]
    stream.push(tok.encode("😀")[0])
    assert stream.flush() == "\ufffd"


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_gives_the_same_ids_from_the_saved_directory(trained, kind, tmp_path):
    transformers = pytest.importorskip("transformers")
    tok = trained[kind]
    tok.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert len(theirs) == tok.n_vocab
    assert (theirs.bos_token_id, theirs.pad_token_id) == (tok.bos_id, tok.pad_id) or not kind[1]
    assert theirs.eos_token_id == tok.eos_id
    for text in UGLY:
        text = "".join(char for char in text if char in TEXT) if kind[0] == "char" else text
        assert tok.encode(text) == theirs(text)["input_ids"], text
        assert theirs.decode(tok.encode(text), skip_special_tokens=True) == text

    again = transformers.AutoTokenizer.from_pretrained(tmp_path)  # what they write loads too
    again.save_pretrained(tmp_path / "theirs")
    back = load_tokenizer(tmp_path / "theirs")
    assert [back.encode(text) for text in [TEXT, "", " "]] == [tok.encode(text) for text in [TEXT, "", " "]]
    assert (back.specials, back.n_vocab, back.eos_id) == (tok.specials, tok.n_vocab, tok.eos_id)


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_tokenizer_loads_as_it_was(trained, kind, tmp_path):
    tok = trained[kind]
    tok.save(tmp_path)
    back = load_tokenizer(tmp_path)
    assert (back.tokens, back.specials, back.encode(TEXT)) == (tok.tokens, tok.specials, tok.encode(TEXT))


@arbitrary
@given(text=st.text(alphabet="ab c"), training=st.text(alphabet="ab c", min_size=20))
def test_merges_mean_the_same_to_transformers_on_small_alphabets(text, training):
    """tiktoken joins whatever spells a known token, others only listed pairs: overlapping runs may differ."""
    backend = pytest.importorskip("tokenizers")
    tok = train_tokenizer("bpe", training, 300)
    theirs = backend.Tokenizer(backend.models.BPE(vocab=tok.vocab, merges=tok.merges))
    theirs.pre_tokenizer = backend.pre_tokenizers.ByteLevel(add_prefix_space=False)
    assert theirs.encode(text).ids == tok.encode(text)


def test_vocabulary_sizes_count_the_special_ids(trained):
    assert [train_tokenizer("bpe", TEXT, 300, seq2seq).n_vocab for seq2seq in (False, True)] == [300, 300]
    assert trained["byte", False].n_vocab == 257 and trained["byte", False].eos_id == 256
    assert trained["char", False].n_vocab == len(set(TEXT)) and trained["char", False].eos_id is None
    bart = trained["bpe", True]
    assert (bart.bos_id, bart.pad_id, bart.eos_id, bart.specials["<mask>"]) == (0, 1, 2, bart.n_vocab - 1)
    assert [id - 4 for id in bart.encode("!a")[1:-1]] == trained["byte", False].encode("!a")


def test_training_is_deterministic_and_merges_the_most_frequent_pair_first():
    merges = train_tokenizer("bpe", "ab ab ab cd cd xy", 260).merges
    assert merges == [("a", "b"), ("c", "d"), ("Ġ", "ab")]  # three times; twice, and the smaller pair; twice
    assert train_tokenizer("bpe", TEXT, 400).merges == train_tokenizer("bpe", TEXT, 400).merges
    assert train_tokenizer("bpe", "abc", 400).merges == []  # nothing occurs twice


@pytest.mark.parametrize("kind", [("bpe", False), ("bpe", True)])
def test_what_a_user_types_is_never_a_control_token(trained, kind):
    tok = trained[kind]
    for name in ["<|endoftext|>", "<s>", "</s>", "<pad>", "<mask>"]:
        assert not set(tok.encode_plain(f"a{name}b")) & set(tok.specials.values())
        assert tok.decode(tok.encode(f"a{name}b")) == f"a{name}b"


@pytest.mark.parametrize("text", ["a" * 10**6, " " * 10**6 + "x", "\n" * 10**6 + " x", "😀" * 250_000,
                                  "\u3000" * 333_333 + "."])
def test_a_megabyte_of_one_character_is_no_trouble(trained, text):
    """tiktoken's own regular expression panics on the white runs."""
    began = time.monotonic()
    assert trained["bpe", False].decode(trained["bpe", False].encode(text)) == text
    assert time.monotonic() - began < 5


def test_long_white_runs_are_cut_where_gpt2_cuts_them(trained):
    tok = trained["bpe", False]
    for tail in ["x", "\nx", "", "é  y"]:
        text = "a" + " " * 700 + tail
        whole = [tok.table[n] for n in tok.bpe.encode_ordinary(text)]
        assert tok.encode(text) == whole


def test_half_a_surrogate_pair_becomes_the_replacement_character(trained):
    tok = trained["bpe", False]
    assert tok.decode(tok.encode("a\udcffb")) == "a\ufffdb"
    with pytest.raises(UserError, match=r"udcff"):
        trained["char", False].encode("a\udcffb")
    with pytest.raises(UserError, match="surrogate"):
        train_tokenizer("char", "a\udcff")
    train_tokenizer("bpe", "a\udcffb" * 3, 300)


@pytest.mark.parametrize("act, words", [
    (lambda t: t.decode([-1]), "id -1 is not in this vocabulary"),
    (lambda t: t.decode([t.n_vocab]), "its ids are 0 to"),
    (lambda t: train_tokenizer("word", "x"), "choose from byte, char, bpe, gpt2"),
    (lambda t: train_tokenizer("bpe", "x"), "vocab_size is None"),
    (lambda t: train_tokenizer("bpe", "x", 256), "vocab_size is 256; a bpe needs 257"),
    (lambda t: train_tokenizer("bpe", "x", 260, seq2seq=True), "needs 261"),
    (lambda t: train_tokenizer("char", "abc").encode("abz"), "'z' is not one of the 3"),
])
def test_mistakes_are_named(trained, act, words):
    with pytest.raises(UserError, match=words) as caught:
        act(trained["bpe", False])
    assert "\n" not in str(caught.value)


def test_gpt2_and_bart_give_the_published_ids(tmp_path):
    (tmp_path / "gpt2").mkdir(), (tmp_path / "bart").mkdir()
    gpt2 = load_tokenizer(gpt2_directory(tmp_path / "gpt2"))
    assert gpt2.encode("The cat is") == [464, 3797, 318] and (gpt2.n_vocab, gpt2.eos_id) == (50257, 50256)
    bart = load_tokenizer(bart_directory(tmp_path / "bart"))
    assert bart.encode("Hello world") == [0, 31414, 232, 2]
    assert (bart.n_vocab, bart.specials["<mask>"], bart.pad_id) == (50265, 50264, 1)
    assert bart.decode(bart.encode(TEXT)) == TEXT == gpt2.decode(gpt2.encode(TEXT))
    transformers = pytest.importorskip("transformers")
    for tok in (gpt2, bart):
        out = tmp_path / f"out{tok.n_vocab}"
        out.mkdir()
        tok.save(out)
        theirs = transformers.AutoTokenizer.from_pretrained(out)
        assert [theirs(text)["input_ids"] for text in UGLY] == [tok.encode(text) for text in UGLY]
        assert load_tokenizer(out).tokens == tok.tokens


def test_gpt2_by_name_comes_from_tiktokens_cache(tmp_path, monkeypatch):
    source, = shared("gpt2/vocab.bpe")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    shutil.copy(source, tmp_path / "6d1cbeee0f20b3d9449abfede4726ed8212e3aee")
    assert train_tokenizer("gpt2", "").encode("The cat is") == [464, 3797, 318]
    assert train_tokenizer("gpt2", "", seq2seq=True).encode("The cat is") == [0, 468, 3801, 322, 2]


def test_gpt2_by_name_offline_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(tokenizers, "GPT2_URL", "http://127.0.0.1:9/vocab.bpe")  # refused at once
    with pytest.raises(UserError, match="vocab.json and merges.txt.*vocab.bpe.*TIKTOKEN_CACHE_DIR"):
        train_tokenizer("gpt2", "")


def test_a_directory_without_tokenizer_files_has_none(tmp_path):
    assert load_tokenizer(tmp_path) is None


def test_ids_need_not_follow_the_merges(trained, tmp_path):
    """BART's are numbered by frequency: taking an id for a rank would encode other tokens."""
    tok = trained["bpe", False]
    names = sorted(tok.vocab, reverse=True)
    mixed = BPETokenizer(tok.merges, {name: id for id, name in enumerate(names)})
    spelled = {id: name for name, id in tok.vocab.items()}
    assert [names[id] for id in mixed.encode(TEXT)] == [spelled[id] for id in tok.encode(TEXT)]


def hostile_vocab(change):
    def write(path):
        vocab = json.loads((path / "vocab.json").read_text())
        (path / "vocab.json").write_text(json.dumps(change(vocab)))
    return write


def replace_text(name, text):
    def write(path):
        (path / name).unlink()
        (path / name).write_bytes(text)
    return write


def fifo(path):
    (path / "vocab.json").unlink()
    os.mkfifo(path / "vocab.json")


def loop(path):
    (path / "merges.txt").unlink()
    os.symlink("merges.txt", path / "merges.txt")


def huge(path):
    os.truncate(path / "vocab.json", 2**40)  # sparse: takes no space


def twice(path):
    lines = (path / "merges.txt").read_bytes().split(b"\n", 1)[1]
    (path / "merges.txt").write_bytes(lines * 2)


def cut(path):
    lines = (path / "merges.txt").read_bytes().split(b"\n")
    (path / "merges.txt").write_bytes(b"\n".join(lines[:20]))


HOSTILE = {
    "malformed": (replace_text("vocab.json", b'{"a": 1'), "not valid JSON"),
    "not an object": (replace_text("vocab.json", b"[1]"), "JSON list, not an object"),
    "duplicate key": (replace_text("vocab.json", b'{"a": 0, "a": 1}'), "key 'a' twice"),
    "nested": (replace_text("vocab.json", b'{"a":' + b"[" * 100_000), "nested too deeply"),
    "a long number": (replace_text("vocab.json", b'{"a": ' + b"9" * 10_000 + b"}"), "not valid JSON"),
    "not UTF-8": (replace_text("vocab.json", b'{"\xff": 0}'), "byte 0xff at offset 2"),
    "fifo": (fifo, "not a regular file"),
    "symlink loop": (loop, "cannot read"),
    "huge": (huge, "the limit is 67,108,864"),
    "negative id": (hostile_vocab(lambda v: v | {"!": -1}), "must be 0 to"),
    "same id twice": (hostile_vocab(lambda v: v | {"!": 7}), "must be 0 to"),
    "id true": (hostile_vocab(lambda v: v | {'"': True}), "must be 0 to"),
    "id of another type": (hostile_vocab(lambda v: v | {"!": "0"}), "must be 0 to"),
    "id beyond": (hostile_vocab(lambda v: v | {"!": 10**12}), "must be 0 to"),
    "empty": (hostile_vocab(lambda v: {}), "must be 0 to"),
    "no bytes": (lambda path: (replace_text("vocab.json", b'{"a": 0}')(path),
                               replace_text("merges.txt", b"")(path)), "lacks 255 of the 256 bytes"),
    "merge of three": (replace_text("merges.txt", b"#version: 0.2\na b c\n"), "merge 0 is 'a b c'"),
    "merge of unknown": (replace_text("merges.txt", b"#version: 0.2\nab c\n"), "no earlier merge builds"),
    "merge not in the vocabulary": (replace_text("merges.txt", b"! !\n"), "which the vocabulary lacks"),
    "merge twice": (twice, "again; fetch"),
    "merges cut short": (cut, "that no merge builds"),
    "half of it": (lambda path: (path / "merges.txt").unlink(), "not its other half"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_refused_in_one_line(trained, tmp_path, name):
    trained["bpe", False].save(tmp_path)
    spoil, words = HOSTILE[name]
    spoil(tmp_path)
    with pytest.raises(UserError) as caught:
        load_tokenizer(tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert words in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 400


@pytest.mark.parametrize("whole", [
    {}, {"model": [], "pre_tokenizer": None},
    {"model": {"type": "BPE", "vocab": 3, "merges": 4}, "pre_tokenizer": {}},
    {"model": {"type": "Unigram", "vocab": []}, "pre_tokenizer": {"type": "Metaspace"}},
    {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": ["a b c"]},
     "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False}},
    {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": [[1, 2]]},
     "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False}},
    {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []},
     "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True}},
    {"model": {"type": "WordLevel", "vocab": {"ab": 0}}, "pre_tokenizer": {"type": "Split"}},
    {"model": {"type": "WordLevel", "vocab": {"a": [0]}}, "pre_tokenizer": {"type": "Split"}},
])
def test_a_foreign_tokenizer_json_is_refused(tmp_path, whole):
    (tmp_path / "tokenizer.json").write_text(json.dumps(whole))
    with pytest.raises(UserError, match="/tokenizer.json"):
        load_tokenizer(tmp_path)


def test_json_within_its_limit_is_read(tmp_path):
    (tmp_path / "a.json").write_text('{"é": [1, {"b": null}]}', encoding="utf-8")
    assert read_json(tmp_path / "a.json") == {"é": [1, {"b": None}]}
    with pytest.raises(UserError, match="limit is 5"):
        read_json(tmp_path / "a.json", max_bytes=5)


@pytest.mark.parametrize("path", ["a\0b", ".", "nowhere/a.json", "a" * 5000])
def test_a_path_that_names_no_file_is_refused(path):
    with pytest.raises(UserError, match="cannot read|not a regular file"):
        read_json(path)
