"""
What decoding costs: counted from outside while a model really runs, and predicted beside it.

    with count(model) as cost:
        generate(model, sources, 100, strategy="cached")
    print(cost.encoder_tokens, cost.decoder_tokens)
    print(cost.table())

Hooks on the modules see every row that passes through a linear (a matrix product, GEMM), and a wrapper sees the
queries and keys of every attention (two batched products, BGEMM: QK^T, and the weights times V). The models know
nothing of it, and when nobody counts nothing is left of it. Nothing here prints: it returns numbers, records and text.

The convention for M: the number of decoder calls, which is the number of generated tokens. The decoder's start token
is fed at call 1 and the last generated token is never fed. A source of N = 1,024 and M = 100 tokens then costs 107,450
tokens naively, 6,074 with the encoder hoisted and 1,124 cached; counting the start token among the M output tokens
gives 106,326, 5,974 and 1,123.
"""

import json
import time
from collections import Counter
from contextlib import contextmanager
from math import prod

import torch
from torch.nn import functional as F

from attention import Attention, attend_explicit, causal, dense
from plumbing.report import shape_table

# -----------------------------------------------------------------------------
# Watching from outside


@contextmanager
def watching(model, see, handles=()):
    """
    In the block, see(name, q, k, mask, is_causal) is called before every attention of the model, with the name of the
    module that attends. Afterwards nothing of that is left, nor the hooks in `handles`.
    """
    def watched(name, output):
        def call(q, k, v, mask=None, is_causal=False):
            see(name, q, k, mask, is_causal)
            return output(q, k, v, mask, is_causal)
        return call

    layers = {name: module for name, module in model.named_modules() if isinstance(module, Attention)}
    before = {name: vars(module).get("output") for name, module in layers.items()}  # of a watch around this one
    try:
        for name, module in layers.items():
            module.output = watched(name, module.output)  # on the object: it hides the method of its class
        yield
    finally:
        for name, module in layers.items():
            vars(module).pop("output", None)
            if before[name]:
                module.output = before[name]
        for handle in handles:
            handle.remove()


def place(name):
    """Where a module sits, by its name: its layer (None outside the stacks) and attention "self", "cross" or None."""
    parts = name.split(".")
    roles = {"attn": "self", "cross": "cross"}
    return int(parts[1]) if len(parts) > 1 else None, next((roles[p] for p in parts if p in roles), None)


# -----------------------------------------------------------------------------
# Counting


@contextmanager
def count(model):
    """Count what the model computes in the block: one generation, or one pass of training. Yields a Cost."""
    cost = Cost()

    def linear(name):
        return lambda module, args, out: cost.products.append((*cost.at, name, args[0].shape, module.weight.shape))

    def cache(name):
        def hook(module, args, out):
            if module.cache_k is not None:
                cost.caches[name] = module.cache_k.nbytes + module.cache_v.nbytes
        return hook

    def encode(module, args):
        cost.at = "encode", cost.steps + 1  # the encoder works for the decoder call that follows
        cost.encoder[cost.steps + 1] += args[0].shape[:-1].numel()

    def decode(module, args):
        cost.steps += 1
        cost.at = "prefill" if cost.steps == 1 else "step", cost.steps
        cost.decoder[cost.steps] += args[0].shape[:-1].numel()

    handles = [model.decoder_layers()[0].register_forward_pre_hook(decode)]
    if hasattr(model, "encoder"):
        handles.append(model.encoder[0].register_forward_pre_hook(encode))
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            handles.append(module.register_forward_hook(linear(name)))
        elif isinstance(module, Attention):
            handles.append(module.register_forward_hook(cache(name)))
    with watching(model, cost.attended, handles):
        yield cost


class Cost:
    """
    What really ran. Steps are decoder calls, counted from 1, the prefill; tokens are positions x rows that enter a
    stack's first layer, padding included.

    steps: decoder calls. encoder, decoder: step -> tokens. caches: module name -> bytes that its keys and values
    occupy.
    """

    def __init__(self):
        self.steps, self.at = 0, ("outside", 0)
        self.encoder, self.decoder, self.caches = Counter(), Counter(), {}
        self.products = []  # tuples, for speed: dicts are made when somebody asks

    def attended(self, name, q, k, mask, is_causal):
        self.products.append((*self.at, name, q.shape, k.shape))

    @property
    def encoder_tokens(self):
        return self.encoder.total()

    @property
    def decoder_tokens(self):
        return self.decoder.total()

    @property
    def linear_rows(self):
        """Module name -> rows of input that passed through that linear."""
        rows = Counter()
        for _, _, name, left, right in self.products:
            if len(right) == 2:
                rows[name] += left[:-1].numel()
        return dict(rows)

    @property
    def records(self):
        """One dict per product, in the order in which they ran; shapes as lists."""
        return [record for product in self.products for record in describe(*product)]

    def flops(self, kind):
        """Of all products of a kind, "GEMM" or "BGEMM": 2 per multiply-add, masked ones included, biases left out."""
        return sum(2 * prod(r["out"]) * r["left"][-1] for r in self.records if r["kind"] == kind)

    def cache_bytes(self, attention):
        """Allocated for keys and values in "self" or "cross" attention."""
        return sum(size for name, size in self.caches.items() if place(name)[1] == attention)

    def jsonl(self):
        return "".join(json.dumps(record) + "\n" for record in self.records)

    def table(self, training=None):
        """Which shapes are fixed and which grow; training: the Cost of a teacher-forced pass, to be shown beside it."""
        return shape_table(self.records, training.records if training else [])


