"""One SQLite file under many threads, loops and processes."""

from __future__ import annotations

import asyncio
import os
import signal
import sqlite3
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from kailash_nb.exceptions import StoreError
from kailash_nb.sqlitefile import SqliteFile

KIND = 4242
MIGRATIONS = ("create table note (id integer primary key, text text not null unique);",)
PRELUDE = f"""
import asyncio, os, signal, sys
from pathlib import Path
from kailash_nb.sqlitefile import SqliteFile
file = SqliteFile(Path(sys.argv[1]), {MIGRATIONS!r}, application_id={KIND})
def add(text):
    return lambda c: c.execute("insert into note (text) values (?)", (text,)).rowcount
def count(c):
    return c.execute("select count(*) from note").fetchone()[0]
"""


def add(text):
    return lambda connection: connection.execute("insert into note (text) values (?)", (text,)).rowcount


def count(connection):
    return connection.execute("select count(*) from note").fetchone()[0]


def texts(connection):
    return [text for (text,) in connection.execute("select text from note order by text")]


def commits(path):
    """How often the file has changed, by its own counter (SQLite file format, 1.3.7)."""
    return int.from_bytes(path.read_bytes()[24:28], "big")


@pytest.fixture
def path(tmp_path):
    return tmp_path / "folder" / "notes.db"


@pytest.fixture
def opened():
    """Makes files that are closed after the test."""
    files = []

    def make(path, migrations=MIGRATIONS, **options):
        files.append(SqliteFile(path, migrations, **{"application_id": KIND} | options))
        return files[-1]

    yield make
    for file in files:
        file.close()


def start(script: str, path: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", PRELUDE + script, str(path)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def finished(process: subprocess.Popen[str]) -> str:
    with process:
        output, _ = process.communicate(timeout=50)
    assert process.returncode == 0
    return output


def test_making_one_touches_no_disk_and_starts_no_thread(path, opened):
    threads = threading.active_count()
    opened(path)
    assert not path.parent.exists() and threading.active_count() == threads


async def test_what_was_written_is_read_by_every_way(path, opened):
    file = opened(path)
    assert await file.write(add("one")) == 1
    assert file.write_now(add("two")) == 1
    assert file.read(texts) == ["one", "two"]


def test_file_and_journal_are_the_owners_alone_in_a_folder_of_the_owners(path, opened):
    old = os.umask(0)
    try:
        opened(path).write_now(add("one"))
    finally:
        os.umask(old)
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert {stat.S_IMODE(entry.stat().st_mode) for entry in path.parent.iterdir()} == {0o600}


def test_an_existing_file_that_others_may_read_is_closed_to_them(path, opened):
    opened(path).write_now(add("one"))
    path.chmod(0o644)
    opened(path).open()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_folder_that_was_there_keeps_its_mode(tmp_path, opened):
    tmp_path.chmod(0o755)
    opened(tmp_path / "notes.db").open()
    assert stat.S_IMODE(tmp_path.stat().st_mode) == 0o755


async def test_a_write_that_fails_undoes_itself_and_no_other_of_its_batch(path, opened):
    file = opened(path)
    await file.write(add("taken"))

    def half(connection):
        add("half")(connection)
        raise ValueError("changed my mind")

    results = await asyncio.gather(
        file.write(add("a")), file.write(half), file.write(add("taken")), file.write(add("b")), return_exceptions=True
    )
    assert results[0] == results[3] == 1
    assert isinstance(results[1], ValueError)
    assert isinstance(results[2], StoreError) and "UNIQUE" in str(results[2]) and str(path) in str(results[2])
    assert file.read(texts) == ["a", "b", "taken"]


async def test_many_waiting_writers_share_a_commit(path, opened):
    file = opened(path)
    file.open()
    gate, entered = threading.Event(), threading.Event()

    def slow(connection):
        entered.set()
        gate.wait(20)

    before = commits(path)
    first = asyncio.create_task(file.write(slow))
    await asyncio.to_thread(entered.wait, 20)
    rest = [asyncio.create_task(file.write(add(str(n)))) for n in range(100)]
    await asyncio.sleep(0)
    gate.set()
    await asyncio.gather(first, *rest)
    assert file.read(count) == 100 and commits(path) == before + 1


def test_several_loops_and_threads_write_at_once(path, opened):
    file = opened(path)
    errors = []

    def work(who):
        async def main():
            await asyncio.gather(*(file.write(add(f"{who} async {n}")) for n in range(20)))

        try:
            asyncio.run(main())
            for n in range(5):
                file.write_now(add(f"{who} now {n}"))
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(who,)) for who in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(50)
    assert not errors and file.read(count) == 100


def test_two_processes_that_write_at_once_lose_nothing_and_migrate_once(path, opened):
    script = "for n in range(60): file.write_now(add(f'{sys.argv[2:]} {os.getpid()} {n}'))"
    processes = [start(script, path) for _ in range(3)]
    for process in processes:
        finished(process)
    assert opened(path).read(count) == 180


