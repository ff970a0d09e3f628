import importlib.util
import json
import sys

import onnx
import pytest
from onnx import TensorProto, helper

from engines import benchmark
from engines.benchmark import EAGER, buckets, input_size, left_out, main, measure, restorers, table
from engines.card import CARD_KEY, read_network
from engines.roofline import Device, count
from engines.store import Model, ModelStore, default_store
from engines.trt import TensorRtCompiler, gpu_found

without_rtx = pytest.mark.skipif(not importlib.util.find_spec("tensorrt_rtx"), reason="the extra rtx is not installed")
without_gpu = pytest.mark.skipif(gpu_found(), reason="there is a GPU here")
without_torch = pytest.mark.skipif(not importlib.util.find_spec("torch"), reason="the extra train is not installed")


def test_a_restorer_that_enlarges_is_given_an_input_smaller_by_its_scale(card):
    assert input_size(card, (208, 176)) == (208, 176)
    assert input_size(card.model_copy(update={"scales": (4,)}), (208, 176)) == (52, 44)


def test_an_input_is_padded_to_the_networks_multiple(card):
    sized = card.model_copy(update={"scales": (4, 2, 1), "enlarge": "cubic", "size_multiple": 16})

    assert input_size(sized, (200, 176)) == (208, 176)


def test_a_guided_restorer_has_one_size_of_result(card):
    guided = card.model_copy(update={"result_size": 256, "enlarge": "cubic", "scales": ()})

    assert input_size(guided, (64, 48)) == (256, 256)


def test_every_network_is_timed_on_every_backend_at_every_batch_size(card, make_network):
    models = [Model.read(make_network(f"{name}.onnx", card.model_copy(update={"name": name}))) for name in ("a", "b")]

    timings = measure(models, [(32, 24), (16, 16)], [1, 3], threads=1, rounds=2)

    told = [(t.network, t.backend, t.precision, t.batch, t.height, t.width) for t in timings]
    runs = [(batch, *size) for batch in (1, 3) for size in ((32, 24), (16, 16))]
    assert {(name, "onnxruntime-cpu", "fp32", *run) for name in ("a", "b") for run in runs} <= set(told)
    assert len(told) == len(set(told))
    for timing in timings:
        assert timing.items_per_second * timing.ms_per_item == pytest.approx(1000)
        assert timing.x_eager is timing.roofline_share is None


def test_a_network_made_for_one_image_is_timed_at_one(card, make_network):
    shape = (1, 3, 16, 16)
    fixed = card.model_copy(update={"inputs": (card.inputs[0].model_copy(update={"shape": shape}),)})

    model = Model.read(make_network("one.onnx", fixed, shape))
    timings = measure([model], [(64, 64), (32, 32)], [1, 8], threads=1, rounds=1)

    assert {(timing.batch, timing.height, timing.width) for timing in timings} == {(1, 16, 16)}
    assert len({timing.backend for timing in timings}) == len(timings), "one size, once"


def test_a_run_is_told_with_its_cost_and_its_share_of_the_roofline(card, make_network):
    model = Model.read(make_network(card=card))
    device = Device(peak_flops=1e9, bandwidth=1e30)

    timings = measure([model], [(32, 24)], [1, 3], threads=1, rounds=1, device=device)

    for timing in timings:
        work = count(read_network(model.path), {"image": (timing.batch, 3, 32, 24)})
        seconds = timing.batch / timing.items_per_second
        assert (timing.flops, timing.bytes) == (work.flops, work.bytes)
        assert timing.roofline_share == pytest.approx(work.flops / 1e9 / seconds)


def test_a_network_of_several_inputs_is_given_all_of_them(card, make_network):
    image, guide = card.inputs[0], card.inputs[0].model_copy(update={"name": "guide"})
    guided = card.model_copy(update={"task": "guided-restoration", "inputs": (image, guide), "result_size": 16})
    path = make_network()
    network = onnx.load(path)
    network.graph.input.append(helper.make_tensor_value_info("guide", TensorProto.FLOAT, ("n", 3, "h", "w")))
    network.graph.node[1].CopyFrom(helper.make_node("Add", ["convolved", "guide"], ["result"]))
    network.metadata_props.add(key=CARD_KEY, value=guided.model_dump_json())
    onnx.save(network, path)

    (first, *_) = measure([Model.read(path)], [(64, 64)], [2], threads=1, rounds=1)

    assert (first.batch, first.height, first.width) == (2, 16, 16)


def test_a_network_whose_cost_cannot_be_counted_is_timed_all_the_same(card, make_network, caplog):
    path = make_network(card=card)
    network = onnx.load(path)
    network.graph.node.append(helper.make_node("NonZero", ["result"], ["places"]))
    network.graph.node.append(helper.make_node("Abs", ["places"], ["unused"]))
    onnx.save(network, path)

    timings = measure([Model.read(path)], [(16, 16)], [1], threads=1, rounds=1, device=Device(1e9, 1e9))

    assert all(timing.flops is timing.roofline_share is None for timing in timings)
    assert "| - | - | - |" in table(timings)
    (record,) = caplog.records
    assert "tiny: its operations cannot be counted" in record.getMessage()


def test_without_a_name_every_restorer_that_is_here_is_meant(card, make_network, tmp_path):
    for name, task in {"a": "restoration", "b": "embedding", "c": "guided-restoration"}.items():
        make_network(f"here/{name}.onnx", card.model_copy(update={"name": name, "task": task}))

    assert restorers(ModelStore([tmp_path / "here"], tmp_path / "cache")) == ["a", "c"]


