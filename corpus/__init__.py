"""Text in, token rows out: tokenizers, shards, the chat template, records, and the toy world."""
