"""Where the key lies, who is asked for it, and that none is ever replaced."""

from __future__ import annotations

import base64
import os
import stat
import sys
import threading

import keyring
import pytest
from keyring.backend import KeyringBackend
from keyring.errors import KeyringLocked, PasswordSetError

from kailash_nb.exceptions import SecretError, SecretKeyError
from kailash_nb.secrets import keys
from kailash_nb.secrets.encryption import Key
from kailash_nb.secrets.keys import EnvironmentKey, FileKey, KeyringKey

RAW = bytes(range(100, 132))
TEXT = base64.b64encode(RAW).decode()


class MemoryKeyring(KeyringBackend):
    """A keyring that keeps what it is given as long as the test runs, and can be locked."""

    priority = 5
    locked = False

    def __init__(self):
        super().__init__()
        self.kept = {}

    def get_password(self, service, username):
        if self.locked:
            raise KeyringLocked("locked")
        return self.kept.get((service, username))

    def set_password(self, service, username, password):
        if self.locked:
            raise PasswordSetError(f"{password} was refused")
        self.kept[service, username] = password

    def delete_password(self, service, username):
        del self.kept[service, username]


@pytest.fixture
def os_keyring():
    keyring.set_keyring(backend := MemoryKeyring())
    return backend


# ------------------------------------------------------------------------------------------------------- environment


@pytest.mark.parametrize("text", [TEXT, f"  {TEXT}\n", base64.urlsafe_b64encode(RAW).decode()])
def test_the_environment_holds_a_key_in_base64(monkeypatch, text):
    monkeypatch.setenv("KAILASH_NB_KEK", text)
    assert EnvironmentKey().find(None).id == EnvironmentKey().make().id == Key(RAW).id


def test_an_unset_or_empty_variable_is_no_key(monkeypatch):
    assert EnvironmentKey().make() is None
    monkeypatch.setenv("KAILASH_NB_KEK", "")
    assert EnvironmentKey().make() is None


@pytest.mark.parametrize("text", ["CANARY", TEXT[:-8], TEXT + "AAAA", "é" * 44, RAW.hex()])
def test_a_variable_that_holds_no_key_is_an_error_that_says_how_to_make_one_and_not_what_is_there(monkeypatch, text):
    monkeypatch.setenv("KAILASH_NB_KEK", text)
    with pytest.raises(
        SecretKeyError, match=r"KAILASH_NB_KEK does not hold 32 bytes in base64; .*python3 -c"
    ) as caught:
        EnvironmentKey().find(None)
    assert text not in str(caught.value)


def test_the_command_that_the_error_shows_makes_a_key(monkeypatch, output):
    monkeypatch.setenv("KAILASH_NB_KEK", "x")
    with pytest.raises(SecretKeyError) as caught:
        EnvironmentKey().find(None)
    command = str(caught.value).split('python3 -c "')[1].split('"')[0]
    monkeypatch.setenv("KAILASH_NB_KEK", output(command))
    assert EnvironmentKey().find(None) is not None


# -------------------------------------------------------------------------------------------------------------- file


def test_the_key_file_is_its_owners_alone_and_is_found_again(home):
    old = os.umask(0)
    try:
        key = FileKey().make()
    finally:
        os.umask(old)
    assert stat.S_IMODE(home.key.stat().st_mode) == 0o600
    assert stat.S_IMODE(home.key.parent.stat().st_mode) == 0o700
    assert FileKey().find(None).id == FileKey().make().id == key.id
    assert len(base64.b64decode(home.key.read_text())) == 32


def test_there_is_no_key_where_there_is_no_file_and_looking_makes_none(home):
    assert FileKey().find(None) is None
    assert not home.config.exists()


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o666, 0o610])
def test_a_key_file_that_others_may_open_is_refused_with_the_command_that_mends_it(home, mode):
    key = FileKey().make()
    home.key.chmod(mode)
    for use in (lambda: FileKey().find(None), FileKey().make):
        with pytest.raises(SecretKeyError, match=rf"mode {mode:04o}\): run `chmod 600 {home.key}`"):
            use()
    home.key.chmod(0o600)
    assert FileKey().find(None).id == key.id


@pytest.mark.parametrize("content", [b"", b"CANARY", b"\xff" * 44, TEXT.encode()[:20]])
def test_a_file_that_holds_no_key_is_refused_and_left_as_it_is(home, content, monkeypatch):
    monkeypatch.setattr(keys._wait_for_content, "__defaults__", (0.05,))
    home.key.parent.mkdir(parents=True)
    home.key.touch(0o600)
    home.key.write_bytes(content)
    for use in (lambda: FileKey().find(None), FileKey().make):
        with pytest.raises(SecretKeyError, match="does not hold 32 bytes") as caught:
            use()
        assert "CANARY" not in str(caught.value)
    assert home.key.read_bytes() == content


def test_a_key_file_that_is_a_folder_is_a_clear_error(home):
    home.key.mkdir(mode=0o700, parents=True)
    with pytest.raises(SecretKeyError, match="cannot be used: Is a directory"):
        FileKey().make()


