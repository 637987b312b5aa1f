"""
What the lessons share: exercises that grade themselves, and claims beside what we measure.

    from course import lesson
    check, accepted, claim, score = lesson(3)     # the exercises of tasks03.py
    check("slots", 8)                             # prints: right, not right with a hint, or not yet
    accepted("slots")                             # your answer once it is right, until then ours, so that the page goes on

An exercise is a right answer, and the wrong ones that people typically give, each with what its author should hear.
An answer is a value, or a function that is tried on cases: what it returns is then compared. So a right answer is right
in whatever form it comes, and a typical mistake is known by what it does, not by how it is written.
"""

import contextlib
import copy
import difflib
import importlib
import io
import itertools
import linecache
import math
import numbers
import traceback
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch


@dataclass
class Task:
    """
    right: the reference, wherever possible the project's own code. wrong: pairs (answer, what its author should hear).
    cases: for functions, the arguments of each call. run(answer, *case): how an answer is tried, where calling it is not
    enough. read(answer): how an answer that is no function is understood, where tidy() is not enough; what it returns is
    compared, a Failed by its kind. close: the relative tolerance, and for numbers near 0 the absolute one. hint: for any
    other wrong answer. praise: what is worth knowing once it is right.
    """

    right: object
    wrong: list = ()
    cases: list = None
    run: object = lambda answer, *case: answer(*case)
    read: object = None
    close: float = 1e-5
    hint: str = ""
    praise: str = ""

    @cached_property
    def expected(self):
        return outcomes(self, self.right)

    @cached_property
    def mistakes(self):
        return [(outcomes(self, answer), hint) for answer, hint in self.wrong]


@dataclass
class Failed:
    """What a function did instead of returning: the error, or nothing at all."""

    kind: str
    words: str


class NotYet(Exception):
    """An exercise that nobody has filled in."""


def lesson(number):
    """The functions check(name, answer), accepted(name), claim(number, theirs, ours, agrees) and score() of a lesson."""
    tasks = importlib.import_module(f"course.tasks{number:02}").TASKS
    state = {name: "not yet" for name in tasks}
    answers = {name: task.right for name, task in tasks.items()}

    def check(name, answer):
        if name not in tasks:
            near = difflib.get_close_matches(str(name), tasks, 1)
            print(f"This lesson has no exercise {str(name)!r:.60}" + (f": did you mean {near[0]!r}?" if near else "."))
            return
        state[name], words = grade(tasks[name], answer)
        own = state[name] == "right" and tasks[name].cases is not None  # a right value may be "107,450": ours is plain
        answers[name] = answer if own else tasks[name].right
        print(f"{name}: {state[name]}" + (f". {words}" if words else "."))

    def score():
        print(f"{sum(each == 'right' for each in state.values())} of {len(state)} right")
        for name, each in state.items():
            print(f"  {name:24} {each}")

    return check, answers.__getitem__, claim, score


def claim(number, theirs, ours, agrees):
    """Prints what a document says beside what was found here, and whether the two agree."""
    print(f"Claim {number}: {theirs}\n    here: {ours}\n    {'It holds.' if agrees else 'It does not hold here.'}")


# -----------------------------------------------------------------------------
# Grading: whatever comes in, out comes a verdict, and a line that helps


def grade(task, answer):
    """-> ("right" | "not right" | "not yet", a sentence). Never raises, whatever the answer is or does."""
    try:
        mine = outcomes(task, answer)
    except NotYet:
        return "not yet", ""
    except (Exception, SystemExit) as error:  # an object that fights being looked at
        return "not right", f"This cannot be read as an answer ({type(error).__name__})."
    if not difference(mine, task.expected, task.close):
        return "right", task.praise
    for theirs, hint in task.mistakes:
        if not difference(mine, theirs, task.close):
            return "not right", hint
    return "not right", " ".join(filter(None, [explain(task, mine), task.hint]))


def outcomes(task, answer):
    """What an answer amounts to: itself, or what it returns on each case. Raises NotYet where something is left open."""
    if task.read:
        return [task.read(answer)]
    if task.cases is None:
        return [Failed("function", "This is a function: call it, what it returns is expected.") if callable(answer)
                else tidy(answer)]
    return [attempt(task.run, answer, case) for case in task.cases]


def attempt(run, answer, case):
    """What a function returns, tidied, or how it failed. It gets arguments of its own, and the same random numbers."""
    if answer is ...:
        raise NotYet
    if not callable(answer):
        return Failed("no function", f"A function is expected here, not {show(answer)}: give its name, without calling it.")
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            returned = run(answer, *copy.deepcopy(case))
            result = tidy(returned)
    except (Exception, SystemExit) as error:
        if isinstance(error, NotYet) or isinstance(error, NotImplementedError) and not str(error):  # PyTorch's have words
            raise NotYet from None
        return Failed(type(error).__name__, f"Your function raised {type(error).__name__}: {first_line(error)}"
                                            f"{where(error, answer)}")
    if returned is None:
        return Failed("None", "Your function prints its result: return it instead." if printed.getvalue() else
                              "Your function returns nothing: end it with return.")
    return result


