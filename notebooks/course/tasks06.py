"""The exercises of lesson 6: which results of a decoder layer can be kept, and how."""

import math

import torch
from torch import nn

from attention import attend_explicit
from cost import predict, rows_through
from further.concat import ConcatCache, SlipCache
from model import BART

from . import Task
from .little import little_bart

CONFIG = little_bart().config  # one decoder layer


def rows(strategy, name, N=1024, M=100):
    """Rows through one of the linears of a decoder layer, in closed form."""
    return predict(CONFIG, strategy, N, M)["linear_rows"]["decoder.0." + name]


SELF, CROSS = "attn.c_attn", "cross.c_kv"
FOUR = [rows("hoisted", SELF), rows("cached", SELF), rows("hoisted", CROSS), rows("cached", CROSS)]
HOISTED, CACHED = (rows_through(predict(CONFIG, name, 1024, 100)["linear_rows"], "decoder.") for name in
                   ("hoisted", "cached"))
ONLY_CROSS = HOISTED - 2 * rows("hoisted", CROSS) + 2 * rows("cached", CROSS)


def spared(N, M):
    """The share of hoisted decoding's multiplications that a cache saves, of a BART as wide as it is in practice."""
    hoisted, cached = (predict(BART.get_default_config(), name, N, M) for name in ("hoisted", "cached"))
    return 1 - sum(cached[kind] for kind in FLOPS) / sum(hoisted[kind] for kind in FLOPS)


FLOPS = "linear_flops", "attention_flops"
GROWS = spared(512, 16) > spared(64, 16), spared(64, 64) > spared(64, 16)  # with N, with M


def joined(past, new):
    return ConcatCache(1, 8).join(past, new)


def some(*shape):
    return torch.arange(math.prod(shape), dtype=torch.float).view(shape)


# ---- the class that is repaired


def attention(answer, T, S, masked):
    """What a class makes of T queries and S keys in two rows; its weights do not depend on the class."""
    module = answer(4)
    numbers = torch.Generator().manual_seed(1)
    draw = lambda *shape: torch.randn(shape, generator=numbers)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(draw(*p.shape))
        inputs = draw(2, T, 4), draw(2, S, 4), draw(2, S, 4)
        return module(*inputs, mask=torch.ones(T, S).tril(S - T).bool()) if masked else module(*inputs)


class Mended(nn.Module):
    def __init__(self, C):
        super().__init__()
        self.to_q, self.to_k, self.to_v, self.out = (nn.Linear(C, C) for _ in range(4))

    def forward(self, query, key, value, mask=None):
        q, k, v = self.to_q(query)[:, None], self.to_k(key)[:, None], self.to_v(value)[:, None]  # one head
        return self.out(self.attend(q, k, v, mask)[:, 0])

    def attend(self, q, k, v, mask):
        return attend_explicit(q, k, v, mask)[0]


class NoSuper(nn.Module):
    def __init__(self, C):
        self.to_q = nn.Linear(C, C)


class Unassigned(Mended):
    def forward(self, query, key, value):
        q = self.to_q(q)  # noqa: F821


class Reversed(Mended):
    def forward(self, query, key, value):
        q, k, v = self.to_q(query), self.to_k(key), self.to_v(value)
        return self.out((q @ k.permute(2, 1, 0)).softmax(-1) @ v)  # what .T does, which warns


class Unscaled(Mended):
    def forward(self, query, key, value):
        q, k, v = self.to_q(query), self.to_k(key), self.to_v(value)
        return self.out((q @ k.mT).softmax(-1) @ v)


class Unmasked(Mended):
    def forward(self, query, key, value):
        return super().forward(query, key, value)


class UnscaledMasked(Mended):
    def attend(self, q, k, v, mask):
        return super().attend(q * math.sqrt(q.size(-1)), k, v, mask)


class Ignored(Mended):
    def attend(self, q, k, v, mask):
        return super().attend(q, k, v, None)


class MaskedTooLate(Mended):
    def attend(self, q, k, v, mask):
        weights = attend_explicit(q, k, v)[1]
        return (weights if mask is None else weights * mask) @ v


class Inverted(Mended):
    def attend(self, q, k, v, mask):
        return super().attend(q, k, v, None if mask is None else ~mask)


# ---- the order in a layer


def through(answer, sourced):
    """A decoder layer's (B, T, C) -> (B, T, C), with or without a source."""
    bart = little_bart(seed=6, n_embd=8, block_size=8).double()
    with torch.no_grad():
        memory = bart.project(torch.randn(2, 5, 8).double()) if sourced else None
        return answer(bart.decoder[0], torch.randn(2, 3, 8).double(), torch.arange(3), memory)


def looks(layer, x, memory):
    return layer.cross(x, *memory.kv[0], memory.key_pos)


def as_drawn(layer, x, pos, memory):
    x = layer.attn(x, pos=pos)
    return x if memory is None else looks(layer, x, memory)


