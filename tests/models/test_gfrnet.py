import math

import pytest

torch = pytest.importorskip("torch", reason="the extra train is not installed")

from dataclasses import replace  # noqa: E402

from torch.nn import functional as F  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

from models.gfrnet import (  # noqa: E402
    PRESETS,
    VARIANTS,
    Gfrnet,
    GfrnetConfig,
    GfrnetDiscriminatorConfig,
    GfrnetDiscriminators,
    PatchDiscriminator,
    details,
    identity_flow,
    warp,
)
from models.gfrnet_losses import (  # noqa: E402
    WEIGHTS,
    GfrnetObjective,
    GuidedBatch,
    LossWeights,
    Schedule,
    adversarial_loss,
    discriminator_loss,
    landmark_crops,
    landmark_loss,
    located,
    pixel_loss,
    total_variation,
)

PAPER = GfrnetConfig(base=4, cap=8, depth=3)
MODERN = replace(PRESETS["small"], base=4, cap=8, depth=3, smooth=1, trust=1.0)
BOTH = pytest.mark.parametrize("full", [PAPER, MODERN], ids=["paper", "modern"])
CAPS = [1024, 512, 256]


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def image(n: int = 2, height: int = 32, width: int = 48) -> torch.Tensor:
    return torch.rand(n, 3, height, width) * 2 - 1


