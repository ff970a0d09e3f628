"""The schema of camera.yaml, and how it is read.

A config is a YAML file, overridden by environment variables that name a field: STREAMER__CAMERAS__0__URL is
`cameras.0.url`. `python -m streamer.config` prints a complete, commented example.
"""

from __future__ import annotations

import difflib
import ipaddress
import os
import re
import socket
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin
from urllib.parse import quote, urlsplit

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    Secret,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails
from pydantic_settings import BaseSettings, EnvSettingsSource, PydanticBaseSettingsSource, SettingsConfigDict

PREFIX, DELIMITER = "STREAMER__", "__"

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
Model = Annotated[str, Field(min_length=1)]
Place = tuple[str | int, ...]
"""Keys and indices from the top of a config down to a value."""

_SCHEMES = ("rtsp", "rtsps", "http", "https", "rtmp", "rtmps", "udp", "rtp")


class ConfigError(ValueError):
    """A config has mistakes: all of them, each one line that begins with its place and holds no secret."""

    def __init__(self, mistakes: Sequence[str]) -> None:
        super().__init__("\n".join(mistakes))
        self.mistakes = tuple(mistakes)


class SecretUrl(Secret[str]):
    """A path or an address that shows neither user, password nor query; `get_secret_value()` is what to open."""

    def _display(self) -> str:
        return _redacted(self.get_secret_value())


class _Section(BaseModel):
    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        hide_input_in_errors=True,
        allow_inf_nan=False,
    )

    @model_validator(mode="before")
    @classmethod
    def _an_empty_section_is_all_defaults(cls, values: Any) -> Any:
        return {} if values is None else values


class CameraConfig(_Section):
    """A source: a live camera or a file."""

    name: Name = Field(examples=["entrance"])
    """Its key everywhere, in events too: 1 to 64 letters, digits, - and _."""
    url: SecretUrl = Field(examples=["rtsp://user:${CAMERA_PASSWORD}@10.0.0.7/stream1"])
    """Its address (rtsp, rtsps, http, https, rtmp, rtmps, udp, rtp), or the path of a video file."""
    transport: Literal["tcp", "udp"] = "tcp"
    """How RTSP brings the video: tcp loses nothing, udp does not wait for what was lost."""
    stale_after_s: float = Field(1.0, gt=0)
    """Seconds after which a frame of a live camera is too old to be looked at; it is dropped and counted."""

    @field_validator("url")
    @classmethod
    def _can_be_opened(cls, url: SecretUrl) -> SecretUrl:
        _check_source(url.get_secret_value())
        return url


class DetectorConfig(_Section):
    model: Model = "centerface"
    """Name, path or URL of a network that finds faces with five landmarks."""
    family: Literal["centerface", "scrfd", "yunet"] | None = None
    """How the outputs of a network without a card are read; null: as its card says."""
    size: int = Field(960, ge=160, le=4096, multiple_of=32)
    """Longer side of the canvas the network looks at, a multiple of 32: a larger one finds smaller faces, slower."""
    threshold: float | None = Field(None, gt=0, lt=1)
    """Least score of a face that begins a track; null: the card's own."""


class TrackerConfig(_Section):
    kind: Literal["bytetrack", "cbiou"] = "bytetrack"
    """Which tracker: cbiou holds small faces better at few frames a second."""
    lost_after: float = Field(1.5, gt=0)
    """Seconds without a detection after which a track ends."""
    min_hits: int = Field(2, ge=1)
    """Detections after which a track appears."""


class SelectorConfig(_Section):
    min_size_px: float = Field(12.0, ge=0)
    """Least height of a face's box in pixels of the frame; smaller faces are tracked only."""
    retry_s: float = Field(2.0, gt=0)
    """Seconds in the stream after which a track is identified again, with its best crop since."""
    margin: float = Field(0.15, ge=0)
    """Share by which a crop must be better than the best so far to go out before that."""


class RestorerConfig(_Section):
    name: Model = "auto"
    """Name, path or URL of a restorer; none: all crops go out as they are; auto: for each crop the one that recognition
    gains most by, where that was measured for the embedder, else sgen-small."""
    max_size: int = Field(256, ge=16, le=4096)
    """Longest side of a restored image in pixels; a crop larger than this goes out as it is."""
    buckets: tuple[Annotated[int, Field(ge=1)], ...] | None = Field(None, min_length=1)
    """Sides in pixels that the network is fed with, rising, so that faces of many sizes share batches and plans;
    `streamer engines plan` chooses them from the faces of a run. null: each crop at its own size."""

    @field_validator("buckets")
    @classmethod
    def _rise(cls, buckets: tuple[int, ...] | None) -> tuple[int, ...] | None:
        if buckets and any(after <= before for before, after in pairwise(buckets)):
            raise ValueError("should rise from entry to entry")
        return buckets


