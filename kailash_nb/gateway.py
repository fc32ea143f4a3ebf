"""The object people hold: nodes, workflows, resources, secrets, runs and a server, by the guide's names.

A gateway decides nothing itself; every method hands to one room below. Making one does no I/O, opens nothing and may
happen anywhere; pools are born on first use, on the loop that uses them.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import logging
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeVar, overload

from . import handles
from .core import Core
from .exceptions import KailashError, ServiceError, WorkflowDefinitionError, WorkflowError, did_you_mean, listed
from .handles import Checks, Debug, PendingRun, Runs, WorkflowHandle
from .references import ResourceReference
from .resources.registry import ResourceRegistry
from .runs import Run, WorkflowRequest
from .secrets.manager import SecretManager
from .store.base import RunStore
from .store.memory import MemoryStore
from .workflow import ErrorHandler, NodeDraft, RetryPolicy, Workflow, assemble, policies, upstream_of

if TYPE_CHECKING:
    from .server import Server

logger = logging.getLogger("kailash_nb")

F = TypeVar("F", bound=Callable[..., Any])

SERVER_TYPES = ("basic", "durable", "enterprise")
"""The names that the guide and the SDK give their servers; here they all mean the one server there is."""


class Gateway:
    """Nodes, workflows, resources, secrets and runs of one project, and the server that offers them over HTTP.

    Args:
        title: names it; making another gateway of the same title in this process retires this one.
        description: one line for people.
        resources: a registry of live resources; a new one by default.
        secrets: the stored secrets; the user's own, in their data folder, by default.
        store: where runs are recorded; this process's memory by default.
        max_concurrency: how many nodes of one run may run at once.

    Lives until :meth:`shutdown`, until another of its title is made, or as long as the process.
    """

    def __init__(
        self,
        title: str = "kailash_nb",
        *,
        description: str = "",
        resources: ResourceRegistry | None = None,
        secrets: SecretManager | None = None,
        store: RunStore | None = None,
        max_concurrency: int = 64,
    ) -> None:
        if not isinstance(max_concurrency, int) or max_concurrency < 1:
            raise ValueError(f"max_concurrency is a whole number of at least 1, not {max_concurrency!r}")
        self.title = title
        self.description = description
        self._own_resources = resources is None
        self.resource_registry = ResourceRegistry() if resources is None else resources
        self.secret_manager = SecretManager() if secrets is None else secrets
        self.core = Core(
            self.resource_registry,
            self.secret_manager,
            MemoryStore() if store is None else store,
            max_concurrency=max_concurrency,
            gateway=self,
            say=handles.say,
            place=handles.place,
        )
        self.runs = Runs(self.core)
        self.server: Server | None = None
        self._nodes: dict[str, NodeDraft] = {}
        self._node_names: dict[Callable[..., Any], str] = {}
        self._definitions: dict[str, _Definition] = {}
        _retire_namesake(self)

    # ------------------------------------------------------------------------------------------------ nodes, workflows

    @overload
    def node(self, function: F, /) -> F: ...

    @overload
    def node(
        self,
        function: None = None,
        /,
        *,
        name: str | None = None,
        timeout: float | None = None,
        retry_policy: RetryPolicy | None = None,
        error_handler: ErrorHandler | None = None,
        required_resources: Sequence[str] = (),
        description: str | None = None,
        **connections: str,
    ) -> Callable[[F], F]: ...

    def node(self, function: Any = None, /, **options: Any) -> Any:  # noqa: D417 (the overload above names them)
        """Make a function a node, as a decorator: ``@gateway.node`` or ``@gateway.node(users="extract.users")``.

        Args:
            name: the node's name; the function's own by default.
            timeout: seconds that one attempt may take.
            retry_policy: whether and when a failed attempt is followed by another.
            error_handler: what stands in for the node when it has failed for good.
            required_resources: resources it may ask for, beside its parameters and literal ``get_resource("name")``.
            description: one line for people.
            connections: parameter=``"node"`` or ``"node.output"``; other parameters are found by their names.

        Returns the plain function, unchanged. Defining a node again replaces it, and the workflows that contain it get
        a new version.
        """
        if function is None:
            return functools.partial(self._define, **options)
        return self._define(function, **options)

    def _define(
        self,
        function: F,
        *,
        name: str | None = None,
        timeout: float | None = None,
        retry_policy: RetryPolicy | None = None,
        error_handler: ErrorHandler | None = None,
        required_resources: Sequence[str] = (),
        description: str | None = None,
        **connections: Any,
    ) -> F:
        if not inspect.isfunction(function):
            raise WorkflowError(f"@gateway.node goes on a function, not on {function!r:.80}")
        for parameter, source in connections.items():
            if not isinstance(source, str):
                near = did_you_mean(parameter, inspect.signature(self._define).parameters)
                raise WorkflowError(
                    f"@gateway.node({parameter}={source!r:.40}) is no option{near}, and as a connection it names where "
                    "the parameter comes from: a text, 'node' or 'node.output'"
                )
        node_name = name or function.__name__
        draft = NodeDraft.function(
            node_name,
            function,
            connections=connections,
            policies=policies(timeout, retry_policy, error_handler),
            resources=tuple(required_resources),
            description=description or (inspect.getdoc(function) or "").partition("\n")[0] or None,
        )
        self._node_names[function] = node_name
        self.add_node(draft)
        return function

    def add_node(self, draft: NodeDraft) -> list[WorkflowHandle]:
        """Add a node, or replace the one of its name; returns the workflows that got a new version by it."""
        self._nodes[draft.name] = draft
        renewed = []
        for name, definition in self._definitions.items():
            before = self.core.workflow(name)
            if draft.name not in before.workflow.by_name:
                continue
            try:
                handle = self._assemble(name, definition)
            except (WorkflowDefinitionError, WorkflowError) as error:
                handles.say(f"{name} stays v{before.number}: {error}")
                continue
            if handle.number != before.number:
                handles.say(f"{name} v{handle.number}: {draft.name} changed")
                renewed.append(handle)
        return renewed

    @property
    def nodes(self) -> Mapping[str, NodeDraft]:
        """The nodes defined so far, by name."""
        return MappingProxyType(self._nodes)

    def workflow(self, name: str, *last: Callable[..., Any] | str, description: str | None = None) -> WorkflowHandle:
        """Make a workflow of its last nodes and everything upstream of them, and register it.

        Args:
            name: what it is called by.
            last: functions that are nodes, or names of nodes; without any, the handle of the workflow of this name.
            description: one line for people.

        Raises:
            WorkflowDefinitionError: with every problem of every node.
            WorkflowNotFoundError: no ``last`` was given and there is no workflow of this name.
        """
        if not last:
            return WorkflowHandle(self.core, self.core.workflow(name).name)
        names = tuple(self._node_name(item) for item in last)
        return self._assemble(name, _Definition(names, description))

    def _node_name(self, item: Callable[..., Any] | str) -> str:
        shown = getattr(item, "__name__", repr(item))
        found = item if isinstance(item, str) else self._node_names.get(item)
        if found is None and shown in self._nodes:  # defined by a cell, which may have run again since
            found = shown
        if found is None:
            raise WorkflowError(f"{shown!r} is not a node of this gateway; put @gateway.node above it")
        return found

    def _assemble(self, name: str, definition: _Definition) -> WorkflowHandle:
        drafts = upstream_of(definition.last, self._nodes)
        known = self.resource_registry.names()
        workflow = assemble(name, drafts, known_resources=known, description=definition.description)
        self.core.register(name, workflow)
        self._definitions[name] = definition
        return WorkflowHandle(self.core, name)

    def register_workflow(
        self, name: str, workflow: Workflow, required_resources: Sequence[str] = (), description: str | None = None
    ) -> WorkflowHandle:
        """Register a workflow under a name; the same content again changes nothing, another makes a new version.

        Args:
            name: what it is called by.
            workflow: what ``AsyncWorkflowBuilder(...).build()`` made.
            required_resources: resources that must be there before a run starts, beside those its nodes ask for.
            description: one line for people.
        """
        self.core.register(name, workflow, required_resources=tuple(required_resources), description=description)
        self._definitions.pop(name, None)
        return WorkflowHandle(self.core, name)

    @property
    def workflows(self) -> Mapping[str, WorkflowHandle]:
        """The registered workflows by name."""
        return MappingProxyType({name: WorkflowHandle(self.core, name) for name in self.core.workflows})

    async def execute_workflow(self, name: str, request: WorkflowRequest | Mapping[str, Any] | None = None) -> Run:
        """Run a workflow to its end.

        Returns the Run, also when a node failed (``run.status == "failed"``, ``run.error``). Raises, before anything
        has started, WorkflowNotFoundError, ParameterError, or ResourceError (unknown, misconfigured, no secret).
        """
        if not isinstance(request, WorkflowRequest):
            request = WorkflowRequest.from_dict(request or {})
        return await self.core.execute(name, request)

    # ------------------------------------------------------------------------------------------------------- resources

    def register_resource(self, name: str, reference: ResourceReference | Mapping[str, Any]) -> None:
        """Make a resource known by name: to workflows, to requests as ``"@name"``, and to the health report.

        Its secret, if it is stored, is bound to what the resource connects to. Raises ResourceConfigError or
        ResourceNotFoundError where the reference does not fit its type.
        """
        self.core.register_resource(name, reference)

    async def list_registered_resources(self) -> list[str]:
        """The names of the registered resources."""
        return self.resource_registry.names()

    async def cleanup_resources(self, names: Sequence[str]) -> dict[str, bool]:
        """Close the pools of these resources now; they open again when they are used again.

        Returns, for each name, whether there is a resource of that name.
        """
        known = self.resource_registry.names()
        await self.resource_registry.close([name for name in names if name in known])
        return {name: name in known for name in names}

    async def get_resource_health(self) -> dict[str, Any]:
        """The state of every resource by the last background check: ``{"resources": {...}, "overall_status": ...}``."""
        return self.core.health()

    async def check(self) -> Checks:
        """Connect to every registered resource now and report what answered; shows as a table."""
        return Checks(await self.core.check())

    # -------------------------------------------------------------------------------------------------- debug, resume

    def debug(self, run: Run) -> Debug:
        """Open a run's failed node: its recorded inputs and its source; in a notebook, as variables and the next cell.

        Raises WorkflowError where no node failed.
        """
        if run.error is None or run.error.node is None:
            raise WorkflowError(f"there is nothing to debug: {run.summary()}")
        node = self.core.version(run.version).by_name[run.error.node]
        session = Debug(run, node, MappingProxyType(dict(run.error.inputs)))
        if handles.frontend is not None:
            handles.frontend.debug(session)
        return session

    def resume(self, run: Run) -> PendingRun:
        """Run again from where a run stopped, with the workflow as it is now; see :meth:`Run.resume`."""
        return PendingRun(run.workflow, self.core, lambda observer: self.core.resume(run, observer=observer))

    # ---------------------------------------------------------------------------------------------------------- server

    def serve(self, host: str = "127.0.0.1", port: int = 0) -> Server:
        """Offer the workflows over HTTP, from a thread of its own; returns at once, and again the same when it runs.

        Args:
            host: a loopback address.
            port: 0 takes a free one.

        Raises:
            ServiceError: the port is taken, the host is not loopback, or the server extra is not installed.
        """
        try:
            from . import server
        except ImportError as error:
            raise ServiceError(f'the server needs {error.name}: pip install "kailash-nb[server]"') from None
        before = self.server if self.server is not None and self.server.running else None
        if before is not None and port in (0, before.port) and host == before.host:
            return before
        self.server = server.serve(self.core, title=self.title, host=host, port=port)
        if before is not None:
            before.stop()
        handles.say(self._invitation(self.server))
        return self.server

    def _invitation(self, server: Server) -> str:
        """The server's address, and a line for a terminal that calls the workflow registered last."""
        names = list(self.core.workflows)
        if not names:
            return f"serving at {server.url}; there is no workflow yet"
        name = names[-1]
        required = [p.name for p in self.core.workflow(name).workflow.parameters.values() if p.required]
        return f"serving at {server.url}; in a terminal:\n{server.curl(name, dict.fromkeys(required, '...'))}"

    def stop(self) -> None:
        """Stop the server, if one runs: requests under way get a few seconds, its pools close, its port is free."""
        if self.server is not None:
            self.server.stop()
            self.server = None

    def run(self, host: str = "127.0.0.1", port: int = 8000) -> Server | None:
        """Serve: in the background where an event loop runs (a notebook), else until interrupted (a script).

        The server listens on loopback only; another host is answered with a word on that.
        """
        if host not in ("127.0.0.1", "localhost", "::1"):
            handles.say(
                f"serving on 127.0.0.1, not on {host}: put a proxy with TLS in front to reach it from elsewhere"
            )
            host = "127.0.0.1"
        server = self.serve(host, port)
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            print(server)
            try:
                server.wait()
            except KeyboardInterrupt:
                self.stop()
            return None
        return server

    # ------------------------------------------------------------------------------------------------------- the rest

    def set_log_level(self, level: str | int) -> None:
        """Set how much kailash_nb logs: ``"DEBUG"``, ``"INFO"``, ``"WARNING"``, ``"ERROR"``; raises ValueError."""
        known = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")
        if isinstance(level, str):
            level = level.upper()
            if level not in known:
                raise ValueError(f"no log level {level!r}{did_you_mean(level, known)}; it is one of {', '.join(known)}")
        logger.setLevel(level)

    async def shutdown(self) -> None:
        """Stop the server and close every pool; the gateway may be used again, and shutting down twice is fine."""
        if self.server is not None:
            await asyncio.to_thread(self.stop)
        await self.core.close()

    def retire(self) -> None:
        """Stop the server and let the pools close on their own loops; for a gateway that another one has replaced."""
        self.stop()
        if self._own_resources:
            self.resource_registry.retire()

    def __repr__(self) -> str:
        server = f", serving at {self.server.url}" if self.server is not None and self.server.running else ""
        return (
            f"<Gateway {self.title!r}: workflows {listed(self.core.workflows)}; "
            f"resources {listed(self.resource_registry.names())}{server}>"
        )


