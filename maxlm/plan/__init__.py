"""Preflight: what a run needs, asked of the chip's own compiler on a machine that may have no such chip.

__main__.py: command: does it fit, what does it send, how fast at best
machines.py: machines by name
analysis.py: one config on one machine: its figures, and their JSON
tables.py: all of it for people
picture.py: where memory goes, as PNG or HTML
work.py: what a device runs in a step, on how many tokens
memory.py: bytes of a device, by arithmetic
block_memory.py: of them, those of one block
traffic.py: bytes that each mesh axis moves
bound.py: roofline: what a step takes at least
breaks.py: what stops the run on many more devices
search.py: the fastest layouts that fit
advice.py: the cheapest changes that would make a run fit
compiled.py: the step through the chip's own compiler
objectives.py: what a config learns, without its data
cache.py: compiled results, kept by a hash
out_of_memory.py: a compiler's complaint: wanted, available, largest buffers
serving.py: what serving takes, and how fast it can be
rollout_time.py: what a rollout takes: written, read, learned from
serving_load.py: what a plan of serving is asked about
serving_tables.py: its answer for people
exhausted.py: what to say when a run's memory ran out
source_lines.py: where in our sources an operation comes from
kernels.py: kernels in a compiled program
hlo.py: a compiled program's text as computations and loops
collectives.py: each collective: axes, how often, bytes
audit.py: collectives that a layout must not have
"""
