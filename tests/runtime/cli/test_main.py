"""The command as a whole, and what importing it and the package loads."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import mirror_runtime
from mirror_runtime.cli.clone import SCRIPTS
from mirror_runtime.cli.main import app, main
from mirror_runtime.cli.run import application, repeat_list_options, run_command
from mirror_runtime.errors import install_command

COMMANDS = ["encode", "verify", "doctor", "plan", "serve", "gateway", "deploy"]


HEAVY = {"torch", "transformers", "onnxruntime", "openvino", "tritonclient", "pyarrow", "matplotlib", "ray", "fastapi"}


@pytest.mark.process
def test_a_process_lists_its_commands_and_each_import_loads_no_engine_and_no_framework():
    code = (
        "import sys, mirror_runtime; print(*sys.modules)\n"
        "import mirror_runtime.triton; print(*sys.modules)\n"
        "from mirror_runtime.cli.entry import main; status = main(); print(*sys.modules); sys.exit(status)"
    )
    done = subprocess.run([sys.executable, "-c", code, "--help"], capture_output=True, text=True, check=True)
    assert all(f" {command} " in done.stdout for command in COMMANDS)
    package, triton, *_, command = (set(line.split()) for line in done.stdout.splitlines())
    assert "mirror_runtime" in package
    assert not package & {*HEAVY, "rich", "typer", "asyncio"}
    assert not triton & {*HEAVY, "rich", "typer", "pytriton", "grpc", "gevent"}
    assert not command & {*HEAVY, "uvicorn"}


@pytest.mark.process
def test_help_waits_for_no_framework():
    code = (
        "import sys\n"
        "from export import certificates, to_onnx, to_openvino, to_tensorrt, to_triton\n"
        "from training import evaluate, tune\n"
        "commands = certificates, to_onnx, to_openvino, to_tensorrt, to_triton, evaluate, tune\n"
        "status = [one.main(['-h']) for one in commands]\n"
        "sys.exit(any(status) or 'torch' in sys.modules or 'transformers' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)


def test_the_version_is_printed(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"mirror {mirror_runtime.__version__}\n"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself_and_refuses_unknown_options(command, capsys):
    registered = [one.name or getattr(one.callback, "__name__", "") for one in app.registered_commands]
    assert registered == [*COMMANDS, *SCRIPTS]
    assert main([command, "--help"]) == 0
    shown = capsys.readouterr().out
    assert "Usage: mirror" in shown
    assert main([command, "-h"]) == 0
    assert capsys.readouterr().out == shown
    assert main([command, "--no-such-option"]) == 2


@pytest.mark.parametrize("command", SCRIPTS)
def test_a_command_of_a_clone_becomes_its_script_with_all_arguments(command, monkeypatch):
    def become(program: str, argv: list[str]) -> None:
        ran.extend([program, *argv])

    ran: list[str] = []
    monkeypatch.setattr("os.execv", become)
    assert main([command, "in", "--help", "-x", "--y=1", "out"]) == 0
    program, same, script, *arguments = ran
    assert program == same == sys.executable
    assert Path(script).is_file()
    assert script.endswith(SCRIPTS[command][0])
    assert arguments == ["in", "--help", "-x", "--y=1", "out"]


def test_without_a_clone_its_commands_name_the_cure(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(mirror_runtime, "__file__", str(tmp_path / "lib" / "mirror_runtime" / "__init__.py"))
    assert main(["tune", "--base", "x"]) == 2
    assert "clone the repository" in capsys.readouterr().err


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
    assert capsys.readouterr().err == f"error: typer is not installed: {install_command('cli')}\n"


@pytest.mark.parametrize(
    ("origin", "command"),
    [
        ({"url": "file:///src/clone", "dir_info": {"editable": True}}, "pip install -e '/src/clone[cpu]'"),
        ({"url": "file:///x/mirror.whl", "archive_info": {}}, "pip install '/x/mirror.whl[cpu]'"),
        (
            {"url": "https://example.com/a.git", "vcs_info": {"vcs": "git", "commit_id": "1"}},
            "pip install 'mirror-runtime[cpu] @ git+https://example.com/a.git'",
        ),
        (None, "pip install 'mirror-runtime[cpu]'"),
    ],
)
def test_an_extra_is_installed_from_where_the_package_came_from(monkeypatch, origin, command):
    class Installed:
        def read_text(self, name: str) -> str | None:
            assert name == "direct_url.json"
            return origin and json.dumps(origin)

    monkeypatch.setattr("importlib.metadata.distribution", lambda name: Installed())
    assert install_command("cpu") == command


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(28, "No space left on device", "/a"), "error: /a: No space left on device (free some space"),
        (PermissionError(13, "Permission denied", "/a"), "error: /a: Permission denied (check its permissions)"),
        (
            FileNotFoundError(2, "No such file or directory", "x"),
            "error: x: No such file or directory (check the path)",
        ),
        (OSError("the Parquet file is torn"), "error: the Parquet file is torn"),
    ],
)
def test_an_error_of_the_operating_system_is_one_line(capsys, error, message):
    def fail() -> None:
        raise error

    assert run_command(application(fail), [], "mirror") == 2
    captured = capsys.readouterr().err
    assert captured.startswith(message)
    assert captured.count("\n") == 1


@pytest.mark.process
def test_a_reader_that_has_seen_enough_gets_no_traceback():
    script = (
        "import sys; from mirror_runtime.cli.run import application, run_command\n"
        "def many():\n    for i in range(100_000):\n        print(i)\n"
        "sys.exit(run_command(application(many), [], 'mirror'))"
    )
    pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process: Any
    with subprocess.Popen([sys.executable, "-c", script], **pipes) as process:
        assert process.stdout.readline() == b"0\n"
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 1
