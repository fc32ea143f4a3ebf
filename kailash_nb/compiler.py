"""The compiler of code nodes: an author's source becomes one async or plain function, once, when it is defined.

Source is never edited as text. A block (top-level ``await``, inputs as local names, ``result = {...}``) is parsed, and
its statements become the body of an ``async def`` whose parameters are the block's inputs; a function is compiled as it
stands, without our decorator. Both keep the line numbers and, where it is known, the file name of the cell that they
were written in, so tracebacks and debuggers show the author's line; other source is registered with linecache.

Which names a node needs is not guessed from its text but read from the compiled code: the names that it loads as
globals. What is left after inputs, builtins and captured names is an error of the definition (in a function) or a
required parameter of the workflow (in a block). Names of the notebook are captured by source: imports and importable
objects as an import, plain constants as a literal, functions by their source, and what they need in turn. A live object
is refused: it would be another object in the server, in the export or after a restart.
"""

from __future__ import annotations
import __future__

import ast
import builtins
import contextlib
import dis
import hashlib
import inspect
import linecache
import sys
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from . import values
from .exceptions import did_you_mean

AT_HAND = ("get_resource", "parameters", "context", "idempotency_key")
"""Names that every node may use: a function that hands out live resources, the run's parameters, the caller's notes,
and a key that stays the same for all attempts of this node in this run."""

IMPORTED_FOR_BLOCKS = ("asyncio", "datetime", "json", "math", "random", "re", "time", "uuid")
"""Modules that a block may use without importing them."""

MISSING: Any = type("Missing", (), {"__repr__": lambda _: "<result was not set>", "__slots__": ()})()
"""What a block returns that ended without setting ``result``."""

_CONSTANTS = (bool, int, float, complex, str, bytes, type(None))
_LOADS = frozenset({"LOAD_GLOBAL", "LOAD_NAME", "LOAD_FROM_DICT_OR_GLOBALS"})
_FLAGS = __future__.annotations.compiler_flag
_BUILTINS = frozenset(dir(builtins)) - {"display", "get_ipython"}  # those that IPython adds are not everywhere
_LARGEST_CONSTANT = 64 * 1024


class CompileError(Exception):
    """What is wrong with one node's source, each problem with its line and remedy."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("; ".join(problems))
        self.problems = problems


@dataclass(frozen=True)
class Place:
    """Where a source's first line stands; no part of what the source means."""

    filename: str
    line: int = 1


@dataclass(frozen=True)
class Captured:
    """A name of the notebook that a node carries along, as source."""

    name: str
    source: str
    place: Place | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Parameter:
    """A name that a node asks for. ``default`` is the default's source text, ``schema`` the JSON Schema of its type."""

    name: str
    required: bool = True
    default: str | None = None
    hint: Any = field(default=None, compare=False)
    schema: Mapping[str, Any] = field(default_factory=dict, compare=False)


@dataclass(frozen=True)
class CompiledNode:
    """A node's code: self-contained source and the function made of it. A value, as long-lived as its workflow.

    Args:
        name: the node's name.
        kind: ``"block"`` or ``"function"``.
        source: the author's text, unchanged.
        captured: what it carries along from the notebook, in the order it must be defined.
        parameters: what it asks for, beside the names at hand.
        at_hand: which of :data:`AT_HAND` it uses.
        resources: the resources it asks for by literal ``get_resource("name")`` calls.
        outputs: the names of its outputs where they can be read from the source, else None.
        is_async: whether it runs on the event loop; a plain function runs in a thread.
        files: the file names that its frames carry in a traceback.
        function: takes the parameters and the names at hand as keywords.
    """

    name: str
    kind: Literal["block", "function"]
    source: str
    captured: tuple[Captured, ...]
    parameters: tuple[Parameter, ...]
    at_hand: tuple[str, ...]
    resources: tuple[str, ...]
    outputs: tuple[str, ...] | None
    is_async: bool
    files: frozenset[str] = field(compare=False)
    function: Callable[..., Any] = field(compare=False, repr=False)

    def to_dict(self) -> dict[str, Any]:
        """The code as JSON: what :func:`from_dict` needs to make it again anywhere."""
        return {
            "kind": self.kind,
            "source": self.source,
            "captured": [{"name": c.name, "source": c.source} for c in self.captured],
        }


