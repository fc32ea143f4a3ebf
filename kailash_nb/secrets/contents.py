"""What a secrets file holds at one moment, checked: its rows, and the manifest that vouches for them.

There is one row for each kept version of a secret, and one *manifest*: every name with its current version, the last
version ever given to it and a digest of its rows, authenticated with a key that derives from the key-encryption key.
Who can write the file but has no key can thus neither alter, swap, add, remove nor roll back a secret unnoticed: that
secret is refused, by name, and the others work on. A name that the manifest does not list does not exist.

**Not noticed:** an older copy of the whole file put in its place, for all of it was true once. That takes a witness
outside the file.

Version numbers only grow, also across a deletion, because pools of connections are kept by them.
"""

from __future__ import annotations

import datetime as dt
import hmac
import json
import os
import sqlite3
import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Final, NamedTuple

from ..exceptions import SecretBindingError, SecretIntegrityError, SecretNotFoundError
from .encryption import KEY_BYTES, Key, Label, Plaintext, digest

APPLICATION_ID: Final = 0x6B6E7365
PRAGMAS: Final = {"secure_delete": "on", "cell_size_check": "on"}
"""What is deleted is overwritten: a destroyed secret does not live on in a free page."""

MIGRATIONS: Final = (
    """
    create table store (
        one integer primary key check (one = 1),
        id text not null,
        key_id text not null,
        key_keeper text not null,
        manifest text not null,
        tag blob not null
    );
    create table secret (
        name text not null,
        version integer not null,
        created_ms integer not null,
        fields text not null,
        bindings text not null,
        rotation_days integer,
        envelope blob,
        readable text,
        primary key (name, version)
    ) without rowid;
    """,
)
_TLS: Final = ("verify-full", "require", "off")


@dataclass(frozen=True, order=True)
class Binding:
    """One use that a secret is allowed: a kind of resource, the place its login is sent to, and how that is verified.

    Args:
        type: the resource type: ``"database"``.
        endpoint: ``"host:port"``, or the origin of a base URL (``"https://api.example.com"``).
        tls: ``"verify-full"``, ``"require"`` or ``"off"``.

    Raises SecretBindingError where one of them is missing. Two uses are the same when all three are.
    """

    type: str
    endpoint: str
    tls: str

    def __post_init__(self) -> None:
        if not all(isinstance(part, str) and part for part in (self.type, self.endpoint)) or self.tls not in _TLS:
            raise SecretBindingError(
                "a binding is a resource type, an endpoint ('host:port' or 'https://host') and a tls mode "
                f"({', '.join(_TLS)}); not {self.type!r:.80}, {self.endpoint!r:.80}, {self.tls!r:.80}"
            )

    def __str__(self) -> str:
        return f"{self.type} at {self.endpoint} (tls {self.tls})"


@dataclass(frozen=True)
class SecretInfo:
    """All that may be told about a secret, which is all but its value. True at the moment it was made.

    ``due`` is when the secret should be replaced: ``rotation_days`` after ``created``. ``encrypted`` is False where it
    lies readable in the file. ``problem`` says why the secret is refused; then only its name and version are known.
    """

    name: str
    version: int
    fields: tuple[str, ...] = ()
    created: dt.datetime | None = None
    rotation_days: int | None = None
    due: dt.datetime | None = None
    bindings: tuple[Binding, ...] = ()
    encrypted: bool = True
    problem: str | None = None


class StoreRow(NamedTuple):
    """The file's row about itself: the key it needs, who keeps that, and the manifest with its authentication tag."""

    id: str
    key_id: str
    key_keeper: str
    manifest: str
    tag: bytes


class SecretRow(NamedTuple):
    """One version of one secret as it lies in the file; either ``envelope`` or ``readable`` holds the value."""

    name: str
    version: int
    created_ms: int
    fields: str
    bindings: str
    rotation_days: int | None
    envelope: bytes | None
    readable: str | None


class Entry(NamedTuple):
    """The manifest's line about one name. ``current`` is None after a deletion."""

    current: int | None
    last: int
    digest: str


