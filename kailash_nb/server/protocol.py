"""What a connection may do before it has asked anything: so many bytes and so many seconds of head.

uvicorn limits neither (it keeps a connection that never finishes its request, and a head of any size), so its HTTP/1.1
protocol is extended here by one timer and one count. The body has its own limits in ``app.py``.
"""

from __future__ import annotations

import asyncio

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

HEAD_SECONDS = 10.0
"""How long a request's head (or a body that nobody reads any more) may take to arrive."""

HEAD_BYTES = 64 * 1024
"""How large a request's head may be; the network's own buffer comes on top."""


class LimitedProtocol(HttpToolsProtocol):
    """One connection: closed when no request comes out of it in time, or when its head grows too large."""

    _timer: asyncio.TimerHandle | None = None
    _head = 0
    _in_body = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """See :class:`asyncio.Protocol`."""
        super().connection_made(transport)
        self.access_log = False  # `uvicorn.Config(access_log=False)` would silence every uvicorn of the process
        self._start_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        """See :class:`asyncio.Protocol`."""
        self._stop_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """See :class:`asyncio.Protocol`."""
        super().data_received(data)
        if self.transport.is_closing():
            return
        if self.cycle is not None and not self.cycle.response_complete:  # a request is being answered
            self._stop_timer()
            return
        self._start_timer()
        if not self._in_body:
            self._head += len(data)
            if self._head > HEAD_BYTES:
                self._refuse()

    def on_headers_complete(self) -> None:
        """See :class:`httptools.HttpRequestParser`."""
        self._head, self._in_body = 0, True
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        """See :class:`httptools.HttpRequestParser`."""
        self._in_body = False
        super().on_message_complete()

    def _start_timer(self) -> None:
        if self._timer is None:
            self._timer = self.loop.call_later(HEAD_SECONDS, self.transport.close)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _refuse(self) -> None:
        self.transport.write(
            b"HTTP/1.1 431 Request Header Fields Too Large\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"
        )
        self.transport.close()
