# make demo    prepare a corpus, train on it, sample, write a report
# make test    the whole test suite
# make lint    ruff, mypy and the import contracts
# make bench   the operators, generation and training against what they replace, on this machine
# make clean   remove what the other targets made
#
# The first target that runs makes .venv and installs into it. Variables:
#   PYTHON=python3.12        the interpreter that .venv is made with (>= 3.11)
#   TORCH="torch==2.13.0"    the torch requirement
#   TORCH_INDEX_URL=...      the package index that torch comes from. Empty: pip's own setting, which on some machines
#                            gives the CUDA build (2 GB) where no GPU is; name PyTorch's index of CPU wheels to avoid it
#   JOBS=2                   test processes

PYTHON ?= python3
TORCH ?= torch==2.13.0
TORCH_INDEX_URL ?=
JOBS ?= 2

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP := $(BIN)/python -m pip --disable-pip-version-check -qq

.PHONY: demo test lint bench clean
.DELETE_ON_ERROR:

# The demo's folder is its own: it starts afresh each time. The time limit is for machines slower than two current cores.
demo: $(STAMP)
	rm -rf out/demo
	$(BIN)/megactx prepare --source python-stdlib --contexts kind depth column --out_dir out/demo/data
	$(BIN)/megactx train --dataset out/demo/data --out_dir out/demo/run --n_layer 4 --n_head 4 --n_embd 128 \
	  --block_size 256 --batch_size 16 --optimizer muon --max_iters 950 --max_minutes 5.5 --eval_interval 190 --eval_iters 10
	$(BIN)/megactx sample --out_dir out/demo/run --start "def read_" --max_new_tokens 400 --temperature 0.7
	@echo "report: out/demo/run/report.html"

# One thread for each process: two processes of two threads on two cores would wait for each other.
test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/pytest -n $(JOBS) --dist worksteal

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(STAMP)
	$(BIN)/python bench/rotary.py
	$(BIN)/python bench/attention.py
	$(BIN)/python bench/mtp.py
	$(BIN)/python bench/mtp_step.py
	$(BIN)/python bench/sampling_op.py
	$(BIN)/python bench/sampling.py
	$(BIN)/python bench/training.py

$(STAMP): setup.py pyproject.toml $(wildcard csrc/*)
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("megactx needs Python >= 3.11; $(PYTHON) is %d.%d: set PYTHON=" % sys.version_info[:2])'
	@test -x $(BIN)/python || { echo "making $(VENV) with $$($(PYTHON) --version)"; $(PYTHON) -m venv $(VENV); }
	@test -e /dev/nvidia0 || test -n "$(TORCH_INDEX_URL)" || echo "no GPU here: TORCH_INDEX_URL can name an index of CPU builds"
	@echo "installing $(TORCH) (once; minutes on a slow line)"
	@$(PIP) install "setuptools>=77" wheel
	@$(PIP) install $(if $(TORCH_INDEX_URL),--index-url $(TORCH_INDEX_URL)) "$(TORCH)"
	@echo "building the C++ extension and installing megactx"
	@$(PIP) install --no-build-isolation --editable ".[dev]"
	@ls kernels/_C*.so >/dev/null 2>&1 || echo "no C++ extension: PyTorch code runs instead (MEGACTX_BUILD_CPP=1 shows why)"
	@touch $@

clean:
	rm -rf build dist out *.egg-info .benchmarks .grimp_cache .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	rm -f kernels/_C*.so
	rm -rf $(VENV)
