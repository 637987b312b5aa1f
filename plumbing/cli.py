"""The command line of generate.py, and what bench.py shares with it: arguments, a prompt, what publishers ask for."""

import argparse
import os
import random
import sys
from dataclasses import dataclass, field, replace
from importlib import import_module

import torch

from plumbing.errors import REAL, WHOLE, Parser, UserError, naming
from plumbing.examples import Examples
from plumbing.files import decode, read_text
from plumbing.models import random_model
from plumbing.products import fastest
from plumbing.prompts import read_prompts
from plumbing.tokenizers import Stops, StreamDecoder, Tokenizer, load_tokenizer
from plumbing.utils import DTYPES, pick_device, set_seed
from plumbing.weights import load_generation_config, load_model, locate
from sampling import Choice

MAX_PROMPT = 2**24  # bytes
MAX_SAMPLES = 1024  # rows of one batch
DEFAULT_NEW_TOKENS = 100
STRATEGY = "naive, hoisted (BART), cached, or MODULE:FUNCTION for one of your own"
SOURCES = [["--model", "--prompt"], ["--model", "--prompt-file"], ["--model", "-"], ["--model", "--prompts"],
           ["--random", "--prompt-tokens"]]
CHATS = [["--model"], *SOURCES[:2]]  # standard input is what is said
COMPILED = "further.compiled:compiled"  # what --compile stands for
# what these are unless something else is asked
IDLE = {"num_samples": 1, "strategy": "cached", "overflow": "refuse", "compile": False}
# a technique and what does not go with it; beams come last, since a generation_config.json may ask for them
APART = {"prompts": ["num_samples", "strategy", "overflow", "speculate", "compile", "chat", "stats"],
         "chat": ["num_samples", "strategy", "overflow", "speculate", "compile", "decoder_prompt", "json"],
         "speculate": ["strategy", "overflow", "compile"],
         "compile": ["strategy", "overflow"],
         "beams": ["strategy", "num_samples", "temperature", "chat", "speculate", "compile", "overflow"]}
# keys of generation_config.json that change what is generated and that nothing here can honour, unless they are idle
UNSUPPORTED = {"encoder_repetition_penalty": 1.0, "encoder_no_repeat_ngram_size": 0, "bad_words_ids": None,
               "typical_p": 1.0, "forced_decoder_ids": None, "num_beam_groups": 1,
               "exponential_decay_length_penalty": None, "suppress_tokens": None, "begin_suppress_tokens": None,
               "sequence_bias": None, "guidance_scale": 1.0, "force_words_ids": None, "constraints": None,
               "penalty_alpha": 0, "num_return_sequences": 1}


@dataclass(frozen=True, slots=True)
class Request:
    """What was asked for: read, checked, and not changed any more."""

    model: torch.nn.Module       # a GPT or BART, in eval mode
    tokenizer: Tokenizer | None  # None: the model is a random one
    prompt: str
    ids: list                    # of the prompt
    begun: list                  # ids that a BART's text begins with, behind its start token
    shown: str                   # what stands before the text that is generated
    max_new_tokens: int
    num_samples: int             # texts from the prompt
    rows: int                    # how often it is in the batch, each time on its own: bench.py's
    options: dict                # further arguments of generate(), or of what the technique calls in its place
    json: bool
    stats: bool
    live: bool                   # print the text as it comes
    stops: list                  # texts that end what is generated
    technique: str | None        # which of generate.FURTHER writes the text, if it is not the loop
    lines: dict = field(default_factory=dict)  # of "prompts": the name of every line -> its own Request

    def decoder(self):
        return StreamDecoder(self.tokenizer, self.stops)

    def said(self, ids, *score):
        """What --json prints of a row: its text before the stop, the ids that lie wholly before it, a beam's score."""
        decoder = self.decoder()
        text = "".join(map(decoder.push, ids)) + decoder.flush()
        ids = ids[: self.tokenizer.within(ids, decoder.size)[0]]
        return {"prompt": self.prompt, "text": text, "ids": ids} | dict(zip(["score"], score))

    def batch(self):
        """The first arguments of generate(): prompts and max_new_tokens."""
        return [self.ids] * self.rows, self.max_new_tokens


