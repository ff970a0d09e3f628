"""Training GFRNet: a degraded face is restored by a guide, another photo of the same person.

In stages, each a share of the run: WarpNet learns alone where landmarks lie; then both networks learn the restored
face; then, if asked for, two discriminators judge it. `models.train` runs it for a YAML whose `network` is gfrnet.
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar, Literal

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from models.dataset import load_faces, load_names
from models.degradation import Shares
from models.gfrnet import (
    VARIANTS,
    Gfrnet,
    GfrnetDiscriminatorConfig,
    GfrnetDiscriminators,
    Guided,
    MaskedRecNet,
    ResidualWarpNet,
)
from models.gfrnet_losses import WEIGHTS, GfrnetObjective, GuidedBatch, LossWeights, Schedule, Stage
from models.guided import GuidedBatches, GuidedDiet, GuidedFaces, GuidedValidation, first_pairs, listed_pairs
from models.loop import Learner, RunConfig, Task, TrainError, has_bf16, make_network, place
from models.losses import FaceLikeness, Judges, Perceptual, psnr_loss
from models.settings import RelativePath

_GOLDEN = 0.6180339887498949


class GfrnetRunConfig(RunConfig):
    """One run of GFRNet's training."""

    measure: ClassVar[frozenset[str]] = RunConfig.measure | {
        "pairs", "validation_pairs", "side", "variant", "likeness", "perceptual",
    }  # fmt: skip

    network: Literal["gfrnet"] = "gfrnet"
    """Which network."""
    variant: Literal["Full", "-F", "-W", "-WG", "-W2", "-WG2", "R"] = "Full"
    """Row of the paper's ablation (`models.gfrnet.VARIANTS`): it sets guide, warp and widen of the network, unless
    `override` does; -F has no loss of the flow, and R validates with strangers' guides."""
    pairs: RelativePath | None = None
    """The validation's pairs, one `QUERY REFERENCE` a line (guided_val.txt); by default the first face of each identity
    guides its others."""
    validation_pairs: int = Field(24, gt=0)
    """So many of them validate, always the same."""

    side: int = Field(256, gt=0)
    """Of the faces, in pixels; a multiple of what the network wants."""
    surveillance_share: float = Field(0.3, ge=0, le=1)
    """Batches damaged by what cameras do, at 1/4 and enlarged by cubic; the others by GFRNet's own protocol."""
    stranger_share: float = Field(0.1, ge=0, le=1)
    """Faces whose guide is of another person, so that the mask learns to close."""
    occluded_share: float = Field(0.1, ge=0, le=1)
    """Faces whose guide is covered in part, likewise."""
    vary: bool = True
    """Whether exposure, contrast and tint are varied, of face and guide each on its own."""
    damage: Shares = Shares()
    """How often surveillance faces suffer from what."""

    warp_share: float = Field(0.1, ge=0, le=1)
    """The first part of the run, in which WarpNet learns alone, by landmarks and total variation; variants that have
    neither skip it. The paper: 5 of 100 epochs."""
    open_share: float = Field(0.4, ge=0, le=1)
    """The first part of the run, in which the modern design's mask is held open: a guide that RecNet cannot read yet is
    noise to it, and it would shut the mask before it learnt to."""
    adversarial_from: float = Field(1.0, ge=0, le=1)
    """The part of the run after which the discriminators judge too; 1 trains without any."""
    likeness_from: float = Field(0.0, ge=0, le=1)
    """The part of the run after which the embedder judges too."""

    weights: LossWeights = WEIGHTS["modern"]
    """How much each term counts. Where some are given, those that are not are the paper's."""
    perceptual: RelativePath | None = None
    """LPIPS as ONNX, for the term `perceptual`; without it that is left out."""
    likeness: RelativePath | None = None
    """The face embedder (face-reidentification-retail-0095 as ONNX) that restored faces are also judged by."""
    identity_weight: float = Field(0.4, ge=0)
    """Of 1 − cosine to the clean face's embedding."""
    feature_weight: float = Field(0.15, ge=0)
    """Of the distance between the embedder's features of restored and clean face."""
    likeness_batch: int = Field(4, gt=0)
    """So many faces of a batch are judged by the embedder."""
    discriminator: GfrnetDiscriminatorConfig = GfrnetDiscriminatorConfig(norm="spectral")
    """What both discriminators are made of; where the network has no guide they see none either."""

    betas: tuple[float, float] = (0.9, 0.99)
    """Of AdamW. The paper: 0.5, and 0.999 in our reading."""
    weight_decay: float = Field(1e-4, ge=0)
    """Of AdamW; 0 makes it Adam."""

    @model_validator(mode="after")
    def _in_order(self) -> GfrnetRunConfig:
        if self.adversarial_from < self.warp_share:
            raise ValueError(f"adversarial_from {self.adversarial_from}: WarpNet is alone until {self.warp_share}")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas {self.betas}: from 0 to below 1")
        return self


