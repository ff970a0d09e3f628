import pytest

torch = pytest.importorskip("torch", reason="the extra train is not installed")

import sys  # noqa: E402
from collections.abc import Callable  # noqa: E402
from dataclasses import asdict, replace  # noqa: E402
from pathlib import Path  # noqa: E402

import numpy as np  # noqa: E402
import onnx  # noqa: E402
import onnxruntime  # noqa: E402
from torch.nn import functional as F  # noqa: E402

from engines.card import read_card  # noqa: E402
from engines.half import half  # noqa: E402
from models import export as exporter  # noqa: E402
from models.checkpoint import load_weights  # noqa: E402
from models.export import export  # noqa: E402
from models.gfrnet import PRESETS, VARIANTS, Gfrnet, GfrnetConfig  # noqa: E402

# torch's exporter uses what torch deprecates
pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning", "ignore::DeprecationWarning")

MODERN = replace(PRESETS["small"], base=4, cap=8, depth=3)
PAPER = GfrnetConfig(base=4, cap=8, depth=3)
WITHOUT_WARP = VARIANTS["-W"].config(replace(MODERN, depth=2))
SIDE = 48
SHIPPED = replace(MODERN, smooth=5, trust=0.4)
CONFIGS = {"modern": MODERN, "paper": PAPER, "modern -W": WITHOUT_WARP, "modern, as it ships": SHIPPED}


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[[GfrnetConfig], tuple[Path, Gfrnet]]:
    """Config to the ONNX and the network in torch whose weights are those of the file."""
    folder, made = tmp_path_factory.mktemp("guided"), {}

    def of(config: GfrnetConfig) -> tuple[Path, Gfrnet]:
        if config not in made:
            torch.manual_seed(0)
            network = Gfrnet(config).eval()
            for parameter in network.parameters():
                torch.nn.init.normal_(parameter, 0, 0.1)  # else much of it does nothing yet
            path = folder / f"{len(made)}.onnx"
            export(state(network), path, name="tiny", license="test")
            network.load_state_dict({
                name: w.half().float() if w.numel() >= 256 else w for name, w in network.state_dict().items()
            })  # fmt: skip
            made[config] = (path, network)
        return made[config]

    return of


def pictures(n: int, height: int, width: int, *, seed: int) -> np.ndarray:
    """As smooth as photos are: in noise, half a ten thousandth of a pixel is a difference."""
    coarse = torch.from_numpy(np.random.default_rng(seed).uniform(-1, 1, (n, 3, 8, 8)).astype(np.float32))
    return F.interpolate(coarse, (height, width), mode="bilinear").numpy()


def state(network: Gfrnet) -> dict[str, object]:
    described = {"name": "gfrnet", **asdict(network.config)}
    config = {"data": ["some/faces_train.tar"], "side": SIDE}
    return {"network": described, "weights": network.state_dict(), "step": 1, "config": config}


@pytest.mark.parametrize("name", CONFIGS)
def test_the_exported_network_restores_and_shows_its_guide_as_torch_does(exported, name):
    path, network = exported(CONFIGS[name])
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    sizes = [(SIDE, SIDE)] if network.config.design == "paper" else [(SIDE, SIDE), (32, 80)]

    for n, (height, width) in [(n, size) for n in (1, 3) for size in sizes]:
        image, guide = (pictures(n, height, width, seed=seed) for seed in (0, 1))
        with torch.no_grad():
            expected = network.parts(torch.from_numpy(image), torch.from_numpy(guide))
        given = session.run(None, {"image": image, "guide": guide})
        for output, array in zip(session.get_outputs(), given, strict=True):
            wanted = getattr(expected, output.name).numpy()
            assert array.shape == wanted.shape
            assert np.abs(array - wanted).max() < 1e-4, output.name
        assert np.abs(given[0] - image).max() > 0.01


@pytest.mark.parametrize(
    ("name", "outputs", "size"),
    [
        ("modern", ["restored", "warped", "mask"], ("h", "w")),
        ("paper", ["restored", "warped"], (SIDE, SIDE)),
        ("modern -W", ["restored", "mask"], ("h", "w")),
    ],
)
def test_its_card_says_that_it_wants_a_guide_and_what_it_gives(exported, name, outputs, size):
    path, network = exported(CONFIGS[name])

    card = read_card(path)

    assert (card.name, card.task, card.trained_on) == ("tiny", "guided-restoration", "faces_train")
    assert [spec.name for spec in card.inputs] == ["image", "guide"]
    assert [spec.name for spec in card.outputs] == outputs
    assert all(spec.shape == ("n", 3, *size) for spec in card.inputs)
    assert (card.scales, card.result_size, card.enlarge) == ((), SIDE, "cubic")
    assert card.guide_laid == network.config.laid
    assert card.size_multiple == network.config.multiple


def test_its_guide_is_sampled_by_what_tensorrt_knows_as_bilinear(exported):
    model = onnx.load(exported(MODERN)[0])

    modes = [attribute.s for node in model.graph.node if node.op_type == "GridSample"
             for attribute in node.attribute if attribute.name == "mode"]  # fmt: skip
    assert set(modes) == {b"bilinear"}
    assert {entry.version for entry in model.opset_import if entry.domain == ""} == {18}


@pytest.mark.parametrize("name", ["modern", "paper"])
def test_its_weights_are_stored_in_half_and_found_again_by_their_names(exported, name):
    path, network = exported(CONFIGS[name])

    weights = load_weights(path)

    assert weights.keys() == network.state_dict().keys()
    assert all(torch.equal(weights[key], value) for key, value in network.state_dict().items())
    assert any(t.data_type == onnx.TensorProto.FLOAT16 for t in onnx.load(path).graph.initializer)


def test_a_variant_without_a_guide_is_no_guided_restorer_and_that_is_one_line(tmp_path, monkeypatch, capsys):
    torch.save(state(Gfrnet(VARIANTS["-WG"].config(MODERN))), tmp_path / "best.pt")
    options = ["export", str(tmp_path / "best.pt"), "--name", "x", "--license", "none", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", options)

    with pytest.raises(SystemExit) as ended:
        exporter.main()

    said = capsys.readouterr().err
    assert (ended.value.code, said.count("\n")) == (2, 1)
    assert "looks at no guide" in said
    assert not list(tmp_path.glob("*.onnx"))


def test_in_half_precision_the_guide_is_still_warped_in_fp32(exported, tmp_path):
    path, _ = exported(MODERN)
    network = half(onnx.load(path), "fp16")
    onnx.save(network, tmp_path / "half.onnx")
    image, guide = (pictures(2, SIDE, SIDE, seed=seed) for seed in (0, 1))

    inferred = onnx.shape_inference.infer_shapes(network).graph.value_info
    known = {value.name: value.type.tensor_type.elem_type for value in inferred}
    grids = [name for node in network.graph.node if node.op_type == "GridSample" for name in node.input]
    sessions = [
        onnxruntime.InferenceSession(str(each), providers=["CPUExecutionProvider"])
        for each in (path, tmp_path / "half.onnx")
    ]
    whole, reduced = (session.run(None, {"image": image, "guide": guide})[0] for session in sessions)

    assert grids and {known.get(name, onnx.TensorProto.FLOAT) for name in grids} == {onnx.TensorProto.FLOAT}
    assert onnx.TensorProto.FLOAT16 in known.values()
    assert 10 * np.log10(4 / np.square(whole - reduced).mean()) > 40
