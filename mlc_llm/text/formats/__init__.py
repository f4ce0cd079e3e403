"""Tokenizer files of other formats, read and turned into the content of a tokenizer.json.

Knows vocabularies and how text is cut; knows nothing of prompts, engines or models.
"""

# Where a tokenizer may be, what is looked for first in front.
FILE_PATTERNS = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "*.tiktoken",
    "tiktoken.model",
    "tekken.json",
    "tokenizer_model",
    "rwkv_vocab*.txt",
    "vocab.txt",
)
