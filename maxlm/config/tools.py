"""Tools that a policy may call while it writes."""

from __future__ import annotations

from typing import Annotated

from maxlm.config.fields import Changes, NotEmpty, PathName, Range, config


@config("task.rollouts.tools[].", changes=Changes.IDENTITY)
class Calculator:
    """Numbers with + - * / and brackets; results are rounded to two places (Toolformer, arXiv:2302.04761)."""

    name: NotEmpty[str] = "calculator"
    """What the model calls it."""


@config("task.rollouts.tools[].", changes=Changes.IDENTITY)
class DocsSearch:
    """Passages of documents that are near to a query, as `--docs` of maxlm.serve finds them."""

    docs: PathName
    """Folder of Markdown, text, HTML and PDF files."""
    run: PathName
    """Run, RUN_DIR/checkpoints/STEP, hf:DIR or gguf:FILE of the model that says how near they are. It stays as it is
    while the policy learns."""
    top: Annotated[int, Range(ge=1, le=50)] = 2
    """Passages of an answer, each of 256 tokens at most."""
    name: NotEmpty[str] = "search"
    """What the model calls it."""


RolloutTool = Calculator | DocsSearch
