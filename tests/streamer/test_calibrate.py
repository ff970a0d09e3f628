"""Fitting a calibration: to faces whose similarities are drawn from known distributions, and to photos in folders."""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
from portraits import ASTRONAUT, FACES, portrait, write_embedder

from engines.load import load_engine
from engines.store import Model, default_store
from streamer import calibrate
from streamer.assembly import Networks
from streamer.calibrate import DRAWN, SIMILARITIES, Faces, embed, fit_faces, gather, make_identifier
from streamer.calibration import Calibration, CalibrationError, Network
from streamer.embedder import FaceEmbedder
from streamer.enrolment import Gate, Person
from streamer.identify import Identifier
from streamer.probes import Sample
from streamer.router import RestorerRouter

DIMENSIONS = 64
SPREAD = 1 / math.sqrt(DIMENSIONS)  # of the cosine of two random vectors
ALIKE = 0.4
TINY = Network(name="tiny", sha256="e" * 64)


@pytest.fixture(scope="module", autouse=True)
def few_redraws():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibrate, "REDRAWS", 40)
        yield


def drawn_people(people: int, alike: float = ALIKE) -> Faces:
    """Return people with two probes in each bin whose cosine to the reference is normal: `alike`, give or take SPREAD.

    Strangers are random directions: their cosine is all but normal too, with the same spread round 0.
    """
    rng = np.random.default_rng(0)
    references = unit(rng.normal(size=(people, DIMENSIONS)))
    owners = np.repeat(np.arange(people), 2 * len(DRAWN))
    bins = np.tile(np.repeat(np.arange(len(DRAWN)), 2), people)
    cosines = rng.normal(alike, SPREAD, len(owners)).clip(-0.99, 0.99)[:, None]
    aside = rng.normal(size=(len(owners), DIMENSIONS))
    aside = unit(aside - (aside * references[owners]).sum(1, keepdims=True) * references[owners])
    probes = cosines * references[owners] + np.sqrt(1 - cosines**2) * aside
    names = tuple(f"person {number}" for number in range(people))
    everywhere = np.ones(len(owners), bool)
    return Faces(names, references, probes, owners, everywhere, bins, np.full(len(owners), "none"))


def unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def true_ratio(similarity: float) -> float:
    """Return the log10 likelihood ratio of `drawn_people`: of two normal densities of one spread."""
    return (similarity * ALIKE - ALIKE**2 / 2) / SPREAD**2 / math.log(10)


def true_rate(similarity: float) -> float:
    """Return the share of strangers of `drawn_people` at least so alike."""
    return math.erfc(similarity / SPREAD / math.sqrt(2)) / 2


def fitted(faces: Faces) -> Calibration:
    return fit_faces(faces, embedder=TINY, restorers=(), data="drawn", terms="none", command="pytest")


@pytest.fixture(scope="module")
def many() -> Calibration:
    return fitted(drawn_people(160))


@pytest.fixture(scope="module")
def few() -> Calibration:
    return fitted(drawn_people(24))


@pytest.mark.parametrize("height", [14, 20, 30, 60])
def test_where_there_are_data_the_ratio_is_the_true_one_and_its_interval_holds_it(many: Calibration, height: float):
    for similarity in (0.1, 0.2, 0.3):
        ratio = many.llr(similarity, height)

        assert ratio.llr == pytest.approx(true_ratio(similarity), abs=0.3)
        assert ratio.low - 0.1 <= true_ratio(similarity) <= ratio.high + 0.1
        assert 0.05 < ratio.high - ratio.low < 1


def test_where_there_are_no_data_the_ratio_stays_at_what_they_support(many: Calibration, few: Calibration):
    for table, pairs in ((many, 160 * 159), (few, 24 * 23)):
        for each in table.bins:
            assert each.llr_bounds[1] <= math.log10(pairs + 1) < true_ratio(0.8)
            assert each.llr_bounds[0] >= -math.log10(each.mates + 1) > true_ratio(-0.5)
        assert table.llr(0.8, 20).llr == table.bins[1].llr_bounds[1]
        assert table.llr(-0.5, 20).llr == table.bins[1].llr_bounds[0]


