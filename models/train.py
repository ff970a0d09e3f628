"""Training a restorer: `python -m models.train configs/train/sgen-small.yaml`. Read from top to bottom.

A run is its YAML file. Everything it leaves lies in `out`: `last.pt` (resumes by itself), `best.pt` (the averaged
weights that validated best), `log.csv`, TensorBoard's files and sample pictures. A run whose config has changed resumes
only with `--accept-changes`. On several GPUs: `torchrun --nproc-per-node 4 -m models.train CONFIG`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch
from pydantic import BaseModel, Field, PositiveInt
from torch import Tensor, nn

from models.batches import REAL, Batch, Batches, Diet, Protocol, Validation
from models.dataset import Face, FaceTensors, load_faces
from models.degradation import Shares
from models.discriminators import SgenDiscriminator, SgenDiscriminatorConfig, discriminator_loss, generator_loss
from models.loop import (
    Learner,
    RunConfig,
    Task,
    TrainError,
    has_bf16,
    make_network,
    place,
    processes,
    train_task,
    training_faces,
)
from models.losses import PIXEL_LOSSES, FaceLikeness, Judges, Perceptual
from models.settings import RelativePath, SettingsError, read_settings
from models.train_embedder import Distillation, EmbedderRunConfig
from models.train_gfrnet import GfrnetRunConfig, GuidedRestoration
from models.train_scgan import ScganRunConfig, ScganTraining

Share = Annotated[float, Field(gt=0)]


class TrainConfig(RunConfig):
    """One run of training."""

    measure: ClassVar[frozenset[str]] = RunConfig.measure | {
        "enlarge", "protocols", "scales", "sigma", "noise", "likeness", "identity_weight", "perceptual",
        "perceptual_weight",
    }  # fmt: skip

    protocols: dict[Protocol, Share] = Field({"sgen": 0.4, "surveillance": 0.6}, min_length=1)
    """Share of the batches at SGEN's protocol (÷4, six sizes, noise), at SISN's (windows, ÷scale, no noise), of what
    cameras give, and of untouched faces: only shrunk, and judged by the likeness to the crop itself."""
    enlarge: Literal["nearest", "cubic"] = "cubic"
    """How the low-resolution face is brought to the result's size before a network that does not enlarge by itself."""
    scales: dict[PositiveInt, Share] = Field({4: 0.4, 2: 0.35, 1: 0.25}, min_length=1)
    """How often a surveillance face is so many times smaller than its result; a network that enlarges has its own."""
    sides: dict[PositiveInt, Share] = Field({96: 0.25, 128: 0.3, 160: 0.25, 192: 0.15, 256: 0.05}, min_length=1)
    """How often a surveillance result has so many pixels a side."""
    sigma: float | tuple[float, float] | None = None
    """SGEN's noise in grey levels, or its range; by default 30 in half of its batches, else drawn from 0 to 50."""
    noise: Literal["gauss", "uniform"] = "gauss"
    """Kind of SGEN's noise (Table VII)."""
    patch: int = Field(32, gt=0)
    """Side of SISN's windows at the low resolution."""
    vary: bool = True
    """Whether exposure, contrast and tint are varied."""
    damage: Shares = Shares()
    """How often surveillance faces suffer from what."""

    pixel: Literal["psnr", "mse", "l1", "charbonnier"] = "psnr"
    """The pixel loss; psnr is −PSNR of each image in dB."""
    likeness: RelativePath | None = None
    """The face embedder (face-reidentification-retail-0095 as ONNX) that surveillance batches are also judged by."""
    identity_weight: float = Field(10.0, ge=0)
    """Of 1 − cosine to the clean face's embedding, beside the pixel loss."""
    feature_weight: float = Field(4.0, ge=0)
    """Of the distance between the embedder's features of restored and clean face, beside the pixel loss."""
    likeness_batch: int = Field(4, gt=0)
    """So many faces of a batch are judged by the embedder: on a CPU it costs as much as the restorer."""
    jitter: float = Field(0.0, ge=0, le=0.2)
    """The landmarks that a face is aligned by for the embedder wander by so many distances between the eyes (standard
    deviation), for the restored and the clean face alike: what one place of the grid alone would see is not learned."""
    disguise: float = Field(0.0, ge=0, le=0.5)
    """In each step the embedder wears a disguise: each of its channels is multiplied by a factor of this standard
    deviation around 1, drawn anew. What pleases it in every disguise pleases recognisers that never taught."""
    fused: bool = False
    """Whether half of the identity loss judges the unit mean of raw and restored embedding, on which decisions rest."""
    perceptual: RelativePath | None = None
    """LPIPS as ONNX, for surveillance batches too. A pixel loss alone draws what is smooth."""
    perceptual_weight: float = Field(8.0, ge=0)
    """Of LPIPS, beside the pixel loss."""
    pixel_share: float = Field(0.0, ge=0, lt=1)
    """The first part of the run, by the pixel loss alone: an embedder that judges from the start teaches what pleases
    it and no other."""
    adversarial: float = Field(0.0, ge=0)
    """Weight of SGEN's adversarial loss beside the pixel loss; 0 trains without a discriminator. The paper: 0.1."""
    discriminator: SgenDiscriminatorConfig = SgenDiscriminatorConfig()
    """Which discriminator judges."""


