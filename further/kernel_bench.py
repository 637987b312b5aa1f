"""
What each idea of further/kernels.py buys: a decode step on a GPU, from the plain model to overlapping kernels; of more
than 4 rows those of many_rows.py.

    python -m further.kernel_bench --random gpt2 --prompt-tokens 32 --max-new-tokens 224
    python -m further.kernel_bench --random bart-large --prompt-tokens 1024 --max-new-tokens 100 --rows 2

A line for each: microseconds of a step, tokens per second of all rows, and the part that the memory's bandwidth alone
would take. The bandwidth is measured in the same run: of a copy of 2 GB, which reads and writes.
"""

from functools import partial
from statistics import median

from plumbing.errors import WHOLE, Parser, UserError, guard_imports, run

if __name__ == "__main__":
    guard_imports()  # torch's take seconds

import torch

from further.compiled import Steps, greedy
from further.many_rows import ManyRows, kind_of
from further.quantize import quantize
from generate import advance, encode, project
from plumbing.models import random_model
from plumbing.utils import DTYPES, captured


def seconds(call, times):
    """Of one of so many calls in a row, on the device."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(times):
        call()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1e3 / times


def copied_per_second():
    a, b = torch.ones(2, 2**31, dtype=torch.uint8, device="cuda")
    seconds(lambda: b.copy_(a), 3)
    return 2 * a.nbytes / seconds(lambda: b.copy_(a), 20)


class Text:
    """Rows behind their prefill, and where they go on: what a Step takes, and the plain step beside it."""

    def __init__(self, model, rows, prompt_tokens, max_new_tokens):
        config = model.config
        torch.manual_seed(0)
        ids = torch.randint(config.vocab_size, (rows, prompt_tokens)).tolist()
        self.memory = project(model, *encode(model, ids)) if config.is_encoder_decoder else None
        self.model, self.start = model, config.starts(prompt_tokens)
        self.length = self.start + max_new_tokens
        begun = torch.tensor(ids)[:, : self.start]
        self.ids = torch.zeros(rows, self.length, dtype=torch.long, device="cuda")
        self.ids[:, : self.start] = begun.to("cuda")
        self.at = torch.zeros(rows, 1, dtype=torch.long, device="cuda")
        self.cache = model.new_cache(rows, self.length)
        advance(model, begun.tolist(), self.cache, self.memory)
        self.begin()

    def begin(self):
        """Back to the end of the prompt."""
        self.at.fill_(self.start - 1)

    def plain(self, step):
        """A step as the model does it, or what was compiled of it; nothing asked of the host either."""
        finite = torch.ones(len(self.ids), dtype=torch.bool, device="cuda")
        return partial(step, self.ids, self.at, self.cache, self.memory, finite, None)

    def step(self, **options):
        return kind_of(len(self.ids))(self.model, self.ids, self.at, self.cache, self.memory, **options)

    def seconds(self, call):
        """Of a step, median of five texts."""
        took = []
        for _ in range(6):
            self.begin()
            took.append(seconds(call, self.length - self.start))
        return median(took[1:])


@torch.inference_mode()
def measure(model, rows, prompt_tokens, max_new_tokens):
    """Pairs (what, seconds of a step), the bytes that a step in the middle of the text reads, the kernels of one."""
    text = Text(model, rows, prompt_tokens, max_new_tokens)
    plain, made = text.plain(partial(greedy, model, model.lm_head)), Steps(model, None)
    fused, early, compiled = text.step(overlap=False), text.step(), text.plain(made.greedy)
    with made.compiling():
        compiled()
    ways = [("plain", plain), ("plain, captured", captured(plain)), ("compiled, captured", captured(compiled)),
            ("fused", fused), ("fused, captured", captured(fused)), ("fused, captured, overlapping", captured(early))]
    took = [(what, text.seconds(call)) for what, call in ways]
    middle = text.start + max_new_tokens // 2
    kept = sum(2 * k[:rows, :, :middle].nbytes for k in text.cache.k) + (text.memory.nbytes if text.memory else 0)
    return took, early.nbytes + kept, len(early.launches)


def main(args=None):
    parser = Parser(prog="further.kernel_bench", description=__doc__)
    add = parser.add_argument
    add("--random", metavar="PRESET", required=True, help="an untrained model of a published size, or of a .toml file")
    add("--dtype", choices=["float32", "float16", "bfloat16"], default="bfloat16", help="default: bfloat16")
    add("--quantize", choices=["int8"], help="hold the weights of linears as whole numbers: further/quantize.py")
    add("--rows", type=WHOLE, metavar="B", default=1, help="texts beside each other, 1 to 64; default: 1")
    add("--prompt-tokens", type=WHOLE, metavar="N", default=32, help="tokens of the prompt, or the source; default: 32")
    add("--max-new-tokens", type=WHOLE, metavar="M", default=224, help="steps that are timed; default: 224")
    args = parser.parse_args(args)
    if not 1 <= args.rows <= ManyRows.ROWS[-1]:
        raise UserError(f"--rows={args.rows} must be from 1 to {ManyRows.ROWS[-1]}, which is what the kernels are for")
    if not torch.cuda.is_available():
        raise UserError("kernels run on a CUDA device, and there is none: use bench.py decode")
    model = random_model(args.random, DTYPES[args.dtype], "cuda", args.overrides)
    if args.quantize:
        quantize(model)
    bandwidth = copied_per_second()
    took, nbytes, kernels = measure(model, args.rows, args.prompt_tokens, args.max_new_tokens)
    limit = nbytes / bandwidth
    print(f"{args.random}, {args.quantize or args.dtype}, {args.rows} x {args.prompt_tokens} -> {args.max_new_tokens}; "
          f"{torch.cuda.get_device_name()}, copies {bandwidth / 1e12:.2f} TB/s; a step reads {nbytes / 1e6:,.1f} MB, "
          f"{1e6 * limit:.0f} us, in {kernels} kernels\n\n{'':30}us/step  tokens/s  of the bandwidth  us/kernel")
    for what, each in took:
        print(f"{what:30}{1e6 * each:7,.0f}  {args.rows / each:8,.0f}  {limit / each:16.0%}"
              + (f"  {1e6 * each / kernels:9.2f}" if "fused" in what else ""))


if __name__ == "__main__":
    run(main)
