"""What one sees of a broken cache: the text, the first wrong step, and what of each attention is wrong there."""

from typing import NamedTuple

import matplotlib.pyplot as plt
import torch

from attention import NOWHERE
from compare import TINY, same
from course.gallery import EXHIBITS, SCENES, broken, letters

COLUMNS = ["newest at", "queries", "keys", "values", "output"]


class Look(NamedTuple):
    """One attention of one row: mine and right are its calls, as compare.recorded() has them."""

    name: str   # of the module
    label: str  # "self 0"
    cells: list  # of COLUMNS: "." is right
    mine: tuple
    right: tuple
    row: int    # of mine
    at: list    # (which query of mine, its true position) of what entered


def symptoms(number):
    """Print and draw what exhibit `number` does in its scene, without saying what it is."""
    exhibit = EXHIBITS[number - 1]
    scene = SCENES[exhibit.scene]
    with broken(exhibit):
        text = scene.write()
        step, row, size, looks = first_wrong(scene)
        first = next((look for look in looks if set(look.cells) - {".", ""}), looks[-1])
        found = weights(scene, first.name, first.mine, first.row, [t for t, _ in first.at])
    positions = [p for _, p in first.at]
    expected = weights(scene, first.name, first.right, 0, positions)
    if first.label.startswith("self"):
        expected = expected[:, : positions[-1] + 1]  # the text ends there as yet
    print(f"Exhibit {number}: {scene.words}.")
    _, (sources, rows), *_ = scene.truth
    for r, begun in enumerate(sources or rows):
        ours, theirs = (each if isinstance(each, str) else each[r] for each in (scene.right, text))
        marks = "".join(" " if a == b else "^" for a, b in zip(ours, theirs)) if len(ours) == len(theirs) else ""
        print(f"  row {r}  {letters(begun):>10} -> {ours}")
        print(f"{'broken':>17}    {theirs}{'   the same' * (ours == theirs)}")
        print(f"{'':21}{marks}\n" * ("^" in marks), end="")
    print(f"With the right letters forced, logits first differ at step {step}, in row {row}, by {size:.2g}. There:")
    print(" " * 13 + "".join(f"{column:13}" for column in COLUMNS))
    for look in looks:
        print(f"  {look.label:11}" + "".join(f"{cell:13}" for cell in look.cells).rstrip())
    if first is looks[-1] and set(first.cells) <= {".", ""}:
        print(f"  {'head':11}{'':52}X")
    draw(number, first.label, positions if positions[1:] else None, expected, found)


def first_wrong(scene):
    """The first step whose logits are wrong: its number, row, by how much, and a Look at every attention there."""
    _, (_, rows), _, (_, alone) = scene.truth
    for r, k, logits, which, calls in scene.replay():
        n, (true, entered) = len(rows[r]) + k, alone[r]
        size = (logits - true[n - 1]).abs().max().item()
        if size > TINY * max(1.0, true.abs().max().item()):
            break
    looks, at = [], []
    for name, right in entered.items():
        if name in calls:
            looks.append(look_at(name, calls[name], right, which.index(r), n, at, len(which)))
            at = looks[-1].at if looks[-1].label.startswith("self") else at
    return k + 1, r, size, looks


