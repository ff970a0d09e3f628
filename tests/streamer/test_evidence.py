"""Evidence, in real files that are stolen, changed and swapped, and whose writers are killed."""

from __future__ import annotations

import logging
import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields, is_dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from matches import CALIBRATION, CAPTURED_AT, EMBEDDER, EVENT, MATCH, SISN, evidence_of, matched

from streamer.audit import AuditLog
from streamer.evidence import Evidence, EvidenceError, EvidenceStore, record_match
from streamer.types import Score
from streamer.vault import Vault

ROOT = Path(__file__).parents[2]
VAULT = Vault(bytes(range(32)))
NOON = datetime(2026, 11, 22, 12, tzinfo=UTC)
OTHER = "f" * 32


def open_store(folder: Path, *, at: datetime = NOON, vault: Vault = VAULT) -> EvidenceStore:
    return EvidenceStore(folder, vault, keep_days=30, clock=lambda: at)


@pytest.fixture
def store(tmp_path) -> EvidenceStore:
    return open_store(tmp_path / "evidence")


def path_of(store: EvidenceStore, event: str = EVENT) -> Path:
    return store.folder / f"{event}.evidence"


def same(one: Any, other: Any) -> bool:
    """Tell whether two values are one to the last bit, arrays within them too."""
    if is_dataclass(one):
        return type(one) is type(other) and all(
            same(getattr(one, field.name), getattr(other, field.name)) for field in fields(one)
        )
    if isinstance(one, np.ndarray):
        return isinstance(other, np.ndarray) and one.dtype == other.dtype and np.array_equal(one, other)
    return bool(one == other)


# What it keeps


@pytest.mark.parametrize("restored", [True, False])
@pytest.mark.parametrize("match", [MATCH, replace(MATCH, expected_false_alarms_per_day=None, runner_up=None)])
def test_what_is_kept_is_read_back_to_the_last_bit(store, restored, match):
    score = Score(1 / 3, None, 2 / 3)
    kept = evidence_of(matched(match, restored=restored, scores={match.identity: score, "d" * 16: score}))
    store.keep(kept)

    assert same(open_store(store.folder).read(EVENT), kept)


def test_the_pictures_are_those_of_the_event_with_the_landmarks_in_their_own_pixels(store):
    face = matched()
    store.keep(evidence_of(face))
    kept = store.read(EVENT)

    assert np.array_equal(cv2.imdecode(np.frombuffer(kept.crop, np.uint8), cv2.IMREAD_COLOR_BGR), face.crop.image)
    restored = cv2.imdecode(np.frombuffer(kept.restored, np.uint8), cv2.IMREAD_COLOR_BGR)
    assert np.array_equal(restored, face.restoration.image)
    assert np.allclose(kept.landmarks[0], (12, 13))  # the eye at 106, 57 in a crop whose corner is at 94, 44
    assert np.allclose(kept.restored_landmarks, 4 * kept.landmarks + 1.5)


def test_a_guided_score_is_not_kept(store):
    assert evidence_of().scores[MATCH.identity].guided == 0.99
    store.keep(evidence_of())

    assert store.read(EVENT).scores[MATCH.identity] == Score(0.5, 0.5625, 0.625, None, 2.0, 1.5, 2.25)


def test_evidence_lies_in_files_of_its_owner_alone(store):
    store.keep(evidence_of())

    assert (store.folder.stat().st_mode & 0o777, path_of(store).stat().st_mode & 0o777) == (0o700, 0o600)
    assert [path.name for path in store.folder.iterdir()] == [f"{EVENT}.evidence"]


def test_events_are_found_by_how_their_ids_begin(store):
    assert store.find("") == []
    for event in (EVENT, OTHER):
        store.keep(evidence_of(event=event))

    assert store.find("") == [EVENT, OTHER]
    assert store.find(EVENT[:8]) == [EVENT]
    assert store.find("00") == []


@pytest.mark.parametrize("event", ["", "../" + "0" * 29, EVENT[:31], EVENT.upper()])
def test_what_is_no_events_id_never_becomes_a_path(store, event):
    for act in (store.read, lambda event: store.keep(evidence_of(event=event))):
        with pytest.raises(EvidenceError, match="32 hex digits"):
            act(event)

    assert not store.folder.exists()


def test_evidence_that_is_not_there_is_one_line(store):
    with pytest.raises(EvidenceError, match=f"{EVENT}.evidence: No such file or directory") as told:
        store.read(EVENT)

    assert "\n" not in str(told.value)


# What a thief or a forger can do


def test_a_stolen_folder_tells_nothing_but_ids_of_events(store):
    evidence = evidence_of()
    store.keep(evidence)
    stolen = path_of(store).read_bytes()

    for secret in (
        b"door-1", b"sisn", b"2026", b"PNG", evidence.crop[8:24], MATCH.identity.encode(), MATCH.photo.encode(),
        evidence.fused.tobytes(), evidence.embeddings.raw.tobytes()[:8], EMBEDDER[:12].encode(), b"similarity",
    ):  # fmt: skip
        assert secret not in stolen
    with pytest.raises(EvidenceError, match="another key"):
        open_store(store.folder, vault=Vault(bytes(32))).read(EVENT)


