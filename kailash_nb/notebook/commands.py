"""``%secret``, ``%resource`` and ``%gateway``: the lines that set a gateway up and tell how it is."""

from __future__ import annotations

import asyncio
import getpass
import os
import warnings
from collections.abc import Sequence
from typing import Any

from IPython.core.error import StdinNotImplementedError, UsageError
from IPython.core.magic_arguments import argument
from IPython.display import display

from .. import gateway as gateways
from .. import values
from ..exceptions import ResourceError, SecretError, UnsupportedValueError, did_you_mean, listed
from ..gateway import Gateway
from ..handles import Checks
from ..references import ResourceReference
from . import view
from .addresses import Address, of_url
from .frontend import Notebook
from .loop import blocking
from .magics import arguments, awaited, literal, options, pairs

ACTIONS = ("status", "check", "runs", "serve", "stop", "use")
_LOGINS = {"database": ["user", "password"], "cache": ["password"], "http_client": ["token"]}


class Commands:
    """The line magics; called from code, each returns a task. Lives while the extension is loaded."""

    def __init__(self, notebook: Notebook) -> None:
        self.notebook = notebook
        self.shell = notebook.shell

    # --------------------------------------------------------------------------------------------------------- %secret

    @arguments(
        argument("name", nargs="?", help="the secret's name; without one, the names of the stored secrets are shown"),
        argument(
            "field", nargs="*", help="what to ask for, such as `user password`; by default what its resource needs"
        ),
        argument("--env", nargs="+", metavar="FIELD=VARIABLE", help="take fields from environment variables instead"),
    )
    def secret(self, line: str) -> Any:
        """Store a secret. Its values are asked for, and appear in no cell, output, history or variable.

        In plain Python: `await gateway.secret_manager.store_secret("db_creds", {"user": ..., "password": ...})`.
        """
        return awaited(self.notebook, self._secret(options(self.secret, line)))

    async def _secret(self, given: Any) -> None:
        manager = self.notebook.gateway.secret_manager
        if given.name is None:
            self.notebook.say(f"stored secrets: {listed(await manager.list_secrets())}")
            return
        if given.env:
            fields = {field: _environment(name) for field, name in pairs(given.env, "field=VARIABLE").items()}
        else:
            asked = given.field or await self._usual_fields(given.name)
            if literals := [text.partition("=")[0] for text in asked if "=" in text]:
                raise UsageError(
                    f"%secret takes names of fields and asks for their values; remove the value of {listed(literals)}, "
                    "which the cell and its history hold now: change it where it came from"
                )
            in_words = f"--env {' '.join(f'{field}={field.upper()}' for field in asked)}"
            fields = _asked(given.name, asked, f"`%secret {given.name} {in_words}`")
        known = manager.version(given.name)
        await manager.store_secret(given.name, fields, encrypt=True)
        word = "stored" if known is None else "replaced"
        self.notebook.say(f"{word} secret {given.name!r} ({listed(fields)})")

    async def _usual_fields(self, name: str) -> list[str]:
        """What to ask for where nothing is named: what the secret holds, or what the resource that uses it needs."""
        gateway = self.notebook.gateway
        if gateway.secret_manager.version(name) is not None:
            return list(await gateway.secret_manager.get_secret(name))
        references = map(gateway.resource_registry.reference, gateway.resource_registry.names())
        return next((_LOGINS.get(r.type, ["value"]) for r in references if r.credentials_ref == name), ["value"])

    # ------------------------------------------------------------------------------------------------------- %resource

    @arguments(
        argument("name", nargs="?", help="what nodes call it; without one, the registered resources are shown"),
        argument("what", nargs="*", help="a URL, or a type and settings: `database host=db.example.com database=shop`"),
        argument("--env", metavar="VARIABLE", help="the environment variable that holds the URL, password included"),
        argument("--credentials", metavar="SECRET", help="the stored secret to log in with, instead"),
    )
    def resource(self, line: str) -> Any:
        """Register a resource, try it, and list what is in it.

        URLs are postgresql://user@host/database, redis://host/0, rediss://, http:// and https://. The password is asked
        for and stored as the secret NAME_credentials; in the URL it would stand in the notebook.

        In plain Python: `gateway.register_resource("shop_db", ResourceReference("database", {...}, "SECRET"))` and
        `await gateway.check()`.
        """
        return awaited(self.notebook, self._resource(options(self.resource, line)))

    async def _resource(self, given: Any) -> None:
        gateway = self.notebook.gateway
        if given.name is None:
            rows = view.resource_rows(gateway)
            self.notebook.say("\n".join("  ".join(row) for row in rows) or repr(Checks()))
            return
        if given.env is not None or given.what:
            reference = await self._reference(gateway, given)
            gateway.register_resource(given.name, reference)
        await self._show_resource(gateway, given.name)

    async def _reference(self, gateway: Gateway, given: Any) -> ResourceReference:
        if given.env is None and given.what[0].isidentifier():
            config: dict[str, Any] = {k: literal(v) for k, v in pairs(given.what[1:], "setting=value").items()}
            named = config.pop("credentials_ref", None) or given.credentials
            return ResourceReference(given.what[0], config, named)
        if given.env is not None and given.what:
            raise UsageError("%resource takes a URL or --env, not both")
        if len(given.what) > 1:
            raise UsageError("%resource takes a URL, or a type and settings")
        address = of_url(_environment(given.env) if given.env is not None else given.what[0])
        if address.password is not None and given.env is None:
            raise ResourceError(
                "the URL holds a password, and so do the cell and its history now: change it on the server, then write "
                f"`%resource {given.name} {address.shown}`, which asks for the new one"
            )
        return ResourceReference(address.type, address.config, await self._login(gateway, given, address))

    async def _login(self, gateway: Gateway, given: Any, address: Address) -> str | None:
        """The secret to log in with: the one named, else one made of the URL's login and the password asked for."""
        if given.credentials is not None or (address.user is None and address.password is None):
            return str(given.credentials) if given.credentials is not None else None
        manager, secret = gateway.secret_manager, f"{given.name}_credentials"
        password = address.password
        known = await manager.get_secret(secret) if manager.version(secret) is not None else {}
        if password is None and known and known.get("user") == address.user:
            self.notebook.say(f"logs in with secret {secret!r}; `%secret {secret}` would replace it")
            return secret
        if password is None:
            remedy = f"`%secret {secret} --env user=DB_USER password=DB_PASSWORD`, then `%resource` with "
            remedy += f"`--credentials {secret}`; or `%resource {given.name} --env VARIABLE` with the whole URL in it"
            password = _asked(f"{address.shown}", ["password"], remedy)["password"]
        login = {"user": address.user} if address.user is not None else {}
        await manager.store_secret(secret, {**login, "password": password}, encrypt=True)
        self.notebook.say(f"stored secret {secret!r}")
        return secret

    async def _show_resource(self, gateway: Gateway, name: str) -> None:
        reference = gateway.resource_registry.reference(name)
        checks = {check.name: check for check in await gateway.check()}
        found = checks[name]
        rows = await _contents(gateway, reference) if found.error is None else []
        html, text = view.resource_shown(found, reference, rows)
        display({"text/html": html, "text/plain": text}, raw=True)

    # -------------------------------------------------------------------------------------------------------- %gateway

    @arguments(
        argument("action", nargs="?", default="status", help=f"{', '.join(ACTIONS)}; status by default"),
        argument("name", nargs="?", help="use: the gateway's title or variable; runs: the workflow"),
        argument("--port", type=int, default=0, help="serve: the port; 0 takes a free one"),
    )
    def gateway(self, line: str) -> Any:
        """Tell or change how the gateway is.

        status: its workflows, resources and server; check: connects to every resource now; runs: what has run, newest
        first; serve: offers the workflows over HTTP; stop: no longer; use: has the magics use another gateway.

        In plain Python: `gateway`, `await gateway.check()`, `await gateway.runs.list()`, `gateway.serve(port=0)`,
        `gateway.stop()`.
        """
        return awaited(self.notebook, self._gateway(options(self.gateway, line)))

    async def _gateway(self, given: Any) -> Any:
        if given.action not in ACTIONS:
            raise UsageError(
                f"%gateway: no action {given.action!r}{did_you_mean(given.action, ACTIONS)} (it has {listed(ACTIONS)})"
            )
        gateway = self.notebook.gateway
        if given.action == "use":
            return self._use(given.name)
        if given.action == "check":
            return await gateway.check()
        if given.action == "runs":
            return await _runs(gateway, given.name)
        if given.action == "serve":
            return await asyncio.to_thread(gateway.serve, port=given.port)
        if given.action == "stop":
            running = gateway.server is not None
            await asyncio.to_thread(gateway.stop)
            self.notebook.say("stopped" if running else "it was not serving")
            return None
        return gateway

    def _use(self, name: str | None) -> Gateway:
        known = {**gateways.made(), **{n: v for n, v in self.shell.user_ns.items() if isinstance(v, Gateway)}}
        if name not in known:
            raise UsageError(
                f"%gateway use: no gateway {name!r}{did_you_mean(str(name), known)} (there are {listed(known)})"
            )
        gateways.use(known[name])
        return known[name]


