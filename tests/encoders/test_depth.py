"""Encoders of fewer layers: what the head reads is the same layer as before, or the layers are refused."""

import dataclasses
from pathlib import Path

import pytest

from encoders.depth import keep_layers
from encoders.reference import Reference
from encoders.source import resolve
from mirror_runtime.bundle import Ditto, Pooling
from mirror_runtime.errors import InputError
from tests.support.tiny_encoders import write_tiny_encoder


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    folder: Path = tmp_path_factory.mktemp("depth") / "bert"
    write_tiny_encoder("bert", folder, layers=4)
    return Reference.load(resolve(str(folder), pooling=Pooling.MEAN))


@pytest.mark.parametrize(
    ("head", "kept", "expected"),
    [
        ({"layers": (0, 2, -1)}, [1, 3], {"layers": (0, 1, -1)}),
        ({"layers": (1, -2)}, [0, 2, 3], {"layers": (1, -2)}),
        ({"layers": (4,)}, [0, 3], {"layers": (2,)}),
        ({"layers": (2, -1)}, [0, 2, 3], "reads layer 1 (counted from 0): keep that layer"),
        ({"pooling": Pooling.DITTO, "ditto": Ditto(layer=2, head=1)}, [0, 2], {"ditto": Ditto(layer=1, head=1)}),
        ({"pooling": Pooling.DITTO, "ditto": Ditto(layer=1, head=1)}, [0, 2], "reads layer 1 (counted from 0)"),
    ],
)
def test_the_head_reads_the_same_layers_or_the_cut_is_refused(whole: Reference, head, kept, expected) -> None:
    reference = dataclasses.replace(whole, spec=dataclasses.replace(whole.spec, **head))
    if isinstance(expected, str):
        with pytest.raises(InputError) as refused:
            keep_layers(reference, kept)
        assert expected in str(refused.value)
        return
    spec = keep_layers(reference, kept).spec
    assert spec == dataclasses.replace(reference.spec, **expected)
