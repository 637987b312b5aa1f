"""Text to ids and back: bytes, characters, byte-pair encodings, GPT-2's vocabulary, and BART's flavour of
each.

Every tokenizer is described by what is in its files, in Hugging Face's formats, so that a directory we save
is one that transformers opens, and the other way round. Byte-pair encodings are trained here and served by
tiktoken. A text is only ever text: what a user types never becomes a control token, whatever it spells.
"""

import codecs
import hashlib
import itertools
import os
import tempfile
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import regex
import tiktoken

from plumbing.errors import UserError
from plumbing.files import fetch, read_json, read_text, write_json

KINDS = ("byte", "char", "bpe", "gpt2")
END = "<|endoftext|>"
BART_FIRST = ["<s>", "<pad>", "</s>", "<unk>"]  # ids 0 to 3
MASK = "<mask>"  # the last id

# GPT-2 writes each byte as one visible letter: itself if printable, else the next code point from 256 on.
# The order of this table, printable bytes first, is also the order of GPT-2's first 256 ids.
PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
LETTER = {b: chr(b) for b in PRINTABLE}
LETTER |= {b: chr(256 + n) for n, b in enumerate(b for b in range(256) if b not in LETTER)}
BYTE = {letter: b for b, letter in LETTER.items()}

# Cuts a text as GPT-2 does; merges stay inside. tiktoken's own pattern says the same with a possessive quantifier in
# every branch, which its regular expressions can only take in steps; the one that is left keeps white space at the end
# off the stack. What needs no lookahead is in brackets, which makes it one search where each branch would be one.
WORDS = r"(?:'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+)|\s++$|\s+(?!\S)|\s"
WHITE = regex.compile(r"\p{White_Space}{500,}+")
SPECIAL = regex.compile(r"<.*>|\[.*\]|madeupword\d+")  # how vocabularies spell entries that no text produces

GPT2_URL = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/vocab.bpe"
GPT2_SHA256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"


class Tokenizer:
    """What all kinds share. With <s> and </s> in its vocabulary it is BART's, and encode() frames.

    `tokens[i]` are the bytes of id i, b"" where i is special; `specials` maps the names of those to ids.
    """

    def __init__(self, tokens, specials):
        self.tokens, self.specials = tokens, specials
        self.n_vocab = len(tokens)
        self.bos_id, self.pad_id = specials.get("<s>"), specials.get("<pad>")
        self.eos_id = specials.get("</s>", specials.get(END))
        self.seq2seq = "<s>" in specials and "</s>" in specials

    def encode(self, text):
        """The ids of a text; BART's start with <s> and end with </s>."""
        ids = self.encode_plain(text)
        return [self.bos_id, *ids, self.eos_id] if self.seq2seq else ids

    def encode_array(self, text):
        """encode_plain() as an array (n,), which a BPE makes without a Python number for each id."""
        return np.array(self.encode_plain(text), dtype=np.uint32)

    def decode(self, ids):
        """The text of any ids: special ones say nothing, bytes that are not UTF-8 become U+FFFD."""
        return b"".join(map(self.token_bytes, ids)).decode("utf-8", errors="replace")

    def within(self, ids, size):
        """How many of the ids say only what is in their first `size` bytes, and how many bytes of the next one do."""
        for n, id in enumerate(ids):
            if len(self.token_bytes(id)) > size:
                return n, size
            size -= len(self.token_bytes(id))
        return len(ids), 0

    def token_bytes(self, id):
        if not 0 <= id < self.n_vocab:
            raise UserError(f"id {id} is not in this vocabulary; its ids are 0 to {self.n_vocab - 1}")
        return self.tokens[id]

    def show(self, id):
        """One id for a human eye: its text, or the name of a special one; a broken character shows as U+FFFD."""
        names = {special: name for name, special in self.specials.items()}
        return names.get(id) or self.token_bytes(id).decode("utf-8", errors="replace")

    def save_config(self, directory, **more):
        """Write tokenizer_config.json: the class for transformers to build, the names of its specials."""
        names = dict.fromkeys(("bos", "eos", "unk"), END)
        if self.seq2seq:
            names = {"bos": "<s>", "eos": "</s>", "pad": "<pad>", "unk": "<unk>", "mask": MASK, "cls": "<s>",
                     "sep": "</s>"}
        named = {f"{role}_token": name for role, name in names.items() if name in self.specials}
        more["clean_up_tokenization_spaces"] = False
        write_json(Path(directory, "tokenizer_config.json"), more | named)


