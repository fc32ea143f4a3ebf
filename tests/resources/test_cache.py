from __future__ import annotations

import asyncio
import gc
import os
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import redis
from caches import PASSWORD, credentials, leased, opened
from faulty_servers import Valkey
from services import Services

from kailash_nb.exceptions import (
    ResourceConfigError,
    ResourceUnavailableError,
)
from kailash_nb.resources.base import Use
from kailash_nb.resources.cache import CacheType


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


# Config


def test_the_config_is_completed_with_defaults() -> None:
    assert CacheType().normalise({"host": "cache.example.com"}) == {
        "host": "cache.example.com",
        "port": 6379,
        "db": 0,
        "decode_responses": True,
        "ssl": "verify-full",
        "timeout": 5.0,
        "connect_timeout": 5.0,
        "max_connections": 10,
        "embedded": False,
    }


def test_normalising_twice_changes_nothing() -> None:
    kind = CacheType()
    for config in ({"host": "h"}, {"host": "localhost", "pool_size": 3, "timeout": 2}, {"embedded": True}):
        once = kind.normalise(config)
        assert kind.normalise(once) == once


@pytest.mark.parametrize(
    ("host", "ssl"),
    [("localhost", "off"), ("127.0.0.1", "off"), ("::1", "off"), ("10.0.0.1", "verify-full"), ("x.y", "verify-full")],
)
def test_tls_is_the_default_off_the_loopback(host: str, ssl: str) -> None:
    assert CacheType().use(CacheType().normalise({"host": host})) == Use("cache", f"{host}:6379", ssl)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "'host' is missing"),
        ({"hots": "x"}, "unknown config key 'hots'; did you mean 'host'"),
        ({"host": "/tmp/redis.sock"}, "one name or address alone"),
        ({"host": "x", "port": "6379"}, "'port' is int"),
        ({"host": "x", "port": 70000}, "'port' is at most 65535"),
        ({"host": "x", "ssl": "yes"}, "'ssl' is one of"),
        ({"host": "x", "timeout": 0}, "at least 0.01 seconds"),
        ({"host": "x", "pool_size": 2, "max_connections": 3}, "another name of"),
        ({"embedded": True, "host": "x"}, "leave out host"),
        ({"host": "x", "unix_socket_path": "/tmp/s"}, "unknown config key"),
    ],
)
def test_a_wrong_config_is_refused_with_the_remedy(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ResourceConfigError, match=message):
        CacheType().normalise(config)


async def test_the_embedded_cache_takes_no_credentials() -> None:
    with pytest.raises(ResourceConfigError, match="leave out credentials_ref"):
        await CacheType().open(CacheType().normalise({"embedded": True}), credentials())


async def test_the_embedded_cache_needs_no_more_and_is_back_after_a_crash(services: Services) -> None:
    kind = CacheType()
    resource = await kind.open(kind.normalise({"embedded": True, "timeout": 30}), None)
    async with resource.lease(lambda seconds: None) as cache:
        assert (await resource.ping()).startswith("Valkey ")
        assert cache.connection_pool.connection_kwargs["port"] == services.valkey.port
        for _ in range(2):
            os.kill((await cache.info("server"))["process_id"], signal.SIGKILL)
            with suppress(ResourceUnavailableError):
                await cache.get("k")
            assert await cache.get("k") is None
        assert services.valkey.password not in repr((cache, resource, vars(resource)))
    await resource.close()


# Use


async def test_the_commands_of_redis_py_work(valkey: Valkey) -> None:
    async with leased(valkey.port) as cache:
        assert await cache.set("k", "v") is True
        assert await cache.get("k") == "v"
        assert await cache.delete("k") == 1
        await cache.hset("h", mapping={"a": 1})
        assert await cache.hgetall("h") == {"a": "1"}
        assert [key async for key in cache.scan_iter("h*")] == ["h"]
        await cache.delete("h")


async def test_bytes_come_back_where_responses_are_not_decoded(valkey: Valkey) -> None:
    async with leased(valkey.port, decode_responses=False) as cache:
        await cache.set("b", b"\xff\x00")
        assert await cache.get("b") == b"\xff\x00"


async def test_a_binary_value_read_as_text_names_the_remedy(valkey: Valkey) -> None:
    async with leased(valkey.port) as cache:
        await cache.set("b", b"\xff\x00")
        with pytest.raises(UnicodeDecodeError) as caught:
            await cache.get("b")
        assert "'decode_responses' to False" in "".join(caught.value.__notes__)
        assert await cache.exists("b") == 1


async def test_setex_and_hmset_work_without_a_deprecation_warning(valkey: Valkey) -> None:
    async with leased(valkey.port) as cache:
        assert await cache.setex("s", 100, "v") is True
        await cache.setex("t", timedelta(minutes=2), "v")
        assert (await cache.ttl("s"), await cache.ttl("t")) == (100, 120)
        assert await cache.hmset("hm", {"a": 1, "b": 2}) is True
        answers = await cache.pipeline().setex("p", 50, "v").hmset("hm", {"c": 3}).ttl("p").hlen("hm").execute()
        assert answers == [True, True, 50, 3]


