"""The resource type ``database``: PostgreSQL for async nodes, by host and login, by URL, or embedded.

What a node gets is :class:`.postgres.Database`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import ssl
import urllib.parse
from collections.abc import Awaitable, Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import asyncpg

from ..exceptions import ResourceConfigError, ResourceCredentialsError, did_you_mean, listed
from . import embedded
from .base import Credentials, Setting, Use, default_tls, normalised
from .postgres import PostgresDatabase
from .postgres_login import Target, connect, field_of
from .postgres_pool import ConnectionPool

_TIME: Mapping[str, Any] = {"kind": (int, float), "minimum": 0.1, "maximum": 86400, "unit": "seconds"}

SETTINGS: Mapping[str, Setting] = {
    "host": Setting(str),
    "port": Setting(int, minimum=1, maximum=65535),
    "database": Setting(str),
    "user": Setting(str),
    "min_pool_size": Setting(int, 0, minimum=0),
    "max_pool_size": Setting(int, 5, minimum=1, maximum=1000),
    "pool_size": Setting(int, alias_of="max_pool_size"),
    "ssl": Setting(str, choices=("off", "require", "verify-full")),
    "ssl_root_cert": Setting(str),
    "timeout": Setting(default=60.0, **_TIME),
    "connect_timeout": Setting(default=10.0, **_TIME),
    "acquire_timeout": Setting(default=30.0, **_TIME),
    "application_name": Setting(str, "kailash_nb"),
    "statement_cache_size": Setting(int, 100, minimum=0, maximum=10000),
    "embedded": Setting(bool, False),
}


class DatabaseType:
    """PostgreSQL, by ``host``, ``port`` and ``database``, or the embedded one (``{"embedded": true}``).

    Config:
        host, port, database: the server; port 5432 when absent. A host is a name or an address, never a socket's path.
        user: the login name; the secret's ``user`` (or ``username``) goes before it.
        min_pool_size, max_pool_size: connections kept open while idle (0) and at most (5); ``pool_size`` is the latter.
        ssl: ``"off"``, ``"require"`` (encrypted, whoever answers) or ``"verify-full"``. Default: off on this machine,
            verify-full to any other.
        ssl_root_cert: the file of the CA to trust with verify-full; the system's CAs when absent.
        timeout: seconds that one operation may take (60). There is no "for ever": a peer may be gone without a word.
        connect_timeout: seconds within which connecting and logging in has worked or failed (10).
        acquire_timeout: seconds to wait for a free connection (30).
        application_name: how the connections are called in ``pg_stat_activity``.
        statement_cache_size: prepared statements kept per connection (100); 0 behind pgbouncer.
        embedded: True for the PostgreSQL that kailash_nb runs itself; of the other keys it takes database (``postgres``
            when absent, made when missing), pool sizes, timeouts, application_name and statement_cache_size.
    """

    name: ClassVar[str] = "database"

    def normalise(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """The whole config; raises ResourceConfigError with every problem."""
        whole = normalised(self.name, SETTINGS, config)
        problems = list(_embedded_problems(whole) if whole["embedded"] else _server_problems(whole))
        if whole["min_pool_size"] > whole["max_pool_size"]:
            problems.append(f"min_pool_size {whole['min_pool_size']} is above max_pool_size {whole['max_pool_size']}")
        if problems:
            raise ResourceConfigError(self.name, problems)
        if whole["embedded"]:
            return whole | {"database": whole["database"] or "postgres"}
        return whole | {"port": whole["port"] or 5432, "ssl": whole["ssl"] or default_tls(whole["host"])}

    def use(self, config: Mapping[str, Any]) -> Use | None:
        """Where the login goes to; None for the embedded server, which has its own."""
        if config["embedded"]:
            return None
        return Use(self.name, f"{config['host']}:{config['port']}", config["ssl"])

    async def open(self, config: Mapping[str, Any], credentials: Credentials | None) -> PostgresDatabase:
        """A pool on the running loop, which connects on first use.

        Raises ResourceCredentialsError (no user, or fields that are not text) and what reading the secret raises,
        ResourceConfigError (a certificate file that cannot be read), ServiceError (the embedded server does not start).
        """
        if config["embedded"]:
            if credentials is not None:
                problem = "the embedded database has its own login: leave out credentials_ref"
                raise ResourceConfigError(self.name, [problem])
            find: Callable[[], Awaitable[Target]] = functools.partial(_embedded_target, config["database"])
            await _create_database(await find(), config)
        else:
            find = functools.partial(_same, await _server_target(config, credentials))
        pool = ConnectionPool(find, config)
        await pool.open()
        return PostgresDatabase(pool)


def _server_problems(config: Mapping[str, Any]) -> Iterable[str]:
    host = config["host"]
    if not host:
        yield "'host' is missing; for the embedded database say 'embedded': true"
    elif host.startswith("/"):
        yield f"'host' is a name or an address, not the path of a socket ({host!r:.80}); use 'localhost'"
    elif any(c in ", \t\n[]@" for c in host):
        yield f"'host' is one name or address, without brackets, spaces or commas, not {host!r:.80}"
    if not config["database"]:
        yield "'database' is missing"
    if config["ssl_root_cert"] and config["ssl"] in ("off", "require"):
        yield f"'ssl_root_cert' is for ssl='verify-full', not for ssl={config['ssl']!r}"


def _embedded_problems(config: Mapping[str, Any]) -> Iterable[str]:
    given = [key for key in ("host", "port", "user", "ssl", "ssl_root_cert") if config[key] is not None]
    if given:
        yield f"the embedded database has its own address and login: leave out {listed(given)}"


async def _same(target: Target) -> Target:
    return target


async def _server_target(config: Mapping[str, Any], credentials: Credentials | None) -> Target:
    user: str | None = config["user"]
    if credentials is not None:
        user = await field_of(credentials, "user", "username") or user
    if not user:
        lack = f"secret {credentials.name!r} has no field 'user'" if credentials else "there is no credentials_ref"
        raise ResourceCredentialsError(
            f"no user for database {config['database']!r} on {config['host']}:{config['port']}: {lack} and the config "
            "has no 'user'; store a secret with user and password (`%secret NAME user password`). The account that "
            "this process runs as is never used"
        )
    return Target(
        host=config["host"],
        port=config["port"],
        database=config["database"],
        user=user,
        password=functools.partial(field_of, credentials, "password") if credentials else _no_password,
        tls=_tls_context(config),
        login=f"the password of secret {credentials.name!r}" if credentials else "no password",
        remedy=f"store the right one with `%secret {credentials.name}`" if credentials else "name a credentials_ref",
    )


async def _no_password() -> None:
    return None


def _tls_context(config: Mapping[str, Any]) -> ssl.SSLContext | None:
    if config["ssl"] == "off":
        return None
    path = config["ssl_root_cert"]
    if path and not Path(path).is_file():
        raise ResourceConfigError("database", [f"there is no file {path!r} ('ssl_root_cert')"])
    try:
        context = ssl.create_default_context(cafile=path)
    except OSError as error:
        raise ResourceConfigError("database", [f"'ssl_root_cert' {path!r} cannot be used: {error}"]) from None
    if config["ssl"] == "require":
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


async def _embedded_target(database: str) -> Target:
    address = await embedded.address("postgres")

    async def password() -> str:
        return address.password

    return Target(
        host=address.host,
        port=address.port,
        database=database,
        user=address.user or "",
        password=password,
        tls=None,
        login="the embedded server's own password",
        remedy="its data may be another installation's",
    )


async def _create_database(target: Target, config: Mapping[str, Any]) -> None:
    if target.database == "postgres":
        return
    connection = await connect(dataclasses.replace(target, database="postgres"), config)
    try:
        if not await connection.fetchval("SELECT true FROM pg_database WHERE datname = $1", target.database):
            name = target.database.replace('"', '""')
            # template0 is never in use, so two kernels may create databases at once.
            with contextlib.suppress(asyncpg.DuplicateDatabaseError, asyncpg.UniqueViolationError):
                await connection.execute(f'CREATE DATABASE "{name}" TEMPLATE template0')
    finally:
        await connection.close(timeout=1.0)


# ---------------------------------------------------------------------------------------------------------------- URL

_URL_OPTIONS = {
    "sslrootcert": "ssl_root_cert",
    "dbname": "database",
    **{key: key for key in SETTINGS if key not in ("ssl", "embedded")},
}
_SSLMODES = {"disable": "off", "require": "require", "verify-full": "verify-full"}
_UNSAFE_SSLMODES = {
    "allow": "it would send the password to a server without TLS",
    "prefer": "it would send the password to a server without TLS",
    "verify-ca": "any holder of a certificate of that CA could answer",
}


def parse_url(url: str) -> tuple[dict[str, Any], str | None]:
    """The config of a database reference, and the password apart, from a URL such as PostgreSQL's tools take.

    ``postgresql://user:password@host:5432/database?sslmode=require&max_pool_size=10``: parts are percent-decoded,
    sslmode becomes ``ssl``, sslrootcert ``ssl_root_cert``, and the numbers of a database's config may be given.

    Returns ``(config, password)``, of which config holds only what the URL said; password is None where it has none.
    Raises ResourceConfigError with every problem; no message repeats a part of the URL that might hold the password.
    """
    parts = None
    with contextlib.suppress(ValueError):  # brackets that are no IPv6 address; the message would repeat them
        parts = urllib.parse.urlsplit(url.strip())
    if parts is not None and parts.scheme.partition("+")[0] not in ("postgresql", "postgres"):
        raise ResourceConfigError("database", ["a database URL reads postgresql://user@host:5432/database"])
    if parts is None or "@" in parts.path or "@" in parts.query or parts.fragment:
        problem = "the password has a character that must be percent-encoded in a URL ('/' as %2F, '@' as %40)"
        raise ResourceConfigError("database", [problem])
    problems: list[str] = []
    config: dict[str, Any] = {"user": _decoded(parts.username), "database": _decoded(parts.path.removeprefix("/"))}
    try:
        config |= {"host": _decoded(parts.hostname), "port": parts.port}
    except ValueError:
        problems.append("the port is a number from 1 to 65535")
    password = _decoded(parts.password)
    for key, value in urllib.parse.parse_qsl(parts.query, keep_blank_values=True):
        if key == "password":
            password = value
        else:
            problems += _take_option(config, key, value)
    if problems:
        raise ResourceConfigError("database", problems)
    return {key: value for key, value in config.items() if value is not None}, password


def _decoded(text: str | None) -> str | None:
    return urllib.parse.unquote(text) if text else None


def _take_option(config: dict[str, Any], key: str, value: str) -> Iterable[str]:
    if key == "sslmode":
        if value not in _SSLMODES:
            why = f": {_UNSAFE_SSLMODES[value]}" if value in _UNSAFE_SSLMODES else ""
            return [f"sslmode is one of {listed(_SSLMODES)}, not {value!r:.20}{why}"]
        config["ssl"] = _SSLMODES[value]
        return []
    name = _URL_OPTIONS.get(key)
    if name is None:
        known = ["sslmode", *_URL_OPTIONS]
        return [f"unknown option {key!r:.40} in the URL{did_you_mean(key, known)}; it may have {listed(known)}"]
    kinds = SETTINGS[name].kind
    try:
        config[name] = value if kinds is str else int(value) if kinds is int else float(value)
    except ValueError:
        return [f"option {key!r} in the URL is a number, not {value!r:.20}"]
    return []
