"""A pool of PostgreSQL connections on one event loop.

asyncpg's pool keeps the connections (last used first, reset between users, idle ones closed). Around it stands:

- A permit for each connection in use. There are fewer of them when the server has no room for more clients, so a full
  server is a smaller pool and a queue, not an error. Waiters are served in order.
- A node keeps its connection between its operations (``kept``), which saves a reset for each of them. A kept connection
  is idle, so it is taken back as soon as somebody waits.
- A connection that lay idle for long is asked for a sign of life before it is handed out; no other use pays for that.
- Giving back never suspends: the reset runs in the background, and the node that ends does not wait for it.
"""

# ruff: noqa: ASYNC109 - `timeout=` is how asyncpg's API spells a deadline

from __future__ import annotations

import asyncio
import collections
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping
from typing import Any

import asyncpg

from ..exceptions import KailashError, PoolExhaustedError, ResourceUnavailableError
from .base import Average
from .postgres_connection import Connection
from .postgres_login import ServerFullError, Target, connect

_CLOSE_IDLE_AFTER = 300.0
_KEEP_WARM_EVERY = 240.0  # less than the line above: the floor's connections are used before they would be closed
_ANSWER_WITHIN = 2.0
_RESET_WITHIN = 3.0
_DISCARD_WITHIN = 1.0  # what a cancelled statement gets to end on the server before its connection is cut
_CLOSE_WITHIN = 2.0
_FULL_FOR = 5.0  # how long a server without room for us is not asked again

_DRIVER_ERRORS = (OSError, KailashError, asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError)


