import pytest

torch = pytest.importorskip("torch", reason="the extra train is not installed")

import json  # noqa: E402
from pathlib import Path  # noqa: E402

import cv2  # noqa: E402
import numpy as np  # noqa: E402
import onnx  # noqa: E402
from onnx import helper  # noqa: E402
from skimage.data import astronaut  # noqa: E402
from training import equal, killed_before, save_onnx, write_faces  # noqa: E402

from models.checkpoint import load_checkpoint  # noqa: E402
from models.dataset import load_faces  # noqa: E402
from models.judges import FaceEmbedder, OnnxRestorer  # noqa: E402
from models.loop import TrainError  # noqa: E402
from models.train import train  # noqa: E402
from models.train_embedder import (  # noqa: E402
    MARGIN,
    Distillation,
    EmbedderBatches,
    EmbedderRunConfig,
    EmbedderValidation,
    Teacher,
    aligned,
    all_lessons,
    kept_faces,
    remembered,
    stored_faces,
)

TINY = {"widths": (8, 12), "depths": (1, 1), "features": 4, "head": 16, "embedding": 4, "side": 32}
PLACES = "60,50,190,210,97,105,151,103,126,133,106,164,148,162"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`faces.tar`, five faces of two people; `kept.tar`, three others; a teacher under its name; a restorer."""
    folder = tmp_path_factory.mktemp("embedder")
    face = cv2.resize(astronaut()[0:224, 112:336, ::-1], (256, 256), interpolation=cv2.INTER_CUBIC)
    photos = {"a/0": face, "a/1": face // 2 + 60, "a/2": face // 3, "b/0": face[..., ::-1], "b/1": face[::-1] // 2}
    write_faces(folder / "faces.tar", photos, PLACES)
    write_faces(folder / "kept.tar", {"c/0": face[:, ::-1], "c/1": face[:, ::-1] // 2, "d/0": 255 - face}, PLACES)

    node, rng = helper.make_node, np.random.default_rng(0)
    save_onnx(folder / "face-reidentification-retail-0095.onnx", [
        node("Mul", ["image", "small"], ["scaled"]), node("Conv", ["scaled", "w1"], ["seen"], strides=[16, 16]),
        node("Sigmoid", ["seen"], ["feature"]), node("Conv", ["feature", "w2"], ["embedding"]),
    ], small=np.float32(1 / 255), w1=rng.normal(0, 0.2, (4, 3, 16, 16)).astype(np.float32),
        w2=rng.normal(0, 0.3, (4, 4, 8, 8)).astype(np.float32))  # fmt: skip
    save_onnx(folder / "restorer.onnx", [
        node("Conv", ["image", "eye"], ["restored"]),
    ], eye=np.eye(3, dtype=np.float32)[..., None, None])  # fmt: skip
    model = onnx.load(str(folder / "restorer.onnx"))
    card = {"name": "x2", "scales": [2], "enlarge": "cubic", "size_multiple": 1, "color": "RGB", "mean": [127.5] * 3,
            "std": [127.5] * 3, "output_range": [-1, 1]}  # fmt: skip
    model.metadata_props.add(key="streamer.card", value=json.dumps(card))
    onnx.save(model, str(folder / "restorer.onnx"))
    return folder


def config(folder: Path, out: Path, **changes: object) -> EmbedderRunConfig:
    """Four steps of a tiny embedder."""
    return EmbedderRunConfig.model_validate({
        "override": TINY, "data": [folder / "faces.tar"], "validation": folder / "faces.tar", "out": out,
        "teacher": folder / "face-reidentification-retail-0095.onnx", "hint": "feature", "steps": 4, "batch": 6,
        "validate_every": 1, "restorers": [folder / "restorer.onnx"], "restored": 3, "refresh": 2,
        "shares": {"clean": 1, "reduced": 1, "surveillance": 1, "restored": 1}, "blends": 2,
        "validation_heights": (24,), "damage": {"h264": 0}, **changes,
    })  # fmt: skip


def loaded(settings: EmbedderRunConfig) -> Distillation:
    torch.manual_seed(settings.seed)
    task = Distillation(settings, CPU)
    task.load(0)
    return task


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_checkpoint(out / "last.pt")["weights"]


# The run


def test_a_run_killed_and_resumed_ends_with_the_same_weights_bit_for_bit(folder, tmp_path):
    train(config(folder, tmp_path / "whole"))
    for step in (1, 3):
        with killed_before(EmbedderBatches, step):
            train(config(folder, tmp_path / "killed"))

    train(config(folder, tmp_path / "killed"))

    states = [load_checkpoint(tmp_path / name / "last.pt") for name in ("whole", "killed")]
    for key in ("weights", "averaged", "optimizer", "best", "best_scores", "step"):
        assert equal(states[0][key], states[1][key]), key


def test_the_student_comes_nearer_to_its_teacher(folder, tmp_path):
    task = loaded(config(folder, tmp_path, learning_rate=0.01, shares={"clean": 1}, jitter=0, batch=16))

    cosines = [task.learn(task.network, step, task.config)["cosine"] for step in range(25)]

    assert np.mean(cosines[-3:]) > np.mean(cosines[:3]) + 0.2


@pytest.mark.parametrize("term", ["relation_weight", "hint_weight"])
def test_each_term_of_the_loss_moves_the_weights_its_own_way(folder, tmp_path, term):
    ended = []
    for weight in (0, 5):
        task = loaded(config(folder, tmp_path, **{term: weight}))
        task.learn(task.network, 0, task.config)
        ended.append(task.network.state_dict())

    assert not equal(*ended)


def test_the_log_tells_how_near_the_student_comes_on_each_kind_of_face(folder, tmp_path):
    task = loaded(config(folder, tmp_path, batch=40))

    parts = task.learn(task.network, 0, task.config)

    assert {"clean", "reduced", "surveillance", "restored", "hint", "relation", "cosine"} == parts.keys()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"hint": "nothing"}, "teacher: .* has no 'nothing'"),
        ({"override": {**TINY, "embedding": 5}}, "`embedding` is 5, the teacher's has 4"),
        ({"override": {**TINY, "features": 8}}, "hint: it has 4 channels; `features` of the network is 8"),
        ({"least": 500}, "data: .*no face is large enough"),
        ({"teacher": Path("faces.tar")}, "teacher: .* is no ONNX"),
        ({"validation": Path("nobody.tar")}, "validation: .*nobody.tar"),
        ({"restorers": [Path("face-reidentification-retail-0095.onnx")]}, "restorers: .* has no card"),
    ],
)
def test_what_cannot_be_learned_is_refused_in_a_line(folder, tmp_path, changes, said):
    placed = {
        name: [folder / each for each in value] if name == "restorers" else folder / value
        for name, value in changes.items()
        if name in ("teacher", "validation", "restorers")
    }
    with pytest.raises(TrainError, match=said) as raised:
        train(config(folder, tmp_path, **{**changes, **placed}))

    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("changes", "said"),
    [({"restorers": []}, "restored faces want restorers"), ({"heights": (20, 10)}, "from the least")],
)
def test_settings_that_contradict_each_other_are_refused(folder, tmp_path, changes, said):
    with pytest.raises(ValueError, match=said):
        config(folder, tmp_path, **changes)


# The teacher


def test_the_teacher_is_asked_but_once_for_the_same_faces(folder, tmp_path, capsys):
    for _ in range(2):
        loaded(config(folder, tmp_path))
    assert capsys.readouterr().out.count("the teacher looked at 7 faces") == 1

    loaded(config(folder, tmp_path, blends=3))

    assert "the teacher looked at 8 faces" in capsys.readouterr().out


def test_a_teacher_that_was_stopped_goes_on_where_it_was(folder, tmp_path, monkeypatch, capsys):
    kept = kept_faces(load_faces(folder / "faces.tar")).images
    teacher = Teacher(folder / "face-reidentification-retail-0095.onnx", "feature")
    whole = all_lessons(teacher, kept, tmp_path / "whole")
    monkeypatch.setattr("models.train_embedder._TOGETHER", 2)
    all_lessons(teacher, kept[:4], tmp_path / "parts")
    capsys.readouterr()

    parts = all_lessons(teacher, kept, tmp_path / "parts")

    assert capsys.readouterr().out.count("the teacher looked at") == 1
    assert all(np.array_equal(parts[name], whole[name]) for name in ("embeddings", "hints"))


def test_what_is_remembered_is_whole_or_not_there(tmp_path):
    def fails():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        remembered(tmp_path, "teacher", [b"key"], fails)

    assert remembered(tmp_path, "teacher", [b"key"], lambda: {"a": np.ones(2)})["a"].sum() == 2
    assert remembered(tmp_path, "teacher", [b"key"], fails)["a"].sum() == 2


def test_a_lesson_is_what_the_teacher_says_of_the_clean_face_and_of_its_mirror_image(folder, tmp_path):
    faces = load_faces(folder / "faces.tar")
    path = folder / "face-reidentification-retail-0095.onnx"
    judge, teacher = FaceEmbedder(path), Teacher(path, "feature")

    lessons = all_lessons(teacher, kept_faces(faces).images, tmp_path)

    frames = [judge.align(face.image, face.landmarks) for face in faces]
    centre = np.array(judge.preparation.template)
    both = judge.embed(frames, [centre] * len(frames)) + judge.embed(
        [f[:, ::-1] for f in frames], [centre] * len(frames)
    )
    cosines = (lessons["embeddings"] * both).sum(axis=1) / np.linalg.norm(both, axis=1)
    assert np.linalg.norm(lessons["embeddings"], axis=1) == pytest.approx(1, abs=1e-5)
    assert cosines.min() > 0.999
    assert lessons["hints"].shape == (5, 2, 4, 8, 8)
    assert lessons["hints"].astype(np.float32).mean(axis=(0, 1, 3, 4)) == pytest.approx(0, abs=0.01)


# Faces


def test_faces_without_landmarks_small_ones_and_those_left_out_are_not_learned(folder, tmp_path):
    faces = list(stored_faces(folder / "faces.tar", frozenset({"faces/a/1.png"})))
    assert [face.name for face in faces] == ["faces/a/0.png", "faces/a/2.png", "faces/b/0.png", "faces/b/1.png"]

    left_out = tmp_path / "calibration.txt"
    left_out.write_text("faces a/1.png\nfaces a/2.png\n")
    task = Distillation(config(folder, tmp_path, exclude=left_out, blends=0), CPU)

    assert task.load(0) == 3
    with pytest.raises(TrainError, match="no face is large enough"):
        train(config(folder, tmp_path, least=161))


def test_faces_that_were_mined_are_learned_with_their_landmarks(folder, tmp_path):
    mined = tmp_path / "mined"
    (mined / "film").mkdir(parents=True)
    (face, *_) = load_faces(folder / "faces.tar")
    cv2.imwrite(str(mined / "film/0.png"), face.image)
    header = (folder / "faces.csv").read_text().splitlines()[0].replace("identity,", "")
    (mined / "faces.csv").write_text(f"{header}\nfilm/0.png,{PLACES}\n")

    (found,) = stored_faces(mined, frozenset())

    assert found.name == "mined/film/0.png"
    assert np.array_equal(found.image, face.image)
    assert np.array_equal(found.landmarks, face.landmarks)


def test_a_folder_without_landmarks_is_refused_with_what_to_do(tmp_path):
    with pytest.raises(ValueError, match=r"has no faces\.csv .*: models\.mine makes such a folder"):
        list(stored_faces(tmp_path, frozenset()))


def test_a_kept_face_has_its_landmarks_and_its_height_where_the_picture_shows_them(folder):
    (face, *_) = load_faces(folder / "faces.tar")
    marked = face.image.copy()
    for x, y in face.landmarks:
        cv2.circle(marked, (round(float(x)), round(float(y))), 4, (0, 255, 0), -1)

    kept = kept_faces([type(face)(face.name, face.identity, marked, face.box, face.landmarks)])

    for x, y in kept.landmarks[0]:
        blue, green, red = kept.images[0, round(y), round(x)].astype(int)
        assert green > 200 and blue < 60 and red < 60
    eyes, there = (np.linalg.norm(points[0] - points[1]) for points in (face.landmarks, kept.landmarks[0]))
    assert kept.heights[0] == pytest.approx(160 * there / eyes, rel=0.01)


def test_a_blend_is_the_mean_of_two_faces(folder):
    kept = kept_faces(load_faces(folder / "faces.tar"))

    more = kept.with_blends(2, 0)

    assert len(more) == 7
    assert np.array_equal(more.images[:5], kept.images)
    for image, height in zip(more.images[5:].astype(float), more.heights[5:], strict=True):
        misses = [
            np.abs(share * kept.images[a] + (1 - share) * kept.images[b] - image).mean()
            for a in range(5)
            for b in range(5)
            for share in np.linspace(0.35, 0.65, 7)
        ]
        assert min(misses) < 4
        assert kept.heights.min() - 1e-6 <= height <= kept.heights.max() + 1e-6


# Batches


def test_a_clean_face_is_what_the_product_would_align(folder, tmp_path):
    task = loaded(config(folder, tmp_path, shares={"clean": 1}, jitter=0, vary=0, blends=0, batch=12))
    faces = load_faces(folder / "faces.tar")

    batch = task.batches[0]

    wanted = np.stack([aligned(face.image, face.landmarks, 32)[..., ::-1] for face in faces]).astype(np.float32)
    wanted = np.concatenate([wanted, wanted[:, :, ::-1]])
    for face in ((batch.faces + 1) * 127.5).permute(0, 2, 3, 1).numpy():
        assert np.abs(wanted - face).mean(axis=(1, 2, 3)).min() < 4


def test_the_lesson_of_a_batch_is_that_of_the_clean_face_whatever_the_student_sees(folder, tmp_path):
    task = loaded(config(folder, tmp_path, batch=64, blends=0))
    lessons = task.batches.lessons

    batch = task.batches[0]

    for embedding, hint in zip(batch.embeddings.numpy(), batch.hints, strict=True):
        (row,) = np.flatnonzero((lessons["embeddings"] == embedding).all(axis=1))
        there = torch.from_numpy(lessons["hints"][row]).float()
        there = torch.nn.functional.interpolate(there, (4, 4), mode="bilinear", align_corners=False)
        assert any(torch.allclose(hint, each) for each in there)
    assert set(batch.kinds.tolist()) == {0, 1, 2, 3}


def test_a_mirrored_face_has_the_hints_of_the_mirrored_face(folder, tmp_path):
    """The teacher's own features of what the student sees are the hints, where nothing was done to the face."""
    task = loaded(config(folder, tmp_path, shares={"clean": 1}, jitter=0, vary=0, blends=0, batch=16,
                         override={**TINY, "side": 128, "widths": (8, 8, 8), "depths": (1, 1, 1)}))  # fmt: skip
    teacher = Teacher(folder / "face-reidentification-retail-0095.onnx", "feature")

    batch = task.batches[0]

    bgr = ((batch.faces.flip(1) + 1) * 127.5).round().numpy()
    own = torch.from_numpy(np.stack([teacher._run(face)[1] for face in bgr]))
    for there, hint in zip(own, batch.hints, strict=True):
        found = np.corrcoef(there.flatten(1)[0].numpy(), hint.flatten(1)[0].numpy())[0, 1]
        assert found > 0.95


