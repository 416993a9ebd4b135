"""Mistakes on the command line are errors before anything is served."""

import socket

import pytest

from mirror_runtime import Encoder
from mirror_runtime.cli.main import main
from mirror_runtime.errors import InputError
from mirror_runtime.gateway.settings import LOOPBACK, GatewaySettings, hosts_allowed_at, read_keys
from tests.support.gateways import changed_bundle

LONG = "a-key-of-many-characters"


@pytest.fixture
def refused(capsys, monkeypatch):
    """Run `mirror gateway`, which must refuse to start, and return its message."""
    monkeypatch.delenv("MIRROR_API_KEY", raising=False)

    def run(*arguments: object) -> str:
        assert main(["gateway", *map(str, arguments)]) == 2
        message = capsys.readouterr().err
        assert message.startswith("error: ")
        assert message.count("\n") == 1
        return message

    return run


def test_exactly_one_backend_is_required(refused, gateway_bundle):
    assert "pass either a bundle or --triton" in refused()
    assert "pass either a bundle or --triton" in refused(gateway_bundle, "--triton", "127.0.0.1:8001")
    assert "pass it to mirror serve" in refused("--triton", "127.0.0.1:8001", "--invariant")
    assert "--vector-cache needs the bundle" in refused("--triton", "127.0.0.1:8001", "--vector-cache", 5000)
    assert "protocol is 'pigeon'" in refused("--triton", "h:1", "--triton-protocol", "pigeon", "--port", 0)


def test_the_options_of_the_encoder_reach_it(refused, gateway_bundle, monkeypatch):
    def load(_bundle, **options):
        cache = options["vector_cache"]
        raise InputError(f"{options['engine']} {options['invariant']} {cache and cache.max_bytes}")

    monkeypatch.setattr(Encoder, "load", load)
    cached = ("--invariant", "--vector-cache", 5000)
    assert "fake True 5000" in refused(gateway_bundle, "--engine", "fake", *cached, "--port", 0)
    assert "fake False None" in refused(gateway_bundle, "--engine", "fake", "--port", 0)


def test_impossible_limits_and_int8_vectors_are_refused(refused, gateway_bundle, tmp_path):
    fake = (gateway_bundle, "--engine", "fake", "--port", 0)
    assert "--dimensions 8: this encoder's vectors have 8; choose fewer" in refused(*fake, "--dimensions", 8)
    elastic = changed_bundle(gateway_bundle, tmp_path / "elastic", trained_dims=[2, 4])
    assert "--dimensions 3: this encoder was trained for 2, 4" in refused(
        elastic, "--engine", "fake", "--port", 0, "--dimensions", 3
    )
    assert "less than the 100 texts" in refused(*fake, "--max-batch", 100, "--max-in-flight", 50)
    int8 = changed_bundle(gateway_bundle, tmp_path / "int8", vector_type="int8", int8_scale=0.01)
    assert "gives int8 vectors, which" in refused(int8, "--engine", "fake", "--port", 0)


def test_a_port_in_use_and_a_server_that_is_absent_are_errors(refused, gateway_bundle):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"port {port} on 127.0.0.1 cannot be used" in refused(gateway_bundle, "--engine", "fake", "--port", port)
    assert str(port) in refused("--triton", f"127.0.0.1:{port}", "--wait", 0, "--port", 0, "--timeout", 2)


@pytest.mark.parametrize(
    ("host", "named", "allowed"),
    [
        ("0.0.0.0", [], ()),
        ("127.0.0.1", ["*"], ()),
        ("127.0.0.1", [], LOOPBACK),
        ("LOCALHOST", [], LOOPBACK),
        ("::1", [], LOOPBACK),
        ("127.0.0.2", [], (*LOOPBACK, "127.0.0.2")),
        ("fd00::7", ["Mine.example", "FD00::8"], ("mine.example", "[fd00::8]", *LOOPBACK, "[fd00::7]")),
    ],
)
def test_the_hosts_that_are_allowed(host, named, allowed):
    assert hosts_allowed_at(host, named) == allowed


def test_keys_come_from_a_file_or_the_environment_and_messages_never_contain_one(refused, tmp_path, monkeypatch):
    keys = tmp_path / "keys"
    keys.write_text(f"{LONG}-1\n\n  {LONG}-2  \n")
    assert read_keys(keys, {}) == (f"{LONG}-1", f"{LONG}-2")
    assert read_keys(None, {"MIRROR_API_KEY": LONG}) == (LONG,)
    assert read_keys(None, {}) == ()
    assert LONG not in repr(GatewaySettings(model="m", keys=(LONG,)))
    with pytest.raises(InputError, match="use one of them"):
        read_keys(keys, {"MIRROR_API_KEY": LONG})
    for content in ("", "short\n", f"{LONG}\nshort\n", f"{LONG}-ü\n"):
        keys.write_text(content)
        with pytest.raises(InputError, match="at least 16 printable ASCII") as error:
            read_keys(keys, {})
        assert LONG not in str(error.value)
    keys.write_bytes(b"\xff\xfe" * 20)
    with pytest.raises(InputError, match="cannot be read: it is not text"):
        read_keys(keys, {})
    with pytest.raises(InputError, match="cannot be read: No such file"):
        read_keys(tmp_path / "absent", {})
    monkeypatch.setenv("MIRROR_API_KEY", "secret-short")
    assert "secret" not in refused("bundle")
