"""Training a restorer: `python -m models.train configs/train/sgen-small.yaml`. Read from top to bottom.

A run is its YAML file. Everything it leaves lies in `out`: `last.pt` (resumes by itself), `best.pt` (the averaged
weights that validated best), `log.csv`, TensorBoard's files and sample pictures. A run whose config has changed resumes
only with `--accept-changes`. On several GPUs: `torchrun --nproc-per-node 4 -m models.train CONFIG`.
"""

from __future__ import annotations

import argparse
import copy
import csv
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

import cv2
import numpy as np
import torch
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PositiveInt
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.tensorboard import SummaryWriter

from models.batches import Batch, Batches, Diet, Protocol, Validation
from models.checkpoint import NETWORKS, build, describe, load_checkpoint, load_weights, save_checkpoint
from models.dataset import Face, FaceTensors, load_faces, load_names
from models.degradation import Shares
from models.discriminators import SgenDiscriminator, SgenDiscriminatorConfig, discriminator_loss, generator_loss
from models.losses import PIXEL_LOSSES, FaceLikeness, Judges, Perceptual
from models.settings import SettingsError, read_settings

_MAY_CHANGE = {"steps", "minutes", "out", "validate_every", "init"}  # none of them changes what a step does
_MEASURE = {
    "validation", "enlarge", "protocols", "scales", "sigma", "noise", "likeness", "identity_weight", "perceptual",
    "perceptual_weight",
}  # fmt: skip
"""What changes the figure that chooses the best weights."""
_PATHS = {"data", "exclude", "validation", "likeness", "perceptual"}
_TRIAL_STEPS = 4
_TRIAL_SHARE = 0.02  # of the minutes: batches differ in size, so a few say little


Share = Annotated[float, Field(gt=0)]


def _for_training(source: Path) -> Path:
    if source.stem.endswith(("_test", "_val")):
        raise ValueError(f"{source.stem} is kept from training: what was trained on it cannot be judged by it")
    return source


class TrainError(ValueError):
    """The run cannot begin or go on: its data or its config is wrong. The message is one line."""


class TrainConfig(BaseModel):
    """One run of training."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    network: str = "sgen"
    """Which network."""
    preset: str = "small"
    """Where its config starts from; `override` changes single fields."""
    override: dict[str, Any] = {}
    """Fields of the network's config that differ from the preset."""
    data: list[Annotated[Path, AfterValidator(_for_training)]]
    """Tars with their CSV beside them, or folders of face crops. Relative paths are relative to this file."""
    exclude: Path | None = None
    """A list of faces that must not be trained on (calibration.txt)."""
    validation: Path
    """The faces that choose the best weights; never trained on."""
    out: Path
    """The folder for checkpoints and logs."""
    init: Path | None = None
    """Weights to begin with: a checkpoint, or an ONNX that was exported."""

    protocols: dict[Protocol, Share] = Field({"sgen": 0.4, "surveillance": 0.6}, min_length=1)
    """Share of the batches at SGEN's protocol (÷4, six sizes, noise), at SISN's (windows, ÷scale, no noise), and of
    what cameras give."""
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
    likeness: Path | None = None
    """The face embedder (face-reidentification-retail-0095 as ONNX) that surveillance batches are also judged by."""
    identity_weight: float = Field(10.0, ge=0)
    """Of 1 − cosine to the clean face's embedding, beside the pixel loss."""
    feature_weight: float = Field(4.0, ge=0)
    """Of the distance between the embedder's features of restored and clean face, beside the pixel loss."""
    likeness_batch: int = Field(4, gt=0)
    """So many faces of a batch are judged by the embedder: on a CPU it costs as much as the restorer."""
    perceptual: Path | None = None
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

    steps: int = Field(20_000, gt=0)
    """Optimiser steps of the whole run."""
    minutes: float | None = Field(None, gt=0)
    """Instead of `steps`: the run measures its pace, sets `steps` at its start and ends in this time."""
    decay_share: float = Field(0.25, gt=0, le=1)
    """The last part of the run, in which the learning rate falls to 0."""
    batch: int = Field(16, gt=0)
    """Faces a step, of each process."""
    learning_rate: float = Field(1e-3, gt=0)
    """Peak learning rate of AdamW."""
    ema: float = Field(0.999, ge=0, lt=1)
    """Decay of the averaged weights that are validated and shipped."""
    clip: float = Field(1.0, gt=0)
    """Largest norm of the gradient."""
    validate_every: int = Field(500, gt=0)
    """Steps between validations; each writes `last.pt` too."""
    seed: int = Field(0, ge=0)
    """Every batch is a function of this and of the step."""


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
        with _processes():
            train(config, accept_changes=arguments.accept_changes)
    except (TrainError, OSError) as exc:
        parser.exit(2, f"{exc}\n")


