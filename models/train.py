"""Training a restorer: `python -m models.train configs/train/sgen-small.yaml`. Read from top to bottom.

A run is its YAML file. Everything it leaves lies in `out`: `last.pt` (resumes by itself), `best.pt` (the averaged
weights that validated best), `log.csv`, TensorBoard's files and sample pictures. A run whose config has changed resumes
only with `--accept-changes`.
"""

from __future__ import annotations

import argparse
import csv
import math
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np
import torch
import yaml
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, Dataset
from torch.utils.tensorboard import SummaryWriter

from models.checkpoint import describe, load_checkpoint, save_checkpoint
from models.dataset import Face, cut, load_faces, load_names
from models.degradation import SGEN_SIZES, CameraDamage, camera_degrade, draw_damage, sgen_degrade
from models.sgen import PRESETS, Sgen, SgenConfig

_CAMERA_SIDES = (96, 128, 160, 192, 256)  # of clean faces in pixels
_MAY_CHANGE = {"steps", "out", "workers", "validate_every"}  # none of them changes what a step does


class TrainError(ValueError):
    """The run cannot begin or go on: its data or its config is wrong. The message is one line."""


class TrainConfig(BaseModel):
    """One run of training."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    network: Literal["sgen"] = "sgen"
    """Which network."""
    preset: str = "small"
    """Where its config starts from; `override` changes single fields."""
    override: dict[str, Any] = {}
    """Fields of the network's config that differ from the preset."""
    data: list[Path]
    """Tars with their CSV beside them, or folders of face crops. Relative paths are relative to this file."""
    exclude: Path | None = None
    """A list of faces that must not be trained on (calibration.txt)."""
    validation: Path
    """The faces that choose the best weights; never trained on."""
    out: Path
    """The folder for checkpoints and logs."""
    enlarge: Literal["nearest", "cubic"] = "cubic"
    """How the low-resolution face is brought to the result's size before the network."""
    paper_share: float = Field(0.45, ge=0, le=1)
    """Share of batches at SGEN's own protocol (÷4, six sizes); the rest is what cameras give."""
    paper_sigma: float | None = None
    """Noise of the paper's batches in grey levels; by default 30 in half of them, else drawn from 0 to 50."""
    steps: int = Field(20_000, gt=0)
    """Optimiser steps of the whole run."""
    decay_share: float = Field(0.25, gt=0, le=1)
    """The last part of the run, in which the learning rate falls to 0."""
    batch: int = Field(16, gt=0)
    """Faces a step."""
    learning_rate: float = Field(1e-3, gt=0)
    """Peak learning rate of AdamW."""
    ema: float = Field(0.999, ge=0, lt=1)
    """Decay of the averaged weights that are validated and shipped."""
    clip: float = Field(1.0, gt=0)
    """Largest norm of the gradient."""
    validate_every: int = Field(500, gt=0)
    """Steps between validations; each writes `last.pt` too."""
    workers: int = Field(0, ge=0)
    """Processes that prepare batches; 0 does it in line."""
    seed: int = 0
    """Every batch is a function of this and of the step."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", type=Path)
    parser.add_argument("--steps", type=int, help="another length of the whole run")
    parser.add_argument("--accept-changes", action="store_true", help="resume although the config has changed")
    arguments = parser.parse_args()
    settings = yaml.safe_load(arguments.config.read_text())
    if arguments.steps is not None:
        settings["steps"] = arguments.steps
    config = _absolute(TrainConfig(**settings), arguments.config.resolve().parent)
    try:
        train(config, accept_changes=arguments.accept_changes)
    except TrainError as exc:
        parser.exit(2, f"{exc}\n")


def train(config: TrainConfig, *, accept_changes: bool = False) -> None:
    """Train until `config.steps`, resuming from `last.pt` where there is one.

    Raises TrainError if that run had another config, or no face is large enough. With `accept_changes` it goes on
    under the new config; weights that the network did not have before begin untrained.
    """
    torch.manual_seed(config.seed)
    cv2.setNumThreads(1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network = Sgen(SgenConfig(**{**PRESETS[config.preset].__dict__, **config.override}))
    network = network.to(device, memory_format=torch.channels_last)
    averaged = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(config.ema))
    optimizer = torch.optim.AdamW(network.parameters(), lr=config.learning_rate, betas=(0.9, 0.99), weight_decay=1e-4)

    config.out.mkdir(parents=True, exist_ok=True)
    step, best = 0, -math.inf
    last = config.out / "last.pt"
    if last.exists():
        state = load_checkpoint(last)
        step, best = state["step"], state["best"]
        if changes := _changes(state, config, network):
            listed = "; ".join(changes.values())
            if not accept_changes:
                raise TrainError(f"{last} had another config ({listed}): undo that, or resume with --accept-changes")
            print(f"accepted: {listed}", flush=True)
            if changes.keys() & {"validation", "enlarge"}:
                best = -math.inf  # it was measured on other images
        if step >= config.steps:
            print(f"{last} has done {step} steps already, {config.steps} are asked for: nothing to do", flush=True)
            return
        _restore_state(state, network, averaged, optimizer)
        print(f"resuming {last} at step {step}", flush=True)

    excluded = load_names(config.exclude) if config.exclude else frozenset()
    faces = [face for source in config.data for face in load_faces(source, exclude=excluded)]
    validation = Validation(load_faces(config.validation), config)
    print(f"{len(faces)} faces, {sum(p.numel() for p in network.parameters()):,} parameters, {device}", flush=True)

    batches = DataLoader(
        Batches(faces, config, first=step),
        batch_size=None,
        num_workers=config.workers,
        pin_memory=device.type == "cuda",
    )
    writer = SummaryWriter(str(config.out))
    started, first = time.monotonic(), step
    recent: list[float] = []
    for low, clean in batches:
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * _schedule(step, config)
        low, clean = _to(low, device), _to(clean, device)
        with torch.autocast(device.type, torch.bfloat16, enabled=_has_bf16(device)):
            restored = network(low)
        loss = psnr_loss(restored.float(), clean)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), config.clip)
        optimizer.step()
        averaged.update_parameters(network)
        recent.append(loss.item())
        step += 1

        if step % 100 == 0:
            pace = (time.monotonic() - started) / (step - first)
            left = (config.steps - step) * pace / 60
            print(
                f"step {step}/{config.steps}  psnr {-np.mean(recent):.2f}  {pace:.2f} s/step  {left:.0f} min left",
                flush=True,
            )
            writer.add_scalar("train/psnr", -np.mean(recent), step)
            recent.clear()
        if step % config.validate_every == 0 or step == config.steps:
            scores, picture = validation.score(averaged.module, device)
            mean = float(np.mean(list(scores.values())))
            print(
                f"step {step}  gain over bicubic {mean:+.3f} dB  "
                + "  ".join(f"{k} {v:+.2f}" for k, v in scores.items()),
                flush=True,
            )
            _log(config.out / "log.csv", {"step": step, "mean": mean, **scores})
            writer.add_scalars("validation/gain", scores, step)
            cv2.imwrite(str(config.out / "samples.png"), picture)
            described = {"network": describe(network), "step": step, "config": config.model_dump(mode="json")}
            if mean > best:
                best = mean
                save_checkpoint(
                    config.out / "best.pt", weights=averaged.module.state_dict(), scores=scores, **described
                )
            save_checkpoint(
                last, weights=network.state_dict(), averaged=averaged.state_dict(), optimizer=optimizer.state_dict(),
                best=best, **described,
            )  # fmt: skip
        if step >= config.steps:
            break
    writer.close()


def psnr_loss(restored: Tensor, clean: Tensor) -> Tensor:
    """Mean over the images of −PSNR in dB, both in [-1, 1]: every image counts alike, however noisy it was."""
    error = (restored - clean).square().mean(dim=(1, 2, 3)) / 4
    return 10 * torch.log10(error + 1e-5).mean()


class Batches(Dataset[tuple[np.ndarray, np.ndarray]]):
    """Batch `i` is what step `first + i` trains on: (low enlarged, clean), (n, H, W, 3) uint8 BGR each."""

    def __init__(self, faces: list[Face], config: TrainConfig, *, first: int) -> None:
        self.faces, self.config, self.first = faces, config, first
        largest = max((min(face.image.shape[:2]) for face in faces), default=0)
        needed = _least_side(max(_CAMERA_SIDES))
        if largest < needed:
            sources = ", ".join(str(source) for source in config.data)
            raise TrainError(
                f"no face to train on: the largest of {len(faces)} in {sources} has {largest} px, "
                f"at least {math.ceil(needed)} px are needed"
            )

    def __len__(self) -> int:
        return self.config.steps - self.first

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        if index >= len(self):
            raise IndexError(index)
        rng = np.random.default_rng([self.config.seed, self.first + index])
        if rng.random() < self.config.paper_share:
            return self._paper(rng)
        return self._camera(rng)

    def _paper(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        size = SGEN_SIZES[int(rng.integers(len(SGEN_SIZES)))]
        sigma = self.config.paper_sigma
        if sigma is None:
            sigma = 30.0 if rng.random() < 0.5 else float(rng.uniform(0, 50))
        clean = []
        for face in self._choose(rng, max(size)):
            # 1.6 is the framing of the stored crops; the protocol's 217x256 cut out of them, then its aspect
            tall = cut(face, (217, 256), framing=float(rng.uniform(1.45, 1.7)), flip=bool(rng.random() < 0.5))
            clean.append(_colour(cv2.resize(tall, size, interpolation=cv2.INTER_AREA), rng))
        low = [sgen_degrade(image, rng, sigma=sigma) for image in clean]
        return _stack(low, clean, self.config.enlarge)

    def _camera(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        factor = int(rng.choice([4, 2, 1], p=[0.5, 0.25, 0.25]))
        side = int(rng.choice(_CAMERA_SIDES, p=[0.25, 0.3, 0.25, 0.15, 0.05]))
        clean = []
        for face in self._choose(rng, side):
            image = cut(
                face, (side, side), framing=float(rng.uniform(1.1, 1.8)), angle=float(rng.normal(0, 6)),
                shift=tuple(rng.normal(0, 0.03, 2)), flip=bool(rng.random() < 0.5),
            )  # fmt: skip
            clean.append(_colour(image, rng))
        low = camera_degrade(clean, rng, draw_damage(rng), factor=factor)
        return _stack(low, clean, self.config.enlarge)

    def _choose(self, rng: np.random.Generator, side: int) -> Iterator[Face]:
        found = 0
        while found < self.config.batch:
            face = self.faces[int(rng.integers(len(self.faces)))]
            if min(face.image.shape[:2]) >= _least_side(side):
                found += 1
                yield face


class Validation:
    """A fixed set of damaged faces, whose mean gain over bicubic chooses the best weights."""

    def __init__(self, faces: list[Face], config: TrainConfig, *, count: int = 24) -> None:
        rng = np.random.default_rng(1)
        sharp = [face for face in faces if min(face.image.shape[:2]) >= 250] or faces
        chosen = [sharp[int(i)] for i in rng.permutation(len(sharp))[:count]]
        self.sets: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        for size in SGEN_SIZES[::2]:
            clean = [cv2.resize(cut(f, (217, 256), framing=1.6), size, interpolation=cv2.INTER_AREA) for f in chosen]
            low = [sgen_degrade(image, rng) for image in clean]
            self.sets[f"paper{size[1]}"] = _stack(low, clean, config.enlarge)
        mild = CameraDamage(0.5, 0.0, 0.0, 10.0, False, cv2.INTER_AREA, 60, None)
        coded = CameraDamage(0.0, 0.0, 0.0, 6.0, True, cv2.INTER_AREA, None, 28)
        for factor, side, damage in ((4, 128, mild), (2, 192, coded), (1, 160, mild)):
            clean = [cut(face, (side, side), framing=1.6) for face in chosen]
            self.sets[f"x{factor}"] = _stack(camera_degrade(clean, rng, damage, factor=factor), clean, config.enlarge)

    def score(self, network: torch.nn.Module, device: torch.device) -> tuple[dict[str, float], np.ndarray]:
        """Return the gain over the input in dB by set, and a picture: input, restored, truth."""
        scores, rows = {}, []
        for name, (low, clean) in self.sets.items():
            restored = np.concatenate([restore(network, low[i : i + 8], device) for i in range(0, len(low), 8)])
            scores[name] = float(np.mean(psnr(restored, clean) - psnr(low, clean)))
            shown = range(min(3, len(low)))
            row = np.concatenate([np.concatenate([low[i], restored[i], clean[i]], axis=1) for i in shown], axis=1)
            rows.append(cv2.resize(row, (1152, 128 * clean.shape[1] // clean.shape[2]), interpolation=cv2.INTER_AREA))
        return scores, np.concatenate(rows)


@torch.inference_mode()
def restore(network: torch.nn.Module, low: np.ndarray, device: torch.device) -> np.ndarray:
    """Return (n, H, W, 3) uint8 BGR restored from the same, already enlarged."""
    out = network(_to(torch.from_numpy(low), device)).clamp(-1, 1).float()
    image = ((out + 1) * 127.5).round().byte().flip(1).permute(0, 2, 3, 1)
    return image.cpu().numpy()


def psnr(image: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Return the PSNR in dB of each image of (n, H, W, 3) uint8, peak 255."""
    error = (image.astype(np.float32) - truth.astype(np.float32)) ** 2
    return 10 * np.log10(255**2 / np.maximum(error.mean(axis=(1, 2, 3)), 1e-6))


