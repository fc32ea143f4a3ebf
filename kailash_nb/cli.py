"""The commands: ``python3 -m kailash_nb demo|test|lab``, or ``kailash-nb ...`` where it is installed.

Only the standard library is imported until a command needs more: help, typos and a missing extra are answered at once.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from .exceptions import did_you_mean, listed

QUICKSTART = "00_quickstart.ipynb"
_PACKAGE = Path(__file__).resolve().parent
_CHECKOUT = _PACKAGE.parent if (_PACKAGE.parent / "requirements.lock").is_file() else None
_NOTEBOOKS = _CHECKOUT / "notebooks" if _CHECKOUT else _PACKAGE / "notebooks"
_CODES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the process's exit code, 0 where it did what was asked.

    Args:
        argv: the command and its arguments; by default those of this process.

    Raises SystemExit after ``--help``, and for a command line that makes no sense.
    """
    name, rest = parse(sys.argv[1:] if argv is None else argv)
    run, extra = {"demo": (demo, "notebook,services"), "test": (test, "test"), "lab": (lab, "notebook")}[name]
    try:
        return run(rest)
    except ModuleNotFoundError as error:
        if not error.name or error.name.startswith("kailash_nb"):
            raise
        return _failed(f'{name} needs {error.name}, which is not installed: pip install "kailash-nb[{extra}]"')
    except KeyboardInterrupt:
        return _failed("stopped", 130)


def parse(argv: Sequence[str]) -> tuple[str, list[str]]:
    """Split a command line into the command and its arguments.

    Prints and raises SystemExit for ``--help``, for no or an unknown command, and for arguments it does not take.
    """
    program = "kailash-nb" if Path(sys.argv[0]).stem == "kailash-nb" else "python3 -m kailash_nb"
    parser = argparse.ArgumentParser(program, description="Async workflows in notebook cells: try, test, open.")
    commands = parser.add_subparsers(metavar="COMMAND", dest="command", required=True)
    for name, arguments, summary, example in (
        ("demo", "", f"execute the tutorial, {QUICKSTART}, and tell how it goes", "demo"),
        ("test", "[PYTEST OPTIONS]", "run the checkout's tests", "test -k secrets"),
        ("lab", "[FOLDER] [JUPYTERLAB OPTIONS]", "open JupyterLab, on the notebooks", "lab . --no-browser --port=8890"),
    ):
        usage, epilog = f"{program} {name} {arguments}".rstrip(), f"example: {program} {example}"
        commands.add_parser(name, help=summary, usage=usage, description=summary, epilog=epilog)
    if not argv:
        parser.print_help(sys.stderr)
        raise SystemExit(2)
    name, *rest = argv
    if not name.startswith("-") and name not in commands.choices:
        parser.error(
            f"no command {name!r}{did_you_mean(name, commands.choices)} (commands: {listed(commands.choices)})"
        )
    if name in ("test", "lab") and rest[:1] not in (["-h"], ["--help"]):
        return name, rest  # these are pytest's and JupyterLab's to read; argparse would claim some and reorder others
    return parser.parse_args(argv).command, []


def demo(_: Sequence[str]) -> int:
    """Execute the tutorial notebook on embedded services and print how it goes; 0 where every cell did its work."""
    source = _NOTEBOOKS / QUICKSTART
    if not source.is_file():
        return _failed(f"the notebook {source} is missing; it comes with a checkout and with the installed package")
    executed = _data_folder() / "demo" / QUICKSTART
    print(f"executing {QUICKSTART} in a kernel of its own, in {executed.parent}", flush=True)
    execution = execute_notebook(source, executed, report=sys.stdout)
    if execution.failure:
        text = execution.failure if sys.stderr.isatty() else _CODES.sub("", execution.failure)
        return _failed(f"{text}\nthe notebook, as far as it went: {executed}")
    print(f"all {execution.cells} cells ok in {execution.seconds:.0f} s; the executed notebook: {executed}")
    return 0


def test(arguments: Sequence[str]) -> int:
    """Run the checkout's tests by pytest, with pytest's own arguments; returns pytest's exit code."""
    if not _CHECKOUT:
        return _failed("the tests come with a checkout, not with the installed package; `pip download` or clone it")
    import pytest

    os.chdir(_CHECKOUT)
    return int(pytest.main(list(arguments)))


def lab(arguments: Sequence[str]) -> int:
    """Open JupyterLab with a kernel of this environment; runs until it is shut down.

    Args:
        arguments: the folder or notebook to open (by default the checkout's notebooks, else the current folder), then
            JupyterLab's own options. Its token authentication stays on.
    """
    given = bool(arguments) and not arguments[0].startswith("-")
    folder = Path(arguments[0]) if given else _NOTEBOOKS if _CHECKOUT else Path()
    if not folder.exists():
        return _failed(f"there is no folder or notebook {str(folder)!r}; options of JupyterLab come after it")
    from jupyterlab.labapp import LabApp

    options = list(arguments[given:])
    if hasattr(os, "geteuid") and os.geteuid() == 0 and "--allow-root" not in options:
        print("running as root: JupyterLab gets --allow-root", file=sys.stderr)
        options.append("--allow-root")
    register_kernel()
    LabApp.launch_instance([str(folder.resolve()), *options])
    return 0


