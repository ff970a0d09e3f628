"""Shipped networks in PyTorch eager, one face at a time: what engines are measured against. The last line is JSON.

    python -m models.eager models/weights/sgen-small.onnx --size 256x256 --threads 2

With --serve it answers engines.benchmark line by line, so that both take turns: first a list with null for each network
that can be run, else the reason why not; then for each `{"network": 0, "height": 64, "width": 64, "channels_last":
true}`, whose size is of the network's input, the seconds that one face took.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import onnx
import torch
from google.protobuf.message import DecodeError
from torch import Tensor, nn

from models.checkpoint import NETWORKS, build, load_weights

_SPIN_S = 0.01
"""For so long OpenMP's threads may spin after their work; whoever takes the next turn shall not share the cores."""


class EagerNetwork:
    """A network that runs one face at a time, its memory laid out either way."""

    def __init__(self, path: Path) -> None:
        """Make the network of an ONNX that models.export wrote.

        Raises FileNotFoundError, or ValueError if it is none, or no preset of ours.
        """
        card = _card(path)
        self.name: str = card["name"]
        self.network = _network(path, card)
        self._layouts = {False: self.network, True: copy.deepcopy(self.network).to(memory_format=torch.channels_last)}
        self._inputs = len(card["inputs"])
        self._faces: dict[tuple[int, int, bool], list[Tensor]] = {}

    @torch.inference_mode()
    def seconds(self, height: int, width: int, *, channels_last: bool) -> float:
        """Return how long one face took, of that size in the network's input; its tensor is made before."""
        faces = self._face(height, width, channels_last)
        network = self._layouts[channels_last]
        started = time.perf_counter()
        network(*faces)
        return time.perf_counter() - started

    def input_size(self, height: int, width: int) -> tuple[int, int]:
        """Return the size of the input that gives a result of that size, padded to the network's multiple."""
        config: Any = self.network.config
        scale, multiple = config.scale or 1, config.multiple
        return -(-height // (scale * multiple)) * multiple, -(-width // (scale * multiple)) * multiple

    def _face(self, height: int, width: int, channels_last: bool) -> list[Tensor]:
        key = (height, width, channels_last)
        if key not in self._faces:
            generator = torch.Generator().manual_seed(0)
            layout = torch.channels_last if channels_last else torch.contiguous_format
            noise = [torch.rand(1, 3, height, width, generator=generator) * 2 - 1 for _ in range(self._inputs)]
            self._faces[key] = [face.contiguous(memory_format=layout) for face in noise]
        return self._faces[key]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", type=Path, nargs="+", metavar="NETWORK.onnx", help="written by models.export")
    parser.add_argument("--size", default="256x256", help="height x width of a result, 256x256 by default")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--serve", action="store_true", help="answer requests from the standard input")
    arguments = parser.parse_args()
    try:
        height, width = (int(side) for side in arguments.size.split("x"))
        if min(height, width, arguments.threads, arguments.rounds) < 1:
            raise ValueError
    except ValueError:
        parser.exit(2, "--size is HEIGHTxWIDTH; all numbers are 1 or more\n")
    torch.set_num_threads(arguments.threads)
    if arguments.serve:
        serve(arguments.networks)
        return
    try:
        networks = [EagerNetwork(path) for path in arguments.networks]
    except (OSError, ValueError) as exc:
        parser.exit(2, f"{exc}\n")
    print(json.dumps(measure(networks, (height, width), arguments.rounds)))


def measure(networks: list[EagerNetwork], result: tuple[int, int], rounds: int) -> list[dict[str, Any]]:
    """Return each network's faces a second, the median over the rounds, in the layout that is faster."""
    runs = [(network, layout) for network in networks for layout in (False, True)]
    taken: list[list[float]] = [[] for _ in runs]
    for number in range(rounds + 1):
        for seconds, (network, layout) in zip(taken, runs, strict=True):
            one = network.seconds(*network.input_size(*result), channels_last=layout)
            if number:  # the first round warms up
                seconds.append(one)
    medians = [statistics.median(seconds) for seconds in taken]
    told = [_told(*run, result, seconds) for run, seconds in zip(runs, medians, strict=True)]
    return [max(pair, key=lambda each: each["faces_per_second"]) for pair in zip(told[::2], told[1::2], strict=True)]


def serve(paths: list[Path]) -> None:
    """Answer requests until the standard input ends; the docstring of this file says how."""
    networks: list[EagerNetwork | None] = []
    problems: list[str | None] = []
    for path in paths:
        try:
            networks.append(EagerNetwork(path))
            problems.append(None)
        except (OSError, ValueError) as exc:
            networks.append(None)
            problems.append(str(exc))
    print(json.dumps(problems), flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        network = networks[asked.pop("network")]
        assert network is not None, "a network that cannot be run was asked for"
        seconds = network.seconds(**asked)
        time.sleep(_SPIN_S)
        print(seconds, flush=True)


def _told(network: EagerNetwork, channels_last: bool, result: tuple[int, int], seconds: float) -> dict[str, Any]:
    height, width = network.input_size(*result)
    return {
        "network": network.name, "height": height, "width": width, "channels_last": channels_last,
        "faces_per_second": 1 / seconds,
    }  # fmt: skip


def _card(path: Path) -> dict[str, Any]:
    try:
        properties = onnx.load(str(path), load_external_data=False).metadata_props
    except DecodeError:
        raise ValueError(f"{path} is no ONNX") from None
    card = next((json.loads(entry.value) for entry in properties if entry.key == "streamer.card"), {})
    if not str(card.get("exporter", "")).startswith("models.export "):
        raise ValueError(f"{path} was not written by models.export, so torch cannot run it")
    return card


def _network(path: Path, card: dict[str, Any]) -> nn.Module:
    """Return the one network among the presets, with the card's scale, that has the file's weights."""
    weights = load_weights(path)
    shapes = {name: weight.shape for name, weight in weights.items()}
    for description in _presets(card):
        untrained = build(description, untrained=True).state_dict()
        if {name: weight.shape for name, weight in untrained.items()} == shapes:
            network = build(description)
            network.load_state_dict(weights)
            return network.eval()
    raise ValueError(f"{path} has the weights of no preset of {', '.join(NETWORKS)}, so torch cannot run it")


def _presets(card: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Return every preset, described as for `build`, at the one scale of a network that enlarges by itself."""
    for name, known in NETWORKS.items():
        for preset in reversed(known.presets.values()):  # the paper's come last: they take longest to make
            description = {"name": name, **asdict(preset)}
            if "scale" in description and len(card.get("scales", ())) == 1:
                description["scale"] = card["scales"][0]
            yield description


if __name__ == "__main__":
    main()
