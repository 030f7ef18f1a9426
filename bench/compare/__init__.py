"""This tree against another git ref: built beside it, timed by turns, and told apart from noise by one rule.

`tree.py` builds the other ref, `child.py` is the process that times one of the two packages, `worker.py` its handle,
`turns.py` lets two of them take turns, `verdicts.py` has the rule. Shapes and timing are this tree's bench on both
sides; only `interformer_kernels` differs.
"""
