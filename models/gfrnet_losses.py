"""What GFRNet is trained for, and in which order: the terms of its paper, their weights, the stages of its schedule.

objective = GfrnetObjective(WEIGHTS["modern"], perceptual=distance, discriminators=discriminators)
for step, batch in enumerate(batches):
    stage = schedule.stage(step)
    learned = objective.restorer(network, batch, stage)
    optimiser.zero_grad()
    learned.total.backward()
    optimiser.step()
    if stage == "adversarial":
        judges.zero_grad()  # the restorer's step left gradients in the discriminators
        objective.discriminators(batch, learned.guided.restored).backward()
        judges.step()
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from models.dataset import cut_out
from models.gfrnet import Gfrnet, GfrnetDiscriminators, Guided, identity_flow
from models.losses import psnr_loss

Stage = Literal["warp", "joint", "adversarial"]
Variation = Literal["absolute", "residual"]
Pixel = Literal["mse", "psnr"]
Distance = Callable[[Tensor, Tensor], Tensor]
"""Restored and clean faces, RGB in [-1, 1], to their distance: one for each pair or one for all."""

POINTS = 68  # so many landmarks the paper sums over
LOCAL_SIDE = 128  # px; our reading: the paper's batch is 1, so its boxes need no common size
REAL = 0.9  # the label of a real face, smoothed on this side alone; that of a restored one is 0


@dataclass(frozen=True)
class LossWeights:
    """How much each term counts; 0 leaves it out. The defaults are the paper's."""

    pixel: float = 100.0
    """`pixel_loss`."""
    pixel_as: Pixel = "mse"
    """mse: the paper's. psnr (ours): −PSNR of each face in dB, so that the worst of a batch do not drown the others
    (measured: in 400 steps mse gained 0.01 dB over the input)."""
    perceptual: float = 0.001
    """The perceptual distance that the objective is given; the paper's is of VGG-Face's fourth convolution."""
    adversarial: float = 1.0
    """`adversarial_loss` of the whole face."""
    local_adversarial: float = 0.5
    """`adversarial_loss` of the landmarks' box."""
    landmark: float = 10.0
    """`landmark_loss`."""
    variation: float = 1.0
    """`total_variation`."""
    variation_of: Variation = "absolute"
    """absolute: the paper's, which also pulls the identity towards a constant. residual (ours)."""

    def __post_init__(self) -> None:
        for name in _TERMS:
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name} {getattr(self, name)}: a weight is 0 or more")
        if self.pixel_as not in ("mse", "psnr"):
            raise ValueError(f"pixel_as {self.pixel_as!r}: mse or psnr")
        if self.variation_of not in ("absolute", "residual"):
            raise ValueError(f"variation_of {self.variation_of!r}: absolute or residual")

    def without_flow(self) -> LossWeights:
        """Return those of the variant -F, whose WarpNet learns by the restored face alone."""
        return replace(self, landmark=0.0, variation=0.0)


_TERMS = tuple(field.name for field in fields(LossWeights) if field.name not in ("variation_of", "pixel_as"))

WEIGHTS: dict[str, LossWeights] = {
    "paper": LossWeights(),
    "modern": LossWeights(perceptual=0.1, adversarial=0.1, local_adversarial=0.05, variation_of="residual"),
}
"""modern: for LPIPS, and as little of the discriminators as SGEN's author code has. Not tuned."""


@dataclass(frozen=True)
class Schedule:
    """When which stage begins. The defaults are the paper's: 5 epochs of 20,273 pairs, then everything at once."""

    warp: int = 101_365
    """Steps in which WarpNet learns alone, by landmarks and total variation; 0 for the variants without either."""
    joint: int = 0
    """Steps thereafter in which both learn without discriminators; the paper has none."""

    def __post_init__(self) -> None:
        if self.warp < 0 or self.joint < 0:
            raise ValueError(f"warp {self.warp}, joint {self.joint}: steps are 0 or more")

    def stage(self, step: int) -> Stage:
        """Return the stage of a step, counted from 0."""
        if step < self.warp:
            return "warp"
        return "joint" if step < self.warp + self.joint else "adversarial"


@dataclass(frozen=True, slots=True)
class GuidedBatch:
    """Faces to be restored, all of one size: images (n, 3, h, w) RGB in [-1, 1].

    Landmarks are (n, k, 2), x and y in pixels, whole numbers at pixel centres, in the same order in face and guide;
    NaN where one is not known.
    """

    degraded: Tensor
    guide: Tensor
    clean: Tensor
    landmarks: Tensor
    """Of the clean face."""
    guide_landmarks: Tensor


