"""How magic cells are recognised, and which functions of a cell are nodes."""

from __future__ import annotations

import ast
from typing import Any

import pytest

from kailash_nb.exceptions import WorkflowDefinitionError
from kailash_nb.notebook.cells import (
    AwaitedCells,
    Cell,
    awaited_lines,
    functions_of,
    is_block,
    one_function,
    parse,
    read,
)


def nodes(body: str) -> list[str]:
    """The names of the functions that are nodes in a cell with this body."""
    cell = read(f"%%workflow w\n{body}", "cell")
    assert cell is not None
    namespace: dict[str, Any] = {}
    exec(compile(body, "cell", "exec"), namespace)
    return list(functions_of(cell, parse(cell, "w"), namespace))


def test_a_magic_cell_becomes_one_awaited_call_with_its_text() -> None:
    raw = "\n%%workflow etl --run limit=3\nasync def a(): return 'x'\n"

    transformed = AwaitedCells()(raw.splitlines(keepends=True))

    call = ast.parse("".join(transformed), mode="eval").body
    assert isinstance(call, ast.Await) and isinstance(call.value, ast.Call)
    assert ast.literal_eval(call.value.args[0]) == raw


@pytest.mark.parametrize(
    "raw", ["%%workflow?\n", "%%node??\n", "%%time\nawait x\n", "x = 1\n%%node y\n", "%%workflows x\n", "\n\n", ""]
)
def test_every_other_cell_passes_unchanged(raw: str) -> None:
    lines = raw.splitlines(keepends=True)

    assert AwaitedCells()(lines) == lines


def test_the_magics_line_and_the_bodys_first_line_are_found_below_blank_lines_and_time() -> None:
    cell = read("\n%%time\n\n%%node transform --timeout 3\nresult = 1\n")

    assert cell == Cell(
        "\n%%time\n\n%%node transform --timeout 3\nresult = 1\n", "node", "transform --timeout 3", 5, True
    )
    assert cell.body == "result = 1\n"


def test_our_line_magics_are_awaited_and_others_are_not() -> None:
    lines = [
        "get_ipython().run_line_magic('resource', 'a b')\n",
        "found = get_ipython().run_line_magic('gateway', 'runs')\n",
        "get_ipython().run_line_magic('timeit', 'x')\n",
        "    get_ipython().run_line_magic('secret', 'x')\n",
    ]

    assert awaited_lines(lines) == [
        "await get_ipython().run_line_magic('resource', 'a b')\n",
        "found = await get_ipython().run_line_magic('gateway', 'runs')\n",
        "get_ipython().run_line_magic('timeit', 'x')\n",
        "    get_ipython().run_line_magic('secret', 'x')\n",
    ]


def test_functions_are_nodes_in_the_order_written() -> None:
    assert nodes("async def b(): pass\ndef a(b): pass\nX = 1\nclass C: pass\n") == ["b", "a"]


def test_a_function_that_another_one_uses_by_name_is_a_helper() -> None:
    body = "def clean(x): return x\nasync def a(): return list(map(clean, [1]))\nasync def b(a): return [clean(i) for i in a]"

    assert nodes(body) == ["a", "b"]


def test_a_function_that_the_cells_own_statements_use_is_a_helper() -> None:
    assert nodes("def rates(): return {}\nRATES = rates()\nasync def a(): return RATES") == ["a"]


def test_a_parameter_that_is_named_like_a_node_does_not_make_it_a_helper() -> None:
    body = (
        "async def extract(): return {}\nasync def load(extract):\n    def inner(): return extract\n    return inner()"
    )

    assert nodes(body) == ["extract", "load"]


def test_a_recursive_function_is_a_node_all_the_same() -> None:
    assert nodes("def walk(n=3): return walk(n - 1) if n else 0") == ["walk"]


@pytest.mark.parametrize(
    ("body", "block"),
    [
        ("result = {'a': 1}", True),
        ("x = await y\n", True),
        ("if x:\n    result = 1\n", True),
        ("async def a():\n    result = await x\n    return result", False),
        ("import math\nN = 3\ndef a(): return N", False),
    ],
)
def test_a_block_is_told_from_a_function(body: str, block: bool) -> None:
    assert is_block(ast.parse(body)) is block


def test_a_node_cell_without_a_function_or_a_result_is_refused_with_what_it_may_hold() -> None:
    with pytest.raises(
        WorkflowDefinitionError, match="one function, or a block that sets `result`; this one holds neither"
    ):
        one_function("x", {})


def test_a_syntax_error_names_the_cells_line() -> None:
    cell = read("%%time\n%%workflow w\nx = 1\nasync def a(:\n    pass\n", "cell")
    assert cell is not None

    with pytest.raises(WorkflowDefinitionError, match=r"line 4: syntax error.*async def a\(:"):
        parse(cell, "w")
