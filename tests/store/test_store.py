"""What every run store does, whichever it is."""

import asyncio
import threading

import pytest

from kailash_nb.exceptions import FencedError, RunNotFoundError, StoreError
from kailash_nb.runs import Event, EventKind, RunStart, RunStatus
from kailash_nb.store.memory import MemoryStore


@pytest.fixture
def store():
    return MemoryStore()


def start(run_id="r1", workflow="etl", at=1.0) -> RunStart:
    return RunStart(run_id, workflow, "hash", {}, {}, {}, ("a", "b"), ("b",), at, run_id)


def completed(node, value=None) -> Event:
    return Event(EventKind.NODE_COMPLETED, 2.0, node, value=value)


def finished(status=RunStatus.COMPLETED) -> Event:
    return Event(EventKind.RUN_FINISHED, 3.0, status=status)


async def test_a_record_comes_back_as_it_was_written(store):
    lease = await store.start(start(), "me")
    await store.append(lease, completed("a", {"x": 1}))
    record = await store.load("r1")
    assert record.start == start()
    assert [(e.kind, e.node, e.value) for e in record.events] == [("node.completed", "a", {"x": 1})]


async def test_an_owner_that_lost_its_run_cannot_record(store):
    first = await store.start(start(), "first")
    second = await store.claim("r1", "second")
    assert second.epoch == first.epoch + 1
    with pytest.raises(FencedError, match="no longer 'first'"):
        await store.append(first, completed("a"))
    await store.append(second, completed("a"))
    assert len((await store.load("r1")).events) == 1


async def test_a_recorded_value_never_changes(store):
    lease = await store.start(start(), "me")
    await store.append(lease, completed("a", 1))
    with pytest.raises(StoreError, match="already holds a value of node 'a'"):
        await store.append(lease, completed("a", 2))
    assert (await store.load("r1")).events[0].value == 1


async def test_a_finished_run_takes_no_more_events_and_cannot_be_claimed(store):
    lease = await store.start(start(), "me")
    await store.append(lease, finished())
    with pytest.raises(FencedError, match="completed"):
        await store.append(lease, completed("a"))
    with pytest.raises(FencedError, match="finished"):
        await store.claim("r1", "you")


async def test_an_id_is_used_once(store):
    await store.start(start(), "me")
    with pytest.raises(StoreError, match="already a run 'r1'"):
        await store.start(start(), "me")


@pytest.mark.parametrize("method", ["load", "claim"])
async def test_an_unknown_run_is_said(store, method):
    with pytest.raises(RunNotFoundError, match="no run 'nope'"):
        await (store.load("nope") if method == "load" else store.claim("nope", "me"))


async def test_runs_are_listed_newest_first_and_narrowed_down(store):
    for i, workflow in enumerate(["etl", "other", "etl"]):
        lease = await store.start(start(f"r{i}", workflow, at=i), "me")
        await store.append(lease, finished(RunStatus.FAILED if i == 0 else RunStatus.COMPLETED))
    assert [r.start.id for r in await store.list()] == ["r2", "r1", "r0"]
    assert [r.start.id for r in await store.list("etl")] == ["r2", "r0"]
    assert [r.start.id for r in await store.list(status=RunStatus.FAILED)] == ["r0"]
    assert [r.start.id for r in await store.list(limit=1)] == ["r2"]


async def test_one_store_serves_several_event_loops_at_once(store):
    def work(prefix):
        async def many():
            for i in range(100):
                lease = await store.start(start(f"{prefix}{i}"), "me")
                await store.append(lease, completed("a", i))
                await store.append(lease, finished())

        asyncio.run(many())

    threads = [threading.Thread(target=work, args=(p,)) for p in "abc"]
    for thread in threads:
        thread.start()
    for thread in threads:
        await asyncio.to_thread(thread.join)
    assert len(await store.list(limit=1000)) == 300


async def test_memory_keeps_the_newest_runs_and_every_unfinished_one():
    store = MemoryStore(max_runs=3)
    await store.start(start("under-way"), "me")
    for i in range(10):
        await store.append(await store.start(start(f"r{i}"), "me"), finished())
    assert [r.start.id for r in await store.list()] == ["r9", "r8", "r7", "under-way"]


async def test_memory_forgets_in_the_order_of_ending():
    store = MemoryStore(max_runs=2)
    long = await store.start(start("long"), "me")
    for i in range(5):
        await store.append(await store.start(start(f"r{i}"), "me"), finished())
    await store.append(long, finished())
    assert (await store.load("long")).start.id == "long"


async def test_memory_lets_go_of_big_values_first_come_first_gone():
    store = MemoryStore(max_bytes=2_000_000)
    for i in range(5):
        lease = await store.start(start(f"r{i}"), "me")
        await store.append(lease, completed("a", b"x" * 900_000))
        await store.append(lease, finished())
    assert [r.start.id for r in await store.list()] == ["r4", "r3"]
