"""The type ``database``: its config, its URLs, whose login it uses, and the embedded one."""

from __future__ import annotations

import asyncio
import getpass
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from databases import CANARY, Address, login, opened, shown

from kailash_nb.exceptions import ResourceConfigError, ResourceCredentialsError, SecretNotFoundError
from kailash_nb.resources.base import Credentials, Use
from kailash_nb.resources.database import DatabaseType, parse_url

GUIDE = {"host": "localhost", "port": 5432, "database": "production", "pool_size": 10}


@pytest.fixture
def postgres(services: Any) -> Address:
    return services.postgres  # type: ignore[no-any-return]


def problems(config: Mapping[str, Any]) -> str:
    with pytest.raises(ResourceConfigError) as caught:
        DatabaseType().normalise(config)
    return "; ".join(caught.value.problems)


# --- config -----------------------------------------------------------------------------------------------------------


def test_the_config_of_the_guide_is_filled_with_defaults() -> None:
    assert DatabaseType().normalise(GUIDE) == {
        "host": "localhost",
        "port": 5432,
        "database": "production",
        "user": None,
        "min_pool_size": 0,
        "max_pool_size": 10,
        "ssl": "off",
        "ssl_root_cert": None,
        "timeout": 60.0,
        "connect_timeout": 10.0,
        "acquire_timeout": 30.0,
        "application_name": "kailash_nb",
        "statement_cache_size": 100,
        "embedded": False,
    }


@pytest.mark.parametrize("config", [GUIDE, {"embedded": True}, {"host": "db", "database": "d", "max_pool_size": 2}])
def test_a_whole_config_stays_as_it_is(config: dict[str, Any]) -> None:
    whole = DatabaseType().normalise(config)

    assert DatabaseType().normalise(whole) == whole


@pytest.mark.parametrize(
    ("host", "tls"),
    [
        ("localhost", "off"),
        ("127.0.0.1", "off"),
        ("::1", "off"),
        ("db.example.com", "verify-full"),
        ("10.0.0.1", "verify-full"),
    ],
)
def test_a_login_leaves_this_machine_only_to_a_verified_server(host: str, tls: str) -> None:
    config = DatabaseType().normalise({"host": host, "database": "d"})

    assert config["ssl"] == tls
    assert DatabaseType().use(config) == Use("database", f"{host}:5432", tls)


def test_every_problem_of_a_config_is_told_at_once() -> None:
    told = problems({"hots": "db", "port": "5432", "max_pool_size": 0, "ssl": "maybe", "timeout": 0})

    assert "unknown config key 'hots'; did you mean 'host'?" in told
    assert "'port' is int" in told
    assert "'max_pool_size' is at least 1" in told
    assert "'require'" in told
    assert "'timeout' is at least 0.1 seconds" in told


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ({}, "'host' is missing"),
        ({"host": "db"}, "'database' is missing"),
        ({"host": "/run/postgresql", "database": "d"}, "not the path of a socket"),
        ({"host": "a,b", "database": "d"}, "one name or address"),
        ({"host": "user@db", "database": "d"}, "one name or address"),
        ({"host": "db", "database": "d", "port": 70000}, "at most 65535"),
        ({"host": "db", "database": "d", "min_pool_size": 6}, "min_pool_size 6 is above max_pool_size 5"),
        ({"host": "db", "database": "d", "max_pool_size": 10**9}, "at most 1000"),
        ({"host": "db", "database": "d", "pool_size": 2, "max_pool_size": 3}, "another name"),
        ({"host": "db", "database": "d", "ssl": "off", "ssl_root_cert": "ca.pem"}, "for ssl='verify-full'"),
        ({"embedded": True, "host": "db", "port": 1}, "leave out host, port"),
        ({"host": "db", "database": "d", "options": "-c x=y"}, "unknown config key 'options'"),
        ({"host": "db", "database": "d", "passfile": "/etc/pw"}, "unknown config key 'passfile'"),
    ],
)
def test_what_a_database_cannot_use_is_refused(config: dict[str, Any], told: str) -> None:
    assert told in problems(config)


# --- whose login ------------------------------------------------------------------------------------------------------


async def test_without_a_user_nothing_connects_and_the_operating_systems_user_is_not_taken() -> None:
    config = DatabaseType().normalise(GUIDE)

    with pytest.raises(ResourceCredentialsError, match="no user for database 'production' on localhost:5432") as caught:
        await DatabaseType().open(config, None)
    with pytest.raises(ResourceCredentialsError, match="secret 'db_creds' has no field 'user'"):
        await DatabaseType().open(config, login(None, CANARY))

    assert getpass.getuser() not in str(caught.value).split()


async def test_the_secrets_user_goes_before_the_configs(postgres: Address) -> None:
    credentials = login(postgres.user, postgres.password, owner="kept, not refused")

    async with opened(postgres, credentials, user="nobody_of_this_name") as resource:
        assert await resource.ping()


async def test_a_secret_may_call_the_user_username(postgres: Address) -> None:
    async with opened(postgres, login(None, postgres.password, username=postgres.user)) as resource:
        assert await resource.ping()


async def test_the_user_may_stand_in_the_config(postgres: Address) -> None:
    async with opened(postgres, login(None, postgres.password), user=postgres.user) as resource:
        assert await resource.ping()