def add_arguments(parser):
    """A model, a prompt, and how much of what to write."""
    add = parser.add_argument
    add("--model", metavar="DIR_OR_NAME", help="a Hugging Face directory, a training run, or a name on the hub")
    add("--prompt", metavar="TEXT", help="text to continue (GPT) or to read (BART)")
    add("--prompt-file", metavar="PATH", help="the same from a file, - for standard input")
    add("stdin", nargs="?", metavar="-", help="the same from standard input")
    add("--decoder-prompt", metavar="TEXT", help="what a BART's text begins with")
    add("--max-new-tokens", type=WHOLE, metavar="M", help=f"at most; default: {DEFAULT_NEW_TOKENS}, or what "
        f"fits: prompt + new tokens <= block_size; of a BART source <= block_size and 1 + new tokens <= block_size")
    add("--beams", type=WHOLE, metavar="N", help="search with N beams for the best text; default: what the model's "
        "generation_config.json says, or 1 = greedy")
    add("--ignore-eos", action="store_true", help="go on to --max-new-tokens, whatever ends texts but --stop")
    add("--json", action="store_true", help="for machines: one JSON object a line")
    add("--device", default="auto", help="auto (a GPU if there is one), cpu, cuda or mps")
    add("--dtype", choices=sorted(DTYPES), help="of the weights; default: as in the file")
    add("--quantize", choices=["int8"], help="hold the weights of linears as whole numbers: further/quantize.py")
    add("--seed", type=WHOLE, help="of what is drawn; default: different every time")
    # not every program has them
    parser.set_defaults(random=None, prompt_tokens=None, rows=1, stats=False, no_stream=False, stop=[], chat=False,
                        prompts=None, batch_size=None, speculate=None, temperature=None, **IDLE)


def add_random(parser):
    """For bench.py: what a model costs does not depend on what it has learned."""
    parser.add_argument("--random", metavar="CONFIG", help="an untrained model: a configuration or a preset, e.g. "
                        "gpt2, which any number of --model.key=value, e.g. --model.n_kv_head=1, change")
    parser.add_argument("--prompt-tokens", type=WHOLE, metavar="N", help="its prompt: N random tokens")
    parser.add_argument("--num-samples", type=WHOLE, dest="rows", metavar="B", help="rows of the batch, each with the "
                        "whole prompt")


def add_compile(parser):
    """For who only wants the text, and how fast: hooks see nothing of what is compiled."""
    parser.add_argument("--compile", action="store_true", help="compile the decode step first, seconds to a minute: "
                        "worth its wait for long or many texts, see further/compiled.py")


