"""Logging in to PostgreSQL: within one deadline, with nothing taken from the environment, and errors one can act on.

The driver's frames hold the password, and a server may repeat in its refusal what it was sent. So a login's error is a
new one, raised outside ``except`` (it has neither cause nor context), and in words of our own.
"""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import ssl
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import asyncpg

from ..exceptions import KailashError, Outcome, ResourceCredentialsError, ResourceUnavailableError
from .base import Credentials
from .postgres_connection import Connection

_PATIENCE = 1.0  # seconds: a server that restarts refuses for a moment, one that is not there refuses for good
_MARGIN = 0.95  # attempts end a little early, so that the error is with the caller within connect_timeout


@dataclass(frozen=True)
class Target:
    """Where to connect and as whom.

    Args:
        host: a host name or address, never a socket's path.
        port: the TCP port.
        database: the database's name.
        user: the login name.
        password: asked at each login; nothing keeps what it returns.
        tls: the context to verify the server with, or None for no TLS.
        login: what is shown to the server, for messages: ``"the password of secret 'db_creds'"``.
        remedy: what to do where it is refused.
    """

    host: str
    port: int
    database: str
    user: str
    password: Callable[[], Awaitable[str | None]] = field(repr=False, compare=False)
    tls: ssl.SSLContext | None
    login: str
    remedy: str

    def __str__(self) -> str:
        return f"database {self.database!r} on {self.host}:{self.port}"


class ServerFullError(ResourceUnavailableError):
    """The server has no free slot for another connection; a pool that has some waits for one of those."""


async def connect(target: Target, config: Mapping[str, Any]) -> Connection:
    """Log in, within ``connect_timeout`` in all; a server that is just starting up is waited for.

    Raises ResourceUnavailableError (ServerFullError where only a slot is missing), and what asking the password raises.
    """
    loop = asyncio.get_running_loop()
    started = loop.time()
    give_up = started + config["connect_timeout"] * _MARGIN
    pause = 0.02
    while True:
        found = await _attempt(target, config, give_up)
        if isinstance(found, Connection):
            found.place = str(target)
            found.deadline = config["timeout"]
            return found
        failure, patience = found
        if loop.time() + pause >= min(give_up, started + patience):
            raise failure
        await asyncio.sleep(pause)
        pause = min(2 * pause, 0.5)


async def field_of(credentials: Credentials, *names: str) -> str | None:
    """The first of these fields that the secret has, or None.

    Raises ResourceCredentialsError where it is not text, and what reading the secret raises, without inner frames.
    """
    failure: Exception
    try:
        fields = await credentials.reveal()
        value = next((fields[name] for name in names if fields.get(name) is not None), None)
        if value is None or isinstance(value, str):
            return value
        failure = ResourceCredentialsError(f"{names[0]!r} of secret {credentials.name!r} is not text")
        del fields, value
    except Exception as error:
        failure = _without_frames(error, credentials.name)
    raise failure


def _without_frames(error: Exception, secret: str) -> Exception:
    if isinstance(error, KailashError):
        error.__cause__ = error.__context__ = None
        return error.with_traceback(None)
    # Somebody else's message may hold the value.
    return ResourceCredentialsError(f"secret {secret!r} could not be read ({type(error).__name__})")


async def _attempt(target: Target, config: Mapping[str, Any], give_up: float) -> Connection | tuple[Exception, float]:
    """One login: the connection, or why there is none and for how many seconds from the start to try again."""
    hook_failures: list[Exception] = []

    async def password() -> str | None:
        try:
            return await target.password()
        except Exception as error:
            hook_failures.append(error.with_traceback(None))
        raise asyncpg.InterfaceError("the password could not be read")

    try:
        async with asyncio.timeout_at(give_up):
            # Whatever asyncpg would otherwise take from PG* variables or the home directory is given here.
            connection: Connection = await asyncpg.connect(
                host=target.host,
                port=target.port,
                user=target.user,
                database=target.database,
                password=password,
                passfile=os.devnull,
                ssl=target.tls or False,
                direct_tls=False,
                target_session_attrs="any",
                krbsrvname="postgres",
                gsslib="gssapi",
                timeout=None,
                # The net below our own deadline: prepared statements and cursors do not pass through that.
                command_timeout=config["timeout"],
                statement_cache_size=config["statement_cache_size"],
                server_settings={"application_name": config["application_name"]},
                connection_class=Connection,
            )
            return connection
    except Exception as error:
        if hook_failures:
            return hook_failures[0], 0.0
        return _refusal(error, target, config["connect_timeout"]), _patience(error, config["connect_timeout"])


