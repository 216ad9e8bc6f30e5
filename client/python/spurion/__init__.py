"""Client and tools of Spurion."""
