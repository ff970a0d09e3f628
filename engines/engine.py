"""The seam between the app and whatever runs a network. Read this first.

Three errors carry one line each that an operator can act on:

* ModelError: a network cannot be found or fetched;
* CardError (in `card`): it does not say what it is, or says something that does not fit;
* EngineError: it cannot be loaded or run.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import numpy as np

from engines.card import NetworkCard


class ModelError(ValueError):
    """A network could not be found or fetched."""


class EngineError(RuntimeError):
    """A network could not be loaded or run."""


class Engine(Protocol):
    """A compiled network: arrays in, arrays out. Used by one thread only."""

    @property
    def card(self) -> NetworkCard:
        """What the network says of itself."""
        ...

    @property
    def sha256(self) -> str:
        """Of the network's file."""
        ...

    @property
    def backend(self) -> str:
        """onnxruntime-cpu | onnxruntime-cuda | openvino-cpu | tensorrt ..."""
        ...

    @property
    def precision(self) -> str:
        """fp32 | bf16 | fp16 | int8."""
        ...

    @property
    def max_batch(self) -> int:
        """How many items one run may hold."""
        ...

    @property
    def plan(self) -> str:
        """Key of the plan that it runs; empty: it runs the network as it is."""
        ...

    def run(self, **inputs: np.ndarray) -> dict[str, np.ndarray]:
        """Return the outputs by name. Raises EngineError."""
        ...

    def close(self) -> None:
        """Free what the engine holds; it cannot run after."""
        ...


def checked(inputs: Mapping[str, np.ndarray], card: NetworkCard) -> dict[str, np.ndarray]:
    """Return the inputs, C-contiguous. Raises EngineError where their names, dtypes or ranks are not the card's."""
    wanted = {spec.name: spec for spec in card.inputs}
    if inputs.keys() != wanted.keys():
        raise EngineError(f"{card.name} takes {_names(wanted)}, not {_names(inputs)}")
    for name, value in inputs.items():
        spec = wanted[name]
        if value.dtype.name != spec.dtype:
            raise EngineError(f"{card.name}: {name} must be {spec.dtype}, not {value.dtype.name}")
        if value.ndim != len(spec.shape):
            raise EngineError(f"{card.name}: {name} must have {len(spec.shape)} axes, not shape {value.shape}")
    return {name: np.require(value, requirements="C") for name, value in inputs.items()}


def batch_limit(card: NetworkCard, max_batch: int) -> int:
    """Return how many items one run may hold: what the network fixes, else what is wished for."""
    size = card.inputs[0].shape[0]
    return size if isinstance(size, int) else max_batch


def one_line(error: Exception) -> str:
    """Return what a backend says of its failure, without its source files and line breaks."""
    lines = [line.strip() for line in str(error).splitlines()]
    said = " ".join(line for line in lines if line and not line.startswith("Exception from "))
    return said if len(said) <= 300 else f"{said[:300]}..."


def _names(inputs: Mapping[str, object]) -> str:
    return ", ".join(sorted(inputs)) or "nothing"
