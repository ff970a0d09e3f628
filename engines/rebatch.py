"""Frees the batch axis of networks that were exported for one image at a time, where they stay exact."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import closing
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import onnx
from onnx import helper, numpy_helper
from onnx.external_data_helper import uses_external_data

from engines.card import CARD_KEY, NetworkCard, TensorSpec, read_network
from engines.engine import Engine, EngineError, ModelError
from engines.ort import OnnxEngine
from engines.store import Model

_BATCH = "n"
_TOLERANCE = 1e-5
"""As a share of an output's largest value: in a batch, sums may be taken in another order."""
_ROUNDING = 1e-6
"""Absolute: a sigmoid's values near 0 are no more exact than those near 1."""
_LEAST_SIDE = 64
"""Of a free axis, in the check."""
_CONTRASTS = ((255.0, 0.0), (80.0, 0.0), (12.0, 180.0))
"""Spans and least values of the pixels that a network is tried with: apart, so that a range taken over the whole batch
shows."""


def rebatch(model: Model, folder: Path) -> Model | None:
    """Return the network with a free batch axis, None where it has none to free or would not stay `exact`.

    Its file is made once and lies in `folder` under the sha256 of the original, which the result keeps: it is what
    events name. Raises CardError if the original cannot be read, ModelError if the folder cannot be written.
    """
    freed = rebatched(read_network(model.path), model.card)
    if freed is None:
        return None
    content = freed.SerializeToString(deterministic=True)
    card = free_card(model.card)
    path = folder / f"{model.sha256}.onnx"
    try:
        # what lies there was found exact, and is the same only if nobody has touched it
        if path.is_file() and path.read_bytes() == content:
            return Model(path, model.sha256, card)
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=folder, prefix=".rebatch-") as aside:
            part = Path(aside) / path.name
            part.write_bytes(content)
            if not _stays_exact(model, Model(part, model.sha256, card)):
                return None
            os.replace(part, path)
    except OSError as exc:
        raise ModelError(f"{path} cannot be written: {exc.strerror}") from exc
    return Model(path, model.sha256, card)


def rebatched(network: onnx.ModelProto, card: NetworkCard) -> onnx.ModelProto | None:
    """Return a copy of the network that carries `free_card`; whether it computes the same is for `exact` to say.

    None where an input or output of the card does not begin with a batch of 1, or weights lie outside the file.
    """
    fixed = all(spec.shape[:1] == (1,) for spec in card.inputs)
    apart = all(spec.shape[:1] in ((1,), (_BATCH,)) for spec in card.outputs)
    if not (fixed and apart) or any(map(uses_external_data, network.graph.initializer)):
        return None
    freed = onnx.ModelProto()
    freed.CopyFrom(network)
    weights = {weight.name for weight in freed.graph.initializer}
    inputs = [value for value in freed.graph.input if value.name not in weights]
    _free_axes([*inputs, *freed.graph.output])
    _free_reshapes(freed.graph, {value.name for value in inputs})
    del freed.graph.value_info[:]  # shapes at a batch of 1
    others = {prop.key: prop.value for prop in freed.metadata_props if prop.key != CARD_KEY}
    helper.set_model_props(freed, {**others, CARD_KEY: free_card(card).model_dump_json()})
    return freed


def free_card(card: NetworkCard) -> NetworkCard:
    """Return the card with the batch axis of inputs and outputs free, by the name n."""

    def freed(specs: Iterable[TensorSpec]) -> tuple[TensorSpec, ...]:
        return tuple(spec.model_copy(update={"shape": (_BATCH, *spec.shape[1:])}) for spec in specs)

    return card.model_copy(update={"inputs": freed(card.inputs), "outputs": freed(card.outputs)})


def exact(single: Engine, batched: Engine) -> bool:
    """Say whether `batched` makes of three different inputs at once what `single` makes of each, but for rounding.

    One engine may be both: then, whether a network keeps the items of its batch apart. Raises EngineError.
    """
    items = list(_items(single.card))
    alone = [single.run(**item) for item in items]
    together = batched.run(**{name: np.concatenate([item[name] for item in items]) for name in items[0]})
    return all(_same(together[name], [outputs[name] for outputs in alone]) for name in alone[0])


def _stays_exact(model: Model, freed: Model) -> bool:
    try:
        with closing(OnnxEngine(model, threads=1)) as single, closing(OnnxEngine(freed, threads=1)) as batched:
            return exact(single, batched)
    except EngineError:
        return False


def _items(card: NetworkCard) -> Iterator[dict[str, np.ndarray]]:
    """Yield inputs for a batch of one that differ in all their pixels, and in contrast."""
    random = np.random.default_rng(0)
    free_side = -(-_LEAST_SIDE // card.size_multiple) * card.size_multiple
    for span, least in _CONTRASTS:
        item = {}
        for spec in card.inputs:
            shape = (1, *(axis if isinstance(axis, int) else free_side for axis in spec.shape[1:]))
            pixels = span * random.random(shape) + least
            item[spec.name] = ((pixels - card.mean[0]) / card.std[0]).astype(spec.dtype)
        yield item


def _same(together: np.ndarray, alone: list[np.ndarray]) -> bool:
    """Compare an output of a batch with those of its items; the batch must be its first axis."""
    if alone[0].shape[:1] != (1,) or together.shape != (len(alone), *alone[0].shape[1:]):
        return False
    return all(
        bool(np.all(np.abs(of_batch - single[0]) <= _TOLERANCE * np.abs(single).max() + _ROUNDING))
        for of_batch, single in zip(together, alone, strict=True)
    )


def _free_axes(values: Iterable[onnx.ValueInfoProto]) -> None:
    for value in values:
        axes = value.type.tensor_type.shape.dim
        if axes:
            axes[0].dim_param = _BATCH


def _free_reshapes(graph: onnx.GraphProto, inputs: set[str]) -> None:
    """Let every Reshape to a constant batch of 1 keep the batch that comes; those of weights alone stay."""
    constants = _constants(graph)
    computed = set(inputs)
    shapes: list[onnx.NodeProto] = []
    for node in graph.node:
        if node.op_type == "Shape" or not computed.intersection(node.input):
            continue
        computed.update(node.output)
        if node.op_type != "Reshape" or len(node.input) < 2:
            continue
        target = constants.get(node.input[1])
        if target is None or len(target) < 2 or target[0] != 1 or 0 in target:
            continue
        name = f"{node.output[0]}/free_batch"
        kept = numpy_helper.from_array(np.array([0, *target[1:]], np.int64))  # 0: as it comes
        shapes.append(helper.make_node("Constant", [], [name], value=kept))
        node.input[1] = name
        for attribute in node.attribute:
            if attribute.name == "allowzero":
                attribute.i = 0
    for shape in shapes:
        graph.node.insert(0, shape)


def _constants(graph: onnx.GraphProto) -> dict[str, list[int]]:
    """Return the lists of numbers that do not depend on the inputs, by name."""
    tensors = {weight.name: weight for weight in graph.initializer}
    tensors |= {
        node.output[0]: attribute.t
        for node in graph.node
        if node.op_type == "Constant"
        for attribute in node.attribute
        if attribute.name == "value"
    }
    return {
        name: numpy_helper.to_array(tensor).tolist()
        for name, tensor in tensors.items()
        if len(tensor.dims) == 1 and tensor.data_type == onnx.TensorProto.INT64
    }
