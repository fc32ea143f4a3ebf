"""What people hold in a cell beside the gateway: a workflow to call, a run to await, history, checks, a debug session.

Handles are thin views of the core. What a person sees of them, and how the stop button reaches a run, is the business
of the process's front end, which a notebook sets as :data:`frontend`.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Generator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from . import values
from .core import Core
from .resources.registry import CheckResult
from .runs import Event, Observer, Run, RunStatus, WorkflowRequest
from .workflow import Node, Workflow

if TYPE_CHECKING:
    import pandas as pd

logger = logging.getLogger("kailash_nb")


@dataclass(frozen=True)
class Debug:
    """A failed node, opened: its recorded inputs by name, and its source, to be mended and run again."""

    run: Run
    node: Node
    inputs: Mapping[str, Any] = field(repr=False)

    @property
    def source(self) -> str:
        """The node's source, as its author wrote it."""
        return self.node.code.source

    def __repr__(self) -> str:
        given = "\n".join(f"  {name} = {values.describe(value)}" for name, value in self.inputs.items())
        mend = f"Mend node {self.node.name!r}, define it again, `await run.resume()`."
        return f"{self.run.error}\ninputs:\n{given or '  (none)'}\n{mend}"


class Frontend(Protocol):
    """What a person's front end (a notebook) does for every gateway of the process."""

    def say(self, text: str) -> None:
        """Show one line to the user."""

    def place(self, filename: str) -> str | None:
        """What people call a source file, such as ``"cell [4]"``; None if it has no better name."""

    def debug(self, session: Debug) -> None:
        """Put a failed node's inputs and source in front of the user."""

    def foreground(self, pending: PendingRun) -> AbstractContextManager[None]:
        """Entered around a run that the user awaits: the stop button ends it at once, and its progress shows."""


frontend: Frontend | None = None
"""The process's front end, or None where there is nobody to look: a script, a server."""


def set_frontend(new: Frontend | None) -> None:
    """Make ``new`` the process's front end."""
    global frontend
    frontend = new


def say(text: str) -> None:
    """Tell the user one line: in the notebook, else in the log."""
    if frontend is not None:
        frontend.say(text)
    else:
        logger.info(text)


def place(filename: str) -> str | None:
    """What people call a source file, if the front end knows."""
    return frontend.place(filename) if frontend is not None else None


class WorkflowHandle:
    """A registered workflow, to be called: ``run = await etl(limit=100)``. Always means the current version."""

    def __init__(self, core: Core, name: str) -> None:
        self.core = core
        self.name = name

    @property
    def workflow(self) -> Workflow:
        """Its current version."""
        return self.core.workflow(self.name).workflow

    @property
    def number(self) -> int:
        """The number of its current version, from 1."""
        return self.core.workflow(self.name).number

    def __call__(self, **parameters: Any) -> PendingRun:
        """A run with these parameters, which starts when it is awaited; raises NodeError with ``.run`` if it fails."""
        request = WorkflowRequest(parameters)
        execute = self.core.execute
        return PendingRun(self.name, self.core, lambda observer: execute(self.name, request, observer=observer))

    def __repr__(self) -> str:
        return f"{self.name} v{self.number}\n{self.workflow.wiring()}"


class PendingRun(Awaitable[Run]):
    """A run that starts when it is awaited, and gives its Run, or raises NodeError carrying it.

    Args:
        name: what people call it.
        core: whose workflow of that name it runs.
        start: begins it, with an observer or None.
    """

    def __init__(self, name: str, core: Core, start: Callable[[Observer | None], Awaitable[Run]]) -> None:
        self.name = name
        self.workflow = core.workflow(name).workflow
        self.gateway = core.gateway
        self._start = start
        self._observers: list[Observer] = []

    def observe(self, observer: Observer) -> PendingRun:
        """Have each event told to ``observer``, too, as it happens; returns itself."""
        self._observers.append(observer)
        return self

    def __await__(self) -> Generator[Any, None, Run]:
        return self._run().__await__()

    async def _run(self) -> Run:
        with frontend.foreground(self) if frontend is not None else nullcontext():
            run = await self._start(self._tell if self._observers else None)
        return run.raise_for_status()

    def _tell(self, event: Event) -> None:
        for observer in self._observers:
            observer(event)

    def __repr__(self) -> str:
        return f"<{self.name} has not started: add `await` in front of it>"


class Runs:
    """The recorded runs of a gateway; every method is awaited."""

    def __init__(self, core: Core) -> None:
        self._core = core

    async def list(self, workflow: str | None = None, status: str | None = None, limit: int = 100) -> list[Run]:
        """Runs, newest first; ``workflow`` and ``status`` narrow them down. Raises ValueError for an unknown status."""
        return await self._core.runs(workflow, None if status is None else RunStatus(status), limit)

    async def get(self, run_id: str) -> Run:
        """A run by its id; raises RunNotFoundError."""
        return await self._core.run(run_id)

    async def resume(self, run: Run | str) -> Run:
        """Run again from where a run stopped; see :meth:`Run.resume`."""
        found = await self.get(run) if isinstance(run, str) else run
        return await found.resume()


class Checks(tuple[CheckResult, ...]):
    """What ``gateway.check()`` found, one result per resource; ``.frame()`` for a DataFrame."""

    __slots__ = ()

    @property
    def ok(self) -> bool:
        """Whether every resource answered."""
        return all(r.status == "healthy" for r in self)

    def rows(self) -> list[dict[str, Any]]:
        """One mapping per resource: name, type, status, latency_ms, version, error."""
        keys = ("name", "type", "status", "latency_ms", "version", "error")
        return [{k: getattr(r, k) for k in keys} for r in self]

    def frame(self) -> pd.DataFrame:
        """The results as a DataFrame."""
        return values.to_frame(self.rows())

    def __repr__(self) -> str:
        if not self:
            return "no resources are registered; `gateway.register_resource(name, ResourceReference(...))` adds one"
        return "\n".join(map(_line, self))


def _line(result: CheckResult) -> str:
    answer = result.error or f"{result.latency_ms or 0:.1f} ms  {result.version or ''}"
    return f"{result.name:<16} {result.type:<12} {result.status:<10} {answer}"
