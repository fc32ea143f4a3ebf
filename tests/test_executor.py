"""Runs: order, concurrency, deadlines, retries, fallbacks, failure, cancellation, threads, resources."""

import asyncio
import threading
import time
import traceback
from contextlib import asynccontextmanager

import pytest

from kailash_nb import executor
from kailash_nb.exceptions import FencedError, ResourceError
from kailash_nb.executor import Plan, Work, execute
from kailash_nb.runs import Event, EventKind, NodeStatus, Run, RunRecord, RunStart
from kailash_nb.workflow import ErrorHandler, NodeDraft, RetryPolicy, Workflow, assemble, policies


class Resources:
    """Counts what is open, as the registry would see it."""

    def __init__(self):
        self.open = 0
        self.opened = 0

    @asynccontextmanager
    async def lease(self, name, waited):
        self.open += 1
        self.opened += 1
        waited(0.25)
        try:
            yield f"live {name}"
        finally:
            self.open -= 1


class Recorder:
    """Runs workflows and keeps their events, as the core does."""

    def __init__(self):
        self.events: list[Event] = []
        self.resources = Resources()

    async def record(self, event):
        self.events.append(event)

    async def run(self, workflow: Workflow, *, limit=64, done=None, **parameters) -> Run:
        start = RunStart(
            "id",
            workflow.name,
            workflow.hash,
            parameters,
            {},
            {},
            tuple(workflow.by_name),
            workflow.last,
            time.time(),
            "id",
        )
        work = Work(parameters, {"user": "ana"}, "id", self.resources.lease, self.record, done or {}, limit=limit)
        self.failure = await execute(Plan(workflow), work)
        return Run.of(RunRecord(start, tuple(self.events)))

    def kinds(self, node):
        return [e.kind for e in self.events if e.node == node]


@pytest.fixture
def recorder():
    return Recorder()


def block(name, source, connect=None, *, resources=(), **policy) -> NodeDraft:
    return NodeDraft.block(
        name, source, connections=connect or {}, policies=policies(**policy), resources=tuple(resources)
    )


def graph(*drafts, **known) -> Workflow:
    return assemble("w", drafts, **known)


def sleeper(name, seconds, connect=None):
    return block(name, f"await asyncio.sleep({seconds})\nresult = {{'v': 1}}", connect)


async def test_values_flow_along_the_wires(recorder):
    workflow = graph(
        block("a", "result = {'x': start, 'rest': 'r'}"),
        block("b", "result = {'y': x + 1}", {"x": "a.x"}),
        block("c", "result = [whole['x'], y, nothing]", {"whole": "a", "y": "b.y", "nothing": "b.result"}),
    )
    run = await recorder.run(workflow, start=41)
    assert run["c"] == [41, 42, {"y": 42}]
    assert recorder.failure is None


async def test_a_node_starts_as_soon_as_its_own_inputs_are_there_without_level_barriers(recorder):
    workflow = graph(
        sleeper("slow", 0.4),
        sleeper("quick", 0.0),
        sleeper("after_quick", 0.05, {}),
        block("end", "result = {'v': q}", {"q": "quick"}),
    )
    began = asyncio.get_running_loop().time()
    await recorder.run(workflow)
    took = asyncio.get_running_loop().time() - began
    order = [e.node for e in recorder.events if e.kind is EventKind.NODE_COMPLETED]
    assert order[-1] == "slow"
    assert took < 2 * 0.4


async def test_a_linear_stretch_costs_one_task(recorder):
    names = [f"n{i}" for i in range(20)]
    source = "import asyncio\nresult = {'task': id(asyncio.current_task())}"
    drafts = [
        block(n, source + "\nprevious" * bool(i), {"previous": f"{names[i - 1]}"} if i else {})
        for i, n in enumerate(names)
    ]
    run = await recorder.run(graph(*drafts))
    assert len({run[n]["task"] for n in names}) == 1


async def test_no_more_nodes_run_at_once_than_the_limit(recorder):
    source = "running.append(1)\npeak.append(len(running))\nawait asyncio.sleep(0.01)\nrunning.pop()\nresult = {}"
    running, peak = [], []
    await recorder.run(graph(*(block(f"n{i}", source) for i in range(20))), limit=3, running=running, peak=peak)
    assert max(peak) == 3
    assert len(peak) == 20


