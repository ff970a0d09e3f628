"""Plans from the operator's side: `streamer engines`, and a plan that takes over in mid-stream."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import combinations
from pathlib import Path

import numpy as np
import onnx
import pytest
from media import walk, write_video
from onnx import TensorProto, helper, numpy_helper

from engines.card import CARD_KEY, NetworkCard, TensorSpec
from engines.compile import Request
from engines.load import Backend, Plans, building
from engines.ov import OpenVinoCompiler, openvino_installed
from engines.plan import PlanStore
from engines.serving import ServingEngine
from engines.store import Model, cache_folder, default_store
from streamer import wire
from streamer.assembly import Networks, load_stages, make_cameras, make_pipeline, threads_for, wanted
from streamer.camera import Camera
from streamer.client import EventSubscriber
from streamer.config import StreamerConfig, load_config
from streamer.guided import Guide
from streamer.metrics import Metrics
from streamer.plans import check_plans, compile_plans, requests
from streamer.samples import faces, guided_proof
from streamer.types import Frame

pytestmark = pytest.mark.skipif(not openvino_installed(), reason="needs the extra openvino")


@pytest.fixture
def blur(tmp_path: Path) -> Path:
    """A restorer that blurs: small enough for a plan to be proven in seconds."""
    image = TensorSpec(name="image", layout="NCHW", shape=("n", 3, "h", "w"))
    card = NetworkCard(
        name="blur", task="restoration", inputs=(image,), outputs=(image.model_copy(update={"name": "restored"}),),
        scales=(1,), output_range=(0.0, 255.0), license="public domain",
    )  # fmt: skip
    kernel = np.zeros((3, 3, 3, 3), np.float32)
    kernel[range(3), range(3)] = 1 / 9
    graph = helper.make_graph(
        [helper.make_node("Conv", ["image", "kernel"], ["restored"], "blurring", pads=[1, 1, 1, 1])],
        "blur",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, image.shape)],
        [helper.make_tensor_value_info("restored", TensorProto.FLOAT, image.shape)],
        [numpy_helper.from_array(kernel, "kernel")],
    )
    network = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    network.metadata_props.add(key=CARD_KEY, value=card.model_dump_json())
    onnx.save(network, tmp_path / "blur.onnx")
    return tmp_path / "blur.onnx"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of its own, with the detector that was fetched."""
    monkeypatch.delenv("STREAMER__ENGINE__BACKEND")
    detector = cache_folder() / "models" / "centerface.onnx"
    (tmp_path / "cache/models").mkdir(parents=True)
    shutil.copy(detector, tmp_path / "cache/models")
    monkeypatch.setenv("STREAMER_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def config(tmp_path: Path, blur: Path, cache: Path) -> Path:
    film = write_video(tmp_path / "walk.mp4", walk(24), rate=12)
    path = tmp_path / "camera.yaml"
    path.write_text(
        f"cameras:\n- name: door\n  url: {film}\ndetector:\n  size: 448\nrestorer:\n  name: {blur}\n"
        f"selector:\n  retry_s: 0.1\nengine:\n  backend: openvino\n  precision: fp32\n  threads: 1\n"
        f"publish:\n  endpoint: ipc://{tmp_path}/events\n  wait_for: 1\n"
    )
    return path


@pytest.fixture
def warping(tmp_path: Path) -> Path:
    """A guided restorer: the mean of the crop and of the guide, warped by a flow that both decide."""
    image = {"layout": "NCHW", "shape": ("n", 3, 64, 64)}
    mask = TensorSpec(name="mask", layout="NCHW", shape=("n", 1, 64, 64))
    card = NetworkCard(
        name="warping", task="guided-restoration", result_size=64, output_range=(-1.0, 1.0), license="public domain",
        mean=(127.5,) * 3, std=(127.5,) * 3,
        inputs=tuple(TensorSpec(name=name, **image) for name in ("image", "guide")),
        outputs=(*(TensorSpec(name=name, **image) for name in ("restored", "warped")), mask),
    )  # fmt: skip
    weight = np.random.default_rng(0).normal(0, 0.2, (3, 6, 3, 3)).astype(np.float32)
    nodes = [
        helper.make_node("Concat", ["image", "guide"], ["both"], axis=1),
        helper.make_node("Conv", ["both", "weight"], ["looked"], "looking", pads=[1, 1, 1, 1]),
        helper.make_node("Split", ["looked", "parts"], ["flow", "look"], axis=1),
        helper.make_node("Sigmoid", ["look"], ["mask"]),
        helper.make_node("Transpose", ["flow"], ["grid"], perm=[0, 2, 3, 1]),
        helper.make_node("GridSample", ["guide", "grid"], ["warped"], padding_mode="border", align_corners=1),
        helper.make_node("Add", ["image", "warped"], ["sum"]),
        helper.make_node("Mul", ["sum", "half"], ["restored"]),
    ]
    constants = {"weight": weight, "parts": np.array([2, 1]), "half": np.float32(0.5)}
    graph = helper.make_graph(
        nodes, "warping",
        [helper.make_tensor_value_info(spec.name, TensorProto.FLOAT, spec.shape) for spec in card.inputs],
        [helper.make_tensor_value_info(spec.name, TensorProto.FLOAT, spec.shape) for spec in card.outputs],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )  # fmt: skip
    network = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    network.metadata_props.add(key=CARD_KEY, value=card.model_dump_json())
    onnx.save(network, tmp_path / "warping.onnx")
    return tmp_path / "warping.onnx"


# In mid-stream


class GatedCamera(Camera):
    """Waits in the middle of its film until a gate opens."""

    gate: Callable[[], bool]

    def frames(self, *given: object, **named: object) -> Iterator[Frame]:
        for number, frame in enumerate(super().frames(*given, **named)):
            if number == 12:
                ends = time.monotonic() + 120
                while not self.gate() and time.monotonic() < ends:
                    time.sleep(0.05)
            yield frame


def play(config: Path, plans: Plans | None) -> list[wire.WireEvent]:
    """Run the film; the second half begins once no plan is being built any more."""
    settings, stop = load_config(config), threading.Event()
    backend = "auto" if plans else "onnxruntime"
    networks = Networks(default_store(offline=True), backend=backend, precision="fp32", threads=1, plans=plans)
    stages = load_stages(settings, networks)
    parts = (stages.engines["detector"], stages.engines["restorer"])
    assert all(isinstance(part, ServingEngine) is (plans is not None) for part in parts)
    (camera,) = make_cameras(settings, stop)
    gated = GatedCamera(camera.name, str(settings.cameras[0].url.get_secret_value()), stop=stop)
    gated.gate = lambda: all(building(part) is None for part in parts)
    pipeline = make_pipeline(settings, [gated], stages, metrics=Metrics(), stop=stop)
    received: list[wire.WireEvent] = []

    def listen() -> None:
        with EventSubscriber(settings.publish.endpoint, timeout_s=120) as events:
            received.extend(events)

    listener = threading.Thread(target=listen)
    listener.start()
    pipeline.run()
    listener.join(60)
    stages.close()
    return received


def test_a_plan_takes_over_in_mid_stream_and_no_event_is_lost_doubled_or_out_of_order(
    config: Path, tmp_path: Path
) -> None:
    plain = play(config, None)
    served = play(config, Plans(PlanStore(tmp_path / "plans")))

    def said(events: list[wire.WireEvent]) -> list[tuple[str, int, int]]:
        faces = [event.header for event in events if event.topic == "face/door"]
        return [(header.kind, header.track, header.frame) for header in faces]

    assert said(served) == said(plain)
    assert [event.header.seq for event in served] == list(range(len(served)))
    identified = [event for event in served if event.header.kind == "face.identified"]
    ran_on = [event.header.restoration.backend for event in identified]
    assert ran_on[0] == "onnxruntime-cpu" and ran_on[-1] == "openvino-cpu"
    assert ran_on == sorted(ran_on)  # once over, it stays
    before = [event for event in plain if event.header.kind == "face.identified"]
    for one, other in zip(before, identified, strict=True):
        difference = one.images["restored"].astype(int) - other.images["restored"]
        assert np.abs(difference).max() <= 1
    states = [event.header for event in served if event.header.kind == "system.status"]
    assert states[0].building.keys() == {"detector", "restorer"}
    assert states[-1].building == {}
    assert all(len(entry["plan"]) == 12 for entry in states[-1].engines.values())


# Guided restorers


def guided_networks(backend: Backend, plans: Plans | None = None) -> Networks:
    return Networks(default_store(offline=True), backend=backend, precision="fp32", threads=1, plans=plans)


def compiled(wishes: Sequence[Request], store: PlanStore) -> list[str]:
    said: list[str] = []
    assert compile_plans(wishes, store, said.append, lambda name, what, share: None)
    return said


def test_a_guided_restorer_that_a_config_names_is_proven_and_restores_from_its_plan(
    config: Path, warping: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STREAMER__RESTORER__NAME", str(warping))
    store = PlanStore(tmp_path / "plans")
    networks = guided_networks("openvino", Plans(store, build=False))
    (crop, landmarks), (photo, points) = faces(40)[0], faces(64)[1]

    _, named = wanted(load_config(config), networks)
    said = compiled(requests([named], backend="openvino", precision="fp32", threads=1), store)
    planned = networks.guided_restorer(str(warping))

    (record,) = store.records()
    assert "warping on openvino-cpu in fp32 passes:" in said[0]
    assert (planned.engine.plan, planned.engine.backend) == (record.key, "openvino-cpu")
    assert record.chosen is not None
    assert record.chosen.cases == 3 * (1 + 2 + 4 + 8), "outputs, places in the batches"
    plain = guided_networks("onnxruntime").guided_restorer(str(warping))
    (here,), (there,) = (each.restore(crop, landmarks, [Guide("", photo, points)]) for each in (planned, plain))
    assert np.abs(here.restored.astype(int) - there.restored).max() <= 1
    assert np.abs(there.restored.astype(int) - photo).max() > 50


def test_a_guided_restorers_plan_that_looks_elsewhere_in_the_guide_is_found_out(warping: Path, tmp_path: Path) -> None:
    store, said = PlanStore(tmp_path / "plans"), list[str]()
    named = guided_networks("openvino", Plans(store)).guided_wanted(str(warping))
    wishes = requests([named], backend="openvino", precision="fp32", threads=1)
    compiled(wishes, store)
    elsewhere = onnx.load(warping)
    weight = elsewhere.graph.initializer[0]
    weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight)[[1, 0, 2]], weight.name))  # x and y
    onnx.save(elsewhere, tmp_path / "elsewhere.onnx")
    _plan_of(tmp_path / "elsewhere.onnx", wishes[0].key, store)

    whole = check_plans(wishes, store, said.append)

    assert not whole and store.find(wishes[0].key) is None
    assert "fails and is removed: restored at place 1 of 1 is" in said[-1]


