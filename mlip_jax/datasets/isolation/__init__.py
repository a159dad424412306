"""Native parsers in a separate process: RDKit, HDF5 and SQLite.

These parsers trust their input more than pure Python does: a corrupted file can crash the process,
or keep it busy without end. `process.py` starts the process, and `program.py` is the program that it
runs. The other files are the parsers that the package uses.
"""
