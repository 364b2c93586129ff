# make demo       draws with the embedded cascade, then trains it from scratch
#                 (ARGS="--prompt 'a red apple' --minutes 3")
# make test       the test suite (PYTEST_ARGS="-k sampler", WORKERS=8)
# make test-slow  several processes, stopped, killed and resumed; plan with the TPU and GPU
#                 compilers: 1.3 GB to install, a quarter of an hour
# make test-long  larger cases of the slow tests, for changes of what they cover: ten minutes
# make lint       ruff: rules and format (pyproject.toml)
# make parity     comparisons with the reference implementations; installs torch
# make clean      removes $(VENV) and build output
# Each installs its requirements into $(VENV) first. PYTHON is any Python >= 3.11.

PYTHON ?= python3
VENV ?= .venv
ARGS ?=
WORKERS ?= 2
PYTEST_ARGS ?=

RUN = $(VENV)/bin/python
PIP = $(RUN) -m pip --disable-pip-version-check install --quiet

.PHONY: demo test test-slow test-long parity lint clean

demo: $(VENV)/installed
	$(RUN) -m imagen_jax.demo $(ARGS)

test: $(VENV)/installed-test
	$(RUN) -m pytest -q -n $(WORKERS) --dist worksteal $(PYTEST_ARGS)

test-slow: $(VENV)/installed-slow
	$(RUN) -m pytest -q -n $(WORKERS) --dist loadscope -m "slow and not long" --durations=25 \
	    $(PYTEST_ARGS)

test-long: $(VENV)/installed-slow
	$(RUN) -m pytest -q -n $(WORKERS) --dist loadscope -m long --durations=25 $(PYTEST_ARGS)

parity: $(VENV)/installed-parity
	$(RUN) -m pytest -q -m parity $(PYTEST_ARGS)

lint: $(VENV)/linter
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

$(VENV)/linter: setup.py
	@test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	@$(PIP) "$$(sed -n 's/.*"lint": \["\(.*\)"\].*/\1/p' setup.py)"
	@touch $@

$(VENV)/installed: setup.py
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 11) else f"Python {v[0]}.{v[1]} is too old: make $(MAKECMDGOALS) PYTHON=python3.11")'
	@echo "installing imagen_jax into $(VENV) (a minute or two)"
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) --editable ".[eval]"
	@touch $@

$(VENV)/installed-slow: $(VENV)/installed
	@echo "installing what make test-slow needs"
	@$(PIP) --editable ".[test,tpu,gpu-plan,beam,wandb]"
	@touch $@

# torch-fidelity without its requirements: its torchvision would replace the CPU build of torch. The
# tests import only the network and the resize, which need torch alone.
$(VENV)/installed-parity: $(VENV)/installed
	@echo "installing what make parity needs"
	@$(PIP) --editable ".[test,parity]"
	@$(PIP) --no-deps "torch-fidelity==0.4.0"
	@touch $@

$(VENV)/installed-%: $(VENV)/installed
	@echo "installing what make $* needs"
	@$(PIP) --editable ".[test,$*]"
	@touch $@

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache
