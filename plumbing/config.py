"""Configuration: dataclasses hold the defaults, a TOML file and --section.key=value change them."""

import difflib
import json
import re
import tomllib
from dataclasses import asdict, fields
from types import UnionType
from typing import get_args

from plumbing.errors import UserError
from plumbing.files import read_text

MAX_BYTES = 2**20  # of a configuration file


def read(path, overrides, sections):
    """
    The values that a TOML file and command-line overrides set: {section: {key: value}} for every one of `sections`.
    An override is written --section.key=value, its value as in TOML (quotes around text may be left out).
    """
    text = read_text(path, MAX_BYTES)
    try:
        values = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # ValueError: also a number of thousands of digits
        raise UserError(f"{path} is not valid TOML: {error or 'it is nested too deeply'}") from None
    for section, table in values.items():
        known(section, sections, "section")
        if not isinstance(table, dict):
            raise UserError(f"{section} in {path} is the value {table!r:.60}: it must be a table, [{section}]")
    override_all(values, overrides, sections)
    return {section: values.get(section, {}) for section in sections}


def override_all(values, overrides, sections):
    """Set in {section: {key: value}} what overrides say."""
    for override in overrides:
        name, equals, text = override.removeprefix("--").partition("=")
        section, dot, key = name.replace("-", "_").partition(".")
        if not (override.startswith("--") and equals and dot):
            raise UserError(f"{override!r} is not an override: write --section.key=value, e.g. --train.lr=3e-4")
        try:
            value = tomllib.loads(f"value = {text}")["value"]
        except (ValueError, RecursionError):
            value = text
        known(section, sections, "section")
        values.setdefault(section, {})[key] = value


def build(cls, values, section, **defaults):
    """An instance of the dataclass with these values, their names and types checked, and validated."""
    types = {field.name: field.type for field in fields(cls)}
    for key in values:
        known(key, types, f"key of [{section}]")
    values = {key: checked(f"{section}.{key}", value, types[key]) for key, value in values.items()}
    config = cls(**(defaults | values))
    config.validate()
    return config


def checked(name, value, kind, limit=2**63):
    """The value, if a field of this type may hold it; a whole number does for a float. Raises UserError otherwise."""
    allowed = get_args(kind) if isinstance(kind, UnionType) else (kind,)
    if isinstance(value, int | float) and not abs(value) < limit:  # nor is a NaN
        raise UserError(f"{name}={value!a:.60} must be a number below 2**{limit.bit_length() - 1}")
    if isinstance(value, str) and re.search("[\0\ud800-\udfff]", value):  # found before a run that could not be saved
        raise UserError(f"{name} is {value!a:.60}: it must be UTF-8 without null bytes")
    if type(value) is int and float in allowed and int not in allowed:
        value = float(value)
    if type(value) not in allowed:
        names = " or ".join(t.__name__ for t in allowed if t is not type(None))
        raise UserError(f"{name} is {value!a:.60}: it must be of type {names}")
    return value


def known(name, names, what):
    """Raise UserError, with the nearest name that exists, unless there is such a name."""
    if name not in names:
        near = difflib.get_close_matches(name, list(names), n=1, cutoff=0)
        raise UserError(f"there is no {what} {name!r}: did you mean {near[0]!r}?")


def describe(**configs):
    """All settings with their defaults, spelled as in TOML, for --help."""
    return "\n".join(f"--{section}.{key}" + ("  (not set)" if value is None else f"={json.dumps(value)}")
                     for section, config in configs.items() for key, value in asdict(config).items())
