"""The object people hold: nodes, handles, the guide's methods."""

import asyncio
import gc
import logging

import pytest

from kailash_nb.exceptions import NodeError, WorkflowDefinitionError, WorkflowError
from kailash_nb.gateway import Gateway, create_gateway, current
from kailash_nb.references import ResourceReference
from kailash_nb.runs import WorkflowRequest
from kailash_nb.secrets.manager import SecretManager
from kailash_nb.workflow import AsyncWorkflowBuilder, RetryPolicy


@pytest.fixture
async def secrets(tmp_path):
    manager = SecretManager(tmp_path / "secrets.db", key=bytes(32))
    yield manager
    await manager.close()


@pytest.fixture
async def gateway(secrets):
    gateway = Gateway("test", secrets=secrets)
    yield gateway
    await gateway.shutdown()


def define(gateway, divisor=2):
    @gateway.node
    async def extract(limit: int = 3):
        """Numbers up to a limit."""
        return {"numbers": list(range(limit))}

    @gateway.node(numbers="extract.numbers", retry_policy=RetryPolicy(2, 0))
    def halve(numbers):
        return [n / divisor for n in numbers]

    return extract, halve


async def test_decorated_functions_stay_plain_and_become_a_callable_workflow(gateway):
    _, halve = define(gateway)
    assert halve([4]) == [2.0]
    etl = gateway.workflow("etl", halve)
    run = await etl(limit=2)
    assert run["halve"] == [0.0, 0.5]
    assert repr(etl) == "etl v1\nextract(limit = 3)\nhalve(numbers <- extract.numbers)"
    assert etl.workflow.by_name["extract"].description == "Numbers up to a limit."


async def test_a_failing_run_raises_an_error_that_carries_it(gateway):
    _, halve = define(gateway, divisor=0)
    etl = gateway.workflow("etl", halve)
    with pytest.raises(NodeError, match=r"halve failed, test_gateway\.py line \d+: ZeroDivisionError") as caught:
        await etl()
    assert caught.value.node == "halve"
    session = caught.value.run.debug()
    assert dict(session.inputs) == {"numbers": [0, 1, 2]}
    assert "return [n / divisor for n in numbers]" in session.source


async def test_mending_a_node_renews_its_workflows_and_the_run_resumes(gateway):
    _, halve = define(gateway, divisor=0)
    etl = gateway.workflow("etl", halve)
    with pytest.raises(NodeError) as caught:
        await etl()
    define(gateway, divisor=4)
    assert etl.number == 2
    run = await caught.value.run.resume()
    assert run["halve"] == [0.0, 0.25, 0.5]
    assert run.nodes["extract"].status == "reused"


async def test_defining_the_same_again_changes_nothing(gateway, monkeypatch):
    _, halve = define(gateway)
    gateway.workflow("etl", halve)
    _, halve = define(gateway)
    assert gateway.workflow("etl", halve).number == 1


async def test_a_workflow_that_a_new_node_does_not_fit_keeps_its_version(gateway, caplog):
    _, halve = define(gateway)
    etl = gateway.workflow("etl", halve)
    with caplog.at_level(logging.INFO, logger="kailash_nb"):

        @gateway.node
        async def extract():
            return {"nmbers": []}

    assert etl.number == 1
    assert "etl stays v1" in caplog.text
    assert "did you mean 'nmbers'" in caplog.text


async def test_a_run_that_is_not_awaited_says_so(gateway):
    _, halve = define(gateway)
    etl = gateway.workflow("etl", halve)
    assert "add `await`" in repr(etl(limit=1))
    assert await gateway.runs.list() == []


async def test_what_is_no_node_is_said(gateway):
    def plain():
        return 1

    with pytest.raises(WorkflowError, match="is not a node of this gateway"):
        gateway.workflow("etl", plain)
    with pytest.raises(WorkflowError, match="no node 'halv'"):
        gateway.workflow("etl", "halv")
    with pytest.raises(WorkflowError, match="goes on a function"):
        gateway.node(42)


