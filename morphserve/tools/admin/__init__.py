"""Orders to a running server, a command each: pin, restore, pause, resume, drain."""
