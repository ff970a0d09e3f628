"""What a restorer is trained for: pixels, and the person.

A pixel loss alone draws the mean of all faces that fit, which is nobody: it makes recognition worse. `FaceLikeness`
adds what a frozen face embedder sees of the restored and of the clean face, at the true landmarks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from google.protobuf.message import DecodeError
from onnx import numpy_helper
from torch import Tensor, nn
from torch.nn import functional as F

from models.dataset import cut_out, similarities

RETAIL_TEMPLATE = (
    (0.31556875, 0.46157411), (0.68262292, 0.46157411), (0.50026250, 0.64050536), (0.34947187, 0.82469196),
    (0.65343645, 0.82469196),
)  # fmt: skip
"""Where face-reidentification-retail-0095 wants eyes, nose and mouth corners, (x, y) in parts of its side."""


def charbonnier_loss(restored: Tensor, clean: Tensor, *, softness: float = 1e-3) -> Tensor:
    """Mean of sqrt(difference² + softness²): L1 that is smooth at 0."""
    return (restored - clean).square().add(softness**2).sqrt().mean()


def psnr_loss(restored: Tensor, clean: Tensor) -> Tensor:
    """Mean over the images of −PSNR in dB, both in [-1, 1]: every image counts alike, however noisy it was."""
    error = (restored - clean).square().mean(dim=(1, 2, 3)) / 4
    return 10 * torch.log10(error + 1e-5).mean()


PIXEL_LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "psnr": psnr_loss,
    "mse": F.mse_loss,
    "l1": F.l1_loss,
    "charbonnier": charbonnier_loss,
}


class FaceLikeness(nn.Module):
    """How far a restored face is from the clean one in the eyes of a face embedder, which is never trained.

    The embedder is face-reidentification-retail-0095 as ONNX: BGR, 0..255, 128x128, its own template.
    """

    side = 128

    def __init__(self, embedder: Path) -> None:
        super().__init__()
        self.embedder = OnnxNetwork(embedder)
        steps = [x for op, (x, *_), _, how in self.embedder.nodes if op == "Conv" and max(how.get("strides", [1])) > 1]
        if len(steps) < 3:
            raise ValueError(f"{embedder} is not built as it should be: {len(steps)} of its convolutions have a stride")
        self.beneath = steps[1:3]  # the features that the second and the third step to a coarser grid begin with
        self.register_buffer("template", torch.tensor(RETAIL_TEMPLATE) * self.side)

    def forward(
        self,
        restored: Tensor,
        clean: Tensor,
        landmarks: Tensor,
        *,
        raw: Tensor | None = None,
        disguise: Mapping[str, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return (cosine, distance) of each face, (n,) both: of the embeddings; and of the features beneath, the mean
        absolute difference in parts of the clean face's mean absolute feature.

        Images are (n, 3, H, W) RGB in [-1, 1], landmarks (n, 5, 2) in the restored ones' pixels; `clean` and `raw` show
        the same at any size, and no gradient flows to them. With `raw`, the faces before they were restored, the cosine
        is the mean of two: of the restored face's embedding, and of the unit mean of that and the raw face's.
        `disguise` is what `disguised` drew.
        """

        def seen(images: Tensor) -> tuple[Tensor, list[Tensor]]:
            scale = images.shape[-1] / restored.shape[-1]
            return self._seen(images, self.placed((landmarks + 0.5) * scale - 0.5), disguise)

        with torch.no_grad():
            truth, beneath = seen(clean)
        found, features = seen(restored)
        distances = [
            (a - b).abs().mean(dim=(1, 2, 3)) / b.abs().mean(dim=(1, 2, 3))
            for a, b in zip(features, beneath, strict=True)
        ]
        cosine = F.cosine_similarity(found, truth)
        if raw is not None:
            with torch.no_grad():
                before, _ = seen(raw)
            fused = F.normalize(before, dim=1) + F.normalize(found, dim=1)
            cosine = (cosine + F.cosine_similarity(fused, truth)) / 2
        return cosine, torch.stack(distances).mean(dim=0)

    def disguised(self, draws: np.random.Generator, spread: float) -> dict[str, Tensor]:
        """Draw a factor around 1, of standard deviation `spread`, for each channel of each convolution.

        A network so disguised still recognises, in a way of its own: what pleases all disguises pleases others, too
        ("ghost networks": Li et al., AAAI 2020, who attack recognisers that they do not know).
        """
        return {
            name: torch.from_numpy(draws.normal(1, spread, (channels, 1, 1)).astype(np.float32)).to(self.template)
            for name, channels in self.embedder.channels.items()
        }

    def placed(self, landmarks: Tensor) -> Tensor:
        """Return the similarity (n, 2, 3) from pixels of the template to pixels of each image."""
        return similarities(self.template, landmarks)  # type: ignore[arg-type]

    def _seen(
        self, image: Tensor, matrices: Tensor, disguise: Mapping[str, Tensor] | None
    ) -> tuple[Tensor, list[Tensor]]:
        aligned = cut_out(image, matrices, self.side, "bilinear")
        bgr = (aligned.flip(1) + 1) * 127.5
        embedding, *features = self.embedder(bgr.clamp(0, 255), also=self.beneath, factors=disguise)
        return embedding.flatten(1), features


