"""Make a smaller encoder of another one: fewer layers, fewer tokens. The command line."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

if __package__ in (None, ""):  # run by path: import from the repository root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import typer

from mirror_runtime.bundle import ENCODER_FILE
from mirror_runtime.cli.options import PoolingOption, RevisionOption
from mirror_runtime.cli.run import application, print_json, run_command
from mirror_runtime.errors import BundleError, InputError
from mirror_runtime.folders import whole_folder
from training.corpus import CorpusRequest, read_corpus

if TYPE_CHECKING:
    from encoders.reference import Reference

CHECKED_TEXTS = ("", "the cat sat on the mat", "Zürich, 東京 😀 zzyzx", "one two three four five " * 9)
"""Compared between the encoder in memory and the one that was written."""

TOLERANCE = 1e-4


def command(
    encoder: Annotated[
        str,
        typer.Argument(help="A run folder, a sentence-transformers folder, a Hugging Face folder, or a hub name."),
    ],
    output: Annotated[Path, typer.Option(help="Run folder to write.", show_default=False)],
    layers: Annotated[
        list[int] | None,
        typer.Option(help="Layers to keep, counted from 0: 0 2 5 are three of six.", show_default="all"),
    ] = None,
    depth: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Number of layers to keep, evenly from the first to the last: 3 of 6 are 0 2 5, 6 of 12 are 0 2 4 7 9 "
            "11.",
            show_default="all",
        ),
    ] = None,
    vocabulary: Annotated[
        list[str] | None,
        typer.Option(
            metavar="CORPUS...",
            help="Keep the tokens of these texts, as tune.py --corpus reads them, with single characters and special "
            "tokens; other words become several tokens. For WordPiece and Unigram tokenizers.",
            show_default="all",
        ),
    ] = None,
    pooling: PoolingOption = None,
    revision: RevisionOption = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing run folder, at the end.")] = False,
) -> None:
    """Write a smaller encoder: fewer layers, and a vocabulary cut to a corpus. Then let it learn from the whole one.

    The table of tokens holds 11.7 of MiniLM's 22.6 million numbers, and its six layers 10.6. With fewer layers the
    vectors are worse until `tune.py --base STUDENT --teacher ENCODER --corpus TEXT` has taught them; a cut vocabulary
    alone changes no vector of the corpus, saves memory and not time. The last line of stdout is one JSON object.
    """
    if not (layers or depth or vocabulary):
        raise InputError("nothing to leave out: pass --layers, --depth or --vocabulary")
    if layers and depth:
        raise InputError("--layers and --depth exclude each other: pass one of them")
    from encoders.depth import keep_layers  # imports torch, for which --help does not wait
    from encoders.layers import layers_of
    from encoders.reference import Reference
    from encoders.source import resolve
    from encoders.write import write_layout
    from training.vocabulary import cut_vocabulary

    source = resolve(encoder, pooling=pooling, revision=revision)
    whole = student = Reference.load(source)
    total = len(layers_of(whole.model))
    kept = spread(depth, total) if depth else layers or range(total)
    if layers or depth:
        student = keep_layers(student, kept)
    if vocabulary:
        prompts = [text.replace("{text}", "") for text in (whole.spec.template or "", *source.prompts.values())]
        texts = read_corpus(CorpusRequest(files=tuple(vocabulary))).texts
        student = cut_vocabulary(student, [*texts, *prompts])
    sizes = {name: _sizes(one) for name, one in (("before", whole), ("after", student))}
    tokens, numbers = (f"{after:,} of {before:,}" for before, after in zip(*sizes.values(), strict=True))
    card = (
        f"# {whole.spec.base_model}, made smaller\n\nLayers {' '.join(map(str, kept))} (from 0) of {total}, "
        f"{tokens} tokens, {numbers} parameters. The whole encoder has not taught it yet: `tune.py --teacher` does.\n"
    )
    with whole_folder(output, overwrite=overwrite, marker=ENCODER_FILE) as folder:
        write_layout(
            folder,
            model=student.model,
            tokenizer=student.tokenizer,
            spec=student.spec,
            card=card,
            dense=student.dense,
            prompts=source.prompts,
            terms=source.card.terms,
        )
        _check(student, Reference.load(resolve(str(folder))))
    print_json(
        {
            "output": str(output),
            "layers": list(kept),
            "tokens": sizes["after"][0],
            "parameters": sizes["after"][1],
            "tokens_before": sizes["before"][0],
            "parameters_before": sizes["before"][1],
        }
    )


def spread(depth: int, total: int) -> list[int]:
    """Choose `depth` of `total` layers, counted from 0, evenly from the first to the last; one is the first."""
    if depth > total:
        raise InputError(f"--depth {depth}: the encoder has {total} layers")
    return [round(i * (total - 1) / max(1, depth - 1)) for i in range(depth)]


def _sizes(reference: Reference) -> tuple[int, int]:
    """Return the numbers of tokens and of parameters."""
    return reference.model.config.vocab_size, sum(value.numel() for value in reference.model.parameters())


def _check(student: Reference, written: Reference) -> None:
    """Check that the folder holds the encoder: some families build their first layer differently from the others."""
    gap = abs(student.encode_unnormalized(CHECKED_TEXTS) - written.encode_unnormalized(CHECKED_TEXTS)).max()
    if not gap < TOLERANCE:
        raise BundleError(
            f"an encoder of the family {student.spec.family} computes other vectors once these layers are read again: "
            "keep layer 0"
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return 0 on success, 2 on an error that the message explains."""
    return run_command(application(command), argv, "shrink.py", lists={"--layers": None, "--vocabulary": None})


if __name__ == "__main__":
    sys.exit(main())
