"""Chats: their template, and what of them the model itself would have written."""
