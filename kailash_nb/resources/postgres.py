"""PostgreSQL as nodes have it: asyncpg's pool API, transactions, DataFrames out (``frame``) and in (``load``)."""

# ruff: noqa: ASYNC109 - `timeout=` is how asyncpg's API spells a deadline

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Awaitable, Callable, Generator, Iterable, Sequence
from contextlib import AbstractAsyncContextManager
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from ..exceptions import PoolExhaustedError, ResourceError
from .base import Waited
from .postgres_connection import Connection
from .postgres_copy import copy_frame
from .postgres_pool import ConnectionPool

if TYPE_CHECKING:
    import pandas as pd


T = TypeVar("T")

_PING_PATIENCE = 2.0  # less than a health check has, so that "all busy" is told from "no answer"


class Relation(NamedTuple):
    """A table or view of a database; ``rows`` is the server's estimate, None where it has none."""

    schema: str
    name: str
    kind: str
    rows: int | None


_CONTENTS = """
    SELECT n.nspname::text, c.relname::text,
           CASE c.relkind WHEN 'v' THEN 'view' WHEN 'm' THEN 'materialized view' WHEN 'f' THEN 'foreign table'
                          ELSE 'table' END,
           -- A table that was never analysed has no estimate (-1), but soon a count of what was written to it.
           CASE WHEN c.relkind = 'v' THEN NULL WHEN c.reltuples >= 0 THEN c.reltuples::bigint
                ELSE nullif(pg_stat_get_live_tuples(c.oid), 0) END
    FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
    WHERE c.relkind IN ('r', 'p', 'v', 'm', 'f') AND NOT c.relispartition
      AND n.nspname <> 'information_schema' AND n.nspname !~ '^pg_'
    ORDER BY n.nspname, c.relname
"""


class PostgresDatabase:
    """One open ``database`` resource: a pool on the loop that opened it. Lives until the registry closes it."""

    def __init__(self, pool: ConnectionPool) -> None:
        self._pool = pool

    def lease(self, waited: Waited) -> AbstractAsyncContextManager[Database]:
        """A node's :class:`Database`; it takes a connection when the node first asks it something."""
        return _Lease(Database(self._pool, waited))

    async def ping(self) -> str:
        """``"PostgreSQL 18.4"``, after one round trip; raises ResourceError, soon where every connection is busy."""
        async with self._pool.connection(timeout=min(_PING_PATIENCE, self._pool.patience)) as connection:
            await connection.execute("SELECT 1")
            version: str = connection.get_settings().server_version
        return f"PostgreSQL {version.split()[0]}"

    def statistics(self) -> dict[str, float | int]:
        """pool_size (the most), open_connections, active_connections, waiting, avg_response_time_ms."""
        return self._pool.statistics()

    async def close(self) -> None:
        """Close within about three seconds: running operations may end, then they are cut off."""
        await self._pool.close()

    def __repr__(self) -> str:
        figures = ", ".join(f"{key} {value}" for key, value in self.statistics().items())
        return f"<{self._pool.place}: {figures}>"


class _Lease(AbstractAsyncContextManager["Database"]):
    def __init__(self, database: Database) -> None:
        self._database = database

    async def __aenter__(self) -> Database:
        return self._database

    async def __aexit__(self, *exc_info: object) -> None:
        self._database._end()


# ---------------------------------------------------------------------------------------------------- what a node gets

_TRANSACTIONS: contextvars.ContextVar[tuple[_Transaction, ...]] = contextvars.ContextVar("transactions", default=())
"""The transactions that the running code is inside of: tasks that it starts are inside, too, its siblings are not."""

_BY_CONNECTION = frozenset(
    {"prepare", "cursor", "add_listener", "copy_records_to_table", "copy_to_table", "copy_from_table"}
    | {"copy_from_query", "set_type_codec", "set_builtin_type_codec", "reload_schema_state"}
)


