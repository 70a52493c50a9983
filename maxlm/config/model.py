"""What the decoder is made of. A model family is a value of these classes, never a class of its own.

`ModelConfig.blocks` is the repeating pattern of the layers: one entry for LLaMA, several where layers differ. How the
model runs is in `ExecutionConfig`.
"""

from __future__ import annotations

import enum
import math
from dataclasses import InitVar, field, replace
from typing import Annotated, Any, assert_never

from maxlm.config.adapter import Adapter
from maxlm.config.attention import Attention
from maxlm.config.earlier import renamed
from maxlm.config.errors import UserError
from maxlm.config.fields import Changes, Filled, NotNegative, Positive, Range, config
from maxlm.config.mixture import ExpertChoiceRouter, Experts, NoisyTopKRouter
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
class OutputNorm:
    """x + norm(attention(x)), then x + norm(mlp(x)) (Swin v2, arXiv:2111.09883, section 3.2: "res-post-norm";
    OLMo 2, arXiv:2501.00656)."""


@config("model.blocks[].residual.", changes=Changes.IDENTITY)
class DeepNorm:
    """norm(alpha * x + attention(x)), then norm(alpha * x + mlp(x)) (Wang et al. 2022, arXiv:2203.00555).

    If one block has it, all have the same. The standard deviation of v_proj, o_proj and the matrices of MLPs is
    beta * init_std, without the 1 / sqrt(2L) of other models. In the paper beta is the gain of Xavier's initialisation,
    which has sqrt(2 / (inputs + outputs)) of each matrix where we have init_std for all; it says that others will do.
    """

    alpha: Positive[float] | None = None
    """Factor of the residual stream; None: (2L)^(1/4), as the paper has it for decoders (figure 2)."""
    beta: Positive[float] | None = None
    """Factor of the standard deviations above; None: (8L)^(-1/4), from the same figure."""

    def alpha_of(self, n_layers: int) -> float:
        """In a model of so many layers."""
        return (2 * n_layers) ** 0.25 if self.alpha is None else self.alpha

    def beta_of(self, n_layers: int) -> float:
        """In a model of so many layers."""
        return (8 * n_layers) ** -0.25 if self.beta is None else self.beta


@config("model.blocks[].residual.", changes=Changes.IDENTITY)
class Sandwich:
    """x + norm(attention(norm(x))), then x + norm(mlp(norm(x))) (CogView, arXiv:2105.13290, section 2.4; Gemma 2)."""


@config("model.blocks[].residual.", changes=Changes.IDENTITY)
class Parallel:
    """x + attention(norm(x)) + mlp(norm(x)): one sum over devices instead of two (GPT-J; PaLM, arXiv:2204.02311)."""

    two_norms: bool = False
    """A norm for each of the two, as in GPT-NeoX (arXiv:2204.06745); False: they share one."""


class ResidualInit(enum.Enum):
    """What init_std is divided by for the matrices that write to the residual stream, o_proj and down_proj."""

    ALL_LAYERS = "all_layers"
    """sqrt(2L), so that the sum of all 2L keeps its size (GPT-2, section 2.3)."""
    LAYERS_SO_FAR = "layers_so_far"
    """sqrt(2l) in layer l, counted from 1, so that every partial sum does (torchtitan, and OLMo 1's code; as DS-Init,
    arXiv:1908.11365, section 4, which divides all matrices of a layer by sqrt(l))."""
    NONE = "none"
    """1: they begin as all others."""


Residual = PreNorm | PostNorm | OutputNorm | DeepNorm | Sandwich | Parallel
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
    """Logits over the vocabulary: cap(scale * hidden @ table.T + bias), where cap(x) = soft_cap * tanh(x / soft_cap).

    All but the product is computed in float32, in training, evaluation and generation alike.
    """

    tied: bool = False
    """The embedding table is the output projection too (Press & Wolf 2017, arXiv:1608.05859)."""
    bias: bool = False
    """Adds a learned number for each id, as GPT-J and Phi do."""
    scale: Positive[float] | None = None
    """Factor of the product, as Cohere's logit_scale and muP's output multiplier (arXiv:2203.03466); None: none."""
    soft_cap: Positive[float] | None = None
    """Keeps logits between -soft_cap and soft_cap (Gemma 2, arXiv:2408.00118, section 2); None: no cap."""
    normalized: bool = False
    """Each row of the table is divided by its length before the product (Baichuan 2's NormHead, arXiv:2309.10305);
    where a tied table is looked up it is not."""


