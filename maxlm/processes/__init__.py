"""Several processes, one program: a rank is a process of the run, numbered as jax numbers them.

joining.py: from what a launcher set in the environment to ranks that have met
same.py: what must be the same on every rank
ranks.py: what ranks tell each other beside what their devices compute: errors, agreement, signs of life
hub.py: rank 0's end of it
spoke.py: the others' end
wire.py: the lines between them
interruption.py: signals, and stopping at the same step on every rank
watchdog.py: the stacks of a step that takes too long
"""
