import json
import subprocess
import sys

import pytest

import mirror_runtime


@pytest.mark.process
def test_importing_the_runtime_loads_no_engine_and_no_framework():
    code = "import sys, json, mirror_runtime; print(json.dumps(sorted({m.split('.')[0] for m in sys.modules})))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    loaded = set(json.loads(out))
    heavy = {"torch", "transformers", "onnxruntime", "openvino", "tritonclient", "pyarrow", "rich", "typer", "asyncio"}
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
