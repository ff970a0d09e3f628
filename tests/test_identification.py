"""The figures of docs/identification.py: on scores whose answer is known, and on people drawn from known laws."""

from __future__ import annotations

import importlib
import math
import sys
import tarfile
from dataclasses import replace
from datetime import date
from pathlib import Path
from statistics import NormalDist
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
from matches import matched

from streamer.calibration import Calibration, HeightBin, Network
from streamer.probes import Sample

sys.path.insert(0, str(Path(__file__).parents[1] / "docs"))  # the scripts there find each other so
fit_calibration = importlib.import_module("fit_calibration")
identification = importlib.import_module("identification")
people = importlib.import_module("people")

Ranking, redraws = identification.Ranking, identification.redraws
alarms, misses, thresholds = identification.alarms, identification.misses, identification.thresholds


def ranking(mates: list[tuple[int, int, float]], nonmates: list[float]) -> Ranking:
    """Of mates as (whose, who is on top, similarity); the tops of non-mates fall on the identities in turn."""
    owners, tops, similarities = (list(column) for column in zip(*mates, strict=True))
    count = len(nonmates)
    return Ranking(
        np.array([*tops, *(number % (max(owners) + 1) for number in range(count))]),
        np.array([*similarities, *nonmates]), np.array([*owners, *[-1] * count]),
        np.array([*[-1] * len(mates), *range(count)]),
    )  # fmt: skip


def once(identities: int, nonmates: int) -> identification.Weights:
    return redraws(identities, nonmates, 0)


# Thresholds and rates.


def test_fnir_at_fpir_is_the_share_of_mates_not_above_what_so_many_non_mates_reach():
    found = ranking([(0, 0, 0.95), (1, 1, 0.85), (2, 2, 0.75), (3, 3, 0.8)], [n / 10 for n in range(1, 11)])
    weights = once(4, 10)

    above = thresholds(found, weights, 0.2)

    assert above == pytest.approx(0.8, abs=1e-5)  # 0.9 and 1.0 lie above
    assert alarms(found, weights, above) == pytest.approx(0.2)
    assert misses(found, weights, above) == pytest.approx(0.5)  # also who is just on it


def test_a_probe_with_somebody_elses_identity_on_top_is_missed_however_alike_it_is():
    found = ranking([(0, 0, 0.9), (1, 0, 0.99)], [0.1, 0.2])
    weights = once(2, 2)

    assert misses(found, weights, np.array([-1.0])) == pytest.approx(0.5)
    assert identification._alerted(found, weights, np.array([0.95])) == pytest.approx(0.5)


@pytest.mark.parametrize("share", [0.0, 0.003, 0.01, 0.05, 0.3])
def test_never_more_alarms_than_asked_for_whatever_is_tied(share):
    rng = np.random.default_rng(0)
    found = ranking([(n, n, 0.5) for n in range(20)], rng.choice([0.1, 0.2, 0.3, 0.4], 500).tolist())
    weights = redraws(20, 500)

    above = thresholds(found, weights, share)

    assert (alarms(found, weights, above) <= share + 1e-9).all()


def test_a_person_who_is_drawn_twice_counts_twice_and_one_who_is_not_drawn_not_at_all():
    found = ranking([(0, 0, 0.9), (1, 1, 0.1)], [0.8, 0.2, 0.3, 0.7])
    weights = identification.Weights(np.array([[1, 1], [2, 0]]), np.array([[1, 1, 1, 1], [1, 0, 3, 0]]))
    above = np.array([0.5, 0.5])

    assert misses(found, weights, above).tolist() == [0.5, 0.0]
    assert alarms(found, weights, above).tolist() == [0.5, 0.5]  # then 0.8 by an identity drawn twice, of 4 non-mates


def test_the_first_row_is_everybody_once_and_redraws_keep_their_number():
    weights = redraws(30, 50)

    assert (weights.enrolled[0] == 1).all() and (weights.strangers[0] == 1).all()
    assert (weights.enrolled.sum(1) == 30).all() and (weights.strangers.sum(1) == 50).all()
    assert len(weights.enrolled) == identification.REDRAWS + 1


