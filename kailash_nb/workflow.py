"""Workflows: nodes, their policies, and how they are wired.

A definition, whichever way it is spelled (the builder, functions, cells), is a list of :class:`NodeDraft` and becomes
a frozen :class:`Workflow` in one place, :func:`assemble`, which reports every problem at once. Wiring is decided there
and then and is part of the workflow's version: resources or nodes that appear later change nothing.
"""

from __future__ import annotations

import contextlib
import copy
import graphlib
import hashlib
import heapq
import inspect
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from types import MappingProxyType
from typing import Any, Literal, Self

from . import compiler, values
from .compiler import CompiledNode, CompileError, Place
from .exceptions import ParameterError, WorkflowDefinitionError, WorkflowError, did_you_mean, listed
from .references import NAME

# ----------------------------------------------------------------------------------------------------------- policies


@dataclass(frozen=True)
class Timeout:
    """Ends each attempt of a node after so many seconds of wall-clock time; the node then fails with NodeTimeout."""

    seconds: float

    def __post_init__(self) -> None:
        if not isinstance(self.seconds, (int, float)) or isinstance(self.seconds, bool) or not self.seconds > 0:
            raise WorkflowError(f"a timeout is a number of seconds above 0, not {self.seconds!r}")


@dataclass(frozen=True)
class RetryPolicy:
    """Runs a node again when it fails.

    Args:
        max_attempts: how many times it runs at most, the first included.
        initial_delay: seconds before the second attempt.
        backoff_factor: by what the delay grows from attempt to attempt.
        max_delay: the longest delay, in seconds.
        retry_exceptions: retry only these: class names (``"ResourceUnavailableError"``, bases count) or exception
            classes; None retries every Exception.

    Raises:
        WorkflowError: a number is out of range.
    """

    max_attempts: int = 3
    initial_delay: float = 1.0
    backoff_factor: float = 2.0
    max_delay: float = 60.0
    retry_exceptions: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.max_attempts, int) or self.max_attempts < 1:
            raise WorkflowError(f"max_attempts is a whole number of at least 1, not {self.max_attempts!r}")
        for name, least in (("initial_delay", 0), ("max_delay", 0), ("backoff_factor", 1)):
            if not isinstance(getattr(self, name), (int, float)) or getattr(self, name) < least:
                raise WorkflowError(f"{name} is a number of at least {least}, not {getattr(self, name)!r}")
        if self.retry_exceptions is not None:
            given: Sequence[Any] = self.retry_exceptions
            if isinstance(given, str):
                raise WorkflowError(f"retry_exceptions is a list of class names, such as [{given!r}]")
            names = tuple(e.__name__ if isinstance(e, type) else str(e) for e in given)
            object.__setattr__(self, "retry_exceptions", names)

    def delay(self, attempt: int) -> float:
        """Seconds to wait after the attempt of this number (from 1) has failed."""
        try:
            return float(min(self.max_delay, self.initial_delay * self.backoff_factor ** (attempt - 1)))
        except OverflowError:
            return float(self.max_delay)

    def retries(self, error: BaseException) -> bool:
        """Whether this error is one to try again after."""
        if self.retry_exceptions is None:
            return True
        return any(c.__name__ in self.retry_exceptions for c in type(error).__mro__)


@dataclass(frozen=True)
class ErrorHandler:
    """What stands in for a node that failed for good, so that the run goes on.

    Args:
        handler_type: ``"fallback"``, the one kind there is.
        fallback_value: the node's value then; a JSON value.

    Raises:
        WorkflowError: another handler type, or a value that is not JSON.
    """

    handler_type: str = "fallback"
    fallback_value: Any = None

    def __post_init__(self) -> None:
        if self.handler_type != "fallback":
            near = did_you_mean(str(self.handler_type), ["fallback"])
            raise WorkflowError(f"no handler type {self.handler_type!r}{near}; ErrorHandler knows 'fallback'")
        try:
            object.__setattr__(self, "fallback_value", json.loads(json.dumps(self.fallback_value, allow_nan=False)))
        except (TypeError, ValueError) as error:
            raise WorkflowError(f"fallback_value is a JSON value: {error}") from None

    def value(self) -> Any:
        """The fallback's value, a copy of the caller's own."""
        return copy.deepcopy(self.fallback_value)


