"""``%%workflow`` and ``%%node``: cells that hold async code nodes.

Each has a plain-Python twin, named in its help, because linters do not read cell magics.
"""

from __future__ import annotations

import ast
import asyncio
import inspect
import re
import shlex
import time
from collections.abc import Awaitable, Callable, Coroutine, Generator, Sequence
from typing import Any, TypeVar

from IPython.core.error import UsageError
from IPython.core.magic import no_var_expand
from IPython.core.magic_arguments import argument, magic_arguments

from ..compiler import Place
from ..exceptions import KailashError, WorkflowDefinitionError
from ..handles import WorkflowHandle
from ..runs import Run, seconds
from ..workflow import NodeDraft
from . import cells, errors
from .cells import Cell
from .definitions import add, changed_policies, connected, define, existing
from .frontend import Notebook

F = TypeVar("F", bound=Callable[..., Any])


def arguments(*given: Any) -> Callable[[F], F]:
    """Give a magic its arguments, as IPython's ``magic_arguments`` does, and no ``{}`` or ``$`` expansion."""

    def decorate(magic: F) -> F:
        no_var_expand(magic)
        for one in reversed(given):
            one(magic)
        magic_arguments()(magic)
        return magic

    return decorate


def options(magic: Any, line: str) -> Any:
    """What a magic's line says, by the magic's arguments; raises UsageError that says where to read about them."""
    try:
        return magic.parser.parse_args(shlex.split(line))
    except (UsageError, ValueError) as error:
        name = ("%%" if magic.__name__ in cells.CELL_MAGICS else "%") + magic.__name__
        raise UsageError(f"{name}: {error}. `{name}?` shows how it is used.") from None


def pairs(texts: Sequence[str], example: str) -> dict[str, str]:
    """``name=text`` words as a mapping; raises UsageError for any other word."""
    for text in texts:
        if not text.partition("=")[0].isidentifier() or "=" not in text:
            raise UsageError(f"{text!r} is not of the form {example}")
    return {name: value for name, _, value in (text.partition("=") for text in texts)}


