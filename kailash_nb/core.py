"""The one room where the parts meet, and the one path that every door takes.

A door (a cell, the server, a command) hands a request to :meth:`Core.execute`; there the workflow, the parameters, the
resources and their secrets are checked, the run is recorded as started, the executor runs it, and its record becomes a
:class:`Run`. Nothing here belongs to an event loop: the same core serves the notebook's loop and the server's at once.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import os
import threading
import time
import uuid
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

from .exceptions import (
    ResourceCredentialsError,
    ResourceNotFoundError,
    SecretBindingError,
    SecretError,
    SecretNotFoundError,
    StoreError,
    WorkflowError,
    WorkflowNotFoundError,
    did_you_mean,
)
from .executor import Plan, Work, execute
from .references import NAME, ResourceReference
from .resources.base import Credentials
from .resources.registry import CheckResult, ResourceRegistry
from .runs import (
    DONE,
    Event,
    EventKind,
    Observer,
    ResourceGiven,
    Run,
    RunError,
    RunGateway,
    RunRecord,
    RunStart,
    RunStatus,
    WorkflowRequest,
)
from .secrets.manager import Binding, SecretManager
from .store.base import RunLease, RunStore
from .workflow import Workflow

logger = logging.getLogger("kailash_nb")


@dataclass(frozen=True)
class Principal:
    """Who asks, and through which door."""

    name: str
    via: Literal["kernel", "http"]


OWNER = Principal("owner", "kernel")
"""The person whose process this is."""


@dataclass(frozen=True)
class Registered:
    """One version of a registered workflow; ``number`` counts the versions of its name from 1."""

    name: str
    workflow: Workflow
    number: int
    resources: tuple[str, ...]
    description: str | None
    plan: Plan


class Core:
    """Workflows, resources, secrets and the record of runs, and how they work together. Lives as long as its gateway.

    Args:
        resources: the live resources.
        secrets: the stored secrets.
        store: where runs are recorded.
        max_concurrency: how many nodes of one run may run at once.
        gateway: what runs go through for ``run.debug()`` and ``run.resume()``.
        say: told one line when something happened that the owner should know.
        place: how people call a source file, or None.
    """

    def __init__(
        self,
        resources: ResourceRegistry,
        secrets: SecretManager,
        store: RunStore,
        *,
        max_concurrency: int = 64,
        gateway: RunGateway | None = None,
        say: Callable[[str], None] = logger.info,
        place: Callable[[str], str | None] = lambda _: None,
    ) -> None:
        self.resources = resources
        self.secrets = secrets
        self.store = store
        self.max_concurrency = max_concurrency
        self.say = say
        self.place = place
        self.owner = f"{os.getpid()}-{uuid.uuid4().hex[:8]}"
        self.gateway = gateway
        self._workflows: dict[str, Registered] = {}
        self._versions: dict[str, Workflow] = {}
        self._lock = threading.Lock()  # held for microseconds, never across an await

    # ------------------------------------------------------------------------------------------------------ workflows

    @property
    def workflows(self) -> Mapping[str, Registered]:
        """The registered workflows by name."""
        return MappingProxyType(self._workflows)

    def workflow(self, name: str) -> Registered:
        """The current version of a workflow; raises WorkflowNotFoundError."""
        try:
            return self._workflows[name]
        except KeyError:
            raise WorkflowNotFoundError(name, self._workflows) from None

    def version(self, digest: str) -> Workflow:
        """The workflow of a content hash that was registered in this process; raises WorkflowError."""
        try:
            return self._versions[digest]
        except KeyError:
            raise WorkflowError(f"no workflow of version {digest[:8]} was registered in this process") from None

    def register(
        self, name: str, workflow: Workflow, *, required_resources: tuple[str, ...] = (), description: str | None = None
    ) -> Registered:
        """Register a workflow, or a new version of it; the same content again changes nothing.

        Runs under way keep the version they began with. Raises WorkflowError for a bad name or something that is no
        workflow.
        """
        if not isinstance(workflow, Workflow):
            raise WorkflowError(f"register a Workflow (`builder.build()` makes one), not {type(workflow).__name__}")
        if not isinstance(name, str) or not NAME.fullmatch(name):
            raise WorkflowError(f"a workflow's name is letters, digits, '_', '.' or '-', 64 at most, not {name!r:.80}")
        resources = tuple(dict.fromkeys([*workflow.resources, *required_resources]))
        description = description if description is not None else workflow.description
        with self._lock:
            known = self._workflows.get(name)
            same = known and known.workflow.hash == workflow.hash and set(known.resources) == set(resources)
            # The same version is registered anew all the same: its source may stand in another cell by now.
            number = known.number + (not same) if known else 1
            registered = Registered(name, workflow, number, resources, description, Plan(workflow))
            self._workflows[name] = registered
            self._versions[workflow.hash] = workflow
            return registered

    # ------------------------------------------------------------------------------------------------------ resources

    def register_resource(self, name: str, reference: ResourceReference | Mapping[str, Any]) -> None:
        """Make a resource known by name, and bind its secret, if that is stored, to what it connects to.

        Raises ResourceConfigError or ResourceNotFoundError where the reference does not fit its type.
        """
        self.resources.register(name, reference)
        registered = self.resources.reference(name)
        if registered.credentials_ref and self.secrets.version(registered.credentials_ref) is not None:
            self._bind(registered)

    def _references(
        self, registered: Registered, given: Mapping[str, ResourceGiven], principal: Principal
    ) -> dict[str, ResourceReference]:
        """What every resource name of the workflow means in this run, checked down to the secret it names."""
        found = {name: self.resources.resolve(value) for name, value in given.items()}
        absent = [name for name in registered.resources if name not in given]
        for name in given:
            if name not in registered.resources and did_you_mean(name, absent):
                raise ResourceNotFoundError(name, absent, remedy=f"; workflow {registered.name!r} does not use it")
        for name in registered.resources:
            if name not in found:
                if name not in self.resources.names():
                    raise ResourceNotFoundError(
                        name,
                        [*self.resources.names(), *given],
                        remedy=f"; workflow {registered.name!r} needs it: register it with "
                        f"`gateway.register_resource({name!r}, ResourceReference(...))` or `%resource {name} URL`, "
                        f"or pass it in the request's resources",
                    )
                found[name] = self.resources.reference(name)
        for name, reference in found.items():
            foreign = principal.via == "http" and isinstance(given.get(name), ResourceReference)
            self._check_foreign_secret(name, reference) if foreign else self._check_secret(name, reference, principal)
        return found

    def _check_secret(self, name: str, reference: ResourceReference, principal: Principal) -> None:
        secret = reference.credentials_ref
        if secret is None:
            return
        if self.secrets.version(secret) is None:
            raise ResourceCredentialsError(
                f"resource {name!r} needs secret {secret!r}, which is not stored; store it with `%secret {secret} user "
                f"password` or `await gateway.secret_manager.store_secret({secret!r}, {{...}})`"
            )
        if principal.via == "kernel":
            self._bind(reference)
        elif (binding := self._binding(reference)) is not None:
            self._allowed(secret, binding, name)

    def _check_foreign_secret(self, name: str, reference: ResourceReference) -> None:
        """Of a reference that a caller wrote, who learns nothing of which secrets there are and what they are for."""
        secret, binding = reference.credentials_ref, self._binding(reference)
        if secret is not None and binding is not None:
            self._allowed(secret, binding, name)

    def _allowed(self, secret: str, binding: Binding, resource: str) -> None:
        try:
            self.secrets.check_use(secret, binding)
        except (SecretBindingError, SecretNotFoundError):
            raise ResourceCredentialsError(
                f"resource {resource!r}: its credentials may not be used there; name a registered resource, as '@name'"
            ) from None

    def _binding(self, reference: ResourceReference) -> Binding | None:
        use = self.resources.use(reference)
        return None if use is None else Binding(use.type, use.endpoint, use.tls)

    def _bind(self, reference: ResourceReference) -> None:
        """Bind a secret to what the owner uses it for, so that nobody else can send it elsewhere."""
        binding, secret = self._binding(reference), reference.credentials_ref
        if binding is not None and secret is not None and self.secrets.bind(secret, binding):
            self.say(f"secret {secret!r} is now bound to {binding.type} {binding.endpoint} (TLS {binding.tls})")

    def _credentials(self, reference: ResourceReference) -> Credentials | None:
        name = reference.credentials_ref
        if name is None:
            return None
        version = self.secrets.version(name)
        if version is None:
            raise ResourceCredentialsError(f"secret {name!r} is not stored any more; store it with `%secret {name}`")
        return Credentials(name, version, functools.partial(self.secrets.get_secret, name))

    def lease(self, reference: ResourceReference, waited: Callable[[float], None]) -> AbstractAsyncContextManager[Any]:
        """A live resource for one node, opened on the running loop if need be."""
        return self.resources.lease(reference, self._credentials(reference), waited)

    def health(self) -> dict[str, Any]:
        """The state of every known resource by the last background checks; asks no server."""
        return self.resources.health()

    async def check(self) -> list[CheckResult]:
        """Connect to every registered resource now; a failure is a result, not an exception."""
        return list(await asyncio.gather(*(self._check(name) for name in self.resources.names())))

    async def _check(self, name: str) -> CheckResult:
        reference = self.resources.reference(name)
        try:
            self._check_secret(name, reference, OWNER)
            return await self.resources.check(name, self._credentials(reference))
        except (ResourceCredentialsError, SecretError) as error:
            return CheckResult(name, reference.type, "unhealthy", error=str(error))

    # ----------------------------------------------------------------------------------------------------------- runs

    async def execute(
        self,
        name: str,
        request: WorkflowRequest,
        *,
        principal: Principal = OWNER,
        observer: Observer | None = None,
    ) -> Run:
        """Run a workflow to its end.

        Returns the Run, also when a node failed (status ``failed``). Raises, before anything has started,
        WorkflowNotFoundError, ParameterError or a ResourceError. Cancelling it cancels the run.
        """
        registered = self.workflow(name)
        parameters = registered.workflow.check_parameters(request.parameters)
        references = self._references(registered, request.resources, principal)
        run_id = uuid.uuid4().hex
        given = tuple(request.resources)
        start = _start(registered, run_id, parameters, references, context=request.context, root=run_id, given=given)
        return await self._run(registered, start, {}, observer)

    async def resume(self, run: Run, *, observer: Observer | None = None) -> Run:
        """Run again from where a run stopped, with the workflow as it is registered now.

        Nodes that were done keep their values if their code, and everything they depend on, is unchanged. Returns a new
        Run; raises as :meth:`execute` does, and WorkflowError while the run is still under way.
        """
        record = await self.store.load(run.id)
        before = Run.of(record)
        if before.status is RunStatus.RUNNING:
            raise WorkflowError(f"run {run.id!r} is still under way; await it or cancel it first")
        registered = self.workflow(run.workflow)
        old = record.start
        parameters = registered.workflow.check_parameters(old.parameters)
        given = {name: old.resources[name] for name in old.given if name in registered.resources}
        references = self._references(registered, given, OWNER)
        done = _unchanged(registered.workflow, self._versions.get(old.version), before)
        start = _start(
            registered,
            uuid.uuid4().hex,
            parameters,
            references,
            context=old.context,
            root=old.root,
            given=tuple(given),
            resumes=run.id,
        )
        return await self._run(registered, start, done, observer)

    async def _run(
        self, registered: Registered, start: RunStart, done: Mapping[str, Any], observer: Observer | None
    ) -> Run:
        lease = await self.store.start(start, self.owner)
        record = _recorder(self.store, lease, observer)
        work = Work(
            parameters=start.parameters,
            context=start.context,
            key=start.root,
            lease=lambda name, waited: self.lease(start.resources[name], waited),
            record=record,
            done=done,
            place=self.place,
            redact=self.secrets.redactor.redact,
            limit=self.max_concurrency,
        )
        try:
            await record(Event(EventKind.RUN_STARTED, start.at, note=start.id))
            failure = await execute(registered.plan, work)
        except StoreError:
            raise  # nothing more can be recorded under this lease
        except BaseException as error:
            await record(_finished(RunStatus.CANCELLED, _why(error)))
            raise
        await record(_finished(RunStatus.FAILED if failure else RunStatus.COMPLETED, failure))
        return await self.run(start.id)

    async def run(self, run_id: str) -> Run:
        """A run by its id; raises RunNotFoundError."""
        return self._view(await self.store.load(run_id))

    async def runs(self, workflow: str | None = None, status: RunStatus | None = None, limit: int = 100) -> list[Run]:
        """Runs, newest first."""
        return [self._view(record) for record in await self.store.list(workflow, status, limit)]

    def _view(self, record: RunRecord) -> Run:
        return Run.of(record, self.gateway)

    # ------------------------------------------------------------------------------------------------------------ end

    async def close_loop(self) -> None:
        """Close the pools that belong to the running loop."""
        await self.resources.close_loop()

    async def close(self) -> None:
        """Close every pool and the store; closing twice is fine."""
        await self.resources.close()
        await self.store.close()

    def __repr__(self) -> str:
        return f"<Core {len(self._workflows)} workflows, {self.resources!r}, {self.store!r}>"


def _start(
    registered: Registered,
    run_id: str,
    parameters: Mapping[str, Any],
    references: Mapping[str, ResourceReference],
    *,
    context: Mapping[str, Any],
    root: str,
    given: tuple[str, ...],
    resumes: str | None = None,
) -> RunStart:
    workflow = registered.workflow
    return RunStart(
        id=run_id,
        workflow=registered.name,
        version=workflow.hash,
        parameters=parameters,
        resources=references,
        context=context,
        layout=tuple(workflow.by_name),
        last=workflow.last,
        at=time.time(),
        root=root,
        resumes=resumes,
        given=given,
    )


def _recorder(store: RunStore, lease: RunLease, observer: Observer | None) -> Callable[[Event], Awaitable[None]]:
    """What the executor tells its events to: first the record, then whoever watches."""
    if observer is None:
        return functools.partial(store.append, lease)

    async def record(event: Event) -> None:
        await store.append(lease, event)
        try:
            observer(event)
        except Exception:
            logger.exception("an observer of run %s failed", lease.run_id)

    return record


def _finished(status: RunStatus, error: RunError | None) -> Event:
    return Event(EventKind.RUN_FINISHED, time.time(), status=status, error=error)


def _why(error: BaseException) -> RunError | None:
    if isinstance(error, asyncio.CancelledError):
        return None
    return RunError(None, type(error).__name__, str(error), exception=error)


def _unchanged(workflow: Workflow, before: Workflow | None, run: Run) -> dict[str, Any]:
    """The values of the earlier run that the workflow, as it is now, would compute in the same way."""
    if before is None:
        return {}
    kept: dict[str, Any] = {}
    for node in workflow.nodes:
        old = before.by_name.get(node.name)
        result = run.nodes.get(node.name)
        same = old is not None and old.hash == node.hash and all(name in kept for name in node.upstream)
        # A fallback's value stands for a failure; resuming is the chance to do better.
        if same and result is not None and result.status in DONE and result.error is None:
            kept[node.name] = result.value
    return kept
