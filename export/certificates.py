"""Compare the certificates of several bundles: `python export/certificates.py BUNDLE…`."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

if __package__ in (None, ""):  # run by path: import from the repository root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from export.bundle.card import (
    WHITENING_FILE,
    ProbeCosts,
    describe_head,
    markdown_table,
    read_costs,
    round_down,
    summary,
)
from mirror_runtime.bundle import Artifact, EngineName, Layout, Manifest, Precision, read_manifest
from mirror_runtime.cli.run import application, print_json, run_command
from mirror_runtime.errors import InputError
from mirror_runtime.folders import replace_file

BUNDLE_COLUMNS = ("bundle", "head", "vector")
ARTIFACT_COLUMNS = ("engine", "precision", "layout", "MB", "of fp32", "worst cosine", "floor", "batch invariance")
TEXT_COLUMNS = 3
"""Number of leading columns of an artifact that hold text; the others hold figures."""

Set = tuple[str, str]
"""An evaluation set or a probe: its name and the sha256 of its file or texts."""


@dataclass(frozen=True, kw_only=True)
class Certified:
    """A bundle's manifest, and what its artifacts cost on the user's own texts."""

    manifest: Manifest
    costs: ProbeCosts

    def figures(self, artifact: Artifact) -> dict[Set, tuple[str, str]]:
        """Return the reference's figure on each set and probe, and the artifact's change."""
        sets = {
            (score.name, score.sha256): (f"{score.reference:.2f}", f"{score.artifact - score.reference:+.2f}")
            for score in artifact.parity.sts
        }
        return sets | {
            (name, self.costs.texts_sha256): (f"{cost.before:.2f}", f"{cost.gain:+}")
            for name, cost in self.costs.of(artifact).items()
        }


def bundle_cells(name: str, manifest: Manifest) -> tuple[str, str, str]:
    """Return the cells of `BUNDLE_COLUMNS`."""
    spec = manifest.encoder
    head = describe_head(spec, whitened=WHITENING_FILE in manifest.files)
    return name, head, f"{spec.dim} {spec.vector_type.value}"


def artifact_cells(artifact: Artifact, bundle: Certified, sets: Sequence[Set]) -> tuple[str, ...]:
    """Return the cells of `ARTIFACT_COLUMNS`, and two for each set: the reference's score and the artifact's change.

    They are "-" where the artifact was not measured on a set.
    """
    parity, fp32, figures = artifact.parity, fp32_sizes(bundle.manifest), bundle.figures(artifact)
    return (
        artifact.engine.value,
        artifact.precision.value,
        artifact.layout.value,
        f"{artifact.size / 1e6:.1f}",
        f"{artifact.size / fp32[artifact.layout]:.1%}" if artifact.layout in fp32 else "-",
        round_down(parity.min_cosine),
        round_down(parity.floor),
        round_down(parity.neighbour_cosine),
        *(cell for chosen in sets for cell in figures.get(chosen, ("-", "-"))),
    )


def fp32_sizes(manifest: Manifest) -> dict[Layout, int]:
    """Return the bytes of a bundle's fp32 graphs, by layout."""
    return {
        artifact.layout: artifact.size
        for artifact in manifest.artifacts
        if (artifact.engine, artifact.precision) == (EngineName.ONNXRUNTIME, Precision.FP32)
    }


def measured_sets(bundles: Sequence[Certified]) -> dict[Set, str]:
    """Return the titles of all bundles' sets and probes; those with the same name have part of their hash in it."""
    found = dict.fromkeys(
        key for one in bundles for artifact in one.manifest.artifacts for key in one.figures(artifact)
    )
    names = [name for name, _ in found]
    return {(name, digest): name if names.count(name) == 1 else f"{name} {digest[:8]}" for name, digest in found}


