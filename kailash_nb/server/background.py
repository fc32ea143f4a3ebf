"""Serving beside the kernel: one daemon thread with an event loop of its own, on a loopback address.

A busy cell does not stop it, and it takes over no signal. What it opens belongs to its loop, and is closed there when
it stops.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import errno
import ipaddress
import json
import logging
import math
import os
import shlex
import socket
import threading
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import uvicorn

from .. import values
from ..core import Core
from ..exceptions import ServiceError
from . import auth
from .app import build_app
from .protocol import LimitedProtocol

logger = logging.getLogger("kailash_nb.server")

START_SECONDS = 15.0
"""How long the thread may take until it answers."""

EXIT_SECONDS = 2.0
"""How long requests under way get when the process ends; Jupyter kills a kernel that takes more than five."""

_LAST_SECONDS = 1.0  # for the answers of what was cancelled
_CLOSE_SECONDS = 5.0  # for the pools


def serve(core: Core, *, title: str, host: str = "127.0.0.1", port: int = 0, token: str | None = None) -> Server:
    """Serve a core's workflows from a thread of its own; returns when it answers.

    Args:
        core: whose workflows.
        title: what the server calls itself.
        host: a loopback address, or ``"localhost"``.
        port: 0 takes a free one.
        token: what callers must send; ``KAILASH_NB_TOKEN`` or a random one of this process by default.

    Raises:
        ServiceError: the host is not loopback, the port is taken, the token is too short, or the server did not start.

    The server lives until :meth:`Server.stop` or the end of the process.
    """
    address = _loopback(host)
    secret = auth.token_for(token)
    server = Server(core, title, host, _bound(address, port), secret)
    server._start()
    return server


class Server:
    """A running server; :func:`serve` makes one. Its methods may be called from any thread.

    Attributes:
        host: the host it was asked to serve on.
        port: the port it has.
        url: where it answers on this machine.
        proxy_url: where it answers behind JupyterHub's proxy (jupyter-server-proxy), or None outside a hub.
    """

    def __init__(self, core: Core, title: str, host: str, listener: socket.socket, token: str) -> None:
        address, self.port = listener.getsockname()[:2]
        self.host = host
        self.title = title
        self.url = f"http://{f'[{address}]' if ':' in address else address}:{self.port}"
        self.proxy_url = _proxy_url(self.port)
        self._token = token
        self._core = core
        self._listener = listener
        self._header = _runtime_folder() / f"server-{self.port}.header"
        app = build_app(core, title=title, token=token, hosts=auth.proxy_hosts())
        self._uvicorn = _Uvicorn(
            uvicorn.Config(
                app,
                loop="none",
                http=LimitedProtocol,
                ws="none",
                lifespan="off",
                log_config=None,
                proxy_headers=False,
                server_header=False,
            )
        )
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._run, name=f"kailash_nb server {self.port}", daemon=True)
        self._failure: BaseException | None = None
        self._ending = False

    @property
    def token(self) -> str:
        """The owner's token: what a caller sends as ``Authorization: Bearer <token>``."""
        return self._token

    @property
    def running(self) -> bool:
        """Whether it takes requests."""
        return self._thread.is_alive() and not self._ending

    def curl(self, name: str, parameters: Mapping[str, Any] | None = None) -> str:
        """A command line that runs a workflow; it works as it stands, and holds no secret.

        The token comes from a file of the user's (mode 0600) that is there as long as the server runs, so the line may
        be saved in a notebook. Needs curl 7.55 or later.
        """
        body = json.dumps({"parameters": values.to_json(dict(parameters or {}))})
        words = ["curl", "-sS"]
        if _goes_through_a_proxy(self.url):
            words += ["--noproxy", "*"]
        rest = ["-H", "Content-Type: application/json", "-d", body, f"{self.url}/api/v1/workflows/{name}/execute"]
        return f"{shlex.join(words)} -H {_in_shell(self._header)} {shlex.join(rest)}"

    def wait(self) -> None:
        """Block until the server has stopped."""
        while self._thread.is_alive():
            self._thread.join(1)

    def stop(self, timeout: float = 10) -> None:
        """Stop: requests under way get ``timeout`` seconds, their pools close, and the port is free on return.

        What still runs then is cancelled and answered with 503. Stopping twice is fine. Raises ServiceError where the
        thread does not end, because a node blocks its event loop.
        """
        atexit.unregister(self._at_exit)
        self._ending = True
        if self._loop is None:  # it never came that far
            self._uvicorn.should_exit = True
        else:
            with contextlib.suppress(RuntimeError):  # the loop has ended by itself
                self._loop.call_soon_threadsafe(self._end, timeout)
        if self._thread is threading.current_thread() or not self._thread.is_alive():
            return
        self._thread.join(timeout + 2 * _LAST_SECONDS + _CLOSE_SECONDS + 1)
        if self._thread.is_alive():
            raise ServiceError(
                f"the server on port {self.port} did not stop within {timeout:g} s: a node blocks its event loop (a "
                "blocking call in an `async def`; in a plain `def` it would run in a thread)"
            )

    # ------------------------------------------------------------------------------------------------------ the thread

    def _start(self) -> None:
        """Start the thread and wait until it answers."""
        try:
            _write_private(self._header, f"Authorization: Bearer {self._token}\n")
            self._thread.start()
            if not self._uvicorn.answers.wait(START_SECONDS):
                raise ServiceError(f"the server on port {self.port} did not start within {START_SECONDS:g} s")
            if self._failure is not None:
                raise ServiceError(f"the server on port {self.port} did not start: {self._failure}") from self._failure
        except BaseException:
            self._abandon()
            raise
        atexit.register(self._at_exit)

    def _abandon(self) -> None:
        if self._thread.is_alive():
            with contextlib.suppress(ServiceError):
                self.stop(0)
        self._forget_header()
        self._listener.close()

    def _run(self) -> None:
        loop = asyncio.new_event_loop()
        try:
            loop.run_until_complete(self._serve())
        except BaseException as error:
            self._failure = error
            if self._uvicorn.started:
                logger.exception("the server on port %d ended", self.port)
        finally:
            self._ending = True
            self._uvicorn.answers.set()
            _close(loop)

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        try:
            await self._uvicorn.serve(sockets=[self._listener])
            if left := self._uvicorn.server_state.tasks:
                await asyncio.wait(left, timeout=_LAST_SECONDS)
        finally:
            self._forget_header()
            self._listener.close()
            async with asyncio.timeout(_CLOSE_SECONDS):
                await self._core.close_loop()

    def _end(self, timeout: float) -> None:
        """Take no more requests, and cancel what still runs after ``timeout`` seconds."""
        # Gone before the port is, so that it can never be the file of the port's next owner.
        self._forget_header()
        self._uvicorn.config.timeout_graceful_shutdown = math.ceil(timeout + _LAST_SECONDS)
        self._uvicorn.should_exit = True
        assert self._loop is not None
        self._loop.call_later(timeout, self._cancel_requests)

    def _forget_header(self) -> None:
        with contextlib.suppress(OSError):  # it is gone, or never was
            self._header.unlink()

    def _cancel_requests(self) -> None:
        for task in list(self._uvicorn.server_state.tasks):
            task.cancel()

    def _at_exit(self) -> None:
        with contextlib.suppress(ServiceError):  # a daemon thread ends with the process
            self.stop(EXIT_SECONDS)

    def __repr__(self) -> str:
        also = f" ({self.proxy_url})" if self.proxy_url else ""
        return f"<Server {self.url}{also} {'running' if self.running else 'stopped'}>"