def test_more_people_support_larger_ratios_and_narrow_their_intervals(many: Calibration, few: Calibration):
    for more, less in zip(many.bins, few.bins, strict=True):
        assert more.llr_bounds[1] > less.llr_bounds[1] + 0.3
        assert more.llr_bounds[0] < less.llr_bounds[0]
    at = SIMILARITIES.tolist().index(0.2)
    assert many.bins[0].llr_high[at] - many.bins[0].llr_low[at] < few.bins[0].llr_high[at] - few.bins[0].llr_low[at]


@pytest.mark.parametrize("people", [160, 24])
def test_false_matches_are_not_rarer_than_the_bound_says_nor_ever_impossible(request, people: int):
    table: Calibration = request.getfixturevalue("many" if people == 160 else "few")
    pairs = people * (people - 1)

    for similarity in (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6):
        bound = table.false_match_rate(similarity, 20)
        assert true_rate(similarity) < bound < 1.6 * true_rate(similarity) + 8 / pairs
    assert table.false_match_rate(1.0, 20) == pytest.approx(3 / pairs, rel=0.01)


def test_a_face_that_is_looked_at_often_makes_no_more_people_of_its_owner(few: Calibration):
    faces = drawn_people(24)
    rows = np.repeat(np.arange(len(faces.owners)), 5)
    often = replace(
        faces, probes=faces.probes[rows], owners=faces.owners[rows], mates=faces.mates[rows], bins=faces.bins[rows],
        routes=faces.routes[rows],
    )  # fmt: skip

    again = fitted(often)

    assert again.bins[0].strangers == 5 * few.bins[0].strangers
    assert again.bins[0].strangers_above_high == pytest.approx(few.bins[0].strangers_above_high)
    assert again.bins[0].llr_bounds[1] == pytest.approx(few.bins[0].llr_bounds[1], abs=0.1)


def test_the_same_faces_give_the_same_table(few: Calibration):
    assert fitted(drawn_people(24)).bins == few.bins


def test_an_embedder_by_which_people_are_less_like_themselves_than_others_tells_nothing():
    table = fitted(drawn_people(24, alike=-0.2))

    assert all(table.llr(similarity, 20).llr == 0 for similarity in (-1, 0, 1))


def test_wrong_names_among_the_photos_do_not_blunt_what_the_others_tell():
    faces = drawn_people(120)
    wrong = faces.owners < 6
    mixed = faces.probes.copy()
    mixed[wrong] = np.roll(mixed[wrong], 2 * len(DRAWN), axis=0)  # each has another one's

    table = fitted(replace(faces, probes=mixed))

    for each in table.bins:
        assert each.calibrator == "isotonic"
        assert each.llr[SIMILARITIES.tolist().index(0.3)] == pytest.approx(true_ratio(0.3), abs=0.4)


def test_too_few_people_with_two_photos_are_refused_whatever_else_there_is():
    faces = drawn_people(40)
    alone = faces.owners >= 19

    with pytest.raises(CalibrationError, match=r"12 px: 19 people with two photos that can be used; at least 20"):
        fitted(replace(faces, mates=~alone))


def test_part_of_the_people_are_compared_among_each_other_only():
    faces = drawn_people(6)

    some = faces.among(np.array([False, True, False, True, True, False]))

    assert some.people == ("person 1", "person 3", "person 4")
    for name, reference in zip(some.people, some.references, strict=True):
        np.testing.assert_array_equal(reference, faces.references[faces.people.index(name)])
    np.testing.assert_array_equal(np.unique(some.owners), [0, 1, 2])
    np.testing.assert_array_equal(some.probes[some.owners == 1], faces.probes[faces.owners == 3])


# Photos.


@pytest.fixture(scope="module")
def gate(tmp_path_factory: pytest.TempPathFactory) -> Gate:
    detector = Networks(default_store(), threads=1).detector("centerface", size=320)
    model = Model.read(write_embedder(tmp_path_factory.mktemp("networks") / "tiny.onnx", detector))
    return Gate(detector, FaceEmbedder(load_engine(model, backend="onnxruntime", threads=1)))


