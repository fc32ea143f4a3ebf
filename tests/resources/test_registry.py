from __future__ import annotations

import asyncio
import gc
import signal
import sys
import threading
import time
import warnings
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from faulty_servers import HttpServer, Valkey, free_port, sends

from kailash_nb.exceptions import (
    PoolExhaustedError,
    ResourceConfigError,
    ResourceError,
    ResourceNotFoundError,
    ResourceUnavailableError,
)
from kailash_nb.references import ResourceReference
from kailash_nb.resources.base import Credentials, Use, Waited
from kailash_nb.resources.cache import Cache, CacheResource, CacheType
from kailash_nb.resources.registry import ResourceRegistry

PASSWORD = "canary-registry"


@pytest.fixture(scope="module")
def valkey(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Valkey]:
    server = Valkey(tmp_path_factory.mktemp("valkey"), PASSWORD)
    yield server
    server.kill()


@pytest.fixture
def own_valkey(tmp_path: Path) -> Iterator[Valkey]:
    server = Valkey(tmp_path / "own", PASSWORD)
    yield server
    server.signal(signal.SIGCONT)
    server.kill()


class CountingType(CacheType):
    """The cache, counting its openings and closings; opening takes a moment and may be told to fail."""

    def __init__(self, delay: float = 0.05) -> None:
        self.delay = delay
        self.opened = self.closed = 0
        self.fail: Exception | None = None

    async def open(self, config: Mapping[str, Any], credentials: Credentials | None) -> CacheResource:
        await asyncio.sleep(self.delay)
        if self.fail:
            raise self.fail
        self.opened += 1
        resource = await super().open(config, credentials)
        close = resource.close

        async def closing() -> None:
            self.closed += 1
            await close()

        resource.close = closing  # type: ignore[method-assign]
        return resource


async def reveal() -> Mapping[str, Any]:
    return {"password": PASSWORD}


LOGIN = Credentials("cache_creds", 1, reveal)


def reference(server: Valkey, **config: Any) -> ResourceReference:
    return ResourceReference("cache", {"host": "127.0.0.1", "port": server.port, **config}, "cache_creds")


@asynccontextmanager
async def registry_with(**options: Any) -> AsyncIterator[ResourceRegistry]:
    registry = ResourceRegistry(**options)
    try:
        yield registry
    finally:
        await registry.close()
        assert not [t for t in asyncio.all_tasks() if t.get_name() == "kailash_nb resource keeper"]


async def eventually(condition: Callable[[], object], seconds: float = 15) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it did not come about"
        await asyncio.sleep(0.02)


def in_thread(main: Callable[[], Any]) -> Any:
    """Run a coroutine function on a loop of its own in a thread of its own; returns what it returns."""
    result: list[Any] = []
    thread = threading.Thread(target=lambda: result.append(asyncio.run(main())), name="the other loop")
    thread.start()
    thread.join(30)
    return result[0]


# Names and types


def test_a_registry_is_made_without_a_loop_and_knows_the_built_in_types() -> None:
    registry = ResourceRegistry()
    assert {"cache", "database", "http_client"} <= set(registry.types())
    assert isinstance(registry.type("cache"), CacheType)
    assert registry.type("cache") is registry.type("cache")
    assert repr(registry) == "<ResourceRegistry 0 names, 0 open, 0 opening, 0 leased>"


def test_an_unknown_type_names_the_known_ones() -> None:
    with pytest.raises(
        ResourceNotFoundError, match=r"no resource type 'cach'; did you mean 'cache'\? \(known: cache, "
    ):
        ResourceRegistry().resolve(ResourceReference("cach", {}))


def test_a_config_is_checked_when_it_is_registered() -> None:
    with pytest.raises(ResourceConfigError, match="did you mean 'host'"):
        ResourceRegistry().register("c", {"type": "cache", "config": {"hots": "x"}})
    with pytest.raises(ResourceConfigError, match="is no name"):
        ResourceRegistry().register("../c", ResourceReference("cache", {"host": "x"}))