class BPETokenizer(Tokenizer):
    """Byte-level BPE. `merges` are pairs of tokens, most urgent first, and `vocab` maps tokens and special
    names to ids, both spelled in letters as merges.txt and vocab.json spell them. No merges: one id per byte.

    tiktoken takes a token's rank for its id and its urgency at once. A vocabulary is free to number its
    tokens otherwise (BART's are in order of frequency), hence `table`, from rank to id.
    """

    def __init__(self, merges, vocab):
        self.merges, self.vocab = merges, vocab
        check_ids(vocab)
        spelt = {letter: bytes([byte]) for letter, byte in BYTE.items()}  # in the order of the ranks
        for n, (left, right) in enumerate(merges):
            token = left + right
            if left not in spelt or right not in spelt or token in spelt:
                raise UserError(f"merge {n} of the vocabulary, {left!a} + {right!a}, uses a token that no "
                                f"earlier merge builds or builds {token!a} again; fetch the file again")
            if token not in vocab:  # also keeps a few lines of doublings from asking for terabytes
                raise UserError(f"merge {n} builds {token!a}, which the vocabulary lacks; fetch both again")
            spelt[token] = spelt[left] + spelt[right]
        if missing := [letter for letter in BYTE if letter not in vocab]:
            raise UserError(f"the vocabulary lacks {len(missing)} of the 256 bytes, first {missing[0]!a}; "
                            f"only byte-level vocabularies like GPT-2's and BART's can be read")
        specials = {name: id for name, id in vocab.items() if name not in spelt}
        if odd := [name for name in specials if not SPECIAL.fullmatch(name)]:
            raise UserError(f"the vocabulary holds {len(odd)} tokens that no merge builds, first {odd[0]!a}; "
                            f"the merges file may be cut short, fetch it again")
        self.table = np.array([vocab[token] for token in spelt], dtype=np.uint32)
        tokens = [b""] * len(vocab)
        for token, data in spelt.items():
            tokens[vocab[token]] = data
        self.bpe = tiktoken.Encoding("bpe", pat_str=WORDS, special_tokens={END: len(spelt)}, mergeable_ranks={
            data: n for n, data in enumerate(spelt.values())})
        super().__init__(tokens, specials)

    def encode_plain(self, text):
        """The ids of a text without a frame. Half a surrogate pair, no UTF-8, counts as U+FFFD."""
        return self.encode_array(text).tolist()

    def encode_array(self, text):
        # tiktoken's regular expression overflows its stack on a very long white run with a word after it.
        # GPT-2 gives the last white character to that word anyway, so cutting just before it changes no id.
        # Such a run holds 250 characters between two multiples of 250, which is soon seen to be nowhere.
        long = any(text[n:n + 250].isspace() for n in range(0, len(text), 250))
        cuts = [run.end() - 1 for run in (WHITE.finditer(text) if long else ()) if run.end() < len(text)]
        try:  # a special token that is neither allowed nor disallowed is text; without any, looking for none is slow
            parts = [self.bpe.encode_to_numpy(text[a:b], disallowed_special=())
                     for a, b in zip([0, *cuts], [*cuts, None])]
        except UnicodeEncodeError:
            return self.encode_array(text.encode("utf-16", "surrogatepass").decode("utf-16", "replace"))
        return self.table[np.concatenate(parts)]

    def save(self, directory):
        kind = "BartTokenizer" if self.seq2seq else "GPT2Tokenizer"
        self.save_config(directory, tokenizer_class=kind, add_prefix_space=False)
        write_json(Path(directory, "vocab.json"), self.vocab)
        lines = ["#version: 0.2", *(f"{left} {right}" for left, right in self.merges), ""]
        Path(directory, "merges.txt").write_bytes("\n".join(lines).encode())


class CharTokenizer(Tokenizer):
    """One id per character, in the order of `chars`; BART's flavour puts its four special ids in front."""

    def __init__(self, chars, seq2seq=False):
        first = BART_FIRST if seq2seq else []
        self.ids = {char: n + len(first) for n, char in enumerate(chars)}
        try:
            tokens = [b""] * len(first) + [char.encode() for char in chars]
        except UnicodeEncodeError as error:
            raise UserError(f"the text holds half a surrogate pair, {error.object!a}; remove it") from None
        super().__init__(tokens, {name: n for n, name in enumerate(first)})

    def encode_plain(self, text):
        try:
            return [self.ids[char] for char in text]
        except KeyError as error:
            raise UserError(f"the character {error.args[0]!a} is not one of the {len(self.ids)} of "
                            f"the training text; leave it out, or train a bpe, which knows all") from None

    def save(self, directory):
        frame = {"type": "BertProcessing", "cls": ["<s>", self.bos_id], "sep": ["</s>", self.eos_id]}
        no = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        added = [{"id": id, "content": name, **no, "special": True} for name, id in self.specials.items()]
        split = {"type": "Split", "pattern": {"Regex": r"[\s\S]"}, "behavior": "Isolated", "invert": False}
        write_json(Path(directory, "tokenizer.json"), {
            "version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": None,
            "pre_tokenizer": split, "post_processor": frame if self.seq2seq else None, "decoder": {"type": "Fuse"},
            "model": {"type": "WordLevel", "vocab": self.specials | self.ids, "unk_token": "<unk>"}})
        self.save_config(directory, tokenizer_class="PreTrainedTokenizerFast")


