import math

import pytest

torch = pytest.importorskip("torch", reason="the extra train is not installed")

from models.discriminators import (  # noqa: E402
    ScganDiscriminator,
    ScganDiscriminatorConfig,
    SgenDiscriminator,
    SgenDiscriminatorConfig,
    discriminator_loss,
    generator_loss,
    hinge_discriminator_loss,
    hinge_generator_loss,
)
from models.sgen import Sgen, SgenConfig  # noqa: E402

READINGS = ["code", "journal"]


@pytest.mark.parametrize(("reading", "expected"), [("code", 1_560_129), ("journal", 4_307_073)])
def test_the_discriminator_has_the_parameters_of_the_specification(reading, expected):
    with torch.device("meta"):
        discriminator = SgenDiscriminator(SgenDiscriminatorConfig(reading=reading))

    assert sum(p.numel() for p in discriminator.parameters()) == expected


@pytest.mark.parametrize("reading", READINGS)
@pytest.mark.parametrize("size", [(4, 4), (33, 21), (128, 96)])
@pytest.mark.parametrize("channels", [1, 3])
def test_an_image_of_any_size_gets_one_logit(reading, size, channels):
    discriminator = SgenDiscriminator(SgenDiscriminatorConfig(reading=reading, width=4, channels=channels))

    assert discriminator(torch.zeros(3, channels, *size)).shape == (3,)
    assert discriminator.eval()(torch.zeros(1, channels, *size)).shape == (1,)


@pytest.mark.parametrize("reading", READINGS)
def test_the_weights_begin_as_the_specification_says(reading):
    torch.manual_seed(0)
    discriminator = SgenDiscriminator(SgenDiscriminatorConfig(reading=reading, width=16))

    for module in discriminator.modules():
        if isinstance(module, torch.nn.Conv2d):
            assert module.weight.std().item() == pytest.approx(0.02, rel=0.1)
        if isinstance(module, torch.nn.BatchNorm2d):
            assert module.weight.mean().item() == pytest.approx(1, abs=0.02)
            assert 0 < module.weight.std().item() < 0.04


def test_the_losses_are_the_cross_entropies_of_the_paper():
    real, fake = torch.tensor([2.0, -1.0]), torch.tensor([0.5, -3.0])
    d_real, d_fake = torch.sigmoid(real), torch.sigmoid(fake)

    objective = d_real.log().mean() + (1 - d_fake).log().mean()

    assert discriminator_loss(real, fake).item() == pytest.approx(-objective.item(), rel=1e-5)
    assert generator_loss(fake).item() == pytest.approx(-d_fake.log().mean().item(), rel=1e-5)


def test_the_losses_stay_finite_where_a_probability_would_be_0():
    sure = torch.tensor([200.0])

    assert discriminator_loss(-sure, sure).item() == pytest.approx(400)
    assert generator_loss(-sure).item() == pytest.approx(200)


def test_a_generator_that_fools_nobody_is_still_pulled():
    logits = torch.tensor([-20.0], requires_grad=True)

    generator_loss(logits).backward()

    assert logits.grad.item() == pytest.approx(-1, abs=1e-3)


@pytest.mark.parametrize("reading", READINGS)
def test_one_step_lowers_the_loss_where_real_and_fake_differ(reading):
    torch.manual_seed(0)
    discriminator = SgenDiscriminator(SgenDiscriminatorConfig(reading=reading, width=8))
    real, fake = torch.full((4, 3, 32, 24), 0.5), torch.full((4, 3, 32, 24), -0.5)
    real, fake = real + 0.1 * torch.randn_like(real), fake + 0.1 * torch.randn_like(fake)
    optimizer = torch.optim.Adam(discriminator.parameters(), lr=1e-3, betas=(0.5, 0.999))

    losses = []
    for _ in range(60):
        loss = discriminator_loss(discriminator(real), discriminator(fake))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())

    assert losses[1] < losses[0]
    assert losses[-1] < 0.5 * 2 * math.log(2)  # half of what a guess costs