class Perceptual(nn.Module):
    """LPIPS (Zhang et al., CVPR 2018): the distance of two images as a frozen network sees them, by a network as ONNX
    that takes both, RGB in [-1, 1], of 64 px at least."""

    def __init__(self, network: Path) -> None:
        super().__init__()
        self.network = OnnxNetwork(network)

    def forward(self, restored: Tensor, clean: Tensor) -> Tensor:
        """Return the distance of each pair, (n,)."""
        distance: Tensor = self.network(restored, clean)[0]
        return distance.flatten()


@dataclass(frozen=True, slots=True)
class Judges:
    """The frozen networks that look at a restored face, where a run has them."""

    likeness: FaceLikeness | None = None
    perceptual: Perceptual | None = None


class OnnxNetwork(nn.Module):
    """A small frozen ONNX network run by torch, so that gradients reach its inputs.

    It knows the operators that the networks in our losses have; raises ValueError for others, and for a file that is
    no ONNX.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        try:
            graph = onnx.load(str(path)).graph
        except DecodeError:
            raise ValueError(f"{path} is no ONNX") from None
        if not graph.output:
            raise ValueError(f"{path} is no ONNX")
        if strange := sorted({name for node in graph.node if (name := _strange(node))}):
            raise ValueError(f"{path}: operators {', '.join(strange)} are not known; known: {', '.join(_OPERATORS)}")
        constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
        self.inputs = [value.name for value in graph.input if value.name not in constants]
        self.output = graph.output[0].name
        self.nodes = [
            (node.op_type, list(node.input), node.output[0],
             {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute})
            for node in graph.node
        ]  # fmt: skip
        self.numbers = {name: number for number, name in enumerate(constants)}
        for number, value in enumerate(constants.values()):
            self.register_buffer(f"constant{number}", torch.from_numpy(np.array(value)))

    @property
    def channels(self) -> dict[str, int]:
        """How many channels each convolution gives, by the name of its output."""
        return {
            output: self.get_buffer(f"constant{self.numbers[inputs[1]]}").shape[0]
            for operator, inputs, output, _ in self.nodes
            if operator == "Conv"
        }

    def forward(
        self, *images: Tensor, also: Sequence[str] = (), factors: Mapping[str, Tensor] | None = None
    ) -> list[Tensor]:
        """Return the output, and the values in between that `also` names; those that `factors` names are multiplied."""
        values = dict(zip(self.inputs, images, strict=True))
        for operator, inputs, output, how in self.nodes:
            arguments = [values[i] if i in values else self.get_buffer(f"constant{self.numbers[i]}") for i in inputs]
            values[output] = _OPERATORS[operator](arguments, how)
            if factors and output in factors:
                values[output] = values[output] * factors[output]
        return [values[name] for name in (self.output, *also)]


def _strange(node: onnx.NodeProto) -> str | None:
    """Return what of a node is not known."""
    if node.op_type not in _OPERATORS:
        return node.op_type
    how = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    if how.get("auto_pad", b"NOTSET") != b"NOTSET":
        return f"{node.op_type} with auto_pad"
    if "Pool" in node.op_type and (how.get("ceil_mode") or any(how.get("pads", ()))):
        return f"{node.op_type} with pads or ceil_mode"
    return None


def _convolved(arguments: list[Tensor], how: dict[str, Any]) -> Tensor:
    x, weight, *bias = arguments
    top, left, bottom, right = how.get("pads", (0, 0, 0, 0))
    if (top, left) != (bottom, right):
        x, top, left = F.pad(x, (left, right, top, bottom)), 0, 0
    return F.conv2d(
        x, weight, bias[0] if bias else None, how.get("strides", 1), (top, left), how.get("dilations", 1),
        how.get("group", 1),
    )  # fmt: skip


def _along(arguments: list[Tensor], how: dict[str, Any]) -> dict[str, Any]:
    """Return the axes of a reduction, which are an input in newer ONNX and an attribute in older, and what stays."""
    axes = arguments[1].tolist() if len(arguments) > 1 else list(how["axes"])
    return {"dim": axes, "keepdim": bool(how.get("keepdims", 1))}


_OPERATORS: dict[str, Callable[[list[Tensor], dict[str, Any]], Tensor]] = {
    "Add": lambda x, how: x[0] + x[1],
    "Sub": lambda x, how: x[0] - x[1],
    "Mul": lambda x, how: x[0] * x[1],
    "Div": lambda x, how: x[0] / x[1],
    "Sum": lambda x, how: torch.stack(x).sum(dim=0),
    "Conv": _convolved,
    "Relu": lambda x, how: F.relu(x[0]),
    "PRelu": lambda x, how: F.prelu(x[0], x[1].flatten()),
    "Sigmoid": lambda x, how: torch.sigmoid(x[0]),
    "MaxPool": lambda x, how: F.max_pool2d(x[0], how["kernel_shape"], how.get("strides", 1)),
    "AveragePool": lambda x, how: F.avg_pool2d(x[0], how["kernel_shape"], how.get("strides", 1)),
    "ReduceL2": lambda x, how: torch.linalg.vector_norm(x[0], **_along(x, how)),
    "ReduceSum": lambda x, how: x[0].sum(**_along(x, how)),
    "ReduceMean": lambda x, how: x[0].mean(**_along(x, how)),
}