@dataclass(frozen=True)
class _Definition:
    """How a workflow was asked for, so that it can be assembled again when one of its nodes changes."""

    last: tuple[str, ...]
    description: str | None


# -------------------------------------------------------------------------------------------------------- the process's

_made: dict[str, weakref.ref[Gateway]] = {}
_current: Gateway | None = None


def current() -> Gateway | None:
    """The gateway of this process that was made (or chosen) last, or None."""
    return _current


def use(gateway: Gateway) -> None:
    """Make a gateway the current one."""
    global _current
    _current = gateway


def made() -> Mapping[str, Gateway]:
    """The living gateways of this process, by title."""
    found = {title: reference() for title, reference in _made.items()}
    return {title: gateway for title, gateway in found.items() if gateway is not None}


def _retire_namesake(gateway: Gateway) -> None:
    before = _made.get(gateway.title)
    _made[gateway.title] = weakref.ref(gateway)
    use(gateway)
    old = before() if before is not None else None
    if old is not None:
        try:
            old.retire()
        except KailashError as error:
            logger.warning("the earlier gateway %r did not stop: %s", old.title, error)


def create_gateway(
    title: str = "kailash_nb",
    description: str = "",
    *,
    server_type: str = "enterprise",
    resource_registry: ResourceRegistry | None = None,
    secret_manager: SecretManager | None = None,
    enable_durability: bool = False,
    enable_resource_management: bool = True,
    enable_async_execution: bool = True,
) -> Gateway:
    """Make a gateway by the guide's keywords.

    Args:
        title: names it; another of the same title retires it.
        description: one line for people.
        server_type: one of :data:`SERVER_TYPES`; they all mean the one server there is.
        resource_registry: a registry of live resources; a new one by default.
        secret_manager: the stored secrets; the user's own by default.
        enable_durability: this version keeps runs in memory; True is answered with a RuntimeWarning that says so.
        enable_resource_management: always on; False is refused.
        enable_async_execution: always on; False is refused.

    Raises:
        ValueError: an unknown server type, or a part that cannot be switched off.
        TypeError: an unknown keyword.
    """
    if server_type not in SERVER_TYPES:
        near = did_you_mean(server_type, SERVER_TYPES)
        raise ValueError(f"no server type {server_type!r}{near}; it is one of {listed(SERVER_TYPES)}")
    if not (enable_resource_management and enable_async_execution):
        raise ValueError("resource management and async execution are what a gateway is; they cannot be switched off")
    if enable_durability:
        warnings.warn(
            "enable_durability=True: runs are kept in this process's memory only and end with it",
            RuntimeWarning,
            stacklevel=2,
        )
    return Gateway(title, description=description, resources=resource_registry, secrets=secret_manager)


EnhancedDurableAPIGateway = Gateway
EnterpriseWorkflowServer = Gateway
