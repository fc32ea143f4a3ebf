"""The executor: runs a workflow's graph, each node as soon as its inputs are there.

A run is a set of *chains*. A chain is one asyncio task that runs a node and then goes on with the first of the nodes
that became ready by it; only the others get a task of their own, so a linear stretch costs no task per node. The first
failure ends the run: what is under way is cancelled and awaited, what has not begun is skipped. A plain function runs
in a thread of its own, which nobody can stop: when its node ends before it does, it is abandoned, and the run says so.

What happens is told as events to ``record``, and nothing goes on before an event is recorded. The executor knows
neither stores nor pools nor secrets: it is given callables.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import functools
import linecache
import threading
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Mapping
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from dataclasses import dataclass, field
from types import CoroutineType, TracebackType
from typing import Any, Self

from .compiler import MISSING
from .exceptions import NodeTimeoutError, ResourceError, WorkflowError, did_you_mean, listed
from .runs import Event, EventKind, RunError, outputs_of
from .workflow import ErrorHandler, Node, Policy, RetryPolicy, Timeout, Workflow

CANCEL_GRACE = 10.0
"""Seconds that cancelled nodes get to clean up before they are abandoned."""

Lease = Callable[[str, Callable[[float], None]], AbstractAsyncContextManager[Any]]
"""Given a resource's name and a callback for seconds waited, a context that yields the live resource."""


@dataclass(frozen=True)
class Work:
    """What one run works with.

    Args:
        parameters: the workflow's parameters, checked.
        context: the caller's notes.
        key: what idempotency keys begin with; the same for all attempts of the run.
        lease: opens a resource by its name in the workflow.
        record: awaited for every event before the run goes on.
        done: values of nodes that need not run, taken from an earlier run.
        place: how people call a source file: ``"cell [4]"``; None for no better name than the file's.
        redact: takes secrets out of a text.
        limit: how many nodes may run at once.
    """

    parameters: Mapping[str, Any]
    context: Mapping[str, Any]
    key: str
    lease: Lease
    record: Callable[[Event], Awaitable[None]]
    done: Mapping[str, Any] = field(default_factory=dict)
    place: Callable[[str], str | None] = lambda _: None
    redact: Callable[[str], str] = lambda text: text
    limit: int = 64


async def execute(plan: Plan, work: Work) -> RunError | None:
    """Run a plan to its end; returns None if every node completed, else why it failed.

    Raises CancelledError when it is cancelled (its nodes then are too, and recorded so), and what ``record`` raises.
    """
    return await _Execution(plan, work).run()


class Plan:
    """A workflow as the executor runs it: nodes by number, who waits for whom; made once per version and shared."""

    __slots__ = ("calls", "dependents", "needs", "nodes", "number", "workflow")

    def __init__(self, workflow: Workflow) -> None:
        self.workflow = workflow
        self.nodes = workflow.nodes
        self.number = {node.name: i for i, node in enumerate(self.nodes)}
        self.needs = [len(node.upstream) for node in self.nodes]
        self.dependents: list[list[int]] = [[] for _ in self.nodes]
        for i, node in enumerate(self.nodes):
            for name in node.upstream:
                self.dependents[self.number[name]].append(i)
        self.calls = [_with_policies(node.policies) for node in self.nodes]


# --------------------------------------------------------------------------------------------------------------- a run


