"""Frozen, keyword-only dataclasses that describe everything a run can do. Nothing here imports jax.

run.py: a whole run, and the rules between its parts
adapter.py: few parameters in place of all
model.py: blocks and what joins them, heads
norm.py: RMSNorm, LayerNorm
position.py: RoPE, ALiBi, relative bias; embedded positions
attention.py: heads, window, biases
mlp.py: plain and gated MLP
mixture.py: mixtures of experts: routers, dispatch
execution.py: number formats, remat, kernels
remat.py: which named results each remat policy keeps
families.py: model families as functions from sizes to a model
predictions.py: what is asked of running text
prediction_rules.py: what that needs of the rest
task.py: what a run learns
reinforcement.py: what runs learn that learn from rewards
task_rules.py: what a task needs of the rest
kl.py: what it costs a policy to leave its reference
policy.py: advantages of a policy's samples, weights of their tokens
data.py: documents, tokenizers, mixtures
weighting.py: weights of data sets as papers say them
phases.py: what changes while a run goes on, and going back from a spike
purposes.py: what records of conversations are for
rewards.py: what is good in a completion
tools.py: what a policy may call while it writes
quantization.py: ways to make weights smaller
optimizer.py: AdamW, Adafactor, Lion, Muon, SGD; groups of parameters, their average
schedule.py: learning rates as functions of the step
sharding.py: sizes of the mesh axes, ZeRO stages, presets
dims.py: the table: which mesh axis cuts which dim of an array
layout_rules.py: what must divide what
chosen.py: the model that a command is for
sampling.py: how the next token is drawn, or a text searched for
docs_search.py: documents that a model answers from
synthesis.py: what writes records with a model
engine.py: texts at once, and room for them
speculation.py: where drafts of texts come from
changes.py: what a run may go on with, and what it is told
cli.py: --config, overrides, how a command ends
complaints.py: mistakes on a command line, in one line
python_file.py: a config file in Python, and mistakes in it
stability.py: float16's loss scale, spikes, the gradient's noise
serialize.py: configs as JSON and back
json_file.py: JSON of ours, read with limits
earlier.py: keys and classes of earlier formats
fields.py: what a field takes, the checker of it, help
errors.py: the exception that users see as a line
"""

from typing import Any

