"""Calls of tools in the text of answers: a file for each way in which models write them."""
