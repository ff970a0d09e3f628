"""Run by test_trt.py in a process of its own: say which names of engines/trt.py a TensorRT's bindings do not have.

    python trt_names.py MODULE NAMES.json

The JSON maps a class of the bindings, or "" for the module itself, to names. Each that is missing is a line.
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

module = importlib.import_module(sys.argv[1])
for owner, names in json.loads(Path(sys.argv[2]).read_text()).items():
    place = getattr(module, owner, None) if owner else module
    for name in names:
        if not hasattr(place, name):
            print(f"{owner}.{name}")
