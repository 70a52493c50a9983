"""The families of published models, one table and one builder each.

gpt.py: GPT, GPT-2, StarCoder 2
llama.py: LLaMA, Mistral, Mixtral, Qwen 2 and 3
"""

from maxlm.hub.families import gpt, llama
from maxlm.hub.family import ModelFamily

FAMILIES: dict[str, ModelFamily] = {
    family.model_type: family
    for family in (
        llama.LLAMA,
        llama.MISTRAL,
        llama.QWEN2,
        llama.QWEN3,
        llama.MIXTRAL,
        llama.QWEN3_MOE,
        gpt.GPT2,
        gpt.GPT,
        gpt.STARCODER2,
    )
}
"""By `model_type`. A model is written as the first that can say all of it."""
