"""Report of a data set: summary, tables and figure."""
