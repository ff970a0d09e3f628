"""Training the face embedder by distillation: it sees faces as cameras and restorers give them, its teacher clean ones.

What the teacher says of each face and of its mirror image is computed once and kept beside the run. `models.train` runs
it for a YAML whose `network` is embedder.
"""

from __future__ import annotations

import csv
import functools
import hashlib
import math
import os
import tarfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import cv2
import numpy as np
import onnx
import onnxruntime
import torch
from google.protobuf.message import DecodeError
from onnxruntime.capi.onnxruntime_pybind11_state import Fail, InvalidArgument, InvalidGraph, InvalidProtobuf
from PIL import Image
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from models.dataset import Face, load_faces, load_names
from models.degradation import Shares, draw_damage, generators, surveillance
from models.embedder import Embedder, EmbedderConfig
from models.judges import OnnxRestorer, similarity
from models.loop import RunConfig, Task, TrainError, has_bf16, make_network, place, share_gradients
from models.losses import RETAIL_TEMPLATE
from models.recognition import degraded_probe
from models.settings import RelativePath

Kind = Literal["clean", "reduced", "surveillance", "restored"]
Share = Annotated[float, Field(gt=0)]

TEACHER_SIDE = 128
MARGIN = 18
KEPT_SIDE = TEACHER_SIDE + 2 * MARGIN
"""Faces are kept aligned at the teacher's scale, with a margin on each side for what a student's crop strays to."""

_LARGEST = 256  # px: restored crops are no larger, as in the product
_TOGETHER = 500  # faces that the teacher looks at before what it said is written
_FACTORS = (2, 3, 4)  # surveillance shrinks by so much


class EmbedderRunConfig(RunConfig):
    """One run of the embedder's training."""

    measure: ClassVar[frozenset[str]] = RunConfig.measure | {"validation_heights"}

    network: Literal["embedder"] = "embedder"
    """Which network."""
    preset: str = "default"
    """Where its config starts from; `override` changes single fields."""
    teacher: RelativePath
    """face-reidentification-retail-0095 as ONNX."""
    hint: str | None = None
    """The teacher's features, as its ONNX calls them, that the student's features learn too; `hint_weight` says how
    much. At t666 face-reidentification-retail-0095 has 128 channels in 8x8 places."""
    least: float = Field(40.0, ge=0)
    """Faces whose box is lower, in pixels, are left out: of those the teacher says little."""
    blends: int = Field(0, ge=0)
    """So many more faces, each the mean of two people's, which the teacher judges like the others."""

    shares: dict[Kind, Share] = Field({"clean": 0.35, "reduced": 0.45, "surveillance": 0.2}, min_length=1)
    """How often a face is seen clean, reduced (Pillow's bicubic, noise, JPEG), as surveillance cameras give it, and
    reduced and then restored."""
    heights: tuple[float, float] = (10.0, 64.0)
    """Box heights in pixels to which faces are reduced: the least and the largest; all ratios alike often."""
    damage: Shares = Shares()
    """How often surveillance faces suffer from what."""
    restorers: tuple[RelativePath, ...] = ()
    """Restorers as ONNX with their cards, whose results are learned from too."""
    restored: int = Field(1000, gt=0)
    """So many restored faces are made at a time, as a restorer is slower than a step of training."""
    refresh: int = Field(4000, gt=0)
    """Steps after which all of them are made anew."""
    jitter: float = Field(0.06, ge=0, le=0.3)
    """The landmarks that a face is aligned by wander by up to so many distances between the eyes (standard deviation,
    drawn for each face from 0 on)."""
    vary: float = Field(0.25, ge=0, lt=1)
    """By how much brightness and contrast vary; a tenth of the faces is grey then. 0 leaves the colours as they are."""

    relation_weight: float = Field(10.0, ge=0)
    """Of the mean squared difference between all similarities within a batch, the student's less the teacher's."""
    hint_weight: float = Field(0.5, ge=0)
    """Of the mean squared difference between the features, in parts of the variance of the teacher's."""
    weight_decay: float = Field(0.01, ge=0)
    """Of AdamW."""
    validation_heights: tuple[int, ...] = (16, 24, 32)
    """Box heights in pixels at which probes are validated, beside clean ones."""

    @model_validator(mode="after")
    def _consistent(self) -> EmbedderRunConfig:
        if not 0 < self.heights[0] <= self.heights[1]:
            raise ValueError(f"heights {self.heights}: from the least, above 0, to the largest")
        if "restored" in self.shares and not self.restorers:
            raise ValueError("shares: restored faces want restorers")
        return self


