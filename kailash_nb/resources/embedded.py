"""PostgreSQL and Valkey that need no set-up: started on first use, shared by the kernels of a folder, gone with them.

``await address("postgres")`` starts a real server if nobody has and tells where it listens. A process of its own, the
supervisor (see ``supervisor.py``), owns the servers of a folder; each process that uses one keeps a connection to the
supervisor, its lease. When the last lease ends, by a clean exit or by ``kill -9``, the servers stop. They do not notice
the interrupt of a kernel, and their data stays.
"""

from __future__ import annotations

import asyncio
import atexit
import hashlib
import hmac
import json
import os
import re
import secrets
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..exceptions import ServiceError
from . import supervisor
from .binaries import FINDERS, Service
from .launchers import HOST, LaunchError, Login, environment

FOLDER_VARIABLE = "KAILASH_NB_SERVICES"

SYSTEM_FOLDER = Path("/var/lib/kailash_nb")  # root's data: a home folder is closed to the user whom the servers run as
START_PATIENCE = 120.0  # seconds for a server to get ready; the first start of all makes the database
GREETING_PATIENCE = 5.0  # seconds for the supervisor to prove itself
ATTEMPTS = 5  # to reach a supervisor that is not about to end


@dataclass(frozen=True)
class Address:
    """Where an embedded server listens and how to log in; stays the same when it is restarted."""

    host: str
    port: int
    user: str | None
    password: str = field(repr=False)


_Key = tuple[Service, str]  # and the folder


class _Lease:
    """A connection to the supervisor that keeps one service up. Lives until it is closed, or this process ends."""

    def __init__(self, connection: socket.socket, address: Address) -> None:
        connection.setblocking(False)
        self.address = address
        self._connection = connection

    def holds(self) -> bool:
        """Whether nothing has happened to the server or to its supervisor since the lease was taken."""
        try:
            self._connection.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return True
        except OSError:
            return False
        return False

    def close(self) -> None:
        self._connection.close()


_leases: dict[_Key, _Lease] = {}
_flights: dict[_Key, Future[Address]] = {}
_lock = threading.Lock()  # of the two above
_starting = threading.Lock()  # the record lock that excludes other processes does not exclude our own threads
_default_folder: str | None = None


async def address(service: Service, folder: Path | None = None) -> Address:
    """Where a service listens; starts it if nobody has, and holds it up for as long as this process lives.

    Takes about two microseconds once the service is up, so ask before each connect: after a crash, the answer waits for
    the restarted server. Any number of threads and loops may ask at once.

    Args:
        service: ``"postgres"`` (a superuser ``kailash`` and the database ``postgres``) or ``"valkey"``.
        folder: where the data is, `data_folder()` by default; the default of the first call stays the default of the
            process, whatever folder it changes to later.

    Raises ServiceError where no binaries are found or the server does not start.
    """
    key = (service, _default() if folder is None else _absolute(folder))
    lease = _leases.get(key)
    if lease is not None and lease.holds():
        return lease.address
    return await asyncio.wrap_future(_flight(key))


def release(folder: Path | None = None) -> None:
    """Let go of the services of ``folder``, or of all; where nobody else holds them, they stop within three seconds."""
    global _default_folder
    with _lock:
        keys = {*_leases, *_flights}
        if folder is None:
            _default_folder = None
        else:
            keys = {key for key in keys if key[1] == _absolute(folder)}
        for key in keys:
            _flights.pop(key, None)
            if lease := _leases.pop(key, None):
                lease.close()


def data_folder(project: Path | None = None) -> Path:
    """Where the data of a project's services is kept; nothing is made yet.

    ``.kailash_nb/services`` in the project's folder (the current one by default); under root, whose servers run as
    ``nobody``, a folder below ``/var/lib/kailash_nb``; where KAILASH_NB_SERVICES names a folder, that one.
    """
    if named := os.environ.get(FOLDER_VARIABLE):
        return Path(named).expanduser().absolute()
    project = (project or Path.cwd()).resolve()
    if not hasattr(os, "geteuid") or os.geteuid() != 0:
        return project / ".kailash_nb" / "services"
    readable = re.sub(r"[^\w.-]+", "-", project.name, flags=re.ASCII).strip("-.")[-40:] or "project"
    digest = hashlib.sha256(os.fsencode(project)).hexdigest()[:10]
    return SYSTEM_FOLDER / f"{readable}-{digest}"


