"""Where a secret's value must never turn up: the disk, errors, tracebacks with their locals, logs."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sqlite3
import traceback
from collections.abc import Mapping

import keyring
import pytest
from IPython.core.ultratb import VerboseTB
from keyring.backend import KeyringBackend

from kailash_nb.secrets import Binding, SecretManager
from kailash_nb.secrets.keys import EnvironmentKey, FileKey, KeyringKey

DATABASE = Binding("database", "db:5432", "off")
# Joined, so that the source lines in a traceback do not show it either; asked for in place, so that no frame holds it.
CANARY = tuple("canary-of-the-test")


def canary() -> str:
    return "".join(CANARY)


def credentials() -> dict[str, str]:
    return {"user": "somebody", "password": canary()}


class Failing(Mapping):
    """A mapping that cannot be read, and says so with what is in it."""

    def __iter__(self):
        return iter(["password"])

    def __len__(self):
        return 1

    def __getitem__(self, key):
        raise ValueError(canary())


def rendered(error: BaseException) -> str:
    """An error as people get to see it: plain, with locals, and in IPython's Verbose mode, which notebooks save."""
    verbose = VerboseTB(theme_name="nocolor", include_vars=True, tb_offset=0)
    parts = [
        str(error),
        repr(error),
        "".join(traceback.format_exception(error)),
        "".join(traceback.TracebackException.from_exception(error, capture_locals=True).format()),
        verbose.text(type(error), error, error.__traceback__),
    ]
    return "\n".join(parts)


async def bad_name(manager, home):
    await manager.store_secret("no name", credentials())


async def swapped_arguments(manager, home):
    await manager.store_secret(credentials(), "db_creds")


async def value_as_name(manager, home):
    await manager.store_secret(canary() + "!", "db_creds")


async def bad_field(manager, home):
    await manager.store_secret("db_creds", {**credentials(), "empty": None})


async def bad_value(manager, home):
    await manager.store_secret("db_creds", [canary()])


async def value_as_field(manager, home):
    await manager.store_secret("db_creds", {canary() + " ": "password"})


async def failing_mapping(manager, home):
    await manager.store_secret("db_creds", Failing())


async def too_large(manager, home):
    await manager.store_secret("db_creds", canary() * 10_000)


async def unencrypted(manager, home):
    await manager.store_secret("db_creds", credentials(), encrypt=False)


async def bad_rotation(manager, home):
    await manager.store_secret("db_creds", credentials(), rotation_days=-1)


async def unwritable_folder(manager, home):
    home.data.write_text("a file")
    await manager.store_secret("db_creds", credentials())


async def unwritable_key_folder(manager, home):
    home.config.write_text("a file")
    await manager.store_secret("db_creds", credentials())


async def full_disk(manager, home):
    await manager.store_secret("db_creds", credentials())
    await manager._file.write(
        lambda c: c.execute(f"pragma max_page_count={c.execute('pragma page_count').fetchone()[0]}")
    )
    for number in range(1000):
        await manager.store_secret(f"name_{number}", credentials())


async def broken_table(manager, home):
    await manager.store_secret("db_creds", credentials())
    await manager._file.write(
        lambda c: c.execute("create trigger t before insert on secret begin select raise(fail, 'no'); end")
    )
    await manager.store_secret("db_creds", credentials())


async def lost_key(manager, home):
    await manager.store_secret("db_creds", credentials())
    home.key.unlink()
    await manager.close()
    await manager.store_secret("other", credentials())


async def altered(manager, home, use):
    await manager.store_secret("db_creds", credentials())
    with contextlib.closing(sqlite3.connect(home.secrets)) as connection:
        connection.execute("update secret set envelope = zeroblob(200)")
        connection.commit()
    await use(manager)


async def altered_read(manager, home):
    await altered(manager, home, lambda m: m.get_secret("db_creds"))


async def altered_bound(manager, home):
    await altered(manager, home, lambda m: asyncio.to_thread(m.bind, "db_creds", DATABASE))


async def altered_list(manager, home):
    await manager.store_secret("db_creds", credentials())
    with contextlib.closing(sqlite3.connect(home.secrets)) as connection:
        connection.execute("update store set tag = zeroblob(32)")
        connection.commit()
    await manager.store_secret("other", credentials())


async def missing_name(manager, home):
    await manager.store_secret("db_creds", credentials())
    await manager.get_secret("other")


async def wrong_use(manager, home):
    await manager.store_secret("db_creds", credentials())
    manager.check_use("db_creds", DATABASE)