def test_names_are_given_looked_up_replaced_and_forgotten() -> None:
    registry = ResourceRegistry()
    first = registry.register("orders", {"type": "cache", "config": {"host": "a"}})
    assert first.config["port"] == 6379
    assert registry.register("alias", "@orders") == first
    assert registry.names() == ["alias", "orders"]
    second = registry.register("orders", ResourceReference("cache", {"host": "b"}))
    assert registry.resolve("@orders") == registry.resolve("orders") == registry.reference("orders") == second
    assert registry.reference("alias") == first
    assert registry.unregister("orders") is True
    assert registry.unregister("orders") is False
    with pytest.raises(
        ResourceNotFoundError, match=r"no resource 'order' \(known: alias\).*register_resource\('order'"
    ):
        registry.resolve("@order")


def test_two_spellings_of_one_resource_are_one_and_any_difference_makes_two() -> None:
    registry = ResourceRegistry()

    def identity(credential: str | None = None, **config: Any) -> str:
        return registry.identity(ResourceReference("cache", {"host": "h", **config}, credential))

    assert identity() == identity(port=6379, timeout=5) == identity(timeout=5.0, max_connections=10)
    assert identity(pool_size=3) == identity(max_pool_size=3)
    others = [identity(db=1), identity(port=1), identity(ssl="off"), identity("a"), identity("b"), identity(timeout=6)]
    assert len({identity(), *others}) == 7


def test_the_use_of_a_reference_is_what_its_secret_is_bound_to() -> None:
    registry = ResourceRegistry()
    assert registry.use(ResourceReference("cache", {"host": "h"})) == Use("cache", "h:6379", "verify-full")
    assert registry.use(ResourceReference("cache", {"embedded": True})) is None


def test_a_type_whose_package_is_broken_is_an_error_that_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = tmp_path / "broken-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1.0\n")
    entries = "[kailash_nb.resources]\nqueue = no_such_module:Queue\ncache = no_such_module:Thief\n"
    (info / "entry_points.txt").write_text(entries)
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    registry = ResourceRegistry()
    assert "queue" in registry.types()
    with pytest.raises(ResourceError, match=r"'queue' \(no_such_module:Queue\) cannot be loaded: ModuleNotFoundError"):
        registry.type("queue")
    assert isinstance(registry.type("cache"), CacheType)


# Leases


async def test_fifty_concurrent_first_leases_open_once(valkey: Valkey) -> None:
    kind = CountingType()
    told: list[float] = []

    async with registry_with(types={"cache": kind}) as registry:

        async def node(number: int) -> None:
            async with registry.lease(reference(valkey), LOGIN, told.append) as cache:
                await cache.set(f"node{number}", number)

        await asyncio.gather(*(node(number) for number in range(50)))
        assert kind.opened == 1
        assert registry.statistics().open == 1
        assert len([seconds for seconds in told if seconds > 0.03]) >= 50
    assert kind.closed == 1


async def test_a_failed_open_fails_for_all_who_wait_and_the_next_lease_tries_again(valkey: Valkey) -> None:
    kind = CountingType()
    async with registry_with(types={"cache": kind}) as registry:
        registry.register("orders", reference(valkey))
        kind.fail = ResourceUnavailableError("cache x: refused", outcome="not sent")

        async def node() -> Any:
            async with registry.lease(reference(valkey), LOGIN) as cache:
                return await cache.ping()

        errors = await asyncio.gather(*(node() for _ in range(5)), return_exceptions=True)
        assert errors == [kind.fail] * 5
        entry = registry.health()["resources"]["orders"]
        assert (entry["status"], entry["error"]) == ("unhealthy", "cache x: refused")
        kind.fail = None
        assert await node() is True
        assert registry.statistics().leased == 0
        assert registry.health()["resources"]["orders"]["status"] == "healthy"


