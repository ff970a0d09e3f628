import pytest

torch = pytest.importorskip("torch", reason="the extra train is not installed")

from pathlib import Path  # noqa: E402

import cv2  # noqa: E402
import numpy as np  # noqa: E402
import onnx  # noqa: E402
import onnxruntime  # noqa: E402
from onnx import helper  # noqa: E402
from skimage.data import astronaut  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.nn import functional as F  # noqa: E402
from training import save_onnx  # noqa: E402

from models.losses import (  # noqa: E402
    _OPERATORS,
    PIXEL_LOSSES,
    RETAIL_TEMPLATE,
    FaceLikeness,
    OnnxNetwork,
    Perceptual,
    charbonnier_loss,
    psnr_loss,
)
from streamer.geometry import align  # noqa: E402

POINTS = np.array([[97.0, 105], [151, 103], [126, 133], [106, 164], [148, 162]])  # of `astronaut_face`, by hand


def weights(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).normal(0, 0.4, shape).astype(np.float32)


def tiny_embedder(path: Path) -> Path:
    """Three convolutions that step to a coarser grid, and what is left pooled, as in the real one."""
    node = helper.make_node
    step = {"strides": [2, 2], "pads": [1, 1, 1, 1]}
    return save_onnx(
        path,
        [
            node("Mul", ["image", "small"], ["scaled"]),
            node("Conv", ["scaled", "w1"], ["a"], **step),
            node("PRelu", ["a", "slope"], ["a2"]),
            node("Conv", ["a2", "w2"], ["b"], **step),
            node("Sigmoid", ["b"], ["b2"]),
            node("Conv", ["b2", "w3"], ["c"], **step),
            node("AveragePool", ["c"], ["d"], kernel_shape=[16, 16], strides=[16, 16]),
        ],
        small=np.float32(1 / 255), w1=weights(4, 3, 3, 3), slope=weights(4, 1, 1), w2=weights(6, 4, 3, 3),
        w3=weights(8, 6, 3, 3),
    )  # fmt: skip


def by_onnxruntime(path: Path, *images: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(None, dict(zip([i.name for i in session.get_inputs()], images, strict=True)))[0]


@pytest.fixture(scope="module")
def astronaut_face() -> np.ndarray:
    """(256, 256, 3) uint8 BGR."""
    return cv2.resize(astronaut()[0:224, 112:336, ::-1], (256, 256), interpolation=cv2.INTER_CUBIC)


def tensor(image: np.ndarray) -> Tensor:
    """(1, 3, h, w) RGB in [-1, 1] of (h, w, 3) uint8 BGR."""
    return torch.from_numpy(np.ascontiguousarray(image[..., ::-1].transpose(2, 0, 1)))[None] / 127.5 - 1


# Pixel losses


def test_the_pixel_losses_are_what_they_are_called():
    restored, clean = torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 4, 4)
    restored[0] += 0.2
    restored[1] -= 0.02

    assert PIXEL_LOSSES["l1"](restored, clean).item() == pytest.approx(0.11)
    assert PIXEL_LOSSES["mse"](restored, clean).item() == pytest.approx((0.04 + 0.0004) / 2)
    assert charbonnier_loss(restored, clean).item() == pytest.approx((0.2 + 0.02) / 2, abs=1e-4)
    assert psnr_loss(restored, clean).item() == pytest.approx(-(20 + 40) / 2, abs=0.3)  # differences of 1/10 and 1/100


def test_the_charbonnier_loss_is_smooth_at_0():
    restored = torch.zeros(1, 3, 2, 2, requires_grad=True)

    charbonnier_loss(restored, torch.zeros(1, 3, 2, 2)).backward()

    assert restored.grad.abs().max() == 0


def test_every_image_counts_alike_in_the_psnr_loss_however_noisy():
    clean = torch.zeros(2, 3, 4, 4)
    restored = torch.stack([torch.full((3, 4, 4), 0.5), torch.full((3, 4, 4), 0.05)]).requires_grad_()

    psnr_loss(restored, clean).backward()

    pull = (restored.grad * restored).sum(dim=(1, 2, 3)).detach()  # of a change in proportion to the error
    assert pull[0].item() == pytest.approx(pull[1].item(), rel=0.05)


# Networks as ONNX


