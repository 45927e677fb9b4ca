"""What a run records and how it is shown: events, metrics, goodput, alerts, summaries, reports."""
