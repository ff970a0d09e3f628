"""Export: a checkpoint in, an ONNX that says what it is out.

    python -m models.export runs/sgen-small/best.pt --name sgen-small --out models/weights --license "..."

A restorer's card says how it runs in INT8 if that costs next to nothing: ranges are measured on the first set that the
run was trained on, the cost on its validation faces by its `likeness` (models/ranges.py). `--no-int8` leaves that out.

The weights are stored as fp16 and cast back in the graph: inputs, outputs and arithmetic stay float32. The card lies in
the file's metadata under `streamer.card`.

An embedder takes aligned faces, `face`, and gives their `embedding`, not of unit length.

A guided restorer takes `image` and `guide`, both of the result's size, and gives out what the guide did beside what it
restored: `warped` and `mask`, where it has them.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from models.checkpoint import SAME_KEY, build, load_checkpoint, load_weights, shipped_weights
from models.embedder import Embedder, EmbedderConfig
from models.gfrnet import Gfrnet, GfrnetConfig
from models.losses import RETAIL_TEMPLATE
from models.ranges import add_int8

EXPORTER_VERSION = "1"
OPSET = 18  # from 20 on GridSample is written `linear`, which TensorRT 11 is reported to run as nearest
_LEAST_COMPRESSED = 256  # elements; smaller tensors are not worth a Cast
_GUIDED_SIDE = 256  # px; of the results of a guided restorer whose run does not say


class ExportError(ValueError):
    """A network is not for the product. The message is one line."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--name", required=True, help="the network's name, and the file's")
    parser.add_argument("--out", type=Path, default=Path("models/weights"))
    parser.add_argument("--license", required=True, help="of the weights: what the training faces allow")
    parser.add_argument("--trained-on", default="", help="what faces, in a sentence; by default the names of the sets")
    parser.add_argument(
        "--mix", nargs=2, metavar=("OTHER", "SHARE"),
        help="mix its weights with SHARE (0 to 1) of those of another checkpoint or ONNX, from which its run began",
    )  # fmt: skip
    parser.add_argument("--no-int8", action="store_true", help="measure no ranges: the network runs in float alone")
    arguments = parser.parse_args()
    path = arguments.out / f"{arguments.name}.onnx"
    try:
        state = load_checkpoint(arguments.checkpoint)
        if arguments.mix:
            state = mixed(state, Path(arguments.mix[0]), float(arguments.mix[1]))
    except (OSError, ValueError) as exc:
        parser.exit(2, f"{exc}\n")
    try:
        export(state, path, name=arguments.name, license=arguments.license, trained_on=arguments.trained_on)
    except ExportError as exc:
        parser.exit(2, f"{arguments.checkpoint}: {exc}\n")
    print(f"{path}: {path.stat().st_size / 2**20:.1f} MiB, step {state['step']}, scores {state.get('scores')}")
    if not arguments.no_int8:
        try:
            print(int8(path, state["config"]))
        except (OSError, ValueError) as exc:
            parser.exit(2, f"{path} is written, without INT8: {exc}; --no-int8 asks for none\n")


def mixed(state: dict[str, Any], other: Path, share: float) -> dict[str, Any]:
    """Return the checkpoint with weights that lie `share` of the way to those of `other`, a checkpoint or an ONNX.

    What a run that began with `other` has gained and lost is mixed so too ("model soups", Wortsman et al., ICML 2022).
    Raises ValueError where the two are not of one network, or the share is not from 0 to 1; FileNotFoundError.
    """
    ours, theirs = shipped_weights(state), load_weights(other)
    if not 0 <= share <= 1:
        raise ValueError(f"--mix: {share:g} is no share from 0 to 1")
    if {name: weight.shape for name, weight in ours.items()} != {name: w.shape for name, w in theirs.items()}:
        raise ValueError(f"--mix: {other} is not of the same network")
    weights = {name: torch.lerp(weight.float(), theirs[name].float(), share) for name, weight in ours.items()}
    return {**{name: value for name, value in state.items() if name != "averaged"}, "weights": weights}


def export(state: dict[str, Any], path: Path, *, name: str, license: str, trained_on: str = "") -> None:
    """Write the network of a checkpoint to `path`, with its card.

    Without `trained_on` the card names the sets that the checkpoint's config lists. Raises ExportError.
    """
    config = state["config"]
    trained_on = trained_on or ", ".join(Path(source).stem for source in config["data"])
    network, weights = build(state["network"]), shipped_weights(state)
    network.load_state_dict(weights)
    path.parent.mkdir(parents=True, exist_ok=True)
    said = {"name": name, "license": license, "trained_on": trained_on}
    if isinstance(network, Gfrnet):
        side = config.get("side", _GUIDED_SIDE)
        card = guided_card(network.config, **said, side=side)
        model = guided_to_onnx(network, side=side)
    elif isinstance(network, Embedder):
        card, model = embedder_card(network.config, **said), embedder_to_onnx(network)
    else:
        card = restorer_card(network, **said, enlarge=config.get("enlarge", "cubic"))
        model = to_onnx(network.eval())
    same = _same(model, weights)
    _halve(model)
    _strip(model)
    model.metadata_props.add(key="streamer.card", value=json.dumps(card))
    if same:
        model.metadata_props.add(key=SAME_KEY, value=json.dumps(same))
    onnx.checker.check_model(model)
    onnx.save(model, str(path))


