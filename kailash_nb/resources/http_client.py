"""The ``http_client`` resource: an httpx client on a connection pool of its own.

What it adds to httpx:

- One wall-clock deadline for a whole request: waiting for a connection, redirects and the body included. httpx's own
  timeouts start anew with every byte that drips in.
- Errors that tell whether the request was sent. Only connecting is tried again.
- The queue for connections is ours, and httpcore's pool below is unbounded: a request cancelled in httpcore's queue
  takes a connection with it for good (encode/httpcore#1093).
- The login is added below the client, to what goes over the wire, and only where that goes to the origin of
  ``base_url``: no other host gets it, neither by an absolute URL nor by a redirect nor by a proxy named in the
  environment; and it stands in no request or response object that a node could print.
- Each node has its own cookies and its own changes to the client; the connections are shared.
"""

from __future__ import annotations

import asyncio
import base64
import re
import socket
import ssl
import time
from collections.abc import AsyncIterator, Generator, Iterator, Mapping
from contextlib import asynccontextmanager, suppress
from typing import Any, ClassVar, Literal, Self

import httpx

from ..exceptions import (
    PoolExhaustedError,
    ResourceConfigError,
    ResourceCredentialsError,
    ResourceError,
    ResourceUnavailableError,
    listed,
)
from .base import Average, Credentials, Setting, Use, Waited, normalised

_SCHEMA: Mapping[str, Setting] = {
    "base_url": Setting(str),
    "headers": Setting(dict, default={}),
    "timeout": Setting((int, float), default=30.0, minimum=0.01, maximum=86400, unit="seconds"),
    "connect_timeout": Setting((int, float), default=5.0, minimum=0.01, maximum=86400, unit="seconds"),
    "retries": Setting(int, default=2, minimum=0, maximum=10, unit="further attempts to connect"),
    "max_connections": Setting(int, default=20, minimum=1, maximum=10000, unit="connections"),
    "pool_size": Setting(int, alias_of="max_connections"),
    "max_pool_size": Setting(int, alias_of="max_connections"),
    "auth": Setting(str, choices=("bearer", "basic", "header")),
    "auth_header": Setting(str),
    "ssl": Setting(str, choices=("off", "verify-full")),
}

_HEADER_NAME = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+")  # a token of RFC 9110, 5.6.2
_TOKEN_FIELDS = ("token", "api_key", "access_token", "key")
_FIRST_PAUSE = 0.1
_WORTH_TELLING = 0.001
_ATTEMPT = "kailash_nb.attempt"
_NOT_SENT = (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout)
_CALLERS_MISTAKES = (httpx.UnsupportedProtocol, httpx.LocalProtocolError)


def _ignore(seconds: float) -> None:
    pass


