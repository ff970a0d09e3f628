import pytest

torch = pytest.importorskip("torch", reason="the extra train is not installed")

from dataclasses import replace  # noqa: E402
from pathlib import Path  # noqa: E402

import cv2  # noqa: E402
import numpy as np  # noqa: E402
from skimage.data import astronaut  # noqa: E402

from models.dataset import Clean, Face, load_faces  # noqa: E402
from models.degradation import Shares  # noqa: E402
from models.gfrnet import PRESETS, Gfrnet, Guided, identity_flow  # noqa: E402
from models.gfrnet_losses import GuidedBatch  # noqa: E402
from models.guided import (  # noqa: E402
    GuidedBatches,
    GuidedDiet,
    GuidedFaces,
    GuidedValidation,
    covered,
    first_pairs,
    laid_onto,
    listed_pairs,
    ordered_pairs,
)
from models.losses import Judges  # noqa: E402

CPU = torch.device("cpu")
POINTS = np.array([[97.0, 105], [151, 103], [126, 133], [106, 164], [148, 162]], np.float32)  # of the astronaut
FACE = cv2.resize(astronaut()[0:224, 112:336, ::-1], (256, 256), interpolation=cv2.INTER_CUBIC)
DIET = GuidedDiet(
    side=64, surveillance_share=0.5, stranger_share=0.2, occluded_share=0.2, vary=True, damage=Shares(h264=0)
)


def face(name: str, *, side: int = 256) -> Face:
    """A photo of the person before the slash: every person has colours, every photo a brightness of its own."""
    person, photo = name.split("/")[1:]
    image = FACE[..., np.random.default_rng(ord(person)).permutation(3)] * (1 - 0.1 * int(photo))
    scale = side / 256
    box = (60 * scale, 50 * scale, 190 * scale, 210 * scale)
    return Face(name, person, cv2.resize(image.astype(np.uint8), (side, side)), box, POINTS * scale)


@pytest.fixture(scope="module")
def faces() -> GuidedFaces:
    names = ["p/a/0", "p/a/1", "p/b/0", "p/b/1", "p/b/2", "p/c/0"]
    return GuidedFaces([face(name, side=150 if name == "p/b/1" else 256) for name in names], CPU)


def batches(faces: GuidedFaces, batch: int = 4, seed: int = 0, rank: int = 0, **changes: object) -> GuidedBatches:
    return GuidedBatches(faces, replace(DIET, **changes), batch=batch, seed=seed, rank=rank)


def same(some: GuidedBatch, others: GuidedBatch) -> bool:
    names = ("degraded", "guide", "clean", "landmarks", "guide_landmarks")
    return all(torch.equal(getattr(some, name), getattr(others, name)) for name in names)


# Pairs


def test_the_pairs_are_all_of_two_different_faces_of_one_identity_in_both_orders():
    pairs = ordered_pairs(["ann", "bob", "ann", "carl", "bob", "ann"])

    assert {tuple(pair) for pair in pairs} == {(0, 2), (0, 5), (2, 0), (2, 5), (5, 0), (5, 2), (1, 4), (4, 1)}
    assert len(pairs) == 8


def test_the_real_faces_give_the_pairs_that_were_counted_and_none_is_too_small(shared):
    some = load_faces(shared / "data/faces_train.tar")
    more = some + load_faces(shared / "data/faces_train_extra.tar")

    assert len(ordered_pairs([face.identity for face in some])) == 28_738
    assert len(ordered_pairs([face.identity for face in more])) == 60_674
    assert min(min(face.image.shape[:2]) for face in more) >= GuidedFaces.SIDES[-1]


def test_pairs_are_found_over_all_sizes_at_which_faces_are_kept(faces):
    assert len(faces.groups) == 2

    named = {(faces.names[query], faces.names[guide]) for query, guide in faces.pairs}

    assert {("p/b/1", "p/b/0"), ("p/b/0", "p/b/1")} <= named
    assert len(named) == len(faces.pairs) == 2 + 6


def test_a_face_that_is_loaded_twice_is_no_guide_to_itself():
    twice = GuidedFaces([face("p/a/0"), face("p/a/1"), face("p/a/0")], CPU)

    assert sorted(twice.names[row] for row in twice.pairs.flatten()) == ["p/a/0"] * 2 + ["p/a/1"] * 2


