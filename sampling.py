"""
Choosing the next token from its logits: greedily, or by chance among the likely ones.

First RULES, which a model's publishers may set, lower or forbid tokens; then comes the most likely one, or a draw, at a
temperature, from what FILTERS leave of the likely ones. A new way of sampling is one entry in one of the two tables,
and the field of Choice that has its name. This file knows logits and the rows so far, and nothing of where they come
from. Shapes: B rows, T tokens of the longest one, V vocabulary.
"""

import math
from dataclasses import dataclass
from functools import cache
from random import Random, SystemRandom
from typing import NamedTuple

import torch
from torch.nn import functional as F

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
    seed: int | None = None             # of the draws, each row's with its own number; None = different every time
    n_vocab: int | None = None          # ids from here on are never chosen: a model's vocabulary may be padded
    repetition_penalty: float = 1.0     # makes what is in the row less likely, above 1 (Keskar et al. 2019)
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
        penalty = self.repetition_penalty
        if not isinstance(penalty, int | float) or not 0 < penalty < 2**63:
            raise UserError(f"repetition_penalty={penalty!r:.60} must be a number above 0 and less than 2**63; 1 is no "
                            f"penalty")


# -----------------------------------------------------------------------------
# Rules: each changes the scores of all rows in place; what is forbidden becomes minus infinity. Filters: of
# probabilities (B, K) in falling order, which to keep; the first is always kept. Each is asked if the field of its name
# is set, and gets its value.


class Texts(NamedTuple):
    """What rules know of the rows, whose scores are (B, V + 1): the last column is that of padding, and is dropped."""

    ids: torch.Tensor      # (B, T), padded on the left with V
    lengths: torch.Tensor  # (B, 1), without the padding
    limits: torch.Tensor   # (B, 1), the length at which a row is cut, 0 for nowhere
    ends: torch.Tensor     # the ids that end a row


def repetition_penalty(scores, penalty, texts):
    seen = scores.gather(1, texts.ids)  # from the scores as they were: what was seen twice is not punished twice
    scores.scatter_(1, texts.ids, torch.where(seen < 0, seen * penalty, seen / penalty))


def no_repeat_ngram(scores, n, texts):
    T = texts.ids.size(1)
    if n <= T:
        grams, newest = texts.ids.unfold(1, n, 1), texts.ids[:, None, T + 1 - n :]  # (B, T + 1 - n, n), (B, 1, n - 1)
        again = (grams[:, :, :-1] == newest).all(-1)  # what followed these n - 1 ids is forbidden now
        scores.scatter_(1, grams[:, :, -1].where(again, scores.size(1) - 1), -torch.inf)


def min_length(scores, n, texts):
    scores[:, texts.ends] = scores[:, texts.ends].masked_fill(texts.lengths < n, -torch.inf)


def force(scores, id, now):
    scores.masked_fill_(now, -torch.inf)
    scores[:, id : id + 1].masked_fill_(now, 0.0)


RULES = {  # in the order of transformers
    "repetition_penalty": repetition_penalty,
    "no_repeat_ngram": no_repeat_ngram,
    "min_length": min_length,
    "forced_first": lambda scores, id, texts: force(scores, id, texts.lengths == 1),
    "forced_last": lambda scores, id, texts: force(scores, id, texts.lengths + 1 == texts.limits),
}
FILTERS = {  # top_k needs none: it is K, how many are put in order at all, which would take a tenth of a small step
    "top_p": lambda probs, p: probs.cumsum(-1) - probs < p,  # what is more likely has not reached p yet
    "min_p": lambda probs, p: probs >= p * probs[:, :1],
}


def check_finite(finite):
    """Raise NonFiniteError unless in all rows, a bool of each, the best score was a finite number."""
    if not all(finite):
        raise NonFiniteError("no token can be chosen from these logits: the weights are damaged, their dtype "
                             "overflows, or the rules forbid every token")


def most_likely(scores):
    """The ids (B, 1) of the greatest scores (B, V). In a CPU's memory NumPy finds them in a fifth of the time."""
    if scores.device.type != "cpu":
        return scores.argmax(-1, keepdim=True)
    return torch.from_numpy(scores.numpy().argmax(-1, keepdims=True))


