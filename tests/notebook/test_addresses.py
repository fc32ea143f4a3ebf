"""Resource URLs taken apart."""

from __future__ import annotations

import pytest

from kailash_nb.exceptions import ResourceConfigError
from kailash_nb.notebook.addresses import of_url


@pytest.mark.parametrize(
    ("url", "kind", "config", "login"),
    [
        (
            "postgresql://ann:p%40ss@db.example.com:5433/shop?sslmode=require",
            "database",
            {"user": "ann", "host": "db.example.com", "port": 5433, "database": "shop", "ssl": "require"},
            ("ann", "p@ss"),
        ),
        (
            "redis://cache.example.com:6380/2",
            "cache",
            {"host": "cache.example.com", "port": 6380, "db": 2},
            (None, None),
        ),
        ("rediss://:secret@h", "cache", {"host": "h", "ssl": "verify-full"}, (None, "secret")),
        ("redis://[::1]:6379", "cache", {"host": "::1", "port": 6379}, (None, None)),
        ("https://api.example.com/v1", "http_client", {"base_url": "https://api.example.com/v1"}, (None, None)),
        ("https://ann@api.example.com", "http_client", {"base_url": "https://api.example.com"}, ("ann", None)),
    ],
)
def test_a_url_is_type_config_and_login(
    url: str, kind: str, config: dict[str, object], login: tuple[str | None, str | None]
) -> None:
    found = of_url(url)

    assert (found.type, found.config, (found.user, found.password)) == (kind, config, login)
    assert "p%40ss" not in found.shown and "secret" not in found.shown + repr(found)


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("postgrsql://h/d", "did you mean 'postgresql'"),
        ("mysql://u:hunter2@h/d", "begins with one of http, https"),
        ("redis://u:hunter2/x@h", "%2F"),
        ("redis://u:hunter2#x@h", "%23"),
        ("redis://u:hunter2@h/zero", "the number of the database"),
        ("redis://u:hunter2@h:port/0", "the port is a number"),
        ("https://u:hunter2@api.example.com/?key=hunter2", "nothing follows the path"),
        ("redis://u:hunter2@[::1", "begins with one of"),
    ],
)
def test_what_is_no_resource_url_is_refused_without_repeating_a_password(url: str, said: str) -> None:
    with pytest.raises(ResourceConfigError) as caught:
        of_url(url)

    assert said in str(caught.value) and "hunter2" not in str(caught.value)
