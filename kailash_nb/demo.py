"""Harbour Market: a small shop of the northern seas, made from a seed, with planted truths to look for.

The shop sells in six currencies; a payment provider has its payments, and a flaky HTTP API the day's rates. What is
wrong with the data is known to the generator (:class:`Truths`), so a notebook can assert that its workflow found
exactly that. The same seed gives the same shop everywhere. Nothing is downloaded.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import hmac
import json
import math
import random
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from decimal import Decimal
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import cycle, islice
from typing import Any, NamedTuple, Self
from urllib.parse import parse_qs, urlsplit

from .exceptions import ServiceError

FIRST_DAY = dt.date(2025, 1, 1)
DAYS = 90
"""The shop's season: orders are from these days."""

BASE = "EUR"
COUNTRIES: Mapping[str, str] = {
    "DE": "EUR",
    "NL": "EUR",
    "FI": "EUR",
    "GB": "GBP",
    "NO": "NOK",
    "SE": "SEK",
    "DK": "DKK",
    "US": "USD",
}
"""Where the customers live, and the currency they pay in."""

_RATES = {"EUR": 1.0, "GBP": 0.84, "NOK": 11.7, "SEK": 11.2, "DKK": 7.46, "USD": 1.08}  # for one euro

_TABLES: Mapping[str, str] = {
    "customers": "id integer primary key, name text not null, email text not null, country text not null, "
    "currency text not null, joined_on date not null",
    "products": "id integer primary key, sku text not null unique, name text not null, category text not null, "
    "price_eur numeric(10, 2) not null",
    "orders": "id integer primary key, customer_id integer not null references customers, "
    "ordered_at timestamptz not null, currency text not null, total numeric(12, 2) not null, status text not null",
    "order_items": "id integer primary key, order_id integer not null references orders, "
    "product_id integer not null references products, quantity integer not null, unit_price numeric(12, 2) not null",
    "payments": "id integer primary key, order_id integer not null references orders, paid_at timestamptz not null, "
    "amount numeric(12, 2) not null, currency text not null, card text not null",
}

COLUMNS: Mapping[str, tuple[str, ...]] = {
    table: tuple(column.split()[0] for column in columns.replace("(10, 2)", "").replace("(12, 2)", "").split(", "))
    for table, columns in _TABLES.items()
}
"""The columns of each table, in the order of the rows."""

_MARK = "Harbour Market, the demo of kailash_nb"

_DUPLICATES, _SHORT, _UNPAID, _RING_CARDS, _RING_ORDERS = 37, 53, 300, 12, 8
_SLOW_CLOCK = 7200  # seconds
_LEAST_ORDERS = 5000  # so that what is planted stays rare

_FIRST_NAMES = (
    "Ada",
    "Bo",
    "Dirk",
    "Edda",
    "Einar",
    "Finn",
    "Greta",
    "Ida",
    "Jan",
    "Kaja",
    "Lars",
    "Mara",
    "Nils",
    "Oda",
)
_LAST_NAMES = ("Berg", "Bakker", "Dahl", "Falk", "Holm", "Keller", "Lund", "Moen", "Olsen", "Price", "Strand", "Vik")
_GOODS: Mapping[str, tuple[str, ...]] = {
    "fish": ("Smoked herring", "Salted cod", "Pickled eel", "Cured salmon", "Dried haddock"),
    "pantry": ("Rye crispbread", "Sea salt", "Rowan jelly", "Barley flour", "Birch syrup"),
    "rigging": ("Hemp rope", "Brass shackle", "Oak block", "Sail needle", "Tarred twine"),
    "clothing": ("Wool jumper", "Oilskin coat", "Deck boots", "Watch cap", "Fisherman's smock"),
}


