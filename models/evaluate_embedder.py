"""Evaluation of a face embedder: `python -m models.evaluate configs/evaluate/embedder.yaml` writes its whole report.

The official pairs of LFW, clean and with one side reduced as in models.recognition, beside the teacher's figures:
accuracy at a threshold fitted on the other folds, and true accepts at 1 % false accepts over all combinations of two
people. Landmarks are the truth's. Intervals are of 95 % and redraw people.
"""

from __future__ import annotations

import json
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import onnx
import onnxruntime
from google.protobuf.message import DecodeError

from models.dataset import Face
from models.judges import REDRAWS, FaceEmbedder, Preparation
from models.recognition import FaceSet, ProbeConfig, Trials, degraded_probe, load_trials, rank, redraws, true_accepts
from models.report import table_header, table_line
from models.settings import RelativePath

_FOLDS = 10  # where the list of pairs does not number them
_AIM_ACCURACY = 0.95
_AIM_HEIGHTS = (16, 24)


class EmbedderEvaluateConfig(ProbeConfig):
    """One evaluation of an embedder."""

    protocol: Literal["embedder"]
    """Which evaluation."""
    network: RelativePath
    """The embedder as ONNX, with its card."""
    others: dict[str, RelativePath]
    """Recognisers beside it that `models.judges` knows by file, by the name in the report; the first is its teacher."""
    set: FaceSet
    """Faces that nobody trained on, and their pairs; a fourth column numbers the folds."""


@dataclass(frozen=True, slots=True)
class Pairs:
    """Pairs of a probe and a reference, in folds."""

    places: np.ndarray
    """(k, 2): a probe and a reference."""
    same: np.ndarray
    """(k,) bool: of one person."""
    folds: np.ndarray
    """(k,)"""


@dataclass(frozen=True, slots=True)
class Figure:
    """A figure and its redraws."""

    value: float
    redrawn: np.ndarray

    def __sub__(self, other: Figure) -> Figure:
        return Figure(self.value - other.value, self.redrawn - other.redrawn)

    @property
    def low(self) -> float:
        return float(np.percentile(self.redrawn, 2.5))

    def told(self, sign: str = "") -> str:
        low, high = np.percentile(self.redrawn, (2.5, 97.5))
        return f"{self.value:{sign}.3f} ({low:{sign}.3f} to {high:{sign}.3f})"


def evaluate_embedder(config: EmbedderEvaluateConfig, *, command: str) -> str:
    """Write the report and return it. Raises OSError, or ValueError where networks, pairs or faces do not do."""
    card, ours = own_embedder(config.network, threads=config.threads)
    embedders = {name: FaceEmbedder(path, threads=config.threads) for name, path in config.others.items()}
    name = str(card["name"])
    if name in embedders:
        raise ValueError(f"others: {name} is the name of the network itself")
    embedders = {name: ours, **embedders}
    trials = load_trials(config.set, config.seed)
    pairs = load_pairs(config.set, trials)
    drawn = redraws(trials, config.seed)
    sizes: dict[str, int | None] = {"clean": None, **{f"{height} px": height for height in config.heights}}
    accepts: dict[str, dict[str, Figure]] = {each: {} for each in embedders}
    rights: dict[str, dict[str, Figure]] = {each: {} for each in embedders}
    references = {each: _embedded(embedder, trials.references) for each, embedder in embedders.items()}
    for size, height in sizes.items():
        for each, embedder in embedders.items():
            similarities = _embedded(embedder, trials.probes, height, config) @ references[each].T
            ranking = rank(similarities, trials)
            accepts[each][size] = Figure(
                true_accepts(ranking, trials, np.ones(trials.people)),
                np.array([true_accepts(ranking, trials, weights) for weights in drawn]),
            )
            rights[each][size] = accuracy(similarities, trials, pairs, drawn)
        print(f"{size}: {len(trials.probes)} probes", flush=True)
    report = "\n".join(_report(config, card, trials, pairs, accepts, rights, command))
    config.report.parent.mkdir(parents=True, exist_ok=True)
    config.report.write_text(report)
    return report


def own_embedder(path: Path, *, threads: int = 1) -> tuple[dict[str, object], FaceEmbedder]:
    """Return the card and the embedder of an ONNX that models.export wrote. Raises OSError; ValueError for others."""
    try:
        model = onnx.load_from_string(path.read_bytes())
    except DecodeError:
        raise ValueError(f"{path} is no ONNX") from None
    text = next((entry.value for entry in model.metadata_props if entry.key == "streamer.card"), None)
    card = json.loads(text) if text else {}
    if card.get("task") != "embedding":
        raise ValueError(f"{path} has no card of an embedder: export it with models.export")
    prepared = Preparation(
        side=card["alignment_size"], template=card["alignment"], color=card["color"], mean=card["mean"][0],
        std=card["std"][0],
    )  # fmt: skip
    return card, FaceEmbedder(path, prepared, threads=threads)


