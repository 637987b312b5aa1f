"""
The keys and values of one decoding, so that a step computes only its own.

A cache is a buffer indexed by positions: slot s of a row holds position s, for ever, unless a layer's pattern need not
see everything and declares other Slots. One KVCache serves all layers of one decoding and counts once per row how many
positions are stored. Whoever decodes owns it and passes it down, so two decodings on one model cannot meet. A pass is
checked before anything is written and counted after every layer has written. What lies behind the count is overwritten
before it is read, or hidden by the mask: so a pass that fails half-way has stored nothing (a row that it was to start
afresh is empty), and going back is moving the count.

Shapes: B rows, T new positions, S stored positions, KV key/value heads, D head_dim. This file imports nothing of ours.
"""

from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel


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
        cache.begin(None, T)
        yield start_pos.view(-1, 1) + new
        return
    starts = [start_pos] * B if isinstance(start_pos, int) else list(start_pos)
    alike, stop = len(set(starts)) <= 1, max(starts, default=0) + T
    if stop > block_size:
        raise ValueError(f"position {stop - 1} is beyond block_size={block_size}: shorten the text or raise block_size")
    if cache is not None:
        cache.check(starts, B, T)
        cache.begin(starts, T)
    elif any(starts):
        raise ValueError(f"start_pos={start_pos} needs a cache (use_kv_cache=True): without one nothing precedes x")
    with nullcontext() if torch.is_grad_enabled() or not x.is_cuda else sdpa_kernel(ANY_LENGTH):
        yield stop - T + new if alike else torch.tensor(starts, device=x.device)[:, None] + new
    if cache is not None:  # every layer has written: now the new positions count
        cache.filled = [start + T for start in starts]
        if cache.view:
            cache.settle()


# cuDNN's kernel is the fastest, but set up anew for every number of keys: 60 ms on an H200, for each decoded token
ANY_LENGTH = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
LONG = 2**31 - 1  # a length that no text reaches


@dataclass(frozen=True)
class Slots:
    """
    Where a layer keeps positions: each in a slot of its own, for ever. Where a pattern declares others (evict.py),
    positions share slots, and a newer one evicts an older, which no later query can see.
    """

    size: int  # slots of a row
    evicts = False

    @property
    def length(self):
        """How long a text may become."""
        return self.size

    def remembers(self, position, count):
        """Whether all that a query there can see of what lies before it is there, when `count` have been stored."""
        return True


