"""Nodes and workflows are defined whole, or not at all."""

from __future__ import annotations

import pytest

from kailash_nb import Gateway, RetryPolicy, WorkflowDefinitionError
from kailash_nb.notebook.definitions import add, changed_policies, connected, define, existing
from kailash_nb.workflow import AsyncWorkflowBuilder, ErrorHandler, NodeDraft, Timeout


@pytest.fixture
def gateway() -> Gateway:
    return Gateway("definitions")


def block(name: str, source: str = "result = {'x': 1}", **rest: object) -> NodeDraft:
    return NodeDraft.block(name, source, **rest)


def test_redefining_several_nodes_of_a_workflow_is_one_new_version(gateway: Gateway) -> None:
    define(gateway, "w", [block("a"), block("b", "result = {'y': a}"), block("c", "result = {'z': b}")])
    handle = define(
        gateway,
        "w",
        [block("a", "result = {'x': 2}"), block("b", "result = {'y': [a]}"), block("c", "result = {'z': 0}")],
    )

    assert handle.number == 2
    add(gateway, block("a", "result = {'x': 3}"))
    assert gateway.workflow("w").number == 3


def test_a_definition_with_problems_changes_neither_nodes_nor_workflows(gateway: Gateway) -> None:
    define(gateway, "w", [block("a"), block("b", "result = {'y': a}")])
    nodes, version = dict(gateway.nodes), gateway.workflow("w").number

    with pytest.raises(WorkflowDefinitionError):
        define(gateway, "w", [block("a", "result = {'x': 2}"), block("b", "no result here")])
    with pytest.raises(WorkflowDefinitionError):
        add(gateway, block("a", "result = ("))

    assert (dict(gateway.nodes), gateway.workflow("w").number) == (nodes, version)


def test_a_node_that_would_break_a_workflow_that_uses_it_is_refused(gateway: Gateway) -> None:
    define(gateway, "w", [block("a"), block("b", "result = {'y': x}", connections={"x": "a.x"})])

    with pytest.raises(WorkflowDefinitionError, match="'a' has no output 'x'"):
        add(gateway, block("a", "result = {'other': 1}"))

    assert gateway.workflow("w").number == 1


async def test_a_node_of_a_workflow_that_was_registered_whole_is_replaced_and_the_rest_stays_as_it_was(
    gateway: Gateway,
) -> None:
    built = (
        AsyncWorkflowBuilder("built")
        .add_async_code("a", "result = {'x': 1}", timeout=5)
        .add_async_code("b", "result = {'y': x + 1}")
        .add_connection("a", "x", "b", "x")
        .build()
    )
    gateway.register_workflow("etl", built, description="told")
    found = existing(gateway, "b")
    assert found is not None and found.connections == {"x": "a.x"}

    add(gateway, block("b", "result = {'y': x + 10}", connections=found.connections))

    now = gateway.core.workflow("etl")
    assert (now.number, now.description, now.workflow.by_name["a"].hash) == (2, "told", built.by_name["a"].hash)
    assert (await gateway.workflow("etl")()).data == {"y": 11}
    assert "b" not in gateway.nodes


def test_connections_are_merged_removed_and_dropped_with_their_parameter() -> None:
    draft = block("n", "result = {'x': [a, b]}", connections={"a": "one.a", "gone": "one.g"})

    assert connected(draft, {"b": "two.b"}).connections == {"a": "one.a", "b": "two.b"}
    assert connected(draft, {"a": ""}).connections == {}


def test_policies_are_kept_changed_and_removed() -> None:
    given = (ErrorHandler(fallback_value=1), RetryPolicy(max_attempts=5, initial_delay=7), Timeout(3))

    assert changed_policies(given, None, None) == given
    assert changed_policies(given, 9, 1) == (given[0], RetryPolicy(max_attempts=2, initial_delay=7), Timeout(9))
    assert changed_policies(given, 0, 0) == (given[0],)
    assert changed_policies((), None, 2) == (RetryPolicy(max_attempts=3),)
