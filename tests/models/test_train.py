import pytest

torch = pytest.importorskip("torch", reason="the extra train is not installed")

import csv  # noqa: E402
import json  # noqa: E402
import os  # noqa: E402
import shutil  # noqa: E402
import socket  # noqa: E402
import subprocess  # noqa: E402
import sys  # noqa: E402
from pathlib import Path  # noqa: E402

import cv2  # noqa: E402
import numpy as np  # noqa: E402
import onnxruntime  # noqa: E402
import yaml  # noqa: E402
from onnx import helper  # noqa: E402
from skimage.data import astronaut  # noqa: E402
from training import equal, killed_before, save_onnx, write_faces  # noqa: E402

from engines.card import NetworkCard  # noqa: E402
from models import export as exporter  # noqa: E402
from models.batches import Batches  # noqa: E402
from models.checkpoint import build, load_checkpoint, load_weights, shipped_weights  # noqa: E402
from models.dataset import load_faces  # noqa: E402
from models.export import export  # noqa: E402
from models.sisn import SisnConfig  # noqa: E402
from models.train import TrainConfig, TrainError, main, read_config, train  # noqa: E402

CONFIGS = Path(__file__).parents[2] / "configs/train"

# torch's exporter uses what torch deprecates
exports = pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning", "ignore::DeprecationWarning")


