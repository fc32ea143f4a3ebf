"""The connections of a cache: one deadline per operation, one sending, and no connection that is not there.

What this adds to redis-py, whose own answers to faults are per attempt and therefore have no bound in time:

- One wall-clock deadline per operation, waiting for a connection included. Blocking commands extend it by their own
  timeout.
- Only connecting is tried again, because connecting sends nothing of the operation.
- A connection is looked at before each use: cut or reset while idle, or idle for long (the machine slept), it is
  replaced. CPython 3.12 and 3.13 do not notice a reset connection by themselves (gh-136234: ``writelines`` on a lost
  transport).
- Giving a connection back never suspends, so no cancellation can lose one.
- The password is asked for at each login and stands in no frame of an error that leaves this module. That is why errors
  are raised anew after their ``except`` block, and why nothing the server says during the login is repeated: servers
  quote the command they did not understand.
"""

from __future__ import annotations

import asyncio
import errno
import math
import select
import socket
import ssl
import time
from collections.abc import Awaitable, Callable
from typing import Any, Literal, TypeVar, cast

from redis import exceptions as redis_errors
from redis.asyncio.connection import Connection, ConnectionPool

from ..exceptions import KailashError, PoolExhaustedError, ResourceError, ResourceUnavailableError
from .base import Average, Waited

T = TypeVar("T")
_Call = Callable[[], Awaitable[Any]]

_RECONNECT_PAUSES = (0.05, 0.1, 0.2)
_FULL_PAUSE = 0.05
_PROBE_AFTER = 15.0
_PROBE_DEADLINE = 1.0
_WORTH_TELLING = 0.001
_LOGIN_ERRORS = (redis_errors.AuthenticationError, redis_errors.AuthorizationError)
_KEEPALIVE = {
    getattr(socket, name): seconds
    for name, seconds in (("TCP_KEEPIDLE", 30), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 3))
    if hasattr(socket, name)
}


def _ignore(seconds: float) -> None:
    pass


class Attempt:
    """How far one operation got, and its deadline."""

    def __init__(self, waited: Waited) -> None:
        self.deadline: asyncio.Timeout
        self.connection: CacheConnection
        self.phase: Literal["waiting", "connecting", "full", "sent"] = "waiting"
        self.command = ""
        self.blocking = False
        self.started = time.perf_counter()
        self._waited = waited

    async def send(self, answer: Awaitable[T], *args: Any, extra: float | None = None) -> T:
        """Await the answer to a command; from here on the outcome is unknown until the answer is there.

        Args:
            answer: what sends and reads.
            args: the command, for messages and for the timeout that it may carry itself.
            extra: the seconds by which the deadline moves, where they are not in ``args``.
        """
        waited = time.perf_counter() - self.started
        if waited > _WORTH_TELLING:
            self._waited(waited)
        self.phase, self.command = "sent", str(args[0])
        extra = own_timeout(args) if extra is None else extra
        if extra:
            self.blocking = True
            when = self.deadline.when()
            self.deadline.reschedule(None if when is None or extra == math.inf else when + extra)
        return await answer


