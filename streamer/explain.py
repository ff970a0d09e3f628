"""What can be said of a match afterwards, and what an operator says of it.

Three things are read: the evidence, while it is kept; the audit log, which stays; and the gallery as it is now. What
they can no longer tell is said too.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from streamer.audit import Entry
from streamer.enrolment import Desk
from streamer.evidence import MATCH, Evidence, EvidenceError, EvidenceStore
from streamer.gallery import Candidate, Gallery, GalleryError, Identity, Photo, WatchList
from streamer.types import Match, Score

EXPLAINED = "match.explained"
VERDICT = "verdict"
"""What the audit log calls them."""
WORDS = ("right", "wrong", "unsure")
"""What an operator may say of a match."""

_BEGINNING = re.compile(r"[0-9a-f]{8,32}")
_NOTE_CODE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,31}")
_MOST_NAMED = 5
_SAME = 1e-3
"""Similarities that differ by no more are those of one template."""

RecordT = TypeVar("RecordT")


class ExplainError(ValueError):
    """There is no such match, or what is said of it cannot be kept. The message is one line."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What an operator said of a match."""

    at: datetime
    who: str
    word: str
    """One of WORDS."""
    note_code: str
    """Empty where none was given."""


@dataclass(frozen=True, slots=True)
class Facts:
    """What is known of a match for as long as the log is there."""

    event: str
    captured_at: datetime
    camera: str
    track: int
    crops: int
    match: Match
    score: Score | None
    """Of the matched identity."""


@dataclass(frozen=True, slots=True)
class Today:
    """What the gallery says of a match as it is now."""

    person: Identity | None
    photo: Photo | None
    watch_list: WatchList | None
    """Who was matched, by which photo and which list; None where that is no longer there."""
    compared: bool = False
    """Whether the face could be compared anew: evidence and templates are there, and of one embedder."""
    similarity: float | None = None
    """Of the photo that carried the match."""
    without: Candidate | None = None
    """Of the person's other photos, the one most like the face."""
    runner_up: Candidate | None = None
    """Of the other persons, the one most like the face."""

    def still_a_match(self, threshold: float) -> bool | None:
        """Tell whether the face would be matched to this person without the photo; None where nobody can tell."""
        if not self.compared or self.person is None:
            return None
        other = -1.0 if self.runner_up is None else self.runner_up.similarity
        return self.without is not None and self.without.similarity >= max(threshold, other)


@dataclass(frozen=True, slots=True)
class Explanation:
    """A match, explained as far as it can be."""

    facts: Facts
    evidence: Evidence | None
    """None where its time is over, or it does not open."""
    damaged: str
    """Why the evidence does not open; empty where it does, or is gone."""
    today: Today
    names: Mapping[str, str]
    """By id, of those spoken of who are enrolled still."""
    added_later: frozenset[str]
    """Ids of the photos spoken of that were enrolled after the match."""
    verdicts: tuple[Verdict, ...]
    gone: tuple[str, ...]
    """What can no longer be said, a sentence each."""

    def lines(self) -> list[str]:
        """Return all of it for people."""
        return list(_lines(self))

    def as_json(self) -> dict[str, object]:
        """Return all of it for programs."""
        return _as_json(self)

    def save(self, folder: Path) -> list[Path]:
        """Write the pictures side by side: crop, restored crop and photo; return their paths. Raises ExplainError."""
        evidence, photo = self.evidence, self.today.photo
        pictures = {"crop.png": evidence.crop, "restored.png": evidence.restored} if evidence else {}
        if photo is not None:
            pictures["photo.png" if photo.image.startswith(b"\x89PNG") else "photo.jpg"] = photo.image
        paths = []
        for name, image in pictures.items():
            if image is not None:
                paths.append(folder / f"{self.facts.event}.{name}")
                try:
                    paths[-1].write_bytes(image)
                except OSError as exc:
                    raise ExplainError(f"--save {paths[-1]}: {exc.strerror}") from exc
        return paths


