"""Which of our values are shown how, in every front end that IPython has."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from ..gateway import Gateway, made
from ..handles import Checks, WorkflowHandle
from ..runs import Run, Timeline
from ..workflow import Workflow
from . import view

_SERVER = ("kailash_nb.server.background", "Server")  # by name: the server's libraries load when it is first used


def register(shell: Any) -> None:
    """Show our values as HTML, with plain text beside it."""
    for mimetype, kind, show in _formatters():
        shell.display_formatter.formatters[mimetype].for_type(kind, show)


def hidden(text: str) -> str:
    """The text without any secret that a gateway of this process knows; every display goes through here."""
    for gateway in made().values():
        text = gateway.secret_manager.redactor.redact(text)
    return text


def unregister(shell: Any) -> None:
    """Show them by their repr again."""
    for mimetype, kind, _ in _formatters():
        shell.display_formatter.formatters[mimetype].pop(kind, None)


def _formatters() -> Iterator[tuple[str, Any, Callable[..., Any]]]:
    pages: dict[Any, Callable[[Any], str]] = {
        Run: lambda run: view.run_html(run, workflow_of(run)),
        Timeline: view.timeline_html,
        WorkflowHandle: view.workflow_html,
        Checks: view.checks_html,
        Gateway: view.gateway_html,
        ".".join(_SERVER): view.server_html,
    }
    texts: dict[Any, Callable[[Any], str]] = {Run: view.run_text, Gateway: view.gateway_text}
    for kind, show in pages.items():
        yield "text/html", kind, lambda value, show=show: hidden(show(value))
    for kind, show in texts.items():
        yield "text/plain", kind, lambda value, printer, _cycle, show=show: printer.text(hidden(show(value)))


def workflow_of(run: Run) -> Workflow | None:
    """The version of the workflow that a run was of, if its gateway is still there and knows it."""
    gateway = run._gateway
    if not isinstance(gateway, Gateway):
        return None
    return next((w.workflow for w in gateway.core.workflows.values() if w.workflow.hash == run.version), None)
