from __future__ import annotations

import asyncio
import math
import signal
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import redis
from caches import PASSWORD, credentials, leased, opened
from faulty_servers import Proxy, Valkey, certificate, free_port, shown

from kailash_nb.exceptions import (
    PoolExhaustedError,
    ResourceCredentialsError,
    ResourceUnavailableError,
)
from kailash_nb.resources.base import Credentials
from kailash_nb.resources.cache import CacheType
from kailash_nb.resources.cache_pool import own_timeout


@pytest.fixture(scope="module")
def valkey(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Valkey]:
    server = Valkey(tmp_path_factory.mktemp("valkey"), PASSWORD)
    yield server
    server.kill()


@pytest.fixture
def own_valkey(tmp_path: Path) -> Iterator[Valkey]:
    server = Valkey(tmp_path / "own", PASSWORD)
    yield server
    server.signal(signal.SIGCONT)
    server.kill()


@pytest.fixture
async def proxy(valkey: Valkey) -> AsyncIterator[Proxy]:
    async with Proxy(valkey.port) as proxy:
        yield proxy


@pytest.mark.parametrize(
    ("command", "seconds"),
    [
        (("GET", "k"), 0),
        (("BLPOP", "a", "b", 2), 2),
        (("brpop", "a", 0), math.inf),
        (("BLMOVE", "a", "b", "LEFT", "LEFT", 1.5), 1.5),
        (("BLMPOP", 3, 1, "a", "LEFT"), 3),
        (("BZPOPMIN", "z", 4), 4),
        (("WAIT", 1, 500), 0.5),
        (("WAIT", 1, 0), math.inf),
        (("XREAD", b"BLOCK", b"250", b"STREAMS", "s", "$"), 0.25),
        (("XREAD", b"STREAMS", "s", "0"), 0),
        (("XREADGROUP", "GROUP", "g", "c", "BLOCK", 0, "STREAMS", "s", ">"), math.inf),
        (("BLPOP", "a", "never"), 0),
        (("BLPOP",), 0),
    ],
)
def test_a_blocking_command_moves_the_deadline_by_its_own_timeout(command: tuple[Any, ...], seconds: float) -> None:
    assert own_timeout(command) == seconds


async def test_a_connection_made_while_the_pool_is_closed_is_cut(valkey: Valkey) -> None:
    asked = asyncio.Event()
    answer = asyncio.Event()

    async def reveal() -> Mapping[str, Any]:
        asked.set()
        await answer.wait()
        return {"password": PASSWORD}

    async with (
        opened(valkey.port, Credentials("c", 1, reveal)) as resource,
        resource.lease(lambda seconds: None) as cache,
    ):
        operation = asyncio.create_task(cache.get("k"))
        await asked.wait()
        await resource.close()
        answer.set()
        with pytest.raises(ResourceUnavailableError) as caught:
            await operation
        assert caught.value.outcome == "not sent"
        assert not any(c.is_connected for c in cache.connection_pool._available_connections)


async def test_an_operation_has_one_deadline_whatever_the_server_does(own_valkey: Valkey) -> None:
    async with leased(own_valkey.port, timeout=0.5) as cache:
        await cache.ping()
        own_valkey.signal(signal.SIGSTOP)
        started = time.monotonic()
        with pytest.raises(ResourceUnavailableError, match=r"GET was sent.*unknown.*0.5 s.*'timeout'") as caught:
            await cache.get("k")
        assert caught.value.outcome == "unknown"
        assert 0.4 < time.monotonic() - started < 2
        own_valkey.signal(signal.SIGCONT)
        assert await cache.get("k") is None


async def test_a_stopped_server_that_accepts_but_never_logs_in_ends_at_the_connect_timeout(own_valkey: Valkey) -> None:
    own_valkey.signal(signal.SIGSTOP)
    async with leased(own_valkey.port, timeout=30, connect_timeout=0.4) as cache:
        started = time.monotonic()
        with pytest.raises(ResourceUnavailableError) as caught:
            await cache.get("k")
        assert caught.value.outcome == "not sent"
        assert time.monotonic() - started < 3