class _Named(BaseModel):
    network: str = RunConfig.model_fields["network"].default


class _Kind(NamedTuple):
    config: type[RunConfig]
    task: Callable[[Any, torch.device], Task]


_KINDS = {
    "scgan": _Kind(ScganRunConfig, ScganTraining),
    "gfrnet": _Kind(GfrnetRunConfig, GuidedRestoration),
    "embedder": _Kind(EmbedderRunConfig, Distillation),
}
"""Networks that are trained otherwise than by pairs of a damaged and a clean face."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", type=Path)
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--steps", type=int, help="another length of the whole run")
    length.add_argument("--minutes", type=float, help="fix the length at the start so that the run ends in this time")
    parser.add_argument("--out", type=Path, help="another folder for checkpoints and logs")
    parser.add_argument("--accept-changes", action="store_true", help="resume although the config has changed")
    arguments = parser.parse_args()
    given = {name: getattr(arguments, name) for name in ("steps", "minutes", "out")}
    changes = {name: value for name, value in given.items() if value is not None}
    if "steps" in changes:
        changes["minutes"] = None  # those of the YAML
    try:
        config = read_config(arguments.config, changes)
        with processes():
            train(config, accept_changes=arguments.accept_changes)
    except (TrainError, OSError) as exc:
        parser.exit(2, f"{exc}\n")


def read_config(path: Path, changes: dict[str, Any] | None = None) -> RunConfig:
    """Read a run's YAML, its paths made absolute. Raises TrainError with every mistake and its place."""
    changed = {name: value.absolute() if isinstance(value, Path) else value for name, value in (changes or {}).items()}
    try:
        named = read_settings(_Named, path).network
        return read_settings(_KINDS[named].config if named in _KINDS else TrainConfig, path, changed)
    except SettingsError as exc:
        raise TrainError(str(exc)) from None


def train(config: RunConfig, *, accept_changes: bool = False) -> dict[str, float]:
    """Train, or go on; return the best validation's scores. Raises TrainError, as `models.loop.train_task` says."""
    task = _KINDS[config.network].task if config.network in _KINDS else BlindRestoration
    return train_task(config, task, accept_changes=accept_changes)


