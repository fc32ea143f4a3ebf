"""Attacks on the file by somebody who can write it but has no key, and accidents: what is noticed, and what still works."""

from __future__ import annotations

import asyncio
import contextlib
import random
import shutil
import sqlite3

import pytest

from kailash_nb.exceptions import KailashError, SecretIntegrityError, SecretNotFoundError
from kailash_nb.secrets import Binding

KEY = bytes(range(32))
DATABASE = Binding("database", "db:5432", "verify-full")
ATTACKER = Binding("database", "evil:5432", "off")
VALUES = {"prod": {"user": "u", "password": "PROD"}, "test": {"password": "TEST"}, "open": {"value": "OPEN"}}


@pytest.fixture
async def path(tmp_path, new):
    """A file of three secrets: ``prod`` in its second version and bound, ``test``, and ``open`` in plaintext."""
    path = tmp_path / "secrets.db"
    manager = new(path, key=KEY)
    await manager.store_secret("prod", {"password": "OLD"}, rotation_days=90)
    await manager.store_secret("prod", VALUES["prod"])
    manager.bind("prod", DATABASE)
    await manager.store_secret("test", VALUES["test"])
    await manager.store_secret("open", "OPEN", encrypt=False, allow_plaintext=True)
    await manager.close()
    return path


def sql(path, *statements):
    with contextlib.closing(sqlite3.connect(path)) as connection:
        for statement in statements:
            assert connection.execute(statement).rowcount != 0, f"an attack that hits nothing: {statement}"
        connection.commit()


def rows(path, name):
    with contextlib.closing(sqlite3.connect(path)) as connection:
        return connection.execute("select * from secret where name = ? order by version", (name,)).fetchall()


def put_back(path, name, old):
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute("delete from secret where name = ?", (name,))
        connection.executemany(f"insert into secret values ({', '.join('?' * len(old[0]))})", old)
        connection.commit()


async def refused(manager, name):
    """The name is refused, by every way to use it, with an error that says so and what to do."""
    for call in (
        lambda: manager.get_secret(name),
        lambda: asyncio.to_thread(manager.version, name),
        lambda: asyncio.to_thread(manager.check_use, name, DATABASE),
        lambda: asyncio.to_thread(manager.bind, name, ATTACKER),
    ):
        with pytest.raises(
            SecretIntegrityError, match=f"secret '{name}' in .*was altered, moved or rolled back.*%secret"
        ):
            await call()
    return True


SWAP = "update secret set {0} = (select {0} from secret where name = 'test') where name = 'prod' and version = 2"


@pytest.mark.parametrize(
    "attack",
    [
        [SWAP.format("envelope")],
        [SWAP.format("fields")],
        ["delete from secret where name = 'prod'", "update secret set name = 'prod', version = 2 where name = 'test'"],
        ["delete from secret where name = 'prod' and version = 2"],
        ["delete from secret where name = 'prod'"],
        ["delete from secret where name = 'prod' and version = 1"],
        [
            "delete from secret where name = 'prod' and version = 2",
            "update secret set version = 2 where name = 'prod' and version = 1",
        ],
        ["update secret set version = 3 where name = 'prod' and version = 2"],
        [
            "insert into secret select name, 3, 0, fields, bindings, null, envelope, null from secret where name = 'test'",
            "update secret set name = 'prod' where name = 'test' and version = 3",
        ],
        ['update secret set bindings = \'[["database","evil:5432","off"]]\' where name = \'prod\' and version = 2'],
        ["update secret set bindings = '[]' where name = 'prod' and version = 2"],
        ["update secret set readable = '{\"password\":\"MINE\"}', envelope = null where name = 'prod' and version = 2"],
        ["update secret set readable = '{\"password\":\"MINE\"}' where name = 'prod' and version = 2"],
        ["update secret set envelope = null where name = 'prod' and version = 2"],
        ["update secret set envelope = cast('text' as text) where name = 'prod' and version = 2"],
        ["update secret set rotation_days = 36500 where name = 'prod' and version = 2"],
        ["update secret set created_ms = created_ms + 1 where name = 'prod' and version = 2"],
        ["update secret set fields = cast(fields as blob) where name = 'prod' and version = 2"],
        ["update secret set bindings = cast(x'5bff5d' as text) where name = 'prod' and version = 2"],
    ],
)
async def test_an_altered_secret_is_refused_by_name_and_the_others_work(path, new, attack):
    sql(path, *attack)
    manager = new(path, key=KEY)
    assert await refused(manager, "prod")
    assert await manager.get_secret("open") == VALUES["open"]
    assert await manager.list_secrets() == ["open", "prod", "test"]
    [info] = [info for info in await manager.describe() if info.name == "prod"]
    assert "rolled back" in info.problem and info.version == 2 and info.fields == info.bindings == ()


