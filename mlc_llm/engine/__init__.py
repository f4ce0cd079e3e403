"""The engine: turns prompts into tokens on a `ModelRunner`."""
