import pytest

torch = pytest.importorskip("torch", reason="the extra train is not installed")

import csv  # noqa: E402
import io  # noqa: E402
import json  # noqa: E402
import re  # noqa: E402
import tarfile  # noqa: E402
from collections.abc import Callable  # noqa: E402
from dataclasses import replace  # noqa: E402
from pathlib import Path  # noqa: E402

import cv2  # noqa: E402
import numpy as np  # noqa: E402
import onnx  # noqa: E402
from onnx import helper  # noqa: E402
from PIL import Image  # noqa: E402
from skimage.data import astronaut  # noqa: E402
from training import save_onnx  # noqa: E402

from models.checkpoint import describe  # noqa: E402
from models.dataset import Face  # noqa: E402
from models.evaluate_guided import (  # noqa: E402
    GuidedCheckpoint,
    GuidedEvaluateConfig,
    GuidedRestorer,
    brought,
    choose_trials,
    damaged,
    evaluate_guided,
    light,
    occluded,
    sheet_places,
)
from models.export import export  # noqa: E402
from models.gfrnet import PRESETS, VARIANTS, Gfrnet, GfrnetConfig  # noqa: E402
from models.judges import FaceEmbedder  # noqa: E402
from models.settings import read_settings  # noqa: E402

# torch's exporter uses what torch deprecates
pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning", "ignore::DeprecationWarning")

ROOT = Path(__file__).parents[2]
SIDE, STORED = 64, 128
MODERN = replace(PRESETS["small"], base=8, cap=8, depth=3)
PHOTOS = {"c_1": 4, "c_2": 3, "ldn_1": 2, "ldn_2": 2}  # of each person; the first guides the others
TINTS = {"c_1": (1, 0.3, 0.3), "c_2": (0.3, 1, 0.3), "ldn_1": (0.3, 0.3, 1), "ldn_2": (1, 1, 0.3)}
POINTS = np.array([[97, 105], [151, 103], [126, 133], [106, 164], [148, 162]], np.float32) / 2  # of the astronaut
BOX = (30, 25, 95, 105)
FACE = cv2.resize(np.ascontiguousarray(astronaut()[0:224, 112:336, ::-1]), (STORED, STORED))


def photo(person: str, number: int) -> np.ndarray:
    """Every person has a colour, every photo of a person a brightness."""
    return (FACE * TINTS[person] * (1 - 0.1 * number)).astype(np.uint8)