async def test_the_first_failure_cancels_and_awaits_its_siblings_and_skips_the_rest(recorder):
    cleaned = []
    workflow = graph(
        block("bad", "await asyncio.sleep(0.02)\n1 / 0\nresult = {}"),
        block(
            "sibling",
            "try:\n    await asyncio.sleep(30)\nfinally:\n    await asyncio.sleep(0.05)\n    cleaned.append('sibling')\nresult = {}",
        ),
        block("later", "result = {'v': s}", {"s": "sibling"}),
        block("fine", "result = {'v': 1}"),
    )
    run = await recorder.run(workflow, cleaned=cleaned)
    assert cleaned == ["sibling"]
    assert {n: str(r.status) for n, r in run.nodes.items()} == {
        "bad": "failed",
        "sibling": "cancelled",
        "later": "skipped",
        "fine": "completed",
    }
    assert recorder.failure.node == "bad"
    assert recorder.failure.type == "ZeroDivisionError"


async def test_an_error_tells_the_authors_line_and_keeps_the_inputs(recorder):
    workflow = graph(
        block("a", "result = {'rows': [1, 0]}"),
        block("b", "shares = []\nfor r in rows:\n    shares.append(1 / r)\nresult = {}", {"rows": "a.rows"}),
    )
    await recorder.run(workflow)
    error = recorder.failure
    assert (error.node, error.line, error.source) == ("b", 3, "shares.append(1 / r)")
    assert error.inputs == {"rows": [1, 0]}
    assert str(error) == "b failed, its code line 3: ZeroDivisionError: division by zero"
    ours = [f for f in traceback.extract_tb(error.exception.__traceback__) if f.filename == executor.__file__]
    assert ours == []


async def test_a_deadline_ends_an_awaiting_node(recorder):
    began = time.monotonic()
    run = await recorder.run(graph(block("slow", "await asyncio.sleep(30)\nresult = {}", timeout=0.1)))
    assert time.monotonic() - began < 10
    assert run.nodes["slow"].error.type == "NodeTimeoutError"
    assert "timeout of 0.1 s" in str(run.nodes["slow"].error)


async def test_a_node_that_never_awaits_misses_its_deadline_all_the_same(recorder):
    run = await recorder.run(
        graph(
            block(
                "busy",
                "end = time.monotonic() + 0.3\nwhile time.monotonic() < end:\n    pass\nresult = {}",
                timeout=0.1,
            )
        )
    )
    assert "make it a plain `def`" in run.nodes["busy"].error.message


async def test_a_timeout_inside_a_node_is_the_nodes_own(recorder):
    await recorder.run(
        graph(block("n", "async with asyncio.timeout(0.01):\n    await asyncio.sleep(5)\nresult = {}", timeout=60))
    )
    assert recorder.failure.type == "TimeoutError"


async def test_a_node_is_retried_until_it_succeeds(recorder):
    source = (
        "calls.append(idempotency_key)\nif len(calls) < 3:\n    raise OSError('flaky')\nresult = {'calls': len(calls)}"
    )
    calls = []
    run = await recorder.run(graph(block("n", source, retry_policy=RetryPolicy(5, initial_delay=0.01))), calls=calls)
    assert run["n"] == {"calls": 3}
    assert run.nodes["n"].attempts == 3
    assert set(calls) == {"id:n"}
    assert recorder.kinds("n") == ["node.started", "node.retry", "node.retry", "node.completed"]
    assert "attempt 1 failed (OSError: flaky); next in 0.01 s" in run.nodes["n"].notes


async def test_only_the_named_exceptions_are_retried_and_bases_count(recorder):
    source = "calls.append(1)\nraise ConnectionResetError('x') if kind == 'net' else ValueError('y')\nresult = {}"
    policy = RetryPolicy(3, initial_delay=0, retry_exceptions=("OSError",))
    calls = []
    await recorder.run(graph(block("n", source, retry_policy=policy)), calls=calls, kind="net")
    assert len(calls) == 3
    calls.clear()
    await recorder.run(graph(block("n", source, retry_policy=policy)), calls=calls, kind="value")
    assert len(calls) == 1


async def test_a_fallback_stands_in_and_the_run_says_so(recorder):
    workflow = graph(
        block(
            "rates",
            "raise OSError('down')\nresult = {}",
            retry_policy=RetryPolicy(2, 0),
            error_handler=ErrorHandler("fallback", {"rate": 1}),
        ),
        block("use", "result = {'v': rate * 2}", {"rate": "rates.rate"}),
    )
    run = await recorder.run(workflow)
    assert run["use"] == {"v": 2}
    assert run.nodes["rates"].status is NodeStatus.FALLBACK
    assert run.nodes["rates"].error.message == "down"


