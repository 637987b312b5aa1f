"""
What decoding costs: counted from outside while a model really runs, and predicted beside it.

    with count(model) as cost:
        generate(model, sources, 100, strategy="cached")
    print(cost.encoder_tokens, cost.decoder_tokens)
    print(cost.linear_rows, cost.records[0])

Hooks see every row that passes through a linear (a matrix product, GEMM), and the queries and keys of every attention
as they enter its pattern (two batched products, BGEMM: QK^T, and the weights times V). The models know nothing of it,
and when nobody counts nothing is left of it. Nothing here prints: it returns numbers and records.

The convention for M: the number of decoder calls, which is the number of generated tokens. The decoder's start token
is fed at call 1 and the last generated token is never fed. A source of N = 1,024 and M = 100 tokens then costs 107,450
tokens naively, 6,074 with the encoder hoisted and 1,124 cached; counting the start token among the M output tokens
gives 106,326, 5,974 and 1,123.
"""

from collections import Counter
from contextlib import contextmanager
from math import prod
from typing import NamedTuple

import torch
from torch.nn import functional as F

from attention import NOWHERE, Causal
from cache import KVCache, Memory
from plumbing.errors import UserError
from plumbing.patterns import patterns

# -----------------------------------------------------------------------------
# Watching from outside


@contextmanager
def hooks(handles):
    """In the block the hooks are there, afterwards nothing is left of them."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def watch(model, see):
    """Have see(name, pattern, q, k, v, query_pos, key_pos, out) called after every attention. Returns hooks."""
    def hook(name):
        return lambda module, args, out: see(name, module, *args, out)

    return [module.register_forward_hook(hook(name)) for name, module in model.named_modules()
            if ".pattern" in name and hasattr(module, "rate")]  # where heads are split, a part of them at a time


def layer_and_role(name):
    """Where a module sits, by its name: its layer (None outside the stacks) and attention "self", "cross" or None."""
    parts = name.split(".")
    roles = {"attn": "self", "cross": "cross"}
    return int(parts[1]) if len(parts) > 1 else None, next((roles[p] for p in parts if p in roles), None)


# -----------------------------------------------------------------------------
# Counting

KEPT = {KVCache: "self", Memory: "cross"}  # what layers are handed of a decoding, and which attention reads it


@contextmanager
def count(model):
    """Count what the model computes in the block: one generation, or one pass of training. Yields a Cost."""
    cost = Cost()

    def linear(name):
        def hook(module, args, out):
            # the keys and values of a source are projected before the decoder call that needs them first
            at = ("project", cost.steps + 1) if name.endswith("cross.c_kv") else cost.at
            cost.products.append((*at, name, args[0].shape, (args[0].size(-1), out.size(-1))))
        return hook

    def encode(module, args):
        cost.at = "encode", cost.steps + 1  # the encoder works for the decoder call that follows
        cost.encoder[cost.steps + 1] += args[0].shape[:-1].numel()

    def decode(module, args):
        cost.steps += 1
        cost.at = "prefill" if cost.steps == 1 else "step", cost.steps
        cost.decoder[cost.steps] += args[0].shape[:-1].numel()

    def stored(module, args, out):
        found = {role: x.nbytes for x in args for kind, role in KEPT.items() if isinstance(x, kind)}
        cost.caches = found if "self" in found else {}  # the memory of an uncached call is not kept

    layers = model.decoder_layers()
    handles = [layers[0].register_forward_pre_hook(decode), layers[-1].register_forward_hook(stored)]
    handles += watch(model, cost.attended)
    if model.config.is_encoder_decoder:
        handles.append(model.encoder[0].register_forward_pre_hook(encode))
    handles += [module.register_forward_hook(linear(name)) for name, module in model.named_modules()
                if hasattr(module, "in_features")]  # nn.Linear, and whatever takes its place
    with hooks(handles):
        yield cost


class Cost:
    """
    What really ran. Steps are decoder calls, counted from 1, the prefill; tokens are positions x rows that enter a
    stack's first layer, padding included.

    steps: decoder calls. encoder, decoder: step -> tokens. caches: "self" and "cross" -> bytes that a decoding keeps.
    """

    def __init__(self):
        self.steps, self.at = 0, ("outside", 0)
        self.encoder, self.decoder, self.caches = Counter(), Counter(), {}
        self.products = []  # tuples, for speed: dicts are made when somebody asks

    def attended(self, name, pattern, q, k, *rest):
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

    def step(self, number):
        """
        What one decoder call multiplies: (batch, rows, n_in, n_out) -> how many such products. batch is None where the
        matrix is a weight; in attention it is a head's keys or values, and the rows are all queries that share it.
        """
        found = Counter()
        for _, step, _, left, right in self.products:
            if step == number and len(right) == 2:
                found[None, left[:-1].numel(), *right] += 1
            elif step == number:
                (B, H, T, D), (_, KV, S, _) = left, right
                found[B * KV, H // KV * T, D, S] += 1
                found[B * KV, H // KV * T, S, D] += 1
        return found

    def flops(self, kind):
        """Of all products of a kind, "GEMM" or "BGEMM": 2 per multiply-add, masked ones included, biases left out."""
        return sum(2 * prod(r["out"]) * r["left"][-1] for r in self.records if r["kind"] == kind)

    def cache_bytes(self, attention):
        """Allocated for keys and values in "self" or "cross" attention; 0 without a cache."""
        return self.caches.get(attention, 0)


def describe(phase, step, name, left, right):
    """The records of one entry of Cost.products: a linear is one GEMM, an attention two BGEMMs."""
    layer, attention = layer_and_role(name)
    record = dict(phase=phase, step=step, layer=layer, attention=attention)
    if len(right) == 2:
        rows, (inner, columns) = left[:-1].numel(), right
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


class Linear(NamedTuple):
    """The linears of one name, one in each of so many layers; `of` says what passes through: see predict()."""

    name: str  # {} stands for a layer's number
    layers: int
    n_in: int
    n_out: int
    of: str


def linears(config):
    """Every linear of a GPT or BART, as a table. All have a bias, but for a GPT's head."""
    C, inner, V = config.n_embd, config.inner, config.vocab_size
    encoder, decoder, cross = (2 * config.of(role).kv_width for role in ("encoder", "decoder", "cross"))
    stack, L = ("decoder", config.n_decoder_layer) if config.is_encoder_decoder else ("h", config.n_layer)
    table = [
        Linear(stack + ".{}.attn.c_attn", L, C, C + decoder, "decoder"),
        Linear(stack + ".{}.attn.c_proj", L, C, C, "decoder"),
        Linear(stack + ".{}.mlp.c_fc", L, C, inner, "decoder"),
        Linear(stack + ".{}.mlp.c_proj", L, inner, C, "decoder"),
        Linear("lm_head", 1, C, V, "head"),
    ]
    if config.is_encoder_decoder:
        table += [row._replace(name=row.name.replace("decoder", "encoder"), layers=config.n_encoder_layer, of="encoder")
                  for row in (table[0]._replace(n_out=C + encoder), *table[1:4])]
        table += [
            Linear("decoder.{}.cross.c_q", L, C, C, "decoder"),
            Linear("decoder.{}.cross.c_proj", L, C, C, "decoder"),
            Linear("decoder.{}.cross.c_kv", L, C, cross, "source"),
        ]
    return table


