"""Work beside the block is done when it ends, and what goes wrong in it is told as if it had gone wrong here."""

import os
import signal
import sys
import time

import pytest

from export import beside as module
from export.beside import beside
from export.bundle.build import Request, build
from export.graph import trace as graphs
from mirror_runtime.bundle import Layout, Pooling
from mirror_runtime.errors import EngineError


@pytest.fixture(params=[True, False], ids=["forked", "one after the other"])
def forks(request, monkeypatch):
    monkeypatch.setattr(module, "FORKS", request.param)
    return request.param


def test_both_are_done_when_the_block_ends(tmp_path, forks):
    with beside(lambda: (tmp_path / "child").write_text(str(os.getpid())), "writing"):
        (tmp_path / "parent").write_text("here")
    assert (tmp_path / "parent").exists()
    assert ((tmp_path / "child").read_text() != str(os.getpid())) == forks


@pytest.mark.parametrize("error", [EngineError("no such operator"), OSError(28, "No space left on device")])
def test_its_errors_arrive(error, forks):
    def fail():
        raise error

    with pytest.raises(type(error), match=r"no such operator|No space left on device"), beside(fail, "writing"):
        pass


def test_a_process_that_dies_is_an_error_that_names_it():
    with (
        pytest.raises(EngineError, match=r"the writing died with exit status -9: it may have been out of memory"),
        beside(lambda: os.kill(os.getpid(), signal.SIGKILL), "writing"),
    ):
        pass


def test_it_can_warn_while_another_thread_holds_the_terminal(monkeypatch, capfd):
    class Held:
        def write(self, _text):
            time.sleep(600)

        def flush(self):
            pass

    def warn():
        sys.stderr.write("from the child")

    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", Held())
        with beside(warn, "warning"):
            pass
    assert "from the child" in capfd.readouterr().err


def test_an_error_in_the_block_ends_the_work(tmp_path):
    def wait():
        (tmp_path / "pid").write_text(str(os.getpid()))
        time.sleep(600)

    def stop():
        while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
            time.sleep(0.01)
        raise KeyboardInterrupt

    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt), beside(wait, "waiting"):
        stop()
    assert time.monotonic() - began < 60
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_a_packed_graph_that_cannot_be_translated_leaves_nothing(tiny_bert, tmp_path, monkeypatch):
    translate = graphs.export_graph

    def fail(reference, layout, path, **options):
        if layout is Layout.PACKED:
            raise EngineError("PyTorch cannot translate the encoder to ONNX: no such operator")
        return translate(reference, layout, path, **options)

    monkeypatch.setattr(graphs, "export_graph", fail)
    with pytest.raises(EngineError, match="no such operator"):
        build(Request(encoder=str(tiny_bert), output=tmp_path / "bundle", pooling=Pooling.MEAN))
    assert not list(tmp_path.iterdir())
