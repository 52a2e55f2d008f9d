"""The command line: arguments, tables and plots over the tools."""
