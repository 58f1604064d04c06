"""A trained run as a SentenceTransformer folder."""
