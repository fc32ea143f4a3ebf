"""``python3 -m kailash_nb COMMAND`` from a bare checkout: makes its environment first, then hands over to cli.py.

It asks for a ``python3`` with pip, and as root on Debian not even that. uv comes by the hashes of requirements.lock,
makes ``.venv`` with a Python 3.11 or later and installs what is locked; the locked hatchling then builds the checkout's
own editable install, so whatever is fetched has its hash checked. A stamp in ``.venv`` tells that nothing has changed
since: the next start is immediate and needs no network. Where kailash_nb is installed, none of this happens.

Standard library only, in the syntax of Python 3.8: this runs before there is anything else.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LOCK = ROOT / "requirements.lock"
VENV = ROOT / ".venv"
PYTHON = VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
STAMP = VENV / "kailash_nb.stamp"
TOOLS = ROOT / ".tools"
PYTHONS = ">=3.11,<3.15"  # those that the locked packages have wheels for
NEW_ENOUGH = sys.version_info >= (3, 11)
FITS = (3, 11) <= sys.version_info < (3, 15)
NO_NETWORK = "It needs the network: behind a proxy set HTTPS_PROXY, for a mirror of packages {}; then run this again."


class SetupError(Exception):
    """The environment could not be made; the message says what to do."""


def main() -> int:
    """Run a command in the environment that the lock describes, made where need be; returns the exit code."""
    if is_installed() or not LOCK.is_file():
        from kailash_nb import cli

        return cli.main()
    if NEW_ENOUGH:  # --help and a mistyped command are answered before anything is fetched
        from kailash_nb import cli

        cli.parse(sys.argv[1:])
    try:
        if not is_current():
            make_environment()
    except (SetupError, OSError) as error:
        say(f"kailash_nb: {error}")
        return 1
    except KeyboardInterrupt:
        say("kailash_nb: stopped; the next start carries on from here")
        return 130
    command = [str(PYTHON), "-m", "kailash_nb", *sys.argv[1:]]
    if os.name == "nt":
        return subprocess.call(command)
    return os.execv(command[0], command)


def is_installed() -> bool:
    """Whether the running interpreter has kailash_nb installed, rather than seeing a checkout's folder."""
    try:
        return bool(metadata.distribution("kailash-nb"))
    except metadata.PackageNotFoundError:
        return False


def is_current() -> bool:
    """Whether ``.venv`` is whole, and made from this very lock, project file, Python and place."""
    return PYTHON.exists() and STAMP.exists() and STAMP.read_text() == fingerprint()


def fingerprint() -> str:
    """What ``.venv`` is made from, as a digest."""
    made_from = [str(ROOT).encode(), os.path.realpath(PYTHON).encode()]
    made_from += [LOCK.read_bytes(), (ROOT / "pyproject.toml").read_bytes()]
    return hashlib.sha256(b"\0".join(made_from)).hexdigest()


def make_environment() -> None:
    """Make ``.venv``, or bring it up to date. Raises SetupError."""
    if not os.access(ROOT, os.W_OK):
        raise SetupError(f"cannot write to {ROOT}, where .venv goes: copy the checkout to a folder of yours")
    if STAMP.exists():
        say("the requirements have changed: bringing the environment (.venv) up to date ...")
        STAMP.unlink()
    else:
        say("making the environment (.venv), about 300 MB to fetch, once ...")
    uv = find_uv()
    python = sys.executable if FITS else PYTHONS
    run(
        [uv, "venv", "--quiet", "--allow-existing", "--relocatable", "--python", python, str(VENV)],
        f"no environment was made, see above. It takes a Python {PYTHONS}, and this is {sys.version.split()[0]}; "
        "install one, on Debian and Ubuntu by `apt-get install python3`, then run this again.",
    )
    run(
        [uv, "pip", "sync", "--python", str(PYTHON), "--require-hashes", str(LOCK)],
        "the packages were not installed; uv says above why. " + NO_NETWORK.format("UV_DEFAULT_INDEX"),
    )
    run(
        [uv, "pip", "install", "--quiet", "--offline", "--no-deps", "--no-build-isolation"]
        + ["--python", str(PYTHON), "--editable", str(ROOT)],
        "the checkout itself was not installed; uv says above why",
    )
    STAMP.write_text(fingerprint())


