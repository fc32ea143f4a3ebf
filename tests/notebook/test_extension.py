"""Loading and unloading, in kernels, in the terminal, in notebooks that nobody watches."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from kernels import Kernel
from nbclient import NotebookClient

ADDED = (
    "shell = get_ipython()\n"
    "[sum(name in shell.magics_manager.magics[kind] for kind, name in (('cell', 'workflow'), ('cell', 'node'), "
    "('line', 'secret'), ('line', 'resource'), ('line', 'gateway'))), "
    "len(shell.input_transformers_cleanup), len(shell.input_transformers_post), int(hasattr(shell, 'kailash_nb_cell')), "
    "sum(map(len, shell.events.callbacks.values()))]"
)


def ipython(folder: Path, *cells: str) -> str:
    """What terminal IPython prints for these cells."""
    script = "\n".join(f"get_ipython().run_cell({cell!r}, store_history=True)" for cell in cells)
    (folder / "cells.ipy").write_text(script)
    env = os.environ | {
        "HOME": str(folder),
        "IPYTHONDIR": str(folder / "ip"),
        "PYTHON_KEYRING_BACKEND": "keyring.backends.null.Keyring",
    }
    command = [sys.executable, "-m", "IPython", "--no-banner", "--colors=nocolor", "cells.ipy"]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=60, check=True)
    return done.stdout + done.stderr


def test_loading_makes_a_gateway_and_says_what_to_do_next(notebook: Kernel) -> None:
    notebook.ok("%unload_ext kailash_nb")
    notebook.ok("from kailash_nb import gateway as gateways\ngateways.use(None)\ndel gateway")

    cell = notebook.ok("%load_ext kailash_nb")

    assert cell.text.startswith("`gateway` is a new gateway.") and "%%workflow" in cell.text
    assert len(cell.text.splitlines()) == 1
    assert notebook.ok("gateway.title").value["text/plain"] == "'kailash_nb'"


def test_loading_beside_an_existing_gateway_says_nothing_and_uses_it(notebook: Kernel) -> None:
    notebook.ok("%unload_ext kailash_nb")
    notebook.ok("from kailash_nb import create_gateway\nmine = create_gateway('mine')")

    assert notebook.ok("%load_ext kailash_nb").text == ""
    notebook.ok("%%workflow here\nasync def a(): return 1")
    assert notebook.ok("list(mine.workflows)").value["text/plain"] == "['here']"


def test_loading_twice_adds_everything_once_and_unloading_takes_it_all_away(notebook: Kernel) -> None:
    def added() -> list[int]:
        return ast.literal_eval(notebook.ok(ADDED).value["text/plain"])  # type: ignore[no-any-return]

    loaded = added()
    notebook.ok("from kailash_nb import load_ipython_extension as load\nload(get_ipython())")
    assert added() == loaded

    notebook.ok("%unload_ext kailash_nb")
    without = added()
    notebook.ok("%unload_ext kailash_nb")
    notebook.ok("%load_ext kailash_nb")

    assert added() == loaded
    assert [a - b for a, b in zip(loaded, without, strict=True)] == [5, 1, 1, 1, 3]
    assert notebook.ok("here").value["text/html"].startswith("<div")


def test_reloading_works(notebook: Kernel) -> None:
    notebook.ok("%reload_ext kailash_nb")

    assert notebook.ok("%%workflow reloaded -o r\nasync def a(): return 7").status == "ok"


def test_loading_needs_neither_pandas_nor_a_driver_nor_a_server(notebook: Kernel) -> None:
    code = (
        "import subprocess, sys\nscript = '''import sys\nfrom IPython.core.interactiveshell import InteractiveShell\n"
        'shell = InteractiveShell.instance(); shell.run_line_magic("load_ext", "kailash_nb")\n'
        'print([m for m in ("pandas", "pyarrow", "asyncpg", "redis", "httpx", "uvicorn", "ipykernel") '
        "if m in sys.modules])'''\n"
        "print(subprocess.run([sys.executable, '-c', script], capture_output=True, text=True).stdout)"
    )
    assert notebook.ok(code).text.strip().endswith("[]")


def test_the_terminal_defines_runs_and_shows_text(tmp_path: Path) -> None:
    said = ipython(
        tmp_path,
        "%load_ext kailash_nb",
        "%%workflow etl\nasync def extract(limit: int = 3):\n    return [{'id': i} for i in range(limit)]\n",
        "run = await etl(limit=2)",
        "run",
        "%%time\n%%workflow etl --run\nasync def extract(limit: int = 4):\n    return [{'id': i} for i in range(limit)]\n",
        "%gateway status",
        "checks = %gateway check",
        "%%workflow bad\nasync def a():\n    return zork\n",
        "%%workflow fails --run\nasync def a():\n    return 1 / 0\n",
        "run.debug()",
    )

    assert "extract(limit = 3)" in said and "etl ok" in said and "2 rows" in said and "4 rows" in said
    assert "Wall time" in said and "Next: " in said
    assert "line 3: name 'zork' is not defined" in said
    assert "----> 3     return 1 / 0" in said and "ZeroDivisionError" in said
    assert "the next cell holds the source of 'a'" in said
    assert "SyntaxError" not in said and "<IPython.core.display" not in said and "coroutine" not in said


def test_terminal_ipython_knows_when_a_magic_cell_is_complete(notebook: Kernel) -> None:
    code = "get_ipython().check_complete('%%workflow etl\\nasync def a():'), get_ipython().check_complete('%%workflow etl')"

    assert notebook.ok(code).value["text/plain"] == "(('incomplete', ''), ('incomplete', ''))"


def test_a_notebook_that_nobody_watches_runs_and_keeps_its_displays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ip"))
    cells = [
        "%load_ext kailash_nb",
        "%%workflow etl --run\nimport asyncio\nasync def a(): await asyncio.sleep(0.8); return [{'id': 1}]",
        "etl",
        "await etl()",
    ]
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])

    NotebookClient(book, timeout=60, kernel_name="python3").execute()

    shown = json.dumps(book.cells[1].outputs)
    assert "etl ok" in shown and "<svg" in shown and "running" not in shown
    assert "<table" in json.dumps(book.cells[3].outputs)
    assert "Run it:" in json.dumps(book.cells[2].outputs)
