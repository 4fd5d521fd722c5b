"""The vocabulary that examples and labels are in: the teacher's, or that of ``--student-tokenizer``."""

import datetime
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from logitcask.cache.manifest import OtherVocabulary
from logitcask.pipeline.settings.precompute import PrecomputeSettings
from logitcask.pipeline.text.chats.template import set_template
from logitcask.pipeline.text.examples import Encoder
from logitcask.pipeline.text.token_table import TokenTable
from logitcask.pipeline.text.tokenizer import identify, load_tokenizer, tokenizer_size
from logitcask.pipeline.vocabulary.alignment import shared_starts
from logitcask.pipeline.vocabulary.bridge import Bridge
from logitcask.pipeline.vocabulary.pairs import PairEncoder, set_templates
from logitcask.pipeline.vocabulary.rests import make_bridge, table_folder
from logitcask.pipeline.vocabulary.spread import Spread, spread_counted


@dataclass
class Tokenizers:
    """The teacher's tokenizer and that of the cache; usually they are one."""

    teacher: PreTrainedTokenizerBase
    cache: PreTrainedTokenizerBase
    bridge: Bridge | None = None  # between them, if they differ

    @property
    def differ(self) -> bool:
        """Whether labels are in another vocabulary than the teacher's."""
        return self.teacher is not self.cache

    def spread(self, table: TokenTable) -> Spread | None:
        """Return what the examples say of the two vocabularies."""
        if self.bridge is None:
            return None
        return spread_counted(self.bridge, map(shared_starts, map(table.example, range(len(table)))))

    def other_vocabulary(self, table: TokenTable) -> dict[str, OtherVocabulary]:
        """Return the manifest's part on the teacher's vocabulary, if it is another one."""
        if not self.differ:
            return {}
        own = identify(self.teacher, {})
        aligned, straddling, unlabelled = table.kinds
        part = OtherVocabulary(
            fingerprint=own.fingerprint,
            chat_template=own.chat_template,
            vocab_size=tokenizer_size(self.teacher),
            aligned=aligned,
            straddling=straddling,
            unlabelled=unlabelled,
        )
        return {"teacher_tokenizer": part}


def load_tokenizers(settings: PrecomputeSettings) -> Tokenizers:
    """Load the tokenizers, with their chat templates. Raises LogitcaskError if one cannot be loaded or used."""
    loading: dict[str, Any] = {"trust_remote_code": settings.trust_remote_code}
    teacher = load_tokenizer(settings.tokenizer_source, revision=settings.teacher_revision, **loading)
    if settings.student_tokenizer is None:
        set_template(teacher, settings.chat_template, settings.chat_template_kwargs)
        return Tokenizers(teacher, teacher)
    student = load_tokenizer(settings.student_tokenizer, **loading)
    set_templates(student, teacher, settings.chat_template, settings.chat_template_kwargs)
    return Tokenizers(teacher, student)


def make_encoder(settings: PrecomputeSettings, tokenizers: Tokenizers, day: datetime.date | None = None) -> Encoder:
    """Return what encodes the records. Raises LogitcaskError if two vocabularies cannot be brought together."""
    options: dict[str, Any] = {
        "prompt_loss": settings.prompt_loss,
        "day": day,
        "turns": settings.chat_turns,
        "columns": settings.renamed,
    }
    if not tokenizers.differ:
        return Encoder(tokenizers.cache, **options)
    tokenizers.bridge = make_bridge(tokenizers.teacher, tokenizers.cache, table_folder())
    return PairEncoder(tokenizers.cache, tokenizers.teacher, tokenizers.bridge, **options)
