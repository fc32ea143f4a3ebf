"""Source becomes a function: names, capture, refusals, and lines that stay the author's."""

import asyncio
import contextlib
import json
import linecache
import math
import os.path
import traceback
from datetime import date

import pytest

from kailash_nb.compiler import CompiledNode, CompileError, Place, compile_block, compile_function, from_dict

RATE = 3
SIZES = {"s": 1, "m": [2, 3]}
LOCK = contextlib.ExitStack()


def rounded(amount):
    return math.floor(amount) * RATE


def twice_rounded(amount):
    return 2 * rounded(amount)


# As functions of a notebook are: nobody could import them.
rounded.__module__ = twice_rounded.__module__ = "__main__"


def run(node: CompiledNode, **given):
    return asyncio.run(node.function(**given))


def names(node: CompiledNode):
    return [p.name for p in node.parameters]


def problems_of(define) -> str:
    with pytest.raises(CompileError) as caught:
        define()
    return "\n".join(caught.value.problems)


# -------------------------------------------------------------------------------------------------------------- blocks


def test_a_block_awaits_at_top_level_and_returns_its_result():
    node = compile_block("n", "import asyncio\nawait asyncio.sleep(0)\nresult = {'sum': a + b}")
    assert names(node) == ["a", "b"]
    assert run(node, a=1, b=2) == {"sum": 3}


def test_a_block_keeps_multi_line_strings_as_they_are_even_when_it_is_indented_as_a_whole():
    node = compile_block("n", "    text = '''a\n  b'''\n    result = {'text': text}\n")
    assert run(node) == {"text": "a\n  b"}


def test_nested_functions_comprehensions_and_classes_of_a_block_see_its_inputs():
    source = """
class Row:
    limit = 2
    def keep(self, u): return u < limit
def inner():
    return [u for u in users if Row().keep(u)]
result = {"kept": inner(), "squares": {u * u for u in users}}
"""
    node = compile_block("n", source)
    assert names(node) == ["limit", "users"]
    assert run(node, users=[1, 5], limit=3) == {"kept": [1], "squares": {1, 25}}


def test_a_name_that_a_block_reads_before_it_binds_it_comes_from_outside():
    node = compile_block("n", "limit = int(limit)\ncount += 1\nresult = {'v': limit + count}")
    assert names(node) == ["count", "limit"]
    assert run(node, limit="4", count=1) == {"v": 6}


def test_names_bound_by_any_statement_of_a_block_are_not_inputs():
    source = """
import os.path as path
for i, (a, b) in enumerate([(1, 2)]):
    pass
with open(path.devnull) as handle:
    pass
try:
    1 / 0
except ZeroDivisionError as error:
    seen = str(error)
match [1, 2]:
    case [first, *rest]:
        pass
if (n := a) > 0:
    total: int = n
lambda q: q
result = {"v": [i, b, handle.closed, seen, first, rest, total]}
"""
    node = compile_block("n", source)
    assert names(node) == []
    assert run(node)["v"] == [0, 2, True, "division by zero", 1, [2], 1]


def test_a_builtin_is_an_input_only_where_it_is_connected():
    assert names(compile_block("n", "result = {'v': id}")) == []
    node = compile_block("n", "result = {'v': id}", inputs=["id"])
    assert run(node, id=7) == {"v": 7}


def test_a_block_may_use_common_modules_unimported_and_what_is_at_hand():
    node = compile_block("n", "result = {'v': json.dumps(parameters), 'k': idempotency_key, 'pi': math.pi}")
    assert names(node) == []
    assert node.at_hand == ("parameters", "idempotency_key")
    assert run(node, parameters={"a": 1}, idempotency_key="k")["v"] == '{"a": 1}'


def test_a_block_carries_imports_and_functions_of_the_notebook_but_never_its_values():
    node = compile_block(
        "n",
        "result = {'v': tr(1.5), 'b': path.basename(name)}",
        namespace={"tr": twice_rounded, "path": os.path, "name": "/a/b"},
    )
    assert names(node) == ["name"]
    assert run(node, name="/x/y") == {"v": 6, "b": "y"}


