import pytest

torch = pytest.importorskip("torch", reason="the extra train is not installed")

import io  # noqa: E402
import json  # noqa: E402
import os  # noqa: E402
import socket  # noqa: E402
import subprocess  # noqa: E402
import sys  # noqa: E402
import tarfile  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import cv2  # noqa: E402
import numpy as np  # noqa: E402
import yaml  # noqa: E402
from onnx import helper  # noqa: E402
from skimage.data import astronaut  # noqa: E402
from training import equal, killed_before, save_onnx  # noqa: E402

from models import train_scgan as training  # noqa: E402
from models.checkpoint import NETWORKS, load_checkpoint  # noqa: E402
from models.loop import TrainError, schedule, train_task  # noqa: E402
from models.settings import SettingsError, read_settings  # noqa: E402
from models.train_scgan import (  # noqa: E402
    RealFaces,
    ScganBatches,
    ScganPairBatches,
    ScganRunConfig,
    ScganTraining,
    load_low,
)

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
TINY = {"width": 8, "blocks": 1, "late": 1, "base": 4}
AUTHOR = {"preset": "paper", "override": {**TINY, "side": 32}}
NO_ADVERSARIAL = {"l1": False, "h1": False, "l2": False, "h2": False}
GREEN = (0, 255, 0)  # no damage makes a face of that


@pytest.fixture(scope="module")
def face() -> np.ndarray:
    return cv2.resize(np.ascontiguousarray(astronaut()[0:224, 112:336, ::-1]), (256, 256))


