"""Predicted beside measured: what a step reads and multiplies is exact; times are for the reader."""

import json
from dataclasses import replace

import pytest
import torch

import bench
import roofline
from conftest import call
from cost import count, predict
from generate import generate
from model import BART, GPT, BARTConfig, GPTConfig
from plumbing.report import pays, roofline_table

GPT_CONFIG = GPTConfig(n_layer=3, n_head=4, n_kv_head=2, n_embd=32, vocab_size=50, block_size=64)
BART_CONFIG = BARTConfig(n_encoder_layer=2, n_decoder_layer=3, n_head=4, n_embd=32, vocab_size=50, block_size=64)


@pytest.mark.parametrize("cls, config", [(GPT, GPT_CONFIG), (BART, BART_CONFIG)])
@pytest.mark.parametrize("strategy", ["naive", "cached"])
def test_a_step_reads_and_multiplies_what_the_closed_forms_say(cls, config, strategy):
    model, N, M, B = cls(config), 7, 5, 3
    with count(model) as cost:
        generate(model, [[1] * N] * B, M, strategy=strategy, ignore_eos=True)
    step = cost.step(M)
    last, before = (predict(config, strategy, N, m, B) for m in (M, M - 1))
    flops = sum(last[key] - before[key] for key in ("linear_flops", "attention_flops"))
    assert roofline.multiply(step) == flops
    if strategy == "cached":  # biases are not in a product's matrix
        biases = 4 * sum(p.numel() for name, p in model.named_parameters() if name.endswith(".bias") and (
            "c_" in name or "lm_head" in name) and "encoder" not in name and "c_kv" not in name)
        assert 4 * roofline.read(step) == last["step_bytes"] - biases
    assert sum(times for (batch, *_), times in step.items() if batch) == 2 * len(
        [name for name, _ in model.named_modules() if name.endswith(".pattern")
         and (strategy == "naive" or not name.startswith("encoder"))])


def test_a_machine_is_timed_with_products_just_wide_enough_for_it_and_the_best_counts(monkeypatch):
    """A width that suits a slow machine leaves a fast one waiting, and the other way round it waits for seconds."""
    asked, rates = [], {256: 4e11, 512: 9e11, 1024: 7e11, 2048: 1e12}

    def seconds(self, rows, n_in, n_out, among):
        asked.append((rows, n_in, n_out, among))
        return 2 * rows**3 / rates[rows] * 8  # 0.67 ms, 2.4, 24

    monkeypatch.setattr(roofline.Products, "seconds", seconds)
    assert roofline.matmul_peak.__wrapped__(torch.float32, torch.device("cpu")) == pytest.approx(9e11 / 8)
    assert asked == [(n, n, n, 0) for n in (256, 512, 1024)]


def test_the_queries_that_share_a_head_are_the_rows_of_its_products():
    model = GPT(GPT_CONFIG)
    with count(model) as cost:
        generate(model, [[1] * 7] * 3, 2)
    assert cost.step(1)[3 * 2, 2 * 7, 8, 7] == cost.step(1)[3 * 2, 2 * 7, 7, 8] == 3  # (B KV, H / KV T, D, S)
    assert cost.step(2)[3 * 2, 2, 8, 8] == 6  # S is D here


def test_the_prediction_is_the_sum_over_the_products(monkeypatch):
    products = roofline.Products(torch.bfloat16, torch.device("cpu"))
    seen = []
    monkeypatch.setattr(products, "seconds", lambda *shape: seen.append(shape) or rows_times_size(*shape))
    rows_times_size = lambda rows, n_in, n_out, among: rows * n_in * n_out
    step = {(None, 3, 4, 5): 2, (6, 7, 8, 9): 10}
    assert products.predict(step) == pytest.approx(2 * 3 * 4 * 5 + 10 * 6 * 7 * 8 * 9)
    assert {among for *_, among in seen} == {2 * (2 * 4 * 5 + 10 * 6 * 8 * 9)}


def test_a_product_is_measured_once():
    products = roofline.Products(torch.float32, torch.device("cpu"))
    assert products.seconds(2, 8, 16, 4 * 8 * 16 * 3) == products.seconds(2, 8, 16, 4 * 8 * 16 * 3) > 0
    assert list(products.measured) == [(2, 8, 16, 3)]


