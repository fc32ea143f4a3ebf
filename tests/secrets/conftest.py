"""A home of their own for the tests of secrets: none touches the real one, nor its keyring."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keyring
import pytest
from keyring.backends import null

from kailash_nb.secrets import SecretManager


@dataclass(frozen=True)
class Home:
    """The user's folders, and what is in them."""

    data: Path
    config: Path

    @property
    def secrets(self) -> Path:
        return self.data / "kailash_nb" / "secrets.db"

    @property
    def key(self) -> Path:
        return self.config / "kailash_nb" / "kek"


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Home:
    """Where the secrets and the key of a test lie, in its own processes and in those it starts."""
    for variable in ("KAILASH_NB_KEK", "KAILASH_NB_SECRETS"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("PYTHON_KEYRING_BACKEND", "keyring.backends.null.Keyring")
    keyring.set_keyring(null.Keyring())
    return Home(tmp_path / "data", tmp_path / "config")


@pytest.fixture
def new() -> Iterator[Callable[..., SecretManager]]:
    """Makes secret managers that are closed after the test."""
    managers: list[SecretManager] = []

    def make(*args: Any, **options: Any) -> SecretManager:
        managers.append(SecretManager(*args, **options))
        return managers[-1]

    yield make
    for manager in managers:
        asyncio.run(manager.close())


@pytest.fixture
def manager(new: Callable[..., SecretManager]) -> SecretManager:
    return new()


@pytest.fixture
def python() -> Callable[..., subprocess.Popen[str]]:
    """Starts a Python process: ``python(script, *arguments)``; ``m`` is a SecretManager there."""
    prelude = "import asyncio, os, sys\nfrom kailash_nb.secrets import *\nm = SecretManager()\n"

    def start(script: str, *arguments: str, **environment: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-c", prelude + script, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | environment,
        )

    return start


@pytest.fixture
def output(python: Callable[..., subprocess.Popen[str]]) -> Callable[..., str]:
    """Runs a Python process to its end and returns what it printed."""

    def run(script: str, *arguments: str, **environment: str) -> str:
        with python(script, *arguments, **environment) as process:
            printed, _ = process.communicate(timeout=50)
        assert process.returncode == 0
        return printed.strip()

    return run
