from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import redis
from holder import GONE_WITHIN, Holder, is_alive, pids, query, valkey, wait_for, wait_until_stopped

from kailash_nb.resources import supervisor
from kailash_nb.resources.supervisor import LOCK_FILE, STATE_FILE, lock_identity


@pytest.fixture(scope="module")
def made(open_folder: Path) -> Path:
    """A folder in which databases were made already, so that the tests need not wait for that."""
    folder = open_folder / "supervised"
    with Holder(folder) as holder:
        holder.ask()
    wait_until_stopped(folder)
    return folder


@pytest.fixture
def folder(made: Path) -> Iterator[Path]:
    yield made
    wait_until_stopped(made)


def test_everything_is_gone_within_three_seconds_of_the_kill_of_its_only_holder(folder: Path) -> None:
    with Holder(folder) as holder:
        running = pids(folder, holder.ask())
        assert all(map(is_alive, running.values()))
        holder.kill()
        wait_for(lambda: not any(map(is_alive, running.values())), GONE_WITHIN)

    assert not (folder / STATE_FILE).exists()


def test_everything_is_gone_when_the_holder_is_killed_while_the_database_is_made(open_folder: Path) -> None:
    folder = open_folder / "interrupted"
    with Holder(folder, "postgres") as holder:
        wait_for((folder / "postgres.new").exists, 10)
        pid = json.loads((folder / STATE_FILE).read_text())["pid"]
        holder.kill()
        wait_for(lambda: not is_alive(pid), GONE_WITHIN)
    assert not (folder / "postgres").exists()

    with Holder(folder, "postgres") as holder:
        assert query(holder.ask()["postgres"], "SELECT 1") == 1
    wait_until_stopped(folder)


def test_an_interrupt_of_the_kernels_process_group_does_not_reach_the_servers(folder: Path) -> None:
    with Holder(folder) as holder:
        addresses = holder.ask()
        before = pids(folder, addresses)
        for _ in range(3):
            holder.interrupt()
            time.sleep(0.2)

        assert holder.ask() == addresses
        assert pids(folder, addresses) == before


@pytest.mark.parametrize("service", ["postgres", "valkey"])
def test_a_killed_server_is_back_in_seconds_at_the_same_address_with_its_data(folder: Path, service: str) -> None:
    with Holder(folder) as holder:
        addresses = holder.ask()
        query(addresses["postgres"], "CREATE TABLE IF NOT EXISTS kept AS SELECT 42 AS value")
        with valkey(addresses["valkey"]) as client:
            client.set("kept", "42")
        before = pids(folder, addresses)
        os.kill(before[service], signal.SIGKILL)
        wait_for(lambda: not is_alive(before[service]), 5)

        began = time.monotonic()
        assert holder.ask() == addresses  # answers when it is ready again
        assert time.monotonic() - began < 15
        assert query(addresses["postgres"], "SELECT value FROM kept") == 42
        with valkey(addresses["valkey"]) as client:
            assert client.get("kept") == "42"
        after = pids(folder, addresses)
        assert {name for name in after if after[name] != before[name]} == {service}


@pytest.mark.parametrize("service", ["postgres", "valkey"])
def test_a_killed_server_comes_back_though_nobody_asks_for_it(folder: Path, service: str) -> None:
    with Holder(folder, service) as holder:
        addresses = holder.ask()
        for _ in range(2):
            before = pids(folder, addresses)
            os.kill(before[service], signal.SIGKILL)

            def is_another(before: int = before[service]) -> bool:
                with suppress(OSError, IndexError, redis.ConnectionError):  # not there yet
                    return pids(folder, addresses)[service] != before
                return False

            wait_for(is_another, 20)
        if service == "postgres":
            wait_for(lambda: "ready" in (folder / "postgres" / "postmaster.pid").read_text(), 20)
            assert query(addresses["postgres"], "SELECT 1") == 1