def parse(doc, args=None):
    """The arguments of generate.py as a namespace. Raises UserError on what is wrong whatever the model."""
    parser = Parser(prog="generate.py", description=doc)
    add_arguments(parser)
    add_compile(parser)
    add = parser.add_argument
    add("--num-samples", type=WHOLE, metavar="N", help="texts from one prompt, which is read once for all; default: 1")
    add("--overflow", choices=["refuse", "slide"], help="what becomes of a text longer than "
        "block_size. refuse, the default; slide: whenever it is full its first block_size / 2 tokens are forgotten, "
        "and the rest, computed again, stands at the positions from 0 on: a prefill for every block_size / 2 tokens")
    add("--strategy", help=f"{STRATEGY}; default: cached")
    add("--speculate", metavar="DRAFT", help="guess tokens, verify several in one pass, write the same: lookup guesses "
        "what followed before, FILE holds texts alike (for BART a line each), DIR_OR_NAME is a small model that "
        "guesses; how many a pass found is said on stderr")
    add("--temperature", type=REAL, help="0 = greedy")
    add("--top-k", type=WHOLE, metavar="K", help="draw among the K most likely tokens")
    add("--top-p", type=REAL, metavar="P", help="draw among the most likely tokens that have probability P together")
    add("--min-p", type=REAL, metavar="P", help="draw among tokens at least P times as likely as the most likely one")
    add("--repetition-penalty", type=REAL, metavar="P", help="above 1, what is in the text already becomes less "
        "likely; default: 1")
    add("--stop", action="append", default=[], metavar="TEXT", help="end before this text, taken as it stands (no \\n "
        "becomes a line end), which is not printed; may be given several times")
    add("--chat", action="store_true", help="read lines from standard input, answer each; with --seed all draw alike")
    add("--length-penalty", type=REAL, metavar="X", help="of beams: a text's score is log-probability / length ** X; "
        "default: 1")
    add("--early-stopping", choices=("true", "false", "never"), help="of beams: stop when N texts have ended (true); "
        "when besides no other would beat them by ending there (false, the default); when none could at any length")
    add("--stats", action="store_true", help="what it took, on standard error")
    add("--no-stream", action="store_true", help="print the text when it is complete")
    add("--prompts", metavar="FILE", help="many prompts, one a line; or, in a .jsonl file, one JSON object a line: "
        '{"prompt": TEXT, "decoder_prompt": TEXT, "max_new_tokens": M}, of which the last two may be left out. Printed '
        "are JSON lines, in the order of the file")
    add("--batch-size", type=WHOLE, metavar="N", help="of --prompts: how many at a time; default: 8")
    args = parser.parse_args(args)
    drawing = [name for name in ("top_k", "top_p", "min_p") if getattr(args, name)]
    if drawing and not args.temperature:
        flag = f"--{drawing[0].replace('_', '-')} {getattr(args, drawing[0])}"
        raise UserError(f"{flag} has no effect at temperature 0: set --temperature")
    if args.num_samples > 1 and not args.temperature:
        raise UserError(f"--num-samples {args.num_samples} at temperature 0 is one text many times: set --temperature")
    return args


def check(args):
    """Raise UserError on arguments that do not go together."""
    if args.stdin not in (None, "-"):  # not argparse's `choices`, which would not name an unknown flag before it
        raise UserError(f"{args.stdin!r:.60} is no argument: - stands for standard input, a text goes behind --prompt")
    flags = {"model": "--model", "random": "--random", "prompt": "--prompt", "prompt_file": "--prompt-file",
             "stdin": "-", "prompts": "--prompts", "prompt_tokens": "--prompt-tokens"}
    sources = [flag for name, flag in flags.items() if getattr(args, name) is not None]
    if args.chat:
        check_chat(args, sources)
    elif sources not in SOURCES:
        raise UserError(f"{' and '.join(sources) or 'nothing'} given: give --model DIR_OR_NAME and one prompt, which "
                        f"is --prompt TEXT, --prompt-file PATH or - (standard input); or, to bench.py, --random CONFIG "
                        f"and --prompt-tokens N")
    if args.prompt_tokens is not None and args.prompt_tokens < 1:
        raise UserError(f"--prompt-tokens {args.prompt_tokens} must be at least 1")
    for samples in (args.num_samples, args.rows):
        if not 1 <= samples <= MAX_SAMPLES:
            raise UserError(f"--num-samples {samples} must be from 1 to {MAX_SAMPLES}")
    if args.batch_size is not None and (args.prompts is None or not 1 <= args.batch_size <= MAX_SAMPLES):
        raise UserError(f"--batch-size {args.batch_size} must be from 1 to {MAX_SAMPLES}, with --prompts FILE")
    for technique in ("prompts", "chat", "speculate", "compile"):
        if getattr(args, technique) and (other := clash(args, technique)):
            raise UserError(f"{other} and --{technique} do not go together: leave one of them out")
    if args.beams is not None and not 1 <= args.beams <= MAX_SAMPLES:
        raise UserError(f"--beams {args.beams} must be from 1 (greedy) to {MAX_SAMPLES}")


