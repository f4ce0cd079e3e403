"""Grammars that answers must match: from what a request says to llguidance's matchers.

Knows texts, schemas and vocabularies; does not know requests, batches or logits.
"""
