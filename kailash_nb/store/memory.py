"""Runs in this process's memory: the newest ones, gone with the process."""

from __future__ import annotations

import threading
from collections import OrderedDict

from .. import values
from ..exceptions import FencedError, RunNotFoundError, StoreError
from ..runs import Event, EventKind, RunRecord, RunStart, RunStatus
from .base import RunLease

_RECORDED = frozenset({EventKind.NODE_COMPLETED, EventKind.NODE_REUSED, EventKind.NODE_FALLBACK})


class MemoryStore:
    """Keeps the newest finished runs, and every unfinished one; values are kept by reference, not copied.

    Args:
        max_runs: how many finished runs it keeps.
        max_bytes: about how much memory their values may hold; the newest run is kept whatever its size.

    Lives as long as its gateway; may be used from several threads and event loops at once.
    """

    def __init__(self, max_runs: int = 1000, max_bytes: int = 256 * 2**20) -> None:
        self.max_runs = max_runs
        self.max_bytes = max_bytes
        self._runs: OrderedDict[str, _Entry] = OrderedDict()
        self._finished: OrderedDict[str, None] = OrderedDict()  # in the order they ended, the oldest first
        self._bytes = 0
        # Held for microseconds and never across an await, so it may be shared by event loops.
        self._lock = threading.Lock()

    async def start(self, start: RunStart, owner: str) -> RunLease:
        """See :meth:`RunStore.start`."""
        with self._lock:
            if start.id in self._runs:
                raise StoreError(f"there is already a run {start.id!r}")
            self._runs[start.id] = _Entry(start)
            return RunLease(start.id, 1, owner)

    async def append(self, lease: RunLease, event: Event) -> None:
        """See :meth:`RunStore.append`."""
        with self._lock:
            entry = self._entry(lease.run_id)
            if entry.epoch != lease.epoch or entry.status is not RunStatus.RUNNING:
                raise FencedError(f"run {lease.run_id!r} is no longer {lease.owner!r}'s: {entry.state()}")
            if event.kind in _RECORDED:
                if event.node in entry.recorded:
                    raise StoreError(f"run {lease.run_id!r} already holds a value of node {event.node!r}")
                entry.recorded.add(event.node)
                size = values.size_of(event.value)
                entry.bytes += size
                self._bytes += size
            entry.events.append(event)
            if event.kind is EventKind.RUN_FINISHED and event.status is not None:
                entry.status = event.status
                self._finished[lease.run_id] = None
                self._trim()

    async def claim(self, run_id: str, owner: str) -> RunLease:
        """See :meth:`RunStore.claim`."""
        with self._lock:
            entry = self._entry(run_id)
            if entry.status is not RunStatus.RUNNING:
                raise FencedError(f"run {run_id!r} is finished: {entry.status}")
            entry.epoch += 1
            return RunLease(run_id, entry.epoch, owner)

    async def load(self, run_id: str) -> RunRecord:
        """See :meth:`RunStore.load`."""
        with self._lock:
            return self._entry(run_id).record()

    async def list(
        self, workflow: str | None = None, status: RunStatus | None = None, limit: int = 100
    ) -> list[RunRecord]:
        """See :meth:`RunStore.list`."""
        found: list[RunRecord] = []
        with self._lock:
            for entry in reversed(self._runs.values()):
                if len(found) >= limit:
                    break
                if workflow in (None, entry.start.workflow) and status in (None, entry.status):
                    found.append(entry.record())
        return found

    async def close(self) -> None:
        """See :meth:`RunStore.close`; the runs stay readable."""

    def _entry(self, run_id: str) -> _Entry:
        try:
            return self._runs[run_id]
        except KeyError:
            raise RunNotFoundError(run_id) from None

    def _trim(self) -> None:
        while len(self._finished) > 1 and (len(self._finished) > self.max_runs or self._bytes > self.max_bytes):
            run_id, _ = self._finished.popitem(last=False)
            self._bytes -= self._runs.pop(run_id).bytes

    def __repr__(self) -> str:
        return f"<MemoryStore {len(self._runs)} runs, {self._bytes / 2**20:.1f} MB>"


class _Entry:
    __slots__ = ("bytes", "epoch", "events", "recorded", "start", "status")

    def __init__(self, start: RunStart) -> None:
        self.start = start
        self.epoch = 1
        self.events: list[Event] = []
        self.recorded: set[str | None] = set()
        self.status = RunStatus.RUNNING
        self.bytes = 0

    def record(self) -> RunRecord:
        return RunRecord(self.start, tuple(self.events))

    def state(self) -> str:
        return f"epoch {self.epoch}" if self.status is RunStatus.RUNNING else str(self.status)