def _patience(error: Exception, longest: float) -> float:
    if isinstance(error, asyncpg.CannotConnectNowError):
        return longest
    return _PATIENCE if _is_refused(error) else 0.0


def _is_refused(error: Exception) -> bool:
    # asyncio reports the several addresses of a name (127.0.0.1 and ::1) as one OSError without a number.
    return isinstance(error, ConnectionRefusedError | ConnectionResetError | asyncpg.PostgresConnectionError) or (
        isinstance(error, OSError) and f"[Errno {errno.ECONNREFUSED}]" in str(error)
    )


def _refusal(error: Exception, target: Target, seconds: float) -> ResourceUnavailableError:
    """What a failed login means to the user."""
    place, login = f"{target.host}:{target.port}", f"user {target.user!r} to database {target.database!r}"
    outcome: Outcome = "answered"
    match error:
        case asyncpg.TooManyConnectionsError():
            return ServerFullError(
                f"{place} has no free connection for {login}; end other clients of it, or raise its max_connections",
                outcome=outcome,
            )
        case asyncpg.InvalidPasswordError():
            message = f"{place} refused the login of {login} with {target.login}; {target.remedy}"
        case asyncpg.InvalidAuthorizationSpecificationError():
            encrypted = "an encrypted" if target.tls else "an unencrypted"
            message = (
                f"{place} does not let {login} in from here over {encrypted} connection; check user, database and "
                "'ssl' in the reference, and the server's pg_hba.conf"
            )
        case asyncpg.InvalidCatalogNameError():
            message = f"{place} has no database {target.database!r} (asked as user {target.user!r}); check 'database'"
        case asyncpg.CannotConnectNowError():
            message = f"{place} was starting up or shutting down for {seconds:g} s; look at it, then try again"
        case asyncpg.PostgresError() if not isinstance(error, asyncpg.PostgresConnectionError):
            message = f"{place} refused {login} ({type(error).__name__}); its log says more"
        case _:
            outcome = "not sent"
            message = f"cannot reach {target} as user {target.user!r}: {_unreachable(error, target, seconds)}"
    return ResourceUnavailableError(message, outcome=outcome)


def _unreachable(error: Exception, target: Target, seconds: float) -> str:
    match error:
        case socket.gaierror() | UnicodeError():
            return f"the host name {target.host!r} is not known; check 'host' in the reference, and the VPN"
        case ssl.SSLCertVerificationError():
            return (
                f"its certificate is not accepted ({error.verify_message}); give the file of its CA as ssl_root_cert, "
                "or ssl='require' to encrypt without knowing who answers"
            )
        case ssl.SSLError():
            return f"TLS failed ({error.reason}); check 'ssl' in the reference"
        case ConnectionError() if "SSL" in str(error):
            return (
                "it does not speak TLS, so no password was sent; turn TLS on there, or say ssl='off' in the reference "
                "if you trust the network in between"
            )
        case TimeoutError():
            return f"no answer within {seconds:g} s; check host and port, the firewall and the VPN"
        case _ if _is_refused(error):
            return "nothing accepts connections there; is PostgreSQL running, and are host and port right?"
        case OSError():
            return f"{error.strerror or type(error).__name__}; check host and port"
        case _:
            return "what answers there does not speak PostgreSQL's protocol; check host and port"
