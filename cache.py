"""
The keys and values of one decoding, so that a step computes only its own.

A cache is a buffer indexed by positions: slot s of a row holds position s, for ever. One KVCache serves all layers of
one decoding and counts once per row how many positions are stored. Whoever decodes owns it and passes it down, so two
decodings on one model cannot meet. A pass is checked before anything is written and counted after every layer has
written. What lies behind the count is overwritten before it is read, or hidden by the mask: so a pass that fails
half-way has stored nothing (a row that it was to start afresh is empty), and going back is moving the count.

Shapes: B rows, T new positions, S stored positions, KV key/value heads, D head_dim. This file imports nothing of ours.
"""

from contextlib import contextmanager
from typing import NamedTuple

import torch


@contextmanager
def passing(cache, start_pos, x, block_size):
    """
    Around a pass of x, (B, T) ids or (B, T, C), through all layers: yields the absolute positions of its tokens.

    start_pos: an int, or a list of one per row: what is stored of it (cache.filled), or 0 to start it afresh. Where all
    rows are alike the positions are (T,), else (B, T). Raises ValueError, before anything is written, on a gap, an
    overflow, or a batch that changes.
    A tensor, () or one start per row, is for a captured step: only the device knows its values, so they are trusted,
    and whoever made it counts. Its positions are (1 or B, T), and the whole buffer is read.
    """
    B, T = x.shape[:2]
    new = torch.arange(T, device=x.device)
    if isinstance(start_pos, torch.Tensor):
        if cache is None or start_pos.numel() not in (1, B) or B > (cache.batch_size or B):
            raise ValueError(f"start_pos is a tensor of {start_pos.numel()} positions for {B} rows: it must hold 1 or "
                             f"{B}, with a cache of so many rows")
        cache.stop = cache.length
        yield start_pos.view(-1, 1) + new
        return
    starts = [start_pos] * B if isinstance(start_pos, int) else list(start_pos)
    alike, stop = len(set(starts)) <= 1, max(starts, default=0) + T
    if stop > block_size:
        raise ValueError(f"position {stop - 1} is beyond block_size={block_size}: shorten the text or raise block_size")
    if cache is not None:
        cache.check(starts, B, T)
        if afresh := [row for row, start in enumerate(starts) if start == 0]:
            cache.clear(afresh)
        cache.filled, cache.stop = starts, stop
    elif any(starts):
        raise ValueError(f"start_pos={start_pos} needs a cache (use_kv_cache=True): without one nothing precedes x")
    yield stop - T + new if alike else torch.tensor(starts, device=x.device)[:, None] + new
    if cache is not None:  # every layer has written: now the new positions count, and now old ones could be let go
        cache.filled = [start + T for start in starts]


