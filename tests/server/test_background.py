"""A server beside the kernel: it answers while the caller is busy, ends when told, and leaves nothing behind."""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import json
import os
import shlex
import signal
import socket
import stat
import subprocess
import sys
import threading
import time

import httpx
import pytest

from kailash_nb.exceptions import ServiceError
from kailash_nb.server import background, serve

EXECUTE = "/api/v1/workflows/{}/execute"


def run_line(line: str, **environment: str) -> dict:
    done = subprocess.run(line, shell=True, capture_output=True, text=True, timeout=30, env=os.environ | environment)
    assert (done.returncode, done.stderr) == (0, "")
    return json.loads(done.stdout)


def post(server, name: str, **parameters) -> httpx.Response:
    headers = {"Authorization": f"Bearer {server.token}"}
    return httpx.post(server.url + EXECUTE.format(name), json={"parameters": parameters}, headers=headers, timeout=40)


@contextlib.contextmanager
def in_background(function, *arguments, **keywords):
    """Call a function in a thread; the list that is yielded holds its result after the block."""
    results: list = []
    thread = threading.Thread(target=lambda: results.append(function(*arguments, **keywords)))
    thread.start()
    try:
        yield results
    finally:
        thread.join(40)


def wait_for(condition, seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture
def gateway(fresh_gateway):
    return fresh_gateway


@pytest.fixture
def server(fresh_server):
    return fresh_server


def is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True


# ------------------------------------------------------------------------------------------------------------ the start


def test_a_server_says_where_it_is_and_keeps_its_token_to_itself(server):
    assert server.running
    assert server.url == f"http://127.0.0.1:{server.port}"
    assert server.host == "127.0.0.1"
    assert repr(server) == f"<Server {server.url} running>"
    assert server.token not in repr(vars(server)).replace(repr(server.token), "", 1)  # but in its own attribute
    server.stop()
    assert repr(server) == f"<Server {server.url} stopped>"


def test_no_answer_waits_for_nagles_delay(server):
    with httpx.Client(base_url=server.url, headers={"Authorization": f"Bearer {server.token}"}) as client:
        times = [client.post(EXECUTE.format("sum"), json={"parameters": {"a": 1}}).elapsed for _ in range(20)]

    assert min(times[1:]).total_seconds() < 0.03


def test_a_busy_caller_does_not_stop_it(server):
    script = f"sleep 0.3; {server.curl('sum', {'a': 1})} -w '\\n%{{time_total}}'"
    with subprocess.Popen(["sh", "-c", script], stdout=subprocess.PIPE, text=True) as asking:
        time.sleep(1.5)
        assert asking.poll() == 0  # it had its answer while this thread slept
        answer, seconds = asking.stdout.read().splitlines()

    assert json.loads(answer)["result"] == {"sum": {"total": 2}}
    assert float(seconds) < 1


async def test_a_loop_that_is_blocked_does_not_stop_it(gateway):
    server = serve(gateway.core, title="door")
    try:
        with subprocess.Popen(
            ["sh", "-c", f"sleep 0.2; {server.curl('sum', {'a': 1})}"], stdout=subprocess.PIPE
        ) as asking:
            time.sleep(1)  # a cell that holds the kernel's loop
            assert asking.poll() == 0
            assert json.loads(asking.stdout.read())["status"] == "completed"
    finally:
        server.stop()


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "127.0.0.2", "::1"])
def test_it_serves_on_any_loopback_address(gateway, host):
    try:
        server = serve(gateway.core, title="door", host=host)
    except ServiceError as error:
        pytest.skip(str(error))  # no IPv6 here
    try:
        assert server.host == host
        assert run_line(server.curl("sum", {"a": 1}))["status"] == "completed"
    finally:
        server.stop()


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "", "10.0.0.1", "example.com", "169.254.1.1"])
def test_it_never_serves_where_other_machines_could_reach_it(gateway, host):
    before = threading.active_count()

    with pytest.raises(ServiceError, match=r"put a proxy with TLS in front"):
        serve(gateway.core, title="door", host=host)

    assert threading.active_count() == before


