"""Gallery: identities, their photos and templates, and the lists they are on, encrypted in one SQLite file.

Each identity and each list is a record with a data key of its own, itself sealed by the gallery's key. Removal destroys
that key. What a thief of the file learns without the gallery's key: how many there are of each, and which share a list.
"""

from __future__ import annotations

import copy
import fcntl
import hashlib
import itertools
import json
import logging
import os
import secrets
import shlex
import sqlite3
import struct
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO, Protocol

import numpy as np

logger = logging.getLogger(__name__)

SCHEMA = 1
EXACT_UP_TO = 100_000
"""Templates. Beyond, an index makes a short list, of which the similarities are exact."""
SHORT_LIST = 512

_APPLICATION = 0x53474C59  # what SQLite's header names: no other program's database is taken for a gallery
_BUSY_S = 10.0
_UNIT_TOLERANCE = 1e-3
_LEARNT_FROM = 50_000  # templates; more make the short list no better
_KEPT_VARIANCE = 0.95  # of the templates: with less the short list misses some, with more it takes longer
_MOST_DIMENSIONS = 192
_PROBES_AT_ONCE = 64  # bounds the matrix of similarities: 26 MB at 100,000 templates
_MOST_TEXT = 200

_KEYS = "CREATE TABLE {} (record TEXT PRIMARY KEY, sealed BLOB NOT NULL)"
_TABLES = f"""
CREATE TABLE meta (name TEXT PRIMARY KEY, value NOT NULL) WITHOUT ROWID;
{_KEYS.format("key")};
CREATE TABLE identity (id TEXT PRIMARY KEY, body BLOB NOT NULL);
CREATE TABLE photo (
    id TEXT PRIMARY KEY, identity TEXT NOT NULL REFERENCES identity ON DELETE CASCADE, body BLOB NOT NULL
);
CREATE INDEX photo_of ON photo (identity);
CREATE TABLE template (
    id INTEGER PRIMARY KEY AUTOINCREMENT, photo TEXT NOT NULL REFERENCES photo ON DELETE CASCADE,
    embedder TEXT NOT NULL, body BLOB NOT NULL, UNIQUE (photo, embedder)
);
CREATE TABLE list (id TEXT PRIMARY KEY, body BLOB NOT NULL);
CREATE TABLE member (
    identity TEXT REFERENCES identity ON DELETE CASCADE, list TEXT REFERENCES list ON DELETE CASCADE,
    PRIMARY KEY (identity, list)
) WITHOUT ROWID;
"""

_BODIES = {
    "identity": ("'identity ' || id", "id = ?"),
    "photo": ("'photo ' || id", "identity = ?"),
    "template": ("'template ' || photo || ' ' || embedder", "photo IN (SELECT id FROM photo WHERE identity = ?)"),
}
"""What is sealed by an identity's key: what each row is sealed for, and which rows are of an identity."""

_EXPORT = b"streamer.gallery/1\n"
_SALT_BYTES = 16


class GalleryError(ValueError):
    """The gallery cannot be opened, read or changed as asked. The message is one line, without names."""


class Sealing(Protocol):
    """What keeps a gallery secret: `streamer.vault.Vault`. Raises ValueError for what does not open."""

    def seal(self, plain: bytes, about: bytes) -> bytes:
        """Return `plain` sealed, so that it opens with the same `about` only."""
        ...

    def open(self, sealed: bytes, about: bytes) -> bytes:
        """Return what was sealed."""
        ...

    def make_inner(self, about: bytes) -> tuple[Sealing, bytes]:
        """Return one with a new key, and that key sealed by this one's."""
        ...

    def open_inner(self, sealed: bytes, about: bytes) -> Sealing:
        """Return the one that `make_inner` made."""
        ...

    def of_passphrase(self, passphrase: str, salt: bytes) -> Sealing:
        """Return the one whose key is derived from a passphrase."""
        ...


@dataclass(frozen=True, slots=True)
class Identity:
    """A person who is looked for."""

    id: str
    """16 hex digits by chance: for logs and events, where the name has no place."""
    name: str
    lists: tuple[str, ...]
    """Names of the lists that this person is on."""
    photos: tuple[str, ...]
    """Ids, in the order in which they were added."""
    added_at: datetime
    notes: str = ""


@dataclass(frozen=True, slots=True)
class Photo:
    """An enrolled face."""

    id: str
    identity: str
    """Its id."""
    sha256: str
    """Of `image`."""
    image: bytes
    """JPEG or PNG."""
    landmarks: np.ndarray
    """(5, 2) float32 in the image's own pixels."""
    quality: Mapping[str, float]
    forced: tuple[str, ...]
    """Refusals that the operator let through."""
    templates: Mapping[str, np.ndarray]
    """Unit embeddings, (d,) float32, by the sha256 of the embedder's file."""
    added_at: datetime


