"""Operations end in time, and their failure tells whether they may have had their effect."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import asyncpg
import pytest
from databases import Address, leased, opened, wait_for
from faulty_servers import Proxy

from kailash_nb.exceptions import ResourceUnavailableError
from kailash_nb.resources import postgres_pool
from kailash_nb.resources.postgres import Database


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


@pytest.fixture(autouse=True)
def _short_farewell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(postgres_pool, "_DISCARD_WITHIN", 0.2)


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


async def running(owner: Database, mark: str) -> int:
    query = "SELECT count(*) FROM pg_stat_activity WHERE state = 'active' AND query LIKE $1 AND pid <> pg_backend_pid()"
    return int(await owner.fetchval(query, f"%{mark}%"))


async def unknown(operation: Any, seconds: float) -> ResourceUnavailableError:
    """The error of an operation that must fail within this time, its outcome unknown."""
    began = time.monotonic()
    with pytest.raises(ResourceUnavailableError) as caught:
        await operation
    assert time.monotonic() - began < seconds
    assert caught.value.outcome == "unknown"
    return caught.value


# --- deadlines --------------------------------------------------------------------------------------------------------


async def test_a_half_open_connection_ends_at_the_deadline_and_the_next_operation_gets_another(
    proxied: Through, proxy: Proxy
) -> None:
    async with leased(proxied, timeout=0.5, max_pool_size=1) as database:
        assert await database.fetchval("SELECT 1") == 1
        proxy.freeze()

        error = await unknown(database.fetchval("SELECT 2"), 0.95)
        assert "within 0.5 s" in str(error)
        assert "timeout=SECONDS" in str(error)
        assert await database.fetchval("SELECT 3", timeout=10) == 3


@pytest.mark.parametrize(
    "operation",
    [
        lambda connection: connection.execute("SELECT 1"),
        lambda connection: connection.transaction().start(),
        lambda connection: connection.prepare("SELECT 1"),
        lambda connection: connection.copy_records_to_table("pg_proc", records=[(1,)]),
    ],
    ids=["execute", "transaction", "prepare", "copy"],
)
async def test_every_operation_of_a_connection_has_the_deadline(
    proxied: Through, proxy: Proxy, operation: Callable[[Any], Awaitable[Any]]
) -> None:
    async with leased(proxied, timeout=0.3) as database, database.acquire() as connection:
        proxy.freeze()

        await unknown(operation(connection), 5)


async def test_a_prepared_statement_ends_too_if_later(proxied: Through, proxy: Proxy) -> None:
    async with leased(proxied, timeout=0.5) as database, database.acquire() as connection:
        statement = await connection.prepare("SELECT 1")
        proxy.freeze()
        began = time.monotonic()
        with pytest.raises(TimeoutError):
            await statement.fetch()
        assert time.monotonic() - began < 2


async def test_a_statement_that_takes_too_long_is_cancelled_on_the_server(postgres: Address, owner: Database) -> None:
    async with leased(postgres) as database:
        await unknown(database.execute("SELECT pg_sleep(30), 'too long'", timeout=0.3), 1)

        async def gone() -> bool:
            return not await running(owner, "too long")

        await wait_for(gone)


async def test_a_call_may_take_longer_than_the_reference_says(postgres: Address) -> None:
    async with leased(postgres, timeout=0.2) as database:
        assert await database.fetchval("SELECT 1 FROM pg_sleep(0.6)", timeout=10) == 1


async def test_a_deadline_of_the_users_own_is_the_users_own(postgres: Address) -> None:
    async with leased(postgres, max_pool_size=1) as database:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.2):
                await database.execute("SELECT pg_sleep(30)")

        assert await database.fetchval("SELECT 1") == 1


# --- lost connections -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["terminated", "reset"])
async def test_a_connection_lost_amid_an_operation_leaves_its_outcome_unknown(
    proxied: Through, proxy: Proxy, owner: Database, how: str
) -> None:
    async with leased(proxied, max_pool_size=1) as database:
        backend = await database.fetchval("SELECT pg_backend_pid()")
        operation = asyncio.create_task(unknown(database.execute("SELECT pg_sleep(20), 'lost'"), 5))

        async def under_way() -> bool:
            return bool(await running(owner, "lost"))

        await wait_for(under_way)
        if how == "reset":
            proxy.reset()
        await owner.execute("SELECT pg_terminate_backend($1)", backend)

        assert "was lost amid an operation" in str(await operation)
        assert await database.fetchval("SELECT 1") == 1


@pytest.mark.parametrize("how", ["terminated", "reset"])
async def test_a_connection_lost_while_idle_is_replaced_without_a_word(
    proxied: Through, proxy: Proxy, owner: Database, how: str
) -> None:
    async with opened(proxied, max_pool_size=1) as resource, resource.lease(lambda seconds: None) as database:
        for _ in range(3):
            backend = await database.fetchval("SELECT pg_backend_pid()")
            if how == "reset":
                proxy.reset()
            else:
                await owner.execute("SELECT pg_terminate_backend($1)", backend)
            await asyncio.sleep(0.1)
            assert await database.fetchval("SELECT pg_backend_pid()") != backend


async def test_an_operation_on_a_connection_that_is_gone_was_not_sent(postgres: Address, owner: Database) -> None:
    async with leased(postgres, max_pool_size=1) as database:
        async with database.acquire() as connection:
            with pytest.raises(ResourceUnavailableError):
                await connection.execute("SELECT pg_sleep(30)", timeout=0.1)

            with pytest.raises(ResourceUnavailableError, match="was lost before this operation") as caught:
                await connection.fetchval("SELECT 1")
            assert caught.value.outcome == "not sent"
        assert await database.fetchval("SELECT 1") == 1


async def test_a_transaction_whose_connection_is_lost_raises_the_first_error(postgres: Address) -> None:
    async with leased(postgres, max_pool_size=1) as database:
        with pytest.raises(ResourceUnavailableError, match="no answer") as caught:
            async with database.transaction():
                await database.execute("SELECT pg_sleep(30)", timeout=0.1)

        assert caught.value.outcome == "unknown"
        assert await database.fetchval("SELECT 1") == 1


# --- answers ----------------------------------------------------------------------------------------------------------


async def test_a_statement_that_the_server_ends_is_answered(postgres: Address) -> None:
    async with leased(postgres, max_pool_size=1) as database, database.acquire() as connection:
        await connection.execute("SET statement_timeout = 100")
        with pytest.raises(asyncpg.QueryCanceledError):
            await connection.execute("SELECT pg_sleep(30)")
        assert await connection.fetchval("SELECT 1") == 1


async def test_one_connection_for_two_operations_at_once_is_asyncpgs_error_and_loses_nothing(postgres: Address) -> None:
    async with leased(postgres, max_pool_size=1) as database, database.acquire() as connection:
        slow = asyncio.create_task(connection.fetchval("SELECT 1 FROM pg_sleep(0.2)"))
        await asyncio.sleep(0.05)
        with pytest.raises(asyncpg.InterfaceError, match="another operation is in progress"):
            await connection.fetchval("SELECT 2")
        assert await slow == 1
        assert await connection.fetchval("SELECT 3") == 3


async def test_an_error_of_a_file_is_not_one_of_the_connection(postgres: Address) -> None:
    async with leased(postgres, max_pool_size=1) as database, database.acquire() as connection:
        with pytest.raises(FileNotFoundError):
            await connection.copy_from_query("SELECT 1", output="/no such folder/file")
        assert await connection.fetchval("SELECT 1") == 1
