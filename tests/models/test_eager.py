"""PyTorch eager, which the engines are measured against."""

import io
import json
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import helper, numpy_helper

torch = pytest.importorskip("torch", reason="the extra train is not installed")

from models.checkpoint import NETWORKS, build, describe  # noqa: E402
from models.eager import EagerNetwork, main, measure, serve  # noqa: E402

WEIGHTS = Path(__file__).parents[2] / "models" / "weights"
SHIPPED = [path for path in sorted(WEIGHTS.glob("*.onnx")) if path.stem != "embedder"]
"""The restorers."""
SMALL = next(path for path in SHIPPED if path.stem == "sisn-small")


def exported(path, network, *, inputs=("image",), scales=(), **changes):
    """Write an ONNX with a network's weights and card alone: no layers, as PyTorch needs none."""
    weights = [numpy_helper.from_array(w.numpy(), name) for name, w in network.state_dict().items()]
    model = helper.make_model(helper.make_graph([], "weights", [], [], weights))
    card = {"name": path.stem, "exporter": "models.export 1", "inputs": [{"name": each} for each in inputs]}
    model.metadata_props.add(key="streamer.card", value=json.dumps(card | {"scales": list(scales)} | changes))
    onnx.save(model, str(path))
    return path


def preset(name, preset, **changes):
    network = NETWORKS[name].network(NETWORKS[name].presets[preset])
    return build(describe(network) | changes)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_what_ships_restores_alike_in_eager_in_both_layouts(path):
    eager = EagerNetwork(path)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    session = onnxruntime.InferenceSession(str(path), options)
    names, rng = [value.name for value in session.get_inputs()], np.random.default_rng(0)
    width = 48 if names == ["image"] else 128  # a guide is halved six times
    size = (2, 3, *eager.input_size(64, width))
    images = {name: rng.uniform(-1, 1, size).astype(np.float32) for name in names}

    wanted = session.run(["restored"], images)[0]

    assert wanted.shape == (2, 3, 64, width)
    for layout in (torch.contiguous_format, torch.channels_last):
        with torch.inference_mode():
            network = eager.network.to(memory_format=layout)
            faces = [torch.from_numpy(image).contiguous(memory_format=layout) for image in images.values()]
            given = network(*faces).numpy()
        assert np.abs(given - wanted).max() < 1e-4


@pytest.mark.parametrize(
    ("name", "of", "said"),
    [
        ("gfrnet", "small", {"inputs": ("image", "guide")}),
        ("scgan", "small", {"scales": (4,)}),
        ("sisn", "small", {"scales": (2,)}),
    ],
)
def test_every_kind_of_network_is_found_by_its_weights_and_runs(tmp_path, name, of, said):
    scale = {"scale": said["scales"][0]} if name == "sisn" else {}
    network = preset(name, of, **scale)

    eager = EagerNetwork(exported(tmp_path / "restorer.onnx", network, **said))

    assert describe(eager.network) == describe(network)
    assert eager.seconds(*eager.input_size(64, 64), channels_last=True) > 0


def test_an_input_is_smaller_by_the_scale_and_padded_to_the_multiple(tmp_path):
    sisn = EagerNetwork(SMALL)
    sgen = EagerNetwork(exported(tmp_path / "sgen.onnx", preset("sgen", "small"), scales=(4, 2, 1)))

    assert sisn.input_size(208, 178) == (52, 45)
    assert sgen.input_size(208, 178) == (208, 192)


def test_the_faster_layout_is_told_of_each_network(tmp_path):
    class Paced(EagerNetwork):
        """Runs, and tells times that are known."""

        def seconds(self, height, width, *, channels_last):
            super().seconds(height, width, channels_last=channels_last)
            return 0.25 if channels_last else 0.5

    told = measure([Paced(SMALL)], (32, 24), rounds=1)

    assert told == [
        {"network": "sisn-small", "height": 8, "width": 6, "channels_last": True, "faces_per_second": 4.0},
    ]


def test_requests_are_answered_line_by_line(tmp_path, monkeypatch, capsys):
    foreign = tmp_path / "foreign.onnx"
    foreign.write_bytes(b"no network")
    asked = [{"network": 1, "height": 8, "width": 6, "channels_last": layout} for layout in (False, True)]
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{json.dumps(each)}\n" for each in asked)))

    serve([foreign, SMALL])

    problems, *seconds = map(json.loads, capsys.readouterr().out.splitlines())
    assert problems == [f"{foreign} is no ONNX", None]
    assert len(seconds) == 2 and min(seconds) > 0


def test_the_last_line_is_json(monkeypatch, capsys):
    threads = str(torch.get_num_threads())
    monkeypatch.setattr(sys, "argv", ["eager", str(SMALL), "--size", "32x24", "--rounds", "1", "--threads", threads])

    main()

    (told,) = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert told["network"] == "sisn-small" and told["faces_per_second"] > 0


@pytest.mark.parametrize("wrong", [["--size", "16"], ["--rounds", "0"], ["--threads", "0"]])
def test_numbers_that_are_none_are_one_line_and_exit_code_2(monkeypatch, capsys, wrong):
    assert refusal(monkeypatch, capsys, str(SMALL), *wrong)


def test_a_file_that_torch_cannot_run_is_one_line_and_exit_code_2(tmp_path, monkeypatch, capsys):
    network = preset("sisn", "small")
    of_others = exported(tmp_path / "others.onnx", network, exporter="pytorch")
    of_no_preset = exported(tmp_path / "narrow.onnx", preset("sisn", "small", width=8))

    assert "no such file" in refusal(monkeypatch, capsys, str(tmp_path / "none.onnx")).lower()
    assert "not written by models.export" in refusal(monkeypatch, capsys, str(of_others))
    assert "no preset" in refusal(monkeypatch, capsys, str(of_no_preset))


def refusal(monkeypatch, capsys, *arguments):
    """Run the program; it must end with exit code 2 and one line, which is returned."""
    monkeypatch.setattr(sys, "argv", ["eager", *arguments])

    with pytest.raises(SystemExit) as ended:
        main()

    said = capsys.readouterr().err
    assert ended.value.code == 2
    assert said.count("\n") == 1
    return said
