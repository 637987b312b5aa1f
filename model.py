"""
GPT and BART, from the same parts.

GPT is GPT-2's decoder (Radford et al. 2019): learned positions, layer norm before each sublayer, tanh GELU, output
head tied to the embedding. BART is the encoder-decoder of Lewis et al. 2019: layer norm after each sublayer, exact
GELU, one embedding shared by encoder, decoder and head, and cross-attention between the two. Both compute logits; the
loss belongs to whoever trains them.

Parameters carry GPT-2's own names (wte, wpe, h, ln_1, attn, c_attn, c_proj, mlp, c_fc); plumbing/weights.py maps them
to Hugging Face's.
"""

import math
from dataclasses import dataclass, fields, replace

import torch
import torch.nn as nn

from attention import CausalSelfAttention, CrossAttention, SelfAttention, in_step
from plumbing.errors import UserError

# -----------------------------------------------------------------------------
# Configurations. Slots make a misspelt field an error. The defaults are GPT-2's and BART-base's.


@dataclass(slots=True)
class GPTConfig:
    n_layer: int = 12
    n_head: int = 12
    n_kv_head: int | None = None   # key/value heads: None = n_head, 1 = multi-query, between = grouped-query
    n_embd: int = 768
    n_inner: int | None = None     # width of the feed-forward layer, None = 4 * n_embd
    vocab_size: int = 50257
    block_size: int = 1024         # positions
    max_batch_size: int = 64       # rows of the cache that an attention layer makes for itself
    embd_pdrop: float = 0.1        # dropout, as probabilities
    attn_pdrop: float = 0.1
    resid_pdrop: float = 0.1
    layer_norm_eps: float = 1e-5
    tie_weights: bool = True       # the output head is the embedding matrix
    eos_id: int | None = None      # the id that ends a text, if there is one

    def validate(self):
        check_fields(self)
        positive(self, "n_layer")


@dataclass(slots=True)
class BARTConfig:
    n_encoder_layer: int = 6
    n_decoder_layer: int = 6
    n_head: int = 12
    n_kv_head: int | None = None
    n_embd: int = 768
    n_inner: int | None = None
    vocab_size: int = 50265
    block_size: int = 1024         # positions on either side
    max_batch_size: int = 64
    embd_pdrop: float = 0.1
    attn_pdrop: float = 0.1
    resid_pdrop: float = 0.1
    layer_norm_eps: float = 1e-5
    scale_embedding: bool = False  # multiply embeddings by sqrt(n_embd)
    tie_weights: bool = True       # one embedding matrix for the source, the target and the output head
    bos_id: int = 0
    pad_id: int = 1
    eos_id: int = 2
    start_id: int = 2              # what the decoder starts from: BART was trained to start from its end token

    def validate(self):
        check_fields(self)
        positive(self, "n_encoder_layer", "n_decoder_layer")


def positive(config, *names):
    for name in names:
        if getattr(config, name) is not None and getattr(config, name) < 1:
            raise UserError(f"{name}={getattr(config, name)} must be at least 1")


def check_fields(config):
    """What both configurations must satisfy, found out before anything is allocated. Raises UserError."""
    positive(config, "n_head", "n_kv_head", "n_embd", "n_inner", "vocab_size", "block_size", "max_batch_size")
    kv = config.n_head if config.n_kv_head is None else config.n_kv_head
    if config.n_embd % config.n_head or config.n_head % kv:
        raise UserError(f"n_embd={config.n_embd} must be a multiple of n_head={config.n_head}, "
                        f"and n_head of n_kv_head={kv}")
    for field in fields(config):
        value = getattr(config, field.name)
        if field.name.endswith("pdrop") and not 0 <= value < 1:
            raise UserError(f"{field.name}={value} is a probability: choose it from 0 to below 1")
        if field.name == "layer_norm_eps" and not 0 < value < 1:
            raise UserError(f"layer_norm_eps={value} must be above 0 and below 1, and is usually 1e-5")
        if field.name.endswith("_id") and value is not None and not 0 <= value < config.vocab_size:
            raise UserError(f"{field.name}={value} is outside the vocabulary of {config.vocab_size} (ids from 0)")


# -----------------------------------------------------------------------------
# The parts


class MLP(nn.Module):
    """The feed-forward sublayer: each position on its own, (B, T, C) -> (B, T, C)."""

    def __init__(self, config, activation):
        super().__init__()
        inner = config.n_inner or 4 * config.n_embd
        self.c_fc = nn.Linear(config.n_embd, inner)
        self.act = activation
        self.c_proj = nn.Linear(inner, config.n_embd)
        self.dropout = nn.Dropout(config.resid_pdrop)

    def forward(self, x):
        return self.dropout(self.c_proj(self.act(self.c_fc(x))))


def layer_norm(config):
    return nn.LayerNorm(config.n_embd, eps=config.layer_norm_eps)


