"""The commands: each module is named after its command and defines it as a function."""
