"""How the next token is chosen from the model's distribution."""

from __future__ import annotations

import dataclasses
from typing import Annotated

from maxlm.config.errors import UserError
from maxlm.config.fields import FLOAT_MAX, NotNegative, Positive, Range, config


@config("")
class SamplingConfig:
    """Rules are applied in this order, which is that of transformers; those that it lacks stand where llama.cpp has
    them:

    1. a request's logit_bias, added to the logits;
    2. repetition_penalty, then frequency_penalty and presence_penalty, then the DRY penalty;
    3. what must not come: no_repeat_ngram, banned words, ends before min_new_tokens, tokens outside the grammar. Such
       a token's logit becomes -inf, so that nothing before or after can bring it back;
    4. temperature;
    5. truncation, each rule on what the last one left, with probabilities that sum to 1 again: top_k, top_p, min_p,
       typical_p. Temperature comes first, so that the text of a hot model is drawn from more tokens.

    Of equally likely tokens the one with the lower id is preferred. With temperature 0 the likeliest token is taken
    after step 3. A setting at its default changes nothing.
    """

    temperature: Annotated[float, Range(ge=0, note="0 takes the likeliest token")] = 1.0
    """Divides the logits; 0: always the likeliest token (greedy)."""
    top_k: Annotated[int, Range(ge=0, note="0 draws from all tokens")] = 0
    """Draw from this many likeliest tokens (Fan et al. 2018, arXiv:1805.04833); 0: from all."""
    top_p: Annotated[float, Range(gt=0, le=1, note="1 draws from all tokens")] = 1.0
    """Draw from the fewest likeliest tokens that have this much probability (nucleus, arXiv:1904.09751); 1: all."""
    min_p: Annotated[float, Range(ge=0, le=1, note="0 draws from all tokens")] = 0.0
    """Draw from tokens that are at least this many times as likely as the likeliest (arXiv:2407.01082); 0: from all."""
    typical_p: Annotated[float, Range(gt=0, le=1, note="1 draws from all tokens")] = 1.0
    """Draw from the fewest tokens with this much probability whose surprise is nearest to the entropy (locally typical,
    arXiv:2202.00666); 1: all."""
    repetition_penalty: Annotated[float, Range(gt=0, le=100, note="1 changes nothing")] = 1.0
    """Divides the positive logits of tokens that the prompt or the text has, multiplies the negative ones (CTRL,
    arXiv:1909.05858); 1: off."""
    presence_penalty: Annotated[float, Range(ge=-100, le=100, note="0 changes nothing")] = 0.0
    """Taken from the logit of each token that was generated (OpenAI's API reference)."""
    frequency_penalty: Annotated[float, Range(ge=-100, le=100, note="0 changes nothing")] = 0.0
    """Taken from a token's logit as often as it was generated (OpenAI's API reference)."""
    no_repeat_ngram: Annotated[int, Range(ge=0, note="0 allows every repetition")] = 0
    """No so many tokens in a row come twice, in prompt and text together (arXiv:1705.04304, section 2.5); 0: off."""
    dry_multiplier: Annotated[float, Range(ge=0, le=FLOAT_MAX, note="0 changes nothing")] = 0.0
    """DRY penalty (text-generation-webui, pull request 5677): a token that would repeat n tokens and itself loses
    multiplier * base ** (n - allowed_length) of its logit; 0: off."""
    dry_base: Annotated[float, Range(ge=1, le=1000)] = 1.75
    """How fast the DRY penalty grows with the length of what is repeated."""
    dry_allowed_length: Annotated[int, Range(ge=1)] = 2
    """From so many repeated tokens on, the next is penalised."""
    dry_range: Annotated[int, Range(ge=0, note="0 looks at everything")] = 0
    """Tokens before the next one at which the DRY penalty looks; 0: all."""
    dry_breakers: tuple[NotNegative[int], ...] = ()
    """Ids at which what is repeated ends: line breaks, quotes, names of speakers."""
    min_new_tokens: NotNegative[int] = 0
    """The text does not end before so many tokens are generated."""


