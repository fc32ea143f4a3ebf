"""A run as a value: results, tables, errors, time, JSON."""

import pandas as pd
import pytest

from kailash_nb.exceptions import NodeError, ResourceConfigError, WorkflowError
from kailash_nb.references import ResourceReference
from kailash_nb.runs import (
    Event,
    EventKind,
    NodeStatus,
    Run,
    RunError,
    RunRecord,
    RunStart,
    RunStatus,
    WorkflowRequest,
    seconds,
)

K = EventKind


def run_of(*events, layout=("extract", "transform", "load"), last=("load",), gateway=None) -> Run:
    start = RunStart("id", "etl", "hash", {"limit": 3}, {}, {}, tuple(layout), tuple(last), 100.0, "id")
    return Run.of(RunRecord(start, events), gateway)


def done(node, value, began=100.0, ended=101.0, **facts):
    return Event(K.NODE_STARTED, began, node), Event(K.NODE_COMPLETED, ended, node, value=value, **facts)


def finished(status=RunStatus.COMPLETED, error=None, at=102.5):
    return Event(K.RUN_FINISHED, at, status=status, error=error)


def completed_run() -> Run:
    return run_of(
        *done("extract", {"users": [{"id": 1}, {"id": 2}], "count": 2}, waited=0.25),
        *done("transform", pd.DataFrame({"id": [1, 2]}), 101, 102),
        *done("load", {"loaded": 2}, 102, 102.5),
        finished(),
    )


def failed_run() -> Run:
    error = RunError(
        "transform", "KeyError", "'amount'", "cell [4]", 3, "x['amount']", KeyError("amount"), {"extract": 1}
    )
    return run_of(
        *done("extract", 1),
        Event(K.NODE_STARTED, 101, "transform"),
        Event(K.NODE_FAILED, 102, "transform", error=error),
        Event(K.NODE_SKIPPED, 102, "load"),
        finished(RunStatus.FAILED, error),
    )


def test_results_are_reached_as_the_guide_says():
    run = completed_run()
    assert run.status == "completed"
    assert run.success
    assert run.result["load"]["loaded"] == 2
    assert run["load"] == {"loaded": 2}
    assert run.data == {"loaded": 2}
    assert run.execution_time == 2.5
    assert run.error is None


def test_a_value_that_is_no_mapping_is_the_output_called_result():
    run = run_of(*done("load", 7), finished(), layout=("load",))
    assert run["load"] == 7
    assert run.result["load"]["result"] == 7


def test_outputs_of_several_last_nodes_are_merged_and_shared_names_kept_apart():
    run = run_of(*done("a", {"n": 1, "x": "a"}), *done("b", {"n": 2}), finished(), layout=("a", "b"), last=("a", "b"))
    assert run.data == {"n": {"a": 1, "b": 2}, "x": "a"}


def test_outputs_come_as_tables_when_asked():
    run = completed_run()
    assert list(run.frame("extract")["id"]) == [1, 2]
    assert list(run.frames["extract.users"]["id"]) == [1, 2]
    assert set(run.frames) == {"extract.users", "extract.count", "transform.result", "load.loaded"}
    assert run.frame() is run["transform"]  # the last node that has a table


def test_unknown_names_are_answered_with_the_known_ones():
    run = failed_run()
    with pytest.raises(KeyError, match="did you mean 'load'"):
        run["laod"]
    with pytest.raises(KeyError, match="no value in this run: it is skipped"):
        run["load"]
    with pytest.raises(KeyError, match=r"did you mean 'extract\.result'"):
        run.frames["extract.resul"]


def test_a_failed_run_says_what_where_and_what_to_do():
    run = failed_run()
    assert run.summary() == "transform failed, cell [4] line 3: KeyError: 'amount'. Inputs are kept: run.debug()"
    with pytest.raises(NodeError) as caught:
        run.raise_for_status()
    assert caught.value.run is run
    assert isinstance(caught.value.__cause__, KeyError)
    assert {n: str(r.status) for n, r in run.nodes.items()} == {
        "extract": "completed",
        "transform": "failed",
        "load": "skipped",
    }


def test_a_completed_run_is_one_line():
    assert completed_run().summary() == "etl ok 2.5 s, load loaded 2"
    assert completed_run().raise_for_status().success


def test_the_timeline_tells_where_the_time_went():
    timeline = completed_run().timeline
    assert [(e.node, e.start, e.seconds, e.waited) for e in timeline] == [
        ("extract", 0.0, 1.0, 0.25),
        ("transform", 1.0, 1.0, 0.0),
        ("load", 2.0, 0.5, 0.0),
    ]
    assert "waited 0.250 s for resources" in repr(timeline)
    assert list(timeline.frame().columns) == ["node", "status", "start", "seconds", "waited", "attempts"]


def test_a_run_under_way_is_a_run_too():
    run = run_of(Event(K.NODE_STARTED, 100.5, "extract"))
    assert run.status is RunStatus.RUNNING
    assert run.nodes["extract"].status is NodeStatus.RUNNING
    assert run.nodes["load"].status is NodeStatus.WAITING
    assert "running" in run.summary()


def test_the_json_of_a_run_has_the_six_keys_of_the_sdk():
    answer = completed_run().to_dict()
    assert set(answer) == {"request_id", "workflow_id", "status", "result", "error", "execution_time"}
    assert answer["result"] == {"load": {"loaded": 2}}  # what was asked for, not the tables on the way
    failed = failed_run().to_dict()
    assert failed["status"] == "failed"
    assert "KeyError" in failed["error"]


def test_a_run_without_its_gateway_says_so():
    with pytest.raises(WorkflowError, match="needs the gateway"):
        failed_run().debug()
    with pytest.raises(WorkflowError, match="needs the gateway"):
        failed_run().resume()


def test_a_request_takes_inputs_for_parameters():
    assert WorkflowRequest(inputs={"a": 1}).parameters == {"a": 1}
    with pytest.raises(WorkflowError, match="another spelling"):
        WorkflowRequest(parameters={"a": 1}, inputs={"a": 2})


def test_a_request_comes_from_json_and_goes_back():
    data = {"parameters": {"a": 1}, "resources": {"db": {"type": "database", "config": {"host": "h"}}, "c": "@cache"}}
    request = WorkflowRequest.from_dict(data)
    assert isinstance(request.resources["db"], ResourceReference)
    assert WorkflowRequest.from_dict(request.to_dict()) == request


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        ({"paramters": {}}, WorkflowError, "did you mean 'parameters'"),
        ({"parameters": [1]}, WorkflowError, "'parameters' is an object"),
        ({"parameters": True, "inputs": {}}, WorkflowError, "'parameters' is an object"),
        ({"inputs": [1]}, WorkflowError, "'inputs' is an object"),
        ([], WorkflowError, "a request is an object"),
        ({"resources": {"db": {"typ": "x"}}}, ResourceConfigError, "did you mean 'type'"),
    ],
)
def test_what_is_no_request_is_refused(data, error, message):
    with pytest.raises(error, match=message):
        WorkflowRequest.from_dict(data)


@pytest.mark.parametrize(
    ("duration", "text"), [(0.0031, "3.1 ms"), (0.25, "250 ms"), (1.24, "1.2 s"), (125, "2 min 5 s")]
)
def test_durations_are_readable(duration, text):
    assert seconds(duration) == text
