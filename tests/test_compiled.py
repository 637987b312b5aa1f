"""The compiled step is the step: its logits, whatever its rows and lengths, one graph for all of them."""

import gc
import weakref

import pytest
import torch

import generate as program
from attention import NOWHERE, attend_explicit
from further import compiled as module
from further import exported
from further import quantize as whole_numbers
from further import reading
from further.compiled import compiled, greedy, padded
from further.quantize import quantize
from generate import advance, encode, generate, project
from model import BART, GPT, BARTConfig, GPTConfig
from plumbing.errors import NonFiniteError
from sampling import Choice, Chooser
from test_cli import call
from test_model import rough

SIZES = dict(n_head=4, n_kv_head=2, n_embd=32, vocab_size=61, block_size=48)


@pytest.fixture(scope="module", autouse=True)
def no_trials():
    """Which of several products is the fastest changes no number, and takes minutes to find out."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exported, "FASTEST", {"freezing": True})
        yield


@pytest.fixture
def no_code(monkeypatch):
    """Steps are traced as ever, and what was traced runs as it is: for what does not depend on the code made of it."""
    make = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, fullgraph: make(function, fullgraph=fullgraph,
                                                                           backend="eager"))
    monkeypatch.setattr(torch._inductor, "compile", lambda module, inputs: torch.fx.Interpreter(module).run)


def made(kind, dtype=torch.float64, **more):
    torch.manual_seed(3)
    model = GPT(GPTConfig(n_layer=2, **SIZES | more)) if kind == "gpt" else \
        BART(BARTConfig(n_encoder_layer=1, n_decoder_layer=2, **SIZES | more))
    return rough(model).to(dtype).eval()


class Keeping(Chooser):
    """Chooses, and keeps all logits that it was shown."""

    def __init__(self, limits, **choice):
        super().__init__(Choice(**choice), limits=limits)
        self.shown = []
        self.watch = lambda logits, rows, which: self.shown.append(logits.clone())


def decoded(model, make, prompts, n, leave=None, **choice):
    """All logits of a decoding of `prompts`, of which row `leave` ends after three tokens, and its texts."""
    bart = model.config.is_encoder_decoder
    sources, rows = (prompts, [[2]] * len(prompts)) if bart else (None, prompts)
    limits = [len(row) + (3 if r == leave else n) for r, row in enumerate(rows)]
    choose, texts = Keeping(limits, **choice), [list(row) for row in rows]
    step = make(model, sources, len(rows), max(limits), choose)
    for found in program.loop(step, rows, limits, lambda r, row: False):
        for text, ids in zip(texts, found):
            text += ids
    return choose.shown, texts


def prompts_of(*lengths):
    return [[(7 * n + 3 * i) % 59 + 2 for i in range(n)] for n in lengths]


@pytest.mark.parametrize("kind, pattern", [("gpt", "full"), ("bart", "full"), ("gpt", "local:5")])
def test_logits_are_those_of_the_plain_step_and_there_is_one_graph(kind, pattern, monkeypatch):
    model, graphs, count = made(kind, pattern=pattern), set(), []
    make = torch._inductor.compile
    monkeypatch.setattr(torch._inductor, "compile", lambda *args: count.append(1) or make(*args))
    for lengths, n, leave in [((4, 9), 20, None), ((5, 2), 12, 1), ((12, 3), 31, 0), ((7, 7), 9, None)]:
        before = len(count)
        expected, texts = decoded(model, program.cached, prompts_of(*lengths), n, leave)
        found, ours = decoded(model, compiled, prompts_of(*lengths), n, leave)
        assert ours == texts and len(found) == len(expected) == n
        assert max((a - b).abs().max().item() for a, b in zip(found, expected)) <= 1e-10
        graphs.add((kind == "bart" and lengths[0] == lengths[1], len(count) - before))
    # sources of one length have no mask, so BART has two steps; nothing else is compiled again
    assert sorted(n for _, n in graphs) == ([0, 1, 1] if kind == "bart" else [0, 1])


@pytest.mark.parametrize("kind, pattern", [("gpt", pattern) for pattern in (
    "full", "sinks:2,5", "strided:4", "fixed:6,2", "block:4", "column:4", "columns:6,2", "topk:4,2")] + [
    ("bart", "full"), ("bart", "sinks:2,5"), ("bart", "fixed:6,2")])
def test_a_graph_serves_only_the_shapes_that_it_was_written_for(kind, pattern, no_code):
    """Some patterns compute something else where there are few positions, or keep as many as a text has."""
    model = made(kind, pattern=pattern)
    for lengths, n in ((1,), 1), ((1, 1), 1), ((4, 9), 20), ((7, 7), 9), ((1, 1), 30), ((30, 2), 12):
        prompts = prompts_of(*lengths)
        expected = decoded(model, program.cached, prompts, n)
        found = decoded(model, compiled, prompts, n)
        assert found[1] == expected[1]
        assert max((a - b).abs().max().item() for a, b in zip(found[0], expected[0])) <= 1e-10
    assert len(module.steps(model).exported.codes) <= 6


def test_a_model_that_is_made_otherwise_is_compiled_anew(no_code):
    """Nothing in the code looks at modules any more: what it was made of must be another Steps' before."""
    model, prompts = made("gpt"), prompts_of(9, 12)
    before = generate(model, prompts, 9, strategy=compiled)
    steps = module.steps(model)
    assert generate(model.train(), prompts, 9, strategy=compiled) == before and module.steps(model) is steps
    for layer in model.h:
        layer.ln_1.eps = 0.5
    assert generate(model, prompts, 9, strategy=compiled) == generate(model, prompts, 9) != before
    for layer, other in zip(model.h, made("gpt", pattern="local:3").h):
        layer.attn.pattern = other.attn.pattern
    assert generate(model, prompts, 9, strategy=compiled) == generate(model, prompts, 9)
    for layer in model.h:
        layer.attn.pattern.window = 2
    assert generate(model, prompts, 9, strategy=compiled) == generate(model, prompts, 9)