def test_every_changed_byte_is_refused(store):
    store.keep(evidence_of())
    whole = path_of(store).read_bytes()

    for place in [*range(80), *random.Random(0).sample(range(len(whole)), 100), len(whole) - 1]:
        path_of(store).write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(EvidenceError, match="changed"):
            store.read(EVENT)


@pytest.mark.parametrize("kept", [0, 5, 19, 40, 56, 70, 10_000])
def test_a_file_that_was_cut_off_is_refused(store, kept):
    store.keep(evidence_of())
    path_of(store).write_bytes(path_of(store).read_bytes()[:kept])

    with pytest.raises(EvidenceError, match="changed"):
        store.read(EVENT)


def test_a_file_under_another_events_name_is_refused(store):
    for event in (EVENT, OTHER):
        store.keep(evidence_of(event=event))
    os.replace(path_of(store), path_of(store, OTHER))

    with pytest.raises(EvidenceError, match="for another place"):
        store.read(OTHER)


def test_a_later_time_put_before_older_evidence_is_refused(store):
    """Nobody makes evidence younger than it is, not even with times that this key sealed for this event."""
    store.keep(evidence_of())
    old = path_of(store).read_bytes()
    open_store(store.folder, at=NOON + timedelta(days=20)).keep(evidence_of())
    new = path_of(store).read_bytes()
    path_of(store).write_bytes(new[:56] + old[56:])

    with pytest.raises(EvidenceError, match="changed"):
        store.read(EVENT)


# How it ends


def test_evidence_is_removed_when_its_time_is_over_whatever_the_file_system_says(store):
    store.keep(evidence_of())
    open_store(store.folder, at=NOON + timedelta(days=10)).keep(evidence_of(event=OTHER))
    os.utime(path_of(store, OTHER), (0, 0))  # as if of 1970

    assert store.prune(NOON + timedelta(days=30)) == 0
    assert store.prune(NOON + timedelta(days=30, seconds=1)) == 1
    assert store.find("") == [OTHER]
    assert store.prune(NOON + timedelta(days=41)) == 1
    assert list(store.folder.iterdir()) == []


def test_it_is_the_time_at_which_it_was_kept_that_counts_not_that_of_the_picture(store):
    """A film of years ago is looked at today."""
    store.keep(evidence_of(replace_captured_at(datetime(2009, 1, 1, tzinfo=UTC))))

    assert store.prune(NOON + timedelta(days=1)) == 0
    assert store.read(EVENT).captured_at.year == 2009


def replace_captured_at(at: datetime) -> Any:
    face = matched()
    moment = replace(face.crop.track.moment, captured_at=at)
    return replace(face, crop=replace(face.crop, track=replace(face.crop.track, moment=moment)))


def test_what_is_removed_is_overwritten(store, tmp_path):
    store.keep(evidence_of())
    os.link(path_of(store), tmp_path / "the same blocks")
    size = path_of(store).stat().st_size

    store.prune(NOON + timedelta(days=31))

    assert (tmp_path / "the same blocks").read_bytes() == bytes(size)


def test_what_does_not_open_stays_and_is_told_once(store, caplog):
    store.keep(evidence_of())
    path_of(store, OTHER).write_bytes(path_of(store).read_bytes())

    with caplog.at_level(logging.WARNING):
        assert store.prune(NOON + timedelta(days=31)) == 1
        assert store.prune(NOON + timedelta(days=32)) == 0

    assert store.find("") == [OTHER]
    assert [record.getMessage() for record in caplog.records] == [
        f"{store.folder}: 1 files do not open with this key and stay"
    ]


def test_what_a_killed_process_left_is_swept_up(store):
    store.keep(evidence_of())
    for left in (f"{OTHER}.part", f"{OTHER}.gone"):
        (store.folder / left).write_bytes(b"half")
    (store.folder / "notes.part").write_bytes(b"somebody else's")

    assert store.prune(NOON) == 0

    assert {path.name for path in store.folder.iterdir()} == {f"{EVENT}.evidence", "notes.part"}


def test_nothing_is_removed_where_nothing_was_ever_kept(store):
    assert store.prune(NOON) == 0
    assert not store.folder.exists()


# What goes wrong meanwhile

WRITING = """
import resource, sys
from datetime import UTC, datetime
from pathlib import Path
sys.path.insert(0, "tests")
from matches import evidence_of
from streamer.evidence import EvidenceError, EvidenceStore
from streamer.vault import Vault

folder, count, most_bytes = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
if most_bytes:
    resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, most_bytes))
store = EvidenceStore(folder, Vault(bytes(range(32))), keep_days=30)
evidence = evidence_of()
for number in range(count):
    try:
        store.keep(evidence_of(event=f"{number:032x}"))
    except EvidenceError as exc:
        print(f"refused: {exc}", flush=True)
    else:
        print(f"{number:032x}", flush=True)
"""