class Distillation(Task):
    """The embedder learns what its teacher says of the clean face."""

    network: Embedder

    def __init__(self, config: EmbedderRunConfig, device: torch.device) -> None:
        self.config, self.device, self.others, self.step = config, device, {}, 0
        self.network = make_network(config).to(device, memory_format=torch.channels_last)  # type: ignore[assignment]
        self.optimizer = torch.optim.AdamW(
            self.network.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay
        )

    def load(self, rank: int) -> int:
        config, known = self.config, self.network.config
        with place("teacher"):
            teacher = Teacher(config.teacher, config.hint)
        with place("exclude"):
            excluded = load_names(config.exclude) if config.exclude else frozenset()
        with place(f"data: {', '.join(str(source) for source in config.data)}"):
            stored = (face for source in config.data for face in stored_faces(source, excluded))
            kept = kept_faces(face for face in stored if _height(face) >= config.least).with_blends(
                config.blends, config.seed
            )
        with place(f"validation: {config.validation}"):
            validated = load_faces(config.validation)
            heights = config.validation_heights
            self.validation = EmbedderValidation(validated, heights, known.side, self.device)
            teachers = EmbedderValidation(validated, heights, TEACHER_SIDE, torch.device("cpu"))
        with place("restorers"):
            restorers = [OnnxRestorer(path) for path in config.restorers]
        with place("teacher"):
            lessons = all_lessons(teacher, kept.images, config.out)
            told = remembered(config.out, "validation", [teacher.key, *teachers.keys], lambda: teachers.told(teacher))
        _check_fit(lessons, known)
        print("teacher's own: " + "  ".join(f"{name} {value:.3f}" for name, value in told.items()), flush=True)
        self.batches = EmbedderBatches(
            kept, lessons, restorers, config, side=known.side, rank=rank, places=known.side // known.stride
        )
        return len(kept)

    def learn(self, network: nn.Module, step: int, config: RunConfig) -> dict[str, float]:
        # Not `network`: DistributedDataParallel knows `forward` alone. `share_gradients` does its work.
        settings, self.step = self.config, step
        batch = self.batches[step].to(self.device)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=has_bf16(self.device)):
            features = self.network.features(batch.faces)
            embeddings = self.network.embed(features)
        student = F.normalize(embeddings.float(), dim=1)
        cosines = (student * batch.embeddings).sum(dim=1)
        relation = (student @ student.T - batch.embeddings @ batch.embeddings.T).square().mean()
        loss = 1 - cosines.mean() + settings.relation_weight * relation
        told = cosines.detach()
        parts = {"cosine": float(told.mean()), "relation": float(relation.detach())}
        parts |= {name: float(told[batch.kinds == number].mean()) for number, name in enumerate(settings.shares)
                  if (batch.kinds == number).any()}  # fmt: skip
        if batch.hints is not None and settings.hint_weight:
            missed = F.mse_loss(features.float(), batch.hints)
            loss = loss + settings.hint_weight * missed
            parts["hint"] = float(missed.detach())
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        share_gradients(self.network)
        nn.utils.clip_grad_norm_(self.network.parameters(), settings.clip)
        self.optimizer.step()
        return parts

    def score(self, network: nn.Module) -> tuple[dict[str, float], np.ndarray]:
        return self.validation.score(network), self.batches.shown(self.step)

    def value(self, scores: dict[str, float]) -> float:
        return self.validation.value(scores)


def _check_fit(lessons: dict[str, np.ndarray], known: EmbedderConfig) -> None:
    length = lessons["embeddings"].shape[-1]
    if length != known.embedding:
        raise TrainError(f"override: `embedding` is {known.embedding}, the teacher's has {length} numbers")
    if "hints" in lessons and (channels := lessons["hints"].shape[2]) != known.features:
        raise TrainError(f"hint: it has {channels} channels; `features` of the network is {known.features}")


# The teacher


