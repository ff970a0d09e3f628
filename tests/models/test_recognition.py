import csv
import io
import json
import tarfile
from pathlib import Path

import cv2
import numpy as np
import onnx
import pytest
import yaml
from onnx import TensorProto, helper, numpy_helper

pytest.importorskip("PIL", reason="the extra train is not installed")

from models.dataset import Face
from models.recognition import (
    Cell,
    CleanSet,
    FaceSet,
    Gain,
    RecognitionConfig,
    Trials,
    clean_faces,
    degraded_probe,
    evaluate,
    load_trials,
    main,
    rank,
    redraws,
    reduced_crop,
    threshold,
    true_accepts,
    verdict,
)
from models.settings import SettingsError, read_settings

POINTS = np.array([[0.35, 0.4], [0.65, 0.4], [0.5, 0.55], [0.37, 0.75], [0.63, 0.75]])  # in parts of the box
BOX = (40.0, 32.0, 136.0, 152.0)
PEOPLE, PHOTOS = 16, 3
SIDE = 192
NUMBERS = {"first": [2, 2], "last": [32, 32], "axes": [2, 3], "step": [9, 9]}
BLUR = [helper.make_node("AveragePool", ["image"], ["out"], kernel_shape=[17, 17], pads=[8] * 4)]
WIPE = [
    helper.make_node("ReduceMean", ["image"], ["mean"]),
    helper.make_node("Sub", ["image", "image"], ["nothing"]),
    helper.make_node("Add", ["nothing", "mean"], ["out"]),
]
SPARSE = [
    helper.make_node("Slice", ["image", "first", "last", "axes", "step"], ["few"]),
    helper.make_node("Flatten", ["few"], ["out"]),
]
SAME = [helper.make_node("Identity", ["image"], ["out"])]


def photo(person: int, number: int) -> np.ndarray:
    """A person is a coarse pattern, a photograph of him that pattern with some other one over it."""
    pattern = np.random.default_rng(person).uniform(-30, 30, (6, 6, 3))
    other = np.random.default_rng([person, number]).uniform(-7, 7, (6, 6, 3))
    coarse = cv2.resize((127 + pattern + other).astype(np.float32), (SIDE, SIDE), interpolation=cv2.INTER_CUBIC)
    return np.clip(coarse, 0, 255).astype(np.uint8)


def face(image: np.ndarray, name: str = "made/a/0.png", box: tuple[float, float, float, float] = BOX) -> Face:
    corner, size = np.array(box[:2]), np.array(box[2:]) - box[:2]
    return Face(name, name.split("/")[1], image, box, (corner + POINTS * size).astype(np.float32))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with made.tar, made.csv and pairs.txt: every person's first photo with his others, and with others'."""
    folder = tmp_path_factory.mktemp("made")
    landmarks = face(photo(0, 0)).landmarks.ravel()
    columns = [f"{point}_{axis}" for point in ("le", "re", "nose", "lm", "rm") for axis in "xy"]
    with tarfile.open(folder / "made.tar", "w") as tar, (folder / "made.csv").open("w", newline="") as table:
        writer = csv.writer(table)
        writer.writerow(["file", "identity", "face_x1", "face_y1", "face_x2", "face_y2", *columns])
        for person in range(PEOPLE):
            for number in range(PHOTOS):
                stored = cv2.imencode(".png", photo(person, number))[1].tobytes()
                entry = tarfile.TarInfo(f"p{person}/{number}.png")
                entry.size = len(stored)
                tar.addfile(entry, io.BytesIO(stored))
                writer.writerow([entry.name, f"p{person}", *BOX, *landmarks])
    mates = [f"p{person}/0.png p{person}/{number}.png 1" for person in range(PEOPLE) for number in range(1, PHOTOS)]
    others = [f"p{person}/0.png p{(person + 3) % PEOPLE}/1.png 0" for person in range(PEOPLE)]
    (folder / "pairs.txt").write_text("\n".join(["# file_a file_b same", *mates, *others]))
    return folder


def network(path: Path, nodes: list[onnx.NodeProto], **metadata: str) -> Path:
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["n", 3, "h", "w"])],
        [helper.make_tensor_value_info("out", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.array(value), name) for name, value in NUMBERS.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    model.metadata_props.extend(onnx.StringStringEntryProto(key=k, value=v) for k, v in metadata.items())
    onnx.save(model, str(path))
    return path


def restorer(path: Path, nodes: list[onnx.NodeProto], scales: tuple[int, ...] = (4, 2, 1)) -> Path:
    card = {
        "name": "tiny", "color": "RGB", "mean": [127.5] * 3, "std": [127.5] * 3, "output_range": [-1, 1],
        "scales": scales, "enlarge": "cubic", "size_multiple": 1, "trained_on": "nothing",
    }  # fmt: skip
    return network(path, nodes, **{"streamer.card": json.dumps(card)})


def configured(made: Path, folder: Path, **more: object) -> RecognitionConfig:
    """One recogniser, whose embedding is a few of the aligned face's pixels: noise confuses it."""
    eyes = network(folder / "eyes.onnx", SPARSE)
    preparation = {"side": 32, "template": (POINTS * 32).tolist(), "color": "BGR", "mean": 127.5}
    return RecognitionConfig.model_validate({
        "restorers": {"tiny": restorer(folder / "tiny.onnx", SAME)},
        "recognisers": {"eyes": eyes}, "preparations": {"eyes": preparation},
        "sets": {"made": {"truths": made / "made.tar", "pairs": made / "pairs.txt"}},
        "heights": [16], "report": folder / "results/recognition.md", **more,
    })  # fmt: skip


