"""
Generate text: one loop, and three ways to make its step cheap.

    python generate.py --model out/gpt-tiny --prompt "The if statement"
    python generate.py --model out/bart-headline --prompt-file article.txt
    echo "The for statement" | python generate.py --model out/gpt-tiny -

The loop never changes: a step finds the next id of every row, and it is appended. A *strategy* is a step:

    naive     run the whole model on the whole text, for every token
    hoisted   (BART) encode the source once, run the decoder on the whole target for every token
    cached    keep keys and values: what is not stored yet enters, first the prompt (prefill), then the newest token

All three give the same logits; they differ in what stands before the step. Ragged batches are the normal case: rows are
padded on the right, and every row decodes at its own position. Padding lies in a row's future, so causality hides it.
"""

import json
import sys
import time
from importlib import import_module
from inspect import isfunction

from plumbing.errors import UserError, guard_imports, run

if __name__ == "__main__":
    guard_imports()  # torch's take seconds

import torch

import cost
from sampling import Choice, Chooser

# -----------------------------------------------------------------------------
# A pass over ragged rows


def pad(rows, device, value=0):
    """Lists of ids as a tensor (B, longest), padded on the right with value."""
    width = max(map(len, rows))
    return torch.tensor([[*row, *[value] * (width - len(row))] for row in rows], dtype=torch.long, device=device)


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
    if cache and len(set(map(len, new))) > 1:  # padding was stored as well: it is forgotten
        cache.rewind([len(row) for row in rows])
    ends = torch.tensor([range(len(ids) - last, len(ids)) for ids in new], device=idx.device)  # (B, last)
    return model.lm_head(x[torch.arange(len(rows), device=idx.device)[:, None], ends])


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
# The strategies. Each makes a step(rows, which) -> the new ids of each row, one or more. rows: lists of ids, the texts
# so far; which: their numbers in the request, in order, because rows that have ended leave the batch. sources: None for
# a GPT. room: the length of the longest row when it is complete. choose: a Chooser.


def naive(model, sources, B, room, choose):
    def step(rows, which):
        memory = project(model, *encode(model, sources and [sources[r] for r in which]))
        return choose(advance(model, rows, None, memory)[:, 0], rows, which)

    return step


def hoisted(model, sources, B, room, choose):
    encoded, lengths = encode(model, sources)

    def step(rows, which):
        memory = project(model, encoded[which], None if lengths is None else lengths[which])
        return choose(advance(model, rows, None, memory)[:, 0], rows, which)

    return step


def cached(model, sources, B, room, choose, cache=None):  # cache: an empty one, of another kind than the model's
    memory = project(model, *encode(model, sources))
    cache, held = cache or model.new_cache(B, room), list(range(B))

    def step(rows, which):
        nonlocal memory, held
        if which != held:  # some have ended: the others move together
            kept = [held.index(r) for r in which]
            cache.reorder(kept)
            memory, held = memory and memory.take(kept), which
        return choose(advance(model, rows, cache, memory)[:, 0], rows, which)

    return step


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
    module, colon, function = str(name).partition(":")
    if not colon:
        raise UserError(f"strategy={name!r} is not one of those this model has: {', '.join(known)}; one of your own "
                        f"is MODULE:FUNCTION")
    try:
        own = vars(import_module(module))
    except (Exception, SystemExit) as error:  # whatever a module does
        raise UserError(f"strategy={name!r}: {type(error).__name__}: {error}: name a module that can be imported "
                        f"from here") from None
    if not callable(own.get(function)):
        there = [key for key, value in own.items() if isfunction(value) and value.__module__ == module]
        raise UserError(f"strategy={name!r} is not one of the functions of {module}: "
                        f"{', '.join(there) or 'it has none'}")
    return own[function]


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


def check_ids(what, rows, vocab_size, least=1):
    """Raise UserError unless every row is a list of at least `least` ids of the vocabulary."""
    for r, row in enumerate(rows):
        if not isinstance(row, list | tuple):
            raise UserError(f"{what} {r} is {row!r:.60}: it must be a list of ids (of a tensor, its tolist())")
        if len(row) < least:
            raise UserError(f"{what} {r} is empty: it needs at least {least} token")
        for i in row:
            if type(i) is not int or not 0 <= i < vocab_size:
                raise UserError(f"{what} {r} has the id {i!r}: ids are integers from 0 to {vocab_size - 1}")


