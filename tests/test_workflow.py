"""Definitions: the builder, wiring, all problems at once, JSON and back, the content hash."""

import json

import pytest

from kailash_nb.exceptions import ParameterError, WorkflowDefinitionError, WorkflowError
from kailash_nb.workflow import (
    AsyncWorkflowBuilder,
    ErrorHandler,
    NodeDraft,
    RetryPolicy,
    Workflow,
    assemble,
    upstream_of,
)


def pipeline() -> AsyncWorkflowBuilder:
    return (
        AsyncWorkflowBuilder("pipeline", description="users, in capitals")
        .add_async_code("extract", "db = await get_resource('source')\nresult = {'users': await db.fetch('select 1')}")
        .add_async_code(
            "transform",
            "result = {'names': [u.upper() for u in users][:limit]}",
            timeout=5,
            retry_policy=RetryPolicy(max_attempts=2, initial_delay=0.1),
            error_handler=ErrorHandler("fallback", {"names": []}),
        )
        .add_connection("extract", "users", "transform", "users")
    )


def problems(builder: AsyncWorkflowBuilder) -> str:
    with pytest.raises(WorkflowDefinitionError) as caught:
        builder.build()
    return "\n".join(caught.value.problems)


def drafts(*functions, **connections) -> list[NodeDraft]:
    return [NodeDraft.function(f.__name__, f, connections=connections.get(f.__name__, {})) for f in functions]


async def extract(shop_db, limit: int = 100):
    return {"users": [limit]}


async def transform(extract):
    return {"names": extract}


async def load(transform, extract):
    return len(transform)


def test_the_builder_wires_connections_and_leaves_the_rest_as_parameters():
    workflow = pipeline().build()
    assert workflow.wiring() == "extract(source: resource)\ntransform(limit, users <- extract.users)"
    assert list(workflow.parameters) == ["limit"]
    assert workflow.resources == ("source",)
    assert workflow.last == ("transform",)


def test_functions_are_wired_by_their_parameter_names():
    workflow = assemble("etl", drafts(load, extract, transform), known_resources=["shop_db"])
    assert [n.name for n in workflow.nodes] == ["extract", "transform", "load"]
    assert workflow.wiring().splitlines() == [
        "extract(shop_db: resource, limit = 100)",
        "transform(extract <- extract)",
        "load(transform <- transform, extract <- extract)",
    ]
    assert not workflow.parameters["limit"].required


def test_a_name_that_no_resource_has_is_a_parameter_and_stays_one():
    workflow = assemble("etl", drafts(extract))
    assert workflow.parameters["shop_db"].required
    assert workflow.resources == ()


def test_a_workflow_survives_json_and_keeps_its_hash():
    workflow = pipeline().build()
    again = Workflow.from_json(workflow.to_json())
    assert again == workflow
    assert again.hash == workflow.hash == pipeline().build().hash
    assert again.by_name["transform"].policies == workflow.by_name["transform"].policies


def test_the_order_of_writing_is_no_part_of_the_version():
    one, other = assemble("w", drafts(extract, transform, load)), assemble("w", drafts(load, transform, extract))
    assert one.hash == other.hash


def test_any_change_of_code_wiring_or_policy_changes_the_hash():
    base = pipeline().build().hash
    changed = json.loads(pipeline().build().to_json())
    for edit in (
        lambda d: d["nodes"][1].update(source="result = {'names': users, 'l': limit}"),
        lambda d: d["nodes"][1]["policies"].pop(),
        lambda d: d["nodes"][0].update(resources=["source", "other"]),
        lambda d: d.update(name="other"),
    ):
        data = json.loads(json.dumps(changed))
        edit(data)
        assert Workflow.from_dict(data).hash != base


def test_all_problems_of_a_definition_are_reported_at_once_with_suggestions():
    builder = (
        AsyncWorkflowBuilder("bad name!")
        .add_async_code("extract", "result = {'users': [1]}")
        .add_async_code("extract", "result = {}")
        .add_async_code("transform", "names = [")
        .add_async_code("load", "loaded = transformed", timeout=-1)
        .add_connection("extract", "usres", "load", "transformed")
        .add_connection("extrct", "users", "load", "other")
        .add_connection("extract", "users", "laod", "x")
    )
    text = problems(builder)
    for expected in (
        "a workflow's name is letters",
        "two nodes called 'extract'",
        "'transform': line 1: syntax error",
        "'load': it never sets `result`",
        "'load': a timeout is a number of seconds above 0",
        "no node 'laod'; did you mean 'load'?",
        "which is no node; did you mean 'extract'?",
    ):
        assert expected in text


def test_an_unknown_output_is_reported_where_the_outputs_are_known():
    builder = (
        AsyncWorkflowBuilder("w")
        .add_async_code("extract", "result = {'users': [1]}")
        .add_async_code("load", "result = {'n': len(users)}")
        .add_connection("extract", "usres", "load", "users")
    )
    assert "'extract' has no output 'usres'; did you mean 'users'?" in problems(builder)


