"""
Slots that positions share. A pattern that need not see everything lets a newer position take the slot of an older one,
which no later query can see: so a cache of a long text stays small, and a step reads little.

Each kind says where a position is kept, what every slot holds, and, before a rewind, whether it can still be undone.
"""

from dataclasses import dataclass

import torch

from attention import NOWHERE
from cache import LONG, Slots


@dataclass(frozen=True)
class Ring(Slots):
    """The first `sinks` positions for ever, and the newest `window` of the others."""

    window: int
    sinks: int = 0
    evicts = True
    length = LONG

    def of(self, pos):
        """The slot of each position."""
        ring = self.sinks + (pos - self.sinks) % self.window
        return torch.where(pos < self.sinks, pos, ring) if self.sinks else ring

    def held(self, count):
        """The position in every slot once `count` are stored: (..., 1) -> (..., size), NOWHERE where there is none."""
        slot = torch.arange(self.size, device=count.device)
        newest = count - 1 - (count - 1 - slot) % self.window  # of those that are slot modulo window
        ring = newest.where(newest >= self.sinks, NOWHERE)
        return torch.where(slot < self.sinks, slot.where(slot < count, NOWHERE), ring) if self.sinks else ring

    def remembers(self, position, count):
        first = max(position - self.window + 1, self.sinks)
        return first >= position or first >= count - self.window


@dataclass(frozen=True)
class Summaries(Slots):
    """The last `columns` positions of every block of `stride` for ever, in front, and one block's others."""

    stride: int
    columns: int
    evicts = True

    @property
    def length(self):
        return (self.size - self.stride + self.columns) // self.columns * self.stride

    def of(self, pos):
        others = self.stride - self.columns
        place = pos % self.stride
        summary = pos // self.stride * self.columns + place - others
        return torch.where(place < others, self.size - others + place, summary)

    def held(self, count):
        others = self.stride - self.columns
        slot = torch.arange(self.size, device=count.device)
        place = slot - (self.size - others)
        newest = count - 1 - (count - 1 - place) % self.stride
        kept = slot // self.columns * self.stride + others + slot % self.columns
        found = torch.where(place >= 0, newest, kept)
        return found.where((0 <= found) & (found < count), NOWHERE)

    def remembers(self, position, count):
        first = position // self.stride * self.stride
        return first == position or self.stride == self.columns or first >= count - self.stride
