"""What is said when memory runs out."""

from __future__ import annotations

import jax
import pytest
from helpers import small_run

from maxlm import train
from maxlm.config import UserError
from maxlm.plan.exhausted import describe_exhausted, is_exhausted
from maxlm.plan.machines import Platform
from maxlm.plan.memory import estimate_memory

REFUSAL = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 123 bytes.\nmore")


def test_the_largest_parts_come_first_each_with_its_keys() -> None:
    config = small_run()
    line = describe_exhausted(config, REFUSAL)
    parts = estimate_memory(config, jax.device_count(), Platform.CPU).at_peak
    first, second, third = sorted(parts, key=lambda name: -parts[name])[:3]
    assert line.startswith("out of memory (Out of memory allocating 123 bytes. more)") and "\n" not in line
    assert 0 < line.index(f"for {first} ") < line.index(f"; {second} ") < line.index(f"; {third} ")
    assert "sharding.fsdp" in line


@pytest.mark.parametrize(
    ("error", "is_so"),
    [(REFUSAL, True), (MemoryError(), True), (ValueError("shapes differ"), False), (OSError(28, "No space"), False)],
)
def test_what_is_a_lack_of_memory(error: Exception, is_so: bool) -> None:
    assert is_exhausted(error) is is_so


def test_the_command_ends_with_that_line_and_1(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(config: object, allow_change: object, functions: object) -> None:
        raise REFUSAL

    monkeypatch.setattr(train, "main", run)
    with pytest.raises(UserError, match=r"out of memory .*most of it for") as caught:
        train.command(["--config", "configs/tiny.py"])
    assert caught.value.exit_code == 1
