"""What judges the runs of an ablation: test faces that nobody trained on, each damaged in the same way for all runs.

Blind restorers are judged at SGEN's or SISN's protocol (models.protocols), GFRNet by listed pairs at the two scales of
its table, SCGAN by sharp faces that are damaged as half of its low side is. Seeds are other than in training.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import cv2
import numpy as np
import torch
from torch import Tensor, nn

from models import degradation
from models.dataset import FaceTensors, load_faces
from models.degradation import SGEN_SIZES
from models.gfrnet import VARIANTS
from models.guided import SCALES, GuidedFaces, laid_onto, listed_pairs
from models.judges import Lpips, mps, psnr, ssim
from models.protocols import Pair, protocol_faces, sgen_pair, sisn_pair
from models.train_scgan import ScganRunConfig, high_faces

FACTOR = 4
"""How many times the protocols enlarge for a network that does not by itself."""

_WIDTHS = {height: width for width, height in SGEN_SIZES} | {256: 256}
_TOGETHER = 8  # so many faces go through a network at a time
_SEED = 7  # of the damage; training's keys begin with its seed and have three numbers


class Judge(ABC):
    """Faces, and what is measured of each when a run has restored it. Of LPIPS less is better, of all else more."""

    measures: ClassVar[tuple[str, ...]]
    """In the report's order."""
    people: list[str]
    """Whose each face is, in the order of the figures."""
    said: str
    """Which faces, and how they are damaged."""
    size: str
    """The largest result's, height×width."""

    def __init__(self, lpips: Path | None) -> None:
        self.lpips = Lpips(lpips) if lpips else None
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.known: dict[str, Any] = {"lpips": lpips.name if lpips else None}

    def asked(self, run: Any) -> dict[str, Any]:
        """Return what the run's figures depend on beside its weights, as JSON knows it."""
        return self.known

    @abstractmethod
    def scores(self, network: nn.Module, run: Any) -> dict[str, list[float]]:
        """Return each measure's figures, one a face, for a run's network in eval mode on `device`."""

    @abstractmethod
    def inputs(self, network: nn.Module, run: Any) -> tuple[Tensor, ...]:
        """Return what the network is given for one of the largest results."""

    def before(self) -> dict[str, list[float]]:
        """Return the figures of the damaged faces, enlarged and not restored; nothing where they are not told."""
        return {}

    def _measured(self, restored: list[np.ndarray], truths: list[np.ndarray]) -> dict[str, list[float]]:
        both = list(zip(restored, truths, strict=True))
        found = {"PSNR": [psnr(*each) for each in both], "SSIM": [ssim(*each) for each in both]}
        if self.lpips:
            found["LPIPS"] = [self.lpips(*each) for each in both]
            found["MPS"] = [mps(*each) for each in zip(found["SSIM"], found["LPIPS"], strict=True)]
        return found


class BlindJudge(Judge):
    """Faces at SGEN's protocol, as mean over sizes, or at SISN's."""

    measures = ("PSNR", "SSIM", "LPIPS", "MPS")

    def __init__(
        self, truths: Path, protocol: str, *, heights: list[int], scale: int, limit: int | None, lpips: Path | None
    ) -> None:
        super().__init__(lpips)
        self.protocol, self.heights, self.scale = protocol, heights, scale
        self.faces = protocol_faces(truths)[:limit]
        _check_some(self.faces, truths)
        self.people = [face.identity for face in self.faces]
        self.known = {"truths": truths.name, "faces": len(self.faces), "heights": heights, **self.known}
        self.size = _size(max(heights))
        sizes = ", ".join(map(_size, heights))
        damaged = (
            f"÷{scale} by Pillow's anti-aliased bicubic, no noise, 256×256"
            if protocol == "sisn"
            else f"÷4 by cubic, Gaussian noise σ 30, 8 bit; means over the sizes {sizes}"
        )
        self.said = f"{_counted(self.people, 'faces')} out of {truths.name}: {damaged}"

    def scores(self, network: nn.Module, run: Any) -> dict[str, list[float]]:
        found: dict[str, list[list[float]]] = {}
        for height in self.heights:
            pairs = self._pairs(height, len(self.faces))
            images = torch.stack([_given(network, pair.low, run.enlarge) for pair in pairs])
            rows, columns = pairs[0].truth.shape[:2]
            with torch.inference_mode():
                restored = [network(part.to(self.device))[..., :rows, :columns] for part in images.split(_TOGETHER)]
            for measure, figures in self._measured(_bgr(torch.cat(restored)), [pair.truth for pair in pairs]).items():
                found.setdefault(measure, []).append(figures)
        return {measure: np.mean(figures, axis=0).tolist() for measure, figures in found.items()}

    def inputs(self, network: nn.Module, run: Any) -> tuple[Tensor, ...]:
        return (_given(network, self._pairs(max(self.heights), 1)[0].low, run.enlarge)[None].to(self.device),)

    def _pairs(self, height: int, count: int) -> list[Pair]:
        faces = self.faces[:count]
        if self.protocol == "sisn":
            return [sisn_pair(face, self.scale) for face in faces]
        return [sgen_pair(face, (_WIDTHS[height], height), seed) for seed, face in enumerate(faces)]


