"""
Several tokens from one pass of the model, and still exactly the text of one token per pass.

    python generate.py --model out/gpt-tiny --prompt "x = [1, 2, 3, 4]; x = [1, 2" --speculate lookup
    python generate.py --model out/bart-headline --prompt-file article.txt --speculate headlines.txt
    python generate.py --model gpt2-xl --prompt "The if statement" --speculate gpt2
    python bench.py compare --model out/gpt-tiny --prompt "x = 1; x = 1; x" --strategies cached,further.speculate:lookup

A decode step takes the time of reading the weights, for several tokens of a row hardly longer than for one. So somebody
cheap, a *draft*, guesses how each row goes on, and the model looks at all guesses in one chunk: what it says behind
each judges the next, and what follows a wrong one is rewound. Rows accept different numbers. The draft is what followed
the newest ids when they last occurred, in the row or its source; or what follows them in other texts, as in REST (He et
al. 2023), preferably something that the source says; or a small model with a cache of its own.

With sampling, texts keep their distribution (Leviathan et al. 2023, algorithm 1). Let p be the model's, and q what the
guess x was drawn from. The next id is x with probability a = min(1, p(x) / q(x)), and else is drawn from max(p - q, 0).
Where q is certain of x, that is a draw from p as ever, which then is the guess or is not; and greedy is the same. With
a small model and a seed, a text also depends on how many ids there is room to guess, so on the longest one beside it.
"""

from functools import partial

import torch

from generate import advance, asking, encode, project
from plumbing.checks import check_room
from plumbing.errors import NonFiniteError, UserError
from plumbing.examples import Examples
from sampling import most_likely

GUESSES = 4  # of each row, in every pass
NGRAM = 3    # so many of the newest ids are looked up, then fewer


class Decoding:
    """What generate.cached keeps, of the rows of B prompts, neighbours being samples of one; rows may be taken back."""

    def __init__(self, model, sources, B, room):
        self.model, self.asked, self.room, self.cache = model, asking(B), room, None
        self.memory = project(model, *encode(model, sources))

    def logits(self, rows, which, last):
        """(B, last, V), of the last positions of each row, whatever stood there or behind them before."""
        if self.cache is None:
            self.cache, self.held = self.model.new_cache(len(rows), self.room), which
            self.memory = self.memory and self.memory.take(self.asked(which))
        kept, known = [self.held.index(r) for r in which], list(self.cache.filled)
        for i, row in zip(kept, rows):
            known[i] = min(known[i], len(row) - last)
        self.cache.rewind(known)  # before rows move: as yet the last chunk has evicted nothing
        if which != self.held:
            self.cache.reorder(kept)
            self.memory, self.held = self.memory and self.memory.take(kept), which
        return advance(self.model, rows, self.cache, self.memory, last)


# -----------------------------------------------------------------------------
# Drafts: draft(rows, which, k) -> the rows with at most k guesses behind each, and for every guess the distributions
# (B, V) that it was drawn from, None where it is certain.


def look_up(text, k):
    """The k ids that followed the newest ones of a text when these last occurred in it, going round and round."""
    n, text = len(text), "".join(map(chr, text))  # a letter for each id: nothing is found as fast as in a string
    start = next(at + size for size in range(NGRAM, -1, -1)
                 if (at := text.rfind(text[n - size :], 0, n - 1)) >= 0)  # none of them: they occur everywhere
    for i in range(start, start + k):
        text += text[i]
    return list(map(ord, text[n:]))


def lookup_draft(sources, B, room, choose):
    asked = asking(B)

    def draft(rows, which, k):
        before = [sources[s] if sources else [] for s in asked(which)]
        return [[*row, *look_up([*source, *row], k)] for source, row in zip(before, rows)], [None] * k

    return draft


def examples_draft(examples, sources, B, room, choose):
    asked = asking(B)

    def draft(rows, which, k):
        known = [set(sources[s]) if sources else () for s in asked(which)]
        for _ in range(k):
            rows = [[*row, examples.next(row, ids)] for row, ids in zip(rows, known)]
        return rows, [None] * k

    return draft


