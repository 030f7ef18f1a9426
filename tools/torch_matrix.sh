#!/usr/bin/env bash
# One wheel under several versions of torch: each gets an environment of its own, a smoke test and the parity of every
# backend that serves, from another directory, and is thrown away. Downloads several gigabytes. Exit status 1 if any version fails.
#
#     tools/torch_matrix.sh [WHEEL]                 builds the wheel where none is given
#     TORCH_VERSIONS="2.10.0 2.13.0" tools/torch_matrix.sh
set -euo pipefail

python=${PYTHON:-python3}
versions=${TORCH_VERSIONS:-2.10.0 2.11.0 2.13.0 2.14.1}
root=$(cd "$(dirname "$0")/.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

if [ $# -gt 0 ]; then
    wheel=$(cd "$(dirname "$1")" && pwd)/$(basename "$1")
else
    "$python" -m pip wheel --quiet --no-deps --wheel-dir "$work/wheel" "$root"
    wheel=$(echo "$work"/wheel/*.whl)
fi
echo "wheel: $(basename "$wheel"), $(du -h "$wheel" | cut -f1)"

cat > "$work/smoke.py" <<'PY'
import re
import sys

import torch

import interformer_kernels as ik
from interformer_kernels import _C

assert sys.prefix in ik.__file__, ik.__file__
torch.set_num_threads(2)
offsets = torch.arange(51) * 40
parameter = torch.nn.Parameter(torch.randn(4, 2, 16))
assert ik.pma_pooling(parameter, torch.randn(2000, 2, 16), None, offsets, backend="cpu").requires_grad
for refused in (3, torch.zeros(3, device="meta"), torch.zeros(3).to_sparse()):
    try:
        _C.first_bad_offset(refused, 0)
    except TypeError as error:
        assert "\n" not in str(error), error
    else:
        raise AssertionError(refused)
with open("/proc/self/maps") as maps:
    runtimes = set(re.findall(r"/\S*(?:gomp|iomp|omp5)\S*", maps.read()))
assert len(runtimes) == 1, runtimes
print("ok", torch.__version__, runtimes.pop())
PY

status=0
for version in $versions; do
    environment=$work/torch
    "$python" -m venv "$environment"
    if "$environment/bin/pip" install --quiet --disable-pip-version-check "torch==$version" \
        && "$environment/bin/pip" install --quiet --disable-pip-version-check --no-deps "$wheel" \
        && result=$(cd "$work" && "$environment/bin/python" -W ignore smoke.py) \
        && (cd "$work" && "$environment/bin/interformer-kernels" parity --dtype float32 --dtype bfloat16 > parity.txt); then
        echo "torch $version: $result"
    else
        echo "torch $version: FAILED"
        status=1
    fi
    rm -rf "$environment"
done
exit $status