def tidy(answer):
    """
    The plain form of an answer: numbers, text, lists, float tensors. "107,450", 107450.0 and tensor(107450) are the same.
    Raises NotYet on an Ellipsis, wherever in it, and TypeError on what is no data.
    """
    if answer is ...:
        raise NotYet
    if isinstance(answer, np.ndarray | np.generic):
        answer = torch.from_numpy(np.asarray(answer).copy())
    if isinstance(answer, torch.Tensor):
        answer = answer.detach().cpu()
        return tidy(answer.item()) if answer.dim() == 0 else answer.to(torch.float64)
    if answer is None or isinstance(answer, bool | Failed):
        return answer
    if isinstance(answer, numbers.Real):
        return float(answer)
    if isinstance(answer, str):
        text = " ".join(answer.lower().split())
        with contextlib.suppress(ValueError):
            return float(text.replace(",", "").replace("_", ""))
        return text
    if isinstance(answer, dict):
        return sorted(([tidy(key), tidy(value)] for key, value in itertools.islice(answer.items(), 10_000)), key=repr)
    if isinstance(answer, set | frozenset):
        return sorted(map(tidy, answer), key=repr)
    if isinstance(answer, range | list | tuple):
        return [tidy(each) for each in itertools.islice(answer, 10_000)]
    raise TypeError(f"{type(answer).__name__} is no data")


def difference(mine, theirs, close):
    """"" where two tidy things are the same, else a sentence that says how they differ, without saying what is right."""
    if isinstance(mine, Failed) or isinstance(theirs, Failed):
        same = isinstance(mine, Failed) and isinstance(theirs, Failed) and mine.kind == theirs.kind
        return "" if same else mine.words if isinstance(mine, Failed) else "An error is expected here."
    if isinstance(theirs, torch.Tensor) and isinstance(mine, list):
        with contextlib.suppress(TypeError, ValueError, RuntimeError):  # a list of lists of numbers, say
            mine = torch.stack([torch.as_tensor(row, dtype=torch.float64) for row in mine])
    if isinstance(theirs, list) and isinstance(mine, torch.Tensor):
        mine = tidy(mine.tolist())
    if mine is None and theirs is not None:
        return "Nothing came here: does a function print what it should return?"
    if type(mine) is not type(theirs):
        return f"{show(mine)} is {kind(mine)}, and {kind(theirs)} is expected."
    if isinstance(theirs, torch.Tensor):
        return tensors_differ(mine, theirs, close)
    if isinstance(theirs, list):
        if len(mine) != len(theirs):
            return f"There are {len(mine)} of them, and not the right number."
        for own, right in zip(mine, theirs):
            if words := difference(own, right, close):
                return f"{key(own)}: {words}" if key(own) and key(own) == key(right) else words
        return ""
    if isinstance(theirs, float):
        same = math.isclose(mine, theirs, rel_tol=close, abs_tol=close) or (math.isnan(mine) and math.isnan(theirs))
    else:
        same = mine == theirs
    return "" if same else f"It is not {show(mine)}."


def tensors_differ(mine, theirs, close):
    if mine.shape != theirs.shape:
        return f"The shape is {tuple(mine.shape)}, and {tuple(theirs.shape)} is expected."
    wrong = ~torch.isclose(mine, theirs, rtol=close, atol=close, equal_nan=True)
    if not wrong.any():
        return ""
    if mine.isnan().any() and not theirs.isnan().any():
        return f"There are NaNs, the first at {mine.isnan().nonzero()[0].tolist()}: what is 0 / 0, or inf - inf, there?"
    at = wrong.nonzero()[0].tolist()
    return f"{int(wrong.sum())} of {wrong.numel()} entries differ, the first at {at}: yours is {mine[tuple(at)]:.4g}."


def explain(task, mine):
    """How the first case that differs does so."""
    for i, (own, right) in enumerate(zip(mine, task.expected)):
        if words := difference(own, right, task.close):
            return words if len(task.expected) == 1 or isinstance(own, Failed) else f"On case {i + 1}: {words}"


def key(entry):
    """Of an entry of a dict, as tidy() has them, the key, if it is a word."""
    return entry[0] if isinstance(entry, list) and len(entry) == 2 and isinstance(entry[0], str) else None


def kind(thing):
    names = {float: "a number", str: "a word", list: "a list or tuple", bool: "True or False"}
    return names.get(type(thing), "a tensor")


def show(thing):
    shown = f"a tensor of shape {tuple(thing.shape)}" if isinstance(thing, torch.Tensor) else repr(thing)
    return " ".join(shown.split())[:60]  # a list of tensors has many lines


def first_line(error):
    return (str(error).strip().splitlines() or ["no reason given"])[0][:160]


def where(error, answer):
    """The line of the answer's own file, or cell, on which it failed."""
    own = getattr(getattr(answer, "__code__", None), "co_filename", None)
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == own]
    line = linecache.getline(own, frames[-1].lineno).strip() if frames else ""
    return f" (at: {line[:80]})" if line else "."