@dataclass(frozen=True, slots=True)
class Learned:
    """What a step of the restorer is made of."""

    total: Tensor
    """The weighted sum, to go backward from."""
    terms: dict[str, Tensor]
    """The terms before they are weighted, by the names of LossWeights, without gradient."""
    guided: Guided | None
    """What the network gave; None while WarpNet learns alone."""


class GfrnetObjective:
    """The terms of a stage, weighted and summed.

    `perceptual` is any distance of restored and clean faces. Raises ValueError where a weight asks for what is not
    given.
    """

    def __init__(
        self,
        weights: LossWeights,
        *,
        perceptual: Distance | None = None,
        discriminators: GfrnetDiscriminators | None = None,
    ) -> None:
        if weights.perceptual and perceptual is None:
            raise ValueError(f"perceptual {weights.perceptual} wants a perceptual distance; give one, or weight 0")
        if (weights.adversarial or weights.local_adversarial) and discriminators is None:
            raise ValueError("the adversarial weights want discriminators; give them, or weights 0")
        self.weights = weights
        self.perceptual = perceptual
        self.judges = discriminators

    def restorer(self, network: Gfrnet, batch: GuidedBatch, stage: Stage) -> Learned:
        """Return what the restorer minimises in this stage. In the stage `warp` RecNet does not run.

        Raises ValueError in the stage `warp` if the network has no WarpNet or the weights leave it nothing to learn.
        """
        weights, terms, guided = self.weights, dict[str, Tensor](), None
        if stage == "warp":
            if not (weights.landmark or weights.variation):
                raise ValueError("WarpNet has nothing to learn alone: the weights of landmark and variation are 0")
            flow: Tensor | None = network.flow(batch.degraded, batch.guide)
        else:
            guided = network.parts(batch.degraded, batch.guide)
            flow = guided.flow
            terms |= self._restored(guided.restored, batch)
            if stage == "adversarial":
                terms |= self._judged(guided.restored, batch)
        if flow is not None:
            terms |= self._flow(flow, batch)
        total = sum((getattr(weights, name) * term for name, term in terms.items()), start=batch.clean.new_zeros(()))
        return Learned(total, {name: term.detach() for name, term in terms.items()}, guided)

    def discriminators(self, batch: GuidedBatch, restored: Tensor) -> Tensor:
        """Return what the discriminators minimise; no gradient flows to `restored`. Raises ValueError without any."""
        if self.judges is None:
            raise ValueError("there are no discriminators to train")
        fake = restored.detach()
        total = batch.clean.new_zeros(())
        if self.weights.adversarial:
            judge = self.judges.whole
            real = judge(batch.degraded, batch.guide, batch.clean)
            total = total + discriminator_loss(real, judge(batch.degraded, batch.guide, fake))
        if self.weights.local_adversarial and (known := located(batch.landmarks)).any():
            degraded, guide, clean, fake = _local(batch, known, batch.clean, fake)
            judge = self.judges.local
            total = total + discriminator_loss(judge(degraded, guide, clean), judge(degraded, guide, fake))
        return total

    def _flow(self, flow: Tensor, batch: GuidedBatch) -> dict[str, Tensor]:
        terms = {}
        if self.weights.landmark:
            terms["landmark"] = landmark_loss(flow, batch.landmarks, batch.guide_landmarks)
        if self.weights.variation:
            terms["variation"] = total_variation(flow, of=self.weights.variation_of)
        return terms

    def _restored(self, restored: Tensor, batch: GuidedBatch) -> dict[str, Tensor]:
        terms = {}
        if self.weights.pixel:
            measure = pixel_loss if self.weights.pixel_as == "mse" else psnr_loss
            terms["pixel"] = measure(restored, batch.clean)
        if self.weights.perceptual and self.perceptual is not None:
            terms["perceptual"] = self.perceptual(restored, batch.clean).mean()
        return terms

    def _judged(self, restored: Tensor, batch: GuidedBatch) -> dict[str, Tensor]:
        terms: dict[str, Tensor] = {}
        if self.judges is None:
            return terms
        if self.weights.adversarial:
            terms["adversarial"] = adversarial_loss(self.judges.whole(batch.degraded, batch.guide, restored))
        if self.weights.local_adversarial and (known := located(batch.landmarks)).any():
            terms["local_adversarial"] = adversarial_loss(self.judges.local(*_local(batch, known, restored)))
        return terms


