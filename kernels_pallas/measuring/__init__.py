"""What `bench` and `tune` are made of: the cases, their references, the clock, and a process to crash in.

cases.py: problems with references and rivals
shapes.py: which cases the benchmark has
contest.py: one case: check, then time beside its rivals
timing.py: medians of interleaved calls
isolate.py: a process that may hang or die
"""
