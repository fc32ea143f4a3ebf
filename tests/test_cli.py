"""The commands: what they understand, what they say, and how a notebook is executed."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import nbformat
import pytest

from kailash_nb import cli


def notebook(path: Path, *cells: str | Any) -> Path:
    """Write a notebook: a string that starts with ``#`` and a blank is markdown, any other is code."""
    new = nbformat.v4
    made = [
        cell
        if not isinstance(cell, str)
        else (new.new_markdown_cell if cell.startswith("# ") else new.new_code_cell)(cell)
        for cell in cells
    ]
    nbformat.write(new.new_notebook(cells=made), path)
    return path


# --- the command line -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["demo", "test", "lab"])
@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_the_help_of_every_command_gives_an_example(
    command: str, flag: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main([command, flag])

    assert ended.value.code == 0
    out = capsys.readouterr().out
    assert "example:" in out
    assert f" {command}" in out.partition("example:")[2]


def test_the_help_lists_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["--help"])

    assert ended.value.code == 0
    out = capsys.readouterr().out
    assert [command for command in ("demo", "test", "lab") if f"\n    {command} " in out] == ["demo", "test", "lab"]


def test_without_a_command_it_shows_the_help_and_fails(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main([])

    assert ended.value.code == 2
    assert "demo" in capsys.readouterr().err


def test_a_mistyped_command_is_answered_with_the_one_that_was_meant(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["dmeo"])

    assert ended.value.code == 2
    assert "no command 'dmeo'; did you mean 'demo'? (commands: demo, lab, test)" in capsys.readouterr().err


def test_demo_takes_no_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["demo", "--fast"])

    assert "--fast" in capsys.readouterr().err


@pytest.mark.parametrize("rest", [["-k", "house", "--", "x.py", "-q"], ["--port", "8890", "folder", "--help"], []])
@pytest.mark.parametrize("command", ["test", "lab"])
def test_the_arguments_of_test_and_lab_go_on_as_they_are(command: str, rest: list[str]) -> None:
    assert cli.parse([command, *rest]) == (command, rest)


def test_a_missing_library_is_named_with_the_extra_that_brings_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pytest", None)

    assert cli.main(["test"]) == 1
    assert (
        capsys.readouterr().err
        == 'kailash_nb: test needs pytest, which is not installed: pip install "kailash-nb[test]"\n'
    )


def test_test_says_that_the_tests_come_with_a_checkout(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli, "_CHECKOUT", None)

    assert cli.main(["test"]) == 1
    assert "checkout" in capsys.readouterr().err


