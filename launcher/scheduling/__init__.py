"""How a run is handed to a cluster: SLURM, Kubernetes, or plain hosts by deepspeed's launcher."""
