"""Tiny random encoders of every family, each with a small tokenizer of the family's own kind."""

import json
import string
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from encoders.families import FAMILIES
from export.proof.proof_texts import EDGE_CASES, parity_texts

BRACKETS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
ANGLES = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")
POSITIONS = 64
"""Length limit in tokens."""

OWN_TOKENIZERS = ("bert", "roberta", "xlm-roberta", "camembert", "distilbert", "electra", "mpnet")
"""Families whose tiny encoders name the family's own tokenizer class, as most repositories do."""

SIZES: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
DISTILBERT_SIZES: dict[str, Any] = {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 64}

SENTENCE_TOKENS = {"cls_token_id": 2, "sep_token_id": 3}
WINDOWED: dict[str, Any] = SIZES | {"layer_types": ["sliding_attention", "full_attention"]}
GROUPED: dict[str, Any] = SIZES | {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10_000.0, "original_max_position_embeddings": 16}
T5_SIZES: dict[str, Any] = {"d_model": 32, "num_layers": 2, "num_heads": 2, "d_kv": 12, "d_ff": 64}
DISENTANGLED: dict[str, Any] = SIZES | {
    **{"relative_attention": True, "position_buckets": 8, "norm_rel_ebd": "layer_norm", "share_att_key": True},
    **{"pos_att_type": ["p2c", "c2p"], "position_biased_input": False, "type_vocab_size": 0},
}

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("Bert", SIZES),
    "roberta": ("Roberta", SIZES | {"type_vocab_size": 1}),
    "xlm-roberta": ("XLMRoberta", SIZES | {"type_vocab_size": 1}),
    "camembert": ("Camembert", SIZES | {"type_vocab_size": 1}),
    "distilbert": ("DistilBert", DISTILBERT_SIZES),
    "electra": ("Electra", SIZES | {"embedding_size": 16}),
    "mpnet": ("MPNet", SIZES),
    "ernie": ("Ernie", SIZES),
    "albert": ("Albert", SIZES | {"embedding_size": 16, "num_hidden_layers": 4, "num_hidden_groups": 2}),
    "nomic_bert": ("NomicBert", SIZES),
    "modernbert": ("ModernBert", WINDOWED | {"local_attention": 16, "norm_bias": True, **SENTENCE_TOKENS}),
    "gte": ("Gte", SIZES | {"attention_probs_dropout_prob": 0.1}),
    "eurobert": ("EuroBert", GROUPED | {"attention_bias": True, "rope_parameters": YARN}),
    "qwen3": ("Qwen3", GROUPED),
    "gemma3_text": ("Gemma3Text", GROUPED | WINDOWED | {"sliding_window": 16, "use_bidirectional_attention": True}),
    "t5": ("T5Encoder", T5_SIZES | {"feed_forward_proj": "gated-gelu"}),
    "jina_embeddings_v3": ("JinaEmbeddingsV3", SIZES),
    "deberta-v2": ("DebertaV2", DISENTANGLED),
}
"""Prefix of the classes in transformers and the sizes, by `model_type`."""


def write_tiny_encoder(family: str, folder: Path, layers: int = 2, labels: int = 0) -> None:
    """Write a plain Hugging Face folder: random weights (2 layers, 32 wide) and a tokenizer trained on some English.

    Weights are drawn ten times wider than usual, so
    that attention and position change the vectors visibly. Embeddings of padding are not zero, so that reading them by
    mistake changes vectors too. With `labels`, it is a sequence classifier: with one, a cross-encoder.
    """
    prefix, sizes = MODELS[family]
    tokenizer = tokenizer_of(family)
    special = ANGLES if tokenizer.token_to_id("<pad>") is not None else BRACKETS
    pad = save_tokenizer(tokenizer, special, folder)
    path = folder / "tokenizer_config.json"
    if family in OWN_TOKENIZERS:
        path.write_text(json.dumps(json.loads(path.read_text()) | {"tokenizer_class": f"{prefix}Tokenizer"}))
    first = FAMILIES[family].first_position({"pad_token_id": tokenizer.token_to_id(pad)})
    if FAMILIES[family].longest is not None:
        sizes = sizes | {"max_position_embeddings": POSITIONS + first}
    config = getattr(transformers, f"{prefix.removesuffix('Encoder')}Config")(
        vocab_size=tokenizer.get_vocab_size(),
        initializer_range=0.2,
        pad_token_id=tokenizer.token_to_id(pad),
        **({"num_labels": labels} if labels else {}),
        **sizes | {"n_layers" if family == "distilbert" else "num_hidden_layers": layers},
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = getattr(transformers, f"{prefix}{'ForSequenceClassification' if labels else 'Model'}")(config)
        for table in (FAMILIES[family].words, FAMILIES[family].positions):
            if table in dict(model.base_model.named_modules()):
                torch.nn.init.normal_(model.base_model.get_submodule(table).weight, std=0.2)
    model.save_pretrained(folder)


def write_pylate(folder: Path, **config: Any) -> None:
    """Add to a plain folder what PyLate writes for a ColBERT model: a dense layer to 8 components, prefixes."""
    modules = [("", "sentence_transformers.models.Transformer"), ("1_Dense", "pylate.models.Dense.Dense")]
    entries = [{"idx": i, "name": str(i), "path": path, "type": kind} for i, (path, kind) in enumerate(modules)]
    (folder / "modules.json").write_text(json.dumps(entries))
    prefixes = {"query_prefix": "[Q] ", "document_prefix": "[D] ", "query_length": 32, "prompts": {}}
    (folder / "config_sentence_transformers.json").write_text(json.dumps(prefixes | config))
    (folder / "1_Dense").mkdir()
    dense = {"in_features": 32, "out_features": 8, "bias": False}
    activation = {"activation_function": "torch.nn.modules.linear.Identity"}
    (folder / "1_Dense" / "config.json").write_text(json.dumps(dense | activation))
    weight = torch.randn(8, 32, generator=torch.Generator().manual_seed(0))
    save_file({"linear.weight": weight}, folder / "1_Dense" / "model.safetensors")


def write_tiny_static(
    family: str, folder: Path, *, dtype: torch.dtype = torch.float32, limit: int | None = POSITIONS, **stored: Any
) -> Tokenizer:
    """Write a folder as sentence-transformers (`static`) or model2vec (`model2vec`) does, and return its tokenizer.

    `stored` adds tensors to the table, such as model2vec's `weights` and `mapping`.
    """
    folder.mkdir(parents=True)
    tokenizer = tokenizer_of("bert")
    if limit is not None and family == "static":
        tokenizer.enable_truncation(limit)
    tokenizer.save(str(folder / "tokenizer.json"))
    table = torch.randn(tokenizer.get_vocab_size(), 32, generator=torch.Generator().manual_seed(0))
    table = (40 * table).round().clamp(-127, 127).to(dtype) if dtype is torch.int8 else table.to(dtype)
    name = "embeddings" if family == "model2vec" else "embedding.weight"
    save_file({name: table} | stored, folder / "model.safetensors")
    modules = [{"idx": 0, "name": "0", "path": ".", "type": "sentence_transformers.models.StaticEmbedding"}]
    (folder / "modules.json").write_text(json.dumps(modules))
    if family == "model2vec":
        config = {"model_type": "model2vec", "max_length": limit, "normalize": True}
        (folder / "config.json").write_text(json.dumps(config))
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, special: tuple[str, ...], folder: Path) -> str:
    """Save a tokenizer as transformers does, and return its padding token."""
    tokens = [special[i] for i in ((1, 3, 0, 2, 4) if special is ANGLES else range(5))]
    names = ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
    options = {**dict(zip(names, tokens, strict=True)), "model_max_length": POSITIONS}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **options).save_pretrained(folder)
    return tokens[0]