def _least_side(side: int) -> float:
    """The least side of a stored face from which a clean face of `side` is cut."""
    return 0.8 * min(side, 208)


def _changes(state: dict[str, Any], config: TrainConfig, network: Sgen) -> dict[str, str]:
    """Return what differs between the checkpoint's run and this one, by field, such as `batch 8, now 16`.

    Paths are compared by their names, as data may move; the network by what was built, as presets may change.
    """
    before = {name: field.default for name, field in TrainConfig.model_fields.items()} | state["config"]
    before |= {f"network.{name}": value for name, value in {**asdict(SgenConfig()), **state["network"]}.items()}
    now = config.model_dump(mode="json")
    now |= {f"network.{name}": value for name, value in describe(network).items()}
    compared = (before.keys() | now.keys()) - _MAY_CHANGE - {"preset", "override"}
    pairs = {name: (_named(name, before.get(name)), _named(name, now.get(name))) for name in sorted(compared)}
    return {name: f"{name} {was}, now {value}" for name, (was, value) in pairs.items() if was != value}


def _named(field: str, value: Any) -> Any:
    """Return a field's value, of paths only the names."""
    if field == "data":
        return [Path(path).name for path in value]
    return Path(value).name if field in ("exclude", "validation") and value else value


def _restore_state(
    state: dict[str, Any], network: Sgen, averaged: AveragedModel, optimizer: torch.optim.Optimizer
) -> None:
    """Take over weights, their averages and the optimiser's moments; what is new or has another shape begins anew."""
    kept = _fitting(state["weights"], network)
    if new := [name for name in network.state_dict() if name not in kept]:
        print(f"untrained: {', '.join(new)}", flush=True)
    network.load_state_dict(kept, strict=not new)
    averaged.load_state_dict(_fitting(state["averaged"], averaged), strict=not new)
    optimizer.load_state_dict(_moved(state["optimizer"], list(state["weights"]), network, kept))