class Stops:
    """Texts that end what is generated, one or several. Raises UserError on one that is empty, or no text.

    They are looked for in the bytes of ids, so it does not matter where tokens begin: a text that is UTF-8 stands in
    any bytes just where it stands in what they decode to. The stop that is complete first counts, and of those that
    are complete at once the one that begins first.
    """

    def __init__(self, tokenizer, texts=()):
        self.tokenizer, self.texts = tokenizer, []
        for text in [texts] if isinstance(texts, str) else texts:
            try:
                self.texts.append(text.encode())
            except (AttributeError, UnicodeEncodeError):
                raise UserError(f"the stop {text!a:.60} is no text: give characters, without half a pair") from None
            if not text:
                raise UserError("the stop '' would end every text before it begins: give at least one character")
        self.longest = max(map(len, self.texts), default=0)

    def __call__(self, ids):
        """Whether a stop is complete with the last of these ids, if none was before: generate() takes this as stop."""
        tail, enough = b"", self.longest + len(self.tokenizer.token_bytes(ids[-1])) - 1
        for id in itertools.takewhile(lambda id: len(tail) < enough, reversed(ids)):
            tail = self.tokenizer.token_bytes(id) + tail
        return self.cut(tail)[1]

    def cut(self, data):
        """How many of these bytes can be no part of a stop, whatever comes; and whether one begins there."""
        found = [(at + len(text), at) for text in self.texts if (at := data.find(text)) >= 0]
        if found:
            return min(found)[1], True
        begins = lambda n: any(text.startswith(data[n:]) for text in self.texts)
        return next(filter(begins, range(len(data))), len(data)), False


class StreamDecoder:
    """Turns ids into text as they come, up to the first of the stops, texts. The pieces join to decode(all ids), or to
    what of it lies before the stop; no character arrives in halves, and nothing that may yet become part of a stop.

    stopped: whether a stop has come; size: how many bytes of the ids have become text.
    """

    def __init__(self, tokenizer, stops=()):
        self.tokenizer, self.stops = tokenizer, Stops(tokenizer, stops)
        self.utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self.held, self.stopped, self.size = b"", False, 0

    def push(self, id):
        if self.stopped:
            return ""
        data = self.held + self.tokenizer.token_bytes(id)
        n, self.stopped = self.stops.cut(data)
        self.held, self.size = b"" if self.stopped else data[n:], self.size + n
        return self.utf8.decode(data[:n])

    def flush(self):
        """What is left when the last id has come: U+FFFD where a character was never finished."""
        self.size, held, self.held = self.size + len(self.held), self.held, b""
        return self.utf8.decode(held, final=True)


# ------------------------------------------------------------------------------------------------------------
# making one


def train_tokenizer(kind, text, vocab_size=None, seq2seq=False):
    """A new tokenizer of one of KINDS. `vocab_size` is for "bpe" and counts the special ids in.

    A GPT's tokenizer ends in <|endoftext|>, except "char", which has the text's characters and nothing else.
    A text with too few repeated pairs of tokens gives fewer ids than asked for.
    """
    if kind not in KINDS:
        raise UserError(f"no tokenizer {kind!a}; choose from {', '.join(KINDS)}")
    if kind == "char":
        return CharTokenizer(sorted(set(text)), seq2seq)
    merges = []
    if kind == "gpt2":
        merges = gpt2_merges()
    if kind == "bpe":
        least = 256 + (len(BART_FIRST) + 1 if seq2seq else 1)
        if vocab_size is None or vocab_size < least:
            raise UserError(f"vocab_size is {vocab_size}; a bpe needs {least} for bytes and special ids")
        merges = train_merges(text, vocab_size - least)
    names = [*BYTE, *(left + right for left, right in merges)]
    names = [*BART_FIRST, *names, MASK] if seq2seq else [*names, END]
    return BPETokenizer(merges, {name: id for id, name in enumerate(names)})


def train_merges(text, n_merges):
    """The `n_merges` pairs that byte-pair encoding joins, most frequent first; ties go to the smaller pair.

    A word is merged once however often it occurs, and `where` finds the words that a merge touches.
    """
    found = Counter(regex.findall(WORDS, text))
    words = [[LETTER[b] for b in word.encode(errors="replace")] for word in found]
    times = list(found.values())
    counts, where = Counter(), defaultdict(set)
    for n, word in enumerate(words):
        for pair in zip(word, word[1:]):
            counts[pair] += times[n]
            where[pair].add(n)
    merges = []
    while len(merges) < n_merges and (most := max(counts.values(), default=0)) > 1:  # a pair seen once saves nothing
        merges.append(min(pair for pair, count in counts.items() if count == most))
        for n in where.pop(merges[-1]):
            for old in zip(words[n], words[n][1:]):
                counts[old] -= times[n]
            words[n] = join(words[n], merges[-1])
            for new in zip(words[n], words[n][1:]):
                counts[new] += times[n]
                where[new].add(n)
    return merges


