"""The ASGI application: workflows listed, described, and run by whoever has the token.

A run that has started is answered with 200 and what became of it, also when it failed; what never started is a problem
(``problems.py``). Nothing that a caller sends becomes source or a name. A client that goes away ends nothing: its run
goes on to its end and stands in the record.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable
from typing import Any

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from .. import values
from ..core import Core, Registered
from ..exceptions import UnsupportedValueError
from ..runs import WorkflowRequest
from .auth import Guard
from .problems import answering, of_http_exception, problem

BODY_BYTES = 1024 * 1024
"""How large a request's body may be."""

BODY_SECONDS = 20.0
"""How long a request's body may take to arrive."""

DEPTH = 64
"""How deeply a request's JSON may be nested."""

# A body not much too large is read to its end: who still sends when the connection closes may lose the answer.
_DISCARDED_BYTES = 4 * BODY_BYTES
_LARGE = 256 * 1024  # bytes of values; to spell more of them in JSON takes a thread, so that others need not wait


def build_app(core: Core, *, title: str, token: str, hosts: Iterable[str] = ()) -> Starlette:
    """The workflows of a core as an ASGI application.

    Args:
        core: whose workflows.
        title: what the application calls itself.
        token: what a caller sends as ``Authorization: Bearer <token>``; the paths of ``auth.OPEN_PATHS`` need none.
        hosts: names that the Host header may have beside those of this machine.

    Belongs to no event loop before it is served; lives as long as the core.
    """
    door = _Door(core, title)
    routes = [
        Route("/api/v1/workflows", answering(door.workflows)),
        Route("/api/v1/workflows/{name}", answering(door.workflow)),
        Route("/api/v1/workflows/{name}/execute", answering(door.execute), methods=["POST"]),
        Route("/api/v1/health", answering(door.health)),
        Route("/health/live", door.live),
        Route("/health/ready", door.live),
    ]
    app = Starlette(
        routes=routes,
        middleware=[Middleware(Guard, token=token, hosts=hosts)],
        exception_handlers={HTTPException: of_http_exception},
    )
    app.router.redirect_slashes = False  # a redirected POST would be another request
    return app


class _Door:
    """The endpoints of one core."""

    def __init__(self, core: Core, title: str) -> None:
        self.core = core
        self.title = title

    async def execute(self, request: Request) -> Response:
        """``POST /api/v1/workflows/{name}/execute``."""
        name = self.core.workflow(request.path_params["name"]).name
        asked = WorkflowRequest.from_dict(_parsed(await _body(request)))
        try:
            run = await self.core.execute(name, asked, principal=request.state.principal)
        except asyncio.CancelledError:  # only the server's end cancels a request, and this is its last act
            return problem(503, f"the server stopped while {name!r} ran; the run is recorded as cancelled")
        try:
            if values.size_of(run.result) < _LARGE:
                return _answer(run.to_dict())
            return await asyncio.to_thread(lambda: _answer(run.to_dict()))
        except (UnsupportedValueError, ValueError, RecursionError) as error:
            why = "it is nested too deeply, or holds itself" if isinstance(error, RecursionError) else str(error)
            return problem(
                500,
                f"run {run.id} is {run.status} and recorded, but its result cannot be sent: {why}",
                kind="unsupported-value",
                request_id=run.id,
            )

    async def workflows(self, _: Request) -> Response:
        """``GET /api/v1/workflows``."""
        found = [registered for _, registered in sorted({**self.core.workflows}.items())]
        return _answer({"title": self.title, "workflows": [_description(registered) for registered in found]})

    async def workflow(self, request: Request) -> Response:
        """``GET /api/v1/workflows/{name}``."""
        return _answer(_description(self.core.workflow(request.path_params["name"])))

    async def health(self, _: Request) -> Response:
        """``GET /api/v1/health``: the state of every resource by the last background checks."""
        return _answer(values.to_json(self.core.health()))

    async def live(self, _: Request) -> Response:
        """``GET /health/live``, ``GET /health/ready``: the server answers, and it takes requests as long as it does."""
        return _answer({"status": "ok"})


def _description(registered: Registered) -> dict[str, Any]:
    workflow = registered.workflow
    return {
        "name": registered.name,
        "description": registered.description,
        "version": registered.number,
        "hash": workflow.hash,
        "parameters": workflow.schema,
        "resources": list(registered.resources),
        "wiring": [str(node) for node in workflow.nodes],
    }


def _answer(content: Any) -> Response:
    try:
        text = msgspec.json.encode(content)
    except UnicodeEncodeError:  # a lone surrogate, as in file names: JSON can escape it, msgspec does not
        text = json.dumps(content, allow_nan=False, separators=(",", ":")).encode()
    return Response(text, headers={"cache-control": "no-store"}, media_type="application/json")


async def _body(request: Request) -> bytes:
    """The request's body; raises HTTPException where it is no JSON by its type, too large, too slow or cut off."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    length = request.headers.get("content-length", "0")
    empty = not kind and length == "0" and "transfer-encoding" not in request.headers
    if kind != "application/json" and not empty:
        raise HTTPException(415, "a request's body is JSON: send the header `Content-Type: application/json`")
    if len(length) > 15 or int(length) > _DISCARDED_BYTES:
        raise _too_large()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            return await _read(request)
    except TimeoutError:
        detail = f"the body did not arrive within {BODY_SECONDS:g} s"
        raise HTTPException(408, detail, {"connection": "close"}) from None
    except ClientDisconnect:
        raise HTTPException(400, "the body was cut off") from None


async def _read(request: Request) -> bytes:
    body, size = bytearray(), 0
    async for chunk in request.stream():
        size += len(chunk)
        if size <= BODY_BYTES:
            body += chunk
        elif size > _DISCARDED_BYTES:
            break
    if size > BODY_BYTES:
        raise _too_large()
    return bytes(body)


def _too_large() -> HTTPException:
    return HTTPException(
        413, f"a request's body has at most {BODY_BYTES:,} bytes; store large inputs, and send where they are"
    )


def _parsed(body: bytes) -> Any:
    """The JSON of a body, ``{}`` of an empty one; raises HTTPException for what is none or nested too deeply."""
    if not body.strip():
        return {}
    try:
        content = msgspec.json.decode(body)
    except RecursionError:
        raise _too_deep() from None
    except (msgspec.DecodeError, ValueError) as error:
        raise HTTPException(400, f"this is not JSON: {error}") from None
    if body.count(b"[") + body.count(b"{") > DEPTH and _is_deep(content):
        raise _too_deep()
    return content


def _is_deep(content: Any) -> bool:
    level = [content]
    for _ in range(DEPTH):
        children = [item.values() if type(item) is dict else item for item in level]
        level = [child for items in children for child in items if type(child) in (dict, list)]
        if not level:
            return False
    return True


def _too_deep() -> HTTPException:
    return HTTPException(400, f"this JSON is nested more than {DEPTH} levels deep")
