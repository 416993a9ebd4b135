"""Make a two-speed bundle: `python export/pair.py BUNDLE TWIN`."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

if __package__ in (None, ""):  # run by path: import from the repository root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import typer

from export.bundle.update import add_artifacts, updating
from mirror_runtime.bundle import MANIFEST_FILE, TWIN_FOLDER, check_files, read_manifest, sha256_file
from mirror_runtime.cli.options import BundleArgument
from mirror_runtime.cli.run import application, print_json, run_command
from mirror_runtime.twins import check_twin


def run(
    bundle: BundleArgument,
    twin: Annotated[
        Path, typer.Argument(help="The bundle of its static twin: twin.py, then to_onnx.py.", show_default=False)
    ],
) -> None:
    """Copy a static twin into its encoder's bundle, for requests that ask for the speed `fast`.

    A twin of another encoder is refused. It replaces an earlier twin; the bundle's own fingerprint stays.
    """
    full, fast = read_manifest(bundle), read_manifest(twin)
    check_twin(full, fast)
    check_files(twin, fast)
    # Its own name puts it beside an earlier twin, which answers until the bundle's manifest is replaced.
    folder = f"{TWIN_FOLDER}/{sha256_file(twin / MANIFEST_FILE)[:16]}"
    with updating(bundle) as staging:
        for name in (*fast.files, MANIFEST_FILE):
            (staging / folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(twin / name, staging / folder / name)
        add_artifacts(bundle, staging, (), instead_of=f"{TWIN_FOLDER}/")
        for left in set((bundle / TWIN_FOLDER).iterdir()) - {bundle / folder}:
            shutil.rmtree(left)
    print_json({"bundle": str(bundle), "fingerprint": full.fingerprint, "twin": fast.fingerprint})


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return 0 on success, 2 on an error that the message explains."""
    return run_command(application(run), argv, "pair.py")


if __name__ == "__main__":
    sys.exit(main())
