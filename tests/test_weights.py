"""Models in and out of Hugging Face directories: the same numbers in both directions, and strangers' files refused."""

import json
import os
import pickle
import random
import shutil
import struct
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

import model as core
import plumbing.tensors as tensors
import plumbing.weights as weights
from generate import generate
from model import BART, GPT
from plumbing.errors import UserError
from plumbing.weights import load_generation_config, load_pretrained, save_pretrained

transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}


def theirs(kind, seed):
    """A random tiny model of Hugging Face's, with every parameter large enough to matter, norms and biases included."""
    draw = random.Random(seed)
    heads = draw.choice([1, 2, 4])
    width, block, tie = heads * draw.choice([2, 4, 6]), draw.randint(36, 48), draw.random() < 0.5
    common = dict(vocab_size=draw.randint(23, 61), tie_word_embeddings=tie)
    if kind == "gpt2":
        config = transformers.GPT2Config(
            n_layer=draw.randint(1, 3), n_head=heads, n_embd=width, n_positions=block, n_inner=draw.choice([None, 20]),
            activation_function=draw.choice(["gelu_new", "gelu_pytorch_tanh"]), bos_token_id=0, eos_token_id=0,
            layer_norm_epsilon=draw.choice([1e-5, 1e-2]), **common)
        model = transformers.GPT2LMHeadModel(config)
    else:
        inner = draw.randint(8, 24)
        config = transformers.BartConfig(
            encoder_layers=draw.randint(1, 2), decoder_layers=draw.randint(1, 3), d_model=width,
            encoder_attention_heads=heads, decoder_attention_heads=heads, encoder_ffn_dim=inner, decoder_ffn_dim=inner,
            max_position_embeddings=block, scale_embedding=draw.random() < 0.5, forced_eos_token_id=None, **common)
        model = transformers.BartForConditionalGeneration(config)
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, x in model.state_dict().items():
            x.normal_(1.0 if "norm" in name or "ln_" in name else 0.0, 0.3)
    return model.eval()


def ids(vocab, *shape):
    return torch.randint(3, vocab, shape)


def both_logits(ours, model):
    """Logits of ours and theirs on the same ragged batch, at the positions that count."""
    vocab = ours.config.vocab_size
    with torch.no_grad():
        if isinstance(ours, GPT):
            x = ids(vocab, 3, 17)
            return ours(x), model(x).logits
        source, target, lengths = ids(vocab, 3, 19), ids(vocab, 3, 11), torch.tensor([19, 7, 1])
        mask = (torch.arange(19) < lengths[:, None]).long()
        logits = model(input_ids=source, attention_mask=mask, decoder_input_ids=target).logits
        return ours(source, target, lengths), logits


def is_their_greedy(model, row, new):
    """Whether theirs would have chosen every one of these tokens, each seen behind those before it."""
    with torch.no_grad():
        if model.config.is_encoder_decoder:
            target = torch.tensor([[model.config.decoder_start_token_id, *new[:-1]]])
            logits = model(input_ids=torch.tensor([row]), decoder_input_ids=target).logits
        else:
            logits = model(torch.tensor([row + new[:-1]])).logits
    return logits[0, -len(new):].argmax(-1).tolist() == new


def close(a, b):
    assert (a - b).abs().max() <= TOLERANCE[a.dtype], (a - b).abs().max()


def reopened(directory, dtype):
    """What transformers makes of a directory: the model, which must report no key that does not fit."""
    kind = json.loads((directory / "config.json").read_text())["architectures"][0]
    model, info = getattr(transformers, kind).from_pretrained(directory, dtype=dtype, output_loading_info=True)
    assert not any(info.values()), info
    return model.eval()


def spoil(directory, change):
    """Rewrite the tensors of a directory."""
    path = Path(directory) / "model.safetensors"
    tensors = {name: x.clone() for name, x in load_file(path).items()}
    change(tensors)
    save_file(tensors, path)


@pytest.fixture
def tiny(tmp_path):
    """A directory of ours that loads, to be spoilt."""
    torch.manual_seed(0)
    config = replace(GPT.get_default_config(), n_layer=2, n_head=2, n_embd=8, vocab_size=11, block_size=7)
    save_pretrained(tmp_path / "tiny", GPT(config))
    return tmp_path / "tiny"


