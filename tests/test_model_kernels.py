"""The model over the kernels: every config trains through them, on any mesh."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
from helpers import one_device, small_model, small_run, with_attention
from test_layouts import assert_close, loss_and_gradients

from kernels_pallas import flash_attention, fused_glu, plan_glu
from maxlm.config import Backend, GluSave, KernelConfig, ModelConfig, ShardingConfig, UserError
from maxlm.sharding import make_layout


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    """A named kernel runs in Pallas' interpreter."""

    def in_interpreter(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, backend, **options: function(
            *args, backend=backend, interpret=backend in ("tpu", "gpu"), **options
        )

    for module, function in (
        ("attention", flash_attention),
        ("ring", flash_attention),
        ("dense", fused_glu),
        ("dense", plan_glu),
    ):
        importer = importlib.import_module(f"maxlm.models.ops.{module}")
        monkeypatch.setattr(importer, function.__name__, in_interpreter(function))


def model(**kernels: Any) -> ModelConfig:
    return with_attention(small_model(kernels=KernelConfig(**kernels)), window=20)


@pytest.fixture(scope="module")
def without_kernels() -> Any:
    return loss_and_gradients(small_run(model()), one_device())


@pytest.mark.parametrize(
    ("sharding", "glu_save"),
    [  # both ways to save on one device, and each of them on meshes
        pytest.param(ShardingConfig(), GluSave.NONE, id="none"),
        pytest.param(ShardingConfig(), GluSave.AG, id="ag"),
        pytest.param(ShardingConfig(data=2, fsdp=2, tensor=2), GluSave.AG, id="data_fsdp_tensor-ag"),
        pytest.param(ShardingConfig(data=1, seq=4, tensor=2), GluSave.NONE, id="seq_tensor-none"),
        pytest.param(ShardingConfig(data=2, stage=2, tensor=2), GluSave.NONE, id="data_stage_tensor-none"),
    ],
)
def test_kernels_train_like_xla(
    sharding: ShardingConfig, glu_save: GluSave, interpreted: None, without_kernels: Any
) -> None:
    kernels = model(attention=Backend.TPU, glu=Backend.TPU, glu_save=glu_save)
    got = loss_and_gradients(small_run(kernels, sharding), make_layout(sharding))
    assert_close(got, without_kernels, 2e-5)


def test_a_backend_that_is_not_here_is_an_error() -> None:
    config = small_run(model(attention=Backend.TPU))
    with pytest.raises(
        UserError, match=r"execution.kernels.attention = tpu, but backend = 'tpu' cannot run this.* use xla"
    ):
        loss_and_gradients(config, make_layout(ShardingConfig()))
    with pytest.raises(UserError, match=r"execution.kernels.glu = cudnn does not exist; use auto"):
        KernelConfig(glu=Backend.CUDNN)
