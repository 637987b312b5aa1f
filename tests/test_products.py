"""Linears that multiply as is fastest on a processor: their results are those of nn.Linear, wherever they stand."""

import copy
from argparse import Namespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from generate import generate
from model import BART, GPT, BARTConfig, GPTConfig
from plumbing import cli, products
from plumbing.products import InParts, Several, Widened, fastest
from plumbing.weights import load_model, save_pretrained
from test_model import rough

LOW = [torch.bfloat16, torch.float16]
onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this PyTorch has no oneDNN")


class Calls(TorchDispatchMode):
    """Which operations have been asked for."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **kwargs or {})


def asked(function):
    """What it returns, and which kernels of products that are not nn.Linear's it has asked for, in a word."""
    letters = {"aten.bmm.default": "p", "aten.baddbmm.default": "P", "mkldnn._linear_pointwise.default": "o"}
    with Calls() as calls:
        found = function()
    return found, "".join(letters.get(name, "") for name in calls.names)


def pair(cls, n_in, n_out, dtype=torch.float32, bias=True, view=False):
    """nn.Linear, and the same by cls. view: weights as GPT-2 stores them."""
    torch.manual_seed(0)
    plain = nn.Linear(n_in, n_out, bias).to(dtype)
    if view:
        plain.weight.data = plain.weight.data.t().contiguous().t()
    other = copy.deepcopy(plain)
    other.__class__ = cls
    return plain, other


def inputs(n_in, dtype=torch.float32):
    """Of one row and many, of two and three axes, whole and as what is left of something longer."""
    for shape in (1, 1), (1, 1, 1), (3, 1, 1), (40, 1), (2, 17, 1), (4, 16, 1), (5, 13, 1):
        x = torch.randn(*shape[:-1], n_in).to(dtype)
        yield x
        if x.dim() == 3:
            yield x[:, -1:]


def kinds_of(n):
    """Of linears with so many weights, by dtype."""
    return [products.kind(torch.empty(n, dtype=dtype)) for dtype in (torch.float32, *LOW, torch.float64)]


@pytest.fixture
def slow(monkeypatch):
    """As on a processor that MKL was not made for."""
    monkeypatch.setattr(products, "mkl_is_slow", lambda: True)


