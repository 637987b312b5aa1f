"""
Random histories of a decoding: whatever its rows went through, what comes next is what one uncached pass says.

A schedule mixes chunks, ragged passes, rewinds, reorders, rows that leave, multiply, begin afresh or go on alone, forks,
and passes that fail or are refused. Beside the cache the rows are kept as plain lists of ids, which are the truth.
"""

import copy
import os
import random

import pytest
import torch

from attention import attend_explicit, dense
from generate import advance
from model import BART, GPT, BARTConfig, GPTConfig
from sparse import Sparse, Split, TopK
from test_model import random_sizes, rough

MAX_ROWS = 6
PARTS = [["local:{}", "full", "column:{}"], ["block:{}", "columns:{},2", "columns:{},1", "full"], ["sinks:2,{}", "strided:{}", "topk:{},2"],
         ["local:{}", "sinks:1,{}", "fixed:{},1", "fixed:{},2", "strided:{}", "column:{}", "topk:{},1", "block:{}"]]


def random_pattern(rng, sizes):
    """A pattern for all layers; where heads can be split, often another for each part of them."""
    parts = rng.choice([1, 1, 2, 3])
    if (sizes["n_kv_head"] or sizes["n_head"]) % parts:
        parts = 1
    return "+".join(rng.choice(rng.choice(PARTS)).format(rng.randint(2, min(5, sizes["block_size"]))) for _ in range(parts))


class Masked(torch.nn.Module):
    """What a pattern is by definition: everything is scored, and the predicate hides."""

    def __init__(self, pattern):
        super().__init__()
        self.pattern = pattern

    def forward(self, q, k, v, query_pos, key_pos):
        return attend_explicit(q, k, v, dense(self.pattern.allows, query_pos, key_pos, q.size(1)))[0]


def masked(model):
    """The model with every sparse pattern as its mask, but for those that no predicate over positions defines."""
    model = copy.deepcopy(model)
    for layer in model.decoder_layers():
        if isinstance(layer.attn.pattern, Sparse | Split) and not any(isinstance(m, TopK) for m in layer.attn.pattern.modules()):
            layer.attn.pattern = Masked(layer.attn.pattern)
    return model


