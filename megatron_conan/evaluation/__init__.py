"""Scoring and searching: nDCG with bootstrap intervals, BM25, the MTEB protocol, `conan search`, the report."""
