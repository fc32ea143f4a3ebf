"""Resource URLs - ``postgresql://user@host/shop``, ``redis://host/0``, ``https://api.example.com`` - taken apart."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import SplitResult, unquote, urlsplit

from ..exceptions import ResourceConfigError, did_you_mean, listed

SCHEMES: Mapping[str, str] = {
    "postgresql": "database",
    "postgres": "database",
    "redis": "cache",
    "rediss": "cache",
    "http": "http_client",
    "https": "http_client",
}


@dataclass(frozen=True)
class Address:
    """A resource URL taken apart: type, config, login, and the URL as it may be shown."""

    type: str
    config: Mapping[str, Any]
    user: str | None
    password: str | None = field(repr=False)
    shown: str


def of_url(url: str) -> Address:
    """Take a URL apart; raises ResourceConfigError, which repeats nothing that may be part of a password."""
    parts = None
    with contextlib.suppress(ValueError):
        parts = urlsplit(url.strip())
    kind = SCHEMES.get(parts.scheme.partition("+")[0]) if parts else None
    if parts is None or kind is None:
        near = did_you_mean(url.partition("://")[0], SCHEMES)
        raise ResourceConfigError("resource", [f"a resource's URL begins with one of {listed(SCHEMES)}{near}"])
    if kind == "database":
        from ..resources.database import parse_url

        config, password = parse_url(url)
        user: str | None = config.get("user")
    else:
        config, password = _config(kind, parts), unquote(parts.password) if parts.password else None
        user = unquote(parts.username) if parts.username else None
    place = parts.netloc.rpartition("@")[2]
    shown = parts._replace(netloc=f"{parts.username}@{place}" if parts.username else place, query="")
    return Address(kind, config, user, password, shown.geturl())


def _config(kind: str, parts: SplitResult) -> dict[str, Any]:
    """The config of a cache or an API."""
    problems = []
    if "@" in parts.path + parts.query or parts.query or parts.fragment:
        problems.append("nothing follows the path; in a password '/' is written %2F, '@' %40, '?' %3F and '#' %23")
    path = parts.path.lstrip("/")
    if kind == "cache" and path and not path.isdigit():
        problems.append("what follows the host is the number of the database: redis://host:6379/0")
    try:
        port = parts.port
    except ValueError:
        problems.append("the port is a number from 1 to 65535")
    if problems:
        raise ResourceConfigError(kind, problems)
    if kind == "http_client":
        return {"base_url": parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()}
    found = {"host": parts.hostname or "", "port": port, "db": int(path) if path else None}
    found["ssl"] = "verify-full" if parts.scheme == "rediss" else None
    return {name: value for name, value in found.items() if value is not None}