class CachePool(ConnectionPool):
    """At most ``max_connections`` connections; whoever finds none free waits in line, up to the deadline."""

    def __init__(
        self,
        endpoint: str,
        *,
        secret: str | None,
        find: Callable[[], Awaitable[object]] | None,
        timeout: float,
        max_connections: int,
        **connection: Any,
    ) -> None:
        # RESP2 is what every server and every supported redis-py speak, with the same answers in all of them.
        super().__init__(
            CacheConnection,
            max_connections=max_connections,
            protocol=2,
            socket_timeout=None,
            socket_keepalive=True,
            socket_keepalive_options=_KEEPALIVE,
            **connection,
        )
        self.endpoint = endpoint
        self.timeout = timeout
        self.average = Average()
        self._secret = secret
        self._find = find
        self._slots = asyncio.Semaphore(max_connections)
        self._waiting = 0
        self.closed = False

    def __repr__(self) -> str:
        return f"{self.endpoint}, {len(self._in_use_connections)} of {self.max_connections} connections in use"

    async def run(self, operation: Callable[[Attempt], Awaitable[T]], waited: Waited = _ignore) -> T:
        """Await one operation under one deadline; what goes wrong on the way to the server is told apart."""
        attempt = Attempt(waited)
        failure: ResourceError
        try:
            async with asyncio.timeout(self.timeout) as attempt.deadline:
                answer = await operation(attempt)
        except (redis_errors.ConnectionError, redis_errors.TimeoutError, OSError) as error:
            failure = self._failure(attempt, error)
        except UnicodeDecodeError as error:
            error.add_note("The value is not text: set 'decode_responses' to False in this cache's config.")
            raise
        except Exception as error:
            if attempt.phase == "sent" or isinstance(error, KailashError):
                raise
            failure = self._refused(error)
        else:
            if not attempt.blocking:
                self.average.add(time.perf_counter() - attempt.started)
            return answer
        raise failure

    async def borrow(self, attempt: Attempt) -> CacheConnection:
        """A connection that is there and logged in; give it back with :meth:`release`."""
        self._waiting += 1
        try:
            await self._slots.acquire()
        finally:
            self._waiting -= 1
        attempt.phase = "connecting"
        take: Callable[[], CacheConnection] = self.get_available_connection
        attempt.connection = take()
        try:
            await self._make_ready(attempt)
            if self.closed:
                raise ResourceUnavailableError(f"{self.endpoint}: was closed; nothing was sent", outcome="not sent")
        except BaseException:
            # It may be half way through its login.
            await attempt.connection.disconnect(nowait=True)
            await self.release(attempt.connection)
            raise
        return attempt.connection

    async def _make_ready(self, attempt: Attempt) -> None:
        """See that the connection is there, else connect and log in.

        Connecting is tried again for a moment where nobody listens, and to the deadline where the server is full.
        """
        pauses = iter(_RECONNECT_PAUSES)
        while not self.closed:
            connection = attempt.connection
            if connection.is_connected:
                if await connection.alive():
                    return
                await connection.disconnect(nowait=True)
            try:
                if self._find:
                    # The embedded server may be about to be started again.
                    await self._find()
                await connection.connect()
            except redis_errors.ConnectionError as error:
                await connection.disconnect(nowait=True)
                attempt.phase = "full" if _full(error) else "connecting"
                pause = _FULL_PAUSE if _full(error) else next(pauses, None)
                if pause is None or isinstance(error, _LOGIN_ERRORS):
                    raise
            else:
                return
            await asyncio.sleep(pause)
            attempt.connection = self._swapped(connection)

    def _swapped(self, connection: CacheConnection) -> CacheConnection:
        """A connected one that has become free meanwhile, else the same.

        Too many clients for the server is a smaller pool: its users take turns on the connections that it allows.
        """
        connected = next((c for c in reversed(self._available_connections) if c.is_connected), None)
        if connected is None:
            return connection
        self._available_connections.remove(connected)
        self._available_connections.insert(0, connection)
        self._in_use_connections.remove(connection)
        self._in_use_connections.add(connected)
        return cast("CacheConnection", connected)

    async def get_connection(self, command_name: Any = None, *keys: Any, **options: Any) -> CacheConnection:
        """For what holds a connection for longer: subscriptions, monitors, single-connection clients."""
        return await self.run(self.borrow)

    async def release(self, connection: Any) -> None:
        """Give a connection back. Awaits nothing, so that no cancellation comes in between."""
        self._in_use_connections.remove(connection)
        self._available_connections.append(connection)
        connection.idle_since = time.time()
        if self.closed:
            connection.abort()
        self._slots.release()

    def statistics(self) -> dict[str, float | int]:
        """The pool's figures by the health report's names."""
        return {
            "pool_size": self.max_connections,
            "active_connections": len(self._in_use_connections),
            "waiting": self._waiting,
            **self.average.metric(),
        }

    async def close(self) -> None:
        """Cut every connection, also those in use: their operations fail with an unknown outcome."""
        self.closed = True
        for connection in (*self._available_connections, *self._in_use_connections):
            cast("CacheConnection", connection).abort()
        # A transport closes its socket in the loop's next round.
        await asyncio.sleep(0)
        await asyncio.sleep(0)

    def _failure(self, attempt: Attempt, error: Exception) -> ResourceError:
        """What to tell of an operation that got no answer; reads ``error`` and keeps nothing of it."""
        where, seconds = self.endpoint, f"{self.timeout:g} s"
        if isinstance(error, _LOGIN_ERRORS):
            return self._refused(error)
        if isinstance(error, redis_errors.BusyLoadingError):
            return ResourceUnavailableError(f"{where}: is still loading its data; try again", outcome="answered")
        if attempt.phase == "waiting":
            return PoolExhaustedError(
                f"{where}: all {self.max_connections} connections stayed busy for {seconds}. Raise 'max_connections', "
                "or use fewer at once: a subscription and a blocking read hold one each"
            )
        if attempt.phase == "full":
            return PoolExhaustedError(
                f"{where}: the server took no further client for {seconds}. Lower 'max_connections' here, or raise "
                "maxclients there"
            )
        reason = _reason(error)
        if attempt.phase == "connecting" or isinstance(error, NotSentError):
            advice = "Check host, port and ssl, and that the server runs"
            return ResourceUnavailableError(f"{where}: {reason}; nothing was sent. {advice}", outcome="not sent")
        if isinstance(error, TimeoutError | redis_errors.TimeoutError):
            reason = f"no answer within {seconds}. Raise 'timeout' (seconds) if it may take longer"
        told = f"{attempt.command} was sent, and whether it took effect is unknown: {reason}"
        return ResourceUnavailableError(f"{where}: {told}", outcome="unknown")

    def _refused(self, error: Exception) -> ResourceUnavailableError:
        text = str(error)
        if "DB index" in text:
            told = f"has no database {self.connection_kwargs['db']}. Check 'db'"
        elif "no password is set" in text or "without any password configured" in text:
            told = f"takes no password: leave out credentials_ref={self._secret!r}"
        elif self._secret:
            told = f"refused the login. Check the fields 'password' and 'user' of secret {self._secret!r}"
        else:
            told = "asks for a login. Store one (`%secret NAME`) and pass credentials_ref='NAME'"
        return ResourceUnavailableError(f"{self.endpoint}: the server {told}", outcome="answered")