async def test_every_run_gets_a_fallback_of_its_own(recorder):
    workflow = graph(
        block("rates", "raise OSError('down')\nresult = {}", error_handler=ErrorHandler("fallback", {"rows": []})),
        block("use", "rows.append(1)\nresult = {'n': len(rows)}", {"rows": "rates.rows"}),
    )
    before = workflow.hash
    assert [(await recorder.run(workflow))["use"] for _ in range(2)][-1] == {"n": 1}
    assert workflow.by_name["rates"].policies[0] == ErrorHandler("fallback", {"rows": []})
    assert workflow.hash == before


async def test_a_second_cancellation_still_awaits_the_nodes(recorder):
    source = (
        "try:\n    await asyncio.sleep(30)\nfinally:\n    await asyncio.sleep(0.1)\n    cleaned.append(1)\nresult = {}"
    )
    cleaned = []
    task = asyncio.create_task(recorder.run(graph(block("n", source)), cleaned=cleaned))
    await asyncio.sleep(0.05)
    task.cancel()
    await asyncio.sleep(0.02)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert cleaned == [1]
    assert recorder.kinds("n")[-1] == "node.cancelled"


async def test_a_task_that_outlives_its_node_gets_no_resource(recorder):
    source = "async def late():\n    await asyncio.sleep(0.05)\n    await get_resource('db')\ntasks.append(asyncio.create_task(late()))\nresult = {}"
    tasks = []
    await recorder.run(graph(block("n", source)), tasks=tasks)
    with pytest.raises(ResourceError, match="has ended"):
        await tasks[0]
    assert recorder.resources.open == 0


async def test_the_timeout_counts_per_attempt(recorder):
    source = "calls.append(1)\nawait asyncio.sleep(10 if len(calls) == 1 else 0)\nresult = {'n': len(calls)}"
    run = await recorder.run(graph(block("n", source, timeout=0.1, retry_policy=RetryPolicy(2, 0))), calls=[])
    assert run["n"] == {"n": 2}


async def test_cancelling_a_run_cancels_its_nodes_and_records_it(recorder):
    task = asyncio.create_task(
        recorder.run(graph(sleeper("a", 30), sleeper("b", 30), block("c", "result = {'v': a}", {"a": "a"})))
    )
    await asyncio.sleep(0.05)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert recorder.kinds("a")[-1] == recorder.kinds("b")[-1] == "node.cancelled"
    assert recorder.kinds("c") == ["node.skipped"]
    assert [t for t in asyncio.all_tasks() if t.get_name().startswith("node:")] == []


async def test_a_node_that_ignores_its_cancellation_is_abandoned_and_said(recorder, monkeypatch):
    monkeypatch.setattr(executor, "CANCEL_GRACE", 0.1)
    stubborn = "while not stop.is_set():\n    try:\n        await asyncio.sleep(0.01)\n    except asyncio.CancelledError:\n        pass\nresult = {}"
    stop = asyncio.Event()
    await recorder.run(
        graph(block("stubborn", stubborn), block("bad", "await asyncio.sleep(0.02)\n1 / 0\nresult = {}")), stop=stop
    )
    assert "was abandoned" in next(e.note for e in recorder.events if e.node == "stubborn" and e.note)
    stop.set()
    await asyncio.sleep(0.05)


async def test_a_plain_function_runs_in_a_thread_and_does_not_block_the_loop(recorder):
    def blocking(x):
        import threading
        import time

        time.sleep(0.3)
        return {"thread": threading.get_ident(), "x": x}

    ticks = []

    async def tick():
        while True:
            ticks.append(1)
            await asyncio.sleep(0.01)

    ticker = asyncio.create_task(tick())
    run = await recorder.run(graph(NodeDraft.function("blocking", blocking)), x=1)
    ticker.cancel()
    assert run["blocking"]["thread"] != threading.get_ident()
    assert len(ticks) > 5


async def test_an_abandoned_thread_is_said_and_its_result_dropped(recorder):
    def blocking():
        import time

        time.sleep(0.5)
        return {}

    run = await recorder.run(graph(NodeDraft.function("blocking", blocking, policies=policies(timeout=0.05))))
    assert run.nodes["blocking"].error.type == "NodeTimeoutError"
    assert "thread could not be stopped" in run.nodes["blocking"].notes[0]


