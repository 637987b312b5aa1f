"""
Models in and out of Hugging Face directories: config.json, model.safetensors and the tokenizer's files.

There is one format. GPT-2 and BART are written in their published names and layouts, so that other tools open them as
they are; everything in which those differ from model.py is in the tables below and nowhere else. A model that they
cannot express, because somebody has changed it, gets a model_type of our own. Files are strangers': headers are read
and compared with config.json before anything is allocated, and nothing is ever unpickled.
"""

import os
import re
import sys
from collections import namedtuple
from dataclasses import fields
from importlib import import_module
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from model import BART, GPT
from plumbing import config as configs
from plumbing.errors import UserError
from plumbing.files import read_json, write_json
from plumbing.manifests import MANIFEST, newest, verify
from plumbing.tensors import DTYPES, FLOATS, read_header, read_tensor, side_by_side
from plumbing.tokenizers import load_tokenizer

# -----------------------------------------------------------------------------
# The tables: ours -> theirs. A line without .weight or .bias stands for both, * for a layer's number, and {q,k,v} for
# several tensors that are one of ours, stacked. Each line says how a tensor gets from their layout to ours and back,
# and the shape of ours (a bias has the first of its numbers): V ids, P positions, C and I the model's and the inner
# width, KV keys and values, QKV the queries as well.

How = namedtuple("How", "load save")
SAME = How(lambda x: x, lambda x: x)
TRANSPOSED = How(lambda x: x.t(), lambda x: x.t())  # GPT-2 stores matrices as (in, out); a bias is its own transpose
SHIFTED = How(lambda x: x[2:], lambda x: F.pad(x, (0, 0, 2, 0)))  # two rows in front that nobody looks up
ROW = How(lambda x: x[0], lambda x: x[None])  # (1, V) there, (V,) here

GPT_TABLE = {
    "wte.weight":             ("transformer.wte.weight", SAME, "V C"),
    "wpe.weight":             ("transformer.wpe.weight", SAME, "P C"),
    "h.*.ln_1":               ("transformer.h.*.ln_1", SAME, "C"),
    "h.*.attn.c_attn":        ("transformer.h.*.attn.c_attn", TRANSPOSED, "QKV C"),
    "h.*.attn.c_proj":        ("transformer.h.*.attn.c_proj", TRANSPOSED, "C C"),
    "h.*.ln_2":               ("transformer.h.*.ln_2", SAME, "C"),
    "h.*.mlp.c_fc":           ("transformer.h.*.mlp.c_fc", TRANSPOSED, "I C"),
    "h.*.mlp.c_proj":         ("transformer.h.*.mlp.c_proj", TRANSPOSED, "C I"),
    "ln_f":                   ("transformer.ln_f", SAME, "C"),
    "lm_head.weight":         ("lm_head.weight", SAME, "V C"),
}
BART_TABLE = {
    "wte.weight":             ("model.decoder.embed_tokens.weight", SAME, "V C"),
    "encoder_wte.weight":     ("model.encoder.embed_tokens.weight", SAME, "V C"),
    "encoder_wpe.weight":     ("model.encoder.embed_positions.weight", SHIFTED, "P C"),
    "encoder_ln":             ("model.encoder.layernorm_embedding", SAME, "C"),
    "encoder.*.attn.c_attn":  ("model.encoder.layers.*.self_attn.{q,k,v}_proj", SAME, "QKV C"),
    "encoder.*.attn.c_proj":  ("model.encoder.layers.*.self_attn.out_proj", SAME, "C C"),
    "encoder.*.ln_1":         ("model.encoder.layers.*.self_attn_layer_norm", SAME, "C"),
    "encoder.*.mlp.c_fc":     ("model.encoder.layers.*.fc1", SAME, "I C"),
    "encoder.*.mlp.c_proj":   ("model.encoder.layers.*.fc2", SAME, "C I"),
    "encoder.*.ln_2":         ("model.encoder.layers.*.final_layer_norm", SAME, "C"),
    "decoder_wpe.weight":     ("model.decoder.embed_positions.weight", SHIFTED, "P C"),
    "decoder_ln":             ("model.decoder.layernorm_embedding", SAME, "C"),
    "decoder.*.attn.c_attn":  ("model.decoder.layers.*.self_attn.{q,k,v}_proj", SAME, "QKV C"),
    "decoder.*.attn.c_proj":  ("model.decoder.layers.*.self_attn.out_proj", SAME, "C C"),
    "decoder.*.ln_1":         ("model.decoder.layers.*.self_attn_layer_norm", SAME, "C"),
    "decoder.*.cross.c_q":    ("model.decoder.layers.*.encoder_attn.q_proj", SAME, "C C"),
    "decoder.*.cross.c_kv":   ("model.decoder.layers.*.encoder_attn.{k,v}_proj", SAME, "KV C"),
    "decoder.*.cross.c_proj": ("model.decoder.layers.*.encoder_attn.out_proj", SAME, "C C"),
    "decoder.*.ln_cross":     ("model.decoder.layers.*.encoder_attn_layer_norm", SAME, "C"),
    "decoder.*.mlp.c_fc":     ("model.decoder.layers.*.fc1", SAME, "I C"),
    "decoder.*.mlp.c_proj":   ("model.decoder.layers.*.fc2", SAME, "C I"),
    "decoder.*.ln_2":         ("model.decoder.layers.*.final_layer_norm", SAME, "C"),
    "lm_head.weight":         ("lm_head.weight", SAME, "V C"),
    "lm_head.bias":           ("final_logits_bias", ROW, "V"),
}
TIED = ["encoder_wte.weight", "lm_head.weight"]  # where the config ties, these are wte.weight, stored as `shared`
DEPTH = {"h": "n_layer", "encoder": "n_encoder_layer", "decoder": "n_decoder_layer"}  # how many layers a * counts

