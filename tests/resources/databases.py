"""What the tests of the database resource share: opening one, proxies with TLS, and tracebacks as IPython shows them."""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import ipaddress
import ssl
import struct
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from traceback import TracebackException
from typing import Any, Protocol

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from IPython.core.ultratb import VerboseTB

from kailash_nb.resources.base import Credentials
from kailash_nb.resources.database import DatabaseType
from kailash_nb.resources.postgres import Database, PostgresDatabase

CANARY = "canary-Zk3-database-password"


class Address(Protocol):
    host: str
    port: int
    user: Any
    password: str


def login(user: str | None, password: str | None, **more: Any) -> Credentials:
    async def reveal() -> Mapping[str, Any]:
        fields = {"user": user, "password": password, **more}
        return {key: value for key, value in fields.items() if value is not None}

    return Credentials("db_creds", 1, reveal)


@asynccontextmanager
async def opened(
    server: Address, credentials: Credentials | None = None, **config: Any
) -> AsyncIterator[PostgresDatabase]:
    kind = DatabaseType()
    whole = kind.normalise({"host": server.host, "port": server.port, "database": "postgres", **config})
    resource = await kind.open(whole, credentials or login(server.user, server.password))
    try:
        yield resource
    finally:
        await resource.close()


@asynccontextmanager
async def leased(server: Address, credentials: Credentials | None = None, **config: Any) -> AsyncIterator[Database]:
    async with opened(server, credentials, **config) as resource, resource.lease(lambda seconds: None) as database:
        yield database


async def wait_for(condition: Any, seconds: float = 10.0) -> None:
    async with asyncio.timeout(seconds):
        while not await condition():
            await asyncio.sleep(0.02)


def shown(error: BaseException) -> str:
    """The traceback as ``%xmode Verbose`` shows it and with every local variable, but those of the test's own frame."""
    traceback = error.__traceback__ and error.__traceback__.tb_next
    verbose = VerboseTB(theme_name="nocolor", include_vars=True, long_header=False).text(type(error), error, traceback)
    error = error.with_traceback(traceback)
    return verbose + "".join(TracebackException.from_exception(error, capture_locals=True).format())


def self_signed(folder: Path, name: str = "127.0.0.1") -> tuple[ssl.SSLContext, Path]:
    """A server's TLS context for this name or address, and the file of the certificate to trust."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = dt.datetime.now(dt.UTC)
    try:
        alternative: x509.GeneralName = x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        alternative = x509.DNSName(name)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - dt.timedelta(hours=1))
        .not_valid_after(now + dt.timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName([alternative]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    authority, private = folder / "ca.pem", folder / "key.pem"
    authority.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    private.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(authority, private)
    return context, authority


@asynccontextmanager
async def tls_in_front_of(server: Address, context: ssl.SSLContext) -> AsyncIterator[int]:
    """The port of a PostgreSQL that takes TLS: the negotiation and TLS itself end here, the rest is the server's."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        assert await reader.readexactly(8) == struct.pack("!II", 8, 80877103)  # SSLRequest
        writer.write(b"S")
        with contextlib.suppress(OSError, ssl.SSLError):
            await writer.start_tls(context)
            up_reader, up_writer = await asyncio.open_connection(server.host, server.port)
            await asyncio.gather(pump(reader, up_writer), pump(up_reader, writer))

    async with listening(serve) as port:
        yield port


@asynccontextmanager
async def starting_up(server: Address, refusals: int) -> AsyncIterator[int]:
    """The port of a PostgreSQL that is starting up for the first so many connections."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal refusals
        refusals -= 1
        if refusals < 0:
            up_reader, up_writer = await asyncio.open_connection(server.host, server.port)
            await asyncio.gather(pump(reader, up_writer), pump(up_reader, writer))
            return
        await reader.read(4096)
        fields = b"SFATAL\0VFATAL\0C57P03\0Mthe database system is starting up\0\0"
        writer.write(b"E" + struct.pack("!I", len(fields) + 4) + fields)
        await writer.drain()

    async with listening(serve) as port:
        yield port


@asynccontextmanager
async def asking_for_cleartext(heard: list[bytes]) -> AsyncIterator[int]:
    """The port of a false PostgreSQL without TLS: it asks for the password in clear, and quotes it in its refusal."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, OSError):
            while True:
                message = await reader.readexactly(struct.unpack("!I", await reader.readexactly(4))[0] - 4)
                heard.append(message)
                if message[:4] != struct.pack("!I", 80877103):
                    break
                writer.write(b"N")
            writer.write(b"R" + struct.pack("!II", 8, 3))  # AuthenticationCleartextPassword
            await reader.readexactly(1)
            password = await reader.readexactly(struct.unpack("!I", await reader.readexactly(4))[0] - 4)
            heard.append(password)
            fields = b"SFATAL\0VFATAL\0CXX000\0Mdo not like " + password.rstrip(b"\0") + b"\0\0"
            writer.write(b"E" + struct.pack("!I", len(fields) + 4) + fields)
            await writer.drain()
        writer.close()

    async with listening(serve) as port:
        yield port


async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        with contextlib.suppress(OSError):
            while data := await reader.read(65536):
                writer.write(data)
    finally:
        writer.close()


@asynccontextmanager
async def listening(serve: Any, port: int = 0) -> AsyncIterator[int]:
    tasks: set[asyncio.Task[Any]] = set()

    async def track(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        tasks.add(task)
        try:
            await serve(reader, writer)
        except asyncio.CancelledError:
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(track, "127.0.0.1", port)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        for task in tasks:
            task.cancel()
        await asyncio.sleep(0.05)
