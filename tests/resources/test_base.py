from __future__ import annotations

import pytest

from kailash_nb.exceptions import ResourceConfigError
from kailash_nb.resources.base import Average, Credentials, Setting, default_tls, normalised

SCHEMA = {
    "host": Setting(str),
    "port": Setting(int, default=5432, minimum=1, maximum=65535),
    "timeout": Setting((int, float), default=5.0, minimum=0, unit="seconds"),
    "max_size": Setting(int, default=10),
    "pool_size": Setting(int, alias_of="max_size"),
    "ssl": Setting(str, choices=("off", "on")),
    "embedded": Setting(bool, default=False),
}


def test_defaults_are_filled_in_and_aliases_resolved_in_the_order_of_the_schema() -> None:
    whole = normalised("database", SCHEMA, {"pool_size": 3, "host": "x"})
    assert whole == {"host": "x", "port": 5432, "timeout": 5.0, "max_size": 3, "ssl": None, "embedded": False}
    assert list(whole) == ["host", "port", "timeout", "max_size", "ssl", "embedded"]


def test_what_is_normalised_stays_as_it_is() -> None:
    whole = normalised("database", SCHEMA, {"host": "x"})
    assert normalised("database", SCHEMA, whole) == whole


def test_a_whole_number_of_seconds_is_the_same_as_its_float() -> None:
    assert repr(normalised("database", SCHEMA, {"timeout": 3})["timeout"]) == "3.0"


def test_every_problem_is_told_at_once() -> None:
    config = {"hots": "x", "port": 0, "timeout": "soon", "ssl": "maybe", "embedded": 1, "pool_size": 1, "max_size": 2}
    with pytest.raises(ResourceConfigError) as caught:
        normalised("database", SCHEMA, config)
    told = "; ".join(caught.value.problems)
    for part in (
        "unknown config key 'hots'; did you mean 'host'?",
        "'port' is at least 1, not 0",
        "'timeout' is int or float (seconds), not 'soon'",
        "'ssl' is one of 'off', 'on', not 'maybe'",
        "'embedded' is bool, not 1",
        "another name of 'max_size', and the two differ",
    ):
        assert part in told
    assert len(caught.value.problems) == 6


def test_a_bool_is_no_number_and_not_a_number_has_no_range() -> None:
    for config in ({"port": True}, {"port": 70000}, {"timeout": float("nan")}):
        with pytest.raises(ResourceConfigError):
            normalised("database", SCHEMA, config)


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST.", "127.0.0.1", "127.8.9.1", "::1", "[::1]"])
def test_loopback_names_need_no_tls(host: str) -> None:
    assert default_tls(host) == "off"


@pytest.mark.parametrize("host", ["example.com", "10.0.0.1", "localhost.example.com", "0.0.0.0", "2130706433", ""])
def test_other_names_need_tls(host: str) -> None:
    assert default_tls(host) == "verify-full"


def test_the_average_follows_the_newest_durations() -> None:
    average = Average()
    assert average.metric() == {}
    average.add(1.0)
    assert average.metric() == {"avg_response_time_ms": 1000.0}
    for _ in range(40):
        average.add(0.001)
    assert average.metric()["avg_response_time_ms"] < 2


def test_credentials_show_no_way_to_the_secret() -> None:
    async def reveal() -> dict[str, str]:
        return {"password": "canary"}

    assert repr(Credentials("db", 2, reveal)) == "Credentials(name='db', version=2)"
