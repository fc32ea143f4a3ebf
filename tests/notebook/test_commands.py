"""``%secret``, ``%resource`` and ``%gateway`` in a real kernel, on real servers."""

from __future__ import annotations

import sqlite3
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from kernels import Cell, Kernel, kernel

CANARY = "cAnArY-7f3d-value"


@pytest.fixture(scope="module")
def notebook(home: Path, services: Any) -> Iterator[Kernel]:
    """A kernel with embedded servers, and logins in its environment."""
    postgres = services.postgres
    place = f"{postgres.user}:{postgres.password}@{postgres.host}:{postgres.port}/postgres"
    login = {"PG_USER": postgres.user, "PG_PASSWORD": postgres.password, "PG_URL": f"postgresql://{place}"}
    with kernel(home, KAILASH_NB_SERVICES=str(services.folder), CANARY_VARIABLE=CANARY, **login) as found:
        found.ok("%load_ext kailash_nb")
        yield found


@pytest.fixture
def url(services: Any) -> str:
    postgres = services.postgres
    return f"postgresql://{postgres.user}@{postgres.host}:{postgres.port}/postgres"


def typed(notebook: Kernel, code: str, *answers: str) -> tuple[Cell, list[str]]:
    """Run a cell and type the answers at its prompts; returns the cell and the prompts."""
    prompts: list[str] = []

    def answer(prompt: str) -> str:
        prompts.append(prompt)
        return answers[len(prompts) - 1]

    return notebook.collect(notebook.send(code, stdin=True), answer=answer), prompts


# --- %secret ----------------------------------------------------------------------------------------------------------


def test_what_is_typed_is_stored_and_left_in_no_output_variable_or_history(notebook: Kernel, home: Path) -> None:
    cell, prompts = typed(notebook, "%secret db_creds user password", "bob", CANARY)

    assert prompts == ["db_creds, user: ", "db_creds, password: "]
    assert cell.text == "stored secret 'db_creds' (password, user)\n"
    assert CANARY not in cell.everything
    assert CANARY not in notebook.ok("print({n: v for n, v in globals().items()}, In, Out, vars(get_ipython()))").text
    check = f"(await gateway.secret_manager.get_secret('db_creds'))['password'] == {CANARY[:9]!r} + {CANARY[9:]!r}"
    assert notebook.ok(check).value["text/plain"] == "True"
    notebook.ok("get_ipython().history_manager.writeout_cache()")
    with sqlite3.connect(home / "ipython/profile_default/history.sqlite") as history:
        assert not [row for row in history.execute("select * from history").fetchall() if CANARY in str(row)]
    history.close()
    assert not [p for p in home.rglob("*") if p.is_file() and CANARY.encode() in p.read_bytes()]


def test_a_secret_is_taken_from_the_environment_where_nobody_can_type(notebook: Kernel) -> None:
    cell = notebook.ok("%secret token --env token=CANARY_VARIABLE")

    assert "stored secret 'token' (token)" in cell.text and CANARY not in cell.everything


def test_where_nobody_can_be_asked_the_error_names_the_other_form(notebook: Kernel) -> None:
    cell = notebook.run("%secret new_creds user password")

    assert cell.status == "error"
    assert cell.error == (
        "SecretError: nobody can be asked for new_creds, user here; "
        "use `%secret new_creds --env user=USER password=PASSWORD`"
    )


def test_an_environment_variable_that_is_not_set_is_named(notebook: Kernel) -> None:
    assert "'CANARY_VARIBLE' is not set; did you mean 'CANARY_VARIABLE'?" in (
        notebook.run("%secret x --env value=CANARY_VARIBLE").error
    )


def test_nothing_typed_stores_nothing(notebook: Kernel) -> None:
    cell, _ = typed(notebook, "%secret empty", "")

    assert "nothing was typed for value; nothing is stored" in cell.error
    assert "empty" not in notebook.ok("%secret").text


def test_a_value_on_the_line_is_refused_without_being_repeated(notebook: Kernel) -> None:
    cell = notebook.run(f"%secret x user=bob password={CANARY}")

    assert cell.status == "error" and "remove the value of password, user" in cell.text
    assert CANARY not in cell.text + cell.error


def test_without_a_field_a_known_secret_is_asked_for_what_it_holds(notebook: Kernel) -> None:
    typed(notebook, "%secret again user password", "a", "b")

    cell, prompts = typed(notebook, "%secret again", "c", "d")

    assert [p.rpartition(" ")[0].split(", ")[1] for p in prompts] == ["user:", "password:"]
    assert "replaced secret 'again'" in cell.text


# --- %resource --------------------------------------------------------------------------------------------------------


def test_a_url_registers_asks_for_the_password_and_tries_the_resource(
    notebook: Kernel, url: str, services: Any
) -> None:
    cell, prompts = typed(notebook, f"%resource shop_db {url}", services.postgres.password)

    assert prompts == [f"{url}, password: "]
    assert cell.plain[0].startswith("shop_db healthy: database") and "PostgreSQL" in cell.plain[0]
    assert "<b>shop_db</b> healthy" in cell.html[0]
    assert services.postgres.password not in cell.everything
    notebook.ok("%%workflow one -o one_run\nasync def ask(shop_db): return await shop_db.fetchval('select 41 + 1')")
    assert notebook.ok("one_run['ask']").value["text/plain"] == "42"


def test_the_same_line_again_uses_the_stored_login(notebook: Kernel, url: str, services: Any) -> None:
    typed(notebook, f"%resource again_db {url}", services.postgres.password)

    cell = notebook.ok(f"%resource again_db {url}")

    assert "logs in with secret 'again_db_credentials'" in cell.text and "healthy" in cell.plain[0]


