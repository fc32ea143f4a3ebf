"""Where the key-encryption key lies: the environment, the OS keyring or a file of the user's, never beside the secrets.

A store remembers the id of its key and who keeps it. A key is made only for a store that has none yet: when the key of
a store is gone, a new one could not read its secrets, so the store says what is missing and stays as it is.
"""

from __future__ import annotations

import base64
import binascii
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Final, Protocol

from ..exceptions import SecretError, SecretKeyError
from .encryption import KEY_BYTES, Key

KEY_VARIABLE: Final = "KAILASH_NB_KEK"
SECRETS_VARIABLE: Final = "KAILASH_NB_SECRETS"
_APP: Final = "kailash_nb"


class KeyProvider(Protocol):
    """Keeps key-encryption keys. ``name`` is what a store remembers of it.

    Both methods may block (a keyring asks its user) and are called from any thread.
    """

    @property
    def name(self) -> str:
        """A word: ``"file"``."""

    @property
    def place(self) -> str:
        """Where a person finds the key, for messages."""

    def find(self, key_id: str | None) -> Key | None:
        """The key it keeps, the one of this id where it keeps several; None where it has none.

        Raises SecretKeyError where there is one that cannot be used.
        """

    def make(self) -> Key | None:
        """A key for a new store, which :meth:`find` finds from then on; None where this provider cannot make one here.

        Never replaces a key. Raises SecretKeyError as :meth:`find` does.
        """


class GivenKey:
    """A key that the program itself brings: ``SecretManager(key=...)``."""

    name: Final = "given"
    place: Final = "the key given as SecretManager(key=...)"

    def __init__(self, key: Key) -> None:
        self._key = key

    def find(self, key_id: str | None) -> Key | None:
        """The given key."""
        return self._key

    def make(self) -> Key | None:
        """The given key."""
        return self._key


class EnvironmentKey:
    """A key in the environment variable ``KAILASH_NB_KEK``: 32 bytes in base64. For servers and containers."""

    name: Final = "environment"
    place: Final = f"the environment variable {KEY_VARIABLE}"

    def find(self, key_id: str | None) -> Key | None:
        """The key in the variable; None where that is unset or empty."""
        if not os.environ.get(KEY_VARIABLE):
            return None
        key = _decoded(os.environ[KEY_VARIABLE])
        if key is None:
            raise SecretKeyError(
                f"{self.place} does not hold {KEY_BYTES} bytes in base64; make a key with "
                f'`python3 -c "import base64, os; print(base64.b64encode(os.urandom({KEY_BYTES})).decode())"`'
            )
        return key

    def make(self) -> Key | None:
        """The key in the variable: whoever sets one wants it used."""
        return self.find(None)


class KeyringKey:
    """Keys in the OS keyring (macOS Keychain, Secret Service, KWallet), where the package ``keyring`` finds a real one.

    Each key lies under its own id, so that two processes that make one at the same time do not replace each other's.
    """

    name: Final = "keyring"
    place: Final = f"the OS keyring, service {_APP!r}"

    def find(self, key_id: str | None) -> Key | None:
        """The key of this id; None where there is no keyring, or no such key in it."""
        keyring = _keyring()
        if keyring is None or key_id is None:
            return None
        try:
            return _decoded(keyring.get_password(_APP, key_id) or "")
        except Exception as error:  # a backend raises what its platform raises
            reason = type(error).__name__
        raise SecretKeyError(f"{self.place}, does not answer ({reason}): unlock it and try again")

    def make(self) -> Key | None:
        """A new key; None where there is no keyring, or it refuses."""
        keyring = _keyring()
        if keyring is None:
            return None
        raw = os.urandom(KEY_BYTES)
        key = Key(raw)
        try:
            keyring.set_password(_APP, key.id, base64.b64encode(raw).decode())
            kept = self.find(key.id)
        except Exception:  # its user said no, or it is read-only
            return None
        return kept if kept is not None and kept.id == key.id else None


