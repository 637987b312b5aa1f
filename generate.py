"""
Generate text: one loop, and three ways to make its step cheap.

    python generate.py --model out/gpt-tiny --prompt "The if statement"
    python generate.py --model out/bart-headline --prompt-file article.txt
    echo "The for statement" | python generate.py --model out/gpt-tiny -

The loop never changes: run a step, choose a token from its logits, append it. A *strategy* is a step:

    naive     run the whole model on the whole text, for every token
    hoisted   (BART) encode the source once, run the decoder on the whole target for every token
    cached    prefill: everything enters once and its keys and values are stored; then only the newest token enters

All three give the same logits; what differs is what a step costs. Ragged batches are the normal case: rows are padded
on the right, and every row decodes at its own position. Padding lies in a row's future, so causality hides it.
"""

import json
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from attention import Attention, CausalSelfAttention, KVCache
from model import BART
from plumbing.errors import NonFiniteError, Parser, UserError, run

# -----------------------------------------------------------------------------
# Choosing a token


@dataclass(slots=True)
class Sampling:
    """
    How a token is chosen from its logits. The default is greedy: the most likely one, the lowest id among equals.
    Filters apply in the order top_k, top_p, min_p, each to what the one before it left.
    """

    temperature: float = 0.0     # logits are divided by this; 0 = greedy
    top_k: int | None = None     # keep the k most likely tokens
    top_p: float | None = None   # keep the most likely tokens until their probabilities reach p (Holtzman et al. 2019)
    min_p: float | None = None   # keep tokens at least this fraction as likely as the most likely one
    seed: int | None = None      # of the draws; None = different every time
    n_vocab: int | None = None   # ids from here on are never chosen: a model's vocabulary may be padded

    def validate(self):
        if not 0 <= self.temperature < float("inf"):
            raise UserError(f"temperature={self.temperature} must be a finite number, 0 (greedy) or above")
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"top_k={self.top_k} must be at least 1: leave it out to keep every token")
        for name in ("top_p", "min_p"):
            p = getattr(self, name)
            if p is not None and not 0 <= p <= 1:
                raise UserError(f"{name}={p} is a probability: choose it from 0 to 1")
        if self.seed is not None and not 0 <= self.seed < 2**63:
            raise UserError(f"seed={self.seed} must be from 0 to 2**63 - 1")

    def chooser(self, device):
        """A function logits (B, V) -> ids (B,) with a random generator of its own."""
        self.validate()
        generator = torch.Generator(device)
        generator.seed() if self.seed is None else generator.manual_seed(self.seed)

        def choose(logits):
            logits = logits[:, : self.n_vocab].to(torch.promote_types(logits.dtype, torch.float32))
            most = logits.amax(-1, keepdim=True)
            if not most.isfinite().all():
                raise NonFiniteError("the model's logits are not finite: its weights are damaged or its dtype overflows")
            if self.temperature == 0:
                return logits.argmax(-1)  # the first, so the lowest id, among equals
            # relative to the maximum nothing overflows, however small the temperature
            probs = ((logits - most) / max(self.temperature, 1e-30)).softmax(-1)
            probs, ids = probs.topk(min(self.top_k or probs.size(-1), probs.size(-1)))  # sorted, most likely first
            probs = probs / probs.sum(-1, keepdim=True)
            if self.top_p is not None:
                keep = probs.cumsum(-1) - probs < self.top_p  # the mass of everything more likely
                keep[:, 0] = True
                probs = probs * keep
            if self.min_p is not None:
                probs = probs.masked_fill(probs < self.min_p * probs[:, :1], 0)
            return ids.gather(-1, torch.multinomial(probs, 1, generator=generator))[:, 0]

        return choose


# -----------------------------------------------------------------------------
# The strategies. Each makes a step: tokens (B, longest), lengths (B ints) -> logits (B, V) of the token that comes
# next in each row. source is None for GPT, for BART the arguments of its encode().


def read(model, source):
    """What a decoder needs to know of its source, as arguments of model.features; nothing for GPT."""
    return {} if source is None else {"memory": model.encode(*source), "source_lengths": source[1]}


def head(model, x, ends):
    """The logits of one position per row, x (B, T, C) -> (B, V): no other position passes through the output head."""
    rows = torch.arange(x.size(0), device=x.device)
    return model.lm_head(x[rows, torch.tensor(ends, device=x.device) - 1])


def naive(model, source):
    def step(tokens, lengths):
        return head(model, model.features(tokens, **read(model, source)), lengths)

    return step


def hoisted(model, source):
    given = None

    def step(tokens, lengths):
        nonlocal given
        given = given or read(model, source)
        return head(model, model.features(tokens, **given), lengths)

    return step


def cached(model, source):
    given = None

    def step(tokens, lengths):
        nonlocal given
        if given is None:  # prefill
            new, start_pos, ends = tokens, 0, lengths
            given = read(model, source)
        else:  # decode: the newest token of each row, at its own position; the source is in the cache
            last = torch.tensor(lengths, device=tokens.device)[:, None] - 1  # (B, 1)
            new, ends = tokens.gather(1, last), [1] * len(lengths)
            start_pos = lengths[0] - 1 if len(set(lengths)) == 1 else last
            given = dict.fromkeys(given)
        return head(model, model.features(new, use_kv_cache=True, start_pos=start_pos, **given), ends)

    return step


def strategies(model):
    """The strategies that a model has, the most wasteful first."""
    both = {"naive": naive, "cached": cached}
    return {"naive": naive, "hoisted": hoisted, "cached": cached} if isinstance(model, BART) else both


# -----------------------------------------------------------------------------
# The loop


