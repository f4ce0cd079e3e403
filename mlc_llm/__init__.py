"""Universal LLM engine: compile any open model for any device and serve it."""

__version__ = "0.1.0"
