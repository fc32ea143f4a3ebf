"""PostgreSQL and Valkey as child processes: prepare the data, start, know when ready, stop.

Runs inside the supervisor, with the standard library alone.

- Both listen on 127.0.0.1, TCP only: a socket's path must not be longer than about 100 characters, a data folder's may.
- Under root the servers run as ``nobody``: PostgreSQL refuses to run as root, and Valkey has no need to. Binaries of a
  wheel that ``nobody`` cannot reach (an environment below ``/root``) are copied beside the data.
- Ports lie below the range from which the operating system takes ports for outgoing connections. A client that keeps
  connecting to a port of that range while its server is down may end up connected to itself, and hold the port.
- PostgreSQL is ready when ``postmaster.pid`` says so *and* names our child: a killed server leaves the file behind.
  After a kill its last backends may still hold the shared memory for a moment; a start is then repeated.
- The servers die with the supervisor, however it dies (Linux: ``prctl(2)``, PR_SET_PDEATHSIG). Where that is not to be
  had, the next start finds the orphan and ends it.
- Settings are command line options and standard input, never lines added to a file: a changed port or password needs no
  edit, and no password is in a file that the server's user owns, or in the process list.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import random
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, ClassVar

HOST = "127.0.0.1"
PORTS = range(20_000, 32_000)
LOG_LIMIT = 1_000_000  # bytes; a longer log is set aside at the next start
PORT_PATIENCE = 5.0  # seconds that a restarted server waits for its old port, because clients know it
START_PATIENCE = 20.0  # seconds in which a start that fails for a passing reason is repeated
POLL = 0.02  # seconds between two looks at a starting server

_LINUX: bool = "linux" in sys.platform
IN_USE = "Address already in use"
PASSING = ("pre-existing shared memory block", 'lock file "postmaster.pid" already exists')


class LaunchError(Exception):
    """A server could not be prepared or started. The message is for the user."""


@dataclass(frozen=True)
class Candidate:
    """Binaries that may be used.

    Args:
        path: PostgreSQL: the folder with ``initdb`` and ``postgres``; Valkey: the executable.
        root: the folder that ``parts`` are relative to (a wheel's ``site-packages``).
        parts: what must be copied, beside each other, for a copy to work; empty where no copy is to be made.
    """

    path: str
    root: str = ""
    parts: tuple[str, ...] = ()


@dataclass(frozen=True)
class Login:
    """Where a server listens and how to log in; kept from start to start in a file that only its owner reads."""

    port: int
    user: str | None
    password: str

    @classmethod
    def read(cls, path: Path) -> Login | None:
        """The login kept in ``path``; None where there is none."""
        try:
            return cls(**json.loads(path.read_text("utf-8")))
        except FileNotFoundError:
            return None
        except (ValueError, TypeError) as error:
            raise LaunchError(f"{path} is damaged ({error}); move it and the data beside it away") from None

    def write(self, path: Path) -> None:
        """Keep it in ``path``."""
        write_private(path, {"port": self.port, "user": self.user, "password": self.password})


class ServerUser:
    """The user whom the servers run as: the one who started the supervisor, or ``nobody`` where that is root."""

    def __init__(self) -> None:
        self._dropped: tuple[int, int] | None = None
        if os.geteuid() == 0:
            import pwd  # not on Windows, where this module is imported but not used

            entry = pwd.getpwnam("nobody")
            self._dropped = (entry.pw_uid, entry.pw_gid)

    def __str__(self) -> str:
        return "you" if self._dropped is None else "the user 'nobody', as whom the servers run under root,"

    def options(self) -> dict[str, Any]:
        """What makes ``subprocess`` run a child as this user."""
        if self._dropped is None:
            return {}
        return {"user": self._dropped[0], "group": self._dropped[1], "extra_groups": []}

    def own(self, path: Path) -> None:
        """Make ``path`` this user's."""
        if self._dropped is not None:
            os.chown(path, *self._dropped)

    def check_reach(self, folder: Path) -> None:
        """Raise LaunchError where this user cannot enter ``folder``."""
        if self._dropped is None:
            return
        for path in reversed((folder, *folder.parents)):
            mode = path.stat().st_mode & 0o777
            if not mode & 0o001:
                raise LaunchError(
                    f"under root the servers run as 'nobody', who cannot enter {path} (mode {mode:o}): "
                    f"run `chmod o+x {path}`, or set KAILASH_NB_SERVICES to a folder that everybody can enter"
                )


class Server(ABC):
    """One kind of server on its own data folder. Lives as long as the supervisor; its process may come and go."""

    name: ClassVar[str]
    title: ClassVar[str]
    variable: ClassVar[str]  # names the binaries to use
    user: ClassVar[str | None]
    stop_signals: ClassVar[Sequence[tuple[signal.Signals, float]]]  # each with the seconds it is given
    death_signal: ClassVar[signal.Signals]  # sent by the operating system when the supervisor dies

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.data = folder / self.name
        self.process: asyncio.subprocess.Process | None = None
        self._log = folder / f"{self.name}.log"
        self._login_file = folder / f"{self.name}.json"
        self._as = ServerUser()
        self._was_up = False

    @property
    def running(self) -> bool:
        """Whether the server's process is there."""
        return self.process is not None and self.process.returncode is None

    async def start(self, candidates: Sequence[Candidate]) -> None:
        """Start it and return when it answers queries. Raises LaunchError, and OSError where the disk says no."""
        self._as.check_reach(self.folder)
        program = await self._choose(candidates)
        login = self._login()
        await self._prepare(program, login)
        await self._end_orphan(login)
        await self._launch(program, login)
        self._was_up = True

    async def stop(self) -> None:
        """Stop it within three seconds: kindly first, by force if it takes too long."""
        for number, patience in self.stop_signals:
            if self.process is None or self.process.returncode is not None:
                return
            with suppress(ProcessLookupError):
                self.process.send_signal(number)
            with suppress(TimeoutError):
                await asyncio.wait_for(self.process.wait(), patience)

    @abstractmethod
    def _executable(self, path: Path) -> Path:
        """The server's executable among a candidate's binaries."""

    @abstractmethod
    async def _prepare(self, program: Path, login: Login) -> None:
        """Make the data folder where there is none."""

    @abstractmethod
    async def _orphan(self, login: Login) -> int | None:
        """The process id of a server that still lives on our data, left by a supervisor that was killed."""

    @abstractmethod
    def _command(self, program: Path, login: Login) -> tuple[list[str], str]:
        """The command line and the standard input that start the server."""

    @abstractmethod
    async def _answers(self, login: Login) -> bool:
        """Whether our child, and no other server, answers queries by now."""

    def _fits(self, version: str) -> bool:
        """Whether binaries that say this of their version can read the data that is there."""
        return True

    def _none_fits(self, found: Sequence[tuple[Path, str]]) -> LaunchError:
        """Says which versions were found, and what would do."""
        raise NotImplementedError

    async def _choose(self, candidates: Sequence[Candidate]) -> Path:
        unfit, refused = [], []
        for candidate in candidates:
            try:
                path, version = await self._tried(candidate)
            except PermissionError:
                refused.append(f"{candidate.path} ({self._as} cannot reach or run it)")
            except (OSError, LaunchError) as error:
                refused.append(f"{candidate.path} ({getattr(error, 'strerror', None) or error})")
            else:
                if self._fits(version):
                    return path
                unfit.append((path, version))
        if unfit:
            raise self._none_fits(unfit)
        raise LaunchError(
            f"no usable {self.title} among the binaries found: {'; '.join(refused)}; set {self.variable} to others"
        )

    async def _tried(self, candidate: Candidate) -> tuple[Path, str]:
        """A candidate's binaries, or the copy that is needed, and what they say of their version."""
        path = Path(candidate.path)
        try:
            return path, await self._version(path)
        except PermissionError:
            if not candidate.parts or not self._as.options():
                raise
        path = await asyncio.to_thread(self._copied, candidate)
        return path, await self._version(path)

    async def _version(self, path: Path) -> str:
        status, output = await self._run([str(self._executable(path)), "--version"])
        if status:
            raise LaunchError(output.strip()[:300] or f"exit status {status}")
        return output.strip()

    def _copied(self, candidate: Candidate) -> Path:
        """A copy of a wheel's binaries that the server's user can reach."""
        executable = self._executable(Path(candidate.path))
        stamp = f"{executable} {executable.stat().st_mtime_ns}"
        copies = self.folder / "binaries"
        target = copies / f"{self.name}-{hashlib.sha256(stamp.encode()).hexdigest()[:12]}"
        if not target.exists():
            copies.mkdir(exist_ok=True)
            for old in copies.glob(f"{self.name}-*"):
                shutil.rmtree(old)
            unfinished = target.with_suffix(".new")
            for part in candidate.parts:
                ignored = shutil.ignore_patterns("include", "__pycache__")
                shutil.copytree(Path(candidate.root, part), unfinished / part, symlinks=True, ignore=ignored)
            _open_to_all(copies)
            unfinished.rename(target)
        return target / Path(candidate.path).relative_to(candidate.root)

    def _login(self) -> Login:
        login = Login.read(self._login_file)
        if login is None:
            login = Login(free_port(), self.user, secrets.token_urlsafe(24))
            login.write(self._login_file)
        return login

    async def _end_orphan(self, login: Login) -> None:
        pid = await self._orphan(login)
        if pid is None:
            return
        for number, patience in self.stop_signals:
            with suppress(ProcessLookupError):
                os.kill(pid, number)
            deadline = time.monotonic() + patience
            while time.monotonic() < deadline:
                if not command_line(pid):
                    return
                await asyncio.sleep(POLL)

    async def _launch(self, program: Path, login: Login) -> None:
        began = time.monotonic()
        port_patience = PORT_PATIENCE if self._was_up else 0
        while True:
            command, settings = self._command(program, login)
            with self._log_file() as log:
                said_before = log.tell()
                self.process = await self._spawn(command, stdin=subprocess.PIPE, stdout=log, stderr=log, cwd=self.data)
                await _feed(self.process, settings)
            while self.running:
                if await self._answers(login) and self.running:
                    return
                await asyncio.sleep(POLL)
            said = self._said_since(said_before)
            waited = time.monotonic() - began
            if IN_USE in said and port_patience <= waited < START_PATIENCE:
                login = Login(free_port(), login.user, login.password)
                login.write(self._login_file)
            elif waited > START_PATIENCE or not any(reason in said for reason in (IN_USE, *PASSING)):
                raise self._not_started(said)
            await asyncio.sleep(0.1)

    def _not_started(self, said: str) -> LaunchError:
        status = self.process.returncode if self.process else None
        lines = "\n".join(f"  {line}" for line in said.strip().splitlines()[-12:])
        return LaunchError(f"{self.title} did not start (exit status {status}); {self._log} ends:\n{lines}")

    async def _spawn(self, command: list[str], **options: Any) -> asyncio.subprocess.Process:
        return await asyncio.create_subprocess_exec(
            *command,
            **{"cwd": "/", **options, **self._as.options()},
            env=environment(),
            preexec_fn=_dying_with_parent(self.death_signal),
        )

    async def _run(self, command: list[str]) -> tuple[int, str]:
        """Run a short command to its end; returns its exit status and what it printed."""
        process = await self._spawn(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        try:
            output, _ = await process.communicate()
        except asyncio.CancelledError:
            with suppress(ProcessLookupError):
                process.kill()
            raise
        return process.returncode or 0, output.decode(errors="replace")

    @contextmanager
    def _log_file(self) -> Iterator[IO[bytes]]:
        if self._log.exists() and self._log.stat().st_size > LOG_LIMIT:
            self._log.replace(self._log.with_suffix(".old.log"))
        descriptor = os.open(self._log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        with os.fdopen(descriptor, "ab") as log:
            yield log

    def _said_since(self, position: int) -> str:
        with self._log.open("rb") as log:
            log.seek(position)
            return log.read(LOG_LIMIT).decode(errors="replace")


class Postgres(Server):
    """PostgreSQL with SCRAM logins, a superuser ``kailash`` and the database ``postgres``."""

    name = "postgres"
    title = "PostgreSQL"
    variable = "KAILASH_NB_POSTGRES_BIN"
    user = "kailash"
    # Fast, immediate (the next start recovers from the log), and by force.
    stop_signals = ((signal.SIGINT, 1.7), (signal.SIGQUIT, 0.5), (signal.SIGKILL, 0.3))
    death_signal = signal.SIGINT

    SETTINGS: ClassVar[dict[str, str]] = {
        "listen_addresses": HOST,
        "unix_socket_directories": "",
        "password_encryption": "scram-sha-256",
        "shared_buffers": "32MB",
        "max_connections": "50",
        "logging_collector": "off",
        "log_destination": "stderr",
        "log_min_messages": "log",  # starts, stops and refused logins; no statement of the user, and no value in one
    }

    def _executable(self, path: Path) -> Path:
        return path / "postgres"

    def _fits(self, version: str) -> bool:
        return self._made_by() in (None, _major(version))

    def _none_fits(self, found: Sequence[tuple[Path, str]]) -> LaunchError:
        made_by = self._made_by()
        known = ", ".join(f"{_major(version)} ({path})" for path, version in found)
        return LaunchError(
            f"the data in {self.data} was made by PostgreSQL {made_by}, the binaries found are of PostgreSQL {known}, "
            f"and one major version cannot read another's data: set {self.variable} to the folder with initdb and "
            f"postgres of version {made_by}, or move {self.data} away to begin with an empty database"
        )

    def _made_by(self) -> str | None:
        try:
            return (self.data / "PG_VERSION").read_text().strip()
        except FileNotFoundError:
            return None

    def _login(self) -> Login:
        if self.data.exists() and not self._login_file.exists():
            raise LaunchError(
                f"{self._login_file}, which holds the password of the data in {self.data}, is missing: "
                f"put it back, or move {self.data} away to begin with an empty database"
            )
        return super()._login()

    async def _prepare(self, program: Path, login: Login) -> None:
        if self.data.exists():
            return
        # Made beside and renamed: an initdb that was interrupted leaves no half a database under the final name.
        unfinished, password = self.data.with_suffix(".new"), self.folder / "initdb.password"
        if unfinished.exists():
            shutil.rmtree(unfinished)
        unfinished.mkdir(mode=0o700)
        try:
            write_private(password, login.password)
            for path in (unfinished, password):
                self._as.own(path)
            status, output = await self._run(_initdb(program, unfinished, password))
        finally:
            password.unlink(missing_ok=True)
        if status:
            raise LaunchError(f"{program / 'initdb'} could not make {self.data}:\n{output.strip()[-2000:]}")
        unfinished.rename(self.data)

    async def _orphan(self, login: Login) -> int | None:
        pid_file = self.data / "postmaster.pid"
        try:
            pid = int(pid_file.read_text().split("\n", 1)[0])
        except (FileNotFoundError, ValueError):
            return None
        command = command_line(pid)
        if str(self.data) in command:
            return pid
        if _exists(pid):
            # The number belongs to another process by now, or to one that is dead and was never waited for; PostgreSQL
            # would take either for a living server.
            pid_file.unlink()
        return None

    def _command(self, program: Path, login: Login) -> tuple[list[str], str]:
        settings = {**self.SETTINGS, "port": str(login.port)}
        options = [word for key, value in settings.items() for word in ("-c", f"{key}={value}")]
        return [str(program / "postgres"), "-D", str(self.data), *options], ""

    async def _answers(self, login: Login) -> bool:
        try:
            lines = (self.data / "postmaster.pid").read_text().splitlines()
        except FileNotFoundError:
            return False
        return len(lines) > 7 and self.process is not None and lines[0] == str(self.process.pid) and "ready" in lines[7]


class Valkey(Server):
    """Valkey (or Redis) with a password and an append-only file, written before each answer."""

    name = "valkey"
    title = "Valkey"
    variable = "KAILASH_NB_VALKEY_SERVER"
    user = None
    stop_signals = ((signal.SIGTERM, 2.0), (signal.SIGKILL, 0.5))
    death_signal = signal.SIGKILL  # what it has answered is with the operating system, so nothing is lost

    def _executable(self, path: Path) -> Path:
        return path

    async def _prepare(self, program: Path, login: Login) -> None:
        self.data.mkdir(mode=0o700, exist_ok=True)
        self._as.own(self.data)

    async def _orphan(self, login: Login) -> int | None:
        # Its folder is asked for, too: a copied folder brings the port and password of a server that is not ours.
        reply = await _ask_valkey(login, "CONFIG GET dir", patience=2.0)
        pid = re.search(r"process_id:(\d+)", reply)
        folder = re.search(r"\r\ndir\r\n\$\d+\r\n(.*)\r\n", reply)
        return int(pid[1]) if pid and folder and _same_folder(folder[1], self.data) else None

    def _command(self, program: Path, login: Login) -> tuple[list[str], str]:
        settings = (
            f"bind {HOST}",
            f"port {login.port}",
            f"requirepass {login.password}",
            "protected-mode yes",
            "daemonize no",
            "appendonly yes",
            'save ""',
        )
        return [str(program), "-"], "".join(f"{line}\n" for line in settings)

    async def _answers(self, login: Login) -> bool:
        reply = await _ask_valkey(login, "PING", patience=0.5)
        return "+PONG" in reply and self.process is not None and f"process_id:{self.process.pid}\r" in reply


def write_private(path: Path, content: Any) -> None:
    """Replace ``path`` at once by ``content`` (text, or anything JSON holds), readable by its owner only."""
    text = content if isinstance(content, str) else json.dumps(content)
    unfinished = path.with_name(f"{path.name}.new")
    unfinished.unlink(missing_ok=True)
    descriptor = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(text)
    unfinished.replace(path)


def free_port() -> int:
    """A port of HOST on which nobody listens."""
    while True:
        port = random.choice(PORTS)
        with socket.socket() as trial, suppress(OSError):
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            trial.bind((HOST, port))
            return port


def command_line(pid: int) -> str:
    """The command line of a living process; empty where there is none, or only its remains."""
    if _LINUX:
        try:
            return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="surrogateescape")
        except OSError:
            return ""
    command = ["/bin/ps", "-ww", "-o", "command=", "-p", str(pid)]
    shown = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    return "" if shown == "<defunct>" else shown


def environment() -> dict[str, str]:
    """What the supervisor and the servers get of our environment: no PG* variable, nothing that might be a secret."""
    kept = ("PATH", "TZ", "TMPDIR", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH")
    return {**{name: os.environ[name] for name in kept if name in os.environ}, "LC_ALL": "C"}


def _same_folder(one: str, other: Path) -> bool:
    try:
        return other.samefile(one)
    except OSError:
        return False


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _major(version: str) -> str:
    """``"18"`` of ``"postgres (PostgreSQL) 18.4"``, and of a beta's ``18beta1``."""
    found = re.search(r"PostgreSQL\) (\d+)", version)
    return found[1] if found else "?"


def _initdb(program: Path, data: Path, password: Path) -> list[str]:
    return [
        str(program / "initdb"),
        f"--pgdata={data}",
        f"--username={Postgres.user}",
        f"--pwfile={password}",
        "--auth=scram-sha-256",
        "--encoding=UTF8",
        "--locale=C",
        "--no-sync",
    ]


async def _ask_valkey(login: Login, command: str, patience: float) -> str:
    """What the server on this port says to a command and about itself; empty where none takes our password in time.

    Inline commands and raw replies, see https://valkey.io/topics/protocol/.
    """
    writer = None
    try:
        async with asyncio.timeout(patience):
            reader, writer = await asyncio.open_connection(HOST, login.port)
            writer.write(f"AUTH {login.password}\r\n{command}\r\nINFO server\r\nQUIT\r\n".encode())
            return (await reader.read()).decode(errors="surrogateescape")
    except (OSError, TimeoutError):
        return ""
    finally:
        if writer is not None:
            writer.close()


async def _feed(process: asyncio.subprocess.Process, text: str) -> None:
    """Write ``text`` to the standard input of a process, and end it."""
    assert process.stdin is not None
    with suppress(ConnectionError):  # it has died at once; its exit status and its log say why
        process.stdin.write(text.encode())
        await process.stdin.drain()
    process.stdin.close()


def _dying_with_parent(number: signal.Signals) -> Callable[[], None] | None:
    """What a child calls so that it gets this signal when the thread that started it is no more."""
    if not _LINUX:
        return None
    try:
        import ctypes

        prctl = ctypes.CDLL(None).prctl
    except (ImportError, OSError, AttributeError):
        return None
    parent, set_death_signal = os.getpid(), 1

    def arm() -> None:
        prctl(set_death_signal, int(number), 0, 0, 0)
        if os.getppid() != parent:  # it died before this call
            os._exit(1)

    return arm


def _open_to_all(folder: Path) -> None:
    """Let everybody read what lies in ``folder``, and run what its owner may run."""
    for path in (folder, *folder.rglob("*")):
        if not path.is_symlink():
            mode = path.stat().st_mode
            path.chmod(mode | (0o555 if mode & 0o100 else 0o444))
