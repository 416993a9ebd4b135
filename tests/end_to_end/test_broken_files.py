"""Every reader of files, fed broken ones: it returns a right result, or one message that names the file.

`--broken-files N` feeds each reader N files; the nightly run uses 400, and the suite some.
"""

from __future__ import annotations

import csv
import gzip
import json
import logging
import random
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
import pyarrow
import pyarrow.parquet as parquet
import pytest
import torch

from benchmarks.report.storage import read_report
from encoders.reference import Reference
from encoders.source import resolve
from evaluation.sets import read_sets, read_texts
from export.bundle.card import write_card
from export.certificates import read_bundles, render
from export.proof import proof_texts
from export.tensorrt.builder import BuildError, BuildRequest, read_request, write_request
from mirror_runtime import Encoder
from mirror_runtime.bundle import EngineName, Pooling, Precision, read_canaries, read_manifest, write_json
from mirror_runtime.canaries import compare_canaries
from mirror_runtime.corpus.corpus import BadTexts, open_corpus
from mirror_runtime.corpus.encode_file import encode_file
from mirror_runtime.corpus.encode_ray import _claimed
from mirror_runtime.engines.openvino_core import read_graph
from mirror_runtime.engines.plan_card import read_card
from mirror_runtime.errors import MirrorError
from mirror_runtime.plan import Setting, Trial, installed_versions, this_host, write_plan
from mirror_runtime.tokenizer import LongTexts, Tokenizer
from tests.support.broken_files import bounded, broken
from tests.support.fake_bundles import artifact, encoder_spec, host_plan, plan_card
from tests.support.paths import ROOT
from training.checkpoint import Checkpoint, State, Step
from training.formats import Records

TEXTS = ["the cat sat on the mat.", "", "Ä 😀 river", "a dog", "playing guitar", "x" * 300, "nul\u2028line"]
SPOKEN = (MirrorError, BuildError)


@dataclass(frozen=True)
class Fixtures:
    """What samples are made from."""

    tiny_bert: Path
    bundle: Path  # for the fake engine
    encoder: Encoder  # of that bundle
    graph: Path  # a real one


@dataclass(frozen=True)
class Sample:
    """A sound folder, which of its files to break, and how they are read."""

    write: Callable[[Path, Fixtures], object]
    files: tuple[str, ...]
    read: Callable[[Path, Fixtures], object]
    exact: bool = False  # whether a broken file may only lead to the sound one's result
    twin: Callable[[Path], object] | None = None  # reads another way what the reader returns


def text_rows(path: Path) -> list[object]:
    return [row.values[0] for row in open_corpus([path]).rows()]