class GuidedRestoration(Task):
    """GFRNet learns to restore a face by a guide."""

    network: Gfrnet

    def __init__(self, config: GfrnetRunConfig, device: torch.device) -> None:
        self.config, self.device, self.others = config, device, {}
        self.variant = VARIANTS[config.variant]
        switches = {name: getattr(self.variant, name) for name in ("guide", "warp", "widen")}
        built = make_network(config.model_copy(update={"override": {**switches, **config.override}}))
        self.network = built.to(device, memory_format=torch.channels_last)  # type: ignore[assignment]
        known = self.network.config
        if config.side % known.multiple:
            raise TrainError(f"side: {config.side} is no multiple of {known.multiple}, as the network wants it")
        _keep_flow_exact(self.network)
        self.optimizer = torch.optim.AdamW(
            self.network.parameters(), lr=config.learning_rate, betas=config.betas, weight_decay=config.weight_decay
        )
        self.weights = self._weights()
        if self.weights.adversarial or self.weights.local_adversarial:
            judges = GfrnetDiscriminators(replace(config.discriminator, guide=known.guide))
            judges = judges.to(device, memory_format=torch.channels_last)
            optimizer = torch.optim.Adam(judges.parameters(), lr=config.learning_rate, betas=(0.5, 0.999))
            self.others["discriminators"] = Learner(judges, optimizer)

    def load(self, rank: int) -> int:
        config, device = self.config, self.device
        with place("likeness"):
            likeness = FaceLikeness(config.likeness).to(device) if config.likeness else None
        with place("perceptual"):
            perceptual = Perceptual(config.perceptual).to(device) if config.perceptual else None
        self.judges = Judges(likeness, perceptual)
        judging = self.others.get("discriminators")
        self.objective = GfrnetObjective(
            self.weights,
            perceptual=perceptual,
            discriminators=judging.network if judging else None,  # type: ignore[arg-type]
        )
        with place("exclude"):
            excluded = load_names(config.exclude) if config.exclude else frozenset()
        with place(f"data: {', '.join(str(source) for source in config.data)}"):
            found = [face for source in config.data for face in load_faces(source, exclude=excluded)]
            faces = GuidedFaces(found, device)
        diet = GuidedDiet(
            config.side, config.surveillance_share, config.stranger_share, config.occluded_share, config.vary,
            config.damage, self.network.config.laid,
        )  # fmt: skip
        try:
            self.batches = GuidedBatches(faces, diet, batch=config.batch, seed=config.seed, rank=rank)
        except ValueError as exc:
            raise TrainError(str(exc)) from None
        self.validation = self._validation()
        print(f"{len(faces.pairs):,} pairs of {len(set(faces.persons))} people", flush=True)
        return len(faces)

    def learn(self, network: nn.Module, step: int, config: RunConfig) -> dict[str, float]:
        # Not `network`: DistributedDataParallel knows `forward` alone. `_share` does its work.
        moment, batch = _within(step, config.steps), self.batches[step]
        stage = self._stage(moment, config.steps)
        if isinstance(self.network.rec_net, MaskedRecNet):
            self.network.rec_net.held_open = moment < self.config.open_share * config.steps
        learned = self.objective.restorer(_InBf16(self.network), batch, stage)  # type: ignore[arg-type]
        loss, parts = learned.total, {name: float(term) for name, term in learned.terms.items()}
        if learned.guided is not None:
            restored = learned.guided.restored
            parts["psnr"] = -float(psnr_loss(restored.detach(), batch.clean))
            if moment >= self.config.likeness_from * config.steps:
                loss = loss + self._unlike(restored, batch, parts)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        _share(self.network)
        for part in self.network.children():  # each on its own: WarpNet's gradient is the greater by far
            nn.utils.clip_grad_norm_(part.parameters(), self.config.clip)
        self.optimizer.step()
        if stage == "adversarial" and learned.guided is not None:
            judged = self.objective.discriminators(batch, learned.guided.restored)
            parts["discriminators"] = self.others["discriminators"].step(judged)
        return parts

    def score(self, network: nn.Module) -> tuple[dict[str, float], np.ndarray]:
        return self.validation.score(network)  # type: ignore[arg-type]

    def value(self, scores: dict[str, float]) -> float:
        return self.validation.value(scores)

    def outdated(self, changes: set[str]) -> set[str]:
        return {"discriminators"} if changes & {"discriminator", "network.guide"} else set()

    def _weights(self) -> LossWeights:
        """Return the weights of what this run has."""
        weights = self.config.weights if self.variant.flow_loss else self.config.weights.without_flow()
        if self.config.perceptual is None:
            weights = replace(weights, perceptual=0.0)
        if self.config.adversarial_from == 1:
            weights = replace(weights, adversarial=0.0, local_adversarial=0.0)
        return weights

    def _validation(self) -> GuidedValidation:
        config = self.config
        with place(f"validation: {config.validation}"):
            faces = GuidedFaces(load_faces(config.validation), self.device)
        with place("pairs"):
            part = config.validation.stem if config.validation.is_file() else config.validation.name
            pairs = listed_pairs(config.pairs, faces, part) if config.pairs else first_pairs(faces)
        chosen = np.random.default_rng(1).permutation(len(pairs))[: config.validation_pairs]
        with place(f"validation: {config.validation}"):
            return GuidedValidation(
                faces, pairs[chosen], self.judges, side=config.side, stranger=self.variant.stranger,
                laid=self.network.config.laid,
            )  # fmt: skip

    def _stage(self, step: int, steps: int) -> Stage:
        learns_flow = self.network.warp_net is not None and (self.weights.landmark or self.weights.variation)
        warp = round(self.config.warp_share * steps) if learns_flow else 0
        ends = round(self.config.adversarial_from * steps) if "discriminators" in self.others else steps
        return Schedule(warp=warp, joint=max(ends - warp, 0)).stage(step)

    def _unlike(self, restored: Tensor, batch: GuidedBatch, parts: dict[str, float]) -> Tensor:
        """Return what the embedder has against the first faces whose landmarks are known; tell their cosine."""
        config, likeness = self.config, self.judges.likeness
        whole = torch.isfinite(batch.landmarks).flatten(1).all(dim=1)
        known = whole.nonzero().flatten()[: config.likeness_batch]
        if likeness is None or not len(known):
            return restored.new_zeros(())
        cosine, distance = likeness(restored[known], batch.clean[known], batch.landmarks[known])
        parts["cosine"] = float(cosine.detach().mean())
        return config.identity_weight * (1 - cosine).mean() + config.feature_weight * distance.mean()


