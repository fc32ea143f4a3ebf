"""SecretManager: what it keeps, for whom, and what it says when it cannot."""

from __future__ import annotations

import asyncio
import base64
import copy
import dataclasses
import datetime as dt
import os
import pickle
import stat
import threading
from pathlib import Path

import pytest

from kailash_nb.exceptions import (
    SecretBindingError,
    SecretError,
    SecretKeyError,
    SecretNotFoundError,
    StoreError,
)
from kailash_nb.secrets import Binding, SecretManager
from kailash_nb.secrets.keys import FileKey

CREDENTIALS = {"user": "dbuser", "password": "correct-horse", "port": 5432, "ssl": True, "factor": 0.5}
DATABASE = Binding("database", "db:5432", "verify-full")
OTHER_KEY = base64.b64encode(bytes(32)).decode()


# ------------------------------------------------------------------------------------------------------- a first look


def test_making_one_needs_no_loop_and_does_nothing(home):
    threads = threading.active_count()
    manager = SecretManager()
    assert repr(manager) == f"<SecretManager {home.secrets}, not open>"
    assert not home.data.exists() and not home.config.exists() and threading.active_count() == threads


async def test_looking_for_secrets_where_there_are_none_makes_nothing(home, manager):
    assert await manager.list_secrets() == [] and await manager.describe() == [] and manager.version("x") is None
    for look in (manager.get_secret, manager.delete_secret):
        with pytest.raises(SecretNotFoundError, match=r"no secret 'x' \(stored: none\)"):
            await look("x")
    for look in (manager.bind, manager.check_use):
        with pytest.raises(SecretNotFoundError):
            look("x", DATABASE)
    assert not home.data.exists() and not home.config.exists()


async def test_what_is_stored_comes_back_as_it_was(manager):
    assert await manager.store_secret("db_creds", CREDENTIALS) == 1
    found = await manager.get_secret("db_creds")
    assert found == CREDENTIALS and [type(v) for v in found.values()] == [type(v) for v in CREDENTIALS.values()]


async def test_a_text_becomes_a_secret_of_one_field(manager):
    await manager.store_secret("token", "tökén ☃")
    assert await manager.get_secret("token") == {"value": "tökén ☃"}


async def test_a_secret_handed_out_is_the_callers_own(manager):
    await manager.store_secret("db_creds", CREDENTIALS)
    (await manager.get_secret("db_creds"))["password"] = "changed"
    assert await manager.get_secret("db_creds") == CREDENTIALS


async def test_the_guides_checks_work_as_they_stand(manager):
    await manager.store_secret("api_key", {"api_key": "sk-1234567890", "api_secret": "secret_value"}, encrypt=True)
    secrets = await manager.list_secrets()
    assert secrets == ["api_key"] and "my_secret" not in secrets


async def test_a_missing_name_is_an_error_that_knows_the_others(manager):
    await manager.store_secret("db_creds", CREDENTIALS)
    with pytest.raises(SecretNotFoundError, match=r"no secret 'db_cred'; did you mean 'db_creds'\?.*%secret db_cred"):
        await manager.get_secret("db_cred")


async def test_it_shows_path_keeper_and_count_only(home, manager):
    await manager.store_secret("db_creds", CREDENTIALS)
    assert repr(manager) == f"<SecretManager {home.secrets}, key in file, 1 secret>"
    await manager.store_secret("other", CREDENTIALS)
    assert repr(manager) == f"<SecretManager {home.secrets}, key in file, 2 secrets>"


async def test_all_files_are_the_owners_alone(home, manager):
    old = os.umask(0)
    try:
        await manager.store_secret("db_creds", CREDENTIALS)
    finally:
        os.umask(old)
    for folder in (home.secrets.parent, home.key.parent):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        assert {stat.S_IMODE(file.stat().st_mode) for file in folder.iterdir()} == {0o600}


