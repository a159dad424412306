"""Where structures come from: readers of file formats, the store, selection, splits, statistics."""
