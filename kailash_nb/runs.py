"""Requests, events and runs.

A run is a record of events; everything that shows a run (its result, timeline, display, error, history, resume) is a
view of that record. :class:`Run` is that view as a value, made by :meth:`Run.of` from a :class:`RunRecord`.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Protocol

from . import values
from .exceptions import NodeError, NodeNotFoundError, WorkflowError, did_you_mean, listed
from .references import ResourceReference

if TYPE_CHECKING:
    import pandas as pd

ResourceGiven = ResourceReference | str | Mapping[str, Any]
"""How a request names a resource: a reference, its JSON form, or ``"@name"`` of a registered one."""


class RunStatus(StrEnum):
    """Where a run stands. A finished run never changes its status."""

    RUNNING = "running"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"


class NodeStatus(StrEnum):
    """Where a node of a run stands."""

    WAITING = "waiting"  # for its inputs
    RUNNING = "running"
    COMPLETED = "completed"
    REUSED = "reused"  # its output was taken from the run that this one resumes
    FALLBACK = "fallback"  # it failed, and its error handler's value stands in
    FAILED = "failed"
    CANCELLED = "cancelled"  # it was running when the run ended
    SKIPPED = "skipped"  # it had not started when the run ended


DONE = frozenset({NodeStatus.COMPLETED, NodeStatus.REUSED, NodeStatus.FALLBACK})
"""The statuses in which a node has a value."""


@dataclass(frozen=True)
class WorkflowRequest:
    """What to run a workflow with.

    Args:
        parameters: the workflow's parameters by name; further ones stay visible to blocks in ``parameters``.
        resources: which resource each resource name of the workflow means in this run; names that are absent mean the
            resource registered by that name.
        context: notes about the caller, visible to nodes as ``context``; they never authorise anything.
        inputs: another spelling of ``parameters``.

    Raises:
        WorkflowError: both ``parameters`` and ``inputs`` are given and differ, or one is no mapping.
        ResourceConfigError: a resource is neither a reference nor ``"@name"``.
    """

    parameters: Mapping[str, Any] = field(default_factory=dict)
    resources: Mapping[str, ResourceGiven] = field(default_factory=dict)
    context: Mapping[str, Any] = field(default_factory=dict)
    inputs: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        for name in ("parameters", "resources", "context", "inputs"):
            if not isinstance(getattr(self, name), Mapping) and not (name == "inputs" and self.inputs is None):
                raise WorkflowError(f"a request's {name!r} is an object of names and values")
        if self.inputs is not None:
            if self.parameters and dict(self.parameters) != dict(self.inputs):
                raise WorkflowError("`inputs` is another spelling of `parameters`; give one of them")
            object.__setattr__(self, "parameters", self.inputs)
        object.__setattr__(self, "resources", {k: _resource(v) for k, v in self.resources.items()})

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> WorkflowRequest:
        """The request of a JSON object; raises WorkflowError where it has unknown fields."""
        known = ("parameters", "inputs", "resources", "context")
        if not isinstance(data, Mapping):
            raise WorkflowError(f"a request is an object with {listed(known)}")
        unknown = [f"unknown field {k!r}{did_you_mean(str(k), known)}" for k in data if k not in known]
        if unknown:
            raise WorkflowError(f"{'; '.join(unknown)}; a request has {listed(known)}")
        return cls(**data)

    def to_dict(self) -> dict[str, Any]:
        """The request as JSON."""
        return {
            "parameters": values.to_json(self.parameters),
            "resources": {k: v.to_dict() if isinstance(v, ResourceReference) else v for k, v in self.resources.items()},
            "context": values.to_json(self.context),
        }


def _resource(given: ResourceGiven) -> ResourceReference | str:
    return ResourceReference.from_dict(given) if isinstance(given, Mapping) else given


class EventKind(StrEnum):
    """What an event tells."""

    RUN_STARTED = "run.started"
    NODE_STARTED = "node.started"
    NODE_RETRY = "node.retry"
    NODE_COMPLETED = "node.completed"
    NODE_REUSED = "node.reused"
    NODE_FALLBACK = "node.fallback"
    NODE_FAILED = "node.failed"
    NODE_CANCELLED = "node.cancelled"
    NODE_SKIPPED = "node.skipped"
    RUN_FINISHED = "run.finished"


# Not frozen: a frozen dataclass costs five times as much to make, and every node makes two. Nobody changes an event.
@dataclass(slots=True)
class Event:
    """One fact of a run.

    ``at`` is seconds since the epoch; ``value`` the node's output (completed, reused, fallback); ``waited`` the seconds
    the node waited for resources; ``attempt`` counts from 1; ``note`` says what a reader should know.
    """

    kind: EventKind
    at: float
    node: str | None = None
    value: Any = None
    error: RunError | None = None
    waited: float = 0.0
    attempt: int = 1
    status: RunStatus | None = None
    note: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """The event as JSON, without the node's value (the run's result has it)."""
        return {
            "event": str(self.kind),
            "at": _time(self.at).isoformat(),
            "node": self.node,
            "error": self.error.to_dict() if self.error else None,
            "waited": round(self.waited, 6),
            "attempt": self.attempt,
            "status": str(self.status) if self.status else None,
            "note": self.note,
        }


Observer = Callable[[Event], None]
"""Told each event of a run after it is recorded; it must return at once, and what it raises is logged."""


@dataclass(frozen=True)
class RunError:
    """Why a run failed: the node, the exception, and the author's own line.

    Args:
        node: the node that failed, or None.
        type: the exception's class name.
        message: its message, secrets replaced.
        where: the place as people say it: ``"cell [4]"``, a file name, or the node's source.
        line: the line there, counted from 1.
        source: that line's text.
        exception: the exception itself, where it is still at hand; not part of the JSON.
        inputs: the values the node was called with, by name; not part of the JSON.
    """

    node: str | None
    type: str
    message: str
    where: str | None = None
    line: int | None = None
    source: str | None = None
    exception: BaseException | None = field(default=None, repr=False, compare=False)
    inputs: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)

    def __str__(self) -> str:
        place = f", {self.where} line {self.line}" if self.line else ""
        message = self.message or self.type
        # A bare message such as a KeyError's `'amount'` says nothing without its type.
        named = f"{self.type}: {message}" if self.type not in _SPEAKING and self.message else message
        return f"{self.node} failed{place}: {named}" if self.node else named

    def to_dict(self) -> dict[str, Any]:
        """The error as JSON."""
        return {
            "node": self.node,
            "type": self.type,
            "message": self.message,
            "where": self.where,
            "line": self.line,
            "source": self.source,
        }


# Our own errors' messages name the cause and the remedy; the class name would only be in the way.
_SPEAKING = frozenset(
    {"NodeTimeoutError", "PoolExhaustedError", "ResourceCredentialsError", "ResourceError", "ResourceUnavailableError"}
)


@dataclass(frozen=True)
class NodeResult:
    """What became of one node in one run. Times are seconds since the epoch; ``waited`` is seconds."""

    node: str
    status: NodeStatus
    value: Any = None
    error: RunError | None = None
    started: float | None = None
    ended: float | None = None
    waited: float = 0.0
    attempts: int = 0
    notes: tuple[str, ...] = ()

    @property
    def seconds(self) -> float | None:
        """How long it ran, or None if it has not both started and ended."""
        return None if self.started is None or self.ended is None else self.ended - self.started

    @property
    def outputs(self) -> Mapping[str, Any]:
        """Its outputs by name: the mapping it returned, or ``{"result": value}``."""
        return outputs_of(self.value)


def outputs_of(value: Any) -> Mapping[str, Any]:
    """A node's outputs by name: the mapping it returned, or ``{"result": value}`` for any other value."""
    return value if isinstance(value, Mapping) else {"result": value}