class Database:
    """PostgreSQL for one node: asyncpg's pool API, and DataFrames. Lives as long as the node runs.

    The node keeps one connection for its operations one after another; operations at the same time borrow more. A kept
    connection may be taken back between two operations when others wait, so a session's state (``SET``, temporary
    tables) belongs in an :meth:`acquire` block.

    Every operation takes ``timeout=SECONDS``; past it, or past the reference's ``timeout``, it raises
    ResourceUnavailableError. What the server itself refuses is asyncpg's ``PostgresError``, as always.
    """

    def __init__(self, pool: ConnectionPool, waited: Waited) -> None:
        self._pool = pool
        self._waited = waited
        self._lent: dict[Any, tuple[Connection, asyncio.Task[Any] | None]] = {}
        self._ended = False

    async def fetch(self, query: str, *args: Any, timeout: float | None = None, record_class: Any = None) -> list[Any]:
        """The rows of a query, as asyncpg Records."""
        return await self._perform(lambda c: c.fetch(query, *args, timeout=timeout, record_class=record_class))

    async def fetchrow(self, query: str, *args: Any, timeout: float | None = None, record_class: Any = None) -> Any:
        """The first row, or None."""
        return await self._perform(lambda c: c.fetchrow(query, *args, timeout=timeout, record_class=record_class))

    async def fetchval(self, query: str, *args: Any, column: int = 0, timeout: float | None = None) -> Any:
        """One value of the first row, or None."""
        return await self._perform(lambda c: c.fetchval(query, *args, column=column, timeout=timeout))

    async def execute(self, query: str, *args: Any, timeout: float | None = None) -> str:
        """Run a statement, or several where there are no arguments; returns the last status (``"INSERT 0 1"``)."""
        return await self._perform(lambda c: c.execute(query, *args, timeout=timeout))

    async def executemany(self, command: str, args: Iterable[Sequence[Any]], *, timeout: float | None = None) -> None:
        """Run a statement for each sequence of arguments: all of them or none."""
        await self._perform(lambda c: c.executemany(command, args, timeout=timeout))

    async def frame(self, sql: str, *args: Any, timeout: float | None = None) -> pd.DataFrame:
        """The rows of a query as a DataFrame; an empty one has its columns all the same."""
        from ..values import frame_from_records

        async def rows(connection: Connection) -> tuple[list[Any], list[str] | None]:
            records = await connection.fetch(sql, *args, timeout=timeout)
            if records:
                return records, None
            statement = await connection.prepare(sql, timeout=timeout)
            return records, [attribute.name for attribute in statement.get_attributes()]

        return frame_from_records(*await self._perform(rows))

    async def load(
        self, table: str, frame: pd.DataFrame, *, columns: Sequence[str] | None = None, timeout: float | None = None
    ) -> int:
        """Append a DataFrame's rows to a table by COPY: all of them or none.

        Args:
            table: an existing table, ``"name"`` or ``"schema.name"``, spelled as it is stored.
            frame: its columns go to the table's columns of the same name, in any order; missing values become NULL.
            columns: the frame's columns to load; all of them when None.
            timeout: seconds for the whole load.

        Returns how many rows were loaded. Raises ResourceError naming the columns when table and frame do not fit, and
        asyncpg's PostgresError where a row breaks a constraint.
        """
        return await self._perform(lambda connection: copy_frame(connection, table, frame, columns, timeout))

    async def contents(self) -> list[Relation]:
        """The tables and views, by schema and name, without the system's own."""
        return [Relation(*row) for row in await self.fetch(_CONTENTS)]

    def acquire(self, *, timeout: float | None = None) -> _Acquire:
        """A connection of the node's own: ``async with db.acquire() as con:``, or awaited and given to release().

        Inside a :meth:`transaction` block it is that transaction's connection.

        Args:
            timeout: seconds to wait for a free one; the reference's ``acquire_timeout`` when None.

        Raises PoolExhaustedError, ResourceUnavailableError.
        """
        return _Acquire(self, timeout)

    async def release(self, connection: Any, *, timeout: float | None = None) -> None:
        """Give an acquired connection back; it is reset in the background. Releasing twice is fine."""
        lent = self._lent.pop(connection, None)
        if lent is not None:
            self._pool.release(lent[0])

    def transaction(
        self, *, isolation: str | None = None, readonly: bool = False, deferrable: bool = False
    ) -> _Transaction:
        """A transaction: ``async with db.transaction():``, and what this block asks of ``db`` is part of it.

        Tasks that the block starts take part as well, one after another. A block inside a block is a savepoint. The
        arguments are asyncpg's.
        """
        return _Transaction(self, isolation=isolation, readonly=readonly, deferrable=deferrable)

    def __getattr__(self, name: str) -> Any:
        hint = ""
        if name in _BY_CONNECTION:
            hint = f"; it belongs to a connection: `async with db.acquire() as con:` and con.{name}(...)"
        raise AttributeError(f"a database has no {name!r}{hint}")

    def __repr__(self) -> str:
        return f"<Database of {self._pool.place}>"

    # ---- connections

    def _transaction_here(self) -> _Transaction | None:
        for transaction in reversed(_TRANSACTIONS.get()):
            if transaction.database is self and transaction.is_open:
                return transaction
        return None

    async def _perform(self, operation: Callable[[Connection], Awaitable[T]]) -> T:
        """Run one operation on the transaction's connection, the kept one, or a borrowed one."""
        transaction = self._transaction_here()
        if transaction is not None:
            async with transaction.lock:
                return await operation(transaction.connection)
        connection = await self._borrow()
        settled = False
        try:
            try:
                result = await operation(connection)
            except Exception:
                await self._roll_back(connection)
                settled = True
                raise
            left_open = await self._roll_back(connection)
            settled = True
        finally:
            self._give_back(connection, settled)
        if left_open:
            raise ResourceError(
                "the statement left a transaction open, so it was rolled back: an operation of the pool stands alone; "
                "use `async with db.transaction():`"
            )
        return result

    async def _borrow(self, timeout: float | None = None) -> Connection:
        if self._ended:
            raise ResourceError("this database belonged to a node that has ended; ask for it in the node that uses it")
        connection = self._pool.kept.pop(self, None)
        if connection is not None:
            if connection.is_good():
                return connection
            self._pool.release(connection)
        return await self._borrow_another(timeout)

    async def _borrow_another(self, timeout: float | None) -> Connection:
        if self._lent:
            task = asyncio.current_task()
            if sum(holder is task for _, holder in self._lent.values()) >= self._pool.size:
                raise PoolExhaustedError(
                    f"this code holds all {self._pool.size} connections of {self._pool.place} and asks for one more, "
                    "which can never come; use the connection of the acquire() block, or raise max_pool_size"
                )
        loop = asyncio.get_running_loop()
        started = loop.time()
        try:
            connection = await self._pool.acquire(timeout)
        finally:
            self._waited(loop.time() - started)
        return connection

    def _give_back(self, connection: Connection, settled: bool = True) -> None:
        connection.touch()
        pool = self._pool
        if settled and not self._ended and not pool.waiting and self not in pool.kept and connection.is_good():
            pool.kept[self] = connection
        else:
            pool.release(connection, settled=settled)

    async def _roll_back(self, connection: Connection) -> bool:
        """End a transaction that an operation left open, so that it does not reach the next one."""
        if connection.lost or connection.is_closed() or not connection.is_in_transaction():
            return False
        await connection.execute("ROLLBACK")
        return True

    async def _lend(self, timeout: float | None) -> Any:
        transaction = self._transaction_here()
        if transaction is not None:
            return transaction.connection.handle
        connection = await self._borrow(timeout)
        self._lent[connection.handle] = (connection, asyncio.current_task())
        return connection.handle

    def _end(self) -> None:
        self._ended = True
        kept = self._pool.kept.pop(self, None)
        if kept is not None:
            self._pool.release(kept)
        while self._lent:
            _, (connection, _) = self._lent.popitem()
            self._pool.release(connection)


