"""What a network says of itself. Nobody guesses a network from its shapes."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import onnx
from google.protobuf.message import DecodeError
from onnx.helper import tensor_dtype_to_np_dtype
from pydantic import BaseModel, ConfigDict, Field, ValidationError

Task = Literal["detection", "restoration", "guided-restoration", "embedding", "landmarks", "quality"]
Family = Literal["centerface", "scrfd", "yunet"]

CARD_KEY = "streamer.card"
"""Property of an ONNX that holds its card as JSON."""
REPAIRED_KEY = "streamer.repaired_from"
"""Property of a repaired ONNX: sha256 of the file as it was published, under which its card is found."""


class CardError(ValueError):
    """A network has no card, a wrong one, or one that does not fit its use."""


class TensorSpec(BaseModel):
    """One input or output."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    name: str
    """Its name in the ONNX."""
    dtype: str = "float32"
    """Of its elements."""
    layout: str
    """One letter an axis, such as NCHW."""
    shape: tuple[int | str, ...]
    """A number, or the name of a free axis."""


class Int8(BaseModel):
    """How a network is quantised to 8 bits, and what that costs; there only where it costs next to nothing."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    ranges: dict[str, tuple[float, float]]
    """What the activations reach, [low, high], by the tensor that a convolution is given."""
    skip: tuple[str, ...] = ()
    """Convolutions that stay in float32: names of nodes, or of their first output where a node has none."""
    faces: int | None = None
    """Of a restorer: how many faces the next three were measured on."""
    lost_db: float | None = None
    """Of a restorer: PSNR against the truth, float32 less INT8, in dB."""
    lost_identity: float | None = None
    """Of a restorer: cosine to the truth's embedding, float32 less INT8."""
    psnr: float | None = None
    """Of a restorer: INT8 against float32, in dB."""
    frames: int | None = None
    """Of a detector: how many frames the next three were counted on."""
    boxes: int | None = None
    """Of a detector: faces that float32 finds at the card's threshold."""
    lost_boxes: int | None = None
    """Of a detector: those of them that INT8 does not find again with an IoU of 0.8 at `weak_threshold`."""
    new_boxes: int | None = None
    """Of a detector: faces that INT8 finds at the threshold where float32 has none at `weak_threshold`."""


class NetworkCard(BaseModel):
    """What a network expects and gives. Outside everything is HWC uint8 BGR; `color`, `mean`, `std` apply inside."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    name: str
    """What configs and events call it."""
    task: Task
    """What it is for."""
    exporter: str = ""
    """Version and hash of the code that wrote the file; empty for foreign networks."""
    inputs: tuple[TensorSpec, ...]
    """In the network's order."""
    outputs: tuple[TensorSpec, ...]
    """In the network's order."""
    precision: Literal["fp32", "fp16", "int8"] = "fp32"
    """Of the arithmetic as the file has it."""
    color: Literal["RGB", "BGR"] = "RGB"
    """Order of the colour channels inside."""
    mean: tuple[float, float, float] = (0.0, 0.0, 0.0)
    """Subtracted from 0..255 pixels, in the order of `color`."""
    std: tuple[float, float, float] = (1.0, 1.0, 1.0)
    """Divides after `mean`."""
    output_range: tuple[float, float] | None = None
    """What black and white are in an output image."""
    scales: tuple[int, ...] = ()
    """Of a restorer: how many times as large the result may be, such as 4, 2, 1."""
    enlarge: Literal["nearest", "cubic", "none"] = "none"
    """Of a restorer: how the crop is brought to the result's size before the network; none: it enlarges by itself."""
    result_size: int | None = None
    """Of a guided restorer: side in pixels of its result, to which the crop is enlarged, whatever its size."""
    guide_laid: bool = False
    """Of a guided restorer: whether the guide is shifted, turned and scaled until its landmarks meet the crop's."""
    size_multiple: int = 1
    """Height and width of an input image are multiples of this."""
    alignment: tuple[tuple[float, float], ...] | None = None
    """Of an embedder: its five-point template, in pixels of `alignment_size`."""
    alignment_size: int | None = None
    """Of an embedder: side of its square input."""
    embedding_dim: int | None = None
    """Of an embedder: length of the embedding."""
    family: Family | None = None
    """Of a detector: how its outputs are decoded."""
    threshold: float | None = Field(None, gt=0, lt=1)
    """Of a detector: least score of a face that begins a track."""
    weak_threshold: float | None = Field(None, gt=0, lt=1)
    """Of a detector: least score that keeps a track alive."""
    int8: Int8 | None = None
    """How it runs in 8 bits on a CPU; none: it loses too much, or nobody has measured it."""
    license: str
    """Of the weights."""
    trained_on: str = ""
    """What data, in a sentence."""
    note: str = ""
    """What else an operator should know."""


