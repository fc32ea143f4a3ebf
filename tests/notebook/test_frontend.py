"""What a gateway asks of the notebook: debug sessions, and one line to the user."""

from __future__ import annotations

import pytest
from kernels import Kernel

BROKEN = """%%workflow broken
async def extract():
    print('extracting')
    return {"rows": [{"id": 1}, {"id": 2}]}

async def total(rows, factor=10):
    return {"sum": sum(row["amount"] for row in rows) * factor}
"""


@pytest.fixture(scope="module")
def broken(notebook: Kernel) -> Kernel:
    notebook.ok("async def total(rows): pass")
    notebook.ok(BROKEN.replace("async def total", '@gateway.node(rows="extract.rows")\nasync def total'))
    return notebook


def test_a_failed_run_is_named_run_debugged_mended_and_resumed(broken: Kernel) -> None:
    broken.ok("rows = 'mine'; run = None")
    assert "extracting" in broken.run("await broken()").text

    opened = broken.ok("session = run.debug()")
    assert "variables: rows (what they were before: rows_before)" in opened.text
    assert broken.ok("rows, rows_before").value["text/plain"] == "([{'id': 1}, {'id': 2}], 'mine')"
    assert opened.next_input.startswith("%%node total\n") and 'row["amount"]' in opened.next_input

    mended = broken.ok(opened.next_input.replace('row["amount"]', 'row["id"]'))
    assert "total(rows <- extract.rows, factor = 10)" in mended.text and "broken v2" in mended.text

    resumed = broken.ok("again = await run.resume()\nagain.data")
    assert resumed.value["text/plain"] == "{'sum': 30}"
    assert "extracting" not in resumed.text
    assert broken.ok("again.nodes['extract'].status.value").value["text/plain"] == "'reused'"


def test_a_block_is_debugged_and_mended_as_well(notebook: Kernel) -> None:
    notebook.ok("%%node numbers\nresult = {'n': [1, 2]}")
    notebook.ok("%%node mean --connect n=numbers.n\nresult = {'mean': sum(n) / 0}")
    notebook.ok("averages = gateway.workflow('averages', 'mean')")
    notebook.run("await averages()")

    opened = notebook.ok("session = run.debug()")
    notebook.ok(opened.next_input.replace("/ 0", "/ len(n)"))

    assert notebook.ok("(await run.resume()).data").value["text/plain"] == "{'mean': 1.5}"


def test_a_variable_called_run_that_is_no_run_is_left_alone(broken: Kernel) -> None:
    broken.ok("%%workflow failing\nasync def f(): return 1 / 0")
    broken.ok("run = 'mine'")

    cell = broken.run("await failing()")

    assert "`failed_run` is the run" in cell.text
    assert broken.ok("run, failed_run.status.value").value["text/plain"] == "('mine', 'failed')"
    broken.ok("run = None")
