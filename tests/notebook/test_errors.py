"""How errors read in a cell: the author's lines, one message, nothing of ours."""

from __future__ import annotations

from kernels import Kernel
from services import Services

BROKEN = """%%workflow broken

async def extract():
    return {"rows": [{"id": 1}, {"id": 2}]}

def amount_of(row):
    return row["amount"]

async def total(extract):
    return {"sum": sum(amount_of(row) for row in extract["rows"])}
"""


def test_a_failed_node_shows_the_authors_cell_line_and_arrow_its_inputs_and_one_message(notebook: Kernel) -> None:
    number = notebook.ok(BROKEN).number
    cell = notebook.run("await broken()")

    assert cell.status == "error"
    assert f"Cell In[{number}], line 7, in amount_of" in cell.error
    assert '----> 7     return row["amount"]' in cell.error
    assert "---> 10     return" in cell.error
    assert "inputs of total: extract: rows 2 rows" in cell.error
    last = cell.error.splitlines()[-1]
    assert last == f"NodeError: total failed, cell [{number}] line 7: KeyError: 'amount'. Inputs are kept: run.debug()"
    assert "kailash_nb/" not in cell.error and "asyncio" not in cell.error and "Traceback" not in cell.error


def test_a_block_shows_the_cells_own_line_too(notebook: Kernel) -> None:
    notebook.ok("%%node fails\nx = 1\n\nresult = {'y': x / 0}")
    notebook.ok("failing = gateway.workflow('failing', 'fails')")

    cell = notebook.run("await failing()")

    assert "----> 4 result = {'y': x / 0}" in cell.error
    assert "line 4: ZeroDivisionError: division by zero" in cell.error.splitlines()[-1]


def test_the_frames_of_libraries_are_counted_not_shown(notebook: Kernel) -> None:
    notebook.ok("%%workflow parsing\nimport json\nasync def parse(): return json.loads('{')")

    cell = notebook.run("await parsing()")

    assert "json.loads('{')" in cell.error and "decoder.py" not in cell.error
    assert "more frames inside libraries" in cell.error


def test_several_failures_at_once_and_an_exception_group_still_give_one_error(notebook: Kernel) -> None:
    notebook.ok(
        "%%workflow groups\nimport asyncio\nasync def a():\n    async with asyncio.TaskGroup() as group:\n"
        "        group.create_task(fail())\nasync def fail(): raise ValueError('inner')\n"
    )

    cell = notebook.run("await groups()")

    assert cell.error.count("NodeError: a failed") == 1 and "----> 4" in cell.error
    assert [m["ename"] for m in cell.messages if m["type"] == "error"] == ["NodeError"]


def test_an_error_before_the_run_keeps_the_users_line_and_says_one_thing(notebook: Kernel) -> None:
    notebook.ok("%%workflow typed\nasync def a(limit: int): return limit")

    cell = notebook.run("x = 1\nawait typed(limt=3)")

    assert "----> 2 await typed(limt=3)" in cell.error
    assert cell.error.splitlines()[-1].startswith("ParameterError: workflow 'typed' was not started: parameter 'limit'")
    assert "kailash_nb/" not in cell.error and "frames" not in cell.error


def test_an_error_of_a_cells_own_statement_is_shown_as_in_any_cell(notebook: Kernel) -> None:
    cell = notebook.run("%%workflow w\nimport math\n\nx = 1 / 0\n")

    assert "----> 4 x = 1 / 0" in cell.error and cell.error.rstrip().endswith("ZeroDivisionError: division by zero")
    assert "kailash_nb/" not in cell.error


def test_unloading_gives_tracebacks_back_to_ipython(notebook: Kernel) -> None:
    notebook.ok("%unload_ext kailash_nb")
    try:
        cell = notebook.run("from kailash_nb import WorkflowError\nraise WorkflowError('x')")
        assert "Traceback (most recent call last)" in cell.error
    finally:
        notebook.ok("%load_ext kailash_nb")


def test_the_frames_of_a_driver_compiled_elsewhere_are_not_shown_and_open_strings_are_no_noise(
    notebook: Kernel, services: Services
) -> None:
    notebook.ok(
        f"import os\nos.environ['KAILASH_NB_SERVICES'] = {str(services.folder)!r}\n"
        "from kailash_nb import ResourceReference\n"
        'gateway.register_resource("shop_db", ResourceReference("database", {"embedded": True}))'
    )
    notebook.ok(
        '%%workflow asking\nasync def ask(shop_db):\n    return await shop_db.fetch("""\n  select nothing\n""")'
    )

    cell = notebook.run("await asking()")

    assert '----> 3     return await shop_db.fetch("""' in cell.error
    assert "pyx" not in cell.error and "*** ERROR" not in cell.error
    assert 'UndefinedColumnError: column "nothing" does not exist' in cell.error.splitlines()[-1]
