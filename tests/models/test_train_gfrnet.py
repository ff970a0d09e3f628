import pytest

torch = pytest.importorskip("torch", reason="the extra train is not installed")

import csv  # noqa: E402
import json  # noqa: E402
import os  # noqa: E402
import socket  # noqa: E402
import subprocess  # noqa: E402
import sys  # noqa: E402
from pathlib import Path  # noqa: E402

import cv2  # noqa: E402
import numpy as np  # noqa: E402
import yaml  # noqa: E402
from onnx import helper  # noqa: E402
from skimage.data import astronaut  # noqa: E402
from training import equal, killed_before, save_onnx, write_faces  # noqa: E402

from models.checkpoint import build, load_checkpoint  # noqa: E402
from models.gfrnet import PRESETS, VARIANTS, Gfrnet, GfrnetConfig, identity_flow  # noqa: E402
from models.guided import GuidedBatches  # noqa: E402
from models.loop import TrainError, train_task  # noqa: E402
from models.settings import SettingsError, read_settings  # noqa: E402
from models.train import train  # noqa: E402
from models.train_gfrnet import (  # noqa: E402
    GfrnetRunConfig,
    GuidedRestoration,
    _InBf16,
    _keep_flow_exact,
    _within,
)

CONFIGS = Path(__file__).parents[2] / "configs/train"
TINY = {"base": 4, "cap": 8, "depth": 3}
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tar of five faces of two people with their landmarks, a list of pairs, and two networks that judge:
    `faces.tar`, `pairs.txt`, `embedder.onnx`, `lpips.onnx`."""
    folder = tmp_path_factory.mktemp("labelled")
    face = cv2.resize(astronaut()[0:224, 112:336, ::-1], (256, 256), interpolation=cv2.INTER_CUBIC)
    photos = {"a/0": face, "a/1": face // 2 + 60, "a/2": face // 3, "b/0": face[..., ::-1], "b/1": face[..., ::-1] // 2}
    write_faces(folder / "faces.tar", photos, "60,50,190,210,97,105,151,103,126,133,106,164,148,162")
    (folder / "pairs.txt").write_text("# query reference\na/1.png a/0.png\nb/1.png b/0.png\n")

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


def settings(labelled: Path, out: Path, **changes: object) -> dict[str, object]:
    """Six steps of a tiny GFRNet: two of WarpNet alone, two of both, two with the discriminators."""
    return {
        "override": TINY, "data": [labelled / "faces.tar"], "validation": labelled / "faces.tar", "out": out,
        "steps": 6, "batch": 2, "validate_every": 1, "side": 48, "damage": {"h264": 0}, "warp_share": 0.34,
        "adversarial_from": 0.67, "discriminator": {"base": 4}, **changes,
    }  # fmt: skip


def config(labelled: Path, out: Path, **changes: object) -> GfrnetRunConfig:
    return GfrnetRunConfig.model_validate(settings(labelled, out, **changes))


def judged(labelled: Path, out: Path, **changes: object) -> GfrnetRunConfig:
    """A run with everything that a loss can have."""
    judges = {"likeness": labelled / "embedder.onnx", "perceptual": labelled / "lpips.onnx"}
    return config(labelled, out, **{**judges, "pairs": labelled / "pairs.txt", **changes})


def untrained(settings: GfrnetRunConfig) -> dict[str, torch.Tensor]:
    """The weights that a run begins with."""
    torch.manual_seed(settings.seed)
    return GuidedRestoration(settings, CPU).network.state_dict()


def moved(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
    """The parts of a network whose weights differ."""
    return {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_checkpoint(out / "last.pt")["weights"]


# Resuming


def test_a_run_killed_in_any_stage_and_resumed_ends_with_the_same_weights_bit_for_bit(labelled, tmp_path):
    train(judged(labelled, tmp_path / "whole"))
    for step in (1, 3, 5):
        with killed_before(GuidedBatches, step):
            train(judged(labelled, tmp_path / "killed"))
        assert load_checkpoint(tmp_path / "killed/last.pt")["step"] == step

    train(judged(labelled, tmp_path / "killed"))

    states = [load_checkpoint(tmp_path / name / "last.pt") for name in ("whole", "killed")]
    for key in ("weights", "averaged", "optimizer", "others", "best", "best_scores", "step"):
        assert equal(states[0][key], states[1][key]), key
    assert (tmp_path / "whole/log.csv").read_text() == (tmp_path / "killed/log.csv").read_text()
    assert states[0]["others"].keys() == {"discriminators"}


def test_another_pair_of_discriminators_begins_anew_where_that_is_accepted(labelled, tmp_path):
    train(config(labelled, tmp_path, steps=1, warp_share=0, adversarial_from=0))
    wider = config(labelled, tmp_path, steps=2, warp_share=0, adversarial_from=0, discriminator={"base": 8})
    with pytest.raises(TrainError, match=r"discriminator .*--accept-changes"):
        train(wider)

    train(wider, accept_changes=True)

    assert load_checkpoint(tmp_path / "last.pt")["step"] == 2


# Stages


def test_recnet_does_not_move_while_warpnet_learns_alone_and_does_thereafter(labelled, tmp_path):
    alone = config(labelled, tmp_path / "alone", steps=2, warp_share=1, adversarial_from=1)
    both = config(labelled, tmp_path / "both", steps=2, warp_share=0.5, adversarial_from=1)

    train(alone)
    train(both)

    assert moved(untrained(alone), weights(tmp_path / "alone")) == {"warp_net"}
    assert moved(untrained(both), weights(tmp_path / "both")) == {"warp_net", "rec_net"}


def test_a_stage_lasts_its_share_of_the_run(labelled, tmp_path):
    task = GuidedRestoration(config(labelled, tmp_path, warp_share=0.1, adversarial_from=0.7), CPU)

    assert [task._stage(step, 20) for step in range(20)] == ["warp"] * 2 + ["joint"] * 12 + ["adversarial"] * 6


def test_a_mask_is_held_open_for_its_share_of_the_run(labelled, tmp_path):
    run = config(labelled, tmp_path, preset="small", override={"base": 4, "cap": 8, "depth": 3}, warp_share=0,
                 adversarial_from=1, open_share=0.5, steps=4)  # fmt: skip
    task = GuidedRestoration(run, CPU)
    task.load(0)

    held = []
    for step in range(4):
        task.learn(task.network, step, run)
        held.append(task.network.rec_net.held_open)

    assert held == [True, True, False, False]


def test_where_the_pace_is_measured_stages_come_by_their_shares(labelled, tmp_path):
    task = GuidedRestoration(config(labelled, tmp_path, warp_share=0.25, adversarial_from=0.5), CPU)

    tried = [task._stage(_within(2**31 + step, 20_000), 20_000) for step in range(40)]

    assert {stage: tried.count(stage) for stage in tried} == {
        "warp": pytest.approx(10, abs=1), "joint": pytest.approx(10, abs=1), "adversarial": pytest.approx(20, abs=1),
    }  # fmt: skip


def test_without_discriminators_both_networks_learn_to_the_end(labelled, tmp_path):
    task = GuidedRestoration(config(labelled, tmp_path, warp_share=0.1, adversarial_from=1), CPU)

    assert not task.others
    assert [task._stage(step, 10) for step in (0, 1, 9)] == ["warp", "joint", "joint"]


def test_the_discriminators_learn_in_the_last_stage_alone(labelled, tmp_path):
    settings = config(labelled, tmp_path, steps=5)
    torch.manual_seed(settings.seed)
    before = GuidedRestoration(settings, CPU).others["discriminators"].network.state_dict()

    ended = {}
    with killed_before(GuidedBatches, 3):
        train(settings)
    ended["joint"] = load_checkpoint(tmp_path / "last.pt")["others"]["discriminators"]["weights"]
    train(settings)
    ended["adversarial"] = load_checkpoint(tmp_path / "last.pt")["others"]["discriminators"]["weights"]

    assert equal(before, ended["joint"])
    assert moved(before, ended["adversarial"]) == {"whole", "local"}


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("preset", ["small", "paper"])
def test_every_variant_trains_validates_and_comes_back(labelled, tmp_path, name, preset):
    own = {**TINY, **({"norm": "instance"} if preset == "paper" else {})}
    settings = config(labelled, tmp_path, variant=name, preset=preset, override=own, steps=2, validate_every=2)

    scores = train(settings)

    state = load_checkpoint(tmp_path / "best.pt")
    network = build(state["network"])
    network.load_state_dict(state["weights"])
    variant = VARIANTS[name]
    assert (network.config.guide, network.config.warp, network.config.widen) == (
        variant.guide, variant.warp, variant.widen
    )  # fmt: skip
    expected = {"x4", "x8"} | ({"x4.guide", "x8.guide"} if variant.guide else set())
    assert scores.keys() == expected | ({"x4.warp", "x8.warp"} if variant.warp else set())
    image = torch.rand(1, 3, 16, 32) * 2 - 1
    with torch.no_grad():
        assert torch.isfinite(network.eval()(image, -image)).all()


@pytest.mark.parametrize("name", ["-F", "-W", "-WG"])
def test_a_variant_without_a_loss_of_the_flow_learns_to_restore_from_the_first_step(labelled, tmp_path, name):
    settings = config(labelled, tmp_path, variant=name, steps=1, warp_share=1, adversarial_from=1)

    train(settings)

    assert "rec_net" in moved(untrained(settings), weights(tmp_path))


# Losses and scores


@pytest.mark.parametrize(
    ("term", "without"),
    [
        ("likeness", {"identity_weight": 0, "feature_weight": 0}),
        ("likeness", {"likeness_from": 1}),
        ("perceptual", {"weights": {"perceptual": 0, "variation_of": "residual"}}),
    ],
    ids=["likeness by weight", "likeness later", "perceptual by weight"],
)
def test_the_frozen_judges_take_part_in_the_loss_by_their_weights(labelled, tmp_path, term, without):
    given = {
        "warp_share": 0, "adversarial_from": 1, "steps": 1, "validate_every": 9,
        "weights": {"perceptual": 1, "variation_of": "residual"},
    }  # fmt: skip
    judge = {term: labelled / {"likeness": "embedder.onnx", "perceptual": "lpips.onnx"}[term]}
    ways = {"without": {}, "with": judge, "unweighted": {**judge, **without}}

    ended = {}
    for name, changes in ways.items():
        train(config(labelled, tmp_path / name, **{**given, **changes}))
        ended[name] = weights(tmp_path / name)

    assert equal(ended["without"], ended["unweighted"])
    assert not equal(ended["without"], ended["with"])


def test_a_run_with_judges_tells_what_they_saw_and_how_far_the_guide_pulls(labelled, tmp_path):
    scores = train(judged(labelled, tmp_path, steps=1))

    kinds = ("", ".guide", ".warp", ".identity", ".pull", ".lpips")
    assert scores.keys() == {f"x{scale}{kind}" for scale in (4, 8) for kind in kinds}
    with (tmp_path / "log.csv").open() as file:
        logged = next(csv.DictReader(file))
    mean = {kind: (scores[f"x4{kind}"] + scores[f"x8{kind}"]) / 2 for kind in kinds}
    assert float(logged["value"]) == pytest.approx(mean[""] + 10 * mean[".identity"] - 8 * mean[".lpips"], abs=1e-6)
    shown = cv2.imread(str(tmp_path / "samples.png"))
    assert shown.shape == (2 * 3 * 128, 6 * 128, 3)  # two pairs, and one of them again by a stranger's guide


def test_a_few_steps_bring_the_restored_face_nearer(labelled, tmp_path):
    # of WarpNet alone nothing is gained yet: a gain can only come of the later stage
    changes = {"warp_share": 0.1, "adversarial_from": 1, "override": {**TINY, "base": 8}, "learning_rate": 3e-3}

    scores = train(config(labelled, tmp_path, steps=40, validate_every=40, batch=4, ema=0.8, **changes))

    assert scores["x4"] > 0.2
    assert scores["x8"] > 0.2


# In bf16


@pytest.mark.parametrize("full", [PRESETS["small"], GfrnetConfig(norm="instance")], ids=["modern", "paper"])
def test_a_flow_is_made_in_float32_where_the_network_computes_in_bf16(full):
    torch.manual_seed(0)
    network = Gfrnet(GfrnetConfig(**{**vars(full), **TINY})).eval()
    _keep_flow_exact(network)
    image, guide = torch.rand(2, 2, 3, 48, 48) * 2 - 1
    mixed = _InBf16(network, enabled=True)

    parts = mixed.parts(image, guide)

    assert {parts.restored.dtype, parts.flow.dtype, mixed.flow(image, guide).dtype} == {torch.float32}
    assert (parts.restored - network(image, guide)).abs().max() < 0.05
    if full.design == "modern":  # untrained it is the identity, which bf16 does not hold
        assert torch.equal(parts.flow, identity_flow(parts.flow).expand_as(parts.flow))


# Several processes

TWO_PROCESSES = """
import os, sys, torch
from pathlib import Path
import models.loop as loop
import models.train_gfrnet as training
from models.settings import read_settings

