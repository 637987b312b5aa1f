"""
Choosing the next token from its logits: greedily, or by chance among the likely ones.

First RULES, which a model's publishers may set, forbid tokens; then comes the most likely one, or a draw, at a
temperature, from what FILTERS leave of the likely ones. A new way of sampling is one entry in one of the two tables,
and the field of Choice that has its name. This file knows logits and the rows so far, and nothing of where they come
from. Shapes: B rows, V vocabulary.
"""

import math
from dataclasses import dataclass

import torch

from plumbing.errors import NonFiniteError, UserError


@dataclass(slots=True)
class Choice:
    """
    How a token is chosen from its logits. The default is greedy: the most likely one, the lowest id among equals. Each
    filter works on what the one before it left.
    """

    temperature: float = 0.0            # logits are divided by this; 0 = greedy
    top_k: int | None = None            # keep the k most likely tokens
    top_p: float | None = None          # keep the most likely ones until they have probability p (Holtzman et al. 2019)
    min_p: float | None = None          # keep those at least this fraction as likely as the most likely one
    seed: int | None = None             # of the draws; None = different every time
    n_vocab: int | None = None          # ids from here on are never chosen: a model's vocabulary may be padded
    min_length: int = 0                 # no end before a row has this many tokens, the decoder's start included
    no_repeat_ngram: int | None = None  # no sequence of this many tokens may occur twice in a row
    forced_first: int | None = None     # the id that must follow the decoder's start token
    forced_last: int | None = None      # the id that must come last if a row is as long as allowed

    def validate(self):
        if not isinstance(self.temperature, int | float) or not 0 <= self.temperature < math.inf:
            raise UserError(f"temperature={self.temperature!r:.60} must be a finite number, 0 (greedy) or above")
        for name, least in (("top_k", 1), ("no_repeat_ngram", 1), ("n_vocab", 1), ("seed", 0), ("min_length", 0)):
            value = getattr(self, name)
            if value != getattr(Choice(), name) and (type(value) is not int or not least <= value < 2**63):
                raise UserError(f"{name}={value!r:.60} must be a whole number, at least {least} and less than 2**63; "
                                f"leave it out for no such rule")
        for name in ("top_p", "min_p"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int | float) or not 0 <= value <= 1):
                raise UserError(f"{name}={value!r:.60} is a probability: choose it from 0 to 1")


# -----------------------------------------------------------------------------
# Rules: what is forbidden in one row becomes minus infinity in its scores (V,). row: its ids so far; ends: the ids that
# end it; limit: the length at which it is cut. Filters: of probabilities (B, K) in falling order, which to keep; the
# first is always kept. Each is asked if the field of its name is set, and gets its value.


def no_repeat_ngram(scores, n, row, ends, limit):
    newest = row[len(row) + 1 - n :]  # n - 1 ids: whatever followed them before is forbidden now
    for i in range(len(row) + 1 - n):
        if row[i : i + n - 1] == newest:
            scores[row[i + n - 1]] = -torch.inf


def min_length(scores, n, row, ends, limit):
    if len(row) < n:
        scores[ends] = -torch.inf


def force(scores, id, now):
    if now:
        scores[:] = -torch.inf
        scores[id] = 0.0


RULES = {
    "no_repeat_ngram": no_repeat_ngram,
    "min_length": min_length,
    "forced_first": lambda scores, id, row, ends, limit: force(scores, id, len(row) == 1),
    "forced_last": lambda scores, id, row, ends, limit: force(scores, id, len(row) + 1 == limit),
}
FILTERS = {  # top_k needs none: it is K, how many are put in order at all, which would take a tenth of a small step
    "top_p": lambda probs, p: probs.cumsum(-1) - probs < p,  # what is more likely has not reached p yet
    "min_p": lambda probs, p: probs >= p * probs[:, :1],
}


class Chooser:
    """
    Chooses by a Choice, with a random generator of its own. ends: the ids that end a row; limits: the length at which
    each row of the request is cut, None for nowhere. A row is known by its number in the request, because rows that end
    leave the batch. Raises UserError on a choice that makes no sense.
    """

    def __init__(self, choice, device="cpu", ends=(), limits=None):
        choice.validate()
        self.choice, self.ends, self.limits = choice, list(ends), limits
        self.rules, self.filters = self.that_are_set(RULES), self.that_are_set(FILTERS)
        self.generator = torch.Generator(device)
        self.generator.seed() if choice.seed is None else self.generator.manual_seed(choice.seed)

    def that_are_set(self, table):
        """(function, value) of every entry whose field does not have its default."""
        values = {name: getattr(self.choice, name) for name in table}
        return [(table[name], value) for name, value in values.items() if value != getattr(Choice(), name)]

    def __call__(self, logits, rows, which):
        """
        logits (B, V) of what comes next in each of B rows, lists of ids; which: their numbers -> B lists of one id.
        Raises NonFiniteError if no token can be chosen.
        """
        scores = self.scores(logits, rows, which)
        ids = scores.argmax(-1, keepdim=True) if self.choice.temperature == 0 else self.draw(scores)  # (B, 1)
        return ids.tolist()

    def scores(self, logits, rows, which):
        """The logits in fp32 or more, with minus infinity where a rule forbids."""
        scores = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if self.rules:
            scores = scores.clone()  # the logits are somebody else's
            for own, row, r in zip(scores, rows, which):
                limit = self.limits[r] if self.limits else math.inf
                for rule, value in self.rules:
                    rule(own, value, row, self.ends, limit)
        scores = scores[:, : self.choice.n_vocab]
        if not scores.amax(-1).isfinite().all():
            raise NonFiniteError("no token can be chosen from these logits: the weights are damaged, their dtype "
                                 "overflows, or the rules forbid every token")
        return scores

    def draw(self, scores):
        """Sample ids (B, 1) from scores (B, V) at the temperature, after the filters."""
        probs, ids = self.likely(scores)
        return ids.gather(-1, self.sample(probs))

    def likely(self, scores):
        """Scores (B, V) at the temperature, after the filters: probs (B, K), the most likely first, and their ids."""
        most = scores.amax(-1, keepdim=True)  # relative to it nothing overflows, however small the temperature
        probs = ((scores - most) / max(self.choice.temperature, 1e-30)).softmax(-1)
        probs, ids = probs.topk(min(self.choice.top_k or probs.size(-1), probs.size(-1)))  # the most likely first
        for keep, value in self.filters:
            probs = probs / probs.sum(-1, keepdim=True)
            probs[:, 1:] *= keep(probs, value)[:, 1:]
        return probs / probs.sum(-1, keepdim=True), ids

    def sample(self, probs):
        """The places (B, 1) of draws from distributions (B, K)."""
        return torch.multinomial(probs, 1, generator=self.generator)
