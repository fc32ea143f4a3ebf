"""An asyncpg connection whose operations end in time and tell what their failure means.

One wall-clock deadline per operation is kept on our side, whatever the peer does: asyncpg's ``command_timeout`` waits
as long again for the cancellation to be confirmed, and a half-open peer confirms nothing. What fails is told apart by
outcome: *not sent*, *unknown*, or answered by the server, which stays asyncpg's ``PostgresError``.
"""

# ruff: noqa: ASYNC109 - `timeout=` is how asyncpg's API spells a deadline

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import Callable
from typing import Any

import asyncpg

from ..exceptions import ResourceUnavailableError

STALE_AFTER = 30.0
"""Seconds without use after which a connection is checked before it is handed out."""


def _in_time(name: str) -> Callable[..., Any]:
    """Asyncpg's operation of this name, with a deadline."""
    operation = getattr(asyncpg.Connection, name)

    @functools.wraps(operation)
    async def call(self: Connection, *args: Any, timeout: float | None = None, **kwargs: Any) -> Any:
        count = self.count
        if count is None:
            return await operation(self, *args, timeout=timeout, **kwargs)
        if self.lost or self.is_closed():
            raise ResourceUnavailableError(
                f"the connection to {self.place} was lost before this operation", outcome="not sent"
            )
        seconds = self.deadline if timeout is None else timeout
        started = time.perf_counter()
        try:
            async with asyncio.timeout(seconds):
                # asyncpg's own timer would go off at the reference's deadline, however long this call may take.
                result = await operation(self, *args, timeout=2 * seconds, **kwargs)
        except TimeoutError:
            failure = (
                f"no answer from {self.place} within {seconds:g} s; whether the statement had its effect is unknown. "
                "Give it longer with timeout=SECONDS, in the call or in the reference"
            )
        except (OSError, asyncpg.PostgresError, asyncpg.InternalClientError) as error:
            # InternalClientError: the reply of a server that was killed amid a statement leads asyncpg astray.
            if not (self.is_closed() or isinstance(error, asyncpg.InternalClientError)):
                count(time.perf_counter() - started)
                raise
            failure = f"the connection to {self.place} was lost amid an operation, whose effect is unknown ({error})"
        else:
            count(time.perf_counter() - started)
            return result
        self.lost = True
        raise ResourceUnavailableError(failure, outcome="unknown")

    return call


class Connection(asyncpg.Connection):  # type: ignore[misc]
    """One session. Belongs to a pool, or to whoever connected; lives until either side ends it."""

    place = "PostgreSQL"
    deadline: float = 60.0
    lost = False  # an outcome is unknown, so the session's state is as well: not to be used again
    # Told the seconds of each answered operation; None while the pool resets it, which has a deadline of its own.
    count: Callable[[float], None] | None = None
    handle: Any = None  # the proxy through which a user of the pool has it
    used: tuple[float, float] = (0.0, 0.0)  # when last, by the monotonic clock and the wall's

    execute = _in_time("execute")
    executemany = _in_time("executemany")
    fetch = _in_time("fetch")
    fetchrow = _in_time("fetchrow")
    fetchval = _in_time("fetchval")
    fetchmany = _in_time("fetchmany")
    prepare = _in_time("prepare")
    copy_from_table = _in_time("copy_from_table")
    copy_from_query = _in_time("copy_from_query")
    copy_to_table = _in_time("copy_to_table")
    copy_records_to_table = _in_time("copy_records_to_table")

    def itself(self) -> Connection:
        """The connection; asked through asyncpg's proxy, which hides it."""
        return self

    def touch(self) -> None:
        """Note that it is in use now."""
        self.used = (time.monotonic(), time.time())

    def is_good(self) -> bool:
        """Whether it may be handed out unasked: open, in a known state, and used lately by both clocks.

        A laptop's sleep stops the monotonic clock; the wall's may be set.
        """
        monotonic, wall = self.used
        return (
            not self.lost
            and not self.is_closed()
            and time.monotonic() - monotonic < STALE_AFTER
            and time.time() - wall < STALE_AFTER
        )

    async def answers(self, seconds: float) -> bool:
        """Whether the server gives a sign of life on it."""
        try:
            async with asyncio.timeout(seconds):
                await asyncpg.Connection.execute(self, "SELECT 1")
        except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError):
            return False
        return True
