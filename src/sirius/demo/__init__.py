"""The embedded model: its problems, the recipe that trains it, and the table that shows the method at work."""