class Teacher:
    """face-reidentification-retail-0095, frozen: its embedding of a face, and its features on the way to it.

    It runs in ONNX Runtime, which is faster than torch on a CPU core: no gradient goes through it.
    """

    def __init__(self, path: Path, hint: str | None = None) -> None:
        """Raises OSError, or ValueError where the file is no ONNX or has no such features."""
        content = path.read_bytes()
        try:
            model = onnx.load_from_string(content)
        except DecodeError:
            raise ValueError(f"{path} is no ONNX") from None
        graph = model.graph
        if not graph.output:
            raise ValueError(f"{path} is no ONNX")
        self.outputs = [graph.output[0].name]
        if hint is not None:
            if hint not in {output for node in graph.node for output in node.output}:
                raise ValueError(f"{path} has no {hint!r}, as `hint` asks")
            graph.output.append(onnx.helper.make_empty_tensor_value_info(hint))
            self.outputs.append(hint)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        try:
            self._session = onnxruntime.InferenceSession(
                model.SerializeToString(), options, providers=["CPUExecutionProvider"]
            )
        except (InvalidProtobuf, InvalidGraph, Fail, InvalidArgument) as exc:
            raise ValueError(f"{path} cannot be loaded as ONNX: {' '.join(str(exc).split())}") from None
        self._input = self._session.get_inputs()[0].name
        self.key = hashlib.sha256(content + repr(self.outputs).encode()).digest()

    def __call__(self, faces: Tensor) -> Tensor:
        """Return the embeddings, (n, d), of faces (n, 3, 128, 128) RGB in [-1, 1]."""
        pixels = ((faces.flip(1) + 1) * 127.5).round().numpy()
        return torch.from_numpy(np.stack([self._run(face)[0] for face in pixels]))

    def lessons(self, kept: np.ndarray) -> dict[str, np.ndarray]:
        """Return what it says of kept faces, (n, KEPT_SIDE, KEPT_SIDE, 3) uint8 BGR.

        `embeddings` (n, d) float32: the unit mean of the face's and its mirror image's. `hints`, where it has one:
        (n, 2, c, h, w) float16 of both.
        """
        began, embeddings, hints = time.monotonic(), [], []
        for picture in kept:
            face = picture[MARGIN:-MARGIN, MARGIN:-MARGIN].transpose(2, 0, 1).astype(np.float32)  # (3, 128, 128)
            (one, *hint), (other, *hint_there) = (self._run(seen) for seen in (face, face[..., ::-1].copy()))
            both = one / np.linalg.norm(one) + other / np.linalg.norm(other)
            embeddings.append(both / np.linalg.norm(both))
            if hint:
                hints.append(np.stack([*hint, *hint_there]).astype(np.float16))
        print(f"the teacher looked at {len(kept):,} faces in {time.monotonic() - began:.0f} s", flush=True)
        return {"embeddings": np.array(embeddings, np.float32), **({"hints": np.array(hints)} if hints else {})}

    def _run(self, face: np.ndarray) -> list[np.ndarray]:
        """Return embedding (d,) and hint (c, h, w) of a face (3, 128, 128) BGR, 0..255."""
        embedding, *hint = self._session.run(self.outputs, {self._input: face[None]})
        return [embedding.ravel(), *(each[0] for each in hint)]


def all_lessons(teacher: Teacher, kept: np.ndarray, folder: Path) -> dict[str, np.ndarray]:
    """Return the teacher's lessons of all kept faces, each channel of the hints with mean 0 and variance 1.

    They are kept in the folder in parts, so that a run that is killed meanwhile has not to begin anew.
    """
    chunks = [kept[at : at + _TOGETHER] for at in range(0, len(kept), _TOGETHER)]
    parts = [remembered(folder, "teacher", [teacher.key, c], functools.partial(teacher.lessons, c)) for c in chunks]
    lessons = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    for channel in np.moveaxis(lessons["hints"], 2, 0) if "hints" in lessons else ():  # views: (n, 2, h, w)
        values = channel.astype(np.float32)
        channel[:] = (values - values.mean()) / max(values.std(), 1e-6)
    return lessons


def remembered(
    folder: Path, name: str, keys: Sequence[bytes | np.ndarray], make: Callable[[], dict[str, np.ndarray]]
) -> dict[str, np.ndarray]:
    """Return what `make` gives for these keys; it is kept in the folder, and made but once."""
    digest = hashlib.sha256()
    for key in keys:
        digest.update(np.ascontiguousarray(key).data if isinstance(key, np.ndarray) else key)
    path = folder / f"{name}-{digest.hexdigest()[:12]}.npz"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        partial = folder / f"{path.stem}.{os.getpid()}.partial"
        with partial.open("wb") as file:
            np.savez(file, **make())
        partial.replace(path)
    with np.load(path) as stored:
        return dict(stored)