@dataclass(frozen=True)
class TimelineEntry:
    """One bar of the timeline; seconds, ``start`` counted from the run's start."""

    node: str
    status: NodeStatus
    start: float
    seconds: float
    waited: float
    attempts: int


class Timeline(tuple[TimelineEntry, ...]):
    """Where a run's time went: per node when it started, how long it took, how much of that it waited for resources."""

    __slots__ = ()

    def frame(self) -> pd.DataFrame:
        """The timeline as a DataFrame: node, status, start, seconds, waited, attempts."""
        rows = [(e.node, str(e.status), e.start, e.seconds, e.waited, e.attempts) for e in self]
        return values.pandas().DataFrame(rows, columns=["node", "status", "start", "seconds", "waited", "attempts"])

    def __repr__(self) -> str:
        lines = [
            f"{e.start:8.3f} s  {e.node:<20} {e.seconds:8.3f} s  {e.status}"
            + (f"  (waited {e.waited:.3f} s for resources)" if e.waited >= 0.0005 else "")
            + (f"  ({e.attempts} attempts)" if e.attempts > 1 else "")
            for e in self
        ]
        return "\n".join(lines) or "(nothing has run)"


@dataclass(frozen=True)
class RunStart:
    """The first fact of a run's record: what was asked for.

    ``layout`` names the nodes in the order of the workflow, ``last`` the ones whose outputs are the run's data.
    ``root`` is the first run of a chain of resumes; idempotency keys derive from it. ``given`` are the resources that
    the request itself brought; the others are those that were registered.
    """

    id: str
    workflow: str
    version: str
    parameters: Mapping[str, Any]
    resources: Mapping[str, ResourceReference]
    context: Mapping[str, Any]
    layout: tuple[str, ...]
    last: tuple[str, ...]
    at: float
    root: str
    resumes: str | None = None
    given: tuple[str, ...] = ()