@onednn
@pytest.mark.usefixtures("slow")
@torch.inference_mode()
@pytest.mark.parametrize("view", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("n_out, n", [(512, 8), (290, 10), (331, 1)])
def test_parts_and_onednn_find_the_same_sums(n_out, n, bias, view):
    plain, other = pair(InParts, 512, n_out, bias=bias, view=view)
    assert products.parts(n_out) == n
    for x in inputs(512):
        found, kernels = asked(lambda: other(x))
        exact = F.linear(x.double(), plain.weight.double(), plain.bias.double() if bias else None)
        assert found.shape == exact.shape and (found - exact).abs().max() <= 1e-5
        few = x[..., 0].numel() <= products.FEW
        assert kernels == ("o" if n == 1 or not few else "P" if bias else "p")


@onednn
@torch.inference_mode()
@pytest.mark.parametrize("view", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("n_out, n", [(512, 8), (290, 10), (331, 1)])
def test_several_rows_take_a_row_of_each_part_where_mkl_is_not_slow(n_out, n, bias, view, monkeypatch):
    monkeypatch.setattr(products, "mkl_is_slow", lambda: False)
    plain, other = pair(Several, 512, n_out, bias=bias, view=view)
    for x in *inputs(512), torch.randn(2, 512), torch.randn(products.SEVERAL, 1, 512), torch.randn(3, 3, 512):
        found, kernels = asked(lambda: other(x))
        exact = F.linear(x.double(), plain.weight.double(), plain.bias.double() if bias else None)
        assert found.shape == exact.shape and (found - exact).abs().max() <= 1e-5
        several = n > 1 and 1 < x[..., 0].numel() <= products.SEVERAL
        assert kernels == ("" if not several else "P" if bias else "p")


@onednn
@pytest.mark.usefixtures("slow")
def test_other_kernels_are_for_large_weights_and_where_nobody_looks_on():
    _, small = pair(InParts, 512, 255)
    plain, large = pair(InParts, 512, 512)
    x = torch.randn(2, 512)
    with torch.inference_mode():
        assert asked(lambda: small(x))[1] == ""
    found, kernels = asked(lambda: large(x))  # gradients are recorded
    assert kernels == "" and torch.equal(found, plain(x))
    found.square().sum().backward(), plain(x).square().sum().backward()
    assert torch.equal(large.weight.grad, plain.weight.grad)
    with torch.no_grad():
        graph = torch.export.export(large, (x,), strict=False).graph
    assert not any("mkldnn" in str(node.target) or "bmm" in str(node.target) for node in graph.nodes)


@onednn
@torch.inference_mode()
@pytest.mark.parametrize("slow", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", LOW)
def test_many_rows_of_16_bits_are_sums_in_fp32(dtype, bias, slow, monkeypatch):
    monkeypatch.setattr(products, "mkl_is_slow", lambda: slow)
    monkeypatch.setattr(products, "LARGE", 1)
    monkeypatch.setattr(products, "WIDE", 1000)  # of 2,560, so three times
    plain, other = pair(Widened, 64, 40, dtype, bias)
    for x in inputs(64, dtype):
        exact = F.linear(x.double(), plain.weight.double(), plain.bias.double() if bias else None)
        found, kernels = asked(lambda: other(x))
        assert found.dtype == dtype and found.shape == exact.shape
        if x[..., 0].numel() < products.MANY:
            assert torch.equal(found, plain(x)) and kernels == ""
        else:  # rounded once
            assert kernels == "" if not slow else len(kernels) == 3
            assert ((found - exact).abs() <= torch.finfo(dtype).eps / 2 * exact.abs() + 1e-5).all()


@pytest.mark.parametrize("dtype", LOW)
def test_what_is_widened_learns_as_before(dtype):
    plain, other = pair(Widened, 64, 40, dtype)
    x = torch.randn(40, 64).to(dtype)
    for linear in plain, other:
        linear(x).sum().backward()
    assert torch.equal(other.weight.grad, plain.weight.grad) and torch.equal(other(x), plain(x))


@torch.inference_mode()
@pytest.mark.parametrize("cls, dtype", [(InParts, torch.float32), (Widened, torch.bfloat16)])
def test_a_copy_of_another_dtype_multiplies_as_any_other(cls, dtype):
    """As compare()'s in fp64, which is to tell rounding from a bug."""
    plain, other = pair(cls, 512, 512, dtype)
    for more in {torch.float64, torch.bfloat16, torch.float32} - {dtype}:
        x = torch.randn(20, 512, dtype=more)
        assert torch.equal(copy.deepcopy(other).to(more)(x), copy.deepcopy(plain).to(more)(x))


@onednn
@pytest.mark.parametrize("maker, supported, kinds", [
    ("AuthenticAMD", True, [InParts, nn.Linear, nn.Linear, nn.Linear]),
    ("AMD64 Family 25 Model 33 Stepping 2, AuthenticAMD", False, [InParts, Widened, Widened, nn.Linear]),
    ("GenuineIntel", True, [Several, nn.Linear, nn.Linear, nn.Linear]),
    ("GenuineIntel", False, [Several, Widened, Widened, nn.Linear]),
    ("", True, [Several, nn.Linear, nn.Linear, nn.Linear])])
def test_which_is_fastest_depends_on_the_processor(maker, supported, kinds, monkeypatch):
    monkeypatch.setattr(products, "mkl_is_slow", products.mkl_is_slow.__wrapped__)  # asked anew each time
    monkeypatch.setattr(products, "maker", lambda: maker)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    for way in "_is_mkldnn_bf16_supported", "_is_mkldnn_fp16_supported":
        monkeypatch.setattr(torch.ops.mkldnn, way, lambda: supported)
    assert kinds_of(2**17) == kinds and kinds_of(2**16) == [nn.Linear, *kinds[1:3], nn.Linear]
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: False)  # then other libraries multiply
    assert kinds_of(2**17) == [nn.Linear, *kinds[1:]]
    assert products.mkl_is_slow() is False
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    assert products.mkl_is_slow() is ("AMD" in maker)


def test_without_onednn_nothing_is_asked_of_it(monkeypatch):
    monkeypatch.setattr(products, "mkl_is_slow", lambda: True)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    monkeypatch.setattr(torch.ops, "mkldnn", None)  # as there is nothing in it
    assert kinds_of(2**17) == [nn.Linear] * 4


def test_who_made_the_processor_is_asked_where_it_stands(monkeypatch):
    monkeypatch.setattr(products, "proc", lambda path, key: {("cpuinfo", "vendor_id"): "AuthenticAMD"}[path, key])
    assert products.maker() == "AuthenticAMD"
    for error in FileNotFoundError, StopIteration:  # no such file, or no such line

        def proc(path, key):
            raise error

        monkeypatch.setattr(products, "proc", proc)
        monkeypatch.setattr(products.platform, "processor", lambda: "something else")
        assert products.maker() == "something else"


@onednn
@pytest.mark.usefixtures("slow")
@pytest.mark.parametrize("cls", [GPT, BART])
def test_models_compute_the_same_cached_and_not(cls, monkeypatch):
    monkeypatch.setattr(products, "LARGE", 0)
    torch.manual_seed(0)
    sizes = dict(n_head=4, n_embd=32, vocab_size=37, block_size=24)
    model = rough(cls(BARTConfig(n_encoder_layer=2, n_decoder_layer=2, **sizes) if cls is BART else
                      GPTConfig(n_layer=2, **sizes)), torch.float32)
    for p in model.parameters():
        p.data /= 3
    args = Namespace(quantize=None)
    other = cli.prepared(args, copy.deepcopy(model))
    assert other.lm_head.weight is other.wte.weight and type(other.lm_head) is InParts
    ids = torch.randint(3, 37, (3, 12))
    with torch.inference_mode():
        if cls is GPT:
            passes, step = (lambda model: model(ids)), lambda part, at: other(part, use_kv_cache=True, start_pos=at)
        else:
            passes = lambda model: model(ids, ids)
            encoded = other.encode(ids)
            step = lambda part, at: other.decode(part, encoded, None, True, at)
        whole, kernels = asked(lambda: passes(other))
        parts = torch.cat([step(ids[:, a:b], a) for a, b in ((0, 5), (5, 6), (6, 11), (11, 12))], 1)
        assert kernels.count("P") >= 8  # in parts
        assert (whole - passes(model)).abs().max() <= 1e-5 and (whole - parts).abs().max() <= 1e-5
    prompts = [ids[0].tolist(), ids[1, :5].tolist()]
    assert generate(other, prompts, 8) == generate(model, prompts, 8) == generate(other, prompts, 8, strategy="naive")


@onednn
@pytest.mark.usefixtures("slow")
def test_a_model_that_is_small_or_of_whole_numbers_stays_as_it_is(monkeypatch):
    model = GPT(GPTConfig(n_layer=1, n_head=2, n_embd=16, vocab_size=37, block_size=24))
    assert type(cli.prepared(Namespace(quantize=None), model).lm_head) is nn.Linear
    monkeypatch.setattr(products, "LARGE", 0)
    whole = cli.prepared(Namespace(quantize="int8"), copy.deepcopy(model))
    kinds = {type(module).__name__ for module in whole.modules()}
    assert "Int8Linear" in kinds and not kinds & {"InParts", "Linear"}
    assert type(fastest(model.to("meta")).lm_head) is nn.Linear  # as one that is elsewhere


def test_gpt2_matrices_are_views_only_where_they_are_read_fast(tmp_path, monkeypatch):
    """Numbers of 16 bits are read 15 times slower from a transposed matrix where there are no instructions."""
    model = GPT(GPTConfig(n_layer=1, n_head=2, n_embd=16, vocab_size=37, block_size=24))
    save_pretrained(tmp_path, model)
    assert not load_model(tmp_path).h[0].mlp.c_fc.weight.is_contiguous()
    for dtype in LOW:
        assert all(p.is_contiguous() for p in load_model(tmp_path, dtype).parameters())
    monkeypatch.setattr(products, "kind", lambda weight: InParts)
    loaded = fastest(load_model(tmp_path))
    assert all(p.is_contiguous() for p in loaded.parameters())
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), model.parameters()))
