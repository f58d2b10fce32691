"""Benchmarks with a protocol of their own."""
