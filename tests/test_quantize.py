"""
Linears of whole numbers: no weight moves by more than half a level, products in fp64 are exactly those of the rounded
weights, and those of the CPU's kernel as near to them as the levels of the input allow.
"""

import copy
import json

import pytest
import torch
from torch import nn

import bench
import generate as program
from conftest import call, finish, shell
from cost import count
from further import quantize as command
from further.gqa import convert
from further.quantize import Int8Linear, held_out, quantize
from generate import generate
from model import BART, GPT, BARTConfig, GPTConfig
from plumbing.errors import UserError
from plumbing.weights import load_pretrained, save_pretrained
from roofline import Products, narrow, read
from test_model import rough

SIZES = dict(n_head=2, n_embd=24, vocab_size=37, block_size=16)
CONFIGS = {GPT: GPTConfig(n_layer=2, **SIZES),
           BART: BARTConfig(n_encoder_layer=1, n_decoder_layer=2, n_cross_kv_head=1, **SIZES)}
PROMPTS = [[3, 4, 5, 6], [7], [8, 9]]
models = pytest.mark.parametrize("cls", CONFIGS)


def build(cls, dtype=torch.float64):
    torch.manual_seed(1)
    return rough(cls(CONFIGS[cls]), dtype)


def dequantised(model, whole):
    """A plain model, untied, with the weights that the whole numbers stand for."""
    plain = copy.deepcopy(model)
    for name, module in whole.named_modules():
        if isinstance(module, Int8Linear):
            weight = module.weight.double() * module.scale.double()[:, None]
            plain.get_submodule(name).weight = nn.Parameter(weight)
    return plain.double()


def logits(model):
    torch.manual_seed(5)
    with torch.no_grad():
        return model(*(torch.randint(37, (2, 9)) for _ in range(1 + model.config.is_encoder_decoder)))


def test_no_weight_moves_by_more_than_half_a_level_of_its_own_row():
    torch.manual_seed(0)
    linear = nn.Linear(50, 8).double()
    with torch.no_grad():
        linear.weight *= torch.logspace(-6, 3, 8)[:, None]
        linear.weight[3] = 0
        linear.weight.data = linear.weight.t().contiguous().t()  # as GPT-2's lie
    whole = Int8Linear.of(linear)
    assert whole.weight.is_contiguous()
    for o in range(8):
        row, q, s = linear.weight[o], whole.weight[o].double(), whole.scale[o].double()
        assert (row - q * s).abs().max() <= s / 2 * (1 + 1e-5)
        assert q.abs().max() == (0 if o == 3 else 127) and (s - row.abs().max() / 127).abs() <= 1e-6 * s
    assert whole.bias is linear.bias and whole.weight.dtype == torch.int8 and whole.scale.dtype == torch.float32


@models
def test_in_fp64_the_logits_are_those_of_the_rounded_weights_and_nothing_else_changes(cls):
    model = build(cls)
    whole = quantize(copy.deepcopy(model))
    assert not any(isinstance(module, nn.Linear) for module in whole.modules())
    assert isinstance(whole.lm_head, Int8Linear)
    old, new = model.state_dict(), whole.state_dict()
    for name, x in old.items():
        if new[name].dtype != torch.int8:
            assert torch.equal(new[name], x), name
    assert new["wte.weight"].is_floating_point() and model.lm_head.weight is model.wte.weight
    plain = dequantised(model, whole)
    assert (logits(whole) - logits(plain)).abs().max() <= 1e-10
    assert 1e-4 < (logits(whole) - logits(model)).abs().max()
    for strategy in ("naive", "cached"):  # ragged
        assert generate(whole, PROMPTS, 6, strategy=strategy) == generate(plain, PROMPTS, 6, strategy="naive")


@models
def test_cached_is_uncached(cls):
    whole = quantize(build(cls))
    torch.manual_seed(2)
    ids = torch.randint(37, (2, 9))
    with torch.no_grad():
        if cls is GPT:
            whole_pass, step = whole(ids), lambda part, start: whole(part, use_kv_cache=True, start_pos=start)
        else:
            encoded = whole.encode(ids)
            whole_pass, step = whole.decode(ids, encoded), lambda part, start: whole.decode(part, encoded, None, True, start)
        parts = torch.cat([step(ids[:, :4], 0), step(ids[:, 4:8], 4), step(ids[:, 8:], 8)], 1)
    assert (parts - whole_pass).abs().max() <= 1e-10


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("amx, traced", [
    (False, False), pytest.param(True, False, marks=pytest.mark.skipif(not command.AMX, reason="AMX is needed")),
    (True, True)], ids=["plain", "plain, by AMX", "as a compiler sees it where there is AMX"])
