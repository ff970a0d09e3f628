"""AuditLog: what was enrolled, removed, changed, matched and judged, in lines that hang together by their hashes."""

from __future__ import annotations

import base64
import fcntl
import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO

from streamer.vault import Vault, VaultError

Detail = bool | int | float | str
Details = Mapping[str, Detail | Sequence[Detail]]

FIRST = "0" * 64
"""What the first entry names as the hash of the one before it."""
REPAIRED = "audit.repaired"
"""What an entry says that was written after a torn line was cut off."""

_WHAT = re.compile(r"[a-z][a-z0-9._-]{0,63}")
_SUBJECT = re.compile(r"[0-9a-f]{16,64}")
_TOKEN = re.compile(r"[A-Za-z0-9_.:+/-]{0,64}")
_MOST_WHO = 128


class AuditError(ValueError):
    """The log cannot be read or written, or an entry does not belong in it. The message is one line."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One thing that happened."""

    seq: int
    """From 0, without gaps."""
    at: datetime
    """UTC."""
    who: str
    """The operator, or "streamer" for what the app does by itself."""
    what: str
    """Such as identity.enrolled, identity.removed, list.changed, match, verdict."""
    subjects: tuple[str, ...]
    """Ids of identities, photos, lists and events: hex digits. Never a name: what the log says stays for ever."""
    details: Details
    """Figures and short words without spaces."""
    previous: str
    """The sha256 of the line before with its end, in hex; FIRST before the first."""

    def line(self) -> bytes:
        """Return the entry as it is written."""
        fields = {
            "seq": self.seq, "at": _rfc3339(self.at), "who": self.who, "what": self.what,
            "subjects": list(self.subjects), "details": dict(self.details), "previous": self.previous,
        }  # fmt: skip
        return json.dumps(fields, separators=(",", ":"), ensure_ascii=False).encode() + b"\n"

    @classmethod
    def parse(cls, line: bytes) -> Entry:
        """Return what a line says. Raises ValueError."""
        try:
            fields = json.loads(line)
            at = datetime.strptime(fields["at"], "%Y-%m-%dT%H:%M:%S.%fZ").replace(tzinfo=UTC)
            return cls(
                fields["seq"], at, fields["who"], fields["what"], tuple(fields["subjects"]), fields["details"],
                fields["previous"],
            )  # fmt: skip
        except (KeyError, TypeError) as exc:
            raise ValueError("no entry") from exc


