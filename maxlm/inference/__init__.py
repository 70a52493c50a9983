"""From a run folder to text: load, prefill, decode, sample.

load.py: a run folder as a model
generator.py: prompts to text
language_model.py: tokens to logits
steps.py: prefill, decode loop
settings.py: what each request asks for, as arrays
logits_rules.py: biases, penalties, bans
sampling.py: one token from logits
structured.py: which tokens a grammar allows
text_stream.py: tokens to characters, never taken back
"""
