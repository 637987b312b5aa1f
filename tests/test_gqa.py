"""Pooled heads are the means of their groups, lose nothing where those were equal, and can be trained further."""

import json
import random
from dataclasses import replace

import pytest
import torch
from conftest import call

import train
from attention import Attention, head_sizes
from further import gqa
from further.gqa import convert, mean, span
from generate import generate
from model import BART, GPT, BARTConfig, GPTConfig
from plumbing import config as configs
from plumbing.data import IGNORE, DataConfig, load_data
from plumbing.errors import UserError
from plumbing.weights import load_pretrained, save_pretrained
from test_model import rough

SIZES = dict(n_head=6, n_embd=24, vocab_size=17, block_size=12)
FIELDS = {GPT: ["n_kv_head"], BART: ["n_kv_head", "n_decoder_kv_head", "n_cross_kv_head"]}
INPUTS = {GPT: 1, BART: 2}  # ids that forward() takes


def build(cls, **fields):
    depth = dict(n_layer=2) if cls is GPT else dict(n_encoder_layer=1, n_decoder_layer=2)
    return rough(cls(cls.config_class(**depth, **SIZES, **fields)))


def random_case(cls, seed):
    """A rough model in fp64, which may share heads already, and what it can be converted to."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    has = {name: rng.choice([None, 6, 3]) for name in FIELDS[cls]}
    model = build(cls, **has)
    few = {name: rng.choice([None, 1, 3]) for name in FIELDS[cls]}
    return model, {name: n for name, n in few.items() if n} or {"n_kv_head": 1}


def kv_heads(config, name):
    role = "cross" if ".cross." in name else "encoder" if name.startswith("encoder") else "decoder"
    return head_sizes(config.of(role))[1]


@pytest.mark.parametrize("cls", FIELDS)
@pytest.mark.parametrize("seed", range(12))
def test_every_pooled_row_is_the_mean_over_its_group_and_nothing_else_changes(cls, seed):
    """Brute force: one number of one head at a time."""
    model, few = random_case(cls, seed)
    pooled, C, D = convert(model, **few), 24, 4
    assert pooled.config == replace(model.config, **few) and not pooled.training
    old, new, seen = model.state_dict(), pooled.state_dict(), 0
    assert old.keys() == new.keys()
    for name, x in old.items():
        if "c_attn" not in name and "c_kv" not in name:
            assert torch.equal(new[name], x), name
            continue
        start = C if "c_attn" in name else 0
        has, wanted = kv_heads(model.config, name), kv_heads(pooled.config, name)
        assert torch.equal(new[name][:start], x[:start]) and len(new[name]) == start + 2 * wanted * D
        for part in range(2):  # keys, values
            for head in range(wanted):
                group = range(head * (has // wanted), (head + 1) * (has // wanted))
                for d in range(D):
                    mean = sum(x[start + part * has * D + h * D + d] for h in group) / len(group)
                    assert (new[name][start + part * wanted * D + head * D + d] - mean).abs().max() <= 1e-12
                    seen += has > wanted
    assert seen or all(model.config.of(r).kv_width == pooled.config.of(r).kv_width for r in gqa.ROLES)


def logits(model):
    torch.manual_seed(5)
    with torch.no_grad():
        return model(*(torch.randint(17, (2, 9)) for _ in range(INPUTS[type(model)])))


@pytest.mark.parametrize("cls", FIELDS)
def test_as_many_heads_as_before_are_the_same_model(cls):
    model = build(cls)
    assert torch.equal(logits(convert(model, n_kv_head=6)), logits(model))


@pytest.mark.parametrize("cls", FIELDS)
@pytest.mark.parametrize("seed", range(4))
def test_by_their_span_products_lose_only_what_lies_outside_the_best_directions(cls, seed):
    """The oracle takes the directions from the eigenvectors of the heads' squares, not from singular vectors."""
    model, few = random_case(cls, seed)
    pooled, D, seen = convert(model, span, **few), 4, 0

    def heads(attention):  # queries, keys, values (n, D, C + 1), and outputs (n, C, D)
        parts = [attention.c_attn] if hasattr(attention, "c_attn") else [attention.c_q, attention.c_kv]
        rows = torch.cat([torch.cat([part.weight, part.bias[:, None]], 1) for part in parts]).unflatten(0, (-1, D))
        KV = attention.n_kv_head
        return *rows.split([6, KV, KV]), attention.c_proj.weight.unflatten(1, (-1, D)).transpose(0, 1)

    for name, module in model.named_modules():
        if not isinstance(module, Attention):
            continue
        after = pooled.get_submodule(name)
        (q, *kept, out), (new_q, *shared, new_out) = heads(module), heads(after)
        served, group = 6 // module.n_kv_head, module.n_kv_head // after.n_kv_head
        for x, new, asks, new_asks in ((kept[0], shared[0], q.mT, new_q.mT), (kept[1], shared[1], out, new_out)):
            for h in range(6):
                mates = x[h // served // group * group :][:group]
                best = torch.linalg.eigh(sum(m.T @ m for m in mates))[1][:, -D:]
                true = asks[h] @ x[h // served] @ best @ best.T if group > 1 else asks[h] @ x[h // served]
                assert (new_asks[h] @ new[h // served // group] - true).abs().max() < 1e-10
                seen += group > 1
    assert seen


@pytest.mark.parametrize("way", [mean, span])
@pytest.mark.parametrize("cls", FIELDS)
@pytest.mark.parametrize("groups", [1, 2, 3])
def test_heads_that_are_equal_within_their_groups_lose_nothing(cls, groups, way):
    """Neighbours are a group: were heads dealt out in turn, these logits would differ."""
    model = build(cls)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "c_attn" in name or "c_kv" in name:
                heads = p[-2 * 24 :].view(2, groups, 6 // groups, 4, *p.shape[1:])
                heads[:] = heads[:, :, :1].clone()
    before = logits(model)
    for name in FIELDS[cls]:
        assert (logits(convert(model, way, **{name: groups})) - before).abs().max() <= 1e-12
    other = convert(build(cls), way, n_kv_head=groups)
    assert other.count_parameters() < model.count_parameters() and not torch.equal(logits(other), before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("cls", FIELDS)
def test_a_pooled_model_is_saved_and_loaded_and_decodes_from_its_cache(cls, dtype, tmp_path):
    pooled = convert(build(cls).to(dtype), n_kv_head=2)
    save_pretrained(tmp_path, pooled)
    loaded, _ = load_pretrained(tmp_path)
    for role in gqa.ROLES:
        assert loaded.config.of(role).kv_width == pooled.config.of(role).kv_width == 2 * 4
    assert all(torch.equal(loaded.state_dict()[name], x) for name, x in pooled.state_dict().items())
    prompts = [[3, 4, 5], [6]]
    if dtype is torch.float64:
        assert generate(loaded, prompts, 5) == generate(pooled, prompts, 5, strategy="naive")


def test_what_cannot_be_pooled_is_refused_by_its_name():
    for cls, has, few, message in ((GPT, {}, {"n_kv_head": 4}, "n_kv_head=4"), (GPT, {}, {"n_kv_head": 0}, "n_kv_head=0"),
                                   (GPT, {"n_kv_head": 3}, {"n_kv_head": 2}, "2 .* from 3, .* decoder: .* divides 3"),
                                   (GPT, {"n_kv_head": 1}, {"n_kv_head": 6}, "6 .* from 1"),
                                   (GPT, {}, {"n_cross_kv_head": 1}, "n_cross_kv_head=1 is for a BART"),
                                   (GPT, {"pattern": "local:4+column:4"}, {"n_kv_head": 1}, "splits the heads"),
                                   (BART, {"n_cross_kv_head": 3}, {"n_cross_kv_head": 2}, "2 .* from 3, .* cross"),
                                   (BART, {"n_cross_kv_head": 2}, {"n_decoder_kv_head": 5}, "n_kv_head=5"),
                                   (BART, {"n_kv_head": 3, "n_decoder_kv_head": 6}, {"n_kv_head": 2}, "from 3, .* encoder")):
        with pytest.raises(UserError, match=message):
            convert(build(cls, **has), **few)


# -----------------------------------------------------------------------------
# The command, and what comes after it


@pytest.mark.parametrize("kind", ["gpt", "bart"])
def test_from_a_trained_model_to_a_shared_one_that_was_trained_further(kind, tiny_gpt, tiny_bart, tmp_path):
    tiny, few = {"gpt": (tiny_gpt, ["--n-kv-head", 1]), "bart": (tiny_bart, ["--by", "span", "--n-decoder-kv-head", 2, "--n-cross-kv-head", 1])}[kind]
    outcome = call(gqa.main, "--model", tiny.path, *few, "--output", tmp_path / "pooled")
    assert outcome.code == 0 and outcome.out.count("\n") == 1
    pooled, tokenizer = load_pretrained(tmp_path / "pooled")
    counts = {flag[2:].replace("-", "_"): n for flag, n in zip(few[::2], few[1::2]) if flag != "--by"}
    expected = convert(tiny.model, span if kind == "bart" else mean, **counts)
    for name, x in expected.state_dict().items():
        assert torch.equal(pooled.state_dict()[name], x)
    assert tokenizer.encode("abc") == tiny.tokenizer.encode("abc")
    settings = outcome.out.partition("takes ")[2].split()
    folder = tiny.path.parent
    outcome = call(train.main, folder / "config.toml", *settings, f"--train.out_dir={tmp_path / 'out'}", "--train.steps=12",
                   "--train.eval_every=6", "--train.log_every=1", "--train.lr=3e-3", "--train.warmup_steps=1")
    assert outcome.code == 0, outcome
    lines = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    losses, held_out = ([line[key] for line in lines if key in line] for key in ("loss", "val_loss"))
    values = configs.read(folder / "config.toml", [], ("model", "data", "train"))
    data, _ = load_data(DataConfig(**values["data"]), seq2seq=kind == "bart", tokenizer=tokenizer)
    first = data.batch_at(0, batch_size=values["train"]["batch_size"], block_size=pooled.config.block_size)
    total, count = train.loss_sum(pooled, *first)[0], (first[1] != IGNORE).sum()
    assert losses[0] == pytest.approx((total / count).item(), rel=1e-5) and held_out[1] < held_out[0] < losses[0]
    after, _ = load_pretrained(tmp_path / "out")
    assert after.config == pooled.config and not torch.equal(after.wte.weight, pooled.wte.weight)


@pytest.mark.parametrize("args, message", [
    (["--output", "{new}"], "nothing to pool: give --n-kv-head"),
    (["--n-kv-head", "1", "--output", "{old}"], "is there already: name another"),
    (["--n-kv-head", "3", "--output", "{new}"], "n_kv_head=3"),
    (["--n-kv-head", "0", "--output", "{new}"], "n_kv_head=0"),
    (["--n-kv-head", "two", "--output", "{new}"], "--n-kv-head: invalid whole number"),
    (["--n-cross-kv-head", "1", "--output", "{new}"], "for a BART"),
    (["--n-kv-head", "1"], "--output"),
    (["--n-kv-head", "1", "--output", "/proc/nowhere"], "cannot write /proc/nowhere"),
])
def test_bad_input_exits_2_with_one_line_and_writes_nothing(args, message, tiny_gpt, tmp_path):
    args = [arg.format(new=tmp_path / "new", old=tmp_path) for arg in args]
    outcome = call(gqa.main, "--model", tiny_gpt.path, *args)
    assert outcome.code == 2 and outcome.out == "" and outcome.err.count("\n") == 1 and message in outcome.err
    assert not any(tmp_path.iterdir())
