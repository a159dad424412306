"""Where structures come from: one reader per file format, selection, splits, statistics.

A reader is a module of this package with `read(path, **options)`, an iterator over `Structure`s; it is found
by its name.
"""
