"""What a run learns: one class a task. `maxlm/recipes/` has one function for each."""

from __future__ import annotations

from dataclasses import field
from typing import Annotated

from maxlm.config.fields import Changes, NotNegative, PathName, Positive, Range, config
from maxlm.config.predictions import CausalLm, Prediction
from maxlm.config.reinforcement import Grpo, Ppo


@config("task.", changes=Changes.IDENTITY)
class Pretrain:
    """Predict the next token of running text, or what else is asked of it.

    What is asked belongs to the task, as it decides what the model can do; a data set that needs another question, such
    as instructions among running text, has a `predict` of its own.
    """

    predict: Prediction = field(default_factory=CausalLm)
    """What is asked of the texts of every data set that does not say it itself."""


@config("task.", changes=Changes.IDENTITY)
class TrainMedusa:
    """Train the heads of `model.medusa` on running text, with everything else as the run that `checkpoint.init_from`
    names has it ("Medusa-1", arXiv:2401.10774, section 2.2.1): the sum over heads k of weight^k times the cross-entropy
    of the token k places after the next."""

    weight: Positive[float] = 0.8
    """Of each head beside the one before it."""


@config("task.gold.", changes=Changes.IDENTITY)
class Gold:
    """Each token weighs max(p^alpha, beta), where p is what the model gives it: what it finds absurd hardly counts
    (GOLD, arXiv:2009.07839, as AlphaCode has it, arXiv:2203.07814, appendix C.3). Nothing is learned through the
    weights."""

    alpha: Positive[float] = 0.5
    """Power of the probability."""
    beta: Annotated[float, Range(gt=0, le=1)] = 0.05
    """The least weight."""


@config("task.", changes=Changes.IDENTITY)
class Sft:
    """Supervised fine-tuning: predict what the assistant wrote, in data that is prepared from `Conversations`. Running
    text among the data sets is learned whole, in proportion to its weight."""

    neftune_alpha: NotNegative[float] = 0.0
    """Noise on the embeddings of a text of L tokens: uniform within alpha / sqrt(L d_model) (NEFTune,
    arXiv:2310.05914, algorithm 1: 5 to 15); 0: none."""
    gold: Gold | None = None
    """Weights of tokens by how likely they are; None: each weighs the same."""


@config("task.loss.", changes=Changes.IDENTITY)
class Dpo:
    """Log-ratios of whole texts, chosen above rejected (DPO, arXiv:2305.18290, equation 7)."""

    beta: Positive[float] = 0.1
    """How dear it is to leave the reference."""
    label_smoothing: Annotated[float, Range(ge=0, lt=0.5)] = 0.0
    """How likely it is that a pair is in the wrong order ("conservative DPO")."""
    nll_weight: NotNegative[float] = 0.0
    """Of the chosen text's own loss, a mean over its tokens (Llama 3, arXiv:2407.21783, section 4.1.4: 0.2)."""
    mask_special: bool = False
    """Leave special tokens, such as those that end a turn, out of the log-ratios, though not out of the chosen text's
    own loss (Llama 3, as above: they stand in both texts, so that their loss pulls both ways)."""


@config("task.loss.", changes=Changes.IDENTITY)
class Ipo:
    """Log-ratios of whole texts, sums over tokens as in the paper, 1 / (2 tau) apart (IPO, arXiv:2310.12036, equation
    17)."""

    tau: Positive[float] = 0.1
    """How dear it is to leave the reference."""


@config("task.loss.", changes=Changes.IDENTITY)
class Kto:
    """Texts that are desired or not, without pairs (KTO, arXiv:2402.01306, equation 8). The data has labels: {prompt,
    completion, label}."""

    beta: Positive[float] = 0.1
    """How soon losses and gains stop to count."""
    desired_weight: Positive[float] = 1.0
    """Of desired texts; times their number it is to be 1 to 4/3 times the same of the others (section 4.2)."""
    undesired_weight: Positive[float] = 1.0
    """Of the others."""


