"""How a secret is encrypted: AES-256-GCM, one data key per secret version, wrapped by the key-encryption key.

An envelope is these bytes, one after another::

    "kn1"  key id (8)  nonce (12)  wrapped data key (32 + tag 16)  nonce (12)  value (n + tag 16)

Both ciphertexts carry the secret's :class:`Label` as associated data: an envelope that is moved to another name,
version, store or binding does not open. A data key encrypts once, so that random nonces never come near their limit.
Deleting an envelope destroys its value for good, because the data key is nowhere else.

Three keys derive from the key-encryption key, one for each purpose (HMAC-SHA256 as a pseudo-random function): wrapping,
authenticating a store's manifest, and the key id, which tells keys apart and tells nothing about them.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, NoReturn

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

KEY_BYTES: Final = 32
_FORMAT: Final = b"kn1"
_ID: Final = 8
_NONCE: Final = 12
_WRAPPED: Final = KEY_BYTES + 16
_HEADER: Final = len(_FORMAT) + _ID


@dataclass(frozen=True)
class Label:
    """What an envelope belongs to; it opens under the same label only.

    Args:
        store: the id of the store it lies in.
        name: the secret's name.
        version: the secret's version.
        bindings: what the secret may be used for, as canonical JSON.
    """

    store: str
    name: str
    version: int
    bindings: str

    def encoded(self) -> bytes:
        """The associated data: each part with its length before it, so that no two labels are encoded alike."""
        return packed(self.store, self.name, str(self.version), self.bindings)


class Plaintext:
    """A secret's fields on their way: encoded, and hidden from repr, tracebacks and pickle.

    Errors pass through frames whose locals IPython's Verbose mode prints and saves in the notebook, so a value travels
    in one of these and is bare in no frame that raises.
    """

    __slots__ = ("_data",)

    def __init__(self, data: bytes) -> None:
        self._data = data

    @classmethod
    def of(cls, fields: Mapping[str, Any]) -> Plaintext:
        """The fields, which must be JSON."""
        return cls(json.dumps(fields, separators=(",", ":")).encode())

    def fields(self) -> dict[str, Any]:
        """The fields, a new dict each time."""
        fields: dict[str, Any] = json.loads(self._data)
        return fields

    def data(self) -> bytes:
        """The encoded fields, for encrypting."""
        return self._data

    def __repr__(self) -> str:
        return "<Plaintext, hidden>"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a secret's plaintext is never pickled or copied")


class Key:
    """A key-encryption key of 32 bytes. Lives in memory as long as its store is open; shows its id only."""

    __slots__ = ("_manifest_key", "_wrapping", "id")

    def __init__(self, key: bytes) -> None:
        self.id: Final = _derived(key, b"id")[:_ID].hex()
        self._wrapping: Final = AESGCM(_derived(key, b"wrap"))
        self._manifest_key: Final = _derived(key, b"manifest")

    def __repr__(self) -> str:
        return f"<Key {self.id}>"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a key is never pickled or copied")

    def seal(self, plaintext: Plaintext, label: Label) -> bytes:
        """The envelope of a value, under a fresh data key."""
        header, associated = _FORMAT + bytes.fromhex(self.id), label.encoded()
        data_key = AESGCM.generate_key(bit_length=KEY_BYTES * 8)
        outer, inner = os.urandom(_NONCE), os.urandom(_NONCE)
        wrapped = self._wrapping.encrypt(outer, data_key, header + associated)
        return header + outer + wrapped + inner + AESGCM(data_key).encrypt(inner, plaintext.data(), associated)

    def open(self, envelope: bytes, label: Label) -> Plaintext | None:
        """The value in an envelope; None where the envelope was altered, or is another label's or another key's."""
        header, rest = envelope[:_HEADER], envelope[_HEADER:]
        wrapped, sealed = rest[: _NONCE + _WRAPPED], rest[_NONCE + _WRAPPED :]
        if header != _FORMAT + bytes.fromhex(self.id) or len(sealed) < _NONCE:
            return None
        associated = label.encoded()
        try:
            inner = AESGCM(self._wrapping.decrypt(wrapped[:_NONCE], wrapped[_NONCE:], header + associated))
            return Plaintext(inner.decrypt(sealed[:_NONCE], sealed[_NONCE:], associated))
        except InvalidTag:
            return None

    def authenticated(self, *parts: str | bytes) -> bytes:
        """A tag of 32 bytes that only the holder of this key can make."""
        return hmac.digest(self._manifest_key, packed(*parts), "sha256")


def packed(*parts: str | bytes) -> bytes:
    """Parts as one, each with its length before it."""
    encoded = [part.encode() if isinstance(part, str) else part for part in parts]
    return b"".join(len(part).to_bytes(4, "big") + part for part in encoded)


def digest(columns: Any) -> str:
    """A hash of JSON values and bytes that tells types apart: ``1``, ``"1"`` and ``b"1"`` differ."""
    text = json.dumps(columns, separators=(",", ":"), default=lambda data: {"bytes": data.hex()})
    return hashlib.sha256(text.encode()).hexdigest()


def _derived(key: bytes, purpose: bytes) -> bytes:
    return hmac.digest(key, b"kailash_nb/1/" + purpose, "sha256")