@dataclass(frozen=True, slots=True)
class WatchList:
    """Why some identities are looked for, on what ground, and until when."""

    name: str
    purpose: str
    legal_basis: str
    threshold: float
    """Least fused similarity of a match, -1..1."""
    priority: int = 0
    """Of two lists of one identity, the higher tells."""
    expires_at: datetime | None = None
    """From then on nobody is matched by this list; None: it does not end by itself."""
    id: str = ""
    """16 hex digits by chance, given by the gallery: for logs and events."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """An identity that a probe is like, by the one of its photos that is most like it."""

    identity: str
    photo: str
    similarity: float
    """Cosine."""


class Gallery:
    """An open gallery. Used by one thread at a time; what the pipeline searches is a `Snapshot`."""

    def __init__(self, folder: Path, records: _Records) -> None:
        """`Gallery.open` makes one."""
        self.folder = folder
        self._records = records

    @classmethod
    def open(cls, folder: Path, vault: Sealing, *, create: bool = False) -> Gallery:
        """Open the gallery in a folder; with `create`, make one where there is none.

        Raises GalleryError where there is none, it was made with another key or by a newer streamer, or is damaged.
        """
        path = folder / "gallery.db"
        try:
            if create:
                folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            if not path.is_file() and not create:
                raise GalleryError(f"no gallery in {folder}: the first `streamer enrol` makes one")
            if folder.stat().st_mode & 0o077:
                raise GalleryError(f"{folder} is open to others: chmod 700 {shlex.quote(str(folder))}")
            with _told(folder):
                if create and not path.exists():
                    with _write_lock(folder):
                        _make(path, vault)
                database = _connect(path)
        except OSError as exc:
            raise GalleryError(f"{exc.filename or folder}: {exc.strerror}") from exc
        try:
            with _told(folder):
                _set_up(database)
                return cls(folder, _Records(database, vault, _gallery_id(folder, database, vault)))
        except BaseException:  # whatever it is, it is raised again: the file is closed first
            database.close()
            raise

    def close(self) -> None:
        """Close the file."""
        self._records.database.close()

    def __enter__(self) -> Gallery:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextmanager
    def change(self, who: str) -> Iterator[Change]:
        """Change the gallery: all that is done inside, or nothing where it raises or the process dies.

        `who` is the operator. Raises GalleryError where somebody else is changing it.
        """
        database = self._records.database
        with _told(self.folder), _write_lock(self.folder):
            database.execute("BEGIN IMMEDIATE")
            change = Change(self._records)
            try:
                yield change
                change.finish(who)
                database.execute("COMMIT")
            except BaseException:  # Ctrl-C too: nothing of a change may stay
                if database.in_transaction:
                    database.execute("ROLLBACK")
                raise
            finally:
                change.over = True
            if not _empty_log(database):
                logger.warning("%s: readers keep the write-ahead log; the next change empties it", self.folder)

    def version(self) -> int:
        """Return a number that grows with every change: cheap, to be asked often."""
        with _told(self.folder):
            return int(self._records.meta("version"))

    def last_change(self) -> tuple[datetime, str]:
        """Return when the gallery last changed, and by whom."""
        with _told(self.folder):
            at, who = self._records.secret("changed")
        return datetime.fromisoformat(at), who

    def embedder(self) -> tuple[str, str] | None:
        """Return what templates are made with, as the operator named it, and its sha256; None: nobody said."""
        with _told(self.folder):
            source, sha256 = self._records.secret("embedder") or ("", "")
        return (source, sha256) if source else None

    def identities(self) -> list[Identity]:
        """Return all identities, in the order in which they were added."""
        with self._reading():
            return [self._records.identity(each) for each in self._records.ids("identity")]

    def identity(self, identity: str) -> Identity:
        """Return one by its id. Raises GalleryError for an unknown one."""
        with self._reading():
            return self._records.identity(identity)

    def photo(self, photo: str) -> Photo:
        """Return one by its id. Raises GalleryError for an unknown one."""
        with self._reading():
            return self._records.photo(photo)

    def lists(self) -> list[WatchList]:
        """Return all lists, expired ones too, the highest priority first."""
        with self._reading():
            return self._records.lists()

    def snapshot(
        self, embedder_sha256: str, *, now: datetime | None = None, earlier: Snapshot | None = None
    ) -> Snapshot:
        """Return what one embedder's templates find, as it is now, for the pipeline.

        Whose lists have all expired at `now` (by default, now) is left out; who is on no list is in. Templates that an
        `earlier` snapshot of the same embedder holds are taken from it, not decrypted again.
        """
        now = now or datetime.now(UTC)
        with self._reading():
            current = [each for each in self._records.lists() if each.expires_at is None or each.expires_at > now]
            members = self._records.members()
            ids = {each.id for each in current}
            expired = {identity for identity, lists in members.items() if not ids & lists}
            rows = [row for row in self._records.template_rows(embedder_sha256) if row[2] not in expired]
            templates = self._records.templates(embedder_sha256, rows, earlier)
            version = int(self._records.meta("version"))
        return Snapshot(
            templates,
            photos=[photo for _, photo, _ in rows],
            identities=[identity for _, _, identity in rows],
            lists=current,
            members=members,
            version=version,
            template_ids=[template for template, _, _ in rows],
        )

    def verify(self) -> list[str]:
        """Return what is wrong, a line each; nothing where every record opens and is what it was."""
        with self._reading():
            findings = list(self._records.findings())
        database = self._records.database
        if not findings and not database.in_transaction:
            with _told(self.folder):
                if not _empty_log(database):
                    findings = [
                        "readers keep the write-ahead log from being emptied; it may hold what was removed, sealed"
                    ]
        return findings

    def export(self, path: Path, secret: str | Sealing) -> int:
        """Write everything to one new file, encrypted by a passphrase or a key; return how many identities.

        Raises GalleryError where the file is there already or cannot be written, and the vault's ValueError for a short
        passphrase.
        """
        salt = secrets.token_bytes(_SALT_BYTES)
        vault = self._export_vault(secret, salt)
        try:
            with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "wb") as file:
                try:
                    file.write(_EXPORT + salt)
                    with self._reading():
                        count = _write_frames(file, vault, salt, _frames(self._records, self.embedder()))
                    file.flush()
                    os.fsync(file.fileno())
                except BaseException:  # Ctrl-C too: no half of an export may lie there
                    path.unlink()
                    raise
        except OSError as exc:
            raise GalleryError(f"{path}: {exc.strerror}") from exc
        return count

    def import_(self, path: Path, secret: str | Sealing, *, who: str) -> int:
        """Add everything that `export` wrote; return how many identities. Nothing changes where it raises.

        Raises GalleryError for a file that is no export, is cut off or changed, or does not open with this secret;
        where an identity of it is here already; where a list of the same name is not the same.
        """
        if not path.is_file():
            raise GalleryError(f"{path}: no such file")
        try:
            with path.open("rb") as file, self.change(who) as change:
                if file.read(len(_EXPORT)) != _EXPORT:
                    raise GalleryError(f"{path} is no export of a gallery")
                salt = file.read(_SALT_BYTES)
                return change.restore(_read_frames(path, file, self._export_vault(secret, salt), salt))
        except OSError as exc:
            raise GalleryError(f"{path}: {exc.strerror}") from exc

    def _export_vault(self, secret: str | Sealing, salt: bytes) -> Sealing:
        return self._records.vault.of_passphrase(secret, salt) if isinstance(secret, str) else secret

    @contextmanager
    def _reading(self) -> Iterator[None]:
        """See one state of the file for as long as this lasts; within a change, what it has done so far."""
        database = self._records.database
        with _told(self.folder):
            if database.in_transaction:
                yield
                return
            database.execute("BEGIN")
            try:
                yield
            finally:
                if database.in_transaction:  # SQLite ends it by itself where the file is damaged
                    database.execute("ROLLBACK")


class Change:
    """What is done to a gallery within one `Gallery.change`. Every method raises GalleryError for what cannot be."""

    def __init__(self, records: _Records) -> None:
        """`Gallery.change` makes one."""
        self._all = records
        self._before = records.database.total_changes
        self._shredded = False
        self.over = False
        """Whether the `with` has ended: nothing can be done any more."""

    def add_identity(self, name: str, *, notes: str = "") -> str:
        """Return the id of a new identity. Two of one name are two persons."""
        identity = Identity(_new_id(), _one_line(name, "a name"), (), (), datetime.now(UTC), notes)
        self._insert_identity(identity)
        return identity.id

    def add_photo(
        self,
        identity: str,
        image: bytes,
        landmarks: np.ndarray,
        *,
        quality: Mapping[str, float],
        forced: Sequence[str] = (),
    ) -> str:
        """Return the id of a new photo: JPEG or PNG, and five points in its pixels."""
        if not image.startswith((b"\xff\xd8", b"\x89PNG")):
            raise GalleryError("a photo is stored as JPEG or PNG")
        points = np.asarray(landmarks, np.float32)
        if points.shape != (5, 2) or not np.isfinite(points).all():
            raise GalleryError("a photo has five landmarks")
        photo = Photo(
            _new_id(), identity, hashlib.sha256(image).hexdigest(), image, points,
            {name: float(value) for name, value in quality.items()}, tuple(forced), {}, datetime.now(UTC),
        )  # fmt: skip
        self._insert_photo(photo)
        return photo.id

    def add_template(self, photo: str, embedder_sha256: str, vector: np.ndarray) -> None:
        """Keep a photo's unit embedding, (d,); one of the same embedder is replaced."""
        records, template = self._records, np.asarray(vector, np.float32)
        if reason := _not_a_template(template):
            raise GalleryError(f"the template {reason}")
        sealed = _seal(
            records.vault_of(records.owner(photo)), template.tobytes(), f"template {photo} {embedder_sha256}"
        )
        other = records.rows("SELECT length(body) FROM template WHERE embedder = ? LIMIT 1", embedder_sha256).fetchone()
        if other and other[0] != len(sealed):
            raise GalleryError(f"the templates of embedder {embedder_sha256[:12]} are not {len(template)} long")
        records.rows(
            "INSERT OR REPLACE INTO template (photo, embedder, body) VALUES (?, ?, ?)", photo, embedder_sha256, sealed
        )

    def use_embedder(self, source: str, sha256: str) -> None:
        """Remember what templates are made with: its name, path or URL, and the sha256 of its file."""
        self._records.put_secret("embedder", [source, sha256])

    def put_list(self, watch_list: WatchList) -> str:
        """Add a list, or replace the one of the same id, without an id the one of the same name; return its id."""
        _check_list(watch_list)
        records = self._records
        namesake = self._list_id(watch_list.name)
        list_id = watch_list.id or namesake or _new_id()
        if namesake not in (None, list_id):
            raise GalleryError("another list has that name")
        if list_id not in records.ids("list"):
            records.make_key(list_id)
            records.rows("INSERT INTO list VALUES (?, x'')", list_id)
        body = json.dumps(_list_fields(watch_list)).encode()
        sealed = _seal(records.vault_of(list_id), body, f"list {list_id}")
        records.rows("UPDATE list SET body = ? WHERE id = ?", sealed, list_id)
        return list_id

    def remove_list(self, name: str) -> None:
        """Remove a list; who was on it stays."""
        list_id = self._known_list(name)
        self._shred(list_id)
        self._records.rows("DELETE FROM list WHERE id = ?", list_id)

    def join(self, identity: str, list_name: str) -> None:
        """Put an identity on a list; one that is on it stays so."""
        self._require("identity", identity)
        self._records.rows("INSERT OR IGNORE INTO member VALUES (?, ?)", identity, self._known_list(list_name))

    def leave(self, identity: str, list_name: str) -> None:
        """Take an identity off a list."""
        list_id = self._known_list(list_name)
        if not self._records.rows("DELETE FROM member WHERE identity = ? AND list = ?", identity, list_id).rowcount:
            raise GalleryError(f"identity {identity} is not on that list")

    def remove_identity(self, identity: str) -> None:
        """Remove an identity with all its photos, and destroy its key."""
        self._require("identity", identity)
        self._shred(identity)
        self._records.rows("DELETE FROM identity WHERE id = ?", identity)

    def remove_photo(self, photo: str) -> None:
        """Remove a photo; what stays of its identity gets a new key, and the old one is destroyed."""
        records = self._records
        identity = records.owner(photo)
        records.rows("DELETE FROM photo WHERE id = ?", photo)
        old = records.vault_of(identity)
        self._shred(identity)
        records.make_key(identity)
        new = records.vault_of(identity)
        for table, (about, of_identity) in _BODIES.items():
            query = f"SELECT rowid, body, {about} FROM {table} WHERE {of_identity}"
            for row, body, place in records.rows(query, identity).fetchall():
                sealed = _seal(new, _open(old, body, place), place)
                records.rows(f"UPDATE {table} SET body = ? WHERE rowid = ?", sealed, row)

    def restore(self, frames: Iterator[tuple[dict[str, Any], list[bytes]]]) -> int:
        """Add what an export's frames hold; return how many identities."""
        head, _ = next(frames)
        if head["embedder"] and not self._records.secret("embedder"):
            self.use_embedder(*head["embedder"])
        here = {each.name: each for each in self._records.lists()}
        for fields in head["lists"]:
            watch_list = _watch_list(fields)
            known = here.get(watch_list.name)
            if known and replace(known, id="") != replace(watch_list, id=""):
                raise GalleryError(f"list {known.id} is here already under the same name, with other settings")
            if not known:
                self.put_list(watch_list)
        count = 0
        for fields, blobs in frames:
            self._restore_identity(fields, iter(blobs))
            count += 1
        return count

    def finish(self, who: str) -> None:
        """Note who made the change and when, and destroy the keys of what was removed."""
        records = self._records
        if records.database.total_changes == self._before:
            return
        if self._shredded:
            records.renew_keys()
        records.put_secret("changed", [datetime.now(UTC).isoformat(), who])
        records.put_meta("version", int(records.meta("version")) + 1)

    @property
    def _records(self) -> _Records:
        if self.over:
            raise GalleryError("this change is over; a new one is begun by Gallery.change")
        return self._all

    def _insert_identity(self, identity: Identity) -> None:
        if self._records.rows("SELECT 1 FROM identity WHERE id = ?", identity.id).fetchone():
            raise GalleryError(f"identity {identity.id} is here already")
        vault = self._records.make_key(identity.id)
        body = json.dumps(_identity_fields(identity)).encode()
        sealed = _seal(vault, body, f"identity {identity.id}")
        self._records.rows("INSERT INTO identity VALUES (?, ?)", identity.id, sealed)

    def _insert_photo(self, photo: Photo) -> None:
        self._require("identity", photo.identity)
        packed = _pack(_photo_fields(photo), photo.image)
        sealed = _seal(self._records.vault_of(photo.identity), packed, f"photo {photo.id}")
        self._records.rows("INSERT INTO photo VALUES (?, ?, ?)", photo.id, photo.identity, sealed)

    def _restore_identity(self, fields: dict[str, Any], blobs: Iterator[bytes]) -> None:
        identity = fields["id"]
        self._insert_identity(_identity(identity, fields))
        for name in fields["lists"]:
            self.join(identity, name)
        for each in fields["photos"]:
            self._insert_photo(_photo(each["id"], identity, each, next(blobs)))
            for embedder in each["embedders"]:
                self.add_template(each["id"], embedder, np.frombuffer(next(blobs), np.float32))

    def _require(self, kind: str, record: str) -> None:
        if not self._records.rows(f"SELECT 1 FROM {kind} WHERE id = ?", record).fetchone():
            raise GalleryError(f"no {kind} {record}")

    def _list_id(self, name: str) -> str | None:
        return next((each.id for each in self._records.lists() if each.name == name), None)

    def _known_list(self, name: str) -> str:
        list_id = self._list_id(name)
        if list_id is None:
            raise GalleryError("there is no list of that name")
        return list_id

    def _shred(self, record: str) -> None:
        self._records.rows("UPDATE key SET sealed = zeroblob(length(sealed)) WHERE record = ?", record)
        self._records.rows("DELETE FROM key WHERE record = ?", record)
        self._shredded = True


