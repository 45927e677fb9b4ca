"""Streaming text-image data: shards in S3 or a folder, an index, an elastic order, decoded batches.

Knows nothing of the model or of torch.
"""
