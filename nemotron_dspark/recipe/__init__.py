"""The stages in order, the demo, the selftest and the small models that they make."""