def count(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def parameters(config: GfrnetConfig) -> int:
    with torch.device("meta"):
        return count(Gfrnet(config))


def gmac(config: GfrnetConfig) -> float:
    """Multiplications of a face of 256 px, in thousands of millions."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        Gfrnet(config).eval()(torch.zeros(1, 3, 256, 256), torch.zeros(1, 3, 256, 256))
    return counter.get_total_flops() / 2e9


def shake(*modules: torch.nn.Module) -> None:
    """Make weights that begin as nothing count."""
    for parameter in (p for module in modules for p in module.parameters()):
        torch.nn.init.normal_(parameter, 0, 0.1)


def network(config: GfrnetConfig) -> Gfrnet:
    """An untrained network in which every part does something."""
    made = Gfrnet(config).eval()
    shake(made)
    return made


def batch(**changes: torch.Tensor) -> GuidedBatch:
    spots = torch.tensor([[[4.0, 3], [20, 5], [11, 12], [6, 18], [21, 19]]]).expand(2, -1, -1)
    made = GuidedBatch(image(), image(), image(), spots, spots + 2)
    return replace(made, **changes)


def objective(weights: LossWeights) -> GfrnetObjective:
    judges = GfrnetDiscriminators(GfrnetDiscriminatorConfig(base=4))
    return GfrnetObjective(weights, perceptual=F.l1_loss, discriminators=judges)


# Size


@pytest.mark.parametrize(
    ("cap", "name", "expected"),
    [
        (1024, "Full", 290_657_285),
        (1024, "-F", 290_657_285),
        (1024, "R", 290_657_285),
        (1024, "-W", 167_678_467),
        (1024, "-WG", 167_675_395),
        (1024, "-W2", 670_639_107),
        (1024, "-WG2", 670_632_963),
        (512, "Full", 93_505_541),
        (512, "-W", 54_422_531),
        (512, "-WG", 54_419_459),
        (512, "-W2", 217_634_819),
        (512, "-WG2", 217_628_675),
        (256, "Full", 28_481_029),
    ],
)
def test_every_variant_has_the_parameters_of_the_specification(cap, name, expected):
    assert parameters(VARIANTS[name].config(replace(PRESETS["paper"], cap=cap))) == expected


@pytest.mark.parametrize(("cap", "expected"), [(1024, 122_978_818), (512, 39_083_010)])
def test_warpnet_has_the_parameters_of_the_specification(cap, expected):
    with torch.device("meta"):
        assert count(Gfrnet(GfrnetConfig(cap=cap)).warp_net) == expected


@pytest.mark.parametrize(("cap", "expected"), [(1024, 12.818), (512, 10.167), (256, 7.491)])
def test_the_papers_network_costs_what_the_specification_says(cap, expected):
    assert gmac(GfrnetConfig(cap=cap)) == pytest.approx(expected, abs=0.001)


def test_the_modern_presets_fit_into_what_may_ship_and_into_two_cores():
    for preset in ("default", "small"):
        assert 2 * parameters(PRESETS[preset]) <= 16 * 2**20
    assert gmac(PRESETS["default"]) < 7.491  # of the paper's, with the narrowest cap
    assert 1 <= gmac(PRESETS["small"]) <= 3


# Every variant


@BOTH
@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_keeps_the_size_and_every_weight_learns(full, name):
    made = Gfrnet(VARIANTS[name].config(full))
    shake(made)

    guided = made.parts(image(), image())
    guided.restored.square().mean().backward()

    assert guided.restored.shape == (2, 3, 32, 48)
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in made.parameters())


@BOTH
@pytest.mark.parametrize("depth", [2, 4])
@pytest.mark.parametrize("times", [(1, 1), (2, 1), (1, 3)])
def test_any_size_will_do_that_the_halvings_divide(full, depth, times):
    config = replace(full, depth=depth)
    size = tuple(n * config.multiple for n in times)
    made = network(config)

    guided = made.parts(image(1, *size), image(1, *size))

    # our WarpNet sees half the size, and the guide's details want 16
    assert config.multiple == (max(16, 2 ** (depth + 1)) if full is MODERN else 2**depth)
    assert guided.restored.shape == guided.warped.shape == (1, 3, *size)
    assert guided.flow.shape == (1, 2, *size)


@BOTH
def test_full_shows_the_warped_guide(full):
    made = network(full)
    degraded, guide = image(), image()
    before = made.parts(degraded, guide)

    shake(made.warp_net)
    after = made.parts(degraded, guide)

    assert torch.equal(before.warped, warp(guide, before.flow))
    assert not torch.equal(before.warped, after.warped)
    assert not torch.allclose(before.restored, after.restored)


@BOTH
@pytest.mark.parametrize("name", ["-W", "-W2"])
def test_without_warpnet_the_guide_is_shown_as_it_is(full, name):
    made = network(VARIANTS[name].config(full))
    degraded, guide = image(), image()

    guided = made.parts(degraded, guide)

    assert made.warp_net is None
    assert guided.flow is None
    assert guided.warped is guide
    assert torch.equal(guided.restored, made.rec_net(degraded, guide)[0])
    assert not torch.allclose(guided.restored, made(degraded, image()))
    with pytest.raises(ValueError, match="no WarpNet"):
        made.flow(degraded, guide)


@BOTH
@pytest.mark.parametrize("name", ["-WG", "-WG2"])
def test_without_a_guide_the_guide_is_not_looked_at(full, name):
    made = network(VARIANTS[name].config(full))
    degraded = image()

    guided = made.parts(degraded, image())

    assert torch.equal(guided.restored, made(degraded, torch.full_like(degraded, torch.nan)))
    assert not torch.allclose(guided.restored, made(image(), image()))
    assert guided.warped is guided.flow is guided.mask is None


@BOTH
def test_the_doubled_variants_are_four_times_as_heavy(full):
    for single, double in (("-W", "-W2"), ("-WG", "-WG2")):
        one, two = (parameters(VARIANTS[name].config(replace(full, base=32, cap=64))) for name in (single, double))
        assert two / one == pytest.approx(4, rel=0.06)


def test_f_and_r_are_full_in_their_network_and_differ_in_training_and_test():
    assert VARIANTS["-F"].config(PAPER) == VARIANTS["R"].config(PAPER) == VARIANTS["Full"].config(PAPER) == PAPER
    assert [name for name, variant in VARIANTS.items() if not variant.flow_loss] == ["-F"]
    assert [name for name, variant in VARIANTS.items() if variant.stranger] == ["R"]


@BOTH
@pytest.mark.parametrize("reaches", [True, False])
def test_the_restored_face_teaches_warpnet_unless_that_is_off(full, reaches):
    made = Gfrnet(replace(full, warp_grad=reaches))
    shake(made)

    made(image(), image()).square().mean().backward()

    taught = [p.grad is not None and bool(p.grad.abs().sum() > 0) for p in made.warp_net.parameters()]
    assert any(taught) if reaches else not any(taught)
    assert all(p.grad is not None for p in made.rec_net.parameters())


@BOTH
@pytest.mark.parametrize("norm", ["batch", "instance"])
def test_a_face_is_restored_as_it_would_be_alone(full, norm):
    made = network(full if full.design == "modern" else replace(full, norm=norm))
    degraded, guide = image(), image()

    together = made(degraded, guide)
    alone = torch.cat([made(degraded[k : k + 1], guide[k : k + 1]) for k in range(2)])

    assert torch.allclose(together, alone, atol=1e-5)


def test_the_batch_of_1_of_the_paper_trains_and_is_normalised_as_in_the_test():
    made = network(replace(PAPER, dropout=0.0))
    degraded, guide = image(1, 8, 8), image(1, 8, 8)  # to 1x1, where nothing may be normalised

    assert torch.allclose(made.train()(degraded, guide), made.eval()(degraded, guide), atol=1e-6)


def test_dropout_is_of_training_alone():
    made = network(PAPER)
    degraded, guide = image(), image()

    assert torch.equal(made(degraded, guide), made(degraded, guide))
    assert not torch.equal(made.train()(degraded, guide), made(degraded, guide))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"base": 0}, "base 0"),
        ({"base": 64, "cap": 32}, "cap is not below it"),
        ({"depth": 1}, "depth 1"),
        ({"widen": 0}, "widen 0"),
        ({"dropout": 1.0}, "dropout 1.0"),
        ({"guide": False}, "warp without guide"),
        ({"blocks": 2}, "the paper's design has none"),
        ({"smooth": 4}, "an odd number of pixels"),
        ({"trust": 0.0}, "above 0 and at most 1"),
        ({"smooth": 5}, "are the modern design's"),
        ({"trust": 0.5}, "are the modern design's"),
        ({"design": "modern"}, "the modern design wants"),
        ({"design": "modern", "blocks": 1, "norm": "none"}, "the modern design wants"),
    ],
)
def test_a_config_that_cannot_be_is_refused_in_a_line(changes, told):
    with pytest.raises(ValueError, match=told) as refused:
        GfrnetConfig(**changes)
    assert "\n" not in str(refused.value)


# Flow and mask


@pytest.mark.parametrize("preset", ["default", "small"])
def test_untrained_the_modern_presets_leave_the_guide_and_the_face_as_they_are(preset):
    degraded, guide = image(1, 64, 128), image(1, 64, 128)

    guided = Gfrnet(replace(PRESETS[preset], base=4, cap=8)).parts(degraded, guide)

    assert torch.equal(guided.flow, identity_flow(guided.flow))
    assert torch.allclose(guided.warped, guide, atol=1e-4)
    assert torch.equal(guided.restored, degraded)
    assert torch.allclose(guided.mask, torch.tensor(0.9 * PRESETS[preset].trust))


@pytest.mark.parametrize(("right", "down"), [(5, 0), (0, -3), (-7, 4)])
def test_a_correction_by_whole_pixels_shifts_the_guide_by_them(right, down):
    made = Gfrnet(MODERN)
    guide = image()
    finest = made.warp_net.corrections[0]
    finest.bias.data = torch.tensor([right * 2 / 47, down * 2 / 31]) / made.warp_net.reach

    warped = made.parts(image(), guide).warped

    inner = warped[:, :, 8:-8, 8:-8]
    assert torch.allclose(inner, guide[:, :, 8 + down : 24 + down, 8 + right : 40 + right], atol=1e-4)


@pytest.mark.parametrize(("x", "y"), [(0, 0), (47, 31), (9, 17)])
def test_the_flow_of_the_paper_is_absolute(x, y):
    made = Gfrnet(PAPER)
    guide = image()
    torch.nn.init.zeros_(made.warp_net.last.weight)
    to = torch.tensor([x * 2 / 47 - 1, y * 2 / 31 - 1])
    made.warp_net.last.bias.data = torch.atanh(to.clamp(-1 + 1e-6, 1 - 1e-6))

    warped = made.parts(image(), guide).warped

    assert torch.allclose(warped, guide[:, :, y, x, None, None].expand_as(warped), atol=1e-4)


def test_every_level_corrects_what_the_coarser_ones_found():
    made = Gfrnet(MODERN)
    for correction in made.warp_net.corrections:
        correction.bias.data = torch.tensor([0.1, -0.05]) / made.warp_net.reach

    flow = made.flow(image(), image())

    assert len(made.warp_net.corrections) == MODERN.depth - 1 == 2
    assert torch.allclose(flow - identity_flow(flow), torch.tensor([0.2, -0.1])[:, None, None], atol=1e-6)


def test_a_smooth_flow_bends_a_guide_as_a_whole():
    rough, smooth = (Gfrnet(replace(MODERN, smooth=side)) for side in (1, 5))
    shake(rough.warp_net)
    smooth.load_state_dict(rough.state_dict())
    degraded, guide = image(1, 96, 96), image(1, 96, 96)

    bent = {}
    for name, made in {"rough": rough, "smooth": smooth}.items():
        flow = made.flow(degraded, guide)
        bent[name] = flow - identity_flow(flow)

    # the same correction on the whole, with next to nothing of its changes from place to place
    assert torch.allclose(bent["rough"].mean(dim=(2, 3)), bent["smooth"].mean(dim=(2, 3)), rtol=0.3)
    steps = {name: each.diff(dim=3).square().mean() for name, each in bent.items()}
    assert steps["smooth"] < 0.1 * steps["rough"]


def test_a_smooth_flow_leaves_a_shift_what_it_is_up_to_the_edge():
    made = Gfrnet(replace(MODERN, smooth=5))
    made.warp_net.corrections[0].bias.data = torch.tensor([0.1, -0.05]) / made.warp_net.reach

    flow = made.flow(image(), image())

    assert torch.allclose(flow - identity_flow(flow), torch.tensor([0.1, -0.05])[:, None, None], atol=1e-6)


@pytest.mark.parametrize("trust", [0.5, 0.8])
def test_a_guide_counts_as_far_as_it_is_trusted(trust):
    made, wary = (Gfrnet(replace(MODERN, trust=each)).eval() for each in (1.0, trust))
    shake(made)
    torch.nn.init.zeros_(made.rec_net.stem[1].weight)  # all that comes of the guide is its own detail
    wary.load_state_dict(made.state_dict())
    degraded, guide = image(), image()

    parts, less = made.parts(degraded, guide), wary.parts(degraded, guide)

    assert torch.allclose(less.mask, trust * parts.mask)
    assert torch.equal(less.warped, parts.warped)
    grey = torch.zeros_like(guide)  # has no detail
    without = made(degraded, grey)
    assert not torch.allclose(parts.restored, without)
    assert torch.allclose(less.restored - without, trust * (parts.restored - without), atol=1e-5)


def test_behind_a_closed_mask_the_guide_does_not_count():
    made = network(MODERN)
    degraded = image()
    closed, mask = made.rec_net, made.rec_net.mask
    torch.nn.init.zeros_(mask.last.weight)
    torch.nn.init.constant_(mask.last.bias, -1e9)

    first, second = made.parts(degraded, image()), made.parts(degraded, image())

    assert first.mask.shape == (2, 1, 32, 48) and not first.mask.any()
    assert not torch.equal(first.warped, second.warped)
    assert torch.equal(first.restored, second.restored)

    torch.nn.init.constant_(mask.last.bias, 0)
    assert not torch.allclose(closed(degraded, image())[0], closed(degraded, image())[0])


def test_the_details_of_a_guide_are_what_its_means_lack():
    guide = image(1, 64, 48)

    fine, coarse = details(guide)

    assert fine.shape == coarse.shape == guide.shape
    means = F.interpolate(F.avg_pool2d(guide, 16), scale_factor=16.0, mode="bilinear")
    assert torch.allclose(fine + coarse, guide - means, atol=1e-6)
    assert all(band.abs().max() < 1e-6 for band in details(torch.full((1, 3, 32, 32), 0.3)))


def test_the_detail_of_a_guide_is_added_as_far_as_the_network_says_and_the_mask_lets_it():
    made = network(MODERN)
    degraded, guide = image(), image()
    last = made.rec_net.last
    torch.nn.init.zeros_(last.weight)
    last.bias.data = torch.cat([torch.zeros(12), torch.full((4,), 0.5), torch.zeros(4)])  # of the fine detail

    parts = made.parts(degraded, guide)

    wanted = degraded + 0.5 * parts.mask * details(parts.warped)[0]
    assert torch.allclose(parts.restored, wanted, atol=1e-5)


def test_while_it_is_held_open_a_mask_is_1_everywhere():
    made = network(MODERN)
    torch.nn.init.constant_(made.rec_net.mask.last.bias, -1e9)
    degraded, guide = image(), image()
    shut = made.parts(degraded, guide).mask

    made.rec_net.held_open = True

    assert shut.max() < 1e-6
    assert torch.equal(made.parts(degraded, guide).mask, torch.ones(2, 1, 32, 48))


def test_a_mask_that_is_all_but_shut_still_learns():
    """A sigmoid's gradient would be below 1e-13 here."""
    made = network(MODERN)
    mask = made.rec_net.mask
    torch.nn.init.constant_(mask.last.bias, -40)
    degraded, guide = image(), image()

    parts = made.parts(degraded, guide)
    (parts.mask * guide).square().sum().backward()

    assert 0 < parts.mask.max() < 0.05
    assert mask.last.bias.grad.abs() > 1e-3


def test_the_mask_is_seen_of_the_degraded_face_and_of_the_warped_guide():
    made = network(MODERN)
    degraded, guide = image(), image()
    mask = made.parts(degraded, guide).mask

    assert ((mask > 0) & (mask < 1)).all()
    assert not torch.allclose(mask, made.parts(image(), guide).mask)
    assert torch.equal(mask, made.rec_net.mask(degraded, made.parts(degraded, guide).warped))


# Losses


def turned(flow: torch.Tensor, matrix: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """The flow to matrix @ p + shift, in the unit of flows."""
    return torch.einsum("ij,njhw->nihw", matrix, identity_flow(flow)) + shift[:, None, None]


def test_the_landmark_loss_of_the_true_flow_is_0_also_between_pixels():
    matrix, shift = torch.tensor([[0.8, 0.2], [-0.2, 0.7]]), torch.tensor([0.1, -0.05])
    extent = torch.tensor([47.0, 31.0])
    places = torch.rand(2, 9, 2) * 2 - 1
    to_pixels = [(points + 1) / 2 * extent for points in (places, places @ matrix.T + shift)]
    flow = turned(torch.zeros(2, 2, 32, 48), matrix, shift).expand(2, -1, -1, -1)

    assert landmark_loss(flow, *to_pixels).item() == pytest.approx(0, abs=1e-9)
    assert landmark_loss(flow, *reversed(to_pixels)).item() > 0.1


def test_the_landmark_loss_is_the_papers_sum_over_68_points():
    landmarks = torch.rand(1, 68, 2) * torch.tensor([47.0, 31.0])
    flow = identity_flow(torch.zeros(1, 2, 32, 48))

    loss = landmark_loss(flow, landmarks, landmarks + torch.tensor([47.0 / 20, 0]))

    assert loss.item() == pytest.approx(68 * 0.1**2, rel=1e-4)


def test_landmarks_that_are_not_known_do_not_count():
    flow = (identity_flow(torch.zeros(1, 2, 32, 48)) + 0.1).expand(3, -1, -1, -1).clone().requires_grad_()
    landmarks = torch.rand(3, 5, 2) * 20
    unknown, other = landmarks.clone(), landmarks.clone()
    unknown[0, 1:] = torch.nan
    unknown[1] = torch.nan
    other[2, 0] = torch.nan
    landmarks[2, 3] = torch.tensor([200.0, 0])  # outside the image; would be far off

    loss = landmark_loss(flow, torch.where(unknown.isnan(), unknown, landmarks), other)
    loss.backward()

    assert loss.item() == pytest.approx(68 * 0.02, rel=1e-4)
    assert torch.isfinite(flow.grad).all() and not flow.grad[1].any()
    assert landmark_loss(flow, torch.full_like(landmarks, torch.nan), landmarks).item() == 0


def test_a_few_steps_bring_the_landmarks_nearer():
    made = Gfrnet(MODERN)
    given, alone = batch(), objective(WEIGHTS["modern"])
    optimiser = torch.optim.Adam(made.parameters(), 1e-2)
    losses = []

    for _ in range(8):
        learned = alone.restorer(made, given, "warp")
        optimiser.zero_grad()
        learned.total.backward()
        optimiser.step()
        losses.append(learned.terms["landmark"].item())

    assert losses[0] == pytest.approx(68 * ((4 / 47) ** 2 + (4 / 31) ** 2), rel=1e-4)
    assert losses[-1] < 0.5 * losses[0]


def test_the_variation_of_the_paper_is_of_the_flow_and_ours_of_what_the_identity_lacks():
    identity = identity_flow(torch.zeros(1, 2, 32, 48))
    wider = turned(identity, torch.tensor([[1.1, 0], [0, 1.0]]), torch.zeros(2))

    assert total_variation(torch.full_like(identity, 0.3), of="absolute").item() == 0
    assert total_variation(identity, of="absolute").item() == pytest.approx((2 / 47) ** 2 + (2 / 31) ** 2, rel=1e-4)
    assert total_variation(identity + 0.3, of="residual").item() == pytest.approx(0, abs=1e-9)
    assert total_variation(wider, of="residual").item() == pytest.approx(0.1**2, rel=1e-3)


def test_the_pixel_loss_is_that_of_images_from_0_to_1():
    restored, clean = image(), image()

    assert pixel_loss(restored, clean).item() == pytest.approx(
        F.mse_loss((restored + 1) / 2, (clean + 1) / 2).item(), rel=1e-5
    )


def test_the_landmarks_box_is_cut_to_its_outermost_pixels():
    picture = image(2, 20, 30)
    landmarks = torch.tensor([[[4.0, 3], [11, 6], [7, 10], [8, 5]], [[20, 2], [13, 9], [torch.nan, 0], [16, 4]]])

    crops = landmark_crops(picture, landmarks, side=8)

    assert torch.allclose(crops[0], picture[0, :, 3:11, 4:12], atol=1e-5)
    assert torch.allclose(crops[1], picture[1, :, 2:10, 13:21], atol=1e-5)
    assert located(torch.stack([landmarks[1], torch.full((4, 2), torch.nan)])).tolist() == [True, False]


# Discriminators


def test_a_discriminator_has_the_parameters_and_the_patches_of_the_specification():
    with torch.device("meta"):
        made = PatchDiscriminator(GfrnetDiscriminatorConfig())
        face = torch.zeros(1, 3, 256, 256)

        assert count(made) == 2_772_673
        assert made(face, face, face).shape == (1, 1, 30, 30)


@pytest.mark.parametrize("norm", ["batch", "spectral"])
def test_the_discriminators_judge_under_conditions(norm):
    judge = PatchDiscriminator(GfrnetDiscriminatorConfig(base=4, norm=norm)).eval()
    degraded, guide, face = image(2, 32, 32), image(2, 32, 32), image(2, 32, 32)
    logits = judge(degraded, guide, face)

    for others in ((image(2, 32, 32), guide, face), (degraded, face, face), (degraded, guide, guide)):
        assert not torch.allclose(judge(*others), logits)
    assert torch.allclose(judge(degraded[:1], guide[:1], face[:1]), logits[:1], atol=1e-5)


def test_a_discriminator_without_the_guide_does_not_look_at_it():
    judge = PatchDiscriminator(GfrnetDiscriminatorConfig(base=4, guide=False)).eval()
    degraded, face = image(2, 32, 32), image(2, 32, 32)

    assert torch.equal(judge(degraded, image(2, 32, 32), face), judge(degraded, image(2, 32, 32), face))


def test_spectral_norm_keeps_no_statistics_of_faces():
    modules = list(PatchDiscriminator(GfrnetDiscriminatorConfig(base=4, norm="spectral")).modules())

    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in modules)


def test_the_discriminators_want_to_be_nine_tenths_sure_of_a_real_face_and_wholly_of_a_restored_one():
    real = torch.tensor([math.log(9)], requires_grad=True)
    fake = torch.tensor([0.0], requires_grad=True)

    discriminator_loss(real, fake).backward()

    assert real.grad.item() == pytest.approx(0, abs=1e-6)  # sigmoid(log 9) = 0.9
    assert fake.grad.item() == pytest.approx(0.5)
    assert discriminator_loss(real, torch.tensor([-50.0])) < discriminator_loss(real + 3, torch.tensor([-50.0]))
    assert adversarial_loss(torch.tensor([1.0])).item() == pytest.approx(-math.log(torch.sigmoid(torch.tensor(1.0))))


def test_a_discriminator_without_channels_is_refused():
    with pytest.raises(ValueError, match="base 0: at least one channel"):
        GfrnetDiscriminatorConfig(base=0)


# Stages


def test_the_weights_and_the_schedule_are_the_papers():
    weights = LossWeights()

    assert (weights.pixel, weights.perceptual) == (100, 0.001)
    assert (weights.adversarial, weights.local_adversarial) == (1, 0.5)
    assert (weights.landmark, weights.variation, weights.variation_of) == (10, 1, "absolute")
    assert Schedule() == Schedule(warp=5 * 20_273, joint=0)
    assert [Schedule(2, 1).stage(step) for step in range(5)] == ["warp", "warp", "joint", "adversarial", "adversarial"]


@BOTH
@pytest.mark.parametrize("weights", WEIGHTS)
def test_every_stage_sums_its_own_terms_by_their_weights(full, weights):
    made, weighted = network(full), objective(WEIGHTS[weights])
    flow, restored, judged = (
        {"landmark", "variation"},
        {"pixel", "perceptual"},
        {"adversarial", "local_adversarial"},
    )

    for stage, terms in (("warp", flow), ("joint", flow | restored), ("adversarial", flow | restored | judged)):
        learned = weighted.restorer(made, batch(), stage)

        assert set(learned.terms) == terms
        expected = sum(getattr(weighted.weights, name) * term for name, term in learned.terms.items())
        assert learned.total.item() == pytest.approx(expected.item(), rel=1e-5)
        assert not any(term.requires_grad for term in learned.terms.values())


@BOTH
def test_warpnet_learns_alone_first(full):
    made = Gfrnet(full)
    shake(made)

    learned = objective(WEIGHTS["modern"]).restorer(made, batch(), "warp")
    learned.total.backward()

    assert learned.guided is None
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in made.warp_net.parameters())
    assert all(p.grad is None for p in made.rec_net.parameters())