class Block(nn.Module):
    """GPT's layer: the norms stand before the sublayers, so the residual stream runs through untouched."""

    def __init__(self, config):
        super().__init__()
        self.ln_1 = layer_norm(config)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = layer_norm(config)
        self.mlp = MLP(config, nn.GELU("tanh"))

    def forward(self, x, use_kv_cache=False, start_pos=0):
        x = x + self.attn(self.ln_1(x), use_kv_cache, start_pos)
        return x + self.mlp(self.ln_2(x))


class EncoderLayer(nn.Module):
    """BART's encoder layer: the norms stand after the sublayers, on the sum."""

    def __init__(self, config):
        super().__init__()
        self.attn = SelfAttention(config)
        self.ln_1 = layer_norm(config)
        self.mlp = MLP(config, nn.GELU())
        self.ln_2 = layer_norm(config)

    def forward(self, x, lengths=None):
        x = self.ln_1(x + self.attn(x, lengths))
        return self.ln_2(x + self.mlp(x))


class DecoderLayer(nn.Module):
    """BART's decoder layer: look at what has been written, then at the source, then think."""

    def __init__(self, config):
        super().__init__()
        self.attn = CausalSelfAttention(config)
        self.ln_1 = layer_norm(config)
        self.cross = CrossAttention(config)
        self.ln_cross = layer_norm(config)
        self.mlp = MLP(config, nn.GELU())
        self.ln_2 = layer_norm(config)

    def forward(self, x, memory, lengths=None, use_kv_cache=False, start_pos=0):
        x = self.ln_1(x + self.attn(x, use_kv_cache, start_pos))
        x = self.ln_cross(x + self.cross(x, memory, lengths, use_kv_cache))
        return self.ln_2(x + self.mlp(x))


