"""What all tests share: the helpers beside this file, and the data that only some machines have."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent

sys.path.insert(0, str(TESTS))


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data beside the checkout."""
    folder = TESTS.parents[1] / "shared"
    if not folder.is_dir():
        pytest.skip("the folder `shared` with real data does not lie beside this checkout")
    return folder
