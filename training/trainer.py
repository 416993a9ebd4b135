"""The tuning loop: two views of every text, packed, through the model; one loss; one step."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch

from encoders.reference import Reference
from mirror_runtime.bundle import to_json
from mirror_runtime.errors import InputError
from training.augment import Example
from training.batches import Batch, batches, check
from training.checkpoint import Checkpoint, State, Step, fingerprint
from training.drophead import DropHead, drop_heads
from training.dropout import set_dropout
from training.gradient_cache import accumulate
from training.hardware import Hardware, choose_hardware
from training.objective import Objective, nt_xent
from training.packed import PackedTexts, encode_packed
from training.recipe import Schedule, TuneConfig
from training.self_guided import SelfGuided

__all__ = ["Hardware", "Step", "choose_hardware", "steps_in", "train"]

T = TypeVar("T")


def steps_in(texts: int, config: TuneConfig) -> int:
    """Count the steps of a run: the last texts of an epoch, fewer than a batch, are left out."""
    return config.epochs * (texts // config.batch_size)


def train(
    reference: Reference,
    data: Sequence[Example],
    config: TuneConfig,
    hardware: Hardware,
    on_step: Callable[[Step], None],
    checkpoint: Checkpoint | None = None,
) -> None:
    """Tune the reference's model in place. One seed gives the same weights again on one machine's CPU.

    Seeds torch's global generator, from which dropout draws.

    Args:
        reference: model, tokenizer and pooling; left in evaluation mode on the CPU.
        data: distinct texts, or pairs of texts that mean the same.
        config: the recipe.
        hardware: where and how.
        on_step: called after each step; after a resume first for the steps that were done before.
        checkpoint: where the run's state is kept; a run that was killed goes on from it, and ends in the weights that
            it would have had. The file is left there.

    Raises:
        InputError: data that the recipe cannot be used on (see `check`), a checkpoint of another run, or a loss that is
            not finite.
    """
    check(reference, data, config, hardware)
    run = _Run(reference, config, hardware, steps_in(len(data), config))
    done: list[Step] = []
    identity = _identity(reference, data, config, hardware) if checkpoint else {}
    state = checkpoint.load(identity) if checkpoint else None
    if state is not None:
        done.extend(state.steps)
    _agree(len(done), hardware)
    with run:
        if state is not None:
            run.restore(state)
        for step in done:
            on_step(step)
        begin = time.perf_counter() - (done[-1].seconds if done else 0)
        for batch in _ahead(batches(reference, data, config, hardware, skip=len(done))):
            loss = run.step(batch, len(done) + 1)
            seconds = time.perf_counter() - begin
            done.append(Step(step=len(done) + 1, loss=loss, tokens=batch.tokens, seconds=seconds))
            if checkpoint and checkpoint.due(len(done)):
                tensors = run.tensors()
                if hardware.writes:
                    checkpoint.save(State(tensors=tensors, steps=tuple(done)), identity)
            on_step(done[-1])


class _Run:
    """Model, objective, optimiser and dropout of one run, between `with` and its end."""

    def __init__(self, reference: Reference, config: TuneConfig, hardware: Hardware, steps: int) -> None:
        self.model: Any = reference.model  # the types of its `to` and `eval` are lost behind transformers' decorators
        self.spec = reference.spec
        self.config = config
        self.hardware = hardware
        self.steps = steps

    def __enter__(self) -> None:
        config = self.config
        torch.manual_seed(config.seed)
        self.model.to(self.hardware.device.value)
        self.guide: SelfGuided | None = None
        if config.objective is Objective.SELF_GUIDED:
            self.guide = SelfGuided(self.model, config.variant, config.temperature, config.drift)
        if self.hardware.rank:  # the head begins alike in every process; dropout differs
            torch.manual_seed((config.seed + self.hardware.rank) % 2**63)
        self.generator = self.hardware.generator()
        self.own = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.shared = list(self.guide.head.parameters()) if self.guide else []
        self.optimizer = torch.optim.AdamW(
            [*self.own, *self.shared],
            lr=config.lr,
            betas=(0.9, config.beta2),
            weight_decay=config.weight_decay,
            fused=True,
        )
        self.model.train()
        self.around = contextlib.ExitStack()
        self.around.enter_context(set_dropout(self.model, config.dropout))
        self.drophead: DropHead | None = self.around.enter_context(drop_heads(self.model, config.drophead))

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.around.close()
        self.model.requires_grad_(True)
        self.model.to("cpu")
        self.model.eval()
        if kind is None and not all(bool(parameter.isfinite().all()) for parameter in self.model.parameters()):
            raise InputError(
                f"weights are not finite at the end: nothing was written. Lower --lr (it is {self.config.lr})"
            )

    def step(self, batch: Batch, number: int) -> float:
        """Make one step; gives its loss."""
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
        groups = batch.groups.to(self.model.device)
        views = None if guide is None else self._views(guide, pieces, places, batch)

        def encode(piece: int) -> torch.Tensor:
            return self._encode(pieces[piece])

        def loss_of(own: torch.Tensor) -> torch.Tensor:
            vectors = self._gather(own.view(-1, batch.texts, own.shape[1]).transpose(0, 1))
            if guide is None:
                loss = nt_xent(vectors[:, 0], vectors[:, 1], config.temperature, groups)
            else:
                assert views is not None
                with hardware.autocast():
                    loss = guide.loss(vectors[:, 0], views, groups)
            if not math.isfinite(loss.item()):
                raise InputError(
                    f"the loss is {loss.item()} at step {number}: nothing was written. Lower --lr (it is {config.lr})"
                )
            return loss

        loss = accumulate(places, encode, loss_of, self.generator, hardware.autocast).item()
        for parameter in self.shared:  # every process has this gradient in full
            if hardware.processes > 1 and parameter.grad is not None:
                parameter.grad /= hardware.processes
        hardware.sum_gradients([*self.own, *self.shared])
        if guide is not None:
            loss += guide.add_drift()
        if config.clip is not None:
            torch.nn.utils.clip_grad_norm_([*self.own, *self.shared], config.clip)
        return loss

    def _encode(self, packed: PackedTexts) -> torch.Tensor:
        if self.drophead is not None:
            self.drophead.text_ids = packed.text_ids
        return encode_packed(self.model, packed, self.spec.pooling, self.spec.layers)

    def _views(
        self, guide: SelfGuided, pieces: Sequence[PackedTexts], places: Sequence[torch.Tensor], batch: Batch
    ) -> torch.Tensor:
        """Give the views of all processes' texts: float32 [examples, views, dim]."""
        with self.hardware.autocast():
            parts = [
                guide.views(piece, batch.layers[place] if len(batch.layers) else batch.layers)
                for piece, place in zip(pieces, places, strict=True)
            ]
        return self.hardware.gather(torch.cat(parts)[torch.cat(list(places)).argsort()])

    def _gather(self, own: torch.Tensor) -> torch.Tensor:
        """Join all processes' vectors [examples, sides, dim]; this process's part keeps its graph."""
        if self.hardware.processes == 1:
            return own
        share = self.hardware.share(len(own) * self.hardware.processes)
        everyone = self.hardware.gather(own.contiguous())
        return torch.cat([everyone[: share.start], own, everyone[share.stop :]])

    def tensors(self) -> dict[str, torch.Tensor]:
        """Give everything that the next step depends on besides settings and corpus, on the CPU."""
        tensors = {f"model.{name}": value for name, value in self.model.state_dict().items()}
        if self.guide is not None:
            tensors |= {f"head.{name}": value for name, value in self.guide.head.state_dict().items()}
        for index, values in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{name}": value for name, value in values.items()}
        generator = self.generator.get_state()
        tensors["generators"] = self.hardware.gather(generator[None])
        return {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}

    def restore(self, state: State) -> None:
        """Go back to what `tensors` gave."""
        parts: dict[str, dict[str, torch.Tensor]] = {"model": {}, "head": {}, "optimizer": {}}
        for full, value in state.tensors.items():
            part, _, name = full.partition(".")
            if part in parts:
                parts[part][name] = value
        self.model.load_state_dict(parts["model"])
        if self.guide is not None:
            self.guide.head.load_state_dict(parts["head"])
        moments: dict[int, dict[str, torch.Tensor]] = {}
        for full, value in parts["optimizer"].items():
            index, _, name = full.partition(".")
            moments.setdefault(int(index), {})[name] = value
        self.optimizer.load_state_dict(self.optimizer.state_dict() | {"state": moments})
        self.generator.set_state(state.tensors["generators"][self.hardware.rank])


