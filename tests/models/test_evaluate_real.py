import csv
import io
import re
import tarfile
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import cv2
import numpy as np
import pytest
from onnx import helper
from pydantic import ValidationError
from skimage.data import astronaut

pytest.importorskip("torch", reason="the extra train is not installed")
pytest.importorskip("PIL", reason="the extra train is not installed")

from training import save_onnx

from models.evaluate_real import (
    PooledFeatures,
    RealEvaluateConfig,
    evaluate_real,
    judged_crops,
    kid,
    landmark_error,
    moderate_pair,
)
from models.export import export
from models.judges import bicubic, psnr
from models.protocols import protocol_faces
from models.scgan import PRESETS, Restoration
from models.settings import read_settings

# torch's exporter uses what torch deprecates
pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning", "ignore::DeprecationWarning")

ROOT = Path(__file__).parents[2]
PHOTO = np.ascontiguousarray(astronaut()[..., ::-1])
PEOPLE = {"ldn_1": 2, "c_1": 2, "c_2": 1, "c_3": 1, "c_4": 1}  # photographs of each
POINTS = np.array([[105, 120], [150, 120], [128, 145], [110, 170], [146, 170]], np.float32)
CROPS = {  # file: frame and left edge of its box
    "classroom_a/f0_0.png": (0, 10), "classroom_a/f0_1.png": (0, 100), "classroom_a/f6_2.png": (6, 14),
    "classroom_a/f6_3.png": (6, 96), "corridor_b/f0_0.png": (0, 10), "corridor_b/f5_1.png": (5, 300),
    "carphone_low/f0_0.png": (0, 40), "carphone_pristine/f0_1.png": (0, 41), "street/f0_0.png": (0, 10),
}  # fmt: skip


def write_tar(path: Path, rows: list[dict[str, object]], images: list[np.ndarray]) -> Path:
    with tarfile.open(path, "w") as tar, path.with_suffix(".csv").open("w", newline="") as table:
        writer = csv.DictWriter(table, list(rows[0]))
        writer.writeheader()
        for row, image in zip(rows, images, strict=True):
            stored = cv2.imencode(".png", image)[1].tobytes()
            entry = tarfile.TarInfo(str(row["file"]))
            entry.size = len(stored)
            tar.addfile(entry, io.BytesIO(stored))
            writer.writerow(row)
    return path


def window(number: int, side: int) -> np.ndarray:
    """Another part of the photograph for each number."""
    x, y = 37 * number % (513 - side), 59 * number % (513 - side)
    return PHOTO[y : y + side, x : x + side]


@pytest.fixture(scope="module")
def truths(tmp_path_factory: pytest.TempPathFactory) -> Path:
    files = [(f"{name}/{i}.png", name) for name, count in PEOPLE.items() for i in range(count)]
    places = zip(("le", "re", "nose", "lm", "rm"), POINTS, strict=True)
    points = {f"{point}_{axis}": value for point, place in places for axis, value in zip("xy", place, strict=True)}
    box = {"face_x1": 48, "face_y1": 48, "face_x2": 208, "face_y2": 208}
    rows = [{"file": f, "identity": name, "size": 256, "detail": 0.1, "yaw": 0.0, **box, **points} for f, name in files]
    images = [window(number, 256) for number in range(len(rows))]
    return write_tar(tmp_path_factory.mktemp("truths") / "faces.tar", rows, images)


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory, truths: Path) -> Path:
    """Enough pictures to fit NIQE to."""
    with truths.with_suffix(".csv").open(newline="") as table:
        row = next(csv.DictReader(table))
    rows = [{**row, "file": f"c_{number}/0.png", "identity": f"c_{number}"} for number in range(24)]
    return write_tar(tmp_path_factory.mktemp("clean") / "clean.tar", rows, [window(n, 256) for n in range(24)])


