"""
The same decode step, compiled: fewer calls, fewer trips to memory, and on a GPU no waiting for the host.

    python generate.py --model gpt2 --prompt "The if statement" --compile
    python bench.py compare --random gpt2 --prompt-tokens 32 --strategies cached,further.compiled:compiled

A plain step asks PyTorch for some three hundred operations, one after the other. But nothing about it ever changes: its
shapes are those of one token, and where that token stands can be a tensor, whose value only the device reads. So one
graph is the step of all requests and lengths. On a CPU it is a graph of tensors (exported.py), of which C++ is made: of
one row, loops and nothing else (reading.py); of several, products that have been tried out on this machine, weights
laid out for them once ("frozen"), and fused what lies between. The most likely id is found inside, and every row goes
on behind it, also one that has ended. On a GPU what a step launches is recorded once, ids are drawn inside as well, and
the host fetches them RUN at a time, after it has asked for the next RUN. Up to 64 rows there, a step of a few small
kernels takes the place of the compiled one (kernels.py, many_rows.py); for more, attention skips what no row sees
(reading.py).

What it costs: the first request compiles, which takes seconds to a minute; rows that have ended are computed on, since
no shape may change; on a CPU a step reads the keys and values of all the room there is. The prompt enters plainly.
"""

import weakref
from copy import copy
from contextlib import contextmanager
from functools import lru_cache, partial
from types import FunctionType

import torch
from torch.nn import functional as F

from attention import NOWHERE
from cache import Memory
from further.exported import Exported, check_compiler
from further.many_rows import kind_of
from further.reading import reading
from generate import advance, encode, project
from plumbing.checks import check_room
from plumbing.utils import captured
from sampling import Chooser, check_finite

RUN = 32    # steps that a GPU is given at once
LEAST = 64  # positions of the shortest buffer there, where every size is recorded anew

# -----------------------------------------------------------------------------
# The step. ids: (B, length + 1) by position; at: (B, 1), where the newest id of each row stands, which is not stored.


def logits_of(model, head, ids, at, cache, memory):
    """(B, V), of what follows the newest id of each row. head: the model's, which may have more rows."""
    source = {} if memory is None else {"memory": memory}
    x = model.features(ids.gather(1, at), cache=cache, start_pos=at, **source)  # (B, 1, C)
    return head(x[:, 0])[:, : model.config.vocab_size]


def write(scores, chosen, ids, at, finite):
    """An id chosen from each row's scores stands behind the newest, which it then is. finite: (B,), if scores were."""
    finite &= scores.amax(-1).isfinite()
    ids.scatter_(1, at + 1, chosen)
    at.add_(1).clamp_(max=ids.size(1) - 2)  # at the end the last id is found again and again


def greedy(model, head, ids, at, cache, memory, finite, n_vocab):
    """The most likely id of each row is written. Returns them, (B, 1)."""
    scores = logits_of(model, head, ids, at, cache, memory)[:, :n_vocab]
    chosen = scores.argmax(-1, keepdim=True)
    write(scores, chosen, ids, at, finite)
    return chosen


class Draws:
    """
    How a recorded step draws its ids. What belongs to a request it finds in tensors, so that one serves all
    temperatures and seeds: the numbers of the choice, and of each row the part of the whole by which it draws what
    stands at a position, (B, length + 1).
    """

    def __init__(self, choose, B, length, device):
        self.choose = copy(choose)
        self.numbers = torch.ones(1 + len(choose.filters), dtype=torch.double, device=device)
        self.parts = torch.ones(B, length + 1, dtype=torch.double, device=device)
        self.choose.temperature, *numbers = self.numbers
        self.choose.filters = [(keep, number) for (keep, _), number in zip(choose.filters, numbers)]

    def enter(self, choose, rows):
        """What follows these rows is drawn as `choose` draws it, who has drawn nothing of it."""
        numbers = [choose.temperature, *(number for _, number in choose.filters)]
        self.numbers.copy_(torch.tensor(numbers, dtype=torch.double))
        length = self.parts.size(1)
        parts = [[1.0] * len(row) + [choose.part(r) for _ in range(length - len(row))] for r, row in enumerate(rows)]
        self.parts.copy_(torch.tensor(parts, dtype=torch.double))

    def __call__(self, logits, ids, at, finite):
        scores = logits.to(torch.promote_types(logits.dtype, torch.float32))
        write(scores, self.choose.draw(scores, self.parts.gather(1, at + 1)), ids, at, finite)


