"""The decoder. One letter per dim, the same in every comment, einsum and shape of this package:

B batch        T query length    S key length      L layers
D d_model      F d_ff            V vocabulary
N query heads  K key/value heads G = N / K         H head_dim

decoder.py: embed, loop over the blocks, norm, unembed
block.py: norm + attention, norm + MLP or experts
attention.py: queries, keys and values, their norms and positions
latent_attention.py: the same, of keys and values made from latents
kv_cache.py: what decoding keeps of the tokens before
mlp.py: gated MLP
norms.py: RMSNorm
positions.py: RoPE
moe.py: routers, their losses and statistics; a mixture of experts
pipeline.py: stages and micro-batches as one scan
upcycle.py: a dense model's parameters for a mixture
unembedding.py: hidden states to logits
adapters.py: few parameters in place of all
merging.py: an adapter made a part of its base, or one with others
base.py: the model under them
prompts.py: what makes virtual tokens while they are learned
medusa.py: heads that guess at later tokens
mtp.py: modules that predict further tokens in training
weights/: what a product takes as its weight: a plain array, or one of fewer bits
parameters.py: parameters as maxlm/shapes declares them
execution.py: mesh, number format, remat and kernels of a call
tokens.py: what is known of each token: position, document, seed
"""

from maxlm.models.decoder import (
    Decoder,
    DecoderOutput,
    abstract_parameters,
    bind,
    init_parameters,
    parameter_dims,
)
from maxlm.models.execution import Execution
from maxlm.models.parameters import declared
from maxlm.models.tokens import Tokens
from maxlm.models.unembedding import Unembedding

__all__ = [
    "Decoder",
    "DecoderOutput",
    "Execution",
    "Tokens",
    "Unembedding",
    "abstract_parameters",
    "bind",
    "declared",
    "init_parameters",
    "parameter_dims",
]
