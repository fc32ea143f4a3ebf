"""Who gets in: the token, the names of this machine, and no page of another origin."""

from __future__ import annotations

import socket
import subprocess
import sys

import httpx
import pytest

from kailash_nb.exceptions import ServiceError
from kailash_nb.server import auth, serve

PATH = "/api/v1/workflows"


def get(server, headers: dict[str, str] | list[tuple[str, str]] | None = None) -> httpx.Response:
    return httpx.get(server.url + PATH, headers=headers)


@pytest.mark.parametrize(
    "authorization",
    [
        None,
        "",
        "Bearer",
        "Bearer wrong",
        "Bearer {token}x",
        "Bearer {token}\xff",
        "Basic {token}",
        "{token}",
        "token {token}",
        "Bearer Bearer {token}",
    ],
)
def test_without_the_token_nothing_is_told(server, authorization):
    sent = (
        {} if authorization is None else {"Authorization": authorization.format(token=server.token).encode("latin-1")}
    )
    answer = get(server, sent)

    assert answer.status_code == 401
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.headers["www-authenticate"].startswith('Bearer realm="kailash_nb"')
    assert ('error="invalid_token"' in answer.headers["www-authenticate"]) == (authorization is not None)
    assert "sum" not in answer.text and server.token not in answer.text


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER"])
def test_the_token_lets_in_whatever_case_its_scheme_has(server, scheme):
    assert get(server, {"Authorization": f"{scheme} {server.token}"}).status_code == 200


def test_a_second_authorization_lets_nobody_in(server):
    good = ("Authorization", f"Bearer {server.token}")

    assert get(server, [good, ("Authorization", "Bearer x")]).status_code == 401


def test_a_token_in_the_address_is_no_token(server):
    for query in ("token", "access_token"):
        assert httpx.get(f"{server.url}{PATH}?{query}={server.token}").status_code == 401


def test_an_unknown_path_is_not_told_from_a_known_one_without_the_token(server):
    assert httpx.get(server.url + "/nope").status_code == httpx.get(server.url + PATH).status_code == 401


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1", 200),
        ("127.0.0.1:9", 200),
        ("127.9.9.9", 200),
        ("localhost", 200),
        ("LOCALHOST:8000", 200),
        ("[::1]:8000", 200),
        ("evil.example", 421),
        ("evil.example:80", 421),
        ("localhost.evil.example", 421),
        ("127.0.0.1.evil.example", 421),
        ("evil.example#localhost", 421),
        ("localhost@evil.example", 421),
        ("0.0.0.0", 421),
        ("10.0.0.1", 421),
        ("2130706433", 421),
        ("", 421),
    ],
)
def test_only_names_of_this_machine_are_answered(server, host, status):
    answer = get(server, {"Authorization": f"Bearer {server.token}", "Host": host})

    assert answer.status_code == status
    assert status == 200 or "KAILASH_NB_HOSTS adds names" in answer.json()["detail"]


@pytest.mark.parametrize("hosts", [[], ["localhost", "evil.example"], ["localhost", "localhost"]])
def test_a_request_has_one_host(server, hosts):
    head = [f"GET {PATH} HTTP/1.1", *(f"Host: {host}" for host in hosts), f"Authorization: Bearer {server.token}"]
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
        connection.sendall("\r\n".join([*head, "Connection: close", "", ""]).encode())
        answer = b"".join(iter(lambda: connection.recv(65_536), b""))

    assert answer.startswith(b"HTTP/1.1 400 ")


@pytest.mark.parametrize("path", [PATH, "/health/live"])
@pytest.mark.parametrize("method", ["GET", "POST", "OPTIONS"])
@pytest.mark.parametrize(
    "origin", ["https://evil.example", "null", "http://localhost.evil.example", "http://127.0.0.1:1", "file://"]
)
def test_a_page_of_another_origin_is_refused_and_gets_no_cors_header(server, method, path, origin):
    headers = {"Authorization": f"Bearer {server.token}", "Origin": origin, "Access-Control-Request-Method": "POST"}
    answer = httpx.request(method, server.url + path, headers=headers)

    assert answer.status_code == 403
    assert not any(name.startswith("access-control") for name in answer.headers)


def test_a_page_of_the_server_itself_may_ask(server):
    headers = {"Authorization": f"Bearer {server.token}", "Origin": server.url}

    assert get(server, headers).status_code == 200
    assert get(server, headers | {"Host": "localhost:1"}).status_code == 403


def test_a_proxy_in_front_may_call_it_by_the_names_that_are_set(gateway, monkeypatch):
    monkeypatch.setenv("KAILASH_NB_HOSTS", "Shop.example, other.example")
    monkeypatch.setenv("JUPYTERHUB_PUBLIC_URL", "https://hub.example/user/ada/")
    server = serve(gateway.core, title="door")
    try:
        for host, status in [
            ("shop.example", 200),
            ("other.example:443", 200),
            ("hub.example", 200),
            ("evil.example", 421),
        ]:
            token = {"Authorization": f"Bearer {server.token}"}
            assert get(server, token | {"Host": host}).status_code == status
        assert get(server, token | {"Host": "hub.example", "Origin": "https://hub.example"}).status_code == 200
    finally:
        server.stop()


def test_the_random_token_is_the_same_for_the_life_of_a_process_and_another_in_the_next():
    program = "from kailash_nb.server.auth import token_for; a = token_for(); assert a == token_for(); print(a)"
    first, second = (
        subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.strip()
        for _ in range(2)
    )

    assert auth.token_for() == auth.token_for()
    assert len({first, second, auth.token_for()}) == 3
    assert min(map(len, (first, second))) >= 43


def test_the_variable_sets_the_token_and_an_argument_goes_before_it(monkeypatch):
    monkeypatch.setenv("KAILASH_NB_TOKEN", "from-the-environment")

    assert auth.token_for() == "from-the-environment"
    assert auth.token_for("from-the-argument") == "from-the-argument"
    monkeypatch.setenv("KAILASH_NB_TOKEN", "")
    assert len(auth.token_for()) >= 43


@pytest.mark.parametrize(
    "token", ["short", "with a space in its middle", "with-a-line\nbreak-in-it", "ümlaut-token-ümlaut"]
)
def test_a_token_that_is_guessable_or_fits_no_header_is_refused_without_telling_it(monkeypatch, token):
    monkeypatch.setenv("KAILASH_NB_TOKEN", token)
    for given, name in ((None, "KAILASH_NB_TOKEN"), (token, "token=")):
        with pytest.raises(ServiceError, match="16 characters or more") as caught:
            auth.token_for(given)
        assert name in str(caught.value) and token not in str(caught.value)