def test_a_killed_process_leaves_every_acknowledged_write_and_a_file_that_works(path, opened):
    script = "n = 0\nwhile True:\n    file.write_now(add(str(n))); print(n, flush=True); n += 1"
    for _ in range(4):
        with start(script.replace("n = 0", "n = 1 + (file.read(count) or 0)"), path) as process:
            lines = [process.stdout.readline() for _ in range(7)]
            os.kill(process.pid, signal.SIGKILL)
            lines += process.stdout.readlines()
        acknowledged = {line.strip() for line in lines if line.endswith("\n")}
        assert acknowledged <= set(opened(path).read(texts))
        opened(path).write_now(lambda c: c.execute("delete from note"))


def test_the_stamp_changes_with_every_commit_of_anyone_and_else_stays(path, opened):
    one, other = opened(path), opened(path)
    stamps = [one.stamp()]
    assert one.stamp() == stamps[0]
    one.write_now(add("mine"))
    stamps.append(one.stamp())
    other.write_now(add("another file object's"))
    stamps.append(one.stamp())
    finished(start("file.write_now(add('another process'))", path))
    stamps.append(one.stamp())
    assert one.stamp() == stamps[-1] and len(set(stamps)) == 4


def test_a_stamp_is_never_older_than_a_write_that_has_returned(path, opened):
    one, other = opened(path), opened(path)
    for n in range(50):
        before = one.stamp()
        (one if n % 2 else other).write_now(add(str(n)))
        assert one.stamp() != before


def test_reading_may_not_write(path, opened):
    with pytest.raises(StoreError, match="readonly"):
        opened(path).read(add("sneaky"))


def test_a_write_that_waits_for_another_write_is_an_error_and_no_deadlock(path, opened):
    file = opened(path)
    with pytest.raises(StoreError, match="use the connection that it was given"):
        file.write_now(lambda connection: file.write_now(add("inner")))
    assert file.write_now(add("after")) == 1


async def test_a_cancelled_write_that_has_not_begun_never_happens(path, opened):
    file = opened(path)
    file.open()
    gate, entered = threading.Event(), threading.Event()

    def slow(connection):
        entered.set()
        gate.wait(20)

    blocking = asyncio.create_task(file.write(slow))
    await asyncio.to_thread(entered.wait, 20)
    cancelled = asyncio.create_task(file.write(add("never")))
    await asyncio.sleep(0)
    cancelled.cancel()
    await asyncio.wait([cancelled])
    gate.set()
    await blocking
    assert cancelled.cancelled() and file.write_now(add("after")) == 1 and file.read(texts) == ["after"]


def test_migrations_run_in_order_and_once(path, opened):
    opened(path).write_now(add("kept"))
    second = "alter table note add column stars integer not null default 3;\nupdate note set stars = 5;"
    third = "create trigger noted after insert on note begin\n  update note set stars = 1 where id = new.id;\nend;"
    newer = opened(path, (*MIGRATIONS, second, third))
    newer.write_now(add("new"))
    assert newer.read(lambda c: c.execute("select text, stars from note order by id").fetchall()) == [
        ("kept", 5),
        ("new", 1),
    ]
    again = opened(path, (*MIGRATIONS, second, third))
    assert again.read(lambda c: c.execute("pragma user_version").fetchone()[0]) == 3


def test_a_migration_that_fails_changes_nothing(path, opened):
    opened(path).write_now(add("kept"))
    with pytest.raises(StoreError, match="no such table"):
        opened(path, (*MIGRATIONS, "alter table note add column x;\nalter table missing add column y;")).open()
    assert opened(path).read(lambda c: [row[1] for row in c.execute("pragma table_info(note)")]) == ["id", "text"]


def test_a_file_of_a_newer_version_is_refused_and_left_alone(path, opened):
    opened(path, (*MIGRATIONS, "alter table note add column x;")).write_now(add("kept"))
    content = path.read_bytes()
    with pytest.raises(StoreError, match=r"newer kailash_nb wrote it \(format 2; this one knows 1\).*set X"):
        opened(path, remedy="set X").open()
    assert path.read_bytes() == content


@pytest.mark.parametrize("setup", ["create table theirs (a)", "pragma application_id=7", "pragma user_version=1"])
def test_another_programs_database_is_refused_and_left_alone(tmp_path, opened, setup):
    path = tmp_path / "theirs.db"
    connection = sqlite3.connect(path)
    connection.execute(setup)
    connection.commit()
    connection.close()
    content = path.read_bytes()
    with pytest.raises(StoreError, match="database of something else"):
        opened(path).open()
    assert path.read_bytes() == content


def test_what_is_no_database_is_refused_and_left_alone(tmp_path, opened):
    path = tmp_path / "notes.txt"
    path.write_text("dear diary, " * 100)
    with pytest.raises(StoreError, match=r"notes\.txt cannot be used: file is not a database; set X"):
        opened(path, remedy="set X").open()
    assert path.read_text() == "dear diary, " * 100