def describe(phase, step, name, left, right):
    """The records of one entry of Cost.products: a linear is one GEMM, an attention two BGEMMs."""
    layer, attention = place(name)
    record = dict(phase=phase, step=step, layer=layer, attention=attention)
    if len(right) == 2:  # weight: (out, in)
        rows, (columns, inner) = left[:-1].numel(), right
        return [dict(record, name=name.split(".")[-1], kind="GEMM",
                     left=[rows, inner], right=[inner, columns], out=[rows, columns])]
    (B, H, T, D), (_, KV, S, _) = left, right
    return [dict(record, name="qk", kind="BGEMM", left=[B, H, T, D], right=[B, KV, D, S], out=[B, H, T, S]),
            dict(record, name="pv", kind="BGEMM", left=[B, H, T, S], right=[B, KV, S, D], out=[B, H, T, D])]


def rows_through(linear_rows, prefix=""):
    """
    Rows through the linears whose name starts with prefix, counted as if q, k and v were separate: our c_attn is
    three of them in one matrix, c_kv is two.
    """
    fused = {"c_attn": 3, "c_kv": 2}
    return sum(rows * fused.get(name.split(".")[-1], 1)
               for name, rows in linear_rows.items() if name.startswith(prefix))


# -----------------------------------------------------------------------------
# Predicting


