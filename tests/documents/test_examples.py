"""Every example runs."""

import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from export import to_onnx
from tests.support.gateways import MODEL, Gateway
from tests.support.gateways import running as running_gateway
from tests.support.graphs import check_exact
from tests.support.paths import ROOT
from tests.support.tiny_encoders import write_tiny_bert
from tests.support.trace_cache import cached_traces
from training import tune

LINES = ["the cat sat on the mat.", "a man is playing a guitar", "a cat sat on a mat"]


def example(name: str) -> ModuleType:
    specification = importlib.util.spec_from_file_location(f"example_{name}", ROOT / "examples" / f"{name}.py")
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    file = tmp_path / "texts.txt"
    file.write_text("\n".join(LINES), encoding="utf-8")
    return file


@pytest.fixture
def running(gateway_bundle: Path) -> Iterator[Gateway]:
    with running_gateway(gateway_bundle) as gateway:
        yield gateway


def test_encode(tiny_bundle: Path, texts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    example("encode").main(str(tiny_bundle), str(texts))
    printed = capsys.readouterr().out
    assert LINES[0] in printed
    assert LINES[2] in printed


def test_search_faiss(tiny_bundle: Path, texts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    example("search_faiss").main(str(tiny_bundle), str(texts), LINES[1])
    assert capsys.readouterr().out.splitlines()[0] == f"1.000  {LINES[1]}"
    assert Path(f"{texts}.faiss").is_file()
    assert len(Path(f"{texts}.space").read_text()) == 16


def test_openai_client(running: Gateway, capsys: pytest.CaptureFixture[str]) -> None:
    example("openai_client").main(f"{running.url}/v1", MODEL, [LINES[0], LINES[0]])
    assert capsys.readouterr().out.startswith("1.000  of ")


def test_langchain_search(running: Gateway, texts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    example("langchain_search").main(f"{running.url}/v1", MODEL, str(texts), LINES[1])
    assert capsys.readouterr().out == f"1.000  {LINES[1]}\n"


@pytest.mark.serving
def test_serve_and_ask(gateway_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    example("serve_and_ask").main(str(gateway_bundle), LINES, engine="fake")
    assert capsys.readouterr().out.startswith("vector space 0123456789abcdef\nthe cat sat on the mat. [")


@pytest.mark.slow  # tunes and exports
def test_tune_on_documents(texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tiny_bert(base := tmp_path / "base", layers=1)
    documents = tmp_path / "docs"
    documents.mkdir()
    sections = [f"# {animal}\n\nA man is playing a guitar and a {animal}.\n\n" for animal in ("cat", "dog")]
    (documents / "page.md").write_text("".join(sections), encoding="utf-8")
    commands = {"tune.py": tune.main, "to_onnx.py": to_onnx.main}

    def in_process(command: list[str], *, check: bool) -> subprocess.CompletedProcess[bytes]:
        """Run the command here: a process of its own would import PyTorch for seconds, and other tests start both."""
        script = Path(command[1])
        assert (command[0], check, script.is_relative_to(ROOT)) == (sys.executable, False, True)
        few = ["--precision", "fp32", "--parity-texts", str(texts)] if script.name == "to_onnx.py" else []
        return subprocess.CompletedProcess(command, commands[script.name]([*command[2:], *few]))

    monkeypatch.setattr(subprocess, "run", in_process)
    bundle = tmp_path / "bundle"
    options = ("--pooling", "mean", "--epochs", "1", "--max-tokens", "16", "--batch-size", "2", "--probe", "none")
    with cached_traces():
        example("tune_on_documents").main(str(base), str(documents), str(tmp_path / "run"), str(bundle), *options)
    check_exact(bundle)


def test_the_status_of_a_worse_encoder_is_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, 3))
    with pytest.raises(SystemExit, match="3"):
        example("tune_on_documents").main("base", "docs", "run", "bundle")
