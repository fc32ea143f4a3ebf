from __future__ import annotations

import asyncio
import copy
import json
import pickle
import socket
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from faulty_servers import HttpServer, Proxy, Request, answer, certificate, free_port, sends, shown

from kailash_nb.exceptions import (
    PoolExhaustedError,
    ResourceConfigError,
    ResourceCredentialsError,
    ResourceUnavailableError,
)
from kailash_nb.resources.base import Credentials, Use
from kailash_nb.resources.http_client import HttpClient, HttpClientType, HttpResource

TOKEN = "canary-sk-1234567890"


@pytest.fixture
async def server() -> AsyncIterator[HttpServer]:
    async with HttpServer(
        {"/orders": sends([{"id": 1}, {"id": 2}]), "/me": sends({"name": "ann", "tags": ["a"]})}
    ) as it:
        yield it


@pytest.fixture
async def stranger() -> AsyncIterator[HttpServer]:
    async with HttpServer({"/steal": sends({})}) as it:
        yield it


def credentials(**fields: Any) -> Credentials:
    async def reveal() -> Mapping[str, Any]:
        return fields or {"api_key": TOKEN}

    return Credentials("api_creds", 1, reveal)


@asynccontextmanager
async def opened(base_url: str, login: Credentials | None = None, **config: Any) -> AsyncIterator[HttpResource]:
    kind = HttpClientType()
    resource = await kind.open(kind.normalise({"base_url": base_url, **config}), login)
    try:
        yield resource
    finally:
        await resource.close()


@asynccontextmanager
async def leased(base_url: str, login: Credentials | None = None, **config: Any) -> AsyncIterator[HttpClient]:
    async with opened(base_url, login, **config) as resource, resource.lease(lambda seconds: None) as api:
        yield api


# Config


def test_the_config_is_completed_with_defaults() -> None:
    assert HttpClientType().normalise({"base_url": "HTTPS://API.example.com:443/v1/", "timeout": 9}) == {
        "base_url": "https://api.example.com/v1",
        "headers": {},
        "timeout": 9.0,
        "connect_timeout": 5.0,
        "retries": 2,
        "max_connections": 20,
        "auth": None,
        "auth_header": None,
        "ssl": "verify-full",
    }


def test_normalising_twice_changes_nothing() -> None:
    kind = HttpClientType()
    for config in (
        {"base_url": "http://[::1]:8000"},
        {"base_url": "https://x.example/a%20b/", "auth_header": "X-Token", "headers": {"User-Agent": "shop/1.0"}},
    ):
        once = kind.normalise(config)
        assert kind.normalise(once) == once


@pytest.mark.parametrize(
    ("base_url", "use"),
    [
        ("https://api.example.com/v1", Use("http_client", "https://api.example.com", "verify-full")),
        ("http://localhost:8000", Use("http_client", "http://localhost:8000", "off")),
        ("http://[::1]:8000", Use("http_client", "http://[::1]:8000", "off")),
    ],
)
def test_the_login_is_bound_to_the_origin(base_url: str, use: Use) -> None:
    kind = HttpClientType()
    assert kind.use(kind.normalise({"base_url": base_url})) == use


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "'base_url' is missing"),
        ({"base_url": "ftp://x"}, "is an http or https URL"),
        ({"base_url": "example.com"}, "is an http or https URL"),
        ({"base_url": "https://me:canary@x.example"}, "holds a login; store it"),
        ({"base_url": "https://x.example/?api_key=canary"}, "pass what follows"),
        ({"base_url": "https://x.example", "header": {}}, "did you mean 'headers'"),
        ({"base_url": "https://x.example", "headers": {"A B": "x"}}, "no name of an HTTP header"),
        ({"base_url": "https://x.example", "headers": {"A": "x\r\ny"}}, "no printable ASCII"),
        ({"base_url": "https://x.example", "headers": {"A": 1}}, "no printable ASCII"),
        ({"base_url": "https://x.example", "auth": "digest"}, "'auth' is one of"),
        ({"base_url": "https://x.example", "auth": "basic", "auth_header": "X"}, "goes with auth 'header'"),
        ({"base_url": "http://x.example", "ssl": "verify-full"}, "not https"),
        ({"base_url": "https://x.example", "retries": -1}, "at least 0"),
    ],
)
def test_a_wrong_config_is_refused_with_the_remedy(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ResourceConfigError, match=message) as caught:
        HttpClientType().normalise(config)
    assert "canary" not in str(caught.value)


