"""Few parameters that are trained in place of all: what is added to a model that is there already, its base."""

from __future__ import annotations

import enum
from dataclasses import field
from typing import assert_never

from maxlm.config.errors import UserError
from maxlm.config.fields import BelowOne, Changes, NotEmpty, NotNegative, Positive, config
from maxlm.config.mlp import Activation

ALL_LINEAR = "all-linear"
"""In place of a pattern: every matrix of attention and of dense MLPs, shared experts included."""


class BaseFormat(enum.Enum):
    """How the base's matrices are held while an adapter is trained. Everything else of it is float32."""

    FLOAT32 = "float32"
    """4 bytes a number, as in its checkpoint."""
    BFLOAT16 = "bfloat16"
    """2 bytes, tables included."""
    INT8 = "int8"
    """8 bits, with a float32 scale for each output, as `WeightFormat.INT8`."""
    NF4 = "nf4"
    """4 bits, as `WeightFormat.NF4` (QLoRA, arXiv:2305.14314); tables have 8."""


@config("model.adapter.kind.", changes=Changes.IDENTITY)
class Lora:
    """W x + scale B A x for a matrix W of the base, with A: inputs -> rank and B: rank -> outputs (Hu et al. 2021,
    arXiv:2106.09685, equation 3). B begins as zeros, A with variance 1 / (3 inputs), as that of their code.
    """

    rank: Positive[int] = 8
    """Inner size of B A."""
    alpha: Positive[float] = 16.0
    """scale = alpha / rank."""
    rank_stabilized: bool = False
    """scale = alpha / sqrt(rank) in place of that (rsLoRA, arXiv:2312.03732)."""
    dora: bool = False
    """The direction of each output's weights comes from W + scale B A, their length is an array of its own that begins
    as W's (DoRA, arXiv:2402.09353, equation 5). The length in the denominator has no gradient (section 4.3)."""
    dropout: BelowOne = 0.0
    """Chance that a number of x is 0 on its way to A, and others are divided by 1 - dropout; never in evaluation."""
    targets: NotEmpty[tuple[NotEmpty[str], ...]] = ("q_proj", "v_proj")
    """Which matrices: ends of their names in `maxlm.inspect`, with * and ? for parts, as q_proj, mlp/*, blocks/0/*; or
    "all-linear"."""

    @property
    def scale(self) -> float:
        """Of B A."""
        return self.alpha / (self.rank**0.5 if self.rank_stabilized else self.rank)


@config("model.adapter.kind.", changes=Changes.IDENTITY)
class DyLora:
    """LoRA that works at every smaller rank too: in training each row of a batch draws b from 1 to rank and sees the
    first b rows of A and columns of B alone, times alpha / b (Valipour et al. 2022, arXiv:2210.07558, equation 5, where
    a whole batch has one b). In evaluation b = rank; the first b are a `Lora` of that rank and the same alpha."""

    rank: Positive[int] = 8
    """The largest."""
    alpha: Positive[float] = 16.0
    """alpha / b is the scale."""
    targets: NotEmpty[tuple[NotEmpty[str], ...]] = ("q_proj", "v_proj")
    """As of `Lora`."""

    @property
    def scale(self) -> float:
        """In evaluation."""
        return self.alpha / self.rank


@config("model.adapter.kind.", changes=Changes.IDENTITY)
class AdaLora:
    """W x + (alpha / rank) P L Q x with a diagonal L that begins as zeros (Zhang et al. 2023, arXiv:2303.10512,
    equation 3). Of all triplets (a number of L, its column of P, its row of Q) those of least importance are set to 0,
    until `target_rank` are left for each matrix in the mean.

    Importance of a number w is I U (equation 9) with means I of |w dw| and U of |  |w dw| - I  | over steps (equations
    10 and 11); of a triplet it is that of L's plus the means of those of P and of Q (equation 12). The triplets that
    stay after step t, of n matrices: n (target_rank + (rank - target_rank) (1 - (t - warmup) / (steps of the run -
    warmup - final))^3), all of them before `warmup` and n target_rank in the `final` steps (equation 13)."""

    rank: Positive[int] = 12
    """Of each matrix at the beginning."""
    target_rank: Positive[int] = 8
    """Of each matrix at the end, in the mean."""
    alpha: Positive[float] = 16.0
    """alpha / rank is the scale."""
    warmup: NotNegative[int] = 200
    """Steps before any triplet goes."""
    final: NotNegative[int] = 1000
    """Steps at the end in which the triplets that are left are trained."""
    every: Positive[int] = 10
    """Steps between two choices of triplets."""
    beta1: BelowOne = 0.85
    """How much of I stays in a step."""
    beta2: BelowOne = 0.85
    """The same of U."""
    orthogonality: NotNegative[float] = 0.1
    """Weight of |P^T P - 1|^2 + |Q Q^T - 1|^2, the sum over matrices, in the loss (equation 4)."""
    targets: NotEmpty[tuple[NotEmpty[str], ...]] = ("q_proj", "v_proj")
    """As of `Lora`."""

    def __post_init__(self) -> None:
        if self.target_rank > self.rank:
            raise UserError(
                f"model.adapter.kind.target_rank = {self.target_rank} is more than rank = {self.rank}, from which "
                "triplets only go; use a smaller one"
            )

    @property
    def scale(self) -> float:
        """Of P L Q."""
        return self.alpha / self.rank


