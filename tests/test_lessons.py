"""The lessons grade what they are given: right answers, each typical mistake, and whatever else anybody may type."""

import importlib
import json
import re
import sys
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

import bench
from conftest import ROOT, call
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(ROOT / "notebooks"))
from course import Task, claims, grade, lesson, slides  # noqa: E402
from course.build import METADATA, execute, notebook, sources  # noqa: E402

SOURCES = sources()
TASKS = {int(source.name[:2]): importlib.import_module(f"course.tasks{source.name[:2]}").TASKS for source in SOURCES}
EACH = [pytest.param(task, id=f"{number:02}-{name}") for number, tasks in TASKS.items() for name, task in tasks.items()]


@pytest.mark.parametrize("task", EACH)
def test_the_reference_answer_is_right(task):
    assert grade(task, task.right) == ("right", task.praise)


@pytest.mark.parametrize("task", EACH)
def test_every_typical_mistake_hears_its_own_hint(task):
    assert task.wrong, "nobody knows how this one goes wrong"
    for answer, hint in task.wrong:
        assert grade(task, answer) == ("not right", hint) and len(hint) > 10
    assert len({hint for _, hint in task.wrong}) == len(task.wrong)


def prints(*args):
    print("42")


def stumbles(*args):
    return args[0].nothing_of_the_sort + 1 / 0


def gives_up(*args):
    sys.exit(2)


class Thorny:
    """Whatever one does with it fails."""

    def fail(self, *args):
        raise RuntimeError("do not touch")

    __eq__ = __len__ = __iter__ = __float__ = __bool__ = __repr__ = __array__ = fail
    __hash__ = None


ODD = [None, "", "fourty-two", float("nan"), float("inf"), -1, 0, 10**400, 1j, b"x", [], {}, set(), [[1], [1, 2]], [None],
       torch.tensor([]), torch.full((2, 3), torch.nan), torch.zeros(3, 1, 2, dtype=torch.bool), object(), Thorny(), Thorny,
       int, torch.nn.Linear, (i for i in [1]), iter([]), range(10**12), print, prints, stumbles, gives_up, len,
       lambda: 1, lambda *args: None, lambda *args: float("nan"), lambda *args: args, lambda *args: [..., None][1:],
       lambda *args: Thorny(), lambda *args: torch.full((1,), torch.nan), lambda *args: "text", lambda *args: args[0],
       lambda *args: args[0][..., :1]]
JUNK = st.one_of(st.sampled_from(ODD), st.integers(), st.floats(), st.text(), st.lists(st.floats(), max_size=4),
                 st.recursive(st.none() | st.floats() | st.text(), lambda each: st.lists(each) | st.dictionaries(
                     st.text(), each), max_leaves=8))


@pytest.mark.parametrize("task", EACH)
@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(answer=JUNK)
def test_whatever_somebody_types_gets_a_line_and_never_a_traceback(task, answer):
    verdict, words = grade(task, answer)
    assert verdict in ("right", "not right") and "\n" not in words and len(words) < 700
    assert verdict == "right" or len(words) > 10


@pytest.mark.parametrize("odd", ODD, ids=range(len(ODD)))
def test_odd_answers_to_every_exercise(odd):
    for number, tasks in TASKS.items():
        for name, task in tasks.items():
            verdict, words = grade(task, odd)
            assert verdict == "right" or verdict == "not right" and len(words) > 10 and "\n" not in words, (number, name)


@pytest.mark.parametrize("unfilled", [..., (..., 3), {"a": ...}, lambda *args: ...], ids=range(4))
def test_what_is_left_open_is_not_yet(unfilled):
    task = Task(lambda x: x, cases=[(1,)]) if callable(unfilled) else Task(3.0)
    assert grade(task, unfilled) == ("not yet", "")


def test_a_number_is_right_in_whatever_form_it_comes():
    task = Task(107_450, wrong=[(106_326, "the first token is no call")])
    for right in 107_450, 107_450.0, "107,450", " 107450 ", torch.tensor(107_450), torch.tensor([[107_450]]).numpy()[0, 0]:
        assert grade(task, right) == ("right", "")
    assert grade(task, "106,326") == ("not right", "the first token is no call")
    assert grade(Task({(None, "fc")}), [(None, "fc")]) == ("right", "")
    assert grade(Task(dict(q=1, k=(4, 8))), dict(q=1, k=(5, 8))) == ("not right", "k: It is not 5.0.")


def test_a_function_is_judged_by_what_it_returns_on_cases_of_its_own():
    def doubles_in_place(x):
        return x.mul_(2)

    task = Task(lambda x: 2 * x, wrong=[(lambda x: x, "not doubled")], cases=[(torch.ones(2),), (torch.zeros(2, 2),)])
    for right in doubles_in_place, lambda x: (2 * x).tolist(), lambda x: (2 * x).float().numpy():
        assert grade(task, right)[0] == "right"
    assert grade(task, lambda x: x) == ("not right", "not doubled")
    assert "shape is (1, 2)" in grade(task, lambda x: 2 * x[None])[1]
    assert "first at [1]: yours is 7" in grade(task, lambda x: torch.tensor([2.0, 7.0]))[1]
    assert "NaNs, the first at [0]" in grade(task, lambda x: x * torch.nan)[1]
    assert "return it instead" in grade(task, prints)[1]
    assert "returns nothing" in grade(task, lambda x: None)[1]
    assert "raised AttributeError" in grade(task, stumbles)[1] and "(at: return args[0]" in grade(task, stumbles)[1]
    assert "raised NotImplementedError" in grade(task, lambda x: (x > 0) @ (x > 0).T)[1]  # PyTorch: not for booleans
    assert "without calling it" in grade(task, 3)[1]
    assert "call it" in grade(Task(3), lambda: 3)[1]


