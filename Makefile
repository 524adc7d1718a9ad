# Two commands for a fresh machine (Python 3.11+ and make): `make demo` and `make test`.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# torch is named first so that one resolve settles it; constraints.txt pins all that follows.
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input
STAMP := $(VENV)/.installed
# Tools of `make release`, `make images` and `make audit`, separate from the test environment.
TOOLS := .venv-release
TOOLS_STAMP := $(TOOLS)/.installed

export RAY_AUTH_MODE ?= disabled


.PHONY: demo test test-services test-gpu chaos check docs notebooks walks bench bench-before bench-rgw bench-peers format release images audit clean

demo: $(STAMP)
	$(BIN)/svfap demo --out svfap-demo

test: $(STAMP)
	$(BIN)/pytest -n 2 -m "not services and not gpu and not slow"

test-services: $(STAMP)
	tests/services/install.sh
	$(BIN)/pytest -n 2 --dist loadfile -m "slow and not (services or sequential or gpu)"
	$(BIN)/pytest -m "(services or sequential) and not gpu"

# Faults against training on real services: all, or some by name (CHAOS="rank-killed disk-full"), or
# many kills in one run (CHAOS="--kills 20"), or goodput (CHAOS="--goodput 20", minutes).
chaos: $(STAMP)
	tests/services/install.sh
	$(BIN)/python tests/chaos/chaos.py $(CHAOS)

# On the machine's own Python, which needs torch with CUDA, DALI, PyAV, DeepSpeed and pytest, no Ray.
test-gpu:
	$(PYTHON) -m pytest -m gpu -o addopts="--strict-markers -p no:cacheprovider" $(GPU_TESTS)

check: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/lint-imports
	$(BIN)/python tests/checks/import_cycles.py
	$(BIN)/python tests/checks/docstrings.py
	$(BIN)/python tests/checks/prose.py

# The documentation site, strictly: a broken link or name is an error.
docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# Run the tutorials and store their outputs; a second pass joins the pieces of each stream.
notebooks: $(STAMP)
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m nbconvert --execute --inplace --to notebook \
	  --ExecutePreprocessor.record_timing=False docs/tutorials/*.ipynb
	$(BIN)/python -m nbconvert --inplace --to notebook --CoalesceStreamsPreprocessor.enabled=True docs/tutorials/*.ipynb

# How many files a reader opens to follow a clip, a labeled video and a checkpoint (minutes: it runs them).
walks: $(STAMP)
	$(BIN)/python tests/checks/walks.py

bench: $(STAMP)
	$(BIN)/svfap bench model --size base --batch-size 8 --dtype float32
	$(BIN)/svfap bench step

# The same figures of an earlier commit and of this one, measured in turns.
BEFORE ?= f84d50d
bench-before: $(STAMP)
	test -d $(VENV)/before || git worktree add --detach $(VENV)/before $(BEFORE)
	$(BIN)/python tests/benchmarks/before.py $(VENV)/before
	$(BIN)/svfap bench model --size base --batch-size 8 --dtype float32 --against $(VENV)/before

# Reading from a real S3 store, which `make test-services` installs.
bench-rgw: $(STAMP)
	$(BIN)/python tests/benchmarks/rgw.py data.colors=device

# Other projects' loaders on the same clips, each in an environment of its own; needs FFmpeg's libraries.
bench-peers: $(STAMP)
	$(BIN)/python tests/benchmarks/peers/compare.py

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# `make release VERSION=0.2.0`: build the packages of a version in dist/ with a bill of materials and checksums, and test them in a
# fresh environment. DRY_RUN=1 leaves version and changelog unchanged. Nothing is committed, tagged or uploaded.
release: $(TOOLS_STAMP)
	$(TOOLS)/bin/python tests/release/make_release.py $(if $(DRY_RUN),--dry-run) $(VERSION)

# Lint the container files, build the image for sharding, and run it; needs Docker. The image for training has gigabytes of CUDA.
images: $(TOOLS_STAMP)
	$(TOOLS)/bin/hadolint launch/docker/*.Dockerfile
	docker build -f launch/docker/shard.Dockerfile -t svfap-shard .
	docker run --rm svfap-shard --version

# Check the pinned versions for known vulnerabilities by PyPI's JSON API; a package that it does not find is an error.
audit: $(TOOLS_STAMP)
	$(TOOLS)/bin/pip-audit --requirement constraints.txt --no-deps --disable-pip --strict --progress-spinner off

$(STAMP): pyproject.toml constraints.txt
	@echo "Setting up $(VENV) (about two minutes the first time) ..."
	$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	$(PIP) install --quiet --upgrade -c constraints.txt pip
	$(PIP) install -c constraints.txt torch==2.13.0 -e '.[all,dev]'
	touch $(STAMP)

$(TOOLS_STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv --clear $(TOOLS)
	$(TOOLS)/bin/python -m pip --disable-pip-version-check --quiet install --upgrade pip
	$(TOOLS)/bin/python -m pip --quiet --no-input install -c constraints.txt --group release
	touch $(TOOLS_STAMP)

clean:
	rm -rf $(VENV) $(TOOLS) dist svfap-demo chaos-results site
