"""What a connection may do before it has asked anything."""

from __future__ import annotations

import asyncio
import http.client
import random
import socket
import time

import pytest

from kailash_nb.server import protocol

GET = "GET {} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {}\r\n\r\n"


def connect(server) -> socket.socket:
    return socket.create_connection(("127.0.0.1", server.port), timeout=20)


def rest(connection: socket.socket) -> bytes:
    """What comes until the server closes the connection."""
    received = bytearray()
    try:
        while data := connection.recv(65_536):
            received += data
    except ConnectionResetError:
        pass
    return bytes(received)


def send_until_closed(connection: socket.socket, data: bytes, pause: float) -> float:
    """The seconds until the server has closed the connection, 15 at most."""
    start = time.monotonic()
    while (passed := time.monotonic() - start) < 15:
        try:
            connection.sendall(data)
        except OSError:
            break
        time.sleep(pause)
    return passed


@pytest.fixture
def hurried(monkeypatch):
    """A head must be there within half a second."""
    monkeypatch.setattr(protocol, "HEAD_SECONDS", 0.5)


@pytest.mark.parametrize("sent", [b"", b"GET / HTT", b"GET / HTTP/1.1\r\nHost: localhost\r\nX-Wait", b"\r\n"])
def test_a_connection_that_never_asks_is_closed(hurried, server, sent):
    with connect(server) as connection:
        connection.sendall(sent)
        start = time.monotonic()

        assert rest(connection) == b""
        assert time.monotonic() - start > 0.3


def test_a_head_that_drips_is_no_excuse(hurried, server):
    with connect(server) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\n")

        assert send_until_closed(connection, b"X-Drip: 1\r\n", 0.05) < 10


def test_many_that_never_ask_do_not_keep_others_out(hurried, server, client):
    lingering = [connect(server) for _ in range(100)]
    try:
        assert client.get("/health/live").status_code == 200
        for connection in lingering:
            assert rest(connection) == b""
    finally:
        for connection in lingering:
            connection.close()


def test_a_head_that_is_too_large_is_refused(server):
    with connect(server) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\nX-Large: ")

        assert send_until_closed(connection, b"x" * 65_536, 0.01) < 5


def test_a_head_just_too_large_is_told_so(server):
    with connect(server) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n")
        time.sleep(0.2)
        connection.sendall(b"X-Large: " + b"x" * protocol.HEAD_BYTES)

        assert rest(connection).startswith(b"HTTP/1.1 431 ")


def test_requests_follow_each_other_on_one_connection_for_longer_than_a_head_may_take(hurried, server):
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
    connection.connect()
    first = connection.sock
    for _ in range(6):
        connection.request("GET", "/health/live")
        assert connection.getresponse().read() == b'{"status":"ok"}'
        time.sleep(0.2)

    assert connection.sock is first
    connection.close()


def test_a_run_may_take_longer_than_a_head(hurried, client):
    answer = client.post("/api/v1/workflows/sleep/execute", json={"parameters": {"seconds": 1.2}})

    assert answer.json()["status"] == "completed"


def test_pipelined_requests_are_answered_in_order(server):
    paths = ["/api/v1/health", "/nope", "/health/live"]
    with connect(server) as connection:
        *first, last = (GET.format(path, server.token) for path in paths)
        connection.sendall("".join([*first, last.replace("Host", "Connection: close\r\nHost")]).encode())
        answer = rest(connection)

    assert [part[:3] for part in answer.split(b"HTTP/1.1 ")[1:]] == [b"200", b"404", b"200"]


def test_a_body_that_nobody_reads_ends_with_its_connection(hurried, server):
    head = (
        "POST /api/v1/workflows/sum/execute HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        f"Authorization: Bearer {server.token}\r\nContent-Length: 100000000\r\n\r\n"
    )
    with connect(server) as connection:
        connection.sendall(head.encode())
        assert connection.recv(65_536).startswith(b"HTTP/1.1 413 ")

        assert send_until_closed(connection, b"x" * 1000, 0.02) < 10


@pytest.mark.parametrize("seed", range(4))
def test_no_bytes_break_the_server(server, client, seed, caplog):
    draw = random.Random(seed)
    whole = GET.format("/api/v1/workflows/sum", server.token).encode()
    post = b"POST /api/v1/workflows/echo/execute HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nabcde\r\n0\r\n\r\n"

    async def send(data: bytes) -> bytes:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(data)
        writer.write_eof()
        try:
            return await asyncio.wait_for(reader.read(), 20)
        except ConnectionResetError:
            return b""
        finally:
            writer.close()

    def damaged(data: bytes) -> bytes:
        spoiled = bytearray(data)
        for _ in range(draw.randrange(1, 6)):
            spoiled[draw.randrange(len(spoiled))] = draw.randrange(256)
        return bytes(spoiled)

    async def many() -> list[bytes]:
        texts = [damaged(draw.choice((whole, post))) for _ in range(80)]
        texts += [draw.randbytes(draw.randrange(300)) for _ in range(20)]
        return await asyncio.gather(*map(send, texts))

    answers = asyncio.run(many())

    assert {a[:12] for a in answers} <= {
        b"",
        *(b"HTTP/1.1 %d" % code for code in (200, 400, 401, 403, 404, 405, 413, 415, 421)),
    }
    assert client.get("/health/live").status_code == 200
    assert [r for r in caplog.records if r.levelname == "ERROR"] == []