async def test_the_path_can_be_given_or_set(tmp_path, home, new, monkeypatch):
    await new(tmp_path / "given.db").store_secret("a", CREDENTIALS)
    monkeypatch.setenv("KAILASH_NB_SECRETS", str(tmp_path / "set.db"))
    await new().store_secret("a", CREDENTIALS)
    assert (tmp_path / "given.db").exists() and (tmp_path / "set.db").exists() and not home.data.exists()


async def test_a_new_process_reads_what_this_one_stored(manager, output):
    await manager.store_secret("db_creds", CREDENTIALS)
    await manager.close()
    assert output("print(asyncio.run(m.get_secret('db_creds')))") == str(CREDENTIALS)


# ------------------------------------------------------------------------------------------------------ what is wrong


@pytest.mark.parametrize(
    "name", ["", "a b", "9lives", "-x", "a/b", "../a", "a" * 65, "ä", "a\n", None, 7, b"a", {"p": "x"}]
)
async def test_a_name_that_is_none_is_refused_everywhere(home, manager, name):
    for call in (manager.get_secret, manager.delete_secret):
        with pytest.raises(SecretError, match="a secret's name"):
            await call(name)
    for call in (manager.bind, manager.check_use):
        with pytest.raises(SecretError, match="a secret's name"):
            call(name, DATABASE)
    with pytest.raises(SecretError, match="no secret was stored: a secret's name"):
        await manager.store_secret(name, CREDENTIALS)
    assert not home.data.exists()


def test_a_name_that_may_be_a_value_in_the_wrong_place_is_not_shown(manager):
    with pytest.raises(SecretError) as caught:
        asyncio.run(manager.store_secret("CANARY value!", "db_creds"))
    assert "CANARY" not in str(caught.value) and "this one has ' '" in str(caught.value)


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ("", "field 'value' is empty"),
        ({}, "it has no fields"),
        (None, "a mapping of fields or a text, not NoneType"),
        (b"CANARY", "not bytes"),
        (["CANARY"], "not list"),
        (7, "not int"),
        ({"password": None}, "field 'password' is empty"),
        ({"password": ""}, "field 'password' is empty"),
        ({"password": ["CANARY"]}, "field 'password' is list"),
        ({"password": {"CANARY": "CANARY"}}, "field 'password' is dict"),
        ({"password": b"CANARY"}, "field 'password' is bytes"),
        ({"password": float("nan")}, "field 'password' is not a finite number"),
        ({"password": "CANARY\ud800"}, "field 'password' is not text"),
        ({"CANARY is no name": "x"}, "the name of field 1"),
        ({"user": "x", 7: "CANARY"}, "the name of field 2"),
        ({"number": 10**5000}, "cannot be encoded (ValueError)"),
        ({"password": "CANARY" * 20_000}, "120,015 bytes"),
        ({"a": None, "b": []}, "field 'a' is empty: give its value, or leave it out; field 'b' is list"),
    ],
)
async def test_a_value_that_is_none_is_refused_and_never_shown(home, manager, value, problem):
    with pytest.raises(SecretError) as caught:
        await manager.store_secret("db_creds", value)
    message = str(caught.value)
    assert message.startswith("secret 'db_creds' was not stored: ") and problem in message and "CANARY" not in message
    assert not home.data.exists()


@pytest.mark.parametrize("days", [-1, 1.5, True, "90", 36_501])
async def test_a_rotation_that_is_none_is_refused(manager, days):
    with pytest.raises(SecretError, match="rotation_days is a whole number of days up to 36500"):
        await manager.store_secret("db_creds", CREDENTIALS, rotation_days=days)


async def test_a_folder_that_cannot_be_written_is_a_clear_error_with_the_remedy(tmp_path, new):
    (tmp_path / "file").write_text("")
    manager = new(tmp_path / "file" / "secrets.db")
    with pytest.raises(StoreError, match=r"secrets\.db cannot be used: .*KAILASH_NB_SECRETS or SecretManager\(path\)"):
        await manager.store_secret("db_creds", CREDENTIALS)


