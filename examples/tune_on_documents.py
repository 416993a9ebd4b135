"""Tune an encoder on the sentences of your own documents, and export it.

python examples/tune_on_documents.py BASE docs/ runs/mine bundles/mine
"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def main(base: str, documents: str, run: str, bundle: str, *options: str) -> None:
    """Split every Markdown file below `documents` into sentences, tune `base` on them, and write `bundle`."""
    text = "\n\n".join(path.read_text(encoding="utf-8") for path in sorted(Path(documents).rglob("*.md")))
    prose = re.sub(r"```.*?```", " ", text, flags=re.DOTALL)
    sentences = [" ".join(part.split()) for part in re.split(r"(?<=[.!?])\s+|\n\s*\n", prose)]
    with tempfile.NamedTemporaryFile("w", suffix=".txt", encoding="utf-8") as corpus:
        corpus.writelines(f"{sentence}\n" for sentence in sentences if len(sentence.split()) > 3)
        corpus.flush()
        tune = ["training/tune.py", "--base", base, "--corpus", corpus.name, "--output", run, *options]
        subprocess.run([sys.executable, *tune], cwd=ROOT, check=True)
    subprocess.run([sys.executable, "export/to_onnx.py", run, "--output", bundle], cwd=ROOT, check=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
