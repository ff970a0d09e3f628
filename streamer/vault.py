"""Keys and what they seal: AES-256-GCM."""

from __future__ import annotations

import base64
import os
import secrets
import shlex
import stat
import tempfile
from collections.abc import Mapping
from pathlib import Path

import platformdirs
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.scrypt import Scrypt

KEY_VARIABLE = "STREAMER_GALLERY_KEY"
"""The key itself, in base64."""
KEY_FILE_VARIABLE = "STREAMER_GALLERY_KEY_FILE"
"""The path of a key file."""
LEAST_PASSPHRASE = 12

_KEY_BYTES = 32
_NONCE_BYTES = 12
_MOST_FILE_BYTES = 4096
_SCRYPT_COST = 2**17  # 128 MiB and 0.4 s a try: what is sealed by a passphrase lies in a file that can be carried away


class VaultError(ValueError):
    """A key is missing, unusable or not the one that sealed. The message is one line, without key material."""


class Vault:
    """Seals and opens with one 256-bit key. May be shared between threads."""

    def __init__(self, key: bytes) -> None:
        """Raise VaultError for a key that is not 32 bytes long."""
        if len(key) != _KEY_BYTES:
            raise VaultError(f"a key has {_KEY_BYTES} bytes, this one {len(key)}")
        self._cipher = AESGCM(key)

    def seal(self, plain: bytes, about: bytes) -> bytes:
        """Return nonce, ciphertext and tag, 28 bytes more than `plain`. It opens with the same `about` only."""
        nonce = secrets.token_bytes(_NONCE_BYTES)
        return nonce + self._cipher.encrypt(nonce, plain, about)

    def open(self, sealed: bytes, about: bytes) -> bytes:
        """Return what was sealed. Raises VaultError for another key, another `about`, or a changed byte."""
        try:
            return self._cipher.decrypt(sealed[:_NONCE_BYTES], sealed[_NONCE_BYTES:], about)
        except (InvalidTag, ValueError) as exc:  # ValueError: shorter than a nonce
            raise VaultError("sealed with another key, for another place, or changed since") from exc

    def make_inner(self, about: bytes) -> tuple[Vault, bytes]:
        """Return a vault with a new key of its own, and that key sealed: without those bytes it never opens again."""
        key = secrets.token_bytes(_KEY_BYTES)
        return Vault(key), self.seal(key, about)

    def open_inner(self, sealed: bytes, about: bytes) -> Vault:
        """Return the vault that `make_inner` made. Raises VaultError."""
        return Vault(self.open(sealed, about))

    @classmethod
    def of_passphrase(cls, passphrase: str, salt: bytes) -> Vault:
        """Return the vault of a passphrase, slowly. Raises VaultError for one of less than 12 characters."""
        if len(passphrase) < LEAST_PASSPHRASE:
            raise VaultError(f"a passphrase has at least {LEAST_PASSPHRASE} characters")
        kdf = Scrypt(salt=salt, length=_KEY_BYTES, n=_SCRYPT_COST, r=8, p=1)
        return cls(kdf.derive(passphrase.encode()))


def default_key_file() -> Path:
    """Return where the gallery's key lies unless somebody says otherwise: the user's config folder."""
    return platformdirs.user_config_path("streamer") / "keys" / "gallery.key"


def new_key(path: Path) -> Vault:
    """Write a new key to `path`, for its owner alone, and return its vault. Raises VaultError; never overwrites."""
    key = secrets.token_bytes(_KEY_BYTES)
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as exc:
        raise VaultError(f"{path.parent}: {exc.strerror}") from exc
    try:
        _write_once(path, base64.b64encode(key) + b"\n")
    except FileExistsError as exc:
        raise VaultError(f"{path} is there already; a key is never overwritten") from exc
    except OSError as exc:
        raise VaultError(f"{path}: {exc.strerror}") from exc
    return Vault(key)


def load_key(path: Path | None = None, environ: Mapping[str, str] = os.environ) -> Vault:
    """Return the vault of the key at `path`; without one, of that which `environ` holds or names, or of the default's.

    Raises VaultError for a key that is missing, malformed, or open to others.
    """
    if path is None and KEY_VARIABLE in environ:
        return _decode(environ[KEY_VARIABLE], KEY_VARIABLE)
    return _load_file(path or key_file(environ))


def key_file(environ: Mapping[str, str] = os.environ) -> Path:
    """Return the key file that `environ` names, or the default."""
    named = environ.get(KEY_FILE_VARIABLE)
    return Path(named).expanduser() if named else default_key_file()


def _load_file(path: Path) -> Vault:
    try:
        # without waiting: a FIFO would, for its writer
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
            mode = os.fstat(file.fileno()).st_mode
            if not stat.S_ISREG(mode):
                raise VaultError(f"{path} is no file")
            if mode & 0o077:
                raise VaultError(f"{path} is open to others: chmod 600 {shlex.quote(str(path))}")
            text = file.read(_MOST_FILE_BYTES)
    except FileNotFoundError as exc:
        raise VaultError(f"no key at {path}; {KEY_FILE_VARIABLE} names another place") from exc
    except OSError as exc:
        raise VaultError(f"{path}: {exc.strerror}") from exc
    return _decode(text.decode("ascii", "replace"), str(path))


def _decode(text: str, place: str) -> Vault:
    try:
        return Vault(base64.b64decode(text.strip(), validate=True))
    except ValueError:  # not `from` it: its message could show a part of the key
        raise VaultError(f"{place} holds no key: {_KEY_BYTES} bytes in base64") from None


def _write_once(path: Path, content: bytes) -> None:
    """Make a file whole or not at all. Raises FileExistsError."""
    opened, part = tempfile.mkstemp(dir=path.parent, prefix=".key-")  # 0600
    try:
        with open(opened, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.link(part, path)
    finally:
        os.unlink(part)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
