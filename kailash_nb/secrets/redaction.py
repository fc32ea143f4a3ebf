"""Taking live secrets out of text on its way to a log, an error, a display or a record."""

from __future__ import annotations

import base64
import html
import itertools
import json
import re
import threading
import urllib.parse
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final, NoReturn

MASK: Final = "***"
PUBLIC_FIELDS: Final = frozenset({"user", "username", "host", "port", "database"})
"""Fields of a secret that say where and who, and are not hidden."""

_SHORTEST: Final = 6


class Redactor:
    """Replaces each secret it was told of by ``***``, also where it is encoded.

    As base64 (anywhere inside a longer encoded text, such as a Basic login), in hex, URL-quoted, or escaped as JSON,
    HTML or a Python literal.

    Values of fewer than six characters are left alone: they would turn up in text that has nothing to do with them.
    Lives as long as its secret manager and only grows: an old password may still be valid. May be used from any thread.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._forms: frozenset[str] = frozenset()
        self._pattern: re.Pattern[str] | None = None
        self._stale = False

    def __repr__(self) -> str:
        return f"<Redactor {len(self._forms)} forms>"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a redactor knows live secrets and is never pickled or copied")

    def add(self, value: Mapping[str, Any] | str) -> None:
        """Hide a value from now on: a string, or every string of a secret's fields that is not in PUBLIC_FIELDS."""
        fields = {"": value} if isinstance(value, str) else value
        new = [
            v
            for field, v in fields.items()
            if isinstance(v, str) and len(v) >= _SHORTEST and field not in PUBLIC_FIELDS and v not in self._forms
        ]
        if new:
            with self._lock:
                # In this order: who finds a value among the forms may rely on `redact` to know it.
                self._stale = True
                self._forms = self._forms.union(*(_forms(v) for v in new))

    def redact(self, text: str) -> str:
        """The text without the secrets; the very same object where it holds none."""
        pattern = self._compiled() if self._stale else self._pattern
        return text if pattern is None else pattern.sub(MASK, text)

    def _compiled(self) -> re.Pattern[str] | None:
        with self._lock:
            if self._stale:
                self._pattern = re.compile(_alternatives(self._forms))
                self._stale = False
            return self._pattern


def _forms(value: str) -> Iterator[str]:
    data = value.encode("utf-8", "surrogatepass")
    yield value
    yield json.dumps(value)[1:-1]
    yield json.dumps(value, ensure_ascii=False)[1:-1]
    yield repr(value)[1:-1]
    yield html.escape(value)
    for safe in ("", "/"):
        quoted = urllib.parse.quote(data, safe=safe)
        yield quoted
        yield re.sub("%..", lambda match: match[0].lower(), quoted)
        yield quoted.replace("%20", "+")
    yield data.hex()
    yield data.hex().upper()
    for encode in (base64.b64encode, base64.urlsafe_b64encode):
        yield encode(data).decode()
        yield from _inside_base64(data, encode)


def _inside_base64(data: bytes, encode: Any) -> Iterator[str]:
    """The characters that a value always gives, wherever it stands in what is encoded: one form per offset modulo 3."""
    for offset in range(3):
        encoded = encode(bytes(offset) + data).decode()
        yield encoded[(offset * 8 + 5) // 6 : (offset + len(data)) * 8 // 6]


def _alternatives(forms: Iterable[str]) -> str:
    """A pattern of all forms, longest first; grouped by first character, so that a miss costs little."""
    ordered = sorted(forms, key=lambda form: (form[0], -len(form), form))
    groups = itertools.groupby(ordered, key=lambda form: form[0])
    return "|".join(f"{re.escape(first)}(?:{'|'.join(re.escape(f[1:]) for f in group)})" for first, group in groups)