def _fitting(weights: dict[str, Tensor], network: torch.nn.Module) -> dict[str, Tensor]:
    own = network.state_dict()
    return {name: weight for name, weight in weights.items() if name in own and own[name].shape == weight.shape}


def _moved(moments: dict[str, Any], names: list[str], network: Sgen, kept: dict[str, Tensor]) -> dict[str, Any]:
    """Return the optimiser's state, in which the parameters were numbered as in `names`, numbered as in `network`."""
    numbers = {name: number for number, name in enumerate(names) if name in kept}
    now = [name for name, _ in network.named_parameters()]
    held = moments["state"]
    state = {number: held[numbers[name]] for number, name in enumerate(now) if numbers.get(name) in held}
    return {"state": state, "param_groups": [{**moments["param_groups"][0], "params": list(range(len(now)))}]}


def _schedule(step: int, config: TrainConfig) -> float:
    """Warm up over 200 steps, hold, then fall linearly: the decay may be moved while a run holds."""
    decay_from = config.steps * (1 - config.decay_share)
    return min((step + 1) / 200, 1.0, max((config.steps - step) / (config.steps - decay_from), 0.0))


def _stack(low: list[np.ndarray], clean: list[np.ndarray], enlarge: str) -> tuple[np.ndarray, np.ndarray]:
    height, width = clean[0].shape[:2]
    how = cv2.INTER_NEAREST if enlarge == "nearest" else cv2.INTER_CUBIC
    return np.stack([cv2.resize(image, (width, height), interpolation=how) for image in low]), np.stack(clean)


