"""Compressed models as Hugging Face folders: transformers reloads them once ``autocompress`` is imported."""