class _Execution:
    """One run under way; lives from its start to its last event."""

    def __init__(self, plan: Plan, work: Work) -> None:
        self.plan = plan
        self.work = work
        self.values: list[Any] = [None] * len(plan.nodes)
        self.needs = plan.needs.copy()
        self.ready: deque[int] = deque()
        self.begun: set[int] = set()
        self.chains: dict[asyncio.Task[None], int] = {}
        self.failure: RunError | None = None
        self.broken: BaseException | None = None  # what record() raised: nothing more can be recorded
        self.stopping = False

    async def run(self) -> RunError | None:
        self.finished: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        await self._take_over_done()
        self._start_chains()
        try:
            if self.chains:
                await self.finished
        except asyncio.CancelledError:
            await self._stop()
            raise
        if self.failure is not None or self.broken is not None:
            await self._stop()
        if self.broken is not None:
            raise self.broken
        return self.failure

    async def _take_over_done(self) -> None:
        done = {self.plan.number[name]: value for name, value in self.work.done.items()}
        for i, value in done.items():
            self.values[i] = value
            self.begun.add(i)
            for dependent in self.plan.dependents[i]:
                self.needs[dependent] -= 1
            await self._record(EventKind.NODE_REUSED, i, value=value)
        self.ready.extend(i for i, needs in enumerate(self.needs) if not needs and i not in done)

    def _start_chains(self) -> None:
        loop = asyncio.get_running_loop()
        while self.ready and len(self.chains) < self.work.limit and not self.stopping:
            first = self.ready.popleft()
            chain = loop.create_task(self._chain(first), name=f"node:{self.plan.nodes[first].name}")
            self.chains[chain] = first
            chain.add_done_callback(self._chain_done)

    async def _chain(self, i: int) -> None:
        while await self._node(i):
            following = []
            for dependent in self.plan.dependents[i]:
                self.needs[dependent] -= 1
                if not self.needs[dependent]:
                    following.append(dependent)
            if not following or self.stopping or self.failure is not None:
                return
            i, *others = following
            self.chains[asyncio.current_task()] = i  # type: ignore[index]  # a chain is a task
            if others:
                self.ready.extend(others)
                self._start_chains()

    def _chain_done(self, chain: asyncio.Task[None]) -> None:
        del self.chains[chain]
        if not chain.cancelled() and (error := chain.exception()) is not None:
            self.broken = self.broken or error
        elif self.failure is None and not self.stopping:
            self._start_chains()
        if not self.finished.done() and (not self.chains or self.failure is not None or self.broken is not None):
            self.finished.set_result(None)

    async def _stop(self) -> None:
        """Cancel and await what is under way; skip what has not begun."""
        self.stopping = True
        chains = list(self.chains)
        for chain in chains:
            chain.cancel()
        again = await _ended(chains, CANCEL_GRACE)
        if self.broken is None:
            for chain, current in list(self.chains.items()):
                if not chain.done():
                    note = f"it ignored its cancellation for {CANCEL_GRACE:g} s and was abandoned"
                    await self._record(EventKind.NODE_CANCELLED, current, note=note)
            for i in range(len(self.plan.nodes)):
                if i not in self.begun:
                    await self._record(EventKind.NODE_SKIPPED, i)
        if again is not None:
            raise again

    # ------------------------------------------------------------------------------------------------------- one node

    async def _node(self, i: int) -> bool:
        """Run one node with its policies; whether the run may go on with what depends on it."""
        self.begun.add(i)
        run = _NodeRun(self, i)
        try:
            await self._record(EventKind.NODE_STARTED, i)
        except asyncio.CancelledError:
            await self._record(EventKind.NODE_CANCELLED, i)
            raise
        try:
            value = await self.plan.calls[i](run)
        except asyncio.CancelledError as error:
            if self.stopping:
                await self._record(EventKind.NODE_CANCELLED, i, waited=run.waited, attempt=run.attempt, note=run.note)
                raise
            return await self._failed(run, error)  # something inside the node was cancelled, not the node
        except GeneratorExit:
            raise
        except BaseException as error:  # SystemExit and KeyboardInterrupt must end the run, not the process
            return await self._failed(run, error)
        self.values[i] = value
        kind = EventKind.NODE_COMPLETED if run.fallback is None else EventKind.NODE_FALLBACK
        await self._record(
            kind, i, value=value, error=run.fallback, waited=run.waited, attempt=run.attempt, note=run.note
        )
        return True

    async def _failed(self, run: _NodeRun, error: BaseException) -> bool:
        failure = self.describe(run, error)
        first = self.failure is None and not self.stopping
        if first:
            self.failure = failure
        await self._record(
            EventKind.NODE_FAILED, run.number, error=failure, waited=run.waited, attempt=run.attempt, note=run.note
        )
        return False

    def _record(self, kind: EventKind, i: int, **facts: Any) -> Awaitable[None]:
        return self.work.record(Event(kind, time.time(), self.plan.nodes[i].code.name, **facts))

    def describe(self, run: _NodeRun, error: BaseException) -> RunError:
        """The failure as a value: the author's line, and the message without secrets."""
        code = self.plan.nodes[run.number].code
        error.__traceback__ = traceback = _without_our_frames(error.__traceback__)
        where = line = source = None
        for frame, number in _frames(traceback):
            if frame in code.files:  # the innermost line that the author wrote
                where, line = self.work.place(frame) or _file_name(frame), number
                source = linecache.getline(frame, number).strip() or None
        message = self.work.redact(_message(error))
        return RunError(code.name, type(error).__name__, message, where, line, source, error, run.inputs)


async def _ended(tasks: Iterable[asyncio.Task[None]], seconds: float) -> asyncio.CancelledError | None:
    """Wait until tasks have ended, so many seconds at most; returns the cancellation that came meanwhile, if any."""
    again, until = None, time.monotonic() + seconds
    while (left := [t for t in tasks if not t.done()]) and time.monotonic() < until:
        try:
            await asyncio.wait(left, timeout=until - time.monotonic())
        except asyncio.CancelledError as error:
            again = error
    return again


