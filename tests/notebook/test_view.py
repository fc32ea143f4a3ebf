"""What runs, workflows and gateways look like, from values made by hand."""

from __future__ import annotations

import datetime as dt
import sys
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest

from kailash_nb.handles import WorkflowHandle
from kailash_nb.notebook import view
from kailash_nb.runs import Event, EventKind, Run, RunError, RunRecord, RunStart, RunStatus
from kailash_nb.workflow import AsyncWorkflowBuilder, Workflow

KIND = EventKind


def workflow() -> Workflow:
    return (
        AsyncWorkflowBuilder("etl")
        .add_async_code("extract", "db = await get_resource('shop_db')\nresult = {'users': limit}")
        .add_async_code("load", "result = {'loaded': users}")
        .add_connection("extract", "users", "load", "users")
        .build()
    )


def run(*events: Event, **start: Any) -> Run:
    """A run of the workflow, with these events."""
    whole = workflow()
    facts: dict[str, Any] = {"parameters": {}, "resources": {}, "context": {}, "root": "r", "id": "4f1c2d3e5a6b"}
    facts |= {"layout": tuple(whole.by_name), "last": whole.last, "at": 1000.0, **start}
    return Run.of(RunRecord(RunStart(workflow="etl", version=whole.hash, **facts), events))


def completed(extracted: Any, loaded: Any, **start: Any) -> Run:
    return run(
        Event(KIND.NODE_STARTED, 1000.0, "extract"),
        Event(KIND.NODE_COMPLETED, 1000.4, "extract", value=extracted, waited=0.1),
        Event(KIND.NODE_STARTED, 1000.4, "load"),
        Event(KIND.NODE_COMPLETED, 1001.2, "load", value=loaded, attempt=2, note="attempt 1 failed <b>"),
        Event(KIND.RUN_FINISHED, 1001.2, status=RunStatus.COMPLETED),
        **start,
    )


def failed(message: str = "'amount'", source: str = "x = row['amount']") -> Run:
    error = RunError("load", "KeyError", message, "cell [4]", 3, source, inputs={"users": [1]})
    return run(
        Event(KIND.NODE_STARTED, 1000.0, "extract"),
        Event(KIND.NODE_COMPLETED, 1000.4, "extract", value={"users": [1]}),
        Event(KIND.NODE_STARTED, 1000.4, "load"),
        Event(KIND.NODE_FAILED, 1000.5, "load", error=error),
        Event(KIND.RUN_FINISHED, 1000.5, status=RunStatus.FAILED, error=error),
    )


USERS = pd.DataFrame({"id": range(4912), "name": [f"<i>{n}</i>" for n in range(4912)]})


def test_the_first_line_of_a_run_says_it_all() -> None:
    html = view.run_html(completed({"users": USERS}, {"loaded": 4912}, parameters={"limit": 100}), workflow())

    text = html.partition("</style>")[2]
    assert text.index("ok 1.2 s, load loaded 4,912") < text.index("<table")
    assert "limit = 100" in text and "run 4f1c2d3e" in text


def test_the_last_table_is_shown_open_with_its_first_ten_rows_and_its_size() -> None:
    html = view.run_html(completed({"users": USERS}, {"loaded": 4912}), workflow())

    assert html.count("&lt;i&gt;") == 10
    assert "extract.users: 4,912 rows × 2 columns, the first 10" in html
    assert html.index("<table") < html.index("<details")


@pytest.mark.parametrize("table", [USERS, USERS.to_dict("records"), [(1, 2)] * 20])
def test_any_kind_of_value_is_shown_without_being_converted_whole(table: Any) -> None:
    view.run_html(completed({"users": table}, {"loaded": 1}), workflow())


def test_a_run_without_a_table_shows_its_values() -> None:
    html = view.run_html(completed(1, {"a": 1, "b": "<x>", "c": 2.5, "d": None}), workflow())

    assert "a 1 · b &#x27;&lt;x&gt;&#x27; · c 2.5 · d None" in html


def test_graph_and_timeline_are_folded_while_all_is_well_and_the_graph_is_open_when_not() -> None:
    good, bad = view.run_html(completed(1, 2), workflow()), view.run_html(failed(), workflow())

    assert good.count("<details>") == 2 and "<details open>" not in good
    assert "<details open><summary>Graph" in bad


def test_a_failed_run_shows_place_line_source_and_remedy() -> None:
    html = view.run_html(failed(), workflow()).partition("</style>")[2]

    assert "load failed, cell [4] line 3: KeyError: &#x27;amount&#x27;" in html
    assert "3  x = row[&#x27;amount&#x27;]" in html
    assert "run.debug()" in html and "await run.resume()" in html


def test_whatever_users_or_servers_say_is_escaped() -> None:
    bad = "<script>alert('x')</script>"

    html = view.run_html(failed(bad, bad), workflow())
    html += view.run_html(completed(bad, {bad: bad}, parameters={bad: bad}), workflow())
    html += view.timeline_html(completed(1, 2).timeline)

    assert "<script" not in html and "<b>" not in html.replace("<b>etl</b>", "")


def test_the_timeline_tells_waiting_attempts_and_notes_in_words_beside_the_bars() -> None:
    done = completed(1, 2)

    html = view.timeline_rows(done.timeline, done)

    assert "waited 100 ms for resources" in html and "2 attempts" in html and "attempt 1 failed &lt;b&gt;" in html
    assert "left:33.33%;width:66.67%" in html
    assert "repeating-linear-gradient" in html


def test_a_running_run_says_how_far_it_is() -> None:
    now = dt.datetime.now(dt.UTC).timestamp()
    html = view.run_html(run(Event(KIND.NODE_STARTED, now, "extract"), at=now), workflow())

    assert "0 of 2 nodes done: extract" in html and "(running)" in html and "(waiting)" in html


def test_twenty_runs_with_their_tables_stay_below_300_kB() -> None:
    html = view.run_html(completed({"users": USERS}, {"loaded": 4912}), workflow())

    assert 20 * len(html.encode()) < 300_000


def test_no_display_needs_a_script_or_another_file() -> None:
    html = view.run_html(completed({"users": USERS}, {"loaded": 1}), workflow())

    assert not any(word in html for word in ("<script", "src=", "href=", "@import", "url("))


def test_a_workflow_shows_its_graph_its_wiring_and_how_to_call_it() -> None:
    registered = SimpleNamespace(workflow=workflow(), number=3)
    handle = WorkflowHandle(SimpleNamespace(workflow=lambda _: registered), "etl")  # type: ignore[arg-type]

    html = view.workflow_html(handle)

    assert "<b>etl</b> v3" in html and "uses shop_db" in html
    assert "load(users &lt;- extract.users)" in html
    assert "run = await etl(limit=...)" in html


def test_the_text_form_of_a_run_is_its_summary_and_its_first_rows() -> None:
    text = view.run_text(completed({"users": [{"id": n} for n in range(30)]}, {"loaded": 1}))

    assert text.startswith("etl ok 1.2 s, load loaded 1\nextract.users:")
    assert len(text.splitlines()) == 13


def test_without_pandas_a_run_names_the_table_and_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    done = completed({"users": [{"id": n} for n in range(30)]}, {"loaded": 1})
    monkeypatch.setitem(sys.modules, "pandas", None)

    html, text = view.run_html(done, workflow()), view.run_text(done)

    assert "extract.users: 30 rows; tables need pandas: pip install &quot;kailash-nb[notebook]&quot;" in html
    assert text == "etl ok 1.2 s, load loaded 1"