class _Acquire:
    """What ``acquire()`` returns: a context manager, or awaited the connection itself."""

    def __init__(self, database: Database, timeout: float | None) -> None:
        self._database = database
        self._timeout = timeout
        self._handle: Any = None

    def __await__(self) -> Generator[Any, Any, Any]:
        return self._database._lend(self._timeout).__await__()

    async def __aenter__(self) -> Any:
        self._handle = await self._database._lend(self._timeout)
        return self._handle

    async def __aexit__(self, *exc_info: object) -> None:
        await self._database.release(self._handle)


class _Transaction:
    """What ``transaction()`` returns. Holds one connection of its database for as long as the block runs."""

    connection: Connection

    def __init__(self, database: Database, **options: Any) -> None:
        self.database = database
        self.lock = asyncio.Lock()
        self.is_open = False
        self._options = options
        self._outer: _Transaction | None = None
        self._inner: Any = None

    async def __aenter__(self) -> Any:
        self._outer = self.database._transaction_here()
        if self._outer is not None:
            await self._outer.lock.acquire()  # the outer one's other operations wait until the savepoint is settled
            self.connection = self._outer.connection
        else:
            self.connection = await self.database._borrow()
            self.database._lent[self] = (self.connection, asyncio.current_task())
        try:
            self._inner = self.connection.transaction(**self._options)
            await self._inner.__aenter__()
        except BaseException:
            self._leave(settled=False)
            raise
        self.is_open = True
        _TRANSACTIONS.set((*_TRANSACTIONS.get(), self))
        return self.connection.handle

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        settled = False
        try:
            async with self.lock:
                self.is_open = False
                # A lost connection has rolled back by itself; the error on its way says more than a failed ROLLBACK.
                if error is None or not (self.connection.lost or self.connection.is_closed()):
                    await self._inner.__aexit__(kind, error, traceback)
                settled = True
        finally:
            self.is_open = False
            _TRANSACTIONS.set(tuple(each for each in _TRANSACTIONS.get() if each is not self))
            self._leave(settled)

    def _leave(self, settled: bool) -> None:
        if self._outer is not None:
            self._outer.lock.release()
        elif self.database._lent.pop(self, None) is not None:
            self.database._give_back(self.connection, settled)