# Faces


def stored_faces(source: Path, excluded: frozenset[str]) -> Iterator[Face]:
    """Yield every face of a tar with its CSV, or of a folder with faces.csv (models.mine), whose landmarks are known.

    Unlike `load_faces` with UTKFace's, as a face is laid out by its landmarks here, however tight it was cut. Raises
    OSError or ValueError with the place.
    """
    table = source / "faces.csv" if source.is_dir() else source.with_suffix(".csv")
    if source.is_dir() and not table.exists():
        raise ValueError(f"{source} has no faces.csv with boxes and landmarks: models.mine makes such a folder")
    with table.open(newline="") as file:
        rows = {row["file"]: row for row in csv.DictReader(file)}
    for name, content in _contents(source, list(rows)):
        row, full = rows[name], f"{source.name if source.is_dir() else source.stem}/{name}"
        if full in excluded:
            continue
        image = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR)
        if image is None:
            raise ValueError(f"{source}: {name} is no image")
        try:
            box = (float(row["face_x1"]), float(row["face_y1"]), float(row["face_x2"]), float(row["face_y2"]))
            points = [[float(row[f"{p}_x"]), float(row[f"{p}_y"])] for p in ("le", "re", "nose", "lm", "rm")]
        except KeyError as exc:
            raise ValueError(f"{table} has no column {exc}") from None
        yield Face(full, row.get("identity", name), image, box, np.array(points, np.float32))


def _contents(source: Path, names: Sequence[str]) -> Iterator[tuple[str, bytes]]:
    if source.is_dir():
        yield from ((name, (source / name).read_bytes()) for name in names)
        return
    known = set(names)
    try:
        with tarfile.open(source) as tar:
            for member in tar:
                content = tar.extractfile(member) if member.name in known else None
                if content is not None:
                    yield member.name, content.read()
    except tarfile.TarError as exc:
        raise ValueError(f"{source} is no tar, or not a whole one") from exc


def _height(face: Face) -> float:
    return face.box[3] - face.box[1] if np.isfinite(face.landmarks).all() else 0.0


@dataclass(frozen=True, slots=True)
class KeptFaces:
    """Faces laid out by the teacher's template, with a margin, as uint8 in memory."""

    images: np.ndarray
    """(n, KEPT_SIDE, KEPT_SIDE, 3) uint8 BGR."""
    landmarks: np.ndarray
    """(n, 5, 2) in pixels of the images."""
    heights: np.ndarray
    """(n,): of the face's box, in pixels of the images."""

    def __len__(self) -> int:
        return len(self.images)

    def with_blends(self, count: int, seed: int) -> KeptFaces:
        """Return these faces and `count` more, each the mean of two of them: always the same, and with more of them the
        first ones stay."""
        rng = np.random.default_rng([seed, 4])  # 4: no batch's draws
        drawn = [(rng.integers(len(self), size=2), rng.uniform(0.35, 0.65)) for _ in range(count)]
        one, other = np.array([pair for pair, _ in drawn], int).reshape(-1, 2).T
        share = np.array([part for _, part in drawn])

        def mixed(values: np.ndarray) -> np.ndarray:
            part = share.reshape(-1, *(1,) * (values.ndim - 1))
            return part * values[one] + (1 - part) * values[other]

        images = [
            cv2.addWeighted(self.images[a], part, self.images[b], 1 - part, 0)
            for a, b, part in zip(one, other, share, strict=True)
        ]
        return KeptFaces(
            np.stack([*self.images, *images]),
            np.concatenate([self.landmarks, mixed(self.landmarks)]),
            np.concatenate([self.heights, mixed(self.heights)]),
        )


def kept_faces(faces: Iterable[Face]) -> KeptFaces:
    """Lay out faces whose landmarks are known. Raises ValueError where there is none."""
    images, landmarks, heights = [], [], []
    for face in faces:
        matrix = similarity(face.landmarks, template(TEACHER_SIDE) + MARGIN)
        images.append(_warped(face.image, matrix, KEPT_SIDE))
        landmarks.append(face.landmarks @ matrix[:, :2].T + matrix[:, 2])
        heights.append(_height(face) * _size(matrix))
    if not images:
        raise ValueError("no face is large enough and has landmarks")
    return KeptFaces(np.stack(images), np.stack(landmarks), np.array(heights))


