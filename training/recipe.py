"""The settings of a tuning run, and the published recipes.

Mirror-BERT: appendix A.2 and its published scripts. SG-BERT: section 4.1 and its published code.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

from mirror_runtime.errors import InputError
from training.augment import MaskViews
from training.documents import View


class Objective(str, Enum):
    """The objectives."""

    MIRROR = "mirror"
    """Symmetric NT-Xent over both views (Mirror-BERT equation 1, in the form of its published code)."""
    SELF_GUIDED = "self-guided"
    """A text's vector against pooled layers of a frozen copy of the model (SG-BERT section 3)."""
    COSENT = "cosent"
    """The cosine of a scored pair above that of every pair with a lower score (CoSENT)."""
    ANGLE = "angle"
    """CoSENT of cosines, plus CoSENT of angles in complex space (AnglE section 3)."""
    HYBRID = "hybrid"
    """The ranking of a batch's texts for each title, by the base's cosines and by words (`HybridScores`)."""
    TEACHER = "teacher"
    """Vectors of another encoder, and the cosines between them."""


SCORED = (Objective.COSENT, Objective.ANGLE)
"""Learn from scored pairs."""

SINGLE = (Objective.SELF_GUIDED, Objective.TEACHER)
"""Learn from single texts, encoded once a step."""


class Variant(str, Enum):
    """Forms of the self-guided objective (SG-BERT section 3.3)."""

    BASE = "base"
    """NT-Xent between vector and view; one layer is drawn for each text, as in OPT1 and OPT2."""
    OPT1 = "opt1"
    """Only vectors are anchors; other vectors and other texts' views are negatives."""
    OPT2 = "opt2"
    """Like OPT1, without other vectors as negatives."""
    OPT3 = "opt3"
    """Like OPT2, with all layers at once as views: the paper's SG-OPT."""


class TunePrecision(str, Enum):
    """The number format of the forward and backward matrix products. Weights and loss are always fp32."""

    AUTO = "auto"
    """bf16 where the device multiplies it natively, else fp32."""
    FP32 = "fp32"
    BF16 = "bf16"


class Device(str, Enum):
    """Where the model is tuned."""

    AUTO = "auto"
    """The NVIDIA GPU if PyTorch finds one, else the CPU."""
    CPU = "cpu"
    CUDA = "cuda"


class Schedule(str, Enum):
    """The learning rate after warm-up."""

    CONSTANT = "constant"
    LINEAR = "linear"
    """To zero at the end."""
    COSINE = "cosine"
    """To zero at the end, along half a cosine."""


class Projection(str, Enum):
    """How a teacher's vectors of another width are met."""

    PCA = "pca"
    """They are cut to the student's width along their principal axes; narrower ones are filled up with zeros."""
    DENSE = "dense"
    """The student gets a dense layer to their width behind its pooling, which is trained with it and stays."""


class Recipe(str, Enum):
    """The published recipes, and ours."""

    SENTENCE = "sentence"
    PHRASE = "phrase"
    """Phrases of a few words; published for biomedical names."""
    WORD = "word"
    SELF_GUIDED = "self-guided"
    """SG-BERT's SG-OPT, without its early stopping on labelled pairs, which needs labels."""
    MIRROR_PLUS = "mirror+"
    """The sentence recipe with a temperature of 0.05 and repeated tokens, for mean pooling: better on every set
    that was tried, in the same time (docs/log.md)."""
    MIRROR_CLS = "mirror+cls"
    """The sentence recipe with a temperature of 0.03 and a rate of 3e-5, for [CLS], which `mirror+` does not help."""
    DOCUMENTS = "documents"
    """Titles and texts of documents, in small batches: also lifts encoders that were trained on pairs (docs/log.md)."""
    HYBRID = "hybrid"
    """Documents in batches of alike texts, each title's ranking of them by the base and by words together."""
    AUTO = "auto"
    """The best of `RIVALS`, or the base as it is, by a probe on held-out texts."""
    SCORED = "scored"
    """CoSENT on scored pairs."""
    TEACHER = "teacher"
    """Vectors and cosines of another encoder, from text alone."""