# config.json: our field -> what Hugging Face assumes where the file says nothing (for None, where the field cannot be
# None, it must say something), and their names, which must all say the same. `fixed` is what the architecture is, the
# first value being the one we write.
GPT_FIELDS = {
    "n_layer": (None, "n_layer"), "n_head": (None, "n_head"), "n_kv_head": (None, "n_kv_head"),
    "pattern": ("full", "pattern"),
    "n_embd": (None, "n_embd"), "n_inner": (None, "n_inner"), "vocab_size": (None, "vocab_size"),
    "block_size": (None, "n_positions"), "embd_pdrop": (0.1, "embd_pdrop"), "attn_pdrop": (0.1, "attn_pdrop"),
    "resid_pdrop": (0.1, "resid_pdrop"), "layer_norm_eps": (1e-5, "layer_norm_epsilon"),
    "tie_weights": (True, "tie_word_embeddings"), "eos_id": (50256, "eos_token_id"),
}
GPT_FIXED = dict(activation_function=("gelu_new", "gelu_pytorch_tanh"), scale_attn_weights=(True,),
                 scale_attn_by_inverse_layer_idx=(False,), reorder_and_upcast_attn=(False,),
                 add_cross_attention=(False,))
BART_FIELDS = {
    "n_encoder_layer": (None, "encoder_layers"), "n_decoder_layer": (None, "decoder_layers"),
    "n_head": (None, "encoder_attention_heads", "decoder_attention_heads"), "n_kv_head": (None, "n_kv_head"),
    "pattern": ("full", "pattern"),
    "n_decoder_kv_head": (None, "n_decoder_kv_head"), "n_cross_kv_head": (None, "n_cross_kv_head"),
    "n_embd": (None, "d_model"), "n_inner": (None, "encoder_ffn_dim", "decoder_ffn_dim"),
    "vocab_size": (None, "vocab_size"), "block_size": (None, "max_position_embeddings"),
    "embd_pdrop": (None, "embd_pdrop"), "attn_pdrop": (0.0, "attention_dropout"), "resid_pdrop": (0.1, "dropout"),
    "layer_norm_eps": (1e-5, "layer_norm_epsilon"), "scale_embedding": (False, "scale_embedding"),
    "tie_weights": (True, "tie_word_embeddings"), "bos_id": (0, "bos_token_id"), "pad_id": (1, "pad_token_id"),
    "eos_id": (2, "eos_token_id"), "start_id": (2, "decoder_start_token_id"),
}
BART_FIXED = dict(activation_function=("gelu",), normalize_before=(False,), add_final_layer_norm=(False,),
                  normalize_embedding=(True,), is_encoder_decoder=(True,))