# ---------------------------------------------------------------------------------------------------------- the doors


def compile_block(
    name: str,
    source: str,
    *,
    inputs: Iterable[str] = (),
    place: Place | None = None,
    namespace: Mapping[str, Any] | None = None,
    captured: Iterable[Captured] = (),
) -> CompiledNode:
    """Compile a block: statements with top-level ``await`` that set ``result``.

    Args:
        name: the node's name.
        source: the statements; may be indented as a whole.
        inputs: names that are connected to it or declared, so that they win over builtins.
        place: where the source was written; without it, it gets a name of its own in linecache.
        namespace: the notebook's names, from which imports and functions (not values) are captured.
        captured: what it carries along, when it comes from JSON.

    Raises:
        CompileError: with every problem of this source.
    """
    place, tree = _parse(name, source, place)
    problems = list(_refused(tree, block=True))
    outputs, ends_with_result = _block_outputs(tree)
    if not ends_with_result:
        problems.append("it never sets `result`; end it with `result = {...}`, the node's outputs by name")
    _raise(problems)

    carried = tuple(captured)
    inputs = set(inputs)
    draft = _code_of(_wrapped(name, tree, {"result": None, **dict.fromkeys(sorted(inputs))}), place.filename, name)
    loaded = {n: line for n, line in _globals_of(draft).items() if not n.startswith("__")}
    bound = _locals_of(draft)
    loaded |= {n: line for n, line in _read_before_bound(tree).items() if n in bound and n not in loaded}
    hidden = [n for n in loaded if n in bound and n in _BUILTINS and n not in inputs]
    _raise([f"line {loaded[n]}: {n!r} is read before it is set, and hides a builtin; rename it" for n in hidden])
    at_hand = tuple(n for n in AT_HAND if n in loaded and n not in inputs)
    known = {c.name for c in carried}
    wanted = [n for n in loaded if n not in inputs and n not in at_hand and n not in known and n not in _BUILTINS]
    for found in _captured_for_block(wanted, namespace or {}):
        carried = (*carried, *(c for c in found if c.name not in known))
        known |= {c.name for c in found}
    needed = [n for n in wanted if n not in known]
    parameters = tuple(Parameter(n) for n in sorted(inputs.union(needed)))
    keywords = [*(p.name for p in parameters), *at_hand] + ["result"] * ("result" not in inputs)
    function, files = _define(_wrapped(name, tree, keywords), name, place, carried)
    if "result" not in inputs:
        function.__kwdefaults__ = {"result": MISSING}
    return CompiledNode(
        name, "block", source, carried, parameters, at_hand, _literal_resources(tree), outputs, True, files, function
    )


def compile_function(
    function: Callable[..., Any], *, name: str | None = None, namespace: Mapping[str, Any] | None = None
) -> CompiledNode:
    """Compile a function of the notebook into a self-contained node, capturing what its body uses.

    Args:
        function: an ``async def`` or ``def``.
        name: the node's name; the function's own by default.
        namespace: where its global names are looked up; the function's own globals by default.

    Raises:
        CompileError: with every problem of this function.
    """
    name = name or function.__name__
    source, place = _source_of(function)
    look_up = {**(namespace if namespace is not None else function.__globals__), **_closure_of(function)}
    return _compile_function(name, source, place, (), look_up)


def compile_source(name: str, source: str, captured: Iterable[Captured] = ()) -> CompiledNode:
    """Compile a function from its source and what it carries along, as it comes from JSON; raises CompileError."""
    return _compile_function(name, source, None, tuple(captured), None)


def from_dict(name: str, data: Mapping[str, Any], inputs: Iterable[str] = ()) -> CompiledNode:
    """The code that :meth:`CompiledNode.to_dict` wrote; raises CompileError."""
    captured = tuple(Captured(c["name"], c["source"]) for c in data.get("captured", ()))
    if data["kind"] == "block":
        return compile_block(name, data["source"], inputs=inputs, captured=captured)
    return compile_source(name, data["source"], captured)


