"""``%%workflow`` and ``%%node`` in a real kernel."""

from __future__ import annotations

import pytest
from kernels import Kernel

ETL = """%%workflow etl
import math

FACTOR = 3

def root(x):
    return math.sqrt(x)

async def extract(limit: int = 4):
    return {"users": [{"id": i} for i in range(limit)]}

async def transform(extract):
    return {"rows": [{**user, "score": root(user["id"]) * FACTOR} for user in extract["users"]]}
"""


@pytest.fixture(scope="module")
def etl(notebook: Kernel) -> Kernel:
    notebook.ok(ETL)
    return notebook


def test_a_cell_of_functions_defines_a_workflow_draws_it_and_binds_its_name(notebook: Kernel) -> None:
    cell = notebook.ok(ETL)

    assert "transform(extract <- extract)" in cell.value["text/plain"]
    assert "<svg" in cell.value["text/html"] and "root" not in cell.value["text/plain"]
    assert notebook.ok("etl.name, root(9), FACTOR").value["text/plain"] == "('etl', 3.0, 3)"


def test_nothing_runs_until_it_is_asked_to(notebook: Kernel) -> None:
    notebook.ok("ran = []")
    notebook.ok("%%workflow quiet\nasync def note(): print('it ran'); return {}")

    assert notebook.ok("len(await gateway.runs.list('quiet'))").value["text/plain"] == "0"


def test_run_takes_parameters_and_shows_the_run_with_its_table(etl: Kernel) -> None:
    cell = etl.ok(ETL.replace("%%workflow etl", "%%workflow etl --run limit=2"))

    assert cell.value["text/plain"].startswith("etl ok") and "2 rows" in cell.value["text/plain"]
    assert "<table" in cell.value["text/html"]
    assert etl.ok("_.parameters['limit']").value["text/plain"] == "2"


def test_output_puts_the_run_into_a_variable(etl: Kernel) -> None:
    etl.ok(ETL.replace("%%workflow etl", "%%workflow etl -o first"))

    assert etl.ok("first['transform']['rows'][1]").value["text/plain"] == "{'id': 1, 'score': 3.0}"


def test_a_handle_is_called_and_awaited(etl: Kernel) -> None:
    cell = etl.ok("run = await etl(limit=3)\nlen(run['extract']['users'])")

    assert cell.value["text/plain"] == "3"


def test_the_same_cell_again_changes_nothing_and_an_edited_one_is_one_new_version(etl: Kernel) -> None:
    etl.ok(ETL)
    before = int(etl.ok("etl.number").value["text/plain"])
    etl.ok(ETL)
    assert int(etl.ok("etl.number").value["text/plain"]) == before

    etl.ok(ETL.replace("range(limit)", "range(1, limit)").replace("score", "points"))
    assert int(etl.ok("etl.number").value["text/plain"]) == before + 1


def test_a_function_with_the_decorator_keeps_its_connections(notebook: Kernel) -> None:
    cell = notebook.ok(
        "%%workflow wired\nasync def source(): return {'users': [1, 2]}\n"
        "@gateway.node(people='source.users', timeout=5)\nasync def count(people): return {'n': len(people)}\n"
    )

    assert "count(people <- source.users)" in cell.value["text/plain"]
    assert notebook.ok("(await wired()).data").value["text/plain"] == "{'n': 2}"


def test_a_definition_with_problems_names_all_of_them_with_their_lines_and_changes_nothing(etl: Kernel) -> None:
    etl.ok(ETL)
    before = etl.ok("etl.number, sorted(gateway.nodes)").value["text/plain"]

    cell = etl.run(ETL + "\nasync def load(transform):\n    return missing(1)\n\nasync def other(): return zork\n")

    assert cell.status == "error"
    assert cell.error.startswith("WorkflowDefinitionError: workflow 'etl' has 2 problems:")
    assert "line 16: name 'missing' is not defined" in cell.error and "line 18: name 'zork'" in cell.error
    assert "kailash_nb/" not in cell.error and "Traceback" not in cell.error
    assert etl.ok("etl.number, sorted(gateway.nodes)").value["text/plain"] == before


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("%%workflow", "the following arguments are required: name"),
        ("%%workflow w --rum", "unrecognized arguments: --rum"),
        ("%%node n --timeout soon", "argument --timeout: invalid float value: 'soon'"),
    ],
)
def test_a_wrong_line_says_what_is_wrong_and_where_to_read_on(notebook: Kernel, line: str, said: str) -> None:
    cell = notebook.run(f"{line}\nasync def a(): return 1")

    assert cell.status == "error"
    assert said in cell.text and f"{line.split()[0]}?" in cell.text


def test_a_parameter_without_a_value_is_told_the_form(notebook: Kernel) -> None:
    assert (
        "'limit' is not of the form parameter=value"
        in notebook.run("%%workflow w --run limit\nasync def a(): pass").text
    )


def test_an_empty_cell_says_what_belongs_into_it(notebook: Kernel) -> None:
    assert "each `async def` in it is a node" in notebook.run("%%workflow empty\nx = 1").error


def test_help_names_the_plain_python_twin(notebook: Kernel) -> None:
    reply = notebook.client.execute("%%workflow?", reply=True, timeout=30)
    shown = str(reply["content"]["payload"])

    assert "--run" in shown and "@gateway.node" in shown and "gateway.workflow" in shown


