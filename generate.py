"""
Generate text: one loop, and three ways to make its step cheap.

    python generate.py --model out/gpt-tiny --prompt "The if statement"
    python generate.py --model out/bart-headline --prompt-file article.txt
    echo "The for statement" | python generate.py --model out/gpt-tiny -

The loop never changes: run a step, choose a token from its logits, append it. A *strategy* is a step:

    naive     run the whole model on the whole text, for every token
    hoisted   (BART) encode the source once, run the decoder on the whole target for every token
    cached    prefill: everything enters once and its keys and values are stored; then only the newest token enters

All three give the same logits; what differs is what a step costs. Ragged batches are the normal case: rows are padded
on the right, and every row decodes at its own position. Padding lies in a row's future, so causality hides it.
"""

import json
import sys
import time

import torch

import cost
from attention import Attention, CausalSelfAttention, KVCache
from model import BART
from plumbing import cli, report
from plumbing.errors import UserError, run
from plumbing.tokenizers import StreamDecoder
from sampling import Choice

# -----------------------------------------------------------------------------
# The strategies. Each makes a step: tokens (B, longest), lengths (B ints) -> logits (B, V) of the token that comes
# next in each row. source is None for GPT, for BART the arguments of its encode().


def read(model, source):
    """What a decoder needs to know of its source, as arguments of model.features; nothing for GPT."""
    return {} if source is None else {"memory": model.encode(*source), "source_lengths": source[1]}


def head(model, x, ends):
    """The logits of one position per row, x (B, T, C) -> (B, V): no other position passes through the output head."""
    rows = torch.arange(x.size(0), device=x.device)
    return model.lm_head(x[rows, torch.tensor(ends, device=x.device) - 1])


def naive(model, source):
    def step(tokens, lengths):
        return head(model, model.features(tokens, **read(model, source)), lengths)

    return step


def hoisted(model, source):
    given = None

    def step(tokens, lengths):
        nonlocal given
        given = given or read(model, source)
        return head(model, model.features(tokens, **given), lengths)

    return step


def cached(model, source):
    given = None

    def step(tokens, lengths):
        nonlocal given
        if given is None:  # prefill
            new, start_pos, ends = tokens, 0, lengths
            given = read(model, source)
        else:  # decode: the newest token of each row, at its own position; the source is in the cache
            last = torch.tensor(lengths, device=tokens.device)[:, None] - 1  # (B, 1)
            new, ends = tokens.gather(1, last), [1] * len(lengths)
            start_pos = lengths[0] - 1 if len(set(lengths)) == 1 else last
            given = dict.fromkeys(given)
        return head(model, model.features(new, use_kv_cache=True, start_pos=start_pos, **given), ends)

    return step


def strategies(model):
    """The strategies that a model has, the most wasteful first."""
    hoist = {"hoisted": hoisted} if isinstance(model, BART) else {}
    return {"naive": naive, **hoist, "cached": cached}


# -----------------------------------------------------------------------------
# The loop


class Borrowed:
    """
    A model on loan, one step at a time: inside `with borrowed:` it is in eval mode, keeps no gradients and has this
    loan's caches; outside it is as it was found, also after an exception and while other loans are open.
    """

    def __init__(self, model, batch_size, length):
        self.modules = list(model.modules())
        self.caches = {m: KVCache(batch_size, length) if isinstance(m, CausalSelfAttention) else None
                       for m in self.modules if isinstance(m, Attention)}

    def swap(self):
        for layer, cache in self.caches.items():
            layer.cache, self.caches[layer] = cache, layer.cache

    def __enter__(self):
        self.training = [m for m in self.modules if m.training]
        for m in self.training:
            m.training = False
        self.swap()
        self.mode = torch.inference_mode()
        self.mode.__enter__()

    def __exit__(self, *error):
        self.mode.__exit__(*error)
        self.swap()
        for m in self.training:
            m.training = True


def check_ids(what, rows, config, least=1):
    """Raise UserError unless every row is a list of at least `least` ids of the vocabulary."""
    for r, row in enumerate(rows):
        if len(row) < least:
            raise UserError(f"{what} {r} is empty: it needs at least {least} token")
        for i in row:
            if not isinstance(i, int) or not 0 <= i < config.vocab_size:
                raise UserError(f"{what} {r} has the id {i!r}: ids are integers from 0 to {config.vocab_size - 1}")


def pad(rows, width, value, device):
    """Lists of ids as a tensor (B, width), padded on the right with value."""
    return torch.tensor([[*row, *[value] * (width - len(row))] for row in rows], dtype=torch.long, device=device)


