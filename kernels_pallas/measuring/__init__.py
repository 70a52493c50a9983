"""What `bench` and `tune` are made of: the cases, their references, the clock, and a process to crash in."""