# -----------------------------------------------------------------------------
# The same numbers


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("kind", ["gpt2", "bart"])
def test_logits_and_greedy_tokens_match_huggingface_loaded_and_saved_again(kind, seed, tmp_path):
    model = theirs(kind, seed).to(DTYPES[seed % 3])
    size = "2KB" if seed % 4 == 1 else "5GB"
    model.save_pretrained(tmp_path / "a", max_shard_size=size)
    assert (tmp_path / "a" / "model.safetensors.index.json").exists() == (size == "2KB")
    if seed % 4 == 2:  # as saved from the model without its head
        prefix = "transformer." if kind == "gpt2" else "model."
        names = load_file(tmp_path / "a" / "model.safetensors")
        save_file({name.removeprefix(prefix): x for name, x in names.items()}, tmp_path / "a" / "model.safetensors")
    assert load_pretrained(tmp_path / "a")[0].wte.weight.dtype == DTYPES[seed % 3]
    for dtype in TOLERANCE:
        model.to(dtype)
        ours, tokenizer = load_pretrained(tmp_path / "a", dtype=dtype)
        assert tokenizer is None and not ours.training
        close(*both_logits(ours, model))
    model.double(), ours.double()
    rows = [ids(ours.config.vocab_size, n).tolist() for n in (1, 5)]
    for row, new in zip(rows, generate(ours, rows, 30, ignore_eos=True)):
        assert len(new) == 30 and is_their_greedy(model, row, new)
    save_pretrained(tmp_path / "b", load_pretrained(tmp_path / "a")[0])
    close(*both_logits(ours, reopened(tmp_path / "b", torch.float64)))
    mine, again = load_pretrained(tmp_path / "a")[0].state_dict(), load_pretrained(tmp_path / "b")[0].state_dict()
    assert all(torch.equal(x, again[name]) for name, x in mine.items())


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("cls", [GPT, BART])
def test_what_we_save_transformers_opens(cls, seed, tmp_path):
    draw = random.Random(seed)
    heads = draw.choice([1, 2, 3])
    config = replace(cls.get_default_config(), n_head=heads, n_embd=heads * draw.choice([2, 4]), vocab_size=31,
                     block_size=20, n_inner=draw.choice([None, 10]), tie_weights=draw.random() < 0.5)
    layers = ["n_layer"] if cls is GPT else ["n_encoder_layer", "n_decoder_layer"]
    config = replace(config, **{name: draw.randint(1, 3) for name in layers})
    torch.manual_seed(seed)
    model = cls(config).double().eval()
    with torch.no_grad():
        for x in model.parameters():
            x.normal_(0.2, 0.4)
    save_pretrained(tmp_path, model)
    close(*both_logits(model, reopened(tmp_path, torch.float64)))
    again = load_pretrained(tmp_path)[0]
    assert replace(again.config, n_inner=config.n_inner) == config
    assert all(torch.equal(x, again.state_dict()[name]) for name, x in model.state_dict().items())


@pytest.mark.parametrize("name", [name for name, (_, how, _) in weights.GPT_TABLE.items() if how is weights.TRANSPOSED])
def test_a_forgotten_transpose_cannot_pass(name, tmp_path, monkeypatch):
    model = theirs("gpt2", 0).double()
    model.save_pretrained(tmp_path)
    monkeypatch.setitem(weights.GPT_TABLE, name, (weights.GPT_TABLE[name][0], weights.SAME, weights.GPT_TABLE[name][2]))
    with pytest.raises((AssertionError, UserError)):
        close(*both_logits(load_pretrained(tmp_path)[0], model))


@pytest.mark.parametrize("name", ["encoder.*.attn.c_attn", "decoder.*.attn.c_attn", "decoder.*.cross.c_kv"])
def test_queries_keys_and_values_cannot_change_places(name, tmp_path, monkeypatch):
    model = theirs("bart", 0).double()
    model.save_pretrained(tmp_path)
    theirs_name, how, shape = weights.BART_TABLE[name]
    monkeypatch.setitem(weights.BART_TABLE, name, (theirs_name.replace("k,v", "v,k"), how, shape))
    with pytest.raises(AssertionError):
        close(*both_logits(load_pretrained(tmp_path)[0], model))


def test_final_logits_bias_is_the_heads_bias_and_is_not_trained(tmp_path):
    theirs("bart", 1).save_pretrained(tmp_path)
    model, _ = load_pretrained(tmp_path)
    assert torch.equal(model.lm_head.bias, load_file(tmp_path / "model.safetensors")["final_logits_bias"][0])
    assert not model.lm_head.bias.requires_grad and model.wte.weight.requires_grad
    spoil(tmp_path, lambda tensors: tensors.pop("final_logits_bias"))
    assert not load_pretrained(tmp_path)[0].lm_head.bias.any()


def test_mask_buffers_of_old_files_are_dropped_and_c_attn_bias_is_not(tiny):
    before = load_pretrained(tiny)[0].state_dict()
    spoil(tiny, lambda t: t.update({"transformer.h.0.attn.bias": torch.ones(1, 1, 7, 7, dtype=torch.uint8),
                                    "h.1.attn.masked_bias": torch.tensor(-1e4)}))
    after = load_pretrained(tiny)[0].state_dict()
    assert all(torch.equal(x, after[name]) for name, x in before.items())