class _NodeRun:
    """One node of one run, through all its attempts."""

    __slots__ = ("attempt", "execution", "fallback", "inputs", "node", "note", "number", "waited")

    def __init__(self, execution: _Execution, number: int) -> None:
        self.execution = execution
        self.number = number
        self.node: Node = execution.plan.nodes[number]
        self.attempt = 1
        self.waited = 0.0
        self.inputs: dict[str, Any] = {}
        self.fallback: RunError | None = None
        self.note: str | None = None

    def add_wait(self, seconds: float) -> None:
        self.waited += seconds

    def gather(self) -> tuple[dict[str, Any], list[str]]:
        """The values of its inputs and parameters, and which parameters are resources."""
        execution, keywords, resources = self.execution, {}, []
        for wire in self.node.wires:
            if wire.source == "node":
                value = execution.values[execution.plan.number[wire.name]]
                keywords[wire.parameter] = value if wire.output is None else _output(value, wire.name, wire.output)
            elif wire.source == "resource":
                resources.append(wire.parameter)
            elif wire.name in execution.work.parameters:
                keywords[wire.parameter] = execution.work.parameters[wire.name]
        self.inputs = dict(keywords)
        return keywords, resources

    async def retry(self, error: Exception, delay: float) -> None:
        """Record that the attempt failed and another follows after a delay."""
        failure = self.execution.describe(self, error)
        self.attempt += 1
        note = f"attempt {self.attempt - 1} failed ({failure.type}: {failure.message:.200}); next in {delay:g} s"
        await self.execution._record(
            EventKind.NODE_RETRY, self.number, error=failure, attempt=self.attempt, waited=self.waited, note=note
        )
        await asyncio.sleep(delay)


# ------------------------------------------------------------------------------------------------ attempts and policies

_Call = Callable[[_NodeRun], Awaitable[Any]]


async def _attempt(run: _NodeRun) -> Any:
    """Call the author's function once, with its inputs; the resources it used go back when it ends."""
    code, work = run.node.code, run.execution.work
    keywords, resources = run.gather()
    at_hand = code.at_hand
    if not resources and "get_resource" not in at_hand:
        value = await _call(run, {**keywords, **_at_hand(run, at_hand)})
    else:
        async with _Resources(run, work.lease) as live:
            for parameter in resources:
                keywords[parameter] = await live.get(parameter)
            given = _at_hand(run, at_hand)
            if "get_resource" in at_hand:
                given["get_resource"] = live.get
            value = await _call(run, {**keywords, **given})
    if value is MISSING:
        raise WorkflowError(f"node {code.name!r} ended without setting `result`; set it on every path")
    if type(value) is CoroutineType:
        value.close()
        raise WorkflowError(f"node {code.name!r} returned a call that nobody awaited: add `await` in front of it")
    return value


def _at_hand(run: _NodeRun, names: Iterable[str]) -> dict[str, Any]:
    work = run.execution.work
    found: dict[str, Any] = {}
    if "parameters" in names:
        found["parameters"] = dict(work.parameters)
    if "context" in names:
        found["context"] = dict(work.context)
    if "idempotency_key" in names:
        found["idempotency_key"] = f"{work.key}:{run.node.name}"
    return found


async def _call(run: _NodeRun, keywords: dict[str, Any]) -> Any:
    function = run.node.code.function
    if run.node.code.is_async:
        return await function(**keywords)
    return await _in_thread(run, functools.partial(function, **keywords))


async def _in_thread(run: _NodeRun, call: Callable[[], Any]) -> Any:
    """Run a plain function in a daemon thread of its own.

    Not in a pool: an abandoned function would keep a pool's thread, and the interpreter's exit would wait for it.
    """
    loop = asyncio.get_running_loop()
    future: asyncio.Future[Any] = loop.create_future()
    context = contextvars.copy_context()

    def settle(value: Any, error: BaseException | None) -> None:
        if not future.done():
            future.set_exception(error) if error is not None else future.set_result(value)

    def work() -> None:
        value: Any = None
        error: BaseException | None = None
        try:
            value = context.run(call)
        except StopIteration as stop:  # a future refuses it
            error = RuntimeError(f"node raised StopIteration: {stop}")
        except BaseException as raised:
            error = raised
        with contextlib.suppress(RuntimeError):  # the loop has ended, and nobody waits for this any more
            loop.call_soon_threadsafe(settle, value, error)

    threading.Thread(target=work, name=f"node:{run.node.name}", daemon=True).start()
    try:
        return await future
    except asyncio.CancelledError:
        if not future.done() or future.cancelled():
            run.note = "its thread could not be stopped; it was abandoned and its result is dropped"
        raise


