"""Build a FAISS index of a file's lines and search it; the index remembers its vector space.

python examples/search_faiss.py bundles/mine texts.txt "remove a directory tree"
"""

import sys
from pathlib import Path

import faiss

from mirror_runtime import Encoder


def main(bundle: str, file: str, query: str) -> None:
    """Print the three lines of `file` nearest to `query`."""
    texts = Path(file).read_text(encoding="utf-8").splitlines()
    with Encoder.load(bundle) as encoder:
        vectors, asked = encoder.encode(texts), encoder.encode([query])
        fingerprint = encoder.fingerprint
    for rows in (vectors, asked):
        faiss.normalize_L2(rows)  # the inner product of unit vectors is the cosine; most bundles are normalised already
    index = faiss.IndexFlatIP(vectors.shape[1])
    index.add(vectors)
    faiss.write_index(index, f"{file}.faiss")
    Path(f"{file}.space").write_text(fingerprint, encoding="utf-8")
    scores, found = index.search(asked, min(3, len(texts)))
    for score, number in zip(scores[0], found[0], strict=True):
        print(f"{score:.3f}  {texts[number]}")


if __name__ == "__main__":
    main(*sys.argv[1:4])
