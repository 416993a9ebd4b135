"""Pushing to a hub, with a stand-in for its API."""

import json
from types import SimpleNamespace
from typing import ClassVar

import huggingface_hub
import pytest
from huggingface_hub import constants
from huggingface_hub.errors import HfHubHTTPError

from export import to_onnx
from export.bundle.hub import check_hub, push
from mirror_runtime.bundle import read_manifest
from mirror_runtime.errors import InputError


class FakeApi:
    """Records calls in its class; the upload raises `failure`."""

    calls: ClassVar[list[tuple[str, dict]]]
    failure: ClassVar[BaseException | None]

    def create_repo(self, repo_id, **options):
        self.calls.append((repo_id, options))

    def upload_folder(self, **options):
        if self.failure is not None:
            raise self.failure
        self.calls.append(("upload", options))
        return SimpleNamespace(commit_url="https://hub.invalid/owner/name/commit/1")


@pytest.fixture
def hub(monkeypatch) -> type[FakeApi]:
    FakeApi.calls, FakeApi.failure = [], None
    monkeypatch.setattr(huggingface_hub, "HfApi", FakeApi)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_of_this_test")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    return FakeApi


def test_the_folder_is_pushed_with_its_fingerprint(tiny_bundle, hub):
    manifest = read_manifest(tiny_bundle)
    url = push(tiny_bundle, "owner/name", manifest, private=True)
    assert url.endswith("/commit/1")
    (created, options), (_, upload) = hub.calls
    assert created == "owner/name"
    assert options == {"private": True, "exist_ok": True}
    assert upload["folder_path"] == tiny_bundle
    assert manifest.fingerprint in upload["commit_message"]
    assert "onnxruntime fp32" in upload["commit_description"]


def test_a_hub_that_cannot_be_reached_costs_no_bundle(tiny_bundle, hub):
    network = next(base for base in HfHubHTTPError.__bases__ if base is not OSError)
    for failure in (OSError("Temporary failure in name resolution"), network("refused")):
        hub.failure = failure
        with pytest.raises(InputError, match=r"the bundle is in .*, then: hf upload owner/name"):
            push(tiny_bundle, "owner/name", read_manifest(tiny_bundle))
    hub.failure = KeyError("a mistake of ours")
    with pytest.raises(KeyError):
        push(tiny_bundle, "owner/name", read_manifest(tiny_bundle))


def test_an_invalid_name_and_a_missing_token_are_noticed_before_the_export(
    tiny_bert, tmp_path, hub, monkeypatch, capsys
):
    for name in ("", "a/b/c", "owner/na me", "owner/name--x"):
        with pytest.raises(InputError, match="OWNER/NAME"):
            check_hub(name)
    command = [str(tiny_bert), "--output", str(tmp_path / "bundle"), "--pooling", "mean", "--push-to-hub", "owner/name"]
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    assert to_onnx.main(command) == 2
    assert "HF_TOKEN" in capsys.readouterr().err
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert to_onnx.main(command) == 2
    assert "HF_HUB_OFFLINE" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_the_command_pushes_the_proven_bundle(tiny_bert, tiny_graphs, texts_file, tmp_path, hub, capsys):
    options = ["--pooling", "mean", "--precision", "fp32", "--parity-texts", texts_file, "--push-to-hub", "owner/name"]
    assert to_onnx.main([str(tiny_bert), "--output", str(tmp_path / "bundle"), *options]) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report["commit"].endswith("/commit/1")
    assert hub.calls[0][1] == {"private": False, "exist_ok": True}
    assert report["fingerprint"] in hub.calls[1][1]["commit_message"]
    assert report["peak_memory_mb"] > 100
