"""One pool: who gets a connection when, what a fault costs, and that nothing is lost or left."""

from __future__ import annotations

import asyncio
import itertools
import os
import random
import signal
import socket
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from databases import CANARY, Address, leased, login, opened, wait_for
from faulty_servers import Proxy

from kailash_nb.exceptions import PoolExhaustedError, ResourceError, ResourceUnavailableError
from kailash_nb.resources import embedded, postgres_connection, postgres_pool
from kailash_nb.resources.postgres import Database, PostgresDatabase
from kailash_nb.resources.supervisor import LOCK_FILE, take_lock

_names = (f"pool_{number}" for number in itertools.count())


@dataclass(frozen=True)
class Through:
    """The server, through a proxy."""

    port: int
    user: str
    password: str
    host: str = "127.0.0.1"


@pytest.fixture
def postgres(services: Any) -> Address:
    return services.postgres  # type: ignore[no-any-return]


@pytest.fixture
async def owner(postgres: Address) -> AsyncIterator[Database]:
    """A connection of its own, to look at the others from."""
    async with leased(postgres, application_name="owner") as database:
        yield database


@pytest.fixture
async def proxy(postgres: Address) -> AsyncIterator[Proxy]:
    async with Proxy(postgres.port) as proxy:
        yield proxy


@pytest.fixture
def proxied(postgres: Address, proxy: Proxy) -> Through:
    return Through(proxy.port, postgres.user, postgres.password)


async def on_server(owner: Database, name: str) -> int:
    """How many connections of this application_name the server has."""
    return int(await owner.fetchval("SELECT count(*) FROM pg_stat_activity WHERE application_name = $1", name))


async def node(resource: PostgresDatabase, query: str = "SELECT pg_backend_pid()") -> Any:
    """What a node of one operation does."""
    async with resource.lease(lambda seconds: None) as database:
        return await database.fetchval(query)


def in_use(resource: PostgresDatabase) -> float:
    return resource.statistics()["active_connections"]


async def settled(resource: PostgresDatabase) -> bool:
    return in_use(resource) == 0


# --- sharing ----------------------------------------------------------------------------------------------------------


async def test_twenty_nodes_share_three_connections_and_are_told_how_long_they_waited(
    postgres: Address, owner: Database
) -> None:
    name, waits = next(_names), []

    async with opened(postgres, max_pool_size=3, application_name=name) as resource:

        async def slow_node() -> int:
            async with resource.lease(waits.append) as database:
                await database.execute("SELECT pg_sleep(0.05)")
                return int(await database.fetchval("SELECT pg_backend_pid()"))

        pids = await asyncio.gather(*(slow_node() for _ in range(20)))
        assert len(set(pids)) == await on_server(owner, name) == 3
        await wait_for(lambda: settled(resource))
        assert resource.statistics()["waiting"] == 0
        assert resource.statistics()["open_connections"] == 3

    assert len(waits) >= 20
    assert max(waits) > 0.1
    assert min(waits) < max(waits)


async def test_nodes_one_after_another_use_one_connection(postgres: Address, owner: Database) -> None:
    name = next(_names)
    async with opened(postgres, max_pool_size=5, application_name=name) as resource:
        assert len({await node(resource) for _ in range(20)}) == 1
        assert await on_server(owner, name) == 1


async def test_those_who_wait_are_served_in_order(postgres: Address) -> None:
    async with opened(postgres, max_pool_size=1) as resource:
        served: list[int] = []

        async def take_turn(number: int) -> None:
            await node(resource)
            served.append(number)

        await asyncio.gather(*(take_turn(number) for number in range(10)))

    assert served == list(range(10))


async def test_a_node_yields_the_connection_it_does_not_use_to_another(postgres: Address) -> None:
    async with opened(postgres, max_pool_size=1) as resource, resource.lease(lambda seconds: None) as thinking:
        await thinking.fetchval("SELECT 1")
        assert await node(resource, "SELECT 2") == 2  # while the first one does something else
        assert await thinking.fetchval("SELECT 3") == 3


async def test_a_node_that_never_rests_lets_others_take_turns(postgres: Address) -> None:
    async with opened(postgres, max_pool_size=1, acquire_timeout=5) as resource:

        async def restless() -> None:
            async with resource.lease(lambda seconds: None) as database:
                while True:
                    await database.fetchval("SELECT 1")

        task = asyncio.create_task(restless())
        await asyncio.sleep(0.05)
        assert [await node(resource, "SELECT 2") for _ in range(5)] == [2] * 5
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task