async def test_the_guides_pipeline_runs_as_printed(gateway, services):
    """The workflow of the ordered guide, its names and its spelling, on real servers."""
    address, cache = services.postgres, services.valkey
    await gateway.secret_manager.store_secret(
        "db_creds", {"user": address.user, "password": address.password}, encrypt=True
    )
    await gateway.secret_manager.store_secret("cache_creds", {"password": cache.password})
    workflow = (
        AsyncWorkflowBuilder("data_pipeline")
        .add_async_code(
            "extract",
            """
# Get database resource
db = await get_resource("source_db")

# Use with async context manager
async with db.acquire() as conn:
    data = await conn.fetch("SELECT * FROM (VALUES (1, 'ana', 'A@X'), (2, 'bo', 'B@X')) AS users(id, name, email)")
    result = {"users": [dict(row) for row in data]}
""",
            required_resources=["source_db"],
        )
        .add_async_code(
            "transform",
            """
# Transform user data
transformed = []
for user in users:
    transformed.append({
        "id": user["id"],
        "name": user["name"].upper(),
        "email": user["email"].lower(),
        "active": True
    })
result = {"transformed": transformed}
""",
        )
        .add_async_code(
            "load",
            """
# Get cache resource
cache = await get_resource("result_cache")

# Store transformed data
import json
for user in transformed:
    key = f"user:{user['id']}"
    value = json.dumps(user)
    await cache.setex(key, 3600, value)

result = {"loaded": len(transformed)}
""",
            required_resources=["result_cache"],
        )
        .add_connection("extract", "users", "transform", "users")
        .add_connection("transform", "transformed", "load", "transformed")
        .build()
    )
    gateway.register_workflow(
        "data_pipeline",
        workflow,
        required_resources=["source_db", "result_cache"],
        description="ETL pipeline for user data",
    )
    request = WorkflowRequest(
        parameters={"limit": 100},
        resources={
            "source_db": ResourceReference(
                type="database",
                config={"host": address.host, "port": address.port, "database": "postgres"},
                credentials_ref="db_creds",
            ),
            "result_cache": ResourceReference(
                type="cache", config={"host": cache.host, "port": cache.port}, credentials_ref="cache_creds"
            ),
        },
        context={"user": "data_engineer", "environment": "production"},
    )
    response = await gateway.execute_workflow("data_pipeline", request)
    assert response.status == "completed", response.error
    assert response.result["load"]["loaded"] == 2
    assert response.execution_time > 0
    assert response["transform"]["transformed"][0] == {"id": 1, "name": "ANA", "email": "a@x", "active": True}


async def test_health_has_the_guides_shape(gateway, services):
    address = services.postgres
    await gateway.secret_manager.store_secret("db_creds", {"user": address.user, "password": address.password})
    config = {"host": address.host, "port": address.port, "database": "postgres", "pool_size": 7}
    gateway.register_resource("user_db", ResourceReference("database", config, "db_creds"))
    checks = await gateway.check()
    assert checks.ok
    assert "user_db" in repr(checks)
    health = await gateway.get_resource_health()
    assert set(health) == {"resources", "overall_status"}
    entry = health["resources"]["user_db"]
    assert entry["status"] == "healthy"
    assert entry["last_check"].endswith("Z")
    assert entry["metrics"]["pool_size"] == 7
    assert {"active_connections", "avg_response_time_ms"} <= set(entry["metrics"])
    assert await gateway.list_registered_resources() == ["user_db"]
    assert await gateway.cleanup_resources(["user_db", "temp_db"]) == {"user_db": True, "temp_db": False}
    assert gateway.resource_registry.statistics().open == 0
    assert (await gateway.check()).ok


async def test_the_guides_keywords_make_a_gateway_and_others_are_refused(secrets):
    made = create_gateway(title="Production Gateway", description="d", server_type="enterprise", secret_manager=secrets)
    assert made is current()
    assert made.description == "d"
    with pytest.raises(ValueError, match=r"no server type 'enterprse'; did you mean 'enterprise'\?"):
        create_gateway(server_type="enterprse")
    with pytest.raises(TypeError, match="enable_durabilty"):
        create_gateway(enable_durabilty=True)
    with pytest.raises(ValueError, match="cannot be switched off"):
        create_gateway(enable_async_execution=False)
    with pytest.warns(RuntimeWarning, match="memory only"):
        create_gateway(enable_durability=True, secret_manager=secrets)
    with pytest.raises(ValueError, match="did you mean 'DEBUG'"):
        made.set_log_level("DEBG")
    await made.shutdown()


async def test_a_gateway_of_the_same_title_retires_the_old_one(secrets, services):
    address = services.postgres
    await secrets.store_secret("login", {"user": address.user, "password": address.password})
    config = {"host": address.host, "port": address.port, "database": "postgres"}
    first = Gateway("one title", secrets=secrets)
    first.register_resource("db", ResourceReference("database", config, "login"))
    await first.check()
    assert first.resource_registry.statistics().open == 1
    second = Gateway("one title", secrets=secrets)
    for _ in range(100):
        if not first.resource_registry.statistics().open:
            break
        await asyncio.sleep(0.05)
    assert first.resource_registry.statistics().open == 0
    assert current() is second
    await second.shutdown()


async def test_shutting_down_twice_is_fine(gateway):
    await gateway.shutdown()
    await gateway.shutdown()


async def test_runs_are_listed_and_found_again(gateway):
    _, halve = define(gateway)
    etl = gateway.workflow("etl", halve)
    first, second = await etl(limit=1), await etl(limit=2)
    assert [r.id for r in await gateway.runs.list("etl")] == [second.id, first.id]
    assert (await gateway.runs.get(first.id)).data == first.data
    with pytest.raises(ValueError, match="lost"):
        await gateway.runs.list(status="lost")


async def test_all_problems_of_a_workflow_of_nodes_come_at_once(gateway):
    @gateway.node
    async def one():
        return undefined_name  # noqa: F821

    @gateway.node
    def two(one):
        global leak
        leak = one

    with pytest.raises(WorkflowDefinitionError) as caught:
        gateway.workflow("broken", two)
    assert len(caught.value.problems) == 2


def test_a_gateway_may_be_made_without_an_event_loop(secrets):
    made = Gateway("no loop", secrets=secrets)
    made.register_resource("db", ResourceReference("database", {"host": "localhost", "database": "x", "user": "u"}))
    assert "resources db" in repr(made)
    del made
    gc.collect()