def join(word, pair):
    """The word, a list of tokens, with every occurrence of the pair made one token, from the left."""
    joined, n = [], 0
    while n < len(word):
        size = 2 if (word[n], *word[n + 1:n + 2]) == pair else 1
        joined.append("".join(word[n:n + size]))
        n += size
    return joined


def gpt2_merges():
    """GPT-2's merges, from the cache that tiktoken keeps or from the network."""
    cache = os.environ.get("TIKTOKEN_CACHE_DIR") or Path(tempfile.gettempdir(), "data-gym-cache")
    name = hashlib.sha1(GPT2_URL.encode()).hexdigest()  # what tiktoken calls the file there
    data = fetch(GPT2_URL, GPT2_SHA256, Path(cache, name), remedy="pass a directory that holds vocab.json "
                 "and merges.txt (or encoder.json and vocab.bpe), or set TIKTOKEN_CACHE_DIR to a full cache")
    return parse_merges(GPT2_URL, data.decode())


# ------------------------------------------------------------------------------------------------------------
# reading one


def load_tokenizer(directory):
    """The tokenizer that a model directory holds, ours or not; None if it holds no tokenizer files."""
    names = ("vocab.json", "merges.txt", "encoder.json", "vocab.bpe", "tokenizer.json")
    held = {name: Path(directory, name) for name in names if os.path.lexists(Path(directory, name))}
    for vocab, merges in (names[:2], names[2:4]):  # the second two are what OpenAI called them
        if vocab in held and merges in held:
            pairs, ids = parse_merges(held[merges], read_text(held[merges])), read_json(held[vocab])
            try:
                return BPETokenizer(pairs, ids)
            except UserError as error:
                raise UserError(f"{held[vocab]} and {merges}: {error}") from None
    if "tokenizer.json" in held:
        return load_tokenizer_json(held["tokenizer.json"])
    if held:
        raise UserError(f"{directory} holds {', '.join(held)} but not its other half; a tokenizer is "
                        f"vocab.json and merges.txt, or encoder.json and vocab.bpe, or tokenizer.json")
    return None


def load_tokenizer_json(path):
    """A BPE like GPT-2's, or our characters, from the one file that newer tools write."""
    whole = read_json(path)
    try:
        model, before = whole["model"], whole["pre_tokenizer"]
        vocab = model["vocab"] | {added["content"]: added["id"] for added in whole.get("added_tokens") or []}
        if model["type"] == "WordLevel" and before["type"] == "Split":
            check_ids(vocab)
            names = sorted(vocab, key=vocab.get)
            seq2seq = names[:len(BART_FIRST)] == BART_FIRST
            chars = names[len(BART_FIRST):] if seq2seq else names
            if all(len(char) == 1 for char in chars):
                return CharTokenizer(chars, seq2seq)
        if model["type"] == "BPE" and before["type"] == "ByteLevel" and not before["add_prefix_space"]:
            pairs = [tuple(pair.split(" ") if isinstance(pair, str) else pair) for pair in model["merges"]]
            if not whole.get("normalizer") and all(isinstance(left + right, str) for left, right in pairs):
                return BPETokenizer(pairs, vocab)
    except (KeyError, TypeError, AttributeError, ValueError) as error:  # not of the shape that was expected
        if isinstance(error, UserError):
            raise UserError(f"{path}: {error}") from None
    raise UserError(f"{path} is no tokenizer that can be read here; these can: byte-level BPE as GPT-2 and "
                    f"BART use it, and single characters")


def parse_merges(path, text):
    """The pairs in the lines of a merges.txt."""
    lines = text.replace("\r\n", "\n").rstrip("\n").split("\n")
    start = 1 if lines[0].startswith("#version") else 0
    pairs = [tuple(line.split(" ")) for line in lines[start:] if line]
    for n, pair in enumerate(pairs):
        if len(pair) != 2 or not all(pair):
            raise UserError(f"{path}: merge {n} is {' '.join(pair)[:40]!a}, not two tokens; fetch it again")
    return pairs


def check_ids(vocab):
    """Refuse a vocabulary whose ids are not 0, 1, 2, ... each once: a gap could never be decoded."""
    ids = list(vocab.values())
    if not ids or any(type(id) is not int for id in ids) or sorted(ids) != list(range(len(ids))):
        raise UserError(f"the ids of a vocabulary of {len(ids)} entries must be 0 to {len(ids) - 1}, "
                        f"each once; fetch the file again")
