"""Every option of every command, one file per command. Imports no torch."""
