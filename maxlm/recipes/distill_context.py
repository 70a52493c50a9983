"""Context distillation: to answer as a model does that is told a context, without being told."""

from __future__ import annotations

from maxlm.config import DistillContext, Purpose, RunConfig, UserError
from maxlm.config.task_rules import under_adapter
from maxlm.inference.load import LoadedRun
from maxlm.recipes.held_to import ReferenceModel
from maxlm.recipes.of_texts import open_splits, recipe_of_texts
from maxlm.sharding import Layout
from maxlm.training.context_objective import UntoldTexts
from maxlm.training.loop import Recipe


def recipe(config: RunConfig, task: DistillContext, layout: Layout) -> Recipe[LoadedRun]:
    """
    Raises:
        UserError: the data is not there, is damaged, too small, was prepared for another purpose, has more ids than the
            model, or records that are longer than a window; or the reference is not there, is damaged, or has another
            tokenizer or vocabulary.
    """
    splits = open_splits(config, Purpose.CONTEXT)
    for split in splits:
        if split is not None and split.shortened:
            half = config.train.seq_len // 2
            raise UserError(
                f"{config.data.datasets[0].path}: {split.shortened} records are longer than train.seq_len = "
                f"{config.train.seq_len}, with and without their context together; train with a larger one, or prepare "
                f"the data with prepare.documents.max_tokens = {half}"
            )
    place = task.reference or config.checkpoint.init_from
    assert place is not None, "RunConfig.validate asks for one"
    try:
        reference = ReferenceModel(place, splits.train.tokenizer.fingerprint)
    except UserError as error:
        raise UserError(f"the reference {place}: {error}") from error
    here, there = config.model.vocab_size, reference.model.vocab_size
    if here != there:
        raise UserError(f"the reference {place}: has model.vocab_size = {there}, here it is {here}; use that of both")
    if under_adapter(task, config.model):
        under = lambda config, texts: UntoldTexts(config, layout, texts, under=True)
        return recipe_of_texts(config, layout, splits, under, lambda texts: {})
    beside = lambda config, texts: UntoldTexts(config, layout, texts, reference=reference.model)
    return recipe_of_texts(config, layout, splits, beside, lambda texts: {}, frozen=reference.read)
