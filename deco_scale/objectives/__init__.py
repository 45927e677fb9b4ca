"""Training objectives: flow matching, the frequency-aware loss, REPA."""

from deco_scale.objectives.config import ObjectiveConfig
from deco_scale.objectives.objective import LOSS_NAMES, Objective, drop_condition

__all__ = ["LOSS_NAMES", "Objective", "ObjectiveConfig", "drop_condition"]