class AuditLog:
    """An append-only log of JSON lines, each with the sha256 of the one before, and an anchor beside it.

    Whoever can write both files can write both anew, unless the anchor is sealed by a vault: then he can only put an
    older log with its own anchor in their place. Several processes may append.
    """

    def __init__(
        self, path: Path, vault: Vault | None = None, clock: Callable[[], datetime] = lambda: datetime.now(UTC)
    ) -> None:
        """Write to `path` and `path`.anchor; neither needs to be there yet. With a vault, always give one."""
        self.path = path
        self._anchor_path = path.with_name(f"{path.name}.anchor")
        self._vault = vault
        self._clock = clock

    def append(
        self,
        who: str,
        what: str,
        subjects: Sequence[str] = (),
        details: Details | None = None,
    ) -> Entry:
        """Write an entry; it is on the disk when this returns. A line that a power cut tore is cut off, and that told.

        Raises AuditError for an entry that does not belong in a log, and where the log does not end as its anchor
        knows: nothing is written then, as a new end would hide what happened.
        """
        details = details or {}
        _check(who, what, subjects, details)
        with _told(self.path), self._locked() as file:
            end, torn = self._end(file)
            if torn:
                file.truncate(end.size)
                what_torn: Details = {"bytes": len(torn), "sha256": hashlib.sha256(torn).hexdigest()}
                end, _ = self._write(file, end, "streamer", REPAIRED, (), what_torn)
            _, entry = self._write(file, end, who, what, subjects, details)
        return entry

    def entries(self, since: datetime | None = None, until: datetime | None = None) -> Iterator[Entry]:
        """Yield the entries with `since` <= at < `until`, in order. Raises AuditError for a line that is none."""
        return (entry for _, entry in self._read(since, until))

    def export(self, path: Path, since: datetime | None = None, until: datetime | None = None) -> int:
        """Copy the lines with `since` <= at < `until` as they are to a new file; return how many. Raises AuditError."""
        lines = [line for line, _ in self._read(since, until)]
        with _told(path), open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "wb") as file:
            file.writelines(lines)
            file.flush()
            os.fsync(file.fileno())
        return len(lines)

    def verify(self) -> list[str]:
        """Return what is wrong, a line each; nothing where every entry is what it was and none is missing.

        Raises AuditError where there is no log.
        """
        findings: list[str] = []
        end = reached = _End()
        due = 0
        with _told(self.path), self.path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH)
            anchor = self._anchor(findings)
            for line in file:
                if not line.endswith(b"\n"):
                    findings.append(f"the last line broke off after {len(line)} bytes, as in a power cut")
                    break
                wrong, due = _judge(line, due, end.hash)
                if wrong:
                    findings.append(f"line {end.count + 1} {wrong}")
                end = end.after(line)
                if anchor is not None and end.count == anchor.count:
                    reached = end
        if anchor is not None and end.count < anchor.count:
            findings.append(f"it holds {end.count} entries of {anchor.count}: its end was cut off, or a line removed")
        elif anchor is not None and reached != anchor:
            findings.append(f"line {anchor.count} is not the one that was written")
        elif anchor is not None and end.count > anchor.count + 1:  # one may be: the process died before its anchor
            findings.append(f"its anchor does not know the last {end.count - anchor.count} lines")
        return findings

    def _read(self, since: datetime | None, until: datetime | None) -> Iterator[tuple[bytes, Entry]]:
        with _told(self.path), self.path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if not line.endswith(b"\n"):
                    return  # torn
                try:
                    entry = Entry.parse(line)
                except ValueError as exc:
                    raise AuditError(f"{self.path}: line {number} is no entry") from exc
                if (since is None or entry.at >= since) and (until is None or entry.at < until):
                    yield line, entry

    @contextmanager
    def _locked(self) -> Iterator[BinaryIO]:
        with open(os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600), "r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield file

    def _end(self, file: BinaryIO) -> tuple[_End, bytes]:
        """Return where the log ends, and what of a torn line lies behind. Raises AuditError where they do not fit."""
        wrong: list[str] = []
        anchor = self._anchor(wrong)
        size = file.seek(0, os.SEEK_END)
        if anchor is None or size < anchor.size:
            raise AuditError(f"{self.path}: {(wrong or ['its end was cut off'])[0]}; keep it, and begin a new log")
        file.seek(anchor.size)
        line, rest = file.readline(), file.read()  # at most one entry was written and not anchored
        if not line.endswith(b"\n"):
            return anchor, line
        if _judge(line, anchor.count, anchor.hash)[0] or b"\n" in rest:
            raise AuditError(f"{self.path}: its end does not follow from its anchor; keep it, and begin a new log")
        return self._write_anchor(anchor.after(line)), rest

    def _write(
        self,
        file: BinaryIO,
        end: _End,
        who: str,
        what: str,
        subjects: Sequence[str],
        details: Details,
    ) -> tuple[_End, Entry]:
        entry = Entry(end.count, self._clock(), who, what, tuple(subjects), details, end.hash)
        line = entry.line()
        file.write(line)
        file.flush()
        os.fsync(file.fileno())
        return self._write_anchor(end.after(line)), entry

    def _anchor(self, findings: list[str]) -> _End | None:
        """Return where the log ended when it was last written; None, with a finding, where nobody can tell."""
        try:
            fields = json.loads(self._anchor_path.read_bytes())
            anchor = _End(int(fields["count"]), str(fields["hash"]), int(fields["size"]))
            if self._vault is not None:
                self._vault.open(base64.b64decode(fields["seal"] or ""), anchor.about)
        except FileNotFoundError:
            if not self.path.exists() or not self.path.stat().st_size:
                return _End()
            findings.append("its anchor is missing, so nobody can tell whether its end was cut off")
        except VaultError:
            findings.append("its anchor was changed, or is sealed with another key")
        except (ValueError, KeyError, TypeError):
            findings.append("its anchor is damaged")
        else:
            return anchor
        return None

    def _write_anchor(self, end: _End) -> _End:
        seal = base64.b64encode(self._vault.seal(b"", end.about)).decode() if self._vault else None
        part = self._anchor_path.with_suffix(".part")
        with open(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600), "w") as file:
            json.dump({"count": end.count, "hash": end.hash, "size": end.size, "seal": seal}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, self._anchor_path)
        folder = os.open(self.path.parent, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(folder)  # the next line may not reach the disk before this anchor
        finally:
            os.close(folder)
        return end


@dataclass(frozen=True, slots=True)
class _End:
    """The end of a log, or of its first entries."""

    count: int = 0
    """Entries."""
    hash: str = FIRST
    """Of the last one's line."""
    size: int = 0
    """Bytes."""

    @property
    def about(self) -> bytes:
        return f"audit {self.count} {self.hash} {self.size}".encode()

    def after(self, line: bytes) -> _End:
        """Return the end with one line more."""
        return _End(self.count + 1, hashlib.sha256(line).hexdigest(), self.size + len(line))


def _judge(line: bytes, due: int, previous: str) -> tuple[str, int]:
    """Return why a line does not come next, or nothing, and the number of the entry that is due after it."""
    try:
        entry = Entry.parse(line)
    except ValueError:
        return "is no entry", due + 1
    if entry.seq != due:
        return f"holds entry {entry.seq}, not {due}: lines were removed or moved", entry.seq + 1
    wrong = "" if entry.previous == previous else "does not follow from the one before, which was changed"
    return wrong, due + 1


def _check(who: str, what: str, subjects: Sequence[str], details: Details) -> None:
    """Raise AuditError for what could hold a name, or would not be read again as it was written."""
    if not who or len(who) > _MOST_WHO or not who.isprintable():
        raise AuditError(f"who did it is one line of 1 to {_MOST_WHO} characters")
    if not _WHAT.fullmatch(what):
        raise AuditError(f"what happened is a word such as identity.removed, not {what!r}")
    if not all(_SUBJECT.fullmatch(each) for each in subjects):
        raise AuditError("subjects are ids, 16 to 64 hex digits: an entry stays for ever, and names must not")
    for name, detail in details.items():
        values = [detail] if isinstance(detail, Detail) else detail
        if not all(_TOKEN.fullmatch(each) if isinstance(each, str) else math.isfinite(each) for each in values):
            raise AuditError(f"{name} is neither a number nor a word of up to 64 letters, digits and _.:+/-")


def _rfc3339(at: datetime) -> str:
    return at.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


@contextmanager
def _told(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as exc:
        raise AuditError(f"{exc.filename or path}: {exc.strerror}") from exc
