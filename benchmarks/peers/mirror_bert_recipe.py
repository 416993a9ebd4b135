"""Mirror-BERT's sentence recipe as its authors published it, on a CPU: the peer of our training.

    python mirror_bert_recipe.py --base FOLDER --corpus FILE --output FOLDER --pooling mean --seed 42

Plain PyTorch and transformers, none of our code. It follows the published code (cambridgeltl/mirror-bert at
8b6b9de): every view padded to 50 tokens, five characters of the second one replaced by "[MASK]" unless the text is
shorter than 30 characters, two forward passes with dropout 0.1, NT-Xent at temperature 0.04 over batches of 200 text
pairs, AdamW at 2e-5, one epoch, "mean" over padding too. Its mixed precision needs a GPU, so a CPU computes in fp32.

Two changes favour it over its own code: the loss is one cross-entropy over a 400 x 400 matrix where
pytorch-metric-learning builds one of 400 x 159,200, and the lines are tokenised without starting worker processes.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from pathlib import Path

import torch
from transformers import AutoModel, AutoTokenizer

BATCH = 200
TOKENS = 50
TEMPERATURE = 0.04
LEARNING_RATE = 2e-5
SPAN = 5
SHORTEST_MASKED = 30


def mask_span(text: str, draw: random.Random) -> str:
    """Mask five characters as the published code does: it replaces the first occurrence of the drawn span."""
    if len(text) < SHORTEST_MASKED:
        return text
    start = draw.randrange(len(text) - SPAN)
    left, right = text.split(text[start : start + SPAN], 1)
    return f"{left} [MASK] {right}"


def nt_xent(vectors: torch.Tensor) -> torch.Tensor:
    """Return the mean cross-entropy of finding each of 2B vectors' partner among the 2B - 1 others."""
    unit = torch.nn.functional.normalize(vectors, dim=1)
    count = len(unit)
    similarity = unit @ unit.T / TEMPERATURE
    similarity.fill_diagonal_(float("-inf"))
    return torch.nn.functional.cross_entropy(similarity, (torch.arange(count) + count // 2) % count)


def main() -> int:
    """Tune and save; prints one JSON object."""
    parser = argparse.ArgumentParser()
    for name in ("base", "corpus", "output"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--pooling", choices=("mean", "cls"), default="mean")
    parser.add_argument("--seed", type=int, default=42)
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    draw = random.Random(options.seed)
    texts = [line.strip() for line in options.corpus.read_text(encoding="utf-8").splitlines() if line.strip()]
    tokenizer = AutoTokenizer.from_pretrained(options.base, local_files_only=True)
    model = AutoModel.from_pretrained(options.base, local_files_only=True, use_safetensors=True)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.01)
    order = draw.sample(texts, len(texts))
    losses = []
    for start in range(0, len(order) - BATCH + 1, BATCH):
        batch = order[start : start + BATCH]
        views = []
        for view in (batch, [mask_span(text, draw) for text in batch]):
            inputs = tokenizer(view, padding="max_length", truncation=True, max_length=TOKENS, return_tensors="pt")
            hidden = model(**inputs).last_hidden_state
            views.append(hidden[:, 0] if options.pooling == "cls" else hidden.mean(1))
        loss = nt_xent(torch.cat(views))
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(loss.item())
    model.save_pretrained(options.output)
    tokenizer.save_pretrained(options.output)
    sys.stdout.write(json.dumps({"texts": len(texts), "steps": len(losses), "loss": losses[-1]}) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
