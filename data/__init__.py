"""Readers of webdataset tar shards, which every training stage consumes, and their writer.

config      what a stage reads: data sets and their weights, captions, filters, workers
readers     stored tokens or captions -> batches: an endless stream, or one pass
shards      which reader takes which sample, the order, the exact position
tar         names, writing and reading of tars         storage      where they lie
transforms  bytes -> RGB image -> crop                 captions     where they lie, which is taken
images      images -> batches                          samples      draws, bad ones, how many may be
filters     which samples are good enough              files        writing files whole
sources     folders, tables, COCO, ... -> entries      entries      samples that are not yet read
tables      csv, jsonl, parquet -> rows                packing      entries -> shards
encoding    shards as they are encoded

Nothing here knows a network, a run folder or a device.
"""