def pixel_loss(restored: Tensor, clean: Tensor) -> Tensor:
    """Mean of (I − Î)², images in [-1, 1] but the difference in parts of the whole range, as in [0, 1]."""
    return F.mse_loss(restored, clean) / 4


def landmark_loss(flow: Tensor, landmarks: Tensor, guide_landmarks: Tensor) -> Tensor:
    """Σ over 68 points of |Φ(p) − q|²: the flow at a landmark p of the clean face leads to the guide's, q, in [-1, 1].

    Mean over the faces. Of other numbers of points, and where some are not known (NaN, or p outside the image), the
    mean over the known ones counts 68 times; a face without any does not count.
    """
    extent = torch.tensor([flow.shape[3] - 1, flow.shape[2] - 1], device=flow.device, dtype=flow.dtype)
    places, wanted = landmarks / extent * 2 - 1, guide_landmarks / extent * 2 - 1
    known = (places.abs() <= 1).all(dim=2) & torch.isfinite(wanted).all(dim=2)  # (n, k)
    places, wanted = (torch.where(known[..., None], points, 0) for points in (places, wanted))
    found = F.grid_sample(flow, places[:, :, None], padding_mode="border", align_corners=True)  # (n, 2, k, 1)
    errors = (found.squeeze(3).transpose(1, 2) - wanted).square().sum(dim=2) * known
    of_faces = errors.sum(dim=1) / known.sum(dim=1).clamp(min=1)
    return POINTS * of_faces.sum() / known.any(dim=1).sum().clamp(min=1)


def total_variation(flow: Tensor, *, of: Variation) -> Tensor:
    """How much a flow changes from pixel to pixel, squared: along x and y, of x and y, each a mean, summed.

    absolute: of the flow itself, in its own unit. residual: of its difference to the identity, in pixels, so that a
    guide stretched by a tenth gives 0.01 at any size.
    """
    if of == "residual":
        half = torch.tensor([flow.shape[3] - 1, flow.shape[2] - 1], device=flow.device, dtype=flow.dtype) / 2
        flow = (flow - identity_flow(flow)) * half[:, None, None]
    along = (flow.diff(dim=3).square().mean(dim=(0, 2, 3)), flow.diff(dim=2).square().mean(dim=(0, 2, 3)))
    return (along[0] + along[1]).sum()


def discriminator_loss(real: Tensor, fake: Tensor, *, label: float = REAL) -> Tensor:
    """Cross-entropy of the logits of real faces with `label`, and of restored ones with 0: what D minimises."""
    smoothed = F.binary_cross_entropy_with_logits(real, torch.full_like(real, label))
    return smoothed + F.softplus(fake).mean()


def adversarial_loss(fake: Tensor) -> Tensor:
    """−E[log D] of the logits of restored faces: what the restorer minimises.

    The paper writes E[log(1 − D)]; this form, pix2pix's, still pulls where D is sure.
    """
    return F.softplus(-fake).mean()


def located(landmarks: Tensor) -> Tensor:
    """Return whether any landmark of a face is known: (n,) bool, for landmarks (n, k, 2)."""
    return torch.isfinite(landmarks).all(dim=2).any(dim=1)


def landmark_crops(images: Tensor, landmarks: Tensor, *, side: int = LOCAL_SIDE) -> Tensor:
    """Return the smallest box round all known landmarks of each face, resized: (n, c, side, side).

    Every face has to have one (`located`). The box may stretch the face, and reaches to the edges of its outermost
    pixels.
    """
    known = torch.isfinite(landmarks).all(dim=2, keepdim=True)
    least = torch.where(known, landmarks, torch.inf).amin(dim=1) - 0.5  # (n, 2)
    most = torch.where(known, landmarks, -torch.inf).amax(dim=1) + 0.5
    step = (most - least) / side
    matrices = torch.cat([torch.diag_embed(step), (least + step / 2)[..., None]], dim=2)
    return cut_out(images, matrices, side, "bilinear")


def _local(batch: GuidedBatch, known: Tensor, *faces: Tensor) -> list[Tensor]:
    """Return degraded face, guide and these faces, all cut where the clean face's landmarks are, if any is known."""
    landmarks = batch.landmarks[known]
    return [landmark_crops(images[known], landmarks) for images in (batch.degraded, batch.guide, *faces)]
