# `make demo` and `make test` need Python, make and a C++ compiler; everything else goes into an environment of their own.

PYTHON ?= python3
# Pinned: a bare `torch` may bring gigabytes of CUDA libraries. `make TORCH=torch==2.11.0 test` tries another.
TORCH ?= torch==2.13.0
# A directory of data to train on (and length files beside it); synthetic clicks where empty.
DATA ?=
# The git ref that `make bench-compare` holds this tree against.
REF ?=
# Further arguments of pytest, demo or bench: `make test ARGS='-k jagged'`.
ARGS ?=

BIN := .venv/bin
READY := .venv/ready
WHEEL := build/wheel
DOCS_BIN := build/docs/venv/bin
WIDE := $(CURDIR)/build/wide
WHEEL_BIN := $(CURDIR)/$(WHEEL)/venv/bin
NATIVE := $(shell find csrc tests/emulated -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' -o -name '*.inl')
TORCHREC := tests/requirements-torchrec.txt
# The tools that the native module is built with, as pyproject.toml lists them.
BUILD_TOOLS := $(shell sed -n 's/^requires = \[\(.*\)\]$$/\1/p' pyproject.toml | tr -d ,)
# Modules are compiled when they are first imported, and kept; of the thousands that are not, none is.
unexport PYTHONDONTWRITEBYTECODE
INSTALL := -m pip install --quiet --disable-pip-version-check --no-compile
IN_ENVIRONMENT := PATH="$(CURDIR)/$(BIN):$$PATH"
BUILT_FROM := pyproject.toml setup.py $(TORCHREC) $(shell find CMakeLists.txt csrc cmake -type f)
data_option := $(if $(DATA),--data $(DATA))

# Test processes at once, one for each core; an idle one takes tests from another, since a test may take half a minute.
# Threads that wait give their core away: OpenMP's would spin for it.
WORKERS ?= auto
XDIST := -n $(WORKERS) --maxprocesses 8 --dist worksteal
PYTEST = OMP_WAIT_POLICY=passive $(CURDIR)/$(BIN)/python -m pytest $(XDIST)

# The Python that `make gpu-kit` makes its kit for and with: the GPU machine's minor version, torch and Triton.
KIT_PYTHON ?= $(CURDIR)/build/target/venv/bin/python
# The versions of the first machine with a GPU, in an environment of their own: `make target-env TARGET_PYTHON=path`.
TARGET_PYTHON ?= $(shell python3.12 -c 'import sys; print(sys.executable)' 2> /dev/null \
    || ls -d "$${PYENV_ROOT:-$$HOME/.pyenv}"/versions/3.12*/bin/python 2> /dev/null | tail -n 1)
TARGET_VERSIONS ?= torch==2.11.0 triton==3.6.0
TARGET := $(CURDIR)/build/target
TARGET_READY := build/target/ready
TARGET_BIN := $(TARGET)/venv/bin
TARGET_PYTEST = OMP_WAIT_POLICY=passive $(TARGET_BIN)/python -m pytest $(XDIST)
# Tests of the Python side of the GPU backends and of the native module.
TARGET_TESTS := tests/ops/test_any_rows.py tests/ops/test_autograd.py tests/ops/test_backend.py \
    tests/gpu/test_cuda_resources.py tests/ops/test_errors.py tests/gpu/test_gpu_commands.py tests/ops/test_meta.py \
    tests/cpu/test_native.py tests/cpu/test_native_arguments.py tests/ops/test_option_kinds.py \
    tests/ops/test_registration.py tests/gpu/test_tf32_switch.py tests/ops/test_traced_gradients.py
FAKE_GPU := INTERFORMER_FAKE_GPU=1 TRITON_DEFAULT_FP_FUSION=1

# One in so many entries of the table of Triton kernels is compiled by `make resources`.
NTH ?= 1
# Random calls of each kind that `make fuzz` makes.
EXAMPLES ?= 10000
# And of those of the emulated CUDA and interpreted Triton kernels, in each dtype.
SLOW_EXAMPLES ?= 300
FUZZ = $(BIN)/python -m pytest --timeout 0 --hypothesis-profile fuzz --hypothesis-show-statistics

.PHONY: help demo test triton-test cuda-test target-env target-test target-native-test target-resources resources \
        triton-resources predictions gpu-report gpu-kit gpu-rehearsal fuzz nightly sanitize lint wheel-test wide-test bench \
        bench-model bench-rows bench-options bench-candidates bench-requests bench-compare instruction-counts torch-matrix docs clean

help:
	@echo "make demo [DATA=path]   what is here, is it right, how fast is it, InterFormer on clicks: demo-out/"
	@echo "make test               all tests"
	@echo "make triton-test        the Triton kernels on the CPU, in Triton's interpreter"
	@echo "make cuda-test          the CUDA kernels on the CPU, in an emulation, and under AddressSanitizer"
	@echo "make target-test        Triton's own launch path without a GPU, on the newest Triton and on 3.6"
	@echo "make target-native-test the Python side of the GPU backends on the CUDA build of torch 2.11, on stubs of CUDA"
	@echo "make target-resources   make resources for sm_90 on Triton 3.6"
	@echo "make resources          registers, spills and shared memory of every GPU kernel on every device, without one"
	@echo "make predictions        what those kernels would take on an H200 at the planned shapes: predicted, unmeasured"
	@echo "make gpu-report         on a machine with a GPU: is it right, how fast is it, in minutes; bench/results/<gpu>.md"
	@echo "make gpu-kit            what the report would spend minutes on there, made here to take along: build/gpu-kit"
	@echo "make gpu-rehearsal      the report here, without a GPU, with steps that crash, hang and print garbage"
	@echo "make fuzz               10 000 random calls of the CPU kernels, as many with a bad value or broken offsets;"
	@echo "                        fewer of the CUDA kernels, emulated, and of the Triton kernels, interpreted"
	@echo "make nightly            all tests with all cases, dtypes and draws, all resources, and make fuzz: hours"
	@echo "make sanitize           the CPU kernels' tests and a short fuzz under AddressSanitizer and UBSan"
	@echo "make lint               ruff, mypy, clang-format"
	@echo "make wheel-test         builds the wheel and tries it in a bare environment, from another directory"
	@echo "make wide-test          tests the kernels for AVX-512 BF16 on a machine with AVX2"
	@echo "make bench [DATA=path]  every op against its peers on all named shapes: bench/out/report.md"
	@echo "make bench-model        InterFormer against the same model on padded rows, training and inference: bench/out/model.md"
	@echo "make bench-options      each option of attention against the plain call, and peers: bench/out/options.md"
	@echo "make bench-candidates   candidates that share their request's keys, against peers: bench/out/candidates.md"
	@echo "make bench-requests     a model that reads requests once, and a server that keeps users: bench/out/requests.md"
	@echo "make bench-rows         lines that memory or short rows bound, as shares of the machine's rates: bench/out/rows.md"
	@echo "make bench-compare REF=<git ref>  is this tree slower than another, by interleaved runs: bench/out/compare.md"
	@echo "make instruction-counts  do small calls take more instructions than recorded, by valgrind, on a busy machine too"
	@echo "make docs               the documentation as a site: build/docs/site/index.html"
	@echo "make torch-matrix       one wheel under several versions of torch (downloads them)"
	@echo "make clean              removes the environment and all that was built"

# The environment, made again when what the native module is built from has changed. It is built without isolation, so that
# wheel-test and wide-test find its objects and compile only what differs. TorchRec may be missing: its tests skip.
$(READY): $(BUILT_FROM)
	$(PYTHON) -m venv .venv
	$(BIN)/python $(INSTALL) $(TORCH)
	$(BIN)/python $(INSTALL) $(BUILD_TOOLS)
	$(IN_ENVIRONMENT) $(BIN)/python $(INSTALL) --no-build-isolation --editable '.[dev]'
	-$(BIN)/python $(INSTALL) --no-deps --requirement $(TORCHREC)
	touch $@

demo: $(READY)
	$(BIN)/interformer-kernels demo $(data_option) $(ARGS)

test: $(READY)
	$(PYTEST) $(ARGS)

# In processes of their own: Triton decides at its import whether kernels are compiled or interpreted.
triton-test: $(READY)
	TRITON_INTERPRET=1 $(PYTEST) tests/interpreted $(ARGS)

# In a process of its own, too: the emulation takes the place of the CUDA part.
cuda-test: $(READY)
	$(IN_ENVIRONMENT) INTERFORMER_EMULATE=1 $(PYTEST) tests/emulated $(ARGS)

# The real torch for CUDA, without NVIDIA's packages: gigabytes, in whose place stubs stand.
target-env: $(TARGET_READY)

$(TARGET_READY): tests/requirements-target.txt tools/stub_cuda_libraries.py
	@test -n "$(TARGET_PYTHON)" || { echo "make target-env: needs Python 3.12: TARGET_PYTHON=path" >&2; exit 2; }
	rm -rf $(TARGET)/venv
	$(TARGET_PYTHON) -m venv $(TARGET)/venv
	$(TARGET_BIN)/python $(INSTALL) --requirement tests/requirements-target.txt
	$(TARGET_BIN)/python $(INSTALL) --no-deps $(TARGET_VERSIONS)
	$(TARGET_BIN)/python tools/stub_cuda_libraries.py
	touch $@

# In processes of their own: Triton has one driver for good.
target-test: $(READY) $(TARGET_READY)
	$(FAKE_GPU) $(PYTEST) tests/target $(ARGS)
	$(FAKE_GPU) $(TARGET_PYTEST) tests/target tests/gpu/test_tf32_switch.py $(ARGS)

# The package as it is installed there, its CUDA part for one device, and tests that need no data and no other library.
target-native-test: $(TARGET_READY)
	PATH="$(TARGET_BIN):$$PATH" TORCH_CUDA_ARCH_LIST=9.0a $(TARGET_BIN)/python $(INSTALL) --no-deps --no-build-isolation .
	rm -rf $(TARGET)/run
	mkdir -p $(TARGET)/run
	cp -r tests tools csrc bench pyproject.toml $(TARGET)/run
	cd $(TARGET)/run && $(TARGET_PYTEST) $(TARGET_TESTS) $(ARGS)

target-resources: $(TARGET_READY)
	TRITON_DEFAULT_FP_FUSION=1 PYTHONPATH="$(CURDIR):$(CURDIR)/tools" $(TARGET_BIN)/python -m resources.triton_kernels \
	    --target sm_90 $(ARGS)

resources: $(READY) triton-resources
	PYTHONPATH=tools $(BIN)/python -m resources.cuda_kernels
	PYTHONPATH=tools $(BIN)/python -m resources.cuda_loops

triton-resources: $(READY)
	TRITON_DEFAULT_FP_FUSION=1 PYTHONPATH=tools $(BIN)/python -m resources.triton_kernels --every $(NTH) $(ARGS)

# Part of the shapes: ARGS='--shape L104 --launches'. Triton's cache keeps what was compiled.
predictions: $(READY)
	TRITON_DEFAULT_FP_FUSION=1 PYTHONPATH=tools $(BIN)/python -m resources.predict $(ARGS)

# With the Python that is there, and nothing installed: machines with GPUs come with their torch and Triton.
gpu-report:
	$(PYTHON) tools/gpu_report.py $(ARGS)

gpu-kit: target-env
	PYTHONPATH=tools $(KIT_PYTHON) -m gpu.kit $(ARGS)

gpu-rehearsal: $(READY)
	PYTHONPATH=tools $(BIN)/python -m gpu.rehearsal $(ARGS)

# Other calls each time; a failing one is printed, and tried first by the next run.
fuzz: $(READY)
	EXAMPLES=$(EXAMPLES) $(FUZZ) tests/ops/test_properties.py -k cpu $(ARGS)
	EXAMPLES=$(SLOW_EXAMPLES) $(IN_ENVIRONMENT) INTERFORMER_EMULATE=1 \
	    $(FUZZ) tests/emulated/test_cuda_properties.py $(ARGS)
	EXAMPLES=$(SLOW_EXAMPLES) TRITON_INTERPRET=1 $(FUZZ) tests/interpreted/test_triton_properties.py $(ARGS)

# All that CI leaves out: every case in every dtype on every backend, every quantity of whole models, more random calls.
nightly: $(READY)
	EVERY=1 $(MAKE) test triton-test cuda-test ARGS='--timeout 0 $(ARGS)'
	EVERY=1 $(MAKE) target-test ARGS='--timeout 0 $(ARGS)'
	$(MAKE) resources target-resources target-native-test
	EVERY=1 $(MAKE) wheel-test
	$(MAKE) fuzz

sanitize: $(READY)
	PYTHON=$(BIN)/python bash tools/sanitize.sh $(ARGS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(NATIVE)

# The installed wheel has torch beside it and nothing else, and the checkout is out of sight. It is made of the environment's
# objects, and all its cases have few draws: `make test` has more. With EVERY=1 it is built anew, in isolation, for one device.
wheel-test: BUILD_WHEEL := $(if $(EVERY),TORCH_CUDA_ARCH_LIST=9.0a,$(IN_ENVIRONMENT))
wheel-test: ISOLATION := $(if $(EVERY),,--no-isolation)
wheel-test: DRAWS := $(if $(EVERY),,--most-draws 4 --part 1/4)
wheel-test: $(READY)
	rm -rf $(WHEEL)
	$(BUILD_WHEEL) $(BIN)/python -m build --wheel $(ISOLATION) --outdir $(WHEEL) . > /dev/null
	$(PYTHON) -m venv $(WHEEL)/venv
	$(WHEEL_BIN)/python $(INSTALL) $(TORCH) $(WHEEL)/*.whl
	cd "$$(mktemp -d)" \
	&& $(WHEEL_BIN)/python -c "import interformer_kernels as k; assert k.__file__.startswith('$(CURDIR)/$(WHEEL)'), k.__file__" \
	&& $(WHEEL_BIN)/interformer-kernels info \
	&& $(WHEEL_BIN)/interformer-kernels parity $(DRAWS) --json parity.json \
	&& $(WHEEL_BIN)/interformer-kernels parity $(DRAWS) --backend cpu --dtype float32 --op pma_pooling > /dev/null \
	&& $(WHEEL_BIN)/interformer-kernels bench --op pma_pooling --law diginetica --seconds 0.2 --no-compile

# The kernels for AVX-512 BF16 on machines without: the same source, its vectors and pairs made of AVX2 instructions. On a
# machine with them `make test` has run that source, all but the pairs' stand-in, which bfloat16 alone takes.
wide-test: HAS_PAIRS := $(shell grep -sqw avx512_bf16 /proc/cpuinfo && echo yes)
wide-test: CASES := not reference$(if $(EVERY),,$(if $(HAS_PAIRS), and bfloat16))
wide-test: $(READY)
	rm -rf $(WIDE)
	mkdir -p $(WIDE)/site $(WIDE)/run
	$(IN_ENVIRONMENT) INTERFORMER_WIDE_LEVEL=1 $(BIN)/python $(INSTALL) --no-deps --no-build-isolation \
	    --target $(WIDE)/site .
	cp -r tests pyproject.toml $(WIDE)/run
	cd $(WIDE)/run && INTERFORMER_CPU_LEVEL=wide PYTHONPATH=$(WIDE)/site $(PYTEST) -k '$(CASES)' \
	    tests/ops/test_parity.py tests/cpu/test_cpu_kernels.py tests/cpu/test_cpu_layouts.py \
	    tests/cpu/test_cpu_determinism.py

bench: $(READY)
	$(BIN)/python -m interformer_bench $(data_option) --out bench/out $(ARGS)

bench-model: $(READY)
	$(BIN)/python -m interformer_bench.model $(data_option) --out bench/out $(ARGS)

bench-rows: $(READY)
	$(BIN)/python -m interformer_bench.rows $(data_option) --out bench/out $(ARGS)

bench-options: $(READY)
	$(BIN)/python -m interformer_bench.options $(data_option) --out bench/out/options.md $(ARGS)

bench-candidates bench-requests: bench-%: $(READY)
	$(BIN)/python -m interformer_bench.$* $(data_option) --out bench/out/$*.md $(ARGS)

bench-compare: $(READY)
	$(BIN)/python -m interformer_bench.compare $(REF) $(data_option) --out bench/out $(ARGS)

# ARGS=--record writes the new figures into tools/instructions/recorded.json.
instruction-counts: $(READY)
	PYTHONPATH=tools $(BIN)/python -m instructions $(ARGS)

# In an environment of its own: the site is built from the sources, without torch and without this package installed.
docs: build/docs/ready
	NO_MKDOCS_2_WARNING=1 $(DOCS_BIN)/mkdocs build --quiet --strict --site-dir build/docs/site
	@echo "build/docs/site/index.html; with search: $(PYTHON) -m http.server --directory build/docs/site"

build/docs/ready: pyproject.toml tools/docs_requirements.py
	rm -rf build/docs/venv
	$(PYTHON) -m venv build/docs/venv
	$(PYTHON) tools/docs_requirements.py > build/docs/requirements.txt
	$(DOCS_BIN)/python $(INSTALL) --requirement build/docs/requirements.txt
	touch $@

torch-matrix: $(READY)
	bash tools/torch_matrix.sh

clean:
	rm -rf .venv build dist demo-out bench/out *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	rm -f interformer_kernels/_C.*.so interformer_kernels/_C.py
