"""A peer that speaks the line-JSON protocol without a library.

Bigger batches are faster, except 128; its vectors come from files beside the script.
"""

import json
import shutil
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


def answer(request: Mapping[str, Any], texts: int) -> Any:
    """Answer a request; `texts` of the workload are loaded."""
    op = request["op"]
    if op == "export":
        folder = Path(request["output"], "openvino")
        folder.mkdir(parents=True)
        (folder / "openvino_model.xml").write_text("")
        return {"seconds": 1.0}
    if op == "load":
        if request["backend"] == "onnx":
            return {"error": "OSError: no such backend here"}
        return {"load_seconds": 2.0, "precision": "float32", "threads": None}
    if op in ("versions", "size"):
        return {"versions": {"fake": "1"}, "bytes": 123}
    if op == "encode":
        size = request["batch_size"]
        return {"seconds": 10.0 if size == 128 else 64.0 / size, "texts": request["limit"] or texts}
    if op == "dump":
        count = len(request["texts"])
        shutil.copy(HERE / ("vectors.npy" if count == texts else "judged.npy"), request["output"])
        return {"texts": count}
    if op == "single":
        assert len(request["texts"]) == 16
        return {"samples_ms": [4.0, 6.0]}
    if op == "die":
        sys.exit("out of luck")
    if op == "sleep":
        time.sleep(30)
    return None


def main() -> None:
    """Answer requests until the input ends."""
    texts = 0
    for line in sys.stdin:
        request = json.loads(line)
        if request["op"] == "load":
            texts = len(request["texts"])
        found = answer(request, texts)
        sys.stdout.write(f"{json.dumps(found) if found else 'not json'}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
