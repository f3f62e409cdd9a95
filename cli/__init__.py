"""The command line: parse, call the library, render, turn errors into exit codes."""