@pytest.fixture(scope="module")
def identifier(gate: Gate) -> Identifier:
    return make_identifier(RestorerRouter("none", max_size=256), {}, gate.embedder)


@pytest.fixture
def sample(gate: Gate) -> Callable[..., Sample]:
    """Make a photo of somebody in the group, lit differently from photo to photo."""

    def make(who: str, number: int = 1, height: float | None = None) -> Sample:
        image = cv2.convertScaleAbs(portrait(who), alpha=1 - 0.1 * number)
        if height:
            size = round(height / (FACES[who][3] - FACES[who][1]) * image.shape[0])
            image = cv2.resize(image, (size * image.shape[1] // image.shape[0], size), interpolation=cv2.INTER_AREA)
        found = gate._detector.detect([image])[0]
        return Sample(who, f"{who}/{number}.png", image, found.boxes[0], found.landmarks[0])

    return make


def test_the_first_photo_stands_for_a_person_and_the_others_are_made_into_what_cameras_give(
    identifier: Identifier, gate: Gate, sample: Callable[..., Sample], tmp_path: Path
):
    photos = [sample("centre", number) for number in (1, 2, 3)]
    path = tmp_path / "1.png"
    cv2.imwrite(str(path), photos[0].image)

    faces = embed(photos, identifier)

    assert faces.people == ("centre",) and faces.mates.all()
    np.testing.assert_allclose(faces.references[0], gate.examine(path).embedding, atol=1e-5)
    assert faces.bins.tolist() == [0, 1, 2, 3, 0, 1, 2, 3], "each other photo once in each bin"
    own = faces.probes @ faces.references[0]
    assert own[faces.bins == 3].mean() > own[faces.bins == 0].mean(), "small faces with noise are less alike"
    np.testing.assert_array_equal(embed(photos, identifier).probes, faces.probes)


def test_who_has_one_photo_is_probe_and_enrolled_by_it_but_no_mate(
    identifier: Identifier, sample: Callable[..., Sample]
):
    faces = embed([sample("centre"), sample("left"), sample("left", 2)], identifier)

    assert faces.people == ("centre", "left") and len(faces.references) == 2
    assert not faces.mates[faces.owners == 0].any() and faces.mates[faces.owners == 1].all()
    assert faces.bins[faces.owners == 0].tolist() == [0, 1, 2, 3]


def test_a_photo_is_not_enlarged_into_a_bin_that_its_face_does_not_reach(
    identifier: Identifier, sample: Callable[..., Sample]
):
    small = sample("centre", 2, height=30)

    faces = embed([sample("centre"), small], identifier)

    assert 24 < small.height < 48
    assert faces.bins.tolist() == [0, 1, 2]


def test_probes_are_restored_where_the_router_says_so_and_fused(gate: Gate, sample: Callable[..., Sample]):
    restorer = Networks(default_store(), threads=1).restorer("sgen-small", max_size=64)
    assert restorer is not None
    scales = restorer.engine.card.scales
    router = RestorerRouter("sgen-small", max_size=64, least_scale=min(scales))
    photos = [sample("centre"), sample("centre", 2)]

    restored = embed(photos, make_identifier(router, {"sgen-small": restorer}, gate.embedder))
    plain = embed(photos, make_identifier(RestorerRouter("none", max_size=64), {}, gate.embedder))

    assert restored.routes.tolist() == ["sgen-small", "sgen-small", restored.routes[2], "none"], "the last is too large"
    assert (np.abs(restored.probes[:2] - plain.probes[:2]).max(1) > 0.001).all()
    np.testing.assert_array_equal(restored.probes[3], plain.probes[3])
    np.testing.assert_allclose(np.linalg.norm(restored.probes, axis=1), 1, rtol=1e-5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 25 people with two photos, made of 5 by exchanging colours and sides; one has a photo of a wall."""
    folder = tmp_path_factory.mktemp("people")
    images = {"astronaut": ASTRONAUT[:300, 60:400], **{who: portrait(who) for who in FACES if who != "aside"}}
    for who, image in images.items():
        for name, other in {
            "": image, " blue": image[..., ::-1], " mirrored": image[:, ::-1], " green": image[..., [1, 0, 2]],
            " red": image[..., [0, 2, 1]],
        }.items():  # fmt: skip
            (folder / f"{who}{name}").mkdir()
            for number in (1, 2):
                lit = cv2.convertScaleAbs(np.ascontiguousarray(other), alpha=1 - 0.1 * number)
                assert cv2.imwrite(str(folder / f"{who}{name}" / f"{number}.png"), lit)
    assert cv2.imwrite(str(folder / "left" / "3.png"), np.full((200, 200, 3), 90, np.uint8))
    return folder


def test_a_table_is_fitted_to_a_folder_and_tells_what_it_rests_on(
    folder: Path, gate: Gate, identifier: Identifier, caplog: pytest.LogCaptureFixture, tmp_path: Path
):
    told: list[str] = []

    with caplog.at_level(logging.WARNING):
        table = calibrate.calibrate(
            gather(folder), gate, identifier, data="pytest", command="streamer calibrate",
            tell=lambda person, path: told.append(f"{person.name}/{path.name}"),
        )  # fmt: skip
    table.write(tmp_path / "tiny.calibration.json")
    read = Calibration.read(tmp_path / "tiny.calibration.json", embedder_sha256=gate.embedder.engine.sha256)

    assert read.bins == table.bins
    assert len(told) == 51 and told.count("left/3.png") == 1
    assert [each for each in caplog.messages if "left out" in each] == [
        f"left out: {folder / 'left' / '3.png'}: no face found"
    ]
    assert (table.people, table.embedder.name, table.restorers, table.routes) == (25, "tiny", (), {"none": 25 * 4})
    assert all((each.mates, each.people, each.strangers) == (25, 25, 25 * 24) for each in table.bins)
    assert table.llr(0.95, 60).llr > 0 > table.llr(0.0, 60).llr


def test_too_few_people_are_refused_before_any_photo_is_read(folder: Path, gate: Gate, identifier: Identifier):
    people = [*gather(folder)[:19], *(Person(f"alone {number}", (Path("nowhere.png"),)) for number in range(9))]

    with pytest.raises(CalibrationError, match="19 people with two photos or more; at least 20 are needed"):
        calibrate.calibrate(people, gate, identifier, data="", command="")


def test_photos_without_a_face_leave_too_few_people_in_one_line(tmp_path: Path, gate: Gate, identifier: Identifier):
    for number in range(20):
        (tmp_path / f"wall {number}").mkdir()
        for name in ("1.png", "2.png"):
            cv2.imwrite(str(tmp_path / f"wall {number}" / name), np.full((64, 64, 3), 90, np.uint8))

    with pytest.raises(CalibrationError, match=r"^no face to calibrate by$"):
        calibrate.calibrate(gather(tmp_path), gate, identifier, data="", command="")


def test_of_a_folder_those_with_two_photos_come_first_with_a_few_each(tmp_path: Path):
    for name, count in {"a": 1, "b": 9, "c": 2}.items():
        (tmp_path / name).mkdir()
        for number in range(count):
            (tmp_path / name / f"{number}.jpg").touch()

    assert [(person.name, len(person.photos)) for person in gather(tmp_path)] == [("b", 4), ("c", 2), ("a", 1)]


def test_a_folder_that_holds_no_people_is_refused_in_one_line(tmp_path: Path):
    with pytest.raises(CalibrationError, match=r"none: no such folder$"):
        gather(tmp_path / "none")
    with pytest.raises(CalibrationError, match=r"no folder of a person in it$"):
        gather(tmp_path)
    for name in ("a", "b", "c"):
        (tmp_path / name).mkdir()
    with pytest.raises(CalibrationError, match=r"a: no photo in this folder, and 2 more$"):
        gather(tmp_path)


def test_without_lir_it_is_told_how_to_get_it(monkeypatch: pytest.MonkeyPatch, gate: Gate, identifier: Identifier):
    monkeypatch.setitem(sys.modules, "lir.algorithms.bayeserror", None)

    with pytest.raises(CalibrationError, match=r"^fitting needs lir: pip install 'streamer\[train\]'$"):
        calibrate.calibrate([], gate, identifier, data="", command="")
