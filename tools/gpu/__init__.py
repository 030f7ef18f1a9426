"""`make gpu-report`, `make gpu-kit` and `make gpu-rehearsal`: the first minutes on a GPU, prepared and rehearsed.

`plan.py` lists the steps in order of value; `run.py` runs them, each in processes of its own (`processes.py`,
`guard.py`); `results.py` reads and writes their results, `table.py` shows them; `kit.py` makes ahead the parts that
would take minutes there; `inside.py` is the code of steps that need torch. Nothing else here imports torch: that takes
seconds, and may hang.
"""
