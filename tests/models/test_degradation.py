import pytest

torch = pytest.importorskip("torch", reason="the extra train is not installed")

import io  # noqa: E402
from dataclasses import fields, replace  # noqa: E402

import cv2  # noqa: E402
import numpy as np  # noqa: E402
from PIL import Image  # noqa: E402
from skimage.data import astronaut, chelsea, coffee  # noqa: E402
from torch import Tensor  # noqa: E402

from models.degradation import (  # noqa: E402
    SHRINKING,
    Damage,
    Shares,
    _gfrnet,
    draw_damage,
    gaussian_blur,
    generators,
    gfrnet,
    h264,
    jpeg,
    low_light,
    motion_blur,
    resize,
    scgan,
    sensor_noise,
    sgen,
    sisn,
    stored,
    surveillance,
    uniform_noise,
)

PICTURES = [np.ascontiguousarray(whole[20:276, 100:317]) for whole in (astronaut(), coffee(), chelsea())]  # 217x256 RGB
OPENCV = {
    "area": cv2.INTER_AREA,
    "cubic": cv2.INTER_CUBIC,
    "linear": cv2.INTER_LINEAR,
    "nearest": cv2.INTER_NEAREST,
}


def tensor(*images: np.ndarray) -> Tensor:
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float()


def array(images: Tensor) -> np.ndarray:
    """(n, h, w, 3) uint8, having checked that they are such."""
    assert images.dtype == torch.float32
    assert torch.equal(images, stored(images))
    return images.permute(0, 2, 3, 1).byte().numpy()


def grey(level: float, n: int = 1, side: int = 200) -> Tensor:
    return torch.full((n, 3, side, side), float(level))


def furthest(a: np.ndarray, b: np.ndarray) -> int:
    return int(np.abs(a.astype(int) - b.astype(int)).max())


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    error = np.mean((a.astype(float) - b.astype(float)) ** 2)
    return float(10 * np.log10(255**2 / max(error, 1e-6)))


def by_opencv(image: np.ndarray, quality: int) -> np.ndarray:
    coded = cv2.imencode(".jpg", image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, quality])[1]
    return cv2.imdecode(coded, cv2.IMREAD_COLOR)[..., ::-1]


def by_pillow(image: np.ndarray, quality: int) -> np.ndarray:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=quality)
    return np.asarray(Image.open(buffer))


def bicubic_of_pillow(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC))


FACES = tensor(*PICTURES)


SIZES = [(96, 128), (54, 64), (176, 208), (31, 77), (217, 100), (300, 400)]
RESIZED = [(kernel, size) for kernel in (*OPENCV, "pillow") for size in SIZES if kernel != "area" or size != (300, 400)]


@pytest.mark.parametrize(("kernel", "size"), RESIZED)
def test_resizing_is_within_a_grey_level_of_opencv_and_pillow(kernel, size):
    resized = array(stored(resize(FACES, size, kernel)))

    for ours, picture in zip(resized, PICTURES, strict=True):
        if kernel == "pillow":
            theirs = bicubic_of_pillow(picture, size)
        else:
            theirs = cv2.resize(picture, size, interpolation=OPENCV[kernel])
        assert furthest(ours, theirs) <= 1


def test_area_refuses_to_enlarge():
    with pytest.raises(ValueError, match=r"217x256 cannot become 100x257"):
        resize(FACES, (100, 257), "area")


def test_an_image_that_has_its_size_already_stays_as_it_is():
    for kernel in ("area", "cubic", "linear", "nearest", "pillow"):
        assert torch.equal(resize(FACES, (217, 256), kernel), FACES)


def test_each_image_is_blurred_by_its_own_sigma_as_by_opencv():
    sigmas = (0.0, 0.7, 2.5)

    blurred = array(stored(gaussian_blur(FACES, torch.tensor(sigmas))))

    assert np.array_equal(blurred[0], PICTURES[0])
    for i in (1, 2):
        assert furthest(blurred[i], cv2.GaussianBlur(PICTURES[i], (0, 0), sigmas[i])) <= 1