class _InBf16:
    """A GFRNet that computes in bf16 where the device does, and gives float32; the losses are for outside of it."""

    def __init__(self, network: Gfrnet, *, enabled: bool | None = None) -> None:
        device = next(network.parameters()).device
        self.network = network
        self.mode = {"device_type": device.type, "enabled": has_bf16(device) if enabled is None else enabled}

    def flow(self, degraded: Tensor, guide: Tensor) -> Tensor:
        with torch.autocast(dtype=torch.bfloat16, **self.mode):
            return self.network.flow(degraded, guide)

    def parts(self, degraded: Tensor, guide: Tensor) -> Guided:
        with torch.autocast(dtype=torch.bfloat16, **self.mode):
            parts = self.network.parts(degraded, guide)
        return replace(parts, restored=parts.restored.float())


def _within(step: int, steps: int) -> int:
    """Return the step itself; for one beyond the run, where its pace is measured, one from anywhere in it, so that
    stages come by their shares."""
    return step if step < steps else int(step * _GOLDEN % 1 * steps)


def _keep_flow_exact(network: Gfrnet) -> None:
    """Let the layers that make the flow give float32: a coordinate in bf16 is off by up to half a pixel."""
    warp_net = network.warp_net
    if warp_net is not None:
        layers = warp_net.corrections if isinstance(warp_net, ResidualWarpNet) else [warp_net.last]
        for layer in layers:
            layer.register_forward_hook(_in_float32)


def _in_float32(layer: nn.Module, inputs: tuple[Tensor, ...], out: Tensor) -> Tensor:
    return out.float()


def _share(network: nn.Module) -> None:
    """Take the mean of all processes' gradients, where there are any: a part that does not learn has none."""
    if not torch.distributed.is_initialized():
        return
    for parameter in network.parameters():
        if parameter.grad is not None:
            torch.distributed.all_reduce(parameter.grad)
            parameter.grad /= torch.distributed.get_world_size()