@pytest.fixture(scope="module")
def faces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of crops of one face, cut at several sizes."""
    folder = tmp_path_factory.mktemp("faces")
    whole = np.ascontiguousarray(astronaut()[..., ::-1])
    for index, side in enumerate((208, 220, 240, 256)):
        cv2.imwrite(str(folder / f"{index}.png"), cv2.resize(whole[0:224, 112:336], (side, side)))
    return folder


def config(faces: Path, out: Path, **changes: object) -> TrainConfig:
    """Six steps of a tiny SGEN, by default with one protocol and one scale, and so one set to validate by."""
    settings: dict[str, object] = {
        "override": {"base": 4, "detail": 2}, "data": [faces], "validation": faces, "out": out,
        "steps": 6, "batch": 2, "validate_every": 3, "protocols": {"surveillance": 1}, "scales": {4: 1},
        "sides": {64: 1}, **changes,
    }  # fmt: skip
    return TrainConfig.model_validate(settings)


@pytest.fixture(scope="module")
def trained(faces: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run")
    train(config(faces, out))
    return out


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tar of faces whose landmarks are known, with two networks that judge them: `embedder.onnx`, `lpips.onnx`."""
    folder = tmp_path_factory.mktemp("labelled")
    face = cv2.resize(astronaut()[0:224, 112:336, ::-1], (256, 256), interpolation=cv2.INTER_CUBIC)
    photos = {"a/0": face, "a/1": face // 2 + 60, "a/2": cv2.GaussianBlur(face, (0, 0), 1)}
    write_faces(folder / "faces.tar", photos, "60,50,190,210,97,105,151,103,126,133,106,164,148,162")

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


def judged(labelled: Path, out: Path, **changes: object) -> TrainConfig:
    """A run with everything that a loss can have."""
    everything = {
        "likeness": labelled / "embedder.onnx", "perceptual": labelled / "lpips.onnx", "adversarial": 0.1,
        "discriminator": {"width": 4},
    }  # fmt: skip
    return config(labelled / "faces.tar", out, **{**everything, **changes})


def test_a_run_killed_and_resumed_ends_with_the_same_weights_bit_for_bit(faces, tmp_path):
    settings = {"protocols": {"sgen": 1, "surveillance": 1}, "steps": 4, "validate_every": 2}
    train(config(faces, tmp_path / "whole", **settings))
    with killed_before(Batches, 3):
        train(config(faces, tmp_path / "killed", **settings))
    assert load_checkpoint(tmp_path / "killed/last.pt")["step"] == 2

    train(config(faces, tmp_path / "killed", **settings))

    _assert_same_run(tmp_path / "whole", tmp_path / "killed")


SMALL_SISN = {"network": "sisn", "preset": "paper", "override": {"width": 8, "groups": 1, "blocks": 1}}


@pytest.mark.parametrize(
    "changes",
    [{"jitter": 0.1}, {"discriminator": {"width": 4, "reading": "journal"}}, {**SMALL_SISN, "adversarial": 0}],
    ids=["SGEN", "discriminator of the journal", "SISN with BN"],
)
def test_that_holds_with_everything_that_a_loss_can_have(labelled, tmp_path, changes):
    settings = {"steps": 4, "validate_every": 2, **changes}
    train(judged(labelled, tmp_path / "whole", **settings))
    with killed_before(Batches, 3):
        train(judged(labelled, tmp_path / "killed", **settings))

    train(judged(labelled, tmp_path / "killed", **settings))

    _assert_same_run(tmp_path / "whole", tmp_path / "killed")


def _assert_same_run(whole: Path, resumed: Path) -> None:
    for name, keys in {
        "last.pt": {"weights", "averaged", "optimizer", "parameters", "others", "best", "best_scores", "step"},
        "best.pt": {"weights", "scores", "step"},
    }.items():
        states = [load_checkpoint(folder / name) for folder in (whole, resumed)]
        for key in keys & states[0].keys():
            assert equal(states[0][key], states[1][key]), (name, key)
    assert (whole / "log.csv").read_text() == (resumed / "log.csv").read_text()


@pytest.fixture
def half(trained: Path, tmp_path: Path) -> Path:
    """A folder with the last.pt of the run of 6 steps."""
    out = tmp_path / "run"
    out.mkdir()
    shutil.copy(trained / "last.pt", out)
    return out


def test_a_run_of_another_config_is_not_resumed(faces, half):
    with pytest.raises(TrainError, match=r"last\.pt .*noise gauss, now uniform.*--accept-changes"):
        train(config(faces, half, steps=8, noise="uniform"))

    assert load_checkpoint(half / "last.pt")["step"] == 6


def test_a_run_goes_on_under_another_config_where_that_is_accepted(faces, half):
    train(config(faces, half, steps=8, noise="uniform"), accept_changes=True)

    state = load_checkpoint(half / "last.pt")
    assert (state["step"], state["config"]["noise"]) == (8, "uniform")


@pytest.mark.parametrize(("changes", "begins_anew"), [({"scales": {2: 1}}, True), ({"clip": 0.5}, False)])
def test_the_best_weights_are_chosen_anew_where_they_are_measured_otherwise(faces, half, changes, begins_anew):
    state = load_checkpoint(half / "last.pt")
    torch.save({**state, "best": 1000.0}, half / "last.pt")

    train(config(faces, half, steps=7, **changes), accept_changes=True)

    assert (half / "best.pt").exists() == begins_anew


def test_a_longer_run_and_data_that_moved_are_no_change(faces, half, tmp_path):
    elsewhere = shutil.copytree(faces, tmp_path / "moved" / faces.name)

    train(config(elsewhere, half, steps=8, validate_every=4))

    assert load_checkpoint(half / "last.pt")["step"] == 8


def test_weights_that_a_network_did_not_have_before_begin_untrained_and_the_rest_goes_on(faces, half, capsys):
    wider = {"base": 4, "detail": 4}
    with pytest.raises(TrainError, match=r"network\.detail 2, now 4"):
        train(config(faces, half, steps=7, override=wider))

    train(config(faces, half, steps=7, override=wider), accept_changes=True)

    said = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("untrained: "))
    assert all(name.startswith("detail.") for name in said.removeprefix("untrained: ").split(", "))
    steps = {int(moment["step"]) for moment in load_checkpoint(half / "last.pt")["optimizer"]["state"].values()}
    assert steps == {1, 7}


def test_fewer_steps_than_are_done_is_said_and_is_no_failure(faces, half, monkeypatch, capsys):
    path = half / "run.yaml"
    settings = config(faces, half).model_dump(mode="json")
    path.write_text(yaml.safe_dump(settings))
    before = (half / "last.pt").read_bytes()
    monkeypatch.setattr(sys, "argv", ["train", str(path), "--steps", "4"])

    main()

    assert "6 steps already, 4 are asked for: nothing to do" in capsys.readouterr().out
    assert (half / "last.pt").read_bytes() == before


def test_what_a_checkpoint_s_config_did_not_have_yet_was_at_its_default(faces, half):
    state = load_checkpoint(half / "last.pt")
    for name in ("discriminator", "sigma", "noise", "patch", "perceptual_weight"):
        del state["config"][name]
    torch.save(state, half / "last.pt")

    train(config(faces, half, steps=7))

    assert load_checkpoint(half / "last.pt")["step"] == 7


