"""A companion process beside each rank, which sees that it hangs or is gone and ends the job everywhere."""