@dataclass(frozen=True)
class RunRecord:
    """A run as a store holds it: how it started, and its events so far."""

    start: RunStart
    events: tuple[Event, ...]


@dataclass(frozen=True, eq=False)
class Run:
    """One run of a workflow: a value, free to keep; it holds no connection and no secret.

    ``run["node"]`` is a node's value, ``run.result["node"]["output"]`` one output, ``run.data`` the outputs of the last
    nodes, ``run.frame("node")`` a table. ``run.debug()`` and ``await run.resume()`` go through its gateway.
    """

    id: str
    workflow: str
    version: str
    status: RunStatus
    parameters: Mapping[str, Any]
    nodes: Mapping[str, NodeResult]
    last: tuple[str, ...]
    error: RunError | None
    started_at: dt.datetime
    finished_at: dt.datetime | None
    root: str
    resumes: str | None = None
    _gateway: RunGateway | None = field(default=None, repr=False)

    @classmethod
    def of(cls, record: RunRecord, gateway: RunGateway | None = None) -> Run:
        """The view of a record; ``gateway`` is what :meth:`debug` and :meth:`resume` go through."""
        start = record.start
        told: dict[str, list[Event]] = {name: [] for name in start.layout}
        status, error, finished = RunStatus.RUNNING, None, None
        for event in record.events:
            if event.node is not None:
                told[event.node].append(event)
            elif event.kind is EventKind.RUN_FINISHED:
                status, error, finished = event.status or status, event.error, event.at
        return cls(
            id=start.id,
            workflow=start.workflow,
            version=start.version,
            status=status,
            parameters=MappingProxyType(dict(start.parameters)),
            nodes=MappingProxyType({name: _node_result(name, events) for name, events in told.items()}),
            last=start.last,
            error=error,
            started_at=_time(start.at),
            finished_at=None if finished is None else _time(finished),
            root=start.root,
            resumes=start.resumes,
            _gateway=gateway,
        )

    # --------------------------------------------------------------------------------------------------------- values

    def __getitem__(self, node: str) -> Any:
        """The value a node returned; NodeNotFoundError (a KeyError) names those there are."""
        found = self.nodes.get(node)
        if found is None:
            raise NodeNotFoundError(
                f"run of {self.workflow!r} has no node {node!r}{did_you_mean(node, self.nodes)}: {listed(self.nodes)}"
            )
        if found.status not in DONE:
            raise NodeNotFoundError(f"node {node!r} has no value in this run: it is {found.status}")
        return found.value

    @property
    def success(self) -> bool:
        """Whether the run completed."""
        return self.status is RunStatus.COMPLETED

    @property
    def result(self) -> dict[str, Mapping[str, Any]]:
        """Every finished node's outputs: ``run.result["load"]["loaded"]``."""
        return {name: node.outputs for name, node in self.nodes.items() if node.status in DONE}

    @property
    def data(self) -> dict[str, Any]:
        """The outputs of the last nodes, merged; a name that two of them share is kept per node: ``{node: value}``."""
        found = {name: self.nodes[name].outputs for name in self.last if self.nodes[name].status in DONE}
        merged: dict[str, Any] = {}
        for outputs in found.values():
            for output, value in outputs.items():
                owners = [name for name, other in found.items() if output in other]
                merged[output] = value if len(owners) == 1 else {name: found[name][output] for name in owners}
        return merged

    def frame(self, node: str | None = None) -> pd.DataFrame:
        """A node's value as a DataFrame; without a name, that of the last node that has a table (else the last one).

        Raises NodeNotFoundError for an unknown or unfinished node.
        """
        return values.to_frame(self[node if node is not None else self._table_node()])

    @property
    def frames(self) -> Frames:
        """Outputs as DataFrames, made when asked for: ``run.frames["extract.users"]``, ``run.frames["extract"]``."""
        return Frames(self)

    def _table_node(self) -> str:
        done = [name for name, node in self.nodes.items() if node.status in DONE]
        if not done:
            raise NodeNotFoundError(f"no node of this run has a value: it is {self.status}")
        tables = [
            n for n in done if values.is_table(self[n]) or any(map(values.is_table, outputs_of(self[n]).values()))
        ]
        preferred = [n for n in self.last if n in tables] or tables or [n for n in self.last if n in done] or done
        return preferred[-1]

    # ----------------------------------------------------------------------------------------------------------- time

    @property
    def execution_time(self) -> float:
        """Seconds from start to finish (to now, while it runs)."""
        end = self.finished_at or dt.datetime.now(dt.UTC)
        return (end - self.started_at).total_seconds()

    @property
    def timeline(self) -> Timeline:
        """Where the time went, per node, with the seconds each waited for resources; ``.frame()`` for a DataFrame."""
        began = self.started_at.timestamp()
        ran = [n for n in self.nodes.values() if n.started is not None]
        ran.sort(key=lambda n: n.started or 0.0)
        now = (self.finished_at or dt.datetime.now(dt.UTC)).timestamp()
        return Timeline(
            TimelineEntry(
                n.node,
                n.status,
                (n.started or began) - began,
                (n.ended or now) - (n.started or began),
                n.waited,
                n.attempts,
            )
            for n in ran
        )

    # -------------------------------------------------------------------------------------------------------- actions

    def raise_for_status(self) -> Run:
        """The run itself if it completed; raises NodeError, carrying ``.run``, if it failed or was cancelled."""
        if self.success or self.status is RunStatus.RUNNING:
            return self
        failed = (self.error.node if self.error else None) or ""
        raise NodeError(self.summary(), node=failed, run=self) from (self.error.exception if self.error else None)

    def debug(self) -> Any:
        """Open the failed node: its recorded inputs become variables and its source the next cell (in a notebook).

        Returns the inputs by name. Raises WorkflowError where there is nothing to debug or no gateway at hand.
        """
        return self._through("debug").debug(self)

    def resume(self) -> Awaitable[Run]:
        """Run it again from where it stopped: finished nodes whose code and inputs are unchanged are not run again.

        Uses the workflow as it is registered now. Returns a new Run (``.resumes`` names this one); raises as
        ``execute_workflow`` does.
        """
        return self._through("resume").resume(self)

    def _through(self, action: str) -> RunGateway:
        if self._gateway is None:
            raise WorkflowError(f"run.{action}() needs the gateway that ran it, and this run came without one")
        return self._gateway

    # ---------------------------------------------------------------------------------------------------------- words

    def summary(self) -> str:
        """The run in one line: ``etl ok 1.2 s, load 4,912 rows``, or what failed and what to do."""
        if self.error is not None:
            kept = " Inputs are kept: run.debug()" if self.error.inputs else ""
            return f"{self.error}{'' if not kept or str(self.error).endswith('.') else '.'}{kept}"
        shown = {RunStatus.COMPLETED: "ok", RunStatus.RUNNING: "running", RunStatus.CANCELLED: "cancelled"}
        done = [n for n in self.last if self.nodes[n].status in DONE]
        last = [f"{n} {values.describe(self[n])}" for n in done[:3]]
        last += [f"and {len(done) - 3} more"] if len(done) > 3 else []
        facts = ", ".join([f"{shown.get(self.status, self.status)} {seconds(self.execution_time)}", *last])
        return f"{self.workflow} {facts}"

    def __repr__(self) -> str:
        return f"<Run {self.id[:8]} {self.summary()}>"

    def to_dict(self) -> dict[str, Any]:
        """The run as JSON, with the six keys of the SDK's answer to ``POST .../execute``.

        ``result`` has the outputs of the last nodes, by node: what a caller asked for, and not the tables on the way.
        """
        return {
            "request_id": self.id,
            "workflow_id": self.workflow,
            "status": str(self.status),
            "result": values.to_json({n: self.nodes[n].outputs for n in self.last}) if self.success else None,
            "error": str(self.error) if self.error else None,
            "execution_time": round(self.execution_time, 6),
        }


