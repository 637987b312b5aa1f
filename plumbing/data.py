"""What a model trains on: a text cut into windows (GPT), or pairs of a source and a target text (BART), which further/
denoise.py makes of any text.

All kinds have the same face: `batch_at`, a pure function of (seed, step), so that a resumed run sees what an
uninterrupted one sees, and any number of ranks what one process sees; `val_batches`, the whole held-out split in order;
`identity`, to notice that the data changed. Nothing here needs a network except tiny Shakespeare.
"""

import ast
import hashlib
import os
import platform
import random
import re
import sysconfig
from dataclasses import dataclass
from datetime import date, timedelta
from functools import lru_cache
from importlib import import_module
from itertools import chain
from pathlib import Path
from string import ascii_lowercase

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from plumbing import headlines
from plumbing.errors import UserError
from plumbing.files import SUFFIXES, fetch, files, json_object, read_bytes, read_text
from plumbing.prepare import Prepared, is_prepared
from plumbing.tokenizers import KINDS, train_tokenizer

IGNORE = -100  # a label that cross_entropy leaves out
MAX_TEXT_BYTES = 2**30
KEPT = 2**22  # items whose order is a permutation in memory
ROUNDS = 6    # of a Feistel network: 4 are enough for functions that nobody tells from random ones
NOISES = ("infill", "permute", "infill+permute")
SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"


@dataclass(slots=True)
class DataConfig:
    source: str = "pydoc"      # text: pydoc, shakespeare, a path, what plumbing/prepare.py made; pairs: TASKS, .jsonl
    noise: str | None = None   # one of NOISES: a BART restores a text that this was done to; None: it learns pairs
    tokenizer: str = "bpe"     # byte, char, bpe or gpt2; what was prepared has its own
    vocab_size: int = 1024     # ids of a bpe, special ones included
    val_fraction: float = 0.1  # of a text, in characters, held out at its end; of what was prepared, in tokens
    n_train: int = 20_000      # pairs to train on (docstrings, .jsonl: at most)
    n_val: int = 1_000         # pairs held out
    min_length: int = 3        # letters of the strings in reverse and sort
    max_length: int = 20
    max_digits: int = 3        # of each number in addition
    seed: int = 1337           # of the generated pairs and of the order of training

    def validate(self):
        """Refuse what cannot work before anything is read. Raises UserError."""
        if self.tokenizer not in KINDS:
            raise UserError(f"data.tokenizer is {self.tokenizer!a}; choose from {', '.join(KINDS)}")
        if self.noise not in (None, *NOISES):
            raise UserError(f"data.noise is {self.noise!a}; choose from {', '.join(NOISES)}, or leave it out")
        if not 0 < self.val_fraction < 1:
            raise UserError(f"data.val_fraction is {self.val_fraction}; it must be above 0 and below 1")
        least = {"vocab_size": 257, "n_train": 1, "n_val": 1, "min_length": 1, "max_length": self.min_length,
                 "max_digits": 1, "seed": 0}
        for name, low in least.items():
            if not low <= getattr(self, name) < 2**63:
                raise UserError(f"data.{name} is {getattr(self, name)}; it must be at least {low}")


