"""`localmistral` alone: what this machine is, what is installed, and how to start."""

import os
import platform
import sys

import psutil

from localmistral import __version__
from localmistral.models.cache import list_local
from localmistral.units import format_bytes


def welcome() -> None:
    """Print a few lines to stdout; loads neither a model nor llama.cpp."""
    memory = psutil.virtual_memory()
    models = [model for model in list_local() if model.complete]
    names = ", ".join(model.name for model in models[:3]) + (", ..." if len(models) > 3 else "")
    first = models[0].name if models else "FILE.gguf"
    lines = [
        f"localmistral {__version__} runs Mistral and other GGUF chat models on this machine.",
        "",
        f"  machine   {platform.system()} {platform.machine()}, "
        f"{psutil.cpu_count(logical=False) or os.cpu_count()} cores, "
        f"{format_bytes(memory.total)} RAM ({format_bytes(memory.available)} available)",
        f"  models    {names or 'none on this disk yet'}",
        "",
        f'  localmistral run -m {first} "Why is the sky blue?"',
        f"  localmistral chat {first}",
        "  localmistral models        the models known by name; --help lists every command",
    ]
    sys.stdout.write("\n".join(lines) + "\n")
