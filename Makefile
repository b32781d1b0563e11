# Everything runs in .venv, which is created when there is none and updated when pyproject.toml changes.
.PHONY: demo test lint check audit unreached soak clean
PYTHON ?= python3
HOURS ?= 0.05

.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet --editable '.[dev]'
	touch $@

# Only what the demo needs. Python compiles the modules it imports; pip would compile all of torch.
.venv/for-demo: pyproject.toml
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet --no-compile --editable '.[map]'
	touch $@

demo: .venv/for-demo  ## curate, pretrain, distil and probe on real images (7 to 10 minutes on two cores)
	PATH="$(CURDIR)/.venv/bin:$$PATH" $(MAKE) --no-print-directory -C examples

test: .venv/installed  ## the fast tests; `.venv/bin/pytest -m slow` and `-m gpu` run the others
	.venv/bin/pytest -q -n auto --dist worksteal

soak: .venv/installed  ## kill commands at random moments while another process reads; HOURS=1 for an hour
	.venv/bin/python tests/soak.py --hours $(HOURS)

lint: .venv/installed  ## ruff, formatting, types
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

check: lint test

audit: .venv/installed  ## known vulnerabilities of what is installed; asks pypi.org
	.venv/bin/pip install --quiet --upgrade pip
	.venv/bin/pip-audit --skip-editable

unreached: .venv/installed  ## error lines that no fast test reaches (seven minutes)
	.venv/bin/pytest -q -n auto --dist worksteal --ignore tests/test_killed_anywhere.py --cov --cov-report=
	.venv/bin/python tests/unreached.py

clean:
	rm -rf .venv build dist *.egg-info examples/out