def test_tied_weights_stay_tied_and_can_come_under_any_of_their_names(tiny, tmp_path):
    spoil(tiny, lambda t: t.update({"lm_head.weight": t.pop("transformer.wte.weight")}))
    model, _ = load_pretrained(tiny)
    assert model.lm_head.weight is model.wte.weight
    bart = BART(replace(BART.get_default_config(), n_encoder_layer=1, n_decoder_layer=1, n_head=1, n_embd=4,
                        vocab_size=9, block_size=5))
    save_pretrained(tmp_path / "bart", bart)
    for name in ("model.decoder.embed_tokens.weight", "model.encoder.embed_tokens.weight", "lm_head.weight"):
        save_pretrained(tmp_path / "bart", bart)
        spoil(tmp_path / "bart", lambda t: t.update({name: t.pop("model.shared.weight")}))
        again, _ = load_pretrained(tmp_path / "bart")
        assert again.lm_head.weight is again.wte.weight is again.encoder_wte.weight
        assert torch.equal(again.wte.weight, bart.wte.weight)


def test_an_embedding_that_comes_twice_must_be_the_same_twice(tiny):
    spoil(tiny, lambda t: t.update({"lm_head.weight": t["transformer.wte.weight"].clone()}))
    model, _ = load_pretrained(tiny)
    assert model.lm_head.weight is model.wte.weight
    for other in (torch.zeros(11, 8), torch.zeros(11, 9), torch.zeros(11, 8, dtype=torch.long)):
        spoil(tiny, lambda t: t.update({"lm_head.weight": other}))
        with pytest.raises(UserError, match="ties the embeddings"):
            load_pretrained(tiny)


@pytest.mark.parametrize("cls", [GPT, BART])
def test_grouped_heads_get_our_own_model_type_and_come_back(cls, tmp_path):
    config = replace(cls.get_default_config(), n_head=4, n_kv_head=2, n_embd=16, vocab_size=9, block_size=5)
    model = cls(config)
    save_pretrained(tmp_path, model)
    raw = json.loads((tmp_path / "config.json").read_text())
    assert raw["model_type"] == f"mindecode-{cls.__name__.lower()}" and "n_kv_head=2" in raw["comment"]
    for opener in (transformers.AutoConfig, transformers.AutoModel):  # they name what they cannot open
        with pytest.raises(ValueError, match=raw["model_type"]):
            opener.from_pretrained(tmp_path)
    again, _ = load_pretrained(tmp_path)
    assert all(torch.equal(x, again.state_dict()[name]) for name, x in model.state_dict().items())


class Gated(core.MLP):
    """SwiGLU's idea: a third matrix."""

    def __init__(self, config, *args):
        super().__init__(config, *args)
        self.c_gate = nn.Linear(config.n_embd, self.c_fc.out_features, bias=False)

    def forward(self, x):
        return self.c_proj(F.silu(self.c_gate(x)) * self.c_fc(x))


class Fused(core.MLP):
    """The same with two matrices in one, which has the published name but not its shape."""

    def __init__(self, config, *args):
        super().__init__(config, *args)
        self.c_fc = nn.Linear(config.n_embd, 2 * self.c_fc.out_features)

    def forward(self, x):
        gate, x = self.c_fc(x).chunk(2, dim=-1)
        return self.c_proj(F.silu(gate) * x)


class Convolved(core.MLP):
    """The published name again, and not even a matrix."""

    def __init__(self, config, *args):
        super().__init__(config, *args)
        self.c_fc = nn.Conv1d(config.n_embd, self.c_fc.out_features, 1)

    def forward(self, x):
        return self.c_proj(self.act(self.c_fc(x.transpose(1, 2)).transpose(1, 2)))


class Squared(core.MLP):
    """Another activation: no tensor tells."""

    def __init__(self, config, *args):
        super().__init__(config, *args)
        self.act = nn.ReLU()

    def forward(self, x):
        return self.c_proj(self.act(self.c_fc(x)).square())


class Scaled(core.MLP):
    """A number that is learned, one that is counted along, and one that only the constructor knows."""

    def __init__(self, config, *args):
        super().__init__(config, *args)
        self.scale = nn.Parameter(torch.tensor(0.7))
        self.register_buffer("seen", torch.tensor([2.0]))
        self.register_buffer("slope", torch.linspace(0.1, 0.9, config.n_embd), persistent=False)

    def forward(self, x):
        return self.c_proj(self.act(self.c_fc(x))) * self.scale * self.seen * self.slope


class Marked(core.MLP):
    """As published, but for a part that says what its layer attends to."""

    def __init__(self, config, *args):
        super().__init__(config, *args)
        self.pattern = nn.Identity()


def rms_norm(config):
    return nn.RMSNorm(config.n_embd, eps=1e-5)


CHANGES = {"SwiGLU": ("MLP", Gated, "h.0.mlp.c_gate.weight"), "fused SwiGLU": ("MLP", Fused, "h.0.mlp.c_fc.weight (64, 8)"),
           "a convolution": ("MLP", Convolved, "h.0.mlp.c_fc.weight (32, 8, 1)"),
           "squared ReLU": ("MLP", Squared, "mlp.act=ReLU()"), "RMSNorm": ("layer_norm", rms_norm, "no h.0.ln_1.bias"),
           "numbers": ("MLP", Scaled, "h.0.mlp.scale ()"), "a pattern": ("MLP", Marked, "mlp.pattern=Identity()")}


