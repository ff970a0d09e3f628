"""Every row of the four papers' tables at width 8 and depth 2: it trains by the product's own code, is saved and comes
back, and runs as ONNX where the product runs it. Its size at full width is counted in test_sgen, test_sisn, test_gfrnet
and, of all that trains in SCGAN, here."""

import pytest

torch = pytest.importorskip("torch", reason="the extra train is not installed")

from collections.abc import Callable  # noqa: E402
from dataclasses import dataclass  # noqa: E402
from itertools import product  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import cv2  # noqa: E402
import onnxruntime  # noqa: E402
from skimage.data import astronaut  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.nn import functional as F  # noqa: E402
from training import Together, equal, write_faces  # noqa: E402

from models.checkpoint import build, load_checkpoint  # noqa: E402
from models.export import guided_to_onnx, to_onnx  # noqa: E402
from models.gfrnet import VARIANTS  # noqa: E402
from models.loop import RunConfig, Task, train_task  # noqa: E402
from models.train import BlindRestoration, TrainConfig  # noqa: E402
from models.train_gfrnet import GfrnetRunConfig, GuidedRestoration  # noqa: E402
from models.train_scgan import ScganRunConfig, ScganTraining  # noqa: E402

# torch's exporter uses what torch deprecates
exports = pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning", "ignore::DeprecationWarning")

GAN = {"adversarial": 0.1, "pixel": "mse"}
SGEN: dict[str, dict[str, Any]] = {
    **{f"SGEN N = {n}": {"override": {"n": n}} for n in (2, 3, 4)},
    "MEN": {"override": {"ensemble": "max"}},
    "AEN": {"override": {"ensemble": "avg"}},
    "CEN": {"override": {"ensemble": "cat"}},
    "SGEN, the code's gate": {"override": {"gate": "lrelu"}},
    "SGEN-GAN": {**GAN, "discriminator": {"width": 8}},
    "SGEN-GAN, the journal's judge": {**GAN, "discriminator": {"width": 8, "reading": "journal"}},
}
PATHS = {"SISN": {}, "SISN without structure": {"structure": False}, "SISN without detail": {"detail": False}}
SISN: dict[str, dict[str, Any]] = {
    f"{name} ×{scale}": {"override": {"scale": scale, **without}}
    for (name, without), scale in product(PATHS.items(), (4, 8))
}
SHARED = {"SCGAN": "none", "-fc": "all", "-SA": "body", "-SE": "encoder", "-SD": "decoder", "-SM": "middle"}
JUDGES = ("l1", "l2", "h1", "h2")
SCGAN: dict[str, dict[str, Any]] = {
    **{name: {"share": share} for name, share in SHARED.items()},
    "-D_SL": {"cycles": "forward"},
    "-D_HL": {"cycles": "backward"},
    "-PL": {"losses": {"pixel": False}},
    "-CL": {"losses": {"cycle": False}},
    **{  # Table 4; none is -AL, all of them SCGAN
        f"adversarial {''.join(map(str, there))}": {"losses": dict(zip(JUDGES, map(bool, there), strict=True))}
        for there in product((0, 1), repeat=4)
    },
    "SCGAN attached": {"losses": {"detach_cycles": False}},
    "-fc attached": {"share": "all", "losses": {"detach_cycles": False}},
}
GFRNET: dict[str, dict[str, Any]] = {f"GFRNet {name}": {"variant": name} for name in VARIANTS}


@dataclass(frozen=True)
class Family:
    """What the rows of one paper have in common."""

    rows: dict[str, dict[str, Any]]
    config: type[RunConfig]
    task: Callable[[Any, torch.device], Task]
    run: dict[str, Any]
    """At width 8 and depth 2."""


BLIND = {"steps": 2, "batch": 2, "validate_every": 2, "preset": "paper"}
FAMILIES = [
    Family(SGEN, TrainConfig, BlindRestoration, {
        **BLIND, "network": "sgen", "override": {"base": 8}, "protocols": {"surveillance": 1}, "scales": {4: 1},
        "sides": {64: 1}, "damage": {"h264": 0},
    }),
    Family(SISN, TrainConfig, BlindRestoration, {
        **BLIND, "network": "sisn", "override": {"width": 8, "groups": 1, "blocks": 2}, "protocols": {"sisn": 1},
        "patch": 8,
    }),
    Family(SCGAN, ScganRunConfig, ScganTraining, {
        **BLIND, "override": {"width": 8, "blocks": 2, "late": 1, "base": 8, "side": 32}, "sides": {32: 1},
        "degraded_share": 1, "discriminator_width": 8,
    }),
    # the first step is WarpNet's alone, in the second all are trained
    Family(GFRNET, GfrnetRunConfig, GuidedRestoration, {
        **BLIND, "override": {"base": 8, "cap": 16, "depth": 2}, "side": 48, "surveillance_share": 0,
        "warp_share": 0.5, "adversarial_from": 0.5, "discriminator": {"base": 8},
    }),
]  # fmt: skip
FAMILY = {row: family for family in FAMILIES for row in family.rows}


@dataclass(frozen=True)
class Trained:
    """A row after its two steps."""

    config: RunConfig
    task: Task
    first: dict[str, Tensor]
    """The weights that its network began with."""


