"""The settings of a tuning run, and the published recipes (Mirror-BERT, appendix A.2 and its published scripts)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

from mirror_runtime.errors import InputError
from training.objective import Objective


class TunePrecision(str, Enum):
    """The number format of the forward and backward matrix products. Weights and loss are always fp32."""

    AUTO = "auto"
    """bf16 where the device multiplies it natively, else fp32."""
    FP32 = "fp32"
    BF16 = "bf16"


class Device(str, Enum):
    """Where the model is tuned."""

    AUTO = "auto"
    """The NVIDIA GPU if there is one, else the CPU."""
    CPU = "cpu"
    CUDA = "cuda"


class Recipe(str, Enum):
    """The published recipes."""

    SENTENCE = "sentence"
    PHRASE = "phrase"
    """Phrases of a few words; published for biomedical names."""
    WORD = "word"


@dataclass(frozen=True, kw_only=True)
class TuneConfig:
    """Everything that decides a run besides base, corpus and pooling. The defaults are the sentence recipe.

    Attributes:
        objective: what is minimised.
        seed: of shuffling, span masks and dropout.
        epochs: passes over the corpus.
        batch_size: texts a step; each gives two vectors.
        lr: of AdamW, constant.
        weight_decay: of AdamW, on every parameter.
        temperature: divides the cosine.
        mask_length: characters hidden in the second view; 0 for none.
        dropout: probability everywhere in the model.
        max_tokens: a text's limit while tuning, special tokens included.
        precision: of the matrix products.
        device: where it runs.
    """

    objective: Objective = Objective.MIRROR
    seed: int = 42
    epochs: int = 1
    batch_size: int = 200
    lr: float = 2e-5
    weight_decay: float = 0.01
    temperature: float = 0.04
    mask_length: int = 5
    dropout: float = 0.1
    max_tokens: int = 50
    precision: TunePrecision = TunePrecision.AUTO
    device: Device = Device.AUTO

    def __post_init__(self) -> None:
        for name, valid, rule in (
            ("epochs", self.epochs >= 1, "at least 1"),
            ("batch_size", self.batch_size >= 2, "at least 2: a text is learnt against others"),
            ("lr", 0 < self.lr < float("inf"), "a positive number, such as 2e-5"),
            ("temperature", 0 < self.temperature < float("inf"), "a positive number, such as 0.04"),
            ("mask_length", self.mask_length >= 0, "0 or more"),
            ("dropout", 0 <= self.dropout < 1, "at least 0 and below 1"),
            ("max_tokens", self.max_tokens >= 3, "at least 3: [CLS] token [SEP]"),
            ("seed", 0 <= self.seed < 2**63, "0 or more"),
        ):
            if not valid:
                raise InputError(f"--{name.replace('_', '-')} is {getattr(self, name)}: it must be {rule}")


_SENTENCE = TuneConfig()

RECIPES: Mapping[Recipe, TuneConfig] = {
    Recipe.SENTENCE: _SENTENCE,
    Recipe.PHRASE: dataclasses.replace(_SENTENCE, epochs=2, max_tokens=25, mask_length=2),
    Recipe.WORD: dataclasses.replace(_SENTENCE, epochs=2, max_tokens=25, mask_length=0, temperature=0.2),
}