class KVCache:
    """
    k[layer], v[layer]: (batch_size, KV, length, D), zero where a text has not been, allocated by the first pass with
    the dtype and device of its keys, and at that address ever after. KV heads are stored unrepeated: sharing them is
    what makes the cache small (Shazeer 2019). filled: how many positions are stored, one int per row. batch_size: None
    for as many rows as the largest text has had, which then may move to a larger buffer when it starts.

    Not a module, so the buffers are in no state_dict; written detached, so they carry no gradient.
    """

    def __init__(self, batch_size, length, n_layer=1):
        self.batch_size, self.length = batch_size, length
        self.k, self.v = [None] * n_layer, [None] * n_layer
        self.filled = [0] * (batch_size or 0)
        self.slots = None  # (length,): the position that each slot holds
        self.stop = 0      # slots that the pass in progress reads

    def update(self, layer, pos, k, v):
        """
        Store k and v, (B, KV, T, D), at their positions, (T,) or (B, T), and return what attention may read: keys and
        values (B, KV, S, D), and the positions of the keys (S,). With pos (T,) these are all that is stored, the newest
        last; with (B, T) they reach as far as the longest row, and the mask hides what lies in a row's future.
        """
        B, _, T, _ = k.shape
        kept = self.k[layer]
        if kept is None or (kept.dtype, kept.device, kept.shape[1::2]) != (k.dtype, k.device, k.shape[1::2]):
            self._allocate(layer, k)
        keys, values = self.k[layer][:B, :, : self.stop], self.v[layer][:B, :, : self.stop]
        if pos.dim() == 1:
            keys[:, :, self.stop - T :], values[:, :, self.stop - T :] = k.detach(), v.detach()
        else:
            b = torch.arange(B, device=k.device)[:, None]
            keys[b, :, pos] = k.detach().transpose(1, 2)  # (B, T, KV, D), the shape of an indexed write
            values[b, :, pos] = v.detach().transpose(1, 2)
        return keys, values, self.slots[: self.stop]

    def check(self, starts, B, T):
        """Raise ValueError if B rows cannot store T positions at their starts. Changes nothing."""
        if B > (self.batch_size or B) or len(starts) != B:
            raise ValueError(f"a batch of {B} rows at {len(starts)} starts does not fit a cache of {self.batch_size} "
                             f"(max_batch_size): use fewer rows or a larger max_batch_size")
        if any(starts) and len(self.filled) != B:
            raise ValueError(f"the batch changed from {len(self.filled)} rows to {B} at start_pos={max(starts)}: "
                             f"start again at start_pos=0")
        for row, start in enumerate(starts):
            if start != 0 and start != self.filled[row]:
                raise ValueError(f"start_pos={start}, but {self.filled[row]} positions are stored in row {row}: "
                                 f"continue at that position, rewind() to an earlier one, or start again at 0")
            if start + T > self.length:  # padding needs room as well
                raise ValueError(f"start_pos={start} and {T} new positions overflow a cache of {self.length}: "
                                 f"generate less or raise block_size")

    def rewind(self, position):
        """Forget what lies at `position` and behind it; a list has one per row. Raises ValueError if less is stored."""
        to = [position] * len(self.filled) if isinstance(position, int) else list(map(int, position))
        if len(to) != len(self.filled) or not all(0 <= p <= n for p, n in zip(to, self.filled)):
            raise ValueError(f"cannot rewind to position {position}: {self.filled} positions are stored")
        self.filled = to

    def clear(self, rows):
        """
        Make zeros of these rows again: what a mask hides is multiplied by 0, and a NaN of an earlier text would stay
        one. (So a text is not to be continued behind numbers that were not finite.)
        """
        if self.k[0] is not None and len(self.k[0]) <= max(rows):  # batch_size is None, and no text had so many
            self.k, self.v = [None] * len(self.k), [None] * len(self.k)
        self._each(lambda x: x.index_fill_(0, torch.tensor(rows, device=x.device), 0))

    def reorder(self, rows):
        """
        Row i becomes what row rows[i] was, in place; fewer rows shrink the batch. Raises ValueError if there is no such
        row, or no room for so many.
        """
        if len(rows) > (self.batch_size or len(self.filled)) or not all(0 <= r < len(self.filled) for r in rows):
            raise ValueError(f"cannot make rows {rows} of {len(self.filled)} in a cache of {self.batch_size}")
        moved, top = [i for i, row in enumerate(rows) if i != row], max(self.filled, default=0)
        if moved:
            source = [rows[i] for i in moved]
            self._each(lambda x: x[:, :, :top].index_copy_(0, torch.tensor(moved, device=x.device), x[source, :, :top]))
        self.filled = [self.filled[row] for row in rows]

    @torch.inference_mode(False)  # as in _allocate
    def expand(self, n):
        """Every row n times, side by side, in new buffers: one prefill for several samples or beams."""
        B = len(self.filled)
        self.k, self.v = self._each(lambda x: x[:B].repeat_interleave(n, 0))
        self.batch_size, self.filled = n * B, [count for count in self.filled for _ in range(n)]

    @torch.inference_mode(False)  # as in _allocate
    def fork(self):
        """A copy that goes its own way."""
        return self._like(self.batch_size, self.filled, torch.Tensor.clone)

    def row(self, i):
        """A view of one row: what is written through it is written here, and counted here by whoever wrote it."""
        if None in self.k or not 0 <= i < len(self.filled):
            raise ValueError(f"there is no row {i} to be viewed: {len(self.filled)} are stored, after a prefill")
        return self._like(1, self.filled[i : i + 1], lambda x: x[i : i + 1])

    @property
    def nbytes(self):
        """Bytes reserved, of all layers."""
        return sum(x.nbytes for x in (*self.k, *self.v) if x is not None)

    def _each(self, function):
        """The function of every buffer, as two lists like k and v."""
        return [[None if x is None else function(x) for x in buffers] for buffers in (self.k, self.v)]

    def _like(self, batch_size, filled, function):
        other = type(self)(batch_size, self.length, len(self.k))
        other.k, other.v = self._each(function)
        other.filled, other.slots = list(filled), self.slots
        return other

    @torch.inference_mode(False)  # a buffer born in inference mode could never be written outside it
    def _allocate(self, layer, k):
        if any(self.filled):
            was, now = (x if x is None else f"{x.size(1)} heads of {x.size(3)}, {x.dtype}, {x.device}"
                        for x in (self.k[layer], k))
            raise ValueError(f"layer {layer} of the cache holds {was}, but the keys are now {now}: start again at "
                             f"start_pos=0")
        shape = self.batch_size or k.size(0), k.size(1), self.length, k.size(3)
        self.k[layer] = torch.zeros(shape, dtype=k.dtype, device=k.device)
        self.v[layer] = torch.zeros_like(self.k[layer])
        self.slots = torch.arange(self.length, device=k.device)


# -----------------------------------------------------------------------------


class Memory(NamedTuple):
    """What a decoder keeps of B sources, a value: keys and values of every layer, and where the keys stand."""

    kv: list               # per layer (k, v), (B, KV, N, D) each
    key_pos: torch.Tensor  # (N,), or (B, N) where sources are padded: see attention.key_positions()

    def take(self, rows):
        """The memory of some of the sources, in another order."""
        key_pos = self.key_pos if self.key_pos.dim() == 1 else self.key_pos[rows]
        return Memory([(k[rows], v[rows]) for k, v in self.kv], key_pos)

    @property
    def nbytes(self):
        return sum(k.nbytes + v.nbytes for k, v in self.kv)
