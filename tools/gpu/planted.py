"""Planted steps that go wrong, each in a way of its own, with the status that a report must give them."""

from __future__ import annotations

import sys
from pathlib import Path

from gpu.results import ROOT
from gpu.run import Step

_FILES = ROOT / "interformer_kernels" / "_files.py"
# Helpers of planted steps: their results, a good record, and a grandchild that ignores SIGTERM.
_TOOLS = f"""
import importlib.util, os, pathlib, resource, signal, subprocess, sys, time
spec = importlib.util.spec_from_file_location("files", {str(_FILES)!r})
files = importlib.util.module_from_spec(spec)
spec.loader.exec_module(files)
results, step = pathlib.Path(sys.argv[1]), sys.argv[2]
def good():
    files.append_line(results, {{"kind": "planted", "step": step}})
def raw(data):
    with open(results, "ab") as file:
        file.write(data)
def stubborn(**options):
    ignore = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
    return subprocess.Popen([sys.executable, "-c", ignore], **options)
"""
# By name: the program, and the status that it must get.
PROGRAMS = {
    "good": ("good()", "ok"),
    "crashes": ("good(); os.kill(os.getpid(), signal.SIGSEGV)", "failed: killed by SIGSEGV"),
    "fails": ("good(); raise SystemExit('why it failed')", "failed: exit status 1"),
    "hangs": ("good(); stubborn(); stubborn(start_new_session=True); time.sleep(600)", "out of time"),
    "ignores": ("signal.signal(signal.SIGTERM, signal.SIG_IGN); stubborn().wait()", "out of time"),
    "leaves": ("good(); stubborn(); stubborn(start_new_session=True, stdout=subprocess.DEVNULL)", "ok"),
    "has-a-helper": ("good(); subprocess.Popen([sys.executable, '-c', 'open(0).read()'], stdin=-1)", "ok"),
    "nonsense": ("print('{'); print('[1, 2'); raw(b'no JSON\\n[1]\\n\\xff\\xfe\\n'); good()", "ok"),
    "lies": ("for k in 'begin step report kit job parity check bench first'.split(): "
             "raw(b'{\"kind\": \"%s\", \"step\": \"x\", \"share\": []}\\n' % k.encode())\ngood()", "ok"),
    "half-a-line": ("raw(b'{\"kind\": \"planted\", \"step\": \"half'); good(); raw(b'{\"kind\": \"pl')", "ok"),
    "talks": ("good(); [os.write(1, b'talk ' * 13000) for _ in range(2000)]", "ok"),
    "never-stops-talking": ("good()\nwhile True: os.write(1, b'more' * 16000)", "out of time"),
    "no-memory": ("resource.setrlimit(resource.RLIMIT_AS, (2**29, 2**29)); bytearray(2**30)", "failed: exit status 1"),
    "closes-its-output": ("good(); os.close(1); os.close(2); time.sleep(600)", "out of time"),
    "finds-nothing": ("print('all is well')", "failed: it left no results"),
}  # fmt: skip
PATIENCE = 2.0  # seconds that steps which do not end may take


def step(name: str, file: Path, patience: float = PATIENCE) -> Step:
    """The planted step of this name."""
    program, status = PROGRAMS[name]
    command = (sys.executable, "-S", "-c", f"{_TOOLS}\n{program}", str(file), f"planted-{name}")
    return Step(f"planted-{name}", command, patience if status == "out of time" else 60.0)