class Snapshot:
    """What the templates of one embedder find. It does not change; a newer one takes its place."""

    def __init__(
        self,
        templates: np.ndarray,
        photos: Sequence[str],
        identities: Sequence[str],
        *,
        lists: Sequence[WatchList] = (),
        members: Mapping[str, frozenset[str]] | None = None,
        version: int = 0,
        template_ids: Sequence[int] = (),
    ) -> None:
        """Take the unit `templates`, (n, d) float32, and the ids of each one's photo and identity.

        The templates of an identity lie side by side. `members` gives the ids of an identity's lists.
        """
        self.templates = templates
        self.templates.setflags(write=False)
        self.template_ids = tuple(template_ids)
        """By which the next snapshot knows these templates again."""
        self.lists = tuple(lists)
        """Those in force, the highest priority first."""
        self.version = version
        """The gallery's."""
        self._photos = tuple(photos)
        self._members = members or {}
        changes = [row for row in range(len(identities)) if row == 0 or identities[row] != identities[row - 1]]
        self.identities = tuple(identities[row] for row in changes)
        """Ids, each once."""
        self._places = {identity: place for place, identity in enumerate(self.identities)}
        self._first = [*changes, len(identities)]  # of identity i: rows _first[i] to _first[i + 1]
        self._owner = np.repeat(np.arange(len(changes)), np.diff(self._first))  # (n,)
        self._short_list = _make_short_list(templates)

    def __len__(self) -> int:
        return len(self.templates)

    @property
    def expires_at(self) -> datetime | None:
        """When the next list expires, and a new snapshot is due though the gallery's version stays."""
        return min((each.expires_at for each in self.lists if each.expires_at), default=None)

    def lists_of(self, identity: str) -> tuple[WatchList, ...]:
        """Return the lists in force that an identity is on, the highest priority first."""
        return tuple(each for each in self.lists if each.id in self._members.get(identity, ()))

    def at(self, now: datetime) -> Snapshot:
        """Return this snapshot with the lists alone that are in force at `now`: itself where none has expired."""
        if self.expires_at is None or self.expires_at > now:
            return self
        later = copy.copy(self)
        later.lists = tuple(each for each in self.lists if each.expires_at is None or each.expires_at > now)
        return later

    def photos_on(self, watch_list: str) -> int:
        """Return how many templates the identities on a list have, by its id: so many may be taken for a stranger."""
        return sum(
            len(self._rows_of(identity))
            for identity in self.identities
            if watch_list in self._members.get(identity, ())
        )

    def photos_of(self, identity: str) -> tuple[str, ...]:
        """Return the ids of the photos of an identity that templates are there of; none for an unknown one."""
        return tuple(self._photos[row] for row in self._rows_of(identity))

    def similarity(self, embedding: np.ndarray, identity: str) -> float:
        """Return the cosine of a unit embedding (d,) and that of the identity's templates that is most like it.

        As `search` has it, to the last digit. Raises GalleryError for an identity without templates here.
        """
        rows = self._rows_of(identity)
        if not rows:
            raise GalleryError(f"no templates of {identity}")
        return max(each.similarity for each in self._candidates(embedding, rows))

    def _rows_of(self, identity: str) -> range:
        place = self._places.get(identity)
        return range(0) if place is None else range(self._first[place], self._first[place + 1])

    def search(self, embeddings: np.ndarray, top: int = 5) -> list[list[Candidate]]:
        """Return for each of the unit `embeddings` (n, d) the `top` identities most like it, the most alike first.

        Each stands there once, with the photo that is most like the probe. Similarities do not depend on what else is
        searched. Exact up to EXACT_UP_TO templates; beyond, of the SHORT_LIST templates that an index finds.
        Raises GalleryError for embeddings of another length.
        """
        probes = np.atleast_2d(np.asarray(embeddings, np.float32))
        if not len(self):
            return [[] for _ in probes]
        if probes.shape[1] != self.templates.shape[1]:
            raise GalleryError(f"embeddings are {probes.shape[1]} long, the templates {self.templates.shape[1]}")
        if self._short_list:
            chosen = self._short_list.search(probes)
            return [self._listed(probe, rows, top) for probe, rows in zip(probes, chosen, strict=True)]
        found: list[list[Candidate]] = []
        for start in range(0, len(probes), _PROBES_AT_ONCE):
            some = probes[start : start + _PROBES_AT_ONCE]
            found += [self._exact(probe, row, top) for probe, row in zip(some, some @ self.templates.T, strict=True)]
        return found

    def _exact(self, probe: np.ndarray, similarities: np.ndarray, top: int) -> list[Candidate]:
        """Take the best row, and the rows of its identity away, `top` times."""
        best = []
        for _ in range(min(top, len(self.identities))):
            row = int(similarities.argmax())
            best.append(row)
            owner = self._owner[row]
            similarities[self._first[owner] : self._first[owner + 1]] = -np.inf
        return self._candidates(probe, best)

    def _listed(self, probe: np.ndarray, rows: np.ndarray, top: int) -> list[Candidate]:
        """Take the best row of each of `top` identities among some rows."""
        best: dict[int, int] = {}
        similarities = self.templates[rows] @ probe
        for row in rows[np.argsort(-similarities, kind="stable")].tolist():
            best.setdefault(self._owner.item(row), row)
            if len(best) == top:
                break
        return self._candidates(probe, list(best.values()))

    def _candidates(self, probe: np.ndarray, rows: Sequence[int]) -> list[Candidate]:
        # not by a matrix product, whose last digits depend on what else is in it
        similarities = np.clip(np.sum(self.templates[list(rows)] * probe.astype(np.float64), axis=1), -1, 1)
        found = [
            Candidate(self.identities[self._owner[row]], self._photos[row], float(similarity))
            for row, similarity in zip(rows, similarities, strict=True)
        ]
        return sorted(found, key=lambda each: -each.similarity)


