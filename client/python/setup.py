"""The version stands in one place, the file VERSION at the top of the tree."""

from pathlib import Path

from setuptools import setup

setup(version=(Path(__file__).resolve().parents[2] / "VERSION").read_text(encoding="ascii").strip())