class EmbedderConfig(_Section):
    model: Model | None = None
    """Name, path or URL of a network that embeds faces; null: what the gallery's templates were made with, and without
    a gallery none."""


class GalleryConfig(_Section):
    folder: Path | None = Field(None, examples=[None])
    """Folder of the gallery whose persons are looked for, as `streamer enrol` made it; null: nobody is."""
    calibration: Path | None = Field(None, examples=[None])
    """What similarities mean, as `streamer calibrate` wrote it; null: what was fitted for the embedder, if anything."""
    short_list_margin: float = Field(0.1, ge=0, le=2)
    """How far below the threshold of a list its persons' scores are published, and faces drawn by their photos."""
    faces_per_day: float = Field(1000.0, gt=0)
    """Faces assumed to pass each camera a day until it is known: weighs as much as one hour of looking."""
    guided: Model = "gfrnet-small"
    """Name, path or URL of the restorer that draws a face by the photos of who it may be, for the human eye only;
    none: no such pictures."""
    keep_days: float = Field(30.0, gt=0)
    """How long the crop and the embeddings of a match are kept, encrypted, beside the gallery."""


class EngineConfig(_Section):
    backend: Literal["auto", "onnxruntime", "openvino", "tensorrt"] = "auto"
    """What runs the networks; auto: the fastest that is installed and works here."""
    precision: Literal["auto", "fp32", "bf16", "fp16", "int8"] = "auto"
    """Of plans for TensorRT and OpenVINO; auto: the fastest that gives what ONNX Runtime gives."""
    threads: int | None = Field(None, ge=1)
    """Threads of each network on a CPU; null: the cores that decoding leaves."""


class PublishConfig(_Section):
    # before the endpoint, whose check needs it
    insecure: bool = False
    """Allow an endpoint that others on the network can reach: faces cross it in clear."""
    endpoint: str = "tcp://127.0.0.1:5556"
    """Where events are published: tcp://ADDRESS:PORT or ipc://PATH."""
    wait_for: int = Field(0, ge=0)
    """Subscriptions to faces to wait for before any source starts."""
    image_format: Literal["png", "jpeg"] = "png"
    """How images are encoded: png loses nothing, jpeg is smaller."""

    @field_validator("endpoint")
    @classmethod
    def _is_private(cls, endpoint: str, info: ValidationInfo) -> str:
        host = _publish_host(endpoint)
        if host is not None and not _is_loopback(host) and info.data.get("insecure") is False:
            raise ValueError("can be reached from the network, where faces would cross in clear; set publish.insecure")
        return endpoint


def _host_name() -> str:
    return re.sub(r"[^A-Za-z0-9_-]", "-", socket.gethostname())[:64] or "streamer"


