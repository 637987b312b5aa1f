"""Configuration, the sizes that it leads to, and the shape of the source itself."""

import ast
import json
import re
import tomllib
from dataclasses import asdict, dataclass, replace

import pytest
import torch
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

from model import BART, GPT
from plumbing import config as configs
from plumbing.data import DataConfig, load_data
from plumbing.errors import UserError
from plumbing.models import (MODELS, check_memory, count_parameters, model_class, preset_config, random_model,
                             read_model_config)
from train import TrainConfig

SECTIONS = ("model", "data", "train")
FILES = sorted(ROOT.glob("configs/*.toml"))


@dataclass(slots=True)
class Example:
    number: int = 3
    rate: float = 0.5
    name: str = "x"
    flag: bool = False
    maybe: int | None = None

    def validate(self):
        if self.number < 0:
            raise UserError(f"number={self.number}")


@pytest.fixture
def read(tmp_path):
    """A function: the values of this TOML text under these overrides."""
    def values(text="", *overrides):
        (tmp_path / "config.toml").write_text(text)
        return configs.read(tmp_path / "config.toml", overrides, SECTIONS)

    return values


# -----------------------------------------------------------------------------
# The files in configs/


def test_there_are_configurations_for_both_models():
    types = {model_class(configs.read(path, [], SECTIONS)["model"]) for path in FILES}
    assert types == {GPT, BART}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_toml_in_configs_loads_and_builds(path):
    values = configs.read(path, [], SECTIONS)
    configs.build(DataConfig, values["data"], "data")
    train = configs.build(TrainConfig, values["train"], "train")
    config = read_model_config(values["model"])
    assert count_parameters(config) > 0
    assert train.out_dir == f"out/{path.stem}", "two configurations must not share a directory"
    assert not train.resume


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_value_in_configs_has_its_reason_beside_it(path):
    for line in path.read_text().splitlines():
        if re.match(r"\s*\w+\s*=", line) and not re.match("type|out_dir", line):  # names, not values
            assert len(line.partition("#")[2].strip()) >= 5, line


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_number_of_parameters_that_a_file_names_is_right(path):
    values = configs.read(path, [], SECTIONS)
    if values["data"]["source"] == "shakespeare":  # behind the network
        values["model"] = {"vocab_size": 65} | values["model"]
        config = read_model_config(values["model"])
    else:
        tokenizer = load_data(configs.build(DataConfig, values["data"], "data"), seq2seq=model_class(values["model"]) is BART)[1]
        config = read_model_config(values["model"], tokenizer)
    named = re.findall(r"([\d.]+) ?M\b", path.read_text())
    assert named and all(f"{count_parameters(config) / 1e6:.{len(n.partition('.')[2])}f}" == n for n in named)


# -----------------------------------------------------------------------------
# Reading


def test_overrides_win_over_the_file_and_the_file_over_the_defaults(read):
    values = read("[train]\nsteps = 5\nlr = 0.1\n", "--train.steps=7", "--data.source=my notes.txt")
    assert values == {"model": {}, "data": {"source": "my notes.txt"}, "train": {"steps": 7, "lr": 0.1}}
    config = configs.build(TrainConfig, values["train"], "train")
    assert (config.steps, config.lr, config.warmup_steps) == (7, 0.1, TrainConfig().warmup_steps)


@pytest.mark.parametrize("text, value", [
    ("3", 3), ("3e-4", 3e-4), ("true", True), ("text", "text"), ('"3"', "3"), ("", ""), ("a=b", "a=b"), ("[1, 2]", [1, 2]),
    ("out/run-1", "out/run-1"), ("日本", "日本"), ("'", "'"), ("1_000", 1000)])
def test_a_value_of_an_override_is_toml_or_else_text(read, text, value):
    assert read("", f"--train.x={text}")["train"] == {"x": value}


def test_hyphens_do_as_well_as_underscores(read):
    assert read("", "--train.batch-size=3")["train"] == {"batch_size": 3}


def test_whole_numbers_serve_as_floats_and_nothing_else_changes_its_type():
    config = configs.build(Example, {"rate": 2, "maybe": 4}, "s")
    assert (config.rate, type(config.rate), config.maybe) == (2.0, float, 4)
    for key, value in (("number", 1.0), ("number", True), ("rate", True), ("rate", "1"), ("name", 1), ("flag", 1), ("maybe", "4")):
        with pytest.raises(UserError, match=f"s.{key} is {value!r}"):
            configs.build(Example, {key: value}, "s")
    for number in (2**63, -2**63, float("nan"), float("-inf")):
        with pytest.raises(UserError, match=r"s.rate=.* below 2\*\*63"):
            configs.build(Example, {"rate": number}, "s")


