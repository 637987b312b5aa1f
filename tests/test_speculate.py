"""Guessing changes how many passes a text takes, and nothing else: not its logits, its ids, or what is drawn how often."""

import copy
import os
import random
from functools import partial
from itertools import product

import pytest
import torch

import bench
import generate as program
from compare import compare, first_difference, measure
from conftest import GPT_TOML, call, train_run
from cost import count
from further import speculate
from further.speculate import GUESSES, given, look_up, lookup, lookup_draft, speculative
from generate import cached, generate, loop, stream
from model import BART, GPT, BARTConfig, GPTConfig
from plumbing.errors import NonFiniteError, UserError
from plumbing.report import comparison_table
from sampling import Choice, Chooser
from test_model import random_sizes, rough
from test_schedules import random_pattern

# -----------------------------------------------------------------------------
# The same text


def random_model(rng, kind, **sizes):
    """Rough, in fp64, and of one scale with its own noise: a tiny random model repeats one token for ever."""
    if kind == "gpt":
        model = GPT(GPTConfig(n_layer=rng.randint(1, 2), eos_id=1, **sizes))
    else:
        model = BART(BARTConfig(n_encoder_layer=1, n_decoder_layer=rng.randint(1, 2), **sizes))
    model = rough(model)
    for name, p in model.named_parameters():
        if name in ("wpe.weight", "decoder_wpe.weight"):
            torch.nn.init.normal_(p, std=rng.choice([0.0, 2.0]))
    return model


def oracle(texts, right, rng, V):
    """A draft that knows what will be written, row by row, and guesses right with that probability, else never."""
    def make(sources, B, room, choose):
        def draft(rows, which, k):
            found = []
            for j in range(k):
                true = [texts[r][len(row) + j] if len(row) + j < len(texts[r]) else 0 for r, row in zip(which, rows)]
                found.append(([i if rng.random() < right else (i + rng.randrange(1, V)) % V for i in true], None))
            return found
        return draft
    return make


def random_case(seed, kind):
    """A model, prompts, M, and the options of a request with rules; the model may see a part of its past alone."""
    rng = random.Random(f"{kind} {seed}")
    torch.manual_seed(seed)
    sizes = random_sizes(rng) | {"block_size": rng.randint(8, 28), "vocab_size": rng.randint(5, 30)}
    if rng.random() < 0.4:
        sizes["pattern"] = random_pattern(rng, sizes)
    model, V = random_model(rng, kind, **sizes), sizes["vocab_size"]
    ids = lambda least: [rng.randrange(V) for _ in range(rng.randint(least, 6))]
    prompts = [ids(1) for _ in range(rng.randint(1, 4))]
    options = {"ignore_eos": rng.random() < 0.3, "min_length": rng.choice([0, 0, rng.randint(1, 20)]),
               "no_repeat_ngram": rng.choice([None, None, 1, 2, 3]), "n_vocab": rng.choice([None, V - 1]),
               "forced_last": rng.choice([None, 1]), "forced_first": rng.choice([None, 3]) if kind == "bart" else None}
    if kind == "bart" and rng.random() < 0.5:
        options["decoder_prompts"] = [ids(0) for _ in prompts]
    M = rng.randint(1, model.config.block_size - max(map(len, options.get("decoder_prompts", prompts))) - (kind == "bart"))
    return rng, model, prompts, M, options, {**sizes, "block_size": sizes["block_size"] + rng.randint(0, 3)}


def outcome(model, prompts, M, passes, **options):
    """Ids and their logits, or the error that ended it; what each pass found is appended to passes."""
    try:
        return measure(model, lambda: (passes.append(found) or found for found in stream(model, prompts, M, **options)))[1:3]
    except NonFiniteError as error:
        return str(error)


@pytest.mark.parametrize("kind", ["gpt", "bart"])
def test_the_text_is_that_of_plain_greedy_decoding(kind):
    """Whoever guesses, whatever the rules and the pattern. MINDECODE_CASES=500 for a long run, of each kind."""
    several = refused = 0
    for seed in range(int(os.environ.get("MINDECODE_CASES", 14))):
        rng, model, prompts, M, options, sizes = random_case(seed, kind)
        plain = outcome(model, prompts, M, [], **options)
        drafts = {"lookup": dict(speculate="lookup"), "itself": dict(speculate=copy.deepcopy(model)),
                  "small": dict(speculate=random_model(rng, kind, **sizes))}
        if isinstance(plain, tuple):
            begun = [[2, *row] for row in options.get("decoder_prompts", [[]] * len(prompts))] if kind == "bart" else prompts
            texts = [row + new for row, new in zip(begun, plain[0])]
            for right in 0.0, 0.7:
                make = oracle(texts, right, rng, model.config.vocab_size)
                drafts[f"right {right}"] = dict(strategy=partial(speculative, make_draft=make))
        for name, draft in drafts.items():
            found = outcome(model, prompts, M, passes := [], **options, **draft)
            if isinstance(plain, str):
                assert found == plain, (seed, name)
                refused += 1
                continue
            largest, first = first_difference(*plain, *found)
            assert largest <= 1e-10 and first is None, (seed, name, model.config.pattern)
            several += any(len({len(row) for row in rows if row}) > 1 for rows in passes)
            assert name != "right 0.0" or all(len(row) <= 1 for rows in passes for row in rows)
    assert several > 5  # of a pass, rows accepted different numbers
    assert refused > 0 or "MINDECODE_CASES" not in os.environ


