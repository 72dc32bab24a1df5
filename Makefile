# One environment in .venv, set up on first use and left alone after that.
#   make run [PAPER=slug] [PROFILE=smoke|cpu|full] [ARGS="-p name=value"]

PAPER   ?= pcb_merging
PROFILE ?= cpu
ARGS    ?=
VENV    := .venv
BIN     := $(VENV)/bin
READY   := $(VENV)/.ready
PYTHON  ?= $(shell for p in python3 python3.11 python3.12 python3.13 python3.10; do \
             $$p -c 'import sys; sys.exit(not (3,10) <= sys.version_info[:2] <= (3,13))' 2>/dev/null && echo $$p && break; done)

.DEFAULT_GOAL := run
.PHONY: run test lab docs bench check verify help clean

run: $(READY)  ## reproduce one paper and print its claims with verdicts
	@$(BIN)/researchkit run $(PAPER) --profile $(PROFILE) $(ARGS)

test: $(READY)  ## run all tests
	@$(BIN)/python -m pytest $(ARGS)

lab: $(READY)  ## open the notebooks in JupyterLab
	@$(BIN)/jupyter lab --notebook-dir=nbs $(ARGS)

docs: $(READY)  ## build the site into _docs
	@$(BIN)/researchkit docs $(ARGS)

bench: $(READY)  ## measure the figures of nbs/benchmarks.ipynb and write them into it
	@$(BIN)/researchkit publish nbs/benchmarks.ipynb $(ARGS)

check: $(READY)  ## check that published outputs are fresh and complete
	@$(BIN)/researchkit check

verify: $(READY)  ## run every paper again and compare with what is published
	@$(BIN)/researchkit verify all $(ARGS)

help:  ## list these targets
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 10

clean:  ## remove the environment, runs and built site
	rm -rf $(VENV) runs _docs _proc

$(READY): constraints.txt settings.ini setup.py
	@test -n "$(PYTHON)" || { echo "Python 3.10 to 3.13 is needed; name one with make PYTHON=..."; exit 1; }
	@echo "setting up $(VENV) with $$($(PYTHON) --version), once; this takes a few minutes"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[all,dev]'
	@touch $@
