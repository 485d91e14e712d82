"""What can be done from a command line, a module each: `arguments` and `main`."""
