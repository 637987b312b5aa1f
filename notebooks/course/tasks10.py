"""The exercises of lesson 10."""

import math

import torch
from torch.nn import functional as F

from cost import count
from course import Task
from generate import advance
from model import GPT, BARTConfig, EncoderLayer, GPTConfig

L, N = 6, 512  # layers and tokens of the stacks
WINDOW, PLACE, WIDE, DEEP = 3, 5, 12, 4  # of the cone
STEPS = 64  # predictions in a text of 65 tokens


def draw(*shape):
    generator = torch.Generator().manual_seed(len(shape) + shape[0])
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


def jacobian(W, h):
    J = torch.eye(len(W), dtype=W.dtype)
    for state in h:
        J = (1 - state**2)[:, None] * W @ J
    return J


def backwards(W, h):
    J = torch.eye(len(W), dtype=W.dtype)
    for state in h:
        J = J @ ((1 - state**2)[:, None] * W)
    return J


def scaled_columns(W, h):
    J = torch.eye(len(W), dtype=W.dtype)
    for state in h:
        J = W * (1 - state**2) @ J
    return J


def combine(first, then):
    (a, b), (c, d) = first, then
    return c * a, c * b + d


def scan(combine, a, b, step=1):
    while step < len(a):
        later = combine((a[:-step], b[:-step]), (a[step:], b[step:]))
        a, b = (torch.cat([x[:step], new]) for x, new in zip((a, b), later))
        step *= 2
    return b


def by_loop(combine, a, b):
    found = [(a[0], b[0])]
    for pair in zip(a[1:], b[1:]):
        found.append(combine(found[-1], pair))
    return torch.stack([h for _, h in found])


def too_few(combine, a, b):
    for i in range(int(math.log2(len(a)))):
        later = combine((a[: -(2**i)], b[: -(2**i)]), (a[2**i :], b[2**i :]))
        a, b = (torch.cat([x[: 2**i], new]) for x, new in zip((a, b), later))
    return b


def never_doubled(combine, a, b):
    for _ in range(math.ceil(math.log2(len(a)))):
        later = combine((a[:-1], b[:-1]), (a[1:], b[1:]))
        a, b = (torch.cat([x[:1], new]) for x, new in zip((a, b), later))
    return b


def shrinking(combine, a, b):
    step = 1
    while step < len(a):
        a, b = combine((a[:-step], b[:-step]), (a[step:], b[step:]))
        step *= 2
    return b


def counted(answer, a, b):
    """What a scan returns, and whether it called combine as often as scans do: some kinds need twice as many rounds."""
    calls = []
    h = answer(lambda *pairs: calls.append(1) or combine(*pairs), a, b)
    rounds = math.ceil(math.log2(len(a)))
    return None if h is None else [h, rounds <= len(calls) <= 2 * rounds + 1]


def encoder_layer():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return EncoderLayer(BARTConfig(n_head=2, n_embd=8)).double().eval()


def one_token(layer, x, i, residual=True):
    pos = torch.arange(x.size(1))
    q, k, v = layer.attn.qkv(x)
    seen = layer.attn.output(layer.attn.pattern(q[:, :, i : i + 1], k, v, pos[i : i + 1], pos))
    y = layer.ln_1(x[:, i : i + 1] * residual + seen)
    return layer.ln_2(y + layer.mlp(y))


