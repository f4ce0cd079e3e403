"""Images on their way to a model: what a library takes, reading files, making pixels of them.

Both halves know it; it knows neither, and imports Pillow only where an image is read.
"""