@config("task.loss.", changes=Changes.IDENTITY)
class Orpo:
    """The chosen text's own loss, and the odds of the two, by log-probabilities that are means over tokens, without a
    reference (ORPO, arXiv:2403.07691, equations 6 and 7)."""

    weight: Positive[float] = 0.1
    """lambda, of the odds."""


@config("task.loss.", changes=Changes.IDENTITY)
class SimPo:
    """Log-probabilities that are means over tokens, without a reference (SimPO, arXiv:2405.14734, equation 6)."""

    beta: Positive[float] = 2.0
    """Factor of their difference."""
    gamma: NotNegative[float] = 1.0
    """What the chosen one is to be ahead by."""


PreferenceLoss = Dpo | Ipo | Kto | Orpo | SimPo


@config("task.", changes=Changes.IDENTITY)
class Preference:
    """Learn which of several completions of a prompt is the better one, from data with {prompt, chosen, rejected} or
    rankings; with `Kto` from labels."""

    loss: PreferenceLoss = field(default_factory=Dpo)
    """What is made of the log-probabilities."""
    reference: PathName | None = None
    """Run, RUN_DIR/checkpoints/STEP, hf:DIR or gguf:FILE of the model that the policy is held to; None: what
    `checkpoint.init_from` names. Orpo and SimPo have none."""
    reference_ahead: bool = False
    """Compute what the reference says of each text once, before the first step, and keep it beside the data; then it
    takes neither time nor memory in a step."""


@config("task.", changes=Changes.IDENTITY)
class DistillContext:
    """Learn to answer as a model that is told a context does, without being told: the sum over the answers' tokens of
    KL(told || untold), over the whole vocabulary (context distillation, arXiv:2112.00861, section 2.2). From data with
    purpose = context."""

    reference: PathName | None = None
    """Run, RUN_DIR/checkpoints/STEP, hf:DIR or gguf:FILE of the model that is told the context, and is not trained;
    None: what `checkpoint.init_from` names."""


@config("task.loss.", changes=Changes.IDENTITY)
class BradleyTerry:
    """All pairs of a ranking, which weigh 1 together: -log sigmoid(better - worse - m) (InstructGPT, arXiv:2203.02155,
    equation 1)."""

    margin: NotNegative[float] = 0.0
    """m for each point that the ratings of the two are apart (Llama 2, arXiv:2307.09288, equation 2 and table 27)."""


@config("task.loss.", changes=Changes.IDENTITY)
class BinaryReward:
    """Texts that are good (1) or bad (0), each by itself: -log sigmoid(reward) or -log sigmoid(-reward)
    (arXiv:2112.00861, section 4)."""


RewardLoss = BradleyTerry | BinaryReward


@config("task.", changes=Changes.IDENTITY)
class Reward:
    """Learn a number for each completion: how good people find it. With a `ScalarHead`."""

    loss: RewardLoss = field(default_factory=BradleyTerry)
    """What is made of the numbers."""
    lm_weight: NotNegative[float] = 0.0
    """Of the good texts' own loss, a mean over the tokens of each, beside that of the numbers (preference model
    pre-training, arXiv:2112.00861, section 4: 1). Needs `model.head.lm`."""


@config("task.", changes=Changes.IDENTITY)
class Classify:
    """Learn the class of each text, from the state of its last token. With a `ClassHead`."""

    lm_weight: NotNegative[float] = 0.0
    """Of the text's own loss, a mean over the tokens of each (GPT-1, Radford et al. 2018, section 3.2: 0.5). Needs
    `model.head.lm`."""


@config("task.", changes=Changes.IDENTITY)
class Embed:
    """Learn vectors: each query nearer to its own passage than to all others of the batch, and the other way round
    (InfoNCE as CLIP has it, arXiv:2103.00020, figure 3). With an `EmbedHead`."""


Task = Pretrain | Sft | TrainMedusa | DistillContext | Preference | Reward | Classify | Embed | Grpo | Ppo
"""The union of the tasks."""
