"""Pipelines as papers have them, by name."""

from __future__ import annotations

import difflib
from collections.abc import Callable

from maxlm.config.cleaning.cleaning_pipeline import CleaningPipeline
from maxlm.config.cleaning.text_steps import NormaliseUnicode
from maxlm.config.errors import UserError


def fineweb() -> CleaningPipeline:
    return CleaningPipeline(steps=(NormaliseUnicode(),))


RECIPES: dict[str, Callable[[], CleaningPipeline]] = {"fineweb": fineweb}


def cleaning_recipe(name: str) -> CleaningPipeline:
    """The pipeline of that name.

    Raises:
        UserError: there is none.
    """
    if name not in RECIPES:
        near = difflib.get_close_matches(name, RECIPES, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UserError(f"--recipe {name}: must be one of {', '.join(RECIPES)}{hint}")
    return RECIPES[name]()