def check_counted(args):
    """Raise UserError if hooks, which count, would see nothing of the strategy."""
    if args.strategy == COMPILED:
        raise UserError(f"--strategy {COMPILED}: what is compiled is one piece, of which nothing can be counted: leave "
                        f"it out, bench.py decode and prefill have --compile")


def clash(args, technique):
    """The first argument that does not go with this technique, as it was typed; None if none was given."""
    for name, value in given(args, *APART[technique]).items():
        if value != 0:  # nor False
            return f"--{name.replace('_', '-')}" + ("" if value is True else f" {value}")


def check_chat(args, sources):
    if sources not in CHATS or args.prompt_file == "-":
        raise UserError(f"--chat with {' and '.join(sources) or 'nothing'}: give --model DIR_OR_NAME, and what it "
                        f"begins with, if anything, as --prompt TEXT or --prompt-file PATH; standard input is what is "
                        f"said")


def read(args):
    """The Request that the arguments make. Raises UserError on whatever is wrong with them, the model or the prompt."""
    check(args)
    Choice(**chosen(args)).validate()
    texts = None if args.prompts is None else read_prompts(args.prompts)
    loaded, lines = load(args), {}
    if texts is None:
        return ask(args, *loaded)
    for name, line in texts.items():
        with naming(name):
            lines[name] = ask(argparse.Namespace(**vars(args) | line), *loaded)
            first, least = (one.options["min_length"] for one in (next(iter(lines.values())), lines[name]))
            if first != least:
                raise UserError(f"min_new_tokens in generation_config.json asks for min_length={least} here and for "
                                f"{first} in the first line: delete it there, or give prompts of one length")
    options = {key: value for key, value in lines[name].options.items() if key != "decoder_prompts"}
    return replace(lines[name], technique="prompts", lines=lines, options=options)


def given(args, *names):
    """Of the arguments with these names, those that ask for something: what is left out has its own default."""
    return {name: value for name in names if (value := getattr(args, name, None)) not in (None, IDLE.get(name))}


def chosen(args):
    return given(args, "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")


def ask(args, model, tokenizer, published):
    """The Request for one prompt, of the model and what else load() returns."""
    prompt, ids = "", []
    if not args.chat or args.prompt is not None or args.prompt_file is not None:
        prompt, ids = read_prompt(args, model, tokenizer)
    begun = read_decoder_prompt(args, model, tokenizer)
    start = max(1, model.config.starts(len(ids)) + len(begun))  # a chat has a token before it is answered
    max_new_tokens, rules = publishers_rules(args, model, tokenizer, published, start)
    # what an untrained model calls the end means nothing
    options = {"ignore_eos": args.ignore_eos or args.random is not None, **rules, **chosen(args)}
    options |= given(args, "strategy", "num_samples", "overflow", "batch_size")
    if args.compile:
        options["strategy"] = COMPILED
    if stops := read_stops(args, tokenizer, published):
        options["stop"] = Stops(tokenizer, stops)
    beams = beam_options(args, published, rules["n_vocab"], stops)
    if args.speculate is not None:
        options["speculate"] = load_draft(args, model, tokenizer)
    if begun:
        options["decoder_prompts"] = [begun] * args.rows
    shown = args.decoder_prompt or "" if model.config.is_encoder_decoder else prompt
    return Request(model, tokenizer, prompt, ids, begun, shown, max_new_tokens, args.num_samples, args.rows,
                   options | beams, args.json, args.stats, live=not args.no_stream and not args.json, stops=stops,
                   technique="chat" if args.chat else "beams" if beams else None)