# What makes a model our own type: a field of its configuration that is not among these, or has not the value that it
# `always` has in theirs; an activation, or a pattern of attention, that prints itself in another way; being a subclass;
# a tensor that the table has not, or has in another shape, and one that it has and the model has not.
PATTERNS = ("Causal(", "Everything(")
NEUTRAL = {"max_batch_size"}  # fields of how we decode, not of what the model is: never in a file

# `prefix` is what their keys start with, unless they were saved from the model without its head; `shared` is the name
# of an embedding that is tied. Untied, BART's is still expected in a file, though nobody looks anything up in it.
Format = namedtuple("Format", "model their_type our_type architecture table prefix shared fields fixed always "
                              "activation")
FORMATS = [
    Format(GPT, "gpt2", "mindecode-gpt", "GPT2LMHeadModel", GPT_TABLE, "transformer.", "transformer.wte.weight",
           GPT_FIELDS, GPT_FIXED, {}, "GELU(approximate='tanh')"),
    Format(BART, "bart", "mindecode-bart", "BartForConditionalGeneration", BART_TABLE, "model.", "model.shared.weight",
           BART_FIELDS, BART_FIXED, {"layer_norm_eps": 1e-5, "n_decoder_kv_head": None, "n_cross_kv_head": None},
           "GELU(approximate='none')"),
]

MAX_SIZE = 2**28  # of any number in a config: beyond every model, and products of three of them still fit 64 bits
OPTIONAL = "final_logits_bias"  # models saved without their head lack it
MASK = re.compile(r"\.attn\.(bias|masked_bias)$")  # old GPT-2 files hold causal masks, not to be taken for c_attn.bias
WRITTEN = {"model_type", "architectures", "dtype", "comment", "n_ctx", "bos_token_id", "pad_token_id",
           "forced_eos_token_id", "quantization"}  # what we write into a config.json besides fields


def published(fmt, config):
    """The table for a config, layer by layer: our name -> (their names, How, the shape of ours)."""
    C, lines = config.n_embd, {}
    sizes = {"V": config.vocab_size, "P": config.block_size, "C": C, "I": config.inner}
    for ours, (theirs, how, letters) in fmt.table.items():
        if config.tie_weights:
            if ours in TIED:
                continue
            theirs = fmt.shared if ours == "wte.weight" else theirs
        kv = 2 * config.of(next((role for role in ("encoder", "cross") if role in ours), "decoder")).kv_width
        shape = tuple((sizes | {"KV": kv, "QKV": C + kv})[letter] for letter in letters.split())
        for layer in range(getattr(config, DEPTH[ours.split(".")[0]])) if "*" in ours else [0]:
            for end in [""] if ours.endswith((".weight", ".bias")) else [".weight", ".bias"]:
                left, parts, right = re.fullmatch(r"([^{]*)(?:\{(.*)\})?(.*)", theirs.replace("*", str(layer))).groups()
                names = [left + part + right + end for part in (parts or "").split(",")]
                lines[ours.replace("*", str(layer)) + end] = names, how, shape[:1] if end == ".bias" else shape
    return lines


def entries(fmt, model):
    """
    How each tensor of a model is stored: (our names, several if it is tied; the tensor; their names; How). What has no
    line in the table, or another shape than there, is stored as it is under our name.
    """
    lines, found = published(fmt, model.config), {}
    for name, x in model.state_dict(keep_vars=True).items():
        found.setdefault(x, []).append(name)
    for x, ours in found.items():
        ours.sort(key=lambda name: name not in lines)  # of tied ones, the one that has a line speaks for all
        theirs, how, shape = lines.get(ours[0], (None, None, None))
        yield (ours, x, theirs, how) if x.shape == shape else (ours, x, ours[:1], SAME)


def export(fmt, model):
    """The tensors under their names and in their layouts; on the meta device, the shapes that a file must have."""
    C, tensors = model.config.n_embd, {}
    for _, x, theirs, how in entries(fmt, model):
        x = how.save(x.detach())
        n = len(theirs)
        kv = (x.size(0) - C * (n - 2)) // 2 if n > 1 else 0  # all of q, k, v, or of k, v
        parts = x.split([C, kv, kv][-n:]) if kv else [x]
        tensors.update(zip(theirs, parts))
    return tensors


