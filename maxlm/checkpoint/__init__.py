"""Save, restore, verify and list the state of a run. Knows arrays, trees and files, not models.

`checkpointer` is what training and inference use; `store` is the only file that speaks to Orbax; `manifest` and
`steps` (what is on disk, and whether it is intact) and `lock` do not import jax, so that listing a folder is instant.
"""
