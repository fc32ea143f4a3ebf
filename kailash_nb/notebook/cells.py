"""Magic cells that are awaited: how one is recognised, and what its body holds.

IPython has no asynchronous magics. So a cell that begins with ``%%workflow`` or ``%%node`` is rewritten, before IPython
sees it, into one awaited call with the raw cell as its text, and a line that calls one of our line magics gets an
``await``. The body is compiled under the file name that the shell has for this very cell, with the cell's own line
numbers: tracebacks, breakpoints and the source that nodes are made of are the author's.
"""

from __future__ import annotations

import ast
import inspect
import linecache
import re
import symtable
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from types import FunctionType
from typing import Any

from ..exceptions import WorkflowDefinitionError, listed

CELL_MAGICS = ("workflow", "node")
LINE_MAGICS = ("gateway", "resource", "secret")
_LINE = re.compile(rf"(?:\w+ *= *)?get_ipython\(\)\.run_line_magic\('(?:{'|'.join(LINE_MAGICS)})', ")
_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


@dataclass(frozen=True)
class Cell:
    """A cell whose magic is ours.

    Args:
        raw: the whole cell, as it was typed.
        magic: ``"workflow"`` or ``"node"``.
        line: what follows the magic on its line.
        first: the number of the body's first line in the cell, from 1.
        timed: whether ``%%time`` stood above it.
        filename: what the shell calls the cell.
    """

    raw: str
    magic: str
    line: str
    first: int
    timed: bool
    filename: str = ""

    @property
    def body(self) -> str:
        """The lines below the magic."""
        return "".join(self.raw.splitlines(keepends=True)[self.first - 1 :])


def read(raw: str, filename: str = "") -> Cell | None:
    """The cell, if it begins with one of our cell magics (after blank lines and ``%%time``), else None."""
    timed = False
    for number, text in enumerate(raw.splitlines(), 1):
        words = text.rstrip()
        if not words:
            continue
        if words == "%%time" and not timed:
            timed = True
            continue
        magic, _, line = words.removeprefix("%%").partition(" ")
        if words.startswith("%%") and magic in CELL_MAGICS and not words.endswith("?"):
            return Cell(raw, magic, line.strip(), number + 1, timed, filename)
        return None
    return None


class AwaitedCells:
    """The input transformer that turns our magic cells into an awaited call; everything else passes unchanged."""

    has_side_effects = True  # else terminal IPython takes the cell for complete after its first line

    def __call__(self, lines: list[str]) -> list[str]:
        """The cell's lines, transformed."""
        raw = "".join(lines)
        return lines if read(raw) is None else [f"await get_ipython().kailash_nb_cell({raw!r})\n"]


def awaited_lines(lines: list[str]) -> list[str]:
    """The input transformer that awaits our line magics where they stand at the start of a line."""
    return ["await ".join(_split(line)) if _LINE.match(line) else line for line in lines]


def _split(line: str) -> tuple[str, str]:
    at = line.index("get_ipython()")
    return line[:at], line[at:]


def calling_file() -> str:
    """The file name of the cell that called our caller."""
    return sys._getframe(2).f_code.co_filename


def remember(cell: Cell) -> None:
    """Have tracebacks and source look-ups show the cell as it was typed, not as it was transformed."""
    linecache.cache[cell.filename] = (len(cell.raw), None, cell.raw.splitlines(keepends=True), cell.filename)


# ------------------------------------------------------------------------------------------------------------ the body


def parse(cell: Cell, name: str) -> ast.Module:
    """The body's tree, with the cell's line numbers; raises WorkflowDefinitionError where it is no Python."""
    try:
        tree = ast.parse(cell.body, cell.filename)
    except SyntaxError as error:
        text = f": {error.text.strip()}" if error.text else ""
        line = (error.lineno or 1) + cell.first - 1
        raise WorkflowDefinitionError(name, [f"line {line}: syntax error, {error.msg}{text}"]) from None
    ast.increment_lineno(tree, cell.first - 1)
    return tree


async def execute(cell: Cell, tree: ast.Module, name: str, namespace: dict[str, Any], flags: int) -> None:
    """Run the body as an ordinary cell would be: in the user's namespace, top-level ``await`` allowed."""
    try:
        code = compile(tree, cell.filename, "exec", flags | ast.PyCF_ALLOW_TOP_LEVEL_AWAIT, dont_inherit=True)
    except SyntaxError as error:
        raise WorkflowDefinitionError(name, [f"line {error.lineno}: {error.msg}"]) from None
    found = eval(code, namespace)  # noqa: S307 - it is the user's own cell
    if inspect.iscoroutine(found):
        await found


def functions_of(cell: Cell, tree: ast.Module, namespace: dict[str, Any]) -> dict[str, FunctionType]:
    """The top-level functions that nothing else in the cell uses by name, in the order written: the nodes.

    The others are helpers, which the nodes that use them carry along.
    """
    names = dict.fromkeys(s.name for s in tree.body if isinstance(s, _FUNCTIONS))
    used = _used(symtable.symtable(cell.body, cell.filename, "exec"), names)
    found = {name: namespace.get(name) for name in names if name not in used}
    return {name: function for name, function in found.items() if isinstance(function, FunctionType)}


def decorated(tree: ast.Module) -> dict[str, str]:
    """The functions that have ``@gateway.node`` on them, and the names of their nodes."""
    found = {}
    for statement in (s for s in tree.body if isinstance(s, _FUNCTIONS)):
        for decorator in statement.decorator_list:
            target = decorator.func if isinstance(decorator, ast.Call) else decorator
            if isinstance(target, ast.Attribute) and target.attr == "node":
                words = decorator.keywords if isinstance(decorator, ast.Call) else []
                given = next((k.value for k in words if k.arg == "name"), None)
                found[statement.name] = str(given.value) if isinstance(given, ast.Constant) else statement.name
    return found


def _used(table: symtable.SymbolTable, names: Iterable[str]) -> set[str]:
    """Which of the names are read by the module's own statements, or as globals inside a function other than itself."""
    found = {s.get_name() for s in table.get_symbols() if s.is_referenced()}
    for child in table.get_children():
        found |= {name for name in _globals(child) if name != child.get_name()}
    return found.intersection(names)


def _globals(table: symtable.SymbolTable) -> set[str]:
    own = {s.get_name() for s in table.get_symbols() if s.is_global() and s.is_referenced()}
    return own.union(*(_globals(child) for child in table.get_children()))


def is_block(tree: ast.Module) -> bool:
    """Whether the body is a block (it sets ``result``, or awaits or returns at its top level), not a function."""
    return any(
        isinstance(n, (ast.Await, ast.Return, ast.AsyncFor, ast.AsyncWith))
        or (isinstance(n, ast.Name) and n.id == "result")
        for n in _own(tree.body)
    )


def _own(body: Sequence[ast.AST]) -> Iterable[ast.AST]:
    for node in body:
        yield node
        if not isinstance(node, (*_FUNCTIONS, ast.Lambda, ast.ClassDef)):
            yield from _own(list(ast.iter_child_nodes(node)))


def one_function(name: str, functions: dict[str, FunctionType]) -> FunctionType:
    """The function that a ``%%node`` cell is about: the one of the node's name, else the only one.

    Raises WorkflowDefinitionError.
    """
    if name in functions:
        return functions[name]
    if len(functions) != 1:
        held = f"this one holds {listed(functions)}" if functions else "this one holds neither"
        remedy = f"one function, or a block that sets `result`; {held}"
        raise WorkflowDefinitionError(name, [f"a %%node cell holds {remedy}"])
    return next(iter(functions.values()))
