"""Batch inference: a plan of batches, workers that do them, results that exist once. Standard library only, pyarrow for Parquet."""
