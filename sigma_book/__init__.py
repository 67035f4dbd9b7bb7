"""PaliGemma, built in the chapters of a book."""

__version__ = "0.1.0"