def read(connection: sqlite3.Connection, path: Path) -> tuple[StoreRow | None, dict[str, list[SecretRow]]]:
    """The file's row about itself (None in an empty file) and its secrets by name, unchecked, versions ascending.

    Raises SecretIntegrityError where the row about itself is damaged, or missing although there are secrets.
    """
    # A flipped bit may leave text that is no UTF-8: the digest finds it, and names the one secret that has it.
    connection.text_factory = lambda data: data.decode("utf-8", "replace")
    store = connection.execute("select id, key_id, key_keeper, manifest, tag from store where one = 1").fetchone()
    rows: dict[str, list[SecretRow]] = {}
    for row in connection.execute(f"select {', '.join(SecretRow._fields)} from secret order by name, version"):  # noqa: S608
        rows.setdefault(row[0], []).append(SecretRow(*row))
    if store is None and not rows:
        return None, rows
    if store is None or [type(column) for column in store] != [str, str, str, str, bytes]:
        raise _damaged(path)
    return StoreRow(*store), rows


def create(connection: sqlite3.Connection, key: Key, keeper: str) -> None:
    """Make the file a store that needs this key, unless it is a store already: another process may have been first."""
    if connection.execute("select count(*) from store").fetchone()[0] == 0:
        store = _signed(StoreRow(uuid.uuid4().hex, key.id, keeper, "{}", b""), key)
        connection.execute("insert into store values (1, ?, ?, ?, ?, ?)", store)