def predict(config, strategy, N, M, batch_size=1, itemsize=4):
    """
    The cost of generating M tokens in closed form, from a GPTConfig (N: the length of the prompt) or a BARTConfig (N:
    the length of the source; the target is its start token alone), the same in every row. See the top of this file
    for what M counts.

    Tokens into the decoder, per row, from P start tokens: P M + M (M - 1) / 2, which for BART's P = 1 is M (M + 1) / 2,
    or P + M - 1 cached; into the encoder: N M naively, else N. itemsize: bytes of a weight and of a cached number.
    Returns a dict: tokens; linear_rows by module name; linear_flops and attention_flops (2 per multiply-add, masked
    scores included); the cache bytes that are allocated; and what the last step reads: weight_bytes of the linears
    that run in it, and step_bytes with the cached keys and values.
    """
    bart, naive, cached = hasattr(config, "n_decoder_layer"), strategy == "naive", strategy == "cached"
    B, C, P = batch_size, config.n_embd, 1 if bart else N
    encoder_layers, L = (config.n_encoder_layer, config.n_decoder_layer) if bart else (0, config.n_layer)
    kv, inner = C // config.n_head * (config.n_kv_head or config.n_head), config.n_inner or 4 * C
    encoder_tokens = (B * N * M if naive else B * N) if bart else 0
    decoder_tokens = B * (P + M - 1 if cached else P * M + M * (M - 1) // 2)
    scores = B * (P * P + sum(P + m for m in range(1, M)) if cached else sum((P + m) ** 2 for m in range(M)))
    scores = L * scores + bart * N * (L * decoder_tokens + encoder_layers * encoder_tokens)  # per head, all layers

    widths = {"attn.c_attn": (C, C + 2 * kv), "attn.c_proj": (C, C), "mlp.c_fc": (C, inner), "mlp.c_proj": (inner, C)}
    queries = {"cross.c_q": (C, C), "cross.c_proj": (C, C)} if bart else {}
    stacks = [  # name, layers, linears in a layer, rows, whether they run in a step after the first
        ("encoder", encoder_layers, widths, encoder_tokens, naive),
        ("decoder" if bart else "h", L, widths | queries, decoder_tokens, True),
        ("decoder", L if bart else 0, {"cross.c_kv": (C, 2 * kv)}, B * N * (1 if cached else M), not cached)]
    linears = [("lm_head", C, config.vocab_size, B * M, True)]
    for stack, n, table, rows, later in stacks:
        linears += [(f"{stack}.{i}.{name}", a, b, rows, later) for i in range(n) for name, (a, b) in table.items()]

    weights = itemsize * sum(a * b + (bart or name != "lm_head") * b for name, a, b, _, later in linears if later)
    position = 2 * L * B * kv * itemsize * cached  # keys and values of one position; the last token's is never filled
    return dict(
        encoder_tokens=encoder_tokens, decoder_tokens=decoder_tokens,
        linear_rows={name: rows for name, _, _, rows, _ in linears},
        linear_flops=sum(2 * rows * a * b for _, a, b, rows, _ in linears), attention_flops=4 * C * scores,
        self_cache_bytes=position * (P + M), cross_cache_bytes=position * N * bart,
        weight_bytes=weights, step_bytes=weights + position * (P + M - 1 + N * bart))


# -----------------------------------------------------------------------------
# Comparing


def measure(model, run):
    """Count a run to its end: its Cost, the ids, logits (B, V) and seconds of each step."""
    ids, logits, seconds = [], [], []
    handle = model.lm_head.register_forward_hook(lambda module, args, out: logits.append(out.detach().float().cpu()))
    try:
        with count(model) as cost:
            start = time.perf_counter()
            for step in run():
                ids.append(step)
                seconds.append(time.perf_counter() - start)
                start += seconds[-1]
    finally:
        handle.remove()
    return cost, ids, logits, seconds


def parting(ids, logits, other_ids, other_logits):
    """
    How far another run is from the first: (largest logit difference, None or the first step where the tokens differ).
    Each row counts up to its own first difference, since after that the two continue different texts. `gap` is how
    much the first run's logits prefer its token over the other's: of the size of the logit difference, it is rounding.
    """
    largest, first = 0.0, None
    for row in range(len(ids[0])):
        for k, (ours, theirs) in enumerate(zip(ids, other_ids)):
            if ours[row] is None:  # this row has ended
                break
            largest = max(largest, (logits[k][row] - other_logits[k][row]).abs().max().item())
            if ours[row] != theirs[row]:
                gap = (logits[k][row, ours[row]] - logits[k][row, theirs[row]]).item()
                if first is None or k + 1 < first["step"]:
                    first = dict(step=k + 1, row=row, tokens=[ours[row], theirs[row]], gap=gap)
                break
    return largest, first


def compare(model, runs, N, batch_size=1):
    """
    Run every strategy on the same input, greedily, and put the counts, times and outputs beside each other.

    runs: strategy -> a function without arguments that starts it and returns its steps, each a list of B ids; the
    first is the reference. N: length of the longest source (BART) or prompt (GPT), to which the batch is padded.
    The counting hooks are in the timed runs: they cost microseconds, where a second run would cost the naive minutes.
    Returns a dict for JSON: N, M, batch_size, identical, exact (counts = closed forms), verdict, and `strategies`, a
    list of dicts. Logits of all steps are kept while it runs: 8 bytes x M x batch_size x vocab_size.
    """
    reference, strategies = None, []
    for run in list(runs.values())[:1]:
        next(iter(run()))  # what the first call of a process sets up is nobody's cost
    for name, run in runs.items():
        cost, ids, logits, seconds = measure(model, run)
        reference = reference or (ids, logits, sum(seconds))
        difference, first = parting(*reference[:2], ids, logits)
        closed = predict(model.config, name, N, len(ids), batch_size)
        later = seconds[1:]
        strategies.append(dict(
            strategy=name, identical=first is None, first_difference=first, logit_difference=difference,
            encoder_tokens=cost.encoder_tokens, decoder_tokens=cost.decoder_tokens,
            closed_form=[closed["encoder_tokens"], closed["decoder_tokens"]],
            linear_rows=rows_through(cost.linear_rows),
            linear_flops=cost.flops("GEMM"), attention_flops=cost.flops("BGEMM"),
            self_cache_bytes=cost.cache_bytes("self"), cross_cache_bytes=cost.cache_bytes("cross"),
            seconds=sum(seconds), first_seconds=seconds[0], token_seconds=sum(later) / len(later) if later else None,
            speed=reference[2] / sum(seconds),
            steps=[[cost.encoder[k + 1], cost.decoder[k + 1], s] for k, s in enumerate(seconds)],
            ids=[[i for i in row if i is not None] for row in zip(*ids)]))
    identical = all(s["identical"] for s in strategies)
    exact = all([s["encoder_tokens"], s["decoder_tokens"]] == s["closed_form"] for s in strategies)
    verdict = (f"{'identical' if identical else 'DIFFERENT'} tokens; "
               f"counts {'equal' if exact else 'DIFFER from'} the closed forms")
    return dict(N=N, M=len(reference[0]), batch_size=batch_size, identical=identical, exact=exact, verdict=verdict,
                strategies=strategies)


# -----------------------------------------------------------------------------
# Attention weights


@contextmanager
def attention_weights(model):
    """
    Collect the decoder's attention weights while it runs, also while it decodes from caches. Yields a dict: "self"
    and "cross" (empty for GPT) -> per layer -> one tensor (B, H, T, S) per call, recomputed by attend_explicit from
    the q, k and mask that the fused kernel is given. See matrix().
    """
    weights = {"self": [[] for _ in model.decoder_layers()], "cross": [[] for _ in model.decoder_layers()]}

    def see(name, q, k, mask, is_causal):
        if name.startswith("encoder"):
            return
        if is_causal:
            pos = torch.arange(q.size(2), device=q.device)
            mask = dense(causal, pos, pos)
        layer, attention = place(name)
        weights[attention][layer].append(attend_explicit(q, k, k, mask)[1].detach().cpu())

    with watching(model, see):
        yield weights


def matrix(calls):
    """The weights of successive cached calls as one tensor (B, H, all T, longest S), zero where nothing was yet."""
    S = max(w.size(-1) for w in calls)
    return torch.cat([F.pad(w, (0, S - w.size(-1))) for w in calls], dim=-2)
