"""What `MFAC` takes on several ranks, computed before anything is allocated: memory, messages, seconds."""

from mfac_hf.planner.machine import MACHINES, Machine
from mfac_hf.planner.ranks import RankPlan, plan_ranks

__all__ = ["MACHINES", "Machine", "RankPlan", "plan_ranks"]