class KnownNetwork(BaseModel):
    """One file of `engines/cards`: the card of a foreign network."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    """Of the network's file as it was published."""
    card: NetworkCard
    """What it would say of itself."""


def read_card(path: Path, family: Family | None = None) -> NetworkCard:
    """Return the card of an ONNX: from its metadata, from JSON beside it, or from `engines/cards` by its sha256.

    A detector that has none is taken for one of `family`. Raises CardError if the file is no ONNX network, has no card,
    or one that contradicts the family or the file's inputs and outputs.
    """
    network = read_network(path)
    card = _embedded(network, path) or _beside(path) or known_cards().get(_published_sha256(network, path))
    if card is None and family:
        return card_for_family(family, path)
    if card is None:
        raise CardError(
            f"{path} has no card: put one beside it as {path.stem}.json, "
            "or, for a face detector, set detector.family in the config"
        )
    if family and card.family != family:
        raise CardError(f"{path} is of the family {card.family or 'none'}, says its card; asked for is {family}")
    _check_fit(card, network, path)
    return card


def card_for_family(family: Family, path: Path) -> NetworkCard:
    """Return a card for a foreign detector: what all of its family share, and the file's own inputs and outputs."""
    network = read_network(path)
    rgb = NetworkCard(
        name=path.stem,
        task="detection",
        family=family,
        inputs=_specs(_inputs(network)),
        outputs=_specs(network.graph.output),
        size_multiple=32,
        threshold=0.5,
        weak_threshold=0.4,
        license="unknown: ask its publisher",
    )
    special: dict[Family, dict[str, object]] = {
        "centerface": {},
        "scrfd": {"mean": (127.5,) * 3, "std": (128.0,) * 3, "license": "unknown: InsightFace's are non-commercial"},
        "yunet": {"color": "BGR", "threshold": 0.6},
    }
    return rgb.model_copy(update=special[family])


def read_network(path: Path) -> onnx.ModelProto:
    """Read an ONNX file without weights that lie outside it. Raises CardError if it is none."""
    try:
        network = onnx.load(path, format="protobuf", load_external_data=False)
    except OSError as exc:
        raise CardError(f"{path}: {exc.strerror}") from exc
    except DecodeError as exc:
        raise CardError(f"{path} is not an ONNX network, or is damaged") from exc
    if not network.graph.output:
        raise CardError(f"{path} is not an ONNX network: it has no outputs")
    return network


