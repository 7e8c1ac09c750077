"""Engines: prompt embeddings -> streamed text, behind one protocol."""
