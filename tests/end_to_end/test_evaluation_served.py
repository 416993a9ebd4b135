"""What is measured over a Triton server and over a gateway is what is measured in process."""

import json

import pytest

from mirror_runtime.triton import ServingOptions
from mirror_runtime.triton.repository.render import write_temporary_repository
from tests.support import gateways, triton_requests
from training.evaluate import main

WORDS = ("cat", "dog", "man", "river", "mat", "guitar", "sat", "playing")


@pytest.mark.serving
@pytest.mark.slow  # starts a tritonserver
def test_a_server_and_a_gateway_have_the_figures_of_the_bundle_in_process(tiny_bundle, tmp_path, capsys):
    texts = [f"the {a} {b} is on a {c} no" for a in WORDS for b in WORDS for c in WORDS[:2]]
    (tmp_path / "own.txt").write_text("\n".join(texts))
    rows = [f"{i % 6}\t{text}\t{other}" for i, (text, other) in enumerate(zip(texts[:60], texts[30:], strict=False))]
    (tmp_path / "some.tsv").write_text("score\tsentence1\tsentence2\n" + "\n".join(rows))
    (tmp_path / "beir" / "qrels").mkdir(parents=True)
    for name in ("corpus", "queries"):
        lines = [
            json.dumps({"_id": str(i), "text": text[::4] if name == "queries" else text})
            for i, text in enumerate(texts)
        ]
        (tmp_path / "beir" / f"{name}.jsonl").write_text("\n".join(lines))
    judged = "".join(f"{i}\t{i}\t1\n" for i in range(40))
    (tmp_path / "beir" / "qrels" / "test.tsv").write_text(f"query-id\tcorpus-id\tscore\n{judged}")
    repository = tmp_path / "repository"
    repository.mkdir()
    write_temporary_repository(tiny_bundle, repository, ServingOptions(engine="onnxruntime"))
    with triton_requests.running(repository) as server, gateways.running(tiny_bundle, engine="onnxruntime") as gateway:
        encoders = [f"{tiny_bundle}:fp32", f"triton://127.0.0.1:{server.grpc_port}", f"{gateway.url}/v1"]
        files = ("--own", tmp_path / "own.txt", "--sts", tmp_path / "some.tsv", "--retrieval", tmp_path / "beir")
        assert main([*encoders, *map(str, files), "--rank", "--resamples", "100"]) == 0
    report = json.loads(capsys.readouterr().out)
    first, *others = report["encoders"]
    assert len({task["task"] for task in first["tasks"]}) == 3
    assert first["sets"][0]["spearman"] != 0
    for other, change in zip(others, report["differences"], strict=True):
        assert [task["value"] for task in other["tasks"]] == pytest.approx([task["value"] for task in first["tasks"]])
        assert other["sets"][0]["spearman"] == pytest.approx(first["sets"][0]["spearman"])
        for entry in (*change["tasks"], change["means"]["sts"]):
            bounds = [value for name, value in entry.items() if name.endswith(("_low", "_high"))]
            assert bounds == pytest.approx([0, 0], abs=1e-6)