class Steps:
    """The steps of a model with these weights, compiled, and recorded Buffers that no decoding holds at the moment."""

    def __init__(self, model, weights):
        self.idle, head, model = {}, model.lm_head, reading(model)
        self.exported = Exported(model)
        head = aligned(head) if head.weight.is_cuda else head  # a GPU's library does that product better than loops
        fast = lambda step: torch.compile(partial(own(step), model, head), fullgraph=True)
        self.logits, self.greedy = fast(logits_of), fast(greedy)

    @contextmanager
    def compiling(self):
        """
        How a step to be recorded is compiled. torch.compile would give up on a function after so many versions, as on
        one that never settles; here every version is another model, or another number of rows.
        """
        never = dict.fromkeys(["recompile_limit", "accumulated_recompile_limit"], 2**20)
        with torch._dynamo.config.patch(never), torch._inductor.config.patch(combo_kernels=True):
            yield  # what depends on nothing of each other is one kernel


def aligned(head):
    """
    The same with rows of zeros up to a multiple of 64, or a GPU's library has no kernel of this century: GPT-2's 50,257
    take 154 us there, 50,304 take 21.
    """
    if type(head) is not torch.nn.Linear or not head.out_features % 64:
        return head
    rows = -head.out_features % 64
    with torch.inference_mode(False), torch.no_grad():
        new = torch.nn.Linear(head.in_features, head.out_features + rows, head.bias is not None, device="meta")
        new.weight = torch.nn.Parameter(F.pad(head.weight, (0, 0, 0, rows)))
        if head.bias is not None:
            new.bias = torch.nn.Parameter(F.pad(head.bias, (0, rows)))
    return new


def own(function):
    """A copy of a function. What torch.compile makes belongs to the code object, and frozen weights are part of it."""
    return FunctionType(function.__code__.replace(), function.__globals__)


keep = lru_cache(maxsize=2)(Steps)  # the last two: frozen weights take as much memory as a model


def steps(model):
    """Its Steps: other ones when weights or modules have changed, since all of that is part of the code."""
    weights = ((x.data_ptr(), x._version, x.dtype) for x in (*model.parameters(), *model.buffers()))
    numbers = (x for module in model.modules() for name, x in vars(module).items()
               if isinstance(x, int | float | str) and name != "training")  # of which a step knows nothing
    return keep(model, (*model.modules(), *numbers, *weights))


# -----------------------------------------------------------------------------
# What a decoding holds