def test_the_whole_value_is_the_output_called_result():
    builder = (
        AsyncWorkflowBuilder("w")
        .add_async_code("extract", "result = {'users': [1]}")
        .add_async_code("load", "result = {'n': everything['users']}")
        .add_connection("extract", "result", "load", "everything")
    )
    assert str(builder.build().by_name["load"]) == "load(everything <- extract.result)"


def test_an_input_connected_twice_is_refused():
    assert "connected twice" in problems(pipeline().add_connection("extract", "result", "transform", "users"))


def test_a_function_has_no_other_inputs_than_its_parameters():
    builder = AsyncWorkflowBuilder("w").add_function(extract).add_function(transform)
    assert "'transform' has no parameter 'extrct'; did you mean 'extract'?" in problems(
        builder.add_connection("extract", "users", "transform", "extrct")
    )


def test_a_cycle_names_its_path():
    async def first(second):
        return second

    async def second(first):
        return first

    with pytest.raises(
        WorkflowDefinitionError, match=r"in a circle: (first -> second -> first|second -> first -> second)"
    ):
        assemble("w", drafts(first, second))


def test_a_name_that_is_both_node_and_resource_must_be_connected():
    with pytest.raises(WorkflowDefinitionError, match="could be the node or the resource"):
        assemble("w", drafts(extract, transform), known_resources=["shop_db", "extract"])
    wired = assemble("w", drafts(extract, transform, transform={"extract": "extract"}), known_resources=["extract"])
    assert wired.by_name["transform"].upstream == ("extract",)


def test_a_plain_function_cannot_take_a_live_resource():
    def count(shop_db):
        return 1

    with pytest.raises(WorkflowDefinitionError, match="make it `async def`"):
        assemble("w", drafts(count), known_resources=["shop_db"])


def test_one_parameter_has_one_type():
    async def one(limit: int):
        return limit

    async def two(limit: str):
        return limit

    with pytest.raises(WorkflowDefinitionError, match="int in 'one' and str in 'two'"):
        assemble("w", drafts(one, two))


def test_only_what_is_upstream_belongs_to_a_workflow():
    async def other(extract):
        return extract

    everything = {d.name: d for d in drafts(extract, transform, load, other)}
    assert [d.name for d in upstream_of(["load"], everything)] == ["extract", "transform", "load"]
    with pytest.raises(WorkflowError, match="did you mean 'load'"):
        upstream_of(["laod"], everything)


def test_parameters_are_converted_and_all_that_is_wrong_is_said():
    async def report(day: "date", limit: int = 10, name: str = "x"):  # noqa: F821
        return day

    source = {"kind": "function", "source": "async def report(day: date, limit: int = 10):\n    return day\n"}
    source["captured"] = [{"name": "date", "source": "from datetime import date"}]
    node = {"name": "report", "wires": [["day", "parameter", "day", None], ["limit", "parameter", "limit", None]]}
    node |= {"policies": [], "resources": [], "description": None, **source}
    workflow = Workflow.from_dict({"format": 1, "name": "w", "description": None, "nodes": [node]})
    assert workflow.check_parameters({"day": "2026-03-01"})["day"].isoformat() == "2026-03-01"
    assert workflow.schema["required"] == ["day"]
    with pytest.raises(ParameterError) as caught:
        workflow.check_parameters({"dya": "2026-03-01", "limit": "many"})
    assert "'day' is missing (asked for by report); did you mean 'dya'?" in str(caught.value)
    assert "'limit' does not fit: expected `int`, got `str`" in str(caught.value)


def test_a_near_miss_of_an_optional_parameter_is_not_swallowed():
    workflow = assemble("etl", drafts(extract), known_resources=["shop_db"])
    with pytest.raises(ParameterError, match=r"no parameter 'limt'; did you mean 'limit'?"):
        workflow.check_parameters({"limt": 5})
    assert workflow.check_parameters({"quite_different": 5}) == {"quite_different": 5}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RetryPolicy(max_attempts=0), "at least 1"),
        (lambda: RetryPolicy(initial_delay=-1), "at least 0"),
        (lambda: RetryPolicy(retry_exceptions="OSError"), "a list"),
        (lambda: ErrorHandler("falback"), "did you mean 'fallback'"),
        (lambda: ErrorHandler("fallback", object()), "JSON value"),
    ],
)
def test_a_policy_that_cannot_act_is_refused(make, message):
    with pytest.raises(WorkflowError, match=message):
        make()


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 2}', '{"format": 1, "nodes": [{}]}'])
def test_what_is_no_workflow_is_refused(text):
    with pytest.raises(WorkflowDefinitionError):
        Workflow.from_json(text)


def test_an_empty_builder_says_so():
    assert "it has no nodes" in problems(AsyncWorkflowBuilder("w"))