@pytest.fixture(scope="module")
def truths(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The faces, beside them their table, and the pairs in pairs.txt."""
    return write_faces(tmp_path_factory.mktemp("truths"))


def write_faces(folder: Path, **more: Callable[[int], object]) -> Path:
    """Columns of `more` are made of a photo's number."""
    path, lines = folder / "faces.tar", ["# query reference"]
    points = {f"{point}_{axis}": value for point, place in zip(("le", "re", "nose", "lm", "rm"), POINTS, strict=True)
              for axis, value in zip("xy", place, strict=True)}  # fmt: skip
    box = dict(zip(("face_x1", "face_y1", "face_x2", "face_y2"), BOX, strict=True))
    with tarfile.open(path, "w") as tar, path.with_suffix(".csv").open("w", newline="") as table:
        writer = csv.DictWriter(table, ["file", "identity", *box, *points, *more])
        writer.writeheader()
        for person, number in [(person, number) for person, count in PHOTOS.items() for number in range(count)]:
            name = f"{person}/{number}.png"
            stored = cv2.imencode(".png", photo(person, number))[1].tobytes()
            entry = tarfile.TarInfo(name)
            entry.size = len(stored)
            tar.addfile(entry, io.BytesIO(stored))
            made = {column: make(number) for column, make in more.items()}
            writer.writerow({"file": name, "identity": person, **box, **points, **made})
            lines += [f"{name} {person}/0.png"] if number else []
    (folder / "pairs.txt").write_text("\n".join(lines))
    return path


@pytest.fixture(scope="module")
def judges(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """A distance: the mean absolute difference. A recogniser: the aligned face in 16 by 16 colours, less grey."""
    folder = tmp_path_factory.mktemp("judges")
    lpips, embedder = folder / "distance.onnx", folder / "face-reidentification-retail-0095.onnx"
    save_onnx(
        lpips,
        [
            helper.make_node("Sub", ["a", "b"], ["less"]),
            helper.make_node("Abs", ["less"], ["error"]),
            helper.make_node("ReduceMean", ["error"], ["out"], keepdims=0),
        ],
        ["a", "b"],
    )
    save_onnx(
        embedder,
        [
            helper.make_node("Sub", ["image", "grey"], ["centred"]),
            helper.make_node("AveragePool", ["centred"], ["out"], kernel_shape=[8, 8], strides=[8, 8]),
        ],
        ["image"],
        grey=np.float32(128),
    )
    return {"lpips": lpips, "embedders": {"colours": embedder}}


def blending(folder: Path, *, side: int = SIDE) -> Path:
    """A guided restorer that gives half of its input and half of its guide, and nothing but that."""
    path = folder / f"blend{side}.onnx"
    nodes = [helper.make_node("Mean", ["image", "guide"], ["restored"])]
    model = onnx.load(save_onnx(path, nodes, ["image", "guide"]))
    card = {
        "name": "blend", "task": "guided-restoration", "result_size": side, "size_multiple": 1, "color": "RGB",
        "mean": [127.5] * 3, "std": [127.5] * 3, "output_range": [-1, 1], "trained_on": "nothing",
    }  # fmt: skip
    model.metadata_props.append(onnx.StringStringEntryProto(key="streamer.card", value=json.dumps(card)))
    onnx.save(model, str(path))
    return path


@pytest.fixture(scope="module")
def blend(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return blending(tmp_path_factory.mktemp("blend"))


def checkpoint(path: Path, config: GfrnetConfig) -> Path:
    """An untrained GFRNet."""
    torch.manual_seed(0)
    network = Gfrnet(config)
    state = {"network": describe(network), "weights": network.state_dict(), "step": 0}
    torch.save(state | {"config": {"data": ["some/faces_train.tar"], "side": SIDE}}, path)
    return path


@pytest.fixture(scope="module")
def untrained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """An untrained GFRNet of our design, which gives its input back: its ONNX and its checkpoint."""
    folder = tmp_path_factory.mktemp("untrained")
    best = checkpoint(folder / "best.pt", MODERN)
    export(torch.load(best, weights_only=True), folder / "untrained.onnx", name="untrained", license="test")
    return folder / "untrained.onnx", best


def configured(network: Path, truths: Path, out: Path, **more: object) -> GuidedEvaluateConfig:
    paths = {"pairs": truths.with_name("pairs.txt"), "report": out / "report.md", "sheet": out / "sheet.jpg"}
    return GuidedEvaluateConfig.model_validate(
        {"protocol": "gfrnet", "network": network, "truths": truths, **paths, **more}
    )


Told = tuple[str, Path, GuidedEvaluateConfig]
"""A report, the folder that it lies in, and what made it."""


@pytest.fixture(scope="module")
def same(untrained, truths, judges, tmp_path_factory) -> Told:
    """The whole report of the network that gives its input back."""
    out = tmp_path_factory.mktemp("same")
    config = configured(untrained[0], truths, out, **judges)
    return evaluate_guided(config, command="evaluate it", unshown=out / "out"), out, config


@pytest.fixture(scope="module")
def blended(blend, truths, judges, tmp_path_factory) -> Told:
    """The whole report of the network that gives half of its guide, with what checkpoints add to it."""
    out = tmp_path_factory.mktemp("blended")
    variants = {name: checkpoint(out / f"{name}.pt", VARIANTS[name].config(MODERN)) for name in ("-W", "-WG")}
    drawing = checkpoint(out / "best.pt", MODERN)
    config = configured(blend, truths, out, checkpoint=drawing, variants=variants, **judges)
    return evaluate_guided(config, command="", unshown=out / "out"), out, config


def cells(report: str, section: str, table: str, row: str) -> list[str]:
    """The cells of a row, by the beginnings of its section, of its table's first line and of itself."""
    part = report[report.index(f"\n## {section}") + 3 :].partition("\n## ")[0]
    lines = part[part.index(f"\n| {table}") :].lstrip().partition("\n\n")[0].splitlines()
    line = next(line for line in lines[2:] if line.strip("|* ").startswith(row))
    return [cell.strip(" *") for cell in line.strip("|").split("|")[1:]]


def figures(report: str, section: str, table: str, row: str) -> list[float]:
    """The first figure of each cell that is not empty."""
    return [float(re.findall(r"[-+]?\d+\.\d+", cell)[0]) for cell in cells(report, section, table, row) if cell]


def mean_psnr(images: list[np.ndarray], truths: list[np.ndarray]) -> float:
    errors = [np.mean((a.astype(float) - b) ** 2) for a, b in zip(images, truths, strict=True)]
    return float(np.mean(10 * np.log10(255**2 / np.array(errors))))


def halves(images: list[np.ndarray], guides: list[np.ndarray]) -> list[np.ndarray]:
    """What the blending network gives, by our own hand; a half may be rounded either way."""
    return [np.rint((a.astype(float) + b) / 2).astype(np.uint8) for a, b in zip(images, guides, strict=True)]


# Trials


@pytest.mark.parametrize("limit", [2, 3, 4, 5, None])
def test_a_stranger_is_never_the_same_person_and_a_guide_always_is(blend, truths, tmp_path, limit):
    trials = choose_trials(configured(blend, truths, tmp_path, pairs_limit=limit), SIDE)

    assert len(trials) == (limit or 7)
    for trial in trials:
        assert trial.truth.identity == trial.guide.identity != trial.stranger.identity
        assert trial.truth.name != trial.guide.name
        assert trial.stranger.name.endswith("/0.png")  # as good a guide as the own one


def test_every_person_is_chosen_once_before_any_twice_and_the_same_each_time(blend, truths, tmp_path):
    names = [
        [trial.truth.name for trial in choose_trials(configured(blend, truths, tmp_path, **more), SIDE)]
        for more in ({"pairs_limit": 4}, {"pairs_limit": 4}, {"pairs_limit": 5}, {"pairs_limit": 4, "seed": 1})
    ]

    assert {name.split("/")[1] for name in names[0]} == PHOTOS.keys()
    assert names[0] == names[1] == names[2][:4] != names[3]


def test_guides_are_laid_onto_their_faces_where_the_network_wants_them(blend, truths, tmp_path):
    config = configured(blend, truths, tmp_path)
    as_they_are, laid = choose_trials(config, SIDE), choose_trials(config, SIDE, laid=True)

    for before, after in zip(as_they_are, laid, strict=True):
        assert np.array_equal(before.truth.image, after.truth.image)
        for guide in (after.guide, after.stranger):
            assert guide.landmarks.mean(0) == pytest.approx(after.truth.landmarks.mean(0), abs=0.01)


def test_faces_keep_their_framing_and_their_landmarks_their_place():
    dot = np.zeros((STORED, STORED, 3), np.uint8)
    dot[60:64, 80:84] = 255
    face = Face("faces/one.png", "one", dot, BOX, np.tile(np.float32([81.5, 61.5]), (5, 1)))

    small = brought(face, SIDE)

    rows, columns = np.nonzero(small.image.max(axis=2))
    weights = small.image[rows, columns, 0].astype(float)
    assert small.landmarks[0] == pytest.approx(
        [np.average(columns, weights=weights), np.average(rows, weights=weights)], abs=0.05
    )
    assert small.box == (15, 12.5, 47.5, 52.5)


def test_a_face_that_is_not_square_is_named():
    with pytest.raises(ValueError, match=r"faces/wide\.png is 128x100, not square"):
        brought(Face("faces/wide.png", "one", FACE[:100], BOX, POINTS), SIDE)


def test_the_damage_of_a_face_is_its_own_and_does_not_change():
    face, other = (Face(f"faces/{name}.png", name, FACE, BOX, POINTS) for name in "ab")

    assert np.array_equal(damaged(face, 4, 0), damaged(face, 4, 0))
    for changed in (damaged(face, 8, 0), damaged(face, 4, 1), damaged(other, 4, 0)):
        assert not np.array_equal(damaged(face, 4, 0), changed)


def test_an_occluded_guide_is_covered_in_part_by_one_colour():
    for name in "abcd":
        face = Face(f"faces/{name}.png", name, FACE, BOX, POINTS)

        changed = (occluded(face, 0) != FACE).any(axis=2)

        assert 0.01 < changed.mean() < 0.6
        assert len(np.unique(occluded(face, 0)[changed], axis=0)) == 1


def test_light_is_the_mean_of_the_box_and_what_its_left_has_more():
    lit = np.full((STORED, STORED, 3), 255, np.uint8)  # beyond the box nothing counts
    lit[20:100, 20:60], lit[20:100, 60:100] = 120, 80
    face = Face("faces/lit.png", "lit", lit, (20, 20, 100, 100), POINTS)

    assert light(face) == pytest.approx([100, 40])
    assert light(replace(face, image=lit[:, ::-1].copy(), box=(28, 20, 108, 100))) == pytest.approx([100, -40])


# The report


def test_a_report_has_all_its_sections_and_says_what_was_judged(same):
    report, out, _ = same

    assert (out / "report.md").read_text() == report
    assert re.findall("^#+ (.*)", report, re.MULTILINE) == [
        "untrained at GFRNet's protocol",
        "What was aimed at",
        "Beside the paper's Table 1",
        "×4, blur, noise and JPEG drawn from their sets",
        "×8, blur, noise and JPEG drawn from their sets",
        "×4, bicubic alone",
        "×8, bicubic alone",
        "The pull towards the guide",
    ]
    assert "`evaluate it`" in report
    assert "7 pairs of 4 people out of pairs.txt and faces.tar" in report
    assert "trained on: faces_train." in report and "0 of 7 truths were stored smaller" in report
    assert "Age is no column of faces.csv: a guide of another age is not measured." in report


def test_a_network_that_gives_its_input_back_gains_nothing_and_pulls_nowhere(same):
    report, _, _ = same

    for scale in (4, 8):
        for guide in ("own |", "absent (grey)", "a stranger's", "own, occluded", "own, another light (2 pairs)"):
            gains = cells(report, f"×{scale}, blur", "gain over the input", guide)
            assert gains == ["+0.00 (+0.00 to +0.00)"] + ["+0.000 (+0.000 to +0.000)"] * 4
        for whose in ("mates: own", "strangers: a stranger's"):
            assert cells(report, "The pull", f"×{scale}, colours", whose)[2] == "+0.000 (+0.000 to +0.000)"
        assert f"- ×{scale}: +0.00 (+0.00 to +0.00) dB over bicubic. The aim of" in report
        assert f"×{scale}, pull of a stranger's guide, colours: +0.000" in report
    assert report.count("is not met; the floor") == 2 and "is met" not in report
    assert report.count("not met, and that there is any gain is unproven") == 4  # dB and identity at both scales
    assert report.count("at most 0.05 holds.") == 2


@pytest.mark.parametrize("scale", [4, 8])
def test_figures_are_those_of_a_count_by_hand(blended, judges, scale):
    report, _, config = blended
    trials = choose_trials(config, SIDE)
    clean = [trial.truth.image for trial in trials]
    embedder = FaceEmbedder(judges["embedders"]["colours"])

    def shrunk_and_enlarged(image: np.ndarray) -> np.ndarray:
        small = Image.fromarray(image).resize((SIDE // scale,) * 2, Image.Resampling.BICUBIC)
        return np.asarray(small.resize((SIDE, SIDE), Image.Resampling.BICUBIC))

    def cosine(images: list[np.ndarray], others: list[Face]) -> float:
        given = embedder.embed(images, [trial.truth.landmarks for trial in trials])
        wanted = embedder.embed([face.image for face in others], [face.landmarks for face in others])
        return float((given * wanted).sum(axis=1).mean())

    plain = [shrunk_and_enlarged(image) for image in clean]
    hurt = [damaged(trial.truth, scale, config.seed) for trial in trials]
    own, strange, covers = (
        [trial.guide.image for trial in trials],
        [trial.stranger.image for trial in trials],
        [occluded(trial.guide, config.seed) for trial in trials],
    )
    grey = [np.full_like(image, 128) for image in own]
    rows = {"input": hurt, "own |": halves(hurt, own), "absent": halves(hurt, grey),
            "a stranger's": halves(hurt, strange), "own, occluded": halves(hurt, covers)}  # fmt: skip
    for row, images in rows.items():
        found = figures(report, f"×{scale}, blur", "guide", row)
        assert found[0] == pytest.approx(mean_psnr(images, clean), abs=0.05)
        assert found[3:] == pytest.approx(
            [cosine(images, [t.truth for t in trials]), cosine(images, [t.guide for t in trials])], abs=0.002
        )
    for row, images in {"input": plain, "own |": halves(plain, own), "a stranger's": halves(plain, strange)}.items():
        found = figures(report, f"×{scale}, bicubic", "guide", row)
        assert found[0] == pytest.approx(mean_psnr(images, clean), abs=0.05)

    gained = mean_psnr(rows["own |"], clean) - mean_psnr(rows["a stranger's"], clean)
    assert figures(report, f"×{scale}, blur", "gain of the own", "a stranger's")[0] == pytest.approx(gained, abs=0.05)
    strangers = [trial.stranger for trial in trials]
    before, after = (cosine(images, strangers) for images in (hurt, rows["a stranger's"]))
    pull = figures(report, "The pull", f"×{scale}, colours", "strangers: a stranger's")
    assert pull == pytest.approx([before, after, after - before, cosine(clean, strangers)], abs=0.002)
    assert f"{pull[2]:+.3f}" in report.split("pull of a stranger's guide")[1 if scale == 4 else 2]


def test_half_of_a_stranger_is_told_as_too_much_of_a_pull(blended):
    report, _, _ = blended

    pulls = [figures(report, "The pull", f"×{scale}, colours", "strangers: a stranger's")[2] for scale in (4, 8)]
    assert min(pulls) > 0.05
    assert report.count("at most 0.05 does not hold.") == 2
    assert "is met." in report.split("×4, own guide over a stranger's, PSNR")[1].splitlines()[0]


def test_the_paper_stands_beside_ours_with_the_difference(blended):
    report, _, _ = blended

    for scale, paper in ((4, (28.55, 32.31)), (8, (24.10, 27.21))):
        ours, *others = figures(report, "Beside", f"×{scale}: PSNR", "Full")
        assert ours == figures(report, f"×{scale}, blur", "guide", "own |")[0]
        assert others[::2] == list(paper)
        assert others[1::2] == pytest.approx(np.subtract(ours, paper), abs=0.011)
        stranger = figures(report, f"×{scale}, blur", "guide", "a stranger's")[0]
        assert figures(report, "Beside", f"×{scale}: PSNR", "R")[0] == stranger
        assert figures(report, "Beside", f"×{scale}: PSNR", "Full − R")[0] == pytest.approx(ours - stranger, abs=0.011)
    assert cells(report, "Beside", "×8: PSNR", "-W |")[1] == "23.29 / 0.843"
    assert cells(report, "Beside", "×8: PSNR", "R")[3] == "26.88 / 0.922"


def test_variants_are_measured_where_their_checkpoints_are_and_else_empty(same, blended):
    for scale in (4, 8):
        untrained = figures(blended[0], f"×{scale}, blur", "guide", "input")[0]  # they give their input back
        for name in ("-W |", "-WG |"):
            assert figures(blended[0], "Beside", f"×{scale}: PSNR", name)[0] == untrained
            ours, _, apart, _, _ = cells(same[0], "Beside", f"×{scale}: PSNR", name)
            assert ours == apart == ""


def test_a_checkpoint_that_is_another_variant_is_refused(blend, truths, tmp_path):
    config = configured(blend, truths, tmp_path, variants={"-WG": checkpoint(tmp_path / "w.pt", MODERN)})

    with pytest.raises(ValueError, match=r"w\.pt is not -WG: its guide is True, its warp True"):
        evaluate_guided(config, command="", unshown=tmp_path)


def test_another_age_is_measured_where_the_table_tells_ages(blend, tmp_path):
    truths = write_faces(tmp_path, age=lambda number: 20 + 10 * number)

    report = evaluate_guided(configured(blend, truths, tmp_path), command="", unshown=tmp_path / "out")

    assert "the quarter that is furthest apart by the column `age` of faces.csv" in report
    assert cells(report, "×4, blur", "gain over the input", "own, another age (2 pairs)")
    assert "The pull" not in report  # there is no recogniser


# Sheets


def test_a_sheet_shows_only_faces_that_may_be_shown_and_the_others_lie_elsewhere(same):
    report, out, config = same

    shown, others = (cv2.imread(str(out / name)) for name in ("sheet.jpg", "out/sheet.others.jpg"))
    free = {t.truth.name: t.truth for t in choose_trials(config, SIDE) if t.truth.identity.startswith("ldn_")}
    assert shown.shape == (2 * 128, 6 * 128, 3) and others.shape == (5 * 128, 6 * 128, 3)
    truths = [shown[top : top + 128, -128:] for top in (0, 128)]
    large = [cv2.resize(face.image, (128, 128), interpolation=cv2.INTER_AREA) for face in free.values()]
    for truth in truths:  # each is one of London's, but for JPEG
        assert min(np.abs(truth.astype(float) - each).mean() for each in large) < 10
    assert "![Contact sheet](sheet.jpg)" in report and "2 of 2 pairs" in report and "CC BY 4.0" in report
    assert "Columns: input, guide, warped guide, mask, restored, truth." in report
    assert sorted(path.name for path in out.iterdir()) == ["out", "report.md", "sheet.jpg"]


def test_where_the_onnx_gives_the_face_alone_the_checkpoint_shows_the_rest(blended, blend, truths, tmp_path):
    plain = evaluate_guided(configured(blend, truths, tmp_path), command="", unshown=tmp_path / "out")

    assert "Columns: input, guide, warped guide, mask, restored, truth." in blended[0]
    assert "Columns: input, guide, restored, truth." in plain
    assert cv2.imread(str(tmp_path / "sheet.jpg")).shape == (2 * 128, 4 * 128, 3)


def test_onnx_and_checkpoint_show_the_same(untrained):
    image, guide = (cv2.resize(photo("c_1", number), (SIDE, SIDE)) for number in (0, 1))

    seen = [each.restore(image, guide) for each in (GuidedRestorer(untrained[0]), GuidedCheckpoint(untrained[1]))]

    for restored in seen:
        assert np.array_equal(restored.image, image)
        assert np.abs(restored.warped.astype(int) - guide).max() <= 1  # untrained, it is not moved
        assert np.abs(restored.mask - 255 * 0.9 * MODERN.trust).max() <= 1 and restored.mask.shape == image.shape


def test_the_sheet_takes_the_best_and_the_worst_and_of_few_all():
    gains = np.random.default_rng(0).permutation(50).astype(float)

    assert [*gains[sheet_places(gains)]] == [*range(49, 29, -1), *range(19, -1, -1)]
    assert [*gains[:30][sheet_places(gains[:30])]] == sorted(gains[:30], reverse=True)


# Mistakes


@pytest.mark.parametrize("field", ["network", "truths", "pairs", "lpips", "checkpoint"])
def test_a_file_that_is_missing_is_one_line_with_its_name(blend, truths, tmp_path, field):
    config = configured(blend, truths, tmp_path).model_copy(update={field: tmp_path / "missing.file"})

    with pytest.raises((OSError, ValueError), match=r"missing\.file") as told:
        evaluate_guided(config, command="", unshown=tmp_path)

    assert "\n" not in str(told.value)
    assert not (tmp_path / "report.md").exists()


def test_a_network_that_is_no_guided_restorer_is_named(truths, judges, tmp_path):
    with pytest.raises(ValueError, match=r"distance\.onnx has no card of a guided restorer"):
        evaluate_guided(configured(judges["lpips"], truths, tmp_path), command="", unshown=tmp_path)


def test_the_shipped_config_does_all_and_reports_under_its_name():
    config = read_settings(GuidedEvaluateConfig, ROOT / "configs/evaluate/gfrnet-small.yaml")

    assert config.network == ROOT / "models/weights/gfrnet-small.onnx"
    assert (config.report, config.sheet) == tuple(ROOT / f"docs/results/gfrnet-small.{kind}" for kind in ("md", "jpg"))
    assert config.lpips and len(config.embedders) == 2


def test_the_whole_on_a_few_real_pairs(shared, tmp_path):
    shipped = read_settings(GuidedEvaluateConfig, ROOT / "configs/evaluate/gfrnet-small.yaml")
    given = {"network": blending(tmp_path, side=256), "report": tmp_path / "r.md", "sheet": tmp_path / "s.jpg"}
    config = shipped.model_copy(update={**given, "pairs_limit": 3})

    report = evaluate_guided(config, command="", unshown=tmp_path / "out")

    four, eight = (figures(report, f"×{scale}, bicubic", "guide", "input") for scale in (4, 8))
    hurt = figures(report, "×4, blur", "guide", "input")
    assert 18 < eight[0] < four[0] < 40 and hurt[0] < four[0] and eight[1] < four[1]
    assert 0 < four[2] < eight[2] and min(np.subtract(four[3:5], eight[3:5])) > 0  # LPIPS, and both identities
    for name in ("retail-0095", "MobileFaceNet"):
        mates, strangers = (figures(report, "The pull", f"×4, {name}", row) for row in ("mates: own", "strangers: a"))
        assert mates[3] > strangers[3] + 0.1  # the truths themselves
        assert strangers[2] > 0  # half of the stranger is in it
