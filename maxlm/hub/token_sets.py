"""Tokenizers with more or fewer tokens, and which rows of a model's tables the new ids are made from.

A definition is the content of a `tokenizer.json` (BPE or Unigram) or of a sentencepiece `tokenizer.model`.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import sentencepiece
import tokenizers
from sentencepiece import sentencepiece_model_pb2 as format_  # made by protobuf

from maxlm.config import UserError

JSON, SENTENCEPIECE = "tokenizer.json", "tokenizer.model"


class Edited(NamedTuple):
    """A changed definition."""

    definition: bytes
    sources: tuple[tuple[int, ...], ...]
    """For each new id the old ids that it is made from: one that stays is made from itself, one that is new from those
    that spell it."""


@dataclass(frozen=True)
class TokenSet:
    """A definition that can be changed; the file that it is from decides its kind."""

    file: Path
    definition: bytes

    @staticmethod
    def read(place: Path) -> TokenSet:
        """Of a file, or of the folder that has one.

        Raises:
            UserError: there is none, or it cannot be read.
        """
        inside = [place / name for name in (JSON, SENTENCEPIECE) if (place / name).is_file()]
        file = inside[0] if inside else place
        if not file.is_file() or file.suffix not in (".json", ".model"):
            raise UserError(f"{place}: is no {JSON}, no sentencepiece .model, and no folder with one of them")
        found = TokenSet(file, file.read_bytes())
        if found.is_json:
            try:
                tokenizers.Tokenizer.from_buffer(found.definition)
            except Exception as error:  # the library raises plain Exception
                reason = " ".join(str(error).split())
                raise UserError(f"{file}: no tokenizer.json that the tokenizers library can read ({reason})") from error
        return found

    @property
    def is_json(self) -> bool:
        return self.file.suffix == ".json"

    def extended(self, other: TokenSet) -> Edited:
        """With the tokens of another vocabulary that this one lacks, after all others, in their order.

        Texts without them keep their ids, as far as no new token spells a part of them: the merges of BPE that make new
        tokens come after the old ones. Special tokens of the other are left out.

        Raises:
            UserError: the two are of different kinds, or this kind cannot grow.
        """
        if self.is_json != other.is_json:
            raise UserError(f"{other.file}: is of another kind than {self.file}; train one of the same kind")
        return self._extended_json(other) if self.is_json else self._extended_pieces(other)

    def kept(self, used: Collection[int]) -> Edited:
        """Without the tokens that are not `used`: their ids are given up, the others move together in their order.

        What stays beside: special tokens, single bytes, and what other tokens are merged from. So a text of used tokens
        gets the same tokens as before.
        """
        return self._kept_json(used) if self.is_json else self._kept_pieces(used)

    def ids_of(self, tokens: Iterable[str]) -> set[int]:
        """Of tokens as the file spells them.

        Raises:
            UserError: there is no such token.
        """
        if self.is_json:
            known = {token: i for i, token in _json_tokens(self._json())}
        else:
            known = {piece.piece: i for i, piece in enumerate(self._model().pieces)}
        wanted = list(tokens)
        if missing := [token for token in wanted if token not in known]:
            raise UserError(f"{self.file}: has no token {missing[0]!r}; name tokens as this file spells them")
        return {known[token] for token in wanted}

    # ---- tokenizer.json ----

    def _json(self) -> dict[str, Any]:
        values: dict[str, Any] = json.loads(self.definition)
        kind = values.get("model", {}).get("type")
        if kind not in ("BPE", "Unigram"):
            raise UserError(f"{self.file}: model.type = {kind!r} cannot be changed; must be 'BPE' or 'Unigram'")
        return values

    def _extended_json(self, other: TokenSet) -> Edited:
        values, more = self._json(), other._json()
        model, theirs = values["model"], more["model"]
        if model["type"] != theirs["type"] or _is_byte_level(values) != _is_byte_level(more):
            raise UserError(
                f"{other.file}: its {theirs['type']} does not spell tokens as the {model['type']} of {self.file} does; "
                "train one of the same kind, with the same pre-tokenizer"
            )
        old = {token: i for i, token in _json_tokens(values)}
        special = {token["content"] for token in more.get("added_tokens", ())}
        new = [token for _, token in sorted(_model_tokens(theirs)) if token not in old and token not in special]
        begin = 1 + max(old.values())
        if model["type"] == "BPE":
            model["vocab"] |= {token: begin + i for i, token in enumerate(new)}
            known = {tuple(merge) for merge in _merges(model)}
            wanted, have = set(new), model["vocab"]
            added = [
                (left, right)
                for left, right in _merges(theirs)
                if left + right in wanted and left in have and right in have and (left, right) not in known
            ]
            model["merges"] = [list(merge) for merge in [*_merges(model), *added]]
        elif begin > len(model["vocab"]):
            raise UserError(f"{self.file}: its added tokens come after its pieces, where new ones would stand")
        else:
            scores = dict(theirs["vocab"])
            model["vocab"] += [[token, scores[token]] for token in new]
        speller = tokenizers.Tokenizer.from_buffer(self.definition).model
        spelled = [tuple(token.id for token in speller.tokenize(one)) for one in new]
        return Edited(_dumped(values), tuple((i,) for i in range(begin)) + tuple(spelled))

    def _kept_json(self, used: Collection[int]) -> Edited:
        values = self._json()
        model = values["model"]
        added = {token["id"] for token in values.get("added_tokens", ())}
        known = dict(_json_tokens(values))
        keep = {i for i in used if i in known} | added
        keep |= {i for i, token in known.items() if _is_byte(token) or (_is_byte_level(values) and len(token) == 1)}
        keep |= {i for i, token in known.items() if token == model.get("unk_token")} | {model.get("unk_id")} - {None}
        if model["type"] == "BPE":
            ids, merges = {token: i for i, token in known.items()}, _merges(model)
            keep = _closed(keep, ((ids[a + b], ids[a], ids[b]) for a, b in merges if a + b in ids))
            model["merges"] = [[a, b] for a, b in merges if {ids.get(a + b), ids.get(a), ids.get(b)} <= keep]
        place = {i: n for n, i in enumerate(sorted(keep))}
        if model["type"] == "BPE":
            model["vocab"] = {token: place[i] for token, i in model["vocab"].items() if i in keep}
        else:
            model["vocab"] = [entry for i, entry in enumerate(model["vocab"]) if i in keep]
            model["unk_id"] = place.get(model.get("unk_id"))
        for token in values.get("added_tokens", ()):
            token["id"] = place[token["id"]]
        _move_ids(values.get("post_processor"), place)
        return Edited(_dumped(values), tuple((i,) for i in place))

    # ---- sentencepiece ----

    def _model(self) -> Any:
        model = format_.ModelProto()  # type: ignore[attr-defined]
        try:
            model.ParseFromString(self.definition)
        except Exception as error:  # DecodeError, of a package that is not ours to name
            raise UserError(
                f"{self.file}: not a sentencepiece model; name the .model that its trainer wrote"
            ) from error
        if model.trainer_spec.model_type not in (_UNIGRAM, _BPE):
            raise UserError(f"{self.file}: only sentencepiece models of type unigram or bpe can be changed")
        return model

    def _extended_pieces(self, other: TokenSet) -> Edited:
        model, more = self._model(), other._model()
        if model.trainer_spec.model_type != more.trainer_spec.model_type:
            raise UserError(
                f"{other.file}: one of the two models is bpe, the other unigram; train one of the same type"
            )
        speller, old = _speller(model), {piece.piece for piece in model.pieces}
        new = [piece for piece in more.pieces if piece.type == _NORMAL and piece.piece not in old]
        lowest = min((piece.score for piece in model.pieces), default=0.0)
        sources = [(i,) for i in range(len(model.pieces))]
        for i, piece in enumerate(new, start=1):
            # The score of a merge is its turn; that of unigram a log-probability, which means the same in both.
            score = lowest - i if model.trainer_spec.model_type == _BPE else piece.score
            model.pieces.add(piece=piece.piece, score=score)
            sources.append(tuple(speller.encode(piece.piece)))
        model.trainer_spec.vocab_size = len(model.pieces)
        return Edited(model.SerializeToString(), tuple(sources))

    def _kept_pieces(self, used: Collection[int]) -> Edited:
        model = self._model()
        ids = {piece.piece: i for i, piece in enumerate(model.pieces)}
        # The piece for a space begins a text, and no model is without any piece.
        keep = {i for i, one in enumerate(model.pieces) if i in used or one.type != _NORMAL or one.piece == "\u2581"}
        if model.trainer_spec.model_type == _BPE:
            keep = _closed(keep, _splits(ids))
        pieces = [piece for i, piece in enumerate(model.pieces) if i in keep]
        place = {i: n for n, i in enumerate(sorted(keep))}
        del model.pieces[:]
        model.pieces.extend(pieces)
        spec = model.trainer_spec
        spec.vocab_size = len(pieces)
        for name in ("unk_id", "bos_id", "eos_id", "pad_id"):
            if getattr(spec, name) >= 0:
                setattr(spec, name, place.get(getattr(spec, name), -1))
        return Edited(model.SerializeToString(), tuple((i,) for i in place))


_UNIGRAM, _BPE = 1, 2
_NORMAL = 1
"""Numbers of sentencepiece's format, of a model's type and of a piece's."""


