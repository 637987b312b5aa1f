"""The exercises of lesson 2."""

import math

import torch

from attention import attend_explicit
from course import NotYet, Task


def attention(q, K, V):
    """The project's attention of one query (d,): its output and its weights."""
    output, weights = attend_explicit(q[None, None, None], K[None, None], V[None, None])
    return output[0, 0, 0], weights[0, 0, 0]


def equation2(q, K):
    """The document's weights, which have no root of d."""
    return attention(unscaled(q), K, K)[1]


def filled(answer, *case):
    """What an answer returns, before anything is done with it."""
    if (returned := answer(*case)) is ...:
        raise NotYet
    return returned


def unscaled(q):
    return q * math.sqrt(q.size(-1))


def basis(n, d):
    return torch.linalg.qr(torch.randn(d, d, dtype=torch.float64)).Q[:n]


def alpha(s, n):
    """A function of floats: the weight of the meant key."""
    return equation2(s * torch.eye(n, dtype=torch.float64)[0], torch.eye(n, dtype=torch.float64))[0].item()


def first(n):
    return next(s for s in range(100) if alpha(s, n) >= 0.99)


def equal(k1, k2, r):
    """The part of r that is orthogonal to k1 - k2."""
    apart = k1 - k2
    return r - (r @ apart) / (apart @ apart) * apart


torch.manual_seed(2)
K, Q = torch.randn(5, 16, dtype=torch.float64), torch.randn(2, 16, dtype=torch.float64)
PAIRS = [tuple(torch.randn(3, d, dtype=torch.float64)) for d in (3, 8)]
CHOSEN = [([0, 2], 5.0), ([1], 3.0), ([0, 1, 3], 4.0)]

