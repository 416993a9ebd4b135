"""Two-speed bundles: a bundle whose folder `twin/HASH` is the bundle of its static twin, HASH being of its manifest.

A request chooses between them by its `speed`; nothing ever changes to the twin by itself. The twin's vectors lie in the
vector space of the full encoder, but have a fingerprint of their own.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mirror_runtime.bundle import MANIFEST_FILE, TWIN_FOLDER, EngineName, Manifest, check_files, read_manifest
from mirror_runtime.errors import BundleError, InputError
from mirror_runtime.selection import AUTO

if TYPE_CHECKING:
    from mirror_runtime.encoder import Encoder

COMPARED = ("dim", "normalize", "vector_type", "int8_scale")
"""What else has to be equal, so that a request's answer has one form."""


class Speed(str, Enum):
    """Which encoder of a two-speed bundle answers."""

    FULL = "full"
    FAST = "fast"
    """The static twin."""


def check_twin(full: Manifest, twin: Manifest) -> None:
    """Check that a bundle is the static twin of another.

    Raises:
        BundleError: it is another encoder's twin, or none, or its vectors have another form.
    """
    of = twin.encoder.twin_of
    if of is None:
        raise BundleError(f"{twin.encoder.base_model} ({twin.fingerprint}) is not a twin: make one with twin.py")
    if of != full.fingerprint:
        raise BundleError(
            f"the twin {twin.fingerprint} belongs to the encoder {of} and not to {full.encoder.base_model}, "
            f"{full.fingerprint}: make one with twin.py from this bundle"
        )
    for name in COMPARED:
        here, there = getattr(full.encoder, name), getattr(twin.encoder, name)
        if here != there:
            raise BundleError(f"the twin has {name} {there}, and the encoder {here}: export both with the same options")


def find_twin(bundle: Path, manifest: Manifest) -> Path | None:
    """Return the folder of a bundle's twin; None if it has none.

    Raises:
        BundleError: the twin is another encoder's, or was exchanged since it was added.
    """
    found = [name for name in manifest.files if name.startswith(f"{TWIN_FOLDER}/") and name.endswith(MANIFEST_FILE)]
    if not found:
        return None
    check_files(bundle, manifest, found)
    folder = (bundle / found[0]).parent
    check_twin(manifest, read_manifest(folder))
    return folder


def twin_setting(twin: Path, engine: str, precision: str) -> tuple[str, str]:
    """Return the engine and precision of a twin: those named for the full encoder if its bundle has them, else "auto".

    A table is usually exported in fp32 alone, whatever the full encoder runs in.
    """
    if engine == EngineName.FAKE.value:
        return engine, precision
    proven = read_manifest(twin).artifacts
    engine = engine if engine in {one.engine.value for one in proven} else AUTO
    fitting = {one.precision.value for one in proven if engine in (AUTO, one.engine.value)}
    return engine, precision if precision in fitting else AUTO


class TwinEncoder:
    """The encoder of a twin, opened by its first user and closed with the full encoder."""

    def __init__(self, load: Callable[[], Encoder]) -> None:
        self._load = load
        self._lock = threading.Lock()
        self._encoder: Encoder | None = None

    @classmethod
    def of(
        cls, bundle: Path, manifest: Manifest, load: Callable[..., Encoder], engine: str, precision: str, **options: Any
    ) -> TwinEncoder | None:
        """Return the twin of a bundle, to be loaded like the full encoder: see `find_twin` and `twin_setting`."""
        if (folder := find_twin(bundle, manifest)) is None:
            return None
        engine, precision = twin_setting(folder, engine, precision)
        return cls(lambda: load(folder, engine=engine, precision=precision, **options))

    def open(self) -> Encoder:
        """Return the encoder, loaded once."""
        with self._lock:
            self._encoder = self._encoder or self._load()
            return self._encoder

    def close(self) -> None:
        """Close the encoder if it was opened."""
        with self._lock:
            if self._encoder is not None:
                self._encoder.close()


def check_speed(speed: Speed | str) -> Speed:
    """Return a speed by its name; an `InputError` names those that there are."""
    try:
        return Speed(speed)
    except ValueError:
        raise InputError(f"speed is {speed!r}: it must be one of {', '.join(one.value for one in Speed)}") from None