def template(side: int) -> np.ndarray:
    """Return where an aligned face of this side has its five landmarks, (5, 2) in its pixels."""
    return np.array(RETAIL_TEMPLATE) * side


def _warped(image: np.ndarray, matrix: np.ndarray, side: int) -> np.ndarray:
    """Return (side, side, 3) of the image through the similarity, as the product's embedder does it; what shrinks to
    less than half is first shrunk by area, so that nothing in it aliases."""
    size = _size(matrix)
    if size < 0.5:
        height, width = image.shape[:2]
        small = max(1, round(width * size)), max(1, round(height * size))
        image = cv2.resize(image, small, interpolation=cv2.INTER_AREA)
        matrix = _from_size(matrix, np.array(small) / (width, height))
    return cv2.warpAffine(image, matrix, (side, side), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)


def _from_size(matrix: np.ndarray, scale: np.ndarray | float) -> np.ndarray:
    """Return the matrix for an image `scale` times as large: its pixel p is at (p + 0.5) / scale - 0.5."""
    turn = matrix[:, :2] / scale
    shift = matrix[:, 2] + matrix[:, :2] @ (0.5 / np.broadcast_to(scale, 2) - 0.5)
    return np.column_stack([turn, shift])


def _size(matrix: np.ndarray) -> float:
    return float(np.hypot(*matrix[:, 0]))


def _planes(faces: np.ndarray) -> Tensor:
    """(n, h, w, 3) uint8 BGR to (n, 3, h, w) float32 RGB in [-1, 1]."""
    return torch.from_numpy(np.ascontiguousarray(faces[..., ::-1].transpose(0, 3, 1, 2))).float() / 127.5 - 1


# Batches


@dataclass(frozen=True, slots=True)
class EmbedderBatch:
    """What the student sees, and what it is to say."""

    faces: Tensor
    """(n, 3, side, side) float32 RGB in [-1, 1]."""
    embeddings: Tensor
    """(n, d): the teacher's, of the clean faces, of unit length."""
    hints: Tensor | None
    """(n, c, places, places): the teacher's features of the clean faces, normalised."""
    kinds: Tensor
    """(n,) int64: number of the kind of each face, in the order of the config's `shares`."""

    def to(self, device: torch.device) -> EmbedderBatch:
        hints = None if self.hints is None else self.hints.to(device)
        faces = self.faces.to(device, memory_format=torch.channels_last)
        return EmbedderBatch(faces, self.embeddings.to(device), hints, self.kinds.to(device))


