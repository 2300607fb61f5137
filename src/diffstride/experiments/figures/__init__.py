"""Every picture of the project, drawn once, from plain numbers."""