async def test_an_altered_plaintext_is_refused(path, new):
    sql(path, "update secret set readable = '{\"value\":\"MINE\"}' where name = 'open'")
    manager = new(path, key=KEY)
    assert await refused(manager, "open")
    assert await manager.get_secret("prod") == VALUES["prod"]


async def test_a_secret_that_is_put_back_to_an_older_state_is_refused(path, new):
    manager = new(path, key=KEY)
    before = rows(path, "prod")
    await manager.store_secret("prod", {"password": "ROTATED"})
    put_back(path, "prod", before)
    assert await refused(manager, "prod") and await manager.get_secret("test") == VALUES["test"]


async def test_bindings_that_are_put_back_to_an_older_state_are_refused(path, new):
    manager = new(path, key=KEY)
    before = rows(path, "test")
    manager.bind("test", DATABASE)
    put_back(path, "test", before)
    assert await refused(manager, "test")


async def test_a_deleted_secret_that_is_put_back_stays_deleted(path, new):
    manager = new(path, key=KEY)
    before = rows(path, "prod")
    await manager.delete_secret("prod")
    put_back(path, "prod", before)
    with pytest.raises(SecretNotFoundError):
        await manager.get_secret("prod")
    assert manager.version("prod") is None and "prod" not in await manager.list_secrets()
    assert await manager.store_secret("prod", {"password": "ANEW"}) == 3
    assert await manager.get_secret("prod") == {"password": "ANEW"}


async def test_a_secret_that_somebody_adds_does_not_exist(path, new):
    sql(path, "insert into secret values ('mine', 1, 0, '[]', '[]', null, null, '{\"value\":\"MINE\"}')")
    manager = new(path, key=KEY)
    with pytest.raises(SecretNotFoundError):
        await manager.get_secret("mine")
    assert "mine" not in await manager.list_secrets()


async def test_rows_of_another_store_with_the_same_key_are_refused(path, new, tmp_path):
    other = new(tmp_path / "other.db", key=KEY)
    await other.store_secret("prod", {"password": "OTHER"})
    put_back(path, "prod", rows(tmp_path / "other.db", "prod"))
    assert await refused(new(path, key=KEY), "prod")


async def test_a_forged_manifest_is_refused_and_so_is_everything(path, new, tmp_path):
    other = new(tmp_path / "other.db", key=bytes(32))
    await other.store_secret("prod", {"password": "MINE"})
    attacks = [
        "update store set manifest = '{}'",
        "update store set tag = zeroblob(32)",
        "update store set tag = x''",
        "update store set id = 'another'",
        "update store set key_keeper = 'environment'",
        "update store set manifest = cast(manifest as blob)",
        "delete from store",
    ]
    for attack in attacks:
        shutil.copy(path, attacked := tmp_path / "attacked.db")
        sql(attacked, attack)
        manager = new(attacked, key=KEY)
        for call in (manager.get_secret("prod"), manager.list_secrets(), manager.store_secret("new", "x")):
            with pytest.raises(SecretIntegrityError, match=r"the list of secrets in .* was altered or rolled back"):
                await call
        with pytest.raises(SecretIntegrityError):
            manager.version("prod")
        assert b"new" not in attacked.read_bytes()