def row(report: str, title: str, table: int = 0) -> list[str]:
    """The cells of a row of a report."""
    lines = [line for line in report.splitlines() if line.startswith(f"| {title} |")]
    return [cell.strip() for cell in lines[table].strip("|").split("|")[1:]]


def trials(mates: int, people: int, rng: np.random.Generator) -> tuple[Trials, np.ndarray]:
    """Everybody is a probe and a reference; similarities are drawn, those of mates higher."""
    everybody = np.arange(people)
    pairs = np.stack([everybody[:mates], everybody[:mates]], axis=1)
    impostors = np.flatnonzero(everybody[:, None] != everybody[None])
    faces = [face(np.zeros((4, 4, 3), np.uint8))] * people
    similarities = rng.normal(0, 1, (people, people))
    similarities[np.diag_indices(people)] += 2.5
    return Trials(faces, faces, pairs, everybody, everybody, impostors), similarities


def test_a_crop_is_a_square_of_a_face_of_exactly_the_height_asked_for():
    image = np.full((SIDE, SIDE, 3), 40, np.uint8)
    x1, y1, x2, y2 = map(int, BOX)
    image[y1:y2, x1:x2] = 200  # the face fills its box: columns 40 to 135, rows 32 to 151

    low, _ = reduced_crop(face(image, box=(x1 - 0.5, y1 - 0.5, x2 - 0.5, y2 - 0.5)), 24)

    assert low.shape == (round(1.6 * 24), round(1.6 * 24), 3)
    bright = (low[..., 0].astype(float) - 40) / 160
    assert bright[:, 19].sum() == pytest.approx(24, abs=0.1)  # high
    assert bright[19].sum() == pytest.approx(24 * 96 / 120, abs=0.1)  # wide
    y, x = np.mgrid[:38, :38]
    centre = (x * bright).sum() / bright.sum(), (y * bright).sum() / bright.sum()
    assert centre == pytest.approx((18.5, 18.5), abs=0.05)


def test_landmarks_follow_into_the_crop():
    image = np.zeros((SIDE, SIDE, 3), np.uint8)
    x, y = face(image).landmarks[2].round().astype(int)
    image[y - 2 : y + 3, x - 2 : x + 3] = 250

    low, landmarks = reduced_crop(face(image), 32)

    rows, columns = np.mgrid[: len(low), : len(low)]
    weight = low[..., 0].astype(float)
    seen = (columns * weight).sum() / weight.sum(), (rows * weight).sum() / weight.sum()
    exact = landmarks[2] + (np.array([x, y]) - face(image).landmarks[2]) * 32 / 120
    assert seen == pytest.approx(exact, abs=0.05)


