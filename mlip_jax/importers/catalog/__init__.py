"""Published force fields: the list of them, and downloads."""
