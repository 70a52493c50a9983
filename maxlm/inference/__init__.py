"""From a run folder to text: load, prefill, decode, sample.

load.py: a run folder as a model
generator.py: prompts to text
held.py: weights in the format of decoding
language_model.py: tokens to logits
steps.py: prefill, decode loop
sampling.py: one token from logits
text_stream.py: tokens to characters, never taken back
"""