class GuidedJudge(Judge):
    """Listed pairs of a face and its guide at GFRNet's damage, shrunk 4 and 8 times; R's guides are strangers'."""

    measures = tuple(f"{measure} ×{scale}" for scale in SCALES for measure in ("PSNR", "SSIM", "LPIPS"))

    def __init__(self, truths: Path, pairs: Path, *, side: int, limit: int | None, lpips: Path | None) -> None:
        """Raises OSError, or ValueError where the faces or the pairs do not suit."""
        super().__init__(lpips)
        self.side, self.faces = side, GuidedFaces(load_faces(truths), self.device)
        listed = listed_pairs(pairs, self.faces, truths.stem)
        chosen = np.random.default_rng(_SEED).permutation(len(listed))[:limit]
        self.rows, self.guides = listed[np.sort(chosen)].T
        self.people = [str(person) for person in self.faces.persons[self.rows]]
        self.known = {"truths": truths.name, "pairs": pairs.name, "faces": len(self.rows), "side": side, **self.known}
        self.size = f"{side}×{side}"
        self.said = (
            f"{_counted(self.people, 'pairs')} out of {pairs.name}, framed at 1.6 times the box, {self.size}: GFRNet's "
            "damage, its values drawn from the paper's sets, but shrunk 4 and 8 times; given at full size"
        )

    def asked(self, run: Any) -> dict[str, Any]:
        return {**self.known, "stranger": VARIANTS[run.variant].stranger}

    def scores(self, network: nn.Module, run: Any) -> dict[str, list[float]]:
        return self._scores(network, stranger=VARIANTS[run.variant].stranger, laid=network.config.laid)  # type: ignore[union-attr]

    def inputs(self, network: nn.Module, run: Any) -> tuple[Tensor, ...]:
        face = torch.zeros(1, 3, self.side, self.side, device=self.device)
        return (face, face)

    def before(self) -> dict[str, list[float]]:
        return self._scores(lambda degraded, guide: degraded, stranger=False, laid=False)

    @torch.inference_mode()
    def _scores(
        self, restore: Callable[[Tensor, Tensor], Tensor], *, stranger: bool, laid: bool
    ) -> dict[str, list[float]]:
        found: dict[str, list[float]] = {}
        for scale in SCALES:
            for degraded, guide, truth in self._batches(scale, stranger=stranger, laid=laid):
                for measure, figures in self._measured(_bgr(restore(degraded, guide)), _bgr(truth)).items():
                    found.setdefault(f"{measure} ×{scale}", []).extend(figures)
        return {measure: found[measure] for measure in self.measures if measure in found}

    def _batches(self, scale: int, *, stranger: bool, laid: bool) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Give degraded faces, guides and truths, (n, 3, side, side) RGB in [-1, 1], in the order of the pairs."""
        rng = np.random.default_rng(_SEED)
        guides = self.faces.strangers(rng, self.rows) if stranger else self.guides
        for first in range(0, len(self.rows), _TOGETHER):
            truth, guide = (
                self.faces.crops_of(rng, rows[first : first + _TOGETHER], self.side, vary=False)
                for rows in (self.rows, guides)
            )
            if laid:
                guide = laid_onto(truth.landmarks, guide)
            draws = degradation.generators(_SEED, first, scale, 0, device=self.device)
            degraded = degradation.gfrnet(truth.images, draws, scale=scale)
            yield _centred(degraded), _centred(guide.images), _centred(truth.images)


class ScganJudge(Judge):
    """Sharp faces at the run's sides, damaged as the degraded half of its low side is; means over the sides."""

    measures = ("LPIPS", "PSNR", "SSIM")

    def __init__(self, truths: Path, base: ScganRunConfig, *, limit: int | None, lpips: Path | None) -> None:
        super().__init__(lpips)
        faces = protocol_faces(truths)[:limit]
        _check_some(faces, truths)
        self.sides = sorted(base.sides)
        self.damage = {name: list(getattr(base, name)) for name in ("blur", "noise", "quality")}
        self.people = [face.identity for face in faces]
        self.faces = FaceTensors(faces, self.device)
        self.known = {"truths": truths.name, "faces": len(faces), "sides": self.sides, **self.damage, **self.known}
        self.size = f"{self.sides[-1]}×{self.sides[-1]}"
        damage = ", ".join(f"{name} {least:g} to {most:g}" for name, (least, most) in self.damage.items())
        self.said = (
            f"{_counted(self.people, 'faces')} out of {truths.name} at {' and '.join(map(str, self.sides))} px, ÷4, "
            f"{damage}. LPIPS decides: a GAN draws detail that is not the truth's pixel by pixel"
        )

    def scores(self, network: nn.Module, run: Any) -> dict[str, list[float]]:
        return self._scores(network)

    def inputs(self, network: nn.Module, run: Any) -> tuple[Tensor, ...]:
        return (torch.zeros(1, 3, self.sides[-1] // 4, self.sides[-1] // 4, device=self.device),)

    def before(self) -> dict[str, list[float]]:
        return self._scores(_enlarged)

    @torch.inference_mode()
    def _scores(self, restore: Callable[[Tensor], Tensor]) -> dict[str, list[float]]:
        found: dict[str, list[list[float]]] = {}
        for side in self.sides:
            truth = high_faces(self.faces, np.random.default_rng(_SEED), len(self.people), side, vary=False).images
            draws = degradation.generators(_SEED, side, 0, 0, device=self.device)
            low = degradation.scgan(truth, draws, **{name: tuple(ends) for name, ends in self.damage.items()})
            restored = torch.cat([restore(part) for part in _centred(low).split(_TOGETHER)])
            for measure, figures in self._measured(_bgr(restored), _bgr(_centred(truth))).items():
                found.setdefault(measure, []).append(figures)
        return {measure: np.mean(found[measure], axis=0).tolist() for measure in self.measures if measure in found}


def _check_some(faces: list[Any], truths: Path) -> None:
    if not faces:
        raise ValueError(f"{truths}: no face is 256 px, sharp (detail 0.09) and turned by no more than yaw 0.5")


def _counted(people: list[str], what: str) -> str:
    return f"{len(people)} {what} of {len(set(people))} people"


def _size(height: int) -> str:
    return f"{height}×{_WIDTHS[height]}"


def _given(network: nn.Module, low: np.ndarray, enlarge: str) -> Tensor:
    """Return what the network is given of a small image, (3, h, w) RGB in [-1, 1].

    It is enlarged, if the network does not by itself, and reflected at the lower and right edge to its multiple.
    """
    config: Any = network.config
    if config.scale is None:
        how = cv2.INTER_NEAREST if enlarge == "nearest" else cv2.INTER_CUBIC
        low = cv2.resize(low, None, fx=FACTOR, fy=FACTOR, interpolation=how)
    bottom, right = (-side % config.multiple for side in low.shape[:2])
    low = cv2.copyMakeBorder(low, 0, bottom, 0, right, cv2.BORDER_REFLECT_101)
    return torch.from_numpy(np.ascontiguousarray(low[..., ::-1].transpose(2, 0, 1))).float() / 127.5 - 1


def _enlarged(low: Tensor) -> Tensor:
    """Return faces in [-1, 1] 4 times as large by Pillow's bicubic, the baseline of every table."""
    size = (FACTOR * low.shape[3], FACTOR * low.shape[2])
    return _centred(degradation.stored(degradation.resize((low + 1) * 127.5, size, "pillow")))


def _centred(images: Tensor) -> Tensor:
    return images / 127.5 - 1


def _bgr(images: Tensor) -> list[np.ndarray]:
    """(n, 3, h, w) RGB in [-1, 1] to (h, w, 3) uint8 BGR each."""
    pixels = ((images + 1) * 127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1).cpu().numpy()
    return [np.ascontiguousarray(image[..., ::-1]) for image in pixels]
