"""From files, from the Hub, or from nothing, to tasks."""
