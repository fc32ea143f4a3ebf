"""What runs, workflows and gateways look like: static HTML, the same while a run goes on and ever after.

Pure functions from values to text. The HTML needs no script and no other file, takes its colours from the page that it
stands in, reads without its style sheet (a sanitised or saved notebook), and escapes whatever it is given.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib import resources
from typing import TYPE_CHECKING, Any

from .. import values
from ..exceptions import UnsupportedValueError
from ..runs import DONE, NodeStatus, Run, RunStatus, Timeline, outputs_of, seconds
from ..workflow import Node, Workflow
from .graph import MARKS, Box, svg

if TYPE_CHECKING:
    from ..gateway import Gateway
    from ..handles import Checks, WorkflowHandle

ROWS = 10
"""How many rows of a table a run shows."""

_MOST_COLUMNS = 12
_MOST_NODES = 80  # that a drawing or a timeline shows
_LONGEST_LINE = 200
_TRACK = "position:relative;height:9px;width:260px;border-radius:2px;background:rgba(138,143,152,.15)"
_HATCH = "repeating-linear-gradient(135deg,{0} 0 2px,transparent 2px 5px)"


def page(*parts: str) -> str:
    """Parts of HTML as one display."""
    return f'<div class="knb"><style>{_style()}</style>{"".join(parts)}</div>'


@functools.cache
def _style() -> str:
    return resources.files(__package__).joinpath("static/style.css").read_text("utf-8").replace("\n", "")


def table(names: Sequence[str], rows: Iterable[Sequence[str]], numbers: Sequence[str] = ()) -> str:
    """A table of cells that are HTML already; the columns in ``numbers`` are set to the right."""
    classes = [' class="n"' if name in numbers else "" for name in names]
    head = "".join(f"<th{c}>{escape(name)}</th>" for name, c in zip(names, classes, strict=True))
    body = "".join(
        "<tr>" + "".join(f"<td{c}>{cell}</td>" for cell, c in zip(row, classes, strict=True)) + "</tr>" for row in rows
    )
    return f'<div class="wide"><table class="rows"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def sign(status: str) -> str:
    """A status as its coloured mark; the word itself stands beside it."""
    mark = MARKS.get(status)
    return f'<span style="color:{mark.colour}" title="{escape(status)}">{mark.sign}</span>' if mark else ""


def folded(title: str, content: str, *, opened: bool = False) -> str:
    """Content behind a line of its own."""
    return f"<details{' open' if opened else ''}><summary>{escape(title)}</summary>{content}</details>"


# --------------------------------------------------------------------------------------------------------------- a run


def run_html(run: Run, workflow: Workflow | None = None) -> str:
    """A run: what came of it in a line, the error or the last table, then graph and timeline, folded if all is well."""
    troubled = run.status not in (RunStatus.COMPLETED, RunStatus.RUNNING)
    parts = [headline(run)]
    if run.error is not None:
        parts.append(_failure(run))
    elif run.success:
        parts.append(_outcome(run))
    if workflow is not None and 0 < len(workflow.nodes) <= _MOST_NODES:
        drawing = run_graph(run, workflow)
        shown = troubled or run.status is RunStatus.RUNNING
        parts.append(folded("Graph", f'<div class="draw">{drawing}</div>', opened=shown))
    if run.timeline and run.status is not RunStatus.RUNNING:
        parts.append(folded("Timeline", timeline_rows(run.timeline, run)))
    return page(*parts)


def headline(run: Run) -> str:
    """The first line: workflow, status, time, what the last nodes gave; then its parameters and id in small print."""
    word = {RunStatus.COMPLETED: run.summary(), RunStatus.RUNNING: _progress(run)}.get(
        run.status, f"{run.workflow} {run.status} after {seconds(run.execution_time)}"
    )
    said = word.removeprefix(run.workflow)
    said = said if len(said) <= _LONGEST_LINE else said[: _LONGEST_LINE - 1] + "…"
    facts = [f"{name} = {values.describe(value)}" for name, value in run.parameters.items()]
    facts += [f"run {run.id[:8]}"] if run.id else []
    facts += [f"resumes {run.resumes[:8]}"] if run.resumes else []
    return (
        f'<div class="head"><span>{sign(str(run.status))} <b>{escape(run.workflow)}</b>{escape(said)}</span> '
        f'<span class="dim">· {escape(" · ".join(facts))}</span></div>'
    )


def _progress(run: Run) -> str:
    done = sum(n.status in DONE for n in run.nodes.values())
    under_way = [name for name, n in run.nodes.items() if n.status is NodeStatus.RUNNING]
    at = f": {', '.join(under_way[:3])}{', …' if len(under_way) > 3 else ''}" if under_way else ""
    return f"{run.workflow} running {seconds(run.execution_time)}, {done} of {len(run.nodes)} nodes done{at}"


def _failure(run: Run) -> str:
    error = run.error
    assert error is not None
    source = f"<pre>{error.line or ''}  {escape(error.source)}</pre>" if error.source else ""
    remedy = (
        "<div><code>run.debug()</code> puts its inputs into variables and its source into the next cell; mend it, run "
        "it, then <code>await run.resume()</code>.</div>"
        if error.node
        else ""
    )
    return f'<div class="fail"><div>{escape(str(error))}</div>{source}{remedy}</div>'


def _outcome(run: Run) -> str:
    found = last_table(run)
    scalars = [f"{name} {values.describe(value)}" for name, value in run.data.items() if not values.is_table(value)]
    # The first line tells three of them already.
    said = f'<div class="dim">{escape(" · ".join(scalars[:12]))}</div>' if len(run.data) > 3 else ""
    return said + (_first_rows(*found) if found else "")


def last_table(run: Run) -> tuple[str, Any] | None:
    """The table that a run is about, of its last nodes, else of those before them: ``("node.output", value)``."""
    order = [n for n in run.nodes if n not in run.last] + list(run.last)
    for name in reversed([n for n in order if run.nodes[n].status in DONE]):
        for output, value in outputs_of(run[name]).items():
            if values.is_table(value) and len(value):
                return (name if output == "result" else f"{name}.{output}"), value
    return None


def first_rows(value: Any) -> Any:
    """The first rows of a table as a DataFrame; converts no more than it shows."""
    for part in ("head", "slice"):
        if hasattr(value, part):
            return values.to_frame(value.head(ROWS) if part == "head" else value.slice(0, ROWS))
    return values.to_frame(value[:ROWS])


def _first_rows(label: str, value: Any) -> str:
    try:
        frame = first_rows(value)
    except UnsupportedValueError as error:
        return f'<div class="dim">{escape(f"{label}: {values.describe(value)}; {error}")}</div>'
    shape = f"{len(value):,} rows × {len(frame.columns)} columns"
    shown = f", the first {ROWS}" if len(value) > ROWS else ""
    drawn = frame.to_html(border=0, max_cols=_MOST_COLUMNS, max_rows=ROWS)
    return f'<div class="wide">{drawn}</div><div class="dim">{escape(f"{label}: {shape}{shown}")}</div>'


def run_text(run: Run) -> str:
    """A run where there is no HTML: its summary and the first rows of its table."""
    found = last_table(run) if run.success else None
    if found is None:
        return run.summary()
    try:
        rows = first_rows(found[1]).to_string(max_rows=ROWS, max_cols=_MOST_COLUMNS, line_width=110)
    except UnsupportedValueError:
        return run.summary()
    return f"{run.summary()}\n{found[0]}:\n{rows}"


# --------------------------------------------------------------------------------------------- graph, timeline, wiring


def run_graph(run: Run, workflow: Workflow) -> str:
    """The workflow's graph with what became of each node."""
    boxes = []
    for node in workflow.nodes:
        result = run.nodes.get(node.name)
        if result is None:
            boxes.append(Box(node.name, node.upstream))
            continue
        took = seconds(result.seconds) if result.seconds is not None else str(result.status)
        said = f", {values.describe(result.value)}" if result.status in DONE else ""
        boxes.append(Box(node.name, node.upstream, took + said, str(result.status)))
    states = ", ".join(f"{name} {n.status}" for name, n in run.nodes.items())
    return svg(boxes, f"Graph of {run.workflow}: {states}")