async def test_an_unreachable_server_is_named_with_what_to_check() -> None:
    port = free_port()
    async with leased(port) as cache:
        with pytest.raises(ResourceUnavailableError) as caught:
            await cache.get("k")
        assert caught.value.outcome == "not sent"
        assert f"cache 127.0.0.1:{port}: connection refused; nothing was sent. Check host, port" in str(caught.value)


async def test_a_host_that_does_not_exist_is_said_to() -> None:
    async with leased(6379, host="no-such-host.invalid", ssl="off") as cache:
        with pytest.raises(ResourceUnavailableError, match="no such host"):
            await cache.get("k")


async def test_after_a_restart_no_operation_fails_that_starts_when_the_server_is_ready(own_valkey: Valkey) -> None:
    async with leased(own_valkey.port) as cache:
        await asyncio.gather(*(cache.incr("n") for _ in range(20)))
        await asyncio.to_thread(own_valkey.restart)
        assert sorted(await asyncio.gather(*(cache.incr("n") for _ in range(20)))) == list(range(1, 21))


async def test_a_short_restart_in_between_is_waited_for(own_valkey: Valkey) -> None:
    async with leased(own_valkey.port) as cache:
        await cache.ping()
        own_valkey.kill()
        asked = asyncio.create_task(cache.get("k"))
        await asyncio.sleep(0.06)
        await asyncio.to_thread(own_valkey.start)
        assert await asked is None


async def test_connections_reset_while_idle_are_replaced_silently(proxy: Proxy) -> None:
    async with leased(proxy.port) as cache:
        for _ in range(5):
            assert len(await asyncio.gather(*(cache.incr("reset") for _ in range(8)))) == 8
            proxy.reset()
            await asyncio.sleep(0.02)
        assert await cache.get("reset") == "40"
        await cache.delete("reset")


async def test_a_held_connection_reset_while_idle_is_an_operation_not_sent(proxy: Proxy) -> None:
    async with leased(proxy.port) as cache, cache.client() as alone:
        await alone.set("held", 1)
        proxy.reset()
        await asyncio.sleep(0.05)
        with pytest.raises(ResourceUnavailableError) as caught:
            await alone.incr("held")
        assert caught.value.outcome == "not sent"
        assert await alone.incr("held") == 2


