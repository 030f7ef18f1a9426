"""This tree against another git ref, which is built beside it: interleaved times, and one rule for the verdicts.

`tree.py` builds the other ref, `child.py` is the process that times one of the two packages, `worker.py` its handle,
`interleaved.py` alternates between two of them, `verdicts.py` has the rule. Both sides are measured with this tree's
shapes and timing; only `interformer_kernels` differs.
"""
