"""Every option of every command, one file per command. Needs no torch."""