@config("model.adapter.kind.", changes=Changes.IDENTITY)
class Ia3:
    """Outputs of some matrices, and inputs of others, times learned vectors that begin as ones (Liu et al. 2022,
    arXiv:2205.05638, section 3.3)."""

    targets: tuple[NotEmpty[str], ...] = ("k_proj", "v_proj")
    """Matrices whose outputs are multiplied, biases included; patterns as of `Lora`."""
    inputs_of: tuple[NotEmpty[str], ...] = ("down_proj",)
    """Matrices whose inputs are multiplied (PEFT's feedforward_modules)."""

    def __post_init__(self) -> None:
        if not self.targets + self.inputs_of:
            raise UserError("model.adapter.kind.targets = () and inputs_of = () leave nothing to train; name matrices")


@config("model.adapter.kind.", changes=Changes.IDENTITY)
class Bottleneck:
    """A small MLP with a sum around it: y + scale (U f(D y + d) + u) on what an attention or an MLP makes, before it is
    added to the residual stream (Houlsby et al. 2019, arXiv:1902.00751, section 2.1). U and u begin as zeros, so that
    it begins as its base; in the paper it does so nearly."""

    size: Positive[int] = 64
    """Inner width."""
    activation: Activation = Activation.GELU
    """f."""
    parallel: bool = False
    """It reads what the attention or the MLP reads (after the norm before it, where there is one) in place of what that
    makes (He et al. 2021, arXiv:2110.04366, section 3.3)."""
    scale: Positive[float] = 1.0
    """As in that paper, where parallel ones have 4."""
    targets: NotEmpty[tuple[NotEmpty[str], ...]] = ("o_proj", "down_proj")
    """The last matrices of what they stand at: o_proj is an attention, down_proj an MLP without routed experts."""


@config("model.adapter.kind.encoder.", changes=Changes.IDENTITY)
class MlpEncoder:
    """W2 relu(W1 relu(W0 e)), each with a bias, of each virtual token's vector e (P-tuning, arXiv:2103.10385)."""

    hidden: Positive[int] = 128
    """Inner width."""


@config("model.adapter.kind.encoder.", changes=Changes.IDENTITY)
class LstmEncoder:
    """W1 relu(W0 [f; b]), each with a bias, of what a bidirectional LSTM makes of the vectors of all virtual tokens
    (P-tuning, arXiv:2103.10385, equation 4)."""

    hidden: Positive[int] = 128
    """Width of the LSTM in each direction, and of the layer behind."""


@config("model.adapter.kind.", changes=Changes.IDENTITY)
class PromptTuning:
    """Virtual tokens before each text, whose embeddings are learned (Lester et al. 2021, arXiv:2104.08691). They take
    positions, and count in `model.max_seq_len` and `train.seq_len`."""

    length: Positive[int] = 20
    """Virtual tokens of a text."""
    encoder: MlpEncoder | LstmEncoder | None = None
    """What the embeddings are made by while they are learned; None: they are learned themselves."""


@config("model.adapter.kind.", changes=Changes.IDENTITY)
class PrefixTuning:
    """Virtual tokens before each text, whose keys and values are learned in each layer (prefix tuning, Li & Liang 2021,
    arXiv:2101.00190). Keys have no position of their own; the text's begin behind the virtual tokens."""

    length: Positive[int] = 20
    """Virtual tokens of a text."""
    hidden: Positive[int] | None = 512
    """Width of what makes them while they are learned: W2 tanh(W1 e), each with a bias, for vectors e of this width
    (section 4.3); None: they are learned themselves (P-tuning v2, arXiv:2110.07602)."""


@config("model.adapter.kind.", changes=Changes.IDENTITY)
class LlamaAdapter:
    """Attention in each layer to learned vectors too, with a softmax and a gate of its own: head n makes o + g_n
    softmax(scale q K^T) V of its output o, with K and V by the layer's own projections of the vectors, at no position.
    The gates begin as 0 (LLaMA-Adapter, Zhang et al. 2023, arXiv:2303.16199, equations 6 to 9). There the topmost
    layers alone have vectors, here all do, and the gates say how much of them."""

    length: Positive[int] = 10
    """Vectors of a layer."""
    one_gate: bool = False
    """One gate g for all heads of a layer, as in those equations, in place of one for each, as in the paper's code.
    PEFT has one."""


AdapterKind = Lora | DyLora | AdaLora | Ia3 | Bottleneck | PromptTuning | PrefixTuning | LlamaAdapter
"""The union of the kinds."""


@config("model.adapter.", changes=Changes.IDENTITY)
class Adapter:
    """What is trained beside a base that is not. The base is what `checkpoint.init_from` names."""

    kind: AdapterKind = field(default_factory=Lora)
    """What is added, and where."""
    full: tuple[NotEmpty[str], ...] = ()
    """Arrays of the base that are trained too, as a whole: ends of names, as in `targets` (PEFT's modules_to_save).
    embed, unembed: the tables."""
    base: BaseFormat = BaseFormat.FLOAT32
    """How the rest of the base is held."""

    @property
    def draws(self) -> bool:
        """Whether training draws numbers for it in each step."""
        match self.kind:
            case Lora(dropout=dropout):
                return dropout > 0
            case DyLora():
                return True
            case AdaLora() | Ia3() | Bottleneck() | PromptTuning() | PrefixTuning() | LlamaAdapter():
                return False
            case _:
                assert_never(self.kind)

    @property
    def virtual_tokens(self) -> int:
        """Before each text."""
        match self.kind:
            case PromptTuning(length=length) | PrefixTuning(length=length):
                return length
            case Lora() | DyLora() | AdaLora() | Ia3() | Bottleneck() | LlamaAdapter():
                return 0
            case _:
                assert_never(self.kind)
