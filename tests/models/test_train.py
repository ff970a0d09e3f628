import pytest

torch = pytest.importorskip("torch", reason="the extra train is not installed")

import json  # noqa: E402
import shutil  # noqa: E402
import sys  # noqa: E402
from pathlib import Path  # noqa: E402

import cv2  # noqa: E402
import numpy as np  # noqa: E402
import onnxruntime  # noqa: E402
import yaml  # noqa: E402
from skimage.data import astronaut  # noqa: E402

from engines.card import NetworkCard  # noqa: E402
from models.checkpoint import build, load_checkpoint  # noqa: E402
from models.dataset import load_faces  # noqa: E402
from models.export import export  # noqa: E402
from models.train import Batches, TrainConfig, TrainError, main, train  # noqa: E402

# torch's exporter uses what torch deprecates
exports = pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning", "ignore::DeprecationWarning")


@pytest.fixture(scope="module")
def faces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of crops of one face, cut at several sizes."""
    folder = tmp_path_factory.mktemp("faces")
    whole = np.ascontiguousarray(astronaut()[..., ::-1])
    for index, side in enumerate((208, 220, 240, 256)):
        cv2.imwrite(str(folder / f"{index}.png"), cv2.resize(whole[0:224, 112:336], (side, side)))
    return folder


def config(faces: Path, out: Path, **changes: object) -> TrainConfig:
    settings: dict[str, object] = {
        "override": {"base": 4}, "data": [faces], "validation": faces, "out": out,
        "steps": 6, "batch": 2, "validate_every": 3, **changes,
    }  # fmt: skip
    return TrainConfig.model_validate(settings)


@pytest.fixture(scope="module")
def trained(faces: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run")
    train(config(faces, out))
    return out


def test_a_run_killed_and_resumed_ends_with_the_same_weights_bit_for_bit(faces, trained, tmp_path):
    # the whole plan is 6 steps in both; the first run stops after 3, where last.pt was written
    class Killed(Exception):
        pass

    original = Batches.__getitem__

    def breaking(self: Batches, index: int):
        if self.first + index == 4:
            raise Killed
        return original(self, index)

    Batches.__getitem__ = breaking  # type: ignore[method-assign]
    try:
        with pytest.raises(Killed):
            train(config(faces, tmp_path))
    finally:
        Batches.__getitem__ = original  # type: ignore[method-assign]
    assert load_checkpoint(tmp_path / "last.pt")["step"] == 3

    train(config(faces, tmp_path))

    whole, resumed = (load_checkpoint(folder / "last.pt") for folder in (trained, tmp_path))
    assert resumed["step"] == whole["step"] == 6
    for name, weight in whole["weights"].items():
        assert torch.equal(weight, resumed["weights"][name]), name
    for name, weight in whole["averaged"].items():
        assert torch.equal(weight, resumed["averaged"][name]), name


@pytest.fixture
def half(trained: Path, tmp_path: Path) -> Path:
    """A folder with the last.pt of the run of 6 steps."""
    out = tmp_path / "run"
    out.mkdir()
    shutil.copy(trained / "last.pt", out)
    return out


def test_a_run_of_another_config_is_not_resumed(faces, half):
    with pytest.raises(TrainError, match=r"last\.pt .*paper_share 0\.45, now 0\.9.*--accept-changes"):
        train(config(faces, half, steps=8, paper_share=0.9))

    assert load_checkpoint(half / "last.pt")["step"] == 6


def test_a_run_goes_on_under_another_config_where_that_is_accepted(faces, half):
    train(config(faces, half, steps=8, paper_share=0.9), accept_changes=True)

    state = load_checkpoint(half / "last.pt")
    assert (state["step"], state["config"]["paper_share"]) == (8, 0.9)


def test_a_longer_run_and_data_that_moved_are_no_change(faces, half, tmp_path):
    elsewhere = shutil.copytree(faces, tmp_path / "moved" / faces.name)

    train(config(elsewhere, half, steps=8, workers=1))

    assert load_checkpoint(half / "last.pt")["step"] == 8


def test_weights_that_a_network_did_not_have_before_begin_untrained_and_the_rest_goes_on(faces, half, capsys):
    wider = {"base": 4, "detail": 4}
    with pytest.raises(TrainError, match=r"network\.detail 12, now 4"):
        train(config(faces, half, steps=7, override=wider))

    train(config(faces, half, steps=7, override=wider), accept_changes=True)

    said = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("untrained: "))
    assert all(name.startswith("detail.") for name in said.removeprefix("untrained: ").split(", "))
    steps = {int(moment["step"]) for moment in load_checkpoint(half / "last.pt")["optimizer"]["state"].values()}
    assert steps == {1, 7}


def test_fewer_steps_than_are_done_is_said_and_is_no_failure(faces, half, monkeypatch, capsys):
    path = half / "run.yaml"
    settings = config(faces, half).model_dump(mode="json")
    path.write_text(yaml.safe_dump(settings))
    before = (half / "last.pt").read_bytes()
    monkeypatch.setattr(sys, "argv", ["train", str(path), "--steps", "4"])

    main()

    assert "6 steps already, 4 are asked for: nothing to do" in capsys.readouterr().out
    assert (half / "last.pt").read_bytes() == before


def test_a_changed_config_is_one_line_and_exit_code_2(faces, half, monkeypatch, capsys):
    path = half / "run.yaml"
    path.write_text(yaml.safe_dump(config(faces, half, batch=4).model_dump(mode="json")))
    monkeypatch.setattr(sys, "argv", ["train", str(path)])

    with pytest.raises(SystemExit) as ended:
        main()

    assert ended.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_faces_that_are_all_too_small_are_named_instead_of_being_looked_for_without_end(faces, tmp_path):
    small = tmp_path / "small"
    small.mkdir()
    for path in faces.glob("*.png"):
        cv2.imwrite(str(small / path.name), cv2.resize(cv2.imread(str(path)), (96, 96)))

    with pytest.raises(TrainError, match=rf"largest of 4 in {small} has 96 px, at least 167 px"):
        train(config(small, tmp_path / "run"))


def test_a_checkpoint_carries_what_makes_its_network_again(trained):
    state = load_checkpoint(trained / "best.pt")

    network = build(state["network"])
    network.load_state_dict(state["weights"])

    assert network.config.base == 4
    assert state["config"]["batch"] == 2


@exports
def test_the_exported_network_agrees_with_torch_at_any_batch_and_size(trained, tmp_path):
    state = load_checkpoint(trained / "best.pt")
    path = tmp_path / "tiny.onnx"

    export(state, path, name="tiny", license="test", trained_on="one face")
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    network = build(state["network"])
    network.load_state_dict({k: v.half().float() if v.numel() >= 256 else v for k, v in state["weights"].items()})

    for shape in ((1, 3, 32, 32), (3, 3, 48, 16), (2, 3, 160, 64)):
        image = np.random.default_rng(0).uniform(-1, 1, shape).astype(np.float32)
        with torch.no_grad():
            expected = network.eval()(torch.from_numpy(image)).numpy()
        assert np.abs(session.run(None, {"image": image})[0] - expected).max() < 1e-4


@exports
def test_the_exported_card_is_one_that_the_engines_read(trained, tmp_path):
    path = tmp_path / "tiny.onnx"
    export(load_checkpoint(trained / "best.pt"), path, name="tiny", license="test")

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    card = NetworkCard(**json.loads(session.get_modelmeta().custom_metadata_map["streamer.card"]))

    assert (card.name, card.task, card.scales, card.size_multiple) == ("tiny", "restoration", (4, 2, 1), 16)
    assert card.enlarge == "cubic"


def test_batches_are_a_function_of_seed_and_step(faces, tmp_path):
    loaded = load_faces(faces)
    whole = Batches(loaded, config(faces, tmp_path), first=0)
    resumed = Batches(loaded, config(faces, tmp_path), first=2)

    for one, other in zip(whole[3], resumed[1], strict=True):
        assert np.array_equal(one, other)


def test_nothing_on_the_list_is_loaded(faces):
    names = {face.name for face in load_faces(faces)}
    left_out = frozenset({f"{faces.name}/1.png"})

    assert {face.name for face in load_faces(faces, exclude=left_out)} == names - left_out