def test_faces_of_which_no_two_are_of_one_person_are_refused():
    with pytest.raises(ValueError, match="none of 2 faces has a second of the same identity"):
        GuidedFaces([face("p/a/0"), face("p/b/0")], CPU)


def test_a_guide_is_another_face_of_the_same_person_and_a_stranger_s_only_in_its_share(faces):
    rng = np.random.default_rng(0)
    ours = batches(faces, batch=400, stranger_share=0.25)
    rows = np.concatenate([ours.rows(rng) for _ in range(10)])
    never = np.concatenate([batches(faces, batch=400, stranger_share=0).rows(rng) for _ in range(10)])

    assert (rows[:, 0] != rows[:, 1]).all()
    strange = faces.persons[rows[:, 0]] != faces.persons[rows[:, 1]]
    assert strange.mean() == pytest.approx(0.25, abs=0.03)
    assert "c" in faces.persons[rows[strange, 1]]  # who has one photo alone is a stranger to all
    assert (faces.persons[never[:, 0]] == faces.persons[never[:, 1]]).all()
    assert {tuple(pair) for pair in never} == {tuple(pair) for pair in faces.pairs}


def test_one_person_under_two_numbers_is_no_stranger_to_himself():
    names = ("c_07312", "c_07312", "c_07320", "c_07320", "c_07313", "c_07313")
    photos = [replace(face(f"p/a/{i}"), identity=identity) for i, identity in enumerate(names)]
    people = GuidedFaces(photos, CPU)

    strangers = people.strangers(np.random.default_rng(0), np.zeros(50, np.int64))

    assert len(people.pairs) == 6
    assert {people.identities[row] for row in strangers} == {"c_07313"}


def test_strangers_are_not_to_be_had_where_all_faces_are_of_one_person():
    alone = GuidedFaces([face("p/a/0"), face("p/a/1")], CPU)

    with pytest.raises(ValueError, match="stranger_share: all faces are of one person"):
        batches(alone)
    assert batches(alone, stranger_share=0)[0].guide.shape == (4, 3, 64, 64)


# Batches


def test_faces_kept_at_several_sizes_are_cut_each_as_it_would_be_alone(faces):
    rng, rows = np.random.default_rng(0), np.array([5, 0, 3, 5])  # the last row is of the smaller group

    together = faces.crops_of(rng, rows, 64, vary=False)

    for place, row in enumerate(rows):
        alone = faces.crops_of(rng, np.array([row]), 64, vary=False)
        assert torch.equal(together.images[place], alone.images[0])
        assert torch.equal(together.landmarks[place], alone.landmarks[0])
    assert not torch.equal(together.images[0], together.images[1])


def test_a_batch_is_a_function_of_seed_rank_and_step_alone(faces):
    ours, others = batches(faces), batches(faces)
    before = [ours[step] for step in range(6)]

    assert all(same(others[step], before[step]) for step in reversed(range(6)))
    assert not any(same(before[0], batch) for batch in before[1:])
    for changed in (batches(faces, seed=1), batches(faces, rank=1)):
        assert not any(same(changed[step], before[step]) for step in range(6))


@pytest.mark.parametrize("share", [0.0, 1.0], ids=["of the paper", "of cameras"])
def test_all_images_of_a_batch_have_one_size_and_whole_grey_levels(faces, share):
    batch = batches(faces, surveillance_share=share)[0]

    for images in (batch.degraded, batch.guide, batch.clean):
        levels = (images + 1) * 127.5
        assert images.shape == (4, 3, 64, 64)
        assert images.abs().max() <= 1
        assert (levels - levels.round()).abs().max() < 1e-3
    assert (batch.degraded - batch.clean).abs().flatten(1).mean(dim=1).min() > 0.01


