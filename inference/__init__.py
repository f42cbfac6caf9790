"""This package puts a trained model to work: it samples text, scores it, and solves problems."""