def _absolute(folder: Path) -> str:
    return os.path.abspath(folder)  # noqa: PTH100 - `Path.resolve` reads the disk at each part, and this is the fast path


def _default() -> str:
    global _default_folder
    if _default_folder is None:
        _default_folder = str(data_folder())
    return _default_folder


# One flight per service and folder: who asks meanwhile, from whatever thread or loop, waits for the same answer.


def _flight(key: _Key) -> Future[Address]:
    with _lock:
        flight = _flights.get(key)
        if flight is None:
            flight = _flights[key] = Future()
            flight.set_running_or_notify_cancel()  # a waiter that is cancelled does not cancel it for the others
            threading.Thread(target=_fly, args=(key, flight), name=f"embedded-{key[0]}", daemon=True).start()
        return flight


def _fly(key: _Key, flight: Future[Address]) -> None:
    try:
        lease = _take_lease(key[0], Path(key[1]))
    except BaseException as error:
        _land(key, flight, None)
        flight.set_exception(error)
    else:
        if _land(key, flight, lease):
            flight.set_result(lease.address)
        else:
            flight.set_exception(ServiceError(f"{key[0]} was released while it was started; ask again"))


def _land(key: _Key, flight: Future[Address], lease: _Lease | None) -> bool:
    """End a flight and keep its lease; False, and the lease is closed, where it was released meanwhile."""
    with _lock:
        wanted = _flights.get(key) is flight
        if wanted:
            del _flights[key]
            # The old lease is closed after the new one is taken, so that the supervisor is never without one.
            before = _leases.pop(key, None)
            if lease is not None:
                _leases[key] = lease
            lease = before
        if lease is not None:
            lease.close()
        return wanted


def _take_lease(service: Service, folder: Path) -> _Lease:
    if sys.platform == "win32":
        raise ServiceError(
            "embedded services run on Linux and macOS, not on Windows: "
            "name a server of your own (host, port), or use WSL"
        )
    request = {"service": service, "candidates": [asdict(candidate) for candidate in FINDERS[service]()]}
    try:
        _make_folder(folder)
        for _ in range(ATTEMPTS):
            connection = _connect(folder, request) or _connect_anew(folder, request)
            with _closed_on_error(connection):
                if _ready(connection, service, folder):
                    return _Lease(connection, _read_address(folder / f"{service}.json"))
            connection.close()  # it was about to end; the next one waits until it has
    except TimeoutError:
        raise ServiceError(
            f"{service} did not get ready within {START_PATIENCE:.0f} seconds; see {folder / f'{service}.log'}"
        ) from None
    except (OSError, LaunchError) as error:
        raise ServiceError(
            f"{service} cannot be started in {folder}: {error}; "
            f"mend that, or set {FOLDER_VARIABLE} to a folder of yours on a local disk"
        ) from error
    raise ServiceError(f"the supervisor of {folder} ended {ATTEMPTS} times; see {folder / supervisor.LOG_FILE}")


def _read_address(path: Path) -> Address:
    login = Login.read(path)
    if login is None:
        raise LaunchError(f"{path} is missing")
    return Address(HOST, login.port, login.user, login.password)


def _make_folder(folder: Path) -> None:
    under_root = os.geteuid() == 0
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    for path in reversed(missing):
        path.mkdir(exist_ok=True)
        if under_root or path == folder:
            path.chmod(0o711 if under_root else 0o700)
    if folder.stat().st_uid != os.geteuid():  # its owner could lead what we write there to another place
        raise PermissionError(f"the folder belongs to another user (uid {folder.stat().st_uid})")
    ours = folder.parent
    if ours.name == ".kailash_nb" and not (ours / ".gitignore").exists():
        (ours / ".gitignore").write_text("*\n")


# The supervisor's other end; its module says what passes between the two.


def _connect(folder: Path, request: dict[str, Any]) -> socket.socket | None:
    """A connection on which the request is sent; None where no supervisor is there, or it does not prove itself."""
    state = _supervisor_state(folder)
    if state is None:
        return None
    if state["protocol"] != supervisor.PROTOCOL:
        raise ServiceError(
            f"the services in {folder} were started by another version of kailash_nb (process {state['pid']}): "
            "restart the kernels that use them"
        )
    try:
        connection = socket.create_connection((HOST, state["port"]), timeout=GREETING_PATIENCE)
    except OSError:
        return None
    try:
        if _greet(connection, state["token"], request):
            return connection
    except (OSError, ValueError, KeyError, TypeError):
        pass
    connection.close()
    return None


