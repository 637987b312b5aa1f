"""
Generate text: one loop, and three ways to make its step cheap.

    python generate.py --model out/gpt-tiny --prompt "The if statement"
    python generate.py --model out/bart-headline --prompt-file article.txt
    echo "The for statement" | python generate.py --model out/gpt-tiny -

The loop never changes: it appends what a step finds for every row, an id or several. A *strategy* is a step:

    naive     run the whole model on the whole text, for every token
    hoisted   (BART) encode the source once, run the decoder on the whole target for every token
    cached    keep keys and values: what is not stored yet enters, first the prompt (prefill), then the newest token

All three give the same logits; they differ in what stands before the step. Ragged batches are the normal case: rows are
padded on the right, and every row decodes at its own position. Padding lies in a row's future, so causality hides it.
"""

import json
import sys
import time
from array import array
from importlib import import_module
from statistics import median

from plumbing.errors import UserError, guard_imports, run

if __name__ == "__main__":
    guard_imports()  # torch's take seconds

import torch

import cost
from plumbing.checks import check_count, check_forced, check_ids, for_each, prepare
from plumbing.utils import find_own
from sampling import Choice, Chooser

# -----------------------------------------------------------------------------
# A pass over ragged rows


def pad(rows, device, value=0):
    """Lists of ids as a tensor (B, longest), padded on the right with value."""
    width = max(map(len, rows))
    ids = array("q", [i for row in rows for i in (*row, *[value] * (width - len(row)))])  # 64 bits, as torch reads them
    return torch.frombuffer(ids, dtype=torch.long).view(len(rows), width).to(device)


@torch.inference_mode()
def advance(model, rows, cache=None, memory=None, last=1):
    """
    Let what is not stored yet of each row enter the model: a prompt, a token, a chunk, a turn of a conversation;
    without a cache everything. Returns the logits (B, last, V) of the last positions of each row: no others pass
    through the output head. rows: B lists of ids; what is stored of one must be its beginning, so who changes his mind
    rewinds.

    cache, memory: from model.new_cache() and BART's model.project(). Raises ValueError if a row has fewer than `last`
    ids that are not stored, or where the cache does.
    """
    stored = cache.filled if cache else [0] * len(rows)
    new = [row[n:] for row, n in zip(rows, stored)]
    if len(stored) != len(rows) or min(map(len, new), default=0) < max(last, 1):
        raise ValueError(f"{last} new ids of every row are needed; of {len(stored)} rows {[len(ids) for ids in new]} "
                         f"ids are not stored yet: pass more, or rewind")
    idx = pad(new, model.wte.weight.device)  # (B, T)
    source = {} if memory is None else {"memory": memory}
    x = model.features(idx, cache=cache, start_pos=stored if cache else 0, **source)  # (B, T, C)
    if len(set(map(len, new))) > 1:  # padding stands behind the end of some
        ends = torch.tensor([range(len(ids) - last, len(ids)) for ids in new], device=idx.device)  # (B, last)
        x = x[torch.arange(len(rows), device=idx.device)[:, None], ends]
        if cache:  # it was stored as well: it is forgotten
            cache.rewind([len(row) for row in rows])
    return model.lm_head(x[:, x.size(1) - last :])


@torch.inference_mode()
def encode(model, sources):
    """B sources, lists of ids, as the arguments of project(): what the encoder made of them, and their lengths."""
    if sources is None:  # a GPT
        return None, None
    lengths, device = [len(source) for source in sources], model.wte.weight.device
    lengths = torch.tensor(lengths, device=device) if len(set(lengths)) > 1 else None  # None: nothing is padded
    return model.encode(pad(sources, device, model.config.pad_id), lengths), lengths


@torch.inference_mode()
def project(model, encoded, lengths):
    return None if encoded is None else model.project(encoded, lengths)


# -----------------------------------------------------------------------------
# The strategies. Each makes a step(rows, which) -> the new ids of each row, one or more, none if it waits. rows: lists
# of ids, the texts so far; which: their numbers in the request, in order, because rows that have ended leave the batch.
# sources: None for a GPT. B: prompts; the first step has all rows, n for each prompt, neighbours. room: positions of
# the longest row when it is complete. choose: a Chooser.