def _json_tokens(values: dict[str, Any]) -> Iterator[tuple[int, str]]:
    """Id and spelling of every token, added ones too."""
    yield from _model_tokens(values["model"])
    yield from ((token["id"], token["content"]) for token in values.get("added_tokens", ()))


def _model_tokens(model: dict[str, Any]) -> Iterator[tuple[int, str]]:
    if model["type"] == "BPE":
        yield from ((i, token) for token, i in model["vocab"].items())
    else:
        yield from ((i, token) for i, (token, _) in enumerate(model["vocab"]))


def _merges(model: dict[str, Any]) -> list[tuple[str, str]]:
    """In either spelling: pairs, or strings with a space between."""
    pairs = (merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"])
    return [(left, right) for left, right in pairs]


def _is_byte_level(values: dict[str, Any]) -> bool:
    """Whether a letter of a token is a byte of the text (GPT-2)."""
    return '"ByteLevel"' in json.dumps([values.get("decoder"), values.get("pre_tokenizer")])


def _is_byte(token: str) -> bool:
    return len(token) == 6 and token.startswith("<0x") and token.endswith(">")


def _closed(keep: set[int], merges: Iterable[tuple[int, int, int]]) -> set[int]:
    """With all that the kept ones are merged from, in any way, and what those are merged from."""
    parts: dict[int, list[int]] = {}
    for whole, left, right in merges:
        parts.setdefault(whole, []).extend((left, right))
    found, waiting = set(keep), list(keep)
    while waiting:
        for part in parts.get(waiting.pop(), ()):
            if part not in found:
                found.add(part)
                waiting.append(part)
    return found


def _splits(ids: dict[str, int]) -> Iterator[tuple[int, int, int]]:
    """Every way in which a piece is two others: sentencepiece merges any two whose whole is a piece."""
    for piece, i in ids.items():
        for at in range(1, len(piece)):
            if (left := ids.get(piece[:at])) is not None and (right := ids.get(piece[at:])) is not None:
                yield i, left, right


def _move_ids(processor: Any, place: dict[int, int]) -> None:
    """In what a tokenizer.json does after encoding: it names special tokens by their ids."""
    if isinstance(processor, list):
        for one in processor:
            _move_ids(one, place)
    elif isinstance(processor, dict):
        if isinstance(processor.get("ids"), list):
            processor["ids"] = [place[i] for i in processor["ids"]]
        for name in ("sep", "cls"):
            if isinstance(processor.get(name), list) and len(processor[name]) == 2:
                processor[name][1] = place[processor[name][1]]
        for value in processor.values():
            _move_ids(value, place)


def _speller(model: Any) -> Any:
    """A processor that takes a piece as it stands, without a normaliser."""
    plain = format_.ModelProto()  # type: ignore[attr-defined]
    plain.CopyFrom(model)
    plain.normalizer_spec.Clear()
    plain.normalizer_spec.add_dummy_prefix = False
    plain.normalizer_spec.remove_extra_whitespaces = False
    processor = sentencepiece.SentencePieceProcessor()
    processor.LoadFromSerializedProto(plain.SerializeToString())
    return processor


def _dumped(values: dict[str, Any]) -> bytes:
    return json.dumps(values, ensure_ascii=False, indent=2).encode() + b"\n"
