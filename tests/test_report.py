"""The HTML page: complete, safe with any text, and alive in a real browser."""

import base64
import json
import re
import shutil
import subprocess
import urllib.request
from contextlib import contextmanager

import pytest
import torch

from compare import compare
from cost import attention_weights, matrix
from generate import generate, strategies
from model import BART, GPT, BARTConfig, GPTConfig
from plumbing.errors import UserError
from plumbing.report import check_path, check_size, symbol, write_report
from plumbing.utils import set_seed

NASTY = ["</script><script>throw 1</script>", "<b>", "\n", "{{data}}", "&amp;", "\u2028", "\\", '"', " Größe", "😀"]


def page(path, bart=True, M=5):
    """A report on a tiny model whose tokens have nasty names. Returns the weights and the generated ids."""
    set_seed(1)
    sizes = dict(n_head=2, n_embd=8, vocab_size=len(NASTY), block_size=32)
    layers = dict(n_encoder_layer=1, n_decoder_layer=2) if bart else dict(n_layer=2)
    model = BART(BARTConfig(**layers, **sizes)) if bart else GPT(GPTConfig(**layers, **sizes))
    for p in model.parameters():
        p.data.mul_(10)
    prompt = list(range(len(NASTY)))
    result = compare(model, strategies(model), [prompt], M, ignore_eos=True)
    with attention_weights(model) as weights:
        new = generate(model, [prompt], M, ignore_eos=True)[0]
    weights = {kind: [matrix(calls)[0] for calls in layers if calls] for kind, layers in weights.items()}
    target = ([model.config.start_id] if bart else prompt) + new
    write_report(path, result, [NASTY[i] for i in prompt] if bart else [], [NASTY[i] for i in target], weights)
    return weights, new


def data(path):
    text = path.read_text(encoding="utf-8")
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)[1])


def test_the_page_holds_the_weights_to_a_millionth(tmp_path):
    weights, _ = page(tmp_path / "report.html")
    stored = data(tmp_path / "report.html")
    for kind, layers in weights.items():
        for layer, text in zip(layers, stored["weights"][kind], strict=True):
            raw = base64.b64decode(text)
            numbers = [int.from_bytes(raw[i : i + 3], "little") for i in range(0, len(raw), 3)]
            found = torch.tensor(numbers, dtype=torch.float64).view(stored["shapes"][kind]) / stored["scale"]
            torch.testing.assert_close(found, layer.double(), rtol=0, atol=1e-6)
            torch.testing.assert_close(found.sum(-1), torch.ones(found.shape[:-1], dtype=torch.float64), rtol=0, atol=1e-6)


def test_a_page_that_cannot_be_written_is_refused_before_the_work(tmp_path):
    for path in (tmp_path, tmp_path / "nowhere" / "page.html"):
        with pytest.raises(UserError, match="cannot write"):
            check_path(path)
    check_path(tmp_path / "page.html")


