"""A file of prompts, one a line, which somebody else wrote."""

from plumbing.errors import UserError, naming
from plumbing.files import json_object, read_text

FIELDS = {"prompt": str, "decoder_prompt": str, "max_new_tokens": int}  # what a line may say of itself


def read_prompts(path):
    """
    The name of every line -> a dict of FIELDS: its prompt, and what else it sets. In a file whose name ends in .jsonl a
    line is a JSON object, in any other the prompt itself. Raises UserError that names the line.
    """
    lines = read_text(path).removesuffix("\n").split("\n")
    read = json_line if path.endswith(".jsonl") else lambda name, line: {"prompt": line.removesuffix("\r")}
    return {name: read(name, line) for name, line in ((f"{path}, line {n}", line) for n, line in enumerate(lines, 1))}


def json_line(name, line):
    values = json_object(name, line)
    with naming(name):
        for key, value in values.items():
            if key not in FIELDS:
                raise UserError(f"{key!r:.60} is not one of {', '.join(FIELDS)}: leave it out")
            if type(value) is not FIELDS[key]:
                raise UserError(f"{key}={value!r:.60} must be a {'text' if FIELDS[key] is str else 'whole number'}")
        if "prompt" not in values:
            raise UserError("it has no prompt: add one")
    return values