def test_intervals_contain_the_truth_about_as_often_as_they_say():
    """Each person has a mean of their own, so that photos of one person are no independent draws."""
    rng, share, identities, nonmates, photos = np.random.default_rng(1), 0.03, 200, 1000, 3
    threshold = NormalDist(0.3, 0.05).inv_cdf(1 - share)
    truth = NormalDist(0.45, math.hypot(0.08, 0.05)).cdf(threshold)
    weights, owners = redraws(identities, nonmates), np.repeat(np.arange(identities), photos)
    inside = 0
    for _ in range(40):
        own = rng.normal(0.45, 0.08, identities)[owners] + rng.normal(0, 0.05, len(owners))
        found = Ranking(
            np.concatenate([owners, rng.integers(identities, size=nonmates)]),
            np.concatenate([own, rng.normal(0.3, 0.05, nonmates)]),
            np.concatenate([owners, np.full(nonmates, -1)]),
            np.concatenate([np.full(len(owners), -1), np.arange(nonmates)]),
        )
        rates = misses(found, weights, thresholds(found, weights, share))
        low, high = np.quantile(rates[1:], (0.025, 0.975))
        inside += low <= truth <= high

    assert inside >= 33


# One method against another.


def four_bins(routed: float, *, louder: float = 0.0) -> dict[tuple[int, str], Ranking]:
    """Raw, and routed whose mates are so much more alike; non-mates are `louder`."""
    rng = np.random.default_rng(2)
    owners = np.repeat(np.arange(100), 2)
    rankings = {}
    for number in range(4):
        mates, others = rng.normal(0.35, 0.1, 200), rng.normal(0.2, 0.05, 600)
        tops = np.concatenate([owners, rng.integers(100, size=600)])
        of = np.concatenate([owners, np.full(600, -1)]), np.concatenate([np.full(200, -1), np.arange(600)])
        for method, more, loud in (("raw", 0.0, 0.0), ("routed and fused", routed, louder)):
            rankings[number, method] = Ranking(tops, np.concatenate([mates + more, others + loud]), *of)
    return rankings


def test_a_method_that_helps_in_every_bin_is_said_to_gain_and_not_to_lose():
    rates = identification.Rates.of(four_bins(0.08), redraws(100, 600))

    loss = identification.Loss.of(rates.own, 0, 0.03)

    assert loss.least < loss.mean < loss.most < 0
    assert not [line for line in identification.verdicts(rates) if "does not hold" in line]


def test_a_method_that_harms_is_said_to_lose():
    rates = identification.Rates.of(four_bins(-0.05), redraws(100, 600))

    lines = identification.verdicts(rates)

    assert identification.Loss.of(rates.own, 2, 0.01).most > identification.MOST_LOSS
    assert all(line.count("does not hold") == 2 for line in lines) and len(lines) == 6


def test_the_same_method_twice_differs_by_nothing():
    rates = identification.Rates.of(four_bins(0.0), redraws(100, 600))

    assert str(identification.Loss.of(rates.own, 1, 0.01)) == "+0.000 (+0.000 to +0.000)"


def test_louder_strangers_cost_nothing_at_an_own_threshold_and_alarms_at_a_common_one():
    rates = identification.Rates.of(four_bins(0.05, louder=0.05), redraws(100, 600))

    alarms_then = rates.common_alarms[identification.ON_LARGE]
    assert identification.Loss.of(rates.own, 0, 0.03).mean == pytest.approx(0)
    assert alarms_then[3, "raw", 0.03][0] == pytest.approx(0.03)
    assert alarms_then[3, "routed and fused", 0.03][0] > 0.1


# The calibration.


DIMENSIONS, IDENTITIES, ALIKE = 64, 80, 0.4
SPREAD = 1 / math.sqrt(DIMENSIONS)


def unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def drawn(*, louder: float = 1.0) -> tuple[identification.Probes, np.ndarray]:
    """Probes and templates: cosines of strangers are normal round 0, those of mates round ALIKE.

    A part of what strangers share with all makes their cosines `louder` times as spread.
    """
    rng = np.random.default_rng(3)
    templates = unit(rng.normal(size=(IDENTITIES, DIMENSIONS)))
    owners = np.repeat(np.arange(IDENTITIES), 4)
    cosines = rng.normal(ALIKE, SPREAD, len(owners)).clip(-0.99, 0.99)[:, None]
    aside = rng.normal(size=(len(owners), DIMENSIONS))
    aside = unit(aside - (aside * templates[owners]).sum(1, keepdims=True) * templates[owners])
    mates = cosines * templates[owners] + np.sqrt(1 - cosines**2) * aside
    others = louder * unit(rng.normal(size=(1000, DIMENSIONS)))
    owner, stranger = np.append(owners, [-1] * 1000), np.append([-1] * len(owners), range(1000))
    embeddings = {identification.ROUTED: np.concatenate([mates, others]).astype(np.float32)}
    heights = np.full(len(owner), 20.0)
    return identification.Probes(
        owner, stranger, np.ones(len(owner), bool), heights, np.full(len(owner), ""), embeddings, {}
    ), templates


