"""Objects by key: the interface, local folders, S3, a disk cache, durable files."""