class HttpClientType:
    """``http_client``: an HTTP API, as an ``httpx.AsyncClient``.

    Config:
        base_url: where relative URLs start, http or https; the login goes to its origin only.
        headers: sent with every request; no secrets here.
        timeout: seconds for a whole request, its body included; 30 where absent. ``client.get(url, timeout=...)`` sets
            it for one request. A body that is streamed has it for each of its parts.
        connect_timeout: seconds for connecting; 5 where absent.
        retries: how often connecting is tried again; 2 where absent. What was sent is never sent again.
        max_connections: connections at once, 20 where absent; ``pool_size`` and ``max_pool_size`` mean the same.
        auth: how the secret is sent: ``"bearer"`` (``Authorization: Bearer ...``), ``"basic"`` (user and password) or
            ``"header"`` (a header of its own). Where absent, by the secret's fields: ``token``, ``api_key``,
            ``access_token`` or ``key`` is a bearer token, ``password`` is the basic scheme.
        auth_header: the header of ``"header"``; ``X-API-Key`` where absent.
        ssl: ``"verify-full"`` is what https means where absent; ``"off"`` checks no certificate.

    No redirect is followed unless a request says ``follow_redirects=True``. ``response.json()`` may be awaited or not.
    """

    name: ClassVar[str] = "http_client"

    def normalise(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """The whole config; raises ResourceConfigError."""
        whole = normalised(self.name, _SCHEMA, config)
        problems = [*_header_problems(whole["headers"])]
        whole["headers"] = dict(whole["headers"])
        try:
            url = _base_url(whole["base_url"])
        except ValueError as error:
            raise ResourceConfigError(self.name, [f"'base_url' {error}", *problems]) from None
        whole["base_url"] = str(url).rstrip("/")
        if url.scheme == "http" and whole["ssl"] == "verify-full":
            problems.append("'ssl' is 'verify-full', but base_url is not https")
        whole["ssl"] = whole["ssl"] or ("off" if url.scheme == "http" else "verify-full")
        if whole["auth_header"] is not None and whole["auth"] in ("bearer", "basic"):
            problems.append(f"'auth_header' goes with auth 'header', not {whole['auth']!r}")
        if whole["auth"] == "header" or whole["auth_header"] is not None:
            whole |= {"auth": "header", "auth_header": whole["auth_header"] or "X-API-Key"}
            problems += _header_problems({whole["auth_header"]: ""})
        if problems:
            raise ResourceConfigError(self.name, problems)
        return whole

    def use(self, config: Mapping[str, Any]) -> Use | None:
        """What the login would be sent to."""
        return Use(self.name, _origin(httpx.URL(config["base_url"])), config["ssl"])

    async def open(self, config: Mapping[str, Any], credentials: Credentials | None) -> HttpResource:
        """Open it on the running loop; connections are made at first use."""
        return HttpResource(config, _Login(config, credentials) if credentials else None)


class HttpResource:
    """One pool of connections. Lives on the loop that opened it until the registry closes it."""

    def __init__(self, config: Mapping[str, Any], login: _Login | None) -> None:
        self.config = config
        self.login = login
        self.average = Average()
        self.closed = False
        self.active = 0
        self.waiting = 0
        self.requests = 0
        size = config["max_connections"]
        self.slots = asyncio.Semaphore(size)
        tls_off = config["ssl"] == "off" and config["base_url"].startswith("https:")
        self.transport = httpx.AsyncHTTPTransport(
            verify=False if tls_off else _verified(),
            trust_env=False,
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=size),
        )

    @asynccontextmanager
    async def lease(self, waited: Waited) -> AsyncIterator[HttpClient]:
        """A client for one node; a response the node left open is closed behind it."""
        client = HttpClient(_Wire(self, self.login), self.config, waited)
        try:
            yield client
        finally:
            await client.aclose()

    async def ping(self) -> str:
        """Ask for the head of ``base_url``, without the login; any answer is a sign of life."""
        client = HttpClient(_Wire(self, None), self.config, _ignore)
        response = await client.head(self.config["base_url"])
        return f"{response.http_version} {response.headers.get('server', '')}".strip()[:80]

    def statistics(self) -> dict[str, float | int]:
        """The pool's figures."""
        return {
            "pool_size": self.config["max_connections"],
            "active_connections": self.active,
            "waiting": self.waiting,
            "requests": self.requests,
            **self.average.metric(),
        }

    async def take(self) -> None:
        """Wait in line until one more connection may be used."""
        self.waiting += 1
        try:
            await self.slots.acquire()
        finally:
            self.waiting -= 1
        self.active += 1

    def give_back(self) -> None:
        """One connection is used no longer."""
        self.active -= 1
        self.slots.release()

    async def close(self) -> None:
        """Close every connection, also those in use: their requests fail with an unknown outcome."""
        self.closed = True
        with suppress(TimeoutError, httpx.HTTPError):
            async with asyncio.timeout(2):
                await self.transport.aclose()


