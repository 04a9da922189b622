"""The embedded model, its problems, and the table that shows the method at work."""
