"""A graph of nodes as a small SVG: layers from left to right, every line in its own lane.

The drawing takes its text colour from where it stands (``currentColor``), so it reads in light and dark themes, and a
node's status is told by a mark and words as well as by colour. Nothing in it needs a script, a style sheet or a file.
Where a sanitiser takes the tags away, the text that is left reads as a list; the punctuation for it is never drawn.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import NamedTuple

from ..runs import NodeStatus


class Mark(NamedTuple):
    """How a status looks: a sign, a colour that reads on white and on black, and whether its outline is dashed."""

    sign: str
    colour: str
    dashed: bool = False


GREY = "#8a8f98"
MARKS: Mapping[str, Mark] = {
    NodeStatus.WAITING: Mark("○", GREY, dashed=True),
    NodeStatus.RUNNING: Mark("▶", "#3b82f6"),
    NodeStatus.COMPLETED: Mark("✓", "#2e9b5f"),
    NodeStatus.REUSED: Mark("↺", "#0e93a8"),
    NodeStatus.FALLBACK: Mark("≈", "#c98208"),
    NodeStatus.FAILED: Mark("✕", "#e5484d"),
    NodeStatus.CANCELLED: Mark("■", "#c98208"),
    NodeStatus.SKIPPED: Mark("–", GREY, dashed=True),
    "healthy": Mark("✓", "#2e9b5f"),
    "unhealthy": Mark("✕", "#e5484d"),
    "degraded": Mark("≈", "#c98208"),
}
"""The marks of node, run and resource statuses."""

_LONGEST, _LONGEST_NOTE = 28, 34  # characters of a name and of a note; what is cut is in a tooltip
_CHARACTER, _SMALL = 7.0, 6.0  # width of a character, a little more than most fonts need
_CROWD = 14  # from so many nodes in one layer, boxes are drawn small


@dataclass(frozen=True)
class Box:
    """One node to draw: its name, what stands before it, a line of small print, and its status (None: no mark)."""

    name: str
    upstream: tuple[str, ...] = ()
    note: str = ""
    status: str | None = None


class _Sizes(NamedTuple):
    height: float
    gap: float
    lane: float
    notes: bool


_ROOMY = _Sizes(38, 12, 14, notes=True)
_SMALL_BOXES = _Sizes(20, 5, 7, notes=False)


def svg(boxes: Sequence[Box], label: str) -> str:
    """Draw the boxes, each after those upstream of it; ``label`` says what the drawing shows to those who hear it."""
    layers, chains = _layers(boxes)
    by_name = {box.name: box for box in boxes}
    crowd = max((sum(name in by_name for name in layer) for layer in layers), default=0)
    sizes = _SMALL_BOXES if crowd > _CROWD else _ROOMY
    left, width, places = 1.0, 0.0, {}
    tallest = max((sum(_height(n, by_name, sizes) + sizes.gap for n in layer) for layer in layers), default=0.0)
    for layer in layers:
        width = max((_width(by_name[n], sizes) for n in layer if n in by_name), default=0.0)
        top = 1 + (tallest - sum(_height(n, by_name, sizes) + sizes.gap for n in layer) + sizes.gap) / 2
        for name in layer:
            height = _height(name, by_name, sizes)
            places[name] = (left, top, width, height)
            top += height + sizes.gap
        left += width + (46 if sizes.notes else 64)
    right, bottom = max((x + w for x, _, w, _ in places.values()), default=0) + 1, tallest + 2
    lines = "".join(_line([places[n] for n in chain]) for chain in chains)
    drawn = "".join(_box(box, *places[box.name], sizes) for box in boxes)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" role="img" aria-label="{escape(label)}" width="{right:.0f}" '
        f'height="{bottom:.0f}" viewBox="0 0 {right:.0f} {bottom:.0f}" font-family="inherit" font-size="12">'
        f'<g fill="none" stroke="currentColor" stroke-opacity=".4">{lines}</g>'
        f"{drawn}</svg>"
    )


def _layers(boxes: Iterable[Box]) -> tuple[list[list[str]], list[list[str]]]:
    """Names by layer, in an order that keeps lines short, and each line as the names it runs through.

    A line across several layers runs through a place of its own in each of them, which has a name no node can have.
    """
    depth: dict[str, int] = {}
    before: dict[str, list[str]] = {}
    chains: list[list[str]] = []
    for box in boxes:
        above = [u for u in box.upstream if u in depth]
        depth[box.name] = max((depth[u] + 1 for u in above), default=0)
        before[box.name] = []
        for origin in above:
            chain = [origin, *(f"{origin} {box.name} {i}" for i in range(depth[origin] + 1, depth[box.name])), box.name]
            chains.append(chain)
            for one, next_one in itertools.pairwise(chain):
                depth.setdefault(next_one, depth[one] + 1)
                before.setdefault(next_one, []).append(one)
    layers: list[list[str]] = [[] for _ in range(max(depth.values(), default=-1) + 1)]
    for name, layer in depth.items():
        layers[layer].append(name)
    after: dict[str, list[str]] = {}
    for name, origins in before.items():
        for origin in origins:
            after.setdefault(origin, []).append(name)
    for _ in range(3):
        _untangle(layers, before)
        _untangle(layers[::-1], after)
    _untangle(layers, before)
    return layers, chains


def _untangle(layers: Sequence[list[str]], neighbours: Mapping[str, Sequence[str]]) -> None:
    """Order each layer by where its neighbours in the layer before it stand."""
    for fixed, layer in itertools.pairwise(layers):
        position = {name: (i + 0.5) / len(fixed) for i, name in enumerate(fixed)}
        own = {name: (i + 0.5) / len(layer) for i, name in enumerate(layer)}
        layer.sort(key=lambda name: _mean([position[n] for n in neighbours.get(name, ()) if n in position], own[name]))


def _mean(numbers: Sequence[float], otherwise: float) -> float:
    return sum(numbers) / len(numbers) if numbers else otherwise


def _height(name: str, boxes: Mapping[str, Box], sizes: _Sizes) -> float:
    return sizes.height if name in boxes else sizes.lane


def _width(box: Box, sizes: _Sizes) -> float:
    sign = 18 if box.status else 0
    note = len(_cut(box.note, _LONGEST_NOTE)) * _SMALL if sizes.notes else 0
    return round(max(len(_cut(box.name)) * _CHARACTER, note) + sign + 22)


def _cut(text: str, longest: int = _LONGEST) -> str:
    return text if len(text) <= longest else text[: longest - 1] + "…"


def _box(box: Box, x: float, y: float, width: float, height: float, sizes: _Sizes) -> str:
    mark = MARKS.get(box.status or "", Mark("", GREY))
    words = " ".join(filter(None, [box.name, box.status and f"({box.status})", box.note]))
    dashes = ' stroke-dasharray="3 3"' if mark.dashed else ""
    noted = sizes.notes and bool(box.note)
    middle = y + height / 2
    left = x + (28 if box.status else 11)
    cut = _cut(box.name) != box.name or _cut(box.note, _LONGEST_NOTE) != box.note or not sizes.notes
    parts = [f'<g aria-label="{escape(words)}">' + (f"<title>{escape(words)}</title>" if cut else "")]
    parts.append(
        f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.0f}" height="{height:.0f}" rx="6" fill="{mark.colour}" '
        f'fill-opacity=".1" stroke="{mark.colour}" stroke-width="{2 if box.status == "failed" else 1.2}"{dashes}/>'
    )
    if box.status:
        parts.append(f'<text x="{x + 10:.1f}" y="{middle + 4:.1f}" fill="{mark.colour}">{mark.sign}</text> ')
    base = middle + (-3 if noted else 4)
    parts.append(f'<text x="{left:.1f}" y="{base:.1f}" fill="currentColor">{escape(_cut(box.name))}</text>')
    if noted:
        note = escape(_cut(box.note, _LONGEST_NOTE))
        parts.append(
            f': <text x="{left:.1f}" y="{middle + 12:.1f}" font-size="10.5" fill="currentColor" '
            f'fill-opacity=".65">{note}</text>'
        )
    return "".join([*parts, "</g>; "])


def _line(places: Sequence[tuple[float, float, float, float]]) -> str:
    """A smooth line from the right edge of the first place to the left edge of the last, straight through others."""
    x, y, width, height = places[0]
    path = [f"M{x + width:.1f} {y + height / 2:.1f}"]
    here = (x + width, y + height / 2)
    for x, y, width, height in places[1:]:
        there = (x, y + height / 2)
        bend = (there[0] - here[0]) / 2
        path.append(
            f"C{here[0] + bend:.1f} {here[1]:.1f} {there[0] - bend:.1f} {there[1]:.1f} {there[0]:.1f} {there[1]:.1f}"
        )
        here = there
        if (x, y, width, height) != places[-1]:
            here = (x + width, there[1])
            path.append(f"H{here[0]:.1f}")
    end = f"M{here[0] - 5:.1f} {here[1] - 3.5:.1f}L{here[0]:.1f} {here[1]:.1f}l-5 3.5"
    return f'<path d="{"".join(path)}{end}"/>'
