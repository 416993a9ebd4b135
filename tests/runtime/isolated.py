"""Scenarios that need a process of their own: `python -m tests.runtime.isolated NAME ARGUMENT`, from the repository."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.support.paths import ROOT


def start(name: str, argument: Path) -> subprocess.Popen[str]:
    """Start a scenario in a process of its own, with its standard output as a pipe."""
    command = [sys.executable, "-X", "faulthandler", "-m", __name__, name, str(argument)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)


def run_on_one_core(bundle: str) -> None:
    """Check on one core that each engine has one stream, and computes in one thread."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    import numpy as np

    from mirror_runtime import Encoder
    from mirror_runtime.host import usable_cores
    from mirror_runtime.packing import PackedRows

    def ticks() -> dict[str, int]:
        lines = {t: Path(f"/proc/self/task/{t}/stat").read_text() for t in os.listdir("/proc/self/task")}
        return {t: sum(map(int, line.rsplit(")", 1)[1].split()[11:13])) for t, line in lines.items()}

    assert usable_cores() == 1
    for engine in ("openvino", "onnxruntime"):
        with Encoder.load(bundle, engine=engine, precision="fp32") as encoder:
            assert encoder.engine.streams == 1
            empty = np.zeros((3, 16, 64), np.int64)
            rows = PackedRows(input_ids=empty[0], position_ids=empty[1], segment_ids=empty[2])
            encoder.engine.run(rows)
            before = ticks()
            while sum(ticks().values()) - sum(before.values()) < 50:
                for _ in range(50):
                    encoder.engine.run(rows)
            spent = {t: n - before.get(t, 0) for t, n in ticks().items()}
            busy = [n for n in spent.values() if n > 0.2 * sum(spent.values())]
            assert len(busy) == 1, (engine, spent)


def interrupt_after_two_encoders(bundle: str) -> None:
    """Close two OpenVINO encoders, then send this process a signal."""
    from mirror_runtime import Encoder

    signal.signal(signal.SIGINT, signal.default_int_handler)  # shells ignore it for processes in the background
    encoders = [Encoder.load(bundle, engine="openvino", precision="fp32", cache_dir=None) for _ in range(2)]
    for encoder in encoders:
        encoder.encode(["text"])
    while encoders:
        encoders.pop(0).close()
    del encoder
    try:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(10)
    except KeyboardInterrupt:
        print("interrupted")  # noqa: T201


def hold_half_a_folder(output: str) -> None:
    """Begin to write a folder, and wait to be killed."""
    from mirror_runtime.folders import whole_folder

    with whole_folder(Path(output), marker="all") as folder:
        (folder / "half").write_text("x")
        print("ready", flush=True)  # noqa: T201
        time.sleep(60)


if __name__ == "__main__":
    globals()[sys.argv[1]](sys.argv[2])
