"""`.tiktoken` files: the ids are those of merging by ranks as tiktoken does it, written here without lists of pairs."""

# ruff: noqa: RUF001  other scripts are what is tested

from __future__ import annotations

import base64
import itertools
import random
import re
import unicodedata
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from maxlm.config import HuggingFaceTokenizer, UserError
from maxlm.data.tiktoken import to_json
from maxlm.data.tokenizers import Tokenizer, load_tokenizer, open_tokenizer
from maxlm.hub.models import find_tokenizer

TEXTS = [
    "The quick brown fox isn't here; I'LL see you're there. We'Ve 1234 reasons, don't we?\n\n  Yes.  \r\n\tEnd ",
    "def f(x):\n    return x**2  # square\n\n\nprint(f(10_000))",
    "从前有座山，山里有座庙。庙里有个老和尚在讲故事。第１２回，全角！",
    "Ça c'est déjà l'été: œuvre naïve \u2014 \u00abguillemets\u00bb\u00a0!",
    "e\u0301 and \u00e9; A\u030a and \u00c5; \u1112\u1161\u11ab",
    "Привет, мир! Γειά σου Κόσμε. שלום עולם. مرحبا بالعالم ٣٤٥",
    "नमस्ते दुनिया — สวัสดีชาวโลก 👩\u200d👩\u200d👧 🙂🙂 ☕\ufe0f",
    "aaaaaaaaaaaaa abababababa aabaabaab      \n \n  x",
    "<|endoftext|><|im_start|>user<|extra_7|>",
    "",
    " ",
    "\u3000\u2003wide\u00a0spaces\u3000",
    "\x00\x7f\ufffd\U0010fffe",
]
SPACE = "\t\n\x0b\x0c\r \x85\xa0\u1680" + "".join(map(chr, range(0x2000, 0x200B))) + "\u2028\u2029\u202f\u205f\u3000"


def split(text: str) -> list[str]:
    """Qwen 1's expression, with the letters, numbers and spaces of this text where it says \\p{L}, \\p{N} and \\s."""
    of = {kind: "".join(c for c in set(text) if unicodedata.category(c)[0] == kind) for kind in "LN"}
    # A character that no text has, where there is none of a kind.
    L, N, S = (re.escape(known or "\ud800") for known in (of["L"], of["N"], SPACE))
    pattern = (
        rf"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n{L}{N}]?[{L}]+|[{N}]| ?[^{S}{L}{N}]+[\r\n]*|[{S}]*[\r\n]+"
        rf"|[{S}]+(?![^{S}])|[{S}]+"
    )
    return [match.group() for match in re.finditer(pattern, text)]


def merge(piece: bytes, ranks: dict[bytes, int]) -> list[int]:
    """Of all neighbours that make a token the lowest, the first of equals, until there are none."""
    if piece in ranks:
        return [ranks[piece]]
    parts = [bytes([byte]) for byte in piece]
    while True:
        found = [(ranks[parts[i] + parts[i + 1]], i) for i in range(len(parts) - 1) if parts[i] + parts[i + 1] in ranks]
        if not found:
            return [ranks[part] for part in parts]
        _, i = min(found)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]


def encode(text: str, ranks: dict[bytes, int]) -> list[int]:
    return [i for piece in split(unicodedata.normalize("NFC", text)) for i in merge(piece.encode(), ranks)]


def train(n: int) -> dict[bytes, int]:
    """A vocabulary of so many tokens, of the pairs that are most frequent in the texts above; and a few that merging
    never makes, and some whose parts have higher ranks."""
    rng = random.Random(0)
    tokens = [bytes([byte]) for byte in range(256)]
    rng.shuffle(tokens)
    words = [[bytes([byte]) for byte in piece.encode()] for text in TEXTS for piece in split(text)]
    while len(tokens) < n:
        counts: dict[bytes, int] = {}
        for word in words:
            for left, right in itertools.pairwise(word):
                counts[left + right] = counts.get(left + right, 0) + 1
        best = max(counts, key=lambda token: (counts[token], token))
        tokens.append(best)
        for word in words:
            i = 0
            while i < len(word) - 1:
                if word[i] + word[i + 1] == best:
                    word[i : i + 2] = [best]
                i += 1
    tokens += [b"quick brown", "山里有座庙".encode(), b" unreachable"]
    swapped = tokens[256:]
    for _ in range(40):
        i, j = rng.sample(range(len(swapped)), 2)
        swapped[i], swapped[j] = swapped[j], swapped[i]
    return {token: rank for rank, token in enumerate(dict.fromkeys(tokens[:256] + swapped))}


RANKS = train(450)


