"""References: how a workflow, a request or an export names a resource without holding it."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from .exceptions import ResourceConfigError, did_you_mean, listed

NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]{0,63}")
"""What a resource, secret, workflow or node may be called; safe in a path, a URL and a metric label."""

_FIELDS = ("type", "config", "credentials_ref")
_SECRET_KEYS = frozenset({"password", "passwd", "pwd", "secret", "token", "api_key", "apikey", "api_secret", "dsn"})
_SECRET_HEADERS = frozenset({"authorization", "proxy-authorization", "cookie", "x-api-key"})


@dataclass(frozen=True)
class ResourceReference:
    """Names a resource in JSON; holds no live object and no secret.

    Args:
        type: the resource type: ``"database"``, ``"cache"``, ``"http_client"`` or one that a package adds.
        config: the type's settings, JSON values only; checked against the type's schema when it is registered or used.
        credentials_ref: the name of a stored secret with the login, or None where the resource needs none.

    Raises:
        ResourceConfigError: the config is not JSON, or holds a password or token itself.

    A value: compared by content, never changed, free to keep, print and send.
    """

    type: str
    config: Mapping[str, Any] = field(default_factory=dict)
    credentials_ref: str | None = None

    def __post_init__(self) -> None:
        problems = list(_problems(self.type, self.config, self.credentials_ref))
        if problems:
            raise ResourceConfigError(self.type if isinstance(self.type, str) else "resource", problems)
        # A private copy that nobody can change: the reference is a key of pools and part of a workflow's hash.
        object.__setattr__(self, "config", MappingProxyType(json.loads(json.dumps(dict(self.config)))))

    def __hash__(self) -> int:
        return hash(canonical(self.type, self.config, self.credentials_ref))

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.type, dict(self.config), self.credentials_ref)

    def to_dict(self) -> dict[str, Any]:
        """The reference as JSON: ``{"type", "config", "credentials_ref"}``."""
        return {"type": self.type, "config": dict(self.config), "credentials_ref": self.credentials_ref}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ResourceReference:
        """The reference that :meth:`to_dict` wrote; raises ResourceConfigError where fields are unknown or missing."""
        if not isinstance(data, Mapping):
            raise ResourceConfigError("resource", [f"a reference is an object or '@name', not {data!r:.80}"])
        unknown = [
            f"unknown field {k!r}{did_you_mean(k, _FIELDS)}; it has {listed(_FIELDS)}"
            for k in data.keys() - set(_FIELDS)
        ]
        if "type" not in data:
            unknown.append("field 'type' is missing")
        if unknown:
            raise ResourceConfigError(str(data.get("type", "resource")), unknown)
        return cls(data["type"], data.get("config") or {}, data.get("credentials_ref"))

    def __repr__(self) -> str:
        credentials = f", credentials_ref={self.credentials_ref!r}" if self.credentials_ref else ""
        return f"ResourceReference({self.type!r}, {dict(self.config)!r}{credentials})"


def canonical(type: str, config: Mapping[str, Any], credentials_ref: str | None) -> str:
    """The identity of a resource: a hex digest of its type, its whole (normalised) config and its credential's name."""
    text = json.dumps([type, dict(config), credentials_ref], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _problems(type: object, config: object, credentials_ref: object) -> list[str]:
    if not isinstance(type, str) or not type:
        return [f"the type is a name such as 'database', not {type!r:.80}"]
    if not isinstance(config, Mapping):
        return [f"config is a mapping of settings, not {config!r:.80}"]
    problems = []
    if credentials_ref is not None and not (isinstance(credentials_ref, str) and NAME.fullmatch(credentials_ref)):
        problems.append(
            "credentials_ref is the name of a stored secret, such as 'db_creds', not the credentials themselves"
        )
    headers = config.get("headers")
    secret = [k for k in config if isinstance(k, str) and k.lower() in _SECRET_KEYS]
    secret += [
        f"headers.{k}" for k in (headers if isinstance(headers, Mapping) else ()) if str(k).lower() in _SECRET_HEADERS
    ]
    problems += [
        f"{key!r} would put a secret in the reference; store it (`%secret NAME`) and pass credentials_ref='NAME'"
        for key in secret
    ]
    try:
        json.dumps(dict(config), allow_nan=False)
    except (TypeError, ValueError) as error:
        problems.append(f"config holds JSON values only: {error}")
    return problems