class Borrowed:
    """
    A model on loan, one step at a time: inside `with borrowed:` it is in eval mode, keeps no gradients and has this
    loan's caches; outside it is as it was found, also after an exception and while other loans are open.
    """

    def __init__(self, model, batch_size, length):
        self.modules = list(model.modules())
        self.caches = {m: KVCache(batch_size, length) if isinstance(m, CausalSelfAttention) else None
                       for m in self.modules if isinstance(m, Attention)}

    def swap(self):
        for layer, cache in self.caches.items():
            layer.cache, self.caches[layer] = cache, layer.cache

    def __enter__(self):
        self.training = [m for m in self.modules if m.training]
        for m in self.training:
            m.training = False
        self.swap()
        self.mode = torch.inference_mode()
        self.mode.__enter__()

    def __exit__(self, *error):
        self.mode.__exit__(*error)
        self.swap()
        for m in self.training:
            m.training = True


def check_ids(what, rows, config, least=1):
    """Raise UserError unless every row is a list of at least `least` ids of the vocabulary."""
    for r, row in enumerate(rows):
        if len(row) < least:
            raise UserError(f"{what} {r} is empty: it needs at least {least} token")
        for i in row:
            if not isinstance(i, int) or not 0 <= i < config.vocab_size:
                raise UserError(f"{what} {r} has the id {i!r}: ids are integers from 0 to {config.vocab_size - 1}")


def pad(rows, width, value, device):
    """Lists of ids as a tensor (B, width), padded on the right with value."""
    return torch.tensor([[*row, *[value] * (width - len(row))] for row in rows], dtype=torch.long, device=device)


def prepare(model, prompts, max_new_tokens, decoder_prompts):
    """Check a request and sort it into the source (None for GPT) and the B texts that the decoder continues."""
    config, device = model.config, next(model.parameters()).device
    source, texts = None, prompts
    check_ids("prompt", prompts, config)
    if isinstance(model, BART):
        lengths = [len(prompt) for prompt in prompts]
        longest = max(lengths, default=0)
        if longest > config.block_size:
            raise UserError(f"a source of {longest} tokens does not fit block_size={config.block_size}: shorten it")
        ragged = torch.tensor(lengths, device=device) if min(lengths, default=0) < longest else None
        source = pad(prompts, longest, config.pad_id, device), ragged
        starts = [[]] * len(prompts) if decoder_prompts is None else decoder_prompts
        check_ids("decoder prompt", starts, config, least=0)
        texts = [[config.start_id, *start] for start in starts]
    elif decoder_prompts is not None:
        raise UserError("decoder_prompts are for an encoder-decoder: a GPT continues its prompts themselves")
    if len(texts) != len(prompts):
        raise UserError(f"{len(texts)} decoder prompts for {len(prompts)} sources: give one for each")
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens={max_new_tokens} must be at least 1")
    longest = max(map(len, texts), default=0)
    if longest + max_new_tokens > config.block_size:
        raise UserError(f"{longest} tokens and max_new_tokens={max_new_tokens} do not fit block_size={config.block_size}: "
                        f"shorten the prompt or ask for fewer")
    return source, texts


def stream(model, prompts, max_new_tokens, *, strategy="cached", decoder_prompts=None, ignore_eos=False, **sampling):
    """
    generate(), one step at a time: yields lists of B ids, None for a row that has ended. Whatever is wrong with the
    request is found out here, before the first step. Between two steps the model is free for other use.
    """
    if strategy not in strategies(model):
        raise UserError(f"strategy={strategy!r} is not one of those this model has: {', '.join(strategies(model))}")
    device = next(model.parameters()).device
    choose = Sampling(**sampling).chooser(device)
    source, texts = prepare(model, prompts, max_new_tokens, decoder_prompts)
    return loop(model, strategies(model)[strategy](model, source), texts, max_new_tokens, choose,
                eos_id=None if ignore_eos else model.config.eos_id)


def loop(model, step, texts, max_new_tokens, choose, eos_id):
    """The loop: whatever the strategy, step, choose, append."""
    B, lengths = len(texts), [len(text) for text in texts]
    room = max(lengths, default=0) + max_new_tokens
    tokens = pad(texts, room, 0, next(model.parameters()).device)  # (B, room)
    alive = [True] * B
    borrowed = Borrowed(model, B, room)
    while any(alive) and max_new_tokens > 0:
        with borrowed:
            ids = choose(step(tokens[:, : max(lengths)], lengths))  # (B,)
            tokens[range(B), lengths] = ids
        lengths = [n + 1 for n in lengths]
        max_new_tokens -= 1
        ids = ids.tolist()
        yield [i if a else None for i, a in zip(ids, alive)]
        alive = [a and i != eos_id for i, a in zip(ids, alive)]


def generate(model, prompts, max_new_tokens, *, strategy="cached", decoder_prompts=None, ignore_eos=False, **sampling):
    """
    The new ids of each row: a list of B lists, each up to and including the row's end-of-sequence id, no padding.

    prompts: B lists of ids, of any lengths: texts to continue for GPT, sources for BART (whose decoder starts from
    config.start_id, then the row of decoder_prompts, if given). strategy: see the top of this file; all give the same
    tokens. ignore_eos: go on to max_new_tokens in every row. The rest are fields of Sampling: temperature=0.0
    (greedy), top_k, top_p, min_p, seed, n_vocab.

    Raises UserError (a ValueError) if the request is not possible or does not fit block_size, before anything is
    computed; NonFiniteError if the logits are not numbers.
    """
    rows = [[] for _ in prompts]
    for ids in stream(model, prompts, max_new_tokens, strategy=strategy, decoder_prompts=decoder_prompts,
                      ignore_eos=ignore_eos, **sampling):
        for row, i in zip(rows, ids):
            row.extend([] if i is None else [i])
    return rows
