"""Harbour Market: what is planted is found by plain SQL and by plain Python, and the API fails on schedule."""

from __future__ import annotations

import asyncio
import datetime as dt
import hashlib
import socket
import threading
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Iterator
from decimal import Decimal
from typing import Any

import asyncpg
import httpx
import pytest

from kailash_nb.demo import BASE, COLUMNS, DAYS, FIRST_DAY, HarbourMarket, RatesApi
from kailash_nb.exceptions import ServiceError
from kailash_nb.resources.base import Credentials
from kailash_nb.resources.database import DatabaseType

DIGEST = "44bbd1125208762ec53d164116ae65b37f14ef7cfac8f455e5e046d28d92c1f9"


@pytest.fixture(scope="module")
def market() -> HarbourMarket:
    return HarbourMarket(seed=7)


@pytest.fixture(scope="module")
def small() -> HarbourMarket:
    return HarbourMarket(seed=3, orders=5000)


def rows(market: HarbourMarket, table: str) -> list[dict]:
    return [dict(zip(COLUMNS[table], row, strict=True)) for row in market.tables[table]]


# ----------------------------------------------------------------------------------------------------------- the market


def test_the_market_is_as_large_as_its_documentation_says(market):
    assert {name: len(table) for name, table in market.tables.items()} == {
        "customers": 2500,
        "products": 400,
        "orders": 20_000,
        "order_items": len(market.tables["order_items"]),
        "payments": 20_000 - 300 + 37,
    }
    assert 55_000 < len(market.tables["order_items"]) < 65_000
    assert repr(market).startswith("<HarbourMarket seed 7: 2,500 customers, 400 products, 20,000 orders")


def test_the_same_seed_gives_the_same_shop_on_every_python(market):
    truths = [sorted(t) if isinstance(t, frozenset) else t for t in vars(market.truths).values()]

    assert hashlib.sha256(repr([market.tables, truths]).encode()).hexdigest() == DIGEST


def test_another_seed_gives_another_shop(market):
    other = HarbourMarket(seed=8)
    assert other.truths != market.truths
    assert other.tables["orders"] != market.tables["orders"]


def test_a_market_too_small_for_what_is_planted_is_refused():
    with pytest.raises(ValueError, match=r"5,000 orders or more, not 10"):
        HarbourMarket(orders=10)


@pytest.mark.parametrize("which", ["market", "small"])
def test_what_is_planted_is_found_in_the_rows_and_nothing_else_is(which, request):
    market = request.getfixturevalue(which)
    orders = {order["id"]: order for order in rows(market, "orders")}
    payments = rows(market, "payments")
    paid, repeated = set(), set()
    for payment in payments:  # in the order of time
        if payment["order_id"] in paid:
            repeated.add(payment["id"])
        paid.add(payment["order_id"])
    owners = defaultdict(set)
    for payment in payments:
        owners[payment["card"]].add(orders[payment["order_id"]]["customer_id"])
    early = {
        p["id"]: orders[p["order_id"]]["ordered_at"].date()
        for p in payments
        if p["paid_at"] < orders[p["order_id"]]["ordered_at"]
    }

    truths = market.truths
    assert repeated == truths.duplicate_payments
    assert {p["id"] for p in payments if p["amount"] < orders[p["order_id"]]["total"]} == truths.short_payments
    assert orders.keys() - paid == truths.unpaid_orders
    assert {card for card, who in owners.items() if len(who) > 1} == truths.ring_cards
    assert {len(owners[card]) for card in truths.ring_cards} == {8}
    assert early.keys() == truths.shifted_payments
    assert set(early.values()) == {truths.shifted_day}
    assert {o["id"] for o in orders.values() if o["ordered_at"].date() == truths.shifted_day} == {
        p["order_id"] for p in payments if p["id"] in early
    }
    assert (
        len(truths.duplicate_payments),
        len(truths.short_payments),
        len(truths.unpaid_orders),
        len(truths.ring_cards),
    ) == (37, 53, 300, 12)
    assert not any(p["amount"] > orders[p["order_id"]]["total"] for p in payments)
    assert all(p["currency"] == orders[p["order_id"]]["currency"] for p in payments)


def test_orders_add_up_and_are_placed_by_known_customers_in_their_currency(market):
    totals = Counter()
    for item in rows(market, "order_items"):
        totals[item["order_id"]] += item["quantity"] * item["unit_price"]
    customers = {c["id"]: c for c in rows(market, "customers")}
    for order in rows(market, "orders"):
        assert totals[order["id"]] == order["total"] > 0
        assert customers[order["customer_id"]]["currency"] == order["currency"]
        assert 0 <= (order["ordered_at"].date() - FIRST_DAY).days < DAYS


