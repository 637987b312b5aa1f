"""
The engines that bench.py decode and prefill hold against each other. Each is a process of its own, a worker, which
loads its model once and then answers every line of its standard input with a line of JSON: what it wrote, and when.

All are given the same weights, a directory that save_pretrained() wrote, and the same ids; all are greedy, know no end
of sequence, and write as many tokens. An engine is a function of a job, a dict, that returns write(clock), which writes
the rows once and calls clock() after every step, and what is to be known of it.
"""

import json
import os
import subprocess
import sys
import time
from argparse import Namespace
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from generate import stream
from plumbing import cli
from plumbing.errors import UserError, one_line
from plumbing.machine import resident
from plumbing.tokenizers import load_tokenizer
from plumbing.utils import DTYPES, pick_device
from plumbing.weights import load_model, locate

SIZES = {"int8": 1, "int16": 2, "float16": 2, "bfloat16": 2, "float32": 4}  # bytes of CTranslate2's numbers
GGUF = {"int8": ("Q8_0", 34 / 32), "float16": ("F16", 2), "bfloat16": ("BF16", 2), "float32": ("F32", 4)}  # llama.cpp's


def ours(job):
    """This project, as the arguments in job["args"] ask for it."""
    args = Namespace(**job["args"])
    model = cli.prepared(args, load_model(Path(job["directory"]), DTYPES.get(args.dtype), pick_device(args.device)))
    request = cli.ask(args, model, None if args.random else load_tokenizer(locate(args.model)), {})
    weight, kept = model.lm_head.weight, model.wte.weight  # the weights of linears may be whole numbers

    def write(clock):
        rows = [[] for _ in range(request.rows)]
        for found in stream(model, *request.batch(), **request.options):
            clock()
            for row, ids in zip(rows, found):
                row += ids
        return rows

    return write, dict(version=f"torch {torch.__version__}", precision=str(weight.dtype).removeprefix("torch."),
                       weight_size=weight.itemsize, kept_size=kept.itemsize)


def hf(job):
    """transformers."""
    import transformers
    bart, dtype = job["bart"], DTYPES[job["dtype"]]
    kind = transformers.BartForConditionalGeneration if bart else transformers.GPT2LMHeadModel
    model = kind.from_pretrained(job["directory"], dtype=dtype).to(job["device"]).eval()
    model.generation_config.forced_eos_token_id = None
    idx = torch.tensor(job["rows"], device=job["device"])
    options = dict(attention_mask=torch.ones_like(idx), max_new_tokens=job["n"], do_sample=False, num_beams=1,
                   eos_token_id=None)

    class Clock(transformers.generation.BaseStreamer):
        def __init__(self, clock):
            self.started, self.clock = False, clock

        def put(self, ids):
            if self.started:  # first comes what is there already
                self.clock()
            self.started = True

        def end(self):
            pass

    def write(clock):
        return model.generate(idx, streamer=Clock(clock), **options)[:, -job["n"]:].tolist()

    return write, dict(version=f"transformers {transformers.__version__}", precision=job["dtype"],
                       weight_size=dtype.itemsize, kept_size=dtype.itemsize)


def convert(directory, vocab_size, output):
    """Write a model's directory as CTranslate2 has it. Its tokens are names: here every id's is its own digits."""
    import ctranslate2
    import tokenizers
    import transformers
    words = tokenizers.models.WordLevel({str(i): i for i in range(vocab_size)}, unk_token="0")
    names = dict.fromkeys(["unk_token", "bos_token", "eos_token"], "0")
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizers.Tokenizer(words), **names)
    tokenizer.save_pretrained(directory)
    ctranslate2.converters.TransformersConverter(directory).convert(output)


def ct2(job):
    """CTranslate2, of what convert() wrote, in the precision job["compute"]."""
    import ctranslate2
    rows, n = [list(map(str, row)) for row in job["rows"]], job["n"]
    device, _, index = job["device"].partition(":")
    kind = ctranslate2.Translator if job["bart"] else ctranslate2.Generator
    model = kind(job["converted"], device, device_index=int(index or 0), compute_type=job["compute"],
                 intra_threads=torch.get_num_threads())
    options = {"max_decoding_length": n, "max_input_length": 0, "beam_size": 1} if job["bart"] else {
        "max_length": n, "include_prompt_in_result": False}

    def write(clock):
        last = lambda result: result.batch_id == len(rows) - 1 and clock()  # None: go on
        run = model.translate_batch if job["bart"] else model.generate_batch
        results = run(rows, end_token=[], callback=last, **options)
        return [[int(i) for i in (result.hypotheses if job["bart"] else result.sequences)[0]] for result in results]

    weight, *kept = model.compute_type.split("_")
    return write, dict(version=f"CTranslate2 {ctranslate2.__version__}", precision=model.compute_type,
                       weight_size=SIZES[weight], kept_size=SIZES[(kept or [weight])[0]])