@dataclass(frozen=True, kw_only=True)
class TuneConfig:
    """The settings of a run except base, corpus and pooling. The defaults are the sentence recipe."""

    objective: Objective = Objective.MIRROR
    variant: Variant = Variant.OPT3  # of the self-guided objective
    # Of the self-guided objective: weight of the squared distance between the weights and the base's
    drift: float = 0.1
    projection: Projection = Projection.PCA  # of the teacher objective
    # Numbers of leading components, and of first layers, for which the encoder is trained too: see `training.elastic`
    matryoshka: tuple[int, ...] = ()
    depths: tuple[int, ...] = ()
    train_layers: int | None = None  # number of last layers that are tuned; None tunes all weights
    # Rank of the low-rank additions that are tuned in place of the layers' weights; None tunes weights
    lora: int | None = None
    seed: int = 42  # of shuffling, span masks and dropout
    epochs: int = 1  # passes over the corpus
    batch_size: int = 200  # texts a step, over all processes; each has two vectors
    lr: float = 2e-5  # of AdamW, at its highest
    schedule: Schedule = Schedule.CONSTANT  # of the learning rate after warm-up
    warmup: float = 0.0  # share of the steps over which the learning rate rises from zero
    beta2: float = 0.999  # of AdamW
    weight_decay: float = 0.01  # of AdamW, on every parameter
    clip: float | None = None  # maximum L2 norm of a step's gradient; None disables clipping
    temperature: float = 0.04
    views: tuple[View, ...] = (View.TITLE,)  # of a document; one is drawn each time
    mask_length: int = 5  # masked characters of a view; 0 for none. Pairs are never masked.
    mask_views: MaskViews = MaskViews.SECOND
    reference_masking: bool = False  # mask exactly like the published code, see `mask_span_literally`
    repetition: float = 0.0  # maximum share of its tokens that the second view repeats, see `repeat_tokens`; 0 for none
    dropout: float = 0.1  # probability everywhere in the model
    drophead: float = 0.0  # probability that an attention head is dropped for a text
    max_tokens: int = 50  # a text's limit while tuning, including special tokens
    # Slots that go through the model at once, which bounds memory; None for the whole batch. The gradient is that of
    # the whole batch.
    micro_batch_tokens: int | None = None
    precision: TunePrecision = TunePrecision.AUTO
    device: Device = Device.AUTO

    def __post_init__(self) -> None:
        infinite = float("inf")
        for name, valid, rule in (
            ("drift", 0 <= self.drift < infinite, "0 or more"),
            ("train_layers", self.train_layers is None or self.train_layers >= 1, "at least 1"),
            ("lora", self.lora is None or self.lora >= 1, "at least 1"),
            ("epochs", self.epochs >= 1, "at least 1"),
            ("batch_size", self.batch_size >= 2, "at least 2: a text is learnt against others"),
            ("lr", 0 < self.lr < infinite, "a positive number, such as 2e-5"),
            ("warmup", 0 <= self.warmup < 1, "a share of the steps, at least 0 and below 1"),
            ("beta2", 0 <= self.beta2 < 1, "at least 0 and below 1"),
            ("weight_decay", 0 <= self.weight_decay < infinite, "0 or more"),
            ("clip", self.clip is None or 0 < self.clip < infinite, "a positive number, such as 1"),
            ("temperature", 0 < self.temperature < infinite, "a positive number, such as 0.04"),
            ("matryoshka", min(self.matryoshka, default=1) >= 1, "positive numbers, such as 64 128"),
            ("depths", min(self.depths, default=1) >= 1, "positive numbers, such as 2 4"),
            ("views", len(self.views) > 0, "at least one"),
            ("mask_length", self.mask_length >= 0, "0 or more"),
            ("repetition", 0 <= self.repetition <= 1, "a share of the tokens, 0 to 1"),
            ("dropout", 0 <= self.dropout < 1, "at least 0 and below 1"),
            ("drophead", 0 <= self.drophead < 1, "at least 0 and below 1"),
            ("max_tokens", self.max_tokens >= 3, "at least 3: [CLS] token [SEP]"),
            (
                "micro_batch_tokens",
                self.micro_batch_tokens is None or self.micro_batch_tokens >= self.max_tokens,
                f"at least --max-tokens ({self.max_tokens})",
            ),
            ("seed", 0 <= self.seed < 2**63, "0 or more"),
        ):
            if not valid:
                raise InputError(f"--{name.replace('_', '-')} is {getattr(self, name)}: it must be {rule}")
        if self.reference_masking and self.mask_views is not MaskViews.SECOND:
            raise InputError("--reference-masking masks only the second view: leave --mask-views out")
        if self.objective is Objective.HYBRID and self.views != (View.TITLE,):
            raise InputError("--objective hybrid ranks texts for titles: leave --views out")
        if (self.matryoshka or self.depths) and self.objective is Objective.SELF_GUIDED:
            raise InputError("--matryoshka and --depths do not go with --objective self-guided: use mirror or teacher")
        if self.objective is Objective.ANGLE and any(dim % 2 for dim in self.matryoshka):
            raise InputError("--objective angle halves a vector: --matryoshka must have even numbers")
        if self.lora and self.objective is Objective.SELF_GUIDED:
            raise InputError("--lora leaves the weights that --objective self-guided holds near the base's: drop it")