def prepare(model, prompts, max_new_tokens, decoder_prompts):
    """Check a request and sort it into the source (None for GPT) and the B texts that the decoder continues."""
    config, device = model.config, next(model.parameters()).device
    source, texts = None, prompts
    check_ids("prompt", prompts, config)
    if isinstance(model, BART):
        lengths = [len(prompt) for prompt in prompts]
        longest = max(lengths, default=0)
        if longest > config.block_size:
            raise UserError(f"a source of {longest} tokens does not fit block_size={config.block_size}: shorten it")
        ragged = torch.tensor(lengths, device=device) if min(lengths, default=0) < longest else None
        source = pad(prompts, longest, config.pad_id, device), ragged
        starts = [[]] * len(prompts) if decoder_prompts is None else decoder_prompts
        check_ids("decoder prompt", starts, config, least=0)
        texts = [[config.start_id, *start] for start in starts]
    elif decoder_prompts is not None:
        raise UserError("decoder_prompts are for an encoder-decoder: a GPT continues its prompts themselves")
    if len(texts) != len(prompts):
        raise UserError(f"{len(texts)} decoder prompts for {len(prompts)} sources: give one for each")
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens={max_new_tokens} must be at least 1")
    longest = max(map(len, texts), default=0)
    if longest + max_new_tokens > config.block_size:
        raise UserError(f"{longest} tokens and max_new_tokens={max_new_tokens} do not fit "
                        f"block_size={config.block_size}: shorten the prompt or ask for fewer")
    return source, texts


def stream(model, prompts, max_new_tokens, *, strategy="cached", decoder_prompts=None, ignore_eos=False, **choice):
    """
    generate(), one step at a time: yields lists of B ids, None for a row that has ended. Whatever is wrong with the
    request is found out here, before the first step. Between two steps the model is free for other use.
    """
    if strategy not in strategies(model):
        raise UserError(f"strategy={strategy!r} is not one of those this model has: {', '.join(strategies(model))}")
    device = next(model.parameters()).device
    eos_id = None if ignore_eos else model.config.eos_id
    choose = Choice(**choice).chooser(device, eos_id)
    forced = [choice[key] for key in ("forced_first", "forced_last") if choice.get(key) is not None]
    check_ids("the list of forced ids", [forced], model.config, least=0)
    source, texts = prepare(model, prompts, max_new_tokens, decoder_prompts)
    return loop(model, strategies(model)[strategy](model, source), texts, max_new_tokens, choose, eos_id)


def loop(model, step, texts, max_new_tokens, choose, eos_id):
    """The loop: whatever the strategy, step, choose, append."""
    texts, alive = [list(text) for text in texts], [True] * len(texts)
    room = max(map(len, texts), default=0) + max_new_tokens
    tokens = pad(texts, room, 0, next(model.parameters()).device)  # (B, room)
    borrowed = Borrowed(model, len(texts), room)
    for left in reversed(range(max_new_tokens)):
        if not any(alive):
            return
        lengths = [len(text) for text in texts]
        with borrowed:
            ids = choose(step(tokens[:, : max(lengths)], lengths), texts, left == 0)  # (B,)
            tokens[range(len(texts)), lengths] = ids
        ids = ids.tolist()
        for text, i in zip(texts, ids):
            text.append(i)
        yield [i if a else None for i, a in zip(ids, alive)]
        alive = [a and i != eos_id for i, a in zip(ids, alive)]


def generate(model, prompts, max_new_tokens, *, strategy="cached", decoder_prompts=None, ignore_eos=False, **choice):
    """
    The new ids of each row: a list of B lists, each up to and including the row's end-of-sequence id, no padding.

    prompts: B lists of ids, of any lengths: texts to continue for GPT, sources for BART (whose decoder starts from
    config.start_id, then the row of decoder_prompts, if given). strategy: see the top of this file; all give the same
    tokens. ignore_eos: go on to max_new_tokens in every row. The rest are fields of Choice: temperature=0.0
    (greedy), top_k, top_p, min_p, seed and so on.

    Raises UserError (a ValueError) if the request is not possible or does not fit block_size, before anything is
    computed; NonFiniteError if the logits are not numbers.
    """
    rows = [[] for _ in prompts]
    for ids in stream(model, prompts, max_new_tokens, strategy=strategy, decoder_prompts=decoder_prompts,
                      ignore_eos=ignore_eos, **choice):
        for row, i in zip(rows, ids):
            row.extend([] if i is None else [i])
    return rows


# -----------------------------------------------------------------------------
# The command line


