import csv
import io
import json
import re
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import onnx
import pytest
import yaml
from onnx import TensorProto, helper, numpy_helper
from pydantic import ValidationError
from skimage.data import astronaut

pytest.importorskip("PIL", reason="the extra train is not installed")

from models.dataset import Face
from models.evaluate import EvaluateConfig, _fall, evaluate, main
from models.judges import FaceEmbedder
from models.protocols import Noise, large_faces, protocol_faces, sgen_pair, sgen_size, sisn_pair
from models.settings import read_settings

ROOT = Path(__file__).parents[2]
PEOPLE = {"ldn_1": 2, "c_1": 3, "c_2": 1}  # photographs of each
POINTS = np.array([[105, 120], [150, 120], [128, 145], [110, 170], [146, 170]], np.float32)


@pytest.fixture(scope="module")
def portrait() -> np.ndarray:
    return cv2.resize(np.ascontiguousarray(astronaut()[0:224, 112:336, ::-1]), (256, 256))


def write_tar(path: Path, rows: list[dict[str, object]], image: np.ndarray) -> Path:
    """A tar that holds one image under the names of all rows, with its CSV."""
    stored = cv2.imencode(".png", image)[1].tobytes()
    with tarfile.open(path, "w") as tar, path.with_suffix(".csv").open("w", newline="") as table:
        writer = csv.DictWriter(table, list(rows[0]))
        writer.writeheader()
        for row in rows:
            entry = tarfile.TarInfo(str(row["file"]))
            entry.size = len(stored)
            tar.addfile(entry, io.BytesIO(stored))
            writer.writerow(row)
    return path


@pytest.fixture(scope="module")
def truths(tmp_path_factory: pytest.TempPathFactory, portrait: np.ndarray) -> Path:
    """One face under several names, and two files that the protocol leaves out."""
    files = [(f"{name}/{i}.png", name, 0.1, 0.0) for name, count in PEOPLE.items() for i in range(count)]
    files += [("c_3/blurred.png", "c_3", 0.08, 0.0), ("c_4/profile.png", "c_4", 0.1, 0.6)]
    places = zip(("le", "re", "nose", "lm", "rm"), POINTS, strict=True)
    points = {f"{point}_{axis}": value for point, place in places for axis, value in zip("xy", place, strict=True)}
    box = {"face_x1": 48, "face_y1": 48, "face_x2": 208, "face_y2": 208}
    rows = [
        {"file": file, "identity": identity, "size": 256, "detail": detail, "yaw": yaw, **box, **points}
        for file, identity, detail, yaw in files
    ]
    return write_tar(tmp_path_factory.mktemp("truths") / "faces.tar", rows, portrait)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory, portrait: np.ndarray) -> Path:
    """Photographs of 512 px: of one test person, and of one of training."""
    rows = [{"file": "ldn_1/smiling.png", "split": "test"}, {"file": "ldn_2/neutral.png", "split": "train"}]
    return write_tar(tmp_path_factory.mktemp("photos") / "large.tar", rows, cv2.resize(portrait, (512, 512)))


