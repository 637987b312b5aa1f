"""
Patterns of sparse.py by name, as in a config: "full", "local:128", "sinks:4,128", "strided:64", "fixed:64,8",
"topk:32,4"; split over the heads "local:64+column:64" or "block:64+columns:64,8"; a list has one for every layer.
"""

from attention import Causal
from plumbing.errors import UserError
from sparse import Block, Column, Columns, Fixed, Local, Split, Strided, TopK

KINDS = {  # name -> its class and what its numbers are
    "full": (Causal, []),
    "local": (Local, ["window"]),
    "sinks": (Local, ["sinks", "window"]),
    "strided": (Strided, ["stride"]),
    "column": (Column, ["stride"]),
    "fixed": (Fixed, ["stride", "columns"]),
    "block": (Block, ["stride"]),
    "columns": (Columns, ["stride", "columns"]),
    "topk": (TopK, ["stride", "best"]),
}


def part_named(name, length, p):
    """One pattern by name. Raises UserError on what cannot be."""
    kind, _, rest = name.partition(":")
    if kind not in KINDS:
        raise UserError(f"pattern={name!r:.60} is none of {', '.join(KINDS)}")
    cls, names = KINDS[kind]
    given = rest.split(",") if rest else []
    if len(given) != len(names) and not (cls is TopK and len(given) == 1):
        form = f"{kind}:{','.join(names).upper()}" if names else kind
        raise UserError(f"pattern={name!r:.60} has {len(given)} numbers: write {form}")
    for what, text in zip(names, given):
        if not (text.isascii() and text.isdigit() and 1 <= int(text) <= length):
            raise UserError(f"pattern={name!r:.60}: {what}={text:.20} must be a whole number from 1 to "
                            f"block_size={length}")
    values = dict(zip(names, map(int, given)))
    if values.get("columns", 0) > values.get("stride", 0):
        raise UserError(f"pattern={name!r:.60}: columns={values['columns']} are more than stride={values['stride']}")
    return cls(**values, p=p)


def named(name, n_head, n_kv_head, length, p=0.0):
    """
    The pattern of a layer by its name, for texts of up to `length` positions, with dropout p. Raises UserError on what
    cannot be.
    """
    if not isinstance(name, str):
        raise UserError(f"pattern={name!r:.60} must be a text, such as \"local:128\"")
    parts = [part_named(part, length, p) for part in name.split("+")]
    if n_kv_head % len(parts):
        raise UserError(f"pattern={name!r:.60} splits the heads into {len(parts)} parts, and {n_kv_head} have keys of "
                        f"their own: choose a multiple")
    return parts[0] if len(parts) == 1 else Split(parts, n_head)


def patterns(config, n_layer):
    """
    What makes the pattern of each layer from its dropout: a list of n_layer functions, None for the usual one. Raises
    UserError if config.pattern has another number of entries, or one that cannot be.
    """
    names = config.pattern if isinstance(config.pattern, list) else [config.pattern] * n_layer
    if len(names) != n_layer:
        raise UserError(f"pattern has {len(names)} entries for {n_layer} layers: give one for each, or one for all")
    sizes = config.n_head, config.n_kv_head or config.n_head, config.block_size
    for name in config.pattern if isinstance(config.pattern, list) else names[:1]:
        named(name, *sizes)
    return [None if name == "full" else lambda p, name=name: named(name, *sizes, p) for name in names]
