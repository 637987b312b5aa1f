"""
GPT and BART, from the same parts.

GPT is GPT-2's decoder (Radford et al. 2019): learned positions, layer norm before each sublayer, tanh GELU, output
head tied to the embedding. BART is the encoder-decoder of Lewis et al. 2019: layer norm after each sublayer, exact
GELU, one embedding for both sides and the head, cross-attention between them. Both compute logits; the loss belongs to
whoever trains. Shapes: B rows, T new tokens of a text, N tokens of a source, C n_embd, V vocab_size.
"""

import math
from dataclasses import dataclass, fields, replace

import torch
import torch.nn as nn

from attention import CausalSelfAttention, CrossAttention, Dropout, SelfAttention, head_sizes, keeping, key_positions
from cache import Memory, passing
from plumbing.errors import UserError
from plumbing.patterns import patterns

# -----------------------------------------------------------------------------
# Configurations. Slots make a misspelt field an error. The defaults are GPT-2's and BART-base's.


@dataclass(slots=True)
class Config:
    """What both configurations have, and what follows from it."""

    n_head: int = 12
    n_kv_head: int | None = None   # key/value heads: None = n_head, 1 = multi-query, between = grouped-query
    n_embd: int = 768
    n_inner: int | None = None     # width of the feed-forward layer, None = 4 * n_embd
    block_size: int = 1024         # positions, of an encoder-decoder on either side
    max_batch_size: int = 64       # rows of the cache that an attention layer on its own makes for itself
    embd_pdrop: float = 0.1        # dropout, as probabilities
    attn_pdrop: float = 0.1
    resid_pdrop: float = 0.1
    layer_norm_eps: float = 1e-5
    pattern: str | list = "full"   # what a decoder's position sees, see sparse.py; a list has one for each layer
    tie_weights: bool = True       # one matrix embeds (on both sides) and is the output head

    def of(self, role):
        """The configuration as attention in one role sees it: "encoder", "decoder" or "cross"."""
        return replace(self, n_kv_head=getattr(self, f"n_{role}_kv_head", None) or self.n_kv_head)

    @property
    def kv_width(self):
        """Columns of the keys of one position: n_kv_head * head_dim."""
        _, KV, D = head_sizes(self)
        return KV * D

    @property
    def inner(self):
        """Width of the feed-forward layer."""
        return self.n_inner or 4 * self.n_embd

    @property
    def end_ids(self):
        """The ids that end a text, a list: eos_id may be None, one, or several."""
        return [] if self.eos_id is None else [self.eos_id] if isinstance(self.eos_id, int) else list(self.eos_id)

    def starts(self, n_prompt):
        """How many tokens the decoder starts from: those of a prompt, or the start token alone."""
        return 1 if self.is_encoder_decoder else n_prompt

    def validate(self):
        """Raise UserError on what cannot be, before anything is allocated."""
        for name, value in ((field.name, getattr(self, field.name)) for field in fields(self)):
            if name.startswith(("n_", "vocab_", "block_", "max_")) and value is not None and value < 1:
                raise UserError(f"{name}={value} must be at least 1")
            if name.endswith("pdrop") and not 0 <= value < 1:
                raise UserError(f"{name}={value} is a probability: choose it from 0 to below 1")
            if name == "layer_norm_eps" and not 0 < value < 1:
                raise UserError(f"layer_norm_eps={value} must be above 0 and below 1, and is usually 1e-5")
            ids = [] if value is None else value if value and isinstance(value, list) else [value]  # [] is no id
            if name.endswith("_id") and any(type(i) is not int or not 0 <= i < self.vocab_size for i in ids):
                raise UserError(f"{name}={value!r:.60} is not in a vocabulary of {self.vocab_size} (ids from 0)")
        try:
            for role in ("encoder", "decoder", "cross"):
                head_sizes(self.of(role))
        except ValueError as error:
            raise UserError(str(error)) from None
        patterns(self.of("decoder"), self.n_decoder_layer if self.is_encoder_decoder else self.n_layer)


@dataclass(slots=True)
class GPTConfig(Config):
    is_encoder_decoder = False
    n_layer: int = 12
    vocab_size: int = 50257
    eos_id: int | list | None = None  # the id that ends a text, or several, if there is one


@dataclass(slots=True)
class BARTConfig(Config):
    is_encoder_decoder = True
    n_encoder_layer: int = 6
    n_decoder_layer: int = 6
    n_decoder_kv_head: int | None = None  # of the decoder's self-attention, None = n_kv_head
    n_cross_kv_head: int | None = None    # of the attention to the source, None = n_kv_head
    vocab_size: int = 50265
    scale_embedding: bool = False  # multiply embeddings by sqrt(n_embd)
    bos_id: int = 0
    pad_id: int = 1
    eos_id: int | list = 2
    start_id: int = 2              # what the decoder starts from: BART was trained to start from its end token


# -----------------------------------------------------------------------------
# The parts


