"""The drawing of graphs: valid, escaped, nothing on top of anything, whatever their shape."""

from __future__ import annotations

import itertools
import re
import xml.etree.ElementTree as ET

import pytest

from kailash_nb.notebook.graph import Box, svg

SVG = "{http://www.w3.org/2000/svg}"


def drawn(boxes: list[Box]) -> ET.Element:
    return ET.fromstring(svg(boxes, "a graph"))


def boxes_of(image: ET.Element) -> list[tuple[float, float, float, float]]:
    return [
        (float(r.get("x", 0)), float(r.get("y", 0)), float(r.get("width", 0)), float(r.get("height", 0)))
        for r in image.iter(f"{SVG}rect")
    ]


FAN = [Box("source"), *(Box(f"n{i}", ("source",)) for i in range(98)), Box("sink", tuple(f"n{i}" for i in range(98)))]
DIAMOND = [Box("a"), Box("b", ("a",)), Box("c", ("b",)), Box("d", ("c", "a"), "a note"), Box("e", ("a", "d"))]


@pytest.mark.parametrize(
    "boxes",
    [[Box("only")], FAN, DIAMOND, [Box(f"free{i}") for i in range(30)], []],
    ids=["one", "fan", "diamond", "free", "none"],
)
def test_no_two_boxes_overlap_and_all_lie_inside_the_drawing(boxes: list[Box]) -> None:
    image = drawn(boxes)
    places = boxes_of(image)

    assert len(places) == len(boxes)
    for (ax, ay, aw, ah), (bx, by, bw, bh) in itertools.combinations(places, 2):
        assert ax + aw <= bx or bx + bw <= ax or ay + ah <= by or by + bh <= ay
    width, height = float(image.get("width", 0)), float(image.get("height", 0))
    assert all(x >= 0 and x + w <= width and y >= 0 and y + h <= height for x, y, w, h in places)


def test_every_node_stands_to_the_right_of_those_it_depends_on() -> None:
    left = dict(zip([b.name for b in DIAMOND], [place[0] for place in boxes_of(drawn(DIAMOND))], strict=True))

    assert all(left[u] < left[b.name] for b in DIAMOND for u in b.upstream)


def test_every_connection_is_drawn_once_and_a_long_one_runs_past_the_boxes_between() -> None:
    image = drawn(DIAMOND)
    lines = [path.get("d", "") for path in image.iter(f"{SVG}path")]
    _, by, _, bh = boxes_of(image)[1]

    assert len(lines) == sum(len(b.upstream) for b in DIAMOND)
    levels = [float(y) for line in lines for y in re.findall(r"H[\d.]+C[\d.]+ ([\d.]+)", line)]
    assert levels and all(not by < level < by + bh for level in levels)


def test_a_hundred_nodes_take_little_room() -> None:
    image = drawn(FAN)

    assert float(image.get("height", 0)) < 3000
    assert len(svg(FAN, "fan")) < 80_000


def test_names_and_notes_are_escaped_and_long_ones_cut_with_the_whole_in_the_tooltip() -> None:
    name = "<script>alert(1)</script>" + "x" * 60

    text = svg([Box(name, (), '"&<b>', "failed")], "<i>label</i>")

    assert "<script" not in text and "<b>" not in text and "<i>" not in text
    titles = [t.text for t in ET.fromstring(text).iter(f"{SVG}title")]
    assert f'{name} (failed) "&<b>' in titles
    assert max(len(t.text or "") for t in ET.fromstring(text).iter(f"{SVG}text")) <= 34


def test_a_status_is_told_by_a_sign_and_in_words_not_by_colour_alone() -> None:
    signs = {}
    for status in ("waiting", "running", "completed", "reused", "fallback", "failed", "cancelled", "skipped"):
        image = drawn([Box("node", (), "", status)])
        signs[status] = next(image.iter(f"{SVG}text")).text
        assert [g.get("aria-label") for g in image.iter(f"{SVG}g")][1:] == [f"node ({status})"]

    assert len(set(signs.values())) == len(signs)


def test_the_drawing_says_what_it_shows_to_those_who_do_not_see_it() -> None:
    image = drawn(DIAMOND)

    assert (image.get("role"), image.get("aria-label")) == ("img", "a graph")


def test_what_a_sanitiser_leaves_of_it_reads_as_a_list() -> None:
    text = svg([Box("extract", (), "200 ms", "completed"), Box("load", ("extract",), "skipped", "skipped")], "a graph")

    assert re.sub(r"<[^>]*>", "", text) == "✓ extract: 200 ms; – load: skipped; "
