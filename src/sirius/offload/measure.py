"""How fast weights come, and how fast they are read where they are: what a plan is made of."""
