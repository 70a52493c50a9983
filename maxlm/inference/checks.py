"""What an engine does not take."""

from __future__ import annotations

from typing import TYPE_CHECKING

from maxlm.config import LmHead, RunConfig, UserError
from maxlm.config.fields import require
from maxlm.config.prediction_rules import masked_alone
from maxlm.config.sampling import GuidanceScale
from maxlm.data.text_ends import TextEnds
from maxlm.data.tokenizers import Tokenizer
from maxlm.inference.request import BadRequest, Request

if TYPE_CHECKING:
    from maxlm.inference.load import LoadedRun


def check_lengths(
    prompt: int, new: int, limit: int, *, key: str = "max_new_tokens", prompt_key: str = "the prompt"
) -> None:
    """
    Raises:
        UserError: so many tokens of a prompt and so many new ones are more than the model is meant for.
    """
    if prompt + new <= limit:
        return
    remedies = [f"use {key} <= {limit - prompt}"] if prompt < limit else []
    if new < limit:
        remedies.append(f"shorten {prompt_key} to at most {limit - new} tokens")
    remedy = " or ".join(remedies) or "shorten both"
    raise UserError(
        f"{prompt_key}'s {prompt} tokens and {key} = {new} make {prompt + new}, more than model.max_seq_len = {limit}; "
        f"{remedy}"
    )


def check_prompt(run: LoadedRun, prompt: str, max_new_tokens: int) -> None:
    """What needs no engine to be known, which takes time to make.

    Raises:
        UserError: the prompt is not UTF-8, or it and what is to follow are more than the model is meant for.
    """
    ids = prompt_ids(run.ends or TextEnds.of_documents(run.tokenizer), run.tokenizer, prompt)
    check_lengths(len(ids), max_new_tokens, run.config.model.max_seq_len)


def prompt_ids(ends: TextEnds, tokenizer: Tokenizer, text: str) -> tuple[int, ...]:
    """What a continuation of a text starts from, as texts of the model begin.

    Raises:
        BadRequest: it is not UTF-8.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:  # bytes of a command line that are not UTF-8 arrive as half characters
        raise BadRequest(f"prompt = {text[:40]!r}: character {error.start} is not UTF-8; give UTF-8") from error
    return tuple(ends.prompt_ids(tokenizer, text))


def check_guided(request: Request, twin: Request, limit: int, slots: int) -> None:
    """
    Args:
        request: one with guidance.
        twin: its own.
        limit: tokens of a text.
        slots: texts in a step.

    Raises:
        UserError: a number is out of range, or there is no room for two texts.
    """
    require("guidance_scale", request.guidance_scale, GuidanceScale)
    check_lengths(len(twin.prompt), twin.max_new_tokens, limit, prompt_key="negative_prompt")
    if slots < 2:
        raise UserError(
            f"guidance_scale = {request.guidance_scale} takes two slots, and a step has {slots}; start the engine with "
            "engine.slots of at least 2"
        )


def check_learned(run: RunConfig) -> None:
    """
    Raises:
        UserError: the run learned nothing of a next token, so what the model says of one means nothing.
    """
    if key := masked_alone(run.task, run.data.datasets):
        raise UserError(
            f"{key} = MaskedLm is all that the model has learned, so it cannot write; use a run with another "
            "prediction, or measure this one's held-out loss with python -m maxlm.evaluate"
        )


def check_model(run: RunConfig, needed: int) -> None:
    """
    Raises:
        UserError: the model cannot go on with texts or has not learned to, or knows fewer ids than these have.
    """
    model = run.model
    if not isinstance(model.head, LmHead):
        raise UserError(f"model.head = {type(model.head).__name__} gives no logits; use a run with an LmHead")
    check_learned(run)
    if needed > model.vocab_size:
        raise UserError(
            f"model.vocab_size = {model.vocab_size} is less than the tokenizer's {needed}; use the "
            "tokenizer that the model was trained with"
        )
    if not model.decodes:
        raise UserError(
            f"{model.looks_ahead}: such a model looks at later tokens and cannot decode; "
            "measure it with python -m maxlm.evaluate"
        )
