"""What the tests of the cache resource share: opening one, and its login."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

from kailash_nb.resources.base import Credentials
from kailash_nb.resources.cache import Cache, CacheResource, CacheType

PASSWORD = "canary-Zk3-cache-password"


def credentials(**fields: Any) -> Credentials:
    async def reveal() -> Mapping[str, Any]:
        return fields or {"password": PASSWORD}

    return Credentials("cache_creds", 1, reveal)


@asynccontextmanager
async def opened(port: int, login: Credentials | None = None, **config: Any) -> AsyncIterator[CacheResource]:
    kind = CacheType()
    whole = kind.normalise({"host": "127.0.0.1", "port": port, **config})
    resource = await kind.open(whole, login or credentials())
    try:
        yield resource
    finally:
        await resource.close()


@asynccontextmanager
async def leased(port: int, login: Credentials | None = None, **config: Any) -> AsyncIterator[Cache]:
    async with opened(port, login, **config) as resource, resource.lease(lambda seconds: None) as cache:
        yield cache