async def test_an_older_manifest_does_not_vouch_for_newer_rows(path, new):
    with contextlib.closing(sqlite3.connect(path)) as connection:
        before = connection.execute("select manifest, tag from store").fetchone()
    manager = new(path, key=KEY)
    await manager.store_secret("prod", {"password": "ROTATED"})
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute("update store set manifest = ?, tag = ?", before)
        connection.commit()
    assert await refused(manager, "prod") and await manager.get_secret("test") == VALUES["test"]


async def test_an_attack_is_noticed_by_a_manager_that_has_read_the_secret_before(path, new):
    manager = new(path, key=KEY)
    assert await manager.get_secret("prod") == VALUES["prod"]
    sql(path, SWAP.format("envelope"))
    assert await refused(manager, "prod")


async def test_storing_one_secret_does_not_make_good_what_was_done_to_another(path, new):
    sql(path, SWAP.format("envelope"))
    manager = new(path, key=KEY)
    await manager.store_secret("test", {"password": "NEW"})
    manager.bind("open", DATABASE)
    await manager.delete_secret("open")
    assert await refused(manager, "prod")


async def test_a_refused_secret_is_mended_by_storing_it_again_as_a_new_version_without_bindings(path, new):
    sql(path, 'update secret set bindings = \'[["database","evil:5432","off"]]\' where name = \'prod\'')
    manager = new(path, key=KEY)
    assert await manager.store_secret("prod", {"password": "AGAIN"}) == 3
    assert await manager.get_secret("prod") == {"password": "AGAIN"}
    [info] = [info for info in await manager.describe() if info.name == "prod"]
    assert (info.version, info.bindings, info.problem) == (3, (), None) and len(rows(path, "prod")) == 1


async def test_a_refused_secret_can_be_deleted(path, new):
    sql(path, SWAP.format("envelope"))
    manager = new(path, key=KEY)
    await manager.delete_secret("prod")
    assert await manager.list_secrets() == ["open", "test"] and not rows(path, "prod")


async def test_the_version_before_is_kept_and_the_one_before_that_is_destroyed_on_the_disk(path, new):
    manager = new(path, key=KEY)
    first, second = rows(path, "prod")
    await manager.store_secret("prod", {"password": "THIRD"})
    assert [row[1] for row in rows(path, "prod")] == [2, 3]
    on_disk = path.read_bytes() + path.with_name("secrets.db-journal").read_bytes()
    wrapped_key = slice(11, 11 + 60)
    assert second[6][wrapped_key] in on_disk and first[6][wrapped_key] not in on_disk
    await manager.delete_secret("prod")
    on_disk = path.read_bytes() + path.with_name("secrets.db-journal").read_bytes()
    assert second[6][wrapped_key] not in on_disk


@pytest.mark.parametrize("seed", range(5))
async def test_no_flipped_bit_ever_gives_a_wrong_value(path, new, tmp_path, seed):
    generator = random.Random(seed)
    original, healthy = path.read_bytes(), await new(path, key=KEY).describe()
    # Half the flips go where something is: most of a small file is empty.
    used = [i for i, byte in enumerate(original) if byte]
    outcomes = {"right": 0, "refused": 0}
    for number in range(200):
        data = bytearray(original)
        data[generator.choice(used) if number % 2 else generator.randrange(len(data))] ^= 1 << generator.randrange(8)
        (flipped := tmp_path / "flipped.db").write_bytes(data)
        manager = new(flipped, key=KEY)
        for name, value in VALUES.items():
            try:
                assert await manager.get_secret(name) == value
                assert manager.version(name) == (2 if name == "prod" else 1)
                outcomes["right"] += 1
            except KailashError:
                outcomes["refused"] += 1
        with contextlib.suppress(KailashError):
            infos = await manager.describe()
            assert [info.name for info in infos] == ["open", "prod", "test"]
            assert all(info.problem or info in healthy for info in infos)
        await manager.close()
        flipped.unlink()
        flipped.with_name("flipped.db-journal").unlink(missing_ok=True)
    assert outcomes["right"] > 100 and outcomes["refused"] > 10
