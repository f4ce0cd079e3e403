"""Text in and out of the engine: tokenizer, prompt templates, streams, stop strings.

Knows token ids and strings; knows nothing of tensors, devices or scheduling.
"""
