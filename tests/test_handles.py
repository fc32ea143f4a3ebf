"""What people hold beside the gateway, and what a front end is told."""

from contextlib import contextmanager

import pytest

from kailash_nb import handles
from kailash_nb.exceptions import NodeError
from kailash_nb.gateway import Gateway
from kailash_nb.handles import Checks
from kailash_nb.resources.registry import CheckResult
from kailash_nb.secrets.manager import SecretManager


class Screen:
    """A front end that writes down what it is told."""

    def __init__(self):
        self.told = []

    def say(self, text):
        self.told.append(text)

    def place(self, filename):
        return "cell [7]" if filename == __file__ else None

    def debug(self, session):
        self.told.append(session)

    @contextmanager
    def foreground(self, pending):
        self.told.append(f"begin {pending.name}")
        yield
        self.told.append("end")


@pytest.fixture
def screen():
    screen = Screen()
    handles.set_frontend(screen)
    yield screen
    handles.set_frontend(None)


@pytest.fixture
async def gateway(tmp_path):
    secrets = SecretManager(tmp_path / "secrets.db", key=bytes(32))
    gateway = Gateway("handles", secrets=secrets)
    yield gateway
    await gateway.shutdown()
    await secrets.close()


async def test_a_front_end_surrounds_awaited_runs_names_places_and_opens_debug_sessions(gateway, screen):
    @gateway.node
    def divide(by):
        return 1 / by

    share = gateway.workflow("share", divide)
    assert (await share(by=2))["divide"] == 0.5
    with pytest.raises(NodeError, match=r"divide failed, cell \[7\] line \d+") as caught:
        await share(by=0)
    session = caught.value.run.debug()
    assert screen.told == ["begin share", "end", "begin share", "end", session]
    assert "by = 0" in repr(session)
    assert "Mend node 'divide'" in repr(session)


async def test_every_observer_of_a_run_sees_its_events(gateway):
    @gateway.node
    async def one():
        return 1

    first, second = [], []
    await gateway.workflow("w", one)().observe(first.append).observe(second.append)
    assert [e.kind for e in first] == ["run.started", "node.started", "node.completed", "run.finished"]
    assert first == second


def test_checks_read_as_lines_and_as_a_table():
    checks = Checks(
        [
            CheckResult("db", "database", "healthy", 1.25, "PostgreSQL 18.4"),
            CheckResult("cache", "cache", "unhealthy", error="127.0.0.1:1 refused the connection"),
        ]
    )
    assert not checks.ok
    assert "1.2 ms  PostgreSQL 18.4" in repr(checks)
    assert "refused the connection" in repr(checks)
    assert list(checks.frame()["status"]) == ["healthy", "unhealthy"]
    assert "no resources are registered" in repr(Checks())
