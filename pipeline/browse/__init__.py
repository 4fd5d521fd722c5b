"""A page of a cache's labels: chosen examples, token by token, in one file that needs no server."""