def test_test_gives_back_the_exit_code_of_pytest(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text("def test_it(): raise SystemError('as meant')")

    done = subprocess.run(
        [sys.executable, "-m", "kailash_nb", "test", str(tmp_path), "-p", "no:cacheprovider"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == pytest.ExitCode.TESTS_FAILED, done.stdout + done.stderr
    assert "1 failed" in done.stdout.splitlines()[-1]


# --- executing a notebook ---------------------------------------------------------------------------------------------


def test_a_notebook_runs_in_a_fresh_kernel_of_this_interpreter_that_ends_with_it(tmp_path: Path) -> None:
    source = notebook(
        tmp_path / "book.ipynb",
        "# Who and where",
        "import os, sys; print(sys.executable, os.getcwd(), os.getpid(), get_ipython().kernel.parent.transport)",
        "",
        "# Later",
        "await __import__('asyncio').sleep(0); 40 + 2",
    )
    before = source.read_bytes()
    report = io.StringIO()

    execution = cli.execute_notebook(source, tmp_path / "out" / "book.ipynb", report=report)

    assert (execution.cells, execution.failure) == (2, None)
    assert source.read_bytes() == before
    done = nbformat.read(tmp_path / "out" / "book.ipynb", as_version=4)
    executable, folder, pid, transport = done.cells[1].outputs[0].text.split()
    assert (executable, folder, transport) == (sys.executable, str(tmp_path / "out"), "ipc")
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid), 0)
    lines = report.getvalue().splitlines()
    assert lines[0].startswith("[ 1/2] Who and where ... ")
    assert lines[0].endswith(" s")
    assert lines[2:] == [lines[2], "        | 42"]
    assert lines[2].startswith("[ 2/2] Later ... ")


def test_a_failing_cell_ends_the_notebook_with_its_traceback_and_the_rest_is_kept(tmp_path: Path) -> None:
    source = notebook(tmp_path / "book.ipynb", "print('before')", "shelf = {}\nshelf['price']", "print('never')")

    execution = cli.execute_notebook(source, tmp_path / "done.ipynb")

    assert execution.failure is not None
    assert execution.failure.startswith("cell 2 failed: ")
    assert "KeyError" in execution.failure
    assert "shelf" in execution.failure
    outputs = [cell.outputs for cell in nbformat.read(tmp_path / "done.ipynb", as_version=4).cells]
    assert [len(output) for output in outputs] == [1, 1, 0]


def test_a_cell_that_is_meant_to_fail_is_shown_and_the_notebook_goes_on(tmp_path: Path) -> None:
    broken = nbformat.v4.new_code_cell("1 / 0", metadata={"tags": ["raises-exception"]})
    report = io.StringIO()

    execution = cli.execute_notebook(
        notebook(tmp_path / "book.ipynb", broken, "'on'"), tmp_path / "done.ipynb", report=report
    )

    assert execution.failure is None
    assert "| ZeroDivisionError: division by zero" in report.getvalue()
    assert "| 'on'" in report.getvalue()


def test_a_cell_that_does_not_end_is_ended(tmp_path: Path) -> None:
    source = notebook(tmp_path / "book.ipynb", "import time; time.sleep(600)")

    execution = cli.execute_notebook(source, tmp_path / "done.ipynb", timeout=2)

    assert execution.failure is not None
    assert "timed out" in execution.failure
    assert execution.seconds < 60


def test_a_kernel_that_dies_is_said(tmp_path: Path) -> None:
    source = notebook(tmp_path / "book.ipynb", "import os; os._exit(3)")

    execution = cli.execute_notebook(source, tmp_path / "done.ipynb")

    assert execution.failure == "cell 1 failed: Kernel died"


def test_long_output_is_cut_in_the_report_and_whole_in_the_notebook(tmp_path: Path) -> None:
    source = notebook(tmp_path / "book.ipynb", "for n in range(100): print(n, 'x' * 300)")
    report = io.StringIO()

    cli.execute_notebook(source, tmp_path / "done.ipynb", report=report)

    lines = report.getvalue().splitlines()
    assert len(lines) == 14
    assert lines[-1].strip() == "| ... 88 more lines"
    assert max(map(len, lines)) <= 120
    assert len(nbformat.read(tmp_path / "done.ipynb", as_version=4).cells[0].outputs[0].text.splitlines()) == 100


# --- demo and lab -----------------------------------------------------------------------------------------------------


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty checkout that the commands take for theirs; its notebooks folder is ``tmp_path``."""
    monkeypatch.setattr(cli, "_CHECKOUT", tmp_path)
    monkeypatch.setattr(cli, "_NOTEBOOKS", tmp_path)
    return tmp_path


def test_demo_ends_with_where_the_executed_notebook_is(checkout: Path, capsys: pytest.CaptureFixture[str]) -> None:
    notebook(checkout / cli.QUICKSTART, "'shop'", "2 * 2")

    assert cli.main(["demo"]) == 0

    executed = checkout / ".kailash_nb" / "demo" / cli.QUICKSTART
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("all 2 cells ok in ")
    assert last.endswith(str(executed))
    assert nbformat.read(executed, as_version=4).cells[1].outputs[0].data["text/plain"] == "4"
    assert (checkout / ".kailash_nb" / ".gitignore").read_text() == "*\n"


def test_demo_fails_with_the_traceback_of_the_failing_cell(checkout: Path, capsys: pytest.CaptureFixture[str]) -> None:
    notebook(checkout / cli.QUICKSTART, "'shop'", "unknown_name")

    assert cli.main(["demo"]) == 1

    err = capsys.readouterr().err
    assert "cell 2 failed" in err
    assert "NameError: name 'unknown_name' is not defined" in err
    assert "\x1b" not in err


def test_demo_without_its_notebook_says_where_it_looked(checkout: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["demo"]) == 1
    assert str(checkout / cli.QUICKSTART) in capsys.readouterr().err


def test_ctrl_c_ends_the_demo_and_its_kernel(tmp_path: Path) -> None:
    notebook(tmp_path / cli.QUICKSTART, "import os, time; open('pid', 'w').write(f'{os.getpid()}.'); time.sleep(600)")
    # A process in the background is born deaf to SIGINT; this one is started as a terminal would.
    program = (
        "import signal, sys; from pathlib import Path; from kailash_nb import cli\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "cli._CHECKOUT = cli._NOTEBOOKS = Path(sys.argv[1])\n"
        "sys.exit(cli.main(['demo']))"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    demo = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    written = tmp_path / ".kailash_nb" / "demo" / "pid"
    try:
        while not (written.exists() and written.read_text().endswith(".")):
            assert demo.poll() is None, demo.communicate()
            time.sleep(0.05)
        demo.send_signal(signal.SIGINT)
        _, err = demo.communicate(timeout=30)
    finally:
        demo.kill()

    assert (demo.returncode, err) == (130, "kailash_nb: stopped\n")
    with pytest.raises(ProcessLookupError):
        os.kill(int(written.read_text()[:-1]), 0)


def test_lab_refuses_a_folder_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["lab", "no/such/folder", "--no-browser"]) == 1
    assert "no/such/folder" in capsys.readouterr().err


@pytest.mark.timeout(120)
def test_lab_serves_the_folder_with_a_token_and_a_kernel_of_this_environment(tmp_path: Path) -> None:
    notebook(tmp_path / "book.ipynb", "1 + 1")
    folders = {f"JUPYTER_{kind}_DIR": str(tmp_path / kind.lower()) for kind in ("CONFIG", "DATA", "RUNTIME")}
    command = [sys.executable, "-m", "kailash_nb", "lab", str(tmp_path), "--no-browser", "--port=0"]
    with (tmp_path / "log").open("w") as log:
        lab = subprocess.Popen(command, env={**os.environ, **folders, "HOME": str(tmp_path)}, stdout=log, stderr=log)
    try:
        while not (running := list((tmp_path / "runtime").glob("jpserver-*.json"))):
            assert lab.poll() is None, (tmp_path / "log").read_text()
            time.sleep(0.1)
        time.sleep(0.2)
        server = json.loads(running[0].read_text())
        with pytest.raises(urllib.error.HTTPError, match="403"):
            _get(server, "api/contents", token="")
        assert "book.ipynb" in [entry["name"] for entry in _get(server, "api/contents")["content"]]
        kernel = _get(server, "api/kernelspecs")["kernelspecs"]["kailash_nb"]["spec"]
        assert kernel["argv"][0] == sys.executable
        assert kernel["display_name"] == "Python (kailash_nb)"
    finally:
        lab.send_signal(signal.SIGTERM)
        lab.wait(30)
    assert ("--allow-root" in (tmp_path / "log").read_text()) == (os.geteuid() == 0)


def _get(server: dict[str, Any], path: str, *, token: str | None = None) -> Any:
    token = server["token"] if token is None else token
    request = urllib.request.Request(server["url"] + path, headers={"Authorization": f"token {token}"})
    with urllib.request.urlopen(request, timeout=30) as answer:
        return json.load(answer)
