"""The errors of kailash_nb.

::

    KailashError
    ├── WorkflowError                    about a definition, or a request to run one
    │   ├── WorkflowNotFoundError
    │   ├── WorkflowDefinitionError      every problem of the definition at once: ``.problems``
    │   └── ParameterError               a request's parameters do not fit; nothing was started
    ├── NodeError                        a run failed: ``.node``, ``.run``
    ├── NodeNotFoundError                a run has no value of this name (also a KeyError)
    ├── NodeTimeoutError                 a node's attempt took longer than its timeout (also a TimeoutError)
    ├── ResourceError
    │   ├── ResourceNotFoundError        no such name or type
    │   ├── ResourceConfigError          a reference's config does not fit its type
    │   ├── ResourceCredentialsError     the secret it names is missing, incomplete or bound elsewhere
    │   ├── ResourceUnavailableError     unreachable, refused, timed out: ``.outcome``
    │   └── PoolExhaustedError           every connection stayed busy until the deadline
    ├── SecretError
    │   ├── SecretNotFoundError
    │   ├── SecretKeyError               the key that the stored secrets need is not there
    │   ├── SecretIntegrityError         a stored secret was altered, moved or rolled back
    │   └── SecretBindingError           a secret was asked for a use it is not bound to
    ├── StoreError
    │   ├── RunNotFoundError
    │   └── FencedError                  another owner has taken this run over
    ├── ServiceError                     an embedded or background server did not start or stop
    └── UnsupportedValueError            a value has no JSON or table form

Every message says what was wrong, which names are known, and what to do about it. No message holds a secret.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from .runs import Run


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """``"; did you mean 'extract'?"`` when a known name is close to this one, else ``""``."""
    close = difflib.get_close_matches(name, [k for k in known if k != name], n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else ""


def listed(names: Iterable[str], none: str = "none") -> str:
    """Names for a message: ``a, b, c``, or ``none`` where there are none."""
    return ", ".join(sorted(names)) or none


class KailashError(Exception):
    """Whatever kailash_nb raises on purpose."""


class WorkflowError(KailashError):
    """A workflow's definition or a request to run it is wrong."""


class WorkflowNotFoundError(WorkflowError):
    """No workflow of this name is registered."""

    def __init__(self, name: str, known: Iterable[str]) -> None:
        known = list(known)
        super().__init__(f"no workflow {name!r}{did_you_mean(name, known)} (registered: {listed(known)})")


class WorkflowDefinitionError(WorkflowError):
    """A definition has problems; all of them are here, each with its remedy."""

    def __init__(self, workflow: str, problems: Iterable[str]) -> None:
        self.workflow = workflow
        self.problems = tuple(problems)
        lines = "".join(f"\n  - {problem}" for problem in self.problems)
        count = f"{len(self.problems)} problem{'s' if len(self.problems) != 1 else ''}"
        super().__init__(f"workflow {workflow!r} has {count}:{lines}")


class ParameterError(WorkflowError):
    """A request's parameters do not fit the workflow; nothing was started."""

    def __init__(self, workflow: str, problems: Iterable[str]) -> None:
        self.workflow = workflow
        self.problems = tuple(problems)
        super().__init__(f"workflow {workflow!r} was not started: " + "; ".join(self.problems))


class NodeError(KailashError):
    """A node of a run failed. ``run`` is the record: ``error.run.debug()`` opens it."""

    def __init__(self, message: str, *, node: str, run: Run | None = None) -> None:
        super().__init__(message)
        self.node = node
        self.run = run


class NodeNotFoundError(KailashError, KeyError):
    """A run has no node, no output or no value of this name."""

    __str__ = Exception.__str__  # a KeyError would show its message in quotes


class NodeTimeoutError(KailashError, TimeoutError):
    """An attempt of a node took longer than its timeout."""


class ResourceError(KailashError):
    """A resource could not be named, configured, opened or used."""


class ResourceNotFoundError(ResourceError):
    """No resource, or no resource type, has this name."""

    def __init__(self, name: str, known: Iterable[str], *, kind: str = "resource", remedy: str = "") -> None:
        known = list(known)
        super().__init__(f"no {kind} {name!r}{did_you_mean(name, known)} (known: {listed(known)}){remedy}")
        self.name = name


class ResourceConfigError(ResourceError):
    """A reference's config does not fit its resource type."""

    def __init__(self, type: str, problems: Iterable[str]) -> None:
        self.problems = tuple(problems)
        super().__init__(f"{type} reference: " + "; ".join(self.problems))


class ResourceCredentialsError(ResourceError):
    """The secret a reference names is missing, incomplete or bound to another use."""


Outcome = Literal["not sent", "unknown", "answered"]


class ResourceUnavailableError(ResourceError):
    """A server could not be reached, refused, or did not answer in time.

    ``outcome`` tells whether the operation may have had its effect: ``"not sent"`` (safe to repeat), ``"unknown"``,
    or ``"answered"`` (the server said no).
    """

    def __init__(self, message: str, *, outcome: Outcome) -> None:
        super().__init__(message)
        self.outcome = outcome


class PoolExhaustedError(ResourceError):
    """Every connection of a pool stayed busy until the deadline."""


class SecretError(KailashError):
    """A secret could not be stored, read or used."""


class SecretNotFoundError(SecretError):
    """No secret of this name is stored."""

    def __init__(self, name: str, known: Iterable[str]) -> None:
        known = list(known)
        super().__init__(
            f"no secret {name!r}{did_you_mean(name, known)} (stored: {listed(known)}); "
            f"store it with `%secret {name}` or `await gateway.secret_manager.store_secret({name!r}, {{...}})`"
        )
        self.name = name


class SecretKeyError(SecretError):
    """The key that the stored secrets need is missing or is not the one they were encrypted with."""


class SecretIntegrityError(SecretError):
    """A stored secret was altered, moved to another name, or rolled back."""


class SecretBindingError(SecretError):
    """A secret was asked for a use that it is not bound to."""


class StoreError(KailashError):
    """A run's record could not be written or read."""


class RunNotFoundError(StoreError):
    """The store holds no run of this id."""

    def __init__(self, run_id: str) -> None:
        super().__init__(f"no run {run_id!r} in this store; `await gateway.runs.list()` shows the runs it holds")


class FencedError(StoreError):
    """Another owner has taken this run over; what this one still computes is not recorded."""


class ServiceError(KailashError):
    """An embedded or background server did not start, answer or stop."""


class UnsupportedValueError(KailashError):
    """A value has no JSON or table form."""
