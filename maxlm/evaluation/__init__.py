"""How good a model is: held-out loss and the figures that follow from it.

perplexity.py: loss, perplexity, bits per byte over batches
"""
