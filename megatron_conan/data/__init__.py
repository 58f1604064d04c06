"""Text in: tokenizer, packed language-model data, SFT sequences, text pairs, deterministic sampling."""