class Contents:
    """The secrets of a file at one moment, checked. Never changes; writing leaves it behind.

    Args:
        path: the file, for messages.
        store: the file's row about itself.
        key: the key which that names.
        rows: the secrets, as :func:`read` gives them.

    Raises SecretIntegrityError where the manifest is not one that was written with this key.
    """

    def __init__(self, path: Path, store: StoreRow, key: Key, rows: Mapping[str, Sequence[SecretRow]]) -> None:
        if not hmac.compare_digest(store.tag, _signed(store, key).tag):
            raise _damaged(path)
        self.key: Final = key
        self.is_new: Final = not store.id
        """Nothing was ever written to this file."""
        self._path: Final = path
        self._store: Final = store
        self._manifest: Final = {name: Entry(*entry) for name, entry in json.loads(store.manifest).items()}
        self._rows: Final = {
            name: rows[name]
            for name, entry in self._manifest.items()
            if name in rows and digest(rows[name]) == entry.digest
        }

    @classmethod
    def empty(cls, path: Path) -> Contents:
        """The contents of a file that is not there yet."""
        key = Key(os.urandom(KEY_BYTES))
        return cls(path, _signed(StoreRow("", key.id, "", "{}", b""), key), key, {})

    def names(self) -> list[str]:
        """The names of the secrets, sorted; of those that are refused, too."""
        return sorted(name for name, entry in self._manifest.items() if entry.current is not None)

    def entry(self, name: str) -> Entry:
        """The manifest's line about a secret. Raises SecretNotFoundError."""
        entry = self._manifest.get(name)
        if entry is None or entry.current is None:
            raise SecretNotFoundError(name, self.names())
        return entry

    def version(self, name: str) -> int | None:
        """The current version; None where there is no such secret. Raises SecretIntegrityError."""
        entry = self._manifest.get(name)
        return None if entry is None or entry.current is None else self._row(name).version

    def reveal(self, name: str) -> Plaintext:
        """The current value. Raises SecretNotFoundError, SecretIntegrityError."""
        return self._opened(self._row(name))

    def bindings(self, name: str) -> tuple[Binding, ...]:
        """What a secret may be used for, sorted. Raises SecretNotFoundError, SecretIntegrityError."""
        return _bindings(self._row(name))

    def describe(self) -> list[SecretInfo]:
        """All about each secret but its value, sorted by name."""
        return [self._described(name) for name in self.names()]

    def put(
        self, connection: sqlite3.Connection, name: str, value: Plaintext, *, encrypt: bool, rotation_days: int | None
    ) -> int:
        """Write a new current version; the one before is kept, older ones are destroyed. Returns the new version.

        It inherits the bindings, and the rotation where ``rotation_days`` is None. A secret that was refused begins
        anew, without either.
        """
        before = self._rows[name][-1] if self._is_intact(name) else None
        row = SecretRow(
            name=name,
            version=self._manifest[name].last + 1 if name in self._manifest else 1,
            created_ms=time.time_ns() // 1_000_000,
            fields=json.dumps(sorted(value.fields())),
            bindings=before.bindings if before else _canonical([]),
            rotation_days=before.rotation_days if before and rotation_days is None else rotation_days or None,
            envelope=None,
            readable=None,
        )
        row = self._sealed(row, value) if encrypt else row._replace(readable=value.data().decode())
        self._write(connection, name, Entry(row.version, row.version, ""), [before, row] if before else [row])
        return row.version

    def bind(self, connection: sqlite3.Connection, name: str, binding: Binding) -> bool:
        """Allow one more use; False where it is allowed already. The value is encrypted anew, under its new label."""
        row = self._row(name)
        if binding in _bindings(row):
            return False
        bound = row._replace(bindings=_canonical([*_bindings(row), binding]))
        if row.envelope is not None:
            bound = self._sealed(bound, self._opened(row))
        self._write(connection, name, self._manifest[name], [*self._rows[name][:-1], bound])
        return True

    def remove(self, connection: sqlite3.Connection, name: str) -> None:
        """Destroy every version of a secret, of a refused one, too. Raises SecretNotFoundError."""
        self._write(connection, name, self.entry(name)._replace(current=None), [])

    def _is_intact(self, name: str) -> bool:
        return bool(self._rows.get(name))

    def _row(self, name: str) -> SecretRow:
        self.entry(name)
        if not self._is_intact(name):
            raise self._refusal(name)
        return self._rows[name][-1]

    def _opened(self, row: SecretRow) -> Plaintext:
        if row.readable is not None:
            return Plaintext(row.readable.encode())
        value = self.key.open(row.envelope or b"", self._label(row))
        if value is None:
            raise self._refusal(row.name)
        return value

    def _sealed(self, row: SecretRow, value: Plaintext) -> SecretRow:
        return row._replace(envelope=self.key.seal(value, self._label(row)))

    def _label(self, row: SecretRow) -> Label:
        return Label(self._store.id, row.name, row.version, row.bindings)

    def _write(self, connection: sqlite3.Connection, name: str, entry: Entry, rows: Sequence[SecretRow]) -> None:
        """Make these the rows of a name, and sign a manifest that says so.

        The lines about other names stay as they are: writing one secret does not make good what was done to another.
        """
        connection.execute("delete from secret where name = ?", (name,))
        connection.executemany(f"insert into secret values ({', '.join('?' * len(SecretRow._fields))})", rows)  # noqa: S608
        manifest = self._manifest | {name: entry._replace(digest=digest(rows))}
        store = _signed(self._store._replace(manifest=json.dumps(manifest)), self.key)
        connection.execute("update store set manifest = ?, tag = ? where one = 1", (store.manifest, store.tag))

    def _described(self, name: str) -> SecretInfo:
        if not self._is_intact(name):
            return SecretInfo(name, self._manifest[name].last, problem=str(self._refusal(name)))
        row = self._row(name)
        created = dt.datetime.fromtimestamp(row.created_ms / 1000, dt.UTC)
        return SecretInfo(
            name=name,
            version=row.version,
            fields=tuple(json.loads(row.fields)),
            created=created,
            rotation_days=row.rotation_days,
            due=created + dt.timedelta(days=row.rotation_days) if row.rotation_days else None,
            bindings=_bindings(row),
            encrypted=row.envelope is not None,
        )

    def _refusal(self, name: str) -> SecretIntegrityError:
        return SecretIntegrityError(
            f"secret {name!r} in {self._path} was altered, moved or rolled back, and is refused: restore the file from "
            f"a backup, or give its value again with `%secret {name}` or `store_secret({name!r}, {{...}})`"
        )


def _signed(store: StoreRow, key: Key) -> StoreRow:
    return store._replace(tag=key.authenticated(*store[:-1]))


def _canonical(bindings: Iterable[Binding]) -> str:
    return json.dumps([astuple(binding) for binding in sorted(bindings)], separators=(",", ":"))


def _bindings(row: SecretRow) -> tuple[Binding, ...]:
    return tuple(Binding(*binding) for binding in json.loads(row.bindings))


def _damaged(path: Path) -> SecretIntegrityError:
    return SecretIntegrityError(
        f"the list of secrets in {path} was altered or rolled back, and none of them is used: restore the file from a "
        "backup, or move it away and store the secrets again"
    )