def load_pairs(face_set: FaceSet, trials: Trials) -> Pairs:
    """Return the listed pairs whose faces are among the trials, and their folds."""
    probes, references = (
        {face.name.removeprefix(f"{face_set.truths.stem}/"): place for place, face in enumerate(faces)}
        for faces in (trials.probes, trials.references)
    )
    lines = [line.split() for line in face_set.pairs.read_text().splitlines() if line and not line.startswith("#")]
    lines = [line for line in lines if line[0] in probes and line[1] in references]
    folds = [int(line[3]) if len(line) > 3 else number % _FOLDS for number, line in enumerate(lines)]
    return Pairs(
        np.array([(probes[line[0]], references[line[1]]) for line in lines]),
        np.array([line[2] == "1" for line in lines]),
        np.array(folds),
    )


def accuracy(similarities: np.ndarray, trials: Trials, pairs: Pairs, drawn: list[np.ndarray]) -> Figure:
    """Return the share of pairs told rightly, each fold at the threshold that is best on the others.

    Raises ValueError where there is but one fold.
    """
    scores = similarities[tuple(pairs.places.T)]
    if len(folds := np.unique(pairs.folds)) < 2:
        raise ValueError("accuracy needs pairs in two folds at least")
    right = np.empty(len(scores), bool)
    for fold in folds:
        here = pairs.folds == fold
        right[here] = (scores[here] > best_threshold(scores[~here], pairs.same[~here])) == pairs.same[here]
    a, b = trials.probe_people[pairs.places[:, 0]], trials.reference_people[pairs.places[:, 1]]

    def share(weights: np.ndarray) -> float:
        counted = np.where(pairs.same, weights[a], weights[a] * weights[b])
        return float(counted @ right / counted.sum())

    return Figure(share(np.ones(trials.people)), np.array([share(weights) for weights in drawn]))


def best_threshold(scores: np.ndarray, same: np.ndarray) -> float:
    """Return the threshold above which pairs are taken for one person with the fewest mistakes."""
    order = np.argsort(scores)
    ranked, truth = scores[order], same[order]
    rejected_mates = np.concatenate([[0], np.cumsum(truth)])
    accepted_others = np.concatenate([[0], np.cumsum(~truth)])
    mistakes = rejected_mates + (accepted_others[-1] - accepted_others)  # of rejecting the first k
    cut = int(np.argmin(mistakes))
    below = ranked[cut - 1] if cut else ranked[0] - 1
    above = ranked[cut] if cut < len(ranked) else ranked[-1] + 1
    return float((below + above) / 2)


def _embedded(
    embedder: FaceEmbedder, faces: list[Face], height: int | None = None, config: EmbedderEvaluateConfig | None = None
) -> np.ndarray:
    if height is None or config is None:
        return embedder.embed([face.image for face in faces], [face.landmarks for face in faces])
    probes = [degraded_probe(face, height, noise=config.noise, quality=config.jpeg, seed=config.seed) for face in faces]
    return embedder.embed([image for image, _ in probes], [landmarks for _, landmarks in probes])


def _report(
    config: EmbedderEvaluateConfig,
    card: dict[str, object],
    trials: Trials,
    pairs: Pairs,
    accepts: dict[str, dict[str, Figure]],
    rights: dict[str, dict[str, Figure]],
    command: str,
) -> list[str]:
    ours, teacher = str(card["name"]), next(iter(config.others), None)
    sizes = list(accepts[ours])
    lines = [
        f"# {ours}",
        "",
        f"`{command}` on {platform.machine()}, ONNX Runtime {onnxruntime.__version__}, on the CPU.",
        "",
        f"{len(pairs.same):,} pairs of {config.set.truths.stem}, {int(pairs.same.sum()):,} of one person, "
        f"{trials.people:,} people, {len(np.unique(pairs.folds))} folds. Of each pair the first file is the probe: "
        f"reduced to a box of this height by Pillow's anti-aliased bicubic, then Gaussian noise σ {config.noise:g}, "
        f"then JPEG {config.jpeg}. The second is the reference, clean. Landmarks are the truth's. In brackets: 95 % "
        f"intervals, redrawing people {REDRAWS:,} times; thresholds of the accuracy are not fitted anew.",
        "",
        f"The card says: trained on {card.get('trained_on') or 'nothing said'}; license: {card['license']}.",
        "",
        f"- accuracy on clean pairs {rights[ours]['clean'].told()}, asked for {_AIM_ACCURACY}: "
        f"{_held(rights[ours]['clean'].value >= _AIM_ACCURACY)}",
    ]
    if teacher:
        gains = {size: accepts[ours][size] - accepts[teacher][size] for size in sizes}
        lines += [
            f"- true accepts at {height} px above {teacher}'s: {_held(gains[f'{height} px'].low > 0)}, "
            f"{gains[f'{height} px'].told('+')}"
            for height in _AIM_HEIGHTS
            if f"{height} px" in gains
        ]
    for title, figures in (("True accepts at 1 % false accepts", accepts), ("Accuracy", rights)):
        lines += ["", *table_header(title, sizes)]
        lines += [table_line(each, [found[size].told() for size in sizes]) for each, found in figures.items()]
        if teacher:
            gains = [(figures[ours][size] - figures[teacher][size]).told("+") for size in sizes]
            lines.append(table_line(f"gain over {teacher}", gains))
    return [*lines, ""]


def _held(held: bool) -> str:
    return "held" if held else "missed"
