"""A full disk at every write: one message with the file and the cure, nothing half done, and the next try works.

A limit on the size of files (RLIMIT_FSIZE) stands for the full disk: every library's writes fail at it for real.
"""

from __future__ import annotations

import contextlib
import io
import resource
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.report.document import write_folder
from benchmarks.report.storage import read_report
from export import certificates, to_onnx, to_openvino, to_tensorrt, to_triton
from mirror_runtime.bundle import EngineName, Precision, read_manifest
from mirror_runtime.cli.main import main as mirror
from mirror_runtime.corpus.corpus import BadTexts, open_corpus
from mirror_runtime.corpus.encode_ray import ShardJob, ShardWorker
from mirror_runtime.engines.openvino_core import read_graph
from mirror_runtime.errors import InputError, MirrorError
from mirror_runtime.plan import Setting, write_plan
from mirror_runtime.triton.repository.options import ServingOptions
from mirror_runtime.triton.server.deploy import _write
from mirror_runtime.triton.server.deploy_lock import LOCK_FILE, deploying
from tests.support.fake_bundles import host_plan
from tests.support.paths import ROOT
from training import evaluate, tune
from training.checkpoint import Checkpoint, State

LINES = [f"the {word} no. {i} is playing a guitar" for i in range(12) for word in ("cat", "dog")]


@dataclass(frozen=True)
class Fixtures:
    """What the writers read."""

    tiny_bert: Path
    fake_bundle: Path
    tiny_bundle: Path  # with graphs


@dataclass(frozen=True)
class Writer:
    """A write into a folder that holds `in.txt` and `set.tsv`."""

    write: Callable[[Path, Fixtures], object]
    resumes: tuple[str, ...] = ()  # beginnings of the names that an unfinished run may leave
    limits: int = 4  # how many sizes of files to try
    silent: bool = False  # what cannot be written is done without


def run(main: Callable[[list[str]], int], *arguments: object) -> None:
    """Run a command; what it prints on a failure becomes an `InputError`."""
    printed = io.StringIO()
    with contextlib.redirect_stderr(printed), contextlib.redirect_stdout(io.StringIO()):
        status = main([str(argument) for argument in arguments])
    if status:
        assert status == 2
        raise InputError(printed.getvalue().splitlines()[-1])


def encode(at: Path, fixtures: Fixtures, name: str) -> None:
    run(mirror, "encode", fixtures.fake_bundle, at / "in.txt", "-o", at / name, "--engine", "fake")


def shard(at: Path, fixtures: Fixtures) -> None:
    source = open_corpus([at / "in.txt"])
    options: dict[str, Any] = {"load_options": {"engine": "fake"}, "bad_texts": BadTexts.STOP}
    worker = ShardWorker(ShardJob(bundle=fixtures.fake_bundle, source=source, folder=at, **options))
    (one,) = source.shards(len(LINES))
    result = worker({name: [value] for name, value in vars(one).items()})
    if result["problem"][0]:
        raise InputError(result["problem"][0])


def copied_bundle(at: Path, fixtures: Fixtures) -> Path:
    if not (at / "bundle").exists():
        shutil.copytree(fixtures.tiny_bundle, at / "bundle")
    return at / "bundle"


def deploy(at: Path, fixtures: Fixtures) -> None:
    options, model = ServingOptions(engine="fake"), at / "models" / "embed"
    manifest = read_manifest(fixtures.fake_bundle)
    with deploying(at / "models") as scratch:
        fresh = _write(fixtures.fake_bundle, manifest, scratch, model, options, 1, link=False)
        shutil.copytree(fresh, at / "copied")


def graph_cache(at: Path, fixtures: Fixtures) -> None:
    graph = fixtures.tiny_bundle / "onnx/model_packed.onnx"
    assert len(read_graph(graph, at / "cache").get_ops()) == len(read_graph(graph, None).get_ops())


def report(at: Path, _fixtures: Fixtures) -> None:
    path = next((ROOT / "benchmarks/reports").glob("*/report.json"))
    found = read_report(path.parent)
    write_folder(replace(found, measurements=tuple(found.select("latency"))), at / "report")


def plan(at: Path, _fixtures: Fixtures) -> None:
    setting = Setting(engine=EngineName.FAKE, precision=Precision.FP32, streams=2)
    write_plan(host_plan(chosen=setting, measured=()), at / "plans" / "plan.json")