def explain(desk: Desk, event: str, *, who: str, save: bool = False) -> Explanation:
    """Explain the match of an event, given by its id or the beginning of it; the log has it first that `who` asked.

    `save` is whether its pictures will be written out, which is logged too. Raises ExplainError where there never was
    such a match, AuditError where the log cannot be read or written, and GalleryError.
    """
    entries = list(desk.log.entries())
    event = _find(desk, entries, event)
    desk.log.append(who, EXPLAINED, [event], {"saved": save})
    evidence, damaged = _read(desk, event)
    facts = _of_log(event, entries) if evidence is None else _of_evidence(evidence)
    if facts is None:
        raise ExplainError(f"event {event}: the log does not know it as a match, and {damaged}")
    today = _look(desk.gallery, facts.match, evidence)
    then = facts.match.runner_up
    spoken_of = {facts.match.identity, *(then or ())[:1], *(each.identity for each in _candidates(today))}
    at = next((each.at for each in _of_event(MATCH, event, entries)), facts.captured_at)
    return Explanation(
        facts, evidence, damaged, today, _names(desk.gallery, spoken_of), _added_since(desk.gallery, today, at),
        _verdicts(event, entries), tuple(_gone(desk.gallery, facts, evidence, damaged, today, entries)),
    )  # fmt: skip


def record_verdict(desk: Desk, event: str, word: str, *, who: str, note_code: str | None = None) -> Entry:
    """Log what an operator says of a match, one of WORDS; he may say so again, and the log keeps all.

    Raises ExplainError where there never was such a match, or it is none of the words, or the note's code is not one
    word; AuditError; EvidenceError.
    """
    if word not in WORDS:
        raise ExplainError(f"a verdict is {', '.join(WORDS[:-1])} or {WORDS[-1]}, not {word!r}")
    if note_code is not None and not _NOTE_CODE.fullmatch(note_code):
        raise ExplainError("a note's code is one word of up to 32 letters, digits, - and _: it is kept for ever")
    entries = list(desk.log.entries())
    event = _find(desk, entries, event)
    facts = _of_log(event, entries)
    identity = facts.match.identity if facts else _evidence(desk).read(event).match.identity
    note = {} if note_code is None else {"note_code": note_code}
    return desk.log.append(who, VERDICT, [event, identity], {"verdict": word, **note})


# Finding it.


def _find(desk: Desk, entries: Sequence[Entry], given: str) -> str:
    """Return the id of the one match that is meant. Raises ExplainError."""
    beginning = given.lower()
    if not _BEGINNING.fullmatch(beginning):
        raise ExplainError(f"{given!r} is no event's id: 32 hex digits, or the first 8 or more of them")
    logged = (entry.subjects[0] for entry in entries if _is_match(entry) and entry.subjects[0].startswith(beginning))
    found = sorted({*logged, *_evidence(desk).find(beginning)})
    if not found:
        raise ExplainError(f"event {given} was never a match here")
    if len(found) > 1:
        more = f" and {len(found) - _MOST_NAMED} more" if len(found) > _MOST_NAMED else ""
        raise ExplainError(f"several matches begin so: {', '.join(found[:_MOST_NAMED])}{more}")
    return found[0]


def _evidence(desk: Desk) -> EvidenceStore:
    return desk.evidence(keep_days=math.inf)  # nothing is removed here


def _read(desk: Desk, event: str) -> tuple[Evidence | None, str]:
    """Return the evidence, or none and why it does not open."""
    store = _evidence(desk)
    if event not in store.find(event):
        return None, ""
    try:
        return store.read(event), ""
    except EvidenceError as exc:
        return None, str(exc)


def _is_match(entry: Entry) -> bool:
    return entry.what == MATCH and len(entry.subjects) == 4 and len(entry.subjects[0]) == 32


def _of_event(what: str, event: str, entries: Iterable[Entry]) -> Iterator[Entry]:
    return (entry for entry in entries if entry.what == what and entry.subjects[:1] == (event,))


def _of_evidence(evidence: Evidence) -> Facts:
    return Facts(
        evidence.event, evidence.captured_at, evidence.camera, evidence.track, evidence.crops, evidence.match,
        evidence.scores.get(evidence.match.identity),
    )  # fmt: skip


def _of_log(event: str, entries: Iterable[Entry]) -> Facts | None:
    """Return what the log knows of a match; None where it does not know it as one."""
    entry = next((each for each in _of_event(MATCH, event, entries) if _is_match(each)), None)
    if entry is None:
        return None
    figures: dict[str, Any] = dict(entry.details)
    _, identity, photo, watch_list = entry.subjects
    try:
        runner_up = (figures["runner_up"], figures["runner_up_similarity"]) if "runner_up" in figures else None
        match = Match(
            identity, photo, watch_list, figures["similarity"], figures["threshold"],
            figures.get("expected_false_alarms_per_day"), runner_up,
        )  # fmt: skip
        ratio = (figures.get(name) for name in ("llr", "llr_low", "llr_high"))
        blind = figures.get("blind")
        score = Score(figures["raw"], blind, match.similarity, None, *ratio) if "raw" in figures else None
        captured_at = datetime.fromisoformat(figures["captured_at"])
        return Facts(event, captured_at, figures["camera"], figures["track"], figures["crops"], match, score)
    except (KeyError, ValueError) as exc:
        raise ExplainError(f"event {event}: line {entry.seq + 1} of the log is no match of this streamer's") from exc