def find_uv() -> str:
    """The uv on PATH or in ``.tools``; where there is none, pip puts the locked one there. Raises SetupError."""
    own = str(TOOLS / "bin" / ("uv.exe" if os.name == "nt" else "uv"))
    for uv in (shutil.which("uv"), own):
        if uv and works([uv, "--version"]):
            return uv
    pip = find_pip()
    say("fetching uv (.tools) ...")
    TOOLS.mkdir(exist_ok=True)
    locked = TOOLS / "uv.txt"
    locked.write_text(locked_requirement("uv"))
    # With --target, because a distribution protects its own Python from pip (PEP 668).
    install = ["install", "--quiet", "--upgrade", "--no-deps", "--require-hashes", "--target", str(TOOLS)]
    run(
        [*pip, *install, "-r", str(locked)],
        "uv was not installed; pip says above why. " + NO_NETWORK.format("PIP_INDEX_URL"),
    )
    return own


def find_pip() -> list[str]:
    """A command that is pip; as root on Debian and its kin apt-get installs it where need be. Raises SetupError."""
    for python in (sys.executable, "/usr/bin/python3"):
        if works([python, "-m", "pip", "--version"]):
            return [python, "-m", "pip"]
    if not apt_get_install("python3-pip"):
        raise SetupError("no pip, no uv: `sudo apt-get install python3-pip`, or install uv; then run this again")
    return ["/usr/bin/python3", "-m", "pip"]


def apt_get_install(package: str) -> bool:
    """Install a Debian package; False where there is no apt-get or the user is not root. Raises SetupError."""
    if not shutil.which("apt-get") or os.geteuid() != 0:
        return False
    say(f"installing {package} by apt-get ...")
    failed = f"{package} was not installed; apt-get says above why. Install it, then run this again."
    apt_get = ["apt-get", "-qq", "-o", "Dpkg::Use-Pty=0"]
    run([*apt_get, "update"], failed)
    run([*apt_get, "--yes", "--no-install-recommends", "install", package], failed)
    return True


def locked_requirement(name: str) -> str:
    """The lock's lines about one package: its version, and the hash of each of its files."""
    _, found, after = LOCK.read_text().partition(f"\n{name}==")
    lines = (found + after).lstrip("\n").splitlines()
    last = next(i for i, line in enumerate(lines) if not line.endswith("\\"))
    return "\n".join(lines[: last + 1]) + "\n"


def works(command: list[str]) -> bool:
    """Whether a command is there and succeeds; what it prints is dropped."""
    try:
        return subprocess.call(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) == 0
    except OSError:
        return False


def run(command: list[str], failed: str) -> None:
    """Run a step and show what it says, but for uv's roll of packages. Raises SetupError(failed)."""
    env = dict(os.environ, DEBIAN_FRONTEND="noninteractive")
    env.update(PIP_DISABLE_PIP_VERSION_CHECK="1", PIP_ROOT_USER_ACTION="ignore")
    env.update(UV_SYSTEM_CERTS="1", UV_NATIVE_TLS="1")  # trust what the system trusts, as pip and apt-get do
    env.pop("UV_SYSTEM_PYTHON", None)  # a habit of CI machines; it contradicts --python
    output, with_output = subprocess.PIPE, subprocess.STDOUT
    with subprocess.Popen(command, cwd=ROOT, env=env, stdout=output, stderr=with_output, errors="replace") as step:
        for line in step.stdout or ():
            if not line.startswith((" + ", " - ", " ~ ", " Downloaded ")):
                say("  " + line.rstrip())
    if step.returncode:
        raise SetupError(failed)


def say(line: str) -> None:
    """A line of progress, on stderr: stdout belongs to the command."""
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
