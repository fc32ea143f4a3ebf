"""DataFrames into PostgreSQL tables by binary COPY, with errors that name the columns.

asyncpg encodes by the table's types. Where pandas holds another type than the table, values are fitted here: integers
with a gap are floats in a DataFrame (asyncpg would cut a fraction off without a word), a float's digits are those one
sees (not its binary expansion), and what JSON can hold becomes JSON.
"""

# ruff: noqa: ASYNC109 - `timeout=` is how asyncpg's API spells a deadline

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from decimal import Decimal
from typing import TYPE_CHECKING, Any

import asyncpg

from ..exceptions import ResourceError, did_you_mean, listed
from .postgres_connection import Connection

if TYPE_CHECKING:
    import pandas as pd

_ROWS_AT_A_TIME = 2000  # between two of them the loop gets a turn: a long load must not stop a kernel or a server

_COLUMNS = """
    SELECT a.attname::text, format_type(CASE WHEN t.typtype = 'd' THEN t.typbasetype ELSE t.oid END, NULL)
    FROM pg_attribute a JOIN pg_type t ON t.oid = a.atttypid
    WHERE a.attrelid = to_regclass($1) AND a.attnum > 0 AND NOT a.attisdropped AND a.attgenerated = ''
    ORDER BY a.attnum
"""
_TABLES = """
    SELECT CASE WHEN pg_table_is_visible(c.oid) THEN c.relname::text ELSE n.nspname || '.' || c.relname END
    FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
    WHERE c.relkind IN ('r', 'p', 'f') AND n.nspname <> 'information_schema' AND n.nspname !~ '^pg_'
"""


async def copy_frame(
    connection: Connection, table: str, frame: pd.DataFrame, columns: Sequence[str] | None, timeout: float | None
) -> int:
    """Append the rows of ``frame`` to ``table``; see :meth:`.database.Database.load`."""
    from ..values import records_from_frame

    names, records = records_from_frame(frame, columns)
    schema, name = _parts(table)
    types = await _column_types(connection, table, schema, name, names)
    rows = _Rows([_FITTING.get(types[column]) for column in names], records)
    try:
        status: str = await connection.copy_records_to_table(
            name, schema_name=schema, columns=names, records=rows, timeout=timeout
        )
    except (TypeError, ValueError, OverflowError, asyncpg.DataError) as error:
        if isinstance(error, asyncpg.PostgresError):
            raise  # the server's own
        problem = _misfit(table, rows, names, types, error)
    else:
        return int(status.rpartition(" ")[2])
    raise ResourceError(problem)


def _parts(table: str) -> tuple[str | None, str]:
    schema, dot, name = table.partition(".")
    return (schema.strip('"'), name.strip('"')) if dot else (None, table.strip('"'))


async def _column_types(
    connection: Connection, table: str, schema: str | None, name: str, wanted: Sequence[str]
) -> dict[str, str]:
    quoted = ".".join('"' + part.replace('"', '""') + '"' for part in (schema, name) if part is not None)
    types = {row[0]: row[1] for row in await connection.fetch(_COLUMNS, quoted)}
    if not types:
        known = [row[0] for row in await connection.fetch(_TABLES)]
        raise ResourceError(
            f"no table {table!r} in {connection.place}{did_you_mean(table, known)} (tables: {listed(known)}); "
            "create it first with db.execute('CREATE TABLE ...')"
        )
    unknown = [column for column in wanted if column not in types]
    if unknown:
        hints = "".join(did_you_mean(column, types) for column in unknown)
        raise ResourceError(
            f"table {table!r} has no column {listed(map(repr, unknown))}{hints} (columns: {', '.join(types)}); rename "
            "the frame's columns, or name those to load with columns=[...]"
        )
    return types


class _Rows:
    """The rows on their way, fitted to the columns; remembers the last one, for the error message."""

    def __init__(self, fitting: Sequence[Callable[[Any], Any] | None], records: Iterable[tuple[Any, ...]]) -> None:
        self._fitting = [(position, fit) for position, fit in enumerate(fitting) if fit is not None]
        self._records = records
        self.count = 0
        self.last: Sequence[Any] = ()

    async def __aiter__(self) -> AsyncIterator[Sequence[Any]]:
        for row in self._records:
            self.count += 1
            self.last = row
            if not self.count % _ROWS_AT_A_TIME:
                await asyncio.sleep(0)
            yield self._fitted(row) if self._fitting else row

    def _fitted(self, row: Sequence[Any]) -> Sequence[Any]:
        fitted = list(row)
        for position, fit in self._fitting:
            if row[position] is not None:
                fitted[position] = fit(row[position])
        return fitted


def _whole(value: Any) -> Any:
    if isinstance(value, float | Decimal):
        if value % 1:
            raise ValueError("a fraction for an integer column")
        return int(value)
    return value


def _exact(value: Any) -> Any:
    return Decimal(repr(value)) if isinstance(value, float) else value


def _json(value: Any) -> Any:
    return value if isinstance(value, str) else json.dumps(value)


_FITTING: dict[str, Callable[[Any], Any]] = {
    "smallint": _whole,
    "integer": _whole,
    "bigint": _whole,
    "numeric": _exact,
    "json": _json,
    "jsonb": _json,
}


def _misfit(table: str, rows: _Rows, names: Sequence[str], types: dict[str, str], error: Exception) -> str:
    # Types, not values: a row may hold what no log should.
    pairs = ", ".join(
        f"{name} {types[name]} <- {type(value).__name__}"
        for name, value in zip(names, rows.last, strict=False)
        if value is not None
    )
    return f"row {rows.count} does not fit table {table!r}: {error} ({pairs}); nothing was loaded"