def test_every_operator_that_is_known_gives_what_onnxruntime_gives(tmp_path):
    node = helper.make_node
    nodes = [
        node("Sub", ["image", "mean"], ["x0"]),
        node("Div", ["x0", "spread"], ["x1"]),
        node("Conv", ["x1", "w1", "b1"], ["x2"], strides=[2, 1], pads=[0, 1, 1, 2], dilations=[1, 2]),
        node("PRelu", ["x2", "slope"], ["x3"]),
        node("Conv", ["x3", "w2"], ["x4"], group=2, pads=[1, 1, 1, 1]),
        node("Relu", ["x4"], ["x5"]),
        node("Sigmoid", ["x3"], ["x6"]),
        node("Mul", ["x5", "x6"], ["x7"]),
        node("Add", ["x7", "x3"], ["x8"]),
        node("MaxPool", ["x8"], ["x9"], kernel_shape=[3, 3], strides=[2, 2]),
        node("MaxPool", ["x9"], ["x10"], kernel_shape=[2, 2]),
        node("AveragePool", ["x10"], ["x11"], kernel_shape=[2, 2], strides=[2, 1], ceil_mode=0),
        node("ReduceL2", ["x11", "channels"], ["x12"], keepdims=1),
        node("ReduceL2", ["x11", "channels"], ["x13"]),
        node("Sum", ["x12", "x13", "x12"], ["x14"]),
        node("ReduceMean", ["x14", "plane"], ["x15"], keepdims=1),
        node("Add", ["x14", "x15"], ["x16"]),
        node("ReduceSum", ["x16", "plane"], ["x17"], keepdims=0),
    ]
    path = save_onnx(
        tmp_path / "all.onnx", nodes, mean=weights(1, 3, 1, 1), spread=np.float32(0.7), w1=weights(4, 3, 3, 3),
        b1=weights(4), slope=weights(4, 1, 1), w2=weights(4, 2, 3, 3), channels=np.array([1]), plane=np.array([2, 3]),
    )  # fmt: skip
    image = np.random.default_rng(0).normal(size=(2, 3, 24, 20)).astype(np.float32)

    given = OnnxNetwork(path)(torch.from_numpy(image))[0].numpy()

    assert {each.op_type for each in nodes} == set(_OPERATORS)  # a new operator belongs into this test
    assert given.shape == (2, 1)
    assert given == pytest.approx(by_onnxruntime(path, image), rel=1e-5)


def test_axes_may_be_an_attribute_as_in_older_networks(tmp_path):
    path = save_onnx(
        tmp_path / "old.onnx", [helper.make_node("ReduceMean", ["image"], ["out"], axes=[2, 3], keepdims=0)]
    )
    model = onnx.load(path)
    model.opset_import[0].version = 13
    onnx.save(model, path)
    image = np.random.default_rng(0).normal(size=(2, 3, 5, 4)).astype(np.float32)

    assert np.allclose(OnnxNetwork(path)(torch.from_numpy(image))[0].numpy(), by_onnxruntime(path, image), atol=1e-6)


def test_operators_that_are_not_known_are_refused_by_their_names(tmp_path):
    node = helper.make_node
    path = save_onnx(
        tmp_path / "strange.onnx",
        [
            node("Tanh", ["image"], ["a"]), node("Softplus", ["a"], ["b"]), node("Relu", ["b"], ["c"]),
            node("MaxPool", ["c"], ["d"], kernel_shape=[2, 2], strides=[2, 2], ceil_mode=1),
            node("Conv", ["d", "w"], ["e"], auto_pad="SAME_UPPER"),
        ],
        w=weights(3, 3, 3, 3),
    )  # fmt: skip

    names = r"Conv with auto_pad, MaxPool with pads or ceil_mode, Softplus, Tanh"
    with pytest.raises(ValueError, match=rf"strange\.onnx: operators {names} are not known; known: Add, "):
        OnnxNetwork(path)


@pytest.mark.parametrize("content", [b"", b"no network at all"])
def test_a_file_that_is_no_onnx_is_refused(tmp_path, content):
    (tmp_path / "none.onnx").write_bytes(content)

    with pytest.raises(ValueError, match=r"none\.onnx is no ONNX"):
        OnnxNetwork(tmp_path / "none.onnx")