# Use


async def test_json_may_be_awaited_or_not(server: HttpServer) -> None:
    async with leased(server.url) as api:
        response = await api.get("/orders")
        plain = [{"id": 1}, {"id": 2}]
        assert response.json() == plain
        assert await response.json() == plain
        assert type(await response.json()) is list
        person = (await api.get("/me")).json()
        assert isinstance(person, dict)
        assert type(await person) is dict
        assert (person["name"], (await person)["tags"]) == ("ann", ["a"])


async def test_awaitable_json_behaves_like_plain_json(server: HttpServer) -> None:
    async with leased(server.url) as api:
        for path in ("/orders", "/me"):
            value = (await api.get(path)).json()
            plain = await value
            assert json.loads(json.dumps(value)) == plain
            for copied in (pickle.loads(pickle.dumps(value)), copy.copy(value), copy.deepcopy(value)):
                assert type(copied) is type(plain)
                assert copied == plain
        pandas = pytest.importorskip("pandas")
        assert list(pandas.DataFrame((await api.get("/orders")).json())["id"]) == [1, 2]


async def test_a_scalar_is_plain(server: HttpServer) -> None:
    server.routes["/null"] = sends(None)
    server.routes["/number"] = sends(3)
    async with leased(server.url) as api:
        assert (await api.get("/null")).json() is None
        assert (await api.get("/number")).json() == 3


async def test_the_config_reaches_the_wire(server: HttpServer) -> None:
    async with leased(f"{server.url}/v1", headers={"User-Agent": "shop/1.0"}) as api:
        response = await api.get("/things", params={"limit": 3})
        assert response.status_code == 404
        with pytest.raises(httpx.HTTPStatusError):
            response.raise_for_status()
    assert (server.requests[0].target, server.requests[0].headers["user-agent"]) == ("/v1/things?limit=3", "shop/1.0")


async def test_nodes_share_connections_but_neither_cookies_nor_headers(server: HttpServer) -> None:
    async def login(request: Request, writer: asyncio.StreamWriter) -> None:
        answer(writer, "200 OK", b"", "set-cookie: session=ann")

    server.routes["/login"] = login
    async with opened(server.url) as resource:
        async with resource.lease(lambda seconds: None) as first:
            await first.post("/login")
            first.headers["X-Mine"] = "1"
            await first.get("/me")
        async with resource.lease(lambda seconds: None) as second:
            await second.get("/me")
    assert server.accepted == 1
    assert server.requests[1].headers["cookie"] == "session=ann"
    assert server.requests[1].headers["x-mine"] == "1"
    assert not {"cookie", "x-mine"} & server.requests[2].headers.keys()


async def test_a_node_may_use_the_client_as_a_context_manager_and_go_on(server: HttpServer) -> None:
    async with leased(server.url) as api:
        for _ in range(2):
            async with api as client:
                assert (await client.get("/me")).status_code == 200
        assert (await api.get("/me")).status_code == 200


# Login


@pytest.mark.parametrize(
    ("config", "fields", "header", "value"),
    [
        ({}, {"token": "t-1"}, "authorization", "Bearer t-1"),
        ({}, {"api_key": "k-1", "api_secret": "s"}, "authorization", "Bearer k-1"),
        ({}, {"user": "ann", "password": "pä"}, "authorization", "Basic YW5uOnDDpA=="),
        ({"auth": "basic"}, {"username": "ann", "password": "p", "token": "t"}, "authorization", "Basic YW5uOnA="),
        ({"auth": "header"}, {"api_key": "k-1"}, "x-api-key", "k-1"),
        ({"auth_header": "X-Token"}, {"token": "t-1"}, "x-token", "t-1"),
    ],
)
async def test_the_login_is_sent_as_configured(
    server: HttpServer, config: dict[str, Any], fields: dict[str, Any], header: str, value: str
) -> None:
    async with leased(server.url, credentials(**fields), **config) as api:
        response = await api.get("/me")
        assert header not in response.request.headers
    assert server.requests[0].headers[header] == value