def look_at(name, mine, right, i, n, at, B):
    """A Look at one attention of row i of B, whose text has n tokens; at: as in the self-attention before."""
    q, k, v, query_pos, key_pos, out, _ = mine
    stack, layer, newest, length = name.split(".")[0], name.split(".")[1], "", right[1].size(2)
    role = "cross" if ".cross." in name else "encoder" if stack == "encoder" else "self"
    wanted = list(range(length))
    if role == "self":
        claimed = (query_pos if query_pos.dim() == 1 else query_pos[min(i, len(query_pos) - 1)]).tolist()
        new = max(1, sum(p < n for p in claimed))  # what lies behind is padding
        at = [(t, n - new + t) for t in range(new)]
        newest = "." if claimed[new - 1] == n - 1 else f"{claimed[new - 1]}, not {n - 1}"
        seen = right[6](0, 0, torch.tensor([p for _, p in at])[:, None], torch.arange(n)).any(0)
        wanted = [p for p in range(n) if seen[p]]  # the others may be gone
    elif role == "encoder":
        at = [(t, t) for t in range(length)]
    else:
        each = B // len(k)  # rows that ask one source: their queries stand side by side
        first = i % each * (q.size(2) // each)
        at, i = [(first + t, p) for t, p in at], i // each
    slots = (key_pos if key_pos.dim() == 1 else key_pos[min(i, len(key_pos) - 1)]).tolist()
    stands = {p: slots.index(p) for p in wanted if p in slots}
    slots = stands if role == "self" else {p: p for p in wanted if p < k.size(2)}
    cells = [newest, wrong(at, lambda t, p: same(q[i, :, t], right[0][0, :, p]))]
    for mine_x, right_x in (k, right[1]), (v, right[2]):
        missing = [p for p in wanted if p not in slots]
        cells.append(f"none of {span(missing)}" if missing else
                     wrong(slots.items(), lambda p, s: same(mine_x[i, :, s], right_x[0, :, p]), first=True))
    cells.append(wrong(at, lambda t, p: same(out[i, :, t], right[5][0, :, p])))
    return Look(name, f"{role} {layer}", cells, mine, right, i, at)


def wrong(pairs, right, first=False):
    """"." where all pairs are right, else at which positions they are not, the second of each pair unless first."""
    found = [pair[0 if first else 1] for pair in pairs if not right(*pair)]
    return f"X at {span(found)}" if found else "."


def span(positions):
    return f"{positions[0]}" if len(positions) == 1 else f"{positions[0]}-{positions[-1]}"


@torch.no_grad()
def weights(scene, name, call, row, queries):
    """What each query looks at, by position: (queries, positions), mean over heads; of a single one (heads, positions)."""
    q, k, _, query_pos, key_pos, *_ = call
    S, pattern = k.size(2), scene.truth[0].get_submodule(name)
    ones = torch.eye(S, dtype=q.dtype).expand(*k.shape[:2], S, S)  # values that tell where they came from
    found = pattern(q, k, ones, query_pos, key_pos)[row][:, queries]  # (H, queries, S)
    places = key_pos if key_pos.dim() == 1 else key_pos[min(row, len(key_pos) - 1)]
    there = places < NOWHERE
    by_position = found.new_zeros(*found.shape[:2], int(places[there].max()) + 1)
    by_position.index_add_(2, places[there], found[..., there])
    return by_position[:, 0] if len(queries) == 1 else by_position.mean(0)


def draw(number, label, positions, expected, found):
    """Both maps; fourth roots, so that only what is not seen at all is white."""
    width = max(expected.size(1), found.size(1))
    fig, axes = plt.subplots(1, 2, figsize=(6, 1.6), sharey=True, layout="constrained")
    for ax, x, title in zip(axes, (expected, found), (f"{label}, right", f"{label}, exhibit {number}")):
        ax.imshow(x.numpy() ** 0.25, cmap="Greys", vmin=0, vmax=1.2, aspect="auto")
        ax.add_patch(plt.Rectangle((-0.5, -0.5), x.size(1), len(x), fill=False, clip_on=False))
        ax.set(xlim=(-0.5, width - 0.5), xticks=range(0, width, 2 if width > 9 else 1))
        ax.set_title(title, fontsize=9)
        ax.set_xlabel("position of the key", fontsize=8)
        ax.tick_params(labelsize=7)
        ax.spines[:].set_visible(False)
    axes[0].set_yticks(range(len(expected)), positions)
    axes[0].set_ylabel("head" if positions is None else "position\nof the query", fontsize=8)
    plt.show()


def workbench(number):
    """Print the function of exhibit `number` as it is there, with a mark where it is not the project's."""
    exhibit = EXHIBITS[number - 1]
    sound = exhibit.source.splitlines()
    print(f"{exhibit.owner}, exhibit {number}: mend what is marked")
    for line in exhibit.with_line(exhibit.wrong).splitlines():
        print(f"{' ' if line in sound else '>'} {line}")
