"""The peers as data: which libraries, which backends, and what starts each."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

FOLDER = Path(__file__).resolve().parent / "peers"


@dataclass(frozen=True, kw_only=True)
class PeerSpec:
    """A peer: adding one needs a requirements file, a script that speaks the protocol, and a line here.

    Attributes:
        name: of its environment, its requirements file and its script.
        title: as its makers write it.
        backends: each with the package whose version counts.
        exports: which backends need files that the bundle may lack, and the file that shows they are there.
        slow: it takes tens of seconds to load.
    """

    name: str
    title: str
    backends: Mapping[str, str]
    exports: Mapping[str, str] = field(default_factory=dict)
    slow: bool = False

    @property
    def quick(self) -> bool:
        """Whether a quick run measures it unasked: it converts nothing and loads soon."""
        return not self.exports and not self.slow


PEERS = (
    PeerSpec(
        name="sentence_transformers",
        title="sentence-transformers",
        backends=dict.fromkeys(("torch", "onnx", "openvino", "onnx-int8", "openvino-int8"), "sentence-transformers"),
        exports={
            "onnx": "onnx/model.onnx",
            "openvino": "openvino/openvino_model.xml",
            "onnx-int8": "onnx/model_peer_int8.onnx",
            "openvino-int8": "openvino/openvino_model_peer_int8.xml",
        },
    ),
    PeerSpec(name="fastembed", title="fastembed", backends={"onnx": "fastembed"}),
    PeerSpec(
        name="ctranslate2",
        title="CTranslate2",
        backends=dict.fromkeys(("float32", "int8"), "ctranslate2"),
        exports={"float32": "model.bin", "int8": "model.bin"},
    ),
    PeerSpec(
        name="engine_loops",
        title="plain-loop",
        backends={"onnxruntime": "onnxruntime", "openvino": "openvino", "openvino-async": "openvino"},
    ),
    PeerSpec(name="infinity", title="infinity", backends={"torch": "infinity-emb"}, slow=True),
)


@dataclass(frozen=True, kw_only=True)
class PeerPoint:
    """One backend of an installed peer, ready to load.

    Attributes:
        model: the bundle, or a copy that holds the files the backend needs.
    """

    spec: PeerSpec
    backend: str
    python: Path
    model: Path

    @property
    def name(self) -> str:
        """Peer and backend."""
        return f"{self.spec.title} {self.backend}"

    @property
    def package(self) -> str:
        """The package whose version counts."""
        return self.spec.backends[self.backend]

    @property
    def file_name(self) -> str:
        """The same, fit for a file's name."""
        return re.sub(r"[^\w-]+", "-", self.name)

    @property
    def command(self) -> tuple[str, ...]:
        """What starts the worker. Isolated mode keeps our folder and the user's packages out of its imports."""
        return str(self.python), "-I", str(FOLDER / f"{self.spec.name}_peer.py")