@BOTH
@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_learns_and_teaches_the_discriminators(full, name):
    variant = VARIANTS[name]
    weights = LossWeights() if variant.flow_loss else LossWeights().without_flow()
    made = Gfrnet(variant.config(full))
    judges = GfrnetDiscriminators(GfrnetDiscriminatorConfig(base=4, guide=variant.guide))
    whole = GfrnetObjective(weights, perceptual=F.l1_loss, discriminators=judges)

    learned = whole.restorer(made, batch(), "adversarial")
    learned.total.backward()
    judges.zero_grad()
    before = [None if p.grad is None else p.grad.clone() for p in made.parameters()]
    whole.discriminators(batch(), learned.guided.restored).backward()

    assert ("landmark" in learned.terms) == (variant.warp and variant.flow_loss)
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in judges.parameters())
    for parameter, old in zip(made.parameters(), before, strict=True):
        assert (parameter.grad is None) == (old is None)
        assert old is None or torch.equal(parameter.grad, old)


def test_f_learns_nothing_from_landmarks():
    made, given = network(PAPER), batch()
    without = objective(LossWeights(local_adversarial=0).without_flow())
    elsewhere = replace(given, guide_landmarks=given.guide_landmarks + 5)

    totals = [without.restorer(made, each, "adversarial").total for each in (given, elsewhere)]

    assert torch.equal(*totals)
    with pytest.raises(ValueError, match="nothing to learn alone"):
        without.restorer(made, given, "warp")


