"""What was executed, what is claimed, what is in doubt: pure data structures, without clock, I/O or threads."""