def differences(fmt, model):
    """What a model is or has that theirs is not or has not, as phrases: with any of them it is of our own type."""
    config, lines = model.config, published(fmt, model.config)
    found = [] if type(model) is fmt.model else [f"class {type(model).__name__}"]
    always = {"n_kv_head": config.n_kv_head and config.n_head, "pattern": "full"} | fmt.always  # None, too, is n_head
    changed = [name for name, value in always.items() if getattr(config, name) != value]
    found += [f"{name}={getattr(config, name)}" for name in changed + own_fields(fmt, config)]
    parts = {"act": fmt.activation, "pattern": PATTERNS}
    found += [f"{name}={part}" for name, part in model.named_modules()
              if not str(part).startswith(parts.get(name.rpartition(".")[2], ""))]
    shapes = {ours[0]: tuple(x.shape) for ours, x, *_ in entries(fmt, model)}
    found += [f"{name} {shape}" for name, shape in shapes.items() if name not in lines or shape != lines[name][2]]
    found += [f"no {name}" for name in lines if name not in shapes]
    return found + [f"buffer {name}" for name, _ in model.named_buffers()]


# -----------------------------------------------------------------------------
# Configurations


def read_config(directory):
    """
    A Format, whether the model is of our own type, and a validated configuration from config.json. The Format's model
    is the class that was saved. Raises UserError on what our models are not.
    """
    path = directory / "config.json"
    raw = read_json(path)
    fmt = next((f for f in FORMATS if raw.get("model_type") in (f.their_type, f.our_type)), None)
    if fmt is None:
        known = ", ".join(f"{f.their_type}, {f.our_type}" for f in FORMATS)
        raise UserError(f"{path}: model_type is {raw.get('model_type')!a:.60}, and it must be one of {known}")
    for name, values in fmt.fixed.items():
        if raw.get(name, values[0]) not in values:
            raise UserError(f"{path}: {name}={raw[name]!a:.60} is not supported, only {' or '.join(map(str, values))}")
    own = raw["model_type"] == fmt.our_type
    try:
        fmt = fmt._replace(model=saved_class(fmt, raw)) if own else fmt
        config = fmt.model.get_default_config()
        read_fields(fmt, raw, own, config)
        config.validate()
        make = made(fmt.model, raw.get("quantization")) if own else fmt.model
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    return fmt._replace(model=make), own, config


def made(cls, quantization):
    """What makes a model of a class, given its configuration, with its linears as a config.json says."""
    if quantization is None:
        return cls
    if quantization != "int8":
        raise UserError(f"quantization is {quantization!a:.60}, and only \"int8\" is known here")
    quantize = import_module("further.quantize").quantize  # here: a model may be made where tensors are born empty
    return lambda config: quantize(cls(config))


def saved_class(fmt, raw):
    """Our class, or the subclass of it, that a model of our own type was saved from."""
    def family(cls):
        return [cls, *(below for child in cls.__subclasses__() for below in family(child))]

    # the first of a name: torch.export leaves subclasses behind that are called as what they stood for
    classes = {f"MinDecode{cls.__name__}": cls for cls in reversed(family(fmt.model))}
    names = raw.get("architectures", [f"MinDecode{fmt.model.__name__}"])
    if names not in [[name] for name in classes]:
        raise UserError(f"architectures is {names!a:.60}, which is not defined here; import the file that does it")
    return classes[names[0]]


def own_fields(fmt, config):
    """The fields that only our own type can have in a file."""
    return [field.name for field in fields(config) if field.name not in fmt.fields.keys() | NEUTRAL]


