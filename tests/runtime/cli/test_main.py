"""The command as a whole: its list of commands, lazy imports, and lists of values after one option."""

import subprocess
import sys

import pytest

from mirror_runtime.cli.main import app, main
from mirror_runtime.cli.run import repeat_list_options

COMMANDS = ["encode", "verify", "doctor", "plan", "serve", "gateway", "deploy"]


@pytest.mark.process
def test_the_process_lists_its_commands_and_imports_no_engine_or_server():
    code = "import sys; from mirror_runtime.cli.entry import main; x = main(); print(*sys.modules); sys.exit(x)"
    done = subprocess.run([sys.executable, "-c", code, "--help"], capture_output=True, text=True, check=True)
    assert all(f" {command} " in done.stdout for command in COMMANDS)
    heavy = {"torch", "onnxruntime", "openvino", "pyarrow", "matplotlib", "ray", "tritonclient", "fastapi", "uvicorn"}
    assert not heavy & set(done.stdout.split())


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself_and_refuses_unknown_options(command, capsys):
    assert [getattr(registered.callback, "__name__", "") for registered in app.registered_commands] == COMMANDS
    assert main([command, "--help"]) == 0
    assert "Usage: mirror" in capsys.readouterr().out
    assert main([command, "--no-such-option"]) == 2


@pytest.mark.parametrize(
    ("argv", "parsed"),
    [
        (["--precision", "fp32", "bf16", "IN"], ["--precision", "fp32", "--precision", "bf16", "IN"]),
        (["--precision", "FP32", "BF16"], ["--precision", "FP32", "--precision", "BF16"]),
        (["--sts", "a.tsv", "b.tsv", "--seed", "1"], ["--sts", "a.tsv", "--sts", "b.tsv", "--seed", "1"]),
        (["IN", "--seed", "1", "2"], ["IN", "--seed", "1", "2"]),
    ],
)
def test_an_option_takes_a_list_of_values(argv, parsed):
    assert repeat_list_options(argv, {"--precision": {"fp32", "bf16"}, "--sts": None}) == parsed
