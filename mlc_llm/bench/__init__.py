"""Speed of a compiled model: what is measured, how, and what is reported."""
