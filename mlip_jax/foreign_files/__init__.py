"""JSON, YAML and npz files of other people, read at a cost in proportion to their size."""