def test_the_kernel_errs_by_half_a_level_of_each_input_at_most(dtype, amx, traced, monkeypatch):
    """A row x has 127 levels from -max |x| to max |x|, so no x moves by more than max |x| / 126; or twice as many."""
    monkeypatch.setattr(command, "AMX", amx)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: traced)
    torch.manual_seed(3)
    whole = Int8Linear.of(nn.Linear(70, 33)).to(dtype)
    x = (torch.randn(5, 3, 70) * torch.logspace(-4, 3, 5)[:, None, None]).to(dtype)
    x[0, 0] = 0
    with torch.no_grad():
        y, exact = whole(x).double(), copy.deepcopy(whole).double()(x.double())
        levels = x.double().abs().amax(-1, keepdim=True) / (254 if amx else 126)
        moved = levels * (whole.weight.double() * whole.scale.double()[:, None]).abs().sum(1)
        bound = moved * (1 + 1e-5) + (exact.abs() + moved) * torch.finfo(dtype).eps * 2 + 1e-7
        assert y.shape == (5, 3, 33) and ((y - exact).abs() <= bound).all()
        few = x[2:3, 1 : 3 if amx else 2]  # a row does not depend on its neighbours
        assert torch.equal(whole(few), whole(x)[2:3, 1 : 1 + few.size(1)])
        if amx and not traced:  # nor on having any: the same levels, whose sums are multiplied by both scales at once
            apart, summed = whole(x[2:3, 1:2]).double() - y[2:3, 1:2], y[2:3, 1:2] - whole.bias.double()
            assert (apart.abs() <= 2 * torch.finfo(dtype).eps * (summed.abs() + whole.bias.double().abs())).all()
        assert traced or torch.equal(whole(x[:1, :1])[0, 0], whole.bias)  # of zeros, alone
        for bad in (float("nan"), float("inf")):
            x[1, 2, 3] = bad
            finite = whole(x).isfinite().all(-1)
            assert not finite[1, 2] and finite.sum() == 14
            assert traced or not whole(x[1:2, 2:3]).isfinite().any()  # alone
        if not traced:
            assert whole(x[:0]).shape == (0, 3, 33) and whole(x[:, :0]).shape == (5, 0, 33)


@pytest.mark.parametrize("rows", [1, 7])
def test_a_compiler_gets_no_kernel_that_reads_beyond_a_row(rows, monkeypatch):
    monkeypatch.setattr(command, "AMX", False)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    torch.manual_seed(7)
    whole, x = Int8Linear.of(nn.Linear(72, 33)), torch.randn(rows, 72)
    with torch.no_grad():
        assert (whole(x) - copy.deepcopy(whole).double()(x.double())).abs().max() <= 1e-5


def test_sums_do_not_overflow_where_all_numbers_are_largest():
    whole = Int8Linear(64, 4, bias=False)
    whole.weight.fill_(127)
    whole.scale.fill_(1.0)
    for rows in 1, 2:  # which may have a kernel each
        assert (whole(torch.ones(rows, 64)) / (64 * 127) - 1).abs().max() <= 1 / 127 + 1e-6


def test_many_rows_in_bfloat16_are_not_rounded_to_levels_where_there_is_amx(monkeypatch):
    """They are multiplied in bfloat16, by the whole numbers, each of which is one there."""
    monkeypatch.setattr(command, "MANY", 4)
    monkeypatch.setattr(command, "AMX", False)
    torch.manual_seed(6)
    whole, x = Int8Linear.of(nn.Linear(64, 32)).bfloat16(), torch.randn(2, 2, 64).bfloat16()
    with torch.no_grad():
        exact, rounded = copy.deepcopy(whole).double()(x.double()), whole(x)
        monkeypatch.setattr(command, "AMX", True)
        assert ((whole(x) - exact).abs() <= 2 * torch.finfo(torch.bfloat16).eps * exact.abs().amax(-1, True)).all()
        assert (whole(x) - exact).norm() < (rounded - exact).norm() / 2  # the levels are what errs most
        assert not torch.equal(whole(x[:, :1]), whole(x)[:, :1])         # fewer rows are
        assert not torch.equal(whole.float()(x.float()).bfloat16(), whole.bfloat16()(x))


