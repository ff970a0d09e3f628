"""Settings of a run: a YAML file into a pydantic model, every mistake told with its place."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

import yaml
from pydantic import AfterValidator, BaseModel, ValidationError, ValidationInfo

Settings = TypeVar("Settings", bound=BaseModel)


class SettingsError(ValueError):
    """A YAML file cannot be read as what it should be. The message is one line."""


def _beside_file(path: Path, info: ValidationInfo) -> Path:
    return (info.context / path).resolve() if info.context else path


RelativePath = Annotated[Path, AfterValidator(_beside_file)]
"""A path that, in a YAML file, is relative to that file."""


def read_settings(kind: type[Settings], path: Path, changes: Mapping[str, Any] | None = None) -> Settings:
    """Read a YAML file; `changes` take the place of its fields.

    Raises SettingsError, in one line, with every mistake and its place.
    """
    try:
        fields = yaml.safe_load(path.read_text())
    except OSError as exc:
        raise SettingsError(f"{path}: {exc.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as exc:
        raise SettingsError(f"{path}: {' '.join(str(exc).split())}") from None
    if not isinstance(fields, dict):
        raise SettingsError(f"{path}: no settings")
    try:
        return kind.model_validate({**fields, **(changes or {})}, context=path.resolve().parent)
    except ValidationError as exc:
        told = (
            f"{'.'.join(map(str, error['loc'])) or 'settings'}: {error['msg'].removeprefix('Value error, ')}"
            for error in exc.errors()
        )
        raise SettingsError(f"{path}: {'; '.join(told)}") from None