WRITERS: dict[str, Writer] = {
    "vectors, npy": Writer(lambda at, it: encode(at, it, "out.npy"), resumes=("out.npy.partial",)),
    "vectors, parquet": Writer(lambda at, it: encode(at, it, "out.parquet"), resumes=("out.parquet.partial",)),
    "vectors, a shard": Writer(shard),
    "plan": Writer(plan),
    "report": Writer(report, limits=2),
    "run folder": Writer(
        lambda at, it: run(
            *(
                tune.main,
                "--base",
                it.tiny_bert,
                "--corpus",
                at / "in.txt",
                "--output",
                at / "run",
                "--pooling",
                "mean",
            ),
            *("--batch-size", 8, "--checkpoint-every", 1, "--probe", "none"),
        ),
        resumes=(".run.checkpoint",),
        limits=3,
    ),
    "checkpoint": Writer(
        lambda at, _: Checkpoint(path=at / "state", every=1).save(State(tensors={"a": torch.ones(900)}, steps=()), {})
    ),
    "evaluation": Writer(
        lambda at, it: run(
            *(evaluate.main, it.tiny_bert, "--pooling", "mean", "--sts", at / "set.tsv", "--output", at / "out.json")
        ),
        limits=2,
    ),
    "bundle": Writer(
        lambda at, it: run(
            *(to_onnx.main, it.tiny_bert, "--output", at / "made", "--pooling", "mean", "--precision", "fp32"),
            *("--parity-texts", at / "in.txt"),
        ),
        limits=3,
    ),
    "OpenVINO files of a bundle": Writer(
        lambda at, it: run(
            to_openvino.main, copied_bundle(at, it), "--precision", "fp32", "--parity-texts", at / "in.txt"
        ),
        limits=3,
    ),
    "TensorRT folder": Writer(
        lambda at, it: run(to_tensorrt.main, copied_bundle(at, it), "--script", at / "script", "--precision", "fp32"),
        limits=3,
    ),
    "Triton repository": Writer(
        lambda at, it: run(to_triton.main, it.fake_bundle, "--output", at / "models", "--engine", "fake")
    ),
    "deployment's copy": Writer(deploy),
    "graph cache": Writer(graph_cache, silent=True),
    "certificates": Writer(lambda at, it: run(certificates.main, it.tiny_bundle, "--output", at / "table.md")),
}


@pytest.fixture(scope="module")
def fixtures(tiny_bert: Path, gateway_bundle: Path, tiny_bundle: Path) -> Fixtures:
    return Fixtures(tiny_bert, gateway_bundle, tiny_bundle)


@contextlib.contextmanager
def largest_file(size: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def start(folder: Path, fixtures: Fixtures, name: str) -> dict[str, bytes]:
    folder.mkdir()
    (folder / "in.txt").write_text("\n".join(LINES) + "\n", encoding="utf-8")
    rows = [f"{first}\t{second}\t{i}" for i, (first, second) in enumerate(pairwise(LINES))]
    (folder / "set.tsv").write_text("\n".join(["sentence1\tsentence2\tscore", *rows]), encoding="utf-8")
    if name == "deployment's copy":
        (folder / "models").mkdir()
        (folder / "models" / LOCK_FILE).touch()
    if name in ("OpenVINO files of a bundle", "TensorRT folder"):
        copied_bundle(folder, fixtures)
    return contents(folder)


@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk_ends_in_one_message_and_the_next_try_works(name, fixtures, tmp_path, tiny_graphs):
    writer = WRITERS[name]
    before = start(tmp_path / "sound", fixtures, name)
    writer.write(tmp_path / "sound", fixtures)
    whole = contents(tmp_path / "sound")
    largest = max(len(content) for file, content in whole.items() if before.get(file) != content)
    for size in (largest // 2, largest - 1, 0, 200)[: writer.limits]:
        folder = tmp_path / str(size)
        before = start(folder, fixtures, name)
        with largest_file(size), contextlib.nullcontext() if writer.silent else pytest.raises(MirrorError) as refused:
            writer.write(folder, fixtures)
        if refused is not None:
            message = str(refused.value)
            assert "\n" not in message
            assert str(folder) in message, "the message names the file"
            assert "ulimit -f" in message, "and the cure"
        left = {
            file: content for file, content in contents(folder).items() if not file.startswith(writer.resumes or "/")
        }
        assert left == before, f"limit {size}"
        writer.write(folder, fixtures)
        made = [sorted(file.partition("tfevents")[0] for file in files) for files in (contents(folder), whole)]
        assert made[0] == made[1]
