"""A step of the kernels does what the plain model does: logits, keys, values, ids. Without a GPU, Triton interprets."""

import copy
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from attention import attend_explicit
from cache import Memory
from further import compiled, kernel_bench, kernels, many_rows, reading
from further.kernels import Step, triton, up
from further.many_rows import ManyRows, kind_of
from generate import generate
from model import BART, GPT
from plumbing.errors import UserError
from plumbing.models import random_model
from plumbing.utils import captured

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
runs = pytest.mark.skipif(not triton or not (DEVICE == "cuda" or INTERPRETED),
                          reason="kernels need Triton, and a CUDA device or TRITON_INTERPRET=1")
on_gpu = pytest.mark.skipif(not triton or DEVICE == "cpu", reason="needs Triton and a CUDA device")
SIZES = dict(n_head=2, n_embd=32, n_inner=40, vocab_size=21, block_size=64)


def build(cls, seed=0, dtype=torch.float32, **sizes):
    """A model whose numbers all matter: norms and biases too."""
    torch.manual_seed(seed)
    layers = dict(n_layer=2) if cls is GPT else dict(n_encoder_layer=1, n_decoder_layer=2)
    model = cls(cls.config_class(**layers | SIZES | sizes))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return model.to(DEVICE, dtype).eval()


class Int8(torch.nn.Module):
    """A linear as a Step reads it: int8, with a scale for each row."""

    def __init__(self, linear):
        super().__init__()
        self.scale = linear.weight.float().abs().amax(1) / 127
        self.weight, self.bias = (linear.weight.float() / self.scale[:, None]).round().to(torch.int8), linear.bias

    def forward(self, x):
        return torch.nn.functional.linear(x, self.weight * self.scale[:, None], self.bias)


class Pair:
    """Rows behind one prefill, for a Step and for the plain model beside it, which reads the same ids."""

    def __init__(self, model, B, starts, steps, n_source=None, ragged=False, n_vocab=None):
        V, self.model, self.n_vocab = model.config.vocab_size, model, n_vocab
        self.ids, self.source = torch.randint(V, (B, max(starts) + steps + 1), device=DEVICE), {}
        if n_source:
            lengths = torch.arange(n_source, n_source - B, -1, device=DEVICE) if ragged else None
            encoded = model.encode(torch.randint(V, (B, n_source), device=DEVICE), lengths)
            self.source = {"memory": model.project(encoded, lengths)}
        self.at = (torch.tensor(starts, device=DEVICE) - 1).expand(B).reshape(B, 1).clone()
        self.caches = [model.new_cache(B, self.ids.size(1)) for _ in "ab"]
        for cache in self.caches:
            model.features(self.ids[:, : max(starts)], cache=cache, start_pos=0, **self.source)
        self.step = kind_of(B)(model, self.ids, self.at, self.caches[0], self.source.get("memory"), n_vocab)

    def check(self, bound):
        """One step of both: the largest logit of every block, and the caches, are near, the ids equal."""
        B, at = len(self.ids), self.at.clone()
        newest, start = self.ids.gather(1, at), at.view(-1)
        x = self.model.features(newest, cache=self.caches[1], start_pos=start, **self.source)
        logits = self.model.lm_head(x)[:, 0, : self.n_vocab].float()
        self.step()
        width = self.step.block(self.model.lm_head.weight)[0]
        padded = torch.nn.functional.pad(logits, (0, -logits.size(1) % width), value=float("-inf"))
        most = padded.view(B, -1, width).amax(-1)
        assert (self.step.most - most).abs().max() <= bound * logits.abs().max()
        for ours, plain in zip(*(cache.k + cache.v for cache in self.caches)):
            assert (ours - plain).abs().max() <= bound * plain.abs().max()
        assert torch.equal(self.ids.gather(1, at + 1), logits.argmax(-1, keepdim=True)), at
        assert torch.equal(self.at, (at + 1).clamp(max=self.ids.size(1) - 2))


