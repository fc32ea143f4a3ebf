"""Logging in: what the environment may say, what is sent to whom, and what an error tells and does not tell."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from databases import (
    CANARY,
    Address,
    asking_for_cleartext,
    leased,
    listening,
    login,
    opened,
    pump,
    self_signed,
    shown,
    starting_up,
)
from databases import tls_in_front_of as with_tls

from kailash_nb.exceptions import ResourceCredentialsError, ResourceUnavailableError
from kailash_nb.resources.base import Credentials


@pytest.fixture
def postgres(services: Any) -> Address:
    return services.postgres  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Elsewhere:
    """An address with the login of nobody in particular."""

    port: int
    host: str = "127.0.0.1"
    user: str = "ann"
    password: str = CANARY


async def refusal(server: Address, credentials: Credentials | None = None, **config: Any) -> ResourceUnavailableError:
    """The error of a ping, which must name no secret and have no driver's frame in it."""
    async with opened(server, credentials, **config) as resource:
        with pytest.raises(ResourceUnavailableError) as caught:
            await resource.ping()
    assert CANARY not in shown(caught.value)
    assert caught.value.__cause__ is None
    assert caught.value.__context__ is None
    return caught.value


async def test_a_drivers_own_error_would_show_the_password(postgres: Address) -> None:
    async def connect() -> None:
        await asyncpg.connect(host=postgres.host, port=postgres.port, user="ann", database="d", password=CANARY)

    with pytest.raises(asyncpg.InvalidPasswordError) as caught:
        await connect()

    assert CANARY in shown(caught.value)


# --- refused ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("user", ["kailash", "nobody_of_this_name"])
async def test_a_refused_login_names_server_user_database_and_secret(postgres: Address, user: str) -> None:
    error = await refusal(postgres, login(user, CANARY))

    for part in (f"{postgres.host}:{postgres.port}", repr(user), "'postgres'", "secret 'db_creds'", "%secret db_creds"):
        assert part in str(error)
    assert error.outcome == "answered"


async def test_a_login_without_a_password_asks_for_credentials(postgres: Address) -> None:
    error = await refusal(postgres, login(None, None), user=postgres.user)

    assert error.outcome == "answered"


async def test_a_database_that_is_not_there_is_named(postgres: Address) -> None:
    error = await refusal(postgres, database="shopp")

    assert "has no database 'shopp'" in str(error)
    assert error.outcome == "answered"


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
async def test_a_port_where_nothing_listens_is_named_soon(host: str) -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        port = nobody.getsockname()[1]
        began = time.monotonic()
        error = await refusal(Elsewhere(port, host=host))

    assert f"{host}:{port}" in str(error)
    assert "nothing accepts connections there; is PostgreSQL running" in str(error)
    assert error.outcome == "not sent"
    assert time.monotonic() - began < 5


async def test_a_host_that_is_not_known_is_named() -> None:
    error = await refusal(Elsewhere(5432, host="no-such-host.invalid"), ssl="require")

    assert "the host name 'no-such-host.invalid' is not known" in str(error)
    assert error.outcome == "not sent"


