"""The server: its one port, the runs that it keeps going, and the commands that it answers."""
