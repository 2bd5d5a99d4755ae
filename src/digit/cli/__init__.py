"""The command line. Each command is a few lines over the library."""
