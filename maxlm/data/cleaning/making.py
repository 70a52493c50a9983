"""From a step's config to what it does."""

from __future__ import annotations

from typing import assert_never

from maxlm.config.cleaning.cleaning_pipeline import CleaningStep
from maxlm.config.cleaning.decontamination_steps import Decontaminate
from maxlm.config.cleaning.duplicate_steps import (
    ExactDocuments,
    ExactSpans,
    ExactSubstrings,
    NearDuplicates,
    SemanticDuplicates,
)
from maxlm.config.cleaning.private_steps import PersonalData
from maxlm.config.cleaning.rule_steps import (
    ChineseQuality,
    CodeQuality,
    FineWebQuality,
    GopherQuality,
    GopherRepetition,
    Languages,
    Licences,
    UrlList,
    WordList,
)
from maxlm.config.cleaning.score_steps import BitsPerByteFilter, DomainTagger, PerplexityFilter, QualityFilter
from maxlm.config.cleaning.source_steps import AnswersByScore, CodeHeader, GutenbergText, LatexToText, WikiText
from maxlm.config.cleaning.text_steps import C4Lines, HtmlToText, NormaliseUnicode, RepairUnicode, WebLines
from maxlm.data.cleaning.by_source import AnswerSorter, GutenbergReader, LicenceRules, WikiReader
from maxlm.data.cleaning.code_rules import CodeHeaderCutter, CodeRules
from maxlm.data.cleaning.decontamination import Decontaminator
from maxlm.data.cleaning.exact_duplicates import ExactDocumentDropper, SpanCutter
from maxlm.data.cleaning.findings import DocumentStep
from maxlm.data.cleaning.html_text import HtmlReader
from maxlm.data.cleaning.languages import LanguageRules
from maxlm.data.cleaning.latex import LatexReader
from maxlm.data.cleaning.line_rules import C4LineRules, WebLineRules
from maxlm.data.cleaning.models_for_cleaning import CleaningModels
from maxlm.data.cleaning.ngram_model import PerplexityJudge
from maxlm.data.cleaning.personal_data import PersonalDataMasker
from maxlm.data.cleaning.quality import ChineseRules, FineWebRules, GopherQualityRules
from maxlm.data.cleaning.repetition import GopherRepetitionRules
from maxlm.data.cleaning.score_filters import bits_per_byte_filter, domain_tagger, quality_filter
from maxlm.data.cleaning.semantic import SemanticDropper
from maxlm.data.cleaning.similar_documents import NearDuplicateDropper
from maxlm.data.cleaning.stages import ComparingStep
from maxlm.data.cleaning.substrings import SubstringCutter
from maxlm.data.cleaning.unicode import UnicodeNormaliser, UnicodeRepairer
from maxlm.data.cleaning.word_lists import UrlRules, WordRules


def make_step(config: CleaningStep, models: CleaningModels) -> DocumentStep | ComparingStep:
    """What the step does; word lists are read and checked here.

    Raises:
        UserError: a file that the step names is missing, or is not what it should be; a package is not installed.
    """
    match config:
        case NormaliseUnicode():
            return UnicodeNormaliser(config)
        case PersonalData():
            return PersonalDataMasker(config)
        case PerplexityFilter():
            return PerplexityJudge(config)
        case QualityFilter():
            return quality_filter(config, models)
        case DomainTagger():
            return domain_tagger(config, models)
        case BitsPerByteFilter():
            return bits_per_byte_filter(config, models)
        case Decontaminate():
            return Decontaminator(config)
        case ExactDocuments():
            return ExactDocumentDropper(config)
        case ExactSpans():
            return SpanCutter(config)
        case NearDuplicates():
            return NearDuplicateDropper(config)
        case ExactSubstrings():
            return SubstringCutter(config)
        case SemanticDuplicates(embedder=run):
            return SemanticDropper(config, models.embedder(run))
        case RepairUnicode():
            return UnicodeRepairer(config)
        case HtmlToText():
            return HtmlReader(config)
        case C4Lines():
            return C4LineRules(config)
        case WebLines():
            return WebLineRules(config)
        case LatexToText():
            return LatexReader(config)
        case AnswersByScore():
            return AnswerSorter(config)
        case GutenbergText():
            return GutenbergReader(config)
        case WikiText():
            return WikiReader(config)
        case CodeHeader():
            return CodeHeaderCutter(config)
        case GopherQuality():
            return GopherQualityRules(config)
        case GopherRepetition():
            return GopherRepetitionRules(config)
        case FineWebQuality():
            return FineWebRules(config)
        case ChineseQuality():
            return ChineseRules(config)
        case CodeQuality():
            return CodeRules(config)
        case Licences():
            return LicenceRules(config)
        case Languages():
            return LanguageRules(config)
        case UrlList():
            return UrlRules(config)
        case WordList():
            return WordRules(config)
        case _:
            assert_never(config)
