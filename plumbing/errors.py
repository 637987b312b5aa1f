"""Errors and exit codes, in one place.

0 done; 1 bench.py compare found a bug; 2 the user's mistake (one line on stderr, nothing on stdout); 3 stopped on a
non-finite number; 130 interrupted.
"""

import argparse
import os
import re
import signal
import sys
from contextlib import contextmanager


class UserError(ValueError):
    """A mistake of the user. The message is one line that names the value, the limit and the remedy."""


class NonFiniteError(ArithmeticError):
    """A NaN or an infinity where a number was needed; going on would only spread it."""


@contextmanager
def naming(what):
    """A mistake that is found in the block is said to be in `what`."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{what}: {error}") from None


def plain(kind, name):
    """A type for argparse: numbers as one writes them, of which int() and float() are not sure: 1_0 is ten to them."""
    def read(text):
        if "_" in text or not text.isascii():
            raise ValueError
        return kind(text)

    read.__name__ = name  # what argparse calls it where it says no
    return read


WHOLE, REAL = plain(int, "whole number"), plain(float, "number")


class Parser(argparse.ArgumentParser):
    """
    argparse that accepts --max_new_tokens for --max-new-tokens, reports a mistake in one line, and collects what has
    the form --section.key=value, of a configuration's sections, as `overrides`.
    """

    def __init__(self, **kwargs):
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **kwargs)

    def parse_args(self, args=None, namespace=None):
        words = sys.argv[1:] if args is None else args
        words = [re.sub(r"^--[a-z_]+", lambda flag: flag[0].replace("_", "-"), word) for word in words]
        overrides = [word for word in words if word.startswith(("--model.", "--data.", "--train."))]
        args = super().parse_args([word for word in words if word not in overrides], namespace)
        args.overrides = overrides
        if overrides and getattr(args, "random", None) is None:
            self.error(f"{overrides[0]!r:.60} changes an untrained model: give bench.py --random")
        return args

    def error(self, message):
        raise UserError(f"{message} (see {self.prog} --help)")


def leave(signum, frame):
    print("interrupted", file=sys.stderr or open(os.devnull, "w"), flush=True)
    os._exit(130)


def guard_imports():
    """Until run() is called, Ctrl-C ends the program at once: raised in an import, it may come out as anything."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # it is not where Ctrl-C is to be ignored
        signal.signal(signal.SIGINT, leave)


def run(main):
    """Call `main()` as a command-line program and leave the process with the right exit code."""
    code = 0
    if signal.getsignal(signal.SIGINT) is leave:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.stderr = sys.stderr or open(os.devnull, "w")  # None if it is closed, and print() would take stdout
    try:
        if sys.stdout is None:
            raise UserError("standard output is closed: send it to a file, or to /dev/null")
        sys.stdout.reconfigure(encoding="utf-8")  # whatever the locale: a model writes what it has learned
        try:
            main()
        finally:
            sys.stdout.flush()  # here, where it can be told that the reader went away or the disk is full
    except UserError as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        code = 2
    except NonFiniteError as error:
        print(f"stopped: {error}", file=sys.stderr)
        code = 3
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 130
    except BrokenPipeError:  # the reader went away (| head): nothing is left to say, and nobody to say it to
        sys.stdout = None
    except OSError as error:  # the machine's, e.g. a full disk; what stdout still holds may have nowhere to go
        print(f"error: {one_line(error)}", file=sys.stderr)
        sys.stdout, code = None, 2
    sys.exit(code)


def one_line(error):
    """Its message in one line of a bearable length; what it names comes first, what to do about it last."""
    line = " ".join(str(error).split())
    return line if len(line) <= 290 else f"{line[:190]} ... {line[-90:]}"
