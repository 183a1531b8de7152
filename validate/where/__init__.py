"""Where two computations part: module by module, in the order in which the reference runs them.

The torch reference and the MLX runtime run the same prompt; what goes into and comes out of every
module that the map pairs is compared. How far two right computations may be apart is measured, not
chosen: the reference runs a second time in float64 (or, where that would be too large, with every
module's output disturbed by one rounding), and its own distance is the floor.
"""

from validate.where.compare import Divergence, Step, Where, compare_traces
from validate.where.mlx_trace import trace_mlx
from validate.where.pairs import Pair, pair_modules
from validate.where.torch_trace import Reference, trace_reference
from validate.where.trace import Trace

__all__ = [
    "Divergence",
    "Pair",
    "Reference",
    "Step",
    "Trace",
    "Where",
    "compare_traces",
    "pair_modules",
    "trace_mlx",
    "trace_reference",
]
