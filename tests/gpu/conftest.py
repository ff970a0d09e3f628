"""Tests that need an NVIDIA GPU. `tests/gpu/run` runs them; a normal run of pytest does not collect them."""

from __future__ import annotations

import pytest

from engines.trt import gpu_found


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip all of them where there is no GPU: TensorRT would crash the process."""
    if not gpu_found():
        for item in items:
            item.add_marker(pytest.mark.skip(reason="there is no NVIDIA GPU with a driver here"))
