"""Search with LangChain over a running gateway.

mirror gateway bundles/mine --model-name mine
python examples/langchain_search.py http://127.0.0.1:8080/v1 mine texts.txt "remove a directory tree"
"""

import sys
from pathlib import Path

from langchain_core.vectorstores import InMemoryVectorStore
from langchain_openai import OpenAIEmbeddings
from pydantic import SecretStr


def main(url: str, model: str, file: str, query: str) -> None:
    """Print the line of `file` nearest to `query`."""
    # The gateway refuses token ids, which would belong to another tokenizer: let LangChain send text.
    embeddings = OpenAIEmbeddings(
        model=model, base_url=url, api_key=SecretStr("none"), check_embedding_ctx_length=False
    )
    store = InMemoryVectorStore(embeddings)
    store.add_texts(Path(file).read_text(encoding="utf-8").splitlines())
    ((document, score),) = store.similarity_search_with_score(query, k=1)
    print(f"{score:.3f}  {document.page_content}")


if __name__ == "__main__":
    main(*sys.argv[1:5])
