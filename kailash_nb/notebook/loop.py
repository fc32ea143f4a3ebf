"""The stop button, while a cell awaits.

ipykernel's own SIGINT handler marks an awaiting cell as to be cancelled, but wakes nothing: the cell ends only when the
loop next has something else to do. Terminal IPython raises KeyboardInterrupt into the loop, past the nodes, which then
never learn that they are cancelled. So while a run is awaited in the foreground, SIGINT cancels the cell's own task, at
once, and with it whatever the cell awaits; runs that earlier cells left in the background go on.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from types import FrameType
from typing import Any

from ..runs import seconds

Describe = Callable[[str], str]
"""Given how long it took, says what was interrupted."""

_DESCRIBE: ContextVar[list[Describe] | None] = ContextVar("describe", default=None)


class Interrupted(asyncio.CancelledError):
    """The stop button ended what a cell awaited. A cancellation like any other to asyncio; one line to the reader."""

    def _render_traceback_(self) -> list[str]:
        return [f"Interrupted: {self}"]


class Foreground:
    """Which task is the running cell, and how SIGINT ends it. Lives while the extension is loaded.

    Args:
        shell: the IPython shell whose cells it watches.
    """

    def __init__(self, shell: Any) -> None:
        self._shell = shell
        self._cell: asyncio.Task[Any] | None = None
        self._guards = 0
        self._before: Any = None
        self._asked = False  # a cancellation is on its way to the loop, which has not come round to it yet
        self._stopped = False

    def start(self) -> None:
        """Watch the shell's cells from now on; the one that runs now counts, too."""
        self._shell.events.register("pre_execute", self._cell_begins)
        self._shell.events.register("post_execute", self._cell_ends)
        self._cell_begins()

    def stop(self) -> None:
        """Watch no longer."""
        self._shell.events.unregister("pre_execute", self._cell_begins)
        self._shell.events.unregister("post_execute", self._cell_ends)
        self._cell = None

    def _cell_begins(self) -> None:
        if threading.current_thread() is threading.main_thread():
            self._cell, self._asked, self._stopped = _current_task(), False, False

    def _cell_ends(self) -> None:
        if threading.current_thread() is threading.main_thread():
            self._cell = None

    @property
    def active(self) -> bool:
        """Whether what runs now is, or is awaited by, a cell on this thread's loop."""
        cell, task = self._cell, _current_task()
        return cell is not None and task is not None and not cell.done() and cell.get_loop() is task.get_loop()

    @contextlib.contextmanager
    def guard(self, describe: Describe | None = None) -> Iterator[None]:
        """SIGINT ends what runs inside, which then raises Interrupted with the words of ``describe(time taken)``.

        Of guards inside each other the outermost raises, in the words of the innermost that has any. Does nothing
        outside a cell, or off the main thread, where there is no SIGINT.
        """
        around = _DESCRIBE.get()
        if around is not None or not self.active or threading.current_thread() is not threading.main_thread():
            if around is not None and describe is not None:
                around.append(describe)
            yield
            return
        began, words = time.monotonic(), [describe or "stopped after {}".format]
        before = _DESCRIBE.set(words)
        self._enter()
        try:
            yield
        except asyncio.CancelledError:
            if not self._stopped:
                raise
        else:
            return
        finally:
            self._leave()
            _DESCRIBE.reset(before)
        # Outside the except block, so that nothing is chained: IPython would print the chain.
        raise Interrupted(words[-1](seconds(time.monotonic() - began)))

    def _enter(self) -> None:
        # Guards overlap, and not as brackets do, where a cell gathers several runs or left one in the background.
        self._guards += 1
        if signal.getsignal(signal.SIGINT) != self._on_sigint:
            self._before = signal.signal(signal.SIGINT, self._on_sigint)

    def _leave(self) -> None:
        self._guards -= 1
        # A run that outlives its cell finds the kernel's handler back in place and leaves it there.
        if self._guards == 0 and signal.getsignal(signal.SIGINT) == self._on_sigint:
            signal.signal(signal.SIGINT, self._before)

    def _on_sigint(self, number: int, frame: FrameType | None) -> None:
        cell = self._cell
        if cell is None or cell.done():
            if callable(self._before):
                self._before(number, frame)
            return
        loop = cell.get_loop()
        if self._asked and asyncio.current_task(loop) is not None:
            # Asked twice, and the loop has not come round in between: a node computes without ever awaiting.
            raise Interrupted("stopped inside code that never awaits; a plain `def` node would run in a thread")
        self._asked = True
        loop.call_soon_threadsafe(self._cancel, cell)

    def _cancel(self, cell: asyncio.Task[Any]) -> None:
        self._asked, self._stopped = False, True
        cell.cancel()


@contextlib.contextmanager
def blocking(said: str) -> Iterator[None]:
    """SIGINT ends code inside that blocks the loop, such as a prompt; it then raises Interrupted with these words."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    except KeyboardInterrupt:  # which no task may raise: it would end the loop
        pass
    else:
        return
    finally:
        signal.signal(signal.SIGINT, before)
    raise Interrupted(said)


def _current_task() -> asyncio.Task[Any] | None:
    try:
        return asyncio.current_task()
    except RuntimeError:  # no loop runs in this thread
        return None
