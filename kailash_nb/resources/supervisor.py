"""The process that keeps the embedded servers of one folder up, and ends them when nobody needs them any more.

Started by its path, as ``python -I -S supervisor.py FOLDER``, with the standard library alone: it is there in a tenth
of a second and needs nothing that the environment of its first caller happens to have.

A process that needs a server connects to this one (loopback TCP) and keeps the connection: that is its lease. The
operating system closes the connection however the process ends, and with the last lease everything ends. One line of
JSON each way, after both sides have proved that they know the token in ``supervisor.json``::

    caller      {"nonce": ...}
    supervisor  {"nonce": ..., "proof": ...}
    caller      {"proof": ..., "service": "postgres", "candidates": [...]}
    supervisor  {} when the server is ready, or {"error": "..."}

What comes later on a lease, an empty line or its end, means: ask again, the server had to be started anew.

Files of the folder::

    supervisor.lock   held for as long as the supervisor lives; starting.lock by the one who starts it
    supervisor.json   its port and token, for its owner only
    supervisor.log, postgres.log, valkey.log
    postgres.json, valkey.json    port, user and password of each server, for their owner only
    postgres/, valkey/            the servers' data
    binaries/                     copies for a user who cannot reach the originals (under root only)
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import os
import secrets
import signal
import socket
import sys
import time
from collections.abc import Coroutine, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING or __package__:
    from . import launchers
else:  # started by its path; last in the search, so that nothing in this folder hides a module of the standard library
    sys.path.append(str(Path(__file__).parent))
    import launchers

PROTOCOL = 1
LOCK_FILE = "supervisor.lock"
STATE_FILE = "supervisor.json"
LOG_FILE = "supervisor.log"
READY = "ready"
HELD = "held by another supervisor"
PREDECESSOR_PATIENCE = 5.0  # seconds for another supervisor of this folder to end
FIRST_LEASE_PATIENCE = 10.0  # seconds for the one who started us to connect
GREETING_PATIENCE = 5.0


class Supervisor:
    """Keeps the servers of a folder up. Lives from the first lease to the end of the last."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._lock = lock_identity(folder)
        self._token = secrets.token_hex(32)
        self._servers: dict[str, launchers.Server] = {
            server.name: server for server in (launchers.Postgres(folder), launchers.Valkey(folder))
        }
        self._starting = {name: asyncio.Lock() for name in self._servers}
        self._leases: dict[asyncio.StreamWriter, str] = {}
        self._tasks: set[asyncio.Task[Any]] = set()
        self._over = asyncio.Event()

    async def run(self) -> None:
        """Serve until the last lease ends, or until SIGTERM."""
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGTERM, self._over.set)
        for number in (signal.SIGINT, signal.SIGHUP):  # a handler, not SIG_IGN: that the servers would inherit
            loop.add_signal_handler(number, lambda: None)
        listener = await asyncio.start_server(self._serve, launchers.HOST, 0)
        try:
            self._announce(listener.sockets[0].getsockname()[1])
            loop.call_later(FIRST_LEASE_PATIENCE, self._end_if_unused)
            await self._over.wait()
        finally:
            listener.close()
            await self._shut_down()

    def _announce(self, port: int) -> None:
        state = {
            "protocol": PROTOCOL,
            "lock": self._lock,
            "port": port,
            "token": self._token,
            "pid": os.getpid(),
            "host": socket.gethostname(),
        }
        launchers.write_private(self._folder / STATE_FILE, state)
        _hand_over_output(self._folder / LOG_FILE)

    async def _shut_down(self) -> None:
        if self._is_ours():
            (self._folder / STATE_FILE).unlink(missing_ok=True)
        for writer in self._leases:
            writer.close()  # who is left asks for a new lease, and waits until we have ended
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.gather(*(server.stop() for server in self._servers.values()))

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with asyncio.timeout(GREETING_PATIENCE):
                service, candidates = await self._greet(reader, writer)
        except (OSError, TimeoutError, ValueError, KeyError, TypeError):
            writer.close()
            return
        if self._over.is_set():  # too late for another lease: the caller asks the next supervisor
            writer.close()
            return
        self._leases[writer] = service
        try:
            self._task(self._answer(service, candidates, writer))
            with suppress(ConnectionError):
                await reader.read()  # until the holder has gone
        finally:
            del self._leases[writer]
            writer.close()
            self._end_if_unused()

    async def _greet(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> tuple[str, list[launchers.Candidate]]:
        theirs = json.loads(await reader.readline())["nonce"]
        ours = secrets.token_hex(16)
        _say(writer, {"nonce": ours, "proof": proof(self._token, "supervisor", theirs)})
        request = json.loads(await reader.readline())
        if not hmac.compare_digest(request["proof"], proof(self._token, "caller", ours)):
            raise ValueError("wrong token")
        service = request["service"]
        if service not in self._servers:
            raise ValueError(service)
        return service, [launchers.Candidate(**candidate) for candidate in request["candidates"]]

    async def _answer(
        self, service: str, candidates: Sequence[launchers.Candidate], writer: asyncio.StreamWriter
    ) -> None:
        try:
            await self._bring_up(service, candidates)
        except (launchers.LaunchError, OSError) as error:
            _log(f"{service}: {error}")
            _say(writer, {"error": str(error)})
        except Exception as error:
            _say(writer, {"error": f"{error!r} in the supervisor; see {self._folder / LOG_FILE}"})
            raise
        else:
            _say(writer, {})

    async def _bring_up(self, service: str, candidates: Sequence[launchers.Candidate]) -> None:
        server = self._servers[service]
        async with self._starting[service]:
            if not server.running:
                await server.start(candidates)
                _log(f"{service}: started")
                self._task(self._restart_when_ended(server, candidates))

    async def _restart_when_ended(self, server: launchers.Server, candidates: Sequence[launchers.Candidate]) -> None:
        assert server.process is not None
        began = time.monotonic()
        status = await server.process.wait()
        _log(f"{server.name}: ended unasked, exit status {status}")
        if not self._is_ours():
            self._over.set()
            return None
        for writer, service in self._leases.items():
            if service == server.name:
                writer.write(b"\n")
        pause = 0.05 if time.monotonic() - began > 5 else 0.5
        while True:
            await asyncio.sleep(pause)
            try:
                return await self._bring_up(server.name, candidates)
            except (launchers.LaunchError, OSError) as error:
                _log(f"{server.name}: {error}")
            pause = min(2 * pause, 10.0)

    def _is_ours(self) -> bool:
        """Whether the folder is still the one we hold, neither removed nor made anew."""
        try:
            return lock_identity(self._folder) == self._lock
        except OSError:
            return False

    def _end_if_unused(self) -> None:
        if not self._leases:
            self._over.set()

    def _task(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


def proof(token: str, role: str, nonce: str) -> str:
    """What only one who knows the token can say to this nonce; a different one for each role."""
    return hmac.new(token.encode(), f"{role}:{nonce}".encode(), hashlib.sha256).hexdigest()


def lock_identity(folder: Path) -> list[int]:
    """Tells the folder's lock from that of a copy, or of another folder of the same name."""
    status = (folder / LOCK_FILE).stat()
    return [status.st_dev, status.st_ino]


def take_lock(path: Path, seconds: float) -> int:
    """Lock a file for this process; returns the descriptor whose closing gives it free. Raises TimeoutError.

    A record lock, because a forked child does not inherit it. It belongs to the whole process: threads need a lock of
    their own around it.
    """
    import fcntl  # not on Windows, where this module is imported but not used

    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    deadline = time.monotonic() + seconds
    try:
        while True:
            try:
                fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError):  # which of the two is the system's choice, see fcntl(2)
                if time.monotonic() > deadline:
                    raise TimeoutError(str(path)) from None
                time.sleep(0.05)
            else:
                return descriptor
    except BaseException:
        os.close(descriptor)
        raise


def _say(writer: asyncio.StreamWriter, message: dict[str, Any]) -> None:
    writer.write(json.dumps(message).encode() + b"\n")


def _log(text: str) -> None:
    with suppress(OSError):  # a full disk must not keep an answer from the caller
        print(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}", file=sys.stderr, flush=True)


def _hand_over_output(log: Path) -> None:
    """Tell the one who started us that we are ready, and write to ``log`` from now on."""
    print(READY, flush=True)
    too_long = log.exists() and log.stat().st_size > launchers.LOG_LIMIT
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | (os.O_TRUNC if too_long else 0), 0o600)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    os.close(descriptor)


def main() -> None:
    """Keep up the servers of the folder named on the command line. Prints READY, or why it cannot."""
    folder = Path(sys.argv[1])
    os.umask(0o077)
    if os.fork():
        os._exit(0)  # the caller waits for this process only; the one that stays is nobody's child
    try:
        take_lock(folder / LOCK_FILE, PREDECESSOR_PATIENCE)
        asyncio.run(Supervisor(folder).run())
    except TimeoutError:
        print(HELD)
    except OSError as error:
        print(error)


if __name__ == "__main__":
    main()
