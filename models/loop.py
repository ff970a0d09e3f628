"""The loop that every training runs in: resume, averaged weights, validation, checkpoints, a plan in minutes.

What is trained, on what and by which loss, is a `Task`; `models.train` finds it by the network's name.
"""

from __future__ import annotations

import copy
import csv
import math
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, ClassVar

import cv2
import numpy as np
import torch
from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.tensorboard import SummaryWriter

from models.checkpoint import NETWORKS, build, describe, load_checkpoint, load_weights, save_checkpoint
from models.dataset import FaceTensors, load_faces, load_names
from models.settings import RelativePath

_MAY_CHANGE = {"steps", "minutes", "out", "validate_every", "init"}  # none of them changes what a step does
_PATHS = {"data", "low", "pairs", "exclude", "validation", "likeness", "perceptual", "teacher", "restorers"}
_TRIAL_STEPS = 4
_TRIAL_SHARE = 0.02  # of the minutes: batches differ in size, so a few say little


def _for_training(source: Path) -> Path:
    if source.stem.endswith(("_test", "_val")):
        raise ValueError(f"{source.stem} is kept from training: what was trained on it cannot be judged by it")
    return source


class TrainError(ValueError):
    """The run cannot begin or go on: its data or its config is wrong. The message is one line."""


class RunConfig(BaseModel):
    """What every run has."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    measure: ClassVar[frozenset[str]] = frozenset({"validation"})
    """The fields that change the figure that chooses the best weights."""

    network: str = "sgen"
    """Which network."""
    preset: str = "small"
    """Where its config starts from; `override` changes single fields."""
    override: dict[str, Any] = {}
    """Fields of the network's config that differ from the preset."""
    data: list[Annotated[RelativePath, AfterValidator(_for_training)]]
    """Tars with their CSV beside them, or folders of face crops. Relative paths are relative to this file."""
    exclude: RelativePath | None = None
    """A list of faces that must not be trained on (calibration.txt)."""
    validation: RelativePath
    """The faces that choose the best weights; never trained on."""
    out: RelativePath
    """The folder for checkpoints and logs."""
    init: RelativePath | None = None
    """Weights to begin with: a checkpoint, or an ONNX that was exported."""

    steps: int = Field(20_000, gt=0)
    """Optimiser steps of the whole run."""
    minutes: float | None = Field(None, gt=0)
    """Instead of `steps`: the run measures its pace, sets `steps` at its start and ends in this time."""
    decay_share: float = Field(0.25, gt=0, le=1)
    """The last part of the run, in which the learning rate falls to 0."""
    batch: int = Field(16, gt=0)
    """Faces a step, of each process."""
    learning_rate: float = Field(1e-3, gt=0)
    """Peak learning rate."""
    ema: float = Field(0.999, ge=0, lt=1)
    """Decay of the averaged weights that are validated and shipped."""
    clip: float = Field(1.0, gt=0)
    """Largest norm of the gradient."""
    validate_every: int = Field(500, gt=0)
    """Steps between validations; each writes `last.pt` too."""
    seed: int = Field(0, ge=0)
    """Every batch is a function of this and of the step."""