def file_sha256(path: Path) -> str:
    """Return the hash of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@functools.cache
def known_cards() -> dict[str, NetworkCard]:
    """Return the cards in `engines/cards` by the sha256 of the file that each is for."""
    files = sorted(Path(__file__).with_name("cards").glob("*.json"))
    known = [KnownNetwork.model_validate_json(file.read_bytes()) for file in files]
    return {network.sha256: network.card for network in known}


def _embedded(network: onnx.ModelProto, path: Path) -> NetworkCard | None:
    text = _property(network, CARD_KEY)
    return _parse(text, f"the card in {path}") if text else None


def _beside(path: Path) -> NetworkCard | None:
    for file in (path.with_suffix(".json"), path.with_name(f"{path.name}.json")):
        if file.is_file():
            return _parse(file.read_bytes(), str(file))
    return None


def _published_sha256(network: onnx.ModelProto, path: Path) -> str:
    return _property(network, REPAIRED_KEY) or file_sha256(path)


def _property(network: onnx.ModelProto, key: str) -> str:
    return next((entry.value for entry in network.metadata_props if entry.key == key), "")


def _parse(text: str | bytes, place: str) -> NetworkCard:
    try:
        return NetworkCard.model_validate_json(text)
    except ValidationError as exc:
        mistakes = (f"{'.'.join(map(str, error['loc'])) or 'JSON'}: {error['msg']}" for error in exc.errors())
        raise CardError(f"{place} is wrong: {'; '.join(mistakes)}") from exc


def _check_fit(card: NetworkCard, network: onnx.ModelProto, path: Path) -> None:
    inputs, outputs = _specs(_inputs(network)), _specs(network.graph.output)
    if {spec.name for spec in card.inputs} != {spec.name for spec in inputs}:
        raise CardError(f"{path} takes {_names(inputs)}; its card says {_names(card.inputs)}")
    if missing := {spec.name for spec in card.outputs} - {spec.name for spec in outputs}:
        raise CardError(f"{path} gives {_names(outputs)}; its card says also {', '.join(sorted(missing))}")
    own = {spec.name: spec for spec in (*inputs, *outputs)}
    for said in (*card.inputs, *card.outputs):
        _check_tensor(said, own[said.name], path)
    for said in card.inputs:
        _check_free(said, own[said.name], path)


def _check_tensor(said: TensorSpec, own: TensorSpec, path: Path) -> None:
    if said.dtype != own.dtype:
        raise CardError(f"{path}: {own.name} is {own.dtype}; its card says {said.dtype}")
    # Not every exporter writes the shapes of outputs.
    if own.shape and len(said.shape) != len(own.shape):
        raise CardError(f"{path}: {own.name} has shape {_shape(own)}; its card says {_shape(said)}")


def _check_free(said: TensorSpec, own: TensorSpec, path: Path) -> None:
    """Raise CardError if an input is fixed where the card says that it is free, or fixed at another size."""
    if any(isinstance(size, int) and size != wish for size, wish in zip(own.shape, said.shape, strict=True)):
        raise CardError(f"{path}: {own.name} has shape {_shape(own)}; its card says {_shape(said)}")


def _inputs(network: onnx.ModelProto) -> list[onnx.ValueInfoProto]:
    """Return what the network is fed with: old exporters list the weights as inputs too."""
    weights = {weight.name for weight in network.graph.initializer}
    return [value for value in network.graph.input if value.name not in weights]


def _specs(values: Sequence[onnx.ValueInfoProto]) -> tuple[TensorSpec, ...]:
    layouts = {2: "NC", 3: "NAC", 4: "NCHW"}
    specs = []
    for value in values:
        tensor = value.type.tensor_type
        shape = tuple(_axis(axis, index) for index, axis in enumerate(tensor.shape.dim))
        dtype = tensor_dtype_to_np_dtype(tensor.elem_type).name if tensor.elem_type else "unknown"
        specs.append(TensorSpec(name=value.name, dtype=dtype, layout=layouts.get(len(shape), ""), shape=shape))
    return tuple(specs)


def _axis(axis: onnx.TensorShapeProto.Dimension, index: int) -> int | str:
    return axis.dim_value if axis.HasField("dim_value") else axis.dim_param or f"axis{index}"


def _names(specs: Sequence[TensorSpec]) -> str:
    return ", ".join(sorted(spec.name for spec in specs))


def _shape(spec: TensorSpec) -> str:
    return json.dumps(spec.shape)
