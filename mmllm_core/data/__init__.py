"""Datasets, collation and the feature store."""