class Frames(Mapping[str, "pd.DataFrame"]):
    """A run's outputs as DataFrames, each made when asked for; keys are ``node`` and ``node.output``."""

    def __init__(self, run: Run) -> None:
        self._run = run

    def __getitem__(self, key: str) -> pd.DataFrame:
        if key in self._run.nodes:
            return self._run.frame(key)
        node, _, output = key.rpartition(".")
        outputs = outputs_of(self._run[node]) if node in self._run.nodes else {}
        if output not in outputs:
            raise NodeNotFoundError(f"no output {key!r}{did_you_mean(key, self)}: {listed(self)}")
        return values.to_frame(outputs[output])

    def __iter__(self) -> Iterator[str]:
        return (f"{node}.{output}" for node, outputs in self._run.result.items() for output in outputs)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __repr__(self) -> str:
        return f"<Frames {listed(self)}>"


class RunGateway(Protocol):
    """What a run needs of its gateway, to be debugged or resumed."""

    def debug(self, run: Run) -> Any:
        """Open the failed node of ``run``."""

    def resume(self, run: Run) -> Awaitable[Run]:
        """Run ``run`` again from where it stopped."""


def seconds(duration: float) -> str:
    """A duration as people read it: ``3.1 ms``, ``1.2 s``, ``2 min 5 s``."""
    if duration < 1:
        return f"{duration * 1000:.1f} ms" if duration < 0.1 else f"{duration * 1000:.0f} ms"
    if duration < 60:
        return f"{duration:.1f} s"
    return f"{int(duration // 60)} min {int(duration % 60)} s"


