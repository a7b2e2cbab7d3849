"""Batches from records: TFRecord and HDF5 files, examples and the input pipeline."""
