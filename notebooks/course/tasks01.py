"""The exercises of lesson 1."""

import math

import torch

from attention import Causal, attend_explicit, dense, head_sizes
from course import Task
from model import GPT

X = torch.tensor([[1., 0, 0, 0], [0, 1, 0, 1], [0, 0, 1, 2]])              # the, cat, is
WQ = torch.tensor([[1., 2, 0, 0], [2, 1, 0, -1], [0, 1, -1, 0], [0, 0, 0, 1]])
WK = torch.diag(torch.tensor([2., 2, 2, 1]))
WV = torch.tensor([[1., 0, 2, 1], [0, 2, 0, 1], [1, 1, 0, 1], [0, 0, 0, 0]])
Q, K, V = X @ WQ, X @ WK, X @ WV
HEAD = [x[None, None] for x in (Q, K, V)]           # (B, H, T, D)
OUT, ALL = (x[0, 0] for x in attend_explicit(*HEAD))  # outputs and weights, without a mask
LOWER = torch.ones(3, 3).tril().bool()
CAUSAL = attend_explicit(*HEAD, LOWER)[1][0, 0]

torch.manual_seed(1)
ROWS = [(torch.randn(2, 3), torch.randn(5, 3)), (torch.randn(1, 16), torch.randn(4, 16)), (Q, K)]
SCORES = [(ALL.log(),), (torch.randn(2, 5),), (torch.tensor([[0., 100.], [1000., 999.]]),)]
PLACES = [(torch.arange(start, stop), torch.arange(stop)) for start, stop in ((0, 3), (4, 5), (3, 5))]  # queries, keys


def asked(may, q, k):
    """The mask that a predicate of two positions makes, as attention.py makes it."""
    return dense(lambda b, h, q, k: may(q, k), q, k)


def softmax_of(rows):
    return lambda scores: rows(scores.exp())


