"""Hard negatives: encode the corpus with live weights, search it sharded over all ranks, select, refresh."""
