"""The endpoints: what a run answers, what is answered instead of one, and that no body breaks the server."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kailash_nb.server import app

EXECUTE = "/api/v1/workflows/{}/execute"
JSON = {"Content-Type": "application/json"}


def execute(client: httpx.Client, name: str, **body: Any) -> httpx.Response:
    return client.post(EXECUTE.format(name), json=body)


# --------------------------------------------------------------------------------------------------------------- a run


def test_a_run_is_answered_with_the_six_keys_of_its_record(client, recorded):
    answer = execute(client, "sum", parameters={"a": 2, "b": 3})

    (run,) = recorded()
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["cache-control"] == "no-store"
    assert answer.json() == {
        "request_id": run.id,
        "workflow_id": "sum",
        "status": "completed",
        "result": {"sum": {"total": 5}},
        "error": None,
        "execution_time": pytest.approx(run.execution_time, abs=1e-5),
    }


def test_a_failed_run_is_an_answer_too(client):
    answer = execute(client, "fail")

    assert answer.status_code == 200
    assert answer.json().keys() == {"request_id", "workflow_id", "status", "result", "error", "execution_time"}
    assert answer.json()["status"] == "failed"
    assert answer.json()["result"] is None
    assert "fail failed, " in answer.json()["error"] and "ZeroDivisionError" in answer.json()["error"]


def test_a_server_that_refuses_connections_fails_the_run_and_not_the_request(client):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        config = {"host": "127.0.0.1", "port": taken.getsockname()[1], "database": "shop", "user": "shop"}
        answer = execute(client, "ask", resources={"shop_db": {"type": "database", "config": config}})

    assert (answer.status_code, answer.json()["status"]) == (200, "failed")
    assert "nothing accepts connections there" in answer.json()["error"]


@pytest.mark.parametrize("body", [{"inputs": {"a": 2}}, {"parameters": {"a": 2}, "context": {"user": "ada"}}])
def test_inputs_is_another_spelling_and_a_context_changes_nothing(client, body):
    assert execute(client, "sum", **body).json()["result"] == {"sum": {"total": 3}}


@pytest.mark.parametrize("headers", [{}, JSON])
def test_an_empty_body_is_a_request_without_parameters(client, headers):
    answer = client.post(EXECUTE.format("values"), content=b"", headers=headers)

    assert answer.json()["status"] == "completed"


def test_values_come_in_their_one_json_form(client):
    answer = execute(client, "values")

    assert answer.json()["result"]["values"] == {
        "at": "2025-01-02T00:00:00+00:00",
        "price": "1.10",
        "nan": None,
        "large": 2**200,
        "name": "caf\udce9",
    }


def test_a_result_without_json_form_is_told_by_its_path_and_its_run_stays_recorded(client, recorded):
    answer = execute(client, "formless")

    (run,) = recorded()
    assert answer.status_code == 500
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.json()["type"] == "urn:kailash-nb:problem:unsupported-value"
    assert answer.json()["request_id"] == run.id
    assert "value['formless']['rows'][1] is a object, which has no JSON form" in answer.json()["detail"]
    assert run.success


def test_a_result_that_holds_itself_is_told_to_be_no_answer(client):
    answer = execute(client, "endless")

    assert answer.status_code == 500
    assert answer.headers["content-type"] == "application/problem+json"
    assert client.get("/health/live").status_code == 200


def test_the_caller_is_the_owner_through_another_door(client, gateway, monkeypatch):
    seen = []
    original = gateway.core.execute

    async def spy(name, request, *, principal):
        seen.append(principal)
        return await original(name, request, principal=principal)

    monkeypatch.setattr(gateway.core, "execute", spy)
    execute(client, "sum", parameters={"a": 1})

    assert [(p.name, p.via) for p in seen] == [("owner", "http")]


def test_a_client_that_goes_away_does_not_end_its_run(server, recorded):
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(
            server.url + EXECUTE.format("sleep"),
            json={"parameters": {"seconds": 1}},
            headers={"Authorization": f"Bearer {server.token}"},
            timeout=0.3,
        )
    assert [run.status for run in recorded()] == ["running"]

    deadline = time.monotonic() + 20
    while recorded()[0].status == "running" and time.monotonic() < deadline:
        time.sleep(0.05)

    assert recorded()[0]["sleep"] == "awake"


def test_requests_run_at_the_same_time(server, gateway):
    async def both() -> float:
        headers = {"Authorization": f"Bearer {server.token}"}
        async with httpx.AsyncClient(base_url=server.url, headers=headers, timeout=30) as client:
            start = time.monotonic()
            body = {"parameters": {"seconds": 1}}
            answers = await asyncio.gather(*(client.post(EXECUTE.format("sleep"), json=body) for _ in range(8)))
            assert {a.json()["status"] for a in answers} == {"completed"}
            return time.monotonic() - start

    assert asyncio.run(both()) < 4


def test_a_large_result_is_spelled_in_a_thread_so_that_others_need_not_wait(client, gateway, monkeypatch):
    @gateway.node(name="rows")
    def rows(count: int):
        return [{"id": i, "name": f"row {i}"} for i in range(count)]

    def answer(content):
        threads.append(threading.current_thread().name)
        return original(content)

    gateway.workflow("rows", "rows")
    threads: list[str] = []
    original = app._answer
    monkeypatch.setattr(app, "_answer", answer)

    for count in (10, 20_000):
        assert len(execute(client, "rows", parameters={"count": count}).json()["result"]["rows"]["result"]) == count
    assert [name.startswith("kailash_nb server") for name in threads] == [True, False]


# ------------------------------------------------------------------------------------------------- what never started


@pytest.mark.parametrize(
    ("name", "body", "status", "kind", "told"),
    [
        ("summ", {}, 404, "workflow-not-found", "did you mean 'sum'?"),
        ("sum", {}, 422, "parameter", "parameter 'a' is missing"),
        ("sum", {"parameters": {"a": "x"}}, 422, "parameter", "parameter 'a' does not fit"),
        ("sum", {"parameters": {"a": 1, "bb": 2}}, 422, "parameter", "no parameter 'bb'; did you mean 'b'?"),
        ("sum", {"params": {}}, 422, "workflow", "unknown field 'params'; did you mean 'parameters'?"),
        ("sum", {"parameters": [1]}, 422, "workflow", "a request's 'parameters' is an object"),
        ("sum", {"parameters": None}, 422, "workflow", "a request's 'parameters' is an object"),
        ("sum", {"parameters": {"a": 1}, "inputs": {"a": 2}}, 422, "workflow", "another spelling"),
        ("sum", {"parameters": {"a": 1}, "inputs": 5}, 422, "workflow", "object"),
        ("sum", {"inputs": [[1, 2]]}, 422, "workflow", "object"),
        ("sum", {"parameters": {"a": 1}, "context": "ada"}, 422, "workflow", "a request's 'context' is an object"),
        ("sum", [], 422, "workflow", "a request is an object"),
        ("sum", 5, 422, "workflow", "a request is an object"),
        ("ask", {}, 422, "resource-not-found", "no resource 'shop_db'"),
        ("ask", {"resources": {"shop_db": "@warehouse"}}, 422, "resource-not-found", "no resource 'warehouse'"),
        ("ask", {"resources": {"shop_db": 5}}, 422, "resource-config", "an object or '@name', not 5"),
        ("ask", {"resources": {"shop_db": {"type": 5}}}, 422, "resource-config", "the type is a name"),
        ("ask", {"resources": {"shop_db": {"config": {}}}}, 422, "resource-config", "field 'type' is missing"),
        ("ask", {"resources": {"shop_db": {"type": "databse"}}}, 422, "resource-not-found", "did you mean 'database'"),
        (
            "ask",
            {"resources": {"shop_db": {"type": "database", "config": {"hots": "localhost"}}}},
            422,
            "resource-config",
            "hots",
        ),
        (
            "ask",
            {
                "resources": {
                    "shop_db": {
                        "type": "database",
                        "config": {"host": "localhost", "database": "shop"},
                        "credentials_ref": "shop_login",
                    }
                }
            },
            409,
            "resource-credentials",
            "its credentials may not be used there",
        ),
    ],
)
def test_what_does_not_fit_is_a_problem_and_starts_nothing(client, recorded, name, body, status, kind, told):
    answer = client.post(EXECUTE.format(name), json=body)

    problem = answer.json()
    assert answer.status_code == problem["status"] == status
    assert answer.headers["content-type"] == "application/problem+json"
    assert problem["type"] == f"urn:kailash-nb:problem:{kind}"
    assert problem["title"] == kind.replace("-", " ").capitalize()
    assert told in problem["detail"]
    assert recorded() == []


def test_every_problem_of_the_parameters_is_listed(client):
    problem = execute(client, "sum", parameters={"a": "x", "b": "y"}).json()

    assert [text.partition(" does")[0] for text in problem["problems"]] == ["parameter 'a'", "parameter 'b'"]


# ---------------------------------------------------------------------------------------------------------- the body


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"{", "this is not JSON"),
        (b"parameters", "this is not JSON"),
        (b'{"parameters": {"a": NaN}}', "this is not JSON"),
        (b'{"parameters": {"a": 1e999}}', "this is not JSON"),
        (b'{"parameters": {"a": "\xff"}}', "this is not JSON"),
        (b'{"parameters": {"a": "\\ud800"}}', "this is not JSON"),
        (b'{"parameters": {}} {}', "this is not JSON"),
        (b"9" * 100_000, "this is not JSON"),
        (b"[" * 100_000, "nested more than 64 levels"),
        (b"[" * 500 + b"]" * 500, "nested more than 64 levels"),
        (b'{"parameters": {"value": ' + b'{"a":' * 63 + b"1" + b"}" * 63 + b"}}", "nested more than 64 levels"),
    ],
)
def test_what_is_no_json_or_nested_too_deeply_is_told_so(client, recorded, content, told):
    answer = client.post(EXECUTE.format("echo"), content=content, headers=JSON)

    assert answer.status_code == 400
    assert answer.json()["type"] == "about:blank"
    assert told in answer.json()["detail"]
    assert recorded() == []


@pytest.mark.parametrize("value", ["[" * 100, [[[1]]] * 100, {"a": [{}] * 1000}])
def test_many_brackets_are_not_deep(client, value):
    assert execute(client, "echo", parameters={"value": value}).json()["result"] == {"echo": {"value": value}}


def test_sixty_four_levels_are_fine(client):
    content = b'{"parameters": {"value": ' + b"[" * 62 + b"]" * 62 + b"}}"

    assert client.post(EXECUTE.format("echo"), content=content, headers=JSON).json()["status"] == "completed"


def json_or_bytes() -> st.SearchStrategy[bytes]:
    leaves = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
    values = st.recursive(
        leaves, lambda s: st.lists(s, max_size=4) | st.dictionaries(st.text(max_size=10), s, max_size=4), max_leaves=10
    )
    fields = st.sampled_from(["parameters", "inputs", "resources", "context", "a", "type", "config"])
    bodies = values | st.dictionaries(fields, values | st.dictionaries(fields, values, max_size=3), max_size=4)
    return st.binary(max_size=200) | bodies.map(lambda value: json.dumps(value).encode())


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=json_or_bytes(), name=st.sampled_from(["echo", "ask", "sum"]))
def test_no_body_breaks_the_server(client, content, name):
    answer = client.post(EXECUTE.format(name), content=content, headers=JSON)

    assert answer.status_code in (200, 400, 404, 409, 422), answer.text
    assert answer.json().keys() >= ({"status", "result"} if answer.status_code == 200 else {"status", "detail", "type"})


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "", None])
def test_a_body_that_does_not_say_it_is_json_is_not_read(client, recorded, kind):
    headers = {} if kind is None else {"Content-Type": kind}
    answer = client.post(EXECUTE.format("sum"), content=b'{"parameters": {"a": 1}}', headers=headers)

    assert answer.status_code == 415
    assert "Content-Type: application/json" in answer.json()["detail"]
    assert recorded() == []


def test_a_charset_beside_the_type_is_fine(client):
    headers = {"Content-Type": "Application/JSON; charset=utf-8"}

    assert client.post(EXECUTE.format("fail"), content=b"{}", headers=headers).status_code == 200


def large(size: int) -> bytes:
    frame = b'{"parameters": {"value": ""}}'
    return frame.replace(b'""', b'"' + b"x" * (size - len(frame)) + b'"')


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_of_a_mebibyte_is_read_and_a_larger_one_is_refused(client, recorded, chunked):
    def post(size: int) -> httpx.Response:
        content = large(size)
        parts = (content[i : i + 65_536] for i in range(0, len(content), 65_536))
        return client.post(EXECUTE.format("echo"), content=parts if chunked else content, headers=JSON)

    assert post(1024 * 1024).json()["status"] == "completed"
    answer = post(1024 * 1024 + 1)
    assert answer.status_code == 413
    assert "at most 1,048,576 bytes" in answer.json()["detail"]
    assert len(recorded()) == 1


def test_a_body_that_does_not_arrive_is_given_up(server, recorded, monkeypatch):
    monkeypatch.setattr(app, "BODY_SECONDS", 0.3)
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
        connection.sendall(
            f"POST {EXECUTE.format('sum')} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {server.token}\r\n"
            'Content-Type: application/json\r\nContent-Length: 100\r\n\r\n{"parameters"'.encode()
        )
        answer = b"".join(iter(lambda: connection.recv(65_536), b""))  # until the server closes

    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b"did not arrive within 0.3 s" in answer
    assert recorded() == []


def test_a_body_that_is_cut_off_starts_nothing(server, recorded, client):
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
        connection.sendall(
            f"POST {EXECUTE.format('fail')} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {server.token}\r\n"
            "Content-Type: application/json\r\nContent-Length: 100\r\n\r\n{}".encode()
        )
    time.sleep(0.2)

    assert client.get("/health/live").status_code == 200
    assert recorded() == []


# ------------------------------------------------------------------------------------------------- the other endpoints


def test_workflows_are_listed_with_all_that_a_caller_needs(client, gateway):
    listed = client.get("/api/v1/workflows").json()

    assert listed["title"] == "door"
    assert [w["name"] for w in listed["workflows"]] == sorted(gateway.workflows)
    (told,) = (w for w in listed["workflows"] if w["name"] == "sum")
    assert told == client.get("/api/v1/workflows/sum").json()
    assert told == {
        "name": "sum",
        "description": None,
        "version": 1,
        "hash": gateway.workflows["sum"].workflow.hash,
        "parameters": {
            "type": "object",
            "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
            "required": ["a"],
            "additionalProperties": True,
        },
        "resources": [],
        "wiring": ["sum(a, b = 1)"],
    }


def test_a_new_version_is_served_at_once(client, gateway):
    @gateway.node(name="renewed")
    def first():
        return 1

    gateway.workflow("renewed", "renewed")
    before = client.get("/api/v1/workflows/renewed").json()["version"]

    @gateway.node(name="renewed")
    def second():
        return 2

    assert client.get("/api/v1/workflows/renewed").json()["version"] == before + 1
    assert execute(client, "renewed").json()["result"] == {"renewed": {"result": 2}}


def test_health_is_that_of_the_resources(client, gateway):
    config = {"host": "localhost", "database": "shop", "user": "shop"}
    gateway.register_resource("idle_db", {"type": "database", "config": config})

    health = client.get("/api/v1/health").json()

    assert health.keys() >= {"resources", "overall_status"}
    assert health["resources"]["idle_db"]["status"] == "idle"


@pytest.mark.parametrize("path", ["/health/live", "/health/ready"])
def test_whether_it_is_there_is_told_without_a_token(server, path):
    answer = httpx.get(server.url + path)

    assert (answer.status_code, answer.json()) == (200, {"status": "ok"})


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/", 404),
        ("GET", "/api/v1/workflows/", 404),
        ("GET", "/api/v1/workflows/nope", 404),
        ("GET", "/api/v1/workflows/..%2f..%2fetc", 404),
        ("GET", "/api/v1/workflows/sum/execute", 405),
        ("POST", "/api/v1/workflows", 405),
        ("OPTIONS", "/api/v1/workflows/sum/execute", 405),
        ("DELETE", "/api/v1/workflows/sum", 405),
    ],
)
def test_another_path_or_method_is_a_problem_too(client, method, path, status):
    answer = client.request(method, path)

    assert answer.status_code == answer.json()["status"] == status
    assert answer.headers["content-type"] == "application/problem+json"
    assert not any(name.startswith("access-control") for name in answer.headers)
    assert ("allow" in answer.headers) == (status == 405)