def save(path: Path, nodes: list[onnx.NodeProto], inputs: list[str], *arrays: tuple[str, object]) -> onnx.ModelProto:
    """A network of images to `out`, not yet written."""
    shape = ["n", 3, "h", "w"]
    graph = helper.make_graph(
        nodes,
        path.stem,
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in inputs],
        [helper.make_tensor_value_info("out", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in arrays],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.save(model, str(path))
    return model


@pytest.fixture(scope="module")
def restorer(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Makes a restorer that gives back its input: the low image enlarged by OpenCV's cubic or nearest."""
    folder = tmp_path_factory.mktemp("restorers")

    def make(name: str = "same", *, scales: tuple[int, ...] = (4, 2), enlarge: str = "cubic") -> Path:
        path = folder / f"{name}.onnx"
        model = save(path, [helper.make_node("Identity", ["image"], ["out"])], ["image"])
        card = {
            "name": name, "enlarge": enlarge, "inputs": [{"name": "image"}], "scales": scales, "trained_on": "nothing",
            "size_multiple": 16, "color": "RGB", "mean": [127.5] * 3, "std": [127.5] * 3, "output_range": [-1, 1],
        }  # fmt: skip
        model.metadata_props.append(onnx.StringStringEntryProto(key="streamer.card", value=json.dumps(card)))
        onnx.save(model, str(path))
        return path

    return make


@pytest.fixture(scope="module")
def judges(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """A distance: the mean absolute difference. A recogniser: the aligned face in 16 by 16 colours, less grey."""
    folder = tmp_path_factory.mktemp("judges")
    lpips, embedder = folder / "distance.onnx", folder / "face-reidentification-retail-0095.onnx"
    save(
        lpips,
        [
            helper.make_node("Sub", ["a", "b"], ["less"]),
            helper.make_node("Abs", ["less"], ["error"]),
            helper.make_node("ReduceMean", ["error"], ["out"], keepdims=0),
        ],
        ["a", "b"],
    )
    save(
        embedder,
        [
            helper.make_node("Sub", ["image", "grey"], ["centred"]),
            helper.make_node("AveragePool", ["centred"], ["out"], kernel_shape=[8, 8], strides=[8, 8]),
        ],
        ["image"],
        ("grey", np.float32(128)),
    )
    return {"lpips": lpips, "embedders": {"colours": embedder}}


@pytest.fixture(scope="module")
def rival(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A restorer without a card, RGB of 0..1: four times as large by repeating pixels."""
    path = tmp_path_factory.mktemp("rivals") / "repeats.onnx"
    nodes = [helper.make_node("Resize", ["image", "", "scales"], ["out"], mode="nearest")]
    save(path, nodes, ["image"], ("scales", np.array([1, 1, 4, 4], np.float32)))
    return path


def configured(network: Path, truths: Path, out: Path, **more: object) -> EvaluateConfig:
    return EvaluateConfig.model_validate(
        {
            "protocol": "sgen", "network": network, "truths": truths, "report": out / "report.md",
            "sheet": out / "sheet.jpg", **more,
        }
    )  # fmt: skip


def cells(report: str, name: str, table: str) -> list[str]:
    """The cells of the first row that begins with `name`, in the table whose first line begins with `table`."""
    start = report.index(f"\n| {table}")
    lines = report[start:].lstrip().partition("\n\n")[0].splitlines()
    line = next(line for line in lines[2:] if line.strip("|* ").startswith(name))
    return [cell.strip(" *") for cell in line.strip("|").split("|")[1:]]


def figures(report: str, name: str, table: str = "PSNR / SSIM", place: int = 0) -> list[float]:
    """One figure of every cell of a row that is not empty."""
    return [float(re.findall(r"[-+]?\d+\.\d+", cell)[place]) for cell in cells(report, name, table) if cell]


@pytest.fixture(scope="module")
def sgen(restorer, truths, photos, judges, rival, tmp_path_factory) -> tuple[str, Path]:
    """The whole of SGEN's report, and the folder that it lies in."""
    out = tmp_path_factory.mktemp("sgen")
    config = configured(
        restorer(), truths, out, beyond=True, large_truths=photos, noise_table=True, rivals={"repeats": rival},
        others={"blocks": restorer("blocks", enlarge="nearest"), "double": restorer("double", scales=(2,))}, **judges,
    )  # fmt: skip
    return evaluate(config, command="evaluate it", unshown=out / "out"), out


@pytest.fixture(scope="module")
def sisn(restorer, truths, judges, rival, tmp_path_factory) -> tuple[str, Path]:
    """The whole of SISN's report, of a network for both scales."""
    out = tmp_path_factory.mktemp("sisn")
    network = restorer("both", scales=(8, 4))
    config = configured(network, truths, out, protocol="sisn", rivals={"repeats": rival}, **judges)
    return evaluate(config, command="evaluate", unshown=out / "out"), out


def portrait_face(portrait: np.ndarray) -> Face:
    return Face("faces/one.png", "one", portrait, (48, 48, 208, 208), POINTS)


def test_the_protocol_takes_the_first_two_sharp_frontal_truths_of_each_person(truths):
    names = [face.name for face in protocol_faces(truths)]

    assert names == ["faces/c_1/0.png", "faces/c_1/1.png", "faces/c_2/0.png", "faces/ldn_1/0.png", "faces/ldn_1/1.png"]


def test_only_test_people_are_taken_from_the_large_photographs(photos):
    (face,) = large_faces(photos)

    assert (face.name, face.identity, face.image.shape) == ("large/ldn_1/smiling.png", "ldn_1", (512, 512, 3))


def test_a_large_photograph_that_is_no_image_is_named(tmp_path):
    path = tmp_path / "large.tar"
    path.with_suffix(".csv").write_text("file,split\nldn_1/a.png,test\n")
    (tmp_path / "a.png").write_text("no image")
    with tarfile.open(path, "w") as tar:
        tar.add(tmp_path / "a.png", "ldn_1/a.png")

    with pytest.raises(ValueError, match=r"large\.tar: ldn_1/a\.png is no image"):
        large_faces(path)


def test_sgen_keeps_the_centre_of_a_face_and_the_landmarks_in_their_place():
    dots = np.zeros((256, 256, 3), np.uint8)
    x, y = POINTS[2].astype(int)
    dots[y - 2 : y + 3, x - 2 : x + 3] = 255
    dots[:, :19] = dots[:, 236:] = 255  # what is cut off on both sides

    pair = sgen_pair(Face("f", "i", dots, (48, 48, 208, 208), POINTS), (128, 160), 0)

    rows, columns = np.nonzero(pair.truth.max(axis=2))
    weights = pair.truth[rows, columns, 0].astype(float)
    assert pair.truth.shape == (160, 128, 3) and pair.low.shape == (40, 32, 3)
    assert np.average(columns, weights=weights) == pytest.approx(pair.landmarks[2, 0], abs=0.05)
    assert np.average(rows, weights=weights) == pytest.approx(pair.landmarks[2, 1], abs=0.05)


def test_sgen_shrinks_by_area_then_by_cubic_that_aliases(portrait):
    pair = sgen_pair(portrait_face(portrait), (176, 208), 0, Noise(0))

    truth = cv2.resize(portrait[:, 19:236], (176, 208), interpolation=cv2.INTER_AREA)
    assert np.array_equal(pair.truth, truth)
    assert np.array_equal(pair.low, cv2.resize(truth, (44, 52), interpolation=cv2.INTER_CUBIC))


def test_noise_has_the_spread_asked_for_and_is_another_for_each_face_and_size():
    grey = Face("f", "i", np.full((256, 256, 3), 128, np.uint8), (48, 48, 208, 208), POINTS)
    low = sgen_pair(grey, (176, 208), 0).low

    assert low.std() == pytest.approx(30, rel=0.03) and low.mean() == pytest.approx(128, abs=1)
    assert np.array_equal(low, sgen_pair(grey, (176, 208), 0).low)
    assert not np.array_equal(low, sgen_pair(grey, (176, 208), 1).low)


def test_uniform_noise_only_brightens_by_half_of_its_level_on_average():
    grey = Face("f", "i", np.full((256, 256, 3), 128, np.uint8), (48, 48, 208, 208), POINTS)
    low = sgen_pair(grey, (176, 208), 0, Noise(30, uniform=True)).low

    assert low.min() == 128 and low.max() == 158
    assert low.mean() == pytest.approx(143, abs=0.5)


def test_truths_are_never_enlarged(portrait):
    large = Face("f", "i", cv2.resize(portrait, (512, 512)), (0, 0, 512, 512), POINTS)

    assert [sgen_size(z) for z in (0, 5, 7, 21)] == [(96, 128), (176, 208), (208, 240), (432, 464)]
    assert sgen_pair(portrait_face(portrait), sgen_size(7), 0).truth.shape == (240, 208, 3)
    assert sgen_pair(large, sgen_size(21), 0).truth.shape == (464, 432, 3)
    with pytest.raises(ValueError, match="217x256 is too small"):
        sgen_pair(portrait_face(portrait), sgen_size(8), 0)
    with pytest.raises(ValueError, match="434x512 is too small"):
        sgen_pair(large, sgen_size(22), 0)


def test_sisn_shrinks_without_aliasing_and_keeps_the_face_whole(portrait):
    chequered = np.full((256, 256, 3), 255, np.uint8) * (np.indices((256, 256)).sum(axis=0)[..., None] % 2).astype(
        np.uint8
    )

    pair = sisn_pair(Face("f", "i", chequered, (48, 48, 208, 208), POINTS), 4)

    assert pair.low.shape == (64, 64, 3) and np.abs(pair.low.astype(int) - 127).max() <= 2
    assert pair.truth is chequered and pair.landmarks is POINTS


def test_a_report_says_what_the_card_says_and_how_many_people_there_were(sgen):
    report, out = sgen

    assert (out / "report.md").read_text() == report
    assert "`evaluate it`" in report
    assert "5 faces of 3 people out of faces.tar" in report
    assert "×4, ×2; it was trained on: nothing." in report


def test_psnr_in_the_table_is_the_mean_of_each_face_at_each_size(sgen, truths):
    report, _ = sgen

    found = []
    for z in range(6):
        pairs = [sgen_pair(face, sgen_size(z), seed) for seed, face in enumerate(protocol_faces(truths))]
        enlarged = [cv2.resize(pair.low, sgen_size(z), interpolation=cv2.INTER_CUBIC) for pair in pairs]
        errors = [np.mean((a.astype(float) - pair.truth) ** 2) for a, pair in zip(enlarged, pairs, strict=True)]
        found.append(np.mean(10 * np.log10(255**2 / np.array(errors))))
    assert figures(report, "same") == pytest.approx([*found, np.mean(found)], abs=0.0051)


def test_the_paper_stands_beside_ours_with_the_difference(sgen):
    report, _ = sgen

    assert figures(report, "paper's SGEN-MSE") == [23.00, 23.60, 24.12, 24.61, 24.98, 25.39, 24.28]
    assert figures(report, "paper's SGEN-MSE", place=1)[-1] == 0.737
    for place, slack in ((0, 0.011), (1, 0.0011)):
        ours, paper = (figures(report, name, place=place) for name in ("same", "paper's"))
        assert figures(report, "same − paper", place=place) == pytest.approx(np.subtract(ours, paper), abs=slack)


def test_mps_is_half_of_ssim_and_what_lpips_leaves(sgen):
    report, _ = sgen

    lpips, mps = (figures(report, "same", "LPIPS", place) for place in (0, 1))
    ssim = figures(report, "same", place=1)
    assert mps == pytest.approx((np.array(ssim) + 1 - np.array(lpips)) / 2, abs=0.0011)


def test_the_gain_is_what_the_tables_differ_by_and_lies_in_its_interval(sgen):
    report, _ = sgen

    for rival in ("nearest", "bicubic", "NLM + bicubic", "repeats", "blocks"):
        gain, low, high = (figures(report, rival, "gain of same over", place)[0] for place in (0, 1, 2))
        assert gain == pytest.approx(figures(report, "same")[-1] - figures(report, rival)[-1], abs=0.011)
        assert low <= gain <= high


def test_the_first_line_names_the_best_rival_that_we_did_not_train(restorer, truths, tmp_path):
    others = {"twin": restorer("twin")}

    report = evaluate(configured(restorer(), truths, tmp_path, others=others), command="", unshown=tmp_path)

    assert figures(report, "NLM")[-1] > figures(report, "bicubic")[-1] > figures(report, "nearest")[-1]
    gain = figures(report, "NLM", "gain of same over")[0]
    assert f"**same: {gain:+.2f} (" in report and "against the best rival, NLM + bicubic**" in report
    assert cells(report, "twin", "gain of same over") == ["+0.00 (+0.00 to +0.00)"]


def test_a_restorer_competes_only_at_the_scales_that_it_has(sgen):
    report, _ = sgen

    assert figures(report, "blocks") == figures(report, "nearest")
    assert "double" not in report


def test_a_judge_that_is_not_there_has_no_table(restorer, truths, tmp_path):
    report = evaluate(configured(restorer(), truths, tmp_path), command="", unshown=tmp_path)

    tables = [
        line for line, below in zip(report.splitlines(), report.splitlines()[1:], strict=False) if "|---" in below
    ]
    assert [line.split("|")[1].strip() for line in tables] == ["PSNR / SSIM", "gain of same over"]


def test_sizes_beyond_training_follow_on_those_of_the_table(sgen):
    report, _ = sgen

    rows = [cells(report, f"{z} |", "z | size") for z in range(22)]
    assert [row[0] for row in rows][::7] == ["128×96", "240×208", "352×320", "464×432"]
    assert [float(row[2]) for row in rows[:6]] == figures(report, "same")[:6]
    assert [row[1] == row[2] == "" for row in rows] == [z > 7 for z in range(22)]
    assert all(15 < float(row[4]) < 25 for row in rows)
    assert "On faces, 5 faces of 3 people: PSNR" in report and "On large, 1 faces of 1 people: PSNR" in report


def curve(*means: float) -> list[np.ndarray]:
    return [np.array([mean - 1, mean + 1]) for mean in means]


def test_a_fall_of_psnr_beyond_training_is_told_with_its_place(portrait):
    faces = [portrait_face(portrait)] * 2

    falling = _fall(faces, curve(20, 19, 21, 22, 23, 24, 24.5, 24.2, 24.3))

    assert (
        falling
        == "PSNR falls at z = 7, by 0.30 dB at most; from z = 5 to z = 8 it changes by +0.30 (+0.30 to +0.30) dB."
    )


def test_a_fall_within_training_or_of_less_than_is_shown_is_none(portrait):
    faces = [portrait_face(portrait)] * 2

    rising = _fall(faces, curve(20, 19, 21, 22, 23, 24, 23.996, 24.5))

    assert rising == "PSNR does not fall; from z = 5 to z = 7 it changes by +0.50 (+0.50 to +0.50) dB."


def test_more_noise_costs_more_and_the_paper_stands_below_each(sgen):
    report, _ = sgen

    rows = {noise: figures(report, f"same, {noise}", "PSNR | 128") for noise in ("σ 20", "σ 30", "σ 40", "σ 50")}
    assert rows["σ 30"] == figures(report, "same")
    assert rows["σ 20"][-1] > rows["σ 30"][-1] > rows["σ 40"][-1] > rows["σ 50"][-1]
    assert max(figures(report, "same, uniform 0 to 30", "PSNR | 128")) < 24.6
    assert figures(report, "paper, uniform 0 to 30", "PSNR | 128")[:6] == [24.27, 25.01, 25.56, 26.18, 26.72, 27.27]


def test_a_report_shows_only_faces_that_may_be_shown_and_the_others_lie_elsewhere(sgen):
    report, out = sgen

    shown, others = (cv2.imread(str(out / name)) for name in ("sheet.jpg", "out/sheet.others1.jpg"))
    assert shown.shape == (2 * 208, 7 * 176, 3)  # nearest, bicubic, NLM, repeats, blocks, same, truth
    assert others.shape == (3 * 208, 7 * 176, 3)
    assert "![Contact sheet](sheet.jpg)" in report
    assert "CC BY 4.0" in report
    assert sorted(path.name for path in out.iterdir()) == ["out", "report.md", "sheet.jpg"]


def test_a_report_without_a_face_that_may_be_shown_links_no_sheet(restorer, truths, tmp_path):
    report = evaluate(configured(restorer(), truths, tmp_path, limit=1), command="", unshown=tmp_path / "out")

    assert "sheet" not in report
    assert not (tmp_path / "sheet.jpg").exists()
    assert (tmp_path / "out/sheet.others1.jpg").exists()


def test_sisn_has_a_table_for_each_scale_that_its_network_has(sisn, restorer, truths, tmp_path):
    both, _ = sisn
    config = configured(restorer("eight", scales=(8,)), truths, tmp_path, protocol="sisn", limit=1)
    eight = evaluate(config, command="", unshown=tmp_path)

    assert re.findall("## (.*)", both) == ["×4: from 64×64 to 256×256", "×8: from 32×32 to 256×256"]
    assert re.findall("## (.*)", eight) == ["×8: from 32×32 to 256×256"]


def scale_part(report: str, scale: int) -> str:
    return report[report.index(f"## ×{scale}") :]


@pytest.mark.parametrize("scale", [4, 8])
def test_sisn_psnr_is_told_in_full_and_without_the_border(sisn, truths, scale):
    report = scale_part(sisn[0], scale)

    pair = sisn_pair(protocol_faces(truths)[0], scale)
    error = cv2.resize(pair.low, (256, 256), interpolation=cv2.INTER_CUBIC).astype(float) - pair.truth
    border = 6 + scale
    inner = error[border : 256 - border, border : 256 - border]
    full, cropped = (10 * np.log10(255**2 / np.mean(part**2)) for part in (error, inner))
    assert figures(report, "both", f"×{scale}")[:2] == pytest.approx([full, cropped], abs=0.0051)  # all faces are one


def test_sisn_identity_is_the_cosine_to_the_truth_at_its_landmarks(sisn, truths, judges):
    report = scale_part(sisn[0], 8)

    pair = sisn_pair(protocol_faces(truths)[0], 8)
    enlarged = cv2.resize(pair.low, (256, 256), interpolation=cv2.INTER_CUBIC)
    a, b = FaceEmbedder(judges["embedders"]["colours"]).embed([enlarged, pair.truth], [POINTS, POINTS])
    assert figures(report, "both", "×8")[-1] == pytest.approx(float(a @ b), abs=0.00051)
    assert 0.5 < figures(report, "nearest", "×8")[-1] < 1


def test_sisn_stands_beside_the_paper_at_its_scale(sisn):
    four, eight = (scale_part(sisn[0], scale) for scale in (4, 8))

    assert figures(four, "paper's SISN", "×4") == [32.83, 32.83, 0.901, 0.166, 0.867]
    assert figures(eight, "paper's SISN", "×8") == [28.37, 28.37, 0.800, 0.323, 0.739]
    for report, table in ((four, "×4"), (eight, "×8")):
        ours, paper = (figures(report, name, table) for name in ("both", "paper's SISN"))
        assert figures(report, "both − paper's SISN", table) == pytest.approx(np.subtract(ours[:5], paper), abs=0.011)
    assert "In the paper SISN gains +3.01 dB over bicubic" in four
    assert "In the paper SISN gains +2.38 dB over bicubic" in eight


def test_a_rival_for_four_times_is_only_in_the_table_of_four(sisn):
    eight = scale_part(sisn[0], 8)
    four = scale_part(sisn[0], 4).replace(eight, "")

    assert figures(four, "repeats", "×4") == figures(four, "nearest", "×4")
    assert "repeats |" not in eight.partition("Columns")[0]


def test_sisn_shows_all_scales_on_one_sheet(sisn):
    _, out = sisn

    shown = cv2.imread(str(out / "sheet.jpg"))
    assert shown.shape == (2 * 256, (4 + 3 + 1) * 256, 3)  # nearest, bicubic, repeats, ours; the same less one; truth


def test_truths_of_which_none_fits_are_named(restorer, truths, tmp_path):
    with pytest.raises(ValueError, match=r"faces\.tar: no face is 256 px"):
        evaluate(configured(restorer(), truths, tmp_path, limit=0), command="", unshown=tmp_path)


def test_a_network_without_the_scale_of_a_protocol_is_refused(restorer, truths, tmp_path):
    for protocol, wanted in (("sgen", "×4"), ("sisn", "×4 or ×8")):
        config = configured(restorer("double", scales=(2,)), truths, tmp_path, protocol=protocol)
        with pytest.raises(ValueError, match=f"double does not restore {wanted}; its card says"):
            evaluate(config, command="", unshown=tmp_path)


def test_two_restorers_of_one_name_are_refused(restorer, truths, tmp_path):
    config = configured(restorer(), truths, tmp_path, others={"same": restorer("blocks", enlarge="nearest")})

    with pytest.raises(ValueError, match="same is the name of more than one restorer"):
        evaluate(config, command="", unshown=tmp_path)


def test_the_command_takes_paths_beside_its_config(restorer, truths, tmp_path, monkeypatch, capsys):
    (tmp_path / "configs").mkdir()
    file = tmp_path / "configs/one.yaml"
    paths = {"network": str(restorer()), "truths": str(truths), "report": "../one.md", "sheet": "../one.jpg"}
    file.write_text(yaml.safe_dump({"protocol": "sgen", "limit": 1, **paths}))
    monkeypatch.setattr(sys, "argv", ["evaluate", str(file), "--unshown", str(tmp_path / "unshown")])

    main()

    assert capsys.readouterr().out.strip() == (tmp_path / "one.md").read_text().strip()
    assert (tmp_path / "unshown/one.others1.jpg").exists()


@pytest.mark.parametrize("name", ["sgen", "sisn"])
def test_a_shipped_config_does_all_and_reports_under_its_name(name):
    config = read_settings(EvaluateConfig, ROOT / f"configs/evaluate/{name}.yaml")

    assert config.protocol == name and config.limit is None
    assert config.report.resolve() == ROOT / f"docs/results/{name}.md"
    assert config.sheet.resolve().parent == config.report.resolve().parent
    assert config.network.resolve().parent == ROOT / "models/weights"
    assert config.lpips and config.detector and len(config.embedders) == 2
    assert (config.beyond and config.noise_table) == (name == "sgen")


def test_a_setting_that_is_not_known_is_refused(restorer, truths, tmp_path):
    with pytest.raises(ValidationError, match="extra"):
        configured(restorer(), truths, tmp_path, lpip=truths)


def test_the_whole_of_sgen_on_a_few_real_truths(restorer, shared, tmp_path):
    shipped = read_settings(EvaluateConfig, ROOT / "configs/evaluate/sgen.yaml")
    truths, report = shared / "data/faces_test.tar", tmp_path / "report.md"
    given = {"network": restorer(), "truths": truths, "report": report, "sheet": tmp_path / "sheet.jpg", "limit": 1}
    config = shipped.model_copy(update={**given, "beyond": False, "noise_table": False})

    report = evaluate(config, command="", unshown=tmp_path / "out")

    bicubic, filtered, same, rival = (figures(report, name) for name in ("bicubic", "NLM", "same", "Real-ESRGAN"))
    assert bicubic[-1] == pytest.approx(np.mean(bicubic[:-1]), abs=0.01)
    assert same[-1] == pytest.approx(bicubic[-1], abs=0.6)  # OpenCV's cubic is a little sharper than Pillow's
    assert min(np.subtract(filtered, bicubic)) > 0.3 and rival[-1] > bicubic[-1]
    assert figures(report, "Real-ESRGAN", "LPIPS")[-1] < figures(report, "bicubic", "LPIPS")[-1]
    assert figures(report, "truth", "share found again") == [1] * 7
    assert figures(report, "NLM", "share found again")[-1] > figures(report, "nearest", "share found again")[-1]
    for place in (0, 1):
        assert 0 < figures(report, "bicubic", "identity", place)[-1] < 0.8


def test_a_config_that_is_not_there_is_one_line_and_exit_code_2(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["evaluate", str(tmp_path / "none.yaml")])

    with pytest.raises(SystemExit) as ended:
        main()

    assert ended.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1
