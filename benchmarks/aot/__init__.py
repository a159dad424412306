"""Programs of the package compiled for GPUs and TPUs that are absent: see README.md."""
