# Everything runs in an environment of its own, .venv; the commands below set it up by themselves.
#
#   make demo    install, then run examples/quickstart.py
#   make test    install, then run the whole test suite
#
#   make test-ptx       run the kernels as compiled for a GPU, without one; needs gcc
#   make test-nnunet    train with nnU-Net, in an environment of its own, .venv-nnunet
#   make test-panoptica    compare the stored answers of panoptica with its own, in .venv-panoptica
#   make test-stardist     the same of StarDist, in .venv-stardist
#   make test-wheel     build a wheel from the commit or tag TAG, and run the whole test suite on it, in build/wheel
#   make docs           the site of all pages, build/docs/index.html
#
# TORCH chooses the torch requirement, for example: make test TORCH=torch==2.6.0

TORCH ?= torch==2.13.0
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
NNUNET_VENV ?= .venv-nnunet
NNUNET_BIN := $(NNUNET_VENV)/bin
PANOPTICA_VENV ?= .venv-panoptica
STARDIST_VENV ?= .venv-stardist
TAG ?= HEAD

# Packages are compiled when they are first imported (pip's --no-compile), which must then be kept.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test test-ptx test-nnunet nnunet-2d nnunet-3d test-panoptica test-stardist test-wheel docs lint clean

demo: $(VENV)/examples
	$(BIN)/python examples/quickstart.py

# One process a core, so one thread a process: more of them only wait for each other.
test test-ptx test-nnunet test-wheel: export OMP_NUM_THREADS = 1

test: $(VENV)/test
	$(BIN)/python -m pytest -n auto --dist worksteal

# A process of its own: in one, kernels are either compiled or interpreted, as the other tests have them.
test-ptx: $(VENV)/test
	$(BIN)/python -m pytest -n auto --dist worksteal --confcutdir=tests/ptx tests/ptx

test-nnunet: $(NNUNET_VENV)/nnunet
	$(MAKE) --jobs=2 --output-sync nnunet-2d nnunet-3d

nnunet-2d nnunet-3d:
	$(NNUNET_BIN)/python -m pytest --noconftest tests/nnunet_training.py -k $(@:nnunet-%=%)

test-panoptica:
	test -x $(PANOPTICA_VENV)/bin/python || $(PYTHON) -m venv $(PANOPTICA_VENV)
	$(PANOPTICA_VENV)/bin/python -m pip install --quiet --no-compile panoptica==2.1.7
	$(PANOPTICA_VENV)/bin/python tests/panoptica_answers.py

test-stardist:
	test -x $(STARDIST_VENV)/bin/python || $(PYTHON) -m venv $(STARDIST_VENV)
	$(STARDIST_VENV)/bin/python -m pip install --quiet --no-compile stardist==0.9.2
	$(STARDIST_VENV)/bin/python tests/stardist_answers.py

# The sources of the package are gone before the tests run, so they can only import what was installed.
test-wheel: $(VENV)/dev
	rm -rf build/wheel
	mkdir -p build/wheel/source
	git archive $(TAG) | tar -x -C build/wheel/source
	$(BIN)/python -m build --quiet --wheel --outdir build/wheel build/wheel/source
	rm -r build/wheel/source/triton_instance_loss build/wheel/source/kernels
	$(PYTHON) -m venv build/wheel/venv
	build/wheel/venv/bin/python -m pip install --quiet --no-compile "$(TORCH)"
	build/wheel/venv/bin/python -m pip install --quiet "$$(echo build/wheel/*.whl)[test]" "$(TORCH)"
	cd build/wheel/source && ../venv/bin/python -m pytest -n auto

docs: $(VENV)/dev
	$(BIN)/python -m sphinx -q -W --keep-going -b html docs build/docs

lint: $(VENV)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# torch goes first: anything else that asks for it then finds the one that was chosen.
$(VENV)/examples $(VENV)/test $(VENV)/dev: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --no-compile "$(TORCH)"
	$(BIN)/python -m pip install --quiet --no-compile --editable ".[$(@F)]" "$(TORCH)"
	touch $@

# nnU-Net imports torchvision, through timm, and needs none of it. PyPI has only CUDA builds of torchvision, whose operators
# a CPU build of torch cannot load; 0.16 is the last version that can be imported without them (Python 3.11 at most).
$(NNUNET_VENV)/nnunet: pyproject.toml
	test -x $(NNUNET_BIN)/python || $(PYTHON) -m venv $(NNUNET_VENV)
	$(NNUNET_BIN)/python -m pip install --quiet --no-compile "$(TORCH)"
	$(NNUNET_BIN)/python -m pip install --quiet --no-compile --editable ".[nnunet]" "$(TORCH)" pytest
	$(NNUNET_BIN)/python -c "import torchvision" 2>/dev/null || \
		$(NNUNET_BIN)/python -m pip install --quiet --no-compile --no-deps torchvision==0.16.2
	touch $@

clean:
	rm -rf $(VENV) $(NNUNET_VENV) $(PANOPTICA_VENV) $(STARDIST_VENV) build dist *.egg-info