def writing(store: EvidenceStore, count: int, *, most_bytes: int = 0) -> subprocess.Popen[str]:
    """Start a process that keeps evidence and prints the id of each event when it is kept."""
    arguments = [sys.executable, "-c", WRITING, str(store.folder), str(count), str(most_bytes)]
    return subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.PIPE, text=True)


def test_a_killed_writer_leaves_whole_evidence_or_none(store):
    kept: list[str] = []
    with writing(store, 10_000) as writer:
        for _ in range(25):
            kept.append(writer.stdout.readline().strip())
        writer.send_signal(signal.SIGKILL)
        kept += writer.stdout.read().split()

    found = store.find("")

    assert found[: len(kept)] == kept and len(found) <= len(kept) + 1
    assert all(store.read(event).event == event for event in found)
    store.prune(datetime.now(UTC))
    assert {path.stem for path in store.folder.iterdir()} == set(found)


def test_a_writer_and_a_sweeper_do_not_disturb_each_other(store):
    with writing(store, 60) as writer:
        while writer.poll() is None:
            store.prune(datetime.now(UTC))
        told = writer.stdout.read().split("\n")

    assert [line for line in told if line] == [f"{number:032x}" for number in range(60)]
    assert len(store.find("")) == 60


def test_a_full_disk_is_one_line_and_leaves_what_was_there(store):
    first = f"{0:032x}"
    store.keep(evidence_of(event=first))
    before = path_of(store, first).read_bytes()

    with writing(store, 2, most_bytes=10_000) as writer:
        told = writer.stdout.read().splitlines()

    assert len(told) == 2 and all(line.startswith(f"refused: {store.folder}: File too large") for line in told), told
    assert list(store.folder.iterdir()) == [path_of(store, first)]
    assert path_of(store, first).read_bytes() == before


def test_a_place_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").touch()

    for folder in (tmp_path / "file", tmp_path / "file" / "evidence", tmp_path / "none" / "evidence"):
        with pytest.raises(EvidenceError, match=str(folder)) as told:
            open_store(folder).keep(evidence_of())
        assert "\n" not in str(told.value)


# What the log is told


@pytest.fixture
def log(tmp_path) -> Iterator[AuditLog]:
    written = AuditLog(tmp_path / "audit.jsonl", VAULT, lambda: NOON)
    yield written
    assert written.verify() == []


def test_a_match_is_in_the_log_with_its_ids_and_figures(log):
    entry = record_match(log, evidence_of())

    assert (entry.who, entry.what) == ("streamer", "match")
    assert entry.subjects == (EVENT, MATCH.identity, MATCH.photo, MATCH.list)
    assert entry.details == {
        "camera": "door-1", "captured_at": "2026-11-22T12:30:15.250+00:00", "track": 7, "crops": 3,
        "similarity": 0.625, "threshold": 0.5, "expected_false_alarms_per_day": 0.0125,
        "runner_up": "d" * 16, "runner_up_similarity": 0.25,
        "raw": 0.5, "blind": 0.5625, "llr": 2.0, "llr_low": 1.5, "llr_high": 2.25,
        "restorer": SISN[:12], "embedder": EMBEDDER[:12], "calibration": CALIBRATION[:12], "gallery_version": 4,
    }  # fmt: skip
    assert datetime.fromisoformat(str(entry.details["captured_at"])) == CAPTURED_AT
    assert list(log.entries()) == [entry]


def test_what_a_match_does_not_have_is_left_out_of_the_log(log):
    bare = replace(MATCH, expected_false_alarms_per_day=None, runner_up=None)
    evidence = evidence_of(
        matched(bare, restored=False, scores={bare.identity: Score(0.5, None, 0.625)}), calibration_sha256=None
    )

    assert set(record_match(log, evidence).details) == {
        "camera", "captured_at", "track", "crops", "similarity", "threshold", "raw", "embedder", "gallery_version",
    }  # fmt: skip


def test_networks_may_have_any_name_without_their_matches_being_lost(store, log):
    evidence = evidence_of(embedder="My own net, v2", event=OTHER)
    evidence = replace(evidence, restorer="büro (final)")
    store.keep(evidence)

    assert record_match(log, evidence).details["restorer"] == SISN[:12]
    assert store.read(OTHER).restorer == "büro (final)"


def test_figures_of_any_kind_of_float_are_kept_and_logged(store, log):
    odd = replace(MATCH, similarity=np.float32(0.1), runner_up=("d" * 16, np.float64(0.05)))  # type: ignore[arg-type]
    evidence: Evidence = evidence_of(matched(odd))
    store.keep(evidence)

    assert record_match(log, evidence).details["similarity"] == 0.1
    assert store.read(EVENT).match.similarity == np.float32(0.1)
