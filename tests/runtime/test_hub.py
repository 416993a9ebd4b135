"""Bundles by name, from a stand-in of the hub on loopback."""

import hashlib
import json
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from mirror_runtime import BundleError, Encoder
from mirror_runtime.cli.main import main

COMMIT = "0123456789abcdef0123456789abcdef01234567"
PREFIX = f"/owner/name/resolve/{COMMIT}/"


@pytest.fixture
def published(gateway_bundle, tmp_path, monkeypatch) -> Iterator[Path]:
    """The folder of owner/name on the hub, at the commit that its branch main has."""
    folder = Path(shutil.copytree(gateway_bundle, tmp_path / "published"))

    class Hub(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            names = [str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()]
            if path.startswith(f"/api/models/owner/name/tree/{COMMIT}"):
                found = [
                    {"type": "file", "path": name, "size": (folder / name).stat().st_size, "oid": name}
                    for name in names
                ]
                content = json.dumps(found).encode()
            elif path.startswith("/api/models/owner/name"):
                files = [{"rfilename": name} for name in names]
                content = json.dumps({"id": "owner/name", "sha": COMMIT, "siblings": files}).encode()
            elif path.startswith(PREFIX):
                content = (folder / path.removeprefix(PREFIX)).read_bytes()
            else:
                self.send_error(404)
                return
            self.send_response(200)
            for name, value in (
                ("Content-Length", str(len(content))),
                ("ETag", f'"{hashlib.sha256(content).hexdigest()}"'),
                ("X-Repo-Commit", COMMIT),
            ):
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        do_HEAD = do_GET

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_PROGRESS_BARS", True)
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_address[1]}")
        yield folder
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("name", [f"owner/name@{COMMIT}", "owner/name@main"])
def test_a_published_bundle_loads_by_name(published, tmp_path, caplog, name):
    with Encoder.load(name, engine="fake") as encoder, Encoder.load(published, engine="fake") as local:
        np.testing.assert_array_equal(encoder.encode(["a"]), local.encode(["a"]))
    assert (f"pin it with owner/name@{COMMIT}" in caplog.text) == (COMMIT not in name)
    (tmp_path / "in.txt").write_text("a\n")
    assert main(["encode", name, str(tmp_path / "in.txt"), "-o", str(tmp_path / "out.npy"), "--engine", "fake"]) == 0


def test_damaged_and_absent_ones_are_refused(published):
    tokenizer = published / "tokenizer.json"
    tokenizer.write_bytes(tokenizer.read_bytes() + b" ")
    with pytest.raises(BundleError, match=r"corrupted: tokenizer.json differ"):
        Encoder.load(f"owner/name@{COMMIT}", engine="fake")
    with pytest.raises(BundleError, match="neither a folder here nor a bundle that the hub gives"):
        Encoder.load("owner/other@main", engine="fake")
    with pytest.raises(BundleError, match=r"no such folder\. A published one is owner/name@COMMIT"):
        Encoder.load("owner/name", engine="fake")
    with pytest.raises(BundleError, match=r"is not a bundle|cannot be read"):
        Encoder.load("no/such/folder", engine="fake")
