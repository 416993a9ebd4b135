"""Ask a running gateway with the openai package.

mirror gateway bundles/mine --model-name mine
python examples/openai_client.py http://127.0.0.1:8080/v1 mine "delete a folder" "remove a directory tree"
"""

import sys

import numpy as np
from openai import OpenAI


def main(url: str, model: str, texts: list[str]) -> None:
    """Print the cosine of the first two texts."""
    with OpenAI(base_url=url, api_key="none") as client:
        answer = client.embeddings.create(model=model, input=texts)
    first, second = np.array([item.embedding for item in answer.data[:2]], dtype=np.float32)
    print(
        f"{first @ second / np.linalg.norm(first) / np.linalg.norm(second):.3f}  of {answer.usage.total_tokens} tokens"
    )


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3:])
