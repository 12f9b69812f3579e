"""Execution: the program, its plan, what feedback learns; noise, executors, schedules, memory, training in packages."""