async def test_a_cancelled_first_lease_does_not_cancel_the_opening_for_the_others(valkey: Valkey) -> None:
    kind = CountingType(delay=0.2)
    async with registry_with(types={"cache": kind}) as registry:

        async def node() -> Any:
            async with registry.lease(reference(valkey), LOGIN) as cache:
                return await cache.ping()

        first, *others = [asyncio.create_task(node()) for _ in range(4)]
        await asyncio.sleep(0.05)
        assert repr(registry) == "<ResourceRegistry 0 names, 0 open, 1 opening, 4 leased>"
        first.cancel()
        assert await asyncio.gather(*others) == [True] * 3
        assert first.cancelled()
        assert kind.opened == 1


async def test_an_opening_that_nobody_waits_for_any_more_is_kept_or_fails_silently(
    valkey: Valkey, caplog: pytest.LogCaptureFixture
) -> None:
    kind = CountingType(delay=0.1)
    async with registry_with(types={"cache": kind}) as registry:
        for fail in (ResourceUnavailableError("x", outcome="not sent"), None):
            kind.fail = fail
            waiting = asyncio.create_task(registry.lease(reference(valkey), LOGIN).__aenter__())
            await asyncio.sleep(0.02)
            waiting.cancel()
            await asyncio.gather(waiting, return_exceptions=True)
            await asyncio.sleep(0.2)
        gc.collect()
        assert (kind.opened, registry.statistics().open, registry.statistics().leased) == (1, 1, 0)
    assert not caplog.records


async def test_two_tenants_with_one_resource_name_never_share_a_pool(valkey: Valkey) -> None:
    async with registry_with() as registry:
        seen: dict[int, set[str]] = {1: set(), 2: set()}

        async def tenant(db: int) -> None:
            for turn in range(20):
                resource = registry.resolve(reference(valkey, db=db))
                async with registry.lease(resource, LOGIN) as cache:
                    await cache.set("tenant", db)
                    await asyncio.sleep(0.001 * (turn % 3))
                    seen[db].add(await cache.get("tenant"))

        await asyncio.gather(*(tenant(db) for db in (1, 2) for _ in range(10)))
        assert seen == {1: {"1"}, 2: {"2"}}
        assert registry.statistics().open == 2


async def test_another_version_of_the_credential_is_another_pool_and_the_old_one_is_closed_after_use(
    valkey: Valkey,
) -> None:
    kind = CountingType(delay=0)
    async with registry_with(types={"cache": kind}, check_every=0.1) as registry:
        async with registry.lease(reference(valkey), LOGIN) as old:
            async with registry.lease(reference(valkey), Credentials("cache_creds", 2, reveal)) as new:
                assert new.connection_pool is not old.connection_pool
                await asyncio.sleep(0.4)
                assert await old.ping() is True
            assert kind.closed == 0
        await eventually(lambda: kind.closed == 1)
        assert registry.statistics().open == 1


async def test_two_loops_in_two_threads_have_pools_of_their_own(valkey: Valkey) -> None:
    registry = ResourceRegistry()
    registry.register("orders", reference(valkey))
    kept = threading.Event()
    ready = threading.Event()

    async def node() -> Any:
        async def one(number: int) -> bool:
            async with registry.lease(registry.resolve("@orders"), LOGIN) as cache:
                await cache.set(f"x{number}", number)
                return await cache.get(f"x{number}") == str(number)

        return all(await asyncio.gather(*(one(number) for number in range(100))))

    async def elsewhere() -> Any:
        answer = await node()
        ready.set()
        while not kept.is_set():
            await asyncio.sleep(0.01)
        await registry.close_loop()
        return answer

    other = asyncio.create_task(asyncio.to_thread(in_thread, elsewhere))
    assert await node() is True
    await asyncio.to_thread(ready.wait, 20)
    assert (registry.statistics().open, registry.statistics().loops) == (2, 2)
    entry = registry.health()["resources"]["orders"]
    assert entry["metrics"]["pool_size"] == 20
    assert entry["loops"] == sorted([threading.current_thread().name, "the other loop"])
    kept.set()
    assert await other is True
    assert registry.statistics().loops == 1
    await registry.close()
    assert registry.statistics().loops == 0