class Schedule:
    def __init__(self, seed, kind, sparse=False):
        self.rng = rng = random.Random(f"{kind} {seed}")
        torch.manual_seed(seed)
        sizes = random_sizes(rng) | {"block_size": rng.randint(6, 24)}
        if sparse:
            sizes["pattern"] = random_pattern(rng, sizes)
        if kind == "gpt":
            self.model = GPT(GPTConfig(n_layer=rng.randint(1, 3), **sizes))
        else:
            if sparse and sizes["n_head"] % 2 == 0:
                sizes["n_cross_kv_head"] = rng.choice([None, 1, 2])
            self.model = BART(BARTConfig(n_encoder_layer=1, n_decoder_layer=rng.randint(1, 3), **sizes))
        self.model = rough(self.model).train()  # as if somebody trained it meanwhile
        for parameter in self.model.parameters():
            parameter.requires_grad_(False)
        self.masked = masked(self.model) if sparse else self.model
        B, self.V, self.length = rng.randint(1, 3), sizes["vocab_size"], sizes["block_size"] - rng.randint(0, 2)
        n = rng.choice([1, 1, 2]) if kind == "bart" else 1  # rows of one source
        self.rows, self.memory, self.sources = [[] for _ in range(n * B)], None, None
        self.cache = self.model.new_cache(n * B, self.length)
        if kind == "bart":
            self.sources = [self.ids(rng.randint(1, 6)) for _ in range(B)]
            lengths = torch.tensor([len(source) for source in self.sources])
            padded = torch.tensor([source + [0] * (6 - len(source)) for source in self.sources])
            with torch.no_grad():
                self.memory = self.model.project(self.model.encode(padded, lengths), lengths)
        self.twins = []  # forks that wait: what they are is looked at in the end
        self.compared, self.worst, self.refusals = 0, 0.0, 0

    def ids(self, n):
        return [self.rng.randrange(self.V) for _ in range(n)]

    @torch.no_grad()
    def truth(self, rows):
        """The logits (T, V) of every row, each alone and uncached."""
        n = len(rows) // len(self.sources or rows)  # neighbouring rows ask one source
        given = [[torch.tensor([self.sources[r // n]])] if self.sources else [] for r in range(len(rows))]
        return [self.masked(*source, torch.tensor([row]))[0] if row else None for source, row in zip(given, rows)]

    def grow(self, widths, last):
        """New ids for every row, so many, and the last logits of each compared with the truth."""
        grown = [row + self.ids(n) for row, n in zip(self.rows, widths)]
        logits = advance(self.model, grown, self.cache, self.memory, last)
        for row, true in enumerate(self.truth(grown)):
            self.worst = max(self.worst, (logits[row] - true[-last:]).abs().max().item())
            self.compared += last
        self.rows = grown
        assert self.cache.filled == [len(row) for row in grown]

    def room(self):
        return self.length - max(map(len, self.rows))  # padding needs room as well

    def chunk(self):
        if room := self.room():
            T = self.rng.randint(1, room)
            self.grow([T] * len(self.rows), self.rng.randint(1, T))

    def ragged(self):
        if room := self.room():
            self.grow([self.rng.randint(1, min(room, 5)) for _ in self.rows], 1)

    def step(self):
        if self.room():
            self.grow([1] * len(self.rows), 1)

    def fail(self):
        """A pass that breaks in some layer has done nothing."""
        if room := self.room():
            layer = self.rng.choice(list(self.model.decoder_layers()))
            handle = layer.mlp.register_forward_pre_hook(lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                advance(self.model, [row + self.ids(self.rng.randint(1, room)) for row in self.rows], self.cache, self.memory)
            handle.remove()

    def rewind(self):
        to = [self.rng.randint(0, len(row)) for row in self.rows]
        if self.rng.random() < 0.3:
            to = [min(to)] * len(to)
        before = list(self.cache.filled)
        try:
            self.cache.rewind(to if self.rng.random() < 0.7 or len(set(to)) > 1 else to[0])
        except ValueError as error:
            assert "evicted" in str(error) and self.cache.filled == before
            self.refusals += 1
            return
        self.rows = [row[:n] for row, n in zip(self.rows, to)]

    def reorder(self):
        """Rows become others, within their source: as beams do."""
        n = len(self.rows) // (len(self.sources) if self.memory else 1)
        rows = [self.rng.randrange(r // n * n, r // n * n + n) for r in range(len(self.rows))]
        self.cache.reorder(rows)
        self.rows = [self.rows[r] for r in rows]

    def shrink(self):
        """Sources leave, with all their rows, and the others move together, or a source is asked twice."""
        sources = len(self.sources) if self.memory else len(self.rows)
        n = len(self.rows) // sources
        kept = [self.rng.randrange(sources) for _ in range(self.rng.randint(1, sources))]
        rows = [s * n + i for s in kept for i in range(n)]
        self.cache.reorder(rows)
        self.rows = [self.rows[r] for r in rows]
        if self.memory:
            self.memory, self.sources = self.memory.take(kept), [self.sources[s] for s in kept]

    def expand(self):
        n = self.rng.randint(1, 3)
        if n * len(self.rows) <= MAX_ROWS:
            self.cache.expand(n)
            self.rows = [list(row) for row in self.rows for _ in range(n)]

    def fork(self):
        twin = self.cache.fork()
        here = self.cache, self.rows
        if self.rng.random() < 0.5:
            twin, here = here[0], (twin, self.rows)
        self.twins.append((twin, [list(row) for row in self.rows], self.memory, self.sources))
        self.cache, self.rows = here

    def alone(self):
        """One row goes on through a view of it; whoever wrote there counts."""
        r = self.rng.randrange(len(self.rows))
        if len(self.rows[r]) < self.length:
            grown = self.rows[r] + self.ids(self.rng.randint(1, min(4, self.length - len(self.rows[r]))))
            memory = self.memory and self.memory.take([r * len(self.sources) // len(self.rows)])
            view = self.cache.row(r)
            logits = advance(self.model, [grown], view, memory)
            self.cache.filled[r], self.rows[r] = view.filled[0], grown
            self.worst = max(self.worst, (logits[0, 0] - self.truth(self.rows)[r][-1]).abs().max().item())
            self.compared += 1

    def afresh(self):
        """Some rows begin another text while the others go on."""
        if room := self.room():
            begun = [[] if self.rng.random() < 0.5 else row for row in self.rows]
            T = self.rng.randint(1, room)
            grown = [row + self.ids(T) for row in begun]
            with torch.no_grad():
                given = {"memory": self.memory} if self.memory else {}
                x = self.model.features(torch.tensor([row[-T:] for row in grown]), cache=self.cache,
                                        start_pos=[len(row) for row in begun], **given)
            for own, true in zip(self.model.lm_head(x), self.truth(grown)):
                self.worst = max(self.worst, (own - true[-T:]).abs().max().item())
                self.compared += T
            self.rows = grown

    def refused(self):
        """A gap, an overflow or a negative position in any row is refused, and nothing happens."""
        starts = list(self.cache.filled)
        starts[self.rng.randrange(len(starts))] += self.rng.choice([1, -len(self.cache.k) - 30, 2])
        before = list(self.cache.filled)
        idx = torch.zeros(len(starts), 1, dtype=torch.long)
        with pytest.raises(ValueError, match="start_pos=|position"):
            self.model.features(idx, cache=self.cache, start_pos=starts)
        assert self.cache.filled == before

    def run(self, n):
        operations = [self.chunk, self.ragged, self.ragged, self.step, self.step, self.fail, self.rewind, self.reorder,
                      self.shrink, self.expand, self.fork, self.alone, self.refused, self.afresh]
        for operation in self.rng.choices(operations, k=n):
            operation()
        for self.cache, self.rows, self.memory, self.sources in [
                *self.twins, (self.cache, self.rows, self.memory, self.sources)]:
            self.step()
        return self.compared, self.worst


@pytest.mark.parametrize("kind", ["gpt", "bart"])
@pytest.mark.parametrize("block", range(5))
def test_a_hundred_random_schedules_equal_uncached_passes(block, kind):
    compared = 0
    for seed in range(20 * block, 20 * block + 20):
        n, worst = Schedule(seed, kind).run(16)
        assert worst <= 1e-10, f"seed {seed}"
        compared += n
    assert compared > 350  # so many positions were looked at


@pytest.mark.parametrize("kind", ["gpt", "bart"])
def test_sparse_patterns_go_through_the_same_and_equal_their_masks(kind):
    """MINDECODE_CASES=500 for a long run; rewinds to what has been evicted are refused, and change nothing."""
    compared = refused = 0
    for seed in range(int(os.environ.get("MINDECODE_CASES", 40))):
        schedule = Schedule(1000 + seed, kind, sparse=True)
        n, worst = schedule.run(16)
        assert worst <= 1e-10, f"seed {1000 + seed}: {schedule.model.config.pattern}"
        compared, refused = compared + n, refused + schedule.refusals
    assert compared > 350 and refused > 5