def test_time_above_the_magic_tells_how_long_it_took(notebook: Kernel) -> None:
    cell = notebook.ok("%%time\n%%workflow timed --run\nimport asyncio\nasync def nap(): await asyncio.sleep(0.2)")

    assert "Wall time: " in cell.text and "ms" in cell.text


def test_braces_and_dollars_on_the_line_are_left_alone(notebook: Kernel) -> None:
    notebook.ok("x = 1\n")
    notebook.ok("%%workflow plain -o said --run text={x}$x\nasync def echo(text: str): return text")

    assert notebook.ok("said['echo']").value["text/plain"] == "'{x}$x'"


def test_a_magic_called_from_code_gives_a_task(notebook: Kernel) -> None:
    cell = notebook.ok(
        "task = get_ipython().run_cell_magic('workflow', 'coded', 'async def one(): return 1')\n"
        "print(type(task).__name__, await task)"
    )

    assert cell.text.startswith("NotYetAwaited coded v1")


def test_the_body_may_await_like_any_cell(notebook: Kernel) -> None:
    notebook.ok("%%workflow awaiting\nimport asyncio\nLIMIT = await asyncio.sleep(0, 7)\nasync def a(): return LIMIT")

    assert notebook.ok("(await awaiting())['a']").value["text/plain"] == "7"


# --- %%node -----------------------------------------------------------------------------------------------------------


def test_a_node_cell_replaces_a_node_shows_its_wiring_and_names_the_new_version(etl: Kernel) -> None:
    etl.ok(ETL)
    before = int(etl.ok("etl.number").value["text/plain"])

    cell = etl.ok(
        "%%node transform\nasync def transform(extract):\n    return {'rows': [], 'n': len(extract['users'])}\n"
    )

    assert "transform(extract <- extract)" in cell.text and f"etl v{before + 1}" in cell.text
    assert etl.ok("(await etl(limit=5)).data['n']").value["text/plain"] == "5"


def test_a_replaced_node_keeps_connections_timeout_and_retries_unless_told_otherwise(notebook: Kernel) -> None:
    notebook.ok("%%node source\nresult = {'users': [1, 2, 3], 'other': [1]}")
    notebook.ok("%%node count --connect users=source.users --timeout 7 --retries 2\nresult = {'n': len(users)}")
    notebook.ok("gateway.workflow('counting', 'count')")

    notebook.ok("%%node count\nresult = {'n': len(users) * 10}")
    kept = notebook.ok("node = gateway.workflow('counting').workflow.by_name['count']; str(node), node.policies")
    assert "users <- source.users" in kept.value["text/plain"]
    assert "max_attempts=3" in kept.value["text/plain"] and "seconds=7" in kept.value["text/plain"]

    notebook.ok("%%node count --connect users=source.other --timeout 0 --retries 0\nresult = {'n': len(users) * 10}")
    changed = notebook.ok("node = gateway.workflow('counting').workflow.by_name['count']; str(node), node.policies")
    assert changed.value["text/plain"] == "('count(users <- source.other)', ())"


def test_a_connection_whose_parameter_is_gone_is_dropped(notebook: Kernel) -> None:
    notebook.ok("%%node given\nresult = {'a': 1}")
    notebook.ok("%%node taker --connect x=given.a\nasync def taker(x): return x")

    assert "taker(y)" in notebook.ok("%%node taker\nasync def taker(y): return y").text


def test_a_node_of_a_workflow_that_was_built_whole_is_replaced_in_it(notebook: Kernel) -> None:
    notebook.ok(
        "from kailash_nb import AsyncWorkflowBuilder\n"
        "built = (AsyncWorkflowBuilder('built').add_async_code('one', \"result = {'a': 1}\")\n"
        "  .add_async_code('two', \"result = {'b': a / 0}\").add_connection('one', 'a', 'two', 'a').build())\n"
        "handle = gateway.register_workflow('built', built)"
    )

    cell = notebook.ok("%%node two\nresult = {'b': a + 1}")

    assert "two(a <- one.a)" in cell.text and "built v2" in cell.text
    assert notebook.ok("(await handle()).data").value["text/plain"] == "{'b': 2}"


def test_a_node_with_problems_is_refused_and_the_old_one_stays(etl: Kernel) -> None:
    etl.ok(ETL)

    cell = etl.run("%%node transform\nasync def transform(extract):\n    return zork\n")

    assert "line 3: name 'zork' is not defined" in cell.error
    assert etl.ok("len((await etl(limit=4)).data['rows'])").value["text/plain"] == "4"


def test_a_node_that_no_workflow_uses_says_how_to_make_one(notebook: Kernel) -> None:
    assert "gateway.workflow('NAME', 'alone')" in notebook.ok("%%node alone\nresult = {'x': 1}").text


def test_a_line_magic_that_nobody_awaits_says_so_and_does_nothing(notebook: Kernel) -> None:
    cell = notebook.run(
        "for name in 'ab':\n    get_ipython().run_line_magic('resource', name + ' cache host=localhost')"
    )

    assert cell.text.count("nothing was done") == 2
    assert notebook.ok("'a' in gateway.resource_registry.names()").value["text/plain"] == "False"


def test_a_keyboard_interrupt_raised_by_a_node_leaves_the_kernel_alive(notebook: Kernel) -> None:
    notebook.ok("%%workflow rude\nasync def raises(): raise KeyboardInterrupt('mine')")

    assert "raises failed" in notebook.run("await rude()").error
    assert notebook.ok("1 + 1").value["text/plain"] == "2"
