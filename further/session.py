"""
A conversation: one text that two sides append to, over one live cache, so that a turn computes only what is new.

    python generate.py --model out/gpt-tiny --chat --stop $'\\n' --stats

    session = Session(model, tokenizer)
    session.append("The if statement")
    for piece in session.answer(100, stops=["\\n"]): print(piece, end="")
    other = session.fork()                          # from here on each goes its own way
    session.become(tokenizer.encode("The if not"))  # a changed past: what begins alike stays stored

The ids are the truth, and the cache holds a beginning of them. Behind it lie the last id of the answer before, which
was chosen, and nobody has asked what comes after it, and what was appended. A stop may cut a token in two: the token
goes, and what it says before the stop is encoded again, with what is appended. So a turn of n tokens lets n positions
enter the model, or n + 1. Where a pattern has evicted what a changed past must see, all enter once more.
"""

import copy
import sys
from functools import partial

from cost import count
from generate import cached, stream
from plumbing.errors import UserError
from plumbing.files import decode
from plumbing.tokenizers import Stops, StreamDecoder

MAX_LINE = 2**24  # bytes: no context is as long


class Session:
    """
    ids: what was said, at most `length` tokens (None: block_size). tail: bytes behind them that a stop left of a token.
    Raises UserError on a BART, and on a length that its model has not.

    An answer is read to its end, or left alone for good, before anything else is said: what it has chosen stays. Each
    text is encoded by itself, so that the ids before it stay as they are.
    """

    def __init__(self, model, tokenizer, length=None):
        limit = model.config.block_size
        self.length = limit if length is None else length
        if model.config.is_encoder_decoder:
            raise UserError("a conversation is a text that grows, and a BART reads a source that does not: use a GPT")
        if not 1 <= self.length <= limit:
            raise UserError(f"length={length} must be from 1 to block_size={limit}")
        self.model, self.tokenizer, self.cache = model, tokenizer, model.new_cache(1, self.length)
        self.ids, self.tail = [], b""

    @property
    def text(self):
        return self.tokenizer.decode(self.ids) + self.tail.decode(errors="replace")

    def append(self, text):
        """Put a text behind what was said."""
        self.ids += self.tokenizer.encode_plain(self.tail.decode(errors="replace") + text)
        self.tail = b""

    def answer(self, max_new_tokens, stops=(), **choice):
        """
        An iterator of pieces of text that join to an answer, each as soon as it can be part of no stop: at most
        max_new_tokens, or what fits. choice: ignore_eos, and fields of Choice. Raises UserError, before anything is
        computed, where nothing fits, or was said, or the request makes no sense.
        """
        room = self.length - len(self.ids)
        if room < 1:
            raise UserError(f"{len(self.ids)} tokens fill the {self.length} of this conversation, and no answer fits: "
                            f"begin another one")
        self.keep(len(self.ids) - 1)  # the last id must enter, for its logits: it did if the answer behind it failed
        steps = stream(self.model, [self.ids], min(max_new_tokens, room), strategy=partial(cached, cache=self.cache),
                       stop=Stops(self.tokenizer, stops), **choice)
        return self.pieces(steps, StreamDecoder(self.tokenizer, stops))

    def pieces(self, steps, decoder):
        start = len(self.ids)
        for [new] in steps:
            self.ids += new
            yield "".join(map(decoder.push, new))
        rest, new = decoder.flush(), self.ids[start:]
        whole, more = self.tokenizer.within(new, decoder.size)
        tail = b"".join(map(self.tokenizer.token_bytes, new[whole : whole + 1]))[:more]
        while whole and 0x80 <= (tail or b"a")[0] < 0xC0:  # the later bytes of a character that began in a token before
            whole -= 1
            tail = self.tokenizer.token_bytes(new[whole]) + tail
        self.rewind(start + whole)
        self.tail = tail
        yield rest

    def rewind(self, n):
        """Forget all ids but the first n. Raises UserError if there are fewer."""
        if not 0 <= n <= len(self.ids):
            raise UserError(f"cannot rewind to {n}: choose from 0 to {len(self.ids)}, the tokens of this conversation")
        self.keep(n)
        self.ids, self.tail = self.ids[:n], b""

    def become(self, ids):
        """Make these ids what was said: what begins as they do stays stored."""
        alike = next((n for n, (a, b) in enumerate(zip(ids, self.ids)) if a != b), min(len(ids), len(self.ids)))
        self.rewind(alike)
        self.ids = list(ids)

    def fork(self):
        """The same conversation once more, which goes its own way."""
        other = copy.copy(self)
        other.ids, other.cache = list(self.ids), self.cache.fork()
        return other

    def keep(self, n):
        """Keep at most n positions stored."""
        try:
            self.cache.rewind(max(0, min(n, *self.cache.filled)))
        except ValueError:  # what position n sees has been evicted
            self.cache.rewind(0)


def ask():
    """The next line of standard input, in bytes: none at its end. A person is asked for it."""
    if sys.stdin.isatty():
        print("> ", end="", file=sys.stderr, flush=True)
    return sys.stdin.buffer.readline(MAX_LINE)


def command(request):
    """generate.py --chat: answer every line. The model reads what one sees: a line end stands behind each answer."""
    if sys.stdin is None:
        raise UserError("standard input is closed: --chat reads from it what is said")
    session, say = Session(request.model, request.tokenizer), partial(print, end="", flush=True)
    choice = {key: value for key, value in request.options.items() if key != "stop"}
    stream(request.model, [request.ids or [0]], request.max_new_tokens, **request.options)  # before a line is read
    session.become(request.ids)
    say(request.shown)
    for line in iter(ask, b""):
        session.append(decode("standard input", line.removesuffix(b"\n")) + "\n")
        with count(session.model) as cost:
            pieces = session.answer(request.max_new_tokens, request.stops, **choice)
            for piece in pieces if request.live else ["".join(pieces)]:
                say(piece)
        session.append("\n")
        say("\n")
        if request.stats:
            print(f"{cost.decoder_tokens} positions entered for {cost.steps} new tokens; {len(session.ids)} of "
                  f"{session.length} are taken", file=sys.stderr)
