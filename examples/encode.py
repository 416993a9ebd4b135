"""Encode a file of texts, one a line, and print the two most alike.

python examples/encode.py bundles/mine texts.txt
"""

import sys
from pathlib import Path

import numpy as np

from mirror_runtime import Encoder


def main(bundle: str, file: str) -> None:
    """Encode the lines of `file` with `bundle`."""
    texts = Path(file).read_text(encoding="utf-8").splitlines()
    with Encoder.load(bundle) as encoder:
        vectors = encoder.encode(texts)  # float32 [n, dim], unit length
    similarity = vectors @ vectors.T
    np.fill_diagonal(similarity, -1)
    first, second = np.unravel_index(similarity.argmax(), similarity.shape)
    print(f"{similarity[first, second]:.3f}  {texts[first]}  |  {texts[second]}")


if __name__ == "__main__":
    main(*sys.argv[1:3])