def measured_texts(bundles: Mapping[str, Certified]) -> list[str]:
    """Describe the texts that the cosines were measured on; worst cosines on different texts are not comparable."""
    found: dict[str, list[str]] = {}
    for name, one in bundles.items():
        for parity in dict.fromkeys(
            (a.parity.texts, a.parity.texts_sha256, a.parity.reference) for a in one.manifest.artifacts
        ):
            texts, digest, reference = parity
            description = f"{texts:,} texts (sha256 {digest[:16]}…) against {reference}"
            found.setdefault(description, []).append(name)
    if len(found) == 1:
        return [f"Cosines of {next(iter(found))}."]
    return [f"Cosines of {description}: {', '.join(names)}." for description, names in found.items()]


def read_bundles(folders: Sequence[Path]) -> dict[str, Certified]:
    """Read certificates by the folders' names, or by their paths where two share a name.

    Raises:
        BundleError: a folder is not a bundle.
        InputError: the same folder is given twice.
    """
    paths = [folder.resolve() for folder in folders]
    for folder, path in zip(folders, paths, strict=True):
        if paths.count(path) > 1:
            raise InputError(f"{folder} is given twice")
    short = len({path.name for path in paths}) == len(paths)
    return {
        path.name if short else str(path): Certified(manifest=read_manifest(path), costs=read_costs(path))
        for path in paths
    }


def render(bundles: Mapping[str, Certified]) -> str:
    """Format the table in Markdown, with a row for each artifact."""
    sets = measured_sets(list(bundles.values()))
    head = [*BUNDLE_COLUMNS, "file", *ARTIFACT_COLUMNS, *(cell for title in sets.values() for cell in (title, "Δ"))]
    rows = [
        (
            *bundle_cells(name, one.manifest),
            f"`{artifact.path}`",
            *artifact_cells(artifact, one, list(sets)),
        )
        for name, one in bundles.items()
        for artifact in one.manifest.artifacts
    ]
    return "\n".join(
        [markdown_table(head, rows, left=len(BUNDLE_COLUMNS) + 1 + TEXT_COLUMNS), "", *measured_texts(bundles), ""]
    )


def tables(bundles: Mapping[str, Certified]) -> list[Table]:
    """Format the same for a terminal: a table for each bundle, whose title replaces what its rows would repeat."""
    result = []
    for name, one in bundles.items():
        sets = measured_sets([one])
        title = escape(": ".join((name, ", ".join(bundle_cells(name, one.manifest)[1:]))))
        table = Table(title=title, title_justify="left", padding=(0, 0))
        head = [*ARTIFACT_COLUMNS, *(cell for title in sets.values() for cell in (title, "Δ"))]
        for i, column in enumerate(head):
            table.add_column(escape(column), justify="left" if i < TEXT_COLUMNS else "right")
        for artifact in one.manifest.artifacts:
            table.add_row(*map(escape, artifact_cells(artifact, one, list(sets))))
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
    evaluation set: the reference's Spearman correlation, in points, and the artifact's change (Δ). For each probe of
    texts without labels (to_onnx.py --own): the encoder's figure, and what the artifact adds. The last line of stdout
    is a JSON object.

    For example:

    python export/certificates.py bundles/mine
    python export/certificates.py bundles/* --output certificates.md
    """
    certified = read_bundles(bundles)
    if output is not None:
        with replace_file(output) as beside:
            beside.write_text(render(certified), encoding="utf-8")
    console = Console(stderr=True, highlight=False)
    for table in tables(certified):
        console.print(table)
    for line in measured_texts(certified):
        console.print(line, markup=False, soft_wrap=True)
    report: dict[str, object] = {
        "bundles": [
            {
                "bundle": str(folder),
                "fingerprint": one.manifest.fingerprint,
                **dict(zip(BUNDLE_COLUMNS[1:], bundle_cells(name, one.manifest)[1:], strict=True)),
                "artifacts": [summary(artifact, one.costs.of(artifact)) for artifact in one.manifest.artifacts],
            }
            for folder, (name, one) in zip(bundles, certified.items(), strict=True)
        ],
        "output": None if output is None else str(output),
    }
    print_json(report)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return 0 on success, 2 on an error that the message explains."""
    return run_command(application(run), argv, "certificates.py")


if __name__ == "__main__":
    sys.exit(main())