def _verdicts(event: str, entries: Iterable[Entry]) -> tuple[Verdict, ...]:
    return tuple(
        Verdict(entry.at, entry.who, str(entry.details.get("verdict", "")), str(entry.details.get("note_code", "")))
        for entry in _of_event(VERDICT, event, entries)
    )


# What the gallery says now.


def _look(gallery: Gallery, match: Match, evidence: Evidence | None) -> Today:
    person = _if_there("identity", gallery.identity, match.identity)
    photo = _if_there("photo", gallery.photo, match.photo)
    watch_list = next((each for each in gallery.lists() if each.id == match.list), None)
    today = Today(person, photo, watch_list)
    if evidence is None or (gallery.embedder() or ("", ""))[1] != evidence.embedder_sha256:
        return today
    own = _similarities(gallery, person, evidence)
    others = gallery.snapshot(evidence.embedder_sha256).search(evidence.fused, top=2)[0]
    return replace(
        today, compared=True,
        similarity=next((each.similarity for each in own if each.photo == match.photo), None),
        without=next((each for each in own if each.photo != match.photo), None),
        runner_up=next((each for each in others if each.identity != match.identity), None),
    )  # fmt: skip


def _similarities(gallery: Gallery, person: Identity | None, evidence: Evidence) -> list[Candidate]:
    """Return the photos of a person with the similarity of each to the face, the most alike first."""
    found = []
    for photo in map(gallery.photo, person.photos if person else ()):
        template = photo.templates.get(evidence.embedder_sha256)
        if template is not None:
            similarity = float(np.clip(template.astype(np.float64) @ evidence.fused, -1, 1))
            found.append(Candidate(photo.identity, photo.id, similarity))
    return sorted(found, key=lambda each: -each.similarity)


def _candidates(today: Today) -> list[Candidate]:
    return [each for each in (today.without, today.runner_up) if each is not None]


def _names(gallery: Gallery, ids: Iterable[str]) -> dict[str, str]:
    found = (_if_there("identity", gallery.identity, each) for each in ids)
    return {each.id: each.name for each in found if each is not None}


def _added_since(gallery: Gallery, today: Today, at: datetime) -> frozenset[str]:
    photos = (gallery.photo(each.photo) for each in _candidates(today))
    return frozenset(photo.id for photo in photos if photo.added_at > at)


def _if_there(kind: str, look_up: Callable[[str], RecordT], record: str) -> RecordT | None:
    """Return a record of the gallery, None where there is none. Raises GalleryError for one that does not open."""
    try:
        return look_up(record)
    except GalleryError as exc:
        if str(exc) != f"no {kind} {record}":
            raise
        return None


def _gone(
    gallery: Gallery, facts: Facts, evidence: Evidence | None, damaged: str, today: Today, entries: Sequence[Entry]
) -> Iterator[str]:
    """Yield what can no longer be said."""
    match = facts.match
    if damaged:
        yield f"what the match rested on: {damaged}"
    elif evidence is None:
        yield "what the match rested on: there is no evidence now, its time is over or its file was taken away"
    elif not any(_of_event(MATCH, facts.event, entries)):
        yield "whether the match went out: the audit log has no entry of it"
    if today.person is None:
        yield f"who it was: identity {match.identity} is no longer enrolled{_removed(match.identity, entries)}"
    elif today.photo is None:
        yield f"what the photo showed: photo {match.photo} was removed since"
    if today.watch_list is None:
        yield f"what for, and on what ground: list {match.list} was removed since"
    if today.compared and today.photo is not None and today.similarity is None:
        yield f"how alike photo {match.photo} is: it has no template now"
    anew = "the score without the photo, and the runner-up now"
    if evidence is None:
        yield f"{anew}: both need the evidence"
    elif not today.compared:
        source, sha256 = gallery.embedder() or ("nothing", "")
        yield (
            f"{anew}: templates are made by {source} (sha256 {sha256[:12]}) now, not by {evidence.embedder} "
            f"(sha256 {evidence.embedder_sha256[:12]})"
        )


def _removed(identity: str, entries: Iterable[Entry]) -> str:
    removals = [entry for entry in entries if entry.what == "identity.removed" and identity in entry.subjects]
    return f"; removed on {_day(removals[-1].at)} by {removals[-1].who}" if removals else ""


