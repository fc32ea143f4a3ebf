"""JupyterLab as its user sees it: opened by our command, in a real browser."""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import pytest
from chromium import chromium

SHARES = """\
%%workflow shares
async def numbers(limit: int = 3):
    return {'numbers': list(range(1, limit))}

def divide(numbers):
    return [{'n': n, 'share': 6 / n} for n in numbers['numbers']]"""
CELLS = (
    "%load_ext kailash_nb",
    SHARES,
    "run = await shares(limit=4)\nrun",
    "%%node divide\ndef divide(numbers):\n    return 1 / 0",
    "await shares(limit=4)",
)
FLAGS = ("no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking", "disable-sync")


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[dict[str, Any]]:
    """JupyterLab on a folder with one notebook, as ``kailash-nb lab`` opens it."""
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in CELLS])
    book.metadata["kernelspec"] = {"name": "kailash_nb", "display_name": "Python (kailash_nb)"}
    (tmp_path / "work").mkdir()
    nbformat.write(book, tmp_path / "work" / "book.ipynb")
    settings = tmp_path / "settings" / "@jupyterlab" / "apputils-extension"
    settings.mkdir(parents=True)
    (settings / "notification.jupyterlab-settings").write_text('{"fetchNews": "false", "checkForUpdates": false}')
    folders = {f"JUPYTER_{kind}_DIR": str(tmp_path / kind.lower()) for kind in ("CONFIG", "DATA", "RUNTIME")}
    folders |= {f"JUPYTERLAB_{kind}_DIR": str(tmp_path / kind.lower()) for kind in ("SETTINGS", "WORKSPACES")}
    command = [sys.executable, "-m", "kailash_nb", "lab", str(tmp_path / "work"), "--no-browser", "--port=0"]
    command += [f"--IdentityProvider.token={secrets.token_hex()}", "--expose-app-in-browser"]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            command,
            env={**os.environ, **folders, "HOME": str(tmp_path)},
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        while not (running := list((tmp_path / "runtime").glob("jpserver-*.json"))):
            assert process.poll() is None, (tmp_path / "log").read_text()
            time.sleep(0.1)
        time.sleep(0.3)
        yield json.loads(running[0].read_text())
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(30)


@pytest.mark.browser
@pytest.mark.timeout(180)
def test_a_workflow_is_drawn_runs_and_fails_with_the_authors_line(lab: dict[str, Any], tmp_path: Path) -> None:
    executable = chromium()
    if executable is None:
        pytest.skip("no Chromium is installed, and it cannot be: apt-get install chromium")
    from playwright.sync_api import sync_playwright

    _post(lab, "api/sessions", {"path": "book.ipynb", "type": "notebook", "name": "", "kernel": {"name": "kailash_nb"}})
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=[f"--{flag}" for flag in FLAGS])
        page = browser.new_page(viewport={"width": 1100, "height": 1600})
        page.set_default_timeout(60_000)
        errors: list[str] = []
        page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        page.goto(f"{lab['url']}lab/tree/book.ipynb?reset&token={lab['token']}")
        page.get_by_text("Python (kailash_nb) | Idle").wait_for()
        page.evaluate("() => { window.jupyterapp.commands.execute('notebook:run-all-cells') }")
        page.get_by_text("divide failed, cell [4] line 3").last.wait_for()

        defined, ran, _, failed = (page.locator(".jp-Cell").nth(i).locator(".jp-OutputArea") for i in range(1, 5))
        assert defined.get_by_role("img").first.get_attribute("aria-label")  # the graph
        assert "shares v1" in defined.inner_text()
        assert "shares ok" in ran.inner_text()
        assert ran.get_by_role("cell", name="2.0").count() == 1  # the last table is open
        assert "----> 3     return 1 / 0" in failed.inner_text()
        assert "Inputs are kept: run.debug()" in failed.inner_text()
        page.screenshot(path=tmp_path / "lab.png")
        browser.close()
    assert errors == []


def _post(lab: dict[str, Any], path: str, content: dict[str, Any]) -> None:
    headers = {"Authorization": f"token {lab['token']}", "Content-Type": "application/json"}
    request = urllib.request.Request(lab["url"] + path, json.dumps(content).encode(), headers)
    with urllib.request.urlopen(request, timeout=60) as answer:
        assert answer.status == 201
