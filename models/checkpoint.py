"""Checkpoints: weights and the config that made them, in one file that holds no code."""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any
from zipfile import is_zipfile

import numpy as np
import onnx
import torch
from google.protobuf.message import DecodeError
from onnx import numpy_helper
from pydantic import TypeAdapter, ValidationError
from torch import Tensor, nn

from models import embedder, gfrnet, rivals, scgan, sgen, sisn

SAME_KEY = "streamer.same_weights"
"""In the metadata of an ONNX: weights that equal another, which it holds alone, as JSON."""


@dataclass(frozen=True, slots=True)
class Known:
    """A network that can be trained."""

    network: type[nn.Module]
    config: type[Any]
    presets: dict[str, Any]


NETWORKS = {
    "sgen": Known(sgen.Sgen, sgen.SgenConfig, sgen.PRESETS),
    "sisn": Known(sisn.Sisn, sisn.SisnConfig, sisn.PRESETS),
    "scgan": Known(scgan.Restoration, scgan.ScganConfig, scgan.PRESETS),
    "gfrnet": Known(gfrnet.Gfrnet, gfrnet.GfrnetConfig, gfrnet.PRESETS),
    "embedder": Known(embedder.Embedder, embedder.EmbedderConfig, embedder.PRESETS),
    "srcnn": Known(rivals.Srcnn, rivals.SrcnnConfig, rivals.PRESETS["srcnn"]),
    "rednet": Known(rivals.RedNet, rivals.RedNetConfig, rivals.PRESETS["rednet"]),
    "srresnet": Known(rivals.Srresnet, rivals.SrresnetConfig, rivals.PRESETS["srresnet"]),
    "unet": Known(rivals.Unet, rivals.UnetConfig, rivals.PRESETS["unet"]),
}


def save_checkpoint(path: Path, **state: Any) -> None:
    """Write the state at once or not at all."""
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    partial.replace(path)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint; raises FileNotFoundError, or ValueError if it is none."""
    with path.open("rb") as file:
        if not is_zipfile(file):  # torch takes it for its older format, and fails in many ways
            raise ValueError(f"{path} is no checkpoint")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, UnpicklingError) as exc:
        raise ValueError(f"{path} is no checkpoint") from exc
    if not isinstance(state, dict) or not {"network", "weights", "step", "config"} <= state.keys():
        raise ValueError(f"{path} is no checkpoint")
    return state


def shipped_weights(state: dict[str, Any]) -> dict[str, Tensor]:
    """Return the weights of a checkpoint that are judged and shipped: of a run's last.pt the averaged ones."""
    if "averaged" not in state:
        weights: dict[str, Tensor] = state["weights"]
        return weights
    return {name.removeprefix("module."): w for name, w in state["averaged"].items() if name != "n_averaged"}


def load_weights(path: Path) -> dict[str, Tensor]:
    """Return the weights of a checkpoint (the averaged ones) or of an ONNX that models.export wrote, by their names.

    Raises FileNotFoundError, or ValueError if the file holds none.
    """
    if path.suffix != ".onnx":
        return shipped_weights(load_checkpoint(path))
    try:
        model = onnx.load(str(path))
    except DecodeError:
        raise ValueError(f"{path} is no ONNX") from None
    stored = {tensor.name.removesuffix(".fp16"): numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    if any(name.endswith(".weight_bias") for name in stored):
        raise ValueError(f"{path}: its normalisation is folded into its convolutions; begin with its checkpoint")
    weights = {name: torch.from_numpy(array.astype(np.float32)) for name, array in stored.items() if "." in name}
    same = next((entry.value for entry in model.metadata_props if entry.key == SAME_KEY), "{}")
    return weights | {name: weights[other] for name, other in json.loads(same).items()}


def describe(network: nn.Module) -> dict[str, Any]:
    """Return what `build` needs to make the network again."""
    name = next(name for name, known in NETWORKS.items() if isinstance(network, known.network))
    return {"name": name, **asdict(network.config)}  # type: ignore[arg-type]


def build(description: dict[str, Any], *, untrained: bool = False) -> nn.Module:
    """Make the network that `describe` described, with first weights; `untrained` without any memory for them.

    Raises ValueError for a name that is unknown, TypeError or ValueError for fields that are.
    """
    fields = dict(description)
    name = fields.pop("name")
    if name not in NETWORKS:
        raise ValueError(f"unknown network {name!r}; known: {', '.join(NETWORKS)}")
    known = NETWORKS[name]
    known.config(**fields)  # a TypeError for names that it does not have, which the next line would overlook
    try:
        config = TypeAdapter(known.config).validate_python(fields)
    except ValidationError as exc:
        told = (f"{'.'.join(map(str, error['loc']))}: {error['msg']}" for error in exc.errors())
        raise ValueError("; ".join(told)) from None
    with torch.device("meta") if untrained else nullcontext():
        return known.network(config)