def test_what_is_packed_follows_the_weights():
    whole, x = Int8Linear.of(nn.Linear(6, 5)), torch.randn(2, 6)
    first = whole(x)
    assert not any("packed" in name for name in whole.state_dict()) and torch.equal(copy.deepcopy(whole)(x), first)
    whole.load_state_dict({name: x * 0 for name, x in whole.state_dict().items()})
    assert not whole(x).any()
    half = Int8Linear.of(nn.Linear(6, 5)).bfloat16()
    assert half.scale.dtype == torch.float32 and half.weight.dtype == torch.int8 and half.bias.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_it_can_be_compiled_whole(dtype, monkeypatch):
    monkeypatch.setattr(command, "AMX", False)
    torch.manual_seed(4)
    whole, x = Int8Linear.of(nn.Linear(64, 32)).to(dtype), torch.randn(2, 3, 64).to(dtype)
    with torch.inference_mode():
        y = torch.compile(whole, fullgraph=True, backend="aot_eager")(x).double()
        exact = copy.deepcopy(whole).double()(x.bfloat16().double())  # then the result is rounded, to 8 bits as well
    assert (y - exact).abs().max() <= torch.finfo(torch.bfloat16).eps * exact.abs().max()


# -----------------------------------------------------------------------------
# Files


@models
@pytest.mark.parametrize("tie", [True, False])
def test_what_is_saved_is_loaded_bit_for_bit(cls, tie, tmp_path):
    config = copy.copy(CONFIGS[cls])
    config.tie_weights = tie
    namesake = type(cls.__name__, (cls,), {})  # as torch.export leaves them behind
    torch.manual_seed(1)
    whole = quantize(rough(cls(config), torch.float32))
    save_pretrained(tmp_path, whole)
    assert json.loads((tmp_path / "config.json").read_text())["quantization"] == "int8"
    loaded, _ = load_pretrained(tmp_path)
    assert type(loaded) is cls is not namesake
    old, new = whole.state_dict(), loaded.state_dict()
    assert old.keys() == new.keys() and all(torch.equal(new[name], x) for name, x in old.items())
    assert all(new[name].dtype == x.dtype for name, x in old.items())
    assert torch.equal(logits(loaded), logits(whole)) and generate(loaded, PROMPTS, 5) == generate(whole, PROMPTS, 5)
    half, _ = load_pretrained(tmp_path, torch.bfloat16)
    assert half.lm_head.weight.dtype == torch.int8 and half.lm_head.scale.dtype == torch.float32
    assert half.wte.weight.dtype == torch.bfloat16
    assert next(module for module in loaded.modules() if isinstance(module, Int8Linear)).weight.is_contiguous()
    numbers = {id(x): x.nbytes for x in whole.state_dict(keep_vars=True).values()}  # tied ones once
    path, shifted = tmp_path / "model.safetensors", 2 * 2 * 24 * 4 * (cls is BART)  # rows that nobody looks up
    assert path.stat().st_size == sum(numbers.values()) + shifted + 8 + int.from_bytes(path.read_bytes()[:8], "little")


@pytest.mark.parametrize("spoil, message", [
    (lambda raw, t: raw.update(quantization="int4"), "quantization is 'int4', and only \"int8\""),
    (lambda raw, t: raw.update(quantization=8), "quantization is 8"),
    (lambda raw, t: raw.pop("quantization"), "unexpected h.0.*scale.*; not F64.* I8"),
    (lambda raw, t: t.update({"lm_head.weight": t["lm_head.weight"].float()}), "do not fit|differ"),
    (lambda raw, t: t.pop("lm_head.scale"), "missing lm_head.scale"),
    (lambda raw, t: t.update({"lm_head.scale": t["lm_head.scale"].to(torch.int8)}), "not F64.*lm_head.scale I8"),
])
def test_a_file_that_is_not_as_its_config_says_is_refused(spoil, message, tmp_path):
    from safetensors.torch import load_file, save_file
    save_pretrained(tmp_path, quantize(build(GPT, torch.float32)))
    raw, tensors = json.loads((tmp_path / "config.json").read_text()), load_file(tmp_path / "model.safetensors")
    spoil(raw, tensors)
    (tmp_path / "config.json").write_text(json.dumps(raw))
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=message):
        load_pretrained(tmp_path)


# -----------------------------------------------------------------------------
# Commands, and what they count


