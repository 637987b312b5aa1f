"""Pages that hold code: the diffs of CHANGING.md apply and do what it promises; the Python of the README runs."""

import os
import re
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

PAGE = (ROOT / "CHANGING.md").read_text(encoding="utf-8")
SECTIONS = dict(re.findall(r"^## (\w+).*?\n.*?^```diff\n(.*?)^```", PAGE, re.M | re.S))
CHECK = '''
import random, sys
import torch
from generate import generate, strategies
from model import BART, GPT, BARTConfig, GPTConfig
from cost import count, predict
from plumbing.models import count_parameters
from plumbing.weights import load_pretrained, save_pretrained

def rough(model):
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.4)
    return model.double().eval()

torch.manual_seed(0)
sizes = dict(n_head=4, n_kv_head=2, n_embd=16, vocab_size=13, block_size=20)
gpt, bart = rough(GPT(GPTConfig(n_layer=2, **sizes))), rough(BART(BARTConfig(n_encoder_layer=1, n_decoder_layer=2, **sizes)))
for seed in range(30):  # cached equals uncached, however the text is cut
    rng, idx = random.Random(seed), torch.randint(13, (3, 20))
    cuts = [0, *sorted(rng.sample(range(1, 20), rng.randint(1, 6))), 20]
    for model, given in (gpt, []), (bart, [torch.randint(13, (3, 7))]):
        call = model if model is gpt else lambda ids, *cached: bart.decode(ids, bart.encode(given[0]), None, *cached)
        parts = [call(idx[:, a:b], True, a) for a, b in zip(cuts, cuts[1:])] if model is gpt else [
            bart.decode(idx[:, a:b], None if a else bart.encode(given[0]), None, True, a) for a, b in zip(cuts, cuts[1:])]
        assert (torch.cat(parts, 1) - call(idx)).abs().max() < 1e-10
prompts = [[1, 2, 3], [4], [5, 6, 7, 8, 9]]
for model in gpt, bart:  # also in ragged batches, one token at a time
    rows = [generate(model, prompts, 9, strategy=strategy, ignore_eos=True) for strategy in strategies(model)]
    assert all(row == rows[0] for row in rows)
    assert rows[0] == [generate(model, [prompt], 9, ignore_eos=True)[0] for prompt in prompts]
    assert count_parameters(model.config) == model.count_parameters()
    with count(model) as cost:
        generate(model, [[1, 2, 3]], 9, ignore_eos=True)
    assert cost.linear_rows == predict(model.config, "cached", 3, 9)["linear_rows"]
changed = rough(GPT(GPTConfig(n_layer=1, n_head=2, n_embd=8, vocab_size=13, block_size=20)))  # nothing odd in its config
save_pretrained(sys.argv[1], changed)
assert '"mindecode-gpt"' in open(sys.argv[1] + "/config.json").read()  # it does not pass for a gpt2
again, _ = load_pretrained(sys.argv[1])
assert (again(idx) - changed(idx)).abs().max() < 1e-12
order = torch.arange(20).flip(0)  # and positions still matter: the last logits differ when the text before is reversed
idx = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 8, 9, 0]])
assert (gpt(idx)[0, -1] - gpt(torch.cat([idx[:, :9].flip(1), idx[:, 9:]], 1))[0, -1]).abs().max() > 1e-3
'''
ENDLESS = '''
for pattern in "local:8", "sinks:2,8":  # nothing of the model has block_size rows any more, and no buffer
    gpt = rough(GPT(GPTConfig(n_layer=2, **sizes | {"block_size": 10**6, "pattern": pattern})))
    idx, cache = torch.randint(13, (2, 300)), gpt.new_cache(2)
    parts = [gpt.features(idx[:, a:b], cache, a) for a, b in ((0, 30), (30, 130), *((i, i + 1) for i in range(130, 300)))]
    assert (torch.cat(parts, 1) - gpt.features(idx)).abs().max() < 1e-10
    assert cache.nbytes == 2 * 2 * 2 * 2 * 4 * 8 * (8 if pattern == "local:8" else 10) and gpt.count_parameters() < 10**4
'''


def patched(tmp_path, diff):
    """A copy of the project with a diff applied."""
    git = shutil.which("git") or pytest.skip("needs git to apply a diff")
    shutil.copytree(ROOT, tmp_path / "project", ignore=shutil.ignore_patterns(".*", "out", "notebooks", "__pycache__"))
    done = subprocess.run([git, "apply", "--unidiff-zero", "-"], input=diff, cwd=tmp_path / "project", text=True,
                          capture_output=True, env=os.environ | {"GIT_CEILING_DIRECTORIES": str(tmp_path)})
    assert done.returncode == 0, f"CHANGING.md does not fit the code any more: {done.stderr}"
    return tmp_path / "project"


def test_the_page_shows_three_changes():
    assert list(SECTIONS) == ["Rotary", "ALiBi", "RMSNorm"]


@pytest.mark.parametrize("name", SECTIONS)
def test_the_change_keeps_what_the_page_promises(name, tmp_path):
    project = patched(tmp_path, SECTIONS[name])
    (project / "check.py").write_text(CHECK + (ENDLESS if name == "Rotary" else ""))
    done = subprocess.run([sys.executable, "check.py", str(tmp_path / "saved")], cwd=project, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    tests = ["tests/test_schedules.py", "tests/test_model.py", "tests/test_generate.py"]  # the project's own, in fp64
    which = "0-gpt or 0-bart or sparse_patterns or (random_configurations and dtype0) or every_strategy or threads"
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests, "-k", which], cwd=project,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]


@pytest.mark.parametrize("name", SECTIONS)
def test_the_page_names_the_files_that_the_change_touches(name):
    touched = set(re.findall(r"^\+\+\+ b/(\S+)", SECTIONS[name], re.M))
    text = re.search(rf"^## {name}.*?```diff", PAGE, re.M | re.S)[0]
    assert set(re.findall(r"`(\w+\.py)`", text)) == touched


def test_the_python_of_the_readme_runs_and_prints_what_it_says(capsys):
    names = {}
    for block in re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(encoding="utf-8"), re.M | re.S):
        exec(compile(block, "README.md", "exec"), names)
        for said in re.findall(r"^print\(.*?# (\[.*?\])", block, re.M):
            assert capsys.readouterr().out.strip() == said