def weights(config, row):
    """Numbers that one linear of a table holds."""
    biased = config.is_encoder_decoder or row.name != "lm_head"
    return row.n_in * row.n_out + biased * row.n_out


# Rows through the encoder, the projection of the source, and the decoder, from a source of N and P first tokens in M
# calls; and which linears besides the decoder's run in every call.
FORMULAS = {
    "naive":   lambda N, P, M: (N * M, N * M, P * M + M * (M - 1) // 2, {"encoder", "source"}),
    "hoisted": lambda N, P, M: (N, N * M, P * M + M * (M - 1) // 2, {"source"}),
    "cached":  lambda N, P, M: (N, N, P + M - 1, set()),
}


def predict(config, strategy, N, M, batch_size=1, itemsize=4, begun=0):
    """
    The cost of generating M tokens in closed form, from a GPTConfig (N: the length of the prompt) or a BARTConfig (N:
    the length of the source; begun: of the decoder prompt behind the start token), the same in every row. See the top
    of this file for what M counts. itemsize: bytes of a weight and of a cached number. Raises UserError on another
    strategy.

    Returns a dict: tokens; linear_rows by module name; linear_flops and attention_flops (2 per multiply-add, masked
    scores included); the cache bytes that are allocated; and what the last step reads: weight_bytes of the linears
    that run in it, and step_bytes with the cached keys and values.
    """
    bart, B = config.is_encoder_decoder, batch_size
    P, N, L = config.starts(N) + begun, N if bart else 0, config.n_decoder_layer if bart else config.n_layer
    calls = [(1 if k and strategy == "cached" else P + k, P + k) for k in range(M)]  # (tokens that enter, are seen)
    known = [name for name in FORMULAS if bart or name != "hoisted"]
    if strategy not in known:
        raise UserError(f"strategy={strategy!r:.60} has no closed form: choose one of {', '.join(known)}")
    encoder, projected, decoder, every = FORMULAS[strategy](N, P, M)
    rows = {"encoder": B * encoder, "source": B * projected, "decoder": B * decoder, "head": B * M}
    kept = [(make or Causal)(0.0).slots(P + M) for make in patterns(config, L)]  # where each layer keeps a text
    size = lambda S: sum(sum(one.size if one.evicts else S for one in own) / len(own) for own in kept)  # of all layers
    scores = sum(T * ((size(S) if T == 1 and strategy == "cached" else L * S) + L * N) for T, S in calls)
    scores = B * scores + (B * config.n_encoder_layer * N * encoder if bart else 0)
    table = linears(config)
    read = itemsize * sum(row.layers * weights(config, row) for row in table if row.of in {"decoder", "head"} | every)
    position, source = (2 * B * config.of(role).kv_width * itemsize * (strategy == "cached") for role in
                        ("decoder", "cross"))  # bytes of the keys and values of one position, in one layer
    return dict(
        encoder_tokens=rows["encoder"], decoder_tokens=rows["decoder"],
        linear_rows={row.name.format(i): rows[row.of] for row in table for i in range(row.layers)},
        linear_flops=sum(2 * row.layers * rows[row.of] * row.n_in * row.n_out for row in table),
        attention_flops=round(4 * config.n_embd * scores),
        self_cache_bytes=round(position * size(P + M)), cross_cache_bytes=source * L * N,
        weight_bytes=read,
        step_bytes=read + round(position * size(P + M - 1)) + source * L * N)  # the last token's is never filled


# -----------------------------------------------------------------------------
# Attention weights


@contextmanager
def attention_weights(model):
    """
    Collect the decoder's attention weights while it runs, also while it decodes from caches. Yields a dict: "self"
    and "cross" (empty for GPT) -> per layer -> one tensor (B, H, T, S) per call. They are what the pattern makes of the
    unit vectors as values, so they are right for any pattern; what has been evicted weighs nothing. See matrix().
    """
    weights = {"self": [[] for _ in model.decoder_layers()], "cross": [[] for _ in model.decoder_layers()]}

    def see(name, pattern, q, k, v, query_pos, key_pos, out):
        if name.startswith("encoder"):
            return
        layer, attention = layer_and_role(name)
        calls = weights[attention][layer]
        units = torch.eye(k.size(2), dtype=k.dtype, device=k.device).expand(*k.shape[:3], -1)
        with torch.no_grad():  # without dropout; forward() itself, because our hook is on the module
            found = pattern.forward(q, k, units, query_pos, key_pos).cpu()  # (B, H, T, S)
        if attention == "self":
            found = by_position(found, key_pos.cpu())
        if name.endswith("pattern") or name.endswith(".0"):
            calls.append(found)
        else:  # another part of the heads of the same call
            calls[-1] = torch.cat(padded([calls[-1], found]), 1)

    with hooks(watch(model, see)):
        yield weights


def by_position(weights, key_pos):
    """Weights (B, H, T, S) of keys that stand at (S,) or (B, S), in the order of the positions, which begin at 0."""
    real = key_pos < NOWHERE
    place = key_pos.where(real, 0).expand(len(weights), -1)[:, None, None].expand_as(weights)
    ordered = torch.zeros(*weights.shape[:3], int(key_pos[real].max()) + 1, dtype=weights.dtype)
    return ordered.scatter_add(-1, place, weights)


def padded(calls):
    """Weights with zeros up to the longest S."""
    S = max(w.size(-1) for w in calls)
    return [F.pad(w, (0, S - w.size(-1))) for w in calls]


def matrix(calls):
    """The weights of successive cached calls as one tensor (B, H, all T, longest S), zero where nothing was yet."""
    return torch.cat(padded(calls), dim=-2)