def write_text(model, tokenizer, prompt, ids, args, choice):
    """Generate and print: one sample as it comes, several, which are one batch, at the end. Returns ids and seconds."""
    steps = stream(model, [ids] * args.num_samples, args.max_new_tokens, strategy=args.strategy,
                   ignore_eos=args.ignore_eos, **choice)
    shown = "" if isinstance(model, BART) else prompt
    live = args.num_samples == 1 and not args.no_stream and not args.json
    say = (lambda text: print(text, end="", flush=True)) if live else (lambda text: None)
    rows, seconds, decoder = [[] for _ in range(args.num_samples)], [], StreamDecoder(tokenizer)
    say(shown)
    start = time.perf_counter()
    for step in steps:
        seconds.append(time.perf_counter() - start)
        start += seconds[-1]
        for row, i in zip(rows, step):
            row.extend([] if i is None else [i])
        say(decoder.push(step[0]))
    say(decoder.flush() + "\n")
    for n, row in enumerate([] if live else rows):
        text = tokenizer.decode(row)
        plain = ("---\n" if n else "") + shown + text
        print(json.dumps({"prompt": prompt, "text": text, "ids": row}) if args.json else plain)
    return rows, seconds


def show_stats(model, ids, rows, seconds, args):
    """What the generation took, on stderr."""
    S = (1 if isinstance(model, BART) else len(ids)) + args.max_new_tokens
    bytes_ = cost.predict(model.config, args.strategy, len(ids), args.max_new_tokens, len(rows),
                          model.wte.weight.element_size())["self_cache_bytes"]
    later = seconds[1:] or [0.0]
    print(f"{len(ids)} prompt tokens, first token after {1e3 * seconds[0]:.1f} ms; {sum(map(len, rows))} new tokens, "
          f"{1e3 * sum(later) / len(later):.2f} ms per step after it; cache of {S} positions, {bytes_:,} bytes",
          file=sys.stderr)


def compare(model, ids, args, choice):
    """Every strategy on the same input: the result of cost.compare."""
    def start(strategy):
        return lambda: stream(model, [ids] * args.num_samples, args.max_new_tokens, strategy=strategy,
                              ignore_eos=args.ignore_eos, **choice)

    return cost.compare(model, {name: start(name) for name in strategies(model)}, len(ids), args.num_samples)


def trace(model, ids, args, choice):
    """The cost.Cost of a generation, and that of one teacher-forced pass over the same tokens, as in training."""
    with cost.count(model) as counted:
        new = generate(model, [ids], args.max_new_tokens, strategy=args.strategy, ignore_eos=args.ignore_eos,
                       **choice)[0]
    texts = [ids, [model.config.start_id, *new[:-1]]] if isinstance(model, BART) else [ids + new[:-1]]
    with cost.count(model) as training, torch.no_grad():
        model(*(torch.tensor([text], device=model.wte.weight.device) for text in texts))
    return counted, training


def write_report(model, tokenizer, ids, args, choice):
    """Compare the strategies, collect the attention weights of a cached run, and write both as a page."""
    bart, M, config = isinstance(model, BART), args.max_new_tokens, model.config
    T = (1 if bart else len(ids)) + M - 1
    report.check_size(config.n_head * len(model.decoder_layers()) * T * (T + bart * len(ids)))
    report.check_path(args.report)
    result = compare(model, ids, args, choice)
    with cost.attention_weights(model) as weights:
        new = generate(model, [ids], M, ignore_eos=args.ignore_eos, **choice)[0]
    weights = {kind: [cost.matrix(calls)[0] for calls in layers if calls] for kind, layers in weights.items()}
    show = tokenizer.show if tokenizer else str
    source, target = (ids, [config.start_id, *new]) if bart else ([], ids + new)
    report.write_report(args.report, result, [show(i) for i in source], [show(i) for i in target], weights)
    print(f"wrote {args.report}", file=sys.stderr)
    return result


def main(args=None):
    args = cli.parse(__doc__, args)
    model, tokenizer, published = cli.load(args)
    prompt, ids = cli.read_prompt(args, model, tokenizer)
    choice = cli.choice(args, model, tokenizer, published, ids)
    if args.trace:
        counted, training = trace(model, ids, args, choice)
        print(counted.jsonl() if args.json else counted.table(training), end="")
    elif args.compare or args.report:
        result = (write_report(model, tokenizer, ids, args, choice) if args.report
                  else compare(model, ids, args, choice))
        if args.json:
            print(json.dumps(result))
        else:
            for done in result["strategies"] if tokenizer else []:
                text = tokenizer.decode(done["ids"][0])
                print(f"--- {done['strategy']}\n{'' if isinstance(model, BART) else prompt}{text}\n")
            print(report.comparison_table(result), end="")
    else:
        rows, seconds = write_text(model, tokenizer, prompt, ids, args, choice)
        if args.stats:
            show_stats(model, ids, rows, seconds, args)


if __name__ == "__main__":
    run(main)
