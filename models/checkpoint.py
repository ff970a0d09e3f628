"""Checkpoints: weights and the config that made them, in one file that holds no code."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from models.sgen import Sgen, SgenConfig


def save_checkpoint(path: Path, **state: Any) -> None:
    """Write the state at once or not at all."""
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    partial.replace(path)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint; raises FileNotFoundError, or ValueError if it is none."""
    state = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(state, dict) or "network" not in state:
        raise ValueError(f"{path} is no checkpoint")
    return state


def describe(network: Sgen) -> dict[str, Any]:
    """Return what `build` needs to make the network again."""
    return {"name": "sgen", **asdict(network.config)}


def build(description: dict[str, Any]) -> Sgen:
    """Make the untrained network that `describe` described."""
    arguments = dict(description)
    name = arguments.pop("name")
    if name != "sgen":
        raise ValueError(f"unknown network {name!r}; known: sgen")
    return Sgen(SgenConfig(**arguments))