def locate(source: str, depth: int = 2) -> Place | None:
    """Where a source string stands in the file or cell of the caller ``depth`` frames up, if it is there once."""
    frame = sys._getframe(depth)
    text = "".join(linecache.getlines(frame.f_code.co_filename, frame.f_globals))
    if not source.strip() or text.count(source) != 1:
        return None
    return Place(frame.f_code.co_filename, text[: text.index(source)].count("\n") + 1)


# --------------------------------------------------------------------------------------------------------- functions


def _compile_function(
    name: str, source: str, place: Place | None, captured: tuple[Captured, ...], look_up: Mapping[str, Any] | None
) -> CompiledNode:
    place, tree = _parse(name, source, place)
    definition = next((s for s in tree.body if isinstance(s, (ast.FunctionDef, ast.AsyncFunctionDef))), None)
    if definition is None or len(tree.body) != 1:
        raise CompileError(["a function node is one `async def` or `def`"])
    tree.body = [_undecorated(definition)]
    problems = list(_refused(definition))
    problems += _argument_problems(definition)
    _raise(problems)

    own = {a.arg for a in _arguments(definition)}
    loaded = _globals_of(_code_of(tree, place.filename, name))
    at_hand = tuple(n for n in AT_HAND if n in loaded or n in own)
    # Names at hand that the body uses without asking for them become parameters of the compiled function.
    definition.args.kwonlyargs += [_argument(n, definition) for n in at_hand if n not in own]
    definition.args.kw_defaults += [None for n in at_hand if n not in own]
    is_async = isinstance(definition, ast.AsyncFunctionDef)
    if not is_async and "get_resource" in at_hand:
        problems.append("a plain `def` cannot use a live resource; make it `async def`, or fetch in a node before it")

    capture = _Capture(captured, look_up)
    wanted = {n: line for n, line in loaded.items() if n not in AT_HAND and n != definition.name}
    problems += capture.all(wanted, known=own)
    capture.quietly(_annotation_names(definition))
    _raise(problems)
    function, files = _define(tree, definition.name, place, capture.found)
    parameters = tuple(_parameter(a, default, function) for a, default in _defaults(definition) if a.arg not in AT_HAND)
    return CompiledNode(
        name,
        "function",
        source,
        capture.found,
        parameters,
        at_hand,
        _literal_resources(tree),
        _function_outputs(definition),
        is_async,
        files,
        function,
    )


def _undecorated(definition: ast.FunctionDef | ast.AsyncFunctionDef) -> ast.FunctionDef | ast.AsyncFunctionDef:
    others = [d for d in definition.decorator_list if not _is_ours(d)]
    if others:
        text = ast.unparse(others[0])
        raise CompileError(
            [f"line {others[0].lineno}: a node takes no decorator but ours; call {text!r} inside the node"]
        )
    definition.decorator_list = []
    return definition


def _is_ours(decorator: ast.expr) -> bool:
    target = decorator.func if isinstance(decorator, ast.Call) else decorator
    return isinstance(target, ast.Attribute) and target.attr == "node"


def _argument_problems(definition: ast.FunctionDef | ast.AsyncFunctionDef) -> Iterator[str]:
    for star, argument in (("*", definition.args.vararg), ("**", definition.args.kwarg)):
        if argument is not None:
            yield (
                f"line {definition.lineno}: {star}{argument.arg} names nothing to connect; "
                "write each input as a parameter, or use `parameters`"
            )
    if definition.args.posonlyargs:
        yield f"line {definition.lineno}: positional-only parameters cannot be connected by name; remove the `/`"


def _arguments(definition: ast.FunctionDef | ast.AsyncFunctionDef) -> list[ast.arg]:
    return [*definition.args.posonlyargs, *definition.args.args, *definition.args.kwonlyargs]


def _defaults(definition: ast.FunctionDef | ast.AsyncFunctionDef) -> Iterator[tuple[ast.arg, ast.expr | None]]:
    positional = definition.args.args
    first = len(positional) - len(definition.args.defaults)
    for index, argument in enumerate(positional):
        yield argument, definition.args.defaults[index - first] if index >= first else None
    yield from zip(definition.args.kwonlyargs, definition.args.kw_defaults, strict=True)


