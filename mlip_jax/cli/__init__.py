"""Command line: start of the process, flags, help and console log."""
