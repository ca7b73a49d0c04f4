# make demo   environment, then a short job on digits, which need no download
# make test   environment, then all tests
# make train  the full job, python train_pruning.py, on CIFAR-10
# make lint   ruff
# For a GPU; RUN=python3 takes a Python that has torch instead of a new environment, in every target:
# make gpu-check       whether every technique runs there, and what is slow
# make headline-speed  what bounds training, and its speed
# make headline        the runs of studies/headline.json, five seeds: MINUTES (9) at a time, the same command resumes;
#                      ARM="250 epochs, polynomial" SEED=1 trains that run alone
# make headline-table  the table of the runs that are finished

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
DEMO := runs/demo
READY := $(if $(filter $(VENV)/%,$(RUN)),$(VENV)/ready)
MINUTES ?= 9

.PHONY: demo test train lint gpu-check headline-speed headline headline-table
demo: $(READY)
	@test ! -e $(DEMO) || tr -d ' \n' < $(DEMO)/config.json | grep -q '"dataset":"digits".*"epochs":\[4,2,5\]' || { \
		echo "error: $(DEMO) holds something else than a demo; move it away" >&2; exit 2; }
	rm -rf $(DEMO)
	$(RUN) train_pruning.py --dataset digits --epochs 4 2 5 --mixing none --lr 0.05 --batch-size 32 --out $(DEMO)
	$(RUN) test.py --checkpoint $(DEMO)/model.pt
	$(RUN) profil.py --checkpoint $(DEMO)/model.pt
	$(RUN) report.py $(DEMO) --out $(DEMO)/report

test: $(READY)
	$(RUN) -m pytest -q -n auto --dist worksteal tests

train: $(READY)
	$(RUN) train_pruning.py

gpu-check: $(READY)
	$(RUN) benchmark.py check

headline-speed: $(READY)
	$(RUN) benchmark.py profile --json results/headline_profile.json
	$(RUN) benchmark.py training --images 20000 --convolutions grouped --json results/headline_speed.json

headline: $(READY)
	timeout --foreground --signal=INT $(MINUTES)m $(RUN) study.py studies/headline.json $(if $(ARM),--arms "$(ARM)") \
		$(if $(SEED),--seeds $(SEED)); code=$$?; test $$code != 124 || echo "stopped after $(MINUTES) minutes:" \
		"the same command resumes"; test $$code = 124 || exit $$code

headline-table: $(READY)
	$(RUN) study.py studies/headline.json --finished

lint: $(READY)
	$(RUN) -m ruff check .

$(VENV)/ready: requirements.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "error: Python 3.10 or newer is needed")'
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check --requirement requirements.txt
	touch $@
