import pytest

torch = pytest.importorskip("torch", reason="the extra train is not installed")

from dataclasses import replace  # noqa: E402

from models.sgen import PRESETS, Sgen, SgenConfig  # noqa: E402


def parameters(config: SgenConfig) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in Sgen(config).parameters())


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (SgenConfig(n=2), 6_228_867),
        (SgenConfig(n=3), 32_397_827),
        (SgenConfig(n=4), 61_236_995),
        (SgenConfig(channels=1), 32_393_025),
        (SgenConfig(ensemble="max"), 22_589_571),
        (SgenConfig(ensemble="avg"), 22_589_571),
        (SgenConfig(ensemble="cat"), 23_680_323),
        (SgenConfig(base=32), 8_102_659),
        (SgenConfig(n=4, cap=1024), 153_681_155),
    ],
)
def test_the_generator_has_the_parameters_of_the_specification(config, expected):
    assert parameters(config) == expected


@pytest.mark.parametrize("n", [2, 3, 4])
@pytest.mark.parametrize("ensemble", ["sgu", "max", "avg", "cat"])
@pytest.mark.parametrize(("down", "up"), [("stride", "stride"), ("conv_pool", "resize_conv"), ("fit", "fit")])
def test_every_variant_keeps_the_size_and_every_weight_learns(n, ensemble, down, up):
    config = SgenConfig(n=n, base=4, ensemble=ensemble, down=down, up=up)
    image = torch.rand(2, 3, 2 * config.multiple, 3 * config.multiple) * 2 - 1

    network = Sgen(config)
    restored = network(image)
    restored.square().mean().backward()

    assert restored.shape == image.shape
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in network.parameters())


def test_the_detail_path_adds_to_what_the_ensemble_gives():
    torch.manual_seed(0)
    network = Sgen(SgenConfig(base=4, detail=4, residual=True))
    image = torch.rand(2, 3, 32, 32)
    before = network(image)
    torch.nn.init.normal_(network.detail.last.weight)

    after = network(image)
    after.square().mean().backward()

    assert not torch.allclose(before, after)
    assert all(p.grad.abs().sum() > 0 for p in network.detail.parameters())


@pytest.mark.parametrize("preset", ["default", "small"])
def test_an_untrained_residual_preset_gives_its_input_back(preset):
    network = Sgen(replace(PRESETS[preset], base=4))
    image = torch.rand(1, 3, 32, 48) * 2 - 1

    assert torch.equal(network(image), image)


def test_the_gate_of_the_author_code_is_another_network():
    torch.manual_seed(0)
    sigmoid = Sgen(SgenConfig(base=4))
    leaky = Sgen(SgenConfig(base=4, gate="lrelu"))
    leaky.load_state_dict(sigmoid.state_dict())
    image = torch.rand(1, 3, 32, 32)

    assert not torch.allclose(sigmoid(image), leaky(image))