def test_without_a_plan_a_guided_restorer_runs_on_what_needs_none(warping: Path, cache: Path) -> None:
    networks = guided_networks("auto", Plans(PlanStore(cache / "plans"), build=False))

    restorer = networks.guided_restorer(str(warping))

    assert (restorer.engine.plan, restorer.engine.backend) == ("", "openvino-cpu")


def test_a_guided_restorer_is_proven_on_seven_faces_each_with_its_own_guide(warping: Path) -> None:
    proof = guided_proof(Model.read(warping), max_batch=8)

    samples, (bucket,) = proof.samples(), proof.buckets()

    shapes = ((1, 3, 64, 64), (8, 3, 64, 64), (8, 3, 64, 64))
    assert bucket.shapes == {"image": shapes, "guide": shapes}
    assert len(samples) == 7
    for name in ("image", "guide"):
        given = [sample[name] for sample in samples]
        assert {(each.shape, each.dtype.name) for each in given} == {((1, 3, 64, 64), "float32")}
        assert min(np.abs(one - other).mean() for one, other in combinations(given, 2)) > 0.05
    assert min(np.abs(sample["image"] - sample["guide"]).mean() for sample in samples) > 0.05


# How networks are loaded


def test_networks_leave_cores_to_the_decoding_of_many_cameras() -> None:
    def config(cameras: int, **engine: object) -> StreamerConfig:
        sources = [{"name": f"c{number}", "url": "rtsp://127.0.0.1/"} for number in range(cameras)]
        return StreamerConfig.model_validate({"cameras": sources, "engine": engine})

    cores = len(os.sched_getaffinity(0))
    assert threads_for(config(1)) == cores
    assert threads_for(config(12)) == max(1, cores - 1)
    assert threads_for(config(10 * cores)) == 1
    assert threads_for(config(12, threads=3)) == 3


