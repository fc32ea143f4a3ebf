"""SecretManager: the secrets of a user, by name.

Values are kept in memory as they lie in the file, encrypted, and are decrypted each time they are asked for. Only the
redactor keeps them, because it must know what to hide. Nothing here belongs to an event loop.
"""

from __future__ import annotations

import asyncio
import math
import sqlite3
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NoReturn, TypeVar

from ..exceptions import KailashError, SecretBindingError, SecretError, SecretKeyError, listed
from ..references import NAME
from ..sqlitefile import SqliteFile, Stamp
from . import contents as files
from .contents import Binding, Contents, SecretInfo
from .encryption import KEY_BYTES, Key, Plaintext
from .keys import (
    SECRETS_VARIABLE,
    GivenKey,
    KeyProvider,
    default_path,
    default_providers,
    key_for_new_store,
    key_of_store,
)
from .redaction import Redactor

__all__ = ["Binding", "SecretInfo", "SecretManager"]

T = TypeVar("T")
_LARGEST: Final = 64 * 1024
_LONGEST_ROTATION: Final = 36_500


class SecretManager:
    """Keeps secrets in one file: named, versioned, encrypted, and bound to what they may be used for.

    Args:
        path: the file; by default ``KAILASH_NB_SECRETS``, else ``secrets.db`` in the user's data folder.
        key: the key-encryption key (32 bytes) or who keeps it. By default the one that the file's secrets need, and for
            a new file the environment's (``KAILASH_NB_KEK``), else a new one in the OS keyring or, where there is none,
            in the user's config folder.

    The constructor does no I/O; the first secret makes the file. May be used by any number of gateways, threads and
    event loops at once, while other processes use the same file; all see a new version at once. Lives until
    :meth:`close`, and the next use opens it again.

    ``redactor`` hides every value that was stored or read here.

    Raises SecretKeyError for a key that is not 32 bytes. Each method raises StoreError where the file cannot be used,
    SecretKeyError where the key is missing or another (nothing is changed then), and SecretIntegrityError where what it
    asks for was altered.
    """

    def __init__(self, path: str | Path | None = None, *, key: bytes | KeyProvider | None = None) -> None:
        self.redactor: Final = Redactor()
        self._file: Final = SqliteFile(
            Path(path).expanduser() if path is not None else default_path(),
            files.MIGRATIONS,
            application_id=files.APPLICATION_ID,
            pragmas=files.PRAGMAS,
            remedy=f"{SECRETS_VARIABLE} or SecretManager(path) names another file for the secrets",
        )
        self._lock = threading.RLock()
        self._known: tuple[Stamp, Contents] | None = None
        self._keeper: KeyProvider | None = None
        self._providers: Sequence[KeyProvider] | None = None
        if key is not None:
            provider = _provider(key)
            del key  # a traceback may show locals
            if provider is None:
                raise SecretKeyError(
                    f"a key is {KEY_BYTES} random bytes (`os.urandom({KEY_BYTES})`, kept where it is safe), or "
                    "a KeyProvider"
                )
            self._providers = [provider]

    def __repr__(self) -> str:
        if self._known is None:
            return f"<SecretManager {self._file.path}, not open>"
        try:
            count = len(self._contents_now().names())
        except KailashError as error:
            return f"<SecretManager {self._file.path}, {type(error).__name__}>"
        keeper = f", key in {self._keeper.name}" if self._keeper else ""
        return f"<SecretManager {self._file.path}{keeper}, {count} secret{'' if count == 1 else 's'}>"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a SecretManager holds a key and is never pickled or copied; make one where it is needed")

    async def store_secret(
        self,
        name: str,
        value: Mapping[str, Any] | str,
        encrypt: bool = True,
        rotation_days: int | None = None,
        *,
        allow_plaintext: bool = False,
    ) -> int:
        """Store a secret, or a new version of it; returns the version once it is on disk.

        Args:
            name: letters, digits, ``_ . -``.
            value: its fields (text, numbers, true/false), or a text, which becomes ``{"value": text}``.
            encrypt: False leaves it readable in the file, which takes ``allow_plaintext=True`` as well.
            rotation_days: days until it should be replaced; None keeps what the secret had, 0 is never.
            allow_plaintext: see ``encrypt``.

        The new version inherits the bindings. The version before it is kept, older ones are destroyed.
        Raises SecretError where an argument is not as said; the message never shows the value.
        """
        plaintext, problems = _encoded(value)
        misnamed = _name_problem(name)
        # From here on the value is in `plaintext` alone, which hides it: tracebacks may show locals, and notebooks keep
        # tracebacks.
        del value
        if misnamed:
            del name  # a value in the wrong place, perhaps
            raise SecretError(f"no secret was stored: {misnamed}")
        problems += _rotation_problems(rotation_days)
        if not encrypt and not allow_plaintext:
            problems.append(
                f"encrypt=False would leave it readable in {self._file.path}; leave that out, or add "
                "allow_plaintext=True"
            )
        if problems:
            raise SecretError(f"secret {name!r} was not stored: {'; '.join(problems)}")
        self.redactor.add(plaintext.fields())
        return await self._write(
            lambda connection, contents: contents.put(
                connection, name, plaintext, encrypt=encrypt, rotation_days=rotation_days
            )
        )

    async def get_secret(self, name: str) -> dict[str, Any]:
        """The fields of a secret, in a dict that is the caller's.

        Raises SecretNotFoundError, which lists the names there are.
        """
        contents = await self._contents()
        fields = contents.reveal(_checked(name)).fields()
        self.redactor.add(fields)
        return fields

    async def list_secrets(self) -> list[str]:
        """The names of the secrets, sorted."""
        return (await self._contents()).names()

    async def describe(self) -> list[SecretInfo]:
        """All about each secret but its value, sorted by name; also which of them are refused, and why."""
        return (await self._contents()).describe()

    async def delete_secret(self, name: str) -> None:
        """Destroy a secret with all its versions and bindings. Raises SecretNotFoundError."""
        (await self._contents()).entry(_checked(name))
        await self._write(lambda connection, contents: contents.remove(connection, name))

    def version(self, name: str) -> int | None:
        """The current version of a secret, None where there is none of this name.

        Costs microseconds, unless something has changed: then the file is read, which takes milliseconds.
        """
        return self._contents_now().version(name)

    def bind(self, name: str, binding: Binding) -> bool:
        """Allow a secret one more use; returns whether that is new. Raises SecretNotFoundError.

        Not a coroutine, because registering a resource is none. A new use blocks until it is on disk (milliseconds), a
        known one costs microseconds.
        """
        if binding in self._contents_now().bindings(_checked(name)):
            return False
        key = self._key_for_writing()
        return self._file.write_now(
            self._checked_change(key, lambda connection, contents: contents.bind(connection, name, binding))
        )

    def check_use(self, name: str, binding: Binding) -> None:
        """Return where a secret is bound to this use; costs microseconds.

        Raises SecretBindingError where it is not, and SecretNotFoundError. Both are for the owner's eyes: they tell
        which secrets there are and what they are for.
        """
        allowed = self._contents_now().bindings(_checked(name))
        if binding not in allowed:
            raise SecretBindingError(
                f"secret {name!r} is not for {binding}; it is for {listed(map(str, allowed), none='no use yet')}. Its "
                "owner allows a use by registering a resource that has it as credentials_ref"
            )

    async def close(self) -> None:
        """Finish what is being written and close the file; closing twice is fine."""
        await asyncio.to_thread(self._file.close)
        self._known = None

    async def _contents(self) -> Contents:
        known = self._unchanged()
        return known if known is not None else await asyncio.to_thread(self._load)

    def _contents_now(self) -> Contents:
        return self._unchanged() or self._load()

    def _unchanged(self) -> Contents | None:
        known = self._known
        return known[1] if known is not None and known[0] == self._file.stamp() else None

    def _load(self) -> Contents:
        with self._lock:
            contents = self._unchanged()
            if contents is not None:
                return contents
            path = self._file.path
            if not path.exists():
                return Contents.empty(path)
            # The stamp comes first: what is committed between the two is then read once more, and not missed.
            stamp = self._file.stamp()
            store, rows = self._file.read(lambda connection: files.read(connection, path))
            contents = Contents.empty(path) if store is None else Contents(path, store, self._key(store), rows)
            self._known = stamp, contents
            return contents

    def _key(self, store: files.StoreRow) -> Key:
        if self._known is not None and self._known[1].key.id == store.key_id:
            return self._known[1].key
        providers = self._providers or default_providers()
        self._keeper, key = key_of_store(providers, store.key_id, store.key_keeper, self._file.path)
        return key

    def _key_for_writing(self) -> Key:
        """The store's key. Makes the file a store where it is none yet; the first process to do so decides the key."""
        with self._lock:
            if self._load().is_new:
                keeper, key = key_for_new_store(self._providers or default_providers())
                self._file.write_now(lambda connection: files.create(connection, key, keeper.name))
            return self._load().key

    async def _write(self, change: Callable[[sqlite3.Connection, Contents], T]) -> T:
        key = await asyncio.to_thread(self._key_for_writing)
        return await self._file.write(self._checked_change(key, change))

    def _checked_change(
        self, key: Key, change: Callable[[sqlite3.Connection, Contents], T]
    ) -> Callable[[sqlite3.Connection], T]:
        """A change as the file runs it: on the contents of that moment, read and checked within its transaction."""

        def run(connection: sqlite3.Connection) -> T:
            store, rows = files.read(connection, self._file.path)
            if store is None or store.key_id != key.id:
                raise SecretKeyError(f"{self._file.path} was replaced meanwhile by one with another key: try again")
            return change(connection, Contents(self._file.path, store, key, rows))

        return run


