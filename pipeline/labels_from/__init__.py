"""Labels that somebody else's tools made, brought into a cache; and a cache's labels for those tools."""