def test_a_crop_beyond_the_image_replicates_its_edge():
    image = np.tile(np.arange(150, dtype=np.uint8)[None, :, None], (150, 1, 3))

    low, _ = reduced_crop(face(image, box=(10.0, 10.0, 140.0, 140.0)), 65)  # 1.16 times the box, as LFW is stored

    assert low.shape == (104, 104, 3)
    assert np.all(low[:, :8] == 0) and np.all(low[:, -8:] == 149)
    assert int(low[52, 52, 0]) == pytest.approx(75, abs=1)


def test_a_probe_has_the_noise_asked_for_the_same_each_time_but_other_for_every_face_seed_and_height():
    flat = face(np.full((SIDE, SIDE, 3), 120, np.uint8))

    def probe(of: Face = flat, height: float = 96, noise: float = 10, quality: int = 100, seed: int = 1) -> np.ndarray:
        return degraded_probe(of, height, noise=noise, quality=quality, seed=seed)[0].astype(float)

    weights = np.array([0.114, 0.587, 0.299])  # of luma: JPEG halves the noise of colour
    assert (probe() @ weights).std() == pytest.approx(10 * np.linalg.norm(weights), rel=0.05)
    assert probe().mean() == pytest.approx(120, abs=0.5)
    assert np.array_equal(probe(), probe())
    assert not np.array_equal(probe(), probe(seed=2))
    assert not np.array_equal(probe(), probe(face(flat.image, "made/b/0.png")))
    assert probe(noise=0).std() < 1
    assert np.abs(probe(quality=40) - probe()).mean() > 3


def test_the_threshold_lets_through_one_percent_of_impostors():
    drawn, similarities = trials(100, 100, np.random.default_rng(0))

    found = threshold(rank(similarities, drawn), drawn, np.ones(100))

    assert len(drawn.impostors) == 9900
    assert np.sum(similarities.ravel()[drawn.impostors] > found) == 99


def test_true_accepts_are_all_where_mates_are_far_above_and_none_where_they_are_below():
    drawn, similarities = trials(40, 60, np.random.default_rng(0))
    once, mine = np.ones(60), np.diag_indices(60)

    assert 0.3 < true_accepts(rank(similarities, drawn), drawn, once) < 0.9
    similarities[mine] = 10
    assert true_accepts(rank(similarities, drawn), drawn, once) == 1
    similarities[mine] = -10
    assert true_accepts(rank(similarities, drawn), drawn, once) == 0


def test_a_person_drawn_twice_counts_like_two_people_who_look_the_same():
    drawn, similarities = trials(30, 50, np.random.default_rng(3))
    weights = np.random.default_rng(0).integers(0, 3, 50)
    twice = np.repeat(np.arange(50), weights)
    mates = np.array([(i, j) for i in range(len(twice)) for j in range(len(twice)) if twice[i] == twice[j] < 30])
    impostors = np.flatnonzero(twice[:, None] != twice[None])
    faces = [drawn.probes[0]] * len(twice)
    written_out = Trials(faces, faces, mates, twice, twice, impostors)

    by_weight = rank(similarities, drawn)
    by_hand = rank(similarities[np.ix_(twice, twice)], written_out)

    assert drawn.impostor_weight(weights) == len(impostors)
    once = np.ones(50)
    assert threshold(by_weight, drawn, weights) == threshold(by_hand, written_out, once)
    # a mate who is drawn n times makes n pairs by weight, n x n written out: one for each of his probes here
    accepted = np.diag(similarities)[:30] > threshold(by_weight, drawn, weights)
    assert true_accepts(by_weight, drawn, weights) == pytest.approx(np.average(accepted, weights=weights[:30]))


