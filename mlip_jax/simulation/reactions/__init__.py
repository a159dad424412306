"""Reaction paths: the nudged elastic band."""
