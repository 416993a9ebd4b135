"""The clients that people have work with a gateway at their defaults: nightly, each skipped where it is not installed.

`pip install -r tests/clients.txt` installs the versions that this was tried with.
"""

import asyncio
import json
import os
import shutil
import subprocess
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest

from tests.support.gateways import MODEL, running

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]  # not our warnings

TEXTS = ["", "a", "Zwei Häuser am See 🏠", *(" ".join(["word"] * n) for n in range(1, 60, 9))]
KEY = "sk-of-sixteen-letters"


@pytest.fixture(scope="module")
def gateway(gateway_bundle):
    with running(gateway_bundle, dimensions=(4,), keys=(KEY,)) as gateway:
        yield gateway


@pytest.fixture(scope="module", autouse=True)
def offline():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")
        patch.setenv("HAYSTACK_TELEMETRY_ENABLED", "False")
        patch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")
        yield


def openai(url: str, texts: Sequence[str], **options: Any) -> Any:
    from openai import OpenAI

    with OpenAI(base_url=f"{url}/v1", api_key=KEY) as client:
        return [item.embedding for item in client.embeddings.create(model=MODEL, input=list(texts), **options).data]


def openai_async(url: str, texts: Sequence[str]) -> Any:
    from openai import AsyncOpenAI

    async def run() -> Any:
        async with AsyncOpenAI(base_url=f"{url}/v1", api_key=KEY) as client:
            return [item.embedding for item in (await client.embeddings.create(model=MODEL, input=list(texts))).data]

    return asyncio.run(run())


def azure(url: str, texts: Sequence[str]) -> Any:
    from openai import AzureOpenAI

    with AzureOpenAI(azure_endpoint=url, azure_ad_token=KEY, api_version="2024-10-21") as client:
        return [item.embedding for item in client.embeddings.create(model=MODEL, input=list(texts)).data]


def litellm(url: str, texts: Sequence[str], **options: Any) -> Any:
    from litellm import embedding

    answer = embedding(model=f"openai/{MODEL}", input=list(texts), api_base=f"{url}/v1", api_key=KEY, **options)
    return [item["embedding"] for item in answer.data]


def langchain_openai(url: str, texts: Sequence[str]) -> Any:
    from langchain_openai import OpenAIEmbeddings
    from pydantic import SecretStr

    access: dict[str, Any] = {"base_url": f"{url}/v1", "api_key": SecretStr(KEY)}
    embeddings = OpenAIEmbeddings(model=MODEL, check_embedding_ctx_length=False, **access)
    return [*embeddings.embed_documents(list(texts[:-1])), embeddings.embed_query(texts[-1])]


def langchain_huggingface(url: str, texts: Sequence[str]) -> Any:
    from huggingface_hub import InferenceClient
    from langchain_huggingface import HuggingFaceEndpointEmbeddings

    # Since 1.2 the class refuses addresses as its model, and takes a client only after it is made.
    embeddings = HuggingFaceEndpointEmbeddings(model="any/name", huggingfacehub_api_token=KEY)
    embeddings.client = InferenceClient(url, token=KEY)
    return [*embeddings.embed_documents(list(texts[:-1])), embeddings.embed_query(texts[-1])]


def llama_index_openai_like(url: str, texts: Sequence[str]) -> Any:
    from llama_index.embeddings.openai_like import OpenAILikeEmbedding

    embedding = OpenAILikeEmbedding(model_name=MODEL, api_base=f"{url}/v1", api_key=KEY)
    return [*embedding.get_text_embedding_batch(list(texts[:-1])), embedding.get_query_embedding(texts[-1])]


def llama_index_tei(url: str, texts: Sequence[str]) -> Any:
    from llama_index.embeddings.text_embeddings_inference import TextEmbeddingsInference

    embedding = TextEmbeddingsInference(
        model_name=MODEL, base_url=url, auth_token=KEY, text_instruction="", query_instruction=""
    )
    return embedding.get_text_embedding_batch(list(texts))


def huggingface_hub(url: str, texts: Sequence[str]) -> Any:
    from huggingface_hub import InferenceClient

    client = InferenceClient(url, token=KEY)
    return np.concatenate([client.feature_extraction(text) for text in texts])