@pytest.mark.parametrize("reading", READINGS)
def test_the_gradient_reaches_every_weight_of_the_generator(reading):
    torch.manual_seed(0)
    generator = Sgen(SgenConfig(base=4))
    discriminator = SgenDiscriminator(SgenDiscriminatorConfig(reading=reading, width=4))

    generator_loss(discriminator(generator(torch.rand(2, 3, 32, 48) * 2 - 1))).backward()

    assert all(p.grad.abs().sum() > 0 for p in generator.parameters())


@pytest.mark.parametrize(("downs", "expected"), [(2, 15_390_849), (4, 15_456_641)])
def test_scgans_discriminators_have_the_parameters_of_the_specification(downs, expected):
    with torch.device("meta"):
        discriminator = ScganDiscriminator(ScganDiscriminatorConfig(downs=downs))

    assert sum(p.numel() for p in discriminator.parameters()) == expected


@pytest.mark.parametrize("downs", [2, 4, 6])
@pytest.mark.parametrize("times", [(1, 1), (4, 4), (5, 3), (8, 8)])
def test_a_face_of_any_size_gets_one_logit_of_scgans(downs, times):
    discriminator = ScganDiscriminator(ScganDiscriminatorConfig(downs=downs, width=2))
    size = [2**downs * n for n in times]

    assert discriminator(torch.zeros(3, 3, *size)).shape == (3,)
    assert discriminator.eval()(torch.zeros(1, 3, *size)).shape == (1,)


def test_at_their_own_size_scgans_discriminators_look_at_every_place():
    torch.manual_seed(0)
    discriminator = ScganDiscriminator(ScganDiscriminatorConfig(downs=2, width=4)).eval()
    face = torch.rand(1, 3, 16, 16, requires_grad=True)
    turned = face.detach().roll(4, dims=3)

    logit = discriminator(face)
    logit.backward()

    assert (face.grad.abs().sum(dim=1) > 0).float().mean() > 0.9
    assert discriminator(turned).item() != pytest.approx(logit.item(), abs=1e-6)  # nothing is averaged over the face


def test_all_of_scgans_layers_have_a_spectral_norm_of_1():
    torch.manual_seed(0)
    discriminator = ScganDiscriminator(ScganDiscriminatorConfig(width=4))
    for parameter in discriminator.parameters():
        parameter.data.mul_(5)
    for _ in range(30):  # one power iteration each
        discriminator(torch.zeros(1, 3, 64, 64))

    layers = [m for m in discriminator.modules() if isinstance(m, torch.nn.Conv2d | torch.nn.Linear)]

    assert len(layers) == 12 + 5 + 2  # blocks, skips, linear
    for layer in layers:
        assert torch.linalg.matrix_norm(layer.weight.flatten(1), 2).item() == pytest.approx(1, abs=0.02)


def test_the_hinge_losses_are_those_of_the_paper_and_of_the_author_code():
    real, fake = torch.tensor([2.0, -1.0, 0.25]), torch.tensor([0.5, -3.0, -1.0])

    assert hinge_discriminator_loss(real, fake).item() == pytest.approx((0 + 2 + 0.75) / 3 + (1.5 + 0 + 0) / 3)
    assert hinge_generator_loss(fake).item() == pytest.approx(3.5 / 3)


def test_the_hinge_losses_do_not_count_in_half_precision():
    half = torch.tensor([0.0, 1e-3], dtype=torch.bfloat16)

    assert hinge_discriminator_loss(half, half).dtype == hinge_generator_loss(half).dtype == torch.float32


@pytest.mark.parametrize(
    ("fields", "told"),
    [({"downs": 7}, r"downs 7: SCGAN's discriminators have six blocks"),
     ({"width": 0}, r"width 0: SCGAN's discriminators want one channel at least")],
)  # fmt: skip
def test_a_wrong_discriminator_of_scgans_is_told_in_one_line(fields, told):
    with pytest.raises(ValueError, match=f"^{told}$"):
        ScganDiscriminatorConfig(**fields)
