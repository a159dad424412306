"""The store: structures as columns in shards on disk, and the conversion of files to stores."""
