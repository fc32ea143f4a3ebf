"""One path for every door: requests checked down to the secret, real resources, the record, resume."""

import asyncio
import threading
import time
from contextlib import asynccontextmanager

import asyncpg
import pytest

from kailash_nb.core import Core, Principal
from kailash_nb.exceptions import (
    ParameterError,
    ResourceConfigError,
    ResourceCredentialsError,
    ResourceNotFoundError,
    WorkflowError,
    WorkflowNotFoundError,
)
from kailash_nb.references import ResourceReference
from kailash_nb.resources.registry import ResourceRegistry
from kailash_nb.runs import RunStatus, WorkflowRequest
from kailash_nb.secrets.manager import SecretManager
from kailash_nb.store.memory import MemoryStore
from kailash_nb.workflow import AsyncWorkflowBuilder, ErrorHandler

CALLER = Principal("ana", "http")
CANARY = "canary-4711-password"


@pytest.fixture
async def core(tmp_path):
    said = []
    core = Core(
        ResourceRegistry(), SecretManager(tmp_path / "secrets.db", key=bytes(32)), MemoryStore(), say=said.append
    )
    core.said = said
    yield core
    await core.close()
    await core.secrets.close()


@pytest.fixture
def database(services):
    """The config of a reference to the embedded PostgreSQL, and its login, as for any other server."""
    address = services.postgres
    config = {"host": address.host, "port": address.port, "database": "postgres"}
    return config, {"user": address.user, "password": address.password}


@asynccontextmanager
async def databases(services, *names):
    """Databases that exist for one test."""
    address = services.postgres
    admin = await asyncpg.connect(
        host=address.host, port=address.port, user=address.user, password=address.password, database="postgres"
    )
    try:
        for name in names:
            await admin.execute(f'create database "{name}"')
        yield
    finally:
        for name in names:
            await admin.execute(f'drop database "{name}" with (force)')
        await admin.close()


def workflow(*nodes, name="w", connections=()):
    builder = AsyncWorkflowBuilder(name)
    for node_id, source, *options in nodes:
        builder.add_async_code(node_id, source, **(options[0] if options else {}))
    for connection in connections:
        builder.add_connection(*connection)
    return builder.build()


ASK = "db = await get_resource('db')\nresult = {'v': await db.fetchval(sql)}"


async def ask(core, sql="select 42", **request):
    core.register("ask", workflow(("ask", ASK), name="ask"))
    return await core.execute("ask", WorkflowRequest({"sql": sql}, **request))


async def test_a_workflow_runs_on_a_real_database_with_its_secret(core, database):
    config, login = database
    await core.secrets.store_secret("login", login)
    core.register_resource("db", ResourceReference("database", config, "login"))
    run = await ask(core)
    assert run["ask"] == {"v": 42}
    assert (await core.run(run.id)).result == run.result
    assert any("'login' is now bound to database" in line for line in core.said)


async def test_two_tenants_with_one_resource_name_at_once_never_share_a_pool(core, services, database):
    config, login = database
    await core.secrets.store_secret("login", login)
    async with databases(services, "tenant_a", "tenant_b"):
        references = {
            t: ResourceReference("database", {**config, "database": t}, "login") for t in ("tenant_a", "tenant_b")
        }
        runs = await asyncio.gather(
            *(
                ask(core, "select current_database() || pg_sleep(0.01)::text", resources={"db": references[tenant]})
                for tenant in ("tenant_a", "tenant_b") * 10
            )
        )
        assert [r["ask"]["v"] for r in runs] == ["tenant_a", "tenant_b"] * 10
        await core.resources.close()


async def test_what_never_started_raises_and_names_what_is_known(core, database):
    config, _ = database
    core.register("ask", workflow(("ask", ASK)))
    with pytest.raises(WorkflowNotFoundError, match=r"no workflow 'aks'; did you mean 'ask'\?"):
        await core.execute("aks", WorkflowRequest())
    with pytest.raises(ParameterError, match="'sql' is missing"):
        await core.execute("ask", WorkflowRequest())
    with pytest.raises(ResourceNotFoundError, match=r"no resource 'db'.*register it with"):
        await core.execute("ask", WorkflowRequest({"sql": ""}))
    core.register_resource("dbs", ResourceReference("database", {**config, "user": "x"}))
    with pytest.raises(ResourceNotFoundError, match="did you mean 'dbs'"):
        await core.execute("ask", WorkflowRequest({"sql": ""}))
    with pytest.raises(ResourceNotFoundError, match="'sdb'"):
        await core.execute("ask", WorkflowRequest({"sql": ""}, {"db": "@sdb"}))
    with pytest.raises(ResourceConfigError, match="did you mean 'host'"):
        await core.execute("ask", WorkflowRequest({"sql": ""}, {"db": ResourceReference("database", {"hots": "x"})}))
    with pytest.raises(ResourceNotFoundError, match="did you mean 'database'"):
        core.register_resource("db", ResourceReference("databas", {}))
    with pytest.raises(ResourceCredentialsError, match="needs secret 'nobody', which is not stored"):
        await core.execute("ask", WorkflowRequest({"sql": ""}, {"db": ResourceReference("database", config, "nobody")}))
    assert await core.runs() == []


