"""The ``cache`` resource: a redis-py client on a pool of its own, for Valkey, Redis and their kin.

The client is redis-py's; the deadlines, the errors and the care for connections are in ``cache_pool.py``. An operation
is sent once: redis-py sends it again where the answer was lost, which runs an ``INCR`` twice.
"""

from __future__ import annotations

import asyncio
import copy
import functools
import math
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import Any, ClassVar

import redis.asyncio as aioredis
from redis import exceptions as redis_errors
from redis.asyncio.client import Pipeline, PubSub
from redis.credentials import CredentialProvider

from ..exceptions import ResourceConfigError, ResourceCredentialsError, ResourceUnavailableError, listed
from .base import Credentials, Setting, Use, Waited, default_tls, normalised
from .cache_pool import Attempt, CachePool, own_timeout

_Call = Callable[..., Awaitable[Any]]

_SCHEMA: Mapping[str, Setting] = {
    "host": Setting(str),
    "port": Setting(int, minimum=1, maximum=65535),
    "db": Setting(int, default=0, minimum=0),
    "decode_responses": Setting(bool, default=True),
    "ssl": Setting(str, choices=("off", "require", "verify-full")),
    "timeout": Setting((int, float), default=5.0, minimum=0.01, maximum=86400, unit="seconds"),
    "connect_timeout": Setting((int, float), default=5.0, minimum=0.01, maximum=86400, unit="seconds"),
    "max_connections": Setting(int, default=10, minimum=1, maximum=10000, unit="connections"),
    "pool_size": Setting(int, alias_of="max_connections"),
    "max_pool_size": Setting(int, alias_of="max_connections"),
    "embedded": Setting(bool, default=False),
}

_RESUBSCRIBE_PAUSES = (0.05, 0.1, 0.2, 0.4, 0.8, 1.0)


def _ignore(seconds: float) -> None:
    pass