@pytest.mark.parametrize("options", [dict(repetition_penalty=1.4, no_repeat_ngram=2),
                                     dict(temperature=0.9, seed=5, num_samples=2, top_k=9)], ids=["rules", "samples"])
def test_rules_and_draws_are_those_of_the_plain_step(options, no_code):
    model, prompts = made("bart"), prompts_of(6, 3)
    assert generate(model, prompts, 15, strategy=compiled, **options) == generate(model, prompts, 15, **options)


@pytest.mark.parametrize("kind", ["gpt", "bart"])
def test_the_most_likely_id_is_found_inside(kind, no_code):
    """Of those that count, whichever; rows that have ended go on and disturb nobody."""
    model, prompts = made(kind), prompts_of(6, 3, 9)
    whole = generate(model, prompts, 20)
    for options in dict(n_vocab=20), {}, dict(n_vocab=20, max_new_tokens=[20, 4, 9]), dict(stop=[[whole[1][4]]]):
        options = dict(max_new_tokens=20) | options
        assert generate(model, prompts, strategy=compiled, **options) == generate(model, prompts, **options)
    codes = module.steps(model).exported.codes
    assert [step for (step, *_), *_ in codes] == [greedy, greedy]  # for n_vocab is part of the code
    steps = program.stream(model, prompts, 9, strategy=compiled)
    next(steps), next(steps)
    model.lm_head.weight.data[3, 0] = torch.nan
    with pytest.raises(NonFiniteError):
        next(steps)


def test_whoever_chooses_may_be_any_function(no_code):
    """As compare()'s does, which lets every strategy write the same text."""
    model, rows = made("gpt"), prompts_of(6, 3)
    ways = []
    for make in program.cached, compiled:
        step, texts = make(model, None, 2, 14, lambda logits, rows, which: logits.argmin(-1, keepdim=True).tolist()), []
        for found in program.loop(step, rows, [14, 11], lambda r, row: False):
            texts.append(found)
        ways.append(texts)
    assert ways[0] == ways[1]


def test_weights_that_change_are_not_the_frozen_ones():
    model, prompts = made("gpt", torch.float32), prompts_of(4, 4)
    before = generate(model, prompts, 9, strategy=compiled)
    with torch.no_grad():
        for block in model.h:
            block.mlp.c_fc.weight.mul_(-3)
    assert generate(model, prompts, 9, strategy=compiled) == generate(model, prompts, 9) != before