def source_first(layer, x, pos, memory):
    if memory is not None:
        x = layer.ln_cross(x + looks(layer, x, memory))
    x = layer.ln_1(x + layer.attn(x, pos=pos))
    return layer.ln_2(x + layer.mlp(x))


def norms_first(layer, x, pos, memory):
    x = x + layer.attn(layer.ln_1(x), pos=pos)
    if memory is not None:
        x = x + looks(layer, layer.ln_cross(x), memory)
    return x + layer.mlp(layer.ln_2(x))


def no_residual(layer, x, pos, memory):
    x = layer.ln_1(layer.attn(x, pos=pos))
    if memory is not None:
        x = layer.ln_cross(looks(layer, x, memory))
    return layer.ln_2(layer.mlp(x))


def always_a_source(layer, x, pos, memory):
    x = layer.ln_1(x + layer.attn(x, pos=pos))
    x = layer.ln_cross(x + looks(layer, x, memory))
    return layer.ln_2(x + layer.mlp(x))


def no_thought(layer, x, pos, memory):
    x = layer.ln_1(x + layer.attn(x, pos=pos))
    return x if memory is None else layer.ln_cross(x + looks(layer, x, memory))


TASKS = {
    "once": Task(
        {"cross k", "cross v"},
        wrong=[
            ({"cross q", "cross k", "cross v"},
             "A query is made of what has been written. Is that the same in every call?"),
            ({"cross q", "cross k", "cross v", "cross out"},
             "Two of these four are made of what the decoder has written, which is new in every call."),
            ({"self k", "self v"},
             "Those of earlier tokens can be kept, but every new token needs its own. Which linears never see a new "
             "row?"),
            ({"self k", "self v", "cross k", "cross v"},
             "Right for two of them. The other two run in every call, if only on the newest token."),
        ], hint="Answer with a set of names, as in {'fc', 'proj'}. Does each multiply the source, or what has been "
                "written?"),
    "rows": Task(
        FOUR,
        wrong=[
            ([5050, 100, 1024, 1024],
             "Hoisting moves the encoder out of the loop. Who projects what it returned, and where does that run?"),
            ([5050, 100, 102_400, 100],
             "Cached, a source of 1,024 vectors must be projected once: how many rows is that?"),
            ([5050, 5050, 102_400, 1024],
             "The decoder's own keys: one token enters per call, and those before it are stored."),
            ([100, 100, 102_400, 1024], "Hoisted, the decoder keeps nothing: 1 token enters, then 2, then 3."),
            ([4950, 99, 102_400, 1024], "The start token enters in call 1, so 1 + 2 + .. + M rows, not M - 1."),
            ([5050, 1, 102_400, 1024], "One row in each call. How many calls are there?"),
        ], hint="In each call, a linear multiplies as many rows as vectors are given to it; add up over the calls."),
    "figure": Task("b", wrong=[
        ("a", "It does not: its part of the bar is a line, 6 linears of 1,024 rows."),
        ("c", "The text has 100 tokens in the end. What else is 1,024 long?"),
        ("d", "Both have four. But two of one kind are given something long."),
    ], hint="Answer with a letter.", praise="6,074 tokens is the truth about the stacks, and says nothing of this."),
    "only_cross": Task(
        ONLY_CROSS,
        wrong=[
            (HOISTED - 2 * rows("hoisted", CROSS), "Once is not never: the source is projected, by two linears."),
            (HOISTED - rows("hoisted", CROSS) + rows("cached", CROSS), "Two linears are spared, keys and values."),
            (CACHED,
             "This is with both caches. Without the one of self-attention, all of the text enters in every call."),
            (2 * rows("cached", CROSS) + 2 * rows("hoisted", SELF),
             "A decoder layer has ten linears: two multiply the source, and the other eight the text."),
            (2 * rows("cached", CROSS) + 6 * rows("hoisted", SELF), "The feed-forward has two linears too."),
        ], hint="Two linears of 1,024 rows, and eight of as many as enter the decoder."),
    "split": Task(
        lambda x: (x[:, :-1], x[:, -1:]), cases=[(some(2, 6, 3),), (some(1, 1, 2),), (some(1, 2, 2),)],
        wrong=[
            (lambda x: (x[:, :1], x[:, :-1]),
             "These are the document's two slices. Print them for x = torch.arange(6)[None]: which of them holds "
             "the newest token?"),
            (lambda x: (x[:, :-1], x[:, -1]),
             "The right token, but its axis is gone: (B, C), where (B, 1, C) is expected. A slice keeps an axis, an "
             "index removes it."),
            (lambda x: (x[:, -1:], x[:, :-1]),
             "The right halves, in the other order: first what is stored, then what is new."),
            (lambda x: (x[:, :1], x[:, 1:]),
             "This is the first call's token and the rest. Stored is all but the newest."),
            (lambda x: (x[:-1], x[-1:]), "This cuts the batch. Positions are the second axis."),
        ]),
    "join": Task(
        joined, cases=[(some(2, 3, 2, 2), 50 + some(2, 3, 2, 2)), (some(1, 2, 5, 4), -some(1, 2, 1, 4))],
        wrong=[
            (lambda past, new: torch.cat((past, new), dim=1),
             "This makes more heads. Which axis counts the positions?"),
            (lambda past, new: torch.cat((past, new), dim=-1),
             "This makes longer keys. Which axis counts the positions?"),
            (lambda past, new: torch.cat((new, past), dim=2),
             "The right axis, the wrong order: the newest stands last."),
            (lambda past, new: SlipCache(1, 8).join(past, new),
             "What is new is missing its newest position, which is all there is in a decode step."),
            (lambda past, new: new, "What was stored is lost."),
        ], hint="Returned is a new tensor (B, H, S + T, D): first what was stored, then what is new."),
    "copied": Task(
        [100, 5050],
        wrong=[
            ([100, 4950], "The new tensor holds the newest position too: it is copied with the others."),
            ([100, 10_000], "The tensor is 100 positions long only in the last call."),
            ([5050, 5050], "A buffer that is there already is written only where something is new."),
            ([1, 100],
             "One position in each call; and there are 100 calls. What is made in each of them by torch.cat?"),
            ([100, 100], "torch.cat makes a new tensor of both. What is written into it in call 50?"),
        ], hint="Two numbers, static and concatenated: add up over the calls what is written in each."),
    "front": Task(
        ["chunks"],
        wrong=[
            (["steps", "chunks"],
             "A single query that sees every key: what does a softmax, and the sum behind it, make of another "
             "order?"),
            (["steps"],
             "A single query sees all keys, in any order. A chunk of several needs a mask, and that asks who stands "
             "where."),
            ([], "Some queries may see only a part of the keys. How do they know which?"),
        ], hint='Answer with a list: [], ["steps"], ["chunks"] or both.',
        praise="The order of keys is nothing to a sum; only the mask asks where they stand."),
    "share": Task(
        {(True, True): "a", (True, False): "b", (False, True): "c", (False, False): "d"}[GROWS],
        wrong=[
            ("a", "Right for one of the two. For the other: of what *both* loops do once, what grows along with it?"),
            ("b", "Think of a text of one token, and then of many: what does the cache save in call 1?"),
            ("d",
             "Think of a text of one token, and then of many: what does the cache save in call 1? Or compute it "
             "with cost.predict."),
        ], hint="Answer with a letter.",
        praise="In call 1 the cache saves nothing; and a longer source is more work for the encoder, which both need."),
    "mended": Task(
        Mended, cases=[(3, 3, False), (1, 5, False), (3, 3, True), (2, 5, True)], run=attention,
        wrong=[
            (NoSuper, "AttributeError: a module is given layers before it is one. Which line does every __init__ of an "
                      "nn.Module begin with?"),
            (Unassigned,
             "Built. Now UnboundLocalError: a name is used on the right that this very line assigns. What are the "
             "arguments of forward called?"),
            (Reversed,
             "All names are known. Now RuntimeError, in a product: of a batch (B, S, C), .T turns all the axes "
             "round, the batch among them. Print k.T.shape. Which two axes should change places?"),
            (Unscaled,
             "It runs, and the numbers are wrong: the scores grow with the width. By what does attention divide "
             "them?"),
            (Unmasked,
             "Scaled and right, and then it is called with mask=..., (T, S), True where a query may look. forward "
             "needs that argument, None by default, and a use for it."),
            (UnscaledMasked, "The mask works. By what does attention divide the scores, before the softmax?"),
            (Ignored, "A mask is accepted and not used."),
            (MaskedTooLate,
             "The mask comes after the softmax: what is hidden has taken its share already, and the weights no "
             "longer sum to 1."),
            (Inverted, "The mask is the wrong way round: True means that a query may look."),
        ],
        hint="Four cases: 3 queries and 3 keys; 1 and 5; then 3 and 3, and 2 and 5, with a mask.",
        praise="Add heads, and it is the attention of BART."),
    "layer": Task(
        lambda layer, x, pos, memory: layer(x, pos, None, memory), cases=[(True,), (False,)], run=through,
        wrong=[
            (as_drawn, "This is the layer as the document draws it. What is added to x after each sublayer, what "
                       "normalises the sum, and what comes last?"),
            (source_first, "All three sublayers, and the source too early: look first at what has been written."),
            (norms_first, "The norms stand before the sublayers, as in GPT-2. BART's stand behind them, on the sum."),
            (no_residual, "Each sublayer replaces x. It should be added to it."),
            (always_a_source, "Right with a source. Without one, memory is None, and that sublayer is left out."),
            (no_thought, "The last sublayer is missing, the feed-forward."),
        ],
        hint="Three sublayers; after each of them, the norm of x plus what it found."),
}
