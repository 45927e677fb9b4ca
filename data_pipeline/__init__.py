"""Streaming text-image data: shards in S3 or a folder, an index, an elastic order, decoded batches.

Independent of the model and of torch.
"""
