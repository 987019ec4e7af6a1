"""Namesake gives a chat model a name and an author of its own, proves that they hold, and ships it."""

__version__ = "0.1.0"
