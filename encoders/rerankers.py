"""Cross-encoders (rerankers), read as dense layers on the first token. Needs no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mirror_runtime.bundle import Activation, Dense
from mirror_runtime.errors import BundleError

CLASSIFIER = "AutoModelForSequenceClassification"
"""The loader in transformers."""


@dataclass(frozen=True)
class ScoreHead:
    """What lies between the first token's vector and the score. Paths are relative to the classification model."""

    hidden: str
    activation: Activation
    score: str


_OF_ROBERTA = ScoreHead("classifier.dense", Activation.TANH, "classifier.out_proj")

SCORE_HEADS: Mapping[str, ScoreHead] = {
    "bert": ScoreHead("bert.pooler.dense", Activation.TANH, "classifier"),
    "roberta": _OF_ROBERTA,
    "xlm-roberta": _OF_ROBERTA,
    "camembert": _OF_ROBERTA,
    "mpnet": _OF_ROBERTA,
    "electra": ScoreHead("classifier.dense", Activation.GELU, "classifier.out_proj"),
    "distilbert": ScoreHead("pre_classifier", Activation.RELU, "classifier"),
}
"""By family. Others, such as ModernBERT with a norm in its head, are refused."""


def is_classifier(config: Mapping[str, Any]) -> bool:
    """Whether a `config.json` names a sequence classifier, as cross-encoders do."""
    return any(str(name).endswith("ForSequenceClassification") for name in config.get("architectures") or ())


def score_layers(config: Mapping[str, Any], width: int, folder: Path) -> tuple[Dense, ...]:
    """Describe the layers of a cross-encoder's head.

    Raises:
        BundleError: its family has none here, or it has several labels.
    """
    labels = len(config.get("id2label") or ()) or config.get("num_labels") or 2
    head = SCORE_HEADS.get(config["model_type"])
    if head is None or not is_classifier(config) or labels != 1:
        problem = f"a classifier of {labels} labels" if is_classifier(config) else "not a cross-encoder"
        raise BundleError(
            f"{folder} is {problem} of family {config['model_type']}: a reranker is a sequence classifier with one "
            f"label, of {', '.join(SCORE_HEADS)}; an encoder's pooling can be named with --pooling"
        )
    return (
        Dense(in_features=width, out_features=width, bias=True, activation=head.activation),
        Dense(in_features=width, out_features=1, bias=True, activation=Activation.IDENTITY),
    )