class StreamerConfig(BaseSettings):
    """What `streamer run` is told. Made in code it reads neither a file nor the environment; `load_config` does."""

    model_config = SettingsConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        hide_input_in_errors=True,
        env_prefix=PREFIX,
        env_nested_delimiter=DELIMITER,
        env_ignore_empty=True,
    )

    stream: Name = Field(default_factory=_host_name, examples=["box-1"])
    """Name of this box in its events, made as a camera's; by default the host's name."""
    cameras: tuple[CameraConfig, ...] = Field(min_length=1)
    """The sources: live cameras, files or both."""
    detector: DetectorConfig = DetectorConfig()
    """Finds faces."""
    tracker: TrackerConfig = TrackerConfig()
    """Follows them from frame to frame."""
    selector: SelectorConfig = SelectorConfig()
    """Chooses the crops of a track that are worth identifying."""
    restorer: RestorerConfig = RestorerConfig()
    """Restores crops."""
    embedder: EmbedderConfig = EmbedderConfig()
    """Turns faces into embeddings."""
    gallery: GalleryConfig = GalleryConfig()
    """Who is looked for."""
    engine: EngineConfig = EngineConfig()
    """Runs the networks."""
    publish: PublishConfig = PublishConfig()
    """Publishes events over ZeroMQ."""

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Read nothing but the arguments."""
        return (init_settings,)


def load_config(path: Path, environ: Mapping[str, str] = os.environ) -> StreamerConfig:
    """Read a config file with its overrides from the environment; relative paths in it start from its folder.

    Raises ConfigError with every mistake.
    """
    content, repeated = _read(path)
    variables, unknown = _field_variables(environ)
    overrides = _Environment({name: environ[name] for name in variables.values()})()
    wrong: dict[Place, str] = {}
    values = _fill(_merge(content, overrides), environ, (), wrong)
    config = _validate(values, wrong)
    mistakes = [*repeated, *unknown, *(_line(place, what, variables.get(place)) for place, what in wrong.items())]
    if config is None or mistakes:
        raise ConfigError(mistakes)
    return _resolve(config, path.parent)


def example() -> str:
    """Return a complete config, each field under its sentence."""
    return "\n".join([*textwrap.dedent(_HEADER).splitlines(), *_example_fields(StreamerConfig, "")]) + "\n"


# The file.


def _read(path: Path) -> tuple[dict[Any, Any], list[str]]:
    """Return what the file says, and which keys it says twice. Raises ConfigError if it is no YAML mapping."""
    try:
        loader = _Loader(path.read_text("utf-8-sig"))
        content = loader.get_single_data()
    except OSError as exc:
        raise ConfigError([f"{path}: {exc.strerror}"]) from None
    except UnicodeDecodeError:
        raise ConfigError([f"{path}: is no text in UTF-8"]) from None
    except yaml.MarkedYAMLError as exc:
        raise ConfigError([f"{path}: {_where(exc.problem_mark)}: {exc.problem}"]) from None
    except yaml.reader.ReaderError as exc:
        raise ConfigError([f"{path}: character {exc.position + 1}: {exc.reason}"]) from None
    except ValueError:
        raise ConfigError([f"{path}: holds a date or a number that does not exist"]) from None
    except RecursionError:
        raise ConfigError([f"{path}: is nested too deeply"]) from None
    if not isinstance(content, dict | None):
        raise ConfigError([f"{path}: should hold settings, one `key: value` a line"])
    return content or {}, [f"{path}: {line}" for line in loader.repeated]


class _Loader(yaml.SafeLoader):
    """Notes the keys that are there twice, of which YAML would keep the last."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.repeated: list[str] = []

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                self.repeated.append(f"{_where(key.start_mark)}: {_redacted(key.value)} is there twice")
            seen.add(str(key.value))
        return node


def _where(mark: yaml.Mark | None) -> str:
    return f"line {mark.line + 1}, column {mark.column + 1}" if mark else "somewhere"


# The environment.


class _Environment(EnvSettingsSource):
    """The fields that these variables set, nested; the index of a list's item is a key."""

    def __init__(self, variables: Mapping[str, str]) -> None:
        self._variables = {name.lower(): value for name, value in variables.items() if value}
        super().__init__(StreamerConfig)

    def _load_env_vars(self) -> Mapping[str, str | None]:
        return self._variables


def _field_variables(environ: Mapping[str, str]) -> tuple[dict[Place, str], list[str]]:
    """Return the variables that name a field, by its place, and the mistakes of those that only look so."""
    variables: dict[Place, str] = {}
    unknown: list[str] = []
    for name in sorted(environ):
        if name.upper().startswith(PREFIX):
            place = tuple(map(_key, name[len(PREFIX) :].lower().split(DELIMITER)))
            what = _unknown(place)
            if what:
                unknown.append(f"{name}: {what}")
            variables |= {} if what else {place: name}
    return variables, unknown


def _key(text: str) -> str | int:
    return int(text) if re.fullmatch(r"0|[1-9][0-9]{0,2}", text) else text


def _merge(base: Any, overrides: Any) -> Any:
    """Lay the environment's values over the file's, into lists by index."""
    if not isinstance(overrides, dict):
        return overrides
    if all(key.isdecimal() for key in overrides) and isinstance(base, list | None):
        items = list(base or [])
        items += [None] * (1 + max(map(int, overrides)) - len(items))
        return [_merge(item, overrides.get(str(index), item)) for index, item in enumerate(items)]
    if isinstance(base, dict | None):
        base = base or {}
        return base | {key: _merge(base.get(key), value) for key, value in overrides.items()}
    return base  # a mistake of the file, to be reported as such


# ${NAME}.

_PLACEHOLDER = re.compile(r"\$(\$?)\{([^}]*)(\}?)")
_USER_PART = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://[^/?#]*@")
_DEEPEST = 8


def _fill(value: Any, environ: Mapping[str, str], place: Place, wrong: dict[Place, str]) -> Any:
    """Return a value with the environment's variables in its texts; what cannot be filled goes into `wrong`."""
    if len(place) > _DEEPEST:  # an alias may contain itself
        wrong[place[:_DEEPEST]] = "is nested too deeply"
        return None
    if isinstance(value, dict):
        return {str(key): _fill(item, environ, (*place, str(key)), wrong) for key, item in value.items()}
    if isinstance(value, list):
        return [_fill(item, environ, (*place, index), wrong) for index, item in enumerate(value)]
    if isinstance(value, str):
        try:
            return _filled(value, environ)
        except ValueError as exc:
            wrong[place] = str(exc)
    return value