def prepare(model, prompts, max_new_tokens, decoder_prompts):
    """Check a request and sort it into sources (None for a GPT) and the B rows that the decoder continues."""
    prompts = list(prompts)  # a generator gives them once
    config, sources, rows = model.config, None, prompts
    check_ids("prompt", prompts, config.vocab_size)
    if config.is_encoder_decoder:
        sources, longest = prompts, max(map(len, prompts), default=0)
        if longest > config.block_size:
            raise UserError(f"a source of {longest} tokens does not fit block_size={config.block_size}: shorten it")
        starts = [[]] * len(prompts) if decoder_prompts is None else list(decoder_prompts)
        check_ids("decoder prompt", starts, config.vocab_size, least=0)
        rows = [[config.start_id, *start] for start in starts]
    elif decoder_prompts is not None:
        raise UserError("decoder_prompts are for an encoder-decoder: a GPT continues its prompts themselves")
    if len(rows) != len(prompts):
        raise UserError(f"{len(rows)} decoder prompts for {len(prompts)} sources: give one for each")
    if type(max_new_tokens) is not int or max_new_tokens < 1:
        raise UserError(f"max_new_tokens={max_new_tokens!r:.60} must be a whole number, at least 1")
    longest = max(map(len, rows), default=0)
    if longest + max_new_tokens > config.block_size:
        raise UserError(f"{longest} tokens and max_new_tokens={max_new_tokens} do not fit "
                        f"block_size={config.block_size}: shorten the prompt or ask for fewer")
    return sources, rows


def stream(model, prompts, max_new_tokens, *, strategy="cached", decoder_prompts=None, ignore_eos=False, speculate=None,
           **choice):
    """
    generate(), one step at a time: an iterator of B lists of new ids, empty for a row that has ended. Whatever is wrong
    with the request is found out here, before anything is computed.
    """
    make = find_strategy(model, strategy)
    if speculate is not None:
        make = import_module("further.speculate").find(model, speculate, strategy)
    sources, rows = prepare(model, prompts, max_new_tokens, decoder_prompts)
    ends = [] if ignore_eos else model.config.end_ids
    forced = [choice[key] for key in ("forced_first", "forced_last") if choice.get(key) is not None]
    check_ids("the list of forced ids", [forced], choice.get("n_vocab") or model.config.vocab_size, least=0)
    limits = [len(row) + max_new_tokens for row in rows]
    choose = Chooser(Choice(**choice), model.wte.weight.device, ends, limits)
    if not rows:
        return iter(())
    step = make(model, sources, len(rows), max(limits), choose)
    return loop(step, rows, limits, lambda r, row: row[-1] in ends)


def generate(model, prompts, max_new_tokens, *, strategy="cached", decoder_prompts=None, ignore_eos=False, **choice):
    """
    The new ids of each row: a list of B lists, each up to and including the row's end-of-sequence id, no padding.

    prompts: B lists of ids, of any lengths: texts to continue for GPT, sources for BART (whose decoder starts from
    config.start_id, then the row of decoder_prompts, if given). They must fit: prompt + max_new_tokens <= block_size,
    and for BART source <= block_size and 1 + decoder prompt + max_new_tokens <= block_size. strategy: see the top of
    this file; all give the same tokens; one of your own will do as well, see find_strategy(). ignore_eos: go on to
    max_new_tokens in every row. speculate: "lookup", or a small model that guesses: several tokens from one pass, and
    the same texts, see further/speculate.py. The rest are fields of Choice: temperature=0.0 (greedy), top_k, top_p,
    min_p, seed and so on.

    The model may be in train mode and in use elsewhere, in other threads too: nothing of a decoding is kept on it, and
    there is no dropout where no gradients are recorded. Raises UserError (a ValueError) if the request is not possible,
    before anything is computed; NonFiniteError if the logits are no numbers.
    """
    rows = []
    for found in stream(model, prompts, max_new_tokens, strategy=strategy, decoder_prompts=decoder_prompts,
                        ignore_eos=ignore_eos, **choice):
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
        text = request.tokenizer.decode(row)
        plain = ("---\n" if n else "") + request.shown + text
        print(json.dumps({"prompt": request.prompt, "text": text, "ids": row}) if request.json else plain)
    if "speculate" in request.options:
        new = sum(map(len, rows))
        print(f"{new} new tokens in {passes} passes: {new / passes:.2f} each", file=sys.stderr)
    return rows, seconds


def show_stats(request, rows, seconds):
    """What the generation took, on stderr."""
    config, strategy, N, begun = request.model.config, request.options["strategy"], len(request.ids), len(request.begun)
    kept, S = "", config.starts(N) + begun + request.max_new_tokens
    if strategy in cost.FORMULAS:  # what one of your own keeps is not known
        predicted = cost.predict(config, strategy, N, request.max_new_tokens, len(rows),
                                 request.model.wte.weight.element_size(), begun)
        kept = f"; cache of {S} positions, {predicted['self_cache_bytes']:,} bytes"
    later = seconds[1:] or [0.0]
    print(f"{N} prompt tokens, first token after {1e3 * seconds[0]:.1f} ms; {sum(map(len, rows))} new tokens, "
          f"{1e3 * sum(later) / len(later):.2f} ms per step after it{kept}", file=sys.stderr)


def main(args=None):
    from plumbing import cli  # here: who imports the loop needs no command line
    request = cli.read(cli.parse(__doc__, args))
    rows, seconds = write_text(request)
    if request.stats:
        show_stats(request, rows, seconds)


if __name__ == "__main__":
    run(main)