Policy = Timeout | RetryPolicy | ErrorHandler
_POLICIES: dict[str, type[Policy]] = {"fallback": ErrorHandler, "retry": RetryPolicy, "timeout": Timeout}


def policies(
    timeout: float | None = None, retry_policy: RetryPolicy | None = None, error_handler: ErrorHandler | None = None
) -> tuple[Policy, ...]:
    """A node's policies, outermost first: a fallback around the retries around the timeout of each attempt.

    Raises WorkflowError where one is of the wrong kind.
    """
    if retry_policy is not None and not isinstance(retry_policy, RetryPolicy):
        raise WorkflowError(f"retry_policy is a RetryPolicy, not {retry_policy!r:.80}")
    if error_handler is not None and not isinstance(error_handler, ErrorHandler):
        raise WorkflowError(f"error_handler is an ErrorHandler, not {error_handler!r:.80}")
    limit = None if timeout is None else Timeout(timeout)
    return tuple(p for p in (error_handler, retry_policy, limit) if p is not None)


def _policy_to_dict(policy: Policy) -> dict[str, Any]:
    kind = next(name for name, cls in _POLICIES.items() if type(policy) is cls)
    return {"policy": kind, **{k: list(v) if isinstance(v, tuple) else v for k, v in vars(policy).items()}}


def _policy_from_dict(data: Mapping[str, Any]) -> Policy:
    settings = dict(data)
    return _POLICIES[settings.pop("policy")](**settings)


# ---------------------------------------------------------------------------------------------------- nodes and wires


@dataclass(frozen=True)
class Wire:
    """Where one parameter of a node comes from: a node's output (None: its whole value), a parameter, a resource."""

    parameter: str
    source: Literal["node", "parameter", "resource"]
    name: str
    output: str | None = None

    def __str__(self) -> str:
        if self.source == "node":
            return f"{self.parameter} <- {self.name}{'.' + self.output if self.output else ''}"
        return f"{self.parameter}: resource" if self.source == "resource" else self.parameter

    def to_list(self) -> list[str | None]:
        """The wire as JSON."""
        return [self.parameter, self.source, self.name, self.output]


@dataclass(frozen=True)
class Node:
    """One node of a workflow: its code, where its inputs come from, what it may use, and its policies."""

    code: CompiledNode
    wires: tuple[Wire, ...] = ()
    policies: tuple[Policy, ...] = ()
    resources: tuple[str, ...] = ()
    description: str | None = None

    @property
    def name(self) -> str:
        """The node's name."""
        return self.code.name

    @property
    def upstream(self) -> tuple[str, ...]:
        """The nodes it takes inputs from, each once."""
        return tuple(dict.fromkeys(w.name for w in self.wires if w.source == "node"))

    @cached_property
    def hash(self) -> str:
        """What its result depends on beside its inputs: code, wiring and policies, as a hex digest."""
        return _digest({**self.to_dict(), "description": None})

    def __str__(self) -> str:
        """The node as one line of wiring: ``transform(users <- extract.users, limit = 100, shop_db: resource)``."""
        defaults = {p.name: p.default for p in self.code.parameters if p.default is not None}
        shown = [
            f"{w.parameter} = {defaults[w.parameter]}"
            if w.source == "parameter" and w.parameter in defaults
            else str(w)
            for w in self.wires
        ]
        wired = {w.name for w in self.wires if w.source == "resource"}
        shown += [f"{name}: resource" for name in self.resources if name not in wired]
        return f"{self.name}({', '.join(shown)})"

    def to_dict(self) -> dict[str, Any]:
        """The node as JSON."""
        return {
            "name": self.name,
            **self.code.to_dict(),
            "wires": [w.to_list() for w in self.wires],
            "policies": [_policy_to_dict(p) for p in self.policies],
            "resources": list(self.resources),
            "description": self.description,
        }


