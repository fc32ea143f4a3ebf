"""Every notebook runs from top to bottom, as the demo runs the first."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from services import Services

from kailash_nb.cli import QUICKSTART, execute_notebook

FOLDER = Path(__file__).resolve().parent.parent / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))


def test_the_quickstart_is_among_the_notebooks() -> None:
    assert QUICKSTART in [notebook.name for notebook in NOTEBOOKS]


@pytest.mark.timeout(600)
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_notebook_runs_from_top_to_bottom(notebook: Path, open_folder: Path, services: Services) -> None:
    folder = open_folder / notebook.stem
    folder.mkdir()
    env = {name: value for name, value in os.environ.items() if not name.startswith(("XDG_", "KAILASH_NB_"))}

    env |= {"HOME": str(folder), "KAILASH_NB_SERVICES": str(services.folder)}

    execution = execute_notebook(notebook, folder / notebook.name, env=env)

    assert execution.failure is None, execution.failure
    assert execution.cells > 0