def run(path: Path, monkeypatch: pytest.MonkeyPatch, *options: str, **settings: object) -> None:
    """`python -m models.train` of these settings, written as YAML."""
    path.write_text(yaml.safe_dump(json.loads(json.dumps(settings, default=str))))
    monkeypatch.setattr(sys, "argv", ["train", str(path), *options])
    main()


def test_a_changed_config_is_one_line_and_exit_code_2(faces, half, monkeypatch, capsys):
    with pytest.raises(SystemExit) as ended:
        run(half / "run.yaml", monkeypatch, **config(faces, half, batch=4).model_dump(mode="json"))

    assert ended.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"colour": 1}, "colour: Extra inputs"),
        ({"steps": "many"}, "steps: Input should be a valid integer"),
        ({"steps": 0}, "steps: Input should be greater than 0"),
        ({"seed": -1}, "seed: "),
        ({"network": "srgan"}, "network: 'srgan' is unknown; known: sgen, sisn"),
        ({"preset": "huge"}, "preset: sgen has no 'huge'; it has paper"),
        ({"override": {"bas": 4}}, "override: "),
        ({"override": {"base": "wide"}}, "override: base: "),
        ({"override": {"ensemble": "sum"}}, "override: ensemble: Input should be 'sgu', 'max', 'avg' or 'cat'"),
        ({"network": "sisn", "override": {"scale": 3}}, "scale 3: SISN enlarges 2, 4 or 8 times"),
        ({"protocols": {}}, "protocols: "),
        ({"protocols": {"sgen": 0}}, "protocols.sgen: "),
        ({"protocols": {"scgan": 1}}, "protocols.scgan"),
        ({"discriminator": {"reading": "poem"}}, "discriminator.reading: "),
        ({"damage": {"blur": 1.5}}, "damage: "),
        ({"damage": {"jpeg": 0.8, "h264": 0.5}}, "damage: "),
        ({"damage": {"rain": 0.5}}, "damage.rain: "),
        ({"data": ["nowhere"]}, "nowhere does not exist"),
        ({"data": ["faces_test.tar"]}, "data.0: faces_test is kept from training"),
        ({"validation": "nowhere.tar"}, "nowhere.tar does not exist"),
        ({"exclude": "nowhere.txt"}, "exclude: "),
        ({"init": "nowhere.pt"}, "init: "),
        ({"init": "run.yaml"}, "run.yaml is no checkpoint"),
        ({"likeness": "run.yaml"}, "likeness: "),
        ({"perceptual": "nowhere.onnx"}, "perceptual: "),
        ({**SMALL_SISN, "protocols": {"sisn": 1}, "patch": 80}, "patch: its windows of 320 px do not fit"),
        ({**SMALL_SISN, "sides": {98: 1}}, "sides: 98 is no multiple of the network's scale, 4"),
        ({**SMALL_SISN, "batch": 1}, "batch: "),
    ],
    ids=str,
)
def test_a_mistake_in_the_yaml_is_one_line_that_names_its_place_and_exit_code_2(
    faces, tmp_path, monkeypatch, capsys, changes, told
):
    settings = {**config(faces, tmp_path / "out").model_dump(mode="json"), "override": {}, **changes}

    with pytest.raises(SystemExit) as ended:
        run(tmp_path / "run.yaml", monkeypatch, **settings)

    said = capsys.readouterr().err
    assert ended.value.code == 2
    assert told in said
    assert said.count("\n") == 1


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_run_that_the_project_names_can_be_read_and_its_paths_lie_beside_the_file(path):
    found = read_config(path)

    paths = [value for value in dict(found).values() if isinstance(value, Path)] + found.data
    assert all(given.is_absolute() and given.parts.count("..") == 0 for given in paths)
    assert found.out.parent.name == "runs"
    shared = (CONFIGS.parents[2] / "shared").resolve()
    assert {given.is_relative_to(shared) for given in found.data} == {True}
    if shared.is_dir():
        assert all(given.exists() for given in paths if given.is_relative_to(shared))


@pytest.mark.parametrize("text", ["", "- a list", "network: [", "7: 8", "data: x\nsteps: \x00"])
def test_a_file_that_is_no_config_is_one_line_too(tmp_path, monkeypatch, capsys, text):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    monkeypatch.setattr(sys, "argv", ["train", str(path)])

    with pytest.raises(SystemExit) as ended:
        main()

    said = capsys.readouterr().err
    assert (ended.value.code, said.count("\n")) == (2, 1)
    assert str(path) in said