def _filled(text: str, environ: Mapping[str, str]) -> str:
    user_part = _USER_PART.match(text)
    user_end = user_part.end() if user_part else 0

    def value(found: re.Match[str]) -> str:
        escaped, name, closed = found.groups()
        if escaped:
            return found[0][1:]
        if not closed or not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            raise ValueError("holds a ${ that begins no ${NAME}; as plain text it is written $${")
        if name not in environ:
            raise ValueError(f"the environment variable {name} is not set")
        return quote(environ[name], safe="") if found.start() < user_end else environ[name]

    return _PLACEHOLDER.sub(value, text)


# Checks.


def _validate(values: dict[str, Any], wrong: dict[Place, str]) -> StreamerConfig | None:
    """Return the config, or None; mistakes go into `wrong` where their place has none yet."""
    cameras = values.get("cameras")
    for place, what in _repeated_names(cameras if isinstance(cameras, list) else []):
        wrong.setdefault(place, what)
    try:
        return StreamerConfig(**values)
    except ValidationError as exc:
        errors = {error["loc"]: error for error in exc.errors(include_url=False, include_input=False)}
        for place, error in errors.items():
            # a list of nothing but wrong entries counts as empty too
            if not any(other[: len(place)] == place != other for other in errors):
                wrong.setdefault(place, _sentence(error))
    return None


def _repeated_names(cameras: list[Any]) -> Iterator[tuple[Place, str]]:
    names = [camera.get("name") if isinstance(camera, dict) else None for camera in cameras]
    for index, name in enumerate(names):
        if isinstance(name, str) and name in names[:index]:
            yield ("cameras", index, "name"), f"cameras.{names.index(name)} has this name too"


_SENTENCES = {
    "missing": "is missing",
    "model_type": "should be a section: `key: value` lines, indented",
    "string_pattern_mismatch": "should be 1 to 64 letters, digits, - and _",
    "string_too_short": "is empty",
    "string_type": "should be text; what looks like a number, a date or a yes needs quotes",
    "too_short": "should have at least one entry",
    "tuple_type": "should be a list: each entry begins with -",
}


def _sentence(error: ErrorDetails) -> str:
    if error["type"] == "extra_forbidden":
        return _unknown(error["loc"])
    if error["type"] == "value_error":
        return str(error["ctx"]["error"])
    return _SENTENCES.get(error["type"], error["msg"].replace("Input should", "should"))


def _unknown(place: Place) -> str:
    """Say why a place names no field; nothing if it does."""
    kind: Any = StreamerConfig
    for key in place:
        fields = _fields(kind)
        below = _below(kind, key)
        if below is None:
            near = difflib.get_close_matches(str(key), fields, n=1)
            return f"unknown key; did you mean {near[0]}?" if near else "unknown key"
        kind = below
    return "is a section; name one of its fields" if _fields(kind) or _item(kind) else ""


def _below(kind: Any, key: str | int) -> Any:
    """Return the type under a key or an index of a type, None where there is none."""
    if isinstance(key, int):
        return _item(kind)
    field = _fields(kind).get(key)
    return field.annotation if field else None


def _fields(kind: Any) -> dict[str, FieldInfo]:
    return kind.model_fields if isinstance(kind, type) and issubclass(kind, BaseModel) else {}


def _item(kind: Any) -> Any:
    """Return the type of a list's items, None for what is no list."""
    return get_args(kind)[0] if get_origin(kind) is tuple else None


def _line(place: Place, what: str, variable: str | None) -> str:
    source = f" (set by {variable})" if variable else ""
    return f"{'.'.join(_redacted(str(key)) for key in place)}: {what}{source}"


# Addresses and paths.


def _check_source(source: str) -> None:
    """Raise ValueError where a camera's url can be neither an address nor a path."""
    if not source:
        raise ValueError("is empty")
    scheme = re.match(r"([A-Za-z][A-Za-z0-9+.-]*):", source)
    if scheme is None:
        return
    if scheme[1].lower() not in _SCHEMES or not source[scheme.end() :].startswith("//"):
        known = ", ".join(f"{name}://" for name in _SCHEMES)
        raise ValueError(f"should begin with one of {known} or be a path; one with a colon in it begins with ./")
    try:
        parts = urlsplit(source)
        valid = bool(parts.hostname) and parts.port != 0
    except ValueError:
        valid = False
    if not valid:
        raise ValueError("has no valid host and port; in a password write / ? # : as %2F %3F %23 %3A, or use ${NAME}")


