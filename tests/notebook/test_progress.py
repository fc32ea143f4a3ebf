"""A run while it goes on: shown when it takes a while, redrawn in place, ending as the run does."""

from __future__ import annotations

from kernels import Kernel


def test_a_short_run_shows_no_progress(notebook: Kernel) -> None:
    notebook.ok("%%workflow short\nasync def a(): return 1")

    assert notebook.ok("run = await short()").html == []


def test_a_longer_run_shows_its_graph_redrawn_in_place_and_ends_as_one_line(notebook: Kernel) -> None:
    notebook.ok(
        "%%workflow longer\nimport asyncio\nasync def a(): await asyncio.sleep(1); return 1\nasync def b(a): return 2"
    )

    cell = notebook.ok("run = await longer()")

    assert "0 of 2 nodes done: a" in cell.html[0] and "<svg" in cell.html[0]
    last = cell.updates[-1]
    assert "longer ok" in last["text/plain"] and "<svg" not in last["text/html"]
    assert len(cell.updates) < 20


def test_the_progress_of_a_run_that_is_the_cells_value_gives_way_to_it(notebook: Kernel) -> None:
    notebook.ok("%%workflow shown\nimport asyncio\nasync def a(): await asyncio.sleep(0.8); return 1")

    cell = notebook.ok("%%workflow shown --run\nimport asyncio\nasync def a(): await asyncio.sleep(0.8); return 1")

    assert cell.updates[-1] == {"text/html": "", "text/plain": ""}
    assert "<svg" in cell.value["text/html"]


def test_a_failed_run_that_showed_progress_ends_with_the_whole_picture(notebook: Kernel) -> None:
    notebook.ok("%%workflow late\nimport asyncio\nasync def a(): await asyncio.sleep(0.8); return 1 / 0")

    cell = notebook.run("run = await late()")

    assert "a failed" in cell.updates[-1]["text/plain"] and "<svg" in cell.updates[-1]["text/html"]


def test_a_thousand_events_are_drawn_ten_times_a_second_at_most(notebook: Kernel) -> None:
    nodes = "\n".join(f"async def n{i}(): await asyncio.sleep({0.1 + i * 0.001})" for i in range(300))
    notebook.ok(f"%%workflow many\nimport asyncio\n{nodes}")

    cell = notebook.ok("run = await many()\nrun.execution_time")

    assert 1 <= len(cell.updates) <= 10 * float(cell.value["text/plain"]) + 1
