"""The options of ``logitcask train``, by what they are about."""
