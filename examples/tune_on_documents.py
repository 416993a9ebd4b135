"""Tune an encoder on the titles and texts of your own documents, and export it.

python examples/tune_on_documents.py BASE docs/ runs/mine bundles/mine --recipe auto
"""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def main(base: str, documents: str, run: str, bundle: str, *options: str) -> None:
    """Tune `base` on the sections of every Markdown and text file below `documents`, and write `bundle`."""
    tune = ["training/tune.py", "--base", base, "--corpus", documents, "--documents", "--output", run, *options]
    for script, *arguments in (tune, ["export/to_onnx.py", run, "--output", bundle]):
        if status := subprocess.run([sys.executable, str(ROOT / script), *arguments], check=False).returncode:
            raise SystemExit(status)  # 3: the tuned encoder is worse


if __name__ == "__main__":
    main(*sys.argv[1:])
