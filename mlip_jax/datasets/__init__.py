"""Training and evaluation data: file readers, the store, filters, splits and statistics."""
