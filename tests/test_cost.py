"""What decoding costs: every count is of what really ran, and every closed form equals it."""

import json
import random
from inspect import isfunction

import pytest
import torch
from torch.nn.modules.module import Module

from attention import Attention
import generate as program
from compare import compare, first_difference
from cost import attention_weights, count, linears, matrix, predict, rows_through
from generate import generate, strategies, stream
from model import BART, GPT, BARTConfig, GPTConfig
from plumbing.errors import UserError
from plumbing.report import comparison_table, shape_table
from plumbing.utils import set_seed
from test_schedules import random_pattern


def tiny_bart(**sizes):
    set_seed(1)
    config = BARTConfig(**dict(dict(n_encoder_layer=1, n_decoder_layer=1, n_head=2, n_embd=8, vocab_size=16,
                                    block_size=64), **sizes))
    return BART(config)


def tiny_gpt(**sizes):
    set_seed(1)
    return GPT(GPTConfig(**dict(dict(n_layer=2, n_head=2, n_embd=8, vocab_size=16, block_size=64), **sizes)))


def counted(model, prompts, M, strategy, **kwargs):
    with count(model) as cost:
        generate(model, prompts, M, strategy=strategy, ignore_eos=True, **kwargs)
    return cost


# ---- tokens


def test_1024_tokens_into_100_cost_107450_then_6074_then_1124():
    model = tiny_bart(n_head=1, block_size=1024)
    costs = {name: counted(model, [[3] * 1024], 100, name) for name in strategies(model)}
    total = {name: cost.encoder_tokens + cost.decoder_tokens for name, cost in costs.items()}
    assert total == {"naive": 107_450, "hoisted": 6_074, "cached": 1_124}
    assert rows_through(costs["hoisted"].linear_rows, "decoder.0.") == 245_200
    assert rows_through(costs["cached"].linear_rows, "decoder.0.") == 2_848
    assert rows_through(costs["hoisted"].linear_rows, "decoder.0.cross.c_kv") == 204_800


def test_counting_the_start_token_among_the_outputs_is_one_call_less():
    config = tiny_bart().config  # len(output_tokens) = 100 with the start token: 99 calls
    for strategy, tokens in dict(naive=106_326, hoisted=5_974, cached=1_123).items():
        predicted = predict(config, strategy, 1024, 99)
        assert predicted["encoder_tokens"] + predicted["decoder_tokens"] == tokens