class Learner:
    """A network that learns beside the one that ships, such as a discriminator, with its own optimiser."""

    def __init__(self, network: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.network, self.optimizer = network, optimizer

    def step(self, loss: Tensor) -> float:
        """Go one step down the loss; return it."""
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        share_gradients(self.network)
        self.optimizer.step()
        return float(loss.detach())

    def state_dict(self) -> dict[str, Any]:
        return {"weights": self.network.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.network.load_state_dict(state["weights"])
        self.optimizer.load_state_dict(state["optimizer"])


class Task(ABC):
    """What is trained, on what, and by which loss."""

    network: nn.Module
    """What is averaged, validated and shipped."""
    optimizer: torch.optim.Optimizer
    """Of the network; the loop sets its learning rate."""
    others: dict[str, Learner]
    """What learns beside it, by name."""

    @abstractmethod
    def load(self, rank: int) -> int:
        """Load data and frozen judges; return how many faces are learned from. Raises TrainError."""

    @abstractmethod
    def learn(self, network: nn.Module, step: int, config: RunConfig) -> dict[str, float]:
        """Take one step; return the parts of what it minimised, by name.

        `network` is that of the task, maybe wrapped so that processes share gradients; `config.steps` is known now.
        """

    @abstractmethod
    def score(self, network: nn.Module) -> tuple[dict[str, float], np.ndarray]:
        """Return the validation's scores by name, and a picture: (H, W, 3) uint8 RGB."""

    @abstractmethod
    def value(self, scores: dict[str, float]) -> float:
        """Return the one figure of the scores that chooses the best weights: more is better."""

    def outdated(self, changes: set[str]) -> set[str]:
        """Return which of `others` cannot go on where the run's config has changed in these fields."""
        return set()


def train_task(
    config: RunConfig, make: Callable[[Any, torch.device], Task], *, accept_changes: bool = False
) -> dict[str, float]:
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
    task = make(config, device)
    network, optimizer = task.network, task.optimizer
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    if config.batch == 1 and any(norm.track_running_stats for norm in norms):
        raise TrainError("batch: batch normalisation needs 2 faces at least")
    averaged = AveragedModel(network, multi_avg_fn=_average(config.ema), use_buffers=True)

    if leads:
        config.out.mkdir(parents=True, exist_ok=True)
    step, best, best_scores, validating = 0, -math.inf, {}, 0.0
    last = config.out / "last.pt"
    if last.exists():
        with place("resuming"):
            state = _resumable(last)
        step, best, best_scores, validating = (state[name] for name in ("step", "best", "best_scores", "validating"))
        if config.minutes:
            config = config.model_copy(update={"steps": state["config"]["steps"]})  # the plan holds
        if changes := _changes(state, config, network):
            listed = "; ".join(changes.values())
            if not accept_changes:
                raise TrainError(f"{last} had another config ({listed}): undo that, or resume with --accept-changes")
            print(f"accepted: {listed}", flush=True)
            if changes.keys() & config.measure:
                best = -math.inf  # it was measured by another measure
        if step >= config.steps:
            print(f"{last} has done {step} steps already, {config.steps} are asked for: nothing to do", flush=True)
            return best_scores
        _restore_state(state, network, averaged, optimizer)
        for name in task.others.keys() & state["others"].keys() - task.outdated(set(changes)):
            task.others[name].load_state_dict(state["others"][name])
        print(f"resuming {last} at step {step}", flush=True)
    elif config.init:
        _begin_with(config.init, network, averaged)

    faces = task.load(rank)
    count = sum(p.numel() for p in network.parameters())
    print(f"{faces} faces, {count:,} parameters, {device}", flush=True)
    trained: nn.Module = network
    if torch.distributed.is_initialized():
        trained = DistributedDataParallel(network)
    if config.minutes and not last.exists():
        steps, validating = _plan(config, task, trained, averaged, device, began)
        config = config.model_copy(update={"steps": steps})
        print(f"{steps} steps fit into {config.minutes:g} minutes", flush=True)
    deadline = began + 60 * config.minutes if config.minutes else math.inf

    writer = SummaryWriter(str(config.out)) if leads else None
    started, first = time.monotonic(), step
    told: dict[str, list[float]] = {}
    network.train()
    while step < config.steps:
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * schedule(step, config)
        parts = task.learn(trained, step, config)
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
            scores, picture = task.score(averaged.module.eval())
            value = task.value(scores)
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
                validating=validating, others={name: other.state_dict() for name, other in task.others.items()},
                **described,
            )  # fmt: skip
            validating = time.monotonic() - before
        if ends:
            break
    if writer:
        writer.close()
    return best_scores


def make_network(config: RunConfig) -> nn.Module:
    """Build the network that the config names. Raises TrainError."""
    if config.network not in NETWORKS:
        raise TrainError(f"network: {config.network!r} is unknown; known: {', '.join(NETWORKS)}")
    presets = NETWORKS[config.network].presets
    if config.preset not in presets:
        raise TrainError(f"preset: {config.network} has no {config.preset!r}; it has {', '.join(presets)}")
    try:
        return build({"name": config.network, **asdict(presets[config.preset]), **config.override})
    except (TypeError, ValueError) as exc:
        raise TrainError(f"override: {' '.join(str(exc).split())}") from None


def training_faces(config: RunConfig, device: torch.device) -> FaceTensors:
    """Load the faces to learn from. Raises TrainError."""
    with place("exclude"):
        excluded = load_names(config.exclude) if config.exclude else frozenset()
    with place(f"data: {', '.join(str(source) for source in config.data)}"):
        return FaceTensors([face for source in config.data for face in load_faces(source, exclude=excluded)], device)


def _plan(
    config: RunConfig, task: Task, network: nn.Module, averaged: AveragedModel, device: torch.device, began: float
) -> tuple[int, float]:
    """Return how many steps fit into the minutes, and the seconds of a validation.

    Measured on a few steps, which are undone, with all judges; where there are several processes, they agree on the
    slowest.
    """
    seconds = 60 * (config.minutes or 0)
    learners = [network, task.optimizer, *task.others.values()]
    before = [copy.deepcopy(learner.state_dict()) for learner in learners]
    tried, since = 0, time.monotonic()
    while tried < 2 * _TRIAL_STEPS or _most(time.monotonic() - since, device) < _TRIAL_SHARE * seconds:
        if tried == _TRIAL_STEPS:
            since = time.monotonic()  # the first ones are slow
        task.learn(network, 2**31 + tried, config)
        tried += 1
    pace = _most((time.monotonic() - since) / (tried - _TRIAL_STEPS), device)
    for learner, state in zip(learners, before, strict=True):
        learner.load_state_dict(state)

    since = time.monotonic()
    task.score(averaged.module.eval())
    validating = _most(time.monotonic() - since, device)
    left = seconds - _most(time.monotonic() - began, device) - 2 * validating
    return max(int(0.9 * left / (pace + validating / config.validate_every)), 1), validating


def _report(step: int, config: RunConfig, told: dict[str, list[float]], pace: float, writer: SummaryWriter) -> None:
    means = {name: float(np.mean(values)) for name, values in told.items()}
    left = (config.steps - step) * pace / 60
    parts = "  ".join(f"{name} {value:.3f}" for name, value in means.items())
    print(f"step {step}/{config.steps}  {parts}  {pace:.2f} s/step  {left:.0f} min left", flush=True)
    for name, value in means.items():
        writer.add_scalar(f"train/{name}", value, step)


@contextmanager
def processes() -> Iterator[None]:
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


def share_gradients(network: nn.Module) -> None:
    """Take the mean of all processes' gradients. DistributedDataParallel does not stand two passes before a step."""
    if not torch.distributed.is_initialized():
        return
    for parameter in network.parameters():
        if parameter.grad is None:  # here it had nothing to learn; elsewhere it may have
            parameter.grad = torch.zeros_like(parameter)
        torch.distributed.all_reduce(parameter.grad)
        parameter.grad /= torch.distributed.get_world_size()


def _device() -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    torch.cuda.set_device(device)
    return device


def _changes(state: dict[str, Any], config: RunConfig, network: nn.Module) -> dict[str, str]:
    """Return what differs between the checkpoint's run and this one, by field, such as `batch 8, now 16`.

    Paths are compared by their names, as data may move; the network by what was built, as presets may change.
    """
    was = build(state["network"], untrained=True)
    needed = {name: getattr(config, name) for name, field in type(config).model_fields.items() if field.is_required()}
    before = type(config)(**needed).model_dump(mode="json") | state["config"]
    before |= {f"network.{name}": value for name, value in describe(was).items()}
    now = config.model_dump(mode="json")
    now |= {f"network.{name}": value for name, value in describe(network).items()}
    compared = (before.keys() | now.keys()) - _MAY_CHANGE - {"preset", "override", "network"}
    pairs = {name: (_named(name, before.get(name)), _named(name, now.get(name))) for name in sorted(compared)}
    return {name: f"{name} {was}, now {value}" for name, (was, value) in pairs.items() if was != value}


def _named(field: str, value: Any) -> Any:
    """Return a field's value, of paths only the names."""
    if isinstance(value, list):
        return [_named(field, each) for each in value]
    return Path(value).name if field in _PATHS and isinstance(value, str) else value


@contextmanager
def place(place: str) -> Iterator[None]:
    """Turn what is wrong with a file into one line that begins with its place."""
    try:
        yield
    except (OSError, ValueError) as exc:
        raise TrainError(f"{place}: {exc}") from None


def _resumable(path: Path) -> dict[str, Any]:
    """Read a last.pt. Raises ValueError for other checkpoints."""
    state = {"validating": 0.0, "others": {}, **load_checkpoint(path)}
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
    with place("init"):
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


def schedule(step: int, config: RunConfig) -> float:
    """Warm up over 200 steps (a tenth of a short run), hold, then fall linearly: the decay may be moved meanwhile."""
    warm_up, decay = min(200, config.steps / 10), config.steps * config.decay_share
    return max(min((step + 1) / warm_up, 1.0, (config.steps - step) / decay), 0.0)


def has_bf16(device: torch.device) -> bool:
    """Say whether the device computes in bf16 by itself."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    return bool(torch.cpu._is_avx512_bf16_supported())


def _log(path: Path, row: dict[str, float]) -> None:
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, list(row))
        if new:
            writer.writeheader()
        writer.writerow(row)
