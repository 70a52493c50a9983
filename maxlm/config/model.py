"""What the decoder is made of. A model family is a value of these classes, never a class of its own.

`ModelConfig.blocks` is the repeating pattern of the layers: one entry for LLaMA, several where layers differ. How the
model runs is in `ExecutionConfig`.
"""

from __future__ import annotations

import math
from dataclasses import InitVar, field
from typing import Annotated, Any

from maxlm.config.attention import Attention
from maxlm.config.earlier import renamed
from maxlm.config.errors import UserError
from maxlm.config.fields import Changes, Filled, NotNegative, Positive, config
from maxlm.config.mixture import ExpertChoiceRouter, Experts
from maxlm.config.mlp import GatedMlp, Mlp
from maxlm.config.norm import Norm, RmsNorm
from maxlm.config.position import DynamicNtkScaling, EmbeddedPosition, Rope


@config("model.blocks[].residual.", changes=Changes.IDENTITY)
class PreNorm:
    """x + attention(norm(x)), then x + mlp(norm(x)) (GPT-2, LLaMA)."""


@config("model.blocks[].residual.", changes=Changes.IDENTITY)
class PostNorm:
    """norm(x + attention(x)), then norm(x + mlp(x)) (Vaswani et al. 2017, arXiv:1706.03762; the first GPT)."""


@config("model.blocks[].residual.", changes=Changes.IDENTITY)
class Sandwich:
    """x + norm(attention(norm(x))), then x + norm(mlp(norm(x))) (CogView, arXiv:2105.13290, section 2.4; Gemma 2)."""


@config("model.blocks[].residual.", changes=Changes.IDENTITY)
class Parallel:
    """x + attention(norm(x)) + mlp(norm(x)): one sum over devices instead of two (GPT-J; PaLM, arXiv:2204.02311)."""

    two_norms: bool = False
    """A norm for each of the two, as in GPT-NeoX (arXiv:2204.06745); False: they share one."""


Residual = PreNorm | PostNorm | Sandwich | Parallel
MlpConfig = Mlp | GatedMlp | Experts


@renamed(ffn="mlp")
@config("model.blocks[].", changes=Changes.IDENTITY)
class BlockConfig:
    """One layer of the decoder: attention and an MLP, joined to the residual stream as `residual` says."""

    attention: Attention
    """Where tokens look at each other."""
    mlp: MlpConfig
    """What each token goes through by itself."""
    residual: Residual = field(default_factory=PreNorm)
    """Where the norms stand, and what is added to the residual stream."""


@config("model.head.", changes=Changes.IDENTITY)
class LmHead:
    """Logits over the vocabulary."""

    tied: bool = False
    """The embedding table is the output projection too (Press & Wolf 2017, arXiv:1608.05859)."""


@config("model.head.", changes=Changes.IDENTITY)
class ScalarHead:
    """One number for each position, as reward and value models have it (arXiv:2203.02155, section 3.5)."""


Head = LmHead | ScalarHead