class BlindRestoration(Task):
    """One network learns to bring damaged faces back to the clean ones."""

    def __init__(self, config: TrainConfig, device: torch.device) -> None:
        self.config, self.device, self.others = config, device, {}
        self.network = make_network(config).to(device, memory_format=torch.channels_last)
        self.optimizer = torch.optim.AdamW(
            self.network.parameters(), lr=config.learning_rate, betas=(0.9, 0.99), weight_decay=1e-4
        )
        if config.adversarial:
            judge = SgenDiscriminator(config.discriminator).to(device, memory_format=torch.channels_last)
            self.others["discriminator"] = Learner(
                judge,  # weight decay on it alone (author code)
                torch.optim.Adam(judge.parameters(), lr=config.learning_rate, betas=(0.5, 0.999), weight_decay=1e-4),
            )

    def load(self, rank: int) -> int:
        config, known = self.config, self.network.config
        diet = Diet(
            config.protocols, config.scales, config.sides,
            (config.sigma, config.sigma) if isinstance(config.sigma, float) else config.sigma,
            config.noise, config.patch, config.vary, config.damage,
        )  # fmt: skip
        with place("likeness"):
            likeness = FaceLikeness(config.likeness).to(self.device) if config.likeness else None
        with place("perceptual"):
            self.judges = Judges(likeness, Perceptual(config.perceptual).to(self.device) if config.perceptual else None)
        faces = training_faces(config, self.device)
        with place(f"validation: {config.validation}"):
            kept = FaceTensors(_sharpest(load_faces(config.validation)), self.device)
        try:
            self.batches = Batches(
                faces, diet, batch=config.batch, seed=config.seed, rank=rank, scale=known.scale, enlarge=config.enlarge,
                multiple=known.multiple,
            )  # fmt: skip
        except ValueError as exc:
            raise TrainError(str(exc)) from None
        weights = {"identity_weight": config.identity_weight, "perceptual_weight": config.perceptual_weight}
        self.validation = Validation(kept, self.batches, self.judges, **weights)
        return len(faces)

    def learn(self, network: nn.Module, step: int, config: RunConfig) -> dict[str, float]:
        present = self.judges if step >= self.config.pixel_share * config.steps else Judges(None, None)
        loss, parts = self._loss(network, self._jittered(self.batches[step], step), present, self._disguise(step))
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.network.parameters(), config.clip)
        self.optimizer.step()
        return parts

    def score(self, network: nn.Module) -> tuple[dict[str, float], np.ndarray]:
        return self.validation.score(network)

    def value(self, scores: dict[str, float]) -> float:
        return self.validation.value(scores)

    def outdated(self, changes: set[str]) -> set[str]:
        return {"discriminator"} & changes

    def _jittered(self, batch: Batch, step: int) -> Batch:
        if not self.config.jitter:
            return batch
        draws = np.random.default_rng([*self.batches.seed, step, 1])  # 1: not the batch's own draws
        wandering = torch.from_numpy(draws.normal(0, self.config.jitter, batch.landmarks.shape)).to(batch.landmarks)
        apart = (batch.landmarks[:, 0] - batch.landmarks[:, 1]).norm(dim=1)
        return replace(batch, landmarks=batch.landmarks + apart[:, None, None] * wandering)

    def _disguise(self, step: int) -> dict[str, Tensor] | None:
        if not self.config.disguise or self.judges.likeness is None:
            return None
        draws = np.random.default_rng([*self.batches.seed, step, 2])  # 2: neither the batch's draws nor the jitter's
        return self.judges.likeness.disguised(draws, self.config.disguise)

    def _loss(
        self, network: nn.Module, batch: Batch, judges: Judges, disguise: dict[str, Tensor] | None
    ) -> tuple[Tensor, dict[str, float]]:
        """Return what the step minimises, and its parts by name, for the log."""
        config, device = self.config, batch.clean.device
        with torch.autocast(device.type, torch.bfloat16, enabled=has_bf16(device)):
            restored = batch.cut_back(network(batch.low))
        restored = restored.float()
        loss: Tensor = PIXEL_LOSSES[config.pixel](restored, batch.clean)
        parts = {"psnr": -float(PIXEL_LOSSES["psnr"](restored.detach(), batch.clean))}
        if judges.likeness is not None and batch.protocol in REAL:
            known = torch.isfinite(batch.landmarks).flatten(1).all(dim=1).nonzero().flatten()[: config.likeness_batch]
            if len(known):
                cosine, distance = judges.likeness(
                    restored[known], batch.person[known], batch.landmarks[known],
                    raw=batch.cut_back(batch.low)[known] if config.fused else None, disguise=disguise,
                )  # fmt: skip
                share = len(known) / len(batch.clean)
                loss = loss + share * (
                    config.identity_weight * (1 - cosine).mean() + config.feature_weight * distance.mean()
                )
                parts["cosine"] = float(cosine.detach().mean())
        if judges.perceptual is not None and batch.protocol in REAL:
            distance = judges.perceptual(restored, batch.clean).mean()
            loss = loss + config.perceptual_weight * distance
            parts["lpips"] = float(distance.detach())
        if judge := self.others.get("discriminator"):
            real, fake = judge.network(batch.clean), judge.network(restored.detach())
            parts["discriminator"] = judge.step(discriminator_loss(real, fake))
            loss = loss + config.adversarial * generator_loss(judge.network(restored))
        return loss, parts


def _sharpest(faces: list[Face], count: int = 24) -> list[Face]:
    """Return some of the largest faces, always the same."""
    most = max((min(face.image.shape[:2]) for face in faces), default=0)
    largest = [face for face in faces if min(face.image.shape[:2]) >= 0.97 * most]
    return [largest[int(i)] for i in np.random.default_rng(1).permutation(len(largest))[:count]]


if __name__ == "__main__":
    sys.exit(main())
