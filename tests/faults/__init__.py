"""What may go wrong, done to real commands. `python tests/faults/run.py` (make faults) does all, and prints a table.

case.py: a case, and how one is judged
tools.py: start a command as a user, wait for a line, kill; fill a disk; flip bytes; run ranks
run.py: all cases, with a bar and a table
test_faults.py: those that every change must pass
"""
