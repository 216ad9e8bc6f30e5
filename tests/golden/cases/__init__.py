"""Seeded test cases: made-up words, tokenizers, models and SAEs, all written by the real libraries."""