def test_motion_blurs_along_its_angle_only():
    stripes = torch.zeros(3, 3, 64, 64)
    stripes[..., ::8] = 255  # upright lines

    along, across, still = motion_blur(stripes, torch.tensor([6.0, 6.0, 0.0]), torch.tensor([90.0, 0.0, 45.0]))

    assert torch.allclose(along, stripes[0], atol=1e-2)
    assert torch.allclose(still, stripes[0], atol=1e-2)
    assert across[:, :, 8:56].std() < 0.25 * stripes.std()


def test_motion_turns_counter_clockwise_and_keeps_the_place_and_the_light():
    dot = torch.zeros(1, 3, 65, 65)
    dot[..., 32, 32] = 255

    smeared = motion_blur(dot, 16.0, 45.0)[0, 0]

    y, x = torch.meshgrid(torch.arange(65.0), torch.arange(65.0), indexing="ij")
    assert smeared.sum() == pytest.approx(255, rel=1e-3)
    assert (smeared * y).sum() / smeared.sum() == pytest.approx(32, abs=0.01)
    assert (smeared * x).sum() / smeared.sum() == pytest.approx(32, abs=0.01)
    assert smeared[27, 37] > 100 * smeared[37, 37].abs()  # up to the right, not down to the right


def test_low_light_darkens_by_its_gain_and_gamma():
    dark = low_light(grey(51, n=2), torch.tensor([0.5, 0.5]), torch.tensor([1.0, 2.0]))

    assert dark[0].mean() == pytest.approx(25.5, abs=1e-3)
    assert dark[1].mean() == pytest.approx(0.5 * 255 * 0.2**2, abs=1e-3)


def test_noise_has_the_sigma_asked_for_of_each_image():
    noisy = sensor_noise(grey(128, n=3), generators(0), torch.tensor([0.0, 5.0, 30.0]))

    assert torch.equal(noisy[0], grey(128)[0])
    assert noisy[1].std() == pytest.approx(5, rel=0.02)
    assert noisy[2].std() == pytest.approx(30, rel=0.02)


def test_grey_noise_is_the_same_in_all_colours_and_other_noise_is_not():
    noisy = sensor_noise(grey(128, n=2), generators(0), 10.0, grey=torch.tensor([True, False]))

    assert torch.equal(noisy[0, 0], noisy[0, 2])
    assert abs(np.corrcoef(noisy[1, [0, 2]].flatten(1).numpy())[0, 1]) < 0.02


def test_shot_noise_grows_with_the_root_of_the_signal():
    noise = [sensor_noise(grey(level), generators(0), 0.0, shot=20.0).std().item() for level in (0, 50, 200)]

    assert noise[0] == 0
    assert noise[1] == pytest.approx(20 * (50 / 255) ** 0.5, rel=0.02)
    assert noise[2] == pytest.approx(2 * noise[1], rel=0.02)


def test_uniform_noise_only_adds_and_reaches_its_top():
    noisy = uniform_noise(grey(100), generators(0), 30.0)

    assert (noisy.min(), noisy.max()) == (100, 130)
    assert noisy.mean() == pytest.approx(115, abs=0.1)


@pytest.mark.parametrize("quality", [30, 40, 50, 60, 75, 85, 95])
@pytest.mark.parametrize(("shape", "apart", "close"), [((256, 217), 0.1, 48), ((61, 43), 0.2, 45), ((12, 9), 2, 38)])
def test_jpeg_damages_as_the_real_codec_does(shape, apart, close, quality):
    faces = [np.ascontiguousarray(picture[: shape[0], : shape[1]]) for picture in PICTURES]

    coded = array(jpeg(tensor(*faces), quality))

    for ours, face in zip(coded, faces, strict=True):
        for theirs in (by_opencv(face, quality), by_pillow(face, quality)):
            assert psnr(ours, face) == pytest.approx(psnr(theirs, face), abs=apart)  # dB
            assert psnr(ours, theirs) > close


def test_each_image_gets_its_own_jpeg_and_one_of_quality_0_none():
    coded = array(jpeg(FACES, torch.tensor([0, 90, 10])))

    assert np.array_equal(coded[0], PICTURES[0])
    assert psnr(coded[1], by_opencv(PICTURES[1], 90)) > 50
    assert psnr(coded[2], by_opencv(PICTURES[2], 10)) > 50