@dataclass(frozen=True)
class WorkflowParameter:
    """A parameter of a workflow: what its nodes ask for and nobody else provides."""

    name: str
    required: bool
    default: str | None
    schema: Mapping[str, Any]
    nodes: tuple[str, ...]
    hint: Any = field(default=None, compare=False)


@dataclass(frozen=True)
class Workflow:
    """A named, wired, immutable graph of nodes; a value, as JSON and back.

    Args:
        name: what it is registered and called by.
        nodes: in an order in which every node comes after those it depends on.
        description: one line for people.
    """

    name: str
    nodes: tuple[Node, ...]
    description: str | None = None

    @cached_property
    def hash(self) -> str:
        """The content hash: equal for equal definitions, in whatever order they were written; names a version."""
        data = self.to_dict()
        data["nodes"].sort(key=lambda node: node["name"])
        return _digest(data)

    @cached_property
    def by_name(self) -> Mapping[str, Node]:
        """The nodes by name."""
        return MappingProxyType({n.name: n for n in self.nodes})

    @cached_property
    def last(self) -> tuple[str, ...]:
        """The nodes that no other node takes inputs from; their outputs are a run's data."""
        used = {u for n in self.nodes for u in n.upstream}
        return tuple(n.name for n in self.nodes if n.name not in used)

    @cached_property
    def resources(self) -> tuple[str, ...]:
        """The names of all resources that its nodes may ask for."""
        return tuple(dict.fromkeys(r for n in self.nodes for r in n.resources))

    @cached_property
    def parameters(self) -> Mapping[str, WorkflowParameter]:
        """Its parameters by name; one that several nodes ask for is required where any of them requires it."""
        found: dict[str, WorkflowParameter] = {}
        for node, wire in ((n, w) for n in self.nodes for w in n.wires if w.source == "parameter"):
            asked = next(p for p in node.code.parameters if p.name == wire.parameter)
            known = found.get(wire.name)
            found[wire.name] = WorkflowParameter(
                wire.name,
                required=asked.required or (known is not None and known.required),
                default=(known.default if known else None) or asked.default,
                schema=(known.schema if known else None) or asked.schema,
                nodes=(*(known.nodes if known else ()), node.name),
                hint=known.hint if known and known.hint is not None else asked.hint,
            )
        return MappingProxyType(found)

    @property
    def schema(self) -> dict[str, Any]:
        """The JSON Schema of its parameters."""
        required = [p.name for p in self.parameters.values() if p.required]
        properties = {p.name: dict(p.schema) for p in self.parameters.values()}
        return {"type": "object", "properties": properties, "required": required, "additionalProperties": True}

    def check_parameters(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """The parameters with declared types applied (an ISO date becomes a date).

        Raises ParameterError with every missing, mistyped and misspelled one.
        """
        problems, checked = [], dict(given)
        free = [name for name in given if name not in self.parameters]
        for name, parameter in self.parameters.items():
            if name in given:
                if parameter.hint is not None:
                    try:
                        checked[name] = values.convert(given[name], parameter.hint)
                    except ValueError as error:
                        problems.append(f"parameter {name!r} does not fit: {error}")
            elif parameter.required:
                near = did_you_mean(name, free)
                problems.append(f"parameter {name!r} is missing (asked for by {listed(parameter.nodes)}){near}")
        if not any("parameters" in n.code.at_hand for n in self.nodes):
            # Nobody would ever read it, so a near miss of a known name is a typo, not a wish.
            absent = [n for n, p in self.parameters.items() if n not in given and not p.required]
            problems += [f"no parameter {n!r}{near}" for n in free if (near := did_you_mean(n, absent))]
        if problems:
            raise ParameterError(self.name, problems)
        return checked

    def wiring(self) -> str:
        """One line per node: what it is and where its inputs come from."""
        return "\n".join(map(str, self.nodes))

    def __repr__(self) -> str:
        return f"<Workflow {self.name!r} {self.hash[:8]}: {', '.join(n.name for n in self.nodes)}>"

    def to_dict(self) -> dict[str, Any]:
        """The workflow as JSON."""
        return {
            "format": 1,
            "name": self.name,
            "description": self.description,
            "nodes": [n.to_dict() for n in self.nodes],
        }

    def to_json(self) -> str:
        """The workflow as JSON text; :meth:`from_json` makes an equal one of it, on any machine."""
        return json.dumps(self.to_dict(), indent=1)

    @classmethod
    def from_json(cls, text: str) -> Workflow:
        """The workflow that :meth:`to_json` wrote; raises WorkflowDefinitionError where it is no such text."""
        try:
            data = json.loads(text)
        except ValueError as error:
            raise WorkflowDefinitionError("?", [f"this is not JSON: {error}"]) from None
        return cls.from_dict(data)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Workflow:
        """The workflow that :meth:`to_dict` wrote; raises WorkflowDefinitionError."""
        name = data.get("name", "?") if isinstance(data, Mapping) else "?"
        if not isinstance(data, Mapping) or data.get("format") != 1 or not isinstance(data.get("nodes"), list):
            raise WorkflowDefinitionError(str(name), ["this is not a workflow of format 1"])
        nodes, problems = [], []
        for item in data["nodes"]:
            try:
                nodes.append(_node_from_dict(item))
            except CompileError as error:
                problems += [f"node {item.get('name')!r}: {problem}" for problem in error.problems]
            except (KeyError, TypeError, ValueError, WorkflowError) as error:
                problems.append(f"a node's JSON is not of this format: {type(error).__name__}: {error}")
        known = {n.name for n in nodes}
        problems += [
            f"node {n.name!r} takes an input from {u!r}, which is not there"
            for n in nodes
            for u in n.upstream
            if u not in known
        ]
        if problems:
            raise WorkflowDefinitionError(str(name), problems)
        return cls(str(name), _ordered(nodes, str(name)), data.get("description"))


def _node_from_dict(data: Mapping[str, Any]) -> Node:
    wires = tuple(Wire(*w) for w in data["wires"])
    code = compiler.from_dict(data["name"], data, inputs=[w.parameter for w in wires])
    given = tuple(_policy_from_dict(p) for p in data["policies"])
    return Node(code, wires, given, tuple(data["resources"]), data.get("description"))


def _digest(data: Any) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


# ----------------------------------------------------------------------------------------------------------- assembly


@dataclass(frozen=True)
class NodeDraft:
    """A node as it was written down, before it is compiled and wired.

    Args:
        name: the node's name.
        compile: makes its code, given the names that are connected to it; raises CompileError.
        connections: parameter -> ``"node"`` or ``"node.output"``.
        policies: outermost first.
        resources: the resources it declares.
        description: one line for people.
        signature: a function's parameter names; they tell what it depends on even where it does not compile.
    """

    name: str
    compile: Callable[[Iterable[str]], CompiledNode] = field(repr=False)
    connections: Mapping[str, str] = field(default_factory=dict)
    policies: tuple[Policy, ...] = ()
    resources: tuple[str, ...] = ()
    description: str | None = None
    signature: tuple[str, ...] = ()

    @classmethod
    def block(
        cls,
        name: str,
        source: str,
        *,
        place: Place | None = None,
        namespace: Mapping[str, Any] | None = None,
        **rest: Any,
    ) -> Self:
        """A block of code; ``namespace`` gives the imports and functions it may carry along."""

        def make(inputs: Iterable[str]) -> CompiledNode:
            return compiler.compile_block(name, source, inputs=inputs, place=place, namespace=namespace)

        return cls(name, make, **rest)

    @classmethod
    def function(cls, name: str, function: Callable[..., Any], **rest: Any) -> Self:
        """A function; what it uses is captured when it is compiled."""
        signature = tuple(inspect.signature(function).parameters) if inspect.isfunction(function) else ()
        return cls(name, lambda _: compiler.compile_function(function, name=name), signature=signature, **rest)

    def asks(self) -> tuple[str, ...]:
        """The names it asks for without a connection."""
        names = self.signature
        if not names:
            with contextlib.suppress(CompileError):  # reported, with everything else, when it is assembled
                names = tuple(p.name for p in self.compile(self.connections).parameters)
        return tuple(name for name in names if name not in self.connections)


def assemble(
    name: str,
    drafts: Iterable[NodeDraft],
    *,
    known_resources: Iterable[str] = (),
    description: str | None = None,
    problems: Iterable[str] = (),
) -> Workflow:
    """Compile and wire drafts into a workflow.

    Args:
        name: the workflow's name.
        drafts: its nodes, in the order they were written.
        known_resources: names that a node's parameter may mean a resource by.
        description: one line for people.
        problems: what the caller has found wrong already, to be reported together.

    Raises:
        WorkflowDefinitionError: with every problem of every node.
    """
    drafts, found = list(drafts), list(problems)
    if not isinstance(name, str) or not NAME.fullmatch(name):
        found.append(f"a workflow's name is letters, digits, '_', '.' or '-', 64 at most, not {name!r:.80}")
    if not drafts and not found:
        found.append("it has no nodes")
    codes: dict[str, CompiledNode] = {}
    for draft in drafts:
        found += _name_problems(draft.name, codes)
        try:
            codes[draft.name] = draft.compile(draft.connections)
        except CompileError as error:
            found += [f"node {draft.name!r}: {problem}" for problem in error.problems]
    names = [d.name for d in drafts]
    resources = {*known_resources, *(r for d in drafts for r in d.resources)}
    nodes = []
    for draft in drafts:
        found += _connection_problems(draft, names, codes)
        if (code := codes.get(draft.name)) is not None:
            wires = tuple(_wires(draft, code, names, resources, found))
            asked = [w.name for w in wires if w.source == "resource"]
            uses = tuple(dict.fromkeys([*asked, *draft.resources, *code.resources]))
            nodes.append(Node(code, wires, draft.policies, uses, draft.description))
    found += _type_conflicts(nodes)
    if found:
        raise WorkflowDefinitionError(name, dict.fromkeys(found))
    return Workflow(name, _ordered(nodes, name), description)


def upstream_of(last: Iterable[str], drafts: Mapping[str, NodeDraft]) -> list[NodeDraft]:
    """The drafts of these nodes and of all that they depend on, by connection or parameter name, in the order written.

    Raises WorkflowError for a name that is not there.
    """
    wanted: set[str] = set()
    waiting = list(last)
    while waiting:
        name = waiting.pop()
        if name in wanted:
            continue
        if name not in drafts:
            raise WorkflowError(f"no node {name!r}{did_you_mean(name, drafts)} (nodes: {listed(drafts)})")
        wanted.add(name)
        draft = drafts[name]
        asked = [c.partition(".")[0] for c in draft.connections.values()]
        asked += draft.asks()
        waiting += [a for a in asked if a in drafts and a != name]
    return [draft for name, draft in drafts.items() if name in wanted]


def _name_problems(name: str, taken: Iterable[str]) -> Iterator[str]:
    if not isinstance(name, str) or not NAME.fullmatch(name) or "." in name:
        yield f"a node's name is letters, digits, '_' or '-', 64 at most, not {name!r:.80}"
    elif name in taken:
        yield f"there are two nodes called {name!r}"


def _connection_problems(draft: NodeDraft, names: Sequence[str], codes: Mapping[str, CompiledNode]) -> Iterator[str]:
    """What is wrong with a draft's explicit connections."""
    code = codes.get(draft.name)
    for parameter, source in draft.connections.items():
        origin, _, output = source.partition(".")
        if origin not in names:
            near = f"{did_you_mean(origin, names)} (nodes: {listed(names)})"
            yield f"node {draft.name!r}: input {parameter!r} comes from {origin!r}, which is no node{near}"
            continue
        outputs = codes[origin].outputs if origin in codes else None
        if output and outputs is not None and output not in (*outputs, "result"):
            near = f"{did_you_mean(output, outputs)} (outputs: {listed(outputs)})"
            yield f"node {draft.name!r}: {origin!r} has no output {output!r}{near}"
        asked = [p.name for p in code.parameters] if code else [parameter]
        if parameter not in asked:
            near = f"{did_you_mean(parameter, asked)} (parameters: {listed(asked)})"
            yield f"node {draft.name!r} has no parameter {parameter!r}{near}"


def _wires(
    draft: NodeDraft, code: CompiledNode, names: Sequence[str], resources: Iterable[str], problems: list[str]
) -> Iterator[Wire]:
    """Where each parameter of one node comes from; ambiguities go to ``problems``."""
    for parameter in code.parameters:
        name = parameter.name
        if name in draft.connections:
            origin, _, output = draft.connections[name].partition(".")
            yield Wire(name, "node", origin, output or None)
        elif name in names and name in resources and name != draft.name:
            problems.append(
                f"node {draft.name!r}: parameter {name!r} could be the node or the resource of that name; "
                f'connect it (`{name}="{name}"` in @gateway.node, or add_connection) or rename one'
            )
        elif name in names and name != draft.name:
            yield Wire(name, "node", name)
        elif name in resources:
            if not code.is_async:
                problems.append(
                    f"node {draft.name!r}: a plain `def` runs in a thread and cannot take the live resource {name!r}; "
                    "make it `async def`, or fetch in a node before it"
                )
            yield Wire(name, "resource", name)
        else:
            yield Wire(name, "parameter", name)


def _type_conflicts(nodes: Iterable[Node]) -> Iterator[str]:
    seen: dict[str, tuple[str, Any]] = {}
    for node in nodes:
        hints = {p.name: p.hint for p in node.code.parameters}
        for wire in node.wires:
            hint = hints.get(wire.parameter)
            if wire.source != "parameter" or hint is None:
                continue
            other, before = seen.setdefault(wire.name, (node.name, hint))
            if before != hint:
                types = f"{_type_name(before)} in {other!r} and {_type_name(hint)} in {node.name!r}"
                yield f"parameter {wire.name!r} is {types}; a workflow's parameter has one type"


def _type_name(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) else str(hint)


def _ordered(nodes: Iterable[Node], workflow: str) -> tuple[Node, ...]:
    """The nodes with every one after its upstream, otherwise as written; a cycle is a WorkflowDefinitionError."""
    nodes = list(nodes)
    number = {n.name: i for i, n in enumerate(nodes)}
    sorter = graphlib.TopologicalSorter({i: [number[u] for u in n.upstream] for i, n in enumerate(nodes)})
    try:
        sorter.prepare()
    except graphlib.CycleError as error:
        path = " -> ".join(nodes[i].name for i in reversed(error.args[1]))
        raise WorkflowDefinitionError(workflow, [f"its nodes depend on each other in a circle: {path}"]) from None
    ready, ordered = list(sorter.get_ready()), []
    heapq.heapify(ready)
    while ready:
        i = heapq.heappop(ready)
        ordered.append(nodes[i])
        sorter.done(i)
        for following in sorter.get_ready():
            heapq.heappush(ready, following)
    return tuple(ordered)


# ------------------------------------------------------------------------------------------------------------ builder


class AsyncWorkflowBuilder:
    """Builds a workflow node by node; every method returns the builder, and :meth:`build` reports all problems at once.

    Args:
        name: the workflow's name.
        description: one line for people.

    Lives as long as the definition takes; building twice gives two equal workflows.
    """

    def __init__(self, name: str = "workflow", *, description: str | None = None) -> None:
        self.name = name
        self.description = description
        self._drafts: list[NodeDraft] = []
        self._connections: list[tuple[str, str, str, str]] = []
        self._problems: list[str] = []

    def add_async_code(
        self,
        node_id: str,
        code: str,
        *,
        required_resources: Sequence[str] = (),
        timeout: float | None = None,
        retry_policy: RetryPolicy | None = None,
        error_handler: ErrorHandler | None = None,
        description: str | None = None,
    ) -> Self:
        """Add a block: source with top-level ``await`` whose inputs are local names and which sets ``result``.

        Args:
            node_id: the node's name.
            code: the source. At hand are ``get_resource(name)``, ``parameters``, ``context`` and ``idempotency_key``.
            required_resources: the resources it may ask for, beside those in literal ``get_resource("name")`` calls.
            timeout: seconds that one attempt may take; None is no limit.
            retry_policy: whether and when a failed attempt is followed by another.
            error_handler: what stands in for the node when it has failed for good.
            description: one line for people.
        """
        draft = NodeDraft.block(
            node_id,
            code,
            place=compiler.locate(code) if isinstance(code, str) else None,
            policies=self._policies(node_id, timeout, retry_policy, error_handler),
            resources=tuple(required_resources or ()),
            description=description,
        )
        self._drafts.append(draft)
        return self

    def add_function(
        self,
        function: Callable[..., Any],
        *,
        node_id: str | None = None,
        required_resources: Sequence[str] = (),
        timeout: float | None = None,
        retry_policy: RetryPolicy | None = None,
        error_handler: ErrorHandler | None = None,
        description: str | None = None,
    ) -> Self:
        """Add a function: its parameters say what it needs, the mapping it returns holds its outputs.

        Args are those of :meth:`add_async_code`; ``node_id`` is the function's name unless given. What the function
        uses of its module or notebook is captured by source at :meth:`build`.
        """
        name = node_id or str(getattr(function, "__name__", repr(function)))
        draft = NodeDraft.function(
            name,
            function,
            policies=self._policies(name, timeout, retry_policy, error_handler),
            resources=tuple(required_resources or ()),
            description=description,
        )
        self._drafts.append(draft)
        return self

    def add_connection(self, from_node: str, from_output: str, to_node: str, to_input: str) -> Self:
        """Give an output of one node to an input of another.

        ``from_output="result"`` means the whole value, unless the node has an output of that name.
        """
        self._connections.append((from_node, from_output, to_node, to_input))
        return self

    def build(self) -> Workflow:
        """The workflow; raises WorkflowDefinitionError with every problem of the definition."""
        problems = list(self._problems)
        names = [d.name for d in self._drafts]
        wanted: dict[str, dict[str, str]] = {name: {} for name in names}
        for from_node, from_output, to_node, to_input in self._connections:
            if to_node not in wanted:
                problems.append(
                    f"connection {from_node}.{from_output} -> {to_node}.{to_input}: no node {to_node!r}"
                    f"{did_you_mean(to_node, names)} (nodes: {listed(names)})"
                )
            elif to_input in wanted[to_node]:
                problems.append(f"input {to_input!r} of node {to_node!r} is connected twice")
            else:
                wanted[to_node][to_input] = f"{from_node}.{from_output}"
        drafts = [_connected(d, wanted[d.name]) for d in self._drafts]
        return assemble(self.name, drafts, description=self.description, problems=problems)

    def _policies(
        self, node: str, timeout: float | None, retry: RetryPolicy | None, handler: ErrorHandler | None
    ) -> tuple[Policy, ...]:
        try:
            return policies(timeout, retry, handler)
        except WorkflowError as error:
            self._problems.append(f"node {node!r}: {error}")
            return ()

    def __repr__(self) -> str:
        return f"<AsyncWorkflowBuilder {self.name!r}: {listed(d.name for d in self._drafts)}>"


def _connected(draft: NodeDraft, connections: Mapping[str, str]) -> NodeDraft:
    return replace(draft, connections=connections)
