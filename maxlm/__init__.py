"""maxlm: language models in JAX, from text to a served model, for TPUs, GPUs and one's own laptop."""

__version__ = "0.1.0"
