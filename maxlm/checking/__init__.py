"""A self-test of one config on the machine at hand: `python -m maxlm.check`.

Each check is a function that yields rows, so that they can be told as they come.

checklist.py: all checks, one after the other
shrinking.py: a config of the same kinds and small sizes; no jax
verdicts.py: a row: what was seen, what was allowed
sight.py: causality, and documents packed into a row
equal_gradients.py: micro-batches, and the mesh against one device
going_on.py: loss on one batch, checkpoints
dealt_twice.py: the order of the data
against_oracle.py: kernels against their formulas in float64
small_batches.py: random tokens in packed documents, and how their programs are compiled
"""
