"""Losses as pure functions of logits or embeddings."""