async def test_a_file_that_cannot_be_written_is_a_clear_error_and_can_still_be_read(
    open_folder, home, monkeypatch, new, output
):
    home = dataclasses.replace(home, data=open_folder / "data", config=open_folder / "config")
    monkeypatch.setenv("XDG_DATA_HOME", str(home.data))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(home.config))
    manager = new()
    await manager.store_secret("db_creds", {"password": "readable"})
    await manager.close()
    home.secrets.chmod(0o400)
    script = """
async def main():
    print(await m.get_secret("db_creds"))
    try:
        await m.store_secret("b", "x")
    except Exception as error:
        print(error)
if os.geteuid() == 0:  # root may write anything; a first use loads the modules that somebody else may not find
    asyncio.run(m.get_secret("db_creds")); asyncio.run(m.close())
    os.setgroups([]); os.setgid(65534); os.setuid(65534)
asyncio.run(main())
"""
    if os.geteuid() == 0:
        for folder in (home.data, home.config):
            for entry in (folder, folder / "kailash_nb", *(folder / "kailash_nb").iterdir()):
                os.chown(entry, 65534, 65534)
    value, error = output(script).splitlines()
    assert value == "{'password': 'readable'}" and "attempt to write a readonly database" in error


# ----------------------------------------------------------------------------------------------------------- versions


async def test_storing_again_makes_a_new_version_that_counts_at_once(manager):
    assert [await manager.store_secret("a", {"n": n}) for n in range(4)] == [1, 2, 3, 4]
    assert manager.version("a") == 4 and await manager.get_secret("a") == {"n": 3}


async def test_version_numbers_go_on_after_a_deletion(manager):
    await manager.store_secret("a", "first")
    await manager.store_secret("a", "second")
    await manager.delete_secret("a")
    assert manager.version("a") is None and await manager.list_secrets() == []
    with pytest.raises(SecretNotFoundError):
        await manager.get_secret("a")
    assert await manager.store_secret("a", "third") == 3


async def test_rotation_stays_until_another_is_given(manager):
    async def rotation():
        [info] = await manager.describe()
        return info.rotation_days, info.due and info.due - info.created

    await manager.store_secret("a", "first", rotation_days=90)
    assert await rotation() == (90, dt.timedelta(days=90))
    await manager.store_secret("a", "second")
    assert (await rotation())[0] == 90
    await manager.store_secret("a", "third", rotation_days=0)
    assert await rotation() == (None, None)


async def test_describing_tells_all_but_the_value(manager):
    before = dt.datetime.now(dt.UTC)
    await manager.store_secret("b", {"user": "u", "password": "CANARY"})
    await manager.store_secret("a", "CANARY", False, allow_plaintext=True)
    manager.bind("b", DATABASE)
    a, b = await manager.describe()
    assert (a.name, a.version, a.fields, a.encrypted, a.bindings) == ("a", 1, ("value",), False, ())
    assert (b.name, b.version, b.fields, b.encrypted, b.bindings) == ("b", 1, ("password", "user"), True, (DATABASE,))
    assert abs(b.created - before) < dt.timedelta(minutes=1) and b.problem is None
    assert "CANARY" not in repr((a, b))


async def test_plaintext_takes_two_words_and_is_listed_as_such(home, manager):
    with pytest.raises(SecretError, match=r"encrypt=False would leave it readable in .*allow_plaintext=True"):
        await manager.store_secret("a", "open-value", encrypt=False)
    assert await manager.list_secrets() == []
    await manager.store_secret("a", "open-value", encrypt=False, allow_plaintext=True)
    assert await manager.get_secret("a") == {"value": "open-value"}
    assert b"open-value" in home.secrets.read_bytes()
    await manager.store_secret("a", "closed-value")
    assert (await manager.describe())[0].encrypted


# ----------------------------------------------------------------------------------------------------------- bindings