class EmbedderBatches:
    """Batch `step` is a function of seed, rank and step, whatever came before."""

    def __init__(
        self,
        kept: KeptFaces,
        lessons: dict[str, np.ndarray],
        restorers: Sequence[OnnxRestorer],
        config: EmbedderRunConfig,
        *,
        side: int,
        rank: int,
        places: int,
    ) -> None:
        self.kept, self.lessons, self.restorers, self.config, self.places = kept, lessons, restorers, config, places
        self.seed, self.side, self.template = [config.seed, rank], side, template(side)
        self.pool = functools.lru_cache(maxsize=1)(self._restored)
        total = sum(config.shares.values())
        self.kinds, self.odds = list(config.shares), [share / total for share in config.shares.values()]

    def __getitem__(self, step: int) -> EmbedderBatch:
        rng, n = np.random.default_rng([*self.seed, step]), self.config.batch
        rows, mirrored = rng.integers(len(self.kept), size=n), rng.random(n) < 0.5
        kinds = rng.choice(len(self.kinds), n, p=self.odds)
        faces = np.empty((n, self.side, self.side, 3), np.uint8)
        for number, kind in enumerate(kinds):
            match self.kinds[kind]:
                case "clean":
                    image = self.kept.images[rows[number]]
                case "reduced":
                    image = self._reduced(rng, rows[number])
                case "restored":
                    pool = self.pool(step // self.config.refresh)
                    image, rows[number] = pool[rng.integers(len(pool))]
                case _:
                    continue
            faces[number] = self._aligned(rng, image, rows[number])
        if "surveillance" in self.kinds:
            here = np.flatnonzero(kinds == self.kinds.index("surveillance"))
            for number, image in zip(here, self._watched(rng, rows[here], step), strict=True):
                faces[number] = self._aligned(rng, image, rows[number])
        faces[mirrored] = faces[mirrored][:, :, ::-1]
        return EmbedderBatch(
            self._varied(rng, _planes(faces)), torch.from_numpy(self.lessons["embeddings"][rows]),
            self._hints(rows, mirrored), torch.from_numpy(kinds),
        )  # fmt: skip

    def shown(self, step: int, columns: int = 8) -> np.ndarray:
        """Return faces of a batch as the student sees them, a row for each kind: (H, W, 3) uint8 RGB."""
        batch = self[step]
        faces = ((batch.faces + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()
        rows = []
        for kind in range(len(self.kinds)):
            here = np.flatnonzero(batch.kinds.numpy() == kind)[:columns]
            row = np.zeros((columns, self.side, self.side, 3), np.uint8)
            row[: len(here)] = faces[here]
            rows.append(np.concatenate(list(row), axis=1))
        return np.concatenate(rows)

    def _reduced(self, rng: np.random.Generator, row: int, most: float = math.inf) -> np.ndarray:
        """Return the kept face with a box of some height: Pillow's bicubic, then often noise, then often JPEG."""
        low, high = np.log(self.config.heights)
        side = self._side(np.exp(rng.uniform(low, high)), self.kept.heights[row])
        side = int(min(side, most))
        image = np.asarray(Image.fromarray(self.kept.images[row]).resize((side, side), Image.Resampling.BICUBIC))
        if rng.random() < 0.8:
            noise = rng.normal(0, rng.uniform(0, 15), image.shape)
            image = np.clip(np.rint(image + noise), 0, 255).astype(np.uint8)
        if rng.random() < 0.8:
            coded = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, int(rng.integers(25, 96))])[1]
            image = cv2.imdecode(coded, cv2.IMREAD_COLOR)
        return image

    def _side(self, height: float, kept: float) -> int:
        """Return the side of the whole kept picture when a box `kept` px high is brought to `height`."""
        return int(np.clip(round(KEPT_SIDE * height / kept), 8, KEPT_SIDE))

    def _watched(self, rng: np.random.Generator, rows: np.ndarray, step: int) -> Sequence[np.ndarray]:
        """Return the kept faces as surveillance cameras give them, all of one size."""
        if not len(rows):
            return []
        low, high = np.log(self.config.heights)
        side = self._side(np.exp(rng.uniform(low, high)), float(self.kept.heights[rows].mean()))
        factor = int(max((f for f in _FACTORS if f * side <= KEPT_SIDE), default=1))
        sides = (side * factor, side * factor)
        large = np.stack([cv2.resize(image, sides, interpolation=cv2.INTER_AREA) for image in self.kept.images[rows]])
        clean = torch.from_numpy(large[..., ::-1].transpose(0, 3, 1, 2).copy()).float()
        draws = generators(*self.seed, step)
        watched = surveillance(clean, draw_damage(len(rows), draws, self.config.damage), draws, factor=factor)
        return list(watched.to(torch.uint8).permute(0, 2, 3, 1).flip(3).contiguous().numpy())

    def _restored(self, generation: int) -> list[tuple[np.ndarray, int]]:
        """Return reduced faces after a restorer, as the product restores, each with its row."""
        rng, pool = np.random.default_rng([*self.seed, generation, 5]), []  # 5: no batch's draws
        for number in range(self.config.restored):
            row, restorer = int(rng.integers(len(self.kept))), self.restorers[number % len(self.restorers)]
            low = self._reduced(rng, row, most=_LARGEST / min(restorer.card["scales"]))
            pool.append((restorer.restore(low), row))
        return pool

    def _aligned(self, rng: np.random.Generator, image: np.ndarray, row: int) -> np.ndarray:
        """Return the face as the student wants it, by landmarks that wander."""
        landmarks = self.kept.landmarks[row]
        apart = float(np.linalg.norm(landmarks[0] - landmarks[1]))
        wandering = rng.normal(0, 1, landmarks.shape) * (apart * self.config.jitter * rng.random())
        return aligned(image, scaled(landmarks + wandering, len(image) / KEPT_SIDE), self.side)

    def _varied(self, rng: np.random.Generator, faces: Tensor) -> Tensor:
        n, most = len(faces), self.config.vary
        if not most:
            return faces
        gain, shift = (torch.from_numpy(rng.uniform(-most, most, (n, 1, 1, 1))).float() for _ in range(2))
        grey = torch.from_numpy(rng.random((n, 1, 1, 1)) < 0.1)
        faces = torch.where(grey, faces.mean(dim=1, keepdim=True), faces)
        return (faces * (1 + gain) + shift).clamp(-1, 1)

    def _hints(self, rows: np.ndarray, mirrored: np.ndarray) -> Tensor | None:
        if "hints" not in self.lessons:
            return None
        hints = torch.from_numpy(self.lessons["hints"][rows, mirrored.astype(int)]).float()
        return F.interpolate(hints, (self.places, self.places), mode="bilinear", align_corners=False)


def scaled(landmarks: np.ndarray, scale: float) -> np.ndarray:
    return (landmarks + 0.5) * scale - 0.5


def aligned(image: np.ndarray, landmarks: np.ndarray, side: int) -> np.ndarray:
    """Return the face by its landmarks in this image as an embedder wants it, (side, side, 3) uint8 BGR."""
    return _warped(image, similarity(landmarks, template(side)), side)


# Validation


class EmbedderValidation:
    """True accepts of small probes and of clean ones, against clean references, all faces with all others."""

    def __init__(self, faces: Sequence[Face], heights: Sequence[int], side: int, device: torch.device) -> None:
        """Raises ValueError where there are not two people, one of them with two faces."""
        faces = [face for face in faces if np.isfinite(face.landmarks).all()]
        people = np.unique([face.identity for face in faces], return_inverse=True)[1]
        same = people[:, None] == people[None]
        self.mates, self.impostors = same & ~np.eye(len(faces), dtype=bool), ~same
        if not self.mates.any() or not self.impostors.any():
            raise ValueError("two people are needed, one of them with two faces")
        self.device = device
        self.seen = {"clean": np.stack([aligned(f.image, f.landmarks, side) for f in faces])}
        for height in heights:
            probes = (degraded_probe(face, height, noise=10, quality=40, seed=1) for face in faces)
            self.seen[f"{height} px"] = np.stack([aligned(image, landmarks, side) for image, landmarks in probes])
        """By the probe's size: (n, side, side, 3) uint8 BGR."""

    @property
    def keys(self) -> list[bytes | np.ndarray]:
        return [repr(list(self.seen)).encode(), *self.seen.values()]

    def told(self, teacher: Teacher) -> dict[str, np.ndarray]:
        return {name: np.array(score) for name, score in self.score(teacher).items()}

    @torch.no_grad()
    def score(self, network: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Return, by name, the true accepts at 1 % false accepts for each size of the probes, then those of clean ones
        at 0.1 %, and their share of pairs that the best threshold tells rightly, mates and impostors counting alike."""
        clean = self._embedded(network, self.seen["clean"])
        similarities = {name: self._embedded(network, faces) @ clean.T for name, faces in self.seen.items()}
        return {
            **{name: self._accepted(found, 0.01) for name, found in similarities.items()},
            "clean at 0.1 %": self._accepted(similarities["clean"], 0.001),
            "accuracy": self._accuracy(similarities["clean"]),
        }

    def value(self, scores: dict[str, float]) -> float:
        """Return the mean of the true accepts at 1 % false accepts."""
        return float(np.mean([scores[name] for name in self.seen]))

    def _embedded(self, network: Callable[[Tensor], Tensor], faces: np.ndarray) -> np.ndarray:
        parts = [network(_planes(faces[at : at + 64]).to(self.device)) for at in range(0, len(faces), 64)]
        return F.normalize(torch.cat(parts).float(), dim=1).cpu().numpy()

    def _accepted(self, similarities: np.ndarray, false_accepts: float) -> float:
        bar = np.quantile(similarities[self.impostors], 1 - false_accepts, method="higher")
        return float(np.mean(similarities[self.mates] > bar))

    def _accuracy(self, similarities: np.ndarray) -> float:
        mates, impostors = np.sort(similarities[self.mates]), np.sort(similarities[self.impostors])
        bars = np.quantile(impostors, np.linspace(0.8, 1, 401))
        rejected, missed = (np.searchsorted(each, bars, side="right") / len(each) for each in (impostors, mates))
        return float(np.max(rejected + 1 - missed) / 2)
