"""DataFrames into tables by COPY."""

from __future__ import annotations

import asyncio
import datetime as dt
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from decimal import Decimal
from typing import Any

import asyncpg
import pandas as pd
import pytest
from databases import leased

from kailash_nb.exceptions import ResourceError, UnsupportedValueError
from kailash_nb.resources.postgres import Database


@pytest.fixture
async def database(services: Any) -> AsyncIterator[Database]:
    """A database with a table ``orders`` of its own schema."""
    async with leased(services.postgres, max_pool_size=2) as database:
        await database.execute(
            """CREATE SCHEMA load;
               CREATE TABLE load.orders (
                   id bigint PRIMARY KEY, item text, price numeric(10, 2), paid boolean, at timestamptz, day date,
                   extra jsonb, twice bigint GENERATED ALWAYS AS (id * 2) STORED
               );
               CREATE TABLE load."Mixed Case" ("Some Column" integer);
               CREATE TABLE on_the_path (id integer)"""
        )
        yield database
        await database.execute("DROP SCHEMA load CASCADE; DROP TABLE on_the_path")


async def test_a_frame_is_appended_and_missing_values_become_null(database: Database) -> None:
    frame = pd.DataFrame(
        {
            "item": ["tea", None, "cups"],
            "id": [1, 2, 3],
            "price": [1.10, None, 3.0],
            "paid": [True, None, False],
            "at": pd.to_datetime(["2026-01-02T03:04:05Z", None, "2026-01-03T00:00:00Z"]),
            "day": pd.to_datetime(["2026-01-02", None, "2026-01-03"]),
            "extra": [{"a": [1]}, None, [2]],
        }
    )

    assert await database.load("load.orders", frame) == 3

    rows = await database.fetch("SELECT * FROM load.orders ORDER BY id")
    assert tuple(rows[0]) == (
        1,
        "tea",
        Decimal("1.10"),
        True,
        dt.datetime(2026, 1, 2, 3, 4, 5, tzinfo=dt.UTC),
        dt.date(2026, 1, 2),
        '{"a": [1]}',
        2,
    )
    assert tuple(rows[1])[1:7] == (None,) * 6
    assert await database.load("load.orders", frame[["id"]].assign(id=[4, 5, 6])) == 3


async def test_integers_with_gaps_which_pandas_makes_floats_are_integers_again(database: Database) -> None:
    frame = pd.DataFrame({"id": [1.0, 2.0, None]})
    assert frame["id"].dtype == float

    assert await database.load("on_the_path", frame) == 3
    assert [row["id"] for row in await database.fetch("SELECT id FROM on_the_path ORDER BY id")] == [1, 2, None]


async def test_a_table_may_be_of_the_search_path_or_have_an_unusual_name(database: Database) -> None:
    assert await database.load("on_the_path", pd.DataFrame({"id": [1]})) == 1
    assert await database.load("load.Mixed Case", pd.DataFrame({"Some Column": [1]})) == 1
    assert await database.load('load."Mixed Case"', pd.DataFrame({"Some Column": [2]})) == 1


async def test_only_the_named_columns_are_loaded(database: Database) -> None:
    frame = pd.DataFrame({"id": [1], "item": ["tea"], "note": ["not in the table"]})

    assert await database.load("load.orders", frame, columns=["id"]) == 1
    assert await database.fetchval("SELECT item FROM load.orders") is None


async def test_a_frame_without_rows_is_checked_and_loads_nothing(database: Database) -> None:
    assert await database.load("on_the_path", pd.DataFrame({"id": []})) == 0
    with pytest.raises(ResourceError, match="no column 'idd'"):
        await database.load("on_the_path", pd.DataFrame({"idd": []}))


async def test_a_load_takes_part_in_a_transaction(database: Database) -> None:
    with suppress(KeyError):
        async with database.transaction():
            await database.load("on_the_path", pd.DataFrame({"id": [1]}))
            raise KeyError

    assert await database.fetchval("SELECT count(*) FROM on_the_path") == 0


@pytest.mark.parametrize(
    ("table", "frame", "told"),
    [
        ("load.order", {"id": [1]}, r"no table 'load.order' in database 'postgres'.*did you mean 'load.orders'\?"),
        ("on_the_pth", {"id": [1]}, r"did you mean 'on_the_path'\?.*CREATE TABLE"),
        (
            "load.orders",
            {"idd": [1], "itm": ["x"]},
            r"no column 'idd', 'itm'; did you mean 'id'\?; did you mean 'item'\?",
        ),
        ("load.orders", {"twice": [1]}, r"no column 'twice'.*\(columns: id, item, price, paid, at, day, extra\)"),
        (
            "load.orders",
            {"id": [1, 2], "item": ["a", 5]},
            r"row 2 does not fit.*\(id bigint <- int, item text <- int\)",
        ),
        ("on_the_path", {"id": [1, 2**40]}, "row 2 does not fit table 'on_the_path'.*int32"),
        ("on_the_path", {"id": [1.0, 1.5]}, r"row 2 does not fit.*a fraction for an integer column"),
        ("on_the_path", {"id": [float("inf")]}, "does not fit"),
    ],
)
async def test_a_frame_that_does_not_fit_is_told_by_its_columns_and_loads_nothing(
    database: Database, table: str, frame: dict[str, list[Any]], told: str
) -> None:
    with pytest.raises(ResourceError, match=told):
        await database.load(table, pd.DataFrame(frame))

    assert await database.fetchval("SELECT count(*) FROM load.orders") == 0
    assert await database.fetchval("SELECT count(*) FROM on_the_path") == 0


async def test_a_row_that_breaks_a_constraint_is_the_servers_error_and_loads_nothing(database: Database) -> None:
    with pytest.raises(asyncpg.UniqueViolationError):
        await database.load("load.orders", pd.DataFrame({"id": [1, 2, 1]}))
    with pytest.raises(asyncpg.NotNullViolationError):
        await database.load("load.orders", pd.DataFrame({"item": ["tea"]}))

    assert await database.fetchval("SELECT count(*) FROM load.orders") == 0


async def test_a_column_that_the_frame_does_not_have_is_named(database: Database) -> None:
    with pytest.raises(UnsupportedValueError, match=r"no column 'idd'; did you mean 'id'\?"):
        await database.load("load.orders", pd.DataFrame({"id": [1]}), columns=["idd"])


async def test_a_long_load_leaves_the_loop_its_turns(database: Database) -> None:
    frame = pd.DataFrame({"id": range(100_000)})
    longest, over = 0.0, False

    async def watch() -> None:
        nonlocal longest
        while not over:
            began = time.perf_counter()
            await asyncio.sleep(0)
            longest = max(longest, time.perf_counter() - began)

    watcher = asyncio.create_task(watch())
    began = time.perf_counter()
    assert await database.load("on_the_path", frame) == 100_000
    took = time.perf_counter() - began
    over = True
    await watcher

    assert longest < max(0.1, took / 2)
