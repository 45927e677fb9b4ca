"""What a run leaves behind and what is made of it: events, metrics, goodput, alerts, summaries and reports."""
