"""Every picture of the project, drawn once."""