@without_torch
def test_torch_eager_takes_part_one_face_at_a_time(card, make_network, caplog):
    foreign = Model.read(make_network(card=card))
    shipped = default_store(offline=True).find("sisn-small")

    timings = measure([foreign, shipped], [(32, 32), (24, 32)], [2], threads=1, rounds=1, eager=True)

    eager = {(t.height, t.width): t for t in timings if t.backend.startswith(EAGER)}
    assert {(t.network, t.precision, t.batch, t.x_eager) for t in eager.values()} == {("sisn-small", "fp32", 1, 1.0)}
    assert eager.keys() == {(8, 8), (6, 8)}
    for timing in timings:
        if timing.network == "sisn-small":
            one = eager[timing.height, timing.width]
            assert timing.x_eager == pytest.approx(timing.items_per_second / one.items_per_second)
        else:
            assert timing.x_eager is None
    (record,) = caplog.records
    assert "tiny: eager takes no part" in record.getMessage()


def test_without_torch_eager_takes_no_part_and_one_line_says_so(card, make_network, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "torch", None)

    timings = measure([Model.read(make_network(card=card))], [(16, 16)], [1], threads=1, rounds=1, eager=True)

    assert timings and not [timing for timing in timings if timing.backend.startswith(EAGER)]
    (record,) = caplog.records
    assert "PyTorch is not installed" in record.getMessage()


@pytest.mark.parametrize(
    ("flavour", "gpu", "reason"),
    [
        (None, True, "TensorRT: not installed"),
        ("tensorrt", False, "TensorRT: there is no NVIDIA GPU with a driver for tensorrt here"),
        ("tensorrt-lean", True, "TensorRT: its lean runtime builds no plans"),
        ("tensorrt", True, None),
        ("tensorrt-rtx", True, None),
    ],
)
def test_tensorrt_takes_part_where_it_builds_plans_and_there_is_a_gpu(monkeypatch, flavour, gpu, reason):
    monkeypatch.setattr(benchmark, "tensorrt_installed", lambda: flavour)
    monkeypatch.setattr(benchmark, "gpu_found", lambda: gpu)

    assert [line for line in left_out() if line.startswith("TensorRT")] == ([reason] if reason else [])


@without_rtx
@without_gpu
def test_a_backend_that_fails_is_told_and_the_others_are_timed(card, make_network, monkeypatch, caplog):
    monkeypatch.setattr(benchmark, "gpu_found", lambda: True)  # TensorRT itself sees that there is none

    timings = measure([Model.read(make_network(card=card))], [(16, 16)], [1], threads=1, rounds=1)

    assert timings and not [timing for timing in timings if timing.backend.startswith("tensorrt")]
    said = [record.getMessage() for record in caplog.records]
    assert [line.split(":")[0] for line in said] == [
        f"tiny on tensorrt-rtx in {precision} takes no part" for precision in ("fp16", "bf16", "fp32")
    ]


@without_rtx
@pytest.mark.parametrize("fixed", [False, True], ids=["any batch", "one image"])
def test_tensorrt_builds_for_all_sizes_that_are_timed(card, make_network, fixed):
    shape = (1, 3, 16, 16) if fixed else ("n", 3, "h", "w")
    spec = card.inputs[0].model_copy(update={"shape": shape})
    model = Model.read(make_network("sized.onnx", card.model_copy(update={"inputs": (spec,)}), shape))
    tuned = buckets(model.card, [(16, 16)] if fixed else [(16, 16), (24, 32)], 4)

    plan = TensorRtCompiler("tensorrt-rtx", capabilities=["8.6"], level=0).build(model, "fp16", tuned, threads=1)

    assert plan
    assert [bucket.shapes["image"] for bucket in tuned] == (
        [((1, 3, 16, 16),) * 3] if fixed else [tuple((n, 3, *size) for n in (1, 4, 4)) for size in ((16, 16), (24, 32))]
    )


@without_gpu
def test_the_last_line_is_json_and_one_line_tells_what_takes_no_part(card, make_network, monkeypatch, capsys, caplog):
    sizes = ["--size", "16x16", "--size", "24x16"]
    monkeypatch.setattr(sys, "argv", ["benchmark", str(make_network(card=card)), *sizes, "--rounds", "1"])

    main()

    said = capsys.readouterr().out.splitlines()
    timings = json.loads(said[-1])
    assert {timing["network"] for timing in timings} == {"tiny"}
    assert {timing["height"] for timing in timings} == {16, 24}
    assert all(timing["roofline_share"] > 0 for timing in timings if timing["backend"].endswith("-cpu"))
    assert len(said) == 1 + 2 + len(timings) + 1, "device, head of the table, its rows, JSON"
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith("left out: ") and "\n" not in line
    assert "ONNX Runtime CUDA: this ONNX Runtime has no CUDA provider" in line and "TensorRT: " in line


@pytest.mark.parametrize("wrong", [["--size", "16"], ["--size", "0x16"], ["--batches", "1,x"], ["--rounds", "0"]])
def test_numbers_that_are_none_are_one_line_and_exit_code_2(card, make_network, monkeypatch, capsys, wrong):
    monkeypatch.setattr(sys, "argv", ["benchmark", str(make_network(card=card)), *wrong])

    with pytest.raises(SystemExit) as ended:
        main()

    assert ended.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_network_that_is_not_there_is_one_line_and_exit_code_2(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sys, "argv", ["benchmark", str(tmp_path / "none.onnx")])

    with pytest.raises(SystemExit) as ended:
        main()

    assert ended.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1