@pytest.mark.parametrize("H, KV, S", [(2, 2, 80), (4, 2, 32), (3, 1, 1)])
def test_attention_written_out_is_attention(H, KV, S):
    torch.manual_seed(S)
    q = torch.randn(5, 1, H + 1, 8, dtype=torch.double).transpose(1, 2)[:, :H]  # as in a product with keys and values
    k, v = torch.randn(2, 5, KV, S + 3, 8, dtype=torch.double)[:, :, :, :S]     # as in a larger buffer
    seen = torch.rand(5, 1, 1, S) < 0.4
    seen[..., 0] = True
    for mask in seen, seen[:1]:
        assert (reading.written_out(q, k, v, mask) - attend_explicit(q, k, v, mask)[0]).abs().max() <= 1e-12


def test_what_a_cpu_compiles_has_it_for_single_queries_and_shares_the_weights(monkeypatch):
    model, asked, written_out = made("bart"), [], reading.written_out
    monkeypatch.setattr(reading, "written_out", lambda *args: asked.append(args) or written_out(*args))
    other, named = reading.reading(model), dict(model.named_parameters())
    assert all(p is named[name] for name, p in other.named_parameters())
    assert not any(isinstance(m, reading.Read) for m in model.modules())
    assert {type(m) for m in other.modules() if isinstance(m, torch.nn.Linear)} == {reading.OneRow}
    model.lm_head.weight.data = model.lm_head.weight.t().contiguous().t()
    head = reading.reading(model).lm_head.weight
    assert head.is_contiguous() and torch.equal(head, model.lm_head.weight)
    source = torch.tensor(prompts_of(9))
    encoded = other.encode(source)
    whole = other.decode(source, encoded)
    assert not asked
    steps = [other.decode(source[:, t : t + 1], encoded, None, True, t) for t in range(9)]
    assert len(asked) == 9 * 2 * 2 and (torch.cat(steps, 1) - whole).abs().max() <= 1e-10


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("n", [5, 8, 43])  # fewer than places, as many, and three besides
def test_a_matrix_may_be_read_in_several_places(n, dtype, monkeypatch):
    monkeypatch.setattr(reading, "LARGE", 1)
    torch.manual_seed(n)
    x, weight = torch.randn(24, dtype=dtype), torch.randn(n, 24, dtype=dtype)
    whole = (40 * weight).to(torch.int8)
    for matrix in weight, whole:
        found, exact = reading.side_by_side(matrix, x), matrix.double() @ x.double()
        assert found.dtype == torch.promote_types(dtype, torch.float32)  # nothing has been rounded to bfloat16
        assert (found - exact).abs().max() <= (1e-12 if dtype == torch.float64 else 1e-6 * exact.abs().max())


def test_one_row_of_whole_numbers_is_rounded_nowhere_and_others_as_ever(monkeypatch):
    monkeypatch.setattr(whole_numbers, "AMX", True)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    other = reading.reading(quantize(made("gpt", torch.float32)))
    head, x = other.lm_head, torch.randn(3, 32)
    exact = x @ (head.weight * head.scale[:, None]).T
    assert type(head) is reading.OneRowOfWhole and (head(x[:1]) - exact[:1]).abs().max() <= 1e-5
    assert torch.equal(head(x), whole_numbers.Int8Linear.forward(head, x)) and (head(x) - exact).abs().max() > 1e-4


def test_the_compiler_knows_every_product_of_whole_numbers_where_there_is_amx(monkeypatch):
    """With nothing between the operations that it looks for: it has kernels for them as one."""
    monkeypatch.setattr(whole_numbers, "AMX", True)
    torch._dynamo.utils.counters.clear()
    generate(quantize(made("bart", torch.float32)), prompts_of(4, 3), 3, strategy=compiled)
    found = torch._dynamo.utils.counters["inductor"]["qlinear_weight_prepack_matcher_count"]
    assert found == 2 * 6 + 1  # of two layers, and the head


def test_there_may_be_many_models_and_batches(no_code):
    for n in range(3):  # torch.compile's own limit is eight versions
        model = made("gpt", n_embd=8 * (n + 1), n_kv_head=4)
        for rows in 1, 2, 3:
            prompts = prompts_of(*range(3, 3 + rows))
            assert generate(model, prompts, 4, strategy=compiled) == generate(model, prompts, 4)