@pytest.mark.parametrize("name", ["face-reidentification-retail-0095", "alexnet_lpips_distance"])
def test_the_networks_of_the_losses_give_what_onnxruntime_gives(shared, astronaut_face, name):
    path = shared / f"models/{name}.onnx"
    if not path.exists():
        pytest.skip(f"shared/models/{name}.onnx is absent")
    if "lpips" in name:
        small = cv2.resize(astronaut_face, (96, 80))
        first = torch.cat([tensor(small), tensor(small[::-1])]).numpy()
        second = torch.cat([tensor(cv2.GaussianBlur(small, (0, 0), 1.5)), tensor(small[::-1, ::-1])]).numpy()
        images = [first, second]
    else:
        images = [((tensor(cv2.resize(astronaut_face, (128, 128))).flip(1) + 1) * 127.5).numpy()]

    given = OnnxNetwork(path)(*map(torch.from_numpy, images))[0].numpy()
    expected = by_onnxruntime(path, *images)

    assert given.shape == expected.shape
    assert np.abs(given - expected).max() < 1e-3 * np.abs(expected).max()


# Likeness


def test_a_face_is_itself(tmp_path, astronaut_face):
    likeness = FaceLikeness(tiny_embedder(tmp_path / "e.onnx"))
    face = tensor(astronaut_face)

    cosine, distance = likeness(face, face.clone(), torch.tensor(POINTS[None], dtype=torch.float32))

    assert cosine.tolist() == pytest.approx([1], abs=1e-5)
    assert distance.tolist() == pytest.approx([0], abs=1e-6)


def test_a_face_is_less_itself_the_more_it_is_blurred(tmp_path, astronaut_face):
    likeness = FaceLikeness(tiny_embedder(tmp_path / "e.onnx"))
    faces = torch.cat([tensor(cv2.GaussianBlur(astronaut_face, (0, 0), s)) for s in (1, 4, 12)])
    clean = tensor(astronaut_face).expand(3, -1, -1, -1)

    _, distance = likeness(faces, clean, torch.tensor(POINTS, dtype=torch.float32).expand(3, -1, -1))

    assert 0 < distance[0] < distance[1] < distance[2]


def test_the_gradient_reaches_the_restored_face_and_nothing_else(tmp_path, astronaut_face):
    likeness = FaceLikeness(tiny_embedder(tmp_path / "e.onnx"))
    clean = tensor(astronaut_face).requires_grad_()
    restored = tensor(cv2.GaussianBlur(astronaut_face, (0, 0), 2)).requires_grad_()

    cosine, distance = likeness(restored, clean, torch.tensor(POINTS[None], dtype=torch.float32))
    ((1 - cosine) + distance).sum().backward()

    assert restored.grad.abs().sum() > 0
    assert clean.grad is None
    assert list(likeness.parameters()) == []
    assert not any(buffer.requires_grad for buffer in likeness.buffers())


def test_a_step_against_the_gradient_makes_a_face_more_like_the_clean_one(tmp_path, astronaut_face):
    likeness = FaceLikeness(tiny_embedder(tmp_path / "e.onnx"))
    clean, points = tensor(astronaut_face), torch.tensor(POINTS[None], dtype=torch.float32)
    restored = tensor(cv2.GaussianBlur(astronaut_face, (0, 0), 4)).requires_grad_()

    distance = likeness(restored, clean, points)[1]
    distance.sum().backward()
    better = restored.detach() - 0.01 * restored.grad / restored.grad.abs().max()

    assert likeness(better, clean, points)[1] < distance


def test_the_clean_face_may_have_another_size_than_the_restored_one(tmp_path, astronaut_face):
    likeness = FaceLikeness(tiny_embedder(tmp_path / "e.onnx"))
    points, small = torch.tensor(POINTS[None], dtype=torch.float32), cv2.resize(astronaut_face, None, fx=0.5, fy=0.5)

    near = likeness(tensor(astronaut_face), tensor(small), points)[1]
    displaced = likeness(tensor(astronaut_face), tensor(np.roll(small, 8, axis=0)), points)[1]

    assert near < 0.5 * displaced


def test_the_unit_mean_with_the_raw_face_is_judged_where_the_raw_face_is_given(tmp_path, astronaut_face):
    likeness = FaceLikeness(tiny_embedder(tmp_path / "e.onnx"))
    clean, points = tensor(astronaut_face), torch.tensor(POINTS[None], dtype=torch.float32)
    restored, raw = (tensor(cv2.GaussianBlur(astronaut_face, (0, 0), sigma)).requires_grad_() for sigma in (3, 9))

    alone = likeness(restored, clean, points)[0]
    with_itself = likeness(restored, clean, points, raw=restored)[0]
    with_raw = likeness(restored, clean, points, raw=raw)[0]
    with_raw.sum().backward()

    assert with_itself.item() == pytest.approx(alone.item(), abs=1e-5)
    assert with_raw < alone  # the raw face is less like the clean one
    assert raw.grad is None and restored.grad.abs().sum() > 0