def _provider(key: bytes | KeyProvider) -> KeyProvider | None:
    if isinstance(key, bytes):
        return GivenKey(Key(key)) if len(key) == KEY_BYTES else None
    return key if hasattr(key, "make") else None


def _checked(name: str) -> str:
    problem = _name_problem(name)
    if problem:
        raise SecretError(problem)
    return name


def _name_problem(name: object) -> str:
    """What is wrong with a name, or "". Does not show it: it may be a value in the wrong place."""
    if not isinstance(name, str):
        return f"a secret's name is text, not {type(name).__name__}"
    if NAME.fullmatch(name):
        return ""
    rule = "a secret's name has letters, digits, '_', '.' and '-', 64 at most, and begins with a letter or '_'"
    odd = next((c for c in name if not NAME.fullmatch("_" + c)), "")
    return f"{rule}; this one {f'has {odd!r}' if odd else f'has {len(name)} characters, and is not like that'}"


def _rotation_problems(days: object) -> list[str]:
    if days is None or (isinstance(days, int) and not isinstance(days, bool) and 0 <= days <= _LONGEST_ROTATION):
        return []
    return [f"rotation_days is a whole number of days up to {_LONGEST_ROTATION} (0: never), not {days!r:.80}"]


def _encoded(value: object) -> tuple[Plaintext, list[str]]:
    """A value as it is encrypted, and what is wrong with it, without showing it. Raises nothing: see store_secret."""
    if not isinstance(value, (str, Mapping)):
        return Plaintext(b""), [f"a secret is a mapping of fields or a text, not {type(value).__name__}"]
    try:
        fields = {"value": value} if isinstance(value, str) else dict(value)
        problems = list(_field_problems(fields))
        plaintext = Plaintext(b"") if problems else Plaintext.of(fields)
    except Exception as error:  # a mapping of the caller's, a number of 5,000 digits
        return Plaintext(b""), [f"its fields cannot be encoded ({type(error).__name__})"]
    if len(plaintext.data()) > _LARGEST:
        problems = [f"it has {len(plaintext.data()):,} bytes, and {_LARGEST:,} are the most"]
    return plaintext, problems


def _field_problems(fields: Mapping[object, object]) -> Iterator[str]:
    if not fields:
        yield "it has no fields"
    for number, (field, value) in enumerate(fields.items(), 1):
        if not isinstance(field, str) or not NAME.fullmatch(field):
            yield f"the name of field {number} is not like 'password' or 'api_key' (letters, digits, '_', '.', '-')"
        elif value is None or (isinstance(value, str) and not value):
            yield f"field {field!r} is empty: give its value, or leave it out"
        elif not isinstance(value, (str, int, float)):
            yield f"field {field!r} is {type(value).__name__}; a field is text, a number or true/false"
        elif isinstance(value, float) and not math.isfinite(value):
            yield f"field {field!r} is not a finite number"
        elif isinstance(value, str) and any("\ud800" <= character <= "\udfff" for character in value):
            yield f"field {field!r} is not text (it holds half of a surrogate pair)"