async def bad_given_key(manager, home):
    SecretManager(key=canary().encode())


async def bad_key_in_the_environment(manager, home):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KAILASH_NB_KEK", canary())
        EnvironmentKey().find(None)


async def bad_key_in_the_file(manager, home):
    home.key.parent.mkdir(parents=True)
    home.key.touch(0o600)
    home.key.write_text(canary())
    FileKey().find(None)


class Talkative(KeyringBackend):
    """A keyring whose errors tell what they were given."""

    priority = 9

    def get_password(self, service, username):
        password = canary()
        raise RuntimeError(f"{password} is for {service} only")

    def set_password(self, service, username, password):
        raise RuntimeError(password)

    def delete_password(self, service, username):
        raise NotImplementedError


async def talkative_keyring(manager, home):
    keyring.set_keyring(Talkative())
    assert KeyringKey().make() is None
    KeyringKey().find("0" * 16)


FAULTS = [
    bad_name,
    swapped_arguments,
    value_as_name,
    bad_field,
    bad_value,
    value_as_field,
    failing_mapping,
    too_large,
    unencrypted,
    bad_rotation,
    unwritable_folder,
    unwritable_key_folder,
    full_disk,
    broken_table,
    lost_key,
    altered_read,
    altered_bound,
    altered_list,
    missing_name,
    wrong_use,
    bad_given_key,
    bad_key_in_the_environment,
    bad_key_in_the_file,
    talkative_keyring,
]


async def provoked(fault, *arguments) -> BaseException:
    try:
        await fault(*arguments)
    except Exception as error:
        return error
    raise AssertionError(f"{fault.__name__} raised nothing")


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
async def test_no_error_shows_a_value_even_with_the_locals_of_its_frames(manager, home, fault):
    error = await provoked(fault, manager, home)
    assert type(error).__module__ == "kailash_nb.exceptions"
    shown = rendered(error)
    assert fault.__name__ in shown and canary() not in shown


async def test_this_test_would_notice_a_value_in_a_frame(manager, home):
    async def leaky(manager, home):
        value = canary()
        await manager.get_secret(value)

    assert rendered(await provoked(leaky, manager, home)).count(canary()) >= 2


async def test_a_cancelled_store_shows_no_value_either(manager):
    task = asyncio.create_task(manager.store_secret("db_creds", credentials()))
    await asyncio.sleep(0.001)
    task.cancel()
    with pytest.raises(asyncio.CancelledError) as caught:
        await task
    shown = rendered(caught.value) + repr(task)
    assert "store_secret" in shown and canary() not in shown


async def test_no_value_is_on_the_disk_nor_in_a_log_after_a_life_of_uses(manager, home, caplog):
    caplog.set_level(logging.DEBUG)
    await manager.store_secret("db_creds", credentials(), rotation_days=90)
    await manager.store_secret("db_creds", credentials())
    await manager.store_secret("token", canary())
    manager.bind("db_creds", DATABASE)
    assert (await manager.get_secret("db_creds"))["password"] == canary()

    def on_disk() -> bytes:
        files = [file for folder in (home.data, home.config) for file in folder.rglob("*") if file.is_file()]
        assert len(files) >= 3
        return b"".join(file.read_bytes() for file in files)

    assert canary().encode() not in on_disk() and b"somebody" not in on_disk()
    await manager.delete_secret("token")
    await manager.close()
    assert canary().encode() not in on_disk() and b"password" in on_disk()
    assert canary() not in caplog.text
    shown = [manager, manager.redactor, manager._file, await manager.describe()]
    assert canary() not in repr(shown)


async def test_an_open_value_is_gone_from_the_disk_when_it_is_stored_encrypted_twice_or_deleted(manager, home):
    for name in ("a", "b"):
        await manager.store_secret(name, canary(), encrypt=False, allow_plaintext=True)
    assert home.secrets.read_bytes().count(canary().encode()) == 2
    await manager.delete_secret("a")
    for _ in range(2):
        await manager.store_secret("b", "another")
    assert not any(canary().encode() in file.read_bytes() for file in home.secrets.parent.iterdir())


async def test_nothing_that_a_manager_holds_shows_a_value(manager):
    await manager.store_secret("db_creds", credentials())
    await manager.get_secret("db_creds")
    contents = manager._known[1]
    assert canary() not in repr([vars(manager), vars(contents), contents.reveal("db_creds"), contents.key])