def read_fields(fmt, raw, own, config):
    """Set what a config.json tells or, saying nothing, means. Raises UserError on a key of ours that we do not know."""
    raw = {"embd_pdrop": raw.get("dropout", 0.1)} | raw  # BART has one number for both
    for name, (silent, *theirs) in fmt.fields.items():
        set_field(config, name, {key: silent if raw.get(key) is None else raw[key] for key in theirs})
    if fmt.their_type == "gpt2" and isinstance(config.eos_id, int) and config.eos_id >= config.vocab_size:
        config.eos_id = None  # GPT-2's default in a file with a smaller vocabulary: an id that can never be produced
    ours = own_fields(fmt, config) if own else []
    keys = WRITTEN.union(fmt.fixed, ours, *(theirs for _, *theirs in fmt.fields.values()))
    for key in raw if own else []:  # one that we do not know would be missing in the model
        configs.known(key[:60], keys, f"key of {fmt.our_type}")
    for name in ours:
        set_field(config, name, {name: raw.get(name, getattr(config, name))})


def set_field(config, name, said):
    """Set a field to what a file says, {key: value}. Raises UserError on a wrong type, or if keys do not agree."""
    kind = next(field.type for field in fields(config) if field.name == name)
    values = [configs.checked(key, value, kind, MAX_SIZE) for key, value in said.items()]
    if len(set(map(repr, values))) > 1:
        raise UserError(f"{' and '.join(said)} differ ({', '.join(map(str, values))}); they must agree")
    value = values[0]
    setattr(config, name, value[0] if isinstance(value, list) and [*map(type, value)] == [int] else value)  # one id


def read_generation_ids(directory, config):
    """
    Set the end and start ids that a generation_config.json has: they outrank those of config.json. Raises UserError on
    ids that the vocabulary has not.
    """
    raw = load_generation_config(directory)
    for key, name in {"eos_token_id": "eos_id", "decoder_start_token_id": "start_id"}.items():
        value, silent = raw.get(key), GPT_FIELDS["eos_id"][0]
        if value is None or not hasattr(config, name) or value == silent >= config.vocab_size:
            continue  # GPT-2's end stands in many files with a smaller vocabulary
        try:
            set_field(config, name, {key: value})
            config.validate()
        except UserError as error:
            raise UserError(f"{directory / 'generation_config.json'}: {key}={value!a:.60}: {error}") from None


def write_config(fmt, model):
    """config.json of a model, as a dict."""
    config, own = model.config, differences(fmt, model)
    raw = {"model_type": fmt.our_type if own else fmt.their_type,
           "architectures": [f"MinDecode{type(model).__name__}" if own else fmt.architecture],
           "dtype": str(next(model.parameters()).dtype).removeprefix("torch.")}
    if not model.lm_head.weight.is_floating_point():
        raw["quantization"] = str(model.lm_head.weight.dtype).removeprefix("torch.")
    if own:
        more = f" and {len(own) - 4} more" if len(own) > 4 else ""
        raw["comment"] = f"needs minDecode: unlike {fmt.architecture} in {', '.join(own[:4])}{more}"
        raw |= {name: getattr(config, name) for name in own_fields(fmt, config)}
    raw |= {key: getattr(config, name) for name, (_, *theirs) in fmt.fields.items() for key in theirs}
    raw |= {name: values[0] for name, values in fmt.fixed.items()}
    if fmt.their_type == "gpt2":
        first = next(iter(config.end_ids), None)  # one id separates texts
        raw |= {"n_ctx": config.block_size, "bos_token_id": first, "pad_token_id": None}  # n_ctx: converters ask for it
    else:
        raw |= {"encoder_ffn_dim": config.inner, "decoder_ffn_dim": config.inner, "forced_eos_token_id": None}
    return raw


# -----------------------------------------------------------------------------
# Files

def read_headers(directory, fmt, own):
    """
    The headers of all files of a model. Those of strangers may lack a prefix and hold old mask buffers; ours do not.
    The index that comes with several files is not asked: which tensors are there, and that none is missing, they tell.
    """
    paths = [directory / "model.safetensors"]
    if not os.path.lexists(paths[0]):
        paths = sorted(directory.glob("*-of-*.safetensors"))
    if not paths:
        raise UserError(f"{directory} has no model.safetensors, and other weights, such as pickled .bin files, can "
                        f"run code and are not read: convert them with transformers' save_pretrained")
    stored = {}
    for path in paths:
        for name, entry in read_header(path).items():
            if not own and not name.startswith((fmt.prefix, "lm_head.", "final_logits_bias")):
                name = fmt.prefix + name
            if name in stored:
                raise UserError(f"{path} holds {name:.80} again; keep one")
            if own or not MASK.search(name):
                stored[name] = entry
    return stored