@pytest.fixture(scope="module")
def faces(face: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of crops, each of them somebody else by its name."""
    folder = tmp_path_factory.mktemp("faces")
    for index, side in enumerate((208, 220, 240, 256)):
        cv2.imwrite(str(folder / f"{index}.png"), cv2.resize(face, (side, side)))
    return folder


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of real low faces for sides of 8 px: they are green."""
    folder = tmp_path_factory.mktemp("real")
    (folder / "street").mkdir()
    for side in (8, 9, 10):
        cv2.imwrite(str(folder / f"street/{side}.png"), np.full((side, side, 3), GREEN, np.uint8))
    return folder


def settings(faces: Path, real: Path, out: Path, **changes: object) -> dict[str, Any]:
    """Two steps of a tiny SCGAN, 8 px to 32 px."""
    return {
        "override": TINY, "data": [faces], "low": [real], "validation": faces, "out": out, "steps": 2, "batch": 2,
        "validate_every": 2, "sides": {32: 1}, "discriminator_width": 4, **changes,
    }  # fmt: skip


def train(*arguments: Any, **changes: object) -> dict[str, float]:
    return train_task(ScganRunConfig.model_validate(settings(*arguments, **changes)), ScganTraining)


def task(*arguments: Any, rank: int = 0, **changes: object) -> ScganTraining:
    """The task as it begins, its faces loaded."""
    made = ScganTraining(ScganRunConfig.model_validate(settings(*arguments, **changes)), CPU)
    made.load(rank)
    return made


@pytest.fixture(scope="module")
def labelled(face: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tar of two people whose landmarks are known, with two networks: `embedder.onnx`, `lpips.onnx`."""
    folder = tmp_path_factory.mktemp("labelled")
    names = [f"{part}_{axis}" for part in ("le", "re", "nose", "lm", "rm") for axis in "xy"]
    lines = [",".join(["file", "identity", "face_x1", "face_y1", "face_x2", "face_y2", *names])]
    with tarfile.open(folder / "faces.tar", "w") as tar:
        for who, image in {"a": face, "b": face // 2 + 60}.items():
            add(tar, f"{who}/0.png", image)
            lines.append(f"{who}/0.png,{who},60,50,190,210,97,105,151,103,126,133,106,164,148,162")
    (folder / "faces.csv").write_text("\n".join(lines) + "\n")

    node, step = helper.make_node, {"strides": [2, 2], "pads": [1, 1, 1, 1]}
    rng = np.random.default_rng(0)
    shapes = {"w1": (4, 3, 3, 3), "w2": (4, 4, 3, 3), "w3": (8, 4, 3, 3)}
    weights = {name: rng.normal(0, 0.3, shape).astype(np.float32) for name, shape in shapes.items()}
    save_onnx(folder / "embedder.onnx", inputs=("image",), nodes=[
        node("Mul", ["image", "small"], ["scaled"]), node("Conv", ["scaled", "w1"], ["a"], **step),
        node("Sigmoid", ["a"], ["a2"]), node("Conv", ["a2", "w2"], ["b"], **step),
        node("Conv", ["b", "w3"], ["c"], **step), node("AveragePool", ["c"], ["d"], kernel_shape=[16, 16]),
    ], small=np.float32(1 / 255), **weights)  # fmt: skip
    save_onnx(folder / "lpips.onnx", inputs=("a", "b"), nodes=[
        node("Conv", ["a", "w1"], ["x"]), node("Conv", ["b", "w1"], ["y"]), node("Sub", ["x", "y"], ["d"]),
        node("Mul", ["d", "d"], ["d2"]), node("ReduceMean", ["d2", "axes"], ["out"], keepdims=0),
    ], axes=np.array([1, 2, 3]), w1=weights["w1"])  # fmt: skip
    return folder


def add(tar: tarfile.TarFile, name: str, image: np.ndarray) -> None:
    content = cv2.imencode(".png", image)[1].tobytes()
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def judges(labelled: Path) -> dict[str, object]:
    return {"likeness": labelled / "embedder.onnx", "perceptual": labelled / "lpips.onnx"}


# Runs


@pytest.mark.parametrize(
    ("changes", "killing"),
    [
        ({}, ScganBatches),
        ({**AUTHOR, "share": "middle", "losses": {"detach_cycles": False}}, ScganBatches),
        ({"warm_share": 1}, ScganPairBatches),
        ({"warm_share": 0.5, "paired_share": 0.5, "matching_weight": 1}, ScganPairBatches),
        ({"warm_share": 0.25, "paired_share": 0.25}, ScganBatches),
    ],
    ids=["ours", "the author's, with shared layers, attached", "warm", "pairs alone", "all stages"],
)
def test_a_run_killed_and_resumed_ends_with_the_same_weights_bit_for_bit(labelled, real, tmp_path, changes, killing):
    data = labelled / "faces.tar"
    changes = {**judges(labelled), "steps": 4, **changes}
    train(data, real, tmp_path / "whole", **changes)
    with killed_before(killing, 3):
        train(data, real, tmp_path / "killed", **changes)
    assert load_checkpoint(tmp_path / "killed/last.pt")["step"] == 2

    train(data, real, tmp_path / "killed", **changes)

    whole, killed = (load_checkpoint(tmp_path / name / "last.pt") for name in ("whole", "killed"))
    for key in ("weights", "averaged", "optimizer", "others", "best", "best_scores", "step"):
        assert equal(whole[key], killed[key]), key
    assert whole["others"].keys() == {"degraders", "L1", "H1", "L2", "H2"}
    assert (tmp_path / "whole/log.csv").read_text() == (tmp_path / "killed/log.csv").read_text()


def test_every_network_learns_at_its_own_rate_which_falls_as_the_loop_s_does(faces, real, tmp_path):
    rates = {"degrader_rate": 2e-4, "discriminator_rate": 1e-4, "decay_share": 1, "steps": 4}
    made = task(faces, real, tmp_path, **rates)
    degraders = dict(made.degraders.network.named_children())
    networks = {"R_LS": made.network, **degraders, **made.discriminators}
    assert networks.keys() == {"R_LS", "d_hl", "d_sl", "L1", "H1", "L2", "H2"}
    before = {name: [p.clone() for p in network.parameters()] for name, network in networks.items()}

    made.learn(made.network, 3, made.config)

    for name, network in networks.items():
        assert any(not torch.equal(a, b) for a, b in zip(before[name], network.parameters(), strict=True)), name
    assert schedule(3, made.config) == 0.25
    for name, other in made.others.items():
        assert other.optimizer.param_groups[0]["lr"] == (5e-5 if name == "degraders" else 2.5e-5)


def test_a_run_s_stages_end_at_their_shares_and_each_trains_its_networks_alone(labelled, real, tmp_path):
    shares = {"warm_share": 0.25, "paired_share": 0.5, "steps": 4, "matching_weight": 1}
    made = task(labelled / "faces.tar", real, tmp_path, **judges(labelled), **shares)
    networks = {"R_LS": made.network, **dict(made.degraders.network.named_children()), **made.discriminators}

    def state() -> dict[str, Any]:
        weights = {name: dict(network.state_dict()) for name, network in networks.items()}
        return {name: {key: value.clone() for key, value in each.items()} for name, each in weights.items()}

    learned, told = [], []
    for step in range(4):
        before = state()
        told.append(made.learn(made.network, step, made.config).keys())
        learned.append({name for name, each in state().items() if not equal(each, before[name])})
        moments = {name for name, other in made.others.items() if other.optimizer.state}
        assert moments == [set(), {"H1"}, {"H1"}, set(made.others)][step]

    assert learned == [{"R_LS"}, {"R_LS", "H1"}, {"R_LS", "H1"}, set(networks)]
    assert told[0] == {"R_LS", "cosine"}
    assert told[1] == told[2] == {"R_LS", "cosine", "H1", "matching"}
    assert told[3] == {"R_LS", "D_HL", "D_SL", "cosine", "matching", "L1", "L2", "H1", "H2"}


def test_warm_steps_teach_the_restorer_the_pairs_that_it_is_given(faces, real, tmp_path):
    torch.manual_seed(0)
    made = task(faces, real, tmp_path, warm_share=1, learning_rate=2e-3, steps=100)
    pairs = made.pairs[50]

    def distance() -> float:
        with torch.no_grad():
            return float((made.network(pairs.low) - pairs.high).abs().mean())

    before = distance()
    for _ in range(25):
        made.learn(made.network, 50, made.config)

    assert distance() < 0.97 * before  # 0.953


def test_features_that_h1_sees_take_part_by_their_weight_and_never_train_it(faces, real, tmp_path):
    ended, judged = {}, {}
    for weight in (0, 1):
        torch.manual_seed(0)
        made = task(faces, real, tmp_path, warm_share=0, paired_share=1, matching_weight=weight)
        before = [p.clone() for p in made.discriminators["H1"].parameters()]
        parts = made.learn(made.network, 0, made.config)
        ended[weight] = dict(made.network.state_dict())
        # the next step's gradients of H1 are of its own loss, so its first step is the same with and without
        judged[weight] = [p.clone() for p in made.discriminators["H1"].parameters()]
        assert any(not torch.equal(a, b) for a, b in zip(before, judged[weight], strict=True))
        assert ("matching" in parts) == bool(weight)
        assert all(p.requires_grad for p in made.discriminators["H1"].parameters())

    assert equal(judged[0], judged[1])
    assert not equal(ended[0], ended[1])


@pytest.mark.parametrize("changes", [{}, AUTHOR, {"override": {**TINY, "spectral_norm": True}}], ids=str)
def test_a_step_in_bf16_is_one_too(labelled, real, tmp_path, changes, monkeypatch):
    monkeypatch.setattr(training, "has_bf16", lambda device: True)  # every CPU computes in it, most of them slowly
    made = task(labelled / "faces.tar", real, tmp_path, **judges(labelled), **changes)

    parts = made.learn(made.network, 0, made.config)

    assert "cosine" in parts and all(np.isfinite(value) for value in parts.values())
    assert all(p.dtype == torch.float32 and torch.isfinite(p).all() for p in made.network.parameters())


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"losses": NO_ADVERSARIAL}, {"degraders"}),
        ({"losses": {"h1": False, "pixel": False}}, {"degraders", "L1", "L2", "H2"}),
        ({"cycles": "forward"}, {"degraders", "L1", "H1"}),
        ({"cycles": "backward"}, {"degraders", "L2", "H2"}),
        ({"share": "all"}, {"degraders", "L1", "H1", "L2", "H2"}),
    ],
    ids=["w/o-AL", "adv-1-3 without pixel losses", "w/o-D_SL", "w/o-D_HL", "-fc"],
)
def test_the_paper_s_variants_train_with_the_discriminators_that_they_have(labelled, real, tmp_path, changes, expected):
    scores = train(labelled / "faces.tar", real, tmp_path, **judges(labelled), **changes)

    state = load_checkpoint(tmp_path / "last.pt")
    assert state["others"].keys() == expected
    assert all(np.isfinite(value) for value in scores.values())
    assert state["weights"]["tail.4.weight"].any()  # it began as zeros


@pytest.mark.parametrize(("detached", "learns"), [(True, False), (False, True)])
def test_only_attached_cycles_let_the_restorer_s_total_train_the_forward_degrader(
    faces, real, tmp_path, detached, learns
):
    made = task(
        faces, real, tmp_path, losses={**NO_ADVERSARIAL, "pixel": False, "detach_cycles": detached}, preset="paper",
        override={**TINY, "side": 32},
    )  # fmt: skip
    before = [p.clone() for p in made.branches.d_hl.parameters()]

    made.learn(made.network, 0, made.config)

    after = made.branches.d_hl.parameters()
    assert any(not torch.equal(a, b) for a, b in zip(before, after, strict=True)) == learns


def test_the_embedder_takes_part_by_its_weights_and_tells_the_cosine(labelled, real, tmp_path):
    data, embedder = labelled / "faces.tar", labelled / "embedder.onnx"
    ways: dict[str, dict[str, object]] = {
        "without": {},
        "unweighted": {"likeness": embedder, "identity_weight": 0, "feature_weight": 0},
        "by identity": {"likeness": embedder, "feature_weight": 0},
        "by features": {"likeness": embedder, "identity_weight": 0},
    }

    ended, parts = {}, {}
    for name, changes in ways.items():
        torch.manual_seed(0)
        made = task(data, real, tmp_path, **changes)
        for step in range(2):
            parts[name] = made.learn(made.network, step, made.config)
        ended[name] = dict(made.network.state_dict())

    assert equal(ended["without"], ended["unweighted"])
    assert not equal(ended["without"], ended["by identity"])
    assert not equal(ended["by features"], ended["by identity"])
    assert -1 <= parts["by identity"]["cosine"] <= 1
    assert parts["without"].keys() == {"L1", "H1", "L2", "H2", "D_HL", "R_LS", "D_SL"}


def test_validation_tells_what_it_measured_and_lpips_and_identity_outweigh_decibels(labelled, real, tmp_path):
    made = task(labelled / "faces.tar", real, tmp_path, **judges(labelled))

    scores, picture = made.score(made.network.eval())

    names = {f"{damage}32{kind}" for damage in ("moderate", "paper") for kind in ("", ".identity", ".lpips")}
    assert scores.keys() == names
    assert picture.shape == (3 * 128, 1152, 3)  # two sets, and real faces
    green = picture[-128:, :384].reshape(-1, 3).mean(axis=0)
    assert green[1] > 200 > 60 > green[[0, 2]].max()
    softer = {"a": 1.0, "a.identity": 0.0, "a.lpips": 0.0}
    better = {"a": -1.0, "a.identity": 0.05, "a.lpips": -0.1}
    assert made.value(better) > made.value(softer)
    assert made.value({"a": 1.0}) > made.value({"a": 0.5})


# Batches


def test_batches_hold_the_asked_part_of_real_faces_and_nobody_is_on_both_sides(real, tmp_path):
    colours = {"0": (200, 30, 30), "1": (30, 30, 200), "2": (200, 200, 30), "3": (30, 30, 30), "4": (220, 220, 220)}
    for name, colour in colours.items():
        (tmp_path / "people").mkdir(exist_ok=True)
        cv2.imwrite(str(tmp_path / f"people/{name}.png"), np.full((160, 160, 3), colour[::-1], np.uint8))
    batches = task(tmp_path / "people", real, tmp_path / "out", batch=5, degraded_share=0.3).batches
    known = torch.tensor(list(colours.values())).float()

    def people(images: torch.Tensor) -> set[int]:
        means = (images.mean(dim=(2, 3)) + 1) * 127.5
        return set(torch.cdist(means, known).argmin(dim=1).tolist())

    seen, degraded = set(), []
    for step in range(40):
        batch = batches[step]
        assert batch.high.shape == (5, 3, 32, 32) and batch.low.shape == (5, 3, 8, 8)
        is_real = (batch.low == torch.tensor([-1.0, 1.0, -1.0])[:, None, None]).flatten(1).all(dim=1)
        degraded.append(int((~is_real).sum()))
        assert not people(batch.high) & people(batch.low[~is_real])
        seen |= people(batch.high)

    assert seen == set(range(5))  # in the course of the run everybody is
    assert set(degraded) == {1, 2}
    assert np.mean(degraded) == pytest.approx(1.5, abs=0.25)


def test_a_batch_is_a_function_of_seed_rank_and_step(faces, real, tmp_path):
    first, again, other_seed = (task(faces, real, tmp_path, seed=seed).batches for seed in (0, 0, 1))
    other_rank = task(faces, real, tmp_path, rank=1).batches
    first[7]

    def tensors(batches: ScganBatches, step: int) -> list[torch.Tensor]:
        return [batches[step].high, batches[step].low, batches[step].z]

    assert equal(tensors(first, 3), tensors(again, 3))
    for other in (tensors(first, 4), tensors(other_seed, 3), tensors(other_rank, 3)):
        assert not any(equal(a, b) for a, b in zip(tensors(first, 3), other, strict=True) if a.shape == b.shape)


def test_a_pair_is_one_face_and_comes_from_everybody(real, tmp_path):
    colours = {"0": (200, 30, 30), "1": (30, 30, 200), "2": (200, 200, 30), "3": (30, 30, 30), "4": (220, 220, 220)}
    (tmp_path / "people").mkdir()
    for name, colour in colours.items():
        cv2.imwrite(str(tmp_path / f"people/{name}.png"), np.full((160, 160, 3), colour[::-1], np.uint8))
    known = torch.tensor(list(colours.values())).float()
    pairs = task(tmp_path / "people", real, tmp_path / "out", batch=5, degraded_share=0).pairs

    def people(images: torch.Tensor) -> list[int]:
        return torch.cdist((images.mean(dim=(2, 3)) + 1) * 127.5, known).argmin(dim=1).tolist()

    seen = set()
    for step in range(20):
        batch = pairs[step]
        assert batch.high.shape == (5, 3, 32, 32) and batch.low.shape == (5, 3, 8, 8)
        assert people(batch.high) == people(batch.low)
        seen |= set(people(batch.high))
    assert seen == set(range(5))
    assert equal([pairs[3].high, pairs[3].low], [pairs[3].high, pairs[3].low])


def test_a_real_face_is_never_shrunk_by_more_than_a_quarter_nor_enlarged_by_more_than_a_tenth():
    natives = range(12, 25)
    images = []
    for native in natives:
        image = np.zeros((native, native, 3), np.uint8)
        image[..., 0], image[..., 1] = 10 * np.arange(native), 10 * native  # a slope, and how large it is
        images.append(image)

    crops = RealFaces(images, [16], CPU).crops(np.random.default_rng(0), 300, 16)

    assert crops.shape == (300, 3, 16, 16)
    assert set((crops[:, 1].mean(dim=(1, 2)) / 10).round().int().tolist()) == {15, 16, 17, 18, 19, 20}
    slopes = (crops[:, 2, :, 12] - crops[:, 2, :, 3]).mean(dim=1) / 90  # pixels of the face in one of the crop
    assert 15 / 16 - 0.02 < slopes.abs().min() < 15 / 16 + 0.02
    assert 1.2 < slopes.abs().max() <= 1.25 + 0.02
    assert (slopes > 0).any() and (slopes < 0).any()
    assert (crops[slopes.abs() == 1][:, 2, 0, 0] > 0).any()  # cut anywhere, not at the corner alone


def test_a_side_without_real_faces_is_said_before_the_run_and_wants_none_where_all_are_degraded(faces, real, tmp_path):
    with pytest.raises(TrainError, match=r"^low: of 3 real faces none has 15 to 20 px, for low faces of 16 px: mine"):
        train(faces, real, tmp_path, sides={64: 1, 32: 1})

    train(faces, real, tmp_path, low=[], degraded_share=1)

    assert load_checkpoint(tmp_path / "last.pt")["step"] == 2


# What may be learned from


def test_low_faces_come_from_folders_tars_and_folders_of_tars(tmp_path, real):
    dark, light = (np.full((9, 9, 3), level, np.uint8) for level in (10, 200))
    with tarfile.open(tmp_path / "low.tar", "w") as tar:
        add(tar, "street/0.png", dark)
        add(tar, "street2/0.png", light)

    assert len(load_low(real)) == 3
    assert [int(image.mean()) for image in load_low(tmp_path / "low.tar")] == [10, 200]
    assert [int(image.mean()) for image in load_low(tmp_path / "low.tar/street")] == [10]
    with pytest.raises(ValueError, match="holds no pictures"):
        load_low(tmp_path / "low.tar/shop")


@pytest.mark.parametrize("clip", ["classroom_480x270", "corridor_three_walk_480x270", "carphone_qcif_pristine"])
def test_no_face_of_a_clip_that_judges_is_learned_from(faces, tmp_path, clip):
    crop = np.full((9, 9, 3), 90, np.uint8)
    (tmp_path / "mined" / clip).mkdir(parents=True)
    cv2.imwrite(str(tmp_path / f"mined/{clip}/0.png"), crop)
    with tarfile.open(tmp_path / "low.tar", "w") as tar:
        add(tar, f"{clip}/0.png", crop)
        add(tar, "street/0.png", crop)

    for source in ("mined", "low.tar"):
        with pytest.raises(TrainError, match=rf"^low: .*{source} holds {clip}, which is kept to judge restorers by"):
            train(faces, tmp_path / source, tmp_path / "out")
    for source in (f"mined/{clip}", f"low.tar/{clip}"):
        with pytest.raises(SettingsError, match=rf"low\.0: {clip} is kept to judge restorers by"):
            run(tmp_path / "run.yaml", **settings(faces, tmp_path / source, tmp_path / "out"))
    train(faces, tmp_path / "low.tar/street", tmp_path / "out")


# Configs


def run(path: Path, **written: object) -> None:
    """Train by these settings, written as YAML."""
    path.write_text(yaml.safe_dump(json.loads(json.dumps(written, default=str))))
    train_task(read_settings(ScganRunConfig, path), ScganTraining)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"network": "sgen"}, "network: "),
        ({"preset": "huge"}, "preset: scgan has no 'huge'"),
        ({"override": {"width": 9}}, "override: width 9"),
        ({"sides": {}}, "sides: "),
        ({"sides": {40: 1}}, "sides: 40 is no multiple of 16"),
        ({**AUTHOR, "sides": {48: 1}}, "sides: 48, but with noise fc this network degrades faces of 32 px"),
        ({"degraded_share": 1.5}, "degraded_share: "),
        ({"blur": [2, 1]}, "blur: from 2 to 1 is no range"),
        ({"quality": [40, 101]}, "quality.1: "),
        ({"share": "head"}, "share: "),
        ({"share": "body", "cycles": "forward"}, "share body: with the forward cycle alone"),
        ({"losses": {"alpha": -1}}, "losses: alpha -1"),
        ({"losses": {"perceptual": 1}}, "losses.perceptual: "),
        ({"low": ["nowhere"]}, "low: "),
        ({"low": ["run.yaml"]}, "run.yaml is no tar"),
        ({"likeness": "run.yaml"}, "likeness: "),
        ({"perceptual": "nowhere.onnx"}, "perceptual: "),
        ({"data": ["faces_test.tar"]}, "data.0: faces_test is kept from training"),
        ({"validation": "nowhere.tar"}, "validation: "),
        ({"discriminator_width": 0}, "discriminator_width: "),
        ({"warm_share": 1.1}, "warm_share: "),
        ({"warm_share": 0.6, "paired_share": 0.6}, "warm_share 0.6, paired_share 0.6: more than the run"),
        ({"warm_share": 0.5, "losses": {"cycle": False}}, "pairs are learned from by the cycle loss"),
        ({"paired_share": 0.5, "losses": {"h1": False}}, "paired_share: there is no H1"),
        ({"paired_share": 0.5, "cycles": "backward"}, "paired_share: there is no H1"),
        ({"warm_share": 0.5, "minutes": 1}, "minutes: a run's pace is measured on both cycles"),
    ],
    ids=str,
)
def test_a_mistake_in_the_yaml_is_one_line_that_names_its_place(faces, real, tmp_path, changes, told):
    with pytest.raises((TrainError, SettingsError)) as said:
        run(tmp_path / "run.yaml", **{**settings(faces, real, tmp_path / "out"), **changes})

    assert told in str(said.value)
    assert "\n" not in str(said.value)


def test_the_faces_of_one_person_cannot_be_two_sides(face, real, tmp_path):
    (tmp_path / "people/one").mkdir(parents=True)
    for index in range(2):
        cv2.imwrite(str(tmp_path / f"people/one/{index}.png"), face)

    with pytest.raises(TrainError, match=r"^data: .*1 person"):
        train(tmp_path / "people", real, tmp_path / "out")


def test_a_resumed_run_keeps_the_networks_that_a_change_does_not_touch(faces, real, tmp_path):
    made = task(faces, real, tmp_path)

    assert made.outdated({"losses", "batch", "network.width"}) == set()
    assert made.outdated({"network.base"}) == {"degraders"}
    assert made.outdated({"discriminator_width"}) == {"L1", "H1", "L2", "H2"}


@pytest.mark.parametrize("name", ["scgan", "scgan-x", "scgan-small", "scgan-x-small"])
def test_the_configs_that_ship_are_runs(name):
    config = read_settings(ScganRunConfig, ROOT / f"configs/train/{name}.yaml")

    network = NETWORKS["scgan"].presets[config.preset]
    assert config.out == (ROOT / "runs").resolve() / name
    assert all(side % 16 == 0 and network.noise in ("direct", side == network.side and "fc") for side in config.sides)
    assert all("../" not in str(path) and path.is_absolute() for path in (*config.low, config.likeness))


# Several processes

TWO_PROCESSES = """
import os, sys
from pathlib import Path
import torch
from models.loop import processes, train_task
from models.settings import read_settings
from models.train_scgan import ScganRunConfig, ScganTraining

kept = []

class Kept(ScganTraining):
    def __init__(self, *arguments):
        super().__init__(*arguments)
        kept.append(self)

with processes():
    train_task(read_settings(ScganRunConfig, Path(sys.argv[1])), Kept)
networks = {"R_LS": kept[0].network, **{name: other.network for name, other in kept[0].others.items()}}
torch.save({name: dict(net.state_dict()) for name, net in networks.items()}, f"rank{os.environ['RANK']}.pt")
"""


def test_two_processes_train_the_same_networks(faces, real, tmp_path):
    written = settings(faces, real, tmp_path / "out", steps=3)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(json.loads(json.dumps(written, default=str))))
    (tmp_path / "two.py").write_text(TWO_PROCESSES)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-addr", "127.0.0.1",
        "--master-port", str(port), "two.py", "run.yaml",
    ]  # fmt: skip
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])

    ended = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}, capture_output=True,
        text=True, timeout=300,
    )  # fmt: skip

    assert ended.returncode == 0, ended.stderr
    first, second = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in (0, 1))
    assert first.keys() == {"R_LS", "degraders", "L1", "H1", "L2", "H2"}
    assert equal(first, second)
    state = load_checkpoint(tmp_path / "out/last.pt")
    assert equal(dict(state["weights"]), first["R_LS"])
    assert equal(dict(state["others"]["H1"]["weights"]), first["H1"])
