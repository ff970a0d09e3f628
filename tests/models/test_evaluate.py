import csv
import io
import json
import tarfile
from pathlib import Path

import cv2
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from skimage.data import astronaut

pytest.importorskip("PIL", reason="the extra train is not installed")

from models.evaluate import EvaluateConfig, _interval, _psnr, _ssim, evaluate, protocol_faces

PEOPLE = {"ldn_1": 2, "c_1": 3, "c_2": 1}  # photographs of each


@pytest.fixture(scope="module")
def face() -> np.ndarray:
    return cv2.resize(np.ascontiguousarray(astronaut()[0:224, 112:336, ::-1]), (256, 256))


@pytest.fixture(scope="module")
def truths(tmp_path_factory: pytest.TempPathFactory, face: np.ndarray) -> Path:
    """A tar with its CSV: one face under several names, and two files that the protocol leaves out."""
    path = tmp_path_factory.mktemp("truths") / "faces.tar"
    files = [(f"{name}/{i}.png", name, 0.1, 0.0) for name, count in PEOPLE.items() for i in range(count)]
    files += [("c_3/blurred.png", "c_3", 0.08, 0.0), ("c_4/profile.png", "c_4", 0.1, 0.6)]
    stored = cv2.imencode(".png", face)[1].tobytes()
    points = {f"{point}_{axis}": 128.0 for point in ("le", "re", "nose", "lm", "rm") for axis in "xy"}
    box = {"face_x1": 48, "face_y1": 48, "face_x2": 208, "face_y2": 208}
    with tarfile.open(path, "w") as tar, path.with_suffix(".csv").open("w", newline="") as table:
        writer = csv.DictWriter(table, ["file", "identity", "size", "detail", "yaw", *box, *points])
        writer.writeheader()
        for file, identity, detail, yaw in files:
            entry = tarfile.TarInfo(file)
            entry.size = len(stored)
            tar.addfile(entry, io.BytesIO(stored))
            row = {"file": file, "identity": identity, "size": 256, "detail": detail, "yaw": yaw}
            writer.writerow({**row, **box, **points})
    return path


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A restorer that gives back its input: the low image enlarged by OpenCV's cubic."""
    shape = ["n", 3, "h", "w"]
    graph = helper.make_graph(
        [helper.make_node("Identity", ["image"], ["restored"])],
        "same",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("restored", TensorProto.FLOAT, shape)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    card = {
        "name": "same", "enlarge": "cubic", "inputs": [{"name": "image"}], "scales": [4, 2], "trained_on": "nothing",
    }  # fmt: skip
    model.metadata_props.append(onnx.StringStringEntryProto(key="streamer.card", value=json.dumps(card)))
    path = tmp_path_factory.mktemp("network") / "same.onnx"
    onnx.save(model, str(path))
    return path


def configured(network: Path, truths: Path, out: Path, **more: object) -> EvaluateConfig:
    return EvaluateConfig.model_validate(
        {"network": network, "truths": truths, "report": out / "report.md", "sheet": out / "sheet.jpg", **more}
    )


def row(report: str, name: str, table: int = 0) -> list[float]:
    """The first figure of every cell of a method's row."""
    lines = [line for line in report.splitlines() if line.startswith("|") and line.strip("| *").startswith(name)]
    return [float(cell.strip(" *").split(" / ")[0]) for cell in lines[table].strip("|").split("|")[1:]]


def test_psnr_of_a_known_error():
    truth = np.full((8, 8, 3), 100, np.uint8)

    assert _psnr(truth + 1, truth) == pytest.approx(20 * np.log10(255))
    assert _psnr(truth + 10, truth) == pytest.approx(20 * np.log10(255) - 20)


def test_psnr_does_not_wrap_where_bytes_would():
    black, white = np.zeros((8, 8, 3), np.uint8), np.full((8, 8, 3), 255, np.uint8)

    assert _psnr(black, white) == _psnr(white, black) == pytest.approx(0)


def test_ssim_is_one_for_the_truth_and_falls_with_noise(face):
    rng = np.random.default_rng(0)
    noisy = [np.clip(face + rng.normal(0, sigma, face.shape), 0, 255).astype(np.uint8) for sigma in (5, 30)]

    assert _ssim(face, face) == pytest.approx(1)
    assert 0.95 > _ssim(noisy[0], face) > _ssim(noisy[1], face) > 0


def test_ssim_looks_at_luma_alone(face):
    grey = cv2.cvtColor(cv2.cvtColor(face, cv2.COLOR_BGR2GRAY), cv2.COLOR_GRAY2BGR)

    assert _ssim(grey, face) > 0.999
    assert _psnr(grey, face) < 40


def test_the_interval_redraws_people_not_photographs():
    # of two people one is drawn twice in half of the draws: the mean is then 0 or 10
    low, high = _interval(np.array([0.0, 0, 0, 0, 10]), ["a", "a", "a", "a", "b"])

    assert (low, high) == (0, 10)


def test_the_interval_of_the_same_value_everywhere_is_that_value():
    assert _interval(np.full(4, 2.5), ["a", "b", "b", "c"]) == (2.5, 2.5)


def test_the_interval_narrows_with_more_people():
    rng = np.random.default_rng(1)
    widths = []
    for people in (10, 1000):
        low, high = _interval(rng.normal(0, 1, people), [str(i) for i in range(people)])
        widths.append(high - low)

    assert widths[1] == pytest.approx(2 * 1.96 / np.sqrt(1000), rel=0.15)
    assert widths[0] > 5 * widths[1]


def test_the_protocol_takes_the_first_two_sharp_frontal_truths_of_each_person(truths):
    names = [face.name for face in protocol_faces(truths)]

    assert names == ["faces/c_1/0.png", "faces/c_1/1.png", "faces/c_2/0.png", "faces/ldn_1/0.png", "faces/ldn_1/1.png"]


def test_a_report_shows_only_faces_that_may_be_shown_and_the_others_lie_elsewhere(network, truths, tmp_path):
    report = evaluate(configured(network, truths, tmp_path), command="evaluate", unshown=tmp_path / "out")

    shown, others = (cv2.imread(str(tmp_path / name)) for name in ("sheet.jpg", "out/sheet.others1.jpg"))
    assert shown.shape == (2 * 208, 5 * 176, 3)  # nearest, bicubic, NLM, same, truth
    assert others.shape == (3 * 208, 5 * 176, 3)
    assert "![Contact sheet](sheet.jpg)" in report
    assert (tmp_path / "report.md").read_text() == report
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "report.md", "sheet.jpg"]