class HttpClient(httpx.AsyncClient):
    """What a node gets: an ``httpx.AsyncClient`` with one deadline per request and errors that say what to do.

    Raises ResourceUnavailableError or PoolExhaustedError where there is no answer; an answer is a response whatever its
    status, and ``response.raise_for_status()`` raises ``httpx.HTTPStatusError``. Lives as long as the node.
    """

    _transport: _Wire

    def __init__(self, wire: _Wire, config: Mapping[str, Any], waited: Waited) -> None:
        super().__init__(
            base_url=config["base_url"],
            headers=config["headers"],
            timeout=httpx.Timeout(config["timeout"], connect=config["connect_timeout"], pool=None),
            transport=wire,
            trust_env=False,
        )
        self._waited = waited

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        """Nothing: the connections are the resource's, and the node may go on using the client."""

    async def aclose(self) -> None:
        """Close the responses that are still open; the connections are the resource's."""
        await self._transport.give_back()

    async def send(self, request: httpx.Request, **options: Any) -> httpx.Response:
        """Send one request, as httpx does, under one deadline."""
        resource = self._transport.resource
        timeouts = request.extensions.get("timeout") or self.timeout.as_dict()
        attempt = _Attempt(self._waited, timeouts.get("read"))
        request.extensions = {**request.extensions, _ATTEMPT: attempt}
        response: httpx.Response | None = None
        with suppress(TimeoutError):
            async with asyncio.timeout(attempt.seconds):
                response = await super().send(request, **options)
        if response is None:
            raise self._transport.late(request.url, attempt)
        resource.requests += 1
        resource.average.add(time.perf_counter() - attempt.started)
        return response


class Response(httpx.Response):
    """An ``httpx.Response`` whose :meth:`json` may be awaited."""

    def json(self, **kwargs: Any) -> Any:
        """The body's value, as ``response.json()`` or as ``await response.json()``.

        Objects and arrays come as a dict or list that can be awaited, once or not at all, and gives the plain one; they
        pickle, copy and compare as the plain ones. A string, number, bool or null is plain and cannot be awaited.
        """
        value = super().json(**kwargs)
        if type(value) is dict:
            return JsonObject(value)
        return JsonArray(value) if type(value) is list else value


class JsonObject(dict[str, Any]):
    """A dict; ``await`` gives the plain one."""

    def __await__(self) -> Generator[None, None, dict[str, Any]]:
        yield from ()
        return dict(self)

    def __reduce__(self) -> tuple[Any, ...]:
        return dict, (dict(self),)


class JsonArray(list[Any]):
    """A list; ``await`` gives the plain one."""

    def __await__(self) -> Generator[None, None, list[Any]]:
        yield from ()
        return list(self)

    def __reduce__(self) -> tuple[Any, ...]:
        return list, (list(self),)


class _Attempt:
    """How far one request got, redirects (``answered``) included. It travels in the request's extensions."""

    def __init__(self, waited: Waited, seconds: float | None) -> None:
        self.started = time.perf_counter()
        self.seconds = seconds
        self.phase: Literal["waiting", "connecting", "sent"] = "waiting"
        self.answered = False
        self._waited = waited

    async def trace(self, event: str, info: Mapping[str, Any]) -> None:
        """Told by httpcore what it does with the request."""
        if event.endswith(".send_request_headers.started"):
            waited = time.perf_counter() - self.started
            if self.phase != "sent" and waited > _WORTH_TELLING:
                self._waited(waited)
            self.phase = "sent"


