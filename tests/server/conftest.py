"""What the tests of the server share: a gateway with a few workflows, its server, and a client that has the token."""

from __future__ import annotations

import asyncio
import datetime as dt
import decimal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from kailash_nb.gateway import Gateway
from kailash_nb.runs import Run
from kailash_nb.secrets.manager import SecretManager
from kailash_nb.server import Server, serve

TOKEN = "a-token-that-only-these-tests-know"


@pytest.fixture(scope="module", autouse=True)
def runtime_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where servers put their files: a folder of the tests' own."""
    folder = tmp_path_factory.mktemp("runtime")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_RUNTIME_DIR", str(folder))
        for name in ("KAILASH_NB_TOKEN", "KAILASH_NB_HOSTS", "JUPYTERHUB_SERVICE_PREFIX", "JUPYTERHUB_PUBLIC_URL"):
            patch.delenv(name, raising=False)
        yield folder / "kailash_nb"


def define(gateway: Gateway) -> None:
    """A workflow for each way that a run can go."""

    @gateway.node(name="sum", description="Adds two numbers.")
    def add(a: int, b: int = 1):
        return {"total": a + b}

    @gateway.node(name="fail")
    async def fail(amount: int = 0):
        return 1 / amount

    @gateway.node(name="echo")
    async def echo(value):
        return {"value": value}

    @gateway.node(name="values")
    async def special():
        return {
            "at": dt.datetime(2025, 1, 2, tzinfo=dt.UTC),
            "price": decimal.Decimal("1.10"),
            "nan": float("nan"),
            "large": 2**200,
            "name": "caf\udce9",
        }

    @gateway.node(name="formless")
    async def formless():
        return {"rows": [1, object()]}

    @gateway.node(name="endless")
    async def endless():
        value: list[Any] = []
        value.append(value)
        return value

    @gateway.node(name="sleep")
    async def sleep(seconds: float = 30):
        await asyncio.sleep(seconds)
        return "awake"

    @gateway.node(name="block")
    async def block(seconds: float = 1):
        time.sleep(seconds)
        return "awake"

    @gateway.node(name="ask", required_resources=["shop_db"])
    async def ask(shop_db):
        return await shop_db.fetchval("select 1")

    for name in ("sum", "fail", "echo", "values", "formless", "endless", "sleep", "block", "ask"):
        gateway.workflow(name, name)


@contextmanager
def made(folder: Path, title: str) -> Iterator[Gateway]:
    secrets = SecretManager(folder / "secrets.db")
    gateway = Gateway(title, secrets=secrets)
    define(gateway)
    yield gateway
    gateway.stop()
    asyncio.run(secrets.close())


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    with made(tmp_path_factory.mktemp("gateway"), "door") as gateway:
        yield gateway


@pytest.fixture(scope="module")
def server(gateway: Gateway) -> Iterator[Server]:
    server = serve(gateway.core, title="door", token=TOKEN)
    yield server
    server.stop()


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[httpx.Client]:
    """A client that has the token."""
    headers = {"Authorization": f"Bearer {TOKEN}"}
    with httpx.Client(base_url=server.url, headers=headers, timeout=30, trust_env=False) as client:
        yield client


@pytest.fixture
def fresh_gateway(tmp_path: Path) -> Iterator[Gateway]:
    """A gateway that no other test has seen."""
    with made(tmp_path, "fresh door") as gateway:
        yield gateway


@pytest.fixture
def fresh_server(fresh_gateway: Gateway) -> Iterator[Server]:
    """A server that a test may stop."""
    server = serve(fresh_gateway.core, title="fresh door", token=TOKEN)
    yield server
    server.stop()


@pytest.fixture
def recorded(request: pytest.FixtureRequest) -> Callable[[], list[Run]]:
    """Call it for the runs that were recorded since the test began, newest first."""
    gateway: Gateway = request.getfixturevalue("gateway")

    def runs() -> list[Run]:
        return asyncio.run(gateway.runs.list(limit=10_000))

    before = {run.id for run in runs()}
    return lambda: [run for run in runs() if run.id not in before]