def _parameter(argument: ast.arg, default: ast.expr | None, function: Callable[..., Any]) -> Parameter:
    hint = _hint(argument, function)
    return Parameter(
        argument.arg,
        required=default is None,
        default=None if default is None else ast.unparse(default),
        hint=hint,
        schema={} if hint is None else values.schema(hint),
    )


def _hint(argument: ast.arg, function: Callable[..., Any]) -> Any:
    """The parameter's type, if its annotation can be evaluated with what the node carries along."""
    if argument.annotation is None:
        return None
    try:
        reference = typing.ForwardRef(ast.unparse(argument.annotation))
        return typing.get_type_hints(types.SimpleNamespace(__annotations__={"it": reference}), function.__globals__)[
            "it"
        ]
    except Exception:
        return None  # an annotation is a remark; whatever is wrong with it does not stop the node


def _annotation_names(definition: ast.FunctionDef | ast.AsyncFunctionDef) -> set[str]:
    found: set[str] = set()
    for annotation in (a.annotation for a in _arguments(definition) if a.annotation is not None):
        text = annotation.value if isinstance(annotation, ast.Constant) else ast.unparse(annotation)
        with contextlib.suppress(SyntaxError):  # a string that is no annotation
            found |= {n.id for n in ast.walk(ast.parse(str(text), mode="eval")) if isinstance(n, ast.Name)}
    return found - _BUILTINS


def _function_outputs(definition: ast.FunctionDef | ast.AsyncFunctionDef) -> tuple[str, ...] | None:
    returns = [n for n in _own_nodes(definition.body) if isinstance(n, ast.Return)]
    return _dict_keys([r.value for r in returns])


def _source_of(function: Callable[..., Any]) -> tuple[str, Place]:
    if not isinstance(function, types.FunctionType):
        raise CompileError([f"a node is a function or a block of code, not {type(function).__name__} {function!r:.60}"])
    if function.__name__ == "<lambda>":
        raise CompileError(["a lambda has no source of its own; write it as a `def`"])
    try:
        lines, first = inspect.getsourcelines(function)
    except (OSError, TypeError):
        raise CompileError(
            [f"the source of {function.__name__!r} is not at hand; define it in a cell or a file"]
        ) from None
    return "".join(lines), Place(function.__code__.co_filename, first)


def _closure_of(function: Callable[..., Any]) -> dict[str, Any]:
    cells = getattr(function, "__closure__", None) or ()
    found = {}
    for variable, cell in zip(function.__code__.co_freevars, cells, strict=True):
        try:
            found[variable] = cell.cell_contents
        except ValueError:  # not assigned yet; reported as an unknown name if the body uses it
            continue
    return found


# ----------------------------------------------------------------------------------------------------------- capture


class _Capture:
    """Collects what a node carries along, dependencies first; lives for one compilation."""

    def __init__(self, captured: Iterable[Captured], look_up: Mapping[str, Any] | None) -> None:
        self._found = {c.name: c for c in captured}
        self._look_up = look_up or {}
        self._under_way: set[str] = set()
        self._meant: dict[str, Any] = {}

    @property
    def found(self) -> tuple[Captured, ...]:
        return tuple(self._found.values())

    def all(self, wanted: Mapping[str, int], known: Iterable[str]) -> Iterator[str]:
        """Capture every wanted name; yields a problem for each that cannot be."""
        for name, line in wanted.items():
            value = self._look_up.get(name)
            if name in self._look_up and self._meant.setdefault(name, value) is not value:
                yield f"line {line}: {name!r} means two different things in what it carries along; rename one"
            if name in self._found or name in self._under_way or name.startswith("__"):
                continue
            if name not in self._look_up:
                if name not in _BUILTINS:
                    near = did_you_mean(name, [*known, *self._look_up, *AT_HAND])
                    yield f"line {line}: name {name!r} is not defined{near}"
                continue
            yield from self._one(name, self._look_up[name], line)

    def quietly(self, names: Iterable[str]) -> None:
        """Capture those of the names that are importable; the others are nobody's concern."""
        for name in names:
            source = _import_of(name, self._look_up.get(name))
            if source is not None and name not in self._found:
                self._found[name] = Captured(name, source)

    def _one(self, name: str, value: Any, line: int) -> Iterator[str]:
        source = _import_of(name, value) or _literal_of(name, value)
        if source is not None:
            self._found[name] = Captured(name, source)
        elif isinstance(inspect.unwrap(value), types.FunctionType):
            yield from self._function(name, value, line)
        else:
            yield (
                f"line {line}: {name!r} is a live {_kind(value)} of the notebook, which a server would not have; "
                f"make it a parameter or a resource, or create it inside the node"
            )

    def _function(self, name: str, function: types.FunctionType, line: int) -> Iterator[str]:
        function = inspect.unwrap(function)
        try:
            source, place = _source_of(function)
            _, tree = _parse(name, source, place)
        except CompileError as error:
            yield f"line {line}: {name!r} cannot be carried along: {error}"
            return
        definition = tree.body[0]
        if isinstance(definition, (ast.FunctionDef, ast.AsyncFunctionDef)):
            definition.decorator_list = [d for d in definition.decorator_list if not _is_ours(d)]
            definition.name = name
        self._under_way.add(name)
        inner = _Capture((), {**function.__globals__, **_closure_of(function)})
        inner._found, inner._under_way, inner._meant = self._found, self._under_way, self._meant
        needs = _globals_of(_code_of(tree, place.filename, name))
        yield from (f"{name}() {problem}" for problem in inner.all(needs, ()))
        self._found[name] = Captured(name, source, place)


