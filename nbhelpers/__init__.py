"""Make a language model smaller and better, and know what it cost."""

__version__ = "0.1.0"
