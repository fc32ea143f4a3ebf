from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest

from kailash_nb.exceptions import PoolExhaustedError, ResourceUnavailableError
from kailash_nb.resources.base import Waited
from kailash_nb.resources.pools import Key, Limits, LoopPools, Pool, merged, told


class Connections:
    """A resource that keeps count of itself; its server answers, or does what it is told."""

    def __init__(self) -> None:
        self.pings = self.closed = 0
        self.error: Exception | None = None
        self.close_takes = 0.0

    @asynccontextmanager
    async def lease(self, waited: Waited) -> AsyncIterator[Connections]:
        yield self

    async def ping(self) -> str:
        self.pings += 1
        if self.error:
            raise self.error
        return "Server 1.0"

    def statistics(self) -> dict[str, float | int]:
        return {"pool_size": 2, "active_connections": 1}

    async def close(self) -> None:
        await asyncio.sleep(self.close_takes)
        self.closed += 1


class Loop:
    """The pools of the running loop, on a resource that is opened at once."""

    def __init__(self, **limits: float) -> None:
        whole = {"idle_close": 60, "check_every": 15, "max_open": 32, "drain": 5} | limits
        self.emptied = 0
        self.resource = Connections()
        self.pools = LoopPools(asyncio.get_running_loop(), Limits(**whole), threading.Lock(), self.empty)  # type: ignore[arg-type]

    def empty(self, pools: LoopPools) -> None:
        self.emptied += 1

    async def open(self) -> Connections:
        return self.resource

    async def leased(self, identity: str = "a", version: int = 1) -> Pool:
        pool = self.pools.claim(Key(identity, version), lambda: f"server {identity}", self.open)
        await pool.opened(lambda seconds: None)
        return pool


def keepers() -> list[asyncio.Task[object]]:
    return [task for task in asyncio.all_tasks() if task.get_name() == "kailash_nb resource keeper"]


async def eventually(condition: Callable[[], object]) -> None:
    until = time.monotonic() + 15
    while not condition():
        assert time.monotonic() < until, "it did not come about"
        await asyncio.sleep(0.01)


async def test_an_open_pool_is_checked_at_once_and_then_at_intervals() -> None:
    loop = Loop(check_every=0.1)
    pool = await loop.leased()
    await eventually(lambda: loop.resource.pings >= 3)
    check, figures = pool.seen()
    assert (check.status, check.version, check.error) == ("healthy", "Server 1.0", None)
    assert figures.keys() == {"pool_size", "active_connections", "avg_response_time_ms"}
    pool.release()
    await loop.pools.close()


async def test_an_exhausted_pool_is_degraded_and_an_unknown_error_shows_only_its_name() -> None:
    loop = Loop()
    pool = await loop.leased()
    loop.resource.error = PoolExhaustedError("all busy")
    assert (await pool.check(15)).status == "degraded"
    loop.resource.error = ValueError("canary")
    found = await pool.check(15)
    assert (found.status, found.error, found.latency_ms) == ("unhealthy", "ValueError", None)
    pool.release()
    await loop.pools.close()


async def test_the_keeper_ends_with_the_last_pool() -> None:
    loop = Loop(idle_close=0.1)
    pool = await loop.leased()
    await asyncio.sleep(0.3)
    assert (len(keepers()), loop.resource.closed) == (1, 0)
    pool.release()
    await eventually(lambda: not keepers())
    assert (loop.resource.closed, loop.emptied) == (1, 1)


async def test_a_cancelled_keeper_closes_the_pools_and_the_next_lease_begins_anew() -> None:
    loop = Loop()
    pool = await loop.leased()
    keepers()[0].cancel()
    await eventually(lambda: not keepers())
    assert (loop.resource.closed, loop.pools.table) == (1, {})
    pool.release()
    again = await loop.leased()
    assert again is not pool
    again.release()
    await loop.pools.close()
    assert loop.resource.closed == 2


async def test_a_closing_that_is_cancelled_closes_all_the_same() -> None:
    loop = Loop(idle_close=0.05)
    loop.resource.close_takes = 0.1
    (await loop.leased()).release()
    await eventually(lambda: not loop.pools.table)
    others = asyncio.all_tasks() - {asyncio.current_task(), *keepers()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)
    await eventually(lambda: not keepers())
    assert loop.resource.closed >= 1


async def test_a_closing_that_is_cancelled_before_it_begins_is_begun_again() -> None:
    loop = Loop(drain=0)
    (await loop.leased()).release()
    before = asyncio.all_tasks()
    closing = asyncio.create_task(loop.pools.close())
    await asyncio.sleep(0)
    for task in asyncio.all_tasks() - before - {closing}:
        task.cancel()
    await closing
    await eventually(lambda: not keepers())
    assert loop.resource.closed == 1


async def test_closing_waits_for_leases_but_not_for_long() -> None:
    loop = Loop(drain=0.3)
    pool = await loop.leased()
    asyncio.get_running_loop().call_later(0.1, pool.release)
    started = time.monotonic()
    await loop.pools.close()
    assert 0.05 < time.monotonic() - started < 0.28
    pool = await loop.leased()
    started = time.monotonic()
    await loop.pools.close()
    assert 0.25 < time.monotonic() - started < 3
    assert loop.resource.closed == 2
    pool.release()


async def test_a_failed_opening_leaves_nothing_behind() -> None:
    async def refuse() -> Connections:
        raise ResourceUnavailableError("refused", outcome="not sent")

    loop = Loop()
    pool = loop.pools.claim(Key("a", 1), lambda: "server a", refuse)
    with pytest.raises(ResourceUnavailableError, match="refused"):
        await pool.opened(lambda seconds: None)
    pool.release()
    assert loop.pools.table == {}
    assert (await loop.leased()).resource is loop.resource
    loop.pools.table[Key("a", 1)].release()
    await loop.pools.close()


async def test_pools_of_some_identities_are_closed_alone() -> None:
    loop = Loop()
    for identity in "abc":
        (await loop.leased(identity)).release()
    await loop.pools.close({"a", "c", "x"})
    assert [key.identity for key in loop.pools.table] == ["b"]
    await loop.pools.close()


def test_counts_of_several_loops_are_added_up_and_levels_averaged() -> None:
    one = {"pool_size": 10, "active_connections": 1, "avg_response_time_ms": 1.0, "hit_rate": 0.5}
    two = {"pool_size": 10, "active_connections": 2, "avg_response_time_ms": 2.0}
    assert merged([one, two]) == {
        "pool_size": 20,
        "active_connections": 3,
        "avg_response_time_ms": 1.5,
        "hit_rate": 0.5,
    }
    assert merged([]) == {}


def test_only_our_own_errors_are_told_in_full() -> None:
    assert told(ResourceUnavailableError("cache x: refused", outcome="not sent")) == "cache x: refused"
    assert told(OSError("canary")) == "OSError"
