"""Makes the chat templates of Mistral's tokenizer families with mistral-common's own generator.

    python scripts/make_templates.py [--check]

Writes one file per family into the package; `--check` writes nothing and exits with 1 if one
differs from what is there. Needs mistral-common, which users of the program never need.
Knows nothing of how the templates are used.
"""

import argparse
import sys
from pathlib import Path

from mistral_common.integrations.chat_templates.chat_templates import generate_chat_template
from mistral_common.tokens.tokenizers.base import TokenizerVersion

FOLDER = Path(__file__).resolve().parent.parent / "localmistral" / "chatformat" / "templates"
FAMILIES = {
    # name: (version, thinking, values of reasoning_effort)
    "v3-tekken": (TokenizerVersion.v3, False, None),
    "v7": (TokenizerVersion.v7, False, None),
    "v11": (TokenizerVersion.v11, False, None),
    "v13": (TokenizerVersion.v13, False, None),
    "v13-reasoning": (TokenizerVersion.v13, True, None),
    "v15": (TokenizerVersion.v15, True, ("none", "high")),
}


def make_template(family: str) -> str:
    """The Jinja source of one family, ending in one newline."""
    version, thinking, efforts = FAMILIES[family]
    source = generate_chat_template(
        spm=False,
        tokenizer_version=version,
        image_support=True,
        audio_support=False,
        thinking_support=thinking,
        default_system_prompt=None,
        plain_thinking_support=False,
        use_special_token_variables=True,
        model_settings_fields=None,
        reasoning_effort_values=efforts,
        reasoning_effort_default=efforts[0] if efforts else None,
    )
    return source.rstrip("\n") + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    check = parser.parse_args().check
    stale = []
    for family in FAMILIES:
        path = FOLDER / f"{family}.jinja"
        source = make_template(family)
        if not path.is_file() or path.read_text(encoding="utf-8") != source:
            stale.append(family)
            if not check:
                path.write_text(source, encoding="utf-8", newline="\n")
    print(f"{len(FAMILIES)} templates, changed: {', '.join(stale) or 'none'}")
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