class FileKey:
    """A key in a file that only its owner can read: base64, mode 0600, in the user's config folder."""

    name: Final = "file"

    def __init__(self, path: Path | None = None) -> None:
        self.path = path or config_folder() / "kek"

    @property
    def place(self) -> str:
        """The path."""
        return f"the file {self.path}"

    def find(self, key_id: str | None) -> Key | None:
        """The key in the file; None where there is no file. Refuses a file that others may read."""
        try:
            status = self.path.stat()
            if status.st_mode & 0o077:
                raise SecretKeyError(
                    f"{self.place} with the key of the secrets is open to others (mode {status.st_mode & 0o777:04o}): "
                    f"run `chmod 600 {self.path}`, and replace the secrets if others may have read it"
                )
            key = _decoded(self.path.read_text("ascii", "replace"))
        except FileNotFoundError:
            return None
        except OSError as error:
            reason = error.strerror
        else:
            if key is not None:
                return key
            reason = f"it does not hold {KEY_BYTES} bytes in base64; restore it from a backup"
        raise SecretKeyError(f"{self.place} with the key of the secrets cannot be used: {reason}")

    def make(self) -> Key | None:
        """A new key in the file, or the one that is there: several stores of one user share it."""
        try:
            if not self.path.parent.is_dir():
                self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            if not _write_new(self.path, base64.b64encode(os.urandom(KEY_BYTES)) + b"\n"):
                _wait_for_content(self.path)
        except OSError as error:
            reason = error.strerror
            raise SecretKeyError(
                f"{self.place} for the key of the secrets cannot be made: {reason}; "
                f"set XDG_CONFIG_HOME to a folder that can be written, or {KEY_VARIABLE} to a key"
            ) from None
        # Read back: the key is what the disk holds, whoever wrote it first.
        return self.find(None)


def default_providers() -> tuple[KeyProvider, ...]:
    """The providers in the order in which they are asked for a new store's key."""
    return EnvironmentKey(), KeyringKey(), FileKey()


def key_for_new_store(providers: Sequence[KeyProvider]) -> tuple[KeyProvider, Key]:
    """The first provider that has or makes a key, and that key. Raises SecretKeyError."""
    for provider in providers:
        key = provider.make()
        if key is not None:
            return provider, key
    raise SecretKeyError(f"no key for the secrets: set {KEY_VARIABLE} to 32 random bytes in base64")


def key_of_store(providers: Sequence[KeyProvider], key_id: str, keeper: str, store: Path) -> tuple[KeyProvider, Key]:
    """The key of this id and who has it: the keeper that the store remembers is asked first, then the others.

    Others may have it too: the key that a notebook's store was made with reaches a server by its environment.
    Raises SecretKeyError with what each of them said; makes nothing.
    """
    found = []
    for provider in sorted(providers, key=lambda provider: provider.name != keeper):
        try:
            key = provider.find(key_id)
        except SecretKeyError as error:
            found.append(str(error))
            continue
        if key is not None and key.id == key_id:
            return provider, key
        found.append(f"{provider.place} has {'no key' if key is None else f'another key ({key.id})'}")
    raise SecretKeyError(
        f"the secrets in {store} need key {key_id}, which is not there (kept by: {keeper}). {'; '.join(found)}. "
        f"Nothing was changed: restore that key or, if it is lost, move {store.name} away and store the secrets again"
    )


def config_folder() -> Path:
    """The folder of the user's settings of kailash_nb; not made here."""
    return _folder("XDG_CONFIG_HOME", ".config")


def data_folder() -> Path:
    """The folder of the user's data of kailash_nb; not made here."""
    return _folder("XDG_DATA_HOME", ".local/share")


def default_path() -> Path:
    """Where the secrets lie: ``KAILASH_NB_SECRETS``, else ``secrets.db`` in the user's data folder."""
    chosen = os.environ.get(SECRETS_VARIABLE)
    return Path(chosen).expanduser() if chosen else data_folder() / "secrets.db"


def _folder(variable: str, default: str) -> Path:
    # Relative paths count as unset (XDG Base Directory Specification).
    chosen = os.environ.get(variable, "")
    if Path(chosen).is_absolute():
        return Path(chosen) / _APP
    try:
        home = Path.home()
    except RuntimeError:
        message = f"this user has no home folder to keep secrets in: set HOME, or {variable} and {SECRETS_VARIABLE}"
        raise SecretError(message) from None
    return home / ("Library/Application Support" if sys.platform == "darwin" else default) / _APP


def _keyring() -> ModuleType | None:
    """The keyring library, where it is installed and has a backend that really keeps things (priority 1 or more)."""
    try:
        import keyring

        return keyring if keyring.get_keyring().priority >= 1 else None
    except Exception:  # backends raise what they like where there is no session bus, no display, no login
        return None


def _decoded(text: str) -> Key | None:
    try:
        raw = base64.b64decode(text.strip().replace("-", "+").replace("_", "/"), validate=True)
    except (binascii.Error, ValueError):
        return None
    return Key(raw) if len(raw) == KEY_BYTES else None


def _write_new(path: Path, content: bytes) -> bool:
    """Write a file for its owner alone and wait until it is on disk; False where there is one, which stays as it is."""
    try:
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
    except FileExistsError:
        return False
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(descriptor)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
    return True


def _wait_for_content(path: Path, seconds: float = 2.0) -> None:
    """Another process is about to write what it has just made."""
    end = time.monotonic() + seconds
    while path.stat().st_size == 0 and time.monotonic() < end:
        time.sleep(0.01)
