"""Youtu-LLM as transformers 5 names its type; the runtimes know the published name."""

from dataclasses import replace

from arch_maps.models import youtu_llm

MAP = replace(youtu_llm.MAP, model_type="youtu")