def read_config(path: Path, changes: dict[str, Any] | None = None) -> TrainConfig:
    """Read a run's YAML, its paths made absolute. Raises TrainError with every mistake and its place."""
    changed = {name: value.absolute() if isinstance(value, Path) else value for name, value in (changes or {}).items()}
    try:
        return _absolute(read_settings(TrainConfig, path, changed), path.resolve().parent)
    except SettingsError as exc:
        raise TrainError(str(exc)) from None


def train(config: TrainConfig, *, accept_changes: bool = False) -> dict[str, float]:
    """Train until `config.steps`, resuming from `last.pt` where there is one; return the best validation's scores.

    Raises TrainError if that run had another config, no face is large enough, a file is not what it should be, or the
    training runs away. With `accept_changes` it goes on under the new config; weights that the network did not have
    before begin untrained.
    """
    began = time.monotonic()
    torch.manual_seed(config.seed)
    cv2.setNumThreads(1)
    rank, leads = int(os.environ.get("RANK", 0)), int(os.environ.get("RANK", 0)) == 0
    device = _device()
    network = _network(config).to(device, memory_format=torch.channels_last)
    if config.batch == 1 and any(isinstance(module, nn.BatchNorm2d) for module in network.modules()):
        raise TrainError("batch: batch normalisation needs 2 faces at least")
    judge = SgenDiscriminatorOptimiser(config, device) if config.adversarial else None
    averaged = AveragedModel(network, multi_avg_fn=_average(config.ema), use_buffers=True)
    optimizer = torch.optim.AdamW(network.parameters(), lr=config.learning_rate, betas=(0.9, 0.99), weight_decay=1e-4)

    if leads:
        config.out.mkdir(parents=True, exist_ok=True)
    step, best, best_scores, validating = 0, -math.inf, {}, 0.0
    last = config.out / "last.pt"
    if last.exists():
        with _place("resuming"):
            state = _resumable(last)
        step, best, best_scores, validating = (state[name] for name in ("step", "best", "best_scores", "validating"))
        if config.minutes:
            config = config.model_copy(update={"steps": state["config"]["steps"]})  # the plan holds
        if changes := _changes(state, config, network):
            listed = "; ".join(changes.values())
            if not accept_changes:
                raise TrainError(f"{last} had another config ({listed}): undo that, or resume with --accept-changes")
            print(f"accepted: {listed}", flush=True)
            if changes.keys() & _MEASURE:
                best = -math.inf  # it was measured by another measure
        if step >= config.steps:
            print(f"{last} has done {step} steps already, {config.steps} are asked for: nothing to do", flush=True)
            return best_scores
        _restore_state(state, network, averaged, optimizer)
        if judge and "judge" in state and "discriminator" not in changes:
            judge.load_state_dict(state["judge"])
        print(f"resuming {last} at step {step}", flush=True)
    elif config.init:
        _begin_with(config.init, network, averaged)

    batches, validation, judges = _load(config, network, device, rank)
    count = sum(p.numel() for p in network.parameters())
    print(f"{len(batches.faces)} faces, {count:,} parameters, {device}", flush=True)
    trained: nn.Module = network
    if torch.distributed.is_initialized():
        trained = DistributedDataParallel(network)
    if config.minutes and not last.exists():
        steps, validating = _plan(config, trained, optimizer, averaged, batches, validation, judges, judge, began)
        config = config.model_copy(update={"steps": steps})
        print(f"{steps} steps fit into {config.minutes:g} minutes", flush=True)
    deadline = began + 60 * config.minutes if config.minutes else math.inf

    writer = SummaryWriter(str(config.out)) if leads else None
    started, first = time.monotonic(), step
    told: dict[str, list[float]] = {}
    network.train()
    while step < config.steps:
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * _schedule(step, config)
        present = judges if step >= config.pixel_share * config.steps else Judges(None, None)
        parts = _learn(config, trained, optimizer, batches[step], present, judge)
        averaged.update_parameters(network)
        step += 1
        for name, value in parts.items():
            told.setdefault(name, []).append(value)

        due = step % config.validate_every == 0
        late = time.monotonic() + (2.5 if due else 1.5) * validating > deadline  # one that is due is not the last
        ends = step >= config.steps or (config.minutes is not None and _most(late, device) > 0)
        if step % 100 == 0:
            if writer:
                _report(step, config, told, (time.monotonic() - started) / (step - first), writer)
            told.clear()
        if writer and (due or ends):
            before = time.monotonic()
            scores, picture = validation.score(averaged.module.eval())
            value = validation.value(scores)
            if not math.isfinite(value):
                raise TrainError(f"step {step}: the weights are no numbers any more; try a smaller learning_rate")
            print(
                f"step {step}  value {value:+.3f}  " + "  ".join(f"{k} {v:+.3f}" for k, v in scores.items()), flush=True
            )
            _log(config.out / "log.csv", {"step": step, "value": value, **scores})
            writer.add_scalars("validation", scores, step)
            writer.add_image("samples", picture, step, dataformats="HWC")
            cv2.imwrite(str(config.out / "samples.png"), picture[..., ::-1])
            described = {"network": describe(network), "step": step, "config": config.model_dump(mode="json")}
            if value > best:
                best, best_scores = value, scores
                save_checkpoint(
                    config.out / "best.pt", weights=averaged.module.state_dict(), scores=scores, **described
                )
            save_checkpoint(
                last, weights=network.state_dict(), averaged=averaged.state_dict(), optimizer=optimizer.state_dict(),
                parameters=[name for name, _ in network.named_parameters()], best=best, best_scores=best_scores,
                validating=validating, **({"judge": judge.state_dict()} if judge else {}), **described,
            )  # fmt: skip
            validating = time.monotonic() - before
        if ends:
            break
    if writer:
        writer.close()
    return best_scores


