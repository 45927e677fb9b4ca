"""Cluster jobs: SLURM, Kubernetes, or plain hosts through deepspeed's launcher."""
