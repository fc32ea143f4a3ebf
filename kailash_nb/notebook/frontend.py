"""The notebook as the gateway's front end: one IPython shell, its cells, and what is put in front of the user."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

from IPython.display import display

from .. import gateway as gateways
from .. import handles
from ..exceptions import NodeError
from ..gateway import Gateway
from ..handles import Debug, PendingRun
from ..runs import Run
from . import errors
from .display import hidden
from .loop import Foreground, Interrupted
from .progress import Progress, Publish


class Notebook:
    """What a person's shell does for every gateway of the process. Lives while the extension is loaded.

    Args:
        shell: the IPython shell.
    """

    def __init__(self, shell: Any) -> None:
        self.shell = shell
        self._cells = Foreground(shell)
        self._shown: list[Progress] = []

    def start(self) -> None:
        """Begin to serve the gateways of this process, and make one if there is none."""
        handles.set_frontend(self)
        errors.install(self.shell)
        self._cells.start()
        self.shell.events.register("post_run_cell", self._cell_done)
        if gateways.current() is None:
            self._make_gateway()

    def stop(self) -> None:
        """Serve them no longer."""
        self.shell.events.unregister("post_run_cell", self._cell_done)
        self._cells.stop()
        errors.uninstall()
        if handles.frontend is self:
            handles.set_frontend(None)

    @property
    def gateway(self) -> Gateway:
        """What magics use: the gateway made, or chosen with ``%gateway use``, last; a new one if none is left."""
        return gateways.current() or self._make_gateway()

    def _make_gateway(self) -> Gateway:
        made = Gateway()
        where = "`gateway` is a new gateway"
        if self.shell.user_ns.get("gateway") is None:
            self.shell.user_ns["gateway"] = made
        else:
            where = "there is a new gateway (the name `gateway` is in use: `from kailash_nb.gateway import current`)"
        self.say(f"{where}. Next: a cell that begins with %%workflow NAME, or %resource NAME URL; %gateway tells more.")
        return made

    # ------------------------------------------------------------------------------------------- what gateways ask for

    def say(self, text: str) -> None:
        """Show one line to the user."""
        print(text)

    def place(self, filename: str) -> str | None:
        """``"cell [4]"`` for the file name of a cell of this shell, None for any other."""
        found = self.shell.compile.format_code_name(filename)
        number = re.fullmatch(r"In\[(\d+)\]", found[1]) if found else None
        return f"cell [{number[1]}]" if number else None

    def debug(self, session: Debug) -> None:
        """Make a failed node's inputs variables, and its source the next cell."""
        kept = [old for name, value in session.inputs.items() if (old := self._bind(name, value))]
        self.shell.set_next_input(f"%%node {session.node.name}\n{session.source}")
        before = f" (what they were before: {', '.join(kept)})" if kept else ""
        variables = f"variables: {', '.join(session.inputs)}{before}; " if session.inputs else ""
        self.say(f"{variables}the next cell holds the source of {session.node.name!r}")

    def _bind(self, name: str, value: Any) -> str | None:
        """Put a value into the user's namespace; returns the name under which the one it replaces is kept, if any."""
        space = self.shell.user_ns
        if name not in space or _same(space[name], value):
            space[name] = value
            return None
        kept = next(n for i in range(len(space) + 1) if (n := f"{name}_before{i + 1 if i else ''}") not in space)
        space[kept], space[name] = space[name], value
        return kept

    def stoppable(self) -> AbstractContextManager[None]:
        """Around whatever else a cell awaits: the stop button ends it at once."""
        return self._cells.guard()

    @contextlib.contextmanager
    def foreground(self, pending: PendingRun) -> Iterator[None]:
        """Around a run that a cell awaits: the stop button ends it at once, and a longer run shows how far it is."""
        if not self._cells.active:
            yield
            return
        progress = Progress(pending.name, pending.workflow, self._publisher(), pending.gateway)
        pending.observe(progress)
        try:
            with self._cells.guard(progress.interrupted):
                yield
        finally:
            progress.finish()
            self._shown.append(progress)

    def _publisher(self) -> Publish | None:
        """What shows a display and then replaces it; None in a terminal, which cannot."""
        if getattr(self.shell, "kernel", None) is None:
            return None
        handle: list[Any] = []

        def publish(html: str, text: str) -> None:
            bundle = {"text/html": hidden(html), "text/plain": hidden(text)}
            if handle:
                handle[0].update(bundle, raw=True)
            else:
                handle.append(display(bundle, raw=True, display_id=True))

        return publish

    # ---------------------------------------------------------------------------------------------------- after a cell

    def _name(self, run: Run) -> None:
        """Call a run that did not come to its end ``run``, for ``run.debug()`` and ``await run.resume()``.

        ``run = await etl()`` has not assigned it, and an earlier run of that name would be the wrong one.
        """
        if isinstance(self.shell.user_ns.get("run"), Run | None):
            self.shell.user_ns["run"] = run
        else:
            self.shell.user_ns["failed_run"] = run
            self.say("`failed_run` is the run (the name `run` is in use)")

    def _cell_done(self, result: Any) -> None:
        """Name the run of a cell that failed; take away the progress of a run that the cell shows as its value."""
        error = getattr(result, "error_in_exec", None)
        if isinstance(error, NodeError) and error.run is not None:
            self._name(error.run)
        elif isinstance(error, Interrupted) and self._shown and self._shown[-1].run is not None:
            self._name(self._shown[-1].run)
        value = getattr(result, "result", None)
        for progress in self._shown:
            if isinstance(value, Run) and progress.run is not None and progress.run.id == value.id:
                progress.clear()
        self._shown.clear()


def _same(one: Any, other: Any) -> bool:
    """Whether two values are the same to the reader: one object, or equal plain values."""
    plain = (str, int, float, bool, bytes, type(None))
    return one is other or (type(one) is type(other) and isinstance(one, plain) and bool(one == other))
