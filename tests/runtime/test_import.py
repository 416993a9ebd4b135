import subprocess
import sys

import pytest

import mirror_runtime

HEAVY = {"torch", "transformers", "onnxruntime", "openvino", "tritonclient", "pyarrow", "rich", "typer"}


@pytest.mark.process
@pytest.mark.parametrize(
    ("module", "heavy"),
    [("mirror_runtime", {*HEAVY, "asyncio"}), ("mirror_runtime.triton", {*HEAVY, "pytriton", "grpc", "gevent"})],
)
def test_importing_a_package_loads_no_engine_and_no_framework(module, heavy):
    code = f"import sys, {module}; print(*{{m.split('.')[0] for m in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert not loaded & heavy
    assert "mirror_runtime" in loaded


def test_the_public_names_are_exactly_those_promised():
    lazy = {"AsyncEncoder", "AsyncStats"}
    public = {name for name in vars(mirror_runtime) if not name.startswith("_")} - {"TYPE_CHECKING", "Any"} | lazy
    modules = {name for name in public - lazy if type(vars(mirror_runtime)[name]).__name__ == "module"}
    assert all(hasattr(mirror_runtime, name) for name in mirror_runtime.__all__)
    assert public - modules == set(mirror_runtime.__all__) - {"__version__"}


def test_the_command_names_the_extra_that_it_misses(monkeypatch, capsys):
    from mirror_runtime.cli.entry import main

    monkeypatch.setitem(sys.modules, "typer", None)
    assert main() == 2
    assert capsys.readouterr().err == "error: typer is not installed: pip install 'mirror-runtime[cli]'\n"
