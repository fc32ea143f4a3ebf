"""What a run store is: the protocol behind which a run's record lives in memory, SQLite or PostgreSQL.

A record is only ever added to. Who may add to it is decided by an epoch: starting a run gives its owner the first
lease, claiming it gives the claimer one with the next epoch, and from then on every write under an older lease fails
with FencedError. So an owner that was paused or cut off can compute, but cannot record.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from ..runs import Event, RunRecord, RunStart, RunStatus


@dataclass(frozen=True, slots=True)
class RunLease:
    """The right to record events of one run, until somebody claims it with a higher epoch."""

    run_id: str
    epoch: int
    owner: str


class RunStore(Protocol):
    """Where runs are recorded. One store may serve several gateways, event loops and threads at once."""

    async def start(self, start: RunStart, owner: str) -> RunLease:
        """Record that a run begins; returns its first lease. Raises StoreError if its id is taken."""

    async def append(self, lease: RunLease, event: Event) -> None:
        """Record an event; when this returns it is as durable as the store makes it.

        Raises FencedError if the run was claimed by somebody else or is finished, StoreError if the node already has a
        recorded value (which never changes), RunNotFoundError if there is no such run.
        """

    async def claim(self, run_id: str, owner: str) -> RunLease:
        """Take an unfinished run over; older leases are fenced off from now on.

        Raises FencedError if the run is finished, RunNotFoundError if there is none.
        """

    async def load(self, run_id: str) -> RunRecord:
        """The record of a run so far; raises RunNotFoundError."""

    async def list(
        self, workflow: str | None = None, status: RunStatus | None = None, limit: int = 100
    ) -> list[RunRecord]:
        """The records of runs, newest first."""

    async def close(self) -> None:
        """Let go of what the store holds open; closing twice is fine."""
