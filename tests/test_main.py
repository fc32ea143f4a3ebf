"""The bootstrap: what ``python3 -m kailash_nb`` does in a bare checkout.

A checkout is copied to a temporary folder and started by an interpreter that sees no installed package (``-S``), with a
pip and a uv that write down what they are asked to do.
"""

from __future__ import annotations

import os
import re
import shutil
import stat
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from kailash_nb import __main__ as bootstrap

ROOT = Path(__file__).resolve().parent.parent
PYTHON = str(getattr(sys, "_base_executable", sys.executable))

# A pip that fails while there is a file `offline` or `no-pip` beside it, and otherwise "installs" the uv below.
PIP = """
import pathlib, shutil, sys
here = pathlib.Path(__file__).parent.parent
if (here / "no-pip").exists():
    sys.exit("No module named pip")
if "install" in sys.argv:
    with (here / "log").open("a") as log:
        print("pip", *sys.argv[1:], file=log)
    if (here / "offline").exists():
        sys.exit("ERROR: no route to host")
    target = pathlib.Path(sys.argv[sys.argv.index("--target") + 1], "bin")
    target.mkdir()
    shutil.copy(here / "uv", target / "uv")
"""

# A uv whose `venv` makes an interpreter that tells how it was called; its exit code is 7.
UV = """#!/bin/sh
here={here}
[ "$1" = --version ] && exit 0
echo "uv $*" >> "$here/log"
[ -e "$here/offline" ] && [ "$2" = sync ] && echo "error: no route to host" && exit 2
[ "$1" = venv ] || exit 0
for folder; do :; done
mkdir -p "$folder/bin"
printf '#!/bin/sh\\necho "in .venv: $*"\\nexit 7\\n' > "$folder/bin/python"
chmod +x "$folder/bin/python"
"""


@dataclass
class Checkout:
    """A copy of the checkout at ``root``, started with the pip and uv of ``tools``."""

    root: Path
    tools: Path

    def start(self, *arguments: str, path: str = "/usr/bin:/bin") -> subprocess.CompletedProcess[str]:
        env = {"PATH": path, "HOME": str(self.tools), "PYTHONPATH": str(self.tools)}
        command = [PYTHON, "-S", "-m", "kailash_nb", *arguments]
        return subprocess.run(command, cwd=self.root, env=env, capture_output=True, text=True, check=False)

    def log(self) -> list[str]:
        """The calls of pip and uv since the last look."""
        log = self.tools / "log"
        lines = log.read_text().splitlines() if log.exists() else []
        log.write_text("")
        return [line.replace(str(self.root), "ROOT") for line in lines]


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    root, tools = tmp_path / "checkout", tmp_path / "tools"
    shutil.copytree(ROOT / "kailash_nb", root / "kailash_nb", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "requirements.lock"):
        shutil.copy(ROOT / name, root / name)
    (tools / "pip").mkdir(parents=True)
    (tools / "pip" / "__init__.py").touch()
    (tools / "pip" / "__main__.py").write_text(PIP)
    (tools / "uv").write_text(UV.format(here=tools))
    (tools / "uv").chmod(0o755)
    return Checkout(root, tools)


def test_from_nothing_it_fetches_the_locked_uv_makes_the_environment_and_becomes_the_command(
    checkout: Checkout,
) -> None:
    done = checkout.start("test", "-k", "house")

    assert (done.returncode, done.stdout) == (7, "in .venv: -m kailash_nb test -k house\n")
    pip, venv, sync, itself = checkout.log()
    assert pip.startswith("pip install ")
    assert "--require-hashes --target ROOT/.tools -r ROOT/.tools/uv.txt" in pip
    assert re.fullmatch(r"uv venv .*--python \S+ ROOT/\.venv", venv)
    assert re.fullmatch(r"uv pip sync --python ROOT/\.venv/\S+ --require-hashes ROOT/requirements\.lock", sync)
    assert "--offline --no-deps --no-build-isolation" in itself
    assert itself.endswith("--editable ROOT")
    assert "making the environment (.venv)" in done.stderr


def test_the_second_start_asks_neither_pip_nor_uv_nor_the_network(checkout: Checkout) -> None:
    checkout.start("test")
    checkout.log()
    shutil.rmtree(checkout.root / ".tools")

    done = checkout.start("demo")

    assert (done.stdout, done.stderr) == ("in .venv: -m kailash_nb demo\n", "")
    assert checkout.log() == []


@pytest.mark.parametrize("change", ["requirements.lock", "pyproject.toml", "place", "python"])
def test_the_environment_is_brought_up_to_date_after_a_change(checkout: Checkout, change: str) -> None:
    checkout.start("test")
    checkout.log()
    if change == "place":
        checkout.root = checkout.root.rename(checkout.root.with_name("moved"))
    elif change == "python":  # as when the system's Python goes from one version to the next
        python = checkout.root / ".venv" / "bin" / "python"
        python.rename(checkout.tools / "python-next")
        python.symlink_to(checkout.tools / "python-next")
    else:
        with (checkout.root / change).open("a") as file:
            file.write("# changed\n")

    done = checkout.start("test")

    assert done.returncode == 7
    assert "the requirements have changed" in done.stderr
    assert [call.split()[1] for call in checkout.log()] == ["venv", "pip", "pip"]
    assert checkout.start("test").stderr == ""


def test_an_environment_whose_python_went_away_is_made_again(checkout: Checkout) -> None:
    checkout.start("test")
    (checkout.root / ".venv" / "bin" / "python").unlink()

    assert checkout.start("test").returncode == 7


