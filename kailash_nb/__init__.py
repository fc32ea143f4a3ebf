"""kailash_nb: what you write in a notebook cell is what runs in production.

The house, from the doors down; imports only go down, and rooms on one line never import each other::

    notebook/       %load_ext: magics and displays        cli.py         the commands demo, test, lab
    gateway.py      Gateway, create_gateway: the object people hold
    handles.py      what a gateway hands out
    server/         workflows over HTTP, in a thread      demo.py        the shop of the tutorial
    core.py         the one room where the parts meet: register, execute, resume, health
    executor.py     runs a workflow's nodes               resources/     pools, clients, embedded services
    secrets/        encrypted, and bound to their use     store/         the record of every run
    workflow.py     AsyncWorkflowBuilder, Workflow        compiler.py    a node's source, compiled once
    runs.py         requests and runs, as values          references.py  what a resource is, as JSON
    values.py       values that can be recorded, DataFrames
    sqlitefile.py   one SQLite file and its writer        exceptions.py  the error tree

A gateway's workflow runs by one path: a door, ``core.execute``, the executor, your coroutine, a ``Run``.

The names below load with their first use: importing kailash_nb loads no third-party library.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .exceptions import (
        FencedError,
        KailashError,
        NodeError,
        NodeNotFoundError,
        NodeTimeoutError,
        ParameterError,
        PoolExhaustedError,
        ResourceConfigError,
        ResourceCredentialsError,
        ResourceError,
        ResourceNotFoundError,
        ResourceUnavailableError,
        RunNotFoundError,
        SecretBindingError,
        SecretError,
        SecretIntegrityError,
        SecretKeyError,
        SecretNotFoundError,
        ServiceError,
        StoreError,
        UnsupportedValueError,
        WorkflowDefinitionError,
        WorkflowError,
        WorkflowNotFoundError,
    )
    from .gateway import Gateway, create_gateway
    from .gateway import Gateway as EnhancedDurableAPIGateway
    from .gateway import Gateway as EnterpriseWorkflowServer
    from .references import ResourceReference
    from .resources.base import ResourceType
    from .resources.registry import ResourceRegistry
    from .runs import Run, WorkflowRequest
    from .secrets.manager import SecretManager
    from .workflow import AsyncWorkflowBuilder, ErrorHandler, RetryPolicy, Workflow

__all__ = [
    "AsyncWorkflowBuilder",
    "EnhancedDurableAPIGateway",
    "EnterpriseWorkflowServer",
    "ErrorHandler",
    "FencedError",
    "Gateway",
    "KailashError",
    "NodeError",
    "NodeNotFoundError",
    "NodeTimeoutError",
    "ParameterError",
    "PoolExhaustedError",
    "ResourceConfigError",
    "ResourceCredentialsError",
    "ResourceError",
    "ResourceNotFoundError",
    "ResourceReference",
    "ResourceRegistry",
    "ResourceType",
    "ResourceUnavailableError",
    "RetryPolicy",
    "Run",
    "RunNotFoundError",
    "SecretBindingError",
    "SecretError",
    "SecretIntegrityError",
    "SecretKeyError",
    "SecretManager",
    "SecretNotFoundError",
    "ServiceError",
    "StoreError",
    "UnsupportedValueError",
    "Workflow",
    "WorkflowDefinitionError",
    "WorkflowError",
    "WorkflowNotFoundError",
    "WorkflowRequest",
    "create_gateway",
    "load_ipython_extension",
    "unload_ipython_extension",
]

# Where a name lives; a name that is not listed is an error and lives in `exceptions`.
_HOMES = {
    "AsyncWorkflowBuilder": "workflow",
    "EnhancedDurableAPIGateway": "gateway",
    "EnterpriseWorkflowServer": "gateway",
    "ErrorHandler": "workflow",
    "Gateway": "gateway",
    "ResourceReference": "references",
    "ResourceRegistry": "resources.registry",
    "ResourceType": "resources.base",
    "RetryPolicy": "workflow",
    "Run": "runs",
    "SecretManager": "secrets.manager",
    "Workflow": "workflow",
    "WorkflowRequest": "runs",
    "create_gateway": "gateway",
}
_ALIASES = {"EnhancedDurableAPIGateway": "Gateway", "EnterpriseWorkflowServer": "Gateway"}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("kailash-nb")
    if name not in __all__:
        from .exceptions import did_you_mean

        raise AttributeError(f"module 'kailash_nb' has no attribute {name!r}{did_you_mean(name, __all__)}")
    home = import_module("." + _HOMES.get(name, "exceptions"), __name__)
    value = globals()[name] = getattr(home, _ALIASES.get(name, name))
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def load_ipython_extension(ipython: Any) -> None:
    """``%load_ext kailash_nb``: the magics and displays, in this IPython session until it is unloaded or ends."""
    from . import notebook

    notebook.load_ipython_extension(ipython)


def unload_ipython_extension(ipython: Any) -> None:
    """``%unload_ext kailash_nb``: takes the magics and displays away again."""
    from . import notebook

    notebook.unload_ipython_extension(ipython)