def test_what_is_built_is_validated():
    with pytest.raises(UserError, match="number=-1"):
        configs.build(Example, {"number": -1}, "s")


@pytest.mark.parametrize("wrong, right", [("batchsize", "batch_size"), ("weightdecay", "weight_decay"), ("Steps", "steps"), ("sead", "seed")])
def test_an_unknown_key_is_an_error_that_names_the_nearest(wrong, right):
    with pytest.raises(UserError, match=f"{wrong}.*did you mean '{right}'"):
        configs.build(TrainConfig, {wrong: 1}, "train")


def test_an_unknown_section_is_an_error_that_names_the_nearest(read):
    with pytest.raises(UserError, match="'trian': did you mean 'train'"):
        read("[trian]\nsteps = 1")
    with pytest.raises(UserError, match="'modle': did you mean 'model'"):
        read("", "--modle.n_layer=1")


def test_a_file_may_change_any_setting_and_help_lists_each_as_toml(read):
    every = {"model": GPT.get_default_config(), "data": DataConfig(), "train": TrainConfig()}
    lines = configs.describe(**every).splitlines()
    assert len(lines) == sum(len(asdict(config)) for config in every.values())
    values = read("", *(line for line in lines if "not set" not in line))
    for section, config in every.items():
        assert values[section] == {key: value for key, value in asdict(config).items() if value is not None}
        assert configs.build(type(config), values[section], section) == config


# -----------------------------------------------------------------------------
# Sizes


PUBLISHED = {"gpt2": 124_439_808, "gpt2-medium": 354_823_168, "gpt2-large": 774_030_080, "gpt2-xl": 1_557_611_200,
             "bart-base": 139_420_416, "bart-large": 406_291_456}


@pytest.mark.parametrize("name", PUBLISHED)
def test_presets_have_the_published_sizes(name):
    """BART's: our position tables lack the two rows nobody looks up, our head has final_logits_bias as a parameter."""
    cls = GPT if name.startswith("gpt") else BART
    config = preset_config(name)
    with torch.device("meta"):
        assert cls(config).count_parameters() == count_parameters(config)
    differ = 0 if cls is GPT else config.vocab_size - 2 * 2 * config.n_embd
    assert count_parameters(config) == PUBLISHED[name] + differ


def test_the_published_sizes_are_those_of_transformers():
    from transformers import BartConfig, BartForConditionalGeneration, GPT2Config, GPT2LMHeadModel
    with torch.device("meta"):
        gpt2 = GPT2LMHeadModel(GPT2Config())
        large = BartForConditionalGeneration(BartConfig())  # the defaults are bart-large's
        base = BartForConditionalGeneration(BartConfig(
            d_model=768, encoder_layers=6, decoder_layers=6, encoder_attention_heads=12, decoder_attention_heads=12,
            encoder_ffn_dim=3072, decoder_ffn_dim=3072))
    for name, model in {"gpt2": gpt2, "bart-large": large, "bart-base": base}.items():
        assert sum(p.numel() for p in model.parameters()) == PUBLISHED[name]


@settings(max_examples=40, deadline=None, derandomize=True)
@given(cls=st.sampled_from([GPT, BART]), kv=st.sampled_from([None, 1, 2, 4]), inner=st.sampled_from([None, 5]),
       layers=st.integers(1, 3), more=st.integers(1, 3), V=st.integers(3, 9), P=st.integers(1, 9), tie=st.booleans(),
       listed=st.booleans())
def test_parameters_are_counted_without_building_the_model(cls, kv, inner, layers, more, V, P, tie, listed):
    depth = dict(n_layer=layers) if cls is GPT else dict(n_encoder_layer=layers, n_decoder_layer=more)
    config = replace(cls.get_default_config(), n_head=4, n_embd=8, n_kv_head=kv, n_inner=inner, vocab_size=V, block_size=P,
                     tie_weights=tie, pattern=["local:1"] * list(depth.values())[-1] if listed else "full", **depth)
    with torch.device("meta"):
        assert cls(config).count_parameters() == count_parameters(config)


def test_a_model_that_does_not_fit_is_refused_before_anything_is_allocated():
    config = replace(GPT.get_default_config(), n_embd=2**20, n_head=1, n_layer=1000)
    with pytest.raises(UserError, match="GiB"):
        check_memory("this", config, 4, "cpu")
    check_memory("this", replace(config, n_embd=8, n_layer=1), 4, "cpu")


