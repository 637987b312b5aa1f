"""Bug or rounding: every planted bug is told from rounding and found where it is, and rounding is never called a bug."""

import json
import os
import random

import pytest
import torch
from conftest import call

import bench
import generate as program
import mutants
from compare import compare
from generate import strategies
from model import BART, GPT, BARTConfig, GPTConfig
from plumbing.models import random_model
from plumbing.report import comparison_table
from test_model import random_sizes, rough


def gpt(dtype=torch.float32, seed=0, **sizes):
    torch.manual_seed(seed)
    sizes = dict(n_layer=3, n_head=4, n_kv_head=2, n_embd=32, vocab_size=40, block_size=24) | sizes
    return rough(GPT(GPTConfig(**sizes)), dtype)


def bart(dtype=torch.float32, seed=0, **sizes):
    torch.manual_seed(seed)
    sizes = dict(n_encoder_layer=1, n_decoder_layer=3, n_head=4, n_kv_head=2, n_embd=32, vocab_size=40, block_size=24) | sizes
    return rough(BART(BARTConfig(**sizes)), dtype)


PROMPTS = [[3, 9, 4, 22, 17], [5, 11]]


def compared(model, prompts=PROMPTS, M=8, **options):
    return compare(model, strategies(model), prompts, M, ignore_eos=True, **options)


def forked(function):
    """What a function returns in a fork of this process, as JSON: whatever it breaks is broken there alone."""
    read, write = os.pipe()
    if not (child := os.fork()):
        try:
            os.write(write, json.dumps(function()).encode())
        except BaseException as error:
            os.write(write, json.dumps(f"{type(error).__name__}: {error}").encode())
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read) as file:
        found = json.load(file)
    os.waitpid(child, 0)
    return found


# -----------------------------------------------------------------------------
# Rounding


