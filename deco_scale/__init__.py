"""deco-scale: cluster-scale training of the frequency-decoupled pixel-diffusion model DeCo."""

__version__ = "0.1.0"
