# make build | demo | test | check | bench; everything lives in .venv, nothing is installed elsewhere.
PYTHON ?= python3
# For example PIP_ARGS="--index-url …" to choose a package index.
PIP_ARGS ?=
PORT ?= 8000
BIN := .venv/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check --no-compile $(PIP_ARGS)
NATIVE := pyproject.toml CMakeLists.txt $(wildcard trie/CMakeLists.txt trie/csrc/* decoder/CMakeLists.txt decoder/csrc/*)
BUILT := .venv/.built
DEV := .venv/.dev

.PHONY: build demo test check bench study sanitize clean

build: $(BUILT)

$(BUILT): $(NATIVE)
	@echo "setting up .venv: the first time takes about two minutes"
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) torch==2.13.0
	$(PIP) --editable ".[cpu,train,export,llm]"
	@touch $@

$(DEV): $(BUILT)
	$(PIP) --editable ".[cpu,train,export,llm,dev]"
	@# Only its tritonserver is used; its Python part, which would ask for NumPy 1, is not.
	$(PIP) --no-deps nvidia-pytriton==0.7.0 || echo "no nvidia-pytriton here: the tests on Triton will be skipped"
	@touch $@

demo/data/items.parquet: | $(BUILT)
	$(BIN)/onesearch-simulate demo/data

demo/bundle/manifest.json: | demo/data/items.parquet
	$(BIN)/onesearch-train recipes/demo.toml --data demo/data --out demo/bundle --work demo/work

demo/bundle/graphs/stamp.json: | demo/bundle/manifest.json
	$(BIN)/onesearch-export demo/bundle --target onnx

demo: | $(BUILT) demo/bundle/graphs/stamp.json
	ONESEARCH_STATE=sqlite:demo/state.sqlite3 ONESEARCH_CATALOG=demo/catalog $(BIN)/onesearch-serve demo/bundle --port $(PORT)

test: $(DEV)
	$(BIN)/python -m pytest

check: $(DEV)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	for package in trie decoder; do \
	  $(BIN)/python -m nanobind.stubgen -q -m $$package._native -o .venv/_native.pyi && \
	  diff -u $$package/_native.pyi .venv/_native.pyi || exit 1; done

# Hours; stopped at any moment it goes on where it was, and keeps what is in benchmarks/studies.
study: $(DEV)
	$(BIN)/python -m benchmarks.study

bench: $(DEV)
	$(BIN)/python -m benchmarks.trie
	$(BIN)/python -m benchmarks.gateway

# ASan and UBSan over hostile files, builds, masks and searches, then over the Python tests of both native modules, on
# every instruction set of this machine. Four minutes.
SANITIZE := -g -fsanitize=address,undefined -fno-sanitize-recover=all
sanitize: $(DEV)
	@mkdir -p build
	$(CXX) -std=gnu++20 -O1 $(SANITIZE) trie/csrc/fuzz.cpp -o build/fuzz
	build/fuzz 3000
	$(PIP) --no-deps --upgrade --target build/sanitized --config-settings=build-dir=build/sanitizing \
	  --config-settings=install.strip=false --config-settings=cmake.define.CMAKE_CXX_FLAGS="$(SANITIZE)" .
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so.6)" \
	ASAN_OPTIONS=detect_leaks=0 OMP_NUM_THREADS=1 $(BIN)/python tests/sanitized.py

clean:
	rm -rf .venv build demo runs