def test_faces_without_landmarks_are_judged_as_a_whole_alone():
    given = batch(landmarks=torch.full((2, 5, 2), torch.nan))
    made, both = network(MODERN), objective(WEIGHTS["modern"])

    learned = both.restorer(made, given, "adversarial")
    both.discriminators(given, learned.guided.restored).backward()

    assert "local_adversarial" not in learned.terms
    assert torch.isfinite(learned.total)
    assert all(p.grad is not None for p in both.judges.whole.parameters())
    assert all(p.grad is None for p in both.judges.local.parameters())


def test_what_a_weight_asks_for_has_to_be_given():
    judges = GfrnetDiscriminators(GfrnetDiscriminatorConfig(base=4))
    plain = LossWeights(perceptual=0, adversarial=0, local_adversarial=0)

    with pytest.raises(ValueError, match=r"perceptual 0\.001 wants a perceptual distance"):
        GfrnetObjective(LossWeights(), discriminators=judges)
    with pytest.raises(ValueError, match="adversarial weights want discriminators"):
        GfrnetObjective(LossWeights(), perceptual=F.l1_loss)
    with pytest.raises(ValueError, match="no discriminators to train"):
        GfrnetObjective(plain).discriminators(batch(), image())


@pytest.mark.parametrize(
    ("made", "told"),
    [
        (lambda: LossWeights(pixel=-1), "pixel -1: a weight is 0 or more"),
        (lambda: LossWeights(landmark=math.nan), "landmark nan"),
        (lambda: LossWeights(variation_of="relative"), "variation_of 'relative'"),
        (lambda: Schedule(warp=-1), "warp -1, joint 0"),
    ],
)
def test_weights_and_schedules_that_cannot_be_are_refused_in_a_line(made, told):
    with pytest.raises(ValueError, match=told) as refused:
        made()
    assert "\n" not in str(refused.value)