def make(cls, **more):
    layers = dict(n_layer=2) if issubclass(cls, GPT) else dict(n_encoder_layer=1, n_decoder_layer=2)
    torch.manual_seed(0)
    model = cls(replace(cls.get_default_config(), n_head=2, n_embd=8, vocab_size=40, block_size=30, **layers, **more))
    with torch.no_grad():
        for x in model.parameters():
            x.add_(torch.randn_like(x) / 5)
    return model.eval()


def comes_back_as_our_own(model, directory):
    """Save and load a model; also once more, and as another type. Returns its config.json."""
    save_pretrained(directory, model)
    raw = json.loads((directory / "config.json").read_text())
    kind = "gpt" if isinstance(model, GPT) else "bart"
    assert raw["model_type"] == f"mindecode-{kind}"
    for opener in (transformers.AutoConfig, transformers.AutoModel):
        with pytest.raises(ValueError, match=raw["model_type"]):
            opener.from_pretrained(directory)
    rng = torch.get_rng_state()
    again, _ = load_pretrained(directory)
    assert torch.equal(rng, torch.get_rng_state()) and type(again) is type(model)
    assert replace(again.config, n_inner=model.config.n_inner) == model.config
    mine, theirs = model.state_dict(), again.state_dict()
    assert mine.keys() == theirs.keys() and all(torch.equal(x, theirs[name]) for name, x in mine.items())
    assert {name for name, p in again.named_parameters() if p.requires_grad} == {
        name for name, p in model.named_parameters() if p.requires_grad}
    x = ids(40, 2, 9)
    inputs = (x,) if kind == "gpt" else (x, x)
    close(again(*inputs), model(*inputs))
    save_pretrained(directory / "again", again)
    assert load_file(directory / "again" / "model.safetensors").keys() == load_file(directory / "model.safetensors").keys()
    half, _ = load_pretrained(directory, dtype=torch.float64)
    assert torch.allclose(half(*inputs).float(), model(*inputs), atol=1e-4)
    return raw


@pytest.mark.parametrize("what", CHANGES)
@pytest.mark.parametrize("cls", [GPT, BART])
def test_a_model_that_somebody_changed_is_our_own_type_and_comes_back(cls, what, tmp_path, monkeypatch):
    """Saved under the published name, other tools would run it without the change, and none would say so."""
    part, changed, told = CHANGES[what]
    published = make(cls)
    save_pretrained(tmp_path / "published", published)
    monkeypatch.setattr(core, part, changed)
    raw = comes_back_as_our_own(make(cls), tmp_path / "changed")
    assert raw["architectures"] == [f"MinDecode{cls.__name__}"]
    assert (told if cls is GPT else told.replace("h.0", "encoder.0")) in raw["comment"]
    if what in ("SwiGLU", "fused SwiGLU", "a convolution", "RMSNorm", "numbers"):  # nor does the changed code take what is published
        with pytest.raises(UserError, match="do not fit"):
            load_pretrained(tmp_path / "published")


class Causal(nn.Dropout):
    """What a layer's pattern is called where nothing is left out; a test of the name, which must not be a change."""


@pytest.mark.parametrize("cls", [GPT, BART])
def test_a_model_with_the_usual_patterns_is_the_published_one(cls, tmp_path):
    model = make(cls)
    for layer in model.decoder_layers():
        layer.attn.pattern = Causal(0.1)
    save_pretrained(tmp_path, model)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] in ("gpt2", "bart")
    layer.attn.pattern = nn.Dropout(0.1)
    save_pretrained(tmp_path, model)
    assert "attn.pattern=Dropout" in json.loads((tmp_path / "config.json").read_text())["comment"]


@dataclass(slots=True)
class RotaryConfig(core.GPTConfig):
    rotary: bool = True
    base: float = 1e4
    scaling: str | None = None


class RotaryGPT(GPT):
    """No table of positions, and fields that GPT-2 has not."""

    config_class = RotaryConfig

    def __init__(self, config):
        super().__init__(config)
        self.wpe = nn.Identity()
        self.register_buffer("angles", config.base ** -torch.linspace(0, 1, config.n_embd), persistent=False)

    def forward(self, idx):
        x = self.wte(idx) * torch.cos(torch.arange(idx.size(1))[:, None] * self.angles)
        for block in self.h:
            x = block(x, torch.arange(idx.size(1)))
        return self.lm_head(self.ln_f(x))


class Backwards(BART):
    """Nothing to see but its class."""