class Chooser:
    """
    Chooses by a Choice. ends: the ids that end a row; limits: the length at which each row of the request is cut, None
    for nowhere. A row is known by its number in the request, because rows that end leave the batch; it draws with a
    random generator of its own, made from the seed and its number, so whoever is beside it changes nothing. Raises
    UserError on a choice that makes no sense.
    """

    def __init__(self, choice, device="cpu", ends=(), limits=None):
        choice.validate()
        self.choice, self.limits, self.device = choice, limits, device
        self.ends = torch.tensor(list(ends), dtype=torch.long, device=device)
        self.rules, self.filters = self.that_are_set(RULES), self.that_are_set(FILTERS)
        self.temperature = max(choice.temperature, 1e-30)  # what a draw divides by
        seed = SystemRandom().getrandbits(63) if choice.seed is None else choice.seed
        self.generator = cache(lambda r: Random(f"{seed} {r}"))  # of row number r
        self.watch = None  # is shown the logits, as scores() gets them

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
        greedy = self.choice.temperature == 0
        ids = most_likely(scores) if greedy else self.draw(scores, [[self.part(r)] for r in which])
        return ids.tolist()

    def scores(self, logits, rows, which):
        """The logits in fp32 or more, with minus infinity where a rule forbids."""
        if self.watch:
            self.watch(logits, rows, which)
        scores, V = logits.to(torch.promote_types(logits.dtype, torch.float32)), logits.size(-1)
        if self.rules:
            scores, texts = F.pad(scores, (0, 1)), self.texts(rows, which, V)  # a copy: the logits are not ours
            for rule, value in self.rules:
                rule(scores, value, texts)
        scores = scores[:, :V][:, : self.choice.n_vocab]
        check_finite(map(math.isfinite, scores.amax(-1).tolist()))
        return scores

    def texts(self, rows, which, V):
        """The Texts that these rows are, in a vocabulary of V."""
        tensor = lambda lists: torch.tensor(lists, dtype=torch.long, device=self.device)
        lengths, T = [[len(row)] for row in rows], max(map(len, rows))
        limits = [[self.limits[r] if self.limits else 0] for r in which]
        ids = [[V] * (T - len(row)) + list(row) for row in rows]
        return Texts(tensor(ids), tensor(lengths), tensor(limits), self.ends)

    def part(self, r):
        """By which part of the whole, in (0, 1], row number r draws next: then somebody reaches it."""
        return 1 - self.generator(r).random()

    def draw(self, scores, parts):
        """Sample ids (B, 1) from scores (B, V) at the temperature, after the filters."""
        probs, ids = self.likely(scores)
        return ids.gather(-1, self.sample(probs, parts))

    def likely(self, scores):
        """Scores (B, V) at the temperature, after the filters: probs (B, K) and their ids, in order if need be."""
        most = scores.amax(-1, keepdim=True)  # relative to it nothing overflows, however small the temperature
        probs = ((scores - most) / self.temperature).softmax(-1)
        V = probs.size(-1)
        ids = torch.arange(V, device=probs.device).expand(probs.shape)
        if self.choice.top_k or self.filters:  # else putting all in order would take 5 ms of a laptop's step
            probs, ids = probs.topk(min(self.choice.top_k or V, V))  # the most likely first
        for keep, value in self.filters:
            probs = probs / probs.sum(-1, keepdim=True)
            probs[:, 1:] *= keep(probs, value)[:, 1:]
        return probs / probs.sum(-1, keepdim=True), ids

    def sample(self, probs, parts):
        """The places (B, 1) of draws from distributions (B, K): where that part (B, 1) of the whole is reached."""
        upto = probs.cumsum(-1).where(probs > 0, 0)  # on a GPU a sum may grow by rounding where nothing is added
        reached = upto >= upto.amax(-1, keepdim=True) * torch.as_tensor(parts, dtype=upto.dtype, device=upto.device)
        return reached.int().argmax(-1, keepdim=True)  # the first who does