async def test_a_pool_that_stays_busy_is_an_error_that_says_so(postgres: Address) -> None:
    async with opened(postgres, max_pool_size=2, acquire_timeout=0.2) as resource:
        busy = [asyncio.create_task(node(resource, "SELECT 1 FROM pg_sleep(1)")) for _ in range(2)]
        await asyncio.sleep(0.1)
        for asked in (node(resource), resource.ping()):
            with pytest.raises(PoolExhaustedError, match=r"2 connections of database 'postgres' .* busy for 0.2 s"):
                await asked
        assert await asyncio.gather(*busy) == [1, 1]

        assert await node(resource)


async def test_a_pool_tells_how_it_is(postgres: Address) -> None:
    async with opened(postgres, max_pool_size=1) as resource:
        assert resource.statistics() == {
            "pool_size": 1,
            "open_connections": 0,
            "active_connections": 0,
            "waiting": 0,
        }
        tasks = [asyncio.create_task(node(resource, "SELECT 1 FROM pg_sleep(0.3)")) for _ in range(3)]
        await asyncio.sleep(0.2)
        statistics = resource.statistics()
        await asyncio.gather(*tasks)

        assert statistics["open_connections"] == statistics["active_connections"] == 1
        assert statistics["waiting"] == 2
        assert 250 < resource.statistics()["avg_response_time_ms"] < 5000
        assert "pool_size 1" in repr(resource)
        async with resource.lease(lambda seconds: None) as database:
            for _ in range(50):
                await database.fetchval("SELECT 1")
        assert resource.statistics()["avg_response_time_ms"] < 250


async def test_the_floor_is_opened_ahead_and_closed_with_the_pool(postgres: Address, owner: Database) -> None:
    name = next(_names)
    async with opened(postgres, min_pool_size=3, max_pool_size=4, application_name=name):

        async def is_open() -> bool:
            return await on_server(owner, name) == 3

        await wait_for(is_open)

    async def is_closed() -> bool:
        return await on_server(owner, name) == 0

    await wait_for(is_closed)


async def test_a_floor_on_a_server_that_is_not_there_is_no_error_yet() -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        server = Through(nobody.getsockname()[1], "ann", CANARY)
        async with opened(server, min_pool_size=2):
            await asyncio.sleep(0.1)


# --- cancelling -------------------------------------------------------------------------------------------------------


async def test_cancelling_a_node_ends_its_query_on_the_server_and_the_pool_goes_on(
    postgres: Address, owner: Database
) -> None:
    name = next(_names)
    query = "SELECT count(*) FROM pg_stat_activity WHERE application_name = $1 AND state = 'active'"

    async def running() -> bool:
        return bool(await owner.fetchval(query, name))

    async def not_running() -> bool:
        return not await running()

    async with opened(postgres, max_pool_size=1, application_name=name) as resource:
        task = asyncio.create_task(node(resource, "SELECT pg_sleep(60)"))
        await wait_for(running)
        began = time.monotonic()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert time.monotonic() - began < 1

        await wait_for(not_running)
        assert await node(resource, "SELECT 1") == 1


async def test_no_permit_is_lost_whenever_tasks_are_cancelled(postgres: Address) -> None:
    chance = random.Random(4711)

    async with opened(postgres, max_pool_size=3, acquire_timeout=0.1) as resource:

        async def some_node() -> None:
            async with resource.lease(lambda seconds: None) as database:
                with suppress(ResourceError):
                    async with database.acquire() as connection:
                        await connection.execute("SELECT pg_sleep(0.002)")
                    async with database.transaction():
                        await database.fetchval("SELECT 1")
                    await asyncio.gather(*(database.fetchval("SELECT 1") for _ in range(2)))

        for _ in range(25):
            tasks = [asyncio.create_task(some_node()) for _ in range(8)]
            for _ in tasks:
                await asyncio.sleep(chance.random() * 0.004)
                chance.choice(tasks).cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        await wait_for(lambda: settled(resource))

        assert resource.statistics()["waiting"] == 0
        assert resource._pool._permits == 0
        assert resource._pool._resetting == 0
        query = "SELECT pg_backend_pid() FROM pg_sleep(0.05)"  # all three can still be had at once
        assert len(set(await asyncio.gather(*(node(resource, query) for _ in range(3))))) == 3


# --- faults -----------------------------------------------------------------------------------------------------------


