import pytest

torch = pytest.importorskip("torch", reason="the extra train is not installed")

import csv  # noqa: E402
import io  # noqa: E402
import json  # noqa: E402
import re  # noqa: E402
import shutil  # noqa: E402
import sys  # noqa: E402
import tarfile  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any, get_args  # noqa: E402

import cv2  # noqa: E402
import numpy as np  # noqa: E402
import yaml  # noqa: E402
from onnx import helper  # noqa: E402
from skimage.data import astronaut  # noqa: E402
from training import save_onnx  # noqa: E402

from models.ablate import AblateConfig, ablate, compare, main  # noqa: E402
from models.batches import Batches  # noqa: E402
from models.checkpoint import load_checkpoint  # noqa: E402
from models.gfrnet import VARIANTS  # noqa: E402
from models.judges import bicubic, psnr  # noqa: E402
from models.protocols import (  # noqa: E402
    PAPER_SGEN_PSNR,
    PAPER_SGEN_SSIM,
    PAPER_SISN,
    SGEN_NOISE,
    protocol_faces,
    sgen_pair,
)
from models.scgan import Share  # noqa: E402
from models.settings import read_settings  # noqa: E402

ROOT = Path(__file__).parents[2]
PLAIN = {"base": 4, "blocks": 0, "detail": 0}
PEOPLE = {"a": 2, "b": 1, "c": 1}  # faces of each


@pytest.fixture(scope="module")
def faces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder: `train` with crops of one face, `people` with those of two people, and `truths.tar` with other crops
    under the names of three people, two of which are the pairs of `pairs.txt`."""
    folder = tmp_path_factory.mktemp("faces")
    (folder / "train").mkdir()
    whole = np.ascontiguousarray(astronaut()[..., ::-1])
    for index, side in enumerate((220, 240, 256)):
        cv2.imwrite(str(folder / f"train/{index}.png"), cv2.resize(whole[0:224, 112:336], (side, side)))
    for index, name in enumerate(("one/0", "one/1", "two/0", "two/1")):
        (folder / "people" / name).parent.mkdir(parents=True, exist_ok=True)
        own = cv2.resize(whole[0:224, 112:336], (160, 160)) // (1 + index % 2)
        cv2.imwrite(str(folder / f"people/{name}.png"), own[..., ::-1] if index > 1 else own)
    (folder / "pairs.txt").write_text("a/0.png a/1.png\na/1.png a/0.png\n")
    files = [(f"{person}/{i}.png", person) for person, count in PEOPLE.items() for i in range(count)]
    places = dict.fromkeys(f"{point}_{axis}" for point in ("le", "re", "nose", "lm", "rm") for axis in "xy")
    box = {"face_x1": 48, "face_y1": 48, "face_x2": 208, "face_y2": 208}
    row = {"size": 256, "detail": 0.1, "yaw": 0, **box, **dict.fromkeys(places, 128)}
    with tarfile.open(folder / "truths.tar", "w") as tar, (folder / "truths.csv").open("w", newline="") as table:
        writer = csv.DictWriter(table, ["file", "identity", *row])
        writer.writeheader()
        for number, (file, person) in enumerate(files):
            image = cv2.resize(whole[8 * number : 8 * number + 200, 120:320], (256, 256))
            stored = cv2.imencode(".png", image)[1].tobytes()
            entry = tarfile.TarInfo(file)
            entry.size = len(stored)
            tar.addfile(entry, io.BytesIO(stored))
            writer.writerow({"file": file, "identity": person, **row})
    return folder


@pytest.fixture(scope="module")
def distance(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The mean difference of two images as ONNX, in the place of LPIPS."""
    nodes = [
        helper.make_node("Sub", ["a", "b"], ["less"]),
        helper.make_node("Abs", ["less"], ["error"]),
        helper.make_node("ReduceMean", ["error"], ["out"], keepdims=0),
    ]
    return save_onnx(tmp_path_factory.mktemp("distance") / "distance.onnx", nodes, inputs=("a", "b"))