async def test_pipelines_and_transactions_work(valkey: Valkey) -> None:
    async with leased(valkey.port) as cache:
        async with cache.pipeline() as pipe:
            assert await pipe.set("n", 1).incr("n").execute() == [True, 2]
        async with cache.pipeline() as pipe:
            await pipe.watch("n")
            pipe.multi()
            await cache.set("n", 5)
            pipe.incr("n")
            with pytest.raises(redis.WatchError):
                await pipe.execute()

        async def double(pipe: Any) -> None:
            value = int(await pipe.get("n"))
            pipe.multi()
            pipe.set("n", value * 2)

        await cache.transaction(double, "n")
        assert await cache.get("n") == "10"


async def test_a_lock_and_a_single_connection_client_work(valkey: Valkey) -> None:
    async with leased(valkey.port) as cache:
        async with cache.lock("lock", timeout=5):
            assert not await cache.lock("lock", timeout=5).acquire(blocking=False)
        async with cache.client() as alone:
            assert await alone.client_id() == await alone.client_id()


async def test_a_subscription_receives_what_is_published(valkey: Valkey) -> None:
    async with leased(valkey.port) as cache, cache.pubsub(ignore_subscribe_messages=True) as subscription:
        await subscription.subscribe("news")
        await subscription.get_message(timeout=5)
        await cache.publish("news", "hello")
        message = await subscription.get_message(timeout=5)
        assert message and message["data"] == "hello"


async def test_an_error_of_the_server_stays_the_error_of_redis_py(valkey: Valkey) -> None:
    async with leased(valkey.port) as cache:
        await cache.set("word", "x")
        with pytest.raises(redis.ResponseError, match="not an integer"):
            await cache.incr("word")


async def test_a_blocking_command_may_take_longer_than_the_deadline(valkey: Valkey) -> None:
    async with leased(valkey.port, timeout=0.3) as cache:
        started = time.monotonic()
        assert await cache.blpop(["empty"], timeout=1) is None
        assert time.monotonic() - started > 0.9
        assert await cache.xread({"stream": "$"}, block=500) in ([], {}, None)

        async def later() -> None:
            await asyncio.sleep(0.6)
            await cache.rpush("queue", "x")

        pushed = asyncio.create_task(later())
        assert list(await cache.blpop(["queue"], timeout=0)) == ["queue", "x"]
        await pushed


async def test_the_database_number_is_kept(valkey: Valkey) -> None:
    async with leased(valkey.port) as zero, leased(valkey.port, db=3) as three:
        await three.set("only", "three")
        assert (await zero.get("only"), await three.get("only")) == (None, "three")


async def test_what_a_node_left_open_is_closed_when_it_ends(valkey: Valkey) -> None:
    async with opened(valkey.port, max_connections=3) as resource:
        for _ in range(3):
            async with resource.lease(lambda seconds: None) as cache:
                await cache.pubsub().subscribe("news")
                await cache.pipeline().watch("k")
                await cache.client().ping()
                gc.collect()
                assert resource.statistics()["active_connections"] == 3
            assert resource.statistics()["active_connections"] == 0


async def test_a_subscription_survives_a_restart_of_the_server(own_valkey: Valkey) -> None:
    async with leased(own_valkey.port) as cache, cache.pubsub(ignore_subscribe_messages=True) as subscription:
        await subscription.subscribe("news")
        await subscription.get_message(timeout=5)
        heard = asyncio.ensure_future(anext(subscription.listen()))
        await asyncio.sleep(0.1)
        await asyncio.to_thread(own_valkey.restart)
        while not heard.done() and not await cache.publish("news", "again"):
            await asyncio.sleep(0.05)
        assert (await asyncio.wait_for(heard, 10))["data"] == "again"


# Health


async def test_a_ping_tells_the_version_and_the_figures(valkey: Valkey) -> None:
    async with opened(valkey.port, pool_size=4) as resource:
        async with resource.lease(lambda seconds: None) as cache:
            await cache.set("hit", 1)
            await cache.get("hit")
        assert (await resource.ping()).startswith("Valkey 9.")
        figures = resource.statistics()
        assert figures["pool_size"] == 4
        assert figures["active_connections"] == figures["waiting"] == 0
        assert 0 < figures["hit_rate"] <= 1
        assert figures["memory_usage_mb"] > 0.1
        assert 0 < figures["avg_response_time_ms"] < 5000


async def test_nothing_shows_the_password(valkey: Valkey) -> None:
    async with opened(valkey.port) as resource, resource.lease(lambda seconds: None) as cache:
        await cache.ping()
        pool = cache.connection_pool
        connection = pool._available_connections[0]
        shown = [repr(x) for x in (cache, pool, resource, connection, vars(pool), vars(connection), cache.pipeline())]
        assert f"127.0.0.1:{valkey.port}, 0 of 10 connections in use" in shown[0]
        assert PASSWORD not in "".join(shown)


async def test_the_environment_is_not_read(valkey: Valkey, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("REDIS_URL", "REDISCLI_AUTH", "VALKEYCLI_AUTH"):
        monkeypatch.setitem(os.environ, name, "redis://:canary@127.0.0.1:1/0")
    async with leased(valkey.port) as cache:
        assert await cache.ping() is True
