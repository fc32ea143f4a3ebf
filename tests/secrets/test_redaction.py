"""What the redactor finds, and what it leaves alone."""

from __future__ import annotations

import base64
import html
import json
import pickle
import random
import string
import threading
import time
import urllib.parse

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kailash_nb.secrets import Redactor

SECRET = "pä\"ss/wörd <&> '=+ \\x\n"


@pytest.fixture
def redactor():
    made = Redactor()
    made.add({"user": "database_user", "password": SECRET, "port": 123456, "region": "eu"})
    return made


def basic(user):
    return base64.b64encode(f"{user}:{SECRET}".encode()).decode()


@pytest.mark.parametrize(
    "form",
    [
        SECRET,
        json.dumps(SECRET)[1:-1],
        json.dumps(SECRET, ensure_ascii=False)[1:-1],
        repr(SECRET)[1:-1],
        html.escape(SECRET),
        urllib.parse.quote(SECRET),
        urllib.parse.quote(SECRET, safe=""),
        urllib.parse.quote_plus(SECRET),
        urllib.parse.quote(SECRET, safe="").replace("%C3%A4", "%c3%a4").replace("%C3%B6", "%c3%b6").lower(),
        base64.b64encode(SECRET.encode()).decode(),
        base64.urlsafe_b64encode(SECRET.encode()).decode(),
        base64.urlsafe_b64encode(SECRET.encode()).decode().rstrip("="),
        SECRET.encode().hex(),
        SECRET.encode().hex().upper(),
    ],
)
def test_a_secret_is_found_in_every_form(redactor, form):
    assert redactor.redact(f"before {form} after {form}") == "before *** after ***"


@pytest.mark.parametrize("user", ["a", "ab", "abc", "abcd"])
def test_a_secret_inside_a_longer_base64_text_is_found_at_every_offset(redactor, user):
    redacted = redactor.redact(f"Authorization: Basic {basic(user)}")
    assert "***" in redacted
    left = redacted.removeprefix("Authorization: Basic ").split("***")
    assert len(left[0]) <= len(base64.b64encode(f"{user}:".encode())) and len(left[1]) <= 4


TEXT = st.characters(exclude_characters="*", exclude_categories=["Cs"])


@settings(max_examples=50, deadline=None)
@given(st.text(TEXT, min_size=6, max_size=40), st.text(TEXT, max_size=20), st.text(TEXT, max_size=20))
def test_no_secret_of_six_characters_or_more_survives(secret, before, after):
    redactor = Redactor()
    redactor.add(secret)
    assert secret not in redactor.redact(f"{before}{secret}{after}")


def test_who_and_where_short_values_and_numbers_are_left_alone(redactor):
    text = "database_user at eu: 123456"
    assert redactor.redact(text) is text
    redactor.add("short")
    redactor.add({"host": "db.example.com", "database": "production", "username": "somebody", "port": "secret5432"})
    assert redactor.redact(text := "short db.example.com production somebody secret5432") is text


def test_a_longer_secret_goes_before_one_that_it_begins_with(redactor):
    redactor.add("hunter2")
    redactor.add("hunter2-and-more")
    assert redactor.redact("hunter2 hunter2-and-more hunter2-and") == "*** *** ***-and"


def test_patterns_in_a_secret_are_only_text():
    redactor = Redactor()
    redactor.add("a.*(b|c)[d]+$")
    assert redactor.redact("axxb a.*(b|c)[d]+$") == "axxb ***"


def test_a_redactor_without_secrets_changes_nothing_and_shows_none(redactor):
    text = "x" * 1000
    assert Redactor().redact(text) is text
    assert "rd" not in repr(redactor).removeprefix("<Redactor")
    with pytest.raises(TypeError, match="never pickled"):
        pickle.dumps(redactor)


def test_what_was_added_is_hidden_from_then_on_whatever_other_threads_do():
    redactor, errors = Redactor(), []

    def work(who):
        for n in range(10):
            secret = f"secret-{who}-{n}-end"
            redactor.add({"password": secret})
            if redactor.redact(f"<{secret}>") != "<***>":
                errors.append(secret)

    threads = [threading.Thread(target=work, args=(who,)) for who in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(50)
    assert not errors


def test_a_hundred_secrets_cost_little_on_a_text_without_them():
    generator = random.Random(1)
    letters = string.ascii_letters + string.digits
    redactor = Redactor()
    for _ in range(100):
        redactor.add("".join(generator.choices(letters, k=24)))
    text = "".join(generator.choices(letters + "  \n", k=100_000))
    redactor.redact(text)
    start = time.perf_counter()
    assert redactor.redact(text) is text
    assert time.perf_counter() - start < 2