def write(folder: Path, ranks: dict[bytes, int]) -> Path:
    file = folder / "qwen.tiktoken"
    file.write_bytes(b"".join(b"%s %d\n" % (base64.b64encode(token), rank) for token, rank in ranks.items()))
    return file


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    found = find_tokenizer(write(tmp_path_factory.mktemp("qwen"), RANKS).parent)
    assert found is not None
    return found


@pytest.mark.parametrize("text", TEXTS)
def test_ids_are_those_of_merging_by_ranks(text: str, tokenizer: Tokenizer) -> None:
    assert tokenizer.encode(text) == encode(text, RANKS)
    assert tokenizer.decode(tokenizer.encode(text)) == unicodedata.normalize("NFC", text)


ALPHABET = st.sampled_from(sorted(set("".join(TEXTS))))


@settings(max_examples=150, deadline=None)
@given(st.one_of(st.text(ALPHABET, max_size=40), st.text(st.sampled_from("ab \n'sS1"), max_size=60)))
def test_ids_of_any_text(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.encode(text) == encode(text, RANKS)


@settings(max_examples=60, deadline=None)
@given(st.sets(st.text(st.sampled_from("ab"), min_size=2, max_size=7), max_size=12), st.randoms(use_true_random=False))
def test_ids_of_any_vocabulary(words: set[str], rng: random.Random) -> None:
    """Ranks in any order, tokens that merging reaches or not, and several ways to make one."""
    tokens = [bytes([byte]) for byte in range(256)] + sorted(word.encode() for word in words)
    rng.shuffle(tokens)
    ranks = {token: rank for rank, token in enumerate(tokens)}
    lines = b"".join(b"%s %d\n" % (base64.b64encode(token), rank) for token, rank in ranks.items())
    ours = tokenizers.Tokenizer.from_buffer(to_json(Path("qwen.tiktoken"), lines))
    for _ in range(10):
        text = "".join(rng.choices("ab", k=rng.randint(1, 25)))
        assert ours.encode(text).ids == merge(text.encode(), ranks)


def test_special_tokens_come_after_and_the_copy_is_the_same(tokenizer: Tokenizer, tmp_path: Path) -> None:
    n = len(RANKS)
    assert (tokenizer.vocab_size, tokenizer.eos_id, tokenizer.bos_id) == (n + 208, n, None)
    assert tokenizer.decode([n, n + 1, n + 2, n + 207]) == ""
    assert not set(tokenizer.encode("<|endoftext|><|extra_204|>")) & set(range(n, n + 208))
    tokenizer.save(tmp_path / "copy")
    copy = load_tokenizer(tmp_path / "copy")
    assert copy.fingerprint == tokenizer.fingerprint
    assert all(copy.encode(text) == tokenizer.encode(text) for text in TEXTS)


def test_files_that_are_not_right(tmp_path: Path) -> None:
    lines = write(tmp_path, RANKS).read_bytes().splitlines()
    cases = {
        r"line 301 = 'YWI' must be a token in base64 and its rank": [*lines[:300], b"YWI", *lines[301:]],
        r"line 1 = 'YWI= x' must be a token": [b"YWI= x", *lines],
        r"line 1 = 'YW!I= 3' must be a token": [b"YW!I= 3", *lines],
        r"line 1 = 'YWI= -3' must be a token": [b"YWI= -3", *lines],
        r"line 1 = '\\ufffd\\ufffd 3' must be": [b"\xff\xfe 3", *lines],
        r"line 2 has the rank 5 again": [b"YWI= 5", b"eHl6enk= 5"],
        r"has no token of rank 300, but higher ones": [*lines[:300], *lines[301:]],
        r"has no token of rank 0, but higher ones": lines[1:],
        r"has a token twice": [*lines, lines[300].split()[0] + b" %d" % len(lines)],
        r"has no token for the byte 0x": [*lines[1:256], lines[256].split()[0] + b" 0"],
        r"has no token for the byte 0x00 alone": [],
    }
    for match, content in cases.items():
        (tmp_path / "qwen.tiktoken").write_bytes(b"\n".join(content))
        with pytest.raises(UserError, match=match.replace(r"\\ufffd", "\ufffd")):
            open_tokenizer(HuggingFaceTokenizer(path=str(tmp_path / "qwen.tiktoken")))
    other = tmp_path / "cl100k_base.tiktoken"
    other.write_bytes(b"\n".join(lines))
    with pytest.raises(UserError, match=r"how it cuts texts is not in the file, and known of qwen.tiktoken alone"):
        open_tokenizer(HuggingFaceTokenizer(path=str(other)))