def test_one_rate_is_missing_on_one_day_on_which_it_is_needed(market):
    days = [FIRST_DAY + dt.timedelta(days=n) for n in range(DAYS)]
    currencies = {order["currency"] for order in rows(market, "orders")}
    missing = [(day, currency) for day in days for currency in currencies if currency not in market.rates(day)]

    truths = market.truths
    assert missing == [(truths.gap_day, truths.gap_currency)]
    assert all(market.rates(day)[BASE] == 1 for day in days)
    assert any(
        o["currency"] == truths.gap_currency and o["ordered_at"].date() == truths.gap_day
        for o in rows(market, "orders")
    )
    with pytest.raises(KeyError, match="not of 2024-12-31"):
        market.rates(dt.date(2024, 12, 31))


def test_the_truths_are_told_in_one_line(market):
    assert repr(market.truths) == (
        "<Truths duplicate_payments: 37, short_payments: 53, unpaid_orders: 300, ring_cards: 12, "
        f"shifted_day: {market.truths.shifted_day}, shifted_payments: {len(market.truths.shifted_payments)}, "
        f"gap_day: {market.truths.gap_day}, gap_currency: {market.truths.gap_currency}>"
    )


# --------------------------------------------------------------------------------------------------------- the database


def login_of(server: Any) -> dict[str, Any]:
    return {"host": server.host, "port": server.port, "user": server.user, "password": server.password}


@pytest.fixture
async def connection(services) -> AsyncIterator[asyncpg.Connection]:
    """A connection to an empty database of its own."""
    login = login_of(services.postgres)
    admin = await asyncpg.connect(**login, database="postgres")
    await admin.execute("create database harbour")
    connection = await asyncpg.connect(**login, database="harbour")
    yield connection
    await connection.close()
    await admin.execute("drop database harbour with (force)")
    await admin.close()


async def test_what_is_planted_is_found_by_plain_sql(connection, market):
    loaded = await market.load_into(connection)

    async def found(query: str) -> frozenset:
        return frozenset(record[0] for record in await connection.fetch(query))

    truths = market.truths
    joined = "payments p join orders o on o.id = p.order_id"
    assert loaded == {name: len(table) for name, table in market.tables.items()}
    assert truths.duplicate_payments == await found(
        "select id from (select id, row_number() over (partition by order_id order by paid_at) n from payments) p where n > 1"
    )
    assert truths.short_payments == await found(f"select p.id from {joined} where p.amount < o.total")
    assert truths.unpaid_orders == await found(
        "select id from orders o where not exists (select from payments p where p.order_id = o.id)"
    )
    assert truths.ring_cards == await found(
        f"select p.card from {joined} group by p.card having count(distinct o.customer_id) > 1"
    )
    assert truths.shifted_payments == await found(f"select p.id from {joined} where p.paid_at < o.ordered_at")
    assert {truths.shifted_day} == await found(
        f"select distinct (o.ordered_at at time zone 'utc')::date from {joined} where p.paid_at < o.ordered_at"
    )


async def test_loading_it_twice_leaves_the_same_rows(connection, small):
    digest = "select md5(string_agg(p::text, '' order by id)) from payments p"
    await small.load_into(connection)
    before = await connection.fetchval(digest)
    await connection.execute("delete from payments where id < 100")

    await small.load_into(connection)

    assert await connection.fetchval(digest) == before
    assert await connection.fetchval("select count(*) from order_items") == len(small.tables["order_items"])


async def test_a_table_of_another_owner_is_never_dropped(connection, small):
    await connection.execute("create table orders (id integer); insert into orders values (42)")

    with pytest.raises(ServiceError, match="tables of another owner: orders; load the market into an empty database"):
        await small.load_into(connection)

    assert await connection.fetch("select * from orders") == [(42,)]
    assert await connection.fetchval("select to_regclass('customers')") is None


async def test_it_loads_through_the_database_resource_and_through_a_pool(connection, services, small):
    server, kind = services.postgres, DatabaseType()

    async def reveal():
        return {"user": server.user, "password": server.password}

    config = kind.normalise({"host": server.host, "port": server.port, "database": "harbour"})
    resource = await kind.open(config, Credentials("demo", 1, reveal))
    try:
        async with resource.lease(lambda seconds: None) as database:
            assert await small.load_into(database) == {name: len(table) for name, table in small.tables.items()}
            assert await database.fetchval("select sum(total) from orders") == sum(
                o["total"] for o in rows(small, "orders")
            )
    finally:
        await resource.close()
    async with asyncpg.create_pool(**login_of(server), database="harbour", min_size=1, max_size=1) as pool:
        assert (await small.load_into(pool))["orders"] == 5000


