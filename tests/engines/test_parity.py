"""The proof notices what is wrong: a number, a place in the batch, a colour, a layer."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from engines.card import CARD_KEY, NetworkCard
from engines.engine import EngineError
from engines.ort import OnnxEngine
from engines.parity import LEAST_DB, batch_sizes, compare, first_apart, time_each
from engines.store import Model


@pytest.fixture
def model(make_network: Callable[..., Path], card: NetworkCard) -> Model:
    return Model.read(make_network(card=card))


def samples(*sides: int) -> list[dict[str, np.ndarray]]:
    random = np.random.default_rng(0)
    return [{"image": random.random((1, 3, side, side), dtype=np.float32)} for side in sides for _ in range(3)]


class Spoiled(OnnxEngine):
    """A real engine whose results something happens to."""

    def __init__(self, model: Model, spoil: Callable[[np.ndarray], np.ndarray], max_batch: int = 8) -> None:
        super().__init__(model, threads=1, max_batch=max_batch)
        self.spoil = spoil

    def run(self, **inputs: np.ndarray) -> dict[str, np.ndarray]:
        outputs = super().run(**inputs)
        return {**outputs, "result": self.spoil(outputs["result"].copy())}


def set_one(value: float, place: int) -> Callable[[np.ndarray], np.ndarray]:
    def spoil(result: np.ndarray) -> np.ndarray:
        if len(result) > place:
            result[place, 0, 3, 4] = value
        return result

    return spoil


def test_an_engine_that_gives_the_same_passes_at_every_batch_size_place_and_shape(model: Model) -> None:
    parity = compare(OnnxEngine(model, threads=1, max_batch=8), OnnxEngine(model, threads=1), samples(8, 24))

    assert parity.refused == ""
    assert parity.unit == "dB" and parity.worst > 100
    assert parity.cases == 2 * 2 * (1 + 2 + 4 + 8)  # shapes, outputs, places


@pytest.mark.parametrize(
    ("most", "sizes"), [(1, [1]), (8, [1, 2, 4, 8]), (6, [1, 2, 4, 6]), (500, [1, 2, 4, 8, 16, 32, 64])]
)
def test_batches_are_the_powers_of_two_and_the_largest_there_is(most: int, sizes: list[int]) -> None:
    assert batch_sizes(most) == sizes


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (set_one(np.nan, 0), r"result at place 1 of 1 holds what is no number"),
        (set_one(np.inf, 6), r"result at place 7 of 8 holds what is no number"),
        (set_one(1e3, 3), r"result at place 4 of 4 is .* dB like ONNX Runtime's"),
        (lambda result: np.zeros_like(result), r"place 1 of 1 has one value everywhere"),
        (lambda result: result[..., 1:], r"has shape \(1, 3, 24, 23\), not \(1, 3, 24, 24\)"),
        (lambda result: result[::-1], r"result at place 1 of 2 is"),
        (lambda result: np.roll(result, 3, axis=0), r"result at place 1 of 2 is"),
        (lambda result: result + 0.1, r"result at place 1 of 1 is"),
    ],
    ids=["nan", "inf far back", "one wild pixel", "one colour", "shape", "reversed", "rotated", "brighter"],
)
def test_what_is_wrong_is_refused_and_named(model: Model, spoil: Callable[[np.ndarray], np.ndarray], said: str) -> None:
    parity = compare(Spoiled(model, spoil), OnnxEngine(model, threads=1), samples(24))

    assert parity.refused and parity.worst < LEAST_DB
    assert re.search(said, parity.refused) and "\n" not in parity.refused


def test_places_whose_samples_are_the_same_are_told_apart(model: Model) -> None:
    """Three samples fill eight places: what swaps places 1 and 4, which show the same face, is still seen."""

    def swap(result: np.ndarray) -> np.ndarray:
        return result[[3, 1, 2, 0, *range(4, len(result))]] if len(result) >= 4 else result

    parity = compare(Spoiled(model, swap), OnnxEngine(model, threads=1), samples(24))

    assert "place 1 of 4" in parity.refused


def test_a_floor_of_its_own_lets_a_coarser_precision_pass(model: Model) -> None:
    def round_off(result: np.ndarray) -> np.ndarray:
        return np.round(result * 8) / 8

    reference, engine = OnnxEngine(model, threads=1), Spoiled(model, round_off)
    worst = compare(engine, reference, samples(24), least_db=0).worst

    assert 20 < worst < 60
    assert compare(engine, reference, samples(24), least_db=worst - 1).refused == ""
    assert compare(engine, reference, samples(24), least_db=worst + 1).refused


def test_embeddings_are_compared_by_their_direction(make_network: Callable[..., Path], card: NetworkCard) -> None:
    embedding = card.model_copy(update={"task": "embedding", "outputs": card.outputs[:1]})
    model = Model.read(make_network(card=embedding))
    reference = OnnxEngine(model, threads=1)

    longer = compare(Spoiled(model, lambda result: 3 * result), reference, samples(8))
    turned = compare(Spoiled(model, lambda result: result + 0.2), reference, samples(8))

    assert longer.refused == "" and longer.unit == "cosine" and longer.worst > 0.99999
    assert "cosine like ONNX Runtime's" in turned.refused


def test_without_samples_nothing_is_proven(model: Model) -> None:
    with pytest.raises(EngineError, match="no samples"):
        compare(OnnxEngine(model, threads=1), OnnxEngine(model, threads=1), [])


def test_the_first_value_that_differs_is_found_in_the_order_given(model: Model) -> None:
    reference = OnnxEngine(model, threads=1)
    (sample,) = samples(8)[:1]

    assert first_apart(Spoiled(model, lambda result: -result), reference, sample, ["mean", "result"]) == "result"
    assert first_apart(reference, reference, sample, ["mean", "result"]) is None


def test_engines_are_timed_in_turn(model: Model) -> None:
    ran: list[int] = []

    def engine(number: int) -> Spoiled:
        def note(result: np.ndarray) -> np.ndarray:
            ran.append(number)
            return result

        return Spoiled(model, note)

    times = time_each([engine(0), engine(1)], samples(8)[0], seconds=0.01)

    assert len(times) == 2 and min(times) > 0
    assert ran[:2] == [0, 1] and ran[2:] == [0, 1] * (len(ran) // 2 - 1)


def test_a_guided_restorers_mask_is_compared_by_what_it_could_be_not_by_what_it_is(
    make_network: Callable[..., Path], card: NetworkCard
) -> None:
    """A mask that is all but shut everywhere differs by its own span, and by nothing that anybody could see."""
    mask = card.outputs[0].model_copy(update={"name": "mask"})
    changes = {"task": "guided-restoration", "output_range": (0.0, 1.0), "outputs": (card.outputs[1], mask)}
    network = onnx.load(make_network(card=card))
    network.graph.node.append(helper.make_node("Mul", ["result", "little"], ["mask"]))
    network.graph.initializer.append(numpy_helper.from_array(np.float32(1e-7), "little"))
    network.graph.output.append(helper.make_tensor_value_info("mask", TensorProto.FLOAT, ("n", 3, "h", "w")))
    del network.metadata_props[:]
    network.metadata_props.add(key=CARD_KEY, value=card.model_copy(update=changes).model_dump_json())
    path = make_network("guided.onnx", card)
    onnx.save(network, path)
    guided = Model.read(path)

    class Shut(OnnxEngine):
        def run(self, **inputs: np.ndarray) -> dict[str, np.ndarray]:
            outputs = super().run(**inputs)
            return {**outputs, "mask": np.full_like(outputs["mask"], self.value)}

        value = 0.0

    shut, half_open = (Shut(guided, threads=1, max_batch=2) for _ in range(2))
    half_open.value = 0.5

    assert compare(shut, OnnxEngine(guided, threads=1), samples(8)).refused == ""
    assert "mask at place 1 of 1" in compare(half_open, OnnxEngine(guided, threads=1), samples(8)).refused
