"""
Break the code on purpose, one bug at a time, and see that the tests notice.

    python tests/mutants.py

Each mutant is a mistake that somebody really made in some codebase. It is put into a copy of the project, and the
tests of attention, model and generation must fail there. Takes a few minutes; exits with 1 if a mutant survives.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
TESTS = ["tests/test_attention.py", "tests/test_model.py", "tests/test_generate.py", "tests/test_sampling.py"]
MUTANTS = [  # what, file, the right code, the wrong code
    ("the mask of a chunk is aligned top-left", "attention.py",
     "return self.output(q, k, v, dense(causal, query_pos, torch.arange(S, device=x.device)))",
     "return self.output(q, k, v, is_causal=True)"),
    ("the mask is skipped when the cache is used", "attention.py", "return self.output(q, k, v, is_causal=True)",
     "return self.output(q, k, v, is_causal=not use_kv_cache)"),
    ("a chunk sees its own future", "attention.py", "return k <= q", "return k <= q + 1"),
    ("positions are not offset", "model.py", "return start_pos + torch.arange(T, device=device)", "return torch.arange(T, device=device)"),
    ("positions are offset by one too few", "model.py", "return start_pos + torch.arange(T, device=device)",
     "return (start_pos + torch.arange(T, device=device) - (T == 1)).clamp(min=0)"),
    ("keys are written one slot late", "attention.py", "self.k[:B, :, start_pos:end] = k.detach()",
     "self.k[:B, :, start_pos:end] = k.detach().roll(1, 2)"),
    ("values are not written after the prefill", "attention.py", "self.v[:B, :, start_pos:end] = v.detach()",
     "self.v[:B, :, start_pos:end] = v.detach() * (start_pos == 0)"),
    ("only the first row is written", "attention.py", "self.k[:B, :, start_pos:end] = k.detach()",
     "self.k[:1, :, start_pos:end] = k[:1].detach()"),
    ("the whole buffer is read, without a mask", "attention.py", "return self.k[:B, :, :end], self.v[:B, :, :end]",
     "return self.k[:B], self.v[:B]"),
    ("tensor positions are those of the first row", "attention.py", "pos = (start_pos + torch.arange(T, device=k.device)).expand(B, T)",
     "pos = (start_pos.flatten()[0] + torch.arange(T, device=k.device)).expand(B, T)"),
    ("a gap is accepted", "attention.py", "if not tensor and start_pos not in (0, self.filled):", "if False:"),
    ("an overflow is accepted", "attention.py", "if T + (0 if tensor else start_pos) > self.length:", "if False:"),
    ("a batch above the maximum is accepted", "attention.py", "if B > self.batch_size:", "if False:"),
    ("the batch may change in mid-stream", "attention.py", "if (tensor or start_pos > 0) and self.rows not in (0, B):", "if False:"),
    ("an old text is not cleared", "attention.py", "self.k[: self.rows, :, filled : self.filled] = 0", "pass"),
    ("the cache keeps gradients", "attention.py", "= k.detach()\n        self.v[:B", "= k\n        self.v[:B"),
    ("the cache is born in inference mode", "attention.py", "    @torch.inference_mode(False)", "    @torch.no_grad()"),
    ("the cache keeps its first dtype", "attention.py", "if self.k is None or self._layout(self.k) != self._layout(k):", "if self.k is None:"),
    ("shared heads are repeated in the wrong order", "attention.py",
     "k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)  # (B, H, S, D)",
     "k, v = k.repeat(1, group, 1, 1), v.repeat(1, group, 1, 1)"),
    ("scores are not scaled", "attention.py", "/ math.sqrt(q.size(-1))", "* 1.0"),
    ("a failed pass leaves its first layers ahead", "attention.py", "layer.cache.rewind(min(start_pos, layer.cache.filled))", "pass"),
    ("a new source that fails leaves a mixture of two", "attention.py", "                layer.cache = cache\n", "                pass\n"),
    ("padding of a source is attended to", "attention.py", "return lambda b, h, q, k: k < lengths[b]", "return lambda b, h, q, k: k >= 0 * lengths[b]"),
    ("an old source answers for a new one", "attention.py",
     "return same and (lengths is None or", "return True or (lengths is None or"),
    ("a memory that was overwritten passes for the stored one", "attention.py", "and version(memory) == self.version)", "and True)"),
    ("the source is projected at every step", "generate.py", "given = dict.fromkeys(given)", "given = read(model, source)"),
    ("an uncached pass moves the cache", "model.py", "x = block(x, use_kv_cache, start_pos)",
     "x = block(x, use_kv_cache or block.attn.cache is not None, start_pos)"),
    ("ragged rows share one position", "generate.py", "start_pos = lengths[0] - 1 if len(set(lengths)) == 1 else last", "start_pos = max(lengths) - 1"),
    ("a ragged prefill takes the last column", "generate.py", "torch.tensor(ends, device=x.device) - 1", "max(ends) - 1"),
    ("dropout is on while generating", "generate.py", "            m.training = False\n", "            pass\n"),
    ("training mode is not restored", "generate.py", "            m.training = True\n", "            pass\n"),
    ("caches are left on the model", "generate.py", "        self.mode.__exit__(*error)\n        self.swap()", "        self.mode.__exit__(*error)"),
    ("the first row that ends stops the batch", "generate.py", "if not any(alive):", "if not all(alive):"),
    ("a row goes on after its end", "generate.py", "yield [i if a else None for i, a in zip(ids, alive)]", "yield ids"),
    ("every position passes through the head", "generate.py", "return model.lm_head(x[rows, torch.tensor(ends, device=x.device) - 1])",
     "return model.lm_head(x)[rows, torch.tensor(ends, device=x.device) - 1]"),
    ("one token too many is accepted", "generate.py", "if longest + max_new_tokens > config.block_size:", "if longest + max_new_tokens > config.block_size + 1:"),
    ("the highest id wins among equals", "sampling.py", "logits.argmax(-1)", "logits.size(-1) - 1 - logits.flip(-1).argmax(-1)"),
    ("top-k keeps ties", "sampling.py", "probs, ids = probs.topk(min(self.top_k or probs.size(-1), probs.size(-1)))",
     "probs, ids = (probs * (probs >= probs.topk(min(self.top_k or 1, probs.size(-1)))[0][:, -1:])).topk(probs.size(-1))"),
]


def survives(file, right, wrong):
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, "project")
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".*", "out", "__pycache__", "notebooks"))
        text = (copy / file).read_text()
        assert text.count(right) == 1, f"{file} holds {right!r} {text.count(right)} times: mend the list of mutants"
        (copy / file).write_text(text.replace(right, wrong))
        tests = [test for test in TESTS if (copy / test).exists()]
        done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests], cwd=copy,
                              capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        assert done.returncode in (0, 1), done.stdout + done.stderr
        return done.returncode == 0


if __name__ == "__main__":
    if len(sys.argv) > 1:
        sys.exit(__doc__)
    alive = 0
    for what, *mutant in MUTANTS:
        lives = survives(*mutant)
        alive += lives
        print(f"{'SURVIVES' if lives else 'noticed '}  {what}", flush=True)
    print(f"{len(MUTANTS) - alive} of {len(MUTANTS)} mutants noticed")
    sys.exit(alive > 0)