def test_redraws_keep_the_number_of_people_and_never_lose_all_mates():
    drawn, _ = trials(2, 6, np.random.default_rng(0))

    weights = np.array(redraws(drawn, 5))

    assert np.all(weights.sum(axis=1) == 6)
    assert np.all(weights[:, :2].sum(axis=1) > 0)
    assert np.all(np.ptp(weights, axis=0) > 0)
    assert np.array_equal(weights, redraws(drawn, 5)) and not np.array_equal(weights, redraws(drawn, 6))


def test_all_pairs_are_read_and_every_combination_of_different_people_is_an_impostor(made):
    read = load_trials(FaceSet(truths=made / "made.tar", pairs=made / "pairs.txt"), seed=0)

    assert len(read.mates) == PEOPLE * (PHOTOS - 1)
    assert read.people == PEOPLE and len(read.probes) == PEOPLE
    for probe, reference in read.mates:
        assert read.probes[probe].identity == read.references[reference].identity
        assert read.probes[probe].name.endswith("/0.png") and not read.references[reference].name.endswith("/0.png")
    assert len(read.impostors) == len(read.probes) * len(read.references) - len(read.mates)
    assert read.impostor_weight(np.ones(PEOPLE)) == len(read.impostors)


def test_a_limit_draws_every_person_once_before_any_twice_and_by_the_seed(made):
    def drawn(limit: int, seed: int) -> list[str]:
        read = load_trials(FaceSet(truths=made / "made.tar", pairs=made / "pairs.txt", mates=limit, others=0), seed)
        assert len(read.probes) <= limit
        return [read.references[reference].name for _, reference in read.mates]

    assert len({name.split("/")[1] for name in drawn(PEOPLE, 0)}) == len(drawn(PEOPLE, 0)) == PEOPLE
    assert len(drawn(PEOPLE + 4, 0)) == PEOPLE + 4
    assert drawn(5, 0) == drawn(5, 0) != drawn(5, 1)


def test_a_pair_whose_photo_is_missing_is_named(made, tmp_path):
    (tmp_path / "pairs.txt").write_text("p0/0.png p0/9.png 1\n")

    with pytest.raises(ValueError, match=r"pairs\.txt names p0/9\.png, which .*made\.tar does not hold"):
        load_trials(FaceSet(truths=made / "made.tar", pairs=tmp_path / "pairs.txt"), seed=0)


def test_pairs_of_one_person_alone_are_too_few(made, tmp_path):
    (tmp_path / "pairs.txt").write_text("p0/0.png p0/1.png 1\np0/0.png p1/1.png 0\n")

    with pytest.raises(ValueError, match="pairs of at least two people"):
        load_trials(FaceSet(truths=made / "made.tar", pairs=tmp_path / "pairs.txt"), seed=0)


def test_clean_faces_are_large_enough_and_of_different_people_first(made):
    faces = clean_faces(CleanSet(truths=made / "made.tar", faces=PEOPLE, sides=(64, SIDE)), seed=0)

    assert len({each.identity for each in faces}) == PEOPLE
    with pytest.raises(ValueError, match="no square crop of 256 px"):
        clean_faces(CleanSet(truths=made / "made.tar"), seed=0)


def test_a_restorer_that_takes_noise_away_is_said_to_raise_recognition(made, tmp_path):
    blur = restorer(tmp_path / "blur.onnx", BLUR)
    config = configured(made, tmp_path, heights=[64], noise=120, jpeg=100, restorers={"blur": blur})

    report = evaluate(config, command="evaluate")

    assert "**blur, fused with the crop as it came, raises recognition: of 1 cases 1 higher" in report
    assert float(row(report, "blur")[0]) > float(row(report, "bicubic")[0]) + 0.2
    assert float(row(report, "gain of blur + raw")[0].split()[0]) > 0
    assert "fused gains at least" not in report  # the aims are for 16, 24 and 32 px


