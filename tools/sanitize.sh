#!/usr/bin/env bash
# The native module under AddressSanitizer and UndefinedBehaviorSanitizer. Builds a copy of the package in
# build/sanitize, and runs the tests of the module and of the CPU kernels (offsets of any content among them) and a
# short fuzz on it. The first report, also of a child process, ends it with status 1.
#
#     tools/sanitize.sh                    everything
#     tools/sanitize.sh -k offsets         further arguments are pytest's
#     EXAMPLES=5000 tools/sanitize.sh      random calls of each kind
set -euo pipefail

python=$(command -v "${PYTHON:-python3}")
python=$(cd "$(dirname "$python")" && pwd)/$(basename "$python")  # keeps a virtual environment's link
root=$(cd "$(dirname "$0")/.." && pwd)
work=$root/build/sanitize
compiler=${CXX:-c++}

rm -rf "$work"
mkdir -p "$work/site"
wide=$([ "$(uname -m)" = x86_64 ] && echo 1 || echo 0)
INTERFORMER_CUDA=0 INTERFORMER_WIDE_LEVEL=$wide INTERFORMER_SANITIZE=address,undefined \
    "$python" -m pip install --quiet --disable-pip-version-check --no-deps --target "$work/site" "$root"

# Python is not built with the sanitizers, so their runtime must be loaded first, and libstdc++ with it, so that
# exceptions are intercepted. Python's small blocks come from malloc, so that reads past them are detected. PyTorch leaks
# at exit on purpose.
export LD_PRELOAD="$("$compiler" -print-file-name=libasan.so) $("$compiler" -print-file-name=libstdc++.so)"
export PYTHONMALLOC=malloc
export ASAN_OPTIONS=detect_leaks=0:halt_on_error=1
export UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1

tests() {  # a report bypasses pytest's capture and stops the process
    "$python" -m pytest -x --capture=sys --timeout 900 -m "not slow" "$@"
}

cd "$work/site"  # first on Python's path, before the checkout
"$python" -c "import torch, interformer_kernels._C as m; assert m.__file__.startswith('$work'), m.__file__"
# Left out: the test that counts threads, since the sanitizers' runtime has threads of its own, and those of freed memory,
# since it has an allocator of its own.
tests "$root/tests/cpu" -k "not take_threads" --ignore "$root/tests/cpu/test_freed_memory.py" "$@"
EXAMPLES=${EXAMPLES:-300} tests "$root/tests/ops/test_properties.py" -k cpu --hypothesis-profile fuzz
echo "no report of the sanitizers"
