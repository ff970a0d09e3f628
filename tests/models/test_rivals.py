import pytest

torch = pytest.importorskip("torch", reason="the extra train is not installed")

from dataclasses import replace  # noqa: E402

from torch.nn import functional as F  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

from models import sgen, sisn  # noqa: E402
from models.rivals import NETWORKS, PRESETS, RedNet, RedNetConfig, SrresnetConfig, Unet, UnetConfig  # noqa: E402

ALL = [(name, preset) for name in PRESETS for preset in PRESETS[name]]
KINDS = [(name, preset) for name in PRESETS for preset in ("paper", "small")]


def cost(network, config, size: tuple[int, int]) -> int:
    """Multiply-accumulates of one result of this height and width."""
    with torch.device("meta"):
        image = torch.empty(1, 3, *(side // (config.scale or 1) for side in size))
        with FlopCounterMode(display=False) as counter:
            restored = network(config).eval()(image)
    assert restored.shape[2:] == size
    return counter.get_total_flops() // 2


def tiny(name: str, preset: str, **changes):
    """The preset made narrow and shallow, all else as it is."""
    shallow = {"srcnn": {}, "rednet": {"depth": 3}, "srresnet": {"blocks": 2}, "unet": {"depth": 2}}
    return replace(PRESETS[name][preset], **{"width": 8, **shallow[name], **changes})


@pytest.mark.parametrize(
    ("name", "expected"), [("srcnn", 20_099), ("rednet", 1_037_507), ("srresnet", 1_547_350), ("unet", 31_031_875)]
)
def test_a_published_rival_has_the_parameters_of_its_paper(name, expected):
    with torch.device("meta"):
        network = NETWORKS[name](PRESETS[name]["paper"])

    assert sum(p.numel() for p in network.parameters()) == expected


@pytest.mark.parametrize(
    ("preset", "ours", "config", "size"),
    [
        ("small", sgen.Sgen, sgen.PRESETS["small"], (208, 176)),
        ("sisn-small", sisn.Sisn, sisn.PRESETS["small"], (256, 256)),
    ],
)
def test_every_small_rival_costs_what_our_small_network_costs(preset, ours, config, size):
    costs = {name: cost(NETWORKS[name], PRESETS[name][preset], size) for name in PRESETS}

    assert costs == pytest.approx(dict.fromkeys(PRESETS, cost(ours, config, size)), rel=0.1)


@pytest.mark.parametrize(("name", "preset"), ALL)
def test_a_rival_takes_every_size_that_its_multiple_allows(name, preset):
    config = PRESETS[name][preset]
    height, width = 5 * config.multiple, 3 * config.multiple

    with torch.device("meta"):
        restored = NETWORKS[name](config).eval()(torch.empty(2, 3, height, width))

    scale = config.scale or 1
    assert restored.shape == (2, 3, scale * height, scale * width)


@pytest.mark.parametrize(("name", "preset"), KINDS)
def test_training_lowers_a_rivals_loss_and_moves_every_weight(name, preset):
    torch.manual_seed(0)
    config = tiny(name, preset)
    network = NETWORKS[name](config)
    before = {key: p.clone() for key, p in network.named_parameters()}
    low = torch.rand(2, 3, 16, 12) * 2 - 1
    clean = F.interpolate(low, scale_factor=config.scale or 1, mode="bilinear") / 2 + 0.4
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)

    losses = []
    for _ in range(15):
        loss = (network(low) - clean).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())

    assert losses[-1] < 0.9 * losses[0]
    assert [key for key, p in network.named_parameters() if torch.equal(p, before[key])] == []


@pytest.mark.parametrize("name", PRESETS)
def test_an_untrained_small_rival_gives_the_enlarged_image(name):
    config = tiny(name, "small")
    image = torch.rand(1, 3, 16, 12) * 2 - 1
    enlarged = image
    if config.scale:
        enlarged = F.interpolate(image, scale_factor=config.scale, mode="bicubic", align_corners=False)

    assert torch.equal(NETWORKS[name](config)(image), enlarged)


def test_a_skip_brings_detail_past_the_middle_of_red_net():
    torch.manual_seed(0)
    network = RedNet(RedNetConfig(width=8, depth=3))
    torch.nn.init.normal_(network.deconvolutions[-1].weight)
    torch.nn.init.zeros_(network.convolutions[-1].weight)  # nothing passes the middle
    image = torch.rand(1, 3, 16, 12)

    assert not torch.equal(network(image), image)
    network.config = replace(network.config, skip=3)
    assert torch.equal(network(image), image)


def test_u_net_sees_what_its_halvings_lose():
    torch.manual_seed(0)
    network = Unet(UnetConfig(width=8, depth=2))
    for up in network.ups:
        torch.nn.init.zeros_(up.weight)  # nothing comes up from below

    restored = network(torch.rand(1, 3, 16, 12))

    assert restored.std() > 0.01


def test_srresnet_without_normalisation_judges_each_image_by_itself():
    torch.manual_seed(0)
    images = torch.rand(3, 3, 8, 6)

    def alone_and_together(norm: bool):
        network = NETWORKS["srresnet"](tiny("srresnet", "paper", norm=norm))
        return network(images[:1]), network(images)[:1]

    assert not torch.allclose(*alone_and_together(True), atol=1e-4)
    assert torch.allclose(*alone_and_together(False), atol=1e-5)


@pytest.mark.parametrize("scale", [2, 4, 8])
def test_srresnet_enlarges_as_often_as_it_is_told(scale):
    network = NETWORKS["srresnet"](tiny("srresnet", "paper", scale=scale))

    assert network(torch.zeros(2, 3, 7, 5)).shape == (2, 3, 7 * scale, 5 * scale)


def test_srresnet_refuses_a_scale_that_no_pixel_shuffle_gives():
    with pytest.raises(ValueError, match="scale 3"):
        SrresnetConfig(scale=3)
