"""The peers as data: libraries, their backends, and the commands that start them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

FOLDER = Path(__file__).resolve().parent
SCRIPT = FOLDER / "libraries.py"


class PeerSpec(NamedTuple):
    """A peer: a new one needs a requirements file, a function in `libraries.py`, and an entry here.

    Attributes:
        name: of its environment, its requirements file and its entry in `LIBRARIES`.
        title: as its makers write it.
        backends: each with the package whose version counts.
        exports: backends that need files which the bundle may lack, each with a file that shows they are there.
        slow: it takes tens of seconds to load.
    """

    name: str
    title: str
    backends: Mapping[str, str]
    exports: Mapping[str, str] = MappingProxyType({})
    slow: bool = False

    @property
    def quick(self) -> bool:
        """Whether a quick run measures it by default: it converts nothing and loads fast."""
        return not self.exports and not self.slow


PEERS = (
    PeerSpec(
        "sentence_transformers",
        "sentence-transformers",
        dict.fromkeys(("torch", "onnx", "openvino", "onnx-int8", "openvino-int8"), "sentence-transformers"),
        exports={
            "onnx": "onnx/model.onnx",
            "openvino": "openvino/openvino_model.xml",
            "onnx-int8": "onnx/model_peer_int8.onnx",
            "openvino-int8": "openvino/openvino_model_peer_int8.xml",
        },
    ),
    PeerSpec("fastembed", "fastembed", {"onnx": "fastembed"}),
    PeerSpec(
        "ctranslate2",
        "CTranslate2",
        dict.fromkeys(("float32", "int8"), "ctranslate2"),
        exports=dict.fromkeys(("float32", "int8"), "model.bin"),
    ),
    PeerSpec(
        "engine_loops",
        "plain-loop",
        {"onnxruntime": "onnxruntime", "openvino": "openvino", "openvino-async": "openvino"},
    ),
    PeerSpec("infinity", "infinity", {"torch": "infinity-emb"}, slow=True),
)


class PeerBackend(NamedTuple):
    """One backend of an installed peer, and the package whose version counts.

    The model is the bundle, or a copy with the files that the backend needs.
    """

    party: str
    command: tuple[str, ...]
    model: Path
    name: str
    package: str


def worker_command(python: Path, library: str) -> tuple[str, ...]:
    """Return the command of a library's worker. Isolated mode keeps our folder and the user's packages out of it."""
    return str(python), "-I", str(SCRIPT), library