def test_two_decodings_at_once_do_not_meet(no_code):
    model, (a, b) = made("gpt"), ([[5, 6, 7], [8]], [[9, 10], [11, 12, 13, 14]])
    steps = [program.stream(model, prompts, 8, strategy=compiled) for prompts in (a, b)]
    found = [[], []]
    for _ in range(8):
        for texts, step in zip(found, steps):
            texts.append(next(step))
    for texts, prompts in zip(found, (a, b)):
        rows = [[i for ids in column for i in ids] for column in zip(*texts)]
        assert rows == generate(model, prompts, 8)


def test_only_the_last_two_models_are_kept_with_their_code(no_code):
    def forgotten():
        model = made("gpt")
        generate(model, [[3, 4]], 3, strategy=compiled)
        return weakref.ref(model)

    first, second, third = (forgotten() for _ in range(3))
    torch._dynamo.reset()
    gc.collect()
    assert first() is None and second() and third()


@torch.inference_mode()
def test_the_step_that_chooses_finds_what_the_loop_finds_and_waits_at_the_end():
    for kind in "gpt", "bart":
        model, prompts = made(kind), prompts_of(5, 3)
        sources, rows = (prompts, [[2], [2]]) if kind == "bart" else (None, prompts)
        expected = [row + new for row, new in zip(rows, generate(model, prompts, 12, n_vocab=50))]
        memory, cache = project(model, *encode(model, sources)), model.new_cache(2, 20)
        ids, at = torch.zeros(2, 21, dtype=torch.long), torch.tensor([[len(row) - 1] for row in expected])
        first = advance(model, rows, cache, memory)[:, 0, :50].argmax(-1)
        at = torch.tensor([[len(row)] for row in rows])
        ids.scatter_(1, at, first[:, None])
        finite = torch.tensor([True, True])
        for _ in range(40):
            greedy(model, model.lm_head, ids, at, cache, memory, finite, 50)
        for row, text, own in zip(rows, expected, ids.tolist()):
            assert own[len(row) : len(text)] == text[len(row) :]
        assert at.tolist() == [[19], [19]] and finite.all()
        model.lm_head.weight[3, 0] = torch.nan  # of a row of the head: every score of that id is none
        greedy(model, model.lm_head, ids, at, cache, memory, finite, 50)
        assert not finite.any()


@pytest.mark.parametrize("choice", [{}, dict(temperature=1.3, seed=5, n_vocab=50)], ids=["greedy", "drawn"])
@pytest.mark.parametrize("kind", ["gpt", "bart"])
def test_ids_that_the_steps_have_chosen_are_fetched_some_at_a_time(kind, choice, no_code, monkeypatch):
    """As on a GPU. Rows of different lengths, of which one ends in the middle of a run."""
    monkeypatch.setattr(module, "RUN", 5)
    model, prompts, asked, passes = made(kind), prompts_of(6, 3), [], []
    sources, rows = (prompts, [[2], [2]]) if kind == "bart" else (None, prompts)
    expected = generate(model, prompts, 18, ignore_eos=True, **choice)
    limits = [len(rows[0]) + 18, len(rows[1]) + 7]
    step = compiled(model, sources, 2, max(limits), Chooser(Choice(**choice), limits=limits))
    step.inside, step.recorded, texts = True, True, [[], []]
    monkeypatch.setattr(module.Buffers, "run", lambda self, times, run=module.Buffers.run:
                        asked.append(times) or run(self, times))
    monkeypatch.setattr(module, "advance", lambda *args: passes.append([list(row) for row in args[1]]) or advance(*args))
    for found in program.loop(step, [list(row) for row in rows], limits, lambda r, row: False):
        for text, ids in zip(texts, found):
            text += ids
    assert texts == [expected[0], expected[1][:7]]
    # the first comes with a GPT's prefill, for which BART has no use, and no more at the end than were asked for
    assert asked == ([1, 5, 5, 5, 1] if kind == "gpt" else [1, 5, 5, 5, 2])
    assert passes == [[[0], [0]], prompts][: 2 if kind == "gpt" else 1]  # the first is that of new buffers