TASKS = {
    "query": Task(Q[2], wrong=[
        (WQ @ X[2],
         "You met the rows of W_Q with x, one by one. In X W_Q each entry of x says how much of a *row* of W_Q is "
         "taken, and the rows are added."),
        (WQ[2],
         "That is the row of the feature 'verb' alone. The last entry of x, the position, is 2: what does it take?"),
        (WQ[2] + WQ[3], "The last row is there once. How often does x take it?"),
        (Q[1], "That is the query of 'cat'."),
        (K[2], "That is the key of 'is': the query is made by W_Q."),
    ], praise="Two rows of W_Q matter, the last one twice; the other two are multiplied by 0."),

    "scores": Task(lambda q, k: q @ k.T / math.sqrt(q.size(-1)), cases=ROWS, wrong=[
        (lambda q, k: k @ q.T / math.sqrt(q.size(-1)),
         "Rows belong to the queries and columns to the keys: here it is the other way round."),
        (lambda q, k: q @ k.T, "The products are right. What does the equation do with them before the softmax?"),
        (lambda q, k: q @ k.T / q.size(-1), "You divide by d, and the equation by its root."),
        (lambda q, k: q @ k.T / math.sqrt(len(k)),
         "That is the root of the number of keys: d is how long one key is."),
        (lambda q, k: q @ k / math.sqrt(q.size(-1)),
         "The product Q K does not fit: what turns the keys into columns?"),
    ], hint="Compare shapes first: q is (T, d), k is (S, d), the scores are (T, S)."),

    "weights": Task(lambda scores: scores.softmax(-1), cases=SCORES, wrong=[
        (softmax_of(lambda e: e / e.sum(-1, keepdim=True)),
         "This is the definition to the letter, and right for small scores. On the last case a score is 1000, and e to "
         "the 1000 is no float: what may be subtracted from a whole row without changing the quotient?"),
        (lambda scores: (e := (scores - scores.max()).exp()) / e.sum(-1, keepdim=True),
         "You subtract the largest score of the table. A row far below it becomes 0 / 0: subtract the row's own."),
        (softmax_of(lambda e: e / e.sum(-1)),
         "The sums are the right ones, but they lie in a row and are divided column by column: keepdim=True keeps each "
         "beside its row."),
        (lambda scores: scores.softmax(0), "Each column sums to one here. Who shares out: the query, or the key?"),
        (softmax_of(lambda e: e), "These are the numerators: they do not sum to one yet."),
        (softmax_of(lambda e: e / e.sum()), "The whole table sums to one: each *row* should."),
        (lambda scores: scores / scores.sum(-1, keepdim=True),
         "Divided by the sum, but where is the exponential? A negative score would become a negative weight."),
    ], hint="Exponentials, divided by their sum along a row."),

    "peak": Task(ALL[2, 1], close=1e-3, wrong=[
        ((Q @ K.T).softmax(-1)[2, 1],
         "That is the softmax of 0, 4 and 2: the scores before they are divided by the root of 4."),
        ((Q @ K.T / 4).softmax(-1)[2, 1],
         "That is the softmax of the scores divided by 4: the root of 4 is asked for."),
        (2 / 3, "Two thirds is the share of 2 in 0 + 1 + 2. The softmax takes the shares of their exponentials."),
        (ALL[2, 2], "That is the weight of 'is' on itself."),
    ], praise="The score is one above the next, so the weight is e times the next: ratios of weights come from "
              "differences."),

    "output": Task(OUT[2], close=0.02, wrong=[
        (ALL[2] @ V[:, :3], "The fourth entry is missing: an output is as long as a value."),
        (V[1], "That is the value of 'cat' alone. The other two weigh little, but not nothing."),
        (V.mean(0), "That is the plain mean: the three values do not weigh the same."),
        (V @ ALL[2].new_tensor([*ALL[2], 0]),
         "You have met each value with the weights. Each value is multiplied by *one* weight, and the three are "
         "added."),
        (ALL[2] @ K, "Those are the keys, averaged: keys decide the weights, values are what is passed on."),
    ], praise="The last entry is 1 in every value, so it is 1 in every average."),

    "masked": Task(CAUSAL[1], close=3e-3, wrong=[
        (ALL[1], "This is what 'cat' sees without a mask: 'is' stands behind it."),
        (ALL[1] * LOWER[1],
         "The last weight is gone, and nobody has shared it out: what remains must sum to one again."),
        (CAUSAL[1, :2], "Two weights that are right. The third is a number as well."),
        (torch.tensor([0.5, 0.5, 0]), "Two keys are left, but their scores are 2 and 1, so not alike."),
        (torch.tensor([1., 0, 0]), "'cat' sees the token before it, and itself as well."),
    ], praise="A score of -inf before the softmax: its exponential is 0, and the others share out 1."),

    "may": Task(lambda q, k: Causal.allows(None, None, q, k), cases=PLACES, run=asked, wrong=[
        (lambda q, k: k < q, "A token sees itself too; with this, the first sees nothing, and its weights are 0 / 0."),
        (lambda q, k: k >= q, "This looks ahead: the query may see what comes after it."),
        (lambda q, k: k == q, "Everybody sees itself alone: where is the past?"),
        (lambda q, k: k != q + 1, "The next token is hidden, and the ones after it are not."),
        (lambda q, k: torch.ones(q.size(-2), k.size(-1)).tril().bool(),
         "Right for the square, wrong from the second case on: a triangle counts from the corner, and the query of "
         "the second case stands at position 4. Compare q and k, which are positions."),
    ], hint="q and k are whole tensors of positions: compare them with each other, and return what the comparison "
            "gives."),

    "picture": Task("b", wrong=[
        ("a", "Every row has a largest score, and the softmax has no other use for it."),
        ("c", "The weights are made anew in every row. Which scores does the mask take from this one?"),
        ("d", "Try it with other matrices: this row would stay the same again."),
    ]),

    "packed": Task(lambda WQ, WK, WV: torch.cat([WQ, WK, WV], 1).T,
                   cases=[(WQ, WK, WV), (torch.arange(4.).view(2, 2), torch.eye(2), torch.ones(2, 2))], wrong=[
        (lambda WQ, WK, WV: torch.cat([WQ, WK, WV], 1),
         "Side by side is right. But nn.Linear computes x A^T: it keeps its matrix as (out, in)."),
        (lambda WQ, WK, WV: torch.cat([WQ, WK, WV]),
         "The shape is right, and each of the three still has to be transposed."),
        (lambda WQ, WK, WV: torch.cat([WK, WQ, WV], 1).T,
         "All three are there, in another order than qkv() splits them."),
        (lambda WQ, WK, WV: torch.cat([WQ.T, WK.T, WV.T], 1),
         "Each is transposed as it should be; then they belong one below the other."),
    ], hint="What comes out of x A^T has the queries first, then the keys, then the values."),

    "root": Task(math.sqrt(head_sizes(GPT.get_default_config())[2]), close=0.01, wrong=[
        (math.sqrt(768), "That is the root of the embedding's width. How long is one key of one head?"),
        (64, "That is what stands under the root."),
        (math.sqrt(12), "That is the root of the number of heads."),
        (1 / 8, "That is what the scores are multiplied by: the divisor is asked for."),
    ], hint="The root of the length of one head's key."),

    "speaks": Task(["loop"], wrong=[
        ([],
         "A wrong divisor that no test notices would be a gap in the tests. Does the loop know how many heads there "
         "are?"),
        (["seed", "loop"],
         "The seed's layer has one head. What is 1 times D? (And it runs attend(), not the one you broke.)"),
        (["seed"], "The seed's layer has one head: what is 1 times D?"),
    ], hint='A list of the words "seed" and "loop", of those that will fail.',
        praise="With one head the two are the same number, so only a test with several can see it."),

    "entries": Task((1024**2, 1024 * 1025 // 2), wrong=[
        ((1024**2, 1024 * 1023 // 2), "The triangle without its diagonal: a token sees itself as well."),
        ((1024**2, 1024**2 // 2), "Half the square counts half of the diagonal: all of it is seen."),
        ((1024, 1024), "That is one row of the table: there are as many rows as queries."),
        ((1024 * 1025 // 2, 1024**2), "Both are right, in the other order: without a mask first."),
    ], hint="A tuple: (entries without a mask, entries that the causal mask allows)."),

    "crossover": Task(2 * 768, wrong=[
        (4 * 768,
         "That is where Q K^T alone has caught up: weights times V is as large a product, so both come earlier."),
        (3 * 768 // 2, "Three matrices of C x C, q, k and v; after the heads comes a fourth, c_proj."),
        (768, "Write both down as multiplications: 4 C^2 for each of N tokens, and 2 N^2 C."),
    ], hint="4 N C^2 = 2 N^2 C. Solve for N, with C = 768.",
        praise="GPT-2 has room for 1,024 tokens: there the products with N^2 never catch up."),
}
