"""Keys in real files and in an environment, and what they seal."""

from __future__ import annotations

import base64
import os
import stat
from pathlib import Path

import pytest

from streamer.vault import KEY_FILE_VARIABLE, KEY_VARIABLE, Vault, VaultError, load_key, new_key

KEY = bytes(range(32))
TEXT = base64.b64encode(KEY).decode()


def write_key(path: Path, content: str = TEXT + "\n", mode: int = 0o600) -> Path:
    path.write_text(content)
    path.chmod(mode)
    return path


def test_what_is_sealed_opens_with_the_same_key_for_the_same_place():
    sealed = Vault(KEY).seal(b"Ada Lovelace", b"identity 7")

    assert b"Ada" not in sealed
    assert Vault(KEY).open(sealed, b"identity 7") == b"Ada Lovelace"


def test_nothing_opens_with_another_key_for_another_place_or_with_a_changed_byte():
    sealed = Vault(KEY).seal(b"Ada Lovelace", b"identity 7")
    changed = [sealed[:place] + bytes([sealed[place] ^ 1]) + sealed[place + 1 :] for place in range(len(sealed))]

    for vault, text, about in [
        (Vault(bytes(32)), sealed, b"identity 7"),
        (Vault(KEY), sealed, b"identity 8"),
        *((Vault(KEY), each, b"identity 7") for each in changed),
        *((Vault(KEY), sealed[:length], b"identity 7") for length in range(len(sealed))),
    ]:
        with pytest.raises(VaultError):
            vault.open(text, about)


def test_the_same_text_never_looks_the_same():
    vault = Vault(KEY)

    assert len({vault.seal(b"the same", b"") for _ in range(100)}) == 100


def test_what_an_inner_vault_sealed_is_lost_with_its_sealed_key():
    outer = Vault(KEY)
    inner, sealed_key = outer.make_inner(b"record 1")
    sealed = inner.seal(b"a face", b"photo")

    assert outer.open_inner(sealed_key, b"record 1").open(sealed, b"photo") == b"a face"
    with pytest.raises(VaultError):
        outer.open(sealed, b"photo")
    with pytest.raises(VaultError):
        outer.open_inner(sealed_key, b"record 2")


def test_a_passphrase_opens_what_it_sealed_with_the_same_salt_alone():
    sealed = Vault.of_passphrase("correct horse battery", b"salt of 16 bytes").seal(b"a gallery", b"")

    assert Vault.of_passphrase("correct horse battery", b"salt of 16 bytes").open(sealed, b"") == b"a gallery"
    with pytest.raises(VaultError):
        Vault.of_passphrase("correct horse battery", b"another 16 bytes").open(sealed, b"")


def test_a_short_passphrase_is_refused():
    with pytest.raises(VaultError, match="at least 12 characters"):
        Vault.of_passphrase("swordfish", b"salt of 16 bytes")


def test_a_new_key_is_its_owners_alone_and_opens_what_it_sealed(tmp_path):
    path = tmp_path / "deep" / "keys" / "gallery.key"

    sealed = new_key(path).seal(b"text", b"")

    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert load_key(path).open(sealed, b"") == b"text"
    assert list(path.parent.iterdir()) == [path]


def test_a_key_is_never_overwritten(tmp_path):
    path = write_key(tmp_path / "gallery.key")

    with pytest.raises(VaultError, match="never overwritten"):
        new_key(path)

    assert path.read_text() == TEXT + "\n"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o644])
def test_a_key_that_others_can_read_is_refused_with_the_command_that_mends_it(tmp_path, mode):
    path = write_key(tmp_path / "a key", mode=mode)

    with pytest.raises(VaultError, match=f"open to others: chmod 600 '{path}'"):
        load_key(path)


@pytest.mark.parametrize("content", ["", "short", TEXT[:-4], TEXT + "AAAA", "not base64, but a secret of somebody's"])
def test_a_file_that_holds_no_key_is_named_and_not_quoted(tmp_path, content):
    path = write_key(tmp_path / "gallery.key", content)

    with pytest.raises(VaultError) as refused:
        load_key(path)

    assert str(refused.value) == f"{path} holds no key: 32 bytes in base64"
    assert refused.value.__suppress_context__


def test_a_missing_key_a_folder_and_a_pipe_are_refused_in_one_line(tmp_path):
    os.mkfifo(tmp_path / "pipe", 0o600)

    for name, told in [("none", "no key at"), ("", "Is a directory"), ("pipe", "is no file")]:
        with pytest.raises(VaultError, match=told) as refused:
            load_key(tmp_path / name)
        assert "\n" not in str(refused.value)


def test_the_environment_holds_the_key_or_names_its_file(tmp_path):
    path = write_key(tmp_path / "gallery.key")
    sealed = Vault(KEY).seal(b"text", b"")

    assert load_key(environ={KEY_VARIABLE: TEXT}).open(sealed, b"") == b"text"
    assert load_key(environ={KEY_FILE_VARIABLE: str(path)}).open(sealed, b"") == b"text"
    assert load_key(path, environ={KEY_VARIABLE: "not asked"}).open(sealed, b"") == b"text"


def test_a_broken_key_in_the_environment_is_named_by_its_variable():
    with pytest.raises(VaultError, match=f"^{KEY_VARIABLE} holds no key") as refused:
        load_key(environ={KEY_VARIABLE: TEXT[:-5]})

    assert TEXT[:8] not in str(refused.value)


def test_without_an_environment_the_key_lies_in_the_users_config_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))

    new_key(tmp_path / "streamer" / "keys" / "gallery.key")

    load_key(environ={})


def test_a_vault_shows_no_key():
    assert not any(text in repr(Vault(KEY)) + repr(vars(Vault(KEY))) for text in (repr(KEY)[2:-1], TEXT, KEY.hex()))