async def test_a_secret_is_for_what_it_was_bound_to_and_nothing_else(manager):
    await manager.store_secret("a", CREDENTIALS)
    with pytest.raises(
        SecretBindingError, match=r"'a' is not for database at db:5432 \(tls verify-full\); it is for no use"
    ):
        manager.check_use("a", DATABASE)
    assert manager.bind("a", DATABASE) is True
    assert manager.bind("a", DATABASE) is False
    manager.check_use("a", DATABASE)
    for other in (
        Binding("cache", "db:5432", "verify-full"),
        Binding("database", "evil:5432", "verify-full"),
        Binding("database", "db:5432", "off"),
    ):
        with pytest.raises(SecretBindingError, match=r"it is for database at db:5432 \(tls verify-full\)\. "):
            manager.check_use("a", other)
    assert await manager.get_secret("a") == CREDENTIALS and manager.version("a") == 1


async def test_a_secret_may_have_several_uses_and_keeps_them_with_a_new_value_but_not_with_a_new_life(manager):
    uses = [
        DATABASE,
        Binding("http_client", "https://api.example.com", "verify-full"),
        Binding("cache", "c:6379", "off"),
    ]
    await manager.store_secret("a", "first")
    assert [manager.bind("a", use) for use in uses] == [True] * 3
    await manager.store_secret("a", "second")
    for use in uses:
        manager.check_use("a", use)
    assert await manager.get_secret("a") == {"value": "second"}
    await manager.delete_secret("a")
    await manager.store_secret("a", "third")
    with pytest.raises(SecretBindingError, match="no use yet"):
        manager.check_use("a", DATABASE)


async def test_a_binding_outlives_its_process(manager, output):
    await manager.store_secret("a", CREDENTIALS)
    manager.bind("a", DATABASE)
    script = "m.check_use('a', Binding('database', 'db:5432', 'verify-full')); print(asyncio.run(m.get_secret('a')))"
    assert output(script) == str(CREDENTIALS)


async def test_plaintext_can_be_bound(manager):
    await manager.store_secret("a", "open", encrypt=False, allow_plaintext=True)
    assert manager.bind("a", DATABASE) and await manager.get_secret("a") == {"value": "open"}
    manager.check_use("a", DATABASE)


@pytest.mark.parametrize(
    "parts", [("", "a:1", "off"), ("database", "", "off"), ("database", "a:1", "yes"), (1, "a:1", "off")]
)
def test_a_binding_has_three_parts(parts):
    with pytest.raises(SecretBindingError, match=r"a resource type, an endpoint .* and a tls mode"):
        Binding(*parts)


# --------------------------------------------------------------------------------------------------------------- keys


async def test_a_lost_key_is_refused_never_made_anew_and_works_again_once_restored(home, manager, new):
    await manager.store_secret("a", CREDENTIALS)
    await manager.close()
    before = home.secrets.read_bytes()
    home.key.rename(home.key.with_name("backup"))
    without = new()
    for call in (without.get_secret("a"), without.list_secrets(), without.store_secret("b", "x"), without.describe()):
        with pytest.raises(
            SecretKeyError, match=rf"kept by: file.*{home.key} has no key.*Nothing was changed: restore"
        ):
            await call
    for call in (lambda: without.version("a"), lambda: without.bind("a", DATABASE)):
        with pytest.raises(SecretKeyError):
            call()
    assert not home.key.exists() and home.secrets.read_bytes() == before
    home.key.with_name("backup").rename(home.key)
    assert await without.get_secret("a") == CREDENTIALS


async def test_another_key_is_refused_and_changes_nothing(home, manager, new):
    await manager.store_secret("a", CREDENTIALS)
    await manager.close()
    before = home.secrets.read_bytes()
    home.key.unlink()
    other = FileKey().make()
    with pytest.raises(SecretKeyError, match=rf"has another key \({other.id}\)"):
        await new().store_secret("b", "x")
    with pytest.raises(SecretKeyError, match=r"the key given as SecretManager\(key=...\) has another key"):
        await new(key=bytes(32)).get_secret("a")
    assert home.secrets.read_bytes() == before