class NotSentError(redis_errors.ConnectionError):
    """A connection that was found lost before anything was written to it."""


class CacheConnection(Connection):
    """One connection; knows whether it was lost while nobody read from it."""

    def __init__(self, *, tls: ssl.SSLContext | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.idle_since = time.time()
        self._tls = tls

    def _connection_arguments(self) -> dict[str, Any]:
        return {**super()._connection_arguments(), "ssl": self._tls}

    async def connect(self) -> None:
        """Connect and log in, both within the connect timeout."""
        whole: _Call = super().connect
        async with asyncio.timeout(self.socket_connect_timeout):
            await whole()

    @property
    def lost(self) -> bool:
        """Whether the loop knows that it was cut."""
        return self._writer is not None and self._writer.transport.is_closing()

    async def alive(self) -> bool:
        """Whether it may be used: not cut, nothing unread, and, after a long rest by the wall clock, answering."""
        try:
            if self.lost or await self._has_data() or self._readable():
                return False
            if time.time() - self.idle_since > _PROBE_AFTER:
                async with asyncio.timeout(_PROBE_DEADLINE):
                    await self.send_command("PING", check_health=False)
                    await self.read_response()
        except (redis_errors.RedisError, OSError):
            return False
        return True

    async def _has_data(self) -> bool:
        # redis-py before version 8 has another name for it.
        look: _Call = self.can_read if hasattr(self, "can_read") else self.can_read_destructive
        return bool(await look())

    def _readable(self) -> bool:
        # What the kernel knows already and the loop has not been told yet: nobody speaks unasked but to say goodbye.
        if self._writer is None:
            return True
        poll = select.poll()
        poll.register(self._writer.get_extra_info("socket"), select.POLLIN)
        return bool(poll.poll(0))

    async def send_packed_command(self, command: Any, check_health: bool = True) -> None:
        """Send, unless there is nobody to send to any more."""
        if self.lost:
            await self.disconnect(nowait=True)
            raise NotSentError("the connection was lost while it was idle")
        await super().send_packed_command(command, check_health)

    def abort(self) -> None:
        """Cut it at once, without the farewell that a dead server would never answer."""
        if self._writer is not None:
            self._writer.transport.abort()
            self._reader = self._writer = None


def _full(error: Exception) -> bool:
    return isinstance(error, redis_errors.BusyLoadingError) or "max number of clients" in str(error)


def _reason(error: BaseException) -> str:
    cause = error.__cause__ or error.__context__ or error
    if isinstance(cause, ssl.SSLCertVerificationError):
        return f"its certificate was not accepted ({cause.verify_message})"
    if isinstance(cause, ssl.SSLError):
        return f"no TLS connection ({cause.reason or 'the server speaks no TLS'})"
    if isinstance(cause, socket.gaierror):
        return "there is no such host"
    if isinstance(error, TimeoutError | redis_errors.TimeoutError):
        return "no connection in time"
    if f"[Errno {errno.ECONNREFUSED}]" in str(cause):
        return "connection refused"
    return "the connection was lost"


_SECONDS_LAST = frozenset({"BLPOP", "BRPOP", "BRPOPLPUSH", "BLMOVE", "BZPOPMIN", "BZPOPMAX"})
_SECONDS_FIRST = frozenset({"BLMPOP", "BZMPOP"})
_MILLISECONDS_LAST = frozenset({"WAIT", "WAITAOF"})
_READS = frozenset({"XREAD", "XREADGROUP"})
_BLOCKING = _SECONDS_LAST | _SECONDS_FIRST | _MILLISECONDS_LAST | _READS


def own_timeout(args: Any) -> float:
    """The seconds that a blocking command may take by its own arguments; inf where it may block for ever."""
    name = str(args[0]).upper()
    if name not in _BLOCKING:
        return 0.0
    try:
        if name in _READS:
            flags = [a.decode() if isinstance(a, bytes) else a for a in args]
            if "BLOCK" not in flags:
                return 0.0
            seconds = float(flags[flags.index("BLOCK") + 1]) / 1000
        else:
            seconds = float(args[1] if name in _SECONDS_FIRST else args[-1])
            if name in _MILLISECONDS_LAST:
                seconds /= 1000
    except (TypeError, ValueError, IndexError):
        return 0.0
    return seconds or math.inf
