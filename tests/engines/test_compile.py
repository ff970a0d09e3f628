"""A plan is built once, proven, and loaded only then; whatever ends a build early leaves nothing wrong behind."""

from __future__ import annotations

import hashlib
import logging
import os
import resource
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from engines.card import NetworkCard
from engines.compile import Build, Request, make, told
from engines.engine import Engine, EngineError
from engines.load import Plans, Proof, building, load_engine
from engines.ort import OnnxEngine
from engines.ov import OpenVinoCompiler, openvino_installed
from engines.parity import Sample
from engines.plan import PlanStore, Record
from engines.serving import ServingEngine
from engines.store import Model

pytestmark = pytest.mark.skipif(not openvino_installed(), reason="needs the extra openvino")
SPAWN = get_context("spawn")


@pytest.fixture
def model(make_network: Callable[..., Path], card: NetworkCard) -> Model:
    return Model.read(make_network(card=card))


@pytest.fixture
def store(tmp_path: Path) -> PlanStore:
    return PlanStore(tmp_path / "plans")


def samples(side: int = 16) -> list[Sample]:
    random = np.random.default_rng(0)
    return [{"image": random.random((1, 3, side, side), dtype=np.float32)} for _ in range(3)]


def slow_samples() -> list[Sample]:
    time.sleep(30)
    return samples()


PROOF = Proof(buckets=tuple, samples=samples)


def request(model: Model, **changes: object) -> Request:
    return replace(Request(model, OpenVinoCompiler(), (), samples, 4, 1, "fp32"), **changes)


def quiet(what: str, share: float) -> None:
    pass


@dataclass(frozen=True)
class Breaking(OpenVinoCompiler):
    """OpenVINO, but in one precision the convolution's weights are others, unless that layer is kept."""

    mixes = frozenset({"bf16"})
    change: Callable[[np.ndarray], np.ndarray]
    breaks: str = "bf16"
    offered: tuple[str, ...] = ("bf16", "fp32")

    def precisions(self, model: Model) -> tuple[str, ...]:
        return self.offered

    def build(self, model: Model, precision: str, *more: object, **how: object) -> bytes:
        keep = how.pop("keep", frozenset())
        if precision == self.breaks and "convolved" not in keep:
            network = onnx.load(model.path)
            weight = network.graph.initializer[0]
            changed = self.change(numpy_helper.to_array(weight)).astype(np.float32)
            weight.CopyFrom(numpy_helper.from_array(changed, weight.name))
            model = Model(model.path.with_name("wrong.onnx"), model.sha256, model.card)
            onnx.save(network, model.path)
        return super().build(model, "fp32", *more, **how)


# One plan


def test_a_plan_is_proven_kept_and_gives_what_onnx_runtime_gives(model: Model, store: PlanStore) -> None:
    record = make(request(model), store, quiet)

    found = store.find(request(model).key)
    assert found is not None and found.record == record
    assert record.precision == "fp32" and record.chosen is not None and record.chosen.worst > 60
    assert record.chosen.cases == 2 * (1 + 2 + 4)
    engine = request(model).load(found)
    feed = np.random.default_rng(5).random((3, 3, 20, 28), dtype=np.float32)
    expected = OnnxEngine(model, threads=1).run(image=feed)["result"]
    np.testing.assert_allclose(engine.run(image=feed)["result"], expected, atol=1e-4)
    assert (engine.backend, engine.precision, engine.max_batch) == ("openvino-cpu", "fp32", 4)


def test_a_plan_that_gives_something_else_is_refused_and_its_layer_is_tried_in_fp32(
    model: Model, store: PlanStore
) -> None:
    record = make(request(model, compiler=Breaking(lambda weight: -weight), precision="bf16"), store, quiet)

    first, second = record.attempts
    assert "result at place 1 of 1 is" in first.refused
    assert first.refused.endswith("dB like ONNX Runtime's; the first layer apart is convolved")
    assert (second.kept_fp32, second.refused) == (("convolved",), "")
    assert record.chosen == second
    assert "bf16, 1 layers in fp32 passes" in told(record)[1]