def load_data(config, *, seq2seq, tokenizer=None):
    """The data that `config` names and its tokenizer, trained on the training part unless one is given.

    Texts are for a GPT (seq2seq=False) and pairs for a BART, or, with config.noise, texts. A char vocabulary is
    that of the whole text, held-out part included: a letter that occurs only there could not be encoded otherwise.
    """
    config.validate()
    if tokenizer is not None and tokenizer.seq2seq != seq2seq:
        raise UserError("the tokenizer is of the other family: a BART's has <s> and </s>, a GPT's has not")
    if config.noise and not seq2seq:
        raise UserError(f"data.noise is {config.noise!a}, and a GPT trains on a text as it is; leave it out")
    if is_prepared(config.source):
        if seq2seq:
            raise UserError(f"{config.source} was prepared, for a GPT; a BART's data.source is {', '.join(TASKS)}, or "
                            f"texts")
        return PreparedData.load(config, tokenizer)
    paired, source = seq2seq and not config.noise, config.source
    if (source in TASKS or paired and is_pairs(source)) != paired:  # of a directory either may be read
        family, wanted = ("BART", "pairs") if paired else ("BART with data.noise" if seq2seq else "GPT", "a text")
        names = f"{', '.join(TASKS)}, a path of .jsonl, or a data.noise" if paired else "pydoc, shakespeare, or a path"
        raise UserError(f"a {family} trains on {wanted} and data.source is {source!a}; choose {names}")
    if paired:
        train, val = make_pairs(config)
        sample = train + val if config.tokenizer == "char" else train[:2000]
        text = "\n".join(chain.from_iterable(sample))
    else:
        whole = read_source(source)
        cut = int(len(whole) * (1 - config.val_fraction))
        train, val = whole[:cut], whole[cut:]
        if not train or not val:
            raise UserError(f"the text {source} has {len(whole)} characters, too few to hold any out; "
                            f"at least 2 are needed, and in practice a few thousand")
        text = whole if config.tokenizer == "char" else train
    if tokenizer is None:
        tokenizer = train_tokenizer(config.tokenizer, text, config.vocab_size, seq2seq)
    parts = (source, train, val, tokenizer, config.seed)
    if config.noise:
        return import_module("further.denoise").DenoiseData(*parts, config.noise), tokenizer
    return (PairData if paired else TextData)(*parts), tokenizer


class TextData:
    """A text as one long row of ids.

    An epoch has one window starting at random in each stretch of block_size ids, in random order: it sees the
    text about once, and every start is equally likely. The held-out ids are predicted each exactly once, the
    first of them from the last id of the training part.
    """

    def __init__(self, name, train, val, tokenizer, seed):
        self.seed, self.name = seed, name
        self.train = torch.tensor(tokenizer.encode_plain(train))  # (tokens,)
        self.val = torch.tensor(tokenizer.encode_plain(val))
        self.chars_per_token = len(val) / len(self.val)  # nats per token / this = nats per character
        self.identity = describe(name, train + val, len(self.train) + len(self.val))

    def batch_at(self, step, *, batch_size, block_size):
        """((idx,), labels), both (batch_size, block_size) int64: labels are what follows each id of idx."""
        if len(self.train) <= block_size:
            raise UserError(f"the training part of {self.name} has {len(self.train)} tokens and a window of "
                            f"block_size {block_size} needs {block_size + 1}; give more text or lower it")
        last = len(self.train) - 1 - block_size  # where the last window can start
        stretches = last // block_size + 1
        rng = generator(self.seed, 0, step)
        within = torch.rand(batch_size, generator=rng, dtype=torch.float64)
        where = visit(stretches, batch_size, step, self.seed) + within
        start = (where * ((last + 1) / stretches)).long().clamp(max=last)  # clamp: the product may round up
        at = start[:, None] + torch.arange(block_size)  # (B, T)
        return (self.train[at],), self.train[at + 1]

    def val_batches(self, batch_size, block_size):
        """((idx,), labels) over the whole held-out part, in order; what pads the last row is IGNORE."""
        last = self.train[-1:]
        for start in range(0, len(self.val), batch_size * block_size):
            ids = torch.cat([last, self.val[start:start + batch_size * block_size]])
            room, last = -(len(ids) - 1) % block_size, ids[-1:]
            idx = torch.cat([ids[:-1], ids.new_zeros(room)]).view(-1, block_size)
            yield (idx,), torch.cat([ids[1:], ids.new_full((room,), IGNORE)]).view(-1, block_size)