def test_a_restorer_that_wipes_the_face_out_is_said_to_lower_recognition(made, tmp_path):
    config = configured(
        made, tmp_path, heights=[32], noise=2, jpeg=95, restorers={"wipe": restorer(tmp_path / "wipe.onnx", WIPE)}
    )

    report = evaluate(config, command="evaluate")

    assert row(report, "raw") == ["1.000"] and float(row(report, "wipe")[0]) < 0.5
    assert "Restored alone, it lowers recognition: of 1 cases 0 higher, 1 lower" in report
    assert "lowered at made eyes 32 px -" in report


def test_a_restorer_that_only_enlarges_changes_nothing(made, tmp_path):
    report = evaluate(configured(made, tmp_path, noise=40), command="evaluate it")

    assert report == (tmp_path / "results/recognition.md").read_text()
    assert "`evaluate it`" in report and "noise σ 40" in report and "JPEG 40" in report
    assert "32 pairs of one person, 16 probes and 32 references of 16 people" in report
    assert "neither raises nor lowers recognition by more than chance" in report
    assert float(row(report, "tiny")[0]) == pytest.approx(float(row(report, "bicubic")[0]), abs=0.1)
    assert 0 <= float(row(report, "raw", table=1)[0].rstrip("%")) < 100
    assert "Clean probes: 1.000 accepted" in report and "## Clean crops" not in report
    assert "trained on, says its card: nothing." in report


def test_a_restorer_that_returns_clean_crops_harms_none_and_gains_nothing(made, tmp_path):
    clean = {"truths": made / "made.tar", "faces": 4, "sides": [64, 96, 128, 192]}

    report = evaluate(configured(made, tmp_path, clean=clean), command="evaluate")

    assert "4 of 4 people out of made.tar" in report
    assert row(report, "scale") == ["×4", "×2", "×2", "×1"]
    cosines = [float(cell.split(" / ")[0]) for cell in row(report, "cosine, eyes")]
    assert min(cosines) > 0.99 and cosines[-1] == 1
    assert row(report, "dB, ×1") == ["", "", "+0.00 (+0.00 to +0.00)", "+0.00 (+0.00 to +0.00)"]
    gains = [cell.split(" ")[0] for cell in row(report, "dB, ×2")]  # ×2 of 128 px has no truth of 256 px here
    assert gains[2:] == ["", ""] and -1 < float(gains[0]) < 0 and -1 < float(gains[1]) < 0
    assert "mean cosine at least 0.97: 4 of 4. PSNR gained at least 1 dB: 0 of 4 (not 64 px ×2;" in report


def test_a_restorer_is_not_judged_on_clean_crops_that_never_go_to_it(made, tmp_path):
    four = {"four": restorer(tmp_path / "four.onnx", BLUR, scales=(4,))}
    clean = {"truths": made / "made.tar", "faces": 2, "sides": [64, 128]}

    report = evaluate(configured(made, tmp_path, clean=clean, restorers=four), command="evaluate")

    assert row(report, "scale") == ["×4", "too large"]
    assert row(report, "cosine, eyes")[1] == ""
    assert "dB, ×" not in report


def cell(height: int, fused: tuple[float, float, float], false_accepts: float = 0.01) -> Cell:
    gains = {"net": Gain(-0.1, -0.2, -0.05), "net + raw": Gain(*fused)}
    return Cell("people", "judge", height, {}, {"net + raw": false_accepts}, gains)


@pytest.mark.parametrize(
    ("fused", "said"),
    [
        ([(0.05, 0.01, 0.09), (0.02, -0.01, 0.05)], "raises recognition: of 2 cases 1 higher, 0 lower, 1 too close"),
        ([(-0.05, -0.09, -0.01), (0.0, -0.1, 0.1)], "lowers recognition: of 2 cases 0 higher, 1 lower, 1 too close"),
        ([(0.05, 0.01, 0.09), (-0.05, -0.09, -0.01)], "raises recognition in some cases and lowers it in others"),
        ([(0.05, -0.01, 0.09), (-0.05, -0.09, 0.01)], "neither raises nor lowers recognition by more than chance"),
    ],
)
def test_a_verdict_says_plainly_what_the_intervals_say(fused, said):
    head, *_ = verdict("net", [cell(12, fused[0]), cell(20, fused[1])])

    assert f"**net, fused with the crop as it came, {said}" in head
    assert "Restored alone, it lowers recognition: of 2 cases 0 higher, 2 lower" in head


