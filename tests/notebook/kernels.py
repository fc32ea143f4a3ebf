"""A real kernel, spoken to over the Jupyter protocol as JupyterLab does."""

from __future__ import annotations

import os
import queue
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jupyter_client.manager import KernelManager

_COLOURS = re.compile(r"\x1b\[[0-9;]*m")


@dataclass
class Cell:
    """What one cell gave: its reply, and the outputs that belong to it."""

    status: str = ""
    text: str = ""
    html: list[str] = field(default_factory=list)
    plain: list[str] = field(default_factory=list)
    updates: list[dict[str, Any]] = field(default_factory=list)
    value: dict[str, Any] = field(default_factory=dict)
    error: str = ""
    next_input: str = ""
    messages: list[dict[str, Any]] = field(default_factory=list)

    @property
    def number(self) -> int:
        """Its number: 4 for ``In [4]``."""
        return int(next(m["execution_count"] for m in self.messages if m["type"] == "execute_input"))

    @property
    def everything(self) -> str:
        """All that the front end was sent for this cell."""
        return repr(self.messages)


class Kernel:
    """One kernel process and a client of it."""

    def __init__(self, manager: KernelManager) -> None:
        self.manager = manager
        self.client = manager.client()
        self.client.start_channels()
        self.client.wait_for_ready(timeout=60)

    def send(self, code: str, *, stdin: bool = False) -> str:
        """Start a cell; returns its message id."""
        return str(self.client.execute(code, allow_stdin=stdin, stop_on_error=True))

    def collect(self, message: str, timeout: float = 60, answer: Callable[[str], str] | None = None) -> Cell:
        """Wait for a cell to end; ``answer`` is asked for what is typed at a prompt."""
        cell, end = Cell(), time.monotonic() + timeout
        while time.monotonic() < end:
            if answer is not None and self.client.stdin_channel.msg_ready():  # type: ignore[attr-defined]
                asked = self.client.get_stdin_msg(timeout=1)["content"]
                assert asked["password"] is True
                self.client.input(answer(asked["prompt"]))
            try:
                heard = self.client.get_iopub_msg(timeout=0.1)
            except queue.Empty:
                continue
            if heard["parent_header"].get("msg_id") != message:
                continue
            if heard["msg_type"] == "status" and heard["content"]["execution_state"] == "idle":
                return self._replied(cell, message)
            _take(cell, heard)
        raise AssertionError(f"the cell did not end within {timeout} s: {cell}")

    def _replied(self, cell: Cell, message: str) -> Cell:
        while True:
            reply = self.client.get_shell_msg(timeout=30)
            if reply["parent_header"].get("msg_id") == message:
                content = reply["content"]
                cell.status = content["status"]
                for payload in content.get("payload", ()):
                    if payload["source"] == "set_next_input":
                        cell.next_input = payload["text"]
                return cell

    def run(self, code: str, timeout: float = 60) -> Cell:
        """Run a cell to its end."""
        return self.collect(self.send(code), timeout)

    def ok(self, code: str) -> Cell:
        """Run a cell that must not fail."""
        cell = self.run(code)
        assert cell.status == "ok", cell.error or cell.text
        return cell

    def interrupt(self) -> None:
        """The stop button."""
        self.manager.interrupt_kernel()


def _take(cell: Cell, heard: dict[str, Any]) -> None:
    kind, content = heard["msg_type"], heard["content"]
    cell.messages.append({"type": kind, **content})
    if kind == "stream":
        cell.text += content["text"]
    elif kind in ("display_data", "execute_result"):
        cell.html.append(content["data"].get("text/html", ""))
        cell.plain.append(content["data"].get("text/plain", ""))
        if kind == "execute_result":
            cell.value = content["data"]
    elif kind == "update_display_data":
        cell.updates.append(content["data"])
    elif kind == "error":
        cell.error = _COLOURS.sub("", "\n".join(content["traceback"]))


@contextmanager
def kernel(folder: Path, **variables: str) -> Iterator[Kernel]:
    """A kernel whose home is ``folder``, with these environment variables beside the process's own."""
    manager = KernelManager(kernel_name="python3", transport="ipc", ip=str(folder / "k"))
    env = {name: value for name, value in os.environ.items() if not name.startswith("KAILASH_NB_")}
    env |= {"HOME": str(folder), "XDG_DATA_HOME": "", "XDG_CONFIG_HOME": "", "IPYTHONDIR": str(folder / "ipython")}
    env |= {"JUPYTER_RUNTIME_DIR": str(folder / "runtime"), "PYTHON_KEYRING_BACKEND": "keyring.backends.null.Keyring"}
    manager.start_kernel(env=env | variables, cwd=str(folder))
    found: Kernel | None = None
    try:
        found = Kernel(manager)
        yield found
    finally:
        if found is not None:
            found.client.stop_channels()
        manager.shutdown_kernel(now=True)
        manager.cleanup_resources()
        manager.context.destroy()