async def test_a_store_stays_with_the_key_it_was_made_with_whatever_the_environment_says_later(
    home, manager, new, monkeypatch
):
    await manager.store_secret("a", CREDENTIALS)
    monkeypatch.setenv("KAILASH_NB_KEK", OTHER_KEY)
    again = new()
    assert await again.get_secret("a") == CREDENTIALS and "key in file" in repr(again)


async def test_a_store_made_with_the_environments_key_needs_it_again(home, new, monkeypatch):
    monkeypatch.setenv("KAILASH_NB_KEK", OTHER_KEY)
    manager = new()
    await manager.store_secret("a", CREDENTIALS)
    assert "key in environment" in repr(manager) and not home.key.exists()
    monkeypatch.delenv("KAILASH_NB_KEK")
    with pytest.raises(
        SecretKeyError, match=r"kept by: environment.*the environment variable KAILASH_NB_KEK has no key"
    ):
        await new().get_secret("a")
    assert not home.key.exists()


async def test_a_key_of_a_file_reaches_a_server_by_its_environment(home, manager, output):
    await manager.store_secret("a", CREDENTIALS)
    key = home.key.read_text()
    home.key.unlink()
    assert output("print(asyncio.run(m.get_secret('a')))", KAILASH_NB_KEK=key) == str(CREDENTIALS)


async def test_a_key_can_be_given(home, new):
    await new(key=bytes(32)).store_secret("a", CREDENTIALS)
    assert await new(key=bytes(32)).get_secret("a") == CREDENTIALS and not home.key.exists()


@pytest.mark.parametrize("key", [b"", b"CANARY", bytes(31), bytes(33), "CANARY", 7])
def test_a_given_key_that_is_none_is_refused(key):
    with pytest.raises(SecretKeyError, match=r"a key is 32 random bytes .* or a KeyProvider") as caught:
        SecretManager(key=key)
    assert "CANARY" not in str(caught.value)


async def test_a_key_file_that_others_may_read_is_refused_until_it_is_closed(home, manager, new):
    await manager.store_secret("a", CREDENTIALS)
    home.key.chmod(0o644)
    again = new()
    with pytest.raises(SecretKeyError, match=f"chmod 600 {home.key}"):
        await again.get_secret("a")
    home.key.chmod(0o600)
    assert await again.get_secret("a") == CREDENTIALS


async def test_moving_the_file_away_begins_anew_without_a_restart(home, manager):
    await manager.store_secret("a", CREDENTIALS)
    home.secrets.rename(home.secrets.with_name("old.db"))
    assert await manager.list_secrets() == []
    assert await manager.store_secret("b", "x") == 1 and await manager.list_secrets() == ["b"]


# --------------------------------------------------------------------------------------- many at once, and each other


async def test_two_managers_on_one_file_see_each_others_versions_at_once(new):
    one, other = new(), new()
    for n in range(1, 30):
        writer, reader = (one, other) if n % 2 else (other, one)
        assert await writer.store_secret("a", {"n": n}) == n
        assert reader.version("a") == n and await reader.get_secret("a") == {"n": n}


async def test_another_process_sees_a_version_at_once_and_so_do_we(manager, python):
    await manager.store_secret("a", {"n": 1})
    script = """
for line in sys.stdin:
    print(m.version("a"), asyncio.run(m.get_secret("a"))["n"], flush=True)
    print(asyncio.run(m.store_secret("a", {"n": int(line) + 1})), flush=True)
"""
    with python(script) as process:
        for n in range(1, 21, 2):
            process.stdin.write(f"{n}\n")
            process.stdin.flush()
            assert process.stdout.readline() == f"{n} {n}\n"
            assert process.stdout.readline() == f"{n + 1}\n"
            assert manager.version("a") == n + 1 and await manager.get_secret("a") == {"n": n + 1}
            assert await manager.store_secret("a", {"n": n + 2}) == n + 2
        process.stdin.close()