def test_fields_and_classes_of_ones_own_come_back(tmp_path):
    raw = comes_back_as_our_own(make(RotaryGPT, base=500.0, scaling="ntk"), tmp_path / "rotary")
    assert (raw["rotary"], raw["base"], raw["scaling"], raw["architectures"]) == (True, 500.0, "ntk", ["MinDecodeRotaryGPT"])
    assert "rotary=True" in raw["comment"] and "max_batch_size" not in raw
    assert "class Backwards" in comes_back_as_our_own(make(Backwards), tmp_path / "class")["comment"]
    assert "no lm_head" not in comes_back_as_our_own(make(RotaryGPT, tie_weights=False), tmp_path / "untied")["comment"]


@pytest.mark.parametrize("change, words", [
    (dict(architectures=["MinDecodeElsewhereGPT"]), "MinDecodeElsewhereGPT.*import the file"),
    (dict(architectures=7), "architectures is 7"), (dict(rotary=1), "rotary is 1.*bool"), (dict(base="x"), "base is 'x'"),
    (dict(base=float("nan")), "base=nan"), (dict(base=10**30), "base=10"), (dict(scaling=[]), r"scaling is \[\]"),
    (dict(rotaty=True), "rotaty.*did you mean 'rotary'"), (dict(n_layer=10**7), "layers"), (dict(n_layer=3), "missing"),
    (dict(n_embd=16), "of another shape"), (dict(n_embd=2**27), "of another shape")])
def test_a_model_of_our_own_type_is_read_as_strictly(change, words, tmp_path):
    save_pretrained(tmp_path, make(RotaryGPT))
    config(tmp_path, **change)
    with pytest.raises(UserError, match=words) as refused:
        load_pretrained(tmp_path)
    assert "\n" not in str(refused.value) and str(tmp_path) in str(refused.value)


def test_what_a_file_cannot_hold_is_refused_when_it_is_saved(tmp_path):
    model = make(GPT)
    model.register_buffer("mask", torch.ones(3, dtype=torch.bool))
    with pytest.raises(UserError, match="mask torch.bool.*not persistent"):
        save_pretrained(tmp_path, model)


def test_an_embedding_untied_by_hand_comes_back_untied(tmp_path):
    model = make(GPT)
    model.lm_head.weight = nn.Parameter(model.wte.weight.detach() + 1)
    save_pretrained(tmp_path, model)
    assert "lm_head.weight" in json.loads((tmp_path / "config.json").read_text())["comment"]
    with pytest.raises(UserError):  # as the code that reads it ties
        load_pretrained(tmp_path)


@pytest.mark.parametrize("given, means", [([3], 3), ([3, 5], [3, 5]), (3, 3), (None, None), (99, None)])
def test_a_text_may_end_in_one_of_several_ids(given, means, tiny):
    config(tiny, eos_token_id=given)
    model, _ = load_pretrained(tiny)
    assert model.config.eos_id == means
    save_pretrained(tiny, model)
    assert load_generation_config(tiny)["eos_token_id"] == means
    assert load_generation_config(tiny)["bos_token_id"] == (3 if means else None)


@pytest.mark.parametrize("given, means", [(5, 5), ([5], 5), ([5, 6], [5, 6]), (50256, 3), (None, 3)])
def test_the_end_of_a_generation_config_outranks_that_of_the_config(given, means, tiny):
    config(tiny, eos_token_id=3)
    (tiny / "generation_config.json").write_text(json.dumps({"eos_token_id": given}))
    assert load_pretrained(tiny)[0].config.eos_id == means


def test_gpt_2s_end_counts_where_the_vocabulary_has_it(tmp_path):
    save_pretrained(tmp_path, GPT(core.GPTConfig(n_layer=1, n_head=1, n_embd=2, vocab_size=50258, block_size=4, eos_id=50257)))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": 50256}))
    assert load_pretrained(tmp_path)[0].config.eos_id == 50256


@pytest.mark.parametrize("given", [[], [3, 99], [3, -1], [3, "4"], [True, 3], [[3], 4], "3"])
def test_ends_that_no_model_can_produce_are_refused(given, tiny):
    config(tiny, eos_token_id=given)
    with pytest.raises(UserError, match="eos_(token_)?id"):
        load_pretrained(tiny)


def test_the_number_of_positions_is_there_under_both_of_its_names(tiny):
    raw = json.loads((tiny / "config.json").read_text())
    assert raw["n_ctx"] == raw["n_positions"] == 7


def test_dropout_and_ids_survive_the_round_trip(tmp_path):
    config = replace(BART.get_default_config(), n_encoder_layer=1, n_decoder_layer=1, n_head=1, n_embd=4, n_inner=16,
                     vocab_size=9, block_size=5, embd_pdrop=0.3, attn_pdrop=0.2, resid_pdrop=0.4, bos_id=3, pad_id=4,
                     eos_id=5, start_id=6, scale_embedding=True, layer_norm_eps=1e-3)
    save_pretrained(tmp_path, BART(config))
    model, _ = load_pretrained(tmp_path)
    assert model.config == config and model.drop.p == 0.3 and model.decoder[0].attn.pattern.p == 0.2
    assert load_generation_config(tmp_path)["decoder_start_token_id"] == 6
    (tmp_path / "generation_config.json").unlink()
    assert load_generation_config(tmp_path) == {}


