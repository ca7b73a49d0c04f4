# make demo   environment, then the whole job on a data set that needs no download
# make test   environment, then all tests
# make train  the full job on CIFAR-10: 100 + 25 + 125 epochs
# make headline  what bounds training, its speed, the full protocol of five seeds and a dense network: for a GPU
# make lint   ruff

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
DEMO := runs/demo

.PHONY: demo test train headline lint
demo: $(VENV)/ready
	rm -rf $(DEMO)
	$(RUN) train_pruning.py --dataset digits --epochs 4 2 5 --mixing none --lr 0.05 --batch-size 32 --out $(DEMO)
	$(RUN) test.py --checkpoint $(DEMO)/model.pt
	$(RUN) profil.py --checkpoint $(DEMO)/model.pt
	$(RUN) report.py $(DEMO) --out $(DEMO)/report

test: $(VENV)/ready
	$(RUN) -m pytest -q tests

train: $(VENV)/ready
	$(RUN) train_pruning.py

headline: $(VENV)/ready
	$(RUN) benchmark.py profile --json results/headline_profile.json
	$(RUN) benchmark.py training --images 20000 --convolutions grouped --json results/headline_speed.json
	$(RUN) study.py studies/headline.json

lint: $(VENV)/ready
	$(RUN) -m ruff check .

$(VENV)/ready: requirements.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "error: Python 3.10 or newer is needed")'
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check --requirement requirements.txt
	touch $@
