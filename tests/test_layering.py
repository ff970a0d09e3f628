"""Who may import whom, read from the imports themselves."""

from __future__ import annotations

import ast
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OURS = {"streamer", "engines", "models", "configs"}
GPU_LIBRARIES = {"tensorrt", "tensorrt_rtx", "tensorrt_lean_bindings", "cuda"}

STAGES = {
    "camera",
    "detector",
    "tracker",
    "selector",
    "quality",
    "router",
    "restorer",
    "embedder",
    "gallery",
    "scoring",
}
PLUMBING = {"threading", "queue", "multiprocessing", "asyncio", "concurrent"}
STAGES_KNOW = {"types", "geometry", "quality", "metrics"}
ASSEMBLERS = {"cli", "assembly", "bench", "config", "demo"}
"""These build parts and may know the config; all else gets what it needs in its constructor."""


@dataclass(frozen=True)
class Import:
    """One import statement's target, such as streamer.types, and where it stands."""

    target: str
    line: int
    at_module_level: bool

    @property
    def package(self) -> str:
        return self.target.partition(".")[0]


def imports_of(path: Path) -> list[Import]:
    tree = ast.parse(path.read_text(), str(path))
    deferred = {id(node) for function in ast.walk(tree) if is_deferred(function) for node in ast.walk(function)}
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}:{node.lineno}: imports are absolute"
            targets = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        found += [Import(target, node.lineno, id(node) not in deferred) for target in targets]
    return found


def is_deferred(node: ast.AST) -> bool:
    """Functions run when called, and what only the type checker reads never runs."""
    if isinstance(node, ast.If):
        return isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
    return isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)


def files_of(*packages: str) -> list[Path]:
    return [path for package in packages for path in sorted((ROOT / package).rglob("*.py"))]


def broken(paths: list[Path], is_wrong) -> list[str]:
    """Return the imports that are wrong, as lines to act on."""
    return [
        f"{path.relative_to(ROOT)}:{found.line}: imports {found.target}"
        for path in paths
        for found in imports_of(path)
        if is_wrong(found)
    ]


@pytest.mark.parametrize(
    ("package", "others"),
    [
        ("streamer", {"models", "configs", "torch"}),
        ("engines", {"streamer", "models", "configs", "torch"}),
        ("models", {"streamer", "engines", "configs"}),
        ("configs", {"streamer", "engines", "models", "torch"}),
    ],
)
def test_packages_import_only_in_the_directions_of_the_design(package, others):
    assert files_of(package)
    assert not broken(files_of(package), lambda found: found.package in others)


def test_torch_is_imported_in_models_alone():
    assert not broken(files_of("streamer", "engines", "configs"), lambda found: found.package.startswith("torch"))
    assert broken(files_of("models"), lambda found: found.package == "torch"), "the check sees torch where it is"


def test_the_gpu_libraries_are_imported_in_two_files_and_only_when_used():
    homes = {ROOT / "engines" / "trt.py", ROOT / "engines" / "compile.py"}
    elsewhere = [path for path in files_of(*OURS) if path not in homes]

    assert not broken(elsewhere, lambda found: found.package in GPU_LIBRARIES)
    assert not broken(
        [path for path in homes if path.exists()],
        lambda found: found.package in GPU_LIBRARIES and found.at_module_level,
    )


def stage_files() -> list[Path]:
    return [path for path in files_of("streamer") if path.stem in STAGES]


def module_of(found: Import) -> str:
    """Return `types` for streamer.types.Frame, nothing for what is not streamer's."""
    package, _, rest = found.target.partition(".")
    return rest.partition(".")[0] if package == "streamer" else ""


@pytest.mark.parametrize("path", stage_files(), ids=lambda path: path.stem)
def test_a_stage_knows_neither_other_stages_nor_threads_nor_the_config(path):
    # A camera takes the event that ends everything, to stop in the middle of its back-off, and others ask how it does.
    plumbing = PLUMBING - {"threading"} if path.stem == "camera" else PLUMBING

    assert not broken([path], lambda found: found.package in plumbing)
    assert not broken([path], lambda found: found.package == "streamer" and module_of(found) not in STAGES_KNOW)


def test_a_camera_starts_no_thread():
    tree = ast.parse((ROOT / "streamer" / "camera.py").read_text())
    used = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and is_threading(node.value)}

    assert used <= {"Event", "Lock"}


def is_threading(node: ast.AST) -> bool:
    return isinstance(node, ast.Name) and node.id == "threading"


def test_config_objects_stop_at_the_constructors_door():
    others = [path for path in files_of("streamer") if path.stem not in ASSEMBLERS]

    assert not broken(others, lambda found: module_of(found) == "config")


def test_files_are_one_level_deep_and_named_for_what_they_hold():
    vague = {"utils.py", "util.py", "common.py", "helpers.py", "base.py", "misc.py"}

    for path in files_of(*OURS):
        assert path.parent.parent == ROOT, f"{path.relative_to(ROOT)}: one level deep"
        assert path.name not in vague, f"{path.relative_to(ROOT)}: says nothing of what it holds"


@pytest.mark.parametrize("package", ["models", "configs"])
def test_the_init_of_a_package_of_data_imports_nothing(package):
    assert not imports_of(ROOT / package / "__init__.py")


def test_no_import_cycle_at_module_level():
    graph = {module_name(path): targets_of(path) for path in files_of("streamer", "engines", "models")}

    while graph:
        leaves = [name for name, below in graph.items() if not below & graph.keys()]
        assert leaves, f"these import each other: {', '.join(sorted(graph))}"
        for name in leaves:
            del graph[name]


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def targets_of(path: Path) -> set[str]:
    """Return the modules of ours that a file imports when it is loaded."""
    dotted = {tuple(found.target.split(".")[:2]) for found in imports_of(path) if found.at_module_level}
    return {".".join(parts) for parts in dotted if parts[0] in OURS}


def test_the_running_app_never_loads_torch_nor_tensorrt():
    program = "import sys, streamer.cli; print(*{name.partition('.')[0] for name in sys.modules})"

    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)

    loaded = set(done.stdout.split())
    assert "streamer" in loaded
    assert not loaded & {"torch", "models", "openvino", *GPU_LIBRARIES}