def _close(loop: asyncio.AbstractEventLoop) -> None:
    """Cancel what is left on a loop, and close it.

    ``asyncio.run`` would wait for the loop's worker threads as well: minutes for one that blocks, and at the end of the
    process, when no thread can be started any more, not at all.
    """
    try:
        tasks = asyncio.all_tasks(loop)
        for task in tasks:
            task.cancel()
        if tasks:
            loop.run_until_complete(asyncio.wait(tasks, timeout=_LAST_SECONDS))
        loop.run_until_complete(loop.shutdown_asyncgens())
    finally:
        loop.close()


class _Uvicorn(uvicorn.Server):
    """uvicorn's server, which tells when it answers."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.answers = threading.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.answers.set()


def _loopback(host: str) -> str:
    """The loopback address that a host means; raises ServiceError for any other."""
    if host == "localhost":
        return "127.0.0.1"
    try:
        if ipaddress.ip_address(host).is_loopback:
            return host
    except ValueError:
        pass
    raise ServiceError(
        f"cannot serve on {host!r}: other machines would reach it, and this version has one token and no TLS; serve on "
        "127.0.0.1 and put a proxy with TLS in front"
    )


def _bound(address: str, port: int) -> socket.socket:
    """A socket bound to the port; raises ServiceError where that is not to be had."""
    if not isinstance(port, int) or not 0 <= port <= 65535:
        raise ServiceError(f"a port is a number from 0 (take a free one) to 65535, not {port!r}")
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    # asyncio turns Nagle's delay (40 ms per answer) off only where a socket is called TCP by its protocol number.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        # Without it, connections of the previous server that are still in TIME_WAIT would keep the port for a minute.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((address, port))
    except OSError as error:
        listener.close()
        why = {errno.EADDRINUSE: "it is in use", errno.EACCES: "ports below 1024 need root"}
        raise ServiceError(
            f"cannot serve on port {port} of {address}: {why.get(error.errno or 0, error.strerror)}; "
            "choose another port, or 0 for a free one"
        ) from None
    return listener


def _in_shell(header: Path) -> str:
    """``@file`` for a shell; the home folder by its variable, since the line may be saved and shown to others."""
    try:
        inside = header.relative_to(Path.home()).as_posix()
    except (ValueError, RuntimeError):
        return shlex.quote(f"@{header}")
    return f'"@$HOME/{inside}"' if shlex.quote(inside) == inside else shlex.quote(f"@{header}")


def _runtime_folder() -> Path:
    """Where this user's files live that end with a process."""
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    if runtime and os.access(runtime, os.W_OK | os.X_OK) and Path(runtime).stat().st_uid == os.getuid():
        return Path(runtime) / "kailash_nb"
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "kailash_nb"


def _write_private(path: Path, text: str) -> None:
    """Write a file that only its owner can read; raises ServiceError where that is not possible."""
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        path.unlink(missing_ok=True)  # of a process that was killed: a file of another's mode is not written into
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:  # noqa: PTH123
            file.write(text)
    except OSError as error:
        raise ServiceError(
            f"cannot write {path}: {error.strerror}; set XDG_STATE_HOME to a folder that is yours"
        ) from None


def _proxy_url(port: int) -> str | None:
    """Where a JupyterHub's jupyter-server-proxy offers this port: a URL where the hub tells its own, else a path."""
    prefix = os.environ.get("JUPYTERHUB_PUBLIC_URL") or os.environ.get("JUPYTERHUB_SERVICE_PREFIX")
    return f"{prefix.rstrip('/')}/proxy/{port}/" if prefix else None


def _goes_through_a_proxy(url: str) -> bool:
    """Whether curl would send a request for this URL to a proxy, by the environment."""
    proxies = urllib.request.getproxies_environment()
    host = url.partition("//")[2]
    return bool({"http", "all"} & proxies.keys()) and not urllib.request.proxy_bypass(host)