def load(args):
    """The model in eval mode, its tokenizer (None if it is random), and its generation_config.json as a dict."""
    device, dtype = pick_device(args.device), DTYPES.get(args.dtype)
    if args.random is not None:
        set_seed(args.seed or 0)
        return prepared(args, random_model(args.random, dtype or torch.float32, device, args.overrides)), None, {}
    directory = locate(args.model)
    tokenizer, model = load_tokenizer(directory), load_model(directory, dtype, device)
    if tokenizer is None:
        raise UserError(f"{args.model} has no tokenizer: put its vocab.json and merges.txt (or tokenizer.json) there")
    return prepared(args, model), tokenizer, load_generation_config(directory)


def prepared(args, model):
    """A model whose linears hold what is asked for, and multiply as is fastest on this machine."""
    return fastest(import_module("further.quantize").quantize(model) if args.quantize else model)


def load_draft(args, model, tokenizer):
    """What --speculate names: "lookup", the ids of a file's texts, or a model with the same tokenizer."""
    if args.speculate == "lookup":
        return args.speculate
    if tokenizer and os.path.isfile(args.speculate):
        text = read_text(args.speculate)
        return Examples([tokenizer.encode(each) for each in
                         (text.splitlines() if model.config.is_encoder_decoder else [text])])
    directory = locate(args.speculate)
    theirs = load_tokenizer(directory)
    if None in (theirs, tokenizer) or (theirs.tokens, theirs.specials) != (tokenizer.tokens, tokenizer.specials):
        raise UserError(f"--speculate {args.speculate!r:.150} does not have the tokenizer of --model {args.model}: "
                        f"choose a draft that was trained with the same one, or lookup")
    return fastest(load_model(directory, DTYPES.get(args.dtype), pick_device(args.device)))


def read_prompt(args, model, tokenizer):
    """The prompt as text and as ids. One line end at the end of a file or of standard input is not part of it."""
    if args.prompt_tokens is not None:
        if args.prompt_tokens > model.config.block_size:
            raise UserError(f"--prompt-tokens {args.prompt_tokens} do not fit block_size={model.config.block_size}: "
                            f"ask for fewer")
        draws = random.Random(args.seed or 0)
        return "", [draws.randrange(model.config.vocab_size) for _ in range(args.prompt_tokens)]
    if args.prompt_file not in (None, "-"):
        text = read_text(args.prompt_file, MAX_PROMPT).removesuffix("\n")
    elif args.prompt is None:
        text = decode("standard input", read_stdin()).removesuffix("\n")
    else:
        text = typed("--prompt", args.prompt)
    if len(text) > MAX_PROMPT:
        raise UserError(f"the prompt on standard input is longer than {MAX_PROMPT:,} bytes: shorten it")
    ids = tokenizer.encode(text)
    if not ids:
        raise UserError("the prompt is empty: give at least one character to continue")
    return text, ids


def read_decoder_prompt(args, model, tokenizer):
    """The ids that the decoder of a BART continues: framed as what it was trained on, but for the end."""
    if args.decoder_prompt is None:
        return []
    if args.random is not None or not model.config.is_encoder_decoder:
        raise UserError("--decoder-prompt is for a BART with a tokenizer: leave it out; a GPT continues its --prompt")
    ids = tokenizer.encode(typed("--decoder-prompt", args.decoder_prompt))
    return ids[:-1] if tokenizer.seq2seq else ids


def read_stops(args, tokenizer, published):
    """The texts that end what is generated: those that were typed, and unless no end counts, the publishers'."""
    own, theirs = [typed("--stop", text) for text in args.stop], published.get("stop_strings") or []
    theirs = theirs if isinstance(theirs, list) else [theirs]
    for whose, texts in (("--stop", own), (f"stop_strings={theirs!r:.60} of generation_config.json", theirs)):
        try:
            Stops(tokenizer, texts)
        except UserError as error:
            raise UserError(f"{whose}: {error}") from None
    return own if args.ignore_eos else own + theirs


def typed(flag, text):
    return decode(flag, text.encode("utf-8", "surrogatepass"))  # bytes that are no text are surrogates


