import pytest

torch = pytest.importorskip("torch", reason="the extra train is not installed")

from collections import Counter  # noqa: E402
from dataclasses import replace  # noqa: E402

import cv2  # noqa: E402
import numpy as np  # noqa: E402
from skimage.data import astronaut  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from models.batches import Batch, Batches, Diet, Validation, psnr  # noqa: E402
from models.dataset import Face, FaceTensors  # noqa: E402
from models.degradation import SGEN_SIZES, Shares  # noqa: E402
from models.losses import Judges  # noqa: E402

CPU = torch.device("cpu")
POINTS = np.array([[97.0, 105], [151, 103], [126, 133], [106, 164], [148, 162]])  # of the astronaut, by hand
DIET = Diet(
    protocols={"surveillance": 1.0}, scales={4: 0.4, 2: 0.35, 1: 0.25}, sides={96: 1.0}, sigma=None, noise="gauss",
    patch=32, vary=True, damage=Shares(),
)  # fmt: skip


def face(image: np.ndarray, name: str = "a/0") -> Face:
    return Face(name, name[0], np.ascontiguousarray(image), (60, 50, 190, 210), POINTS.astype(np.float32))


@pytest.fixture(scope="module")
def faces() -> FaceTensors:
    image = cv2.resize(astronaut()[0:224, 112:336, ::-1], (256, 256), interpolation=cv2.INTER_CUBIC)
    return FaceTensors([face(image), face(image // 2 + 60), face(cv2.GaussianBlur(image, (0, 0), 2))], CPU)


def batches(faces: FaceTensors, diet: Diet = DIET, **changes: object) -> Batches:
    settings = {"batch": 2, "seed": 0, "rank": 0, "scale": None, "enlarge": "cubic", **changes}
    return Batches(faces, diet, **settings)


def of(*protocols: str, **changes: object) -> Diet:
    return replace(DIET, protocols=dict.fromkeys(protocols, 1.0), **changes)


def same(a: Batch, b: Batch) -> bool:
    return a.protocol == b.protocol and all(
        torch.equal(getattr(a, name).nan_to_num(7), getattr(b, name).nan_to_num(7))
        for name in ("low", "clean", "landmarks")
    )


def test_a_batch_is_a_function_of_seed_rank_and_step_alone(faces):
    diet = of("sgen", "sisn", "surveillance")
    ours, others = batches(faces, diet), batches(faces, diet)
    before = [ours[step] for step in range(8)]

    assert all(same(others[step], before[step]) for step in reversed(range(8)))
    assert {batch.protocol for batch in before} == {"sgen", "sisn", "surveillance"}
    assert not any(same(before[0], batch) for batch in before[1:])
    for changed in (batches(faces, diet, seed=1), batches(faces, diet, rank=1)):
        assert not any(same(changed[step], before[step]) for step in range(8))


def test_protocols_come_in_their_shares(faces):
    diet = replace(DIET, protocols={"sgen": 1.0, "sisn": 3.0, "surveillance": 4.0})
    ours = batches(faces, diet, batch=1)

    drawn = Counter(ours[step].protocol for step in range(240))

    assert drawn["sgen"] / 240 == pytest.approx(1 / 8, abs=0.07)
    assert drawn["sisn"] / 240 == pytest.approx(3 / 8, abs=0.1)
    assert drawn["surveillance"] / 240 == pytest.approx(1 / 2, abs=0.1)


@pytest.mark.parametrize("diet", [of("sgen"), of("sisn"), of("surveillance")], ids=["sgen", "sisn", "surveillance"])
@pytest.mark.parametrize("scale", [None, 4])
def test_images_are_whole_grey_levels_between_minus_1_and_1(faces, diet, scale):
    batch = batches(faces, diet, scale=scale)[0]

    for images in (batch.low, batch.clean):
        levels = (images + 1) * 127.5
        assert images.abs().max() <= 1
        assert (levels - levels.round()).abs().max() < 1e-3
        assert images.is_contiguous(memory_format=torch.channels_last)


def test_sgen_s_faces_have_all_six_sizes_and_are_given_as_large_as_the_result(faces):
    ours = batches(faces, of("sgen"))

    seen = [ours[step] for step in range(40)]

    assert {(b.clean.shape[3], b.clean.shape[2]) for b in seen} == set(SGEN_SIZES)
    assert all(b.low.shape == b.clean.shape for b in seen)


def test_a_network_that_enlarges_is_given_sgen_s_faces_as_they_are(faces):
    for step in range(8):
        batch = batches(faces, of("sgen"), scale=4)[step]

        assert [4 * side for side in batch.low.shape[2:]] == list(batch.clean.shape[2:])


@pytest.mark.parametrize("scale", [4, 8])
def test_sisn_is_given_windows_of_its_patch(faces, scale):
    batch = batches(faces, of("sisn", patch=24), scale=scale)[0]

    assert batch.low.shape == (2, 3, 24, 24)
    assert batch.clean.shape == (2, 3, 24 * scale, 24 * scale)
    assert torch.isnan(batch.landmarks).all()


@pytest.mark.parametrize("factor", [4, 2, 1])
def test_surveillance_faces_are_as_small_as_the_scale_drawn(faces, factor):
    ours = batches(faces, of("surveillance", scales={factor: 1.0}), enlarge="nearest")

    batch = ours[0]

    # each pixel of the small face is a square of the same; one of twice that side is not
    assert batch.low.shape == batch.clean.shape == (2, 3, 96, 96)
    assert _spread(batch.low, factor) == 0
    assert _spread(batch.low, 2 * factor) > 0.01


def _spread(images: Tensor, side: int) -> float:
    blocks = images.unfold(2, side, side).unfold(3, side, side).flatten(4)
    return float((blocks.amax(dim=4) - blocks.amin(dim=4)).mean())


def test_untouched_faces_are_only_shrunk_and_keep_the_crop_s_own_likeness(faces):
    made = batches(faces, of("untouched", scales={1: 0.5, 4: 0.5}))
    drawn = [made[step] for step in range(12)]

    same = [torch.equal(batch.low, batch.clean) for batch in drawn]
    assert 0 < sum(same) < 12
    assert all(torch.equal(batch.person, batch.low) for batch in drawn)
    assert all(psnr(batch.low, batch.clean).min() > 20 for batch in drawn)


@pytest.mark.parametrize("scale", [2, 4, 8])
def test_a_network_that_enlarges_is_given_surveillance_faces_at_its_own_scale(faces, scale):
    batch = batches(faces, of("surveillance", sides={64: 1, 128: 1}), scale=scale)[0]

    assert [scale * side for side in batch.low.shape[2:]] == list(batch.clean.shape[2:])


def test_sides_and_scales_come_in_their_shares(faces):
    ours = batches(faces, of("surveillance", sides={64: 3.0, 96: 1.0}), batch=1)

    drawn = Counter(ours[step].clean.shape[2] for step in range(120))

    assert drawn[64] / 120 == pytest.approx(3 / 4, abs=0.13)
    assert set(drawn) == {64, 96}


def test_a_face_in_low_light_has_the_dark_truth():
    grey = FaceTensors([face(np.full((256, 256, 3), 180, np.uint8))], CPU)
    ours = batches(grey, of("surveillance", vary=False, scales={1: 1.0}, sides={64: 1.0}), batch=64)
    batch = ours[0]

    truth, given = (((images + 1) * 127.5).mean(dim=(1, 2, 3)) for images in (batch.clean, batch.low))
    dark = truth < 150

    assert 3 <= dark.sum() <= 18  # 15 % of 64
    assert truth[~dark].unique().tolist() == [180]
    assert (given - truth).abs().max() < 12  # noise is clipped where it is near black
    assert truth[dark].unique().numel() > 3


@pytest.mark.parametrize(
    ("sigma", "noise", "spread", "shift"),
    [((20.0, 20.0), "gauss", 20, 0), ((40.0, 40.0), "gauss", 40, 0), ((30.0, 30.0), "uniform", 30 / 12**0.5, 15)],
)
def test_sgen_s_noise_is_what_the_config_says(sigma, noise, spread, shift):
    grey = FaceTensors([face(np.full((256, 256, 3), 128, np.uint8))], CPU)
    ours = batches(grey, of("sgen", vary=False, sigma=sigma, noise=noise), scale=4, batch=16)

    levels = (ours[0].low + 1) * 127.5 - 128

    assert levels.std().item() == pytest.approx(spread, rel=0.05)
    assert levels.mean().item() == pytest.approx(shift, abs=1)


def test_by_default_half_of_sgen_s_batches_have_sigma_30_and_the_rest_from_0_to_50():
    grey = FaceTensors([face(np.full((256, 256, 3), 128, np.uint8))], CPU)
    ours = batches(grey, of("sgen", vary=False), scale=4, batch=4)

    sigmas = np.array([(ours[step].low * 127.5).std().item() for step in range(60)])
    usual = np.abs(sigmas - 30) < 1.5

    assert 0.35 < usual.mean() < 0.7
    assert sigmas[~usual].min() < 12 and sigmas[~usual].max() > 40


def test_exposure_contrast_and_tint_vary_and_some_faces_are_grey():
    coloured = np.full((256, 256, 3), (90, 120, 150), np.uint8)
    tensors = FaceTensors([face(coloured)], CPU)
    plain, varied = (
        batches(tensors, of("sisn", vary=vary, patch=8), batch=200)[0].clean.mean(dim=(2, 3)) for vary in (False, True)
    )

    assert plain.unique(dim=0).shape[0] == 1
    assert varied.unique(dim=0).shape[0] > 150
    assert 1 <= (varied.std(dim=1) < 1e-6).sum() <= 30


def test_a_network_of_a_coarse_grid_is_given_sides_that_divide(faces):
    ours = batches(faces, of("sgen"), multiple=32)  # SGEN with N = 4; its protocol has sides such as 112

    seen = [ours[step] for step in range(12)]

    assert any(b.clean.shape[2] % 32 for b in seen)
    for b in seen:
        assert b.low.shape[2] % 32 == b.low.shape[3] % 32 == 0
        assert b.cut_back(b.low).shape == b.clean.shape
        assert b.low.shape[2] - b.clean.shape[2] < 32


def test_a_diet_that_does_not_suit_is_refused_in_one_line(faces):
    small = FaceTensors([face(np.zeros((210, 210, 3), np.uint8))], CPU)

    with pytest.raises(
        ValueError, match=r"^patch: its windows of 256 px do not fit into the largest faces, of 200 px$"
    ):
        batches(small, of("sisn"), scale=8)
    with pytest.raises(ValueError, match=r"^sides: 100 is no multiple of the network's scale, 8$"):
        batches(faces, of("surveillance", sides={96: 1.0, 100: 1.0}), scale=8)


# Validation


class Given(nn.Module):
    """Gives its input back, enlarged by repeating where it should be larger."""

    def __init__(self, scale: int = 1) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, image: Tensor) -> Tensor:
        return image.repeat_interleave(self.scale, dim=2).repeat_interleave(self.scale, dim=3)


def validation(faces: FaceTensors, diet: Diet, **changes: object) -> Validation:
    return Validation(
        faces, batches(faces, diet, **changes), Judges(), identity_weight=10, perceptual_weight=8, count=4
    )


@pytest.mark.parametrize(
    ("protocols", "scale", "expected"),
    [
        (("sgen",), None, {"sgen128": 128, "sgen160": 160, "sgen192": 192}),
        (("sgen",), 4, {"sgen128": 128, "sgen160": 160, "sgen192": 192}),
        (("sisn",), 4, {"sisn256": 256}),
        (("sisn",), 8, {"sisn256": 256}),
        (("surveillance",), None, {"x4": 160, "x2": 192, "x1": 160}),
        (("surveillance",), 8, {"x8": 160}),
        (("sisn", "surveillance"), 4, {"sisn256": 256, "x4": 160}),
    ],
)
def test_each_protocol_has_its_fixed_sets(faces, protocols, scale, expected):
    first, again = (validation(faces, of(*protocols), scale=scale) for _ in range(2))

    assert {name: batch.clean.shape[2] for name, batch in first.sets.items()} == expected
    assert all(same(first.sets[name], again.sets[name]) for name in expected)
    for batch in first.sets.values():
        assert batch.low.shape[2] * (scale or 1) == batch.clean.shape[2]


def test_sets_do_not_depend_on_the_seed_of_the_run(faces):
    ours, others = (validation(faces, of("surveillance"), seed=seed) for seed in (0, 5))

    assert all(same(ours.sets[name], others.sets[name]) for name in ours.sets)


@pytest.mark.parametrize("multiple", [16, 32])
def test_a_network_that_gives_its_input_back_gains_nothing(faces, multiple):
    ours = validation(faces, of("sgen", "surveillance"), multiple=multiple)

    scores, picture = ours.score(Given())

    assert scores == pytest.approx(dict.fromkeys(scores, 0.0), abs=1e-4)
    assert picture.shape == (128 * 6, 1152, 3)
    assert picture.dtype == np.uint8
    assert ours.value(scores) == pytest.approx(0, abs=1e-4)


def test_a_network_that_only_repeats_pixels_is_worse_than_cubic(faces):
    scores, _ = validation(faces, of("sisn"), scale=4).score(Given(4))

    assert -5 < scores["sisn256"] < -0.3


def test_the_figure_that_chooses_weighs_identity_and_lpips_as_the_loss_does(faces):
    ours = validation(faces, of("sgen"))
    scores = {"a": 2.0, "b": 4.0, "a.identity": 0.1, "b.identity": 0.3, "b.lpips": -0.25}

    assert ours.value(scores) == pytest.approx(3 + 10 * 0.2 + 8 * 0.25)
    assert ours.value({"a": 2.0, "b": 4.0}) == pytest.approx(3)


def test_validation_on_faces_that_are_small_takes_windows_that_fit():
    small = FaceTensors([face(np.full((210, 210, 3), 99, np.uint8))], CPU)

    assert list(validation(small, of("sisn"), scale=4).sets) == ["sisn200"]


def test_psnr_is_that_of_8_bit_images():
    truth = torch.zeros(2, 3, 4, 4)
    images = truth.clone()
    images[0] += 10 / 127.5
    images[1] += 0.4 / 127.5  # less than half a grey level

    assert psnr(images, truth)[0].item() == pytest.approx(20 * np.log10(25.5), abs=1e-3)
    assert psnr(images, truth)[1].item() > 100