# The commands


def test_engines_compile_builds_what_is_missing_and_list_and_check_know_it(
    streamer: Callable[..., tuple[int, str, str]], config: Path, blur: Path
) -> None:
    code, out, progress = streamer("engines", "compile", config)
    again, there, _ = streamer("engines", "compile", config)
    _, listed, _ = streamer("engines", "list")
    _, as_json, _ = streamer("engines", "list", "--json")
    checked, said, _ = streamer("engines", "check", config)

    assert (code, again, checked) == (0, 0, 0)
    for name in ("blur", "centerface"):
        assert f"{name} on openvino-cpu in fp32 passes:" in out
        assert f"{name}: there is one already: {name} on openvino-cpu: the plan is fp32" in there
        assert f"{name}: the plan " in said and f"{name}: fp32: comparing" in progress
    assert [line.split()[:3] for line in listed.splitlines()] == [
        ["blur", "openvino-cpu", "fp32"], ["centerface", "openvino-cpu", "fp32"],
    ]  # fmt: skip
    assert [record["network"] for record in json.loads(as_json)] == ["blur", "centerface"]


def spoiled(network: Path) -> Path:
    """Write the network with other weights."""
    changed = onnx.load(network)
    changed.graph.initializer[0].CopyFrom(numpy_helper.from_array(np.ones((3, 3, 3, 3), np.float32), "kernel"))
    other = network.with_name("other.onnx")
    onnx.save(changed, other)
    return other