def settle_embeddings(fmt, config, stored):
    """
    Leave in `stored` the embeddings that a model of this config has. Tied, they are one, under any of their names;
    the others are returned, and must hold the same. Untied, the shared one stands in where another is missing. A head
    of whole numbers is its own.
    """
    names = [fmt.table[ours][0] for ours in ["wte.weight", *TIED] if ours in fmt.table]
    if config.tie_weights:
        found = [stored.pop(name) for name in dict.fromkeys([fmt.shared, *names])
                 if name in stored and stored[name].dtype != "I8"]
        stored.update((fmt.shared, x) for x in found[:1])
        return found[1:]
    if fmt.shared in stored:
        shared = stored.pop(fmt.shared)
        for name in names[:-1]:
            stored.setdefault(name, shared)
    return []


def compare(directory, stored, expected):
    """
    Raise one UserError that lists all that a file lacks, has too much, or has in another form than {name: tensor}; None
    stands for any.
    """
    both = stored.keys() & expected.keys()
    whole = {name for name in both if expected[name] is not None and expected[name].dtype == torch.int8}
    wrong = lambda names, dtypes: [f"{name} {stored[name].dtype}" for name in names if stored[name].dtype not in dtypes]
    faults = {
        "missing": expected.keys() - stored.keys() - {OPTIONAL},
        "unexpected": stored.keys() - expected.keys(),
        f"not {'/'.join(FLOATS)}": wrong(both - whole, FLOATS), "not I8": wrong(both & whole, ["I8"]),
        "of another shape": [f"{name} {stored[name].shape} instead of {tuple(expected[name].shape)}" for name in both
                             if expected[name] is not None and expected[name].shape != stored[name].shape]}
    told = [f"{what} {', '.join(name[:160] for name in sorted(names)[:4])}"
            + (f", ... {len(names) - 4} more" if len(names) > 4 else "") for what, names in faults.items() if names]
    if told:
        raise UserError(f"{directory}: the weights do not fit config.json: {'; '.join(told)}")


class Uninitialised(TorchFunctionMode):
    """Within it nn.init does nothing: what is about to be replaced needs no values (and meta ones take a second)."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if kwargs else args[0]
        return func(*args, **(kwargs or {}))


def empty_model(directory, fmt, own, config, stored):
    """A model without memory, made only once the file's names fit the config, and returned once its shapes do too."""
    layers = sum(getattr(config, name, 0) for name in DEPTH.values())
    if layers > len(stored):  # or a billion names would be made to be compared
        raise UserError(f"{directory}: config.json says {layers} layers, but the file holds {len(stored)} tensors")
    if not own:  # names alone: theirs are known before there is a model
        compare(directory, stored, {name: None for names, *_ in published(fmt, config).values() for name in names})
    with torch.device("meta"), Uninitialised():
        model = fmt.model(config)
    compare(directory, stored, export(fmt, model))
    return model


# -----------------------------------------------------------------------------


def locate(directory_or_name):
    """The directory of a model: a path, the newest valid checkpoint of a run, or a name on the Hugging Face hub."""
    name = os.fspath(directory_or_name)
    path = Path(name)
    if path.is_dir():
        if run := newest(path):
            return run
        if os.path.lexists(path / MANIFEST):
            verify(path)
        return path
    if os.path.lexists(path) or ("/" in name and path.parent.is_dir()):
        raise UserError(f"{path} is not a directory; pass one that holds config.json and model.safetensors")
    from huggingface_hub import snapshot_download  # here: it takes a moment, and a directory does not need it
    try:
        wanted = ["*.json", "*.safetensors", "merges.txt", "vocab.bpe"]
        return Path(snapshot_download(name, allow_patterns=wanted, ignore_patterns=["*/*"], etag_timeout=3))
    except Exception as error:  # of many kinds: names, networks, disks, the hub's answers
        reason = (str(error).splitlines() or [type(error).__name__])[0][:120]
        raise UserError(f"there is no directory {name} here, nor a model of that name on the Hugging Face hub or in "
                        f"its cache ({reason}); check the name, the network, or pass a directory") from None