def read_stdin():
    try:
        return sys.stdin.buffer.read(MAX_PROMPT + 1)
    except (AttributeError, OSError):  # it is None where it is closed
        raise UserError("standard input cannot be read: send a text to it, or use --prompt-file PATH") from None


def publishers_rules(args, model, tokenizer, published, start):
    """
    max_new_tokens, and the fields of Choice that a generation_config.json (as a dict) sets. start: with how many tokens
    the decoder starts. Raises UserError on what it asks for and nothing here can do, by its name.
    """
    for key, idle in UNSUPPORTED.items():
        if published.get(key, idle) not in (idle, None):
            raise UserError(f"generation_config.json asks for {key}={published[key]!r:.60}, which is not supported: "
                            f"delete it there to generate without")
    if args.chat and published.get("min_new_tokens"):
        raise UserError(f"generation_config.json asks for min_new_tokens={published['min_new_tokens']!r:.60}, which "
                        f"--chat cannot honour, whose text goes on: delete it there")
    config = model.config
    real = min(tokenizer.n_vocab, config.vocab_size) if tokenizer else config.vocab_size  # a vocabulary may be padded
    max_new_tokens = args.max_new_tokens
    if max_new_tokens is None:
        longest = integer(published, "max_length", start + DEFAULT_NEW_TOKENS)
        longest = start + integer(published, "max_new_tokens", longest - start)
        slides = getattr(args, "overflow", None) == "slide"
        max_new_tokens = max(1, (longest if slides else min(longest, config.block_size)) - start)
    least = max(integer(published, "min_length", 0), start + integer(published, "min_new_tokens", -start))
    first = integer(published, "forced_bos_token_id", None, real)
    rules = {
        "repetition_penalty": 1.0 if (penalty := published.get("repetition_penalty")) is None else penalty,
        "min_length": least,
        "no_repeat_ngram": integer(published, "no_repeat_ngram_size", 0) or None,
        "forced_last": integer(published, "forced_eos_token_id", None, real),
        "forced_first": first if config.is_encoder_decoder else None,
        "n_vocab": real}
    with naming("generation_config.json"):
        Choice(**rules).validate()
    return max_new_tokens, rules


def beam_options(args, published, n_vocab, stops):
    """
    The arguments of beam_search() that the command line or a generation_config.json (as a dict) gives; none of them
    without beams. Raises UserError on what does not go with them.
    """
    beams = integer(published, "num_beams", 1, MAX_SAMPLES + 1) if args.beams is None else args.beams
    asked = f"--beams {beams}" if args.beams else f"num_beams={beams} in generation_config.json"
    typed = given(args, "length_penalty", "early_stopping")
    for key, value in typed.items():
        if beams < 2:
            raise UserError(f"--{key.replace('_', '-')} {value} has no effect without beams: set --beams")
    if beams < 2:
        return {}
    if not hasattr(args, "length_penalty"):
        raise UserError(f"{asked}: a text is measured without beams here, pass --beams 1")
    if other := clash(args, "beams") or stops and f"a stop {stops}":
        raise UserError(f"{other} does not go with {asked}: beams find one text, with a cache, and draw nothing; leave "
                        f"it out, or pass --beams 1")
    if beams > n_vocab:
        raise UserError(f"{asked} are more than the {n_vocab} tokens of the vocabulary: ask for fewer")
    if typed.get("early_stopping") in ("true", "false"):
        typed["early_stopping"] = typed["early_stopping"] == "true"
    theirs = {key: published[key] for key in ("length_penalty", "early_stopping") if published.get(key) is not None}
    return {"beams": beams} | theirs | typed


def integer(published, key, otherwise, below=2**31):
    value = published.get(key)
    if value is not None and (type(value) is not int or not 0 <= value < below):
        raise UserError(f"generation_config.json has {key}={value!r:.60}: it must be a whole number from 0 to "
                        f"{below - 1}")
    return otherwise if value is None else value