@dataclass(frozen=True)
class Truths:
    """What is wrong with the market's data, and can be found by looking.

    Args:
        duplicate_payments: ids of payments that pay an order, in full, a second time.
        short_payments: ids of payments of less than their order's total.
        unpaid_orders: ids of orders that nobody paid.
        ring_cards: cards that many customers pay with; every other card has one owner.
        shifted_day: the day on which the provider's clock was two hours slow.
        shifted_payments: ids of that day's payments, each of which was made before its order.
        gap_day: the day on which the API has no rate of ``gap_currency``.
        gap_currency: the currency without a rate on ``gap_day``.
    """

    duplicate_payments: frozenset[int]
    short_payments: frozenset[int]
    unpaid_orders: frozenset[int]
    ring_cards: frozenset[str]
    shifted_day: dt.date
    shifted_payments: frozenset[int]
    gap_day: dt.date
    gap_currency: str

    def __repr__(self) -> str:
        shown = []
        for f in fields(self):
            value = getattr(self, f.name)
            shown.append(f"{f.name}: {len(value) if isinstance(value, frozenset) else value}")
        return f"<Truths {', '.join(shown)}>"


class _Order(NamedTuple):
    id: int
    customer: int
    at: dt.datetime
    currency: str
    cents: int


class _Payment(NamedTuple):
    at: dt.datetime
    order: _Order
    cents: int
    card: str
    kind: str  # "", "duplicate", "short" or "shifted"


class _Plan(NamedTuple):
    """What will be wrong, decided before the payments are made; no order has two faults."""

    shifted_day: dt.date
    doubled: set[int]
    short: set[int]
    unpaid: set[int]
    ring: dict[int, str]  # order -> card


