"""Request and response bodies, as pydantic validates them and the OpenAPI document shows them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from mirror_runtime.gateway.errors import Refusal, printable
from mirror_runtime.pairs import LONGEST_QUERY
from mirror_runtime.tokenizer import validate_text


def _texts(value: Any) -> Any:
    """Check a request's texts, with one error instead of one for each type that `input` may have."""
    texts = value if isinstance(value, list) else [value]
    if not texts:
        raise PydanticCustomError("texts", "this must hold at least one text")
    first = texts[0][0] if isinstance(texts[0], list) and texts[0] else texts[0]
    if isinstance(first, int) and not isinstance(first, bool):
        # Read as ids of this tokenizer, they would give wrong vectors without an error.
        raise PydanticCustomError(
            "token_ids",
            "these are token ids, but this encoder uses its own tokenizer: send the text "
            "(langchain: check_embedding_ctx_length=False)",
        )
    for position, text in enumerate(texts):
        if (error := validate_text(position, text)) is not None:
            raise PydanticCustomError("texts", "{reason}", {"reason": str(error)})
    return value


Texts = Annotated[
    str | Annotated[list[str], Field(min_length=1)],
    BeforeValidator(_texts),
    Field(description="A text, or a list of them. An empty text has a vector too."),
]


def _exact(value: Any) -> Any:
    """Accept a whole number that a client wrote as a string or a float."""
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) < 10:
        return int(value)
    return int(value) if isinstance(value, float) and value.is_integer() else value


Number = Annotated[int, BeforeValidator(_exact)]


_TEXTS = ("input", "inputs")
_NAMED = 3
"""Unknown fields that a refusal names; it counts the others."""


class _Body(BaseModel):
    # Refuse unknown fields: a client would believe that they do something.
    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _check_names(cls, body: Any) -> Any:
        """Drop nulls, which clients send for what they leave out, and report several unknown fields at once.

        As one error each, 4 MB of them took 6 to 10 s.
        """
        if not isinstance(body, dict):
            return body
        body = {name: value for name, value in body.items() if value is not None or name in _TEXTS}
        if len(unknown := body.keys() - cls.model_fields.keys()) > 1:
            first = [str(name) for name in body if name in unknown][:_NAMED]
            more = f" and {len(unknown) - len(first)} more" if len(unknown) > len(first) else ""
            message = f"{', '.join(map(printable, first))}{more}: these fields are not permitted"
            raise Refusal(422, "invalid_field", message, param=first[0])
        return body


class _Request(_Body):
    dimensions: Number | None = Field(
        None, ge=1, description="Keep the first N components: one of the values in /info, or null for all."
    )
    normalize: bool | None = Field(
        None,
        description="Scale vectors to length 1; false only for encoders that do not. null: the encoder's choice.",
    )
    truncate: bool | Literal["NONE", "START", "END"] | None = Field(
        None,
        description="false or NONE: refuse a text over the encoder's limit (413). true, END or null: the gateway's "
        "policy. START is refused: texts lose their end.",
    )
    truncation_direction: Literal["right", "Right"] | None = Field("right", description="Texts lose their end.")
    truncate_prompt_tokens: Number | None = Field(
        None, ge=-1, description="-1, or the encoder's limit or more: texts are cut there."
    )
    prompt_name: str | None = Field(None, description="A prompt of the encoder, see /info, to put before every text.")
    input_type: str | None = Field(
        None,
        description="What the texts are: query, document, or their names in other APIs (passage, search_query, …). "
        "The encoder's prompt for it is put before every text, if it has one.",
    )
    speed: Literal["full", "fast"] | None = Field(
        None, description="fast: the encoder's static twin answers, see /info; X-Vector-Space is its fingerprint then."
    )
    user: str | int | None = Field(None, description="Accepted for compatibility and ignored.")


class EmbeddingsRequest(_Request):
    """OpenAI's request for vectors."""

    input: Texts
    model: str | None = Field(
        None,
        description="The model's name, as in /v1/models, or openai/NAME and the like. null: the only one.",
    )
    encoding_format: Literal["float", "base64"] | None = Field(
        "float", description="Numbers, or base64 of little-endian float32: a third of the bytes, and the exact values."
    )


class EmbedRequest(_Request):
    """Text Embeddings Inference's request for vectors."""

    inputs: Texts


class EmbedAllRequest(_Body):
    """Text Embeddings Inference's request for vectors of tokens."""

    inputs: Texts
    truncate: bool | None = Field(None, description="false: refuse a text over the encoder's limit (413).")
    truncation_direction: Literal["right", "Right"] | None = Field("right", description="Texts lose their end.")
    prompt_name: str | None = Field(None, description="A prompt of the encoder, see /info, to put before every text.")


