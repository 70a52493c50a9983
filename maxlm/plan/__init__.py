"""Preflight: what a run needs, asked of the chip's own compiler on a machine that may have no such chip."""
