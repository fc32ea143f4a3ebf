"""The notebook door: ``%load_ext kailash_nb``.

``magics.py`` and ``commands.py`` are the magics, ``cells.py`` how cells are awaited, ``definitions.py`` what they do to
a gateway; ``frontend.py`` is what gateways ask of a notebook, ``loop.py`` the stop button, ``errors.py`` tracebacks;
``display.py`` says what is shown how, ``view.py`` and ``graph.py`` draw it, ``progress.py`` while it goes on.

A new magic is a method with arguments, registered below; a new display a function in ``view.py`` and a line in
``display.py``.
"""

from __future__ import annotations

from typing import Any

from . import display
from .cells import CELL_MAGICS, LINE_MAGICS, AwaitedCells, awaited_lines
from .commands import Commands
from .frontend import Notebook
from .magics import CellMagics

_loaded: dict[int, _Extension] = {}


class _Extension:
    """What loading the extension adds to one shell."""

    def __init__(self, shell: Any) -> None:
        self.shell = shell
        self.notebook = Notebook(shell)
        self.cells = AwaitedCells()

    def load(self) -> None:
        shell, cell_magics, commands = self.shell, CellMagics(self.notebook), Commands(self.notebook)
        for name in CELL_MAGICS:
            shell.register_magic_function(getattr(cell_magics, name), "cell", name)
        for name in LINE_MAGICS:
            shell.register_magic_function(getattr(commands, name), "line", name)
        shell.kailash_nb_cell = cell_magics.run_cell
        # The first transformer: it sees the cell as it was typed, blank lines above the magic included.
        shell.input_transformers_cleanup.insert(0, self.cells)
        shell.input_transformers_post.append(awaited_lines)
        display.register(shell)
        self.notebook.start()

    def unload(self) -> None:
        shell = self.shell
        self.notebook.stop()
        display.unregister(shell)
        shell.input_transformers_cleanup.remove(self.cells)
        shell.input_transformers_post.remove(awaited_lines)
        del shell.kailash_nb_cell
        for kind, names in (("cell", CELL_MAGICS), ("line", LINE_MAGICS)):
            for name in names:
                shell.magics_manager.magics[kind].pop(name, None)


def load_ipython_extension(shell: Any) -> None:
    """Add the magics and displays to a shell; loading twice adds them once."""
    if id(shell) not in _loaded:
        extension = _loaded[id(shell)] = _Extension(shell)
        extension.load()


def unload_ipython_extension(shell: Any) -> None:
    """Take them away again; gateways, their pools and their servers stay."""
    extension = _loaded.pop(id(shell), None)
    if extension is not None:
        extension.unload()