@pytest.mark.parametrize("content", ["broken", "best.pt"])
def test_a_last_pt_that_cannot_be_resumed_is_said_in_one_line(faces, trained, tmp_path, content):
    last = tmp_path / "last.pt"
    last.write_bytes((trained / content).read_bytes() if content == "best.pt" else b"broken")

    with pytest.raises(TrainError, match=r"last\.pt (is no checkpoint|cannot be resumed, it has no averaged)") as said:
        train(config(faces, tmp_path))

    assert "\n" not in str(said.value)


def test_a_training_that_runs_away_ends_and_keeps_what_it_had(faces, tmp_path):
    train(config(faces, tmp_path, steps=2, validate_every=2))
    before = (tmp_path / "last.pt").read_bytes()

    with pytest.raises(TrainError, match=r"step 4: the weights are no numbers any more"):
        train(config(faces, tmp_path, steps=6, validate_every=2, learning_rate=1e37), accept_changes=True)

    assert (tmp_path / "last.pt").read_bytes() == before


def test_a_seed_gives_the_same_weights_twice_and_another_seed_others(faces, tmp_path):
    weights = []
    for index, seed in enumerate((3, 3, 4)):
        train(config(faces, tmp_path / str(index), steps=2, seed=seed))
        weights.append(load_checkpoint(tmp_path / str(index) / "last.pt")["weights"])

    assert equal(weights[0], weights[1])
    assert not equal(weights[0], weights[2])


@pytest.mark.parametrize(
    ("term", "weights"),
    [("likeness", {"identity_weight": 0, "feature_weight": 0}), ("perceptual", {"perceptual_weight": 0})],
)
def test_the_frozen_judges_take_part_in_the_loss_by_their_weights(labelled, tmp_path, term, weights):
    judge = {term: labelled / {"likeness": "embedder.onnx", "perceptual": "lpips.onnx"}[term]}
    ways = {"without": {}, "with": judge, "unweighted": {**judge, **weights}}

    ended = {}
    for name, changes in ways.items():
        train(config(labelled / "faces.tar", tmp_path / name, steps=2, **changes))
        ended[name] = load_checkpoint(tmp_path / name / "last.pt")["weights"]

    assert equal(ended["without"], ended["unweighted"])
    assert not equal(ended["without"], ended["with"])


def test_a_run_may_begin_by_the_pixel_loss_alone(labelled, tmp_path):
    ways = {
        "pixel": {"steps": 2},
        "pixel for longer": {"steps": 2, "pixel_share": 0.9, "likeness": labelled / "embedder.onnx"},
        "pixel, then both": {"steps": 4, "pixel_share": 0.5, "likeness": labelled / "embedder.onnx"},
        "pixel to the end": {"steps": 4},
    }

    ended = {}
    for name, changes in ways.items():
        train(config(labelled / "faces.tar", tmp_path / name, **changes))
        ended[name] = load_checkpoint(tmp_path / name / "last.pt")["weights"]

    assert equal(ended["pixel"], ended["pixel for longer"])
    assert not equal(ended["pixel to the end"], ended["pixel, then both"])


def test_a_run_with_judges_tells_what_they_saw(labelled, tmp_path):
    scores = train(judged(labelled, tmp_path, steps=1))

    assert scores.keys() == {"x4", "x4.identity", "x4.lpips"}
    with (tmp_path / "log.csv").open() as file:
        logged = next(csv.DictReader(file))
    weighed = scores["x4"] + 10 * scores["x4.identity"] - 8 * scores["x4.lpips"]
    assert float(logged["value"]) == pytest.approx(weighed, abs=1e-6)
    assert load_checkpoint(tmp_path / "best.pt")["scores"] == scores


def test_the_landmarks_that_the_embedder_aligns_by_may_wander_and_nothing_else_changes(labelled, tmp_path):
    judge = {"likeness": labelled / "embedder.onnx"}
    ways = {"plain": {}, "plain, wandering": {"jitter": 0.1}, "judged": judge, "wandering": {**judge, "jitter": 0.1}}

    ended = {}
    for name, changes in ways.items():
        train(config(labelled / "faces.tar", tmp_path / name, steps=2, **changes))
        ended[name] = load_checkpoint(tmp_path / name / "last.pt")["weights"]

    assert equal(ended["plain"], ended["plain, wandering"])
    assert not equal(ended["judged"], ended["wandering"])


