# make demo    see it work: installs what it needs into .venv, then makes demo/index.html
# make test    run the tests: installs torch and the tools too
# make gpu     put TensorRT and ONNX Runtime for CUDA into .venv, on a machine with an NVIDIA GPU
# make lint    what .ci/run checks before the tests
# make clean   remove .venv
#
# PYTHON=python3.12 make demo   with another Python than python3; it must be 3.11 or newer

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
PIP := PIP_DISABLE_PIP_VERSION_CHECK=1 $(RUN) -m pip --no-input

.PHONY: demo test gpu lint format clean
.DELETE_ON_ERROR:

demo: $(VENV)/demo.stamp
	$(RUN) -m streamer.demo

# Processes apart, as in the product: torch and OpenVINO in one crashed within a training (segmentation fault).
test: $(VENV)/test.stamp
	OMP_NUM_THREADS=1 $(RUN) -m pytest -q -n 2 --dist loadfile tests/models
	OMP_NUM_THREADS=1 $(RUN) -m pytest -q -n 2 --dist loadfile tests/engines
	$(RUN) -m pytest -q --ignore=tests/models --ignore=tests/engines

lint: $(VENV)/test.stamp
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

format: $(VENV)/test.stamp
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

gpu: $(VENV)/demo.stamp
	$(PIP) install --editable '.[gpu]'
	@$(CUDA_RUNTIME)

clean:
	rm -rf $(VENV)

# A stamp says that what it is named for is installed; it is as old as the pyproject.toml it was installed from.

$(VENV)/demo.stamp: $(VENV)/python.stamp pyproject.toml
	@echo "Installing streamer into $(VENV) (about 1 GB, a minute or two)"
	$(PIP) install --quiet --editable '.[openvino]'
	@$(KEEP_CUDA_RUNTIME)
	@$(RUN) -c 'import cv2' 2>/dev/null || $(RUN) -c "$$NAME_MISSING_LIBRARIES"
	$(VENV)/bin/streamer models fetch centerface
	@touch $@

$(VENV)/test.stamp: $(VENV)/demo.stamp
	@echo "Installing torch and the tools into $(VENV)"
	$(PIP) install --quiet --editable '.[train,openvino,large,rtx,dev]'
	@$(KEEP_CUDA_RUNTIME)
	@touch $@

$(VENV)/python.stamp:
	@$(PYTHON) -c "$$CHECK_PYTHON"
	$(PYTHON) -m venv $(VENV)
	@touch $@

# onnxruntime and onnxruntime-gpu fill one folder: the second takes the place of the first, in its version. It is
# installed twice, as taking the first away takes files of the second.
CUDA_RUNTIME = set -e; \
	version=$$($(RUN) -c 'from importlib.metadata import version; print(version("onnxruntime"))'); \
	$(PIP) install "onnxruntime-gpu[cuda,cudnn]==$$version"; \
	$(PIP) uninstall --quiet --yes onnxruntime; \
	$(PIP) install --quiet --force-reinstall --no-deps "onnxruntime-gpu==$$version"

# pip brings onnxruntime back, as insightface asks for it by name.
KEEP_CUDA_RUNTIME = if $(PIP) show --quiet onnxruntime-gpu 2>/dev/null; then $(CUDA_RUNTIME); fi

define CHECK_PYTHON
import sys
if sys.version_info < (3, 11):
    sys.exit("streamer needs Python 3.11 or newer; %s is %s: make PYTHON=python3.11" % (sys.executable, sys.version.split()[0]))
try:
    import ensurepip, venv
except ImportError:
    sys.exit("this Python cannot make a virtual environment: apt-get install python3-venv")
endef
export CHECK_PYTHON

define NAME_MISSING_LIBRARIES
import ctypes, sys
missing = []
for library, package in ("libGL.so.1", "libgl1"), ("libgthread-2.0.so.0", "libglib2.0-0"), ("libxcb.so.1", "libxcb1"):
    try:
        ctypes.CDLL(library)
    except OSError:
        missing.append(package)
if missing:
    sys.exit("OpenCV needs system packages: apt-get install " + " ".join(missing))
import cv2
endef
export NAME_MISSING_LIBRARIES
