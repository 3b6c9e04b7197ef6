"""Generating with many adapters: the engine, and the chat on top of it."""
