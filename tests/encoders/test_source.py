"""Finding an encoder and determining what it computes."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import load_file, save_file

from encoders.reference import Reference
from encoders.source import HeadSpec, resolve
from mirror_runtime.bundle import Ditto, Pooling, write_json
from mirror_runtime.errors import BundleError, InputError
from tests.support.fake_bundles import encoder_spec

Edit = Callable[[Any], object]


@pytest.fixture
def copy(tiny_bert: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_bert, tmp_path / "encoder"))


def write(path: Path, value: object) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")


def edit(path: Path, change: Edit) -> None:
    value = json.loads(path.read_text(encoding="utf-8"))
    change(value)
    write(path, value)


def make_modules(folder: Path, *kinds: tuple[str, str]) -> None:
    """Write `modules.json` from paths and classes."""
    modules = [{"idx": i, "name": str(i), "path": path, "type": kind} for i, (path, kind) in enumerate(kinds)]
    write(folder / "modules.json", modules)


def make_old(folder: Path) -> None:
    """Make a folder of sentence-transformers 2: [CLS], normalised, up to 40 tokens."""
    kinds = [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")]
    make_modules(folder, *((path, f"sentence_transformers.models.{kind}") for path, kind in kinds))
    write(
        folder / "1_Pooling" / "config.json",
        {"word_embedding_dimension": 32, "pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False},
    )
    write(folder / "sentence_bert_config.json", {"max_seq_length": 40, "do_lower_case": False})


def make_new(folder: Path) -> None:
    """Make a folder of sentence-transformers 5: mean."""
    make_modules(
        folder,
        ("", "sentence_transformers.base.modules.transformer.Transformer"),
        ("1_Pooling", "sentence_transformers.sentence_transformer.modules.pooling.Pooling"),
    )
    config = {"embedding_dimension": 32, "pooling_mode": "mean", "include_prompt": True}
    write(folder / "1_Pooling" / "config.json", config)
    write(folder / "sentence_bert_config.json", {"transformer_task": "feature-extraction"})


def add_dense(folder: Path, **config: object) -> None:
    """Insert a dense layer into `modules.json`."""
    dense = {"path": "3_Dense", "type": "sentence_transformers.models.Dense"}
    edit(folder / "modules.json", lambda modules: modules.insert(2, dense))
    write(folder / "3_Dense" / "config.json", {"in_features": 32, "out_features": 8, "bias": True} | config)


def test_a_plain_folder_needs_a_pooling(tiny_bert: Path) -> None:
    with pytest.raises(BundleError, match="--pooling"):
        resolve(str(tiny_bert))
    expected = encoder_spec(base_model="tiny-bert", pooling=Pooling.CLS, normalize=False, dim=32)
    assert resolve(str(tiny_bert), pooling=Pooling.CLS).spec == expected


def test_both_schemas_of_sentence_transformers_are_read(copy: Path) -> None:
    make_old(copy)
    old = resolve(str(copy)).spec
    assert (old.pooling, old.normalize, old.max_tokens) == (Pooling.CLS, True, 40)
    make_new(copy)
    new = resolve(str(copy)).spec
    assert (new.pooling, new.normalize, new.max_tokens) == (Pooling.MEAN, False, 64)


def test_weights_may_lie_in_the_transformer_modules_own_folder(copy: Path, tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    make_old(root)
    copy.rename(root / "0_Transformer")
    edit(root / "modules.json", lambda modules: modules[0].update(path="0_Transformer"))
    (root / "sentence_bert_config.json").rename(root / "0_Transformer" / "sentence_bert_config.json")
    source = resolve(str(root))
    assert source.folder == root / "0_Transformer"
    assert source.spec.max_tokens == 40


def test_a_run_folder_records_everything(copy: Path) -> None:
    spec = encoder_spec(revision="abc", pooling=Pooling.MEAN_PADDED, max_tokens=30, dim=32, pad_to=30)
    write_json(spec, copy / "encoder.json")
    assert resolve(str(copy)).spec == spec
    with pytest.raises(BundleError, match="pads to 30 tokens, fewer than the 40"):
        resolve(str(copy), max_tokens=40)
    edit(copy / "encoder.json", lambda value: value.update(dim=33))
    with pytest.raises(BundleError, match=r"dim 33 and config\.json 32"):
        resolve(str(copy))


def test_arguments_replace_limits_but_never_the_recorded_pooling(copy: Path) -> None:
    make_old(copy)
    spec = resolve(str(copy), max_tokens=20, normalize=False, pooling=Pooling.CLS).spec
    assert (spec.max_tokens, spec.normalize) == (20, False)
    with pytest.raises(BundleError, match="made with pooling cls, not mean"):
        resolve(str(copy), pooling=Pooling.MEAN)
    with pytest.raises(BundleError, match="64 positions, fewer than the 65"):
        resolve(str(copy), max_tokens=65)


@pytest.mark.parametrize(
    ("message", "changes"),
    [
        ("causal language model", {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}),
        ("causal language model", {"is_decoder": True}),
        ("model_type 'xlnet': the supported families are bert, roberta", {"model_type": "xlnet"}),
        (
            "It has RMSNorm, grouped keys and values, rotary positions; the nearest family is eurobert",
            {"model_type": "llama", "rms_norm_eps": 1e-6, "num_key_value_heads": 2, "rope_theta": 1e4},
        ),
        (
            r"'new' and code of its own \(auto_map\), which is never run",
            {"model_type": "new", "auto_map": {"A": "b.C"}},
        ),
        ("position_embedding_type 'relative_key', and only 'absolute'", {"position_embedding_type": "relative_key"}),
        ("position_embedding_type 'alibi', and only 'absolute'", {"position_embedding_type": "alibi"}),
        ("states ALiBi positions", {"alibi_starting_size": 512}),
        ("states a mixture of experts", {"model_type": "nomic_bert", "num_experts": 8}),
        ("states adapters", {"model_type": "xlm-roberta", "lora_adaptations": ["retrieval.query"]}),
        ("partial_rotary_factor 0.5: only whole heads", {"rope_parameters": {"partial_rotary_factor": 0.5}}),
        ("rotary_emb_fraction 0.25: only whole heads", {"rotary_emb_fraction": 0.25}),
        ("scales rotary positions by dynamic", {"rope_scaling": {"type": "dynamic", "factor": 2}}),
        ("scales rotary positions by longrope", {"rope_parameters": {"full_attention": {"rope_type": "longrope"}}}),
        ("relative_attention None, and only True", {"model_type": "deberta-v2"}),
        ("conv_kernel_size|a convolution", {"conv_kernel_size": 3}),
        ("relative_attention_num_buckets 64, and only 32", {"model_type": "t5", "relative_attention_num_buckets": 64}),
        ("no d_model", {"model_type": "t5", "relative_attention_num_buckets": 32}),
        ("no hidden_size", {"hidden_size": None}),
    ],
)
def test_unsupported_models_are_refused(copy: Path, message: str, changes: dict[str, object]) -> None:
    edit(copy / "config.json", lambda config: config.update(changes))
    with pytest.raises(BundleError, match=message):
        resolve(str(copy), pooling=Pooling.MEAN)


def test_code_of_a_folder_is_never_run_and_its_own_weights_are_refused(copy: Path) -> None:
    (copy / "code.py").write_text("raise SystemExit('this ran')")
    edit(copy / "config.json", lambda config: config.update(auto_map={"AutoModel": "code.Model"}))
    reference = Reference.load(resolve(str(copy), pooling=Pooling.MEAN))
    assert type(reference.model).__module__.startswith("transformers.")
    weights = load_file(copy / "model.safetensors")
    save_file(weights | {"encoder.layer.0.adapter.weight": torch.ones(2)}, copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(BundleError, match=r"weights that transformers' BertModel lacks: encoder\.layer\.0\.adapter"):
        Reference.load(resolve(str(copy), pooling=Pooling.MEAN))


def test_long_encoders_have_a_cap_that_is_stated_and_can_be_raised(
    copy: Path, caplog: pytest.LogCaptureFixture
) -> None:
    edit(copy / "config.json", lambda config: config.update(max_position_embeddings=8192))
    edit(copy / "tokenizer_config.json", lambda config: config.update(model_max_length=8000))
    assert resolve(str(copy), pooling=Pooling.MEAN).spec.max_tokens == 512
    assert resolve(str(copy), pooling=Pooling.MEAN).spec.max_tokens == 512
    assert [record.getMessage() for record in caplog.records] == [
        f"{copy} could take 8000 tokens: the limit is 512; --max-tokens raises it"
    ]
    assert resolve(str(copy), pooling=Pooling.MEAN, max_tokens=8192).spec.max_tokens == 8192
    make_old(copy)
    write(copy / "sentence_bert_config.json", {"max_seq_length": 2048, "do_lower_case": False})
    assert resolve(str(copy)).spec.max_tokens == 2048
    assert len(caplog.records) == 1


def test_missing_parts_are_named(copy: Path) -> None:
    def check(message: str) -> None:
        with pytest.raises(BundleError, match=message):
            resolve(str(copy), pooling=Pooling.MEAN)

    (copy / "tokenizer.json").unlink()
    check(r"no tokenizer\.json")
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    check(r"only pickled weights.*model\.safetensors")
    (copy / "pytorch_model.bin").unlink()
    check("no weights")
    (copy / "config.json").write_text("{", encoding="utf-8")
    check("is not JSON")
    (copy / "config.json").unlink()
    check(r"no config\.json")


def test_dense_weights_are_never_unpickled(copy: Path) -> None:
    make_old(copy)
    add_dense(copy)
    (copy / "3_Dense" / "pytorch_model.bin").write_bytes(b"pickled")
    source = resolve(str(copy))
    assert (source.spec.dim, source.dense) == (8, (copy / "3_Dense",))
    with pytest.raises(BundleError, match="never opened"):
        Reference.load(source)


def test_a_default_prompt_is_a_template_and_an_encoder_without_one_may_get_one(copy: Path) -> None:
    make_old(copy)
    assert resolve(str(copy), head=HeadSpec(template="query: {text}")).spec.template == "query: {text}"
    with pytest.raises(BundleError, match="made with layers"):
        resolve(str(copy), head=HeadSpec(layers=(0, -1)))
    write(copy / "config_sentence_transformers.json", {"prompts": {"query": "query: "}, "default_prompt_name": "query"})
    assert resolve(str(copy)).spec.template == "query: {text}"
    with pytest.raises(BundleError, match=r"made with template query: \{text\}, not passage: \{text\}"):
        resolve(str(copy), head=HeadSpec(template="passage: {text}"))
    edit(copy / "1_Pooling" / "config.json", lambda c: c.update(include_prompt=False))
    with pytest.raises(BundleError, match="prompt 'query'"):
        resolve(str(copy))


@pytest.mark.parametrize(
    ("head", "problem"),
    [
        (HeadSpec(pooling=Pooling.MEAN, layers=(3,)), "2 layers and no layer 3"),
        (HeadSpec(ditto=Ditto(layer=2, head=0)), "no head 2:0"),
        (HeadSpec(pooling=Pooling.MASK, template="{text} means it."), r"\[MASK\] once in the template"),
        (HeadSpec(pooling=Pooling.MASK), "needs a template"),
        (HeadSpec(pooling=Pooling.DITTO), "set it for ditto only"),
    ],
)
def test_heads_that_the_encoder_lacks_are_refused(tiny_bert: Path, head: HeadSpec, problem: str) -> None:
    with pytest.raises(BundleError, match=problem):
        Reference.load(resolve(str(tiny_bert), head=head))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda path: os.truncate(path, 5000), "cannot be loaded"),
        (lambda path: path.write_bytes(b"\xff" * 8 + path.read_bytes()[8:]), "cannot be loaded"),
        (
            lambda p: edit(p.parent / "config.json", lambda c: c.update(hidden_size=48)),
            "cannot be loaded|lacks weights",
        ),
    ],
    ids=["truncated", "corrupted", "shapes"],
)
def test_unusable_weights_are_one_clear_error(copy: Path, spoil: Edit, message: str) -> None:
    spoil(copy / "model.safetensors")
    with pytest.raises(BundleError, match=message):
        Reference.load(resolve(str(copy), pooling=Pooling.MEAN))


@pytest.mark.parametrize("name", ["./absent", "a/b/c", "~/absent", ""])
def test_paths_that_do_not_exist_are_not_looked_up_on_a_hub(name: str) -> None:
    with pytest.raises(BundleError, match="does not exist"):
        resolve(name)


def test_a_hub_name_is_recorded_with_its_commit_and_a_failed_download_is_one_clear_error(monkeypatch, copy):
    download = Mock(side_effect=[LocalEntryNotFoundError("no network"), str(copy)])
    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    with pytest.raises(BundleError, match=r"owner/name at revision v2 .*check the name and the network"):
        resolve("owner/name", revision="v2")
    spec = resolve("owner/name", revision="v2", pooling=Pooling.MEAN).spec
    assert (spec.base_model, spec.revision) == ("owner/name", "encoder")
    (name,), options = download.call_args
    assert (name, options["revision"]) == ("owner/name", "v2")
    assert not [pattern for pattern in options["allow_patterns"] if "bin" in pattern or "py" in pattern]
    with pytest.raises(InputError, match="is for hub names"):
        resolve(str(copy), revision="v2", pooling=Pooling.MEAN)