def test_stronger_h264_does_more_damage_and_keeps_the_place():
    by_crf = [[psnr(a, b) for a, b in zip(array(h264(FACES, generators(0), crf=crf)), PICTURES, strict=True)]
              for crf in (18, 28, 38)]  # fmt: skip

    assert min(by_crf[0]) > 30
    assert all(a > b > c for a, b, c in zip(*by_crf, strict=True))


def test_h264_keeps_the_order_of_any_number_of_faces_of_an_odd_size():
    faces = torch.stack([torch.full((3, 19, 21), 20.0 * i) for i in range(7)])

    coded = h264(faces, generators(0), crf=18)

    assert coded.shape == faces.shape
    assert (coded - faces)[..., 4:-4, 4:-4].abs().max() <= 6


def test_without_noise_sgens_low_side_is_opencvs_cubic():
    low = array(sgen(FACES, generators(0), sigma=0))

    assert low.shape == (3, 64, 54, 3)
    for ours, picture in zip(low, PICTURES, strict=True):
        assert furthest(ours, cv2.resize(picture, (54, 64), interpolation=cv2.INTER_CUBIC)) <= 1


def test_sgens_noise_is_what_the_protocol_says():
    fixed = sgen(grey(128, n=8, side=400), generators(0))
    ranged = sgen(grey(128, n=64, side=256), generators(0), sigma=(0, 50)).std(dim=(1, 2, 3))
    uniform = sgen(grey(100, side=400), generators(0), kind="uniform")

    assert fixed.std() == pytest.approx(30, rel=0.02)
    assert ranged.min() < 5 and 43 < ranged.max() < 51 and ranged.mean() == pytest.approx(25, abs=5)
    assert (uniform.min(), uniform.max()) == (100, 130)


