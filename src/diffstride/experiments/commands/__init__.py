"""The `diffstride` command and its subcommands."""
