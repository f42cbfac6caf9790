"""Models in and out: transformers' folders and GGUF files to our checkpoints, and back."""