@pytest.fixture(scope="module")
def faces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tar of four faces of two people, 144 px, with their landmarks."""
    folder = tmp_path_factory.mktemp("faces")
    face = cv2.resize(astronaut()[0:224, 112:336, ::-1], (144, 144), interpolation=cv2.INTER_AREA)
    photos = {"a/0": face, "a/1": face // 2 + 60, "b/0": face[..., ::-1], "b/1": face[..., ::-1] // 2}
    write_faces(folder / "faces.tar", photos, "34,28,107,118,55,59,85,58,71,75,60,92,83,91")
    return folder / "faces.tar"


@pytest.fixture(scope="module")
def trained(faces: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Trained]:
    """Train a row where it has not been, two steps of the real training."""
    known: dict[str, Trained] = {}

    def of(row: str) -> Trained:
        if row not in known:
            out = tmp_path_factory.mktemp("run")
            config = settings(row, data=[faces], validation=faces, out=out)

            def kept(*arguments: Any) -> Task:
                task = FAMILY[row].task(*arguments)
                first = {name: tensor.clone() for name, tensor in task.network.state_dict().items()}
                known[row] = Trained(config, task, first)
                return task

            train_task(config, kept)
        return known[row]

    return of


def settings(row: str, **places: Any) -> RunConfig:
    """The run of a row."""
    family = FAMILY[row]
    own, shared = family.rows[row], family.run
    both = {"override": {**shared["override"], **own.get("override", {})}}
    return family.config.model_validate({**shared, **own, **both, **places})


def beside(row: str) -> set[str]:
    """What learns beside the network that ships."""
    changes = FAMILY[row].rows[row]
    if row in SGEN:
        return {"discriminator"} if "adversarial" in changes else set()
    if row in GFRNET:
        return {"discriminators"}
    if row in SISN:
        return set()
    cycle = {"forward": "1", "backward": "2"}.get(changes.get("cycles", "both"), "12")
    there = {name.upper() for name in JUDGES if changes.get("losses", {}).get(name, True) and name[1] in cycle}
    return {"degraders"} | there


@pytest.mark.parametrize("row", FAMILY)
def test_every_row_of_the_tables_trains_two_steps_and_comes_back_as_it_was(trained, row):
    made = trained(row)
    task, state = made.task, load_checkpoint(made.config.out / "last.pt")

    again = build(state["network"])
    again.load_state_dict(state["weights"])
    others = FAMILY[row].task(made.config, torch.device("cpu")).others
    for name, other in others.items():
        other.load_state_dict(state["others"][name])

    weights = dict(task.network.state_dict())
    assert state["step"] == 2
    assert equal(dict(again.state_dict()), weights)
    assert not equal(made.first, weights) and all(torch.isfinite(tensor).all() for tensor in weights.values())
    assert state["others"].keys() == others.keys() == beside(row)
    for name, other in others.items():
        assert equal(dict(other.network.state_dict()), dict(task.others[name].network.state_dict()))
        assert all(torch.isfinite(p).all() for p in other.network.parameters())


@pytest.mark.parametrize("row", SCGAN)
def test_at_full_width_all_that_trains_in_scgan_is_what_the_specification_counts(row):
    restorer, degrader, judge = 15_463_939, 12_291_896, {"L": 15_390_849, "H": 15_456_641}
    changes = SCGAN[row]
    places = {"data": ["a.tar"], "validation": "b.tar", "out": "out"}
    with torch.device("meta"):
        task = ScganTraining(
            ScganRunConfig.model_validate({"preset": "paper", **changes, **places}), torch.device("meta")
        )

    count = sum(
        p.numel() for net in (task.network, *(o.network for o in task.others.values())) for p in net.parameters()
    )

    judges = sum(judge[name[0]] for name in beside(row) - {"degraders"})
    least = restorer + degrader + judges
    if changes.get("share", "none") in ("none", "all"):
        alone = "cycles" in changes or changes.get("share") == "all"
        assert count == least + (0 if alone else degrader)
    else:
        assert least < count < least + degrader
    if row == "SCGAN":
        assert count == pytest.approx(101.7e6, abs=0.05e6)


# As ONNX


# Those whose restorers differ as graphs: losses, sharing and branches change none.
GRAPHS = {
    "SGEN": [row for row in SGEN if "GAN" not in row],
    "SISN and SCGAN": [*SISN, "SCGAN"],
}


@exports
@pytest.mark.parametrize("rows", GRAPHS)
def test_the_restorers_of_all_rows_are_as_onnx_what_they_are_in_torch(trained, rows):
    together = Together([trained(row).task.network for row in GRAPHS[rows]]).eval()
    session = onnxruntime.InferenceSession(to_onnx(together).SerializeToString(), providers=["CPUExecutionProvider"])

    for n, height, width in ((1, 1, 2), (3, 2, 1)):
        image = torch.rand(n, 3, height * together.config.multiple, width * together.config.multiple) * 2 - 1
        with torch.no_grad():
            expected = together(image)
        given = torch.from_numpy(session.run(None, {"image": image.numpy()})[0])

        assert given.shape == expected.shape
        assert (given - expected).abs().max() < 1e-4 * expected.abs().max()


@exports
@pytest.mark.parametrize("row", ["GFRNet Full", "GFRNet -W"])
def test_the_guided_restorers_of_the_tables_are_as_onnx_what_they_are_in_torch(trained, row):
    network = trained(row).task.network.eval()
    session = onnxruntime.InferenceSession(
        guided_to_onnx(network, side=48).SerializeToString(), providers=["CPUExecutionProvider"]
    )

    for n in (1, 3):
        image, guide = (F.interpolate(torch.rand(n, 3, 6, 6) * 2 - 1, (48, 48), mode="bilinear") for _ in range(2))
        with torch.no_grad():
            parts = network.parts(image, guide)
        given = session.run(None, {"image": image.numpy(), "guide": guide.numpy()})
        for output, array in zip(session.get_outputs(), given, strict=True):
            expected = getattr(parts, output.name)
            assert (torch.from_numpy(array) - expected).abs().max() < 1e-6 + 1e-4 * expected.abs().max(), output.name
