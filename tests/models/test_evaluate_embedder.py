import pytest

torch = pytest.importorskip("torch", reason="the extra train is not installed")

import re  # noqa: E402
import sys  # noqa: E402
from dataclasses import replace  # noqa: E402
from pathlib import Path  # noqa: E402

import cv2  # noqa: E402
import numpy as np  # noqa: E402
import yaml  # noqa: E402
from onnx import helper  # noqa: E402
from skimage.data import astronaut  # noqa: E402
from training import save_onnx, write_faces  # noqa: E402

from models import evaluate  # noqa: E402
from models.checkpoint import describe  # noqa: E402
from models.embedder import PRESETS, Embedder  # noqa: E402
from models.evaluate_embedder import (  # noqa: E402
    EmbedderEvaluateConfig,
    Figure,
    Pairs,
    accuracy,
    best_threshold,
    evaluate_embedder,
    load_pairs,
    own_embedder,
)
from models.export import export  # noqa: E402
from models.recognition import FaceSet, Trials, load_trials  # noqa: E402
from models.settings import read_settings  # noqa: E402

# torch's exporter uses what torch deprecates
pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning", "ignore::DeprecationWarning")

ROOT = Path(__file__).parents[2]
TEACHER = "face-reidentification-retail-0095.onnx"
TINY = replace(PRESETS["small"], widths=(8, 8), depths=(1, 1), features=4, head=8, embedding=4, side=32)
PAIRS = [
    ("a/0", "a/1", 1, 1), ("b/0", "b/1", 1, 2), ("c/0", "c/1", 1, 1), ("a/0", "b/1", 0, 1), ("b/0", "c/1", 0, 2),
    ("c/0", "a/1", 0, 2),
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six faces of three people, their pairs in two folds, a teacher and an untrained embedder, `ours.onnx`."""
    folder = tmp_path_factory.mktemp("evaluated")
    face = cv2.resize(np.ascontiguousarray(astronaut()[0:224, 112:336, ::-1]), (256, 256))
    looks = {"a": face, "b": face[:, ::-1], "c": 255 - face}
    photos = {f"{name}/{i}": look // (i + 1) for name, look in looks.items() for i in range(2)}
    write_faces(folder / "faces.tar", photos, "60,50,190,210,97,105,151,103,126,133,106,164,148,162")
    lines = [f"{a}.png {b}.png {same} {fold}" for a, b, same, fold in PAIRS]
    (folder / "pairs.txt").write_text("\n".join(["# file_a file_b same fold", *lines]) + "\n")
    node, rng = helper.make_node, np.random.default_rng(0)
    save_onnx(folder / TEACHER, [
        node("Mul", ["image", "small"], ["a"]), node("Conv", ["a", "w"], ["b"], strides=[64, 64]),
        node("AveragePool", ["b"], ["c"], kernel_shape=[2, 2]),
    ], small=np.float32(1 / 255), w=rng.normal(0, 0.3, (4, 3, 64, 64)).astype(np.float32))  # fmt: skip
    torch.manual_seed(0)
    network = Embedder(TINY)
    state = {"network": describe(network), "weights": network.state_dict(), "step": 0, "config": {"data": []}}
    export(state, folder / "ours.onnx", name="ours", license="research-only", trained_on="nothing")
    return folder


def settings(folder: Path, **changes: object) -> EmbedderEvaluateConfig:
    return EmbedderEvaluateConfig.model_validate({
        "protocol": "embedder", "network": folder / "ours.onnx", "others": {"teacher": folder / TEACHER},
        "set": {"truths": folder / "faces.tar", "pairs": folder / "pairs.txt"}, "heights": (16, 24),
        "report": folder / "report.md", **changes,
    })  # fmt: skip


def trials(people: int) -> Trials:
    """Of each person one probe and one reference; none is needed as a picture."""
    each = np.arange(people)
    impostors = np.flatnonzero(each[:, None] != each[None])
    return Trials([], [], np.stack([each, each], axis=1), each, each, impostors)


def test_the_report_has_teacher_and_student_side_by_side_at_every_size(folder):
    report = evaluate_embedder(settings(folder), command="as I was called")

    assert (folder / "report.md").read_text() == report
    assert "`as I was called`" in report
    assert "6 pairs of faces, 3 of one person, 3 people, 2 folds" in report
    for title in ("True accepts at 1 % false accepts", "Accuracy"):
        table = report[report.index(f"| {title} |") :].splitlines()[:5]
        assert table[0] == f"| {title} | clean | 16 px | 24 px |"
        assert [line.split(" | ")[0] for line in table[2:]] == ["| ours", "| teacher", "| gain over teacher"]
        values = [[float(v) for v in re.findall(r"([+-]?[\d.]+) \(", line)] for line in table[2:]]
        for ours, teacher, gain in zip(*values, strict=True):
            assert gain == pytest.approx(ours - teacher, abs=0.0011)
            assert 0 <= ours <= 1 and 0 <= teacher <= 1


def test_a_network_beside_itself_gains_nothing(folder, tmp_path):
    report = evaluate_embedder(
        settings(folder, network=folder / "ours.onnx", others={}, report=tmp_path / "r.md"), command=""
    )

    assert "gain over" not in report
    difference = Figure(0.5, np.array([0.4, 0.6])) - Figure(0.5, np.array([0.4, 0.6]))
    assert difference.told("+") == "+0.000 (+0.000 to +0.000)"


def test_the_command_evaluates_by_the_protocol_of_the_yaml(folder, tmp_path, monkeypatch, capsys):
    path = tmp_path / "embedder.yaml"
    path.write_text(yaml.safe_dump(settings(folder, report=tmp_path / "r.md", heights=(24,)).model_dump(mode="json")))
    monkeypatch.setattr(sys, "argv", ["evaluate", str(path)])

    evaluate.main()

    assert f"`python -m models.evaluate {path}`" in capsys.readouterr().out
    assert (tmp_path / "r.md").exists()


def test_the_threshold_makes_the_fewest_mistakes():
    rng = np.random.default_rng(0)
    for _ in range(20):
        same = rng.random(30) < 0.5
        scores = rng.normal(same, 0.7)

        found = best_threshold(scores, same)

        least = min(int(np.sum((scores > bar) != same)) for bar in [*scores, scores.min() - 1])
        assert int(np.sum((scores > found) != same)) == least


def test_a_fold_is_judged_at_the_threshold_of_the_others():
    """The second fold's similarities lie higher: by its own threshold it would be told without a mistake."""
    places = np.array([(0, 0), (1, 1), (0, 1), (1, 0)] * 2)
    pairs = Pairs(places, np.array([True, True, False, False] * 2), np.repeat([1, 2], 4))
    low = np.array([[0.4, 0.1], [0.1, 0.4]])

    alike = accuracy(low, trials(2), pairs, [np.ones(2)])

    assert alike.value == 1
    shifted = replace(pairs, places=np.concatenate([places[:4], places[4:] + 2]))
    similarities = np.zeros((4, 4))
    similarities[:2, :2], similarities[2:, 2:] = low, low + 0.5
    apart = accuracy(similarities, trials(4), shifted, [np.ones(4), np.array([1, 1, 0, 0])])
    assert apart.value == 0.5
    assert apart.redrawn.tolist() == [0.5, 0.5]


def test_accuracy_counts_a_person_as_often_as_it_was_drawn():
    places = np.array([(0, 0), (1, 1), (0, 1), (1, 0)] * 2)
    pairs = Pairs(places, np.array([True, True, False, False] * 2), np.repeat([1, 2], 4))
    similarities = np.array([[0.9, 0.1], [0.1, 0.0]])  # the second person is never known again

    found = accuracy(similarities, trials(2), pairs, [np.array([2, 0]), np.array([0, 2]), np.array([1, 1])])

    assert found.value == 0.75
    assert found.redrawn.tolist() == [1, 0, 0.75]


def test_pairs_that_were_not_drawn_are_not_judged(folder):
    face_set = FaceSet(truths=folder / "faces.tar", pairs=folder / "pairs.txt", mates=2, others=0)
    drawn = load_trials(face_set, 0)

    pairs = load_pairs(face_set, drawn)

    assert pairs.same.sum() == 2
    assert len(pairs.same) == len(pairs.folds) == len(pairs.places)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"network": TEACHER}, "has no card of an embedder"),
        ({"network": "pairs.txt"}, "is no ONNX"),
        ({"others": {"ours": TEACHER}}, "ours is the name of the network itself"),
    ],
)
def test_what_cannot_be_evaluated_is_said_in_a_line(folder, changes, said):
    placed = {
        name: folder / value if name == "network" else {key: folder / each for key, each in value.items()}
        for name, value in changes.items()
    }
    with pytest.raises(ValueError, match=said) as raised:
        evaluate_embedder(settings(folder, **placed), command="")

    assert "\n" not in str(raised.value)


def test_the_embedder_is_prepared_as_its_card_says(folder):
    card, embedder = own_embedder(folder / "ours.onnx")

    assert (card["name"], embedder.preparation.side, embedder.preparation.color) == ("ours", 32, "RGB")
    assert (embedder.preparation.mean, embedder.preparation.std) == (127.5, 127.5)


def test_the_evaluation_that_the_project_names_can_be_read():
    found = read_settings(EmbedderEvaluateConfig, ROOT / "configs/evaluate/embedder.yaml")

    assert next(iter(found.others)) == "retail-0095"
    assert found.network == ROOT / "models/weights/embedder.onnx"