def _connect_anew(folder: Path, request: dict[str, Any]) -> socket.socket:
    """The same after starting a supervisor, unless another process has done so while we waited for our turn."""
    with _turn(folder):
        connection = _connect(folder, request)
        if connection is None:
            _start_supervisor(folder)
            connection = _connect(folder, request)
    if connection is None:
        raise ServiceError(
            f"the supervisor of {folder} has started and does not answer on {HOST}; see {folder / supervisor.LOG_FILE}"
        )
    return connection


def _start_supervisor(folder: Path) -> None:
    command = [sys.executable, "-I", "-S", supervisor.__file__, str(folder)]
    try:
        # A session of its own: the interrupt of a kernel goes to the kernel's whole process group.
        started = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            cwd="/",
            env=environment(),
            start_new_session=True,
            timeout=2 * supervisor.PREDECESSOR_PATIENCE,
            check=False,
        )
        said = started.stdout.decode(errors="replace").strip()
    except subprocess.TimeoutExpired:
        said = "it did not get ready"
    if said == supervisor.HELD:
        state = _supervisor_state(folder) or {}
        raise ServiceError(
            f"another supervisor holds {folder} and does not answer: process {state.get('pid', 'unknown')} on "
            f"{state.get('host', 'an unknown host')}. End it if it is on this machine and in this container; otherwise "
            f"set {FOLDER_VARIABLE} to a folder that is used here only"
        )
    if said != supervisor.READY:
        raise ServiceError(f"the supervisor of {folder} did not start: {said[-2000:]}")


def _supervisor_state(folder: Path) -> dict[str, Any] | None:
    try:
        state: dict[str, Any] = json.loads((folder / supervisor.STATE_FILE).read_text("utf-8"))
        of_this_folder = state["lock"] == supervisor.lock_identity(folder)
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None
    return state if of_this_folder else None


def _greet(connection: socket.socket, token: str, request: dict[str, Any]) -> bool:
    """Send the request once the other side has proved that it knows the token; False where it does not."""
    nonce = secrets.token_hex(16)
    _say(connection, {"nonce": nonce})
    reply = json.loads(_line(connection))
    if not hmac.compare_digest(reply["proof"], supervisor.proof(token, "supervisor", nonce)):
        return False
    _say(connection, {"proof": supervisor.proof(token, "caller", reply["nonce"]), **request})
    return True


def _ready(connection: socket.socket, service: Service, folder: Path) -> bool:
    """Wait until the service is ready; False where the supervisor ends instead. Raises ServiceError."""
    connection.settimeout(START_PATIENCE)
    try:
        line = b"\n"
        while line == b"\n":  # an empty line: the server was started anew while we waited
            line = _line(connection)
    except ConnectionError:
        return False
    if not line:
        return False
    if problem := json.loads(line).get("error"):
        raise ServiceError(f"{service} cannot be started in {folder}: {problem}")
    return True


def _say(connection: socket.socket, message: dict[str, Any]) -> None:
    connection.sendall(json.dumps(message).encode() + b"\n")


def _line(connection: socket.socket) -> bytes:
    """One line, or less at the end; by single bytes, so that what comes after it stays in the socket."""
    line = bytearray()
    while not line.endswith(b"\n") and (byte := connection.recv(1)):
        line += byte
    return bytes(line)


@contextmanager
def _closed_on_error(connection: socket.socket) -> Iterator[None]:
    try:
        yield
    except BaseException:
        connection.close()
        raise


@contextmanager
def _turn(folder: Path) -> Iterator[None]:
    """One thread of one process at a time starts a supervisor."""
    with _starting:
        descriptor = supervisor.take_lock(folder / "starting.lock", START_PATIENCE)
        try:
            yield
        finally:
            os.close(descriptor)


def _forget_in_child() -> None:
    """A forked child takes leases of its own: with copies of ours, it would hold the services up after our death."""
    global _lock, _starting
    _lock, _starting = threading.Lock(), threading.Lock()
    _flights.clear()
    for lease in _leases.values():
        lease.close()
    _leases.clear()


atexit.register(release)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_in_child)
