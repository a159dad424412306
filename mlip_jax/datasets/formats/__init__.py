"""File formats of the readers: archives, NumPy files, databases, restricted pickles."""