async def test_a_wrong_password_fails_the_run_in_time_and_shows_no_secret(core, database):
    config, login = database
    await core.secrets.store_secret("login", {**login, "password": CANARY})
    core.register_resource("db", ResourceReference("database", config, "login"))
    began = time.monotonic()
    run = await ask(core)
    assert time.monotonic() - began < 10
    assert run.status is RunStatus.FAILED
    assert run.error.type == "ResourceUnavailableError"
    assert "login" in run.error.message
    assert CANARY not in f"{run!r}{run.to_dict()}{core.health()}{core!r}{run.error.exception!r}"
    await core.secrets.store_secret("login", login)
    assert (await ask(core))["ask"] == {"v": 42}


async def test_an_unreachable_server_fails_the_run_in_time_and_others_go_on(core, database):
    config, login = database
    await core.secrets.store_secret("login", login)
    core.register_resource("db", ResourceReference("database", config, "login"))
    nowhere = ResourceReference("database", {**config, "port": 1}, "login")
    began = time.monotonic()
    failed, fine = await asyncio.gather(ask(core, resources={"db": nowhere}), ask(core))
    assert time.monotonic() - began < 12
    assert failed.error.type == "ResourceUnavailableError"
    assert "127.0.0.1:1" in failed.error.message
    assert fine.success


async def test_a_sql_error_leaves_the_pool_usable(core, database):
    config, login = database
    await core.secrets.store_secret("login", login)
    core.register_resource("db", ResourceReference("database", config, "login"))
    run = await ask(core, 'select * from "user_that_is_not"')
    assert (run.error.type, run.error.line) == ("UndefinedTableError", 2)
    assert (await ask(core))["ask"] == {"v": 42}


async def test_cancelling_a_run_cancels_its_query_and_keeps_the_pool(core, database):
    config, login = database
    await core.secrets.store_secret("login", login)
    core.register_resource("db", ResourceReference("database", config, "login"))
    assert (await ask(core))["ask"] == {"v": 42}
    task = asyncio.create_task(ask(core, "select pg_sleep(30)"))
    await asyncio.sleep(0.3)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    active = "select count(*) from pg_stat_activity where query like 'select pg_sleep(30)%' and state = 'active'"
    async with asyncio.timeout(10):  # a third of what the query would take
        while (await ask(core, active))["ask"] != {"v": 0}:
            await asyncio.sleep(0.02)
    assert len(await core.runs(status=RunStatus.CANCELLED)) == 1


async def test_the_same_core_serves_two_event_loops_with_pools_of_their_own(core, database):
    config, login = database
    await core.secrets.store_secret("login", login)
    core.register_resource("db", ResourceReference("database", {**config, "max_pool_size": 2}, "login"))
    found, errors = [], []

    def other_loop():
        async def many():
            try:
                found.extend([(await ask(core, "select pg_backend_pid()"))["ask"]["v"] for _ in range(5)])
            finally:
                await core.close_loop()

        try:
            asyncio.run(many())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=other_loop)
    thread.start()
    here = [(await ask(core, "select pg_backend_pid()"))["ask"]["v"] for _ in range(5)]
    await asyncio.to_thread(thread.join)
    assert errors == []
    assert set(here).isdisjoint(found)
    assert (await ask(core))["ask"] == {"v": 42}


async def test_a_caller_uses_a_secret_only_for_what_it_is_bound_to(core, database):
    config, login = database
    await core.secrets.store_secret("login", login)
    core.register_resource("db", ResourceReference("database", config, "login"))
    core.register("ask", workflow(("ask", ASK)))
    run = await core.execute("ask", WorkflowRequest({"sql": "select 1"}), principal=CALLER)
    assert run.success
    bound = ResourceReference("database", {**config, "application_name": "ana"}, "login")
    assert (await core.execute("ask", WorkflowRequest({"sql": "select 1"}, {"db": bound}), principal=CALLER)).success
    answers = set()
    for host, secret in (("127.0.0.2", "login"), ("127.0.0.2", "no_such_secret"), (config["host"], "no_such_secret")):
        elsewhere = ResourceReference("database", {**config, "host": host}, secret)
        with pytest.raises(ResourceCredentialsError) as caught:
            await core.execute("ask", WorkflowRequest({"sql": "select 1"}, {"db": elsewhere}), principal=CALLER)
        answers.add(str(caught.value))
    assert len(answers) == 1  # a caller does not learn which secrets there are


async def test_a_new_version_leaves_runs_under_way_alone_and_the_same_content_is_none(core):
    slow = workflow(("n", "await gate.wait()\nresult = {'v': 1}"))
    gate = asyncio.Event()
    assert core.register("w", slow).number == 1
    assert core.register("w", workflow(("n", "await gate.wait()\nresult = {'v': 1}"))).number == 1
    task = asyncio.create_task(core.execute("w", WorkflowRequest({"gate": gate})))
    await asyncio.sleep(0.02)
    assert core.register("w", workflow(("n", "await gate.wait()\nresult = {'v': 2}"))).number == 2
    gate.set()
    assert (await task)["n"] == {"v": 1}
    assert (await core.execute("w", WorkflowRequest({"gate": gate})))["n"] == {"v": 2}