def test_a_port_in_use_is_named_with_the_remedy_and_leaves_nothing_behind(gateway, server, runtime_folder):
    before = threading.active_count(), sorted(runtime_folder.iterdir())

    with pytest.raises(ServiceError, match=rf"port {server.port} of 127.0.0.1: it is in use; .* 0 for a free one"):
        serve(gateway.core, title="door", port=server.port)

    assert (threading.active_count(), sorted(runtime_folder.iterdir())) == before
    assert httpx.get(server.url + "/health/live").status_code == 200


@pytest.mark.parametrize("port", [-1, 70_000, "8000"])
def test_what_is_no_port_is_told_so(gateway, port):
    with pytest.raises(ServiceError, match="a port is a number from 0"):
        serve(gateway.core, title="door", port=port)


def test_a_start_that_fails_is_raised_where_it_was_asked_for_and_leaves_nothing_behind(
    gateway, monkeypatch, runtime_folder
):
    async def startup(self, sockets=None):
        ports.append(sockets[0].getsockname()[1])
        raise RuntimeError("no threads left")

    ports: list[int] = []
    before = threading.active_count()
    monkeypatch.setattr(background._Uvicorn, "startup", startup)

    with pytest.raises(ServiceError, match="did not start: no threads left"):
        serve(gateway.core, title="door")

    assert threading.active_count() == before
    assert list(runtime_folder.iterdir()) == []
    assert is_free(ports[0])


def test_a_start_that_hangs_is_given_up(gateway, monkeypatch, runtime_folder):
    async def startup(self, sockets=None):
        await asyncio.sleep(1)
        await original(self, sockets)

    original = background._Uvicorn.startup
    before = threading.active_count()
    monkeypatch.setattr(background._Uvicorn, "startup", startup)
    monkeypatch.setattr(background, "START_SECONDS", 0.1)

    with pytest.raises(ServiceError, match=r"did not start within 0.1 s"):
        serve(gateway.core, title="door")

    assert threading.active_count() == before
    assert list(runtime_folder.iterdir()) == []


def test_signals_stay_with_the_kernel(gateway):
    signals = (signal.SIGINT, signal.SIGTERM)
    before = [signal.getsignal(number) for number in signals]
    server = serve(gateway.core, title="door")
    try:
        assert [signal.getsignal(number) for number in signals] == before
    finally:
        server.stop()
    assert [signal.getsignal(number) for number in signals] == before


# ------------------------------------------------------------------------------------------------------------ the line


@pytest.mark.parametrize(
    "value", ['it\'s "quoted"', "$HOME `id` \\ !x", "två\nrader\t☃", "@/etc/passwd", {"a": [1, None, True]}, "%{url}"]
)
def test_the_printed_line_runs_as_it_stands(server, value):
    assert run_line(server.curl("echo", {"value": value}))["result"] == {"echo": {"value": value}}


def test_the_printed_line_holds_values_in_their_json_form(server):
    answer = run_line(server.curl("echo", {"value": dt.date(2025, 1, 2)}))

    assert answer["result"] == {"echo": {"value": "2025-01-02"}}
    assert run_line(server.curl("fail"))["status"] == "failed"


def test_the_token_stands_in_a_private_file_and_not_in_the_line(server, runtime_folder):
    line = server.curl("sum", {"a": 1})

    (file,) = runtime_folder.iterdir()
    assert server.token not in line
    assert f"@{file}" in shlex.split(line)
    assert file.read_text() == f"Authorization: Bearer {server.token}\n"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_IMODE(runtime_folder.stat().st_mode) == 0o700
    server.stop()
    assert list(runtime_folder.iterdir()) == []


def test_a_saved_line_works_again_when_the_port_is_served_again(gateway):
    first = serve(gateway.core, title="door")
    line = first.curl("sum", {"a": 1})
    first.stop()
    second = serve(gateway.core, title="door", port=first.port)
    try:
        assert second.curl("sum", {"a": 1}) == line
        assert run_line(line)["status"] == "completed"
    finally:
        second.stop()


