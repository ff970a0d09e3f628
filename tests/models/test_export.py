import pytest

torch = pytest.importorskip("torch", reason="the extra train is not installed")

import sys  # noqa: E402
from dataclasses import asdict, replace  # noqa: E402
from pathlib import Path  # noqa: E402

import cv2  # noqa: E402
import numpy as np  # noqa: E402
import onnx  # noqa: E402
import onnxruntime  # noqa: E402
from onnx import helper  # noqa: E402
from skimage.data import astronaut  # noqa: E402
from training import save_onnx, write_faces  # noqa: E402

from engines.card import read_card  # noqa: E402
from engines.int8 import quantised  # noqa: E402
from models import ranges  # noqa: E402
from models.checkpoint import build, save_checkpoint  # noqa: E402
from models.dataset import FaceTensors, load_faces  # noqa: E402
from models.export import int8, mixed  # noqa: E402
from models.ranges import add_int8, degraded, ends, measure_ranges  # noqa: E402
from models.sisn import PRESETS  # noqa: E402

EMBEDDER = "face-reidentification-retail-0095.onnx"
CARD = {
    "name": "tiny", "task": "restoration", "color": "RGB", "mean": [127.5] * 3, "std": [127.5] * 3,
    "output_range": [-1.0, 1.0], "scales": [4, 2], "enlarge": "cubic", "size_multiple": 1, "license": "none",
    "inputs": [{"name": "image", "layout": "NCHW", "shape": ["n", 3, "h", "w"]}],
    "outputs": [{"name": "restored", "layout": "NCHW", "shape": ["n", 3, "h", "w"]}],
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Faces of two people, `faces.tar`, and a recogniser."""
    folder = tmp_path_factory.mktemp("int8")
    face = cv2.resize(astronaut()[0:224, 112:336, ::-1], (256, 256), interpolation=cv2.INTER_CUBIC)
    write_faces(folder / "faces.tar", {"a/0": face, "b/0": face[..., ::-1] // 2 + 60},
                "60,50,190,210,97,105,151,103,126,133,106,164,148,162")  # fmt: skip
    node = helper.make_node
    rng = np.random.default_rng(0)
    save_onnx(folder / EMBEDDER, [
        node("Mul", ["image", "small"], ["a"]), node("Conv", ["a", "w"], ["b"], strides=[4, 4]),
        node("AveragePool", ["b"], ["c"], kernel_shape=[8, 8], strides=[8, 8]),
    ], small=np.float32(1 / 255), w=rng.normal(0, 0.3, (4, 3, 4, 4)).astype(np.float32))  # fmt: skip
    return folder


def restorer(path: Path, *, constant: float = 0.0, **changes: object) -> Path:
    """Write three convolutions that pass the image on. `constant` is a value in the middle that no result shows: it
    makes the steps of 8 bits coarse there."""
    node, same = helper.make_node, {"pads": [1, 1, 1, 1]}
    rng = np.random.default_rng(0)
    weights = [rng.normal(0, 0.01, (4, inputs, 3, 3)).astype(np.float32) for inputs in (3, 4, 4)]
    for weight in weights:
        weight[:3, :3, 1, 1] += np.eye(3, dtype=np.float32)
    weights[0][3], weights[1][:, 3] = 0, 0
    save_onnx(path, [
        node("Conv", ["image", "w1", "b1"], ["one"], **same), node("Conv", ["one", "w2"], ["two"], **same),
        node("Conv", ["two", "w3"], ["restored"], **same),
    ], w1=weights[0], w2=weights[1], w3=weights[2][:3], b1=np.array([0, 0, 0, constant], np.float32))  # fmt: skip
    network = onnx.load(path)
    ranges.write_card(path, network, {**CARD, **changes})
    return path


def add(path: Path, folder: Path) -> str:
    return add_int8(path, folder / "faces.tar", folder / "faces.tar", folder / EMBEDDER, calibrate_on=4, judge_on=4)


def test_a_restorer_that_int8_serves_says_so_in_its_card_and_keeps_its_weights(folder, tmp_path):
    path = restorer(tmp_path / "tiny.onnx")
    before = onnx.load(path).graph.SerializeToString()

    said = add(path, folder)

    record = read_card(path).int8
    assert record is not None
    assert record.ranges.keys() == {"image", "one", "two"}
    assert (record.skip, record.faces) == ((), 4)
    assert record.lost_db <= ranges.MOST_DB
    assert record.lost_identity <= ranges.MOST_IDENTITY
    assert 30 < record.psnr < 70
    assert f"{record.lost_db:+.3f} dB" in said
    assert said.endswith(": written")
    assert onnx.load(path).graph.SerializeToString() == before
    assert [file.name for file in tmp_path.iterdir()] == ["tiny.onnx"]


def test_the_engines_quantise_the_file_by_its_card(folder, tmp_path):
    path = restorer(tmp_path / "tiny.onnx", int8={"ranges": {"image": [-1, 1], "one": [-1, 1], "two": [-1, 1]}})
    network = onnx.load(path)
    image = np.random.default_rng(1).uniform(-1, 1, (1, 3, 32, 32)).astype(np.float32)

    made = quantised(network, read_card(path))

    results = [
        onnxruntime.InferenceSession(model.SerializeToString()).run(None, {"image": image})[0]
        for model in (network, made)
    ]
    assert 0 < np.abs(results[0] - results[1]).mean() < 0.02


def test_a_restorer_that_int8_harms_gets_no_ranges_and_loses_those_it_had(folder, tmp_path):
    path = restorer(tmp_path / "tiny.onnx", constant=1e3, int8={"ranges": {"image": [-1, 1]}})

    said = add(path, folder)

    assert read_card(path).int8 is None
    assert "first and last layer in float32" in said
    assert said.endswith(": too much, not written")


def test_the_same_seed_gives_the_same_degraded_faces_with_their_truth(folder):
    faces = FaceTensors(load_faces(folder / "faces.tar"), torch.device("cpu"))

    first, again = (list(degraded(faces, [4, 2], 4, seed=1)) for _ in range(2))

    for pair, same in zip(first, again, strict=True):
        assert np.array_equal(pair.low, same.low)
        assert np.array_equal(pair.truth, same.truth)
    sizes = [(pair.truth.shape[0], pair.truth.shape[0] // pair.low.shape[0]) for pair in first]
    assert sizes == [(128, 4), (128, 2), (192, 4), (192, 2)]


def test_an_outlier_does_not_make_the_steps_coarse_for_all(tmp_path):
    network = onnx.load(restorer(tmp_path / "tiny.onnx"))
    image = np.abs(np.random.default_rng(0).normal(0, 1, (1, 3, 256, 256))).astype(np.float32)
    image[0, 0, 0, 0] = 20

    low, high = measure_ranges(network, [{"image": image}])["image"]

    assert low == 0
    assert 3 < high < 8


def test_pixels_that_fill_their_range_are_not_clipped(tmp_path):
    network = onnx.load(restorer(tmp_path / "tiny.onnx"))
    image = np.random.default_rng(0).integers(0, 256, (1, 3, 64, 64)).astype(np.float32)

    assert measure_ranges(network, [{"image": image}])["image"] == (0, 255)


def test_the_ends_are_named_as_a_card_skips_them(tmp_path):
    assert ends(onnx.load(restorer(tmp_path / "tiny.onnx"))) == ["one", "restored"]


def test_a_run_that_names_no_judge_is_exported_without_int8_and_told_so(tmp_path):
    path = restorer(tmp_path / "tiny.onnx")
    before = path.read_bytes()

    said = int8(path, {"data": ["faces.tar"], "validation": "faces.tar"})

    assert "the run names no likeness" in said
    assert path.read_bytes() == before


def test_a_run_gives_its_own_faces_to_the_export(tmp_path):
    path = restorer(tmp_path / "tiny.onnx")
    config = {"data": [tmp_path / "trained.tar"], "validation": tmp_path / "held.tar", "likeness": tmp_path / "x.onnx"}

    with pytest.raises(FileNotFoundError, match=r"trained\.tar"):
        int8(path, config)


def test_what_is_no_restorer_of_ours_is_one_line_and_exit_code_2(folder, tmp_path, monkeypatch, capsys):
    for path in (folder / EMBEDDER, tmp_path / "nowhere.onnx", folder / "faces.tar"):
        options = ["ranges", str(path), "--faces", str(folder / "faces.tar"), "--judge", str(folder / "faces.tar"),
                   "--embedder", str(folder / EMBEDDER)]  # fmt: skip
        monkeypatch.setattr(sys, "argv", options)

        with pytest.raises(SystemExit) as ended:
            ranges.main()

        said = capsys.readouterr().err
        assert (ended.value.code, said.count("\n")) == (2, 1)
        assert path.name in said


# Mixed weights


def test_a_checkpoint_is_mixed_with_what_its_run_began_with(tmp_path):
    torch.manual_seed(0)
    config = {"name": "sisn", **asdict(replace(PRESETS["small"], groups=1, blocks=1, width=8))}
    states = [{"network": config, "weights": build(config).state_dict(), "step": 1, "config": {}} for _ in range(2)]
    save_checkpoint(tmp_path / "before.pt", **states[1])

    mix = mixed(states[0], tmp_path / "before.pt", 0.25)

    for name, weight in mix["weights"].items():
        expected = 0.75 * states[0]["weights"][name] + 0.25 * states[1]["weights"][name]
        torch.testing.assert_close(weight, expected)
    averaged = {"averaged": {f"module.{name}": weight for name, weight in states[0]["weights"].items()}}
    assert mixed(averaged, tmp_path / "before.pt", 0.25)["weights"].keys() == mix["weights"].keys()


@pytest.mark.parametrize(
    ("share", "width", "said"), [(1.5, 8, "no share from 0 to 1"), (0.5, 16, "not of the same network")]
)
def test_what_cannot_be_mixed_is_said_in_one_line(tmp_path, share, width, said):
    configs = [{"name": "sisn", **asdict(replace(PRESETS["small"], groups=1, blocks=1, width=w))} for w in (8, width)]
    states = [{"network": config, "weights": build(config).state_dict(), "step": 1, "config": {}} for config in configs]
    save_checkpoint(tmp_path / "other.pt", **states[1])

    with pytest.raises(ValueError, match=said):
        mixed(states[0], tmp_path / "other.pt", share)
