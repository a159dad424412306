"""Building blocks that the models share: layers, radial bases, embeddings, readouts."""
