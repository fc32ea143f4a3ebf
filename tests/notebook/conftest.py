"""A kernel for each test module, with the extension loaded and a home of its own."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from kernels import Kernel, kernel


@pytest.fixture(scope="module")
def home() -> Iterator[Path]:
    """A folder with a short path: it holds the kernel's sockets, whose names may be 100 characters long."""
    folder = Path(tempfile.mkdtemp(prefix="knb-"))
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def notebook(home: Path) -> Iterator[Kernel]:
    """A kernel with the extension loaded."""
    with kernel(home) as found:
        found.ok("%load_ext kailash_nb")
        yield found
