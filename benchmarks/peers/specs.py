"""The peers as data: libraries, their backends, and the commands that start them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

FOLDER = Path(__file__).resolve().parent


@dataclass(frozen=True, kw_only=True)
class PeerSpec:
    """A peer: a new one needs a requirements file, a script that speaks the protocol, and an entry here.

    Attributes:
        name: of its environment, its requirements file and its script.
        title: as its makers write it.
        backends: each with the package whose version counts.
        exports: backends that need files which the bundle may lack, each with a file that shows they are there.
        slow: it takes tens of seconds to load.
    """

    name: str
    title: str
    backends: Mapping[str, str]
    exports: Mapping[str, str] = field(default_factory=dict)
    slow: bool = False

    @property
    def quick(self) -> bool:
        """Whether a quick run measures it by default: it converts nothing and loads fast."""
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
class PeerBackend:
    """One backend of an installed peer.

    Attributes:
        spec: the peer.
        name: of the backend.
        python: interpreter of the peer's environment.
        model: the bundle, or a copy with the files that the backend needs.
    """

    spec: PeerSpec
    name: str
    python: Path
    model: Path

    @property
    def party(self) -> str:
        """Peer and backend: its name in the report."""
        return f"{self.spec.title} {self.name}"

    @property
    def package(self) -> str:
        """The package whose version counts."""
        return self.spec.backends[self.name]

    @property
    def needed_file(self) -> str | None:
        """The file that the model must have; None if every bundle can be loaded."""
        return self.spec.exports.get(self.name)

    @property
    def ready(self) -> bool:
        """Whether the model has the files that the backend needs."""
        return self.needed_file is None or (self.model / self.needed_file).is_file()

    @property
    def file_name(self) -> str:
        """The party as a file name."""
        return re.sub(r"[^\w-]+", "-", self.party)

    @property
    def command(self) -> tuple[str, ...]:
        """The command that starts the worker. Isolated mode keeps our folder and the user's packages out of it."""
        return str(self.python), "-I", str(FOLDER / f"{self.spec.name}_peer.py")

    def exported_to(self, scratch: Path) -> PeerBackend:
        """Return this backend with the copy of the model that its export writes."""
        return replace(self, model=scratch / self.file_name)
