"""The exercises of lesson 9."""

import torch

from attention import Causal, attend, attend_explicit, dense
from course import Task
from sparse import Block, Column, Columns, Fixed, Local, Strided

POS = torch.arange(17)
Q, K = POS[:, None], POS
N, L = 1024, 32  # of the pairs
LONG, FAR = 4096, 64  # of the slots


def entries(pattern, n):
    pos = torch.arange(n)
    return dense(pattern.allows, pos, pos).sum().item()


def mask(pattern, n=24):
    pos = torch.arange(n)
    return dense(pattern.allows, pos, pos)[0, 0]


def draw(n, l):
    generator = torch.Generator().manual_seed(n)
    return *(torch.randn(2, 3, n, 4, dtype=torch.float64, generator=generator) for _ in range(3)), l


def folded(q, k, v, l, is_causal):
    y = attend(*(x.unflatten(2, (-1, l)).transpose(1, 2).flatten(0, 1) for x in (q, k, v)), is_causal=is_causal)
    return y.unflatten(0, (len(q), -1)).transpose(1, 2).flatten(2, 3)


def not_unfolded(q, k, v, l):
    return attend(*(x.unflatten(2, (-1, l)).transpose(1, 2).flatten(0, 1) for x in (q, k, v)), is_causal=True)


FUTURE = "Some of your pairs look into the future: no key may stand behind its query."
BRACKETS = ("Positions are tensors here: write & and | instead of and, or, not, and put every comparison in brackets, "
            "because & binds more tightly than <=.")
sizes = [pattern.slots(LONG)[0].size for pattern in (Causal(0.0), Local(FAR), Strided(FAR), Fixed(FAR, 1))]