def test_a_verdict_names_the_aims_that_are_missed_and_where():
    cells = [
        cell(12, (-0.2, -0.3, -0.1)),
        cell(16, (0.05, 0.01, 0.09)),
        cell(24, (0.05, -0.01, 0.09)),
        cell(32, (-0.001, -0.02, 0.02), false_accepts=0.016),
    ]

    lines = verdict("net", cells)

    assert lines[2:] == [
        "- fused gains at least +0.04 at 16 and 24 px, its interval above zero: 1 of 2 (not people judge 24 px).",
        "- fused loses nothing at 32 px: 0 of 1 (not people judge 32 px).",
        "- fused accepts at most 1.5 % of impostors at the threshold of clean probes: 3 of 4 (not people judge 32 px).",
    ]


def test_paths_lie_beside_the_config_and_unknown_settings_are_refused(tmp_path):
    path = tmp_path / "recognition.yaml"
    path.write_text((Path(__file__).parents[2] / "configs/evaluate/recognition.yaml").read_text())

    shipped = read_settings(RecognitionConfig, path)

    assert shipped.report == (tmp_path / "../../docs/results/recognition.md").resolve()
    assert shipped.sets["lfw_test"].pairs == (tmp_path / "../../../shared/data/pairs_lfw_test.txt").resolve()
    assert shipped.heights == (12, 16, 24, 32) and shipped.noise == 10 and shipped.jpeg == 40
    with pytest.raises(SettingsError, match=r"recognition\.yaml: height: "):
        read_settings(RecognitionConfig, path, {"height": 12})


def test_the_real_judges_on_a_few_real_pairs(shared, tmp_path):
    root, models = Path(__file__).parents[2], shared / "models"
    config = RecognitionConfig.model_validate({
        "restorers": {"sgen-small": root / "models/weights/sgen-small.onnx"},
        "recognisers": {"retail": models / "face-reidentification-retail-0095.onnx"},
        "sets": {
            "lfw": {
                "truths": shared / "data/lfw_test.tar", "pairs": shared / "data/pairs_lfw_test.txt",
                "mates": 12, "others": 4,
            },
        },
        "clean": {"truths": shared / "data/faces_test.tar", "faces": 2, "sides": [64, 256]},
        "heights": [12, 32], "report": tmp_path / "recognition.md",
    })  # fmt: skip

    report = evaluate(config, command="evaluate")

    for method in ("raw", "bicubic", "sgen-small", "sgen-small + raw"):
        small, large = map(float, row(report, method))
        assert small < 0.6 < large
    assert "Clean probes: 1.000 accepted" in report
    assert min(float(each.split(" / ")[0]) for each in row(report, "cosine, retail")) > 0.85


def test_the_command_reads_a_config_whose_paths_lie_beside_it(made, tmp_path, monkeypatch, capsys):
    config = configured(made, tmp_path).model_dump(mode="json")
    config |= {"restorers": {"tiny": "tiny.onnx"}, "report": "here.md"}
    (tmp_path / "recognition.yaml").write_text(yaml.safe_dump(config))
    monkeypatch.setattr("sys.argv", ["recognition", str(tmp_path / "recognition.yaml")])

    main()

    assert (tmp_path / "here.md").read_text() in capsys.readouterr().out


def test_a_wrong_config_is_one_line_and_exit_code_2(tmp_path, monkeypatch, capsys):
    (tmp_path / "wrong.yaml").write_text("restorers: 5\nunknown: 1\n")
    monkeypatch.setattr("sys.argv", ["recognition", str(tmp_path / "wrong.yaml")])

    with pytest.raises(SystemExit) as ended:
        main()

    told = capsys.readouterr().err
    assert ended.value.code == 2
    assert told.count("\n") == 1 and "restorers: " in told and "unknown: " in told
