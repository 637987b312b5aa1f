"""
A conversation: one text that two sides append to, over one live cache, so that a turn computes only what is new.

    python generate.py --model out/gpt-tiny --chat --stop $'\\n' --stats

    session = Session(model, tokenizer)
    session.append("The if statement")
    for piece in session.answer(100, stops=["\\n"]): print(piece, end="")
    other = session.fork()                         # from here on each goes its own way
    session.become(tokenizer.encode("The if not"))   # a changed past: what begins alike stays stored

The ids are the truth, and the cache holds a beginning of them. Behind it lie what was appended, and the last id of the
answer before: it was chosen, and nobody has asked what comes after it. A stop may cut a token in two: the token goes,
and the part of its bytes that stands before the stop is encoded again, together with what is appended. So a turn of n
tokens lets n positions enter the model, and that one id.
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
    ids: what was said, of at most `length` tokens, None for block_size. tail: bytes behind them that a stop left of a
    token. Raises UserError on a BART, which reads its source once and at once: a changed source is another memory.

    An answer is read to its end, or left alone for good, before anything else is said; what it has chosen until then
    stays. Each text is encoded by itself, so that the ids before it stay as they are.
    """

    def __init__(self, model, tokenizer, length=None):
        limit = model.config.block_size
        if model.config.is_encoder_decoder:
            raise UserError("a conversation is one text that grows, and a BART reads a source that does not: use a GPT, "
                            "or generate() for each source")
        if length is not None and (type(length) is not int or not 1 <= length <= limit):
            raise UserError(f"length={length!r:.60} must be a whole number from 1 to block_size={limit}")
        self.model, self.tokenizer, self.length = model, tokenizer, length or limit
        self.cache, self.ids, self.tail = model.new_cache(1, self.length), [], b""

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
        computed, where nothing fits, nothing was said, or the request makes no sense.
        """
        room = self.length - len(self.ids)
        if room < 1:
            raise UserError(f"{len(self.ids)} tokens fill the {self.length} of this conversation, and no answer fits: "
                            f"begin another one, or rewind() or become() something shorter")
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
        self.rewind(start + whole)
        self.tail = b"".join(map(self.tokenizer.token_bytes, new[whole : whole + 1]))[:more]
        yield rest

    def rewind(self, n):
        """Forget all ids but the first n. Raises UserError if there are fewer."""
        if not 0 <= n <= len(self.ids):
            raise UserError(f"cannot rewind to {n}: this conversation has {len(self.ids)} tokens, choose from 0 to that")
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
        """Keep at most n positions stored. Where a pattern has evicted what the next one sees, all enter once more."""
        try:
            self.cache.rewind(max(0, min(n, *self.cache.filled)))
        except ValueError:
            self.cache.rewind(0)


def lines():
    """The lines of standard input, each with its end; a person is asked for them."""
    while True:
        if sys.stdin.isatty():
            print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.buffer.readline(MAX_LINE)
        if not line:
            return
        yield decode("standard input", line.removesuffix(b"\n")) + "\n"


def command(request):
    """generate.py --chat: every line is answered. The model reads what one sees: a line end stands behind each answer."""
    if sys.stdin is None:
        raise UserError("standard input is closed: --chat reads from it what is said")
    session, say = Session(request.model, request.tokenizer), partial(print, end="", flush=True)
    choice = {key: value for key, value in request.options.items() if key not in ("strategy", "stop")}
    stream(request.model, [request.ids or [0]], request.max_new_tokens, **request.options)  # refuses before a line is read
    session.become(request.ids)
    say(request.shown)
    for line in lines():
        session.append(line)
        with count(session.model) as cost:
            pieces = session.answer(request.max_new_tokens, request.stops, **choice)
            for piece in pieces if request.live else ["".join(pieces)]:
                say(piece)
        session.append("\n")
        say("\n")
        if request.stats:
            print(f"{cost.decoder_tokens} positions entered for {cost.steps} new tokens; {len(session.ids)} of "
                  f"{session.length} are taken", file=sys.stderr)
