"""Save, restore, verify and list the state of a run. Knows arrays, trees and files, not models.

`checkpointer` is what training and inference use; `store` is the only file that speaks to Orbax; `manifest`,
`retention` (what is on disk, and whether it is intact) and `lock` do not import jax, so that listing is instant.

checkpointer.py: save, restore the newest intact step
store.py: arrays to files by Orbax
manifest.py: checksums, written last
reference.py: arrays of another run, by where they lie and their hash
retention.py: which steps there are and which are kept
state_hash.py: one SHA-256 for a whole state
lock.py: one process in a run folder
"""
