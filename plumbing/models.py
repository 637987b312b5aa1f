"""Building a model from settings: the [model] table of a configuration file, or the name of a published size."""

import os
from collections import Counter
from dataclasses import asdict, replace

import torch

from model import BART, GPT
from plumbing import config as configs
from plumbing.errors import UserError
from plumbing.weights import Uninitialised

MODELS = {"gpt": GPT, "bart": BART}
PRESETS = {  # published sizes
    "gpt2":        ("gpt", dict(n_layer=12, n_head=12, n_embd=768, eos_id=50256)),              # 124M
    "gpt2-medium": ("gpt", dict(n_layer=24, n_head=16, n_embd=1024, eos_id=50256)),             # 355M
    "gpt2-large":  ("gpt", dict(n_layer=36, n_head=20, n_embd=1280, eos_id=50256)),             # 774M
    "gpt2-xl":     ("gpt", dict(n_layer=48, n_head=25, n_embd=1600, eos_id=50256)),             # 1558M
    "bart-base":   ("bart", dict(n_encoder_layer=6, n_decoder_layer=6, n_head=12, n_embd=768)),    # 139M
    "bart-large":  ("bart", dict(n_encoder_layer=12, n_decoder_layer=12, n_head=16, n_embd=1024)),  # 406M
}


def model_class(values):
    """GPT or BART, as the key `type` of a [model] table says; gpt if it says nothing."""
    name = values.get("type", "gpt")
    if name not in list(MODELS):  # a list asks for equality only: a name from a file may be anything
        raise UserError(f"model.type={name!r:.60} is not one of {', '.join(MODELS)}")
    return MODELS[name]


def preset_config(name, cls=None):
    """The configuration of a published size, of one of the models or of either. Raises UserError on another name."""
    names = [preset for preset, (kind, _) in PRESETS.items() if cls in (None, MODELS[kind])]
    if name not in names:
        raise UserError(f"there is no preset {name!r:.60}: choose one of {', '.join(names)}")
    kind, sizes = PRESETS[name]
    return MODELS[kind].config_class(**sizes)


def read_model_config(values, tokenizer=None):
    """
    The configuration that a [model] table describes: fields of GPTConfig or BARTConfig, and `preset` to start from a
    published size. With a tokenizer, the vocabulary and the special ids are its own.
    """
    cls = model_class(values)
    preset = values.get("preset")
    defaults = asdict(preset_config(preset, cls) if preset else cls.get_default_config())
    if tokenizer is not None:
        ids = {"bos_id": tokenizer.bos_id, "pad_id": tokenizer.pad_id, "eos_id": tokenizer.eos_id,
               "start_id": tokenizer.eos_id, "vocab_size": tokenizer.n_vocab}
        defaults |= {key: value for key, value in ids.items() if key in defaults}
    values = {key: value for key, value in values.items() if key not in ("type", "preset")}
    config = configs.build(cls.config_class, values, "model", **defaults)
    if tokenizer is not None and config.vocab_size < tokenizer.n_vocab:
        raise UserError(f"model.vocab_size={config.vocab_size} is less than the tokenizer's "
                        f"{tokenizer.n_vocab}: leave it out")
    return config


def random_config(name, overrides=()):
    """
    The class and the configuration of an untrained model: name is a preset ("bart-large") or a configuration file with
    a [model] table, of which overrides, --model.key=value, change something.
    """
    if name in PRESETS:
        values = {"model": {"type": PRESETS[name][0], "preset": name}}
    elif os.path.exists(name):
        values = configs.read(name, [], ("model", "data", "train"))
    else:
        raise UserError(f"{name!r} is neither a configuration file nor one of {', '.join(PRESETS)}")
    configs.override_all(values, overrides, ("model",))
    return model_class(values["model"]), read_model_config(values["model"])


def random_model(name, dtype, device, overrides=()):
    """
    An untrained model of any size, in eval mode. Raises UserError, before anything is allocated, if its weights do not
    fit the memory.

    With the weights that training starts from, a post-norm model with tied embeddings repeats one token for ever, and
    many a bug would go unseen. These let texts vary, whatever the width and the depth: attention is choosy, so what is
    written depends on what was read, and what a stack's sublayers add together does not grow with their number.
    """
    cls, config = random_config(name, overrides)
    check_memory(f"{name} in {dtype}", config, dtype.itemsize, device)
    with torch.device(device):
        model = cls(config)
        matrices = {key: p for key, p in model.named_parameters() if p.dim() == 2}
        sublayers = Counter(key.split(".")[0] for key in matrices if key.endswith("c_proj.weight"))  # stack -> how many
        for key, p in matrices.items():
            torch.nn.init.normal_(p, std=p.size(1) ** -0.5)  # of what it sums up: the scale of what it is given is kept
            if "wpe" in key:
                p.data *= 3  # a token says less than its position: at the end it would be found again, and repeated
            if key.endswith(("attn.c_attn.weight", "cross.c_q.weight")):
                p.data[: config.n_embd] *= 7  # the queries: scores far apart
            if key.endswith("c_proj.weight"):  # GPT-2's scale, which keeps an encoder's positions apart; a decoder adds
                stack = key.split(".")[0]      # more, and forgets its token besides
                p.data *= ((1 if stack == "encoder" else 8) / sublayers[stack]) ** 0.5
    return model.to(dtype).eval()


def count_parameters(config):
    """
    How many numbers a model of this configuration holds, tied ones once. Small ones are built for it, without memory,
    and their layers multiplied: so it stays right for a model that somebody changes. (Patterns hold none, and may be as
    many as layers.) Raises UserError if the sizes are beyond what a tensor can have.
    """
    cls = next(cls for cls in MODELS.values() if isinstance(config, cls.config_class))
    depths = [name for name in ("n_layer", "n_encoder_layer", "n_decoder_layer") if hasattr(config, name)]

    def size(**layers):
        with torch.device("meta"), Uninitialised():
            return cls(replace(config, pattern="full", **dict.fromkeys(depths, 1) | layers)).count_parameters()

    try:
        base = size()
        return base + sum((getattr(config, name) - 1) * (size(**{name: 2}) - base) for name in depths)
    except (RuntimeError, OverflowError):  # so many numbers that their number is none
        raise UserError(f"n_embd={config.n_embd}, vocab_size={config.vocab_size} and block_size={config.block_size} "
                        f"make matrices larger than any memory: choose smaller ones") from None


def check_memory(what, config, bytes_each, device):
    """Raise UserError if a model's parameters, at so many bytes each, do not fit the memory that is free."""
    need, have = count_parameters(config) * bytes_each, free_memory(device)
    if need > have:
        raise UserError(f"{what} needs {need / 2**30:,.1f} GiB and {have / 2**30:,.1f} GiB are free on {device}: "
                        f"choose a smaller model")


def free_memory(device):
    """Bytes that can still be allocated on a device."""
    if device.startswith("cuda"):
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable"))
    except OSError:  # not Linux: all there is, in place of what is free
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
