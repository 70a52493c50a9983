"""What the decoder is made of. A model family is a value of these classes, never a class of its own.

`ModelConfig.blocks` is the repeating pattern of the layers: one entry for LLaMA, several where layers differ.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from maxlm.config.errors import UserError, require_positive
from maxlm.config.ffn import ExpertChoiceRouter, FfnConfig, GluConfig, MoeConfig


class Dtype(enum.Enum):
    """Floating-point formats by their usual names."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"

    @property
    def itemsize(self) -> int:
        """Bytes of a number."""
        return 2 if self is Dtype.BFLOAT16 else 4


class Remat(enum.Enum):
    """What the backward pass finds saved, and what it computes again (activation checkpointing, arXiv:1604.06174)."""

    NONE = "none"
    """Save every intermediate: most memory, no recomputation."""
    DOTS = "dots"
    """Save the outputs of the weight multiplications, recompute the rest."""
    GLU = "glu"
    """As NAMES, and save both inputs of a gated MLP's product too; recompute attention's output projection, and what
    is in no product. Experts are recomputed."""
    NAMES = "names"
    """Save the attention output and the inputs of the attention kernel; recompute the MLP."""
    QKV = "qkv"
    """Save the inputs of the attention kernel; recompute attention and MLP."""
    FULL = "full"
    """Save only each block's input: least memory, about a third more FLOPs."""
    OFFLOAD = "offload"
    """As NAMES, but the saved arrays wait in the host's memory."""


class Backend(enum.Enum):
    """What an operation runs as; docs/kernels.md tells what each can do."""

    AUTO = "auto"
    """The first that can, in the order recorded for the chip."""
    XLA = "xla"
    """XLA operations in blocks; every device."""
    TPU = "tpu"
    """Our Pallas kernel for TPUs."""
    GPU = "gpu"
    """Our Pallas kernel for NVIDIA Hopper."""
    CUDNN = "cudnn"
    """cuDNN's attention, on NVIDIA GPUs; not for packed documents."""


class GluSave(enum.Enum):
    """What a gated MLP keeps for its backward pass, as far as `remat` does not decide that already."""

    AG = "ag"
    """Both pre-activations, 2 x d_ff numbers a token."""
    NONE = "none"
    """Its input alone; the backward pass computes them again."""


@dataclass(frozen=True, kw_only=True)
class KernelConfig:
    """How the heavy operations of whole sequences run; a named backend that cannot do what the model needs is an error.

    Decoding with a cache, and a finished run that is opened elsewhere, take AUTO.
    """

    attention: Backend = Backend.AUTO
    glu: Backend = Backend.AUTO
    glu_save: GluSave = GluSave.AG

    def __post_init__(self) -> None:
        if self.glu is Backend.CUDNN:
            raise UserError("model.kernels.glu = cudnn does not exist; use auto, xla, tpu or gpu")


@dataclass(frozen=True, kw_only=True)
class Llama3RopeScaling:
    """Llama 3.1's stretching of the slow RoPE frequencies (arXiv:2407.21783; numbers from the released configs)."""

    factor: float = 8.0
    """Wavelengths longer than original_max_len / low_freq_factor grow by this factor."""
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    """Wavelengths shorter than original_max_len / high_freq_factor stay as they are."""
    original_max_len: int = 8192
    """Context length, in tokens, of the model before stretching."""


@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rotary position embedding (Su et al. 2021, arXiv:2104.09864) on every head dimension."""

    theta: float = 10_000.0
    """Base of the geometric series of wavelengths."""
    scaling: Llama3RopeScaling | None = None


@dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    """Causal self-attention: MHA (n_kv_heads = n_heads), GQA (fewer) or MQA (1)."""

    n_heads: int
    n_kv_heads: int
    head_dim: int
    rope: RopeConfig | None = field(default_factory=RopeConfig)
    """None: no position embedding (NoPE)."""
    window: int | None = None
    """Keys a query may see, itself included; None: all earlier ones."""
    qkv_bias: bool = False
    out_bias: bool = False
    qk_norm: bool = False
    """RMSNorm over each query and key head before RoPE (as in Qwen 3)."""

    def __post_init__(self) -> None:
        for key in ("n_heads", "n_kv_heads", "head_dim"):
            require_positive(f"model.blocks[].attention.{key}", getattr(self, key))
        if self.n_heads % self.n_kv_heads:
            allowed = [k for k in range(1, self.n_heads + 1) if self.n_heads % k == 0]
            raise UserError(
                f"model.blocks[].attention.n_kv_heads = {self.n_kv_heads} does not divide n_heads = {self.n_heads}; "
                f"use one of {allowed}"
            )
        if self.rope is not None and self.head_dim % 2:
            raise UserError(
                f"model.blocks[].attention.head_dim = {self.head_dim} is odd, but RoPE rotates pairs; "
                f"use {self.head_dim + 1}"
            )
        if self.window is not None:
            require_positive("model.blocks[].attention.window", self.window)


@dataclass(frozen=True, kw_only=True)
class BlockConfig:
    """One pre-norm decoder layer: x + attention(norm(x)), then x + ffn(norm(x))."""

    attention: AttentionConfig
    ffn: FfnConfig


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A decoder-only language model."""

    vocab_size: int
    d_model: int
    n_layers: int
    blocks: tuple[BlockConfig, ...]
    """The pattern that repeats over the layers that `first_blocks` leaves; their number is a multiple of its length."""
    max_seq_len: int
    """Longest context, in tokens, that the model is meant for; decoding refuses to pass it."""
    tie_embeddings: bool = False
    """Use the embedding table as the output projection too."""
    norm_eps: float = 1e-5
    init_std: float = 0.02
    """Standard deviation of every weight matrix; those that write to the residual stream get init_std / sqrt(2L)."""
    compute_dtype: Dtype = Dtype.BFLOAT16
    """Format of activations and matrix multiplications. Parameters are always float32."""
    remat: Remat = Remat.FULL
    """What the backward pass computes again: nothing ("none") up to all but each block's input ("full")."""
    kernels: KernelConfig = field(default_factory=KernelConfig)
    scan_layers: bool = True
    """Compile one pattern and loop over it (fast to compile), or unroll every layer."""
    first_blocks: tuple[BlockConfig, ...] = ()
    """Layers before the pattern, each used once, without experts (the dense first layer of DeepSeekMoE). They count in
    n_layers; in a pipeline they run before its first stage, on all devices."""

    def __post_init__(self) -> None:
        for key in ("vocab_size", "d_model", "n_layers", "max_seq_len"):
            require_positive(f"model.{key}", getattr(self, key))
        if not self.blocks:
            raise UserError("model.blocks is empty; give at least one BlockConfig")
        for i, block in enumerate(self.first_blocks):
            if not isinstance(block.ffn, GluConfig):
                raise UserError(f"model.first_blocks.{i}.ffn is a {type(block.ffn).__name__}; use a GluConfig")
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
        """Whether a token depends on earlier ones alone: not where experts choose among the tokens of a group."""
        return not any(
            isinstance(block.ffn, MoeConfig) and isinstance(block.ffn.router, ExpertChoiceRouter)
            for block in self.blocks
        )