def test_engines_check_removes_a_plan_that_fails(
    streamer: Callable[..., tuple[int, str, str]], config: Path, blur: Path, cache: Path
) -> None:
    """A plan that gives something else, with a record that says it passed: only proving it anew tells."""
    store = PlanStore(cache / "plans")
    assert streamer("engines", "compile", config)[0] == 0
    keys = {record.network: record.key for record in store.records()}
    _plan_of(spoiled(blur), keys["blur"], store)

    code, said, _ = streamer("engines", "check", config)

    assert code == 1
    assert "blur: the plan " in said and "fails and is removed: restored at place 1 of 1 is" in said
    assert store.find(keys["blur"]) is None and store.find(keys["centerface"]) is not None


def _plan_of(network: Path, key: str, store: PlanStore) -> None:
    """Put the plan of another network under a key, with a record that looks right."""
    plan = OpenVinoCompiler().build(Model.read(network), "fp32", (), threads=1)
    kept = store.find(key)
    assert kept is not None
    with store.building(key):
        store.keep(kept.record.model_copy(update={"plan_sha256": hashlib.sha256(plan).hexdigest()}), plan)


def test_plans_that_were_made_elsewhere_are_kept_once_they_are_proven_here(
    streamer: Callable[..., tuple[int, str, str]], config: Path, cache: Path, tmp_path: Path
) -> None:
    assert streamer("engines", "compile", config)[0] == 0
    elsewhere = tmp_path / "elsewhere"
    (cache / "plans").rename(elsewhere)

    code, said, _ = streamer("engines", "add", elsewhere, config)
    empty, _, error = streamer("engines", "add", cache / "models", config)

    assert code == 0 and "blur on openvino-cpu in fp32 passes:" in said
    assert {record.network for record in PlanStore(cache / "plans").records()} == {"blur", "centerface"}
    assert empty == 2 and "holds no plan for centerface, blur" in error


def test_a_wrong_plan_that_was_made_elsewhere_is_not_kept(
    streamer: Callable[..., tuple[int, str, str]], config: Path, blur: Path, cache: Path, tmp_path: Path
) -> None:
    assert streamer("engines", "compile", config)[0] == 0
    (key,) = [record.key for record in PlanStore(cache / "plans").records() if record.network == "blur"]
    _plan_of(spoiled(blur), key, PlanStore(cache / "plans"))
    (cache / "plans").rename(tmp_path / "elsewhere")

    code, said, _ = streamer("engines", "add", tmp_path / "elsewhere", config)

    assert code == 1 and "blur on openvino-cpu in fp32 is refused: restored at place 1 of 1 is" in said
    kept = {record.network: record.precision for record in PlanStore(cache / "plans").records()}
    assert kept == {"centerface": "fp32"}


def test_run_offline_builds_nothing(streamer: Callable[..., tuple[int, str, str]], config: Path, cache: Path) -> None:
    with EventSubscriber(load_config(config).publish.endpoint, timeout_s=120) as events:
        listener = threading.Thread(target=lambda: [*events])
        listener.start()
        code, _, _ = streamer("run", config, "--offline")
        listener.join(30)

    assert code == 0 and not (cache / "plans").exists()


def test_engines_plan_chooses_buckets_from_a_histogram_or_refuses_it_in_a_line(
    streamer: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    histogram = tmp_path / "sizes.json"
    histogram.write_text('{"24": 10, "40": 3, "64": 1}')

    code, out, _ = streamer("engines", "plan", "--from", histogram, "--count", 2, "--restorer", "sgen-small")
    _, as_json, _ = streamer("engines", "plan", "--from", histogram, "--count", 2, "--json")
    histogram.write_text('{"24": -1}')
    wrong, _, error = streamer("engines", "plan", "--from", histogram)

    assert code == 0 and out.splitlines()[-1].startswith("restorer.buckets: [96, ")
    assert json.loads(as_json)["sides"][0] == 96
    assert wrong == 2 and len(error.splitlines()) == 1 and str(histogram) in error


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["compile", "nowhere.yaml"], "nowhere.yaml: No such file or directory"),
        (["compile", "--offline"], "--offline"),
        (["add", "nowhere"], "nowhere: no such folder"),
        (["compile", "--portable", "plans"], "TensorRT"),
    ],
)
def test_what_cannot_be_done_is_one_line_and_exit_code_2(
    streamer: Callable[..., tuple[int, str, str]], cache: Path, arguments: list[str], said: str
) -> None:
    code, _, error = streamer("engines", *arguments)

    assert code == 2 and len(error.splitlines()) == 1
    assert said in error
