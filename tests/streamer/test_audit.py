"""The audit log, in real files that somebody tampers with."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from streamer.audit import REPAIRED, AuditError, AuditLog, Entry
from streamer.vault import Vault

NOON = datetime(2026, 11, 22, 12, tzinfo=UTC)
SUBJECTS = ["0123456789abcdef"]
ROOT = Path(__file__).parents[2]


class Clock:
    """An hour later at every look."""

    def __init__(self) -> None:
        self.now = NOON - timedelta(hours=1)

    def __call__(self) -> datetime:
        self.now += timedelta(hours=1)
        return self.now


@pytest.fixture
def log(tmp_path) -> AuditLog:
    return AuditLog(tmp_path / "audit.jsonl", Vault(bytes(32)), Clock())


@pytest.fixture
def ten(log) -> AuditLog:
    """Ten entries, an hour apart from noon."""
    for number in range(10):
        log.append("ada", "identity.enrolled", SUBJECTS, {"photos": number})
    return log


def lines_of(log: AuditLog) -> list[bytes]:
    return log.path.read_bytes().splitlines(keepends=True)


def rewrite(log: AuditLog, lines: list[bytes]) -> None:
    log.path.write_bytes(b"".join(lines))


def test_an_entry_says_when_who_what_and_about_whom(log):
    log.append("ada", "match", SUBJECTS, {"similarity": 0.61, "camera": "door-1", "forced": ["sharpness", "pose"]})

    assert json.loads(lines_of(log)[0]) == {
        "seq": 0, "at": "2026-11-22T12:00:00.000Z", "who": "ada", "what": "match", "subjects": SUBJECTS,
        "details": {"similarity": 0.61, "camera": "door-1", "forced": ["sharpness", "pose"]}, "previous": "0" * 64,
    }  # fmt: skip


def test_what_is_read_is_what_was_appended(log):
    written = [log.append("ada", f"verdict.{word}", SUBJECTS, {"event": "f" * 32}) for word in ("right", "wrong")]

    assert list(log.entries()) == written


def test_a_log_that_nobody_touched_verifies(ten):
    assert ten.verify() == []


def test_a_changed_line_is_found(ten):
    lines = lines_of(ten)
    lines[4] = lines[4].replace(b"ada", b"eve")
    rewrite(ten, lines)

    assert ten.verify() == ["line 6 does not follow from the one before, which was changed"]


def test_a_changed_last_line_is_found(ten):
    lines = lines_of(ten)
    lines[9] = lines[9].replace(b"ada", b"eve")
    rewrite(ten, lines)

    assert ten.verify() == ["line 10 is not the one that was written"]


def test_a_removed_line_is_found(ten):
    lines = lines_of(ten)
    rewrite(ten, lines[:4] + lines[5:])

    assert ten.verify()[0] == "line 5 holds entry 5, not 4: lines were removed or moved"


def test_lines_that_changed_places_are_found(ten):
    lines = lines_of(ten)
    lines[2], lines[3] = lines[3], lines[2]
    rewrite(ten, lines)

    assert ten.verify()[0] == "line 3 holds entry 3, not 2: lines were removed or moved"


def test_a_line_that_was_put_in_is_found(ten):
    lines = lines_of(ten)
    rewrite(ten, [*lines[:5], b"enrolled nobody\n", *lines[5:]])

    assert ten.verify()[0] == "line 6 is no entry"


@pytest.mark.parametrize("kept", [0, 1, 9])
def test_an_end_that_was_cut_off_is_found(ten, kept):
    rewrite(ten, lines_of(ten)[:kept])

    assert ten.verify() == [f"it holds {kept} entries of 10: its end was cut off, or a line removed"]


def test_every_changed_bit_is_found(ten):
    whole = ten.path.read_bytes()

    for place in random.Random(0).sample(range(len(whole)), 200):
        ten.path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        assert ten.verify(), f"byte {place}"


def test_a_log_rewritten_from_its_first_line_on_is_found_by_who_has_the_key(ten):
    forger = AuditLog(ten.path.with_name("forged.jsonl"), clock=Clock())
    for _ in range(10):
        forger.append("eve", "identity.enrolled", SUBJECTS)
    for suffix in ("", ".anchor"):
        os.replace(f"{forger.path}{suffix}", f"{ten.path}{suffix}")

    assert AuditLog(ten.path).verify() == []
    assert ten.verify() == ["its anchor was changed, or is sealed with another key"]


def test_a_missing_anchor_is_a_finding(ten):
    ten.path.with_name("audit.jsonl.anchor").unlink()

    assert ten.verify() == ["its anchor is missing, so nobody can tell whether its end was cut off"]


def test_nothing_is_appended_where_the_end_was_cut_off(ten):
    rewrite(ten, lines_of(ten)[:7])

    with pytest.raises(AuditError, match="its end was cut off"):
        ten.append("eve", "identity.removed", SUBJECTS)

    assert len(lines_of(ten)) == 7


def test_nothing_is_appended_where_the_anchor_is_missing(ten):
    ten.path.with_name("audit.jsonl.anchor").unlink()

    with pytest.raises(AuditError, match="its anchor is missing"):
        ten.append("eve", "identity.removed", SUBJECTS)


@pytest.mark.parametrize("torn", [b"{", b'{"seq":10,"at":"2026-11-22T2', bytes(300)])
def test_a_line_torn_by_a_power_cut_is_told_apart_and_repaired_by_an_entry_that_says_so(ten, torn):
    with ten.path.open("ab") as file:
        file.write(torn)

    assert ten.verify() == [f"the last line broke off after {len(torn)} bytes, as in a power cut"]

    ten.append("ada", "identity.removed", SUBJECTS)

    assert ten.verify() == []
    assert [entry.what for entry in ten.entries()][-2:] == [REPAIRED, "identity.removed"]
    assert list(ten.entries())[-2].details["bytes"] == len(torn)


def test_an_entry_whose_anchor_was_not_written_yet_is_kept(ten):
    anchor = ten.path.with_name("audit.jsonl.anchor")
    before = anchor.read_bytes()
    ten.append("ada", "match", SUBJECTS)
    anchor.write_bytes(before)

    assert ten.verify() == []
    ten.append("ada", "verdict", SUBJECTS)
    assert ten.verify() == []
    assert [entry.what for entry in ten.entries()][-2:] == ["match", "verdict"]


def test_lines_behind_the_anchor_are_found(ten):
    anchor = ten.path.with_name("audit.jsonl.anchor")
    before = anchor.read_bytes()
    for _ in range(2):
        ten.append("ada", "match", SUBJECTS)
    anchor.write_bytes(before)

    assert ten.verify() == ["its anchor does not know the last 2 lines"]
    with pytest.raises(AuditError, match="does not follow from its anchor"):
        ten.append("ada", "match", SUBJECTS)


@pytest.mark.parametrize(
    ("who", "what", "subjects", "details"),
    [
        ("ada", "identity.enrolled", ["Ada Lovelace"], {}),
        ("ada", "identity.enrolled", ["Ada"], {}),
        ("ada", "Enrolled Ada Lovelace", SUBJECTS, {}),
        ("ada", "identity.enrolled", SUBJECTS, {"name": "Ada Lovelace"}),
        ("ada", "identity.enrolled", SUBJECTS, {"names": ["Ada Lovelace"]}),
        ("ada", "match", SUBJECTS, {"similarity": float("nan")}),
        ("", "match", SUBJECTS, {}),
        ("ada\n{}", "match", SUBJECTS, {}),
    ],
)
def test_what_could_be_a_name_or_break_a_line_stays_out(log, who, what, subjects, details):
    with pytest.raises(AuditError):
        log.append(who, what, subjects, details)

    assert not log.path.exists()


def test_an_export_holds_the_lines_of_its_time_as_they_are(ten, tmp_path):
    count = ten.export(tmp_path / "part.jsonl", NOON + timedelta(hours=2), NOON + timedelta(hours=5))

    assert count == 3
    assert (tmp_path / "part.jsonl").read_bytes() == b"".join(lines_of(ten)[2:5])


def test_an_export_overwrites_nothing(ten, tmp_path):
    (tmp_path / "part.jsonl").write_text("mine")

    with pytest.raises(AuditError, match="exists"):
        ten.export(tmp_path / "part.jsonl")

    assert (tmp_path / "part.jsonl").read_text() == "mine"


def test_a_missing_log_is_no_good_log(tmp_path):
    with pytest.raises(AuditError, match=r"none\.jsonl"):
        AuditLog(tmp_path / "none.jsonl").verify()


def test_two_processes_append_to_one_log(tmp_path):
    with appending(tmp_path / "audit.jsonl", 20) as one, appending(tmp_path / "audit.jsonl", 20) as other:
        assert [one.wait(), other.wait()] == [0, 0]

    assert [entry.seq for entry in AuditLog(tmp_path / "audit.jsonl").entries()] == list(range(40))
    assert AuditLog(tmp_path / "audit.jsonl").verify() == []


def test_a_killed_writer_leaves_a_log_that_verifies_and_goes_on(tmp_path):
    path = tmp_path / "audit.jsonl"
    for number in range(4):
        before = len(lines_of(AuditLog(path))) if path.exists() else 0
        with appending(path, 10_000) as writer:
            for _ in range(3 + number):
                writer.stdout.readline()
            writer.send_signal(signal.SIGKILL)

        AuditLog(path).append("ada", "match", SUBJECTS)

        assert AuditLog(path).verify() == []
        assert len(list(AuditLog(path).entries())) > before + 3 + number


APPENDING = """
import sys
from pathlib import Path
from streamer.audit import AuditLog

for number in range(int(sys.argv[2])):
    AuditLog(Path(sys.argv[1])).append("ada", "match", ["0123456789abcdef"], {"number": number})
    print(number, flush=True)
"""


def appending(path: Path, count: int) -> subprocess.Popen[bytes]:
    """Start a process that appends entries and prints the number of each."""
    return subprocess.Popen([sys.executable, "-c", APPENDING, path, str(count)], cwd=ROOT, stdout=subprocess.PIPE)


def test_an_entry_reads_as_it_was_written():
    entry = Entry(7, NOON, "Ada Lovelace", "match", tuple(SUBJECTS), {"similarity": 0.1, "ok": True}, "f" * 64)

    assert Entry.parse(entry.line()) == entry
