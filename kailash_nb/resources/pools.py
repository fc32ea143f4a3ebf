"""The open pools of one event loop: opened once, shared, checked, and closed when they are not needed.

Only the loop's own thread changes anything here; the lock is for whoever reads from another thread. While there are
open pools the loop has one task for them, the *keeper*: it pings them, closes the idle ones, and ends with the last of
them. ``asyncio.run`` cancels every task when it is over, so the keeper's cancellation is where the pools of a loop that
nobody closed are closed.

A pool that is to be closed leaves the table at once, so that the next lease opens a new one, and is closed by a task of
its own when its leases have ended, or after a short wait without them.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Literal

from ..exceptions import KailashError, PoolExhaustedError, ResourceUnavailableError
from .base import Average, Resource, Waited

logger = logging.getLogger(__name__)

Status = Literal["healthy", "degraded", "unhealthy", "idle"]

CHECK_DEADLINE = 5.0
CLOSE_DEADLINE = 5.0
_RECHECK = 2.0


@dataclass(frozen=True)
class Limits:
    """How long and how many: ``idle_close``, ``check_every`` and ``drain`` in seconds, ``max_open`` pools per loop."""

    idle_close: float
    check_every: float
    max_open: int
    drain: float


@dataclass(frozen=True)
class Key:
    """What makes a pool another one: the whole reference, and the version of its credential."""

    identity: str
    version: int


def now() -> str:
    """The time, for people and programs: ``"2024-01-01T10:00:00Z"``."""
    return datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


def told(error: Exception) -> str:
    """An error for the health report; of errors that are not ours, which may quote anything, only the name."""
    return str(error) if isinstance(error, KailashError) else type(error).__name__


@dataclass(frozen=True)
class Check:
    """What a check found, and when."""

    status: Status
    version: str | None = None
    latency_ms: float | None = None
    error: str | None = None
    at: str | None = field(default_factory=now)


class Pool:
    """One resource on one loop, from its first lease until it is closed."""

    opening: asyncio.Task[Resource]

    def __init__(self, key: Key, label: str) -> None:
        self.key, self.label = key, label
        self.resource: Resource | None = None
        self.leases = 0
        self.superseded = False
        self.next_check = 0.0
        self.idle_since = time.monotonic()
        self._last: Check | None = None
        self._average = Average()
        self._drained: asyncio.Future[None] | None = None

    async def opened(self, waited: Waited) -> Resource:
        """The resource, once it is open; raises what opening it raised, for all who wait alike."""
        started = time.perf_counter()
        # Waiting for the task, other than awaiting it, leaves it to the others when this one is cancelled.
        await asyncio.wait({self.opening})
        waited(time.perf_counter() - started)
        if self.opening.cancelled():
            raise ResourceUnavailableError(f"{self.label}: was closed while it was opened", outcome="not sent")
        return self.opening.result()

    def release(self) -> None:
        """One lease has ended."""
        self.leases -= 1
        if not self.leases:
            self.idle_since = time.monotonic()
            if self._drained and not self._drained.done():
                self._drained.set_result(None)

    def expired(self, idle_close: float) -> bool:
        """Whether it is open and nobody has needed it for long, or will need it any more."""
        if self.leases or not self.resource:
            return False
        return self.superseded or time.monotonic() - self.idle_since >= idle_close

    def seen(self) -> tuple[Check, dict[str, float | int]]:
        """The last check, in the light of the figures of this moment, and these. Called from any thread."""
        if self.resource is None:
            return Check("idle", at=None), {}
        figures = {**self._average.metric(), **self.resource.statistics()}
        check = self._last or Check("healthy", at=None)
        waiting, busy = figures.get("waiting", 0), figures.get("active_connections", 0)
        if check.status == "healthy" and waiting and busy >= figures.get("pool_size", 1):
            error = f"{self.label}: every connection is busy and {waiting} wait for one; raise its pool size"
            check = Check("degraded", at=check.at, error=error)
        return check, figures

    async def check(self, every: float) -> Check:
        """Ping the open resource; notes what came of it, and that the next check is due in ``every`` seconds."""
        assert self.resource
        started = time.perf_counter()
        version = error = None
        status: Status = "unhealthy"
        try:
            async with asyncio.timeout(CHECK_DEADLINE):
                version = await self.resource.ping()
        except TimeoutError:
            error = f"{self.label}: no answer within {CHECK_DEADLINE:g} s"
        except PoolExhaustedError as exhausted:
            status, error = "degraded", str(exhausted)
        except Exception as failed:
            error = told(failed)
        else:
            status = "healthy"
            self._average.add(time.perf_counter() - started)
        latency = None if version is None else round((time.perf_counter() - started) * 1000, 3)
        self.next_check = time.monotonic() + (every if status == "healthy" else min(every, _RECHECK))
        self._last = Check(status, version, latency, error)
        return self._last

    async def close(self, drain: float) -> None:
        """Close the resource when its leases have ended, or after ``drain`` seconds, or at once when cancelled."""
        cancelled: asyncio.CancelledError | None = None
        try:
            if not self.opening.done():
                self.opening.cancel()
                await asyncio.wait({self.opening}, timeout=CLOSE_DEADLINE)
            if self.leases and self.resource and drain:
                self._drained = asyncio.get_running_loop().create_future()
                await asyncio.wait({self._drained}, timeout=drain)
        except asyncio.CancelledError as error:
            cancelled = error
        try:
            await self._end()
        except asyncio.CancelledError as error:
            cancelled = error
            await self._end()
        if cancelled:
            raise cancelled

    async def _end(self) -> None:
        if self.resource is None:
            return
        try:
            async with asyncio.timeout(CLOSE_DEADLINE):
                await self.resource.close()
        except Exception as error:
            logger.warning("%s did not close in order: %s", self.label, told(error))


class LoopPools:
    """The pools of one event loop. Lives from the first lease on that loop until the last pool is closed.

    Args:
        loop: the loop that runs.
        limits: how long and how many.
        lock: held while the table changes.
        empty: called when the last pool is closed; the next lease begins anew.
    """

    def __init__(
        self, loop: asyncio.AbstractEventLoop, limits: Limits, lock: threading.Lock, empty: Callable[[LoopPools], None]
    ) -> None:
        self.loop = loop
        self.thread = threading.current_thread().name
        self.table: dict[Key, Pool] = {}
        self._limits, self._lock, self._empty = limits, lock, empty
        self._closing: dict[Pool, asyncio.Task[None]] = {}
        self._keeper: asyncio.Task[None] | None = None
        self._wake = asyncio.Event()

    def claim(self, key: Key, label: Callable[[], str], open: Callable[[], Awaitable[Resource]]) -> Pool:
        """The pool of ``key``, counted as leased, to be released; where there is none, ``open`` begins to open it.

        Raises PoolExhaustedError where too many pools are in use.
        """
        pool = self.table.get(key)
        if pool is None:
            self._make_room()
            pool = Pool(key, label())
            with self._lock:
                for other in self.table.values():
                    other.superseded = other.superseded or other.key.identity == key.identity
                self.table[key] = pool
            # The task stays, not the resource: concurrent first leases then wait for one opening.
            pool.opening = self.loop.create_task(self._open(pool, open))
            pool.opening.add_done_callback(_retrieve)
            self._keep()
        pool.leases += 1
        return pool

    async def close(self, identities: set[str] | None = None) -> None:
        """Close the pools of these identities, or all; waits for leases to end, but not for long."""
        pools = [pool for pool in self.table.values() if identities is None or pool.key.identity in identities]
        self._retire(pools, self._limits.drain)
        await self._all_closed()
        self._wake.set()
        if self._keeper and not self.table:
            await asyncio.wait({self._keeper}, timeout=1)

    async def _open(self, pool: Pool, open: Callable[[], Awaitable[Resource]]) -> Resource:
        try:
            pool.resource = await open()
        except BaseException:
            # Whoever asks next tries again.
            self._remove([pool])
            raise
        self._wake.set()
        return pool.resource

    def _make_room(self) -> None:
        if len(self.table) < self._limits.max_open:
            return
        idle = [pool for pool in self.table.values() if pool.resource and not pool.leases]
        if not idle:
            raise PoolExhaustedError(
                f"{len(self.table)} resources are in use at once, which is the limit; "
                "give ResourceRegistry a larger max_open"
            )
        self._retire([min(idle, key=lambda pool: pool.idle_since)], drain=0)

    def _keep(self) -> None:
        if self._keeper is None:
            self._keeper = self.loop.create_task(self._run_keeper(), name="kailash_nb resource keeper")
            # A loop that is dropped without a last round takes it along; there is nothing to tell about that.
            self._keeper._log_destroy_pending = False  # type: ignore[attr-defined]

    async def _run_keeper(self) -> None:
        try:
            while self.table or self._closing:
                if self.table:
                    await self._keep_once()
                else:
                    self._retire([pool for pool, task in self._closing.items() if task.cancelled()], drain=0)
                    await self._all_closed()
        except asyncio.CancelledError:
            # Closing begins again where it was cancelled too: a task cancelled before its first step does nothing.
            self._retire([*self.table.values(), *self._closing], drain=0)
            await self._all_closed()
            raise
        except Exception:
            logger.exception("resources are not checked any more on the loop of %s", self.thread)
        finally:
            self._keeper = None
            if not self.table:
                self._empty(self)

    async def _keep_once(self) -> None:
        """Close what is idle, ping what is due, and sleep until the next of these."""
        idle_close, every = self._limits.idle_close, self._limits.check_every
        self._retire([pool for pool in self.table.values() if pool.expired(idle_close)], drain=0)
        due = [pool for pool in self.table.values() if pool.resource and pool.next_check <= time.monotonic()]
        if due:
            await asyncio.gather(*(pool.check(every) for pool in due))
        checks = [pool.next_check - time.monotonic() for pool in self.table.values() if pool.resource]
        with suppress(TimeoutError):
            async with asyncio.timeout(max(0.0, min(every, idle_close, *checks))):
                await self._wake.wait()
        self._wake.clear()

    def _remove(self, pools: Iterable[Pool]) -> None:
        with self._lock:
            for pool in pools:
                if self.table.get(pool.key) is pool:
                    del self.table[pool.key]

    def _retire(self, pools: list[Pool], drain: float) -> None:
        """Take pools out of the table and have them closed."""
        self._remove(pools)
        for pool in pools:
            task = self._closing[pool] = self.loop.create_task(pool.close(drain))
            task.add_done_callback(lambda task, pool=pool: self._closed(pool, task))  # type: ignore[misc]

    def _closed(self, pool: Pool, task: asyncio.Task[None]) -> None:
        if self._closing.get(pool) is task and not task.cancelled():
            del self._closing[pool]

    async def _all_closed(self) -> None:
        if self._closing:
            await asyncio.wait(self._closing.values())


def merged(many: Iterable[Mapping[str, float | int]]) -> dict[str, float | int]:
    """Figures of one resource on several loops: counts are added up, levels are averaged."""
    gathered: dict[str, list[float | int]] = {}
    for figures in many:
        for name, value in figures.items():
            gathered.setdefault(name, []).append(value)
    return {
        name: sum(values) if all(isinstance(v, int) for v in values) else round(sum(values) / len(values), 4)
        for name, values in gathered.items()
    }


def _retrieve(task: asyncio.Task[Any]) -> None:
    # Nobody may be left to await it, and asyncio would log its error then.
    if not task.cancelled():
        task.exception()