class Model(nn.Module):
    """What GPT and BART share: default and preset configurations, initialisation, and their decoder's caches."""

    def __init__(self, config):
        super().__init__()
        config.validate()
        self.config = replace(config)  # our own copy: the caller's may change later

    @classmethod
    def get_default_config(cls):
        return cls.config_class()

    @classmethod
    def get_preset_config(cls, name):
        """The configuration of a published size, e.g. "gpt2-xl" or "bart-base". Raises UserError on another name."""
        if name not in cls.presets:
            raise UserError(f"there is no preset {name!r}: choose one of {', '.join(cls.presets)}")
        return cls.config_class(**cls.presets[name])

    def init_weights(self, n_residual):
        """
        Normal with standard deviation 0.02, biases zero; projections that add to the residual stream are scaled by
        1 / sqrt(n_residual), their number, so that the stream does not grow with depth (GPT-2, section 2.3).
        """
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                residual = name.endswith("c_proj")
                nn.init.normal_(module.weight, std=0.02 / math.sqrt(n_residual) if residual else 0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def count_parameters(self):
        return sum(p.numel() for p in self.parameters())  # tied weights count once

    def positions(self, start_pos, T, device):
        """Absolute positions of T new tokens: (T,), or (B, T) if start_pos is (B, 1)."""
        if not isinstance(start_pos, torch.Tensor) and not 0 <= start_pos <= self.config.block_size - T:
            raise ValueError(f"position {start_pos + T - 1} is beyond block_size={self.config.block_size} or below 0: "
                             f"shorten the text or raise block_size")
        return start_pos + torch.arange(T, device=device)

    def rewind_kv_cache(self, position):
        """Forget the cached positions from `position` on, e.g. to continue a prefix in another way."""
        for layer in self.decoder_layers():
            if layer.attn.cache is not None:
                layer.attn.cache.rewind(position)

    def clear_kv_cache(self):
        """Give the memory of the caches back."""
        for module in self.modules():
            if hasattr(module, "cache"):
                module.cache = None


# -----------------------------------------------------------------------------


class GPT(Model):
    """A decoder-only language model: ids (B, T) -> logits (B, T, V) for the token after each position."""

    config_class = GPTConfig
    presets = {
        "gpt2":        dict(n_layer=12, n_head=12, n_embd=768, eos_id=50256),   # 124M
        "gpt2-medium": dict(n_layer=24, n_head=16, n_embd=1024, eos_id=50256),  # 355M
        "gpt2-large":  dict(n_layer=36, n_head=20, n_embd=1280, eos_id=50256),  # 774M
        "gpt2-xl":     dict(n_layer=48, n_head=25, n_embd=1600, eos_id=50256),  # 1558M
    }

    def __init__(self, config):
        super().__init__(config)
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.drop = nn.Dropout(config.embd_pdrop)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = layer_norm(config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tie_weights:
            self.lm_head.weight = self.wte.weight
        self.init_weights(n_residual=2 * config.n_layer)

    def decoder_layers(self):
        return self.h

    def features(self, idx, use_kv_cache=False, start_pos=0):
        """Everything but the head, (B, T) -> (B, T, C): who wants one position's logits projects only that one."""
        T = idx.size(1)
        x = self.drop(self.wte(idx) + self.wpe(self.positions(start_pos, T, idx.device)))  # (B, T, C)
        with in_step([block.attn for block in self.h] if use_kv_cache else [], start_pos, *idx.shape):
            for block in self.h:
                x = block(x, use_kv_cache, start_pos)
        return self.ln_f(x)

    def forward(self, idx, use_kv_cache=False, start_pos=0):
        """
        idx: (B, T) int64, tokens at positions start_pos.. -> logits (B, T, V). With use_kv_cache, only the tokens
        that are not stored yet need to be passed; see CausalSelfAttention. Raises ValueError beyond block_size.
        """
        return self.lm_head(self.features(idx, use_kv_cache, start_pos))


class BART(Model):
    """An encoder-decoder: it reads a source at once and writes a target token by token."""

    config_class = BARTConfig
    presets = {
        "bart-base":  dict(n_encoder_layer=6, n_decoder_layer=6, n_head=12, n_embd=768),     # 139M
        "bart-large": dict(n_encoder_layer=12, n_decoder_layer=12, n_head=16, n_embd=1024),  # 406M
    }

    def __init__(self, config):
        super().__init__(config)
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.encoder_wte = self.wte if config.tie_weights else nn.Embedding(config.vocab_size, config.n_embd)
        self.encoder_wpe = nn.Embedding(config.block_size, config.n_embd)
        self.encoder_ln = layer_norm(config)
        self.encoder = nn.ModuleList(EncoderLayer(config) for _ in range(config.n_encoder_layer))
        self.decoder_wpe = nn.Embedding(config.block_size, config.n_embd)
        self.decoder_ln = layer_norm(config)
        self.decoder = nn.ModuleList(DecoderLayer(config) for _ in range(config.n_decoder_layer))
        self.drop = nn.Dropout(config.embd_pdrop)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size)
        self.lm_head.bias.requires_grad_(False)  # published models hold a constant here, zero almost everywhere
        if config.tie_weights:
            self.lm_head.weight = self.wte.weight
        self.init_weights(n_residual=1)  # norms after the sum keep the stream in scale by themselves

    def decoder_layers(self):
        return self.decoder

    def embed(self, ids, wte, wpe, ln, start_pos=0):
        scale = math.sqrt(self.config.n_embd) if self.config.scale_embedding else 1.0
        x = wte(ids) * scale + wpe(self.positions(start_pos, ids.size(1), ids.device))
        return self.drop(ln(x))  # (B, T, C)

    def check_lengths(self, lengths, N):
        if lengths is not None and not (1 <= lengths.min() and lengths.max() <= N):
            raise ValueError(f"source_lengths={lengths.tolist()} must lie between 1 and the width {N}")

    def encode(self, source, source_lengths=None):
        """
        source: (B, N) int64 -> memory (B, N, C). Rows shorter than N are padded on the right, with any valid id;
        source_lengths: (B,) how many tokens count in each, None for all. Raises ValueError beyond block_size.
        """
        N = source.size(1)
        self.check_lengths(source_lengths, N)
        x = self.embed(source, self.encoder_wte, self.encoder_wpe, self.encoder_ln)
        for layer in self.encoder:
            x = layer(x, source_lengths)
        return x

    def features(self, target, memory, source_lengths=None, use_kv_cache=False, start_pos=0):
        """decode() without the head, (B, T) -> (B, T, C)."""
        cache, fresh = self.decoder[0].cross.cache, not isinstance(start_pos, torch.Tensor) and start_pos == 0
        if use_kv_cache and not (fresh and memory is not None):  # the stored memory is meant
            if cache is not None and not cache.of(memory, source_lengths) or cache is None and memory is not None:
                raise ValueError(f"start_pos={start_pos} continues a target, but this memory is not the stored one: "
                                 f"pass that tensor (or None), or start again at start_pos=0")
            memory = None
        elif memory is not None:
            self.check_lengths(source_lengths, memory.size(1))
        x = self.embed(target, self.wte, self.decoder_wpe, self.decoder_ln, start_pos)
        caching = [part for layer in self.decoder for part in (layer.attn, layer.cross)] if use_kv_cache else []
        with in_step(caching, start_pos, *target.shape):
            for layer in self.decoder:
                x = layer(x, memory, source_lengths, use_kv_cache, start_pos)
        return x

    def decode(self, target, memory, source_lengths=None, use_kv_cache=False, start_pos=0):
        """
        target: (B, T) int64 at positions start_pos.., memory: (B, N, C) from encode() -> logits (B, T, V).

        With use_kv_cache the first call (start_pos=0) projects the memory's keys and values and stores them; later
        calls read them, and may pass memory=None. Raises ValueError if they bring another memory.
        """
        return self.lm_head(self.features(target, memory, source_lengths, use_kv_cache, start_pos))

    def forward(self, source, target, source_lengths=None):
        """Teacher forcing: logits (B, M, V) of every target position at once, as in training."""
        return self.decode(target, self.encode(source, source_lengths), source_lengths)