class HarbourMarket:
    """The shop of one seed: rows, the statements that make their tables, and what is planted in them.

    Args:
        seed: which shop.
        orders: how many orders, 5,000 or more; the other tables follow.

    Attributes:
        tables: the rows of each table, as tuples in the order of :data:`COLUMNS`.
        truths: what is planted.

    Raises:
        ValueError: too few orders.

    Made in about half a second; a value, never changed.
    """

    def __init__(self, seed: int = 7, *, orders: int = 20_000) -> None:
        if orders < _LEAST_ORDERS:
            raise ValueError(f"a market has {_LEAST_ORDERS:,} orders or more, not {orders!r}")
        self.seed = seed
        self._random = random.Random(seed)
        customers = self._customers(orders // 8)
        products = self._products(400)
        sold, items = self._orders(orders, customers, products)
        cards = [f"card_{number:08x}" for number in self._random.sample(range(1 << 32), len(customers) + _RING_CARDS)]
        plan = self._plan(sold, cards[len(customers) :])
        payments = sorted(self._payments(sold, cards, plan))
        self.truths = self._truths(sold, payments, plan)
        statuses = self._random.choices(("shipped", "packed", "placed"), (90, 6, 4), k=orders)
        self.tables: Mapping[str, list[tuple[Any, ...]]] = {
            "customers": customers,
            "products": products,
            "orders": [
                (o.id, o.customer, o.at, o.currency, _money(o.cents), status)
                for o, status in zip(sold, statuses, strict=True)
            ],
            "order_items": items,
            "payments": [
                (number, p.order.id, p.at, _money(p.cents), p.order.currency, p.card)
                for number, p in enumerate(payments, 1)
            ],
        }

    @property
    def schema(self) -> tuple[str, ...]:
        """The statements that make the empty tables anew, dropping those of an earlier market."""
        return (
            f"drop table if exists {', '.join(reversed(list(_TABLES)))}",
            *(f"create table {table} ({columns})" for table, columns in _TABLES.items()),
            *(f"comment on table {table} is '{_MARK}'" for table in _TABLES),
        )

    def rates(self, day: dt.date) -> dict[str, float]:
        """What one euro was worth on a day, by currency; KeyError for a day outside the season."""
        if not 0 <= (day - FIRST_DAY).days < DAYS:
            raise KeyError(f"there are rates of {FIRST_DAY} to {FIRST_DAY + dt.timedelta(DAYS - 1)}, not of {day}")
        gap = self.truths.gap_currency if day == self.truths.gap_day else None
        phase = (day - FIRST_DAY).days + self.seed % 97
        return {
            currency: round(rate * (1 + 0.015 * math.sin(phase / 7 + i)), 4) if i else rate
            for i, (currency, rate) in enumerate(_RATES.items())
            if currency != gap
        }

    async def load_into(self, database: Any) -> dict[str, int]:
        """Make the tables in a PostgreSQL database and fill them; again gives the same tables with the same rows.

        Args:
            database: the database resource, an asyncpg pool or an asyncpg connection.

        Returns the number of rows by table. Raises ServiceError, having changed nothing, where a table of one of these
        names is there that is not a market's.
        """
        acquired = database.acquire() if hasattr(database, "acquire") else contextlib.nullcontext(database)
        async with acquired as connection, connection.transaction():
            await self._check_place(connection)
            await connection.execute(";\n".join(self.schema))
            for table, rows in self.tables.items():
                await connection.copy_records_to_table(table, records=rows, columns=COLUMNS[table])
        return {table: len(rows) for table, rows in self.tables.items()}

    async def _check_place(self, connection: Any) -> None:
        strangers = await connection.fetch(
            "select name from unnest($1::text[]) name "
            "where to_regclass(name) is not null "
            "and obj_description(to_regclass(name), 'pg_class') is distinct from $2",
            list(_TABLES),
            _MARK,
        )
        if strangers:
            names = ", ".join(record["name"] for record in strangers)
            raise ServiceError(
                f"the database already has tables of another owner: {names}; load the market into an empty database "
                "(`create database harbour`)"
            )

    def __repr__(self) -> str:
        counts = ", ".join(f"{len(rows):,} {table}" for table, rows in self.tables.items())
        return f"<HarbourMarket seed {self.seed}: {counts}>"

    # ----------------------------------------------------------------------------------------------------- generation

    def _customers(self, count: int) -> list[tuple[Any, ...]]:
        draw, rows = self._random, []
        countries = list(COUNTRIES)
        for number in range(1, count + 1):
            first, last = draw.choice(_FIRST_NAMES), draw.choice(_LAST_NAMES)
            country = draw.choice(countries)
            email = f"{first}.{last}.{number}@example.com".lower()
            joined = FIRST_DAY - dt.timedelta(days=draw.randrange(1, 1500))
            rows.append((number, f"{first} {last}", email, country, COUNTRIES[country], joined))
        return rows

    def _products(self, count: int) -> list[tuple[Any, ...]]:
        draw, rows = self._random, []
        for number in range(1, count + 1):
            category = draw.choice(list(_GOODS))
            name = f"{draw.choice(_GOODS[category])} no. {number}"
            rows.append((number, f"HM-{number:04d}", name, category, _money(draw.randrange(190, 9_990))))
        return rows

    def _orders(
        self, count: int, customers: list[tuple[Any, ...]], products: list[tuple[Any, ...]]
    ) -> tuple[list[_Order], list[tuple[Any, ...]]]:
        draw = self._random
        # Between 7 and 22 o'clock, so that a clock two hours slow does not change the day.
        moments = sorted(draw.randrange(DAYS) * 86_400 + draw.randrange(7 * 3600, 22 * 3600) for _ in range(count))
        start = dt.datetime.combine(FIRST_DAY, dt.time(), dt.UTC)
        prices = {c: [round(int(p[4] * 100) * rate) for p in products] for c, rate in _RATES.items()}
        sold: list[_Order] = []
        items: list[tuple[Any, ...]] = []
        for number, moment in enumerate(moments, 1):
            customer = draw.choice(customers)
            currency, total = customer[4], 0
            for _ in range(draw.choices((1, 2, 3, 4, 5, 6), (12, 27, 28, 18, 10, 5))[0]):
                product, quantity = draw.randrange(len(products)), draw.choices((1, 2, 3), (80, 15, 5))[0]
                cents = prices[currency][product]
                total += cents * quantity
                items.append((len(items) + 1, number, product + 1, quantity, _money(cents)))
            sold.append(_Order(number, customer[0], start + dt.timedelta(seconds=moment), currency, total))
        return sold, items

    def _plan(self, sold: list[_Order], ring_cards: list[str]) -> _Plan:
        draw = self._random
        shifted_day = FIRST_DAY + dt.timedelta(days=draw.randrange(DAYS))
        ordinary = [order for order in sold if order.at.date() != shifted_day]
        draw.shuffle(ordinary)
        faults = iter(order.id for order in ordinary)
        doubled, short, unpaid = (set(islice(faults, count)) for count in (_DUPLICATES, _SHORT, _UNPAID))
        # One order each of different customers, so that every card of the ring has as many owners as orders.
        untouched = {order.customer: order.id for order in ordinary[_DUPLICATES + _SHORT + _UNPAID :]}
        orders = islice(untouched.values(), _RING_ORDERS * len(ring_cards))
        return _Plan(shifted_day, doubled, short, unpaid, dict(zip(orders, cycle(ring_cards), strict=False)))

    def _payments(self, sold: list[_Order], cards: list[str], plan: _Plan) -> Iterator[_Payment]:
        draw = self._random
        for order in sold:
            if order.id in plan.unpaid:
                continue
            slow = order.at.date() == plan.shifted_day
            is_short = order.id in plan.short
            at = order.at + dt.timedelta(seconds=draw.randrange(20, 1200) - (_SLOW_CLOCK if slow else 0))
            cents = round(order.cents * draw.uniform(0.5, 0.95)) if is_short else order.cents
            card = plan.ring.get(order.id, cards[order.customer - 1])
            yield _Payment(at, order, cents, card, "short" if is_short else "shifted" if slow else "")
            if order.id in plan.doubled:
                yield _Payment(at + dt.timedelta(seconds=draw.randrange(5, 90)), order, cents, card, "duplicate")

    def _truths(self, sold: list[_Order], payments: list[_Payment], plan: _Plan) -> Truths:
        ids: dict[str, set[int]] = {"": set(), "duplicate": set(), "short": set(), "shifted": set()}
        for number, payment in enumerate(payments, 1):
            ids[payment.kind].add(number)
        gap = self._random.choice([o for o in sold if o.currency != BASE and o.at.date() != plan.shifted_day])
        return Truths(
            duplicate_payments=frozenset(ids["duplicate"]),
            short_payments=frozenset(ids["short"]),
            unpaid_orders=frozenset(plan.unpaid),
            ring_cards=frozenset(plan.ring.values()),
            shifted_day=plan.shifted_day,
            shifted_payments=frozenset(ids["shifted"]),
            gap_day=gap.at.date(),
            gap_currency=gap.currency,
        )


@cache
def _money(cents: int) -> Decimal:
    return Decimal(cents).scaleb(-2)


# ------------------------------------------------------------------------------------------------------------ the API


class RatesApi:
    """The market's rates and its provider's payments as an HTTP API on this machine, with the faults of a real one.

    ``GET /rates?day=2025-01-31`` answers ``{"day", "base", "rates": {currency: what one euro is worth}}``, and
    ``GET /payments?page=1`` answers ``{"page", "pages", "payments": [...]}``, each payment with the table's columns as
    fields; a wrong request is answered with 4xx and ``{"error"}``.

    Args:
        market: whose rates and payments.
        fail_every: every so many requests one is answered with 503 and Retry-After; 0 for never.
        retry_after: the seconds that such an answer asks to wait.
        latency: seconds that every answer takes.
        token: what callers must send as ``Authorization: Bearer <token>``, or None.
        page_size: payments per page.

    Attributes:
        url: where it answers.

    Runs from its making until :meth:`close` (or the end of a ``with`` block, or of the process), in threads of its own.
    """

    def __init__(
        self,
        market: HarbourMarket,
        *,
        fail_every: int = 7,
        retry_after: int = 0,
        latency: float = 0.0,
        token: str | None = None,
        page_size: int = 1000,
    ) -> None:
        self.market = market
        self.fail_every = fail_every
        self.retry_after = retry_after
        self.latency = latency
        self.page_size = page_size
        self._token = token
        self._counts: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._server = _Http(self)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), name="rates API", daemon=True)
        self._thread.start()

    @property
    def requests(self) -> int:
        """How many requests came with the right token, those that failed included."""
        return self._counts["requests"]

    @property
    def failures(self) -> int:
        """How many of them were answered with 503."""
        return self._counts["failures"]

    def answer(self, target: str, authorization: str) -> tuple[int, dict[str, Any]]:
        """The status and the JSON of the answer to one GET."""
        if self._token is not None and not hmac.compare_digest(
            authorization.encode(), f"Bearer {self._token}".encode()
        ):
            return 401, {"error": "send `Authorization: Bearer <token>`"}
        with self._lock:
            self._counts["requests"] += 1
            fails = self.fail_every > 0 and self._counts["requests"] % self.fail_every == 0
            self._counts["failures"] += fails
        time.sleep(self.latency)
        if fails:
            return 503, {"error": "the rates desk is busy; try again"}
        url = urlsplit(target)
        endpoint = {"/rates": self._rates, "/payments": self._payments}.get(url.path)
        if endpoint is None:
            return 404, {"error": f"no path {url.path}; there are /rates?day=YYYY-MM-DD and /payments?page=N"}
        query = {key: values[-1] for key, values in parse_qs(url.query).items()}
        try:
            return 200, endpoint(query)
        except KeyError as error:
            return 404, {"error": error.args[0]}
        except ValueError as error:
            return 400, {"error": str(error)}

    def _rates(self, query: Mapping[str, str]) -> dict[str, Any]:
        day = dt.date.fromisoformat(query.get("day", ""))
        return {"day": day.isoformat(), "base": BASE, "rates": self.market.rates(day)}

    def _payments(self, query: Mapping[str, str]) -> dict[str, Any]:
        rows, page = self.market.tables["payments"], int(query.get("page", "1"))
        pages = math.ceil(len(rows) / self.page_size)
        if not 1 <= page <= pages:
            raise KeyError(f"there are pages 1 to {pages}, not {page}")
        part = rows[(page - 1) * self.page_size : page * self.page_size]
        payments = [
            dict(zip(COLUMNS["payments"], (*row[:2], row[2].isoformat(), str(row[3]), *row[4:]), strict=True))
            for row in part
        ]
        return {"page": page, "pages": pages, "payments": payments}

    def close(self) -> None:
        """Stop answering, end every connection and free the port; closing twice is fine."""
        if self._thread.is_alive():
            self._server.shutdown()
            self._thread.join()
        self._server.end()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<RatesApi {self.url} {self.requests:,} requests, {self.failures:,} answered with 503>"


class _Http(ThreadingHTTPServer):
    """The server of one API: a thread per connection, which may stay open between requests."""

    daemon_threads = False  # joined at the end: a connection's thread lives no longer than the API

    def __init__(self, api: RatesApi) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.api = api
        self._open: set[socket.socket] = set()

    def process_request(self, request: Any, client_address: Any) -> None:
        self._open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self._open.discard(request)
        super().shutdown_request(request)

    def end(self) -> None:
        """Wake the threads that wait for a next request, then wait for all."""
        for connection in list(self._open):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        self.server_close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that goes away in the middle of an answer is nothing to print a traceback for."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "HarbourMarket", ""
    timeout = 60
    disable_nagle_algorithm = True
    server: _Http

    def do_GET(self) -> None:
        status, content = self.server.api.answer(self.path, self.headers.get("Authorization", ""))
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        if status == 503:
            self.send_header("Retry-After", str(self.server.api.retry_after))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: a notebook shows what it asks for."""