TASKS = {
    "unscaled": Task(unscaled, cases=[(q,) for q in Q], run=lambda answer, q: attention(filled(answer, q), K, K)[1],
                     wrong=[
        (lambda q: q, "Then the scores are divided by the root of d, and equation 2 does not divide."),
        (lambda q: q / math.sqrt(q.size(-1)), "Now they are divided twice."),
        (lambda q: q * q.size(-1), "attend_explicit divides by the root of d, and you multiply by d."),
    ], hint="What must the query be multiplied by, so that the division leaves q^T k?"),

    "keys": Task(basis, close=1e-10, cases=[(4, 8), (8, 8), (1, 3)],
                 run=lambda answer, *sizes: (k := filled(answer, *sizes)) @ k.mT, wrong=[
        (lambda n, d: basis(n, d).float(),
         "They are, to seven digits. Here errors far below that are measured: make them with dtype=torch.float64."),
        (lambda n, d: torch.randn(n, d),
         "Random vectors are nearly orthogonal at best, and not of length 1. What does torch.linalg.qr make of a "
         "random matrix?"),
        (lambda n, d: torch.nn.functional.normalize(torch.randn(n, d, dtype=torch.float64), dim=1),
         "Of length 1 they are, but not orthogonal to each other."),
        (lambda n, d: 3 * basis(n, d), "They are orthogonal, but not of length 1."),
        (lambda n, d: basis(d, d)[:, :n],
         "Orthonormal *columns*: the keys are rows, so n of them with d numbers each."),
    ], hint="n rows of d numbers: each with itself gives 1, each with another 0."),

    "alpha": Task(alpha, cases=[(1.0, 4), (5.0, 4), (0.0, 7), (3.0, 1000)], wrong=[
        (lambda s, n: math.exp(s) / (math.exp(s) + n),
         "One of the n keys is the meant one: how many others are there?"),
        (lambda s, n: math.exp(s) / (math.exp(s) + (n - 1) / math.e), "The other scores are 0: what is e to the 0?"),
        (lambda s, n: s / (s + n - 1), "Where are the exponentials of the scores s and 0?"),
        (lambda s, n: math.exp(s) / (n * math.exp(s)),
         "Only one of the keys scores s, the others are orthogonal to q."),
        (lambda s, n: 1 - math.exp(-s), "Good for a large s, but it forgets how many others compete."),
    ], hint="One score is s, n - 1 scores are 0."),

    "first": Task((first(4), first(1024)), wrong=[
        ((first(4), first(4)), "1,023 others compete in the second case, and only 3 in the first."),
        ((first(4) - 1, first(1024) - 1), "Just below: the weight is 0.98 there."),
        ((first(4), 1024 * first(4) // 4),
         "256 times the keys, but not 256 times the scale: what does an exponential do?"),
        ((2, 7),
         "From there on the meant value has half of the weight: for 0.99, how many times the others' sum must e^s be?"),
        ((3, 6), "With the logarithm to base 10: the softmax has e."),
    ], hint="e^s / (e^s + n - 1) >= 0.99 means e^s >= 99 (n - 1). A tuple: (for n = 4, for n = 1024)."),

    "below": Task((alpha(-20, 4), (1 - alpha(-20, 4)) / 3), close=1e-3, wrong=[
        ((alpha(20, 4), 0), "That is s = +20: now the meant key has the *lowest* score."),
        ((1 / 4, 1 / 4), "That is s = 0, where no key is preferred."),
        ((0, 1), "The three others have equal scores, so they share out what there is."),
        ((-1, 2 / 3), "A weight is an exponential divided by a sum of them: it is never negative."),
    ], hint="A tuple: (weight of the meant key, weight of each other). The scores are -20, 0, 0, 0."),

    "floor": Task("b", wrong=[
        ("a", "fp64 does the same sum, and still finds an error there."),
        ("c", "e^20 is 5e8, far from the largest fp32 number. And it would go up, not down."),
        ("d", "They are off by 1e-7 or so, which changes scores a little and not the end of the error."),
    ], praise="So in fp32 the document is right from about s = 20 on, thanks to rounding."),

    "factor": Task(10, wrong=[
        (1 / 0.9, "The competitors' scores are 0.9 s now. By how much does the meant key lead?"),
        (1, "Its lead over the others has shrunk, so the same s does less."),
        (9, "That is 0.9 / 0.1: what was the lead before, and what is it now?"),
        (100, "The lead went from 1 to 0.1, and it enters once."),
    ], praise="The lead is what counts: e^(s lead) must be 99 (n - 1)."),

    "most": Task(64, wrong=[
        (63, "Is there a reason why the last direction may not be a key?"),
        (2**64, "That many corners has a cube; most of their angles are not right ones."),
        (128, "A vector and its negative are not orthogonal: their product is -1."),
        (4096, "That is how many numbers 64 such keys have."),
    ], praise="Orthogonal vectors are linearly independent, and d dimensions have no more than d of those."),

    "found": Task(1000, wrong=[
        (64,
         "64 can be orthogonal. But does a key have to be orthogonal to the others to give the largest score with "
         "itself?"),
        (1, "Each of the 1,000 queries has its own key."),
        (0,
         "Not orthogonal is not yet hopeless: what is the product of a unit vector with itself, and what with "
         "another?"),
        (936, "1,000 - 64: but being beyond the 64th breaks nothing by itself."),
    ], praise="A unit vector's product with itself is 1, with any other less: the own key always leads."),

    "equal": Task(equal, cases=PAIRS, wrong=[
        (lambda k1, k2, r: torch.zeros_like(r),
         "The weights are equal indeed, because q = 0 asks for nothing. Among all q with equal weights, find the one "
         "nearest to r."),
        (lambda k1, k2, r: k1 + k2,
         "That works only for keys of the same length; and r is to be changed as little as possible."),
        (lambda k1, k2, r: k1 - k2, "This is the direction that q must have *nothing* of."),
        (lambda k1, k2, r: r - (r @ (k1 - k2)) * (k1 - k2),
         "Right for a difference of length 1: divide by its squared length."),
        (lambda k1, k2, r: equal(k1, -k2, r),
         "This is orthogonal to the sum of the keys. Which equation makes the scores equal?"),
    ], hint="Take from r what it has of k1 - k2, and nothing else."),

    "several": Task(lambda K, chosen, s: s * K[chosen].sum(0), cases=[(basis(5, 8), *case) for case in CHOSEN],
                    run=lambda answer, K, chosen, s: equation2(filled(answer, K, chosen, s), K), wrong=[
        (lambda K, chosen, s: s * K[chosen].mean(0),
         "Equal they are, but the mean is a shorter vector: with it each chosen key scores s / m, not s."),
        (lambda K, chosen, s: s * K.sum(0), "All keys score alike here: how do the others get 0?"),
        (lambda K, chosen, s: s * K[chosen[0]], "Only the first is asked for."),
        (lambda K, chosen, s: s * K[chosen].prod(0),
         "The product of two keys, entry by entry, is no direction of either."),
    ], hint="q is a sum. What does each of its terms score with each key?"),

    "generic": Task(8, wrong=[
        (7, "Seven differences leave one dimension of the eight. How many keys have seven differences to the first?"),
        (9,
         "Nine keys have eight differences, and only 0 is orthogonal to eight independent vectors in 8 dimensions."),
        (2, "Two keys are one condition on q, and q has eight numbers."),
    ], praise="m keys are m - 1 conditions, and 8 - (m - 1) dimensions are left."),
}
