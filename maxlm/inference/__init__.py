"""From a run folder to text: load, prefill, decode, sample."""
