"""The command line: the start of its process, its flags, and its log on the console."""