class _Wire(httpx.AsyncBaseTransport):
    """What lies below one node's client: the shared connections, with the login added where it belongs."""

    def __init__(self, resource: HttpResource, login: _Login | None) -> None:
        self.resource = resource
        self._login = login
        self._bodies: set[_Body] = set()

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        attempt: _Attempt = request.extensions[_ATTEMPT]
        await self.resource.take()
        response: httpx.Response | Exception | None = None
        try:
            response = await self._sent(await self._outgoing(request, attempt), attempt)
        finally:
            if not isinstance(response, httpx.Response):
                self.resource.give_back()
        if isinstance(response, Exception):
            raise response
        body = _Body(self, response.stream, request.url, attempt)
        self._bodies.add(body)
        attempt.answered = True
        return Response(response.status_code, headers=response.headers, stream=body, extensions=response.extensions)

    async def _outgoing(self, request: httpx.Request, attempt: _Attempt) -> httpx.Request:
        attempt.phase = "connecting"
        # The client's own request stays without the login: responses show it, and redirects copy its headers.
        outgoing = httpx.Request(
            request.method,
            request.url,
            headers=request.headers,
            stream=request.stream,
            extensions={**request.extensions, "trace": attempt.trace},
        )
        if self._login and self._login.origin == _origin(request.url):
            await self._login.add(outgoing)
        return outgoing

    async def _sent(self, outgoing: httpx.Request, attempt: _Attempt) -> httpx.Response | Exception:
        """The response, or the error to raise: one that keeps nothing of the frames in which the login stands."""
        pause, left = _FIRST_PAUSE, self.resource.config["retries"]
        while True:
            if self.resource.closed:
                told = f"{self._where(outgoing.url)}: was closed; nothing was sent"
                return ResourceUnavailableError(told, outcome="not sent")
            try:
                return await self.resource.transport.handle_async_request(outgoing)
            except _CALLERS_MISTAKES as error:
                return type(error)(str(error))
            except httpx.TransportError as error:
                again = isinstance(error, httpx.ConnectError) and not any(
                    isinstance(c, ssl.SSLError) for c in _causes(error)
                )
                if not again or not left:
                    return self.failure(outgoing.url, attempt, error)
            await asyncio.sleep(pause)
            pause, left = pause * 2, left - 1

    def done(self, body: _Body) -> None:
        self.resource.give_back()
        self._bodies.discard(body)

    async def give_back(self) -> None:
        for body in tuple(self._bodies):
            await body.aclose()

    async def aclose(self) -> None:
        """Nothing: the connections are shared."""

    def _where(self, url: httpx.URL) -> str:
        return f"http_client {_origin(url)}"

    def failure(self, url: httpx.URL, attempt: _Attempt, error: httpx.TransportError) -> ResourceError:
        """What to tell of a request that got no answer; reads ``error`` and keeps nothing of it."""
        where, reason = self._where(url), _reason(error)
        if not attempt.answered and (isinstance(error, _NOT_SENT) or attempt.phase != "sent"):
            advice = "Check base_url, and that the service runs"
            return ResourceUnavailableError(f"{where}: {reason}; nothing was sent. {advice}", outcome="not sent")
        told = f"{reason}. The request was sent, and whether it took effect is unknown"
        return ResourceUnavailableError(f"{where}: {told}", outcome="unknown")

    def late(self, url: httpx.URL, attempt: _Attempt) -> ResourceError:
        """What to tell of a request whose deadline has passed."""
        where, seconds = self._where(url), f"{attempt.seconds:g} s"
        if attempt.answered or attempt.phase == "sent":
            told = f"no whole answer within {seconds}. Raise 'timeout' (seconds) if it may take longer. "
            told += "The request was sent, and whether it took effect is unknown"
            return ResourceUnavailableError(f"{where}: {told}", outcome="unknown")
        if attempt.phase == "connecting":
            return ResourceUnavailableError(
                f"{where}: no connection within {seconds}; nothing was sent", outcome="not sent"
            )
        return PoolExhaustedError(
            f"{where}: all {self.resource.config['max_connections']} connections stayed busy for {seconds}. "
            "Raise 'max_connections', or close streamed responses earlier"
        )


class _Body(httpx.AsyncByteStream):
    """A response's body; its connection goes back to the pool when it is closed."""

    def __init__(self, wire: _Wire, stream: Any, url: httpx.URL, attempt: _Attempt) -> None:
        self._wire, self._stream, self._url, self._attempt = wire, stream, url, attempt
        self._open = True

    async def __aiter__(self) -> AsyncIterator[bytes]:
        failure: ResourceError | None = None
        try:
            async for part in self._stream:
                yield part
        except httpx.TransportError as error:
            failure = self._wire.failure(self._url, self._attempt, error)
        if failure:
            raise failure

    async def aclose(self) -> None:
        if self._open:
            self._open = False
            try:
                await self._stream.aclose()
            finally:
                self._wire.done(self)