def test_random_models_come_from_presets_and_files_with_any_of_their_values(tmp_path):
    (tmp_path / "own.toml").write_text("[model]\ntype = 'bart'\nn_encoder_layer = 1\nn_decoder_layer = 2\nn_embd = 8\n"
                                       "n_head = 2\nvocab_size = 9\n[train]\nsteps = 1")
    model = random_model(str(tmp_path / "own.toml"), torch.bfloat16, "cpu")
    assert isinstance(model, BART) and model.wte.weight.dtype == torch.bfloat16 and not model.training
    config = read_model_config({"preset": "gpt2-xl", "n_layer": 2})
    assert (config.n_layer, config.n_embd, config.eos_id) == (2, 1600, 50256)
    assert set(MODELS) == {"gpt", "bart"}


# -----------------------------------------------------------------------------
# The source

# What stands higher may import what stands lower, never its equal.
LEVEL = {"cache": 0, "sampling": 0, "attention": 1, "evict": 2, "sparse": 3, "model": 4, "cost": 5, "generate": 6, "train": 7,
         "compare": 7, "roofline": 7, "bench": 8, "further": 9}
LESSON = sorted(ROOT.glob("*.py"))
FURTHER = sorted(ROOT.glob("further/*.py"))
PLUMBING = sorted(ROOT.glob("plumbing/*.py"))
SOURCE = LESSON + FURTHER + PLUMBING
KNOWS = {"models": {"model"}, "weights": {"model"}, "patterns": {"attention", "sparse"},
         "attention_bench": {"attention", "cache", "model", "sparse"}, "checks": {"cost"},  # who builds, of plumbing/
         "cli": {"sampling"}, "pairs": {"further", "generate"}, "engines": {"generate"}, "speed": {"cost", "generate", "roofline"},
         "meters": {"cost", "roofline"}, "train_bench": {"roofline", "train"}, "precision_bench": {"further", "train"}}


def nodes(path, *kinds):
    return [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, kinds)]


def imports(path):
    """The first names of all modules that a file imports, wherever in it."""
    names = [alias.name for node in nodes(path, ast.Import) for alias in node.names]
    names += [node.module for node in nodes(path, ast.ImportFrom) if node.level == 0]
    assert not any(node.level for node in nodes(path, ast.ImportFrom)), f"{path.name} has a relative import"
    return {name.split(".")[0] for name in names}


def test_every_lesson_file_has_its_place():
    assert {path.stem for path in LESSON} <= LEVEL.keys()


@pytest.mark.parametrize("path", LESSON + FURTHER, ids=lambda path: path.name)
def test_imports_point_down(path):
    own = "further" if path in FURTHER else path.stem
    for name in imports(path) & LEVEL.keys():
        assert LEVEL[name] < LEVEL[own] or name == own == "further", f"{path.name} imports {name}"


@pytest.mark.parametrize("path", PLUMBING, ids=lambda path: path.name)
def test_plumbing_does_not_know_the_lesson(path):
    assert imports(path) & LEVEL.keys() <= KNOWS.get(path.stem, set())


@pytest.mark.parametrize("path", SOURCE, ids=lambda path: path.name)
def test_nothing_is_left_undone_unpickled_or_evaluated(path):
    text = path.read_text()
    assert not re.search(r"\b(TODO|FIXME|XXX|HACK)\b", text)
    assert not imports(path) & {"pickle", "cPickle", "dill", "joblib", "marshal", "shelve", "torchvision"}
    for call in nodes(path, ast.Call):
        assert ast.unparse(call.func) not in ("eval", "exec", "compile", "__import__", "torch.load", "os.system"), ast.unparse(call)
    assert not any(ast.unparse(key.value) not in ("False",) for key in nodes(path, ast.keyword) if key.arg in ("shell", "allow_pickle"))


def test_a_default_is_written_once():
    """No argument of the command line repeats a number of the dataclass that it feeds, and no file a default of TOML."""
    from sampling import Choice
    from plumbing import cli
    args = cli.parse("", ["--model", "x", "--prompt", "y"])
    for name, value in asdict(Choice()).items():
        assert getattr(args, name, None) in (None, value)
    for path in FILES:
        assert "resume" not in tomllib.loads(path.read_text()).get("train", {})
    assert json.dumps(asdict(TrainConfig()))  # plain values only: they are saved with every checkpoint
