"""`make gpu-report`, `make gpu-kit` and `make gpu-rehearsal`: the first minutes on a GPU, prepared and rehearsed.

`plan.py` says what is done, in order of value; `run.py` does it, each step in processes of its own (`processes.py`,
`guard.py`); `results.py` reads and writes what was found, `table.py` shows it; `kit.py` takes along what would cost
minutes there; `inside.py` is what steps run that need torch. Nothing else here imports torch: that takes seconds, and
may hang.
"""