def literal(text: str) -> Any:
    """A word as the Python literal it reads as, else as text."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def awaited(notebook: Notebook, work: Coroutine[Any, Any, Any]) -> Any:
    """What a magic returns that was called from code: an awaitable where a loop runs, else the result itself."""
    pending = NotYetAwaited(notebook, work)
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return notebook.shell.loop_runner(pending.stoppable())
    return pending


class NotYetAwaited(Awaitable[Any]):
    """What a magic called from code returns, to be awaited; where nobody does, it says so instead of doing nothing.

    A magic is awaited by itself where it stands on a line of its own, in a cell after the one with ``%load_ext``.
    """

    def __init__(self, notebook: Notebook, work: Coroutine[Any, Any, Any]) -> None:
        self._notebook = notebook
        self._work: Coroutine[Any, Any, Any] | None = work

    def __await__(self) -> Generator[Any, None, Any]:
        return self.stoppable().__await__()

    async def stoppable(self) -> Any:
        """Do it, so that the stop button ends it at once."""
        work, self._work = self._work, None
        if work is None:
            raise RuntimeError("this magic has been awaited already")
        with self._notebook.stoppable():
            return await work

    def __repr__(self) -> str:
        return (
            "nothing was done: a magic that waits for a server stands on a line of its own, not in a loop or a "
            "function, in a cell after the one with %load_ext; run it again there"
        )

    def __del__(self) -> None:
        if self._work is not None:
            self._work.close()
            self._notebook.say(repr(self))


class CellMagics:
    """The cell magics, and the awaited call that cells are rewritten to. Lives while the extension is loaded."""

    def __init__(self, notebook: Notebook) -> None:
        self.notebook = notebook
        self.shell = notebook.shell

    def run_cell(self, raw: str) -> Awaitable[Any]:
        """Run a whole magic cell; what the input transformer makes of it awaits this."""
        cell = cells.read(raw, cells.calling_file())
        assert cell is not None
        return self._run(cell)

    @arguments(
        argument("name", help="what the workflow is called, and the variable that holds it"),
        argument("--run", nargs="*", metavar="PARAMETER=VALUE", help="run it at once with these parameters"),
        argument("-o", "--output", metavar="VAR", help="run it at once, and put the run into this variable"),
    )
    def workflow(self, line: str, cell: str) -> Any:
        """Define a workflow of the functions in this cell, and draw it.

        Each function is a node; one that others call by name is their helper. A parameter is the node of its name, or a
        resource, or a parameter of the workflow. Nothing runs without --run or -o.

        In plain Python: `@gateway.node` above each function, then `etl = gateway.workflow("etl", load)` and
        `run = await etl(limit=100)`.
        """
        return self._called("workflow", line, cell)

    @arguments(
        argument("name", help="the node's name"),
        argument(
            "--connect",
            nargs="+",
            default=[],
            metavar="PARAMETER=NODE.OUTPUT",
            help="where inputs come from that are not named like a node; `PARAMETER=` disconnects",
        ),
        argument("--timeout", type=float, metavar="SECONDS", help="how long one attempt may take; 0 is no limit"),
        argument("--retries", type=int, metavar="N", help="how often a failed attempt is tried again; 0 is never"),
    )
    def node(self, line: str, cell: str) -> Any:
        """Define one node: a function, or a block that may await and sets `result`.

        A node of this name is replaced; it keeps its connections, its timeout and its retries unless the line says
        otherwise, and the workflows that use it get a new version.

        In plain Python: `@gateway.node(users="extract.users", timeout=30)` above the function.
        """
        return self._called("node", line, cell)

    def _called(self, magic: str, line: str, body: str) -> Any:
        raw = f"%%{magic} {line}\n{body}"
        cell = cells.read(raw, self.shell.compile.cache(raw, max(1, self.shell.execution_count - 1)))
        if cell is None:
            raise UsageError(f"%%{magic} stands on one line with its arguments")
        return awaited(self.notebook, self._run(cell))

    async def _run(self, cell: Cell) -> Any:
        began = time.perf_counter()
        cells.remember(cell)
        work: dict[str, Callable[[Cell], Awaitable[Any]]] = {"workflow": self._workflow, "node": self._node}
        try:
            with self.notebook.stoppable():
                return await work[cell.magic](cell)
        except Exception as error:
            if not isinstance(error, (KailashError, UsageError)):
                errors.mark(self.shell, error)
            raise
        finally:
            if cell.timed:
                print(f"Wall time: {seconds(time.perf_counter() - began)}")

    # ------------------------------------------------------------------------------------------------------ %%workflow

    async def _workflow(self, cell: Cell) -> WorkflowHandle | Run:
        given = options(self.workflow, cell.line)
        parameters = pairs(given.run or (), "parameter=value")
        tree = cells.parse(cell, given.name)
        functions = await self._functions(cell, tree, given.name)
        if not functions:
            raise WorkflowDefinitionError(given.name, ["the cell holds no function; each `async def` in it is a node"])
        gateway = self.notebook.gateway
        named = cells.decorated(tree)
        drafts = [
            gateway.nodes[named[name]] if named.get(name) in gateway.nodes else _draft(name, function)
            for name, function in functions.items()
        ]
        handle = define(gateway, given.name, drafts)
        self.shell.user_ns[re.sub(r"\W", "_", given.name)] = handle
        if given.run is None and given.output is None:
            return handle
        run = await handle(**{name: _typed(handle, name, text) for name, text in parameters.items()})
        if given.output:
            self.shell.user_ns[given.output] = run
        return run

    async def _functions(self, cell: Cell, tree: ast.Module, name: str) -> dict[str, Any]:
        await cells.execute(cell, tree, name, self.shell.user_ns, self.shell.compile.flags)
        return cells.functions_of(cell, tree, self.shell.user_ns)

    # ---------------------------------------------------------------------------------------------------------- %%node

    async def _node(self, cell: Cell) -> None:
        given = options(self.node, cell.line)
        name, gateway = given.name, self.notebook.gateway
        changes = pairs(given.connect, "parameter=node.output")
        tree = cells.parse(cell, name)
        function = None
        if not cells.is_block(tree):
            function = cells.one_function(name, await self._functions(cell, tree, name))
        before = existing(gateway, name)  # after the cell has run: it may have decorated its function
        kept: dict[str, Any] = {
            "connections": before.connections if before else {},
            "policies": changed_policies(before.policies if before else (), given.timeout, given.retries),
            "resources": before.resources if before else (),
        }
        if function is not None:
            draft = _draft(name, function, **kept)
        else:
            place = Place(cell.filename, cell.first)
            # A name that is a node is its value, not the function that a cell may have defined it by.
            space = {n: value for n, value in self.shell.user_ns.items() if n not in gateway.nodes}
            draft = NodeDraft.block(name, cell.body, place=place, namespace=space, **kept)
        self.notebook.say(add(gateway, connected(draft, changes)))


def _draft(name: str, function: Any, **rest: Any) -> NodeDraft:
    description = (inspect.getdoc(function) or "").partition("\n")[0] or None
    return NodeDraft.function(name, function, description=description, **rest)


def _typed(handle: WorkflowHandle, name: str, text: str) -> Any:
    """A parameter's value on the magic's line: text where text is declared, else the literal it reads as."""
    parameter = handle.workflow.parameters.get(name)
    return text if parameter is not None and parameter.hint is str else literal(text)