def int8(path: Path, config: Mapping[str, Any]) -> str:
    """Add to an exported network what INT8 needs, by the faces that its run names; return what was found, in a line.

    Raises OSError or ValueError where the run's faces are not there or do not do.
    """
    inputs = [value.name for value in onnx.load(str(path)).graph.input]
    if "guide" in inputs or "face" in inputs:
        return f"{path}: {'a guided restorer' if 'guide' in inputs else 'an embedder'} runs in float alone"
    if missing := [name for name in ("validation", "likeness") if not config.get(name)]:
        return f"{path}: no INT8: the run names no {' and no '.join(missing)}; `python -m models.ranges` takes them"
    exclude = config.get("exclude")
    return add_int8(
        path, Path(config["data"][0]), Path(config["validation"]), Path(config["likeness"]),
        exclude=Path(exclude) if exclude else None,
    )  # fmt: skip


def restorer_card(network: nn.Module, *, name: str, license: str, trained_on: str, enlarge: str) -> dict[str, Any]:
    """Return what the network says of itself (engines/card.py reads it).

    A network that enlarges by itself has the one scale it was built for; any other is given the face enlarged.
    """
    config: Any = network.config
    return {
        "name": name,
        "task": "restoration",
        "exporter": f"models.export {EXPORTER_VERSION} {_own_hash()}",
        "inputs": [{"name": "image", "layout": "NCHW", "shape": ["n", 3, "h", "w"]}],
        "outputs": [{"name": "restored", "layout": "NCHW", "shape": ["n", 3, "h", "w"]}],
        "color": "RGB",
        "mean": [127.5] * 3,
        "std": [127.5] * 3,
        "output_range": [-1.0, 1.0],
        "scales": [config.scale] if config.scale else [4, 2, 1],
        "enlarge": "none" if config.scale else enlarge,
        "size_multiple": config.multiple,
        "license": license,
        "trained_on": trained_on,
    }


def to_onnx(network: nn.Module) -> onnx.ModelProto:
    """Return the network as ONNX with free batch, height and width."""
    config: Any = network.config
    multiple = config.multiple
    example = torch.zeros(2, 3, 8 * multiple, 6 * multiple)
    rows, columns = torch.export.Dim("rows", min=1, max=1024), torch.export.Dim("columns", min=1, max=1024)
    free = {0: torch.export.Dim("n", min=1, max=4096), 2: multiple * rows, 3: multiple * columns}
    program = torch.onnx.export(
        network, (example,), dynamo=True, external_data=False, opset_version=OPSET,
        input_names=["image"], output_names=["restored"], dynamic_shapes=(free,), verbose=False,
    )  # fmt: skip
    if program is None:
        raise RuntimeError("torch.onnx.export gave nothing")
    return program.model_proto


