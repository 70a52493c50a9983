"""A loaded model as one that is served."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from maxlm.config import DocumentsConfig, EmbedHead, EngineConfig, UserError, WeightFormat
from maxlm.data.passages import passages_of
from maxlm.data.text_ends import TextEnds
from maxlm.inference.embedding import Embedder
from maxlm.inference.engine import Engine
from maxlm.inference.load import LoadedRun, load_run
from maxlm.inference.loop import EngineLoop
from maxlm.inference.mixed_adapters import LoadedAdapter
from maxlm.inference.retrieval import Index
from maxlm.serving.served import Served
from maxlm.serving.vectors_only import VectorsOnly


def serve_model(
    run: LoadedRun,
    name: str,
    config: EngineConfig,
    weights: WeightFormat,
    *,
    embeddings: bool = False,
    draft: LoadedRun | None = None,
    documents: DocumentsConfig = DocumentsConfig(),
    adapters: Mapping[str, LoadedAdapter] = MappingProxyType({}),
) -> dict[str, Served]:
    """Place the weights, compile, and start the engine's thread; a model that was trained for vectors needs none.

    Args:
        run: the model.
        name: what requests call it.
        config: how much at once.
        weights: the format in which the engine holds them.
        embeddings: whether it is also asked for vectors, for which its float32 parameters stay in memory.
        draft: the model that `config.speculation` names, if it is a `DraftModel`.
        documents: what conversations are answered from; without a model of their own it is as with `embeddings`.
        adapters: what is served beside the model, under these names.

    Returns:
        The model and its adapters by name, the model first. Vectors are the model's own.

    Raises:
        UserError: as `Engine`, `passages_of` and `load_run`; or an adapter has the model's name.
    """
    if name in adapters:
        raise UserError(f"--adapter {name}=... has the model's name; use another, or give the model one with --name")
    head, index = run.config.model.head, _index(run, documents)
    if isinstance(head, EmbedHead):
        return {name: _vectors_only(run, name, head.pooling.value)}
    engine = Engine(run, config, weights=weights, draft=draft, adapters=adapters)
    served = Served(
        name=name,
        loop=EngineLoop(engine),
        check=engine.check,
        tokenizer=run.tokenizer,
        ends=run.ends or TextEnds.of_documents(run.tokenizer),
        max_length=run.config.model.max_seq_len - run.config.model.virtual_tokens,
        vocab_size=run.config.model.vocab_size,
        created=int(time.time()),
        chat=run.chat,
        embed=Embedder(run.model) if embeddings else None,
        documents=index,
    )
    of_adapter = lambda name: dataclasses.replace(served, name=name, adapter=name, embed=None)
    return {name: served} | {name: of_adapter(name) for name in adapters}


def _vectors_only(run: LoadedRun, name: str, pooling: str) -> Served:
    """A model that makes vectors, and no text."""
    idle = VectorsOnly(name)
    return Served(
        name=name,
        loop=idle,
        check=idle.check,
        tokenizer=run.tokenizer,
        ends=TextEnds.of_documents(run.tokenizer),
        max_length=run.config.model.max_seq_len,
        vocab_size=run.config.model.vocab_size,
        created=int(time.time()),
        embed=Embedder(run.model),
        pooling=pooling,
    )


def _index(run: LoadedRun, config: DocumentsConfig) -> Index | None:
    if config.docs is None:
        return None
    passages = passages_of(Path(config.docs), run.tokenizer)
    by = run if config.docs_run is None else load_run(config.docs_run)
    return Index(passages, Embedder(by.model), by.tokenizer, top=config.docs_top, longest=by.config.model.max_seq_len)
