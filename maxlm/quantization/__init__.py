"""A trained model with smaller weights, and what that costs: what `python -m maxlm.quantize` does.

methods.py: each method, from parameters to `Weight`s of fewer bits, with the error of every array
calibration.py: one layer after the other on real text, with what its products see
llama_blocks.py: the blocks of a GGUF file, found again in its numbers
folding.py: scales moved from the inputs of a product into what makes them
gptq.py: GPTQ of one matrix
scale_search.py: the scales of AWQ and SmoothQuant
comparing.py: bytes, perplexity, divergence and speed of a quantised model beside the full one
trials.py: method after method on one model and one text
table.py: the comparison for people and as JSON
"""