@pytest.mark.parametrize("scale", [4, 8])
def test_sisns_low_side_is_pillows_bicubic(scale):
    low = array(sisn(FACES, scale=scale))

    for ours, picture in zip(low, PICTURES, strict=True):
        assert furthest(ours, bicubic_of_pillow(picture, (217 // scale, 256 // scale))) <= 1


def test_scgans_low_side_is_worse_the_more_of_each_damage_it_gets():
    faces = resize(FACES, (64, 64), "area").repeat(4, 1, 1, 1)
    none = {"blur": (0, 0), "noise": (0, 0), "quality": (100, 100)}
    clean = array(scgan(faces, generators(0), **none))

    def harm(**damage: tuple[float, float]) -> float:
        return -psnr(array(scgan(faces, generators(0), **none | damage)), clean)

    assert clean.shape == (12, 16, 16, 3)
    assert harm(blur=(0.5, 0.5)) < harm(blur=(2.5, 2.5)) < harm(blur=(8, 8))
    assert harm(noise=(1, 1)) < harm(noise=(15, 15)) < harm(noise=(25, 25))
    assert harm(quality=(95, 95)) < harm(quality=(40, 40))


def test_scgans_blur_grows_with_the_face():
    small = resize(FACES, (64, 64), "area")
    large = resize(FACES, (128, 128), "area")
    settings = {"noise": (0, 0), "quality": (100, 100), "blur": (2.5, 2.5)}

    low_of_small = scgan(small, generators(0), factor=4, **settings)
    low_of_large = scgan(large, generators(0), factor=8, **settings)

    assert psnr(array(low_of_small), array(low_of_large)) > 35


def test_faces_of_several_scales_share_gfrnets_batch_without_touching_each_other():
    scales = torch.tensor([1.0, 2.7, 8.0])
    none = torch.zeros(3)

    restored = array(_gfrnet(FACES, generators(0), blur=none, scale=scales, noise=none, quality=none, kernel="pillow"))
    coded = array(
        _gfrnet(FACES, generators(0), blur=none, scale=scales, noise=none, quality=none + 25, kernel="pillow")
    )

    for i, scale in enumerate(scales.tolist()):
        low = bicubic_of_pillow(PICTURES[i], (round(217 / scale), round(256 / scale)))
        assert furthest(restored[i], bicubic_of_pillow(low, (217, 256))) <= 1
        assert psnr(coded[i], bicubic_of_pillow(by_pillow(low, 25), (217, 256))) > 45


def test_gfrnet_draws_its_noise_for_the_small_face():
    grey_faces = grey(128, n=3, side=96)
    none = torch.zeros(3)

    noisy = _gfrnet(grey_faces, generators(0), blur=none, scale=torch.tensor([1.0, 2.0, 6.0]), noise=none + 7,
                    quality=none, kernel="pillow")  # fmt: skip

    assert noisy[0].std() == pytest.approx(7, rel=0.02)
    steps = (noisy[..., 1:] - noisy[..., :-1]).std(dim=(1, 2, 3))
    assert steps[0] > 2 * steps[1] > 4 * steps[2]


def test_gfrnet_does_all_of_its_sets_and_the_scale_asked_for():
    faces = stored(resize(FACES, (48, 64), "area")).repeat(16, 1, 1, 1)
    truth = array(faces)

    drawn, fixed = array(gfrnet(faces, generators(0))), array(gfrnet(faces, generators(0), scale=8))

    left = [psnr(a, b) for a, b in zip(drawn, truth, strict=True)]
    assert drawn.shape == truth.shape
    assert max(left) - min(left) > 6
    assert psnr(fixed, truth) < psnr(drawn, truth) - 1


@pytest.mark.parametrize("factor", [1, 2, 4, 8])
@pytest.mark.parametrize("kernel", SHRINKING)
def test_an_undamaged_face_is_only_shrunk(kernel, factor):
    low = surveillance(FACES, Damage.same(3, kernel=kernel), generators(0), factor=factor)

    expected = stored(resize(FACES, (217 // factor, 256 // factor), kernel))
    assert furthest(array(low), array(expected)) <= 1


def test_the_recognition_protocol_is_a_fixed_damage():
    faces = [picture[:192, :192] for picture in PICTURES]
    lows = [bicubic_of_pillow(np.ascontiguousarray(face), (24, 24)) for face in faces]

    damage = Damage.same(3, kernel="pillow", noise=10, quality=40)
    low = array(surveillance(tensor(*faces), damage, generators(0), factor=8))

    for ours, face in zip(low, lows, strict=True):
        noisy = np.clip(np.rint(face + np.random.default_rng(0).normal(0, 10, face.shape)), 0, 255).astype(np.uint8)
        assert psnr(ours, face) == pytest.approx(psnr(by_pillow(noisy, 40), face), abs=1)


def test_each_damage_harms():
    plain = Damage.same(3)
    clean = array(surveillance(FACES, plain, generators(0), factor=2))
    harms = {
        "motion": torch.full((3,), 4.0),
        "blur": torch.full((3,), 1.0),
        "gain": torch.full((3,), 0.5),
        "gamma": torch.full((3,), 1.3),
        "noise": torch.full((3,), 10.0),
        "shot": torch.full((3,), 10.0),
        "quality": torch.full((3,), 40),
        "crf": 35,
    }

    for name, value in harms.items():
        low = array(surveillance(FACES, replace(plain, **{name: value}), generators(0), factor=2))
        assert psnr(low, clean) < 36, name


def test_what_a_face_suffers_does_not_depend_on_its_neighbours():
    damage = Damage(
        motion=torch.tensor([0.0, 5.0, 2.0]),
        angle=torch.tensor([0.0, 30.0, 100.0]),
        blur=torch.tensor([1.2, 0.0, 0.4]),
        kernel=torch.tensor([3, 1, 0]),
        gain=torch.tensor([0.5, 1.0, 0.8]),
        gamma=torch.tensor([1.2, 1.0, 1.0]),
        noise=torch.zeros(3),
        shot=torch.zeros(3),
        grey=torch.zeros(3, dtype=torch.bool),
        quality=torch.tensor([0, 95, 80]),
        crf=None,
    )

    together = array(surveillance(FACES, damage, generators(0), factor=2))

    for i in range(3):
        own = Damage(*(getattr(damage, f.name)[i : i + 1] for f in fields(Damage)[:-1]), None)
        alone = array(surveillance(FACES[i : i + 1], own, generators(0), factor=2))
        assert psnr(together[i], alone[0]) > 45


@pytest.mark.parametrize("factor", [1, 4])
def test_seed_and_step_fix_the_damage(factor):
    def damaged(*key: int) -> Tensor:
        draws = generators(*key)
        return surveillance(FACES, draw_damage(3, draws), draws, factor=factor)

    for step in range(6):  # with and without H.264
        assert torch.equal(damaged(5, step), damaged(5, step))
    assert not torch.equal(damaged(5, 0), damaged(5, 1))
    assert not torch.equal(damaged(5, 0), damaged(6, 0))


def test_the_papers_damages_are_fixed_by_their_key_too():
    for paper in (sgen, scgan, gfrnet):
        assert torch.equal(paper(FACES, generators(1, 2)), paper(FACES, generators(1, 2)))
        assert not torch.equal(paper(FACES, generators(1, 2)), paper(FACES, generators(1, 3)))


def test_the_draws_are_spread_as_promised():
    drawn = [draw_damage(8, generators(0, step)) for step in range(800)]
    every = {f.name: torch.cat([getattr(d, f.name) for d in drawn]) for f in fields(Damage)[:-1]}
    by_h264 = [d.crf for d in drawn if d.crf is not None]

    def share(mask: Tensor) -> float:
        return mask.float().mean().item()

    level = (every["noise"] ** 2 + every["shot"] ** 2 / 2).sqrt()  # at middle grey
    assert share((every["blur"] > 0) | (every["motion"] > 0)) == pytest.approx(0.5, abs=0.02)
    assert share((every["blur"] > 0) & (every["motion"] > 0)) == 0
    assert share(level > 0) == pytest.approx(0.85, abs=0.02)
    assert level.max() <= 30 and level.median() == pytest.approx(30 * (0.35 / 0.85) ** 1.5, rel=0.1)
    assert share(every["shot"] > 0) == pytest.approx(0.3 * 0.85, abs=0.02)
    assert share(every["gain"] < 1) == pytest.approx(0.15, abs=0.02)
    assert share(every["quality"] > 0) == pytest.approx(0.25, abs=0.03)
    assert every["quality"][every["quality"] > 0].min() == 30 and every["quality"].max() == 95
    assert len(by_h264) / 800 == pytest.approx(0.25, abs=0.05)
    assert min(by_h264) == 18 and max(by_h264) == 42
    assert torch.bincount(every["kernel"]).tolist() == pytest.approx([1600] * 4, rel=0.1)
    assert all(not d.quality.any() for d in drawn if d.crf is not None)


def test_shares_say_how_often_each_damage_is_drawn():
    none = Shares(blur=0, low_light=0, noise=0, shot=0, jpeg=0, h264=0)
    spared = [draw_damage(8, generators(0, step), none) for step in range(20)]
    assert not any((d.blur > 0).any() or (d.motion > 0).any() or (d.gain < 1).any() for d in spared)
    assert not any(d.noise.any() or d.shot.any() or d.quality.any() or d.crf for d in spared)

    mostly_jpeg = [draw_damage(8, generators(0, step), Shares(jpeg=0.65, h264=0.15)) for step in range(400)]
    assert np.mean([d.quality.bool().numpy() for d in mostly_jpeg]) == pytest.approx(0.65, abs=0.04)
    assert np.mean([d.crf is not None for d in mostly_jpeg]) == pytest.approx(0.15, abs=0.05)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_on_a_gpu_the_same_is_done():
    damage = replace(draw_damage(3, generators(3)), noise=torch.zeros(3), shot=torch.zeros(3), crf=None)

    on_cpu = surveillance(FACES, damage, generators(3), factor=2)
    on_gpu = surveillance(FACES.cuda(), damage, generators(3, device="cuda"), factor=2)

    assert on_gpu.is_cuda
    assert psnr(array(on_gpu.cpu()), array(on_cpu)) > 50