def _time(at: float) -> dt.datetime:
    return dt.datetime.fromtimestamp(at, dt.UTC)


_STATUS_OF = {
    EventKind.NODE_STARTED: NodeStatus.RUNNING,
    EventKind.NODE_RETRY: NodeStatus.RUNNING,
    EventKind.NODE_COMPLETED: NodeStatus.COMPLETED,
    EventKind.NODE_REUSED: NodeStatus.REUSED,
    EventKind.NODE_FALLBACK: NodeStatus.FALLBACK,
    EventKind.NODE_FAILED: NodeStatus.FAILED,
    EventKind.NODE_CANCELLED: NodeStatus.CANCELLED,
    EventKind.NODE_SKIPPED: NodeStatus.SKIPPED,
}
_UNDER_WAY = frozenset({EventKind.NODE_STARTED, EventKind.NODE_RETRY})


def _node_result(node: str, events: Sequence[Event]) -> NodeResult:
    """What became of a node, from its own events in order."""
    if not events:
        return NodeResult(node, NodeStatus.WAITING)
    last = events[-1]
    under_way = [e for e in events if e.kind in _UNDER_WAY]
    return NodeResult(
        node=node,
        status=_STATUS_OF[last.kind],
        value=last.value,
        error=last.error,
        started=under_way[0].at if under_way else None,
        ended=last.at if under_way and last.kind not in _UNDER_WAY else None,
        waited=last.waited,
        attempts=max(e.attempt for e in events) if under_way else 0,
        notes=tuple(e.note for e in events if e.note),
    )