@pytest.mark.parametrize("config", [{}, {"auth": "header"}])
async def test_the_login_goes_to_no_other_origin(
    server: HttpServer, stranger: HttpServer, config: dict[str, Any]
) -> None:
    async with leased(server.url, credentials(), **config) as api:
        await api.get(f"{stranger.url}/steal")
        await api.get(f"http://localhost:{stranger.port}/steal")
        await api.get(f"//127.0.0.1:{stranger.port}/steal", headers={"Host": f"127.0.0.1:{server.port}"})
        await api.get(server.url + "/me")
        with pytest.raises((httpx.UnsupportedProtocol, httpx.InvalidURL)):
            await api.get("ftp://x.example/steal")
    assert [TOKEN in str(r.headers) for r in stranger.requests] == [False] * len(stranger.requests)
    assert len(stranger.requests) >= 2
    assert TOKEN in str(server.requests[0].headers)


@pytest.mark.parametrize("config", [{}, {"auth": "header"}])
async def test_a_redirect_is_not_followed_and_followed_on_demand_without_the_login(
    server: HttpServer, stranger: HttpServer, config: dict[str, Any]
) -> None:
    async def away(request: Request, writer: asyncio.StreamWriter) -> None:
        answer(writer, "302 Found", b"", f"location: {stranger.url}/steal")

    async def home(request: Request, writer: asyncio.StreamWriter) -> None:
        answer(writer, "302 Found", b"", "location: /me")

    server.routes |= {"/away": away, "/home": home}
    async with leased(server.url, credentials(), **config) as api:
        assert (await api.get("/away")).status_code == 302
        assert not stranger.requests
        assert (await api.get("/away", follow_redirects=True)).status_code == 200
        assert (await api.get("/home", follow_redirects=True)).json()["name"] == "ann"
    assert TOKEN not in str(stranger.requests[0].headers)
    assert [r.target for r in server.requests if TOKEN in str(r.headers)] == ["/away", "/away", "/home", "/me"]


async def test_a_proxy_of_the_environment_gets_nothing(
    server: HttpServer, stranger: HttpServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, stranger.url)
    async with leased(server.url, credentials()) as api:
        assert (await api.get("/me")).status_code == 200
        with pytest.raises(ResourceUnavailableError):
            await api.get(f"https://127.0.0.1:{free_port()}/")
    assert stranger.accepted == 0


async def test_netrc_is_not_read(server: HttpServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / ".netrc").write_text("machine 127.0.0.1 login canary password canary")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / ".netrc"))
    async with leased(server.url) as api:
        await api.get("/me")
    assert "authorization" not in server.requests[0].headers


async def test_a_header_of_the_node_itself_goes_before_the_login(server: HttpServer) -> None:
    async with leased(server.url, credentials()) as api:
        await api.get("/me", headers={"Authorization": "Bearer mine"})
    assert server.requests[0].headers["authorization"] == "Bearer mine"


@pytest.mark.parametrize(
    ("config", "fields", "message"),
    [
        ({}, {"pin": "canary"}, r"'api_creds' has no 'token' or 'api_key', nor 'user' and 'password' \(it has pin\)"),
        ({"auth": "basic"}, {"token": "canary"}, "has no 'user' and 'password'"),
        ({"auth": "bearer"}, {"user": "u", "password": "canary"}, "has none of the fields"),
        ({}, {"token": "canary\n"}, "characters that no HTTP header may hold"),
    ],
)
async def test_a_secret_that_does_not_fit_is_explained_without_its_values(
    server: HttpServer, config: dict[str, Any], fields: dict[str, Any], message: str
) -> None:
    async with leased(server.url, credentials(**fields), **config) as api:
        with pytest.raises(ResourceCredentialsError, match=message) as caught:
            await api.get("/me")
    assert "canary" not in shown(caught.value)
    assert not server.requests