def true_calibration() -> Calibration:
    """What is known of `drawn`, as a table."""
    similarities = np.round(np.linspace(-1, 1, 201), 2)
    llr = ((similarities - ALIKE / 2) * ALIKE / SPREAD**2 / math.log(10)).clip(-1.5, 3)
    rng = np.random.default_rng(4)
    first = rng.normal(size=1_000_000)  # of a random direction's coordinates
    cosines = np.sort(first / np.sqrt(first**2 + rng.chisquare(DIMENSIONS - 1, len(first))))
    above = 1 - np.searchsorted(cosines, similarities) / len(cosines)
    columns = {name: tuple(llr.tolist()) for name in ("llr", "llr_low", "llr_high")}
    rates = {
        "strangers_above": tuple(above.tolist()),
        "strangers_above_high": tuple((above + 1e-9).clip(max=1).tolist()),
    }
    of_bin = HeightBin(
        least_px=0, mates=1, strangers=1, people=1, calibrator="logistic", llr_bounds=(-1.5, 3), **columns, **rates
    )
    return Calibration(
        schema="streamer.calibration/1", embedder=Network(name="tiny", sha256="e" * 64), restorers=(), routes={},
        data="drawn", terms="none", people=1, pairs=1, command="pytest", fitted_on=date(2026, 11, 22), streamer="0",
        similarities=tuple(similarities.tolist()), bins=(of_bin,),
    )  # fmt: skip


def ranked(probes: identification.Probes, templates: np.ndarray) -> Ranking:
    similarities = probes.embeddings[identification.ROUTED] @ templates.T
    return Ranking(similarities.argmax(1), similarities.max(1), probes.owners, probes.strangers)


def told_alarms(louder: float) -> list[identification.Alarms]:
    probes, templates = drawn(louder=louder)
    weights = redraws(IDENTITIES, 1000)
    heights = probes.heights[probes.owners < 0]
    return identification.expected_alarms(
        true_calibration(), heights, ranked(probes, templates), weights, IDENTITIES
    )  # fmt: skip


def test_a_true_calibration_expects_as_many_alarms_as_are_seen():
    told = told_alarms(1.0)

    assert [each.expected <= share for each, share in zip(told, identification.EXPECTED, strict=True)] == [True] * 4
    assert all(each.low <= each.expected <= each.high for each in told)


def test_a_calibration_of_quieter_strangers_expects_too_few():
    told = told_alarms(1.5)

    assert all(each.expected < each.low and each.bound < each.seen / each.of for each in told[:2])


def test_true_ratios_lie_within_the_intervals_of_what_is_found():
    probes, templates = drawn()

    bands = identification.reliability(true_calibration(), probes, templates, redraws(IDENTITIES, 1000))

    assert len(bands) >= 6
    assert sum(each.low - 0.05 <= each.told <= each.high + 0.05 for each in bands) >= len(bands) - 1
    assert sum(each.mates for each in bands) <= 4 * IDENTITIES


# What is looked at.


def sample(name: str = "lfw_test/Ada/1", height: float = 100) -> Sample:
    image = np.random.default_rng(0).integers(0, 256, (150, 150, 3), np.uint8)
    box = np.array([30, 20, 30 + height * 0.8, 20 + height], np.float32)
    points = np.array([[50, 60], [90, 60], [70, 80], [55, 100], [85, 100]], np.float32)
    return Sample(name.rpartition("/")[0], name, image, box, points)


def test_a_probe_lies_in_its_bin_and_is_the_same_each_time():
    for number, (least, most) in enumerate(identification.BINS):
        shot, again = (identification.Shot(sample(), number) for _ in range(2))

        assert least - 1 <= shot.crop.quality.face_height_px <= min(most, 100) + 1
        assert np.array_equal(shot.crop.image, again.crop.image)


def test_a_photo_too_small_for_a_bin_gives_no_probe_there():
    assert [shot.number for shot in identification.shots(sample(height=30))] == [0, 1, 2]


def test_of_some_mates_every_person_is_there_once_before_any_twice():
    photos = [sample(f"lfw_test/P{number}/{photo}") for number, count in enumerate((5, 1, 3)) for photo in range(count)]
    enrolled = [sample(f"lfw_test/P{number}/0") for number in range(3)]
    cast = identification.Cast(enrolled, photos, [sample(f"lfw_test/Q{number}/0") for number in range(10)])

    chosen = identification.evenly(cast, 3, 4)

    assert sorted(cast.owners[place] for place in chosen if place < len(photos)) == [0, 1, 2]
    assert sum(place >= len(photos) for place in chosen) == 4


