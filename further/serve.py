"""
Many prompts through few rows: continuous batching (Yu et al. 2022, Orca).

    python generate.py --model out/gpt-tiny --prompts prompts.txt --batch-size 8

Texts end at different steps, and a batch that shrinks reads all weights for the few that are left. Here whoever waits
takes the row of a text that has ended, while the others go on. That is a strategy like others: a step finds an id for
as many texts as there are rows, and none for those that wait, so loop, ends and choice are those of generate.py.

Of a prompt all but the last id enter alone in their row (others would be padded to their length), the last one beside
the newest ids of the others. So a text costs prompt + new - 1 positions, whoever stands beside it.

Beams take many rows for a prompt, so there batch_size prompts are searched, and then the next ones.
"""

import json
from functools import partial

import torch
from torch.nn import functional as F
from tqdm import tqdm

from attention import NOWHERE
from cache import Memory
from further.beam import beam_stream
from generate import advance, asking, encode, pad, project, stream
from plumbing.checks import check_caches, check_count, check_room, prepare
from plumbing.errors import naming


def continuous(model, sources, B, room, choose, batch_size=None):
    """A strategy, see generate.py, of batch_size rows, None for B. Raises UserError if their caches need too much."""
    check_room(choose, room)
    width, longest = min(batch_size or B, B), max(map(len, sources or [[]]))
    check_caches(f"batch_size={width}: keys and values of so many rows", "choose a smaller one or shorter texts", model,
                 width, room, longest)
    cache, memory, held = model.new_cache(width, room), None, [None] * width  # held: whose text is in each row
    asked = asking(B)

    def enter(i, source, text):
        """A text of this source begins in row i: all of it but the last id."""
        nonlocal memory
        own = project(model, *encode(model, sources and [sources[source]]))
        if own:
            wide = widened(own, longest)
            memory = memory or wide.take([0] * width)
            place(memory, i, wide)
        if len(text) > 1:
            source = {"memory": own} if own else {}
            model.features(pad([text[:-1]], model.wte.weight.device), cache=cache.row(i), start_pos=0, **source)
        cache.filled[i] = len(text) - 1

    @torch.inference_mode()
    def step(rows, which):
        nonlocal memory, held
        source = dict(zip(which, asked(which)))
        texts = dict(zip(which[: len(held)], rows))  # those that go on, and those that have waited longest
        waiting = [r for r in texts if r not in held]
        for i, r in enumerate(held):
            if r not in texts and waiting:
                held[i] = waiting.pop(0)
                enter(i, source[held[i]], texts[held[i]])
        kept = [i for i, r in enumerate(held) if r in texts]
        if len(kept) < len(held):  # nobody waits any more
            cache.reorder(kept)
            memory, held = memory and memory.take(kept), [held[i] for i in kept]
        rows = [texts[r] for r in held]
        found = dict(zip(held, choose(advance(model, rows, cache, memory)[:, 0], rows, held)))
        return [found.get(r, []) for r in which]

    return step


def widened(memory, N):
    """The memory of a source among those of N tokens: what is added stands nowhere."""
    more = N - memory.key_pos.size(0)
    kv = [tuple(F.pad(x, (0, 0, 0, more)) for x in both) for both in memory.kv]
    return Memory(kv, F.pad(memory.key_pos, (0, more), value=NOWHERE)[None])


def place(memory, i, own):
    """Row i of a memory becomes a source of its width."""
    for kept, new in zip([*sum(memory.kv, ()), memory.key_pos], [*sum(own.kv, ()), own.key_pos]):
        kept[i] = new[0]


def serve(model, prompts, max_new_tokens, *, batch_size=8, **options):
    """
    generate() for any number of prompts, batch_size of them at a time: an iterator of (number of the prompt, its new
    ids) as they end, the ids that generate() gives. options: those of generate(); or, with beams, of beam_search(),
    whose best text and its score then follow the number. Raises UserError if the request is not possible, before
    anything is computed.
    """
    if "beams" in options:
        texts = beam_stream(model, prompts, max_new_tokens, batch_size=batch_size, **options)
        return ((r, ids, score) for r, [(score, ids), *_] in enumerate(texts))
    check_count("batch_size", batch_size)
    return ended(stream(model, prompts, max_new_tokens, strategy=partial(continuous, batch_size=batch_size), **options))


def ended(steps):
    """From the steps of stream(), pairs (number, ids) of texts that have ended."""
    begun = {}
    for found in steps:
        for r, ids in enumerate(found):
            if ids:
                begun.setdefault(r, []).extend(ids)
            elif r in begun:  # who has begun does not wait
                yield r, begun.pop(r)
    yield from begun.items()


def command(request):
    """What generate.py does with --prompts: JSON lines in the order of the file, each as soon as it is known."""
    model, asked, done, shown = request.model, list(request.lines.values()), {}, 0
    starts = [one.begun for one in asked] if model.config.is_encoder_decoder else None
    for r, name in enumerate(request.lines):
        with naming(name):
            prepare(model, [asked[r].ids], asked[r].max_new_tokens, starts and [starts[r]])
    texts = serve(model, [one.ids for one in asked], [one.max_new_tokens for one in asked], decoder_prompts=starts,
                  **request.options)
    with tqdm(total=len(asked), unit="prompt", dynamic_ncols=True, disable=None) as bar:
        for r, *found in texts:
            done[r] = asked[r].said(*found)
            bar.update()
            while shown in done:
                with bar.external_write_mode():
                    print(json.dumps(done.pop(shown)), flush=True)
                shown += 1