async def test_an_idle_pool_is_closed_and_opens_again(valkey: Valkey) -> None:
    kind = CountingType(delay=0)
    async with registry_with(types={"cache": kind}, idle_close=0.3) as registry:
        for turn in (1, 2):
            async with registry.lease(reference(valkey), LOGIN) as cache:
                await asyncio.sleep(0.8)
                assert kind.closed == turn - 1
                assert await cache.ping() is True
            await eventually(lambda turn=turn: kind.closed == turn)  # type: ignore[misc]
            await eventually(lambda: registry.statistics().loops == 0)
        assert kind.opened == 2


async def test_the_pool_idle_for_longest_makes_room_for_a_new_one(valkey: Valkey) -> None:
    kind = CountingType(delay=0)
    async with registry_with(types={"cache": kind}, max_open=3) as registry:
        for db in (1, 2, 3, 1, 4):
            async with registry.lease(reference(valkey, db=db), LOGIN) as cache:
                await cache.ping()
            await asyncio.sleep(0.01)
        assert registry.statistics().open == 3
        await eventually(lambda: kind.closed == 1)
        async with registry.lease(reference(valkey, db=1), LOGIN):
            assert kind.opened == 4

        async def hold(db: int) -> None:
            async with registry.lease(reference(valkey, db=db), LOGIN):
                await asyncio.sleep(0.5)

        held = [asyncio.create_task(hold(db)) for db in (5, 6, 7)]
        await asyncio.sleep(0.1)
        with pytest.raises(PoolExhaustedError, match="3 resources are in use at once"):
            await hold(8)
        await asyncio.gather(*held)
        await hold(8)


# Closing


async def test_closing_waits_for_leases_to_end(valkey: Valkey) -> None:
    kind = CountingType(delay=0)
    registry = ResourceRegistry(types={"cache": kind})
    ended = []

    async def node() -> None:
        async with registry.lease(reference(valkey), LOGIN) as cache:
            await asyncio.sleep(0.3)
            ended.append(await cache.ping())

    running = asyncio.create_task(node())
    await asyncio.sleep(0.05)
    await registry.close()
    await running
    assert ended == [True]
    assert (kind.opened, kind.closed) == (1, 1)
    await registry.close()


async def test_closing_under_load_is_bounded_and_what_is_cut_off_says_so(own_valkey: Valkey) -> None:
    registry = ResourceRegistry(drain=0.3)

    async def node() -> None:
        async with registry.lease(reference(own_valkey, timeout=60), LOGIN) as cache:
            await cache.blpop(["nothing"], timeout=0)

    running = [asyncio.create_task(node()) for _ in range(8)]
    await asyncio.sleep(0.3)
    own_valkey.signal(signal.SIGSTOP)
    started = time.monotonic()
    await registry.close()
    assert time.monotonic() - started < 5
    for error in await asyncio.gather(*running, return_exceptions=True):
        assert isinstance(error, ResourceUnavailableError)
    assert registry.statistics().leased == 0


async def test_a_closed_registry_opens_again(valkey: Valkey) -> None:
    async with registry_with() as registry:
        for _ in range(3):
            async with registry.lease(reference(valkey), LOGIN) as cache:
                assert await cache.ping() is True
            await registry.close()
            assert registry.statistics().open == 0


async def test_closing_while_it_is_being_opened_tells_those_who_wait(valkey: Valkey) -> None:
    kind = CountingType(delay=10)
    async with registry_with(types={"cache": kind}) as registry:
        waiting = asyncio.create_task(registry.lease(reference(valkey), LOGIN).__aenter__())
        await asyncio.sleep(0.05)
        await registry.close()
        with pytest.raises(ResourceUnavailableError, match="was closed while it was opened"):
            await waiting


async def test_only_the_named_resources_are_closed(valkey: Valkey) -> None:
    kind = CountingType(delay=0)
    async with registry_with(types={"cache": kind}) as registry:
        for db, name in enumerate(("a", "b")):
            registry.register(name, reference(valkey, db=db))
            async with registry.lease(registry.resolve(name), LOGIN):
                pass
        await registry.close(["a"])
        assert registry.statistics().open == 1
        assert registry.health()["resources"]["a"]["status"] == "idle"
        with pytest.raises(ResourceNotFoundError):
            await registry.close(["c"])