def test_face_and_guide_are_framed_each_on_its_own_and_mirrored_alike():
    profile = POINTS + np.eye(5, dtype=np.float32)[2][:, None] * (25, 0)  # looks to the right, until mirrored
    people = GuidedFaces([replace(face(f"p/a/{i}"), landmarks=profile) for i in (0, 1)], CPU)

    batch = batches(people, batch=64, stranger_share=0)[0]

    landmarks = torch.stack([batch.landmarks, batch.guide_landmarks])  # (2, 64, 5, 2)
    eyes = landmarks[..., 1, :] - landmarks[..., 0, :]
    to_nose = landmarks[..., 2, :] - landmarks[..., :2, :].mean(dim=-2)
    looks_right = (to_nose * eyes).sum(dim=-1) > 0
    assert torch.equal(looks_right[0], looks_right[1])
    assert 0.25 < looks_right[0].float().mean() < 0.75
    assert (eyes[..., 0] > 0).all()
    apart = eyes.norm(dim=-1)
    assert apart.std(dim=1).min() > 1
    assert torch.corrcoef(apart)[0, 1].abs() < 0.4


def test_a_guide_that_is_laid_onto_a_face_shows_it_where_the_face_is():
    people = GuidedFaces([face("p/a/0"), face("p/a/1")], CPU)
    upright = people.crops_of(np.random.default_rng(0), np.array([0]), 128, vary=False)
    askew = people.crops_of(np.random.default_rng(3), np.array([0]), 128)

    laid = laid_onto(upright.landmarks, askew)

    middle = slice(36, 92)  # beyond it the edge may be replicated
    far = (askew.images - upright.images)[..., middle, middle].abs().mean()
    assert far > 8
    assert (laid.images - upright.images)[..., middle, middle].abs().mean() < far / 4
    assert (laid.landmarks - upright.landmarks).abs().max() < 1e-3
    assert (askew.landmarks - upright.landmarks).abs().max() > 2
    assert torch.equal(laid.images, laid.images.round())


@pytest.mark.parametrize("unknown", ["face", "guide"])
def test_a_guide_of_unknown_landmarks_stays_as_it_is(unknown):
    points = torch.tensor(POINTS)[None]
    lost = torch.full_like(points, torch.nan)
    guide = Clean(torch.rand(1, 3, 64, 64), lost if unknown == "guide" else points / 4)

    laid = laid_onto(lost if unknown == "face" else points / 3, guide)

    assert torch.equal(laid.images, guide.images)
    assert torch.equal(laid.landmarks.isnan(), guide.landmarks.isnan())


def test_where_the_network_wants_it_every_guide_of_a_batch_is_laid_onto_its_face(faces):
    """Off by what a detector would be off by, and no more."""

    def apart(batch: GuidedBatch) -> torch.Tensor:
        eyes = (batch.landmarks[:, 0] - batch.landmarks[:, 1]).norm(dim=1)
        return (batch.guide_landmarks - batch.landmarks).norm(dim=2).mean(dim=1) / eyes

    as_it_is, laid, exact = (batches(faces, batch=32, **changes)[0]
                             for changes in ({}, {"laid": True}, {"laid": True, "astray": 0.0}))  # fmt: skip

    assert apart(exact).max() < 1e-3
    assert 0.005 < apart(laid).mean() < 0.04
    assert apart(as_it_is).mean() > 0.1
    assert torch.equal(as_it_is.degraded, laid.degraded)


def test_a_guide_is_covered_in_its_share_and_in_part():
    images = torch.rand(200, 3, 32, 32) * 100 + 100

    hidden = covered(np.random.default_rng(0), images, 0.3)

    changed = (hidden != images).any(dim=1).flatten(1).float().mean(dim=1)
    assert (changed > 0).float().mean() == pytest.approx(0.3, abs=0.1)
    assert changed[changed > 0].min() > 0.02
    assert changed.max() < 0.6
    assert torch.equal(covered(np.random.default_rng(0), images, 0.0), images)


def test_a_face_that_must_be_restored_is_never_covered(faces):
    settings = {"stranger_share": 0, "vary": False, "surveillance_share": 0}
    bare, hidden = (batches(faces, occluded_share=share, **settings)[0] for share in (0.0, 1.0))

    assert torch.equal(bare.clean, hidden.clean)
    assert torch.equal(bare.degraded, hidden.degraded)
    assert (bare.guide != hidden.guide).flatten(1).any(dim=1).all()


# Lists


