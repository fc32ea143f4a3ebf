"""What went wrong before anything ran, as problem details (RFC 9457, ``application/problem+json``).

An error of HTTP itself (no such path, no token, a body too large) has the type ``about:blank``, as the RFC has it. An
error of ours has a type of its own, made of its class: ``urn:kailash-nb:problem:workflow-not-found``.
"""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Awaitable, Callable, Mapping
from http import HTTPStatus
from typing import Any

import msgspec
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from ..exceptions import (
    KailashError,
    PoolExhaustedError,
    ResourceCredentialsError,
    ResourceError,
    ResourceUnavailableError,
    RunNotFoundError,
    SecretError,
    ServiceError,
    StoreError,
    WorkflowError,
    WorkflowNotFoundError,
)

logger = logging.getLogger("kailash_nb.server")

Endpoint = Callable[[Request], Awaitable[Response]]

# 422: the request does not fit. 409: the request is fine, but what the owner has stored does not serve it. 503: later.
_STATUS: Mapping[type[KailashError], int] = {
    WorkflowError: 422,
    WorkflowNotFoundError: 404,
    ResourceError: 422,
    ResourceCredentialsError: 409,
    ResourceUnavailableError: 503,
    PoolExhaustedError: 503,
    SecretError: 409,
    StoreError: 503,
    RunNotFoundError: 404,
    ServiceError: 503,
}


def problem(
    status: int, detail: str, *, kind: str | None = None, headers: Mapping[str, str] | None = None, **members: Any
) -> Response:
    """The answer to a request that started nothing.

    Args:
        status: the HTTP status.
        detail: what was wrong and what to do, for people; never a secret.
        kind: which of our problems it is (``"workflow-not-found"``); None for an error of HTTP itself.
        headers: further headers of the answer.
        members: further members of the JSON object.
    """
    title = kind.replace("-", " ").capitalize() if kind else HTTPStatus(status).phrase
    content = {
        "type": f"urn:kailash-nb:problem:{kind}" if kind else "about:blank",
        "title": title,
        "status": status,
        "detail": detail,
        **members,
    }
    return Response(
        msgspec.json.encode(content),
        status,
        {"cache-control": "no-store", **(headers or {})},
        "application/problem+json",
    )


def of_error(error: KailashError) -> Response:
    """The answer that tells an error of ours, with each of its problems in ``problems`` where it has several."""
    status = next((_STATUS[c] for c in type(error).__mro__ if c in _STATUS), 500)
    found = getattr(error, "problems", None)
    members = {"problems": list(found)} if found else {}
    return problem(status, str(error), kind=_kind(type(error)), headers=_LATER if status == 503 else None, **members)


_LATER = {"retry-after": "5"}


def _kind(error: type[KailashError]) -> str:
    words = re.findall(r"[A-Z][a-z]+", error.__name__.removesuffix("Error"))
    return "-".join(words).lower()


async def of_http_exception(_: Request, error: Exception) -> Response:
    """Starlette's handler for its own HTTPException."""
    assert isinstance(error, HTTPException)
    return problem(error.status_code, error.detail, headers=error.headers)


def answering(endpoint: Endpoint) -> Endpoint:
    """The endpoint, answering with a problem where it raises; what nobody foresaw is logged, and told as just that."""

    @functools.wraps(endpoint)
    async def answer(request: Request) -> Response:
        try:
            return await endpoint(request)
        except HTTPException:
            raise
        except KailashError as error:
            return of_error(error)
        except Exception:
            logger.exception("%s %r failed", request.method, request.scope["path"])
            return problem(500, "the server failed on this request; its log says why")

    return answer