async def test_closing_closes_the_pools_of_other_loops_on_their_loops(valkey: Valkey) -> None:
    kind = CountingType(delay=0)
    registry = ResourceRegistry(types={"cache": kind})
    opened, done = threading.Event(), threading.Event()

    async def elsewhere() -> bool:
        async with registry.lease(reference(valkey), LOGIN) as cache:
            await cache.ping()
        opened.set()
        while not done.is_set():
            await asyncio.sleep(0.01)
        return True

    other = asyncio.create_task(asyncio.to_thread(in_thread, elsewhere))
    await asyncio.to_thread(opened.wait, 20)
    async with registry.lease(reference(valkey), LOGIN) as cache:
        await cache.ping()
    await registry.close()
    assert (kind.opened, kind.closed, registry.statistics().open) == (2, 2, 0)
    done.set()
    assert await other


async def test_a_loop_that_is_blocked_does_not_block_closing(valkey: Valkey, caplog: pytest.LogCaptureFixture) -> None:
    registry = ResourceRegistry(drain=0.1)
    opened, done = threading.Event(), threading.Event()

    async def elsewhere() -> bool:
        async with registry.lease(reference(valkey), LOGIN) as cache:
            await cache.ping()
        opened.set()
        done.wait(30)
        return True

    other = asyncio.create_task(asyncio.to_thread(in_thread, elsewhere))
    await asyncio.to_thread(opened.wait, 20)
    started = time.monotonic()
    await registry.close()
    assert time.monotonic() - started < 12
    done.set()
    assert await other
    assert registry.statistics().open == 0
    assert not caplog.records


async def test_retiring_returns_at_once_and_the_pools_are_closed_soon(valkey: Valkey) -> None:
    kind = CountingType(delay=0)
    async with registry_with(types={"cache": kind}) as registry:
        async with registry.lease(reference(valkey), LOGIN) as cache:
            registry.retire()
            await asyncio.sleep(0.2)
            assert (kind.closed, await cache.ping()) == (0, True)
        await eventually(lambda: kind.closed == 1)
        registry.retire()


def test_retiring_without_a_loop_does_no_harm() -> None:
    ResourceRegistry().retire()


# Loops that end