def test_no_token_can_end_the_script_and_nothing_is_fetched(tmp_path):
    page(tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert text.count("</script>") == 2 and "throw 1</script>" not in text
    assert data(tmp_path / "report.html")["source"] == NASTY
    assert not re.search(r"(src|href)\s*=|@import|url\(|fetch\(", text)
    assert [url for url in re.findall(r"https?://[^\"' ]+", text) if "w3.org" not in url] == []  # SVG's namespace


def test_a_page_that_no_browser_would_open_is_refused_before_it_is_made(tmp_path):
    check_size(6 * 12 * 100 * (1024 + 100))  # 1,024 tokens into 100 by a BART-base fit
    with pytest.raises(UserError, match="21,580,800 attention weights .* limit is 9,000,000: use a shorter source"):
        check_size(12 * 16 * 100 * (1024 + 100))
    huge = torch.zeros(1).expand(10, 1000, 1000)
    with pytest.raises(UserError, match="10,000,000"):
        write_report(tmp_path / "report.html", dict(M=1, strategies=[]), [], ["a"], {"self": [huge], "cross": []})
    assert not (tmp_path / "report.html").exists()


def test_a_page_that_cannot_be_written_is_the_users_mistake(tmp_path):
    with pytest.raises(UserError, match="cannot write .*No such file"):
        page(tmp_path / "missing" / "report.html")


def test_a_dimension_becomes_a_formula_in_k():
    steps = range(2, 8)
    assert symbol({k: 64 for k in steps}) == "64"
    for a, b, formula in (1, 0, "k"), (1, 5, "k+5"), (3, 0, "3k"), (2, -2, "2k-2"):
        assert symbol({k: a * k + b for k in steps}) == formula
    assert symbol({2: 3, 3: 9, 4: 4}) == "3..9"


# ---- in a real browser


def call(url, body=None, method=None):
    """One WebDriver command: plain JSON over HTTP."""
    request = urllib.request.Request(url, None if body is None else json.dumps(body).encode(), method=method)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # the driver is on this machine
    with opener.open(request, timeout=60) as answer:
        return json.load(answer)["value"]


@contextmanager
def browser(profile):
    """A headless Chromium, as a function command(path, body=None)."""
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if not chromium or not shutil.which("chromedriver"):
        pytest.skip("needs chromium and chromedriver (Debian: chromium, chromium-driver)")
    driver = subprocess.Popen(["chromedriver", "--port=0"], stdout=subprocess.PIPE, text=True)
    try:
        port = next(m[1] for line in driver.stdout if (m := re.search(r"started successfully on port (\d+)", line)))
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
                 "--disable-component-update", "--disable-sync", "--window-size=1280,900", f"--user-data-dir={profile}"]
        session = f"http://127.0.0.1:{port}/session"
        made = call(session, {"capabilities": {"alwaysMatch": {
            "goog:chromeOptions": {"binary": chromium, "args": flags}, "goog:loggingPrefs": {"browser": "ALL"}}}})
        try:
            yield lambda path, body=None: call(f"{session}/{made['sessionId']}/{path}", body)
        finally:
            call(f"{session}/{made['sessionId']}", method="DELETE")  # closes the browser
    finally:
        driver.terminate()
        driver.wait(timeout=30)


def test_the_slider_changes_what_is_shown_and_the_console_stays_silent(tmp_path):
    _, new = page(tmp_path / "bart.html")
    page(tmp_path / "gpt.html", bart=False)

    with browser(tmp_path / "profile") as command:
        run = lambda script: command("execute/sync", {"script": f"return {script}", "args": []})
        text = lambda id: run(f"document.getElementById('{id}').textContent")
        drawn = lambda: run("[...document.querySelectorAll('canvas')].map(c => c.toDataURL())")

        def press(id, keys):
            element = command("element", {"using": "css selector", "value": f"#{id}"})
            command(f"element/{next(iter(element.values()))}/value", {"text": keys})

        command("url", {"url": (tmp_path / "bart.html").as_uri() + "#step=2"})
        start = NASTY[2]  # the decoder's start token is 2
        assert text("where") == "2 of 5" and text("text") == start + "".join(NASTY[i] for i in new[:2])
        assert "naive10 enter2 enter23" in text("enters") and "cached0 enter1 enter12" in text("enters")
        assert "2 of 6" in text("caches") and "10, unchanged" in text("caches")
        before, charts = drawn(), run("document.querySelector('#tokens svg').outerHTML")
        assert len(before) == 10 and before[1] != before[5]  # 2 strips for each strategy, 2 caches, 2 maps

        press("step", "\ue014" * 2)  # the right arrow key, twice
        assert text("where") == "4 of 5" and text("text") == start + "".join(NASTY[i] for i in new[:4])
        assert "naive10 enter4 enter50" in text("enters") and "cached0 enter1 enter14" in text("enters")
        after = drawn()
        assert before[-2:] != after[-2:] and before[:6] != after[:6]
        assert charts != run("document.querySelector('#tokens svg').outerHTML")

        press("layer", "1")
        layer = drawn()
        press("head", "1")
        assert after[-1] != layer[-1] != drawn()[-1]

        command("url", {"url": (tmp_path / "gpt.html").as_uri()})
        assert text("where") == "1 of 5 (prefill)" and "cachedno encoder10 enter10" in text("enters")
        assert command("se/log", {"type": "browser"}) == []