_SENTENCE = TuneConfig()

RECIPES: Mapping[Recipe, TuneConfig] = {
    Recipe.SENTENCE: _SENTENCE,
    Recipe.PHRASE: dataclasses.replace(_SENTENCE, epochs=2, max_tokens=25, mask_length=2),
    Recipe.WORD: dataclasses.replace(_SENTENCE, epochs=2, max_tokens=25, mask_length=0, temperature=0.2),
    Recipe.SELF_GUIDED: TuneConfig(
        objective=Objective.SELF_GUIDED,
        variant=Variant.OPT3,
        drift=0.1,
        batch_size=16,
        lr=5e-5,
        schedule=Schedule.LINEAR,
        warmup=0.1,
        beta2=0.9,
        weight_decay=0.0,
        clip=1.0,
        temperature=0.01,
        mask_length=0,
        max_tokens=128,
    ),
    Recipe.MIRROR_PLUS: dataclasses.replace(_SENTENCE, temperature=0.05, repetition=0.3),
    Recipe.MIRROR_CLS: dataclasses.replace(_SENTENCE, temperature=0.03, lr=3e-5),
    Recipe.DOCUMENTS: dataclasses.replace(_SENTENCE, batch_size=64, temperature=0.05, mask_length=0, max_tokens=96),
    Recipe.HYBRID: dataclasses.replace(
        _SENTENCE,
        objective=Objective.HYBRID,
        epochs=3,
        batch_size=64,
        lr=6e-5,
        schedule=Schedule.LINEAR,
        temperature=0.05,
        mask_length=0,
        max_tokens=96,
    ),
    Recipe.SCORED: TuneConfig(
        objective=Objective.COSENT,
        epochs=2,
        batch_size=64,
        lr=1e-4,
        schedule=Schedule.LINEAR,
        warmup=0.1,
        temperature=0.05,
        mask_length=0,
        max_tokens=64,
    ),
    Recipe.TEACHER: TuneConfig(
        objective=Objective.TEACHER,
        epochs=3,
        batch_size=128,
        lr=3e-4,
        schedule=Schedule.LINEAR,
        warmup=0.1,
        temperature=0.05,
        mask_length=0,
        dropout=0.0,
        max_tokens=64,
    ),
}

RIVALS: Mapping[bool, Mapping[str, TuneConfig]] = {
    False: {recipe.value: RECIPES[recipe] for recipe in (Recipe.MIRROR_PLUS, Recipe.MIRROR_CLS)},
    True: {
        "documents": RECIPES[Recipe.DOCUMENTS],
        "mirror+": dataclasses.replace(RECIPES[Recipe.MIRROR_PLUS], views=(View.SAME,)),
    },
}
"""What `auto` tries, on lines and on documents."""

IMPLIED: Mapping[Objective, Recipe] = {
    Objective.MIRROR: Recipe.SENTENCE,
    Objective.SELF_GUIDED: Recipe.SELF_GUIDED,
    Objective.HYBRID: Recipe.HYBRID,
    Objective.COSENT: Recipe.SCORED,
    Objective.ANGLE: Recipe.SCORED,
    Objective.TEACHER: Recipe.TEACHER,
}
"""The recipe of an objective that is named alone."""