@pytest.fixture(scope="module")
def crops(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = [
        {"file": file, "frame": frame, "x1": x, "y1": 20, "x2": x + 30, "y2": 60} for file, (frame, x) in CROPS.items()
    ]
    images = [cv2.resize(window(20 + number, 256), (40 + number, 40)) for number in range(len(rows))]
    return write_tar(tmp_path_factory.mktemp("crops") / "crops.tar", rows, images)


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny SCGAN, not trained: the cubic enlargement, as torch does it."""
    path = tmp_path_factory.mktemp("network") / "tiny.onnx"
    config = replace(PRESETS["small"], width=8, blocks=1, late=1, base=4)
    described = {"name": "scgan", **asdict(config)}
    state = {
        "network": described, "weights": Restoration(config).state_dict(), "step": 1,
        "config": {"data": ["some/faces_train.tar"], "enlarge": "none"},
    }  # fmt: skip
    export(state, path, name="tiny", license="test")
    return path


@pytest.fixture(scope="module")
def judges(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """A distance with features `fa`; a recogniser: the aligned face in 16 by 16 colours, less grey; a rival that
    repeats pixels."""
    folder = tmp_path_factory.mktemp("judges")
    kernel = np.random.default_rng(0).normal(0, 0.5, (8, 3, 4, 4)).astype(np.float32)

    def seen(image: str, features: str) -> list[object]:
        return [
            helper.make_node("Conv", [image, "kernel"], [f"{features}c"], strides=[4, 4]),
            helper.make_node("Relu", [f"{features}c"], [features]),
        ]

    distance = [
        *seen("a", "fa"), *seen("b", "fb"), helper.make_node("Sub", ["fa", "fb"], ["less"]),
        helper.make_node("Mul", ["less", "less"], ["error"]),
        helper.make_node("ReduceMean", ["error", "axes"], ["out"], keepdims=0),
    ]  # fmt: skip
    lpips = save_onnx(folder / "d.onnx", distance, ("a", "b"), kernel=kernel, axes=np.array([1, 2, 3]))
    embedder = folder / "face-reidentification-retail-0095.onnx"
    colours = [
        helper.make_node("Sub", ["image", "grey"], ["centred"]),
        helper.make_node("AveragePool", ["centred"], ["out"], kernel_shape=[8, 8], strides=[8, 8]),
    ]
    save_onnx(embedder, colours, grey=np.float32(128))
    repeats = [helper.make_node("Resize", ["image", "", "times"], ["out"], mode="nearest")]
    rival = save_onnx(folder / "repeats.onnx", repeats, times=np.array([1, 1, 4, 4], np.float32))
    return {
        "lpips": lpips, "features": "fa", "embedders": {"colours": embedder}, "rivals": {"Real-ESRGAN": rival},
    }  # fmt: skip


@pytest.fixture(scope="module")
def configured(network, truths, clean, crops, judges) -> Callable[..., RealEvaluateConfig]:
    def make(out: Path, **more: object) -> RealEvaluateConfig:
        given = {
            "protocol": "scgan", "network": network, "truths": truths, "clean": clean, "crops": crops,
            "report": out / "report.md", "sheet": out / "sheet.jpg", **judges, **more,
        }  # fmt: skip
        return RealEvaluateConfig.model_validate(given)

    return make


@pytest.fixture(scope="module")
def written(configured, tmp_path_factory) -> tuple[str, Path]:
    """A whole report, and the folder that it lies in."""
    out = tmp_path_factory.mktemp("written")
    return evaluate_real(configured(out), command="evaluate it", unshown=out / "unshown"), out


def cells(report: str, name: str, table: str) -> list[str]:
    """The cells of the first row that begins with `name`, in the table whose first line begins with `table`."""
    lines = report[report.index(f"\n| {table}") :].lstrip().partition("\n\n")[0].splitlines()
    line = next(line for line in lines[2:] if line.strip("|* ").startswith(name))
    return [cell.strip(" *") for cell in line.strip("|").split("|")[1:]]


def numbers(cell: str) -> list[float]:
    return [float(each) for each in re.findall(r"[-+]?\d+\.\d+", cell)]


def test_a_report_has_all_its_parts_and_says_what_it_looked_at(written):
    report, out = written

    assert (out / "report.md").read_text() == report
    assert [line for line in report.splitlines() if line.startswith("#")] == [
        "# tiny at SCGAN's protocol", "## With truths, moderately damaged: 16 → 64 px",
        "## Real crops: classroom 4, corridor 2, carphone 2",
        "## Beside the paper (its Tables 5 and 6, 16 → 64 px)",
    ]  # fmt: skip
    assert "`evaluate it`" in report and "7 faces of 5 people" in report
    assert "8 crops of 5 tracks, 40 to 40 px" in report
    assert "not Inception's" in report and "NIQE, fitted to faces" in report


def test_psnr_is_the_mean_over_faces_that_were_damaged_moderately(written, truths):
    report, _ = written

    pairs = [moderate_pair(face, 64, number) for number, face in enumerate(protocol_faces(truths))]
    found = np.mean([psnr(bicubic(pair.low, 4), pair.truth) for pair in pairs])
    mean, low, high = numbers(cells(report, "bicubic", "16 → 64 px")[0])
    assert mean == pytest.approx(found, abs=0.0051) and low <= mean <= high


def test_a_gain_is_what_two_rows_differ_by_and_lies_in_its_interval(written):
    report, _ = written

    for table, gains in (("16 → 64 px", "gain of tiny over"), ("real crops ×4", "gain of tiny over")):
        part = report[report.index(f"| {table}") - 1 :]
        for name in ("bicubic", "Real-ESRGAN"):
            rows = [cells(part, row, table) for row in ("tiny", name)]
            for ours, other, gain in zip(*rows, cells(part, name, gains), strict=True):
                difference, low, high = numbers(gain)
                assert difference == pytest.approx(numbers(ours)[0] - numbers(other)[0], abs=0.011)
                assert low <= high


def test_the_verdict_names_the_aim_and_the_rivals(written):
    report, _ = written
    lpips = numbers(cells(report, "tiny", "16 → 64 px")[2])[0]

    verdict = next(line for line in report.splitlines() if line.startswith("**tiny: LPIPS"))
    assert numbers(verdict)[0] == lpips and "bicubic" in verdict and "Real-ESRGAN" in verdict
    met = "meets 0.15" if lpips <= 0.15 else "meets 0.19 alone" if lpips <= 0.19 else "meets neither"
    assert verdict.endswith(f"it {met}.")


def test_the_paper_stands_beside_ours(written):
    report, _ = written

    table = "less is better, but of the share"
    assert cells(report, "LPIPS: paper, FFHQ", table) == ["0.927", "0.336", "0.197"]
    assert cells(report, "KID ×100: paper, Widerface", table) == ["16.230", "2.770", "1.080"]
    ours = [numbers(cells(report, name, "real crops ×4")[0])[0] for name in ("bicubic", "Real-ESRGAN", "tiny")]
    assert [float(cell) for cell in cells(report, "NIQE: ours", table)] == ours


def test_the_sheet_shows_every_crop_of_the_two_clips_and_no_other(written, crops):
    report, out = written
    shown = [crop for crop in judged_crops(crops) if crop.clip != "carphone"]

    sheet = cv2.imread(str(out / "sheet.jpg"))
    assert "All 6 crops of classroom and corridor, none left out" in report
    assert sheet.shape == (2 * 160, 3 * 3 * 160 + 2 * 8, 3)
    for number, crop in enumerate(shown):
        y, x = 160 * (number // 3), (480 + 8) * (number % 3)
        expected = cv2.resize(bicubic(crop.image, 4), (160, 160), interpolation=cv2.INTER_AREA)
        assert np.abs(sheet[y : y + 160, x : x + 160].astype(int) - expected).mean() < 8
    assert cv2.imread(str(out / "unshown/sheet.others.jpg")).shape[0] == 160  # the two of carphone


def test_of_the_truths_only_those_that_may_be_shown_lie_beside_the_report(written):
    _, out = written

    assert cv2.imread(str(out / "sheet-64.jpg")).shape == (2 * 64, 4 * 64, 3)  # two of ldn_1
    assert cv2.imread(str(out / "unshown/sheet-64.others1.jpg")).shape == (5 * 64, 4 * 64, 3)


def test_only_crops_of_clips_that_judge_are_taken_and_boxes_that_overlap_are_one_track(crops):
    found = judged_crops(crops)

    assert [crop.name for crop in found] == [
        *(name for name in CROPS if name.startswith("classroom")),
        *(name for name in CROPS if name.startswith("corridor")),
        *(name for name in CROPS if name.startswith("carphone")),
    ]
    tracks = [crop.track for crop in found]
    assert tracks[0] == tracks[2] and tracks[1] == tracks[3]  # two who sit
    assert tracks[6] == tracks[7]  # one clip, twice
    assert len(set(tracks)) == 5  # who left the corridor's first place is another
    assert [crop.name for crop in judged_crops(crops, 1)] == [
        "classroom_a/f0_0.png", "corridor_b/f0_0.png", "carphone_low/f0_0.png",
    ]  # fmt: skip


def test_a_crop_without_a_row_and_a_tar_without_such_clips_are_told(crops, tmp_path):
    row, image = {"file": "street/a.png", "frame": 0, "x1": 0, "y1": 0, "x2": 1, "y2": 1}, np.zeros((8, 8, 3), np.uint8)
    street = write_tar(tmp_path / "street.tar", [row], [image])
    with pytest.raises(ValueError, match="no crop is of the clips that judge"):
        judged_crops(street)

    unknown = write_tar(tmp_path / "unknown.tar", [{**row, "file": "classroom/a.png"}], [image])
    unknown.with_suffix(".csv").write_text("file,frame,x1,y1,x2,y2\n")
    with pytest.raises(ValueError, match=r"unknown\.csv has no row of classroom/a\.png"):
        judged_crops(unknown)


def test_each_face_and_side_is_damaged_in_its_own_way_and_always_the_same(truths):
    face = protocol_faces(truths)[0]
    pair, again, other = moderate_pair(face, 64, 0), moderate_pair(face, 64, 0), moderate_pair(face, 64, 1)

    assert pair.low.shape == (16, 16, 3) and pair.low.dtype == np.uint8 and pair.truth.shape == (64, 64, 3)
    assert np.array_equal(pair.low, again.low) and not np.array_equal(pair.low, other.low)
    assert np.abs(bicubic(pair.low, 4).astype(int) - pair.truth).mean() < 40  # the same face still
    assert pair.landmarks == pytest.approx((POINTS + 0.5) / 4 - 0.5)
    with pytest.raises(ValueError, match="256 px is too small for a truth of 512 px"):
        moderate_pair(face, 512, 0)


def test_kid_is_the_unbiased_mean_of_the_kernel_over_pairs():
    rng = np.random.default_rng(0)
    a, b = rng.normal(0, 1, (4, 3)), rng.normal(0.5, 1, (5, 3))

    def mean(x: np.ndarray, y: np.ndarray, *, same: bool) -> float:
        return float(np.mean([
            (p @ q / 3 + 1) ** 3 for i, p in enumerate(x) for j, q in enumerate(y) if not (same and i == j)
        ]))  # fmt: skip

    assert kid(a, b) == pytest.approx(mean(a, a, same=True) + mean(b, b, same=True) - 2 * mean(a, b, same=False))
    with pytest.raises(ValueError, match="two pictures on each side"):
        kid(a[:1], b)


def test_kid_is_about_0_for_halves_of_one_set_and_rises_for_other_pictures(judges):
    features = PooledFeatures(judges["lpips"], "fa")
    pictures = [window(number, 64) for number in range(128)]
    one, other = pictures[::2], pictures[1::2]
    blurred = [cv2.GaussianBlur(picture, (0, 0), 3) for picture in other]
    dark = [picture // 3 for picture in other]
    own = features(one)

    assert own.shape == (64, 8)
    same = abs(kid(own, features(other)))
    assert same < kid(features(dark), own) / 2, (same, kid(features(dark), own), kid(features(blurred), own))


def test_a_network_without_the_value_asked_for_is_told(judges):
    with pytest.raises(ValueError, match="has no value al6"):
        PooledFeatures(judges["lpips"], "al6")


def test_the_landmark_error_is_in_parts_of_the_distance_between_the_eyes():
    assert landmark_error(POINTS + np.array([0, 9]), POINTS) == pytest.approx(9 / 45)
    assert np.isnan(landmark_error(None, POINTS))


@pytest.mark.parametrize("field", ["network", "truths", "clean", "crops", "lpips", "detector"])
def test_a_file_that_is_missing_is_told_in_one_line(configured, tmp_path, field):
    config = configured(tmp_path, **{field: tmp_path / "gone.onnx"})

    with pytest.raises((OSError, ValueError), match="gone") as told:
        evaluate_real(config, command="", unshown=tmp_path)
    assert "\n" not in str(told.value)


def test_a_side_that_no_judge_can_see_is_refused(configured, tmp_path):
    with pytest.raises(ValidationError, match="64"):
        configured(tmp_path, sides=[32])


@pytest.mark.parametrize(("name", "sides"), [("scgan", [64]), ("scgan-x", [128, 256])])
def test_a_shipped_config_does_all_and_reports_under_its_name(name, sides):
    config = read_settings(RealEvaluateConfig, ROOT / f"configs/evaluate/{name}.yaml")

    assert config.sides == sides and config.limit is None
    assert config.report.resolve() == ROOT / f"docs/results/{name}.md"
    assert config.sheet.resolve().parent == config.report.resolve().parent
    assert config.network.resolve() == ROOT / f"models/weights/{name}.onnx"
    assert config.detector and config.reference and len(config.embedders) == 2


def test_the_whole_on_a_few_real_faces(configured, shared, tmp_path):
    """With the real judges; what is clean is our own, as it needs to be sharp alone."""
    shipped = read_settings(RealEvaluateConfig, ROOT / "configs/evaluate/scgan.yaml")
    real = {name: getattr(shipped, name) for name in ("lpips", "features", "embedders", "detector", "reference")}
    config = configured(
        tmp_path, **real, truths=shipped.truths, crops=shipped.crops, rivals=shipped.rivals, limit=2
    )  # fmt: skip

    report = evaluate_real(config, command="", unshown=tmp_path / "unshown")

    assert "6 crops of" in report
    found, off, *_ = (numbers(cell)[0] for cell in cells(report, "bicubic", "real crops ×4"))
    assert 0 < found <= 1 and 0 < off < 0.6
    assert numbers(cells(report, "tiny", "16 → 64 px")[2])[0] > 0.3  # not trained, so as far off as bicubic is
    assert len(cells(report, "bicubic", "share found |")) == 3
    assert cv2.imread(str(tmp_path / "sheet.jpg")).shape[0] == 2 * 160  # four crops, three in a row