async def test_an_error_in_a_thread_shows_the_authors_line(recorder):
    def broken(x):
        return [1 / x]

    await recorder.run(graph(NodeDraft.function("broken", broken)), x=0)
    assert recorder.failure.source == "return [1 / x]"
    assert recorder.failure.where == "test_executor.py"


async def test_resources_are_opened_once_per_attempt_and_given_back(recorder):
    source = "one = await get_resource('db')\ntwo = await get_resource('db')\nresult = {'same': one is two, 'db': one}"
    run = await recorder.run(graph(block("n", source)))
    assert run["n"] == {"same": True, "db": "live db"}
    assert (recorder.resources.open, recorder.resources.opened) == (0, 1)
    assert run.timeline[0].waited == 0.25


async def test_a_function_gets_its_resource_as_a_parameter(recorder):
    async def count(shop_db):
        return {"db": shop_db}

    run = await recorder.run(graph(NodeDraft.function("count", count), known_resources=["shop_db"]))
    assert run["count"] == {"db": "live shop_db"}


async def test_resources_go_back_when_a_node_fails_or_is_cancelled(recorder):
    await recorder.run(
        graph(
            block("bad", "db = await get_resource('db')\nawait asyncio.sleep(0.02)\n1 / 0\nresult = {}"),
            block("waiting", "db = await get_resource('other')\nawait asyncio.sleep(30)\nresult = {}"),
        )
    )
    assert (recorder.resources.open, recorder.resources.opened) == (0, 2)


async def test_an_undeclared_resource_is_refused_with_the_declared_ones(recorder):
    await recorder.run(
        graph(block("n", "db = await get_resource(which)\nresult = {}", resources=["shop_db"])), which="shop_dv"
    )
    assert (
        "has not declared resource 'shop_dv'; did you mean 'shop_db'? (declared: shop_db)" in recorder.failure.message
    )


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("if parameters.get('x'):\n    result = {}", "ended without setting `result`"),
        ("result = {}\nraise SystemExit(3)", "3"),
        ("result = asyncio.sleep(0)", "add `await` in front of it"),
        ("raise asyncio.CancelledError('inner')\nresult = {}", "inner"),
    ],
)
async def test_a_node_that_does_not_return_fails_the_run_and_nothing_else(recorder, source, message):
    await recorder.run(graph(block("n", source)))
    assert message in recorder.failure.message
    assert recorder.kinds("n")[-1] == "node.failed"


async def test_a_missing_output_names_what_was_returned(recorder):
    workflow = graph(block("a", "result = dict(users=1, count=2)"), block("b", "result = {'v': u}", {"u": "a.usres"}))
    await recorder.run(workflow)
    assert (
        recorder.failure.message
        == "node 'a' returned no output 'usres'; did you mean 'users'? (it returned: count, users)"
    )


async def test_done_nodes_are_not_run_again(recorder):
    workflow = graph(block("a", "1 / 0\nresult = {'x': 1}"), block("b", "result = {'y': x}", {"x": "a.x"}))
    run = await recorder.run(workflow, done={"a": {"x": 5}})
    assert run["b"] == {"y": 5}
    assert run.nodes["a"].status is NodeStatus.REUSED


async def test_what_cannot_be_recorded_ends_the_run_with_that_error(recorder):
    async def refuse(event):
        if event.kind is EventKind.NODE_COMPLETED:
            raise FencedError("taken over")
        recorder.events.append(event)

    recorder.record = refuse
    with pytest.raises(FencedError):
        await recorder.run(graph(block("a", "result = {}"), sleeper("b", 30)))
    assert [t for t in asyncio.all_tasks() if t.get_name().startswith("node:")] == []


async def test_secrets_are_taken_out_of_error_messages(recorder):
    workflow = graph(block("n", "raise ValueError('password is hunter22')\nresult = {}"))
    work = Work({}, {}, "id", recorder.resources.lease, recorder.record, redact=lambda t: t.replace("hunter22", "***"))
    error = await execute(Plan(workflow), work)
    assert error.message == "password is ***"


async def test_ten_sleeps_take_one_sleeps_time(recorder):
    began = time.monotonic()
    await recorder.run(graph(*(sleeper(f"n{i}", 0.2) for i in range(10))))
    assert time.monotonic() - began < 10 * 0.2 / 2