def test_a_block_can_return_its_outputs():
    assert run(compile_block("n", "if a:\n    return {'early': True}\nresult = {}"), a=1) == {"early": True}


def test_output_names_are_known_only_where_the_source_is_certain():
    assert compile_block("n", "result = {'a': 1, 'b': 2}").outputs == ("a", "b")
    assert compile_block("n", "result = {'a': 1}\nresult['b'] = 2").outputs is None
    assert compile_block("n", "result = make()").outputs is None
    assert compile_block("n", "result = {**more}").outputs is None


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("x = 1", "never sets `result`"),
        ("result = {", "line 1: syntax error"),
        ("ok = 1\nresult = [1, 2", "line 2: syntax error"),
        ("", "empty"),
        ("   \n", "empty"),
        ("global seen\nresult = {}", "line 1: `global seen`"),
        ("def f():\n    global seen\nresult = {}", "line 2: `global seen`"),
        ("yield 1\nresult = {}", "returns once"),
        ("from math import *\nresult = {}", "import *"),
        ("result = {}\nbreak", "outside loop"),
    ],
)
def test_a_block_that_cannot_run_is_refused_with_its_line(source, message):
    assert message in problems_of(lambda: compile_block("n", source))


def test_resources_that_a_block_asks_for_by_name_are_known():
    node = compile_block("n", "a = await get_resource('db')\nb = await get_resource(other)\nresult = {}")
    assert node.resources == ("db",)


def test_a_traceback_shows_the_authors_line_of_a_block():
    source = "a = 1\nresult = {'v': a / zero}"
    node = compile_block("n", source)
    with pytest.raises(ZeroDivisionError) as caught:
        run(node, zero=0)
    last = traceback.extract_tb(caught.value.__traceback__)[-1]
    assert (last.lineno, last.line) == (2, "result = {'v': a / zero}")
    assert last.filename in node.files


def test_a_block_written_in_a_cell_keeps_the_cells_file_and_line():
    node = compile_block("n", "\n1 / 0\nresult = {}", place=Place("a-cell.py", 10))
    with pytest.raises(ZeroDivisionError) as caught:
        run(node)
    last = traceback.extract_tb(caught.value.__traceback__)[-1]
    assert (last.filename, last.lineno) == ("a-cell.py", 11)


# ----------------------------------------------------------------------------------------------------------- functions


def test_a_function_carries_what_it_uses_by_source():
    async def priced(orders, day: date | None = None, limit: int = RATE):
        return {"prices": [twice_rounded(o) for o in orders][:limit], "sizes": SIZES["m"]}

    node = compile_function(priced)
    assert {c.name: c.source.split("\n")[0] for c in node.captured} == {
        "RATE": "RATE = 3",
        "math": "import math",
        "rounded": "def rounded(amount):",
        "twice_rounded": "def twice_rounded(amount):",
        "SIZES": "SIZES = {'s': 1, 'm': [2, 3]}",
        "date": "from datetime import date",
    }
    assert node.outputs == ("prices", "sizes")
    assert run(node, orders=[1.5, 2.5]) == {"prices": [6, 12], "sizes": [2, 3]}


def test_declared_types_become_json_schema():
    def typed(limit: int, day: "date", rows: list[dict[str, float]], free, shape: LOCK.__class__ = None):
        return limit

    schemas = {p.name: p.schema for p in compile_function(typed).parameters}
    assert schemas["limit"] == {"type": "integer"}
    assert schemas["day"] == {"type": "string", "format": "date"}
    assert schemas["rows"]["items"]["additionalProperties"] == {"type": "number"}
    assert schemas["free"] == {}


def test_a_node_made_from_its_json_is_equal_and_runs_without_the_notebook():
    async def priced(orders):
        return {"prices": [twice_rounded(o) for o in orders]}

    node = compile_function(priced)
    again = from_dict("priced", json.loads(json.dumps(node.to_dict())))
    assert again == node
    assert run(again, orders=[1.5]) == {"prices": [6]}