def test_without_a_network_it_says_so_and_the_next_start_carries_on(checkout: Checkout) -> None:
    (checkout.tools / "offline").touch()

    first = checkout.start("test")
    shutil.copytree(checkout.tools, checkout.root / ".tools" / "bin", dirs_exist_ok=True)
    second = checkout.start("test")
    (checkout.tools / "offline").unlink()
    third = checkout.start("test")

    assert (first.returncode, second.returncode, third.returncode) == (1, 1, 7)
    assert "ERROR: no route to host" in first.stderr
    assert "uv was not installed" in first.stderr
    assert "HTTPS_PROXY" in first.stderr.splitlines()[-1]
    assert "PIP_INDEX_URL" in first.stderr.splitlines()[-1]
    assert "error: no route to host" in second.stderr
    assert "the packages were not installed" in second.stderr
    assert "UV_DEFAULT_INDEX" in second.stderr.splitlines()[-1]


def test_a_uv_on_the_path_is_used_and_a_broken_one_is_passed_over(checkout: Checkout) -> None:
    (checkout.tools / "no-pip").touch()
    assert checkout.start("test", path=f"{checkout.tools}:/usr/bin:/bin").returncode == 7
    assert not (checkout.root / ".tools").exists()

    (checkout.tools / "no-pip").unlink()
    shutil.rmtree(checkout.root / ".venv")
    broken = checkout.tools / "broken"
    broken.mkdir()
    (broken / "uv").write_text("#!/bin/sh\nexit 127\n")
    (broken / "uv").chmod(0o755)
    assert checkout.start("test", path=f"{broken}:/usr/bin:/bin").returncode == 7
    assert (checkout.root / ".tools" / "bin" / "uv").exists()


@pytest.mark.parametrize("arguments", [["--help"], ["test", "--help"], ["tset"], []])
def test_help_and_typos_are_answered_before_anything_is_made(checkout: Checkout, arguments: list[str]) -> None:
    done = checkout.start(*arguments)

    assert "usage: python3 -m kailash_nb" in done.stdout + done.stderr
    assert checkout.log() == []
    assert not (checkout.root / ".venv").exists()


def test_without_a_checkout_the_interpreter_at_hand_is_the_environment(checkout: Checkout) -> None:
    (checkout.root / "requirements.lock").unlink()

    done = checkout.start("test")

    assert done.returncode == 1
    assert "the tests come with a checkout" in done.stderr
    assert checkout.log() == []


# --- pip, and what stands in the way ----------------------------------------------------------------------------------


@pytest.fixture
def without_pip(checkout: Checkout, monkeypatch: pytest.MonkeyPatch) -> Checkout:
    """The bootstrap in this process, with no pip anywhere and an apt-get that writes down what it is asked to do."""
    (checkout.tools / "no-pip").touch()
    apt = checkout.tools / "apt-get"
    apt.write_text(f'#!/bin/sh\necho "apt-get $*" >> "{checkout.tools}/log"\n[ ! -e "{checkout.tools}/offline" ]\n')
    apt.chmod(apt.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{checkout.tools}:/usr/bin:/bin")
    monkeypatch.setenv("PYTHONPATH", str(checkout.tools))
    monkeypatch.setattr(bootstrap, "ROOT", checkout.root)
    return checkout


def test_without_pip_root_gets_it_by_apt_get(without_pip: Checkout, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)

    assert bootstrap.find_pip() == ["/usr/bin/python3", "-m", "pip"]

    update, install = without_pip.log()
    assert "update" in update.split()
    assert install.endswith("--no-install-recommends install python3-pip")


def test_an_apt_get_that_fails_is_said(without_pip: Checkout, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    (without_pip.tools / "offline").touch()

    with pytest.raises(bootstrap.SetupError, match="python3-pip was not installed"):
        bootstrap.find_pip()


def test_without_pip_another_user_is_told_what_to_install(
    without_pip: Checkout, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)

    with pytest.raises(bootstrap.SetupError, match=r"sudo apt-get install python3-pip.* or install uv"):
        bootstrap.find_pip()

    assert without_pip.log() == []


def test_a_checkout_that_cannot_be_written_is_said(monkeypatch: pytest.MonkeyPatch, checkout: Checkout) -> None:
    monkeypatch.setattr(bootstrap, "ROOT", checkout.root)
    monkeypatch.setattr(os, "access", lambda *_: False)

    with pytest.raises(bootstrap.SetupError, match="copy the checkout to a folder of yours"):
        bootstrap.make_environment()


def test_a_python_that_does_not_fit_asks_uv_for_one_that_does(
    checkout: Checkout, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("ROOT", "LOCK", "VENV", "PYTHON", "STAMP", "TOOLS"):
        path: Path = getattr(bootstrap, name)
        monkeypatch.setattr(bootstrap, name, checkout.root / path.relative_to(ROOT))
    monkeypatch.setattr(bootstrap, "FITS", False)
    monkeypatch.setenv("PATH", f"{checkout.tools}:/usr/bin:/bin")

    bootstrap.make_environment()

    assert "--python >=3.11,<3.15 " in checkout.log()[0]
    assert bootstrap.is_current()


def test_the_locked_uv_is_one_version_with_the_hashes_of_its_files() -> None:
    version, *hashes = bootstrap.locked_requirement("uv").split(" \\\n")

    assert re.fullmatch(r"uv==[\d.]+", version)
    assert len(hashes) > 5
    assert all(re.fullmatch(r"\s*--hash=sha256:[0-9a-f]{64}\n?", line) for line in hashes)