def learning_rate(number: int, steps: int, config: TuneConfig) -> float:
    """Give the share of `lr` that a step has.

    It rises linearly over the warm-up, reaching 1 with its last step; no step has a rate of 0.

    Args:
        number: the step, from 1.
        steps: of the whole run.
        config: says schedule and warm-up.
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
    """Give the items, each made in another thread while its predecessor is in use."""
    end = object()
    with ThreadPoolExecutor(max_workers=1) as thread:
        coming = thread.submit(next, items, end)
        while (item := coming.result()) is not end:
            coming = thread.submit(next, items, end)
            yield item  # type: ignore[misc]


def _identity(reference: Reference, data: Sequence[Example], config: TuneConfig, hardware: Hardware) -> dict[str, Any]:
    """Give what decides a run's course."""
    weights = reference.model.state_dict()
    base = (part for name, value in weights.items() for part in (name.encode(), value.contiguous().numpy().tobytes()))
    texts = (text.encode() for example in data for text in ([example] if isinstance(example, str) else example))
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


def _agree(done: int, hardware: Hardware) -> None:
    """Refuse to go on where processes have read different checkpoints."""
    everyone = hardware.gather(torch.tensor([done])).tolist()
    if len(set(everyone)) > 1:
        raise InputError(f"the processes found checkpoints of steps {everyone}: put the output where all hosts see it")
