"""A step: a compiled model's graphs made ready, what each action does, and who runs the actions in which order."""
