# Two commands do everything, set-up included: make demo, make test.

PYTHON ?= python3
RUN := .venv/bin/python
PROMPT := Python

.PHONY: demo test course lessons mutants sizes

# Train a tiny GPT on Python's own documentation, then let it write with and without the cache.
# Run again, it finds the trained model and goes on to the writing.
demo: .venv/ready
	$(RUN) train.py configs/gpt-tiny.toml --train.resume=true
	$(RUN) bench.py compare --model out/gpt-tiny --prompt "$(PROMPT)" --max-new-tokens 60

test: .venv/ready
	OMP_NUM_THREADS=1 $(RUN) -m pytest -q -n 2

# The lessons, in a browser, ready to run.
course: .venv/course
	.venv/bin/jupyter lab notebooks

# All lessons from top to bottom, headless, their exercises not filled in.
lessons: .venv/ready
	$(RUN) notebooks/course/build.py

# Break the code on purpose, one bug at a time, and see that the tests notice.
mutants: .venv/ready
	$(RUN) tests/mutants.py

# How long files and functions are, beside what they should be: to be read, never a reason to fail.
sizes: .venv/ready
	$(RUN) tests/sizes.py

.venv/ready: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

.venv/course: .venv/ready
	$(RUN) -m pip install --quiet --disable-pip-version-check jupyterlab
	@touch $@
