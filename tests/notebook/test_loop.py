"""The stop button: an awaiting cell ends at once, its nodes are cancelled, and the kernel goes on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from kernels import Cell, Kernel

SLOW = """%%workflow slow
import asyncio

async def quick():
    return {"a": 1}

async def nap(quick):
    try:
        await asyncio.sleep(30)
    finally:
        print("cleaned up")
"""


@pytest.fixture(scope="module")
def slow(notebook: Kernel) -> Kernel:
    notebook.ok(SLOW)
    return notebook


def stopped(kernel: Kernel, code: str, after: float = 0.7, presses: int = 1) -> tuple[Cell, float]:
    """Run a cell, press stop, and tell how long it took to end from then on."""
    message = kernel.send(code)
    time.sleep(after)
    pressed = time.monotonic()
    for _ in range(presses):
        kernel.interrupt()
        time.sleep(0.2 if presses > 1 else 0)
    return kernel.collect(message), time.monotonic() - pressed


def test_stop_ends_an_awaited_run_within_two_seconds_with_one_line(slow: Kernel) -> None:
    cell, took = stopped(slow, "await slow()")

    assert took < 2
    assert cell.status == "error" and cell.error.startswith("Interrupted: ") and "\n" not in cell.error
    assert "cleaned up" in cell.text
    assert slow.ok("(await gateway.runs.list('slow'))[0].status.value").value["text/plain"] == "'cancelled'"


def test_the_line_names_the_workflow_and_what_was_running(slow: Kernel) -> None:
    slow.ok("run = None")
    cell, _ = stopped(slow, "run = await slow()")

    assert "slow interrupted after" in cell.error and "nap was running; `await run.resume()`" in cell.error


def test_an_interrupted_run_is_resumed_where_it_stopped(slow: Kernel) -> None:
    slow.ok("run = None")
    stopped(slow, "await slow()")
    slow.ok("%%node nap\nasync def nap(quick): return quick['a'] + 1")

    resumed = slow.ok("run = await run.resume()\nrun['nap'], run.nodes['quick'].status.value")

    assert resumed.value["text/plain"] == "(2, 'reused')"
    slow.ok(SLOW)


def test_a_magic_that_runs_is_stopped_the_same_way(slow: Kernel) -> None:
    cell, took = stopped(slow, SLOW.replace("%%workflow slow", "%%workflow slow --run"))

    assert took < 2 and "slow interrupted after" in cell.error and "nap was running" in cell.error


def test_cells_in_the_queue_are_not_run(slow: Kernel) -> None:
    message = slow.send("await slow()")
    queued = slow.send("print('queued')")
    time.sleep(0.7)
    slow.interrupt()

    assert slow.collect(message).status == "error"
    assert slow.collect(queued).status == "aborted"


def test_stop_ends_every_run_that_the_cell_gathers(slow: Kernel) -> None:
    cell, took = stopped(slow, "await asyncio.gather(slow(), slow())")

    assert took < 2 and cell.error.startswith("Interrupted: ")
    statuses = slow.ok("[r.status.value for r in (await gateway.runs.list('slow'))[:2]]")
    assert statuses.value["text/plain"] == "['cancelled', 'cancelled']"


def test_a_run_in_the_background_outlives_the_stop_of_another_cell(slow: Kernel) -> None:
    slow.ok("%%workflow brief\nasync def wait(): await asyncio.sleep(2); return 'done'")
    slow.ok("background = asyncio.ensure_future(brief())\nawait asyncio.sleep(0.1)")

    cell, took = stopped(slow, "await slow()")

    assert took < 1 and cell.error.startswith("Interrupted: ")
    assert slow.ok("(await background)['wait']").value["text/plain"] == "'done'"


def test_a_second_press_ends_a_node_that_computes_without_awaiting(slow: Kernel) -> None:
    slow.ok("%%workflow busy\nimport time\nasync def compute(): time.sleep(30)")

    cell, took = stopped(slow, "await busy()", presses=2)

    assert took < 3 and cell.status == "error"
    assert slow.ok("1 + 1").value["text/plain"] == "2"


def test_stop_ends_a_prompt_and_nothing_is_stored(slow: Kernel) -> None:
    message = slow.send("%secret asked password", stdin=True)
    slow.client.get_stdin_msg(timeout=10)
    slow.interrupt()

    assert slow.collect(message, timeout=10).error == "Interrupted: nothing is stored"
    assert "asked" not in slow.ok("%secret").text


def test_stop_ends_what_a_magic_cell_awaits_itself(slow: Kernel) -> None:
    cell, took = stopped(slow, "%%workflow w\nimport asyncio\nawait asyncio.sleep(30)\nasync def a(): pass")

    assert took < 2 and cell.error.startswith("Interrupted: stopped after")


def test_stop_works_as_ever_in_cells_that_await_nothing_of_ours(slow: Kernel) -> None:
    cell, took = stopped(slow, "import time; time.sleep(30)")

    assert took < 2 and "KeyboardInterrupt" in cell.error


def test_the_kernels_own_handler_is_back_after_a_run(slow: Kernel) -> None:
    slow.ok("import signal")
    slow.ok("%%workflow nothing\nasync def a(): return 1")

    cell = slow.ok(
        "before = signal.getsignal(signal.SIGINT)\nawait nothing()\nsignal.getsignal(signal.SIGINT) is before"
    )

    assert cell.value["text/plain"] == "True"


def test_control_c_in_the_terminal_cancels_the_nodes_and_the_session_goes_on(tmp_path: Path) -> None:
    cells = ["%load_ext kailash_nb", SLOW, "print('ready', flush=True); await slow()", "print('alive')"]
    (tmp_path / "cells.ipy").write_text("\n".join(f"get_ipython().run_cell({cell!r})" for cell in cells))
    env = os.environ | {"HOME": str(tmp_path), "IPYTHONDIR": str(tmp_path / "ip")}
    command = [sys.executable, "-u", "-m", "IPython", "--no-banner", "--colors=nocolor", "cells.ipy"]
    with subprocess.Popen(command, cwd=tmp_path, env=env, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        while "ready" not in process.stdout.readline():
            pass
        time.sleep(0.5)
        pressed = time.monotonic()
        process.send_signal(signal.SIGINT)
        said = process.stdout.read()

    assert "cleaned up" in said and "Interrupted: " in said and said.rstrip().endswith("alive")
    assert time.monotonic() - pressed < 10