def _redacted(source: str) -> str:
    """Hide what a source may hold of secrets: cameras take passwords before the host, in the query and in the path."""
    scheme, separator, rest = source.rpartition("://") if "://" in source else ("", "", source)
    if separator or re.search(r":.*@", rest, re.DOTALL):
        rest = re.sub(r"^.*@", "***@", rest, flags=re.DOTALL)
    if separator:
        rest = re.sub(r"\?.*", "?***", rest, flags=re.DOTALL)
    return scheme + separator + re.sub(r"(?i)(pass(?:word|wd)?|pwd)=[^/]*", r"\1=***", rest)


def _publish_host(endpoint: str) -> str | None:
    """Return the host of a tcp endpoint, None for ipc. Raises ValueError for anything else."""
    if re.fullmatch(r"ipc://.+", endpoint):
        return None
    tcp = re.fullmatch(r"tcp://(\[[0-9A-Fa-f:.]+\]|[^:/\s]+):([0-9]{1,5}|\*)", endpoint)
    if tcp is None or (tcp[2] != "*" and int(tcp[2]) > 65535):
        raise ValueError("should be tcp://ADDRESS:PORT or ipc://PATH")
    return tcp[1].strip("[]")


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _resolve(config: StreamerConfig, folder: Path) -> StreamerConfig:
    """Return the config with its relative paths made to start from where it lies."""
    cameras = tuple(camera.model_copy(update={"url": _resolve_source(camera.url, folder)}) for camera in config.cameras)
    return config.model_copy(
        update={
            "cameras": cameras,
            "detector": config.detector.model_copy(update={"model": _resolve_model(config.detector.model, folder)}),
            "restorer": config.restorer.model_copy(update={"name": _resolve_model(config.restorer.name, folder)}),
            "embedder": config.embedder.model_copy(update={"model": _resolve_model(config.embedder.model, folder)}),
            "gallery": config.gallery.model_copy(
                update={
                    "folder": config.gallery.folder and folder / config.gallery.folder,
                    "calibration": config.gallery.calibration and folder / config.gallery.calibration,
                    "guided": _resolve_model(config.gallery.guided, folder),
                }
            ),
        }
    )


def _resolve_source(url: SecretUrl, folder: Path) -> SecretUrl:
    source = url.get_secret_value()
    return url if "://" in source else SecretUrl(str(folder / source))


def _resolve_model(model: str | None, folder: Path) -> str | None:
    is_path = model is not None and "://" not in model and ("/" in model or model.endswith(".onnx"))
    return str(folder / model) if model is not None and is_path else model


# The example.

_HEADER = """\
    # Everything that can be configured, with its defaults. This file is made by `python -m streamer.config`.
    #
    # ${NAME} in a value is replaced by that environment variable; in the user part of an address it is percent-encoded.
    # $${ stands for ${ itself. Relative paths start from this file's folder. An environment variable that names a field
    # overrides it: STREAMER__CAMERAS__0__URL, STREAMER__PUBLISH__ENDPOINT; an empty one does not.
    """


def _example_fields(model: type[BaseModel], indent: str) -> Iterator[str]:
    for name, field in model.model_fields.items():
        if not indent:
            yield ""
        yield from _comment(f"{field.description}{_choices(field.annotation)}", indent)
        yield from _example_field(name, field, indent)


def _example_field(name: str, field: FieldInfo, indent: str) -> Iterator[str]:
    item = _item(field.annotation)
    if item:
        yield f"{indent}{name}:"
        yield f"{indent}  - # {item.__doc__}"
        yield from _example_fields(item, indent + "    ")
    elif isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
        yield f"{indent}{name}:"
        yield from _example_fields(field.annotation, indent + "  ")
    else:
        value = field.examples[0] if field.examples else field.default
        mark = "# " if field.default_factory else ""
        yield indent + mark + yaml.safe_dump({name: value}, width=1000).strip()


def _comment(text: str, indent: str) -> list[str]:
    return textwrap.wrap(text, 120, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}# ")


def _choices(annotation: Any) -> str:
    """Return ` (a | b)` for a Literal, with or without None, else nothing."""
    kinds = [annotation, *get_args(annotation)]
    choices = [choice for kind in kinds if get_origin(kind) is Literal for choice in get_args(kind)]
    return f" ({' | '.join(choices)})" if choices else ""


if __name__ == "__main__":
    print(example(), end="")
