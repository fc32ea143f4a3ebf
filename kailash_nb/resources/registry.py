"""Which resources there are, and the way to the live ones.

A live pool belongs to the event loop that opened it, and the registry is used from several loops at once: the kernel's
and the background server's. So it keeps one :class:`LoopPools` per loop, and no asyncio object that two of them share.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import gc
import threading
import time
import warnings
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from ..exceptions import ResourceConfigError, ResourceError, ResourceNotFoundError
from ..references import NAME, ResourceReference, canonical
from .base import Credentials, Resource, ResourceType, Use, Waited
from .pools import CLOSE_DEADLINE, Check, Key, Limits, LoopPools, Pool, Status, merged, told

_GROUP = "kailash_nb.resources"
_SEVERITY: Mapping[Status, int] = {"idle": 0, "healthy": 0, "degraded": 1, "unhealthy": 2}
_OPEN_AND_CHECK_DEADLINE = 10.0
_REMEMBERED_FAILURES = 256


def _ignore(seconds: float) -> None:
    pass


@dataclass(frozen=True)
class CheckResult:
    """What one check of one resource found.

    Args:
        name: the name it was asked for by.
        type: its resource type.
        status: ``"healthy"``, ``"degraded"`` (alive, but every connection is busy) or ``"unhealthy"``.
        latency_ms: how long the ping took, where it was answered.
        version: the server's name and version, where it was answered.
        metrics: the pool's figures.
        error: what is wrong and what to do about it; holds no secret.
    """

    name: str
    type: str
    status: Status
    latency_ms: float | None = None
    version: str | None = None
    metrics: Mapping[str, float | int] = field(default_factory=dict)
    error: str | None = None


@dataclass(frozen=True)
class RegistryStatistics:
    """How much a registry holds: registered names, pools open and being opened, leases, event loops with pools."""

    names: int
    open: int
    opening: int
    leased: int
    loops: int


class ResourceRegistry:
    """The named resources of a gateway, and the pools that are open on them. Lives as long as its gateway.

    May be made anywhere: needs no event loop and does no I/O. Pools are opened by the first lease, on its loop.

    Args:
        idle_close: seconds without a lease after which a pool is closed.
        check_every: seconds between two pings of an open pool.
        max_open: how many pools one event loop may have open; the one idle for longest makes room for a new one.
        drain: seconds that closing waits for leases to end before it cuts them off.
        types: resource types beside the installed ones, by name.
    """

    def __init__(
        self,
        *,
        idle_close: float = 60.0,
        check_every: float = 15.0,
        max_open: int = 32,
        drain: float = 5.0,
        types: Mapping[str, ResourceType] | None = None,
    ) -> None:
        self._limits = Limits(idle_close, check_every, max_open, drain)
        self._lock = threading.Lock()
        self._types: dict[str, ResourceType] = dict(types or {})
        self._installed: dict[str, EntryPoint] | None = None
        self._names: dict[str, tuple[ResourceReference, str]] = {}
        self._loops: dict[asyncio.AbstractEventLoop, LoopPools] = {}
        self._failures: dict[str, tuple[float, Check]] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def __repr__(self) -> str:
        s = self.statistics()
        return f"<ResourceRegistry {s.names} names, {s.open} open, {s.opening} opening, {s.leased} leased>"

    # Names and types

    def register(self, name: str, resource: ResourceReference | Mapping[str, Any] | str) -> ResourceReference:
        """Give a resource a name; ``"@name"`` then refers to it. Returns the reference with its whole config.

        Raises ResourceConfigError or ResourceNotFoundError (no such type). A name given anew refers to the new resource
        from then on; what is in use under the old one goes on.
        """
        if not isinstance(name, str) or not NAME.fullmatch(name):
            raise ResourceConfigError("resource", [f"{name!r:.80} is no name: letters, digits, '_', '.' and '-'"])
        reference = self.resolve(resource)
        identity = self.identity(reference)
        with self._lock:
            self._names[name] = reference, identity
        return reference

    def unregister(self, name: str) -> bool:
        """Forget a name; False where there was none. What is in use under it goes on."""
        with self._lock:
            return self._names.pop(name, None) is not None

    def names(self) -> list[str]:
        """The registered names, sorted."""
        with self._lock:
            return sorted(self._names)

    def reference(self, name: str) -> ResourceReference:
        """What a name refers to; raises ResourceNotFoundError."""
        known = self._names.get(name)
        if known is None:
            remedy = f"; register it: `gateway.register_resource({name!r}, ResourceReference(...))`"
            raise ResourceNotFoundError(name, self.names(), remedy=remedy)
        return known[0]

    def resolve(self, resource: ResourceReference | Mapping[str, Any] | str) -> ResourceReference:
        """The reference with its whole config, of a reference, its JSON, a registered name or ``"@name"``.

        Raises ResourceNotFoundError (no such name or type) or ResourceConfigError. Opens nothing.
        """
        if isinstance(resource, str):
            return self.reference(resource.removeprefix("@"))
        reference = resource if isinstance(resource, ResourceReference) else ResourceReference.from_dict(resource)
        config = self.type(reference.type).normalise(reference.config)
        return ResourceReference(reference.type, config, reference.credentials_ref)

    def identity(self, reference: ResourceReference) -> str:
        """What makes two references the same resource: a digest of type, whole config and credential name."""
        config = self.type(reference.type).normalise(reference.config)
        return canonical(reference.type, config, reference.credentials_ref)

    def use(self, reference: ResourceReference) -> Use | None:
        """What the reference's credentials would be sent to; None where it needs none."""
        kind = self.type(reference.type)
        return kind.use(kind.normalise(reference.config))

    def types(self) -> list[str]:
        """The names of the known resource types, sorted."""
        return sorted({*self._types, *self._entry_points()})

    def type(self, name: str) -> ResourceType:
        """The resource type of this name; raises ResourceNotFoundError, or ResourceError where it cannot be loaded."""
        kind = self._types.get(name)
        return kind if kind is not None else self._load(name)

    def _entry_points(self) -> dict[str, EntryPoint]:
        if self._installed is None:
            found = entry_points(group=_GROUP)
            # No package may put itself in the place of a built-in type, which gets the credentials meant for that.
            own = [entry for entry in found if entry.value.startswith("kailash_nb.")]
            self._installed = {entry.name: entry for entry in [*found, *own]}
        return self._installed

    def _load(self, name: str) -> ResourceType:
        entry = self._entry_points().get(name)
        if entry is None:
            raise ResourceNotFoundError(name, self.types(), kind="resource type")
        try:
            kind: ResourceType = entry.load()()
        except Exception as error:
            problem = f"resource type {name!r} ({entry.value}) cannot be loaded: {type(error).__name__}: {error}"
            raise ResourceError(problem) from error
        with self._lock:
            return self._types.setdefault(name, kind)

    # Leases

    @asynccontextmanager
    async def lease(
        self, reference: ResourceReference, credentials: Credentials | None = None, waited: Waited = _ignore
    ) -> AsyncIterator[Any]:
        """The live resource, for as long as the context lasts.

        Args:
            reference: what to open, or to share where it is open on this loop.
            credentials: its login. Another version of the same credential is another pool; the old one is closed when
                its leases have ended.
            waited: told the seconds that passed until the resource was open, and those spent waiting for connections.

        Raises ResourceError. Concurrent first leases share one opening, and its error; the next lease tries again.
        """
        pool = self._claim(reference, credentials)
        try:
            resource = pool.resource or await pool.opened(waited)
            async with resource.lease(waited) as live:
                yield live
        finally:
            pool.release()

    def _claim(self, reference: ResourceReference, credentials: Credentials | None) -> Pool:
        kind = self.type(reference.type)
        config = kind.normalise(reference.config)
        identity = canonical(reference.type, config, reference.credentials_ref)

        def label() -> str:
            use = kind.use(config)
            return f"{reference.type} {use.endpoint if use else identity[:6]}"

        async def open_() -> Resource:
            try:
                resource = await kind.open(config, credentials)
            except Exception as error:
                self._note_failure(identity, error)
                raise
            self._failures.pop(identity, None)
            return resource

        return self._here().claim(Key(identity, credentials.version if credentials else 0), label, open_)

    def _note_failure(self, identity: str, error: Exception) -> None:
        self._failures.pop(identity, None)
        self._failures[identity] = time.monotonic(), Check("unhealthy", error=told(error))
        for oldest in list(self._failures)[:-_REMEMBERED_FAILURES]:
            self._failures.pop(oldest, None)

    def _here(self) -> LoopPools:
        running = asyncio.get_running_loop()
        pools = self._loops.get(running)
        if pools is None:
            self._drop_closed_loops()
            pools = LoopPools(running, self._limits, self._lock, self._forget)
            with self._lock:
                self._loops[running] = pools
        return pools

    def _forget(self, pools: LoopPools) -> None:
        with self._lock:
            if self._loops.get(pools.loop) is pools:
                del self._loops[pools.loop]

    # Closing

    async def close(self, names: Iterable[str] | None = None) -> None:
        """Close the pools of all loops, or those of some registered names only.

        Waits for leases to end, but not for long. What is closed opens again when it is leased again.
        """
        identities = None if names is None else {self.identity(self.reference(name)) for name in names}
        here = self._loops.get(asyncio.get_running_loop())
        elsewhere = [self._ask_to_close(pools, identities) for pools in self._all_loops() if pools is not here]
        if here:
            await here.close(identities)
        if elsewhere:
            # A loop that does not answer is busy or has ended; what it has open ends with it.
            deadline = self._limits.drain + CLOSE_DEADLINE
            _, silent = await asyncio.wait([asyncio.wrap_future(future) for future in elsewhere], timeout=deadline)
            for future in silent:
                future.cancel()

    async def close_loop(self) -> None:
        """Close the pools of the running loop; for a loop that is about to end."""
        here = self._loops.get(asyncio.get_running_loop())
        if here:
            await here.close()

    def retire(self) -> None:
        """Have the pools of all loops closed soon; returns at once and may be called anywhere."""
        for pools in self._all_loops():
            self._ask_to_close(pools, None)

    def _ask_to_close(self, pools: LoopPools, identities: set[str] | None) -> concurrent.futures.Future[None]:
        """Have another loop close its pools; the future is done when it has, or when it does not run."""
        done: concurrent.futures.Future[None] = concurrent.futures.Future()

        def closed(task: asyncio.Task[None] | None = None) -> None:
            if not done.done():
                done.set_result(None)

        def close() -> None:
            task = pools.loop.create_task(pools.close(identities))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
            task.add_done_callback(closed)

        with suppress(RuntimeError):  # it may have been closed meanwhile
            pools.loop.call_soon_threadsafe(close)
        if not pools.loop.is_running():
            closed()
        return done

    def _all_loops(self) -> list[LoopPools]:
        self._drop_closed_loops()
        with self._lock:
            return list(self._loops.values())

    def _drop_closed_loops(self) -> None:
        with self._lock:
            dropped = [self._loops.pop(loop) for loop in list(self._loops) if loop.is_closed()]
        if dropped:
            # Their sockets cannot be closed in order any more: a closed loop runs no farewell.
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ResourceWarning)
                dropped.clear()
                gc.collect()

    # What there is to see

    def statistics(self) -> RegistryStatistics:
        """How much is registered, open, being opened and leased, over all loops."""
        with self._lock:
            pools = [pool for loop in self._loops.values() for pool in loop.table.values()]
            loops = sum(bool(loop.table) for loop in self._loops.values())
        is_open = [pool.resource is not None for pool in pools]
        leased = sum(pool.leases for pool in pools)
        return RegistryStatistics(len(self._names), is_open.count(True), is_open.count(False), leased, loops)

    def health(self) -> dict[str, Any]:
        """How the resources are, by the last background checks; reads no network and may be called anywhere.

        Returns ``{"resources": {name: {"status", "last_check", "metrics", ...}}, "overall_status"}``. A status is
        ``"healthy"``, ``"degraded"`` (every connection busy), ``"unhealthy"`` (then with an ``"error"``) or ``"idle"``
        (registered, not open). ``last_check`` is a UTC time, None before the first check. Figures of several loops are
        added up, and ``"loops"`` then names them. What is open without a name goes by its type and address.
        """
        with self._lock:
            names = {name: identity for name, (_, identity) in self._names.items()}
            opened = [(loop.thread, pool) for loop in self._loops.values() for pool in loop.table.values()]
        groups: dict[str, list[tuple[str, Pool]]] = {}
        for thread, pool in opened:
            if pool.resource:
                groups.setdefault(pool.key.identity, []).append((thread, pool))
        named = set(names.values())
        for identity, group in groups.items():
            if identity not in named:
                label = group[0][1].label
                names[f"{label} {identity[:6]}" if label in names else label] = identity
        resources = {name: self._entry(identity, groups.get(identity, [])) for name, identity in names.items()}
        worst = max((_SEVERITY[entry["status"]] for entry in resources.values()), default=0)
        return {"resources": resources, "overall_status": ("healthy", "degraded", "unhealthy")[worst]}

    def _entry(self, identity: str, group: list[tuple[str, Pool]]) -> dict[str, Any]:
        """One resource of the health report: its pools, or its last failure to open."""
        seen = [pool.seen() for _, pool in group]
        failed_at, failure = self._failures.get(identity, (0.0, None))
        if not group and failure and time.monotonic() - failed_at < self._limits.idle_close:
            seen = [(failure, {})]
        checks = [check for check, _ in seen] or [Check("idle", at=None)]
        worst = max(checks, key=lambda check: _SEVERITY[check.status])
        entry: dict[str, Any] = {
            "status": worst.status,
            "last_check": max((check.at for check in checks if check.at), default=None),
            "metrics": merged(figures for _, figures in seen),
        }
        if worst.error:
            entry["error"] = worst.error
        if len(group) > 1:
            entry["loops"] = sorted(thread for thread, _ in group)
        return entry

    async def check(
        self, resource: ResourceReference | Mapping[str, Any] | str, credentials: Credentials | None = None
    ) -> CheckResult:
        """Open a resource on the running loop, where it is not, and ping it.

        Raises only for what is no resource (ResourceNotFoundError, ResourceConfigError); a server that does not
        answer, or refuses the login, is a result.
        """
        reference = self.resolve(resource)
        name = resource.removeprefix("@") if isinstance(resource, str) else reference.type
        pool: Pool | None = None
        try:
            async with asyncio.timeout(_OPEN_AND_CHECK_DEADLINE):
                pool = self._claim(reference, credentials)
                await pool.opened(_ignore)
                found = await pool.check(self._limits.check_every)
        except TimeoutError:
            found = Check("unhealthy", error=f"{name}: not open within {_OPEN_AND_CHECK_DEADLINE:g} s")
        except Exception as error:
            found = Check("unhealthy", error=told(error))
        finally:
            if pool:
                pool.release()
        figures = pool.seen()[1] if pool else {}
        return CheckResult(name, reference.type, found.status, found.latency_ms, found.version, figures, found.error)
