"""Export an encoder to a bundle: `python export/to_onnx.py ENCODER --output BUNDLE`."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

if __package__ in (None, ""):  # run by path: import from the repository root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import typer
from rich.console import Console
from rich.table import Table

from encoders.families import FAMILIES
from encoders.source import HeadSpec
from evaluation.probes import PREDICTIVE, Probe
from evaluation.sets import read_sets
from export.bundle.card import ProbeCosts, short_name, summary
from export.bundle.hub import check_hub, push
from export.proof.proof_texts import read_texts
from mirror_runtime.bundle import Artifact, Pooling, Precision, VectorType
from mirror_runtime.cli.options import ProofSetsOption, ProofTextsOption, RevisionOption
from mirror_runtime.cli.run import application, print_json, run_command, timestamped_lines
from mirror_runtime.errors import InputError
from mirror_runtime.host import peak_memory_bytes
from training.own import own_probes


def run(
    encoder: Annotated[
        str,
        typer.Argument(
            help="A run folder, a sentence-transformers folder, a Hugging Face folder, or a hub name. Families: "
            f"{', '.join(FAMILIES)}.",
            show_default=False,
        ),
    ],
    output: Annotated[
        Path,
        typer.Option(help="The bundle's folder. It appears only when the bundle is complete.", show_default=False),
    ],
    precision: Annotated[
        list[Precision] | None,
        typer.Option(
            help="One or several, such as --precision fp32 bf16 int8. fp32 is always included; fp16 beside int8 "
            "also makes the int8 file for GPUs. Default: also bf16 on CPUs with avx512_bf16 or amx_bf16."
        ),
    ] = None,
    pooling: Annotated[
        Pooling | None,
        typer.Option(
            "--pooling", "--head", help="Required for an encoder that does not record its pooling.", show_default=False
        ),
    ] = None,
    layers: Annotated[
        str | None,
        typer.Option(
            help="Average these layers before pooling: 1,-1 are the first and the last, 0 is the embeddings. "
            "Default: the last.",
            show_default=False,
        ),
    ] = None,
    ditto: Annotated[
        str | None,
        typer.Option(
            help="For pooling ditto: LAYER:HEAD, counted from 0, whose attention weights the tokens: 0:9 for "
            "bert-base-uncased.",
            show_default=False,
        ),
    ] = None,
    template: Annotated[
        str | None,
        typer.Option(
            help="Insert every text into this template, such as 'query: {text}'. Pooling mask needs one with the mask "
            "token: 'This sentence : \"{text}\" means [MASK] .'",
            show_default=False,
        ),
    ] = None,
    whiten: Annotated[
        Path | None,
        typer.Option(
            help="Whiten on this text file, one text per line: vectors get mean 0 and covariance 1 on it, then unit "
            "length. It must have more lines than a vector has components.",
            show_default=False,
        ),
    ] = None,
    whiten_dim: Annotated[
        int | None,
        typer.Option(min=1, help="Directions that the whitening keeps, such as 256 of 768.", show_default="all"),
    ] = None,
    dim: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Keep the first components, such as 128 of 384, for encoders tuned for it (tune.py --matryoshka).",
            show_default=False,
        ),
    ] = None,
    depth: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Keep the first layers, such as 3 of 6, for encoders tuned for it (tune.py --depths).",
            show_default="all",
        ),
    ] = None,
    vector_type: Annotated[
        VectorType | None,
        typer.Option(
            help="Data type of the vectors. 384 components are 1,536 bytes as float32, 768 as float16, 384 as int8 and "
            "48 as binary. Default: the recorded type, usually float32.",
            show_default=False,
        ),
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option(min=3, help="Replace the recorded limit on a text's tokens.", show_default=False)
    ] = None,
    revision: RevisionOption = None,
    parity_texts: ProofTextsOption = None,
    calibration: Annotated[
        Path | None,
        typer.Option(
            help="Measure the scales of int8 and fp8 on these texts, one per line; about 300 like yours suffice. "
            "Default: built-in ones.",
            show_default=False,
        ),
    ] = None,
    sts: ProofSetsOption = None,
    own: Annotated[
        list[str] | None,
        typer.Option(
            help="Your own texts, no labels, as for evaluate.py: what each artifact costs on a probe of them, with its "
            "interval. Those that a run folder held out, where it says which."
        ),
    ] = None,
    max_probe_loss: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="Points of a probe of --own: an artifact that surely loses more (its whole interval) is left out.",
            show_default="any number",
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an existing bundle, once the new one is proven.")
    ] = False,
    accept_difference: Annotated[
        bool,
        typer.Option(
            "--accept-difference",
            help="Export even if sentence-transformers computes other vectors from the same folder; the card says so.",
        ),
    ] = False,
    push_to_hub: Annotated[
        str | None,
        typer.Option(
            help="Upload the proven bundle to OWNER/NAME, with the token of HF_TOKEN or `hf auth login`.",
            show_default=False,
        ),
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="Make a new hub repository private.")] = False,
) -> None:
    """Export an encoder to ONNX with its pooling head inside, prove the vectors, and write a bundle.

    Artifacts below their floor are left out. The exit status is 1 if --precision named one of them, and 2 if no bundle
    was written. MiniLM (22 million parameters) takes about 50 seconds on 2 cores; its bundle is 270 MB: the weights,
    the padded and the packed graph.
    """
    from export.bundle.build import Request, build  # imports torch, which --help does not wait for
    from export.bundle.head_options import HeadOptions, parse_ditto, parse_layers

    console = Console(stderr=True, highlight=False)
    if push_to_hub is not None:
        check_hub(push_to_hub)
    if max_probe_loss is not None and not own:
        raise InputError("--max-probe-loss needs texts to measure on: pass --own FILE")
    request = Request(
        encoder=encoder,
        output=output,
        revision=revision,
        pooling=pooling,
        head=HeadSpec(
            layers=parse_layers(layers) if layers else None,
            ditto=parse_ditto(ditto) if ditto else None,
            template=template,
        ),
        depth=depth,
        head_options=HeadOptions(
            whiten=read_texts(whiten) if whiten else None,
            whiten_dim=whiten_dim,
            dim=dim,
            vector_type=vector_type,
        ),
        max_tokens=max_tokens,
        precisions=tuple(precision) if precision else None,
        calibration=read_texts(calibration) if calibration else None,
        texts=read_texts(parity_texts) if parity_texts else None,
        sets=tuple(found for path in sts or () for found in read_sets(path)),
        probes=_probes(own, encoder) if own else (),
        max_probe_loss=max_probe_loss,
        overwrite=overwrite,
        accept_difference=accept_difference,
    )
    began = time.perf_counter()
    export = build(request, timestamped_lines(console))
    seconds = time.perf_counter() - began
    console.print(_table(export.manifest.artifacts, export.costs, scores=export.manifest.encoder.scores_pairs))
    for artifact in export.manifest.artifacts:
        for cost in export.costs.of(artifact).values():
            if cost.is_worse:
                console.print(f"[yellow]worse on your own texts:[/] {short_name(artifact)}: {cost}", soft_wrap=True)
    for refused in export.refused:
        console.print(f"[red]refused:[/] {refused.name}", soft_wrap=True)
        console.print(f"  {refused.reason}", soft_wrap=True, markup=False)
    commit = None
    if push_to_hub is not None:
        console.print(f"pushing to {push_to_hub}")
        commit = push(output, push_to_hub, export.manifest, private=private)
    print_json(
        {
            "bundle": str(output),
            "fingerprint": export.manifest.fingerprint,
            "seconds": round(seconds, 1),
            "peak_memory_mb": round(peak_memory_bytes() / 1e6),
            "artifacts": [summary(one, export.costs.of(one)) for one in export.manifest.artifacts],
            "refused": [
                {"artifact": refused.name, "asked": refused.requested, "reason": refused.reason}
                for refused in export.refused
            ],
            "commit": commit,
        }
    )
    if any(refused.requested for refused in export.refused):
        raise typer.Exit(1)


def _probes(own: Sequence[str], encoder: str) -> tuple[Probe, ...]:
    probes = tuple(probe for probe in own_probes(own, [encoder]) if probe.name in PREDICTIVE)
    if not probes:
        raise InputError(f"--own: the texts allow none of the probes {', '.join(PREDICTIVE)}: pass longer texts")
    return probes


def _table(artifacts: Sequence[Artifact], costs: ProbeCosts, *, scores: bool) -> Table:
    names = ("agreement", "largest off") if scores else ("cosine", "top 10")
    probes = list(dict.fromkeys(cost.probe for cost in costs.costs))
    head = ("artifact", "MB", names[0], "floor", "batch inv.", "ranks", names[1], "STS", *probes)
    table = Table(*head, padding=(0, 0))
    for artifact in artifacts:
        parity = artifact.parity
        table.add_row(
            short_name(artifact),
            f"{artifact.size / 1e6:.1f}",
            f"{parity.min_cosine:.6f}",
            str(parity.floor),
            f"{parity.neighbour_cosine:.6f}",
            f"{parity.spearman:.4f}",
            f"{parity.max_abs_diff:.1e}" if scores else f"{parity.top10_overlap:.1%}",
            " ".join(f"{score.artifact - score.reference:+.2f}" for score in parity.sts) or "-",
            *(f"{cost.gain:+}" for cost in costs.of(artifact).values()),
        )
    return table


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return 0 on success, 2 on an error that the message explains."""
    lists = {"--precision": {precision.value for precision in Precision}, "--sts": None, "--own": None}
    return run_command(application(run), argv, "to_onnx.py", lists=lists)


if __name__ == "__main__":
    sys.exit(main())
