"""From raw images and text to microbatches.

    ingest → source → packing → mixture → batch → decode → loader

Each file knows only those to its left: `ingest` writes a `source`, `packing` lays its documents into sequences,
`mixture` says which sequence sample i of a run is, `batch` assembles and deals sequences, `decode` makes pixels.
`loader.TrainingData` is what the training loop sees.
"""
