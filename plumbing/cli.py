"""The command line of generate.py: its arguments, its prompt, and what a model's publishers ask for."""

import random
import sys

import torch

from plumbing.errors import Parser, UserError
from plumbing.files import read_text
from plumbing.models import random_model
from plumbing.utils import DTYPES, pick_device
from plumbing.weights import load_generation_config, load_pretrained

MAX_PROMPT = 2**24  # bytes
MAX_SAMPLES = 1024  # rows of one batch
DEFAULT_NEW_TOKENS = 100
# keys of generation_config.json that change what is generated and that nothing here can honour, unless they are idle
UNSUPPORTED = {"repetition_penalty": 1.0, "encoder_no_repeat_ngram_size": 0, "bad_words_ids": None, "typical_p": 1.0,
               "forced_decoder_ids": None, "stop_strings": None, "exponential_decay_length_penalty": None,
               "suppress_tokens": None, "begin_suppress_tokens": None, "sequence_bias": None, "num_beam_groups": 1}


def parse(doc, args=None):
    """The arguments as a namespace. Raises UserError on what is wrong whatever the model."""
    parser = Parser(prog="generate.py", description=doc)
    add = parser.add_argument
    add("--model", metavar="DIR_OR_NAME", help="a Hugging Face directory, a training run, or a name on the hub")
    add("--random", metavar="CONFIG", help="an untrained model instead: a configuration or a preset, e.g. bart-large")
    add("--prompt", metavar="TEXT", help="text to continue (GPT) or to read (BART)")
    add("--prompt-file", metavar="PATH", help="the same from a file, - for standard input")
    add("stdin", nargs="?", choices=["-"], metavar="-", help="the same from standard input")
    add("--prompt-tokens", type=int, metavar="N", help="a prompt of N random tokens, for --random")
    add("--max-new-tokens", type=int, metavar="M", help=f"at most; default: {DEFAULT_NEW_TOKENS}, or what fits")
    add("--strategy", default="cached", help="naive, hoisted (BART) or cached")
    add("--temperature", type=float, default=0.0, help="0 = greedy")
    add("--top-k", type=int, metavar="K", help="draw among the K most likely tokens")
    add("--top-p", type=float, metavar="P", help="draw among the most likely tokens that have probability P together")
    add("--min-p", type=float, metavar="P", help="draw among tokens at least P times as likely as the most likely one")
    add("--seed", type=int, help="of the draws; default: different every time")
    add("--num-samples", type=int, default=1, metavar="N", help="texts from one prompt, as one batch")
    add("--beams", type=int, metavar="N", help="1 = no beam search, whatever the model's generation_config.json says")
    add("--ignore-eos", action="store_true", help="go on to --max-new-tokens")
    add("--compare", action="store_true", help="run every strategy on the same input and print what each cost")
    add("--trace", action="store_true", help="print the shape of every matrix product, which are fixed and which grow")
    add("--report", metavar="FILE.html", help="write a page that shows the decoding step by step")
    add("--stats", action="store_true", help="what it took, on standard error")
    add("--json", action="store_true", help="for machines: one JSON object a line")
    add("--no-stream", action="store_true", help="print the text when it is complete")
    add("--device", default="auto", help="auto, cpu, cuda or mps")
    add("--dtype", choices=sorted(DTYPES), help="of the weights; default: as in the file")
    args = parser.parse_args(args)
    check(args)
    args.ignore_eos = args.ignore_eos or bool(args.random)  # what an untrained model calls the end means nothing
    return args


def check(args):
    """Raise UserError on arguments that do not go together."""
    if (args.model is None) == (args.random is None):
        raise UserError("give one of --model DIR_OR_NAME and --random CONFIG")
    prompts = [args.prompt, args.prompt_file, args.stdin, args.prompt_tokens]
    if sum(p is not None for p in prompts) != 1:
        raise UserError("give one prompt: --prompt TEXT, --prompt-file PATH, - (standard input) or --prompt-tokens N")
    if args.prompt_tokens is not None and (args.random is None or args.prompt_tokens < 1):
        raise UserError(f"--prompt-tokens {args.prompt_tokens} is for --random, and at least 1")
    if args.random and args.prompt_tokens is None:
        raise UserError("--random has no tokenizer: give --prompt-tokens N")
    if not 1 <= args.num_samples <= MAX_SAMPLES:
        raise UserError(f"--num-samples {args.num_samples} must be from 1 to {MAX_SAMPLES}")
    measured = args.compare or args.trace or args.report
    if args.random and not measured:
        raise UserError("--random is for --compare, --trace and --report: an untrained model has nothing to say")
    drawing = [name for name in ("temperature", "top_k", "top_p", "min_p") if getattr(args, name)]
    drawing = [f"--{name.replace('_', '-')} {getattr(args, name)}" for name in drawing]
    if measured and drawing:
        raise UserError(f"--compare, --trace and --report decode greedily: leave out {drawing[0]}")
    if drawing and not args.temperature:
        raise UserError(f"{drawing[0]} has no effect at temperature 0: set --temperature")
    if args.num_samples > 1 and (args.trace or args.report):
        raise UserError(f"--trace and --report show one text: leave out --num-samples {args.num_samples}")
    if args.trace and (args.compare or args.report):
        raise UserError("--trace prints one table: ask for --compare or --report in a run of its own")
    if args.stats and measured:
        raise UserError("--stats is for plain generation: --compare shows times and counts by itself")
    if args.num_samples > 1 and not measured and args.temperature == 0:
        raise UserError(f"--num-samples {args.num_samples} at temperature 0 is one text many times: set --temperature")
    if args.beams not in (None, 1):
        raise UserError(f"--beams {args.beams}: beam search is not part of this program yet, use --beams 1")