class Mapped:
    """Ids in a memory map, int64 tensors where they are asked for: what nobody asks for is not in memory."""

    def __init__(self, ids):
        self.ids = ids

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, at):
        """at: a slice, or positions (..)."""
        return torch.from_numpy(self.ids[at if isinstance(at, slice) else at.numpy()].astype(np.int64))


class PreparedData(TextData):
    """What plumbing/prepare.py made of texts; windows and held-out part are as of a text in memory with these ids."""

    def __init__(self, name, found, val_fraction, seed):
        cut = int(len(found.ids) * (1 - val_fraction))
        if not 0 < cut < len(found.ids):
            raise UserError(f"{name} has {len(found.ids)} tokens, too few to hold out {val_fraction}; prepare more")
        self.seed, self.name = seed, name
        self.train, self.val = Mapped(found.ids[:cut]), Mapped(found.ids[cut:])
        self.chars_per_token = found.characters_from(cut) / len(self.val)
        self.identity = {"name": name, "sha256": found.sha256, "characters": found.characters, "tokens": len(found.ids)}

    @classmethod
    def load(cls, config, tokenizer):
        """The data and its tokenizer. Raises UserError if another one is given."""
        found = Prepared(config.source)
        own = found.tokenizer
        if tokenizer is not None and (tokenizer.tokens, tokenizer.specials) != (own.tokens, own.specials):
            raise UserError(f"{config.source} was prepared with another tokenizer than the model's: prepare the texts "
                            f"again with --tokenizer and the model's directory")
        return cls(config.source, found, config.val_fraction, config.seed), own


class PairData:
    """Pairs of texts, `train_pairs` and `val_pairs`, encoded once.

    The decoder reads </s>, then the target without its last id, and predicts it: <s> ... </s>.
    """

    def __init__(self, name, train, val, tokenizer, seed):
        assert not dict(train).keys() & dict(val).keys(), "held-out pairs occur in training"
        self.seed, self.name = seed, name
        self.train_pairs, self.val_pairs = train, val
        self.pad_id, self.start_id = tokenizer.pad_id, tokenizer.eos_id
        self.train, self.val = self._encode(train, tokenizer), self._encode(val, tokenizer)
        targets = (self.val[2] != IGNORE).sum().item()
        self.chars_per_token = sum(len(target) for _, target in val) / targets  # of the held-out targets
        tokens = sum(n.sum() + (labels != IGNORE).sum() for _, n, labels in (self.train, self.val))
        self.identity = describe(name, "\n".join(chain.from_iterable(train + val)), tokens.item())

    def _encode(self, pairs, tokenizer):
        """Sources (n, N) padded with pad_id, their lengths (n,), and targets (n, M) padded with IGNORE."""
        sources, targets = ([torch.tensor(tokenizer.encode(text)) for text in side] for side in zip(*pairs))
        lengths = torch.tensor([len(source) for source in sources])
        return (pad_sequence(sources, batch_first=True, padding_value=self.pad_id), lengths,
                pad_sequence(targets, batch_first=True, padding_value=IGNORE))

    def batch_at(self, step, *, batch_size, block_size):
        """((source (B, N), target (B, M), source_lengths (B,)), labels (B, M)), all int64; see the class."""
        items = visit(len(self.train_pairs), batch_size, step, self.seed)
        return self._batch(self.train, items, block_size)

    def val_batches(self, batch_size, block_size):
        """The same over all held-out pairs, in order."""
        for items in torch.arange(len(self.val_pairs)).split(batch_size):
            yield self._batch(self.val, items, block_size)

    def _batch(self, split, items, block_size):
        sources, lengths, targets = split
        longest = max(sources.shape[1], targets.shape[1])
        if longest > block_size:
            raise UserError(f"the longest {self.name} text has {longest} tokens, block_size is {block_size}; "
                            f"raise block_size, or shorten or tokenize the data otherwise")
        lengths, labels = lengths[items], targets[items]
        source = sources[items, :lengths.max()]
        return pair_batch(source, lengths, labels[:, :(labels != IGNORE).sum(1).max()], self.pad_id, self.start_id)


