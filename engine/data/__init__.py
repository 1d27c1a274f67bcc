"""Sources of rows, token corpora, packing and batch plans."""