def test_loaded_parameters_can_be_trained_and_do_not_depend_on_the_file(tiny):
    model, _ = load_pretrained(tiny)
    before = model(torch.arange(7)[None]).detach()
    (tiny / "model.safetensors").write_bytes(bytes((tiny / "model.safetensors").stat().st_size))  # in place
    assert torch.equal(model(torch.arange(7)[None]), before)
    model(torch.arange(7)[None]).square().mean().backward()
    torch.optim.AdamW(model.parameters()).step()
    assert not torch.equal(model(torch.arange(7)[None]), before)
    save_pretrained(tiny, model)
    assert torch.equal(load_pretrained(tiny)[0](torch.arange(7)[None]), model(torch.arange(7)[None]))


@pytest.mark.parametrize("piece", [1, 7, 2**20])
def test_a_file_can_be_read_in_pieces_of_any_size_and_into_any_type(piece, tmp_path, monkeypatch):
    theirs("bart", 0).save_pretrained(tmp_path)
    whole = load_pretrained(tmp_path)[0].state_dict()
    monkeypatch.setattr(tensors, "PIECE", piece)
    for dtype in (*DTYPES, torch.float64):
        model, _ = load_pretrained(tmp_path, dtype)
        assert all(torch.equal(x, whole[name].to(dtype)) for name, x in model.state_dict().items())


def test_loading_leaves_the_number_of_threads_as_it_found_it_also_when_it_fails(tiny):
    torch.set_num_threads(3)
    load_pretrained(tiny)
    spoil(tiny, lambda t: t["transformer.wpe.weight"].fill_(float("nan")))
    with pytest.raises(UserError, match="transformer.wpe.weight is not finite"):
        load_pretrained(tiny)
    assert torch.get_num_threads() == 3
    torch.set_num_threads(1)


# -----------------------------------------------------------------------------
# Strangers


class Payload:
    def __init__(self, sentinel):
        self.sentinel = str(sentinel)

    def __reduce__(self):
        return os.mkdir, (self.sentinel,)


def header(tiny, entries, data=b""):
    """Replace model.safetensors by a header of our own making."""
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    (tiny / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data)