def test_a_config_folder_that_cannot_be_made_is_a_clear_error_with_the_remedies(home):
    home.config.write_text("a file")
    with pytest.raises(SecretKeyError, match=r"cannot be made: .*XDG_CONFIG_HOME.*KAILASH_NB_KEK"):
        FileKey().make()


def test_many_that_make_the_key_file_at_once_get_the_same_key(home):
    start, made = threading.Barrier(8), []

    def make():
        start.wait(20)
        made.append(FileKey().make().id)

    for _ in range(20):
        home.key.unlink(missing_ok=True)
        made.clear()
        threads = [threading.Thread(target=make) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
        assert made == [FileKey().find(None).id] * 8


# ----------------------------------------------------------------------------------------------------------- keyring


def test_a_real_keyring_keeps_every_key_it_was_given(os_keyring):
    one, other = KeyringKey().make(), KeyringKey().make()
    assert one.id != other.id
    assert KeyringKey().find(one.id).id == one.id and KeyringKey().find(other.id).id == other.id
    assert {service for service, _ in os_keyring.kept} == {"kailash_nb"}
    assert KeyringKey().find("0" * 16) is None


def test_a_keyring_that_keeps_nothing_real_is_none(os_keyring, monkeypatch):
    monkeypatch.setattr(MemoryKeyring, "priority", 0.5)
    assert KeyringKey().make() is None and os_keyring.kept == {}


def test_a_keyring_whose_library_is_missing_or_broken_is_none(monkeypatch):
    monkeypatch.setitem(sys.modules, "keyring", None)
    assert KeyringKey().make() is None and KeyringKey().find("0" * 16) is None


def test_a_locked_keyring_makes_no_key_and_says_so_where_one_is_in_it(os_keyring):
    key = KeyringKey().make()
    os_keyring.locked = True
    assert KeyringKey().make() is None
    with pytest.raises(
        SecretKeyError, match=r"keyring, service 'kailash_nb', does not answer \(KeyringLocked\): unlock"
    ):
        KeyringKey().find(key.id)


# ------------------------------------------------------------------------------------------------ who is asked, where


def test_a_new_store_gets_the_environments_key_else_the_keyrings_else_the_files(home, os_keyring, monkeypatch):
    monkeypatch.setenv("KAILASH_NB_KEK", TEXT)
    chosen = [keys.key_for_new_store(keys.default_providers())[0].name]
    monkeypatch.delenv("KAILASH_NB_KEK")
    chosen.append(keys.key_for_new_store(keys.default_providers())[0].name)
    assert not home.key.exists()
    os_keyring.locked = True
    chosen.append(keys.key_for_new_store(keys.default_providers())[0].name)
    assert chosen == ["environment", "keyring", "file"] and home.key.exists()


def test_a_stores_key_is_asked_of_its_keeper_first_and_then_of_everybody(home, monkeypatch):
    key = FileKey().make()
    find = lambda keeper: keys.key_of_store(keys.default_providers(), key.id, keeper, home.secrets)  # noqa: E731
    assert find("file")[0].name == "file"
    assert find("keyring")[0].name == "file"
    monkeypatch.setenv("KAILASH_NB_KEK", home.key.read_text())
    assert find("file")[0].name == "file"
    assert find("environment")[0].name == "environment"
    home.key.unlink()
    assert find("file")[0].name == "environment"


def test_a_stores_key_that_nobody_has_is_an_error_that_tells_who_was_asked(home, monkeypatch):
    monkeypatch.setenv("KAILASH_NB_KEK", TEXT)
    with pytest.raises(SecretKeyError) as caught:
        keys.key_of_store(keys.default_providers(), "0" * 16, "file", home.secrets)
    message = str(caught.value)
    assert f"{home.key} has no key" in message and f"KAILASH_NB_KEK has another key ({Key(RAW).id})" in message
    assert "restore that key" in message and str(home.secrets) in message and TEXT not in message
    assert not home.key.exists()


def test_relative_folders_count_as_unset_and_the_home_is_used(home, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_DATA_HOME", "relative")
    monkeypatch.delenv("XDG_CONFIG_HOME")
    monkeypatch.setattr(sys, "platform", "linux")
    assert keys.default_path() == tmp_path / "home/.local/share/kailash_nb/secrets.db"
    assert FileKey().path == tmp_path / "home/.config/kailash_nb/kek"
    monkeypatch.setattr(sys, "platform", "darwin")
    assert keys.default_path() == tmp_path / "home/Library/Application Support/kailash_nb/secrets.db"
    assert FileKey().path == tmp_path / "home/Library/Application Support/kailash_nb/kek"


def test_the_path_of_the_secrets_can_be_chosen(tmp_path, monkeypatch):
    monkeypatch.setenv("KAILASH_NB_SECRETS", "~/mine.db")
    assert keys.default_path() == tmp_path / "home" / "mine.db"


def test_a_user_without_a_home_is_told_what_to_set(monkeypatch):
    monkeypatch.delenv("XDG_DATA_HOME")

    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(keys.Path, "home", homeless)
    with pytest.raises(SecretError, match="set HOME, or XDG_DATA_HOME and KAILASH_NB_SECRETS"):
        keys.default_path()


def test_using_secrets_loads_no_keyring_before_it_is_asked_for(output):
    assert output("print('keyring' in sys.modules)") == "False"