def test_a_closure_is_carried_along_by_value():
    factor = 5

    async def scaled(amount):
        return amount * factor

    assert run(compile_function(scaled), amount=2) == 10


def test_names_that_mean_two_things_are_refused():
    def make(n):
        def add(x):
            return x + n

        add.__module__ = "__main__"
        return add

    add1, add2 = make(1), make(2)

    def both():
        return [add1(10), add2(10)]

    assert "'n' means two different things" in problems_of(lambda: compile_function(both))


def test_a_set_is_spelled_in_one_order_everywhere():
    keys = {"d", "a", "c", "b"}

    def uses():
        return sorted(keys)

    assert compile_function(uses).captured[0].source == "keys = {'a', 'b', 'c', 'd'}"


def test_a_block_may_be_called_like_what_it_uses():
    assert run(compile_block("json", "result = {'v': json.dumps([1])}"))["v"] == "[1]"


@pytest.mark.parametrize(
    ("source", "inputs", "given", "value"),
    [
        (
            "data = {k: data[k] for k in 'ab'}\nresult = data",
            ["data"],
            {"data": {"a": 1, "b": 2, "c": 3}},
            {"a": 1, "b": 2},
        ),
        ("ok = any((hit := r) > 1 for r in rows)\nresult = {'hit': hit}", ["rows"], {"rows": [1, 2]}, {"hit": 2}),
        (
            "match case:\n    case {'a': x, **rest}:\n        result = {'rest': rest}",
            ["case"],
            {"case": {"a": 1, "b": 2}},
            {"rest": {"b": 2}},
        ),
        ("f = lambda y=limit: y\nlimit = 0\nresult = {'v': f()}", ["limit"], {"limit": 4}, {"v": 4}),
    ],
)
def test_a_block_reads_and_binds_names_in_pythons_order(source, inputs, given, value):
    node = compile_block("n", source)
    assert names(node) == inputs
    assert run(node, **given) == value


def test_text_after_a_dedent_is_never_dropped():
    assert "indented less" in problems_of(lambda: compile_block("n", "  result = {'a': 1}\nresult = {'a': 2}"))


def test_our_decorator_is_left_out_and_others_are_refused():
    source = "@gateway.node(users='extract.users')\nasync def f(users):\n    return users\n"
    assert from_dict("f", {"kind": "function", "source": source}).outputs is None
    refused = source.replace("gateway.node(users='extract.users')", "cached")
    assert "'cached'" in problems_of(lambda: from_dict("f", {"kind": "function", "source": refused}))


def test_every_problem_of_a_function_is_reported_at_once():
    def broken(a, get_resource):
        return [LOCK, undefinde, a]  # noqa: F821

    text = problems_of(lambda: compile_function(broken))
    assert "plain `def` cannot use a live resource" in text
    assert "'LOCK' is a live ExitStack" in text
    assert "'undefinde' is not defined" in text


def test_a_misspelled_name_gets_a_suggestion():
    def broken(orders):
        return [twice_roundet(o) for o in orders]  # noqa: F821

    assert "did you mean 'twice_rounded'?" in problems_of(lambda: compile_function(broken))


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda a: a, "lambda"),
        (len, "a node is a function"),
        (eval("lambda: 0").__class__, "a node is a function"),
    ],
)
def test_what_is_no_function_is_refused(function, message):
    assert message in problems_of(lambda: compile_function(function))


def test_star_arguments_are_refused():
    def broken(*rows, **rest):
        return rows, rest

    text = problems_of(lambda: compile_function(broken))
    assert "*rows" in text
    assert "**rest" in text


def test_await_in_a_plain_function_names_the_remedy():
    data = {"kind": "function", "source": "def f(a):\n    return await a\n"}
    assert "make it `async def`" in problems_of(lambda: from_dict("f", data))


def test_linecache_keeps_the_source_of_a_node_without_a_file():
    node = compile_block("odd name", "result = {'v': 1}")
    (filename,) = node.files
    linecache.checkcache()
    assert linecache.getline(filename, 1) == "result = {'v': 1}"