class ConnectionPool:
    """The connections of one reference. Belongs to the loop that opened it; lives until it is closed.

    Args:
        find: tells where to connect; asked at each login, because an embedded server may have moved.
        config: the normalised config of a database reference.
    """

    def __init__(self, find: Callable[[], Awaitable[Target]], config: Mapping[str, Any]) -> None:
        self.size: int = config["max_pool_size"]
        self.patience: float = config["acquire_timeout"]
        self.place = f"database {config['database']!r}"
        self.kept: dict[object, Connection] = {}
        self._find = find
        self._config = config
        self._limit = self.size
        self._permits = 0
        self._resetting = 0
        self._waiters: collections.deque[asyncio.Future[None]] = collections.deque()
        self._tasks: set[asyncio.Task[None]] = set()
        self._distrusted = 0.0
        self._average = Average()
        self._closed = False
        self._pool: Any = None

    async def open(self) -> None:
        """Attach it to the running loop; connects to nothing but the floor, and that in the background."""
        self._pool = asyncpg.create_pool(
            min_size=0,  # asyncpg's own floor logs a traceback for each second of a server's absence
            max_size=self.size,
            max_inactive_connection_lifetime=_CLOSE_IDLE_AFTER,
            connect=self._connect,
            connection_class=Connection,
        )
        await self._pool
        if self._config["min_pool_size"]:
            self._spawn(self._keep_warm(self._config["min_pool_size"]))

    @property
    def waiting(self) -> int:
        """How many wait for a connection."""
        return len(self._waiters)

    def statistics(self) -> dict[str, float | int]:
        """Figures for the health report; ``pool_size`` is the most it may hold."""
        return {
            "pool_size": self.size,
            "open_connections": self._pool.get_size(),
            "active_connections": self._permits - len(self.kept),
            "waiting": self.waiting,
            **self._average.metric(),
        }

    async def acquire(self, timeout: float | None = None) -> Connection:
        """A connection of one's own, to be released.

        Args:
            timeout: seconds to wait for a free one; ``acquire_timeout`` of the config when None.

        Raises PoolExhaustedError, ResourceUnavailableError, ResourceCredentialsError.
        """
        while True:
            if not self._take_permit():
                await self._wait(self.patience if timeout is None else timeout)
            try:
                return await self._check_out()
            except ServerFullError:
                if self._permits == 1:  # no other connection of ours could come back
                    self._hand_on()
                    raise
                self._shrink()
            except BaseException as error:
                if isinstance(error, ResourceUnavailableError) and not self._pool.get_size():
                    self._fail_waiters(error)
                self._hand_on()
                raise

    def release(self, connection: Connection, *, settled: bool = True) -> None:
        """Give a connection back; its reset, or its end, goes on in the background.

        Args:
            connection: what :meth:`acquire` returned.
            settled: False where an operation on it was cancelled: its reset has to wait for the server first.
        """
        connection.touch()
        connection.count = None
        soon = settled and not connection.lost
        self._resetting += soon
        self._spawn(self._take_back(connection, soon))

    @contextlib.asynccontextmanager
    async def connection(self, timeout: float | None = None) -> AsyncIterator[Connection]:
        """:meth:`acquire` and :meth:`release` around a block."""
        connection = await self.acquire(timeout)
        try:
            yield connection
        finally:
            self.release(connection)

    async def close(self) -> None:
        """Give running operations a moment to end, then cut them off; takes three seconds at most."""
        if self._closed:
            return
        self._closed = True
        self._fail_waiters(self._closed_error())
        while self.kept:
            self.release(self.kept.popitem()[1])
        try:
            async with asyncio.timeout(_CLOSE_WITHIN):
                await self._pool.close()
        except _DRIVER_ERRORS:
            self._pool.terminate()
        finally:
            for task in self._tasks:
                task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=_DISCARD_WITHIN)
        await asyncio.sleep(0)  # an aborted transport closes its socket in the loop's next round

    # ---- permits: decided without awaiting

    def _take_permit(self) -> bool:
        if self._closed:
            raise self._closed_error()
        if self._permits >= self._limit:
            return False
        if self._resetting > len(self._waiters) and not self._pool.get_idle_size():
            return False  # one comes back within a round trip, sooner than a new one could be opened
        self._permits += 1
        return True

    def _hand_on(self) -> None:
        """Pass a permit to the first who waits, or take it out of use."""
        while self._waiters and self._permits <= self._limit:
            waiter = self._waiters.popleft()
            if not waiter.done():
                waiter.set_result(None)
                return
        self._permits -= 1

    def _shrink(self) -> None:
        self._permits -= 1
        if self._limit == self.size:
            asyncio.get_running_loop().call_later(_FULL_FOR, self._grow_back)
        self._limit = self._permits

    def _grow_back(self) -> None:
        self._limit = self.size
        while self._waiters and self._permits < self._limit:
            self._permits += 1
            self._hand_on()

    def _fail_waiters(self, error: ResourceUnavailableError) -> None:
        """Tell those who wait that no connection can be made; each would find out by an attempt of its own."""
        while self._waiters:
            waiter = self._waiters.popleft()
            if not waiter.done():
                waiter.set_exception(ResourceUnavailableError(str(error), outcome=error.outcome))

    async def _wait(self, seconds: float) -> None:
        if self.kept and self._permits >= self._limit:
            keeper = next(iter(self.kept))  # the one whose connection has been idle for longest
            self.release(self.kept.pop(keeper))
        loop = asyncio.get_running_loop()
        waiter = loop.create_future()
        self._waiters.append(waiter)
        expiry = loop.call_later(seconds, self._give_up, waiter, seconds)
        try:
            await waiter
        except asyncio.CancelledError:
            if not waiter.cancelled() and waiter.exception() is None:
                self._hand_on()  # granted in the moment of the cancellation
            raise
        finally:
            expiry.cancel()
            if waiter in self._waiters:
                self._waiters.remove(waiter)

    def _give_up(self, waiter: asyncio.Future[None], seconds: float) -> None:
        if not waiter.done():
            self._waiters.remove(waiter)
            waiter.set_exception(
                PoolExhaustedError(
                    f"the {self._limit} connections of {self.place} stayed busy for {seconds:g} s; raise max_pool_size "
                    f"(now {self.size}), or hold connections for shorter"
                )
            )

    # ---- connections: what was decided, awaited

    async def _connect(self, *_: Any, **__: Any) -> Connection:
        target = await self._find()
        self.place = str(target)
        connection = await connect(target, self._config)
        connection.touch()
        return connection

    async def _check_out(self) -> Connection:
        while True:
            handle = await self._pool.acquire()
            connection: Connection = handle.itself()
            good = connection.is_good()
            try:
                if not good and connection.used[0] > self._distrusted:
                    good = await connection.answers(_ANSWER_WITHIN)
                    if not good:
                        self._distrusted = time.monotonic()  # its idle neighbours are not waited for as well
            finally:
                if not good:
                    connection.terminate()
            if good:
                connection.handle = handle
                connection.touch()
                connection.count = self._average.add
                return connection

    async def _take_back(self, connection: Connection, soon: bool) -> None:
        try:
            if connection.lost:
                await connection.close(timeout=_DISCARD_WITHIN)
            else:
                await self._pool.release(connection.handle, timeout=_RESET_WITHIN)
        except _DRIVER_ERRORS:
            connection.terminate()
        finally:
            self._resetting -= soon
            self._hand_on()

    async def _keep_warm(self, floor: int) -> None:
        """Open the floor's connections, and use them before they have been idle for too long."""
        while True:
            missing = 0 if self._waiters else floor - self._permits
            opened = await asyncio.gather(*(self.acquire() for _ in range(missing)), return_exceptions=True)
            for connection in opened:
                if not isinstance(connection, BaseException):
                    self.release(connection)
            await asyncio.sleep(_KEEP_WARM_EVERY)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _closed_error(self) -> ResourceUnavailableError:
        return ResourceUnavailableError(f"the pool of {self.place} is closed", outcome="not sent")
