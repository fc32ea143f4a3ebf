"""A process of its own that holds embedded services, as a kernel does: for the tests that end it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import asyncpg
import redis

from kailash_nb.resources.embedded import Address
from kailash_nb.resources.supervisor import LOCK_FILE, STATE_FILE, take_lock

GONE_WITHIN = 3.0  # seconds after the death of the last holder

PROGRAM = """
import asyncio, dataclasses, json, signal, sys
from pathlib import Path
from kailash_nb.exceptions import ServiceError
from kailash_nb.resources.embedded import address

async def main(folder, *services):
    asyncio.get_running_loop().add_signal_handler(signal.SIGINT, lambda: None)
    while True:
        try:
            told = {s: dataclasses.asdict(await address(s, Path(folder))) for s in services}
        except ServiceError as error:
            told = {"error": str(error)}
        print(json.dumps(told), flush=True)
        if not await asyncio.to_thread(sys.stdin.readline):
            return

asyncio.run(main(*sys.argv[1:]))
"""


class Holder:
    """Asks for services at once and whenever told to; ends with the test at the latest."""

    def __init__(
        self,
        folder: Path,
        *services: str,
        python: str = sys.executable,
        environment: Mapping[str, str] | None = None,
        **options: Any,
    ) -> None:
        self.folder = folder
        self.services = services or ("postgres", "valkey")
        self.process = subprocess.Popen(
            [python, "-c", PROGRAM, str(folder), *self.services],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
            env={**os.environ, **(environment or {})},
            **options,
        )
        self._asked = True  # it asks as soon as it is there

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()

    def ask(self) -> dict[str, Address]:
        """The addresses, asked for by the process; raises AssertionError with its error."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        if not self._asked:
            self.process.stdin.write("\n")
            self.process.stdin.flush()
        self._asked = False
        told = json.loads(self.process.stdout.readline() or '{"error": "the holder has died"}')
        assert "error" not in told, told["error"]
        return {service: Address(**fields) for service, fields in told.items()}

    def interrupt(self) -> None:
        """What Jupyter does to a kernel: SIGINT to its whole process group."""
        os.killpg(self.process.pid, signal.SIGINT)

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()


def query(address: Address, sql: str, *, password: str | None = None) -> Any:
    """The single value that PostgreSQL answers, on a connection and a loop of its own."""
    import asyncio

    async def ask() -> Any:
        connection = await asyncpg.connect(
            host=address.host,
            port=address.port,
            user=address.user,
            password=address.password if password is None else password,
            database="postgres",
            timeout=10,
        )
        try:
            return await connection.fetchval(sql)
        finally:
            await connection.close()

    return asyncio.run(ask())


@contextmanager
def valkey(address: Address, *, password: str | None = None) -> Iterator[redis.Redis]:
    """A client of the Valkey there."""
    secret = address.password if password is None else password
    with redis.Redis(host=address.host, port=address.port, password=secret, decode_responses=True) as client:
        yield client


def pids(folder: Path, addresses: Mapping[str, Address]) -> dict[str, int]:
    """The processes of the folder's servers, and of its supervisor."""
    found = {"supervisor": int(json.loads((folder / STATE_FILE).read_text())["pid"])}
    if "postgres" in addresses:
        found["postgres"] = int((folder / "postgres" / "postmaster.pid").read_text().split()[0])
    if "valkey" in addresses:
        with valkey(addresses["valkey"]) as client:
            found["valkey"] = int(client.info("server")["process_id"])
    return found


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and was not waited for does not."""
    shown = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True, check=False).stdout
    return shown.strip()[:1] not in ("", "Z")


def wait_for(condition: Callable[[], bool], seconds: float) -> float:
    """Wait until the condition holds; returns the seconds it took, raises AssertionError when it takes longer."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < seconds, f"not within {seconds} seconds"
        time.sleep(0.02)
    return time.monotonic() - began


def wait_until_stopped(folder: Path) -> None:
    """Wait until nothing of the folder runs any more."""
    os.close(take_lock(folder / LOCK_FILE, 20))
