# `make` lists what there is to do. All that a fresh machine needs is Python 3.11 or newer, pip and make.

PYTHON ?= python3

SHELL := /bin/bash
BIN := .venv/bin
INSTALLED := .venv/.installed
# torch and torchvision as in constraints.txt, where the exact versions stand
TORCH := $(shell grep -E '^torch(vision)?==' constraints.txt)
MEASURED ?= build/benchmarks
NOTEBOOKS := $(sort $(wildcard notebooks/*.ipynb))
# those whose cells are checked at every change; the others are with the medium tests
FAST_NOTEBOOKS := $(addprefix notebooks/,00_tour.ipynb 10_run.ipynb)
# of a declaration: runs at once, and what Snakemake is told (on a cluster: docs/experiments.md)
CORES ?= all
SNAKEMAKE ?= --cores $(CORES)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help study status estimate report test test-medium test-slow soak lint lab benchmark clean FORCE

help: ## show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' \
		| while IFS=$$'\t' read -r name text; do printf '  make %-12s %s\n' "$$name" "$$text"; done

# $(call experiments,command,name): the command line of docs/experiments.md, with the places given to make
experiments = $(BIN)/python -m tcp_core.study.experiments $(1) "$(2)" $(if $(RUNS),--runs "$(RUNS)") \
	$(if $(EXPERIMENTS),$(if $(DATA),--data "$(DATA)") $(if $(WEIGHTS),--weights "$(WEIGHTS)")) \
	$(if $(filter-out all,$(CORES)),--cores $(CORES))

study: $(if $(EXPERIMENTS),$(INSTALLED),$(if $(DRY),$(INSTALLED),$(NOTEBOOKS:notebooks/%=build/notebooks/%))) ## all notebooks on their defaults and experiments/small.yaml; or one declaration: EXPERIMENTS=name DATA=... [WEIGHTS=... RUNS=... CORES=... DRY=1]
	@$(call experiments,$(if $(DRY),list,study),$(or $(EXPERIMENTS),small)) $(if $(DRY),,--snakemake "$(SNAKEMAKE)")
	@$(if $(EXPERIMENTS)$(DRY),,$(MAKE) --no-print-directory report)
	@$(if $(EXPERIMENTS)$(DRY),,echo "Done. Executed notebooks: build/notebooks/ and build/executed/, their figures and tables: build/runs/")

status: $(INSTALLED) ## how far a declaration is: EXPERIMENTS=name [RUNS=... CORES=...]
	@$(call experiments,status,$(or $(EXPERIMENTS),small))

estimate: $(INSTALLED) ## hours that a declaration takes on this device, from measured steps: EXPERIMENTS=name [DATA=...]
	@$(call experiments,estimate,$(or $(EXPERIMENTS),small))

# the five budgets of one network that the notebook on the controller shows
CONTROLLER ?= results/runs/cifar10-cpu/pretrained
report: $(INSTALLED) ## all tables and figures again from results/runs, into results/tables, figures, docs/results.md and the README; of other runs: RUNS=..., into build/report
	@mkdir -p build/notebooks
	@$(call papermill,90_report) -p runs "$(call absolute,$(or $(RUNS),results/runs))" \
		-p tables "$(CURDIR)/$(if $(RUNS),build/report,results)/tables" -p figures "$(CURDIR)/$(if $(RUNS),build/report/)figures" \
		$(if $(RUNS),,-p page "$(CURDIR)/docs/results.md" -p readme "$(CURDIR)/README.md" -p goals True)
	@$(if $(RUNS),,$(call papermill,40_controller) -p runs "$(call absolute,$(CONTROLLER))" -p network resnet20 -p figures "$(CURDIR)/figures")
	@$(if $(RUNS),,$(BIN)/python -m tcp_core.study.method_plots --runs "$(CONTROLLER)" --figures figures)
	@echo "Done. Tables: $(if $(RUNS),build/report,results)/tables/, figures: $(if $(RUNS),build/report/)figures/, to read: build/notebooks/90_report.ipynb"

# $(call absolute,path): abspath would take a path with spaces for several
absolute = $(if $(filter /%,$(firstword $(1))),$(1),$(CURDIR)/$(1))
# $(call papermill,name): one notebook of the report, executed
papermill = $(BIN)/papermill --kernel python3 --language python --cwd notebooks --no-progress-bar notebooks/$(1).ipynb build/notebooks/$(1).ipynb

# one thread, so that the notebooks' checked outputs do not depend on the machine's cores
test test-medium test-slow soak: export OMP_NUM_THREADS ?= 1

PYTEST := $(BIN)/python -m pytest --numprocesses auto --dist loadfile
NBVAL := --nbval-lax --nbval-current-env

test: $(INSTALLED) ## the fast tests and two notebooks' checked cells: two minutes on two cores
	$(PYTEST) $(NBVAL) tests $(FAST_NOTEBOOKS)

test-medium: $(INSTALLED) ## the tests that take seconds each (whole runs, checkpoints, exports) and the other notebooks; CI runs them too
	$(PYTEST) -m "medium and not slow" tests
	$(PYTEST) $(NBVAL) $(filter-out $(FAST_NOTEBOOKS),$(NOTEBOOKS))

test-slow: $(INSTALLED) ## the tests that take longer (large networks, whole runs)
	$(BIN)/python -m pytest -m slow tests

soak: $(INSTALLED) ## kill a run at twenty random moments and see it end as if it had not been
	$(BIN)/python -m pytest -m soak tests

lint: $(INSTALLED) ## style of code and notebooks
	$(BIN)/ruff check --output-format concise .
	$(BIN)/ruff format --check .

lab: $(INSTALLED) ## open the notebooks in JupyterLab
	$(BIN)/jupyter lab --notebook-dir=notebooks

benchmark: $(INSTALLED) ## measure again what docs/benchmarks.md and docs/scale.md state (about an hour; DATA=folder of images for the input pipeline)
	for network in resnet20 resnet56; do \
		$(BIN)/python benchmarks/training_step.py --network $$network --multiple 1 --out $(MEASURED)/training_step_$$network.json && \
		$(BIN)/python benchmarks/training_step.py --network $$network --multiple 8 --out $(MEASURED)/training_step_$${network}_multiples_of_8.json || exit 1; \
	done
	$(BIN)/python benchmarks/tracing_time.py --out $(MEASURED)/tracing_time.json
	$(BIN)/python benchmarks/input_pipeline.py $(if $(DATA),--data "$(DATA)") --out $(MEASURED)/input_pipeline.json
	$(BIN)/python benchmarks/large_images.py --out $(MEASURED)/large_images.json
	for precision in fp32 bf16; do \
		$(BIN)/python benchmarks/run_cost.py --precision $$precision --threads 1 --out $(MEASURED)/run_cost_$${precision}_1_thread.json && \
		$(BIN)/python benchmarks/run_cost.py --precision $$precision --threads 2 --out $(MEASURED)/run_cost_$${precision}_2_threads.json || exit 1; \
	done
	$(BIN)/python benchmarks/scale.py --out $(MEASURED)/scale.json
	$(BIN)/python benchmarks/zoo_exactness.py --out $(MEASURED)/zoo_exactness.csv
	$(BIN)/python benchmarks/zoo_exactness.py --timm --subsets 5 --out $(MEASURED)/zoo_exactness_timm.csv

clean: ## remove what the targets made, but for .venv
	rm -rf build dist .snakemake .pytest_cache .ruff_cache .hypothesis *.egg-info
	find tcp_core tests notebooks benchmarks -name __pycache__ -o -name .ipynb_checkpoints 2>/dev/null | xargs rm -rf

# One notebook, from start to end. One that declares the parameter `out` writes its figures and tables
# into build/runs/<its name>; DATA and EPOCHS go to those that declare `data` and `epochs` (papermill
# would merely warn about parameters that a notebook does not have). A failed one stays as .part.ipynb.
parameter = $(if $(2),$(shell grep -qE '^ *"$(1): ' $< && echo '--parameters $(1) "$(2)"'))
build/notebooks/%.ipynb: notebooks/%.ipynb $(INSTALLED) FORCE
	@echo "== $<"
	@rm -rf build/runs/$* && mkdir -p $(@D)
	@$(BIN)/papermill --kernel python3 --language python --cwd notebooks --no-progress-bar --log-output \
		$(call parameter,out,$(CURDIR)/build/runs/$*) $(call parameter,data,$(if $(wildcard $(DATA)),$(call absolute,$(DATA)),$(DATA))) \
		$(call parameter,epochs,$(EPOCHS)) $< $(@:.ipynb=.part.ipynb)
	@mv $(@:.ipynb=.part.ipynb) $@

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo \
		"Python 3.11 or newer is needed, and '$(PYTHON)' is not. Name one: make PYTHON=/path/to/python3.11 ..." >&2; exit 1; }
	@# some systems ship Python without ensurepip: then the system's pip puts pip into the environment
	$(PYTHON) -m venv .venv || { $(PYTHON) -m venv --without-pip .venv && \
		$(PYTHON) -m pip --python .venv/bin/python install pip; }
	$(BIN)/python -m pip install $(TORCH)
	$(BIN)/python -m pip install --constraint constraints.txt --editable '.[deploy,study,test]'
	@touch $@