def _learn(
    config: TrainConfig, network: nn.Module, optimizer: torch.optim.Optimizer, batch: Batch, judges: Judges,
    judge: SgenDiscriminatorOptimiser | None,
) -> dict[str, float]:  # fmt: skip
    """Take one step; return the parts of what it minimised."""
    loss, parts = _loss(config, network, batch, judges, judge)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(network.parameters(), config.clip)
    optimizer.step()
    return parts


def _loss(
    config: TrainConfig,
    network: nn.Module,
    batch: Batch,
    judges: Judges,
    judge: SgenDiscriminatorOptimiser | None,
) -> tuple[Tensor, dict[str, float]]:
    """Return what the step minimises, and its parts by name, for the log."""
    device = batch.clean.device
    with torch.autocast(device.type, torch.bfloat16, enabled=_has_bf16(device)):
        restored = batch.cut_back(network(batch.low))
    restored = restored.float()
    loss: Tensor = PIXEL_LOSSES[config.pixel](restored, batch.clean)
    parts = {"psnr": -float(PIXEL_LOSSES["psnr"](restored.detach(), batch.clean))}
    if judges.likeness is not None and batch.protocol == "surveillance":
        known = torch.isfinite(batch.landmarks).flatten(1).all(dim=1).nonzero().flatten()[: config.likeness_batch]
        if len(known):
            cosine, distance = judges.likeness(restored[known], batch.clean[known], batch.landmarks[known])
            share = len(known) / len(batch.clean)
            loss = loss + share * (
                config.identity_weight * (1 - cosine).mean() + config.feature_weight * distance.mean()
            )
            parts["cosine"] = float(cosine.detach().mean())
    if judges.perceptual is not None and batch.protocol == "surveillance":
        distance = judges.perceptual(restored, batch.clean).mean()
        loss = loss + config.perceptual_weight * distance
        parts["lpips"] = float(distance.detach())
    if judge is not None:
        parts["discriminator"] = judge.step(batch.clean, restored.detach())
        loss = loss + config.adversarial * generator_loss(judge.network(restored))
    return loss, parts