async def test_a_connection_that_hangs_after_a_long_rest_is_replaced(
    proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with leased(proxy.port, timeout=4) as cache:
        await cache.set("rest", "1")
        proxy.freeze()
        now = time.time
        monkeypatch.setattr(time, "time", lambda: now() + 3600)
        assert await cache.get("rest") == "1"


async def test_an_increment_whose_answer_is_lost_is_not_sent_again(proxy: Proxy, valkey: Valkey) -> None:
    async with leased(proxy.port) as cache, leased(valkey.port) as straight:
        await cache.set("once", 0)
        proxy.keep_answers()
        asked = asyncio.create_task(cache.incr("once"))
        while await straight.get("once") == "0":
            await asyncio.sleep(0.01)
        proxy.reset()
        with pytest.raises(ResourceUnavailableError) as caught:
            await asked
        assert caught.value.outcome == "unknown"
        assert await straight.get("once") == "1"
        proxy.pass_answers()
        assert await cache.get("once") == "1"


async def test_a_pipeline_whose_answer_is_lost_is_not_sent_again(proxy: Proxy, valkey: Valkey) -> None:
    async with leased(proxy.port) as cache, leased(valkey.port) as straight:
        await cache.set("many", 0)
        proxy.keep_answers()
        asked = asyncio.ensure_future(cache.pipeline().incr("many").incr("many").execute())
        while await straight.get("many") == "0":
            await asyncio.sleep(0.01)
        proxy.reset()
        with pytest.raises(ResourceUnavailableError) as caught:
            await asked
        assert caught.value.outcome == "unknown"
        assert await straight.get("many") == "2"


async def test_a_pool_that_stays_busy_says_so_and_is_usable_afterwards(valkey: Valkey) -> None:
    async with opened(valkey.port, max_connections=2, timeout=0.3) as resource:
        async with resource.lease(lambda seconds: None) as cache:
            blocked = [asyncio.create_task(cache.blpop(["nothing"], timeout=30)) for _ in range(2)]
            await asyncio.sleep(0.1)
            assert resource.statistics()["active_connections"] == 2
            asked = asyncio.create_task(cache.get("k"))
            await asyncio.sleep(0.05)
            assert resource.statistics()["waiting"] == 1
            with pytest.raises(PoolExhaustedError, match=r"all 2 connections stayed busy for 0.3 s.*'max_connections'"):
                await asked
            for task in blocked:
                task.cancel()
            await asyncio.gather(*blocked, return_exceptions=True)
            assert await cache.get("k") is None
        assert resource.statistics()["active_connections"] == 0


async def test_waiting_for_a_connection_is_told(valkey: Valkey) -> None:
    told: list[float] = []
    async with opened(valkey.port, max_connections=1) as resource, resource.lease(told.append) as cache:
        await cache.ping()
        told.clear()
        await asyncio.gather(cache.blpop(["nothing"], timeout=0.5), cache.ping())
        assert len(told) == 1
        assert 0.3 < told[0] < 3


async def test_a_server_that_takes_few_clients_makes_the_pool_smaller(tmp_path: Path) -> None:
    server = Valkey(tmp_path / "few", PASSWORD, "maxclients 5")
    try:
        async with leased(server.port, max_connections=12, timeout=20) as cache:
            answers = await asyncio.gather(*(cache.blpop(["nothing"], timeout=0.2) for _ in range(12)))
            assert answers == [None] * 12
    finally:
        server.kill()


async def test_cancelled_operations_leave_the_pool_usable(valkey: Valkey) -> None:
    async with opened(valkey.port, max_connections=3) as resource:
        async with resource.lease(lambda seconds: None) as cache:
            for delay in range(60):
                tasks = [asyncio.create_task(cache.set(f"c{i}", i)) for i in range(6)]
                pipes = [asyncio.ensure_future(cache.pipeline().get("c1").execute()) for _ in range(3)]
                await asyncio.sleep(delay * 0.0001)
                for task in (*tasks, *pipes):
                    task.cancel()
                await asyncio.gather(*tasks, *pipes, return_exceptions=True)
            values = [str(i) for i in range(20)]
            await asyncio.gather(*(cache.set(f"d{v}", v) for v in values))
            assert await asyncio.gather(*(cache.get(f"d{v}") for v in values)) == values
        figures = resource.statistics()
        assert (figures["active_connections"], figures["waiting"]) == (0, 0)


async def test_closing_ends_operations_under_way_at_once(own_valkey: Valkey) -> None:
    async with opened(own_valkey.port) as resource, resource.lease(lambda seconds: None) as cache:
        asked = [asyncio.create_task(cache.blpop(["nothing"], timeout=0)) for _ in range(5)]
        await asyncio.sleep(0.2)
        own_valkey.signal(signal.SIGSTOP)
        started = time.monotonic()
        await resource.close()
        for error in await asyncio.gather(*asked, return_exceptions=True):
            assert isinstance(error, ResourceUnavailableError)
            assert error.outcome == "unknown"
        with pytest.raises(ResourceUnavailableError, match="was closed; nothing was sent"):
            await cache.get("k")
        assert time.monotonic() - started < 2
        await resource.close()


# Login


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"password": "canary-wrong"},
            "refused the login. Check the fields 'password' and 'user' of secret 'cache_cr",
        ),
        ({"password": PASSWORD, "user": "canary-nobody"}, "refused the login"),
        ({"password": "canary-\udcff"}, "refused the login"),
    ],
)
async def test_a_wrong_login_names_the_secret_and_shows_no_value(
    valkey: Valkey, fields: dict[str, Any], message: str
) -> None:
    async with leased(valkey.port, credentials(**fields)) as cache:
        started = time.monotonic()
        with pytest.raises(ResourceUnavailableError) as caught:
            await cache.get("k")
        assert time.monotonic() - started < 3
    assert caught.value.outcome == "answered"
    assert message in str(caught.value)
    assert "canary" not in shown(caught.value)
    assert caught.value.__context__ is None