def run_quietly(main: Callable[[], None], caplog: pytest.LogCaptureFixture) -> list[str]:
    """Run ``main`` and collect garbage; returns the warnings and log lines that this gave."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        main()
        for _ in range(3):
            gc.collect()
    return [str(w.message) for w in caught] + [r.getMessage() for r in caplog.records]


def test_a_loop_may_end_without_closing(valkey: Valkey, caplog: pytest.LogCaptureFixture) -> None:
    kind = CountingType(delay=0)
    registry = ResourceRegistry(types={"cache": kind})

    async def main() -> bool:
        async with registry.lease(reference(valkey), LOGIN) as cache:
            return bool(await cache.ping())

    def runs() -> None:
        assert [asyncio.run(main()) for _ in range(3)] == [True] * 3

    assert run_quietly(runs, caplog) == []
    assert (kind.opened, kind.closed, registry.statistics().loops) == (3, 3, 0)


def test_a_loop_may_end_while_resources_are_opened_used_and_closed(
    valkey: Valkey, caplog: pytest.LogCaptureFixture
) -> None:
    kind = CountingType(delay=0.05)
    registry = ResourceRegistry(types={"cache": kind})

    async def main(seconds: float) -> None:
        async def node(db: int) -> None:
            async with registry.lease(reference(valkey, db=db), LOGIN) as cache:
                await cache.blpop(["nothing"], timeout=0)

        nodes = [asyncio.create_task(node(db)) for db in range(3)]
        await asyncio.sleep(seconds)
        registry.retire()
        await asyncio.sleep(0)
        assert nodes

    def runs() -> None:
        for seconds in (0, 0.03, 0.06, 0.2):
            asyncio.run(main(seconds))

    assert run_quietly(runs, caplog) == []
    assert kind.opened == kind.closed
    assert registry.statistics().loops == 0


def test_a_loop_may_be_closed_with_its_tasks_pending(valkey: Valkey, caplog: pytest.LogCaptureFixture) -> None:
    registry = ResourceRegistry()

    async def main() -> bool:
        async with registry.lease(reference(valkey), LOGIN) as cache:
            return bool(await cache.ping())

    def runs() -> None:
        for _ in range(2):
            loop = asyncio.new_event_loop()
            assert loop.run_until_complete(main())
            loop.close()
        assert asyncio.run(main())

    assert run_quietly(runs, caplog) == []
    assert registry.statistics().loops == 0


# Health


async def test_the_health_report_has_the_shape_that_is_promised(valkey: Valkey) -> None:
    async with HttpServer({"/": sends({})}) as server, registry_with() as registry:
        registry.register("result_cache", reference(valkey, pool_size=4))
        registry.register("never_used", reference(valkey, db=5))
        async with registry.lease(registry.resolve("@result_cache"), LOGIN) as cache:
            await cache.get("k")
            async with registry.lease(ResourceReference("http_client", {"base_url": server.url})) as api:
                await api.get("/")
                unnamed = f"http_client {server.url}"
                await eventually(lambda: len(checked(registry)) == 2)
                health = registry.health()
        assert set(health) == {"resources", "overall_status"}
        assert health["overall_status"] == "healthy"
        assert set(health["resources"]) == {"result_cache", "never_used", unnamed}
        entry = health["resources"]["result_cache"]
        assert set(entry) == {"status", "last_check", "metrics"}
        assert entry["status"] == "healthy"
        assert time.strptime(entry["last_check"], "%Y-%m-%dT%H:%M:%SZ")
        metrics = entry["metrics"]
        assert (metrics["pool_size"], metrics["active_connections"], metrics["waiting"]) == (4, 0, 0)
        assert metrics["memory_usage_mb"] > 0
        assert metrics["avg_response_time_ms"] > 0
        assert health["resources"]["never_used"] == {"status": "idle", "last_check": None, "metrics": {}}
        assert health["resources"][unnamed]["status"] == "healthy"


def checked(registry: ResourceRegistry) -> list[str]:
    return [name for name, entry in registry.health()["resources"].items() if entry["last_check"]]


async def test_a_killed_server_is_unhealthy_and_healthy_again_after_its_restart(own_valkey: Valkey) -> None:
    async with registry_with(check_every=0.2) as registry:
        registry.register("orders", reference(own_valkey))

        def status() -> str:
            assert registry.health()["overall_status"] == registry.health()["resources"]["orders"]["status"]
            return str(registry.health()["resources"]["orders"]["status"])

        async with registry.lease(registry.resolve("@orders"), LOGIN) as cache:
            await cache.ping()
            await eventually(lambda: checked(registry) and status() == "healthy")
            own_valkey.kill()
            await eventually(lambda: status() == "unhealthy")
            await eventually(lambda: "connection refused" in registry.health()["resources"]["orders"]["error"])
            await asyncio.to_thread(own_valkey.start)
            await eventually(lambda: status() == "healthy")
            assert "error" not in registry.health()["resources"]["orders"]


async def test_a_pool_with_a_queue_is_degraded(valkey: Valkey) -> None:
    async with registry_with() as registry:
        registry.register("small", reference(valkey, pool_size=1))
        async with registry.lease(registry.resolve("@small"), LOGIN) as cache:
            await eventually(lambda: checked(registry))
            asked = [asyncio.ensure_future(cache.blpop(["nothing"], timeout=0.5)) for _ in range(2)]
            await asyncio.sleep(0.1)
            entry = registry.health()["resources"]["small"]
            assert (entry["status"], entry["metrics"]["waiting"]) == ("degraded", 1)
            assert "1 wait for one" in entry["error"]
            await asyncio.gather(*asked)
            assert registry.health()["overall_status"] == "healthy"


async def test_the_health_report_may_be_read_from_any_thread_while_pools_come_and_go(valkey: Valkey) -> None:
    async with registry_with(max_open=4, types={"cache": CountingType(delay=0)}) as registry:
        stop = threading.Event()

        def read() -> int:
            reports = 0
            while not stop.is_set():
                assert registry.health()["overall_status"] == "healthy"
                assert repr(registry)
                reports += 1
            return reports

        reader = asyncio.create_task(asyncio.to_thread(read))
        for turn in range(100):
            async with registry.lease(reference(valkey, db=turn % 8), LOGIN) as cache:
                await cache.ping()
        stop.set()
        assert await reader > 10


async def test_a_check_opens_and_pings(valkey: Valkey) -> None:
    async with registry_with() as registry:
        registry.register("orders", reference(valkey, pool_size=3))
        found = await registry.check("@orders", LOGIN)
        assert (found.name, found.type, found.status, found.error) == ("orders", "cache", "healthy", None)
        assert found.version
        assert found.version.startswith("Valkey ")
        assert found.latency_ms
        assert found.latency_ms > 0
        assert found.metrics["pool_size"] == 3
        assert registry.statistics().leased == 0


async def test_a_check_of_what_does_not_answer_is_a_result_with_the_remedy(valkey: Valkey) -> None:
    async def wrong() -> Mapping[str, Any]:
        return {"password": "canary-wrong"}

    async with registry_with() as registry:
        config = {"host": "127.0.0.1", "port": free_port()}
        found = await registry.check({"type": "cache", "config": config})
        assert (found.name, found.status, found.version, found.latency_ms) == ("cache", "unhealthy", None, None)
        assert "connection refused" in str(found.error)
        found = await registry.check(reference(valkey), Credentials("cache_creds", 1, wrong))
        assert "secret 'cache_creds'" in str(found.error)
        assert "canary" not in repr(found)
        with pytest.raises(ResourceNotFoundError):
            await registry.check("@nothing")


async def test_a_type_that_raises_what_it_may_not_shows_only_the_name_of_the_error(valkey: Valkey) -> None:
    kind = CountingType(delay=0)
    async with registry_with(types={"cache": kind}) as registry:
        registry.register("orders", reference(valkey))
        kind.fail = OSError("canary")
        found = await registry.check("orders", LOGIN)
        assert found.error == "OSError"
        assert registry.health()["resources"]["orders"]["error"] == "OSError"


async def test_a_resource_that_hangs_is_unhealthy_and_closing_leaves_it_behind(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Hanging:
        name = "hanging"

        def normalise(self, config: Mapping[str, Any]) -> dict[str, Any]:
            return dict(config)

        def use(self, config: Mapping[str, Any]) -> None:
            return None

        async def open(self, config: Mapping[str, Any], credentials: Credentials | None) -> Any:
            return self

        @asynccontextmanager
        async def lease(self, waited: Waited) -> AsyncIterator[str]:
            yield "live"

        async def ping(self) -> str:
            await asyncio.sleep(1000)
            return ""

        def statistics(self) -> dict[str, float | int]:
            return {}

        async def close(self) -> None:
            await asyncio.sleep(1000)

    monkeypatch.setattr("kailash_nb.resources.pools.CHECK_DEADLINE", 0.1)
    monkeypatch.setattr("kailash_nb.resources.pools.CLOSE_DEADLINE", 0.1)
    async with registry_with(types={"hanging": Hanging()}) as registry:
        registry.register("h", {"type": "hanging"})
        async with registry.lease(registry.resolve("h")) as live:
            assert live == "live"
        await eventually(lambda: registry.health()["overall_status"] == "unhealthy")
        assert "no answer within 0.1 s" in registry.health()["resources"]["h"]["error"]
    assert "did not close in order" in caplog.text


async def test_a_lease_costs_next_to_nothing(valkey: Valkey) -> None:
    async with registry_with() as registry:
        resource = registry.resolve(reference(valkey))
        async with registry.lease(resource, LOGIN) as cache:
            assert isinstance(cache, Cache)
        started = time.perf_counter()
        for _ in range(200):
            async with registry.lease(resource, LOGIN):
                pass
        assert (time.perf_counter() - started) / 200 < 0.002