@config("model.head.", changes=Changes.IDENTITY)
class ScalarHead:
    """One number for each position, as reward and value models have it (arXiv:2203.02155, section 3.5)."""

    lm: LmHead | None = None
    """Logits over the vocabulary too, for a loss of the text beside that of the numbers; None: none."""


@config("model.head.", changes=Changes.IDENTITY)
class ClassHead:
    """A number for each class at each position, of which a softmax makes probabilities (GPT-1's l_y = h W_y, Radford et
    al. 2018, section 3.2)."""

    n_classes: Annotated[int, Range(ge=2)]
    """Classes, counted from 0."""
    lm: LmHead | None = None
    """As of `ScalarHead`."""


class Pooling(enum.Enum):
    """Which states of a text become its vector."""

    MEAN = "mean"
    """The mean of all tokens' states."""
    LAST = "last"
    """The state of the last token, which alone has seen all others."""


@config("model.head.", changes=Changes.IDENTITY)
class EmbedHead:
    """Vectors of texts. One number is learned beside the decoder, by which cosines are multiplied in training: it
    begins as log(1 / 0.07) and is kept at or below log(100) (CLIP, arXiv:2103.00020, section 2.5)."""

    pooling: Pooling = Pooling.MEAN
    """Of which states, in training and wherever the model is used."""


Head = LmHead | ScalarHead | ClassHead | EmbedHead


@config("model.medusa.", changes=Changes.IDENTITY)
class MedusaHeads:
    """Heads that guess at later tokens from the same hidden states (Cai et al. 2024, arXiv:2401.10774, section 2.1.1).

    Of h, which the model's head makes the next token of, head k = 1, 2, ... makes the token k places after that:
    table_k (h + silu(h W_k)), finished as the logits of `LmHead` are. W_k begins as zeros and table_k, in a run that
    starts from another, as the table of the model's head, so that every head begins as that.

    A run of such a model trains its heads and nothing else (`task = TrainMedusa`).
    """

    n_heads: Annotated[int, Range(ge=1, le=16)] = 3
    """How many. Each has d_model * (d_model + vocab_size) parameters, and is as likely as all heads before it are to
    guess in vain."""


