"""The TensorRT engine on a GPU, against ONNX Runtime on the CPU."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from skimage.data import astronaut
from skimage.transform import resize

from engines.engine import EngineError
from engines.ort import OnnxEngine
from engines.plan import Bucket
from engines.store import Model
from engines.trt import TensorRtCompiler, TensorRtEngine, tensorrt_installed

pytestmark = pytest.mark.skipif(tensorrt_installed() is None, reason="TensorRT is not installed")

WEIGHTS = sorted((Path(__file__).parents[2] / "models/weights").glob("*.onnx"))
PRECISIONS = {"fp32": 60, "fp16": 40, "bf16": 40}  # dB; fp32 is exact but for the order of sums
BATCHES = (1, 2, 3, 4, 8, 16, 64)


def sides(model: Model) -> tuple[int, ...]:
    """Return two sizes of input, whose results are 64 and 128 px; a guided restorer's are of one size."""
    if model.card.result_size:
        return (model.card.result_size,)
    scale = min(model.card.scales) if model.card.enlarge == "none" else 1
    return 64 // scale, 128 // scale


def buckets(model: Model) -> list[Bucket]:
    shapes = [tuple((n, 3, side, side) for n in (1, 8, 64)) for side in sides(model)]
    return [Bucket({spec.name: each for spec in model.card.inputs}) for each in shapes]


def faces(n: int, side: int) -> np.ndarray:
    """Return n faces, each another: one that takes another's place is seen."""
    picture = resize(astronaut()[0:224, 112:336], (side, side), anti_aliasing=True).astype(np.float32)
    image = picture.transpose(2, 0, 1) * 2 - 1
    return np.stack([np.roll(image, place, axis=2) * (1 - place / 128) for place in range(n)]).astype(np.float32)


def fed(model: Model, images: np.ndarray) -> dict[str, np.ndarray]:
    """Return what is fed with these faces; a guide is the face mirrored."""
    mirrored = np.ascontiguousarray(images[..., ::-1])
    return {spec.name: mirrored if spec.name == "guide" else images for spec in model.card.inputs}


def psnr(first: np.ndarray, second: np.ndarray) -> float:
    return float(10 * np.log10(4 / max(np.mean((first.astype(np.float64) - second) ** 2), 1e-12)))


@pytest.fixture(scope="module")
def plans() -> dict[tuple[str, str], bytes]:
    return {}


def made(model: Model, precision: str, plans: dict[tuple[str, str], bytes], max_batch: int = 64) -> TensorRtEngine:
    key = (model.card.name, precision)
    if key not in plans:
        plans[key] = TensorRtCompiler(level=1).build(model, precision, buckets(model))
    return TensorRtCompiler().load(plans[key], model, precision, buckets(model), max_batch=max_batch)


@pytest.fixture
def sgen() -> Model:
    return Model.read(next(path for path in WEIGHTS if path.stem == "sgen-small"))


@pytest.fixture
def engine(sgen: Model, plans: dict[tuple[str, str], bytes]) -> Iterator[TensorRtEngine]:
    engine = made(sgen, "fp16", plans)
    yield engine
    engine.close()


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("path", WEIGHTS, ids=lambda path: path.stem)
def test_every_place_of_every_batch_is_what_onnx_runtime_gives(
    path: Path, precision: str, plans: dict[tuple[str, str], bytes]
) -> None:
    model = Model.read(path)
    exact, engine = OnnxEngine(model), made(model, precision, plans)

    for side in sides(model):
        images = faces(max(BATCHES), side)
        wanted = np.concatenate([exact.run(**fed(model, image[None]))["restored"] for image in images])
        for n in BATCHES:
            for again in range(3):  # plainly, captured, from the graph
                given = engine.run(**fed(model, images[:n]))["restored"]
                worst = min(psnr(*pair) for pair in zip(given, wanted[:n], strict=True))
                assert worst >= PRECISIONS[precision], f"{side} px, batch {n}, run {again + 1}: {worst:.1f} dB"
    engine.close()


def test_from_the_second_run_on_a_shape_is_a_graph_and_the_result_the_same(engine: TensorRtEngine) -> None:
    if engine.backend == "tensorrt-rtx":
        pytest.skip("TensorRT-RTX makes its graphs itself")
    first = engine.run(image=faces(4, 64))["restored"]
    (ready,) = engine._ready.values()
    assert ready._graph is None

    second, third = (engine.run(image=faces(4, 64))["restored"] for _ in range(2))

    assert ready._graph is not None
    np.testing.assert_array_equal(first, second)
    np.testing.assert_array_equal(first, third)


