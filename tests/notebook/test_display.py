"""Our values as a kernel shows them: HTML with plain text beside it, and no secret in either."""

from __future__ import annotations

import pytest
from kernels import Kernel

CANARY = "cAnArY-51c0-value"


@pytest.fixture(scope="module")
def shown(notebook: Kernel) -> Kernel:
    notebook.ok(
        "%%workflow shown\nasync def rows(n: int = 20, text: str = ''):\n    return [{'n': i, 't': text} for i in range(n)]"
    )
    notebook.ok("run = await shown()")
    return notebook


@pytest.mark.parametrize(
    ("value", "html", "plain"),
    [
        ("run", "<table", "rows:\n"),
        ("shown", "<svg", "rows(n = 20"),
        ("run.timeline", "width:260px", "completed"),
        ("gateway", "shown", "Next: "),
        ("await gateway.check()", "resource", "no resources are registered"),
        ("gateway.serve()", "serving at", "<Server"),
    ],
)
def test_a_value_has_both_forms(shown: Kernel, value: str, html: str, plain: str) -> None:
    cell = shown.ok(value)

    assert html in cell.value["text/html"] and plain in cell.value["text/plain"]


def test_a_run_of_an_older_version_is_shown_with_the_graph_it_had_or_none(shown: Kernel) -> None:
    shown.ok("%%workflow shown\nasync def other(): return 1")
    try:
        assert "other" not in shown.ok("run").value["text/html"]
    finally:
        shown.ok(
            "%%workflow shown\nasync def rows(n: int = 20, text: str = ''):\n    return [{'n': i, 't': text} for i in range(n)]"
        )


def test_no_display_shows_a_secret_that_a_node_returned_or_was_given(shown: Kernel) -> None:
    halves = f"{CANARY[:8]!r} + {CANARY[8:]!r}"
    shown.ok(f"await gateway.secret_manager.store_secret('token', {{'token': {halves}}})")

    cell = shown.ok(f"leaked = await shown(text={halves})\nleaked")

    assert "***" in cell.value["text/html"] and "***" in cell.value["text/plain"]
    assert CANARY not in cell.everything
    assert shown.ok(f"leaked['rows'][0]['t'] == {halves}").value["text/plain"] == "True"


def test_an_awaited_handle_that_was_not_awaited_says_so(shown: Kernel) -> None:
    assert "add `await`" in shown.ok("shown()").value["text/plain"]