def test_check_prints_and_accepted_is_yours_once_it_is_right(capsys):
    number = next(iter(TASKS))
    check, accepted, claim, score = lesson(number)
    name, task = next(iter(TASKS[number].items()))
    check(name, ...)
    assert capsys.readouterr().out == f"{name}: not yet.\n" and accepted(name) is task.right
    check(name, task.wrong[0][0])
    assert capsys.readouterr().out == f"{name}: not right. {task.wrong[0][1]}\n" and accepted(name) is task.right
    check(name, task.right)
    assert capsys.readouterr().out.startswith(f"{name}: right.")
    check(name + "x", 3)
    assert f"did you mean '{name}'" in capsys.readouterr().out
    score()
    assert capsys.readouterr().out.startswith(f"1 of {len(TASKS[number])} right\n")
    claim(1, "one", "two", False)
    assert capsys.readouterr().out == "Claim 1: one\n    here: two\n    It does not hold here.\n"


def test_the_page_goes_on_with_your_function_and_with_a_value_in_its_plain_form(monkeypatch):
    tasks = {"number": Task(107_450), "function": Task(len, cases=[([1, 2],)])}
    monkeypatch.setitem(sys.modules, "course.tasks99", SimpleNamespace(TASKS=tasks))
    check, accepted, _, _ = lesson(99)
    mine = lambda x: sum(1 for _ in x)
    check("number", "107,450")
    check("function", mine)
    assert accepted("number") + 1 == 107_451 and accepted("function") is mine


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.stem)
def test_the_page_on_disk_is_made_of_its_source_was_run_in_order_without_error_is_small_and_names_no_machine(source):
    path = source.with_suffix(".ipynb")
    page = json.loads(path.read_text(encoding="utf-8"))
    assert [["".join(cell["source"]), cell["cell_type"]] for cell in page["cells"]] == \
        [[cell.source, cell.cell_type] for cell in notebook(source).cells], "python notebooks/course/build.py --write"
    code = [cell for cell in page["cells"] if cell["cell_type"] == "code"]
    outputs = [output for cell in code for output in cell["outputs"]]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    assert {output["output_type"] for output in outputs} <= {"stream", "display_data"}  # no error, no stray value
    assert {output.get("name", "stdout") for output in outputs} == {"stdout"}  # no warning
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert len(page["cells"]) <= 30 and path.stat().st_size < 500_000
    assert page["metadata"] == METADATA and not any(cell["metadata"] for cell in page["cells"])
    for output in outputs:
        output.get("data", {}).pop("image/png", None)  # its letters are no words
    assert not re.search(r"/(home|root|Users|tmp|work|usr|opt)/|[A-Z]:\\\\", json.dumps(page))


def test_a_lesson_finds_the_modules_from_the_repository_root_too():
    nbclient = pytest.importorskip("nbclient", reason="a lesson needs a kernel to run: pip install -e .[notebooks]")
    pages = list(map(notebook, SOURCES))
    firsts = [next(cell for cell in page.cells if cell.cell_type == "code") for page in pages]
    assert all(first.source.startswith('import sys; sys.path += ["..", "notebooks"]') for first in firsts)
    pages[-1].cells = firsts[-1:]
    with mock.patch.dict("os.environ"):  # execute() changes it
        try:
            execute(pages[-1], folder=ROOT)
        except nbclient.exceptions.CellExecutionError as error:
            pytest.fail(str(error))


def test_lesson_4_finds_every_number_of_the_published_notebook_and_one_claim_alone_does_not_hold():
    page = json.loads((ROOT / "notebooks" / "04_kv_cache_notebook.ipynb").read_text(encoding="utf-8"))
    said = "".join("".join(output.get("text", "")) for cell in page["cells"] for output in cell.get("outputs", ()))
    assert "318 numbers agree" in said and said.count("does not hold here") == 1


def test_every_claim_is_measured_in_a_lesson_and_can_be_seen_by_a_command_or_a_test():
    assert claims.PAGE.read_text() == claims.table(), "python notebooks/course/claims.py --write"
    assert list(claims.SEEN) == list(range(1, 52)) and set(claims.measured()) == set(claims.SEEN)
    for seen in claims.SEEN.values():
        if seen.startswith("tests/"):
            file, _, name = seen.partition("::")
            assert f"\ndef {name}(" in (ROOT / file).read_text(), seen
        elif seen.startswith("make "):
            assert f"\n{seen.split()[1]}:" in (ROOT / "Makefile").read_text()
        else:
            python, program, section, *flags = seen.split()
            done = call(bench.main, section, "--help")
            assert (python, program) == ("python", "bench.py") and done.code == 0
            assert all(flag in done.out for flag in flags if flag.startswith("--")), seen


def test_the_lines_to_project_are_where_the_page_says():
    assert slides.PAGE.read_text() == slides.table(), "python notebooks/course/slides.py --write"


def test_the_list_of_lessons_names_each():
    listed = re.findall(r"\]\((\w+)\.ipynb\)", (ROOT / "notebooks" / "README.md").read_text())
    assert listed == [source.stem for source in SOURCES] and len(listed) == 11
