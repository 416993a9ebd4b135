"""Compare the certificates of several bundles: `python export/certificates.py BUNDLE…`."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

if __package__ in (None, ""):  # run by path: import from the repository root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from export.bundle.card import WHITENING_FILE, describe_head, markdown_table, round_down, summary
from mirror_runtime.bundle import Artifact, EngineName, Layout, Manifest, Precision, read_manifest
from mirror_runtime.cli.run import application, print_json, run_command
from mirror_runtime.errors import InputError
from mirror_runtime.folders import replace_file

BUNDLE_COLUMNS = ("bundle", "head", "vector")
ARTIFACT_COLUMNS = ("engine", "precision", "layout", "MB", "of fp32", "worst cosine", "floor", "batch invariance")
TEXT_COLUMNS = 3
"""Number of leading columns of an artifact that hold text; the others hold figures."""

Set = tuple[str, str]
"""An evaluation set: its name and its file's sha256."""


def bundle_cells(name: str, manifest: Manifest) -> tuple[str, str, str]:
    """Return the cells of `BUNDLE_COLUMNS`."""
    spec = manifest.encoder
    head = describe_head(spec, whitened=WHITENING_FILE in manifest.files)
    return name, head, f"{spec.dim} {spec.vector_type.value}"


def artifact_cells(artifact: Artifact, fp32_sizes: Mapping[Layout, int], sets: Sequence[Set]) -> tuple[str, ...]:
    """Return the cells of `ARTIFACT_COLUMNS`, and two for each set: the reference's score and the artifact's change.

    They are "-" where the artifact was not measured on a set. Sizes are in bytes.
    """
    parity = artifact.parity
    scores = {(score.name, score.sha256): score for score in parity.sts}
    measured = [scores.get(chosen) for chosen in sets]
    return (
        artifact.engine.value,
        artifact.precision.value,
        artifact.layout.value,
        f"{artifact.size / 1e6:.1f}",
        f"{artifact.size / fp32_sizes[artifact.layout]:.1%}" if artifact.layout in fp32_sizes else "-",
        round_down(parity.min_cosine),
        round_down(parity.floor),
        round_down(parity.neighbour_cosine),
        *(
            cell
            for score in measured
            for cell in (
                ("-", "-") if score is None else (f"{score.reference:.2f}", f"{score.artifact - score.reference:+.2f}")
            )
        ),
    )


def fp32_sizes(manifest: Manifest) -> dict[Layout, int]:
    """Return the bytes of a bundle's fp32 graphs, by layout."""
    return {
        artifact.layout: artifact.size
        for artifact in manifest.artifacts
        if (artifact.engine, artifact.precision) == (EngineName.ONNXRUNTIME, Precision.FP32)
    }


def measured_sets(manifests: Sequence[Manifest]) -> dict[Set, str]:
    """Return the titles of all bundles' evaluation sets; files with the same name have part of their hash in it."""
    found = dict.fromkeys((s.name, s.sha256) for m in manifests for a in m.artifacts for s in a.parity.sts)
    names = [name for name, _ in found]
    return {(name, digest): name if names.count(name) == 1 else f"{name} {digest[:8]}" for name, digest in found}


def measured_texts(manifests: Mapping[str, Manifest]) -> list[str]:
    """Describe the texts that the cosines were measured on; worst cosines on different texts are not comparable."""
    found: dict[str, list[str]] = {}
    for name, manifest in manifests.items():
        for parity in dict.fromkeys(
            (a.parity.texts, a.parity.texts_sha256, a.parity.reference) for a in manifest.artifacts
        ):
            texts, digest, reference = parity
            description = f"{texts:,} texts (sha256 {digest[:16]}…) against {reference}"
            found.setdefault(description, []).append(name)
    if len(found) == 1:
        return [f"Cosines of {next(iter(found))}."]
    return [f"Cosines of {description}: {', '.join(names)}." for description, names in found.items()]


