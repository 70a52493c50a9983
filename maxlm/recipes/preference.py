"""Preference optimisation: a policy that is moved toward what people prefer, with or without a reference."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any, assert_never

from maxlm.checkpoint.reference import Reference
from maxlm.config import Dpo, Ipo, Kto, Orpo, Preference, Purpose, RunConfig, SimPo, UserError
from maxlm.config.task_rules import under_adapter
from maxlm.data.tokenizers import Tokenizer
from maxlm.evaluation.judgements import judge_labelled_ratios, judge_log_probs, judge_ratios
from maxlm.inference.load import LoadedRun
from maxlm.recipes.held_to import ReferenceModel, log_probs_ahead
from maxlm.recipes.of_texts import Splits, open_splits, recipe_of_texts
from maxlm.sharding import Layout
from maxlm.training.loop import Recipe
from maxlm.training.preference_objective import AHEAD, LabelledTexts, PairedTexts, Referenced


def recipe(config: RunConfig, task: Preference, layout: Layout) -> Recipe[LoadedRun]:
    """
    Raises:
        UserError: the data is not there, is damaged, too small, was prepared for another purpose, or has more ids than
            the model; or the reference is not there, is damaged, or has another tokenizer.
    """
    splits = open_splits(config, Purpose.KTO if isinstance(task.loss, Kto) else Purpose.PREFERENCE)
    tokenizer = splits.train.tokenizer
    match task.loss:
        case Orpo() | SimPo() as loss:
            alone = lambda config, texts: PairedTexts(config, layout, texts, loss)
            return recipe_of_texts(config, layout, splits, alone, judge_log_probs)
        case Dpo() | Ipo() | Kto():
            pass
        case _:
            assert_never(task.loss)
    place = task.reference or config.checkpoint.init_from
    assert place is not None, "RunConfig.validate asks for one"
    try:
        reference = ReferenceModel(place, tokenizer.fingerprint)
    except UserError as error:
        raise UserError(f"the reference {place}: {error}") from error
    special = _special_ids(tokenizer) if isinstance(task.loss, Dpo) and task.loss.mask_special else ()

    under = under_adapter(task, config.model)

    def make(config: RunConfig, texts: int, *, ahead: bool = task.reference_ahead, under: bool = under) -> Referenced:
        held: dict[str, Any] = {"special_ids": special}
        held |= {"ahead": True} if ahead else {"under": True} if under else {"reference": reference.model}
        match task.loss:
            case Kto() as loss:
                return LabelledTexts(config, layout, texts, loss, **held)
            case Dpo() | Ipo() as loss:
                return PairedTexts(config, layout, texts, loss, **held)
            case _:
                raise AssertionError("has no reference")

    judge = judge_labelled_ratios if isinstance(task.loss, Kto) else judge_ratios
    if task.reference_ahead:
        live = make(config, splits.texts, ahead=False, under=False)
        choice = f"{special} {config.execution.dtype}"
        ask = functools.partial(_ask_ahead, reference, live, layout, splits, Path(config.data.datasets[0].path), choice)
        return recipe_of_texts(config, layout, splits, make, judge, frozen=ask)
    return recipe_of_texts(config, layout, splits, make, judge, frozen=None if under else reference.read)


def _ask_ahead(
    reference: ReferenceModel,
    live: Referenced,
    layout: Layout,
    splits: Splits,
    folder: Path,
    choice: str,
    shapes: None,
    saved: dict[str, Any] | None,
) -> tuple[None, Reference]:
    """Puts what the reference says of each text beside the texts; as of `Recipe.frozen`, with nothing to be held."""
    parameters, found = reference.read(live.frozen, saved)
    for batches in splits:
        if batches is not None:
            batches.beside[AHEAD] = log_probs_ahead(parameters, found, live, layout, batches, folder, choice)
    return None, found


def _special_ids(tokenizer: Tokenizer) -> tuple[int, ...]:
    """Of tokens that are no text."""
    ends = [one for one in (tokenizer.bos_id, tokenizer.eos_id) if one is not None]
    return tuple(sorted({*tokenizer.specials.values(), *ends}))