def load(args):
    """The model in eval mode, its tokenizer (None if it is random), and its generation_config.json as a dict."""
    device, dtype = pick_device(args.device), DTYPES.get(args.dtype)
    if args.random:
        return random_model(args.random, dtype or torch.float32, device), None, {}
    model, tokenizer = load_pretrained(args.model, dtype, device)
    if tokenizer is None:
        raise UserError(f"{args.model} has no tokenizer: put its vocab.json and merges.txt (or tokenizer.json) there")
    return model, tokenizer, load_generation_config(args.model)


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
        text = decode("standard input", sys.stdin.buffer.read(MAX_PROMPT + 1)).removesuffix("\n")
    else:
        text = decode("--prompt", args.prompt.encode("utf-8", "surrogatepass"))  # bytes that are no text are surrogates
    if len(text) > MAX_PROMPT:
        raise UserError(f"the prompt on standard input is longer than {MAX_PROMPT:,} bytes: shorten it")
    ids = tokenizer.encode(text)
    if not ids:
        raise UserError("the prompt is empty: give at least one character to continue")
    return text, ids


def decode(what, data):
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{what} is not UTF-8 at byte {error.start}: convert it first") from None


def choice(args, model, tokenizer, published, ids):
    """
    The fields of sampling.Choice that the arguments and generation_config.json set, and args.max_new_tokens where it
    was left open. Raises UserError on what the publishers ask for and nothing here can do, by its name.
    """
    for key, idle in UNSUPPORTED.items():
        if published.get(key, idle) not in (idle, None):
            raise UserError(f"generation_config.json asks for {key}={published[key]!r:.60}, which is not supported: "
                            f"delete it there to generate without")
    beams = integer(published, "num_beams", 1)
    if beams > 1 and args.beams is None:
        others = [key for key in ("length_penalty", "early_stopping") if key in published]
        others = "".join(f", {key}={published[key]!r:.60}" for key in others)
        raise UserError(f"generation_config.json asks for num_beams={beams}{others}: beam search is not part of this "
                        f"program yet, pass --beams 1 to decode greedily")
    encoder_decoder = hasattr(model.config, "start_id")
    start, V = 1 if encoder_decoder else len(ids), model.config.vocab_size
    if encoder_decoder:
        model.config.start_id = integer(published, "decoder_start_token_id", model.config.start_id, V)
    eos = published.get("eos_token_id")
    if isinstance(eos, list) and len(eos) > 1:
        raise UserError(f"generation_config.json names {len(eos)} ids as eos_token_id: leave one of them there")
    if type(eos) is int and 0 <= eos < V:  # GPT-2's default of 50256 stands in many files with a smaller vocabulary
        model.config.eos_id = eos
    if args.max_new_tokens is None:
        longest = integer(published, "max_length", start + DEFAULT_NEW_TOKENS)
        longest = start + integer(published, "max_new_tokens", longest - start)
        args.max_new_tokens = max(1, min(longest, model.config.block_size) - start)
    chosen = {key: getattr(args, key) for key in ("temperature", "top_k", "top_p", "min_p", "seed")}
    least = max(integer(published, "min_length", 0), start + integer(published, "min_new_tokens", -start))
    chosen |= {"min_length": least,
               "no_repeat_ngram": integer(published, "no_repeat_ngram_size", 0) or None,
               "forced_last": integer(published, "forced_eos_token_id", None, V),
               "forced_first": integer(published, "forced_bos_token_id", None, V) if encoder_decoder else None,
               "n_vocab": tokenizer and min(tokenizer.n_vocab, V)}
    return chosen


def integer(published, key, otherwise, below=2**31):
    value = published.get(key)
    if value is not None and (type(value) is not int or not 0 <= value < below):
        raise UserError(f"generation_config.json has {key}={value!r:.60}: it must be a whole number from 0 to "
                        f"{below - 1}")
    return otherwise if value is None else value