def pair_batch(source, lengths, labels, pad_id, start_id):
    """A BART's batch, see PairData: its decoder reads the labels shifted right, behind start_id."""
    target = torch.cat([torch.full((len(labels), 1), start_id), labels[:, :-1]], dim=1)
    return (source, target.masked_fill(target == IGNORE, pad_id), lengths), labels


# ------------------------------------------------------------------------------------------------------------
# order


def generator(*key):
    """
    A random generator that is a function of the key alone; neighbouring keys have nothing in common. The 0 in the keys
    below is older than the checkpoints that are there: without it, their runs would go on with other batches.
    """
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:4], "big"))  # torch uses 32 bits of it


@lru_cache(maxsize=4)
def permutation(n, *key):
    return torch.randperm(n, generator=generator("order", *key))


def scatter(x, n, *key):
    """
    Where a permutation of range(n) takes x (k,), int64, without a table: a Feistel network permutes the smallest square
    of a power of two with room for n, and is entered again until what comes out is below n (Black and Rogaway 2002).
    """
    half = (n - 1).bit_length() + 1 >> 1
    low, rounds = 2**half - 1, torch.randint(2**31, (ROUNDS, 2), generator=generator("scatter", *key)).tolist()
    x = x.clone()
    inside = torch.zeros_like(x, dtype=torch.bool)
    while not inside.all():
        left, right = x[~inside] >> half, x[~inside] & low
        for add, times in rounds:  # a product of numbers below 2**31 is below 2**62: its middle bits are mixed best
            mixed = ((right + add) & 2**31 - 1) * (times | 1)
            left, right = right, left ^ (mixed >> 15 ^ mixed >> 31) & low
        x[~inside] = left << half | right
        inside = x < n
    return x