class Stubborn(Breaking):
    """Keeping a layer changes nothing."""

    def build(self, *given: object, keep: frozenset[str] = frozenset(), **how: object) -> bytes:
        return super().build(*given, **how)


def test_where_nothing_passes_there_is_no_plan_and_the_fallback_stays(model: Model, store: PlanStore) -> None:
    compiler = Stubborn(lambda weight: -weight, "fp32")

    record = make(request(model, compiler=compiler, precision="fp32"), store, quiet)

    assert record.precision == "" and record.chosen is None
    assert told(record)[-1] == "tiny on openvino-cpu: no plan, as no precision passed; it stays on ONNX Runtime"


@pytest.mark.parametrize(
    "change", [lambda weight: weight * 0, lambda weight: weight * np.nan], ids=["one colour", "no number"]
)
def test_the_next_precision_is_taken_where_one_fails(
    model: Model, store: PlanStore, monkeypatch: pytest.MonkeyPatch, change: Callable[[np.ndarray], np.ndarray]
) -> None:
    monkeypatch.setattr("engines.compile.time_each", lambda engines, sample: [1.0] * len(engines))

    record = make(request(model, compiler=Stubborn(change), precision="auto"), store, quiet)

    tried = [(attempt.precision, bool(attempt.refused)) for attempt in record.attempts]
    assert tried == [("bf16", True), ("bf16", True), ("fp32", False)]
    assert record.precision == "fp32" and "bf16 is refused" in told(record)[0]


def test_a_corrupt_plan_is_refused_in_one_line(model: Model) -> None:
    with pytest.raises(EngineError, match=r"tiny\.onnx cannot be loaded by OpenVINO") as raised:
        OpenVinoCompiler().load(b"no plan at all", model, "fp32", (), threads=1, max_batch=4)
    assert "\n" not in str(raised.value)