class KVCache:
    """
    k[layer], v[layer]: (batch_size, KV, length, D), zero where a text has not been, allocated by the first pass with
    the dtype and device of its keys, and at that address ever after. KV heads are stored unrepeated: sharing them is
    what makes the cache small (Shazeer 2019). filled: how many positions are stored, one int per row. batch_size: None
    for as many rows as the largest text has had, which then may move to a larger buffer when it starts.

    slots: per layer, where its positions are kept; None for Slots(length). A layer whose heads are kept in different
    ways has several buffers, n_layer apart.

    Not a module, so the buffers are in no state_dict; written detached, so they carry no gradient.
    """

    def __init__(self, batch_size, length, n_layer=1, slots=None):
        self.batch_size, self.n_layer, self.slots = batch_size, n_layer, slots or [Slots(length)] * n_layer
        self.length = min(each.length for each in self.slots)
        self.k, self.v = [None] * len(self.slots), [None] * len(self.slots)
        self.filled = [0] * (batch_size or 0)
        self.most = list(self.filled)  # how far each row has ever come: what lies behind it has taken slots
        self.places = None             # (length,): the positions of the keys, of layers that evict nothing
        self.chunk = {}                # keys and values of the last chunk, of layers that evict
        self.view = None               # the cache whose row this is, and which; it must not wait for a chunk
        self.begin(None, 0)

    def begin(self, starts, T):
        """A pass of T positions begins at starts, one per row; None: only the device knows them."""
        if starts is None and T > 1 and any(slots.evicts for slots in self.slots):
            raise ValueError(f"{T} positions that only the device knows may evict what their first still sees: let one "
                             f"enter at a time, or start at an int")
        self.settle()
        self.stop = LONG if starts is None else max(starts, default=0) + T  # how far a pass reads
        self.starts, self.now = starts, {}
        if starts is None:
            return
        if afresh := [row for row, start in enumerate(starts) if start == 0]:
            self.clear(afresh)
        most = self.most if any(starts) else starts
        self.most = [max(start and n, start + (T == 1)) for start, n in zip(starts, most)]
        self.filled = starts

    def update(self, layer, pos, k, v):
        """
        Store k and v, (B, KV, T, D), at their positions, (T,) or (B, T), and return what attention may read: keys and
        values (B, KV, S, D), and the positions of the keys (S,). With pos (T,) these are all that is stored, the newest
        last; with (B, T) they reach as far as the longest row, and the mask hides what lies in a row's future.
        """
        B, _, T, _ = k.shape
        slots, k, v = self.slots[layer], k.detach(), v.detach()
        if not self._fits(layer, k):
            self._allocate(layer, k)
        if slots.evicts:
            return self._evict(layer, pos, (k, v), (self.k[layer][:B], self.v[layer][:B]))
        keys, values = self.k[layer][:B, :, : self.stop], self.v[layer][:B, :, : self.stop]
        if pos.dim() == 1:
            keys[:, :, self.stop - T :], values[:, :, self.stop - T :] = k, v
        else:
            write(keys, pos, k)
            write(values, pos, v)
        return keys, values, self.places[: self.stop]

    def _evict(self, layer, pos, new, kept):
        """
        update() where positions share slots. All slots are returned, with the positions that they hold, (S,) or (B, S).
        A single position evicts only what it cannot see, so it is written first. A chunk is attended to beside what is
        stored, and evicts when the next pass begins: then all layers have succeeded, and padding or drafts are gone.
        """
        slots, one = self.slots[layer], pos.size(-1) == 1
        if slots not in self.now:  # the same for all layers
            self.now[slots] = slots.held(pos + 1 if one else pos[..., :1])
        if one:
            for buffer, x in zip(kept, new):
                write(buffer, slots.of(pos), x)
            return *kept, self.now[slots]
        self.chunk[layer] = new
        if not any(self.starts):
            return *new, pos
        return *(torch.cat(both, 2) for both in zip(kept, new)), torch.cat([self.now[slots], pos], -1)

    @torch.no_grad()
    def settle(self):
        """Let the last chunk, as much of it as still counts, take its slots."""
        for layer, new in self.chunk.items():
            T, slots, device = new[0].size(2), self.slots[layer], new[0].device
            counts, starts = (torch.tensor(n, device=device)[:, None] for n in (self.filled, self.starts))
            index = slots.held(counts) - starts  # (B, slots): where in the chunk is what they shall hold?
            arrives = ((0 <= index) & (index < T))[:, None, :, None]
            for buffers, x in zip((self.k, self.v), new):
                at = index.clamp(0, T - 1)[:, None, :, None].expand(-1, x.size(1), -1, x.size(3))
                kept = buffers[layer][: len(x)]
                kept.copy_(x.gather(2, at).where(arrives, kept))
        if self.chunk:
            self.most, self.chunk = list(map(max, self.most, self.filled)), {}

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
        if not self.chunk:  # else it has not taken its slots, and what is rewound never will
            self.most = list(map(max, self.most, self.filled))
        for p, n, most in zip(to, self.starts if self.chunk else self.filled, self.most):
            for slots in set(self.slots) if p < n else []:
                if not slots.remembers(p, most):
                    raise ValueError(f"cannot rewind to position {p}: what it sees has been evicted from {slots}")
        self.filled = to

    def clear(self, rows):
        """
        Make zeros of these rows again: what a mask hides is multiplied by 0, and a NaN of an earlier text would stay
        one. (So a text is not to be continued behind numbers that were not finite.)
        """
        self.settle()
        if self.k[0] is not None and len(self.k[0]) <= max(rows):  # batch_size is None, and no text had so many
            self.k, self.v = [None] * len(self.k), [None] * len(self.k)
        at = self._index(rows)
        self._each(lambda x: x.index_fill_(0, at, 0))

    def reorder(self, rows, since=0):
        """
        Row i becomes what row rows[i] was, in place; fewer rows shrink the batch. since: a position before which these
        two are alike, as beams of one prompt are. Raises ValueError if there is no such row, or no room for so many.
        """
        self.settle()
        if len(rows) > (self.batch_size or len(self.filled)) or not all(0 <= r < len(self.filled) for r in rows):
            raise ValueError(f"cannot make rows {rows} of {len(self.filled)} in a cache of {self.batch_size}")
        moved = [i for i, row in enumerate(rows) if i != row]
        evicts = any(slots.evicts for slots in self.slots)
        used = slice(0, LONG) if evicts else slice(since, max(self.filled, default=0))  # slots that differ
        if moved:
            to, source = self._index(moved), self._index([rows[i] for i in moved])
            self._each(lambda x: x[:, :, used].index_copy_(0, to, x[source, :, used]))
        self.filled, self.most = ([counts[row] for row in rows] for counts in (self.filled, self.most))

    @torch.inference_mode(False)  # as in _allocate
    def expand(self, n):
        """Every row n times, side by side, in new buffers: one prefill for several samples or beams."""
        self.settle()
        B = len(self.filled)
        self.k, self.v = self._each(lambda x: x[:B].repeat_interleave(n, 0))
        self.batch_size = n * B
        self.filled, self.most = ([count for count in counts for _ in range(n)] for counts in (self.filled, self.most))

    @torch.inference_mode(False)  # as in _allocate
    def fork(self):
        """A copy that goes its own way."""
        return self._like(self.batch_size, slice(None), torch.Tensor.clone)

    def row(self, i):
        """A view of one row: what is written through it is written here, and counted here by whoever wrote it."""
        if not 0 <= i < len(self.filled):
            raise ValueError(f"there is no row {i} to be viewed: there are {len(self.filled)}")
        other = self._like(1, slice(i, i + 1), lambda x: x[i : i + 1])
        other.view = self, i
        return other

    @property
    def nbytes(self):
        """Bytes reserved, of all layers. A chunk that has not settled is beside them until the next pass."""
        return sum(x.nbytes for x in (*self.k, *self.v) if x is not None)

    def _each(self, function):
        """The function of every buffer, as two lists like k and v."""
        return [[None if x is None else function(x) for x in buffers] for buffers in (self.k, self.v)]

    def _index(self, rows):
        """Rows as an index into every buffer, made once for all: each list handed to a GPU waits until that is idle."""
        return torch.tensor(rows, device=getattr(self.k[0], "device", None))

    def _like(self, batch_size, rows, function):
        self.settle()
        other = type(self)(batch_size, self.length, self.n_layer, self.slots)
        other.k, other.v = self._each(function)
        other.filled, other.most, other.places = self.filled[rows], self.most[rows], self.places
        return other

    def _fits(self, layer, k):
        """Whether keys like k can be stored in the buffers of a layer."""
        kept = self.k[layer]
        return kept is not None and (kept.dtype, kept.device, kept.shape[1::2]) == (k.dtype, k.device, k.shape[1::2])

    @torch.inference_mode(False)  # a buffer born in inference mode could never be written outside it
    def _allocate(self, layer, k):
        if self.view:
            whole, i = self.view
            if not whole._fits(layer, k):
                whole._allocate(layer, k)
            self.k[layer], self.v[layer] = (buffers[layer][i : i + 1] for buffers in (whole.k, whole.v))
            self.places = whole.places
            return
        if any(self.filled):
            was, now = (x if x is None else f"{x.size(1)} heads of {x.size(3)}, {x.dtype}, {x.device}"
                        for x in (self.k[layer], k))
            raise ValueError(f"layer {layer} of the cache holds {was}, but the keys are now {now}: start again at "
                             f"start_pos=0")
        size = self.slots[layer].size
        shape = self.batch_size or max(k.size(0), len(self.filled)), k.size(1), size, k.size(3)
        self.k[layer] = torch.zeros(shape, dtype=k.dtype, device=k.device)
        self.v[layer] = torch.zeros_like(self.k[layer])
        if not self.slots[layer].evicts:
            self.places = torch.arange(size, device=k.device)  # the positions of the keys


def write(buffer, at, x):
    """Put x, (B, KV, T, D), into the slots (T,) or (B, T) of a buffer (B, KV, slots, D)."""
    if at.dim() == 1:
        buffer.index_copy_(2, at, x)
        return
    b = torch.arange(len(x), device=x.device)[:, None]
    buffer[b, :, at] = x.transpose(1, 2)  # (B, T, KV, D), the shape of an indexed write


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
