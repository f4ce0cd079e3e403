"""Turns a model name into what the engine needs: download, convert and compile what is missing."""
