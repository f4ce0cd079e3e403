"""Tokenizer files of other formats, read and turned into the content of a tokenizer.json.

Knows vocabularies and how text is cut; knows nothing of prompts, engines or models.
"""
