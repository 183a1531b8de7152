"""Plans: the whole conversion, decided from headers and config before a weight is read."""

from converter.plan.build import build_plan
from converter.plan.model import Output, Plan, Shard, StoredTensor
from converter.plan.options import Options

__all__ = ["Options", "Output", "Plan", "Shard", "StoredTensor", "build_plan"]