def test_a_wrong_password_is_a_clear_answer_with_the_remedy(notebook: Kernel, url: str) -> None:
    cell, _ = typed(notebook, f"%resource locked {url}", CANARY)

    assert cell.status == "ok"
    assert cell.plain[0].startswith("locked unhealthy") and "%secret locked_credentials" in cell.plain[0]
    assert CANARY not in cell.everything


def test_a_password_in_the_url_is_refused_with_the_remedy_and_repeated_nowhere(notebook: Kernel, url: str) -> None:
    cell = notebook.run(f"%resource bad {url.replace('@', ':' + CANARY + '@')}")

    assert cell.status == "error"
    assert f"change it on the server, then write `%resource bad {url}`" in cell.error
    assert CANARY not in cell.error + cell.text


@pytest.mark.parametrize("broken", ["postgresql//u:{}@h/d", "postgresql://u:{}/x@h/d", "redis://:{}#@h", "u:{}@h"])
def test_no_broken_url_makes_an_error_repeat_a_password(notebook: Kernel, broken: str) -> None:
    cell = notebook.run(f"%resource bad {broken.format(CANARY)}")

    assert cell.status == "error" and CANARY not in cell.error + cell.text


def test_a_url_in_the_environment_may_hold_the_password(notebook: Kernel, services: Any) -> None:
    cell = notebook.ok("%resource env_db --env PG_URL")

    assert "env_db healthy" in cell.plain[0] and services.postgres.password not in cell.everything


def test_a_type_and_settings_register_a_resource_too_and_a_cache_tells_its_keys(notebook: Kernel) -> None:
    cell = notebook.ok("%resource hot cache embedded=True")

    assert cell.plain[0].startswith("hot healthy: cache") and "Valkey" in cell.plain[0] and "keys" in cell.plain[0]


def test_an_api_tells_its_status(notebook: Kernel) -> None:
    notebook.ok("%%workflow served\nasync def a(): return 1")
    base = notebook.ok("server = gateway.serve()\nserver.url").value["text/plain"].strip("'")

    cell = notebook.ok(f"%resource api {base}")

    notebook.ok("%gateway stop")
    assert "api healthy: http_client" in cell.plain[0] and base in cell.plain[0]


def test_a_dead_server_is_an_answer_not_a_traceback(notebook: Kernel) -> None:
    cell = notebook.ok("%resource dead redis://127.0.0.1:1/0")

    assert "dead unhealthy" in cell.plain[0] and "connection refused" in cell.plain[0]
    notebook.ok("gateway.resource_registry.unregister('dead')")


def test_unknown_types_and_settings_are_named_with_those_that_exist(notebook: Kernel) -> None:
    assert "no resource type 'databse'; did you mean 'database'?" in notebook.run("%resource x databse host=h").error
    assert "'hots'; did you mean 'host'?" in notebook.run("%resource x database hots=h database=d").error


# --- %gateway ---------------------------------------------------------------------------------------------------------


def test_status_shows_workflows_resources_and_what_to_do_next(notebook: Kernel) -> None:
    notebook.ok("%%workflow told\nasync def a(limit: int = 3): return limit")

    cell = notebook.ok("%gateway")

    assert "run = await told(limit=3)" in cell.plain[0] and "Next: " in cell.plain[0]
    assert "<table" in cell.html[0]


def test_check_is_awaited_in_the_kernels_loop(notebook: Kernel) -> None:
    notebook.ok("%resource hot cache embedded=True")

    cell = notebook.ok("checks = %gateway check\n[c.status for c in checks if c.name == 'hot']")

    assert cell.value["text/plain"] == "['healthy']"


def test_runs_are_a_table_newest_first(notebook: Kernel) -> None:
    notebook.ok("%%workflow twice\nasync def a(): return 1")
    notebook.ok("first = await twice()\nsecond = await twice()")

    cell = notebook.ok("table = %gateway runs twice\nlist(table.run) == [second.id, first.id]")

    assert cell.value["text/plain"] == "True"


def test_serve_shows_the_address_but_never_the_token_and_stop_frees_the_port(notebook: Kernel) -> None:
    cell = notebook.ok("%gateway serve")
    base, token = notebook.ok("print(gateway.server.url, gateway.server.token)").text.split()

    assert base in cell.value["text/html"] and token not in cell.everything
    with urllib.request.urlopen(f"{base}/health/live", timeout=10) as answer:
        assert answer.status == 200
    assert notebook.ok("%gateway stop").text == "stopped\n"
    assert notebook.ok("%gateway stop").text == "it was not serving\n"


def test_use_chooses_the_gateway_that_magics_work_on(notebook: Kernel) -> None:
    notebook.ok("from kailash_nb import Gateway\nfirst_gateway = gateway\nother = Gateway('other')\n%gateway use other")
    try:
        notebook.ok("%%workflow theirs\nasync def a(): return 1")
        assert notebook.ok("'theirs' in other.workflows, 'theirs' in gateway.workflows").value["text/plain"] == (
            "(True, False)"
        )
        assert "no gateway 'othr'; did you mean 'other'?" in notebook.run("%gateway use othr").text
    finally:
        notebook.ok("%gateway use gateway")


def test_an_unknown_action_is_answered_with_those_that_exist(notebook: Kernel) -> None:
    assert "no action 'srve'; did you mean 'serve'?" in notebook.run("%gateway srve").text
