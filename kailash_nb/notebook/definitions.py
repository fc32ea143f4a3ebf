"""What a magic cell does to a gateway: nodes and workflows are defined whole, or not at all."""

from __future__ import annotations

import ast
import dataclasses
import textwrap
from collections.abc import Iterable, Mapping, Sequence

from ..compiler import CompileError
from ..exceptions import WorkflowDefinitionError
from ..gateway import Gateway
from ..handles import WorkflowHandle
from ..workflow import (
    ErrorHandler,
    Node,
    NodeDraft,
    Policy,
    RetryPolicy,
    Timeout,
    Workflow,
    assemble,
    policies,
    upstream_of,
)


def define(gateway: Gateway, name: str, drafts: Sequence[NodeDraft]) -> WorkflowHandle:
    """Make a workflow of the drafts and of what they need of the gateway's other nodes.

    Raises WorkflowDefinitionError with every problem; nothing is changed then.
    """
    names = [d.name for d in drafts]
    known = {name: draft for name, draft in gateway.nodes.items() if name not in names}
    known |= {d.name: d for d in drafts}  # in the order of the cell, also where a decorator has added some before
    # Registered whole first: one new version, however many of its nodes have changed.
    gateway.register_workflow(name, _assembled(gateway, name, upstream_of(names, known)))
    for draft in drafts:
        gateway.add_node(draft)
    return gateway.workflow(name, *names)


def add(gateway: Gateway, draft: NodeDraft) -> str:
    """Add or replace one node, also in workflows that were registered as a whole; returns its wiring in words.

    Raises WorkflowDefinitionError with every problem; nothing is changed then.
    """
    known = {**gateway.nodes, draft.name: draft}
    users = [h for h in gateway.workflows.values() if draft.name in h.workflow.by_name]
    whole = [h for h in users if draft.name not in gateway.nodes]
    renewed = {h: _replaced(h, draft) for h in whole}
    for handle in users:
        if handle not in whole and all(name in known for name in handle.workflow.by_name):
            _assembled(gateway, handle.name, upstream_of(handle.workflow.last, known))
    wiring = _wiring(gateway, draft, known)
    if not whole:
        gateway.add_node(draft)
    for handle, workflow in renewed.items():
        before = gateway.core.workflow(handle.name)
        gateway.register_workflow(handle.name, workflow, before.resources, before.description)
        if handle.number != before.number:
            wiring += f"\n{handle.name} v{handle.number}: {draft.name} changed"
    return wiring if users else f"{wiring}\nno workflow uses it yet: gateway.workflow('NAME', {draft.name!r}) makes one"


def existing(gateway: Gateway, name: str) -> NodeDraft | None:
    """The node of this name: one of the gateway's, else one of a workflow that was registered as a whole."""
    if name in gateway.nodes:
        return gateway.nodes[name]
    for handle in gateway.workflows.values():
        if name in handle.workflow.by_name:
            return _draft_of(handle.workflow.by_name[name])
    return None


def connected(draft: NodeDraft, changes: Mapping[str, str]) -> NodeDraft:
    """The draft with connections changed (an empty one removes), and without those whose parameter is gone."""
    wanted = {**draft.connections, **changes}
    try:
        code = draft.compile({k: v for k, v in wanted.items() if v})
    except CompileError as error:
        raise WorkflowDefinitionError(draft.name, error.problems) from None
    asked = {p.name for p in code.parameters}
    if code.kind == "block":  # whatever is connected to a block is its parameter, read or not
        asked &= {n.id for n in ast.walk(ast.parse(textwrap.dedent(code.source))) if isinstance(n, ast.Name)}
    kept = {p: c for p, c in wanted.items() if c and (p in asked or p in changes)}
    return dataclasses.replace(draft, connections=kept)


def changed_policies(given: Iterable[Policy], timeout: float | None, retries: int | None) -> tuple[Policy, ...]:
    """A node's policies with another timeout (seconds, 0 is none) or number of retries (0 is none); None keeps."""
    found: dict[type[Policy], Policy] = {type(p): p for p in given}
    handler, retry, limit = found.get(ErrorHandler), found.get(RetryPolicy), found.get(Timeout)
    assert handler is None or isinstance(handler, ErrorHandler)
    assert retry is None or isinstance(retry, RetryPolicy)
    if retries is not None:
        retry = dataclasses.replace(retry or RetryPolicy(), max_attempts=retries + 1) if retries else None
    seconds = (limit.seconds if isinstance(limit, Timeout) else None) if timeout is None else timeout or None
    return policies(seconds, retry, handler)


def _assembled(gateway: Gateway, name: str, drafts: Iterable[NodeDraft]) -> Workflow:
    return assemble(name, drafts, known_resources=gateway.resource_registry.names())


def _wiring(gateway: Gateway, draft: NodeDraft, known: Mapping[str, NodeDraft]) -> str:
    """The node as a line of wiring, as far as it can be told before everything it needs is there."""
    try:
        return str(_assembled(gateway, draft.name, upstream_of([draft.name], known)).by_name[draft.name])
    except WorkflowDefinitionError:
        return draft.name


def _replaced(handle: WorkflowHandle, draft: NodeDraft) -> Workflow:
    workflow = handle.workflow
    drafts = [draft if n.name == draft.name else _draft_of(n) for n in workflow.nodes]
    return assemble(workflow.name, drafts, known_resources=workflow.resources, description=workflow.description)


def _draft_of(node: Node) -> NodeDraft:
    """A compiled node as a draft again."""
    wires = [w for w in node.wires if w.source == "node"]
    return NodeDraft(
        node.name,
        lambda _: node.code,
        connections={w.parameter: f"{w.name}.{w.output}" if w.output else w.name for w in wires},
        policies=node.policies,
        resources=node.resources,
        description=node.description,
    )
