"""Scores and the decision: on fused similarity alone, over a track, and no more than is known."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from datetime import UTC, datetime

import numpy as np
import pytest

from streamer import scoring
from streamer.gallery import Snapshot, WatchList
from streamer.scoring import Scored, Scorer, decide, fuse
from streamer.types import Crop, Embeddings, Moment, Quality, Track

WANTED = WatchList("wanted", "search", "warrant", threshold=0.5, priority=2, id="1" * 16)
GUESTS = WatchList("guests", "welcome", "consent", threshold=0.3, priority=1, id="2" * 16)


def unit(*numbers: float) -> np.ndarray:
    vector = np.array([*numbers, *[0.0] * (4 - len(numbers))], np.float32)
    return vector / np.linalg.norm(vector)


def enrolled(**lists: tuple[WatchList, ...]) -> Snapshot:
    """Ada, Bob and Cy, each along one axis; Ada has a second photo."""
    people = {"ada": frozenset({WANTED.id}), "bob": frozenset({GUESTS.id, WANTED.id})}
    templates = np.stack([unit(1), unit(1, 0, 0, 0.2), unit(0, 1), unit(0, 0, 1)])
    return Snapshot(
        templates, ["ada1", "ada2", "bob1", "cy1"], ["ada", "ada", "bob", "cy"],
        lists=lists.get("lists", (WANTED, GUESTS)), members=people,
    )  # fmt: skip


def crop(track: int = 1, *, pts: float = 0.0, height: float = 40.0, camera: str = "door") -> Crop:
    moment = Moment(camera, round(pts * 10), pts, datetime.fromtimestamp(pts, UTC), "file")
    seen = Track(track, moment, np.array([0, 0, 30, height], np.float32), np.zeros((5, 2), np.float32), 0.9)
    quality = Quality(height, height / 2, 0.5, 1.0, 0.0, 0.0, 0.0)
    return Crop(seen, np.zeros((64, 64, 3), np.uint8), np.eye(2, 3), quality)


def score(scorer: Scorer, embeddings: Embeddings, here: Crop | None = None, who: Snapshot | None = None) -> Scored:
    return scorer.score([here or crop()], [embeddings], who or enrolled())[0]


class Tables:
    """What a calibration says, in a form that can be checked by hand."""

    def bin(self, face_height_px: float) -> int:
        return 0 if face_height_px < 24 else 1

    def llr(self, similarity: float, face_height_px: float) -> Tables.Ratio:
        return self.Ratio(10 * similarity + self.bin(face_height_px))

    def expected_false_alarms(self, similarity: float, identities: int, passages_per_day: Mapping[int, float]) -> float:
        self.asked = similarity, identities, dict(passages_per_day)
        return 0.25

    class Ratio:
        def __init__(self, llr: float) -> None:
            self.llr, self.low, self.high = llr, llr - 1, llr + 1


def test_fused_is_the_unit_mean_and_the_raw_one_where_nothing_was_restored():
    assert fuse(Embeddings(unit(1), unit(0, 1))) == pytest.approx(unit(1, 1))
    assert np.array_equal(fuse(Embeddings(unit(1), None)), unit(1))


def test_a_match_rests_on_fused_and_names_photo_list_and_runner_up():
    found = score(Scorer(), Embeddings(unit(1, 0.1, 0, 0.2), unit(1, 0.3, 0, 0.2)))

    assert found.match is not None
    assert (found.match.identity, found.match.photo, found.match.list) == ("ada", "ada2", WANTED.id)
    assert found.match.similarity == found.scores["ada"].fused
    assert found.match.similarity == pytest.approx(float(found.face.embedding @ unit(1, 0, 0, 0.2)), abs=1e-6)
    assert found.match.threshold == 0.5
    assert found.match.runner_up == ("bob", pytest.approx(float(found.face.embedding @ unit(0, 1)), abs=1e-6))
    assert found.match.expected_false_alarms_per_day is None


def test_nobody_is_matched_who_is_below_every_threshold_of_his_lists():
    assert score(Scorer(), Embeddings(unit(0.4, 0, 0, -0.9), None)).match is None


def test_where_somebody_on_no_list_is_more_alike_nobody_is_accused():
    face = unit(0.6, 0, 0.75)

    found = score(Scorer(), Embeddings(face, None))

    assert float(face @ unit(1)) > WANTED.threshold
    assert found.match is None
    assert list(found.scores) == ["ada"], "the score is told all the same"


def test_of_two_lists_the_one_of_higher_priority_tells_if_its_threshold_is_reached():
    sure, unsure = Embeddings(unit(0, 1), None), Embeddings(unit(0, 0.4, 0, 0.9), None)

    assert score(Scorer(), sure).match.list == WANTED.id
    assert score(Scorer(), unsure).match.list == GUESTS.id


def test_the_short_list_holds_who_is_near_a_threshold_and_says_nothing_of_others():
    found = score(Scorer(short_list_margin=0.1), Embeddings(unit(0.45, 0.15, 0.5, -0.7), None))
    far = score(Scorer(short_list_margin=0.1), Embeddings(unit(0.2, 0.1, 0.9), None))

    assert list(found.scores) == ["ada"]
    assert far.scores == {}


def test_an_expired_list_matches_nobody():
    assert score(Scorer(), Embeddings(unit(1), None), who=enrolled(lists=())).match is None


def test_raw_and_blind_are_told_beside_fused():
    raw, blind = unit(1, 0.5), unit(1, 0, 0.5)

    told = score(Scorer(), Embeddings(raw, blind)).scores["ada"]

    assert told.raw == pytest.approx(float(raw @ unit(1)), abs=1e-6)
    assert told.blind == pytest.approx(float(blind @ unit(1)), abs=1e-6)
    assert told.fused == pytest.approx(float(unit(1, 0.25, 0.25) @ unit(1)), abs=1e-3)
    assert told.guided is None


def test_a_tracks_crops_are_joined_by_their_height_and_those_of_others_are_not():
    scorer = Scorer()
    first = score(scorer, Embeddings(unit(1), None), crop(height=16))
    other = score(scorer, Embeddings(unit(0, 1), None), crop(track=2, height=16))
    second = score(scorer, Embeddings(unit(0, 1), None), crop(height=32))

    assert (first.face.crops, other.face.crops, second.face.crops) == (1, 1, 2)
    assert second.face.embedding == pytest.approx(unit(1, 2))
    assert second.face.height_px == 32


def test_a_track_that_ended_is_forgotten():
    scorer, here = Scorer(), crop()
    score(scorer, Embeddings(unit(1), None), here)
    scorer.end(here.track.moment, here.track.id)

    again = score(scorer, Embeddings(unit(0, 1), None), here)

    assert again.face.crops == 1
    assert again.face.embedding == pytest.approx(unit(0, 1))


def test_the_likelihood_ratio_is_that_of_fused_at_the_height_of_the_tracks_largest_face():
    scorer = Scorer(Tables())
    score(scorer, Embeddings(unit(1), None), crop(height=30))

    told = score(scorer, Embeddings(unit(1), None), crop(height=20)).scores["ada"]

    assert (told.llr, told.llr_low, told.llr_high) == pytest.approx((11, 10, 12))


def test_false_alarms_are_asked_for_with_the_list_and_the_cameras_own_traffic():
    tables = Tables()
    scorer = Scorer(tables, faces_per_day=240)
    for track in range(20):  # twenty an hour, three quarters of them small
        here = crop(track, pts=track * 360, height=20 if track % 4 else 40)
        score(scorer, Embeddings(unit(0, 0, 1), None), here)
        scorer.end(here.track.moment, track)
    score(scorer, Embeddings(unit(0, 0, 1), None), crop(99, camera="yard"))

    matched = score(scorer, Embeddings(unit(1), None), crop(21, pts=7200, height=40)).match

    assert matched.expected_false_alarms_per_day == 0.25
    similarity, identities, passages = tables.asked
    assert similarity == matched.similarity
    assert identities == 3, "photos of those on the list"
    hours = 7200 / 3600
    assert math.isclose(sum(passages.values()), 24 * (20 + 240 / 24) / (hours + 1), rel_tol=1e-6)
    assert passages[0] / sum(passages.values()) == pytest.approx(15 / 21)


def test_a_crop_that_waited_adds_no_time_to_what_was_looked_at_and_neither_does_a_stream_that_begins_anew():
    tables = Tables()
    scorer = Scorer(tables, faces_per_day=24)
    for track, pts in enumerate((0, 3600, 3598, 3600, 3599, 3600, 0, 1800)):  # an hour, then half of one
        score(scorer, Embeddings(unit(0, 0, 1), None), crop(track, pts=pts))

    score(scorer, Embeddings(unit(1), None), crop(99, pts=1800))

    assert sum(tables.asked[2].values()) == pytest.approx(24 * 1 / (1.5 + 1))


def test_traffic_is_what_is_assumed_until_there_is_any():
    tables = Tables()

    score(Scorer(tables, faces_per_day=500), Embeddings(unit(1), None))

    assert tables.asked[2] == {1: 500}


def test_the_decision_has_no_room_for_a_guided_score():
    """ARCHITECTURE, honest scores: the function that decides does not take one, nor does any of this module."""
    assert list(inspect.signature(decide).parameters) == ["found", "enrolled"]
    taken = {
        name
        for _, function in inspect.getmembers(scoring, inspect.isfunction)
        for name in inspect.signature(function).parameters
    }
    assert not {name for name in taken if "guide" in name}


def test_an_embedding_of_length_zero_in_the_mean_is_no_crash():
    opposite = Embeddings(unit(1), -unit(1))

    assert score(Scorer(), opposite).match is None