def _captured_for_block(names: Iterable[str], namespace: Mapping[str, Any]) -> Iterator[tuple[Captured, ...]]:
    """What a block carries along: the notebook's imports and functions; then the modules that are imported for it.

    Values of the notebook are not captured: in a block a name that is left over is a parameter.
    """
    for name in names:
        value = namespace.get(name)
        importable = _import_of(name, value) if name in namespace else None
        if importable is not None:
            yield (Captured(name, importable),)
        elif isinstance(value, types.FunctionType):
            capture = _Capture((), namespace)
            problems = list(capture.all({name: 1}, ()))
            _raise(problems)
            yield capture.found
        elif name in IMPORTED_FOR_BLOCKS:
            yield (Captured(name, f"import {name}"),)


def _import_of(name: str, value: Any) -> str | None:
    """The import statement that makes ``name`` mean ``value`` anywhere, or None."""
    if isinstance(value, types.ModuleType):
        return None if value.__name__ == "__main__" else f"import {value.__name__}" + _as(value.__name__, name)
    module, qualname = getattr(value, "__module__", None), getattr(value, "__qualname__", None)
    if not isinstance(module, str) or not isinstance(qualname, str) or module == "__main__" or "." in qualname:
        return None
    if getattr(sys.modules.get(module), qualname, None) is not value:
        return None
    return f"from {module} import {qualname}" + _as(qualname, name)


def _as(original: str, name: str) -> str:
    return "" if original == name else f" as {name}"


def _literal_of(name: str, value: Any) -> str | None:
    """``name = literal`` for a plain constant or a small container of them, or None."""
    try:
        text = _spelled(value) if _is_constant(value) else None
        if text is None or len(text) > _LARGEST_CONSTANT or ast.literal_eval(text) != value:
            return None
    except (ValueError, SyntaxError, RecursionError):
        return None
    return f"{name} = {text}"


def _spelled(value: Any) -> str:
    """A constant as source; a set always in the same order, because the text is part of a workflow's hash."""
    if type(value) is dict:
        return "{" + ", ".join(f"{_spelled(k)}: {_spelled(v)}" for k, v in value.items()) + "}"
    if type(value) is set:
        return "{" + ", ".join(sorted(map(_spelled, value))) + "}"
    if type(value) is list:
        return "[" + ", ".join(map(_spelled, value)) + "]"
    return repr(value)


def _is_constant(value: Any) -> bool:
    if type(value) in _CONSTANTS:
        return True
    if type(value) in (list, tuple, set):
        return bool(value or type(value) is not set) and all(map(_is_constant, value))
    return type(value) is dict and all(_is_constant(k) and _is_constant(v) for k, v in value.items())


def _kind(value: Any) -> str:
    return f"class {value.__name__}" if isinstance(value, type) else type(value).__qualname__


# ---------------------------------------------------------------------------------------------------------- the tree