class MLP(nn.Module):
    """The feed-forward sublayer: each position on its own, (B, T, C) -> (B, T, C)."""

    def __init__(self, config, activation):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, config.inner)
        self.act = activation
        self.c_proj = nn.Linear(config.inner, config.n_embd)
        self.dropout = Dropout(config.resid_pdrop)

    def forward(self, x):
        return self.dropout(self.c_proj(self.act(self.c_fc(x))))


def layer_norm(config):
    return nn.LayerNorm(config.n_embd, eps=config.layer_norm_eps)


class Block(nn.Module):
    """GPT's layer: the norms stand before the sublayers, so the residual stream runs through untouched."""

    def __init__(self, config, layer):
        super().__init__()
        self.ln_1 = layer_norm(config)
        self.attn = CausalSelfAttention(config, layer, patterns(config, config.n_layer)[layer])
        self.ln_2 = layer_norm(config)
        self.mlp = MLP(config, nn.GELU("tanh"))

    def forward(self, x, pos, cache=None):
        x = x + self.attn(self.ln_1(x), pos=pos, cache=cache)
        return x + self.mlp(self.ln_2(x))


class EncoderLayer(nn.Module):
    """BART's encoder layer: the norms stand after the sublayers, on the sum."""

    def __init__(self, config):
        super().__init__()
        self.attn = SelfAttention(config)
        self.ln_1 = layer_norm(config)
        self.mlp = MLP(config, nn.GELU())
        self.ln_2 = layer_norm(config)

    def forward(self, x, pos, key_pos):
        x = self.ln_1(x + self.attn(x, pos, key_pos))
        return self.ln_2(x + self.mlp(x))


class DecoderLayer(nn.Module):
    """BART's decoder layer: look at what has been written, then at the source, if there is one, then think."""

    def __init__(self, config, layer):
        super().__init__()
        own = config.of("decoder")
        self.attn = CausalSelfAttention(own, layer, patterns(own, config.n_decoder_layer)[layer])
        self.ln_1 = layer_norm(config)
        self.cross = CrossAttention(config.of("cross"))
        self.ln_cross = layer_norm(config)
        self.mlp = MLP(config, nn.GELU())
        self.ln_2 = layer_norm(config)

    def forward(self, x, pos, cache=None, memory=None):
        x = self.ln_1(x + self.attn(x, pos=pos, cache=cache))
        if memory is not None:
            x = self.ln_cross(x + self.cross(x, *memory.kv[self.attn.layer], memory.key_pos))
        return self.ln_2(x + self.mlp(x))


class Model(nn.Module):
    """What GPT and BART share: a default configuration, initialisation, and the caches of a decoder."""

    def __init__(self, config):
        super().__init__()
        config.validate()
        self.config = replace(config)  # our own copy: the caller's may change later
        self.cache = self.source = None  # of use_kv_cache=True; whoever decodes otherwise brings their own

    @classmethod
    def get_default_config(cls):
        return cls.config_class()

    def init_weights(self, n_residual):
        """
        Normal with standard deviation 0.02, biases zero; projections that add to the residual stream are scaled by
        1 / sqrt(n_residual), their number, so that the stream does not grow with depth (GPT-2, section 2.3).
        """
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02 / math.sqrt(n_residual if name.endswith("c_proj") else 1))
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def count_parameters(self):
        return sum(p.numel() for p in self.parameters())  # tied weights count once

    def new_cache(self, batch_size, length=None):
        """A KVCache for one decoding: all layers, batch_size rows of `length` positions, None for block_size."""
        patterns = [layer.attn.pattern for layer in self.decoder_layers()]
        return keeping(patterns, batch_size, length or self.config.block_size)

    def own_cache(self):
        """The cache that the model keeps for use_kv_cache=True, with as many rows as the largest batch so far."""
        if self.cache is None:
            self.cache = self.new_cache(batch_size=None)
            for layer in self.decoder_layers():
                layer.attn.shown = self.cache  # as cache_k, cache_v
        return self.cache

    def clear_kv_cache(self):
        """Give the memory back that calls with use_kv_cache=True took."""
        self.cache = self.source = None
        for layer in self.decoder_layers():
            layer.attn.cache = layer.attn.shown = None