def model_draft(small, sources, B, room, choose):
    """Lets a small model write, by the same rules. Raises UserError, before it computes, on a text too long for it."""
    longest = max(room, *map(len, sources or [[]]))
    if longest > small.config.block_size:
        raise UserError(f"block_size={small.config.block_size} of the draft is less than the {longest} tokens of a "
                        f"text: ask for fewer, or choose another draft")
    decoding = Decoding(small, sources, B, room)

    def draft(rows, which, k):
        logits = decoding.logits(rows, which, 1)  # what has been accepted enters for good ...
        aside, texts, drawn = decoding.cache.fork(), rows, []  # ... and guesses do not: they may evict what it sees
        for _ in range(k):
            logits = advance(small, texts, aside, decoding.memory) if drawn else logits
            try:
                scores = choose.scores(logits[:, 0], texts, which)
            except NonFiniteError:  # the rules forbid every id, in a text that perhaps nobody writes
                break
            q = distribution(choose, scores) if choose.choice.temperature else None
            ids = most_likely(scores) if q is None else choose.sample(q, [[choose.part(r)] for r in which])
            texts, drawn = [[*text, *new] for text, new in zip(texts, ids.tolist())], [*drawn, q]
        return texts, drawn

    return draft


# -----------------------------------------------------------------------------
# The strategy


def distribution(choose, scores):
    """Of draws by scores, (B, V) -> (B, V)."""
    probs, ids = choose.likely(scores)
    return torch.zeros_like(scores).scatter(-1, ids, probs)


def given(p, q, x):
    """What to draw from, given a guess x that was drawn from q, so that over all guesses it is p; (V,) each."""
    rest, accept = torch.maximum(p - q, 1e-20 * p), (p[x] / q[x]).clamp(max=1)  # something is left where p is q
    drawn = (1 - accept) * rest / rest.sum()
    drawn[x] += accept
    return drawn


def accepted(choose, logits, row, r, guesses, drawn):
    """
    The new ids of row number r: the guesses that are right, and one more. logits: (k + 1, V); drawn: from what, each
    (V,) or None. An id is chosen when it is asked for, so none is behind an end.
    """
    row = list(row)
    for own, guess, q in zip(logits.split(1), [*guesses, None], [*drawn, None]):
        if q is None:
            [[new]] = choose(own, [row], [r])
        else:
            p = distribution(choose, choose.scores(own, [row], [r]))[0]
            new = choose.sample(given(p, q, guess)[None], [[choose.part(r)]]).item()
        yield new
        row.append(new)
        if new != guess:
            return


def speculative(model, sources, B, room, choose, make_draft):
    """A strategy, as in generate.py, with the draft make_draft(sources, B, room, choose)."""
    check_room(choose, room)
    draft, decoding = make_draft(sources, B, room, choose), Decoding(model, sources, B, room)

    def step(rows, which):
        texts, drawn = draft(rows, which, min(GUESSES, room - 1 - max(map(len, rows))))  # one more is found
        logits = decoding.logits(texts, which, len(drawn) + 1)
        return [accepted(choose, logits[i], row, r, text[len(row) :], [q if q is None else q[i] for q in drawn])
                for i, (row, text, r) in enumerate(zip(rows, texts, which))]

    return step


lookup = partial(speculative, make_draft=lookup_draft)


def find(model, speculate, strategy="cached", overflow="refuse"):
    """The strategy that generate() is asked for. Raises UserError if there is none."""
    if overflow != "refuse":
        raise UserError(f"overflow={overflow!r:.60} does not go with speculate: wrong guesses are rewound, and "
                        f"what has slid away is gone; leave one of them out")
    if strategy != "cached":
        raise UserError(f"strategy={strategy!r:.60} does not go with speculate, which needs a cache: leave it out")
    if speculate == "lookup":
        return lookup
    if isinstance(speculate, Examples):
        if speculate.vocab_size > model.config.vocab_size:
            raise UserError(f"speculate: the examples have the id {speculate.vocab_size - 1}, and vocab_size="
                            f"{model.config.vocab_size}: encode them with the model's tokenizer")
        return partial(speculative, make_draft=partial(examples_draft, speculate))
    if not isinstance(speculate, torch.nn.Module):
        raise UserError(f"speculate={speculate!r:.60} is not 'lookup', Examples or a model: leave it out for no "
                        f"guesses")
    for what in "is_encoder_decoder", "vocab_size":
        theirs, ours = (getattr(each.config, what) for each in (speculate, model))
        if theirs != ours:
            raise UserError(f"{what}={theirs} of the draft is {ours} in the model: choose a draft of the same kind "
                            f"with the same tokenizer")
    return partial(speculative, make_draft=partial(model_draft, speculate))