def _parse(name: str, source: str, place: Place | None) -> tuple[Place, ast.Module]:
    """Parse without touching the text: an indented source is parsed inside an ``if``, and its lines counted back."""
    if not isinstance(source, str) or not source.strip():
        raise CompileError(["its code is empty"])
    if place is None:
        digest = hashlib.sha256(source.encode()).hexdigest()[:8]
        place = Place(f"<node {name} {digest}>")
        linecache.cache[place.filename] = (len(source), None, source.splitlines(keepends=True), place.filename)
    indented = next(line for line in source.splitlines() if line.strip())[:1].isspace()
    try:
        tree = ast.parse("if 1:\n" + source if indented else source, place.filename)
    except SyntaxError as error:
        line = (error.lineno or 1) - indented
        text = (error.text or "").strip()
        raise CompileError([f"line {line}: syntax error, {error.msg}" + (f": {text}" if text else "")]) from None
    if indented:
        block = tree.body[0]
        assert isinstance(block, ast.If)
        if len(tree.body) > 1 or block.orelse:
            at = (block.orelse or tree.body[1:])[0].lineno - 1
            raise CompileError([f"line {at}: it is indented less than the first line"])
        tree.body = block.body
    ast.increment_lineno(tree, place.line - 1 - indented)
    return place, tree


def _refused(tree: ast.AST, *, block: bool = False) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Global):
            names = ", ".join(node.names)
            yield f"line {node.lineno}: `global {names}` would be shared by all runs; return the value instead"
        elif isinstance(node, ast.ImportFrom) and any(a.name == "*" for a in node.names):
            yield f"line {node.lineno}: `from {node.module} import *` hides which names are meant; name them"
    body = tree.body if isinstance(tree, (ast.Module, ast.FunctionDef, ast.AsyncFunctionDef)) else []
    for node in _own_nodes(body):
        if isinstance(node, (ast.Yield, ast.YieldFrom)):
            yield f"line {node.lineno}: a node returns once; collect what it yields in a list and return that"
        elif block and isinstance(node, ast.Nonlocal):
            yield f"line {node.lineno}: `nonlocal` has no meaning at a block's top level"


def _own_nodes(body: Iterable[ast.AST]) -> Iterator[ast.AST]:
    """All nodes below the statements, but not those inside nested functions, lambdas or classes."""
    for node in body:
        yield node
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda, ast.ClassDef)):
            yield from _own_nodes(ast.iter_child_nodes(node))


def _wrapped(name: str, tree: ast.Module, keywords: Iterable[str]) -> ast.Module:
    """The block's statements as the body of ``async def name(*, keywords): ...; return result``."""
    last = tree.body[-1]
    end = ast.Return(ast.Name("result", ast.Load()))
    arguments = [ast.arg(k) for k in keywords]
    definition = ast.AsyncFunctionDef(
        name=_identifier(name),
        args=ast.arguments([], [], None, arguments, [None for _ in arguments], None, []),
        body=[*tree.body, end],
        decorator_list=[],
    )
    if sys.version_info >= (3, 12):
        definition.type_params = []
    ast.copy_location(definition, tree.body[0])
    ast.copy_location(end, last)
    end.lineno = end.end_lineno = last.end_lineno or last.lineno
    end.col_offset = end.end_col_offset = last.end_col_offset or 0
    return ast.fix_missing_locations(ast.Module([definition], []))


def _argument(name: str, at: ast.AST) -> ast.arg:
    return ast.copy_location(ast.arg(name), at)


def _identifier(name: str) -> str:
    """What a block's function is called in tracebacks: nothing that a name in its code could mean."""
    return f"node {name}"


def _code_of(tree: ast.Module, filename: str, name: str) -> types.CodeType:
    try:
        code: types.CodeType = compile(ast.fix_missing_locations(tree), filename, "exec", _FLAGS, dont_inherit=True)
        return code
    except SyntaxError as error:
        hint = "; make it `async def`" if "'await' outside async function" in str(error.msg) else ""
        raise CompileError([f"line {error.lineno}: {error.msg}{hint}"]) from None
    except (ValueError, RecursionError) as error:
        raise CompileError([f"{name!r} cannot be compiled: {error}"]) from None


