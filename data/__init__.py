"""Readers of webdataset tar shards: what a training stage consumes, and the writer of what they read.

image_text   images with captions             -> batches for the image tokenizer
token_text   stored image latents, captions   -> batches for the text projector and the flow
mixture      what both are told: data sets and their weights, captions, filters, workers
shards       which reader takes which sample, the order, the exact position
tar          the tar format: names, writing, reading      storage      local files, web servers, pipes
transforms   bytes -> RGB image -> crop                   captions     where captions lie, which is taken
filters      which samples are good enough                bad_samples  which cannot be used, and how many may be
draws        the random numbers of a sample

Every loader yields dicts; the keys and shapes are written at `build_image_loader` and `build_token_loader`.
Nothing here knows a network, a run folder or a device.
"""