def sharp_case(seed, dtype):
    """A GPT with strong attention whose tokens come in pairs, nearly each other's doubles: rounding chooses between them."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    model = GPT(GPTConfig(n_layer=3, n_head=4, n_embd=64, vocab_size=300, block_size=60, tie_weights=False))
    for name, p in model.named_parameters():
        if p.dim() == 2:
            torch.nn.init.normal_(p, std=0.3 if name in ("wte.weight", "wpe.weight", "lm_head.weight") else 3 / 8)
    head = model.lm_head.weight.data
    head[1::2] = head[::2] + 1e-3 * torch.randn_like(head[::2])
    prompts = [[rng.randrange(300) for _ in range(n)] for n in (30, 15)]
    return model.to(dtype).eval(), prompts, 12


def random_case(seed, dtype):
    rng = random.Random(seed)
    if rng.random() < 0.3:
        return sharp_case(seed, dtype)
    sizes = random_sizes(rng) | {"block_size": rng.randint(20, 40)}
    sizes["n_embd"] *= rng.choice([1, 4, 16])  # wide ones round differently by the number of rows in a product
    torch.manual_seed(seed)
    if rng.random() < 0.5:
        model = GPT(GPTConfig(n_layer=rng.randint(1, 3), **sizes))
    else:
        model = BART(BARTConfig(n_encoder_layer=1, n_decoder_layer=rng.randint(1, 3),
                                **sizes | {"vocab_size": rng.randint(5, 30)}))
    if rng.random() < 0.7:
        rough(model)
    if rng.random() < 0.3:  # ties: some tokens are each other's doubles
        model.lm_head.weight.data[1::2] = model.lm_head.weight.data[: len(model.lm_head.weight) // 2]
    B, width = rng.randint(1, 3), rng.randint(1, 9)
    prompts = [[rng.randrange(model.config.vocab_size) for _ in range(width if rng.random() < 0.5 else rng.randint(1, 9))]
               for _ in range(B)]
    return model.to(dtype).eval(), prompts, rng.randint(1, 9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_rounding_is_never_called_a_bug(dtype):
    """MINDECODE_CASES=340 for the run that is recorded."""
    flipped = differ = 0
    for seed in range(int(os.environ.get("MINDECODE_CASES", 20))):
        result = compared(*random_case(seed, dtype))
        assert not result["bug"], (seed, [s["finding"] for s in result["strategies"]])
        differ += any(s["finding"]["verdict"] == "rounding" for s in result["strategies"])
        flipped += any(s["finding"].get("flips", False) for s in result["strategies"])
    assert differ and (flipped or dtype in (torch.float32, torch.float64))


def test_a_flipped_tie_is_told_with_its_gap():
    for seed in range(10):
        result = compared(*sharp_case(seed, torch.bfloat16))
        flips = [s for s in result["strategies"] if s["finding"].get("flips")]
        if flips:
            text = comparison_table(result)
            first = flips[0]["first_difference"]
            assert f"flips a near tie at step {first['step']}" in text and "falls" in text and "DIFFER" in text
            return
    pytest.fail("no tie was flipped")


# -----------------------------------------------------------------------------
# Bugs

# What each mutant is found as: model, strategy, the first step that is wrong, attention, kind; always in the first layer.
FOUND = {
    "mask_of_a_chunk_is_aligned_top_left": (gpt, "cached", 2, "self", "mask"),
    "mask_is_skipped_when_the_cache_is_used": (gpt, "cached", 1, "self", "mask"),
    "chunk_sees_its_own_future": (gpt, "cached", 2, "self", "mask"),
    "positions_are_not_offset": (bart, "cached", 2, "self", "positions"),
    "positions_are_offset_by_one_too_few": (gpt, "cached", 2, "self", "positions"),
    "ragged_rows_share_one_position": (gpt, "cached", 2, "self", "positions"),
    "key_positions_are_off_by_one": (gpt, "cached", 2, "self", "positions"),
    "padding_of_a_source_is_attended_to": (bart, "cached", 1, "self", "mask"),
    "one_padded_position_of_a_source_counts": (bart, "cached", 1, "self", "mask"),
    "keys_are_written_one_slot_late": (gpt, "cached", 1, "self", "keys"),
    "values_are_not_written_after_the_prefill": (bart, "cached", 2, "self", "values"),
    "only_the_first_row_is_written": (gpt, "cached", 1, "self", "keys"),
    "rows_ask_the_neighbouring_source": (bart, "cached", 1, "cross", "keys"),
    "a_ragged_prefill_takes_the_last_column": (gpt, "cached", 1, None, "head"),
    "the_source_is_projected_at_every_step": (bart, "cached", None, None, "counts"),
}


@mutants.mutant
def only_the_newest_key_is_kept():
    _, cache, *_ = mutants.project()

    @mutants.around(cache.KVCache, "update")
    def update(original, *args):
        keys, values, key_pos = original(*args)
        return keys[:, :, -1:], values[:, :, -1:], key_pos[-1:]


@mutants.mutant
def values_are_zero():
    mutants.writing(lambda cache, k, v: (k, 0 * v))


@mutants.mutant
def cross_keys_are_reversed():
    attention, *_ = mutants.project()

    @mutants.around(attention.CrossAttention, "project")
    def project(original, self, encoded):
        k, v = original(self, encoded)
        return (k.flip(2) if torch.is_inference_mode_enabled() and len(encoded) > 1 else k), v


@mutants.mutant
def the_position_is_always_zero():
    mutants.passing_with(lambda pos, start_pos, cache: pos if cache is None else 0 * pos)


FOUND |= {
    "only_the_newest_key_is_kept": (bart, "cached", 2, "self", "keys"),
    "values_are_zero": (gpt, "cached", 1, "self", "values"),
    "cross_keys_are_reversed": (bart, "cached", 1, "cross", "keys"),
    "the_position_is_always_zero": (bart, "cached", 2, "self", "positions"),
}


@pytest.mark.parametrize("name", FOUND)
def test_a_planted_bug_is_found_at_its_first_step_layer_and_kind(name):
    make, strategy, step, attention, kind = FOUND[name]

    def run():
        mutants.MUTANTS[name]()
        model = make()
        result = compare(model, program.strategies(model), PROMPTS, 8, ignore_eos=True)
        return result["bug"], comparison_table(result), {s["strategy"]: s["finding"] for s in result["strategies"]}

    bug, table, found = forked(run)
    assert bug and "BUG" in table, table
    found = found[strategy]
    assert (found["verdict"], found["step"], found["kind"]) == ("bug", step, kind), found
    if kind != "counts":
        assert (found["layer"], found["attention"]) == (None if kind == "head" else 0, attention), found


def test_a_bug_in_a_later_layer_is_found_there():
    def run():
        model = gpt()
        layer = model.h[2].attn
        layer.pattern.register_forward_pre_hook(
            lambda module, args: (args[0], args[1], 2 * args[2], *args[3:]) if args[0].size(2) == 1 else None)
        return compared(model)["strategies"][1]["finding"]

    found = forked(run)
    assert (found["verdict"], found["step"], found["layer"], found["kind"]) == ("bug", 2, 2, "values")


def test_decoder_prompts_are_compared_too():
    model = bart()
    assert not compared(model, decoder_prompts=[[7, 8], [9]])["bug"]
    found = compare(model, {"naive": program.naive, "mine": lambda model, sources, B, room, choose: program.cached(
        model, [source[::-1] for source in sources], B, room, choose)}, PROMPTS, 8, decoder_prompts=[[7, 8], [9]],
        ignore_eos=True)["strategies"][1]["finding"]
    assert (found["verdict"], found["step"]) == ("bug", 1)  # it read the sources backwards


def test_of_what_hooks_do_not_see_no_counts_are_shown():
    model = gpt()
    unseen, cached = gpt(), strategies(model)["cached"]
    makes = {"cached": cached, "unseen": lambda _, *request: cached(unseen, *request)}
    rows = [line.split() for line in comparison_table(compare(model, makes, PROMPTS, 8)).splitlines()]
    [seen], [other] = ([row[4:7] + row[8:9] for row in rows if row[:1] == [name]] for name in makes)
    assert other == ["-"] * 4 and all(count.isdecimal() for count in seen)


def test_a_choice_that_the_logits_do_not_explain_is_a_bug():
    def stubborn(model, sources, B, room, choose):
        return program.cached(model, sources, B, room, lambda logits, rows, which: [
            [(ids[0] + (len(row) > 7)) % 40] for ids, row in zip(choose(logits, rows, which), rows)])

    model = gpt()
    result = compare(model, {"naive": program.naive, "mine": stubborn}, PROMPTS, 8, ignore_eos=True)
    found = result["strategies"][1]["finding"]
    assert result["bug"] and (found["kind"], found["step"], found["row"]) == ("choosing", 4, 0)


TOML = """
[model]
type = "bart"
n_encoder_layer = 2
n_decoder_layer = 2
n_head = 4
n_embd = 64
vocab_size = 500
block_size = 128
"""


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_command_exits_1_where_there_is_a_bug_and_0_where_there_is_none(dtype, tmp_path):
    (tmp_path / "bart.toml").write_text(TOML)
    args = "compare", "--random", tmp_path / "bart.toml", "--prompt-tokens", 64, "--max-new-tokens", 40, "--dtype", dtype, "--device", "cpu"
    right = call(bench.main, *args)
    assert right.code == 0 and "BUG" not in right.out and "closed form" in right.out
    distinct = int(right.out.split(" distinct")[0].split()[-1])
    assert distinct >= 12  # a random model whose texts vary

    def forgetful():
        mutants.MUTANTS["only_the_newest_key_is_kept"]()
        return call(bench.main, *args)

    code, out, err = forked(forgetful)
    assert code == 1 and "BUG, first at step 2" in out and "layer 0, self-attention: keys" in out and not err


@pytest.mark.parametrize("preset", ["gpt2-medium", "bart-large"])
@pytest.mark.parametrize("seed, dtype", [(0, torch.float32), (1, torch.bfloat16), (2, torch.float16)])
def test_texts_of_a_deep_random_model_vary_and_its_rounding_is_no_bug(preset, seed, dtype):
    """Twelve post-norm layers at full scale leave nothing of what was read: one id a hundred times."""
    torch.manual_seed(seed)
    narrow = "--model.n_embd=64", "--model.n_head=4", "--model.vocab_size=5000", "--model.eos_id=2"
    result = compared(random_model(preset, dtype, "cpu", narrow), [[7 * i for i in range(64)]], 40)
    assert result["distinct"] >= 20 and not result["bug"], comparison_table(result)


def test_texts_of_a_wide_random_model_vary_too():
    """The wider a tied model, the more its head favours whatever token is left in the stream, the one just read."""
    torch.manual_seed(0)
    shallow = "--model.n_encoder_layer=1", "--model.n_decoder_layer=2", "--model.vocab_size=5000"
    model = random_model("bart-large", torch.float32, "cpu", shallow)
    assert len(set(program.generate(model, [[7 * i for i in range(64)]], 40, ignore_eos=True)[0])) >= 20
