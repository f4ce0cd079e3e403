"""Storage formats of weights: a table of schemes, and packing in NumPy. Knows no model."""