def test_the_product_fuses_what_it_routes_and_the_crop_stands_where_a_result_would_be_too_large():
    raw, blind = np.array([1, 0], np.float32), np.array([0, 1], np.float32)
    cast = identification.Cast([sample("lfw_test/A/0")], [sample("lfw_test/A/1")], [sample("x/1"), sample("x/2")])
    parts = SimpleNamespace(tried={"sgen": None}, sampled={"slow": None})
    rows = [
        identification.Row(0, 20.0, "slow", raw, {"sgen": None, "slow": blind}, {"sgen"}),
        identification.Row(1, 20.0, "sgen", raw, {"sgen": blind, "slow": None}, {"sgen", "slow"}),
        identification.Row(2, 20.0, "none", raw, {"sgen": blind}, {"sgen"}),
    ]

    probes = identification._probes(cast, parts, rows)

    both = [math.sqrt(0.5)] * 2
    assert np.allclose(probes.embeddings["sgen"], [raw, blind, blind])
    assert np.allclose(probes.embeddings["sgen + raw"], [raw, both, both])
    assert np.allclose(probes.embeddings["routed and fused"], [both, both, raw])
    assert np.allclose(probes.embeddings["slow + raw"][1], raw)
    assert np.isnan(probes.embeddings["slow"][[0, 2]]).all(), "not of its sample, though one was routed there"
    assert probes.restored == {"sgen": 2, "slow": 0}
    assert probes.owners.tolist() == [0, -1, -1] and probes.strangers.tolist() == [-1, 0, 1]


@pytest.mark.parametrize(("height", "number"), [(8, 0), (12, 0), (15.9, 0), (16, 1), (47, 2), (48, 3), (300, 3)])
def test_a_passage_belongs_to_the_bin_of_its_largest_face(height, number):
    assert identification.bin_of(height) == number


def test_what_was_measured_is_not_measured_again(tmp_path):
    first = identification.Cache(tmp_path / "cache.npz")
    first.row("raw e", "0 a/b.jpg", lambda: np.arange(3.0))
    first.save()

    second = identification.Cache(tmp_path / "cache.npz")

    assert second.row("raw e", "0 a/b.jpg", lambda: pytest.fail("made again")).tolist() == [0, 1, 2]
    assert second.row("raw other", "0 a/b.jpg", lambda: [5.0]).tolist() == [5]
    assert second.spent_s >= first._spent


def test_who_is_held_out_is_read_and_nobody_is_fitted_on_them(tmp_path, monkeypatch):
    names = [f"{number}.jpg" for number in range(4)]
    columns = ["face_x1", "face_y1", "face_x2", "face_y2"]
    columns += [f"{point}_{axis}" for point in ("le", "re", "nose", "lm", "rm") for axis in "xy"]
    (tmp_path / "calibration.txt").write_text("".join(f"faces_unlabelled {name}\n" for name in names[:3]))
    (tmp_path / "faces_unlabelled.csv").write_text(
        "\n".join([",".join(["file", *columns]), *(",".join([name, *["10"] * len(columns)]) for name in names)]) + "\n"
    )
    cv2.imwrite(str(tmp_path / "face.jpg"), np.zeros((20, 20, 3), np.uint8))
    with tarfile.open(tmp_path / "faces_unlabelled.tar", "w") as tar:
        for name in names:
            tar.add(tmp_path / "face.jpg", name)
    monkeypatch.setattr(people, "HELD_OUT", 2)

    found = people.load_held_out(tmp_path)

    assert len(found) == 2 and {each.person for each in found} == people.held_out(tmp_path)
    assert {each.name for each in found} < {f"faces_unlabelled/{name}" for name in names[:3]}


# Whether guides leak.


def test_what_a_guide_drew_is_no_difference_and_all_else_is():
    face = matched()
    (identity, score), *_ = face.scores.items()

    assert identification.same_but_guided(face, face)
    assert identification.same_but_guided(face, replace(face, scores={identity: replace(score, guided=0.1)}))
    assert not identification.same_but_guided(
        face, replace(face, scores={identity: replace(score, llr=score.llr + 1e-9)})
    )
    assert not identification.same_but_guided(face, replace(face, match=None))
    assert not identification.same_but_guided(face, matched(seed=1))