def tiny_gpt():
    config = GPTConfig(n_layer=1, n_head=1, n_embd=8, vocab_size=11, block_size=16, tie_weights=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return GPT(config).double().eval()


def decoded_loss(model, ids, mean=False, own=False, shift=1):
    cache, total, text = model.new_cache(1), 0.0, list(ids[:1])
    for t in range(len(ids) - 1):
        logits = advance(model, [text], cache)[0, 0]
        total -= logits.log_softmax(-1)[ids[t + shift]].item()
        text.append(int(logits.argmax()) if own else ids[t + 1])
    return total / (len(ids) - 1) if mean else total


def all_at_once(model, ids):
    return F.cross_entropy(model(torch.tensor([ids[:-1]]))[0], torch.tensor(ids[1:]), reduction="sum")


def with_calls(answer, model, ids):
    with torch.no_grad(), count(model) as cost:
        loss = answer(model, ids)
    return None if loss is None else [loss, cost.steps]


IDS = torch.randint(11, (9,), generator=torch.Generator().manual_seed(0)).tolist()
spread = [min(1 + (layer + 1) * (WINDOW - 1), WIDE - PLACE) for layer in range(DEEP)]

TASKS = {
    "jacobian": Task(
        jacobian, cases=[(draw(3, 3), draw(T, 3).tanh()) for T in (1, 2, 5)],
        wrong=[(backwards, "The factors are right, their order is not: the newest step stands leftmost, since it acts "
                "last."),
               (scaled_columns, "1 - h^2 belongs to what comes out of W, so it scales the rows of W, not its columns."),
               (lambda W, h: torch.linalg.matrix_power(W, len(h)), "The tanh is missing: its derivative is 1 - tanh^2, "
                "and h holds the tanh."),
               (lambda W, h: (1 - h[-1] ** 2)[:, None] * W, "That is the last step alone. The others stand before "
                "it.")],
        hint="One step contributes diag(1 - h_t^2) W."),
    "combine": Task(
        combine, cases=[((draw(4), draw(5)[:4]), (draw(6)[:4], draw(7)[:4]))],
        wrong=[(lambda first, then: combine(then, first), "That does the second map first."),
               (lambda first, then: (first[0] * then[0], first[1] + then[1]), "What the first map adds is multiplied "
                "by the second one, too."),
               (lambda first, then: (first[0] + then[0], then[0] * first[1] + then[1]), "Two factors one after the "
                "other multiply."),
               (lambda first, then: then[0] * first[1] + then[1], "A pair is expected: the factor, and what is "
                "added.")],
        hint="Put h' = a h + b into c h' + d, and sort by h."),
    "rounds": Task(
        math.ceil(math.log2(1000)),
        wrong=[(999, "That is the loop. In a scan, each round doubles how far back everybody knows."),
               (9, "After 9 rounds a position knows 512 steps, and the last one needs 1,000."),
               (500, "Halving the chain once is one round. The next one halves it again.")],
        hint="After k rounds each position has combined 2^k steps."),
    "scan": Task(
        scan, run=counted, close=1e-10, cases=[(draw(n, 2), draw(n, 3)[:, :2]) for n in (1, 2, 8, 13, 64)],
        wrong=[(by_loop, "The numbers are right. But combine must be called some log2(n) times, each time for all "
                "positions at once."),
               (lambda combine, a, b: scan(lambda first, then: combine(then, first), a, b), "The pairs enter combine "
                "in the wrong order: the earlier positions are the first map."),
               (too_few, "Powers of two come out right. For other lengths a round is missing: go on while step < n."),
               (never_doubled, "The distance to the partner must double from round to round."),
               (shrinking, "In each round, the first `step` positions have no partner: they stay, in front."),
               (lambda combine, a, b: scan(combine, a, b).cumsum(0), "What you sum up is complete already.")],
        hint="In a round all pairs from `step` on are combined with those `step` before them; the first ones stay."),
    "scannable": Task(
        {"a", "c"},
        wrong=[({"c"}, "One more. It is not linear, but two of its steps make one step of the same kind."),
               ({"a", "b", "c", "d"}, "Write down two steps of each as one: which need more numbers than one step "
                "did?"),
               ({"c", "d"}, "The gate of d looks at h. Two steps contain a sigmoid of a sigmoid."),
               ({"a", "c", "d"}, "The gate of d looks at h. Two steps contain a sigmoid of a sigmoid, which is no one "
                "step."),
               ({"b", "c"}, "tanh(w tanh(w h + x) + y) is not tanh(w' h + x') for any w' and x'.")],
        hint="Answer with a set of letters, such as {\"a\", \"b\"}."),
    "one_token": Task(
        one_token, cases=[(encoder_layer(), draw(2, 5, 8), i) for i in (0, 3)], close=1e-10,
        wrong=[(lambda layer, x, i: layer(x[:, i : i + 1], *[torch.arange(i, i + 1)] * 2), "That token sees "
                "only itself. Its query is one, but keys and values are those of all tokens."),
               (lambda layer, x, i: one_token(layer, x, i, residual=False), "The residual is missing: what the token "
                "was is added before the first norm."),
               (lambda layer, x, i: layer(x, torch.arange(x.size(1)), torch.arange(x.size(1))), "That is the output of "
                "all tokens. Only token i is wanted, (B, 1, C)."),
               (lambda layer, x, i: one_token(layer, x[:, : i + 1], i), "An encoder is not causal: later tokens are "
                "seen too.")],
        hint="EncoderLayer.forward in model.py is short: do the same with one query."),
    "cone": Task(
        spread,
        wrong=[([spread[0]] * DEEP, "What has changed in one layer changes others in the next."),
               ([WIDE - PLACE] * DEEP, "That is full causal attention. A window lets the change travel layer by "
                "layer."),
               ([WINDOW * (layer + 1) for layer in range(DEEP)], "A window of 3 reaches 2 positions beyond oneself."),
               ([1 + (layer + 1) * (WINDOW - 1) for layer in range(DEEP)], "The text ends at position 11."),
               ([1, *spread[:-1]], "The outputs of the first layer have passed one attention already.")],
        hint="Four numbers. Who sees position 5 in layer 1? Who sees one of these in layer 2?"),
    "rounds_of_stacks": Task(
        (N + L - 1, L),
        wrong=[((N * L, L), "Layer 2 may begin as soon as layer 1 has done its first token: they work side by side."),
               ((N, L), "Nearly: when the first layer has done its last token, the layers above it have yet to."),
               ((N + L - 1, 1), "Within a layer all tokens go at once, but the second layer waits for the first."),
               ((N + L, L), "Walk the way from the first token at the bottom to the last one at the top, and count "
                "cells."),
               ((N + L - 1, N * L), "Tokens of one transformer layer do not wait for each other.")],
        hint="Two numbers: the RNN's longest chain of cells, and the transformer's longest chain of attentions."),
    "time": Task(
        "b",
        wrong=[("a", "The chain is counted from what autograd recorded, not estimated."),
               ("c", "A softmax of a row needs one sum, itself a scan of little depth, and rows are independent."),
               ("d", "The weights are the same matrices for every length.")],
        hint="Answer with a letter, such as \"a\".",
        praise="On one core work decides, and the loop may win. Where there are thousands of units, the short chain "
        "does."),
    "calls": Task(
        (1, STEPS, STEPS, STEPS),
        wrong=[((1, STEPS, STEPS, STEPS * (STEPS + 1) // 2), "That is decoding without a cache. Here only new tokens "
                "enter."),
               ((1, STEPS + 1, STEPS + 1, STEPS + 1), "The last token is only predicted. It never enters."),
               ((STEPS, STEPS, STEPS, STEPS), "In teacher forcing all inputs are known from the start."),
               ((1, STEPS, STEPS, 1), "One token enters in each call. Over all calls they add up.")],
        hint="Four numbers: calls in training, calls in decoding, tokens in training, tokens in decoding."),
    "decoded_loss": Task(
        decoded_loss, run=with_calls, cases=[(tiny_gpt(), IDS), (tiny_gpt(), IDS[:2])], close=1e-8,
        wrong=[(lambda model, ids: decoded_loss(model, ids, mean=True), "That is the mean over tokens: the sum is "
                "asked for."),
               (lambda model, ids: decoded_loss(model, ids, shift=0), "You ask for the probability of the token that "
                "has just entered. The loss is about the one after it."),
               (lambda model, ids: decoded_loss(model, ids, own=True), "You feed the model its own choices. The "
                "teacher's text enters, whatever the model would have written."),
               (all_at_once, "The sum is right, but all of it came from one call. One token at a time, please."),
               (lambda model, ids: -decoded_loss(model, ids), "The sign: a loss is minus the logarithm.")],
        hint="In step t, advance(model, [ids[: t + 1]], cache)[0, 0] are the logits for ids[t + 1]."),
}