@pytest.mark.parametrize("way", [{"disguise": 0.1}, {"fused": True}], ids=["disguise", "fused"])
def test_how_the_embedder_judges_changes_what_is_learned_only_where_it_judges(labelled, tmp_path, way):
    ended = {}
    for judge in ({}, {"likeness": labelled / "embedder.onnx"}):
        for name, changes in (("as usual", {}), ("changed", way)):
            out = tmp_path / f"{name}{len(judge)}"
            train(config(labelled / "faces.tar", out, steps=2, **judge, **changes))
            ended[name, len(judge)] = load_checkpoint(out / "last.pt")["weights"]

    assert equal(ended["as usual", 0], ended["changed", 0])
    assert not equal(ended["as usual", 1], ended["changed", 1])


def test_untouched_faces_are_judged_by_the_crop_itself(labelled, tmp_path):
    scores = train(judged(labelled, tmp_path, steps=1, protocols={"untouched": 1}))

    assert scores.keys() == {"untouched4.identity", "untouched4.lpips"}
    assert -1e-3 < scores["untouched4.identity"] <= 0  # hardly trained, it gives the crop back


def test_nothing_judges_a_face_whose_landmarks_are_unknown(faces, labelled, tmp_path):
    scores = train(config(faces, tmp_path, steps=1, likeness=labelled / "embedder.onnx"))

    assert scores.keys() == {"x4"}


# Every network


@pytest.mark.parametrize(
    "changes",
    [
        SMALL_SISN,
        {"network": "sisn", "preset": "small", "override": {"width": 8, "groups": 1, "blocks": 1, "scale": 8}},
        {"network": "srresnet", "preset": "paper", "override": {"width": 8, "blocks": 1}},
        {"network": "srcnn", "override": {"width": 8}},
        {"network": "rednet", "override": {"width": 4, "depth": 3}},
        {"network": "unet", "override": {"width": 4}},
    ],
    ids=lambda changes: f"{changes['network']} {changes.get('preset', 'small')}",
)
def test_every_network_trains_validates_and_comes_back(faces, tmp_path, changes):
    train(config(faces, tmp_path, steps=4, validate_every=2, **changes))

    state, best = load_checkpoint(tmp_path / "last.pt"), load_checkpoint(tmp_path / "best.pt")
    network = build(best["network"])
    network.load_state_dict(best["weights"])
    image = torch.rand(1, 3, 16, 32) * 2 - 1
    with torch.no_grad():
        assert torch.isfinite(network.eval()(image)).all()
    for name, value in state["weights"].items():
        if name.endswith("num_batches_tracked"):
            assert value == 4  # every step trained, and nothing else fed the statistics
        if name.endswith("running_var"):
            averaged = state["averaged"][f"module.{name}"]
            assert (value != 1).all() and (averaged != 1).all() and not torch.equal(value, averaged)


def test_sgen_of_four_levels_trains_at_its_protocol_whose_sides_do_not_divide(faces, tmp_path):
    scores = train(config(faces, tmp_path, protocols={"sgen": 1}, override={"base": 4, "detail": 2, "n": 4}, steps=6))

    assert scores.keys() == {"sgen128", "sgen160", "sgen192"}


# Weights to begin with


STILL = {"learning_rate": 1e-45, "steps": 1}  # too small to change any weight


@pytest.mark.parametrize("name", ["last.pt", "best.pt"])
def test_a_run_begins_with_exactly_the_weights_of_a_checkpoint(faces, trained, tmp_path, name, capsys):
    train(config(faces, tmp_path, init=trained / name, **STILL))

    expected = shipped_weights(load_checkpoint(trained / name))
    assert equal(load_checkpoint(tmp_path / "last.pt")["weights"], expected)
    assert equal(load_checkpoint(tmp_path / "best.pt")["weights"], expected)
    assert "untrained" not in capsys.readouterr().out
    if name == "last.pt":
        assert not equal(expected, load_checkpoint(trained / name)["weights"])  # those are not the averaged ones


@exports
def test_a_run_begins_with_exactly_the_weights_of_an_exported_network(faces, trained, exported, tmp_path, capsys):
    train(config(faces, tmp_path, init=exported, **STILL))

    expected = halved(shipped_weights(load_checkpoint(trained / "last.pt")))
    assert equal(load_checkpoint(tmp_path / "last.pt")["weights"], expected)
    assert "untrained" not in capsys.readouterr().out