async def test_processes_that_store_their_first_secrets_at_once_agree_on_a_key_and_lose_nothing(manager, python, home):
    script = """
print("ready", flush=True); sys.stdin.readline()
async def main():
    for n in range(12):
        await asyncio.gather(m.store_secret(f"{sys.argv[1]}_{n}", f"value {sys.argv[1]} {n}"), m.store_secret("shared", "v"))
asyncio.run(main())
"""
    processes = [python(script, who) for who in "abc"]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    for process in processes:
        with process:
            process.communicate(timeout=50)
        assert process.returncode == 0
    assert manager.version("shared") == 36
    for who in "abc":
        for n in range(12):
            assert await manager.get_secret(f"{who}_{n}") == {"value": f"value {who} {n}"}
    assert len(await manager.list_secrets()) == 37


def test_several_loops_and_threads_share_one_manager(manager):
    errors = []

    async def use(who):
        for n in range(10):
            version = await manager.store_secret("shared", {"by": who})
            assert manager.version("shared") >= version
            await manager.store_secret(f"own_{who}", {"n": n})
            assert await manager.get_secret(f"own_{who}") == {"n": n} and manager.version(f"own_{who}") == n + 1
            manager.bind("shared", Binding("database", f"host{who}:{n + 1}", "off"))

    async def main(who):
        await asyncio.gather(use(2 * who), use(2 * who + 1))

    def run(who):
        try:
            asyncio.run(main(who))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(who,)) for who in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(50)
    assert not errors and manager.version("shared") == 60
    [shared] = [info for info in asyncio.run(manager.describe()) if info.name == "shared"]
    assert len(shared.bindings) == 60


async def test_many_that_ask_a_cold_manager_at_once_all_get_their_answer(manager, new):
    await manager.store_secret("a", CREDENTIALS)
    cold = new()
    assert await asyncio.gather(*(cold.get_secret("a") for _ in range(50))) == [CREDENTIALS] * 50


async def test_a_cancelled_store_leaves_the_manager_working(manager):
    tasks = [asyncio.create_task(manager.store_secret("a", {"n": n})) for n in range(20)]
    await asyncio.sleep(0.005)
    for task in tasks[::2]:
        task.cancel()
    await asyncio.wait(tasks)
    done = [task.result() for task in tasks if not task.cancelled()]
    assert len(set(done)) == len(done) and manager.version("a") >= max(done)
    assert await manager.store_secret("b", "x") == 1


async def test_closing_twice_is_fine_ends_the_thread_and_the_next_use_opens_again(manager):
    before = threading.enumerate()
    await manager.store_secret("a", CREDENTIALS)
    [thread] = [thread for thread in threading.enumerate() if thread not in before and "secrets.db" in thread.name]
    await manager.close()
    await manager.close()
    assert not thread.is_alive()
    assert repr(manager).endswith("not open>") and await manager.get_secret("a") == CREDENTIALS


# ------------------------------------------------------------------------------------------------------ hiding values


async def test_the_redactor_hides_what_was_stored_and_what_was_read(manager, new):
    await manager.store_secret("a", {"user": "dbuser", "password": "correct-horse"})
    assert manager.redactor.redact("dbuser: correct-horse") == "dbuser: ***"
    other = new()
    assert other.redactor.redact("correct-horse") == "correct-horse"
    await other.get_secret("a")
    assert other.redactor.redact("correct-horse") == "***"
    await manager.store_secret("a", {"password": "battery-staple"})
    await other.get_secret("a")
    assert other.redactor.redact("correct-horse battery-staple") == "*** ***"


def test_a_manager_is_never_pickled_or_copied(manager):
    for leak in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(TypeError, match="never pickled or copied"):
            leak(manager)


def test_the_default_path_is_in_the_users_data_folder(home):
    assert SecretManager()._file.path == home.secrets and Path(os.environ["XDG_DATA_HOME"]) == home.data
