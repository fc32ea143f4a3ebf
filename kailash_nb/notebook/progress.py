"""A run while it goes on: one display, redrawn in place, that ends as the run does."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

from ..runs import Event, EventKind, NodeStatus, Run, RunGateway, RunRecord, RunStart
from ..workflow import Workflow
from . import view

FIRST = 0.4
"""Seconds until a run is shown: shorter ones need no progress."""
_NEXT, _IDLE = 0.1, 1.0  # seconds between two drawings: with news, and without (the time goes on)

Publish = Callable[[str, str], None]
"""Shows, or replaces, the display: HTML, and plain text for where there is no HTML."""


class Progress:
    """An observer of one run that keeps a display of it up to date. Lives as long as the cell that awaits the run.

    Args:
        name: what the run is of.
        workflow: its workflow; without it nothing is displayed.
        publish: shows the display.
        gateway: what the run goes through to be resumed.
    """

    def __init__(
        self, name: str, workflow: Workflow | None, publish: Publish | None, gateway: RunGateway | None = None
    ) -> None:
        self.name = name
        self._gateway = gateway
        self._workflow = workflow
        self._publish = publish
        self._events: list[Event] = []
        self._timer: asyncio.TimerHandle | None = None
        self._drawn = 0.0
        self.shown = False

    def __call__(self, event: Event) -> None:
        """Take note of an event, and draw it soon."""
        self._events.append(event)
        if self._workflow is None or self._publish is None:
            return
        if event.kind is EventKind.RUN_STARTED:
            self._draw_in(FIRST)
        elif self.shown:
            self._draw_in(max(0.0, _NEXT - (time.monotonic() - self._drawn)))

    def _draw_in(self, delay: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = asyncio.get_running_loop().call_later(delay, self._draw)

    def _draw(self) -> None:
        run = self.run
        if run is not None and self._publish is not None:
            self.shown, self._drawn = True, time.monotonic()
            self._publish(view.run_html(run, self._workflow), f"{run.workflow} {run.status}")
            self._draw_in(_IDLE)

    def finish(self) -> None:
        """Draw how it ended: a line if all went well, the whole picture if not. Only if it was shown before."""
        if self._timer is not None:
            self._timer.cancel()
        run = self.run
        if self.shown and run is not None and self._publish is not None:
            html = view.page(view.headline(run)) if run.success else view.run_html(run, self._workflow)
            self._publish(html, run.summary())

    def clear(self) -> None:
        """Take the display away, because the run itself is shown beside it."""
        if self.shown and self._publish is not None:
            self._publish("", "")

    @property
    def run(self) -> Run | None:
        """The run so far, or None before it has started."""
        workflow = self._workflow
        if workflow is None or not self._events:
            return None
        first = self._events[0]
        start: dict[str, Any] = {"parameters": {}, "resources": {}, "context": {}, "root": first.note or ""}
        start |= {"id": first.note or "", "at": first.at, "layout": tuple(workflow.by_name), "last": workflow.last}
        record = RunStart(workflow=self.name, version=workflow.hash, **start)
        events = tuple(e for e in self._events if e.node is None or e.node in workflow.by_name)
        return Run.of(RunRecord(record, events), self._gateway)

    def interrupted(self, took: str) -> str:
        """The line for a run that the stop button ended."""
        run = self.run
        if run is None:
            return f"{self.name} interrupted after {took}"
        ended = [name for name, n in run.nodes.items() if n.status in (NodeStatus.CANCELLED, NodeStatus.RUNNING)]
        at = f": {', '.join(ended)} {'was' if len(ended) == 1 else 'were'} running" if ended else ""
        return f"{self.name} interrupted after {took}{at}; `await run.resume()` goes on from there"