from maxlm.config import earlier
from maxlm.config.adapter import (
    ALL_LINEAR,
    AdaLora,
    Adapter,
    AdapterKind,
    BaseFormat,
    Bottleneck,
    DyLora,
    Ia3,
    LlamaAdapter,
    Lora,
    LstmEncoder,
    MlpEncoder,
    PrefixTuning,
    PromptTuning,
)
from maxlm.config.attention import Attention, FixedPattern, GroupedQuery, LatentAttention, QkNorm, StridedPattern
from maxlm.config.chosen import ChosenModel
from maxlm.config.data import (
    ByteTokenizer,
    Conversations,
    DataConfig,
    Dataset,
    Documents,
    Files,
    HuggingFaceDataset,
    HuggingFaceTokenizer,
    PieceModel,
    PrepareConfig,
    SentencePieceTokenizer,
    StandardLibrary,
    Stretch,
    TokenizerConfig,
    TokenizerSource,
    TrainSentencePiece,
)
from maxlm.config.dims import ACTIVATION_DIMS, CUT_BY_FSDP, PARAMETER_DIMS, Axes, StatePart
from maxlm.config.docs_search import DocumentsConfig
from maxlm.config.engine import CacheFormat, EngineConfig
from maxlm.config.errors import UserError
from maxlm.config.execution import (
    Backend,
    CurrentScaling,
    DelayedScaling,
    Dtype,
    ExecutionConfig,
    Float8Products,
    GluSave,
    Int8Products,
    KernelConfig,
    PlainProducts,
    Products,
    Remat,
    RoundedWeights,
    WeightFormat,
)
from maxlm.config.families import gpt, llama, palm, with_experts
from maxlm.config.kl import AdaptiveKl, FixedKl, KlController, KlEstimator
from maxlm.config.mixture import (
    Capacity,
    Dispatch,
    Dropless,
    ExpertChoiceRouter,
    ExpertGroups,
    Experts,
    NoisyTopKRouter,
    Router,
    SigmoidRouter,
    TopKRouter,
)
from maxlm.config.mlp import Activation, GatedMlp, Mlp, Nonlinearity, Swish
from maxlm.config.model import (
    BlockConfig,
    ClassHead,
    DeepNorm,
    EmbedHead,
    Head,
    LmHead,
    MedusaHeads,
    MlpConfig,
    ModelConfig,
    MtpModules,
    OutputNorm,
    Parallel,
    Pooling,
    PostNorm,
    PreNorm,
    Residual,
    ResidualInit,
    Sandwich,
    ScalarHead,
)
from maxlm.config.norm import LayerNorm, Norm, RmsNorm
from maxlm.config.optimizer import (
    Adafactor,
    AdamW,
    EightBitMoments,
    Ema,
    HasDim,
    Lion,
    Muon,
    MuonScale,
    NameMatches,
    OptimizerConfig,
    ParameterFormat,
    ParameterGroup,
    Sgd,
)
from maxlm.config.phases import Phase, Recovered, Rollback, linear_ramp
from maxlm.config.policy import Advantage, Aggregation, BatchMean, GroupMean, LeaveOneOut
from maxlm.config.position import (
    Alibi,
    DynamicNtkScaling,
    EmbeddedPosition,
    GlmRope,
    Learned,
    LinearScaling,
    Llama3RopeScaling,
    LongRopeScaling,
    NtkScaling,
    Position,
    RelativeBias,
    RelativeSinusoids,
    Rope,
    RopeScaling,
    Sinusoidal,
    YarnScaling,
)
from maxlm.config.predictions import (
    BlankInfilling,
    CausalLm,
    FillInMiddle,
    GapPositions,
    MaskedLm,
    MiddleLevel,
    Mixed,
    Prediction,
    PrefixLm,
    Share,
    SinglePrediction,
    SpanCorruption,
    SuffixInfilling,
    special_tokens,
    ul2,
)
from maxlm.config.purposes import Counted, Purpose
from maxlm.config.quantization import QuantMethod
from maxlm.config.reinforcement import Grpo, Ppo, Reinforced, Rollouts
from maxlm.config.rewards import (
    BadReward,
    ExactReward,
    FormatReward,
    FunctionReward,
    JudgeReward,
    LengthReward,
    ModelReward,
    NumberReward,
    PatternReward,
    ProgramReward,
    RewardSource,
    SchemaReward,
)
from maxlm.config.run import CheckpointConfig, LimitsConfig, ObserveConfig, RunConfig, StepRange, TrainConfig
from maxlm.config.sampling import BeamConfig, ContrastiveConfig, GuidanceConfig, SamplingConfig
from maxlm.config.schedule import (
    ConstantSchedule,
    CosineSchedule,
    Decay,
    Drop,
    InverseSqrtSchedule,
    LinearSchedule,
    MultiStepSchedule,
    Schedule,
    WsdSchedule,
)
from maxlm.config.sharding import (
    MESH_AXES,
    Context,
    ShardingConfig,
    SlicesAxis,
    Zero,
    dp,
    fsdp,
    fsdp_tp,
    fsdp_tp_sp,
    pipeline_bubble,
    pipeline_ticks,
)
from maxlm.config.speculation import DraftModel, Medusa, PromptLookup, Speculation
from maxlm.config.stability import LossScale, NoiseScale, SpikeRule
from maxlm.config.task import (
    BinaryReward,
    BradleyTerry,
    Classify,
    DistillContext,
    Dpo,
    Embed,
    Gold,
    Ipo,
    Kto,
    Orpo,
    Preference,
    PreferenceLoss,
    Pretrain,
    Reward,
    RewardLoss,
    Sft,
    SimPo,
    Task,
    TrainMedusa,
)
from maxlm.config.tools import Calculator, DocsSearch, RolloutTool