def test_a_report_without_a_face_that_may_be_shown_links_no_sheet(network, truths, tmp_path):
    report = evaluate(configured(network, truths, tmp_path, limit=1), command="evaluate", unshown=tmp_path / "out")

    assert "sheet" not in report
    assert not (tmp_path / "sheet.jpg").exists()
    assert (tmp_path / "out/sheet.others1.jpg").exists()


def test_a_report_says_what_the_card_says_and_how_many_people_there_were(network, truths, tmp_path):
    report = evaluate(configured(network, truths, tmp_path), command="evaluate it", unshown=tmp_path / "out")

    assert "`evaluate it`" in report
    assert "5 faces of 3 people out of faces.tar" in report
    assert "×4, ×2; it was trained on: nothing." in report


def test_truths_of_which_none_fits_are_named(network, truths, tmp_path):
    with pytest.raises(ValueError, match=r"faces\.tar: no face is 256 px"):
        evaluate(configured(network, truths, tmp_path, limit=0), command="evaluate", unshown=tmp_path)


def test_the_whole_evaluation_on_a_few_real_truths(network, shared, tmp_path):
    models = shared / "models"
    config = configured(
        network, shared / "data/faces_test.tar", tmp_path, limit=4, lpips=models / "alexnet_lpips_distance.onnx",
        rivals={"Real-ESRGAN x4": models / "RealESRGAN_General_x4_v3.onnx"},
    )  # fmt: skip

    report = evaluate(config, command="evaluate", unshown=tmp_path / "out")

    bicubic, filtered, same, rival = (row(report, name) for name in ("bicubic", "NLM", "same", "Real-ESRGAN"))
    assert len(bicubic) == 7
    assert bicubic[-1] == pytest.approx(np.mean(bicubic[:-1]), abs=0.01)
    assert same[-1] == pytest.approx(bicubic[-1], abs=0.6)  # OpenCV's cubic is a little sharper than Pillow's
    assert min(np.subtract(filtered, bicubic)) > 0.3 and rival[-1] > bicubic[-1]
    assert row(report, "same − paper") == pytest.approx(np.subtract(same, row(report, "paper's")), abs=0.011)
    assert row(report, "Real-ESRGAN", table=1)[-1] < row(report, "bicubic", table=1)[-1]
