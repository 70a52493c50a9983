"""Frozen, keyword-only dataclasses that describe everything a run can do. Nothing here imports jax.

run.py: a whole run, and the rules between its parts
model.py: blocks, attention, remat
ffn.py: gated MLP; mixture of experts: routers, dispatch
families.py: model families as functions from sizes to a model
data.py: documents, tokenizers, mixtures
optimizer.py: AdamW, Adafactor, schedules
sharding.py: sizes of the mesh axes, ZeRO stages, presets
dims.py: the table: which mesh axis cuts which dim of an array
layout_rules.py: what must divide what
sampling.py: temperature, top-k, top-p
cli.py: --config, overrides, one-line errors
serialize.py: configs as JSON and back
errors.py: the exception that users see as a line
"""

from maxlm.config.data import (
    ByteTokenizer,
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
    TokenizerConfig,
    TokenizerSource,
    TrainSentencePiece,
)
from maxlm.config.dims import ACTIVATION_DIMS, CUT_BY_FSDP, PARAMETER_DIMS, Axes, StatePart
from maxlm.config.errors import UserError
from maxlm.config.families import llama, with_experts
from maxlm.config.ffn import (
    Activation,
    Capacity,
    Dispatch,
    Dropless,
    ExpertChoiceRouter,
    FfnConfig,
    GluConfig,
    MoeConfig,
    NoisyTopKRouter,
    Router,
    SigmoidRouter,
    TopKRouter,
)
from maxlm.config.model import (
    AttentionConfig,
    Backend,
    BlockConfig,
    Dtype,
    GluSave,
    KernelConfig,
    Llama3RopeScaling,
    ModelConfig,
    Remat,
    RopeConfig,
)
from maxlm.config.optimizer import (
    Adafactor,
    AdamW,
    ConstantSchedule,
    CosineSchedule,
    InverseSqrtSchedule,
    LinearSchedule,
    OptimizerConfig,
    Schedule,
    WsdSchedule,
)
from maxlm.config.run import CheckpointConfig, ObserveConfig, RunConfig, StepRange, TrainConfig
from maxlm.config.sampling import SamplingConfig
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

__all__ = [
    "ACTIVATION_DIMS",
    "CUT_BY_FSDP",
    "MESH_AXES",
    "PARAMETER_DIMS",
    "Activation",
    "Adafactor",
    "AdamW",
    "AttentionConfig",
    "Axes",
    "Backend",
    "BlockConfig",
    "ByteTokenizer",
    "Capacity",
    "CheckpointConfig",
    "ConstantSchedule",
    "Context",
    "CosineSchedule",
    "DataConfig",
    "Dataset",
    "Dispatch",
    "Documents",
    "Dropless",
    "Dtype",
    "ExpertChoiceRouter",
    "FfnConfig",
    "Files",
    "GluConfig",
    "GluSave",
    "HuggingFaceDataset",
    "HuggingFaceTokenizer",
    "InverseSqrtSchedule",
    "KernelConfig",
    "LinearSchedule",
    "Llama3RopeScaling",
    "ModelConfig",
    "MoeConfig",
    "NoisyTopKRouter",
    "ObserveConfig",
    "OptimizerConfig",
    "PieceModel",
    "PrepareConfig",
    "Remat",
    "RopeConfig",
    "Router",
    "RunConfig",
    "SamplingConfig",
    "Schedule",
    "SentencePieceTokenizer",
    "ShardingConfig",
    "SigmoidRouter",
    "SlicesAxis",
    "StandardLibrary",
    "StatePart",
    "StepRange",
    "TokenizerConfig",
    "TokenizerSource",
    "TopKRouter",
    "TrainConfig",
    "TrainSentencePiece",
    "UserError",
    "WsdSchedule",
    "Zero",
    "dp",
    "fsdp",
    "fsdp_tp",
    "fsdp_tp_sp",
    "llama",
    "pipeline_bubble",
    "pipeline_ticks",
    "with_experts",
]
