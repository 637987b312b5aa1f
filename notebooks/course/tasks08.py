"""The exercises of lesson 8."""

from dataclasses import replace

import torch

from cost import predict
from course import Task
from further.gqa import mean
from plumbing.models import count_parameters, preset_config

MHA = preset_config("gpt2")
GQA, MQA = (replace(MHA, n_kv_head=n) for n in (4, 1))
H, D, C, L = MHA.n_head, MHA.n_embd // MHA.n_head, MHA.n_embd, MHA.n_layer


def columns(queries, parts=2, shared=lambda KV: KV):
    return {KV: (queries(KV) + parts * shared(KV)) * D for KV in (12, 4, 1)}


def cache_bytes(config, B, S, itemsize):
    return predict(config, "cached", S - 1, 1, B, itemsize)["self_cache_bytes"]


def share(x, n_head):
    return x.repeat_interleave(n_head // x.size(1), 1)


def share_as_if_one(x, n_head):
    return x[:, :1].expand(-1, n_head, -1, -1)


def tied(weight, n_head, times=share):
    """c_attn's weight with every key and value head as often as query heads share it: (C + 2 KV D, C) -> (3 C, C)."""
    C = weight.size(1)
    q, kv = weight[:C], weight[C:].unflatten(0, (2, -1, C // n_head))
    return torch.cat([q, times(kv, n_head).flatten(0, 2)])


def turned(kv, n_head):
    """Whole blocks of heads behind each other, as repeat() has them."""
    return kv.repeat(1, n_head // kv.size(1), 1, 1)


def mixed(weight, n_head):
    C = weight.size(1)
    kv = share(weight[C:].unflatten(0, (2, -1, C // n_head)), n_head)
    return torch.cat([weight[:C], kv.transpose(0, 1).flatten(0, 2)])


def fused(seed, n_head, KV):
    torch.manual_seed(seed)
    return torch.randn((n_head + 2 * KV) * 2, n_head * 2), n_head


def heads(seed, n, KV):
    torch.manual_seed(seed)
    return torch.randn(n, 3, 5), KV


def read(config, B):
    """Bytes of the weights and of the cached keys and values that a step behind 1,024 positions reads."""
    p = predict(config, "cached", 1024, 1, B)
    return p["weight_bytes"], p["step_bytes"] - p["weight_bytes"]


def first(weights, cached):
    return next(B for B in range(1, 1000) if cached(B) > weights)


break_even = [first(read(config, 1)[0], lambda B, config=config: read(config, B)[1]) for config in (MHA, MQA)]
saved = count_parameters(MHA) - count_parameters(MQA)

TASKS = {
    "columns": Task(
        columns(lambda KV: H),
        wrong=[(columns(lambda KV: KV), "Are the queries shared as well?"),
               (columns(lambda KV: H, parts=1), "A shared head has a key and a value."),
               (columns(lambda KV: H, shared=lambda KV: H), "That is multi-head three times. What do the heads share?"),
               (columns(lambda KV: H, shared=lambda KV: H // KV), "n_kv_head is how many heads of keys there are, not "
                                                                  "how many queries share one.")],
        hint="Queries: all 12 heads of 64. Keys and values: n_kv_head of 64 each."),
    "cache_bytes": Task(
        cache_bytes,
        wrong=[(lambda c, B, S, size: cache_bytes(c, B, S, size) // 2, "Keys are half of it."),
               (lambda c, B, S, size: cache_bytes(replace(c, n_kv_head=None), B, S, size),
                "That is a cache for all heads. How many of them have keys of their own?"),
               (lambda c, B, S, size: cache_bytes(c, B, S, size) // c.n_layer, "That is one layer."),
               (lambda c, B, S, size: cache_bytes(c, 1, S, size), "That is one row. Rows share nothing."),
               (lambda c, B, S, size: cache_bytes(c, B, S, 4), "Not every number takes 4 bytes.")],
        cases=[(MHA, 1, 1024, 4), (GQA, 3, 100, 2), (MQA, 2, 7, 4)],
        hint="2, layers, rows, n_kv_head, head_dim, positions, bytes of a number: multiply. n_kv_head may be None."),
    "share": Task(
        share,
        wrong=[(lambda x, n: x.repeat(1, n // x.size(1), 1, 1),
                "The heads come in the order 0 1 0 1. Which query heads are neighbours?"),
               (lambda x, n: x.repeat_interleave(n // x.size(1), 2), "That repeats positions: heads are axis 1."),
               (share_as_if_one, "All queries get the first head. There may be more than one."),
               (lambda x, n: x.repeat_interleave(n, 1), "Each head is needed for its own part of the queries alone.")],
        cases=[(torch.arange(12.0).view(1, 2, 3, 2), 4), (torch.arange(12.0).view(2, 3, 1, 2), 6),
               (torch.arange(4.0).view(1, 1, 2, 2), 3)],
        hint="Each of the KV heads must stand n_head // KV times, its copies side by side."),
    "visible": Task(
        [2, 4],
        wrong=[([1, 2, 4], "With a single head, what could be in the wrong order?"),
               ([2, 4, 8], "With a head for every query, how often is each repeated?"),
               ([1, 2, 4, 8], "Write the order down for n_kv_head=1 and for 8: two of these are harmless."),
               ([1, 8], "These two are the same either way: nothing can be out of order there.")],
        hint="Write the order of the heads both ways, for each of the four."),
    "speaking": Task(
        "c",
        wrong=[("a", "It builds both layers of CausalSelfAttention. Which of the two functions do layers call?"),
               ("b", "Chunks and the whole go through one function. Is it the one with the bug?"),
               ("d", "The shape of what is stored does not say in which order it is read.")],
        hint="Answer with a letter. Who calls attend_explicit?"),
    "tied": Task(
        tied,
        wrong=[(lambda w, n: tied(w, n, turned), "Right for one head. With two, which queries does the first serve?"),
               (mixed, "Keys and values take turns. c_attn has all keys first, then all values."),
               (lambda w, n: torch.cat([w, w[w.size(1):]]), "Rows were repeated as one block: first all keys, then "
                                                            "all values, and each head beside its copies."),
               (lambda w, n: w, "Nothing has been repeated yet.")],
        cases=[fused(1, 4, 1), fused(2, 4, 2), fused(3, 6, 3)],
        hint="The first C rows are queries. The others are KV heads of keys, then KV heads of values, D rows each."),
    "fewer": Task(
        saved,
        wrong=[(L * 2 * (H - 1) * D * C, "Nearly. c_attn has a bias, too."),
               (saved // L, "That is one layer."), (saved // 2, "Keys and values are both shared."),
               (saved // (H - 1) * H, "One head of keys and values remains."),
               (saved // (H - 1), "That is what one head takes. How many are no longer there?")],
        hint="How many rows has each layer's c_attn lost? Each has 768 weights and a bias."),
    "break_even": Task(
        break_even,
        wrong=[([n - 1 for n in break_even], "There the cache is still the smaller: with one row more it is not."),
               ([break_even[0], first(read(MHA, 1)[0], lambda B: read(MQA, B)[1])],
                "The weights of the multi-query model are fewer: use its own 442 MB."),
               ([break_even[0]] * 2, "The multi-query model stores a twelfth for each row."),
               (break_even[::-1], "Multi-head comes first.")],
        hint="Divide the weights by what one row stores, and take the next whole number."),
    "more": Task(
        "b",
        wrong=[("a", "Both kinds of bytes shrink alike. What does that do to a ratio?"),
               ("c", "That adds to what both models read. Does the ratio rise?"),
               ("d", "Both models would be faster. The ratio of bytes knows nothing of it.")],
        hint="Answer with a letter. The gain is (weights + cache) / (fewer weights + cache / 12)."),
    "intensity": Task(
        [0.5 * rows for rows in (1, 8, 256)],
        wrong=[([2.0 * rows for rows in (1, 8, 256)], "That is per number. How many bytes has a number in fp32?"),
               ([0.25 * rows for rows in (1, 8, 256)], "A multiply-add counts as 2 FLOPs."),
               ([0.5, 0.5, 0.5], "A weight is read once. For how many rows is it used then?"),
               ([0.5, 0.5, 128], "Rows of a batch go through a linear together, as the tokens of a prompt do.")],
        hint="A weight is 4 bytes, and is used for one multiply-add with each row."),
    "pool": Task(
        lambda x, groups: mean(x.unflatten(0, (groups, -1)))[0],
        wrong=[(lambda x, groups: x.unflatten(0, (groups, -1)).sum(1), "That is the sum."),
               (lambda x, groups: x.unflatten(0, (-1, groups)).mean(0), "Those heads are not neighbours."),
               (lambda x, groups: x.unflatten(0, (groups, -1))[:, 0], "That keeps one head of each group as it is."),
               (lambda x, groups: x.mean(0, keepdim=True).expand(groups, -1, -1), "Each group has a mean of its own.")],
        cases=[heads(1, 4, 2), heads(2, 6, 2), heads(3, 6, 3), heads(4, 3, 1)],
        hint="(heads, D, C) -> (groups, D, C): give the first axis two, then average one of them."),
}
