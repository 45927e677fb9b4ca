"""Reading a run's folder from outside: its events, where its time went, and how it is shown."""