TASKS = {
    "causal_pairs": Task(
        N * (N + 1) // 2,
        wrong=[(N * N, "That is the full square. How many keys does the first query see, and how many the last?"),
               (N * (N - 1) // 2, "A query sees its own position as well: the diagonal counts."),
               (N * N // 2, "Half of the square would cut the diagonal in two: sum 1 + 2 + ... + n instead.")],
        hint="Query i, counted from 0, sees i + 1 keys."),
    "local": Task(
        lambda q, k, w: Local(w).allows(0, 0, q, k), cases=[(Q, K, 4), (Q, K, 1), (Q, K, 30)],
        wrong=[(lambda q, k, w: q - k < w, FUTURE),
               (lambda q, k, w: (k <= q) & (q - k <= w), "That window has one position too many: one's own is among "
                "the w."),
               (lambda q, k, w: (q - k).abs() < w, "That window looks both ways: a decoder sees only what lies before "
                "it."),
               (lambda q, k, w: (k < q) & (q - k < w), "A query must see its own position too."),
               (lambda q, k, w: k <= q and q - k < w, BRACKETS)],
        hint="Print your predicate on a few positions: a query at 10 with w = 4 sees 7, 8, 9 and 10."),
    "strided": Task(
        lambda q, k, l: Strided(l).allows(0, 0, q, k), cases=[(Q, K, 4), (Q, K, 3), (Q, K, 1)],
        wrong=[(lambda q, k, l: (q - k < l) | ((q - k) % l == 0), FUTURE),
               (lambda q, k, l: (k <= q) & ((q - k) % l == 0), "These are only the far ones. The newest l are "
                "missing."),
               (lambda q, k, l: (k <= q) & ((q - k < l) | (k % l == 0)), "You count the strides from the beginning of "
                "the text. In the strided pattern they are counted backwards from the query."),
               (lambda q, k, l: (k <= q) & (q - k < l) & ((q - k) % l == 0), "A key is seen for one reason or for the "
                "other: that is a union.")],
        hint="A query at 10 with l = 4 sees 2 and 6, and 7 to 10."),
    "fixed": Task(
        lambda q, k, l, c: Fixed(l, c).allows(0, 0, q, k), cases=[(Q, K, 4, 1), (Q, K, 5, 2), (Q, K, 3, 3)],
        wrong=[(lambda q, k, l, c: (q // l == k // l) | (k % l >= l - c), FUTURE),
               (lambda q, k, l, c: (k <= q) & ((q // l == k // l) | (k % l < c)), "These are the first c of each "
                "block. Only the last ones can have seen the rest of their block."),
               (lambda q, k, l, c: (k <= q) & (k % l >= l - c), "A query must see its own block too, not only the "
                "columns."),
               (lambda q, k, l, c: (k <= q) & ((q - k < l) | (k % l >= l - c)), "That is a window which moves with the "
                "query. A block stands still: ask whether both have the same position // l.")],
        hint="A query at 10 with l = 4 and c = 1 sees 3 and 7, and 8 to 10."),
    "fixed_pairs": Task(
        N * L,
        wrong=[(N * (L + 1) // 2, "These are the pairs within the blocks. The columns of the earlier blocks come on "
                "top."),
               (L * L * (L - 1) // 2, "These are the pairs with earlier blocks. Each query sees its own block too."),
               (N * (2 * L - 1), "You take the longest row n times: most rows are shorter, at both ends of their "
                "part."),
               (entries(Strided(L), N), "That is the strided pattern, which has more of them.")],
        hint="Count the two parts apart: n/l triangles of side l, and, for a query in block b, one column for each of "
             "the b blocks before it.",
        praise="n(l + 1)/2 + n(l - 1)/2 = n l: the triangle and the columns fit together without a remainder."),
    "stride_kept": Task(
        "c",
        wrong=[("a", "A constant factor would shift a line on logarithmic axes, not tilt it."),
               ("b", "The window is constant, so its part grows like n. Is it the only part?"),
               ("d", "The count is a sum of two powers. Which part wins when n is large?")],
        hint="Answer with a letter, such as \"a\".",
        praise="Each query sees n / (2 l) far keys on average, so n sqrt(n) needs a stride that grows like sqrt(n)."),
    "reach": Task(
        lambda first, second: (second.double() @ first.double()) > 0,
        cases=[(mask(Block(4)), mask(Columns(4, 1))), (mask(Columns(4, 1)), mask(Block(4))), (mask(Local(3)),) * 2],
        wrong=[(lambda first, second: (first.double() @ second.double()) > 0, "The order is the other way round: query "
                "i asks m in the second layer, and m has asked j in the first."),
               (lambda first, second: first | second, "That is what one layer with both patterns sees. Two layers in "
                "turn go through some m in the middle."),
               (lambda first, second: first & second, "That is what both layers see directly. The way may lead through "
                "any m in the middle."),
               (lambda first, second: second.double() @ first.double(), "You count the ways. Only whether there is one "
                "matters here."),
               (lambda first, second: second @ first, "PyTorch multiplies no matrices of booleans: make numbers of "
                "them.")],
        hint="i reaches j if there is an m with second[i, m] and first[m, j]."),
    "orders": Task(
        "b",
        wrong=[("a", "Follow one key in the middle of an early block, with the fixed pattern and columns first: who "
                "sees it?"),
               ("c", "With columns first, a layer gathers from the ends of blocks, which then know only about ends and "
                "themselves."),
               ("d", "Take query 20 and key 9 with l = 4, and look for a position in the middle.")],
        hint="Answer with a letter, such as \"a\"."),
    "blocks": Task(
        lambda q, k, v, l: Block(l).fold(q, k, v), cases=[draw(12, 4), draw(12, 3), draw(8, 8)], close=1e-10,
        wrong=[(lambda q, k, v, l: attend_explicit(q, k, v)[0], "That is attention to everything: nothing has been "
                "cut."),
               (lambda q, k, v, l: attend(q, k, v, is_causal=True), "That is causal attention over the whole text: "
                "where are the blocks?"),
               (lambda q, k, v, l: folded(q, k, v, l, False), "The blocks are right, but within them queries look "
                "ahead: is_causal=True."),
               (lambda q, k, v, l: Column(l).fold(q, k, v), "You have put every l-th position together. unflatten(2, "
                "(-1, l)) makes blocks of l neighbours, and these neighbours must stay the axis before the last."),
               (not_unfolded, "The blocks are right, but they are still rows of the batch: bring the result back to "
                "(B, H, n, D).")],
        hint="x.unflatten(2, (-1, l)) is (B, H, n/l, l, D). attend() takes four axes, so let blocks become rows of the "
             "batch."),
    "must_keep": Task(
        lambda allowed, t: allowed[t:, : t + 1].any(0).sum(),
        cases=[(mask(pattern), t) for pattern in (Local(4), Fixed(4, 1), Strided(4), Causal(0.0)) for t in (2, 9, 22)],
        wrong=[(lambda allowed, t: allowed[t, : t + 1].sum(), "That is what this step reads. A later one may ask for a "
                "key that this one passes over."),
               (lambda allowed, t: allowed[t + 1 :, : t + 1].any(0).sum(), "Query t itself has yet to read: it counts "
                "too."),
               (lambda allowed, t: allowed[t:, :t].any(0).sum(), "The key of position t has been stored as well."),
               (lambda allowed, t: allowed[t:, : t + 1].sum(), "Several queries may see one key, which is stored "
                "once."),
               (lambda allowed, t: allowed[t:].any(0).sum(), "Keys of later positions are not there yet.")],
        hint="Of the columns up to t, count those with a True in row t or below."),
    "slots": Task(
        sizes,
        wrong=[([*sizes[:2], sizes[3], sizes[3]], "A strided step reads few keys. But which positions will no later "
                "step read?"),
               ([*sizes[:3], FAR], "The fixed pattern keeps more than its own block: what sums up the earlier ones?"),
               ([*sizes[:3], 2 * FAR], "Nearly: the last position of a block is in its block, and is its summary. It "
                "needs one slot."),
               ([LONG] * 4, "A pattern for which nothing may be forgotten is among them, but not all are like that."),
               ([sizes[0], LONG, *sizes[2:]], "What has left the window never comes back.")],
        hint="Four numbers: full, local, strided, fixed. Try your must_keep on small masks and look for the largest.",
        praise="A strided step reads as little as a fixed one, but only fixed can forget."),
    "first_wrong": Task(
        7,
        wrong=[(8, "Positions count from 0. How many does a query see at first, before its window is full?"),
               (6, "Query 6 sees positions 0 to 6. How many are these?"),
               (0, "With few positions stored nothing has been overwritten yet."),
               (15, "The window need not be overwritten twice: one missing key is enough.")],
        hint="Which query is the first to see 8 positions?"),
    "speaks": Task(
        {"c", "d"},
        wrong=[({"a", "b", "c", "d"}, "Not all: some of these never store a position. Which do?"),
               ({"a", "c", "d"}, "The fold computes a whole text at once. Does it ask slots() anything?"),
               ({"c"}, "One more of them decodes, token by token, and compares with the whole text."),
               ({"d"}, "One more of them looks into the slots."),
               ({"a", "b"}, "These compute with predicates and whole texts. The change is in what the cache keeps.")],
        hint="Answer with a set of letters, such as {\"a\", \"b\"}."),
}
