import pytest

torch = pytest.importorskip("torch", reason="the extra train is not installed")

from dataclasses import asdict, replace  # noqa: E402
from pathlib import Path  # noqa: E402

import numpy as np  # noqa: E402
import onnxruntime  # noqa: E402
from torch.nn import functional as F  # noqa: E402

from engines.card import read_card  # noqa: E402
from models.checkpoint import build, describe, load_weights  # noqa: E402
from models.embedder import PRESETS, Embedder, EmbedderConfig  # noqa: E402
from models.export import export, int8  # noqa: E402
from models.losses import RETAIL_TEMPLATE  # noqa: E402

# torch's exporter uses what torch deprecates
pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning", "ignore::DeprecationWarning")

TINY = EmbedderConfig(widths=(8, 12), depths=(1, 2), features=4, head=16, embedding=6, side=32, mirrored=True)
MOST_BYTES = 5_000_000


def trained(config: EmbedderConfig) -> Embedder:
    """An embedder whose normalisation is not that of a network which has seen nothing."""
    torch.manual_seed(0)
    network = Embedder(config)
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.uniform_(module.running_mean, -0.3, 0.3)
            torch.nn.init.uniform_(module.running_var, 0.5, 1.5)
    return network.eval()


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Embedder, Path]:
    network = trained(TINY)
    state = {"network": describe(network), "weights": network.state_dict(), "step": 1,
             "config": {"network": "embedder", "data": ["/some/faces_train.tar", "/some/mined"]}}  # fmt: skip
    path = tmp_path_factory.mktemp("exported") / "face.onnx"
    export(state, path, name="face", license="research-only")
    return network, path


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_embeds_a_face_of_112_px_and_ships_in_5_mb(name):
    config = PRESETS[name]
    network = Embedder(config).eval()

    with torch.no_grad():
        embeddings = network(torch.zeros(1, 3, 112, 112))

    assert embeddings.shape == (1, 256)
    assert 2 * sum(weights.numel() for weights in network.state_dict().values()) < MOST_BYTES - 500_000  # for the graph


@pytest.mark.parametrize("block", ["residual", "inverted"])
def test_features_have_a_place_for_each_stride(block):
    config = EmbedderConfig(**{**asdict(TINY), "block": block})
    network = Embedder(config).eval()

    assert config.stride == 8
    assert network.features(torch.zeros(2, 3, 32, 32)).shape == (2, 4, 4, 4)


def test_an_embedding_depends_on_where_in_the_face_something_is():
    network, face = trained(TINY), torch.zeros(2, 3, 32, 32)
    face[0, :, 4:8, 4:8] = 1
    face[1, :, 20:24, 20:24] = 1

    with torch.no_grad():
        one, other = network(face)

    assert not torch.allclose(one, other, atol=1e-3)


def test_a_face_and_its_mirror_image_are_one_face_unless_they_are_not_to_be():
    network, face = trained(TINY), torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    single = Embedder(replace(TINY, mirrored=False)).eval()
    single.load_state_dict(network.state_dict())

    with torch.no_grad():
        assert torch.allclose(network(face), network(face.flip(3)), atol=1e-5)
        one, other = single(face), single(face.flip(3))
        assert not torch.allclose(one, other, atol=1e-3)
        assert torch.allclose(network(face), F.normalize(one, dim=1) + F.normalize(other, dim=1), atol=1e-5)


def test_an_embedder_is_built_again_from_what_describes_it():
    network = trained(TINY)

    again = build(describe(network))

    assert again.config == network.config
    again.load_state_dict(network.state_dict())


@pytest.mark.parametrize(
    ("changes", "said"),
    [({"side": 36}, "side: 36 is no multiple of 8"), ({"depths": (1, 1, 1)}, "widths, depths: 2 and 3 stages")],
)
def test_a_config_that_does_not_fit_together_is_refused(changes, said):
    with pytest.raises(ValueError, match=said):
        build({"name": "embedder", **asdict(TINY), **changes})


def test_the_onnx_gives_for_any_batch_what_the_network_gives(exported):
    network, path = exported
    session = onnxruntime.InferenceSession(str(path))
    faces = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        wanted = network(faces).numpy()

    for n in (1, 3):
        (found,) = session.run(["embedding"], {"face": faces[:n].numpy()})

        assert found == pytest.approx(wanted[:n], abs=0.01 * float(np.abs(wanted).max()))  # weights are stored as fp16


def test_the_card_says_how_a_face_is_aligned_and_what_comes_out(exported):
    _, path = exported

    card = read_card(path)

    assert (card.task, card.name, card.license, card.trained_on) == (
        "embedding", "face", "research-only", "faces_train, mined",
    )  # fmt: skip
    assert (card.color, card.mean, card.std) == ("RGB", (127.5,) * 3, (127.5,) * 3)
    assert (card.alignment_size, card.embedding_dim) == (32, 6)
    assert np.array(card.alignment) == pytest.approx(np.array(RETAIL_TEMPLATE) * 32)


def test_no_ranges_of_8_bits_are_asked_of_an_embedder(exported):
    _, path = exported

    assert "runs in float alone" in int8(path, {"data": ["nowhere.tar"], "validation": "nowhere", "likeness": "x"})


def test_what_was_exported_tells_why_training_does_not_begin_with_it(exported):
    _, path = exported

    with pytest.raises(ValueError, match="begin with its checkpoint"):
        load_weights(path)
