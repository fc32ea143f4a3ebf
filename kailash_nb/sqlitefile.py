"""One SQLite file: how it is opened, migrated, written and read by many threads, event loops and processes at once.

**One writer thread.** ``sqlite3`` blocks, so writes go through a queue to a thread with a connection of its own.
Whatever waits there goes into one transaction (group commit), each write in its own savepoint: one disk sync serves
many writers, and one that fails takes nobody with it.

**A rollback journal, not WAL.** ``journal_mode=truncate`` with ``synchronous=full`` survives power loss, needs no
checkpoints, works on network homes (WAL does not), and is safe in every SQLite version: before 3.51.3, one connection
that checkpoints a WAL while another writes may corrupt the file. Nor does it leave old pages in a log, so what is
deleted is gone. A store with more traffic passes ``pragmas`` of its own.

**Reading is remembering.** :meth:`SqliteFile.stamp` tells in microseconds whether anything was committed, so a caller
keeps what it has read and reads anew only after a change.

Needs SQLite 3.40 or later.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import queue
import sqlite3
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar

from .exceptions import StoreError

T = TypeVar("T")
Stamp = tuple[int, int]
"""What :meth:`SqliteFile.stamp` returns; good for comparing with ``==`` only."""

_PRAGMAS: Final = {"journal_mode": "truncate", "synchronous": "full", "foreign_keys": "on", "trusted_schema": "off"}
_BUSY_SECONDS: Final = 30
_BATCH: Final = 256
_FAULTS: Final = (sqlite3.Error, UnicodeDecodeError)
"""What sqlite3 raises; the second for a damaged file, whose messages quote bytes that are no text."""

# Within one process a file is not made while another thread opens it: closing the descriptor that made it would release
# the locks of a connection opened in between (https://www.sqlite.org/howtocorrupt.html, section 2.2).
_opening = threading.Lock()
_numbers = itertools.count(1)


class SqliteFile:
    """A SQLite file with numbered migrations and one writer thread.

    Args:
        path: the file. It (mode 0600) and its folder (mode 0700) are made on first use.
        migrations: SQL scripts; script ``n`` takes the file from version ``n`` to ``n + 1`` (``pragma user_version``).
            A released script never changes; new ones are added at the end.
        application_id: a number that marks files of this kind (``pragma application_id``), so that the path of another
            program's database is an error and not a mess.
        pragmas: set on each connection, over the defaults.
        remedy: what the user can do when the file cannot be used; such messages end with it.

    The constructor does no I/O; the first use opens the file. Lives until :meth:`close`, and the next use opens it
    again. Every method may be called from any thread and any event loop, while other processes use the same file. A
    process made by ``fork`` opens it anew; so does everyone, a file that was removed or replaced meanwhile.

    Every method raises StoreError when the file cannot be opened, read or written.
    """

    def __init__(
        self,
        path: Path,
        migrations: Sequence[str],
        *,
        application_id: int,
        pragmas: Mapping[str, str | int] | None = None,
        remedy: str = "",
    ) -> None:
        self.path = path.absolute()
        self._migrations = tuple(migrations)
        self._application_id = application_id
        self._pragmas = {**_PRAGMAS, **(pragmas or {})}
        self._remedy = remedy
        self._lock = threading.Lock()
        self._opening: _Opening | None = None
        self._finalizer: weakref.finalize[[], SqliteFile] | None = None
        _files.add(self)

    def __repr__(self) -> str:
        return f"<SqliteFile {self.path}{'' if self._opening else ', not open'}>"

    def open(self) -> None:
        """Open the file now; make or migrate it where needed. Blocks for some milliseconds; open already is fine."""
        self._opened()

    async def write(self, fn: Callable[[sqlite3.Connection], T]) -> T:
        """Run ``fn(connection)`` in the writer thread, in a transaction; returns its result once that is on disk.

        What ``fn`` raises is raised here, and undoes its own changes alone. ``fn`` neither begins nor commits. When the
        waiting task is cancelled, ``fn`` runs not at all or to its end.
        """
        if self._opening is None:
            await asyncio.to_thread(self.open)
        return await asyncio.wrap_future(self._submit(fn))

    def write_now(self, fn: Callable[[sqlite3.Connection], T]) -> T:
        """:meth:`write` for code without an event loop: blocks until the change is on disk."""
        return self._submit(fn).result()

    def read(self, fn: Callable[[sqlite3.Connection], T]) -> T:
        """Run ``fn(connection)`` in the calling thread on one consistent state of the file; it may not write.

        Blocks for as long as ``fn`` takes, and while a commit is under way: milliseconds, 30 s at most.
        """
        return self._reading(lambda opening: opening.read(fn))

    def stamp(self) -> Stamp:
        """A stamp that differs from an earlier one when anyone, in this process or another, has committed in between.

        Take it before reading what is to be kept. Costs microseconds, but waits while a commit is under way.
        """
        return self._reading(lambda opening: opening.stamp())

    def close(self) -> None:
        """Finish the writes that wait, and close; closing twice is fine. Blocks until the thread has ended."""
        with self._lock:
            opening, self._opening = self._opening, None
        if opening is not None:
            opening.close()
            opening.thread.join()

    def _submit(self, fn: Callable[[sqlite3.Connection], T]) -> Future[T]:
        job = _Job(fn, Future())
        while not self._opened().submit(job):
            pass  # closed in between
        return job.future

    def _reading(self, use: Callable[[_Opening], T]) -> T:
        while True:
            opening = self._opened()
            with opening.reading:
                if not opening.closed:
                    try:
                        return use(opening)
                    except _FAULTS as error:
                        raise _unusable(self.path, error, self._remedy) from error

    def _opened(self) -> _Opening:
        with self._lock:
            if self._opening is not None and not self._opening.is_of(self.path):
                self._opening.close()
                self._opening = None
            if self._opening is None:
                self._opening = self._open()
                # The thread does not hold this object, so what nobody closed ends with the last reference to it.
                self._finalizer = weakref.finalize(self, self._opening.close)
            return self._opening

    def _open(self) -> _Opening:
        connections: list[sqlite3.Connection] = []
        try:
            with _opening:
                _make(self.path)
                connections += [_connected(self.path), _connected(self.path)]
            writer, reader = connections
            self._check_version(writer)
            for connection in connections:
                for name, value in self._pragmas.items():
                    connection.execute(f"pragma {name}={value}").fetchall()
            self._migrate(writer)
            reader.execute("pragma query_only=on")
            return _Opening(self.path, writer, reader, self._remedy)
        except BaseException as error:
            for connection in connections:
                connection.close()
            if isinstance(error, (OSError, *_FAULTS)):
                raise _unusable(self.path, error, self._remedy) from error
            raise

    def _migrate(self, connection: sqlite3.Connection) -> None:
        if self._check_version(connection) == len(self._migrations):
            return
        connection.execute("begin immediate")
        # Asked again: another process may have migrated the file while this one waited for the lock.
        done = self._check_version(connection)
        for number, script in enumerate(self._migrations[done:], done + 1):
            for statement in _statements(script):
                connection.execute(statement)
            connection.execute(f"pragma user_version={number}")
        connection.execute(f"pragma application_id={self._application_id}")
        connection.execute("commit")

    def _check_version(self, connection: sqlite3.Connection) -> int:
        version: int = connection.execute("pragma user_version").fetchone()[0]
        kind: int = connection.execute("pragma application_id").fetchone()[0]
        tables: int = connection.execute("select count(*) from sqlite_master").fetchone()[0]
        if kind != self._application_id and (kind or version or tables):
            raise _unusable(self.path, "it is a database of something else, and was left as it is", self._remedy)
        if version > len(self._migrations):
            newer = f"a newer kailash_nb wrote it (format {version}; this one knows {len(self._migrations)}): update"
            raise _unusable(self.path, newer, self._remedy)
        return version

    def _forget(self) -> None:
        # In the child of a fork: the connections are the parent's, and even closing them would disturb it.
        _inherited.append(self._opening)
        if self._finalizer is not None:
            self._finalizer.detach()
        self._opening = None
        self._lock = threading.Lock()


@dataclass(frozen=True)
class _Job:
    fn: Callable[[sqlite3.Connection], Any]
    future: Future[Any]


class _Opening:
    """One opening of a file: two connections, the queue and its thread. Lives until closed; a file may have many."""

    def __init__(self, path: Path, writer: sqlite3.Connection, reader: sqlite3.Connection, remedy: str) -> None:
        self.closed = False
        self.reading = threading.Lock()
        self._path, self._writer, self._reader, self._remedy = path, writer, reader, remedy
        self._inode = _inode(path)
        self._number = next(_numbers)
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._submitting = threading.Lock()
        self.thread = threading.Thread(target=self._serve, name=f"kailash_nb {path.name}", daemon=True)
        self.thread.start()

    def is_of(self, path: Path) -> bool:
        return self._inode == _inode(path)

    def submit(self, job: _Job) -> bool:
        """Queue a job; False where this is closed."""
        if threading.current_thread() is self.thread:
            raise StoreError("a write would wait for itself; inside one, use the connection that it was given")
        with self._submitting:
            if not self.closed:
                self._jobs.put(job)
            return not self.closed

    def read(self, fn: Callable[[sqlite3.Connection], T]) -> T:
        self._reader.execute("begin")
        try:
            return fn(self._reader)
        finally:
            self._reader.execute("commit")

    def stamp(self) -> Stamp:
        version: int = self._reader.execute("pragma data_version").fetchone()[0]
        return self._number, version

    def close(self) -> None:
        with self._submitting:
            if not self.closed:
                self.closed = True
                self._jobs.put(None)

    def _serve(self) -> None:
        while self._turn():
            pass
        with self.reading:
            self._reader.close()
            self._writer.close()

    def _turn(self) -> bool:
        """Commit what waits; False where nothing will come any more. Its locals end here: a job may hold a secret."""
        waiting = [self._jobs.get()]
        while waiting[-1] is not None and len(waiting) < _BATCH and not self._jobs.empty():
            waiting.append(self._jobs.get())
        jobs = [job for job in waiting if job is not None and job.future.set_running_or_notify_cancel()]
        for job, (result, error) in zip(jobs, self._committed(jobs), strict=True):
            if error is None:
                job.future.set_result(result)
            elif isinstance(error, _FAULTS):
                job.future.set_exception(_unusable(self._path, error, self._remedy))
            else:
                job.future.set_exception(error)
        return waiting[-1] is not None

    def _committed(self, jobs: Sequence[_Job]) -> list[tuple[Any, BaseException | None]]:
        if not jobs:
            return []
        try:
            self._writer.execute("begin immediate")
            outcomes = [self._attempt(job.fn) for job in jobs]
            self._writer.execute("commit")
        except _FAULTS as error:
            outcomes = [(None, error)] * len(jobs)
            # Where even that fails, the next `begin` meets the same fault and tells the next caller.
            with contextlib.suppress(sqlite3.Error):
                self._writer.rollback()
        return outcomes

    def _attempt(self, fn: Callable[[sqlite3.Connection], Any]) -> tuple[Any, BaseException | None]:
        self._writer.execute("savepoint job")
        try:
            result = fn(self._writer)
        except BaseException as error:
            if not self._writer.in_transaction and isinstance(error, sqlite3.Error):
                raise  # a full disk and the like: SQLite has undone the whole transaction
            self._writer.execute("rollback to job")
            self._writer.execute("release job")
            return None, error
        self._writer.execute("release job")
        return result, None


def _connected(path: Path) -> sqlite3.Connection:
    return sqlite3.connect(path, timeout=_BUSY_SECONDS, isolation_level=None, check_same_thread=False)


def _make(path: Path) -> None:
    """Make the file for its owner alone, before SQLite would make it for everyone."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))
    except FileExistsError:
        status = path.stat()
        if status.st_mode & 0o077 and status.st_uid == os.getuid():
            path.chmod(0o600)


def _inode(path: Path) -> tuple[int, int] | None:
    try:
        status = os.stat(path)  # noqa: PTH116 - twice as fast as Path.stat, and asked at every read
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _statements(script: str) -> Iterator[str]:
    # `executescript` would commit the transaction that a migration runs in.
    statement = ""
    for line in script.splitlines(keepends=True):
        statement += line
        if sqlite3.complete_statement(statement):
            yield statement
            statement = ""
    if statement.strip():
        yield statement


def _unusable(path: Path, reason: object, remedy: str) -> StoreError:
    if getattr(reason, "sqlite_errorname", "").startswith("SQLITE_BUSY"):
        reason = f"another process has kept it locked for {_BUSY_SECONDS} s"
    if isinstance(reason, OSError):
        reason = reason.strerror
    if isinstance(reason, UnicodeDecodeError):
        reason = "it is damaged"
    return StoreError(f"{path} cannot be used: {reason}{f'; {remedy}' if remedy else ''}")


_files: weakref.WeakSet[SqliteFile] = weakref.WeakSet()
_inherited: list[object] = []


def _forget_all() -> None:
    global _opening
    _opening = threading.Lock()
    for file in list(_files):
        file._forget()


os.register_at_fork(after_in_child=_forget_all)