@pytest.mark.parametrize("kind", ["gpt", "bart"])
def test_from_a_trained_model_to_texts(kind, tiny_gpt, tiny_bart, tmp_path):
    tiny = {"gpt": tiny_gpt, "bart": tiny_bart}[kind]
    out, prompt = tmp_path / "whole", ["--prompt", "abc", "--max-new-tokens", 5]
    outcome = call(command.main, tiny.path, out)
    assert outcome.code == 0 and outcome.out.startswith(f"{out}: ") and outcome.out.count("\n") == 1
    from_file = call(program.main, "--model", out, *prompt, "--device", "cpu")
    on_the_way = call(program.main, "--model", tiny.path, *prompt, "--quantize", "int8", "--device", "cpu")
    assert from_file == on_the_way and from_file.code == 0 and from_file.out.strip()
    alone = finish(shell("generate.py", "--model", out, *prompt, "--device", "cpu"))  # which has imported nothing yet
    assert alone == from_file
    found = call(bench.main, "compare", "--model", out, *prompt, "--device", "cpu", "--json")
    assert found.code == 0 and all(s["identical"] for s in json.loads(found.out)["strategies"])


def test_what_it_costs_is_said_on_held_out_text(tiny_gpt, tmp_path):
    text = tiny_gpt.path.parent / "text.txt"
    outcome = call(command.main, tiny_gpt.path, tmp_path / "whole", "--source", text)
    _, _, was, rounded, runs = [line.split("  ") for line in outcome.out.splitlines()]
    losses = [float([cell for cell in line if cell][1]) for line in (was, rounded, runs)]
    assert outcome.code == 0 and max(abs(loss - losses[0]) for loss in losses) < 0.1
    same, other = held_out([tiny_gpt.model] * 2, [((torch.tensor([[5, 6]]),), torch.tensor([[6, -100]]))])
    assert same == other and same[1:] == (0.0, 0.0)


@models
def test_a_weight_is_counted_as_one_byte(cls):
    model = build(cls, torch.float32)
    whole, steps = quantize(copy.deepcopy(model)), []
    for one in (model, whole):
        with count(one) as cost:
            generate(one, PROMPTS[:1], 3, ignore_eos=True)
        steps.append(cost.step(2))
    assert steps[0] == steps[1]
    weights = read(steps[0], 1, 0)
    assert weights == sum(m.weight.numel() for name, m in model.named_modules() if isinstance(m, nn.Linear)
                          and not name.startswith("encoder") and not name.endswith("c_kv"))
    assert Products.of(model).read(steps[0]) - Products.of(whole).read(steps[0]) == 3 * weights
    assert Products.of(whole).predict({(None, 1, 24, 37): 2, (2, 1, 12, 5): 1}) > 0
    small = narrow(whole)
    assert isinstance(small.lm_head, Int8Linear) and not any(type(m) is nn.Linear for m in small.modules())


@pytest.mark.parametrize("program, args, message", [
    (program, ["--model", "{old}", "--prompt", "a", "--quantize", "int4"], "--quantize: invalid choice: 'int4'"),
    (bench, ["beams", "--random", "gpt2", "--prompt-tokens", "4", "--beams", "2", "--quantize", "int8"], "--quantize int8"),
    (command, ["{old}", "{folder}"], "is there already"),
    (command, ["{old}"], "required: OUT"),
    (command, ["{old}", "{new}", "--source", "/nowhere.txt"], "/nowhere.txt"),
    (command, ["{old}", "/proc/nowhere"], "cannot write /proc/nowhere"),
])
def test_bad_input_exits_2_with_one_line_and_writes_nothing(program, args, message, tiny_gpt, tmp_path, monkeypatch):
    from plumbing import cli
    monkeypatch.setattr(cli, "random_model", lambda *args: build(GPT, torch.float32))
    args = [arg.format(old=tiny_gpt.path, folder=tmp_path, new=tmp_path / "new") for arg in args]
    outcome = call(program.main, *args)
    assert outcome.code == 2 and outcome.out == "" and outcome.err.count("\n") == 1 and message in outcome.err, outcome
    assert not any(tmp_path.iterdir())


def test_whole_numbers_are_not_rounded_again(tiny_gpt, tmp_path):
    assert call(command.main, tiny_gpt.path, tmp_path / "whole").code == 0
    again = call(command.main, tmp_path / "whole", tmp_path / "again")
    assert again.code == 2 and "already" in again.err and not (tmp_path / "again").exists()
    with pytest.raises(UserError, match="whole numbers: pool"):
        convert(load_pretrained(tmp_path / "whole")[0], n_kv_head=1)
