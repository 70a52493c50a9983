"""Published models in and out: Hugging Face folders, one table of names and one builder a family.

models.py: load_model, save_model, and a folder as a run to talk to
converting.py: what the command maxlm.convert does
folder.py: a folder as a model's arrays, and back
families/: the families, by model_type
family.py: what a family is
names.py: how our arrays lie in published tensors
published.py: config.json, key by key
sizes.py: what every family says in it, under one key or another
tensor_files.py: safetensors files, tensor by tensor
quantized.py: those with few bits, as the numbers that they stand for
"""

from maxlm.hub.models import load_model, save_model

__all__ = ["load_model", "save_model"]