def test_small_faces_are_as_small_as_asked_for(folder, tmp_path):
    task = loaded(config(folder, tmp_path, heights=(16, 16), blends=0))
    rng = np.random.default_rng(0)

    low = task.batches._reduced(rng, 0)

    assert len(low) * task.batches.kept.heights[0] / (128 + 2 * MARGIN) == pytest.approx(16, abs=0.5)


def test_restored_faces_are_made_anew_after_so_many_steps(folder, tmp_path):
    batches = loaded(config(folder, tmp_path)).batches

    first, second = batches.pool(0), batches.pool(1)

    assert len(first) == len(second) == 3
    assert any(a.shape != b.shape or not np.array_equal(a, b) for (a, _), (b, _) in zip(first, second, strict=True))
    assert all(np.array_equal(a, b) for (a, _), (b, _) in zip(first, batches.pool(0), strict=True))


def test_no_restored_face_is_larger_than_the_product_restores(folder, tmp_path):
    settings = config(folder, tmp_path, heights=(60, 150), restored=6)
    batches = loaded(settings).batches

    assert max(len(image) for image, _ in batches.pool(0)) <= 256
    assert OnnxRestorer(settings.restorers[0]).card["scales"] == [2]


# Validation


def test_validation_tells_an_embedder_that_knows_everybody_from_one_that_knows_nobody(folder):
    validation = EmbedderValidation(load_faces(folder / "kept.tar"), (24,), 32, CPU)

    def knows(faces: torch.Tensor) -> torch.Tensor:
        return torch.tensor([[1.0, 0], [1, 0], [0, 1]])

    def nobody(faces: torch.Tensor) -> torch.Tensor:
        return torch.tensor([[1.0, 0], [0, 1], [1, 0.0]])

    good, bad = validation.score(knows), validation.score(nobody)

    assert good == {"clean": 1, "24 px": 1, "clean at 0.1 %": 1, "accuracy": 1}
    assert bad["clean"] == bad["24 px"] == 0
    assert validation.value(good) == 1 and validation.value(bad) == 0


def test_validation_of_one_person_is_refused(folder):
    one = [face for face in load_faces(folder / "kept.tar") if face.identity == "c"]

    with pytest.raises(ValueError, match="two people"):
        EmbedderValidation(one, (24,), 32, CPU)