def write_corpus(folder: Path, _fixtures: Fixtures) -> None:
    (folder / "in.txt").write_text("\n".join(TEXTS) + "\n", encoding="utf-8")
    lines = [json.dumps(text if i == 2 else {"id": i, "text": text}) for i, text in enumerate(TEXTS)]
    (folder / "in.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    parquet.write_table(pyarrow.table({"id": range(len(TEXTS)), "text": TEXTS}), folder / "in.parquet")
    (folder / "pairs.tsv").write_text("".join(f"{text or 'x'}\tother {i}\n" for i, text in enumerate(TEXTS)))
    (folder / "in.json").write_text(json.dumps([{"text": text} for text in TEXTS]), encoding="utf-8")
    with (folder / "in.csv").open("w", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerows([("id", "text"), *enumerate(TEXTS)])
    (folder / "in.txt.gz").write_bytes(gzip.compress((folder / "in.txt").read_bytes(), mtime=0))


def write_sets(folder: Path, _fixtures: Fixtures) -> None:
    rows = [(f"text {i}", f"other text {i}", i / 7) for i in range(5)]
    with (folder / "set.csv").open("w", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerows([("sentence1", "sentence2", "score"), *rows])
    for name, lines in {
        "set.tsv": ["\t".join(map(str, row)) for row in rows],
        "STS.input.a.txt": [f"{first}\t{second}" for first, second, _ in rows],
        "STS.gs.a.txt": [str(score) for *_, score in rows],
        "translation.csv": ["ID,ENG 1,ENG 2", *(f"{i},{row[0]},{row[1]}" for i, row in enumerate(rows))],
        "scores.csv": ["ID,ENG", *(f"{i},{row[2]}" for i, row in enumerate(rows))],
    }.items():
        path = folder / ("simlex" if name in ("translation.csv", "scores.csv") else "sts") / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def write_model(folder: Path, fixtures: Fixtures) -> None:
    shutil.copytree(fixtures.tiny_bert, folder, dirs_exist_ok=True)
    parts = [("Transformer", ""), ("Pooling", "1_Pooling"), ("Normalize", "2_Normalize")]
    listed = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (kind, path) in enumerate(parts)
    ]
    for name, value in {
        "modules.json": listed,
        "1_Pooling/config.json": {"word_embedding_dimension": 32, "pooling_mode_mean_tokens": True},
        "special_tokens_map.json": {"pad_token": "[PAD]"},
        "sentence_bert_config.json": {
            "max_seq_length": 32,
            "do_lower_case": False,
            "tokenizer_args": {},
            "model_args": {},
            "modality_config": {"text": {"method_output_name": "last_hidden_state"}},
        },
        "config_sentence_transformers.json": {
            "prompts": {"query": "the cat ", "own": "a dog "},
            "default_prompt_name": "own",
            "truncate_dim": None,
        },
    }.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps(value), encoding="utf-8")


def write_run_folder(folder: Path, fixtures: Fixtures) -> None:
    shutil.copytree(fixtures.tiny_bert, folder, dirs_exist_ok=True)
    (folder / "special_tokens_map.json").write_text('{"pad_token": {"content": "[PAD]"}}', encoding="utf-8")
    write_json(encoder_spec(dim=16, dense=(), template="query: {text}"), folder / "encoder.json")


def write_bundle(folder: Path, fixtures: Fixtures) -> None:
    shutil.copytree(fixtures.bundle, folder, dirs_exist_ok=True)
    artifacts = (artifact(EngineName.OPENVINO, Precision.FP32),)
    write_json(replace(read_manifest(folder), artifacts=artifacts), folder / "manifest.json")
    (folder / "README.md").write_text("A card", encoding="utf-8")
    witness = {"version": "6.2", "texts": 40, "min_cosine": 0.999999, "problem": ""}
    (folder / "witness.json").write_text(json.dumps(witness), encoding="utf-8")
    canaries = {"canaries": [{"text": text, "vector": [0.5] * 8} for text in TEXTS]}
    (folder / "canaries.json").write_text(json.dumps(canaries), encoding="utf-8")
    setting = Setting(engine=EngineName.FAKE, precision=Precision.FP32, streams=2)
    trial = Trial(setting=setting, texts_per_s=9.0, p50_ms=1.0, min_cosine=1.0, certified_cosine=1.0, accepted=True)
    here: dict[str, Any] = {"host": this_host(), "versions": installed_versions()}
    write_plan(host_plan(chosen=setting, measured=(trial,), **here), folder / "plan.json")


def load_bundle(folder: Path, *, plan: bool = False) -> Any:
    options: dict[str, Any] = {"plan": folder / "plan.json"} if plan else {"engine": "fake", "plan": None}
    with Encoder.load(folder, cache_dir=None, **options) as encoder:
        return encoder.encode(TEXTS)


def load_tokenizer(folder: Path) -> Any:
    spec = encoder_spec(pad_to=64, pooling=Pooling.MEAN_PADDED)
    result = Tokenizer.of(folder, spec, LongTexts.CHUNK)(TEXTS)
    return result.ids, result.lengths


def card(folder: Path) -> str:
    write_card(folder, read_manifest(folder))
    return (folder / "README.md").read_text(encoding="utf-8")


def records(name: str, folder: Path, _fixtures: Fixtures) -> Any:
    return list(Records(str(folder / name), pairs=name.startswith("pairs")))


def scored(name: str, folder: Path, _fixtures: Fixtures) -> Any:
    return [(one.texts, list(one.scores)) for one in read_sets(str(folder / name))]


def check_canaries(folder: Path) -> Any:
    canaries = read_canaries(folder)
    return compare_canaries(np.full((len(TEXTS), 8), 0.5, np.float32), canaries, 0.99)


def write_state(folder: Path, fixtures: Fixtures) -> None:
    """Write an unfinished run of `mirror encode`."""
    lines = [f"row {i}" for i in range(30)]
    lines[20] = "\ud800"
    source = folder / "in.jsonl"
    source.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    with pytest.raises(MirrorError, match="lone surrogate"):
        resume(folder, fixtures, bad_texts=BadTexts.STOP)


def resume(folder: Path, fixtures: Fixtures, *, bad_texts: BadTexts = BadTexts.ZERO) -> bytes:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mirror_runtime.corpus.encode_file.WINDOW", 8)
        source = open_corpus([folder / "in.jsonl"])
        encode_file(fixtures.encoder, source, folder / "out.npy", long_texts="truncate", bad_texts=bad_texts)
    return (folder / "out.npy").read_bytes()


def write_checkpoint(folder: Path, _fixtures: Fixtures) -> None:
    tensors = {
        "model.a": torch.arange(12.0).reshape(3, 4),
        "step": torch.tensor(3),
        "b": torch.ones(2, dtype=torch.bfloat16),
    }
    steps = tuple(Step(step=i + 1, loss=1 / (i + 1), tokens=10, seconds=0.5) for i in range(3))
    Checkpoint(path=folder / "state", every=1).save(State(tensors=tensors, steps=steps), IDENTITY)


IDENTITY = {"corpus": "0" * 64, "lr": 1e-4, "seed": 42}


def load_checkpoint(folder: Path) -> Any:
    state = Checkpoint(path=folder / "state", every=1).load(IDENTITY)
    assert state is not None
    return {name: tensor.float().tolist() for name, tensor in state.tensors.items()}, state.steps


def write_report(folder: Path, _fixtures: Fixtures) -> None:
    data = json.loads(next((ROOT / "benchmarks/reports").glob("*/report.json")).read_text(encoding="utf-8"))
    data["measurements"] = data["measurements"][:6]
    (folder / "report.json").write_text(json.dumps(data), encoding="utf-8")


def write_tensorrt(folder: Path, _fixtures: Fixtures) -> None:
    write_json(plan_card(((1, 16), (4, 64))), folder / "model.plan.json")
    profiles = ({"input_ids": ((1, 16), (1, 16), (1, 16))},)
    request = BuildRequest("model_packed.onnx", "0" * 64, "model_packed.plan", "fp16", "packed", profiles)
    write_request(request, folder / "request.json")


def claim(folder: Path) -> None:
    with _claimed(folder / "out.partial", {"bundle": "b", "part_rows": 7}):
        pass


def write_cache(folder: Path, fixtures: Fixtures) -> None:
    read_graph(fixtures.graph, folder)


def cached(folder: Path, fixtures: Fixtures) -> Any:
    """Return the operators and the checksums of all weights."""
    found = read_graph(fixtures.graph, folder).get_ops()
    return sorted((op.get_type_name(), crc32(op.data.tobytes()) if hasattr(op, "data") else 0) for op in found)


def lines(path: Path) -> list[str]:
    """Return the lines of a text file, each without its end, and without a byte order mark."""
    content = path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    found = content.removesuffix(b"\n").split(b"\n") if content else []
    return [line.removesuffix(b"\r").decode("utf-8") for line in found]


def json_texts(path: Path) -> list[object]:
    values = [json.loads(line) for line in lines(path) if line.strip()]
    return [value["text"] if isinstance(value, dict) else value for value in values]


MODEL_FILES = (
    *("config.json", "tokenizer.json", "tokenizer_config.json", "modules.json", "1_Pooling/config.json"),
    *("sentence_bert_config.json", "config_sentence_transformers.json", "model.safetensors"),
)
TOKENIZER_FILES = ("tokenizer.json", "special_tokens_map.json")
STATE_FILES = ("state.json", "windows", "vectors", "tokens", "truncated")


def encode_model(folder: Path, _fixtures: Fixtures) -> Any:
    vectors = Reference.load(resolve(str(folder))).encode(TEXTS[:2])
    assert np.isfinite(vectors).all()
    return vectors


SAMPLES: dict[str, Sample] = {
    "corpus txt": Sample(
        write_corpus, ("in.txt",), lambda at, _: text_rows(at / "in.txt"), twin=lambda at: lines(at / "in.txt")
    ),
    "corpus jsonl": Sample(
        write_corpus, ("in.jsonl",), lambda at, _: text_rows(at / "in.jsonl"),
        twin=lambda at: json_texts(at / "in.jsonl"),
    ),
    "corpus parquet": Sample(write_corpus, ("in.parquet",), lambda at, _: text_rows(at / "in.parquet")),
    **{
        f"tuning corpus {name}": Sample(write_corpus, (name,), partial(records, name))
        for name in ("in.txt", "in.jsonl", "in.json", "in.csv", "in.parquet", "pairs.tsv", "in.txt.gz")
    },
    **{
        f"evaluation set {name}": Sample(write_sets, files, partial(scored, name))
        for name, files in {
            "set.csv": ("set.csv",),
            "sts/set.tsv": ("sts/set.tsv",),
            "sts": ("sts/STS.input.a.txt", "sts/STS.gs.a.txt"),
            "simlex": ("simlex/translation.csv", "simlex/scores.csv"),
        }.items()
    },
    "evaluation texts": Sample(write_corpus, ("in.txt",), lambda at, _: read_texts(str(at / "in.txt"))),
    "proof texts": Sample(write_corpus, ("in.txt",), lambda at, _: proof_texts.read_texts(at / "in.txt")),
    "model folder": Sample(write_model, MODEL_FILES, encode_model),
    "run folder": Sample(write_run_folder, ("encoder.json",), encode_model),
    "manifest": Sample(write_bundle, ("manifest.json",), lambda at, _: load_bundle(at)),
    "plan": Sample(write_bundle, ("plan.json",), lambda at, _: load_bundle(at, plan=True)),
    "canaries": Sample(write_bundle, ("canaries.json",), lambda at, _: check_canaries(at)),
    "certificates": Sample(write_bundle, ("manifest.json",), lambda at, _: render(read_bundles([at]))),
    "card and witness": Sample(write_bundle, ("README.md", "witness.json"), lambda at, _: card(at)),
    "tokenizer": Sample(write_run_folder, TOKENIZER_FILES, lambda at, _: load_tokenizer(at)),
    "encode state": Sample(write_state, tuple(f"out.npy.partial/{name}" for name in STATE_FILES), resume, exact=True),
    "shards' state": Sample(
        lambda at, _: claim(at), ("out.partial/state.json",), lambda at, _: claim(at)
    ),
    "checkpoint": Sample(write_checkpoint, ("state",), lambda at, _: load_checkpoint(at), exact=True),
    "report": Sample(write_report, ("report.json",), lambda at, _: read_report(at)),
    "TensorRT card": Sample(write_tensorrt, ("model.plan.json",), lambda at, _: read_card(at / "model.plan")),
    "TensorRT request": Sample(write_tensorrt, ("request.json",), lambda at, _: read_request(at / "request.json")),
    "graph cache": Sample(
        write_cache, ("sha256.json", "graph.xml", "graph.bin"), cached, exact=True
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def fixtures(tiny_bert: Path, gateway_bundle: Path, tiny_bundle: Path) -> Iterator[Fixtures]:
    with Encoder.load(gateway_bundle, engine="fake") as encoder:
        yield Fixtures(tiny_bert, gateway_bundle, encoder, tiny_bundle / "onnx/model_packed.onnx")


def content_of(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def restore(folder: Path, sound: dict[Path, bytes]) -> None:
    """Write what has changed since; the files that are as they were keep their times."""
    now = content_of(folder)
    for path in now.keys() - sound.keys():
        path.unlink()
    for path in (path for path in sound if now.get(path) != sound[path]):
        path.parent.mkdir(exist_ok=True)
        path.unlink(missing_ok=True)  # a new file: the old one may be mapped
        path.write_bytes(sound[path])


@pytest.mark.parametrize("name", SAMPLES)
def test_a_broken_file_ends_in_one_message_or_in_the_right_result(name, fixtures, tmp_path, request):
    sample, draw, ends = SAMPLES[name], random.Random(name), Counter[str]()
    folder = tmp_path / "folder"
    folder.mkdir()
    sample.write(folder, fixtures)
    sound = content_of(folder)
    expected = sample.read(folder, fixtures)
    faults = []
    count = request.config.getoption("--broken-files")
    if count > 100:
        request.node.add_marker(pytest.mark.slow)
    for number in range(count):
        restore(folder, sound)
        file = draw.choice([path for path in sound if str(path).endswith(sample.files)])
        content = broken(sound[file], draw)
        file.unlink()
        file.write_bytes(content)
        try:
            with bounded():
                result = sample.read(folder, fixtures)
        except SPOKEN as error:
            message = str(error)
            ends["refused"] += 1
            if "\n" in message or len(message) > 2000 or not (file.stem in message or file.parent.name in message):
                faults.append((number, file.name, f"message: {message[:300]!r}"))
        except BaseException as error:
            faults.append((number, file.name, f"{type(error).__name__}: {str(error)[:200]}"))
        else:
            ends["read"] += 1
            if sample.exact and repr(result) != repr(expected):
                faults.append((number, file.name, "another result"))
            if sample.twin is not None and repr(result) != repr(sample.twin(folder)):
                faults.append((number, file.name, "another text"))
    logging.getLogger(__name__).info("%s: %s, faults %s", name, dict(ends), faults)
    assert not faults, f"{len(faults)} faults: {faults[:5]}"