# How it is told.


def _lines(told: Explanation) -> Iterator[str]:
    facts, match = told.facts, told.facts.match
    yield f"event {facts.event}: a match at {_time(facts.captured_at)}, camera {facts.camera}, track {facts.track}"
    yield f"identity: {_who(told, match.identity)}"
    yield from _list_lines(told)
    yield from _photo_lines(told)
    yield from _runner_up_lines(told)
    yield from _score_lines(told)
    yield from _evidence_lines(told)
    for each in told.verdicts:
        code = f", note {each.note_code}" if each.note_code else ""
        yield f"verdict: {each.word}, by {each.who} at {_time(each.at)}{code}"
    if not told.verdicts:
        yield "verdict: none yet"
    for sentence in told.gone:
        yield f"can no longer be said: {sentence}"


def _list_lines(told: Explanation) -> Iterator[str]:
    match, on, person = told.facts.match, told.today.watch_list, told.today.person
    if on is None:
        yield f"list: {match.list}, no longer there"
    else:
        yield f"list: {on.name} ({on.id}); purpose: {on.purpose}; legal basis: {on.legal_basis}"
    if on and on.expires_at:
        yield f"list: {'expired' if on.expires_at <= datetime.now(UTC) else 'expires'} at {_time(on.expires_at)}"
    if on and person and on.name not in person.lists:
        yield "list: this person is no longer on it"
    passed = match.similarity - match.threshold
    now = f"; the list's threshold is {on.threshold:.3f} now" if on and on.threshold != match.threshold else ""
    yield f"threshold: {match.threshold:.3f}, which similarity {match.similarity:.3f} passed by {passed:.3f}{now}"


def _photo_lines(told: Explanation) -> Iterator[str]:
    match, today = told.facts.match, told.today
    enrolled = "no longer there" if today.photo is None else f"enrolled on {_day(today.photo.added_at)}"
    forced = f", forced in spite of: {', '.join(today.photo.forced)}" if today.photo and today.photo.forced else ""
    yield f"photo: {match.photo} carried the match, similarity {match.similarity:.3f}; {enrolled}{forced}"
    if today.similarity is not None and abs(today.similarity - match.similarity) > _SAME:
        yield f"photo: its template is another one now, similarity {today.similarity:.3f}"
    still, other = today.still_a_match(match.threshold), today.without
    if other is not None:
        then = "still a match" if still else _why_none(match, other)
        yield f"without that photo: {other.similarity:.3f} by photo {other.photo}{_later(told, other)}: {then}"
    elif still is not None:
        yield "without that photo: no match; there is no other photo of this person"


def _why_none(match: Match, other: Candidate) -> str:
    low = other.similarity < match.threshold
    return "no match, as it is below the threshold" if low else "no match, as somebody else would be more alike"


def _runner_up_lines(told: Explanation) -> Iterator[str]:
    match, now = told.facts.match, told.today.runner_up
    if match.runner_up is None:
        yield "runner-up then: nobody else was looked for"
    else:
        identity, similarity = match.runner_up
        yield f"runner-up then: {_who(told, identity)}, similarity {similarity:.3f}"
    if now is not None:
        more = ", more than this person's" if now.similarity > match.similarity else ""
        by = f"photo {now.photo}{_later(told, now)}"
        yield f"runner-up now: {_who(told, now.identity)}, similarity {now.similarity:.3f}{more}, by {by}"
    elif told.today.compared:
        yield "runner-up now: nobody else is looked for"


def _score_lines(told: Explanation) -> Iterator[str]:
    score, alarms = told.facts.score, told.facts.match.expected_false_alarms_per_day
    if score is not None:
        blind = "not restored" if score.blind is None else f"restored {score.blind:.3f}"
        yield (
            f"similarity: crop {score.raw:.3f}, {blind}, both together over {_crops(told.facts.crops)} of the track "
            f"{score.fused:.3f}: what the decision rests on"
        )
    if score is None or score.llr is None or score.llr_low is None or score.llr_high is None:
        yield "likelihood ratio: not known, there was no calibration"
    else:
        interval = f"{_times(score.llr_low)} to {_times(score.llr_high)}"
        yield (
            f"likelihood ratio: {_times(score.llr)} ({interval}): the face is so many times as likely if it is this "
            "person as if it is a stranger; how likely it is that it is this person, that does not say"
        )
    if alarms is None:
        yield "false alarms: how many to expect is not known, there was no calibration"
    else:
        yield f"false alarms: strangers this alike to somebody on the list, {alarms:.2g} a day expected at this camera"