# -------------------------------------------------------------------------------------------------------------- the API


@pytest.fixture
def api(small) -> Iterator[RatesApi]:
    with RatesApi(small, fail_every=0) as api:
        yield api


def test_the_rates_of_a_day_come_as_json(api, small):
    answer = httpx.get(f"{api.url}/rates", params={"day": "2025-02-03"})

    assert answer.json() == {"day": "2025-02-03", "base": "EUR", "rates": small.rates(dt.date(2025, 2, 3))}
    assert answer.headers["content-type"] == "application/json"


def test_the_gap_shows_in_the_api(api, small):
    gap = httpx.get(f"{api.url}/rates", params={"day": str(small.truths.gap_day)}).json()["rates"]

    assert small.truths.gap_currency not in gap and BASE in gap


def test_the_pages_of_payments_together_are_the_table(api, small):
    with httpx.Client(base_url=api.url) as client:
        pages = client.get("/payments").json()["pages"]
        found = [
            p for page in range(1, pages + 1) for p in client.get("/payments", params={"page": page}).json()["payments"]
        ]

    assert pages == 5
    assert [
        (
            p["id"],
            p["order_id"],
            dt.datetime.fromisoformat(p["paid_at"]),
            Decimal(p["amount"]),
            p["currency"],
            p["card"],
        )
        for p in found
    ] == small.tables["payments"]


@pytest.mark.parametrize(
    ("path", "status", "told"),
    [
        ("/rates", 400, "isoformat"),
        ("/rates?day=tomorrow", 400, "isoformat"),
        ("/rates?day=2031-01-01", 404, "rates of 2025-01-01 to 2025-03-31"),
        ("/payments?page=0", 404, "pages 1 to 5, not 0"),
        ("/payments?page=x", 400, "invalid literal"),
        ("/refunds", 404, "no path /refunds"),
    ],
)
def test_a_wrong_request_is_told_what_is_wrong(api, path, status, told):
    answer = httpx.get(api.url + path)

    assert answer.status_code == status
    assert told in answer.json()["error"]


def test_every_so_many_requests_one_fails_and_both_are_counted(small):
    with RatesApi(small, fail_every=3, retry_after=2) as api, httpx.Client(base_url=api.url) as client:
        answers = [client.get("/rates?day=2025-01-01") for _ in range(9)]

        assert [a.status_code for a in answers] == [200, 200, 503] * 3
        assert {a.headers.get("retry-after") for a in answers if a.status_code == 503} == {"2"}
        assert (api.requests, api.failures) == (9, 3)
        assert repr(api) == f"<RatesApi {api.url} 9 requests, 3 answered with 503>"


def test_without_the_token_nothing_is_answered_and_nothing_counted(small):
    with RatesApi(small, fail_every=0, token="sesame") as api:
        get = f"{api.url}/rates?day=2025-01-01"
        wrong = [httpx.get(get), httpx.get(get, headers={"Authorization": "Bearer sesam"})]
        right = httpx.get(get, headers={"Authorization": "Bearer sesame"})

        assert [a.status_code for a in (*wrong, right)] == [401, 401, 200]
        assert api.requests == 1
        assert "sesame" not in repr(api) + wrong[0].text


def test_latency_is_added_to_every_answer(small):
    with RatesApi(small, fail_every=0, latency=0.2) as api:
        assert httpx.get(f"{api.url}/rates?day=2025-01-01").elapsed.total_seconds() >= 0.2


async def test_it_answers_many_at_once_over_connections_that_stay_open(small):
    with RatesApi(small, fail_every=0, latency=0.1) as api:
        async with httpx.AsyncClient(base_url=api.url) as client, asyncio.timeout(20):
            for _ in range(2):
                answers = await asyncio.gather(*(client.get("/rates?day=2025-01-01") for _ in range(10)))
                assert {a.http_version for a in answers} == {"HTTP/1.1"}
            assert api.requests == 20


def test_closing_ends_open_connections_and_frees_the_port(small):
    api = RatesApi(small, fail_every=0)
    before = threading.active_count()
    with httpx.Client(base_url=api.url) as client:
        assert client.get("/rates?day=2025-01-01").status_code == 200
        assert threading.active_count() == before + 1

        api.close()
        api.close()

        assert threading.active_count() == before - 1
        with socket.socket() as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(("127.0.0.1", int(api.url.rpartition(":")[2])))
        with pytest.raises(httpx.HTTPError):
            client.get("/rates?day=2025-01-01")