@pytest.mark.parametrize("cls, config", [(GPT, GPT_CONFIG), (BART, BART_CONFIG)])
def test_the_narrow_model_makes_the_same_calls(cls, config):
    model = cls(config).double()
    small = roofline.narrow(model)
    assert small.wte.weight.dtype == torch.float64 and model.config.n_embd == 32
    shapes = []
    for m in (model, small):
        with count(m) as cost:
            generate(m, [[1, 2, 3]], 2, ignore_eos=True)
        shapes.append([(name, tuple(left[:-1])) for *_, name, left, right in cost.products])
    assert shapes[0] == shapes[1]
    assert small.count_parameters() < model.count_parameters() / 4


def test_bench_decode_explains_a_step():
    args = ["decode", "--random", "gpt2", "--prompt-tokens", 6, "--device", "cpu", "--model.n_layer=1", "--model.n_head=2",
            "--model.n_embd=8", "--model.vocab_size=50", "--model.eos_id=2", "--num-samples", 2]
    found = json.loads(call(bench.main, *args, "--max-new-tokens", 4, "--repeats", 1, "--json").out.splitlines()[-1])
    assert found["prefill_tokens"] == 12 and found["batch_size"] == 2 and found["N"] == 6
    assert found["step_flops"] == 2 * 2 * (12 * 64 + 50 * 8) + 4 * 8 * 2 * 8  # linears; two products over 8 positions
    assert min(found[key] for key in ("step_seconds", "call_seconds", "product_seconds", "bandwidth")) > 0
    shown = call(bench.main, *args, "--max-new-tokens", 4, "--repeats", 1)
    assert shown.code == 0 and "calls + products" in shown.out
    refused = call(bench.main, *args, "--max-new-tokens", 1)
    assert refused.code == 2 and "--max-new-tokens 1" in refused.err and not refused.out


def test_no_end_stops_the_narrow_model_before_it_is_measured():
    model = GPT(replace(GPT_CONFIG, eos_id=[*range(50)]))
    found = roofline.explain(model, [[1]], roofline.Products(torch.float32, torch.device("cpu")), [1.0, 1.0, 1.0], {}, stop=lambda new: True)
    assert found["call_seconds"] > 0


def test_without_a_model_all_settings_are_measured(monkeypatch):
    seen = []
    step = dict(batch_size=1, step_bytes=10, step_flops=10, step_seconds=1.0, product_seconds=0.5, first_seconds=1.0,
                prefill_tokens=1, bandwidth=20.0)
    monkeypatch.setattr(bench.cli, "read", lambda args: seen.append(args) or len(seen))
    monkeypatch.setattr(bench, "measure_decoding", lambda n: dict(step, call_seconds=0.24 if n % 4 else 0.5))
    outcome = call(bench.main, "decode")
    assert outcome.code == 0 and "5 of 20" in outcome.out and len(seen) == 20, outcome
    assert [args.random for args in seen[::4]] == ["gpt2", "gpt2", "gpt2", "bart-base", "gpt2-medium"]
    assert seen[0].overrides[2] == "--model.n_embd=128" and "gpt2-medium --prompt-tokens=900" in outcome.out


def test_where_the_cache_will_not_pay_a_sentence_says_why():
    calls = dict(call_seconds=0.002, product_seconds=0.0002)
    assert pays(dict(call_seconds=0.002, product_seconds=0.002), calls) == []
    [text] = pays(dict(call_seconds=0.002, product_seconds=0.0004), calls)
    assert "2.20 ms with it and 2.40 ms without, since 2.00 ms are calls" in text


def test_the_table_shows_rates():
    row = dict(strategy="cached", batch_size=4, step_bytes=10e9, step_flops=3e9, step_seconds=2.0, call_seconds=0.5,
               product_seconds=1.0, prefill_tokens=30, first_seconds=3.0)
    cells = roofline_table(20e9, [row]).splitlines()[1].split()
    assert cells == ["cached", "10,000.0", "3,000", "1500.00", "500.00", "+", "1000.00", "2000.00", "5.0", "25%", "1.5",
                     "2", "10"]
