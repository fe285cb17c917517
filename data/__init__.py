"""Readers of webdataset tar shards, which every training stage consumes, and their writer.

config      what a stage reads: data sets and their weights, captions, filters, workers
readers     stored tokens or captions -> batches: an endless stream, or one pass
images      images -> batches, for training and for encoding
shards      which reader takes which sample, the order, the exact position
tar         names, writing and reading of tars         storage      where they lie
transforms  bytes -> RGB image -> crop                 captions     where they lie, which is taken
filters     which samples are good enough              samples      draws, bad ones, how many may be
sources     folders, tables, COCO, ... -> entries      entries      samples that are not yet read
tables      csv, jsonl, parquet -> rows                packing      entries -> shards
hub         data sets by their id                      scenes       a data set that is a program
files       writing files whole                        workers      what works in parallel

Nothing here knows a network, a run folder or a device.
"""