class Kept(training.GuidedRestoration):
    def __init__(self, *arguments):
        super().__init__(*arguments)
        kept["task"] = self

kept = {}
with loop.processes():
    loop.train_task(read_settings(training.GfrnetRunConfig, Path("run.yaml")), Kept)
task = kept["task"]
weights = {"network": task.network.state_dict(), "judges": task.others["discriminators"].network.state_dict()}
torch.save({"network": None, "step": 0, "config": {}, "weights": weights}, f"rank{os.environ['RANK']}.pt")
"""


def test_two_processes_train_one_network_through_all_stages(labelled, tmp_path):
    ours = judged(labelled, tmp_path / "out", validate_every=6).model_dump(mode="json")
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(ours))
    (tmp_path / "two.py").write_text(TWO_PROCESSES)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-addr", "127.0.0.1",
        "--master-port", str(port), "two.py",
    ]  # fmt: skip
    paths = os.pathsep.join([str(CONFIGS.parents[1]), os.environ.get("PYTHONPATH", "")])

    ended = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}, capture_output=True,
        text=True, timeout=300,
    )  # fmt: skip

    assert ended.returncode == 0, ended.stderr
    ranks = [load_checkpoint(tmp_path / f"rank{rank}.pt")["weights"] for rank in (0, 1)]
    assert equal(*(rank["network"] for rank in ranks))
    # the power iteration of spectral norm runs on each by itself; what is learned is shared
    assert all(torch.allclose(ranks[0]["judges"][name], value, atol=1e-6) for name, value in ranks[1]["judges"].items())
    assert equal(weights(tmp_path / "out"), ranks[0]["network"])


# Mistakes


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"network": "sgen"}, "network: Input should be 'gfrnet'"),
        ({"variant": "-X"}, "variant: Input should be 'Full', '-F'"),
        ({"stranger_share": 1.5}, "stranger_share: "),
        ({"side": 0}, "side: "),
        ({"warp_share": 0.5, "adversarial_from": 0.2}, "adversarial_from 0.2: WarpNet is alone until 0.5"),
        ({"weights": {"pixel": -1}}, "weights: "),
        ({"weights": {"colour": 1}}, "weights.colour: "),
        ({"discriminator": {"norm": "none"}}, "discriminator.norm: "),
        ({"betas": [0.9, 1.0]}, "betas "),
        ({"data": ["faces_test.tar"]}, "data.0: faces_test is kept from training"),
        ({"protocols": {"sgen": 1}}, "protocols: Extra inputs"),
        ({"preset": "huge"}, "preset: gfrnet has no 'huge'; it has paper"),
        ({"override": {"blocks": 0}}, "override: the modern design wants blocks"),
        ({"side": 50}, "side: 50 is no multiple of 16"),
        ({"pairs": "nowhere.txt"}, "pairs: "),
        ({"pairs": "strange.txt"}, "line 1: faces/a/9.png is none of the faces"),
        ({"likeness": "nowhere.onnx"}, "likeness: "),
        ({"perceptual": "pairs.txt"}, "perceptual: "),
        ({"exclude": "nowhere.txt"}, "exclude: "),
        ({"data": ["nowhere"]}, "nowhere does not exist"),
        ({"exclude": "most.txt"}, "faces.tar: none of 2 faces has a second of the same identity"),
        ({"exclude": "one.txt"}, "stranger_share: all faces are of one person"),
    ],
    ids=str,
)
def test_a_mistake_in_the_yaml_is_one_line_that_names_its_place(labelled, tmp_path, changes, told):
    (labelled / "strange.txt").write_text("a/9.png a/0.png\n")
    (labelled / "most.txt").write_text("".join(f"faces {name}.png\n" for name in ("a/1", "a/2", "b/1")))
    (labelled / "one.txt").write_text("".join(f"faces b/{i}.png\n" for i in (0, 1)))
    path = labelled / "run.yaml"
    path.write_text(yaml.safe_dump(json.loads(json.dumps({**settings(labelled, tmp_path), **changes}, default=str))))

    with pytest.raises((TrainError, SettingsError)) as said:
        train_task(read_settings(GfrnetRunConfig, path), GuidedRestoration)

    assert told in str(said.value)
    assert "\n" not in str(said.value)


# The runs that ship


@pytest.mark.parametrize("name", ["gfrnet", "gfrnet-small", "gfrnet-paper"])
def test_a_run_that_ships_reads_and_trains_on_neither_the_validation_nor_the_test(name):
    config = read_settings(GfrnetRunConfig, CONFIGS / f"{name}.yaml")

    with torch.device("meta"):
        task = GuidedRestoration(config, torch.device("meta"))

    assert [source.name for source in config.data] == ["faces_train.tar", "faces_train_extra.tar"]
    assert (config.validation.name, config.pairs.name, config.side) == ("faces_val.tar", "guided_val.txt", 256)
    assert config.out.name == name
    assert (task.network.config.design == "paper") == (name == "gfrnet-paper")
    assert bool(task.others) == (name == "gfrnet-paper")
    assert config.batch >= (16 if name != "gfrnet-small" else 8)


def test_the_shipped_paths_lead_to_the_shared_data(shared):
    for name in ("gfrnet", "gfrnet-small", "gfrnet-paper"):
        config = read_settings(GfrnetRunConfig, CONFIGS / f"{name}.yaml")
        named = [*config.data, config.exclude, config.validation, config.pairs, config.likeness, config.perceptual]
        assert all(path.exists() for path in named if path is not None)