FIRST = ("first", "calls.append('first')\nresult = {'rows': [2, 0], 'key': idempotency_key}")
BROKEN = ("second", "calls.append('second')\nresult = {'v': [1 / r for r in rows], 'key': idempotency_key}")
MENDED = ("second", "calls.append('mended')\nresult = {'v': [1 / r for r in rows if r], 'key': idempotency_key}")
WIRED = [("first", "rows", "second", "rows")]


async def test_a_mended_run_resumes_from_where_it_stopped(core):
    calls = []
    core.register("w", workflow(FIRST, BROKEN, connections=WIRED))
    failed = await core.execute("w", WorkflowRequest({"calls": calls}))
    assert failed.error.inputs["rows"] == [2, 0]
    core.register("w", workflow(FIRST, MENDED, connections=WIRED))
    run = await core.resume(failed)
    assert calls == ["first", "second", "mended"]
    assert run["second"]["v"] == [0.5]
    assert (run.resumes, run.root, run.nodes["first"].status) == (failed.id, failed.id, "reused")
    assert run["second"]["key"] == f"{failed.id}:second"
    assert (await core.run(failed.id)).status is RunStatus.FAILED


async def test_a_resume_uses_the_resource_as_it_is_registered_now(core, database):
    config, login = database
    await core.secrets.store_secret("login", login)
    core.register_resource("db", ResourceReference("database", {**config, "port": 1}, "login"))
    failed = await ask(core)
    assert failed.error.type == "ResourceUnavailableError"
    core.register_resource("db", ResourceReference("database", config, "login"))
    assert (await core.resume(failed))["ask"] == {"v": 42}


async def test_a_misspelled_resource_of_a_request_is_not_ignored(core, database):
    config, login = database
    await core.secrets.store_secret("login", login)
    core.register_resource("db", ResourceReference("database", config, "login"))
    other = ResourceReference("database", {**config, "database": "template1"}, "login")
    with pytest.raises(ResourceNotFoundError, match="did you mean 'db'"):
        await ask(core, resources={"dbb": other})
    assert (await ask(core, resources={"external_api": other})).success


async def test_what_depends_on_a_changed_node_runs_again(core):
    calls = []
    core.register("w", workflow(FIRST, BROKEN, connections=WIRED))
    failed = await core.execute("w", WorkflowRequest({"calls": calls}))
    changed = ("first", "calls.append('changed')\nresult = {'rows': [4], 'key': 1}")
    core.register("w", workflow(changed, BROKEN, connections=WIRED))
    run = await core.resume(failed)
    assert calls == ["first", "second", "changed", "second"]
    assert run["second"]["v"] == [0.25]


async def test_a_fallback_is_not_reused_by_a_resume(core):
    flaky = (
        "n",
        "calls.append(1)\nif len(calls) == 1:\n    raise OSError('x')\nresult = {'v': 2}",
        {"error_handler": ErrorHandler("fallback", {"v": 0})},
    )
    core.register("w", workflow(flaky))
    run = await core.execute("w", WorkflowRequest({"calls": []}))
    assert run["n"] == {"v": 0}
    assert (await core.resume(run))["n"] == {"v": 2}


async def test_a_run_under_way_is_not_resumed(core):
    core.register("w", workflow(("n", "await gate.wait()\nresult = {}")))
    gate = asyncio.Event()
    task = asyncio.create_task(core.execute("w", WorkflowRequest({"gate": gate})))
    await asyncio.sleep(0.02)
    (running,) = await core.runs()
    with pytest.raises(WorkflowError, match="still under way"):
        await core.resume(running)
    gate.set()
    await task


async def test_observers_see_every_event_and_cannot_break_a_run(core, caplog):
    core.register("w", workflow(("n", "result = {}")))
    seen = []

    def observer(event):
        seen.append(str(event.kind))
        raise RuntimeError("observer")

    assert (await core.execute("w", WorkflowRequest(), observer=observer)).success
    assert seen == ["run.started", "node.started", "node.completed", "run.finished"]
    assert "an observer of run" in caplog.text


async def test_check_connects_to_every_resource_and_reports_failures(core, database):
    config, login = database
    await core.secrets.store_secret("login", login)
    core.register_resource("good", ResourceReference("database", config, "login"))
    core.register_resource("unreachable", ResourceReference("database", {**config, "port": 1}, "login"))
    core.register_resource("without_secret", ResourceReference("database", config, "nobody"))
    results = {r.name: r for r in await core.check()}
    assert results["good"].status == "healthy"
    assert results["good"].version.startswith("PostgreSQL")
    assert results["unreachable"].status == "unhealthy"
    assert "'nobody', which is not stored" in results["without_secret"].error
