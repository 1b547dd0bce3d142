"""Files to records to documents to packed batches."""
