"""A teacher behind servers of vLLM or SGLang: they score texts, given as token ids, and return the head."""
