"""From records to token ids: data files, tokenizers, and the staged table of tokens."""