async def test_a_folder_that_cannot_be_made_is_a_clear_error_for_every_way_in(tmp_path, opened):
    (tmp_path / "file").write_text("")
    file = opened(tmp_path / "file" / "notes.db", remedy="set X to another path")
    for call in (lambda: file.write_now(count), lambda: file.read(count), file.stamp, file.open):
        with pytest.raises(StoreError, match=r"notes\.db cannot be used: .*; set X to another path"):
            call()
    with pytest.raises(StoreError, match="set X"):
        await file.write(count)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_a_folder_of_somebody_elses_is_a_clear_error(open_folder):
    script = "os.setgroups([]); os.setgid(65534); os.setuid(65534)\ntry: file.open()\nexcept Exception as e: print(e)"
    assert "Permission denied" in finished(start(script, open_folder / "notes.db"))


async def test_a_full_disk_fails_the_write_and_the_next_works(path, opened):
    file = opened(path)
    await file.write(add("before"))

    def too_much(connection):
        pages = connection.execute("pragma page_count").fetchone()[0]
        connection.execute(f"pragma max_page_count={pages}")
        try:
            return add("x" * 1_000_000)(connection)
        finally:
            connection.execute("pragma max_page_count=1000000")

    with pytest.raises(StoreError, match="full"):
        await file.write(too_much)
    assert await file.write(add("after")) == 1 and file.read(texts) == ["after", "before"]


async def test_a_write_that_undoes_the_whole_transaction_fails_its_batch_and_the_next_works(path, opened):
    file = opened(path)
    await file.write(add("taken"))
    all_or_nothing = "insert or rollback into note (text) values ('taken')"
    results = await asyncio.gather(
        file.write(add("a")), file.write(lambda c: c.execute(all_or_nothing)), return_exceptions=True
    )
    assert isinstance(results[1], StoreError) and "UNIQUE" in str(results[1])
    kept = file.read(texts)
    assert ("a" in kept) == (results[0] == 1) and set(kept) <= {"a", "taken"}
    assert await file.write(add("b")) == 1


def test_closing_finishes_what_waits_ends_the_thread_and_the_next_use_opens_again(path, opened):
    threads = threading.active_count()
    file = opened(path)
    waiting = [file._submit(add(str(n))) for n in range(50)]
    file.close()
    file.close()
    assert all(future.done() for future in waiting) and threading.active_count() == threads
    assert file.read(count) == 50 and file.write_now(add("again")) == 1


def test_closing_from_one_thread_while_others_use_it_breaks_nothing(path, opened):
    file, errors = opened(path), []

    def work(who):
        try:
            for n in range(30):
                file.write_now(add(f"{who} {n}"))
                file.stamp()
                file.read(count)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(who,)) for who in range(3)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        file.close()
        time.sleep(0.005)
    assert not errors and file.read(count) == 90


def test_one_that_nobody_closed_ends_with_its_last_reference(path):
    threads = threading.active_count()
    file = SqliteFile(path, MIGRATIONS, application_id=KIND)
    file.write_now(add("one"))
    del file
    end = time.monotonic() + 20
    while threading.active_count() > threads and time.monotonic() < end:
        time.sleep(0.01)
    assert threading.active_count() == threads


def test_a_removed_file_is_made_anew_and_a_replaced_one_is_the_one_that_counts(path, opened, tmp_path):
    file = opened(path)
    file.write_now(add("old"))
    other = opened(tmp_path / "other.db")
    other.write_now(add("restored"))
    other.close()
    before = file.stamp()
    (tmp_path / "other.db").replace(path)
    assert file.stamp() != before and file.read(texts) == ["restored"]
    path.unlink()
    assert file.write_now(add("new")) == 1 and file.read(texts) == ["new"]


def test_a_file_lasts_when_the_working_folder_changes(tmp_path, opened, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = opened(Path("notes.db"))
    (tmp_path / "sub").mkdir()
    monkeypatch.chdir(tmp_path / "sub")
    file.write_now(add("one"))
    assert (tmp_path / "notes.db").exists() and not list((tmp_path / "sub").iterdir())


def test_a_forked_child_opens_the_file_anew_and_does_not_disturb_its_parent(path, opened):
    script = """
import warnings; warnings.simplefilter("ignore")
file.write_now(add("parent before"))
if (child := os.fork()) == 0:
    file.write_now(add("child")); file.close(); sys.exit(0)
file.write_now(add("parent meanwhile"))
assert os.waitpid(child, 0)[1] == 0
file.write_now(add("parent after"))
print(file.read(count))
"""
    assert finished(start(script, path)) == "4\n"
    assert opened(path).read(lambda c: c.execute("pragma integrity_check").fetchone()[0]) == "ok"


def test_what_is_deleted_is_gone_from_the_disk_where_that_is_asked_for(path, opened):
    file = opened(path, pragmas={"secure_delete": "on"})
    file.write_now(add("CANARY" * 500))
    assert b"CANARY" in path.read_bytes()
    file.write_now(lambda connection: connection.execute("delete from note"))
    assert not any(b"CANARY" in entry.read_bytes() for entry in path.parent.iterdir())