class SgenDiscriminatorOptimiser:
    """SGEN's discriminator and its own steps: Adam with beta 0.5, weight decay on it alone (author code)."""

    def __init__(self, config: TrainConfig, device: torch.device) -> None:
        self.network = SgenDiscriminator(config.discriminator).to(device, memory_format=torch.channels_last)
        self.optimizer = torch.optim.Adam(
            self.network.parameters(), lr=config.learning_rate, betas=(0.5, 0.999), weight_decay=1e-4
        )

    def step(self, real: Tensor, restored: Tensor) -> float:
        """Learn to tell the real faces from the restored ones; return the loss."""
        loss = discriminator_loss(self.network(real), self.network(restored))
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        _share_gradients(self.network)
        self.optimizer.step()
        return float(loss.detach())

    def state_dict(self) -> dict[str, Any]:
        return {"weights": self.network.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.network.load_state_dict(state["weights"])
        self.optimizer.load_state_dict(state["optimizer"])


def _network(config: TrainConfig) -> nn.Module:
    if config.network not in NETWORKS:
        raise TrainError(f"network: {config.network!r} is unknown; known: {', '.join(NETWORKS)}")
    presets = NETWORKS[config.network].presets
    if config.preset not in presets:
        raise TrainError(f"preset: {config.network} has no {config.preset!r}; it has {', '.join(presets)}")
    try:
        return build({"name": config.network, **asdict(presets[config.preset]), **config.override})
    except (TypeError, ValueError) as exc:
        raise TrainError(f"override: {' '.join(str(exc).split())}") from None


def _load(
    config: TrainConfig, network: nn.Module, device: torch.device, rank: int
) -> tuple[Batches, Validation, Judges]:
    with _place("exclude"):
        excluded = load_names(config.exclude) if config.exclude else frozenset()
    diet = Diet(
        config.protocols, config.scales, config.sides,
        (config.sigma, config.sigma) if isinstance(config.sigma, float) else config.sigma,
        config.noise, config.patch, config.vary, config.damage,
    )  # fmt: skip
    with _place("likeness"):
        likeness = FaceLikeness(config.likeness).to(device) if config.likeness else None
    with _place("perceptual"):
        judges = Judges(likeness, Perceptual(config.perceptual).to(device) if config.perceptual else None)
    with _place(f"data: {', '.join(str(source) for source in config.data)}"):
        faces = FaceTensors([face for source in config.data for face in load_faces(source, exclude=excluded)], device)
    with _place(f"validation: {config.validation}"):
        kept = FaceTensors(_sharpest(load_faces(config.validation)), device)
    known: Any = network.config
    try:
        batches = Batches(
            faces, diet, batch=config.batch, seed=config.seed, rank=rank, scale=known.scale, enlarge=config.enlarge,
            multiple=known.multiple,
        )  # fmt: skip
    except ValueError as exc:
        raise TrainError(str(exc)) from None
    weights = {"identity_weight": config.identity_weight, "perceptual_weight": config.perceptual_weight}
    return batches, Validation(kept, batches, judges, **weights), judges


def _sharpest(faces: list[Face], count: int = 24) -> list[Face]:
    """Return some of the largest faces, always the same."""
    most = max((min(face.image.shape[:2]) for face in faces), default=0)
    largest = [face for face in faces if min(face.image.shape[:2]) >= 0.97 * most]
    return [largest[int(i)] for i in np.random.default_rng(1).permutation(len(largest))[:count]]


def _plan(
    config: TrainConfig, network: nn.Module, optimizer: torch.optim.Optimizer, averaged: AveragedModel,
    batches: Batches, validation: Validation, judges: Judges, judge: SgenDiscriminatorOptimiser | None, began: float,
) -> tuple[int, float]:  # fmt: skip
    """Return how many steps fit into the minutes, and the seconds of a validation.

    Measured on a few steps, which are undone, with all judges; where there are several processes, they agree on the
    slowest.
    """
    device, seconds = batches.faces.device, 60 * (config.minutes or 0)
    learners = [network, optimizer, *([judge] if judge else [])]
    before = [copy.deepcopy(learner.state_dict()) for learner in learners]
    tried, since = 0, time.monotonic()
    while tried < 2 * _TRIAL_STEPS or _most(time.monotonic() - since, device) < _TRIAL_SHARE * seconds:
        if tried == _TRIAL_STEPS:
            since = time.monotonic()  # the first ones are slow
        _learn(config, network, optimizer, batches[2**31 + tried], judges, judge)
        tried += 1
    pace = _most((time.monotonic() - since) / (tried - _TRIAL_STEPS), device)
    for learner, state in zip(learners, before, strict=True):
        learner.load_state_dict(state)

    since = time.monotonic()
    validation.score(averaged.module.eval())
    validating = _most(time.monotonic() - since, device)
    left = seconds - _most(time.monotonic() - began, device) - 2 * validating
    return max(int(0.9 * left / (pace + validating / config.validate_every)), 1), validating


def _report(step: int, config: TrainConfig, told: dict[str, list[float]], pace: float, writer: SummaryWriter) -> None:
    means = {name: float(np.mean(values)) for name, values in told.items()}
    left = (config.steps - step) * pace / 60
    parts = "  ".join(f"{name} {value:.3f}" for name, value in means.items())
    print(f"step {step}/{config.steps}  {parts}  {pace:.2f} s/step  {left:.0f} min left", flush=True)
    for name, value in means.items():
        writer.add_scalar(f"train/{name}", value, step)


@contextmanager
def _processes() -> Iterator[None]:
    """Join the processes that torchrun started, if it did."""
    if "RANK" not in os.environ:
        yield
        return
    torch.distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


def _most(value: float, device: torch.device) -> float:
    """Return the largest of all processes' values: they must leave a loop at the same step."""
    if not torch.distributed.is_initialized():
        return value
    shared = torch.tensor([value], dtype=torch.float64, device=device)
    torch.distributed.all_reduce(shared, torch.distributed.ReduceOp.MAX)
    return float(shared)


def _share_gradients(network: nn.Module) -> None:
    """Take the mean of all processes' gradients. DistributedDataParallel does not stand two passes before a step."""
    if not torch.distributed.is_initialized():
        return
    for parameter in network.parameters():
        torch.distributed.all_reduce(parameter.grad)
        parameter.grad /= torch.distributed.get_world_size()  # type: ignore[operator]


def _device() -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    torch.cuda.set_device(device)
    return device


def _changes(state: dict[str, Any], config: TrainConfig, network: nn.Module) -> dict[str, str]:
    """Return what differs between the checkpoint's run and this one, by field, such as `batch 8, now 16`.

    Paths are compared by their names, as data may move; the network by what was built, as presets may change.
    """
    was = build(state["network"], untrained=True)
    defaults = TrainConfig(data=config.data, validation=config.validation, out=config.out)
    before = defaults.model_dump(mode="json") | state["config"]
    before |= {f"network.{name}": value for name, value in describe(was).items()}
    now = config.model_dump(mode="json")
    now |= {f"network.{name}": value for name, value in describe(network).items()}
    compared = (before.keys() | now.keys()) - _MAY_CHANGE - {"preset", "override", "network"}
    pairs = {name: (_named(name, before.get(name)), _named(name, now.get(name))) for name in sorted(compared)}
    return {name: f"{name} {was}, now {value}" for name, (was, value) in pairs.items() if was != value}


def _named(field: str, value: Any) -> Any:
    """Return a field's value, of paths only the names."""
    if field == "data":
        return [Path(path).name for path in value]
    return Path(value).name if field in _PATHS and value else value


@contextmanager
def _place(place: str) -> Iterator[None]:
    """Turn what is wrong with a file into one line that begins with its place."""
    try:
        yield
    except (OSError, ValueError) as exc:
        raise TrainError(f"{place}: {exc}") from None


def _resumable(path: Path) -> dict[str, Any]:
    """Read a last.pt. Raises ValueError for other checkpoints."""
    state = {"validating": 0.0, **load_checkpoint(path)}
    if missing := sorted({"averaged", "optimizer", "parameters", "best", "best_scores"} - state.keys()):
        raise ValueError(f"{path} cannot be resumed, it has no {', '.join(missing)}; begin with it by `init`")
    return state


def _restore_state(
    state: dict[str, Any], network: nn.Module, averaged: AveragedModel, optimizer: torch.optim.Optimizer
) -> None:
    """Take over weights, their averages and the optimiser's moments; what is new or has another shape begins anew."""
    kept = _fitting(state["weights"], network)
    if new := [name for name in network.state_dict() if name not in kept]:
        print(f"untrained: {', '.join(new)}", flush=True)
    network.load_state_dict(kept, strict=not new)
    averaged.load_state_dict(_fitting(state["averaged"], averaged), strict=not new)
    optimizer.load_state_dict(_moved(state["optimizer"], state["parameters"], network, kept))


def _begin_with(path: Path, network: nn.Module, averaged: AveragedModel) -> None:
    """Take over the weights of a file; what the network does not have there begins untrained."""
    with _place("init"):
        kept = _fitting(load_weights(path), network)
    if not kept:
        raise TrainError(f"init: {path} has no weight that fits this network")
    new = [name for name in network.state_dict() if name not in kept]
    network.load_state_dict(kept, strict=False)
    averaged.module.load_state_dict(kept, strict=False)
    print(f"beginning with {path}" + (f"; untrained: {', '.join(new)}" if new else ""), flush=True)


def _fitting(weights: dict[str, Tensor], network: nn.Module) -> dict[str, Tensor]:
    own = network.state_dict()
    return {name: weight for name, weight in weights.items() if name in own and own[name].shape == weight.shape}


def _moved(moments: dict[str, Any], names: list[str], network: nn.Module, kept: dict[str, Tensor]) -> dict[str, Any]:
    """Return the optimiser's state, in which the parameters were numbered as in `names`, numbered as in `network`."""
    numbers = {name: number for number, name in enumerate(names) if name in kept}
    now = [name for name, _ in network.named_parameters()]
    held = moments["state"]
    state = {number: held[numbers[name]] for number, name in enumerate(now) if numbers.get(name) in held}
    return {"state": state, "param_groups": [{**moments["param_groups"][0], "params": list(range(len(now)))}]}


def _average(decay: float) -> Callable[[Any, Any, Any], None]:
    """Return the rule by which weights are averaged: over fewer steps at first, so that a short run is not left with
    the weights it began with."""

    def update(averaged: Any, weights: Any, done: Tensor) -> None:
        get_ema_multi_avg_fn(min(decay, (1 + int(done)) / (10 + int(done))))(averaged, weights, done)

    return update


def _schedule(step: int, config: TrainConfig) -> float:
    """Warm up over 200 steps (a tenth of a short run), hold, then fall linearly: the decay may be moved meanwhile."""
    warm_up, decay = min(200, config.steps / 10), config.steps * config.decay_share
    return max(min((step + 1) / warm_up, 1.0, (config.steps - step) / decay), 0.0)


def _has_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    return bool(torch.cpu._is_avx512_bf16_supported())


def _absolute(config: TrainConfig, folder: Path) -> TrainConfig:
    """Resolve relative paths against the YAML's folder."""

    def resolved(path: Path | None) -> Path | None:
        return (folder / path).resolve() if path else None

    names = ("exclude", "validation", "init", "likeness", "perceptual", "out")
    return config.model_copy(
        update={
            "data": [(folder / path).resolve() for path in config.data],
            **{name: resolved(getattr(config, name)) for name in names},
        }
    )


def _log(path: Path, row: dict[str, float]) -> None:
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, list(row))
        if new:
            writer.writeheader()
        writer.writerow(row)


if __name__ == "__main__":
    sys.exit(main())
