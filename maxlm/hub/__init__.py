"""Published models in and out: Hugging Face folders, GGUF files; one table of names and one builder a family.

models.py: load_model, save_model, and a published model as a run to talk to
converting.py: what the command maxlm.convert does
averaging.py: what maxlm.average does: the mean of several checkpoints
weights.py: a published model's arrays, from whatever kind of file
folder.py: a Hugging Face folder, read and written
resizing.py: a model for a vocabulary with more or fewer tokens
token_sets.py: the definitions of tokenizers, changed
gguf_weights.py: what a GGUF file says of a model, in the words of a family
gguf_file.py: its metadata and tensors
gguf_tokenizer.py: its vocabulary as a tokenizer.json
families/: the families, by model_type
family.py: what a family is
peft.py: adapters as peft writes them
peft_prompts.py: those of them with learned vectors
peft_files.py: the two files of an adapter
peft_settings.py: what their adapter_config.json may say
adapted.py: models with an adapter, merged or written so
names.py: how our arrays lie in published tensors
published.py: config.json, key by key
sizes.py: what every family says in it, under one key or another
tensor_files.py: safetensors files, tensor by tensor
compressed.py: quantised weights, written as compressed-tensors has them
bitsandbytes.py: the same of NF4, as bitsandbytes has it
held_weights.py: what both read
quantized.py: those with few bits, as the numbers that they stand for
"""

from maxlm.hub.models import load_model, save_model

__all__ = ["load_model", "save_model"]
