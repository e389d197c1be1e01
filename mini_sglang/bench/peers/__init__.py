"""The stacks that are compared: how each is installed, run in a process of its own, and asked."""