def test_weights_of_another_network_are_refused_and_missing_ones_are_named(faces, trained, tmp_path, capsys):
    with pytest.raises(TrainError, match=r"init: .*best\.pt has no weight that fits this network"):
        train(config(faces, tmp_path / "sisn", init=trained / "best.pt", **SMALL_SISN))

    train(config(faces, tmp_path / "wider", init=trained / "best.pt", override={"base": 4, "detail": 4}, **STILL))

    said = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("beginning with "))
    names = said.partition("untrained: ")[2].split(", ")
    assert (
        names == [f"detail.{part}.{kind}" for part in ("first", "second", "last") for kind in ("weight", "bias")][:-1]
    )


class Normalised(torch.nn.Module):
    """The least network with batch normalisation."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SisnConfig()
        self.body = torch.nn.Sequential(torch.nn.Conv2d(3, 3, 3, bias=False), torch.nn.BatchNorm2d(3))
        torch.nn.init.normal_(self.body[1].bias)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.body(image)


@exports
def test_an_onnx_whose_normalisation_is_folded_in_is_no_beginning(tmp_path):
    path = tmp_path / "folded.onnx"
    path.write_bytes(exporter.to_onnx(Normalised().eval()).SerializeToString())

    with pytest.raises(ValueError, match=r"folded\.onnx: its normalisation is folded into its convolutions"):
        load_weights(path)


# Plans in minutes


def test_minutes_become_a_plan_in_steps_that_is_kept_and_whose_measuring_leaves_no_trace(labelled, tmp_path):
    settings = {**SMALL_SISN, "validate_every": 1000, "likeness": None, "perceptual": None}
    train(judged(labelled, tmp_path / "minutes", minutes=0.06, **settings))
    state = load_checkpoint(tmp_path / "minutes/last.pt")
    done, planned = state["step"], state["config"]["steps"]

    assert (tmp_path / "minutes/best.pt").exists()
    assert 1 <= done <= planned
    assert planned != TrainConfig.model_fields["steps"].default

    settings |= {"steps": planned, "validate_every": done}
    if done < planned:  # a slow machine ends before its plan
        with killed_before(Batches, done):
            train(judged(labelled, tmp_path / "steps", **settings))
    else:
        train(judged(labelled, tmp_path / "steps", **settings))
    other = load_checkpoint(tmp_path / "steps/last.pt")
    for key in ("weights", "averaged", "optimizer", "others"):
        assert equal(state[key], other[key]), key


def test_a_plan_in_minutes_holds_when_its_run_is_resumed(faces, tmp_path):
    with killed_before(Batches, 1):
        train(config(faces, tmp_path, minutes=1, validate_every=1))
    planned = load_checkpoint(tmp_path / "last.pt")["config"]["steps"]

    train(config(faces, tmp_path, minutes=0.03, validate_every=1000))

    state = load_checkpoint(tmp_path / "last.pt")
    assert state["config"]["steps"] == planned > 10
    assert 1 < state["step"] <= planned


def test_steps_on_the_command_line_are_stronger_than_minutes_in_the_yaml(faces, tmp_path, monkeypatch):
    settings = config(faces, tmp_path / "out", minutes=60).model_dump(mode="json")

    run(tmp_path / "run.yaml", monkeypatch, "--steps", "2", **settings)

    state = load_checkpoint(tmp_path / "out/last.pt")
    assert (state["step"], state["config"]["steps"], state["config"]["minutes"]) == (2, 2, None)


# Several processes

TWO_PROCESSES = """
import os, sys, torch
import models.loop as loop
import models.train as training

kept = {}

class Kept(loop.DistributedDataParallel):
    def __init__(self, network):
        super().__init__(network)
        kept["network"] = network

class KeptLearner(loop.Learner):
    def __init__(self, *arguments):
        super().__init__(*arguments)
        kept["judge"] = self.network