def _define(
    tree: ast.Module, name: str, place: Place, captured: Iterable[Captured]
) -> tuple[types.FunctionType, frozenset[str]]:
    """Make the function in a fresh module namespace that holds what it carries along."""
    namespace: dict[str, Any] = {"__name__": "__main__", "__builtins__": builtins}
    definition = tree.body[0]
    assert isinstance(definition, (ast.FunctionDef, ast.AsyncFunctionDef))
    files = {place.filename}
    for item in captured:
        try:
            where, carried = _parse(item.name, item.source, item.place)
            for statement in carried.body:
                if isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef)):
                    statement.decorator_list = [d for d in statement.decorator_list if not _is_ours(d)]
                    statement.name = item.name
            exec(_code_of(carried, where.filename, item.name), namespace)
        except Exception as error:
            raise CompileError(
                [f"{item.name!r}, which it carries along, fails: {type(error).__name__}: {error}"]
            ) from None
        statement = carried.body[0]
        if isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef)):
            files.add(where.filename)
    try:
        exec(_code_of(tree, place.filename, name), namespace)
    except CompileError:
        raise
    except Exception as error:  # a default value that fails
        raise CompileError([f"defining it fails: {type(error).__name__}: {error}"]) from None
    function = namespace[definition.name]
    assert isinstance(function, types.FunctionType)
    return function, frozenset(files)


# --------------------------------------------------------------------------------------------------- reading the code


def _locals_of(module: types.CodeType) -> set[str]:
    """The names that the block itself binds."""
    code = next(c for c in module.co_consts if isinstance(c, types.CodeType))
    return {*code.co_varnames, *code.co_cellvars}


def _globals_of(code: types.CodeType) -> dict[str, int]:
    """The global names that compiled code loads, nested functions included, each with its first line."""
    stored: set[str] = {i.argval for i in dis.get_instructions(code) if i.opname == "STORE_NAME"}
    found: dict[str, int] = {}
    for instruction in dis.get_instructions(code):
        if instruction.opname in _LOADS and instruction.argval not in stored:
            line = instruction.positions.lineno if instruction.positions else None
            found.setdefault(instruction.argval, line or code.co_firstlineno)
    # What a module binds, its functions see; what a class body binds, its methods do not.
    visible = stored if code.co_name == "<module>" else set()
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            for name, line in _globals_of(constant).items():
                if name not in visible:
                    found.setdefault(name, line)
    return found


def _read_before_bound(tree: ast.Module) -> dict[str, int]:
    """Names that the block binds itself but reads first, as in ``limit = int(limit)``: they come from outside."""
    order = _Order()
    for statement in tree.body:
        order.visit(statement)
    return order.read_first


