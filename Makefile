# Everything a newcomer types. Needs python3 (3.11 or newer), make, and on first use a way to install packages:
# Python ones into .venv, Debian ones with apt-get where this runs as root.
#
#   make demo     move a running process between two daemons on this machine, there and back
#   make test     the test suite, on all processors   make test ARGS="-k qmp -x"
#   make bench    side-by-side figures, beside the committed ones   make bench ARGS="--quick bulk"
#   make nemesis  faults at random phases, and a checker behind each: make nemesis ROUNDS=300 SEED=7
#   make lint     the checks of the sources only
#   make deb      a Debian package, in dist/          make deb ARGS="--revision 2"
#   make clean    remove what the targets above made

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
ARGS ?=
ROUNDS ?= 100
SEED ?= 1

# What the tests run besides Python, as command:Debian-package.
TOOLS := qemu-system-x86_64:qemu-system-x86 qemu-img:qemu-utils gcc:gcc ip:iproute2 systemd-analyze:systemd \
	systemd-nspawn:systemd-container nsenter:util-linux dpkg-deb:dpkg /usr/bin/python3:python3
# Tools of the system administrator are not in everybody's PATH.
export PATH := $(PATH):/usr/sbin:/sbin

# Whatever the environment says: a daemon that compiles all its modules takes twice as long to start, and the tests
# start hundreds of them.
override export PYTHONDONTWRITEBYTECODE :=

.PHONY: help venv demo test bench nemesis lint deb clean tools

help:
	@sed -n 's/^#   //p' Makefile

venv: $(INSTALLED)

# The stamp is written last, so that an interrupted installation is done again.
$(INSTALLED): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "migrated needs Python 3.11 or newer; say which with: make PYTHON=python3.11" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); $(call apt_get,python3-venv) && $(PYTHON) -m venv $(VENV); }
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $@

demo: venv
	$(BIN)/migratectl demo $(ARGS)

test: venv tools
	$(BIN)/python -m pytest --numprocesses=auto --dist=loadfile $(ARGS)

bench: venv tools
	$(BIN)/python -m tests.bench $(ARGS)

nemesis: venv tools
	MIGRATED_NEMESIS_ROUNDS=$(ROUNDS) MIGRATED_NEMESIS_SEED=$(SEED) $(BIN)/python -m pytest -s $(ARGS) tests/faults/test_nemesis.py

lint: venv
	$(BIN)/python -m pytest tests/house $(ARGS)

deb: venv
	PIP=$(BIN)/pip packaging/build-deb $(ARGS)

# Installs what is missing where that is possible; elsewhere the tests that need it say so and are skipped.
tools:
	@missing=; \
	for tool in $(TOOLS); do \
		command -v "$${tool%%:*}" >/dev/null 2>&1 || missing="$$missing $${tool#*:}"; \
	done; \
	test -e /usr/include/stdio.h || missing="$$missing libc6-dev"; \
	if [ -z "$$missing" ]; then exit 0; fi; \
	$(call apt_get,$$missing) || echo "tests that need these Debian packages are skipped:$$missing" >&2

# Fails, and says what is needed, where Debian packages cannot be installed.
define apt_get
{ if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; then \
	apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $(1); \
else echo "missing Debian packages: $(1)" >&2; false; fi; }
endef

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	rm -f .coverage* bench-*.json
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
