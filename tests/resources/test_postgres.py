"""PostgreSQL as a node has it: its connections, transactions and frames."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any

import asyncpg
import pytest
from databases import Address, leased, opened

from kailash_nb.exceptions import PoolExhaustedError, ResourceError
from kailash_nb.resources.postgres import Database, Relation

_numbers = itertools.count()


@pytest.fixture
def postgres(services: Any) -> Address:
    return services.postgres  # type: ignore[no-any-return]


@pytest.fixture
async def database(postgres: Address) -> AsyncIterator[Database]:
    async with leased(postgres, max_pool_size=3) as database:
        yield database


@pytest.fixture
async def single(postgres: Address) -> AsyncIterator[Database]:
    """A database on a pool of one connection."""
    async with leased(postgres, max_pool_size=1, acquire_timeout=0.3) as database:
        yield database


@pytest.fixture
async def table(postgres: Address) -> AsyncIterator[str]:
    name = f"numbers_{next(_numbers)}"
    async with leased(postgres) as owner:
        await owner.execute(f"CREATE TABLE {name} (n integer UNIQUE)")
        yield name
        await owner.execute(f"DROP TABLE {name}")


async def pid(connection: Any) -> int:
    return int(await connection.fetchval("SELECT pg_backend_pid()"))


# --- operations -------------------------------------------------------------------------------------------------------


async def test_a_database_has_the_methods_of_asyncpgs_pool(database: Database, table: str) -> None:
    assert await database.execute(f"INSERT INTO {table} VALUES (1)") == "INSERT 0 1"
    assert await database.execute(f"INSERT INTO {table} VALUES ($1)", 2) == "INSERT 0 1"
    await database.executemany(f"INSERT INTO {table} VALUES ($1)", [(3,), (4,)])

    assert await database.fetchval(f"SELECT max(n) FROM {table}") == 4
    assert await database.fetchval(f"SELECT 7, max(n) FROM {table}", column=1) == 4
    assert (await database.fetchrow(f"SELECT n FROM {table} WHERE n = $1", 2))["n"] == 2
    assert await database.fetchrow(f"SELECT n FROM {table} WHERE n = $1", 99) is None
    assert [dict(row) for row in await database.fetch(f"SELECT n FROM {table} ORDER BY n LIMIT 2")] == [
        {"n": 1},
        {"n": 2},
    ]


async def test_an_error_of_the_server_is_asyncpgs_and_leaves_the_database_usable(
    database: Database, table: str
) -> None:
    with pytest.raises(asyncpg.PostgresSyntaxError):
        await database.fetch("SELEC 1")
    with pytest.raises(asyncpg.DataError):
        await database.fetch("SELECT $1::int", "one")
    with pytest.raises(asyncpg.UniqueViolationError):
        await database.executemany(f"INSERT INTO {table} VALUES ($1)", [(1,), (1,)])

    assert await database.fetchval(f"SELECT count(*) FROM {table}") == 0


async def test_a_nodes_operations_one_after_another_share_a_connection(database: Database) -> None:
    assert len({await pid(database) for _ in range(5)}) == 1


async def test_a_nodes_operations_at_once_borrow_more_connections(database: Database) -> None:
    began = time.monotonic()
    pids = await asyncio.gather(*(database.fetchval("SELECT pg_backend_pid() FROM pg_sleep(0.3)") for _ in range(3)))

    assert len(set(pids)) == 3
    assert time.monotonic() - began < 0.85


async def test_the_session_of_a_node_is_not_the_next_ones(postgres: Address) -> None:
    async with opened(postgres, max_pool_size=1) as resource:
        async with resource.lease(lambda seconds: None) as first:
            backend = await pid(first)
            await first.execute("SET application_name = 'changed'; SELECT pg_advisory_lock(4711)")
        async with resource.lease(lambda seconds: None) as second:
            assert await pid(second) == backend
            assert await second.fetchval("SHOW application_name") == "kailash_nb"
            assert await second.fetchval("SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'") == 0


async def test_a_transaction_that_a_statement_leaves_open_is_rolled_back_and_said(
    database: Database, table: str
) -> None:
    with pytest.raises(ResourceError, match=r"async with db.transaction\(\)"):
        await database.execute(f"BEGIN; INSERT INTO {table} VALUES (1)")

    assert await database.fetchval(f"SELECT count(*) FROM {table}") == 0


async def test_a_transaction_that_fails_in_a_script_does_not_reach_the_next_operation(single: Database) -> None:
    with pytest.raises(asyncpg.DivisionByZeroError):
        await single.execute("BEGIN; SELECT 1 / 0; COMMIT")

    assert await single.fetchval("SELECT 1") == 1


async def test_what_belongs_to_a_connection_says_how_to_get_one(database: Database) -> None:
    with pytest.raises(AttributeError, match=r"async with db.acquire\(\) as con:"):
        _ = database.prepare
    with pytest.raises(AttributeError, match="a database has no 'fetch_all'"):
        _ = database.fetch_all


async def test_a_database_does_not_outlive_its_node(postgres: Address) -> None:
    async with opened(postgres) as resource:
        async with resource.lease(lambda seconds: None) as database:
            await database.fetchval("SELECT 1")
        with pytest.raises(ResourceError, match="a node that has ended"):
            await database.fetchval("SELECT 1")


# --- acquire ----------------------------------------------------------------------------------------------------------


async def test_a_connection_is_acquired_by_a_block_or_by_await(database: Database) -> None:
    async with database.acquire() as connection:
        assert isinstance(connection, asyncpg.Connection)
        assert await connection.fetchval("SELECT 1") == 1
    other = await database.acquire()
    assert await other.fetchval("SELECT 2") == 2
    await database.release(other)
    await database.release(other)

    assert await database.fetchval("SELECT 3") == 3
    for released in (connection, other):
        with pytest.raises(asyncpg.InterfaceError):
            await released.fetchval("SELECT 1")


async def test_an_acquired_connection_has_all_that_asyncpgs_has(database: Database, table: str) -> None:
    async with database.acquire() as connection:
        async with connection.transaction():
            statement = await connection.prepare(f"INSERT INTO {table} VALUES ($1) RETURNING n")
            assert await statement.fetchval(5) == 5
            assert [row[0] async for row in connection.cursor("SELECT generate_series(1, 3)")] == [1, 2, 3]
        assert await connection.copy_records_to_table(table, records=[(6,), (7,)]) == "COPY 2"


async def test_an_acquired_session_is_reset_when_it_is_given_back(single: Database) -> None:
    async with single.acquire() as connection:
        await connection.execute("SET application_name = 'changed'")

    assert await single.fetchval("SHOW application_name") == "kailash_nb"


async def test_an_acquire_gets_the_nodes_idle_connection(single: Database) -> None:
    backend = await pid(single)

    async with single.acquire() as connection:
        assert await pid(connection) == backend


@pytest.mark.parametrize("how", ["fetchval", "acquire", "transaction"])
async def test_asking_for_one_more_than_there_are_fails_at_once_and_not_never(postgres: Address, how: str) -> None:
    async def ask(database: Database) -> None:
        if how == "fetchval":
            await database.fetchval("SELECT 1")
        else:
            await getattr(database, how)().__aenter__()

    async with leased(postgres, max_pool_size=1) as database, database.acquire():
        began = time.monotonic()
        with pytest.raises(PoolExhaustedError, match="holds all 1 connections"):
            await ask(database)

    assert time.monotonic() - began < 5


async def test_a_task_waits_no_longer_than_it_may_for_its_siblings_connection(single: Database) -> None:
    async with single.acquire():
        with pytest.raises(PoolExhaustedError, match=r"stayed busy for 0.3 s; raise max_pool_size \(now 1\)"):
            await asyncio.create_task(single.fetchval("SELECT 1"))
        with pytest.raises(PoolExhaustedError, match=r"busy for 0.1 s"):
            await asyncio.create_task(single._lend(0.1))

    assert await single.fetchval("SELECT 1") == 1


async def test_a_connection_that_a_node_forgot_comes_back_when_it_ends(postgres: Address) -> None:
    async with opened(postgres, max_pool_size=1, acquire_timeout=5) as resource:
        async with resource.lease(lambda seconds: None) as careless:
            forgotten = await careless.acquire()
            await forgotten.execute("SET application_name = 'changed'")
        async with resource.lease(lambda seconds: None) as next_node:
            assert await next_node.fetchval("SHOW application_name") == "kailash_nb"


# --- transactions -----------------------------------------------------------------------------------------------------


async def test_a_transaction_commits_or_rolls_back_what_its_block_did(database: Database, table: str) -> None:
    async with database.transaction():
        await database.execute(f"INSERT INTO {table} VALUES (1)")
    with suppress(KeyError):
        async with database.transaction():
            await database.execute(f"INSERT INTO {table} VALUES (2)")
            raise KeyError

    assert [row["n"] for row in await database.fetch(f"SELECT n FROM {table}")] == [1]


async def test_a_transaction_in_a_transaction_is_a_savepoint(single: Database, table: str) -> None:
    async with single.transaction():
        await single.execute(f"INSERT INTO {table} VALUES (1)")
        with suppress(asyncpg.UniqueViolationError):
            async with single.transaction():
                await single.execute(f"INSERT INTO {table} VALUES (2)")
                await single.execute(f"INSERT INTO {table} VALUES (1)")
        await single.execute(f"INSERT INTO {table} VALUES (3)")

    assert [row["n"] for row in await single.fetch(f"SELECT n FROM {table} ORDER BY n")] == [1, 3]


async def test_a_transaction_takes_asyncpgs_options(database: Database, table: str) -> None:
    async with database.transaction(isolation="serializable", readonly=True) as connection:
        assert await connection.fetchval("SHOW transaction_isolation") == "serializable"
        with pytest.raises(asyncpg.ReadOnlySQLTransactionError):
            await database.execute(f"INSERT INTO {table} VALUES (1)")
    assert await database.fetchval("SHOW transaction_isolation") == "read committed"


async def test_tasks_of_a_transactions_block_take_part_and_its_siblings_do_not(database: Database, table: str) -> None:
    entered, counted = asyncio.Event(), asyncio.Event()

    async def sibling() -> int:
        await entered.wait()
        count = await database.fetchval(f"SELECT count(*) FROM {table}")
        counted.set()
        return int(count)

    async def block() -> None:
        async with database.transaction():
            await asyncio.gather(*(database.execute(f"INSERT INTO {table} VALUES ({n})") for n in range(5)))
            entered.set()
            await counted.wait()
            async with database.acquire() as connection:
                assert await connection.fetchval(f"SELECT count(*) FROM {table}") == 5

    _, seen = await asyncio.gather(block(), sibling())

    assert seen == 0
    assert await database.fetchval(f"SELECT count(*) FROM {table}") == 5


async def test_a_task_that_outlives_a_transaction_is_out_of_it(database: Database, table: str) -> None:
    over = asyncio.Event()

    async def late() -> None:
        await over.wait()
        await database.execute(f"INSERT INTO {table} VALUES (1)")

    with suppress(KeyError):
        async with database.transaction():
            task = asyncio.create_task(late())
            raise KeyError
    with suppress(KeyError):
        async with database.acquire() as connection, connection.transaction():
            over.set()
            await task
            raise KeyError

    assert await database.fetchval(f"SELECT count(*) FROM {table}") == 1


async def test_transactions_of_two_databases_do_not_mix(postgres: Address, database: Database, table: str) -> None:
    async with leased(postgres) as other, database.transaction():
        await database.execute(f"INSERT INTO {table} VALUES (1)")
        async with other.transaction():
            assert await other.fetchval(f"SELECT count(*) FROM {table}") == 0
            await database.execute(f"INSERT INTO {table} VALUES (2)")
            assert await database.fetchval(f"SELECT count(*) FROM {table}") == 2


async def test_a_cancelled_transaction_is_rolled_back(single: Database, table: str) -> None:
    async def block() -> None:
        async with single.transaction():
            await single.execute(f"INSERT INTO {table} VALUES (1)")
            await single.execute("SELECT pg_sleep(30)")

    task = asyncio.create_task(block())
    await asyncio.sleep(0.2)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task

    assert await single.fetchval(f"SELECT count(*) FROM {table}") == 0


# --- frames -----------------------------------------------------------------------------------------------------------


async def test_the_rows_of_a_query_come_as_a_frame(database: Database) -> None:
    frame = await database.frame("SELECT n, 'row ' || n AS text FROM generate_series(1, $1::int) n", 3)

    assert list(frame.columns) == ["n", "text"]
    assert frame["n"].tolist() == [1, 2, 3]
    assert frame["text"].tolist() == ["row 1", "row 2", "row 3"]


async def test_a_frame_without_rows_has_its_columns(database: Database) -> None:
    frame = await database.frame("SELECT 1 AS n, now() AS at WHERE $1::bool", False)

    assert list(frame.columns) == ["n", "at"]
    assert len(frame) == 0


# --- the resource -----------------------------------------------------------------------------------------------------


async def test_a_ping_tells_the_servers_version(postgres: Address) -> None:
    async with opened(postgres) as resource:
        version = await resource.ping()
        statistics = resource.statistics()

    assert version.startswith("PostgreSQL ")
    assert float(version.split()[1]) >= 12
    assert 0 < statistics["avg_response_time_ms"] < 10_000


async def test_a_database_lists_its_tables_and_views_with_about_how_many_rows(database: Database) -> None:
    await database.execute(
        """CREATE SCHEMA shop;
           CREATE TABLE shop.orders AS SELECT generate_series(1, 500) AS id;
           CREATE VIEW shop.recent AS SELECT id FROM shop.orders;
           ANALYZE shop.orders"""
    )
    contents = await database.contents()
    await database.execute("DROP SCHEMA shop CASCADE")

    in_shop = [relation for relation in contents if relation.schema == "shop"]
    assert in_shop == [Relation("shop", "orders", "table", 500), Relation("shop", "recent", "view", None)]
    assert not [relation for relation in contents if relation.schema.startswith(("pg_", "information_schema"))]
