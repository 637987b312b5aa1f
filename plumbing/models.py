"""Building a model from settings: the [model] table of a configuration file, or the name of a published size."""

import os
from dataclasses import asdict

import torch

from model import BART, GPT
from plumbing import config as configs
from plumbing.errors import UserError

MODELS = {"gpt": GPT, "bart": BART}


def model_class(values):
    """GPT or BART, as the key `type` of a [model] table says; gpt if it says nothing."""
    name = values.get("type", "gpt")
    if name not in list(MODELS):  # a list asks for equality only: a name from a file may be anything
        raise UserError(f"model.type={name!r:.60} is not one of {', '.join(MODELS)}")
    return MODELS[name]


def read_model_config(values, tokenizer=None):
    """
    The configuration that a [model] table describes: fields of GPTConfig or BARTConfig, and `preset` to start from a
    published size. With a tokenizer, the vocabulary and the special ids are its own.
    """
    cls = model_class(values)
    preset = values.get("preset")
    defaults = asdict(cls.get_preset_config(str(preset)) if preset else cls.get_default_config())
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


def random_model(name, dtype, device):
    """
    An untrained model of any size, in eval mode: name is a preset ("bart-large") or a configuration file with a
    [model] table. Raises UserError, before anything is allocated, if its weights do not fit the memory.
    """
    presets = {preset: {"type": kind, "preset": preset} for kind, cls in MODELS.items() for preset in cls.presets}
    values = presets.get(name)
    if values is None:
        if not os.path.exists(name):
            raise UserError(f"{name!r} is neither a configuration file nor one of {', '.join(presets)}")
        values = configs.read(name, [], ("model", "data", "train"))["model"]
    config = read_model_config(values)
    check_memory(f"{name} in {dtype}", config, dtype.itemsize, device)
    with torch.device(device):
        model = model_class(values)(config)
    return model.to(dtype).eval()


def count_parameters(config):
    """How many numbers a model of this configuration holds, tied ones once, without building it."""
    C, V, P = config.n_embd, config.vocab_size, config.block_size
    kv, inner = C // config.n_head * (config.n_kv_head or config.n_head), config.n_inner or 4 * C
    attention = C * C + C + (C + 1) * (C + 2 * kv)
    layer = attention + (C + 1) * inner + (inner + 1) * C + 4 * C  # an attention, a feed-forward layer, two norms
    if hasattr(config, "n_layer"):
        return V * C * (1 if config.tie_weights else 2) + P * C + config.n_layer * layer + 2 * C
    layers = config.n_encoder_layer * layer + config.n_decoder_layer * (layer + attention + 2 * C)
    return V * C * (1 if config.tie_weights else 3) + V + 2 * (P * C + 2 * C) + layers


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