async def test_a_server_that_does_not_answer_fails_within_the_connect_timeout() -> None:
    async def say_nothing(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(60)

    async with listening(say_nothing) as port:
        began = time.monotonic()
        error = await refusal(Elsewhere(port), connect_timeout=1)

    assert time.monotonic() - began < 1.5
    assert "no answer within 1 s" in str(error)
    assert error.outcome == "not sent"


async def test_a_server_that_is_starting_up_is_waited_for(postgres: Address) -> None:
    credentials = login(postgres.user, postgres.password)
    async with starting_up(postgres, refusals=3) as port, leased(Elsewhere(port), credentials) as database:
        assert await database.fetchval("SELECT 1") == 1
    async with starting_up(postgres, refusals=1000) as port:
        error = await refusal(Elsewhere(port), connect_timeout=0.5)

    assert "was starting up or shutting down for 0.5 s" in str(error)


async def test_a_server_that_refuses_for_a_moment_is_waited_for(postgres: Address) -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        port = nobody.getsockname()[1]
    async with leased(Elsewhere(port, user=postgres.user, password=postgres.password)) as database:
        operation = asyncio.create_task(database.fetchval("SELECT 1"))
        await asyncio.sleep(0.3)

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            up_reader, up_writer = await asyncio.open_connection(postgres.host, postgres.port)
            await asyncio.gather(pump(reader, up_writer), pump(up_reader, writer))

        async with listening(serve, port):
            assert await operation == 1


async def test_a_server_that_speaks_another_protocol_is_told() -> None:
    async def speak_http(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 400 Bad Request\r\ncontent-length: 0\r\n\r\n")
        await asyncio.sleep(60)

    async with listening(speak_http) as port:
        error = await refusal(Elsewhere(port), connect_timeout=0.5)

    assert error.outcome == "not sent"


async def test_what_the_server_says_about_the_password_is_not_repeated() -> None:
    heard: list[bytes] = []
    async with asking_for_cleartext(heard) as port:
        error = await refusal(Elsewhere(port))

    assert CANARY.encode() in b"".join(heard)  # it was sent, without TLS and to the loopback, as configured
    assert "its log says more" in str(error)


# --- TLS --------------------------------------------------------------------------------------------------------------


async def test_no_password_is_sent_to_a_server_without_tls() -> None:
    heard: list[bytes] = []
    async with asking_for_cleartext(heard) as port:
        for mode in ("require", "verify-full"):
            error = await refusal(Elsewhere(port), ssl=mode)
            assert "does not speak TLS, so no password was sent" in str(error)
            assert error.outcome == "not sent"

    assert CANARY.encode() not in b"".join(heard)


async def test_a_certificate_is_verified_against_the_given_authority(postgres: Address, tmp_path: Path) -> None:
    context, authority = self_signed(tmp_path)
    async with with_tls(postgres, context) as port:
        server = Elsewhere(port, user=postgres.user, password=postgres.password)

        async with leased(server, ssl="verify-full", ssl_root_cert=str(authority)) as database:
            assert await database.fetchval("SELECT 1") == 1
        async with leased(server, ssl="require") as database:
            assert await database.fetchval("SELECT 1") == 1
        error = await refusal(server, ssl="verify-full")

    assert "its certificate is not accepted" in str(error)
    assert "ssl_root_cert" in str(error)
    assert error.outcome == "not sent"


async def test_a_certificate_of_another_name_is_not_accepted(postgres: Address, tmp_path: Path) -> None:
    context, authority = self_signed(tmp_path, "db.example.com")
    async with with_tls(postgres, context) as port:
        error = await refusal(Elsewhere(port), ssl="verify-full", ssl_root_cert=str(authority))

    assert "its certificate is not accepted" in str(error)


async def test_a_statement_is_cancelled_over_tls_as_well(postgres: Address, tmp_path: Path) -> None:
    context, authority = self_signed(tmp_path)
    async with with_tls(postgres, context) as port:
        server = Elsewhere(port, user=postgres.user, password=postgres.password)
        async with leased(server, ssl="verify-full", ssl_root_cert=str(authority), max_pool_size=1) as database:
            with pytest.raises(ResourceUnavailableError):
                await database.execute("SELECT pg_sleep(30)", timeout=0.3)
            assert await database.fetchval("SELECT count(*) FROM pg_stat_activity WHERE query LIKE '%sleep(30)'") == 0


# --- where the login comes from ---------------------------------------------------------------------------------------


async def test_no_variable_of_the_environment_and_no_file_has_a_say(
    postgres: Address, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / ".pgpass").write_text(f"*:*:*:*:{CANARY}\n")
    (tmp_path / ".pgpass").chmod(0o600)
    (tmp_path / ".pg_service.conf").write_text("[prod]\nhost=203.0.113.1\n")
    (tmp_path / ".postgresql").mkdir()
    (tmp_path / ".postgresql" / "root.crt").write_text("no certificate")
    monkeypatch.setenv("HOME", str(tmp_path))
    for name, value in {
        "PGHOST": "203.0.113.1",
        "PGPORT": "1",
        "PGUSER": "mallory",
        "PGPASSWORD": CANARY,
        "PGDATABASE": "elsewhere",
        "PGPASSFILE": str(tmp_path / ".pgpass"),
        "PGSERVICE": "prod",
        "PGSSLMODE": "verify-full",
        "PGSSLNEGOTIATION": "direct",
        "PGSSLROOTCERT": "/nonexistent",
        "PGTARGETSESSIONATTRS": "standby",
        "PGGSSLIB": "nonsense",
        "PGOPTIONS": "-c application_name=elsewhere",
        "PGAPPNAME": "elsewhere",
    }.items():
        monkeypatch.setenv(name, value)

    async with leased(postgres) as database:
        row = await database.fetchrow("SELECT current_user, current_database(), current_setting('application_name')")
    assert tuple(row) == (postgres.user, "postgres", "kailash_nb")


async def test_a_password_of_the_environment_reaches_no_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PGPASSWORD", CANARY)
    heard: list[bytes] = []
    async with asking_for_cleartext(heard) as port:
        await refusal(Elsewhere(port), login("ann", None))

    assert heard
    assert CANARY.encode() not in b"".join(heard)


@asynccontextmanager
async def rotating(postgres: Address) -> AsyncIterator[dict[str, str]]:
    fields = {"user": "rotated", "password": "first"}
    async with leased(postgres) as owner:
        await owner.execute("CREATE ROLE rotated LOGIN PASSWORD 'first'")
        try:
            yield fields
        finally:
            await owner.execute("DROP ROLE rotated")


async def test_the_password_is_asked_for_at_each_login(postgres: Address) -> None:
    async with rotating(postgres) as fields, leased(postgres) as owner:
        asked = 0

        async def reveal() -> Mapping[str, Any]:
            nonlocal asked
            asked += 1
            return dict(fields)

        async with leased(postgres, Credentials("db_creds", 1, reveal)) as database:
            assert await database.fetchval("SELECT 1") == 1
            before = asked
            await owner.execute("ALTER ROLE rotated PASSWORD 'second'")
            fields["password"] = "second"
            # Two at once: the second one needs a connection of its own, and with it a login.
            assert await asyncio.gather(*(database.fetchval("SELECT 1 FROM pg_sleep(0.05)") for _ in range(2))) == [
                1,
                1,
            ]
            assert asked == before + 1


async def test_a_secret_that_cannot_be_read_at_login_is_told_without_frames(postgres: Address) -> None:
    answers = iter([{"user": "ann", "password": "x"}])

    async def reveal() -> Mapping[str, Any]:
        value = CANARY
        for fields in answers:
            return fields
        raise RuntimeError(value)

    async with opened(postgres, Credentials("db_creds", 1, reveal)) as resource:
        with pytest.raises(ResourceCredentialsError, match="secret 'db_creds' could not be read") as caught:
            await resource.ping()

    assert CANARY not in shown(caught.value)
    assert caught.value.__cause__ is None
    assert caught.value.__context__ is None


async def test_nothing_that_can_be_shown_of_a_pool_holds_the_password(postgres: Address) -> None:
    async with opened(postgres, login(postgres.user, postgres.password)) as resource:
        await resource.ping()
        pool = resource._pool
        seen = [repr(resource), repr(vars(pool)), repr(pool._pool._connect_kwargs), repr(await pool._find())]

    assert postgres.password not in "".join(seen)