def workflow_graph(workflow: Workflow) -> str:
    """The workflow's graph: who feeds whom, and which resources each node uses."""
    boxes = [Box(n.name, n.upstream, _asks(n)) for n in workflow.nodes]
    return svg(boxes, f"Graph of {workflow.name}: {'; '.join(map(str, workflow.nodes))}")


def _asks(node: Node) -> str:
    parameters = [w.name for w in node.wires if w.source == "parameter"]
    uses = f"uses {', '.join(node.resources)}" if node.resources else ""
    return " · ".join(filter(None, [", ".join(parameters), uses]))


def workflow_html(handle: WorkflowHandle) -> str:
    """A workflow: its graph, its wiring in words, and how to call it."""
    workflow = handle.workflow
    facts = [f"{len(workflow.nodes)} node{'s' if len(workflow.nodes) != 1 else ''}"]
    facts += [f"uses {', '.join(workflow.resources)}"] if workflow.resources else []
    facts += [workflow.description] if workflow.description else []
    head = (
        f'<div class="head"><span><b>{escape(handle.name)}</b> v{handle.number}</span> '
        f'<span class="dim">· {escape(" · ".join(facts))}</span></div>'
    )
    graph = f'<div class="draw">{workflow_graph(workflow)}</div>' if len(workflow.nodes) <= _MOST_NODES else ""
    wiring = folded("Wiring", f"<pre>{escape(workflow.wiring())}</pre>", opened=not graph)
    return page(head, graph, wiring, f'<div class="dim">Run it: <code>{escape(call_of(handle))}</code></div>')


