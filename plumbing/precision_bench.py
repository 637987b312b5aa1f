"""
bench.py precision: what fewer bits cost a trained model on held-out text, in loss and in logits.

    python bench.py precision --model out/gpt-tiny
    python bench.py precision --model DIR --source corpus.txt

The same weights compute in every precision, each label given what stands before it, and all are held against float64.
The text is what the run has held out; --source names another, whose last tenth it is. What compiling changes, bench.py
compare says: --quantize int8 --strategies cached,further.compiled:compiled.
"""

import copy
from itertools import islice

from further.quantize import Int8Linear, held_out, quantize
from plumbing.data import load_data
from plumbing.errors import WHOLE, UserError
from plumbing.machine import machine
from plumbing.models import check_memory
from plumbing.report import aligned
from plumbing.runs import trained_on
from plumbing.utils import DTYPES, pick_device
from plumbing.weights import load_pretrained
from train import to

ROWS = 8  # held-out rows at a time


def add_arguments(parser):
    add = parser.add_argument
    add("--model", metavar="DIR_OR_NAME", required=True, help="a run, a Hugging Face directory, or a name on the hub")
    add("--source", help="data.source of the text; default: what the run was trained on")
    add("--batches", type=WHOLE, default=20, metavar="N", help=f"of {ROWS} held-out rows, at most; default: 20")
    add("--device", default="auto", help="auto (a GPU if there is one), cpu, cuda or mps")
    add("--json", action="store_true", help="one JSON object")


def measure(args):
    """All that was measured, as a dict."""
    if args.batches < 1:
        raise UserError(f"--batches {args.batches} must be at least 1")
    device = pick_device(args.device)
    config = trained_on(args.model, args.source)
    if config is None:
        raise UserError(f"{args.model} is no run of train.py, which would have held out some text: name one with "
                        f"--source")
    model, tokenizer = load_pretrained(args.model, device=device)
    if isinstance(model.lm_head, Int8Linear):
        raise UserError(f"{args.model} is of whole numbers already: name the model that it was made of")
    if tokenizer is None:
        raise UserError(f"{args.model} has no tokenizer that can be read, so that no text can be given to it")
    each = sum(dtype.itemsize for dtype in DTYPES.values()) + 8  # bytes; 8 for those of whole numbers, own embeddings
    check_memory(f"{args.model} in all precisions", model.config, each, device)
    data = load_data(config, seq2seq=model.config.is_encoder_decoder, tokenizer=tokenizer)[0]
    batches = [to(device, batch) for batch in islice(data.val_batches(ROWS, model.config.block_size), args.batches)]
    names = ["float32", "bfloat16", "float16"] if device == "mps" else ["float64", "float32", "bfloat16", "float16"]
    models = {name: copy.deepcopy(model).to(DTYPES[name]) for name in names}
    models |= {f"int8, the rest {name}": quantize(copy.deepcopy(model)).to(DTYPES[name]) for name in names[-3:-1]}
    found = held_out(models.values(), batches)
    return dict(model=args.model, source=config.source, machine=machine(device), batches=len(batches),
                precisions=[dict(precision=name, loss=loss, rms=rms, most=most)
                            for name, (loss, rms, most) in zip(models, found)])


def table(r):
    """The measurements as text."""
    exact = r["precisions"][0]
    rows = [[one["precision"], f"{one['loss']:.5f}", f"{one['loss'] - exact['loss']:+.5f}", f"{one['rms']:.1e}",
             f"{one['most']:.1e}"] for one in r["precisions"]]
    return (f"{r['machine']}\nprecision: {r['model']}, held out of {r['source']}, {r['batches']} batches of {ROWS} "
            f"rows\n\n" + aligned([["", "held-out loss", "more", "logits differ by (rms)", "at most"], *rows]))
