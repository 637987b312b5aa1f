"""
The cache of many lecture notes: every step makes new tensors, of everything stored and the newest.

    k = torch.cat((past_k, new_k), dim=2)

It holds what the static cache holds, and the logits are the same; what differs is how much is copied. Let `position` be
the bytes of the keys and values of one position, 2 x layers x B x KV x D x itemsize. Then a prefill of P tokens and the
M - 1 steps behind it copy

    static   position x (P + M - 1)              every position once: linear in M
    concat   position x (P M + M (M - 1) / 2)    P + k positions in call k = 0 .. M - 1: quadratic in M

As many positions as cached and naive decoding compute: concatenation saves the computing, and copies instead. Its
buffers are no longer than the text, but while one is made the old one is there too, and no step finds them where the
last one did, so none can be captured.

One of those notes says that only x[:, :-1] enters. That is everything but the newest token, which is x[:, -1:].
"""

import torch

from cache import KVCache
from generate import cached


class StaticCache(KVCache):
    """A KVCache that counts. copied: bytes that update() has written, which are those of what is new."""

    copied = 0

    def update(self, layer, pos, k, v):
        self.copied += k.nbytes + v.nbytes
        return super().update(layer, pos, k, v)


class ConcatCache(KVCache):
    """
    A KVCache whose buffers are as long as the text, and new after every pass. Its rows stand at one position: raises
    ValueError on ragged ones, and on a tensor start_pos. copied: bytes that update() has written.
    """

    copied = 0

    @torch.inference_mode(False)  # as in KVCache._allocate
    def update(self, layer, pos, k, v):
        """As KVCache.update(): k and v, (B, KV, T, D), are stored; returned are keys, values (B, KV, S, D) and (S,)."""
        if pos.dim() > 1:
            raise ValueError(f"positions of shape {tuple(pos.shape)}: a cache that is concatenated takes no ragged "
                             f"rows and no tensor start_pos, use a KVCache")
        B, start = k.size(0), self.stop - pos.size(0)
        for stored, new in ((self.k, k.detach()), (self.v, v.detach())):
            stored[layer] = self.join(stored[layer][:B, :, :start], new) if start else new.clone()
            self.copied += stored[layer].nbytes
        return self.k[layer], self.v[layer], torch.arange(self.k[layer].size(2), device=k.device)

    def join(self, past, new):
        return torch.cat((past, new), dim=2)

    def row(self, i):
        raise ValueError(f"row {i} of a cache that every pass makes anew cannot be viewed: use a KVCache")


class SlipCache(ConcatCache):
    """The slip, as a cache: what is new is concatenated without the newest."""

    def join(self, past, new):
        return torch.cat((past, new[:, :, :-1]), dim=2)


# -----------------------------------------------------------------------------
# As strategies: python bench.py compare --strategies cached,further.concat:concat,further.concat:slip ...


def concat(model, sources, B, room, choose):
    return cached(model, sources, B, room, choose, ConcatCache(B, room, len(model.decoder_layers())))


def slip(model, sources, B, room, choose):
    return cached(model, sources, B, room, choose, SlipCache(B, room, len(model.decoder_layers())))
