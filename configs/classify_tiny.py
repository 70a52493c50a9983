"""A two-layer classifier (494,592 parameters) that tells good, middling and bad reviews apart.

    python -m maxlm.train --config configs/classify_tiny.py

From configs/data/reviews.jsonl; the loss of the text itself helps along, as in the first GPT. Hardware: two CPU cores,
no download; two minutes.
"""

from configs.reward_tiny import records, small
from maxlm.config import ClassHead, Classify, LmHead, Purpose, RunConfig


def get_config() -> RunConfig:
    data = records("reviews", Purpose.CLASSIFY, classes=("bad", "middling", "good"))
    head = ClassHead(n_classes=3, lm=LmHead())
    return small(Classify(lm_weight=0.5), head, data, steps=100, run_dir="runs/classify_tiny")
