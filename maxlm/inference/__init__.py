"""From a run folder to text: requests, a cache in blocks, one compiled step.

load.py: a run folder as a model
bases.py: the model under a run's adapter
generator.py: prompts to text
beam.py: the likeliest texts, by search
forced.py: words that a text must have
contrastive.py: likely texts that do not repeat themselves, by search
best_of.py: the likeliest of several drawn texts
request.py: what is asked, and what is answered
loop.py: the engine on a thread of its own
engine.py: requests to tokens, step by step
engine_stats.py: what it tells of itself
mixed_adapters.py: several adapters, each for the requests that ask for it
checks.py: what an engine does not take
scheduler.py: which tokens the next step reads
blocks.py: who uses which block of the cache
drafting.py: guesses at what comes next
rows.py: a plan as the rows of a step
programs.py: what runs on the device, compiled at the start
step.py: the compiled step
held.py: parameters as decoding holds them
settings.py: what each request asks for, as arrays
logits_rules.py: biases, penalties, bans
sampling.py: one token from logits
structured.py: which tokens a grammar allows
text_stream.py: tokens to characters, never taken back
language_model.py: tokens to logits, without a cache
embedding.py: texts as vectors
retrieval.py: passages near to a question
"""