def leak(compared: list[float]) -> identification.Leak:
    """Two mates and two non-mates, all alerted by what was drawn, one mate and one non-mate by fused."""
    fused, drawn_ = np.array([0.9, 0.1, 0.8, 0.1]), np.full(4, 0.95)
    of = np.array([0, 1, 0, 1]), np.array([0, 1, -1, -1]), np.array([-1, -1, 0, 1])
    tops, owners, strangers = of
    return identification.Leak(
        1, np.array(compared), fused > 0.5, Ranking(tops, fused, owners, strangers),
        Ranking(tops, drawn_, owners, strangers), np.full(identification.REDRAWS + 1, 0.5),
    )  # fmt: skip


def test_one_probe_that_differs_with_guides_is_told_and_so_is_what_the_guided_picture_alerts():
    same, other = (
        "\n".join(identification.leak_lines([leak(compared)], redraws(2, 2)))
        for compared in ([1, 1, 1, 1], [1, 1, 1, 0])
    )

    assert "for 2 of 2 non-mates and 2 of 2 mates" in same and "nothing **holds**" in same
    assert "for 1 of 2 non-mates and 2 of 2 mates" in other and "nothing **does not hold**" in other
    assert "| non-mates alerted, fused | 0.500" in same
    assert "| non-mates alerted, guided picture | 1.000" in same
    assert "| mates alerted as themselves, guided picture | 1.000" in same


def test_passages_are_counted_at_the_threshold_of_their_size_and_beside_what_was_expected():
    rates = identification.Rates.of(four_bins(0.05), redraws(100, 600))
    above = float(rates.thresholds[1, identification.ROUTED, 0.01][0])
    passages = {
        "hall": [identification.Passage(20, above + 0.01, 2), identification.Passage(20, above - 0.01, 1)],
        "yard": [],
    }

    lines = identification.passage_lines(passages, rates, true_calibration(), IDENTITIES)

    rows = [line.split(" | ") for line in lines if line.startswith("| ")]
    assert [row[:3] for row in rows[1:]] == [["| hall", "2", "3"], ["| yard", "0", "0"], ["| all", "2", "3"]]
    assert [row[4].partition(",")[0] for row in rows[1:]] == ["1", "0", "1"]
    rate = true_calibration().false_match_rate(above, 20)
    assert rows[1][4] == f"1, {2 * (1 - (1 - rate) ** IDENTITIES):.2f}"


def test_the_report_has_every_method_in_every_bin_and_says_what_was_not_measured():
    probes, templates = drawn()
    probes.embeddings["raw"] = probes.embeddings["sgen"] = probes.embeddings["sgen + raw"] = probes.embeddings[
        identification.ROUTED
    ]
    probes.restored["sgen"] = 7
    weights = redraws(IDENTITIES, 1000)
    rankings = {(number, method): ranked(probes, templates) for number in range(4) for method in probes.embeddings}
    parts = SimpleNamespace(tried={"sgen": None}, sampled={})

    rates = identification.Rates.of(rankings, weights)
    lines = identification.identified_lines(parts, [probes] * 4, rankings, rates, weights)

    for method in ("raw", "sgen", "sgen + raw", "routed and fused"):
        rows = [line for line in lines if line.startswith(f"| {method} | 0.")]
        assert len(rows) >= 4 and all(row.count("|") == 6 for row in rows)
    assert any("12 to 16 px: 3, 16 to 24 px: 3" in line and "no claim" in line for line in lines)
    assert "no calibration" in identification.calibration_lines(None, [], {}, None, weights)[-1]
    assert "| found | 0.75 (3 of 4) |" in identification.found_lines([(3, 4)])[-1]


def test_strangers_are_told_by_the_sets_that_they_are_of():
    rng = np.random.default_rng(0)
    alike = np.eye(8)[0] * 3 + rng.standard_normal((60, 8))
    apart = rng.standard_normal((60, 8))
    references = np.concatenate([alike, apart])
    references /= np.linalg.norm(references, axis=1, keepdims=True)
    people = tuple([f"one/{n}" for n in range(60)] + [f"two/{n}" for n in range(60)])

    lines = fit_calibration.strangers_by_set(SimpleNamespace(people=people, references=references))

    rows = [line.strip("| ").split(" | ") for line in lines if line.startswith(("| one", "| two"))]
    shares = {sets: float(share) for sets, _, share in rows}
    assert set(shares) == {"one, one", "one, two", "two, two"}
    assert shares["one, one"] > 0.002 > shares["two, two"] >= shares["one, two"] == 0
