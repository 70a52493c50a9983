"""The decoder. One letter per dim, the same in every comment, einsum and shape of this package:

B batch        T query length    S key length      L layers
D d_model      F d_ff            V vocabulary
N query heads  K key/value heads G = N / K         H head_dim

decoder.py: embed, loop over the blocks, norm, unembed
block.py: norm + attention, norm + MLP or experts
attention.py: projections, RoPE, cache
mlp.py: gated MLP
norms.py: RMSNorm
positions.py: RoPE
moe.py: routers, their losses and statistics; a mixture of experts
pipeline.py: stages and micro-batches as one scan
upcycle.py: a dense model's parameters for a mixture
parameters.py: shape, dim names and initial value of a parameter, together
"""

from maxlm.models.decoder import Decoder, abstract_decoder, abstract_parameters, init_parameters, parameter_dims

__all__ = ["Decoder", "abstract_decoder", "abstract_parameters", "init_parameters", "parameter_dims"]