def test_twenty_other_sizes_cost_what_the_formulas_say():
    model, draw = tiny_bart(), random.Random(0)
    sizes = {(draw.randint(1, 60), draw.randint(1, 30)) for _ in range(25)}
    assert len(sizes) >= 20
    for N, M in sizes:
        formulas = dict(naive=N * M + M * (M + 1) // 2, hoisted=N + M * (M + 1) // 2, cached=N + M)
        for strategy, tokens in formulas.items():
            cost = counted(model, [[3] * N], M, strategy)
            assert cost.encoder_tokens + cost.decoder_tokens == tokens, (N, M, strategy)


def test_a_gpt_reads_its_prompt_every_time_or_once():
    model = tiny_gpt()
    for P, M in [(1, 1), (1, 7), (5, 1), (9, 20)]:
        assert counted(model, [[3] * P], M, "naive").decoder_tokens == sum(P + m for m in range(M))
        assert counted(model, [[3] * P], M, "cached").decoder_tokens == P + M - 1


def test_one_position_per_row_enters_after_prefill_also_in_ragged_batches():
    for model, prefill in (tiny_gpt(), 15), (tiny_bart(), 3):
        cost = counted(model, [[3], [4] * 5, [5] * 2], 6, "cached")
        assert dict(cost.decoder) == {1: prefill, **dict.fromkeys(range(2, 7), 3)}  # 3 rows, padded to 5 in a GPT


def test_teacher_forcing_reads_source_and_target_once():
    model = tiny_bart()
    with count(model) as cost:
        model(torch.full((2, 9), 3), torch.full((2, 4), 3))
    assert (cost.steps, cost.encoder_tokens, cost.decoder_tokens) == (1, 18, 8)
    assert cost.linear_rows["lm_head"] == 8


# ---- linears, products, bytes


def test_cross_keys_and_values_are_projected_once_when_cached():
    model = tiny_bart(n_decoder_layer=2)
    for strategy, passes in dict(naive=7, hoisted=7, cached=1).items():
        records = counted(model, [[3] * 9], 7, strategy).records
        projections = [r for r in records if r["name"] == "c_kv"]
        assert len(projections) == 2 * passes
        assert [(r["phase"], r["step"]) for r in projections] == [("project", k + 1) for k in range(passes) for _ in "LL"]


def random_case(seed):
    draw = random.Random(seed)
    n_head = draw.choice([1, 2, 4, 6])
    shared = dict(n_head=n_head, n_kv_head=draw.choice([None] + [k for k in range(1, n_head + 1) if n_head % k == 0]),
                  n_embd=n_head * draw.choice([2, 4]), n_inner=draw.choice([None, 5, 24]),
                  vocab_size=draw.randint(5, 40))
    if seed >= 24:
        shared["pattern"] = random_pattern(draw, shared | {"block_size": 5})
    layers = dict(n_encoder_layer=draw.randint(1, 3), n_decoder_layer=draw.randint(1, 3))
    if seed >= 24:
        layers |= dict(n_decoder_kv_head=draw.choice([None, n_head]), n_cross_kv_head=draw.choice([None, 1, n_head]))
    model = tiny_bart(**shared, **layers) if seed % 3 else tiny_gpt(**shared, n_layer=draw.randint(1, 3))
    return model, draw.randint(1, 20), draw.randint(1, 9), draw.randint(1, 3)


@pytest.mark.parametrize("seed", range(48))  # from 24 on with sparse patterns
def test_the_prediction_equals_the_count(seed):
    model, N, M, B = random_case(seed)
    begun = seed % 4 if model.config.is_encoder_decoder else 0
    more = {"decoder_prompts": [[4] * begun] * B} if begun else {}
    for strategy in strategies(model):
        cost = counted(model, [[3] * N] * B, M, strategy, **more)
        predicted = predict(model.config, strategy, N, M, B, begun=begun)
        assert predicted["encoder_tokens"] == cost.encoder_tokens
        assert predicted["decoder_tokens"] == cost.decoder_tokens
        assert predicted["linear_rows"] == cost.linear_rows
        assert predicted["linear_flops"] == cost.flops("GEMM")
        assert predicted["attention_flops"] == cost.flops("BGEMM")
        assert predicted["self_cache_bytes"] == cost.cache_bytes("self")
        assert predicted["cross_cache_bytes"] == cost.cache_bytes("cross")
        if M > 1:  # the last step reads the linears that it runs, and the keys and values that it attends to
            last = [p for p in cost.products if p[1] == M]
            ran = [model.get_submodule(name) for _, _, name, _, right in last if len(right) == 2]
            assert predicted["weight_bytes"] == sum(p.nbytes for m in ran for p in m.parameters())
            read = sum(2 * 4 * right.numel() for *_, right in last if len(right) == 4)
            assert predicted["step_bytes"] - predicted["weight_bytes"] == (read if strategy == "cached" else 0)


def test_cache_bytes_are_keys_and_values_of_every_kv_head():
    model = tiny_bart(n_head=4, n_kv_head=2, n_decoder_layer=3)
    cost = counted(model, [[3] * 9] * 2, 5, "cached")
    assert cost.cache_bytes("self") == 2 * 3 * 2 * 2 * (1 + 5) * 2 * 4  # k and v, layers, rows, heads, slots, D, fp32
    assert cost.cache_bytes("cross") == 2 * 3 * 2 * 2 * 9 * 2 * 4
    assert predict(model.config, "cached", 9, 5, 2, itemsize=2)["self_cache_bytes"] == cost.cache_bytes("self") / 2


# ---- shapes


def test_only_the_products_of_cached_self_attention_grow():
    model = tiny_bart(n_head=4, n_kv_head=2)
    steps = {}
    for r in counted(model, [[3] * 9] * 2, 6, "cached").records:
        if r["phase"] == "step":
            steps.setdefault((r["attention"], r["name"], r["kind"]), []).append((r["left"], r["right"], r["out"]))
    growing = {key for key, shapes in steps.items() if any(shape != shapes[0] for shape in shapes)}
    assert growing == {("self", "qk", "BGEMM"), ("self", "pv", "BGEMM")}
    assert [right for _, right, _ in steps["self", "qk", "BGEMM"]] == [[2, 2, 2, k] for k in range(2, 7)]
    assert [right for _, right, _ in steps["cross", "qk", "BGEMM"]] == [[2, 2, 2, 9]] * 5


def test_attention_output_has_the_shape_of_its_query():
    records = counted(tiny_bart(), [[3] * 9], 6, "naive").records
    queries = [r["left"] for r in records if r["name"] == "qk"]
    assert len(queries) == 6 * 3 and queries == [r["out"] for r in records if r["name"] == "pv"]


def test_a_decoder_prompt_enters_at_once_and_then_one_token_at_a_time():
    cost = counted(tiny_bart(), [[3] * 9], 4, "cached", decoder_prompts=[[5, 6, 7]])
    assert dict(cost.decoder) == {1: 4, 2: 1, 3: 1, 4: 1}
    assert {r["phase"] for r in cost.records if r["step"] == 1} == {"encode", "project", "prefill"}
    assert {r["phase"] for r in cost.records if r["step"] > 1} == {"step"}


def test_the_table_tells_what_grows_from_the_records():
    model = tiny_bart(n_decoder_layer=2)
    cached = counted(model, [[3] * 9], 6, "cached")
    with count(model) as training:
        model(torch.full((1, 9), 3), torch.full((1, 6), 3))
    lines = {tuple(line.split()[:2]): line for line in shape_table(cached.records, training.records).splitlines() if line}
    assert "2 x (1 x 4) @ (4 x k)" in lines["self", "QK^T"] and "grows with k" in lines["self", "QK^T"]
    assert "2 x (6 x 4) @ (4 x 6)" in lines["self", "QK^T"]  # training: all positions at once
    assert "2 x (1 x 4) @ (4 x 9)" in lines["cross", "QK^T"] and "fixed" in lines["cross", "QK^T"]
    assert "once" in lines["cross", "c_kv"]
    assert shape_table(cached.records).endswith("what grows with k: self QK^T (BGEMM), self PV (BGEMM)")
    assert "(1 x k+4)" in shape_table(counted(tiny_gpt(), [[3] * 5], 4, "cached").records)  # a prompt of 5: call k sees k + 4
    assert "(k x 8) @" in shape_table(counted(model, [[3] * 9], 6, "hoisted").records)


def test_records_are_plain_data():
    records = counted(tiny_bart(), [[3] * 9], 3, "cached").records
    assert json.loads(json.dumps(records)) == records


# ---- leaving no trace


def hooks(model):
    kept = [name for name in vars(Module()) if name.endswith("hooks")]
    patched = [module for module in model.modules() for value in vars(module).values() if isfunction(value)]
    return patched + [hook for module in model.modules() for name in kept for hook in getattr(module, name)]


def test_counting_leaves_no_hooks_also_after_an_exception():
    model = tiny_bart()
    for observer in count, attention_weights:
        with observer(model):
            assert hooks(model)
        assert not hooks(model)
        with pytest.raises(ValueError, match="block_size"):
            with observer(model):
                model(torch.full((1, 9), 3), torch.full((1, 65), 3))
        assert not hooks(model)
    with count(model) as cost:
        with attention_weights(model):  # one inside the other
            pass
        generate(model, [[3] * 4], 1)
    assert cost.flops("BGEMM") and not hooks(model)
    steps = stream(model, [[3] * 4], 3)
    with count(model) as cost:
        next(steps)
    assert len(list(steps)) == 2 and cost.steps == 1  # what runs after the block is not counted


def test_another_model_is_not_counted():
    model, other = tiny_bart(), tiny_gpt()
    with count(model) as cost, attention_weights(model) as weights:
        generate(other, [[3]], 3)
    assert cost.steps == 0 and not cost.products and weights["self"] == [[]]


# ---- comparing


def compared(model, prompts, M, **options):
    return compare(model, strategies(model), prompts, M, **options)


def test_all_strategies_agree_and_their_counts_are_exact():
    for model, prompts in (tiny_bart(), [[3] * 9, [5] * 4]), (tiny_gpt(), [[3] * 6, [5]]):
        result = compared(model, prompts, 7, ignore_eos=True)
        assert not result["bug"] and result["M"] == 7 and result["batch_size"] == 2
        assert all(s["logit_difference"] < 1e-5 and s["identical"] for s in result["strategies"])
        assert all([s["encoder_tokens"], s["decoder_tokens"]] == s["closed_form"] for s in result["strategies"])
        assert [s["strategy"] for s in result["strategies"]] == list(strategies(model))
        assert all(s["ids"] == generate(model, prompts, 7, ignore_eos=True) for s in result["strategies"])
        assert result["distinct"] == max(len(set(row)) for row in result["strategies"][0]["ids"])
        assert json.loads(json.dumps(result)) == result
        assert comparison_table(result).count(" same ") == len(strategies(model)) + sum(
            s["finding"]["verdict"] == "rounding" for s in result["strategies"])  # "the same tokens in fp64"


def test_what_caching_saves_is_told_linear_by_linear():
    text = comparison_table(compared(tiny_bart(), [[3] * 9], 7, ignore_eos=True))
    assert "Of the 8 linears of attention in a decoder layer (10 with the feed-forward) 2 run once per source and 8 shrink" in text
    for rows in ("self q, k, v 28 -> 7", "cross k, v 63 -> 9", "feed-forward fc 28 -> 7"):
        assert rows in text
    assert "40 %" not in comparison_table(compared(tiny_gpt(), [[3] * 9], 7, ignore_eos=True))


def test_a_strategy_that_does_more_than_it_should_is_a_bug():
    model = tiny_bart()
    result = compare(model, {"cached": program.hoisted}, [[3] * 9], 4, ignore_eos=True)
    assert result["bug"] and result["strategies"][0]["finding"]["kind"] == "counts"
    assert "the closed form is [9, 4]" in comparison_table(result)


def test_a_row_that_ended_or_parted_is_compared_no_further():
    ids = [[4, 2], [5, 6, 7]]
    flat = [[torch.zeros(8)] * 2, [torch.zeros(8)] * 3]
    after_the_end = [flat[0], [*flat[1][:2], torch.full((8,), 0.5)]]
    assert first_difference(ids, flat, ids, after_the_end) == (0.5, None)
    other = [[4, 5, 9], [3, 6, 1]]  # row 0 parts at step 2, row 1 at step 1
    wild = [[*row[:2], torch.full((8,), 9.0)] for row in flat]
    parted = dict(step=1, row=1, tokens=[5, 3], gap=0, difference=0)
    assert first_difference(ids, flat, other, wild) == (0, parted)
    ended = dict(step=3, row=1, tokens=[7, None], gap=float("inf"), difference=0)
    assert first_difference(ids, flat, [[4, 2], [5, 6]], flat) == (0, ended)


@pytest.mark.parametrize("starts", [[[7, 8], [9, 4]], [[7, 8, 9], []]], ids=["alike", "ragged"])
def test_decoder_prompts_have_a_closed_form_too(starts):
    model, prompts, M = tiny_bart(), [[3] * 9, [5] * 4], 7
    P = 1 + max(map(len, starts))  # padding counts
    options = dict(decoder_prompts=starts, ignore_eos=True)
    again = P * M + M * (M - 1) // 2
    forms = {"naive": [9 * M, again], "hoisted": [9, again], "cached": [9, P + M - 1]}
    result = compared(model, prompts, M, **options)
    assert not result["bug"]
    for s in result["strategies"]:
        assert s["closed_form"] == [s["encoder_tokens"], s["decoder_tokens"]] == [2 * n for n in forms[s["strategy"]]]
    result = compare(model, {"naive": program.naive, "cached": program.hoisted}, prompts, M, **options)
    assert result["strategies"][1]["finding"]["kind"] == "counts"
    assert result["strategies"][1]["closed_form"] == [2 * n for n in forms["cached"]]


def test_a_strategy_of_ones_own_is_compared_without_a_closed_form():
    result = compare(tiny_gpt(), {"naive": program.naive, "mine": program.cached}, [[3] * 4], 5, ignore_eos=True)
    assert not result["bug"] and result["strategies"][1]["closed_form"] is None
    assert result["strategies"][1]["decoder_tokens"] == 8 and "  8      -  " in comparison_table(result)


def test_rows_that_end_leave_the_counts_exact():
    lengths = set()
    for model in (tiny_gpt(), tiny_bart()):
        for p in model.parameters():
            p.data.mul_(8)  # so that texts vary
        prompts = [[i] * 4 for i in range(3, 9)]
        for eos in generate(model, prompts, 12, ignore_eos=True)[0][2:]:
            model.config.eos_id = eos
            result = compared(model, prompts, 12)
            assert not result["bug"]
            assert all(s["ids"] == generate(model, prompts, 12) for s in result["strategies"])
            lengths |= {tuple(map(len, result["strategies"][0]["ids"]))}
            wasteful = compare(model, {"naive": program.naive, "cached": program.naive}, prompts, 12)
            assert wasteful["bug"] == (result["M"] > 1)  # the counts are really looked at
            ragged = [prompt[: 1 + i % 4] for i, prompt in enumerate(prompts)]  # what is padded varies: no closed form
            assert not compared(model, ragged, 12)["bug"]
    assert any(len(set(rows)) > 1 for rows in lengths)  # rows ended at different steps


# ---- predicting


@pytest.mark.parametrize("seed", range(12))
def test_the_table_of_linears_is_the_models(seed):
    model, *_ = random_case(seed)
    found = {name: (m.in_features, m.out_features) for name, m in model.named_modules() if hasattr(m, "in_features")}
    assert found == {row.name.format(i): (row.n_in, row.n_out) for row in linears(model.config) for i in range(row.layers)}


def test_another_strategy_is_refused():
    with pytest.raises(UserError, match="'speculative'.*naive, hoisted, cached"):
        predict(tiny_bart().config, "speculative", 3, 4)
    with pytest.raises(UserError, match="'hoisted'.*naive, cached"):  # a GPT has nothing to hoist
        predict(tiny_gpt().config, "hoisted", 3, 4)


def test_linears_that_are_not_torchs_are_counted_too():
    class Quantised(torch.nn.Module):
        """A product whose weight nobody outside needs to understand."""

        def __init__(self, linear):
            super().__init__()
            self.in_features, self.out_features, self.inner = linear.in_features, linear.out_features, [linear]

        def forward(self, x):
            return self.inner[0](x)

    model = tiny_gpt()
    expected = counted(model, [[3] * 5], 4, "cached")
    for block in model.h:
        block.mlp.c_fc = Quantised(block.mlp.c_fc)
    model.lm_head = Quantised(model.lm_head)
    found = counted(model, [[3] * 5], 4, "cached")
    assert found.records == expected.records and found.linear_rows == predict(model.config, "cached", 5, 4)["linear_rows"]


# ---- attention weights


@pytest.mark.parametrize("n_kv_head, pattern", [(4, "full"), (2, "full"), (1, "full"), (4, "local:3"), (2, "sinks:2,4"),
    (4, "fixed:4,1"), (2, "strided:3"), (1, "topk:3,1"), (4, "local:3+column:3"), (2, "block:3+columns:3,1")])
def test_weights_of_cached_decoding_equal_teacher_forced_ones(n_kv_head, pattern):
    sizes = dict(n_head=4, n_kv_head=n_kv_head, n_embd=16, pattern=pattern)
    gpt, bart = tiny_gpt(**sizes).double().eval(), tiny_bart(**sizes, n_decoder_layer=2).double().eval()
    for model, prompt in (gpt, [3, 4, 5, 6]), (bart, [7] * 5 + [8] * 6):
        for p in model.parameters():
            p.data.mul_(8)  # so that attention is far from uniform
        with attention_weights(model) as decoded:
            new = generate(model, [prompt], 9, ignore_eos=True)[0]
        start = prompt if model is gpt else [model.config.start_id]
        with attention_weights(model) as forced, torch.no_grad():
            target = torch.tensor([start + new[:-1]])
            model(target) if model is gpt else model(torch.tensor([prompt]), target)
        for kind in ["self"] if model is gpt else ["self", "cross"]:
            for ours, theirs in zip(decoded[kind], forced[kind], strict=True):
                assert len(ours) == 9 and len(theirs) == 1
                torch.testing.assert_close(matrix(ours), theirs[0], rtol=0, atol=1e-10)
                torch.testing.assert_close(matrix(ours).sum(-1), torch.ones(1, 4, len(start) + 8).double())
        assert (matrix(decoded["self"][0]).triu(1) == 0).all()


def test_ragged_sources_give_no_weight_to_padding():
    model = tiny_bart()
    with attention_weights(model) as weights:
        generate(model, [[3] * 4, [5] * 9], 5, ignore_eos=True)
    cross = matrix(weights["cross"][0])  # (B, H, T, S)
    assert cross.shape == (2, 2, 5, 9) and (cross[0, :, :, 4:] == 0).all() and (cross[1] > 0).all()


def test_every_attention_of_a_model_is_watched():
    model = tiny_bart(n_encoder_layer=2, n_decoder_layer=3)
    records = counted(model, [[3] * 9], 1, "cached").records
    n_attention = sum(isinstance(m, Attention) for m in model.modules())
    assert n_attention == 8 and [r["name"] for r in records].count("qk") == n_attention