def windows(model, rows):
    """
    What the model sees of each text: all of it, or, of one longer than block_size, what is left when its first
    block_size // 2 tokens have been forgotten, as often as needed. What is left stands at the positions from 0 on.
    """
    size = model.config.block_size
    half = max(1, size // 2)
    return [row if len(row) <= size else row[-((size - len(row)) // half) * half :] for row in rows]


def asking(B):
    """Of the rows' numbers, first of all of them: which of B sources each row asks."""
    n = None

    def asked(which):
        nonlocal n
        n = n or which[-1] // B + 1  # rows of one source
        return [r // n for r in which]

    return asked


def naive(model, sources, B, room, choose):
    asked = asking(B)

    def step(rows, which):
        memory = project(model, *encode(model, sources and [sources[s] for s in asked(which)]))
        return choose(advance(model, windows(model, rows), None, memory)[:, 0], rows, which)

    return step


def hoisted(model, sources, B, room, choose):
    (encoded, lengths), asked = encode(model, sources), asking(B)

    def step(rows, which):
        own = asked(which)
        memory = project(model, encoded[own], None if lengths is None else lengths[own])
        return choose(advance(model, windows(model, rows), None, memory)[:, 0], rows, which)

    return step


def cached(model, sources, B, room, choose, cache=None):  # cache: an empty one, of another kind than the model's
    memory, cache = project(model, *encode(model, sources)), cache or model.new_cache(B, room)
    asked, held, kept = asking(B), list(range(B)), list(range(B))  # rows of the cache, and of the memory

    def step(rows, which):
        nonlocal memory, held, kept
        needed, texts = shared(asked(which)), windows(model, rows)
        if len(which) < len(held):  # some have ended: the others move together
            cache.reorder([held.index(r) for r in which])
        if needed != kept:
            memory = memory and memory.take([kept.index(s) for s in needed])
        held, kept, n = which, needed, len(rows) // len(cache.filled)  # samples of a prompt are one until they differ
        restart(model, texts, cache, memory)
        logits = advance(model, texts[::n], cache, memory)[:, 0]
        if n > 1:
            cache.expand(n)
            logits = logits.repeat_interleave(n, 0)
        return choose(logits, rows, which)

    return step


def shared(asked):
    """The sources that rows ask: each one once if it has as many rows as the others, neighbours; else one per row."""
    once = list(dict.fromkeys(asked))
    return once if asked == [s for s in once for _ in range(len(asked) // len(once))] else asked


def restart(model, texts, cache, memory):
    """Texts whose window has moved, so that nothing stored stands where it did, enter again, but for the newest id."""
    moved = [i for i, (text, stored) in enumerate(zip(texts, cache.filled)) if len(text) <= stored]
    if len(moved) == len(texts):
        return cache.rewind(0)  # all of them in the pass that follows
    for i in moved:
        row = cache.row(i)
        row.rewind(0)
        advance(model, [texts[i][:-1]], row, memory and memory.take([i * len(memory.kv[0][0]) // len(texts)]))
        cache.filled[i] = row.filled[0]


def strategies(model):
    """The strategies that a model has, the most wasteful first."""
    if model.config.is_encoder_decoder:
        return {"naive": naive, "hoisted": hoisted, "cached": cached}
    return {"naive": naive, "cached": cached}


def find_strategy(model, name):
    """
    The strategy of that name: one that the model has, or MODULE:FUNCTION for one of your own, whose module is imported
    only here. A function is a strategy already. Raises UserError, naming what there is, if there is none.
    """
    known = strategies(model)
    if callable(name) or name in known:
        return known.get(name, name)
    if ":" not in str(name):
        raise UserError(f"strategy={name!r} is not one of those this model has: {', '.join(known)}; one of your own "
                        f"is MODULE:FUNCTION")
    return find_own("strategy", name)


# -----------------------------------------------------------------------------
# The loop


def loop(step, rows, limits, ended):
    """
    The loop: whatever the step, append what it found. limits: the length at which each row is complete; ended: a row's
    number and its ids so far -> whether it is complete before; asked after every id. Yields B lists of new ids, empty
    for a row that has ended.
    """
    rows, alive = [list(row) for row in rows], list(range(len(rows)))
    while alive:
        found, going = [[] for _ in rows], []
        for r, ids in zip(alive, step([rows[r] for r in alive], alive)):
            for i in ids:  # one, or several if the step is speculative
                rows[r].append(i)
                found[r].append(i)
                if len(rows[r]) == limits[r] or ended(r, rows[r]):
                    break
            else:
                going.append(r)
        alive = going
        yield found


def ends_with(stop, vocab_size):
    """Of a row's new ids: whether they end with one of these sequences. What is such a function is itself."""
    if callable(stop):
        return stop
    stop = list(stop)
    check_ids("stop", stop, vocab_size)
    return lambda new: any(new[-len(ids) :] == list(ids) for ids in stop)


def stream(model, prompts, max_new_tokens, *, strategy="cached", decoder_prompts=None, ignore_eos=False, num_samples=1,
           stop=(), overflow="refuse", speculate=None, **choice):
    """
    generate(), one step at a time: an iterator of B * num_samples lists of new ids, empty for a row that has ended.
    Whatever is wrong with the request is found out here, before anything is computed.
    """
    make = find_strategy(model, strategy)
    if speculate is not None:
        make = import_module("further.speculate").find(model, speculate, strategy, overflow)
    sources, rows = prepare(model, prompts, max_new_tokens, decoder_prompts, overflow)
    check_count("num_samples", num_samples)
    ends = [] if ignore_eos else model.config.end_ids
    check_forced(choice, model.config)
    most = [n for n in for_each(max_new_tokens, rows) for _ in range(num_samples)]
    B, rows = len(rows), [row for row in rows for _ in range(num_samples)]
    starts, stopped = list(map(len, rows)), ends_with(stop, model.config.vocab_size)
    limits = [start + n for start, n in zip(starts, most)]
    choose = Chooser(Choice(**choice), model.wte.weight.device, ends, limits)
    if not rows:
        return iter(())
    step = make(model, sources, B, min(max(limits), model.config.block_size), choose)
    return loop(step, rows, limits, lambda r, row: row[-1] in ends or stopped(row[starts[r] :]))


def generate(model, prompts, max_new_tokens, **options):
    """
    The new ids of each row: B * num_samples lists, those of one prompt side by side, each up to and including the row's
    end-of-sequence id, or the stop that ended it, no padding.

    prompts: B lists of ids, of any lengths: texts to continue for GPT, sources for BART (whose decoder starts from
    config.start_id, then the row of decoder_prompts, if given). A source must fit block_size; so must prompt +
    max_new_tokens, for BART 1 + decoder prompt + max_new_tokens, unless overflow="slide": see windows(). The cached
    strategy then computes what it still sees again, every block_size // 2 tokens; rules of Choice go on seeing all.
    max_new_tokens: one number, or a list with one for each prompt. strategy: see the top of this file; all give the
    same tokens; one of your own will do as well, see find_strategy(). ignore_eos: an end of sequence ends no row. stop:
    sequences of ids, one of which ends a row when it stands at the end of its new ids; or a function of these that says
    whether they are complete, as plumbing.tokenizers.Stops is for texts. num_samples: rows from each prompt, which the
    cached strategy lets enter once for all of them. speculate: "lookup", plumbing.examples.Examples, or a small
    model that guesses: several tokens from one pass, and the same texts, see further/speculate.py. The other options
    are fields of Choice: temperature=0.0 (greedy), top_k, seed and so on.

    The model may be in train mode and in use elsewhere, in other threads too: nothing of a decoding is kept on it, and
    there is no dropout where no gradients are recorded. Raises UserError (a ValueError) if the request is not possible,
    before anything is computed; NonFiniteError if the logits are no numbers.
    """
    rows = []
    for found in stream(model, prompts, max_new_tokens, **options):
        rows = rows or [[] for _ in found]
        for row, ids in zip(rows, found):
            row += ids
    return rows


# -----------------------------------------------------------------------------
# The command line

def write_text(request):
    """Generate and print: one sample as it comes, several, which are one batch, at the end. Returns ids and seconds."""
    live = request.num_samples == 1 and request.live
    say = (lambda text: print(text, end="", flush=True)) if live else (lambda text: None)
    rows, seconds, decoder, passes = [[] for _ in range(request.num_samples)], [], request.decoder(), 0
    start = time.perf_counter()
    steps = stream(request.model, *request.batch(), **request.options)
    say(request.shown)
    for found in steps:
        seconds.append(time.perf_counter() - start)
        start += seconds[-1]
        passes += sum(map(bool, found))  # of a row
        for row, ids in zip(rows, found):
            row += ids
        say("".join(map(decoder.push, found[0])))
    say(decoder.flush() + "\n")
    for n, row in enumerate([] if live else rows):
        said = request.said(row)
        print(json.dumps(said) if request.json else ("---\n" if n else "") + request.shown + said["text"])
    if "speculate" in request.options:
        new = sum(map(len, rows))
        print(f"{new} new tokens in {passes} passes: {new / passes:.2f} each", file=sys.stderr)
    return rows, seconds


def show_stats(request, rows, seconds):
    """What the generation took, on stderr."""
    config, N, begun = request.model.config, len(request.ids), len(request.begun)
    strategy = request.options.get("strategy", "cached")
    kept, longest = "", config.starts(N) + begun + request.max_new_tokens
    S = min(longest, config.block_size)  # what slides fills a block
    if strategy in cost.FORMULAS:  # what one of your own keeps is not known
        predicted = cost.predict(config, strategy, N, request.max_new_tokens - (longest - S), len(rows),
                                 request.model.wte.weight.element_size(), begun)
        kept = f"; cache of {S} positions, {predicted['self_cache_bytes']:,} bytes"
    later = seconds[1:] or [0.0]  # of which the first may compile: a median tells what the others take
    print(f"{N} prompt tokens, first token after {1e3 * seconds[0]:.1f} ms; {sum(map(len, rows))} new tokens, "
          f"{1e3 * median(later):.2f} ms per step after it{kept}", file=sys.stderr)


# techniques that write the text in another way, and their modules, which are imported only then
FURTHER = {"beams": "further.beam", "chat": "further.session", "prompts": "further.serve"}


def main(args=None):
    from plumbing import cli  # here: who imports the loop needs no command line
    request = cli.read(cli.parse(__doc__, args))
    if request.technique:
        return import_module(FURTHER[request.technique]).command(request)
    rows, seconds = write_text(request)
    if request.stats:
        show_stats(request, rows, seconds)


if __name__ == "__main__":
    run(main)
