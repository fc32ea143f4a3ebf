"""What a resource type is: the protocol that the built-in types and third-party packages implement.

A package adds a type with an entry point in the group ``kailash_nb.resources``, whose name is the type's name and whose
value is a class with a constructor without arguments that fulfils :class:`ResourceType`. The built-in types
``database``, ``cache`` and ``http_client`` come in by the same way.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

from ..exceptions import ResourceConfigError, did_you_mean, listed

Waited = Callable[[float], None]
"""Told the seconds that a node waited for a resource: for it to open, or for a free connection."""


@dataclass(frozen=True)
class Credentials:
    """A login by name: the driver asks for the values at each connect, and nothing keeps them in between.

    Args:
        name: the secret's name.
        version: the secret's version; pools of different versions are different pools.
        reveal: returns the secret's fields (``{"user": ..., "password": ...}``); asked anew at every login.
    """

    name: str
    version: int
    reveal: Callable[[], Awaitable[Mapping[str, Any]]] = field(repr=False, compare=False)


@dataclass(frozen=True)
class Use:
    """What a resource would send its credentials to: the grain a secret is bound by.

    Args:
        type: the resource type.
        endpoint: ``"host:port"``, or the origin of a base URL (``"https://api.example.com"``).
        tls: ``"verify-full"``, ``"require"`` or ``"off"``.
    """

    type: str
    endpoint: str
    tls: str


class Resource(Protocol):
    """One live pool or client. It belongs to the event loop that opened it and lives until the registry closes it."""

    def lease(self, waited: Waited) -> AbstractAsyncContextManager[Any]:
        """What one node gets for as long as it runs; leaving the context gives its connections back."""

    async def ping(self) -> str:
        """Ask the server for a sign of life; returns its version (``"PostgreSQL 18.4"``), raises ResourceError."""

    def statistics(self) -> dict[str, float | int]:
        """Figures of this pool by the health report's names; reads no network and may be called from any thread.

        Whole numbers are counts (``pool_size``, ``active_connections``, ``waiting``) and are added up over the loops
        that the resource is open on; floats are levels (``avg_response_time_ms``, ``hit_rate``) and are averaged.
        """

    async def close(self) -> None:
        """Close within a few seconds, whatever the server does; closing twice is fine."""


class ResourceType(Protocol):
    """A kind of resource: its closed config schema and how one is opened."""

    name: ClassVar[str]

    def normalise(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """The whole config: aliases resolved, defaults filled in. Raises ResourceConfigError with every problem."""

    def use(self, config: Mapping[str, Any]) -> Use | None:
        """What credentials would be sent to (None where it needs none); takes a normalised config."""

    async def open(self, config: Mapping[str, Any], credentials: Credentials | None) -> Resource:
        """Open it on the running loop; takes a normalised config. Raises ResourceError.

        May connect lazily: a pool that opens its connections on first use is open at once.
        """


@dataclass(frozen=True)
class Setting:
    """One key of a resource type's config.

    Args:
        kind: the types its value may have (bool is not taken for int).
        default: what it is when absent.
        choices: the values it may take, if few.
        minimum: the least number, if there is one.
        maximum: the greatest number, if there is one.
        unit: what a number counts, for the error message: ``"seconds"``.
        alias_of: the key that this one is another spelling of.
    """

    kind: type | tuple[type, ...]
    default: Any = None
    choices: tuple[Any, ...] = ()
    minimum: float | None = None
    maximum: float | None = None
    unit: str = ""
    alias_of: str | None = None


def normalised(type: str, schema: Mapping[str, Setting], config: Mapping[str, Any]) -> dict[str, Any]:
    """Check ``config`` against a closed schema: unknown keys, wrong types and ranges, all at once.

    Returns every key of the schema that is no alias, in the schema's order, with defaults filled in; a whole number
    where the schema wants a float becomes one, so that ``30`` and ``30.0`` name the same resource.
    Raises ResourceConfigError.
    """
    problems: list[str] = []
    given: dict[str, Any] = {}
    for key, value in config.items():
        setting = schema.get(key)
        if setting is None:
            problems.append(f"unknown config key {key!r}{did_you_mean(key, schema)}; it has {listed(schema)}")
            continue
        target = setting.alias_of or key
        if target in given and given[target] != value:
            problems.append(f"{key!r} is another name of {target!r}, and the two differ")
        given[target] = value
        problems += _value_problems(key, value, schema[target])
    if problems:
        raise ResourceConfigError(type, problems)
    whole = {key: given.get(key, s.default) for key, s in schema.items() if s.alias_of is None}
    for key, value in whole.items():
        if isinstance(value, int) and float in _kinds(schema[key]):
            whole[key] = float(value)
    return whole


def _kinds(setting: Setting) -> tuple[type, ...]:
    return setting.kind if isinstance(setting.kind, tuple) else (setting.kind,)


def _value_problems(key: str, value: Any, setting: Setting) -> list[str]:
    if value is None and setting.default is None:
        return []
    kinds = _kinds(setting)
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        wanted = " or ".join(k.__name__ for k in kinds)
        return [f"{key!r} is {wanted}{f' ({setting.unit})' if setting.unit else ''}, not {value!r:.80}"]
    if setting.choices and value not in setting.choices:
        return [f"{key!r} is one of {listed(map(repr, setting.choices))}, not {value!r:.80}"]
    unit = f" {setting.unit}" if setting.unit else ""
    if setting.minimum is not None and isinstance(value, (int, float)) and not value >= setting.minimum:
        return [f"{key!r} is at least {setting.minimum:g}{unit}, not {value!r}"]
    if setting.maximum is not None and isinstance(value, (int, float)) and not value <= setting.maximum:
        return [f"{key!r} is at most {setting.maximum:g}{unit}, not {value!r}"]
    return []


def default_tls(host: str) -> str:
    """``"off"`` for this machine's own names, ``"verify-full"`` elsewhere: a login goes to no stranger unasked."""
    try:
        local = ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        local = host.lower().rstrip(".") == "localhost"
    return "off" if local else "verify-full"


class Average:
    """A moving average of durations in seconds, told in milliseconds; the newest ten or so carry most of its weight."""

    __slots__ = ("_seconds",)

    def __init__(self) -> None:
        self._seconds: float | None = None

    def add(self, seconds: float) -> None:
        """Count one more duration."""
        old = self._seconds
        self._seconds = seconds if old is None else old + (seconds - old) * 0.2

    def metric(self) -> dict[str, float]:
        """``{"avg_response_time_ms": ...}``, or nothing before the first duration."""
        return {} if self._seconds is None else {"avg_response_time_ms": round(self._seconds * 1000, 3)}