class _Records:
    """The rows of the file, sealed and opened. Works within its callers' transactions."""

    def __init__(self, database: sqlite3.Connection, vault: Sealing, gallery_id: str) -> None:
        self.database = database
        self.vault = vault
        self.id = gallery_id

    def rows(self, query: str, *values: object) -> sqlite3.Cursor:
        return self.database.execute(query, values)

    def ids(self, kind: str) -> list[str]:
        """Return the ids of a table's rows, in the order in which they were added."""
        return [each for (each,) in self.rows(f"SELECT id FROM {kind} ORDER BY rowid").fetchall()]

    def meta(self, name: str) -> Any:
        return _meta(self.database, name)

    def put_meta(self, name: str, value: object) -> None:
        self.rows("INSERT OR REPLACE INTO meta VALUES (?, ?)", name, value)

    def secret(self, name: str) -> Any:
        """Return what `put_secret` kept, or None."""
        sealed = self.meta(name)
        return None if sealed is None else json.loads(_open(self.vault, sealed, f"{name} {self.id}"))

    def put_secret(self, name: str, value: object) -> None:
        self.put_meta(name, _seal(self.vault, json.dumps(value).encode(), f"{name} {self.id}"))

    def make_key(self, record: str) -> Sealing:
        """Give a record a data key, and return what it seals with."""
        vault, sealed = self.vault.make_inner(self._about_key(record))
        self.rows("INSERT INTO key VALUES (?, ?)", record, sealed)
        return vault

    def vault_of(self, record: str) -> Sealing:
        """Return what a record is sealed with."""
        row = self.rows("SELECT sealed FROM key WHERE record = ?", record).fetchone()
        if row is None:
            raise GalleryError(f"record {record} has no key")
        try:
            return self.vault.open_inner(row[0], self._about_key(record))
        except ValueError as exc:
            raise GalleryError(f"the key of record {record}: {exc}") from exc

    def renew_keys(self) -> None:
        """Move the keys to a new table, so that the pages of the old one are overwritten as a whole.

        secure_delete overwrites what is deleted, but not the copies that a page keeps when SQLite balances its tree.
        """
        self.rows(_KEYS.format("key_new"))
        self.rows("INSERT INTO key_new SELECT record, sealed FROM key")
        self.rows("DROP TABLE key")
        self.rows("ALTER TABLE key_new RENAME TO key")

    def identity(self, identity: str) -> Identity:
        fields = json.loads(self._body("identity", identity, identity))
        lists = self.members(identity).get(identity, frozenset())
        photos = self.rows("SELECT id FROM photo WHERE identity = ? ORDER BY rowid", identity).fetchall()
        return _identity(
            identity, fields, lists=sorted(self.list_(each).name for each in lists), photos=[each for (each,) in photos]
        )

    def owner(self, photo: str) -> str:
        """Return the identity of a photo."""
        row = self.rows("SELECT identity FROM photo WHERE id = ?", photo).fetchone()
        if row is None:
            raise GalleryError(f"no photo {photo}")
        return str(row[0])

    def photo(self, photo: str) -> Photo:
        identity = self.owner(photo)
        fields, (image,) = _unpack(self._body("photo", photo, identity))
        vault = self.vault_of(identity)
        templates = {
            embedder: _template(vault, sealed, photo, embedder)
            for embedder, sealed in self.rows("SELECT embedder, body FROM template WHERE photo = ?", photo).fetchall()
        }
        return _photo(photo, identity, fields, image, templates)

    def lists(self) -> list[WatchList]:
        return sorted(map(self.list_, self.ids("list")), key=lambda each: -each.priority)

    def list_(self, list_id: str) -> WatchList:
        return _watch_list({**json.loads(self._body("list", list_id, list_id)), "id": list_id})

    def members(self, identity: str | None = None) -> dict[str, frozenset[str]]:
        """Return the ids of the lists that each identity, or one, is on."""
        members: dict[str, frozenset[str]] = {}
        for each, lists in self.rows(
            "SELECT identity, group_concat(list) FROM member WHERE ?1 IS NULL OR identity = ?1 GROUP BY identity",
            identity,
        ).fetchall():
            members[each] = frozenset(lists.split(","))
        return members

    def template_rows(self, embedder: str) -> list[tuple[int, str, str]]:
        """Return an embedder's templates as (template, photo, identity), those of an identity side by side."""
        return self.rows(
            "SELECT template.id, photo.id, photo.identity FROM template JOIN photo ON photo.id = template.photo"
            " WHERE embedder = ? ORDER BY photo.identity, template.id",
            embedder,
        ).fetchall()

    def templates(self, embedder: str, rows: Sequence[tuple[int, str, str]], earlier: Snapshot | None) -> np.ndarray:
        """Return the templates of `rows`, (n, d) float32, those that `earlier` holds from there."""
        known = {} if earlier is None else dict(zip(earlier.template_ids, earlier.templates, strict=True))
        templates = np.empty((0, 0), np.float32)
        owner, vault = "", self.vault
        for row, (template, photo, identity) in enumerate(rows):
            vector = known.get(template)
            if vector is None:
                if identity != owner:
                    owner, vault = identity, self.vault_of(identity)
                (sealed,) = self.rows("SELECT body FROM template WHERE id = ?", template).fetchone()
                vector = _template(vault, sealed, photo, embedder)
            if row == 0:
                templates = np.empty((len(rows), len(vector)), np.float32)
            templates[row] = vector
        return templates

    def findings(self) -> Iterator[str]:
        """Yield what is wrong, a line each, by id."""
        try:
            yield from (f"SQLite: {found}" for (found,) in self.rows("PRAGMA integrity_check") if found != "ok")
            for table, _, of, _ in self.rows("PRAGMA foreign_key_check"):
                yield f"SQLite: a {table} without its {of}"
            keys = {record for (record,) in self.rows("SELECT record FROM key")}
            yield from (f"key {each} has no record" for each in keys.difference(self.ids("identity"), self.ids("list")))
            checks = {"identity": self.identity, "photo": self._check_photo, "list": self.list_}
            for kind, check in checks.items():
                for each in self.ids(kind):
                    try:
                        check(each)
                    except GalleryError as exc:
                        yield f"{kind} {each}: {exc}"
        except sqlite3.DatabaseError as exc:
            yield f"SQLite: {exc}"

    def _check_photo(self, photo: str) -> None:
        found = self.photo(photo)
        if hashlib.sha256(found.image).hexdigest() != found.sha256:
            raise GalleryError("the image is not the one that was enrolled")
        for embedder, template in found.templates.items():
            if reason := _not_a_template(template):
                raise GalleryError(f"the template of embedder {embedder[:12]} {reason}")

    def _body(self, kind: str, record: str, sealed_by: str) -> bytes:
        row = self.rows(f"SELECT body FROM {kind} WHERE id = ?", record).fetchone()
        if row is None:
            raise GalleryError(f"no {kind} {record}")
        return _open(self.vault_of(sealed_by), row[0], f"{kind} {record}")

    def _about_key(self, record: str) -> bytes:
        return f"key {self.id} {record}".encode()