@config("")
class BeamConfig:
    """Search for the likeliest texts in place of drawing one; `maxlm/inference/beam.py` says how."""

    beams: Annotated[int, Range(ge=0, le=19, note="0 draws, and searches nothing")] = 0
    """Beginnings that are kept after each token; 0: no search, the text is drawn."""
    length_penalty: Annotated[float, Range(ge=-10, le=10, note="0 compares sums of log-probabilities")] = 1.0
    """A text's score is the sum of its log-probabilities / length ** length_penalty: 0 is the sum, 1 the mean; more
    favours longer texts (after arXiv:1609.08144, section 7)."""
    n_best: Positive[int] = 1
    """Texts of the highest score that are wanted."""
    force: tuple[str, ...] = ()
    """Words that must stand in each text, with a space before them or without (arXiv:1804.06609)."""

    def __post_init__(self) -> None:
        if self.beams == 0:
            for name in ("n_best", "length_penalty", "force"):
                if (value := getattr(self, name)) != getattr(BeamConfig, name):
                    raise UserError(f"{name} = {value} is of a search, and beams = 0; set beams, or leave {name} out")
        if self.n_best > max(self.beams, 1):
            raise UserError(f"n_best = {self.n_best} is more than beams = {self.beams}; use at most as many")

    def searched(self, sampling: SamplingConfig) -> SamplingConfig:
        """The rules of `sampling` as a search has them: it draws nothing.

        Raises:
            UserError: no search is asked for, or some setting does not go with it.
        """
        if self.beams == 0:
            raise UserError("beams = 0 searches nothing; use at least 1")
        return _not_drawn(sampling, "beams")


@config("")
class ContrastiveConfig:
    """Contrastive search (Su et al. 2022, arXiv:2202.06417); `maxlm/inference/contrastive.py` says how."""

    contrastive_k: Annotated[int, Range(ge=0, le=20, note="0 draws, and searches nothing")] = 0
    """The likeliest tokens among which the next one is chosen; 0: no search, the text is drawn."""
    contrastive_alpha: Annotated[float, Range(ge=0, le=1, note="0 takes the likeliest token")] = 0.6
    """How much it counts that a token's state is like none before; the rest is its probability."""

    def __post_init__(self) -> None:
        if not self.contrastive_k and self.contrastive_alpha != ContrastiveConfig.contrastive_alpha:
            raise UserError(
                f"contrastive_alpha = {self.contrastive_alpha} is of a search, and contrastive_k = 0; set "
                "contrastive_k, or leave contrastive_alpha out"
            )

    def searched(self, sampling: SamplingConfig) -> SamplingConfig:
        """As `BeamConfig.searched`.

        Raises:
            UserError: no search is asked for, or some setting does not go with it.
        """
        if not self.contrastive_k:
            raise UserError("contrastive_k = 0 searches nothing; use at least 1")
        return _not_drawn(sampling, "contrastive search")


GuidanceScale = Annotated[float, Range(ge=0, le=100, note="1 changes nothing")]


@config("")
class GuidanceConfig:
    """Classifier-free guidance (Ho and Salimans 2022, arXiv:2207.12598; of texts: Sanchez et al. 2023,
    arXiv:2306.17806): log-probabilities are n + scale * (p - n), p after the prompt, n after another one."""

    guidance_scale: GuidanceScale = 1.0
    """How far away from the negative prompt: 1 is without, more follows the prompt more, 0 follows the negative one."""
    negative_prompt: str | None = None
    """What the text shall be unlike; None: the prompt's last token alone."""

    def __post_init__(self) -> None:
        if self.guidance_scale == 1 and self.negative_prompt is not None:
            raise UserError("negative_prompt is of guidance, and guidance_scale = 1; set it, or leave the prompt out")


def _not_drawn(sampling: SamplingConfig, what: str) -> SamplingConfig:
    """The rules as a search has them.

    Raises:
        UserError: some setting does not go with it.
    """
    if sampling.temperature not in (0, 1):
        raise UserError(f"temperature = {sampling.temperature} with {what}: nothing is drawn; leave it out or use 0")
    for name in ("top_k", "top_p", "min_p", "typical_p"):
        if (value := getattr(sampling, name)) != getattr(SamplingConfig, name):
            raise UserError(f"{name} = {value} with {what}: nothing is drawn; leave it out")
    counted = sampling.presence_penalty or sampling.frequency_penalty
    if counted and sampling.repetition_penalty != 1:
        raise UserError(
            f"repetition_penalty = {sampling.repetition_penalty} with {what} does not go with presence_penalty and "
            "frequency_penalty; leave out one or the others"
        )
    return dataclasses.replace(sampling, temperature=0.0)
