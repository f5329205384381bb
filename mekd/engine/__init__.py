"""The stages: one file each, a plain function over a Run, that reads top to bottom."""
