"""What may go wrong, done to real commands. `make faults` does all of it, and prints a table.

case.py: a case, and how one is judged
tools.py: start a command as a user, wait for a line, kill; fill a disk; flip bytes; run ranks
runs.py: a tiny run to do it to
groups.py: all groups of cases
ranks.py: several processes
kills.py: SIGKILL at any moment
operations.py: every file operation fails once
settings.py: going on with other settings
values.py: every key with every kind of nonsense
writers.py: what only watches a run
checkpoints.py: names, manifests, locks, folders
documents.py: documents of every ending, prepared data, JSON
environment.py: variables, homes, caches, memory
run.py: all cases, with a bar and a table
test_faults.py: those that every change must pass
"""
