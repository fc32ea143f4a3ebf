"""The embedded servers that tests share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from kailash_nb.resources.embedded import Address


@dataclass(frozen=True)
class Services:
    """Embedded servers on a temporary folder, up for as long as the tests run."""

    postgres: Address
    valkey: Address
    folder: Path