def test_what_two_processes_share_outlives_the_first_and_ends_with_the_second(folder: Path) -> None:
    with Holder(folder) as first, Holder(folder, "valkey") as second:
        addresses = first.ask()
        assert second.ask()["valkey"] == addresses["valkey"]
        running = pids(folder, addresses)
        first.kill()
        time.sleep(0.5)

        assert pids(folder, addresses) == running
        assert all(map(is_alive, running.values()))
        second.kill()
        wait_for(lambda: not any(map(is_alive, running.values())), GONE_WITHIN)


def test_processes_that_ask_at_the_same_time_get_the_same_servers(open_folder: Path) -> None:
    folder = open_folder / "raced"
    holders = [Holder(folder, "valkey") for _ in range(4)]
    try:
        addresses = [holder.ask() for holder in holders]
    finally:
        for holder in holders:
            holder.kill()

    assert all(address == addresses[0] for address in addresses)
    wait_until_stopped(folder)
    assert (folder / "valkey.log").read_text().count("Ready to accept connections") == 1


def test_a_kernel_that_is_restarted_at_once_gets_its_servers_and_their_data_again(folder: Path) -> None:
    with Holder(folder) as holder:
        addresses = holder.ask()
        query(addresses["postgres"], "CREATE TABLE IF NOT EXISTS restarted AS SELECT 7 AS value")
        with valkey(addresses["valkey"]) as client:
            client.set("restarted", "7")
    with Holder(folder) as holder:
        assert holder.ask() == addresses
        assert query(addresses["postgres"], "SELECT value FROM restarted") == 7
        with valkey(addresses["valkey"]) as client:
            assert client.get("restarted") == "7"


@pytest.mark.skipif(sys.platform != "linux", reason="servers that die with their parent: Linux only")
def test_servers_die_with_a_killed_supervisor_and_the_next_call_of_the_same_process_starts_them_anew(
    folder: Path,
) -> None:
    with Holder(folder) as holder:
        addresses = holder.ask()
        before = pids(folder, addresses)
        os.kill(before["supervisor"], signal.SIGKILL)
        wait_for(lambda: not any(map(is_alive, before.values())), 5)

        assert holder.ask() == addresses
        assert query(addresses["postgres"], "SELECT 1") == 1
        assert not set(pids(folder, addresses).values()) & set(before.values())


def test_a_supervisor_told_to_end_stops_its_servers_and_a_holder_gets_new_ones(folder: Path) -> None:
    with Holder(folder) as holder:
        addresses = holder.ask()
        before = pids(folder, addresses)
        os.kill(before["supervisor"], signal.SIGTERM)
        wait_for(lambda: not (folder / STATE_FILE).exists(), 5)

        assert holder.ask() == addresses
        assert not any(map(is_alive, before.values()))


def test_a_stopped_server_is_ended_by_force_in_time(folder: Path) -> None:
    with Holder(folder) as holder:
        running = pids(folder, holder.ask())
        os.kill(running["postgres"], signal.SIGSTOP)
        os.kill(running["valkey"], signal.SIGSTOP)
        holder.kill()
        wait_for(lambda: not any(map(is_alive, running.values())), GONE_WITHIN + 0.5)


def test_a_copied_folder_gets_servers_of_its_own(open_folder: Path) -> None:
    folder, copy = open_folder / "original", open_folder / "copy"
    with Holder(folder, "valkey") as holder:
        original = holder.ask()
        shutil.copytree(folder, copy)
        for path in (copy / "valkey", *(copy / "valkey").rglob("*")):
            shutil.chown(path, (folder / "valkey").stat().st_uid)
        with Holder(copy, "valkey") as other:
            copied = other.ask()

            assert copied["valkey"].port != original["valkey"].port
            assert pids(copy, copied)["valkey"] != pids(folder, original)["valkey"]
            assert pids(folder, original)["supervisor"] != pids(copy, copied)["supervisor"]
    wait_until_stopped(folder)
    wait_until_stopped(copy)


