"""Where a run can be started, and the scripts and manifests that start it there.

tpu_slices.py: sizes and names of TPU slices
destinations.py: what each kind of machine or cluster wants to be told
request.py: one launch, and whether the run fits where it is to go
render.py: a template of launch/, filled in
start.py: the text to the program that runs it
"""