class CacheType:
    """``cache``: Valkey or Redis, as a ``redis.asyncio`` client.

    Config:
        host: name or address of the server.
        port: its port, 6379 where absent.
        db: the number of the database, 0 where absent.
        decode_responses: text (``str``) comes back, not bytes. True where absent, other than in redis-py: a notebook
            stores JSON and counters; for pickles or images set it to False.
        ssl: ``"off"``, ``"require"`` (encrypted, nobody's identity checked) or ``"verify-full"``; where absent
            ``"off"`` on loopback names and ``"verify-full"`` elsewhere.
        timeout: seconds for a whole operation, waiting for a connection included; 5 where absent.
        connect_timeout: seconds for connecting and logging in; 5 where absent.
        max_connections: the size of the pool, 10 where absent; ``pool_size`` and ``max_pool_size`` mean the same.
        embedded: the embedded Valkey; then there is no host, port, ssl and no credential.

    The secret it names has a ``password`` and, for users of the server's access list, a ``user`` (or ``username``).
    """

    name: ClassVar[str] = "cache"

    def normalise(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """The whole config; raises ResourceConfigError."""
        whole = normalised(self.name, _SCHEMA, config)
        if whole["embedded"]:
            given = [key for key in ("host", "port", "ssl") if whole[key] is not None]
            if given:
                problem = f"the embedded cache has its own address: leave out {listed(given)}"
                raise ResourceConfigError(self.name, [problem])
            return whole
        if not whole["host"]:
            raise ResourceConfigError(self.name, ["'host' is missing; for the embedded cache say 'embedded': true"])
        if any(c in whole["host"] for c in "/,@[] \t\n"):
            raise ResourceConfigError(self.name, [f"'host' is one name or address alone, not {whole['host']!r:.80}"])
        return whole | {"port": whole["port"] or 6379, "ssl": whole["ssl"] or default_tls(whole["host"])}

    def use(self, config: Mapping[str, Any]) -> Use | None:
        """What the password would be sent to."""
        if config["embedded"]:
            return None
        return Use(self.name, f"{config['host']}:{config['port']}", config["ssl"])

    async def open(self, config: Mapping[str, Any], credentials: Credentials | None) -> CacheResource:
        """Open it on the running loop; connections are made at first use."""
        if not config["embedded"]:
            login = _Login(credentials) if credentials else None
            secret = credentials.name if credentials else None
            return CacheResource(config, config["host"], config["port"], login, secret=secret)
        if credentials:
            raise ResourceConfigError(self.name, ["the embedded cache has its own password: leave out credentials_ref"])
        from .embedded import address

        own = await address("valkey")
        find = functools.partial(address, "valkey")
        return CacheResource(config, own.host, own.port, _OwnLogin(own.user, own.password), find=find)


class CacheResource:
    """One pool and the client on it. Lives on the loop that opened it until the registry closes it."""

    def __init__(
        self,
        config: Mapping[str, Any],
        host: str,
        port: int,
        login: CredentialProvider | None,
        *,
        secret: str | None = None,
        find: Callable[[], Awaitable[object]] | None = None,
    ) -> None:
        self._pool = CachePool(
            f"cache {host}:{port}",
            secret=secret,
            find=find,
            timeout=config["timeout"],
            max_connections=config["max_connections"],
            host=host,
            port=port,
            db=config["db"],
            tls=_tls(config["ssl"]),
            decode_responses=config["decode_responses"],
            socket_connect_timeout=config["connect_timeout"],
            credential_provider=login,
        )
        self._client = Cache(connection_pool=self._pool)
        self._server: dict[str, float] = {}

    @asynccontextmanager
    async def lease(self, waited: Waited) -> AsyncIterator[Cache]:
        """The client, for one node; a subscription or pipeline the node left open is closed behind it."""
        client = self._client.lent(waited)
        try:
            yield client
        finally:
            await client.give_back()

    async def ping(self) -> str:
        """The server's name and version; notes its memory use and hit rate for :meth:`statistics`."""
        try:
            info = await self._client.info()
        except redis_errors.NoPermissionError:
            await self._client.ping()
            return "Redis"
        hits, misses = info.get("keyspace_hits", 0), info.get("keyspace_misses", 0)
        server = {"memory_usage_mb": round(info.get("used_memory", 0) / 1e6, 3)}
        if hits + misses:
            server["hit_rate"] = round(hits / (hits + misses), 4)
        self._server = server
        valkey = info.get("valkey_version")
        return f"Valkey {valkey}" if valkey else f"Redis {info.get('redis_version', '?')}"

    def statistics(self) -> dict[str, float | int]:
        """The pool's figures, and the server's as of the last ping."""
        return {**self._pool.statistics(), **self._server}

    async def close(self) -> None:
        """Cut every connection."""
        await self._pool.close()


class Cache(aioredis.Redis):
    """What a node gets: the redis-py client, with one deadline per operation and errors that say what to do.

    Raises ResourceUnavailableError or PoolExhaustedError where the server does not answer, and redis-py's own
    ``ResponseError``, ``WatchError``, ``LockError``, ``DataError`` where it does. Lives as long as the node.
    """

    connection_pool: CachePool

    def __init__(self, *, connection_pool: CachePool, single_connection_client: bool = False) -> None:
        super().__init__(connection_pool=connection_pool, single_connection_client=single_connection_client)
        self._waited: Waited = _ignore
        self._holders: set[Any] = set()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.connection_pool!r}>"

    def lent(self, waited: Waited) -> Cache:
        """A client for one node: the same pool, its own account of what the node opens and waits for."""
        client = copy.copy(self)
        client._waited, client._holders = waited, set()
        return client

    async def give_back(self) -> None:
        """Close what the node forgot to close: subscriptions, watching pipelines, single-connection clients."""
        for holder in tuple(self._holders):
            await holder.aclose()

    async def execute_command(self, *args: Any, **options: Any) -> Any:
        """Run one command, sent once, under one deadline."""
        pool = self.connection_pool
        if self.single_connection_client:
            whole: _Call = super().execute_command
            return await pool.run(lambda attempt: attempt.send(whole(*args, **options), *args), self._waited)
        ask: _Call = self._send_command_parse_response

        async def operation(attempt: Attempt) -> Any:
            connection = await pool.borrow(attempt)
            try:
                return await attempt.send(ask(connection, args[0], *args, **options), *args)
            finally:
                await pool.release(connection)

        return await pool.run(operation, self._waited)

    def setex(self, name: Any, time: int | timedelta, value: Any) -> Any:
        """Set ``name`` to ``value`` for ``time`` seconds; not deprecated here."""
        return self.set(name, value, ex=time)

    def hmset(self, name: Any, mapping: Mapping[Any, Any]) -> Any:
        """Set fields of the hash ``name``; not deprecated here."""
        return self.execute_command("HMSET", name, *(part for item in mapping.items() for part in item))

    def pipeline(self, transaction: bool = True, shard_hint: str | None = None) -> Pipeline:
        """A pipeline, as in redis-py; its ``execute()`` is one operation."""
        pipeline = _Pipeline(self.connection_pool, self.response_callbacks, transaction, shard_hint)
        pipeline._waited, pipeline._holders = self._waited, self._holders
        return pipeline

    def pubsub(self, **kwargs: Any) -> PubSub:
        """A subscription, as in redis-py. It has a connection to itself until it is closed or the node ends."""
        subscription = _PubSub(self.connection_pool, **kwargs)
        subscription._holders = self._holders
        return subscription

    def client(self) -> Cache:
        """A client on one connection of its own, as in redis-py."""
        client = type(self)(connection_pool=self.connection_pool, single_connection_client=True)
        client._waited = self._waited
        self._holders.add(client)
        return client