@runs
@pytest.mark.parametrize("rows", [2, 5])
@torch.inference_mode()
def test_scores_are_returned_to_who_chooses(rows):
    pair = Pair(build(BART), rows, [3], 1, 7, n_vocab=13)
    step = kind_of(rows)(pair.model, pair.ids, pair.at, pair.caches[0], pair.source["memory"], 13, scored=True)
    ids, at = pair.ids.clone(), pair.at.clone()
    x = pair.model.features(ids.gather(1, at), cache=pair.caches[1], start_pos=at.view(-1), **pair.source)
    expected = pair.model.lm_head(x)[:, 0, :13]
    assert (step() - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert torch.equal(pair.ids, ids) and torch.equal(pair.at, at)


CASES = {
    "one row": (GPT, {}, 1, [5], {}),
    "width no power of two": (GPT, dict(n_embd=48, n_head=3), 1, [5], {}),
    "rows at places of their own": (GPT, {}, 4, [7, 5, 1, 6], {}),
    "shared heads, own head": (GPT, dict(n_head=4, n_kv_head=2, tie_weights=False), 3, [9], dict(n_vocab=13)),
    "bart": (BART, {}, 1, [1], dict(n_source=9)),
    "bart, ragged sources": (BART, dict(scale_embedding=True, n_cross_kv_head=1), 3, [2, 1, 2],
                             dict(n_source=12, ragged=True)),
    "bart without a source": (BART, {}, 2, [2], {}),
    "many rows": (GPT, dict(n_embd=48, n_head=3), 6, [5], {}),
    "many rows at places of their own, shared heads": (GPT, dict(n_head=4, n_kv_head=2, tie_weights=False), 18,
                                                       [1 + i % 7 for i in range(18)], dict(n_vocab=13)),
    "many rows of a bart, ragged sources": (BART, {}, 7, [2, 1, 3, 2, 1, 1, 4], dict(n_source=12, ragged=True)),
}


@runs
@pytest.mark.parametrize("name", CASES)
@torch.inference_mode()
def test_a_step_is_the_plain_models(name):
    cls, sizes, B, starts, options = CASES[name]
    pair = Pair(build(cls, **sizes), B, starts, 2, **options)
    for _ in range(2):
        pair.check(1e-5)
    assert pair.step.finite.all()


@runs
@torch.inference_mode()
def test_warps_may_share_rows_of_a_weight(monkeypatch):
    monkeypatch.setattr(Step, "block", lambda self, weight: (2, up(weight.size(1))))
    Pair(build(BART), 2, [3], 1, n_source=5).check(1e-5)


@runs
@pytest.mark.parametrize("cls, n_source", [(GPT, None), (BART, 33)])
@pytest.mark.parametrize("rows", [2, 5])
@torch.inference_mode()
def test_tiles_of_attention_are_joined(cls, n_source, rows, monkeypatch):
    """Positions of one tile, of several, and of none yet; a tile's first and its last; many programs or one."""
    monkeypatch.setattr(kernels, "TILE", 16)
    monkeypatch.setattr(ManyRows, "tiles", lambda self, S, own: (16, 1 if own else 2, 1))
    pair = Pair(build(cls), rows, [15, 1, 32, 33, 17][:rows], 3, n_source, ragged=bool(n_source))
    for _ in range(3):
        pair.check(1e-5)


@runs
@pytest.mark.parametrize("cls, n_source", [(GPT, None), (BART, 5)])
@torch.inference_mode()
def test_columns_of_a_weight_may_be_several_programs(cls, n_source, monkeypatch):
    monkeypatch.setattr(many_rows, "WIDE", 16)  # 32 or 40 columns: two of them, or three, the last half full
    Pair(build(cls), 5, [3], 1, n_source).check(1e-5)


@runs
@pytest.mark.parametrize("H, KV, S", [(2, 2, 80), (4, 2, 32), (3, 1, 65)])
@torch.inference_mode()
def test_one_query_reads_what_it_may_see_and_nothing_else(H, KV, S):
    """Tiles seen in part, wholly and not at all, the first and the last among them; NaN wherever nobody looks."""
    torch.manual_seed(S)
    seen = torch.rand(5, S, device=DEVICE) < 0.4
    seen[0], seen[1, :-1], seen[2, 1:], seen[3, : S // 2] = True, False, False, False
    seen[1, -1] = seen[2, 0] = seen[3, -1] = seen[4, 3] = True
    q = torch.randn(5, 1, H + 1, 8, device=DEVICE).transpose(1, 2)[:, :H]  # as in a product with keys and values
    k, v = torch.randn(2, 6, KV, S + 3, 8, device=DEVICE)[:, :5, :, :S]    # as in a larger buffer
    expected = attend_explicit(q, k, v, seen[:, None, None])[0]
    both = seen.any(0)
    assert (reading.attend_one(q, k, v, both[None, None, None], 32) - attend_explicit(q, k, v, both)[0]).abs().max() <= 1e-5
    for x in k, v:
        x.masked_fill_(~seen[:, None, :, None], torch.nan)
    assert (reading.attend_one(q, k, v, seen[:, None, None], 32) - expected).abs().max() <= 1e-5


@runs
@pytest.mark.parametrize("cls, n_source", [(GPT, None), (BART, 9)])
@torch.inference_mode()
def test_a_model_that_reads_so_is_another_around_the_same_weights(cls, n_source, monkeypatch):
    asked, attend_one = [], reading.attend_one
    monkeypatch.setattr(reading, "attend_one", lambda *args: asked.append(args) or attend_one(*args))
    model = build(cls, n_kv_head=1)
    model.own_cache()
    model.source = torch.zeros(1), None, None
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "is_cuda", property(lambda x: True))  # interpreted, too, where a CPU has other ways
        uneven = build(cls, n_embd=36, n_head=3)  # 12 numbers a head
        other, unchanged = reading.reading(model), reading.reading(uneven)
    named = dict(model.named_parameters())
    assert other.cache is other.source is None and all(p is named[name] for name, p in other.named_parameters())
    pair = Pair(model, 3, [5, 2, 4], 2, n_source, ragged=bool(n_source))
    for start in torch.tensor([[5], [2], [4]], device=DEVICE), torch.tensor([[6], [3], [5]], device=DEVICE):
        args = dict(start_pos=start, **pair.source)
        plain = model.features(pair.ids.gather(1, start), cache=pair.caches[0], **args)
        assert (other.features(pair.ids.gather(1, start), cache=pair.caches[1], **args) - plain).abs().max() <= 1e-5
    assert not any(isinstance(m, reading.Read | reading.OneRow) for m in model.modules())
    assert len(asked) == (8 if n_source else 4) and {tile for *_, tile in asked} == ({64, 128} if n_source else {64})
    assert {type(m) for m in other.modules() if isinstance(m, torch.nn.Linear)} == {reading.OneRow}
    assert unchanged is uneven


@pytest.mark.parametrize("shape", [(6,), (1, 1, 6), (2, 1, 6), (1, 3, 6)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_that_writes_out_the_product_of_one_row_is_one(shape, bias):
    torch.manual_seed(5)
    linear, x = reading.OneRow(6, 5, bias=bias, dtype=torch.float64), torch.randn(shape, dtype=torch.float64)
    expected = torch.nn.functional.linear(x, linear.weight, linear.bias)
    assert linear(x).shape == expected.shape and (linear(x) - expected).abs().max() < 1e-12


@runs
@pytest.mark.parametrize("rows", [2, 5])
@torch.inference_mode()
def test_int8_weights_have_a_scale_for_each_row(rows):
    model = build(GPT)
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, torch.nn.Linear):
                setattr(module, name, Int8(child))
    Pair(model, rows, [4], 1).check(1e-5)


@runs
@torch.inference_mode()
def test_of_equal_logits_the_lowest_id_is_chosen_and_what_is_not_finite_is_noticed():
    model = build(BART)
    model.lm_head.weight = torch.nn.Parameter(torch.zeros_like(model.lm_head.weight))
    for bias, chosen, finite in ((0.0, 7, True), (float("-inf"), 7, True), (float("nan"), None, False)):
        model.lm_head.bias.zero_()[[7, 10, 20]] = 1.0
        model.lm_head.bias[3] = bias
        pair = Pair(model, 1, [2], 1)
        pair.step()
        assert pair.step.finite.tolist() == [finite] and (not finite or pair.ids[0, 2] == chosen)


@runs
@pytest.mark.parametrize("rows", [2, 5])
@torch.inference_mode()
def test_a_step_beyond_the_end_harms_nothing(rows):
    pair = Pair(build(GPT), rows, [3], 1)
    for _ in range(2):
        pair.check(1e-5)
    before = pair.ids.clone()
    pair.step()
    assert torch.equal(pair.ids, before) and (pair.at == pair.ids.size(1) - 2).all()


@on_gpu
@pytest.mark.parametrize("name, source", [("gpt2", None), ("bart-base", 300)])
@torch.inference_mode()
def test_at_published_sizes_200_captured_steps_are_as_exact_as_the_plain_ones(name, source):
    """How far the largest logit of each block is from fp64, over a text, for the kernels and for the plain model."""
    pair = Pair(random_model(name, torch.float32, DEVICE), 2, [32, 17], 200, source, ragged=bool(source))
    exact, memory = copy.deepcopy(pair.model).double(), pair.source.get("memory")
    cache = exact.new_cache(2, pair.ids.size(1))
    sources = {"memory": Memory([(k.double(), v.double()) for k, v in memory.kv], memory.key_pos)} if source else {}
    exact.features(pair.ids[:, :32], cache=cache, start_pos=0, **sources)
    width, step, apart = pair.step.block(pair.model.lm_head.weight)[0], captured(pair.step), []
    pair.at.copy_(torch.tensor([[31], [16]]))  # a capture takes steps

    def tops(model, cache, sources):
        x = model.features(pair.ids.gather(1, pair.at), cache=cache, start_pos=pair.at.view(-1), **sources)
        logits = model.lm_head(x)[:, 0].double()
        padded = torch.nn.functional.pad(logits, (0, -logits.size(1) % width), value=float("-inf"))
        return padded.view(2, -1, width).amax(-1)

    for _ in range(200):
        right, plain = tops(exact, cache, sources), tops(pair.model, pair.caches[1], pair.source)
        step()
        apart.append([(x.double() - right).abs().max().item() for x in (pair.step.most, plain)])
    ours, plain = map(max, zip(*apart))
    assert ours <= 2 * plain and plain <= 1e-2


@on_gpu
@pytest.mark.parametrize("choices", [[{}] * 3, [dict(temperature=t, top_p=p, seed=s, n_vocab=17)
                                               for t, p, s in ((0.8, 0.9, 1), (2.0, 0.9, 1), (2.0, 0.5, 7))]])
@pytest.mark.parametrize("cls", [GPT, BART])
@pytest.mark.parametrize("rows", [1, 3, 6, 65])  # the last are more than the kernels are for
def test_a_compiled_decoding_writes_what_the_plain_one_does_request_after_request(cls, rows, choices, monkeypatch):
    monkeypatch.setattr(ManyRows, "fits", classmethod(Step.fits.__func__))  # float32, which can be compared, as well
    model = build(cls)
    for (longest, n), choice in zip(((9, 40), (5, 12), (22, 30)), choices):
        prompts = [[(7 * i + row) % 21 for i in range(max(1, longest - row))] for row in range(rows)]
        found = generate(model, prompts, n, strategy=compiled.compiled, **choice)
        assert found == generate(model, prompts, n, **choice)
    [made] = compiled.steps(model).idle.values()
    kinds = {1: Step, 3: Step, 6: ManyRows, 65: type(None)}
    assert len(made) == 1 and type(made[0].kernels) is kinds[rows]


@on_gpu
@pytest.mark.parametrize("rows", [1, 6])
@torch.inference_mode()
def test_bfloat16_chooses_no_worse_than_the_plain_model_does(rows):
    """Both miss the most likely id of the same weights in float32 at times, by how much is what counts."""
    model = random_model("gpt2", torch.bfloat16, DEVICE)
    pair = Pair(model, rows, [32], 100)
    for _ in range(100):
        pair.step()
    plain, ours = model(pair.ids)[:, 31:131].argmax(-1), pair.ids[:, 32:132]
    logits = model.float()(pair.ids)[:, 31:131]
    lost = [(logits.amax(-1) - logits.gather(2, ids[..., None])[..., 0]).mean() for ids in (ours, plain)]
    assert 0 < lost[0] < 1.2 * lost[1] < 0.2 * logits.std()


@pytest.mark.skipif(DEVICE == "cuda", reason="this is for where there is no CUDA device")
def test_elsewhere_the_plain_model_does_it():
    model, ids = build(GPT), torch.zeros(1, 8, dtype=torch.long)
    cache = model.new_cache(1, 8)
    assert not Step.fits(model.cpu(), ids, cache)


@pytest.mark.parametrize("rows, remedy", [("1", "use bench.py decode"), ("65", "must be from 1 to 64")])
@pytest.mark.skipif(DEVICE == "cuda", reason="this is for where there is no CUDA device")
def test_what_the_command_cannot_measure_is_refused(rows, remedy):
    with pytest.raises(UserError, match=remedy):
        kernel_bench.main(["--random", "gpt2", "--rows", rows])


@on_gpu
@torch.inference_mode()
def test_what_does_not_fit_is_said():
    def fits(model, rows=1, length=8, kind=Step, **cached):
        ids = torch.zeros(rows, length, dtype=torch.long, device=DEVICE)
        cache = model.new_cache(rows, cached.get("room", length))
        model.features(ids[:, :1], cache=cache, start_pos=0)
        return kind.fits(model, ids, cache)

    assert fits(build(GPT)) and fits(build(BART), rows=4) and fits(build(GPT, dtype=torch.float16))
    assert not fits(build(GPT), rows=5) and not fits(build(GPT, dtype=torch.float64))
    many = lambda rows, dtype=torch.float16: fits(build(GPT, dtype=dtype), rows, kind=ManyRows)
    assert [rows for rows in (4, 5, 64, 65) if many(rows)] == [5, 64] and not many(5, torch.float32)
    assert not fits(build(GPT, pattern="local:4")) and not fits(build(GPT, n_embd=36, n_head=3))
    assert not fits(build(GPT), length=8, room=6)


@pytest.mark.skipif(not triton or INTERPRETED or DEVICE == "cuda", reason="needs Triton, and no CUDA device")
def test_here_the_kernels_are_interpreted():
    command = [sys.executable, "-m", "pytest", "-q", "--noconftest", __file__]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent.parent,
                          env=os.environ | {"TRITON_INTERPRET": "1"})
    assert done.returncode == 0, done.stdout
