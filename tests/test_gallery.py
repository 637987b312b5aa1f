"""The gallery of lesson 11: every exhibit is broken where it says, one probe notices it, and nothing of it stays."""

import sys

import matplotlib
import matplotlib.pyplot as plt
import pytest
from conftest import ROOT
from mutants import MUTANTS

matplotlib.use("Agg")
sys.path.insert(0, str(ROOT / "notebooks"))
from compare import judge  # noqa: E402
from course.gallery import EXHIBITS, SCENES, broken  # noqa: E402
from course.probes import PROBES, passes  # noqa: E402
from course.symptoms import symptoms, workbench  # noqa: E402
from course.tasks11 import WHERE, unfit  # noqa: E402

EACH = pytest.mark.parametrize("exhibit", EXHIBITS, ids=lambda exhibit: exhibit.cause)


@EACH
def test_an_exhibit_is_one_line_of_the_project_and_a_mutant_makes_the_same_mistake(exhibit):
    assert exhibit.source.count(exhibit.right) == 1 and exhibit.source.count(exhibit.line) == 1
    assert exhibit.wrong not in exhibit.source and exhibit.mutant in MUTANTS


@EACH
def test_exactly_one_probe_notices_and_afterwards_all_is_as_before(exhibit):
    owner, name = exhibit.place
    sound = vars(owner)[name]
    with broken(exhibit):
        assert vars(owner)[name] is not sound
        assert [cause for cause in PROBES if not passes(cause)] == [exhibit.cause]
    assert vars(owner)[name] is sound and passes(exhibit.cause)
    assert SCENES[exhibit.scene].write() == SCENES[exhibit.scene].right


def test_the_sound_code_passes_every_probe_and_every_scene_that_is_not_refused():
    assert list(PROBES) == [exhibit.cause for exhibit in EXHIBITS] and all(map(passes, PROBES))
    for scene in SCENES.values():
        assert isinstance(scene.right, str) or scene.differs() < 1e-10


@EACH
def test_compare_finds_it_where_the_diagnosis_does(exhibit):
    scene = SCENES[exhibit.scene]
    _, given, ids, exact = scene.truth
    with broken(exhibit):
        found = judge(exact, scene.make, given, ids, 0.0, None)
    stack = "encoder" if found["note"].startswith("in the encoder") else found["attention"]
    assert found["verdict"] == "bug" and found["kind"] == exhibit.kind
    assert exhibit.where == ("head" if found["layer"] is None else f"{stack} {found['layer']}") in WHERE


@pytest.mark.parametrize("number", range(1, len(EXHIBITS) + 1))
def test_the_symptoms_name_nothing_and_the_table_reads_as_the_diagnosis(number, capsys):
    exhibit = EXHIBITS[number - 1]
    symptoms(number)
    plt.close()
    out = capsys.readouterr().out.replace(str(SCENES[exhibit.scene].right), "")  # a refusal may name it
    assert exhibit.cause not in out and exhibit.mutant not in out and exhibit.wrong not in out
    first = next(line for line in out.split("There:")[1].splitlines()[2:] if set(line.split()[2:]) - {"."} or "head" in line)
    assert first.strip().startswith(exhibit.where)
    workbench(number)
    assert "> " in capsys.readouterr().out


@pytest.mark.parametrize("text", ["", "0", "x", "while True: print()", "import os", "print(1)", "return (", "a b", "\0", "(" * 300])
def test_what_cannot_be_a_mend_is_refused_before_it_runs(text):
    assert unfit(text)
