"""MaxSim is the plain double loop over a query's and a document's tokens."""

import numpy as np
import pytest

from evaluation.late_interaction import max_sim
from mirror_runtime.errors import InputError


def test_scores_are_those_of_the_double_loop():
    random = np.random.default_rng(0)

    def texts(count: int) -> list[np.ndarray]:
        return [random.normal(size=(random.integers(1, 9), 5)).astype(np.float32) for _ in range(count)]

    queries, documents = texts(7), texts(12)
    expected = np.zeros((7, 12))
    for i, query in enumerate(queries):
        for j, document in enumerate(documents):
            for token in query:
                expected[i, j] += max(float(token @ other) for other in document)
    np.testing.assert_allclose(max_sim(queries, documents), expected, rtol=1e-5)
    assert max_sim([], documents).shape == (0, 12)
    with pytest.raises(InputError, match="document 1 has no vector of a token"):
        max_sim(queries, [documents[0], documents[1][:0]])