def write(path: Path, faces: Path, base: dict[str, object] | None = None, **changes: object) -> Path:
    """A YAML of two variants, two seeds and two steps, changed; runs and report lie beside it."""
    run = {
        "network": "sgen", "preset": "small", "override": {**PLAIN, "residual": False}, "data": [str(faces / "train")],
        "validation": str(faces / "train"), "protocols": {"sgen": 1}, "sigma": 30, "pixel": "mse", "vary": False,
        "steps": 2, "batch": 2, **(base or {}),
    }  # fmt: skip
    settings = {
        "title": "Tiny", "paper": "Table 0.", "smaller": "everything.", "base": run,
        "variants": {
            "gated": {"override": {"ensemble": "sgu"}, "paper": {"PSNR": 24.5, "SSIM": 0.75}},
            "maximum": {"override": {"ensemble": "max"}, "paper": {"PSNR": 23.25}},
        },
        "claims": [["gated", "maximum"]], "seeds": [0, 1], "truths": str(faces / "truths.tar"), "sizes": [128],
        "runs": "runs", "report": "report.md", **changes,
    }  # fmt: skip
    path.write_text(yaml.safe_dump(settings, sort_keys=False))
    return path


OTHERS = {
    "gfrnet": {"override": {"base": 4, "cap": 8, "depth": 2}, "side": 48, "warp_share": 0, "surveillance_share": 0},
    "scgan": {
        "override": {"width": 8, "blocks": 1, "late": 1, "base": 4}, "sides": {32: 1}, "degraded_share": 1,
        "discriminator_width": 4,
    },
}  # fmt: skip


def write_other(path: Path, faces: Path, network: str, base: dict[str, object] | None = None, **changes: Any) -> Path:
    """A YAML of two steps of another kind of training with one seed, changed."""
    people = str(faces / "people")
    run = {
        "network": network, "preset": "small", "data": [people], "validation": people, "steps": 2, "batch": 2,
        **OTHERS[network], **(base or {}),
    }  # fmt: skip
    pairs = {"pairs": str(faces / "pairs.txt")} if network == "gfrnet" else {}
    settings = {
        "title": "Tiny", "paper": "Table 0.", "smaller": "everything.", "base": run, "seeds": [0],
        "truths": str(faces / "truths.tar"), "runs": "runs", "report": "report.md", **pairs, **changes,
    }  # fmt: skip
    path.write_text(yaml.safe_dump(settings, sort_keys=False))
    return path


