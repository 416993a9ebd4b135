"""The command `mirror verify`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from mirror_runtime.bundle import read_manifest
from mirror_runtime.cli.run import print_json, truncations_counted_elsewhere
from mirror_runtime.endpoint import (
    Endpoint,
    EndpointVerdict,
    check_endpoint,
    cut_before,
    read_endpoint_canaries,
    take_canaries,
    write_endpoint_canaries,
)
from mirror_runtime.errors import InputError
from mirror_runtime.gateway.settings import KEY_VARIABLE
from mirror_runtime.hub import local_bundle
from mirror_runtime.verify import ArtifactCheck
from mirror_runtime.verify import verify as verify_bundle


def verify(
    bundle: Annotated[Path | None, typer.Argument(metavar="[BUNDLE]", help="The bundle's folder.")] = None,
    fingerprint: Annotated[
        str | None,
        typer.Option(
            help="The expected vector space, such as the one an index was made with. Another one is an error."
        ),
    ] = None,
    endpoint: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="Instead of a bundle: any endpoint with OpenAI's API (http://HOST:PORT/v1, with #MODEL if it serves "
            f"several) or TEI's (…/embed). A key is taken from {KEY_VARIABLE}.",
        ),
    ] = None,
    canaries: Annotated[
        Path, typer.Option(help="With --endpoint: file of its canaries' vectors, written where it is missing.")
    ] = Path("endpoint-canaries.json"),
) -> None:
    """Check a bundle's files against their hashes, and its canaries' vectors on this machine's engines.

    Exit status: 0 when everything that can run here agrees, 1 when vectors drifted or nothing could run, 2 when the
    bundle is missing, corrupted or another model than expected. With --endpoint: whether an endpoint still answers as
    when its canaries were kept; another model, drift, limit, length of vectors or order end with status 1.
    """
    if (bundle is None) == (endpoint is None):
        raise InputError("pass either a bundle or --endpoint URL")
    if endpoint is not None and fingerprint is not None:
        raise InputError("--fingerprint is a bundle's: an endpoint is compared with its canaries instead")
    if bundle is None:
        _verify_endpoint(str(endpoint), canaries)
        return
    bundle = local_bundle(bundle)
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


def _verify_endpoint(url: str, path: Path) -> None:
    """Keep an endpoint's canaries, or compare it with those that were kept, and print the report."""
    endpoint = Endpoint(url, os.environ.get(KEY_VARIABLE))
    kept = read_endpoint_canaries(path) if path.exists() else take_canaries(endpoint)
    vectors = np.array(kept.vectors, np.float32)
    lengths = np.linalg.norm(vectors, axis=1)
    report = {
        "endpoint": endpoint.url,
        "model": endpoint.model,
        "canaries": str(path),
        "dim": vectors.shape[1],
        "normalized": bool(np.abs(lengths - 1).max() < 1e-3),
        "cut_before_words": cut_before(vectors),
    }
    if path.exists():
        check = check_endpoint(endpoint, kept)
        print_json({**report, "verdict": check.verdict.value, "problem": check.problem, "min_cosine": check.min_cosine})
        if check.verdict is not EndpointVerdict.AGREES:
            raise typer.Exit(1)
        return
    write_endpoint_canaries(kept, path)
    print_json({**report, "verdict": "kept"})


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