class GPT(Model):
    """A decoder-only language model: ids (B, T) -> logits (B, T, V) for the token after each position."""

    config_class = GPTConfig

    def __init__(self, config):
        super().__init__(config)
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.drop = Dropout(config.embd_pdrop)
        self.h = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.ln_f = layer_norm(config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tie_weights:
            self.lm_head.weight = self.wte.weight
        self.init_weights(n_residual=2 * config.n_layer)

    def decoder_layers(self):
        return self.h

    def features(self, idx, cache=None, start_pos=0):
        """
        Everything but the head, (B, T) -> (B, T, C): who wants one position's logits projects only that one. cache:
        of a decoding, from new_cache(), which keeps what precedes idx; start_pos: see passing().
        """
        with passing(cache, start_pos, idx, self.config.block_size) as pos:  # (T,), or (B, T)
            x = self.drop(self.wte(idx) + self.wpe(pos))  # (B, T, C)
            for block in self.h:
                x = block(x, pos, cache)
        return self.ln_f(x)

    def forward(self, idx, use_kv_cache=False, start_pos=0):
        """
        idx: (B, T) int64, tokens at positions start_pos.. -> logits (B, T, V). With use_kv_cache, only the tokens
        that are not stored yet need to be passed; see CausalSelfAttention. Raises ValueError beyond block_size.
        """
        cache = self.own_cache() if use_kv_cache else None
        return self.lm_head(self.features(idx, cache, start_pos))


class BART(Model):
    """An encoder-decoder: it reads a source at once and writes a target token by token."""

    config_class = BARTConfig

    def __init__(self, config):
        super().__init__(config)
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.encoder_wte = self.wte if config.tie_weights else nn.Embedding(config.vocab_size, config.n_embd)
        self.encoder_wpe = nn.Embedding(config.block_size, config.n_embd)
        self.encoder_ln = layer_norm(config)
        self.encoder = nn.ModuleList(EncoderLayer(config) for _ in range(config.n_encoder_layer))
        self.decoder_wpe = nn.Embedding(config.block_size, config.n_embd)
        self.decoder_ln = layer_norm(config)
        self.decoder = nn.ModuleList(DecoderLayer(config, layer) for layer in range(config.n_decoder_layer))
        self.drop = Dropout(config.embd_pdrop)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size)
        self.lm_head.bias.requires_grad_(False)  # published models hold a constant here, zero almost everywhere
        if config.tie_weights:
            self.lm_head.weight = self.wte.weight
        self.init_weights(n_residual=1)  # norms after the sum keep the stream in scale by themselves

    def decoder_layers(self):
        return self.decoder

    def embed(self, ids, wte, wpe, ln, pos):
        scale = math.sqrt(self.config.n_embd) if self.config.scale_embedding else 1.0
        return self.drop(ln(wte(ids) * scale + wpe(pos)))  # (B, T, C)

    def encode(self, source, source_lengths=None):
        """
        source: (B, N) int64 -> (B, N, C). Rows shorter than N are padded on the right, with any valid id;
        source_lengths: (B,) how many tokens count in each, None for all. Raises ValueError beyond block_size.
        """
        with passing(None, 0, source, self.config.block_size) as pos:
            key_pos = key_positions(source, source_lengths)
            x = self.embed(source, self.encoder_wte, self.encoder_wpe, self.encoder_ln, pos)
            for layer in self.encoder:
                x = layer(x, pos, key_pos)
        return x

    def project(self, encoded, source_lengths=None):
        """The Memory of sources, (B, N, C) from encode(): their keys and values for every layer, computed once."""
        key_pos = key_positions(encoded, source_lengths)
        return Memory([layer.cross.project(encoded) for layer in self.decoder], key_pos)

    def features(self, target, memory=None, cache=None, start_pos=0):
        """
        Everything but the head, (B, T) -> (B, T, C). memory: from project(), of B sources, or of fewer whose rows
        stand side by side; None for no source at all. cache and start_pos: as in GPT.
        """
        with passing(cache, start_pos, target, self.config.block_size) as pos:
            x = self.embed(target, self.wte, self.decoder_wpe, self.decoder_ln, pos)
            for layer in self.decoder:
                x = layer(x, pos, cache, memory)
        return x

    def decode(self, target, encoded, source_lengths=None, use_kv_cache=False, start_pos=0):
        """
        target: (B, T) int64 at positions start_pos.., encoded: (B, N, C) from encode(), or None -> logits (B, T, V).

        With use_kv_cache the model keeps a cache of its own: a call at start_pos=0 projects the source, if there is
        one, later calls read that, and may pass encoded=None. Raises ValueError if they bring another source.
        """
        if not use_kv_cache:
            memory = None if encoded is None else self.project(encoded, source_lengths)
            return self.lm_head(self.features(target, memory, None, start_pos))
        source = self.source
        if not isinstance(start_pos, torch.Tensor) and not torch.tensor(start_pos).any():  # a new text
            with torch.inference_mode(False), torch.no_grad():  # kept for later calls, whatever their mode
                copies = [x if x is None else x.clone() for x in (encoded, source_lengths)]
                source = *copies, encoded if encoded is None else self.project(*copies)
        elif any(x is not None and (kept is None or not torch.equal(x, kept))
                 for x, kept in zip((encoded, source_lengths), source or (None, None))):
            raise ValueError(f"start_pos={start_pos} continues a target, but this memory is not the stored one: "
                             f"pass the same (or None), or start again at start_pos=0")
        x = self.features(target, source and source[2], self.own_cache(), start_pos)
        self.source = source  # only now: a call that fails half-way leaves the source that was
        return self.lm_head(x)

    def forward(self, source, target, source_lengths=None):
        """Teacher forcing: logits (B, M, V) of every target position at once, as in training."""
        return self.decode(target, self.encode(source, source_lengths), source_lengths)