@renamed(
    moved={
        "compute_dtype": "execution.dtype",
        "remat": "execution.remat",
        "kernels": "execution.kernels",
        "scan_layers": "execution.scan_layers",
    },
    norm_eps=lambda eps: {"norm": RmsNorm(eps=eps)},
    tie_embeddings=lambda tied: {"head": LmHead(tied=tied)},
)
@config("model.", changes=Changes.IDENTITY)
class ModelConfig:
    """A decoder-only language model."""

    vocab_size: Positive[int]
    """Rows of the embedding table: at least the tokenizer's ids."""
    d_model: Positive[int]
    """Width of the residual stream."""
    n_layers: Positive[int]
    """Layers in all, those of first_blocks included."""
    blocks: Annotated[tuple[BlockConfig, ...], Filled(note="give at least one BlockConfig")]
    """The pattern that repeats over the layers that `first_blocks` leaves; their number is a multiple of its length."""
    max_seq_len: Positive[int]
    """Longest context, in tokens, that the model is meant for; decoding refuses to pass it."""
    norm: Norm = field(default_factory=RmsNorm)
    """Every norm of the model."""
    final_norm: bool = True
    """Normalise what leaves the last layer; post-norm models have done it by then."""
    embedded_position: EmbeddedPosition | None = None
    """What is added to each token's embedding; None: nothing, as attention knows positions."""
    head: Head = field(default_factory=LmHead)
    """What is made of the hidden states that leave the last norm."""
    init_std: NotNegative[float] = 0.02
    """Standard deviation of every weight matrix; those that write to the residual stream get init_std / sqrt(2L)."""
    first_blocks: tuple[BlockConfig, ...] = ()
    """Layers before the pattern, each used once, without experts (the dense first layer of DeepSeekMoE). They count in
    n_layers; in a pipeline they run before its first stage, on all devices."""
    moved: InitVar[Any] = None
    """Values of keys that stood here once, until a RunConfig takes them over; `dataclasses.replace` passes them on."""

    def __post_init__(self, moved: dict[str, Any] | None) -> None:
        object.__setattr__(self, "moved", moved)
        for i, block in enumerate(self.first_blocks):
            if isinstance(block.mlp, Experts):
                raise UserError(f"model.first_blocks.{i}.mlp has Experts; use a GatedMlp or an Mlp")
        for block in self.first_blocks + self.blocks:
            decay = block.attention.position.decay if isinstance(block.attention.position, Rope) else None
            # Queries grow by up to 1.4 / 0.4 = e^1.26 for each `decay` positions, and bfloat16 ends at e^88.
            if decay is not None and self.max_seq_len > 64 * decay:
                raise UserError(
                    f"model.blocks[].attention.position.decay = {decay} is too fast for model.max_seq_len = "
                    f"{self.max_seq_len}, over which scores would pass the largest number; use at least "
                    f"{self.max_seq_len / 64}"
                )
        first, entries = len(self.first_blocks), len(self.blocks)
        repeats, rest = divmod(self.n_layers - first, entries)
        if rest or repeats < 1:
            works = [first + entries * n for n in (repeats, repeats + 1) if n > 0] or [first + entries]
            before = f"the {first} of model.first_blocks and " if first else ""
            raise UserError(
                f"model.n_layers = {self.n_layers} is not {before}a multiple of the {entries} entries of model.blocks; "
                f"use {' or '.join(map(str, works))}"
            )

    @property
    def repeats(self) -> int:
        """How often the pattern `blocks` occurs."""
        return (self.n_layers - len(self.first_blocks)) // len(self.blocks)

    @property
    def layers(self) -> tuple[BlockConfig, ...]:
        """The block of every layer, in their order."""
        return self.first_blocks + self.blocks * self.repeats

    @property
    def decodes(self) -> bool:
        """Whether a token depends on earlier ones alone."""
        return self.looks_ahead is None

    @property
    def looks_ahead(self) -> str | None:
        """What makes a token depend on later ones, as key = value; None: nothing."""
        for block in self.first_blocks + self.blocks:
            if isinstance(block.mlp, Experts) and isinstance(block.mlp.router, ExpertChoiceRouter):
                return "model.blocks[].mlp.router = ExpertChoiceRouter"  # experts choose among the tokens of a group
            scaling = block.attention.position.scaling if isinstance(block.attention.position, Rope) else None
            if isinstance(scaling, DynamicNtkScaling) and self.max_seq_len > scaling.original_max_len:
                above = f"model.max_seq_len = {self.max_seq_len} above its original_max_len"
                return f"model.blocks[].attention.position.scaling = DynamicNtkScaling and {above}"
        return None

    @property
    def tied(self) -> bool:
        """Whether the embedding table multiplies hidden states too."""
        return isinstance(self.head, LmHead) and self.head.tied


def padded_vocabulary(ids: int, parts: int = 1) -> int:
    """The smallest `model.vocab_size` for so many ids that is a multiple of 128, the lanes of a TPU, and of `parts`.
    No id uses the rows that this adds."""
    multiple = math.lcm(128, parts)
    return -(-ids // multiple) * multiple
