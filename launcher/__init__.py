"""Entry points that combine the packages: training, demo, preflight, job submission; nothing imports them."""
