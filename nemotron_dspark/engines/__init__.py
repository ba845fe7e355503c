"""Exchange with serving engines: checkpoints in and out, their command lines, and what they measure of themselves."""
