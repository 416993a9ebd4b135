"""The tuning loop: encode the packed views of a batch, compute the loss, update the weights."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from torch import nn

from encoders.pooling import project
from encoders.reference import Reference
from mirror_runtime.bundle import to_json
from mirror_runtime.errors import InputError
from training.augment import Example, texts_of
from training.batches import Batch, batches, check, targets_of
from training.checkpoint import Checkpoint, State, Step, fingerprint
from training.drophead import DropHead, drop_heads
from training.dropout import set_dropout
from training.elastic import elastic_loss, trained_depths, trained_dims
from training.gradient_cache import accumulate
from training.hardware import Hardware
from training.hybrid import HybridScores
from training.objective import match_scores, match_teacher, nt_xent, scored_loss
from training.packed import PackedTexts, encode_depths
from training.recipe import SCORED, Objective, Schedule, TuneConfig
from training.self_guided import SelfGuided
from training.trained import trained_parts

T = TypeVar("T")


def steps_in(texts: int, config: TuneConfig) -> int:
    """Return the steps of a run. The last texts of an epoch, fewer than a batch, are left out."""
    return config.epochs * (texts // config.batch_size)


def train(
    reference: Reference,
    data: Sequence[Example],
    config: TuneConfig,
    hardware: Hardware,
    on_step: Callable[[Step], None],
    checkpoint: Checkpoint | None = None,
    targets: torch.Tensor | HybridScores | None = None,
) -> None:
    """Tune the reference's model and dense layers in place. On one machine's CPU, one seed gives the same weights.

    The teacher objective needs `targets`, the teacher's vectors of the data: float32 [examples, dim]; the hybrid
    objective its scores.

    Seeds torch's global generator, from which dropout draws, and leaves the model in evaluation mode on the CPU. A
    killed run resumes from its checkpoint, whose file is left there, and ends in the same weights as an undisturbed
    run; `on_step` is then called for the earlier steps first.

    Raises:
        InputError: the recipe cannot be used with the data (see `check`), the checkpoint is of another run, or the
            loss is not finite.
    """
    check(reference, data, config, hardware)
    run = _Run(reference, config, hardware, steps_in(len(data), config))
    done: list[Step] = []
    identity = _identity(reference, data, config, hardware, targets) if checkpoint else {}
    state = checkpoint.load(identity) if checkpoint else None
    if state is not None:
        done.extend(state.steps)
    _check_same_step(len(done), hardware)
    with run:
        if state is not None:
            run.restore(state)
        for step in done:
            on_step(step)
        begin = time.perf_counter() - (done[-1].seconds if done else 0)
        for batch in _ahead(batches(reference, data, config, hardware, len(done), targets)):
            loss = run.step(batch, len(done) + 1)
            seconds = time.perf_counter() - begin
            done.append(Step(step=len(done) + 1, loss=loss, tokens=batch.tokens, seconds=seconds))
            if checkpoint and len(done) % checkpoint.every == 0:
                tensors = run.tensors()
                if hardware.writes:
                    checkpoint.save(State(tensors=tensors, steps=tuple(done)), identity)
            on_step(done[-1])


class _Run:
    """Model, objective, optimiser and dropout of one run. A context manager: tune inside of its block."""

    def __init__(self, reference: Reference, config: TuneConfig, hardware: Hardware, steps: int) -> None:
        self.model: Any = reference.model  # transformers' decorators lose the types of its `to` and `eval`
        self.spec = reference.spec
        self.dense = nn.ModuleList(reference.dense)
        self.dims, self.depths = trained_dims(config, reference), trained_depths(config, reference)
        self.config = config
        self.hardware = hardware
        self.steps = steps

    def __enter__(self) -> None:
        config = self.config
        torch.manual_seed(config.seed)
        self.model.to(self.hardware.device.value)
        self.dense.to(self.hardware.device.value).requires_grad_(True)
        self.guide: SelfGuided | None = None
        if config.objective is Objective.SELF_GUIDED:
            self.guide = SelfGuided(self.model, config.variant, config.temperature, config.drift)
        self.model.train()
        self.around = contextlib.ExitStack()
        self.around.enter_context(trained_parts(self.model, config.train_layers, config.lora))
        if self.hardware.rank:  # the head is the same in every process; dropout differs
            torch.manual_seed((config.seed + self.hardware.rank) % 2**63)
        self.generator = self.hardware.generator()
        self.head_parameters = list(self.guide.head.parameters()) if self.guide else []
        tuned = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.parameters = [*tuned, *self.dense.parameters(), *self.head_parameters]
        self.optimizer = torch.optim.AdamW(
            self.parameters,
            lr=config.lr,
            betas=(0.9, config.beta2),
            weight_decay=config.weight_decay,
            fused=True,
        )
        self.around.enter_context(set_dropout(self.model, config.dropout))
        self.drophead: DropHead | None = self.around.enter_context(drop_heads(self.model, config.drophead))

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.around.close()
        self.dense.to("cpu").requires_grad_(False)
        self.model.to("cpu")
        self.model.eval()
        written = {*self.model.parameters(), *self.parameters}
        if kind is None and not all(bool(parameter.isfinite().all()) for parameter in written):
            raise InputError(
                f"weights are not finite at the end: nothing was written. Lower --lr (it is {self.config.lr})"
            )

    def step(self, batch: Batch, number: int) -> float:
        """Run one step and return its loss."""
        config = self.config
        rate = config.lr * learning_rate(number, self.steps, config)
        for settings in self.optimizer.param_groups:
            settings["lr"] = rate
        self.optimizer.zero_grad()
        loss = self._backward(batch, number)
        self.optimizer.step()
        return loss

    def _backward(self, batch: Batch, number: int) -> float:
        config, hardware, guide = self.config, self.hardware, self.guide
        length = batch.packed.input_ids.shape[1]
        rows = max(1, (config.micro_batch_tokens or batch.packed.input_ids.numel()) // length)
        places, pieces = zip(*batch.packed.split(rows), strict=True)
        views = None if guide is None else self._views(guide, pieces, places, batch)

        def encode(piece: int) -> torch.Tensor:
            return self._encode(pieces[piece])

        def loss_of(encoded: torch.Tensor) -> torch.Tensor:
            laid = encoded.new_zeros(batch.texts * batch.sides, encoded.shape[1])
            laid = laid.index_copy(0, batch.places.to(encoded.device), encoded)
            loss = self._loss(self._gather(laid.view(batch.texts, batch.sides, -1)), batch, views)
            if not math.isfinite(loss.item()):
                raise InputError(
                    f"the loss is {loss.item()} at step {number}: nothing was written. Lower --lr (it is {config.lr})"
                )
            return loss

        loss = accumulate(places, encode, loss_of, self.generator, hardware.autocast).item()
        for parameter in self.head_parameters:  # every process has the whole gradient
            if hardware.processes > 1 and parameter.grad is not None:
                parameter.grad /= hardware.processes
        hardware.sum_gradients(self.parameters)
        if guide is not None:
            loss += guide.add_drift()
        if config.clip is not None:
            torch.nn.utils.clip_grad_norm_(self.parameters, config.clip)
        return loss

    def _loss(self, vectors: torch.Tensor, batch: Batch, views: torch.Tensor | None) -> torch.Tensor:
        """Compute the loss of all processes' vectors, float32 [examples, sides, depths x dim]."""
        groups = batch.groups.to(vectors.device)
        if self.guide is not None:
            assert views is not None
            with self.hardware.autocast():
                return self.guide.loss(vectors[:, 0], views, groups)
        # What a base with `truncate_dim` returns
        depths = [one[..., : self.spec.dim] for one in vectors.chunk(1 + len(self.depths), dim=-1)]

        def distil(shallow: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
            first, second = (one[:, :2].flatten(0, 1) for one in (shallow, whole))
            return match_teacher(
                first, second, self.config.temperature, groups.repeat_interleave(len(first) // len(groups))
            )

        taught = self.config.objective is Objective.TEACHER  # which all depths learn from
        return elastic_loss(
            depths, self.dims, lambda one: self._loss_of(one, batch, groups), None if taught else distil
        )

    def _loss_of(self, vectors: torch.Tensor, batch: Batch, groups: torch.Tensor) -> torch.Tensor:
        """Compute the loss of vectors float32 [examples, sides, any number of components]."""
        objective, temperature, device = self.config.objective, self.config.temperature, vectors.device
        targets = batch.targets.to(device)
        if objective is Objective.TEACHER:
            return match_teacher(vectors[:, 0], targets, temperature, groups)
        if objective is Objective.HYBRID:
            return match_scores(vectors[:, 0], vectors[:, 1], targets, temperature)
        if objective in SCORED:
            return scored_loss(objective, vectors[:, 0], vectors[:, 1], targets, temperature)
        negatives = batch.negatives.to(device).flatten()
        there = negatives > -2
        return nt_xent(
            vectors[:, 0], vectors[:, 1], temperature, groups, vectors[:, 2:].flatten(0, 1)[there], negatives[there]
        )

    def _encode(self, packed: PackedTexts) -> torch.Tensor:
        if self.drophead is not None:
            self.drophead.text_ids = packed.text_ids
        pooled = encode_depths(self.model, packed, self.spec.pooling, self.spec.layers, self.depths)
        return torch.cat([project(one, self.dense).float() for one in pooled], dim=-1)

    def _views(
        self, guide: SelfGuided, pieces: Sequence[PackedTexts], places: Sequence[torch.Tensor], batch: Batch
    ) -> torch.Tensor:
        """Compute the views of all processes' texts: float32 [examples, views, dim]."""
        with self.hardware.autocast():
            parts = [
                guide.views(piece, batch.layers[place] if len(batch.layers) else batch.layers)
                for piece, place in zip(pieces, places, strict=True)
            ]
        return self.hardware.gather(torch.cat(parts)[torch.cat(list(places)).argsort()])

    def _gather(self, vectors: torch.Tensor) -> torch.Tensor:
        """Concatenate all processes' vectors [examples, sides, dim]; this process's part keeps its graph."""
        if self.hardware.processes == 1:
            return vectors
        share = self.hardware.share(len(vectors) * self.hardware.processes)
        gathered = self.hardware.gather(vectors.contiguous())
        return torch.cat([gathered[: share.start], vectors, gathered[share.stop :]])

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return every tensor that the next step depends on, on the CPU."""
        tensors = {f"model.{name}": value for name, value in self.model.state_dict().items()}
        tensors |= {f"dense.{name}": value for name, value in self.dense.state_dict().items()}
        if self.guide is not None:
            tensors |= {f"head.{name}": value for name, value in self.guide.head.state_dict().items()}
        for index, values in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{name}": value for name, value in values.items()}
        generator = self.generator.get_state()
        tensors["generators"] = self.hardware.gather(generator[None])
        return {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}

    def restore(self, state: State) -> None:
        """Restore the tensors that `tensors` returned."""
        parts: dict[str, dict[str, torch.Tensor]] = {part: {} for part in ("model", "dense", "head", "optimizer")}
        for path, value in state.tensors.items():
            part, _, name = path.partition(".")
            if part in parts:
                parts[part][name] = value
        self.model.load_state_dict(parts["model"])
        self.dense.load_state_dict(parts["dense"])
        if self.guide is not None:
            self.guide.head.load_state_dict(parts["head"])
        moments: dict[int, dict[str, torch.Tensor]] = {}
        for path, value in parts["optimizer"].items():
            index, _, name = path.partition(".")
            moments.setdefault(int(index), {})[name] = value
        self.optimizer.load_state_dict(self.optimizer.state_dict() | {"state": moments})
        self.generator.set_state(state.tensors["generators"][self.hardware.rank])


def learning_rate(number: int, steps: int, config: TuneConfig) -> float:
    """Return the learning rate of a step as a share of `lr`.

    It rises linearly over the warm-up and is 1 at its last step; it is never 0. Steps are numbered from 1.
    """
    warmup = math.ceil(config.warmup * steps)
    if number <= warmup:
        return number / warmup
    past = (number - 1 - warmup) / (steps - warmup)
    if config.schedule is Schedule.LINEAR:
        return 1 - past
    if config.schedule is Schedule.COSINE:
        return (1 + math.cos(math.pi * past)) / 2
    return 1.0


def _ahead(items: Iterator[T]) -> Iterator[T]:
    """Yield the items, each produced in another thread while its predecessor is in use."""
    end = object()
    with ThreadPoolExecutor(max_workers=1) as thread:
        upcoming = thread.submit(next, items, end)
        while (item := upcoming.result()) is not end:
            upcoming = thread.submit(next, items, end)
            yield item  # type: ignore[misc]


def _identity(
    reference: Reference,
    data: Sequence[Example],
    config: TuneConfig,
    hardware: Hardware,
    targets: torch.Tensor | HybridScores | None,
) -> dict[str, Any]:
    """Return everything that determines a run, as JSON values."""
    weights = reference.model.state_dict() | nn.ModuleList(reference.dense).state_dict(prefix="dense.")
    base = (part for name, value in weights.items() for part in (name.encode(), value.contiguous().numpy().tobytes()))
    texts = [text.encode() for example in data for text in texts_of(example)]
    targets = targets_of(data) if targets is None else targets
    if isinstance(targets, torch.Tensor):  # hybrid scores follow from base and corpus
        texts.append(targets.numpy().tobytes())
    settings = to_json(config) | {"device": hardware.device.value, "precision": hardware.precision.value}
    return {
        **settings,
        "base": fingerprint(base)[:12],
        "corpus": fingerprint(texts)[:12],
        "pooling": reference.spec.pooling.value,
        "layers": list(reference.spec.layers),
        "pad_to": reference.spec.pad_to,
        "processes": hardware.processes,
    }


def _check_same_step(done: int, hardware: Hardware) -> None:
    """Check that all processes have read the same checkpoint."""
    steps = hardware.gather(torch.tensor([done])).tolist()
    if len(set(steps)) > 1:
        raise InputError(f"the processes found checkpoints of steps {steps}: put the output where all hosts see it")