def test_the_real_lists_name_faces_of_their_sets(shared):
    faces = GuidedFaces(load_faces(shared / "data/faces_val.tar"), CPU)

    pairs = listed_pairs(shared / "data/guided_val.txt", faces, "faces_val")

    assert len(pairs) == 289
    assert {tuple(pair) for pair in pairs} <= {tuple(pair) for pair in faces.pairs}
    assert len(set(pairs[:, 1])) == len(set(faces.identities)) == 25


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("# a comment\na/0 a/9\n", "line 2: p/a/9 is none of the faces"),
        ("a/0\n", "line 1 is no pair"),
        ("\n", "lists no pair"),
    ],
    ids=str,
)
def test_a_list_that_does_not_fit_its_faces_is_told_with_its_line(faces, tmp_path: Path, text, told):
    path = tmp_path / "pairs.txt"
    path.write_text(text)

    with pytest.raises(ValueError, match=rf"pairs\.txt:? {told}"):
        listed_pairs(path, faces, "p")


def test_without_a_list_the_first_face_of_each_person_guides_the_others(faces):
    pairs = {(faces.names[query], faces.names[guide]) for query, guide in first_pairs(faces)}

    assert pairs == {("p/a/1", "p/a/0"), ("p/b/1", "p/b/0"), ("p/b/2", "p/b/0")}


# Validation


class Copier(Gfrnet):
    """The worst that can be: it gives the guide as the restored face."""

    def parts(self, degraded: torch.Tensor, guide: torch.Tensor) -> Guided:
        flow = identity_flow(guide[:, :2]).expand(len(guide), -1, -1, -1)
        return Guided(guide, guide, flow, torch.ones_like(guide[:, :1]))


TINY = replace(PRESETS["small"], base=4, cap=8, depth=3)


def test_what_gives_the_input_back_gains_nothing_by_any_guide(faces):
    validation = GuidedValidation(faces, first_pairs(faces), Judges(), side=64)

    scores, picture = validation.score(Gfrnet(TINY).eval())

    assert {name: round(score, 5) for name, score in scores.items() if "warp" not in name} == {
        "x4": 0, "x4.guide": 0, "x8": 0, "x8.guide": 0,
    }  # fmt: skip
    assert scores["x4.warp"] == scores["x8.warp"] > 0
    assert picture.shape == (2 * 4 * 128, 6 * 128, 3)
    assert picture.dtype == np.uint8
    assert validation.value({"x4": 1.0, "x8": 2.0, "x4.identity": 0.1, "x4.guide": 9, "x4.lpips": 0.5}) == (
        pytest.approx(1.5 + 10 * 0.1 - 8 * 0.5)
    )


def test_what_copies_the_guide_is_seen_to_do_so(faces):
    pairs = first_pairs(faces)
    own = GuidedValidation(faces, pairs, Judges(), side=64)
    strange = GuidedValidation(faces, pairs, Judges(), side=64, stranger=True)

    scores, _ = own.score(Copier(TINY).eval())
    swapped, _ = strange.score(Copier(TINY).eval())

    assert scores["x4.guide"] > 1
    assert swapped["x4.guide"] == 0
    assert scores["x4"] - swapped["x4"] == pytest.approx(scores["x4.guide"], abs=1e-4)


def test_a_validation_lays_its_guides_where_the_network_wants_them(faces):
    """All photos of a person here are one photo but for its light, so that a laid guide is the truth."""
    people = GuidedFaces([face("p/a/0"), replace(face("p/a/1"), box=(40, 30, 200, 225)), face("p/b/0")], CPU)
    pairs = np.array([[0, 1], [1, 0]])

    def off(laid: bool) -> float:
        validation = GuidedValidation(people, np.concatenate([pairs, [[2, 2]]]), Judges(), side=64, laid=laid)
        return validation.score(Copier(TINY).eval())[0]["x4.warp"]

    assert off(True) < 1e-2 < 1 < off(False)


def test_a_validation_of_one_person_is_refused():
    alone = GuidedFaces([face("p/a/0"), face("p/a/1")], CPU)

    with pytest.raises(ValueError, match="all faces are of one person"):
        GuidedValidation(alone, alone.pairs, Judges(), side=64)