class _Login:
    """Asks for the secret at each request and says it to the origin of ``base_url``; keeps nothing."""

    def __init__(self, config: Mapping[str, Any], credentials: Credentials) -> None:
        self.origin = _origin(httpx.URL(config["base_url"]))
        self._scheme: str | None = config["auth"]
        self._header: str | None = config["auth_header"]
        self._credentials = credentials

    async def add(self, request: httpx.Request) -> None:
        """Add the header to a request that is about to be sent; one that the node set itself stays."""
        problem = self._add(request, await self._credentials.reveal())
        if problem:
            raise ResourceCredentialsError(f"secret {self._credentials.name!r} {problem}")

    def _add(self, request: httpx.Request, fields: Mapping[str, Any]) -> str:
        # The problem is returned, not raised: a traceback must not hold this frame, in which the fields stand.
        token = next((fields[f] for f in _TOKEN_FIELDS if isinstance(fields.get(f), str) and fields[f]), None)
        password, user = fields.get("password"), fields.get("user") or fields.get("username")
        scheme = self._scheme or ("bearer" if token else "basic")
        name = self._header or "Authorization"
        if scheme == "basic":
            if not isinstance(password, str) or not isinstance(user, str):
                wanted = "'user' and 'password'" if self._scheme else "'token' or 'api_key', nor 'user' and 'password'"
                return f"has no {wanted} (it has {listed(fields)})"
            value = "Basic " + base64.b64encode(f"{user}:{password}".encode("utf-8", "surrogateescape")).decode()
        else:
            if token is None:
                return f"has none of the fields {listed(_TOKEN_FIELDS)} (it has {listed(fields)})"
            if not token.isascii() or not token.isprintable():
                return "holds characters that no HTTP header may hold; was it pasted with a line break?"
            value = token if scheme == "header" else f"Bearer {token}"
        request.headers.setdefault(name, value)
        return ""


def _base_url(text: str | None) -> httpx.URL:
    if not text:
        raise ValueError("is missing")
    try:
        url = httpx.URL(text)
    except httpx.InvalidURL as error:
        raise ValueError(f"is no URL ({error})") from None
    if url.scheme not in ("http", "https") or not url.host:
        raise ValueError("is an http or https URL, such as 'https://api.example.com/v1'")
    if url.userinfo:
        raise ValueError("holds a login; store it (`%secret NAME`) and pass credentials_ref='NAME'")
    if url.query or url.fragment:
        raise ValueError("ends with its path; pass what follows '?' as params= of a request")
    return httpx.URL(_origin(url)).copy_with(raw_path=url.raw_path)


def _origin(url: httpx.URL) -> str:
    host = url.raw_host.decode("ascii").lower()
    port = "" if url.port in (None, {"http": 80, "https": 443}.get(url.scheme)) else f":{url.port}"
    return f"{url.scheme}://{f'[{host}]' if ':' in host else host}{port}"


def _header_problems(headers: Mapping[str, Any]) -> Iterator[str]:
    for name, value in headers.items():
        if not _HEADER_NAME.fullmatch(name):
            yield f"{name!r:.80} is no name of an HTTP header"
        if not isinstance(value, str) or not value.isascii() or not value.isprintable():
            yield f"the value of header {name!r:.80} is no printable ASCII text"


def _verified() -> ssl.SSLContext:
    context = ssl.create_default_context()
    if not context.cert_store_stats()["x509_ca"]:
        import certifi

        context.load_verify_locations(certifi.where())
    return context


def _causes(error: BaseException) -> Iterator[BaseException]:
    """``error`` and what it came from; of several causes at once, the first."""
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        inner = cause.exceptions[0] if isinstance(cause, BaseExceptionGroup) else None
        cause = inner or cause.__cause__ or cause.__context__


def _reason(error: httpx.TransportError) -> str:
    for cause in _causes(error):
        if isinstance(cause, ssl.SSLCertVerificationError):
            return f"its certificate was not accepted ({cause.verify_message})"
        if isinstance(cause, ssl.SSLError):
            return f"no TLS connection ({cause.reason or 'the server speaks no TLS'})"
        if isinstance(cause, ConnectionRefusedError):
            return "connection refused"
        if isinstance(cause, socket.gaierror):
            return "there is no such host"
    if isinstance(error, httpx.ConnectTimeout):
        return "no connection in time"
    if isinstance(error, httpx.TimeoutException):
        return "the answer stopped"
    if isinstance(error, httpx.RemoteProtocolError):
        return "the server closed the connection or sent no HTTP"
    return "the connection was lost"