@torch.inference_mode()
def test_a_memory_with_room_is_the_memory():
    model = made("bart")
    for prompts in prompts_of(6, 6), prompts_of(6, 3):
        memory = project(model, *encode(model, prompts))
        room = padded(memory, 16)
        assert room.key_pos.shape == (2, 16) and (room.key_pos[:, 6:] == NOWHERE).all() and padded(memory, 6) is memory
        ids = torch.tensor([[2, 7], [2, 9]])
        assert (model.features(ids, room) - model.features(ids, memory)).abs().max() <= 1e-10


@pytest.mark.parametrize("recorded", [True, False])
def test_buffers_serve_another_request(recorded, no_code):
    """As on a GPU, where they are recorded: nothing is left of the sources and texts before."""
    model, first, second = made("bart"), prompts_of(6, 3), prompts_of(5, 6)
    memories = [project(model, *encode(model, sources)) for sources in (first, second)]
    with torch.inference_mode():
        buffers = module.Buffers(model, module.steps(model), 2, 20, memories[0])
        if recorded:
            buffers.record(model)
        for memory in memories:
            buffers.read(memory)
            rows, cache = [[2, 5], [2, 7]], model.new_cache(2, 20)
            expected, found = advance(model, rows, cache, memory)[:, 0], buffers.prefill(model, rows, 1)
            for _ in range(5):
                assert (found - expected).abs().max() <= 1e-10
                rows = [row + new for row, new in zip(rows, expected.argmax(-1, keepdim=True).tolist())]
                if not buffers.once:
                    buffers.trace(model)
                buffers.enter(rows)
                expected, found = advance(model, rows, cache, memory)[:, 0], buffers.once()


def test_one_recorded_step_draws_at_all_temperatures_and_by_all_seeds():
    torch.manual_seed(1)
    draws, texts = None, set()
    for temperature, top_p, seed in (0.7, 0.9, 1), (2.0, 0.9, 1), (2.0, 0.2, 1), (2.0, 0.9, 7):
        given, own = (Chooser(Choice(temperature=temperature, top_p=top_p, seed=seed)) for _ in "ab")
        draws = draws or module.Draws(given, 3, 9, "cpu")  # of the first, whose numbers it forgets
        rows, ids, finite = [[1], [2, 3], [4, 5, 6]], torch.zeros(3, 10, dtype=torch.long), torch.tensor([True] * 3)
        at = torch.tensor([[0], [1], [2]])
        draws.enter(given, rows)
        for logits in torch.randn(5, 3, 50).bfloat16():
            draws(logits, ids, at, finite)
            assert ids.gather(1, at).tolist() == own(logits, rows, [0, 1, 2])
        assert at.tolist() == [[5], [6], [7]] and finite.all()
        texts.add(str(ids))
    logits[1, 3] = torch.nan
    draws(logits, ids, at, finite)
    assert finite.tolist() == [True, False, True] and len(texts) == 4


def test_buffers_come_in_a_few_sizes():
    assert [module.bucket(n, 2000) for n in (1, 64, 65, 288, 513, 1100, 1999)] == [64, 64, 128, 320, 640, 1280, 2000]


def test_without_a_compiler_it_is_refused_in_a_line(tiny_gpt, monkeypatch):
    import torch._inductor.cpp_builder as builder
    monkeypatch.setattr(builder, "get_cpp_compiler", lambda: 1 / 0)
    done = call(program.main, "--model", tiny_gpt.path, "--prompt", "the", "--device", "cpu", "--compile")
    assert done.code == 2 and "install g++" in done.err and done.err.count("\n") == 1


def test_on_the_command_line_it_writes_the_same(tiny_gpt):
    args = "--model", tiny_gpt.path, "--prompt", "the", "--device", "cpu", "--max-new-tokens", 12, "--ignore-eos"
    plain, ours = call(program.main, *args), call(program.main, *args, "--compile")
    assert ours.code == plain.code == 0 and ours.out == plain.out and not ours.err


def test_a_text_does_not_slide():
    with pytest.raises(ValueError, match="does not let it slide"):
        generate(made("gpt"), [[3] * 40], 20, strategy=compiled, overflow="slide")
