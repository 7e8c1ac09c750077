"""From and to other projects' checkpoint formats."""
