"""What all tests share: a folder for servers, and the embedded servers themselves."""

from __future__ import annotations

import asyncio
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from services import Services

from kailash_nb.resources.embedded import address, release
from kailash_nb.resources.supervisor import LOCK_FILE, take_lock


@pytest.fixture(scope="session", autouse=True)
def _own_folders() -> Iterator[None]:
    """Secrets, keys and runtime files go to a temporary folder, never to those of the person who runs the tests."""
    with tempfile.TemporaryDirectory(prefix="kailash-nb-home-") as home, pytest.MonkeyPatch.context() as patch:
        for variable in ("XDG_CONFIG_HOME", "XDG_DATA_HOME", "XDG_STATE_HOME"):
            patch.setenv(variable, str(Path(home) / variable.lower()))
        yield


@pytest.fixture(scope="session")
def open_folder() -> Iterator[Path]:
    """A temporary folder that the servers may enter: under root they run as another user, whom `tmp_path` keeps out."""
    folder = Path(tempfile.mkdtemp(prefix="kailash-nb-"))
    folder.chmod(0o711)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="session")
def services(open_folder: Path) -> Iterator[Services]:
    """The embedded servers; ``{"embedded": true}`` means them, too, in this process and in those that it starts."""
    folder = open_folder / "services"

    async def start() -> Services:
        return Services(await address("postgres", folder), await address("valkey", folder), folder)

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KAILASH_NB_SERVICES", str(folder))
        yield asyncio.run(start())
    release()
    os.close(take_lock(folder / LOCK_FILE, 20))  # it has stopped both