def read_bundles(folders: Sequence[Path]) -> dict[str, Manifest]:
    """Read manifests by the folders' names, or by their paths where two share a name.

    Raises:
        BundleError: a folder is not a bundle.
        InputError: the same folder is given twice.
    """
    paths = [folder.resolve() for folder in folders]
    for folder, path in zip(folders, paths, strict=True):
        if paths.count(path) > 1:
            raise InputError(f"{folder} is given twice")
    short = len({path.name for path in paths}) == len(paths)
    return {path.name if short else str(path): read_manifest(path) for path in paths}


def render(manifests: Mapping[str, Manifest]) -> str:
    """Format the table in Markdown, with a row for each artifact."""
    sets = measured_sets(list(manifests.values()))
    head = [*BUNDLE_COLUMNS, "file", *ARTIFACT_COLUMNS, *(cell for title in sets.values() for cell in (title, "Δ"))]
    rows = [
        (
            *bundle_cells(name, manifest),
            f"`{artifact.path}`",
            *artifact_cells(artifact, fp32_sizes(manifest), list(sets)),
        )
        for name, manifest in manifests.items()
        for artifact in manifest.artifacts
    ]
    return "\n".join(
        [markdown_table(head, rows, left=len(BUNDLE_COLUMNS) + 1 + TEXT_COLUMNS), "", *measured_texts(manifests), ""]
    )


def tables(manifests: Mapping[str, Manifest]) -> list[Table]:
    """Format the same for a terminal: a table for each bundle, whose title replaces what its rows would repeat."""
    result = []
    for name, manifest in manifests.items():
        sets = measured_sets([manifest])
        title = escape(": ".join((name, ", ".join(bundle_cells(name, manifest)[1:]))))
        table = Table(title=title, title_justify="left", padding=(0, 0))
        head = [*ARTIFACT_COLUMNS, *(cell for title in sets.values() for cell in (title, "Δ"))]
        for i, column in enumerate(head):
            table.add_column(escape(column), justify="left" if i < TEXT_COLUMNS else "right")
        for artifact in manifest.artifacts:
            table.add_row(*map(escape, artifact_cells(artifact, fp32_sizes(manifest), list(sets))))
        result.append(table)
    return result


def run(
    bundles: Annotated[
        list[Path],
        typer.Argument(help="Folders that export/to_onnx.py wrote.", metavar="BUNDLE", show_default=False),
    ],
    output: Annotated[
        Path | None, typer.Option(help="Also write one Markdown table of all bundles to this file.", show_default=False)
    ] = None,
) -> None:
    """Show what was proven of bundles, with a row for each artifact, as recorded in their manifests.

    Worst cosine: the smallest cosine of any text's vector to the reference's. Floor: the smallest value allowed. Batch
    invariance: the smallest cosine between a text's vectors when encoded by itself and among other texts. For each
    evaluation set: the reference's Spearman correlation, in points, and the artifact's change (Δ). The last line of
    stdout is a JSON object.

    For example:

    python export/certificates.py bundles/mine
    python export/certificates.py bundles/* --output certificates.md
    """
    manifests = read_bundles(bundles)
    if output is not None:
        with replace_file(output) as beside:
            beside.write_text(render(manifests), encoding="utf-8")
    console = Console(stderr=True, highlight=False)
    for table in tables(manifests):
        console.print(table)
    for line in measured_texts(manifests):
        console.print(line, markup=False, soft_wrap=True)
    report: dict[str, object] = {
        "bundles": [
            {
                "bundle": str(folder),
                "fingerprint": manifest.fingerprint,
                **dict(zip(BUNDLE_COLUMNS[1:], bundle_cells(name, manifest)[1:], strict=True)),
                "artifacts": [summary(artifact) for artifact in manifest.artifacts],
            }
            for folder, (name, manifest) in zip(bundles, manifests.items(), strict=True)
        ],
        "output": None if output is None else str(output),
    }
    print_json(report)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return 0 on success, 2 on an error that the message explains."""
    return run_command(application(run), argv, "certificates.py")


if __name__ == "__main__":
    sys.exit(main())