def test_a_disguise_changes_what_is_seen_and_is_the_same_for_both_faces(tmp_path, astronaut_face):
    likeness = FaceLikeness(tiny_embedder(tmp_path / "e.onnx"))
    clean, points = tensor(astronaut_face), torch.tensor(POINTS[None], dtype=torch.float32)
    blurred = tensor(cv2.GaussianBlur(astronaut_face, (0, 0), 3))
    disguises = [likeness.disguised(np.random.default_rng(seed), 0.1) for seed in (0, 0, 1)]

    assert likeness(clean, clean, points, disguise=disguises[0])[0].item() == pytest.approx(1, abs=1e-5)
    seen = [likeness(blurred, clean, points, disguise=disguise)[1].item() for disguise in (*disguises, None)]
    assert seen[0] == seen[1] and len(set(seen)) == 3


@pytest.mark.parametrize(("scale", "angle", "shift"), [(1, 0, (0, 0)), (0.4, 25, (30, -4)), (2.5, -140, (-9, 200))])
def test_the_template_is_placed_on_the_landmarks(tmp_path, scale, angle, shift):
    likeness = FaceLikeness(tiny_embedder(tmp_path / "e.onnx"))
    turn = scale * np.array([[np.cos(a := np.radians(angle)), -np.sin(a)], [np.sin(a), np.cos(a)]])
    template = np.array(RETAIL_TEMPLATE) * 128
    landmarks = template @ turn.T + shift

    matrices = likeness.placed(torch.tensor(landmarks[None], dtype=torch.float32))[0].numpy()

    assert np.abs(matrices - np.column_stack([turn, shift])).max() < 1e-3
    assert np.abs(template @ matrices[:, :2].T + matrices[:, 2] - landmarks).max() < 1e-3


def test_the_face_is_aligned_as_the_product_aligns_it(tmp_path, astronaut_face):
    likeness = FaceLikeness(tiny_embedder(tmp_path / "e.onnx"))
    seen: list[Tensor] = []
    likeness.embedder.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    template = np.array(RETAIL_TEMPLATE) * 128
    smooth = cv2.GaussianBlur(astronaut_face, (0, 0), 2)

    likeness(tensor(smooth), tensor(smooth), torch.tensor(POINTS[None], dtype=torch.float32))

    expected = align(smooth, POINTS, template, 128).astype(np.float32)  # BGR, as the embedder wants it
    difference = np.abs(seen[0][0].permute(1, 2, 0).numpy() - expected)
    assert difference.mean() < 1.5
    assert np.percentile(difference, 99) < 8


def test_a_network_without_three_steps_is_no_embedder_of_this_kind(tmp_path):
    path = save_onnx(tmp_path / "flat.onnx", [helper.make_node("Conv", ["image", "w"], ["out"])], w=weights(4, 3, 3, 3))

    with pytest.raises(ValueError, match=r"flat\.onnx is not built as it should be"):
        FaceLikeness(path)


def test_the_real_embedder_knows_a_blurred_face_from_another(shared, astronaut_face):
    path = shared / "models/face-reidentification-retail-0095.onnx"
    if not path.exists():
        pytest.skip("shared/models/face-reidentification-retail-0095.onnx is absent")
    likeness, points = FaceLikeness(path), torch.tensor(POINTS[None], dtype=torch.float32)
    clean = tensor(astronaut_face)
    blurred = tensor(cv2.GaussianBlur(astronaut_face, (0, 0), 2)).requires_grad_()

    cosine, distance = likeness(blurred, clean, points)
    cosine.sum().backward()

    assert 0.6 < cosine.item() < 0.999
    assert 0 < distance.item() < 1
    assert likeness(clean.flip(2), clean, points)[0].item() < 0.5 < cosine.item()
    assert blurred.grad.abs().sum() > 0


def test_the_perceptual_distance_is_of_each_pair(tmp_path):
    node = helper.make_node
    path = save_onnx(
        tmp_path / "p.onnx",
        [
            node("Sub", ["a", "b"], ["d"]), node("Mul", ["d", "d"], ["square"]),
            node("ReduceMean", ["square", "axes"], ["out"], keepdims=1),
        ],
        inputs=("a", "b"), axes=np.array([1, 2, 3]),
    )  # fmt: skip
    restored, clean = torch.rand(3, 3, 8, 8), torch.rand(3, 3, 8, 8)

    distance = Perceptual(path)(restored, clean)

    assert torch.allclose(distance, F.mse_loss(restored, clean, reduction="none").mean(dim=(1, 2, 3)))