def test_a_proxy_of_the_environment_never_sees_the_token(server, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as proxy:
        proxy.setblocking(False)
        for name in ("http_proxy", "all_proxy"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{proxy.getsockname()[1]}")
        monkeypatch.delenv("no_proxy", raising=False)

        assert run_line(server.curl("sum", {"a": 1}))["status"] == "completed"
        with pytest.raises(BlockingIOError):
            proxy.accept()


def test_a_file_that_another_left_there_is_not_written_into(gateway, runtime_folder, tmp_path):
    runtime_folder.mkdir(exist_ok=True)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.touch()
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    (runtime_folder / f"server-{port}.header").symlink_to(elsewhere)

    server = serve(gateway.core, title="door", port=port)

    try:
        assert elsewhere.read_text() == ""
        assert run_line(server.curl("sum", {"a": 1}))["status"] == "completed"
    finally:
        server.stop()


def test_without_a_runtime_folder_the_file_is_kept_with_the_users_state(gateway, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    for runtime in ("", str(tmp_path / "missing")):
        monkeypatch.setenv("XDG_RUNTIME_DIR", runtime)
        server = serve(gateway.core, title="door")
        try:
            assert f"@{tmp_path}/state/kailash_nb/server-{server.port}.header" in shlex.split(server.curl("sum"))
        finally:
            server.stop()


def test_the_line_names_the_home_folder_by_its_variable_and_works(gateway, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_RUNTIME_DIR", "")
    monkeypatch.delenv("XDG_STATE_HOME", raising=False)
    server = serve(gateway.core, title="door")
    try:
        line = server.curl("sum", {"a": 1})
        assert '-H "@$HOME/.local/state/kailash_nb/server-' in line
        assert str(tmp_path) not in line
        assert run_line(line)["status"] == "completed"
    finally:
        server.stop()


def test_a_folder_that_cannot_be_written_is_named(gateway, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    before = threading.active_count()

    with pytest.raises(
        ServiceError, match=r"cannot write .*/file/kailash_nb/server-\d+\.header: .* set XDG_STATE_HOME"
    ):
        serve(gateway.core, title="door")

    assert threading.active_count() == before


@pytest.mark.parametrize(
    ("variables", "url"),
    [
        ({}, None),
        ({"JUPYTERHUB_SERVICE_PREFIX": "/user/ada/"}, "/user/ada/proxy/{}/"),
        (
            {"JUPYTERHUB_SERVICE_PREFIX": "/user/ada/", "JUPYTERHUB_PUBLIC_URL": "https://hub.example/user/ada/"},
            "https://hub.example/user/ada/proxy/{}/",
        ),
    ],
)
def test_behind_a_hub_it_tells_the_address_of_the_hubs_proxy(gateway, monkeypatch, variables, url):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    server = serve(gateway.core, title="door")
    try:
        assert server.proxy_url == (url and url.format(server.port))
        assert url is None or f" ({server.proxy_url}) running" in repr(server)
    finally:
        server.stop()


def test_nothing_that_it_logs_holds_the_token(server, caplog):
    caplog.set_level("DEBUG")
    post(server, "sum", a=1)
    httpx.get(server.url + "/api/v1/workflows", headers={"Authorization": f"Bearer {server.token}x"})
    server.stop()

    assert server.token not in caplog.text
    assert [r for r in caplog.records if r.name.startswith(("uvicorn", "kailash_nb")) and r.levelname != "INFO"] == []
    assert "/api/v1" not in "".join(r.getMessage() for r in caplog.records if r.name.startswith("uvicorn"))


# -------------------------------------------------------------------------------------------------------------- the end


def test_stopping_frees_the_port_at_once_and_ends_the_thread(gateway):
    before = threading.active_count()
    port = 0
    for _ in range(3):
        server = serve(gateway.core, title="door", port=port)
        port = server.port
        assert post(server, "sum", a=1).status_code == 200

        start = time.monotonic()
        server.stop()

        assert time.monotonic() - start < 5
        assert not server.running and is_free(port)
        assert threading.active_count() == before
        server.stop()
        with pytest.raises(httpx.ConnectError):
            httpx.get(server.url + "/health/live")


def test_the_file_is_gone_before_the_port_may_be_taken_by_another(server, runtime_folder, monkeypatch):
    async def shutdown(self, sockets=None):
        left.append(list(runtime_folder.iterdir()))
        await original(self, sockets)

    left: list[list] = []
    original = background._Uvicorn.shutdown
    monkeypatch.setattr(background._Uvicorn, "shutdown", shutdown)

    server.stop()

    assert left == [[]]


def test_an_open_connection_does_not_keep_it_from_stopping(server):
    with httpx.Client(base_url=server.url) as client:
        client.get("/health/live")
        with socket.create_connection(("127.0.0.1", server.port)) as silent:
            silent.sendall(b"GET / HT")
            time.sleep(0.1)
            start = time.monotonic()
            server.stop()

        assert time.monotonic() - start < 5


def test_it_may_be_stopped_by_several_threads_at_once(server):
    with in_background(server.stop), in_background(server.stop):
        server.stop()

    assert not server.running and is_free(server.port)


def test_a_request_under_way_gets_its_time(server, recorded):
    with in_background(post, server, "sleep", seconds=1) as answers:
        wait_for(recorded)
        server.stop(timeout=20)

    assert answers[0].json()["result"] == {"sleep": {"result": "awake"}}
    assert is_free(server.port)


def test_what_takes_longer_is_cancelled_answered_and_recorded(server, recorded):
    with in_background(post, server, "sleep", seconds=60) as answers:
        wait_for(recorded)
        start = time.monotonic()
        server.stop(timeout=0.3)
        assert time.monotonic() - start < 5

    assert answers[0].status_code == 503
    assert "the server stopped while 'sleep' ran" in answers[0].json()["detail"]
    (run,) = recorded()
    assert run.status == "cancelled"


def test_a_thread_that_a_node_left_behind_is_not_waited_for(server, gateway, recorded):
    @gateway.node(name="left")
    async def left(seconds: float):
        import asyncio
        import time

        await asyncio.to_thread(time.sleep, seconds)

    gateway.workflow("left", "left")
    with in_background(post, server, "left", seconds=8) as answers:
        wait_for(recorded)
        start = time.monotonic()
        server.stop(timeout=0.2)
        assert time.monotonic() - start < 5

    assert answers[0].status_code == 503
    assert recorded()[0].status == "cancelled"


def test_a_body_still_on_its_way_does_not_outlast_the_stop(server):
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
        connection.sendall(
            f"POST {EXECUTE.format('sum')} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {server.token}\r\n"
            "Content-Type: application/json\r\nContent-Length: 100\r\n\r\n{".encode()
        )
        time.sleep(0.2)
        start = time.monotonic()
        server.stop(timeout=0.3)

    assert time.monotonic() - start < 5
    assert is_free(server.port)


def test_a_node_that_blocks_the_loop_is_named_as_the_reason(server, recorded, monkeypatch):
    monkeypatch.setattr(background, "_LAST_SECONDS", 0.1)
    monkeypatch.setattr(background, "_CLOSE_SECONDS", 0.1)
    with in_background(post, server, "block", seconds=3):
        wait_for(recorded)
        with pytest.raises(ServiceError, match=r"did not stop within 0.1 s: a node blocks its event loop"):
            server.stop(timeout=0.1)

    server.wait()
    server.stop()
    assert is_free(server.port)


def test_a_node_may_stop_the_server_that_runs_it(server, gateway):
    @gateway.node(name="last")
    async def last():
        from kailash_nb.gateway import current

        current().stop()
        return "stopping"

    gateway.workflow("last", "last")
    gateway.server = server
    answer = post(server, "last")
    server.wait()

    assert answer.json()["result"] == {"last": {"result": "stopping"}}
    assert not server.running and is_free(server.port)


async def test_each_loop_has_pools_of_its_own_and_the_servers_close_with_it(gateway, services):
    postgres = services.postgres
    config = {"host": postgres.host, "port": postgres.port, "database": "postgres", "application_name": "two-loops"}
    secret = {"user": postgres.user, "password": postgres.password}
    await gateway.secret_manager.store_secret("shop_login", secret)
    reference = {"type": "database", "config": config, "credentials_ref": "shop_login"}
    gateway.register_resource("shop_db", reference)

    @gateway.node(name="who", required_resources=["shop_db"])
    async def who(shop_db):
        return {"pid": await shop_db.fetchval("select pg_backend_pid()")}

    @gateway.node(name="count", required_resources=["shop_db"])
    async def count(shop_db):
        query = "select array_agg(pid) from pg_stat_activity where application_name = 'two-loops'"
        return {"pids": await shop_db.fetchval(query)}

    mine, counted = gateway.workflow("who", "who"), gateway.workflow("count", "count")
    server = serve(gateway.core, title="door")
    try:
        here = (await mine())["who"]["pid"]
        there = {(await asyncio.to_thread(post, server, "who")).json()["result"]["who"]["pid"] for _ in range(3)}
        assert here not in there
        assert {here, *there} <= set((await counted())["count"]["pids"])
        health = gateway.core.health()["resources"]["shop_db"]
        assert health["status"] == "healthy" and len(health["loops"]) == 2
    finally:
        await asyncio.to_thread(server.stop)

    for _ in range(100):  # the backend takes a moment to leave the list
        open_ones = set((await counted())["count"]["pids"])
        assert here in open_ones
        if not open_ones & there:
            break
        await asyncio.sleep(0.05)
    else:
        pytest.fail("the server's connections are still open")
    await gateway.shutdown()


PROGRAM = """
import sys, threading, time
{before}
from kailash_nb.gateway import Gateway
from kailash_nb.runs import WorkflowRequest
from kailash_nb.secrets.manager import SecretManager
from kailash_nb.workflow import AsyncWorkflowBuilder

builder = AsyncWorkflowBuilder("nap")
builder.add_async_code("nap", "await asyncio.sleep(parameters['seconds'])\\nresult = {{'awake': True}}")
gateway = Gateway("exit", secrets=SecretManager(sys.argv[1]))
gateway.register_workflow("nap", builder.build())

def work():
    return 6 * 7
def large():
    return ["x" * 100] * 10_000
for node in (work, large):
    gateway.node(node)
    gateway.workflow(node.__name__, node)

server = gateway.serve()
import httpx
def ask(name, **parameters):
    headers = {{"Authorization": "Bearer " + server.token}}
    url = server.url + "/api/v1/workflows/" + name + "/execute"
    return httpx.post(url, json={{"parameters": parameters}}, headers=headers, timeout=60).json()
assert len(ask("large")["result"]["large"]["result"]) == 10_000
print(ask("work")["result"]["work"]["result"], flush=True)
{then}
"""


@pytest.mark.parametrize("before", ["", "import nest_asyncio; nest_asyncio.apply()"])
@pytest.mark.parametrize(
    ("then", "code"),
    [
        ("", 0),
        ("threading.Thread(target=ask, args=('nap',), kwargs={'seconds': 60}, daemon=True).start(); time.sleep(1)", 0),
        ("sys.exit(3)", 3),
    ],
)
def test_a_process_with_a_running_server_ends_cleanly(tmp_path, runtime_folder, before, then, code):
    script = tmp_path / "script.py"
    script.write_text(PROGRAM.format(before=before, then=then))
    start = time.monotonic()

    done = subprocess.run(
        [sys.executable, "-X", "dev", "-W", "error", script, tmp_path / "secrets.db"],
        capture_output=True,
        text=True,
        timeout=50,
    )

    assert (done.stdout, done.stderr, done.returncode) == ("42\n", "", code)
    assert time.monotonic() - start < 30
    assert list(runtime_folder.iterdir()) == []