class _Pipeline(Pipeline):
    """Holds a connection while it executes, and from WATCH to EXEC."""

    connection_pool: CachePool
    connection: Any
    _waited: Waited
    _holders: set[Any]

    def setex(self, name: Any, time: int | timedelta, value: Any) -> Any:
        return self.set(name, value, ex=time)

    def hmset(self, name: Any, mapping: Mapping[Any, Any]) -> Any:
        return self.execute_command("HMSET", name, *(part for item in mapping.items() for part in item))

    async def execute(self, raise_on_error: bool = True) -> list[Any]:
        if not self.command_stack and not self.watching:
            return []
        extra = sum(own_timeout(args) for args, _ in self.command_stack)
        whole: _Call = super().execute
        answers: list[Any] = await self._run(lambda: whole(raise_on_error), ("pipeline",), extra)
        return answers

    async def immediate_execute_command(self, *args: Any, **options: Any) -> Any:
        whole: _Call = super().immediate_execute_command
        return await self._run(lambda: whole(*args, **options), args)

    async def _run(self, call: Callable[[], Awaitable[Any]], args: Iterable[Any], extra: float | None = None) -> Any:
        async def operation(attempt: Attempt) -> Any:
            if not self.connection:
                self.connection = await self.connection_pool.borrow(attempt)
                self._holders.add(self)
            return await attempt.send(call(), *args, extra=extra)

        return await self.connection_pool.run(operation, self._waited)

    async def reset(self) -> None:  # type: ignore[override]  # redis-py's own names clash
        whole: _Call = super().reset
        await whole()
        self._holders.discard(self)


class _PubSub(PubSub):
    """A subscription. It subscribes again by itself when the server was restarted."""

    connection_pool: CachePool
    connection: Any
    _holders: set[Any]

    async def connect(self) -> None:
        whole: _Call = super().connect
        await whole()
        self._holders.add(self)

    async def aclose(self) -> None:
        whole: _Call = super().aclose
        await whole()
        self._holders.discard(self)

    async def execute_command(self, *args: Any) -> Any:
        whole: _Call = super().execute_command
        return await self._steadily(lambda attempt: attempt.send(whole(*args), *args))

    async def parse_response(self, block: bool = True, timeout: float = 0) -> Any:  # noqa: ASYNC109 - redis-py's own
        whole: _Call = super().parse_response
        return await self._steadily(lambda attempt: attempt.send(whole(block, timeout), "subscription", extra=math.inf))

    async def _steadily(self, operation: Callable[[Attempt], Awaitable[Any]]) -> Any:
        """Again after a lost connection: subscribing and listening may be repeated, other than commands."""
        pauses = iter(_RESUBSCRIBE_PAUSES)
        while True:
            try:
                return await self.connection_pool.run(operation)
            except ResourceUnavailableError as error:
                pause = next(pauses, None)
                if pause is None or error.outcome == "answered" or self.connection_pool.closed:
                    raise
            await asyncio.sleep(pause)


class _Login(CredentialProvider):
    """Asks for the login at each connect; keeps nothing."""

    def __init__(self, credentials: Credentials) -> None:
        self._credentials = credentials

    async def get_credentials_async(self) -> Any:
        login = _login(self._credentials.name, await self._credentials.reveal())
        if isinstance(login, ResourceCredentialsError):
            raise login
        return login


class _OwnLogin(CredentialProvider):
    """The login of the embedded server."""

    def __init__(self, user: str | None, password: str) -> None:
        self._login = (user, password) if user else (password,)

    async def get_credentials_async(self) -> Any:
        return self._login


def _login(secret: str, fields: Mapping[str, Any]) -> tuple[str, ...] | ResourceCredentialsError:
    # The error is returned, not raised: a traceback must not hold this frame, in which the fields stand.
    password, user = fields.get("password"), fields.get("user") or fields.get("username")
    if not isinstance(password, str) or not password:
        return ResourceCredentialsError(
            f"secret {secret!r} has no field 'password' (it has {listed(fields)}); "
            "a cache needs 'password' and, for users of its access list, 'user'"
        )
    return (str(user), password) if user else (password,)


def _tls(mode: str | None) -> ssl.SSLContext | None:
    if mode in (None, "off"):
        return None
    context = ssl.create_default_context()
    if mode == "require":
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context
