"""Accepted length and speed over prompt sets; tables and pictures."""
