"""Who may ask: the token, and what is checked before anybody looks at it.

A page in the owner's browser can send requests to this machine too. It cannot know the token, which is accepted in the
``Authorization`` header only (there are no cookies and no tokens in URLs), its ``Origin`` is refused, and a name of its
own that it makes resolve to this machine (DNS rebinding) fails the ``Host`` check. No CORS header is ever sent.
"""

from __future__ import annotations

import hmac
import ipaddress
import os
import re
import secrets
from collections.abc import Iterable
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from ..core import Principal
from ..exceptions import ServiceError, listed
from .problems import problem

TOKEN_VARIABLE = "KAILASH_NB_TOKEN"  # noqa: S105 - the name of a variable, not a token
HOSTS_VARIABLE = "KAILASH_NB_HOSTS"
OPEN_PATHS = frozenset({"/health/live", "/health/ready"})
"""What is answered without a token: whether the server is there, and nothing about it."""

_OWNER = Principal("owner", "http")
_MADE = secrets.token_urlsafe(32)
_TOKEN = re.compile(r"[A-Za-z0-9._~+/-]{16,512}=*")  # RFC 6750, section 2.1


def token_for(given: str | None = None) -> str:
    """The owner's token: the given one, else ``KAILASH_NB_TOKEN``, else a random one that stays the same in a process.

    Raises ServiceError where it is too short to be secret or has characters that no header may hold.
    """
    token = given or os.environ.get(TOKEN_VARIABLE) or _MADE
    if not _TOKEN.fullmatch(token):
        raise ServiceError(
            f"the token ({'token=' if given else TOKEN_VARIABLE}) has 16 characters or more: letters, digits, ._~+/- "
            "only; `python3 -c 'import secrets; print(secrets.token_urlsafe())'` makes one"
        )
    return token


def proxy_hosts() -> set[str]:
    """The names by which a proxy in front may call this server: ``KAILASH_NB_HOSTS`` and JupyterHub's public name."""
    named = {host.strip().lower() for host in os.environ.get(HOSTS_VARIABLE, "").split(",")}
    hub = urlsplit(os.environ.get("JUPYTERHUB_PUBLIC_URL", "")).hostname
    return (named | {hub or ""}) - {""}


class Guard:
    """ASGI middleware: lets a request through to ``app`` if its Host, its Origin and its token are right.

    Args:
        app: what is guarded; it finds who asks in ``request.state.principal``.
        token: the owner's token.
        hosts: names that the Host header may have beside those of this machine.
    """

    def __init__(self, app: ASGIApp, *, token: str, hosts: Iterable[str] = ()) -> None:
        self.app = app
        self._token = token.encode()
        self._hosts = frozenset(host.lower() for host in hosts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, or hand it on."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        refusal = self._refusal(Headers(scope=scope), scope["path"])
        if refusal is not None:
            return await refusal(scope, receive, send)
        scope.setdefault("state", {})["principal"] = _OWNER
        return await self.app(scope, receive, send)

    def _refusal(self, headers: Headers, path: str) -> Response | None:
        hosts = headers.getlist("host")
        if len(hosts) != 1:
            return problem(400, "a request has one Host header")
        host = hosts[0].lower()
        if not self._is_ours(host):
            known = listed({"127.0.0.1", "localhost", *self._hosts})
            return problem(421, f"this server is not called {host!r:.80} (known: {known}); {HOSTS_VARIABLE} adds names")
        origins = headers.getlist("origin")
        if any(origin.lower() not in (f"http://{host}", f"https://{host}") for origin in origins):
            return problem(403, "pages of another origin may not use this server")
        if path not in OPEN_PATHS and not self._is_owner(headers.getlist("authorization")):
            return _unauthorized(sent="authorization" in headers)
        return None

    def _is_ours(self, host: str) -> bool:
        name = re.sub(r":\d*$", "", host)
        if name == "localhost" or name in self._hosts:
            return True
        try:
            return ipaddress.ip_address(name.removeprefix("[").removesuffix("]")).is_loopback
        except ValueError:
            return False

    def _is_owner(self, authorizations: list[str]) -> bool:
        scheme, _, token = authorizations[0].partition(" ") if len(authorizations) == 1 else ("", "", "")
        given = token.strip().encode("latin-1", "replace")
        return hmac.compare_digest(given, self._token) and scheme.lower() == "bearer"


def _unauthorized(*, sent: bool) -> Response:
    challenge = 'Bearer realm="kailash_nb"' + (', error="invalid_token"' if sent else "")
    detail = (
        "this is not the server's token" if sent else "a request needs the header `Authorization: Bearer <token>`"
    ) + "; the owner's `server.curl(...)` gives a line that has it"
    return problem(401, detail, headers={"www-authenticate": challenge})