__all__ = [
    "ACTIVATION_DIMS",
    "CUT_BY_FSDP",
    "MESH_AXES",
    "PARAMETER_DIMS",
    "Activation",
    "AdaLora",
    "Adafactor",
    "AdamW",
    "Adapter",
    "AdapterKind",
    "AdaptiveKl",
    "Advantage",
    "Aggregation",
    "Alibi",
    "Attention",
    "Axes",
    "Backend",
    "BadReward",
    "BaseFormat",
    "BatchMean",
    "BeamConfig",
    "BinaryReward",
    "BlankInfilling",
    "BlockConfig",
    "Bottleneck",
    "BradleyTerry",
    "ByteTokenizer",
    "CacheFormat",
    "Calculator",
    "Capacity",
    "CausalLm",
    "CheckpointConfig",
    "ChosenModel",
    "ClassHead",
    "Classify",
    "ConstantSchedule",
    "Context",
    "ContrastiveConfig",
    "Conversations",
    "CosineSchedule",
    "Counted",
    "CurrentScaling",
    "DataConfig",
    "Dataset",
    "Decay",
    "DeepNorm",
    "DelayedScaling",
    "Dispatch",
    "DistillContext",
    "DocsSearch",
    "Documents",
    "DocumentsConfig",
    "Dpo",
    "DraftModel",
    "Drop",
    "Dropless",
    "Dtype",
    "DyLora",
    "DynamicNtkScaling",
    "EightBitMoments",
    "Ema",
    "Embed",
    "EmbedHead",
    "EmbeddedPosition",
    "EngineConfig",
    "ExactReward",
    "ExecutionConfig",
    "ExpertChoiceRouter",
    "ExpertGroups",
    "Experts",
    "Files",
    "FillInMiddle",
    "FixedKl",
    "FixedPattern",
    "Float8Products",
    "FormatReward",
    "FunctionReward",
    "GapPositions",
    "GatedMlp",
    "GlmRope",
    "GluSave",
    "Gold",
    "GroupMean",
    "GroupedQuery",
    "Grpo",
    "GuidanceConfig",
    "HasDim",
    "Head",
    "HuggingFaceDataset",
    "HuggingFaceTokenizer",
    "Ia3",
    "Int8Products",
    "InverseSqrtSchedule",
    "Ipo",
    "JudgeReward",
    "KernelConfig",
    "KlController",
    "KlEstimator",
    "Kto",
    "LatentAttention",
    "LayerNorm",
    "Learned",
    "LeaveOneOut",
    "LengthReward",
    "LimitsConfig",
    "LinearScaling",
    "LinearSchedule",
    "Lion",
    "Llama3RopeScaling",
    "LlamaAdapter",
    "LmHead",
    "LongRopeScaling",
    "Lora",
    "LossScale",
    "LstmEncoder",
    "MaskedLm",
    "Medusa",
    "MedusaHeads",
    "MiddleLevel",
    "Mixed",
    "Mlp",
    "MlpConfig",
    "MlpEncoder",
    "ModelConfig",
    "ModelReward",
    "MtpModules",
    "MultiStepSchedule",
    "Muon",
    "MuonScale",
    "NameMatches",
    "NoiseScale",
    "NoisyTopKRouter",
    "Nonlinearity",
    "Norm",
    "NtkScaling",
    "NumberReward",
    "ObserveConfig",
    "OptimizerConfig",
    "Orpo",
    "OutputNorm",
    "Parallel",
    "ParameterFormat",
    "ParameterGroup",
    "PatternReward",
    "Phase",
    "PieceModel",
    "PlainProducts",
    "Pooling",
    "Position",
    "PostNorm",
    "Ppo",
    "PreNorm",
    "Prediction",
    "Preference",
    "PreferenceLoss",
    "PrefixLm",
    "PrefixTuning",
    "PrepareConfig",
    "Pretrain",
    "Products",
    "ProgramReward",
    "PromptLookup",
    "PromptTuning",
    "Purpose",
    "QkNorm",
    "QuantMethod",
    "Recovered",
    "Reinforced",
    "RelativeBias",
    "RelativeSinusoids",
    "Remat",
    "Residual",
    "ResidualInit",
    "Reward",
    "RewardLoss",
    "RewardSource",
    "RmsNorm",
    "Rollback",
    "RolloutTool",
    "Rollouts",
    "Rope",
    "RopeScaling",
    "RoundedWeights",
    "Router",
    "RunConfig",
    "SamplingConfig",
    "Sandwich",
    "ScalarHead",
    "Schedule",
    "SchemaReward",
    "SentencePieceTokenizer",
    "Sft",
    "Sgd",
    "ShardingConfig",
    "Share",
    "SigmoidRouter",
    "SimPo",
    "SinglePrediction",
    "Sinusoidal",
    "SlicesAxis",
    "SpanCorruption",
    "Speculation",
    "SpikeRule",
    "StandardLibrary",
    "StatePart",
    "StepRange",
    "Stretch",
    "StridedPattern",
    "SuffixInfilling",
    "Swish",
    "Task",
    "TokenizerConfig",
    "TokenizerSource",
    "TopKRouter",
    "TrainConfig",
    "TrainMedusa",
    "TrainSentencePiece",
    "UserError",
    "WeightFormat",
    "WsdSchedule",
    "YarnScaling",
    "Zero",
]
__all__ += ["dp", "fsdp", "fsdp_tp", "fsdp_tp_sp", "gpt", "linear_ramp", "llama", "palm", "pipeline_bubble"]
__all__ += ["ALL_LINEAR", "pipeline_ticks", "special_tokens", "ul2", "with_experts"]


def __getattr__(name: str) -> Any:
    """A class by its name of an earlier version."""
    if name in earlier.CLASSES:
        earlier.tell(f"maxlm.config.{name}", earlier.CLASSES[name])
        return globals()[earlier.CLASSES[name]]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