def test_a_removed_folder_ends_its_servers_and_the_next_call_begins_anew(open_folder: Path) -> None:
    folder = open_folder / "removed"
    with Holder(folder, "valkey") as holder:
        before = pids(folder, holder.ask())
        shutil.rmtree(folder)
        os.kill(before["valkey"], signal.SIGKILL)
        wait_for(lambda: not is_alive(before["supervisor"]), GONE_WITHIN)

        with valkey(holder.ask()["valkey"]) as client:
            assert client.ping()
    wait_until_stopped(folder)


def test_a_caller_tells_nothing_to_a_server_that_does_not_know_the_token(open_folder: Path) -> None:
    folder = open_folder / "impostor"
    folder.mkdir(mode=0o711)
    (folder / LOCK_FILE).touch()
    heard = bytearray()
    with socket.create_server(("127.0.0.1", 0)) as impostor:
        impostor.settimeout(20)
        state = {"protocol": supervisor.PROTOCOL, "lock": lock_identity(folder), "token": "token-of-old"}
        state |= {"port": impostor.getsockname()[1], "pid": 1, "host": "here"}
        (folder / STATE_FILE).write_text(json.dumps(state))

        def pretend() -> None:
            for _ in range(2):
                connection, _ = impostor.accept()
                with connection:
                    heard.extend(connection.recv(1000))
                    connection.sendall(b'{"nonce": "x", "proof": "y"}\n')
                    heard.extend(connection.recv(1000))

        thread = threading.Thread(target=pretend)
        thread.start()
        with Holder(folder, "valkey") as holder, valkey(holder.ask()["valkey"]) as client:
            assert client.ping()
        thread.join()
    wait_until_stopped(folder)

    assert b"nonce" in heard
    assert b"token-of-old" not in heard
    assert b"valkey" not in heard


def test_a_supervisor_serves_nobody_without_the_token(folder: Path) -> None:
    with Holder(folder, "valkey") as holder:
        holder.ask()
        state = json.loads((folder / STATE_FILE).read_text())
        with socket.create_connection(("127.0.0.1", state["port"]), timeout=10) as stranger:
            lines = stranger.makefile("rb")
            stranger.sendall(b'{"nonce": "x"}\n')
            nonce = json.loads(lines.readline())["nonce"]
            request = {"proof": supervisor.proof("guessed", "caller", nonce), "service": "valkey", "candidates": []}
            stranger.sendall(json.dumps(request).encode() + b"\n")

            assert lines.readline() == b""
            lines.close()
        with socket.create_connection(("127.0.0.1", state["port"]), timeout=10) as silent:
            holder.ask()
            holder.kill()
            wait_for(lambda: not is_alive(state["pid"]), GONE_WITHIN)
            silent.settimeout(1)


def test_a_hung_supervisor_is_named_with_the_remedy(folder: Path) -> None:
    with Holder(folder, "valkey") as holder:
        pid = pids(folder, holder.ask())["supervisor"]
        os.kill(pid, signal.SIGSTOP)
        try:
            program = "import kailash_nb.resources.embedded as e, asyncio, sys, pathlib; e.GREETING_PATIENCE = 0.5\n"
            program += "asyncio.run(e.address('valkey', pathlib.Path(sys.argv[1])))"
            done = subprocess.run(
                [sys.executable, "-c", program, str(folder)], capture_output=True, text=True, check=False
            )
        finally:
            os.kill(pid, signal.SIGCONT)

        assert f"another supervisor holds {folder} and does not answer: process {pid} on" in done.stderr
        assert "KAILASH_NB_SERVICES" in done.stderr


def test_the_supervisor_needs_nothing_but_the_standard_library() -> None:
    program = "import runpy, sys; runpy.run_path(sys.argv[1]); print(*set(sys.modules) - {'__main__'})"
    command = [sys.executable, "-I", "-S", "-c", program, supervisor.__file__]

    loaded = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()

    assert {name.partition(".")[0] for name in loaded} - sys.stdlib_module_names == {"launchers"}
