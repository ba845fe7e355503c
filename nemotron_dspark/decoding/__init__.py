"""Speculative decoding: draft, verify, accept, commit."""
