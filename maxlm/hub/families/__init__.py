"""The families of published models: for each a builder of its config.json and a table of its names.

llama.py: LLaMA, Mistral, Mixtral, Qwen 2 and 3, Phi-3, OLMo, Command R, GLM-4
gpt.py: GPT, GPT-2, GPT-J, GPT-NeoX, Phi, Falcon, StarCoder 2, OPT, BLOOM
gemma.py: Gemma 1 to 3
deepseek.py: DeepSeek-V2 and V3
gpt_oss.py: gpt-oss
remote.py: Qwen 1, Baichuan, ChatGLM 1 to 3, which transformers has not
"""

from maxlm.hub.families import deepseek, gemma, gpt, gpt_oss, llama, remote
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
        llama.PHI3,
        llama.OLMO,
        llama.OLMO2,
        llama.COHERE,
        llama.GLM,
        llama.GLM4,
        gemma.GEMMA,
        gemma.GEMMA2,
        gemma.GEMMA3,
        gpt.GPT2,
        gpt.GPT,
        gpt.GPTJ,
        gpt.GPT_NEOX,
        gpt.PHI,
        gpt.FALCON,
        gpt.STARCODER2,
        gpt.OPT,
        gpt.BLOOM,
        deepseek.DEEPSEEK_V2,
        deepseek.DEEPSEEK_V3,
        gpt_oss.GPT_OSS,
        remote.QWEN,
        remote.BAICHUAN,
        remote.CHATGLM,
    )
}
"""By `model_type`. A model is written as the first that can say all of it; those that need code come last."""
