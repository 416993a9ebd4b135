"""sentence-transformers as an independent witness of how a folder is read."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest

from encoders.reference import Reference
from encoders.source import resolve
from export.bundle.build import Request, build
from export.proof import witness
from mirror_runtime.bundle import Pooling, Precision
from mirror_runtime.errors import ParityError
from tests.support.tiny_encoders import write_tiny_static

TEXTS = ("the cat sat on the mat.", "", "a man is playing a guitar", "dog river " * 40)


@pytest.fixture
def published(tiny_bert: Path, tmp_path: Path) -> Path:
    """A folder as sentence-transformers publishes it: mean pooling, not normalised."""
    folder = Path(shutil.copytree(tiny_bert, tmp_path / "published"))
    kinds = ("Transformer", "Pooling")
    modules = [
        {"idx": i, "name": str(i), "path": f"{i}_{kind}" if i else "", "type": f"sentence_transformers.models.{kind}"}
        for i, kind in enumerate(kinds)
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir()
    pooling = {"word_embedding_dimension": 32, "pooling_mode_mean_tokens": True}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    return folder


def asked(*arguments):
    found = witness.question(*arguments)
    assert found is not None
    return found


@pytest.mark.parametrize("family", ["static", "model2vec"])
def test_a_small_limit_leaves_texts_with_tokens_or_no_testimony(family, tmp_path):
    if not witness.available(family):
        pytest.skip(f"{witness.library(family)} is not installed")
    folder = tmp_path / "static"
    write_tiny_static(family, folder, limit=6)
    reference = Reference.load(resolve(str(folder)))
    found = asked(folder, reference)
    assert (found.problem, found.texts >= 8) == ("", True)
    assert witness.question(folder, reference, ("", "the cat sat on the mat")) is None


def test_it_agrees_with_a_right_reading_on_ragged_texts(published):
    source = resolve(str(published))
    assert source.published == published
    found = asked(published, Reference.load(source))
    assert (found.problem, found.texts >= 40, found.min_cosine > 0.999999) == ("", True, True)


@pytest.mark.parametrize(
    ("misread", "problem"),
    [
        ({"pooling": Pooling.CLS}, "cosine 0."),
        ({"max_tokens": 20}, "cosine 0."),
        ({"normalize": True}, "length "),
        ({"template": "the {text}"}, "cosine 0."),
        ({"dim": 16}, "its vectors have 32 components and ours 16"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_every_wrong_reading_is_found(published, misread, problem):
    reference = Reference.load(resolve(str(published)))
    wrong = dataclasses.replace(reference, spec=dataclasses.replace(reference.spec, **misread))
    assert asked(published, wrong, TEXTS).problem.startswith(problem)


def test_a_folder_that_it_cannot_read_is_a_difference_too(published):
    reference = Reference.load(resolve(str(published)))
    (published / "1_Pooling" / "config.json").write_text("{}")
    assert asked(published, reference, TEXTS).problem.startswith("it fails with ")


def test_an_encoder_that_the_folder_does_not_record_has_no_witness(published, tiny_bert):
    assert resolve(str(tiny_bert), pooling=Pooling.MEAN).published is None
    for changed in (resolve(str(published), max_tokens=20), resolve(str(published), normalize=True)):
        assert changed.published is None


def test_a_difference_stops_the_export_unless_it_is_accepted_and_then_the_card_states_it(
    published, tiny_graphs, tmp_path, monkeypatch
):
    monkeypatch.setattr(witness, "CANARIES", TEXTS)
    monkeypatch.setattr(witness, "EDGE_CASES", ())
    monkeypatch.setattr(witness, "parity_texts", lambda *_: ())
    request = Request(encoder=str(published), output=tmp_path / "bundle", texts=TEXTS, precisions=(Precision.FP32,))
    build(request)
    assert "computes the reference's vectors: worst cosine 1.000000 of 4 texts" in card(request)

    question = witness.question
    monkeypatch.setattr(witness, "question", lambda folder, reference: question(folder, reference_of(reference)))
    with pytest.raises(ParityError, match=r"computes other vectors from .*cosine 0\..*--accept-difference"):
        build(dataclasses.replace(request, output=tmp_path / "refused"))
    assert not (tmp_path / "refused").exists()
    accepted = dataclasses.replace(request, output=tmp_path / "accepted", accept_difference=True)
    build(accepted)
    assert "computes other vectors**: cosine 0." in card(accepted)


def reference_of(reference: Reference) -> Reference:
    return dataclasses.replace(reference, spec=dataclasses.replace(reference.spec, pooling=Pooling.MAX))


def card(request: Request) -> str:
    return (request.output / "README.md").read_text(encoding="utf-8")
