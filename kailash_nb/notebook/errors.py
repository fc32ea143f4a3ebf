"""How our errors read in a cell: the author's own lines, and one message.

IPython asks an exception for ``_render_traceback_``; while the extension is loaded, :class:`KailashError` has one.
"""

from __future__ import annotations

import contextlib
import linecache
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from .. import values
from ..exceptions import KailashError, NodeError
from ..runs import RunError

_MAGIC = re.compile(r"(?:\w+ *= *)?await get_ipython\(\)\.run_line_magic")
_AROUND = 3  # lines shown above and below the one that failed
_MOST_FRAMES = 10  # endless recursion has a thousand
_OURS = str(Path(__file__).resolve().parent.parent)
_PATHS = sysconfig.get_paths()
_LIBRARIES = tuple({_PATHS["stdlib"], _PATHS["platstdlib"], _PATHS["purelib"], _PATHS["platlib"]})


def install(shell: Any) -> None:
    """Have our errors, and what is marked with :func:`mark`, shown without the frames in between."""

    def render(error: KailashError) -> list[str]:
        return rendered(shell, error)

    KailashError._render_traceback_ = render  # type: ignore[attr-defined]


def uninstall() -> None:
    """Have them shown by IPython again."""
    with contextlib.suppress(AttributeError):
        del KailashError._render_traceback_  # type: ignore[attr-defined]


def mark(shell: Any, error: BaseException) -> None:
    """Have an error of the user's own code, raised through ours, shown without our frames."""
    if not hasattr(error, "_render_traceback_"):
        with contextlib.suppress(AttributeError):  # a class with slots; it is shown in full then
            error._render_traceback_ = lambda: rendered(shell, error)  # type: ignore[attr-defined]


def rendered(shell: Any, error: BaseException) -> list[str]:
    """The lines that IPython shows for an error: the author's frames, then the message."""
    failure = error.run.error if isinstance(error, NodeError) and error.run is not None else None
    cause = failure.exception if failure is not None and failure.exception is not None else error
    lines = [*_frames(shell, cause), *(_inputs(failure) if failure is not None else ())]
    return [*lines, f"{_coloured(shell, type(error).__name__, 31)}: {error}"]


def _coloured(shell: Any, text: str, code: int) -> str:
    return text if shell.colors.lower() == "nocolor" else f"\x1b[{code}m{text}\x1b[39m"


def _inputs(failure: RunError) -> Iterator[str]:
    if failure.inputs:
        shown = ", ".join(f"{name}: {_shape(value)}" for name, value in failure.inputs.items())
        yield f"inputs of {failure.node}: {shown}"


def _shape(value: Any) -> str:
    columns = getattr(value, "columns", None)
    width = f" × {len(columns)} columns" if values.is_table(value) and columns is not None else ""
    return values.describe(value) + width


def _frames(shell: Any, error: BaseException) -> Iterator[str]:
    """The author's frames, each with a few lines around the one that an arrow points at."""
    entries = []
    traceback = error.__traceback__
    while traceback is not None:
        entries.append(traceback)
        traceback = traceback.tb_next
    kept = [i for i, entry in enumerate(entries) if _is_authors(entry, shell)]
    shown = kept if len(kept) <= _MOST_FRAMES else [*kept[:3], *kept[3 - _MOST_FRAMES :]]
    for i in shown:
        yield _frame(shell, entries[i])
        if shown is not kept and i == kept[2]:
            yield f"(... {len(kept) - len(shown)} frames left out ...)"
    inside = sum(not _is_ours(entry) for entry in entries[kept[-1] + 1 :]) if kept else 0
    if inside:
        yield f"({inside} more frame{'s' if inside > 1 else ''} inside libraries)"


def _frame(shell: Any, entry: TracebackType) -> str:
    code, line = entry.tb_frame.f_code, entry.tb_lineno
    place = shell.compile.format_code_name(code.co_filename) or ("File", code.co_filename)
    inside = "" if code.co_name == "<module>" else f", in {code.co_qualname}"
    lines = [f"{place[0]} {_coloured(shell, place[1], 32)}, line {line}{inside}"]
    for number in range(max(1, line - _AROUND), line + _AROUND + 1):
        source = linecache.getline(code.co_filename, number).rstrip()
        if source or number <= line:
            arrow = "-" * (5 - len(str(number))) + "> "
            label = f"{arrow if number == line else '':>{7 - len(str(number))}}{number} "
            lines.append(_coloured(shell, label, 32) + _code(shell, source))
    return "\n".join(lines)


def _code(shell: Any, line: str) -> str:
    """A line of source in colours; plain where it cannot stand alone (it opens a string that a later one closes)."""
    coloured = str(shell.pycolorize(line)).rstrip()
    return line if "*** ERROR" in coloured and "*** ERROR" not in line else coloured


def _is_ours(entry: TracebackType) -> bool:
    return entry.tb_frame.f_code.co_filename.startswith(_OURS)


def _is_authors(entry: TracebackType, shell: Any) -> bool:
    name = entry.tb_frame.f_code.co_filename
    if shell.compile.format_code_name(name) is not None:
        # A magic's own line says nothing that the message does not, and may hold what no output should repeat.
        magic = "kailash_nb_cell" in entry.tb_frame.f_code.co_names
        return not magic and not _MAGIC.match(linecache.getline(name, entry.tb_lineno))
    # A relative name is a compiled library's, whose source is not here; a node without a cell has a name in brackets.
    return (Path(name).is_absolute() or name.startswith("<node ")) and not name.startswith((_OURS, *_LIBRARIES))
