"""A plain PyTorch reading of the verdict contract: one rollout at a time, real libraries, no tricks.

It exists to disagree with the daemon. Speed is no aim; every number is computed the way the contract words it.
"""
