"""The families of published models, one table and one builder each.

llama.py: LLaMA, Mistral, Mixtral, Qwen 2 and 3
"""

from maxlm.hub.families import llama
from maxlm.hub.family import Family

FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (llama.LLAMA, llama.MISTRAL, llama.QWEN2, llama.QWEN3, llama.MIXTRAL, llama.QWEN3_MOE)
}
"""By `model_type`. A model is written as the first that can say all of it."""