class Buffers:
    """
    What a decoding of B rows holds while it runs, always at the same addresses: ids and `at`, see above, a cache, and
    the memory, laid out for reading. made: the model's Steps.
    """

    def __init__(self, model, made, B, length, memory):
        self.made, self.once, self.kernels, self.draws, self.arrays = made, None, None, None, None
        device = model.wte.weight.device
        with torch.inference_mode(False):  # what has been made in that mode no exported step may write into
            self.ids = torch.zeros(B, length + 1, dtype=torch.long, device=device)
            self.at = torch.zeros(B, 1, dtype=torch.long, device=device)
            self.finite = torch.ones(B, dtype=torch.bool, device=device)
        self.cache, self.memory = model.new_cache(B, length), memory
        if memory is not None:
            # a CPU's loops sum a source's values number by number: those of all keys lie together, like a matrix's row
            laid = (lambda v: v.mT.contiguous().mT) if device.type == "cpu" else torch.Tensor.contiguous
            kv = [(k.contiguous(), laid(v)) for k, v in memory.kv]  # nobody else has them
            self.memory = Memory(kv, memory.key_pos.clone())

    def record(self, model, choose=None):
        """Run a step on nobody's text, and record it on a GPU. choose: a Chooser, where the step chooses ids."""
        B, width = self.ids.shape
        advance(model, [[0]] * B, self.cache, self.memory)  # so that the cache has its buffers
        for x, axis in self.sized():
            torch._dynamo.maybe_mark_dynamic(x, axis)
        args, kind = (self.ids, self.at, self.cache, self.memory), kind_of(B)
        n_vocab = choose and choose.choice.n_vocab or model.config.vocab_size
        self.draws = Draws(choose, B, width - 1, self.ids.device) if choose and choose.choice.temperature else None
        if choose and kind.fits(model, self.ids, self.cache, self.memory):  # up to 64 rows on a GPU
            step = self.kernels = kind(model, *args, n_vocab, scored=self.draws is not None)
            self.finite = self.kernels.finite
        elif choose and not self.draws:
            step = partial(self.made.greedy, *args, self.finite, n_vocab)
        else:
            step = partial(self.made.logits, *args)
        self.once = (lambda: self.draws(step()[:, :n_vocab], self.ids, self.at, self.finite)) if self.draws else step
        with self.made.compiling():
            self.once()
        if self.ids.is_cuda:
            self.once = captured(self.once)

    def trace(self, model, choose=None):
        """The same on a CPU, where nothing is recorded. The cache has its buffers: the prompts have entered."""
        n_vocab = choose and choose.choice.n_vocab or model.config.vocab_size
        step, more = (greedy, (self.finite, n_vocab)) if choose else (logits_of, ())
        self.arrays = self.ids.numpy(), self.finite.numpy()  # the same memory
        self.once = self.made.exported(step, self.ids, self.at, self.cache, self.memory, more, self.sized())

    def run(self, times):
        """
        So many steps, from where the rows are. times; the ids as they will be then; whether all scores were finite,
        (B,); and what to wait for before looking at either, which are arrays: a GPU may be asked for more until then.
        """
        for _ in range(times):
            self.once()
        found = self.arrays or [x.to("cpu", non_blocking=True).numpy() for x in (self.ids, self.finite)]
        there = torch.cuda.current_stream().record_event().synchronize if self.ids.is_cuda else lambda: None
        return times, *found, there

    def sized(self):
        """All tensors as long as a text or a source, and in which dimension: one graph serves every length."""
        stored = [x for x in (*self.cache.k, *self.cache.v) if x is not None]
        read = [x for pair in self.memory.kv for x in pair] if self.memory else []
        yield self.ids, 1
        yield from ((x, 2) for x in stored + read)
        yield from ((x, x.dim() - 1) for x in (self.cache.places, self.memory and self.memory.key_pos) if x is not None)

    def read(self, memory):
        """The memory of other sources takes the place of what was read."""
        if memory is not None:
            for kept, new in zip(self.memory.kv, memory.kv):
                kept[0].copy_(new[0]), kept[1].copy_(new[1])
            self.memory.key_pos.copy_(memory.key_pos)
            if self.kernels:
                self.kernels.read(self.memory)

    def prefill(self, model, rows, n):
        """
        Prompts enter, n neighbours as one: they do not differ yet. The logits (B, V) of what follows; None where each
        is one id, as a BART's, and a step has been recorded: that is the newest, which the step takes.
        """
        self.finite.fill_(True)
        if self.once and max(map(len, rows)) == 1:
            return self.cache.clear(range(len(rows)))
        self.cache.rewind(0)
        self.cache.reorder(list(range(len(rows) // n)))
        logits = advance(model, rows[::n], self.cache, self.memory)[:, 0]
        self.cache.reorder([row // n for row in range(len(rows))])
        return logits.repeat_interleave(n, 0)

    def enter(self, rows):
        """These are the texts now: the newest id of each, and where it stands."""
        self.at.copy_(torch.tensor([[len(row) - 1] for row in rows]))
        self.ids.scatter_(1, self.at, torch.tensor([row[-1:] for row in rows]).to(self.ids.device))


def bucket(n, most):
    """How large a buffer for n positions is on a GPU: four sizes up to each doubling serve all requests."""
    step = max(LEAST, 1 << (n - 1).bit_length() >> 3)
    return min(most, step * -(-n // step))


def padded(memory, N):
    """A memory with room for N tokens of each source. What is padding stands nowhere."""
    more = N - memory.key_pos.size(-1)
    if not more:
        return memory
    kv = [tuple(F.pad(x, (0, 0, 0, more)) for x in pair) for pair in memory.kv]
    key_pos = memory.key_pos.expand(len(kv[0][0]), -1)
    return Memory(kv, F.pad(key_pos, (0, more), value=NOWHERE))


# -----------------------------------------------------------------------------
# The strategy


class Decoding:
    """A step(rows, which) as generate.py's. The first takes Buffers, which are given back where they are recorded."""

    def __init__(self, model, sources, B, room, choose):
        self.model, self.B, self.choose, self.held, self.running, self.entered = model, B, choose, None, None, False
        self.most = self.room = room
        device = model.wte.weight.device.type
        self.recorded, cuda = device != "cpu", device == "cuda"
        if not self.recorded:
            check_compiler()  # before anything is computed
        self.memory = project(model, *encode(model, sources))
        self.steps = steps(model)  # while a GPU reads the sources
        # asking the host takes time, so the step itself chooses; but rules are about texts, which the host has
        self.inside = (type(choose) is Chooser and not (choose.watch or choose.rules)
                       and (cuda or not self.recorded and choose.choice.temperature == 0))
        if cuda:
            self.room = bucket(room, model.config.block_size)
        if self.memory:
            n = self.memory.key_pos.size(-1)  # one would not be a length like others to who traces a CPU's step
            self.memory = padded(self.memory, bucket(n, model.config.block_size) if cuda else max(n, 2))

    def take(self, B):
        shape = self.memory and (len(self.memory.kv[0][0]), *self.memory.key_pos.shape)
        way = ()  # what of a choice is recorded, not its numbers
        if self.inside:
            choice = self.choose.choice
            way = choice.n_vocab, choice.temperature > 0, choice.top_k, *(keep for keep, _ in self.choose.filters)
        idle = self.steps.idle.setdefault((B, self.room, shape, self.inside, way), [])
        if idle:
            self.buffers = idle.pop()
            self.buffers.read(self.memory)
        else:
            self.buffers = Buffers(self.model, self.steps, B, self.room, self.memory)
            if self.recorded:
                self.buffers.record(self.model, self.choose if self.inside else None)
        if self.buffers.ids.is_cuda:  # elsewhere nothing depends on where they are
            weakref.finalize(self, idle.append, self.buffers)

    @torch.inference_mode()
    def __call__(self, rows, which):
        if self.held is None:
            self.held = list(rows)
            self.take(len(rows))
            logits = self.buffers.prefill(self.model, rows, len(rows) // self.B)
            if logits is not None:
                return self.choose(logits, rows, which)
        for r, row in zip(which, rows):
            self.held[r] = row  # rows that have ended are held as well: they find what they have found
        buffers = self.buffers
        if buffers.once is None:  # on a CPU, whose first tokens need not wait for the compiler
            buffers.trace(self.model, self.choose if self.inside else None)
        if not self.inside or not self.entered:
            buffers.enter(self.held)
            self.entered = True
            if buffers.draws:
                buffers.draws.enter(self.choose, self.held)
        if not self.inside:
            logits = buffers.once()
            every = which == list(range(len(logits)))  # then nothing need be copied
            return self.choose(logits if every else logits[which], rows, which)
        times, ids, finite, there = self.running or buffers.run(1)  # so that there is something to be read soon
        if self.recorded:
            self.launch(self.most - min(map(len, rows)) - times)
        there()
        check_finite(finite[r] for r in which)
        return [ids[r, len(row) : len(row) + times].tolist() for r, row in zip(which, rows)]

    def launch(self, left):
        """The next run, if there is something left to be found: it takes the place of the one before."""
        self.running = self.buffers.run(min(RUN, left)) if left > 0 else None


def compiled(model, sources, B, room, choose):
    """A strategy, as in generate.py."""
    check_room(choose, room)
    return Decoding(model, sources, B, room, choose)
