import pytest

torch = pytest.importorskip("torch", reason="the extra train is not installed")

from dataclasses import replace  # noqa: E402
from itertools import product  # noqa: E402

import onnxruntime  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.nn import functional as F  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

from models.discriminators import ScganDiscriminator, ScganDiscriminatorConfig  # noqa: E402
from models.export import to_onnx  # noqa: E402
from models.scgan import (  # noqa: E402
    PRESETS,
    Degradation,
    Group,
    ResidualBlock,
    Restoration,
    ScganBranches,
    ScganConfig,
    ScganFaces,
    ScganLosses,
    discriminator_losses,
    generator_totals,
    make_discriminators,
)

# torch's exporter uses what torch deprecates
exports = pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning", "ignore::DeprecationWarning")

TINY = ScganConfig(width=8, blocks=2, late=1, base=8, side=32)
OURS = replace(TINY, skip="plain", norm=False, align_corners=False, noise="direct", residual=True)
VARIANTS = {
    "author code": TINY,
    "paper": replace(TINY, tail="paper", spectral_norm=True, noise="direct"),
    "plain skips": replace(TINY, skip="plain"),
    "ours": OURS,
    "ours with spectral norm": replace(OURS, spectral_norm=True, tail="paper"),
}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def parameters(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


def gmac(network: nn.Module, *shapes: tuple[int, ...]) -> float:
    """Of one pass, counted without computing it."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        network.eval()(*(torch.zeros(shape) for shape in shapes))
    return counter.get_total_flops() / 2e9


def batch(n: int = 2, low_side: int = 8) -> tuple[Tensor, Tensor]:
    """High faces that are smooth, and low faces that are dark and noisy."""
    high = F.interpolate(torch.rand(n, 3, 4, 4) * 2 - 1, size=4 * low_side, mode="bilinear")
    low = F.interpolate(torch.rand(n, 3, 2, 2) - 1, size=low_side, mode="bilinear")
    return high, (low + 0.2 * torch.randn_like(low)).clamp(-1, 1)


def stir(network: nn.Module) -> None:
    """Give all that begins as 0 or 1 other values, so that nothing is left out by being nothing."""
    with torch.no_grad():
        for name, tensor in network.state_dict().items():
            if name.endswith("running_var"):
                tensor.uniform_(0.5, 2)
            elif tensor.is_floating_point() and tensor.unique().numel() == 1:
                tensor.normal_(std=0.1)


def received(*networks: nn.Module | None) -> list[bool]:
    """Whether any gradient came to each network."""
    return [
        network is not None and any(p.grad is not None and p.grad.abs().sum() > 0 for p in network.parameters())
        for network in networks
    ]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [({}, 15_463_939), ({"tail": "paper"}, 15_728_227), ({"skip": "plain"}, 15_463_939),
     ({"norm": False}, 15_463_939 - 768)],
)  # fmt: skip
def test_the_restorer_has_the_parameters_of_the_specification(changes, expected):
    with torch.device("meta"):
        assert parameters(Restoration(replace(PRESETS["paper"], **changes))) == expected


@pytest.mark.parametrize(("noise", "expected"), [("fc", 12_291_896), ("direct", 12_291_896 - 65 * 4096)])
def test_a_degrader_has_the_parameters_of_the_specification(noise, expected):
    with torch.device("meta"):
        assert parameters(Degradation(replace(PRESETS["paper"], noise=noise))) == expected


def test_the_networks_cost_what_the_specification_says():
    with torch.device("meta"):
        restorer, degrader = Restoration(PRESETS["paper"]), Degradation(PRESETS["paper"])
        low, high = (ScganDiscriminator(ScganDiscriminatorConfig(downs=downs)) for downs in (2, 4))

    assert gmac(restorer, (1, 3, 16, 16)) == pytest.approx(5.376, abs=0.001)
    assert gmac(degrader, (1, 3, 64, 64), (1, 64)) == pytest.approx(1.278, abs=0.001)
    assert gmac(low, (1, 3, 16, 16)) == pytest.approx(1.310, abs=0.001)
    assert gmac(high, (1, 3, 64, 64)) == pytest.approx(5.103, abs=0.001)


def test_the_default_preset_is_the_widest_that_is_16_mib_in_fp16():
    default = PRESETS["default"]
    with torch.device("meta"):
        sizes = [2 * parameters(Restoration(replace(default, width=w))) / 2**20 for w in (default.width, 200)]

    assert sizes[0] <= 16 < sizes[1]


def test_the_small_preset_costs_at_most_2_gmac_for_a_face_of_32_px():
    with torch.device("meta"):
        small = Restoration(PRESETS["small"])

    assert 1 < gmac(small, (1, 3, 32, 32)) < 2


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("size", [(1, 1), (5, 7), (24, 12)])
def test_a_face_of_any_size_becomes_exactly_4_times_as_large(variant, size):
    network = Restoration(VARIANTS[variant]).eval()

    with torch.no_grad():
        restored = network(torch.rand(2, 3, *size) * 2 - 1)

    assert restored.shape == (2, 3, 4 * size[0], 4 * size[1])
    assert network.config.scale == 4 and network.config.multiple == 1


@pytest.mark.parametrize("preset", ["default", "small"])
def test_an_untrained_preset_of_ours_gives_the_cubic_enlargement(preset):
    network = Restoration(replace(PRESETS[preset], width=8, blocks=1))
    face = torch.rand(1, 3, 6, 5) * 2 - 1

    with torch.no_grad():
        restored = network(face)

    cubic = F.interpolate(face, scale_factor=4.0, mode="bicubic", align_corners=False)
    assert (restored - cubic).abs().max() < 1e-5


def test_without_batch_norm_a_face_is_restored_alike_whatever_else_is_in_the_batch():
    face, other = torch.rand(2, 1, 3, 6, 6) * 2 - 1
    ours, author = Restoration(OURS), Restoration(TINY)
    stir(ours)

    with torch.no_grad():
        apart = [(net(torch.cat([face, other]))[:1] - net(face)).abs().max() for net in (ours, author)]

    assert apart[0] < 1e-6 < 1e-3 < apart[1]


def test_a_degrader_with_direct_noise_takes_any_multiple_of_16():
    degrader = Degradation(OURS)
    high = torch.rand(2, 3, 32, 48) * 2 - 1

    low = degrader(high, torch.randn(2, 1, 32, 48))

    assert low.shape == (2, 3, 8, 12)
    assert low.abs().max() <= 1


def test_other_noise_makes_another_low_face():
    high = batch()[0]
    for config in (TINY, OURS):
        branches = ScganBranches(config)

        first, second = (branches.d_hl(high, branches.noise(high)) for _ in range(2))

        assert (first - second).abs().max() > 1e-4


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_weight_of_every_branch_learns(variant):
    branches = ScganBranches(VARIANTS[variant])
    stir(branches)
    high, low = batch()
    pixels_alone = ScganLosses(l1=False, h1=False, l2=False, h2=False)

    faces = branches(high, low, branches.noise(high))
    sum(generator_totals(faces, nn.ModuleDict(), pixels_alone).values()).backward()

    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in branches.parameters())


class InPlaceBlock(nn.Module):
    """The author code's: the first ReLU overwrites the block's input, which the skip then reads."""

    def __init__(self, block: ResidualBlock, *, inplace: bool) -> None:
        super().__init__()
        self.pool = nn.AvgPool2d(2) if block.down else nn.Identity()
        self.main = nn.Sequential(
            nn.ReLU(inplace=inplace), block.first, nn.ReLU(inplace=inplace), self.pool, block.second
        )
        self.skip = nn.Sequential(self.pool, block.skip)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.main(x)
        return inner + self.skip(x)


@pytest.mark.parametrize("skip", ["rectified", "plain"])
@pytest.mark.parametrize(("channels", "down"), [((6, 6), False), ((6, 4), False), ((6, 6), True), ((4, 8), True)])
def test_a_rectified_block_is_what_an_in_place_relu_makes_and_a_plain_one_what_an_ordinary_makes(skip, channels, down):
    block = ResidualBlock(*channels, replace(TINY, skip=skip), down=down)
    x = torch.randn(2, channels[0], 8, 6)

    with torch.no_grad():
        given = block(x)
        alike, other = (
            InPlaceBlock(block, inplace=inplace)(x.clone()) for inplace in (skip == "rectified", skip == "plain")
        )

    assert torch.equal(given, alike)
    assert (given - other).abs().max() > 0.01


@pytest.mark.parametrize("skip", ["rectified", "plain"])
@pytest.mark.parametrize("channels", [(6, 6), (6, 4)])
def test_the_skip_round_a_group_is_rectified_too(skip, channels):
    group = Group(*channels, 2, replace(TINY, skip=skip))
    x = torch.randn(2, channels[0], 5, 7)

    with torch.no_grad():
        given = group(x)
        same = x.clone()
        alike = nn.Sequential(*(InPlaceBlock(b, inplace=skip == "rectified") for b in group.blocks))(same)
        alike = alike + group.skip(same)  # the first block has overwritten it, if in place

    assert torch.equal(given, alike)
    assert torch.equal(same, F.relu(x) if skip == "rectified" else x)


PARTS = ("noise", "head", "encoder.0", "encoder.1", "encoder.2", "encoder.3", "decoder.0", "decoder.1", "out")
SHARED = {
    "none": set(),
    "all": set(PARTS),
    "body": {part for part in PARTS if "coder" in part},
    "encoder": {part for part in PARTS if part.startswith("encoder")},
    "decoder": {"decoder.0", "decoder.1"},
    "middle": {"encoder.2", "encoder.3", "decoder.0", "decoder.1"},
}  # fmt: skip


@pytest.mark.parametrize("share", SHARED)
def test_a_sharing_variant_shares_exactly_what_the_specification_says(share):
    branches = ScganBranches(TINY, share=share)
    first, second = (dict(d.named_parameters()) for d in (branches.d_hl, branches.d_sl))

    shared = {name for name in first if first[name] is second[name]}

    assert first.keys() == second.keys()
    assert shared == {name for name in first if name.startswith(tuple(f"{part}." for part in SHARED[share]))}
    own = 2 * parameters(branches.d_hl) - sum(first[name].numel() for name in shared)
    assert parameters(branches) == parameters(branches.r_ls) + own


@pytest.mark.parametrize("share", SHARED)
def test_a_sharing_variant_comes_back_from_its_weights_and_still_shares(share):
    branches, again = (ScganBranches(TINY, share=share).eval() for _ in range(2))
    high, low = batch()
    z = branches.noise(high)

    again.load_state_dict(branches.state_dict())

    faces, same = branches(high, low, z), again(high, low, z)
    assert torch.equal(faces.backward.returned, same.backward.returned)
    assert torch.equal(faces.forward.recovered, same.forward.recovered)
    assert parameters(again) == parameters(branches)


def test_both_degraders_are_given_the_same_noise_and_the_faces_go_round_as_published():
    branches = ScganBranches(TINY, share="all").eval()
    high, low = batch()
    z = branches.noise(high, torch.Generator().manual_seed(5))

    faces = branches(high, low, z)

    assert torch.equal(z, branches.noise(high, torch.Generator().manual_seed(5)))
    assert torch.equal(faces.forward.degraded, branches.d_hl(high, z))
    assert torch.equal(faces.forward.recovered, branches.r_ls(faces.forward.degraded))
    assert torch.equal(faces.backward.restored, branches.r_ls(low))
    assert torch.equal(faces.backward.returned, branches.d_hl(faces.backward.restored, z))
    cubic = F.interpolate(low, scale_factor=4.0, mode="bicubic", align_corners=True)
    assert torch.equal(faces.backward.enlarged, cubic)


@pytest.mark.parametrize(
    ("cycles", "names", "totals"),
    [
        ("both", ["L1", "H1", "L2", "H2"], ["D_HL", "R_LS", "D_SL"]),
        ("forward", ["L1", "H1"], ["D_HL", "R_LS"]),
        ("backward", ["L2", "H2"], ["R_LS", "D_SL"]),
    ],
)
def test_a_branch_that_is_removed_takes_its_cycle_and_its_discriminators_with_it(cycles, names, totals):
    branches, losses = ScganBranches(TINY, cycles=cycles), ScganLosses()
    discriminators = make_discriminators(losses, cycles=cycles, low_side=8, width=2)
    high, low = batch()

    faces = branches(high, low, branches.noise(high))

    assert (branches.d_sl is None, branches.d_hl is None) == (cycles == "forward", cycles == "backward")
    assert list(discriminators) == names
    assert list(discriminator_losses(faces, discriminators, losses)) == names
    assert list(generator_totals(faces, discriminators, losses)) == totals


@exports
def test_the_restorer_as_onnx_gives_what_torch_gives_at_any_batch_and_size(tmp_path):
    variants = (TINY, replace(OURS, tail="paper", spectral_norm=True))
    together = Together([Restoration(replace(variant, blocks=1)) for variant in variants]).eval()
    stir(together)
    path = tmp_path / "scgan.onnx"
    path.write_bytes(to_onnx(together).SerializeToString())
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])

    for shape in ((1, 3, 16, 16), (3, 3, 5, 9), (1, 3, 1, 1)):
        image = torch.rand(shape) * 2 - 1
        with torch.no_grad():
            expected = together(image)
        given = torch.from_numpy(session.run(None, {"image": image.numpy()})[0])

        assert given.shape == expected.shape
        assert (given - expected).abs().max() < 1e-5


class Together(nn.Module):
    """Several networks as one, so that torch's exporter, which takes seconds, begins but once."""

    def __init__(self, networks: list[Restoration]) -> None:
        super().__init__()
        self.networks = nn.ModuleList(networks)
        self.config = networks[0].config

    def forward(self, image: Tensor) -> Tensor:
        return torch.cat([network(image) for network in self.networks], dim=1)


class Setting:
    """Tiny branches with their discriminators, and faces that went through them."""

    def __init__(self, *, losses: ScganLosses | None = None, config: ScganConfig = TINY, **variant: str) -> None:
        torch.manual_seed(0)
        self.losses = losses or ScganLosses()
        self.branches = ScganBranches(config, **variant)
        cycles = variant.get("cycles", "both")
        self.discriminators = make_discriminators(self.losses, cycles=cycles, low_side=8, width=4)
        self.high, self.low = batch()
        self.z = self.branches.noise(self.high)

    def faces(self) -> ScganFaces:
        return self.branches(self.high, self.low, self.z, detach=self.losses.detach_cycles)

    def judged(self) -> dict[str, Tensor]:
        return discriminator_losses(self.faces(), self.discriminators, self.losses)

    def totals(self) -> dict[str, Tensor]:
        return generator_totals(self.faces(), self.discriminators, self.losses)


@pytest.mark.parametrize("name", ["L1", "H1", "L2", "H2"])
def test_a_discriminators_loss_trains_that_discriminator_alone(name):
    setting = Setting(losses=ScganLosses(detach_cycles=False))

    setting.judged()[name].backward()

    assert received(*setting.discriminators.values()) == [other == name for other in setting.discriminators]
    assert received(setting.branches) == [False]


@pytest.mark.parametrize(
    ("detach", "name", "learns"),
    [
        (True, "D_HL", "D_HL"), (True, "R_LS", "R_LS"), (True, "D_SL", "D_SL"),
        (False, "D_HL", "D_HL"), (False, "R_LS", "D_HL R_LS"), (False, "D_SL", "R_LS D_SL"),
    ],
)  # fmt: skip
def test_a_branch_learns_from_its_own_total_and_from_anothers_only_through_an_attached_cycle(detach, name, learns):
    setting = Setting(losses=ScganLosses(detach_cycles=detach))
    branches = setting.branches

    setting.totals()[name].backward()

    expected = [branch in learns.split() for branch in ("D_HL", "R_LS", "D_SL")]
    assert received(branches.d_hl, branches.r_ls, branches.d_sl) == expected
    assert all(p.grad is None and p.requires_grad for p in setting.discriminators.parameters())


@pytest.mark.parametrize("adversarial", list(product([False, True], repeat=4)))
def test_every_combination_of_adversarial_terms_trains_a_step(adversarial):
    losses = ScganLosses(**dict(zip(("l1", "h1", "l2", "h2"), adversarial, strict=True)))
    setting = Setting(losses=losses)
    names = [name for name, there in zip(("L1", "H1", "L2", "H2"), adversarial, strict=True) if there]

    judged, totals = setting.judged(), setting.totals()
    sum([*judged.values(), *totals.values()]).backward()

    assert list(judged) == list(setting.discriminators) == list(losses.adversarial) == names
    assert received(*setting.discriminators.values()) == [True] * len(names)
    assert received(setting.branches.d_hl, setting.branches.r_ls, setting.branches.d_sl) == [True] * 3


@pytest.mark.parametrize(
    "changes",
    [
        {}, {"alpha": 1.0, "beta": 0.05}, {"theta": 0.5, "gamma": 2.0}, {"pixel": False}, {"cycle": False},
        {"l1": False, "h1": False, "l2": False, "h2": False}, {"h2": False}, {"h1": False, "l2": False},
    ],
)  # fmt: skip
def test_the_totals_are_the_papers(changes):
    losses = ScganLosses(**changes)
    setting = Setting(losses=losses)
    setting.branches.eval()
    d = setting.discriminators.eval()
    faces = setting.faces()
    i_sl, i_ss = faces.forward.degraded, faces.forward.recovered
    i_rs, back = faces.backward.restored, faces.backward.returned

    totals = generator_totals(faces, d, losses)

    adv = {name: -d[name](fake).mean() for name, fake in (("L1", i_sl), ("H1", i_ss), ("L2", back), ("H2", i_rs))
           if name in d}  # fmt: skip
    a = {name: losses.alpha * adv.get(name, 0.0) for name in ("L1", "H1", "L2", "H2")}
    pixel, cycle = losses.beta * losses.pixel, losses.beta * losses.cycle
    shrunk = setting.high.unflatten(2, (8, 4)).unflatten(4, (8, 4)).mean(dim=(3, 5))
    enlarged = F.interpolate(setting.low, size=(32, 32), mode="bicubic", align_corners=True)
    expected = {
        "D_HL": a["L1"] + pixel * (i_sl - shrunk).abs().mean(),
        "R_LS": losses.theta * (a["H1"] + cycle * (i_ss - setting.high).abs().mean())
        + losses.gamma * (a["H2"] + pixel * (i_rs - enlarged).abs().mean()),
        "D_SL": a["L2"] + cycle * (back - setting.low).abs().mean(),
    }
    assert totals.keys() == expected.keys()
    for name, total in totals.items():
        assert total.item() == pytest.approx(expected[name].item(), abs=1e-5)


def test_with_the_backward_cycle_alone_its_weight_in_the_restorers_total_is_1():
    setting = Setting(cycles="backward", losses=ScganLosses(l2=False, h2=False, gamma=0.01))
    setting.branches.eval()
    faces = setting.faces()

    total = generator_totals(faces, setting.discriminators, setting.losses)["R_LS"]

    assert total.item() == pytest.approx(F.l1_loss(faces.backward.restored, faces.backward.enlarged).item())


def test_a_further_term_is_added_to_the_restorers_total_and_trains_it_alone():
    setting = Setting()
    faces = setting.faces()

    def identity(seen: ScganFaces) -> Tensor:
        return 3.0 + (seen.forward.recovered - seen.high).square().mean()

    plain = generator_totals(faces, setting.discriminators.eval(), setting.losses)
    totals = generator_totals(faces, setting.discriminators, setting.losses, identity=identity)
    (totals["R_LS"] - plain["R_LS"]).backward()

    assert (totals["R_LS"] - plain["R_LS"]).item() == pytest.approx(identity(faces).item(), abs=1e-5)
    assert all(totals[name].item() == plain[name].item() for name in ("D_HL", "D_SL"))
    branches = setting.branches
    assert received(branches.d_hl, branches.r_ls, branches.d_sl) == [False, True, False]


def test_one_step_for_all_branches_is_the_author_codes_three_in_a_row():
    together, apart = Setting(), Setting()
    adam = torch.optim.Adam(together.branches.parameters(), lr=1e-3)
    names = {"D_HL": "d_hl", "R_LS": "r_ls", "D_SL": "d_sl"}
    adams = {
        name: torch.optim.Adam(getattr(apart.branches, part).parameters(), lr=1e-3) for name, part in names.items()
    }

    sum(together.totals().values()).backward()
    adam.step()
    for name, total in apart.totals().items():
        total.backward()
        adams[name].step()

    before = Setting().branches.state_dict()
    for name, tensor in together.branches.state_dict().items():
        assert torch.allclose(tensor, apart.branches.state_dict()[name], atol=1e-6)
        assert "running" in name or "tracked" in name or not torch.equal(tensor, before[name])


@pytest.mark.parametrize(
    ("low_side", "downs"), [(8, (1, 3)), (16, (2, 4)), (32, (3, 5)), (48, (3, 5)), (64, (4, 6)), (128, (5, 6))]
)
def test_discriminators_halve_larger_faces_more_often(low_side, downs):
    discriminators = make_discriminators(ScganLosses(), low_side=low_side, width=1)

    assert [discriminators[name].config.downs for name in ("L1", "H1", "L2", "H2")] == [*downs, *downs]


def step(setting: Setting, faces: ScganFaces, *optimizers: torch.optim.Adam | None) -> dict[str, float]:
    """Train the discriminators, then the branches, with those of the two optimizers that are given."""
    found = {}
    for losses, optimizer in zip((discriminator_losses, generator_totals), optimizers, strict=True):
        now = losses(faces, setting.discriminators, setting.losses)
        found |= now
        if optimizer is not None:
            optimizer.zero_grad()
            sum(now.values()).backward()
            optimizer.step()
    return {name: loss.item() for name, loss in found.items()}


def test_discriminators_learn_to_tell_faces_that_stay_as_they_are():
    setting = Setting()
    with torch.no_grad():
        faces = setting.faces()
    adam = torch.optim.Adam(setting.discriminators.parameters(), lr=2e-3)

    found = [step(setting, faces, adam, None) for _ in range(14)]

    assert all(found[-1][name] < 0.5 * found[0][name] for name in ("L1", "H1", "L2", "H2"))
    assert all(found[-1][name] > found[0][name] for name in ("D_HL", "D_SL"))  # whose faces are told now


@pytest.mark.parametrize(
    ("share", "detach"),
    [("none", True), ("none", False), ("all", True), ("all", False), ("body", True), ("encoder", True),
     ("decoder", True), ("middle", True)],
)  # fmt: skip
def test_branches_of_every_variant_learn_to_please_discriminators_that_stay_as_they_are(share, detach):
    losses = ScganLosses(detach_cycles=detach, h1=False, l2=False, h2=False)
    setting = Setting(losses=losses, config=replace(OURS, base=16), share=share)
    setting.discriminators.eval()
    adam = torch.optim.Adam(setting.branches.parameters(), lr=5e-4)

    found = [step(setting, setting.faces(), None, adam) for _ in range(8)]

    assert all(found[-1][name] < found[0][name] for name in ("D_HL", "R_LS", "D_SL"))


def test_the_whole_loop_brings_every_cycle_closer_to_where_it_began():
    setting = Setting(config=replace(OURS, base=16))
    d_adam = torch.optim.Adam(setting.discriminators.parameters(), lr=3e-4)
    g_adam = torch.optim.Adam(setting.branches.parameters(), lr=2e-3)

    found, distances = [], []
    for _ in range(14):
        setting.z = setting.branches.noise(setting.high)
        faces = setting.faces()
        found.append(step(setting, faces, d_adam, g_adam))
        there_and_back = ((faces.forward.recovered, setting.high), (faces.backward.returned, setting.low))
        distances.append([F.l1_loss(end, beginning).item() for end, beginning in there_and_back])

    assert all(last < 0.85 * first for first, last in zip(distances[0], distances[-1], strict=True))
    assert all(found[-1][name] < found[0][name] for name in ("L1", "H1", "L2", "H2"))


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: ScganConfig(width=20), "width 20: SCGAN wants a positive multiple of 8"),
        (lambda: ScganConfig(blocks=0), "blocks 0: SCGAN wants a positive multiple of 1"),
        (lambda: ScganConfig(base=6), "base 6: SCGAN wants a positive multiple of 4"),
        (lambda: ScganConfig(side=40), "side 40: SCGAN wants a positive multiple of 16"),
        (lambda: ScganConfig(skip="bent"), "skip 'bent' is unknown; known: plain, rectified"),
        (lambda: ScganConfig(noise="none"), "noise 'none' is unknown; known: fc, direct"),
        (lambda: ScganConfig(tail="long"), "tail 'long' is unknown; known: author, paper"),
        (lambda: ScganLosses(gamma=-1), "gamma -1: a weight is 0 or more"),
        (lambda: ScganLosses(alpha=float("nan")), "alpha nan: a weight is 0 or more"),
        (
            lambda: ScganLosses(l1=False, h1=False, l2=False, h2=False, pixel=False, cycle=False),
            "l1, h1, l2, h2, pixel, cycle: all are false, so nothing would be learnt",
        ),
        (
            lambda: ScganBranches(TINY, share="most"),
            "share 'most' is unknown; known: none, all, body, encoder, decoder, middle",
        ),
        (lambda: ScganBranches(TINY, cycles="no"), "cycles 'no' is unknown; known: both, forward, backward"),
        (
            lambda: ScganBranches(TINY, share="encoder", cycles="forward"),
            "share encoder: with the forward cycle alone there is no second branch to share with",
        ),
        (
            lambda: ScganBranches(OURS)(torch.zeros(2, 3, 32, 32), torch.zeros(2, 3, 8, 9), torch.zeros(2, 1, 32, 32)),
            "high faces (2, 3, 32, 32), low faces (2, 3, 8, 9): "
            "as many are wanted of both, the high ones 4 times as large",
        ),
        (
            lambda: Degradation(OURS)(torch.zeros(1, 3, 32, 40), torch.zeros(1, 1, 32, 40)),
            "a face of 40x32: SCGAN degrades faces whose sides are multiples of 16",
        ),
        (
            lambda: Degradation(TINY)(torch.zeros(1, 3, 64, 48), torch.zeros(1, 64)),
            "a face of 48x64: its noise was built for 32x32",
        ),
        (
            lambda: make_discriminators(ScganLosses(), low_side=3),
            "low_side 3: SCGAN's discriminators want 4 px at least",
        ),
    ],
)
def test_a_mistake_is_told_in_one_line(make, told):
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        make()

    assert str(caught.value) == told
