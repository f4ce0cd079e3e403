"""The command line: one file per command. Parses, calls the other parts, prints."""