def huggingface_hub_similarity(url: str, texts: Sequence[str]) -> Any:
    from huggingface_hub import InferenceClient

    cosines = InferenceClient(f"{url}/similarity", token=KEY).sentence_similarity(texts[1], other_sentences=list(texts))
    vectors = np.array(openai(url, texts))
    np.testing.assert_allclose(cosines, vectors @ vectors[1], atol=1e-5)
    return vectors


def haystack(url: str, texts: Sequence[str]) -> Any:
    from haystack import Document
    from haystack.components.embedders import OpenAIDocumentEmbedder
    from haystack.utils import Secret

    embedder = OpenAIDocumentEmbedder(
        api_key=Secret.from_token(KEY), model=MODEL, api_base_url=f"{url}/v1", progress_bar=False
    )
    return [one.embedding for one in embedder.run([Document(content=text) for text in texts])["documents"]]


def curl_http2(url: str, texts: Sequence[str]) -> Any:
    command = ["curl", "-sS", "--http2", f"{url}/v1/embeddings", "-H", f"Authorization: Bearer {KEY}"]
    body = json.dumps({"model": MODEL, "input": list(texts)})
    done = subprocess.run([*command, "--json", body], capture_output=True, text=True, check=True)
    return [item["embedding"] for item in json.loads(done.stdout)["data"]]


JAVA = """
import java.net.URI;
import java.net.http.*;

class Embed {
    public static void main(String[] arguments) throws Exception {
        var client = HttpClient.newHttpClient();
        for (int i = 0; i < 2; i++) {  // the second on the connection of the first
            var request = HttpRequest.newBuilder(URI.create(arguments[0] + "/v1/embeddings"))
                .header("Content-Type", "application/json").header("Authorization", "Bearer " + arguments[1])
                .POST(HttpRequest.BodyPublishers.ofString(arguments[2])).build();
            System.out.println(client.send(request, HttpResponse.BodyHandlers.ofString()).body());
        }
    }
}
"""


def jdk(url: str, texts: Sequence[str]) -> Any:
    source = os.path.join(os.environ["PYTEST_TMP"], "Embed.java")
    with open(source, "w") as stream:
        stream.write(JAVA)
    body = json.dumps({"model": MODEL, "input": list(texts)})
    done = subprocess.run(["java", source, url, KEY, body], capture_output=True, text=True, check=True)
    first, second = map(json.loads, done.stdout.splitlines())
    assert first == second
    return [item["embedding"] for item in first["data"]]


CALLS: list[tuple[str, Callable[..., Any], dict[str, Any]]] = [
    ("openai", openai, {}),
    ("openai", openai, {"encoding_format": "float", "dimensions": 4, "user": "someone"}),
    ("openai", openai_async, {}),
    ("openai", azure, {}),
    ("litellm", litellm, {}),
    ("litellm", litellm, {"encoding_format": None, "dimensions": 4, "allowed_openai_params": ["dimensions"]}),
    ("langchain_openai", langchain_openai, {}),
    ("langchain_huggingface", langchain_huggingface, {}),
    ("llama_index.embeddings.openai_like", llama_index_openai_like, {}),
    ("llama_index.embeddings.text_embeddings_inference", llama_index_tei, {}),
    ("huggingface_hub", huggingface_hub, {}),
    ("huggingface_hub", huggingface_hub_similarity, {}),
    ("haystack", haystack, {}),
    ("curl", curl_http2, {}),
    ("java", jdk, {}),
]


@pytest.mark.parametrize(("needs", "call", "options"), CALLS, ids=lambda part: getattr(part, "__name__", str(part)))
def test_a_client_gets_the_vectors_of_the_encoder(gateway, tmp_path, monkeypatch, needs, call, options):
    found = shutil.which(needs) if needs in ("curl", "java") else find_spec(needs.split(".")[0]) and find_spec(needs)
    if not found:
        pytest.skip(f"{needs} is not installed: pip install -r tests/clients.txt")
    monkeypatch.setenv("PYTEST_TMP", str(tmp_path))
    texts = TEXTS if call is not haystack else TEXTS[1:]  # it refuses an empty text itself
    expected = gateway.encoder.encode(texts)[:, : options.get("dimensions")]
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    np.testing.assert_allclose(np.array(call(gateway.url, texts, **options)), expected, atol=1e-6)