@config("model.mtp.", changes=Changes.IDENTITY)
class MtpModules:
    """Modules that predict further tokens while the model is trained, one after the other (multi-token prediction,
    DeepSeek-V3, arXiv:2412.19437, section 2.2).

    Of h^(k-1), the states of module k - 1, or for k = 1 of the model, module k makes at token t_i
    h_i^k = norm(layer(M [norm(h_i^(k-1)); norm(Emb(t_(i+k)))])), and of that the model's head makes logits of
    t_(i+k+1); embedding and head are the model's own, the layer is like its last. All else (held-out loss, evaluation,
    generation, what is converted) is without them.
    """

    depth: Annotated[int, Range(ge=1, le=16)] = 1
    """How many (D), each with the parameters of a layer and of M, 2 d_model^2."""
    weight: Annotated[Positive[float], Changes.TRAINING] = 0.3
    """Lambda: the loss has weight / depth times the sum of their cross-entropies. DeepSeek-V3 goes on with 0.1 after
    two thirds of its tokens, as a resumed run may."""


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
    embedding_norm: bool = False
    """Normalise what enters the first layer, embedded positions added (BLOOM, arXiv:2211.05100, section 3.2.3)."""
    embedding_scale: Positive[float] | None = None
    """Factor of each token's embedding, before positions are added; None: none. Gemma has sqrt(d_model), and rounds it
    to the compute dtype before it multiplies; so do we."""
    final_norm: bool = True
    """Normalise what leaves the last layer; post-norm models have done it by then."""
    embedded_position: EmbeddedPosition | None = None
    """What is added to each token's embedding; None: nothing, as attention knows positions."""
    head: Head = field(default_factory=LmHead)
    """What is made of the hidden states that leave the last norm."""
    init_std: NotNegative[float] = 0.02
    """Standard deviation of every weight matrix, but for what residual_init and DeepNorm make smaller."""
    residual_init: ResidualInit = ResidualInit.ALL_LAYERS
    """How much smaller what writes to the residual stream begins; DeepNorm has a rule of its own."""
    mup_base_width: Positive[int] | None = None
    """d_model of a narrower model for which init_std and the learning rate were found; None: they are this model's own.
    muP for Adam (arXiv:2203.03466, table 8): with m = d_model / mup_base_width, matrices between hidden vectors begin
    smaller by sqrt(m), routers and scores by m, and both learn slower by m, weight decay included; logits are divided
    by m. d_ff and the heads are to be wider by m too, head_dim is to stay, so that the scale of scores may."""
    medusa: MedusaHeads | None = None
    """Heads that guess at later tokens; None: none."""
    mtp: MtpModules | None = None
    """Modules that predict further tokens, in training alone; None: none."""
    adapter: Adapter | None = None
    """What is trained in place of the model's own parameters; None: those are."""
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
        if self.medusa is not None and not isinstance(self.head, LmHead):
            raise UserError(
                f"model.medusa needs logits, which model.head = {type(self.head).__name__} does not make; use an LmHead"
            )
        if self.adapter is not None and self.medusa is not None:
            raise UserError("model.adapter and model.medusa are each trained on a base that is not; use one at a time")
        self._check_mtp()
        residuals = {block.residual for block in self.first_blocks + self.blocks}
        if self.deep_norm is not None and len(residuals) > 1:
            raise UserError(
                "model.blocks and model.first_blocks have DeepNorm beside another residual; its constants are those of "
                "a whole model: use one DeepNorm for all"
            )
        if self.mup_base_width is not None and self.lm_head is not None and self.lm_head.normalized:
            raise UserError(
                "model.mup_base_width has no rule for model.head.normalized = True, whose rows have one length at any "
                "width; use one of the two"
            )
        if self.deep_norm is not None and self.residual_init is not ResidualInit.ALL_LAYERS:
            raise UserError(
                f"model.residual_init = {self.residual_init} has no meaning with DeepNorm, whose beta says how its "
                "matrices begin; use the default"
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

    def _check_mtp(self) -> None:
        if self.mtp is None:
            return
        if not isinstance(self.head, LmHead):
            raise UserError(
                f"model.mtp predicts tokens, of which model.head = {type(self.head).__name__} makes no logits; use an "
                "LmHead, or model.mtp = None"
            )
        for key in ("medusa", "adapter"):
            if getattr(self, key) is not None:
                raise UserError(
                    f"model.mtp is trained with the model, and under model.{key} that is not; use model.mtp = None, "
                    "with which the run that it begins with may have had modules"
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
    def main(self) -> ModelConfig:
        """What is used when training is over: all but the modules of `mtp`."""
        return self if self.mtp is None else replace(self, mtp=None)

    @property
    def wider(self) -> float:
        """How much wider it is than the model of mup_base_width; 1 without one."""
        return 1.0 if self.mup_base_width is None else self.d_model / self.mup_base_width

    @property
    def deep_norm(self) -> DeepNorm | None:
        """What every block has as its residual, if that is a DeepNorm."""
        kinds = [block.residual for block in self.first_blocks + self.blocks]
        return next((kind for kind in kinds if isinstance(kind, DeepNorm)), None)

    @property
    def virtual_tokens(self) -> int:
        """Before each text: what an adapter adds. They have no ids; where one must stand, it is the last one of the
        vocabulary, which padded vocabularies leave unused."""
        return 0 if self.adapter is None else self.adapter.virtual_tokens

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
    def draws(self) -> bool:
        """Whether training draws numbers in each step: the noise of routers, what an adapter leaves out."""
        mlps = [block.mlp for block in self.blocks]
        noisy = any(isinstance(mlp, Experts) and isinstance(mlp.router, NoisyTopKRouter) for mlp in mlps)
        return noisy or (self.adapter is not None and self.adapter.draws)

    @property
    def lm_head(self) -> LmHead | None:
        """What makes logits over the vocabulary, be it beside another head; None: nothing."""
        match self.head:
            case LmHead():
                return self.head
            case ScalarHead() | ClassHead():
                return self.head.lm
            case EmbedHead():
                return None
            case _:
                assert_never(self.head)

    @property
    def tied(self) -> bool:
        """Whether the embedding table multiplies hidden states too."""
        return self.lm_head is not None and self.lm_head.tied


def padded_vocabulary(ids: int, parts: int = 1) -> int:
    """The smallest `model.vocab_size` for so many ids that is a multiple of 128, the lanes of a TPU, and of `parts`.
    No id uses the rows that this adds."""
    multiple = math.lcm(128, parts)
    return -(-ids // multiple) * multiple
