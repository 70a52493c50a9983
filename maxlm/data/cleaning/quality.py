"""Rules of quality for text: Gopher's, FineWeb's, and those for Chinese."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import chain

from maxlm.config.cleaning.rule_steps import ChineseQuality, FineWebQuality, GopherQuality
from maxlm.data.cleaning.findings import Finding, Limit, Page, measured
from maxlm.data.cleaning.repetition import repeated_ngrams, share
from maxlm.data.cleaning.text_features import TextFeatures, features

BULLETS = ("•", "-")
"""Datatrove's; the paper says "bullet point"."""
ELLIPSES = ("...", "…")
_CHINESE = re.compile("[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003134f]+")


class GopherQualityRules:
    """See `GopherQuality`."""

    def __init__(self, config: GopherQuality) -> None:
        self._stop_words = [{word.lower(), word.capitalize(), word.upper()} for word in config.stop_words]
        self.limits = (
            Limit("words", config.least_words, config.most_words, "words"),
            Limit("mean word length", config.shortest_mean_word, config.longest_mean_word, "characters"),
            Limit("# to words", most=config.most_symbols, unit="a word"),
            Limit("ellipses to words", most=config.most_symbols, unit="a word"),
            Limit("lines with a bullet", most=config.most_bullet_lines),
            Limit("lines that end in an ellipsis", most=config.most_ellipsis_lines),
            Limit("words with a letter", config.least_alphabetic_words),
            Limit("stop words", config.least_stop_words, unit="different words"),
        )

    def __call__(self, page: Page) -> Finding:
        return Finding(measured(self.limits, self._values(features(page.text))))

    def _values(self, found: TextFeatures) -> Iterator[float]:
        text, lines = found.text, found.lines
        words, of_lines = max(1, len(found.ids)), max(1, len(lines))
        yield len(found.ids)
        yield found.word_characters / words
        yield text.count("#") / words
        yield sum(map(text.count, ELLIPSES)) / words
        yield sum(line.startswith(BULLETS) for line in lines) / of_lines
        yield sum(line.endswith(ELLIPSES) for line in lines) / of_lines
        yield found.alphabetic_words / words
        yield sum(not forms.isdisjoint(found.vocabulary) for forms in self._stop_words)


class FineWebRules:
    """See `FineWebQuality`."""

    def __init__(self, config: FineWebQuality) -> None:
        self._short = config.short_line
        self.limits = (
            Limit("lines that end in punctuation", config.least_punctuated_lines),
            Limit("short lines", most=config.most_short_lines),
            Limit("characters of duplicate lines", most=config.most_duplicate_line_characters),
            Limit("line ends to words", most=config.most_newlines, unit="a word"),
        )

    def __call__(self, page: Page) -> Finding:
        return Finding(measured(self.limits, self._values(features(page.text))))

    def _values(self, found: TextFeatures) -> Iterator[float]:
        yield found.punctuated_lines
        yield sum(len(line) <= self._short for line in found.lines) / max(1, len(found.lines))
        yield found.duplicate_line_characters
        yield found.text.count("\n") / max(1, len(found.ids))


class ChineseRules:
    """See `ChineseQuality`."""

    def __init__(self, config: ChineseQuality) -> None:
        self.limits = (
            Limit("Chinese characters", config.least_characters, unit="characters"),
            Limit("share of Chinese characters", config.least_share),
            Limit("mean line length", config.shortest_mean_line, unit="characters"),
            Limit("lines that end in punctuation", config.least_punctuated_lines),
            Limit("duplicate 13-grams", most=config.most_duplicate_13grams),
        )

    def __call__(self, page: Page) -> Finding:
        return Finding(measured(self.limits, self._values(features(page.text))))

    @staticmethod
    def _values(found: TextFeatures) -> Iterator[float]:
        chinese = sum(map(len, _CHINESE.findall(found.text)))
        yield chinese
        yield chinese / max(1, sum(map(len, chain.from_iterable(map(str.split, found.lines)))))
        yield sum(map(len, found.lines)) / max(1, len(found.lines))
        yield found.punctuated_lines
        for n, repeated in enumerate(repeated_ngrams(found.ids), start=2):
            if n == 13:
                yield share(found, n, repeated.starts[repeated.again])
                return