class _ShortList:
    """Finds the templates that are worth an exact look.

    faiss compares codes of 4 bits, each for 2 dimensions, in the processor's registers: PQ with fast scan, after a PCA
    to the dimensions that hold nearly all variance. Every template is looked at: an index that passes over some (a
    graph, inverted lists) loses those that are like the probe by chance, and these are what false alarms come from.
    """

    def __init__(self, templates: np.ndarray) -> None:
        """Take (n, d) unit templates. Raises ImportError without faiss."""
        import faiss  # only large galleries need it: the extra `large`

        sample = templates[:: max(1, len(templates) // _LEARNT_FROM)]
        pairs = min(-(-_dimensions(sample) // 2), templates.shape[1] // 2)
        self._index = faiss.index_factory(
            templates.shape[1], f"PCAR{2 * pairs},PQ{pairs}x4fs", faiss.METRIC_INNER_PRODUCT
        )
        self._index.train(sample)
        self._index.add(templates)

    def search(self, probes: np.ndarray) -> np.ndarray:
        """Return the rows that may be most like each of `probes` (n, d), as (n, SHORT_LIST)."""
        _, rows = self._index.search(probes, SHORT_LIST)
        return np.asarray(rows)


def _dimensions(templates: np.ndarray) -> int:
    """Return how many directions hold nearly all variance of (n, d) templates."""
    variances = np.linalg.eigvalsh(np.cov(templates, rowvar=False))[::-1]
    kept = int(np.searchsorted(np.cumsum(variances), _KEPT_VARIANCE * variances.sum())) + 1
    return min(kept, _MOST_DIMENSIONS)


def _make_short_list(templates: np.ndarray) -> _ShortList | None:
    """Return None where every template is compared."""
    if len(templates) <= EXACT_UP_TO:
        return None
    try:
        return _ShortList(templates)
    except ImportError:
        logger.warning("%d templates are searched slowly: pip install 'streamer[large]'", len(templates))
        return None


def _make(path: Path, vault: Sealing) -> None:
    """Make an empty gallery, whole or not at all, unless another process was faster."""
    if path.exists():
        return
    part = path.with_suffix(".part")
    part.unlink(missing_ok=True)
    os.close(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
    with closing(_connect(part)) as database:
        database.execute("PRAGMA journal_mode = MEMORY")  # nothing beside the file that its new name would leave behind
        database.execute("BEGIN")
        for statement in _TABLES.split(";\n"):
            database.execute(statement)
        database.execute(f"PRAGMA application_id = {_APPLICATION}")
        database.execute(f"PRAGMA user_version = {SCHEMA}")
        records = _Records(database, vault, _new_id())
        records.put_meta("id", records.id)
        records.put_meta("version", 0)
        records.put_secret("changed", [datetime.now(UTC).isoformat(), ""])
        database.execute("COMMIT")
    os.replace(part, path)
    opened = os.open(path.parent, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(opened)  # a power cut may not take the name, and all that is written from now on with it
    finally:
        os.close(opened)


def _connect(path: Path) -> sqlite3.Connection:
    return sqlite3.connect(
        f"{path.absolute().as_uri()}?mode=rw", uri=True, timeout=_BUSY_S, isolation_level=None, check_same_thread=False
    )


def _set_up(database: sqlite3.Connection) -> None:
    for setting in ("journal_mode = WAL", "synchronous = FULL", "secure_delete = ON", "foreign_keys = ON"):
        database.execute(f"PRAGMA {setting}")
    database.execute("PRAGMA temp_store = MEMORY")  # nothing in files that nobody overwrites


def _gallery_id(folder: Path, database: sqlite3.Connection, vault: Sealing) -> str:
    """Return the gallery's id. Raises GalleryError for what is none of ours, is too new, or has another key."""
    if database.execute("PRAGMA application_id").fetchone() != (_APPLICATION,):
        raise GalleryError(f"{folder / 'gallery.db'} is no gallery")
    (schema,) = database.execute("PRAGMA user_version").fetchone()
    if schema > SCHEMA:
        raise GalleryError(f"{folder} is of a newer streamer: schema {schema}, this one knows {SCHEMA}")
    gallery_id = str(_meta(database, "id"))
    try:
        vault.open(_meta(database, "changed"), f"changed {gallery_id}".encode())
    except ValueError as exc:
        raise GalleryError(f"{folder} was made with another key") from exc
    return gallery_id


def _meta(database: sqlite3.Connection, name: str) -> Any:
    row = database.execute("SELECT value FROM meta WHERE name = ?", (name,)).fetchone()
    return None if row is None else row[0]


def _empty_log(database: sqlite3.Connection) -> bool:
    """Move the write-ahead log into the file and cut it to nothing; return whether readers let it."""
    row: tuple[int, int, int] = database.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
    return row[0] == 0  # else: busy


@contextmanager
def _told(folder: Path) -> Iterator[None]:
    """Raise GalleryError for what SQLite says of the file."""
    try:
        yield
    except sqlite3.ProgrammingError:
        raise
    except sqlite3.OperationalError as exc:
        raise GalleryError(f"{folder}: {exc}") from exc
    except sqlite3.DatabaseError as exc:
        raise GalleryError(f"{folder} is damaged: {exc}") from exc


@contextmanager
def _write_lock(folder: Path) -> Iterator[None]:
    """Be the one writer. The kernel lets go of the lock however the process ends. Raises GalleryError."""
    try:
        opened = os.open(folder / "gallery.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as exc:
        raise GalleryError(f"{folder}: {exc.strerror}") from exc
    with open(opened, "r+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as exc:
            writer = lock.read().strip() or "another"
            raise GalleryError(f"{folder} is being changed by process {writer}; try again when it is done") from exc
        lock.truncate(0)
        lock.write(f"{os.getpid()}\n")
        lock.flush()
        yield


def _seal(vault: Sealing, plain: bytes, about: str) -> bytes:
    return vault.seal(plain, about.encode())


def _open(vault: Sealing, sealed: bytes, about: str) -> bytes:
    try:
        return vault.open(sealed, about.encode())
    except ValueError as exc:
        raise GalleryError(f"{about}: {exc}") from exc


def _template(vault: Sealing, sealed: bytes, photo: str, embedder: str) -> np.ndarray:
    return np.frombuffer(_open(vault, sealed, f"template {photo} {embedder}"), np.float32)


def _pack(fields: Mapping[str, object], *blobs: bytes) -> bytes:
    """Return fields and blobs as one: the length of a JSON text, the text, the blobs."""
    text = json.dumps({"fields": fields, "sizes": [len(blob) for blob in blobs]}).encode()
    return struct.pack("<I", len(text)) + text + b"".join(blobs)


def _unpack(packed: bytes) -> tuple[dict[str, Any], list[bytes]]:
    (size,) = struct.unpack_from("<I", packed)
    head = json.loads(packed[4 : 4 + size])
    ends = [4 + size, *itertools.accumulate(head["sizes"], initial=4 + size)][1:]
    return head["fields"], [packed[start:end] for start, end in itertools.pairwise(ends)]


def _frames(records: _Records, embedder: tuple[str, str] | None) -> Iterator[bytes]:
    """Yield what an export holds: the lists, then each identity with its photos."""
    yield _pack({"lists": [_list_fields(each) for each in records.lists()], "embedder": embedder})
    for identity in map(records.identity, records.ids("identity")):
        photos = [records.photo(photo) for photo in identity.photos]
        fields = {
            **_identity_fields(identity), "id": identity.id, "lists": identity.lists,
            "photos": [{**_photo_fields(each), "id": each.id, "embedders": list(each.templates)} for each in photos],
        }  # fmt: skip
        templates = [[template.tobytes() for template in each.templates.values()] for each in photos]
        yield _pack(fields, *(blob for each, own in zip(photos, templates, strict=True) for blob in (each.image, *own)))


def _write_frames(file: BinaryIO, vault: Sealing, salt: bytes, frames: Iterator[bytes]) -> int:
    """Write frames, each sealed for its place, and an end; return how many identities they hold."""
    number = 0
    for number, frame in enumerate(itertools.chain(frames, [_pack({"end": True})])):
        sealed = _seal(vault, frame, _about_frame(salt, number))
        file.write(struct.pack("<Q", len(sealed)) + sealed)
    return number - 1  # the first frame holds the lists


def _read_frames(
    path: Path, file: BinaryIO, vault: Sealing, salt: bytes
) -> Iterator[tuple[dict[str, Any], list[bytes]]]:
    """Yield the frames of an export up to its end. Raises GalleryError."""
    whole = path.stat().st_size
    for number in itertools.count():
        size = int.from_bytes(file.read(8), "little")
        if not 0 < size <= whole - file.tell():
            raise GalleryError(f"{path} is cut off")
        try:
            fields, blobs = _unpack(vault.open(file.read(size), _about_frame(salt, number).encode()))
        except ValueError as exc:
            wrong = "was changed" if number else "does not open with this key or passphrase"
            raise GalleryError(f"{path} {wrong}") from exc
        if "end" in fields:
            break
        yield fields, blobs
    if file.read(1):
        raise GalleryError(f"{path} goes on after its end")


def _about_frame(salt: bytes, number: int) -> str:
    return f"export {salt.hex()} {number}"


def _identity(
    identity: str, fields: Mapping[str, Any], lists: Sequence[str] = (), photos: Sequence[str] = ()
) -> Identity:
    added_at = datetime.fromisoformat(fields["added_at"])
    return Identity(identity, fields["name"], tuple(lists), tuple(photos), added_at, fields["notes"])


def _identity_fields(identity: Identity) -> dict[str, Any]:
    return {"name": identity.name, "notes": identity.notes, "added_at": identity.added_at.isoformat()}


def _photo(
    photo: str,
    identity: str,
    fields: Mapping[str, Any],
    image: bytes,
    templates: Mapping[str, np.ndarray] = MappingProxyType({}),
) -> Photo:
    return Photo(
        photo, identity, fields["sha256"], image, np.array(fields["landmarks"], np.float32), fields["quality"],
        tuple(fields["forced"]), templates, datetime.fromisoformat(fields["added_at"]),
    )  # fmt: skip


def _photo_fields(photo: Photo) -> dict[str, Any]:
    return {
        "sha256": photo.sha256, "landmarks": photo.landmarks.tolist(), "quality": dict(photo.quality),
        "forced": photo.forced, "added_at": photo.added_at.isoformat(),
    }  # fmt: skip


def _watch_list(fields: Mapping[str, Any]) -> WatchList:
    ends = fields["expires_at"]
    return WatchList(**{**fields, "expires_at": datetime.fromisoformat(ends) if ends else None})


def _list_fields(watch_list: WatchList) -> dict[str, Any]:
    ends = watch_list.expires_at
    return {**asdict(watch_list), "expires_at": ends.isoformat() if ends else None}


def _check_list(watch_list: WatchList) -> None:
    for text, what in (
        (watch_list.name, "a list's name"), (watch_list.purpose, "a list's purpose"),
        (watch_list.legal_basis, "a list's legal basis"),
    ):  # fmt: skip
        _one_line(text, what)
    if not -1 <= watch_list.threshold <= 1:
        raise GalleryError("a list's threshold is a cosine: -1 to 1")
    if watch_list.expires_at and watch_list.expires_at.tzinfo is None:
        raise GalleryError("the time at which a list expires has a time zone")


def _one_line(text: str, what: str) -> str:
    if not text.strip() or len(text) > _MOST_TEXT or not text.isprintable():
        raise GalleryError(f"{what} is one line of 1 to {_MOST_TEXT} characters")
    return text.strip()


def _not_a_template(template: np.ndarray) -> str:
    """Return why an array is no unit vector, or nothing."""
    if template.ndim != 1:
        return "is no vector"
    length = float(np.linalg.norm(template))
    return "" if abs(length - 1) <= _UNIT_TOLERANCE else f"is {length:.3f} long, not 1"


def _new_id() -> str:
    return secrets.token_hex(8)