def _evidence_lines(told: Explanation) -> Iterator[str]:
    evidence = told.evidence
    if evidence is None:
        return
    quality = evidence.quality
    yield f"face: {quality.face_height_px:.0f} px high, {quality.eye_distance_px:.1f} px between the eyes"
    yield f"route: {evidence.route.restorer} ({evidence.route.reason})"
    if evidence.restorer is not None:
        yield f"restored by: {evidence.restorer}, sha256 {evidence.restorer_sha256}"
    yield f"embedded by: {evidence.embedder}, sha256 {evidence.embedder_sha256}"
    if evidence.calibration_sha256 is not None:
        yield f"calibration: sha256 {evidence.calibration_sha256}"


def _as_json(told: Explanation) -> dict[str, object]:
    facts, match, today = told.facts, told.facts.match, told.today
    return {
        "event": facts.event, "captured_at": _iso(facts.captured_at), "camera": facts.camera, "track": facts.track,
        "identity": {"id": match.identity, "name": told.names.get(match.identity)},
        "list": _list_json(told), "similarity": match.similarity, "threshold": match.threshold,
        "passed_by": match.similarity - match.threshold, "crops": facts.crops,
        "photo": {
            "id": match.photo, "added_at": _iso(today.photo.added_at) if today.photo else None,
            "forced": list(today.photo.forced) if today.photo else None, "similarity_now": today.similarity,
        },
        "without_photo": _candidate_json(told, today.without),
        "still_a_match": today.still_a_match(match.threshold),
        "runner_up_then": match.runner_up and {
            "identity": match.runner_up[0], "name": told.names.get(match.runner_up[0]),
            "similarity": match.runner_up[1],
        },
        "runner_up_now": _candidate_json(told, today.runner_up),
        "score": facts.score and _score_json(facts.score),
        "expected_false_alarms_per_day": match.expected_false_alarms_per_day,
        "evidence": told.evidence and _evidence_json(told.evidence),
        "verdicts": [{**asdict(each), "at": _iso(each.at)} for each in told.verdicts],
        "gone": list(told.gone),
    }  # fmt: skip


def _list_json(told: Explanation) -> dict[str, object]:
    on, person = told.today.watch_list, told.today.person
    fields: dict[str, object] = {"id": told.facts.match.list}
    if on is not None:
        fields |= {
            "name": on.name, "purpose": on.purpose, "legal_basis": on.legal_basis, "threshold_now": on.threshold,
            "expires_at": _iso(on.expires_at), "member_now": person is not None and on.name in person.lists,
        }  # fmt: skip
    return fields


def _evidence_json(evidence: Evidence) -> dict[str, object]:
    restored_by = {"name": evidence.restorer, "sha256": evidence.restorer_sha256}
    return {
        "stream": evidence.stream, "epoch": evidence.epoch, "quality": asdict(evidence.quality),
        "route": asdict(evidence.route), "restorer": restored_by if evidence.restorer else None,
        "embedder": {"name": evidence.embedder, "sha256": evidence.embedder_sha256},
        "scores": {identity: _score_json(score) for identity, score in evidence.scores.items()},
        "gallery_version": evidence.gallery_version, "calibration_sha256": evidence.calibration_sha256,
    }  # fmt: skip


def _candidate_json(told: Explanation, candidate: Candidate | None) -> dict[str, object] | None:
    if candidate is None:
        return None
    name, since = told.names.get(candidate.identity), candidate.photo in told.added_later
    return {**asdict(candidate), "name": name, "added_since": since}


def _score_json(score: Score) -> dict[str, object]:
    fields = asdict(score)
    del fields["guided"]
    return fields


def _who(told: Explanation, identity: str) -> str:
    name = told.names.get(identity)
    return f"{identity}, no longer enrolled" if name is None else f"{name} ({identity})"


def _later(told: Explanation, candidate: Candidate) -> str:
    return ", enrolled after the match" if candidate.photo in told.added_later else ""


def _crops(count: int) -> str:
    return f"{count} crop{'s' * (count != 1)}"


def _times(log10: float) -> str:
    return f"{10**log10:,.0f}" if log10 >= 1 else f"{10**log10:.2g}"


def _time(at: datetime) -> str:
    return f"{at.astimezone(UTC):%Y-%m-%d %H:%M:%S} UTC"


def _day(at: datetime) -> str:
    return f"{at.astimezone(UTC):%Y-%m-%d}"


def _iso(at: datetime | None) -> str | None:
    return None if at is None else at.astimezone(UTC).isoformat()