def write_gguf(directory, precision, output):
    """Write a GPT's directory as llama.cpp has it, with no vocabulary: ids are asked for, and ids it shall find."""
    import gguf
    model, kind = load_model(Path(directory), torch.float32), getattr(gguf.GGMLQuantizationType, GGUF[precision][0])
    config, file = model.config, gguf.GGUFWriter(output, "gpt2")
    for add, value in ((file.add_context_length, config.block_size), (file.add_embedding_length, config.n_embd),
                       (file.add_block_count, config.n_layer), (file.add_head_count, config.n_head),
                       (file.add_feed_forward_length, config.inner), (file.add_layer_norm_eps, config.layer_norm_eps),
                       (file.add_vocab_size, config.vocab_size), (file.add_tokenizer_model, "no_vocab")):
        add(value)
    named = {"token_embd": model.wte, "position_embd": model.wpe, "output_norm": model.ln_f, "output": model.lm_head}
    for i, block in enumerate(model.h):
        parts = dict(attn_norm=block.ln_1, attn_qkv=block.attn.c_attn, attn_output=block.attn.c_proj,
                     ffn_norm=block.ln_2, ffn_up=block.mlp.c_fc, ffn_down=block.mlp.c_proj)
        named |= {f"blk.{i}.{name}": part for name, part in parts.items()}
    for name, part in named.items():
        for key, x in part.named_parameters():
            size = kind if isinstance(part, torch.nn.Linear) and x.dim() == 2 else gguf.GGMLQuantizationType.F32
            file.add_tensor(f"{name}.{key}", gguf.quants.quantize(x.detach().numpy(), size), raw_dtype=size)
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()


def llama(job):
    """llama.cpp on a CPU, of what write_gguf() wrote. Its GELU is a table in float16, whatever the precision."""
    import llama_cpp
    import numpy as np
    (B, N), n, exact = np.shape(job["rows"]), job["n"], job["compute"] == "float32"
    file, options = job["gguf"][job["compute"]].encode(), llama_cpp.llama_context_default_params()
    options.n_ctx, options.n_batch, options.n_seq_max = B * (N + n), B * N, B
    options.n_threads = options.n_threads_batch = torch.get_num_threads()
    options.type_k = options.type_v = llama_cpp.GGML_TYPE_F32 if exact else llama_cpp.GGML_TYPE_F16
    if exact:  # its flash attention rounds to float16
        options.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
    model = llama_cpp.llama_model_load_from_file(file, llama_cpp.llama_model_default_params())
    context, batch = llama_cpp.llama_init_from_model(model, options), llama_cpp.llama_batch_init(B * N, 0, 1)
    V = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))

    def step(rows, start):
        T = len(rows[0])
        batch.n_tokens = B * T
        for i, (r, t) in enumerate(np.ndindex(B, T)):
            batch.token[i], batch.pos[i], batch.logits[i] = rows[r][t], start + t, t == T - 1
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, r
        if llama_cpp.llama_decode(context, batch):
            raise RuntimeError(f"llama.cpp did not compute {B} x {T} tokens")
        scores = (llama_cpp.llama_get_logits_ith(context, r * T + T - 1) for r in range(B))
        return [[int(np.ctypeslib.as_array(row, (V,)).argmax())] for row in scores]

    def write(clock):
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
        texts, new = [list(row) for row in job["rows"]], job["rows"]
        for _ in range(n):
            new = step(new, len(texts[0]) - len(new[0]))
            clock()
            texts = [text + ids for text, ids in zip(texts, new)]
        return [text[N:] for text in texts]

    return write, dict(version=f"llama.cpp by llama-cpp-python {llama_cpp.__version__}",
                       precision="float32 but for GELU" if exact else job["compute"],
                       weight_size=GGUF[job["compute"]][1], kept_size=4 if exact else 2)


def timed(write):
    """What is written, the seconds to the first token and to the last, and the most memory so far, as a dict."""
    times, start = [], time.perf_counter()
    ids = write(lambda: times.append(time.perf_counter() - start))
    return dict(seconds=time.perf_counter() - start, ids=ids, first=times[0], steps=len(times), peak=resident("VmHWM"),
                gpu_peak=torch.cuda.max_memory_allocated() if torch.cuda.is_initialized() else 0)


ENGINES = {"minDecode": ours, "hf": hf, "ctranslate2": ct2, "llama.cpp": llama}


def serve():
    """A worker: the first line says which engine it is, every further one asks for the rows once more."""
    out, sys.stdout = sys.stdout, sys.stderr  # what a library prints is no answer
    say = lambda **found: print(json.dumps(found), file=out, flush=True)
    try:
        job = json.loads(sys.stdin.readline())
        write, about = ENGINES[job["engine"]](job)
        with suppress(OSError):  # the most memory that is in use is counted from here
            Path("/proc/self/clear_refs").write_text("5")
        say(**about, threads=torch.get_num_threads())
        for _ in sys.stdin:
            say(**timed(write))
    except Exception as error:  # whatever an engine does
        say(error=one_line(f"{type(error).__name__}: {error}"))


# -----------------------------------------------------------------------------
# The other end


class Worker:
    """An engine's process. found: what it said of itself; ask() has it answer once more."""

    def __init__(self, name, job):
        self.name, self.answers = name, []
        env = {key: value for key, value in os.environ.items() if key != "OMP_WAIT_POLICY"}  # it would hurt some only
        code = "from plumbing.engines import serve; serve()"
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL, text=True, env=env | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))})
        self.send(job)

    def send(self, job):
        try:
            print(json.dumps(job), file=self.process.stdin, flush=True)
        except BrokenPipeError:
            pass  # answer() tells why

    def answer(self):
        line = self.process.stdout.readline()
        if not line:
            raise UserError(f"{self.name} has died, with exit code {self.process.wait()}: try a smaller model")
        found = json.loads(line)
        if "error" in found:
            raise UserError(f"{self.name}: {found['error']}")
        return found

    def ask(self):
        self.send(None)
        return self.answer()


@contextmanager
def working(jobs):
    """Workers, name -> job, that have loaded their models; none is left afterwards."""
    workers = []
    try:
        workers += [Worker(*job) for job in jobs]
        for worker in workers:
            worker.found = worker.answer()
        yield workers
    finally:
        for worker in workers:
            worker.process.kill()
            worker.process.communicate()