class Pairs(BaseModel):
    """One text, and those to compare it with."""

    model_config = ConfigDict(extra="forbid", strict=True)

    source_sentence: Annotated[str, BeforeValidator(_texts)]
    sentences: Annotated[list[str], BeforeValidator(_texts), Field(min_length=1)]


class SimilarityRequest(BaseModel):
    """Text Embeddings Inference's request for cosines."""

    model_config = ConfigDict(extra="forbid", strict=True)

    inputs: Pairs
    parameters: dict[str, None] | None = Field(None, description="Accepted if empty.")


Query = Annotated[
    str, Field(max_length=LONGEST_QUERY, description="What the texts are scored against."), BeforeValidator(_texts)
]


class RerankRequest(_Body):
    """Text Embeddings Inference's request for scores."""

    query: Query
    texts: Annotated[list[str], BeforeValidator(_texts), Field(min_length=1)]
    raw_scores: bool = Field(False, description="The model's own numbers; false: their sigmoid, between 0 and 1.")
    return_text: bool = False
    truncate: bool | None = Field(None, description="false: refuse a text over the limit with its query (413).")
    truncation_direction: Literal["right", "Right"] | None = Field("right", description="Texts lose their end.")


def _documents(value: Any) -> Any:
    """Take the texts out of documents that are objects, and check all with one error: thousands would take a second."""
    if not isinstance(value, list):
        return value
    if any(isinstance(one, dict) and one.keys() != {"text"} for one in value):
        raise PydanticCustomError("texts", "a document must be a text, or an object with its text and nothing else")
    return _texts([one["text"] if isinstance(one, dict) else one for one in value])


class CohereRerankRequest(_Body):
    """Cohere's request for scores, which Jina's and vLLM's clients send too."""

    query: Query
    documents: Annotated[
        list[str], BeforeValidator(_documents), Field(min_length=1, description="Texts, or objects with a `text`.")
    ]
    model: str | None = Field(None, description="The model's name, as in /v1/models. null: the only one.")
    top_n: Number | None = Field(None, ge=1, description="How many of the best to return; null for all.")
    return_documents: bool = False
    user: str | None = Field(None, description="Accepted for compatibility and ignored.")


class Rank(BaseModel):
    """A text's position in the request, and its score. Answers are sorted by it, best first."""

    index: int
    score: float
    text: str | None = None


class Document(BaseModel):
    """A document that was scored."""

    text: str


class RerankResult(BaseModel):
    """A document's position in the request, and its score, between 0 and 1."""

    index: int
    relevance_score: float
    document: Document | None = None


class Embedding(BaseModel):
    """One text's vector."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class Usage(BaseModel):
    """Tokens of all texts, special tokens included, before truncation."""

    prompt_tokens: int
    total_tokens: int


class RerankAnswer(BaseModel):
    """Cohere's response, best document first."""

    id: str
    model: str
    results: list[RerankResult]
    usage: Usage
    meta: dict[str, Any]


class EmbeddingsAnswer(BaseModel):
    """OpenAI's response, and the positions of truncated texts."""

    object: Literal["list"]
    data: list[Embedding]
    model: str
    usage: Usage
    truncated: list[int]


class Model(BaseModel):
    """A model, as listed by /v1/models."""

    id: str
    object: Literal["model"] = "model"
    created: int = Field(description="When this gateway started, in seconds since 1970.")
    owned_by: str = "mirror-runtime"
    fingerprint: str = Field(description="Name of the vector space: vectors with equal fingerprints can be compared.")
    dimensions: list[int]
    max_tokens: int


class Models(BaseModel):
    """The one model that a gateway serves."""

    object: Literal["list"] = "list"
    data: list[Model]


class Info(BaseModel):
    """The served model and the limits."""

    model: str
    fingerprint: str = Field(description="Name of the vector space: vectors with equal fingerprints can be compared.")
    dim: int
    dimensions: list[int] = Field(description="Possible values of `dimensions` in a request.")
    max_tokens: int
    prompts: list[str] = Field(description="Names of the encoder's prompts.")
    speeds: dict[str, str] = Field(description="Possible values of `speed`, each with the answering fingerprint.")
    normalized: bool
    long_texts: str = Field(description="Policy for longer texts: truncate, error, chunk, chunk-weighted or chunk-max.")
    engine: str
    precision: str
    backend: str
    max_batch: int
    max_in_flight: int
    max_body_bytes: int
    version: str


class Live(BaseModel):
    """The response of a gateway that runs."""

    status: Literal["ok"] = "ok"


class Health(BaseModel):
    """The response of a healthy gateway: inferences succeed."""

    status: Literal["ok"] = "ok"
    fingerprint: str


class Error(BaseModel):
    """The error's details."""

    message: str
    type: str
    param: str | None
    code: str


class ErrorAnswer(BaseModel):
    """OpenAI's error response."""

    error: Error