def write_tiny_bert(folder: Path, layers: int = 2) -> None:
    """Write a plain Hugging Face folder: a random BERT (2 layers, 32 wide), with a small hand-made vocabulary.

    Weights are drawn ten times wider than usual, so that attention and position change the vectors visibly.
    """
    letters = string.ascii_lowercase
    words = ["the", "cat", "dog", "sat", "on", "mat", "a", "man", "is", "playing", "guitar", "river", "##s", "##ing"]
    tokens = list(dict.fromkeys([*BRACKETS, *words, *letters, *(f"##{c}" for c in letters), *"0123456789.,?!"]))
    vocabulary = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    texts = {"single": "[CLS] $A [SEP]", "pair": "[CLS] $A [SEP] $B:1 [SEP]:1"}
    tokenizer.post_processor = processors.TemplateProcessing(special_tokens=[("[CLS]", 2), ("[SEP]", 3)], **texts)
    save_tokenizer(tokenizer, BRACKETS, folder)
    sizes = SIZES | {"vocab_size": len(vocabulary), "max_position_embeddings": POSITIONS, "num_hidden_layers": layers}
    config = transformers.BertConfig(initializer_range=0.2, **sizes)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformers.BertModel(config, add_pooling_layer=False).save_pretrained(folder)


def ragged_texts(count: int = 40) -> tuple[str, ...]:
    """Return some of the built-in proof texts with their edge cases, and texts that spell out special tokens.

    Cut to 2,000 characters, thirty times what a tiny encoder reads: transformers tokenises each text whole.
    """
    texts = (text[:2000] for text in parity_texts(short=count, medium=6, long=2))
    return (*texts, "<s> </s> <pad> <mask> <unk> are words here", "<pad><pad>", "a [PAD] b <pad> c")


def tokenizer_of(family: str) -> Tokenizer:
    """Train a tokenizer: byte-level BPE (RoBERTa), Unigram (XLM-R, CamemBERT), else WordPiece."""
    if family in ("roberta", "eurobert", "qwen3"):
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        options: dict[str, Any] = {"vocab_size": 600, "initial_alphabet": pre_tokenizers.ByteLevel.alphabet()}
        trainer: Any = trainers.BpeTrainer(special_tokens=list(ANGLES), show_progress=False, **options)
        processor: Any = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=False)
    elif family in ("xlm-roberta", "camembert"):
        tokenizer = Tokenizer(models.Unigram())
        tokenizer.normalizer = normalizers.NFKC()
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        tokenizer.decoder = decoders.Metaspace()
        options = {"vocab_size": 300, "unk_token": "<unk>"}
        trainer = trainers.UnigramTrainer(special_tokens=list(ANGLES), show_progress=False, **options)
        texts = {"single": "<s> $A </s>", "pair": "<s> $A </s> </s> $B </s>"}
        processor = processors.TemplateProcessing(special_tokens=[("<s>", 0), ("</s>", 2)], **texts)
    else:
        special = ANGLES if family == "mpnet" else BRACKETS
        unk = special[3] if special is ANGLES else special[1]
        tokenizer = Tokenizer(models.WordPiece(unk_token=unk))
        tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        tokenizer.decoder = decoders.WordPiece()
        trainer = trainers.WordPieceTrainer(vocab_size=300, special_tokens=list(special), show_progress=False)
        if family == "mpnet":
            processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), trim_offsets=True)
        else:
            processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    tokenizer.train_from_iterator([text for text in parity_texts(short=300) if text not in EDGE_CASES], trainer)
    tokenizer.post_processor = processor
    return tokenizer