class _Order(ast.NodeVisitor):
    """Visits a block's own names in the order they are evaluated; branches count as taken."""

    def __init__(self) -> None:
        self.bound: set[str] = set()
        self.read_first: dict[str, int] = {}

    def visit_Name(self, node: ast.Name) -> None:
        if isinstance(node.ctx, ast.Load):
            if node.id not in self.bound:
                self.read_first.setdefault(node.id, node.lineno)
        else:
            self.bound.add(node.id)

    def visit_Assign(self, node: ast.Assign) -> None:
        self._visit(node.value, *node.targets)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        if node.value is not None:
            self._visit(node.value, node.target)

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        if isinstance(node.target, ast.Name):
            self.visit_Name(ast.copy_location(ast.Name(node.target.id, ast.Load()), node.target))
        self._visit(node.value, node.target)

    def visit_For(self, node: ast.For | ast.AsyncFor) -> None:
        self._visit(node.iter, node.target, *node.body, *node.orelse)

    visit_AsyncFor = visit_For

    def visit_NamedExpr(self, node: ast.NamedExpr) -> None:
        self._visit(node.value, node.target)

    def visit_Import(self, node: ast.Import | ast.ImportFrom) -> None:
        self.bound.update((a.asname or a.name).split(".")[0] for a in node.names)

    visit_ImportFrom = visit_Import

    def visit_ExceptHandler(self, node: ast.ExceptHandler) -> None:
        self.bound.update([node.name] if node.name else [])
        self.generic_visit(node)

    def visit_MatchAs(self, node: ast.MatchAs | ast.MatchStar) -> None:
        self.bound.update([node.name] if node.name else [])
        self.generic_visit(node)

    visit_MatchStar = visit_MatchAs

    def visit_MatchMapping(self, node: ast.MatchMapping) -> None:
        self.generic_visit(node)
        self.bound.update([node.rest] if node.rest else [])

    def visit_FunctionDef(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        self._visit(*node.decorator_list, *node.args.defaults, *filter(None, node.args.kw_defaults))
        self.bound.add(node.name)

    visit_AsyncFunctionDef = visit_FunctionDef

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        self._visit(*node.decorator_list, *node.bases, *node.keywords)
        self._within(*node.body)
        self.bound.add(node.name)

    def visit_Lambda(self, node: ast.Lambda) -> None:
        """A lambda's body reads when it is called; its defaults are read at once."""
        self._visit(*node.args.defaults, *filter(None, node.args.kw_defaults))

    def visit_ListComp(self, node: ast.ListComp | ast.SetComp | ast.GeneratorExp) -> None:
        self._comprehension(node, node.elt)

    visit_SetComp = visit_ListComp
    visit_GeneratorExp = visit_ListComp

    def visit_DictComp(self, node: ast.DictComp) -> None:
        self._comprehension(node, node.key, node.value)

    def _comprehension(
        self, node: ast.ListComp | ast.SetComp | ast.GeneratorExp | ast.DictComp, *elements: ast.expr
    ) -> None:
        parts = [p for g in node.generators for p in (g.iter, g.target, *g.ifs)]
        self._within(*parts, *elements)
        walrus = [n.target for n in ast.walk(node) if isinstance(n, ast.NamedExpr)]
        self._visit(*walrus)  # these are bound in the block itself

    def _within(self, *nodes: ast.AST) -> None:
        """Visit what has a scope of its own: what it binds is not bound outside."""
        before = self.bound.copy()
        self._visit(*nodes)
        self.bound = before

    def _visit(self, *nodes: ast.AST) -> None:
        for node in nodes:
            self.visit(node)


def _block_outputs(tree: ast.Module) -> tuple[tuple[str, ...] | None, bool]:
    """The block's output names, if its source tells them, and whether it sets ``result`` at all."""
    own = list(_own_nodes(tree.body))
    returned = [n.value for n in own if isinstance(n, ast.Return)]
    assigned = [
        (n.targets[0] if isinstance(n, ast.Assign) and len(n.targets) == 1 else getattr(n, "target", None), n.value)
        for n in own
        if isinstance(n, (ast.Assign, ast.AnnAssign))
    ]
    set_to = [value for target, value in assigned if isinstance(target, ast.Name) and target.id == "result"]
    uses = [n for n in ast.walk(tree) if isinstance(n, ast.Name) and n.id == "result"]
    stored = any(isinstance(n.ctx, ast.Store) for n in uses)
    # Any other use of the name (result["x"] = ..., result.update(...)) may add outputs, so nothing is certain.
    certain = len(uses) == len(set_to)
    return (_dict_keys([*set_to, *returned]) if certain else None), stored or bool(returned)


def _dict_keys(expressions: Iterable[ast.expr | None]) -> tuple[str, ...] | None:
    """The keys that all of the expressions, dict displays with constant keys, have between them; else None."""
    keys: dict[str, None] = {}
    for expression in expressions:
        if not isinstance(expression, ast.Dict):
            return None
        for key in expression.keys:
            if not isinstance(key, ast.Constant) or not isinstance(key.value, str):
                return None
            keys[key.value] = None
    return tuple(keys) or None


def _literal_resources(tree: ast.AST) -> tuple[str, ...]:
    """The names in literal ``get_resource("name")`` calls."""
    calls = [n for n in ast.walk(tree) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)]
    asked = [c.args[0] for c in calls if isinstance(c.func, ast.Name) and c.func.id == "get_resource" and c.args]
    return tuple(dict.fromkeys(a.value for a in asked if isinstance(a, ast.Constant) and isinstance(a.value, str)))


def _raise(problems: list[str]) -> None:
    if problems:
        raise CompileError(problems)