def register_kernel() -> None:
    """Offer this interpreter to Jupyter as the kernel ``kailash_nb``, in the environment (``sys.prefix``) to stay."""
    command = [sys.executable, "-m", "ipykernel", "install", "--sys-prefix", "--name", "kailash_nb"]
    command += ["--display-name", "Python (kailash_nb)"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = done.stderr.strip().rpartition("\n")[2]
        print(f"the kernel 'Python (kailash_nb)' was not registered ({reason}); use 'Python 3'", file=sys.stderr)


@dataclass(frozen=True)
class Execution:
    """How a notebook went: its code cells, the seconds they took, and the failure's text (None where there is none)."""

    cells: int
    seconds: float
    failure: str | None


def execute_notebook(
    source: Path,
    executed: Path,
    *,
    report: TextIO | None = None,
    env: Mapping[str, str] | None = None,
    timeout: float = 300,
) -> Execution:
    """Execute a notebook in a fresh kernel of this very interpreter; the kernel has ended when this returns.

    Args:
        source: the notebook; it is not changed.
        executed: where the notebook goes with its outputs, also when a cell fails; the kernel works in this folder.
        report: gets a line for each cell as it goes, with its first lines of output.
        env: the kernel's whole environment, by default this process's.
        timeout: seconds that one cell may take.
    """
    import nbformat
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError, CellTimeoutError

    notebook = nbformat.read(source, as_version=4)
    executed.parent.mkdir(parents=True, exist_ok=True)
    progress = _Progress(notebook.cells, report)
    client = NotebookClient(
        notebook,
        kernel_name="python3",
        timeout=int(timeout),
        on_cell_execute=progress.started,
        on_cell_executed=progress.finished,
    )
    failure = None
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="kailash_nb-") as sockets:
        kernel = client.create_kernel_manager()
        assert kernel.kernel_spec is not None
        kernel.kernel_spec.argv[0] = sys.executable  # "python3" may be a kernel of the user's own
        # Sockets in a private folder: no port is open to others. Windows has no such sockets.
        kernel.transport = "tcp" if os.name == "nt" else "ipc"
        kernel.connection_file = str(Path(sockets, "kernel.json"))
        try:
            with client.setup_kernel(cwd=str(executed.parent), env=dict(os.environ if env is None else env)):
                try:
                    for index, cell in enumerate(notebook.cells):
                        client.execute_cell(cell, index)
                except KeyboardInterrupt:
                    client.shutdown_kernel = "immediate"
                    raise
            client.set_widgets_metadata()
        except (CellExecutionError, CellTimeoutError, RuntimeError) as error:  # RuntimeError: the kernel died
            failure = f"cell {progress.cell} failed: {error}"
        finally:
            nbformat.write(notebook, executed)
    return Execution(progress.total, time.monotonic() - started, failure)


class _Progress:
    """Tells how the code cells go: the hooks that nbclient calls. Lives for one execution."""

    def __init__(self, cells: Sequence[Any], report: TextIO | None) -> None:
        self.total = sum(1 for cell in cells if cell.cell_type == "code" and cell.source.strip())
        self.cell = 0
        self._cells = cells
        self._report = report
        self._since = 0.0

    def started(self, *, cell: Any, cell_index: int) -> None:
        self.cell += 1
        self._since = time.monotonic()
        before = self._cells[cell_index - 1] if cell_index else cell
        text = before.source if before.cell_type == "markdown" else cell.source
        title = next(line for line in (*text.splitlines(), cell.source) if line.strip())
        self._say(f"[{self.cell:>2}/{self.total}] {title.strip('#*_` ')[:88]} ... ", end="")

    def finished(self, *, cell: Any, cell_index: int, execute_reply: Any) -> None:
        self._say(f"{time.monotonic() - self._since:.1f} s")
        lines = [line for output in cell.outputs for line in _text(output).splitlines() if line.strip()]
        for line in lines[:12]:
            self._say(f"        | {line[:108]}")
        if len(lines) > 12:
            self._say(f"        | ... {len(lines) - 12} more lines")

    def _say(self, text: str, end: str = "\n") -> None:
        if self._report:
            print(text, end=end, file=self._report, flush=True)


def _text(output: Any) -> str:
    """A cell's output as plain text."""
    if output.output_type == "stream":
        text = output.text
    elif output.output_type == "error":
        text = f"{output.ename}: {output.evalue}"
    else:
        text = output.data.get("text/plain", "")
    return _CODES.sub("", text)


def _data_folder() -> Path:
    """``.kailash_nb`` of the checkout, or else of the current folder; git does not see it."""
    folder = (_CHECKOUT or Path.cwd()) / ".kailash_nb"
    folder.mkdir(exist_ok=True)
    (folder / ".gitignore").write_text("*\n")
    return folder


def _failed(message: str, code: int = 1) -> int:
    print(f"kailash_nb: {message}", file=sys.stderr)
    return code