@pytest.fixture
async def limited(postgres: Address, owner: Database) -> AsyncIterator[Through]:
    """The server, as a user who may have two connections."""
    name = next(_names)
    await owner.execute(f"CREATE ROLE {name} LOGIN PASSWORD 'limited' CONNECTION LIMIT 2")
    yield Through(postgres.port, name, "limited")
    await owner.execute(f"DROP ROLE {name}")


async def test_a_server_without_room_makes_a_smaller_pool_and_no_error(limited: Through) -> None:
    async with opened(limited, max_pool_size=6, acquire_timeout=20) as resource:
        pids = await asyncio.gather(*(node(resource, "SELECT pg_backend_pid() FROM pg_sleep(0.05)") for _ in range(12)))

        assert 1 <= len(set(pids)) <= 2
        assert resource.statistics()["open_connections"] <= 2


async def test_a_pool_grows_again_when_the_server_has_room(limited: Through, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(postgres_pool, "_FULL_FOR", 0.3)
    async with opened(limited, max_pool_size=4) as resource:
        async with leased(limited, max_pool_size=1) as other:
            await other.fetchval("SELECT 1")
            query = "SELECT pg_backend_pid() FROM pg_sleep(0.1)"
            assert len(set(await asyncio.gather(*(node(resource, query) for _ in range(3))))) == 1
        await asyncio.sleep(0.5)

        assert len(set(await asyncio.gather(*(node(resource, query) for _ in range(2))))) == 2


async def test_a_server_without_room_is_an_error_where_we_have_no_connection_at_all(limited: Through) -> None:
    async with leased(limited, max_pool_size=2) as full:
        await asyncio.gather(*(full.fetchval("SELECT 1 FROM pg_sleep(0.1)") for _ in range(2)))
        async with full.acquire(), full.acquire(), opened(limited, max_pool_size=3) as resource:
            answers = await asyncio.gather(*(node(resource) for _ in range(6)), return_exceptions=True)
            for error in answers:
                assert isinstance(error, ResourceUnavailableError)
                assert "no free connection for user" in str(error)
                assert error.outcome == "answered"


async def test_those_who_wait_hear_of_a_refused_login_at_once(postgres: Address) -> None:
    async with opened(postgres, login(postgres.user, CANARY), max_pool_size=2) as resource:
        began = time.monotonic()
        errors = await asyncio.gather(*(node(resource) for _ in range(30)), return_exceptions=True)

    assert time.monotonic() - began < 5
    assert all(isinstance(e, ResourceUnavailableError) and "refused the login" in str(e) for e in errors)


async def test_a_connect_fault_fails_all_who_wait_within_the_connect_timeout() -> None:
    silent = socket.create_server(("127.0.0.1", 0))
    with silent:
        server = Through(silent.getsockname()[1], "ann", CANARY)
        async with opened(server, max_pool_size=2, connect_timeout=1) as resource:
            began = time.monotonic()
            errors = await asyncio.gather(*(node(resource) for _ in range(8)), return_exceptions=True)

            assert time.monotonic() - began < 1.8
            assert all(isinstance(e, ResourceUnavailableError) and e.outcome == "not sent" for e in errors)


@pytest.mark.parametrize("clock", ["monotonic", "time"])
async def test_a_connection_that_lay_idle_is_checked_by_both_clocks_and_kept_if_it_answers(
    proxied: Through, proxy: Proxy, monkeypatch: pytest.MonkeyPatch, clock: str
) -> None:
    async with opened(proxied, max_pool_size=1) as resource:
        backend = await node(resource)
        await wait_for(lambda: settled(resource))
        proxy.sent = b""
        real = getattr(time, clock)
        monkeypatch.setattr(postgres_connection.time, clock, lambda: real() + 3600)

        assert await node(resource) == backend
        assert proxy.sent.count(b"SELECT 1\0") == 1
        proxy.sent = b""
        assert await node(resource) == backend
        assert proxy.sent.count(b"SELECT 1\0") == 0


async def test_idle_connections_that_are_half_open_after_a_sleep_are_replaced_without_a_word(
    proxied: Through, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(postgres_pool, "_ANSWER_WITHIN", 0.3)
    async with opened(proxied, max_pool_size=4) as resource:
        query = "SELECT pg_backend_pid() FROM pg_sleep(0.1)"
        before = set(await asyncio.gather(*(node(resource, query) for _ in range(4))))
        await wait_for(lambda: settled(resource))
        proxy.freeze()
        wall = time.time
        monkeypatch.setattr(postgres_connection.time, "time", lambda: wall() + 3600)

        began = time.monotonic()
        await node(resource)
        assert time.monotonic() - began < 1.1  # one check, not one for each
        assert not before & set(await asyncio.gather(*(node(resource, query) for _ in range(4))))


async def test_a_node_that_slept_long_gets_its_connection_checked(
    proxied: Through, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(postgres_pool, "_RESET_WITHIN", 0.3)
    async with leased(proxied, max_pool_size=1) as database:
        await database.fetchval("SELECT 1")
        proxy.freeze()
        wall = time.time
        monkeypatch.setattr(postgres_connection.time, "time", lambda: wall() + 3600)

        assert await database.fetchval("SELECT 2") == 2


# --- a server that is killed ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def killable(open_folder: Path) -> Iterator[Path]:
    """The folder of an embedded server of its own."""
    folder = open_folder / "killable"
    asyncio.run(embedded.address("postgres", folder))
    yield folder
    embedded.release(folder)
    os.close(take_lock(folder / LOCK_FILE, 20))


async def test_after_a_kill_and_restart_no_operation_that_started_later_fails(killable: Path) -> None:
    server: Address = await embedded.address("postgres", killable)
    pid_file = killable / "postgres" / "postmaster.pid"
    failures: list[tuple[float, ResourceUnavailableError]] = []
    over = False

    async with opened(server, max_pool_size=4, connect_timeout=2) as resource:

        async def work() -> int:
            done = 0
            while not over:
                began = time.monotonic()
                try:
                    async with resource.lease(lambda seconds: None) as database:
                        await database.execute("SELECT pg_sleep(0.01)")
                        done += await database.fetchval("SELECT 1")
                except ResourceUnavailableError as error:
                    failures.append((began, error))
                await asyncio.sleep(0.02)
            return done

        workers = [asyncio.create_task(work()) for _ in range(3)]
        in_flight = asyncio.create_task(node(resource, "SELECT pg_sleep(30)"))
        await asyncio.sleep(0.5)
        os.kill(int(pid_file.read_text().split()[0]), signal.SIGKILL)
        await asyncio.sleep(0.1)
        await embedded.address("postgres", killable)  # waits until it is up again
        ready = time.monotonic()
        await asyncio.sleep(1)
        over = True
        done = await asyncio.gather(*workers)

        with pytest.raises(ResourceUnavailableError, match="was lost amid an operation") as caught:
            await in_flight
        assert caught.value.outcome == "unknown"
    assert all(count > 20 for count in done)
    assert [str(error) for began, error in failures if began > ready] == []


# --- closing ----------------------------------------------------------------------------------------------------------


async def test_closing_lets_a_short_operation_end_and_refuses_new_ones(postgres: Address) -> None:
    async with opened(postgres, max_pool_size=2) as resource, resource.lease(lambda seconds: None) as thinking:
        await thinking.fetchval("SELECT 1")
        running = asyncio.create_task(node(resource, "SELECT 7 FROM pg_sleep(0.3)"))
        await asyncio.sleep(0.1)
        await resource.close()

        assert await running == 7
        for refused in (node(resource), thinking.fetchval("SELECT 1"), resource.ping()):
            with pytest.raises(ResourceUnavailableError, match=r"the pool of database 'postgres' on .* is closed"):
                await refused
        await resource.close()


async def test_closing_takes_three_seconds_at_most_with_a_query_that_runs_and_nodes_that_wait(
    postgres: Address, owner: Database
) -> None:
    name = next(_names)
    async with opened(postgres, max_pool_size=1, application_name=name) as resource:
        tasks = [asyncio.create_task(node(resource, "SELECT pg_sleep(30)")) for _ in range(2)]
        await asyncio.sleep(0.2)
        began = time.monotonic()
        await resource.close()
        assert time.monotonic() - began < 3.5
        running, waiting = await asyncio.gather(*tasks, return_exceptions=True)

    assert isinstance(running, ResourceUnavailableError)
    assert running.outcome == "unknown"
    assert isinstance(waiting, ResourceUnavailableError)
    assert waiting.outcome == "not sent"


async def test_closing_takes_three_seconds_at_most_with_half_open_connections(proxied: Through, proxy: Proxy) -> None:
    async with opened(proxied, max_pool_size=3) as resource:
        await asyncio.gather(*(node(resource, "SELECT 1 FROM pg_sleep(0.1)") for _ in range(3)))
        await wait_for(lambda: settled(resource))
        proxy.freeze()
        hanging = asyncio.create_task(node(resource))
        await asyncio.sleep(0.1)
        began = time.monotonic()
        await resource.close()

        assert time.monotonic() - began < 3.5
        with pytest.raises(ResourceUnavailableError):
            await hanging