def call_of(handle: WorkflowHandle) -> str:
    """The line that runs a workflow: ``run = await etl(limit=100)``."""
    parameters = handle.workflow.parameters.values()
    given = ", ".join(f"{p.name}={p.default or '...'}" for p in parameters if p.required or p.default)
    spelt = handle.name if handle.name.isidentifier() else f"gateway.workflows[{handle.name!r}]"
    return f"run = await {spelt}({given})"


def timeline_html(timeline: Timeline) -> str:
    """Where the time went, as bars."""
    return page(timeline_rows(timeline))


def timeline_rows(timeline: Timeline, run: Run | None = None) -> str:
    """One bar per node; the part that it waited for resources is hatched, and told in words."""
    total = max((e.start + e.seconds for e in timeline), default=0.0) or 1.0
    rows = []
    for entry in timeline[:_MOST_NODES]:
        notes = [f"waited {seconds(entry.waited)} for resources"] if entry.waited >= 0.0005 else []
        notes += [f"{entry.attempts} attempts"] if entry.attempts > 1 else []
        notes += run.nodes[entry.node].notes if run is not None else []
        colour = MARKS[entry.status].colour
        waited = min(1.0, entry.waited / entry.seconds) if entry.seconds else 0.0
        left, width = 100 * entry.start / total, max(0.6, 100 * entry.seconds / total)
        bar = _bar(left, width * waited, _HATCH.format(colour)) if waited else ""
        bar += _bar(left + width * waited, width * (1 - waited), colour)
        rows.append(
            f"<tr><td>{sign(str(entry.status))} {escape(entry.node)}</td>"
            f'<td class="bar"><div style="{_TRACK}" aria-hidden="true">{bar}</div></td>'
            f'<td class="n">{seconds(entry.seconds)}</td><td class="dim note">{escape("; ".join(notes))}</td></tr>'
        )
    more = f'<div class="dim">{len(timeline) - len(rows)} more</div>' if len(timeline) > len(rows) else ""
    return f'<div class="wide"><table><tbody>{"".join(rows)}</tbody></table></div>{more}'


def _bar(left: float, width: float, background: str) -> str:
    place = f"position:absolute;top:0;height:9px;left:{left:.2f}%;width:{width:.2f}%;border-radius:2px"
    return f'<div style="{place};background:{background}"></div>'


# --------------------------------------------------------------------------------------------------- checks, a gateway


def checks_html(checks: Checks) -> str:
    """What ``gateway.check()`` found."""
    rows = [
        (
            escape(c.name),
            escape(c.type),
            f"{sign(c.status)} {escape(c.status)}",
            "" if c.latency_ms is None else f"{c.latency_ms:.1f} ms",
            escape(c.error or c.version or ""),
        )
        for c in checks
    ]
    return page(table(["resource", "type", "status", "latency", "answer"], rows, ["latency"]) if rows else repr(checks))