def _colour(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Change exposure, contrast and tint a little; one in twenty becomes grey."""
    gain = float(rng.uniform(0.75, 1.15)) * rng.uniform(0.94, 1.06, 3)
    bright = image * gain + float(rng.uniform(-12, 12))
    if rng.random() < 0.05:
        bright = np.repeat(bright.mean(axis=2, keepdims=True), 3, axis=2)
    return np.clip(np.rint(bright), 0, 255).astype(np.uint8)


def _to(images: Tensor, device: torch.device) -> Tensor:
    """(n, H, W, 3) uint8 BGR to (n, 3, H, W) float RGB in [-1, 1], channels last in memory."""
    return images.to(device, non_blocking=True).permute(0, 3, 1, 2).flip(1).float().div(127.5).sub(1).contiguous(
        memory_format=torch.channels_last
    )  # fmt: skip


def _has_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    return bool(torch.cpu._is_avx512_bf16_supported())


def _absolute(config: TrainConfig, folder: Path) -> TrainConfig:
    """Resolve relative paths against the YAML's folder."""
    return config.model_copy(
        update={
            "data": [(folder / path).resolve() for path in config.data],
            "exclude": (folder / config.exclude).resolve() if config.exclude else None,
            "validation": (folder / config.validation).resolve(),
            "out": (folder / config.out).resolve(),
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
    main()