def test_a_later_run_leaves_earlier_outputs_alone(engine: TensorRtEngine) -> None:
    first = engine.run(image=faces(2, 64))["restored"]
    kept = first.copy()

    engine.run(image=-faces(2, 64))

    np.testing.assert_array_equal(first, kept)


def test_sizes_and_batches_may_come_in_any_order(engine: TensorRtEngine) -> None:
    order = [(1, 64), (5, 128), (64, 64), (5, 128), (1, 64), (2, 128)]
    alone = {side: engine.run(image=faces(1, side))["restored"][0] for side in (64, 128)}

    for n, side in order:
        given = engine.run(image=faces(n, side))["restored"]
        assert given.shape == (n, 3, side, side)
        assert psnr(given[0], alone[side]) > 50


def test_what_is_in_none_of_the_buckets_is_refused_and_the_engine_runs_on(engine: TensorRtEngine) -> None:
    for shape in ((1, 3, 96, 96), (65, 3, 64, 64), (0, 3, 64, 64), (1, 4, 64, 64)):
        with pytest.raises(EngineError, match="sgen-small") as raised:
            engine.run(image=np.zeros(shape, np.float32))
        assert "\n" not in str(raised.value)

    assert engine.run(image=faces(1, 64))["restored"].shape == (1, 3, 64, 64)


def test_two_engines_in_two_threads_do_not_disturb_each_other(sgen: Model, plans: dict[tuple[str, str], bytes]) -> None:
    wanted = {side: OnnxEngine(sgen).run(image=faces(4, side))["restored"] for side in (64, 128)}
    worst: dict[int, float] = {}

    def restore(side: int) -> None:
        own = made(sgen, "fp16", plans)
        runs = [own.run(image=faces(4, side))["restored"] for _ in range(50)]
        own.close()
        worst[side] = min(psnr(run, wanted[side]) for run in runs)

    made(sgen, "fp16", plans).close()  # the plan is built once, before
    threads = [threading.Thread(target=restore, args=(side,)) for side in wanted]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert worst.keys() == wanted.keys()
    assert min(worst.values()) >= 40


def test_a_closed_engine_does_not_run_and_has_given_its_memory_back(
    sgen: Model, plans: dict[tuple[str, str], bytes]
) -> None:
    from cuda.bindings import runtime

    made(sgen, "fp16", plans).close()  # what CUDA takes once and keeps
    before = runtime.cudaMemGetInfo()[1]
    engine = made(sgen, "fp16", plans)
    engine.run(image=faces(64, 128))
    assert runtime.cudaMemGetInfo()[1] < before

    engine.close()
    engine.close()

    assert before - runtime.cudaMemGetInfo()[1] < 16 << 20
    with pytest.raises(EngineError, match="the engine is closed"):
        engine.run(image=faces(1, 64))


@pytest.mark.parametrize("damage", ["empty", "text", "truncated"])
def test_a_corrupt_plan_is_refused_in_one_line(sgen: Model, plans: dict[tuple[str, str], bytes], damage: str) -> None:
    made(sgen, "fp16", plans).close()
    good = plans["sgen-small", "fp16"]
    plan = {"empty": b"", "text": b"not a plan" * 99, "truncated": good[: len(good) // 2]}[damage]

    with pytest.raises(EngineError, match="TensorRT cannot load the plan") as raised:
        TensorRtCompiler().load(plan, sgen, "fp16", buckets(sgen))
    assert "\n" not in str(raised.value)


def test_a_plan_of_other_sizes_is_refused(sgen: Model, plans: dict[tuple[str, str], bytes]) -> None:
    made(sgen, "fp16", plans).close()

    with pytest.raises(EngineError, match="of another network, or for other sizes"):
        TensorRtCompiler().load(plans["sgen-small", "fp16"], sgen, "fp16", buckets(sgen)[:1])


def test_a_smaller_largest_batch_takes_less_memory_and_holds(sgen: Model, plans: dict[tuple[str, str], bytes]) -> None:
    small = made(sgen, "fp16", plans, max_batch=3)

    assert small.max_batch == 3
    assert small.run(image=faces(3, 64))["restored"].shape == (3, 3, 64, 64)
    with pytest.raises(EngineError, match="up to 3 items"):
        small.run(image=faces(4, 64))
    small.close()


def test_what_a_plan_depends_on_is_known() -> None:
    facts = TensorRtCompiler().facts()

    assert facts["gpu"] and facts["driver"] and facts["tensorrt"]
    assert float(facts["capability"]) >= 7.5