def gateway_html(gateway: Gateway) -> str:
    """A gateway: its workflows and resources, its server, and what to do next."""
    served = gateway.server
    at = f"serving at {served.url}" if served is not None and served.running else "not serving"
    head = (
        f'<div class="head"><span><b>{escape(gateway.title)}</b> {escape(gateway.description)}</span> '
        f'<span class="dim">· {escape(at)}</span></div>'
    )
    workflows = [
        (escape(h.name), f"v{h.number}", str(len(h.workflow.nodes)), f"<code>{escape(call_of(h))}</code>")
        for h in gateway.workflows.values()
    ]
    parts = [head]
    if workflows:
        parts.append(table(["workflow", "version", "nodes", "run it"], workflows, ["nodes"]))
    if known := resource_rows(gateway):
        shown = [(*map(escape, row[:3]), f"{sign(row[3])} {escape(row[3])}") for row in known]
        parts.append(table(["resource", "type", "where", "state"], shown))
    return page(*parts, f'<div class="dim">Next: {_code_spans(next_step(gateway))}</div>')


def resource_rows(gateway: Gateway) -> list[tuple[str, str, str, str]]:
    """Name, type, place and last known state of each registered resource."""
    health: Mapping[str, Any] = gateway.core.health()["resources"]
    rows = []
    for name in gateway.resource_registry.names():
        reference = gateway.resource_registry.reference(name)
        state = health.get(name, {}).get("status", "not used yet")
        rows.append((name, reference.type, _where(reference.config), str(state)))
    return rows


def _where(config: Mapping[str, Any]) -> str:
    if config.get("embedded"):
        return "embedded here" + (f", {config['database']}" if config.get("database") else "")
    if config.get("base_url"):
        return str(config["base_url"])
    port = f":{config['port']}" if config.get("port") else ""
    last = config.get("database", config.get("db"))
    return f"{config.get('host', '')}{port}" + (f"/{last}" if last is not None else "")


def next_step(gateway: Gateway) -> str:
    """What a person who looks at this gateway may want to do next, with code in backticks."""
    if not gateway.workflows:
        return "define a workflow: a cell that begins with `%%workflow NAME` and holds functions"
    name, handle = next(iter(gateway.workflows.items()))
    if gateway.server is None or not gateway.server.running:
        return f"run it, `{call_of(handle)}`, or offer it over HTTP, `%gateway serve`"
    return f"`print(gateway.server.curl({name!r}, {{}}))` shows the line that calls it from anywhere on this machine"


def _code_spans(text: str) -> str:
    parts = escape(text).split("`")
    return "".join(f"<code>{part}</code>" if i % 2 else part for i, part in enumerate(parts))


def resource_shown(check: Any, reference: Any, rows: Sequence[tuple[str, str]]) -> tuple[str, str]:
    """A resource that was just tried, as HTML and as text: where it is, how it answered, what is in it."""
    where = _where(reference.config)
    took = "" if check.latency_ms is None else f", {check.latency_ms:.1f} ms"
    answer = check.error or f"{check.version or 'answers'}{took}"
    shown = rows[:_MOST_NODES]
    more = f"and {len(rows) - len(shown)} more" if len(rows) > len(shown) else ""
    head = (
        f'<div class="head"><span>{sign(check.status)} <b>{escape(check.name)}</b> {escape(check.status)}</span> '
        f'<span class="dim">· {escape(f"{check.type} {where}")}</span></div>'
        f"<div{' class=fail' if check.error else ''}>{escape(answer)}</div>"
    )
    listing = folded(
        "Contents", table(["name", ""], [(escape(a), escape(b)) for a, b in shown]), opened=len(rows) <= 12
    )
    html = page(head, listing if rows else "", f'<div class="dim">{more}</div>' if more else "")
    lines = [f"{check.name} {check.status}: {check.type} {where}, {answer}"]
    lines += [f"  {name}  {remark}" for name, remark in shown]
    return html, "\n".join(filter(None, [*lines, more]))


def gateway_text(gateway: Gateway) -> str:
    """A gateway where there is no HTML."""
    lines = [repr(gateway)]
    lines += [f"  {h.name} v{h.number}: {call_of(h)}" for h in gateway.workflows.values()]
    lines += ["  " + "  ".join(row) for row in resource_rows(gateway)]
    return "\n".join([*lines, f"Next: {next_step(gateway)}"])


def server_html(server: Any) -> str:
    """A running server: where it answers. Its token is never part of a display, which is saved."""
    state = "serving at" if server.running else "stopped, was at"
    url = escape(server.proxy_url or server.url)
    return page(f'<div class="head"><span><b>{escape(server.title)}</b> {state} <code>{url}</code></span></div>')