def load_pretrained(directory_or_name, dtype=None, device="cpu"):
    """
    A GPT or BART in eval mode and its tokenizer from a Hugging Face directory, a run's directory, or a name on the hub.
    dtype: None for that of the file's embedding. The tokenizer is None if there is none, or none that can be read: then
    a line on stderr says why. Raises UserError on anything else that is amiss.
    """
    directory = locate(directory_or_name)
    model = load_model(directory, dtype, device)
    try:
        return model, load_tokenizer(directory)
    except UserError as error:
        print(f"no tokenizer: {error}", file=sys.stderr)
        return model, None


def load_model(directory, dtype=None, device="cpu"):
    """
    The model of a directory, as load_pretrained() has it.

    On the CPU, GPT-2's transposed matrices stay as they are stored, as views, in fp32: nothing is copied, and a decoded
    token's matrix-vector products are up to 1.6 times as fast (MKL, measured). In 16 bits they would be 15 times slower
    on a processor that has no instructions for such numbers.
    """
    fmt, own, config = read_config(directory)
    read_generation_ids(directory, config)
    stored = read_headers(directory, fmt, own)
    others = settle_embeddings(fmt, config, stored)
    model = empty_model(directory, fmt, own, config, stored)
    embedding = stored[next(entries(fmt, model))[2][0]]
    stored_dtype = DTYPES[embedding.dtype]
    for x in others:
        alike = (x.dtype, x.shape) == (embedding.dtype, embedding.shape)
        if not alike or not torch.equal(*(read_tensor([one], stored_dtype, "cpu") for one in (x, embedding))):
            raise UserError(f"{directory}: config.json ties the embeddings, but the file holds different ones; set "
                            f"tie_word_embeddings to false there, or keep one")
    dtype = dtype or stored_dtype
    parts = list(entries(fmt, model.to(dtype)))  # but for what keeps a type of its own

    def read(entry):
        ours, empty, theirs, how = entry
        if theirs[0] in stored:
            x = how.load(read_tensor([stored[name] for name in theirs], empty.dtype, device))
            x = x if x.dtype in (torch.float32, torch.float64) and not x.is_cuda else x.contiguous()
        else:  # compare() lets only the head's bias be missing
            x = torch.zeros(empty.shape, dtype=empty.dtype, device=device)
        return dict.fromkeys(ours, torch.nn.Parameter(x) if isinstance(empty, torch.nn.Parameter) else x)

    state = {name: x for found in side_by_side(read, parts) for name, x in found.items()}
    if own:  # built with memory, for what its constructor may compute and no file holds
        with torch.device(device), Uninitialised():
            model = fmt.model(config).to(dtype)
    model.load_state_dict(state, assign=True)  # the tensors become the parameters, tied ones stay one
    return model.eval()


def save_pretrained(directory, model, tokenizer=None):
    """Write a model, and its tokenizer, as a Hugging Face directory. Raises UserError if it cannot be written."""
    directory = Path(directory)
    fmt = next(f for f in FORMATS if isinstance(model, f.model))
    config = write_config(fmt, model)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        tensors = {name: x.cpu().contiguous() for name, x in export(fmt, model).items()}
        if config["model_type"] == fmt.their_type and fmt.shared not in tensors:  # untied
            tensors[fmt.shared] = model.wte.weight.detach().cpu().clone()
        if odd := [f"{name} {x.dtype}" for name, x in tensors.items() if x.dtype not in DTYPES.values()]:
            raise UserError(f"cannot save {odd[0]}: only floating-point numbers and int8; register a buffer as not "
                            f"persistent")
        save_file(tensors, directory / ".model.safetensors", {"format": "pt"})
        os.replace(directory / ".model.safetensors", directory / "model.safetensors")
        ids = {key: value for key, value in config.items() if key.endswith("_token_id")}
        for name, value in (("config.json", config), ("generation_config.json", ids)):
            write_json(directory / name, value)
        if tokenizer is not None:
            tokenizer.save(directory)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot write {directory}: {error}; check the path, the disk and its permissions") from None


def load_generation_config(directory):
    """How a model's publishers would have it generate: generation_config.json as a dict, {} if there is none."""
    path = Path(directory, "generation_config.json")
    return read_json(path) if os.path.lexists(path) else {}
