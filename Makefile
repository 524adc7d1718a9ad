# Two commands for a fresh machine (Python 3.11+ and make): `make demo` and `make test`.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# torch is named first so that one resolve settles it; constraints.txt pins all that follows.
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet --no-input
STAMP := $(VENV)/.installed

export RAY_AUTH_MODE ?= disabled

STYLE := import_cycles prose docstrings walks

.PHONY: demo test test-services check style bench format clean

demo: $(STAMP)
	$(BIN)/svfap demo --out svfap-demo

test: $(STAMP)
	$(BIN)/pytest -n 2 -m "not services and not gpu and not slow"

test-services: $(STAMP)
	tests/services/install.sh
	$(BIN)/pytest -m "(services or slow) and not gpu"

check: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/lint-imports

# Figures of the rules that ruff and lint-imports cannot check: all are printed, then it fails if one did.
style: $(STAMP)
	@status=0; for name in $(STYLE); do $(BIN)/python tests/checks/$$name.py || status=1; done; exit $$status

bench: $(STAMP)
	$(BIN)/svfap bench model --size base --batch-size 8 --dtype float32

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

$(STAMP): pyproject.toml constraints.txt
	@echo "Setting up $(VENV) (about two minutes the first time) ..."
	$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	$(PIP) install --upgrade -c constraints.txt pip
	$(PIP) install -c constraints.txt torch==2.13.0 -e '.[all,dev]'
	touch $(STAMP)

clean:
	rm -rf $(VENV) svfap-demo
