"""What is told of a match afterwards: on a real gallery, real evidence and a real log, and by the command line."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import cv2
import numpy as np
import pytest
from matches import EMBEDDER, EVENT, SISN, evidence_of, matched, unit

from streamer.audit import AuditError
from streamer.enrolment import Desk
from streamer.evidence import Evidence, record_match
from streamer.explain import ExplainError, Explanation, explain, record_verdict
from streamer.gallery import Change, GalleryError, WatchList
from streamer.types import Match, Score
from streamer.vault import KEY_VARIABLE, Vault

Answer = tuple[int, str, str]
KEY = bytes(range(32))
WANTED = WatchList("Wanted for theft", "to find stolen bicycles", "court order 7", threshold=0.5)
POINTS = np.array([[38, 51], [73, 51], [56, 71], [41, 92], [70, 92]], np.float32)
FACE = unit(1, 0, 0, 0, 0, 0, 0, 0)
"""The fused embedding of the face that was matched."""
OTHER = EVENT[:8] + "f" * 24


def like(similarity: float, axis: int = 1) -> np.ndarray:
    """Return a template of this cosine to FACE."""
    template = np.zeros(8, np.float32)
    template[0], template[axis] = similarity, math.sqrt(1 - similarity**2)
    return template


def picture(grey: int) -> bytes:
    return cv2.imencode(".png", np.full((12, 12, 3), grey, np.uint8))[1].tobytes()


def add_photo(change: Change, identity: str, template: np.ndarray, grey: int = 90) -> str:
    photo = change.add_photo(identity, picture(grey), POINTS, quality={"yaw": 0.1})
    change.add_template(photo, EMBEDDER, template)
    return photo


@dataclass(frozen=True)
class Case:
    """A gallery with Ada on a list, by whom a face was matched, and Grace."""

    desk: Desk
    ada: str
    grace: str
    carried: str
    second: str
    wanted: str

    @property
    def match(self) -> Match:
        return Match(self.ada, self.carried, self.wanted, 0.625, 0.5, 0.0125, (self.grace, 0.25))

    def happen(self, match: Match | None = None, event: str = EVENT) -> Evidence:
        """Let the match happen: evidence is kept, and the log is told."""
        evidence = evidence_of(matched(match or self.match), event, fused=FACE)
        self.desk.evidence(keep_days=30).keep(evidence)
        record_match(self.desk.log, evidence)
        return evidence

    def explained(self, event: str = EVENT) -> Explanation:
        return explain(self.desk, event, who="ada")

    def lines(self) -> str:
        return "\n".join(self.explained().lines())


@pytest.fixture
def case(tmp_path: Path) -> Iterator[Case]:
    with Desk(tmp_path / "gallery", Vault(KEY), create=True) as desk:
        with desk.gallery.change("eve") as change:
            change.use_embedder("/models/tiny.onnx", EMBEDDER)
            wanted = change.put_list(WANTED)
            ada, grace = change.add_identity("Ada Lovelace"), change.add_identity("Grace Hopper")
            carried, second = add_photo(change, ada, like(0.625), 70), add_photo(change, ada, like(0.5625, 2))
            add_photo(change, grace, like(0.25, 3))
            for each in (ada, grace):
                change.join(each, WANTED.name)
        yield Case(desk, ada, grace, carried, second, wanted)


# What is said


def test_a_match_is_explained_in_plain_words(case):
    case.happen()

    assert case.explained().lines() == [
        f"event {EVENT}: a match at 2026-11-22 12:30:15 UTC, camera door-1, track 7",
        f"identity: Ada Lovelace ({case.ada})",
        f"list: Wanted for theft ({case.wanted}); purpose: to find stolen bicycles; legal basis: court order 7",
        "threshold: 0.500, which similarity 0.625 passed by 0.125",
        f"photo: {case.carried} carried the match, similarity 0.625; enrolled on {datetime.now(UTC):%Y-%m-%d}",
        f"without that photo: 0.562 by photo {case.second}: still a match",
        f"runner-up then: Grace Hopper ({case.grace}), similarity 0.250",
        f"runner-up now: Grace Hopper ({case.grace}), similarity 0.250, by photo "
        f"{case.desk.gallery.identity(case.grace).photos[0]}",
        "similarity: crop 0.500, restored 0.562, both together over 3 crops of the track 0.625: what the decision "
        "rests on",
        "likelihood ratio: 100 (32 to 178): the face is so many times as likely if it is this person as if it is a "
        "stranger; how likely it is that it is this person, that does not say",
        "false alarms: strangers this alike to somebody on the list, 0.013 a day expected at this camera",
        "face: 20 px high, 8.0 px between the eyes",
        "route: sisn-small (face 20 px)",
        f"restored by: sisn-small, sha256 {SISN}",
        f"embedded by: tiny, sha256 {EMBEDDER}",
        f"calibration: sha256 {'c' * 64}",
        "verdict: none yet",
    ]


def test_programs_get_the_same_without_any_guided_score(case):
    case.happen()

    told = json.loads(json.dumps(case.explained().as_json()))

    assert told["identity"] == {"id": case.ada, "name": "Ada Lovelace"}
    assert told["list"]["legal_basis"] == "court order 7" and told["list"]["member_now"]
    assert (told["similarity"], told["threshold"], told["passed_by"]) == (0.625, 0.5, 0.125)
    assert told["without_photo"]["photo"] == case.second
    assert told["without_photo"]["similarity"] == pytest.approx(0.5625, abs=1e-6)
    assert told["still_a_match"] is True and told["gone"] == []
    assert told["runner_up_then"] == {"identity": case.grace, "name": "Grace Hopper", "similarity": 0.25}
    assert told["runner_up_now"]["identity"] == case.grace
    assert told["score"] == {"raw": 0.5, "blind": 0.5625, "fused": 0.625, "llr": 2.0, "llr_low": 1.5, "llr_high": 2.25}
    assert told["evidence"]["restorer"] == {"name": "sisn-small", "sha256": SISN}
    assert "guided" not in json.dumps(told)


def test_a_person_with_one_photo_is_no_match_without_it(case):
    with case.desk.gallery.change("eve") as change:
        change.remove_photo(case.second)
    case.happen()

    assert "without that photo: no match; there is no other photo of this person" in case.lines()


def test_a_photo_that_was_let_through_by_force_is_told(case):
    with case.desk.gallery.change("eve") as change:
        photo = change.add_photo(case.ada, picture(30), POINTS, quality={"yaw": 0.9}, forced=["pose", "size"])
        change.add_template(photo, EMBEDDER, like(0.6875))
    case.happen(replace(case.match, photo=photo, similarity=0.6875))

    told = case.explained()

    assert any(line.endswith("forced in spite of: pose, size") for line in told.lines())
    assert told.as_json()["photo"]["forced"] == ["pose", "size"]  # type: ignore[index]


@pytest.mark.parametrize(
    ("theirs", "grace", "why"),
    [(0.4, 0.25, "it is below the threshold"), (0.5625, 0.6, "somebody else would be more alike")],
)
def test_why_it_would_be_no_match_without_the_photo_is_said(case, theirs, grace, why):
    with case.desk.gallery.change("eve") as change:
        change.add_template(case.second, EMBEDDER, like(theirs, 2))
        add_photo(change, case.grace, like(grace, 4))
    case.happen()

    assert case.explained().today.still_a_match(0.5) is False
    assert f"no match, as {why}" in case.lines()


def test_who_was_enrolled_since_is_told_apart(case):
    case.happen()
    with case.desk.gallery.change("eve") as change:
        newcomer = change.add_identity("Hedy Lamarr")
        photo = add_photo(change, newcomer, like(0.75, 5))
        added = add_photo(change, case.ada, like(0.875, 6))

    told = case.lines()

    assert f"runner-up then: Grace Hopper ({case.grace}), similarity 0.250" in told
    assert (
        f"runner-up now: Hedy Lamarr ({newcomer}), similarity 0.750, more than this person's, by photo {photo}, "
        "enrolled after the match"
    ) in told
    assert f"without that photo: 0.875 by photo {added}, enrolled after the match: still a match" in told


def test_a_lone_person_has_no_runner_up(case):
    with case.desk.gallery.change("eve") as change:
        change.remove_identity(case.grace)
    case.happen(replace(case.match, runner_up=None))

    told = case.lines()

    assert "runner-up then: nobody else was looked for" in told
    assert "runner-up now: nobody else is looked for" in told


def test_without_a_calibration_no_ratio_and_no_rate_are_made_up(case):
    match = replace(case.match, expected_false_alarms_per_day=None)
    face = matched(match, restored=False, scores={case.ada: Score(0.625, None, 0.625)})
    case.desk.evidence(keep_days=30).keep(evidence := evidence_of(face, fused=FACE, calibration_sha256=None))
    record_match(case.desk.log, evidence)

    told = case.lines()

    assert "likelihood ratio: not known, there was no calibration" in told
    assert "false alarms: how many to expect is not known, there was no calibration" in told
    assert "crop 0.625, not restored, both together" in told
    assert "route: none (large and clean)" in told and "restored by" not in told


# What can no longer be said


def gone(case: Case) -> list[str]:
    return list(case.explained().gone)


def test_a_person_who_was_removed_is_named_no_more_but_who_removed_him_is(case):
    case.happen()
    case.desk.remove(case.desk.gallery.identity(case.ada), who="eve")

    assert gone(case) == [
        f"who it was: identity {case.ada} is no longer enrolled; removed on {datetime.now(UTC):%Y-%m-%d} by eve"
    ]
    told = case.lines()
    assert f"identity: {case.ada}, no longer enrolled" in told and "Lovelace" not in told
    assert "without that photo" not in told
    assert f"runner-up now: Grace Hopper ({case.grace})" in told
    assert "route: sisn-small" in told, "the evidence shows who passed, not who was enrolled: it stays"


def test_a_photo_a_list_or_a_template_that_is_no_longer_there_is_told(case):
    case.happen()
    with case.desk.gallery.change("eve") as change:
        change.remove_photo(case.carried)
        change.remove_list(WANTED.name)

    assert gone(case) == [
        f"what the photo showed: photo {case.carried} was removed since",
        f"what for, and on what ground: list {case.wanted} was removed since",
    ]
    told = case.lines()
    assert f"without that photo: 0.562 by photo {case.second}: still a match" in told
    assert f"list: {case.wanted}, no longer there" in told
    assert "threshold: 0.500, which similarity 0.625 passed by 0.125" in told


def test_a_list_that_changed_is_told(case):
    case.happen()
    with case.desk.gallery.change("eve") as change:
        change.leave(case.ada, WANTED.name)
        change.put_list(replace(WANTED, threshold=0.75, expires_at=datetime(2026, 1, 1, tzinfo=UTC)))

    told = case.lines()

    assert "passed by 0.125; the list's threshold is 0.750 now" in told
    assert "list: this person is no longer on it" in told
    assert "list: expired at 2026-01-01 00:00:00 UTC" in told


def test_a_template_that_was_made_anew_is_told(case):
    case.happen()
    with case.desk.gallery.change("eve") as change:
        change.add_template(case.carried, EMBEDDER, like(0.875))

    assert "photo: its template is another one now, similarity 0.875" in case.lines()


def test_nothing_is_compared_with_templates_of_another_embedder(case):
    case.happen()
    with case.desk.gallery.change("eve") as change:
        change.use_embedder("/models/better.onnx", "f" * 64)

    assert gone(case) == [
        "the score without the photo, and the runner-up now: templates are made by /models/better.onnx "
        "(sha256 ffffffffffff) now, not by tiny (sha256 eeeeeeeeeeee)"
    ]
    assert not [line for line in case.explained().lines() if line.startswith(("runner-up now", "without that"))]


def test_when_the_evidence_is_over_the_log_tells_what_it_knows(case):
    case.happen()
    before = case.explained().lines()
    assert case.desk.evidence(keep_days=30).prune(datetime.now(UTC) + timedelta(days=31)) == 1

    after = case.explained()

    assert after.gone == (
        "what the match rested on: there is no evidence now, its time is over or its file was taken away",
        "the score without the photo, and the runner-up now: both need the evidence",
    )
    lost = ("without that", "runner-up now", "face:", "route:", "restored by", "embedded by", "calibration:")
    kept = [line for line in before if not line.startswith(lost)]
    assert [line for line in after.lines() if not line.startswith("can no longer be said")] == kept
    assert not after.damaged


def test_evidence_that_was_changed_is_told_and_not_believed(case):
    case.happen()
    path = case.desk.gallery.folder / "evidence" / f"{EVENT}.evidence"
    path.write_bytes(path.read_bytes()[:-1] + b"\0")

    told = case.explained()

    assert "changed since" in told.damaged and told.evidence is None
    assert told.gone[0] == f"what the match rested on: {told.damaged}"
    assert told.facts.match == case.match, "the log still knows"


def test_evidence_that_the_log_does_not_know_is_told(case):
    case.desk.log.append("eve", "list.changed", [case.wanted])
    case.desk.evidence(keep_days=30).keep(evidence_of(matched(case.match), fused=FACE))

    assert gone(case) == ["whether the match went out: the audit log has no entry of it"]


def test_a_damaged_gallery_is_not_taken_for_a_removal(case):
    case.happen()
    records = case.desk.gallery._records
    records.rows("UPDATE identity SET body = zeroblob(length(body)) WHERE id = ?", case.ada)

    with pytest.raises(GalleryError, match="changed since"):
        case.explained()


# Which match is meant, and who asked


def test_an_event_is_found_by_its_beginning_unless_others_begin_so(case):
    case.happen()
    assert case.explained(EVENT[:8].upper()).facts.event == EVENT

    case.happen(event=OTHER)
    with pytest.raises(ExplainError, match=f"several matches begin so: {EVENT}, {OTHER}"):
        case.explained(EVENT[:8])
    assert case.explained(EVENT).facts.event == EVENT
    assert case.explained(OTHER[:9]).facts.event == OTHER


@pytest.mark.parametrize(
    ("event", "why"),
    [
        ("f" * 32, "was never a match here"),
        ("0123456", "is no event's id"),
        ("../../etc", "is no event's id"),
        ("", "is no event's id"),
        (EVENT + "0", "is no event's id"),
    ],
)
def test_what_never_was_a_match_is_one_line_and_changes_nothing(case, event, why):
    case.happen()
    before = case.desk.log.path.read_bytes()

    for act in (case.explained, lambda event: record_verdict(case.desk, event, "right", who="ada")):
        with pytest.raises(ExplainError, match=why) as told:
            act(event)
        assert "\n" not in str(told.value)

    assert case.desk.log.path.read_bytes() == before


def test_who_asks_is_in_the_log_before_anything_is_told(case):
    case.happen()

    case.explained()
    explain(case.desk, EVENT, who="eve", save=True)

    asked = [(entry.who, entry.subjects, entry.details) for entry in case.desk.log.entries()][1:]
    assert asked == [("ada", (EVENT,), {"saved": False}), ("eve", (EVENT,), {"saved": True})]
    case.desk.log.path.with_name("audit.jsonl.anchor").unlink()
    with pytest.raises(AuditError, match="anchor is missing"):
        case.explained()


def test_verdicts_are_all_kept_and_told_in_their_order(case):
    case.happen()
    case.happen(event=OTHER)

    record_verdict(case.desk, EVENT, "right", who="ada")
    record_verdict(case.desk, EVENT[:9], "wrong", who="eve", note_code="twin-3")
    record_verdict(case.desk, OTHER, "unsure", who="eve")

    told = case.explained()
    assert [(each.word, each.who, each.note_code) for each in told.verdicts] == [
        ("right", "ada", ""), ("wrong", "eve", "twin-3"),
    ]  # fmt: skip
    said = [line for line in told.lines() if line.startswith("verdict")]
    assert [line.split(" at ")[0] for line in said] == ["verdict: right, by ada", "verdict: wrong, by eve"]
    assert said[1].endswith("UTC, note twin-3")
    entry = next(entry for entry in case.desk.log.entries() if entry.what == "verdict")
    assert (entry.subjects, entry.details) == ((EVENT, case.ada), {"verdict": "right"})
    assert case.desk.log.verify() == []


@pytest.mark.parametrize("code", ["", "Ada Lovelace", "a" * 33, "-x", "é", "a\nb", "x;y"])
def test_a_verdict_and_its_note_are_words_of_a_code(case, code):
    case.happen()
    before = case.desk.log.path.read_bytes()

    with pytest.raises(ExplainError, match="one word"):
        record_verdict(case.desk, EVENT, "wrong", who="ada", note_code=code)
    with pytest.raises(ExplainError, match="right, wrong or unsure"):
        record_verdict(case.desk, EVENT, code, who="ada")

    assert case.desk.log.path.read_bytes() == before


# On the command line


@pytest.fixture
def box(case: Case, monkeypatch: pytest.MonkeyPatch) -> Case:
    """What `streamer` finds where nobody says otherwise; the match has happened."""
    monkeypatch.setenv(KEY_VARIABLE, base64.b64encode(KEY).decode())
    monkeypatch.setenv("STREAMER_GALLERY", str(case.desk.gallery.folder))
    case.happen()
    return case


def refused(answer: Answer, word: str) -> None:
    code, out, err = answer
    assert (code, out) == (2, "") and word in err and len(err.splitlines()) == 1 and "Traceback" not in err


def test_an_operator_judges_a_match_and_has_it_explained(box, streamer: Callable[..., Answer], tmp_path):
    assert streamer("verdict", EVENT[:8], "wrong", "--note-code", "twin-3")[:2] == (0, f"{EVENT}: wrong\n")

    code, out, err = streamer("explain", EVENT, "--save", tmp_path / "pictures")
    assert (code, err) == (0, "")
    assert out.startswith(f"event {EVENT}: a match at ") and f"identity: Ada Lovelace ({box.ada})" in out
    assert "verdict: wrong, by " in out and "note twin-3" in out and "%" not in out
    assert {path.name for path in (tmp_path / "pictures").iterdir()} == {
        f"{EVENT}.crop.png", f"{EVENT}.restored.png", f"{EVENT}.photo.png",
    }  # fmt: skip
    assert (tmp_path / "pictures" / f"{EVENT}.photo.png").read_bytes() == picture(70)
    crop = cv2.imread(str(tmp_path / "pictures" / f"{EVENT}.crop.png"))
    assert np.array_equal(crop, matched().crop.image)

    code, out, _ = streamer("explain", EVENT[:10], "--json")
    assert code == 0 and json.loads(out)["verdicts"][0]["word"] == "wrong"
    whats = [entry.what for entry in box.desk.log.entries()]
    assert whats == ["match", "verdict", "match.explained", "match.explained"]
    assert streamer("audit", "verify")[0] == 0
    assert "Lovelace" not in box.desk.log.path.read_text()


def test_mistakes_on_the_command_line_are_one_line_each(box, streamer: Callable[..., Answer], tmp_path):
    (tmp_path / "file").touch()
    for arguments, word in (
        (["explain", "f" * 32], "never a match here"),
        (["explain", "x"], "no event's id"),
        (["explain"], "EVENT"),
        (["explain", EVENT, "--save", tmp_path / "file"], "--save"),
        (["explain", EVENT, "--gallery", tmp_path / "none"], "no gallery"),
        (["verdict", "f" * 32, "right"], "never a match here"),
        (["verdict", EVENT, "perhaps"], "perhaps"),
        (["verdict", EVENT], "right|wrong|unsure"),
        (["verdict", EVENT, "right", "--note-code", "Ada Lovelace"], "one word"),
    ):
        refused(streamer(*arguments), word)


def test_changed_evidence_fails_the_command(box, streamer: Callable[..., Answer]):
    path = box.desk.gallery.folder / "evidence" / f"{EVENT}.evidence"
    path.write_bytes(path.read_bytes()[:-1] + b"\0")

    code, out, _ = streamer("explain", EVENT)

    assert code == 1 and "can no longer be said: what the match rested on" in out and "changed since" in out