def test_where_onnx_runtime_is_the_faster_the_plan_is_not_used_unless_it_is_insisted_on(
    model: Model, store: PlanStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    paces = {"onnxruntime-cpu": 1.0, "openvino-cpu": 2.0}
    monkeypatch.setattr("engines.compile.time_each", lambda engines, sample: [paces[each.backend] for each in engines])

    record = make(request(model, precision="auto"), store, quiet)

    assert not record.pays and "ONNX Runtime is the faster here, and runs unless" in told(record)[-1]
    served, insisted = (
        load_engine(model, backend=backend, threads=1, max_batch=4, plans=Plans(store), proof=PROOF)
        for backend in ("auto", "openvino")
    )
    assert (served.backend, served.plan) == ("onnxruntime-cpu", "")
    assert (insisted.backend, insisted.plan) == ("openvino-cpu", record.key)
    assert not isinstance(served, ServingEngine) and not isinstance(insisted, ServingEngine)


def test_without_anything_to_prove_it_on_there_is_no_plan_and_no_verdict(model: Model, store: PlanStore) -> None:
    with pytest.raises(EngineError, match="nothing to prove its plan on"):
        make(request(model, samples=list), store, quiet)

    assert store.records() == []


def test_what_could_not_even_be_compared_is_no_verdict(model: Model, store: PlanStore) -> None:
    class OutOfMemory(OpenVinoCompiler):
        def load(self, *given: object, **how: object) -> Engine:
            raise EngineError("out of memory")

    with pytest.raises(EngineError, match="out of memory"):
        make(request(model, compiler=OutOfMemory()), store, quiet)

    assert store.records() == []


def test_a_plan_that_does_not_load_at_the_start_leaves_the_app_without_it(
    model: Model, store: PlanStore, caplog: pytest.LogCaptureFixture
) -> None:
    record = make(request(model), store, quiet)
    with store.building(record.key):
        broken = b"no plan that OpenVINO knows"
        store.keep(record.model_copy(update={"plan_sha256": hashlib.sha256(broken).hexdigest()}), broken)

    engine = load_engine(
        model, backend="openvino", precision="fp32", threads=1, max_batch=4, plans=Plans(store), proof=PROOF
    )

    assert engine.plan == "" and "no plan: " in caplog.text
    assert engine.run(image=np.zeros((1, 3, 8, 8), np.float32))["result"].shape == (1, 3, 8, 8)


def test_a_precision_that_is_not_to_be_had_here_is_said_and_fp32_runs(
    model: Model, store: PlanStore, caplog: pytest.LogCaptureFixture
) -> None:
    make(request(model), store, quiet)

    engine = load_engine(
        model, backend="openvino", precision="int8", threads=1, max_batch=4, plans=Plans(store), proof=PROOF
    )

    assert engine.precision == "fp32" and engine.plan == request(model).key
    assert "tiny cannot run in int8 on openvino-cpu: it runs in fp32" in caplog.text
    with pytest.raises(EngineError, match="OpenVINO has no fp16"):
        OpenVinoCompiler().build(model, "fp16", (), threads=1)


# Beside the running app


def wait(build: Build) -> Record | str:
    ends = time.monotonic() + 120
    while (outcome := build.outcome()) is None:
        assert time.monotonic() < ends
        time.sleep(0.05)
    return outcome


def test_the_app_runs_at_once_and_goes_over_between_two_batches(
    model: Model, store: PlanStore, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    feed = np.random.default_rng(5).random((2, 3, 20, 28), dtype=np.float32)

    engine = load_engine(model, backend="openvino", threads=1, max_batch=4, plans=Plans(store), proof=PROOF)
    first = load_engine(model, backend="auto", threads=1, max_batch=4, plans=Plans(store), proof=PROOF)

    assert isinstance(first, ServingEngine) and first.backend == "onnxruntime-cpu" and first.plan == ""
    before = first.run(image=feed)["result"]
    state = building(first)
    assert state is None or 0 <= state.share <= 1
    ends = time.monotonic() + 120
    while building(first) is not None and time.monotonic() < ends:
        time.sleep(0.05)
    assert first.run(image=feed)["result"].tobytes() == before.tobytes()  # not within a run
    first.take_over()
    after = first.run(image=feed)["result"]
    np.testing.assert_allclose(after, before, atol=1e-4)
    record = store.records()[0]
    assert first.plan == (record.key if record.pays else "")
    assert first.backend == ("openvino-cpu" if record.pays else "onnxruntime-cpu")
    assert "tiny on openvino-cpu in fp32 passes" in caplog.text
    for each in (engine, first):
        each.close()


def test_the_second_start_loads_the_plan_and_builds_nothing(model: Model, store: PlanStore) -> None:
    make(request(model, precision="auto"), store, quiet)
    record = store.records()[0]

    engine = load_engine(model, backend="openvino", threads=1, max_batch=4, plans=Plans(store), proof=PROOF)

    assert not isinstance(engine, ServingEngine) and building(engine) is None
    assert engine.plan == record.key


def test_offline_builds_nothing_and_says_once_which_command_does(
    model: Model, store: PlanStore, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)

    engine = load_engine(model, threads=1, plans=Plans(store, build=False), proof=PROOF)

    assert engine.plan == "" and not isinstance(engine, ServingEngine) and not store.folder.exists()
    assert caplog.text.count("`streamer engines compile` brings it") == 1


def test_a_plan_that_vanishes_before_it_is_taken_over_leaves_the_fallback(
    model: Model, store: PlanStore, caplog: pytest.LogCaptureFixture
) -> None:
    engine = load_engine(model, backend="openvino", threads=1, max_batch=4, plans=Plans(store), proof=PROOF)
    assert isinstance(engine, ServingEngine)
    while building(engine) is not None:
        time.sleep(0.05)
    if store.records()[0].precision:
        store.remove(store.records()[0].key)
        engine.take_over()
        assert "its plan does not load" in caplog.text and engine.plan == ""
    engine.close()


# What ends a build early


def test_a_build_that_is_killed_leaves_nothing_that_is_loaded_and_the_app_runs_on(
    model: Model, store: PlanStore, caplog: pytest.LogCaptureFixture
) -> None:
    proof = replace(PROOF, samples=slow_samples)
    engine = load_engine(model, threads=1, max_batch=4, plans=Plans(store), proof=proof)
    assert isinstance(engine, ServingEngine) and engine._build is not None
    ends = time.monotonic() + 60
    while not [*store.folder.glob(".*.lock")] and time.monotonic() < ends:
        time.sleep(0.05)

    os.kill(engine._build._process.pid, signal.SIGKILL)
    while building(engine) is not None and time.monotonic() < ends:
        time.sleep(0.05)

    assert engine.run(image=np.zeros((1, 3, 8, 8), np.float32))["result"].shape == (1, 3, 8, 8)
    assert engine.backend == "onnxruntime-cpu" and store.records() == []
    assert "died (exit -9); it stays on the fallback" in caplog.text
    assert make(request(model), store, quiet).precision == "fp32"  # the lock went with the process
    engine.close()


def test_an_app_that_ends_takes_its_builds_with_it(model: Model, store: PlanStore) -> None:
    build = Build(request(model, samples=slow_samples), store)
    process = build._process

    build.stop()

    assert not process.is_alive() and store.records() == []
    assert build.outcome() == "the app ended before it was built" and build.state() is None


def _make_on_a_full_disk(wanted: Request, folder: Path) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (200, 200))
    try:
        make(wanted, PlanStore(folder), quiet)
    except EngineError as exc:
        os._exit(0 if "the plan cannot be kept" in str(exc) and "\n" not in str(exc) else 3)
    os._exit(4)


def test_a_full_disk_ends_the_build_in_one_line_and_leaves_nothing(model: Model, store: PlanStore) -> None:
    process = SPAWN.Process(target=_make_on_a_full_disk, args=(request(model), store.folder))
    process.start()
    process.join(120)

    assert process.exitcode == 0
    assert store.records() == []
    assert [path.name for path in store.folder.iterdir() if not path.name.endswith(".lock")] == []


def _make_and_note(wanted: Request, folder: Path, out: Path) -> None:
    out.write_text(make(wanted, PlanStore(folder), quiet).model_dump_json())


def test_two_processes_that_want_the_same_plan_build_it_once(model: Model, store: PlanStore, tmp_path: Path) -> None:
    asked = tmp_path / "asked"
    wanted = request(model, samples=partial(_samples_counted, asked))
    notes = [tmp_path / f"{number}.json" for number in range(2)]
    processes = [SPAWN.Process(target=_make_and_note, args=(wanted, store.folder, note)) for note in notes]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)

    assert [process.exitcode for process in processes] == [0, 0]
    assert notes[0].read_text() == notes[1].read_text()
    assert asked.read_text() == "asked\n"


def _samples_counted(note: Path) -> Sequence[Sample]:
    with note.open("a") as file:
        file.write("asked\n")
    return samples()


def _app(wanted: Request, folder: Path, note: Path) -> None:
    build = Build(wanted, PlanStore(folder))
    note.write_text(str(build._process.pid))
    time.sleep(600)


def test_an_app_that_is_killed_takes_its_builds_with_it(model: Model, store: PlanStore, tmp_path: Path) -> None:
    note = tmp_path / "pid"
    app = SPAWN.Process(target=_app, args=(request(model, samples=slow_samples), store.folder, note))
    app.start()
    ends = time.monotonic() + 60
    while not [*store.folder.glob(".*.lock")] and time.monotonic() < ends:
        time.sleep(0.05)

    app.kill()
    app.join(30)

    while Path(f"/proc/{note.read_text()}/cmdline").exists() and time.monotonic() < ends:
        time.sleep(0.05)
    state = Path(f"/proc/{note.read_text()}/stat")
    assert not state.exists() or " Z " in state.read_text()