@pytest.fixture(scope="module")
def done(faces: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The YAML of an ablation that was run to its end."""
    path = write(tmp_path_factory.mktemp("done") / "tiny.yaml", faces)
    ablate(read_settings(AblateConfig, path), command="the command")
    return path


@pytest.fixture
def copied(done: Path, tmp_path: Path) -> Path:
    """The same with its runs, to be changed."""
    return shutil.copytree(done.parent, tmp_path / "copy") / done.name


def kept(config: Path, variant: str, seed: int) -> dict[str, object]:
    return json.loads((config.parent / f"runs/{variant}/seed{seed}/scores.json").read_text())["run"]


def cells(report: str, title: str) -> list[str]:
    return next(
        line.split(" | ")[1:] for line in report.splitlines() if re.match(rf"\| \**{re.escape(title)}\** ", line)
    )


def run_main(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["ablate", *map(str, arguments)])
    main()


# The report


def test_the_report_has_a_row_for_each_variant_with_the_papers_beneath_it(done):
    report = (done.parent / "report.md").read_text()

    for name, paper in {"gated": "| *24.50* | *0.7500* |", "maximum": "| *23.25* |  |"}.items():
        runs = [kept(done, name, seed) for seed in (0, 1)]
        means = [float(np.mean(run["scores"]["PSNR"])) for run in runs]
        row = cells(report, name)
        assert row[:3] == ["2", f"{runs[0]['parameters']:,}", f"{runs[0]['gmac']:.3f}"]
        assert row[3] == f"{np.mean([run['seconds'] for run in runs]):.3f}" != "0.000"
        assert row[4] == f"{np.mean(means):.2f} ± {np.std(means, ddof=1):.2f}"
        beneath = report[report.index(f"**{name}**") :].splitlines()[1]
        assert beneath.startswith("| *paper* |") and beneath.endswith(paper)
    assert kept(done, "gated", 0)["parameters"] > kept(done, "maximum", 0)["parameters"]
    assert "the command" in report and "everything." in report and "Not complete" not in report


def test_the_report_judges_each_claim_in_each_measure_beside_the_papers_difference(done):
    report = (done.parent / "report.md").read_text()

    claims = [line.split(" | ") for line in report.splitlines() if line.startswith("| gated over maximum")]

    scores = {name: [kept(done, name, seed)["scores"] for seed in (0, 1)] for name in ("gated", "maximum")}
    people = [name for name, count in PEOPLE.items() for _ in range(count)]
    for claim, measure, paper in zip(claims, ("PSNR", "SSIM"), ("+1.250", ""), strict=True):
        found = compare(*(np.array([run[measure] for run in runs]) for runs in scores.values()), people)
        digits = 3 if measure == "PSNR" else 4
        assert claim[1:3] == [measure, paper]
        assert float(claim[3].split(" (")[0]) == pytest.approx(found.gain, abs=0.51 * 10**-digits)
        assert claim[5] == f"**{found.verdict}** |"


def test_all_variants_of_a_seed_see_the_same_and_another_seed_begins_elsewhere(done):
    configs = [
        load_checkpoint(done.parent / f"runs/{name}/seed{seed}/last.pt")["config"]
        for name in ("gated", "maximum")
        for seed in (0, 1)
    ]

    assert [each["seed"] for each in configs] == [0, 1, 0, 1]
    for each in configs:
        assert {key for key in each if each[key] != configs[0][key]} <= {"override", "out", "seed"}
    assert kept(done, "gated", 0)["scores"] != kept(done, "gated", 1)["scores"]


# Going on


def test_an_ablation_that_was_killed_trains_only_what_is_missing_and_ends_the_same(
    faces, done, tmp_path, monkeypatch, capsys
):
    class Killed(Exception):
        pass

    made = Batches.__getitem__
    taken = []

    def breaking(self: Batches, step: int):
        taken.append(step)
        if len(taken) == 4:  # the last step of the second run
            raise Killed
        return made(self, step)

    config = read_settings(AblateConfig, write(tmp_path / "tiny.yaml", faces, seeds=[0]))
    with monkeypatch.context() as patched:
        patched.setattr(Batches, "__getitem__", breaking)
        with pytest.raises(Killed):
            ablate(config, command="the command")
    finished = [tmp_path / f"runs/gated/seed0/{file}" for file in ("last.pt", "scores.json")]
    before = [file.stat().st_mtime_ns for file in finished]
    assert not (tmp_path / "report.md").exists()
    capsys.readouterr()

    ablate(config, command="the command")

    said = capsys.readouterr().out
    assert (said.count("nothing to do"), said.count("3 faces, ")) == (1, 1)  # compared; trained
    assert [file.stat().st_mtime_ns for file in finished] == before
    for name in ("gated", "maximum"):
        assert kept(tmp_path / "tiny.yaml", name, 0)["scores"] == kept(done, name, 0)["scores"]
    assert cells((tmp_path / "report.md").read_text(), "maximum")[0] == "1"


def test_part_of_an_ablation_can_be_run_alone_and_the_report_says_what_is_missing(faces, tmp_path, monkeypatch, capsys):
    path = write(tmp_path / "tiny.yaml", faces)

    run_main(monkeypatch, path, "--only", "maximum", "--seeds", 1)

    assert sorted(tmp_path.glob("runs/*/*")) == [tmp_path / "runs/maximum/seed0"]
    report = (tmp_path / "report.md").read_text()
    assert "**Not complete.** Not run yet: gated seed 0, gated seed 1, maximum seed 1." in report
    assert "**maximum**" in report and "**gated**" not in report and "## Do the claims hold?" not in report
    assert report in capsys.readouterr().out


def test_other_sizes_are_judged_without_training_again(faces, copied):
    last = copied.parent / "runs/gated/seed1/last.pt"
    trained, before = last.stat().st_mtime_ns, kept(copied, "gated", 1)

    ablate(read_settings(AblateConfig, write(copied, faces, sizes=[144], limit=2)), command="again")

    after = kept(copied, "gated", 1)
    assert last.stat().st_mtime_ns == trained
    assert len(after["scores"]["PSNR"]) == 2 and after["scores"]["PSNR"] != before["scores"]["PSNR"][:2]
    assert after["seconds"] == before["seconds"] > 0


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"steps": 3}, r"gated/seed0/last\.pt was planned for 2 steps, not 3: delete it, or change `runs`"),
        ({"steps": 1}, r"planned for 2 steps, not 1"),
        ({"batch": 3}, r"batch 2, now 3"),
        ({"override": {**PLAIN, "base": 5}}, r"network\.base 4, now 5"),
    ],
)
def test_runs_of_another_budget_or_network_are_not_taken_for_these(faces, copied, change, error):
    with pytest.raises(ValueError, match=error):
        ablate(read_settings(AblateConfig, write(copied, faces, change)), command="again")


# What is judged


def test_a_network_that_has_learnt_nothing_scores_as_cubic_does_as_mean_over_sizes_that_it_must_pad_too(
    faces, tmp_path
):
    path = write(
        tmp_path / "tiny.yaml", faces, {"learning_rate": 1e-12, "override": {**PLAIN, "n": 4}, "steps": 1},
        variants={"same": {}}, claims=[], seeds=[5], sizes=[128, 144],
    )  # fmt: skip

    ablate(read_settings(AblateConfig, path), command="the command")

    truths = protocol_faces(faces / "truths.tar")
    by_size = []
    for size in ((96, 128), (112, 144)):  # for N = 4 multiples of 32 are needed
        pairs = [sgen_pair(face, size, seed) for seed, face in enumerate(truths)]
        cubic = [cv2.resize(pair.low, size, interpolation=cv2.INTER_CUBIC) for pair in pairs]
        by_size.append([psnr(image, pair.truth) for image, pair in zip(cubic, pairs, strict=True)])
    assert kept(path, "same", 5)["scores"]["PSNR"] == pytest.approx(np.mean(by_size, axis=0), abs=1e-6)


def test_sisn_is_judged_at_its_protocol_beside_rivals_that_get_the_enlarged_face_and_lpips_counts_the_other_way(
    faces, distance, tmp_path
):
    tiny = {"groups": 1, "blocks": 1, "width": 8}
    path = write(
        tmp_path / "tiny.yaml", faces,
        {"network": "sisn", "override": tiny, "protocols": {"sisn": 1}, "patch": 16, "learning_rate": 1e-12},
        variants={
            "SISN": {"paper": {"LPIPS": 0.2}},
            "without detail": {"override": {"detail": False}, "paper": {"LPIPS": 0.3}},
            "U-Net": {"network": "unet", "override": {"width": 2, "depth": 1}},
            "broken": {"network": "srcnn", "override": {"width": 4, "residual": False}},
        },
        claims=[["SISN", "without detail"], ["SISN", "broken"]], seeds=[0], lpips=str(distance),
    )  # fmt: skip

    report = ablate(read_settings(AblateConfig, path), command="the command")

    truths = [face.image for face in protocol_faces(faces / "truths.tar")]
    expected = [psnr(bicubic(cv2.resize(t, (64, 64), interpolation=cv2.INTER_AREA), 4), t) for t in truths]
    for name in ("SISN", "without detail", "U-Net"):
        assert kept(path, name, 0)["scores"]["PSNR"] == pytest.approx(expected, abs=1)
    assert kept(path, "SISN", 0)["parameters"] > kept(path, "without detail", 0)["parameters"]
    over = [line.split(" | ") for line in report.splitlines() if line.startswith("| SISN over ")]
    by_lpips = {row[0]: row for row in over if row[1] == "LPIPS"}
    assert by_lpips["| SISN over without detail"][2] == "+0.1000"
    assert by_lpips["| SISN over broken"][-1] == "**holds** |" and by_lpips["| SISN over broken"][3].startswith("+")


# GFRNet and SCGAN


@pytest.mark.parametrize("network", ["gfrnet", "scgan"])
def test_a_restorer_of_another_kind_that_has_learnt_nothing_scores_as_the_enlarged_face_does(
    faces, distance, tmp_path, network
):
    path = write_other(
        tmp_path / "tiny.yaml", faces, network, {"learning_rate": 1e-12}, variants={"same": {}}, lpips=str(distance)
    )

    report = ablate(read_settings(AblateConfig, path), command="the command")

    before, after = cells(report, "not restored, enlarged")[4:], cells(report, "same")[4:]
    titles = next(line.split(" | ")[5:] for line in report.splitlines() if line.startswith("| variant"))
    titles[-1] = titles[-1].removesuffix(" |")
    less = ", less is better"
    assert (
        titles
        == {
            "gfrnet": ["PSNR ×4", "SSIM ×4", f"LPIPS ×4{less}", "PSNR ×8", "SSIM ×8", f"LPIPS ×8{less}"],
            "scgan": [f"LPIPS{less}", "PSNR", "SSIM"],
        }[network]
    )
    for title, *figures in zip(titles, before, after, strict=True):
        first, second = (float(figure.removesuffix(" |")) for figure in figures)
        # SCGAN adds to PyTorch's cubic, which is a little sharper than Pillow's
        assert first == pytest.approx(second, abs=0.5 if title.startswith("PSNR") and network == "scgan" else 0.02)
    if network == "gfrnet":
        assert float(before[0]) > float(before[3])  # what was shrunk 8 times is further off
    assert float(cells(report, "same")[3]) > 0  # seconds a step


def test_r_is_judged_on_fulls_weights_with_strangers_guides_and_is_not_trained(faces, tmp_path, capsys):
    learned = {"learning_rate": 0.05, "ema": 0}
    variants = {"Full": {}, "-WG": {"variant": "-WG"}, "R": {"variant": "R"}}
    path = write_other(tmp_path / "tiny.yaml", faces, "gfrnet", learned, variants=variants, claims=[["Full", "R"]])

    report = ablate(read_settings(AblateConfig, path), command="the command")

    assert sorted(file.parent.relative_to(tmp_path / "runs") for file in tmp_path.glob("runs/*/*/last.pt")) == [
        Path("Full/seed0"), Path("_-WG/seed0"),
    ]  # fmt: skip
    full, strangers = (
        json.loads((tmp_path / f"runs/Full/seed0/{file}").read_text())["run"]["scores"]
        for file in ("scores.json", "scores-R.json")
    )
    assert (
        full.keys() == strangers.keys() == {f"{measure} ×{scale}" for measure in ("PSNR", "SSIM") for scale in (4, 8)}
    )
    assert len(full["PSNR ×4"]) == 2 and full["PSNR ×4"] != strangers["PSNR ×4"]
    assert cells(report, "Full")[1] == cells(report, "R")[1] != cells(report, "-WG")[1]
    assert sum(line.startswith("| Full over R") for line in report.splitlines()) == 4
    capsys.readouterr()

    assert ablate(read_settings(AblateConfig, path), command="the command") == report
    assert capsys.readouterr().out.count("nothing to do") == 3


def test_a_variant_whose_name_begins_with_a_hyphen_is_none_of_the_commands_options(faces, tmp_path, monkeypatch):
    variants = {
        "SCGAN": {}, "-D_SL": {"cycles": "forward"}, "-AL": {"losses": dict.fromkeys(("l1", "h1", "l2", "h2"), False)},
        "-fc": {"share": "all"},
    }  # fmt: skip
    path = write_other(tmp_path / "tiny.yaml", faces, "scgan", {"losses": {"gamma": 0.1}}, variants=variants)

    run_main(monkeypatch, path, "--only", "-D_SL", "--only", "-AL", "--seeds", 1)

    assert sorted(folder.name for folder in (tmp_path / "runs").iterdir()) == ["_-AL", "_-D_SL"]
    states = {name: load_checkpoint(tmp_path / f"runs/_{name}/seed0/last.pt") for name in ("-AL", "-D_SL")}
    assert states["-D_SL"]["others"].keys() == {"degraders", "L1", "H1"}
    assert states["-AL"]["others"].keys() == {"degraders"}
    assert states["-AL"]["config"]["losses"]["gamma"] == 0.1
    assert "Not run yet: SCGAN seed 0, -fc seed 0." in (tmp_path / "report.md").read_text()


# Claims


def test_a_claim_holds_does_not_hold_or_is_too_close_by_the_whole_interval():
    rng = np.random.default_rng(3)
    people = [f"{i // 2}" for i in range(40)]
    worse = rng.normal(23, 2, (3, 40))
    small = rng.normal(0, 0.05, (3, 40))

    better = compare(worse + 0.2 + small, worse, people)
    lesser = compare(worse - 0.2 + small, worse, people)
    alike = compare(worse + small - small.mean(), worse, people)

    assert (better.verdict, lesser.verdict, alike.verdict) == ("holds", "does not hold", "too close")
    assert 0.15 < better.low < better.gain < better.high < 0.25
    assert lesser.high < 0 and alike.low < 0 < alike.high
    assert better.by_seed == pytest.approx((0.2 + small).mean(axis=1))


def test_the_interval_redraws_seeds_as_well_as_people():
    people = [f"{i}" for i in range(50)]
    nothing = np.zeros((3, 50))
    by_seed = nothing + np.array([[0.3], [0.2], [-0.1]])
    by_person = nothing + np.where(np.arange(50) < 25, 0.3, -0.2)

    assert compare(by_seed, nothing, people).verdict == "too close"  # all people agree
    assert compare(by_seed[:2], nothing[:2], people).verdict == "holds"
    assert compare(by_person, nothing, people).verdict == "too close"  # all seeds agree


def test_many_photographs_of_one_person_are_one_person():
    gains = np.tile(np.r_[np.full(60, 0.4), [-0.2, 0.1, -0.1]], (3, 1))
    of_few = compare(gains, 0 * gains, ["one"] * 60 + ["two", "three", "four"])
    of_many = compare(gains, 0 * gains, [f"{i}" for i in range(63)])

    assert of_many.verdict == "holds" and of_few.verdict == "too close"


# The command and its config


@pytest.mark.parametrize(
    ("base", "changes", "told"),
    [
        ({}, {"claims": [["gated", "mean"]]}, "claims: no variant is called mean"),
        ({}, {"variants": {"a": {"network": "vgg"}}, "claims": []}, "variants.a: network: 'vgg' is unknown"),
        ({}, {"variants": {"a": {"preset": "huge"}}, "claims": []}, "variants.a: preset: sgen has no 'huge'"),
        ({}, {"variants": {"a": {"override": {"m": 1}}}, "claims": []}, "variants.a: .*unexpected keyword"),
        ({}, {"variants": {"a/b": {}}, "claims": []}, "variants.a/b"),
        ({}, {"sizes": [130]}, "sizes.0"),
        ({}, {"typo": 1}, "typo: Extra inputs"),
        ({"seed": 1, "minutes": 5}, {}, "minutes, seed: set by the ablation"),
        ({}, {"variants": {"a": {"share": "all"}}, "claims": []}, "variants.a: share: Extra inputs"),
        ({}, {"variants": {"a": {"network": "scgan"}}, "claims": []}, "'scgan' is not trained as 'sgen'"),
        ({}, {"variants": {"a": {"paper": {"FID": 9}}}, "claims": []}, "variants.a.paper: FID is not measured here"),
        ({}, {"variants": {"_a": {}}, "claims": []}, "variants._a"),
        ({}, {"pairs": "pairs.txt"}, "pairs: GFRNet is judged by listed pairs"),
        ({"protocols": {"sgen": 1, "sisn": 1}}, {}, "base.protocols: give one alone"),
        ({"protocols": {"surveillance": 1}}, {}, "base.protocols: give one alone"),
        ({"network": "sisn", "override": {"scale": 8}}, {"variants": {"a": {}}, "claims": []}, "it enlarges 8 times"),
        ({"batch": 0}, {}, "base.batch"),
        ({"data": ["all.tar", "x/../all.tar"]}, {"truths": "all.tar"}, "truths: the base run sees them"),
        ({}, {"seeds": [-1]}, "seeds.0"),
        ({}, {"truths": "nowhere.tar"}, "nowhere.csv"),
    ],
)
def test_a_mistake_is_one_line_with_its_place_and_exit_code_2(
    faces, tmp_path, monkeypatch, capsys, base, changes, told
):
    path = write(tmp_path / "tiny.yaml", faces, base, **changes)

    with pytest.raises(SystemExit) as ended:
        run_main(monkeypatch, path)

    said = capsys.readouterr().err
    assert ended.value.code == 2
    assert said.count("\n") == 1 and re.search(told, said)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("network", "base", "changes", "told"),
    [
        ("gfrnet", {}, {"pairs": None}, "pairs: GFRNet is judged by listed pairs"),
        ("gfrnet", {"side": 50}, {}, "variants.a: side: 50 is no multiple of"),
        ("gfrnet", {}, {"variants": {"a": {"variant": "-X"}}}, "variants.a: variant: Input should be 'Full'"),
        ("gfrnet", {"steps": 0}, {}, "base.steps"),
        ("scgan", {"share": "body"}, {"variants": {"a": {"cycles": "forward"}}}, "variants.a: share body"),
        ("scgan", {}, {"variants": {"a": {"losses": {"l3": False}}}}, "variants.a: losses.l3"),
    ],
)
def test_a_mistake_in_another_kind_of_training_is_one_line_with_its_place_too(
    faces, tmp_path, monkeypatch, capsys, network, base, changes, told
):
    path = write_other(tmp_path / "tiny.yaml", faces, network, base, **{"variants": {"a": {}}, **changes})

    with pytest.raises(SystemExit) as ended:
        run_main(monkeypatch, path)

    said = capsys.readouterr().err
    assert ended.value.code == 2
    assert said.count("\n") == 1 and re.search(told, said)


@pytest.mark.parametrize("text", ["variants: [", "", "just words"])
def test_a_file_that_is_no_config_is_one_line_too(tmp_path, monkeypatch, capsys, text):
    path = tmp_path / "tiny.yaml"
    path.write_text(text)

    with pytest.raises(SystemExit) as ended:
        run_main(monkeypatch, path)

    assert ended.value.code == 2 and capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "told"),
    [(["--only", "mean"], "no variant is called mean; there are gated, maximum"), (["--seeds", "0"], "one at least")],
)
def test_a_choice_that_is_none_is_one_line_too(faces, tmp_path, monkeypatch, capsys, arguments, told):
    with pytest.raises(SystemExit) as ended:
        run_main(monkeypatch, write(tmp_path / "tiny.yaml", faces), *arguments)

    said = capsys.readouterr().err
    assert ended.value.code == 2 and told in said and said.count("\n") == 1


@pytest.fixture(scope="module")
def shipped() -> dict[str, AblateConfig]:
    """What can be read here can begin: every network of it was built."""
    return {path.stem: read_settings(AblateConfig, path) for path in (ROOT / "configs/ablate").glob("*.yaml")}


def test_the_shipped_ablations_have_three_seeds_and_write_where_their_names_say(shipped):
    assert len(shipped) == 12
    for name, config in shipped.items():
        assert len(config.seeds) == 3 and config.claims
        assert config.report == ROOT / f"docs/results/ablation-{name}.md"
        assert config.runs == (ROOT / "runs").resolve() / f"ablate/{name}"
        assert config.truths.name == "faces_test.tar" not in [path.name for path in config.base.data]


def test_the_shipped_ablations_quote_the_papers_as_the_protocols_do(shipped):
    papers = {stem: {name: variant.paper for name, variant in c.variants.items()} for stem, c in shipped.items()}
    sgen = {"PSNR": np.mean(PAPER_SGEN_PSNR[SGEN_NOISE]), "SSIM": np.mean(PAPER_SGEN_SSIM)}

    for mse_net in (papers["sgen-ensembles"]["sgu"], papers["sgen-n"]["N = 3"], papers["sgen-rivals"]["SGEN"]):
        assert mse_net["PSNR"] == pytest.approx(sgen["PSNR"], abs=0.005)
        assert mse_net["SSIM"] == pytest.approx(sgen["SSIM"], abs=0.00005)
    assert tuple(papers["sisn-rivals"]["SISN"].values()) == PAPER_SISN[4]["SISN"]


def test_nothing_is_claimed_that_the_papers_own_figures_deny(shipped):
    for config in shipped.values():
        for pair in config.claims:
            better, worse = (config.variants[name].paper for name in pair)
            for measure in better.keys() & worse.keys():
                assert (better[measure] < worse[measure]) == (measure == "LPIPS"), (pair, measure)


def test_the_shipped_ablations_of_gfrnet_and_scgan_are_all_rows_of_their_tables(shipped):
    def runs(name: str) -> list[Any]:
        return [shipped[name].run(variant, 0) for variant in shipped[name].variants]

    assert [run.variant for run in runs("gfrnet-all")] == [*VARIANTS] == [*shipped["gfrnet-all"].variants]
    assert {run.share for run in runs("scgan-sharing")} == {*get_args(Share)}
    assert [run.cycles for run in runs("scgan-branches")] == ["both", "forward", "backward"]
    assert len({run.losses.adversarial for run in runs("scgan-adversarial")}) == 16
    assert [(bool(run.losses.adversarial), run.losses.pixel, run.losses.cycle) for run in runs("scgan-losses")] == [
        (True, True, True), (False, True, True), (True, False, True), (True, True, False), (True, True, True),
    ]  # fmt: skip
