"""`localmistral` alone: what this machine is, what is installed, and how to start."""

import os
import platform
import sys

import psutil

from localmistral import __version__
from localmistral.models.cache import list_local
from localmistral.models.names import DEMO
from localmistral.units import format_bytes


def welcome() -> None:
    """Print a few lines to stdout; loads neither a model nor llama.cpp."""
    memory = psutil.virtual_memory()
    models = [model for model in list_local() if model.complete]
    names = ", ".join(model.name for model in models[:3]) + (", ..." if len(models) > 3 else "")
    if models:
        first, question = models[0].name, '"Why is the sky blue?"'
    else:
        first, question = DEMO, '--effort high "What is 31 + 46?"'
    lines = [
        f"localmistral {__version__} runs Mistral and other GGUF chat models on this machine.",
        "",
        f"  machine   {platform.system()} {platform.machine()}, "
        f"{psutil.cpu_count(logical=False) or os.cpu_count()} cores, "
        f"{format_bytes(memory.total)} RAM ({format_bytes(memory.available)} available)",
        f"  models    {names or 'none on this disk yet, but for the toy in the box: demo'}",
        "",
        f"  localmistral run -m {first} {question}",
        f"  localmistral chat {first}",
        "  localmistral plan small-4       what would run here, how fast, and why",
        "  localmistral pull small-4       download what the plan chose",
        "  localmistral models             the models known by name",
        "",
        "Any GGUF file of a chat model runs, too; localmistral --help lists all commands.",
    ]
    sys.stdout.write("\n".join(lines) + "\n")