async def _runs(gateway: Gateway, workflow: str | None) -> Any:
    runs = await gateway.runs.list(workflow)
    rows = [
        {
            "run": r.id,
            "workflow": r.workflow,
            "status": str(r.status),
            "started": r.started_at,
            "seconds": round(r.execution_time, 3),
            "error": str(r.error) if r.error else None,
        }
        for r in runs
    ]
    try:
        return values.to_frame(rows) if rows else rows
    except UnsupportedValueError:  # no pandas here
        return runs


async def _contents(gateway: Gateway, reference: ResourceReference) -> list[tuple[str, str]]:
    """What is in a resource, as names and remarks: a database's tables, how many keys a cache has, an API's answer."""
    async with gateway.core.lease(reference, lambda _: None) as live:
        if reference.type == "database" and hasattr(live, "contents"):
            return [(f"{r.schema}.{r.name}", _remark(r.kind, r.rows)) for r in await live.contents()]
        if reference.type == "cache":
            return [("keys", f"{await live.dbsize():,}")]
        if reference.type == "http_client":
            response = await live.head("")
            return [(str(response.url), f"{response.status_code} {response.reason_phrase}")]
    return []


def _remark(kind: str, rows: int | None) -> str:
    return kind if rows is None else f"{kind}, about {rows:,} rows"


def _environment(name: str) -> str:
    found = os.environ.get(name)
    if not found:
        raise SecretError(f"environment variable {name!r} is not set{did_you_mean(name, os.environ)}")
    return found


def _asked(what: str, fields: Sequence[str], remedy: str) -> dict[str, str]:
    """Ask for each field without showing what is typed; raises SecretError where nobody answers."""
    found = {}
    for field in fields:
        try:
            with warnings.catch_warnings(), blocking("nothing is stored"):
                warnings.simplefilter("error", getpass.GetPassWarning)  # it would show what is typed
                found[field] = getpass.getpass(f"{what}, {field}: ")
        except (StdinNotImplementedError, EOFError, getpass.GetPassWarning):
            raise SecretError(f"nobody can be asked for {what}, {field} here; use {remedy}") from None
        if not found[field]:
            raise SecretError(f"nothing was typed for {field}; nothing is stored")
    return found