class GuidedParts(Gfrnet):
    """A GFRNet that gives out what the guide did too: `outputs` names what, in order."""

    @property
    def outputs(self) -> list[str]:
        return _outputs(self.config)

    def forward(self, degraded: Tensor, guide: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        parts = self.parts(degraded, guide)
        return tuple(getattr(parts, name) for name in self.outputs)


def guided_card(config: GfrnetConfig, *, name: str, license: str, trained_on: str, side: int) -> dict[str, Any]:
    """Return what a guided restorer says of itself; its results are `side` px. Raises ExportError without a guide."""
    size = [side, side] if config.design == "paper" else ["h", "w"]

    def spec(tensor: str) -> dict[str, Any]:
        return {"name": tensor, "layout": "NCHW", "shape": ["n", 1 if tensor == "mask" else 3, *size]}

    return {
        "name": name,
        "task": "guided-restoration",
        "exporter": f"models.export {EXPORTER_VERSION} {_own_hash()}",
        "inputs": [spec("image"), spec("guide")],
        "outputs": [spec(output) for output in _outputs(config)],
        "color": "RGB",
        "mean": [127.5] * 3,
        "std": [127.5] * 3,
        "output_range": [-1.0, 1.0],
        "enlarge": "cubic",
        "result_size": side,
        "guide_laid": config.laid,
        "size_multiple": config.multiple,
        "license": license,
        "trained_on": trained_on,
        "note": "Wants a guide: another photo of the same person, cropped alike. `mask` is 0 where it did not count.",
    }


def guided_to_onnx(network: Gfrnet, *, side: int) -> onnx.ModelProto:
    """Return a GFRNet as ONNX with free batch, and where its design allows it free height and width.

    Degraded face and guide share their axes. Raises ExportError for a variant without a guide.
    """
    shown = GuidedParts(network.config)
    shown.load_state_dict(network.state_dict())
    n, multiple = torch.export.Dim("n", min=1, max=4096), network.config.multiple
    if network.config.design == "paper":
        free, example = {0: n}, torch.zeros(2, 3, side, side)
    else:
        rows, columns = torch.export.Dim("rows", min=1, max=1024), torch.export.Dim("columns", min=1, max=1024)
        free = {0: n, 2: multiple * rows, 3: multiple * columns}
        example = torch.zeros(2, 3, 8 * multiple, 6 * multiple)
    # Exported here: given the axes, torch.onnx.export would name each input's anew, and warn that they are the same.
    traced = torch.export.export(shown.eval(), (example, example.clone()), dynamic_shapes=(free, free))
    program = torch.onnx.export(
        traced, dynamo=True, external_data=False, opset_version=OPSET, input_names=["image", "guide"],
        output_names=shown.outputs, verbose=False,
    )  # fmt: skip
    if program is None:
        raise RuntimeError("torch.onnx.export gave nothing")
    return program.model_proto


def embedder_card(config: EmbedderConfig, *, name: str, license: str, trained_on: str) -> dict[str, Any]:
    """Return what an embedder says of itself (engines/card.py reads it)."""
    return {
        "name": name,
        "task": "embedding",
        "exporter": f"models.export {EXPORTER_VERSION} {_own_hash()}",
        "inputs": [{"name": "face", "layout": "NCHW", "shape": ["n", 3, config.side, config.side]}],
        "outputs": [{"name": "embedding", "layout": "NC", "shape": ["n", config.embedding]}],
        "color": "RGB",
        "mean": [127.5] * 3,
        "std": [127.5] * 3,
        "alignment": [[x * config.side, y * config.side] for x, y in RETAIL_TEMPLATE],
        "alignment_size": config.side,
        "embedding_dim": config.embedding,
        "license": license,
        "trained_on": trained_on,
        "note": "Cosine similarity; not yet of unit length.",
    }


def embedder_to_onnx(network: Embedder) -> onnx.ModelProto:
    """Return an embedder as ONNX with free batch."""
    side = network.config.side
    program = torch.onnx.export(
        network.eval(), (torch.zeros(2, 3, side, side),), dynamo=True, external_data=False, opset_version=OPSET,
        input_names=["face"], output_names=["embedding"],
        dynamic_shapes=({0: torch.export.Dim("n", min=1, max=4096)},), verbose=False,
    )  # fmt: skip
    if program is None:
        raise RuntimeError("torch.onnx.export gave nothing")
    return program.model_proto


def _outputs(config: GfrnetConfig) -> list[str]:
    if not config.guide:
        raise ExportError("this variant looks at no guide, so it is no guided restorer")
    return ["restored", *(["warped"] if config.warp else []), *(["mask"] if config.design == "modern" else [])]


def _same(model: onnx.ModelProto, weights: dict[str, Tensor]) -> dict[str, str]:
    """Return the weights that the exporter left out as they equal another, each with the other's name."""
    stored = [tensor.name for tensor in model.graph.initializer if tensor.name in weights]
    left_out = [name for name in weights if name not in stored]
    pairs = {name: next((s for s in stored if torch.equal(weights[s], weights[name])), None) for name in left_out}
    return {name: other for name, other in pairs.items() if other}


def _halve(model: onnx.ModelProto) -> None:
    """Store float32 initialisers as fp16, each followed by a Cast."""
    graph = model.graph
    casts = []
    for tensor in list(graph.initializer):
        array = numpy_helper.to_array(tensor)
        if array.dtype != np.float32 or array.size < _LEAST_COMPRESSED:
            continue
        stored = f"{tensor.name}.fp16"
        casts.append(helper.make_node("Cast", [stored], [tensor.name], to=TensorProto.FLOAT))
        graph.initializer.remove(tensor)
        graph.initializer.append(numpy_helper.from_array(array.astype(np.float16), stored))
    for cast in reversed(casts):
        graph.node.insert(0, cast)


def _strip(model: onnx.ModelProto) -> None:
    """Remove what the exporter adds and nobody reads: it weighs as much as a fifth of the file."""
    del model.graph.value_info[:]
    del model.metadata_props[:]
    del model.graph.metadata_props[:]
    model.doc_string = model.graph.doc_string = ""
    for node in model.graph.node:
        node.doc_string = ""
        del node.metadata_props[:]
    for value in [*model.graph.input, *model.graph.output, *model.graph.initializer]:
        value.doc_string = ""
        del value.metadata_props[:]


def _own_hash() -> str:
    return hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:12]


if __name__ == "__main__":
    main()