def config(tiny, **changes):
    path = tiny / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def tensor(start, end, shape=(1,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}


ENTRY = json.dumps(tensor(0, 4)).encode()


def replace_by(make):
    def change(tiny):
        (tiny / "model.safetensors").unlink()
        make(tiny / "model.safetensors")
    return change


def truncate(to):
    def change(tiny):
        data = (tiny / "model.safetensors").read_bytes()
        (tiny / "model.safetensors").write_bytes(data[:to(len(data))])
    return change


def only_pickled(tiny):
    (tiny / "model.safetensors").rename(tiny / "pytorch_model.bin")


def index(tiny, weight_map):
    (tiny / "model.safetensors").rename(tiny / "a.safetensors")
    (tiny / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def shards(*names):
    """Put the tensors, in turns, into files of these names; one that is None is lost."""
    def change(tiny):
        tensors = load_file(tiny / "model.safetensors")
        (tiny / "model.safetensors").unlink()
        for i, name in enumerate(names):
            if name:
                save_file({key: tensors[key] for key in sorted(tensors)[i::len(names)]}, tiny / f"{name}.safetensors")
    return change


def shape_changed(t):
    t["transformer.ln_f.bias"] = torch.zeros(3)


HOSTILE = {
    "a pickle by another name": lambda d: (d / "model.safetensors").write_bytes(pickle.dumps(Payload(d / "ran"))),
    "a torch file by another name": lambda d: torch.save({"x": Payload(d / "ran")}, d / "model.safetensors"),
    "only pickled weights": only_pickled,
    "overlapping tensors": lambda d: header(d, {"a": tensor(0, 4), "b": tensor(2, 6)}, bytes(8)),
    "an absurd shape": lambda d: header(d, {"a": tensor(0, 4, (2**40, 2**40))}, bytes(4)),
    "an unknown type": lambda d: header(d, {"a": tensor(0, 4, dtype="X9")}, bytes(4)),
    "integers as weights": lambda d: spoil(d, lambda t: t.update({"transformer.ln_f.bias": torch.zeros(8).long()})),
    "a header of 2**40 bytes": lambda d: (d / "model.safetensors").write_bytes(struct.pack("<Q", 2**40) + bytes(99)),
    "a header that is a list": lambda d: header(d, b"[]"),
    "a header that is nested": lambda d: header(d, b'{"a":' * 100_000),
    "a header with a key twice": lambda d: header(d, b'{"a":%s,"a":%s}' % ((ENTRY,) * 2), bytes(4)),
    "nothing at all": truncate(lambda n: 0),
    "ten bytes": truncate(lambda n: 10),
    "half of it": truncate(lambda n: n // 2),
    "all but a byte": truncate(lambda n: n - 1),
    "a byte too much": lambda d: (d / "model.safetensors").open("ab").write(b"x"),
    "a billion layers": lambda d: config(d, n_layer=10**9),
    "no heads": lambda d: config(d, n_head=0),
    "heads that do not divide": lambda d: config(d, n_head=3),
    "a negative vocabulary": lambda d: config(d, vocab_size=-1),
    "a huge vocabulary": lambda d: config(d, vocab_size=10**30),
    "a billion positions": lambda d: config(d, n_positions=10**9),
    "ten million positions": lambda d: config(d, n_positions=10**7),
    "a width of 2**28": lambda d: config(d, n_embd=2**28, n_head=2**20),
    "a layer too many": lambda d: config(d, n_layer=3),
    "a layer too few": lambda d: config(d, n_layer=1),
    "a float for an int": lambda d: config(d, n_layer=2.0),
    "a string for an int": lambda d: config(d, n_head="2"),
    "a bool for an int": lambda d: config(d, n_head=True),
    "a list for an int": lambda d: config(d, n_embd=[8]),
    "nothing for an int": lambda d: config(d, n_embd=None),
    "an int for a bool": lambda d: config(d, tie_word_embeddings=1),
    "NaN for a dropout": lambda d: config(d, attn_pdrop=float("nan")),
    "infinity for a norm": lambda d: config(d, layer_norm_epsilon=float("inf")),
    "a negative norm": lambda d: config(d, layer_norm_epsilon=-1.0),
    "a dropout of 2": lambda d: config(d, resid_pdrop=2),
    "two ends": lambda d: config(d, eos_token_id=[1, 99]),
    "another model": lambda d: config(d, model_type="llama"),
    "a model type that is a list": lambda d: config(d, model_type=["gpt2"]),
    "another activation": lambda d: config(d, activation_function="relu"),
    "scores scaled by layer": lambda d: config(d, scale_attn_by_inverse_layer_idx=True),
    "unscaled scores": lambda d: config(d, scale_attn_weights=False),
    "upcast scores": lambda d: config(d, reorder_and_upcast_attn=True),
    "a config nested 100,000 times": lambda d: (d / "config.json").write_text("[" * 100_000),
    "a config with a key twice": lambda d: (d / "config.json").write_text('{"n_head": 2, "n_head": 1}'),
    "a config cut short": lambda d: (d / "config.json").write_text('{"model_type": '),
    "no config": lambda d: (d / "config.json").unlink(),
    "a symlink loop": replace_by(lambda path: path.symlink_to(path)),
    "a FIFO": replace_by(os.mkfifo),
    "a directory for a file": replace_by(os.mkdir),
    "a NaN": lambda d: spoil(d, lambda t: t["transformer.h.1.mlp.c_proj.weight"].view(-1)[5].fill_(float("nan"))),
    "an infinity": lambda d: spoil(d, lambda t: t["transformer.wpe.weight"].view(-1)[-1].fill_(float("-inf"))),
    "a missing tensor": lambda d: spoil(d, lambda t: t.pop("transformer.ln_f.bias")),
    "an extra tensor": lambda d: spoil(d, lambda t: t.update({"transformer.ln_g.bias": torch.zeros(3)})),
    "a tensor of another shape": lambda d: spoil(d, shape_changed),
    "a tensor with and without prefix": lambda d: spoil(d, lambda t: t.update({"ln_f.bias": torch.zeros(8)})),
    "an index to elsewhere": lambda d: index(d, {"a": "../tiny/a.safetensors"}),
    "an index that is a list": lambda d: index(d, ["a.safetensors"]),
    "an index to a file that is not there": lambda d: index(d, {"a": "b.safetensors"}),
    "a shard that is not there": shards("model-00001-of-00002", None),
    "shards of two models": lambda d: (shutil.copy(d / "model.safetensors", d / "old-00001-of-00001.safetensors"),
                                       shards("model-00001-of-00002", "model-00002-of-00002")(d)),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_hostile_directory_is_refused_in_one_line(what, tiny):
    HOSTILE[what](tiny)
    with pytest.raises(UserError) as refused:
        load_pretrained(tiny)
    assert "\n" not in str(refused.value) and str(tiny) in str(refused.value)
    assert len(str(refused.value).replace(str(tiny), "")) < 500
    assert not (tiny / "ran").exists()


def test_shards_need_no_index_and_may_have_any_name_that_counts_them(tiny):
    before = load_pretrained(tiny)[0].state_dict()
    shards("weights-1-of-3", "weights-2-of-3", "weights-3-of-3")(tiny)
    after = load_pretrained(tiny)[0].state_dict()
    assert all(torch.equal(x, after[name]) for name, x in before.items())


def test_all_keys_that_do_not_fit_are_listed_together(tiny):
    def change(t):
        del t["transformer.ln_f.bias"]
        t["transformer.extra"] = torch.zeros(1)
    spoil(tiny, change)
    with pytest.raises(UserError, match="missing transformer.ln_f.bias; unexpected transformer.extra"):
        load_pretrained(tiny)


def test_a_nan_names_its_tensor_and_an_overflow_its_type(tiny):
    spoil(tiny, lambda t: t["transformer.h.1.ln_2.bias"][0].fill_(1e30))
    load_pretrained(tiny)
    with pytest.raises(UserError, match=r"h\.1\.ln_2\.bias is not finite as torch.float16"):
        load_pretrained(tiny, dtype=torch.float16)


@pytest.mark.parametrize("change", [dict(encoder_attention_heads=1), dict(decoder_ffn_dim=5), dict(pad_token_id=99),
                                    dict(normalize_before=True), dict(activation_function="relu")])
def test_a_bart_that_we_cannot_express_is_refused_by_name(change, tmp_path):
    model = BART(replace(BART.get_default_config(), n_encoder_layer=1, n_decoder_layer=1, n_head=2, n_embd=4,
                         vocab_size=9, block_size=5))
    save_pretrained(tmp_path, model)
    config(tmp_path, **change)
    with pytest.raises(UserError, match="pad_id" if "pad_token_id" in change else next(iter(change))):
        load_pretrained(tmp_path)


def test_an_untied_bart_has_three_embeddings_and_the_shared_one_stands_in_for_those_that_are_missing(tmp_path):
    model = theirs("bart", next(seed for seed in range(9) if not theirs("bart", seed).config.tie_word_embeddings))
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    ours, _ = load_pretrained(tmp_path)
    assert torch.equal(ours.encoder_wte.weight, stored["model.encoder.embed_tokens.weight"])
    assert torch.equal(ours.wte.weight, stored["model.decoder.embed_tokens.weight"])
    assert torch.equal(ours.lm_head.weight, stored["lm_head.weight"])
    assert len({x.double().sum().item() for name, x in stored.items() if x.shape == ours.wte.weight.shape}) == 4
    spoil(tmp_path, lambda t: [t.pop(f"model.{part}.embed_tokens.weight") for part in ("encoder", "decoder")])
    ours, _ = load_pretrained(tmp_path)  # as transformers 4 wrote them
    assert torch.equal(ours.wte.weight, stored["model.shared.weight"])
    assert torch.equal(ours.encoder_wte.weight, ours.wte.weight) and ours.encoder_wte is not ours.wte
    spoil(tmp_path, lambda t: t.pop("lm_head.weight"))
    with pytest.raises(UserError, match="missing lm_head.weight"):
        load_pretrained(tmp_path)


def test_a_path_that_is_not_there_says_so_and_an_unknown_name_says_so_quickly(tmp_path, monkeypatch):
    import huggingface_hub
    (tmp_path / "file").touch()
    for path in (tmp_path / "no", "./no/such", "tests/no-such", tmp_path / "file", "", "a/b/c", "../x"):
        with pytest.raises(UserError):
            load_pretrained(path)

    def offline(*args, **kwargs):
        raise OSError("no network\nand more lines")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(UserError, match=r"no model of that name|nor a model of that name.*no network\)"):
        load_pretrained("no-such-owner/no-such-model")


def test_a_name_comes_from_the_hubs_cache(tiny, monkeypatch):
    import huggingface_hub
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **kwargs: str(tiny))
    assert load_pretrained("gpt2")[0].config.n_layer == 2


def test_hostile_numbers_cost_neither_memory_nor_time(tmp_path):
    """In a process of its own, whose address space may grow by 300 MB once everything is imported."""
    program = """
import resource, sys, time
from plumbing.weights import load_pretrained
from plumbing.errors import UserError
pages = int(open("/proc/self/statm").read().split()[0])
limit = pages * resource.getpagesize() + 300 * 2**20
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
for directory in sys.argv[1:]:
    start = time.perf_counter()
    try:
        load_pretrained(directory)
    except UserError as error:
        assert time.perf_counter() - start < 5, directory
        continue
    raise SystemExit(f"{directory} was not refused")
"""
    names = ["a billion layers", "a huge vocabulary", "a billion positions", "ten million positions", "an absurd shape",
             "a width of 2**28", "a header of 2**40 bytes", "a config nested 100,000 times", "a FIFO"]
    directories = []
    for i, name in enumerate(names):
        directories.append(tmp_path / str(i) / "tiny")
        small = replace(GPT.get_default_config(), n_layer=1, n_head=1, n_embd=4, vocab_size=5, block_size=5)
        save_pretrained(directories[-1], GPT(small))
        HOSTILE[name](directories[-1])
    done = subprocess.run([sys.executable, "-c", program, *map(str, directories)], capture_output=True, text=True,
                          cwd=Path(__file__).parent.parent, timeout=60)
    assert done.returncode == 0, done.stderr
