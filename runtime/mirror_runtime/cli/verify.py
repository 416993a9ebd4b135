"""The command `mirror verify`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from mirror_runtime.bundle import read_manifest
from mirror_runtime.cli.options import BundleArgument
from mirror_runtime.cli.run import print_json, truncations_counted_elsewhere
from mirror_runtime.verify import ArtifactCheck
from mirror_runtime.verify import verify as verify_bundle


def verify(
    bundle: BundleArgument,
    fingerprint: Annotated[
        str | None,
        typer.Option(
            help="The expected vector space, such as the one an index was made with. Another one is an error."
        ),
    ] = None,
) -> None:
    """Check a bundle's files against their hashes, and its canaries' vectors on this machine's engines.

    Exit status: 0 when everything that can run here agrees, 1 when vectors drifted or nothing could run, 2 when the
    bundle is missing, corrupted or another model than expected.
    """
    with truncations_counted_elsewhere():  # one canary is over the limit on purpose
        checks = verify_bundle(bundle, expected_fingerprint=fingerprint)
    manifest = read_manifest(bundle)
    Console(stderr=True, highlight=False).print(_checks_table(checks))
    ran = [check for check in checks if check.ran]
    failed = [check for check in ran if not check.agrees]
    print_json(
        {
            "bundle": str(bundle),
            "fingerprint": manifest.fingerprint,
            "files": len(manifest.files),
            "ran": len(ran),
            "failed": len(failed),
            "not_run": len(checks) - len(ran),
            "artifacts": [
                {
                    "path": check.artifact.path,
                    "engine": check.artifact.engine.value,
                    "precision": check.artifact.precision.value,
                    "verdict": check.comparison.verdict.value if check.comparison else "not run",
                    "min_cosine": check.comparison.min_cosine if check.comparison else None,
                    "floor": check.artifact.parity.floor,
                    "problem": check.problem,
                }
                for check in checks
            ],
        }
    )
    if failed or not ran:
        raise typer.Exit(1)


def _checks_table(checks: Sequence[ArtifactCheck]) -> Table:
    table = Table("runs", "loads", "when made", "here", "floor", "verdict", padding=(0, 0))
    for check in checks:
        artifact = check.artifact
        table.add_row(
            f"{artifact.engine.value} {artifact.precision.value}",
            Path(artifact.path).name,
            f"{artifact.parity.min_cosine:.6f}",
            "" if check.comparison is None else f"{check.comparison.min_cosine:.6f}",
            str(artifact.parity.floor),
            (check.problem or "agrees") if check.ran else f"not run: {check.problem}",
        )
    return table