loop.DistributedDataParallel, training.Learner = Kept, KeptLearner
sys.argv = ["train", sys.argv[1], "--minutes", "0.05"]
training.main()
weights = {name: dict(network.named_parameters()) for name, network in kept.items()}
torch.save({"network": None, "step": 0, "config": {}, "weights": weights}, f"rank{os.environ['RANK']}.pt")
"""


def test_two_processes_train_one_network_and_one_of_them_writes(labelled, tmp_path):
    settings = judged(labelled, tmp_path / "out", validate_every=2, likeness_batch=1).model_dump(mode="json")
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    (tmp_path / "two.py").write_text(TWO_PROCESSES)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-addr", "127.0.0.1",
        "--master-port", str(port), "two.py", "run.yaml",
    ]  # fmt: skip
    root = Path(__file__).parents[2]
    paths = os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])

    ended = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}, capture_output=True,
        text=True, timeout=300,
    )  # fmt: skip

    assert ended.returncode == 0, ended.stderr
    ranks = [load_checkpoint(tmp_path / f"rank{rank}.pt")["weights"] for rank in (0, 1)]
    state = load_checkpoint(tmp_path / "out/last.pt")
    assert equal(ranks[0], ranks[1])
    assert all(torch.equal(state["weights"][name], weight) for name, weight in ranks[1]["network"].items())
    with (tmp_path / "out/log.csv").open() as file:
        steps = [int(row["step"]) for row in csv.DictReader(file)]
    assert steps == sorted(set(steps))
    assert steps[-1] == state["step"] <= state["config"]["steps"]
    assert len(list((tmp_path / "out").glob("best*"))) == 1


def test_faces_that_are_all_too_small_are_named_instead_of_being_looked_for_without_end(faces, tmp_path):
    small = tmp_path / "small"
    small.mkdir()
    for path in faces.glob("*.png"):
        cv2.imwrite(str(small / path.name), cv2.resize(cv2.imread(str(path)), (96, 96)))

    with pytest.raises(TrainError, match=rf"{small}: the largest of 4 faces has 96 px, 144 px are needed"):
        train(config(small, tmp_path / "run"))


def test_a_checkpoint_carries_what_makes_its_network_again(trained):
    state = load_checkpoint(trained / "best.pt")

    network = build(state["network"])
    network.load_state_dict(state["weights"])

    assert network.config.base == 4
    assert state["config"]["batch"] == 2


@pytest.fixture(scope="module")
def exported(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of 6 steps as ONNX."""
    path = tmp_path_factory.mktemp("exported") / "tiny.onnx"
    export(load_checkpoint(trained / "last.pt"), path, name="tiny", license="test", trained_on="one face")
    return path


def halved(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights as an export keeps them."""
    return {name: w.half().float() if w.numel() >= 256 else w for name, w in weights.items()}


@exports
def test_the_exported_network_agrees_with_torch_at_any_batch_and_size(trained, exported):
    state = load_checkpoint(trained / "last.pt")
    session = onnxruntime.InferenceSession(str(exported), providers=["CPUExecutionProvider"])
    network = build(state["network"])
    network.load_state_dict(halved(shipped_weights(state)))

    for shape in ((1, 3, 32, 32), (3, 3, 48, 16), (2, 3, 160, 64)):
        image = np.random.default_rng(0).uniform(-1, 1, shape).astype(np.float32)
        with torch.no_grad():
            expected = network.eval()(torch.from_numpy(image)).numpy()
        assert np.abs(session.run(None, {"image": image})[0] - expected).max() < 1e-4


@exports
def test_the_exported_card_is_one_that_the_engines_read(exported):
    session = onnxruntime.InferenceSession(str(exported), providers=["CPUExecutionProvider"])
    card = NetworkCard(**json.loads(session.get_modelmeta().custom_metadata_map["streamer.card"]))

    assert (card.name, card.task, card.scales, card.size_multiple) == ("tiny", "restoration", (4, 2, 1), 16)
    assert (card.enlarge, card.trained_on) == ("cubic", "one face")


def test_exporting_what_is_no_checkpoint_is_one_line_and_exit_code_2(tmp_path, monkeypatch, capsys):
    (tmp_path / "broken.pt").write_bytes(b"broken")
    for name, told in (("broken.pt", "broken.pt is no checkpoint"), ("nowhere.pt", "nowhere.pt")):
        options = ["export", str(tmp_path / name), "--name", "x", "--license", "none", "--out", str(tmp_path)]
        monkeypatch.setattr(sys, "argv", options)

        with pytest.raises(SystemExit) as ended:
            exporter.main()

        said = capsys.readouterr().err
        assert (ended.value.code, said.count("\n")) == (2, 1)
        assert told in said


def test_nothing_on_the_list_is_loaded(faces):
    names = {face.name for face in load_faces(faces)}
    left_out = frozenset({f"{faces.name}/1.png"})

    assert {face.name for face in load_faces(faces, exclude=left_out)} == names - left_out
