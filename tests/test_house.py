"""The house is in order: layers, style, types, public names, and the files that describe the environment."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from importlinter.cli import lint_imports
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from rattler import MatchSpec

import kailash_nb
from kailash_nb import exceptions

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "kailash_nb"
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
EXTRAS = PYPROJECT["project"]["optional-dependencies"]
LOCK = (ROOT / "requirements.lock").read_text()
ENTRIES = re.split(r"^(?=[A-Za-z0-9])", LOCK, flags=re.MULTILINE)[1:]

TESTED_ELSEWHERE = {
    "exceptions.py": "the messages are checked where they are raised",
    "store/base.py": "a protocol; test_store.py holds every store to it",
    "store/memory.py": "test_store.py, with the others",
}


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


# --- layers, style, types ---------------------------------------------------------------------------------------------


def test_imports_only_go_down_and_each_library_has_one_home(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "path", [*sys.path])

    status = lint_imports(config_filename=str(ROOT / "pyproject.toml"), no_cache=True, no_logo=True)

    assert status == 0, capsys.readouterr().out


@pytest.mark.parametrize("arguments", [("check",), ("format", "--check")], ids=" ".join)
def test_ruff_has_nothing_to_say(arguments: tuple[str, ...]) -> None:
    done = run(sys.executable, "-m", "ruff", *arguments, ".")

    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.timeout(300)
def test_the_package_is_typed_strictly() -> None:
    done = run(sys.executable, "-m", "mypy")

    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("name", ["__init__.py", "__main__.py"])
def test_what_runs_before_there_is_an_environment_keeps_to_the_syntax_of_python_3_8(name: str) -> None:
    source = (PACKAGE / name).read_text()

    tree = ast.parse(source, feature_version=(3, 8))

    assert "from __future__ import annotations" in source
    imports = [node for node in tree.body if isinstance(node, ast.Import)]
    assert {alias.name for node in imports for alias in node.names} <= sys.stdlib_module_names


def test_every_module_has_a_test_file_of_its_name() -> None:
    modules = {str(path.relative_to(PACKAGE)) for path in PACKAGE.rglob("*.py") if path.name != "__init__.py"}
    untested = {
        module
        for module in modules - TESTED_ELSEWHERE.keys()
        if not (ROOT / "tests" / module).with_name(f"test_{Path(module).stem.strip('_')}.py").is_file()
    }

    assert untested == set()
    assert TESTED_ELSEWHERE.keys() <= modules


# --- public names -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", kailash_nb.__all__)
def test_a_public_name_resolves(name: str) -> None:
    value = getattr(kailash_nb, name)

    assert inspect.isclass(value) or inspect.isfunction(value)
    assert inspect.getdoc(value)


def test_the_public_names_are_those_that_type_checkers_see() -> None:
    tree = ast.parse(inspect.getsource(kailash_nb))
    guarded = next(node for node in tree.body if isinstance(node, ast.If))
    imports = [node for node in guarded.body if isinstance(node, ast.ImportFrom)]
    seen = {alias.asname or alias.name for node in imports for alias in node.names}
    defined = {node.name for node in tree.body if isinstance(node, ast.FunctionDef) and not node.name.startswith("__")}

    assert sorted(seen | defined) == sorted(kailash_nb.__all__)
    assert set(kailash_nb.__all__) <= set(dir(kailash_nb))


def test_every_error_is_public() -> None:
    classes = {
        name for name, value in vars(exceptions).items() if inspect.isclass(value) and issubclass(value, Exception)
    }

    assert classes <= set(kailash_nb.__all__)


def test_an_unknown_name_is_an_attribute_error_with_a_suggestion() -> None:
    with pytest.raises(AttributeError, match=r"no attribute 'create_gatway'; did you mean 'create_gateway'"):
        kailash_nb.create_gatway  # noqa: B018
    with pytest.raises(ImportError):
        importlib.import_module("kailash_nb.no_such_module")


@pytest.mark.parametrize("module", ["kailash_nb", "kailash_nb.__main__", "kailash_nb.cli", "kailash_nb.exceptions"])
def test_importing_it_loads_no_third_party_library(module: str) -> None:
    program = (
        f"import sys; before = set(sys.modules); import {module}\n"
        "print(*{name.partition('.')[0] for name in set(sys.modules) - before} - sys.stdlib_module_names)"
    )

    assert run(sys.executable, "-c", program).stdout.split() == ["kailash_nb"]


def test_importing_it_takes_no_time() -> None:
    program = "import time; t = time.perf_counter(); import kailash_nb; print(time.perf_counter() - t)"

    assert min(float(run(sys.executable, "-c", program).stdout) for _ in range(7)) < 0.03


# --- files ------------------------------------------------------------------------------------------------------------


def test_no_file_names_a_machine_or_a_registry() -> None:
    # Put together from pieces, so that this file does not match itself.
    folders = "|".join(["work", "root/" + r"[\w.]+", "tmp/" + "lab", "home/" + r"\w+", "Users/" + r"\w+"])
    hosts = "|".join(["pypi" + r"\.org", "python" + r"hosted\.org", "npm" + r"js\.(org|com)", "ana" + r"conda\.org"])
    told = re.compile(r"(?<![\w.})])/(" + folders + r")\b|(" + hosts + r")\b")
    listed = run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard")
    if listed.returncode:
        pytest.skip("this is no git checkout")

    found = [
        f"{name}:{number}: {line.strip()[:100]}"
        for name in listed.stdout.split("\0")
        if (ROOT / name).is_file()
        for number, line in enumerate((ROOT / name).read_text(errors="replace").splitlines(), 1)
        if told.search(line)
    ]

    assert found == []


def declared(*extras: str) -> list[Requirement]:
    """What the project itself asks for, and the given extras; references to its own extras left out."""
    project = PYPROJECT["project"]
    texts = [*project["dependencies"], *(text for extra in extras for text in EXTRAS[extra])]
    return [requirement for requirement in map(Requirement, texts) if requirement.name != project["name"]]


def test_the_conda_environment_is_what_the_project_asks_for() -> None:
    conda_names = {"redis": "redis-py"}
    asked = {conda_names.get(r.name, r.name): str(r.specifier) for r in declared("notebook", "server", "keyring")}
    asked["python"] = PYPROJECT["project"]["requires-python"]
    environment: dict[str, Any] = yaml.safe_load((ROOT / "environment.yml").read_text())
    specs = [MatchSpec(spec) for spec in environment["dependencies"] if isinstance(spec, str)]
    given = {spec.name.normalized: str(spec.version or "") for spec in specs}
    # PostgreSQL and Valkey stand for the wheels of the services extra; pip installs the project itself.
    services = {name: given.pop(name) for name in ("postgresql", "valkey-server", "pip")}

    assert given == asked
    assert all(services[name] for name in ("postgresql", "valkey-server"))
    assert environment["dependencies"][-1] == {"pip": ["-e ."]}
    card = "ipywidgets nest-asyncio asyncpg redis-py httpx cryptography pandas jupyterlab"
    assert set(card.split()) <= given.keys()


def test_the_lock_holds_what_the_project_asks_for_and_nothing_it_no_longer_asks_for() -> None:
    asked = {canonicalize_name(requirement.name): requirement for requirement in declared(*EXTRAS)}
    locked = [Requirement(entry.partition(" \\\n")[0]) for entry in ENTRIES if "kailash-nb (pyproject.toml)" in entry]

    assert {canonicalize_name(entry.name) for entry in locked} == asked.keys()
    for entry in locked:
        wanted = asked[canonicalize_name(entry.name)]
        assert wanted.specifier.contains(str(entry.specifier).removeprefix("==")), f"{wanted} is locked as {entry}"


def test_the_lock_says_how_it_was_made_and_hashes_everything() -> None:
    command = "uv pip compile --universal --generate-hashes --all-extras --python-version 3.11 pyproject.toml"

    assert command in "".join(LOCK.splitlines(keepends=True)[:3])
    assert len(ENTRIES) > 100
    assert [entry for entry in ENTRIES if "--hash=sha256:" not in entry] == []
    assert not re.search(r"://|--index|--find-links|--extra-index|^-e", LOCK, re.MULTILINE)


def test_ci_and_the_readme_give_the_same_command() -> None:
    readme = (ROOT / "README.md").read_text()

    assert "python3 -m kailash_nb test" in (ROOT / ".ci" / "run").read_text()
    for command in ("demo", "test", "lab"):
        assert f"python3 -m kailash_nb {command}" in readme


@pytest.mark.skipif(not shutil.which("bash"), reason="bash reads the CI script")
def test_the_ci_script_is_sound() -> None:
    assert run("bash", "-n", ".ci/run").returncode == 0
