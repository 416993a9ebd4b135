"""Requests and answers, as pydantic checks them and the OpenAPI document shows them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError

from mirror_runtime.tokenizer import defect


def _texts(value: Any) -> Any:
    """Refuse what is no text, with one reason instead of one for each form that `input` may have."""
    texts = value if isinstance(value, list) else [value]
    if not texts:
        raise PydanticCustomError("texts", "this must hold at least one text")
    first = texts[0][0] if isinstance(texts[0], list) and texts[0] else texts[0]
    if isinstance(first, int) and not isinstance(first, bool):
        # As ours they would give wrong vectors, without any error.
        raise PydanticCustomError(
            "token_ids",
            "these are token ids, and this encoder has a tokenizer of its own: send the text "
            "(langchain: check_embedding_ctx_length=False)",
        )
    for position, text in enumerate(texts):
        if (error := defect(position, text)) is not None:
            raise PydanticCustomError("texts", "{reason}", {"reason": str(error)})
    return value


Texts = Annotated[
    str | Annotated[list[str], Field(min_length=1)],
    BeforeValidator(_texts),
    Field(description="A text, or a list of them. An empty text has a vector too."),
]
Dimensions = Annotated[
    int | None,
    Field(ge=1, description="Keep the first so many components. Only values that /info names; null for all."),
]


class _Request(BaseModel):
    # What is not known is refused: an option that does nothing would be a lie.
    model_config = ConfigDict(extra="forbid", strict=True)


class EmbeddingsRequest(_Request):
    """OpenAI's request for vectors."""

    input: Texts
    model: str = Field(description="The model's name, as /v1/models gives it.")
    encoding_format: Literal["float", "base64"] = Field(
        "float", description="Numbers, or base64 of little-endian float32: a third of the bytes, and the exact values."
    )
    dimensions: Dimensions = None
    user: str | None = Field(None, description="Taken for compatibility; nothing is done with it.")


class EmbedRequest(_Request):
    """Text Embeddings Inference's request for vectors."""

    inputs: Texts
    normalize: bool | None = Field(
        None, description="Scale vectors to length 1; false only for encoders that do not. null: as the encoder does."
    )
    truncate: bool | None = Field(
        None,
        description="false: a text over the encoder's limit is refused (413). true or null: the gateway's policy.",
    )
    dimensions: Dimensions = None


class Embedding(BaseModel):
    """One text's vector."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class Usage(BaseModel):
    """Tokens of all texts, special tokens included, before anything was cut."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingsAnswer(BaseModel):
    """OpenAI's answer, and the positions of texts that were cut."""

    object: Literal["list"]
    data: list[Embedding]
    model: str
    usage: Usage
    truncated: list[int]


class Model(BaseModel):
    """A model as /v1/models lists it."""

    id: str
    object: Literal["model"] = "model"
    created: int = 0
    owned_by: str = "mirror-runtime"


class Models(BaseModel):
    """The one model that a gateway serves."""

    object: Literal["list"] = "list"
    data: list[Model]


class Info(BaseModel):
    """What is served, and the limits."""

    model: str
    fingerprint: str = Field(description="Name of the vector space: vectors of equal fingerprints can be compared.")
    dim: int
    dimensions: list[int] = Field(description="What may be asked for as `dimensions`.")
    max_tokens: int
    normalized: bool
    long_texts: str = Field(description="What happens to longer texts: truncate, error or chunk.")
    engine: str
    precision: str
    backend: str
    max_batch: int
    max_in_flight: int
    max_body_bytes: int
    version: str


class Health(BaseModel):
    """An inference has just succeeded."""

    status: Literal["ok"] = "ok"
    fingerprint: str


class Error(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str


class ErrorAnswer(BaseModel):
    """OpenAI's error."""

    error: Error
