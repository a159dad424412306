"""The store: structures as columns in shards on disk, and the conversion of any readable file to one."""