async def test_no_error_and_no_object_shows_the_login(server: HttpServer) -> None:
    async def cut(request: Request, writer: asyncio.StreamWriter) -> None:
        writer.transport.abort()

    async def slow(request: Request, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(5)

    server.routes |= {"/cut": cut, "/slow": slow}
    async with opened(server.url, credentials(), auth="header", timeout=0.3) as resource:  # noqa: SIM117
        async with resource.lease(lambda seconds: None) as api:
            response = await api.get("/me")
            for path in ("/cut", "/slow"):
                with pytest.raises(ResourceUnavailableError) as caught:
                    await api.get(path)
                assert "canary" not in shown(caught.value)
            with pytest.raises(httpx.LocalProtocolError) as mistake:
                await api.get("/me", headers={"X-Bad": "a\nb"})
            assert "canary" not in shown(mistake.value)
            shown_objects = (response, response.request, response.request.headers, api, api.headers, resource.login)
            assert "canary" not in "".join(map(repr, (*shown_objects, vars(resource), vars(api))))
    assert "canary" in str(server.requests[0].headers)


# Faults


async def test_an_unreachable_server_is_named_with_what_to_check() -> None:
    port = free_port()
    async with leased(f"http://127.0.0.1:{port}/secret-path", retries=1) as api:
        with pytest.raises(ResourceUnavailableError) as caught:
            await api.get("/x?token=canary")
    assert caught.value.outcome == "not sent"
    assert str(caught.value).startswith(f"http_client http://127.0.0.1:{port}: connection refused; nothing was sent.")
    assert "canary" not in str(caught.value)


async def test_a_host_that_does_not_exist_is_said_to() -> None:
    async with leased("http://no-such-host.invalid", retries=0) as api:
        with pytest.raises(ResourceUnavailableError, match="no such host"):
            await api.get("/")


async def test_connecting_is_tried_again() -> None:
    port = free_port()
    async with leased(f"http://127.0.0.1:{port}", retries=5) as api:
        asked = asyncio.create_task(api.post("/me", json={"n": 1}))
        await asyncio.sleep(0.15)
        async with HttpServer({"/me": sends({})}, port=port) as server:
            assert (await asked).status_code == 200
            assert server.requests[0].body == b'{"n":1}'


async def test_what_was_sent_is_not_sent_again(server: HttpServer) -> None:
    async def cut(request: Request, writer: asyncio.StreamWriter) -> None:
        writer.transport.abort()

    server.routes["/pay"] = cut
    async with leased(server.url, retries=5) as api:
        with pytest.raises(ResourceUnavailableError) as caught:
            await api.post("/pay")
    assert caught.value.outcome == "unknown"
    assert len(server.requests) == 1


async def test_a_dripping_body_ends_at_the_deadline(server: HttpServer) -> None:
    async def drip(request: Request, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 1000\r\n\r\n")
        for _ in range(1000):
            writer.write(b"x")
            await writer.drain()
            await asyncio.sleep(0.02)

    server.routes["/drip"] = drip
    async with opened(server.url, timeout=0.4) as resource, resource.lease(lambda seconds: None) as api:
        started = time.monotonic()
        with pytest.raises(ResourceUnavailableError, match=r"no whole answer within 0.4 s.*'timeout'") as caught:
            await api.get("/drip")
        assert caught.value.outcome == "unknown"
        assert time.monotonic() - started < 2
        assert resource.statistics()["active_connections"] == 0
        with pytest.raises(ResourceUnavailableError, match=r"within 0.1 s"):
            await api.get("/drip", timeout=0.1)
        assert (await api.get("/me")).status_code == 200


async def test_a_streamed_body_may_take_longer_than_the_deadline_but_each_part_may_not(server: HttpServer) -> None:
    async def parts(request: Request, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 6\r\n\r\n")
        for _ in range(5):
            writer.write(b"x")
            await writer.drain()
            await asyncio.sleep(0.15)
        await asyncio.sleep(5)

    server.routes["/parts"] = parts
    async with leased(server.url, timeout=0.5) as api:
        received = b""

        async def receive() -> None:
            nonlocal received
            async with api.stream("GET", "/parts") as response:
                async for part in response.aiter_bytes():
                    received += part

        with pytest.raises(ResourceUnavailableError, match="the answer stopped") as caught:
            await receive()
        assert (caught.value.outcome, received) == ("unknown", b"xxxxx")


async def test_a_body_that_breaks_off_is_an_unknown_outcome(server: HttpServer) -> None:
    async def short(request: Request, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\nabc")
        await writer.drain()
        writer.close()

    server.routes["/short"] = short
    async with opened(server.url) as resource, resource.lease(lambda seconds: None) as api:
        with pytest.raises(ResourceUnavailableError) as caught:
            await api.get("/short")
        assert caught.value.outcome == "unknown"
        assert resource.statistics()["active_connections"] == 0


async def test_a_server_that_does_not_accept_ends_at_the_connect_timeout() -> None:
    with socket.socket() as full:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        port = full.getsockname()[1]
        others = [socket.socket() for _ in range(4)]
        for other in others:
            other.setblocking(False)
            other.connect_ex(("127.0.0.1", port))
        async with leased(f"http://127.0.0.1:{port}", connect_timeout=0.3, timeout=20) as api:
            started = time.monotonic()
            with pytest.raises(ResourceUnavailableError, match="no connection in time") as caught:
                await api.get("/")
            assert caught.value.outcome == "not sent"
            assert time.monotonic() - started < 3
        for other in others:
            other.close()


async def test_a_pool_that_stays_busy_says_so(server: HttpServer) -> None:
    async def slow(request: Request, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(1)
        answer(writer, "200 OK")

    server.routes["/slow"] = slow
    async with opened(server.url, max_connections=2) as resource, resource.lease(lambda seconds: None) as api:
        busy = [asyncio.create_task(api.get("/slow")) for _ in range(2)]
        await asyncio.sleep(0.2)
        asked = asyncio.create_task(api.get("/me", timeout=0.3))
        await asyncio.sleep(0.1)
        figures = resource.statistics()
        assert (figures["pool_size"], figures["active_connections"], figures["waiting"]) == (2, 2, 1)
        with pytest.raises(PoolExhaustedError, match=r"all 2 connections stayed busy for 0.3 s.*'max_connections'"):
            await asked
        assert [r.status_code for r in await asyncio.gather(*busy)] == [200, 200]
        assert (await api.get("/me")).status_code == 200


async def test_waiting_for_a_connection_is_told(server: HttpServer) -> None:
    async def slow(request: Request, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(0.4)
        answer(writer, "200 OK")

    server.routes["/slow"] = slow
    told: list[float] = []
    async with opened(server.url, max_connections=1) as resource, resource.lease(told.append) as api:
        await asyncio.gather(api.get("/slow"), api.get("/me"))
        assert 0.3 < max(told) < 3


async def test_cancelled_requests_leave_the_pool_usable(server: HttpServer) -> None:
    async with opened(server.url, max_connections=3) as resource, resource.lease(lambda seconds: None) as api:
        for delay in range(40):
            tasks = [asyncio.create_task(api.get("/orders")) for _ in range(6)]
            await asyncio.sleep(delay * 0.0003)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        answers = await asyncio.gather(*(api.get("/orders") for _ in range(20)))
        assert [a.status_code for a in answers] == [200] * 20
        figures = resource.statistics()
        assert (figures["active_connections"], figures["waiting"]) == (0, 0)


async def test_a_response_that_a_node_left_open_is_closed_when_it_ends(server: HttpServer) -> None:
    async with opened(server.url, max_connections=1) as resource:
        for _ in range(3):
            async with resource.lease(lambda seconds: None) as api:
                await api.send(api.build_request("GET", "/orders"), stream=True)
                assert resource.statistics()["active_connections"] == 1
            assert resource.statistics()["active_connections"] == 0


async def test_closing_ends_requests_under_way_at_once(server: HttpServer) -> None:
    async def slow(request: Request, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(30)

    server.routes["/slow"] = slow
    async with opened(server.url) as resource, resource.lease(lambda seconds: None) as api:
        asked = [asyncio.create_task(api.get("/slow")) for _ in range(3)]
        await asyncio.sleep(0.3)
        started = time.monotonic()
        await resource.close()
        for error in await asyncio.gather(*asked, return_exceptions=True):
            assert isinstance(error, ResourceUnavailableError)
            assert error.outcome == "unknown"
        with pytest.raises(ResourceUnavailableError, match="was closed; nothing was sent"):
            await api.get("/me")
        assert time.monotonic() - started < 3
        await resource.close()


async def test_tls_checks_the_certificate_unless_told_otherwise(
    server: HttpServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    context, authority = certificate(tmp_path)
    async with Proxy(server.port, context) as proxy:
        url = f"https://127.0.0.1:{proxy.port}"
        async with leased(url, credentials()) as api:
            with pytest.raises(ResourceUnavailableError, match="certificate was not accepted") as caught:
                await api.get("/me")
        assert caught.value.outcome == "not sent"
        assert proxy.sent == b""
        async with leased(url, ssl="off") as api:
            assert (await api.get("/me")).status_code == 200
        monkeypatch.setenv("SSL_CERT_FILE", str(authority))
        async with leased(url, credentials()) as api:
            assert (await api.get("/me")).status_code == 200


# Health


async def test_any_answer_is_a_sign_of_life_and_the_login_is_not_needed_for_it(server: HttpServer) -> None:
    async with opened(server.url, credentials()) as resource:
        assert await resource.ping() == "HTTP/1.1 fault/1"
        assert (server.requests[0].method, "authorization" in server.requests[0].headers) == ("HEAD", False)
        figures = resource.statistics()
        assert (figures["pool_size"], figures["active_connections"], figures["requests"]) == (20, 0, 1)
        assert 0 < figures["avg_response_time_ms"] < 5000
