"""File layouts that several readers share: archives, NumPy files, ASE databases, restricted pickles."""