def visit(n, batch_size, step, seed):
    """
    Which of n items the batch takes, (batch_size,): each once an epoch; a batch may span two. The order of very many is
    computed rather than kept; of fewer, it is that of the checkpoints that are there.
    """
    at = torch.arange(step * batch_size, (step + 1) * batch_size)
    order = scatter if n > KEPT else lambda x, *key: permutation(*key)[x]
    return torch.cat([order(at[at // n == e] % n, n, seed, 0, e) for e in (at // n).unique().tolist()])


def describe(name, text, tokens):
    """What a resumed run compares. pydoc, docstrings and random pairs depend on Python's version."""
    return {"name": name, "sha256": hashlib.sha256(text.encode()).hexdigest(), "characters": len(text),
            "tokens": tokens, "python": platform.python_version()}


# ------------------------------------------------------------------------------------------------------------
# texts


def read_source(source):
    """The text behind a name or a path."""
    if source == "pydoc":
        from pydoc_data.topics import topics  # the language reference that ships inside every Python
        return "\n".join(topics[name] for name in sorted(topics))
    if source == "shakespeare":
        cache = os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()
        return fetch(SHAKESPEARE_URL, SHAKESPEARE_SHA256, Path(cache, "mindecode", "tinyshakespeare.txt"),
                     remedy="pass --data.source=PATH of a text file instead").decode()
    if "\0" in source or not os.path.lexists(source):
        raise UserError(f"data.source is {source!a}, which is no file or directory; choose pydoc, "
                        f"shakespeare, {', '.join(TASKS)}, or an existing path")
    if not os.path.isdir(source):
        return read_text(source, MAX_TEXT_BYTES)
    return "\n".join(read_text(path, MAX_TEXT_BYTES) for path in files(source, SUFFIXES))


# ------------------------------------------------------------------------------------------------------------
# pairs: each task makes one (source, target) from a random.Random; `held_out` says for which split


def letters(rng, config):
    return "".join(rng.choices(ascii_lowercase, k=rng.randint(config.min_length, config.max_length)))


def reverse(rng, config, held_out):
    word = letters(rng, config)
    return word, word[::-1]


def sort(rng, config, held_out):
    word = letters(rng, config)
    return word, "".join(sorted(word))


def addition(rng, config, held_out):
    a, b = rng.randrange(10**config.max_digits), rng.randrange(10**config.max_digits)
    return f"{a}+{b}", str(a + b)


def dates(rng, config, held_out):
    day = date(1900, 1, 1) + timedelta(days=rng.randrange(200 * 365))
    week, month = WEEK[day.weekday()], MONTHS[day.month - 1]
    form = rng.choice(("{week} {d} {month} {y}", "{d} {mon} {y}", "{month} {d}, {y}", "{d}.{m}.{y}"))
    text = form.format(week=week, d=day.day, m=day.month, y=day.year, month=month, mon=month[:3])
    return text, day.isoformat()


WEEK = "Mon Tue Wed Thu Fri Sat Sun".split()
MONTHS = "January February March April May June July August September October November December".split()
DRAWN = {"headline": headlines.pair, "reverse": reverse, "sort": sort, "addition": addition, "dates": dates}
TASKS = (*DRAWN, "docstrings")


def is_pairs(source):
    """Whether pairs may be behind this data.source: it is a task, or named as a file or a directory of them is."""
    return source in TASKS or source.endswith(".jsonl") or os.path.isdir(source)


def make_pairs(config):
    """Lists of training and of held-out (source, target); no source is in both."""
    name = config.source if config.source in TASKS else "files"  # however a path is spelled, the same are held out
    rng = random.Random(f"{name} {config.seed}")
    if config.source not in DRAWN:
        pairs = list((docstrings() if config.source == "docstrings" else read_pairs(config.source)).items())
        if len(pairs) < 10:
            raise UserError(f"{config.source} has {len(pairs)} different sources, of which a tenth is held out; choose "
                            f"a data.source with at least 10")
        rng.shuffle(pairs)
        n_val = min(config.n_val, len(pairs) // 10)
        return pairs[n_val:n_val + config.n_train], pairs[:n_val]
    pairs = {}
    for held_out, count in ((True, config.n_val), (False, config.n_train)):
        goal = len(pairs) + count
        for _ in range(20 * count):
            if len(pairs) < goal:
                pairs.setdefault(*DRAWN[config.source](rng, config, held_out))
        if len(pairs) < goal:
            raise UserError(f"{config.source} has fewer than {config.n_train + config.n_val} different pairs "
                            f"at these lengths; lower data.n_train or data.n_val, or raise the lengths")
    pairs = list(pairs.items())
    return pairs[config.n_val:], pairs[:config.n_val]


@lru_cache
def docstrings():
    """{body: summary line} of the standard library's top level, where the body has 40 to 600 characters."""
    found = {}
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        for node in ast.walk(ast.parse(read_bytes(path))):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
                summary, _, body = (ast.get_docstring(node) or "").partition("\n\n")
                if 40 <= len(body) <= 600 and 0 < len(summary) <= 100 and "\n" not in summary:
                    found[body] = summary
    return found


def read_pairs(path):
    """
    {source: target} of the lines {"source": ..., "target": ...} of a .jsonl file, or of all of a directory; of equal
    sources the first counts, and what else a line says does not. Raises UserError that names file and line.
    """
    found = {}
    for file in files(path, (".jsonl",)) if os.path.isdir(path) else [path]:
        for n, line in enumerate(read_text(file, MAX_TEXT_BYTES).removesuffix("\n").split("\n"), 1):
            name = f"{file}, line {n}"
            values = json_object(name, line)
            for key in ("source", "target"):
                value = values.get(key)
                if not isinstance(value, str) or not value or re.search("[\ud800-\udfff]", value):
                    raise UserError(f"{name}: {key!r} is {value!a:.60}; it must be a text, not empty and without half "
                                    f"a surrogate pair")
            found.setdefault(values["source"], values["target"])
    return found
