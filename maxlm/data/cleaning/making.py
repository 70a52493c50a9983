"""From a step's config to what it does."""

from __future__ import annotations

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
from maxlm.config.cleaning.score_steps import BitsPerByteFilter, DomainTagger, PerplexityFilter, QualityFilter
from maxlm.config.cleaning.text_steps import NormaliseUnicode
from maxlm.data.cleaning.decontamination import Decontaminator
from maxlm.data.cleaning.exact_duplicates import ExactDocumentDropper, SpanCutter
from maxlm.data.cleaning.models_for_cleaning import CleaningModels
from maxlm.data.cleaning.near_duplicates import NearDuplicateDropper
from maxlm.data.cleaning.ngram_model import PerplexityJudge
from maxlm.data.cleaning.page import DocumentStep
from maxlm.data.cleaning.personal_data import PersonalDataMasker
from maxlm.data.cleaning.score_filters import bits_per_byte_filter, domain_tagger, quality_filter
from maxlm.data.cleaning.semantic import SemanticDropper
from maxlm.data.cleaning.stages import ComparingStep
from maxlm.data.cleaning.substrings import SubstringCutter
from maxlm.data.cleaning.unicode import UnicodeNormaliser


def make_step(config: CleaningStep, models: CleaningModels) -> DocumentStep | ComparingStep:
    """What the step does; word lists are read and checked here.

    Raises:
        UserError: a file that the step names is missing, or is not what it should be.
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