async def test_a_server_that_quotes_the_login_in_its_error_is_not_quoted() -> None:
    async def quote(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        data = await reader.read(4096)
        writer.write(b"-ERR unknown command, args: " + data.replace(b"\r\n", b" ") + b"\r\n")
        await writer.drain()
        await reader.read(4096)
        writer.close()

    server = await asyncio.start_server(quote, "127.0.0.1", 0)
    async with leased(server.sockets[0].getsockname()[1]) as cache:
        with pytest.raises(ResourceUnavailableError) as caught:
            await cache.get("k")
    server.close()
    assert "canary" not in shown(caught.value)


async def test_a_server_that_wants_a_login_says_how_to_give_one(valkey: Valkey) -> None:
    kind = CacheType()
    resource = await kind.open(kind.normalise({"host": "127.0.0.1", "port": valkey.port}), None)
    with pytest.raises(ResourceUnavailableError, match=r"asks for a login.*credentials_ref='NAME'") as caught:
        await resource.ping()
    assert caught.value.outcome == "answered"
    await resource.close()


async def test_a_server_without_a_password_says_to_leave_the_secret_out(tmp_path: Path) -> None:
    server = Valkey(tmp_path / "open")
    try:
        async with leased(server.port) as cache:
            with pytest.raises(ResourceUnavailableError, match=r"takes no password.*'cache_creds'"):
                await cache.get("k")
    finally:
        server.kill()


async def test_a_secret_without_a_password_names_the_fields_it_has(valkey: Valkey) -> None:
    async with leased(valkey.port, credentials(token="canary")) as cache:
        with pytest.raises(ResourceCredentialsError, match=r"no field 'password' \(it has token\)") as caught:
            await cache.get("k")
    assert "canary" not in shown(caught.value)


async def test_a_database_that_does_not_exist_is_said_to(valkey: Valkey) -> None:
    async with leased(valkey.port, db=99) as cache:
        with pytest.raises(ResourceUnavailableError, match="no database 99"):
            await cache.get("k")


async def test_the_login_is_asked_for_at_each_connect_and_a_failed_one_leaves_no_half_open_connection(
    own_valkey: Valkey,
) -> None:
    asked = 0

    async def reveal() -> Mapping[str, Any]:
        nonlocal asked
        asked += 1
        if asked == 1:
            raise ResourceCredentialsError("not now")
        return {"username": "default", "password": PASSWORD}

    async with leased(own_valkey.port, Credentials("c", 1, reveal), max_connections=1) as cache:
        with pytest.raises(ResourceCredentialsError, match="not now"):
            await cache.get("k")
        assert await cache.get("k") is None
        assert asked == 2
        await asyncio.to_thread(own_valkey.restart)
        assert await cache.get("k") is None
        assert asked == 3


async def test_the_users_of_the_access_list_log_in_by_name(valkey: Valkey) -> None:
    async with leased(valkey.port) as cache:
        await cache.acl_setuser("ann", enabled=True, passwords=["+ann-password"], keys=["a*"], commands=["+get"])
    login = credentials(user="ann", password="ann-password")
    async with opened(valkey.port, login) as resource, resource.lease(lambda seconds: None) as cache:
        assert await cache.get("a1") is None
        with pytest.raises(redis.ResponseError):
            await cache.get("b1")


async def test_the_password_is_not_sent_to_a_server_that_speaks_no_tls(proxy: Proxy) -> None:
    async with leased(proxy.port, ssl="verify-full", connect_timeout=0.5) as cache:
        with pytest.raises(ResourceUnavailableError) as caught:
            await cache.get("k")
    assert caught.value.outcome == "not sent"
    assert PASSWORD.encode() not in proxy.sent


async def test_tls_checks_the_certificate_or_only_encrypts_as_told(
    valkey: Valkey, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    context, authority = certificate(tmp_path)
    async with Proxy(valkey.port, context) as proxy:
        async with leased(proxy.port, ssl="require") as cache:
            assert await cache.ping() is True
        proxy.sent = b""
        async with leased(proxy.port, ssl="verify-full") as cache:
            with pytest.raises(ResourceUnavailableError, match=r"certificate was not accepted.*nothing was sent"):
                await cache.get("k")
        assert proxy.sent == b""
        monkeypatch.setenv("SSL_CERT_FILE", str(authority))
        async with leased(proxy.port, ssl="verify-full") as cache:
            assert await cache.ping() is True
        async with leased(proxy.port, host="localhost", ssl="verify-full") as cache:
            with pytest.raises(ResourceUnavailableError, match="certificate was not accepted"):
                await cache.get("k")
