"""What an artifact costs on the user's own texts: probes of the encoder, and of what was made of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from encoders.reference import Reference
from evaluation.probes import Probe, evaluate_probes
from evaluation.statistics import Bootstrap, Result, gains
from export.bundle.card import PROBES_FILE, ProbeCost, ProbeCosts
from export.proof.candidate import Candidate
from export.proof.parity import opened
from mirror_runtime.bundle import Manifest, sha256_texts, write_json
from mirror_runtime.errors import ParityError


@dataclass(frozen=True, kw_only=True)
class OwnTexts:
    """Probes, and what the encoder reaches on them before its head is cut, whitened or rounded."""

    probes: tuple[Probe, ...]
    before: tuple[Result, ...]  # of each probe
    reference: str  # what computed them
    max_loss: float | None  # points that an artifact may surely lose on a probe; None for any number

    @classmethod
    def of(cls, reference: Reference, probes: Sequence[Probe], max_loss: float | None) -> OwnTexts:
        """Measure the encoder in PyTorch, in fp32."""
        return cls(
            probes=tuple(probes),
            before=tuple(evaluate_probes(probes, reference.encode_unnormalized, Bootstrap())),
            reference=f"PyTorch {torch.__version__.split('+')[0]} fp32, {reference.spec.dim} numbers a text",
            max_loss=max_loss,
        )

    def costs(self, folder: Path, candidate: Candidate, manifest: Manifest) -> tuple[ProbeCost, ...]:
        """Measure a candidate with the engine and options that serve.

        Raises:
            ParityError: the whole interval of a difference is below `-max_loss`.
        """
        if not self.probes:
            return ()
        with opened(folder, candidate, manifest) as (encode, _):
            after = evaluate_probes(self.probes, encode, Bootstrap())
        costs = tuple(
            ProbeCost(
                path=candidate.graph.path.absolute().relative_to(folder.absolute()).as_posix(),
                engine=candidate.engine,
                precision=candidate.precision,
                probe=new.metric,
                items=new.samples,
                before=old.figure.value,
                after=new.figure.value,
                gain=gain,
            )
            for old, new, gain in zip(self.before, after, gains(self.before, after), strict=True)
        )
        for cost in costs:
            if self.max_loss is not None and cost.gain.high < -self.max_loss:
                raise ParityError(
                    f"{candidate}: on your own texts, {cost}, surely more than --max-probe-loss {self.max_loss:g}: "
                    "choose another precision, more dimensions or another vector type"
                )
        return costs

    def write(self, folder: Path, costs: Sequence[ProbeCost]) -> ProbeCosts:
        """Write `PROBES_FILE` if there are probes; return its content."""
        texts = (text for one in self.probes for side in (one.questions, one.answers, one.decoys) for text in side)
        record = ProbeCosts(reference=self.reference, texts_sha256=sha256_texts(texts), costs=tuple(costs))
        if self.probes:
            write_json(record, folder / PROBES_FILE)
        return record