async def test_a_field_that_is_no_text_is_named_without_its_value() -> None:
    with pytest.raises(ResourceCredentialsError, match="'user' of secret 'db_creds' is not text") as caught:
        await DatabaseType().open(DatabaseType().normalise(GUIDE), login([CANARY], CANARY))  # type: ignore[arg-type]

    assert CANARY not in shown(caught.value)


@pytest.mark.parametrize(
    ("raised", "told"),
    [
        (SecretNotFoundError("db_creds", ["other"]), "no secret 'db_creds'"),
        (ValueError(f"cannot decode {CANARY}"), r"secret 'db_creds' could not be read \(ValueError\)"),
    ],
)
async def test_a_secret_that_cannot_be_read_is_told_without_its_readers_frames(raised: Exception, told: str) -> None:
    async def reveal() -> Mapping[str, Any]:
        value = CANARY
        raise raised from RuntimeError(value)

    with pytest.raises((SecretNotFoundError, ResourceCredentialsError), match=told) as caught:
        await DatabaseType().open(DatabaseType().normalise(GUIDE), Credentials("db_creds", 1, reveal))

    assert CANARY not in shown(caught.value)
    assert caught.value.__cause__ is None
    assert caught.value.__context__ is None


async def test_a_certificate_file_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    (tmp_path / "empty.pem").touch()
    for path, told in [("missing.pem", "there is no file"), ("empty.pem", "cannot be used")]:
        config = DatabaseType().normalise({"host": "db", "database": "d", "ssl_root_cert": str(tmp_path / path)})

        with pytest.raises(ResourceConfigError, match=told) as caught:
            await DatabaseType().open(config, login("u", CANARY))
        assert path in str(caught.value)


# --- embedded ---------------------------------------------------------------------------------------------------------


async def test_an_embedded_database_is_made_when_it_is_missing_even_twice_at_once(postgres: Address) -> None:
    kind = DatabaseType()
    config = kind.normalise({"embedded": True, "database": 'my "shop"', "max_pool_size": 2})
    assert kind.use(config) is None

    resources = await asyncio.gather(*(kind.open(config, None) for _ in range(3)))

    for resource in resources:
        async with resource.lease(lambda seconds: None) as database:
            assert await database.fetchval("SELECT current_database()") == 'my "shop"'
        await resource.close()


async def test_the_embedded_database_takes_no_credentials(postgres: Address) -> None:
    with pytest.raises(ResourceConfigError, match="leave out credentials_ref"):
        await DatabaseType().open(DatabaseType().normalise({"embedded": True}), login("u", CANARY))


# --- URLs -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "config", "password"),
    [
        ("postgresql://ann@db/shop", {"user": "ann", "host": "db", "database": "shop"}, None),
        ("postgres://db:6543/shop", {"host": "db", "port": 6543, "database": "shop"}, None),
        (
            "postgresql+asyncpg://a%40b:p%2Fw%3A%25@db.example.com/my%20shop?sslmode=require",
            {"user": "a@b", "host": "db.example.com", "database": "my shop", "ssl": "require"},
            "p/w:%",
        ),
        (
            "postgresql://ann@[::1]/shop?sslmode=verify-full&sslrootcert=%2Fca.pem&connect_timeout=5&max_pool_size=7",
            {
                "user": "ann",
                "host": "::1",
                "database": "shop",
                "ssl": "verify-full",
                "ssl_root_cert": "/ca.pem",
                "connect_timeout": 5.0,
                "max_pool_size": 7,
            },
            None,
        ),
        (
            f"postgresql:///shop?host=db&user=ann&password={CANARY}&sslmode=disable",
            {"host": "db", "user": "ann", "database": "shop", "ssl": "off"},
            CANARY,
        ),
    ],
)
def test_a_url_becomes_a_config_and_a_password_apart(url: str, config: dict[str, Any], password: str | None) -> None:
    found = parse_url(url)

    assert found == (config, password)
    assert DatabaseType().normalise(found[0])["host"] == config["host"]


@pytest.mark.parametrize(
    ("url", "told"),
    [
        (f"mysql://ann:{CANARY}@db/shop", "reads postgresql://"),
        (f"ann:{CANARY}@db/shop", "reads postgresql://"),
        (f"postgresql://ann:/{CANARY}@db/shop", "percent-encoded"),
        (f"postgresql://ann:?{CANARY}@db/shop", "percent-encoded"),
        (f"postgresql://ann:#{CANARY}@db/shop", "percent-encoded"),
        (f"postgresql://ann:[{CANARY}@db/shop", "percent-encoded"),
        (f"postgresql://ann:{CANARY}@db:99999/shop", "a number from 1 to 65535"),
        (f"postgresql://ann@db:{CANARY}/shop", "a number from 1 to 65535"),
        ("postgresql://ann@db/shop?ssl_mode=require", "did you mean 'sslmode'?"),
        ("postgresql://ann@db/shop?service=prod", "unknown option 'service'"),
        ("postgresql://ann@db/shop?sslmode=prefer", "it would send the password to a server without TLS"),
        ("postgresql://ann@db/shop?connect_timeout=soon", "'connect_timeout' in the URL is a number"),
    ],
)
def test_a_url_that_cannot_be_used_is_refused_without_repeating_its_password(url: str, told: str) -> None:
    with pytest.raises(ResourceConfigError) as caught:
        parse_url(url)

    assert told in str(caught.value)
    assert CANARY not in str(caught.value)
    assert caught.value.__cause__ is None
