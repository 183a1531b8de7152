"""Plans of releases of which only the headers exist."""

import math

from release_helpers import FOUR_BIT, LLAMA, llama_shapes

from converter.plan import build_plan
from converter.plan.match import find_map, match_release
from converter.source import Header, TensorInfo, build_source

FILE = "model.safetensors"


def llama_source(layers):
    config = LLAMA | {"num_hidden_layers": layers}
    tensors, at = {}, 1000
    for name, shape in sorted(llama_shapes(config).items()):
        size = 2 * math.prod(shape)
        tensors[name] = TensorInfo(name, "BF16", shape, FILE, at, at + size)
        at += size
    header = Header(FILE, at, "0" * 64, tensors, {})
    return build_source(where="headers", config=config, headers={FILE: header})


def plan_llama(layers, options=FOUR_BIT):
    source = llama_source(layers)
    return build_plan(source, match_release(source, find_map(source.config)), options)
