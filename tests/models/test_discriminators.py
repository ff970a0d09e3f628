import math

import pytest

torch = pytest.importorskip("torch", reason="the extra train is not installed")

from models.discriminators import (  # noqa: E402
    SgenDiscriminator,
    SgenDiscriminatorConfig,
    discriminator_loss,
    generator_loss,
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