def _with_policies(policies: Iterable[Policy]) -> _Call:
    """The call of a node wrapped in its policies, the outermost first in ``policies``."""
    call: _Call = _attempt
    for policy in reversed(tuple(policies)):
        call = _WRAPPERS[type(policy)](policy, call)
    return call


def _with_timeout(policy: Timeout, call: _Call) -> _Call:
    async def limited(run: _NodeRun) -> Any:
        began = time.monotonic()
        try:
            async with asyncio.timeout(policy.seconds) as limit:
                value = await call(run)
        except TimeoutError:
            if not limit.expired():
                raise  # the node's own
            raise NodeTimeoutError(f"took longer than its timeout of {policy.seconds:g} s") from None
        if (took := time.monotonic() - began) > policy.seconds:
            # It never awaited, so nothing could end it: its value comes too late all the same.
            raise NodeTimeoutError(
                f"took {took:.1f} s, its timeout is {policy.seconds:g} s, and nothing could end it in between because "
                "it never awaited; make it a plain `def`, which runs in a thread"
            )
        return value

    return limited


def _with_retries(policy: RetryPolicy, call: _Call) -> _Call:
    async def retried(run: _NodeRun) -> Any:
        while True:
            try:
                return await call(run)
            except Exception as error:
                if run.attempt >= policy.max_attempts or not policy.retries(error):
                    raise
                failed = error
            await run.retry(failed, policy.delay(run.attempt))

    return retried


def _with_fallback(policy: ErrorHandler, call: _Call) -> _Call:
    async def guarded(run: _NodeRun) -> Any:
        try:
            return await call(run)
        except Exception as error:
            run.fallback = run.execution.describe(run, error)
            return policy.value()

    return guarded


_WRAPPERS: dict[type[Policy], Callable[[Any, _Call], _Call]] = {
    Timeout: _with_timeout,
    RetryPolicy: _with_retries,
    ErrorHandler: _with_fallback,
}


class _Resources:
    """The live resources of one attempt of a node: each opened once, all given back together."""

    def __init__(self, run: _NodeRun, lease: Lease) -> None:
        self._run = run
        self._lease = lease
        self._stack = AsyncExitStack()
        self._live: dict[str, Any] = {}
        self._opening = asyncio.Lock()
        self._ended = False

    async def __aenter__(self) -> Self:
        await self._stack.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool | None:
        self._ended = True
        async with self._opening:  # what a task of the node is opening right now goes back, too
            return await self._stack.__aexit__(kind, error, traceback)

    async def get(self, name: str) -> Any:
        """The live resource of this name, for as long as the node runs: the author's ``get_resource(name)``."""
        if name in self._live:
            return self._live[name]
        allowed = self._run.node.resources
        if name not in allowed:
            raise ResourceError(
                f"node {self._run.node.name!r} has not declared resource {name!r}{did_you_mean(str(name), allowed)} "
                f"(declared: {listed(allowed)}); name it in required_resources"
            )
        async with self._opening:
            if self._ended:
                raise ResourceError(f"node {self._run.node.name!r} has ended; a task it left behind gets no resource")
            if name not in self._live:
                self._live[name] = await self._stack.enter_async_context(self._lease(name, self._run.add_wait))
        return self._live[name]


def _output(value: Any, node: str, output: str) -> Any:
    outputs = outputs_of(value)
    if output in outputs:
        return outputs[output]
    if output == "result":
        return value
    raise WorkflowError(
        f"node {node!r} returned no output {output!r}{did_you_mean(output, map(str, outputs))} "
        f"(it returned: {listed(map(str, outputs))})"
    )


# ----------------------------------------------------------------------------------------------------------- tracebacks


def _without_our_frames(traceback: TracebackType | None) -> TracebackType | None:
    """The traceback from the first frame that is not the executor's."""
    inner = traceback
    while inner is not None and inner.tb_frame.f_code.co_filename in (__file__, functools.__file__):
        inner = inner.tb_next
    return inner if inner is not None else traceback


def _message(error: BaseException) -> str:
    try:
        text = str(error)
    except Exception as failure:
        return f"(its message cannot be shown: {type(failure).__name__})"
    return " ".join(text.split()) if "\n" in text else text


def _frames(traceback: TracebackType | None) -> list[tuple[str, int]]:
    found = []
    while traceback is not None:
        found.append((traceback.tb_frame.f_code.co_filename, traceback.tb_lineno))
        traceback = traceback.tb_next
    return found


def _file_name(filename: str) -> str:
    if filename.startswith("<"):
        return "its code"
    return filename.replace("\\", "/").rsplit("/", 1)[-1]
