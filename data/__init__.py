"""Readers of webdataset tar shards: what a training stage consumes, and the writer of what they read.

tar         the tar format: names, writing, reading
shards      which reader takes which sample, the order, the exact position
image_text  images with captions             -> batches for the image tokenizer
token_text  stored image latents, captions   -> batches for the text projector and the flow
transforms  bytes -> RGB image -> crop       captions  where a sample's caption lies

Every loader yields dicts; the keys and shapes are written at `build_image_loader` and `build_token_loader`.
Nothing here knows a network, a run folder or a device.
"""
